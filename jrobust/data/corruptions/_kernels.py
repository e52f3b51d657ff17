"""What corruptions are made of. Images here are single, (H, W, C) in [0, 1]."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_HIGHEST = jax.lax.Precision.HIGHEST
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (Rec. 601)


def grey(x: Array) -> Array:
    """Luminance (H, W, 1)."""
    if x.shape[-1] == 1:
        return x
    return jnp.sum(x * jnp.array(LUMA, x.dtype).reshape(1, 1, 3), -1, keepdims=True)


def separable(rows: np.ndarray, x: Array, columns: np.ndarray) -> Array:
    """``rows @ x @ columns.T`` for every channel."""
    a, b = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    return jnp.einsum("ij,jkc,lk->ilc", a, x, b, precision=_HIGHEST)


@functools.cache
def _gaussian(length: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    """The matrix that smooths (length,) values, as ``scipy.ndimage.gaussian_filter1d``."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    source = np.arange(length)[:, None] + offsets
    weights = np.broadcast_to(weights, source.shape).copy()
    if mode == "nearest":
        source = np.clip(source, 0, length - 1)
    elif mode == "reflect":
        source = source % (2 * length)
        source = np.minimum(source, 2 * length - 1 - source)
    else:  # zeros outside
        weights[(source < 0) | (source >= length)] = 0
        source = np.clip(source, 0, length - 1)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length)[:, None], source), weights)
    return matrix


def gaussian_blur(x: Array, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """Gaussian smoothing; ``mode`` is the world outside: nearest, reflect or constant (zero)."""
    if sigma == 0:
        return x
    rows, columns = (_gaussian(n, sigma, mode, truncate) for n in x.shape[:2])
    return separable(rows, x, columns)


def convolve(x: Array, kernel: np.ndarray, mode: str = "reflect") -> Array:
    """Correlate every channel with ``kernel`` (odd sides); ``mode`` pads as ``jnp.pad``."""
    up, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = jnp.pad(x, ((up, up), (left, left), (0, 0)), mode=mode)
    out = jax.lax.conv_general_dilated(
        padded.transpose(2, 0, 1)[:, None],
        jnp.asarray(kernel, x.dtype)[None, None],
        (1, 1),
        "VALID",
        precision=_HIGHEST,
    )
    return out[:, 0].transpose(1, 2, 0)


@functools.cache
def disk(radius: float, alias: float) -> np.ndarray:
    """A disk of light, softened by a small Gaussian of deviation ``alias``; empty rim cut off."""
    rim = 1 if radius <= 8 else 2
    reach = int(radius) + rim  # with room for what the softening spills: no light is lost
    line = np.arange(-reach, reach + 1)
    kernel = (line[:, None] ** 2 + line[None] ** 2 <= radius**2).astype(float)
    kernel /= kernel.sum()
    offsets = np.arange(-rim, rim + 1)
    weights = np.exp(-0.5 * (offsets / alias) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pads = [(rim, rim) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(kernel, pads)
        kernel = sum(
            w * np.take(padded, np.arange(kernel.shape[axis]) + i, axis)
            for i, w in enumerate(weights)
        )
    lit = np.flatnonzero(kernel.any(0))
    inside = slice(lit[0], lit[-1] + 1)
    return kernel[inside, inside]


def motion_blur(x: Array, radius: int, sigma: float, angle: Array) -> Array:
    """Blur along a line of one side: offset i of ``2 radius + 1`` weighs exp(-i^2 / 2 sigma^2).

    ``angle`` in degrees, from the x axis towards y (down). Outside, the border goes on.
    """
    width = 2 * radius + 1
    weights = np.exp(-0.5 * (np.arange(width) / sigma) ** 2)
    weights /= weights.sum()
    height, across, channels = x.shape
    padded = jnp.pad(x, ((width, width), (width, width), (0, 0)), mode="edge")
    turn = jnp.deg2rad(angle)
    # Ties go down: a step is ceil(. - 1/2).
    step = jnp.ceil(
        jnp.arange(width)[:, None] * jnp.stack([jnp.sin(turn), jnp.cos(turn)])[None] - 0.5
    ).astype(jnp.int32)

    def add(i: Array, total: Array) -> Array:
        start = (width + step[i, 0], width + step[i, 1], 0)
        moved = jax.lax.dynamic_slice(padded, start, (height, across, channels))
        return total + jnp.asarray(weights, x.dtype)[i] * moved

    return jax.lax.fori_loop(0, width, add, jnp.zeros_like(x))


@functools.cache
def _zoom(length: int, factor: float) -> np.ndarray:
    """The matrix that enlarges the middle of (length,) values linearly, ends on ends."""
    crop = math.ceil(length / factor)
    first = (length - crop) // 2
    grown = round(crop * factor)
    place = np.arange(grown) * ((crop - 1) / max(grown - 1, 1))
    low = np.minimum(place.astype(int), max(crop - 2, 0))
    matrix = np.zeros((grown, length))
    np.add.at(matrix, (np.arange(grown), first + low), 1 - (place - low))
    np.add.at(matrix, (np.arange(grown), first + np.minimum(low + 1, crop - 1)), place - low)
    trim = (grown - length) // 2
    return matrix[trim : trim + length]


def zoom(x: Array, factor: float) -> Array:
    """The middle of the image, ``factor`` times as large."""
    return separable(_zoom(x.shape[0], factor), x, _zoom(x.shape[1], factor))


@functools.cache
def _box(length: int, size: int) -> np.ndarray:
    """The matrix of Pillow's BOX filter from ``length`` pixels to ``size``."""
    scale = length / size
    support = 0.5 * max(scale, 1.0)
    matrix = np.zeros((size, length))
    for i in range(size):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        offset = (np.arange(low, high) - centre + 0.5) / max(scale, 1.0)
        weight = ((offset > -0.5) & (offset <= 0.5)).astype(float)
        matrix[i, low:high] = weight / weight.sum()
    return matrix


def pixelate(x: Array, share: float) -> Array:
    """Down to ``int(share * side)`` pixels by area, and up again."""
    sizes = [max(int(n * share), 1) for n in x.shape[:2]]
    rows, columns = ((_box(m, n) @ _box(n, m)) for n, m in zip(x.shape[:2], sizes))
    return separable(rows, x, columns)


def plasma(key: Array, size: int, decay: Array | float) -> Array:
    """A periodic height map (size, size) over [0, 1] by diamond and square, size a power of two.

    Every step halves the grid; a new point is the mean of its four neighbours plus a uniform
    number within +- w^2, where w falls from 100 by the factor ``decay`` with each step.
    """
    height, wobble = jnp.zeros((1, 1)), jnp.float32(100.0)
    for step in range(size.bit_length() - 1):
        n = height.shape[0]
        noise = jax.random.uniform(jax.random.fold_in(key, step), (3, n, n), minval=-1, maxval=1)
        noise = noise * wobble**2
        below = height + jnp.roll(height, -1, 0)
        middle = (below + jnp.roll(below, -1, 1)) / 4 + noise[0]
        top = middle + jnp.roll(middle, 1, 0) + height + jnp.roll(height, -1, 1)
        left = middle + jnp.roll(middle, 1, 1) + height + jnp.roll(height, -1, 0)
        upper = jnp.stack([height, top / 4 + noise[1]], -1)
        lower = jnp.stack([left / 4 + noise[2], middle], -1)
        height = jnp.stack([upper, lower], 1).reshape(2 * n, 2 * n)
        wobble = wobble / decay
    height = height - height.min()
    return height / height.max()


def landscape(key: Array, x: Array, decay: Array | float, least: int = 1) -> Array:
    """A plasma height map (H, W, 1) for ``x``, cut from one of at least ``least`` pixels."""
    size = 1 << (max(least, *x.shape[:2]) - 1).bit_length()
    return plasma(key, size, decay)[: x.shape[0], : x.shape[1], None]


def sample(x: Array, row: Array, column: Array, outside: str) -> Array:
    """Bilinear values at (H', W') places, in pixels; ``outside`` as in ``scipy.ndimage``.

    ``constant`` is zero beyond the border, ``mirror`` turns about the last pixel, ``reflect``
    about its edge, ``nearest`` goes on.
    """
    height, width = x.shape[:2]

    def at(i: Array, j: Array) -> Array:
        found = []
        inside = jnp.ones(i.shape, bool)
        for place, n in ((i, height), (j, width)):
            if outside == "mirror":
                place = jnp.mod(place, max(2 * n - 2, 1))
                place = jnp.minimum(place, 2 * n - 2 - place)
            elif outside == "reflect":
                place = jnp.mod(place, 2 * n)
                place = jnp.minimum(place, 2 * n - 1 - place)
            elif outside == "constant":
                inside &= (place >= 0) & (place < n)
            found.append(jnp.clip(place, 0, n - 1))
        return jnp.where(inside[..., None], x[found[0], found[1]], 0)

    i, j = jnp.floor(row).astype(jnp.int32), jnp.floor(column).astype(jnp.int32)
    v, u = (row - i)[..., None], (column - j)[..., None]
    above = at(i, j) * (1 - u) + at(i, j + 1) * u
    below = at(i + 1, j) * (1 - u) + at(i + 1, j + 1) * u
    return above * (1 - v) + below * v


def warp(x: Array, matrix: Array, outside: str = "constant") -> Array:
    """The image whose pixel (column, row) is that of ``x`` at ``matrix`` (3, 3) times it."""
    row, column = jnp.meshgrid(
        jnp.arange(x.shape[0], dtype=x.dtype), jnp.arange(x.shape[1], dtype=x.dtype), indexing="ij"
    )
    m = matrix.astype(x.dtype)
    u, v, w = (m[i, 0] * column + m[i, 1] * row + m[i, 2] for i in range(3))
    return sample(x, v / w, u / w, outside)


def about_centre(linear: Array, x: Array) -> Array:
    """(2, 2) as a (3, 3) that leaves the middle of ``x`` where it is."""
    middle = jnp.array([(x.shape[1] - 1) / 2, (x.shape[0] - 1) / 2])
    shift = middle - jnp.matmul(linear, middle, precision=_HIGHEST)
    return jnp.eye(3).at[:2, :2].set(linear).at[:2, 2].set(shift)


def hysteresis(strong: Array, weak: Array) -> Array:
    """The pixels of ``weak`` (H, W) bool linked, over corners too, to one that is ``strong``."""

    def grow(state: tuple[Array, Array]) -> tuple[Array, Array]:
        found, _ = state
        near = jax.lax.reduce_window(found, False, jnp.logical_or, (3, 3), (1, 1), "SAME")
        wider = near & weak
        return wider, jnp.any(wider != found)

    start = strong & weak
    return jax.lax.while_loop(lambda state: state[1], grow, (start, jnp.any(start)))[0]


def slopes(x: Array, mode: str) -> tuple[Array, Array]:
    """Sobel derivatives (H, W) of (H, W) along columns and along rows."""
    across = np.outer([1, 2, 1], [-1, 0, 1])
    return tuple(convolve(x[..., None], k, mode)[..., 0] for k in (across, across.T))  # type: ignore


def canny(x: Array, sigma: float = 1.0, low: float = 0.1, high: float = 0.2) -> Array:
    """Edges (H, W) bool of (H, W) by Canny (1986), one pixel wide.

    Gaussian smoothing with zeros outside, made good for them; Sobel slopes; maxima along the
    slope, between pixels by linear interpolation; hysteresis between the thresholds.
    """
    weight = gaussian_blur(jnp.ones_like(x)[..., None], sigma, mode="constant")
    smooth = (gaussian_blur(x[..., None], sigma, mode="constant") / weight)[..., 0]
    dx, dy = slopes(smooth, "symmetric")
    size = jnp.hypot(dx, dy)
    # The neighbours between which the slope points, and how far from the straight one.
    steep = jnp.abs(dy) > jnp.abs(dx)
    small, large = jnp.minimum(jnp.abs(dx), jnp.abs(dy)), jnp.maximum(jnp.abs(dx), jnp.abs(dy))
    share = small / jnp.where(large > 0, large, 1)
    sx, sy = jnp.sign(dx).astype(jnp.int32), jnp.sign(dy).astype(jnp.int32)
    around = jnp.pad(size, 1)
    row, column = jnp.indices(x.shape) + 1

    def ahead(way: int) -> Array:
        straight = around[
            row + way * jnp.where(steep, sy, 0), column + way * jnp.where(steep, 0, sx)
        ]
        corner = around[row + way * sy, column + way * sx]
        return straight * (1 - share) + corner * share

    inner = jnp.zeros(x.shape, bool).at[1:-1, 1:-1].set(True)
    best = inner & (size > 0) & (size >= ahead(1)) & (size >= ahead(-1))
    return hysteresis(best & (size >= high), best & (size >= low))


def product(*matrices: Array) -> Array:
    """The product of matrices, in full precision."""
    return functools.reduce(lambda a, b: jnp.matmul(a, b, precision=_HIGHEST), matrices)


def inverse(m: Array) -> Array:
    """The inverse of (3, 3) up to a factor: its adjugate."""
    rows = [jnp.cross(m[:, (i + 1) % 3], m[:, (i + 2) % 3]) for i in range(3)]
    return jnp.stack(rows)
