"""FAB's distances and the parts of FAB and Square against pyautoattack.

How many examples FAB-T and Square break within a radius is compared in test_peer_autoattack.py.
"""

import os
import pathlib

import _common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_peer_autoattack import NETS, RADII, examples, folder, nets  # noqa: F401

from jrobust import drive, keys
from jrobust.attacks._fab import FAB
from jrobust.attacks._square import _bump, side
from jrobust.threat import L1, L2, Linf

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def peer(folder):  # noqa: F811
    here = pathlib.Path(__file__).resolve().parent
    python = here.parents[1] / ".venv-peer" / "bin" / "python"
    with _common.Peer(python, here / "_fab_square.py") as process:
        process.ask("open", folder=str(folder), threads=os.cpu_count())
        yield process


def norms(kind, move):
    order = {Linf: np.inf, L2: 2, L1: 1}[kind]
    return np.linalg.norm(np.float64(move).reshape(len(move), -1), order, axis=1)


@jax.jit
def run(attack, model, x, y, aim):
    """FAB towards the class ``aim``, if that is one, where any misclassification counts."""
    lanes = keys.examples(jax.random.key(0), jnp.arange(len(x)))
    state = attack.init(lanes, x, y)
    state = state._replace(record=state.record._replace(aim=aim))
    return attack.result(drive.run(attack, model, state))


@pytest.mark.parametrize("targeted", [False, True], ids=["FAB", "FAB-T"])
@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("net", NETS)
def test_points_are_as_close(net, kind, targeted, nets, examples, peer, folder):  # noqa: F811
    model, x, y = nets[net], examples.x[:200], examples.y[:200]
    logits = np.asarray(model(x))
    right = logits.argmax(1) == y
    x, y, logits = x[right], y[right], logits[right]
    np.savez(folder / "right.npz", x=x, y=y)
    whole = np.float32(kind(0.0).widest(1.0, x.shape[1:]))
    aim = np.argsort(logits, 1)[:, -2] if targeted else np.full(len(x), -1)
    peer.ask(
        "closest", net=f"{net}.npz", activation=NETS[net][0].activation, points="right.npz",
        out="out.npz", norm=kind.norm, eps=float(whole), steps=50, target=2 if targeted else None,
    )  # fmt: skip
    with np.load(folder / "out.npz") as out:
        there = np.where(out["success"], norms(kind, out["x"] - x), np.inf)
    medians = []
    for refine in (0, 3):
        attack = FAB(kind(whole), steps=50, refine=refine)
        found = run(attack, model, x, y, aim)
        here = np.where(found.success, norms(kind, np.asarray(found.x) - x), np.inf)
        medians.append((np.median(here), np.median(here / there)))
    (plain, _), (refined, ratio) = medians
    print(f"{net} {kind.norm} {targeted}: {plain:.5f} {refined:.5f} {np.median(there):.5f}")
    assert plain <= 1.01 * np.median(there)
    assert refined <= 1.0 * np.median(there)
    assert ratio <= 1.0
    assert np.median(there) < 3 * RADII[net][kind], "points that matter"


def test_projections_are_no_longer(peer, folder):  # noqa: F811
    rng = np.random.default_rng(0)
    x = rng.random((200, 60))
    x = np.float32(np.where(rng.random(x.shape) < 0.3, np.round(x), x))
    normal = np.float32(rng.normal(size=x.shape) * rng.exponential(size=x.shape))
    most = np.maximum(normal * (1 - x), -normal * x).sum(1)
    least = np.minimum(normal * (1 - x), -normal * x).sum(1)
    share = rng.uniform(0.02, 0.9, 200)
    value = np.float32(share * np.where(rng.random(200) < 0.5, -most, -least))
    np.savez(folder / "planes.npz", x=x, normal=normal, value=value)
    peer.ask("project", points="planes.npz", out="moves.npz")
    with np.load(folder / "moves.npz") as out:
        theirs = dict(out)
    for kind in (Linf, L2, L1):
        ours = np.asarray(kind(0.1).to_hyperplane(x, normal, value))
        move = theirs[kind.norm]
        off = [np.abs(value + (np.float64(normal) * m).sum(1)) for m in (ours, move)]
        assert off[0].max() <= max(1.1 * off[1].max(), 1e-5)
        on = off[1] < 1e-4  # theirs too is on the hyperplane
        assert on.mean() > 0.8
        np.testing.assert_allclose(norms(kind, ours)[on], norms(kind, move)[on], rtol=1e-4)


def test_bumps_and_schedule_are_theirs(peer, folder):  # noqa: F811
    lengths = [2, 3, 5, 6, 7, 15]
    peer.ask("pieces", out="pieces.npz", lengths=lengths)
    with np.load(folder / "pieces.npz") as out:
        theirs = dict(out)
    for norm, order in (("L2", 2), ("L1", 1)):
        for length in lengths:
            place = jnp.arange(length)[None]
            both = [
                np.asarray(_bump(place, place, jnp.asarray([length]), jnp.asarray([turn]), order))
                for turn in (False, True)
            ]
            apart = [np.abs(one[0] - theirs[f"{norm} {length}"]).max() for one in both]
            assert min(apart) < 1e-6
            assert max(apart) > 1e-2
    share = np.asarray(theirs["p"])
    want = np.clip(np.round(np.sqrt(share * 32 * 32)), 1, 32)
    np.testing.assert_array_equal(side(np.float32(0.8), jnp.arange(9000), (32, 32), np.inf), want)
