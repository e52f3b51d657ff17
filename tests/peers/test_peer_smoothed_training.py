"""Losses for randomized smoothing, and their slopes by the logits, against PyTorch."""

import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrobust import training
from jrobust.models import Network
from jrobust.smoothing import Gaussian
from jrobust.training import MACER, Consistency, Stability

pytestmark = pytest.mark.peers

HERE = pathlib.Path(__file__).resolve().parent
B, M, C = 20, 4, 5
OBJECTIVES = {
    "consistency": Consistency(Gaussian(0.25), lbd=4.0, eta=0.5, samples=M),
    "macer": MACER(Gaussian(0.25), lbd=3.0, gamma=2.5, beta=1.5, samples=M),
    "stability": Stability(Gaussian(0.25), lbd=2.0, samples=M - 1),
}


def clean_first(params, extra, key, x):
    """The logits are the parameters: of copy 0 for a clean pass, else of the last copies."""
    copies = x.shape[0] // B
    logits = params[:, :1] if x.shape[0] == B else params[:, M - copies :]
    return logits.reshape(-1, C), extra


NETWORK = Network(lambda key, x: ({}, {}), lambda *_: None, clean_first, lambda *_: {})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("losses")
    logits = np.float32(rng.normal(size=(B, 1, C)) + rng.normal(size=(B, M, C)))
    y = np.where(rng.uniform(size=B) < 0.7, logits.mean(1).argmax(-1), rng.integers(0, C, B))
    np.savez(folder / "in.npz", logits=logits, y=y)
    python = HERE.parents[1] / ".venv-peer" / "bin" / "python"
    script = [str(python), str(HERE / "_smoothed_training.py")]
    subprocess.run(
        [*script, str(folder / "in.npz"), str(folder / "out.npz")], check=True, timeout=120
    )
    with np.load(folder / "out.npz") as found:
        return logits, y, dict(found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_slope_are_those_of_torch(name, theirs):
    logits, y, found = theirs
    batch = training.batch(np.zeros((B, 2), np.float32), y)

    @jax.jit
    def ours(params):
        return jax.value_and_grad(
            lambda p: OBJECTIVES[name](jax.random.key(0), NETWORK, p, {}, batch)[0]
        )(params)

    value, slope = ours(jnp.asarray(logits))
    np.testing.assert_allclose(value, found[name], rtol=1e-5)
    np.testing.assert_allclose(slope, found[f"{name} slope"], rtol=1e-4, atol=1e-6)
    assert np.abs(slope).max() > 1e-3
