"""Per-example PRNG keys: the noise of an example depends on its id, never on its batch.

Fold order, outermost first: example id, attack, class or restart, step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Streams of one example that branch by a small index fold it in above this offset, where no step
# counter reaches, so that a branch never meets a step of its parent.
_ATTACK = 1 << 30
_RESTART = 1 << 31
_TARGET = 3 << 30


def check(key: Array) -> None:
    """Raise ``TypeError`` unless ``key`` is a single typed Threefry key (``jax.random.key``)."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"key must be a typed PRNG key, got {type(key).__name__} of dtype {dtype}; "
            "make one with jax.random.key(seed)"
        )
    if "rbg" in str(jax.random.key_impl(key)):
        raise TypeError(
            f"key is of the {jax.random.key_impl(key)} generator, whose draws depend on the batch "
            "under vmap, so that no example would own its noise; use "
            "jax.random.key(seed, impl='threefry2x32')"
        )
    if key.shape != ():
        raise ValueError(f"key must be a single key of shape (), got shape {key.shape}")


def check_range(ids: Any) -> None:
    """Raise ``ValueError`` for ids that 32 bits, all that a key takes of them, do not tell apart.

    To be asked before JAX narrows 64 bits in silence. Traced ids and those that are no integers
    pass.
    """
    if isinstance(ids, jax.core.Tracer) or getattr(ids, "itemsize", 8) <= 4:
        return
    wide = np.asarray(ids)
    if wide.dtype.kind not in "iu" or not wide.size:
        return
    if not -(2**31) <= wide.min() <= wide.max() < min(2**32, int(wide.min()) + 2**32):
        raise ValueError(
            f"ids must fit in 32 bits, got {wide.min()} .. {wide.max()}: examples whose ids differ "
            "by a multiple of 2^32 would share their noise"
        )


def examples(key: Array, ids: Array) -> Array:
    """Keys of examples: ``fold_in(key, id)`` for each of ``ids`` (B,) int -> (B,) keys."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids.astype(jnp.uint32))


def fold(keys: Array, data: Array | int) -> Array:
    """Fold ``data`` (a number, or one for each key) into each of ``keys`` (B,) -> (B,)."""
    data = jnp.broadcast_to(jnp.asarray(data).astype(jnp.uint32), keys.shape)
    return jax.vmap(jax.random.fold_in)(keys, data)


def attack(keys: Array, index: int) -> Array:
    """Keys for member ``index`` of a composition; member 0 draws what it would draw alone."""
    return keys if index == 0 else fold(keys, jnp.uint32(_ATTACK + index))


def restart(keys: Array, index: Array) -> Array:
    """Keys for restart ``index`` (B,); restart 0 draws what the attack would draw alone."""
    again = fold(keys, jnp.uint32(_RESTART) + index.astype(jnp.uint32))
    return jnp.where(index == 0, keys, again)


def target(keys: Array, index: Array) -> Array:
    """Keys for the class tried in turn ``index`` (B,); the first draws what one alone would."""
    later = fold(keys, jnp.uint32(_TARGET) + index.astype(jnp.uint32))
    return jnp.where(index == 0, keys, later)
