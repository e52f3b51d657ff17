"""The perturbation sequences of CIFAR-10-P, one image at a time: (H, W, C) -> (T, H, W, C)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jrobust.data.corruptions import _common, _mnist
from jrobust.data.corruptions import _kernels as k

Array = jax.Array


def _noise(draw: Callable[[Array, Array, float], Array], level: float) -> Callable[..., Array]:
    def frames(key: Array, x: Array) -> Array:
        noisy = jax.vmap(lambda key: draw(key, x, level))(jax.random.split(key, 30))
        return jnp.concatenate([x[None], noisy])

    return frames


def _each(steps: np.ndarray, frame: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    steps = np.asarray(steps, np.float32)
    return lambda key, x: jax.vmap(lambda step: frame(x, step))(jnp.asarray(steps))


def _warped(linear: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda x, step: k.warp(x, k.about_centre(linear(step), x))


def _shear(degrees: Array) -> Array:
    slope = jnp.tan(jnp.deg2rad(degrees))
    return jnp.stack([jnp.stack([1 + 0 * slope, slope]), jnp.array([0.0, 1.0])])


def _translate(x: Array, pixels: Array) -> Array:
    return k.warp(x, jnp.eye(3).at[0, 2].set(-pixels))


def _tilt(x: Array, degrees: Array) -> Array:
    """Turned about both axes, seen from as far as the diagonal is long."""
    height, width = x.shape[:2]
    far = math.hypot(height, width)
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    # The plane turned about the y axis, then about x: columns are the images of its two directions
    # and of its middle, which stays.
    zero = 0 * cos
    plane = jnp.stack(
        [
            jnp.stack([cos, zero, zero]),
            jnp.stack([-sin * sin, cos, zero]),
            jnp.stack([sin * cos, sin, zero + far]),
        ]
    )
    lens = jnp.array([[far, 0, width / 2], [0, far, height / 2], [0, 0, 1.0]])
    middle = jnp.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1.0]])
    forth = k.product(lens, plane, middle)
    return k.warp(x, k.inverse(forth))


def _zoom_blur(key: Array, x: Array) -> Array:
    zoomed = _each(1 + 0.004 * np.arange(31), _warped(lambda s: jnp.eye(2) / s))(key, x)
    return jnp.cumsum(zoomed, 0) / jnp.arange(1, 32, dtype=x.dtype).reshape(-1, 1, 1, 1)


def _gaussian_blur(key: Array, x: Array) -> Array:
    sigmas = 0.3 + 0.015 * np.arange(31)
    return jnp.stack([k.gaussian_blur(x, float(s), truncate=7.0) for s in sigmas])


_STEPS = np.arange(31)

SEQUENCES: dict[str, Callable[[Array, Array], Array]] = {
    "gaussian_noise": _noise(_common.gaussian_noise, 0.02),
    "shot_noise": _noise(_common.shot_noise, 700),
    "motion_blur": _each(9.0 * (np.arange(21) - 20), lambda x, a: k.motion_blur(x, 6, 1.8, a)),
    "zoom_blur": _zoom_blur,
    "brightness": _each(
        0.015 * (_STEPS - 15), lambda x, c: _common.brightness(jax.random.key(0), x, c)
    ),
    "translate": _each(np.arange(16) - 7, _translate),
    "rotate": _each(_STEPS - 15, _warped(lambda a: _mnist.rotation(jnp.deg2rad(a)))),
    "tilt": _each(0.75 * (_STEPS - 15), _tilt),
    "scale": _each((2 * _STEPS + 70) / 100, _warped(lambda s: jnp.eye(2) / s)),
    "speckle_noise": _noise(_common.speckle_noise, 0.05),
    "gaussian_blur": _gaussian_blur,
    "shear": _each(_STEPS - 15, _warped(_shear)),
}
