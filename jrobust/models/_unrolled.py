"""Reconstruction by an unrolled network, and smoothed unrolling (SMUG) that makes it stable.

Complex images are real arrays whose last axis is (real, imaginary).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from jrobust import keys as _keys
from jrobust._algorithm import algorithm

Array = jax.Array


def _complex(x: Array) -> Array:
    return jax.lax.complex(x[..., 0], x[..., 1])


def _channels(z: Array) -> Array:
    return jnp.stack([z.real, z.imag], axis=-1)


@algorithm
class Fourier:
    """Undersampled Fourier measurements by several receivers, as in magnetic resonance imaging.

    ``A x = mask * FFT2(maps_c * x)`` for each receiver c, with the orthonormal transform. Where
    the squares of the maps add up to 1, no singular value is above 1.

    Args:
        mask: (H, W), 1 where a frequency is measured and 0 elsewhere; zero frequency at [0, 0].
        maps: (receivers, H, W, 2) complex sensitivities, channels last.
    """

    mask: Array
    maps: Array

    def forward(self, x: Array) -> Array:
        """Measurements (B, receivers, H, W, 2) of images (B, H, W, 2)."""
        seen = _complex(self.maps)[None] * _complex(x)[:, None]
        return _channels(self.mask[None, None] * jnp.fft.fft2(seen, norm="ortho"))

    def adjoint(self, y: Array) -> Array:
        """``A^H y``: (B, receivers, H, W, 2) -> (B, H, W, 2), of measurements the aliased image."""
        seen = jnp.fft.ifft2(self.mask[None, None] * _complex(y), norm="ortho")
        return _channels((jnp.conj(_complex(self.maps))[None] * seen).sum(axis=1))


def data_step(
    operator: Fourier, z: Array, aliased: Array, *, weight: Array | float = 1.0, tol: float = 1e-6
) -> Array:
    """The image that fits the measurements and is near ``z``: the data step of MoDL.

    ``argmin_x |A x - y|^2 + weight |x - z|^2``, the solution of ``(A^H A + weight) x = A^H y +
    weight z``, by conjugate gradients from ``z``, each example to its own tolerance. Derivatives
    are those of the exact solution, by one more solve.

    Args:
        operator: A.
        z: (B, H, W, 2).
        aliased: (B, H, W, 2), ``A^H y``.
        weight: > 0, scalar; lambda of Aggarwal et al. (2019).
        tol: the residual ends below this fraction of that of ``z``, in L2. 1e-6 is the limit of
            float32.

    Returns:
        (B, H, W, 2) float32.
    """

    def normal(x: Array) -> Array:
        return operator.adjoint(operator.forward(x[None]))[0]

    def solve(z: Array, aliased: Array) -> Array:
        # For the correction, which starts at zero: so does the solve of its derivative.
        correction, _ = cg(
            lambda x: normal(x) + weight * x, aliased - normal(z), tol=tol, maxiter=z.size
        )
        return z + correction

    return jax.vmap(solve)(z, aliased)


def smoothing_noise(
    keys: Array, shape: tuple[int, ...], samples: int = 10, sigma: Array | float = 0.01
) -> Array:
    """Gaussian noise for :func:`unroll`: (samples, B, *shape) float32, row b by ``keys[b]`` alone.

    Args:
        keys: (B,) typed keys, as ``jrobust.keys.examples(key, ids)`` makes them.
        shape: of one image.
        samples: noisy copies of each image.
        sigma: standard deviation, in the units of the images.
    """

    def draw(key: Array) -> Array:
        return sigma * jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(lambda i: jax.vmap(draw)(_keys.fold(keys, i)))(jnp.arange(samples))


def unroll(
    denoise: Callable[[Array], Array],
    operator: Fourier,
    aliased: Array,
    noise: Array | None = None,
    *,
    blocks: int = 8,
    weight: Array | float = 1.0,
    tol: float = 1e-6,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> tuple[Array, Array]:
    """Reconstruct by alternating a denoiser and :func:`data_step`: MoDL, or with noise SMUG.

    MoDL (Aggarwal et al. 2019), from ``x = aliased``, in every block: ``z = denoise(x)``, then
    ``x = data_step(z)``. SMUG (Li et al. 2023) smooths the denoiser inside of every block: z is the
    mean of ``denoise(clip(x + noise[i]))`` over the copies i, with the same noise in all blocks,
    and the data step stays exact. Training of SMUG compares each copy of each block with the truth,
    not only the result: that is what the second output is for.

    The blocks are one ``lax.scan``. On CPU differentiate inside of ``jax.jit(drive.rewrite(...))``,
    or convolutions in the backward pass are slow; ``drive.loop`` does it by itself.

    Args:
        denoise: (N, H, W, 2) -> (N, H, W, 2); rows independent. The same in all blocks.
        operator: the measurements.
        aliased: (B, H, W, 2), ``operator.adjoint(measurements)``.
        noise: (samples, B, H, W, 2), such as :func:`smoothing_noise`; None for MoDL.
        blocks: how often.
        weight: of the denoised image in the data step, > 0.
        tol: of the data step.
        limits: what noisy copies are clipped to; MoDL clips nothing.

    Returns:
        The reconstruction (B, H, W, 2), and what the denoiser gave, before the mean, (blocks,
        samples, B, H, W, 2), with one sample for MoDL.

    Raises:
        ValueError: shapes that do not fit, no block, ``weight`` not positive.
    """
    if aliased.ndim != 4 or aliased.shape[1:] != operator.maps.shape[1:]:
        raise ValueError(
            f"aliased must be (B, {', '.join(map(str, operator.maps.shape[1:]))}) as the "
            f"operator's maps are, got {aliased.shape}"
        )
    if noise is not None and noise.shape[1:] != aliased.shape:
        raise ValueError(
            f"noise must be (samples, {', '.join(map(str, aliased.shape))}), got {noise.shape}"
        )
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    if not isinstance(weight, jax.core.Tracer) and not weight > 0:
        raise ValueError(f"weight must be positive, or the data step has no solution, got {weight}")

    def block(x: Array, _: None) -> tuple[Array, Array]:
        copies = x[None] if noise is None else jnp.clip(x[None] + noise, *limits)
        outputs = denoise(copies.reshape(-1, *x.shape[1:])).reshape(copies.shape)
        return data_step(operator, outputs.mean(axis=0), aliased, weight=weight, tol=tol), outputs

    return jax.lax.scan(block, aliased, None, length=blocks)
