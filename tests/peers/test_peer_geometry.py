"""Projections onto ball and box against AutoAttack's, foolbox's and float64 bisection."""

import numpy as np
import pytest

from jrobust import threat

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def points():
    """Inputs of which a third of the features lie on the box, and points far out and near."""
    rng = np.random.default_rng(0)
    x0 = np.clip(rng.uniform(-0.25, 1.25, (48, 5, 6)), 0, 1)
    scale = 10 ** rng.uniform(-2.5, 0.5, (48, 1, 1))
    x = x0 + scale * rng.normal(size=x0.shape) * (rng.uniform(size=x0.shape) < 0.7)
    return np.float32(x), np.float32(x0)


def projected(peers, points, eps):
    x, x0 = points
    found = peers.get("project", points=peers.give("points.npz", x=x, x0=x0), eps=eps)
    return {name: value.reshape(x.shape) for name, value in found.items()}


def norm(a, p):
    return np.linalg.norm(np.float64(a).reshape(len(a), -1), p, axis=1)


@pytest.mark.parametrize("eps", [0.1, 0.7, 2.0])
def test_l2_is_the_exact_projection(peers, points, eps):
    x, x0 = points
    ours = np.asarray(threat.L2(eps).project(x, x0))
    theirs = projected(peers, points, eps)
    np.testing.assert_allclose(ours, theirs["l2_bisection"], atol=2e-6 * max(1, eps))
    # foolbox (and torchattacks and AutoAttack) shrink and then clip: feasible, and never nearer.
    short = theirs["l2_foolbox"]
    assert np.all(norm(short - x0, 2) <= eps + 1e-6)
    nearer = norm(short - x, 2) - norm(ours - x, 2)
    assert np.all(nearer >= -1e-6)
    if eps < 2:
        assert np.mean(nearer > 1e-4) > 0.3


@pytest.mark.parametrize("eps", [0.2, 2.0, 8.0])
def test_l1_is_the_exact_projection(peers, points, eps):
    x, x0 = points
    ours = np.asarray(threat.L1(eps).project(x, x0))
    theirs = projected(peers, points, eps)
    np.testing.assert_allclose(ours, theirs["l1_bisection"], atol=2e-6 * max(1, eps))
    np.testing.assert_allclose(ours, theirs["l1_autoattack"], atol=1e-5 * max(1, eps))
    assert np.all(norm(ours - x0, 1) <= eps + 1e-6)
    assert np.mean(norm(ours - x0, 1) > 0.99 * eps) > 0.05
