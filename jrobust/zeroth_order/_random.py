"""Randomised gradient estimation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jrobust._algorithm import algorithm, static
from jrobust.zeroth_order._coordinate import check_chunk
from jrobust.zeroth_order._estimator import Array, Estimator, Plan, PyTree


@algorithm
class RGE(Estimator):
    """Randomised gradient estimation: the mean of difference quotients along random directions.

    With q = ``samples``, d = the numbers in ``x``, ``D+ = (fn(x + mu u) - fn(x)) / mu`` and
    ``D0 = (fn(x + mu u) - fn(x - mu u)) / (2 mu)``, every scaling convention of this class:

    ============== ============== ============================ ========== =========================
    ``direction``  ``antithetic`` estimate                     queries    unbiased for gradient of
    ============== ============== ============================ ========== =========================
    ``"gaussian"`` False          ``1/q sum D+(u_i) u_i``      ``q + 1``  ``E fn(x + mu u)``
    ``"gaussian"`` True           ``1/q sum D0(u_i) u_i``      ``2q + 1`` the same
    ``"sphere"``   False          ``d/q sum D+(u_i) u_i``      ``q + 1``  ``E fn(x + mu v)``
    ``"sphere"``   True           ``d/q sum D0(u_i) u_i``      ``2q + 1`` the same
    ============== ============== ============================ ========== =========================

    with u ~ N(0, I) (gaussian) or uniform on the unit sphere (sphere), v uniform in the unit ball.
    On a linear function all are unbiased for its gradient g itself, with
    ``E ||estimate - g||^2 = (d + 1)/q ||g||^2`` (gaussian) and ``(d - 1)/q ||g||^2`` (sphere). The
    one query beyond the differences is ``fn(x)``, which is returned; forward differences share it.

    One direction spans all leaves of ``x`` together: the sphere is that of the whole space, d
    counts all leaves. Direction i of a key comes from ``fold_in(key, i)`` and is made anew where
    it is used, so memory does not grow with ``samples``.

    Gaussian: Nesterov and Spokoiny 2017; sphere: Flaxman et al. 2005 and
    Zhang et al. 2022 (ZO-AE-DS: mu = 5e-3, q up to d). ``antithetic`` pairs are SPSA's (Spall 1992,
    with these directions) and MeZO's (Malladi et al. 2023, q = 1).

    Args:
        mu: the step, > 0, in the units of ``x``: a point is ``mu ||u||`` away, about
            ``mu sqrt(d)`` (gaussian) or ``mu`` (sphere). A leaf, so a new value compiles nothing.
        samples: q >= 1, the number of directions.
        direction: ``"gaussian"`` or ``"sphere"``.
        antithetic: central differences, which cancel the even part of ``fn`` exactly.
        chunk: points evaluated at once, at least 1 (2 if antithetic, whose pairs stay together).
            None: as many as 16 MiB of float32 hold, at most 64. Results do not depend on it beyond
            rounding.

    See :class:`Estimator` for the calls, ``estimator(key, fn, x)`` and ``estimator.per_example``.
    """

    mu: Any
    samples: int = static()
    direction: str = static(default="gaussian", kw_only=True)
    antithetic: bool = static(default=False, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)

    def check(self, x: PyTree | None = None, *, batched: bool = False) -> None:
        """See :meth:`Estimator.check`; also ``ValueError`` for samples, direction and chunk."""
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be an int >= 1, got {self.samples!r}")
        if self.direction not in ("gaussian", "sphere"):
            raise ValueError(f"direction must be 'gaussian' or 'sphere', got {self.direction!r}")
        check_chunk(self.chunk, self.antithetic)
        super().check(x, batched=batched)

    def _plan(self, d: int) -> Plan:
        sphere = self.direction == "sphere"
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
        u = jax.random.normal(jax.random.fold_in(key, i), (d,), dtype)
        return u / jnp.linalg.norm(u) if self.direction == "sphere" else u
