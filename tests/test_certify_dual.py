"""Two halves in the certification loop, in stages and in plans."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jrobust import loops, parallel, smoothing
from jrobust.data import Dataset
from jrobust.drive import Host
from jrobust.models import Bound
from jrobust.smoothing import Gaussian, Half

KEY = jax.random.key(4)
ONE = parallel.mesh(jax.devices()[:1])
N, SIGMA, ALPHA = 6, 0.4, 0.05
MASK = smoothing.checkerboard(2, 2)
HALVES = smoothing.halves(Gaussian(SIGMA), MASK)
RNG = np.random.default_rng(0)


def linear(w, extra, x):
    """Products of a half's own pixels: filled ones have no say."""
    score = (x[..., 0] * w[None]).sum((1, 2))
    return jnp.stack([-score, score], 1)


W = np.array([[1.0, -0.5], [0.7, 1.2]], np.float32)
MODELS = tuple(Bound(jnp.asarray(W * half.mask), {}, linear) for half in HALVES)


def problem(n=N):
    x = np.random.default_rng(1).normal(0, 0.5, (n, 2, 2, 1)).astype(np.float32)
    weights = [W * half.mask for half in HALVES]
    scores = [(x[..., 0] * w).sum((1, 2)) / np.linalg.norm(w) for w in weights]
    distance = np.sum(scores, 0) / math.sqrt(2)
    return Dataset(x, (distance > 0).astype(int), 7 + np.arange(n)), distance


DATA, DISTANCE = problem()
COMMON = {"n0": 20, "n": 200, "alpha": ALPHA, "block": 50, "batch_size": 4, "box": None}
STAGED = {"n": None, "stages": (50, 200), "radius": 0.15}


def certify(directory=None, *, models=MODELS, data=DATA, noise=HALVES, **settings):
    settings = {**COMMON, "mesh": ONE, "progress": False, **settings}
    return loops.certify(KEY, models, data, noise, directory=directory, **settings)


def assert_same(one, two):
    for name, value in vars(one.certificate).items():
        np.testing.assert_array_equal(value, getattr(two.certificate, name), err_msg=name)
    np.testing.assert_array_equal(one.select_counts, two.select_counts)
    np.testing.assert_array_equal(one.estimate_counts, two.estimate_counts)


def false(certificate, distance):
    wrong = (certificate.prediction == 1) != (distance > 0)
    return (certificate.prediction >= 0) & (wrong | (certificate.radius > np.abs(distance)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dual")
    return directory, certify(directory)


def test_counts_of_both_halves_and_the_signed_rule(plain):
    _, found = plain
    keys, x, ids = smoothing.stages(KEY), jnp.asarray(DATA.x), jnp.asarray(DATA.id)

    def count(key, n):
        return [
            np.asarray(smoothing.count_votes(key, model, x, half, n, ids=ids))
            for model, half in zip(MODELS, HALVES)
        ]

    select, estimate = count(keys.select, 20), count(keys.estimate, 200)
    np.testing.assert_array_equal(found.select_counts, np.stack(select, 1))
    np.testing.assert_array_equal(found.estimate_counts, np.stack(estimate, 1))
    by_hand = smoothing.certify_dual(tuple(select), tuple(estimate), HALVES, ALPHA)
    for name in ("prediction", "radius", "p_lower", "count", "rejects", "n"):
        np.testing.assert_array_equal(getattr(found.certificate, name), getattr(by_hand, name))
    assert (found.certificate.prediction >= 0).sum() >= 3
    assert found.votes == 2 * N * 220
    assert found.certificate.radius.max() <= found.configuration["radius_ceiling"]
    assert found.certificate.norm == "L2"
    assert not false(found.certificate, DISTANCE).any()


RULES = {
    "another alpha": {"alpha": 0.003},
    "fewer votes": {"n": 100},
    "anytime": {"anytime": True},
    "stages": STAGED,
}


@pytest.mark.parametrize("change", RULES.values(), ids=RULES)
def test_the_log_of_halves_gives_what_a_run_would(plain, change):
    directory, base = plain
    again = loops.recertify(directory, **change)
    assert_same(certify(**change), again)
    assert np.any(again.certificate.radius != base.certificate.radius)


def test_halves_resume_and_are_what_they_were(plain, tmp_path):
    directory, base = plain
    settings = {**COMMON, **STAGED, "mesh": ONE}
    events = loops.certify.iter(KEY, MODELS, DATA, HALVES, directory=tmp_path, **settings)
    first = next(events)
    assert first.plan.votes <= 2 * N * 220
    events.close()
    again = certify(tmp_path, **STAGED)
    assert again.resumed == 1
    assert_same(again, certify(**STAGED))
    assert again.votes < base.votes
    other = Half(Gaussian(0.3), MASK), HALVES[1]
    for change, named in (
        ({"noise": other}, "noise"),
        ({"models": MODELS[::-1]}, "variables_sha256"),
        ({"noise": HALVES[0], "models": MODELS[0]}, "noise"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: .*{named}"):
            certify(directory, **change)
    assert_same(loops.recertify(directory, noise=HALVES), base)
    with pytest.raises(ValueError, match="the log is of the noise"):
        loops.recertify(directory, noise=other)


def test_masks_that_the_log_only_names_are_passed_again(tmp_path):
    wide = smoothing.halves(Gaussian(SIGMA), smoothing.checkerboard(9, 9))
    x = RNG.uniform(-1, 1, (4, 9, 9, 1)).astype(np.float32)

    def mean(x):
        score = x.mean((1, 2, 3))
        return np.stack([-score, score], 1)

    data = Dataset(x, np.zeros(4, int))
    found = certify(tmp_path, models=Host(mean), data=data, noise=wide, n=50)
    with pytest.raises(ValueError, match="by a digest: pass noise="):
        loops.recertify(tmp_path)
    assert_same(loops.recertify(tmp_path, noise=wide), found)


def test_halves_of_a_black_box(plain):
    rows = []

    def asked(model):
        def fn(x):
            rows.append(len(x))
            return np.asarray(model(x))

        return Host(fn)

    found = certify(models=tuple(map(asked, MODELS)), n=100)
    assert_same(found, loops.recertify(plain[0], n=100))
    assert sum(rows) == found.votes == 2 * N * 120


MISTAKES = {
    "top": ({"top": 2}, "top=, two_bounds=True and voter= are not for it"),
    "two bounds": ({"two_bounds": True}, "are not for it"),
    "a voter": ({"voter": MODELS[0], "pairs": 50}, "are not for it"),
    "one half": ({"noise": HALVES[:1]}, "two Half"),
    "noises": ({"noise": (Gaussian(1.0), Gaussian(1.0))}, "two Half"),
    "overlap": ({"noise": (HALVES[0], HALVES[0])}, "share a pixel"),
    "three models": ({"models": MODELS + MODELS[:1]}, "3 models and 2 noise"),
    "two models": ({"noise": Gaussian(1.0)}, "2 models and 1 noise"),
    "too few": ({"n": 10, "block": 10, "alpha": 0.001}, "11 in each are needed"),
    "a small stage": ({"n": None, "stages": (5, 200), "block": 5}, "in each are needed"),
    "a radius": ({**STAGED, "radius": 3.0}, "a radius of at most"),
    "grid": (
        {"noise": smoothing.halves(smoothing.DiscreteGaussian(0.2, 4), MASK)},
        "not on the grid",
    ),
}


@pytest.mark.parametrize(("change", "text"), MISTAKES.values(), ids=MISTAKES)
def test_halves_that_cannot_be(change, text, tmp_path):
    with pytest.raises((ValueError, TypeError), match=text):
        certify(tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


# Stages


class Votes:
    """Votes of linear classifiers of two halves, drawn in advance: prefixes are prefixes."""

    def __init__(self, seed, images, n):
        rng = np.random.default_rng(seed)
        z = rng.normal(0.3, 0.8, (images, 2))
        self.distance = z.sum(1) / math.sqrt(2)
        self.drawn = rng.random((images, 2, n), np.float32) < special.ndtr(z)[..., None]
        k = rng.binomial(50, special.ndtr(z))
        self.select = np.stack([50 - k, k, 0 * k], -1)
        self.cast = 0

    def __call__(self, rows, start, n):
        self.cast += len(rows) * n
        k = self.drawn[rows, :, start : start + n].sum(2)
        return np.stack([n - k, k, 0 * k], -1)


PAIR = smoothing.halves(Gaussian(1.0), MASK)


@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize("radius", [None, 0.5])
def test_coverage_of_staged_certificates_of_halves(radius, anytime):
    runs, stages = 600, (50, 200, 800)
    votes = Votes(3, runs, stages[-1])
    made = smoothing.certify_staged(
        votes.select, votes, PAIR, ALPHA, stages=stages, radius=radius, anytime=anytime
    )
    limit = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    assert false(made, votes.distance).mean() <= limit
    assert (made.prediction >= 0).mean() > 0.6
    assert set(np.unique(made.n)) == {2 * n for n in stages}
    assert votes.cast < (0.7 if radius else 1) * runs * stages[-1]
    # The best of certificates at a third of alpha each, of which each half gets a half.
    select = tuple(np.moveaxis(votes.select, 1, 0))
    share = ALPHA if anytime else ALPHA / 3
    looks = [
        smoothing.certify_dual(
            select,
            tuple(np.moveaxis(votes(np.arange(runs), 0, n), 1, 0)),
            PAIR,
            share,
            anytime=anytime,
        ).radius
        for n in stages
    ]
    best, goal = np.max(looks, axis=0), radius or 1e-12
    assert np.all(made.radius <= best)
    went = made.n == 2 * stages[-1]
    np.testing.assert_array_equal(made.radius[went], best[went])
    assert np.sum((looks[-1] >= goal) & (made.radius < goal)) <= 0.02 * runs


@pytest.mark.full
def test_coverage_of_many_looks_at_halves():
    """Twenty stages of which the best is kept: alpha split over them, and over the halves."""
    runs, stages = 2000, tuple(range(50, 1001, 50))
    limit = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    votes = Votes(5, runs, stages[-1])
    made = smoothing.certify_staged(votes.select, votes, PAIR, ALPHA, stages=stages)
    assert false(made, votes.distance).mean() <= limit
    # Twenty looks of which each spends too much would be seen here.
    every = [votes(np.arange(runs), 0, n) for n in stages]
    select = tuple(np.moveaxis(votes.select, 1, 0))
    naive = [smoothing.certify_dual(select, tuple(np.moveaxis(e, 1, 0)), PAIR, 0.3) for e in every]
    assert np.any([false(one, votes.distance) for one in naive], 0).mean() > 2 * limit


# The plan


def test_the_plan_of_halves():
    made = smoothing.plan(PAIR, 1000, 0.001, n0=10, images=3)
    q = -math.expm1(math.log(0.0005) / 1000)
    assert made.ceiling == pytest.approx(-2 * special.ndtri(q) / math.sqrt(2), rel=1e-9)
    assert (made.votes, made.norm, made.n) == (3 * 2 * 1010, "L2", 1000)
    for count, answer in ((made.least, 0), (made.least - 1, -1)):
        half = np.array([[count, 1000 - count, 0]])
        one = smoothing.certify_dual([0], (half, half), PAIR, 0.001)
        assert one.prediction.tolist() == [answer]
    p = special.ndtr(np.random.default_rng(0).normal(0.6, 0.7, (40, 2)))
    guess = smoothing.plan(PAIR, (100, 1000), 0.001, n0=0, radius=0.5, p=p)
    assert 100 < guess.votes / 2 < 1000
    assert 0 < guess.average_radius < guess.ceiling
    with pytest.raises(ValueError, match="p must be"):
        smoothing.plan(PAIR, 1000, 0.001, p=[0.9, 0.8])
    with pytest.raises(ValueError, match="11 in each"):
        smoothing.plan(PAIR, 10, 0.001)
