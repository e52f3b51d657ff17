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
from jrobust.loops import _identity, _votes_log
from jrobust.loops._folder import Arrays, Folder, located, stored_configuration
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
from jrobust.smoothing._certify import check_top
from jrobust.smoothing._staged import is_dual
from jrobust.smoothing._votes import default_chunk

_COUNTED = ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n")
_COLUMNS = ("id", "y", "correct", *_COUNTED)
_AXES = (None, None, 0, None, 0, None)  # key, models, x, noise, ids, start


@dataclasses.dataclass(frozen=True, eq=False)
class CertificationReport:
    """Certificates of a data set, with the counts they follow from.

    Attributes:
        certificate: predictions and radii, (N,) each; see :class:`jrobust.smoothing.Certificate`.
        select_counts: (N, C + 1) int32 votes that selected the class; last column rejects. Of two
            halves (N, 2, C + 1), like ``estimate_counts``.
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
    def count(key: Any, models: Any, x: Any, noises: Any, ids: Any, start: Any) -> jax.Array:
        found = [
            smoothing.count_votes(key, model, x, noise, samples, start=start, ids=ids, chunk=chunk)
            for model, noise in zip(models, noises)
        ]
        return found[0] if len(found) == 1 else jnp.stack(found, axis=1)

    return count


@functools.lru_cache(maxsize=64)
def _comparer(samples: int, chunk: int | None) -> Callable[..., jax.Array]:
    def compare(key: Any, models: Any, x: Any, noises: Any, ids: Any, start: Any) -> jax.Array:
        (exact, voter), (noise,) = models, noises
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


def _check_inputs(noise: Any, x: np.ndarray, box: Any) -> None:
    """Raise ``ValueError`` for inputs that the noise or the box does not allow."""
    if box is not None:
        lo, hi = box if np.shape(box) == (2,) else (1.0, 0.0)
        if not lo < hi:
            raise ValueError(f"box must be (lo, hi) with lo < hi, or None, got {box!r}")
        if x.min() < np.float32(lo) or x.max() > np.float32(hi):
            raise ValueError(
                f"data.x spans [{x.min():.4g}, {x.max():.4g}], outside of the box [{lo:g}, "
                f"{hi:g}]. Noise and radius are in the units of these inputs: if they are "
                "normalised, undo it and normalise inside the model, after the noise; if this is "
                "their range, say box=(lo, hi); if they have none, box=None"
            )
    # Traced, not run: noises refuse inputs of another size.
    jax.eval_shape(noise.perturb, jax.random.key(0), jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    while not isinstance(noise, smoothing.DiscreteGaussian):
        if isinstance(noise, smoothing.Half):
            x = np.where(np.asarray(noise.mask)[..., None], x, np.float32(0))
        if not hasattr(noise, "noise"):
            return
        noise = noise.noise
    steps = x * np.float32(noise.levels)
    off = np.any(np.abs(steps - np.round(steps)) > 2.0**-8, axis=tuple(range(1, x.ndim)))
    if off.any():
        raise ValueError(
            f"{off.sum()} of {len(x)} inputs are not on the grid of multiples of 1 / "
            f"{noise.levels} for which {type(noise).__name__} is sound: round them, "
            f"np.round(x * {noise.levels}) / {noise.levels}, or give the right levels="
        )


def _answer(model: Any, x: jax.Array) -> jax.Array:
    return model(x)


def _asks(models: Any) -> bool:
    """Whether one of these models has to be asked from Python."""
    return any(map(drive.is_host, jax.tree.leaves(models)))


class _Certification:
    """See :func:`certify`."""

    def __init__(
        self,
        key: jax.Array,
        logits_fn: Any,
        data: Dataset,
        noise: smoothing.Noise | tuple[smoothing.Half, smoothing.Half],
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
        check_data(data)
        for name, value in (("n0", n0), ("chunk", n0 if chunk is None else chunk)):
            check_count(name, value)
        for one in tuple(noise) if is_dual(noise) else (noise,):
            if not callable(getattr(one, "check", None)) or isinstance(one, type):
                raise TypeError(
                    f"noise must be a noise such as smoothing.Gaussian(0.25), got {one!r}"
                )
            if jax.tree_util.all_leaves([one]):
                raise TypeError(
                    f"{type(one).__name__} is no pytree, so that compiled votes cannot take it: "
                    "decorate the class with jrobust.algorithm"
                )
        if (voter is None) != (pairs is None):
            raise ValueError(
                f"voter= votes in place of logits_fn, pairs= is how many samples both models are "
                f"shown: give both or neither, got voter={voter!r} and pairs={pairs!r}"
            )
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
        )
        self._block = _votes_log.block_size(self._rule, block)
        noises = self._rule.bounds.noises
        # Of two halves each may have a classifier of its own.
        exact = tuple(logits_fn) if isinstance(logits_fn, (tuple, list)) else (logits_fn,)
        if len(exact) not in (1, len(noises)):
            raise ValueError(f"{len(exact)} models and {len(noises)} noise: give one, or as many")
        named = {f"logits_fn {i + 1}" if i else "logits_fn": one for i, one in enumerate(exact)}
        if voter is not None:
            named["voter"] = voter
        self._key, self._data, self._n0 = key, data, n0
        self._stages = smoothing.stages(key)
        self._asked = any(map(drive.is_host, named.values()))
        if self._asked and jax.process_count() > 1:
            raise ValueError("a Host model is asked from one process: each of several would ask it")
        # Only compiled votes are split: those of a black box and the compiled ones beside them
        # then have one shape.
        self._mesh = parallel.automatic(mesh)
        if self._asked:
            self._mesh = parallel.mesh(jax.devices()[:1])
        example = jnp.asarray(data.x[:1])
        self._classes: int | None = None
        for name, model in named.items():
            if not drive.is_host(model):
                self._saw(_run.count_classes(model, example), name)
        for one in noises:
            _check_inputs(one, data.x, box)
        if inspect:
            for name, model in named.items():
                if not drive.is_host(model):
                    _check_rows(name, model, data.x)
        self._box, self._described = box, describe(noise)
        self._noises = tuple(map(_run.strong, noises))
        self._models = tuple(
            one if drive.is_host(one) else _run.as_pytree(one) for one in named.values()
        )
        self._voters = self._models if voter is None else self._models[-1:]
        if len(self._voters) < len(noises):
            self._voters *= len(noises)
        self._lanes = lane_count(batch_size, len(data), self._mesh)
        self._directory, self._resume = located(directory), resume
        if chunk is None and directory is not None and resume:
            # The shape of an interrupted run's forward passes is part of what it is.
            chunk = stored_configuration(self._directory).get("chunk")
        most = default_chunk(self._lanes // self._mesh.size, data.x.shape[1:])
        even = -(-self._block // -(-self._block // most))  # as many passes, but equally full ones
        self._clock, self._speeds = Clock(), dict[str, float]()
        self._programs = Programs(
            self._jobs,
            even if chunk is None else min(self._block, chunk),
            self._mesh,
            self._clock,
            planned=chunk is not None or _asks(self._voters),
            memory=memory,
        )

    def _saw(self, classes: int, name: str = "now") -> None:
        """The number of classes, of which a black box tells with its first answer."""
        if self._classes is None:
            _run.check_labels("y", self._data.y, classes)
            check_top(self._rule.bounds.top, classes)
            self._classes = classes
        elif classes != self._classes:
            raise ValueError(f"logits_fn has {self._classes} classes but {name} {classes}")

    @property
    def plan(self) -> smoothing.Plan:
        """What the run can prove and costs at most."""
        return self._rule.plan(len(self._data), self._n0, self._classes)

    def _lane(self, index: np.ndarray) -> tuple[Any, ...]:
        data = self._data
        return jnp.asarray(data.x[index]), self._noises, jnp.asarray(data.id[index])

    def _parts(self, chunk: int) -> dict[str, tuple[Callable[..., Any], jax.Array, Any]]:
        """What is counted: by which function, under which key, of which models."""
        select, estimate = self._stages
        parts = {
            "select": (_counter(self._n0, chunk), select, self._voters),
            "estimate": (_counter(self._block, chunk), estimate, self._voters),
        }
        if self._rule.pairs:
            parts["pairs"] = (_comparer(self._block, chunk), estimate, self._models)
        return parts

    def _jobs(self, chunk: int) -> dict[str, Job]:
        """What is compiled: the parts without a black box."""
        lane = self._lane(np.resize(np.arange(len(self._data)), self._lanes))
        return {
            name: Job(fn, (key, models, *lane, jnp.uint32(0)), _AXES)
            for name, (fn, key, models) in self._parts(chunk).items()
            if not _asks(models)
        }

    def warm_up(self) -> dict[str, float]:
        return {} if _asks(self._voters) else self._programs.seconds()

    def _identity(self) -> dict[str, str]:
        sets = (self._data.x, self._data.y, self._data.id)
        compiled = [model for model in self._models if not drive.is_host(model)]
        if not self._asked:
            return self._programs.identity(sets, compiled)
        found = {"data_sha256": _identity.arrays(sets)}  # a black box itself has no name
        if compiled:
            x = self._data.x[:1]
            traced = [_identity.program(_answer, model, x) for model in compiled]
            found["variables_sha256"] = _identity.arrays(compiled)
            found["programs_sha256"] = "-".join(traced)
        return found

    def _counted(self, name: str, index: np.ndarray, mask: np.ndarray, starts: range) -> np.ndarray:
        """Counts (R, starts, ...) of the images ``index[mask]``, of the samples from each start."""
        fn, key, models = self._parts(self._programs.size)[name]
        x, *lane = self._lane(index)
        if _asks(models):
            # A black box is not asked about rows that only fill a batch: no copy of them is finite.
            x = jnp.asarray(np.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, np.float32(np.nan)))
        else:
            fn = self._programs[name]
        before = self._clock.seconds["run"]
        with self._clock.measure("run"):
            # All are under way before the first is waited for.
            found = [fn(key, models, x, *lane, jnp.uint32(start)) for start in starts]
            counts = np.stack(parallel.fetch(found), axis=1)[mask]
        self._speeds.setdefault(name, counts.sum() / (self._clock.seconds["run"] - before))
        self._saw(counts.shape[-1] - 1)
        return counts

    def _count(self, run: str, index: np.ndarray, mask: np.ndarray, start: int, end: int) -> Arrays:
        """One file of the log: votes of a batch of images, those that select with the first."""
        data, piece, block = self._data, index[mask], self._block
        batch = {
            "run": np.array(run),
            "index": piece,
            "id": data.id[piece],
            "y": data.y[piece],
            "start": np.array(start),
        }
        if not start:
            batch["select"] = self._counted("select", index, mask, range(1))[:, 0]
            if self._rule.pairs:
                counts = self._counted("pairs", index, mask, range(0, self._rule.pairs, block))
                batch["disagree"] = _votes_log.compact(counts, block)
        counts = self._counted("estimate", index, mask, range(start, end, block))
        batch["estimate"] = _votes_log.compact(counts, block)
        return batch

    def _expected(self, batch: Arrays) -> smoothing.Plan:
        """What is to be expected of the run, from its first batch."""
        counts = batch["estimate"].sum(1, dtype=np.int64)
        return self._rule.plan(
            len(self._data),
            self._n0,
            self._classes,
            p=counts / counts.sum(-1, keepdims=True),
            votes_per_second=self._speeds["estimate"],
            pairs_per_second=self._speeds.get("pairs"),
        )

    def events(self) -> Iterator[CertificationEvent]:
        data, rule, total = self._data, self._rule, len(self._data)
        chunk = self._programs.plan()
        configuration = {
            "noise": self._described,
            "noise_from": _votes_log.source_of(self._rule.bounds.noises),
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
        votes = _votes_log.Votes(total, rule, self._block)
        left, finished, certified, planned = np.arange(total), 0, 0, False
        for stage in range(len(rule.stages)):
            waiting = [left[:0]]
            start, end = (0, *rule.stages)[stage : stage + 2]
            # What a black box has answered is kept block by block.
            step = self._block if _asks(self._voters) else end - start
            for number, (index, mask) in enumerate(rows(left, self._lanes)):
                before, batches = folder.resumed, []
                for sample in range(start, end, step):
                    name = f"{stage:02d}-{number:06d}"
                    if _asks(self._voters):
                        name += f"-{sample // step:05d}"
                    count = functools.partial(self._count, run, index, mask, sample, sample + step)
                    batches.append(folder.once(name, count))
                    if not np.array_equal(batches[-1]["index"], index[mask]):
                        raise ValueError(
                            f"{folder.directory} holds the votes of other images as {name}: files "
                            "of this log have been copied or renamed"
                        )
                    self._saw(batches[-1]["estimate"].shape[-1] - 1)
                    votes.enter(batches[-1])
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
                    plan, planned = self._expected(batches[0]), True
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
    noise: smoothing.Noise | tuple[smoothing.Half, smoothing.Half],
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

    **A black box** (:class:`jrobust.drive.Host`, such as :class:`jrobust.zeroth_order.BlackBox`)
    is asked from Python, once for each finite noisy copy and for nothing else: without copies that
    are not finite, ``report.votes`` is what it was asked. Its answers are in the log block by
    block; what was under way when the run was killed, at most one block of a batch (with the first
    the votes that select), is asked again. Its rows cannot be looked at, and a log does not know
    it by name: data and settings alone tell whether the run in a directory is the same. It may
    also be the exact model beside a compiled ``voter``, which then votes for nothing, and is asked
    ``pairs`` times for each image.

    **Two halves** (:func:`jrobust.smoothing.halves`) in place of a noise certify the classifier
    that adds their votes, by :func:`jrobust.smoothing.certify_dual`: all numbers of votes are then
    those of each half.

    Args:
        key: one typed key; selection and estimation draw from different stages of it.
        logits_fn: the model that is certified: (B, ...) -> (B, C), rows independent, without batch
            statistics; of two halves one for both, or a pair.
        data: the examples, float32, not normalised.
        noise: for instance ``jrobust.smoothing.Gaussian(0.25)``, or two halves.
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
            takes, or fewer, so that ``memory`` holds them.
        memory: bytes to use on each device where ``chunk`` is None; by default 90% of what is free
            there, on a CPU half.
        directory: where to write ``batches`` (the log), ``examples.csv`` (rows as they finish),
            ``counts.npz``, ``configuration.json`` and ``report.json``.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None, one
            beside a black box.
        progress: show a bar, and the plan: what the run can prove and how many votes it takes, and
            after the first batch what is to be expected of it.

    Raises:
        TypeError, ValueError: before any compute, for settings, models and data that cannot be
            right; if another run or a damaged one is in the directory, or another process at work
            there.
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
