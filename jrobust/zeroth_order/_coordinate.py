"""Coordinatewise gradient estimation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jrobust._algorithm import algorithm, static
from jrobust.zeroth_order._estimator import Array, Estimator, Plan, PyTree


@algorithm
class CGE(Estimator):
    """Coordinatewise gradient estimation: one difference quotient for each of the d coordinates.

    ======================= ========================================== ============ ================
    ``central``             ``g_i``                                    ``queries``  error
    ======================= ========================================== ============ ================
    True (default)          ``(fn(x + mu e_i) - fn(x - mu e_i))/2mu``  ``2d + 1``   ``O(mu^2)``
    False                   ``(fn(x + mu e_i) - fn(x)) / mu``          ``d + 1``    ``mu H_ii / 2``
    ======================= ========================================== ============ ================

    The one query beyond the differences is ``fn(x)``, which is returned. Deterministic: the key
    is ignored.

    Central differences are those of Chen et al. 2017 (ZOO, eq. 6), Liu et al. 2018 (ZO-SVRG,
    CoordGradEst) and Zhang et al. 2022 (ZO-AE-DS, mu = 5e-3); ``central=False`` is that of Chen et
    al. 2024 (DeepZero, mu = 5e-3), which trains networks at half the price.

    Args:
        mu: the step, > 0, in the units of ``x``; a leaf, so a new value compiles nothing.
        central: see above.
        chunk: points evaluated at once, at least 1 (2 if central, whose pairs stay together). None:
            as many as 16 MiB of float32 hold, at most 64. Memory grows with it, results do not
            depend on it beyond rounding.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda x: 0.5 * jnp.sum(x**2)
        >>> value, grad = CGE(2.0**-7)(None, fn, jnp.array([1.0, -2.0]))
        >>> print(value, grad)
        2.5 [ 1. -2.]

    See :class:`Estimator` for the calls, ``estimator(key, fn, x)`` and ``estimator.per_example``.
    """

    mu: Any
    central: bool = static(default=True, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)

    def check(self, x: PyTree | None = None, *, batched: bool = False) -> None:
        """See :meth:`Estimator.check`; also ``ValueError`` for a chunk that is too small."""
        check_chunk(self.chunk, self.central)
        super().check(x, batched=batched)

    def _plan(self, d: int) -> Plan:
        return Plan(directions=d, pairs=self.central, factor=1.0, size=1.0)

    def _key(self, key: Any, shape: tuple[int, ...]) -> None:
        return None

    def _direction(self, key: None, i: Array, d: int, dtype: Any) -> Array:
        return (jnp.arange(d) == i).astype(dtype)


def check_chunk(chunk: int | None, pairs: bool) -> None:
    """Raise ``ValueError`` unless one direction fits."""
    least = 2 if pairs else 1
    if chunk is not None and (not isinstance(chunk, int) or chunk < least):
        raise ValueError(
            f"chunk must be None or an int >= {least}"
            f"{', a pair of points' if pairs else ''}, got {chunk!r}"
        )
