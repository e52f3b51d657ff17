"""Solve a partial differential equation in 20 dimensions without a derivative of anything.

    python examples/tt_zo_hjb.py

The Hamilton-Jacobi-Bellman equation

    u_t + Lap u - 0.05 |grad u|^2 = -2   on [0, 1]^20 x [0, 1],   u(x, 1) = |x|_1

has the solution u = |x|_1 + 1 - t: u_t = -1, the Laplacian vanishes, |grad u|^2 = 20. The model is
u = |x|_1 + (1 - t) N(x, t), which has the right values at t = 1 whatever N is, and N is a small
network smoothed by a Gaussian in all 21 coordinates. Its derivatives in the equation come from its
values at the nodes of a sparse grid (``zeroth_order.stein``), and the gradient of the squared
residual with respect to the parameters from values of that: no backpropagation, no differentiation
in x (Zhao et al. 2023, "Tensor-compressed back-propagation-free training for (physics-informed)
neural networks").

Compared at equal numbers of forward passes: layers on tensor-train cores, of which the small ones
are estimated coordinate by coordinate and the others along random directions, and dense layers
along random directions; on request also tensor trains along random directions alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jrobust import models, report, training, zeroth_order

DIMENSION = 20


def activation(h):
    return jnp.tanh(h)


class Network(nn.Module):
    """(N, 21) -> (N, 1): two hidden layers of 64, dense (``ranks`` None) or on tensor trains."""

    ranks: int | None = 2

    @nn.compact
    def __call__(self, z):
        def layer(features, inputs, name):
            if self.ranks is None:
                return nn.Dense(int(np.prod(features)), name=name)
            return models.TensorTrainDense(features, inputs, self.ranks, name=name)

        h = activation(layer((8, 8), (3, 7), "layer1")(z))
        h = activation(layer((8, 8), (8, 8), "layer2")(h))
        return layer((1, 1), (8, 8), "layer3")(h)


@dataclasses.dataclass(frozen=True)
class Residual:
    """The mean squared residual of the equation at a batch of points (B, 21), times in the last.

    Attributes:
        sigma: of the Gaussian that smooths the network.
        level: of the sparse grid.
    """

    sigma: float = 0.1
    level: int = 3

    def smoothed(self, network, params, extra, z):
        """N and its derivatives."""
        values = lambda z: network.logits(params, extra, z)[:, 0]  # noqa: E731
        return zeroth_order.stein(values, z, self.sigma, self.level)

    def __call__(self, key, network, params, extra, batch):
        n = self.smoothed(network, params, extra, batch.x)
        left = 1 - batch.x[:, -1]  # the time left
        u_t = -n.value + left * n.grad[:, -1]
        u_x = 1 + left[:, None] * n.grad[:, :-1]  # |x|_1 rises by 1 in each coordinate
        laplacian = left * jnp.sum(n.second[:, :-1], 1)
        residual = u_t + laplacian - 0.05 * jnp.sum(u_x**2, 1) + 2
        return jnp.mean(residual**2), (extra, {})

    def solution(self, network, params, extra, z):
        """u (B,) of the model."""
        n = self.smoothed(network, params, extra, z).value
        return jnp.sum(jnp.abs(z[:, :-1]), 1) + (1 - z[:, -1]) * n


def exact(z):
    """u (B,) of the equation."""
    return jnp.sum(jnp.abs(z[:, :-1]), 1) + 1 - z[:, -1]


def errors(found, z):
    """Of values found at the points z, in L2: relative to u, and to u - |x|_1, which is learned."""
    error = jnp.linalg.norm(found - exact(z))
    return float(error / jnp.linalg.norm(exact(z))), float(error / jnp.linalg.norm(1 - z[:, -1]))


def train(args, objective, network, estimator, lr):
    """The state after ``args.steps`` steps, each on new random points."""
    rate = optax.cosine_decay_schedule(lr, args.steps)
    init, update = training.zeroth_order_step(objective, optax.adam(rate), estimator)
    update = jax.jit(update, donate_argnums=0)
    key = jax.random.key(args.seed)
    state = init(key, network, jnp.zeros((1, DIMENSION + 1)))
    shape = args.points, DIMENSION + 1
    draw = jax.jit(lambda step: jax.random.uniform(jax.random.fold_in(key, step), shape))
    labels = np.zeros(args.points, np.int32)  # the equation has none
    for step in range(args.steps):
        state, _ = update(state, training.batch(draw(step), labels))
    return jax.block_until_ready(state)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """For each way: parameters, forward passes, relative error, seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=1200)
    add("--points", type=int, default=4, help="at which the residual is taken in a step")
    add("--samples", type=int, default=32, help="random directions of the hybrid")
    add("--limit", type=int, default=32, help="largest array that goes coordinate by coordinate")
    add("--ranks", type=int, default=2)
    add("--sigma", type=float, default=0.1)
    add("--level", type=int, default=3)
    add("--mu", type=float, default=1e-2)
    add("--lr", type=float, default=2e-2, help="at first; it falls to 0 as a cosine")
    add("--dense-lr", type=float, default=1e-2, help="that of the dense network")
    add("--test", type=int, default=1000, help="held-out points")
    add("--seed", type=int, default=0)
    add("--ways", nargs="+", default=["TT, hybrid", "dense, RGE"], help="these, or 'TT, RGE'")
    add("--small", action="store_true", help="a few steps on a few points, in seconds")
    add("--json", action="store_true", help="print the results as a last line of JSON")
    args = parser.parse_args(arguments)
    if args.small:
        args.steps, args.points, args.test = 30, 2, 50

    objective = Residual(args.sigma, args.level)
    nodes = len(zeroth_order.sparse_grid(DIMENSION + 1, args.level)[1])
    small, dense = (models.network(Network(ranks)) for ranks in (args.ranks, None))
    blank = jnp.zeros((1, DIMENSION + 1))
    params = jax.eval_shape(small.init, jax.random.key(0), blank)[0]
    hybrid = zeroth_order.Hybrid(
        zeroth_order.CGE(args.mu, central=False, strict=True),
        zeroth_order.RGE(args.mu, args.samples, chunk=1),  # a loss is a batch of thousands
        args.limit,
    )
    queries = hybrid.queries(params)
    along = zeroth_order.RGE(args.mu, queries - 1, chunk=1)
    ways = {
        "TT, hybrid": (small, hybrid, args.lr),
        "TT, RGE": (small, along, args.lr),
        "dense, RGE": (dense, along, args.dense_lr),
    }

    test = jax.random.uniform(jax.random.key(args.seed + 1), (args.test, DIMENSION + 1))
    zero, _ = errors(jnp.sum(test[:, :-1], 1), test)
    print(
        f"{args.steps} steps of {queries} loss evaluations, each {args.points} points x {nodes} "
        f"nodes; relative L2 error of N = 0: {zero:.2e}"
    )
    solve = jax.jit(lambda model, z: objective.solution(model[0], *model[1], z))
    found: dict[str, dict[str, Any]] = {}
    for name in args.ways:
        network, estimator, lr = ways[name]
        began = time.process_time()
        state = train(args, objective, network, estimator, lr)
        seconds = time.process_time() - began
        pieces = np.array_split(np.asarray(test), -(-args.test // 50))
        values = jnp.concatenate([solve((network, state.weights), piece) for piece in pieces])
        error, learned = errors(values, test)
        found[name] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "queries": args.steps * queries,
            "forwards": args.steps * queries * args.points * nodes,
            "error": error,
            "learned": learned,
            "cpu_seconds": seconds,
        }
        print(f"{name}: relative error {error:.3g}", flush=True)
    columns = ["trained as", "parameters", "forward passes", "error of u", "of u - |x|_1", "CPU"]
    rows = [
        [
            name,
            one["parameters"],
            f"{one['forwards']:,}",
            f"{one['error']:.2e}",
            f"{one['learned']:.2e}",
            f"{one['cpu_seconds']:.0f} s",
        ]
        for name, one in found.items()
    ]
    print(report.table_text(columns, rows))
    if args.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
