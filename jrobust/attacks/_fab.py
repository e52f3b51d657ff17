"""FAB: the closest adversarial point by projections onto linearised decision boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrobust import drive
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import _DRAWS, LogitsFn, Record, State, where
from jrobust.attacks._fmn import DUAL
from jrobust.attacks._minimal import MinimalNorm, distance, finite, into_box, norm
from jrobust.models import Randomized
from jrobust.threat import Threat, expand

Array = jax.Array
# From a point (B, ...): the value (B,) of the nearest boundary there, and its gradient (B, ...).
Boundary = Callable[[Array], tuple[Array, Array]]

_OVERSHOOT = 5e-4  # of a refining move, as a share of its length


@algorithm
class FAB(MinimalNorm):
    """Fast adaptive boundary attack (Croce & Hein 2020, "Minimally distorted ..."), L1, L2, Linf.

    Each move linearises the decision boundary at the point, projects both the point and the input
    onto it (``threat.to_hyperplane``: exactly, within the box), goes ``eta`` times as far, and
    takes ``1 - alpha`` parts of the first and ``alpha`` of the second. An adversarial point is
    drawn back towards the input before the next move.

    The class that ``targets=`` or a composition aims at makes this FAB-T, one backward pass a move;
    untargeted it is the nearest of the linearised boundaries to all other classes, one backward
    pass for each. A target that lies behind a third class is not always reached.

    The three published versions differ; this is AutoAttack's. It keeps points 0.5% too far out on a
    linear model, which costs nothing where a radius decides, so with ``keep="closest"`` some
    ``refine`` moves follow (the authors' first version searched the segment to the input instead):
    the boundary is linearised at the closest point, and that point is brought the whole way to the
    input's projection, then half, then a quarter.

    Args:
        threat: the norm to minimise in, the box, and ``eps``, the largest distance that counts.
        steps: moves; each costs two forward passes, and one backward pass per boundary.
        alpha_max: the largest share of the input's projection, in [0, 1].
        eta: how far to go, as a multiple of the projection, at least 1.
        beta: what is left of the distance when an adversarial point is drawn back, in (0, 1).
        random_start: whether later runs of :func:`restarts` begin at random, in half of the ball of
            the closest point so far, or of ``eps``. The first run begins at the input.
        keep: ``"closest"``: the closest adversarial point after all moves; ``"success"``: the first
            within ``eps`` ends the example, and nothing is refined.
        refine: further moves with ``keep="closest"``.
        quantize: as in :class:`MinimalNorm`.
    """

    threat: Threat
    steps: int = static(default=100)
    alpha_max: Any = 0.1
    eta: Any = 1.05
    beta: Any = 0.9
    random_start: bool = static(default=False)
    keep: str = static(default="closest")
    refine: int = static(default=3)
    quantize: int | None = static(default=None)

    NORMS: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")

    @property
    def moves(self) -> int:
        """The steps, and the refining moves after them."""
        return self.steps + (self.refine if self.keep == "closest" else 0)

    def exhausted(self, state: State) -> Array:
        """See :meth:`MinimalNorm.exhausted`."""
        return state.t >= self.moves

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses factors outside of their ranges."""
        super().check(x, y, classes, targets)
        for name, least, most in (("alpha_max", 0, 1), ("eta", 1, jnp.inf), ("beta", 0, 1)):
            value = jnp.asarray(getattr(self, name))
            if not bool(jnp.all((value >= least) & (value <= most))):
                raise ValueError(f"FAB.{name} must lie in [{least}, {most}], got {value}")
        if not isinstance(self.refine, int) or self.refine < 0:
            raise ValueError(f"FAB.refine must be an int from 0, got {self.refine!r}")

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input."""
        return record.x0, None

    def reopen(self, record: Record) -> State:
        """See :meth:`Attack.reopen`: from a random point, if there is to be one."""
        state = super().reopen(record)
        if not self.random_start:
            return state
        closest = jnp.where(record.success, distance(record, record.best), record.threat.eps)
        half = dataclasses.replace(record.threat, eps=0.5 * closest)
        start = half.sample(_keys.fold(record.key, 0), record.x0)
        return state._replace(x=where(record.seen > 0, start, state.x))

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Any, Any, Any]:
        """As the parent's; but the gradient is the nearest boundary as a function of the point."""
        loss, logits, _, forwards, _ = super()._evaluate(
            logits_fn, record, x, t, gradient=False, sure=sure
        )
        if not gradient:
            return loss, logits, None, forwards, 0
        if drive.is_host(logits_fn):
            raise TypeError(
                "FAB needs gradients, which a Host model does not give: use a query attack"
            )
        samples = logits_fn.samples if isinstance(logits_fn, Randomized) else 1
        each = jnp.where(record.aim < 0, logits.shape[-1] - 1, 1)

        def boundary(x: Array) -> tuple[Array, Array]:
            return nearest_boundary(logits_fn, record, x, t)

        return loss, logits, boundary, forwards + samples, samples * each

    def move(self, state: State, loss: Array, gradient: Boundary) -> tuple[Array, Any]:  # type: ignore[override]
        """Between the projections of the point and of the input; ``gradient`` is the boundary."""
        record = state.record
        threat, x0 = record.threat, record.x0
        refining = record.success & (state.t >= self.steps)
        x = where(state.inner.hit, x0 + self.beta * (state.x - x0), state.x)
        x = where(refining, record.best, x)
        value, normal = gradient(x)
        at_x0 = value + jnp.sum((normal * (x0 - x)).reshape(x.shape[0], -1), -1)
        here = threat.to_hyperplane(x, normal, value)
        there = threat.to_hyperplane(x0, normal, at_x0)
        short, long = (jnp.maximum(threat.distance(x0 + m, x0), 1e-8) for m in (here, there))
        alpha = jnp.minimum(short / (short + long), self.alpha_max)
        alpha = jnp.where(refining, 0.5 ** (state.t - self.steps).astype(x.dtype), alpha)
        eta = expand(jnp.where(refining, 1 + _OVERSHOOT, self.eta), x)
        x = where(refining, x, x + eta * here)
        alpha = expand(alpha, x)
        return into_box(record, (1 - alpha) * x + alpha * (x0 + eta * there)), None


def nearest_boundary(
    logits_fn: LogitsFn, record: Record, x: Array, t: Array
) -> tuple[Array, Array]:
    """The decision boundary that is nearest to ``x`` (B, ...) to first order, in the dual norm.

    Between ``record.y`` and the class of ``record.aim``, or else any other. Where that class has to
    be reached, as ``record.target``, between it and the best of the others, which need not be
    ``record.y`` on the way.

    Returns:
        Its value at ``x`` (B,), how far the logit of the class beyond lies above that of this side,
        and the gradient (B, ...) of that; zeros where no value is finite.
    """

    def search(x: Array) -> Array:
        if isinstance(logits_fn, Randomized):
            return jnp.mean(logits_fn.draws(_keys.fold(record.key, t + _DRAWS), x), 0)
        return logits_fn(x)

    logits, pull = jax.vjp(search, x)
    classes = logits.shape[-1]

    def of(label: Array) -> tuple[Array, Array]:
        pick = jax.nn.one_hot(label, classes, dtype=logits.dtype)
        return jnp.take_along_axis(logits, label[:, None], 1)[:, 0].astype(jnp.float32), pick

    rest = jnp.where(of(record.target)[1] > 0, -jnp.inf, logits)
    this = jnp.where(record.target < 0, record.y, jnp.argmax(rest, -1))

    def nearer(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        label = jnp.where(record.aim < 0, (record.y + 1 + i) % classes, record.aim)
        (high, up), (low, down) = of(label), of(this)
        (normal,) = pull(up - down)
        value = high - low
        normal = finite(normal)
        away = jnp.abs(value) / (norm(normal, DUAL[record.threat.norm]) + 1e-12)
        return where(away < best[0], (away, value, normal), best)

    zero = jnp.zeros_like(record.loss)
    none = (zero + jnp.inf, zero, jnp.zeros_like(x))
    # One class after the other, with one program for any number of them: the gradients of all
    # classes together would not fit in memory where there are many.
    rounds = jnp.where(jnp.any(record.aim < 0), classes - 1, 1)
    return jax.lax.fori_loop(0, rounds, nearer, none)[1:]
