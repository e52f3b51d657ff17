"""Random ablation: a few locations are kept, so that a few changed ones are seldom seen."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jrobust._algorithm import algorithm, static
from jrobust.smoothing._noise import check_size, probabilities

Array = jax.Array


@functools.lru_cache(maxsize=64)
def _seen(size: int, keep: int) -> np.ndarray:
    """Probability that r given locations are not all hidden, r = 0, 1, ..., rounded up."""
    r = np.arange(size - keep)
    hidden = np.cumprod((size - keep - r) / (size - r))
    # Two roundings for each factor of the product and one for each product.
    seen = 1 - hidden * (1 - (r + 2) * 2.0**-51) + 2.0**-52
    return np.concatenate([[0.0], seen])


@algorithm
class Masking:
    """Keep ``keep`` locations, a uniform subset, and hide the others; certifies in L0.

    Of inputs that differ in r locations, the ablated copies differ only if one of these is kept:
    with probability ``1 - C(size - r, keep) / C(size, keep)``. The radius is the largest r for
    which that is below ``(1 - q - runner) / 2`` (Levine and Feizi 2020). It may be 0: the answer at
    x itself is proved, and nothing else. The subset is drawn from 64-bit ranks; the probability
    that two are equal, less than ``size^2 / 2^65``, is charged to the bounds.

    Args:
        keep: locations that are kept, in 1 .. size - 1.
        size: locations of one input.
        fill: what hidden values become. Any finite number is sound; one outside of the inputs'
            range lets the model tell hidden from dark.
        pixels: whether a location is a pixel, all entries of the last axis (channels last), or
            every single value, as in :class:`jrobust.threat.L0`.
    """

    norm: ClassVar[str] = "L0"
    keep: int = static()
    size: int = static()
    fill: Array | float = 0.0
    pixels: bool = static(default=True)

    def check(self) -> None:
        """Raise ``ValueError`` unless ``0 < keep < size`` and ``fill`` is finite."""
        for name in ("keep", "size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int, got {value!r}")
        if not 0 < self.keep < self.size < 2**24:
            raise ValueError(f"need 0 < keep < size < 2^24, got keep={self.keep}, size={self.size}")
        if np.ndim(self.fill) != 0 or not np.isfinite(np.float32(self.fill)):
            raise ValueError(f"fill must be a finite number, got {self.fill}")

    def perturb(self, key: Array, x: Array) -> Array:
        """``x`` with all but ``keep`` locations filled; ``ValueError`` unless it has ``size``."""
        if self.pixels and x.ndim < 2:
            raise ValueError(
                f"an input of shape {x.shape} has no pixels: pass pixels=False to "
                f"{type(self).__name__}, so that every value is a location"
            )
        locations = x.shape[:-1] if self.pixels else x.shape
        check_size(self, self.size, math.prod(locations), "pixels" if self.pixels else "values")
        high, low = jax.random.bits(key, (2, self.size), jnp.uint32)
        ranked = jax.lax.sort((high, low), num_keys=2)
        last_high, last_low = (word[self.keep - 1] for word in ranked)
        kept = (high < last_high) | ((high == last_high) & (low <= last_low))
        kept = kept.reshape(locations + (1,) * (x.ndim - len(locations)))
        return jnp.where(kept, x, jnp.asarray(self.fill, x.dtype))

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """Locations that may change, a whole number in float64; -1 where nothing is proved.

        Args:
            q: upper bound on the probability of all other answers together, in [0, 1], any shape.
            runner: on each single one of them; by default q.
        """
        q, runner = probabilities(q, runner)
        margin = (1 - q - runner) / 2 - self.size**2 * 2.0**-65 - 2.0**-52
        return np.searchsorted(_seen(self.size, self.keep), margin).astype(np.float64)[()] - 1
