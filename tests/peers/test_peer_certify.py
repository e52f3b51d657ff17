"""Votes and radii of the published procedure, a plain PyTorch loop, on the same weights."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
from scipy import stats

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _common  # noqa: E402
import certify  # noqa: E402

from jrobust import data, models, smoothing  # noqa: E402

pytestmark = pytest.mark.peers

PYTHON = BENCHMARKS.parent / ".venv-peer" / "bin" / "python"
RESNET = dataclasses.replace(
    certify.NETWORKS["resnet"], depth=8, images=10, check=200, batches=(100,)
)
DIGITS = dataclasses.replace(certify.NETWORKS["digits"], images=24, check=2000, batches=(512,))


def digits():
    """An untrained network, centred so that its votes are spread over the classes."""
    module, test = models.SmallCNN(), data.digits().test[: DIGITS.images]
    variables = module.init(jax.random.key(0), test.x[:1])
    variables["params"]["head"]["bias"] -= module.apply(variables, test.x).mean(0)
    return certify.Case(DIGITS, variables, test.x, test.y)


@pytest.fixture(scope="module", params=["digits", "resnet"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("certify")
    case = digits() if request.param == "digits" else certify.make_case(RESNET)
    with _common.Peer(PYTHON, BENCHMARKS / "_peer_certify.py") as peer:
        case.open(peer, folder)
        yield case, peer, folder


def test_votes_agree_and_so_do_radii_from_equal_counts(both):
    case, peer, folder = both
    checks = certify.same(case, peer, folder)
    _common.require(checks)
    assert len(checks) == 5
    # What the comparison of votes can see.
    n = case.settings.check
    ours = case.votes(n)
    assert np.all(ours.sum(1) == n)
    assert np.mean(ours.max(1) < n) > 0.3, "unanimous votes say nothing"
    noise = case.noise
    case.noise = smoothing.Gaussian(1.5 * case.settings.sigma)
    other = case.votes(n)
    case.noise = noise
    assert certify.p_value(ours, other) < certify.P_VALUE


@pytest.mark.parametrize("n", [100, 10_000, 100_000])
def test_radii_of_the_published_formula(both, n):
    _, peer, folder = both
    rng = np.random.default_rng(n)
    hits = np.concatenate([[n, n - 1, n // 2, 0], rng.integers(n // 2, n, 60)])
    estimate = np.stack([hits, n - hits, 0 * hits], 1)
    select = np.tile([9, 1, 0], (len(hits), 1))
    np.savez(folder / "radii.npz", select=select, estimate=estimate)
    peer.ask("certify", counts="radii.npz", alpha=0.001, out="radii-theirs.npz")
    with np.load(folder / "radii-theirs.npz") as arrays:
        theirs = dict(arrays)
    none = np.zeros((len(hits), 1), np.int64)
    ours = smoothing.certify(
        np.hstack([select, none]), np.hstack([estimate, none]), smoothing.Gaussian(0.25), 0.001
    )
    np.testing.assert_array_equal(ours.prediction, theirs["prediction"])
    np.testing.assert_allclose(ours.radius, theirs["radius"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.p_lower, theirs["p_lower"], rtol=1e-9, atol=0)
    assert ours.radius[0] == ours.radius.max() > 0.37
    assert np.sum(ours.prediction < 0) >= 2


def test_p_values_are_uniform_for_votes_of_one_distribution():
    rng = np.random.default_rng(0)
    chance = rng.dirichlet(np.full(10, 0.3), 12)
    chance[0] = np.eye(10)[3]

    def votes(p):
        return np.stack([rng.multinomial(400, row) for row in p])

    p = [certify.p_value(votes(chance), votes(chance)) for _ in range(400)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    moved = 0.9 * chance + 0.1 / 10
    assert np.median([certify.p_value(votes(chance), votes(moved)) for _ in range(20)]) < 1e-6
    assert certify.p_value(votes(chance[:1]), votes(chance[:1])) == 1
