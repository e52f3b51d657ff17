"""Training over epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jrobust import _run, parallel
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, describe
from jrobust.attacks import Attack
from jrobust.attacks._base import forward, succeeds
from jrobust.data import Dataset
from jrobust.loops._lanes import (
    Bar,
    Clock,
    Files,
    check_count,
    check_data,
    check_shared,
    lane_count,
    rows,
    surroundings,
    with_iter,
)
from jrobust.models import Bound, Network
from jrobust.training import Batch, Objective, State, step

Array = jax.Array

# A metric over held-out examples: validate(key, logits_fn, x, y, ids) -> (B,) values to average.
Validate = Callable[[Array, Any, Array, Array, Array], Array]


def _correct(logits_fn: Any, x: Array, y: Array) -> Array:
    """(B,) bool; a logit that is not finite is never correct."""
    return ~succeeds(forward(logits_fn, x), y, jnp.full_like(y, -1))


@algorithm
class CleanAccuracy:
    """Validation metric: whether each clean input is classified correctly."""

    def __call__(self, key: Array, logits_fn: Any, x: Array, y: Array, ids: Array) -> Array:
        """(B,) bool."""
        return _correct(logits_fn, x, y)


@algorithm
class RobustAccuracy:
    """Validation metric: whether each input is classified correctly and withstands ``attack``."""

    attack: Attack

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where the attack's settings make no sense for ``x``."""
        self.attack.check(x, y, classes)

    def __call__(self, key: Array, logits_fn: Any, x: Array, y: Array, ids: Array) -> Array:
        """(B,) bool."""
        found = self.attack(key, logits_fn, x, y, ids=ids)
        return _correct(logits_fn, x, y) & ~found.success


@algorithm
class NoisyAccuracy:
    """Validation metric: whether one Gaussian-noised copy of each input is classified correctly.

    Args:
        sigma: standard deviation in the units of the input.
    """

    sigma: Any

    def __call__(self, key: Array, logits_fn: Any, x: Array, y: Array, ids: Array) -> Array:
        """(B,) bool."""
        draw = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))
        return _correct(logits_fn, x + self.sigma * draw(_keys.examples(key, ids)), y)


class FitEvent(NamedTuple):
    """Yielded after every epoch; ``report`` is set on the last.

    Attributes:
        epoch: epochs finished, from 1.
        metrics: means over the epoch's examples, and ``validation``.
        state: training state after the epoch.
        report: what :func:`fit` returns, on the last event.
    """

    epoch: int
    metrics: dict[str, float]
    state: State
    report: FitReport | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FitReport:
    """A finished training run.

    Attributes:
        state: after the last epoch.
        best: ``(params, extra)`` of the epoch with the highest validation metric (the earliest of
            equals); of the last epoch when there was no validation.
        best_epoch: that epoch, from 1.
        history: one dict for each epoch: means of the objective's metrics, ``validation``.
        configuration: the effective configuration.
        seconds: wall time spent in ``compile``, ``run`` and ``other``.
    """

    state: State
    best: tuple[Any, Any]
    best_epoch: int
    history: list[dict[str, float]]
    configuration: dict[str, Any]
    seconds: dict[str, float]

    @property
    def model(self) -> Bound:
        """The best weights as a ``logits_fn``."""
        return self.state.network.bind(*self.best)

    @property
    def last_model(self) -> Bound:
        """The last weights as a ``logits_fn``."""
        return self.state.network.bind(self.state.params, self.state.extra)


def _order(key: Array, epoch: int, total: int) -> np.ndarray:
    """The order of an epoch: a function of the key and the epoch alone."""
    seed = [int(word) for word in jax.random.key_data(key).ravel()]
    return np.random.default_rng([*seed, epoch]).permutation(total)


def _check(
    key: Array,
    network: Network,
    objective: Objective,
    train: Dataset,
    epochs: int,
    validation: Dataset | None,
    validate: Validate | None,
) -> None:
    _keys.check(key)
    if not isinstance(network, Network):
        raise TypeError(
            f"network must be a jrobust.models.Network, got {type(network).__name__}: "
            "make one with jrobust.models.network(module)"
        )
    check_count("epochs", epochs)
    check_data(train, "train")
    sets: list[tuple[Dataset, Any]] = [(train, objective)]
    if validation is None and validate is not None:
        raise ValueError("validate= is a metric of validation examples: pass validation= too")
    if validation is not None:
        check_data(validation, "validation")
        if validate is not None and (isinstance(validate, type) or not callable(validate)):
            raise TypeError(f"validate must be a metric such as CleanAccuracy(), got {validate!r}")
        if validation.x.shape[1:] != train.x.shape[1:]:
            raise ValueError(
                f"validation examples have shape {validation.x.shape[1:]}, training examples "
                f"{train.x.shape[1:]}"
            )
        sets.append((validation, validate))
        shared = np.intersect1d(train.id, validation.id)
        if len(shared):
            raise ValueError(
                f"{len(shared)} example ids are in both train and validation (first {shared[0]}): "
                "give the sets distinct ids"
            )
    abstract = jax.eval_shape(network.init, key, jnp.asarray(train.x[:1]))
    classes = _run.count_classes(network.bind(*abstract), jnp.asarray(train.x[:1]))
    for data, use in sets:
        _run.check_labels("y", data.y, classes)
        check_shared(use, data)
        if hasattr(use, "check"):
            use.check(data.x, data.y, classes)


def _iterate(
    key: Array,
    network: Network,
    objective: Objective,
    tx: optax.GradientTransformation,
    train: Dataset,
    *,
    epochs: int,
    batch_size: int = 128,
    validation: Dataset | None = None,
    validate: Validate | None = None,
    directory: Any = None,
    mesh: Mesh | None = None,
) -> Iterator[FitEvent]:
    """See :func:`fit`."""
    init, update = step(objective, tx)
    _check(key, network, objective, train, epochs, validation, validate)
    validate = CleanAccuracy() if validate is None else validate
    mesh = parallel.mesh() if mesh is None else mesh
    lanes = lane_count(batch_size, len(train), mesh)
    clock, files = Clock(), Files(directory)
    with clock.measure("compile"):
        state = init(key, network, jnp.asarray(train.x[:1]))

    def batch(index: np.ndarray, mask: np.ndarray) -> Batch:
        y = train.y[index].astype(np.int32)
        arrays = (train.x[index], y, train.id[index], mask)
        return Batch(*(jnp.asarray(a) for a in arrays))

    def lane(data: Dataset, index: np.ndarray) -> tuple[Array, Array, Array]:
        arrays = (data.x[index], data.y[index].astype(np.int32), data.id[index])
        return tuple(jnp.asarray(a) for a in arrays)  # type: ignore[return-value]

    first = np.resize(np.arange(len(train)), lanes)
    train_step = clock.compiled(
        update,
        state,
        batch(first, first >= 0),
        mesh=mesh,
        backend="jit",
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
    )
    score = None
    if validation is not None:
        width = lane_count(batch_size, len(validation), mesh)
        example = lane(validation, np.resize(np.arange(len(validation)), width))
        held = jax.random.fold_in(key, 2)
        model = network.bind(state.params, state.extra)
        out = jax.eval_shape(validate, held, model, *example)
        if getattr(out, "shape", None) != (width,):
            raise ValueError(
                f"validate must return one value for each of {width} examples, got {out}"
            )
        score = clock.compiled(
            lambda *args: validate(*args),
            held,
            model,
            *example,
            mesh=mesh,
            in_axes=(None, None, 0, 0, 0),
        )

    configuration = {
        "objective": describe(objective),
        "epochs": epochs,
        "batch_size": lanes,
        "examples": len(train),
        "validate": describe(validate) if validation is not None else None,
        **surroundings(key, mesh),
    }
    files.json("configuration.json", configuration)
    history: list[dict[str, float]] = []
    best, best_epoch, best_score = (None, None), 0, -np.inf
    for epoch in range(1, epochs + 1):
        totals: dict[str, float] = {}
        for index, mask in rows(_order(key, epoch, len(train)), lanes):
            state, metrics = train_step(state, batch(index, mask))
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value) * int(mask.sum())
        means = {name: value / len(train) for name, value in totals.items()}
        if score is not None and validation is not None:
            model = network.bind(state.params, state.extra)
            held = jax.random.fold_in(key, 2)
            hits = [
                np.asarray(score(held, model, *lane(validation, index)))[mask]
                for index, mask in rows(np.arange(len(validation)), width)
            ]
            means["validation"] = float(np.mean(np.concatenate(hits)))
        if not all(np.isfinite(value) for value in means.values()):
            raise FloatingPointError(
                f"training left the finite numbers in epoch {epoch}: {means}; lower the learning "
                "rate or clip gradients (optax.clip_by_global_norm)"
            )
        if score is None or means["validation"] > best_score:
            best_score, best_epoch = means.get("validation", -np.inf), epoch
            # The next step donates the state's buffers.
            best = jax.tree.map(jnp.copy, (state.params, state.extra))
        history.append(means)
        files.metrics(epoch=epoch, **means)
        report = None
        if epoch == epochs:
            report = FitReport(state, best, best_epoch, history, configuration, clock.total())
        yield FitEvent(epoch, means, state, report)


@with_iter(_iterate)
def fit(
    key: Array,
    network: Network,
    objective: Objective,
    tx: optax.GradientTransformation,
    train: Dataset,
    *,
    epochs: int,
    batch_size: int = 128,
    validation: Dataset | None = None,
    validate: Validate | None = None,
    directory: Any = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> FitReport:
    """Train a network on an objective.

    Every epoch sees each example once, in an order that depends on the key and the epoch alone. The
    last batch is padded to the one compiled shape with examples from the front of the epoch, which
    do not count in the loss (a batch-norm layer does see them). ``fit.iter`` takes the same
    arguments but ``progress`` and yields a :class:`FitEvent` after every epoch; its ``state`` is
    donated to the next step, so copy what you keep.

    Args:
        key: one typed key: initialisation, order, noise and validation all follow from it.
        network: ``jrobust.models.network(module)``.
        objective: what to minimise, from ``jrobust.training``.
        tx: optax transformation.
        train: training examples, float32.
        epochs: passes over ``train``.
        batch_size: examples in a step.
        validation: held-out examples with ids of their own; the best epoch is chosen on them.
        validate: metric of the validation examples, higher is better: :class:`CleanAccuracy` when
            None, :class:`RobustAccuracy`, :class:`NoisyAccuracy`, or any function
            ``(key, logits_fn, x, y, ids) -> (B,)``.
        directory: where to write ``metrics.jsonl`` and ``configuration.json``.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
            Batch-norm sees the whole batch, however many devices share it.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, for settings and data that cannot be right.
        FloatingPointError: when an epoch's metrics are not finite.
    """
    with Bar(progress, "epoch") as bar:
        for event in _iterate(
            key,
            network,
            objective,
            tx,
            train,
            epochs=epochs,
            batch_size=batch_size,
            validation=validation,
            validate=validate,
            directory=directory,
            mesh=mesh,
        ):
            bar.update(type(objective).__name__, event.epoch, epochs, **event.metrics)
    assert event.report is not None
    return event.report
