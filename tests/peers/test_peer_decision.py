"""Attacks that see decisions alone against foolbox: the same weights and as many queries.

They draw their own random numbers and begin at noise of their own, so medians are compared.
"""

import os
import pathlib

import _common
import jax
import numpy as np
import pytest
from test_peer_autoattack import NETS, examples, folder, nets  # noqa: F401

import jrobust
from jrobust.attacks._boundary import Boundary
from jrobust.attacks._hopskipjump import HopSkipJump
from jrobust.threat import L2, Linf

pytestmark = pytest.mark.peers

EXAMPLES, KEYS = 120, 3
PAIRS = {
    "HopSkipJump-L2": (
        HopSkipJump, L2, "HopSkipJumpAttack", {"steps": 10, "constraint": "l2"},
    ),
    "HopSkipJump-Linf": (
        HopSkipJump, Linf, "HopSkipJumpAttack", {"steps": 10, "constraint": "linf"},
    ),
    "Boundary": (Boundary, L2, "BoundaryAttack", {"steps": 3000}),
}  # fmt: skip


@pytest.fixture(scope="module")
def peer(folder):  # noqa: F811
    here = pathlib.Path(__file__).resolve().parent
    python = here.parents[1] / ".venv-peer" / "bin" / "python"
    with _common.Peer(python, here / "_decision.py") as process:
        process.ask("open", folder=str(folder), threads=os.cpu_count())
        yield process


CASES = [(net, pair, False) for net in ("plain", "smooth") for pair in PAIRS]


@pytest.mark.parametrize(
    ("net", "pair", "targeted"), [*CASES, *(("plain", pair, True) for pair in PAIRS)]
)
def test_points_are_as_close(net, pair, targeted, nets, examples, peer, folder):  # noqa: F811
    make, kind, name, arguments = PAIRS[pair]
    model = nets[net]
    classes = np.asarray(model(examples.x)).argmax(1)
    right = classes == examples.y
    x, y = examples.x[right][:EXAMPLES], examples.y[right][:EXAMPLES]
    # A target's nearest image is where both begin.
    targets = (y + 1) % 10
    pool = examples.x[right]
    far = np.linalg.norm((x[:, None] - pool[None]).reshape(len(x), len(pool), -1), axis=2)
    nearest = np.where(classes[right][None] == targets[:, None], far, np.inf).argmin(1)
    np.savez(folder / "decision.npz", x=x, y=targets if targeted else y, starts=pool[nearest])
    peer.ask(
        "closest", net=f"{net}.npz", activation=NETS[net][0].activation, points="decision.npz",
        out="out.npz", name=name, arguments=arguments, targeted=targeted,
    )  # fmt: skip
    with np.load(folder / "out.npz") as out:
        move, budget = np.float64(out["x"]) - x, int(np.median(out["asked"]))
    order = np.inf if kind is Linf else 2
    theirs = np.linalg.norm(move.reshape(len(x), -1), order, axis=1)
    starts = (pool, classes[right]) if targeted else None
    attack = make(kind(kind(1.0).widest(1.0, x.shape[1:])), queries=budget, starts=starts)
    ours = []
    for seed in range(KEYS):
        found = jrobust.run(
            attack, jax.random.key(seed), model, x, y, targets=targets if targeted else None
        )
        assert np.all(found.success)
        assert np.all(found.forwards == budget)
        ours.append(found.distance)
    means, ratio = (np.mean(ours), np.mean(theirs)), np.median(np.stack(ours) / theirs)
    print(f"{net} {pair} {targeted} {budget}: {means[0]:.4f} {means[1]:.4f} {ratio:.4f}")
    assert ratio <= 1.02
    # Other noise leads other examples to the nearer of two boundaries: means vary by a percent.
    assert means[0] <= 1.03 * means[1]
