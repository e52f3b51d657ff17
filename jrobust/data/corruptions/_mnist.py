"""The corruptions of MNIST-C that ImageNet-C has not, one image at a time."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jrobust.data.corruptions import _kernels as k

Array = jax.Array


def _sign(key: Array, shape: tuple[int, ...] = ()) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def shear(key: Array, x: Array, angle: float) -> Array:
    turn = angle * _sign(key)
    linear = jnp.stack(
        [jnp.stack([1.0 + 0 * turn, -jnp.sin(turn)]), jnp.stack([0 * turn, jnp.cos(turn)])]
    )
    return k.warp(x, k.about_centre(linear, x))


def rotate(key: Array, x: Array, angle: float) -> Array:
    return k.warp(x, k.about_centre(rotation(angle * _sign(key)), x))


def rotation(turn: Array) -> Array:
    """(2, 2)."""
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    return jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])


def scale(key: Array, x: Array, size: float) -> Array:
    return k.warp(x, k.about_centre(jnp.eye(2) / size, x))


def translate(key: Array, x: Array, pixels: int) -> Array:
    return k.warp(x, jnp.eye(3).at[:2, 2].set(pixels * _sign(key, (2,))))


def stripe(key: Array, x: Array) -> Array:
    quarter = x.shape[1] // 4
    outer = np.ones(x.shape[1], bool)
    outer[quarter : 3 * quarter] = False
    return jnp.where(outer[None, :, None], 1 - x, x)


def _line(x: Array, start: tuple[Array, Array], stop: tuple[Array, Array]) -> Array:
    """A soft line (H, W, 1) from (column, row) to (column, row), left to right."""
    (c0, r0), (c1, r1) = start, stop
    row, column = jnp.indices(x.shape[:2]).astype(jnp.float32)
    distance = jnp.abs(row - (r0 + (r1 - r0) / (c1 - c0) * (column - c0)))
    ink = jnp.clip(jnp.log(1 - jnp.minimum(distance, 2.3 - 1e-6) / 2.3) + 1, 0, 1)
    inside = (column >= jnp.floor(c0)) & (column < jnp.ceil(c1))
    return jnp.where(inside, ink, 0)[..., None]


def dotted_line(key: Array, x: Array) -> Array:
    last = x.shape[1] - 1
    r0, r1 = jax.random.randint(key, (2,), 0, x.shape[0] - 1).astype(jnp.float32)
    line = _line(x, (jnp.float32(0), r0), (jnp.float32(last), r1))
    dots = np.arange(x.shape[1]) // 2 % 2 == 1
    return jnp.clip(x + jnp.where(dots[None, :, None], line, 0), 0, 1)


def zigzag(key: Array, x: Array) -> Array:
    where, slope = jax.random.split(key)
    span = float(x.shape[1] - 5)
    r0 = jax.random.randint(where, (), 0, x.shape[0] - 1).astype(jnp.float32)
    turn = jnp.arctan(jax.random.randint(slope, (), -5, 5) / span)
    length = span / jnp.cos(turn)
    # Teeth of 2 pixels' height every 2 pixels along the line; the rest of it ends near its axis.
    teeth = int((span - 2) // 4) + 1
    along = [2.0 * (2 * i + 1) for i in range(teeth)]
    heights = [2.0 * (-1) ** i for i in range(teeth)]
    rest = length - 4.0 * math.floor(span / 4)
    column = jnp.stack([jnp.float32(0), *map(jnp.float32, along), length])
    row = jnp.stack([jnp.float32(0), *map(jnp.float32, heights), heights[-1] / (2 * rest)])
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    points = list(zip(2 + cos * column - sin * row, r0 + sin * column + cos * row))
    for start, stop in itertools.pairwise(points):
        x = jnp.clip(x + _line(x, start, stop), 0, 1)
    return x


def canny_edges(key: Array, x: Array) -> Array:
    return jnp.stack([k.canny(x[..., c]) for c in range(x.shape[-1])], -1).astype(x.dtype)
