"""Counting the votes of a classifier over noisy copies of its input, on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive, keys, parallel
from jrobust.smoothing._noise import Noise, check_dtype

Array = jax.Array

# One forward pass takes at most this many rows, and this many input values: 64 MiB in float32. On
# a CPU activations should stay in caches (ResNet-20: 1.3 times the speed of 2^23 values).
_ROWS = 4096
_VALUES, _VALUES_CPU = 2**24, 2**18


class Stages(NamedTuple):
    """One key for each stage of a certificate, so that none sees another's samples."""

    select: Array
    estimate: Array


def stages(key: Array) -> Stages:
    """The keys ``fold_in(key, 0)`` for selecting a class and ``fold_in(key, 1)`` for estimating it.

    The bound on the selected class holds only for samples that had no part in selecting it.
    """
    keys.check(key)
    return Stages(*(jax.random.fold_in(key, stage) for stage in range(len(Stages._fields))))


def default_chunk(batch: int, shape: tuple[int, ...]) -> int:
    """Copies of each of ``batch`` inputs of this shape in one forward pass."""
    values = _VALUES_CPU if jax.default_backend() == "cpu" else _VALUES
    return max(1, min(_ROWS, values // math.prod(shape)) // batch)


def _check(key: Array, x: Array, n: int, start: Array | int, ids: Array | None) -> None:
    keys.check(key)
    dtype = getattr(x, "dtype", type(x).__name__)
    if dtype != jnp.float32:
        raise TypeError(
            f"x must be a float32 array, got {dtype}: noise is added in float32 before anything "
            "else; convert and scale x first and let the model cast to its own precision"
        )
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x must be a non-empty batch (B, ...), got shape {x.shape}")
    if isinstance(n, bool) or not isinstance(n, int) or not 0 < n < 2**31:
        raise ValueError(f"n must be a Python int in [1, 2^31), got {n!r}")
    if not jnp.issubdtype(jnp.result_type(start), jnp.integer) or jnp.ndim(start) != 0:
        raise TypeError(f"start must be an integer, got {start!r}")
    if not isinstance(start, jax.core.Tracer) and not 0 <= int(start) <= 2**32 - n:
        raise ValueError(f"samples start .. start + n - 1 must lie in [0, 2^32), got {start=}")
    if ids is not None and (ids.shape != x.shape[:1] or not jnp.issubdtype(ids.dtype, jnp.integer)):
        raise ValueError(
            f"ids must be integers of shape {x.shape[:1]}, one for each row of x, "
            f"got {ids.dtype} of shape {ids.shape}"
        )


def _copies(image_keys: Array, x: Array, noise: Noise, samples: Array) -> tuple[Array, Array]:
    """The copies ``samples`` (m,) of each input, (B * m, ...), and which are finite.

    Those of one input are side by side.
    """
    sample_keys = keys.fold(jnp.repeat(image_keys, len(samples)), jnp.tile(samples, len(x)))
    points = jax.vmap(noise.perturb)(sample_keys, jnp.repeat(x, len(samples), axis=0))
    check_dtype(points.dtype)
    return points, jnp.isfinite(points).reshape(len(points), -1).all(axis=1)


# Compiled on its own, because a black box is asked from Python.
_compiled_copies = jax.jit(_copies)


def _first(start: Array | int) -> Array:
    """The index of the first sample, of 32 bits."""
    if not isinstance(start, jax.core.Tracer):
        start = jnp.uint32(start)
    return jnp.asarray(start).astype(jnp.uint32)


def _scan(
    key: Array,
    label: Callable[[Array], Array],
    columns: int,
    x: Array,
    noise: Noise,
    n: int,
    start: Array,
    ids: Array,
    chunk: int,
) -> Array:
    """Count the labels, below ``columns``, of n noisy copies of each input: (B, columns) int32."""
    batch = x.shape[0]
    image_keys = keys.examples(key, ids)
    offsets = jnp.arange(chunk, dtype=jnp.uint32)

    def body(i: Array, counts: Array) -> Array:
        done = jnp.asarray(i).astype(jnp.uint32) * chunk + offsets  # (chunk,), from 0
        points, finite = _copies(image_keys, x, noise, start + done)
        labels = jnp.where(finite, label(points), columns - 1).reshape(batch, chunk)
        labels = jnp.where((done < n)[None], labels, -1)  # the tail of the last chunk is nobody's
        hits = labels[:, :, None] == jnp.arange(columns)[None, None]
        return counts + hits.sum(axis=1, dtype=jnp.int32)

    # Zeros made from the inputs vary over a mesh where the counts will.
    zero = jnp.zeros_like(ids, jnp.int32) + jnp.zeros_like(start, jnp.int32)
    init = jnp.zeros_like(x, jnp.int32, shape=(batch, columns)) + zero[:, None]
    return drive.loop(-(-n // chunk), body, init)


def _prepare(
    key: Array, x: Array, n: int, start: Array | int, ids: Array | None, chunk: int | None
) -> tuple[Array, Array, int]:
    """Checked (x, ids, chunk)."""
    if ids is not None:
        keys.check_range(ids)
        ids = jnp.asarray(ids)
    _check(key, x, n, start, ids)
    x = jnp.asarray(x)
    if chunk is None:
        most = default_chunk(x.shape[0], x.shape[1:])
        chunk = -(-n // -(-n // most))  # as many passes, but equally full ones
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be at least 1, a Python int, got {chunk!r}")
    return x, jnp.arange(x.shape[0]) if ids is None else ids, min(chunk, n)


def _logits_of(fn: Callable[[Array], Array], shape: tuple[int, ...]) -> tuple[Any, int]:
    """``fn`` at the highest precision, and its number of classes; ``shape`` is that of a batch."""

    def logits_of(points: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return fn(points)

    out = jax.eval_shape(logits_of, jax.ShapeDtypeStruct(shape, jnp.float32))
    if getattr(out, "ndim", None) != 2 or out.shape[0] != shape[0] or out.shape[1] < 2:
        raise ValueError(
            f"logits_fn must map {shape} to ({shape[0]}, C) logits with C >= 2, got {out}"
        )
    return logits_of, out.shape[1]


def _vote(logits: Array) -> Array:
    """(R, C) logits -> (R,) votes: the first of the largest, or C where one is not finite."""
    finite = jnp.isfinite(logits).all(axis=1)
    return jnp.where(finite, jnp.argmax(logits, axis=1), logits.shape[1])


def _said(fn: Any, points: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, int]:
    """(R,) votes of a black box at the points (R, ...), and the number of classes.

    It is shown the points ``asked`` (R,) alone; its votes at the others are -1.
    """
    logits = fn(jnp.asarray(points[asked]))
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the models must answer with (R, C) logits, C >= 2, got {logits.shape}")
    votes = np.full(len(points), -1)
    votes[asked] = _vote(logits)
    return votes, logits.shape[1]


@jax.jit
def _cast(fn: Any, image_keys: Array, x: Array, noise: Noise, samples: Array) -> Array:
    """(B * m,) votes of a compiled model at the copies ``samples`` (m,).

    In a loop, as in :func:`_scan`: elsewhere compilers round a model otherwise, and in half
    precision that is another model, a vote in a few hundred apart.
    """
    logits_of, _ = _logits_of(fn, (x.shape[0] * len(samples), *x.shape[1:]))

    def body(i: Array, votes: Array) -> Array:
        later = samples + jnp.asarray(i).astype(jnp.uint32)
        return _vote(logits_of(_copies(image_keys, x, noise, later)[0])).astype(votes.dtype)

    return drive.loop(1, body, jnp.zeros(x.shape[0] * len(samples), jnp.int32))


def _ask(
    key: Array,
    label: Callable[[np.ndarray, np.ndarray, Array], tuple[np.ndarray, int]],
    x: Array,
    noise: Noise,
    n: int,
    start: Array | int,
    ids: Array,
    chunk: int,
) -> Array:
    """As :func:`_scan`, from Python, because a black box is asked: only at copies that are finite.

    ``label(points, asked, samples)`` gives labels below ``classes`` for what is counted, and
    ``classes``.
    """
    if any(isinstance(one, jax.core.Tracer) for one in (key, x, start, ids)):
        raise TypeError(
            "a Host model cannot be traced by jit or vmap: count its votes outside of them"
        )
    image_keys = keys.examples(key, ids)
    offsets = np.arange(chunk)
    votes: Any = 0
    for first in range(0, n, chunk):
        samples = jnp.uint32(start) + jnp.asarray(first + offsets, jnp.uint32)
        points, finite = map(np.asarray, _compiled_copies(image_keys, x, noise, samples))
        asked = finite & np.tile(first + offsets < n, len(x))
        if asked.any():
            labels, classes = label(points, asked, samples)
            hits = np.where(asked, labels, classes).reshape(len(x), chunk, 1) == np.arange(classes)
            votes = votes + hits.sum(axis=1, dtype=np.int32)
    if np.ndim(votes) == 0:
        raise ValueError(
            "no noisy copy of any input is finite, so that the Host model was not asked, and the "
            "number of its classes is not known"
        )
    return jnp.asarray(np.concatenate([votes, n - votes.sum(axis=1, keepdims=True)], axis=1))


def count_votes(
    key: Array,
    logits_fn: Callable[[Array], Array],
    x: Array,
    noise: Noise,
    n: int,
    *,
    start: Array | int = 0,
    ids: Array | None = None,
    chunk: int | None = None,
) -> Array:
    """Count the classes that ``logits_fn`` gives to n noisy copies of each input.

    Pure and traceable: call it inside ``jax.jit`` with n and chunk fixed. Sample j of the image
    with id i is drawn from ``fold_in(fold_in(key, i), j)`` in float32 and joined with float32 x
    before anything else, so that votes do not depend on chunk, batch, order or device, up to the
    rounding of the network at another batch shape. Counts over disjoint ranges of samples add up.
    Each pass classifies ``chunk`` samples of every image, so that few images with many samples
    fill the device as well as many images with few.

    The network runs under ``jax.default_matmul_precision("highest")``: a certificate is about
    ``logits_fn`` in the precision it is written in, not in one that the hardware prefers. Layers
    that name their own precision keep it. It must treat rows independently: batch statistics and
    dropout off, normalisation inside ``logits_fn``, after the noise.

    Args:
        key: a typed threefry key, of one stage: see :func:`stages`.
        logits_fn: (R, ...) float32 -> (R, C) logits, C >= 2; any callable. A
            :class:`jrobust.drive.Host` is asked from Python, once for each finite noisy copy.
        x: (B, ...) float32 inputs, in the units of the noise.
        noise: for example :class:`Gaussian`.
        n: samples for each input, a Python int.
        start: index of the first sample; may be traced. ``start + n`` may not exceed 2^32.
        ids: (B,) integer ids of the inputs, by default 0 .. B - 1.
        chunk: samples of each input in one forward pass, which takes B * chunk rows; by default
            what fills 4,096 rows or 2^24 input values (on a CPU 2^18), whichever is less, in equal
            passes.

    Returns:
        (B, C + 1) int32, each row summing to n. The last column counts rejects: samples whose noisy
        input or any of whose logits is not finite.

    Raises:
        TypeError: x not float32, start not integer, a raw uint32 key.
        ValueError: empty x, n or chunk < 1, ids of another shape, noise not float32 or of another
            size, logits that are not (R, C) with C >= 2.
    """
    x, ids, chunk = _prepare(key, x, n, start, ids, chunk)
    if drive.is_host(logits_fn):

        def label(points: np.ndarray, asked: np.ndarray, _: Array) -> tuple[np.ndarray, int]:
            return _said(logits_fn, points, asked)

        return _ask(key, label, x, noise, n, start, ids, chunk)
    args = (x, key, noise, _first(start), ids)
    return parallel.by_rows(_count, logits_fn, *args, n=n, chunk=chunk)


def _count(
    logits_fn: Any, x: Array, key: Array, noise: Noise, start: Array, ids: Array, n: int, chunk: int
) -> Array:
    logits_of, classes = _logits_of(logits_fn, (x.shape[0] * chunk, *x.shape[1:]))
    return _scan(key, lambda v: _vote(logits_of(v)), classes + 1, x, noise, n, start, ids, chunk)


def _check_classes(classes: int, others: int) -> None:
    if classes != others:
        raise ValueError(f"logits_fn has {classes} classes but voter {others}")


def count_disagreements(
    key: Array,
    logits_fn: Callable[[Array], Array],
    voter: Callable[[Array], Array],
    x: Array,
    noise: Noise,
    n: int,
    *,
    start: Array | int = 0,
    ids: Array | None = None,
    chunk: int | None = None,
) -> Array:
    """Count the votes of ``voter`` that ``logits_fn`` would not cast on the same noisy copies.

    What lets a fast model, for instance the bfloat16 twin, vote for a certificate of the float32
    one: see ``disagreements`` of :func:`certify`. Both see the copies that :func:`count_votes`
    draws under the same key, and a sample that either cannot answer with finite logits is a vote
    for no class. Where one of them is a :class:`jrobust.drive.Host`, such as an exact model that
    charges for answers beside a fast one that does not, it is asked once for each finite copy.

    Args:
        key: a typed threefry key, of one stage.
        logits_fn: the model that is certified, (R, ...) float32 -> (R, C) logits.
        voter: the model whose votes were counted, likewise.
        x: (B, ...) float32 inputs.
        noise: the noise of the votes.
        n: pairs for each input, a Python int; the other arguments are those of
            :func:`count_votes`. ``chunk`` as in the votes keeps the shape of the voter's passes.

    Returns:
        (B, C + 1) int32, each row summing to n: in column c the samples for which ``voter`` said c
        and ``logits_fn`` something else or nothing, in the last all others.

    Raises:
        TypeError, ValueError: as :func:`count_votes`; models with different numbers of classes.
    """
    x, ids, chunk = _prepare(key, x, n, start, ids, chunk)
    shape = (x.shape[0] * chunk, *x.shape[1:])
    if drive.is_host(logits_fn) or drive.is_host(voter):
        image_keys = keys.examples(key, ids)

        def answers(fn: Any) -> Callable[..., tuple[np.ndarray, int]]:
            if drive.is_host(fn):
                return lambda points, asked, samples: _said(fn, points, asked)
            # A plain function is static, one trace for each function object.
            model = jax.tree_util.Partial(fn) if jax.tree_util.all_leaves([fn]) else fn
            classes = _logits_of(fn, shape)[1]
            return lambda points, asked, samples: (
                np.asarray(_cast(model, image_keys, x, noise, samples)),
                classes,
            )

        exact_of, voter_of = answers(logits_fn), answers(voter)

        def differ(*at: Any) -> tuple[np.ndarray, int]:
            (meant, classes), (said, others) = exact_of(*at), voter_of(*at)
            _check_classes(classes, others)
            return np.where(said != meant, said, classes), classes

        return _ask(key, differ, x, noise, n, start, ids, chunk)
    args = (x, key, noise, _first(start), ids)
    return parallel.by_rows(_compare, (logits_fn, voter), *args, n=n, chunk=chunk)


def _compare(
    models: Any, x: Array, key: Array, noise: Noise, start: Array, ids: Array, n: int, chunk: int
) -> Array:
    (exact, classes), (fast, others) = (
        _logits_of(fn, (x.shape[0] * chunk, *x.shape[1:])) for fn in models
    )
    _check_classes(classes, others)

    def label(points: Array) -> Array:
        said = _vote(fast(points))
        return jnp.where(said != _vote(exact(points)), said, classes)

    return _scan(key, label, classes + 1, x, noise, n, start, ids, chunk)
