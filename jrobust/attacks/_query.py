"""What attacks share that are given the scores of a model, and no gradient."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust.attacks._base import GradientAttack, LogitsFn, Record, State, where
from jrobust.attacks._minimal import finite
from jrobust.threat import Threat, expand

Array = jax.Array
Tree = TypeVar("Tree")


class QueryAttack(GradientAttack):
    """An attack that asks for the logits of one point of each example in a step, and no more.

    So a query is a step, and an example never costs more than ``queries`` of them: of a randomised
    model more passes, see :class:`jrobust.models.Randomized`. Subclasses write ``start`` as those
    of :class:`GradientAttack`, and ``propose`` in place of ``move``. They are ``@algorithm``
    dataclasses with the fields ``threat``, ``queries`` and ``loss``. Work on a
    :class:`jrobust.drive.Host` model.
    """

    queries: int

    NORMS: ClassVar[tuple[str, ...]] = ("Linf", "L2")  # the norms that the attack is defined for
    POSITIVE: ClassVar[tuple[str, ...]] = ()  # its fields that must be positive, or None

    @abc.abstractmethod
    def propose(self, state: State, loss: Array) -> tuple[Array, Any]:
        """The next point and carry, from the loss (B,) at ``state.x``; NaN if it is none."""

    @property
    def steps(self) -> int:  # type: ignore[override]
        """The queries."""
        return self.queries

    @property
    def moves(self) -> int:
        """From the first query to the last."""
        return self.queries - 1

    def threats(self) -> tuple[Threat, ...]:
        """The one threat model; raises ``TypeError`` if it is none, or of another norm."""
        (threat,) = super().threats()
        if threat.norm not in self.NORMS:
            raise TypeError(
                f"{type(self).__name__} is defined in {', '.join(self.NORMS)}, got {threat!r}"
            )
        return (threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`GradientAttack.check`; also refuses what must be positive and is not."""
        name = type(self).__name__
        if not isinstance(self.queries, int) or self.queries < 1:
            raise ValueError(f"{name}.queries must be a positive int, got {self.queries!r}")
        super().check(x, y, classes, targets)
        for field in self.POSITIVE:
            value = getattr(self, field)
            if value is not None and not bool(np.all(np.asarray(value) > 0)):
                raise ValueError(f"{name}.{field} must be positive, got {value}")

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Any, Any, Any]:
        """As the parent's, without gradient."""
        loss, logits, _, forwards, _ = super()._evaluate(
            logits_fn, record, x, t, gradient=False, sure=sure
        )
        return loss, logits, () if gradient else None, forwards, 0

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """See :meth:`propose`."""
        return _proposed(self, state, loss)


# Compiled on its own, because a black box is stepped from Python.
@jax.jit
def _proposed(attack: QueryAttack, state: State, loss: Array) -> tuple[Array, Any]:
    return attack.propose(state, jnp.where(jnp.isfinite(loss), loss, jnp.nan))


def sometimes(mask: Array, new: Callable[[], Tree], old: Tree) -> Tree:
    """Rows of ``new()``, which is made if there are any, where ``mask`` (B,), else of ``old``."""
    return jax.lax.cond(jnp.any(mask), lambda: where(mask, new(), old), lambda: old)


class Climb(NamedTuple):
    """What an attack on differences carries in ``State.inner``."""

    at: Array  # (B, ...) the point that is moved
    i: Array  # (B,) int32 what is asked next: 0 the point itself, odd beside it, even across
    noise: Array  # (B, ...) the direction of the differences
    plus: Array  # (B,) loss on its one side
    total: Array  # (B, ...) sum of the differences so far, times their directions
    own: Any  # what the algorithm itself carries


class DifferenceAttack(QueryAttack):
    """An attack that moves along a gradient estimated from antithetic pairs of queries.

    A move costs ``2 samples + 1`` queries: pairs on either side of the point along ``samples``
    random directions, and one for the point they lead to, which alone may be returned. Where the
    budget does not suffice for as many pairs, the last move is made from those that it leaves room
    for; one or two queries that suffice for none are not made. The first query is of the input.

    Points beside the input are not kept in its box, as in the published attacks. A pair with logits
    that are not finite counts for nothing.

    Subclasses write ``open``, ``probe`` and ``climb``, and may change ``shape`` and ``draw``.
    """

    samples: int

    def shape(self, x0: Array) -> tuple[int, ...]:
        """The shape of directions: that of the inputs (B, ...)."""
        return x0.shape

    def draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        """The random direction of an example."""
        return jax.random.normal(key, shape, jnp.float32)

    @abc.abstractmethod
    def open(self, record: Record) -> Any:
        """What the algorithm carries at first."""

    @abc.abstractmethod
    def probe(self, record: Record, own: Any, noise: Array, sign: Array) -> Array:
        """(B, ...): from the point to the query on its side ``sign`` (B,), along ``noise``."""

    @abc.abstractmethod
    def climb(self, record: Record, at: Array, total: Array, pairs: Array, own: Any) -> Any:
        """The next point, and the next carry, from the ``total`` over ``pairs`` (B,) of them."""

    @property
    def moves(self) -> int:
        """From the first query to the last."""
        moves, left = divmod(self.queries - 1, 2 * self.samples + 1)
        last = (left - 1) // 2  # pairs
        return moves * (2 * self.samples + 1) + (2 * last + 1 if last > 0 else 0)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`QueryAttack.check`; also refuses numbers of pairs that are none."""
        super().check(x, y, classes, targets)
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(
                f"{type(self).__name__}.samples must be a positive int, got {self.samples!r}"
            )

    def admits(self, state: State) -> Array:
        """Whether the point is no mere probe."""
        return state.inner.i == 0

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input."""
        still = jnp.zeros_like(record.x0, shape=self.shape(record.x0))
        zero = jnp.zeros_like(record.y)
        return record.x0, Climb(
            record.x0, zero, still, jnp.zeros_like(record.loss), still, self.open(record)
        )

    def propose(self, state: State, loss: Array) -> tuple[Array, Any]:
        """The next of a pair, or the point where they lead."""
        record, (at, i, noise, plus, total, own) = state.record, state.inner
        across = (i > 0) & (i % 2 == 0)
        total += expand(jnp.where(across, finite(plus - loss), 0.0), total) * noise
        plus = jnp.where(i % 2 == 1, loss, plus)

        # The last query is of a point, from however many pairs.
        over = across & ((i == 2 * self.samples) | (state.t + 1 == self.moves))
        pairs = jnp.maximum(i // 2, 1)
        at, own = sometimes(over, lambda: self.climb(record, at, total, pairs, own), (at, own))
        total = where(over, jnp.zeros_like(total), total)

        i = jnp.where(over, 0, i + 1)
        keys, shape, first = _keys.fold(record.key, state.t + 1), noise.shape[1:], i % 2 == 1
        noise = sometimes(first, lambda: jax.vmap(lambda k: self.draw(k, shape))(keys), noise)
        beside = at + self.probe(record, own, noise, jnp.where(first, 1.0, -1.0))
        return where(i > 0, beside, at), Climb(at, i, noise, plus, total, own)


__all__ = ["Climb", "DifferenceAttack", "QueryAttack", "sometimes"]
