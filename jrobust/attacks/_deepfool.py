"""DeepFool: to the nearest boundary of the linearised model, again and again."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrobust import drive, losses
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import _DRAWS, LogitsFn, Record, State, _passes, forward
from jrobust.attacks._fmn import DUAL
from jrobust.attacks._minimal import MinimalNorm, finite, into_box, norm, width
from jrobust.models import Randomized
from jrobust.threat import Threat, expand

Array = jax.Array


@algorithm
class DeepFool(MinimalNorm):
    """Steps to the nearest linearised boundary (Moosavi-Dezfooli et al. 2016, algorithm 2).

    Every move adds the shortest vector that takes the linearised model to the boundary with
    another class, and evaluates the input plus ``1 + overshoot`` times the sum, clipped to the box.
    The first adversarial point ends the example. With ``targets=`` the boundary is that between
    the target and the best class beside it, which the paper does not define.

    Args:
        threat: ``L2`` or ``Linf``; ``eps`` is the largest distance that counts, see
            :class:`MinimalNorm`.
        steps: moves at most. Each costs a forward and ``classes - 1`` backward passes.
        overshoot: by how much to go beyond the boundary, relative to the perturbation.
        classes: how many classes to look at, the true one and the ones of highest logits.
        keep, quantize: see :class:`MinimalNorm`; with both values of ``keep`` the first adversarial
            point ends the example.
    """

    threat: Threat
    steps: int = static(default=50)
    overshoot: Any = 0.02
    classes: int = static(default=10)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)

    NORMS: ClassVar[tuple[str, ...]] = ("L2", "Linf")
    POSITIVE: ClassVar[tuple[str, ...]] = ("overshoot",)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`MinimalNorm.check`; also refuses fewer than two classes."""
        super().check(x, y, classes, targets)
        if not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(f"DeepFool.classes must be an int from 2, got {self.classes!r}")

    def exhausted(self, state: State) -> Array:
        """See :meth:`MinimalNorm.exhausted`."""
        return super().exhausted(state) | state.inner.hit

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the sum of moves."""
        return record.x0, jnp.zeros_like(record.x0)

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Array | None, int, int]:
        """The gradient is that of the difference of logits whose boundary is nearest.

        It is scaled so that its boundary is where the first-order model of ``loss`` is zero.
        """
        if not gradient or drive.is_host(logits_fn):
            return super()._evaluate(logits_fn, record, x, t, gradient=gradient, sure=sure)
        samples, votes = _passes(logits_fn)

        def model(x: Array) -> Array:
            if isinstance(logits_fn, Randomized):
                draws = logits_fn.draws(_keys.fold(record.key, t + _DRAWS), x)
                return jnp.mean(draws.astype(jnp.float32), 0)
            return forward(logits_fn, x) if sure else logits_fn(x).astype(jnp.float32)

        logits, pull = jax.vjp(model, x)
        loss = losses.ascent(self.loss, logits, record.y, record.aim)
        shown = forward(logits_fn, x) if isinstance(logits_fn, Randomized) else logits

        everything = jnp.arange(logits.shape[-1])[None, :]
        aimed = record.aim >= 0
        own = jnp.where(aimed, record.aim, record.y)
        count = min(self.classes, logits.shape[-1]) - 1
        ranked = jax.lax.top_k(jnp.where(everything == own[:, None], -jnp.inf, logits), count)[1]
        up = jnp.where(aimed[:, None], record.aim[:, None], ranked).T
        down = jnp.where(aimed, ranked[:, 0], record.y)

        def look(best: tuple[Array, Array], up: Array) -> tuple[tuple[Array, Array], None]:
            beyond, here = ((everything == v[:, None]).astype(logits.dtype) for v in (up, down))
            pick = beyond - here
            # Not by a product of logits and `pick`, in which one infinite logit spoils all.
            gap = jnp.abs(jnp.sum(jnp.where(pick == 0, 0.0, pick * logits), -1))
            slope = finite(pull(pick)[0])
            scale = jnp.where(gap > 0, jnp.abs(loss) / jnp.where(gap > 0, gap, 1.0), 1.0)
            slope = expand(finite(scale), slope) * slope
            size = norm(slope, DUAL[record.threat.norm])
            steeper = size > best[0]
            return (
                jnp.where(steeper, size, best[0]),
                jnp.where(expand(steeper, slope), slope, best[1]),
            ), None

        nothing = (jnp.zeros_like(loss), jnp.zeros_like(x))
        (_, slope), _ = jax.lax.scan(look, nothing, up)
        return loss, shown, slope, samples + votes, count * samples

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """Add the shortest vector to the nearest boundary."""
        record, (_, total) = state.record, state.inner
        slope = norm(gradient, DUAL[record.threat.norm])
        # A hair beyond, so that a point on the boundary leaves it.
        length = jnp.abs(loss) / jnp.where(slope > 0, slope, 1.0) + 1e-6 * width(record)
        length = jnp.where(slope > 0, finite(length), 0.0)
        total = total + expand(length, total) * record.threat.steepest(gradient)
        return into_box(record, record.x0 + (1 + self.overshoot) * total), total
