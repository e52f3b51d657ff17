"""MSD: the best of the steepest steps of several norms, by hand and in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import drive, keys, losses
from jrobust._algorithm import algorithm
from jrobust.attacks import PGD, multi_targeted, restarts, with_eps
from jrobust.attacks._msd import MSD, AnyOf
from jrobust.models import randomized
from jrobust.threat import L0, L1, L2, Linf

RNG = np.random.default_rng(0)
BATCH, SHAPE, SIZE = 24, (4, 5), 20
NORMS = {
    Linf: lambda move: np.abs(move).max((1, 2)),
    L2: lambda move: np.sqrt((move**2).sum((1, 2))),
    L1: lambda move: np.abs(move).sum((1, 2)),
    L0: lambda move: (move != 0).sum((1, 2)),
}
DUAL = {Linf: 1, L2: 2, L1: np.inf}


@algorithm
class Curved:
    """A linear model with a bend, NaN where the first feature exceeds ``broken``."""

    weights: jax.Array
    bend: jax.Array
    broken: jax.Array

    def __call__(self, x):
        flat = x.reshape(x.shape[0], -1) - 0.5
        logits = (flat + self.bend * jnp.sin(9 * flat)) @ self.weights
        return logits * jnp.where(x[:, 0, :1] > self.broken, jnp.nan, 1.0)


# Classes that differ from the first by a sparse, a middling and a dense vector.
SPARSE = np.where(np.arange(SIZE) == 7, 2.0, 0.01)
MIDDLING = np.where(np.arange(SIZE) < 4, 0.8, 0.02) * RNG.choice([-1, 1], SIZE)
DENSE = 0.22 * RNG.choice([-1, 1], SIZE)
WEIGHTS = np.float32(np.stack([DENSE, DENSE + SPARSE, DENSE + MIDDLING, 0 * DENSE], 1))
MODEL = Curved(WEIGHTS, np.float32(0), np.float32(np.inf))
BENT = dataclasses.replace(MODEL, bend=np.float32(0.3))
X = np.float32(RNG.uniform(0.4, 0.6, (BATCH, *SHAPE)))
Y = np.asarray(MODEL(X)).argmax(1)
BALLS = (Linf(np.float32(0.12)), L2(np.float32(0.3)), L1(np.float32(0.35)))


def test_one_step_is_the_best_of_the_steepest(key):
    """Between two classes a linear margin rises by eps times the dual norm, whichever is most."""
    attack = MSD(BALLS, steps=1, rel_step_size=1.0, loss=losses.margin, keep="last")
    best = []
    for other in (1, 2, 3):
        model = dataclasses.replace(MODEL, weights=WEIGHTS[:, [0, other]])
        found = jrobust.run(attack, key, model, X, np.zeros_like(Y))
        normal = np.float64(WEIGHTS[:, other] - WEIGHTS[:, 0])
        gains = [float(b.eps) * np.linalg.norm(normal, DUAL[type(b)]) for b in BALLS]
        best.append(int(np.argmax(gains)))
        before = (X.reshape(BATCH, -1) - 0.5) @ normal
        np.testing.assert_allclose(found.loss, before + max(gains), rtol=1e-4)
        np.testing.assert_allclose(found.distance, BALLS[best[-1]].eps, rtol=1e-5)
    assert sorted(best) == [0, 1, 2], "each norm has its turn"


def by_hand(model, steps, sizes):
    """The path, step by step: points, and the ball of each step."""

    @jax.jit
    def step(x):
        slope = jax.grad(lambda v: jnp.sum(losses.cross_entropy(model(v), Y)))(x)
        points = [ball.ascend(x, X, slope, size * ball.eps) for ball, size in zip(BALLS, sizes)]
        return points, [losses.cross_entropy(model(point), Y) for point in points]

    path, took = [X], []
    for _ in range(steps):
        points, heights = map(np.stack, step(path[-1]))
        took.append(heights.argmax(0))
        path.append(points[took[-1], np.arange(BATCH)])
    return path, np.stack(took)


def test_the_path_is_the_published_one(key):
    sizes = (0.3, 0.2, 0.25)
    attack = MSD(BALLS, steps=4, rel_step_size=sizes, keep="loss")
    found = jrobust.run(attack, key, BENT, X, Y)
    path, took = by_hand(BENT, 4, sizes)
    heights = np.stack([losses.cross_entropy(BENT(point), Y) for point in path])
    best = heights.argmax(0)
    apart = np.abs(np.asarray(found.x) - np.stack(path)[best, np.arange(BATCH)]).max((1, 2))
    same = apart < 2e-6
    # Two norms may be equally good up to rounding, and all moves after that choice differ.
    assert np.mean(same) >= 0.95
    np.testing.assert_allclose(found.loss[same], heights.max(0)[same], rtol=1e-5)
    assert set(took.ravel()) == {0, 1, 2}, "each norm comes"
    assert np.any(took != took[:1]), "and one example may take several"
    np.testing.assert_array_equal(found.forwards, 4 * (1 + 3) + 1)
    np.testing.assert_array_equal(found.backwards, 4)

    # In one of the balls, in float64; measured in the ball it lies deepest in.
    move = np.float64(found.x) - X
    norms = np.stack([NORMS[type(ball)](move) for ball in BALLS])
    shares = norms / np.array([float(ball.eps) for ball in BALLS])[:, None]
    assert np.all(shares.min(0) <= 1 + 1e-6)
    np.testing.assert_allclose(found.distance, norms[shares.argmin(0), np.arange(BATCH)], rtol=1e-5)
    assert np.any(shares.max(0) > 1.5), "a union, not the intersection"


@pytest.mark.full
def test_one_ball_is_pgd(key):
    ball = L2(np.float32(0.3))
    one = jrobust.run(MSD((ball,), steps=5, keep="loss"), key, BENT, X, Y)
    pgd = PGD(ball, steps=5, random_start=False, keep="loss")
    other = jrobust.run(pgd, key, BENT, X, Y)
    np.testing.assert_array_equal(one.success, other.success)
    np.testing.assert_allclose(one.x, other.x, atol=1e-6)
    np.testing.assert_array_equal(one.forwards, 5 * 2 + 1)


def test_success_ends_an_example_and_restarts_draw_from_a_ball(key):
    balls = (Linf(np.full(BATCH, 0.02, np.float32)), L2(np.full(BATCH, 0.04, np.float32)))
    attack = restarts(MSD(balls, steps=3, random_start=True), 2)
    found = jrobust.run(attack, key, BENT, X, Y, ids=np.arange(BATCH))
    again = jrobust.run(attack, key, BENT, X[::-1], Y[::-1], ids=np.arange(BATCH)[::-1])
    np.testing.assert_array_equal(found.x, again.x[::-1])
    np.testing.assert_array_equal(found.success, np.asarray(BENT(found.x)).argmax(1) != Y)
    assert 0 < found.success.mean() < 1
    # Of each point evaluated but the last of a run, three losses more and a gradient.
    whole = 2 * (3 * 3 + 1)
    assert np.all(np.asarray(found.forwards)[~np.asarray(found.success)] == whole)
    assert np.all(np.asarray(found.forwards)[np.asarray(found.success)] <= whole)

    state = attack.attack.init(keys.examples(key, jnp.arange(BATCH)), X, jnp.asarray(Y))
    move = np.float64(state.x) - X
    inside = np.stack([NORMS[type(b)](move) <= np.float64(b.eps) * (1 + 1e-6) for b in balls])
    assert np.all(inside.any(0))
    assert np.all((inside.mean(1) > 0.1) & (inside.mean(1) < 0.9)), "of each of the balls"


@pytest.mark.full
def test_targets_classes_in_turn_and_a_model_that_draws(key):
    targets = (Y + 1) % 4
    attack = with_eps(MSD(BALLS, steps=10), 1.0)
    found = jrobust.run(attack, key, BENT, X, Y, targets=targets)
    np.testing.assert_array_equal(found.success, np.asarray(BENT(found.x)).argmax(1) == targets)
    assert found.success.mean() > 0.8
    turns = jrobust.run(multi_targeted(attack, 3), key, BENT, X, Y)
    assert turns.success.mean() > 0.9

    def noisy(keys, x):
        return BENT(x) + jax.vmap(lambda k: 0.1 * jax.random.normal(k, (4,)))(keys)

    model = randomized(noisy, key, samples=3, votes=5)
    drawn = jrobust.run(MSD(BALLS, steps=2, keep="loss"), key, model, X, Y)
    np.testing.assert_array_equal(drawn.forwards, 2 * (3 + 5 + 3 * 3) + 3 + 5)
    np.testing.assert_array_equal(drawn.backwards, 2 * 3)


def test_nan_is_the_worst(key):
    broken = dataclasses.replace(BENT, broken=np.float32(0.65))
    attack = MSD(BALLS, steps=4, rel_step_size=(0.3, 0.2, 0.25), keep="loss")
    found = jrobust.run(attack, key, broken, X, Y)
    nan = np.asarray(found.x)[:, 0, 0] > 0.65
    assert nan.sum() > (X[:, 0, 0] > 0.65).sum()
    assert np.all(np.asarray(found.success)[nan])
    assert np.all(np.isfinite(found.x))


def test_the_distance_of_a_union():
    balls = AnyOf((Linf(0.1), L2(0.5), L0(2.0, pixels=False)))
    x0 = jnp.zeros((4, 5))
    x = jnp.asarray([[0.05] * 5, [0.3] * 3 + [0] * 2, [0.9] * 2 + [0] * 3, [0] * 5], jnp.float32)
    # Deepest in the L2 ball, in that ball (three features are too many for L0), in that of L0.
    want = [0.05 * 5**0.5, 0.3 * 3**0.5, 2, 0]
    np.testing.assert_allclose(jax.jit(AnyOf.distance)(balls, x, x0), want, rtol=1e-5)


def test_bad_settings(key):
    for attack, kind, words in (
        (MSD(()), TypeError, "tuple of threat models"),
        (MSD(Linf(0.1)), TypeError, "tuple of threat models"),
        (MSD((Linf(0.1), L2(0.5, hi=2.0))), ValueError, "differ in hi"),
        (MSD((Linf(0.1), L2(50.0))), ValueError, "larger than the whole box"),
        (MSD(BALLS, rel_step_size=(0.1, 0.1)), ValueError, "2 values for 3"),
        (MSD(BALLS, rel_step_size=0.0), ValueError, "positive"),
        (MSD(BALLS, keep="first"), ValueError, "keep"),
    ):
        with pytest.raises(kind, match=words):
            jrobust.run(attack, key, MODEL, X, Y)
    with pytest.raises(TypeError, match="query attack"):
        jrobust.run(MSD(BALLS), key, drive.Host(lambda x: np.zeros((len(x), 4))), X, Y)


def test_boxes_may_be_of_each_example():
    low = np.linspace(0.0, 0.3, BATCH, dtype=np.float32)[:, None, None]
    y = np.zeros(BATCH, np.int32)
    MSD((Linf(0.05, low), L2(0.3, low))).check(X, y, 4)
    with pytest.raises(ValueError, match="differ in lo"):
        MSD((Linf(0.05, low), L2(0.3, low / 2))).check(X, y, 4)
