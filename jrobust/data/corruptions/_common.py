"""The common corruptions of ImageNet-C and CIFAR-10-C, one image at a time."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust.data.corruptions import _kernels as k

Array = jax.Array


def _clip(x: Array) -> Array:
    return jnp.clip(x, 0, 1)


def gaussian_noise(key: Array, x: Array, sigma: float) -> Array:
    return _clip(x + sigma * jax.random.normal(key, x.shape, x.dtype))


def shot_noise(key: Array, x: Array, photons: float) -> Array:
    return _clip(jax.random.poisson(key, x * photons).astype(x.dtype) / photons)


def impulse_noise(key: Array, x: Array, share: float) -> Array:
    hit, salt = jax.random.split(key)
    grain = jax.random.bernoulli(salt, 0.5, x.shape).astype(x.dtype)
    return jnp.where(jax.random.bernoulli(hit, share, x.shape), grain, x)


def speckle_noise(key: Array, x: Array, sigma: float) -> Array:
    return _clip(x + x * sigma * jax.random.normal(key, x.shape, x.dtype))


def gaussian_blur(key: Array, x: Array, sigma: float) -> Array:
    return _clip(k.gaussian_blur(x, sigma))


def glass_blur(
    key: Array, x: Array, sigma: float, reach: int, rounds: int, share: float = 1.0
) -> Array:
    height, width = x.shape[:2]
    rows, columns = height - 2 * reach, width - 2 * reach
    count = rows * columns
    where, whether = jax.random.split(key)
    moves = jax.random.randint(where, (rounds * count, 2), -reach, reach)
    swaps = jax.random.bernoulli(whether, share, (rounds * count,))

    def swap(i: Array, place: Array) -> Array:
        row = height - reach - (i % count) // columns
        column = width - reach - i % columns
        here = row * width + column
        there = jnp.where(swaps[i], here + moves[i, 0] * width + moves[i, 1], here)
        a, b = place[here], place[there]
        return place.at[here].set(b).at[there].set(a)

    blurred = k.gaussian_blur(x, sigma)
    # The pixels change places one after the other, last row first: only their numbers travel.
    start = jnp.arange(height * width) + 0 * moves[0, 0]
    place = jax.lax.fori_loop(0, rounds * count, swap, start)
    shuffled = blurred.reshape(height * width, -1)[place].reshape(x.shape)
    return _clip(k.gaussian_blur(shuffled, sigma))


def defocus_blur(key: Array, x: Array, radius: float, alias: float) -> Array:
    return _clip(k.convolve(x, k.disk(radius, alias)))


def motion_blur(key: Array, x: Array, radius: int, sigma: float) -> Array:
    return _clip(
        k.motion_blur(x, radius, sigma, jax.random.uniform(key, (), minval=-45, maxval=45))
    )


def zoom_blur(key: Array, x: Array, stop: float, step: float) -> Array:
    factors = np.arange(1, stop, step)
    total = x + sum(k.zoom(x, float(factor)) for factor in factors)
    return _clip(total / (len(factors) + 1))


def snow(
    key: Array,
    x: Array,
    mean: float,
    deviation: float,
    zoom: float,
    least: float,
    radius: int,
    sigma: float,
    keep: float,
) -> Array:
    flakes, direction = jax.random.split(key)
    layer = mean + deviation * jax.random.normal(flakes, (*x.shape[:2], 1), x.dtype)
    layer = k.zoom(layer, zoom)
    layer = _clip(jnp.where(layer < least, 0, layer))
    angle = jax.random.uniform(direction, (), minval=-135, maxval=-45)
    layer = k.motion_blur(layer, radius, sigma, angle)
    white = jnp.maximum(x, k.grey(x) * 1.5 + 0.5)
    return _clip(keep * x + (1 - keep) * white + layer + layer[::-1, ::-1])


def frost(key: Array, x: Array, keep: float, weight: float, textures: Any = None) -> Array:
    if textures is None:
        layer = _ice(key, x)
    else:
        pick, corner = jax.random.split(key)
        textures = jnp.asarray(textures, x.dtype)
        count, height, width, _ = textures.shape
        top, left = jax.random.randint(
            corner, (2,), 0, jnp.array([height - x.shape[0] + 1, width - x.shape[1] + 1])
        )
        start = (jax.random.randint(pick, (), 0, count), top, left, 0)
        layer = jax.lax.dynamic_slice(textures, start, (1, *x.shape))[0]
    return _clip(keep * x + weight * layer)


def _ice(key: Array, x: Array) -> Array:
    """Needles of ice on a pale blue film: the ridges of two height maps, sheared apart."""
    decays, slants = jnp.array([1.6, 1.6, 2.5]), jnp.array([0.7, -0.7])
    maps = jax.vmap(lambda key, decay: k.landscape(key, x, decay))(jax.random.split(key, 3), decays)

    def ridges(height: Array, slant: Array) -> Array:
        linear = jnp.array([[1.0, 0.0], [0.0, 0.4]]).at[0, 1].set(slant)
        return 1 - jnp.abs(2 * k.warp(height, k.about_centre(linear, x), "mirror") - 1)

    needles = jnp.max(jax.vmap(ridges)(maps[:2], slants), 0) ** 4
    light = 0.2 * maps[2] + 0.8 * needles
    colour = jnp.array([0.86, 0.95, 1.0], x.dtype).reshape(1, 1, 3)
    return light * (colour if x.shape[-1] == 3 else 1)


def fog(key: Array, x: Array, density: float, decay: float, least: int = 1) -> Array:
    brightest = jnp.max(x)
    cloudy = x + density * k.landscape(key, x, decay, least)
    return _clip(cloudy * brightest / (brightest + density))


def brightness(key: Array, x: Array, shift: Array | float) -> Array:
    # Hue and saturation stay, the value (the largest channel) rises: all channels by one factor.
    value = jnp.max(x, -1, keepdims=True)
    risen = _clip(value + shift)
    return jnp.where(value > 0, x / jnp.where(value > 0, value, 1) * risen, risen)


def contrast(key: Array, x: Array, share: float) -> Array:
    mean = jnp.mean(x, (0, 1), keepdims=True)
    return _clip((x - mean) * share + mean)


def saturate(key: Array, x: Array, factor: float, shift: float) -> Array:
    if x.shape[-1] != 3:
        raise ValueError(f"saturate needs images of 3 channels, got {x.shape[-1]}")
    value = jnp.max(x, -1, keepdims=True)
    chroma = value - jnp.min(x, -1, keepdims=True)
    coloured = chroma > 0
    saturation = chroma / jnp.where(value > 0, value, 1)
    new = _clip(saturation * factor + shift)
    # Grey has hue zero, red, as in the usual conversion to HSV.
    fall = (value - x) / jnp.where(coloured, chroma, 1)
    fall = jnp.where(coloured, fall, jnp.array([0.0, 1.0, 1.0], x.dtype).reshape(1, 1, 3))
    return _clip(value * (1 - fall * new))


def pixelate(key: Array, x: Array, share: float) -> Array:
    return _clip(k.pixelate(x, share))


def elastic_transform(key: Array, x: Array, strength: float, sigma: float, affine: float) -> Array:
    """Numbers in sides of the image."""
    height, width = x.shape[:2]
    side = min(height, width)
    corners, across, down = jax.random.split(key, 3)
    middle, arm = np.array([width // 2, height // 2], float), side // 3
    points = np.array([middle + arm, [middle[0] + arm, middle[1] - arm], middle - arm])
    moved = points + affine * side * jax.random.uniform(corners, (3, 2), minval=-1, maxval=1)
    # The affine map of the moved points onto the first: where each new pixel was.
    (a, b), (c, d) = moved[1] - moved[0], moved[2] - moved[0]
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    edges = jnp.asarray([points[1] - points[0], points[2] - points[0]], jnp.float32)
    back = jnp.matmul(inverse, edges, precision=jax.lax.Precision.HIGHEST).T
    shift = points[0] - jnp.matmul(back, moved[0], precision=jax.lax.Precision.HIGHEST)
    x = k.warp(x, jnp.eye(3).at[:2, :2].set(back).at[:2, 2].set(shift), "mirror")
    if strength == 0:
        return _clip(x)
    shifts = []
    for draw in (down, across):
        noise = jax.random.uniform(draw, (height, width, 1), minval=-1, maxval=1)
        smooth = k.gaussian_blur(noise, sigma * side, mode="reflect", truncate=3.0)
        shifts.append(smooth[..., 0] * strength * side)
    row, column = jnp.indices((height, width)).astype(x.dtype)
    return _clip(k.sample(x, row + shifts[0], column + shifts[1], "reflect"))


def spatter(
    key: Array,
    x: Array,
    mean: float,
    deviation: float,
    sigma: float,
    least: float,
    strength: float,
    mud: int,
) -> Array:
    layer = mean + deviation * jax.random.normal(key, (*x.shape[:2], 1), x.dtype)
    layer = k.gaussian_blur(layer, sigma)
    if mud:
        cover = k.gaussian_blur((layer > least).astype(x.dtype), strength)
        cover = jnp.where(cover < 0.8, 0, cover)
        colour = (63, 42, 20) if x.shape[-1] == 3 else (63,)
        return _clip(x * (1 - cover) + cover * jnp.array(colour, x.dtype).reshape(1, 1, -1) / 255)
    layer = jnp.where(layer < least, 0, layer)
    drops = jnp.floor(255 * layer[..., 0]) * _relief(jnp.floor(255 * _clip(layer[..., 0])))
    most = jnp.max(drops)
    cover = (drops / jnp.where(most > 0, most, 1) * strength)[..., None]
    colour = (175, 238, 238) if x.shape[-1] == 3 else (238,)
    return _clip(x + cover * jnp.array(colour, x.dtype).reshape(1, 1, -1) / 255)


def _relief(layer: Array) -> Array:
    """How light falls on drops (H, W), given in 0 .. 255: by the distance from their edges."""
    third = np.full((3, 3), 1 / 9)
    distance = jnp.minimum(_distance(_edges(layer)), 20)
    level = jnp.floor(k.convolve(distance[..., None], third)[..., 0] + 1e-4)
    # Equalised: a level's share of the pixels above the lowest.
    levels = jnp.arange(21, dtype=layer.dtype)
    at_most = jnp.sum(level[None] <= levels[:, None, None], (1, 2))
    lowest = jnp.min(jnp.where(at_most > 0, at_most, level.size))
    rest = jnp.maximum(level.size - lowest, 1)
    table = jnp.round(255 * (at_most - lowest) / rest)
    level = table[level.astype(jnp.int32)]
    lit = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    level = jnp.clip(k.convolve(level[..., None], lit), 0, 255)
    return k.convolve(level, third)[..., 0]


def _edges(layer: Array) -> Array:
    """Canny's edges (H, W) bool at 50 and 150 of the L1 slope, in four directions."""
    dx, dy = k.slopes(layer, "edge")
    size = jnp.abs(dx) + jnp.abs(dy)
    around = jnp.pad(size, 1)
    height, width = layer.shape

    def at(i: int, j: int) -> Array:
        return around[1 + i : 1 + i + height, 1 + j : 1 + j + width]

    flat = jnp.abs(dy) < np.tan(np.pi / 8) * jnp.abs(dx)
    upright = jnp.abs(dy) > np.tan(3 * np.pi / 8) * jnp.abs(dx)
    falling = (dx * dy) >= 0
    diagonal = jnp.where(
        falling,
        (size > at(-1, -1)) & (size > at(1, 1)),
        (size > at(-1, 1)) & (size > at(1, -1)),
    )
    best = jnp.where(
        flat,
        (size > at(0, -1)) & (size >= at(0, 1)),
        jnp.where(upright, (size > at(-1, 0)) & (size >= at(1, 0)), diagonal),
    )
    return k.hysteresis(best & (size > 150), best & (size > 50))


def _distance(edges: Array, reach: int = 20) -> Array:
    """Euclidean distance (H, W) to the nearest edge, exact up to ``reach``."""
    far = jnp.float32(2 * (reach + 1) ** 2)
    square = jnp.where(edges, 0.0, far)
    for axis in (0, 1):
        n = square.shape[axis]
        pads = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        padded = jnp.pad(square, pads, constant_values=far)

        def nearest(i: Array, best: Array, padded: Array = padded, axis: int = axis, n: int = n):  # type: ignore[no-untyped-def]
            moved = jax.lax.dynamic_slice_in_dim(padded, i, n, axis)
            return jnp.minimum(best, moved + (i - reach).astype(jnp.float32) ** 2)

        square = jax.lax.fori_loop(0, 2 * reach + 1, nearest, square)
    return jnp.sqrt(square)


def jpeg_compression(x: np.ndarray, quality: int) -> np.ndarray:
    """On the host, a batch (B, H, W, C)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_compression needs Pillow: pip install 'jrobust[data]'") from error
    out = np.empty_like(x)
    for i, image in enumerate(np.rint(x * 255).astype(np.uint8)):
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            file, "JPEG", quality=quality
        )
        out[i] = np.asarray(Image.open(file), x.dtype).reshape(image.shape) / 255
    return out
