"""One optimiser step over an objective, as a pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jrobust import keys as _keys
from jrobust import parallel
from jrobust._algorithm import algorithm, static
from jrobust.models import Network

Array = jax.Array
Metrics = dict[str, Array]


class Batch(NamedTuple):
    """A training batch: a pytree of arrays.

    Attributes:
        x: (B, ...) float32 inputs.
        y: (B,) integer labels, or (B, C) class probabilities (soft labels).
        id: (B,) integer example ids: an example's noise depends on its id, not on its position.
        mask: (B,) bool, False for rows that only fill the batch and must not count. They go
            through the model like the others, so fill with examples: inputs that are not finite
            would reach the gradient, and batch-norm layers see them.
    """

    x: Array
    y: Array
    id: Array
    mask: Array


def batch(x: Any, y: Any, id: Any = None, mask: Any = None) -> Batch:
    """A :class:`Batch`; ``id`` counts from 0 and all rows count when not given."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    return Batch(
        x,
        y,
        jnp.arange(x.shape[0]) if id is None else jnp.asarray(id),
        jnp.ones(x.shape[:1], bool) if mask is None else jnp.asarray(mask),
    )


def _check(batch: Batch) -> None:
    rows = batch.x.shape[:1]
    hard = jnp.issubdtype(batch.y.dtype, jnp.integer) and batch.y.shape == rows
    soft = jnp.issubdtype(batch.y.dtype, jnp.floating) and batch.y.ndim == 2
    if not hard and not (soft and batch.y.shape[:1] == rows):
        raise ValueError(
            f"batch.y must be integer labels of shape {rows} or float probabilities of shape "
            f"({rows[0]}, classes), got {batch.y.dtype} of shape {batch.y.shape}"
        )
    for name, kind in (("id", jnp.integer), ("mask", jnp.bool_)):
        value = getattr(batch, name)
        if value.shape != rows or not jnp.issubdtype(value.dtype, kind):
            raise ValueError(
                f"batch.{name} must be {kind.__name__} of shape {rows}, got {value.dtype} of shape "
                f"{value.shape}"
            )


class Objective(Protocol):
    """What a model is trained to minimise. An ``@algorithm`` dataclass with this call.

    It may have ``check(x, y, classes)`` too, which reads values and raises where a setting or an
    input makes no sense: ``jrobust.loops.fit`` calls it before any compute.
    """

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """Scalar loss over the rows that count, then the new ``extra`` and scalar metrics.

        Args:
            key: one typed key for this step; an example's noise is drawn from
                ``jrobust.keys.examples(key, batch.id)``.
            network: the model as pure functions.
            params: what is optimised.
            extra: all other variables, such as batch-norm statistics.
            batch: the examples.
        """


@algorithm
class State:
    """Everything a training run needs to go on: a pytree.

    Attributes:
        step: () int32, updates made.
        key: () typed key of the run; step ``t`` uses ``fold_in(key, t)``.
        params: optimised parameters.
        extra: other variables (batch-norm statistics), changed by the training forward pass only.
        opt_state: state of the optax transformation.
        network: the model; static, so equal modules share one compilation.
    """

    step: Array
    key: Array
    params: Any
    extra: Any
    opt_state: Any
    network: Network = static()


# Compiled once for each network: drawing weights takes longer to compile than a training step.
_draw = jax.jit(lambda network, key, x: network.init(key, x))

Init = Callable[[Array, Network, Array], State]
Update = Callable[[State, Batch], tuple[State, Metrics]]


def step(objective: Objective, tx: optax.GradientTransformation) -> tuple[Init, Update]:
    """A training step as two pure functions, ``(init, update)``, in the manner of optax.

    ``init(key, network, x) -> State`` draws parameters for inputs shaped like ``x`` (B, ...).
    ``update(state, batch) -> (state, metrics)`` makes one step; its state may be donated to
    ``jax.jit``. ``metrics`` are the objective's own and ``loss`` and ``gradient_norm``.

    Args:
        objective: see :class:`Objective`.
        tx: an optax transformation, learning-rate schedule included.

    Raises:
        TypeError: if ``objective`` is not an instance of an objective, or ``tx`` not of optax.
    """
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(f"objective must be an instance such as Standard(), got {objective!r}")
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax transformation such as optax.adam(1e-3), got {tx!r}")

    def init(key: Array, network: Network, x: Array) -> State:
        _keys.check(key)
        params, extra = _draw(network, jax.random.fold_in(key, 0), x)
        return State(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.fold_in(key, 1),
            params=params,
            extra=extra,
            opt_state=tx.init(params),
            network=network,
        )

    def update(state: State, batch: Batch) -> tuple[State, Metrics]:
        _check(batch)
        key = jax.random.fold_in(state.key, state.step)

        def loss(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
            return objective(key, state.network, params, state.extra, batch)

        value_and_grad = parallel.value_and_grad(loss)
        (value, (extra, metrics)), grads = value_and_grad(state.params, weight=jnp.sum(batch.mask))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {"loss": value, **metrics, "gradient_norm": optax.tree.norm(grads)}
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            extra=extra,
            opt_state=opt_state,
        )
        return new, metrics

    return init, update
