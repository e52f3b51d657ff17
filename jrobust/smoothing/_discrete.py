"""Smoothing that is sound in floating point: whole numbers, from whole random numbers."""

from __future__ import annotations

import decimal
import functools
import itertools
import math
from decimal import Decimal
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jrobust._algorithm import algorithm, static
from jrobust.smoothing._noise import check_size, probabilities, round_down

Array = jax.Array

_BITS = 64
_REACH = Decimal("9.3")  # standard deviations: less than 2^-65 lies beyond on both sides together
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def _cdf(z: Decimal) -> Decimal:
    """Phi(z) for z >= 0 by the series of positive terms, to thirty digits."""
    term = total = z
    i = 1
    while term > total * Decimal("1e-35"):
        i += 2
        term *= z * z / i
        total += term
    return Decimal("0.5") + total * (-z * z / 2).exp() / (2 * _PI).sqrt()


def _reach(sigma: float, levels: int) -> int:
    """The largest whole number that is drawn."""
    return math.ceil(_REACH * Decimal(sigma) * levels)


def _masses(sigma: float, levels: int) -> list[int]:
    """``2^64 P(D = k)`` for k = -reach .. reach, rounded to whole numbers whose sum is 2^64."""
    with decimal.localcontext(decimal.Context(prec=50)):
        s, one = Decimal(sigma) * levels, Decimal(2) ** _BITS
        # 2^64 P(D <= k), of which the others follow by symmetry.
        upper = [
            int((_cdf((2 * k + 1) / (2 * s)) * one).to_integral_value())
            for k in range(_reach(sigma, levels))
        ]
    below = [0, *(2**_BITS - t for t in reversed(upper)), *upper, 2**_BITS]
    return [b - a for a, b in itertools.pairwise(below)]


@functools.lru_cache(maxsize=16)
def _cells(sigma: float, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The masses in 2^b cells of equal mass (Walker 1977; Vose 1991), in exact whole numbers.

    Cell j holds outcome j up to ``kept[j]`` of its ``2^(64 - b)`` and outcome ``other[j]`` above:
    uint64 and int32, (2^b,) each.
    """
    left = _masses(sigma, levels)
    cells = 2 ** (len(left) - 1).bit_length()
    full = 2**_BITS // cells
    left += [0] * (cells - len(left))
    kept, other = [full] * cells, list(range(cells))
    small = [j for j in range(cells) if left[j] < full]
    large = [j for j in range(cells) if left[j] > full]
    while small:
        j = small.pop()
        kept[j], other[j] = left[j], large[-1]
        left[large[-1]] -= full - left[j]
        if left[large[-1]] <= full:
            done = large.pop()
            if left[done] < full:
                small.append(done)
    return np.array(kept, np.uint64), np.array(other, np.int32)


@algorithm
class DiscreteGaussian:
    """Gaussian noise rounded to a grid, for inputs on that grid (Voracek and Hein 2023).

    Floating-point noise is not Gaussian and its sum with x is rounded, so that a certificate of
    real arithmetic can be false. Here everything before the model is whole numbers. Inputs are
    ``k / levels`` with whole k, as 8-bit images are. The noise is a whole number D, by comparing 64
    random bits with multiples of 2^-64, and the model sees ``(k + D) / levels``, in float32 still a
    function of ``k + D``.

    The statement: let ``round`` be to the nearest grid point, G be N(0, sigma^2 I). As
    ``round(x + G) = x + round(G)`` for x on the grid, the classifier smoothed with D is, *at grid
    points*, the classifier ``f(round(.))`` smoothed with G, whose certificate is the Gaussian's.
    It holds for every input on the grid within the radius, and says nothing about others. What
    the sampler differs from D by, at most ``size (2 reach + 4) / 2^64`` in total variation, is
    added to both bounds. There remain the pseudo-random bits.

    Inputs further than 1/256 of a step from the grid are rejected (not a number).

    Args:
        sigma: standard deviation in the units of x, a Python number: the tables are made for it.
        size: values in one input.
        levels: grid points in a unit.
    """

    norm: ClassVar[str] = "L2"
    sigma: float = static()
    size: int = static()
    levels: int = static(default=255)

    def check(self) -> None:
        """Raise ``ValueError`` unless all three are positive and the grid is not absurdly fine."""
        for name in ("size", "levels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**24:
                raise ValueError(f"{name} must be an int in [1, 2^24), got {value!r}")
        if not isinstance(self.sigma, (int, float)) or not 0 < self.sigma < math.inf:
            raise ValueError(
                f"sigma must be a positive, finite Python number, got {self.sigma!r}: the noise's "
                "probabilities are computed from it before anything is traced"
            )
        if self.levels > 2**16 or self.sigma * self.levels > 2**13:
            raise ValueError(
                f"sigma * levels = {self.sigma * self.levels:g} is above 8192, or levels = "
                f"{self.levels} above 65536: the grid is too fine"
            )

    def draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        """One draw of the noise in grid steps: int32 of ``shape``."""
        kept, other = _cells(float(self.sigma), self.levels)
        shift = 33 - len(kept).bit_length()  # the cell is the highest bits of the high word
        bound_high = jnp.asarray((kept >> np.uint64(32)).astype(np.uint32))
        bound_low = jnp.asarray(kept.astype(np.uint32))
        high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
        cell = (high >> shift).astype(jnp.int32)
        high, most, least = high & jnp.uint32(2**shift - 1), bound_high[cell], bound_low[cell]
        own = (high < most) | ((high == most) & (low < least))
        outcome = jnp.where(own, cell, jnp.asarray(other)[cell])
        return outcome - _reach(float(self.sigma), self.levels)

    def perturb(self, key: Array, x: Array) -> Array:
        """``(k + D) / levels`` in float32, not a number where x is not on the grid."""
        # Times the reciprocal: compilers may do that to a division, or not.
        check_size(self, self.size, x.size)
        steps = x * self.levels
        k = jnp.round(steps)
        on_grid = (jnp.abs(steps - k) <= 2.0**-8) & (jnp.abs(k) < 2**20)
        noisy = k.astype(jnp.int32) + self.draw(key, x.shape)
        return jnp.where(on_grid, noisy.astype(jnp.float32) * np.float32(1 / self.levels), jnp.nan)

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """The Gaussian's at the bounds plus what the sampler may differ by, rounded down.

        Args:
            q: upper bound on the probability of all other answers together, in [0, 1], any shape.
            runner: on each single one of them; by default q.
        """
        off = self.size * (2 * _reach(float(self.sigma), self.levels) + 4) * 2.0**-_BITS
        bounds = (np.minimum(bound + off, 1.0) for bound in probabilities(q, runner))
        return round_down(self.sigma, *(-special.ndtri(bound) for bound in bounds))
