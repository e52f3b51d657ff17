"""Dual smoothing: nothing leaks between halves, and the signed rule is sound and tight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jrobust import keys, smoothing
from jrobust.smoothing import DiscreteGaussian, Gaussian, Laplace
from jrobust.smoothing._dual import Half, certify_dual, checkerboard, halves, signed_radius

ALPHA = 0.05
RUNS = 2000
LIMIT = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
MASK = checkerboard(4, 4)


def pair(left=1.0, right=1.0, mask=MASK):
    return Half(Gaussian(left), mask), Half(Gaussian(right), ~mask)


# The split


@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_a_checkerboard_is_a_partition_with_both_colours_in_every_block(shape):
    mask = checkerboard(*shape)
    rows, columns = np.indices(shape)
    assert np.all(mask == ((rows % 2) == (columns % 2)))
    for half in halves(Gaussian(1.0), mask):
        half.check()
        for i in range(0, shape[0] - 1, 2):
            for j in range(0, shape[1] - 1, 2):
                assert half.mask[i : i + 2, j : j + 2].sum() == 2


@pytest.mark.parametrize("fill", ["max", "mean"])
@pytest.mark.parametrize("shape", [(4, 6), (5, 3)])
def test_a_half_is_its_noisy_pixels_and_what_is_filled_in_from_them(fill, shape, key):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.4
    mask[:2, :2] = False  # a block without any
    half = Half(Gaussian(0.5), mask, fill)
    x = rng.normal(size=(*shape, 2)).astype(np.float32)
    got = np.asarray(half.perturb(key, jnp.asarray(x)))
    noisy = x + np.asarray(Gaussian(0.5).sample(key, x.shape))
    for i in range(shape[0]):
        for j in range(shape[1]):
            block = np.s_[i // 2 * 2 : i // 2 * 2 + 2, j // 2 * 2 : j // 2 * 2 + 2]
            there = noisy[block][mask[block]]
            if mask[i, j]:
                expected = noisy[i, j]
            elif not len(there):
                expected = np.zeros(2)
            else:
                expected = there.max(0) if fill == "max" else there.mean(0)
            np.testing.assert_allclose(got[i, j], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fill", ["max", "mean"])
def test_nothing_of_the_missing_pixels_reaches_the_model(fill, key):
    """Neither their values, nor their noise: any change of them leaves the copy as it was."""
    left, right = halves(Gaussian(0.3), MASK, fill)
    x = jax.random.uniform(key, (4, 4, 3))
    for half, mask in ((left, MASK), (right, ~MASK)):
        copy = half.perturb(key, x)
        for other in (x + 7.0, 1e30 * x, jnp.full_like(x, jnp.nan), jnp.full_like(x, jnp.inf)):
            changed = jnp.where(mask[..., None], x, other)
            assert jnp.array_equal(half.perturb(key, changed), copy)
        for i, j in np.argwhere(mask):
            assert not jnp.array_equal(half.perturb(key, x.at[i, j].add(1.0)), copy)
        assert jnp.all(jnp.isfinite(copy))


def test_halves_share_a_key_and_no_noise(key):
    """Under one key the halves are the two colours of one draw: independent."""
    x = jnp.zeros((4, 4, 1))
    left, right = (half.perturb(key, x)[..., 0] for half in halves(Gaussian(1.0), MASK))
    draw = Gaussian(1.0).sample(key, x.shape)[..., 0]
    assert jnp.array_equal(jnp.where(MASK, left, right), draw)


# The rule


def flips(z, sigma, move):
    """Whether two half-space classifiers in two classes change their sum's answer."""
    p = special.ndtr(np.asarray(z) - np.asarray(move) / np.asarray(sigma))
    return p.sum(-1) <= 1


@pytest.mark.parametrize("z", [(2.0, -0.5), (2.0, 0.2), (1.0, 0.0), (1.3, 1.3), (-0.4, 3.0)])
@pytest.mark.parametrize("sigma", [(1.0, 1.0), (0.25, 0.25), (0.5, 2.0)])
def test_the_signed_rule_is_the_distance_of_two_half_spaces(z, sigma):
    """And the rules of released code are not: their radius holds points that change the answer."""
    q = [special.ndtr(-v) for v in z]
    radius = signed_radius(pair(*sigma), q)
    exact = sum(z) / math.hypot(1 / sigma[0], 1 / sigma[1])
    assert exact - 1e-9 < radius < exact
    # Brute force: no direction leaves the answer inside, and the worst one does just outside.
    angle = np.linspace(0, np.pi / 2, 200_001)
    moves = np.stack([np.cos(angle), np.sin(angle)], -1)
    assert not np.any(flips(z, sigma, radius * (1 - 1e-6) * moves))
    assert np.any(flips(z, sigma, radius * (1 + 1e-6) * moves))
    worst = np.array([1 / sigma[0], 1 / sigma[1]]) / math.hypot(1 / sigma[0], 1 / sigma[1])
    assert flips(z, sigma, radius * (1 + 1e-6) * worst)
    single = np.array(z) * sigma
    root = math.hypot(*np.maximum(single, 0))
    clipped = np.maximum(single, 0).sum() / math.sqrt(2)
    if sigma[0] == sigma[1]:
        if z[0] != z[1]:
            assert flips(z, sigma, 0.99 * root * worst), "the root of the sum of squares is unsound"
        if min(z) < 0:
            assert flips(z, sigma, 0.99 * clipped * worst), "clipping is unsound"


def test_the_published_counterexamples():
    one = pair()
    assert signed_radius(one, special.ndtr([-2.0, 0.5])) == pytest.approx(
        1.5 / math.sqrt(2), rel=1e-9
    )
    assert signed_radius(one, special.ndtr([-2.0, -0.2])) == pytest.approx(
        2.2 / math.sqrt(2), rel=1e-9
    )


def test_the_rule_is_rounded_down():
    q = np.concatenate([np.logspace(-12, -0.31, 40), 1 - np.logspace(-6, -0.4, 20)])
    left, right = np.meshgrid(q, q)
    for sigma in ((0.25, 0.25), (0.1, 70.0)):
        exact = -(special.ndtri(left) + special.ndtri(right))
        exact /= math.hypot(*(1 / np.float64(np.float32(s)) for s in sigma))
        radius = signed_radius(pair(*sigma), (left, right))
        assert np.all(radius < exact)
        np.testing.assert_allclose(radius, exact, atol=1e-12 * max(sigma), rtol=1e-11)


def test_certificate_by_hand():
    """Equal votes on one half, a minority on the other; alpha is halved, the sum has to win."""
    n, alpha = 1000, 0.001
    select = (np.array([[3, 6, 1]]), np.array([[5, 4, 1]]))
    estimate = (np.array([[10, 980, 10]]), np.array([[520, 470, 10]]))
    made = certify_dual(select, estimate, pair(), alpha)
    q = [special.betaincinv(n - k + 1, k, 1 - alpha / 2) for k in (980, 470)]
    assert made.prediction.tolist() == made.selected.tolist() == [1]
    assert made.radius[0] == pytest.approx(-special.ndtri(q).sum() / math.sqrt(2), rel=1e-9)
    assert made.p_lower[0] == pytest.approx(1 - np.mean(q), rel=1e-9)
    assert (made.count[0], made.n[0], made.rejects[0]) == (1450, 2000, 20)
    assert (made.alpha, made.norm) == (alpha, "L2")
    # Rejects are votes against the class, on either side.
    worse = (estimate[0], np.array([[0, 470, 530]]))
    assert certify_dual(select, worse, pair(), alpha).radius == made.radius
    weak = (estimate[0], np.array([[960, 40, 0]]))
    assert certify_dual(select, weak, pair(), alpha).prediction.tolist() == [-1]


def test_all_votes_equal_is_the_closed_form():
    n, alpha = 1000, 0.001
    counts = (np.array([[0, n, 0]]), np.array([[0, n, 0]]))
    select = (np.array([[0, 9, 0]]), np.array([[0, 9, 0]]))
    made = certify_dual(select, counts, pair(0.18, 0.18), alpha)
    exact = -0.18 * math.sqrt(2) * special.ndtri(-math.expm1(math.log(alpha / 2) / n))
    assert made.radius[0] == pytest.approx(exact, rel=1e-7)
    # The table of the reference says 0.618 for these, where released logs have 0.970.
    assert made.radius[0] == pytest.approx(0.618, abs=5e-4)
    # One half alone, which sees no change of the other, has less.
    left = smoothing.certify(select[0], counts[0], pair(0.18)[0], alpha / 2)
    assert made.radius[0] == pytest.approx(math.sqrt(2) * left.radius[0], rel=1e-9)


# Coverage


def linear(seed, sigma, n, spread=1.0):
    """Votes of linear classifiers of both halves, whose dual classifier's distance is known."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, (RUNS, 2))
    counts = []
    for m in (50, n):
        ones = rng.binomial(m, special.ndtr(z))
        counts.append([np.stack([m - k, k, 0 * k], axis=1) for k in ones.T])
    distance = z.sum(1) / math.hypot(*(1 / s for s in sigma))
    return counts[0], counts[1], distance


def false(certificate, distance):
    wrong = (certificate.prediction == 1) != (distance > 0)
    return (certificate.prediction >= 0) & (wrong | (certificate.radius > np.abs(distance)))


@pytest.mark.parametrize("sigma", [(1.0, 1.0), (0.5, 1.5)])
def test_coverage_of_two_thousand_certificates(sigma):
    select, estimate, distance = linear(0, sigma, 400)
    made = certify_dual(tuple(select), tuple(estimate), pair(*sigma), ALPHA)
    assert false(made, distance).mean() <= LIMIT
    assert (made.prediction >= 0).mean() > 0.7
    gap = np.abs(distance) - made.radius
    assert np.median(gap[made.prediction >= 0]) < 0.5 * max(sigma), "and it is not empty"


def test_coverage_fails_by_the_rules_of_released_code():
    """Both overstate most where one half is unsure, whatever the number of votes."""
    select, estimate, distance = linear(1, (1.0, 1.0), 100_000)
    made = certify_dual(tuple(select), tuple(estimate), pair(), ALPHA)
    assert false(made, distance).mean() <= LIMIT
    single = []
    for half, counts in zip(pair(), estimate):
        k = np.take_along_axis(counts, made.selected[:, None], axis=1)[:, 0]
        q = special.betaincinv(100_000 - k + 1, np.maximum(k, 1), 1 - ALPHA / 2)
        single.append(np.maximum(half.radius(q), 0))
    certified = made.prediction >= 0
    for radius in (np.hypot(*single), sum(single) / math.sqrt(2)):
        overstated = certified & (radius > np.abs(distance))
        assert overstated.mean() > 4 * LIMIT


def on_device(key, images, n, sigma=0.5):
    """Linear classifiers of 4x4 images under real noise, and the distance of their sum's answer.

    Their weights are on the pixels of their half alone, so that filled pixels have no say.
    """
    rng = np.random.default_rng(3)
    w = rng.normal(size=(4, 4, 1)).astype(np.float32)
    x = rng.normal(0, 0.4, (images, 4, 4, 1)).astype(np.float32)
    both = halves(Gaussian(sigma), MASK)
    models, z = [], []
    for half in both:
        own = w * half.mask[..., None]

        def model(v, own=own):
            score = (v * own[None]).sum((1, 2, 3))
            return jnp.stack([jnp.zeros_like(score), score], axis=1)

        models.append(jax.jit(model))
        z.append((x * own).sum((1, 2, 3)) / (sigma * np.linalg.norm(own)))
    stages = smoothing.stages(key)

    def count(stage, n):
        return tuple(
            np.asarray(smoothing.count_votes(stage, model, jnp.asarray(x), half, n))
            for model, half in zip(models, both)
        )

    made = certify_dual(count(stages.select, 20), count(stages.estimate, n), both, ALPHA)
    return made, sigma * np.sum(z, 0) / math.sqrt(2)


@pytest.mark.full
def test_coverage_on_the_device(key):
    made, distance = on_device(key, RUNS, 200)
    assert false(made, distance).mean() <= LIMIT
    assert (made.prediction >= 0).mean() > 0.6
    assert np.corrcoef(made.radius, np.abs(distance))[0, 1] > 0.9


def test_sound_noise_in_halves(key):
    noise = DiscreteGaussian(0.2, 48)
    left, right = halves(noise, MASK)
    x = jnp.round(255 * jax.random.uniform(key, (4, 4, 3))) / 255
    grid = 255 * left.perturb(key, x)
    assert jnp.allclose(grid, jnp.round(grid), atol=1e-3)
    # Off the grid elsewhere is the other half's affair.
    off = jnp.where(MASK[..., None], x, x + 0.3 / 255)
    assert jnp.array_equal(left.perturb(key, off), left.perturb(key, x))
    assert jnp.isnan(right.perturb(key, off)).any()
    sound = signed_radius((left, right), (0.01, 0.3))
    assert sound == pytest.approx(signed_radius(halves(Gaussian(0.2), MASK), (0.01, 0.3)), rel=1e-6)


# Bad input

COUNTS = np.array([[0, 100, 0]])
GOOD = (np.array([[0, 9, 0]]), np.array([[0, 9, 0]])), (COUNTS, COUNTS.copy())


@pytest.mark.parametrize(
    ("halves", "error", "match"),
    [
        (pair()[:1], TypeError, "two Half"),
        ((Gaussian(1.0), Gaussian(1.0)), TypeError, "two Half"),
        ((pair()[0], pair()[0]), ValueError, "share a pixel"),
        (pair()[:1] + pair(mask=checkerboard(4, 2))[1:], ValueError, "share a pixel"),
        ((Half(Laplace(1.0), MASK), Half(Laplace(1.0), ~MASK)), ValueError, "Gaussian"),
        (pair(0.0), ValueError, "sigma must be positive"),
        ((Half(Gaussian(1.0), MASK | ~MASK), pair()[1]), ValueError, "keep some"),
        ((Half(Gaussian(1.0), MASK.astype(int)), pair()[1]), ValueError, "booleans"),
        ((Half(Gaussian(1.0), MASK, "zero"), pair()[1]), ValueError, "max, mean"),
    ],
)
def test_bad_halves(halves, error, match):
    with pytest.raises(error, match=match):
        certify_dual(*GOOD, halves, 0.05)


@pytest.mark.parametrize(
    ("select", "estimate", "alpha", "match"),
    [
        (GOOD[0], GOOD[1], 0.0, "alpha"),
        (GOOD[1], GOOD[1], 0.05, "share an array"),
        (GOOD[0], (COUNTS, np.array([[0, 100, 0, 0]])), 0.05, "one shape"),
        ((np.array([[0, 9, 0]]), np.array([[0, 8, 0]])), GOOD[1], 0.05, "as many samples"),
        (GOOD[0], (np.array([[0, 10, 0]]), np.array([[0, 10, 0]])), 0.001, "11 in each"),
        (GOOD[0], (COUNTS, np.array([[-1, 100, 0]])), 0.05, "non-negative"),
    ],
)
def test_bad_counts(select, estimate, alpha, match):
    with pytest.raises(ValueError, match=match):
        certify_dual(select, estimate, pair(), alpha)


def test_eleven_votes_in_each_half_are_enough():
    votes = (np.array([[0, 11, 0]]), np.array([[0, 11, 0]]))
    assert certify_dual(GOOD[0], votes, pair(), 0.001).prediction.tolist() == [1]


def test_images_of_another_shape_are_refused(key):
    with pytest.raises(ValueError, match="of its mask"):
        pair()[0].perturb(key, jnp.zeros((4, 5, 1)))
    with pytest.raises(ValueError, match="channels"):
        pair()[0].perturb(key, jnp.zeros((4, 4)))


def test_a_half_is_a_pytree_and_draws_by_its_key_alone(key):
    half = pair(0.5)[0]
    x = jax.random.uniform(key, (3, 4, 4, 1))
    row_keys = keys.examples(key, jnp.arange(3))
    together = jax.jit(jax.vmap(lambda h, k, v: h.perturb(k, v), (None, 0, 0)))(half, row_keys, x)
    alone = half.perturb(row_keys[1], x[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-6)
