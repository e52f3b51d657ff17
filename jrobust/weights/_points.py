"""Points of parameter space: paths between models, averages, balls around them.

Floating-point arrays are computed in float32 at least and keep their dtype. Leaves of other kinds
(counters, PRNG keys) are no coordinates: the result has those of the first tree.

Sums, products and norms of trees are in ``optax.tree``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jrobust import keys as _keys

Array = jax.Array
Tree = Any


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _wide(leaf: Any) -> Any:
    """The dtype in which sums and norms of ``leaf`` are computed."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _map(fn: Callable[..., Array], first: Tree, *rest: Tree) -> Tree:
    """``fn`` of the floating-point leaves, in the dtype of ``first``; other leaves of ``first``."""

    def mapped(leaf: Any, *others: Any) -> Any:
        if not _is_float(leaf):
            return leaf
        value = fn(*(jnp.asarray(v, _wide(v)) for v in (leaf, *others)))
        return value.astype(jnp.result_type(leaf))

    return jax.tree.map(mapped, first, *rest)


def linear(start: Tree, end: Tree, t: Array | float) -> Tree:
    """The point ``(1 - t) start + t end`` of the straight path; ``t`` in [0, 1] or beyond."""
    return _map(lambda a, b: (1 - t) * a + t * b, start, end)


def bezier(start: Tree, control: Tree, end: Tree, t: Array | float) -> Tree:
    """The point ``(1 - t)^2 start + 2 t (1 - t) control + t^2 end`` of a quadratic Bezier curve.

    The mode connection of Garipov et al. (2018), eq. 2; ``t`` in [0, 1].
    """
    return _map(
        lambda a, c, b: (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b, start, control, end
    )


def average(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> Tree:
    """The weighted mean of parameter trees (model soups: Wortsman et al. 2022).

    Args:
        trees: one or more trees of one structure.
        weights: one number for each, summing to anything but zero; equal when None.

    Raises:
        ValueError: without trees, or for weights that do not fit them.
    """
    if not trees:
        raise ValueError("average needs at least one tree")
    shares = [1.0] * len(trees) if weights is None else [float(w) for w in weights]
    if len(shares) != len(trees) or sum(shares) == 0:
        raise ValueError(
            f"weights must be {len(trees)} numbers with a sum other than zero, got {shares}"
        )
    total = sum(shares)
    return _map(lambda *leaves: sum(s / total * leaf for s, leaf in zip(shares, leaves)), *trees)


def scale_to_layers(direction: Tree, params: Tree, gamma: Array | float) -> Tree:
    """``direction`` with each array at ``gamma`` times the norm of the array of ``params``.

    The step of adversarial weight perturbation (Wu et al. 2020, eq. 10): scale-free, layer by
    layer. Zero where the direction or the parameters are zero.
    """

    def scaled(d: Array, p: Array) -> Array:
        # Over its largest entry, so that no square under- or overflows.
        largest = jnp.max(jnp.abs(d), initial=0.0)
        d = d / jnp.where(largest > 0, largest, 1.0)
        length = jnp.linalg.norm(d.ravel())
        size = gamma * jnp.linalg.norm(p.ravel())
        return jnp.where(length > 0, size / jnp.where(length > 0, length, 1.0), 0.0) * d

    return _map(scaled, direction, params)


def project_to_layers(point: Tree, params: Tree, gamma: Array | float) -> Tree:
    """The nearest point whose arrays are within ``gamma |array|`` of those of ``params`` (L2)."""

    def nearest(p: Array, center: Array) -> Array:
        move = p - center
        length = jnp.linalg.norm(move.ravel())
        radius = gamma * jnp.linalg.norm(center.ravel())
        shrink = jnp.where(length > radius, radius / jnp.where(length > 0, length, 1.0), 1.0)
        return center + shrink * move

    return _map(nearest, point, params)


def sample_sphere(key: Array, params: Tree, radius: Array | float) -> Tree:
    """A point at L2 distance ``radius`` from ``params`` in a uniformly random direction."""
    _keys.check(key)
    leaves, treedef = jax.tree.flatten(params)
    noise = [
        jax.random.normal(jax.random.fold_in(key, i), jnp.shape(leaf), _wide(leaf))
        if _is_float(leaf)
        else jnp.zeros(())
        for i, leaf in enumerate(leaves)
    ]
    tree = jax.tree.unflatten(treedef, noise)
    size = radius / optax.tree.norm(tree)
    return _map(lambda p, n: p + size * n, params, tree)
