"""Training without backpropagation: objectives whose gradient is an estimate."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jrobust import zeroth_order
from jrobust._algorithm import algorithm, static
from jrobust.models import Network
from jrobust.training._averaging import Averaging
from jrobust.training._step import Batch, Init, Metrics, Objective, State, Update, step

Array = jax.Array

# Objectives branch the key of a step by small indices, augmentations above these.
_DIRECTIONS, _MASKS = 1 << 27, 1 << 28


@algorithm
class RedrawnMask:
    """A mask of :class:`ZerothOrder` that is drawn anew every so many steps.

    Its draws follow from the run's key and the step: the same share of each array in other places,
    so that nothing compiles again.

    Args:
        ratios: tree like the parameters of Python floats in [0, 1], the share of each array, for
            instance of ``zeroth_order.grasp_ratios``.
        every: steps from one mask to the next, >= 1.
    """

    ratios: Any = static()
    every: int = static(default=1)

    def check(self) -> None:
        """Raise ``ValueError`` unless ``every`` is a number of steps."""
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be an int >= 1, got {self.every!r}")

    def at_step(self, state: State) -> Any:
        """The mask of the step that begins with ``state``: indices, as the estimators take them.

        Raises ``TypeError`` or ``ValueError`` for ratios that do not fit the parameters.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, _MASKS), state.step // self.every)
        return zeroth_order.redraw(key, state.params, self.ratios)


@algorithm
class ZerothOrder:
    """An objective whose gradient, as ``jax.grad`` finds it, is an estimate from its values.

    It goes wherever an objective goes: ``training.step``, ``loops.fit``, accumulation, several
    devices (an estimate is linear in the loss, so that of a batch is the sum of those of its
    parts, taken along the same directions). The new ``extra`` and the metrics are those of the
    pass at the parameters themselves: batch-norm, in training mode, normalises every perturbed
    pass by its own batch and moves its running averages once.

    Args:
        objective: what to minimise; evaluated ``estimator.queries(params)`` times, its noise the
            same each time.
        estimator: an estimator of ``jrobust.zeroth_order``, such as ``CGE(5e-3, central=False)`` or
            ``RGE(1e-3, 64)``.
        mask: which parameters the gradient is of, as the estimators take it, or a
            :class:`RedrawnMask`; the others have gradient zero. None for all.
    """

    objective: Objective
    estimator: zeroth_order.Estimator
    mask: Any = None

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense for ``x``; see :class:`Objective`."""
        _check(self.objective, self.estimator)
        self.estimator.check()
        if isinstance(self.mask, RedrawnMask):
            self.mask.check()
        if hasattr(self.objective, "check"):
            self.objective.check(x, y, classes)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: those of the objective."""
        _check(self.objective, self.estimator)
        directions = jax.random.fold_in(key, _DIRECTIONS)

        def loss(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
            return self.objective(key, network, params, extra, batch)

        def forward(params: Any) -> tuple[Any, Any]:
            return self.estimator(directions, loss, params, mask=self.mask, has_aux=True)

        def backward(grads: Any, cotangents: Any) -> tuple[Any]:
            weight, _ = cotangents
            return (jax.tree.map(lambda g: (weight * g).astype(g.dtype), grads),)

        estimated = jax.custom_vjp(loss)
        estimated.defvjp(forward, backward)
        return estimated(params)


def zeroth_order_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    estimator: zeroth_order.Estimator,
    *,
    ratios: Any = None,
    every: int = 1,
    average: Averaging | None = None,
    accumulate: int = 1,
) -> tuple[Init, Update]:
    """:func:`step` of :class:`ZerothOrder`: the same state, batches and metrics.

    With ``ratios`` a share of the parameters is estimated at each step, in a :class:`RedrawnMask`.
    What is left out has gradient zero; a momentum or weight decay of ``tx`` still moves it.

    DeepZero (Chen et al. 2024) is ``CGE(5e-3, central=False)``, the ratios of
    ``zeroth_order.grasp_ratios``, a new mask every 5 epochs, and
    ``optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))``.

    Args:
        objective, tx, average, accumulate: as in :func:`step`. ZO-SGD, ZO-signSGD, momentum,
            ZO-Adam and ZO-AdaMM are ``optax.sgd``, ``optax.sign_sgd``,
            ``optax.sgd(..., momentum=0.9)``, ``optax.adam`` and ``optax.amsgrad``.
        estimator: see :class:`ZerothOrder`.
        ratios, every: see :class:`RedrawnMask`; no mask where ``ratios`` is None.

    Raises:
        TypeError: if ``estimator`` is not an instance of one; and as :func:`step` does.
        ValueError: ``every`` is less than 1; and as :func:`step` and the estimator do, in
            ``update``.
    """
    _check(objective, estimator)
    mask = RedrawnMask(ratios, every)
    mask.check()
    wrapped = ZerothOrder(objective, estimator, None if ratios is None else mask)
    return step(wrapped, tx, average=average, accumulate=accumulate)


def _check(objective: Any, estimator: Any) -> None:
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(f"objective must be an instance such as Standard(), got {objective!r}")
    if isinstance(estimator, type) or not isinstance(estimator, zeroth_order.Estimator):
        raise TypeError(f"estimator must be an instance such as CGE(5e-3), got {estimator!r}")
