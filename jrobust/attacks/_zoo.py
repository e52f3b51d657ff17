"""ZOO: the attack of Carlini & Wagner, coordinate by coordinate, from scores alone."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State, where
from jrobust.attacks._cw import Constant, advance, open_search
from jrobust.attacks._minimal import MinimalNorm, finite, into_box, norm, width
from jrobust.attacks._query import QueryAttack, sometimes
from jrobust.threat import Threat, expand

Array = jax.Array


class _Coordinates(NamedTuple):
    """Every lane's coordinates, and Adam's averages for each of them."""

    search: Constant
    at: Array  # (B, ...) the point that is moved
    first: Array  # (B, d)
    second: Array  # (B, d)
    moves: Array  # (B, d) int32
    i: Array  # (B,) int32 what is asked next: 0 the point, odd above a coordinate, even below
    chosen: Array  # (B, batch) int32 coordinates to move next
    hinge: Array  # (B,) the loss above the one asked about
    slopes: Array  # (B, batch) of the objective along them


@algorithm
class ZOO(QueryAttack, MinimalNorm):
    """Zeroth-order optimisation (Chen et al. 2017): the closest adversarial point, from scores.

    Minimises ``|x - x0|^2 + c max(z_y - max_{i != y} z_i, 0)`` in the box, with the binary search
    over ``c`` of :class:`CW`. An iteration draws ``batch`` coordinates, takes the difference of two
    queries along each, and moves them by a step of Adam (Kingma & Ba 2015) whose averages are each
    coordinate's own; one more query is of the point that results. That the loss is a difference of
    logits is that of log-probabilities, which is the published one.

    The distance, which is known, is not asked for. Queries stay in the box, so that a difference at
    its bound is one-sided, and every one of them that is adversarial may be the result. Left out
    are the published options for large images: tanh space, a reduced space that grows, importance
    sampling, and Newton's method, whose second differences at this distance are lost to rounding in
    float32.

    Args:
        threat: ``L2``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        queries: forward passes of an example at most. An iteration costs ``2 batch + 1``.
        steps: iterations of a round at most.
        rounds: rounds of the search over ``c``, each from the input.
        batch: coordinates of an iteration; all where there are less.
        difference: that of a query from the point, in widths of the box.
        step_size: Adam's step, in widths of the box.
        constant: the first ``c``.
        loss: what to push below zero in place of the logit difference, with its sign reversed.
        keep: see :class:`MinimalNorm`.
    """

    threat: Threat
    queries: int = static(default=1000000)
    steps: int = static(default=1000)
    rounds: int = static(default=9)
    batch: int = static(default=128)
    difference: Any = 1e-4
    step_size: Any = 0.01
    constant: Any = 0.01
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="closest")

    NORMS: ClassVar[tuple[str, ...]] = ("L2",)
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "rounds", "batch", "difference", "step_size", "constant",
    )  # fmt: skip

    def exhausted(self, state: State) -> Array:
        """See :meth:`MinimalNorm.exhausted`."""
        spent = state.t >= self.moves
        return spent | (state.inner.own.search.turn >= self.rounds)

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the search and the coordinates."""
        flat = jnp.zeros_like(record.x0).reshape(record.x0.shape[0], -1)
        slopes = flat[:, : self.batch]
        return record.x0, _Coordinates(
            search=open_search(record, self.constant),
            at=record.x0,
            first=flat,
            second=flat,
            moves=flat.astype(jnp.int32),
            i=jnp.zeros_like(record.y),
            chosen=slopes.astype(jnp.int32),
            hinge=jnp.zeros_like(record.loss),
            slopes=slopes,
        )

    def propose(self, state: State, loss: Array) -> tuple[Array, Any]:
        """The next query: above or below a coordinate, or of the point that was moved."""
        record, (hit, own) = state.record, state.inner
        count, hinge = own.slopes.shape[1], jnp.maximum(-loss, 0.0)
        landed, above, last = own.i == 0, own.i % 2 == 1, own.i == 2 * count

        # Of the point itself: the search's business.
        change = (own.at - record.x0) / expand(width(record), own.at)
        objective = norm(change, 2) ** 2 + own.search.c * hinge
        objective = jnp.where(jnp.isnan(objective), jnp.inf, objective)
        search, over = advance(own.search, hit, objective, self.steps)
        own = own._replace(search=where(landed, search, own.search))
        again = landed & over
        fresh = self.start(record)[1]._replace(search=own.search)

        # Below a coordinate: the slope along it, over the gap that box and rounding leave.
        high, low = (_beside(self, record, own, sign) for sign in (1.0, -1.0))
        gap = norm(high - low, jnp.inf) / width(record)
        slope = own.search.c * finite(own.hinge - hinge) / jnp.where(gap > 0, gap, 1.0)
        here = (jnp.arange(count)[None] == _place(own)) & ~(landed | above)[:, None]
        own = own._replace(
            hinge=jnp.where(above, hinge, own.hinge),
            slopes=jnp.where(here, slope[:, None], own.slopes),
        )

        own = sometimes(last, lambda: _moved(self, record, own), own)
        own = where(again, fresh, own._replace(i=jnp.where(last, 0, own.i + 1)))
        chosen = sometimes(
            own.i == 1, lambda: _choose(record, state.t, own.first, count), own.chosen
        )
        own = own._replace(chosen=chosen)
        beside = _beside(self, record, own, jnp.where(own.i % 2 == 1, 1.0, -1.0))
        return where(own.i > 0, beside, own.at), own


def _choose(record: Record, t: Array, like: Array, count: int) -> Array:
    """(B, count) int32: different coordinates of ``like`` (B, d), any as likely."""
    keys = _keys.fold(record.key, t + 1)
    rank = jax.vmap(lambda key: jax.random.uniform(key, like.shape[1:], like.dtype))(keys)
    return jax.lax.top_k(rank, count)[1].astype(jnp.int32)


def _place(own: _Coordinates) -> Array:
    """(B, 1) int32: which of the chosen coordinates is asked about."""
    return (jnp.maximum(own.i - 1, 0) // 2)[:, None]


def _beside(attack: ZOO, record: Record, own: _Coordinates, sign: Any) -> Array:
    """The query (B, ...) on the side ``sign`` of the coordinate that is asked about."""
    index = jnp.take_along_axis(own.chosen, _place(own), axis=1)
    one = (jnp.arange(own.first.shape[1])[None] == index).reshape(own.at.shape)
    size = expand(sign * attack.difference * width(record), own.at)
    return into_box(record, jnp.where(one, own.at + size, own.at))


def _moved(attack: ZOO, record: Record, own: _Coordinates) -> _Coordinates:
    """One step of Adam along the chosen coordinates, the ``moves``-th of each of them."""
    batch, scale = own.at.shape[0], width(record)
    rows = jnp.arange(batch)[:, None]

    def taken(values: Array) -> Array:
        return values.reshape(batch, -1)[rows, own.chosen]

    def put(values: Array, new: Array) -> Array:
        return values.reshape(batch, -1).at[rows, own.chosen].set(new).reshape(values.shape)

    slope = own.slopes + 2 * taken(own.at - record.x0) / scale[:, None]
    first = 0.9 * taken(own.first) + 0.1 * slope
    second = 0.999 * taken(own.second) + 0.001 * slope**2
    moves = taken(own.moves) + 1
    n = moves.astype(slope.dtype)
    step = first / (1 - 0.9**n) / (jnp.sqrt(second / (1 - 0.999**n)) + 1e-8)
    moved = taken(own.at) - attack.step_size * scale[:, None] * step
    return own._replace(
        at=into_box(record, put(own.at, moved)),
        first=put(own.first, first),
        second=put(own.second, second),
        moves=put(own.moves, moves),
    )


__all__ = ["ZOO"]
