"""Smoothing: oracles, coverage on linear classifiers, and votes that depend on nothing else."""

import dataclasses
import decimal
import functools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special
from test_statistics import CONTEXT, ORACLE, one_minus, tail

from jrobust import drive, smoothing, statistics
from jrobust._algorithm import describe

ALPHA = 0.05


def normal_cdf(z: float) -> Decimal:
    """Phi(z) in sixty digits."""
    with decimal.localcontext(CONTEXT):
        z = Decimal(float(z))
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
        term = total = z
        i = 1
        while abs(term) > abs(total) * Decimal("1e-50"):
            term = term * z * z / (2 * i + 1)
            total += term
            i += 1
        return Decimal("0.5") + total * (-z * z / 2).exp() / (2 * pi).sqrt()


def counts(k, n, rejects=0):
    """Two-class counts with k votes for class 1."""
    k, n, rejects = np.broadcast_arrays(np.atleast_1d(k), n, rejects)
    return np.stack([n - k - rejects, k, rejects], axis=1)


SELECT_ONE = np.array([[1, 9, 0]])


# Certificates from counts


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(("k", "n", "alpha", "p", "z"), ORACLE)
def test_certify_oracle(k, n, alpha, p, z, sigma):
    result = smoothing.certify(SELECT_ONE, counts(k, n), smoothing.Gaussian(sigma), alpha)
    assert result.p_lower[0] == pytest.approx(p, rel=1e-9)
    assert result.selected.tolist() == [1]
    assert result.count.tolist() == [k]
    assert result.n.tolist() == [n]
    if z is None:
        assert result.prediction.tolist() == [-1]
        assert result.radius.tolist() == [0.0]
    else:
        assert result.prediction.tolist() == [1]
        # The table has ten decimals, so relative accuracy is meant where z is not small.
        assert result.radius[0] / sigma == pytest.approx(z, rel=1e-9, abs=3e-10)


@pytest.mark.parametrize(
    ("k", "n", "alpha"), [row[:3] for row in ORACLE if row[4] is not None and row[1] <= 100_000]
)
def test_radius_is_rounded_down_and_tight(k, n, alpha):
    """At the stated radius the exact test still rejects; a billionth of sigma beyond, it would not.

    Checked in sixty digits through Phi and the binomial tail, without their inverses.
    """
    radius = smoothing.certify(SELECT_ONE, counts(k, n), smoothing.Gaussian(1.0), alpha).radius[0]
    assert tail(k, n, normal_cdf(radius)) <= Decimal(alpha)
    assert tail(k, n, normal_cdf(radius + 1e-9)) > Decimal(alpha)


def test_gaussian_radius_is_below_the_exact_one():
    q = np.concatenate([np.logspace(-15, -0.31, 60), 0.5 - np.logspace(-15, -3, 20), [0.6, 0.9]])
    z = smoothing.Gaussian(1.0).radius(q)
    for qi, zi in zip(q, z):
        assert normal_cdf(zi) < one_minus(qi)
        assert normal_cdf(zi + 2e-14 * (1 + abs(zi))) > one_minus(qi)
    assert z.dtype == np.float64
    assert smoothing.Gaussian(1.0).radius(0.5) < 0 < smoothing.Gaussian(1.0).radius(0.499999)
    assert smoothing.Gaussian(1.0).radius([0.0, 1.0]).tolist() == [np.inf, -np.inf]


def test_radius_is_that_of_the_float32_sigma_that_was_drawn():
    assert np.float64(np.float32(0.7)) < 0.7
    z = smoothing.Gaussian(1.0).radius(0.01)
    drawn = np.float64(np.float32(0.7)) * z
    assert smoothing.Gaussian(0.7).radius(0.01) == pytest.approx(drawn, rel=1e-14)
    assert smoothing.Gaussian(0.7).radius(0.01) < 0.7 * z * (1 - 1e-8)
    assert smoothing.Gaussian(0.7).radius(0.01) == smoothing.Gaussian(jnp.float32(0.7)).radius(0.01)


def test_all_votes_equal_is_the_closed_form_and_the_ceiling():
    z_max = {100: 1.5005, 1000: 2.4633, 10**4: 3.1986, 10**5: 3.8115, 10**6: 4.3468}
    for n, z in z_max.items():
        ceiling = smoothing.ceiling(smoothing.Gaussian(1.0), n, 0.001)
        assert ceiling == pytest.approx(z, abs=5e-5)
        assert ceiling == pytest.approx(special.ndtri(0.001 ** (1 / n)), rel=1e-9)
        radius = smoothing.certify(SELECT_ONE, counts(n, n), smoothing.Gaussian(1.0), 0.001).radius[
            0
        ]
        assert ceiling * (1 - 1e-11) < radius <= ceiling
    for sigma, radius in {0.12: 0.4574, 0.25: 0.9529, 0.5: 1.9057, 1.0: 3.8115}.items():
        ceiling = smoothing.ceiling(smoothing.Gaussian(sigma), 10**5, 0.001)
        assert ceiling == pytest.approx(radius, abs=5e-5)


def test_a_radius_rule_above_the_ceiling_is_caught(monkeypatch):
    """The point estimate in place of the bound certifies more than n votes can."""
    monkeypatch.setattr(statistics, "clopper_pearson_upper", lambda k, n, alpha: k / n)
    with pytest.raises(AssertionError, match="above the ceiling"):
        smoothing.certify(SELECT_ONE, counts(999, 1000), smoothing.Gaussian(1.0), 0.001)


def test_abstention_thresholds():
    for k, n in ((66, 100), (550, 1000), (5156, 10**4), (50490, 10**5)):
        result = smoothing.certify(
            np.tile(SELECT_ONE, (2, 1)), counts([k, k - 1], n), smoothing.Gaussian(0.5), 0.001
        )
        assert result.prediction.tolist() == [1, -1]
        assert result.radius[0] > 0 == result.radius[1]
        assert result.selected.tolist() == [1, 1]
    for k, n in ((67, 100), (553, 1000), (5166, 10**4), (11, 11)):
        assert smoothing.predict(counts([k, k - 1], n), 0.001).tolist() == [1, -1]


def test_votes_that_could_only_abstain_are_refused():
    """Fewer than 11 votes never pass the test at 0.001, whatever they say."""
    with pytest.raises(ValueError, match=r"n = 10 votes always abstain .* at least n = 11"):
        smoothing.predict(counts(10, 10), 0.001)
    for alpha in (0.001, 0.05, 0.5, 2.0**-7):
        n = math.ceil(1 - math.log2(alpha))
        assert smoothing.predict(counts(n, n), alpha).tolist() == [1]
        assert statistics.binomial_test(n - 1, n - 1) > alpha
        with pytest.raises(ValueError, match="always abstain"):
            smoothing.predict(counts(n - 1, n - 1), alpha)


def test_rejects_count_against_the_top_class():
    noise = smoothing.Gaussian(0.5)
    select = np.tile(SELECT_ONE, (3, 1))
    result = smoothing.certify(select, counts(800, 1000, [0, 50, 200]), noise, 0.001)
    assert len(set(result.radius)) == 1
    assert result.rejects.tolist() == [0, 50, 200]
    dropped = smoothing.certify(SELECT_ONE, counts(800, 950), noise, 0.001)
    assert result.radius[1] < dropped.radius[0]
    # Rejects are never a class, in selection, estimation or prediction.
    mostly = smoothing.certify(np.array([[3, 4, 93]]), np.array([[0, 5, 95]]), noise, 0.001)
    assert (mostly.selected[0], mostly.prediction[0]) == (1, -1)
    assert smoothing.predict(np.array([[0, 5, 95], [3, 60, 37], [3, 80, 17]]), 0.001).tolist() == [
        -1,
        -1,
        1,
    ]


def test_selection_takes_the_lowest_index_on_ties_and_only_its_own_counts():
    select = np.array([[0, 5, 5, 0], [4, 3, 3, 0], [0, 0, 10, 0]])
    estimate = np.array([[0, 1, 99, 0], [99, 1, 0, 0], [0, 0, 100, 0]])
    result = smoothing.certify(select, estimate, smoothing.Gaussian(1.0), 0.001)
    assert result.selected.tolist() == [1, 0, 2]
    assert result.prediction.tolist() == [-1, 0, 2]
    assert result.count.tolist() == [1, 99, 100]


def test_predict_errs_with_at_most_alpha():
    """Summed over all counts with their probabilities, the worse class comes up alpha at most."""
    n, alpha = 50, 0.05
    k = np.arange(n + 1)
    wrong = smoothing.predict(counts(k, n), alpha) == 1
    for p in (0.5, 0.45, 0.3):
        pmf = np.exp(special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1))
        assert (pmf * p**k * (1 - p) ** (n - k)) @ wrong <= alpha / 2
    assert wrong.sum() > 10


def test_certified_accuracy_and_average_radius():
    noise = smoothing.Gaussian(0.5)
    k = np.array([1000, 900, 400, 980])
    result = smoothing.certify(np.tile(SELECT_ONE, (4, 1)), counts(k, 1000), noise, 0.001)
    y = np.array([1, 1, 1, 0])  # right, right, abstained, wrong
    radii = [0.0, result.radius[1], np.nextafter(result.radius[1], 2), 1.0, 9.0]
    assert result.accuracy(y, radii).tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert result.accuracy(y) == 0.5
    assert result.accuracy(y, np.zeros((2, 3))).shape == (2, 3)
    assert result.average_radius(y) == pytest.approx((result.radius[0] + result.radius[1]) / 4)
    assert result.norm == "L2"
    assert result.alpha == 0.001
    for name in ("radius", "p_lower"):
        assert getattr(result, name).dtype == np.float64
    for name in ("prediction", "selected", "count", "rejects", "n"):
        assert getattr(result, name).dtype == np.int64


def test_statement_over_the_test_set():
    result = smoothing.certify(
        np.tile(SELECT_ONE, (500, 1)), counts([90] * 500, 100), smoothing.Gaussian(0.5), 0.001
    )
    text = result.statement()
    assert "500 certificates" in text
    assert "0.5 are false in expectation" in text
    assert "at most 3 with 99% confidence" in text
    assert "at most 4 with 99.9% confidence" in result.statement(0.999)


# Votes


def mlp(x):
    w = jax.random.normal(jax.random.key(3), (6, 16))
    v = jax.random.normal(jax.random.key(4), (16, 4))
    return jnp.tanh(x.reshape(x.shape[0], -1) @ w) @ v


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(1), (6, 2, 3))


NOISE = smoothing.Gaussian(0.5)


def vote(key, x, n=150, fn=mlp, noise=NOISE, **kwargs):
    return np.asarray(smoothing.count_votes(key, fn, x, noise, n, **kwargs))


def test_counts_are_what_a_plain_loop_counts(key, images):
    votes = vote(key, images, 25)
    assert votes.shape == (6, 5)
    assert votes.dtype == np.int32
    expected = np.zeros_like(votes)
    for i in range(6):
        for j in range(25):
            sample_key = jax.random.fold_in(jax.random.fold_in(key, i), j)
            noisy = images[i] + 0.5 * jax.random.normal(sample_key, (2, 3))
            expected[i, int(mlp(noisy[None])[0].argmax())] += 1
    assert np.array_equal(votes, expected)
    assert len(np.unique(votes, axis=0)) == 6


@pytest.mark.parametrize("chunk", [1, 7, 149, 1000])
def test_counts_do_not_depend_on_chunk(key, images, chunk):
    votes = vote(key, images, chunk=chunk)
    assert np.array_equal(votes, vote(key, images))
    assert np.all(votes.sum(axis=1) == 150)


def test_counts_do_not_depend_on_batch_or_order(key, images):
    ids = jnp.array([40, 7, 0, 2**31 - 1, 12, 3])
    votes = vote(key, images, ids=ids)
    order = jnp.array([3, 0, 5, 2, 1, 4])
    assert np.array_equal(vote(key, images[order], ids=ids[order]), votes[order])
    for row in (0, 3):
        alone = vote(key, images[row : row + 1], ids=ids[row : row + 1], chunk=11)
        assert np.array_equal(alone[0], votes[row])
    assert not np.array_equal(vote(key, images), votes)


def test_counts_add_up_over_sample_ranges(key, images):
    whole = vote(key, images, 100)
    parts = vote(key, images, 37) + vote(key, images, 63, start=37, chunk=10)
    assert np.array_equal(whole, parts)
    assert not np.array_equal(vote(key, images, 50), vote(key, images, 50, start=50))
    # The last sample index that there is.
    assert vote(key, images, 3, start=2**32 - 3).sum() == 18


def test_stages_draw_apart(key, images):
    keys = smoothing.stages(key)
    assert keys.select == jax.random.fold_in(key, 0)
    assert keys.estimate == jax.random.fold_in(key, 1)
    assert not np.array_equal(vote(keys.select, images), vote(keys.estimate, images))


def test_default_chunk_is_bounded(key):
    """4,096 rows or 2^18 values in one forward pass, but at least one sample of each image."""
    rows = []

    def watch(x):
        rows.append(x.shape[0])
        return x.reshape(x.shape[0], -1)[:, :2]

    for shape, n, expected in (
        ((3, 4), 10**6, 3 * (4096 // 3)),
        ((3, 4), 5, 15),
        ((2, 2**14), 100, 16),
        ((5000, 2), 4, 5000),
    ):
        rows.clear()
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        jax.eval_shape(lambda x, n=n: smoothing.count_votes(key, watch, x, NOISE, n), x)
        assert set(rows) == {expected}


def test_a_black_box_votes_as_the_compiled_function_does(key):
    w = jnp.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])
    x, ids = jnp.linspace(-1, 1, 10).reshape(5, 2), jnp.array([7, 3, 11, 0, 2])
    asked = []

    def box(points):
        asked.append(len(points))
        return points @ np.asarray(w)

    how = {"start": 40, "ids": ids}
    counts = smoothing.count_votes(key, drive.Host(box), x, NOISE, 250, chunk=60, **how)
    compiled = smoothing.count_votes(key, lambda v: v @ w, x, NOISE, 250, **how)
    np.testing.assert_array_equal(counts, compiled)
    assert asked == [300] * 4 + [50], "nothing is asked for the tail of the last chunk"


def test_vote_fraction_of_a_linear_model_is_the_normal_cdf(key):
    """P(vote) = Phi(margin / sigma), within 4 standard errors, for several sigmas."""
    w = jnp.array([0.6, -0.8, 1.2])
    x = jnp.linspace(-1, 1, 10)[:, None] * w[None] / (w @ w)
    n = 4000
    for sigma in (0.3, 0.9):
        votes = vote(
            key,
            x,
            n,
            lambda x: jnp.outer(x @ w, jnp.array([0.0, 1.0])),
            noise=smoothing.Gaussian(sigma),
        )
        p = special.ndtr(np.linspace(-1, 1, 10) / np.linalg.norm(w) / sigma)
        assert np.all(np.abs(votes[:, 1] / n - p) <= 4 * np.sqrt(p * (1 - p) / n) + 1e-12)
        assert np.all(votes[:, 2] == 0)


def test_nonfinite_samples_are_rejected(key):
    """NaN or infinite logits beyond a threshold: rejected at the rate of the normal tail."""
    n = 4000
    x = jnp.zeros((3, 2))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):

        def fn(x, bad=bad):
            logits = jnp.tile(jnp.array([[0.0, 1.0, 5.0]]), (x.shape[0], 1))
            return logits.at[:, 1].set(jnp.where(x[:, 0] > 0.5, bad, 1.0))

        votes = vote(key, x, n, fn)
        p = special.ndtr(-1.0)
        assert np.all(votes.sum(axis=1) == n)
        assert np.all(votes[:, :2] == 0)
        assert np.all(np.abs(votes[:, 3] / n - p) <= 4 * math.sqrt(p * (1 - p) / n))


def test_nonfinite_draws_and_inputs_are_rejected(key):
    """A model that hides them, here by clipping, cannot make them votes."""
    fn = lambda x: jnp.clip(jnp.nan_to_num(x), -1, 1)  # noqa: E731
    x = jnp.array([[0.0, 1.0], [jnp.nan, 1.0], [0.0, -jnp.inf]])
    votes = vote(key, x, 50, fn)
    assert votes[:, 2].tolist() == [0, 50, 50]

    class Bursting(smoothing.Gaussian):
        def sample(self, key, shape, dtype=jnp.float32):
            return jnp.where(jax.random.bernoulli(key), jnp.inf, jnp.zeros(shape, dtype))

    votes = vote(key, x[:1], 400, fn, noise=Bursting(0.5))
    assert abs(votes[0, 2] - 200) <= 4 * 10


def test_model_may_compute_in_bfloat16(key, images):
    """Noise stays float32: only the model's own rounding moves votes."""
    seen = []

    def half(x):
        seen.append(x.dtype)
        return mlp(x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)

    votes = vote(key, images, 400, half)
    assert set(seen) == {jnp.dtype(jnp.float32)}
    moved = np.abs(votes - vote(key, images, 400)).sum(axis=1) / 2
    assert moved.max() < 0.05 * 400


def test_network_runs_at_highest_precision(key, images):
    seen = []

    def fn(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return mlp(x)

    vote(key, images, 3, fn)
    assert set(seen) == {"highest"}
    assert jax.config.jax_default_matmul_precision != "highest"


def test_no_retrace_on_new_values(key, images):
    traces = []

    @functools.partial(jax.jit, static_argnums=5)
    def run(key, weights, x, noise, start, n):
        def fn(x):
            traces.append(1)
            return x.reshape(x.shape[0], -1) @ weights

        return smoothing.count_votes(key, fn, x, noise, n, start=start)

    weights = jax.random.normal(key, (6, 3))
    first = run(key, weights, images, smoothing.Gaussian(0.5), 0, 20)
    before = len(traces)
    second = run(jax.random.key(8), -weights, 1 - images, smoothing.Gaussian(0.25), 64, 20)
    assert len(traces) == before
    assert not np.array_equal(first, second)
    eager = smoothing.count_votes(
        key, lambda x: x.reshape(x.shape[0], -1) @ weights, images, smoothing.Gaussian(0.5), 20
    )
    assert np.array_equal(first, eager)


def test_sigma_can_be_vmapped(key, images):
    sigmas = jnp.array([0.1, 0.5, 2.0])
    swept = jax.vmap(lambda s: smoothing.count_votes(key, mlp, images, smoothing.Gaussian(s), 30))
    each = [vote(key, images, 30, noise=smoothing.Gaussian(s)) for s in (0.1, 0.5, 2.0)]
    assert np.array_equal(swept(sigmas), np.stack(each))


def test_counts_do_not_depend_on_devices(key, images):
    """Sharded over images by jit and shard_map, and over samples with a traced start."""
    x = jnp.concatenate([images, 1 - images[:2]])
    expected = vote(key, x, 64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    run = lambda x: smoothing.count_votes(key, mlp, x, NOISE, 64)  # noqa: E731
    assert np.array_equal(jax.jit(run)(sharded), expected)

    def over_images(x, ids):
        return smoothing.count_votes(key, mlp, x, NOISE, 64, ids=ids)

    mapped = jax.shard_map(over_images, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    assert np.array_equal(jax.jit(mapped)(x, jnp.arange(8)), expected)

    def over_samples(x):
        start = 8 * jax.lax.axis_index("data")
        return jax.lax.psum(
            smoothing.count_votes(key, mlp, x, NOISE, 8, start=start, chunk=3), "data"
        )

    mapped = jax.shard_map(
        over_samples, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    assert np.array_equal(jax.jit(mapped)(x), expected)


# Coverage


def false_certificates(key, margins, n, certify=smoothing.certify, shared=False):
    """Rate of false certificates on a linear classifier, whose true radius is |margin|.

    Inputs lie at the signed distance ``margins`` from a hyperplane in four dimensions.
    """
    w = jnp.array([1.0, -2.0, 0.5, 1.5])
    b = 0.3
    foot = -b * w / (w @ w)
    x = foot[None] + jnp.asarray(margins, jnp.float32)[:, None] * (w / jnp.linalg.norm(w))[None]
    noise = smoothing.Gaussian(0.5)

    @functools.partial(jax.jit, static_argnums=1)
    def votes(key, n):
        return smoothing.count_votes(
            key, lambda x: jnp.stack([jnp.zeros(x.shape[0]), x @ w + b], 1), x, noise, n
        )

    keys = smoothing.stages(key)
    estimate = np.asarray(votes(keys.estimate, n))
    select = estimate.copy() if shared else np.asarray(votes(keys.select, 20))
    result = certify(select, estimate, noise, ALPHA)
    wrong = result.prediction != (margins > 0)
    false = (result.prediction >= 0) & (wrong | (result.radius > np.abs(margins)))
    return false.mean(), (result.prediction >= 0).mean()


def limit(images):
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / images)


MARGINS = np.random.default_rng(0).uniform(-0.7, 0.7, 2000)


def test_coverage_on_a_linear_classifier(key):
    """2,000 certificates at alpha = 0.05, false at most alpha + 3 standard errors.

    For a linear classifier the bound is attained, so a false rate near zero would be wrong too.
    """
    rate, answered = false_certificates(key, MARGINS, 200)
    assert answered > 0.7
    assert 0.01 < rate <= limit(2000)


def test_coverage_fails_without_the_confidence_bound(key, monkeypatch):
    """The same check refutes a certifier that takes the observed fraction for the probability."""
    monkeypatch.setattr(
        statistics, "clopper_pearson_upper", lambda k, n, alpha: np.clip(k / n, 0.02, 1)
    )
    rate, _ = false_certificates(key, MARGINS, 200)
    assert rate > 5 * limit(2000)


def test_coverage_fails_when_selection_and_estimation_share_samples(key):
    """On the boundary every certificate is false: fresh samples give alpha, shared ones twice."""
    boundary = np.zeros(2000)
    rate, _ = false_certificates(key, boundary, 200)
    assert rate <= limit(2000)
    rate, _ = false_certificates(key, boundary, 200, shared=True)
    assert rate > limit(2000)


# Refusals


class Half(smoothing.Gaussian):
    def sample(self, key, shape, dtype=jnp.bfloat16):
        return jax.random.normal(key, shape, dtype)


X = jnp.zeros((2, 3))


def call(key=None, fn=lambda x: x, x=X, noise=NOISE, n=10, **kwargs):
    key = jax.random.key(0) if key is None else key
    return smoothing.count_votes(key, fn, x, noise, n, **kwargs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, "float16", jnp.float64])
def test_noise_in_another_precision_is_refused(key, dtype):
    with pytest.raises(ValueError, match=r"must be float32, got .*float.*distinct values"):
        NOISE.sample(key, (3,), dtype)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"noise": Half(0.5)}, ValueError, "must be float32, got bfloat16"),
        ({"x": X.astype(jnp.bfloat16)}, TypeError, "x must be a float32 array, got bfloat16"),
        ({"x": np.zeros((2, 3))}, TypeError, "x must be a float32 array, got float64"),
        ({"x": np.zeros((2, 3), np.uint8)}, TypeError, "got uint8: noise is added in float32"),
        ({"x": [[0.0, 1.0]]}, TypeError, "x must be a float32 array, got list"),
        ({"x": X[:0]}, ValueError, "non-empty batch"),
        ({"n": 0}, ValueError, r"n must be a Python int in \[1, 2\^31\), got 0"),
        ({"n": 1.5}, ValueError, "n must be a Python int"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"chunk": 1.5}, ValueError, "chunk must be at least 1, a Python int"),
        ({"ids": np.array([5, 5 + 2**32])}, ValueError, "ids must fit in 32 bits"),
        ({"ids": np.array([-1, 2**32 - 1])}, ValueError, "ids must fit in 32 bits"),
        ({"start": -1}, ValueError, "start"),
        ({"start": 2**32 - 9}, ValueError, "start"),
        ({"start": 0.5}, TypeError, "start must be an integer"),
        ({"ids": jnp.arange(3)}, ValueError, r"ids must be integers of shape \(2,\)"),
        ({"ids": jnp.zeros(2)}, ValueError, "ids must be integers"),
        ({"fn": lambda x: x[:, 0]}, ValueError, "logits_fn must map"),
        ({"fn": lambda x: x[:, :1]}, ValueError, "C >= 2"),
        ({"fn": lambda x: x[:1]}, ValueError, "logits_fn must map"),
        ({"key": np.zeros(2, np.uint32)}, TypeError, "typed PRNG key"),
        ({"key": jax.random.key(0, impl="rbg")}, TypeError, "threefry"),
    ],
)
def test_bad_votes(kwargs, error, match):
    with pytest.raises(error, match=match):
        call(**kwargs)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 1e-60, 1e60])
def test_bad_sigma(sigma):
    with pytest.raises(ValueError, match="sigma must be positive and finite"):
        smoothing.certify(SELECT_ONE, counts(90, 100), smoothing.Gaussian(sigma), 0.001)


GOOD = counts(90, 100)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        (
            (SELECT_ONE, GOOD, smoothing.Gaussian(jnp.ones(2)), 0.001),
            ValueError,
            "must be a scalar",
        ),
        ((SELECT_ONE, counts(9, 9), NOISE, 0.001), ValueError, "at least n = 10 are needed"),
        ((SELECT_ONE, GOOD, NOISE, 0.0), ValueError, "alpha must lie strictly"),
        ((SELECT_ONE, GOOD, NOISE, 1.0), ValueError, "alpha must lie strictly"),
        ((GOOD, GOOD, NOISE, 0.001), ValueError, "the same array"),
        ((SELECT_ONE[:, :2], GOOD, NOISE, 0.001), ValueError, r"C >= 2.*got shape \(1, 2\)"),
        ((np.tile(SELECT_ONE, (2, 1)), GOOD, NOISE, 0.001), ValueError, "must have one shape"),
        ((SELECT_ONE, GOOD / 100, NOISE, 0.001), TypeError, "estimate_counts must be integer"),
        ((SELECT_ONE, GOOD - 20, NOISE, 0.001), ValueError, "non-negative"),
        ((0 * SELECT_ONE, GOOD, NOISE, 0.001), ValueError, "at least one sample"),
    ],
)
def test_bad_certificates(args, error, match):
    with pytest.raises(error, match=match):
        smoothing.certify(*args)


def test_smallest_n_is_exact():
    """At the n that the message names, and not below, unanimous votes certify."""
    for alpha in (0.001, 0.05, 0.5, 2.0**-7, 0.9):
        n = math.floor(math.log2(1 / alpha)) + 1
        assert smoothing.ceiling(NOISE, n, alpha) > 0
        assert n == 1 or smoothing.ceiling(NOISE, n - 1, alpha) <= 0
        assert smoothing.certify(SELECT_ONE, counts(n, n), NOISE, alpha).radius[0] > 0


def test_bad_labels_and_radii():
    result = smoothing.certify(SELECT_ONE, counts(10, 100), NOISE, 0.001)
    assert result.prediction.tolist() == [-1]
    for y in ([-1], [1.0], [1, 1], 1):
        with pytest.raises(ValueError, match="true labels"):
            result.accuracy(np.array(y))
    with pytest.raises(ValueError, match="radii must be at least 0"):
        result.accuracy(np.array([1]), -0.1)
    with pytest.raises(ValueError, match="q must be a probability"):
        NOISE.radius(1.2)


def test_gaussian_is_a_described_pytree():
    assert jax.tree.leaves(smoothing.Gaussian(0.25)) == [0.25]
    assert describe(smoothing.Gaussian(0.25)) == {"name": "Gaussian", "sigma": 0.25}
    with pytest.raises(dataclasses.FrozenInstanceError):
        smoothing.Gaussian(0.25).sigma = 1.0
