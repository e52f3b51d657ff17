"""NES and SPSA: descent along gradients estimated from pairs of scores."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record
from jrobust.attacks._minimal import width
from jrobust.attacks._query import DifferenceAttack
from jrobust.threat import Threat, expand

Array = jax.Array


class _Estimated(DifferenceAttack):
    """The gradient ``1/n sum (L(x + sigma u) - L(x - sigma u)) / (2 sigma) u`` over n directions.

    Lengths count in widths of the box, so the gradient is that with respect to ``x`` over them.
    """

    sigma: Any

    def probe(self, record: Record, own: Any, noise: Array, sign: Array) -> Array:
        """``sigma u``."""
        return expand(sign * self.sigma * width(record), noise) * noise

    def gradient(self, total: Array, pairs: Array) -> Array:
        """The estimate (B, ...)."""
        return total / expand(2 * self.sigma * pairs.astype(total.dtype), total)


@algorithm
class NES(_Estimated):
    """The query-limited attack of Ilyas et al. (2018): natural evolution strategies.

    Steepest ascent from the input along a moving average of gradients, each estimated from
    antithetic Gaussian directions. The estimator is ``zeroth_order.RGE(sigma, samples,
    antithetic=True)``'s; ``PGD(estimator=...)`` is this attack without the average and the budget.
    In Linf as published; in L2 as the baseline of Ilyas et al. (2019), with normalised steps.

    The average is the released code's. Its step size, which is halved where the loss has risen over
    five moves, is not: of an untargeted attack that halves it for succeeding.

    The first query is of the input; a move costs ``2 samples + 1``, of which the last, of the point
    it leads to, may succeed. The last move makes do with the pairs that the budget leaves room for.
    Queries beside a point are not kept in the box.

    Args:
        threat: the ball and box to stay in; Linf or L2.
        queries: forward passes of an example at most, those for the verdicts included.
        samples: directions of an estimate, two queries each: published are 50 queries.
        sigma: length of the difference in each feature, in widths of the box.
        rel_step_size: length of a move in multiples of ``eps``; published is 0.01 at ``eps`` 0.05.
        momentum: weight of the gradients before in the moving average, below 1.
        loss: what to ascend, as in :class:`PGD`.
    """

    threat: Threat
    queries: int = static(default=10000)
    samples: int = static(default=25)
    sigma: Any = 1e-3
    rel_step_size: Any = 0.2
    momentum: Any = 0.9
    loss: losses.Loss = static(default=losses.cross_entropy)

    POSITIVE: ClassVar[tuple[str, ...]] = ("sigma", "rel_step_size")

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses averages that are none."""
        super().check(x, y, classes, targets)
        if not bool(np.all((np.asarray(self.momentum) >= 0) & (np.asarray(self.momentum) < 1))):
            raise ValueError(f"NES.momentum must lie in [0, 1), got {self.momentum}")

    def open(self, record: Record) -> Array:
        """The moving average."""
        return jnp.zeros_like(record.x0)

    def climb(self, record: Record, at: Array, total: Array, pairs: Array, own: Any) -> Any:
        """A step along the moving average."""
        average = self.momentum * own + (1 - self.momentum) * self.gradient(total, pairs)
        size = record.threat.eps * self.rel_step_size
        return record.threat.ascend(at, record.x0, average, size), average


class _Adam(NamedTuple):
    first: Array  # (B, ...)
    second: Array  # (B, ...)
    moves: Array  # (B,) int32


@algorithm
class SPSA(_Estimated):
    """The attack of Uesato et al. (2018): simultaneous perturbation stochastic approximation.

    Adam (Kingma & Ba 2015) from the input along gradients estimated from antithetic directions of
    random signs, projected after every step. In Linf as published; in L2 the projection is another.
    Queries are spent as by :class:`NES`.

    Args:
        threat: the ball and box to stay in; Linf or L2.
        queries: forward passes of an example at most, those for the verdicts included. Published
            evaluations made up to 100 moves of thousands of them.
        samples: directions of an estimate, two queries each: 128 in the authors' later code.
        sigma: length of the difference in each feature, in widths of the box.
        step_size: Adam's step, in widths of the box.
        loss: what to ascend, as in :class:`PGD`.
    """

    threat: Threat
    queries: int = static(default=10000)
    samples: int = static(default=128)
    sigma: Any = 0.01
    step_size: Any = 0.01
    loss: losses.Loss = static(default=losses.margin)

    POSITIVE: ClassVar[tuple[str, ...]] = ("sigma", "step_size")

    def draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Random signs."""
        return jax.random.rademacher(key, shape, jnp.float32)

    def open(self, record: Record) -> _Adam:
        """Adam's averages."""
        still = jnp.zeros_like(record.x0)
        return _Adam(still, still, jnp.zeros_like(record.y))

    def climb(self, record: Record, at: Array, total: Array, pairs: Array, own: Any) -> Any:
        """One step of Adam."""
        gradient, moves = self.gradient(total, pairs), own.moves + 1
        n = moves.astype(at.dtype)
        first = 0.9 * own.first + 0.1 * gradient
        second = 0.999 * own.second + 0.001 * gradient**2
        mean, spread = first / expand(1 - 0.9**n, at), second / expand(1 - 0.999**n, at)
        size = expand(self.step_size * width(record), at)
        x = at + size * mean / (jnp.sqrt(spread) + 1e-8)
        return record.threat.project(x, record.x0), _Adam(first, second, moves)


__all__ = ["NES", "SPSA"]
