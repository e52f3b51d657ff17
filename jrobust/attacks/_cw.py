"""The attacks of Carlini & Wagner in L2 and Linf."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State, where
from jrobust.attacks._minimal import MinimalNorm, finite, into_box, norm, width
from jrobust.threat import Threat, expand

Array = jax.Array

# tanh covers the box up to this share of its reach, so that features on a bound have a slope.
_REACH = 0.99


class Constant(NamedTuple):
    """Every lane's search for the smallest weight of the loss that still finds something."""

    c: Array  # (B,) the weight
    lower: Array  # (B,) largest weight that found nothing
    upper: Array  # (B,) smallest weight that found something, inf while there is none
    found: Array  # (B,) bool: something in this round
    turn: Array  # (B,) int32 rounds ended
    i: Array  # (B,) int32 iterations in this round
    best: Array  # (B,) least objective in this round
    check: Array  # (B,) that at the last check for progress


def open_search(record: Record, initial: Any) -> Constant:
    """The first round of every lane."""
    zero = jnp.zeros_like(record.threat.eps)
    far, none = zero + jnp.inf, jnp.zeros_like(record.y)
    return Constant(zero + initial, zero, far, record.done, none, none, far, far)


def advance(search: Constant, hit: Array, objective: Array, steps: int) -> tuple[Constant, Array]:
    """After one iteration: the search, and (B,) bool where it begins a new round.

    A round ends after ``steps`` iterations, or where the least of the lane's own ``objective`` has
    not fallen by a ten-thousandth within a tenth of them, or within the 25 that Adam needs to turn.
    """
    found = search.found | hit
    best = jnp.minimum(search.best, objective)
    checked = search.i % max(-(-steps // 10), 25) == 0
    stuck = checked & ~(best <= 0.9999 * search.check)
    over = stuck | (search.i + 1 >= steps)
    upper = jnp.where(over & found, jnp.minimum(search.upper, search.c), search.upper)
    lower = jnp.where(over & ~found, jnp.maximum(search.lower, search.c), search.lower)
    bounded = jnp.isfinite(upper)
    middle = jnp.where(bounded, (lower + jnp.where(bounded, upper, 0.0)) / 2, 10.0 * search.c)
    return Constant(
        jnp.where(over, middle, search.c),
        lower,
        upper,
        found & ~over,
        search.turn + over.astype(jnp.int32),
        jnp.where(over, 0, search.i + 1),
        jnp.where(over, jnp.inf, best),
        jnp.where(over, jnp.inf, jnp.where(checked, best, search.check)),
    ), over


class _Adam(NamedTuple):
    """Every lane's point in tanh space, and Adam's averages there (Kingma & Ba 2015)."""

    w: Array
    first: Array
    second: Array


def _open(record: Record) -> _Adam:
    lo, hi = record.threat.lo, record.threat.hi
    share = jnp.clip((2 * record.x0 - (lo + hi)) / (hi - lo), -1.0, 1.0)
    w = jnp.arctanh(_REACH * share)
    return _Adam(w, jnp.zeros_like(w), jnp.zeros_like(w))


def _point(record: Record, w: Array) -> Array:
    lo, hi = record.threat.lo, record.threat.hi
    return into_box(record, (lo + hi) / 2 + (hi - lo) / 2 * (jnp.tanh(w) / _REACH))


def _descend(record: Record, adam: _Adam, slope: Array, i: Array, size: Any) -> _Adam:
    """One step of Adam along ``slope`` with respect to x, the ``i``-th (B,) of its round."""
    half = (record.threat.hi - record.threat.lo) / 2
    slope = slope * half * (1 - jnp.tanh(adam.w) ** 2) / _REACH
    first = 0.9 * adam.first + 0.1 * slope
    second = 0.999 * adam.second + 0.001 * slope**2
    n = (i + 1).astype(slope.dtype)
    mean, spread = first / expand(1 - 0.9**n, first), second / expand(1 - 0.999**n, second)
    size = expand(size, slope)
    most = jnp.arctanh(jnp.asarray(_REACH, slope.dtype))
    w = jnp.clip(adam.w - size * mean / (jnp.sqrt(spread) + 1e-8), -most, most)
    return _Adam(w, first, second)


@algorithm
class CW(MinimalNorm):
    """The L2 attack of Carlini & Wagner (2017, section VI-A).

    Minimises ``|x - x0|^2 + c max(z_y - max_{i != y} z_i, 0)`` with Adam over ``w``, where ``x`` is
    ``tanh(w)`` scaled to the box, in rounds: a binary search over ``c``, multiplied by ten while
    nothing is found. A round also ends where the example's own objective has stopped falling; the
    released attack asks that of the batch, whose members then change each other's results.

    The box is reached at ``|tanh(w)| = 0.99`` in place of 1, and ``w`` is kept within: features on
    a bound of the box have a slope there and can move, while in the released attack and those made
    from it they are stuck. Distances count in widths of the box, so that ``c`` does too.

    Args:
        threat: ``L2``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        steps: iterations of a round at most, one gradient each.
        rounds: rounds of the search over ``c``, each from the input.
        step_size: Adam's step.
        constant: the first ``c``.
        loss: what to push below zero in place of the logit difference, with its sign reversed.
        keep, quantize, estimator: see :class:`MinimalNorm`.
    """

    threat: Threat
    steps: int = static(default=10000)
    rounds: int = static(default=9)
    step_size: Any = 0.01
    constant: Any = 1e-3
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("L2",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("rounds", "step_size", "constant")

    def exhausted(self, state: State) -> Array:
        """See :meth:`MinimalNorm.exhausted`."""
        return state.inner.own[0].turn >= self.rounds

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the search and the optimiser."""
        return record.x0, (open_search(record, self.constant), _open(record))

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """One step of Adam, or the start of another round."""
        record, (hit, (search, adam)) = state.record, state.inner
        scale = width(record)
        change = (state.x - record.x0) / expand(scale, state.x)
        objective = norm(change, 2) ** 2 + search.c * jnp.maximum(-loss, 0.0)
        push = expand(jnp.where(loss < 0, search.c, 0.0), change) * finite(gradient)
        slope = 2 * change / expand(scale, change) - push
        adam = _descend(record, adam, slope, search.i, self.step_size)
        search, over = advance(search, hit, objective, self.steps)
        x = where(over, record.x0, _point(record, adam.w))
        return x, (search, where(over, _open(record), adam))


class _Reach(NamedTuple):
    """The bound of every lane that its changes are pressed below."""

    tau: Array  # (B,) the bound, in widths of the box
    c: Array  # (B,) weight of the loss
    nearest: Array  # (B,) distance of the closest hit so far, in widths
    nearer: Array  # (B,) bool: a closer one in this round
    i: Array  # (B,) int32 iterations in this round


@algorithm
class CWLinf(MinimalNorm):
    """The Linf attack of Carlini & Wagner (2017, section VI-C).

    Minimises ``sum max(|x - x0| - tau, 0) + c max(z_y - max_{i != y} z_i, 0)`` with Adam in tanh
    space, see :class:`CW`, in rounds that each start where the last one ended. After a round that
    found a closer adversarial point ``tau`` becomes ``decrease_factor`` of its distance, after any
    other ``c`` is doubled; a round also ends once the objective is below ``c / 10000``.

    Args:
        threat: ``Linf``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        steps: iterations of a round at most, one gradient each.
        step_size: Adam's step.
        constant: the first ``c``.
        largest_constant: beyond this ``c`` the example ends.
        smallest_tau: below this ``tau``, in widths of the box, the example ends.
        decrease_factor: below 1; a larger one comes closer, in more rounds.
        loss, keep, quantize, estimator: as in :class:`CW`.
    """

    threat: Threat
    steps: int = static(default=1000)
    step_size: Any = 5e-3
    constant: Any = 1e-5
    largest_constant: Any = 20.0
    smallest_tau: Any = 1 / 256
    decrease_factor: Any = 0.9
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("Linf",)
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "step_size", "constant", "largest_constant", "smallest_tau", "decrease_factor",
    )  # fmt: skip

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`MinimalNorm.check`; also refuses a bound that would not fall."""
        super().check(x, y, classes, targets)
        if not bool(np.all(np.asarray(self.decrease_factor) < 1)):
            raise ValueError(f"CWLinf.decrease_factor must be below 1, got {self.decrease_factor}")

    def exhausted(self, state: State) -> Array:
        """See :meth:`MinimalNorm.exhausted`."""
        reach = state.inner.own[0]
        return (reach.tau < self.smallest_tau) | (reach.c > self.largest_constant)

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the bound and the optimiser."""
        one = jnp.ones_like(record.threat.eps)
        reach = _Reach(one, self.constant * one, one, record.done, jnp.zeros_like(record.y))
        return record.x0, (reach, _open(record))

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """One step of Adam, and perhaps another bound or weight."""
        record, (hit, (reach, adam)) = state.record, state.inner
        change = (state.x - record.x0) / expand(width(record), state.x)
        size = jnp.abs(change)
        excess = jnp.maximum(size - expand(reach.tau, size), 0.0)
        objective = norm(excess, 1) + reach.c * jnp.maximum(-loss, 0.0)
        push = expand(jnp.where(loss < 0, reach.c, 0.0), change) * finite(gradient)
        slope = jnp.where(excess > 0, jnp.sign(change), 0.0) / expand(width(record), change) - push
        adam = _descend(record, adam, slope, reach.i, self.step_size)

        here = norm(size, jnp.inf)
        closer = hit & (here < reach.nearest)
        nearest = jnp.where(closer, here, reach.nearest)
        nearer = reach.nearer | closer
        over = (objective < 1e-4 * reach.c) | (reach.i + 1 >= self.steps)
        reach = _Reach(
            jnp.where(
                over & nearer, self.decrease_factor * jnp.minimum(reach.tau, nearest), reach.tau
            ),
            jnp.where(over & ~nearer, 2.0 * reach.c, reach.c),
            nearest,
            nearer & ~over,
            jnp.where(over, 0, reach.i + 1),
        )
        fresh = adam._replace(first=jnp.zeros_like(adam.w), second=jnp.zeros_like(adam.w))
        return _point(record, adam.w), (reach, where(over, fresh, adam))
