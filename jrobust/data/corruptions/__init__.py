"""Common corruptions at five severities, perturbation sequences, and their summaries.

The corruptions are those of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, "Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations", 2019) and of MNIST-C (Mu and
Gilmer, "MNIST-C: A Robustness Benchmark for Computer Vision", 2019), the sequences those of
CIFAR-10-P. All severity constants are those of the released code. The images are not: each example
draws from its own key. Ours are also

* frost, when no photographs are given: ridges of two height maps. The release lays photographs of
  frost over the image; for those pass ``textures=``;
* glass blur: neighbours truly change places. The release copies one onto the other in colour images
  (both sides of the exchange are views of one array);
* tilt turns the image about its middle; the release leaves it one pixel behind the axes, smaller;
* defocus loses no light; the release's disk of 8 pixels and more is brighter by up to 1%;
* float32 throughout, where the release rounds to 8 bits between steps; Euclidean distances
  and our own edges in spatter; bilinear places not rounded to 1/32 pixel in elastic transform.

With the published constants distortion grows with severity on average over images, but for glass
blur, elastic transform, frost, spatter and saturate (and snow with ImageNet's), whose kind changes
with severity: a wider frost on a darker image, water then mud, faded then deepened colours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust.data.corruptions import _common as _c
from jrobust.data.corruptions import _mnist as _m
from jrobust.data.corruptions._scores import flip_probability, flip_rate, mce, relative_mce
from jrobust.data.corruptions._sequences import SEQUENCES as _SEQUENCES

__all__ = [
    "EXTRA",
    "MNIST",
    "NAMES",
    "SEQUENCES",
    "corrupt",
    "flip_probability",
    "flip_rate",
    "mce",
    "relative_mce",
    "sequence",
]

Array = jax.Array

# Constants of the released code, by benchmark, corruption and severity.
_TABLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "cifar10-c": {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
        "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
    "imagenet-c": {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot_noise": (60, 25, 12, 5, 3),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        # In units of 244, not 224, in the release; kept.
        "elastic_transform": tuple(
            tuple(244 / 224 * v for v in level)
            for level in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (25, 18, 15, 10, 7),
        "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
        "gaussian_blur": (1, 2, 3, 4, 6),
        "spatter": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    },
}
_IMAGENET = _TABLE["imagenet-c"]
_TABLE["mnist-c"] = {
    "shot_noise": _IMAGENET["shot_noise"],
    "impulse_noise": _IMAGENET["impulse_noise"],
    # There only every second pixel changes places.
    "glass_blur": tuple((*level, 0.5) for level in _IMAGENET["glass_blur"]),
    "motion_blur": _IMAGENET["motion_blur"],
    "shear": (0.2, 0.4, 0.6, 0.8, 1.0),
    "scale": (0.9, 0.8, 0.7, 0.6, 0.5),
    "rotate": (0.2, 0.4, 0.6, 0.8, 1.0),
    "brightness": _IMAGENET["brightness"],
    "translate": (1, 2, 3, 4, 5),
    "stripe": ((),),
    "fog": tuple((*level, 256) for level in _IMAGENET["fog"]),
    "spatter": _IMAGENET["spatter"],
    "dotted_line": ((),),
    "zigzag": ((),),
    "canny_edges": ((),),
}
# The one severity of each in the published data set.
_MNIST_SEVERITY = {
    "shot_noise": 5,
    "impulse_noise": 4,
    "glass_blur": 1,
    "motion_blur": 1,
    "shear": 2,
    "scale": 3,
    "rotate": 2,
    "brightness": 5,
    "translate": 3,
    "stripe": 1,
    "fog": 5,
    "spatter": 4,
    "dotted_line": 1,
    "zigzag": 1,
    "canny_edges": 1,
}

_ALL = tuple(_TABLE["cifar10-c"])
NAMES = _ALL[:15]
EXTRA = _ALL[15:]
MNIST = tuple(_TABLE["mnist-c"])
SEQUENCES = tuple(_SEQUENCES)

_FUNCTIONS: dict[str, Callable[..., Array]] = {
    name: getattr(_c, name, None) or getattr(_m, name) for name in dict.fromkeys((*_ALL, *MNIST))
}
# How many of a corruption's constants are numbers to the compiled program, which then serves all
# severities; the others decide its kernels and loops.
_NUMBERS = {
    "gaussian_noise": 1,
    "shot_noise": 1,
    "impulse_noise": 1,
    "speckle_noise": 1,
    "brightness": 1,
    "contrast": 1,
    "frost": 2,
    "fog": 2,
    "saturate": 2,
    "shear": 1,
    "rotate": 1,
    "scale": 1,
    "translate": 1,
}
# What an example draws for one corruption is independent of what it draws for another.
_STREAM = {name: i for i, name in enumerate(_FUNCTIONS)}


def _images(x: Any) -> Array:
    shape, dtype = np.shape(x), getattr(x, "dtype", None)
    if len(shape) != 4 or shape[-1] not in (1, 3) or min(shape[1:3]) < 8:
        raise ValueError(
            f"x must be images (B, H, W, 1 or 3) of at least 8x8 pixels, got shape {shape}"
        )
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"x must be floating point in [0, 1], got {dtype}: divide by 255")
    if not isinstance(x, jax.core.Tracer) and x.size and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x must lie in [0, 1], got [{x.min()}, {x.max()}]")
    return jnp.asarray(x)


def _example_keys(key: Array, x: Array, ids: Any, stream: int) -> Array:
    _keys.check(key)
    ids = jnp.arange(x.shape[0]) if ids is None else jnp.asarray(ids)
    if ids.shape != x.shape[:1]:
        raise ValueError(f"ids must have shape {x.shape[:1]}, got {ids.shape}")
    return _keys.fold(_keys.examples(key, ids), stream)


@functools.partial(jax.jit, static_argnames=("name", "structure"))
def _corrupt(
    name: str,
    structure: tuple[Any, ...],
    numbers: tuple[Array, ...],
    keys: Array,
    x: Array,
    textures: Array | None,
) -> Array:
    constants = (*numbers, *structure)
    more = {} if textures is None else {"textures": textures}
    return jax.vmap(lambda k, image: _FUNCTIONS[name](k, image, *constants, **more))(keys, x)


def corrupt(
    name: str,
    severity: int | None,
    key: Array,
    x: Any,
    *,
    ids: Any = None,
    benchmark: str | None = None,
    textures: Any = None,
) -> Array:
    """Corrupt images: (B, H, W, C) in [0, 1] -> the same.

    Pure and traceable but for ``jpeg_compression``, which runs Pillow on the host. An example's
    draws depend on ``key``, its id and the corruption, and are the same at every severity.

    Args:
        name: out of ``NAMES`` (the 15 of ImageNet-C), ``EXTRA`` (its 4 for validation) or, with
            ``benchmark="mnist-c"``, ``MNIST``.
        severity: 1 .. 5; 0 changes nothing; None is the level of the published MNIST-C. Four of
            MNIST-C (stripe, dotted_line, zigzag, canny_edges) have one severity only.
        key: one typed key.
        x: floating point, 1 or 3 channels (3 for ``saturate``), sides of 8 pixels or more.
        ids: (B,) integers, 0 .. B - 1 when None.
        benchmark: whose constants: ``"cifar10-c"`` (made for sides of 32 pixels),
            ``"imagenet-c"`` (for 224) or ``"mnist-c"`` (for 28). When None, the first up to sides
            of 64 pixels, the second above.
        textures: (T, H', W', C) in [0, 1], at least as large as ``x``: photographs of frost, of
            which ``frost`` takes a random crop.

    Raises:
        ValueError, TypeError: before any compute, for unknown names or severities, images that
            are none, ``jpeg_compression`` inside jit.
        ImportError: for ``jpeg_compression`` without Pillow.
    """
    x = _images(x)
    if benchmark is None:
        benchmark = "cifar10-c" if max(x.shape[1:3]) <= 64 else "imagenet-c"
    if benchmark not in _TABLE:
        raise ValueError(f"benchmark must be one of {', '.join(_TABLE)}, got {benchmark!r}")
    table = _TABLE[benchmark]
    if name not in table:
        raise ValueError(f"{benchmark} has no corruption {name!r}; it has {', '.join(table)}")
    levels = table[name]
    if severity is None and benchmark == "mnist-c":
        severity = _MNIST_SEVERITY[name]
    if severity is None or isinstance(severity, bool) or severity not in range(len(levels) + 1):
        raise ValueError(f"severity of {name} must be in 0 .. {len(levels)}, got {severity!r}")
    if textures is not None:
        if name != "frost":
            raise ValueError(f"textures are of frost, {name} takes none")
        if np.ndim(textures) != 4 or not (
            np.shape(textures)[1] >= x.shape[1]
            and np.shape(textures)[2] >= x.shape[2]
            and np.shape(textures)[3] == x.shape[3]
        ):
            raise ValueError(
                f"textures must be (T, H, W, {x.shape[3]}) and cover images of {x.shape[1:3]}, got "
                f"{np.shape(textures)}"
            )
    keys = _example_keys(key, x, ids, _STREAM[name])
    if severity == 0:
        return x
    constants = levels[severity - 1]
    if not isinstance(constants, tuple):
        constants = (constants,)
    if name == "jpeg_compression":
        if isinstance(x, jax.core.Tracer):
            raise TypeError("jpeg_compression runs on the host: call it outside of jit")
        return jnp.asarray(_c.jpeg_compression(np.asarray(x), *constants))
    cut = _NUMBERS.get(name, 0)
    numbers = tuple(jnp.asarray(c, x.dtype) for c in constants[:cut])
    return _corrupt(name, constants[cut:], numbers, keys, x, textures)


@functools.partial(jax.jit, static_argnames="name")
def _sequence(name: str, keys: Array, x: Array) -> Array:
    return jnp.clip(jax.vmap(_SEQUENCES[name])(keys, x), 0, 1)


def sequence(name: str, key: Array, x: Any, *, ids: Any = None) -> Array:
    """Frames of a slowly growing perturbation: (B, H, W, C) -> (B, T, H, W, C), in [0, 1].

    Those of CIFAR-10-P at difficulty 1, whatever the size of ``x``: T is 21 for ``motion_blur``, 16
    for ``translate``, 31 for the rest. The noises begin with the clean image. Pure and traceable.
    What lies outside of a moved image is black; float32, where the release has 8 bits.

    Args:
        name: out of ``SEQUENCES``; snow and spatter of the benchmark are not there.
        key, x, ids: as in :func:`corrupt`.

    Raises ``ValueError`` and ``TypeError`` as :func:`corrupt` does.
    """
    x = _images(x)
    if name not in _SEQUENCES:
        raise ValueError(f"no sequence {name!r}; there are {', '.join(SEQUENCES)}")
    stream = len(_STREAM) + SEQUENCES.index(name)
    return _sequence(name, _example_keys(key, x, ids, stream), x)
