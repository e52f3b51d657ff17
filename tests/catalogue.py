"""THE table of every public algorithm: what the shared suite runs each of them through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jrobust import losses
from jrobust.attacks import (
    ALMA,
    APGD,
    CW,
    DDN,
    DIFGSM,
    EAD,
    FAB,
    FGSM,
    FMN,
    JSMA,
    MIFGSM,
    MSD,
    NES,
    NIFGSM,
    PDGD,
    PGD,
    RSFGSM,
    SINIFGSM,
    SPSA,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    ZOO,
    Attack,
    AutoAttack,
    Bandits,
    Boundary,
    CWLinf,
    DeepFool,
    HopSkipJump,
    RayS,
    SimBA,
    Square,
    multi_targeted,
    restarts,
    sequence,
    union,
)
from jrobust.smoothing import (
    Converted,
    DiscreteGaussian,
    Exponential,
    Gaussian,
    Laplace,
    Masking,
    Mixed,
    Pareto,
    Uniform,
)
from jrobust.threat import L0, L1, L2, Linf, Threat
from jrobust.training import (
    CATRS,
    MACER,
    TRADES,
    Adversarial,
    Consistency,
    NoiseAugmentation,
    SmoothAdv,
    SmoothMix,
    Stability,
    Standard,
)
from jrobust.zeroth_order import CGE, RGE, Hybrid


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attack.

    Args:
        name: its public name in ``jrobust.attacks``.
        make: the attack for a threat model, few steps.
        also: further public names that the entry covers (the class behind a function).
        threats: the threat models it is defined for. Programs of more than one attack (``also``)
            are compiled for all but the first in the full tier only.
        random: whether its result depends on the key.
        targeted: whether it takes ``targets=``.
        gain: by how much it lowers accuracy at least on the suite's model, at the suite's radius.
        own: whether its program is its own, not one or several of other entries'. The slow checks
            of the others (every way to run it, targets) wait for the full tier.
        large: whether its program is so large that all of its checks that compile wait for it.
    """

    name: str
    make: Callable[[Threat], Attack]
    also: tuple[str, ...] = ()
    threats: tuple[type, ...] = (Linf, L2, L1, L0)
    random: bool = True
    targeted: bool = True
    gain: float = 0.5
    own: bool = True
    large: bool = False


ATTACKS = [
    Entry("FGSM", FGSM, random=False, own=False),
    Entry("RSFGSM", RSFGSM, own=False),
    Entry("MIFGSM", lambda t: MIFGSM(t, steps=4), random=False, own=False),
    Entry("PGD", lambda t: PGD(t, steps=4)),
    Entry("APGD", lambda t: APGD(t, steps=4), threats=(Linf, L2, L1)),
    Entry("FAB", lambda t: FAB(t, steps=4, refine=1), threats=(Linf, L2, L1), random=False),
    Entry("Square", lambda t: Square(t, queries=40), threats=(Linf, L2, L1)),
    Entry("DDN", lambda t: DDN(t, steps=20, init_norm=0.3), threats=(L2,), random=False),
    Entry("FMN", lambda t: FMN(t, steps=20), random=False, own=False),
    Entry(
        "CW",
        lambda t: CW(t, steps=40, rounds=3, step_size=0.05, constant=0.1),
        threats=(L2,),
        random=False,
        own=False,
    ),
    Entry(
        "CWLinf",
        lambda t: CWLinf(t, steps=20, step_size=0.05, constant=0.1),
        threats=(Linf,),
        random=False,
        own=False,
    ),
    Entry("DeepFool", lambda t: DeepFool(t, steps=10), threats=(L2, Linf), random=False),
    Entry(
        "EAD",
        lambda t: EAD(t, steps=40, rounds=3, constant=0.1),
        threats=(L1,),
        random=False,
        own=False,
    ),
    Entry("ALMA", lambda t: ALMA(t, steps=40, alpha=0.5), threats=(L2,), random=False, own=False),
    Entry("PDGD", lambda t: PDGD(t, steps=40), threats=(L2,), random=False, own=False),
    Entry("JSMA", lambda t: JSMA(t, pairs=False), threats=(L0,), random=False, gain=0.3),
    Entry("MSD", lambda t: MSD((t,), steps=4), random=False, own=False),
    Entry("NES", lambda t: NES(t, queries=64, samples=4), threats=(Linf, L2), own=False),
    Entry(
        "SPSA",
        lambda t: SPSA(t, queries=64, samples=4, step_size=0.1),
        threats=(Linf, L2),
        own=False,
    ),
    Entry("Bandits", lambda t: Bandits(t, queries=90, tile=1), threats=(Linf, L2), own=False),
    Entry("SimBA", lambda t: SimBA(t, queries=40), threats=(L2, Linf), own=False),
    Entry(
        "ZOO",
        lambda t: ZOO(t, queries=600, batch=3, steps=40, rounds=2, step_size=0.05, constant=1.0),
        threats=(L2,),
        own=False,
    ),
    Entry("NIFGSM", lambda t: NIFGSM(t, steps=3, keep="success"), random=False, own=False),
    Entry(
        "SINIFGSM",
        lambda t: SINIFGSM(t, copies=2, steps=3, keep="success"),
        random=False,
        own=False,
    ),
    Entry("DIFGSM", lambda t: DIFGSM(t, steps=3, keep="success"), own=False),
    Entry("TIFGSM", lambda t: TIFGSM(t, steps=3, keep="success"), random=False, own=False),
    Entry(
        "VMIFGSM",
        lambda t: VMIFGSM(t, neighbours=2, steps=3, keep="success"),
        threats=(Linf, L2),
        own=False,
    ),
    Entry(
        "VNIFGSM",
        lambda t: VNIFGSM(t, neighbours=2, steps=3, keep="success"),
        ("TransferPGD",),
        threats=(Linf, L2),
        own=False,
    ),
    Entry("RayS", lambda t: RayS(t, queries=60), threats=(Linf,), random=False, own=False),
    Entry(
        "HopSkipJump",
        lambda t: HopSkipJump(t, queries=120, initial_probes=20),
        threats=(L2, Linf),
        own=False,
    ),
    Entry("Boundary", lambda t: Boundary(t, queries=120), threats=(L2,), own=False),
    Entry("restarts", lambda t: restarts(PGD(t, steps=2), 2), ("Restarts",)),
    Entry(
        "multi_targeted",
        lambda t: multi_targeted(APGD(t, steps=3, loss=losses.dlr_targeted), 2),
        ("MultiTargeted",),
        threats=(Linf, L2, L1),
    ),
    Entry(
        "AutoAttack",
        lambda t: AutoAttack(t, steps=3, queries=5),
        threats=(Linf, L2, L1),
        own=False,
        large=True,
    ),
    Entry("sequence", lambda t: sequence(PGD(t, steps=2), FGSM(t)), ("Sequence",)),
    Entry(
        "union",
        lambda t: union(FGSM(t), MIFGSM(t, steps=3)),
        ("Union",),
        random=False,
        own=False,
    ),
]

# Public names of jrobust.attacks that are no attacks: the protocol and its parts.
PROTOCOL = {
    "Attack",
    "AttackResult",
    "GradientAttack",
    "MinimalNorm",
    "Record",
    "State",
    "with_eps",
}
# And what needs a model that draws (tests/test_autoattack.py), or inputs on a grid
# (tests/test_quantized.py).
PROTOCOL |= {"EoT", "eot", "Quantized", "quantized"}
# And what moves images (tests/test_spatial.py), or all examples by one perturbation
# (tests/test_universal.py).
PROTOCOL |= {"RotationTranslation", "Spatial", "SGDUAP", "UAP", "Universal", "UniversalResult"}
# And the parts of TransferPGD (tests/test_transfer_attacks.py).
PROTOCOL |= {"DiverseInput", "ScaledCopies", "Transform", "gaussian_kernel"}


@dataclasses.dataclass(frozen=True)
class Part:
    """An algorithm of another room: an objective, a noise, an estimator.

    Args:
        name: its public name.
        room: the module that exports it.
        make: the algorithm for one number, which is a leaf of it.
        numbers: two values of that number.
    """

    name: str
    room: str
    make: Callable[[float], object]
    numbers: tuple[float, float]


def _inner(eps: float) -> PGD:
    return PGD(Linf(eps), steps=2, keep="last")


OBJECTIVES = [
    Part("Standard", "training", lambda _: Standard(), (0.0, 0.0)),
    Part("Adversarial", "training", lambda eps: Adversarial(_inner(eps)), (0.02, 0.05)),
    Part("TRADES", "training", lambda beta: TRADES(_inner(0.02), beta=beta), (1.0, 6.0)),
    Part("NoiseAugmentation", "training", lambda s: NoiseAugmentation(Gaussian(s)), (0.1, 0.3)),
    Part("Stability", "training", lambda lbd: Stability(Gaussian(0.2), lbd), (1.0, 4.0)),
    Part("Consistency", "training", lambda lbd: Consistency(Gaussian(0.2), lbd), (1.0, 4.0)),
    Part("MACER", "training", lambda s: MACER(Gaussian(s), samples=2), (0.1, 0.3)),
    Part(
        "SmoothAdv",
        "training",
        lambda eps: SmoothAdv(Gaussian(0.2), PGD(L2(eps), steps=2, keep="last")),
        (0.1, 0.3),
    ),
    Part("SmoothMix", "training", lambda a: SmoothMix(Gaussian(0.2), a, steps=2), (0.1, 0.3)),
    Part("CATRS", "training", lambda s: CATRS(Gaussian(s), steps=2, samples=2), (0.1, 0.3)),
]
NOISES = [
    Part("Gaussian", "smoothing", Gaussian, (0.1, 0.3)),
    Part("Uniform", "smoothing", Uniform, (0.1, 0.3)),
    Part("Laplace", "smoothing", Laplace, (0.1, 0.3)),
    Part("Pareto", "smoothing", Pareto, (0.1, 0.3)),
    Part("Exponential", "smoothing", lambda scale: Exponential(scale, 5), (0.1, 0.3)),
    Part("Converted", "smoothing", lambda s: Converted(Gaussian(s), "Linf", 5), (0.1, 0.3)),
    Part("Mixed", "smoothing", lambda s: Mixed(Gaussian(s), 0.8), (0.1, 0.3)),
    Part("Masking", "smoothing", lambda f: Masking(2, 5, f, pixels=False), (-1.0, 2.0)),
    Part("DiscreteGaussian", "smoothing", lambda _: DiscreteGaussian(0.25, 5), (1.0, 1.0)),
]
ESTIMATORS = [
    Part("CGE", "zeroth_order", CGE, (1e-2, 2e-2)),
    Part("RGE", "zeroth_order", lambda mu: RGE(mu, 4), (1e-2, 2e-2)),
    Part("Hybrid", "zeroth_order", lambda mu: Hybrid(CGE(mu), RGE(mu, 4), 4), (1e-2, 2e-2)),
]

# Public names of those rooms that are no algorithms.
OTHERS = {
    "training": {
        "EMA", "SWA", "Averaging", "Batch", "DenoisedStability", "Denoising", "Objective",
        "RedrawnMask", "Scheduled", "State",
        "ZerothOrder", "adversarial_examples", "batch", "guarded", "step", "update_statistics",
        "zeroth_order_step",
    },
    "smoothing": {
        "ABSTAIN", "Certificate", "Denoised", "DiffusionDenoiser", "Half", "Noise", "Plan",
        "Stages", "ceiling", "certify", "certify_dual", "certify_mixed", "certify_staged",
        "checkerboard", "count_disagreements", "count_votes", "denoised", "diffusion_denoiser",
        "halves", "lipschitz_radius", "plan", "predict", "samples_for", "stages",
    },
    "zeroth_order": {
        "HTTP", "SVRG", "ActivationCGE", "Anchor", "BlackBox", "BudgetExceeded",
        "DifferenceWarning", "Estimator", "HiZOO", "Ledger", "MeZO", "MeZOStep", "OneHot",
        "Service", "Stein", "Subprocess", "difference", "differencer", "grasp", "grasp_ratios",
        "one_point", "redraw", "sparse_grid", "stein", "surrogate", "value_and_grad",
    },
}  # fmt: skip
