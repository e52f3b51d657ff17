"""Votes and certificates against a torch forward pass, scipy and the paper's rules by hand."""

import numpy as np
import pytest
from jax import numpy as jnp

from jrobust import keys, smoothing

pytestmark = pytest.mark.peers

SIGMA, ALPHA = 0.25, 1e-3


def test_votes_are_the_predictions_of_the_same_noisy_inputs(peers, case):
    n, ids = 60, jnp.array([3, 1, 40, 17, 5, 8])
    x = case.x[:6]
    noise = smoothing.Gaussian(0.3)
    ours = np.asarray(smoothing.count_votes(case.key, case.model, x, noise, n, ids=ids))
    # Sample j of image i is drawn from fold_in(fold_in(key, id), j), whoever draws it.
    streams = [keys.fold(jnp.repeat(key, n), jnp.arange(n)) for key in keys.examples(case.key, ids)]
    draws = np.stack([[noise.sample(key, x.shape[1:]) for key in stream] for stream in streams])
    noisy = np.asarray(x)[:, None] + draws
    logits = peers.logits(noisy.reshape(-1, *x.shape[1:]))
    theirs = np.stack([np.bincount(v, minlength=11) for v in logits.argmax(-1).reshape(6, n)])
    two = np.sort(logits, -1)[:, -2:]
    ties = np.sum(two[:, 1] - two[:, 0] < 1e-4 * np.abs(logits).max())
    assert np.abs(ours - theirs).sum() <= 2 * ties <= 10
    assert np.sum(theirs.max(1) < n) >= 3, "votes differ, or the counts say nothing"


@pytest.mark.parametrize("n", [100, 10_000])
def test_certificates_are_those_of_the_paper(peers, n):
    rng = np.random.default_rng(n)
    p = rng.dirichlet(np.full(4, 0.3), 60)
    p[0] = [1, 0, 0, 0]
    p[1] = [0.5, 0.5, 0, 0]
    select = np.stack([rng.multinomial(50, row) for row in p])
    estimate = np.stack([rng.multinomial(n, row) for row in p])
    counts = peers.give("counts.npz", select=select, estimate=estimate)
    theirs = peers.get("certify", counts=counts, sigma=SIGMA, alpha=ALPHA)
    none = np.zeros((60, 1), int)
    ours = smoothing.certify(
        np.hstack([select, none]), np.hstack([estimate, none]), smoothing.Gaussian(SIGMA), ALPHA
    )
    np.testing.assert_array_equal(ours.prediction, theirs["prediction"])
    # Ours are rounded down, theirs to the tolerance of a root finder.
    np.testing.assert_allclose(ours.p_lower, theirs["p_lower"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ours.radius, theirs["radius"], rtol=1e-6)
    assert np.all(ours.radius <= theirs["radius"] + 1e-8)
    assert 5 < np.sum(ours.prediction == smoothing.ABSTAIN) < 50
    np.testing.assert_array_equal(
        smoothing.predict(np.hstack([estimate, none]), ALPHA), theirs["predict"]
    )
