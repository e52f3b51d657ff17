"""What attacks that see nothing but decisions share: one question a step, starts, bisection."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust.attacks._base import (
    LogitsFn,
    Record,
    State,
    _ask,
    _passes,
    check_labels,
    forward,
    succeeds,
    where,
)
from jrobust.attacks._minimal import MinimalNorm, Search, distance, into_box, rounded, track
from jrobust.threat import expand

Array = jax.Array

# Shares of every other blend of noise, spread evenly however many there are.
_GOLDEN = (5**0.5 - 1) / 2


class DecisionAttack(MinimalNorm):
    """A minimal-norm attack that sees of a model which logit is the highest, and nothing else.

    A step asks about one point of every example, whatever each of them is at: an example that
    halves an interval waits for none that estimates a direction. ``queries`` points are asked about
    at most, the input first. ``result.loss`` is 1 where the class is one that is looked for, else
    -1. A randomised model (:func:`jrobust.models.randomized`) is asked for its verdict: one query
    costs its ``votes`` forward passes. Works on a :class:`jrobust.drive.Host` model.

    Subclasses write ``start``, which returns the input and what they carry, and ``propose``. With
    ``quantize`` every point is rounded to the grid before it is asked about, as a model that takes
    8-bit images would; it costs no further pass.
    """

    queries: int
    starts: Any = None

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Moves from the input: one less than the queries."""
        return self.queries - 1

    @abc.abstractmethod
    def propose(self, state: State) -> tuple[Array, Any]:
        """The next point (B, ...) to ask about, and the next carry.

        ``state.x`` has been answered: ``state.inner.hit`` (B,) says whether it is in the class
        headed for, or out of the true one.
        """

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`MinimalNorm.check`; also refuses starts that are no such inputs."""
        name = type(self).__name__
        if not isinstance(self.queries, int) or self.queries < 2:
            raise ValueError(f"{name}.queries must be an int from 2, got {self.queries!r}")
        super().check(x, y, classes, targets)
        if self.starts is None:
            return
        starts, labels = map(np.asarray, self.starts)
        if starts.shape[1:] != x.shape[1:] or labels.shape != starts.shape[:1] or not labels.size:
            raise ValueError(
                f"{name}.starts must be a pair of inputs (N, ...) like x of shape {x.shape} and "
                f"labels (N,), at least one, got shapes {starts.shape} and {labels.shape}"
            )
        check_labels(f"{name}.starts[1]", labels, classes)
        lo, hi = np.min(np.asarray(self.threat.lo)), np.max(np.asarray(self.threat.hi))
        if not np.all((starts >= lo) & (starts <= hi)):
            raise ValueError(
                f"{name}.starts must lie in the box [{lo}, {hi}] as the inputs do, got values "
                f"{starts.min()} .. {starts.max()}"
            )

    def moving(self, state: State) -> Array:
        """Lanes that have not ended: a last question is a question like the others."""
        return ~state.record.done

    def close(self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None = None) -> State:
        """Nothing is left to do."""
        return state

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Any, int, int]:
        """As the parent's, without gradient; the loss is the decision."""
        logits = forward(logits_fn, x) if sure else logits_fn(x).astype(jnp.float32)
        return _read(record, logits)[0], logits, None, _passes(logits_fn)[1] or 1, 0

    def _advance(
        self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None, *, gradient: bool
    ) -> State:
        record = state.record
        loss, logits, _, passes, _ = self._evaluate(
            logits_fn, record, state.x, state.t, gradient=False, sure=judge is None
        )
        _, success, hit = _read(record, logits)
        spent: Array | int = passes
        if judge is not None:
            success, asked = _ask(judge, record, state.x, success)
            spent = passes + asked
        return _proceed(self, state, loss, success, success & hit, spent)

    def move(self, state: State, loss: Array, gradient: Any) -> tuple[Array, Any]:
        """What :meth:`propose` says, on the grid if there is one."""
        x, own = self.propose(state)
        return x if self.quantize is None else rounded(state.record, x, self.quantize), own


# Compiled on their own, because a black box is stepped from Python.
@jax.jit
def _read(record: Record, logits: Array) -> tuple[Array, Array, Array]:
    """All that is seen of logits (B, C): loss, success, and whether the search is where it aims."""
    hit = succeeds(logits, record.y, record.aim)
    loss = jnp.where(hit, 1.0, -1.0)
    loss = jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), loss, jnp.nan)
    return loss, succeeds(logits, record.y, record.target), hit


@jax.jit
def _proceed(
    attack: DecisionAttack,
    state: State,
    loss: Array,
    success: Array,
    hit: Array,
    spent: Array | int,
) -> State:
    """The state after the answer."""
    record = track(state.record, state.x, loss, success, forwards=spent, backwards=0)
    ended = attack.exhausted(state) | record.success & (distance(record, record.best) == 0)
    if attack.stops_at_success:
        ended |= record.success
    live = ~record.done & ~ended
    record = record._replace(done=record.done | ended)
    inner = state.inner._replace(hit=hit)
    x, own = attack.move(state._replace(record=record, inner=inner), loss, ())
    return State(
        record,
        where(live, x, state.x),
        state.t + live.astype(jnp.int32),
        where(live, Search(hit, own), state.inner),
    )


# ------------------------------------------------------------------------- draws and starts


def uniform(keys: Array, t: Array, like: Array) -> Array:
    """Uniform in (-1, 1) for question ``t`` (B,), (B, ...); ``like`` gives the shape."""
    open_end = float(np.nextafter(np.float32(-1), np.float32(0)))

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, like.shape[1:], like.dtype, open_end, 1.0)

    return jax.vmap(draw)(_keys.fold(keys, t))


def normal(noise: Array) -> Array:
    """Standard normal, made of :func:`uniform`."""
    return jnp.sqrt(2.0) * jax.lax.erf_inv(noise)


def ranked(record: Record, starts: Any) -> Any:
    """(B, N) int32: the starts in the order of trying them; None without any.

    Those of the class headed for, or of any but the true one, before the others, and the nearest
    first.
    """
    if starts is None:
        return None
    points, labels = (jnp.asarray(part) for part in starts)
    aim, label = record.aim[None], labels[:, None]
    wrong = jnp.where(aim >= 0, label != aim, label == record.y[None])

    def far(point: Array) -> Array:
        return distance(record, jnp.broadcast_to(point, record.x0.shape))

    return jnp.lexsort((jax.lax.map(far, points), wrong), axis=0).T.astype(jnp.int32)


def candidate(record: Record, t: Array, noise: Array, starts: Any, order: Any) -> Array:
    """Where to look for a first adversarial point, (B, ...), after question ``t`` (B,).

    At the starts in their order, then at noise uniform in the box, every other time blended with
    the input: a model may take all noise for the true class, and only the blend for another.
    """
    lo, hi, x0 = record.threat.lo, record.threat.hi, record.x0
    share = expand(jnp.where(t % 2 == 0, 1.0, t * _GOLDEN % 1.0), x0)
    x = into_box(record, x0 + share * (lo + (hi - lo) * (noise + 1) / 2 - x0))
    if order is None:
        return x
    last = order.shape[1] - 1
    place = jnp.take_along_axis(order, jnp.minimum(t, last)[:, None], 1)[:, 0]
    return where(t <= last, into_box(record, jnp.asarray(starts[0])[place]), x)


# ------------------------------------------------------------- bisection towards the boundary


class Way(NamedTuple):
    """The way from the input to an adversarial point, and what is known of it."""

    far: Array  # (B, ...) that point
    near: Array  # (B, ...) the nearest adversarial point on the way so far
    low: Array  # (B,) distance from the input that was not adversarial
    high: Array  # (B,) one that was


def no_way(record: Record) -> Way:
    """Before there is an adversarial point."""
    zero = jnp.zeros_like(record.loss)
    return Way(record.x0, record.x0, zero, zero)


def middle(low: Array, high: Array) -> Array:
    """Where to ask next."""
    return (low + high) / 2


def halve(low: Array, high: Array, hit: Array) -> tuple[Array, Array]:
    """The half that is left, as the middle was a ``hit`` (B,) or not."""
    centre = middle(low, high)
    return jnp.where(hit, low, centre), jnp.where(hit, centre, high)


def settled(low: Array, high: Array, tolerance: Array) -> Array:
    """(B,) bool: no wider than ``tolerance``, or than float32 can halve."""
    centre = middle(low, high)
    return (high - low <= tolerance) | (centre <= low) | (centre >= high)


def shorten(record: Record, way: Way, x: Array, hit: Array, begins: Array, halves: Array) -> Way:
    """The way after the answer at ``x`` (B, ...).

    It leads to ``x`` where it ``begins`` (B,); where it ``halves`` (B,), ``x`` was in its middle.
    """
    low, high = halve(way.low, way.high, hit)
    halved = Way(way.far, where(hit, x, way.near), low, high)
    begun = Way(x, x, jnp.zeros_like(low), distance(record, x))
    return where(begins, begun, where(halves, halved, way))


def along(record: Record, way: Way) -> Array:
    """The middle, (B, ...): in L2 of a segment, in Linf ``far`` brought into the ball."""
    move, radius = way.far - record.x0, expand(middle(way.low, way.high), record.x0)
    if record.threat.norm == "Linf":
        move = jnp.clip(move, -radius, radius)
    else:
        reach = expand(distance(record, way.far), move)
        move = move * (radius / jnp.where(reach > 0, reach, 1.0))
    return into_box(record, record.x0 + move)
