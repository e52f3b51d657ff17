"""APGD against its published rules in float64, closed forms, and what other versions got wrong."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attacks import (
    DUAL,
    NET,
    Net,
    gains,
    gradient64,
    greedy,
    linear_case,
    project64,
    same,
    sample,
    score,
    separated,
)

import jrobust
from jrobust import algorithm, drive, keys, losses, models
from jrobust.attacks import APGD, restarts
from jrobust.attacks._apgd import _checkpoints, _phases
from jrobust.threat import L0, L1, L2, Linf
from jrobust.zeroth_order import CGE

BATCH = 16
RADII = {Linf: 0.2, L2: 0.5, L1: 0.8}
STEEP = Net(3 * NET.inner, NET.outer)  # so that steps overshoot and have to be halved
WILD = Net(6 * NET.inner, NET.outer)  # so that whatever is done otherwise leads elsewhere


# ------------------------------------------------------------------ the published algorithm


def test_checkpoints_are_those_of_the_released_integers():
    """Windows by hand: 22, 19, 16, 13, 10, 7, 6, 6 moves for 100, and so on."""
    assert list(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(_checkpoints(50)) == [11, 21, 30, 38, 45]
    assert list(_checkpoints(20)) == [4, 7, 9, *range(10, 21)]
    assert list(_checkpoints(10)) == list(range(2, 11))
    assert list(_checkpoints(1)) == [1]
    # The percentages of the paper, 0.22 0.41 0.57 ..., would give 115 and 161.
    assert list(_checkpoints(282))[:3] == [62, 116, 162]


def test_phases_of_l1():
    assert _phases(100) == [(3, 30), (2, 30), (1, 40)]
    assert _phases(10) == [(3, 3), (2, 3), (1, 4)]
    assert _phases(3) == [(1, 3)]
    assert APGD(L1(1.0)).moves == 102
    assert APGD(L2(1.0)).moves == 100


class Climb64:
    """APGD on one example in float64: every point it evaluates, and the highest."""

    def __init__(self, net, kind, x0, y, eps, rho=0.75):
        self.net = net
        self.kind, self.x0, self.y, self.eps, self.rho = kind, np.float64(x0), y, eps, rho
        self.points, self.losses, self.predictions = [], [], []

    def see(self, x):
        loss, gradient, prediction = gradient64(self.net, x[None], np.array([self.y]))
        self.points.append(x)
        self.losses.append(loss[0])
        self.predictions.append(prediction[0])
        return loss[0], gradient[0]

    def project(self, x, radius=1):
        return project64(self.kind, x[None], self.x0[None], radius * self.eps)[0]

    def ascend(self, start, steps):
        x = previous = np.float64(start)
        size, halved, before = 2 * self.eps, True, None
        loss, g = self.see(x)
        best = before = (loss, x, g)
        window, since = max(int(0.22 * steps), 1), 0
        for i in range(steps):
            direction = np.sign(g) if self.kind is Linf else g / np.linalg.norm(g)
            z = self.project(x + size * direction)
            share = 0.75 if i else 1.0
            new = self.project(x + share * (z - x) + (1 - share) * (x - previous))
            previous, x = x, new
            loss, g = self.see(x)
            if loss > best[0]:
                best = (loss, x, g)
            since += 1
            if since == window:
                recent = self.losses[-window - 1 :]
                rises = sum(b > a for a, b in itertools.pairwise(recent))
                halved = rises <= self.rho * window or (not halved and before[0] >= best[0])
                if halved:
                    size /= 2
                    _, x, g = best
                before, since = best, 0
                window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        return best

    def ascend_l1(self, start, steps):
        x = np.float64(start)
        early = 3 * steps // 10
        for radius, moves in ((3, early), (2, early), (1, steps - 2 * early)):
            x = self.project(x, radius)
            full = radius * self.eps
            loss, g = self.see(x)
            best = (loss, x, g)
            changed = np.sum(x != self.x0)
            kept, size = changed / 1.5, full
            for _ in range(moves):
                count = max(int(np.ceil(kept)), 1)
                level = np.sort(np.abs(g).ravel())[-count]
                direction = np.where(np.abs(g) >= level, np.sign(g), 0)
                x = self.project(x + size * direction / np.abs(direction).sum(), radius)
                loss, g = self.see(x)
                if loss > best[0]:
                    best = (loss, x, g)
                now = np.sum(best[1] != self.x0)  # a check after every move
                kept = now / 1.5
                if now < 0.95 * changed:
                    size = full
                    _, x, g = best
                else:
                    size = max(size / 1.5, full / 10)
                changed = now
            _, x, _ = best
        return best


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_every_point_is_that_of_the_published_algorithm(kind, key):
    steps, eps = 20, np.float32(RADII[kind])
    x, y = sample()
    attack = APGD(kind(eps), steps=steps, keep="loss")
    state = attack.init(keys.examples(key, jnp.arange(BATCH)), jnp.asarray(x), jnp.asarray(y))
    step = jax.jit(lambda state: attack.step(WILD, state))
    points = [np.asarray(state.x)]
    for _ in range(attack.moves):
        state = step(state)
        points.append(np.asarray(state.x))
    want = []
    for i in range(BATCH):
        climb = Climb64(WILD, kind, x[i], y[i], np.float64(eps))
        (climb.ascend_l1 if kind is L1 else climb.ascend)(points[0][i], steps)
        want.append(climb.points)
    close = np.abs(np.array(points) - np.swapaxes(want, 0, 1)).max((2, 3)) < 2e-3
    # A loss that rose by less than rounding, or did not, sends an example elsewhere.
    assert np.mean(close) > 0.97


@pytest.mark.parametrize("kind", [L2, L1])
def test_what_is_returned_and_counted_is_that_of_the_published_algorithm(kind, key):
    steps, eps = 30, np.float32(0.3 * RADII[kind])
    x, y = sample()
    attack = APGD(kind(eps), steps=steps)
    result = jrobust.run(attack, key, STEEP, x, y)
    starts = np.asarray(attack.init(keys.examples(key, jnp.arange(BATCH)), x, y).x)
    moves = steps + 2 * (kind is L1)
    agree = []
    for i in range(BATCH):
        climb = Climb64(STEEP, kind, x[i], y[i], np.float64(eps))
        loss, best, _ = (climb.ascend_l1 if kind is L1 else climb.ascend)(starts[i], steps)
        wrong = np.array(climb.predictions) != y[i]
        assert len(wrong) == moves + 1
        if kind is L1:
            wrong[: -(12 + 1)] = False  # the last phase's moves and its first point
        first, spent = -1, moves + 1
        if wrong.any():
            first = wrong.argmax()
            best, loss, spent = climb.points[first], climb.losses[first], first + 1
        agree.append(
            np.allclose(result.x[i], best, atol=1e-3)
            and np.allclose(result.loss[i], loss, rtol=1e-4)
            and (result.step[i], result.forwards[i]) == (first, spent)
        )
    assert np.mean(agree) >= 14 / BATCH
    assert 2 < np.sum(result.success) < BATCH - 2
    np.testing.assert_array_equal(result.backwards, np.minimum(result.forwards, moves))


@algorithm
class Released(APGD):
    """Compares the first move's loss with zero, like the released code."""

    def move(self, state, loss, gradient):
        x, inner = super().move(state, loss, gradient)
        return x, inner._replace(last=jnp.where(state.t == 0, 0.0, inner.last))


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dlr])
def test_the_loss_of_the_start_in_the_history_makes_no_difference(loss, key):
    x, y = sample(64)
    options = {"steps": 50, "loss": loss}
    for kind, eps in ((Linf, 0.05), (L2, 0.12)):
        ours = jrobust.run(APGD(kind(eps), **options), key, STEEP, x, y).success
        theirs = jrobust.run(Released(kind(eps), **options), key, STEEP, x, y).success
        assert 16 < np.sum(ours) < 48
        assert np.sum(ours != theirs) <= 1


# ------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(
    ("kind", "loss", "classes", "targeted", "shape"),
    [
        (Linf, losses.cross_entropy, 2, False, (6,)),
        (Linf, losses.dlr_targeted, 4, True, (2, 2, 3)),
        (L2, losses.dlr, 3, False, (3, 3)),
        (L1, losses.margin, 2, False, (9,)),
    ],
)
def test_linear_models_fall_at_the_minimal_distance_and_never_below(
    kind, loss, classes, targeted, shape, key
):
    model, x, y, second, margin, towards = separated(classes, shape, 8)
    minimal = margin / np.linalg.norm(towards, DUAL[kind], axis=1)
    targets = second if targeted else None
    for factor, falls in ((0.999, False), (1.001, True)):
        eps = np.float32(factor * minimal)
        result = jrobust.run(
            APGD(kind(eps), steps=20, loss=loss), key, model, x, y, targets=targets
        )
        np.testing.assert_array_equal(result.success, np.full(8, falls))
        assert np.all(result.distance <= eps + 1e-7)
        # In L1 points of the larger balls are adversarial long before, and count for nothing.
        assert np.all(result.step > (6 + 1 + 6 if kind is L1 else 0)) or not falls


def test_l1_comes_close_to_the_best_of_a_linear_model_where_the_box_binds(key):
    """Steps of falling sparsity do, where those of fixed sparsity stay below 0.95 for good."""
    w, x = linear_case(400)
    y, eps = np.ones(len(x), int), np.float32(6.0)
    room = np.where(w > 0, 1 - np.float64(x), np.float64(x))
    best = np.array([greedy(np.float64(w), row, eps) for row in room])
    attack = APGD(L1(eps), loss=losses.margin, keep="loss")
    reached = gains(jrobust.run(attack, key, score(w), x, y), w, x) / best
    assert np.all(reached > 0.95)
    assert np.mean(reached) > 0.98
    assert np.all(reached < 1 + 1e-5)


# ------------------------------------------------------------- what other versions got wrong


def test_a_success_on_the_way_is_not_lost(key):
    """Cross-entropy is highest where three classes nearly tie, right; starts are wrong."""
    x = np.full((8, 64), 0.5, np.float32)

    def model(x):
        s = (x.mean(1) - 0.4) / 0.2  # from 0 at one corner of the ball to 1 at the other
        rest = 0.3 + 1.65 * s  # exp(loss) - 1
        more = 0.5 * jnp.clip(2 - jnp.abs(s - 0.5) / 0.15, 0, 1)
        return jnp.log(jnp.stack([0 * s + 1, rest / 2 + more, rest / 2 - more], 1))

    y = np.zeros(8, int)
    last = jrobust.run(APGD(Linf(0.1), steps=5, keep="loss"), key, model, x, y)
    assert not np.any(last.success), "the highest loss is no success"
    assert np.all(last.loss > 1.0)
    assert np.all(last.step == 0)
    found = jrobust.run(APGD(Linf(0.1), steps=5), key, model, x, y)
    assert np.all(found.success)
    assert np.all(np.asarray(model(found.x)).argmax(1) == 1)


def test_an_example_depends_on_no_other(key):
    """Neither its points nor its step sizes, whatever lies and ends beside it."""
    attack = APGD(L2(np.float32(np.linspace(0.1, 0.4, BATCH))), steps=20, keep="loss")
    x, y = sample()
    whole = jrobust.run(attack, key, STEEP, x, y)
    other_x, other_y = sample(seed=5)
    others = np.arange(BATCH) % 2 == 0
    mixed = jrobust.run(
        attack,
        key,
        STEEP,
        np.where(others[:, None, None], other_x, x),
        np.where(others, other_y, y),
    )
    rows = jax.tree.map(lambda a: np.asarray(a)[~others], (whole, mixed))
    same(*rows)
    assert not np.array_equal(mixed.x, whole.x)
    # Step sizes are halved example by example.
    state = attack.init(keys.examples(key, jnp.arange(BATCH)), jnp.asarray(x), jnp.asarray(y))
    ended = jax.jit(lambda s: drive.run(attack, STEEP, s))(state)
    assert len(np.unique(np.asarray(ended.inner.climb.size / attack.threat.eps))) > 2


def test_loss_and_gradient_come_from_the_same_draws(key):
    """A linear model times a random s: loss over gradient does not depend on s if they do."""
    w = jnp.float32([3.0, -2.0, 1.0, 0.5])

    def scaled(keys, x):
        s = jax.vmap(lambda k: jax.random.uniform(k, (), minval=0.5, maxval=1.5))(keys)
        z = s * (x @ w)
        return jnp.stack([-z, z], 1)

    def down(logits, y):
        return logits[:, 1]

    model = models.randomized(scaled, key, samples=3, votes=5)
    attack = APGD(Linf(0.1), steps=6, loss=down, keep="loss")
    x = jnp.full((8, 4), 0.5)
    state = attack.init(keys.examples(key, jnp.arange(8)), x, jnp.zeros(8, jnp.int32))
    step = jax.jit(lambda s: attack.step(model, s))
    tops = []
    for _ in range(4):
        state = step(state)
        climb = state.inner.climb
        s = climb.slope / w[None]
        np.testing.assert_allclose(s, jnp.broadcast_to(s[:, :1], s.shape), rtol=1e-5)
        np.testing.assert_allclose(climb.top, s[:, 0] * (climb.best @ w), rtol=1e-5)
        tops.append(np.asarray(s[:, 0]))
    assert np.all(np.diff(state.record.forwards) == 0)
    assert np.all(state.record.forwards == 4 * (3 + 5))
    assert len(np.unique(np.round(tops, 5))) > 8, "draws are fresh"


# --------------------------------------------------------------------------- lanes and boxes


@functools.cache
def stepper(attack):
    def init(key, ids, x, y):
        return attack.init(keys.examples(key, ids), x, y)

    return (
        jax.jit(init),
        jax.jit(lambda state: attack.step(STEEP, state)),
        jax.jit(lambda state: drive.run(attack, STEEP, state)),
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", [L2, L1])
def test_lanes_can_be_stored_permuted_and_refilled(kind, key):
    attack = restarts(APGD(kind(np.float32(0.2 * RADII[kind])), steps=6), 2)
    init, step, finish = stepper(attack)
    x, y = sample()
    ids = jnp.arange(BATCH)
    state = init(key, ids, x, y)
    midway = state
    for _ in range(8):
        midway = step(midway)
    fresh, alone = (attack.result(finish(s)) for s in (state, midway))
    assert 0 < np.sum(attack.done(midway)) < np.sum(attack.done(finish(midway)))
    assert 0 < np.sum(alone.success) < BATCH
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(midway))
    order = np.random.default_rng(0).permutation(BATCH)
    shuffled = jax.tree.map(lambda a: a[order], midway)
    same(attack.result(finish(shuffled)), jax.tree.map(lambda a: a[order], alone))

    def choose(new, old):
        return jnp.where((np.arange(BATCH) % 2 == 0).reshape(-1, *[1] * (old.ndim - 1)), new, old)

    mixed = attack.result(finish(jax.tree.map(choose, state, midway)))
    same(mixed, jax.tree.map(choose, fresh, alone))


@pytest.mark.parametrize("kind", [Linf, L1])
def test_boxes_and_units_are_the_users(kind, key):
    """In [-3, 5] the attack does the same eight times as large."""
    eps = np.float32(0.2 * RADII[kind])
    x, y = sample()
    one = jrobust.run(APGD(kind(eps), steps=10, keep="loss"), key, NET, x, y)
    wide = APGD(kind(8 * eps, lo=-3.0, hi=5.0), steps=10, keep="loss")
    other = jrobust.run(wide, key, lambda x: NET((x + 3) / 8), np.clip(8 * x - 3, -3, 5), y)
    assert np.mean(np.abs((other.x + 3) / 8 - one.x) < 1e-4) > 0.9
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-2)
    assert np.mean(np.asarray(other.success != one.success)) <= 1 / BATCH


# ------------------------------------------------------------------ broken and foreign models


def test_non_finite_logits_are_never_robust_and_break_nothing(key):
    x = np.float32(np.random.default_rng(0).uniform(0.3, 0.4, (8, 2, 3)))
    x[:5, 0, 0] = 0.9

    def model(x):
        bad = jnp.where(x[:, 0, 0] > 0.85, jnp.nan, 0.0)
        return jnp.stack([9 + bad, x.sum((1, 2)), 0 * x[:, 0, 0]], 1)

    y = np.zeros(8, int)
    attack = APGD(L2(0.02), steps=6)
    result = jrobust.run(attack, key, model, x, y)
    np.testing.assert_array_equal(result.success, np.arange(8) < 5)
    targeted = jrobust.run(attack, key, model, x, y, targets=np.full(8, 1))
    assert not np.any(targeted.success)
    for found in (result, targeted):
        assert np.all(np.isfinite(found.x))
        assert np.all(found.distance <= 0.02 + 1e-7)


def test_a_batch_that_is_wrong_from_the_start_costs_one_forward_pass(key):
    x, y = sample(flips=False)
    result = jrobust.run(APGD(Linf(1e-6), steps=5), key, NET, x, (y + 1) % 3)
    assert np.all(result.success)
    np.testing.assert_array_equal(result.step, np.zeros(BATCH))
    np.testing.assert_array_equal(result.forwards, np.ones(BATCH))


@pytest.mark.full
def test_estimated_gradients_lead_to_the_same_points_and_black_boxes_fall(key):
    x, y = sample()
    options = {"steps": 5, "keep": "loss", "loss": losses.margin}
    exact = jrobust.run(APGD(L2(0.2), **options), key, NET, x, y)
    attack = APGD(L2(0.2), estimator=CGE(1e-3), **options)
    near = jrobust.run(attack, key, NET, x, y)
    assert np.mean(np.abs(near.x - exact.x) < 1e-3) > 0.9
    calls = []

    def black_box(x):
        calls.append(x.shape)
        return np.asarray(NET(jnp.asarray(x)))

    hosted = jrobust.run(attack, key, drive.Host(black_box), x[:2], y[:2])
    assert len(calls) == 5 * attack.estimator.queries(x[0]) + 1
    np.testing.assert_array_equal(hosted.forwards, np.full(2, len(calls)))
    with pytest.raises(TypeError, match="APGD needs gradients, which a Host model does not give"):
        jrobust.run(APGD(L2(0.2), **options), key, drive.Host(black_box), x[:2], y[:2])


@pytest.mark.parametrize(
    ("attack", "error", "text"),
    [
        (APGD(L0(1)), TypeError, r"APGD is defined for Linf, L2 and L1, got L0.*: use PGD"),
        (APGD(Linf(0.1), keep="last"), ValueError, "keep must be one of .'success', 'loss'.*last"),
        (APGD(Linf(0.1), rho=1.5), ValueError, "rho is a share of moves in .0, 1., got 1.5"),
        (APGD(Linf(0.1), steps=0), ValueError, "steps must be a positive int, got 0"),
        (APGD(0.1), TypeError, "APGD.threat must be a threat model"),
    ],
)
def test_settings_that_make_no_sense(attack, error, text, key):
    x, y = sample()
    with pytest.raises(error, match=text):
        jrobust.run(attack, key, NET, x, y)
    if error is TypeError:  # also where values cannot be read
        with pytest.raises(error, match=text):
            jax.jit(lambda x: attack(key, NET, x, y))(x)
