"""Certified accuracy of a smoothed model over a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrobust import _run, drive, parallel, smoothing
from jrobust._algorithm import describe
from jrobust.data import Dataset
from jrobust.loops._folder import Arrays, Folder, stored_configuration
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
from jrobust.smoothing._votes import default_chunk
from jrobust.statistics._binomial import check_probability

_COUNTED = ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n")
_COLUMNS = ("id", "y", "correct", *_COUNTED)
_STAGES = smoothing.Stages._fields
_AXES = (None, None, 0, None, 0)  # key, model, x, noise, ids


@dataclasses.dataclass(frozen=True, eq=False)
class CertificationReport:
    """Certificates of a data set, with the counts they follow from.

    Attributes:
        certificate: predictions and radii, (N,) each; see :class:`jrobust.smoothing.Certificate`.
        select_counts: (N, C + 1) int32 votes that selected the class; last column rejects.
        estimate_counts: (N, C + 1) int32 votes that bounded its probability.
        y: (N,) true labels.
        id: (N,) example ids.
        configuration: noise, n0, n, alpha, seed and versions.
        seconds: wall time that this process spent in ``compile``, ``run`` and ``other``.
        resumed: batches that came from the directory of an interrupted or finished run.
    """

    certificate: smoothing.Certificate
    select_counts: np.ndarray
    estimate_counts: np.ndarray
    y: np.ndarray
    id: np.ndarray
    configuration: dict[str, Any]
    seconds: dict[str, float]
    resumed: int = 0

    def accuracy(self, radii: Any = 0.0) -> Any:
        """Certified accuracy at each of ``radii``."""
        return self.certificate.accuracy(self.y, radii)

    @property
    def average_radius(self) -> float:
        """Average certified radius; wrong answers and abstentions count 0."""
        return self.certificate.average_radius(self.y)

    @property
    def votes(self) -> int:
        """Noisy copies classified in all."""
        return int(self.select_counts.sum() + self.estimate_counts.sum())


class CertificationEvent(NamedTuple):
    """Yielded after every batch, and once more with the ``report``.

    Attributes:
        finished: images certified or abstained on so far, of ``total``.
        total: images.
        certified: images certified as their true label so far.
        report: what :func:`certify` returns, on the last event.
    """

    finished: int
    total: int
    certified: int
    report: CertificationReport | None = None


@functools.lru_cache(maxsize=64)
def _counter(samples: int, chunk: int | None) -> Callable[..., jax.Array]:
    def count(key: Any, model: Any, x: Any, noise: Any, ids: Any) -> jax.Array:
        return smoothing.count_votes(key, model, x, noise, samples, ids=ids, chunk=chunk)

    return count


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
        n: int = 10_000,
        alpha: float = 0.001,
        batch_size: int = 32,
        chunk: int | None = None,
        memory: int | None = None,
        directory: Any = None,
        resume: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        if drive.is_host(logits_fn):
            raise TypeError(
                "certification compiles its votes: a Host model cannot be certified yet"
            )
        self._mesh = parallel.mesh() if mesh is None else mesh
        check_data(data)
        for name, value in (("n0", n0), ("n", n), ("chunk", n if chunk is None else chunk)):
            check_count(name, value)
        check_probability("alpha", alpha)
        if not callable(getattr(noise, "check", None)) or isinstance(noise, type):
            raise TypeError(
                f"noise must be a noise such as smoothing.Gaussian(0.25), got {noise!r}"
            )
        noise.check()
        self._key, self._data, self._n0, self._n, self._alpha = key, data, n0, n, alpha
        self._stages = smoothing.stages(key)
        self._classes = _run.count_classes(logits_fn, jnp.asarray(data.x[:1]))
        _run.check_labels("y", data.y, self._classes)
        self._reach = smoothing.ceiling(noise, n, alpha)
        if self._reach <= 0:
            raise ValueError(
                f"n = {n} votes can never certify anything at alpha = {alpha}: even unanimous "
                "votes leave a radius of zero; raise n"
            )
        self._described = describe(noise)
        self._model, self._noise = _run.as_pytree(logits_fn), _run.strong(noise)
        self._lanes = lane_count(batch_size, len(data), self._mesh)
        self._directory, self._resume = directory, resume
        if chunk is None and directory is not None and resume:
            # The shape of an interrupted run's forward passes is part of what it is.
            chunk = stored_configuration(directory).get("chunk")
        most = default_chunk(self._lanes // self._mesh.size, data.x.shape[1:])
        self._clock = Clock()
        self._programs = Programs(
            self._jobs,
            min(n, most if chunk is None else chunk),
            self._mesh,
            self._clock,
            planned=chunk is not None,
            memory=memory,
        )

    def _lane(self, index: np.ndarray) -> tuple[Any, ...]:
        data = self._data
        return self._model, jnp.asarray(data.x[index]), self._noise, jnp.asarray(data.id[index])

    def _jobs(self, chunk: int) -> dict[str, Job]:
        example = self._lane(np.resize(np.arange(len(self._data)), self._lanes))
        return {
            name: Job(_counter(samples, chunk), (key, *example), _AXES)
            for name, key, samples in zip(_STAGES, self._stages, (self._n0, self._n))
        }

    def warm_up(self) -> dict[str, float]:
        return self._programs.seconds()

    def _identity(self) -> dict[str, str]:
        return self._programs.identity((self._data.x, self._data.y, self._data.id), self._model)

    def events(self) -> Iterator[CertificationEvent]:
        data, noise, alpha, total = self._data, self._noise, self._alpha, len(self._data)
        chunk = self._programs.plan()
        configuration = {
            "noise": self._described,
            "n0": self._n0,
            "n": self._n,
            "alpha": alpha,
            "radius_ceiling": self._reach,
            "batch_size": self._lanes,
            "chunk": chunk,
            "examples": total,
            **surroundings(self._key, self._mesh),
        }
        folder = Folder(
            self._directory, configuration, self._identity, resume=self._resume, columns=_COLUMNS
        )

        def vote(index: np.ndarray, mask: np.ndarray) -> Arrays:
            programs, batch = self._programs.compiled(), self._lane(index)
            with self._clock.measure("run"):
                return {
                    name: parallel.fetch(programs[name](key, *batch))[mask]
                    for name, key in zip(_STAGES, self._stages)
                }

        counts = np.zeros((2, total, self._classes + 1), np.int32)
        done = certified = 0
        for number, (index, mask) in enumerate(rows(np.arange(total), self._lanes)):
            batch = folder.once(f"{number:06d}", functools.partial(vote, index, mask))
            piece = index[mask]
            counts[:, piece] = [batch[name] for name in _STAGES]
            part = smoothing.certify(counts[0, piece], counts[1, piece], noise, alpha)
            correct = part.prediction == data.y[piece]
            certified += int(np.sum(correct))
            columns = {name: getattr(part, name) for name in _COUNTED}
            columns.update(id=data.id[piece], y=data.y[piece], correct=correct)
            folder.examples(columns)
            done += len(piece)
            yield CertificationEvent(done, total, certified)
        report = CertificationReport(
            certificate=smoothing.certify(counts[0], counts[1], noise, alpha),
            select_counts=counts[0],
            estimate_counts=counts[1],
            y=data.y,
            id=data.id,
            configuration=folder.configuration,
            seconds=self._clock.total(),
            resumed=folder.resumed,
        )
        folder.save("counts.npz", select=counts[0], estimate=counts[1], id=data.id, y=data.y)
        folder.finish(
            {
                "certified_accuracy": float(report.accuracy(0.0)),
                "average_radius": report.average_radius,
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
    n: int = 10_000,
    alpha: float = 0.001,
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
    the traced model are the same.

    Args:
        key: one typed key; selection and estimation draw from different stages of it.
        logits_fn: (B, ...) -> (B, C), rows independent, without batch statistics.
        data: the examples, float32, not normalised.
        noise: for instance ``jrobust.smoothing.Gaussian(0.25)``.
        n0: votes that select the class.
        n: fresh votes that bound its probability.
        alpha: probability that one example's certificate is false.
        batch_size: images in a batch; ``chunk`` noisy copies of each are classified at a time.
        chunk: as in :func:`jrobust.smoothing.count_votes`; by default what that takes, or fewer,
            as many as ``memory`` holds.
        memory: bytes to use on each device where ``chunk`` is None; by default 90% of what is free
            there, on a CPU half.
        directory: where to write ``examples.csv`` (rows as they finish), ``counts.npz``,
            ``configuration.json`` and ``report.json``.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, for settings and data that cannot be right; if
            another run is in the directory.
    """
    events = certify.iter(
        key,
        logits_fn,
        data,
        noise,
        n0=n0,
        n=n,
        alpha=alpha,
        batch_size=batch_size,
        chunk=chunk,
        memory=memory,
        directory=directory,
        resume=resume,
        mesh=mesh,
    )
    with Bar(progress, "image") as bar:
        for event in events:
            share = event.certified / event.finished
            bar.update("certify", event.finished, event.total, certified=share)
    assert event.report is not None
    return event.report
