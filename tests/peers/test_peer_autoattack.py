"""AutoAttack and both forms of APGD against pyautoattack on the same weights and real images.

Both draw their own random numbers, so one run is compared with another as two runs of the peer
compare with each other: mean robust accuracies over three seeds, and the share of examples on which
two runs agree.
"""

import itertools
import os
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jrobust
from jrobust import attacks, data, loops, models, training
from jrobust.threat import L1, L2, Linf

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import _common

pytestmark = pytest.mark.peers

EXAMPLES, STEPS, QUERIES, SEEDS = 400, 100, 1000, 3
RADII = {"plain": {Linf: 0.08, L2: 0.5, L1: 1.6}, "robust": {Linf: 0.2, L2: 0.7, L1: 1.5}}
RADII["smooth"] = RADII["plain"]


class Net(nn.Module):
    """See _autoattack.Net."""

    widths: tuple[int, ...]
    dense: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x):
        act = {"relu": nn.relu, "tanh": nn.tanh}[self.activation]
        for i, width in enumerate(self.widths):
            x = act(nn.Conv(width, (3, 3), 2, ((1, 1), (1, 1)), name=f"conv{i}")(x))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense):
            x = act(nn.Dense(width, name=f"dense{i}")(x))
        return nn.Dense(10, name=f"dense{len(self.dense)}")(x)


NETS = {
    "plain": (Net((16, 32), (32,), "relu"), training.Standard()),
    "robust": (
        Net((16, 32), (32,), "relu"),
        training.Adversarial(attacks.PGD(Linf(0.2), steps=5, keep="last")),
    ),
    "smooth": (Net((), (64, 32), "tanh"), training.Standard()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("autoattack")


@pytest.fixture(scope="module")
def nets(folder):
    """Trained networks by name, and their weights as files."""
    trained = {}
    for name, (module, objective) in NETS.items():
        network = models.network(module)
        fit = loops.fit(
            jax.random.key(1), network, objective, optax.adam(3e-3), data.digits().train,
            epochs=12, batch_size=64, progress=False,
        )  # fmt: skip
        trained[name] = network.bind(fit.state.params, fit.state.extra)
        leaves = _common.flatten(fit.state.params)
        np.savez(folder / f"{name}.npz", **{k.replace("/", "_"): v for k, v in leaves.items()})
    return trained


@pytest.fixture(scope="module")
def examples(folder):
    test = data.digits().test[np.arange(EXAMPLES)]
    np.savez(folder / "examples.npz", x=test.x, y=test.y)
    return test


@pytest.fixture(scope="module")
def peer(folder):
    root = pathlib.Path(__file__).resolve().parents[2]
    script = pathlib.Path(__file__).parent / "_autoattack.py"
    with _common.Peer(root / ".venv-peer" / "bin" / "python", script) as process:
        process.ask("open", folder=str(folder), threads=os.cpu_count())
        yield process


@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("member", ["apgd-ce", "apgd-t", "standard"])
@pytest.mark.parametrize("net", NETS)
def test_as_strong_as_the_peer(net, member, kind, nets, examples, peer, folder):
    model, eps = nets[net], RADII[net][kind]
    names = ["apgd-ce", "apgd-t", "fab-t", "square"] if member == "standard" else [member]
    attack = attacks.AutoAttack(kind(eps), names, steps=STEPS, queries=QUERIES)
    wrong = np.asarray(model(examples.x)).argmax(1) != examples.y
    ours, theirs = [], []
    for seed in range(SEEDS):
        found = jrobust.run(attack, jax.random.key(seed), model, examples.x, examples.y)
        ours.append(wrong | np.asarray(found.success))
        peer.ask(
            "attack", net=f"{net}.npz", activation=NETS[net][0].activation,
            points="examples.npz", out="out.npz", attacks=names, norm=kind.norm, eps=eps,
            seed=seed, steps=STEPS, queries=QUERIES,
        )  # fmt: skip
        with np.load(folder / "out.npz") as out:
            theirs.append(out["success"])
            np.testing.assert_allclose(model(examples.x), out["clean"], atol=1e-4)
    robust = [100 * (1 - np.mean(flags)) for flags in (ours, theirs)]
    itself = np.mean([np.mean(a == b) for a, b in itertools.combinations(theirs, 2)])
    between = np.mean([np.mean(a == b) for a in ours for b in theirs])
    print(f"{net} {kind.norm} {member}: {robust[0]:.2f} {robust[1]:.2f} {between:.4f} {itself:.4f}")
    assert robust[0] <= robust[1] + 0.5
    assert between >= itself - 0.01
