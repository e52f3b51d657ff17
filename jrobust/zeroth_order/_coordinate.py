"""Coordinatewise gradient estimation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import drive
from jrobust._algorithm import algorithm, static
from jrobust.zeroth_order._difference import OneHot, differencer
from jrobust.zeroth_order._estimator import (
    Array,
    Estimator,
    Kept,
    Plan,
    PyTree,
    check_value,
    counts,
    gathered,
    share,
    zeros,
)

# The default tile: as many points as hold this many bytes in the widest layer behind their weights,
# and no more than that many. A CPU is fastest while a layer stays in its caches; an accelerator
# wants much work at once.
_TILE_BYTES = {"cpu": 1 << 23}, 1 << 28
_TILE_POINTS = {"cpu": 64}, 1024


@algorithm
class CGE(Estimator):
    """Coordinatewise gradient estimation: one difference quotient for each of the d coordinates.

    ======================= ========================================== ============ ================
    ``central``             ``g_i``                                    ``queries``  error
    ======================= ========================================== ============ ================
    True (default)          ``(fn(x + mu e_i) - fn(x - mu e_i))/2mu``  ``2d + 1``   ``O(mu^2)``
    False                   ``(fn(x + mu e_i) - fn(x)) / mu``          ``d + 1``    ``mu H_ii / 2``
    ======================= ========================================== ============ ================

    The one query beyond the differences is ``fn(x)``, which is returned. With a mask, d counts what
    it keeps. Deterministic: the key is ignored.

    Called as ``estimator(key, fn, x)``, it does not evaluate ``fn`` that often. :func:`differencer`
    evaluates it once and carries each difference itself through what lies behind its coordinate,
    as far as it reaches: exact for every ``mu``, down to 1e-18, and at a fraction of the price, for
    nothing in front of the coordinate is computed again and all perturbations share the weights of
    the rest (Zhang et al. 2022 reuse features by hand at one layer, Chen et al. 2024 at the blocks
    of one network). Tiles of coordinates, leaf by leaf, go through one ``lax`` loop each.

    Central differences are those of Chen et al. 2017 (ZOO, eq. 6), Liu et al. 2018 (ZO-SVRG,
    CoordGradEst) and Zhang et al. 2022 (ZO-AE-DS, mu = 5e-3); ``central=False`` is that of Chen et
    al. 2024 (DeepZero, mu = 5e-3), which trains networks at half the price.

    Args:
        mu: the step, > 0, in the units of ``x``; a leaf, so a new value compiles nothing.
        central: see above.
        chunk: points side by side, at least 1 (2 if central, whose pairs stay together). None: as
            many as hold 8 MiB on a CPU, 256 MiB elsewhere, in the widest layer that they move, and
            no more than 64 and 1024. Memory grows with it, results do not depend on it beyond
            rounding.
        exact: differences as above. False: subtract two evaluations of ``fn`` for each coordinate,
            in float32 with the digits that this leaves, as :meth:`per_example` always does; for
            functions whose operations have no rules (a callback, a sort), or whose points have to
            be evaluated as they are.
        strict: raise ``NotImplementedError`` for an operation without a rule. Otherwise it is
            evaluated twice and subtracted, with a ``DifferenceWarning``.
        primal_dtype: of the one evaluation of ``fn``, as in :func:`differencer`: ``jnp.float64``
            makes differences right across kinks too, at the price of one slower evaluation.
        axis_name: a mapped axis (of ``shard_map`` or ``pmap``) over whose devices the tiles are
            shared out. ``x`` and what ``fn`` closes over must be the same on all of them; each
            computes its share, and they exchange nothing but the d quotients, in one sum. The
            estimate is the same up to rounding for every number of devices; in tests on CPUs to
            the bit, as long as each has two tiles of a leaf or more (XLA compiles a loop of one
            turn otherwise).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda x: 0.5 * jnp.sum(x**2)
        >>> value, grad = CGE(2.0**-7)(None, fn, jnp.array([1.0, -2.0]))
        >>> print(value, grad)
        2.5 [ 1. -2.]
        >>> half = [jnp.array([1])]  # of the second number alone
        >>> print(CGE(1e-12)(None, lambda x: fn(x[0]), [jnp.array([1.0, -2.0])], mask=half)[1])
        [Array([ 0., -2.], dtype=float32)]

    See :class:`Estimator` for the calls, ``estimator(key, fn, x)`` and ``estimator.per_example``.
    """

    mu: Any
    central: bool = static(default=True, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)
    exact: bool = static(default=True, kw_only=True)
    strict: bool = static(default=False, kw_only=True)
    primal_dtype: Any = static(default=None, kw_only=True)
    axis_name: str | None = static(default=None, kw_only=True)

    def check(self, x: PyTree | None = None, *, batched: bool = False) -> None:
        """See :meth:`Estimator.check`; also ``ValueError`` for options that do not go together.

        With exact differences ``mu`` may be far below the spacing of floats at ``x``: above 1e-19,
        where float32 products underflow.
        """
        check_chunk(self.chunk, self.central)
        for name in ("strict", "primal_dtype"):
            if getattr(self, name) and not self.exact:
                raise ValueError(f"{name}= goes with exact differences: leave exact=True")
        super().check(x, batched=batched)

    def _check_step(self, step: float, largest: float, dtype: Any, batched: bool) -> None:
        if batched or not self.exact:
            return super()._check_step(step, largest, dtype, batched)
        if not step >= (least := float(jnp.finfo(jnp.float32).tiny) ** 0.5):
            raise ValueError(f"mu={step} is lost to underflow in float32: use mu >= {least:.2g}")

    def _plan(self, d: int) -> Plan:
        return Plan(directions=d, pairs=self.central, factor=1.0, size=1.0)

    def _key(self, key: Any, shape: tuple[int, ...]) -> None:
        return None

    def _direction(self, key: None, i: Array, d: int, dtype: Any) -> Array:
        return (jnp.arange(d) == i).astype(dtype)

    def _estimate(
        self, key: None, fn: Callable[[PyTree], tuple[Array, PyTree]], x: PyTree, kept: Kept
    ) -> tuple[Array, PyTree, Array]:
        if not self.exact:
            return super()._estimate(key, fn, x, kept)
        how = {"primal_dtype": self.primal_dtype, "strict": self.strict}
        value, delta, aux = differencer(fn, x, has_aux=True, **how)
        check_value(value, ())
        if (axis := self.axis_name) is not None:  # from here on each device has its own tiles
            delta = jax.tree.map(lambda v: jax.lax.pcast(v, axis, to="varying"), delta)
        leaves, treedef = jax.tree.flatten(x)
        empty = zeros((), axis, x, value, None, kept)

        def quotients(k: int, leaf: Array, indices: Any, count: int) -> Array:
            """Of the coordinates kept of one leaf; those of other devices are zero."""
            lanes = min(max(count, 1), self._side_by_side(delta.func.widest(k)))
            rounds = -(-count // lanes)
            lanes = -(-count // max(rounds, 1))  # even tiles: fewer idle lanes in the last one
            each, first = share(rounds, axis)

            def quotient(i: Array) -> Array:
                index = jnp.unravel_index(i, leaf.shape)

                def move(step: Array) -> Array:
                    change: list[Any] = [None] * len(leaves)
                    change[k] = OneHot(index, step)
                    return delta(jax.tree.unflatten(treedef, change))

                if not self.central:
                    return self._quotients([move(self.mu)], 0.0)
                steps = jnp.stack([self.mu, -self.mu])
                return self._quotients(list(jax.vmap(move)(steps)), 0.0)

            def tile(c: Array, out: Array) -> Array:
                start = (first + c) * lanes
                i = jnp.minimum(start + jnp.arange(lanes, dtype=jnp.int32), count - 1)
                i = i if indices is None else jnp.asarray(indices)[i]
                found = jax.vmap(quotient)(i).astype(out.dtype)
                return jax.lax.dynamic_update_slice_in_dim(out, found, start, 0)

            padded = each * lanes * (1 if axis is None else jax.lax.axis_size(axis))
            return drive.loop(each, tile, jnp.broadcast_to(empty, (padded,)))[:count]

        parts = map(quotients, range(len(leaves)), leaves, kept, counts(leaves, kept))
        return value, aux, gathered(jnp.concatenate(list(parts)), axis)

    def _side_by_side(self, width: int) -> int:
        """Coordinates in a tile, whose differences have at most ``width`` numbers in a layer."""
        platform = jax.default_backend()
        size, most = (known.get(platform, other) for known, other in (_TILE_BYTES, _TILE_POINTS))
        points = self.chunk or min(size // (4 * max(width, 1)), most)
        return max(1, points // (2 if self.central else 1))


def check_chunk(chunk: int | None, pairs: bool) -> None:
    """Raise ``ValueError`` unless one direction fits."""
    least = 2 if pairs else 1
    if chunk is not None and (not isinstance(chunk, int) or chunk < least):
        raise ValueError(
            f"chunk must be None or an int >= {least}"
            f"{', a pair of points' if pairs else ''}, got {chunk!r}"
        )
