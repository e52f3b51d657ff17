"""Noises: samplers against densities, radii against Neyman and Pearson, scipy and sixty digits."""

import decimal
import functools
import itertools
import math
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from test_smoothing import normal_cdf
from test_statistics import CONTEXT

from jrobust import smoothing
from jrobust._algorithm import describe
from jrobust.smoothing import (
    Converted,
    DiscreteGaussian,
    Exponential,
    Gaussian,
    Laplace,
    Masking,
    Pareto,
    Uniform,
    _discrete,
)

SIZE = 4
LINF1 = Exponential(0.25, SIZE)
L2 = Exponential(0.5, SIZE, "L2", "L2")
INF = Exponential(0.25, SIZE, "Linf", "Linf")
POLE = Exponential(0.5, SIZE, power=2.0, pole=1.0)
L1 = Exponential(0.5, SIZE, "L1", "L1")
GRID = DiscreteGaussian(0.375, SIZE, levels=16)
SMOOTH = {
    "Gaussian": Gaussian(0.5),
    "Uniform": Uniform(0.75),
    "Laplace": Laplace(0.5),
    "Pareto": Pareto(0.5),
    "Exponential L1": L1,
    "Exponential L2": L2,
    "Exponential Linf in L1": LINF1,
    "Exponential Linf": INF,
    "Exponential with a pole": POLE,
}
ALL = {
    **SMOOTH,
    "Converted": Converted(Gaussian(0.5), "Linf", SIZE),
    "DiscreteGaussian": GRID,
    "Masking": Masking(7, 21, fill=-1.0, pixels=False),
}


# Gamma variables take seconds to compile: one sampler is enough where the rule is another's.
NAMES = [pytest.param(n, marks=pytest.mark.full if n == "Exponential L1" else ()) for n in SMOOTH]


@functools.cache
def sampled(noise, size, n=100_000):
    run = jax.jit(jax.vmap(lambda key: noise.perturb(key, jnp.zeros(size))))
    return np.asarray(run(jax.random.split(jax.random.key(5), n)), np.float64)


def draws(name):
    """(100000, SIZE) float64 noisy copies of zero, by the sampler."""
    sampler = {"Exponential Linf": LINF1, "Converted": ALL["Gaussian"]}.get(name, ALL[name])
    return sampled(sampler, 21 if name == "Masking" else SIZE)


def log_density(name, t):
    """Up to a constant, from the definitions."""
    size = np.abs(t)
    if name == "Uniform":
        return np.where((size <= 0.75).all(1), 0.0, -np.inf)
    if name == "Pareto":
        return -4 * np.log1p(size / 0.5).sum(1)
    if name in ("Laplace", "Exponential L1"):
        return -size.sum(1) / 0.5
    if name == "Gaussian":
        return -(t * t).sum(1) / (2 * 0.5**2)
    if name == "Exponential L2":
        return -np.sqrt((t * t).sum(1)) / 0.5
    length = size.max(1)
    if name == "Exponential with a pole":
        return -np.log(length) - (length / 0.5) ** 2
    return -length / 0.25


# The rules that no set of points beats by less: radii of Neyman and Pearson.
TIGHT = {"Gaussian", "Uniform", "Laplace", "Exponential L1", "Exponential L2"}


@pytest.mark.parametrize("p", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("name", NAMES)
def test_the_worst_set_keeps_its_majority_at_the_radius(name, p):
    """Of all sets of probability p at x, the likelihood ratio's is the least likely at x'.

    With the sampler's own draws and the density from its definition: it also fails if these differ.
    """
    noise, t = ALL[name], draws(name)
    radius = float(noise.radius(1 - p))
    corner = np.ones(SIZE) * {"L1": 1 / SIZE, "L2": SIZE**-0.5, "Linf": 1.0}[noise.norm]
    worst = []
    for direction in (np.eye(SIZE)[0], corner):
        shift = radius * direction
        ratio = np.exp(log_density(name, t - shift) - log_density(name, t))
        # E ratio: the mass of the shifted noise where the other has some.
        overlap = (1 - radius / 1.5 * direction).prod() if name == "Uniform" else 1.0
        assert abs(ratio.mean() - overlap) < 5 * ratio.std() / math.sqrt(len(t)) + 1e-9
        # The set is what the shift makes less likely. Ties in the ratio are shared out by order.
        chosen = np.sort(ratio)[: round(p * len(t))]
        worst.append(chosen.sum() / len(t))
    error = 5 * ratio.std() / math.sqrt(len(t)) + 5 * 0.5 / math.sqrt(len(t))
    assert min(worst) > 0.5 - error
    if name in TIGHT:
        assert min(worst) < 0.5 + error


@pytest.mark.parametrize("name", sorted(TIGHT - {"Exponential L1"}))
def test_a_radius_that_is_too_large_fails_that_check(name):
    noise, t = ALL[name], draws(name)
    shift = 1.25 * float(noise.radius(0.2)) * np.eye(SIZE)[0]
    ratio = np.exp(log_density(name, t - shift) - log_density(name, t))
    assert np.sort(ratio)[: round(0.8 * len(t))].sum() / len(t) < 0.48


def test_oracles_of_all_votes_equal():
    n, alpha = 100_000, 0.001
    assert smoothing.ceiling(Uniform(1.0), n, alpha) == pytest.approx(0.99986185, rel=1e-8)
    assert smoothing.ceiling(Laplace(1.0), n, alpha) == pytest.approx(8.88716809, rel=1e-9)
    linf = smoothing.ceiling(Converted(Gaussian(0.5), "Linf", 3072), n, alpha)
    assert linf == pytest.approx(1.9057282817 / math.sqrt(3072), rel=1e-9)
    discrete = smoothing.ceiling(DiscreteGaussian(0.25, 3072), n, alpha)
    assert discrete == pytest.approx(0.9528641408, rel=1e-8)
    assert discrete < smoothing.ceiling(Gaussian(0.25), n, alpha)


QS = np.concatenate([np.logspace(-9, -0.31, 12), [0.01, 0.25, 0.4999]])


def test_radii_are_those_of_scipy():
    """Quantiles, or the differential method's integral of 1 / Phi, to 1e-9, never above."""
    scale, d = 0.5, 48
    b = (d - 1) / 2

    def pareto(q):  # Phi(p) = a / 2 (1 - (1 - 2 p)^(1 + 1 / a))
        phi = lambda p: 1.5 * -math.expm1(4 / 3 * math.log1p(-2 * p))  # noqa: E731
        cuts = [q, *(e for e in (1e-7, 1e-5, 1e-3, 0.1) if e > q), 0.5]
        pieces = itertools.pairwise(cuts)
        return sum(
            integrate.quad(lambda p: 1 / phi(p), *piece, epsrel=1e-13)[0] for piece in pieces
        )

    def linf(q):  # Phi(p) = min(p, 1 / (2 d))
        edge = 1 / (2 * d)
        return 2 * d * (0.5 - max(q, edge)) + math.log(edge / min(q, edge))

    cases = [
        (Gaussian(scale), stats.norm.isf),
        (Uniform(scale), lambda q: stats.uniform(-1, 2).isf(q)),
        (Laplace(scale), stats.laplace.isf),
        (Pareto(scale), pareto),
        (Exponential(scale, d, "L1", "L1"), stats.laplace.isf),
        (Exponential(scale, d, "Linf", "Linf"), stats.laplace.isf),
        (Exponential(scale, d), linf),
        (
            Exponential(scale, d, "L2", "L2"),
            lambda q: (d - 1) * math.atanh(math.sqrt(stats.beta(0.5, b).isf(2 * q))),
        ),
        (Exponential(scale, d, "L2", "L2", power=2.0), lambda q: stats.norm.isf(q) / 2**0.5),
        (
            Exponential(scale, d, power=4.0, pole=3.0),
            lambda q: 2 * d / (d - 1) * special.poch(11, 0.25) * (0.5 - q),
        ),
    ]
    for noise, z in cases:
        noise.check()
        expected = scale * np.array([z(q) for q in QS])
        radius = noise.radius(QS)
        np.testing.assert_allclose(radius, expected, rtol=1e-9, atol=1e-13, err_msg=str(noise))
        assert np.all(radius <= expected * (1 + 1e-10)), noise


def test_radii_are_rounded_down():
    for q in [float(q) for q in QS]:
        exact = Fraction(1) - 2 * Fraction(q)
        assert 0 < exact - Fraction(float(Uniform(1.0).radius(q))) < Fraction(1, 10**14)
        with decimal.localcontext(CONTEXT):
            log = -(2 * Decimal(q)).ln()
            assert 0 < log - Decimal(float(Laplace(1.0).radius(q))) < Decimal("1e-13")
    # Of the float32 scale that was drawn with.
    assert Uniform(0.7).radius(0.1) < 0.8 * 0.7 * (1 - 1e-8)


def test_a_bound_above_one_half_is_rounded_down_too():
    """There z is negative, and what is rounded is its size: with another bound they may cancel."""

    def towards_l1(p):
        return 3072 * (1 - 2 * p) if p >= 1 / Decimal(6144) else 3071 - (6144 * p).ln()

    cases = {
        Exponential(1.0, 3, "L2", "L2"): lambda p: ((1 - p) / p).ln(),
        Exponential(1.0, 3072): towards_l1,
        Exponential(1.0, 3072, power=0.5, pole=1536.0): lambda p: 3072 * 3070 * (1 - 2 * p),
    }
    pairs = itertools.product([0.625, 0.9, 0.999], [0.25, 0.3, 0.1, 1e-3, 1e-6])
    with decimal.localcontext(CONTEXT):
        for (noise, z), (q, runner) in itertools.product(cases.items(), pairs):
            top, other = -z(1 - Decimal(q)), z(Decimal(runner))
            less = (top + other) / 2 - Decimal(float(noise.radius(q, runner)))
            assert 0 < less < Decimal("1e-7") * (other - top), (noise, q, runner)


@pytest.mark.parametrize("name", ALL)
def test_what_every_radius_rule_promises(name):
    noise = ALL[name]
    noise.check()
    q = np.linspace(0, 1, 101)
    one = noise.radius(q)
    assert one.dtype == np.float64
    assert one.shape == q.shape
    assert np.all(np.diff(one[np.isfinite(one)]) <= 0)
    assert np.all(one[q >= 0.5] < 0)
    assert np.all(one[q < 0.49] >= 0)
    np.testing.assert_array_equal(noise.radius(q, q), one)
    two = noise.radius(q[:, None], np.minimum(q[:, None], q))
    assert two.shape == (101, 101)
    assert np.all(two >= one[:, None])
    # Where A has not half of the votes, but twice those of any other.
    assert noise.radius(0.6, 0.1) >= 0 > noise.radius(0.6)
    with pytest.raises(ValueError, match="q must be a probability"):
        noise.radius(1.2)
    with pytest.raises(ValueError, match="runner must be a probability"):
        noise.radius(0.2, np.nan)
    text = describe(noise)
    assert text["name"] == type(noise).__name__


def test_two_bounds_is_where_the_answers_meet():
    """P(A) falls and P(B) rises along a line until they are equal: by the distribution function."""
    a, b = 0.35, 0.1
    for noise, law in ((Gaussian(0.5), stats.norm(0, 0.5)), (Laplace(0.5), stats.laplace(0, 0.5))):
        r = float(noise.radius(1 - a, b))
        assert law.cdf(law.ppf(a) - r) == pytest.approx(law.cdf(law.ppf(b) + r), rel=1e-9)
    assert Uniform(0.5).radius(1 - a, b) == pytest.approx(0.5 * (a - b), rel=1e-12)


def test_marginals_are_those_of_scipy():
    laws = {
        "Gaussian": stats.norm(0, 0.5),
        "Uniform": stats.uniform(-0.75, 1.5),
        "Laplace": stats.laplace(0, 0.5),
    }
    for name, law in laws.items():
        assert stats.kstest(draws(name).ravel(), law.cdf).pvalue > 1e-4
    size = np.abs(draws("Pareto")).ravel() / 0.5
    assert stats.kstest(size, stats.lomax(3).cdf).pvalue > 1e-4
    lengths = np.abs(draws("Exponential with a pole")).max(1)
    # Length^2 / scale^2 is Gamma((size - pole) / 2).
    assert stats.kstest((lengths / 0.5) ** 2, stats.gamma(1.5).cdf).pvalue > 1e-4
    for name in laws:
        assert abs(np.corrcoef(draws(name).T)[0, 1]) < 0.02


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n.startswith("Exp") else ()) for n in ALL],
)
def test_a_draw_depends_on_its_key_alone(name):
    """One at a time, uncompiled, it is what it was among 100,000; to rounding where scaled."""
    noise, size = ALL[name], 21 if name == "Masking" else SIZE
    sampler = LINF1 if name == "Exponential Linf" else noise
    keys = jax.random.split(jax.random.key(5), 100_000)
    for i in (0, 77_777):
        alone = sampler.perturb(keys[i], jnp.zeros(size))
        np.testing.assert_allclose(alone, draws(name)[i], rtol=1e-5)
    assert not np.array_equal(draws(name)[0], draws(name)[1])


# The whole-number Gaussian


def test_masses_are_the_distribution_function():
    """2^64 P(D <= k), to the last unit, by another sum in sixty digits."""
    masses = _discrete._masses(0.375, 16)
    reach = len(masses) // 2
    assert reach == math.ceil(9.3 * 6)
    assert masses == masses[::-1]
    assert min(masses) >= 0
    assert sum(masses) == 2**64
    below = list(itertools.accumulate(masses))
    with decimal.localcontext(CONTEXT):
        for k in (0, 1, 5, 17, 30, 50, reach - 1):
            z = (k + Decimal("0.5")) / 6
            # Slope times the rounding of z to a double is far above a unit: correct for it.
            near = float(z)
            slope = (-z * z / 2).exp() / Decimal(2 * math.pi).sqrt()
            exact = (normal_cdf(near) + slope * (z - Decimal(near))) * 2**64
            assert abs(below[reach + k] - exact) <= Decimal("1.01")


def test_cells_hold_the_masses_exactly():
    for sigma, levels in ((0.375, 16), (0.5, 255), (0.01, 10)):
        masses = _discrete._masses(sigma, levels)
        kept, other = _discrete._cells(sigma, levels)
        full = 2**64 // len(kept)
        held = [0] * len(kept)
        for j, (own, alias) in enumerate(zip(kept.tolist(), other.tolist())):
            assert 0 <= own <= full
            held[j] += own
            held[alias] += full - own
        assert held == masses + [0] * (len(kept) - len(masses))


def test_bits_find_their_cell(monkeypatch):
    """The last bits below what a cell keeps are its own, the next ones the other outcome's."""
    kept, other = _discrete._cells(0.375, 16)
    full, reach = 2**64 // len(kept), math.ceil(9.3 * 6)
    for offset in (0, -1, 1):
        inside = [min(max(int(k) + offset, 0), full - 1) for k in kept]
        bits = [j * full + r for j, r in enumerate(inside)]
        words = jnp.array([[b >> 32 for b in bits], [b & (2**32 - 1) for b in bits]], jnp.uint32)
        monkeypatch.setattr(jax.random, "bits", lambda *_, words=words: words)
        own = np.array([r < int(k) for r, k in zip(inside, kept)])
        expected = np.where(own, np.arange(len(kept)), other) - reach
        np.testing.assert_array_equal(GRID.draw(jax.random.key(0), (len(kept),)), expected)


def test_whole_numbers_are_drawn_with_their_probabilities():
    steps = draws("DiscreteGaussian").ravel() * 16
    assert np.array_equal(steps, np.round(steps))
    edges = (np.arange(-20, 20) + 0.5) / 6
    p = np.diff(special.ndtr(edges), prepend=0, append=1)
    seen = np.bincount((np.clip(steps, -20, 20) + 20).astype(int), minlength=41)
    assert stats.chisquare(seen, p * steps.size).pvalue > 1e-4
    assert abs(steps.mean()) < 4 * 6 / math.sqrt(steps.size)


def test_the_model_sees_a_function_of_a_whole_number():
    """Of x and x' on the grid, the same draw gives copies that differ by x' - x exactly."""
    noise = DiscreteGaussian(0.05, SIZE)
    whole = np.array([[0, 7, 254, 255], [255, 0, 3, 128]])
    x = jnp.asarray(whole / 255, jnp.float32)
    copies = np.asarray(jax.vmap(noise.perturb, (None, 0))(jax.random.key(1), x), np.float64)
    steps = np.round(copies * 255)
    np.testing.assert_array_equal(copies, np.float32(steps) * np.float32(1 / 255))
    np.testing.assert_array_equal(steps[1] - steps[0], whole[1] - whole[0])


def test_inputs_off_the_grid_are_rejected(key):
    noise = DiscreteGaussian(0.05, SIZE)
    x = jnp.asarray(np.array([[0, 7, 254, 255], [0, 7, 254.5, 255]]) / 255, jnp.float32)
    votes = smoothing.count_votes(key, lambda v: v[:, :2], x, noise, 50)
    assert votes[:, 2].tolist() == [0, 50]


def test_what_the_sampler_differs_by_is_charged():
    small, large = DiscreteGaussian(0.5, 1), DiscreteGaussian(0.5, 2**23)
    assert large.radius(0.01) < small.radius(0.01) < Gaussian(0.5).radius(0.01)
    assert small.radius(0.0) < 5.0  # 2^-53 remains


# Random ablation


def test_radius_of_masking_by_enumeration():
    """Subsets of 2 of 7 locations that meet r given ones, against one half of the margin."""
    subsets = list(itertools.combinations(range(7), 2))
    seen = [Fraction(sum(min(s) < r for s in subsets), len(subsets)) for r in range(8)]
    noise = Masking(2, 7, pixels=False)
    for q in np.linspace(0, 0.6, 61):
        for runner in (q, q / 3):
            margin = (1 - Fraction(q) - Fraction(runner)) / 2
            best = max((r for r in range(8) if seen[r] < margin - Fraction(1, 10**12)), default=-1)
            assert noise.radius(q, runner) == best
    # Exactly at the edge is not below it: 1 - 2 q = 2 seen.
    edge = float((1 - 2 * seen[1]) / 2)
    assert noise.radius(edge + 1e-12) == 0
    assert noise.radius(edge - 1e-9) == 1


def test_masking_keeps_exactly_so_many_and_each_as_often():
    noise = Masking(3, 8, fill=-1.0)
    x = jnp.arange(16.0).reshape(2, 4, 2)
    copies = np.asarray(
        jax.jit(jax.vmap(noise.perturb, (0, None)))(jax.random.split(jax.random.key(2), 4000), x)
    )
    kept = (copies != -1).reshape(4000, 8, 2)
    assert np.all(kept[..., 0] == kept[..., 1]), "a pixel is kept whole"
    np.testing.assert_array_equal(
        copies[copies != -1], np.broadcast_to(x, copies.shape)[copies != -1]
    )
    assert np.all(kept[..., 0].sum(1) == 3)
    subsets, seen = np.unique(kept[..., 0], axis=0, return_counts=True)
    assert len(subsets) == math.comb(8, 3)
    assert stats.chisquare(seen).pvalue > 1e-4


def test_a_radius_of_no_location_is_a_proved_answer():
    noise = Masking(20, 21, pixels=False)  # one changed location is seen almost always
    result = smoothing.certify([1, 1], np.array([[10, 90, 0], [50, 50, 0]]), noise, 0.001)
    assert result.prediction.tolist() == [1, -1]
    assert result.radius.tolist() == [0.0, 0.0]
    assert result.accuracy([1, 1]) == 0.5


# Coverage


def problem(name, images):
    """Inputs, their signed margins and a classifier whose true radii are the margins' sizes."""
    noise, rng = ALL[name], np.random.default_rng(3)
    if name == "Masking":
        # A majority of the values that are kept; the smoothed answer is the majority of all 21.
        ones = rng.integers(5, 17, images)
        x = np.arange(21) < ones[:, None]
        # Changes that leave the majority, up to the half that makes a sign.
        margins = np.where(ones > 10, ones - 11 + 0.5, ones - 10 - 0.5)
        return x, margins, lambda v: (v == 1).sum(-1) - (v == 0).sum(-1)
    w = np.float32(np.ones(SIZE) if noise.norm == "Linf" else np.eye(SIZE)[0])
    if name == "DiscreteGaussian":
        steps = rng.integers(-10, 10, images)
        x, margins = steps[:, None] / 16 * w, (steps + 0.5) / 16
        return x, margins, lambda v: v @ w + 1 / 32
    spread = float(noise.radius(0.05))
    margins = rng.uniform(-spread, spread, images)
    return margins[:, None] * w, margins, lambda v: v @ w


def false_rate(name, margins, select, estimate):
    result = smoothing.certify(select, estimate, ALL[name], 0.05)
    answered, size = result.prediction >= 0, np.abs(margins)
    wrong = result.prediction != (margins > 0)
    false = answered & (wrong | (result.radius > size))
    assert answered.mean() > 0.4
    assert false.mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(margins))
    assert result.average_radius((margins > 0).astype(int)) > 0.1 * size.mean()
    return false.mean()


@pytest.mark.parametrize("name", [n for n in ALL if n != "Exponential L1"])
def test_coverage(name):
    """200 certificates from 400 draws each."""
    x, margins, score = problem(name, 200)
    t = draws(name).reshape(200, 500, -1)
    noisy = np.where(t == 0, x[:, None], t) if name == "Masking" else x[:, None] + t
    votes = score(noisy) > 0
    select, estimate = (
        np.stack([(~v).sum(1), v.sum(1), 0 * v.sum(1)], 1) for v in (votes[:, :100], votes[:, 100:])
    )
    false_rate(name, margins, select, estimate)


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_coverage_of_two_thousand_certificates(name, key):
    x, margins, score = problem(name, 2000)

    def logits_fn(v):
        s = score(v).astype(jnp.float32)
        return jnp.stack([-s, s], 1)

    @functools.partial(jax.jit, static_argnums=1)
    def votes(key, n):
        return smoothing.count_votes(key, logits_fn, jnp.asarray(x, jnp.float32), ALL[name], n)

    stages = smoothing.stages(key)
    rate = false_rate(name, margins, votes(stages.select, 20), votes(stages.estimate, 200))
    if name in ("Gaussian", "Uniform", "Laplace", "Exponential L1", "Converted"):
        assert rate > 0.01, "the bound is attained by half-spaces"


# Refusals


@pytest.mark.parametrize(
    ("noise", "match"),
    [
        (Uniform(0.0), "scale must be positive"),
        (Laplace(-1.0), "scale must be positive"),
        (Laplace(jnp.ones(2)), "scale must be a scalar"),
        (Pareto(1.0, tail=0.0), "tail must be positive"),
        (Exponential(1.0, 1), "an int >= 2"),
        (Exponential(1.0, 8, power=0.0), "need power > 0"),
        (Exponential(1.0, 8, pole=7.0), "pole < size - 1 = 7"),
        (Exponential(1.0, 8, "L2", "L2", power=3.0), "no closed radius is known"),
        (Exponential(1.0, 8, "L2", "L1"), "no closed radius is known"),
        (Exponential(1.0, 8, "Linf", "Linf", power=2.0), "no closed radius is known"),
        (Converted(Gaussian(0.0), "Linf", 8), "sigma must be positive"),
        (Converted(Gaussian(1.0), "L0", 8), "norms convert among"),
        (Converted(Masking(1, 8), "L1", 8), "norms convert among"),
        (Converted(Gaussian(1.0), "L1", 0), "size must be"),
        (DiscreteGaussian(0.0, 8), "sigma must be a positive"),
        (DiscreteGaussian(jnp.float32(0.5), 8), "Python number"),
        (DiscreteGaussian(0.5, 8.0), "size must be an int"),
        (DiscreteGaussian(0.5, 8, levels=0), "levels must be an int"),
        (DiscreteGaussian(100.0, 8), "the grid is too fine"),
        (Masking(0, 8), "need 0 < keep < size"),
        (Masking(8, 8), "need 0 < keep < size"),
        (Masking(2.0, 8), "keep must be an int"),
        (Masking(2, 8, fill=np.nan), "fill must be a finite number"),
    ],
)
def test_bad_parameters(noise, match):
    with pytest.raises(ValueError, match=match):
        smoothing.certify([1], np.array([[10, 90, 0]]), noise, 0.001)


@pytest.mark.parametrize(
    "noise",
    [LINF1, Converted(Gaussian(0.5), "Linf", SIZE), GRID, Masking(2, SIZE, pixels=False)],
)
def test_inputs_of_another_size_are_refused(noise, key):
    with pytest.raises(ValueError, match=rf"size={SIZE}\) is for inputs of {SIZE} .*size=5"):
        smoothing.count_votes(key, lambda v: v, jnp.zeros((2, 5)), noise, 10)
    with pytest.raises(ValueError, match=r"shape \(5,\) has no pixels: pass pixels=False"):
        smoothing.count_votes(key, lambda v: v, jnp.zeros((2, 5)), Masking(2, 5), 10)


@pytest.mark.parametrize("noise", [Uniform(1.0), Laplace(1.0), Pareto(1.0), LINF1])
def test_half_precision_is_refused(noise, key):
    with pytest.raises(ValueError, match="must be float32, got bfloat16"):
        noise.sample(key, (SIZE,), jnp.bfloat16)


def test_conversions():
    own = {"L1": Laplace(1.0), "L2": Gaussian(1.0), "Linf": Exponential(1.0, 9, "Linf", "Linf")}
    factor = {
        ("L1", "L2"): 1 / 3, ("L1", "Linf"): 1 / 9, ("L2", "Linf"): 1 / 3, ("L2", "L1"): 1,
        ("Linf", "L1"): 1, ("Linf", "L2"): 1, ("L2", "L2"): 1,
    }  # fmt: skip
    for (norm, to), by in factor.items():
        r = Converted(own[norm], to, 9).radius(0.1)
        assert r == pytest.approx(by * own[norm].radius(0.1), rel=1e-13)
        assert r <= by * own[norm].radius(0.1)
        assert Converted(own[norm], to, 9).norm == to
