"""Robust accuracy of a model over a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrobust import _run, drive, parallel
from jrobust import keys as _keys
from jrobust._algorithm import describe
from jrobust.attacks import Attack, AttackResult
from jrobust.attacks._base import forward
from jrobust.data import Dataset
from jrobust.loops import _identity
from jrobust.loops._folder import Arrays, Folder, stored_configuration
from jrobust.loops._lanes import (
    Bar,
    check_data,
    check_shared,
    lane_count,
    loop,
    rows,
    surroundings,
)
from jrobust.loops._programs import Clock, Job, Programs

_COLUMNS = (
    "id", "y", "prediction", "correct", "robust", "broken_by", "adversarial_prediction",
    "step", "loss", "distance", "forwards", "backwards",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        examples: per-example columns, each (N,): ``id``, ``y``, clean ``prediction`` (-1 where a
            logit is not finite), ``correct``, ``robust`` (correct and broken by no attack),
            ``broken_by`` (index into ``attacks``, -1 for none), ``adversarial_prediction``;
            ``step``, ``loss``, ``distance`` of the attack that broke it, else of the last one;
            ``forwards``, ``backwards`` over all attacks.
        x: (N, ...) the adversarial input where one was found, else the clean one.
        attacks: names of the attacks in the order in which they ran.
        standing: (attacks + 1,) examples that stood before the first and after each attack.
        non_finite: examples with a non-finite logit, clean or attacked; never counted as robust.
        near_ties: examples that an attack reported broken and the verifying forward pass of the
            same input, compiled as another program, did not. They count as robust.
        configuration: the effective configuration of everything that ran.
        seconds: wall time that this process spent in ``compile``, ``run`` and ``other``.
        resumed: batches that came from the directory of an interrupted or finished run.
    """

    examples: dict[str, np.ndarray]
    x: np.ndarray
    attacks: tuple[str, ...]
    standing: np.ndarray
    non_finite: int
    near_ties: int
    configuration: dict[str, Any]
    seconds: dict[str, float]
    resumed: int = 0

    @property
    def clean_accuracy(self) -> float:
        """Fraction of clean inputs classified correctly."""
        return float(np.mean(self.examples["correct"]))

    @property
    def robust_accuracy(self) -> float:
        """Fraction that no attack broke: an upper bound on the true robust accuracy."""
        return float(np.mean(self.examples["robust"]))

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows: accuracy before the first and after each attack."""
        total = len(self.examples["id"])
        names = ["clean", *self.attacks]
        return ["after", "accuracy", "standing", "of"], [
            [name, n / total, int(n), total] for name, n in zip(names, self.standing)
        ]


class EvaluationEvent(NamedTuple):
    """Yielded after every batch, and once more with the ``report``.

    Attributes:
        attack: name of the attack, or ``"clean"``; ``"done"`` on the last event.
        finished: examples it has been tried on, of ``total``.
        total: examples that stood before it.
        standing: examples of the data set that stand, those not yet tried included.
        report: what :func:`evaluate` returns, on the last event.
    """

    attack: str
    finished: int
    total: int
    standing: int
    report: EvaluationReport | None = None


def _predict(logits_fn: Any, x: jax.Array) -> jax.Array:
    """Classes (B,), -1 where a logit is not finite, so that no label equals it."""
    logits = forward(logits_fn, x)
    return jnp.where(jnp.all(jnp.isfinite(logits), -1), jnp.argmax(logits, -1), -1)


@functools.lru_cache
def _attack(index: int) -> Callable[..., AttackResult]:
    def lanes(attack: Attack, key: Any, fn: Any, x: Any, y: Any, ids: Any) -> AttackResult:
        keys = _keys.attack(_keys.examples(key, ids), index)
        return attack.result(drive.run(attack, fn, attack.init(keys, x, y)))

    return lanes


def _named(attacks: Attack | Sequence[Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    if isinstance(attacks, Attack):
        return {type(attacks).__name__: attacks}
    named: dict[str, Any] = {}
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif isinstance(attacks, Sequence):
        named = {f"{i + 1} {type(attack).__name__}": attack for i, attack in enumerate(attacks)}
    if not named or not all(isinstance(attack, Attack) for attack in named.values()):
        raise TypeError(f"attacks must be an attack, a list or a dict of attacks, got {attacks!r}")
    if not all(isinstance(name, str) for name in named) or "clean" in named:
        raise ValueError(f"attacks need names other than 'clean', got {list(named)}")
    return named


class _Evaluation:
    """See :func:`evaluate`."""

    def __init__(
        self,
        key: jax.Array,
        logits_fn: Any,
        data: Dataset,
        attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        directory: Any = None,
        resume: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        self._named = _named(attacks)
        self._mesh = parallel.mesh() if mesh is None else mesh
        check_data(data)
        self._data, self._key = data, key
        self._host, self._clock = drive.is_host(logits_fn), Clock()
        for attack in self._named.values():
            check_shared(attack, data)
            _run.check(attack, key, logits_fn, data.x, data.y, data.id)
        self._model = logits_fn if self._host else _run.as_pytree(logits_fn)
        self._attacks = [_run.strong(attack) for attack in self._named.values()]
        self._directory, self._resume = directory, resume
        planned = batch_size is not None or self._host
        if not planned and directory is not None and resume:
            # The lanes of an interrupted run are part of what it is.
            batch_size = stored_configuration(directory).get("batch_size")
            planned = batch_size is not None
        self._programs = Programs(
            self._jobs,
            lane_count(batch_size, len(data), self._mesh),
            self._mesh,
            self._clock,
            planned=planned,
            step=self._mesh.size,
            memory=memory,
        )

    def _lane(self, index: np.ndarray) -> tuple[jax.Array, ...]:
        data = self._data
        arrays = (data.x[index], data.y[index].astype(np.int32), data.id[index])
        return tuple(jnp.asarray(a) for a in arrays)

    def _jobs(self, lanes: int) -> dict[str, Job]:
        example = self._lane(np.resize(np.arange(len(self._data)), lanes))
        jobs = {"clean": Job(_predict, (self._model, example[0]), (None, 0))}
        for number, (name, attack) in enumerate(zip(self._named, self._attacks)):
            args = (attack, self._key, self._model, *example)
            jobs[name] = Job(_attack(number), args, (None, None, None, 0, 0, 0))
        return jobs

    def warm_up(self) -> dict[str, float]:
        return {} if self._host else self._programs.seconds()

    def _call(self, name: str, *args: Any) -> Any:
        """Run a program on this batch, compiled when the first batch needs it."""
        if self._host:
            names = list(self._named)
            run = _predict if name == "clean" else _attack(names.index(name))
        else:
            run = self._programs[name]
        with self._clock.measure("run"):
            return parallel.fetch(run(*args))

    def _classify(self, points: np.ndarray) -> np.ndarray:
        """Predictions (n,) for any number of points."""
        found = [np.zeros(0, np.int32)]
        # A black box is not asked about rows that only fill a batch.
        for piece, mask in rows(np.arange(len(points)), self._programs.size, fill=not self._host):
            found.append(self._call("clean", self._model, jnp.asarray(points[piece]))[mask])
        return np.concatenate(found)

    def _identity(self) -> dict[str, str]:
        sets = (self._data.x, self._data.y, self._data.id)
        if self._host:
            return {"data_sha256": _identity.arrays(sets)}
        return self._programs.identity(sets, self._model)

    def events(self) -> Iterator[EvaluationEvent]:
        data, named = self._data, self._named
        total, lanes = len(data), self._programs.plan()
        configuration = {
            "attacks": {name: describe(attack) for name, attack in named.items()},
            "batch_size": lanes,
            "examples": total,
            **surroundings(self._key, self._mesh),
        }
        folder = Folder(
            self._directory, configuration, self._identity, resume=self._resume, columns=_COLUMNS
        )
        x = np.array(data.x)
        zero = np.zeros(total, np.int32)
        table: dict[str, np.ndarray] = {
            "id": data.id, "y": data.y, "prediction": zero.copy(), "correct": zero > 0,
            "robust": zero > 0, "broken_by": zero - 1, "adversarial_prediction": zero.copy(),
            "step": zero - 1, "loss": np.full(total, np.nan, np.float32),
            "distance": np.zeros(total, np.float32), "forwards": zero.copy(),
            "backwards": zero.copy(),
        }  # fmt: skip

        def record(done: np.ndarray) -> None:
            folder.examples({name: column[done] for name, column in table.items()})

        def change(name: str, piece: np.ndarray, compute: Callable[[], Arrays]) -> Arrays:
            """The rows ``piece`` of the table as a batch leaves them, computed or read."""
            batch = folder.once(name, compute)
            for column in batch.keys() & table.keys():
                table[column][piece] = batch[column]
            return batch

        def predict(piece: np.ndarray) -> Arrays:
            prediction = self._classify(data.x[piece])
            correct = prediction == data.y[piece]
            return {
                "prediction": prediction, "adversarial_prediction": prediction,
                "correct": correct, "robust": correct,
            }  # fmt: skip

        done = 0
        for number, (piece, _) in enumerate(rows(np.arange(total), lanes, fill=False)):
            change(f"0-{number:06d}", piece, functools.partial(predict, piece))
            record(piece[~table["correct"][piece]])
            done += len(piece)
            yield EvaluationEvent("clean", done, total, int(table["robust"].sum()))
        standing = [int(table["robust"].sum())]
        folder.metrics(stage="clean", accuracy=standing[0] / total)

        def search(stage: int, piece: np.ndarray, fill: np.ndarray) -> Arrays:
            """Attack the examples ``piece``; ``fill`` are the rows of the whole batch."""
            name, attack = list(named)[stage], self._attacks[stage]
            found = self._call(name, attack, self._key, self._model, *self._lane(fill))
            found = jax.tree.map(lambda leaf: leaf[: len(piece)], found)
            # The verdict is a forward pass of exactly the input that is kept.
            claimed = np.flatnonzero(found.success)
            prediction = table["adversarial_prediction"][piece]
            prediction[claimed] = self._classify(found.x[claimed])
            robust = prediction == data.y[piece]
            return {
                "loss": found.loss,
                "distance": found.distance,
                "step": np.where(robust, -1, found.step),
                "forwards": table["forwards"][piece] + found.forwards,
                "backwards": table["backwards"][piece] + found.backwards,
                "adversarial_prediction": prediction,
                "robust": robust,
                "broken_by": np.where(robust, -1, stage).astype(np.int32),
                "x": found.x[~robust],
                "near_ties": np.sum(found.success & robust),
            }

        near_ties = 0
        for stage, name in enumerate(named):
            index, done = np.flatnonzero(table["robust"]), 0
            for number, (fill, mask) in enumerate(rows(index, lanes, fill=not self._host)):
                piece = fill[mask]
                batch = change(
                    f"{stage + 1}-{number:06d}",
                    piece,
                    functools.partial(search, stage, piece, fill),
                )
                broken = piece[~table["robust"][piece]]
                x[broken] = batch["x"]
                near_ties += int(batch["near_ties"])
                record(broken)
                done += len(piece)
                yield EvaluationEvent(name, done, len(index), int(table["robust"].sum()))
            standing.append(int(table["robust"].sum()))
            folder.metrics(stage=name, accuracy=standing[-1] / total)
        record(np.flatnonzero(table["robust"]))

        report = EvaluationReport(
            examples=table,
            x=x,
            attacks=tuple(named),
            standing=np.array(standing),
            non_finite=int(np.sum(table["adversarial_prediction"] < 0)),
            near_ties=near_ties,
            configuration=folder.configuration,
            seconds=self._clock.total(),
            resumed=folder.resumed,
        )
        folder.save("adversarial.npz", x=x, id=data.id)
        folder.finish(
            {
                "clean_accuracy": report.clean_accuracy,
                "robust_accuracy": report.robust_accuracy,
                "standing": dict(zip(["clean", *report.attacks], standing)),
                "non_finite": report.non_finite,
                "near_ties": report.near_ties,
                "seconds": report.seconds,
                "resumed": report.resumed,
            }
        )
        yield EvaluationEvent("done", total, total, standing[-1], report)


@loop(_Evaluation)
def evaluate(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
    *,
    batch_size: int | None = None,
    memory: int | None = None,
    directory: Any = None,
    resume: bool = True,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Clean accuracy, then attacks in order, each on the examples that still stand.

    Every batch is padded to one lane shape and compiled once for each attack, all attacks at the
    same time; a ``drive.Host`` is asked about the examples alone. An example counts as broken after
    a separate float32 forward pass of the very input that the attack returned. ``evaluate.iter``
    takes the same arguments but ``progress`` and yields an :class:`EvaluationEvent` after every
    batch; ``evaluate.warm_up`` only compiles.

    A run with a directory may be killed at any moment: the same call goes on behind the last
    finished batch, to the same report, bit for bit on the same number of devices, and returns the
    report of a finished run at once. It is the same call if data, key, settings, variables and the
    traced programs of model and attacks are the same; of a ``drive.Host`` nothing can be seen.

    Args:
        key: one typed key; an example's random numbers depend on it and on the example's id alone.
        logits_fn: (B, ...) -> (B, C); a bound model, a plain function or a ``drive.Host``.
        data: the examples.
        attacks: one attack, a list, or a dict from names to attacks.
        batch_size: lanes over all devices; results are bit-equal for equal lanes on a device,
            whatever the order of examples and the number of devices. When None, 128 on each device
            of a CPU and 512 on an accelerator, or fewer, as many as ``memory`` holds.
        memory: bytes to use on each device where ``batch_size`` is None; by default 90% of what is
            free there, on a CPU half.
        directory: where to write ``metrics.jsonl``, ``examples.csv`` (rows as examples finish),
            ``adversarial.npz``, ``configuration.json`` and ``report.json``; nowhere when None.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run` does; if another run is in
            the directory.
    """
    events = evaluate.iter(
        key,
        logits_fn,
        data,
        attacks,
        batch_size=batch_size,
        memory=memory,
        directory=directory,
        resume=resume,
        mesh=mesh,
    )
    with Bar(progress, "image") as bar:
        for event in events:
            if event.report is None:
                share = event.standing / len(data)
                bar.update(event.attack, event.finished, event.total, accuracy=share)
    assert event.report is not None
    return event.report
