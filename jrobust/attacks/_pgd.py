"""Projected gradient descent, with any optimiser, and its one-step and momentum forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import GradientAttack, Record, State
from jrobust.attacks._minimal import finite
from jrobust.threat import Threat, expand

Array = jax.Array


@algorithm
class PGD(GradientAttack):
    """Projected gradient descent (Madry et al. 2018; without start Kurakin et al. 2017).

    ``x_{t+1} = project(x_t + step_size * steepest(gradient))`` from a random point of the ball. The
    first misclassified point ends the example, the start included. The step is
    ``threat.ascend``: in L1 it heeds the box (Croce & Hein 2021), in L0 it is that of PGD_0 (Croce
    & Hein 2019).

    Args:
        threat: the ball and box to stay in.
        steps: moves from the start; costs ``steps`` gradients and ``steps + 1`` forward passes.
        step_size: length of a move in the threat model's norm and the units of x; scalar or (B,).
            In L0, which has no lengths, the sum of absolute changes.
        rel_step_size: the same in multiples of ``eps``, so that it follows a sweep over eps. When
            neither is given, ``2.5 / steps`` (Madry et al.). In L0, in multiples of 20 sums of the
            widths of the box, and one: see ``threat.step_size``.
        random_start: whether to start from ``threat.sample`` or from the input itself.
        gaussian_start: with a random start, the standard deviation of a Gaussian around the input
            to start from instead (TRADES, Zhang et al. 2019, algorithm 1: 0.001).
        momentum: decay of the running sum of gradients, each over its L1 norm, example by example
            (Dong et al. 2018, eq. 6); None for plain gradients.
        loss: what to ascend, ``loss(logits, y)``; with ``targets=`` it is descended towards the
            target, unless it is a targeted loss ``loss(logits, y, target)``.
        keep: which point to return. ``"success"``: the first success, which ends the example, else
            the highest loss; ``"loss"``: the highest loss after all steps; ``"last"``: the last.
        estimator: gradient estimator of ``jrobust.zeroth_order`` in place of autodiff.
        optimizer: a function from a learning rate to an optax optimiser, such as ``optax.adam``, in
            place of steepest ascent: ``x_{t+1} = project(x_t + update)``. Its learning rate is the
            step size, in the units of x. It sees the raw gradient, neither sign nor normalised, of
            what is descended, entries that are not finite as zeros; every example has an optimiser
            of its own. Line searches, which ask for the value too, are not supported. A schedule
            counts the moves: ``def decaying(size): return
            optax.adam(optax.cosine_decay_schedule(size, 20))``. Equal functions share a compiled
            program, so make your own once, as here, and not anew for each attack.
    """

    threat: Threat
    steps: int = static(default=20)
    step_size: Any = None
    rel_step_size: Any = None
    random_start: bool = static(default=True)
    gaussian_start: Any = None
    momentum: Any = None
    loss: losses.Loss = static(default=losses.cross_entropy)
    keep: str = static(default="success")
    estimator: Any = None
    optimizer: Callable[[Any], Any] | None = static(default=None)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses step sizes and momenta that are not positive."""
        super().check(x, y, classes, targets)
        name = type(self).__name__
        if self.step_size is not None and self.rel_step_size is not None:
            raise ValueError(f"{name} takes step_size or rel_step_size, not both")
        if self.gaussian_start is not None and not self.random_start:
            raise ValueError(f"{name}.gaussian_start goes with random_start=True")
        if self.optimizer is not None and not callable(self.optimizer):
            raise TypeError(
                f"{name}.optimizer must be a function from a learning rate to an optax optimiser, "
                f"got {type(self.optimizer).__name__}: pass optimizer=optax.adam, step_size=0.01 "
                "in place of optimizer=optax.adam(0.01)"
            )
        if self.optimizer is not None and self.momentum is not None:
            raise ValueError(f"{name} takes momentum or optimizer, not both")
        for field in ("step_size", "rel_step_size", "gaussian_start", "momentum"):
            value = getattr(self, field)
            if value is None:
                continue
            if not bool(jnp.all(jnp.asarray(value) > 0)):
                raise ValueError(f"{name}.{field} must be positive or None, got {value}")
            if np.shape(value) not in ((), x.shape[:1]):
                raise ValueError(
                    f"{name}.{field} must be a number or have one for each of the {x.shape[0]} "
                    f"examples, got shape {np.shape(value)}"
                )

    def _start_point(self, record: Record) -> Array:
        x0, threat = record.x0, record.threat
        if not self.random_start:
            return x0
        keys = _keys.fold(record.key, 0)
        if self.gaussian_start is None:
            return threat.sample(keys, x0)
        noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], x0.dtype))(keys)
        return threat.project(x0 + expand(self.gaussian_start, x0) * noise, x0)

    @property
    def _relative(self) -> Any:
        """The step in multiples of ``eps``, where its length is not given."""
        return self.rel_step_size

    def start(self, record: Record) -> tuple[Array, Any]:
        """A random or the clean point; carries the step size and the momentum or the optimiser."""
        x, x0, threat = self._start_point(record), record.x0, record.threat
        size = threat.step_size(x0, self.steps, self._relative)
        if self.step_size is not None:
            size = 0.0 * size + self.step_size
        size = jnp.asarray(size, x.dtype)
        if self.optimizer is None:
            return x, (size, None if self.momentum is None else jnp.zeros_like(x))

        def opened(x: Array, size: Array, done: Array) -> Any:
            fresh = self.optimizer(size).init(x)  # type: ignore[misc]
            # From the lane's own flag, so that under shard_map counters vary over devices too.
            return jax.tree.map(lambda leaf: jnp.where(done, leaf, leaf), fresh)

        return x, (size, jax.vmap(opened)(x, size, record.done))

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """One projected step, of steepest ascent or of the optimiser."""
        record, (size, carried) = state.record, state.inner
        if self.optimizer is not None:

            def update(size: Array, slope: Array, carried: Any, x: Array) -> tuple[Array, Any]:
                return self.optimizer(size).update(slope, carried, x)  # type: ignore[misc]

            step, carried = jax.vmap(update)(size, -finite(gradient), carried, state.x)
            return record.threat.project(state.x + finite(step), record.x0), (size, carried)
        if carried is not None:
            slope = finite(gradient)
            scale = jnp.sum(jnp.abs(slope), tuple(range(1, slope.ndim)), keepdims=True)
            decay = expand(self.momentum, slope)
            gradient = carried = decay * carried + slope / jnp.where(scale > 0, scale, 1.0)
        return record.threat.ascend(state.x, record.x0, gradient, size), (size, carried)


def FGSM(threat: Threat, *, loss: losses.Loss = losses.cross_entropy, keep: str = "success") -> PGD:
    """Fast gradient (sign) method: one full step from the input (Goodfellow et al. 2015).

    In L2 this is the fast gradient method, ``x + eps g / |g|``; in L1 it fills the steepest
    features up to the box until ``eps`` is spent.

    Args:
        threat: the ball and box to stay in.
        loss: what to ascend, as in :class:`PGD`.
        keep: which point to return, as in :class:`PGD`.
    """
    return PGD(threat, steps=1, rel_step_size=1.0, random_start=False, loss=loss, keep=keep)


def RSFGSM(
    threat: Threat,
    *,
    rel_step_size: Any = 1.25,
    loss: losses.Loss = losses.cross_entropy,
    keep: str = "success",
) -> PGD:
    """FGSM from a random start, "Fast" (Wong et al. 2020, algorithm 3).

    Args:
        threat: the ball and box to stay in.
        rel_step_size: length of the step in multiples of ``eps``.
        loss: what to ascend, as in :class:`PGD`.
        keep: which point to return, as in :class:`PGD`.
    """
    return PGD(threat, steps=1, rel_step_size=rel_step_size, loss=loss, keep=keep)


def MIFGSM(
    threat: Threat,
    *,
    steps: int = 10,
    momentum: Any = 1.0,
    loss: losses.Loss = losses.cross_entropy,
    keep: str = "success",
) -> PGD:
    """Momentum iterative FGSM, steps of ``eps / steps`` (Dong et al. 2018, algorithm 1).

    Args:
        threat: the ball and box to stay in.
        steps: moves, from the input itself.
        momentum: decay of the running sum of gradients.
        loss: what to ascend, as in :class:`PGD`.
        keep: which point to return, as in :class:`PGD`.
    """
    return PGD(
        threat,
        steps=steps,
        rel_step_size=1.0 / steps,
        random_start=False,
        momentum=momentum,
        loss=loss,
        keep=keep,
    )
