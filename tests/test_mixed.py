"""Mixed classifiers: stable logits, certificates that brute force cannot break, published maps."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special

import jrobust
from jrobust import attacks, smoothing
from jrobust.models._mixed import MIXEDNUTS, adaptive_weight, mixed, mixed_logits, sharpened_logits
from jrobust.smoothing import DiscreteGaussian, Gaussian, Laplace, Masking, Uniform
from jrobust.smoothing._mixed import Mixed, certify_mixed, lipschitz_radius
from jrobust.threat import Linf

ALPHA = 0.05
RUNS = 2000
LIMIT = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
WEIGHTS = (0.55, 0.75, 0.95, 1.0)
PHI = special.ndtr


def ratio(a):
    a = np.float64(np.float32(a))
    return (1 - a) / a


# Certificates


@pytest.mark.parametrize("a", WEIGHTS)
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_one_bound_is_where_a_smoothed_half_space_loses(a, sigma):
    """Two classes, g against y everywhere: the mix changes its answer at the radius."""
    p = np.concatenate([[0.3, 0.5], 1 - np.logspace(-9, -0.4, 60)])
    radius = Mixed(Gaussian(sigma), a).radius(1 - p)
    exact = sigma * (special.ndtri(p) - special.ndtri((1 + ratio(a)) / 2))
    np.testing.assert_allclose(radius, exact, rtol=1e-9, atol=1e-9)

    def answers(r):
        """The mix's margin for y at distance r along the worst direction."""
        h = PHI(special.ndtri(p) - r / sigma)
        weight = np.float64(np.float32(a))
        return weight * h - (weight * (1 - h) + 1 - weight)

    proved = radius > 0
    assert proved.any()
    for share in (0, 0.3, 0.9, 1 - 1e-6):
        assert np.all(answers(share * radius)[proved] > 0)
    assert np.all(answers(radius * (1 + 1e-6) + 1e-9)[proved] < 0)
    assert np.all(answers(0.0)[~proved] <= 1e-9)


@pytest.mark.parametrize("a", WEIGHTS)
def test_two_bounds_are_where_two_half_spaces_lose(a):
    """y on one side, a rival on the other, others between: the exact crossing, by root finding."""
    sigma, mu = 0.5, ratio(a)
    cases = [(0.9, 0.05), (0.8, 0.19), (0.6, 0.1), (0.999, 1e-6), (0.45, 0.2), (0.7, 0.3)]
    for p, rival in cases:

        def margin(r, p=p, rival=rival):
            y, c = PHI(special.ndtri(p) - r / sigma), PHI(special.ndtri(rival) + r / sigma)
            return y - c - mu

        radius = Mixed(Gaussian(sigma), a).radius(1 - p, rival)
        if margin(0.0) <= 0:
            assert radius <= 1e-12
            continue
        exact = optimize.brentq(margin, 0, 20, xtol=1e-14)
        assert exact - 1e-9 < radius < exact + 1e-13
        # Anywhere inside, in any direction of a plane: the two half-spaces move least or less.
        angle = np.linspace(0, np.pi, 721)
        for r in np.linspace(0, radius * (1 - 1e-6), 7):
            y = PHI(special.ndtri(p) - r * np.cos(angle) / sigma)
            c = PHI(special.ndtri(rival) + r * np.cos(angle) / sigma)
            assert np.all(y - c > mu)
        assert margin(radius * (1 + 1e-6) + 1e-9) < 0


def test_the_whole_mixed_classifier_keeps_its_answer_inside_and_loses_it_outside():
    """Quadrature, no formula: base classifier and accurate model in the plane, the answer on rays.

    y where ``u . w < 0``, a rival beyond a second line, others between; the accurate model is sure
    of the rival everywhere.
    """
    sigma, a, edge = 0.7, 0.8, 0.6
    x = np.array([-1.3, 0.4])
    normal = np.array([0.6, 0.8])
    fine = np.linspace(-8, 8, 16_001)
    density = np.exp(-(fine**2) / 2) / math.sqrt(2 * math.pi)

    def answer(point):
        """argmax of (1 - a) g + a h for classes y, others, rival."""
        along = point @ normal + sigma * fine
        h = [
            integrate.trapezoid(density * inside, fine)
            for inside in (along < 0, (along >= 0) & (along < edge), along >= edge)
        ]
        return int(np.argmax(a * np.array(h) + (1 - a) * np.array([0.0, 0.0, 1.0])))

    centre = x @ normal
    q, rival = PHI(centre / sigma), PHI((centre - edge) / sigma)
    radius = Mixed(Gaussian(sigma), a).radius(q, rival)
    assert radius > 0.1
    for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
        direction = np.array([math.cos(angle), math.sin(angle)])
        assert answer(x + 0.998 * radius * direction) == 0
    assert answer(x + 1.002 * radius * normal) == 2


def test_the_published_rule_is_true_and_smaller():
    sigma = 1.0
    p = np.linspace(0.55, 0.999999, 50)
    for a in (0.75, 0.95):
        weight = np.float64(np.float32(a))
        for rival in (1 - p, (1 - p) / 2):
            published = (
                sigma / 2 * (special.ndtri(weight * p) - special.ndtri(weight * rival + 1 - weight))
            )
            radius = Mixed(Gaussian(sigma), a).radius(1 - p, rival)
            proved = radius > 0
            assert np.all(published[proved] < radius[proved])
        assert published.max() < special.ndtri(a) < radius.max()


@pytest.mark.parametrize("noise", [Gaussian(0.3), Laplace(0.4), Uniform(1.2)], ids=type)
def test_a_weight_of_one_leaves_the_radius_of_the_noise(noise):
    q = np.array([0.4, 0.2, 0.05, 1e-4])
    runner = q / 3
    whole = Mixed(noise, 1.0)
    np.testing.assert_allclose(whole.radius(q), noise.radius(q), rtol=1e-12)
    np.testing.assert_allclose(whole.radius(q, runner), noise.radius(q, runner), rtol=1e-9)
    assert np.all(whole.radius(q, runner) <= noise.radius(q, runner))


@pytest.mark.parametrize("a", [0.6, 0.9])
def test_other_noises_by_their_own_shift(a):
    """L1: a uniform's probability falls by r / (2 scale), a Laplace's half-line grows by exp."""
    q, mu = np.array([0.1, 0.01]), ratio(a)
    scale = 0.5
    uniform = Mixed(Uniform(scale), a).radius(q)
    # P(not y) moves linearly, up to (1 - mu) / 2.
    np.testing.assert_allclose(uniform, 2 * scale * ((1 - mu) / 2 - q), rtol=1e-9)
    laplace = Mixed(Laplace(scale), a).radius(q)
    np.testing.assert_allclose(laplace, scale * np.log((1 - mu) / 2 / q), rtol=1e-9)


def test_more_weight_proves_more():
    """What makes the certificate at the least weight one of every adaptive weight above it."""
    q = np.array([0.3, 0.05, 0.001])[:, None] + np.zeros((1, 9))
    weights = np.linspace(0.6, 1, 9)
    for rule in (None, 1.5):
        for runner in (q, q / 4):
            radii = np.stack(
                [Mixed(Gaussian(0.5), a, rule).radius(q[:, 0], runner[:, 0]) for a in weights], 1
            )
            assert np.all(np.diff(radii, axis=1) > 0)


def test_radius_is_rounded_down_whatever_the_search_does():
    """Each radius leaves (*) true at its end, in exact terms: z of both bounds, added up."""
    rng = np.random.default_rng(0)
    q = rng.uniform(0, 0.5, 3000) ** 3
    runner = q * rng.uniform(0, 1, 3000)
    for a in (0.6, 0.99):
        radius = Mixed(Gaussian(1.0), a).radius(q, runner)
        spent = PHI(special.ndtri(q) + radius) + PHI(special.ndtri(runner) + radius)
        assert np.all(spent <= 1 - ratio(a) + 1e-15)
        assert np.median(1 - ratio(a) - spent) < 1e-12


def test_nothing_else_ever_seen_and_nothing_known():
    whole = Mixed(Gaussian(1.0), 0.8)
    assert whole.radius(0.0) == np.inf
    assert whole.radius(1.0) == -np.inf
    assert whole.radius(0.3, 0.0) < np.inf
    assert Mixed(Gaussian(1.0), 0.8, 2.0).radius(1.0) < 0


def test_grid_noise_is_charged_its_sampler():
    q = np.array([0.2, 1e-3])
    ideal = Mixed(Gaussian(0.25), 0.8).radius(q)
    grid = Mixed(DiscreteGaussian(0.25, 3072), 0.8).radius(q)
    np.testing.assert_allclose(grid, ideal, rtol=1e-9)
    assert np.all(grid < ideal)


# The Lipschitz rule


def test_lipschitz_rule_is_where_the_steepest_probabilities_lose():
    """On a line, two classes, ``h_y = clip(1/2 + margin/2 - L |t|)``, g against y."""
    for a, steep, margin in [(0.75, 2.0, 0.9), (1.0, 0.5, 0.3), (0.9, 1.0, 0.5)]:
        radius = lipschitz_radius(margin, steep, a)
        mu = ratio(a)
        exact = (margin - mu) / (2 * steep)
        assert exact - 1e-12 < radius < exact

        def answers(t, margin=margin, steep=steep, mu=mu):
            h = np.clip((1 + margin) / 2 - steep * abs(t), 0, 1)
            return h - (1 - h) - mu

        assert answers(radius * (1 - 1e-9)) > 0
        assert answers(radius * (1 + 1e-9)) < 0
    assert lipschitz_radius(0.2, 1.0, 0.75) < 0
    np.testing.assert_array_equal(np.sign(lipschitz_radius([-1.0, 0.0, 1.0], 1.0)), [-1, -1, 1])


def test_lipschitz_constant_of_gaussian_smoothing():
    """1 / (sigma sqrt(2 pi)) is attained by a half-space, and its rule never beats the other."""
    sigma = 0.5
    constant = 1 / (sigma * math.sqrt(2 * math.pi))
    t = np.linspace(-2, 2, 4001)
    slope = np.abs(np.diff(PHI(t / sigma)) / np.diff(t)).max()
    assert slope == pytest.approx(constant, rel=1e-6)
    assert slope <= constant
    q = np.linspace(1e-6, 0.49, 60)
    for a in (0.6, 0.9, 1.0):
        for runner in (q, q / 5):
            smoothed = Mixed(Gaussian(sigma), a).radius(q, runner)
            bounded = Mixed(Gaussian(sigma), a, constant).radius(q, runner)
            assert np.all((bounded <= smoothed + 1e-9) | (smoothed <= 0))


# Certificates from counts


def votes(p, n, seed):
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, p)
    return np.hstack([drawn, np.zeros((len(p), 1), int)])


def situations(seed, sigma):
    """Three-class base classifiers on a line, y below 0, the rival above ``edge``."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2.0, -0.2, RUNS)
    edge = rng.uniform(0.0, 0.3, RUNS)
    q, rival = PHI(x / sigma), PHI((x - edge) / sigma)
    return x, edge, np.column_stack([1 - q, q - rival, rival])


def true_radius(x, edge, sigma, mu):
    """Where y's lead over the next of both others falls to mu, by bisection."""
    low, high = np.zeros_like(x), np.full_like(x, 20.0)
    for _ in range(60):
        r = (low + high) / 2
        rival, lost = PHI((x + r - edge) / sigma), PHI((x + r) / sigma)
        lead = 1 - lost - np.maximum(rival, lost - rival) > mu
        low, high = np.where(lead, r, low), np.where(lead, high, r)
    return low


@pytest.mark.parametrize("two_bounds", [False, True])
def test_coverage_of_two_thousand_certificates(two_bounds):
    sigma, a = 0.8, 0.7
    x, edge, p = situations(0, sigma)
    noise = Mixed(Gaussian(sigma), a)
    made = smoothing.certify(votes(p, 50, 1), votes(p, 500, 2), noise, ALPHA, two_bounds=two_bounds)
    true = true_radius(x, edge, sigma, ratio(a))

    def false(prediction, radius):
        return (prediction >= 0) & ((prediction != 0) | (radius > true))

    assert false(made.prediction, made.radius).mean() <= LIMIT
    assert (made.prediction >= 0).mean() > 0.5
    # Point estimates in place of the bounds, as released code has them, do not pass.
    estimate = votes(p, 500, 2)
    top, second = np.sort(estimate, 1)[:, :-3:-1].T / 500
    radius = noise.radius(1 - top, second)
    assert false(np.where(radius > 0, estimate.argmax(1), -1), radius).mean() > 4 * LIMIT


def test_two_bounds_certify_more_where_the_rest_is_split():
    counts = np.array([[700, 50, 50, 50, 50, 50, 50, 0]])
    noise = Mixed(Gaussian(1.0), 0.7)
    one = smoothing.certify([0], counts, noise, 0.001)
    two = smoothing.certify([0], counts, noise, 0.001, two_bounds=True)
    assert one.prediction[0] == -1
    assert two.prediction[0] == 0


def test_the_better_rule_of_both_is_reported():
    """The second base model draws noise of its own: its probabilities are flatter than sigma's."""
    sigma, own = 0.5, 3.0
    true = 1 / (math.hypot(sigma, own) * math.sqrt(2 * math.pi))
    counts = np.array([[10_000, 0, 0], [800, 9200, 0], [6000, 4000, 0]])
    made, rule = certify_mixed(
        [0, 1, 0], counts, Gaussian(sigma), 0.001, weight=0.75, lipschitz=true
    )
    parts = [
        smoothing.certify([0, 1, 0], counts, Mixed(Gaussian(sigma), 0.75, c), 0.001)
        for c in (None, true)
    ]
    assert rule.tolist() == ["lipschitz", "lipschitz", "none"]
    np.testing.assert_array_equal(made.radius, np.maximum(parts[0].radius, parts[1].radius))
    steep, rule = certify_mixed(
        [0, 1, 0], counts, Gaussian(sigma), 0.001, weight=0.75, lipschitz=1 / sigma
    )
    assert rule.tolist() == ["smoothed", "smoothed", "none"]
    np.testing.assert_array_equal(steep.radius, parts[0].radius)
    assert steep.prediction.tolist() == [0, 1, -1]


def test_mixed_noise_goes_where_noises_go(key):
    """Votes are those of the noise inside; stages and plans speak of the mix."""
    inside, noise = Gaussian(0.5), Mixed(Gaussian(0.5), 0.8)
    w = jax.random.normal(key, (3, 4))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    counts = [smoothing.count_votes(key, lambda v: v @ w, x, n, 64) for n in (inside, noise)]
    np.testing.assert_array_equal(*counts)
    limit = smoothing.ceiling(noise, 1000, 0.001)
    q = -math.expm1(math.log(0.001) / 1000)
    expected = 0.5 * (-special.ndtri(q) - special.ndtri((1 + ratio(0.8)) / 2))
    assert limit == pytest.approx(expected, rel=1e-7)
    made = smoothing.certify([0], np.array([[1000, 0, 0]]), noise, 0.001)
    assert 0.999 * limit < made.radius[0] <= limit
    assert smoothing.samples_for(noise, 0.5, 0.001) > smoothing.samples_for(inside, 0.5, 0.001)


# Bad input


@pytest.mark.parametrize(
    ("noise", "match"),
    [
        (Mixed(Gaussian(0.5), 0.5), "weight must be"),
        (Mixed(Gaussian(0.5), 1.1), "weight must be"),
        (Mixed(Gaussian(0.5), float("nan")), "weight must be"),
        (Mixed(Gaussian(0.5), np.array([0.7, 0.8])), "weight must be"),
        (Mixed(Gaussian(0.0), 0.8), "sigma must be"),
        (Mixed(Gaussian(0.5), 0.8, 0.0), "lipschitz must be"),
        (Mixed(Masking(4, 16), 0.8), "counts locations"),
    ],
)
def test_bad_mixes(noise, match):
    with pytest.raises(ValueError, match=match):
        smoothing.certify([0], np.array([[100, 0, 0]]), noise, 0.05)


@pytest.mark.parametrize("bounds", [{}, {"two_bounds": True}, {"top": 2}, {"anytime": True}])
@pytest.mark.parametrize("lipschitz", [None, 1.0])
def test_votes_that_can_never_certify_a_mix_are_refused(bounds, lipschitz):
    """Equal votes prove a majority, and not the margin that the accurate part may take away."""
    noise, alpha = Mixed(Gaussian(0.5), 0.55, lipschitz), 0.05
    smoothing.certify([0], np.array([[20, 0, 0, 0]]), Gaussian(0.5), alpha, **bounds)
    with pytest.raises(ValueError, match="n = 20 samples can never certify") as info:
        smoothing.certify([0], np.array([[20, 0, 0, 0]]), noise, alpha, **bounds)
    needed = int(re.search(r"at least n = (\d+)", str(info.value))[1])
    enough = np.array([[needed, 0, 0, 0]])
    assert smoothing.certify([0], enough, noise, alpha, **bounds).prediction.tolist() == [0]
    with pytest.raises(ValueError, match="can never certify"):
        smoothing.certify([0], enough - [[1, 0, 0, 0]], noise, alpha, **bounds)
    with pytest.raises(ValueError, match="n = 20 samples can never certify"):
        smoothing.plan(noise, 20, alpha, **bounds)
    with pytest.raises(ValueError, match="n = 20 samples can never certify"):
        smoothing.certify_staged([0], None, noise, alpha, stages=(20, 500), **bounds)


def test_bad_lipschitz_arguments():
    for args, match in [((1.5, 1.0), "margin"), ((0.5, -1.0), "lipschitz"), ((0.5, 1, 0.4), "wei")]:
        with pytest.raises(ValueError, match=match):
            lipschitz_radius(*args)


# Models


def test_logits_are_the_logarithm_of_the_mixed_probabilities():
    rng = np.random.default_rng(0)
    g, h = rng.normal(0, 5, (2, 40, 7))
    a = rng.uniform(0, 1, 40)
    a[:2] = 0, 1
    exact = np.log((1 - a[:, None]) * special.softmax(g, 1) + a[:, None] * special.softmax(h, 1))
    got = mixed_logits(jnp.asarray(g), jnp.asarray(h), jnp.asarray(a))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    got = mixed_logits(jnp.asarray(g, jnp.bfloat16), jnp.asarray(h), 0.5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(special.logsumexp(np.asarray(got), axis=1), 0, atol=1e-5)


def test_logits_keep_probabilities_that_underflow():
    """exp(-300) is 0 in float32: its logarithm, and a gradient through it, are not lost."""
    g = jnp.array([[0.0, -300.0, -310.0]])
    h = jnp.array([[0.0, -305.0, -290.0]])
    exact = np.logaddexp(np.log(0.25) + np.asarray(g), np.log(0.75) + np.asarray(h))
    np.testing.assert_allclose(mixed_logits(g, h, 0.75), exact, rtol=1e-6, atol=1e-6)

    @jax.jit
    def slopes(a):
        return jax.grad(lambda g, h, a: mixed_logits(g, h, a)[0, 2], (0, 1, 2))(g, h, a)

    for a in (0.0, 0.75, 1.0):
        grads = slopes(a)
        assert all(jnp.all(jnp.isfinite(grad)) for grad in grads)
    assert grads[1][0, 2] == pytest.approx(1.0)
    assert jnp.all(grads[0] == 0)


def test_a_mix_certified_at_the_least_weight_holds_for_an_adaptive_one(key):
    """Brute force: h a smoothed half-space in closed form, g and a(x) against y all the way."""
    sigma, least = 0.5, 0.7
    weight = adaptive_weight(lambda x: -1e4 * jnp.ones(len(x)), least, 0.9)
    model = mixed(
        lambda x: jnp.tile(jnp.array([[-50.0, 50.0]]), (len(x), 1)),
        lambda x: jax.scipy.stats.norm.logcdf(x * jnp.array([[-1.0, 1.0]]) / sigma),
        weight,
    )
    x = -1.0
    radius = Mixed(Gaussian(sigma), least).radius(PHI(x / sigma))
    assert radius > 0.4
    ray = jnp.asarray(x + radius * np.array([0, 0.5, 0.999, 1.001, 1.5]), jnp.float32)[:, None]
    assert jax.jit(model)(ray).argmax(-1).tolist() == [0, 0, 0, 1, 1]
    # At the mean weight it would be a claim about points that lose.
    above = Mixed(Gaussian(sigma), 0.8).radius(PHI(x / sigma))
    assert model(jnp.full((1, 1), x + 0.99 * above, jnp.float32)).argmax() == 1


def test_an_adaptive_weight_never_leaves_its_range():
    least, most = 0.7, 0.9
    weight = adaptive_weight(lambda x: x[:, 0], least, most)
    scores = jnp.concatenate([jnp.linspace(-120, 120, 20_001), jnp.array([jnp.inf, -jnp.inf])])
    a = np.asarray(jax.jit(weight)(scores[:, None]))
    assert a.min() == np.float32(least)
    assert a.max() == np.float32(most)
    middle = weight(jnp.zeros((1, 1)))
    assert middle[0] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="score must map"):
        weight(scores[:, None, None])


def test_a_mixed_classifier_is_a_model_like_any_other(key):
    """One compilation for all weights and parameters, and attacks see through both parts."""
    traces = []

    def linear(w, x):
        traces.append(1)
        return x.reshape(len(x), -1) @ w

    w = jax.random.normal(key, (2, 12, 4))
    x = jax.random.uniform(jax.random.key(1), (6, 12))

    def build(scale, a):
        g, h = (jax.tree_util.Partial(linear, scale * part) for part in w)
        return mixed(g, h, a)

    y = build(1.0, 0.6)(x).argmax(-1)
    attack = attacks.FGSM(Linf(0.1))
    found = jrobust.run(attack, key, build(1.0, 0.6), x, y)
    before = len(traces)
    again = jrobust.run(attack, key, build(2.0, 0.9), x, y)
    assert len(traces) - before <= 2, "shapes are looked at, nothing compiles anew"
    assert not jnp.array_equal(found.loss, again.loss)
    assert found.success.any()
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError, match="weight"):
            mixed(linear, linear, bad)
    with pytest.raises(ValueError, match="least <= most"):
        adaptive_weight(linear, 0.9, 0.8)


# MixedNUTS

sharpen = jax.jit(sharpened_logits, static_argnames="top")


def gelu(u):
    return u * PHI(u)


@pytest.mark.parametrize(("name", "top"), [("cifar10", 250), ("cifar100", 250), ("imagenet", 5)])
def test_sharpened_logits_in_float64(name, top):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (30, 10))
    c = {k: v for k, v in MIXEDNUTS[name].items() if k != "weight"}
    largest = -np.sort(-logits, axis=1)[:, :top]
    normal = (logits - largest.mean(1, keepdims=True)) / largest.std(1, ddof=1, keepdims=True)
    bent = gelu(normal + c["bias"])
    exact = c["scale"] * np.sign(bent) * np.abs(bent) ** c["power"]
    got = sharpen(jnp.asarray(logits), **c, top=top)
    np.testing.assert_allclose(got, exact, rtol=2e-4, atol=2e-5 * c["scale"])


def test_sharpened_logits_ignore_shift_and_scale_and_keep_the_prediction():
    logits = jax.random.normal(jax.random.key(2), (200, 10))
    base = sharpen(logits)
    np.testing.assert_allclose(sharpen(5 * logits - 3), base, rtol=2e-3, atol=1e-4)
    values = np.asarray(logits)
    normal = (values.max(1) - values.mean(1)) / values.std(1, ddof=1)
    kept = normal >= 1.1
    assert kept.mean() > 0.8
    assert np.all((base.argmax(-1) == logits.argmax(-1))[kept])
    # Sharper where it was sure: the ratio of the large to the small margin grows.
    sure, unsure = jnp.array([[4.0, 0, 0, 0, 0, 0]]), jnp.array([[4.0, 3.5, 0, 0, 0, 0]])

    def lead(z):
        top = jax.lax.top_k(sharpen(z), 2)[0][0]
        return top[0] - top[1]

    assert lead(sure) > 8 * lead(unsure)


def test_sharpened_logits_have_finite_gradients():
    z = jnp.array([[1.0, 1.0, 1.0, 1.0], [5.0, -5.0, 0.0, 0.1]])
    assert jnp.all(jnp.isfinite(jax.jit(jax.jacobian(sharpened_logits))(z)))


# The page on all of them


def page():
    root = pathlib.Path(__file__).resolve().parent.parent
    return (root / "docs" / "smoothed-constructions.md").read_text()


def test_the_page_runs_as_it_stands():
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page(), re.S):
        exec(block, names)
    assert set(names["rule"]) <= {"smoothed", "lipschitz", "none"}
    logits = names["adaptive"](names["x"])
    np.testing.assert_allclose(logits, jax.nn.log_softmax(names["classify"](names["x"])), atol=1e-5)


def test_the_tables_of_the_page_are_recomputed():
    rows = re.findall(r"^\| ([\d., -]+(?: \| [\d.]+)+) \|$", page(), re.M)
    rows = [[[float(v) for v in cell.split(",")] for cell in row.split(" | ")] for row in rows]
    dual = [row for row in rows if len(row) == 5]
    mixes = [[cell[0] for cell in row] for row in rows if len(row) == 4]
    assert (len(dual), len(mixes)) == (2, 9)
    for z, signed, flip, clipped, root in dual:
        z = np.array(z)
        assert signed == flip == pytest.approx([z.sum() / math.sqrt(2)], abs=5e-4)
        assert clipped[0] == pytest.approx(np.maximum(z, 0).sum() / math.sqrt(2), abs=5e-4)
        assert root[0] == pytest.approx(np.linalg.norm(np.maximum(z, 0)), abs=5e-4)
    for p, a, published, here in mixes:
        assert published == pytest.approx(special.ndtri(a * p), abs=5e-4)
        assert here == pytest.approx(Mixed(Gaussian(1.0), a).radius(1 - p), abs=5e-4)
