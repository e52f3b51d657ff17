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


# One identifier for each network and class of RobustBench's, all of them where that is cheap.
def identifiers():
    from jrobust.models import _robustbench

    seen = set()
    for (dataset, threat), table in _robustbench._MODELS.items():
        for name, module in table.items():
            large = isinstance(module, models.WideResNet) and module.depth > 28
            key = repr(module) if large else name
            if (dataset, threat if not large else None, key) not in seen:
                seen.add((dataset, threat if not large else None, key))
                yield dataset, threat, name


def test_logits_of_every_architecture_of_robustbench(tmp_path):
    forward = jax.jit(lambda model, x: model(x))
    path, absent, errors = tmp_path / "model", [], {}
    command = [PEER, HERE / "_torch_zoo.py"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as zoo:
        for dataset, threat, name in identifiers():
            print(dataset, threat, name, path, file=zoo.stdin, flush=True)
            if (answer := zoo.stdout.readline().strip()) == "absent":
                absent.append(name)
                continue
            assert answer, "RobustBench's process ended"
            module = models.robustbench(name, dataset, threat)
            model = models.network(module).bind(*models.from_torch(module, f"{path}.pt"))
            with np.load(f"{path}.npz") as given:
                theirs = given["logits"]
                with jax.default_matmul_precision("highest"):
                    ours = forward(model, jnp.asarray(given["x"]))
            errors[dataset, threat, name] = float(np.abs(ours - theirs).max() / abs(theirs).max())
    assert zoo.returncode == 0
    assert not absent
    assert len(errors) > 60
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}
