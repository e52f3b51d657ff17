"""Exact binomial statements in float64 on the host.

Nothing here runs on the device: JAX has no inverse incomplete beta function, and its float32
``betainc`` is ten per cent off at 99,999 successes of 100,000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

# Every bound is verified against the tail it inverts and then widened by this much, relative. The
# tail itself, compared with 60-digit arithmetic, moves a bound by less than 1e-14 for n <= 1e6.
_MARGIN = 2.0**-40


def _counts(k: ArrayLike, n: ArrayLike, smallest_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Validated counts, broadcast against each other, as int64."""
    arrays = []
    for name, value in (("k", k), ("n", n)):
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"{name} counts trials and must be integer, got dtype {array.dtype}; "
                "pass the counts themselves, not fractions"
            )
        arrays.append(array.astype(np.int64))
    k, n = np.broadcast_arrays(*arrays)
    if np.any(n < smallest_n):
        raise ValueError(f"n must be at least {smallest_n}, got {n.min()}")
    if np.any((k < 0) | (k > n)):
        bad = np.flatnonzero((k < 0) | (k > n))[0]
        raise ValueError(f"need 0 <= k <= n, got k = {k.flat[bad]} of n = {n.flat[bad]}")
    return k, n


def check_probability(name: str, value: ArrayLike) -> np.ndarray:
    """``value`` as float64; ``ValueError`` unless it lies strictly between 0 and 1."""
    array = np.asarray(value, np.float64)
    if not np.all((array > 0) & (array < 1)):
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {array}")
    return array


def outward(
    bound: np.ndarray, tail: Callable[[np.ndarray], np.ndarray], alpha: np.ndarray, sign: Any
) -> np.ndarray:
    """Move ``bound`` up (sign 1) or down (-1) until ``tail(bound) <= alpha``, and a little more.

    The library's inverse stops its iteration up to 1e-11 short of the root, on either side.
    """
    step = _MARGIN
    while np.any(bad := tail(bound) > alpha):
        bound = np.where(bad, np.clip(bound * (1 + sign * step), 0, 1), bound)
        step *= 2
    return np.clip(bound * (1 + sign * _MARGIN), 0, 1)


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """One-sided lower confidence bound on a success probability p (Clopper and Pearson, 1934).

    ``P(bound > p) <= alpha`` whatever p: the bound is the p at which k or more successes of n
    have probability alpha, I^-1(alpha; k, n - k + 1), rounded down. It is 0 for k = 0 and
    alpha^(1/n) for k = n. Near 1 use the complement, which has no cancellation:
    ``1 - clopper_pearson_lower(k, n, alpha)`` is ``clopper_pearson_upper(n - k, n, alpha)``.

    Args:
        k: successes, integer, 0 <= k <= n; any shape that broadcasts with the others.
        n: trials, integer, at least 1.
        alpha: probability of error, in (0, 1). One-sided: half of it is what a two-sided
            interval puts on each side.

    Returns:
        float64 of the broadcast shape, in [0, 1], at most one part in 10^10 below the exact value.

    Raises:
        TypeError: counts that are not integer.
        ValueError: n < 1, k outside [0, n], alpha outside (0, 1).
    """
    k, n = _counts(k, n, 1)
    alpha = check_probability("alpha", alpha)
    a, b = np.maximum(k, 1), n - k + 1
    bound = outward(
        special.betaincinv(a, b, alpha), lambda p: special.betainc(a, b, p), alpha, sign=-1
    )
    return np.where(k == 0, 0.0, bound)[()]


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """One-sided upper confidence bound on a success probability p (Clopper and Pearson, 1934).

    ``P(bound < p) <= alpha`` whatever p: the bound is the p at which k or fewer successes of n
    have probability alpha, I^-1(1 - alpha; k + 1, n - k), rounded up. It is computed in the upper
    tail, so that small bounds keep their relative accuracy: of n - k failures it is the q = 1 - p
    that certified radii need. It is 1 for k = n and 1 - alpha^(1/n) for k = 0.

    Arguments, shapes and errors are those of :func:`clopper_pearson_lower`.
    """
    k, n = _counts(k, n, 1)
    alpha = check_probability("alpha", alpha)
    a, b = k + 1, np.maximum(n - k, 1)
    bound = outward(
        special.betainccinv(a, b, alpha), lambda p: special.betaincc(a, b, p), alpha, sign=1
    )
    return np.where(k == n, 1.0, bound)[()]


def binomial_test(k: ArrayLike, n: ArrayLike) -> Any:
    """Exact two-sided p-value of k successes in n trials against probability 1/2.

    Twice the tail beyond the larger of k and n - k, at most 1; 1 for n = 0. This is the test of
    PREDICT (Cohen et al. 2019; Hung and Fithian 2019), with n the votes of the two top classes.

    Args:
        k: successes, integer, 0 <= k <= n; any shape that broadcasts with n.
        n: trials, integer, at least 0.

    Returns:
        float64 of the broadcast shape, in (0, 1].

    Raises:
        TypeError: counts that are not integer.
        ValueError: n < 0 or k outside [0, n].
    """
    k, n = _counts(k, n, 0)
    larger = np.maximum(np.maximum(k, n - k), 1)
    tail = special.betainc(larger, np.maximum(n, 1) - larger + 1, 0.5)
    return np.where(n == 0, 1.0, np.minimum(2 * tail, 1.0))[()]


def false_certificates(n_images: ArrayLike, alpha: ArrayLike, confidence: ArrayLike = 0.99) -> Any:
    """How many of ``n_images`` independent certificates are false, with this confidence.

    Each certificate is false with probability at most alpha, so that alpha * n_images are expected
    to be, and with probability ``confidence`` at most the binomial quantile returned here: the
    smallest m with ``P(Binomial(n_images, alpha) <= m) >= confidence``.

    Args:
        n_images: integer, at least 1; abstentions count, since which images abstain is random.
        alpha: probability that one certificate is false, in (0, 1).
        confidence: probability of the statement, in (0, 1).

    Returns:
        int64 of the broadcast shape.

    Raises:
        TypeError: ``n_images`` not integer.
        ValueError: ``n_images`` < 1, alpha or confidence outside (0, 1).
    """
    _, n = _counts(0, n_images, 1)
    alpha = check_probability("alpha", alpha)
    confidence = check_probability("confidence", confidence)
    # bdtrik is the quantile of the continuous extension; rounding may put it one too high.
    m = np.ceil(special.bdtrik(confidence, n, alpha))
    before = np.maximum(m - 1, 0)
    m = np.where(special.bdtr(before, n, alpha) >= confidence, before, m)
    return m.astype(np.int64)[()]
