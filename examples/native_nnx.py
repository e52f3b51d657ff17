"""A Flax nnx network that was trained elsewhere: measured, hardened, and given back.

    python examples/native_nnx.py

The module is trained by a plain nnx loop on scikit-learn's digits. jrobust attacks it as it is,
goes on from its values with adversarial training, and the result is written into the module.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np
import optax
from flax import nnx

import jrobust
from jrobust import attacks, data, models, training
from jrobust.threat import Linf

EPS = 0.15


class Net(nnx.Module):
    """Any module that maps (B, H, W, 1) to logits."""

    def __init__(self, width: int = 16, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(2 * width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(16 * 2 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.reshape(x.shape[0], -1)))


def batches(examples: data.Dataset, steps: int):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield examples[rng.choice(len(examples), 64, replace=False)]


def pretrain(net: Net, examples: data.Dataset, steps: int) -> None:
    """The loop as nnx users write it; the module changes in place."""
    optimiser = nnx.Optimizer(net, optax.adamw(4e-3), wrt=nnx.Param)

    @nnx.jit
    def update(net, optimiser, x, y):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

        optimiser.update(net, nnx.grad(loss)(net))

    net.train()
    for batch in batches(examples, steps):
        update(net, optimiser, batch.x, batch.y)


def harden(net: Net, examples: data.Dataset, steps: int) -> None:
    """Adversarial training from the values of ``net``, which then get the new ones."""
    network = models.network(net)
    objective = training.Adversarial(attacks.PGD(Linf(EPS), steps=5, keep="last"))
    init, update = training.step(objective, optax.adamw(optax.cosine_decay_schedule(4e-3, steps)))
    state = init(jax.random.key(0), network, examples.x[:1])
    update = jax.jit(update, donate_argnums=0)
    for batch in batches(examples, steps):
        state, _ = update(state, training.batch(batch.x, batch.y, batch.id))
    nnx.update(net, state.params)
    nnx.update(net, state.extra["batch_stats"])


def measure(net: Net, test: data.Dataset) -> tuple[float, float]:
    """Clean and robust accuracy; ``bind`` reads the module in evaluation mode, whatever its own."""
    model = models.bind(net)
    attack = attacks.PGD(Linf(EPS), steps=20)
    found = jrobust.run(attack, jax.random.key(1), model, test.x, test.y, ids=test.id)
    clean = float((model(test.x).argmax(-1) == test.y).mean())
    return clean, 1.0 - float(found.success.mean())


def main(steps: int = 300) -> dict[str, tuple[float, float]]:
    """Clean and robust accuracy before and after."""
    train, _, test = data.digits()
    net = Net(rngs=nnx.Rngs(0))
    print(models.summary(models.bind(net), test.x), end="\n\n")
    accuracies = {}
    for name, change in (("pretrained", pretrain), ("hardened", harden)):
        change(net, train, steps)
        accuracies[name] = clean, robust = measure(net, test)
        print(f"{name:12} clean {clean:.1%}, at Linf {EPS} {robust:.1%}")
    net.eval()
    by_hand = float((net(test.x).argmax(-1) == test.y).mean())
    print(f"the module itself, called as ever: clean {by_hand:.1%}")
    assert by_hand == accuracies["hardened"][0]
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
