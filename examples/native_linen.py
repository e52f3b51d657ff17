"""A Flax Linen network of your own: adversarial training, an attack, and a look inside.

    python examples/native_linen.py

Trains on scikit-learn's digits against PGD and shows how far a perturbation has grown after each
layer, for the network trained so and for the same network trained on clean images.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jrobust
from jrobust import attacks, data, models, training
from jrobust.threat import Linf

EPS = 0.15


class Net(nn.Module):
    """Any module that maps (B, H, W, 1) to logits; its switch may have one of the usual names."""

    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(2):
            x = nn.Conv(self.width * 2**i, (3, 3), strides=1 + i, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(10, name="head")(x)


def fit(network: models.Network, objective, examples: data.Dataset, steps: int) -> models.Bound:
    init, update = training.step(objective, optax.adamw(optax.cosine_decay_schedule(4e-3, steps)))
    state = init(jax.random.key(0), network, examples.x[:1])
    update = jax.jit(update, donate_argnums=0)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = examples[rng.choice(len(examples), 64, replace=False)]
        state, _ = update(state, training.batch(batch.x, batch.y, batch.id))
    return network.bind(state.params, state.extra)


def growth(network: models.Network, model: models.Bound, x, adversarial) -> dict[str, float]:
    """Norm of the change of each activation, relative to the activation."""
    before = network.features(model.params, model.extra, x)
    after = network.features(model.params, model.extra, adversarial)
    return {
        name: float(jnp.linalg.norm(after[name] - a) / jnp.linalg.norm(a))
        for name, a in before.items()
    }


def main(steps: int = 300) -> dict[str, tuple[float, float]]:
    """Clean and robust accuracy of each model."""
    train, _, test = data.digits()
    network = models.network(Net())
    print(models.summary(network, test.x), end="\n\n")
    objectives = {
        "standard": training.Standard(),
        "adversarial": training.Adversarial(attacks.PGD(Linf(EPS), steps=5, keep="last")),
    }
    accuracies, grown = {}, {}
    attack = attacks.PGD(Linf(EPS), steps=20)
    for name, objective in objectives.items():
        model = fit(network, objective, train, steps)
        found = jrobust.run(attack, jax.random.key(1), model, test.x, test.y, ids=test.id)
        clean = float((model(test.x).argmax(-1) == test.y).mean())
        accuracies[name] = clean, 1.0 - float(found.success.mean())
        grown[name] = growth(network, model, test.x, found.x)
        print(f"{name:12} clean {clean:.1%}, at Linf {EPS} {accuracies[name][1]:.1%}")
    print(f"\n{'layer':12}" + "".join(f"{name:>14}" for name in grown))
    for layer in grown["standard"]:
        print(f"{layer:12}" + "".join(f"{grown[name][layer]:14.3f}" for name in grown))
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
