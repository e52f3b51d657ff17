"""JSMA: a few features, one pair after the other, chosen by the saliency map of the logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive, losses
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import (
    _DRAWS,
    GradientAttack,
    LogitsFn,
    Record,
    State,
    _passes,
    forward,
    where,
)
from jrobust.attacks._minimal import finite, into_box
from jrobust.models import Randomized
from jrobust.threat import L0, Threat

Array = jax.Array

_BLOCK = 8  # features whose partners are looked at together


@algorithm
class JSMA(GradientAttack):
    """Jacobian-based saliency map attack (Papernot et al. 2016): few features, far.

    Every move raises the two features ``p``, ``q`` that maximise ``-alpha beta``, where ``alpha``
    is what they add to the target's logit to first order and ``beta`` what they add to the sum of
    the others', among the pairs with ``alpha > 0 > beta``. Features without room in the box are no
    longer looked at. The example ends at its first success, with its budget, or where no pair is
    left.

    Untargeted it is the maximal attack M-JSMA (Wiyatno & Xu 2018): of all classes, whose logit is
    to grow, and of the true one, whose logit is to fall, and of both directions, raising and
    lowering, the one of highest saliency, anew at each move. A feature that was raised is not
    lowered again, nor the other way round. ``maximal=False`` is their NT-JSMA instead: only the
    true class, only the direction of ``theta``.

    The best pair is found exactly without a table of all pairs, which for images has thousands of
    millions of entries: memory grows with the number of features alone.

    Args:
        threat: ``L0``; a move spends two of its ``eps`` features (one without ``pairs``), so that
            there are ``eps // 2`` moves at most. The largest share of the features, which other
            implementations take as gamma, is ``L0(int(gamma * size), pixels=False)``. With
            ``pixels=True`` every feature is charged as a pixel of its own.
        theta: change of a feature in a move as a share of the width of its box, in [-1, 1];
            negative lowers. With 1 a feature goes to its bound at once.
        pairs: whether a move changes two features, as in the paper, or the single one of highest
            saliency.
        maximal: what an untargeted attack does, see above.
        steps: moves at most, whatever ``eps`` allows.

    A move costs a forward pass and two backward passes, in M-JSMA one for each class and one more.
    """

    threat: Threat
    theta: Any = 1.0
    pairs: bool = static(default=True)
    maximal: bool = static(default=True)
    steps: int = static(default=1000)

    loss = staticmethod(losses.margin)
    random_start = False

    def threats(self) -> tuple[Threat, ...]:
        """The one threat model; raises ``TypeError`` unless it counts locations."""
        (threat,) = super().threats()
        if not isinstance(threat, L0):
            raise TypeError(f"JSMA changes a number of features, so it takes L0, got {threat!r}")
        return (threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses changes that are none, or leave the box."""
        super().check(x, y, classes, targets)
        theta = np.asarray(self.theta)
        if not np.all((np.abs(theta) <= 1) & (theta != 0)):
            raise ValueError(
                "JSMA.theta is a share of the width of the box in [-1, 1] and not 0, got "
                f"{self.theta}"
            )

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> State:
        """See :meth:`Attack.init`; counts so that the budget's last move is move ``steps``."""
        state = super().init(keys, x, y, targets)
        budget = jnp.floor(state.record.threat.eps).astype(jnp.int32) // (1 + self.pairs)
        return state._replace(t=self.steps - jnp.clip(budget, 0, self.steps))

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries whether no feature is left."""
        return record.x0, record.done

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Array | None, int, Any]:
        """As the parent's; but the gradient is the direction of the move, 1, -1 or 0."""
        if not gradient:
            return super()._evaluate(logits_fn, record, x, t, gradient=False, sure=sure)
        if drive.is_host(logits_fn):
            raise TypeError(
                "JSMA needs gradients, which a Host model does not give: use a query attack"
            )
        samples, votes = _passes(logits_fn)

        def model(x: Array) -> Array:
            if isinstance(logits_fn, Randomized):
                draws = logits_fn.draws(_keys.fold(record.key, t + _DRAWS), x)
                return jnp.mean(draws.astype(jnp.float32), 0)
            return forward(logits_fn, x) if sure else logits_fn(x).astype(jnp.float32)

        logits, pull = jax.vjp(model, x)
        shown = forward(logits_fn, x) if isinstance(logits_fn, Randomized) else logits
        loss = losses.ascent(self.loss, logits, record.y, record.aim)
        classes, free = logits.shape[-1], record.aim < 0
        total = finite(pull(jnp.ones_like(logits))[0])

        def look(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            label = jnp.where(free, (record.y + i) % classes, record.aim)
            (slope,) = pull(jax.nn.one_hot(label, classes, dtype=logits.dtype))
            rise = finite(slope), total - finite(slope)
            # The true class is to fall.
            fall = -rise[0], -rise[1]
            value, move = self._search(record, x, *where(free & (i == 0), fall, rise))
            return where(value > best[0], (value, move), best)

        none = (jnp.full_like(loss, -jnp.inf), jnp.zeros_like(x))
        # One class after the other: the gradients of all together might not fit in memory.
        rounds = jnp.where(jnp.any(free), classes, 1) if self.maximal else 1
        move = jax.lax.fori_loop(0, rounds, look, none)[1]
        looked = jnp.where(free, classes, 1) if self.maximal else 1
        return loss, shown, move, samples + votes, samples * (looked + 1)

    def _search(self, record: Record, x: Array, alpha: Array, beta: Array) -> tuple[Array, Array]:
        """The logarithm of the highest saliency (B,), -inf if none, and its move (B, ...)."""
        lo, hi = record.threat._bounds(x)
        room = jnp.stack([(x < hi) & (x >= record.x0), (x > lo) & (x <= record.x0)])
        signs = jnp.asarray([1.0, -1.0], x.dtype)
        allowed = (signs == jnp.sign(jnp.asarray(self.theta, x.dtype)))[:, None]
        if self.maximal:
            allowed = allowed | (record.aim < 0)[None]
        room &= allowed.reshape(allowed.shape + (1,) * (x.ndim - 1))
        sign = signs.reshape((2,) + (1,) * x.ndim)
        # Directions as if they were further examples.
        gain, cost = (
            jnp.where(room, sign * v, -jnp.inf).reshape(2 * x.shape[0], -1)
            for v in (alpha[None], -beta[None])
        )
        value, chosen = jax.vmap(best_pair if self.pairs else best_single)(gain, cost)
        value, move = value.reshape(room.shape[:2]), sign * chosen.reshape(room.shape)
        return where(value[1] > value[0], (value[1], move[1]), (value[0], move[0]))

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """The chosen features, ``theta`` of the width further."""
        threat = state.record.threat
        step = jnp.abs(self.theta) * (threat.hi - threat.lo) * gradient
        stuck = jnp.all(gradient == 0, axis=tuple(range(1, gradient.ndim)))
        return into_box(state.record, state.x + step), stuck

    def _advance(
        self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None, *, gradient: bool
    ) -> State:
        """As the parent's; a lane without a move ends, its point being evaluated."""
        new = super()._advance(logits_fn, state, judge, gradient=gradient)
        return new._replace(record=new.record._replace(done=new.record.done | new.inner))


def _scaled(values: Array) -> tuple[Array, Array]:
    """``values`` (d,), the largest between 1 and 2, and the logarithm of the divisor; -inf stays.

    The divisor is a power of two: another one would round, and sums that nearly cancel show it.
    """
    largest = jnp.max(jnp.where(jnp.isfinite(values), jnp.abs(values), 0.0), initial=0.0)
    exponent = jnp.frexp(largest)[1] - 1
    return jnp.ldexp(values, -exponent), exponent * jnp.log(2.0).astype(values.dtype)


def best_single(gain: Array, cost: Array) -> tuple[Array, Array]:
    """The feature of highest ``gain * cost``, both positive; as :func:`best_pair`."""
    (a, up), (c, down) = _scaled(gain), _scaled(cost)
    value = jnp.where((a > 0) & (c > 0), a * c, 0.0)
    chosen = (jnp.arange(a.size) == jnp.argmax(value)) & (jnp.max(value) > 0)
    return _log(jnp.max(value)) + up + down, chosen.astype(gain.dtype)


def best_pair(gain: Array, cost: Array) -> tuple[Array, Array]:
    """The pair of features with the highest product of its two sums, both positive.

    Exact, in the memory of a few vectors. The product never falls when a feature is replaced by one
    that surpasses it, in gain and in cost; so some best pair has a member that no feature surpasses
    (if one surpasses both members, put it in the place of either). Those are few unless gains and
    costs are opposed, and each is tried with all others, some at a time.

    Args:
        gain, cost: (d,) float32; -inf where the feature may not be chosen.

    Returns:
        The logarithm of the product, -inf if no pair has one, and (d,) float32, 1 at the two
        features, 0 elsewhere.
    """
    (a, up), (c, down) = _scaled(gain), _scaled(cost)
    size = a.size
    a, c, place = jax.lax.sort((-a, -c, jnp.arange(size)), num_keys=2)
    a, c = -a, -c
    # All before have as much gain or more.
    low = jnp.full_like(c, -jnp.inf, shape=(1,))
    kept = c > jnp.concatenate([low, jax.lax.cummax(c)[:-1]])
    order = jnp.argsort(~kept, stable=True)
    a, c, place = a[order], c[order], place[order]
    block = min(_BLOCK, size)

    def look(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rows = jnp.minimum(i * block, size - block) + jnp.arange(block)
        sums = a[rows][:, None] + a[None], c[rows][:, None] + c[None]
        fits = (sums[0] > 0) & (sums[1] > 0) & (rows[:, None] != jnp.arange(size)[None])
        values = jnp.where(fits, sums[0] * sums[1], 0.0).ravel()
        at = jnp.argmax(values)
        found = values[at], rows[at // size], at % size
        return jax.tree.map(functools.partial(jnp.where, found[0] > best[0]), found, best)

    zero = jnp.zeros_like(place[0])
    blocks = (jnp.sum(kept) + block - 1) // block
    value, p, q = jax.lax.fori_loop(0, blocks, look, (jnp.zeros_like(a[0]), zero, zero))
    at = jnp.arange(size)
    chosen = ((at == place[p]) | (at == place[q])) & (value > 0)
    return _log(value) + up + down, chosen.astype(gain.dtype)


def _log(value: Array) -> Array:
    return jnp.where(value > 0, jnp.log(jnp.where(value > 0, value, 1.0)), -jnp.inf)


__all__ = ["JSMA", "best_pair", "best_single"]
