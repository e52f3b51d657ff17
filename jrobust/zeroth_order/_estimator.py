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


class Estimator(abc.ABC):
    """A gradient estimator made of difference quotients ``quotient_i`` along directions ``u_i``.

    With ``plan.pairs``, ``quotient_i = (fn(x + mu u_i) - fn(x - mu u_i)) / (2 mu)``, otherwise
    ``(fn(x + mu u_i) - fn(x)) / mu``. Subclasses are ``@algorithm`` dataclasses with the fields
    ``mu`` and ``chunk`` and say which directions (``_direction``), how many and how weighted
    (``_plan``), and what they need of a key (``_key``).

    A direction is one vector over all leaves of ``x``, made anew where it is used and never stored
    with all the others. Differences and sums are taken in float32 (float64 where ``x`` has float64)
    whatever the dtype of ``x``. A non-finite value of ``fn`` makes exactly the coordinates
    non-finite that its direction moves.
    """

    mu: Any
    chunk: int | None

    @abc.abstractmethod
    def _plan(self, d: int) -> Plan:
        """The plan for ``x`` of ``d`` numbers."""

    @abc.abstractmethod
    def _direction(self, key: Any, i: Array, d: int, dtype: Any) -> Array:
        """Direction ``i`` (d,), the leaves of ``x`` one after the other."""

    @abc.abstractmethod
    def _key(self, key: Any, shape: tuple[int, ...]) -> Any:
        """The key as ``_direction`` needs it, after checking that it has this shape."""

    def queries(self, x: PyTree) -> int:
        """Evaluations of ``fn`` for one example, from the shapes in ``x`` alone.

        Always one for the value itself, then one for each direction, or two for central pairs.

        Args:
            x: one example: a pytree of float arrays or ``jax.ShapeDtypeStruct``.
        """
        plan = self._plan(_dimension(jax.tree.leaves(x)))
        return 1 + plan.directions * (2 if plan.pairs else 1)

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
        mu = None if isinstance(self.mu, jax.core.Tracer) else float(self.mu)
        if mu is not None and not (math.isfinite(mu) and mu > 0):
            raise ValueError(f"mu must be positive and finite, got {mu}; try 5e-3")
        if x is None:
            return
        leaves = jax.tree.leaves(x)
        d = _dimension(leaves)
        if batched:
            d //= _batch(leaves)
        size = self._plan(d).size
        for leaf in leaves:
            if isinstance(leaf, jax.core.Tracer) or not jnp.size(leaf):
                continue
            with jax.ensure_compile_time_eval():  # a constant inside someone's jit is known too
                largest = float(jnp.max(jnp.abs(leaf)))
            if not math.isfinite(largest):
                raise ValueError("x must be finite, got NaN or infinity in it")
            dtype = jnp.result_type(leaf)
            spacing = _spacing(largest, dtype)
            if mu is not None and not mu * size >= spacing:
                raise ValueError(
                    f"mu={mu} is lost to rounding: it moves a coordinate by about "
                    f"{mu * size:.2g}, but {dtype} numbers near max |x| = {largest:.4g} "
                    f"are {spacing:.2g} apart; use mu >= {4 * spacing / size:.2g}, rescale x, or "
                    "give x in a wider dtype"
                )

    def __call__(self, key: Any, fn: Callable[[PyTree], Array], x: PyTree) -> tuple[Array, PyTree]:
        """Estimate the gradient of ``fn`` at ``x``; pure, for ``jit``, ``vmap`` and ``shard_map``.

        Points are evaluated ``chunk`` at a time by ``vmap(fn)``, in one ``lax`` loop. For a
        function that cannot be traced use :meth:`per_example` with ``host=True``.

        Args:
            key: one typed PRNG key; ignored by estimators without randomness (None will do).
            fn: pytree like ``x`` -> scalar of float32 (or float64).
            x: pytree of float arrays, at least one number in all.

        Returns:
            ``fn(x)``, and the estimate with the structure, shapes and dtypes of ``x``.

        Raises:
            TypeError: ``x`` has a leaf that is not of floats; ``fn`` returns anything but a float32
                or float64 array; the key is not typed.
            ValueError: ``fn`` returns an array that is not a scalar; and as :meth:`check` does.
        """
        x = _arrays(x)
        self.check(x)
        key = self._key(key, ())
        d = _dimension(jax.tree.leaves(x))
        plan = self._plan(d)
        value = fn(x)
        check_value(value, ())

        points = 2 if plan.pairs else 1
        chunk = self.chunk or max(points, min(_CHUNK_POINTS, _CHUNK_NUMBERS // d))
        rounds = -(-plan.directions // (chunk // points))
        lanes = -(-plan.directions // rounds)  # even chunks: fewer idle lanes in the last one

        def body(c: Array, total: Array) -> Array:
            ids = c * lanes + jnp.arange(lanes)
            directions, batches = _probe(self, key, ids, x, axes=(None, 0, None))
            stacked = jax.tree.map(lambda *p: jnp.concatenate(p), *batches)
            values = jnp.split(jax.vmap(fn)(stacked), points)
            quotients = jnp.where(ids < plan.directions, self._quotients(values, value), 0.0)
            return total + jnp.sum(_terms(quotients, directions), 0)

        total = drive.loop(rounds, body, _zeros((d,), x, value, key))
        return value, _unravel(plan.factor * total, x)

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
            directions, batches = _probe(self, keys, i, x, axes=(0, None, 0))
            quotients = self._quotients([fn(points) for points in batches], values)
            return total + _terms(quotients, directions)

        total = drive.loop(plan.directions, body, _zeros((batch, d), x, values, keys), host=host)
        return jnp.asarray(values), _unravel(plan.factor * total, x)

    def _quotients(self, values: Sequence[Array], base: Array) -> Array:
        if len(values) == 2:
            return (values[0] - values[1]) / (2 * self.mu)
        return (values[0] - base) / self.mu


# Compiled as one call each, because a host loop would pay for every operation in them.
@functools.partial(jax.jit, static_argnames="axes")
def _probe(
    estimator: Estimator, key: Any, i: Array, x: PyTree, *, axes: tuple[int | None, ...]
) -> tuple[Array, list[PyTree]]:
    """Directions of all lanes (N, d), and the points at ``+mu`` (and ``-mu``) along them.

    ``axes`` says which of key, index and ``x`` differ between lanes.
    """
    d = _dimension(jax.tree.leaves(x)) // (1 if axes[2] is None else _batch(jax.tree.leaves(x)))
    signs = (1, -1) if estimator._plan(d).pairs else (1,)

    def lane(key: Any, i: Array, x: PyTree) -> tuple[Array, list[PyTree]]:
        u = estimator._direction(key, i, d, _dtype(x))

        def point(sign: int) -> PyTree:
            step = _unravel(sign * estimator.mu * u, x, cast=False)
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


def _dtype(x: PyTree) -> Any:
    """The dtype of directions and sums: that of ``x``, but at least float32."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(x))


def _zeros(shape: tuple[int, ...], x: PyTree, value: Array, key: Any) -> Array:
    """The empty sum, which inside shard_map varies with all that the sum depends on."""
    like = [x, value] if key is None else [x, value, jax.random.key_data(key)]
    zero = sum(jnp.zeros_like(jnp.ravel(v), _dtype(x), shape=()) for v in jax.tree.leaves(like))
    return jnp.zeros(shape, _dtype(x)) + zero


def _unravel(flat: Array, x: PyTree, cast: bool = True) -> PyTree:
    """Cut ``flat`` (d,), or (B, d), into the leaves of ``x``, by default of their dtypes too."""
    leaves, treedef = jax.tree.flatten(x)
    sizes = [math.prod(leaf.shape[flat.ndim - 1 :]) for leaf in leaves]
    parts = jnp.split(flat, np.cumsum(sizes)[:-1], axis=-1)
    return jax.tree.unflatten(
        treedef,
        [
            part.reshape(leaf.shape).astype(leaf.dtype if cast else part.dtype)
            for part, leaf in zip(parts, leaves)
        ],
    )


def _arrays(x: PyTree) -> PyTree:
    _dimension(jax.tree.leaves(x))
    return jax.tree.map(jnp.asarray, x)


def _dimension(leaves: Sequence[Any]) -> int:
    """How many numbers there are in all; raises where there are none or not floats."""
    for leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"x must hold float arrays only, got a leaf of dtype {dtype} and shape "
                f"{jnp.shape(leaf)}; close fn over what is not to be differentiated"
            )
    d = sum(math.prod(jnp.shape(leaf)) for leaf in leaves)
    if d == 0:
        raise ValueError(f"x is empty: {len(leaves)} leaves with no number in them")
    return d


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
