"""Estimators in the places of ``jax.value_and_grad`` and of ``jax.grad``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jrobust.zeroth_order._estimator import Array, Estimator, PyTree, check_value


def value_and_grad(
    fn: Callable[..., Any], estimator: Estimator, *, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    """Stand where ``jax.value_and_grad(fn)`` stands, without its derivative.

    Args:
        fn: ``fn(x, *args, **kwargs)`` -> scalar of float32; x a pytree of float arrays.
        estimator: :class:`CGE` or :class:`RGE`.
        has_aux: ``fn`` returns ``(scalar, aux)``.

    Returns:
        A pure function ``(key, x, *args, mask=None, **kwargs) -> (value, grad)``: ``fn`` at ``x``,
        with ``has_aux`` a pair, and the estimated gradient with respect to ``x`` alone, of its
        structure, shapes and dtypes, zero where ``mask`` does not keep it. The key may be None
        where the estimator has no randomness. It raises what the estimator raises.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jrobust.zeroth_order import CGE, value_and_grad
        >>> step = jax.jit(value_and_grad(lambda x, a: jnp.vdot(a, x), CGE(0.5)))
        >>> value, grad = step(None, jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
        >>> print(value, grad)
        6.0 [1. 2. 3.]
    """

    def estimate(
        key: Any, x: PyTree, *args: Any, mask: PyTree | None = None, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        return estimator(key, lambda p: fn(p, *args, **kwargs), x, mask=mask, has_aux=has_aux)

    return estimate


def surrogate(fn: Callable[[PyTree], Array], estimator: Estimator) -> Callable[..., Array]:
    """Let reverse-mode differentiation through ``fn`` use an estimate in place of its derivative.

    For a simulator or a decoder with roundings in it, behind or between differentiable parts:
    ``jax.grad(lambda p: surrogate(sim, CGE(1e-3))(key, net(p)))``. Evaluated without
    differentiation, it costs one call of ``fn``; under differentiation what the estimator costs.

    Args:
        fn: pytree of float arrays -> scalar of float32, traceable. It must not close over anything
            to be differentiated, for which JAX raises ``UnexpectedTracerError``: the estimate is
            with respect to ``x`` alone.
        estimator: :class:`CGE` or :class:`RGE`.

    Returns:
        A pure function ``(key, x) -> fn(x)``, for ``jit``, ``vmap``, ``grad``, ``vjp``; the
        cotangent of x is the incoming one times the estimated gradient, that of the key is zero.
        Forward mode (``jvp``) raises ``TypeError``, as for every ``jax.custom_vjp``. It raises what
        the estimator raises.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jrobust.zeroth_order import CGE, surrogate
        >>> steps = lambda x: jnp.sum(jnp.floor(64 * x) / 64)  # derivative 0 almost everywhere
        >>> print(jax.grad(surrogate(steps, CGE(0.25)), argnums=1)(None, jnp.ones(2)))
        [1. 1.]
    """

    def call(key: Any, x: PyTree) -> Array:
        estimator.check(x)
        return _surrogate(fn, estimator, key, x)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _surrogate(fn: Callable[[PyTree], Array], estimator: Estimator, key: Any, x: PyTree) -> Array:
    value = fn(x)
    check_value(value, ())
    return value


def _forward(
    fn: Callable[[PyTree], Array], estimator: Estimator, key: Any, x: PyTree
) -> tuple[Array, PyTree]:
    return estimator(key, fn, x)


def _backward(
    fn: Callable[[PyTree], Array], grad: PyTree, cotangent: Array
) -> tuple[None, None, PyTree]:
    # None is the zero cotangent of any argument: of mu, and of a typed key, which has no tangents.
    return None, None, jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), grad)


_surrogate.defvjp(_forward, _backward)
