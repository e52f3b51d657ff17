"""FMN: gradient steps in a ball whose radius follows the boundary."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State
from jrobust.attacks._minimal import MinimalNorm, distance, finite, furthest, norm, width
from jrobust.threat import L2, Threat, expand

Array = jax.Array

# The norm in which a gradient is measured for the distance to a linear boundary.
DUAL = {"Linf": 1, "L2": 2, "L1": np.inf}


@algorithm
class FMN(MinimalNorm):
    """Fast minimum-norm attack in any norm (Pintor et al. 2021, algorithm 1).

    Every move is a step along the gradient, L2-normalised in all norms, projected onto a ball
    around the input. Until an adversarial point is found, the radius is what takes a linear model
    to its boundary, times ``1 + gamma``; from then on it shrinks by ``gamma`` where the point was
    adversarial and grows by it where not. Step and ``gamma`` fall along a cosine. (Without the
    factor, as published, a search can come to rest on the near side of the boundary.)

    The projection is the exact one onto ball and box together; the paper's is onto the ball, then
    clipped. The L2 projections of the released versions do nothing (foolbox 3.3.4) or put every
    point onto the sphere (adv-lib 0.2.8).

    Args:
        threat: ``Linf``, ``L2``, ``L1`` or ``L0``; ``eps`` is the largest distance that counts, see
            :class:`MinimalNorm`.
        steps: moves from the input; costs ``steps`` gradients and ``steps + 1`` forward passes.
        step_size: L2 length of the first step in widths of the box; scalar or (B,).
        final_step_size: that of the last step.
        gamma: by how much the radius changes in the first move, relative to it; in L0 by at least
            one location.
        final_gamma: the same in the last move.
        loss: what to ascend, as in :class:`PGD`; zero at the boundary.
        keep, quantize, estimator: see :class:`MinimalNorm`.
    """

    threat: Threat
    steps: int = static(default=100)
    step_size: Any = 1.0
    final_step_size: Any = 0.01
    gamma: Any = 0.05
    final_gamma: Any = 0.001
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1", "L0")
    POSITIVE: ClassVar[tuple[str, ...]] = ("step_size", "final_step_size", "gamma", "final_gamma")

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the radius, and the distance of the closest hit so far."""
        one = jnp.ones_like(record.threat.eps)
        return record.x0, (one, jnp.inf * one)

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """A step along the gradient, into the next ball."""
        record, (hit, (radius, nearest)) = state.record, state.inner
        wave = (1 + jnp.cos(jnp.pi * state.t / self.steps)) / 2
        gamma = self.final_gamma + (self.gamma - self.final_gamma) * wave
        size = self.final_step_size + (self.step_size - self.final_step_size) * wave
        here = distance(record, state.x)
        nearest = jnp.where(hit, jnp.minimum(nearest, here), nearest)
        smaller, larger = radius * (1 - gamma), radius * (1 + gamma)
        if record.threat.norm == "L0":
            smaller = jnp.maximum(jnp.minimum(jnp.floor(smaller), radius - 1), 1.0)
            larger = jnp.maximum(jnp.floor(larger), radius + 1)
        else:
            slope = norm(finite(gradient), DUAL[record.threat.norm])
            reach = here + jnp.abs(loss) / jnp.where(slope > 0, slope, 1.0)
            reach = jnp.where((slope > 0) & jnp.isfinite(reach), (1 + gamma) * reach, jnp.inf)
            larger = jnp.where(jnp.isfinite(nearest), larger, reach)
        radius = jnp.where(hit, jnp.minimum(smaller, nearest), larger)
        radius = jnp.minimum(radius, distance(record, furthest(record)))
        step = expand(size * width(record), state.x) * L2(1.0).steepest(gradient)
        ball = dataclasses.replace(record.threat, eps=radius)
        return ball.project(state.x + step, record.x0), (radius, nearest)
