"""EAD: elastic-net attacks, sparse changes by shrinkage."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import LogitsFn, Record, State, _passes, forward, where
from jrobust.attacks._cw import Constant, advance, open_search
from jrobust.attacks._minimal import MinimalNorm, distance, finite, into_box, norm, width
from jrobust.threat import Threat, expand

Array = jax.Array


class _Carry(NamedTuple):
    search: Constant
    ahead: Array  # (B, ...) the slack point, at which the gradient is taken


@algorithm
class EAD(MinimalNorm):
    """Elastic-net attack, a minimal L1 attack (Chen et al. 2018, algorithm 1).

    Minimises ``c max(z_y - max_{i != y} z_i, 0) + |x - x0|_2^2 + beta |x - x0|_1`` by FISTA:
    gradient steps at a point ahead, then every feature is drawn towards the input by ``beta``, to
    the bit where it is closer, and clipped to the box. A binary search over ``c`` as in
    :class:`CW`. Distances count in widths of the box. The point ahead is clipped to the box too.

    Args:
        threat: ``L1``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        steps: iterations of a round at most, one gradient and two forward passes each.
        rounds: rounds of the search over ``c``, each from the input.
        step_size: length of the first step; it falls like the square root of what is left.
        beta: weight of the L1 norm, and what features are drawn back by.
        constant: the first ``c``.
        rule: which adversarial point is returned: that of least elastic-net distance
            ``|x - x0|_2^2 + beta |x - x0|_1`` (``"EN"``), or of least L1 distance (``"L1"``).
        loss, keep, quantize, estimator: as in :class:`CW`.
    """

    threat: Threat
    steps: int = static(default=1000)
    rounds: int = static(default=9)
    step_size: Any = 0.01
    beta: Any = 1e-3
    constant: Any = 1e-3
    rule: str = static(default="EN")
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("L1",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("rounds", "step_size", "beta", "constant")

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`MinimalNorm.check`; also refuses unknown decision rules."""
        super().check(x, y, classes, targets)
        if self.rule not in ("EN", "L1"):
            raise ValueError(f"EAD.rule must be 'EN' or 'L1', got {self.rule!r}")

    def exhausted(self, state: State) -> Array:
        """See :meth:`MinimalNorm.exhausted`."""
        return state.inner.own.search.turn >= self.rounds

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the search and the point ahead."""
        return record.x0, _Carry(open_search(record, self.constant), record.x0)

    def _measure(self, record: Record, x: Array) -> Array:
        if self.rule == "L1":
            return distance(record, x)
        scale = width(record)
        return (norm(x - record.x0, 2) / scale) ** 2 + self.beta * distance(record, x) / scale

    def _look(
        self, logits_fn: LogitsFn, state: State, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Array | None, Array | int, int]:
        """The loss and its gradient at the point ahead, the logits of the point itself."""
        if not gradient:
            return super()._look(logits_fn, state, gradient=False, sure=sure)
        record, (_, own) = state.record, state.inner
        loss, _, slope, forwards, backwards = self._evaluate(
            logits_fn, record, own.ahead, state.t, gradient=True, sure=False
        )
        logits = forward(logits_fn, state.x)
        return loss, logits, slope, forwards + (_passes(logits_fn)[1] or 1), backwards

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """One step of FISTA, or the start of another round."""
        record, (hit, (search, ahead)) = state.record, state.inner
        x0, scale = record.x0, expand(width(record), state.x)
        change = (ahead - x0) / scale
        objective = norm(change, 2) ** 2 + search.c * jnp.maximum(-loss, 0.0)
        push = expand(jnp.where(loss < 0, search.c, 0.0), change) * scale * finite(gradient)
        size = self.step_size * jnp.sqrt(jnp.maximum(1 - search.i / self.steps, 0.0))
        change = change - expand(size, change) * (2 * change - push)
        drawn = jnp.sign(change) * jnp.maximum(jnp.abs(change) - self.beta, 0.0)
        x = jnp.where(drawn == 0, x0, into_box(record, x0 + scale * drawn))
        ease = expand(search.i / (search.i + 3.0), x)
        ahead = into_box(record, x + ease * (x - state.x))
        search, over = advance(search, hit, objective, self.steps)
        return where(over, (x0, _Carry(search, x0)), (x, _Carry(search, ahead)))
