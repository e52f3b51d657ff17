"""Objectives for randomized smoothing: formulas in float64, their slopes, attacks, refusals.

The network's training pass gives 0.7 of the logits of its evaluation mode, so that every formula
tells which of them a term was computed in; it remembers the inputs of its last two passes.
"""

import json
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jrobust import smoothing, training
from jrobust.attacks import DDN, PGD
from jrobust.data import Dataset
from jrobust.loops._lanes import check_shared
from jrobust.models import Network
from jrobust.smoothing import Gaussian, Laplace, Masking
from jrobust.threat import L2, Linf
from jrobust.training import (
    CATRS,
    MACER,
    Consistency,
    DenoisedStability,
    Denoising,
    NoiseAugmentation,
    SmoothAdv,
    SmoothMix,
    Stability,
)
from jrobust.training._smoothed import _gap, noisy
from jrobust.zeroth_order import CGE

B, D, C, M, T = 6, 5, 3, 3, 4
KEY = jax.random.key(3)
SIGMA, EPS, ALPHA, REACH = 0.4, 0.3, 0.35, 0.6
RNG = np.random.default_rng(0)
X = np.float32(RNG.uniform(size=(B, D)))
Y = np.array([0, 1, 2, 0, 1, 2])
IDS = np.array([4, 9, 0, 7, 2, 5])
MASK = np.array([True, True, False, True, True, False])
BATCH = training.batch(X, Y, IDS, MASK)
TABLE = np.float32(RNG.dirichlet(np.ones(C), 10))
TABLE[9] = [0, 1, 0]
PARAMS = {
    "w1": np.float32(1.5 * RNG.normal(size=(D, 8))),
    "b1": np.float32(0.1 * RNG.normal(size=8)),
    "w2": np.float32(RNG.normal(size=(8, C))),
    "b2": np.float32(0.1 * RNG.normal(size=C)),
}
TRAIN = 0.7


def mlp(params, x):
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def spy_init(key, x):
    return PARAMS, {"seen": jnp.zeros_like(x), "before": jnp.zeros_like(x)}


def spy_train(params, extra, key, x):
    return TRAIN * mlp(params, x), {"seen": x, "before": extra["seen"]}


SPY = Network(spy_init, lambda params, extra, x: mlp(params, x), spy_train, lambda *_: {})
EXTRA = spy_init(KEY, X)[1]
NOISE = Gaussian(SIGMA)
PGD_L2 = PGD(L2(EPS, -1.0, 2.0), T, rel_step_size=2 / T, random_start=False, keep="last")
OBJECTIVES = {
    "NoiseAugmentation": NoiseAugmentation(NOISE, M),
    "Stability": Stability(NOISE, lbd=1.7, samples=M),
    "Consistency": Consistency(NOISE, lbd=3.0, eta=0.6, samples=M),
    "MACER": MACER(NOISE, lbd=2.0, gamma=2.5, beta=1.9, samples=M),
    "SmoothAdv": SmoothAdv(NOISE, PGD_L2, M),
    "SmoothMix": SmoothMix(NOISE, alpha=ALPHA, eta=2.0, steps=T, samples=M),
    "SmoothMix-1": SmoothMix(NOISE, ALPHA, 2.0, steps=2, samples=M, one_step=True, reach=REACH),
    "CATRS": CATRS(NOISE, TABLE, lbd=1.5, eps=EPS, steps=T, samples=M),
    "CATRS-own": CATRS(NOISE, lbd=1.5, eps=EPS, steps=1, samples=M),
}
# The same code as others', with other numbers.
LATER = ("SmoothMix", "CATRS-own")
every_objective = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n in LATER else ()) for n in OBJECTIVES]
)


@jax.jit
def program(objective, batch, params, key):
    return jax.value_and_grad(lambda p: objective(key, SPY, p, EXTRA, batch), has_aux=True)(params)


def value_and_grad(objective, batch, params=PARAMS, key=KEY):
    return program(objective, batch, params, key)


def close(a, b, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=atol), a, b)


# The same in float64


def net(p, x):
    return np.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def back(p, x, dz):
    """The gradient at the input x of the sum of dz times the evaluation logits."""
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    return ((dz @ p["w2"].T) * (1 - hidden**2)) @ p["w1"].T


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def log_softmax(z):
    return z - special.logsumexp(z, axis=-1, keepdims=True)


def ce(z, y):
    return -np.take_along_axis(log_softmax(z), np.broadcast_to(y, z.shape[:-1])[..., None], -1)[
        ..., 0
    ]


def train(p, points):
    return TRAIN * net(p, points)


def streams(branch):
    return [jax.random.fold_in(jax.random.fold_in(KEY, branch), int(i)) for i in IDS]


def draws(noise=NOISE, m=M):
    """(B, m, D): copy j of an example is sample j of its certificate under the key's branch 1."""
    return np.float64(
        [[noise.sample(jax.random.fold_in(k, j), (D,)) for j in range(m)] for k in streams(1)]
    )


E = draws()
P64 = jax.tree.map(np.float64, PARAMS)
X64 = np.float64(X)
ROWS = np.flatnonzero(MASK)


def smoothed_slope(p, x, e):
    """Gradient at x of -log mean_i softmax(f(x + e_i))_y."""
    q = np.exp(log_softmax(net(p, x[:, None] + e)))
    right = np.take_along_axis(q, np.broadcast_to(Y[:, None, None], (*q.shape[:2], 1)), -1)
    hot = np.eye(C)[Y][:, None]
    dz = -(right * (hot - q)) / right.sum(1, keepdims=True)
    return back(p, x[:, None] + e, dz).sum(1)


def smoothed_loss(p, x, e):
    return -np.log(np.exp(-ce(net(p, x[:, None] + e), Y[:, None])).mean(1))


def into_ball(x, x0, eps):
    length = np.linalg.norm(x - x0, axis=-1, keepdims=True)
    return x0 + (x - x0) * np.minimum(1, eps / np.maximum(length, 1e-30))


def attack_smoothadv():
    """Its box is too wide to matter."""
    x = X64
    for _ in range(T):
        x = into_ball(x + 2 * EPS / T * unit(smoothed_slope(P64, x, E)), X64, EPS)
    return x


def walk(x, steps):
    for _ in range(steps):
        x = np.clip(x + ALPHA * unit(smoothed_slope(P64, x, E)), 0, 1)
    return x


def attack_catrs(target, steps):
    e = E
    for _ in range(steps):
        q = np.exp(log_softmax(net(P64, X64[:, None] + e)))
        e = into_ball(e + 2 * EPS / steps * unit(back(P64, X64[:, None] + e, q - target)), E, EPS)
        e = (e - e.mean(-1, keepdims=True)) / e.std(-1, keepdims=True)
        e = E.mean(-1, keepdims=True) + e * E.std(-1, keepdims=True)
    return e


def plain(p):
    return ce(train(p, X64[:, None] + E), Y[:, None]).mean(1)


def stability(p):
    clean, moved = train(p, X64), train(p, X64[:, None] + E)
    cross = -(np.exp(log_softmax(clean))[:, None] * log_softmax(moved)).sum(-1)
    return ce(clean, Y) + 1.7 * cross.mean(1)


def consistency(p):
    logs = log_softmax(train(p, X64[:, None] + E))
    mean = np.exp(logs).mean(1)
    kl = (mean[:, None] * (np.log(mean)[:, None] - logs)).sum(-1).mean(1)
    return plain(p) + 3.0 * kl - 0.6 * (mean * np.log(mean)).sum(-1)


def macer(p):
    z = train(p, X64[:, None] + E)
    mean = np.exp(log_softmax(z)).mean(1)
    sharp = np.exp(log_softmax(1.9 * z)).mean(1)
    two = np.sort(sharp, -1)[:, -2:]
    gap = stats.norm.ppf(two[:, 1]) - stats.norm.ppf(two[:, 0])
    counts = (sharp.argmax(-1) == Y) & (gap <= 2.5)
    assert 0 < counts[MASK].sum() < MASK.sum(), "the hinge must matter"
    return -np.log(mean[np.arange(B), Y]) + 2.0 * SIGMA / 2 * np.where(counts, 2.5 - gap, 0)


ATTACKED = attack_smoothadv()
LAM = np.float64([jax.random.uniform(k, maxval=0.5) for k in streams(3)])[:, None]


def smoothadv(p):
    return ce(train(p, ATTACKED[:, None] + E), Y[:, None]).mean(1)


def smoothmix(first, steps, reach=1.0):
    start = walk(X64, first)
    far = walk(start, steps - first)
    x = into_ball(start, X64, reach * ALPHA)

    def loss(p):
        z = train(p, x[:, None] + E)
        mean = np.exp(log_softmax(z)).mean(1)
        target = ((1 - LAM) * mean + LAM / C)[:, None]
        mixed = log_softmax(train(p, ((1 - LAM) * x + LAM * far)[:, None] + E))
        kl = (target * (np.log(target) - mixed)).sum(-1).mean(1)
        right = mean.argmax(-1) == Y
        assert 0 < right[MASK].sum() < MASK.sum()
        return ce(z, Y[:, None]).mean(1) + 2.0 * right * kl

    return loss, x, (1 - LAM) * x + LAM * far


def catrs(soft, steps):
    worst = attack_catrs(soft[:, None], steps)
    chances = np.float64([jax.random.uniform(k, (M,)) for k in streams(3)])

    def loss(p):
        z = train(p, X64[:, None] + E)
        right = (z.argmax(-1) == Y[:, None]).mean(1)
        kept = np.maximum((chances < right[:, None]).sum(1), 1)
        low = np.where(np.arange(M) < kept[:, None], np.sort(ce(z, Y[:, None]), 1), 0).sum(1) / M
        logs = log_softmax(train(p, X64[:, None] + worst))
        kl = (special.xlogy(soft, soft)[:, None] - soft[:, None] * logs).sum(-1)
        assert 0 < (kept == M)[MASK].sum() < MASK.sum()
        return low + 1.5 * (kept == M) * kl.max(1)

    return loss, worst


OWN = np.exp(log_softmax(train(P64, X64[:, None] + E))).mean(1)
MIX, MIX1 = smoothmix(0, T), smoothmix(1, 2, REACH)
CAT, CAT1 = catrs(np.float64(TABLE)[IDS], T), catrs(OWN, 1)
FORMULAS = {
    "NoiseAugmentation": plain,
    "Stability": stability,
    "Consistency": consistency,
    "MACER": macer,
    "SmoothAdv": smoothadv,
    "SmoothMix": MIX[0],
    "SmoothMix-1": MIX1[0],
    "CATRS": CAT[0],
    "CATRS-own": CAT1[0],
}
# The inputs of the last two training passes, (B, M, D) or (B, D).
PASSES = {
    "NoiseAugmentation": (None, X64[:, None] + E),
    "Stability": (X64, X64[:, None] + E),
    "Consistency": (None, X64[:, None] + E),
    "MACER": (None, X64[:, None] + E),
    "SmoothAdv": (None, ATTACKED[:, None] + E),
    "SmoothMix": (X64[:, None] + E, MIX[2][:, None] + E),
    "SmoothMix-1": (MIX1[1][:, None] + E, MIX1[2][:, None] + E),
    "CATRS": (X64[:, None] + E, X64[:, None] + CAT[1]),
    "CATRS-own": (X64[:, None] + E, X64[:, None] + CAT1[1]),
}


@every_objective
def test_is_its_formula_and_its_slope_is_that_of_the_formula(name):
    (value, (seen, metrics)), grads = value_and_grad(OBJECTIVES[name], BATCH)
    before, last = PASSES[name]
    np.testing.assert_allclose(seen["seen"], last.reshape(-1, D), atol=2e-5)
    before = np.zeros_like(X) if before is None else before.reshape(-1, D)
    np.testing.assert_allclose(seen["before"], before, atol=2e-5)

    def formula(p):
        return FORMULAS[name](p)[MASK].mean()

    np.testing.assert_allclose(value, formula(P64), rtol=2e-5)
    assert all(np.ndim(metric) == 0 and np.isfinite(metric) for metric in metrics.values())
    rng = np.random.default_rng(1)
    for _ in range(3):
        way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), P64)
        ahead = formula(jax.tree.map(lambda a, v: a + 1e-6 * v, P64, way))
        behind = formula(jax.tree.map(lambda a, v: a - 1e-6 * v, P64, way))
        slope = (ahead - behind) / 2e-6
        found = sum(np.sum(np.float64(grads[k]) * way[k]) for k in grads)
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(found, slope, rtol=2e-4)


@every_objective
def test_order_and_rows_that_fill_do_not_count(name):
    order = np.array([3, 0, 5, 1, 2, 4])
    moved = jax.tree.map(lambda leaf: leaf[order], BATCH)
    fill = ~MASK[:, None]
    other = BATCH._replace(
        x=jnp.where(fill, 0.3, BATCH.x), y=jnp.where(MASK, Y, 1), id=jnp.where(MASK, IDS, 1)
    )
    (value, (_, metrics)), grads = value_and_grad(OBJECTIVES[name], BATCH)
    for batch in (moved, other):
        (same, (_, same_metrics)), same_grads = value_and_grad(OBJECTIVES[name], batch)
        close((same, same_metrics, same_grads), (value, metrics, grads))


@pytest.mark.full
@pytest.mark.parametrize("name", ["MACER", "SmoothMix-1", "CATRS"])
def test_one_hot_labels_are_hard_labels(name):
    hot = BATCH._replace(y=jax.nn.one_hot(BATCH.y, C))
    close(value_and_grad(OBJECTIVES[name], hot), value_and_grad(OBJECTIVES[name], BATCH))


@every_objective
def test_the_key_decides_all_noise_and_numbers_are_leaves(name):
    first, again = (value_and_grad(OBJECTIVES[name], BATCH)[0][0] for _ in range(2))
    assert first == again
    assert first != value_and_grad(OBJECTIVES[name], BATCH, key=jax.random.key(4))[0][0]
    traced = jax.tree.map(lambda leaf: 1.1 * leaf, OBJECTIVES[name])
    assert jax.tree.structure(traced) == jax.tree.structure(OBJECTIVES[name])
    expected = {"NoiseAugmentation": 1, "Stability": 2, "Consistency": 3, "MACER": 4}
    expected |= {"SmoothAdv": 5, "CATRS": 4, "CATRS-own": 3}  # with eps, lo, hi, step size
    expected |= {"SmoothMix": 6, "SmoothMix-1": 6}
    assert len(jax.tree.leaves(traced)) == expected[name]


@pytest.mark.parametrize("name", ["SmoothMix-1", "CATRS-own"])
def test_draws_are_float32_where_the_default_is_float64(name):
    objective = OBJECTIVES[name]
    with jax.enable_x64(True):
        text = str(jax.make_jaxpr(lambda p: objective(KEY, SPY, p, EXTRA, BATCH)[0])(PARAMS))
    assert "bit_width=32" in text
    assert "bit_width=64" not in text


def test_copies_are_the_samples_of_the_certificate():
    """count_votes under the same key draws what the objectives draw."""
    key, side = jax.random.fold_in(KEY, 1), (X64[:, None] + E)[..., 0] > 0.5

    def vote(x):
        return jnp.stack([x[:, 0], jnp.full(x.shape[0], 0.5)], 1)

    counts = smoothing.count_votes(key, vote, jnp.asarray(X), NOISE, M, ids=jnp.asarray(IDS))
    np.testing.assert_array_equal(counts[:, 0], side.sum(1))
    assert 0 < side.sum() < side.size


def test_any_noise_augments():
    masking = Masking(2, D, pixels=False, fill=-1.0)
    kept, laplace = jax.jit(lambda: [noisy(KEY, n, BATCH, M) for n in (masking, Laplace(0.1))])()
    assert np.all((kept == X[:, None]).sum(-1) == 2)
    assert len(np.unique(np.asarray(laplace - X[:, None]).round(6))) == laplace.size


# The attacks inside


def smoothed_logits(x):
    points = x[:, None] + jnp.float32(E)
    logs = jax.nn.log_softmax(mlp(PARAMS, points.reshape(-1, D)).reshape(B, M, C))
    return jax.nn.logsumexp(logs, 1) - np.log(M)


def test_smoothadv_raises_the_smoothed_loss_inside_the_ball():
    (_, (seen, _)), _ = value_and_grad(OBJECTIVES["SmoothAdv"], BATCH)
    x = np.float64(seen["seen"]).reshape(B, M, D) - E
    assert np.ptp(x, axis=1).max() < 1e-6, "one point for all copies"
    x = x[:, 0]
    length = np.linalg.norm(x - X64, axis=1)
    assert np.all(length <= EPS * (1 + 1e-5))
    assert np.all(length >= 0.9 * EPS)
    assert np.all(smoothed_loss(P64, x, E) > smoothed_loss(P64, X64, E))


def test_smoothadv_with_ddn_draws_far_points_in_to_the_ball():
    eps = 0.25
    objective = SmoothAdv(NOISE, DDN(L2(eps), steps=30, init_norm=0.3), M)
    (value, (seen, metrics)), _ = value_and_grad(objective, BATCH)
    x = (np.float64(seen["seen"]).reshape(B, M, D) - E).mean(1)
    length = np.linalg.norm(x - X64, axis=1)
    assert np.all(length <= eps * (1 + 1e-5))
    mean = np.exp(log_softmax(net(P64, x[:, None] + E))).mean(1)
    fooled, rim = mean.argmax(-1) != Y, length > 0.999 * eps
    assert np.all(fooled | rim), "the closest, or on the way to it"
    assert (rim & ~fooled).any(), "found beyond the ball"
    assert (fooled & ~rim & (length > 0)).any(), "found inside"
    losses = ce(train(P64, x[:, None] + E), Y[:, None])
    np.testing.assert_allclose(value, losses.mean(1)[MASK].mean(), rtol=1e-4)
    assert 0 <= metrics["robust_accuracy"] < 1


def test_catrs_keeps_mean_and_deviation_of_each_draw():
    (_, (seen, _)), _ = value_and_grad(OBJECTIVES["CATRS"], BATCH)
    e = np.float64(seen["seen"]).reshape(B, M, D) - X64[:, None]
    np.testing.assert_allclose(e.mean(-1), E.mean(-1), atol=1e-6)
    np.testing.assert_allclose(e.std(-1), E.std(-1), rtol=1e-5)
    assert np.abs(e - E).max() > 0.05


def test_catrs_keeps_a_binomial_number_of_terms():
    """Copies are right with probability 1/2: of two, both count in E[(r / 2)^2] = 3/8."""
    n = 4000
    side = Network(
        lambda key, x: ({}, {}),
        lambda params, extra, x: jnp.stack([x[:, 0], -x[:, 0]], 1),
        lambda params, extra, key, x: (jnp.stack([x[:, 0], -x[:, 0]], 1), extra),
        lambda *_: {},
    )
    objective = CATRS(Gaussian(1.0), lbd=0.0, steps=1, samples=2)
    batch = training.batch(np.zeros((n, 2), np.float32), np.zeros(n, int))
    _, (_, metrics) = jax.jit(lambda b: objective(KEY, side, {}, {}, b))(batch)
    assert abs(metrics["confident"] - 3 / 8) < 4 * np.sqrt(3 / 8 * 5 / 8 / n)
    assert abs(metrics["accuracy"] - 1 / 2) < 4 * np.sqrt(1 / 8 / n)


def test_catrs_takes_its_mask_from_the_predictions():
    """The model is always wrong; half the inputs have confidence 1, the others 0.6: of two copies
    both count, in any case and with chance 0.36; of one the smaller loss alone."""
    n = 4000
    wrong = Network(
        lambda key, x: ({}, {}),
        lambda params, extra, x: jnp.stack([-9 - x[:, 0], 9 + x[:, 0]], 1),
        lambda params, extra, key, x: (jnp.stack([-9 - x[:, 0], 9 + x[:, 0]], 1), extra),
        lambda *_: {},
    )
    table = np.float32(np.tile([[1.0, 0.0], [0.6, 0.4]], (n // 2, 1)))
    objective = CATRS(Gaussian(1.0), table, 0.0, steps=1, samples=2, confidence_mask=True)
    batch = training.batch(np.zeros((n, 2), np.float32), np.zeros(n, int))
    value, (_, metrics) = jax.jit(lambda b: objective(KEY, wrong, {}, {}, b))(batch)
    assert metrics["accuracy"] == 0
    share = (1 + 0.36) / 2
    assert abs(metrics["confident"] - share) < 4 * np.sqrt(0.36 * 0.64 / 2 / n)
    # A loss is 18 + 2 e with e standard normal; the smaller of two e is -1 / sqrt(pi) on average.
    expected = share * 18 + (1 - share) * (18 - 2 / np.sqrt(np.pi)) / 2
    assert abs(value - expected) < 4 * 6.5 / np.sqrt(n)


def test_catrs_refuses_to_guess_predictions_it_has_not():
    missing = BATCH._replace(id=jnp.where(IDS == 9, 10, IDS))
    assert np.isnan(value_and_grad(OBJECTIVES["CATRS"], missing)[0][0])


def test_catrs_takes_a_prediction_for_each_example_of_a_loop():
    data = Dataset(X, Y, IDS)
    check_shared(CATRS(NOISE, TABLE[:B]), data)  # as many rows as examples, and read by their ids
    with pytest.raises(ValueError, match="lbd has a value for each"):
        check_shared(CATRS(NOISE, TABLE[:B], lbd=np.ones(B)), data)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 0.0])
def test_macer_is_finite_however_sure_the_model(scale):
    """At 1e4 probabilities are exactly 0 and 1; at 0 all are equal."""
    params = {
        **PARAMS,
        "w2": np.float32(scale) * PARAMS["w2"],
        "b2": np.float32(scale) * PARAMS["b2"],
    }
    found = value_and_grad(OBJECTIVES["MACER"], BATCH, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_macer_reaches_radii_that_float32_probabilities_do_not_tell():
    """p1 rounds to 1 in float32 from 5.4 sigma on; the gap and its slope do not care."""

    q = special.expit(-24.0)
    value, slope = jax.value_and_grad(lambda z: _gap(*2 * [jax.nn.sigmoid(-z)]))(24.0)
    z = stats.norm.ppf(q)
    np.testing.assert_allclose(value, -2 * z, rtol=1e-4)
    np.testing.assert_allclose(slope, 2 * q * (1 - q) / stats.norm.pdf(z), rtol=1e-3)


# Denoisers

DENOISER = Network(
    lambda key, x: ({"w": jnp.eye(D)}, {}),
    lambda params, extra, x: x @ params["w"],
    lambda params, extra, key, x: (TRAIN * x @ params["w"], extra),
    lambda *_: {},
)
WEIGHTS = {"w": np.float32(np.eye(D) + 0.3 * RNG.normal(size=(D, D)))}
CLASSIFIER = SPY.bind(PARAMS, EXTRA)


@jax.jit
def denoiser_step(objective, weights=WEIGHTS):
    return jax.value_and_grad(lambda w: objective(KEY, DENOISER, w, {}, BATCH), has_aux=True)(
        weights
    )


def test_denoising_is_the_mean_squared_error():
    (value, (extra, metrics)), grads = denoiser_step(Denoising(NOISE, M))
    points = X64[:, None] + E
    errors = TRAIN * points @ np.float64(WEIGHTS["w"]) - X64[:, None]
    np.testing.assert_allclose(value, (errors[MASK] ** 2).mean(), rtol=1e-5)
    slope = np.einsum("bmi,bmj->ij", points[MASK], 2 * TRAIN * errors[MASK])
    np.testing.assert_allclose(grads["w"], slope / errors[MASK].size, rtol=1e-4, atol=1e-6)
    assert (extra, metrics) == ({}, {})


def test_denoised_stability_asks_for_the_clean_answer():
    (value, (_, metrics)), grads = denoiser_step(DenoisedStability(NOISE, CLASSIFIER, samples=M))
    points = X64[:, None] + E
    images = TRAIN * points @ np.float64(WEIGHTS["w"])
    answers = net(P64, X64).argmax(-1)
    assert np.any(answers[MASK] != Y[MASK])
    logits = net(P64, images)
    np.testing.assert_allclose(value, ce(logits, answers[:, None]).mean(1)[MASK].mean(), rtol=1e-5)
    dz = np.exp(log_softmax(logits)) - np.eye(C)[answers][:, None]
    slope = np.einsum("bmi,bmj->ij", points[MASK], TRAIN * back(P64, images, dz)[MASK])
    np.testing.assert_allclose(grads["w"], slope / (MASK.sum() * M), rtol=1e-3, atol=1e-5)
    hit = (logits.argmax(-1) == answers[:, None])[MASK].mean()
    np.testing.assert_allclose(metrics["agreement"], hit, rtol=1e-6)
    # Through queries alone, the same up to the difference quotient's error.
    asked = DenoisedStability(NOISE, CLASSIFIER, CGE(1e-2), samples=M)
    (same, _), estimate = denoiser_step(asked)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    np.testing.assert_allclose(estimate["w"], grads["w"], rtol=0.1, atol=5e-3)
    assert np.abs(estimate["w"] - grads["w"]).max() > 0


def test_denoised_votes_are_those_of_the_composition():
    key, n = jax.random.key(5), 60
    noise = Gaussian(0.3)
    constant = jax.tree_util.Partial(lambda to, x: jnp.broadcast_to(to[None], x.shape), X[1])

    model = smoothing.denoised(DENOISER.bind(WEIGHTS, {}), CLASSIFIER)
    np.testing.assert_allclose(model(X), net(P64, X64 @ np.float64(WEIGHTS["w"])), rtol=1e-4)
    assert len(jax.tree.leaves(model)) == 1 + 4 + 2
    shown = smoothing.count_votes(
        key, smoothing.denoised(constant, CLASSIFIER), jnp.asarray(X), noise, n
    )
    assert np.all(shown[:, int(net(P64, X64[1]).argmax())] == n)
    certified = smoothing.certify(np.asarray(shown).argmax(1), shown, noise, 0.001)
    np.testing.assert_allclose(certified.radius, smoothing.ceiling(noise, n, 0.001))


COSINE = np.cos(np.linspace(0.01, 1.56, 400)) ** 2


@pytest.mark.parametrize("prediction", ["x0", "noise"])
def test_diffusion_gives_the_model_the_noise_level_that_it_knows(prediction):
    """An oracle of the clean image sees sqrt(a_t)-images with noise sqrt(1 - a_t) and undoes it."""
    sigma, image = 0.25, jnp.array([[0.2, 0.9, 0.5]])
    seen = {}

    def model(z, t):
        a = jnp.float32(COSINE)[t][:, None]
        seen.update(z=z, t=t)
        clean = jnp.broadcast_to(2 * image - 1, z.shape)
        return clean if prediction == "x0" else (z - adapter.gain * clean) / jnp.sqrt(1 - a)

    adapter = smoothing.diffusion_denoiser(
        model, sigma, alphas_cumprod=COSINE, prediction=prediction
    )
    e = jax.random.normal(KEY, (20_000, 3))
    out = adapter(image + sigma * e)
    np.testing.assert_allclose(out, np.broadcast_to(image, out.shape), atol=1e-5)
    a = COSINE[seen["t"][0]]
    noise = np.asarray(seen["z"]) - np.asarray(adapter.gain * (2 * image - 1))
    np.testing.assert_allclose(noise.std(), np.sqrt(1 - a), rtol=0.02)
    # The nearest timestep: half a step away at most, which is what the contrast is off by.
    ratios = np.sqrt((1 - COSINE) / COSINE) / (2 * sigma)
    assert np.argmin(np.abs(np.log(ratios))) == adapter.level
    np.testing.assert_allclose(adapter.gain / adapter.signal, ratios[adapter.level], rtol=1e-6)
    np.testing.assert_allclose(adapter.signal, np.sqrt(a), rtol=1e-6)
    assert adapter.sigma == sigma


def test_diffusion_by_noise_level_is_told_twice_sigma():
    def shrink(z, level):
        assert level.shape == (4,)
        return z / (1 + level[:, None] ** 2)

    adapter = smoothing.diffusion_denoiser(shrink, 0.5)
    x = jnp.float32(RNG.uniform(-0.5, 1.5, (4, D)))
    expected = (np.clip((2 * x - 1) / 2, -1, 1) + 1) / 2
    np.testing.assert_allclose(jax.jit(lambda a, x: a(x))(adapter, x), expected, rtol=1e-6)
    towards = smoothing.diffusion_denoiser(lambda z, level: 0.5 * z, 0.5, prediction="noise")
    expected = (np.clip(0.5 * (2 * x - 1), -1, 1) + 1) / 2
    np.testing.assert_allclose(towards(x), expected, rtol=1e-6)


# Mistakes


def check(objective):
    objective.check(X, Y, C)


MISTAKES = {
    "a number for noise": (lambda: check(NoiseAugmentation(0.25)), TypeError, "smoothing.Gaussian"),
    "a noise class": (lambda: check(NoiseAugmentation(Gaussian)), TypeError, "must be a noise"),
    "no sigma": (lambda: check(Consistency(Gaussian(0.0))), ValueError, "sigma must be positive"),
    "no copies": (lambda: check(NoiseAugmentation(NOISE, 0)), ValueError, "samples must be an int"),
    "one copy to agree with itself": (
        lambda: check(Consistency(NOISE, samples=1)),
        ValueError,
        "Consistency.samples must be an int >= 2",
    ),
    "negative weight": (lambda: check(Stability(NOISE, -1.0)), ValueError, "Stability.lbd"),
    "infinite weight": (lambda: check(Consistency(NOISE, np.inf)), ValueError, "Consistency.lbd"),
    "weights": (lambda: check(MACER(NOISE, np.ones(2))), ValueError, "MACER.lbd"),
    "Laplace radius": (lambda: check(MACER(Laplace(0.1))), TypeError, "smoothing.Gaussian"),
    "gamma out of reach": (lambda: check(MACER(NOISE, gamma=30.0)), ValueError, "below 22"),
    "no temperature": (lambda: check(MACER(NOISE, beta=0.0)), ValueError, "beta must be positive"),
    "masks attacked": (
        lambda: check(SmoothAdv(Masking(2, D, pixels=False), PGD_L2)),
        TypeError,
        "added to the input",
    ),
    "attack that stops": (lambda: check(SmoothAdv(NOISE, PGD(L2(0.1)))), ValueError, "keep='last'"),
    "threat for an attack": (lambda: check(SmoothAdv(NOISE, L2(0.1))), TypeError, "PGD"),
    "eps in grey levels": (
        lambda: check(SmoothAdv(NOISE, PGD(Linf(64.0), keep="last"))),
        ValueError,
        "larger than the whole box",
    ),
    "no move": (lambda: check(SmoothMix(NOISE, alpha=0.0)), ValueError, "alpha must be positive"),
    "a reach beyond the move": (
        lambda: check(SmoothMix(NOISE, one_step=True, reach=1.5)),
        ValueError,
        "reach must lie in [0, 1]",
    ),
    "one step of one": (
        lambda: check(SmoothMix(NOISE, steps=1, one_step=True)),
        ValueError,
        "steps must be an int >= 2",
    ),
    "outside of the box": (lambda: check(SmoothMix(NOISE, hi=0.5)), ValueError, "in the box"),
    "predictions of other classes": (
        lambda: check(CATRS(NOISE, TABLE[:, :2])),
        ValueError,
        f"shape (N, {C})",
    ),
    "a mask of no predictions": (
        lambda: check(CATRS(NOISE, confidence_mask=True)),
        ValueError,
        "pass predictions= too",
    ),
    "counts for predictions": (lambda: check(CATRS(NOISE, 7 * TABLE)), ValueError, "sum to 1"),
    "no classifier": (
        lambda: check(DenoisedStability(NOISE, "resnet")),
        TypeError,
        "logits function",
    ),
    "a classifier for a denoiser": (
        lambda: Denoising(NOISE)(KEY, SPY, PARAMS, EXTRA, BATCH),
        ValueError,
        "models.DnCNN",
    ),
    "no denoiser": (lambda: smoothing.denoised(None, mlp), TypeError, "denoiser_fn"),
    "sigma beyond the schedule": (
        lambda: smoothing.diffusion_denoiser(mlp, 200.0, alphas_cumprod=COSINE),
        ValueError,
        "none for sigma = 200",
    ),
    "betas for products": (
        lambda: smoothing.diffusion_denoiser(mlp, 0.25, alphas_cumprod=COSINE[::-1]),
        ValueError,
        "decreasing",
    ),
    "another prediction": (
        lambda: smoothing.diffusion_denoiser(mlp, 0.25, prediction="v"),
        ValueError,
        "prediction must be",
    ),
    "no noise": (lambda: smoothing.diffusion_denoiser(mlp, 0.0), ValueError, "sigma must be"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_clear_errors(name):
    call, error, words = MISTAKES[name]
    with pytest.raises(error, match=re.escape(words)):
        call()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_the_tests_use_passes_its_checks(name):
    check(OBJECTIVES[name])


@pytest.mark.full
def test_the_page_runs_as_it_stands():
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "smoothing-training.md"
    names = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            exec(block, names)
    assert names["accuracy"] > 0.5


@pytest.mark.full
def test_the_table_of_objectives_runs_small(tmp_path):
    root = pathlib.Path(__file__).resolve().parent.parent
    out = tmp_path / "objectives.json"
    done = subprocess.run(
        [sys.executable, "examples/smoothing_objectives.py", "--small", "--out", str(out)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads(out.read_text())
    results = made["settings"]["results"]
    assert [row["sigma"] for row in results] == 7 * [0.25] + 7 * [0.5]
    assert len({row["objective"] for row in results}) == 7
    assert all(check["passed"] for check in made["checks"])
    for row in results:
        low, high = row["interval"]
        assert low <= row["difference"] <= high
        assert f"{row['acr']:.4f}" in done.stdout
