"""What all difference estimators share: points along directions, quotients, their weighted sum."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive

Array = jax.Array
PyTree = Any
# Of each leaf of x the numbers that an estimate is of: flat indices (k,), or None for all of them.
Kept = list[Any]

# The default chunk: as many points as hold 16 MiB of float32 numbers, and no more than 64, for the
# activations of fn, whose size cannot be known here, grow with it too.
_CHUNK_NUMBERS = 1 << 22
_CHUNK_POINTS = 64


class Plan(NamedTuple):
    """How an estimate in ``d`` dimensions is made: ``factor * sum_i quotient_i * u_i``."""

    directions: int  # how many u_i
    pairs: bool  # quotients of central pairs, otherwise differences from the shared base value
    factor: float
    size: float  # typical size of a moving coordinate of u_i

    @property
    def points(self) -> int:
        """Evaluations of one direction."""
        return 2 if self.pairs else 1


class Estimator(abc.ABC):
    """A gradient estimator made of difference quotients ``quotient_i`` along directions ``u_i``.

    With ``plan.pairs``, ``quotient_i = (fn(x + mu u_i) - fn(x - mu u_i)) / (2 mu)``, otherwise
    ``(fn(x + mu u_i) - fn(x)) / mu``. Subclasses are ``@algorithm`` dataclasses with the fields
    ``mu`` and ``chunk`` and say which directions (``_direction``), how many and how weighted
    (``_plan``), and what they need of a key (``_key``). They may say how many directions are
    evaluated side by side (``_lanes``), or replace the evaluations altogether (``_estimate``).

    A direction is one vector over all leaves of ``x`` (with a mask: over the numbers it keeps),
    made anew where it is used and never stored with all the others. Differences and sums are taken
    in float32 (float64 where ``x`` has float64) whatever the dtype of ``x``. A non-finite value of
    ``fn`` makes exactly the coordinates non-finite that its direction moves.
    """

    mu: Any
    chunk: int | None
    # A mapped axis (of shard_map or pmap) over whose devices the evaluations are shared out;
    # subclasses that have the field let users choose it.
    axis_name: str | None = None

    @abc.abstractmethod
    def _plan(self, d: int) -> Plan:
        """The plan for ``d`` numbers: those of ``x``, or those that a mask keeps."""

    @abc.abstractmethod
    def _direction(self, key: Any, i: Array, d: int, dtype: Any) -> Array:
        """Direction ``i`` (d,): leaf after leaf of ``x``, masked numbers left out."""

    @abc.abstractmethod
    def _key(self, key: Any, shape: tuple[int, ...]) -> Any:
        """The key as ``_direction`` needs it, after checking that it has this shape."""

    def _lanes(self, d: int) -> int:
        """How many directions are evaluated side by side by ``vmap(fn)``.

        With 1 there is no ``vmap``: the points of a direction are evaluated one by one. Weights
        that differ from lane to lane turn the convolutions of a network into grouped ones, which
        run far below the speed of ordinary ones.
        """
        points = self._plan(d).points
        return (self.chunk or max(points, min(_CHUNK_POINTS, _CHUNK_NUMBERS // d))) // points

    def queries(self, x: PyTree, mask: PyTree | None = None) -> int:
        """Evaluations of ``fn`` for one example, from shapes in ``x`` and counts in ``mask``.

        Always one for the value itself, then one for each direction, or two for central pairs.

        Args:
            x: one example: a pytree of float arrays or ``jax.ShapeDtypeStruct``.
            mask: as in a call; indices may be ``jax.ShapeDtypeStruct`` too.
        """
        leaves = jax.tree.leaves(x)
        plan = self._plan(_dimension(leaves, kept_numbers(x, mask)))
        return 1 + plan.directions * plan.points

    def check(self, x: PyTree | None = None, *, batched: bool = False) -> None:
        """Raise if the configuration, or the configuration for ``x``, cannot work.

        Values inside ``jit`` and ``vmap`` are not known and not looked at; all others are.

        Args:
            x: pytree of float arrays at which a gradient is to be estimated.
            batched: the first axis of every leaf of ``x`` counts examples, as in
                :meth:`per_example`.

        Raises:
            TypeError: a leaf of ``x`` is not of floats.
            ValueError: ``mu`` is not a positive finite number; ``x`` is empty or not finite;
                ``mu`` is below the spacing of floats at ``max |x|``, so that the difference
                quotients would be of rounding errors.
        """
        if jnp.shape(self.mu) != ():
            raise ValueError(f"mu must be a single number, got shape {jnp.shape(self.mu)}")
        # A Python number: inside jit, even comparing known arrays would be traced.
        mu = _known(self.mu)
        if mu is not None and not (math.isfinite(mu) and mu > 0):
            raise ValueError(f"mu must be positive and finite, got {mu}; try 5e-3")
        if x is None:
            return
        leaves = jax.tree.leaves(x)
        d = _dimension(leaves)
        self._check_point(leaves, d // _batch(leaves) if batched else d, batched)

    def _check_point(self, leaves: Sequence[Any], d: int, batched: bool) -> None:
        """The part of :meth:`check` that looks at ``x``, of which ``d`` numbers are estimated."""
        size, mu = self._plan(d).size, _known(self.mu)
        for leaf in leaves:
            if isinstance(leaf, jax.core.Tracer) or not jnp.size(leaf):
                continue
            with jax.ensure_compile_time_eval():  # a constant inside someone's jit is known too
                largest = float(jnp.max(jnp.abs(leaf)))
            if not math.isfinite(largest):
                raise ValueError("x must be finite, got NaN or infinity in it")
            if mu is not None:
                self._check_step(mu * size, largest, jnp.result_type(leaf), batched)

    def _check_step(self, step: float, largest: float, dtype: Any, batched: bool) -> None:
        """Raise ``ValueError`` where ``x + step`` is as good as ``x``."""
        spacing = _spacing(largest, dtype)
        if not step >= spacing:
            mu = float(self.mu)
            raise ValueError(
                f"mu={mu} is lost to rounding: it moves a coordinate by about {step:.2g}, but "
                f"{dtype} numbers near max |x| = {largest:.4g} are {spacing:.2g} apart; use mu >= "
                f"{4 * spacing * mu / step:.2g}, rescale x, or give x in a wider dtype"
            )

    def __call__(
        self,
        key: Any,
        fn: Callable[[PyTree], Any],
        x: PyTree,
        *,
        mask: PyTree | None = None,
        has_aux: bool = False,
    ) -> tuple[Any, PyTree]:
        """Estimate the gradient of ``fn`` at ``x``; pure, for ``jit``, ``vmap`` and ``shard_map``.

        Points are evaluated ``chunk`` at a time, in one ``lax`` loop. For a function that cannot be
        traced use :meth:`per_example` with ``host=True``.

        Args:
            key: one typed PRNG key; ignored by estimators without randomness (None will do).
            fn: pytree like ``x`` -> scalar of float32 (or float64); or, with ``has_aux``, -> (such
                a scalar, any pytree of arrays).
            x: pytree of float arrays, at least one number in all.
            mask: which numbers of ``x`` the gradient is of; it is 0 elsewhere, and what is not
                estimated costs nothing. None, or a pytree of the structure of ``x``, whose leaves
                are either bool arrays of the shape of their leaf, known outside of ``jit`` (their
                counts are part of the program), or integer arrays (k,) of different flat indices,
                as :func:`jrobust.weights.indices` makes them. Those may be traced: new indices of
                the same counts compile nothing.
            has_aux: as in ``jax.value_and_grad``. ``aux`` is that of ``fn(x)`` itself, such as new
                batch statistics.

        Returns:
            ``fn(x)``, which is ``(value, aux)`` with ``has_aux``, and the estimate with the
            structure, shapes and dtypes of ``x``.

        Raises:
            TypeError: ``x`` has a leaf that is not of floats; ``fn`` returns anything but a float32
                or float64 array, or with ``has_aux`` no pair; the key is not typed; a leaf of
                ``mask`` is neither of bool nor of integers, or a traced bool.
            ValueError: ``fn`` returns an array that is not a scalar; ``mask`` keeps nothing or does
                not fit ``x``; and as :meth:`check` does.
        """
        x = _arrays(x)
        kept = kept_numbers(x, mask)
        d = _dimension(jax.tree.leaves(x), kept)
        self.check()
        self._check_point(jax.tree.leaves(x), d, False)
        key = self._key(key, ())
        value, aux, flat = self._estimate(key, _paired(fn, has_aux), x, kept)
        return ((value, aux) if has_aux else value), _unravel(flat, x, kept)

    def _estimate(
        self, key: Any, fn: Callable[[PyTree], tuple[Array, PyTree]], x: PyTree, kept: Kept
    ) -> tuple[Array, PyTree, Array]:
        """``fn(x)``, which is a value and something else, and the estimate of the kept (d,)."""
        d = _dimension(jax.tree.leaves(x), kept)
        plan = self._plan(d)
        value, aux = fn(x)
        check_value(value, ())
        rounds = -(-plan.directions // self._lanes(d))
        lanes = -(-plan.directions // rounds)  # even chunks: fewer idle lanes in the last one
        rounds, first = share(rounds, self.axis_name)

        def value_of(point: PyTree) -> Array:
            return fn(point)[0]

        def body(c: Array, total: Array) -> Array:
            ids = (first + c) * lanes + jnp.arange(lanes)
            directions, batches = _probe(self, key, ids, x, kept, axes=(None, 0, None))
            stacked = jax.tree.map(lambda *p: jnp.concatenate(p), *batches)
            values = jax.vmap(value_of)(stacked) if lanes > 1 else jax.lax.map(value_of, stacked)
            quotients = self._quotients(jnp.split(values, plan.points), value)
            quotients = jnp.where(ids < plan.directions, quotients, 0.0)
            return total + jnp.sum(_terms(quotients, directions), 0)

        total = drive.loop(rounds, body, zeros((d,), self.axis_name, x, value, key, kept))
        return value, aux, plan.factor * gathered(total, self.axis_name)

    def per_example(
        self,
        keys: Any,
        fn: Callable[[PyTree], Array],
        x: PyTree,
        *,
        values: Array | None = None,
        host: bool = False,
    ) -> tuple[Array, PyTree]:
        """Estimate the gradient of each example of a batch, one direction of each at a time.

        ``fn`` is called ``queries(example)`` times, first with ``x`` itself (once less if its
        ``values`` are given), always with whole batches of the shape of ``x``. The directions of
        a row come from its own key, so that they do not depend on the batch it is in. ``chunk``
        plays no part: the batch fills the device.

        Args:
            keys: (B,) typed PRNG keys, one for each example; ignored by estimators without
                randomness (None will do).
            fn: (B, ...) -> (B,) float32 (or float64), rows independent.
            x: (B, ...) floats, or a pytree of such arrays, B the same for all.
            values: (B,) ``fn(x)``, where the caller has paid for it already.
            host: run in a Python loop, for a black box: ``fn`` is never traced, is given
                jax arrays, may return numpy ones (differences of float64 values are then taken in
                float64), and each call of it is one evaluation that counts. Otherwise one ``lax``
                loop.

        Returns:
            ``fn(x)`` (B,), and the estimates with the structure, shapes and dtypes of ``x``.

        Raises:
            TypeError: as :meth:`__call__`; ``host=True`` inside of ``jit``.
            ValueError: the leaves of ``x`` do not share their first axis; ``fn`` does not return
                shape (B,); ``keys`` is not of shape (B,); and as :meth:`check` does.
        """
        x = _arrays(x)
        leaves = jax.tree.leaves(x)
        self.check(x, batched=True)
        batch = _batch(leaves)
        keys = self._key(keys, (batch,))
        if host and any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise TypeError(
                "per_example(host=True) runs in Python and needs concrete arrays, got traced ones; "
                "call it outside of jit, vmap and grad, or use host=False"
            )
        d = _dimension(leaves) // batch
        plan = self._plan(d)
        values = fn(x) if values is None else values
        check_value(values, (batch,))

        def body(i: Array, total: Array) -> Array:
            directions, batches = _probe(self, keys, i, x, None, axes=(0, None, 0))
            quotients = self._quotients([fn(points) for points in batches], values)
            return total + _terms(quotients, directions)

        start = zeros((batch, d), None, x, values, keys)
        total = drive.loop(plan.directions, body, start, host=host)
        return jnp.asarray(values), _unravel(plan.factor * total, x)

    def _quotients(self, values: Sequence[Array], base: Array | float) -> Array:
        if len(values) == 2:
            return (values[0] - values[1]) / (2 * self.mu)
        return (values[0] - base) / self.mu


# Compiled as one call each, because a host loop would pay for every operation in them.
@functools.partial(jax.jit, static_argnames="axes")
def _probe(
    estimator: Estimator,
    key: Any,
    i: Array,
    x: PyTree,
    kept: Kept | None,
    *,
    axes: tuple[int | None, ...],
) -> tuple[Array, list[PyTree]]:
    """Directions of all lanes (N, d), and the points at ``+mu`` (and ``-mu``) along them.

    ``axes`` says which of key, index and ``x`` differ between lanes.
    """
    leaves = jax.tree.leaves(x)
    d = _dimension(leaves, kept) // (1 if axes[2] is None else _batch(leaves))
    signs = (1, -1) if estimator._plan(d).pairs else (1,)

    def lane(key: Any, i: Array, x: PyTree) -> tuple[Array, list[PyTree]]:
        u = estimator._direction(key, i, d, _dtype(x))

        def point(sign: int) -> PyTree:
            step = _unravel(sign * estimator.mu * u, x, kept, cast=False)
            return jax.tree.map(lambda p, s: (p + s).astype(p.dtype), x, step)

        return u, [point(sign) for sign in signs]

    return jax.vmap(lane, axes)(key, i, x)


@jax.jit
def _terms(quotients: Array, directions: Array) -> Array:
    """``quotients`` (N,) times ``directions`` (N, d)."""
    # Multiplied elementwise, for a dot would round to TF32 on some devices; and only where the
    # direction moves, for a NaN at one coordinate must not reach the others.
    q = quotients.astype(directions.dtype)[:, None]
    return jnp.where(directions != 0, q * directions, 0.0)


def share(rounds: int, axis_name: str | None) -> tuple[int, Any]:
    """How many of ``rounds`` fall to each device of a mapped axis, and the first of this one."""
    if axis_name is None:
        return rounds, 0
    each = -(-rounds // jax.lax.axis_size(axis_name))
    return each, each * jax.lax.axis_index(axis_name)


def gathered(part: Array, axis_name: str | None) -> Array:
    """What the devices of a mapped axis computed, each its numbers and zeros elsewhere."""
    # A sum, for its result is known to be the same on all devices.
    return part if axis_name is None else jax.lax.psum(part, axis_name)


def _dtype(x: PyTree) -> Any:
    """The dtype of directions and sums: that of ``x``, but at least float32."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(x))


def zeros(
    shape: tuple[int, ...], axis_name: str | None, x: PyTree, value: Array, key: Any, *more: Any
) -> Array:
    """The empty sum, which inside shard_map varies with all that the sum depends on."""
    like = [x, value, more, [] if key is None else jax.random.key_data(key)]
    zero = sum(jnp.zeros_like(jnp.ravel(v), _dtype(x), shape=()) for v in jax.tree.leaves(like))
    if axis_name is not None:
        zero = zero + jnp.zeros_like(jax.lax.axis_index(axis_name), _dtype(x))
    return jnp.zeros(shape, _dtype(x)) + zero


def _paired(fn: Callable[[PyTree], Any], has_aux: bool) -> Callable[[PyTree], tuple[Any, Any]]:
    """``fn`` as a function that returns a value and something else, None if there is nothing."""

    def pair(x: PyTree) -> tuple[Any, Any]:
        out = fn(x)
        if not has_aux:
            return out, None
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"with has_aux, fn must return (value, aux), got {type(out).__name__}")
        return out

    return pair


def kept_numbers(x: PyTree, mask: PyTree | None) -> Kept:
    """What a mask keeps of each leaf of ``x``; checked."""
    leaves, treedef = jax.tree.flatten(x)
    if mask is None:
        return [None] * len(leaves)
    masks = jax.tree.leaves(mask)
    structure: Any = jax.tree.structure(mask)
    if structure != treedef:
        raise ValueError(f"mask must have the structure of x, {treedef}, got {structure}")
    kept = [_kept(leaf, m) for leaf, m in zip(leaves, masks)]
    if not any(counts(leaves, kept)):
        raise ValueError(f"mask is empty: it keeps none of the {sum(counts(leaves))} numbers of x")
    return kept


def _kept(leaf: Any, mask: Any) -> Any:
    shape, dtype = jnp.shape(leaf), jnp.result_type(mask)
    if dtype == jnp.bool_:
        if isinstance(mask, jax.core.Tracer):
            raise TypeError(
                "a bool mask must be known while tracing, for its counts are part of the program: "
                "close over it, or pass weights.indices(mask) as an argument in its place"
            )
        if jnp.shape(mask) != shape:
            raise ValueError(
                f"a bool mask must have the shapes of x, got {jnp.shape(mask)} for {shape}"
            )
        return np.flatnonzero(np.asarray(mask)).astype(np.int32)
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.ndim(mask) != 1:
        raise TypeError(
            "a leaf of a mask is a bool array of the shape of its leaf of x, or an array (k,) of "
            f"flat indices, got {dtype} of shape {jnp.shape(mask)}"
        )
    size = math.prod(shape)
    if not isinstance(mask, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        known = np.asarray(mask)
        if len(np.unique(known)) < known.size or np.any((known < 0) | (known >= size)):
            raise ValueError(
                f"indices of a mask must be different and in 0 .. {size - 1}, got {known}"
            )
    return mask


def counts(leaves: Sequence[Any], kept: Kept | None = None) -> list[int]:
    """How many numbers of each leaf are kept."""
    kept = kept or [None] * len(leaves)
    return [math.prod(jnp.shape(leaf if k is None else k)) for leaf, k in zip(leaves, kept)]


def _unravel(flat: Array, x: PyTree, kept: Kept | None = None, cast: bool = True) -> PyTree:
    """Cut ``flat`` (d,), or (B, d), into the leaves of ``x``, by default of their dtypes too.

    What is not kept is 0.
    """
    leaves, treedef = jax.tree.flatten(x)
    kept = kept or [None] * len(leaves)
    sizes = [
        math.prod(leaf.shape[flat.ndim - 1 :]) if k is None else k.shape[0]
        for leaf, k in zip(leaves, kept)
    ]
    parts = jnp.split(flat, np.cumsum(sizes)[:-1], axis=-1)

    def leaf_of(part: Array, leaf: Array, k: Any) -> Array:
        if k is not None:
            part = jnp.zeros_like(part, shape=leaf.size).at[k].set(part)
        return part.reshape(leaf.shape).astype(leaf.dtype if cast else part.dtype)

    return jax.tree.unflatten(treedef, map(leaf_of, parts, leaves, kept))


def _arrays(x: PyTree) -> PyTree:
    _dimension(jax.tree.leaves(x))
    return jax.tree.map(jnp.asarray, x)


def _dimension(leaves: Sequence[Any], kept: Kept | None = None) -> int:
    """How many numbers there are in all; raises where there are none or not floats."""
    for leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"x must hold float arrays only, got a leaf of dtype {dtype} and shape "
                f"{jnp.shape(leaf)}; close fn over what is not to be differentiated"
            )
    d = sum(counts(leaves, kept))
    if d == 0:
        raise ValueError(f"x is empty: {len(leaves)} leaves with no number in them")
    return d


def _known(number: Any) -> float | None:
    """A number, or None if it is traced."""
    return None if isinstance(number, jax.core.Tracer) else float(number)


def _batch(leaves: Sequence[Any]) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "every leaf of x must start with the example axis, all of one size, got shapes "
            f"{[jnp.shape(leaf) for leaf in leaves]}"
        )
    return sizes.pop()[0]


def _spacing(size: float, dtype: Any) -> float:
    """The distance from ``size`` to the next number of ``dtype``."""
    info = jnp.finfo(dtype)
    return float(info.eps) * 2.0 ** math.floor(math.log2(max(size, float(info.tiny))))


def check_value(value: Any, shape: tuple[int, ...]) -> None:
    """Raise unless ``fn`` returned floats of this shape, fine enough to be subtracted."""
    if not hasattr(value, "dtype"):
        raise TypeError(f"fn must return an array, got {type(value).__name__}")
    if np.shape(value) != shape:
        expected = f"one value for each row, shape {shape}" if shape else "a scalar"
        raise ValueError(f"fn must return {expected}, got shape {np.shape(value)}")
    if not jnp.issubdtype(value.dtype, jnp.floating) or jnp.finfo(value.dtype).bits < 32:
        raise TypeError(
            f"fn must return float32 values, got {value.dtype}: differences of integers or of "
            "half-precision numbers at a distance mu are rounding errors; compute the loss in "
            "float32"
        )
