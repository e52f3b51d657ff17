"""Attacks on a live PyTorch module. Runs where both torch and jax are: the peers' environment.

The module's weights are also read into JAX: both ways must lead to the same gradients and, up to
near ties, to the same attacks.
"""

import pathlib
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _torch_models import DeepMindPreActResNet  # noqa: E402
from flax import linen as nn  # noqa: E402

import jrobust  # noqa: E402
from jrobust import attacks, models, smoothing  # noqa: E402
from jrobust.threat import Linf  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
torch.manual_seed(1)
module = DeepMindPreActResNet(4, 5)
for layer in module.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
        torch.nn.init.normal_(layer.running_mean, std=0.3)
x = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))


refuses = unittest.TestCase().assertRaisesRegex
with refuses(ValueError, "call module.eval"):
    models.from_torch_module(module, x)
with refuses(TypeError, "torch.nn.Module"):
    models.from_torch_module(lambda x: x, x)
module.eval()
live = models.from_torch_module(module, x)
assert live.classes == 5

ours = models.PreActResNet18(
    5, width=4, activation=nn.silu, shortcut="input3x3", padding="same", final_norm=True
)
read = models.network(ours).bind(*models.from_torch(ours, module.state_dict()))
np.testing.assert_allclose(jax.jit(live)(x), read(x), rtol=1e-4, atol=1e-4)
y = read(x).argmax(-1)

gradients = [
    jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2 * jnp.arange(5.0)[None])))(x)
    for f in (live, read)
]
scale = np.abs(gradients[1]).max()
np.testing.assert_allclose(*gradients, atol=1e-4 * scale)
assert all(p.grad is None for p in module.parameters()), "the module is as it was"

# vmap: the mapped axis becomes more rows.
many = jnp.stack([x, 1 - x])
np.testing.assert_allclose(
    jax.vmap(live)(many), jnp.stack([live(x), live(1 - x)]), rtol=1e-4, atol=1e-4
)

key, ids = jax.random.key(2), jnp.arange(6)
for attack in (
    attacks.FGSM(Linf(0.02)),
    attacks.restarts(attacks.PGD(Linf(0.02), steps=5), 2),
):
    mine, theirs = (jrobust.run(attack, key, f, x, y, ids=ids) for f in (live, read))
    np.testing.assert_allclose(mine.loss, theirs.loss, rtol=1e-2, atol=1e-2)
    assert np.mean(np.asarray(mine.success) == np.asarray(theirs.success)) > 0.8
    assert jnp.max(mine.distance) <= 0.02 + 1e-6
    np.testing.assert_array_equal(live(mine.x).argmax(-1) != y, mine.success)
curve = jrobust.sweep(attacks.PGD(Linf(0.1), steps=3), key, live, x, y, ids=ids, eps=[0.0, 0.05])
assert curve.success.shape == (2, 6)
assert not curve.success[0].any()
votes = smoothing.count_votes(key, live, x, smoothing.Gaussian(0.1), 20, ids=ids)
assert (votes.sum(1) == 20).all()

with torch.no_grad():  # as it is at the call
    module.logits.bias += 3 * torch.nn.functional.one_hot(torch.tensor(2), 5)
np.testing.assert_allclose(live(x)[:, 2] - read(x)[:, 2], 3, rtol=1e-3, atol=1e-3)
print("live")
