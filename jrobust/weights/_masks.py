"""Which parameters to keep: boolean trees of the shape of a parameter tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys

Array = jax.Array
Tree = Any


def _keep(scores: Array, count: int) -> Array:
    """Flat bool of exactly ``count`` True: the largest scores, the earlier of equals."""
    order = jnp.argsort(-scores, stable=True)
    return jnp.zeros_like(scores, bool).at[order[:count]].set(True)


def top_k(scores: Tree, k: int) -> Tree:
    """The mask of the ``k`` largest scores over the whole tree, whatever layer they are in.

    Args:
        scores: tree of real arrays, one score for each parameter; NaN ranks last.
        k: how many to keep, static; of equal scores the earlier in flattening order stay.

    Returns:
        A tree of bool arrays with exactly ``k`` True.

    Raises:
        ValueError: unless ``0 <= k <=`` the number of scores.
    """
    leaves, treedef = jax.tree.flatten(scores)
    total = sum(np.size(leaf) for leaf in leaves)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= total:
        raise ValueError(f"k must be an int in 0 .. {total}, the number of scores, got {k!r}")
    wide = jnp.result_type(jnp.float32, *leaves)
    flat = jnp.concatenate([jnp.ravel(leaf).astype(wide) for leaf in leaves])
    mask = _keep(jnp.where(jnp.isnan(flat), -jnp.inf, flat), k)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = jnp.split(mask, ends)
    return jax.tree.unflatten(treedef, [m.reshape(np.shape(v)) for m, v in zip(parts, leaves)])


def random_by_layer(key: Array, params: Tree, ratios: Tree) -> Tree:
    """A random mask with a given share of every array, as DeepZero redraws its masks.

    Chen et al. (2024), section 4. The number kept in an array depends on its ratio alone, so a
    redrawn mask has the same counts and compiles nothing new.

    Args:
        key: one typed key.
        params: tree of arrays, of which the shapes matter.
        ratios: tree of the same structure of Python floats in [0, 1], for instance of
            :func:`layer_ratios`; ``round(ratio * size)`` parameters are kept in each array.

    Raises:
        ValueError: for a ratio outside [0, 1] or trees of different structure.
    """
    _keys.check(key)
    leaves, treedef = jax.tree.flatten(params)
    shares = jax.tree.leaves(ratios)
    other: Any = jax.tree.structure(ratios)
    if other != treedef:
        raise ValueError(f"ratios must have the structure of params, {treedef}, got {other}")
    masks = []
    for i, (leaf, share) in enumerate(zip(leaves, shares)):
        if not 0 <= float(share) <= 1:
            raise ValueError(f"ratios must lie in [0, 1], got {share} for array {i}")
        scores = jax.random.uniform(jax.random.fold_in(key, i), (np.size(leaf),))
        count = round(float(share) * np.size(leaf))
        masks.append(_keep(scores, count).reshape(np.shape(leaf)))
    return jax.tree.unflatten(treedef, masks)


def layer_ratios(mask: Tree) -> Tree:
    """The share of True in each array of a mask, as Python floats; reads values."""
    return jax.tree.map(lambda leaf: float(np.mean(np.asarray(leaf))), mask)


def indices(mask: Tree, counts: Tree | None = None) -> Tree:
    """A mask as flat indices, the form in which a redrawn mask compiles nothing new.

    The shape of an index array is its count. Passed as an argument to a compiled function, for
    instance to the ``mask=`` of an estimator of ``jrobust.zeroth_order``, other indices of the same
    counts are the same program; a bool mask would have to be a constant of it.

    Args:
        mask: tree of bool arrays.
        counts: tree of the same structure of Python ints, how many are True in each array: needed
            inside ``jit`` only, where values are unknown: surplus indices are cut off there,
            missing ones are the size of the array, which is out of range.

    Returns:
        The tree with int32 arrays (count,), ascending, in place of the bool ones.

    Raises:
        TypeError: an array is not of bool, or is traced and has no count.
        ValueError: trees of different structure; a known array has another count.

    Examples:
        >>> import numpy as np
        >>> print(indices({"w": np.array([[True, False], [False, True]])}))
        {'w': Array([0, 3], dtype=int32)}
    """
    leaves, treedef = jax.tree.flatten(mask)
    sizes = [None] * len(leaves) if counts is None else jax.tree.leaves(counts)
    structure: Any = treedef if counts is None else jax.tree.structure(counts)
    if structure != treedef:
        raise ValueError(f"counts must have the structure of mask, {treedef}, got {structure}")

    def flat(leaf: Any, size: int | None) -> Array:
        if jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(f"a mask is of bool arrays, got {jnp.result_type(leaf)}")
        if not isinstance(leaf, jax.core.Tracer):
            found = np.flatnonzero(np.asarray(leaf))
            if size is not None and len(found) != size:
                raise ValueError(f"counts says {size} of an array in which {len(found)} are True")
            return jnp.asarray(found, jnp.int32)
        if size is None:
            raise TypeError(
                "inside jit the counts of a mask are unknown: pass counts=, or call this outside"
            )
        return jnp.flatnonzero(leaf, size=size, fill_value=leaf.size).astype(jnp.int32)

    return jax.tree.unflatten(treedef, map(flat, leaves, sizes))
