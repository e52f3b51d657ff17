"""Minimal-norm attacks against foolbox and adv-lib: the same weights, inputs and budget.

Where two programs follow the same published rule without randomness, they go through the same
points up to rounding; distances are compared example by example all the same, because a single
decision that rounds the other way sends the rest of the path elsewhere.
"""

import pathlib
import sys

import numpy as np
import pytest

import jrobust
from jrobust.attacks._alma import ALMA
from jrobust.attacks._cw import CW, CWLinf
from jrobust.attacks._ddn import DDN
from jrobust.attacks._deepfool import DeepFool
from jrobust.attacks._ead import EAD
from jrobust.attacks._fmn import FMN
from jrobust.attacks._pdgd import PDGD
from jrobust.threat import L0, L1, L2, Linf

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402

pytestmark = pytest.mark.peers

EXAMPLES, STEPS, ROUNDS = 32, 50, 5
SIZE = 16 * 16 * 3
WIDE = {Linf: Linf(1.0), L2: L2(SIZE**0.5), L1: L1(SIZE), L0: L0(SIZE, pixels=False)}
ORDERS = {Linf: np.inf, L2: 2, L1: 1, L0: 0}
STEP = 0.05
# Without its early end, which looks at the batch as a whole.
ROUND = {
    "binary_search_steps": ROUNDS,
    "steps": STEPS,
    "initial_const": 0.1,
    "abort_early": False,
}
# Ours; the norm; theirs: library, name, arguments.
PAIRS = {
    "DDN foolbox": (
        lambda t: DDN(t, steps=STEPS), L2, ("foolbox", "DDNAttack", {"steps": STEPS}),
    ),
    "DDN adv-lib": (
        lambda t: DDN(t, steps=STEPS), L2, ("adv-lib", "ddn", {"steps": STEPS, "levels": None}),
    ),
    "FMN-Linf foolbox": (
        lambda t: FMN(t, steps=STEPS), Linf, ("foolbox", "LInfFMNAttack", {"steps": STEPS}),
    ),
    "FMN-L1 foolbox": (
        lambda t: FMN(t, steps=STEPS), L1, ("foolbox", "L1FMNAttack", {"steps": STEPS}),
    ),
    "FMN-L0 foolbox": (
        lambda t: FMN(t, steps=STEPS), L0, ("foolbox", "L0FMNAttack", {"steps": STEPS}),
    ),
    "FMN-L2 adv-lib": (
        lambda t: FMN(t, steps=STEPS), L2, ("adv-lib", "fmn", {"steps": STEPS, "norm": 2}),
    ),
    "FMN-Linf adv-lib": (
        lambda t: FMN(t, steps=STEPS), Linf, ("adv-lib", "fmn", {"steps": STEPS, "norm": "inf"}),
    ),
    "CW foolbox": (
        lambda t: CW(t, steps=STEPS, rounds=ROUNDS, constant=0.1, step_size=STEP),
        L2,
        ("foolbox", "L2CarliniWagnerAttack", {**ROUND, "stepsize": STEP}),
    ),
    "CWLinf adv-lib": (
        lambda t: CWLinf(t, steps=2 * STEPS, step_size=STEP, constant=0.1),
        Linf,
        (
            "adv-lib",
            "carlini_wagner_linf",
            {"max_iterations": STEPS, "learning_rate": STEP, "initial_const": 0.1},
        ),
    ),
    "DeepFool-L2 foolbox": (
        DeepFool, L2, ("foolbox", "L2DeepFoolAttack", {}),
    ),
    "DeepFool-Linf foolbox": (
        DeepFool, Linf, ("foolbox", "LinfDeepFoolAttack", {}),
    ),
    "EAD foolbox": (
        lambda t: EAD(t, steps=STEPS, rounds=ROUNDS, constant=0.1, beta=0.01, rule="L1"),
        L1,
        ("foolbox", "EADAttack", {**ROUND, "regularization": 0.01, "decision_rule": "L1"}),
    ),
    "ALMA adv-lib": (
        lambda t: ALMA(t, steps=100, alpha=0.5),
        L2,
        ("adv-lib", "alma", {"num_steps": 100, "init_lr_distance": 0.1, "\u03b1": 0.5}),
    ),
    "PDGD adv-lib": (
        lambda t: PDGD(t, steps=100), L2, ("adv-lib", "pdgd", {"num_steps": 100}),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def libraries(peers, case):
    """Like ``peers``, with the attacks of adv-lib too."""
    python = ROOT / ".venv-peer" / "bin" / "python"
    with _common.Peer(python, pathlib.Path(__file__).parent / "_minimal.py") as process:
        case.open(process, peers.folder)
        yield process


def theirs(libraries, peers, case, library, name, arguments):
    libraries.ask("count")
    points = peers.give("attack.npz", x=case.x[:EXAMPLES], y=case.y[:EXAMPLES])
    common = {"name": name, "points": points, "out": "out.npz", "arguments": arguments}
    if library == "foolbox":
        libraries.ask("attack", library="foolbox", eps=1e9, **common)
    else:
        libraries.ask("adversarial_library", **common)
    with np.load(peers.folder / "out.npz") as arrays:
        success = arrays["logits"].argmax(-1) != np.asarray(case.y)[:EXAMPLES]
        # One of them looks at what was found.
        return arrays["x"], success, libraries.ask("count")["passes"] - 1


@pytest.mark.parametrize("name", PAIRS)
def test_median_distance(libraries, peers, case, name):
    """The median example is no further than theirs by a fiftieth, where they find anything."""
    make, kind, peer = PAIRS[name]
    x, y = case.x[:EXAMPLES], case.y[:EXAMPLES]
    ours = jrobust.run(make(WIDE[kind]), case.key, case.model, x, y)
    points, success, passes = theirs(libraries, peers, case, *peer)
    order = ORDERS[kind]
    distance = np.linalg.norm(np.float64(points - x).reshape(EXAMPLES, -1), order, axis=1)
    assert success.mean() > 0.5, "a peer that finds something"
    assert np.mean(ours.success) >= success.mean()
    far = np.where(success, distance, np.inf)
    mine = np.where(ours.success, ours.distance, np.inf)
    both = success & np.asarray(ours.success) & (distance > 0)
    assert both.mean() > 0.5
    assert np.median(mine[both] / far[both]) <= 1.02
    assert np.median(mine) <= 1.05 * np.median(far)
    # At most their budget, and the pass that looks at the last point.
    assert np.median(ours.forwards) <= passes + 1
