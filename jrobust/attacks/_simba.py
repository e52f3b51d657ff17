"""SimBA: coordinates one by one, in pixels or frequencies."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State, where
from jrobust.attacks._minimal import width
from jrobust.attacks._query import QueryAttack
from jrobust.threat import Threat, expand

Array = jax.Array


def log_odds(logits: Array, y: Array) -> Array:
    """``log((1 - p) / p)`` of the probability ``p`` of ``y``: orders points as ``-p`` does.

    Where ``p`` or ``1 - p`` rounds to 1 in float32, it still tells points apart.
    """
    own = jnp.arange(logits.shape[-1])[None, :] == y[:, None]
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
    return others - jnp.sum(jnp.where(own, logits, 0.0), axis=-1)


class _Walk(NamedTuple):
    at: Array  # (B, ...) the best point so far
    loss: Array  # (B,) its loss
    order: Array  # (B, d) int32 the coordinates in the order in which they are tried
    k: Array  # (B,) int32 the one tried now
    back: Array  # (B,) bool: whether it is tried in its negative direction


@algorithm
class SimBA(QueryAttack):
    """The simple black-box attack of Guo et al. (2019), "SimBA" and "SimBA-DCT".

    Tries vectors of an orthonormal basis one by one: a step along it is kept where it lowers the
    probability of the label (raises that of the target), else the step in the opposite direction is
    tried. That costs one query or two. Every example has an order of its own, without replacement;
    after the last vector it goes round again. The first query is of the input.

    Every point is projected onto the ball and the box, as the released code does with the box: in
    the published attack the number of steps bounds the norm.

    Args:
        threat: the ball and box to stay in; L2 as published, or Linf.
        queries: forward passes of an example at most.
        step_size: length of a step in widths of the box, in L2.
        basis: ``"pixel"``: single features, in any order, for inputs of any rank. ``"dct"``: the
            two-dimensional cosines of each channel of an image (B, H, W, C) or (B, H, W), first the
            lowest eighth of the frequencies on each axis, then the next 1/32, and so on, within
            them in any order.
        loss: what to ascend, as in :class:`PGD`. The default orders points by the probability of
            the label.
    """

    threat: Threat
    queries: int = static(default=20000)
    step_size: Any = 0.2
    basis: str = static(default="pixel")
    loss: losses.Loss = static(default=log_odds)

    POSITIVE: ClassVar[tuple[str, ...]] = ("step_size",)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses other bases, and what has no frequencies."""
        if self.basis not in ("pixel", "dct"):
            raise ValueError(f"SimBA.basis must be 'pixel' or 'dct', got {self.basis!r}")
        super().check(x, y, classes, targets)
        self._blocks(x.shape)

    def _blocks(self, shape: tuple[int, ...]) -> np.ndarray:
        """When each coordinate's turn is (d,): those of equal number together."""
        if self.basis == "pixel":
            return np.zeros(np.prod(shape[1:], dtype=int), np.float32)
        if len(shape) not in (3, 4):
            raise ValueError(
                "SimBA's basis 'dct' needs images (B, H, W, C) or (B, H, W), got inputs of shape "
                f"{shape}: reshape them, or use basis='pixel'"
            )
        down, across = (np.maximum(32 * np.arange(n) - 4 * n, -n) // n for n in shape[1:3])
        blocks = np.maximum(down[:, None], across[None, :])
        return np.repeat(blocks, shape[3] if len(shape) == 4 else 1).astype(np.float32)

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the order."""
        blocks = self._blocks(record.x0.shape)

        def shuffled(key: Array) -> Array:
            return jnp.argsort(blocks + jax.random.uniform(key, blocks.shape, blocks.dtype)).astype(
                jnp.int32
            )

        # Added to a lane's own zero, so that under shard_map it varies over devices as lanes do.
        order = jax.vmap(shuffled)(_keys.fold(record.key, 0)) + jnp.zeros_like(record.y)[:, None]
        return record.x0, _Walk(
            record.x0, record.loss, order, jnp.full_like(record.y, -1), record.done
        )

    def propose(self, state: State, loss: Array) -> tuple[Array, Any]:
        """Keep the point if it is better; the next direction."""
        record, old = state.record, state.inner
        first = old.k < 0
        loss = jnp.where(jnp.isnan(loss), -jnp.inf, loss)
        better = (loss > old.loss) | first
        at, best = where(better, (state.x, loss), (old.at, old.loss))
        k = old.k + (better | old.back).astype(jnp.int32)
        back = ~(better | old.back)
        place = (k % old.order.shape[1])[:, None]
        index = jnp.take_along_axis(old.order, place, axis=1)[:, 0]
        size = jnp.where(back, -1.0, 1.0) * self.step_size * width(record)
        x = at + expand(size, at) * _vectors(self.basis, index, at.shape)
        return record.threat.project(x, record.x0), _Walk(at, best, old.order, k, back)


def _vectors(basis: str, index: Array, shape: tuple[int, ...]) -> Array:
    """The basis vectors ``index`` (B,): (B, ...) of L2 norm one."""
    if basis == "pixel":
        size = int(np.prod(shape[1:]))
        return (jnp.arange(size)[None] == index[:, None]).astype(jnp.float32).reshape(shape)
    height, width, channels = shape[1], shape[2], shape[3] if len(shape) == 4 else 1
    down, across, channel = (
        v[:, None] for v in jnp.unravel_index(index, (height, width, channels))
    )

    def cosine(frequency: Array, n: int) -> Array:
        wave = jnp.cos(np.pi / n * (np.arange(n, dtype=np.float32)[None] + 0.5) * frequency)
        return wave * jnp.where(frequency == 0, (1 / n) ** 0.5, (2 / n) ** 0.5)

    one = (jnp.arange(channels)[None] == channel).astype(jnp.float32)
    rows, columns = cosine(down, height), cosine(across, width)
    return (rows[:, :, None, None] * columns[:, None, :, None] * one[:, None, None, :]).reshape(
        shape
    )


__all__ = ["SimBA", "log_odds"]
