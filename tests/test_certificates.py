"""Certificates beyond one bound from n votes: two bounds, top-k, stages, sequences, fast voters."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jrobust import smoothing, statistics
from jrobust.smoothing import Gaussian, Masking

NOISE = Gaussian(1.0)
ALPHA = 0.05
RUNS = 2000
LIMIT = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


def upper(k, n, alpha):
    return stats.beta.isf(alpha, k + 1, n - k)


def z(p):
    return stats.norm.isf(p)


# Two bounds


@pytest.mark.parametrize(("k", "runner"), [(45_000, 20_000), (80_000, 5_000), (99_000, 600)])
def test_two_bounds_by_hand(k, runner):
    """From scipy's quantiles, with ten classes; the gains are those of the reference tables."""
    n, alpha, classes = 100_000, 0.001, 10
    others = np.full(classes - 2, (n - k - runner) // (classes - 2))
    counts = np.array([[k, runner, *others, 0]])
    counts[0, -1] = n - counts.sum()
    one = smoothing.certify([0], counts, NOISE, alpha)
    two = smoothing.certify([0], counts, NOISE, alpha, two_bounds=True)
    a = upper(n - k, n, alpha / 2)
    b = min(a, upper(runner, n, alpha / 2 / classes))
    assert two.radius[0] == pytest.approx((z(a) + z(b)) / 2, rel=1e-9)
    gain = two.radius[0] - one.radius[0]
    assert gain == pytest.approx({45_000: 0.34, 80_000: 0.39, 99_000: 0.08}[k], abs=0.01)
    assert (one.prediction[0] == -1) == (k == 45_000)
    assert two.prediction[0] == 0


def test_rejects_are_a_rival_of_two_bounds():
    counts = np.array([[450, 200, 150, 200], [450, 0, 0, 550]])
    result = smoothing.certify([0, 0], counts, NOISE, 0.001, two_bounds=True)
    assert result.prediction.tolist() == [0, -1]
    assert result.rejects.tolist() == [200, 550]


def test_where_no_other_answer_came_up_one_bound_at_half_alpha_is_the_same():
    counts = np.array([[100, 0, 0, 0]])
    two = smoothing.certify([0], counts, NOISE, 0.01, two_bounds=True).radius
    assert two == smoothing.certify([0], counts, NOISE, 0.005).radius


def test_coverage_of_two_bounds_without_a_majority():
    """A half-space for each of two classes, and between them six others that share the votes.

    The two are equally likely in the middle, at 0, which is what the rule says: it is attained.
    """
    rng = np.random.default_rng(0)
    sigma = 1.6
    x = rng.uniform(-2.5, 2.5, RUNS)
    left, right = special.ndtr((-1 - x) / sigma), special.ndtr((x - 1) / sigma)
    p = np.column_stack([left, right, np.tile((1 - left - right) / 6, (6, 1)).T])
    assert np.all(p.argmax(1) == (x > 0))
    select, estimate = (np.stack([rng.multinomial(n, row) for row in p]) for n in (50, 2000))
    none = np.zeros((RUNS, 1), int)
    select, estimate = np.hstack([select, none]), np.hstack([estimate, none])
    noise = Gaussian(sigma)
    result = smoothing.certify(select, estimate, noise, ALPHA, two_bounds=True)
    minority = p.max(1) < 0.45
    one = smoothing.certify(select, estimate, noise, ALPHA)
    assert np.all(one.prediction[minority] == -1)
    assert np.mean(result.prediction[minority] >= 0) > 0.4
    wrong = result.prediction != (x > 0)
    false = (result.prediction >= 0) & (wrong | (result.radius > np.abs(x)))
    assert false.mean() <= LIMIT
    # The point estimates in place of the bounds would not pass.
    top, second = np.sort(estimate, 1)[:, :-3:-1].T / 2000
    assert np.mean(noise.radius(1 - top, second) > np.abs(x)) > 4 * LIMIT


# Top-k


def test_top_k_by_hand():
    n, alpha = 1000, 0.001
    counts = np.array([[330, 290, 150, 130, 100, 0]])
    one = [smoothing.certify([0], counts, NOISE, alpha, top=k) for k in (1, 2, 3)]
    two = [smoothing.certify([0], counts, NOISE, alpha, top=k, two_bounds=True) for k in (1, 2, 3)]
    q, q2 = upper(670, n, alpha), upper(670, n, alpha / 2)
    rivals = [upper(k, n, alpha / 2 / 5) for k in (290, 150, 130)]
    for k in (1, 2, 3):
        expected = (z(q) + z(q / k)) / 2
        assert (one[k - 1].prediction[0] == 0) == (expected > 0)
        assert one[k - 1].radius[0] == pytest.approx(max(expected, 0), rel=1e-9)
        expected = (z(q2) + z(min(q2 / k, rivals[k - 1]))) / 2
        assert two[k - 1].radius[0] == pytest.approx(max(expected, 0), rel=1e-9, abs=1e-12)
    assert [c.prediction[0] for c in one] == [-1, -1, 0]
    assert [c.prediction[0] for c in two] == [-1, 0, 0]
    assert one[2].top == 3
    # Five votes prove no majority at this alpha, but that no four others can all be ahead.
    few = np.array([[5, 0, 0, 0, 0, 0]])
    assert smoothing.certify([0], few, NOISE, alpha, top=4).prediction[0] == 0
    with pytest.raises(ValueError, match="n = 5 samples can never certify"):
        smoothing.certify([0], few, NOISE, alpha)


def test_top_k_holds_against_the_worst_shift():
    """A Gaussian's answers moved straight towards k rivals at once: the class is still in front.

    The strongest that a move of length r can do is Phi(Phi^-1(p) + r) for the rivals together and
    Phi(Phi^-1(p) - r) for the class; k of them are ahead of it only if each has more.
    """
    for k in (2, 3, 4):
        for p in (0.3, 0.45, 0.6, 0.9):
            r = float(NOISE.radius(1 - p, (1 - p) / k))
            if r <= 0:
                continue
            # Shared equally among k rivals, what is each one's most and the class' least.
            rival = special.ndtr(special.ndtri((1 - p) / k) + r)
            assert special.ndtr(special.ndtri(p) - r) >= rival - 1e-12
    assert smoothing.ceiling(NOISE, 1000, 0.001, top=3) > smoothing.ceiling(NOISE, 1000, 0.001)


# Anytime


def test_anytime_is_the_confidence_sequence():
    counts = np.array([[990, 10, 0], [1000, 0, 0]])
    result = smoothing.certify([0, 0], counts, NOISE, 0.001, anytime=True)
    q = statistics.confidence_sequence([10, 0], 1000, 0.001)[1]
    np.testing.assert_allclose(result.radius, z(q), rtol=1e-9)
    closed = z(-math.expm1((math.log(0.001) - math.log(1001)) / 1000))
    assert result.radius[1] == pytest.approx(closed, rel=1e-9)
    ceiling = smoothing.ceiling(NOISE, 1000, 0.001, anytime=True)
    assert result.radius[1] <= ceiling == pytest.approx(closed, rel=1e-12)
    fixed = smoothing.certify([0, 0], counts, NOISE, 0.001)
    assert np.all(result.radius < fixed.radius)
    assert np.all(result.p_lower < fixed.p_lower)


def test_stopping_at_the_best_moment():
    """Of 40 looks the largest radius: sequences allow it, bounds for a fixed n do not."""
    rng = np.random.default_rng(1)
    p = 0.75
    looks = np.cumsum(rng.binomial(25, p, (RUNS, 40)), 1)
    n = 25 * np.arange(1, 41)
    best = {}
    for anytime in (True, False):
        radius = np.stack(
            [
                smoothing.certify(
                    np.zeros(RUNS, int),
                    np.stack([k, m - k, 0 * k], 1),
                    NOISE,
                    ALPHA,
                    anytime=anytime,
                ).radius
                for k, m in zip(looks.T, n)
            ],
            1,
        ).max(1)
        best[anytime] = np.mean(radius > z(1 - p))
    assert 0.001 < best[True] <= LIMIT
    assert best[False] > 1.5 * LIMIT


# Stages


def test_small_integers_add_up_over_stages():
    """Votes in uint8, as a log holds them, are not added up in it."""
    votes = np.array([[0, 200, 0]], np.uint8)
    made = smoothing.certify_staged([1], lambda *_: votes, NOISE, 0.01, stages=(200, 400, 600))
    assert made.n.tolist() == made.count.tolist() == [600]


class Votes:
    """Binomial votes of inputs with known p, drawn in advance so that prefixes are prefixes."""

    def __init__(self, p, n, seed=2):
        self.drawn = np.random.default_rng(seed).random((len(p), n)) < p[:, None]
        self.cast = 0

    def __call__(self, rows, start, n):
        self.cast += len(rows) * n
        assert np.all(np.diff(rows) > 0)
        k = self.drawn[rows, start : start + n].sum(1)
        return np.stack([k, n - k, 0 * k], 1)


STAGES = (50, 200, 1000)
CLASSES = np.zeros(RUNS, int)


@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize("radius", [None, 0.5])
def test_coverage_of_staged_certificates(radius, anytime):
    p = special.ndtr(np.random.default_rng(5).uniform(-0.5, 1.5, RUNS))
    votes = Votes(p, STAGES[-1])
    result = smoothing.certify_staged(
        CLASSES, votes, NOISE, ALPHA, stages=STAGES, radius=radius, anytime=anytime
    )
    false = (result.prediction >= 0) & (result.radius > special.ndtri(p))
    assert false.mean() <= LIMIT
    cast = votes.cast
    every = votes(np.arange(RUNS), 0, STAGES[-1])
    full = smoothing.certify(
        CLASSES, every, NOISE, ALPHA if anytime else ALPHA / 3, anytime=anytime
    )
    goal = 0.5 if radius else 1e-12
    reached, possible = result.radius >= goal, full.radius >= goal
    assert np.sum(possible & ~reached) <= 0.02 * RUNS
    if radius is None:
        # A superset of the last stage's proofs, wherever it got there.
        went = result.n == STAGES[-1]
        assert np.all(result.radius[went] >= full.radius[went])
    else:
        assert cast < 0.6 * RUNS * STAGES[-1]
    assert result.alpha == ALPHA
    assert set(np.unique(result.n)) <= set(STAGES)


def test_stages_ask_for_fresh_votes_of_open_inputs_only():
    p = np.array([0.999, 0.7, 0.3])
    asked = []
    inner = Votes(p, 1000)

    def vote(rows, start, n):
        asked.append((rows.tolist(), start, n))
        return inner(rows, start, n)

    result = smoothing.certify_staged(
        [0, 0, 0], vote, NOISE, 0.01, stages=(100, 400, 1000), radius=0.4
    )
    assert asked[0] == ([0, 1, 2], 0, 100)
    assert asked[1] == ([1], 100, 300), "the first is certified, the third will never be"
    assert asked[2] == ([1], 400, 600)
    assert result.prediction.tolist() == [0, 0, -1]
    assert result.radius[0] >= 0.4
    by_hand = smoothing.certify([0], inner(np.array([1]), 0, 1000), NOISE, 0.01 / 3)
    assert result.radius[1] == by_hand.radius[0]
    assert result.n[0] == 100


def test_many_stages_err_no_more_than_few():
    """The best of twenty bounds is false with probability alpha at most, not 20 times."""
    p, stages = np.full(RUNS, 0.8), tuple(range(50, 1001, 50))
    result = smoothing.certify_staged(CLASSES, Votes(p, 1000), NOISE, ALPHA, stages=stages)
    assert np.mean(result.radius > special.ndtri(p)) <= LIMIT
    assert np.mean(result.n < 1000) > 0.1, "the best is often not the last"


# A fast voter


def joint(rng, p_voter, wrong, n, images):
    """Counts of the voter's c, and of pairs in which only the voter says c."""
    votes = rng.binomial(n, p_voter, images)
    pairs = rng.binomial(n, wrong, images)
    none = np.zeros(images, int)
    return (
        np.stack([votes, n - votes, none], 1),
        np.stack([pairs, none, n - pairs], 1),
    )


def test_fast_voter_by_hand():
    estimate = np.array([[9_900, 100, 0]])
    pairs = np.array([[3, 40, 1957]])  # 40 the other way round do not matter
    result = smoothing.certify([0], estimate, NOISE, 0.001, disagreements=pairs)
    q = upper(100, 10_000, 0.0005) + upper(3, 2_000, 0.0005)
    assert result.radius[0] == pytest.approx(z(q), rel=1e-9)
    assert result.p_lower[0] == pytest.approx(1 - q, rel=1e-9)
    worse = smoothing.certify([0], estimate, NOISE, 0.001, disagreements=[[1500, 0, 500]])
    assert worse.prediction.tolist() == [-1]


@pytest.mark.parametrize("p_voter", [0.6, 0.9, 0.99])
def test_coverage_of_fast_votes(p_voter):
    """The exact model's p is the voter's minus the disagreement, at worst: certificates hold."""
    wrong = 0.05
    estimate, pairs = joint(np.random.default_rng(7), p_voter, wrong, 1000, RUNS)
    truth = special.ndtri(p_voter - wrong)
    result = smoothing.certify(CLASSES, estimate, NOISE, ALPHA, disagreements=pairs)
    false = np.mean((result.prediction >= 0) & (result.radius > truth))
    assert false <= LIMIT
    assert result.radius.max() > truth - 0.2
    # Certificates that take the voter for the model are false.
    trusting = smoothing.certify(CLASSES, estimate, NOISE, ALPHA)
    assert np.mean(trusting.radius > truth) > 0.5


W = jnp.array([1.0, -2.0, 0.5])


def exact(x):
    s = x @ W
    return jnp.stack([-s, s], 1)


def fast(x):
    """Its weights, products and input are bfloat16, and its threshold is elsewhere."""
    s = (x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)) + jnp.bfloat16(0.1)
    return jnp.stack([-s, s], 1)


def test_coverage_of_a_bfloat16_voter(key):
    """Certificates of the float32 half-space from the votes of another, on the device."""
    images, n, noise = 200, 300, Gaussian(0.5)
    margins = np.random.default_rng(0).uniform(-0.6, 0.6, images)
    x = jnp.asarray(margins[:, None] * np.asarray(W) / np.linalg.norm(W), jnp.float32)

    @jax.jit
    def count(key, x):
        stages = smoothing.stages(key)
        return (
            smoothing.count_votes(stages.select, fast, x, noise, n),
            smoothing.count_votes(stages.estimate, fast, x, noise, n),
            smoothing.count_disagreements(stages.estimate, exact, fast, x, noise, n),
        )

    select, estimate, pairs = count(key, x)
    assert pairs.dtype == jnp.int32
    assert np.all(pairs.sum(1) == n)
    assert pairs[:, 1].mean() > 0.02 * n, "the voter's threshold is lower"
    result = smoothing.certify(select, estimate, noise, ALPHA, disagreements=pairs)
    false = (result.prediction >= 0) & (
        (result.prediction != (margins > 0)) | (result.radius > np.abs(margins))
    )
    assert np.mean(result.prediction >= 0) > 0.4
    assert false.mean() <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / images)


def test_disagreements_are_counted_on_the_votes_own_samples(key):
    """Column c: votes of the voter for c less those that the model also casts, sample by sample."""
    x, noise, n = jnp.array([[0.1, 0.0, 0.2], [-0.3, 0.1, 0.0]]), Gaussian(0.5), 40

    def bad(v):
        return jnp.where(v[:, :1] > 0.5, jnp.nan, exact(v))

    found = smoothing.count_disagreements(key, bad, fast, x, noise, n, start=3, chunk=7)
    expected = np.zeros((2, 3), int)
    for i in range(2):
        image = jax.random.fold_in(key, i)
        keys = [jax.random.fold_in(image, j) for j in range(3, 3 + n)]
        v = jax.vmap(noise.perturb, (0, None))(jnp.stack(keys), x[i])
        said, meant = np.asarray(fast(v)).argmax(1), np.asarray(bad(v))
        same = np.isfinite(meant).all(1) & (meant.argmax(1) == said)
        np.add.at(expected[i], np.where(same, 2, said), 1)
    np.testing.assert_array_equal(found, expected)
    assert np.all(expected[:, :2] > 0)
    same = smoothing.count_disagreements(key, fast, fast, x, noise, n)
    assert same.tolist() == [[0, 0, n]] * 2
    # What the voter rejects is no vote, and disagrees with nobody.
    silent = smoothing.count_disagreements(key, exact, lambda v: 0 * exact(v) / 0, x, noise, n)
    assert silent.tolist() == [[0, 0, n]] * 2
    with pytest.raises(ValueError, match="2 classes but voter 3"):
        smoothing.count_disagreements(key, exact, lambda v: v, x, noise, n)


# The plan


def test_plan_of_the_published_run():
    plan = smoothing.plan(Gaussian(0.5), 100_000, 0.001, images=500, votes_per_second=1e6)
    assert plan.ceiling == pytest.approx(1.9057282817, rel=1e-9)
    assert (plan.least, plan.n, plan.false, plan.norm) == (50_490, 100_000, 3, "L2")
    assert plan.votes == 5.005e7
    assert plan.seconds == pytest.approx(50.05)
    assert plan.average_radius is None
    text = str(plan)
    assert "radius at most 1.906" in text
    assert "50490 of 100000 votes" in text
    for n, least in ((100, 66), (1000, 550), (10_000, 5156)):
        assert smoothing.plan(NOISE, n, 0.001).least == least


def test_plan_of_stages_and_voters():
    p = special.ndtr(np.random.default_rng(1).normal(1.0, 1.0, 300))
    stages = (100, 1_000, 10_000)
    plan = smoothing.plan(NOISE, stages, 0.001, n0=0, images=1000, radius=0.5, p=p)
    result = smoothing.certify_staged(
        np.zeros(300, int), Votes(p, 10_000), NOISE, 0.001, stages=stages, radius=0.5
    )
    assert 0.05 * 1e7 < plan.votes < 0.6 * 1e7
    assert plan.average_radius == pytest.approx(result.radius.mean(), rel=0.2)
    assert plan.ceiling == pytest.approx(smoothing.ceiling(NOISE, 10_000, 0.001 / 3))
    pairs = smoothing.plan(
        NOISE, 10_000, 0.001, n0=0, pairs=1000, votes_per_second=1e4, pairs_per_second=1e3
    )
    q = 2 - 0.0005 ** (1 / 10_000) - 0.0005 ** (1 / 1000)
    assert pairs.ceiling == pytest.approx(z(q), rel=1e-9)
    assert pairs.seconds == pytest.approx(2.0)
    best = smoothing.certify(
        [0], [[10_000, 0, 0]], NOISE, 0.001, disagreements=np.array([[0, 0, 1000]])
    )
    assert best.radius[0] <= pairs.ceiling
    assert best.radius[0] == pytest.approx(pairs.ceiling, rel=1e-9)
    k = pairs.least
    for votes, answer in ((k, 0), (k - 1, -1)):
        counts = np.array([[votes, 10_000 - votes, 0]])
        made = smoothing.certify([0], counts, NOISE, 0.001, disagreements=[[0, 0, 1000]])
        assert made.prediction.tolist() == [answer]
    assert smoothing.plan(Masking(10, 100), 1000, 0.001).norm == "L0"


@pytest.mark.parametrize(("top", "two_bounds"), [(1, True), (2, False), (2, True)])
def test_plan_of_other_rules(top, two_bounds):
    """Ceiling, votes that are needed and samples: what certify says of the same counts."""
    how, n, classes, alpha = {"top": top, "two_bounds": two_bounds}, 1000, 5, 0.01
    plan = smoothing.plan(NOISE, n, alpha, classes=classes, **how)
    q = 1 - (alpha / 2 if two_bounds else alpha) ** (1 / n)
    assert plan.ceiling == pytest.approx((z(q) + z(q / top)) / 2, rel=1e-9)
    assert plan.ceiling == smoothing.ceiling(NOISE, n, alpha, **how)
    best = smoothing.certify([0], [[n, 0, 0, 0, 0, 0]], NOISE, alpha, **how).radius[0]
    assert plan.ceiling * (1 - 1e-9) < best <= plan.ceiling
    for count, answer in ((plan.least, 0), (plan.least - 1, -1)):
        rest = [(n - count) // 5 + (i < (n - count) % 5) for i in range(5)]
        made = smoothing.certify([0], [[count, *rest]], NOISE, alpha, **how)
        assert made.prediction.tolist() == [answer]
    assert plan.least < n / 2, "no majority is needed"
    fewest = smoothing.plan(NOISE, n, alpha, **how)
    assert fewest.least >= plan.least, "without classes as many as are ever needed"
    needed = smoothing.samples_for(NOISE, 1.0, alpha, **how)
    assert smoothing.ceiling(NOISE, needed, alpha, **how) >= 1.0
    assert smoothing.ceiling(NOISE, needed - 1, alpha, **how) < 1.0
    # A simulated run, from the probabilities of all answers.
    p = np.random.default_rng(0).dirichlet([4, 1, 1, 1, 1, 0.1], 100)
    guess = smoothing.plan(NOISE, (100, 1000), alpha, n0=0, images=100, radius=0.3, p=p, **how)
    drawn = np.random.default_rng(1).multinomial(900, p)
    first = np.random.default_rng(2).multinomial(100, p)

    def vote(rows, start, count):
        return (drawn if start else first)[rows]

    real = smoothing.certify_staged(
        p[:, :-1].argmax(1), vote, NOISE, alpha, stages=(100, 1000), radius=0.3, **how
    )
    assert guess.average_radius == pytest.approx(real.radius.mean(), rel=0.15)
    assert guess.votes == pytest.approx(real.n.sum(), rel=0.15)


def test_samples_for_a_radius():
    for noise in (NOISE, smoothing.Laplace(0.5), Masking(20, 100)):
        for radius in (0.5, 1.0):
            n = smoothing.samples_for(noise, radius, 0.001)
            assert smoothing.ceiling(noise, n, 0.001) >= radius
            assert smoothing.ceiling(noise, n - 1, 0.001) < radius
    with pytest.raises(ValueError, match="no number of samples"):
        smoothing.samples_for(smoothing.Uniform(0.5), 0.5, 0.001)


# What is said of them


def test_accuracy_that_takes_off_what_may_be_false():
    counts = np.tile([[990, 10, 0]], (500, 1))
    result = smoothing.certify(np.zeros(500, int), counts, NOISE, 0.001)
    y = (np.arange(500) < 100).astype(int)
    assert result.accuracy(y) == 0.8
    assert result.accuracy(y, confidence=0.99) == pytest.approx(0.8 - 3 / 500)
    np.testing.assert_allclose(result.accuracy(y, [0.5, 9.0], confidence=0.99), [0.794, 0.0])


GOOD = np.array([[990, 10, 0]])
PAIRS = np.array([[0, 0, 100]])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: smoothing.certify([2], GOOD, NOISE, 0.001), ValueError, r"lie in 0 .. 1"),
        (lambda: smoothing.certify([-1], GOOD, NOISE, 0.001), ValueError, r"lie in 0 .. 1"),
        (lambda: smoothing.certify([0.0], GOOD, NOISE, 0.001), ValueError, "must be integers"),
        (lambda: smoothing.certify([0, 0], GOOD, NOISE, 0.001), ValueError, r"shape \(1,\)"),
        (lambda: smoothing.certify([0], GOOD, NOISE, 0.001, top=2), ValueError, "top must be in"),
        (lambda: smoothing.certify([0], GOOD, NOISE, 0.001, top=0), ValueError, "top must be in"),
        (
            lambda: smoothing.certify(
                [0], GOOD, NOISE, 0.001, two_bounds=True, disagreements=PAIRS
            ),
            ValueError,
            "one bound, not two",
        ),
        (
            lambda: smoothing.certify([0], GOOD, NOISE, 0.001, disagreements=PAIRS[:, :2]),
            ValueError,
            "C >= 2",
        ),
        (
            lambda: smoothing.certify([0], GOOD, NOISE, 0.001, disagreements=PAIRS // 10),
            ValueError,
            "disagreements of = 10 samples can never",
        ),
        (
            lambda: smoothing.certify([0], GOOD // 99, NOISE, 0.001, two_bounds=True),
            ValueError,
            "n = 10 samples can never certify at alpha = 0.0005",
        ),
        (
            lambda: smoothing.certify([0], GOOD // 90, NOISE, 0.001, anytime=True),
            ValueError,
            "at least n = 14 are needed",
        ),
        (lambda: smoothing.predict(GOOD // 99, 0.001), ValueError, "at least n = 11 are needed"),
        (
            lambda: smoothing.certify_staged([0], Votes(np.ones(1), 9), NOISE, 0.1, stages=(9, 9)),
            ValueError,
            "increasing and positive",
        ),
        (
            lambda: smoothing.certify_staged(
                [0], Votes(np.ones(1), 99), NOISE, 0.1, stages=(50, 99), radius=9.0
            ),
            ValueError,
            "never 9.0",
        ),
        (
            lambda: smoothing.certify_staged([0], Votes(np.ones(1), 9), NOISE, 0.1, stages=(2, 9)),
            ValueError,
            "n = 2 samples can never",
        ),
        (
            lambda: smoothing.certify_staged(
                [0], lambda *_: [[40, 0, 0]], NOISE, 0.1, stages=(50, 99)
            ),
            ValueError,
            "exactly the 50 samples",
        ),
        (
            lambda: smoothing.certify_staged(
                [0], lambda *_: [[60, -10, 0]], NOISE, 0.1, stages=(50, 99)
            ),
            ValueError,
            "exactly the 50 samples",
        ),
        (lambda: smoothing.certify([0], GOOD, NOISE, 0.001, top=1.0), ValueError, "top must be in"),
        (lambda: smoothing.plan(NOISE, 50, 0.001, top=1.5), ValueError, "top must be a positive"),
        (lambda: smoothing.plan(NOISE, 50, 0.1, top=3, classes=3), ValueError, "top must be in"),
        (lambda: smoothing.plan(NOISE, 0, 0.001), ValueError, "increasing and positive"),
        (lambda: smoothing.plan(NOISE, (50.5, 99), 0.001), ValueError, "increasing and positive"),
        (lambda: smoothing.plan(NOISE, 50, 0.1, images=0), ValueError, "images must be at least 1"),
        (lambda: smoothing.plan(NOISE, 50, 0.1, n0=-1), ValueError, "n0 must be at least 0"),
        (
            lambda: smoothing.plan(NOISE, 50, 0.1, votes_per_second=0.0),
            ValueError,
            "votes_per_second must be positive",
        ),
        (lambda: smoothing.plan(NOISE, 50, 0.1, p=[[0.5, 0.6, 0]]), ValueError, "p must be"),
        (lambda: smoothing.ceiling(NOISE, 0, 0.001), ValueError, "n and top must be at least 1"),
        (lambda: smoothing.ceiling(NOISE, 10, 0.0), ValueError, "alpha must lie"),
        (lambda: smoothing.samples_for(NOISE, math.nan, 0.001), ValueError, "radius must be"),
        (lambda: smoothing.samples_for(NOISE, -1.0, 0.001), ValueError, "radius must be"),
        (lambda: smoothing.plan(NOISE, 5, 0.001), ValueError, "n = 5 samples can never"),
        (lambda: smoothing.plan(NOISE, 50, 0.001, pairs=5), ValueError, "pairs = 5 samples"),
        (lambda: smoothing.plan(NOISE, 12, 0.001, pairs=12), ValueError, "raise both"),
        (lambda: smoothing.plan(NOISE, (50, 99), 0.001, pairs=50), ValueError, "one stage"),
        (lambda: smoothing.plan(NOISE, 50, 0.001, p=[1.2]), ValueError, "p must be"),
        (lambda: smoothing.plan(NOISE, 50, 2.0), ValueError, "alpha must lie"),
        (lambda: smoothing.plan(Gaussian(-1.0), 50, 0.001), ValueError, "sigma must be"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_page_on_smoothing_runs_as_it_stands():
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "smoothing.md"
    names = {"__name__": "smoothing"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
    assert 0 < names["plain"].radius.max() <= names["planned"].ceiling
    assert names["staged"].n.sum() < 0.9 * 4000 * len(names["x"])
    assert np.all(names["fast"].radius <= names["plain"].radius)
