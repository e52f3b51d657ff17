"""A network in front of a simulator that has no derivative, trained through ``surrogate``.

    python examples/zo_sciml.py

The simulator is a coarse solver of Burgers' equation, u_t + (u^2 / 2)_x = nu u_xx + s(x), of 32
cells in fixed-point arithmetic: after each step it keeps the state in multiples of 1/256, so that
its derivative is zero. A network reads the initial state and gives the source s that makes the
coarse solver end where one of 256 cells ends without a source. Below the simulator the gradient is
backpropagation, through it an estimate from its values: ``zeroth_order.surrogate``.

Beside it: no correction, ``jax.grad`` through the rounding, and through a twin of the simulator
that does not round, where one can be written. All are judged by the simulator itself.
Half a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jrobust import report, zeroth_order

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Burgers:
    """The solver on the periodic unit interval: Rusanov's flux, explicit Euler steps.

    Attributes:
        resolution: the state is kept in multiples of 1/resolution; None for floating point.
        cells: of the grid.
        steps: in time, to t = 0.25.
        viscosity: nu.
    """

    resolution: int | None = None
    cells: int = 32
    steps: int = 20
    viscosity: float = 0.01

    def __call__(self, u, source):
        """The state (cells,) at the end, from that at the start, under a source (cells,)."""
        width, dt = 1.0 / self.cells, 0.25 / self.steps

        def step(u, _):
            right = jnp.roll(u, -1)
            speed = jnp.maximum(jnp.abs(u), jnp.abs(right))
            flux = (u**2 + right**2) / 4 - (right - u) * (speed / 2 + self.viscosity / width)
            u = u - dt / width * (flux - jnp.roll(flux, 1)) + dt * source
            if self.resolution is not None:
                u = jnp.round(self.resolution * u) / self.resolution
            return u, None

        return jax.lax.scan(step, u, None, length=self.steps)[0]


class Corrector(nn.Module):
    """Initial states (B, cells) -> sources (B, cells), at first zero."""

    @nn.compact
    def __call__(self, u):
        h = nn.relu(nn.Dense(128)(u))
        h = nn.relu(nn.Dense(128)(h))
        return nn.Dense(u.shape[-1], kernel_init=nn.initializers.zeros)(h)


def problems(key, n: int, cells: int = 256):
    """Initial states (n, 32) of random waves, and where the fine solver takes them (n, 32)."""
    place = (jnp.arange(cells) + 0.5) / cells
    first, second, third = jax.random.split(key, 3)
    height = jax.random.normal(first, (n, 3, 1)) * jnp.array([0.4, 0.2, 0.1])[None, :, None]
    phase = jax.random.uniform(second, (n, 3, 1))
    wave = jnp.arange(1, 4)[None, :, None] * place[None, None, :] + phase
    start = jnp.sum(height * jnp.sin(2 * jnp.pi * wave), 1)
    start += 0.3 * jax.random.normal(third, (n, 1))
    start = jnp.clip(start, -1.8, 1.8)
    fine = Burgers(cells=cells, steps=800)
    end = jax.jit(jax.vmap(fine))(start, jnp.zeros_like(start))
    return tuple(jnp.mean(u.reshape(n, 32, -1), -1) for u in (start, end))


def train(simulator, estimator, examples, steps: int, lr: float, seed: int):
    """The corrector's parameters; ``estimator`` None for ``jax.grad`` through the simulator."""
    network, key = Corrector(), jax.random.key(seed)
    params = network.init(key, examples[0][:1])
    tx = optax.adam(optax.cosine_decay_schedule(lr, steps))

    def one(key, source, u, end):
        def error(source):
            return jnp.mean((simulator(u, source) - end) ** 2)

        if estimator is None:
            return error(source)
        return zeroth_order.surrogate(error, estimator)(key, source)

    @jax.jit
    def update(params, opt_state, step):
        now = jax.random.fold_in(key, step)
        rows = jax.random.randint(now, (BATCH,), 0, len(examples[0]))
        u, end = (part[rows] for part in examples)

        def loss(params):
            lanes = jax.random.split(now, BATCH)
            return jnp.mean(jax.vmap(one)(lanes, network.apply(params, u), u, end))

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for step in range(steps):
        params, opt_state = update(params, opt_state, step)
    return params


@functools.partial(jax.jit, static_argnames="simulator")
def errors(simulator, sources, u, end):
    """(n,) relative errors of the end states in L2."""
    found = jax.vmap(simulator)(u, sources)
    return jnp.linalg.norm(found - end, axis=1) / jnp.linalg.norm(end, axis=1)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """For each method: the relative error over test problems, simulations, seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", type=int, default=4096)
    add("--test", type=int, default=256)
    add("--steps", type=int, default=2000)
    add("--resolution", type=int, default=256)
    add("--lr", type=float, default=3e-3)
    add("--mu", type=float, default=0.3, help="half the distance between two simulations")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print the results as a last line of JSON")
    args = parser.parse_args(arguments)

    coarse, smooth = Burgers(args.resolution), Burgers()
    examples = problems(jax.random.key(1), args.train)
    u, end = problems(jax.random.key(2), args.test)
    cells = coarse.cells
    recipes = {
        "jax.grad through the rounding": (coarse, None),
        "jax.grad through the twin": (smooth, None),
        f"CGE, mu = {args.mu}": (coarse, zeroth_order.CGE(args.mu, exact=False)),
        f"RGE, mu = {args.mu}, q = {cells}": (
            coarse,
            zeroth_order.RGE(args.mu, cells, antithetic=True),
        ),
    }
    found: dict[str, dict[str, Any]] = {}

    def judge(name, sources, simulations, seconds):
        relative = np.asarray(errors(coarse, sources, u, end))
        found[name] = {
            "error": float(relative.mean()),
            "worst": float(np.quantile(relative, 0.9)),
            "simulations": simulations,
            "cpu_seconds": seconds,
        }

    judge("no correction", jnp.zeros_like(u), 0, 0.0)
    for name, (simulator, estimator) in recipes.items():
        began = time.process_time()
        params = train(simulator, estimator, examples, args.steps, args.lr, args.seed)
        seconds = time.process_time() - began
        calls = 1 if estimator is None else estimator.queries(u[0])
        judge(name, Corrector().apply(params, u), args.steps * BATCH * calls, seconds)
    print(
        f"relative error of the end state over {args.test} test problems, in %: mean, and the "
        f"largest tenth begins at; {args.steps} steps of {BATCH}"
    )
    columns = ["correction trained by", "mean", "90%", "simulations", "CPU"]
    rows = [
        [
            name,
            f"{100 * one['error']:.2f}",
            f"{100 * one['worst']:.2f}",
            f"{one['simulations']:,}",
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
