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
from jrobust.loops._lanes import (
    Bar,
    Clock,
    Files,
    check_count,
    check_data,
    lane_count,
    rows,
    surroundings,
    with_iter,
)
from jrobust.statistics._binomial import check_probability

_COUNTED = ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n")
_COLUMNS = ("id", "y", "correct", *_COUNTED)
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
        seconds: wall time spent in ``compile``, ``run`` and ``other``.
    """

    certificate: smoothing.Certificate
    select_counts: np.ndarray
    estimate_counts: np.ndarray
    y: np.ndarray
    id: np.ndarray
    configuration: dict[str, Any]
    seconds: dict[str, float]

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


def _iterate(
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
    directory: Any = None,
    mesh: Mesh | None = None,
) -> Iterator[CertificationEvent]:
    """See :func:`certify`."""
    if drive.is_host(logits_fn):
        raise TypeError("certification compiles its votes: a Host model cannot be certified yet")
    mesh = parallel.mesh() if mesh is None else mesh
    check_data(data)
    lanes, total = lane_count(batch_size, len(data), mesh), len(data)
    for name, value in (("n0", n0), ("n", n), ("chunk", n if chunk is None else chunk)):
        check_count(name, value)
    check_probability("alpha", alpha)
    if not callable(getattr(noise, "check", None)) or isinstance(noise, type):
        raise TypeError(f"noise must be a noise such as smoothing.Gaussian(0.25), got {noise!r}")
    noise.check()
    stages = smoothing.stages(key)
    classes = _run.count_classes(logits_fn, jnp.asarray(data.x[:1]))
    _run.check_labels("y", data.y, classes)
    reach = smoothing.ceiling(noise, n, alpha)
    if reach <= 0:
        raise ValueError(
            f"n = {n} votes can never certify anything at alpha = {alpha}: even unanimous votes "
            "leave a radius of zero; raise n"
        )
    clock, files = Clock(), Files(directory, _COLUMNS)
    configuration = {
        "noise": describe(noise),
        "n0": n0,
        "n": n,
        "alpha": alpha,
        "radius_ceiling": reach,
        "batch_size": lanes,
        "examples": total,
        **surroundings(key, mesh),
    }
    files.json("configuration.json", configuration)
    model, noise = _run.as_pytree(logits_fn), _run.strong(noise)

    def lane(index: np.ndarray) -> tuple[Any, ...]:
        return model, jnp.asarray(data.x[index]), noise, jnp.asarray(data.id[index])

    example = (stages.select, *lane(np.resize(np.arange(total), lanes)))
    select, estimate = (
        clock.compiled(_counter(samples, chunk), *example, mesh=mesh, in_axes=_AXES)
        for samples in (n0, n)
    )
    counts = np.zeros((2, total, classes + 1), np.int32)
    done = certified = 0
    for index, mask in rows(np.arange(total), lanes):
        piece, batch = index[mask], lane(index)
        counts[0, piece] = np.asarray(select(stages.select, *batch))[mask]
        counts[1, piece] = np.asarray(estimate(stages.estimate, *batch))[mask]
        part = smoothing.certify(counts[0, piece], counts[1, piece], noise, alpha)
        correct = part.prediction == data.y[piece]
        certified += int(np.sum(correct))
        columns = {name: getattr(part, name) for name in _COUNTED}
        columns.update(id=data.id[piece], y=data.y[piece], correct=correct)
        files.examples(columns)
        done += len(piece)
        yield CertificationEvent(done, total, certified)
    report = CertificationReport(
        certificate=smoothing.certify(counts[0], counts[1], noise, alpha),
        select_counts=counts[0],
        estimate_counts=counts[1],
        y=data.y,
        id=data.id,
        configuration=configuration,
        seconds=clock.total(),
    )
    files.save("counts.npz", select=counts[0], estimate=counts[1], id=data.id, y=data.y)
    files.json(
        "report.json",
        {
            "certified_accuracy": float(report.accuracy(0.0)),
            "average_radius": report.average_radius,
            "statement": report.certificate.statement(),
            "votes": report.votes,
            "seconds": report.seconds,
        },
    )
    yield CertificationEvent(total, total, certified, report)


@with_iter(_iterate)
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
    directory: Any = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> CertificationReport:
    """Certify every example by randomized smoothing (Cohen et al. 2019, CERTIFY).

    Votes are counted on the device, bounds computed from the integer counts on the host in
    float64. The counts of an example depend on the key and the example's id alone.
    ``certify.iter`` takes the same arguments but ``progress`` and yields a
    :class:`CertificationEvent` after every batch.

    Args:
        key: one typed key; selection and estimation draw from different stages of it.
        logits_fn: (B, ...) -> (B, C), rows independent, without batch statistics.
        data: the examples, float32, not normalised.
        noise: for instance ``jrobust.smoothing.Gaussian(0.25)``.
        n0: votes that select the class.
        n: fresh votes that bound its probability.
        alpha: probability that one example's certificate is false.
        batch_size: images in a batch; ``chunk`` noisy copies of each are classified at a time.
        chunk: as in :func:`jrobust.smoothing.count_votes`.
        directory: where to write ``examples.csv`` (rows as they finish), ``counts.npz``,
            ``configuration.json`` and ``report.json``.
        mesh: devices to split every batch over, from ``jrobust.parallel.mesh``; all when None.
        progress: show a bar.

    Raises:
        TypeError, ValueError: before any compute, for settings and data that cannot be right.
    """
    with Bar(progress, "image") as bar:
        for event in _iterate(
            key,
            logits_fn,
            data,
            noise,
            n0=n0,
            n=n,
            alpha=alpha,
            batch_size=batch_size,
            chunk=chunk,
            directory=directory,
            mesh=mesh,
        ):
            share = event.certified / event.finished
            bar.update("certify", event.finished, event.total, certified=share)
    assert event.report is not None
    return event.report
