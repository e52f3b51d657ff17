"""Auto-PGD: projected gradient ascent that chooses its step sizes by itself."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import GradientAttack, Record, State, where
from jrobust.threat import L1, L2, Linf, Threat, expand

Array = jax.Array

_MOMENTUM = 0.75  # share of the new step in a move; the rest repeats the last move


class _Climb(NamedTuple):
    """What both forms carry: the step and the highest point so far, all per example."""

    size: Array  # (B,) length of the next step
    best: Array  # (B, ...) the point of highest loss
    slope: Array  # (B, ...) the gradient there, so that a restart costs no evaluation
    top: Array  # (B,) the loss there

    def saw(self, x: Array, loss: Array, gradient: Array, anew: Array | bool = False) -> _Climb:
        """With a point taken into account, as the first one where ``anew``."""
        top = jnp.where(anew, -jnp.inf, self.top)
        new = self._replace(best=x, slope=gradient, top=loss)
        return where(anew | (loss > top), new._replace(top=jnp.fmax(loss, top)), self)


class _Oscillation(NamedTuple):
    """What the step size of Linf and L2 depends on."""

    climb: _Climb
    previous: Array  # (B, ...) the point before the current one, for the momentum
    last: Array  # (B,) the loss of the point before
    rises: Array  # (B,) int32 moves of this window that raised the loss
    checked: Array  # (B,) the highest loss at the last checkpoint
    halved: Array  # (B,) bool, whether the step was halved there


class _Sparsity(NamedTuple):
    """What the step of L1 depends on."""

    climb: _Climb
    kept: Array  # (B,) number of features that a step moves
    changed: Array  # (B,) number of features changed by the best point of the last checkpoint


def _checkpoints(steps: int) -> dict[int, int]:
    """The moves after which the step size is reconsidered, and how many moves each looks back.

    By the integers of the released code, which for some numbers of steps differ from the
    percentages in the paper.
    """
    window, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, after = {}, window
    while after <= steps:
        found[after] = window
        window = max(window - shrink, least)
        after += window
    return found


def _phases(steps: int) -> list[tuple[int, int]]:
    """(radius in multiples of eps, moves) of the phases of L1: 30, 30 and 40 of a hundred moves."""
    early = 3 * steps // 10
    return [(3, early), (2, early), (1, steps - 2 * early)] if early else [(1, steps)]


class _Schedule(NamedTuple):
    """The phases of L1 by the number of moves made before: (moves + 1,) each."""

    begins: np.ndarray  # bool: the point is the first of its phase
    ends: np.ndarray  # bool: the point is the last of its phase, and another phase follows
    checks: np.ndarray  # bool: sparsity and step size are reconsidered
    radius: np.ndarray  # the next point's ball, in multiples of eps
    counts: np.ndarray  # bool: the point is in the last phase

    @classmethod
    def of(cls, steps: int) -> _Schedule:
        rows = []
        phases = _phases(steps)
        for number, (radius, moves) in enumerate(phases):
            last, every = number + 1 == len(phases), max(int(0.04 * moves), 1)
            for i in range(moves + 1):
                ends = i == moves and not last
                following = phases[number + 1][0] if ends else radius
                rows.append((i == 0, ends, i > 0 and i % every == 0, following, last))
        return cls(*map(np.array, zip(*rows)))


def _at(table: np.ndarray, t: Array) -> Array:
    return jnp.asarray(table)[t]


@algorithm
class APGD(GradientAttack):
    """Auto-PGD (Croce & Hein 2020, algorithm 1; in L1 Croce & Hein 2021). No step size to choose.

    Linf and L2: steps of ``2 eps`` with momentum. At fixed checkpoints a lane whose loss rose in
    too few of the moves since the last one, or not at all beyond its best, halves its step and goes
    on from its point of highest loss. L1: sparse sign steps onto the exact intersection of ball
    and box, in three phases of radius ``3 eps``, ``2 eps`` and ``eps``; how many features move
    follows from how many the best point changed. Only points of the last phase can succeed.

    The released code compares the first move's loss with zero, because it does not store that of
    the start. Here it is compared with the start's; robust accuracies are the same.

    Args:
        threat: the ball and box to stay in: ``Linf``, ``L2`` or ``L1``.
        steps: moves from the start; costs ``steps`` gradients and ``steps + 1`` forward passes, in
            L1 two more of each for the first points of the later phases (from 4 steps on).
        loss: what to ascend, as in :class:`PGD`. AutoAttack uses ``losses.cross_entropy``,
            ``losses.dlr`` and, within :func:`multi_targeted`, ``losses.dlr_targeted``.
        rho: share of a window's moves that must raise the loss for the step to stay. Not in L1.
        keep: ``"success"``: the first success ends the example; ``"loss"``: the highest loss.
        estimator: gradient estimator of ``jrobust.zeroth_order`` in place of autodiff.
    """

    threat: Threat
    steps: int = static(default=100)
    loss: losses.Loss = static(default=losses.cross_entropy)
    rho: Any = 0.75
    keep: str = static(default="success")
    estimator: Any = None

    KEEPS: ClassVar[tuple[str, ...]] = ("success", "loss")

    def threats(self) -> tuple[Threat, ...]:
        """See :meth:`GradientAttack.threats`; raises ``TypeError`` for other norms, such as L0."""
        (threat,) = super().threats()
        if not isinstance(threat, (Linf, L2, L1)):
            raise TypeError(f"APGD is defined for Linf, L2 and L1, got {threat!r}: use PGD")
        return (threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses a ``rho`` outside of [0, 1]."""
        super().check(x, y, classes, targets)
        if not bool(np.all((np.asarray(self.rho) >= 0) & (np.asarray(self.rho) <= 1))):
            raise ValueError(f"APGD.rho is a share of moves in [0, 1], got {self.rho}")

    @property
    def moves(self) -> int:
        """``steps``, and in L1 those from one phase to the next."""
        return self.steps + (len(_phases(self.steps)) - 1) * isinstance(self.threat, L1)

    def admits(self, state: State) -> Array | bool:
        """In L1 the points of the last phase."""
        if not isinstance(self.threat, L1):
            return True
        return _at(_Schedule.of(self.steps).counts, state.t)

    def start(self, record: Record) -> tuple[Array, Any]:
        """A random point: on the ball's boundary, before the box; in L1 of the largest ball."""
        x0, threat = record.x0, record.threat

        def draw(key: Array) -> Array:
            if isinstance(threat, Linf):
                return jax.random.uniform(key, x0.shape[1:], x0.dtype, -1.0, 1.0)
            return jax.random.normal(key, x0.shape[1:], x0.dtype)

        noise = jax.vmap(draw)(_keys.fold(record.key, 0))
        zero = jnp.zeros_like(record.loss)
        climb = _Climb(zero, x0, jnp.zeros_like(x0), zero - jnp.inf)
        if isinstance(threat, L1):
            ball = dataclasses.replace(threat, eps=_phases(self.steps)[0][0] * threat.eps)
            x = ball.project(x0 + (threat.hi - threat.lo) * noise, x0)
            return x, _Sparsity(climb, zero, zero)
        length = expand(threat.distance(noise, jnp.zeros_like(noise)), noise)
        x = threat.project(x0 + expand(threat.eps, x0) * noise / length, x0)
        return x, _Oscillation(
            climb._replace(size=2.0 * threat.eps),
            previous=x,
            last=zero + jnp.inf,
            rises=jnp.zeros_like(record.y),
            checked=zero - jnp.inf,
            halved=jnp.ones_like(record.done),
        )

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """The step sizes reconsidered, then one projected step."""
        move = self._sparse if isinstance(self.threat, L1) else self._dense
        return move(state, loss, gradient)

    def _dense(self, state: State, loss: Array, gradient: Array) -> tuple[Array, _Oscillation]:
        record, old = state.record, state.inner
        x0, ball = record.x0, record.threat
        climb = old.climb.saw(state.x, loss, gradient)
        rises = old.rises + (loss > old.last)

        windows = _checkpoints(self.steps)
        table = np.array([windows.get(after, 0) for after in range(self.steps + 1)], np.int32)
        window = _at(table, state.t)
        check = window > 0
        stuck = ~old.halved & (old.checked >= climb.top)
        halve = check & ((rises <= self.rho * window) | stuck)
        climb = climb._replace(size=jnp.where(halve, climb.size / 2, climb.size))
        # The last move's beginning stays what it was: the first momentum after a return to the
        # best point leads from there.
        x, gradient = where(halve, (climb.best, climb.slope), (state.x, gradient))

        ahead = ball.ascend(x, x0, gradient, climb.size)
        share = expand(jnp.where(state.t > 0, _MOMENTUM, 1.0), x)
        proposed = x + share * (ahead - x) + (1 - share) * (x - old.previous)
        return ball.project(proposed, x0), _Oscillation(
            climb,
            previous=x,
            last=loss,
            rises=jnp.where(check, 0, rises),
            checked=jnp.where(check, climb.top, old.checked),
            halved=jnp.where(check, halve, old.halved),
        )

    def _sparse(self, state: State, loss: Array, gradient: Array) -> tuple[Array, _Sparsity]:
        record, old = state.record, state.inner
        x0, eps = record.x0, record.threat.eps
        schedule = _Schedule.of(self.steps)
        begins, ends, checks = (_at(table, state.t) for table in schedule[:3])
        radius = _at(schedule.radius, state.t) * eps
        climb = old.climb.saw(state.x, loss, gradient, anew=begins)

        features = tuple(range(1, x0.ndim))
        changed = jnp.sum(climb.best != x0, features).astype(x0.dtype)
        kept, before = where(begins | checks, (changed / 1.5, changed), (old.kept, old.changed))
        sparser = checks & (changed < 0.95 * old.changed)
        smaller = jnp.maximum(climb.size / 1.5, radius / 10)
        size = jnp.where(checks, smaller, climb.size)
        size = jnp.where(begins | sparser, radius, size)
        x, gradient = where(sparser, (climb.best, climb.slope), (state.x, gradient))

        ball = dataclasses.replace(record.threat, eps=radius)
        density = jnp.ceil(kept) / np.prod(x0.shape[1:])
        stepped = x + expand(size, x) * ball.steepest(gradient, density)
        x = ball.project(where(ends, climb.best, stepped), x0)
        return x, _Sparsity(climb._replace(size=size), kept, before)
