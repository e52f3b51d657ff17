"""Universal perturbations: one for all examples."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive, losses
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import (
    LogitsFn,
    _passes,
    check_batch,
    check_labels,
    forward,
    succeeds,
)
from jrobust.attacks._deepfool import DeepFool
from jrobust.attacks._minimal import finite
from jrobust.models import Randomized
from jrobust.threat import L1, L2, Linf, Threat

Array = jax.Array


class UniversalResult(NamedTuple):
    """One perturbation for all of (N, ...) inputs, and what it does to each: a pytree of arrays.

    Attributes:
        delta: (...) the perturbation, of the shape of one input; its norm is at most ``eps``.
        success: (N,) bool, measured by a forward pass of exactly ``attack.apply(x, delta)``.
            Non-finite logits of an untargeted attack count as a success.
        loss: (N,) float32, what the attack ascends, there.
        distance: () float32, the norm of ``delta``.
        passes: () int32, passes over the examples.
        forwards: (N,) int32, forward passes spent on each example; those that fill the last
            mini-batch of a pass are counted for the examples that fill it.
        backwards: (N,) int32, backward passes.
    """

    delta: Array
    success: Array
    loss: Array
    distance: Array
    passes: Array
    forwards: Array
    backwards: Array


class _Search(NamedTuple):
    delta: Array  # (1, ...)
    passes: Array  # () int32
    over: Array  # () bool
    forwards: Array  # (N,) int32
    backwards: Array  # (N,) int32


class _Batch(NamedTuple):
    x: Array  # (B, ...)
    y: Array  # (B,)
    target: Array  # (B,) -1 when untargeted
    real: Array  # (B,) bool, False for rows that only fill the batch


class Universal(abc.ABC):
    """An attack whose unknown is shared by all examples.

    Not an :class:`Attack`: what happens to one example depends on all others. Call it inside
    ``jit``, for instance ``jax.jit(lambda attack, key, model, x, y: attack(key, model, x, y))``
    with the model as a pytree; shard the examples over devices as any batch under ``jit``.
    Subclasses are ``@algorithm`` dataclasses with the fields of :class:`SGDUAP` that it shares with
    :class:`UAP`, and write ``_update``.
    """

    threat: Threat
    epochs: int
    batch_size: int
    rate: Any
    loss: losses.Loss

    @property
    def _rows(self) -> int:
        """Examples of an update."""
        return self.batch_size

    @abc.abstractmethod
    def _update(
        self, key: Array, logits_fn: LogitsFn, ball: Threat, delta: Array, batch: _Batch, steps: int
    ) -> tuple[Array, Array | int, Array | int]:
        """The next perturbation (1, ...), and the forwards and backwards spent on each row."""

    def apply(self, x: Array, delta: Array) -> Array:
        """What the model sees: ``x + delta`` (N, ...), clipped to the box."""
        lo, hi = self.threat._bounds(x)
        return jnp.clip(x + delta.reshape((1, *x.shape[1:])), lo, hi)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """Raise ``ValueError`` or ``TypeError`` where a setting or an input makes no sense."""
        name = type(self).__name__
        self.threat.check(x)
        check_labels("y", y, classes)
        if targets is not None:
            check_labels("targets", targets, classes)
        for field in ("epochs", "batch_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}.{field} must be a positive int, got {value!r}")
        if self.rate is not None and not 0 < float(self.rate) <= 1:
            raise ValueError(f"{name}.rate must lie in (0, 1] or be None, got {self.rate}")

    def __call__(
        self, key: Array, logits_fn: LogitsFn, x: Array, y: Array, *, targets: Array | None = None
    ) -> UniversalResult:
        """Find one perturbation for all examples; pure and traceable.

        Args:
            key: one typed key: the order of the examples in every pass, and the draws of a model of
                :func:`jrobust.models.randomized`.
            logits_fn: (B, ...) -> (B, C), rows independent.
            x: (N, ...) float32 inputs inside the box.
            y: (N,) integer labels. ``success.mean()`` is the fooling rate of the papers when they
                are the model's own predictions, the error when they are the true labels.
            targets: (N,) integer classes to reach; untargeted when None.

        Raises:
            TypeError, ValueError: for what cannot be right; for values only outside of ``jit``.
        """
        _keys.check(key)
        name = type(self).__name__
        if drive.is_host(logits_fn):
            raise TypeError(f"{name} needs gradients, which a Host model does not give")
        if not isinstance(self.threat, (Linf, L2, L1)):
            raise TypeError(f"{name}.threat must be one of Linf, L2 and L1, got {self.threat!r}")
        x, y, targets, _ = check_batch(x, y, targets)
        if losses.is_targeted(self.loss) and targets is None:
            raise ValueError(f"{self.loss.__name__} is a targeted loss: pass targets=")
        if np.ndim(self.threat.eps) or x.ndim in (np.ndim(self.threat.lo), np.ndim(self.threat.hi)):
            raise ValueError(
                f"{name} looks for one perturbation, so threat has one eps, and lo and hi without "
                f"an example axis; got eps of shape {np.shape(self.threat.eps)}"
            )
        self.threat.check_shapes(x)
        if not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((self, x, y, targets))):
            self.check(x, y, jax.eval_shape(logits_fn, x).shape[-1], targets)
        return self._run(key, logits_fn, x, y.astype(jnp.int32), targets)

    def _run(
        self, key: Array, logits_fn: LogitsFn, x: Array, y: Array, targets: Array | None
    ) -> UniversalResult:
        total = x.shape[0]
        target = jnp.full_like(y, -1) if targets is None else targets.astype(jnp.int32)
        # The perturbation itself is an input of this one: around zero, in a box as wide as it gets.
        width = jnp.asarray(self.threat.hi, x.dtype) - jnp.asarray(self.threat.lo, x.dtype)
        ball = dataclasses.replace(self.threat, lo=-width, hi=width)  # type: ignore[type-var]
        rows, chunk = min(self._rows, total), min(self.batch_size, total)
        updates = -(-total // rows)

        def measured(delta: Array) -> tuple[Array, Array]:
            """Success and loss of all examples."""

            def look(index: Array) -> tuple[Array, Array]:
                logits = forward(logits_fn, self.apply(x[index], delta))
                loss = losses.ascent(self.loss, logits, y[index], target[index])
                finite = jnp.all(jnp.isfinite(logits), -1)
                return succeeds(logits, y[index], target[index]), jnp.where(finite, loss, jnp.nan)

            found = jax.lax.map(look, _filled(jnp.arange(total), chunk))
            return tuple(part.reshape(-1)[:total] for part in found)

        looked = _filled(jnp.arange(total), chunk).ravel()
        asked = jnp.zeros_like(y).at[looked].add(_passes(logits_fn)[1] or 1)

        def a_pass(search: _Search) -> _Search:
            fresh = jax.random.fold_in(key, search.passes)
            order = _filled(jax.random.permutation(fresh, total), rows)

            def update(i: Array, search: _Search) -> _Search:
                index = order[i]
                real = i * rows + jnp.arange(rows) < total
                batch = _Batch(x[index], y[index], target[index], real)
                draw = jax.random.fold_in(jax.random.fold_in(fresh, 1), i)
                delta, forwards, backwards = self._update(
                    draw, logits_fn, ball, search.delta, batch, self.epochs * updates
                )
                return search._replace(
                    delta=delta,
                    forwards=search.forwards.at[index].add(forwards),
                    backwards=search.backwards.at[index].add(backwards),
                )

            search = drive.loop(updates, update, search)
            search = search._replace(passes=search.passes + 1)
            if self.rate is None:
                return search
            enough = jnp.mean(measured(search.delta)[0]) >= self.rate
            return search._replace(over=enough, forwards=search.forwards + asked)

        def guarded(_: Any, search: _Search) -> _Search:
            if self.rate is None:
                return a_pass(search)
            return jax.lax.cond(search.over, lambda s: s, a_pass, search)

        zero = jnp.zeros_like(y)
        search = _Search(
            delta=jnp.zeros_like(x[:1]),
            passes=zero[0],
            over=zero[0] > 0,
            forwards=zero,
            backwards=zero,
        )
        search = drive.loop(self.epochs, guarded, search)
        success, loss = measured(search.delta)
        return UniversalResult(
            delta=search.delta[0],
            success=success,
            loss=loss,
            distance=ball.distance(search.delta, jnp.zeros_like(search.delta))[0],
            passes=search.passes,
            forwards=search.forwards + asked,
            backwards=search.backwards,
        )


def _filled(order: Array, size: int) -> Array:
    """The order (N,) as batches (n, size), the last filled with examples from the front."""
    count = -(-order.shape[0] // size)
    missing = count * size - order.shape[0]
    return jnp.concatenate([order, order[:missing]]).reshape(count, size)


@algorithm
class SGDUAP(Universal):
    """Universal perturbation by gradient ascent on mini-batches (Shafahi et al. 2020).

    Every step is the threat model's steepest ascent of the mean over a mini-batch of
    ``min(loss, beta)``, projected onto the ball around zero. Without the clip a few examples of
    huge loss, fooled long ago, would decide every step. Where ``x + delta`` lies beyond the box a
    feature has no gradient, at the bound itself the one from inside.

    Args:
        threat: the norm and radius of the perturbation, and the box of the perturbed inputs; Linf,
            L2 or L1.
        epochs: passes over the examples, in a fresh order each; with each a gradient per example.
        batch_size: examples of a step.
        beta: highest loss of an example that counts.
        step_size: length of a step in the threat model's norm and the units of x.
        rel_step_size: the same in multiples of ``eps``; as ``threat.step_size`` for all steps
            together when neither is given.
        rate: share of successes at which to stop, looked at after every pass (one forward pass for
            each example); None never stops.
        loss: what to ascend, as in :class:`PGD`; with ``targets=`` the loss towards the target is
            descended, and ``beta`` plays no part unless the loss is a targeted one.
    """

    threat: Threat
    epochs: int = static(default=10)
    batch_size: int = static(default=128)
    beta: Any = 9.0
    step_size: Any = None
    rel_step_size: Any = None
    rate: Any = None
    loss: losses.Loss = static(default=losses.cross_entropy)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Universal.check`; also refuses step sizes and bounds that make no sense."""
        super().check(x, y, classes, targets)
        if self.step_size is not None and self.rel_step_size is not None:
            raise ValueError("SGDUAP takes step_size or rel_step_size, not both")
        for field in ("beta", "step_size", "rel_step_size"):
            value = getattr(self, field)
            if value is not None and not float(value) > 0:
                raise ValueError(f"SGDUAP.{field} must be positive, got {value}")

    def _update(
        self, key: Array, logits_fn: LogitsFn, ball: Threat, delta: Array, batch: _Batch, steps: int
    ) -> tuple[Array, Array | int, Array | int]:
        size = self.step_size
        if size is None:
            size = ball.step_size(delta, steps, self.rel_step_size)

        def ascent(logits: Array) -> Array:
            return losses.ascent(self.loss, logits, batch.y, batch.target)

        def height(x: Array) -> Array:
            if isinstance(logits_fn, Randomized):
                keys = _keys.examples(key, jnp.arange(x.shape[0]))
                loss = jnp.mean(jax.vmap(ascent)(logits_fn.draws(keys, x)), 0)
            else:
                loss = ascent(logits_fn(x))
            return jnp.sum(jnp.where(batch.real, jnp.minimum(loss, self.beta), 0.0))

        samples, _ = _passes(logits_fn)
        slope = finite(jax.grad(height)(self.apply(batch.x, delta)))
        lo, hi = self.threat._bounds(batch.x)
        moved = batch.x + delta
        slope = jnp.where((moved >= lo) & (moved <= hi), slope, 0.0)
        slope = jnp.mean(slope, 0, keepdims=True)
        return ball.ascend(delta, jnp.zeros_like(delta), slope, size), samples, samples


@algorithm
class UAP(Universal):
    """Universal perturbation, one example after the other (Moosavi-Dezfooli et al. 2017).

    An example that the perturbation does not fool yet adds the shortest vector that takes it, where
    it is now, over a decision boundary, found by :class:`DeepFool` in L2; then the sum is projected
    onto the ball. Ends after a pass that fools enough of the examples.

    Example by example, so slow on an accelerator; :class:`SGDUAP` does the same in mini-batches.

    Args:
        threat: as in :class:`SGDUAP`.
        epochs: passes over the examples at most.
        rate: share of successes at which to stop, the paper's ``1 - delta``; None never stops.
        steps, overshoot, classes: as in :class:`DeepFool`; 10 moves as in the released code.
        batch_size: examples looked at together where the successes are counted.
    """

    threat: Threat
    epochs: int = static(default=10)
    rate: Any = 0.8
    steps: int = static(default=10)
    overshoot: Any = 0.02
    classes: int = static(default=10)
    batch_size: int = static(default=128)

    loss = staticmethod(losses.margin)

    @property
    def _rows(self) -> int:
        return 1

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Universal.check` and :meth:`DeepFool.check`."""
        super().check(x, y, classes, targets)
        wide = L2(1.0, self.threat.lo, self.threat.hi)
        DeepFool(wide, self.steps, self.overshoot, self.classes).check(x, y, classes, targets)

    def _update(
        self, key: Array, logits_fn: LogitsFn, ball: Threat, delta: Array, batch: _Batch, steps: int
    ) -> tuple[Array, Array | int, Array | int]:
        x = self.apply(batch.x, delta)
        inner = DeepFool(
            L2(jnp.inf, self.threat.lo, self.threat.hi), self.steps, self.overshoot, self.classes
        )
        state = inner.init(_keys.examples(key, jnp.zeros_like(batch.y)), x, batch.y, None)
        record = state.record._replace(target=batch.target, aim=batch.target)
        found = inner.result(drive.run(inner, logits_fn, state._replace(record=record)))
        move = jnp.where(found.success.reshape((-1,) + (1,) * (x.ndim - 1)), found.x - x, 0.0)
        delta = ball.project(delta + move, jnp.zeros_like(delta))
        return delta, found.forwards, found.backwards


__all__ = ["SGDUAP", "UAP", "Universal", "UniversalResult"]
