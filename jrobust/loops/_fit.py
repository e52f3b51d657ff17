"""Training over epochs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from jrobust.checkpoint import Checkpoints
from jrobust.data import Dataset, Source
from jrobust.data._stream import order as _order
from jrobust.data._stream import reads
from jrobust.loops._folder import Folder, located
from jrobust.loops._lanes import (
    Bar,
    check_count,
    check_data,
    check_shared,
    lane_count,
    loop,
    rows,
    surroundings,
)
from jrobust.loops._programs import Clock, Job, Programs
from jrobust.models import Bound, Network
from jrobust.training import (
    SWA,
    Averaging,
    Batch,
    Objective,
    State,
    guarded,
    step,
    update_statistics,
)
from jrobust.training._averaging import compile_statistics

Array = jax.Array

# Examples of a source that are checked before any compute.
_SAMPLE = 128

# Seconds between checkpoints, and after how many updates several processes look at the clock.
_PATIENCE, _LOOK = 30.0, 50

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
    """A training run, finished or diverged.

    Attributes:
        state: after the last update.
        last: ``(params, extra)`` to use after the last epoch: the averaged weights where the run
            averages, with their own batch-norm statistics.
        best: the same of the epoch with the highest validation metric (the earliest of equals); of
            the last epoch when there was no validation.
        best_epoch: that epoch, from 1; 0 if none was finished.
        history: one dict for each epoch: means of the objective's metrics, ``validation``.
        configuration: the effective configuration.
        seconds: wall time that this process spent in ``compile``, ``run`` and ``other``.
        resumed: updates that an interrupted or finished run in the directory had made already.
    """

    state: State
    last: tuple[Any, Any]
    best: tuple[Any, Any]
    best_epoch: int
    history: list[dict[str, float]]
    configuration: dict[str, Any]
    seconds: dict[str, float]
    resumed: int = 0

    @property
    def model(self) -> Bound:
        """The best weights as a ``logits_fn``."""
        return self.state.network.bind(*self.best)

    @property
    def last_model(self) -> Bound:
        """The last weights as a ``logits_fn``."""
        return self.state.network.bind(*self.last)


class Diverged(FloatingPointError):
    """Training left the finite numbers.

    Attributes:
        report: of the run up to the last good update; ``report.state`` is the state after it.
    """

    def __init__(self, message: str, report: FitReport) -> None:
        super().__init__(message)
        self.report = report


def _check(
    key: Array,
    network: Network,
    objective: Objective,
    train: Dataset | Source,
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
    # Of a source, what can be told from a few examples; the others are checked when they are read.
    sample = train[:_SAMPLE].read() if isinstance(train, Source) else train
    check_data(sample, "train")
    sets: list[tuple[Dataset, Any]] = [(sample, objective)]
    if validation is None and validate is not None:
        raise ValueError("validate= is a metric of validation examples: pass validation= too")
    if validation is not None:
        check_data(validation, "validation")
        if validate is not None and (isinstance(validate, type) or not callable(validate)):
            raise TypeError(f"validate must be a metric such as CleanAccuracy(), got {validate!r}")
        if validation.x.shape[1:] != sample.x.shape[1:]:
            raise ValueError(
                f"validation examples have shape {validation.x.shape[1:]}, training examples "
                f"{sample.x.shape[1:]}"
            )
        sets.append((validation, validate))
        shared = np.intersect1d(train.id, validation.id)
        if len(shared):
            raise ValueError(
                f"{len(shared)} example ids are in both train and validation (first {shared[0]}): "
                "give the sets distinct ids"
            )
    first = jnp.asarray(sample.x[:1])
    abstract = jax.eval_shape(network.init, key, first)
    classes = _run.count_classes(network.bind(*abstract), first)
    if isinstance(train, Source) and train.classes > classes:
        raise ValueError(f"{train.name} has {train.classes} classes, the network {classes}")
    for data, use in sets:
        _run.check_labels("y", data.y, classes)
        check_shared(use, data)
        if hasattr(use, "check"):
            use.check(data.x, data.y, classes)


class _Fit:
    """See :func:`fit`."""

    def __init__(
        self,
        key: Array,
        network: Network,
        objective: Objective,
        tx: optax.GradientTransformation,
        train: Dataset | Source,
        *,
        epochs: int,
        batch_size: int = 128,
        accumulate: int = 1,
        average: Averaging | None = None,
        validation: Dataset | None = None,
        validate: Validate | None = None,
        save_every: int | None = None,
        directory: Any = None,
        resume: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        self._init, update = step(objective, tx, average=average, accumulate=accumulate)
        self._update = guarded(update)
        _check(key, network, objective, train, epochs, validation, validate)
        if save_every is not None:
            check_count("save_every", save_every)
            if directory is None:
                raise ValueError("save_every= writes checkpoints: pass directory= too")
        self._mesh = parallel.automatic(mesh)
        # Of fewer examples than a batch, fillers make whole parts.
        unit = math.lcm(accumulate, self._mesh.size)
        self._lanes = lane_count(batch_size, -(-len(train) // unit) * unit, self._mesh)
        self._key, self._network, self._epochs = key, network, epochs
        self._train, self._validation = train, validation
        self._validate: Validate = CleanAccuracy() if validate is None else validate
        self._average, self._save_every = average, save_every
        self._directory, self._resume, self._clock = located(directory), resume, Clock()
        self._programs = Programs(lambda _: self._jobs, self._lanes, self._mesh, self._clock)
        self._held = jax.random.fold_in(key, 2)
        self._configuration = {
            "objective": describe(objective),
            "epochs": epochs,
            "batch_size": self._lanes,
            "accumulate": accumulate,
            "average": describe(average),
            "examples": len(train),
            "validate": None if validation is None else describe(self._validate),
            **surroundings(key, self._mesh),
        }

    def _batches(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        """Batches of rows of the training data, and which of them count."""
        found = reads(self._train, [index for index, _ in pieces])
        for arrays, (_, mask) in zip(found, pieces):
            yield Batch(*map(jnp.asarray, (*arrays, mask)))

    @functools.cached_property
    def _state(self) -> State:
        """Before the first update, on every device."""
        with self._clock.measure("compile"):
            x, _, _ = self._train.rows(np.arange(1))
            state = self._init(self._key, self._network, jnp.asarray(x))
            return parallel.replicate(state, self._mesh)

    @functools.cached_property
    def _jobs(self) -> dict[str, Job]:
        (example,) = self._batches([next(rows(np.arange(len(self._train)), self._lanes))])
        jobs = {
            "update": Job(
                self._update,
                (self._state, jnp.asarray(True), example),
                in_axes=(None, None, 0),
                out_axes=None,
                backend="jit",
                donate_argnums=(0,),
            )
        }
        if self._validation is not None:
            index = np.resize(np.arange(len(self._validation)), self._width)
            model = self._network.bind(*self._state.weights)
            args = (self._held, model, *map(jnp.asarray, self._validation.rows(index)))
            validate = self._validate  # alone: what is compiled stays, and the data would with it
            out = jax.eval_shape(validate, *args)
            if getattr(out, "shape", None) != (self._width,):
                raise ValueError(
                    f"validate must return one value for each of {self._width} examples, got {out}"
                )
            axes = (None, None, 0, 0, 0)
            jobs["validate"] = Job(lambda *args: validate(*args), args, in_axes=axes)
        return jobs

    def warm_up(self) -> dict[str, float]:
        seconds = self._programs.seconds()
        if isinstance(self._average, SWA):
            begin = time.perf_counter()
            x, _, _ = self._train.rows(self._whole_batches[0])
            params, extra = parallel.local(self._state.weights)
            compile_statistics(self._network, params, extra, self._held, jnp.asarray(x))
            seconds["statistics"] = time.perf_counter() - begin
        return seconds

    @functools.cached_property
    def _whole_batches(self) -> list[np.ndarray]:
        """Rows of the training data, for batch-norm statistics."""
        # Shuffled, for batches of a sorted data set vary less; in the order of no epoch.
        everything = _order(self._key, 0, len(self._train))
        pieces = rows(everything, self._lanes)
        return [index for index, mask in pieces if mask.all()] or [everything]

    def _identity(self) -> dict[str, str]:
        train = self._train
        if isinstance(train, Source):  # too much to be read for this
            sets: list[Any] = [(np.array(train.digest), train.id)]
        else:
            sets = [(train.x, train.y, train.id)]
        if (held := self._validation) is not None:
            sets.append((held.x, held.y, held.id))
        return self._programs.identity(sets, self._state)

    def events(self) -> Iterator[FitEvent]:
        folder = Folder(self._directory, self._configuration, self._identity, resume=self._resume)
        with contextlib.ExitStack() as stack:
            checkpoints = None
            if folder.directory is not None:
                checkpoints = stack.enter_context(Checkpoints(folder.directory / "checkpoints"))
            yield from self._run(folder, checkpoints)

    def _run(self, folder: Folder, checkpoints: Checkpoints | None) -> Iterator[FitEvent]:
        clock, total = self._clock, len(self._train)
        # Copied, because the first update takes the buffers of the state.
        best = jax.tree.map(jnp.copy, self._state.weights)
        run = _Progress(self._state, jnp.asarray(True), best)
        if checkpoints is not None and checkpoints.latest is not None:
            (run.state, run.best), about = checkpoints.load((run.state, run.best))
            run.account = _Account(**about)
        account, resumed = run.account, run.account.updates
        if account.epoch > self._epochs:
            raise ValueError(
                f"{folder.directory} holds a run of {account.epoch} epochs, more than the "
                f"{self._epochs} that are asked for; start over with resume=False"
            )

        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if checkpoints is not None and checkpoints.latest != account.updates:
                about = dataclasses.asdict(account)
                checkpoints.save(account.updates, (run.state, run.best), about)
                saved = time.monotonic()

        def due(updates: int) -> bool:
            """Whether to save inside an epoch, once this many updates have been made."""
            look = _LOOK if jax.process_count() > 1 else 1
            if checkpoints is None or updates % (self._save_every or look):
                return False
            return self._save_every is not None or late()

        def late() -> bool:
            return parallel.agree(time.monotonic() - saved > _PATIENCE)

        def report(last: Any) -> FitReport:
            state, last, best = parallel.local((run.state, last, run.best))
            return FitReport(
                state=state,
                last=last,
                best=best,
                best_epoch=account.best_epoch,
                history=list(account.history),
                configuration=folder.configuration,
                seconds=clock.total(),
                resumed=resumed,
            )

        def check(what: str | None) -> None:
            if what is not None:
                save()
                raise Diverged(
                    f"training left the finite numbers: {what}. The last good state is in the "
                    "report of this error, and in the checkpoints of the directory if there is "
                    "one; lower the learning rate or clip gradients (optax.clip_by_global_norm)",
                    report(self._weights(run.state)),
                )

        for epoch, means in enumerate(account.history, 1):
            folder.metrics(epoch=epoch, **means)
        if account.epoch == self._epochs:
            last = self._weights(run.state)
            yield FitEvent(self._epochs, account.history[-1], run.state, report(last))
            return
        programs = self._programs.compiled()
        # What they were compiled for: a resumed run has a state of its own.
        del self._jobs, self._state
        while account.epoch < self._epochs:
            pieces = list(rows(_order(self._key, account.epoch + 1, total), self._lanes))
            left = pieces[account.position :]
            for batch, (_, mask) in zip(self._batches(left), left):
                with clock.measure("run"):
                    run.update(programs["update"], batch, int(mask.sum()))
                    # One update behind, so that the device need not wait for the host.
                    check(run.collect(keep=1))
                    if account.position + 1 < len(pieces) and due(account.updates + 1):
                        check(run.collect())
                        save()
            with clock.measure("run"):
                check(run.collect())
                means = {name: value / total for name, value in account.totals.items()}
                # Copied, because the next update takes the state's buffers.
                last = jax.tree.map(jnp.copy, self._weights(run.state))
                if self._validation is not None:
                    means["validation"] = self._score(programs["validate"], last)
                    if not math.isfinite(means["validation"]):
                        check(f"validation in epoch {account.epoch + 1} gave {means}")
            score = means.get("validation", math.inf)
            if self._validation is None or not account.best_epoch or score > account.best_score:
                account.best_score, account.best_epoch = score, account.epoch + 1
                run.best = last
            account.end_epoch(means)
            if account.epoch == self._epochs or self._save_every or late():
                save()
            folder.metrics(epoch=account.epoch, **means)
            finished = report(last) if account.epoch == self._epochs else None
            yield FitEvent(account.epoch, means, run.state, finished)

    def _weights(self, state: State) -> tuple[Any, Any]:
        """What is validated and returned."""
        if not isinstance(self._average, SWA):
            return state.weights
        params, extra = parallel.local(state.weights)
        batches = (jnp.asarray(x) for x, _, _ in reads(self._train, self._whole_batches))
        extra = update_statistics(self._network, params, extra, self._held, batches)
        return parallel.replicate((params, extra), self._mesh)

    @property
    def _width(self) -> int:
        assert self._validation is not None
        return lane_count(self._lanes, len(self._validation), self._mesh)

    def _score(self, program: Any, weights: tuple[Any, Any]) -> float:
        data = self._validation
        assert data is not None
        model = self._network.bind(*weights)
        hits = [
            parallel.fetch(program(self._held, model, *map(jnp.asarray, data.rows(index))))[mask]
            for index, mask in rows(np.arange(len(data)), self._width)
        ]
        return float(np.mean(np.concatenate(hits), dtype=np.float64))


@dataclasses.dataclass
class _Account:
    """How far a run is, as plain numbers."""

    updates: int = 0  # made in all
    epoch: int = 0  # finished
    position: int = 0  # updates made in the epoch after that
    totals: dict[str, float] = dataclasses.field(default_factory=dict)  # of its metrics
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best_score: float = 0.0

    def end_epoch(self, means: dict[str, float]) -> None:
        self.history.append(means)
        self.epoch, self.position, self.totals = self.epoch + 1, 0, {}


@dataclasses.dataclass
class _Progress:
    """A run on its way: arrays, numbers, and updates whose metrics are still on the device."""

    state: State
    alive: Array
    best: tuple[Any, Any]
    account: _Account = dataclasses.field(default_factory=_Account)
    pending: list[tuple[Any, Array, int]] = dataclasses.field(default_factory=list)

    def update(self, program: Any, batch: Batch, weight: int) -> None:
        (self.state, self.alive), metrics = program(self.state, self.alive, batch)
        self.pending.append((metrics, self.alive, weight))

    def collect(self, keep: int = 0) -> str | None:
        """Fetch the metrics of all but the last ``keep`` updates; what went wrong, if it did."""
        account = self.account
        while len(self.pending) > keep:
            metrics, alive, weight = self.pending.pop(0)
            values = {name: float(value) for name, value in metrics.items()}
            if not bool(alive):
                return f"update {account.updates + 1} (epoch {account.epoch + 1}) gave {values}"
            account.updates += 1
            account.position += 1
            for name, value in values.items():
                account.totals[name] = account.totals.get(name, 0.0) + value * weight
        return None


@loop(_Fit)
def fit(
    key: Array,
    network: Network,
    objective: Objective,
    tx: optax.GradientTransformation,
    train: Dataset | Source,
    *,
    epochs: int,
    batch_size: int = 128,
    accumulate: int = 1,
    average: Averaging | None = None,
    validation: Dataset | None = None,
    validate: Validate | None = None,
    save_every: int | None = None,
    directory: Any = None,
    resume: bool = True,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> FitReport:
    """Train a network on an objective.

    Every epoch sees each example once, in an order that depends on the key and the epoch alone. The
    last batch is padded to the one compiled shape with examples from the front of the epoch, which
    do not count in the loss (a batch-norm layer does see them). ``fit.iter`` takes the same
    arguments but ``progress`` and yields a :class:`FitEvent` after every epoch; its ``state`` is
    donated to the next step, so copy what you keep. ``fit.warm_up`` only compiles.

    A run with a directory may be killed at any moment: the same call goes on behind the last
    checkpoint, to the same parameters and metrics, bit for bit on the same number of devices. It
    is the same call if data, key, settings, initial variables and the traced programs (network,
    objective, optimiser) are the same; ``epochs`` may grow.

    Args:
        key: one typed key: initialisation, order, noise and validation all follow from it.
        network: ``jrobust.models.network(module)``.
        objective: what to minimise, from ``jrobust.training``.
        tx: optax transformation.
        train: training examples, a ``Dataset`` of float32 or a ``Source``, whose batches threads
            read ahead of the device; one thing differs: a run in a directory knows a source by
            its ``digest`` and its ids, not by its content.
        epochs: passes over ``train``.
        batch_size: examples in a step.
        accumulate: parts into which a batch is cut to save memory; see ``training.step``.
        average: weight averaging, ``training.EMA()`` or ``training.SWA(...)``: the averaged weights
            are validated and returned.
        validation: held-out examples with ids of their own; the best epoch is chosen on them.
        validate: metric of the validation examples, higher is better: :class:`CleanAccuracy` when
            None, :class:`RobustAccuracy`, :class:`NoisyAccuracy`, or any function
            ``(key, logits_fn, x, y, ids) -> (B,)``.
        save_every: updates between checkpoints, which are written at the end of an epoch too. When
            None, one every half minute or so, and at the end.
        directory: where to write ``metrics.jsonl``, ``configuration.json`` and ``checkpoints/``.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
            Batch-norm sees the whole batch, however many devices share it.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, for settings and data that cannot be right; if
            another run is in the directory, or another process at work there.
        Diverged: at the first update that gives a non-finite loss, gradient or parameter. It is
            not made; the error's ``report`` and the directory hold the state before it.
    """
    events = fit.iter(
        key,
        network,
        objective,
        tx,
        train,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        average=average,
        validation=validation,
        validate=validate,
        save_every=save_every,
        directory=directory,
        resume=resume,
        mesh=mesh,
    )
    with Bar(progress, "epoch") as bar:
        for event in events:
            bar.update(type(objective).__name__, event.epoch, epochs, **event.metrics)
    assert event.report is not None
    return event.report
