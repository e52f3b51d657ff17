"""PDGD: primal-dual gradient descent on the perturbation and its multiplier."""

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

# Bounds of the log ratio of the two multipliers.
_EXTREME = 13.815510557964274  # log(1e6)


class _Carry(NamedTuple):
    first: Array  # (B, ...) Adam's averages (Kingma & Ba 2015)
    second: Array  # (B, ...)
    dual: Array  # (B,) log ratio of the weights of loss and norm
    weight: Array  # (B,) moving average of the weight of the loss


@algorithm
class PDGD(MinimalNorm):
    """Primal-dual gradient descent in L2 (Matyasko & Chau 2021).

    Descends ``(1 - w) |x - x0| + w softplus(m)`` by Adam, ``m`` being the logit difference, below
    zero where adversarial; the log odds of ``w`` ascend by the sign of ``m``, and ``w`` is their
    moving average. The step falls to a hundredth along an exponential, that of the log odds to a
    tenth along a line.

    Args:
        threat: ``L2``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        steps: moves from the input; costs ``steps`` gradients and ``steps + 1`` forward passes.
        step_size: Adam's first step in widths of the box; scalar or (B,).
        dual_step_size: first step of the log odds.
        ratio: weight of the norm over that of the loss at the start.
        loss: ``-m``.
        keep, quantize, estimator: see :class:`MinimalNorm`.
    """

    threat: Threat
    steps: int = static(default=500)
    step_size: Any = 0.1
    dual_step_size: Any = 0.1
    ratio: Any = 0.01
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("L2",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("step_size", "dual_step_size", "ratio")

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries averages and multipliers."""
        still = jnp.zeros_like(record.x0)
        dual = jnp.zeros_like(record.threat.eps) - jnp.log(self.ratio)
        return record.x0, _Carry(still, still, dual, jax.nn.sigmoid(dual))

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """One step of Adam on the point, one of ascent on the multiplier."""
        record, own, t = state.record, state.inner.own, state.t
        scale = width(record)
        change = (state.x - record.x0) / expand(scale, state.x)
        length = norm(change, 2)
        away = change / expand(jnp.where(length > 0, length, 1.0), change)
        push = own.weight * jax.nn.sigmoid(finite(-loss)) * scale
        slope = finite(expand(1 - own.weight, away) * away - expand(push, away) * finite(gradient))
        first = 0.9 * own.first + 0.1 * slope
        second = 0.999 * own.second + 0.001 * slope**2
        n = (t + 1).astype(slope.dtype)
        mean, spread = first / expand(1 - 0.9**n, first), second / expand(1 - 0.999**n, second)
        size = scale * self.step_size * 0.01 ** (t / self.steps)
        move = expand(size, mean) * mean / (jnp.sqrt(spread) + 1e-8)
        left = jnp.maximum(self.steps - 1 - t, 0) / max(self.steps - 1, 1)
        ascent = self.dual_step_size * (0.1 + 0.9 * left)
        dual = jnp.clip(own.dual - ascent * jnp.sign(finite(loss)), -_EXTREME, _EXTREME)
        weight = 0.9 * own.weight + 0.1 * jax.nn.sigmoid(dual)
        return into_box(record, state.x - move), _Carry(first, second, dual, weight)
