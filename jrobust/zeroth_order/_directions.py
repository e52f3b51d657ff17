"""Random directions, made from a key where they are used and never stored.

A direction is one vector over the arrays of a pytree, or over the numbers of them that a mask
keeps. Its part in array ``l`` comes from ``fold_in(key, l)``, so that parts can be made one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Directions whose parts do not depend on each other.
SEPARABLE = ("gaussian", "rademacher", "spheres")
DIRECTIONS = (*SEPARABLE, "sphere")


def check_direction(kind: str, allowed: tuple[str, ...] = DIRECTIONS) -> None:
    """Raise ``ValueError`` for another kind of direction."""
    if kind not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"direction must be one of {names}, got {kind!r}")


def part(kind: str, key: Array, index: int, size: int, dtype: Any) -> Array:
    """The part (size,) of a direction in array ``index``; of a sphere's, up to its length."""
    key = jax.random.fold_in(key, index)
    if kind == "rademacher":
        return jax.random.rademacher(key, (size,), dtype)
    u = jax.random.normal(key, (size,), dtype)
    return _unit(u) if kind == "spheres" else u


def direction(kind: str, key: Array, sizes: Sequence[int], dtype: Any) -> Array:
    """A direction (d,) over arrays of these sizes."""
    parts = [part(kind, key, i, size, dtype) for i, size in enumerate(sizes)]
    u = jnp.concatenate(parts)
    return _unit(u) if kind == "sphere" else u


def scales(kind: str, sizes: Sequence[int]) -> Any:
    """The c, a number or (d,), for which the mean of ``c (g . u) u`` is g."""
    if kind == "sphere":
        return float(sum(sizes))
    return np.repeat(sizes, sizes).astype(np.float32) if kind == "spheres" else 1.0


def _unit(u: Array) -> Array:
    square = jnp.sum(u * u)
    return u / jnp.sqrt(jnp.where(square > 0, square, 1))  # that of nothing is nothing
