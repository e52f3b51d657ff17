"""RayS: the sign vector along which the boundary is nearest, from decisions alone."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State, where
from jrobust.attacks._decision import DecisionAttack, halve, middle, settled
from jrobust.attacks._minimal import into_box, width
from jrobust.threat import Threat, expand

Array = jax.Array


class _Rays(NamedTuple):
    sign: Array  # (B, ...) the best ray so far, +1 and -1
    radius: Array  # (B,) how far along it the boundary is, inf while none was met
    begin: Array  # (B,) int32 first feature of the block whose signs are tried reversed
    size: Array  # (B,) int32 its features
    halving: Array  # (B,) bool: the boundary along the tried ray is being looked for
    low: Array  # (B,) radius along it that was not adversarial
    high: Array  # (B,) one that was


@algorithm
class RayS(DecisionAttack):
    """RayS (Chen & Gu 2020): hierarchical search over sign vectors; Linf, decisions alone.

    A ray leads from the input to a corner of the box. The signs of a block of features are
    reversed; where the point of the new ray at the best radius so far is adversarial, bisection
    finds its own radius, and the ray is kept. Blocks are all features, then halves, quarters and so
    on in turn, single features in the end, and those again until the queries are spent. Draws no
    random numbers.

    Blocks are stretches of the flattened features: of images (B, H, W, C) groups of rows, where the
    released version, whose images have their channels first, begins with groups of channels.

    Args:
        threat: ``Linf``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`. In
            evaluations against a fixed ``eps``, ``keep="success"`` stops as the paper's does.
        queries: points to ask about at most, the input included.
        tolerance: width at which a bisection ends, in the Euclidean length of the ray and in widths
            of the box.
        keep: see :class:`MinimalNorm`.
        quantize: number of grey levels, 256 for 8-bit images; points are rounded to them before
            they are asked about.
    """

    threat: Threat
    queries: int = static(default=10_000)
    tolerance: Any = 1e-3
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)

    NORMS: ClassVar[tuple[str, ...]] = ("Linf",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("tolerance",)

    @property
    def random(self) -> bool:
        """Nothing is drawn."""
        return False

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the ray along which all features rise."""
        none, zero = jnp.zeros_like(record.y), jnp.zeros_like(record.loss)
        return record.x0, _Rays(
            jnp.ones_like(record.x0),
            zero + jnp.inf,
            none,
            none + record.x0[0].size,
            none > 0,
            zero,
            zero,
        )

    def propose(self, state: State) -> tuple[Array, Any]:
        """The middle of the interval, or another ray at the best radius."""
        record, (hit, s) = state.record, state.inner
        count, wide = record.x0[0].size, width(record)
        low, high = halve(s.low, s.high, hit)
        low, high = jnp.where(s.halving, low, s.low), jnp.where(s.halving, high, s.high)
        over = settled(low, high, self.tolerance * wide / count**0.5)
        asked = state.t > 0  # not the input
        halving = asked & jnp.where(s.halving, ~over, hit & ~over)

        better = s.halving & ~halving & (high < s.radius)
        sign = where(better, _reversed(s.sign, s.begin, s.size), s.sign)
        radius = jnp.where(better, high, s.radius)
        # To the next block, or to the first of half the size.
        following = asked & ~halving
        begin = s.begin + jnp.where(following, s.size, 0)
        last = begin >= count
        begin = jnp.where(last, 0, begin)
        size = jnp.where(last, (s.size + 1) // 2, s.size)
        low = jnp.where(halving, low, 0.0)
        high = jnp.where(halving, high, jnp.minimum(radius, wide))

        reach = expand(jnp.where(halving, middle(low, high), high), sign)
        x = into_box(record, record.x0 + reach * _reversed(sign, begin, size))
        return x, _Rays(sign, radius, begin, size, halving, low, high)


def _reversed(sign: Array, begin: Array, size: Array) -> Array:
    """The ray with the signs of a block reversed."""
    place = jnp.arange(sign[0].size)[None]
    block = (place >= begin[:, None]) & (place < (begin + size)[:, None])
    return jnp.where(block.reshape(sign.shape), -sign, sign)


__all__ = ["RayS"]
