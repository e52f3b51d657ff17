"""Smoothing noises: what is drawn on the device, and the radius that its bound proves."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jrobust._algorithm import algorithm

Array = jax.Array


class Noise(Protocol):
    """What ``count_votes`` and ``certify`` need of a noise.

    ``norm`` names the norm of the radius; ``radius`` must not increase with q, must not be positive
    from q = 1/2 on, and must round down.
    """

    norm: ClassVar[str]

    def check(self) -> None:
        """Raise ``ValueError`` for parameters that prove nothing."""

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """One float32 draw of the noise of ``shape``."""
        ...

    def radius(self, q: ArrayLike) -> np.ndarray:
        """Radius proved by an upper bound q on the probability of every other answer."""
        ...


def check_dtype(dtype: Any) -> None:
    """Raise ``ValueError`` unless noise of ``dtype`` supports a certificate."""
    if jnp.dtype(dtype) != jnp.float32:
        raise ValueError(
            f"smoothing noise must be float32, got {jnp.dtype(dtype)}: half-precision normal draws "
            "take only 128 (bfloat16) or 1,024 (float16) distinct values and never exceed 3.5 "
            "sigma, which voids the certificate. Draw and add in float32; let the model cast."
        )


@algorithm
class Gaussian:
    """Isotropic Gaussian noise N(0, sigma^2 I), certifying in L2 (Cohen et al. 2019, Theorem 1).

    If the smoothed classifier answers anything but c with probability at most q < 1/2 at x, it
    answers c everywhere within ``-sigma * Phi^-1(q)`` of x.

    Args:
        sigma: standard deviation, in the units of x; a scalar, and the same for the whole ball: a
            sigma that depends on the input voids the theorem.
    """

    norm: ClassVar[str] = "L2"
    sigma: Array | float

    def check(self) -> None:
        """Raise ``ValueError`` unless sigma is one positive, finite float32 number."""
        sigma = np.asarray(self.sigma, np.float64)
        if sigma.shape != ():
            raise ValueError(
                f"sigma must be a scalar, got shape {sigma.shape}; "
                "certify images of different sigma in separate calls"
            )
        limits = np.finfo(np.float32)
        if not limits.tiny <= sigma <= limits.max:
            raise ValueError(f"sigma must be positive and finite in float32, got {self.sigma}")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """One draw: float32 of ``shape``.

        ``jax.random.normal`` in float32 has 2^23 levels within about [-5.4, 5.2] sigma; the
        certificate takes them for a normal variable.

        Raises:
            ValueError: any ``dtype`` but float32.
        """
        check_dtype(dtype)
        return jnp.asarray(self.sigma, dtype) * jax.random.normal(key, shape, dtype)

    def radius(self, q: ArrayLike) -> np.ndarray:
        """``-sigma * Phi^-1(q)`` in float64, rounded down; negative where q > 1/2.

        q is the upper bound on the probability of every answer but the top one, not 1 minus a
        lower bound: the complement cancels near 1. sigma is the float32 number that was drawn with.

        Args:
            q: probabilities in [0, 1], any shape.

        Returns:
            float64 of that shape, in the units of sigma; infinite for q = 0 and q = 1.
        """
        q = np.asarray(q, np.float64)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"q must be a probability in [0, 1], got {q}")
        z = -special.ndtri(q)
        # ndtri was measured within 1e-15 (1 + |z|) of 60-digit values for q in [1e-18, 0.98]; the
        # outer step covers the product. Exact infinities stay as they are.
        with np.errstate(invalid="ignore"):
            low = np.nextafter(
                np.float64(np.float32(self.sigma)) * (z - 4e-15 * (1 + np.abs(z))), -np.inf
            )
        return np.where(np.isinf(z), z, low)[()]
