"""Certified accuracy of a smoothed model over a data set."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jrobust
from jrobust import _run, drive, parallel, smoothing
from jrobust._algorithm import describe
from jrobust._inspect import inspect as read_program
from jrobust.data import Dataset
from jrobust.loops import _votes_log
from jrobust.loops._folder import Arrays, Folder
from jrobust.loops._lanes import (
    Bar,
    check_count,
    check_data,
    lane_count,
    loop,
    rows,
    surroundings,
)
from jrobust.loops._programs import Clock, Job, Programs
from jrobust.loops._tsv import CertifiedRadii, Slice
from jrobust.smoothing._votes import default_chunk

_COUNTED = ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n")
_COLUMNS = ("id", "y", "correct", *_COUNTED)
_AXES = (None, None, 0, None, 0, None)  # key, models, x, noise, ids, start


@dataclasses.dataclass(frozen=True, eq=False)
class CertificationReport:
    """Certificates of a data set, with the counts they follow from.

    Attributes:
        certificate: predictions and radii, (N,) each; see :class:`jrobust.smoothing.Certificate`.
        select_counts: (N, C + 1) int32 votes that selected the class; last column rejects.
        estimate_counts: (N, C + 1) int32 votes that bounded its probability, all that were cast.
        y: (N,) true labels.
        id: (N,) example ids.
        configuration: noise, votes, alpha, all other settings, seed and versions.
        seconds: wall time that this process spent in ``compile``, ``run`` and ``other``.
        resumed: batches that came from the directory of an interrupted or finished run.
        disagreements: with a fast voter (N, C + 1) int32, as from
            :func:`jrobust.smoothing.count_disagreements`; else None.
    """

    certificate: smoothing.Certificate
    select_counts: np.ndarray
    estimate_counts: np.ndarray
    y: np.ndarray
    id: np.ndarray
    configuration: dict[str, Any]
    seconds: dict[str, float]
    resumed: int = 0
    disagreements: np.ndarray | None = None

    def accuracy(self, radii: Any = 0.0) -> Any:
        """Certified accuracy at each of ``radii``."""
        return self.certificate.accuracy(self.y, radii)

    @property
    def average_radius(self) -> float:
        """Average certified radius; wrong answers and abstentions count 0.

        Comparable only between equal sets of examples: state :attr:`slice` with it.
        """
        return self.certificate.average_radius(self.y)

    @property
    def slice(self) -> Slice:
        """Which examples these are, by their ids."""
        return Slice.of(self.id)

    @property
    def votes(self) -> int:
        """Noisy copies that voted in all."""
        return int(self.select_counts.sum() + self.estimate_counts.sum())

    @property
    def radii(self) -> CertifiedRadii:
        """Answers and radii alone, as a table that can be written in Cohen's format.

        ``seconds`` is an equal share of the time that the model took.
        """
        share = self.seconds["run"] / len(self.id)
        return CertifiedRadii(
            id=self.id,
            y=self.y,
            prediction=self.certificate.prediction,
            radius=self.certificate.radius,
            seconds=np.full(len(self.id), share),
            norm=self.certificate.norm,
        )

    def __str__(self) -> str:
        return f"{self.radii}. {self.certificate.statement()}"


class CertificationEvent(NamedTuple):
    """Yielded after every batch, and once more with the ``report``.

    Attributes:
        finished: images certified or abstained on so far, of ``total``.
        total: images.
        certified: images certified as their true label so far.
        report: what :func:`certify` returns, on the last event.
        plan: on the first event whose votes this process has counted: votes and time to expect of
            the whole run, by the speed and the votes of that batch.
    """

    finished: int
    total: int
    certified: int
    report: CertificationReport | None = None
    plan: smoothing.Plan | None = None


@functools.lru_cache(maxsize=64)
def _counter(samples: int, chunk: int | None) -> Callable[..., jax.Array]:
    def count(key: Any, model: Any, x: Any, noise: Any, ids: Any, start: Any) -> jax.Array:
        return smoothing.count_votes(
            key, model, x, noise, samples, start=start, ids=ids, chunk=chunk
        )

    return count


@functools.lru_cache(maxsize=64)
def _comparer(samples: int, chunk: int | None) -> Callable[..., jax.Array]:
    def compare(key: Any, models: Any, x: Any, noise: Any, ids: Any, start: Any) -> jax.Array:
        exact, voter = models
        return smoothing.count_disagreements(
            key, exact, voter, x, noise, samples, start=start, ids=ids, chunk=chunk
        )

    return compare


def _check_rows(name: str, logits_fn: Any, x: np.ndarray) -> None:
    """Raise ``ValueError`` where the answer to an image may depend on others in the batch."""
    for finding in read_program(logits_fn, np.resize(x, (4, *x.shape[1:]))).findings:
        dependent = finding.kind in ("rows", "batch statistics", "rows not followed")
        if dependent and finding.severity != "info":
            raise ValueError(
                f"{name} cannot be certified: a certificate is about a fixed function of one "
                f"noisy input, and here votes would depend on each other.\n{finding}\nIf the rows "
                "are independent all the same, inspect=False skips this analysis: the certificate "
                "then rests on your word"
            )


def _check_inputs(noise: smoothing.Noise, x: np.ndarray, box: Any) -> None:
    """Raise ``ValueError`` for inputs that the noise or the box does not allow."""
    if box is not None:
        lo, hi = (float(bound) for bound in box)
        if not lo < hi:
            raise ValueError(f"box must be (lo, hi) with lo < hi, or None, got {box}")
        if x.min() < np.float32(lo) or x.max() > np.float32(hi):
            raise ValueError(
                f"data.x spans [{x.min():.4g}, {x.max():.4g}], outside of the box [{lo:g}, "
                f"{hi:g}]. Noise and radius are in the units of these inputs: if they are "
                "normalised, undo it and normalise inside the model, after the noise; if this is "
                "their range, say box=(lo, hi); if they have none, box=None"
            )
    # Traced, not run: noises refuse inputs of another size.
    jax.eval_shape(noise.perturb, jax.random.key(0), jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    drawn = noise.noise if isinstance(noise, smoothing.Converted) else noise
    if isinstance(drawn, smoothing.DiscreteGaussian):
        steps = x * np.float32(drawn.levels)
        off = np.any(np.abs(steps - np.round(steps)) > 2.0**-8, axis=tuple(range(1, x.ndim)))
        if off.any():
            raise ValueError(
                f"{off.sum()} of {len(x)} inputs are not on the grid of multiples of 1 / "
                f"{drawn.levels} for which {type(drawn).__name__} is sound: round them, "
                f"np.round(x * {drawn.levels}) / {drawn.levels}, or give the right levels="
            )


class _Certification:
    """See :func:`certify`."""

    def __init__(
        self,
        key: jax.Array,
        logits_fn: Any,
        data: Dataset,
        noise: smoothing.Noise,
        *,
        n0: int = 100,
        n: int | None = None,
        alpha: float = 0.001,
        stages: Sequence[int] | None = None,
        radius: float | None = None,
        top: int = 1,
        two_bounds: bool = False,
        anytime: bool = False,
        voter: Any = None,
        pairs: int | None = None,
        block: int | None = None,
        box: tuple[float, float] | None = (0.0, 1.0),
        inspect: bool = True,
        batch_size: int = 32,
        chunk: int | None = None,
        memory: int | None = None,
        directory: Any = None,
        resume: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        if drive.is_host(logits_fn) or drive.is_host(voter):
            raise TypeError(
                "certification compiles its votes: a Host model cannot be certified yet"
            )
        self._mesh = parallel.mesh() if mesh is None else mesh
        check_data(data)
        for name, value in (("n0", n0), ("chunk", n0 if chunk is None else chunk)):
            check_count(name, value)
        if not callable(getattr(noise, "check", None)) or isinstance(noise, type):
            raise TypeError(
                f"noise must be a noise such as smoothing.Gaussian(0.25), got {noise!r}"
            )
        if (voter is None) != (pairs is None):
            raise ValueError(
                f"voter= votes in place of logits_fn, pairs= is how many samples both models are "
                f"shown: give both or neither, got voter={voter!r} and pairs={pairs!r}"
            )
        self._key, self._data, self._n0 = key, data, n0
        example = jnp.asarray(data.x[:1])
        self._classes = _run.count_classes(logits_fn, example)
        if voter is not None and (others := _run.count_classes(voter, example)) != self._classes:
            raise ValueError(f"logits_fn has {self._classes} classes but voter {others}")
        self._rule = _votes_log.rule(
            noise,
            alpha=alpha,
            n=n,
            stages=stages,
            radius=radius,
            top=top,
            two_bounds=two_bounds,
            anytime=anytime,
            pairs=pairs,
            classes=self._classes,
        )
        self._block = _votes_log.block_size(self._rule, block)
        self._stages = smoothing.stages(key)
        _run.check_labels("y", data.y, self._classes)
        _check_inputs(noise, data.x, box)
        if inspect:
            _check_rows("logits_fn", logits_fn, data.x)
            if voter is not None:
                _check_rows("voter", voter, data.x)
        self._box, self._described = box, describe(noise)
        self._model, self._noise = _run.as_pytree(logits_fn), _run.strong(noise)
        self._voter = self._model if voter is None else _run.as_pytree(voter)
        self._lanes = lane_count(batch_size, len(data), self._mesh)
        self._directory, self._resume = directory, resume
        if chunk is None and directory is not None and resume:
            # The shape of an interrupted run's forward passes is part of what it is.
            chunk = _votes_log.configuration(directory).get("chunk")
        most = default_chunk(self._lanes // self._mesh.size, data.x.shape[1:])
        even = -(-self._block // -(-self._block // most))  # as many passes, but equally full ones
        self._clock, self._speeds = Clock(), dict[str, float]()
        self._programs = Programs(
            self._jobs,
            even if chunk is None else min(self._block, chunk),
            self._mesh,
            self._clock,
            planned=chunk is not None,
            memory=memory,
        )

    @property
    def plan(self) -> smoothing.Plan:
        """What the run can prove and costs at most."""
        return self._rule.plan(len(self._data), self._n0, self._classes)

    def _lane(self, index: np.ndarray) -> tuple[Any, ...]:
        data = self._data
        return jnp.asarray(data.x[index]), self._noise, jnp.asarray(data.id[index])

    def _jobs(self, chunk: int) -> dict[str, Job]:
        lane = self._lane(np.resize(np.arange(len(self._data)), self._lanes))
        start, (select, estimate) = jnp.uint32(0), self._stages

        def job(fn: Callable[..., Any], key: jax.Array, models: Any) -> Job:
            return Job(fn, (key, models, *lane, start), _AXES)

        jobs = {
            "select": job(_counter(self._n0, chunk), select, self._voter),
            "estimate": job(_counter(self._block, chunk), estimate, self._voter),
        }
        if self._rule.pairs:
            models = (self._model, self._voter)
            jobs["pairs"] = job(_comparer(self._block, chunk), estimate, models)
        return jobs

    def warm_up(self) -> dict[str, float]:
        return self._programs.seconds()

    def _identity(self) -> dict[str, str]:
        models = (self._model, self._voter) if self._rule.pairs else self._model
        return self._programs.identity((self._data.x, self._data.y, self._data.id), models)

    def _blocks(self, name: str, models: Any, index: np.ndarray, start: int, end: int) -> Any:
        """Counts (lanes, blocks, C + 1) of the samples from ``start`` to ``end``."""
        program, lane = self._programs[name], self._lane(index)
        before = self._clock.seconds["run"]
        with self._clock.measure("run"):
            # All are under way before the first is waited for.
            found = [
                program(self._stages.estimate, models, *lane, jnp.uint32(sample))
                for sample in range(start, end, self._block)
            ]
            counts = np.stack(parallel.fetch(found), axis=1)
        spent = self._clock.seconds["run"] - before
        self._speeds.setdefault(name, len(index) * (end - start) / spent)
        return counts

    def _count(self, run: str, stage: int, index: np.ndarray, mask: np.ndarray) -> Arrays:
        """One file of the log: the votes of one stage for a batch of images."""
        start, end = (0, *self._rule.stages)[stage : stage + 2]
        data, piece = self._data, index[mask]
        batch = {
            "run": np.array(run),
            "index": piece,
            "id": data.id[piece],
            "y": data.y[piece],
            "start": np.array(start),
        }
        if not stage:
            program, lane = self._programs["select"], self._lane(index)
            with self._clock.measure("run"):
                select = program(self._stages.select, self._voter, *lane, jnp.uint32(0))
                batch["select"] = parallel.fetch(select)[mask]
            if self._rule.pairs:
                models = (self._model, self._voter)
                counts = self._blocks("pairs", models, index, 0, self._rule.pairs)
                batch["disagree"] = _votes_log.compact(counts[mask], self._block)
        counts = self._blocks("estimate", self._voter, index, start, end)
        batch["estimate"] = _votes_log.compact(counts[mask], self._block)
        return batch

    def _expected(self, batch: Arrays) -> smoothing.Plan:
        """What is to be expected of the run, from its first batch."""
        selected = batch["select"][:, :-1].argmax(1)
        counts = batch["estimate"].sum(1, dtype=np.int64)
        share = np.take_along_axis(counts, selected[:, None], 1)[:, 0] / counts.sum(1)
        return self._rule.plan(
            len(self._data),
            self._n0,
            self._classes,
            p=share,
            votes_per_second=self._speeds["estimate"],
            pairs_per_second=self._speeds.get("pairs"),
        )

    def events(self) -> Iterator[CertificationEvent]:
        data, rule, total = self._data, self._rule, len(self._data)
        chunk = self._programs.plan()
        configuration = {
            "noise": self._described,
            "noise_from": _votes_log.source_of(self._rule.noise),
            "n0": self._n0,
            **rule.settings(),
            "block": self._block,
            "box": self._box,
            "shape": list(data.x.shape[1:]),
            "dtype": str(data.x.dtype),
            "batch_size": self._lanes,
            "chunk": chunk,
            "examples": total,
            "key_impl": str(jax.random.key_impl(self._key)),
            "jrobust": jrobust.__version__,
            **surroundings(self._key, self._mesh),
        }
        identity = {} if self._directory is None else self._identity()
        if self._directory is not None and self._resume:
            # All that is there is read before anything is written.
            _votes_log.verify(self._directory, {**configuration, **identity})
        folder = Folder(
            self._directory, configuration, lambda: identity, resume=self._resume, columns=_COLUMNS
        )
        run = _votes_log.digest(folder.configuration)
        votes = _votes_log.Votes(total, self._classes + 1, rule, self._block)
        left, finished, certified, planned = np.arange(total), 0, 0, False
        for stage in range(len(rule.stages)):
            waiting = [left[:0]]
            for number, (index, mask) in enumerate(rows(left, self._lanes)):
                before = folder.resumed
                batch = folder.once(
                    f"{stage:02d}-{number:06d}",
                    functools.partial(self._count, run, stage, index, mask),
                )
                votes.enter(batch)
                done, part, open_rows = votes.settle(index[mask])
                waiting.append(open_rows)
                if part is not None:
                    correct = part.prediction == data.y[done]
                    certified += int(np.sum(correct))
                    columns = {name: getattr(part, name) for name in _COUNTED}
                    columns.update(id=data.id[done], y=data.y[done], correct=correct)
                    folder.examples(columns)
                    finished += len(done)
                plan = None
                if not planned and not stage and folder.resumed == before:
                    plan, planned = self._expected(batch), True
                yield CertificationEvent(finished, total, certified, plan=plan)
            left = np.concatenate(waiting)
        certificate, estimate = votes.certify(np.arange(total))
        report = CertificationReport(
            certificate=certificate,
            select_counts=votes.select,
            estimate_counts=estimate,
            y=data.y,
            id=data.id,
            configuration=folder.configuration,
            seconds=self._clock.total(),
            resumed=folder.resumed,
            disagreements=votes.disagreements if rule.pairs else None,
        )
        counts = {"select": report.select_counts, "estimate": report.estimate_counts}
        if report.disagreements is not None:
            counts["disagreements"] = report.disagreements
        folder.save("counts.npz", **counts, id=data.id, y=data.y)
        folder.finish(
            {
                "certified_accuracy": float(report.accuracy(0.0)),
                "average_radius": report.average_radius,
                "slice": report.slice._asdict(),
                "statement": report.certificate.statement(),
                "votes": report.votes,
                "seconds": report.seconds,
                "resumed": report.resumed,
            }
        )
        yield CertificationEvent(total, total, certified, report)


@loop(_Certification)
def certify(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    noise: smoothing.Noise,
    *,
    n0: int = 100,
    n: int | None = None,
    alpha: float = 0.001,
    stages: Sequence[int] | None = None,
    radius: float | None = None,
    top: int = 1,
    two_bounds: bool = False,
    anytime: bool = False,
    voter: Any = None,
    pairs: int | None = None,
    block: int | None = None,
    box: tuple[float, float] | None = (0.0, 1.0),
    inspect: bool = True,
    batch_size: int = 32,
    chunk: int | None = None,
    memory: int | None = None,
    directory: Any = None,
    resume: bool = True,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> CertificationReport:
    """Certify every example by randomized smoothing (Cohen et al. 2019, CERTIFY).

    Votes are counted on the device, bounds computed from the integer counts on the host in
    float64. The counts of an example depend on the key and the example's id alone.
    ``certify.iter`` takes the same arguments but ``progress`` and yields a
    :class:`CertificationEvent` after every batch; ``certify.warm_up`` only compiles.

    A run with a directory may be killed at any moment: the same call goes on behind the last
    finished batch, to the same counts. It is the same call if data, key, settings, variables and
    the traced models are the same. What is there is read and checked before anything is written;
    a log that is damaged, or another run's, is refused and left as it is.

    The directory is a log of the counts of each block of samples, from which :func:`recertify`
    computes certificates for another alpha, fewer votes or another rule, without the model.

    Args:
        key: one typed key; selection and estimation draw from different stages of it.
        logits_fn: the model that is certified: (B, ...) -> (B, C), rows independent, without batch
            statistics.
        data: the examples, float32, not normalised.
        noise: for instance ``jrobust.smoothing.Gaussian(0.25)``.
        n0: votes that select the class.
        n: fresh votes that bound its probability; by default 10,000, or the last of ``stages``.
        alpha: probability that one example's certificate is false.
        stages: total votes after each stage, increasing, such as ``(100, 1000, 10_000)``: later
            stages count votes only of examples that still need them, packed into full batches.
            Alpha is split over them: see :func:`jrobust.smoothing.certify_staged`.
        radius: with ``stages``, the radius at question, at which an example is done with; None for
            as much as the last stage certifies, where only hopeless examples stop early.
        top: certify that the class stays among the ``top`` most probable ones.
        two_bounds: bound every answer, as in :func:`jrobust.smoothing.certify`.
        anytime: bounds that hold for all numbers of votes at once, so that of this run any prefix
            may be taken after looking.
        voter: a fast model that votes in place of ``logits_fn``, such as its bfloat16 twin. What is
            certified is ``logits_fn``: ``pairs`` samples are shown to both, and the bound on their
            disagreement is taken off (``disagreements`` of :func:`jrobust.smoothing.certify`).
        pairs: samples of each example shown to both models; they cost as many passes of each, and
            ``log(2 / alpha) / pairs`` of probability even if the models always agree.
        block: samples in a block of the log; it divides n, all stages and ``pairs``. By default
            their smallest common divisor of at least 1,000, else the greatest.
        box: range that ``data.x`` must lie in, None where inputs have none.
        inspect: refuse models in whose program rows of a batch depend on each other
            (:func:`jrobust.inspect`); False where that analysis cannot see that they do not.
        batch_size: images in a batch; ``chunk`` noisy copies of each are classified at a time.
        chunk: as in :func:`jrobust.smoothing.count_votes`, at most a block; by default what that
            takes, or fewer, as many as ``memory`` holds.
        memory: bytes to use on each device where ``chunk`` is None; by default 90% of what is free
            there, on a CPU half.
        directory: where to write ``batches`` (the log), ``examples.csv`` (rows as they finish),
            ``counts.npz``, ``configuration.json`` and ``report.json``.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
        progress: show a bar, and the plan: what the run can prove and how many votes it takes, and
            after the first batch what is to be expected of it.

    Raises:
        TypeError, ValueError: before any compute, for settings, models and data that cannot be
            right; if another run or a damaged one is in the directory.
    """
    run = _Certification(
        key,
        logits_fn,
        data,
        noise,
        n0=n0,
        n=n,
        alpha=alpha,
        stages=stages,
        radius=radius,
        top=top,
        two_bounds=two_bounds,
        anytime=anytime,
        voter=voter,
        pairs=pairs,
        block=block,
        box=box,
        inspect=inspect,
        batch_size=batch_size,
        chunk=chunk,
        memory=memory,
        directory=directory,
        resume=resume,
        mesh=mesh,
    )

    def tell(text: str) -> None:
        if progress and parallel.is_main():
            from tqdm.auto import tqdm

            tqdm.write(text, file=sys.stderr)  # beside the bar, not into it

    tell(f"At most: {run.plan}")
    with Bar(progress, "image") as bar:
        for event in run.events():
            if event.plan is not None:
                tell(f"To expect: {event.plan}")
            share = event.certified / max(1, event.finished)
            bar.update("certify", event.finished, event.total, certified=share)
    assert event.report is not None
    return event.report
