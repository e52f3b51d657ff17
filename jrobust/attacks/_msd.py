"""MSD: multi steepest descent, one attack on a union of norm balls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive, losses
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import GradientAttack, LogitsFn, Record, State, _passes, where
from jrobust.threat import Threat

Array = jax.Array


@algorithm
class AnyOf:
    """A union of balls around the same point: what an :class:`MSD` point lies in.

    Args:
        balls: threat models, all with the same box.
    """

    balls: tuple[Threat, ...]

    def batched(self, x: Array) -> AnyOf:
        """With an example axis on every leaf; see :meth:`jrobust.threat.Threat.batched`."""
        return AnyOf(tuple(ball.batched(x) for ball in self.balls))

    def distance(self, x: Array, x0: Array) -> Array:
        """(B,): the norm of ``x - x0`` in the ball that ``x`` lies deepest in.

        That is the ball of the smallest distance relative to its radius; among equals the first.
        """
        each = jnp.stack([ball.distance(x, x0) for ball in self.balls])
        radii = jnp.stack([jnp.broadcast_to(ball.eps, each.shape[1:]) for ball in self.balls])
        share = jnp.where(each > 0, each / radii, 0.0)
        return jnp.take_along_axis(each, jnp.argmin(share, 0)[None], 0)[0]


@algorithm
class MSD(GradientAttack):
    """Multi steepest descent on a union of balls (Maini, Wong & Kolter 2020).

    Every move takes the steepest step of each norm from the same point, each projected onto its own
    ball, and goes to that of highest loss: one path that may change its norm at every move, where
    ``union(PGD(Linf(...)), PGD(L2(...)))`` follows each norm alone.

    The returned point lies in at least one of the balls. Its ``distance`` is in the norm of the
    ball that it lies deepest in, relative to the radius, so that it is never larger than that
    ball's ``eps``. ``threats()`` are all balls, of which a point obeys one.

    Steps are ``threat.ascend``: in L1 and L2 they end in the exact intersection of ball and box.
    The released code clips to the box what it has projected onto the ball, and in L1 shares the
    step between a random number of 5 to 20 features, the same for the whole batch, none of which
    may be closer to the box than the step.

    Args:
        balls: the threat models, for instance ``(Linf(0.03), L2(0.5), L1(12.0))``, those of the
            released code for CIFAR-10; any of the four norms, all with the same box.
        steps: moves; each costs a gradient and ``1 + len(balls)`` forward passes.
        rel_step_size: length of a move in multiples of each ball's ``eps``, one number or one for
            each ball; as ``threat.step_size`` when None. The released code takes about a tenth.
        random_start: whether to start from a random point of one of the balls, drawn for each
            example, or from the input itself.
        loss, keep: as in :class:`PGD`.
    """

    balls: tuple[Threat, ...]
    steps: int = static(default=50)
    rel_step_size: Any = None
    random_start: bool = static(default=False)
    loss: losses.Loss = static(default=losses.cross_entropy)
    keep: str = static(default="success")

    @property
    def threat(self) -> Any:  # type: ignore[override]
        """The union of the balls."""
        return AnyOf(self.balls)

    def threats(self) -> tuple[Threat, ...]:
        """The balls; raises ``TypeError`` if there are none."""
        balls = self.balls
        if not (isinstance(balls, tuple) and balls and all(isinstance(b, Threat) for b in balls)):
            raise TypeError(
                "MSD.balls must be a tuple of threat models such as (Linf(0.03), L2(0.5)), "
                f"got {balls!r}"
            )
        return balls

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses balls in different boxes and bad step sizes."""
        super().check(x, y, classes, targets)
        for field in ("lo", "hi"):
            boxes = [np.broadcast_to(getattr(ball, field), x.shape) for ball in self.balls]
            if not all(np.array_equal(box, boxes[0]) for box in boxes):
                raise ValueError(f"MSD.balls must lie in the same box, but differ in {field}")
        sizes = self.rel_step_size
        if isinstance(sizes, tuple) and len(sizes) != len(self.balls):
            raise ValueError(
                f"MSD.rel_step_size has {len(sizes)} values for {len(self.balls)} balls"
            )
        if sizes is not None and not np.all(np.asarray(sizes) > 0):
            raise ValueError(f"MSD.rel_step_size must be positive or None, got {sizes}")

    def reopen(self, record: Record) -> State:
        """See :meth:`Attack.reopen`."""
        own = dataclasses.replace(self, balls=record.threat.balls)
        fresh = own.init(record.key, record.x0, record.y, record.target)
        return fresh._replace(record=record._replace(done=jnp.zeros_like(record.done)))

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input, or a random point of a random ball; carries the last gradient."""
        x = record.x0
        if self.random_start:
            keys, balls = _keys.fold(record.key, 0), record.threat.balls
            drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(balls)))(keys)
            for i, ball in enumerate(balls):
                x = where(drawn == i, ball.sample(_keys.fold(keys, i), record.x0), x)
        return x, jnp.zeros_like(x)

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """Nowhere yet: ``step``, which can ask the model, chooses among the balls."""
        return state.x, gradient

    def step(self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None = None) -> State:
        """See :meth:`Attack.step`."""
        if drive.is_host(logits_fn):
            raise TypeError(
                "MSD needs gradients, which a Host model does not give: use a query attack"
            )
        new = super().step(logits_fn, state, judge)
        record, balls = new.record, new.record.threat.balls
        moved = new.t > state.t
        relative = self.rel_step_size
        if not isinstance(relative, tuple):
            relative = (relative,) * len(balls)

        def ahead(ball: Threat, relative: Any) -> Array:
            size = ball.step_size(record.x0, self.steps, relative)
            return ball.ascend(state.x, record.x0, new.inner, size)

        points = jnp.stack([ahead(*each) for each in zip(balls, relative)])

        def height(x: Array) -> Array:
            loss = self._evaluate(logits_fn, record, x, new.t, gradient=False, sure=False)[0]
            # Where the logits are not finite nothing is higher.
            return jnp.where(jnp.isnan(loss), jnp.inf, loss)

        best = jnp.argmax(jax.vmap(height)(points), 0)
        chosen = state.x
        for i, point in enumerate(points):
            chosen = where(best == i, point, chosen)
        asked = moved * jnp.int32(len(balls) * _passes(logits_fn)[0])
        record = record._replace(forwards=record.forwards + asked)
        return new._replace(record=record, x=where(moved, chosen, state.x))


__all__ = ["MSD", "AnyOf"]
