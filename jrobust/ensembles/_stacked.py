"""Trees with a leading model axis: M models, or M sets of parameters, as one pytree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust.models import Network

Array = jax.Array
Tree = Any


def signature(tree: Tree) -> tuple[Any, ...]:
    """Structure, shapes and dtypes: equal for trees that can be stacked."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of M trees: parameters, states or bound models, each leaf (M, ...).

    ``jax.vmap`` and ``jax.lax.map`` over the result run M models in one program; so do
    ``jax.vmap(update)`` over stacked training states and :func:`ensemble` over stacked models.

    Args:
        trees: one or more trees of one structure, whose leaves agree in shape and dtype.

    Raises:
        ValueError: without trees, or for trees that differ.
    """
    if not trees:
        raise ValueError("stack needs at least one tree")
    first = signature(trees[0])
    for i, tree in enumerate(trees):
        if (other := signature(tree)) != first:
            differing = next(((a, b) for a, b in zip(first, other) if a != b), (first, other))
            raise ValueError(
                f"tree {i} cannot be stacked on tree 0: {differing[1]} against {differing[0]}; "
                "ensemble([...]) also takes models of different architectures"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def count(tree: Tree) -> int:
    """The length M of the model axis of a stacked tree; ``ValueError`` if there is none."""
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "a stacked tree has one model axis in front of every leaf, got leaves that start with "
            f"{sorted(lengths)}; make one with stack([...]) or draw(network, keys, x)"
        )
    return lengths.pop()[0]


def unstack(tree: Tree) -> list[Tree]:
    """The M trees that were stacked. Raises ``ValueError`` where leaves have no common axis."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count(tree))]


# Compiled once for each network and M.
_draw = jax.jit(
    lambda network, keys, x: jax.vmap(lambda key: network.init(key, x))(keys),
)


def draw(network: Network, keys: Array, x: Array) -> tuple[Tree, Tree]:
    """Freshly drawn stacked ``(params, extra)`` of M networks, the m-th from ``keys[m]``.

    ``network.bind(*draw(network, keys, x))`` is a stacked model, as :func:`ensemble` takes it.

    Args:
        network: from ``jrobust.models.network``.
        keys: (M,) typed keys, for instance ``jax.random.split(key, M)``.
        x: (B, ...) a batch, of which only shape and dtype matter.

    Raises:
        TypeError, ValueError: unless ``keys`` are typed keys of shape (M,).
    """
    if getattr(keys, "ndim", 0) != 1:
        raise ValueError(
            f"keys must be typed keys of shape (M,), got shape {np.shape(keys)}; "
            "make them with jax.random.split(key, M)"
        )
    _keys.check(keys[0])
    return _draw(network, keys, x)
