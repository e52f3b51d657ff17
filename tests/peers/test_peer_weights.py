"""Weights of PyTorch networks with the layer names of released checkpoints, and live modules.

Logits and gradients are held to those of PyTorch on the same weights, batch-norm statistics
random too.
"""

import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jrobust import models

pytestmark = pytest.mark.peers

HERE = pathlib.Path(__file__).resolve().parent
PEER = os.environ.get("JROBUST_PEER", str(HERE.parents[1] / ".venv-peer" / "bin" / "python"))

SILU = {"activation": nn.silu, "padding": "same"}
CASES = {
    "ResNet18": models.ResNet18(width=8),
    "ResNet50": models.ResNet50(
        7, stages=(1, 2, 1, 1), width=8, mean=models.ResNet18.mean, std=models.ResNet18.std
    ),
    "PreActResNet18 input": models.PreActResNet18(width=8, shortcut="input"),
    "PreActResNet18 activated": models.PreActResNet18(width=8, final_norm=True),
    "PreActResNet18 deepmind": models.PreActResNet18(
        width=8, shortcut="input3x3", final_norm=True, **SILU
    ),
    "WideResNet": models.WideResNet(16, 2),
    "WideResNet deepmind": models.WideResNet(16, 2, **SILU),
    "ViT": models.ViT(10, 16, 4, 24, 2, 3, mean=models.ResNet18.mean, std=models.ResNet18.std),
    "DnCNN": models.DnCNN(5, 8),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    subprocess.run([PEER, HERE / "_torch_models.py", folder], check=True, timeout=600)
    return folder


def close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_of_the_same_weights(folder, name):
    with np.load(folder / f"{name}.npz") as arrays:
        given = dict(arrays)
    network = models.network(CASES[name])
    params, extra = models.from_torch(CASES[name], folder / f"{name}.pt")
    model = network.bind(params, extra)

    @jax.jit
    def both(x):
        logits, pull = jax.vjp(model, x)
        return logits, pull(2 * logits)[0]

    with jax.default_matmul_precision("highest"):
        logits, gradient = both(jnp.asarray(given["x"]))
    close(logits, given["logits"], 1e-4)
    close(gradient, given["gradient"], 1e-3)
    models.to_safetensors(folder / "ours.safetensors", params, extra)
    for a, b in zip(
        jax.tree.leaves(models.from_safetensors(folder / "ours.safetensors")),
        jax.tree.leaves((params, extra)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_wrong_architecture_is_named(folder):
    with pytest.raises(ValueError, match=r"linear.weight is \(10, 64\), expected \(9, 64\)"):
        models.from_torch(models.ResNet18(9, width=8), folder / "ResNet18.pt")
    with pytest.raises(ValueError, match=r"left over layer1.1.conv1.weight"):
        models.from_torch(models.ResNet18(width=8, stages=(1, 2, 2, 2)), folder / "ResNet18.pt")


def test_attacks_on_a_live_module():
    done = subprocess.run(
        [PEER, HERE / "_torch_live.py"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "live"
