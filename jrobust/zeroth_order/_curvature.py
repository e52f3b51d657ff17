"""Random directions scaled by an estimate of the diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust._algorithm import algorithm
from jrobust.zeroth_order import _directions
from jrobust.zeroth_order._estimator import (
    Array,
    PyTree,
    _arrays,
    _dtype,
    _paired,
    _unravel,
    check_value,
    counts,
    kept_numbers,
)
from jrobust.zeroth_order._random import RGE


@algorithm
class HiZOO:
    """A gradient estimate along directions that are short where the function bends (HiZOO).

    Zhao et al. (2024), "Second-order fine-tuning without pain for LLMs". With D the curvature, a
    positive number for each parameter, ``s = u / sqrt(D)`` for Gaussian u, and three queries,

    * the estimate is ``D0 s`` with ``D0 = (fn(x + mu s) - fn(x - mu s)) / (2 mu)``: that of the
      preconditioned gradient ``g / D``, ready for ``optax.sgd``;
    * D moves by ``alpha`` towards ``|fn(x + mu s) + fn(x - mu s) - 2 fn(x)| / (2 mu^2) D u^2``.

    What D moves towards has, on a quadratic with Hessian H >= 0, the mean
    ``diag H + D sum_j(H_jj / D_j) / 2``, so that for small ``alpha`` D tends to
    ``(1 + d/2) diag H``: the shape of the diagonal, and a scale that the learning rate takes up.
    (With ``u^2 - 1`` for ``u^2`` it would be unbiased, and often negative.)

    Here one D makes the points and weights the estimate. The released code weights it with the D
    that the same direction has just moved, which is biased, and moves the inverse of D as if it
    were D.

    Args:
        mu: the step, > 0. The second difference is lost to rounding for small ones: in float32 it
            needs ``mu^2 |s . H s|`` above 1e-6 of ``fn(x)``.
        alpha: in [0, 1), the share of a step in D; published are 1e-8 to 1e-5. With 1, D would be 0
            wherever ``fn`` does not bend.
    """

    mu: Any
    alpha: Any

    def check(self, x: PyTree | None = None) -> None:
        """Raise for settings that make no sense, as :meth:`RGE.check`."""
        RGE(self.mu, 1).check(x)
        alpha = self.alpha
        known = not isinstance(alpha, jax.core.Tracer)
        if jnp.ndim(alpha) != 0 or (known and not 0 <= float(alpha) < 1):
            raise ValueError(f"alpha must be a number in [0, 1), got {alpha}")

    def init(self, x: PyTree) -> PyTree:
        """The curvature to begin with: 1 everywhere, like ``x`` in float32 at least."""
        return jax.tree.map(lambda p: jnp.ones_like(p, jnp.result_type(jnp.float32, p)), x)

    def __call__(
        self,
        key: Array,
        fn: Callable[[PyTree], Any],
        x: PyTree,
        curvature: PyTree,
        *,
        mask: PyTree | None = None,
        has_aux: bool = False,
    ) -> tuple[Any, PyTree, PyTree]:
        """``fn(x)``, the estimate of ``g / D``, and the new curvature; pure.

        Args:
            key: one typed PRNG key, a new one for each step.
            fn, x, mask, has_aux: as in :meth:`Estimator.__call__`.
            curvature: of :meth:`init`, or of the call before. It stays where the mask leaves out.

        Raises:
            TypeError, ValueError: as :class:`RGE` does; ``curvature`` is not like ``x``.
        """
        _keys.check(key)
        x = _arrays(x)
        self.check(x)
        if jax.tree.map(jnp.shape, curvature) != jax.tree.map(jnp.shape, x):
            raise ValueError("curvature must be like x: start with init(x)")
        kept = kept_numbers(x, mask)
        sizes = counts(jax.tree.leaves(x), kept)
        own = [
            jnp.ravel(leaf) if k is None else jnp.ravel(leaf)[k]
            for leaf, k in zip(jax.tree.leaves(curvature), kept)
        ]
        bend = jnp.concatenate(own)
        u = _directions.direction("gaussian", key, sizes, _dtype(x))
        s = u / jnp.sqrt(bend)
        pair = _paired(fn, has_aux)
        value, aux = pair(x)
        check_value(value, ())

        def at(size: Any) -> Array:
            change = _unravel(size * s, x, kept, cast=False)
            return pair(jax.tree.map(lambda p, c: (p + c).astype(p.dtype), x, change))[0]

        ahead, behind = at(self.mu), at(-self.mu)
        second = jnp.abs((ahead - value) + (behind - value)) / (2 * self.mu**2)
        step = _unravel(self.alpha * (second * u**2 - 1) * bend, x, kept, cast=False)
        grad = _unravel((ahead - behind) / (2 * self.mu) * s, x, kept)
        new = jax.tree.map(lambda b, c: b + c, curvature, step)
        return ((value, aux) if has_aux else value), grad, new
