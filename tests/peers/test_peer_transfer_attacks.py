"""The transfer family against torchattacks on the same weights and inputs.

Without randomness both go through the same points, up to signs of coordinates near zero and what
follows from them. With it, points are compared by what they do to the model and to another.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_peer_attacks import EPS, STEPS, attacked, same_points

import jrobust
from jrobust import losses
from jrobust.attacks._transfer import (
    DIFGSM,
    NIFGSM,
    SINIFGSM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    DiverseInput,
)
from jrobust.models import bind
from jrobust.threat import Linf

pytestmark = pytest.mark.peers

COMMON = {"alpha": EPS / STEPS, "steps": STEPS, "decay": 1.0}
SAME = {
    "NI": (NIFGSM, "NIFGSM", {}),
    "SINI": (SINIFGSM, "SINIFGSM", {"m": 5}),
    "TI": (TIFGSM, "TIFGSM", {"diversity_prob": 0.0}),
    # Neighbours at the point itself: of variance tuning only the noise is gone, and with the point
    # ahead a difference is left.
    "VMI": (
        lambda t: VMIFGSM(t, neighbours=1, beta=0.0), "VMIFGSM", {"N": 1, "beta": 0.0},
    ),
    "VNI": (
        lambda t: VNIFGSM(t, neighbours=1, beta=0.0), "VNIFGSM", {"N": 1, "beta": 0.0},
    ),
    "DI": (lambda t: DIFGSM(t, probability=0.0), "DIFGSM", {"diversity_prob": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_ends_at_the_same_points(peers, case, name):
    make, peer, arguments = SAME[name]
    ours = jrobust.run(make(Linf(EPS)), case.key, case.model, case.x, case.y)
    theirs = attacked(peers, case, "torchattacks", peer, EPS, **COMMON, **arguments)
    same_points(ours.x, theirs["x"], EPS, EPS / STEPS, signs=True)
    flags = theirs["logits"].argmax(-1) != case.y
    assert np.mean(flags != np.asarray(ours.success)) <= 1 / 32


def test_targeted_ends_at_the_same_points(peers, case):
    targets = (np.asarray(case.y) + 1) % 10
    ours = jrobust.run(SINIFGSM(Linf(EPS)), case.key, case.model, case.x, case.y, targets=targets)
    theirs = attacked(
        peers, case, "torchattacks", "SINIFGSM", EPS, targets=targets, **COMMON, m=5
    )  # fmt: skip
    same_points(ours.x, theirs["x"], EPS, EPS / STEPS, signs=True)
    reached = theirs["logits"].argmax(-1) == targets
    assert np.mean(reached != np.asarray(ours.success)) <= 1 / 32


DRAWN = {
    "DI": (DIFGSM, "DIFGSM", {}),
    "TI-DI": (
        lambda t: TIFGSM(t, transforms=(DiverseInput(),)), "TIFGSM", {},
    ),
    "VMI": (lambda t: VMIFGSM(t, neighbours=5), "VMIFGSM", {}),
    "VNI": (lambda t: VNIFGSM(t, neighbours=5), "VNIFGSM", {}),
}  # fmt: skip


def shaken(case):
    """Another network: the same with every weight off by a tenth."""
    rng = np.random.default_rng(1)

    def off(leaf):
        return leaf * np.float32(1 + 0.1 * rng.normal(size=leaf.shape))

    return bind(case.module, jax.tree.map(off, case.variables))


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_ones_are_as_strong_here_and_elsewhere(peers, case, name):
    make, peer, arguments = DRAWN[name]
    ours = jrobust.run(make(Linf(EPS)), case.key, case.model, case.x, case.y)
    theirs = attacked(peers, case, "torchattacks", peer, EPS, **COMMON, **arguments)
    for model in (case.model, shaken(case)):
        before, here, there = (
            np.asarray(losses.cross_entropy(model(jnp.asarray(x)), case.y))
            for x in (case.x, ours.x, theirs["x"])
        )
        gain, other = here - before, there - before
        assert other.mean() > 0.03, "or it does nothing"
        # Means of pairs, whose own draws differ.
        apart = (gain - other).std() / np.sqrt(len(gain))
        assert abs(gain.mean() - other.mean()) < 0.05 * other.mean() + 3 * apart
