"""What minimal-norm attacks share: they look for the closest adversarial point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import losses
from jrobust.attacks._base import (
    GradientAttack,
    LogitsFn,
    Record,
    State,
    _ask,
    _passes,
    forward,
    succeeds,
    where,
)
from jrobust.threat import Linf, Threat

Array = jax.Array


# 8 / 255 is the distance of two levels up to a few parts in a million, in float32.
_RIM = 1e-5


class Search(NamedTuple):
    """What a minimal-norm attack carries in ``State.inner``."""

    hit: Array  # (B,) bool: whether the point just evaluated is adversarial, at any distance
    own: Any  # what the algorithm itself carries (leaves with example axis)


def within(threat: Threat, x: Array, x0: Array, *, on_grid: bool = False) -> Array:
    """(B,) bool: whether ``x`` (B, ...), a point of the box, lies in the ball around ``x0``.

    In Linf in exact arithmetic, in L0 by counting, else by the float32 norm. A radius of whole
    levels reaches the points of the grid at its rim only up to rounding: ``on_grid`` allows that.
    """
    if on_grid:
        return threat.distance(x, x0) <= threat.eps * (1 + _RIM)
    if isinstance(threat, Linf):
        return jnp.all(threat.project(x, x0) == x, axis=tuple(range(1, x.ndim)))
    return threat.distance(x, x0) <= threat.eps


def distance(record: Record, x: Array) -> Array:
    """The norm of ``x - x0`` (B, ...) -> (B,) in the threat model's norm."""
    return record.threat.distance(x, record.x0)


def track(
    record: Record,
    x: Array,
    loss: Array,
    hit: Array,
    *,
    forwards: Array | int,
    backwards: Array | int,
    measure: Callable[[Record, Array], Array] | None = None,
    on_grid: bool = False,
) -> Record:
    """Enter the evaluation of ``x`` (B, ...) into the account of the lanes that are not done.

    ``x`` is kept where it is a ``hit`` (B,), within ``eps``, and closer than what was kept before,
    by ``measure(record, x)`` (B,) or else the threat model's norm. The first point entered is the
    input itself: what is returned where nothing is found. ``on_grid``: see :func:`within`.
    """
    measure = measure or distance
    live = ~record.done
    counts = hit & live & within(record.threat, x, record.x0, on_grid=on_grid)
    nearer = measure(record, x) < measure(record, record.best)
    better = counts & (nearer | ~record.success)
    spent = live.astype(jnp.int32)
    return record._replace(
        best=where(better, x, record.best),
        success=record.success | counts,
        loss=jnp.where(better | (live & (record.seen == 0)), loss, record.loss),
        first=jnp.where(counts & (record.first < 0), record.seen, record.first),
        seen=record.seen + spent,
        forwards=record.forwards + forwards * spent,
        backwards=record.backwards + backwards * spent,
    )


def width(record: Record) -> Array:
    """The width of each example's box, (B,); of its widest feature where they differ.

    Published step sizes and radii are for the box [0, 1]: attacks take them as multiples of this.
    """
    wide = jnp.broadcast_to(record.threat.hi - record.threat.lo, record.x0.shape)
    return jnp.max(wide, axis=tuple(range(1, wide.ndim)))


def furthest(record: Record) -> Array:
    """The corner of the box furthest from the input, (B, ...)."""
    lo, hi, x0 = record.threat.lo, record.threat.hi, record.x0
    return jnp.where(x0 - lo > hi - x0, lo, hi)


def finite(values: Array) -> Array:
    """``values`` with zeros for entries that are not finite."""
    return jnp.where(jnp.isfinite(values), values, 0.0)


def into_box(record: Record, x: Array) -> Array:
    """``x`` (B, ...) clipped to the box of each example."""
    return jnp.clip(x, record.threat.lo, record.threat.hi)


def norm(values: Array, order: float) -> Array:
    """The norm of each example's entries, (B, ...) -> (B,); with derivative zero at zero."""
    size = jnp.abs(values.reshape(values.shape[0], -1))
    if order == 1:
        return jnp.sum(size, -1)
    largest = jnp.max(size, -1, initial=0.0)
    if order == np.inf:
        return largest
    # Scaled, so that no square under- or overflows.
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.sqrt(jnp.sum((size / unit[:, None]) ** 2, -1))


class MinimalNorm(GradientAttack):
    """An attack that looks for the closest adversarial point instead of the worst in a ball.

    ``result.x`` is the closest adversarial point found within ``threat.eps``, in the threat model's
    norm: ``eps`` is the largest distance that counts. The search does not heed it, so that one run
    with the whole box (``Linf(1.0)``) answers for all radii. Where nothing was found ``result.x``
    is the input. An input that is misclassified as it is ends at once, at distance 0.

    Subclasses write ``start`` and ``move`` as those of :class:`GradientAttack`, with two
    differences: the first point must be the input, and in ``move`` ``state.inner`` is a
    :class:`Search`, whose ``hit`` says whether the point is adversarial. They are ``@algorithm``
    dataclasses that may have, beside the fields ``threat``, ``steps`` and ``loss``:

    * ``keep``: ``"closest"`` runs to the end, ``"success"`` ends an example at its first success,
      as members of a sequence do;
    * ``quantize``: number of grey levels, 256 for 8-bit images. The search goes on as it is, but a
      point counts as adversarial only after rounding to the grid of levels, and is returned
      rounded: one more forward pass for each point. Features that stay at their level keep the
      input's value to the bit;
    * ``estimator``: as in :class:`GradientAttack`.
    """

    loss: losses.Loss = staticmethod(losses.margin)
    keep: str = "closest"
    quantize: int | None = None
    random_start: bool = False

    KEEPS: ClassVar[tuple[str, ...]] = ("closest", "success")
    NORMS: ClassVar[tuple[str, ...]] = ()  # the norms that the attack is defined for
    POSITIVE: ClassVar[tuple[str, ...]] = ()  # its fields that must be positive

    @property
    def schedule(self) -> tuple[int, int] | None:
        """None: examples that are misclassified as they are end at once."""
        return None

    def threats(self) -> tuple[Threat, ...]:
        """The one threat model; raises ``TypeError`` if it is none, or of another norm."""
        (threat,) = super().threats()
        if threat.norm not in self.NORMS:
            raise TypeError(
                f"{type(self).__name__} minimises {' or '.join(self.NORMS)}, got {threat!r}"
            )
        return (threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`GradientAttack.check`; also refuses a grid that the inputs are not on."""
        super().check(x, y, classes, targets)
        name = type(self).__name__
        for field in self.POSITIVE:
            value = getattr(self, field)
            if not bool(np.all(np.asarray(value) > 0)):
                raise ValueError(f"{name}.{field} must be positive, got {value}")
        if self.quantize is None:
            return
        if not isinstance(self.quantize, int) or self.quantize < 2:
            raise ValueError(
                f"{name}.quantize must be None or a number of levels from 2, got {self.quantize!r}"
            )
        check_grid(f"{name}.quantize", self.threat, x, self.quantize)

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> State:
        """See :meth:`Attack.init`."""
        state = super().init(keys, x, y, targets)
        return state._replace(inner=Search(state.record.done, state.inner))

    def exhausted(self, state: State) -> Array:
        """(B,) bool: lanes that will not move again."""
        return state.t >= self.steps

    def moving(self, state: State) -> Array:
        """See :meth:`Attack.moving`."""
        return ~state.record.done & ~self.exhausted(state)

    def _measure(self, record: Record, x: Array) -> Array:
        """What is minimised, (B,)."""
        return distance(record, x)

    def _judge(
        self, logits_fn: LogitsFn, judge: LogitsFn | None, record: Record, x: Array, logits: Array
    ) -> tuple[Array, Array, Array, Array | int]:
        """The verdict on ``x``: hit, the point and the logits it was given on, forwards spent."""
        if self.quantize is not None:
            model = logits_fn if judge is None else judge
            x = rounded(record, x, self.quantize)
            logits = forward(model, x)
            return succeeds(logits, record.y, record.target), x, logits, _passes(model)[1] or 1
        hit = succeeds(logits, record.y, record.target)
        if judge is None:
            return hit, x, logits, 0
        hit, asked = _ask(judge, record, x, hit)
        return hit, x, logits, asked

    def _advance(
        self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None, *, gradient: bool
    ) -> State:
        record, waiting = state.record, self.exhausted(state)
        sure = judge is None and self.quantize is None
        loss, logits, grad, forwards, backwards = self._look(
            logits_fn, state, gradient=gradient, sure=sure
        )
        hit, point, logits, asked = self._judge(logits_fn, judge, record, state.x, logits)
        shown = losses.ascent(self.loss, logits, record.y, record.aim)
        record = track(
            record,
            point,
            jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), shown, jnp.nan),
            hit,
            # A lane without moves left is charged the same whether or not those beside it move.
            forwards=asked + jnp.where(waiting, sum(_passes(logits_fn)), forwards),
            backwards=jnp.where(waiting, 0, backwards),
            measure=self._measure,
            on_grid=self.quantize is not None,
        )
        inner = state.inner._replace(hit=hit)
        ended = self.exhausted(state._replace(inner=inner))
        ended |= record.success & (distance(record, record.best) == 0)
        if self.stops_at_success:
            ended |= record.success
        live = ~record.done & ~ended
        record = record._replace(done=record.done | ended)
        if grad is None:
            return state._replace(record=record)
        x, own = self.move(state._replace(record=record, inner=inner), loss, grad)
        return State(
            record,
            where(live, x, state.x),
            state.t + live.astype(jnp.int32),
            where(live, Search(hit, own), state.inner),
        )


def levels_of(threat: Threat, x: Array, count: int) -> Array:
    """Where ``x`` (B, ...) is on the scale of ``count`` levels: ``lo`` at 0, ``hi`` at the last."""
    return (x - threat.lo) / (threat.hi - threat.lo) * (count - 1)


def check_grid(name: str, threat: Threat, x: Array, count: int) -> None:
    """Raise ``ValueError`` unless ``x`` (B, ...) is on the grid of ``count`` levels."""
    level = np.asarray(levels_of(threat.batched(x), x, count))
    off = float(np.max(np.abs(level - np.round(level)), initial=0.0))
    if off > 0.01:
        raise ValueError(
            f"{name}: the inputs must be on the grid of {count} levels between lo and hi, but x is "
            f"up to {off:.2g} of a level off: round it, or do without"
        )


def grid(record: Record, level: Array, count: int) -> Array:
    """The points of ``level`` (B, ...), whole numbers, on the grid; the input to the bit at its."""
    threat = record.threat
    # From a table, because XLA would divide by multiplying with the reciprocal: in the box [0, 1]
    # these are the very numbers k / 255 that images are read as.
    share = jnp.asarray(np.arange(count, dtype=np.float32) / np.float32(count - 1))
    chosen = share[jnp.clip(level, 0, count - 1).astype(jnp.int32)]
    point = into_box(record, threat.lo + chosen * (threat.hi - threat.lo))
    return jnp.where(level == jnp.round(levels_of(threat, record.x0, count)), record.x0, point)


def rounded(record: Record, x: Array, count: int) -> Array:
    """``x`` (B, ...) rounded to the nearest of ``count`` levels from ``lo`` to ``hi``."""
    return grid(record, jnp.round(levels_of(record.threat, finite(x), count)), count)
