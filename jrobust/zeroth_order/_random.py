"""Randomised gradient estimation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.zeroth_order import _directions
from jrobust.zeroth_order._coordinate import check_chunk
from jrobust.zeroth_order._estimator import (
    Array,
    Estimator,
    Kept,
    Plan,
    PyTree,
    _arrays,
    _dtype,
    _unravel,
    check_value,
    counts,
    gathered,
    kept_numbers,
    share,
    zeros,
)

# Up to so many numbers several points are evaluated side by side.
_SMALL = 4096


@algorithm
class RGE(Estimator):
    """Randomised gradient estimation: the mean of difference quotients along random directions.

    With q = ``samples``, d = the numbers in ``x`` that may move, ``d_l`` those in leaf l,
    ``D+(u) = (fn(x + mu u) - fn(x)) / mu`` and
    ``D0(u) = (fn(x + mu u) - fn(x - mu u)) / (2 mu)``, the estimate is ``1/q sum c D(u_i) u_i``
    with D0 if ``antithetic`` and else D+:

    ================ ================================== ======= ==================================
    ``direction``    u                                  c       ``E ||error||^2``, linear ``fn``
    ================ ================================== ======= ==================================
    ``"gaussian"``   N(0, I)                            1       ``(d + 1)/q ||g||^2``
    ``"rademacher"`` independent signs                  1       ``(d - 1)/q ||g||^2``
    ``"sphere"``     uniform, ``||u|| = 1``             d       ``(d - 1)/q ||g||^2``
    ``"spheres"``    each leaf of it uniform, length 1  ``d_l`` ``(sum d_l^2 sum ||g_l||^2 / d_l
                                                                - ||g||^2) / q``
    ================ ================================== ======= ==================================

    On a linear function all are unbiased for its gradient g; on any other, Gaussian directions are
    for that of ``E fn(x + mu u)``, and spherical ones for that of ``E fn(x + mu v)``, v uniform in
    the unit ball. ``q + 1`` queries, or ``2q + 1`` if antithetic: the one query beyond the
    differences is ``fn(x)``, which is returned; forward differences share it. With ``blockwise``
    each direction moves one leaf of ``x`` alone, and each leaf has q of them: L times the queries
    for L leaves, and the error of each leaf is that of its own numbers, ``(d_l + 1)/q ||g_l||^2``
    if Gaussian; the sphere is then that of the leaf.

    Other conventions, as multiples of the estimate above:

    ====================================== =================================== ===================
    source                                 is                                  times
    ====================================== =================================== ===================
    Nesterov and Spokoiny 2017             Gaussian, forward or antithetic     1
    SPSA (Spall 1992)                      rademacher, antithetic; ``D0 / u``  1, as ``1/u = u``
    Flaxman et al. 2005, Zhang et al. 2022 sphere, forward                     1
    (ZO-AE-DS, mu = 5e-3, q up to d)
    OpenAI-ES (Salimans et al. 2017)       Gaussian, ``sigma = mu``            1
    MeZO (Malladi et al. 2023)             Gaussian, antithetic, q = 1         1
    DeepZero's released code               spheres, forward, without ``d_l``,  ``mu / d_l``
                                           the moved distance for u
    ZO-SVRG's RandGradEst (Liu et al.      sphere, forward                     1
    2018)
    ====================================== =================================== ===================

    Leaf l of direction i comes from ``fold_in(fold_in(key, i), l)`` and is made anew where it is
    used, so memory does not grow with ``samples``. Two calls with one key take the same
    directions: these common random numbers make the difference of two estimates, at two points or
    on two batches, that of their gradients along the same directions.

    Args:
        mu: the step, > 0, in the units of ``x``: a point is ``mu ||u||`` away, about ``mu sqrt(d)``
            (gaussian, rademacher) or ``mu`` (sphere). A leaf, so a new value compiles nothing.
        samples: q >= 1, the number of directions.
        direction: see above.
        antithetic: central differences, which cancel the even part of ``fn`` exactly.
        blockwise: see above.
        chunk: points side by side in ``vmap(fn)``, at least 1 (2 if antithetic, whose pairs count
            as two). None: at most 64 where 4,096 numbers may move or fewer; above, one direction
            at a time and no ``vmap``, which over the weights of a network turns its products into
            batched and its convolutions into grouped ones, which are slow. Results do not depend
            on it beyond rounding.
        axis_name: a mapped axis (of ``shard_map`` or ``pmap``) over whose devices the directions
            are shared out; ``x`` and what ``fn`` closes over must then be the same on all.

    See :class:`Estimator` for the calls, ``estimator(key, fn, x)`` and ``estimator.per_example``;
    the latter has no ``"spheres"`` and no ``blockwise``.
    """

    mu: Any
    samples: int = static()
    direction: str = static(default="gaussian", kw_only=True)
    antithetic: bool = static(default=False, kw_only=True)
    blockwise: bool = static(default=False, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)
    axis_name: str | None = static(default=None, kw_only=True)

    def check(self, x: PyTree | None = None, *, batched: bool = False) -> None:
        """See :meth:`Estimator.check`; also ``ValueError`` for samples, direction and chunk."""
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be an int >= 1, got {self.samples!r}")
        _directions.check_direction(self.direction)
        check_chunk(self.chunk, self.antithetic)
        if batched and (self.blockwise or self.direction == "spheres"):
            raise ValueError(
                "per_example moves a whole example at a time: use direction='gaussian', "
                "'rademacher' or 'sphere', and blockwise=False"
            )
        super().check(x, batched=batched)

    def queries(self, x: PyTree, mask: PyTree | None = None) -> int:
        """See :meth:`Estimator.queries`."""
        return 1 + self._count(x, kept_numbers(x, mask)) * self._plan(1).points

    def _count(self, x: PyTree, kept: Kept) -> int:
        """How many directions there are."""
        return self.samples * (len(self._blocks(x, kept)) if self.blockwise else 1)

    def _blocks(self, x: PyTree, kept: Kept) -> list[int]:
        """The leaves in which something may move."""
        return [i for i, size in enumerate(counts(jax.tree.leaves(x), kept)) if size]

    def _estimate(
        self, key: Any, fn: Callable[[PyTree], tuple[Array, PyTree]], x: PyTree, kept: Kept
    ) -> tuple[Array, PyTree, Array]:
        sizes, blocks = counts(jax.tree.leaves(x), kept), self._blocks(x, kept)
        d, count, points = sum(sizes), self._count(x, kept), self._plan(1).points
        kind = "spheres" if self.blockwise and self.direction == "sphere" else self.direction
        leaf_of = np.repeat(np.arange(len(sizes)), sizes)
        value, aux = fn(x)
        check_value(value, ())

        def evaluate(step: Array) -> Array:
            change = _unravel(step, x, kept, cast=False)
            return fn(jax.tree.map(lambda p, s: (p + s).astype(p.dtype), x, change))[0]

        def term(i: Array) -> Array:
            u = _directions.direction(kind, jax.random.fold_in(key, i), sizes, _dtype(x))
            if self.blockwise:
                u = jnp.where(leaf_of == jnp.asarray(blocks)[i % len(blocks)], u, 0)
            values = [evaluate(sign * self.mu * u) for sign in (1, -1)[:points]]
            quotient = self._quotients(values, value).astype(u.dtype)
            # Only where it moves, for a NaN at one coordinate must not reach the others.
            return jnp.where((u != 0) & (i < count), quotient * u, 0)

        rounds = -(-count // self._lanes(d))
        lanes = -(-count // rounds)  # even chunks: fewer idle lanes in the last one
        rounds, first = share(rounds, self.axis_name)

        def body(c: Array, total: Array) -> Array:
            i = (first + c) * lanes
            if lanes == 1:
                return total + term(i)
            return total + jnp.sum(jax.vmap(term)(i + jnp.arange(lanes)), 0)

        total = drive.loop(rounds, body, zeros((d,), self.axis_name, x, value, key, kept))
        total = gathered(total, self.axis_name)
        return value, aux, _directions.scales(kind, sizes) * total / self.samples

    def _lanes(self, d: int) -> int:
        if self.chunk is None and d > _SMALL:
            return 1
        return super()._lanes(d)

    def _plan(self, d: int) -> Plan:
        sphere = self.direction in ("sphere", "spheres")
        return Plan(
            directions=self.samples,
            pairs=self.antithetic,
            factor=(d if sphere else 1) / self.samples,
            size=1 / math.sqrt(d) if sphere else 1.0,
        )

    def _key(self, key: Any, shape: tuple[int, ...]) -> Any:
        dtype = getattr(key, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"RGE needs typed PRNG keys, got {type(key).__name__} of dtype {dtype}; make them "
                "with jax.random.key(seed), and for rows with jrobust.keys.examples(key, ids)"
            )
        if key.shape != shape:
            expected = "one for each example" if shape else "a single key"
            raise ValueError(f"keys must have shape {shape}, {expected}, got {key.shape}")
        return key

    def _direction(self, key: Any, i: Array, d: int, dtype: Any) -> Array:
        return _directions.direction(self.direction, jax.random.fold_in(key, i), [d], dtype)


def one_point(
    key: Array,
    fn: Callable[[PyTree], Any],
    x: PyTree,
    baseline: Array | float,
    *,
    mu: Any,
    direction: str = "gaussian",
) -> tuple[Array, PyTree]:
    """A gradient estimate from a single query, ``c (fn(x + mu u) - baseline) / mu  u``.

    For functions that change at every call, of which no second value can be had: with
    ``baseline`` the value of the call before, this is the residual feedback of Zhang, Zhou, Ji and
    Zavlanos (2022), "A new one-point residual-feedback oracle for black-box learning and control";
    with 0 the one-point estimate of Flaxman, Kalai and McMahan (2005), whose variance grows as
    ``fn(x)^2 / mu^2``. The baseline must not depend on this call's direction; then it adds no bias.
    Where one function can be evaluated twice, :class:`RGE` is better at the same price.

    Args:
        key: one typed PRNG key, a new one for each call.
        fn: pytree like ``x`` -> scalar of float32 (or float64).
        x: pytree of float arrays.
        baseline: scalar.
        mu: the step, > 0.
        direction: as in :class:`RGE`, c with it.

    Returns:
        ``fn(x + mu u)``, the next baseline, and the estimate, like ``x``.

    Raises:
        TypeError, ValueError: as :class:`RGE` does.
    """
    _keys.check(key)
    x = _arrays(x)
    RGE(mu, 1, direction=direction).check(x)
    sizes = counts(jax.tree.leaves(x))
    u = _directions.direction(direction, key, sizes, _dtype(x))
    change = _unravel(mu * u, x, cast=False)
    value = fn(jax.tree.map(lambda p, s: (p + s).astype(p.dtype), x, change))
    check_value(value, ())
    flat = _directions.scales(direction, sizes) * (value - baseline) / mu * u
    return value, _unravel(flat, x)
