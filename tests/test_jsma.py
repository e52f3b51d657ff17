"""JSMA: its pairs by trying all of them, its moves by the published algorithm in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import drive
from jrobust._algorithm import algorithm
from jrobust.attacks import multi_targeted
from jrobust.attacks._jsma import JSMA, best_pair, best_single
from jrobust.models import randomized
from jrobust.threat import L0, L2

RNG = np.random.default_rng(0)

# ------------------------------------------------------------------ the search for pairs


def every_pair(gain, cost):
    """The highest product of two positive sums over all pairs, 0 if there is none."""
    best = 0.0
    for p, q in itertools.combinations(range(len(gain)), 2):
        a, c = gain[p] + gain[q], cost[p] + cost[q]
        best = max(best, a * c) if a > 0 and c > 0 else best
    return best


def every_one(gain, cost):
    return max((a * c for a, c in zip(gain, cost) if a > 0 and c > 0), default=0.0)


def cases(size, count=60):
    """Gains and costs (count, size): alike, opposed, tied, rarely positive, partly masked."""
    gain = RNG.normal(size=(count, size))
    cost = RNG.normal(size=(count, size))
    cost[0::6] = gain[0::6] + 0.1 * cost[0::6]
    cost[1::6] = 1 - gain[1::6]  # nothing surpasses anything: every feature has to be tried
    gain[2::6], cost[2::6] = np.round(gain[2::6]), np.round(cost[2::6])
    gain[3::6] -= 2
    gain[4::6], cost[4::6] = gain[4::6] - 5, cost[4::6] - 5
    gain[5::12] *= 1e-25
    cost[11::12] *= 1e25
    masked = RNG.uniform(size=(count, size)) < RNG.uniform(0, 1, (count, 1))
    gain[masked] = cost[masked] = -np.inf
    return np.float32(gain), np.float32(cost)


@pytest.mark.parametrize(
    ("search", "trial", "number"), [(best_pair, every_pair, 2), (best_single, every_one, 1)]
)
@pytest.mark.parametrize("size", [1, 2, 24])
def test_the_choice_is_the_best_of_all(search, trial, number, size):
    gain, cost = cases(size)
    value, chosen = map(np.asarray, jax.jit(jax.vmap(search))(gain, cost))
    some = 0
    for g, c, v, s in zip(np.float64(gain), np.float64(cost), value, chosen):
        want = trial(g, c)
        if want == 0:
            assert v == -np.inf
            assert not s.any()
            continue
        some += 1
        at = np.flatnonzero(s)
        assert len(at) == number
        np.testing.assert_allclose(g[at].sum() * c[at].sum(), want, rtol=1e-6)
        np.testing.assert_allclose(v, np.log(want), rtol=3e-6, atol=3e-6)
    assert size < number or some > 2


def test_no_table_of_all_pairs():
    size = 20_000
    row = jax.ShapeDtypeStruct((1, size), np.float32)
    compiled = jax.jit(jax.vmap(best_pair)).lower(row, row).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 4 * size


# ------------------------------------------------------------------ the moves


@algorithm
class Linear:
    """A linear model, NaN where the first feature exceeds ``broken``."""

    weights: jax.Array
    bias: jax.Array
    broken: jax.Array

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        logits = x @ self.weights + self.bias
        return logits * jnp.where(x[:, :1] > self.broken, jnp.nan, 1.0)


BATCH, SHAPE, CLASSES, LO, HI = 12, (4, 4), 4, -1.0, 3.0
WEIGHTS = np.float32(RNG.normal(size=(16, CLASSES)))
WEIGHTS[0] = [2, -2, 2, -2]  # a feature that is soon chosen
MODEL = Linear(WEIGHTS, np.float32(-WEIGHTS.sum(0))[None], np.float32(np.inf))
POOL = np.float32(np.clip(RNG.uniform(LO - 1, HI + 1, (400, *SHAPE)), LO, HI))
LOGITS = np.sort(np.asarray(MODEL(POOL)), 1)
# Those that take some moves.
X = POOL[np.argsort(LOGITS[:, -2] - LOGITS[:, -1])[:BATCH]]
Y = np.asarray(MODEL(X)).argmax(1)
TARGETS = (Y + 1) % CLASSES


def published(x, y, target, *, eps, theta=1.0, pairs=True, maximal=True):
    """The algorithm for one example: the point, and the moves made."""
    x0, x, jacobian = x, x.copy(), np.float64(WEIGHTS).T
    free = target is None
    classes = range(CLASSES) if free and maximal else [y if free else target]
    signs = (1, -1) if free and maximal else (np.sign(theta),)

    def fooled():
        label = (x @ WEIGHTS + MODEL.bias[0]).argmax()
        return label != y if free else label == target

    moves = 0
    while not fooled() and moves < eps // (1 + pairs):
        best, move = 0.0, None
        for label, sign in itertools.product(classes, signs):
            push = -1 if free and label == y else 1
            alpha = push * jacobian[label]
            beta = push * (jacobian.sum(0) - jacobian[label])
            if sign > 0:
                room = (x < HI) & (x >= x0)
            else:
                room = (x > LO) & (x <= x0)
            for chosen in itertools.combinations(np.flatnonzero(room), 1 + pairs):
                a, b = sign * alpha[list(chosen)].sum(), sign * beta[list(chosen)].sum()
                if a > 0 > b and -a * b > best:
                    best, move = -a * b, (list(chosen), sign)
        if move is None:
            break
        x[move[0]] = np.clip(x[move[0]] + move[1] * abs(theta) * (HI - LO), LO, HI)
        moves += 1
    return x, moves


VARIANTS = {
    "targeted": (True, {}),
    "targeted, lowering a part": (True, {"theta": -0.4}),
    "M-JSMA": (False, {}),
    "M-JSMA, a part": (False, {"theta": 0.3}),
    "NT-JSMA": (False, {"maximal": False}),
    "single": (False, {"pairs": False, "theta": 0.7}),
}

LATER = ("NT-JSMA", "single")  # programs of their own


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n in LATER else ()) for n in VARIANTS],
)
def test_the_path_is_the_published_one(name, key):
    targeted, settings = VARIANTS[name]
    eps = np.array([0, 1, 3, 4, 5, 6, 7, 8, 9, 12, 16, 16])
    attack = JSMA(L0(np.float32(eps), LO, HI, pixels=False), **settings)
    targets = TARGETS if targeted else None
    found = jrobust.run(attack, key, MODEL, X, Y, targets=targets)
    rows = X.reshape(BATCH, -1)
    want = [
        published(rows[i], Y[i], TARGETS[i] if targeted else None, eps=eps[i], **settings)
        for i in range(BATCH)
    ]
    moves = np.array([moves for _, moves in want])
    last = np.asarray(MODEL(np.stack([point for point, _ in want]))).argmax(1)
    success = last == TARGETS if targeted else last != Y
    np.testing.assert_array_equal(found.success, success)
    assert 0.2 < success.mean() < 1
    assert moves.max() > 1
    # The point of the success; where there was none, one of the way.
    np.testing.assert_allclose(
        np.asarray(found.x).reshape(BATCH, -1)[success],
        np.stack([point for point, _ in want])[success],
        atol=1e-5,
    )
    np.testing.assert_array_equal(found.forwards, moves + 1)
    assert np.all(np.asarray(found.distance) <= eps)
    # A gradient at every point that is not the budget's last: each class that was looked at, and
    # the sum of all.
    each = CLASSES + 1 if attack.maximal and not targeted else 2
    budget = moves == eps // (1 + attack.pairs)
    np.testing.assert_array_equal(found.backwards, each * (moves + 1 - budget))
    np.testing.assert_array_equal(found.step, np.where(success, moves, -1))


@pytest.mark.full
def test_classes_in_turn_head_for_them(key):
    attack = multi_targeted(JSMA(L0(4.0, LO, HI, pixels=False)), CLASSES - 1)
    found = jrobust.run(attack, key, MODEL, X, Y)
    rows = X.reshape(BATCH, -1)
    for i in range(BATCH):
        others = [c for c in range(CLASSES) if c != Y[i]]
        ends = [published(rows[i], Y[i], c, eps=4)[0] for c in others]
        broken = any((end @ WEIGHTS + MODEL.bias[0]).argmax() == c for end, c in zip(ends, others))
        assert bool(found.success[i]) or not broken


@pytest.mark.full
def test_a_randomised_model_and_its_costs(key):
    def noisy(keys, x):
        shift = jax.vmap(lambda k: 0.1 * jax.random.normal(k, (CLASSES,)))(keys)
        return MODEL(x) + shift

    model = randomized(noisy, key, samples=3, votes=5)
    found = jrobust.run(JSMA(L0(4.0, LO, HI, pixels=False)), key, model, X, Y)
    assert found.success.mean() > 0.5
    np.testing.assert_array_equal(found.success, np.asarray(model(found.x)).argmax(1) != Y)
    points = np.asarray(found.forwards) // 8
    np.testing.assert_array_equal(found.forwards, 8 * points)
    np.testing.assert_array_equal(found.backwards, 3 * (CLASSES + 1) * np.minimum(points, 2))


def test_nan_is_no_robustness_and_breaks_nothing(key):
    broken = Linear(MODEL.weights, MODEL.bias, np.float32(HI - 1e-3))
    attack = JSMA(L0(np.full(BATCH, 16, np.float32), LO, HI, pixels=False))
    found = jrobust.run(attack, key, broken, X, Y)
    clean, nan = (np.asarray(points)[:, 0, 0] > HI - 1e-3 for points in (X, found.x))
    assert (nan & ~clean).any()
    assert np.all(np.asarray(found.success)[nan])
    assert np.all(np.isfinite(found.x))
    towards = jrobust.run(attack, key, broken, X, Y, targets=TARGETS)
    nan = np.asarray(towards.x)[:, 0, 0] > HI - 1e-3
    assert not np.any(np.asarray(towards.success) & nan)


def test_bad_settings(key):
    ball = L0(4.0, LO, HI, pixels=False)
    for attack, kind, words in (
        (JSMA(L2(1.0, LO, HI)), TypeError, "takes L0"),
        (JSMA(ball, theta=0.0), ValueError, "share of the width"),
        (JSMA(ball, theta=1.5), ValueError, "share of the width"),
        (JSMA(ball, steps=0), ValueError, "steps"),
    ):
        with pytest.raises(kind, match=words):
            jrobust.run(attack, key, MODEL, X, Y)
    with pytest.raises(TypeError, match="query attack"):
        jrobust.run(JSMA(ball), key, drive.Host(lambda x: np.zeros((len(x), 4))), X, Y)
