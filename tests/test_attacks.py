"""Attacks: closed forms on linear models, a float64 reference in numpy, invariants of lanes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import drive, keys, losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks import (
    DDN,
    FGSM,
    FMN,
    MIFGSM,
    PGD,
    RSFGSM,
    AttackResult,
    GradientAttack,
    eot,
    restarts,
    sequence,
    union,
    with_eps,
)
from jrobust.threat import L0, L1, L2, Linf, Threat, expand
from jrobust.zeroth_order import CGE

# ------------------------------------------------------------------ linear models: closed forms


@algorithm
class Linear:
    weights: jax.Array  # (d, C)
    bias: jax.Array  # (1, C)

    def __call__(self, x):
        return x.reshape(x.shape[0], -1) @ self.weights + self.bias


DUAL = {Linf: 1, L2: 2, L1: np.inf}


def separated(classes, shape, batch, seed=0):
    """A linear model all of whose classes are equally far apart, correct on all inputs.

    Each class has features of its own, all weights of one size: the nearest class is then the one
    of the highest other logit, and a step for the margin goes straight to it. Returns the model, x,
    y, and per example the margin (B,) and the difference of weights (B, d) to the nearest class.
    """
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    weights = np.zeros((d, classes), np.float32)
    owner = np.arange(d) % classes
    weights[np.arange(d), owner] = rng.choice([-1.0, 1.0], d)
    x = np.float32(rng.uniform(0.45, 0.55, (batch, *shape)))
    raw = x.reshape(batch, -1) @ weights
    bias = -raw.mean(0, keepdims=True) + np.float32(rng.normal(size=(1, classes)) * 0.05)
    logits = np.float64(raw + bias)
    y = logits.argmax(1)
    second = np.argsort(logits, 1)[:, -2]
    each = np.arange(batch)
    towards = np.float64(weights[:, second] - weights[:, y]).T
    return (
        Linear(jnp.asarray(weights), jnp.asarray(bias, jnp.float32)),
        x,
        y,
        second,
        logits[each, y] - logits[each, second],
        towards,
    )


REACHING = {
    "PGD": lambda threat, loss: PGD(threat, steps=12, rel_step_size=1.0, loss=loss),
    "plain": lambda threat, loss: PGD(threat, steps=9, random_start=False, loss=loss),
    "FGSM": lambda threat, loss: FGSM(threat, loss=loss),
    "MIFGSM": lambda threat, loss: MIFGSM(threat, steps=4, loss=loss),
}


@pytest.mark.parametrize(
    ("name", "kind", "loss", "classes", "targeted", "batch", "shape"),
    [
        ("PGD", Linf, losses.cross_entropy, 2, False, 8, (6,)),
        ("plain", Linf, losses.margin, 3, False, 3, (3, 3)),
        ("plain", Linf, losses.dlr, 3, False, 8, (9,)),
        ("PGD", Linf, losses.margin, 2, True, 1, (2, 2, 2)),
        ("plain", L2, losses.cross_entropy, 2, False, 1, (2, 2, 2)),
        ("PGD", L2, losses.margin, 4, False, 8, (2, 4)),
        ("plain", L2, losses.cross_entropy, 2, True, 8, (6,)),
        ("FGSM", Linf, losses.cross_entropy, 2, False, 3, (6,)),
        ("FGSM", Linf, losses.dlr, 4, False, 8, (2, 2, 3)),
        ("FGSM", L2, losses.margin, 3, False, 8, (3, 3)),
        ("MIFGSM", L2, losses.margin, 3, False, 3, (2, 2, 3)),
        ("PGD", L1, losses.margin, 3, False, 8, (9,)),
        ("plain", L1, losses.cross_entropy, 2, True, 8, (2, 3)),
        ("FGSM", L1, losses.dlr, 4, False, 3, (2, 2, 3)),
    ],
)
def test_linear_models_fall_at_the_minimal_distance_and_never_below(
    name, kind, loss, classes, targeted, batch, shape, key
):
    model, x, y, second, margin, towards = separated(classes, shape, batch)
    minimal = margin / np.linalg.norm(towards, DUAL[kind], axis=1)
    assert minimal.max() < 0.4, "the box must not bind"
    targets = second if targeted else None
    for factor, falls in ((0.999, False), (1.001, True)):
        attack = REACHING[name](kind(np.float32(factor * minimal)), loss)
        result = jrobust.run(attack, key, model, x, y, targets=targets)
        np.testing.assert_array_equal(result.success, np.full(batch, falls))
        # In L2 rounding of each coordinate may add half a unit in the last place.
        assert np.all(result.distance <= np.float32(factor * minimal) + 1e-7)
        if falls:
            assert np.all(result.distance >= minimal * (1 - 1e-5))
            assert np.all(result.step > 0)
        else:
            assert np.all(result.step == -1)


def greedy(w, room, eps):
    """What an L1 budget gains at most on a linear model: the steepest features, to the box."""
    order = np.argsort(-np.abs(w))
    before = np.cumsum(room[order]) - room[order]
    return np.sum(np.abs(w[order]) * np.clip(eps - before, 0, room[order]))


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_linear_models_fall_at_the_minimal_distance_where_the_box_binds(kind, key):
    """The minimal radius by bisection in float64: half of the inputs sit at the box."""
    rng = np.random.default_rng(3)
    batch, d = 12, 8
    w = rng.normal(size=d)
    x = np.float32(rng.random((batch, d)))
    x = np.where(rng.random(x.shape) < 0.5, np.round(x), x)
    # Half of the way to the far corner of the box.
    gain = np.maximum(w * (1 - x), -w * x).sum(1)
    weights = np.float32(np.stack([np.zeros(d), w], 1))
    minimal, bias = [], []
    for row, most in zip(np.float64(x), gain):
        # sum of w (p - x) over the worst p of radius eps
        def reach(eps, row=row):
            if kind is Linf:
                return np.sum(w * (np.clip(row + eps * np.sign(w), 0, 1) - row))
            if kind is L1:
                return greedy(w, np.where(w > 0, 1 - row, row), eps)
            lower, upper = 0.0, 1e6
            for _ in range(200):
                t = (lower + upper) / 2
                move = np.clip(t * w, -row, 1 - row)
                lower, upper = (t, upper) if np.linalg.norm(move) < eps else (lower, t)
            return np.sum(w * np.clip(lower * w, -row, 1 - row))

        lower, upper = 0.0, d
        for _ in range(60):
            middle = (lower + upper) / 2
            lower, upper = (middle, upper) if reach(middle) < most / 2 else (lower, middle)
        minimal.append(lower)
        bias.append(-row @ w - most / 2)
    minimal = np.array(minimal)
    offset = np.float32(np.stack([np.zeros(batch), bias], 1))

    def model(rows):
        """Each example brings its own bias as two last features, which have no weight."""
        return rows[:, :d] @ weights + rows[:, d:]

    lo = np.float32(np.r_[np.zeros(d), -100, -100])
    hi = np.float32(np.r_[np.ones(d), 100, 100])

    def frozen_bias(rows):
        return model(jnp.concatenate([rows[:, :d], jax.lax.stop_gradient(rows[:, d:])], 1))

    stacked = np.concatenate([x, offset], 1)
    y = np.zeros(batch, int)
    unbound = (gain / 2) / np.linalg.norm(w, DUAL[kind])
    assert np.mean(minimal > 1.05 * unbound) > 0.5, "the box must bind"
    for factor, falls in ((0.999, False), (1.001, True)):
        attack = PGD(
            kind(np.float32(factor * minimal), lo, hi),
            steps=40,
            rel_step_size=1.0,
            random_start=False,
        )
        result = jrobust.run(attack, key, frozen_bias, stacked, y)
        np.testing.assert_array_equal(result.success, np.full(batch, falls))


def linear_case(d, batch=12, seed=0):
    """Weights (d,) of very unequal size, and inputs (batch, d), a third of them at the box."""
    rng = np.random.default_rng(seed)
    w = np.float32(rng.normal(size=d) * rng.exponential(size=d))
    x = rng.random((batch, d))
    x = np.float32(np.where(rng.random(x.shape) < 0.3, np.round(x), x))
    return w, x


def score(w):
    """Two logits whose difference is ``w.x``; class 1 is never left, so attacks spend all steps."""

    def model(x):
        gained = x.reshape(x.shape[0], -1) @ w
        return jnp.stack([gained, 1e4 + 0 * gained], 1)

    return model


def gains(result, w, x):
    moved = np.float64(result.x).reshape(len(x), -1) - x.reshape(len(x), -1)
    return moved @ np.float64(w)


@algorithm
class SparseDescent(GradientAttack):
    """Steps of fixed sparsity (Tramèr & Boneh 2019), with the exact projection or a rescaling."""

    threat: Threat
    density: float = 0.1
    exact: bool = static(default=True)
    steps: int = static(default=20)
    loss: losses.Loss = static(default=losses.margin)
    keep: str = static(default="last")

    def start(self, record):
        return record.x0, None

    def move(self, state, loss, gradient):
        ball, x0 = state.record.threat, state.record.x0
        size = expand(2.5 / self.steps * ball.eps, x0)
        x = state.x + size * ball.steepest(gradient, self.density)
        if self.exact:
            return ball.project(x, x0), None
        length = jnp.sum(jnp.abs(x - x0), axis=1, keepdims=True)
        size = expand(ball.eps, x0)
        return jnp.clip(x0 + (x - x0) * jnp.minimum(1.0, size / length), 0.0, 1.0), None


def test_l1_comes_close_to_the_best_of_a_linear_model(key):
    """Where sign steps of fixed sparsity, however projected, spread the budget for good."""
    w, x = linear_case(400)
    y, eps = np.ones(len(x), int), np.float32(6.0)
    room = np.where(w > 0, 1 - np.float64(x), np.float64(x))
    best = np.array([greedy(np.float64(w), row, eps) for row in room])

    def reached(attack):
        return gains(jrobust.run(attack, key, score(w), x, y), w, x) / best

    options = {"loss": losses.margin, "keep": "last"}
    np.testing.assert_allclose(reached(FGSM(L1(eps), **options)), 1, rtol=1e-5)
    np.testing.assert_allclose(reached(PGD(L1(eps), random_start=False, **options)), 1, rtol=1e-5)
    assert np.all(reached(PGD(L1(eps), **options)) > 0.999)
    for exact in (True, False):
        assert np.all(reached(SparseDescent(L1(eps), exact=exact)) < 0.95)


@pytest.mark.parametrize("pixels", [True, False])
def test_l0_finds_the_best_locations_of_a_linear_model(pixels, key):
    """The ones of highest gain, moved to their better bound."""
    w, x = linear_case(120)
    x = x.reshape(-1, 5, 8, 3)
    y, eps = np.ones(len(x), int), 4
    gain = np.where(
        w > 0, w * (1 - np.float64(x).reshape(len(x), -1)), -w * np.float64(x).reshape(len(x), -1)
    )
    gain = gain.reshape(len(x), -1, 3).sum(2) if pixels else gain
    best = np.sort(gain, 1)[:, -eps:].sum(1)
    ball = L0(eps, pixels=pixels)

    def run(**options):
        attack = PGD(ball, loss=losses.margin, keep="last", **options)
        return jrobust.run(attack, key, score(w), x, y)

    for random_start in (True, False):
        result = run(random_start=random_start)
        np.testing.assert_array_equal(result.distance, np.full(len(x), eps))
        assert np.all(gains(result, w, x) > 0.99 * best)
    exact = run(step_size=1e6, random_start=False, steps=1)
    np.testing.assert_allclose(gains(exact, w, x), best, rtol=1e-5)
    at_bound = np.asarray(exact.x)[np.asarray(exact.x) != x]
    assert np.all((at_bound == 0) | (at_bound == 1))


@pytest.mark.parametrize("kind", [Linf, L2])
def test_rsfgsm_ends_where_its_closed_form_says(kind, key):
    model, x, y, _, margin, towards = separated(2, (3, 3), 64)
    minimal = margin / np.linalg.norm(towards, DUAL[kind], axis=1)
    eps = np.float32(minimal * np.random.default_rng(0).uniform(0.9, 1.6, 64))
    ids = np.arange(64) + 100
    result = jrobust.run(RSFGSM(kind(eps)), key, model, x, y, ids=ids)
    each = keys.fold(keys.examples(key, jnp.asarray(ids)), 0)
    x64, flat_eps = np.float64(x).reshape(64, -1), np.float64(eps)[:, None]
    start = np.float64(kind(eps).sample(each, x)).reshape(64, -1)
    if kind is Linf:
        end = np.clip(start + 1.25 * flat_eps * np.sign(towards), x64 - flat_eps, x64 + flat_eps)
    else:
        move = (
            start - x64 + 1.25 * flat_eps * towards / np.linalg.norm(towards, axis=1, keepdims=True)
        )
        length = np.linalg.norm(move, axis=1, keepdims=True)
        end = x64 + move * np.minimum(1, flat_eps / length)
    gained = np.maximum(*(np.sum((p - x64) * towards, 1) for p in (start, end))) - margin
    clear = np.abs(gained) > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(result.success[clear], gained[clear] > 0)
    assert 5 < np.sum(np.asarray(result.success)) < 59
    broken_at_the_end = np.asarray(result.step) == 1
    np.testing.assert_allclose(
        result.x.reshape(64, -1)[broken_at_the_end], end[broken_at_the_end], atol=1e-6
    )


# ------------------------------------------------------------- a small net, and PGD in numpy


@algorithm
class Net:
    inner: jax.Array  # (6, 8)
    outer: jax.Array  # (8, 3)

    def __call__(self, x):
        return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ self.inner) @ self.outer


def make_net(seed=0):
    rng = np.random.default_rng(seed)
    return Net(
        jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    )


NET = make_net()
BATCH = 16


def sample(batch=BATCH, seed=0, flips=True):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.uniform(0.0, 1.0, (batch, 2, 3)))
    y = np.asarray(NET(x)).argmax(1)
    if flips:
        y[0] = (y[0] + 1) % 3  # one example is wrong from the start
    return x, y


def forward64(net, x):
    inner, outer = np.float64(net.inner), np.float64(net.outer)
    hidden = np.tanh((x.reshape(len(x), -1) - 0.5) @ inner)
    return hidden @ outer, hidden


def gradient64(net, x, y):
    """Cross entropy (B,), its gradient (B, ...) and the prediction, in float64."""
    logits, hidden = forward64(net, x)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = p - np.eye(logits.shape[1])[y]
    back = (error @ np.float64(net.outer).T) * (1 - hidden**2)
    loss = -np.log(p[np.arange(len(y)), y])
    return loss, (back @ np.float64(net.inner).T).reshape(x.shape), logits.argmax(1)


def project64(kind, x, x0, eps):
    if kind is Linf:
        return np.clip(np.clip(x, x0 - eps, x0 + eps), 0, 1)
    if kind is L0:
        inside = np.clip(x, 0, 1)
        worth = np.sum((x - x0) ** 2 - (x - inside) ** 2, axis=2)
        kept = np.argsort(np.argsort(-worth, axis=1, kind="stable"), axis=1) < eps
        return np.where(kept[..., None], inside, x0)
    out = []
    for row, start in zip(x, x0):
        move, lower, upper = row - start, 0.0, 1.0
        if kind is L1:
            room = np.where(move > 0, 1 - start, start)
            size, upper = np.abs(move), np.abs(move).max()
            inside = np.minimum(size, room).sum() <= eps
            for _ in range(100):
                t = 0.0 if inside else (lower + upper) / 2
                moved = np.clip(size - t, 0, room)
                lower, upper = (lower, t) if moved.sum() <= eps else (t, upper)
            out.append(start + np.sign(move) * moved)
            continue
        if np.linalg.norm(np.clip(row, 0, 1) - start) <= eps:
            lower = 1.0
        else:
            for _ in range(100):
                t = (lower + upper) / 2
                inside = np.linalg.norm(np.clip(start + t * move, 0, 1) - start) <= eps
                lower, upper = (t, upper) if inside else (lower, t)
        out.append(np.clip(start + lower * move, 0, 1))
    return np.array(out)


def reference(net, kind, eps, x0, start, y, *, steps, size, momentum=None):
    """Points, losses and predictions of all ``steps + 1`` evaluations, in float64."""
    x, velocity = np.float64(start), np.zeros(np.shape(start))
    points, values, predictions = [], [], []
    for t in range(steps + 1):
        loss, g, prediction = gradient64(net, x, y)
        points.append(x)
        values.append(loss)
        predictions.append(prediction)
        if t == steps:
            break
        if momentum is not None:
            velocity = momentum * velocity + g / np.abs(g).sum((1, 2), keepdims=True)
            g = velocity
        if kind is Linf:
            direction = np.sign(g)
        elif kind is L2:
            direction = g / np.sqrt((g**2).sum((1, 2), keepdims=True))
        elif kind is L0:
            direction = g / np.abs(g).sum((1, 2), keepdims=True)
        else:
            room = np.where(g > 0, 1 - x, x).reshape(len(x), -1)
            order = np.argsort(-np.abs(g).reshape(len(x), -1), axis=1)
            ordered = np.take_along_axis(room, order, 1)
            left = size - (np.cumsum(ordered, 1) - ordered)
            pushed = np.where(left > ordered, size, np.maximum(left, 0.0))
            direction = np.empty_like(room)
            np.put_along_axis(direction, order, pushed / size, 1)
            direction = direction.reshape(x.shape) * np.sign(g)
        x = project64(kind, x + size * direction, np.float64(x0), eps)
    return np.array(points), np.array(values), np.array(predictions)


@pytest.mark.parametrize(
    ("kind", "momentum", "keep", "random_start"),
    [
        (Linf, None, "last", True),
        (Linf, None, "success", False),
        (Linf, 1.0, "loss", False),
        (L2, None, "loss", True),
        (L2, 0.7, "last", False),
        (L1, None, "success", True),
        (L1, 0.7, "last", False),
        (L0, None, "loss", False),
    ],
)
def test_pgd_is_the_numpy_loop(kind, momentum, keep, random_start, key):
    steps = 7
    eps, size = {Linf: (0.1, 0.03), L2: (0.25, 0.08), L1: (0.4, 0.1), L0: (1, 0.12)}[kind]
    x, y = sample()
    attack = PGD(
        kind(eps),
        steps=steps,
        step_size=size,
        momentum=momentum,
        keep=keep,
        random_start=random_start,
    )
    result = jrobust.run(attack, key, NET, x, y)
    start = x
    if random_start:
        each = keys.fold(keys.examples(key, jnp.arange(BATCH)), 0)
        start = kind(np.float32(eps)).sample(each, x)
    points, values, predictions = reference(
        NET, kind, eps, x, start, y, steps=steps, size=size, momentum=momentum
    )
    wrong = predictions != y
    broken = wrong.any(0)
    first = np.where(broken, wrong.argmax(0), -1)
    evaluated = np.full(BATCH, steps + 1)
    if keep == "last":
        chosen = np.full(BATCH, steps)
    elif keep == "loss":
        chosen = values.argmax(0)
    else:
        chosen = np.where(broken, first, values.argmax(0))
        evaluated = np.where(broken, first + 1, steps + 1)
    assert 2 < broken.sum() < BATCH - 2, "the case must hold both outcomes"
    each = np.arange(BATCH)
    np.testing.assert_allclose(result.x, points[chosen, each], atol=2e-5)
    np.testing.assert_allclose(result.loss, values[chosen, each], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.success, wrong[chosen, each])
    np.testing.assert_array_equal(result.step, first)
    np.testing.assert_array_equal(result.forwards, evaluated)
    np.testing.assert_array_equal(result.backwards, np.minimum(evaluated, steps))


ATTACK = PGD(Linf(0.1), steps=6, rel_step_size=0.4)


def same(a, b, **close):
    """Two results agree: flags and counts equal, numbers close (equal by default)."""
    for name in AttackResult._fields:
        left, right = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        if left.dtype == np.float32 and close:
            np.testing.assert_allclose(left, right, err_msg=name, **close)
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def stepper(attack):
    """Compiled init, step and finish: one program each, so that results compare bit by bit."""

    def init(key, ids, x, y):
        return attack.init(keys.examples(key, ids), x, y)

    return (
        jax.jit(init),
        jax.jit(lambda state: attack.step(NET, state)),
        jax.jit(lambda state: drive.run(attack, NET, state)),
    )


@pytest.mark.parametrize(
    "attack",
    [ATTACK, PGD(L2(0.25), steps=4, keep="loss"), restarts(PGD(Linf(0.06), steps=2), 3)],
)
def test_stepping_by_hand_is_the_call(attack, key):
    x, y = sample()
    init, step, _ = stepper(attack)
    state = init(key, jnp.arange(BATCH), x, y)
    for _ in range(40):
        if np.all(attack.done(state)):
            break
        state = step(state)
    same(attack.result(state), jrobust.run(attack, key, NET, x, y), **CLOSE)
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(state))


def test_lanes_can_be_permuted_stored_and_refilled(key):
    x, y = sample()
    other_x, other_y = sample(seed=9)
    init, step, finish = stepper(ATTACK)
    ids = jnp.arange(BATCH)
    state = init(key, ids, x, y)
    alone = ATTACK.result(finish(state))
    other = ATTACK.result(finish(init(key, ids + 50, other_x, other_y)))
    midway = step(step(step(state)))

    order = np.random.default_rng(0).permutation(BATCH)
    shuffled = jax.tree.map(lambda a: a[order], midway)
    same(ATTACK.result(finish(shuffled)), jax.tree.map(lambda a: a[order], alone))

    refill = np.arange(BATCH) % 3 == 0
    fresh = init(key, ids + 50, other_x, other_y)

    def choose(new, old):
        return jnp.where(refill.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    mixed = ATTACK.result(finish(jax.tree.map(choose, fresh, midway)))
    same(mixed, jax.tree.map(choose, other, alone))

    part = jax.tree.map(lambda a: a[3:8], midway)
    same(ATTACK.result(finish(part)), jax.tree.map(lambda a: a[3:8], alone), **CLOSE)


def test_restarting_lanes_can_be_refilled_with_others(key):
    """Restart number and step differ from lane to lane; costs and points do not notice."""
    attack = restarts(PGD(Linf(0.06), steps=3), 3)
    init, step, finish = stepper(attack)
    x, y = sample()
    ids = jnp.arange(BATCH)
    state = init(key, ids, x, y)
    alone = attack.result(finish(state))
    assert np.asarray(alone.success).any()
    assert not np.asarray(alone.success).all()
    midway = state
    for _ in range(5):
        midway = step(midway)

    def choose(new, old):
        return jnp.where((np.arange(BATCH) % 2 == 0).reshape(-1, *[1] * (old.ndim - 1)), new, old)

    same(attack.result(finish(jax.tree.map(choose, state, midway))), alone)


def test_ids_make_results_independent_of_order_and_batch(key):
    x, y = sample()
    ids = np.arange(BATCH) * 7 + 3
    whole = jrobust.run(ATTACK, key, NET, x, y, ids=ids)
    order = np.random.default_rng(1).permutation(BATCH)
    shuffled = jrobust.run(ATTACK, key, NET, x[order], y[order], ids=ids[order])
    same(shuffled, jax.tree.map(lambda a: a[order], whole))
    part = jrobust.run(ATTACK, key, NET, x[4:7], y[4:7], ids=ids[4:7])
    same(part, jax.tree.map(lambda a: a[4:7], whole), **CLOSE)
    unlike = jrobust.run(ATTACK, key, NET, x, y, ids=ids + 1)
    assert not np.array_equal(unlike.x, whole.x)


@pytest.mark.parametrize("attack", [ATTACK, sequence(FGSM(Linf(0.05)), ATTACK)])
def test_done_lanes_are_frozen(attack, key):
    x, y = sample()
    init, step, finish = stepper(attack)
    state = finish(init(key, jnp.arange(BATCH), x, y))
    assert np.all(attack.done(state))
    after = step(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------- costs


def test_counts_are_those_of_real_executions(key):
    counts = {"forward": 0, "backward": 0}

    def count(what):
        counts[what] += 1

    @jax.custom_vjp
    def counted(x):
        jax.debug.callback(lambda: count("forward"))
        return x

    def forward(x):
        return counted(x), None

    def backward(_, g):
        jax.debug.callback(lambda: count("backward"))
        return (g,)

    counted.defvjp(forward, backward)
    x, y = sample(2, flips=False)
    for attack in (
        PGD(Linf(1e-4), steps=3, keep="loss", random_start=False),
        restarts(PGD(Linf(1e-4), steps=2), 2),
        sequence(FGSM(Linf(1e-4)), MIFGSM(Linf(1e-4), steps=3)),
    ):
        counts.update(forward=0, backward=0)
        result = jrobust.run(attack, key, lambda x: NET(counted(x)), x, y)
        jax.block_until_ready(result)
        jax.effects_barrier()
        np.testing.assert_array_equal(result.forwards, np.full(2, counts["forward"]))
        np.testing.assert_array_equal(result.backwards, np.full(2, counts["backward"]))
        assert counts["backward"] > 0


def test_host_models_are_called_exactly_as_often_as_counted(key):
    seen = []

    def black_box(x):
        assert type(x) is np.ndarray, "a black box must never be traced"
        seen.append(x.shape)
        return forward64(NET, np.float64(x))[0]

    x, y = sample(3, flips=False)
    estimator = CGE(1e-3)
    attack = PGD(Linf(1e-4), steps=2, estimator=estimator)
    result = jrobust.run(attack, key, drive.Host(black_box), x, y)
    queries = estimator.queries(x[0])
    assert len(seen) == 2 * queries + 1
    assert set(seen) == {x.shape}
    np.testing.assert_array_equal(result.forwards, np.full(3, len(seen)))
    np.testing.assert_array_equal(result.backwards, np.zeros(3))

    # The same estimates as inside a compiled program, hence the same points.
    attack = PGD(Linf(0.1), steps=3, estimator=estimator, keep="last", loss=losses.margin)
    hosted = jrobust.run(attack, key, drive.Host(black_box), x, y)
    traced = jrobust.run(attack, key, NET, x, y)
    np.testing.assert_array_equal(hosted.success, traced.success)
    np.testing.assert_allclose(hosted.x, traced.x, atol=1e-5)
    seen.clear()
    both = sequence(attack_that_stops := PGD(Linf(0.2), steps=3, estimator=estimator), ATTACK_CGE)
    result = jrobust.run(both, key, drive.Host(black_box), x, y)
    assert attack_that_stops.stops_at_success
    assert len(seen) >= int(np.max(np.asarray(result.forwards)))


ATTACK_CGE = PGD(Linf(0.1), steps=2, estimator=CGE(1e-3))


# ------------------------------------------------------------------------ compositions


def test_restarts_are_lone_runs_and_the_lowest_success_wins(key):
    once, n = PGD(Linf(0.07), steps=2, rel_step_size=0.3), 4
    x, y = sample(32)
    each = keys.examples(key, jnp.arange(32))
    lone = jax.jit(
        lambda k: once.result(drive.run(once, NET, once.init(k, jnp.asarray(x), jnp.asarray(y))))
    )
    runs = [lone(keys.restart(each, jnp.full(32, r))) for r in range(n)]
    got = jrobust.run(restarts(once, n), key, NET, x, y)
    success = np.array([r.success for r in runs])
    loss = np.array([r.loss for r in runs])
    broken = success.any(0)
    winner = np.where(broken, success.argmax(0), loss.argmax(0))
    assert len(set(winner[broken])) > 1, "a later restart must win somewhere"
    rows = np.arange(32)
    np.testing.assert_array_equal(got.success, broken)
    np.testing.assert_allclose(got.x, np.array([r.x for r in runs])[winner, rows], atol=1e-6)
    ran = np.where(broken, winner + 1, n)
    for field in ("forwards", "backwards"):
        spent = np.cumsum([getattr(r, field) for r in runs], 0)
        np.testing.assert_array_equal(getattr(got, field), spent[ran - 1, rows])
    same(jrobust.run(restarts(once, 1), key, NET, x, y), runs[0], **CLOSE)
    assert np.all(got.success >= runs[0].success)
    assert got.success.sum() > runs[0].success.sum()


def test_restarts_of_the_highest_loss_never_lose(key):
    once = PGD(L2(0.25), steps=2, keep="loss")
    x, y = sample()
    one = jrobust.run(once, key, NET, x, y)
    many = jrobust.run(restarts(once, 3), key, NET, x, y)
    assert np.all(many.loss >= one.loss - 1e-6)
    assert np.any(many.loss > one.loss + 1e-6)
    np.testing.assert_array_equal(many.forwards, np.full(BATCH, 9))
    np.testing.assert_array_equal(many.backwards, np.full(BATCH, 6))


def test_sequence_runs_the_second_on_what_stands(key):
    weak, strong = FGSM(Linf(0.04)), PGD(Linf(0.12), steps=4, random_start=False)
    x, y = sample()
    got = jrobust.run(sequence(weak, strong), key, NET, x, y)
    first = jrobust.run(weak, key, NET, x, y)
    state = strong.init(
        keys.attack(keys.examples(key, jnp.arange(BATCH)), 1), jnp.asarray(x), jnp.asarray(y)
    )
    second = strong.result(jax.jit(lambda s: drive.run(strong, NET, s))(state))
    fell = np.asarray(first.success)
    later = ~fell & np.asarray(second.success)
    assert fell.any()
    assert later.any()
    np.testing.assert_array_equal(got.success, fell | later)
    np.testing.assert_allclose(got.x[fell], first.x[fell], atol=1e-6)
    np.testing.assert_allclose(got.x[later], second.x[later], atol=1e-6)
    for field in ("forwards", "backwards"):
        a, b = (np.asarray(getattr(r, field)) for r in (first, second))
        np.testing.assert_array_equal(getattr(got, field), np.where(fell, a, a + b))


@pytest.mark.parametrize("compose", [sequence, union])
def test_members_draw_from_streams_of_their_own(compose, key):
    x, y = sample()
    each = keys.examples(key, jnp.arange(BATCH))
    state = jax.jit(compose(ATTACK, ATTACK).init)(each, x, y)
    members = state.states if compose is sequence else state
    for index, member in enumerate(members):
        want = ATTACK.init(keys.attack(each, index), jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(member.x, want.x, atol=1e-6)
    assert not np.allclose(members[0].x, members[1].x, atol=1e-3)


def test_union_takes_the_worst_of_all(key):
    members = FGSM(Linf(0.05)), PGD(L2(0.25), steps=4, random_start=False)
    x, y = sample()
    got = jrobust.run(union(*members), key, NET, x, y)
    state = [
        m.init(
            keys.attack(keys.examples(key, jnp.arange(BATCH)), i), jnp.asarray(x), jnp.asarray(y)
        )
        for i, m in enumerate(members)
    ]
    runs = [
        m.result(jax.jit(lambda s, m=m: drive.run(m, NET, s))(s)) for m, s in zip(members, state)
    ]
    a, b = (np.asarray(r.success) for r in runs)
    assert (a != b).any()
    np.testing.assert_array_equal(got.success, a | b)
    second = (b & ~a) | ((a == b) & np.asarray(runs[1].loss > runs[0].loss))
    assert (a & b & second).any()
    assert (a & b & ~second).any()
    for field in ("x", "distance", "loss"):
        one, two = (np.asarray(getattr(r, field)) for r in runs)
        mask = second.reshape(-1, *[1] * (one.ndim - 1))
        np.testing.assert_allclose(getattr(got, field), np.where(mask, two, one), atol=1e-5)
    for field in ("forwards", "backwards"):
        one, two = (np.asarray(getattr(r, field)) for r in runs)
        np.testing.assert_array_equal(getattr(got, field), one + two)


def test_of_closest_points_a_union_takes_the_closest(key):
    """In one norm; of points in a ball, or in several norms, the one of highest loss."""
    x, y = jnp.full((4, 2), 0.5), jnp.zeros(4, jnp.int32)
    success = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    move = np.float32([[0.2, 0.1, 0.2, 0], [0.1, 0.2, 0, 0]])
    loss = np.float32([[1, 2, 0, 0], [0, 3, 9, 1]])

    def chosen(*members):
        attack = union(*members)
        states = [
            state._replace(
                record=state.record._replace(best=x + m[:, None], success=s, loss=jnp.asarray(v))
            )
            for state, m, s, v in zip(
                attack.init(jax.random.split(key, 4), x, y), move, success, loss
            )
        ]
        return attack.result(tuple(states)).loss

    closest = FMN(L2(1.0)), eot(DDN(L2(1.0)))
    np.testing.assert_array_equal(chosen(*closest), [0, 2, 0, 1])
    np.testing.assert_array_equal(chosen(FMN(L2(1.0)), FMN(Linf(1.0))), [1, 3, 0, 1])
    np.testing.assert_array_equal(chosen(PGD(L2(1.0)), PGD(L2(1.0))), [1, 3, 0, 1])


def test_with_eps_reaches_every_member_and_a_sweep_is_each_alone(key):
    attack = sequence(restarts(PGD(Linf(0.5), steps=2), 2), union(FGSM(L2(0.5)), FGSM(Linf(0.5))))
    assert [t.eps for t in with_eps(attack, 0.125).threats()] == [0.125] * 3
    assert [type(t) for t in with_eps(attack, 0.125).threats()] == [Linf, L2, Linf]

    x, y = sample()
    radii = np.float32([0.0, 0.03, 0.1, 0.3])
    swept = jrobust.sweep(ATTACK, key, NET, x, y, radii)
    rates = swept.success.mean(1)
    assert rates[0] == 1 / BATCH
    assert rates[-1] > 0.9
    for i, eps in enumerate(radii):
        alone = jrobust.run(with_eps(ATTACK, eps), key, NET, x, y)
        same(jax.tree.map(lambda a, i=i: a[i], swept), alone, **CLOSE)


# ---------------------------------------------------------------- broken and reduced models


@pytest.mark.parametrize("keep", ["success", "loss", "last"])
def test_non_finite_logits_are_never_robust(keep, key):
    bad = jnp.float32([[np.nan, np.inf, -np.inf]])

    x = np.float32(np.random.default_rng(0).uniform(0.2, 0.4, (8, 2, 3)))
    x[:6, 0, 0] = 0.9
    x[:, 1] = 0.5 * np.eye(3)[np.arange(8) % 3]

    def model(x):
        """Class 0 by far, but with one broken logit where the first feature is large."""
        which = jnp.argmax(x[:, 1], 1)
        logits = jnp.stack([0 * x[:, 0, 0] + 9, 0 * x[:, 0, 0], x.sum((1, 2))], 1)
        broken = logits.at[:, 1].set(bad[0, which])
        return jnp.where(x[:, :1, 0] > 0.5, broken, logits)

    attack = PGD(Linf(0.1), steps=2, keep=keep, loss=losses.margin, random_start=False)
    y = np.zeros(8, int)
    result = jrobust.run(attack, key, model, x, y)
    np.testing.assert_array_equal(result.success, x[:, 0, 0] > 0.5)
    assert np.all(np.isfinite(result.x))
    assert np.all((result.x >= 0) & (result.x <= 1))
    np.testing.assert_array_equal(np.isfinite(result.loss), ~np.asarray(result.success))
    # Towards a class, a broken point is no success.
    targeted = jrobust.run(attack, key, model, x, y, targets=np.full(8, 2))
    assert not np.any(targeted.success)
    assert np.all(np.isfinite(targeted.x))


@pytest.mark.parametrize("momentum", [None, 1.0])
def test_nan_gradients_leave_points_finite_and_inside(momentum, key):
    def model(x):
        z = x.sum((1, 2))
        return jnp.stack([z * 0 + 50, jnp.sqrt(z - z) + z], 1)  # value finite, derivative not

    x = np.float32(np.random.default_rng(0).random((4, 2, 3)))
    for kind in (Linf, L2, L1):
        attack = PGD(kind(0.1), steps=3, momentum=momentum, keep="last")
        result = jrobust.run(attack, key, model, x, np.zeros(4, int))
        assert np.all(np.isfinite(result.x))
        assert np.all(result.distance <= 0.1 * (1 + 1e-6))


def test_a_lane_stops_only_if_the_judge_agrees(key):
    """The searched model calls everything misclassified; the judge is the real one."""
    x, y = sample(flips=False)
    attack = PGD(Linf(0.1), steps=5, rel_step_size=0.4)

    def wrong(rows):
        return NET(rows) - 100.0 * jax.nn.one_hot(y, 3)

    state = attack.init(keys.examples(key, jnp.arange(BATCH)), jnp.asarray(x), jnp.asarray(y))
    result = attack.result(jax.jit(lambda s: drive.run(attack, wrong, s, NET))(state))
    truth = np.asarray(NET(result.x)).argmax(1) != y
    np.testing.assert_array_equal(result.success, truth)
    assert truth.any()
    assert not truth.all()
    evaluated = np.where(truth, np.asarray(result.step) + 1, 6)
    # Every evaluation claimed success, so the judge was asked each time.
    np.testing.assert_array_equal(result.forwards, 2 * evaluated)
    # A judge that never hears of a success is never asked.
    blind = attack.result(
        jax.jit(lambda s: drive.run(attack, lambda r: 100.0 * jax.nn.one_hot(y, 3), s, NET))(state)
    )
    assert not np.any(blind.success)
    np.testing.assert_array_equal(blind.forwards, np.full(BATCH, 6))


# -------------------------------------------------------------------- transformations


@pytest.mark.parametrize("kind", [L2, L1])
def test_pgd_differentiates_in_reverse_like_finite_differences(kind, key):
    """Through the attack to the model's parameters, the input and the radius."""
    eps, steps, rel = 0.2, 3, 0.5
    rng = np.random.default_rng(5)
    x = np.float32(rng.uniform(0.35, 0.65, (4, 2, 3)))
    y = np.asarray(NET(x)).argmax(1)
    weights = rng.normal(size=x.shape)

    def total(net, x, eps):
        attack = PGD(kind(eps), steps=steps, rel_step_size=rel, keep="last")
        return jnp.sum(np.float32(weights) * attack(key, net, x, y).x)

    by_net, by_x, by_eps = jax.jit(jax.grad(total, (0, 1, 2)))(NET, x, jnp.float32(eps))
    each = keys.fold(keys.examples(key, jnp.arange(4)), 0)
    unit = (np.float64(kind(np.float32(eps)).sample(each, x)) - x) / eps

    def total64(inner, outer, x, eps):
        points, _, _ = reference(
            Net(inner, outer), kind, eps, x, x + eps * unit, y, steps=steps, size=eps * rel
        )
        return np.sum(weights * points[-1])

    arguments = [np.float64(v) for v in (NET.inner, NET.outer, x, eps)]
    for i, got in enumerate((by_net.inner, by_net.outer, by_x, by_eps)):
        want, h = np.zeros(np.shape(got)), 1e-6
        for index in np.ndindex(want.shape):
            ends = []
            for sign in (1, -1):
                moved = [np.array(v) for v in arguments]
                moved[i][index] += sign * h
                ends.append(total64(*moved))
            want[index] = (ends[0] - ends[1]) / (2 * h)
        # Which features an L1 step moves, and by how much, does not change with the model.
        assert np.abs(want).max() > 0.05 or (kind is L1 and i < 2)
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_shards_are_bit_equal_to_one_device_at_the_same_lane_shape(key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()
    x, y = sample()
    ids = jnp.arange(BATCH)

    def attack(key, net, x, y, ids):
        return ATTACK(key, net, x, y, ids=ids)

    one = jax.jit(attack)
    parts = [one(key, NET, x[i : i + 2], y[i : i + 2], ids[i : i + 2]) for i in range(0, BATCH, 2)]
    want = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    mapped = jax.jit(
        jax.shard_map(attack, mesh=mesh, in_specs=(whole, whole, rows, rows, rows), out_specs=rows)
    )
    same(mapped(key, NET, jnp.asarray(x), jnp.asarray(y), ids), want)
    put = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, rows))
    sharded = one(key, NET, put(x), put(jnp.asarray(y)), put(ids))
    assert len(sharded.x.sharding.device_set) == 8
    same(sharded, want)


class Counter:
    """Counts how often a model is traced; part of the compiled program, not an argument."""

    def __init__(self):
        self.traces = 0


@jax.tree_util.register_pytree_node_class
class CountedNet:
    def __init__(self, net, counter):
        self.net, self.counter = net, counter

    def __call__(self, x):
        self.counter.traces += 1
        return self.net(x)

    def tree_flatten(self):
        return (self.net,), self.counter

    @classmethod
    def tree_unflatten(cls, counter, children):
        return cls(children[0], counter)


@pytest.mark.parametrize("entry", ["run", "sweep"])
def test_nothing_retraces(entry, key):
    counter = Counter()
    x, y = sample()

    def call(eps, seed=0, params=0, step=0.4, ids=None):
        attack = PGD(Linf(eps), steps=2, rel_step_size=step)
        model = CountedNet(make_net(params), counter)
        extra = {"ids": ids}
        if entry == "sweep":
            return jrobust.sweep(attack, jax.random.key(seed), model, x, y, [eps, 0.01], **extra)
        return jrobust.run(attack, jax.random.key(seed), model, x, y, **extra)

    call(0.1)
    first = counter.traces
    assert first > 0
    call(0.1)
    for eps in (1, 0.2, np.float32(0.3), np.float64(0.3), jnp.float32(0.2), jnp.asarray(0.2)):
        call(eps)
    call(0.1, seed=1)
    call(0.1, params=1)
    call(0.1, step=1)
    call(0.1, ids=np.arange(BATCH) + 5)
    assert counter.traces == first


def test_a_result_is_inside_exactly_and_measured(key):
    """Even one unit in the last place outside of the ball would show."""
    x, y = sample(64)
    eps = np.float32(8 / 255)
    result = jrobust.run(PGD(Linf(eps), steps=3, keep="last"), key, NET, x, y)
    assert np.all(np.abs(np.float64(result.x) - np.float64(x)) <= np.float64(eps))
    np.testing.assert_array_equal(result.success, np.asarray(NET(result.x)).argmax(1) != y)
    assert result.x.dtype == result.loss.dtype == result.distance.dtype == jnp.float32
    for field in ("step", "forwards", "backwards"):
        assert getattr(result, field).dtype == jnp.int32
