"""Binomial statements against closed forms and sixty-digit arithmetic."""

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from jrobust import statistics

# k, n, alpha, Clopper-Pearson lower bound, z = radius / sigma (None: abstain).
ORACLE = [
    (11, 11, 0.001, 0.5336699231, 0.0844984266),
    (100, 100, 0.001, 0.9332543008, 1.5004750241),
    (99, 100, 0.001, 0.9113731113, 1.3492590388),
    (66, 100, 0.001, 0.5016499513, 0.0041358265),
    (1000, 1000, 0.001, 0.9931160484, 2.4632626148),
    (990, 1000, 0.001, 0.9760361872, 1.9780095821),
    (10000, 10000, 0.001, 0.9993094630, 3.1985775147),
    (9900, 10000, 0.001, 0.9865311593, 2.2124196651),
    (100000, 100000, 0.001, 0.9999309248, 3.8114565634),
    (99999, 100000, 0.001, 0.9999076697, 3.7391266685),
    (99990, 100000, 0.001, 0.9997586773, 3.4902076801),
    (99900, 100000, 0.001, 0.9986509924, 3.0002009877),
    (99000, 100000, 0.001, 0.9889893404, 2.2899999552),
    (95000, 100000, 0.001, 0.9478348965, 1.6242137046),
    (90000, 100000, 0.001, 0.8970364962, 1.2648446903),
    (80000, 100000, 0.001, 0.7960660712, 0.8276515631),
    (60000, 100000, 0.001, 0.5952010473, 0.2409447922),
    (50500, 100000, 0.001, 0.5001089517, 0.0002731015),
    (50000, 100000, 0.001, 0.4951090429, None),
    (100000, 100000, 0.01, 0.9999539494, 3.9105104297),
    (100000, 100000, 0.0005, 0.9999239939, 3.7877588659),
    (1000000, 1000000, 0.001, 0.9999930923, 4.3467736987),
]

CONTEXT = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)


def pmf(n: int, p: float) -> np.ndarray:
    """Probabilities of 0 .. n successes."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def tail(k: int, n: int, p: Decimal) -> Decimal:
    """P(Binomial(n, p) >= k) in sixty digits, up to a remainder below 1e-40 of it."""
    with decimal.localcontext(CONTEXT):
        term = total = Decimal(math.comb(n, k)) * p**k * (1 - p) ** (n - k)
        odds = p / (1 - p)
        for i in range(k, n):
            term = term * (n - i) / (i + 1) * odds
            total += term
            if term < total * Decimal("1e-42"):
                break
        return total


def one_minus(q: float) -> Decimal:
    return CONTEXT.subtract(Decimal(1), Decimal(float(q)))


@pytest.mark.parametrize(("k", "n", "alpha", "p", "z"), ORACLE)
def test_lower_bound_oracle(k, n, alpha, p, z):
    lower = statistics.clopper_pearson_lower(k, n, alpha)
    assert isinstance(lower, np.float64)
    assert lower == pytest.approx(p, rel=1e-9)
    assert 1 - statistics.clopper_pearson_upper(n - k, n, alpha) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "n", "alpha"),
    [row[:3] for row in ORACLE if row[1] <= 100_000]
    # The library's inverse alone is too small by 8e-12 and 3e-12 of q at the first two.
    + [(999998, 10**6, 0.01), (999992, 10**6, 0.001), (99998, 100000, 0.05)]
    + [(9999, 10000, 1e-9), (495, 1000, 0.01), (1, 7, 0.3), (2, 2, 0.9)],
)
def test_bounds_round_outward_and_are_tight(k, n, alpha):
    exact = Decimal(alpha)
    lower = statistics.clopper_pearson_lower(k, n, alpha)
    assert tail(k, n, Decimal(float(lower))) <= exact
    assert tail(k, n, Decimal(float(lower * (1 + 1e-10)))) > exact
    q = statistics.clopper_pearson_upper(n - k, n, alpha)
    assert tail(k, n, one_minus(q)) <= exact
    assert tail(k, n, one_minus(q * (1 - 1e-10))) > exact


def test_bounds_at_the_ends():
    n = np.array([1, 2, 11, 1000, 10**6, 10**9])
    for alpha in (0.4, 1e-3, 1e-12):
        root = -np.expm1(np.log(alpha) / n)
        np.testing.assert_allclose(statistics.clopper_pearson_upper(0, n, alpha), root, rtol=3e-12)
        np.testing.assert_allclose(
            statistics.clopper_pearson_lower(n, n, alpha), alpha ** (1 / n), rtol=3e-12
        )
        assert np.all(statistics.clopper_pearson_lower(0, n, alpha) == 0)
        assert np.all(statistics.clopper_pearson_upper(n, n, alpha) == 1)


def test_coverage_is_exact():
    """Over every count, weighted by its probability, the bound errs with at most alpha.

    Just below each value that the bound can take, it errs with alpha exactly: a larger bound, such
    as a two-sided interval's or the point estimate, would fail.
    """
    n, alpha = 40, 0.05
    lower = statistics.clopper_pearson_lower(np.arange(n + 1), n, alpha)
    upper = statistics.clopper_pearson_upper(np.arange(n + 1), n, alpha)
    for p in np.concatenate([np.linspace(0.01, 0.99, 99), lower[1:] - 1e-9]):
        assert pmf(n, p) @ (lower > p) <= alpha * (1 + 1e-9)
    for p in np.concatenate([np.linspace(0.01, 0.99, 99), upper[:-1] + 1e-9]):
        assert pmf(n, p) @ (upper < p) <= alpha * (1 + 1e-9)
    for p in lower[1:] - 1e-9:
        assert pmf(n, p) @ (lower > p) == pytest.approx(alpha, rel=1e-6)
    for p in upper[:-1] + 1e-9:
        assert pmf(n, p) @ (upper < p) == pytest.approx(alpha, rel=1e-6)


def test_bounds_are_monotone_and_vectorised():
    k, n = np.arange(0, 201), 200
    for bound in (statistics.clopper_pearson_lower, statistics.clopper_pearson_upper):
        values = bound(k, n, 0.01)
        assert values.shape == k.shape
        assert values.dtype == np.float64
        assert np.all(np.diff(values) > 0)
        table = bound(k[:, None], n, np.array([0.01, 0.1]))
        assert table.shape == (201, 2)
        assert np.array_equal(table[:, 0], values)
        assert bound(7, 200, 0.01) == values[7]


def test_binomial_test_is_exact():
    for n in (1, 2, 9, 10, 64, 301):
        for k in range(n + 1):
            larger = max(k, n - k)
            exact = Fraction(2 * sum(math.comb(n, i) for i in range(larger, n + 1)), 2**n)
            assert statistics.binomial_test(k, n) == pytest.approx(
                float(min(exact, Fraction(1))), rel=1e-12
            )
    assert statistics.binomial_test(0, 0) == 1


def test_binomial_test_thresholds():
    """The smallest majorities that PREDICT accepts at alpha = 0.001; fewer than 11 votes never."""
    for k, n in ((67, 100), (553, 1000), (5166, 10000), (11, 11)):
        p = statistics.binomial_test([k, k - 1, n - k], [n, n, n])
        assert p[0] <= 0.001 < p[1]
        assert p[2] == p[0]
    assert np.all(statistics.binomial_test(np.arange(11), np.arange(11)) > 0.001)


def test_false_certificates():
    assert statistics.false_certificates(500, 0.001) == 3
    assert statistics.false_certificates(10_000, 0.001, 0.99) == 18
    for n, alpha, confidence in ((1, 0.3, 0.5), (30, 0.1, 0.9), (200, 0.05, 0.999), (9, 1e-9, 0.2)):
        m = statistics.false_certificates(n, alpha, confidence)
        cdf = np.cumsum(pmf(n, alpha))
        assert cdf[m] >= confidence
        assert m == 0 or cdf[m - 1] < confidence
    assert statistics.false_certificates([500, 10_000], 0.001).tolist() == [3, 18]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: statistics.clopper_pearson_lower(5, 4, 0.1), ValueError, "k = 5 of n = 4"),
        (lambda: statistics.clopper_pearson_upper([1, -1], 4, 0.1), ValueError, "k = -1 of n = 4"),
        (lambda: statistics.clopper_pearson_lower(0, 0, 0.1), ValueError, "n must be at least 1"),
        (lambda: statistics.clopper_pearson_lower(1, 4, 0.0), ValueError, "alpha must lie"),
        (lambda: statistics.clopper_pearson_upper(1, 4, 1.0), ValueError, "alpha must lie"),
        (lambda: statistics.clopper_pearson_upper(1, 4, math.nan), ValueError, "alpha must lie"),
        (lambda: statistics.clopper_pearson_lower(0.5, 4, 0.1), TypeError, "k .* must be integer"),
        (lambda: statistics.clopper_pearson_lower(1, 4.0, 0.1), TypeError, "n .* must be integer"),
        (lambda: statistics.binomial_test(True, 4), TypeError, "k .* must be integer"),
        (lambda: statistics.binomial_test(0, -1), ValueError, "n must be at least 0"),
        (lambda: statistics.false_certificates(0, 0.1), ValueError, "n must be at least 1"),
        (lambda: statistics.false_certificates(9, 0.1, 1.5), ValueError, "confidence must lie"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


# confidence_sequence


def test_confidence_sequence_closed_form():
    # Successes only: p^n = alpha / (n + 1).
    n = np.array([1, 2, 10, 1000, 100_000])
    lower, upper = statistics.confidence_sequence(n, n, 0.05)
    np.testing.assert_allclose(lower, (0.05 / (n + 1)) ** (1 / n), rtol=1e-12)
    assert np.all(lower <= (0.05 / (n + 1)) ** (1 / n))
    np.testing.assert_array_equal(upper, 1)
    mirrored = statistics.confidence_sequence(0, n, 0.05)
    np.testing.assert_allclose(mirrored[1], 1 - lower, rtol=1e-12)
    assert statistics.confidence_sequence(0, 0, 0.05) == (0.0, 1.0)
    # In general: the exact integral over the likelihood is 1 / alpha at both ends.
    k, n = np.array([3, 50, 999]), np.array([10, 120, 1000])
    for p in statistics.confidence_sequence(k, n, 0.01):
        for i, end in enumerate(p):
            like = [Fraction(float(end)), 1 - Fraction(float(end))]
            value = like[0] ** int(k[i]) * like[1] ** int(n[i] - k[i])
            mixture = Fraction(
                math.factorial(int(k[i])) * math.factorial(int(n[i] - k[i])),
                math.factorial(int(n[i]) + 1),
            )
            ratio = float(mixture / value)
            assert 100 <= ratio < 100 * (1 + 1e-8)


@pytest.mark.parametrize(
    ("k", "n"), [(1, 10**5), (99_900, 10**5), (7, 20), (10**7 - 20, 10**7), (10**9 - 500, 10**9)]
)
@pytest.mark.parametrize("alpha", [1e-3, 1e-12])
def test_confidence_sequence_is_rounded_outward_for_any_counts(k, n, alpha):
    """The likelihood ratio in sixty digits, at bounds below 1/2, whose digits tell."""
    for count in {k, n - k}:
        # Lower bounds stop at a part in 2^64 of k / n.
        for p, spare in zip(statistics.confidence_sequence(count, n, alpha), ("0.01", "1e-8")):
            if 0 < p < 0.5:
                with decimal.localcontext(CONTEXT):
                    like = count * Decimal(float(p)).ln()
                    like += (n - count) * (1 - Decimal(float(p))).ln()
                    ratio = like + (Decimal(math.comb(n, k)) * (n + 1)).ln() - Decimal(alpha).ln()
                assert -Decimal(spare) < ratio <= 0


def test_confidence_sequence_holds_at_all_times_at_once():
    rng = np.random.default_rng(3)
    runs, trials, alpha = 4000, 200, 0.1
    n = np.arange(1, trials + 1)
    counts = np.minimum(np.arange(trials + 1), n[:, None])  # every count that can occur
    lower, upper = statistics.confidence_sequence(counts, n[:, None], alpha)
    low = statistics.clopper_pearson_lower(counts, n[:, None], alpha / 2)
    high = statistics.clopper_pearson_upper(counts, n[:, None], alpha / 2)
    for p in (0.02, 0.5, 0.9):
        k = np.cumsum(rng.random((runs, trials)) < p, 1)
        at = n - 1, k
        missed = np.mean(np.any((p < lower[at]) | (p > upper[at]), 1))
        assert missed <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
        assert missed > alpha / 50  # not vacuous
        # Intervals for a fixed number of trials, looked at after each, are wrong far more often.
        assert np.mean(np.any((p < low[at]) | (p > high[at]), 1)) > 1.5 * alpha


@pytest.mark.parametrize(
    ("k", "n", "alpha", "error"),
    [(1.0, 2, 0.1, TypeError), (3, 2, 0.1, ValueError), (1, 2, 0.0, ValueError)],
)
def test_confidence_sequence_refuses(k, n, alpha, error):
    with pytest.raises(error):
        statistics.confidence_sequence(k, n, alpha)
