"""ALMA: an augmented Lagrangian whose multipliers find the boundary."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State
from jrobust.attacks._minimal import MinimalNorm, finite, into_box, norm, width
from jrobust.threat import Threat, expand

Array = jax.Array


def logit_ratio(logits: Array, y: Array) -> Array:
    """DLR (Croce & Hein 2020, eq. 6), at most zero where ``y`` wins; margin with two classes.

    Where ``y`` does not have the largest logit, as a target at first, the spread of logits that the
    margin is divided by counts as a constant: it may be made of the target's own logit.
    """
    margin = losses.margin(logits, y)
    if logits.shape[-1] == 2:
        return margin
    top = jax.lax.top_k(logits, 3)[0]
    spread = top[:, 0] - top[:, 2] + 1e-8
    return margin / jnp.where(margin < 0, spread, jax.lax.stop_gradient(spread))


class _Carry(NamedTuple):
    square: Array  # (B, ...) average of squared gradients
    velocity: Array  # (B, ...)
    step_size: Array  # (B,)
    mu: Array  # (B,) multiplier
    rho: Array  # (B,) penalty parameter
    before: Array  # (B,) constraint at the last check
    found: Array  # (B,) int32 move of the first hit, ``steps`` before


def _slope(y: Array, rho: Array, mu: Array) -> Array:
    """The derivative by ``y`` of the penalty ``P2`` at a constraint ``y``, all (B,)."""
    above = mu + 2 * mu * rho * y + 0.5 * (rho * y) ** 2
    return jnp.where(y >= 0, above, mu / (1 - rho * jnp.minimum(y, 0.0)) ** 2)


@algorithm
class ALMA(MinimalNorm):
    """Augmented Lagrangian attack in L2 (Rony et al. 2021, algorithm 1).

    Minimises ``|x - x0| + P(g(x), rho, mu)`` by RMSProp with momentum, where ``g`` is the logit
    difference ratio, at most zero where adversarial, and ``P`` the penalty P2 of the paper. The
    multiplier ``mu`` follows a moving average of the penalty's derivative; ``rho`` grows by 1.2
    wherever, within ten moves, nothing was found and ``g`` did not fall to 0.95 of what it was. The
    step falls to a hundredth, along an exponential, from the first adversarial point on.

    With two classes, where the ratio is constant, ``g`` is the logit difference.

    Args:
        threat: ``L2``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        steps: moves from the input; costs ``steps`` gradients and ``steps + 1`` forward passes.
        first_step: length of the first move in widths of the box, which sets the step size.
        alpha: weight of the past in all moving averages; 0.5 for a hundred steps.
        mu: first multiplier.
        rho: first penalty parameter.
        loss: ``-g``.
        keep, quantize, estimator: see :class:`MinimalNorm`.
    """

    threat: Threat
    steps: int = static(default=1000)
    first_step: Any = 0.1
    alpha: Any = 0.9
    mu: Any = 1.0
    rho: Any = 1.0
    loss: losses.Loss = static(default=logit_ratio)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("L2",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("first_step", "alpha", "mu", "rho")

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries averages and multipliers."""
        zero, x0 = jnp.zeros_like(record.threat.eps), record.x0
        return x0, _Carry(
            square=jnp.ones_like(x0),
            velocity=jnp.zeros_like(x0),
            step_size=zero,
            mu=zero + self.mu,
            rho=zero + self.rho,
            before=zero + jnp.inf,
            found=jnp.zeros_like(record.y) + self.steps,
        )

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """One step of RMSProp on the augmented Lagrangian."""
        record, (hit, own), t = state.record, state.inner, state.t
        scale = width(record)
        # A hair beyond the boundary, where a tie would go either way.
        g = finite(1e-4 - loss)
        found = jnp.where(hit, jnp.minimum(own.found, t), own.found)
        checked = (t == 0) | ((t + 1) % 10 == 0)
        grow = checked & (t > 0) & (found == self.steps) & (g >= 0.95 * own.before)
        rho = jnp.where(grow, jnp.minimum(1.2 * own.rho, 1e12), own.rho)
        mu = self.alpha * own.mu + (1 - self.alpha) * _slope(g, rho, own.mu)
        mu = jnp.where(t == 0, own.mu, jnp.clip(mu, 1e-6, 1e12))

        change = (state.x - record.x0) / expand(scale, state.x)
        length = norm(change, 2)
        away = change / expand(jnp.where(length > 0, length, 1.0), change)
        push = expand(scale * _slope(g, rho, mu), change) * finite(gradient)
        slope = finite(away - push)
        square = self.alpha * own.square + (1 - self.alpha) * slope**2
        fresh = slope / (jnp.sqrt(square) + 1e-8)
        speed = norm(fresh, 2)
        first = self.first_step / jnp.where(speed > 0, speed, 1.0)
        size = jnp.where(t == 0, first, own.step_size)
        velocity = self.alpha * own.velocity + fresh
        share = jnp.maximum(t - found, 0) / jnp.maximum(self.steps - found, 1)
        move = expand(scale * size * 0.01**share, velocity) * velocity
        before = jnp.where(checked, g, own.before)
        x = into_box(record, state.x - move)
        return x, _Carry(square, velocity, size, mu, rho, before, found)
