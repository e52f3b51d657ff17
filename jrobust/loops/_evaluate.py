"""Robust accuracy of a model over a data set."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrobust import _run, drive, parallel
from jrobust import keys as _keys
from jrobust._algorithm import describe
from jrobust.attacks import Attack, AttackResult, GradientAttack, with_eps
from jrobust.attacks import Sequence as InOrder
from jrobust.attacks._base import forward
from jrobust.data import Dataset
from jrobust.loops import _identity, _queue, _reliability
from jrobust.loops._folder import Arrays, Folder, located, stored_configuration
from jrobust.loops._lanes import (
    Bar,
    check_data,
    check_names,
    check_shared,
    lane_count,
    loop,
    rows,
    surroundings,
)
from jrobust.loops._programs import Clock, Job, Programs
from jrobust.loops._reliability import Doubt, ReliabilityWarning
from jrobust.models import Randomized
from jrobust.statistics import confidence_sequence

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
        norms: of their threat models, each once: those that ``distance`` is in.
        standing: (attacks + 1,) examples that stood before the first and after each attack.
        non_finite: examples with a non-finite logit, clean or attacked; never counted as robust.
        near_ties: examples that an attack reported broken and the verifying forward pass of the
            same input, compiled as another program, did not. They count as robust.
        only_search: with ``search_fn``, points at which attacks ended that fool it alone. They
            count as robust.
        only_model: with ``search_fn``, such points that fool the model alone, and are counted.
        redraws: of a randomised model, (correct, in all): its answers under fresh draws, ``votes``
            of them for each example, at the last points that attacks returned; else None.
        doubts: reasons to think that the attacks flatter the model; empty if nobody looked.
        configuration: the effective configuration of everything that ran.
        seconds: wall time that this process spent in ``compile``, ``run`` and ``other``.
        resumed: batches that came from the directory of an interrupted or finished run.
    """

    examples: dict[str, np.ndarray]
    x: np.ndarray
    attacks: tuple[str, ...]
    norms: tuple[str, ...]
    standing: np.ndarray
    non_finite: int
    near_ties: int
    only_search: int
    only_model: int
    redraws: tuple[int, int] | None
    doubts: tuple[Doubt, ...]
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

    def redrawn_accuracy(self, alpha: float = 0.05) -> tuple[float, float, float]:
        """Expected accuracy of a randomised model under attack: (estimate, lower, upper).

        Over draws that neither attacks nor votes have seen, at the points that attacks returned for
        these examples. The bounds hold with probability ``1 - alpha`` over the draws, though the
        probabilities of the examples differ: they are Clopper and Pearson's, kept a whole answer
        away from the estimate, where equal probabilities are the worst case (Hoeffding 1956).

        Raises:
            ValueError: if the model draws nothing.
        """
        if self.redraws is None:
            raise ValueError(
                "the model draws no random numbers: its accuracy is robust_accuracy; models that "
                "do are made by jrobust.models.randomized(fn, key)"
            )
        return _reliability.redrawn(*self.redraws, alpha)

    def curve(self, eps: Any) -> np.ndarray:
        """Robust accuracy at radii ``eps`` (E,), as far as the adversarial inputs found tell: (E,).

        An input found at distance d breaks its example at every radius from d on, so that the true
        curve is nowhere higher. It is the curve itself as far as the attacks find the closest
        inputs (``FAB``, ``DDN``, ``FMN``, ``CW``, ``DeepFool``), up to their own radius; for one
        of a budget attack at several radii, evaluate ``{str(e): with_eps(attack, e) for e in eps}``
        in ascending order and read ``standing``.

        Raises:
            ValueError: if the attacks are in several norms, whose distances cannot be compared.
        """
        if len(self.norms) > 1:
            raise ValueError(
                f"the attacks are in {', '.join(self.norms)}, whose distances share no axis: "
                "evaluate each norm by itself"
            )
        # As attacks compare: 8 / 255 in float32, up to the rounding of a norm.
        radii = np.asarray(eps, np.float32) * np.float32(1 + 1e-6)
        rows = self.examples
        distance = np.where(rows["correct"], np.inf, -np.inf)
        broken = rows["correct"] & ~rows["robust"]
        distance[broken] = rows["distance"][broken]
        return np.mean(distance[None] > radii[:, None], 1)

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
        standing: examples of the data set that stand, those not yet tried included: of their share
            the robust accuracy is at most.
        prefix: (robust, examples) of the first examples of the data set, as many as the attack has
            ended for without a gap.
        report: what :func:`evaluate` returns, on the last event.
    """

    attack: str
    finished: int
    total: int
    standing: int
    prefix: tuple[int, int]
    report: EvaluationReport | None = None

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """Bounds on the accuracy after this attack over all inputs, not only the data set's.

        Examples must be independent draws in random order. With probability ``1 - alpha`` the
        bounds of all events of an attack hold together, so that one may stop at any of them, when
        they are close enough (:func:`jrobust.statistics.confidence_sequence`).
        """
        return confidence_sequence(*self.prefix, alpha)


def _predict(logits_fn: Any, x: jax.Array) -> jax.Array:
    """Classes (B,), -1 where a logit is not finite, so that no label equals it."""
    logits = forward(logits_fn, x)
    return jnp.where(jnp.all(jnp.isfinite(logits), -1), jnp.argmax(logits, -1), -1)


# Folded into the key above all example ids.
_FRESH = (1 << 32) - 1


def _redraw(key: jax.Array, model: Randomized, x: Any, y: Any, ids: Any) -> jax.Array:
    """(B,) int32: in how many of ``votes`` fresh draws each input is classified correctly."""
    keys = _keys.examples(key, ids)

    def correct(draw: jax.Array) -> jax.Array:
        return (_predict(model.at(_keys.fold(keys, draw)), x) == y).astype(jnp.int32)

    return jnp.sum(jax.lax.map(correct, jnp.arange(model.votes)), 0)


# Names of the programs and events that are no attack's.
_TAKEN = ("clean", "draws", "search_fn", "checks", "done")

# Seconds between two copies of the lanes on disk.
_SAVE = 10.0


def _named(attacks: Attack | Sequence[Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    if isinstance(attacks, InOrder):
        return attacks.stages
    if isinstance(attacks, Attack):
        return {type(attacks).__name__: attacks}
    named: dict[str, Any] = {}
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif isinstance(attacks, Sequence):
        named = {f"{i + 1} {type(attack).__name__}": attack for i, attack in enumerate(attacks)}
    if not named or not all(isinstance(attack, Attack) for attack in named.values()):
        raise TypeError(f"attacks must be an attack, a list or a dict of attacks, got {attacks!r}")
    if not all(isinstance(name, str) for name in named) or any(name in named for name in _TAKEN):
        raise ValueError(f"attacks need names other than {', '.join(_TAKEN)}; got {list(named)}")
    return named


def _check_search(search_fn: Any, logits_fn: Any, data: Dataset) -> None:
    if drive.is_host(search_fn) or drive.is_host(logits_fn):
        raise TypeError(
            "search_fn= is searched in place of the model, for speed: neither may be a Host model"
        )
    x = jnp.asarray(data.x[:1])
    classes = [_run.count_classes(fn, x) for fn in (search_fn, logits_fn)]
    if classes[0] != classes[1]:
        raise ValueError(
            f"search_fn gives {classes[0]} classes and logits_fn {classes[1]}: search_fn= is meant "
            "for the same network in another precision, such as bind(..., dtype=jnp.bfloat16)"
        )


class _Evaluation:
    """See :func:`evaluate`."""

    def __init__(
        self,
        key: jax.Array,
        logits_fn: Any,
        data: Dataset,
        attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
        *,
        search_fn: Any = None,
        checks: bool = True,
        batch_size: int | None = None,
        memory: int | None = None,
        directory: Any = None,
        resume: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        self._named = _named(attacks)
        self._mesh = parallel.automatic(mesh)
        check_data(data)
        self._data, self._key = data, key
        self._host, self._clock = drive.is_host(logits_fn), Clock()
        if search_fn is not None:
            _check_search(search_fn, logits_fn, data)
        for name, attack in self._named.items():
            check_names(f"attacks[{name!r}]", describe(attack))
            check_shared(attack, data)
            searched = logits_fn if search_fn is None else search_fn
            _run.check(attack, key, searched, data.x, data.y, data.id)
        self._model = logits_fn if self._host else _run.as_pytree(logits_fn)
        # Of draws that no attack sees.
        draws = isinstance(logits_fn, Randomized)
        self._draws = jax.random.fold_in(key, _FRESH) if draws else None
        # What the attacks look at, and who confirms what they find.
        self._searched, self._judge = self._model, None
        if search_fn is not None:
            self._searched, self._judge = _run.as_pytree(search_fn), self._model
        self._attacks = [_run.strong(attack) for attack in self._named.values()]
        # Whose gradients are looked at: those of the first attack that has some.
        white = [n for n, attack in self._named.items() if _reliability.needs_gradients(attack)]
        self._checks, self._checked = checks, None if self._host or not white else white[0]
        self._directory, self._resume = located(directory), resume
        planned = batch_size is not None or self._host
        if not planned and directory is not None and resume:
            # The lanes of an interrupted run are part of what it is.
            batch_size = stored_configuration(self._directory).get("batch_size")
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
        if self._draws is not None:
            args = (self._draws, self._model, *example)
            jobs["draws"] = Job(_redraw, args, (None, None, 0, 0, 0))
        if self._judge is not None:
            jobs["search_fn"] = Job(_predict, (self._searched, example[0]), (None, 0))
        if self._checks and self._checked is not None:
            threat = self._attacks[list(self._named).index(self._checked)].threats()[0]
            args = (threat, self._key, self._searched, *example)
            jobs["checks"] = Job(_reliability.signs, args, (None, None, None, 0, 0, 0))
        models = self._searched, self._judge
        for number, (name, attack) in enumerate(zip(self._named, self._attacks)):
            jobs[name] = _queue.job(number, attack, self._key, *models, example)
        return jobs

    def warm_up(self) -> dict[str, float]:
        return {} if self._host else self._programs.seconds()

    def _call(self, name: str, *args: Any) -> Any:
        """Run a program, compiled when it is first needed; its result is still on the device."""
        if not self._host:
            run: Callable[..., Any] = self._programs[name]
        elif name == "clean":
            run = _predict
        else:
            run = _queue.program(list(self._named).index(name))
        with self._clock.measure("run"):
            return jax.block_until_ready(run(*args))

    def _classify(self, points: np.ndarray, name: str = "clean") -> np.ndarray:
        """Predictions (n,) for any number of points, of the model or of ``search_fn``."""
        model = self._model if name == "clean" else self._searched
        found = [np.zeros(0, np.int32)]
        # A black box is not asked about rows that only fill a batch.
        for piece, mask in rows(np.arange(len(points)), self._programs.size, fill=not self._host):
            prediction = self._call(name, model, jnp.asarray(points[piece]))
            found.append(parallel.fetch(prediction)[mask])
        return np.concatenate(found)

    def _redraw(self, points: np.ndarray) -> Arrays:
        """Correct answers (N,) under fresh draws at ``points``, one for each example."""
        data, found = self._data, []
        for piece, mask in rows(np.arange(len(data)), self._programs.size):
            _, y, ids = self._lane(piece)
            args = (self._draws, self._model, jnp.asarray(points[piece]), y, ids)
            found.append(parallel.fetch(self._call("draws", *args))[mask])
        return {"correct": np.concatenate(found)}

    def _search(
        self, stage: int, index: np.ndarray, folder: Folder
    ) -> Iterator[tuple[np.ndarray, AttackResult]]:
        """Attack the examples ``index``; yields some of them and their results as they end."""
        if not len(index):
            return
        name, attack = list(self._named)[stage], self._attacks[stage]
        size = self._programs.size
        blank = _queue.blank(attack, self._key, *self._lane(np.resize(index, size)))
        lanes = _queue.Lanes(np.full(size, -1), blank)
        kept = folder.load("lanes.npz")
        if kept is not None and kept["stage"] == stage:
            lanes = _queue.thaw(kept, blank)
            lanes.holds[~np.isin(lanes.holds, index)] = -1
        saved = time.monotonic()

        def keep(lanes: _queue.Lanes) -> None:
            nonlocal saved
            if folder.directory is not None and parallel.agree(time.monotonic() - saved > _SAVE):
                folder.save("lanes.npz", stage=np.array(stage), **_queue.freeze(lanes))
                saved = time.monotonic()

        yield from _queue.through(
            lanes,
            np.setdiff1d(index, lanes.holds),
            self._lane,
            functools.partial(self._call, name, attack, self._key, self._searched, self._judge),
            1 if self._host else self._mesh.size,
            keep,
        )

    def _doubts(self, correct: np.ndarray, robust: np.ndarray, folder: Folder) -> list[Doubt]:
        """Looks at a batch of correct examples, and at an attack on a batch that stands."""
        name, size = self._checked, self._programs.size
        if name is None or not len(correct):
            return []

        def look() -> Arrays:
            example = self._lane(np.resize(correct, size))
            threat = self._attacks[list(self._named).index(name)].threats()[0]
            found = self._call("checks", threat, self._key, self._searched, *example)
            return {k: v[: len(correct)] for k, v in parallel.fetch(found._asdict()).items()}

        doubts = _reliability.of_signs(folder.once("checks", look))
        if len(robust):
            attack = self._attacks[list(self._named).index(name)]
            stages = folder.once("checks-attack", lambda: self._course(name, attack, robust[:size]))
            doubts += _reliability.of_attack(name, stages)
        return doubts

    def _course(self, name: str, attack: Attack, index: np.ndarray) -> Arrays:
        """Success and loss of the first attack at a batch on its way, and without a bound."""
        size = self._programs.size
        example = self._lane(np.resize(index, size))
        held = np.arange(size) < len(index)
        (threat,) = attack.threats()[:1]
        lo, hi = (float(f(np.asarray(v))) for f, v in ((np.min, threat.lo), (np.max, threat.hi)))
        widest = threat.widest(hi - lo, example[0].shape[1:])
        free = _run.strong(with_eps(_reliability.paced(attack, widest), widest))
        stages = {"start": 1, "end": 1 << 30}
        if isinstance(attack, GradientAttack) and attack.keep in ("success", "loss"):
            stages = {"start": 1, "most": 1 + attack.moves * 4 // 5, "end": 1 << 30}
        found: Arrays = {}
        for chosen, until in ((attack, stages), (free, {"free": 1 << 30})):
            state: Any = _queue.blank(chosen, self._key, *example)
            fresh, made = np.ones(size, bool), 0
            for stage, more in until.items():
                state, _, result = self._call(
                    name, chosen, self._key, self._searched, self._judge,
                    max(0, more - made), 0, state, held, fresh, *example,
                )  # fmt: skip
                fresh, made = np.zeros(size, bool), more
                for part in ("success", "loss"):
                    found[f"{stage}_{part}"] = parallel.fetch(getattr(result, part))[held]
        return found

    def _identity(self) -> dict[str, str]:
        sets = (self._data.x, self._data.y, self._data.id)
        if self._host:
            return {"data_sha256": _identity.arrays(sets)}
        # Checks only look: they may be asked for later, or no more.
        variables = self._model, self._searched
        return self._programs.identity(sets, variables, besides=("checks",))

    def events(self) -> Iterator[EvaluationEvent]:
        data, named = self._data, self._named
        total, lanes = len(data), self._programs.plan()
        configuration = {
            "attacks": {name: describe(attack) for name, attack in named.items()},
            "batch_size": lanes,
            "examples": total,
            "checks": self._checks,
            "search_fn": self._judge is not None,
            **surroundings(self._key, self._mesh),
        }
        folder = Folder(
            self._directory, configuration, self._identity, resume=self._resume, columns=_COLUMNS
        )
        doubts: list[Doubt] = []
        if self._checks and not self._host:
            doubts = _reliability.of_program(self._model, data.x[:4])
        x = np.array(data.x)
        tried = x if self._draws is None else x.copy()
        zero = np.zeros(total, np.int32)
        table: dict[str, np.ndarray] = {
            "id": data.id, "y": data.y, "prediction": zero.copy(), "correct": zero > 0,
            "robust": zero == 0, "broken_by": zero - 1, "adversarial_prediction": zero.copy(),
            "step": zero - 1, "loss": np.full(total, np.nan, np.float32),
            "distance": np.zeros(total, np.float32), "forwards": zero.copy(),
            "backwards": zero.copy(),
        }  # fmt: skip

        def record(done: np.ndarray) -> None:
            folder.examples({name: column[done] for name, column in table.items()})

        def enter(piece: np.ndarray, batch: Arrays) -> None:
            for column in batch.keys() & table.keys():
                table[column][piece] = batch[column]

        def event(
            name: str, finished: int, of: int, ended: int, report: EvaluationReport | None = None
        ) -> EvaluationEvent:
            robust = table["robust"]
            prefix = int(robust[:ended].sum()), ended
            return EvaluationEvent(name, finished, of, int(robust.sum()), prefix, report)

        def predict(piece: np.ndarray) -> Arrays:
            prediction = self._classify(data.x[piece])
            correct = prediction == data.y[piece]
            return {
                "prediction": prediction, "adversarial_prediction": prediction,
                "correct": correct, "robust": correct,
            }  # fmt: skip

        done = 0
        for number, (piece, _) in enumerate(rows(np.arange(total), lanes, fill=False)):
            enter(piece, folder.once(f"0-{number:06d}", functools.partial(predict, piece)))
            record(piece[~table["correct"][piece]])
            done += len(piece)
            yield event("clean", done, total, done)
        standing = [int(table["robust"].sum())]
        folder.metrics(stage="clean", accuracy=standing[0] / total)

        def verified(stage: int, piece: np.ndarray, found: AttackResult) -> Arrays:
            points, claimed = np.asarray(found.x), np.asarray(found.success)
            # The verdict is a forward pass of exactly the input that is kept. What another model
            # saw says nothing of this one, so that then all are asked.
            asked = np.flatnonzero(claimed if self._judge is None else claimed | True)
            prediction = table["adversarial_prediction"][piece]
            prediction[asked] = self._classify(points[asked])
            robust = prediction == data.y[piece]
            batch = {
                "index": piece,
                "loss": found.loss,
                "distance": found.distance,
                "step": np.where(robust, -1, found.step),
                "forwards": table["forwards"][piece] + found.forwards,
                "backwards": table["backwards"][piece] + found.backwards,
                "adversarial_prediction": prediction,
                "robust": robust,
                "broken_by": np.where(robust, -1, stage).astype(np.int32),
                "x": points[~robust],
                "near_ties": np.sum(claimed & robust),
            }
            if self._draws is not None:
                batch["tried"] = points
            if self._judge is not None:
                fooled = self._classify(points, "search_fn") != data.y[piece]
                batch["only_search"] = np.sum(fooled & robust)
                batch["only_model"] = np.sum(~fooled & ~robust)
            return batch

        def batches(stage: int) -> Iterator[Arrays]:
            """What came of the examples that stand: first what is on disk, then as they end."""
            left = np.flatnonzero(table["robust"])
            stored = folder.stored(f"{stage + 1}-")
            for name in stored:
                batch = folder.once(name, dict)
                left = np.setdiff1d(left, batch["index"])
                yield batch
            names = (f"{stage + 1}-{number:06d}" for number in itertools.count())
            free = (name for name in names if name not in stored)
            for piece, found in self._search(stage, left, folder):
                yield folder.once(next(free), functools.partial(verified, stage, piece, found))

        counts = dict.fromkeys(("near_ties", "only_search", "only_model"), 0)
        for stage, name in enumerate(named):
            before, done, waiting = standing[-1], 0, table["robust"].copy()
            for batch in batches(stage):
                piece = batch["index"]
                enter(piece, batch)
                broken = piece[~table["robust"][piece]]
                x[broken] = batch["x"]
                if "tried" in batch:
                    tried[piece] = batch["tried"]
                for count in counts.keys() & batch.keys():
                    counts[count] += int(batch[count])
                record(broken)
                done += len(piece)
                waiting[piece] = False
                ended = int(np.argmax(waiting)) if waiting.any() else total
                yield event(name, done, before, ended)
            standing.append(int(table["robust"].sum()))
            folder.metrics(stage=name, accuracy=standing[-1] / total)
        record(np.flatnonzero(table["robust"]))
        redraws = None
        if self._draws is not None:
            held = folder.once("draws", functools.partial(self._redraw, tried))["correct"]
            redraws = int(held.sum()), total * self._model.votes
        if self._checks:
            doubts += _reliability.of_settings(named)
            correct, robust = (np.flatnonzero(table[name]) for name in ("correct", "robust"))
            said = {doubt.kind for doubt in doubts}
            doubts += [d for d in self._doubts(correct, robust, folder) if d.kind not in said]
            doubts += _reliability.of_course(
                named, standing, total, counts["near_ties"], counts["only_search"]
            )
            if redraws is not None:
                doubts += _reliability.of_draws(standing[-1] / total, *redraws)

        report = EvaluationReport(
            examples=table,
            x=x,
            attacks=tuple(named),
            norms=tuple(sorted({t.norm for attack in named.values() for t in attack.threats()})),
            standing=np.array(standing),
            non_finite=int(np.sum(table["adversarial_prediction"] < 0)),
            **counts,
            redraws=redraws,
            doubts=tuple(doubts),
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
                **counts,
                "redraws": redraws,
                "doubts": [doubt._asdict() for doubt in doubts],
                "seconds": report.seconds,
                "resumed": report.resumed,
            }
        )
        yield event("done", total, total, total, report)


@loop(_Evaluation)
def evaluate(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
    *,
    search_fn: Any = None,
    checks: bool = True,
    batch_size: int | None = None,
    memory: int | None = None,
    directory: Any = None,
    resume: bool = True,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Clean accuracy, then attacks in order, each on the examples that still stand.

    Each attack is compiled once, for a fixed number of lanes, all attacks at the same time. A lane
    holds an example until its attack has ended, restarts and target classes included, and then
    takes the next that waits: lanes are at different steps, and few are idle. A ``drive.Host`` is
    asked about the examples alone. An example counts as broken after a separate float32 forward
    pass of the very input that the attack returned. ``evaluate.iter`` takes the same arguments but
    ``progress`` and yields an :class:`EvaluationEvent` whenever examples have ended;
    ``evaluate.warm_up`` only compiles.

    A run with a directory may be killed at any moment: the same call goes on with the examples that
    have not ended (with the lanes as they were at most ten seconds before), to the same report, bit
    for bit on the same number of devices, and returns the report of a finished run at once. It is
    the same call if data, key, settings, variables and the traced programs of model and attacks are
    the same; of a ``drive.Host`` nothing can be seen.

    Args:
        key: one typed key; an example's random numbers depend on it and on the example's id alone.
        logits_fn: (B, ...) -> (B, C); a bound model, a plain function or a ``drive.Host``.
        data: the examples.
        attacks: one attack, a list, or a dict from names to attacks. A ``sequence``, such as
            ``AutoAttack(threat)``, stands for its ``stages``.
        search_fn: the model that attacks search instead, such as the same network in bfloat16. An
            example's search ends only where ``logits_fn`` agrees that it is broken, and the verdict
            is that of ``logits_fn`` alone.
        checks: look for signs that the attacks flatter the model: what :func:`jrobust.inspect`
            warns of in its program, probabilities in place of logits, gradients that are zero or do
            not foresee the loss, an attack that was still rising or fails even without a bound, one
            without gradients that beats those with gradients, few steps. What is found is in
            ``doubts``, and warned about (:class:`ReliabilityWarning`). Costs up to two runs of the
            first attack on one batch.
        batch_size: lanes over all devices; results are bit-equal for equal lanes on a device,
            whatever the order of examples and the number of devices. When None, 128 on each device
            of a CPU and 512 on an accelerator, or fewer, so that ``memory`` holds them.
        memory: bytes to use on each device where ``batch_size`` is None; by default 90% of what is
            free there, on a CPU half.
        directory: where to write ``metrics.jsonl``, ``examples.csv`` (rows as examples finish),
            ``adversarial.npz``, ``configuration.json`` and ``report.json``; nowhere when None.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run` does; if another run is in
            the directory, or another process at work there.
    """
    events = evaluate.iter(
        key,
        logits_fn,
        data,
        attacks,
        search_fn=search_fn,
        checks=checks,
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
    for doubt in event.report.doubts:
        warnings.warn(str(doubt), ReliabilityWarning, stacklevel=3)
    return event.report
