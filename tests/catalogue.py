"""THE table of every public algorithm: what the shared suite runs each of them through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrobust import (
    ensembles,
    keys,
    losses,
    models,
    smoothing,
    training,
    weights,
    zeroth_order,
)
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
    eot,
    multi_targeted,
    quantized,
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
from jrobust.zeroth_order import CGE, RGE, SVRG, ActivationCGE, HiZOO, Hybrid, MeZO


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

# ---------------------------------------------------------------- what else runs on the device

# The reference networks, tiny, and the shapes of their inputs.
NETWORKS = {
    "MLP": (models.MLP((4,), 3), (5,)),
    "LeNet": (models.LeNet(3), (28, 28, 1)),
    "SmallCNN": (models.SmallCNN((4, 4), 3, 8, norm=True, dropout=0.3), (8, 8, 1)),
    "ResNet": (models.ResNet(8, 3, (2, 4, 6)), (8, 8, 3)),
    "ResNet18": (models.ResNet18(3, stages=(1, 1), width=4), (8, 8, 3)),
    "ResNet50": (models.ResNet50(3, stages=(1, 1), width=2), (16, 16, 3)),
    "PreActResNet18": (
        models.PreActResNet18(3, stages=(1, 1), width=4, final_norm=True),
        (8, 8, 3),
    ),
    "WideResNet": (models.WideResNet(10, 1, 3, dropout=0.3), (8, 8, 3)),
    "MoEResNet18": (
        models.MoEResNet18(3, 3, stages=(1, 1), width=4, router_depth=8),
        (8, 8, 3),
    ),
    "ViT": (models.ViT(3, 8, 4, 6, 2, 2), (8, 8, 3)),
    "DnCNN": (models.DnCNN(6, 4), (8, 8, 3)),
    "Autoencoder": (models.Autoencoder(widths=(4, 4, 4, 6)), (32, 32, 3)),
}

Kernel = Callable[[jax.Array, jax.Array], Any]  # of a key and inputs (B, D) in [0, 1]
_Y = np.arange(8) % 3
_W = np.float32(np.random.default_rng(0).normal(size=(5, 3)))


def _logits(x: jax.Array) -> jax.Array:
    return x @ _W


def _noisy(keys: jax.Array, x: jax.Array) -> jax.Array:
    return _logits(x + 0.1 * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys))


def _value(params: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(jnp.sin(3 * params["w"]))


def _attack(attack: Attack) -> Kernel:
    return lambda key, x: attack(key, _logits, x, jnp.asarray(_Y))


def _variables(network: models.Network, key: jax.Array, x: jax.Array) -> Any:
    """Zeros in the place of the variables, so that no initialiser is part of the program."""
    shapes = jax.eval_shape(network.init, key, x)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _network(module: Any, shape: tuple[int, ...]) -> Kernel:
    """A training pass with its gradients."""

    def program(key: jax.Array, x: jax.Array) -> Any:
        network, x = models.network(module), jnp.resize(x, (2, *shape))
        params, extra = _variables(network, key, x)

        def loss(params: Any, x: jax.Array) -> Any:
            logits, new = network.train_logits(params, extra, key, x)
            return jnp.sum(logits**2), new

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    return program


def _update(objective: Any, network: models.Network | None = None, **options: Any) -> Kernel:
    def program(key: jax.Array, x: jax.Array) -> Any:
        own = network or models.network(models.MLP((4,), 3))
        init, update = training.step(objective, optax.sgd(0.1), **options)
        return update(init(key, own, x), training.batch(x, _Y))

    return program


# A denoiser of rows of numbers.
_DENOISER = models.Network(
    init=lambda key, x: ({"w": jnp.ones(x.shape[1:])}, {}),
    logits=lambda params, extra, x: x * params["w"][None],
    train_logits=lambda params, extra, key, x: (x * params["w"][None], extra),
    features=lambda params, extra, x: {},
)


_NOISE = Gaussian(0.1)


def _counted(model: Any, noise: Any = _NOISE, shape: tuple[int, ...] = (5,)) -> Kernel:
    return lambda key, x: smoothing.count_votes(key, model, jnp.resize(x, (2, *shape)), noise, 4)


def _stacked(key: jax.Array, x: jax.Array) -> Any:
    network = models.network(models.MLP((4,), 3))
    params = ensembles.draw(network, jax.random.split(key, 2), x)
    rules = (
        ensembles.mean_logits,
        ensembles.mean_probabilities,
        ensembles.mean_log_probabilities,
        ensembles.vote,
    )
    together = network.bind(*params)
    out = [ensembles.ensemble(together, combine=rule)(x) for rule in rules]
    return out, ensembles.stack(ensembles.unstack(params))


def _transferred(key: jax.Array, x: jax.Array) -> Any:
    return tuple(
        ensembles.transfer(FGSM(Linf(0.1)), key, [_logits], [lambda x: -_logits(x)], x, _Y)
    )


def _in_ball(threat: Threat) -> Kernel:
    def program(key: jax.Array, x: jax.Array) -> Any:
        x0 = x[:, :, None]
        moved = threat.sample(keys.examples(key, jnp.arange(len(x))), x0)
        moved = threat.project(moved + threat.steepest(moved - 0.5), x0)
        return moved, threat.distance(moved, x0)

    return program


def _zeroth(fn: Callable[[jax.Array, dict[str, jax.Array]], Any]) -> Kernel:
    return lambda key, x: fn(key, {"w": x})


def _svrg(key: jax.Array, params: dict[str, jax.Array]) -> Any:
    svrg = SVRG(RGE(1e-2, 2))
    return svrg(key, _value, params, svrg.anchor(key, _value, params))


def _hizoo(key: jax.Array, params: dict[str, jax.Array]) -> Any:
    hizoo = HiZOO(1e-2, 1e-3)
    return hizoo(key, _value, params, hizoo.init(params))


def _activation(key: jax.Array, x: jax.Array) -> Any:
    return ActivationCGE(1e-2)(
        key, lambda p: jax.nn.logsumexp(x @ p["w"], 1), {"w": jnp.asarray(_W)}
    )


def _mixed(key: jax.Array, x: jax.Array) -> Any:
    sharp = lambda x: models.sharpened_logits(_logits(x))  # noqa: E731
    return models.mixed(_logits, sharp, models.adaptive_weight(lambda x: x.sum(1), 0.6))(x)


def _loss(loss: losses.Loss) -> Kernel:
    y = jnp.asarray(_Y)

    def program(key: jax.Array, x: jax.Array) -> Any:
        if loss in (losses.kl, losses.squared_probability_distance):
            return loss(x, x[::-1])
        return loss(x, y, y + 1) if losses.is_targeted(loss) else loss(x, y)

    return program


LOSSES = (
    "cross_entropy",
    "margin",
    "dlr",
    "dlr_or_margin",
    "dlr_targeted",
    "dlr_or_margin_targeted",
    "kl",
    "squared_probability_distance",
)


def _slope(model: Callable[[jax.Array], jax.Array]) -> Kernel:
    return lambda key, x: jax.grad(lambda x: model(x).sum())(x)


# By room, the other public kernels as programs. Names in one tuple share theirs.
KERNELS: dict[str, dict[tuple[str, ...], Kernel]] = {
    "attacks": {
        ("EoT", "eot"): lambda key, x: eot(PGD(Linf(0.1), steps=2), 2)(
            key, models.randomized(_noisy, key, votes=2), x, jnp.asarray(_Y)
        ),
        ("Quantized", "quantized"): _attack(quantized(PGD(L2(0.1), steps=2), 16)),
    },
    "training": {
        ("step", "guarded", "SWA"): _update(Standard(), average=training.SWA(2), accumulate=2),
        ("EMA",): _update(Standard(), average=training.EMA()),
        ("Scheduled", "adversarial_examples"): _update(
            training.Scheduled(
                Adversarial(_inner(0.02)),
                {"attack.threat.eps": optax.linear_schedule(0.0, 0.1, 9)},
            )
        ),
        ("ZerothOrder", "zeroth_order_step", "RedrawnMask"): _update(
            training.ZerothOrder(
                Standard(),
                RGE(1e-2, 2),
                training.RedrawnMask(
                    {name: {"kernel": 0.5, "bias": 1.0} for name in ("dense1", "head")}
                ),
            )
        ),
        ("Denoising",): _update(training.Denoising(_NOISE), _DENOISER),
        ("DenoisedStability",): _update(
            training.DenoisedStability(_NOISE, _logits, RGE(1e-2, 2)), _DENOISER
        ),
    },
    "smoothing": {
        ("Half", "halves"): _counted(
            lambda x: x.mean((1, 2)),
            smoothing.halves(_NOISE, smoothing.checkerboard(4, 4))[0],
            (4, 4, 3),
        ),
        ("count_votes", "Denoised", "denoised"): _counted(smoothing.denoised(jnp.tanh, _logits)),
        ("DiffusionDenoiser", "diffusion_denoiser"): _counted(
            smoothing.denoised(
                smoothing.diffusion_denoiser(lambda z, level: z / (1 + level[:, None]), 0.1),
                _logits,
            )
        ),
        ("count_disagreements",): lambda key, x: smoothing.count_disagreements(
            key, _logits, lambda x: -_logits(x), x, _NOISE, 4
        ),
    },
    "zeroth_order": {
        ("difference", "differencer", "OneHot"): lambda key, x: zeroth_order.differencer(
            lambda x: jnp.tanh(_logits(x)), x
        )[1](zeroth_order.OneHot((0, 1), 1e-2)),
        ("value_and_grad",): lambda key, x: zeroth_order.value_and_grad(_value, RGE(1e-2, 2))(
            key, {"w": x}
        ),
        ("surrogate",): _zeroth(jax.grad(zeroth_order.surrogate(_value, RGE(1e-2, 2)), argnums=1)),
        ("one_point",): _zeroth(
            lambda key, p: zeroth_order.one_point(key, _value, p, 0.0, mu=1e-2)
        ),
        ("SVRG",): _zeroth(_svrg),
        ("HiZOO",): _zeroth(_hizoo),
        ("MeZO", "MeZOStep"): _zeroth(lambda key, p: MeZO(1e-3)(key, _value, p)),
        ("grasp",): _zeroth(lambda key, p: zeroth_order.grasp(key, _value, p, RGE(1e-2, 2))),
        ("redraw",): _zeroth(lambda key, p: zeroth_order.redraw(key, p, {"w": 0.5})),
        ("Stein", "stein"): lambda key, x: zeroth_order.stein(lambda z: jnp.sum(z**2, 1), x, 0.5),
        ("ActivationCGE",): _activation,
    },
    "ensembles": {
        (
            "Ensemble",
            "ensemble",
            "draw",
            "mean_log_probabilities",
            "mean_logits",
            "mean_probabilities",
            "stack",
            "unstack",
            "vote",
        ): _stacked,
        ("Transfer", "transfer"): _transferred,
    },
    "weights": {
        ("average",): _zeroth(lambda key, p: weights.average([p, p], [1.0, 2.0])),
        ("linear",): _zeroth(lambda key, p: weights.linear(p, p, p["w"][0, 0])),
        ("bezier",): _zeroth(lambda key, p: weights.bezier(p, p, p, p["w"][0, 0])),
        ("scale_to_layers",): _zeroth(lambda key, p: weights.scale_to_layers(p, p, 0.1)),
        ("project_to_layers",): _zeroth(lambda key, p: weights.project_to_layers(p, p, 0.1)),
        ("sample_sphere",): _zeroth(lambda key, p: weights.sample_sphere(key, p, 0.1)),
        ("top_k", "indices"): _zeroth(
            lambda key, p: weights.indices(weights.top_k(p, 7), {"w": 7})
        ),
        ("random_by_layer",): _zeroth(lambda key, p: weights.random_by_layer(key, p, {"w": 0.5})),
    },
    "models": {
        **{(name,): _network(*pair) for name, pair in NETWORKS.items()},
        ("TensorTrainDense",): _network(models.TensorTrainDense((3, 1), (1, 5), 2), (5,)),
        ("Randomized", "Drawn", "randomized"): lambda key, x: (
            models.randomized(_noisy, key, votes=2)(x),
            models.randomized(_noisy, key).at(keys.examples(key, jnp.arange(8)))(x),
        ),
        (
            "MixedClassifier",
            "AdaptiveWeight",
            "mixed",
            "mixed_logits",
            "adaptive_weight",
            "sharpened_logits",
        ): _mixed,
        ("BPDA", "bpda"): _slope(models.bpda(jnp.round)),
        ("StraightThrough", "straight_through"): _slope(models.straight_through(jnp.round)),
    },
    "threat": {(kind.__name__,): _in_ball(kind(1.0)) for kind in (Linf, L2, L1, L0)},
    "losses": {(name,): _loss(getattr(losses, name)) for name in LOSSES},
}


# Public names that are no programs of the device: protocols, results, and what runs on the host.
# Families with files of their own are lowered there: tests/test_augment.py, test_corruptions.py,
# test_spatial.py, test_universal.py, test_unrolled.py.
OTHERS = {
    "training": {
        "Averaging", "Batch", "Objective", "State", "batch", "update_statistics",
    },
    "smoothing": {
        "ABSTAIN", "Certificate", "Noise", "Plan", "Stages", "ceiling", "certify", "certify_dual",
        "certify_mixed", "certify_staged", "checkerboard", "lipschitz_radius", "plan", "predict",
        "samples_for", "stages",
    },
    "zeroth_order": {
        "HTTP", "Anchor", "BlackBox", "BudgetExceeded", "DifferenceWarning", "Estimator",
        "Ledger", "Service", "Subprocess", "grasp_ratios", "sparse_grid",
    },
    "ensembles": set(),
    "weights": {"layer_ratios"},
    "models": {
        "MIXEDNUTS", "Bound", "Fourier", "HostModel", "Layer", "Network", "Summary", "bind",
        "data_step", "from_deepmind", "from_host", "from_safetensors", "from_torch",
        "from_torch_module", "network", "read_tensors", "robustbench", "smoothing_noise", "summary",
        "tensor_train", "to_safetensors", "unroll",
    },
    "threat": {"Threat", "expand"},
    "losses": {"ascent", "is_targeted"},
}  # fmt: skip
