"""JSMA against torchattacks, rotations and translations against foolbox, on the same weights."""

import pathlib

import _common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust.attacks._jsma import JSMA
from jrobust.attacks._spatial import RotationTranslation, Spatial
from jrobust.threat import L0

pytestmark = pytest.mark.peers

EXAMPLES, PAIRS, SIZE = 16, 10, 16


@pytest.fixture(scope="module")
def libraries(peers, case):
    """Like ``peers``, with the attacks of this file."""
    here = pathlib.Path(__file__).resolve().parent
    python = here.parents[1] / ".venv-peer" / "bin" / "python"
    with _common.Peer(python, here / "_special.py") as process:
        case.open(process, peers.folder)
        yield process


def answer(libraries, peers, do, arrays, **arguments):
    peers.give("special.npz", **arrays)
    libraries.ask(do, points="special.npz", out="special-out.npz", **arguments)
    with np.load(peers.folder / "special-out.npz") as found:
        return dict(found)


def test_jsma_takes_the_same_pairs(libraries, peers, case):
    # They do not look at features beyond 0.99, we at none that are full.
    x = np.minimum(np.asarray(case.x[:EXAMPLES]), np.float32(0.98))
    targets = np.argsort(np.asarray(case.model(x)), 1)[:, -2]
    y = np.asarray(case.model(x)).argmax(1)
    budget = L0(2.0 * PAIRS, pixels=False)
    ours = jrobust.run(JSMA(budget), case.key, case.model, x, y, targets=targets)
    features = x[0].size
    gamma = (2 * PAIRS - 0.5) / features  # they round up
    theirs = answer(libraries, peers, "jsma", {"x": x, "targets": targets}, gamma=gamma)
    success = theirs["logits"].argmax(-1) == targets
    assert success.mean() > 0.3
    assert np.mean(success == np.asarray(ours.success)) >= 1 - 1 / EXAMPLES
    # Of those that succeed both return the last point; now and then two pairs are within rounding.
    apart = np.abs(np.asarray(ours.x) - theirs["x"]).max((1, 2, 3))
    assert np.mean(apart[success & np.asarray(ours.success)] < 1e-6) > 0.8


def test_images_are_the_same(libraries, peers, case):
    """A shift of theirs is of where a pixel comes from, and shorter by 1 / size."""
    transforms = [(25.0, 0.0, 0.0), (-90.0, 0.0, 0.0), (0.0, 3.0, -2.0), (12.0, 1.5, 2.5)]
    x = np.asarray(case.x[:EXAMPLES])
    theirs = answer(libraries, peers, "moved", {"x": x}, transforms=transforms)["x"]
    limits = RotationTranslation(90.0, 1.0)
    for want, (angle, right, down) in zip(theirs, transforms):
        turn = np.deg2rad(angle)
        back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        shift = -np.linalg.solve(back, [right, down]) * (SIZE - 1) / SIZE**2
        share = jnp.tile(jnp.float32([[angle / 90, *shift]]), (EXAMPLES, 1))
        np.testing.assert_allclose(jax.jit(limits.apply)(x, share), want, atol=2e-5)


def test_a_grid_of_rotations_breaks_the_same_examples(libraries, peers, case):
    attack = Spatial(RotationTranslation(30.0, 0.0), grid=(7, 1, 1))
    ours = jrobust.run(attack, case.key, case.model, case.x, case.y)
    arrays = {"x": case.x, "y": case.y}
    theirs = answer(libraries, peers, "rotations", arrays, limit=30.0, number=7)
    success = theirs["logits"].argmax(-1) != np.asarray(case.y)
    assert success.mean() > 0.1
    assert np.mean(success == np.asarray(ours.success)) >= 1 - 1 / len(case.x)
