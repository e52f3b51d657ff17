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
from jrobust.loops._lanes import (
    Bar,
    Clock,
    Files,
    check_data,
    check_shared,
    lane_count,
    rows,
    surroundings,
    with_iter,
)

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
        seconds: wall time spent in ``compile``, ``run`` and ``other``.
    """

    examples: dict[str, np.ndarray]
    x: np.ndarray
    attacks: tuple[str, ...]
    standing: np.ndarray
    non_finite: int
    near_ties: int
    configuration: dict[str, Any]
    seconds: dict[str, float]

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


def _iterate(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
    *,
    batch_size: int = 256,
    directory: Any = None,
    mesh: Mesh | None = None,
) -> Iterator[EvaluationEvent]:
    """See :func:`evaluate`."""
    named = _named(attacks)
    mesh = parallel.mesh() if mesh is None else mesh
    check_data(data)
    lanes, total = lane_count(batch_size, len(data), mesh), len(data)
    clock, host = Clock(), drive.is_host(logits_fn)
    for attack in named.values():
        check_shared(attack, data)
        _run.check(attack, key, logits_fn, data.x, data.y, data.id)
    files = Files(directory, _COLUMNS)
    configuration = {
        "attacks": {name: describe(attack) for name, attack in named.items()},
        "batch_size": lanes,
        "examples": total,
        **surroundings(key, mesh),
    }
    files.json("configuration.json", configuration)

    model = logits_fn if host else _run.as_pytree(logits_fn)

    def program(
        fn: Callable[..., Any], *args: Any, in_axes: tuple[int | None, ...]
    ) -> Callable[..., Any]:
        return fn if host else clock.compiled(fn, *args, mesh=mesh, in_axes=in_axes)

    def lane(index: np.ndarray, source: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        arrays = (source[index], data.y[index].astype(np.int32), data.id[index])
        return tuple(jnp.asarray(a) for a in arrays)  # type: ignore[return-value]

    index = np.arange(total)
    predict = program(_predict, model, lane(np.resize(index, lanes), data.x)[0], in_axes=(None, 0))

    def verify(source: np.ndarray, index: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # A black box is not asked about rows that only fill a batch.
        for piece, mask in rows(index, lanes, fill=not host):
            yield piece[mask], np.asarray(predict(model, lane(piece, source)[0]))[mask]

    x = np.array(data.x)
    zero = np.zeros(total, np.int32)
    table: dict[str, np.ndarray] = {
        "id": data.id, "y": data.y, "prediction": zero.copy(), "correct": zero > 0,
        "robust": zero > 0, "broken_by": zero - 1, "adversarial_prediction": zero.copy(),
        "step": zero - 1, "loss": np.full(total, np.nan, np.float32),
        "distance": np.zeros(total, np.float32), "forwards": zero.copy(), "backwards": zero.copy(),
    }  # fmt: skip

    def record(done: np.ndarray) -> None:
        files.examples({name: column[done] for name, column in table.items()})

    done = 0
    for piece, prediction in verify(data.x, index):
        table["prediction"][piece] = table["adversarial_prediction"][piece] = prediction
        table["correct"][piece] = table["robust"][piece] = prediction == data.y[piece]
        record(piece[~table["correct"][piece]])
        done += len(piece)
        yield EvaluationEvent("clean", done, total, int(table["robust"].sum()))
    standing = [int(table["robust"].sum())]
    files.metrics(stage="clean", accuracy=standing[0] / total)

    near_ties = 0
    for number, (name, attack) in enumerate(named.items()):
        attack = _run.strong(attack)
        index = np.flatnonzero(table["robust"])
        if len(index) > 0:
            example = lane(np.resize(index, lanes), data.x)
            search = program(
                _attack(number), attack, key, model, *example, in_axes=(None, None, None, 0, 0, 0)
            )
        done = 0
        for piece, mask in rows(index, lanes, fill=not host):
            found = jax.tree.map(
                lambda leaf, mask=mask: np.asarray(leaf)[mask],
                search(attack, key, model, *lane(piece, data.x)),
            )
            piece = piece[mask]
            for column in ("step", "loss", "distance"):
                table[column][piece] = getattr(found, column)
            for column in ("forwards", "backwards"):
                table[column][piece] += getattr(found, column)
            # The verdict is a forward pass of exactly the input that is kept.
            claimed = piece[found.success]
            x[claimed] = found.x[found.success]
            for part, prediction in verify(x, claimed):
                broken = prediction != data.y[part]
                near_ties += int(np.sum(~broken))
                x[part[~broken]] = data.x[part[~broken]]
                table["step"][part[~broken]] = -1
                part, prediction = part[broken], prediction[broken]
                table["robust"][part] = False
                table["broken_by"][part] = number
                table["adversarial_prediction"][part] = prediction
                record(part)
            done += len(piece)
            yield EvaluationEvent(name, done, len(index), int(table["robust"].sum()))
        standing.append(int(table["robust"].sum()))
        files.metrics(stage=name, accuracy=standing[-1] / total)
    record(np.flatnonzero(table["robust"]))

    report = EvaluationReport(
        examples=table,
        x=x,
        attacks=tuple(named),
        standing=np.array(standing),
        non_finite=int(np.sum(table["adversarial_prediction"] < 0)),
        near_ties=near_ties,
        configuration=configuration,
        seconds=clock.total(),
    )
    files.save("adversarial.npz", x=x, id=data.id)
    files.json(
        "report.json",
        {
            "clean_accuracy": report.clean_accuracy,
            "robust_accuracy": report.robust_accuracy,
            "standing": dict(zip(["clean", *report.attacks], standing)),
            "non_finite": report.non_finite,
            "near_ties": report.near_ties,
            "seconds": report.seconds,
        },
    )
    yield EvaluationEvent("done", total, total, standing[-1], report)


@with_iter(_iterate)
def evaluate(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
    *,
    batch_size: int = 256,
    directory: Any = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Clean accuracy, then attacks in order, each on the examples that still stand.

    Every batch is padded to one lane shape and compiled once for each attack; a ``drive.Host`` is
    asked about the examples alone. An example counts as broken after a separate float32 forward
    pass of the very input that the attack returned. ``evaluate.iter`` takes the same arguments but
    ``progress`` and yields an :class:`EvaluationEvent` after every batch.

    Args:
        key: one typed key; an example's random numbers depend on it and on the example's id alone.
        logits_fn: (B, ...) -> (B, C); a bound model, a plain function or a ``drive.Host``.
        data: the examples.
        attacks: one attack, a list, or a dict from names to attacks.
        batch_size: lanes over all devices; results are bit-equal for equal lanes on a device,
            whatever the order of examples and the number of devices.
        directory: where to write ``metrics.jsonl``, ``examples.csv`` (rows as examples finish),
            ``adversarial.npz``, ``configuration.json`` and ``report.json``; nowhere when None.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run` does.
    """
    with Bar(progress, "image") as bar:
        for event in _iterate(
            key, logits_fn, data, attacks, batch_size=batch_size, directory=directory, mesh=mesh
        ):
            if event.report is None:
                share = event.standing / len(data)
                bar.update(event.attack, event.finished, event.total, accuracy=share)
    assert event.report is not None
    return event.report
