"""A binomial statement that holds at every moment of a growing sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jrobust.statistics._binomial import _counts, check_probability

# What rounding may move a logarithm of the likelihood ratio by: that of its parts, none of which is
# larger than 100, and of n p - k, the size of which counts where it is large.
_ROUNDING, _ROUNDING_OF_SIZE = 2.0**-43, 2.0**-50


def _stirling(m: np.ndarray) -> np.ndarray:
    """``log m!`` less Stirling's ``(m + 1/2) log m - m + log(2 pi) / 2``, m >= 1."""
    m = m.astype(float)
    series = np.polyval([1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12], m**-2.0) / m
    formula = (m + 0.5) * np.log(m) - m + 0.5 * np.log(2 * np.pi)
    return np.where(m < 16, special.gammaln(np.minimum(m, 16) + 1) - formula, series)


def _peak(k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Log of the probability of k successes of n at ``p = k / n``, where it is largest."""
    a, b, m = (np.maximum(count, 1) for count in (k, n - k, n))
    log = _stirling(m) - _stirling(a) - _stirling(b) + 0.5 * np.log(m / (2 * np.pi * a * b))
    return np.where((k == 0) | (k == n), 0.0, log)


def _change(count: np.ndarray, mean: np.ndarray, more: np.ndarray) -> np.ndarray:
    """``count log(mean / count)`` for ``mean = count + more``, 0 for no count."""
    least = np.maximum(count, 1)
    near = np.abs(more) < 0.5 * count
    return np.where(
        near, special.xlog1py(count, more * near / least), special.xlogy(count, mean / least)
    )


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
    # All relative to the likelihood's peak: of what is left nothing is large and cancels.
    level = np.log(alpha) - np.log(n + 1) - _peak(k, n)

    def outside(p: np.ndarray) -> np.ndarray:
        # n p - k, from the smaller one of p and 1 - p, both of which are exact.
        more = np.where(p <= 0.5, n * p - k, (n - k) - n * (1 - p))
        fall = _change(k, n * p, more) + _change(n - k, n * (1 - p), -more)
        return fall < level - _ROUNDING - _ROUNDING_OF_SIZE * np.abs(more)

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
