"""A binomial statement that holds at every moment of a growing sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jrobust.statistics._binomial import _counts, check_probability

# What rounding of the logarithms may add to their difference, relative to their size.
_ROUNDING = 2.0**-44


def confidence_sequence(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[Any, Any]:
    """Bounds on a success probability p that hold for all sample sizes at once (Robbins, 1970).

    ``P(lower <= p <= upper after 1, 2, 3, ... trials) >= 1 - alpha``, so that one may look after
    every trial and stop when one likes, which no interval for a fixed n allows. The bounds are
    the p at which the likelihood ratio ``int q^k (1 - q)^(n - k) dq / (p^k (1 - p)^(n - k))``, a
    martingale under p that starts at 1, reaches 1 / alpha (Ville's inequality); both are rounded
    outward. Their distance falls as sqrt(log(n) / n).

    Args:
        k: successes, integer, 0 <= k <= n; any shape that broadcasts with the others.
        n: trials so far, integer, at least 0.
        alpha: probability of error over the whole run, in (0, 1), for both sides together.

    Returns:
        (lower, upper), float64 of the broadcast shape, in [0, 1].

    Raises:
        TypeError: counts that are not integer.
        ValueError: n < 0, k outside [0, n], alpha outside (0, 1).
    """
    k, n = _counts(k, n, 0)
    alpha = check_probability("alpha", alpha)
    k, n, alpha = np.broadcast_arrays(k, n, alpha)
    level = np.log(alpha) + special.betaln(k + 1, n - k + 1)
    level = level - _ROUNDING * (1 + np.abs(level))

    def outside(p: np.ndarray) -> np.ndarray:
        value = special.xlogy(k, p) + special.xlog1py(n - k, -p)
        return value * (1 - _ROUNDING) < level  # value <= 0

    peak = k / np.maximum(n, 1)
    bounds = []
    for end in (0.0, 1.0):
        beyond, within = np.full(peak.shape, end), peak.astype(float)
        done = ~outside(beyond)  # k = 0 or n: the end itself is possible
        for _ in range(64):
            middle = (beyond + within) / 2
            out = outside(middle)
            beyond, within = np.where(out, middle, beyond), np.where(out, within, middle)
        bounds.append(np.where(done, end, beyond)[()])
    return bounds[0], bounds[1]
