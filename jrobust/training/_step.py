"""One optimiser step over an objective, as a pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jrobust import drive, parallel
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.models import Network
from jrobust.training._averaging import Averaging, widened

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

    It may change over training. Where the objective, or a part of it (a node of its pytree), has a
    method ``at_step(state)``, every update puts what that returns in its place, traced with the
    :class:`State` that the update begins with; see :class:`Scheduled` and :class:`RedrawnMask`.
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
        average: what the :class:`Averaging` of the step carries, None without one.
        network: the model; static, so equal modules share one compilation.
    """

    step: Array
    key: Array
    params: Any
    extra: Any
    opt_state: Any
    average: Any = None
    network: Network = static(kw_only=True)

    @property
    def weights(self) -> tuple[Any, Any]:
        """``(params, extra)`` to validate and use: averaged ones if there is an average."""
        if self.average is None:
            return self.params, self.extra
        return Averaging.weights(self.average)


def current(objective: Objective, state: State) -> Objective:
    """The objective of the update that begins with ``state``."""

    def changes(part: Any) -> bool:
        return hasattr(part, "at_step")

    return jax.tree.map(
        lambda part: part.at_step(state) if changes(part) else part, objective, is_leaf=changes
    )


@jax.jit
def _draw(network: Network, key: Array, x: Array) -> tuple[Any, Any]:
    """Compiled once for each network: this takes longer to compile than a training step."""
    # Weak types (of jnp.full(3, 0.5)) end with the first update, which would then compile twice.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), network.init(key, x))


Init = Callable[[Array, Network, Array], State]
Update = Callable[[State, Batch], tuple[State, Metrics]]
Guarded = Callable[[State, Array, Batch], tuple[tuple[State, Array], Metrics]]


def _accumulated(
    loss: Callable[..., Any], params: Any, extra: Any, batch: Batch, pieces: int
) -> tuple[Any, Any]:
    """``value_and_grad(loss)`` of a batch, of which only a piece is in memory at a time."""
    rows = batch.x.shape[0]
    if rows % pieces:
        raise ValueError(
            f"a batch of {rows} rows (on one device, under shard_map and pmap) cannot be cut into "
            f"accumulate={pieces} equal parts: choose a divisor, or pad the batch with rows that "
            "mask leaves out"
        )
    # Piece j holds rows j, j + pieces, ...: split over devices, each keeps its own rows.
    cut = jax.tree.map(lambda leaf: leaf.reshape(-1, pieces, *leaf.shape[1:]), batch)
    weight = jnp.sum(batch.mask)

    def part(params: Any, extra: Any, piece: Batch) -> tuple[Array, tuple[Any, Metrics]]:
        # The share of the rows that count in this piece, among those of the device; the weight
        # below brings in the other devices. Pieces may then simply be summed.
        share = jnp.sum(piece.mask) / jnp.maximum(weight, 1)
        # A mean over no rows may be no number: a piece in which none counts is of all its rows.
        piece = piece._replace(mask=piece.mask | (share == 0))
        value, (extra, metrics) = loss(params, extra, piece)
        return share * value, (extra, jax.tree.map(lambda metric: share * metric, metrics))

    def terms(j: Array, extra: Any) -> tuple[Any, Any]:
        piece = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, j, axis=1, keepdims=False), cut
        )
        value_and_grad = parallel.value_and_grad(part)
        (value, (extra, metrics)), grads = value_and_grad(params, extra, piece, weight=weight)
        return (value, metrics, grads), extra

    def add(j: Array, carry: Any) -> Any:
        sums, extra = carry
        new, extra = terms(j, extra)
        return jax.tree.map(lambda total, term: total + term.astype(total.dtype), sums, new), extra

    def zero(term: Any) -> Array:
        return jnp.zeros(term.shape, jnp.promote_types(term.dtype, jnp.float32))

    shapes, _ = jax.eval_shape(terms, jnp.int32(0), extra)
    sums, extra = drive.loop(pieces, add, (jax.tree.map(zero, shapes), extra))
    value, metrics, grads = jax.tree.map(lambda total, t: total.astype(t.dtype), sums, shapes)
    return (value, (extra, metrics)), grads


def step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    average: Averaging | None = None,
    accumulate: int = 1,
) -> tuple[Init, Update]:
    """A training step as two pure functions, ``(init, update)``, in the manner of optax.

    ``init(key, network, x) -> State`` draws parameters for inputs shaped like ``x`` (B, ...).
    ``update(state, batch) -> (state, metrics)`` makes one step; its state may be donated to
    ``jax.jit``. ``metrics`` are the objective's own and ``loss`` and ``gradient_norm``.

    Args:
        objective: see :class:`Objective`.
        tx: an optax transformation, learning-rate schedule included.
        average: :class:`EMA` or :class:`SWA`, kept in ``state.average``; use ``state.weights``.
        accumulate: parts into which the batch is cut, one after the other in memory. Loss,
            gradient and metrics are those of the whole batch, the examples' noise too; there is
            one optimiser step. Two things differ: batch-norm normalises each part by itself and
            moves its running averages once for each, and dropout draws other masks.

    Raises:
        TypeError: if ``objective`` is not an instance of an objective, ``tx`` not of optax,
            ``average`` not of an averaging or ``accumulate`` not an integer.
        ValueError: for settings out of range; in ``update``, for a batch that is malformed or
            cannot be cut into ``accumulate`` equal parts.
    """
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(f"objective must be an instance such as Standard(), got {objective!r}")
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax transformation such as optax.adam(1e-3), got {tx!r}")
    if not isinstance(accumulate, int) or isinstance(accumulate, bool):
        raise TypeError(f"accumulate must be an integer, got {accumulate!r}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be >= 1, got {accumulate}")
    if average is not None:
        if not isinstance(average, Averaging):
            raise TypeError(f"average must be an instance such as EMA(0.999), got {average!r}")
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(average)):
            average.check()

    def init(key: Array, network: Network, x: Array) -> State:
        _keys.check(key)
        params, extra = _draw(network, jax.random.fold_in(key, 0), x)
        return State(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.fold_in(key, 1),
            params=params,
            extra=extra,
            opt_state=tx.init(params),
            average=None if average is None else average.init(params, extra),
            network=network,
        )

    def updated(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        now = current(objective, state)

        def loss(params: Any, extra: Any, batch: Batch) -> tuple[Array, tuple[Any, Metrics]]:
            return now(key, state.network, params, extra, batch)

        whole = state.params, state.extra, batch
        if accumulate == 1:
            found = parallel.value_and_grad(loss)(*whole, weight=jnp.sum(batch.mask))
        else:
            found = _accumulated(loss, *whole, accumulate)
        (value, (extra, metrics)), grads = found
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        trailing = state.average
        if average is not None:
            trailing = average.update(trailing, params, extra, count)
        new = dataclasses.replace(
            state, step=count, params=params, extra=extra, opt_state=opt_state, average=trailing
        )
        # Squares of float16 overflow from 256 on.
        norm = optax.tree.norm(jax.tree.map(widened, grads))
        return new, {"loss": value, **metrics, "gradient_norm": norm}

    def update(state: State, batch: Batch) -> tuple[State, Metrics]:
        _check(batch)
        return parallel.by_state(updated, state, batch)

    return init, update


def guarded(update: Update) -> Guarded:
    """``update`` that stops at the first step that leaves the finite numbers; pure.

    ``guarded(update)(state, alive, batch) -> ((state, alive), metrics)``, ``alive`` a () bool
    array, at first ``jnp.array(True)``. A step counts if it finds ``alive`` set, its loss and
    gradient norm are finite, and so are all floats of the new ``params`` and ``extra``. Any other
    step returns the state as it was, to the bit, and ``alive`` cleared: from then on the state is
    the last good one, however late the caller looks at ``alive``. ``metrics`` are those of the
    update itself, whether it counted or not. State and ``alive`` may be donated.
    """

    def guard(state: State, alive: Array, batch: Batch) -> tuple[tuple[State, Array], Metrics]:
        new, metrics = update(state, batch)
        watched = (metrics["loss"], metrics["gradient_norm"], new.params, new.extra)
        finite = [
            jnp.all(jnp.isfinite(leaf))
            for leaf in jax.tree.leaves(watched)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        good = alive & jnp.all(jnp.stack(finite))
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        return (kept, good), metrics

    return guard
