"""FAB: its projection against linear programmes and bisection, closed forms, its own steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import jrobust
from jrobust import drive, keys
from jrobust.attacks import multi_targeted, restarts
from jrobust.attacks._fab import FAB, nearest_boundary
from jrobust.models import randomized
from jrobust.threat import L0, L1, L2, Linf

KINDS = [Linf, L2, L1]
NORMS = {
    Linf: lambda move: np.abs(move).max(-1),
    L2: lambda move: np.sqrt((move**2).sum(-1)),
    L1: lambda move: np.abs(move).sum(-1),
}


# ------------------------------------------------------------------ projection onto a hyperplane


def shortest(kind, x, normal, value, lo, hi):
    """The shortest move from ``x`` (d,) to the hyperplane within the box, in float64.

    By a linear programme in Linf and L1; in L2 by bisection of the multiplier. None where the box
    does not reach the hyperplane.
    """
    x, normal = np.float64(x), np.float64(normal)
    lo, hi, d = np.broadcast_to(lo, x.shape) - x, np.broadcast_to(hi, x.shape) - x, x.size
    lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
    best = np.where(normal * value > 0, lo, hi)
    if abs(value) >= abs(normal @ best):
        return None
    if kind is L2:
        low, high = 0.0, 1e9
        for _ in range(200):
            t = (low + high) / 2
            move = np.clip(-np.sign(value) * t * normal, lo, hi)
            low, high = (t, high) if abs(normal @ move) < abs(value) else (low, t)
        return move
    if kind is Linf:  # variables: move, t
        cost = np.r_[np.zeros(d), 1]
        within = np.vstack([np.c_[s * np.eye(d), -np.ones(d)] for s in (1, -1)])
        plane = np.r_[normal, 0][None]
        bounds = [*zip(lo, hi), (0, None)]
    else:  # variables: move up, move down
        cost, within, plane = np.ones(2 * d), None, np.r_[normal, -normal][None]
        bounds = [*((0, h) for h in hi), *((0, -low) for low in lo)]
    zeros = None if within is None else np.zeros(len(within))
    found = linprog(cost, within, zeros, plane, [-value], bounds)
    assert found.status == 0
    return found.x[:d] if kind is Linf else found.x[:d] - found.x[d:]


def planes(box, batch=24, shape=(2, 5), seed=0):
    """Points, a third of their features at the box, and hyperplanes at all distances."""
    rng = np.random.default_rng(seed)
    lo, hi = box
    x = rng.random((batch, *shape))
    x = np.where(rng.random(x.shape) < 0.3, np.round(x), x) * (hi - lo) + lo
    normal = rng.normal(size=x.shape) * rng.exponential(size=x.shape) ** 2
    normal[rng.random(x.shape) < 0.2] = 0
    most = np.maximum(normal * (hi - x), normal * (lo - x)).sum((1, 2))
    least = np.minimum(normal * (hi - x), normal * (lo - x)).sum((1, 2))
    side = rng.random(batch) < 0.5
    value = rng.uniform(0.02, 0.95, batch) * np.where(side, -most, -least)
    return np.float32(x), np.float32(normal), np.float32(value)


BOXES = [(0.0, 1.0), (-2.0, 3.0), (np.float32([-1, 0, -3, 2, 0]), np.float32([2, 1, 3, 4, 0.1]))]


@functools.partial(jax.jit, static_argnums=0)
def projected(kind, lo, hi, x, normal, value):
    return kind(0.1, lo, hi).to_hyperplane(x, normal, value)


@pytest.mark.parametrize("box", BOXES, ids=["unit", "wide", "uneven"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_move_to_a_hyperplane_is_the_shortest(kind, box):
    x, normal, value = planes(box)
    move = np.asarray(projected(kind, *box, x, normal, value))
    width = np.max(np.asarray(box[1]) - box[0])
    z = x + move
    assert np.all(z >= box[0] - 1e-6 * width)
    assert np.all(z <= box[1] + 1e-6 * width)
    residual = value + np.sum(np.float64(normal) * move, (1, 2))
    assert np.all(np.abs(residual) <= 1e-5 * np.abs(value) + 1e-6)
    reached = 0
    for i in range(len(x)):
        lo, hi = (np.broadcast_to(b, x.shape[1:]).ravel() for b in box)
        want = shortest(kind, x[i].ravel(), normal[i].ravel(), float(value[i]), lo, hi)
        if want is None:
            continue
        reached += 1
        got = move[i].ravel()
        assert abs(NORMS[kind](got) - NORMS[kind](want)) <= 1e-5 * width
        if kind is L2:  # the others have more than one shortest move
            np.testing.assert_allclose(got, want, atol=1e-5 * width)
    assert reached == len(x)
    # Where one is, one stays.
    on = np.clip(z, box[0], box[1])
    left = value + np.sum(np.float64(normal) * (np.float64(on) - x), (1, 2))
    again = projected(kind, *box, np.float32(on), normal, np.float32(left))
    assert np.max(np.abs(again)) <= 1e-5 * width


@pytest.mark.parametrize("kind", KINDS)
def test_hyperplanes_in_hard_cases(kind):
    x = np.float32([[0.2, 0.5, 1.0]] * 8)
    normal = np.float32([[1.0, -2.0, 0.5]] * 8)
    value = np.full(8, -0.4, np.float32)
    value[0] = -100  # out of reach: the far corner, features without weight apart
    normal[0, 2] = 0
    normal[1] = 0  # no direction
    normal[2], value[2] = normal[2] * 1e-30, value[2] * 1e-30
    normal[3], value[3] = normal[3] * 1e30, value[3] * 1e30
    normal[4, 0] = np.nan
    value[5] = np.nan
    value[6] = 0
    move = np.asarray(kind(0.1).to_hyperplane(x, normal, value))
    assert np.all(np.isfinite(move))
    np.testing.assert_allclose(move[0], [0.8, -0.5, 0], rtol=1e-6)
    assert not move[[1, 5, 6]].any()
    np.testing.assert_allclose(move[[2, 3]], move[[7, 7]], rtol=1e-5, atol=1e-7)
    # The other two carry it. The third is at its bound.
    want = {Linf: [0, -0.2, 0], L2: [0, -0.2, 0], L1: [0, -0.2, 0]}[kind]
    np.testing.assert_allclose(move[4], want, atol=1e-6)
    want = {Linf: [0.4 / 3, -0.4 / 3, 0], L2: [0.08, -0.16, 0], L1: [0, -0.2, 0]}[kind]
    np.testing.assert_allclose(move[7], want, atol=1e-6)
    ties = np.asarray(
        kind(0.1).to_hyperplane(x[:1], np.ones((1, 3), np.float32), np.float32([-0.65]))
    )
    want = {Linf: [0.325, 0.325, 0], L2: [0.325, 0.325, 0], L1: [0.4, 0.25, 0]}[kind]
    np.testing.assert_allclose(ties[0], want, atol=1e-6)


def test_l0_has_no_projection_and_no_fab(key):
    x = np.full((1, 2, 3), 0.5, np.float32)
    with pytest.raises(TypeError, match="L0 has no projection"):
        L0(1.0).to_hyperplane(x, x, x[:, 0, 0])
    with pytest.raises(TypeError, match="FAB minimises Linf or L2 or L1"):
        jrobust.run(FAB(L0(1.0)), key, lambda x: x[:, 0], x, [0])


# ------------------------------------------------------------------ linear models: closed forms


def linear_case(classes, box=(0.0, 1.0), batch=12, shape=(3, 4), seed=0):
    """A linear model, inputs of which half sit at the box, and their labels."""
    rng = np.random.default_rng(seed)
    lo, hi = box
    d = int(np.prod(shape))
    weights = rng.normal(size=(d, classes)) * rng.exponential(size=(d, 1)) / (hi - lo)
    x = rng.random((batch, d))
    x = np.where(rng.random(x.shape) < 0.5, np.round(x), x) * (hi - lo) + lo
    weights, x = np.float32(weights), np.float32(x)
    y = (x @ weights).argmax(1)
    return weights, x.reshape(batch, *shape), y


def minimal(kind, weights, x, y, targets=None, box=(0.0, 1.0)):
    """(B,) the distance of the closest point of the box with another class, in float64."""
    flat, w, least = np.float64(x).reshape(len(x), -1), np.float64(weights), []
    for i, (row, own) in enumerate(zip(flat, y)):
        others = range(w.shape[1]) if targets is None else [targets[i]]
        moves = [
            shortest(kind, row, w[:, k] - w[:, own], row @ (w[:, k] - w[:, own]), *box)
            for k in others
            if k != own
        ]
        least.append(min((NORMS[kind](m) for m in moves if m is not None), default=np.inf))
    return np.array(least)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weights: np.ndarray

    def __call__(self, x):
        return x.reshape(x.shape[0], -1) @ self.weights


@pytest.mark.parametrize(
    "box", [(0.0, 1.0), pytest.param((-3.0, 5.0), marks=pytest.mark.full)], ids=["unit", "wide"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_two_classes_fall_at_the_minimal_distance(kind, box, key):
    """Half of the features are at the box, so that the box binds."""
    weights, x, y = linear_case(2, box)
    least = minimal(kind, weights, x, y, box=box)
    w = np.float64(weights[:, 1] - weights[:, 0])
    dual = {Linf: np.abs(w).sum(), L2: np.sqrt(w @ w), L1: np.abs(w).max()}[kind]
    reachable = np.isfinite(least)
    unbound = np.abs(x.reshape(len(x), -1) @ w)[reachable] / dual
    assert np.mean(least[reachable] > 1.05 * unbound) > 0.1, "the box must bind"
    assert np.mean(reachable) > 0.5
    whole = np.float32(kind(0.0).widest(box[1] - box[0], x.shape[1:]))
    run = functools.partial(jrobust.run, key=key, logits_fn=Linear(weights), x=x, y=y)
    result = run(FAB(kind(whole, *box), steps=20))
    np.testing.assert_array_equal(result.success, reachable)
    got = np.asarray(result.distance)[reachable]
    assert np.all(got <= 1.001 * least[reachable])
    assert np.all(got >= least[reachable] * (1 - 1e-5))
    # What is returned where nothing was found: the input.
    np.testing.assert_array_equal(result.x[~reachable], x[~reachable])
    assert np.all(np.asarray(result.x) >= box[0])
    assert np.all(np.asarray(result.x) <= box[1])
    if kind is Linf:  # AutoAttack's version, without the refining moves, is half a percent out
        ratio = run(FAB(kind(whole, *box), steps=20, refine=0)).distance[reachable] / got
        assert np.all(ratio >= 1)
        assert np.max(ratio) > 1.003


def test_towards_each_target_and_away_from_the_label(key):
    weights, x, y = linear_case(4, seed=3)
    weights -= weights.mean(0)
    # In the middle of the box, where the nearest of the linearised boundaries is the nearest.
    x, model, attack = np.float32(0.45 + 0.1 * x), Linear(weights), FAB(L2(10.0**0.5), steps=20)
    y = np.asarray(model(x)).argmax(1)
    least = minimal(L2, weights, x, y)
    away = jrobust.run(attack, key, model, x, y)
    assert np.all(away.success)
    assert np.all(away.distance <= 1.001 * least)
    assert np.all(away.distance >= least * (1 - 1e-5))
    each = []
    for shift in (1, 2, 3):
        targets = (y + shift) % 4
        towards = jrobust.run(attack, key, model, x, y, targets=targets)
        reached = np.asarray(model(towards.x)).argmax(1) == targets
        np.testing.assert_array_equal(towards.success, reached)
        each.append(np.where(reached, towards.distance, np.inf))
    # The nearest of them is the distance; most of those behind others are reached too.
    np.testing.assert_allclose(np.min(each, 0), away.distance, rtol=2e-3)
    assert np.mean(np.isfinite(each)) > 0.6


# ------------------------------------------------------------------ the algorithm itself

RNG = np.random.default_rng(5)
INNER = RNG.normal(size=(6, 12))
OUTER = RNG.normal(size=(12, 3))
IMAGES = np.float32(RNG.uniform(0, 1, (16, 2, 3)))


def net(x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ np.float32(INNER)) @ np.float32(OUTER)


LABELS = np.asarray(net(IMAGES)).argmax(1)


def by_hand(kind, x0, y, steps, target=None, alpha_max=0.1, eta=1.05, beta=0.9):
    """AutoAttack's FAB on ``net`` from one input (6,), in float64: the least distance found."""

    def logits(x):
        return np.tanh((x - 0.5) @ INNER) @ OUTER

    def slope(x, k, this):
        return INNER @ ((1 - np.tanh((x - 0.5) @ INNER) ** 2) * (OUTER[:, k] - OUTER[:, this]))

    dual = {Linf: NORMS[L1], L2: NORMS[L2], L1: NORMS[Linf]}[kind]
    x, best = x0.copy(), np.inf
    for _ in range(steps):
        z = logits(x)
        others = [k for k in range(3) if k != y] if target is None else [target]
        this = y if target is None else max((k for k in range(3) if k != target), key=z.__getitem__)
        k = min(others, key=lambda k: abs(z[k] - z[this]) / dual(slope(x, k, this)))
        w, value = slope(x, k, this), z[k] - z[this]
        moves = []
        for point in (x, x0):
            f = value + w @ (point - x)
            move = shortest(kind, point, w, f, 0.0, 1.0)
            moves.append(np.where(w * f < 0, 1 - point, -point) if move is None else move)
        here, there = (max(NORMS[kind](m), 1e-8) for m in moves)
        alpha = min(here / (here + there), alpha_max)
        x = (1 - alpha) * (x + eta * moves[0]) + alpha * (x0 + eta * moves[1])
        x = np.clip(x, 0, 1)
        z = logits(x)
        if (z.argmax() != y) if target is None else (z.argmax() == target):
            best = min(best, NORMS[kind](x - x0))
            x = x0 + beta * (x - x0)
    return best


WHOLE = {kind: np.float32(kind(0.0).widest(1.0, (2, 3))) for kind in KINDS}


@pytest.mark.parametrize(("kind", "targeted"), [(Linf, 0), (L2, 0), (L1, 0), (L2, 1)])
def test_steps_are_those_of_autoattack(kind, targeted, key):
    """Against the same steps in float64 with linear programmes for projections."""
    targets = ((LABELS + 1) % 3).tolist() if targeted else None
    for factors in ({}, {"alpha_max": 0.02, "eta": 1.2, "beta": 0.7}):
        attack = FAB(kind(WHOLE[kind]), steps=6, refine=0, **factors)
        result = jrobust.run(attack, key, net, IMAGES, LABELS, targets=targets)
        want = np.array(
            [
                by_hand(kind, np.float64(x.ravel()), y, 6, targets and targets[i], **factors)
                for i, (x, y) in enumerate(zip(IMAGES, LABELS))
            ]
        )
        np.testing.assert_array_equal(result.success, np.isfinite(want))
        assert np.mean(result.success) > 0.5
        got = np.where(result.success, result.distance, np.inf)
        # In Linf and L1 not every shortest move is the only one, and a near tie may go either way;
        # in L2 a decision that rounds the other way may send one example elsewhere.
        same = np.isclose(got, want, rtol=1e-3)
        assert np.mean(same) >= (0.93 if kind is L2 else 0.85)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_boundary_is_that_in_the_dual_norm(kind, key):
    x = np.float32(np.random.default_rng(1).uniform(-1, 2, (300, 2, 3)))
    y = np.asarray(net(x)).argmax(1)
    attack = FAB(kind(WHOLE[kind], -1.0, 2.0))
    record = attack.init(keys.examples(key, jnp.arange(300)), x, jnp.asarray(y)).record
    value, normal = jax.jit(nearest_boundary, static_argnums=0)(net, record, x, record.seen)
    points = np.float64(x).reshape(300, 6)
    hidden = np.tanh((points - 0.5) @ INNER)
    logits = hidden @ OUTER
    towards = OUTER.T[None] - OUTER.T[y][:, None]  # (B, 3, 12)
    slopes = np.einsum("bkh,bh,fh->bkf", towards, 1 - hidden**2, INNER)
    gaps = logits - logits[np.arange(300), y][:, None]
    others = np.arange(3)[None] != y[:, None]
    chosen = {}
    for one, dual in ((Linf, L1), (L2, L2), (L1, Linf)):
        away = np.where(others, np.abs(gaps) / (NORMS[dual](slopes) + 1e-12), np.inf)
        chosen[one] = away.argmin(1)
    assert np.mean(chosen[Linf] != chosen[L1]) > 0.02, "the norms choose differently"
    want = chosen[kind]
    same = np.isclose(value, gaps[np.arange(300), want], rtol=1e-3, atol=1e-4)
    assert np.mean(same) > 0.995
    want = slopes[np.arange(300), want].reshape(x.shape)
    np.testing.assert_allclose(normal[same], want[same], rtol=1e-3, atol=1e-4)


def test_costs_are_counted_exactly(key):
    """Two forward passes a move and one at the end; a backward pass for each boundary."""
    y = np.where(np.arange(16) == 3, (LABELS + 1) % 3, LABELS)  # one misclassified as it is
    attack = FAB(Linf(1.0), steps=6)
    away = jrobust.run(attack, key, net, IMAGES, y)
    np.testing.assert_array_equal(away.forwards, np.where(y == LABELS, 2 * 9 + 1, 2))
    np.testing.assert_array_equal(away.backwards, np.where(y == LABELS, 2 * 9, 2))
    assert away.success[3]
    assert away.distance[3] == away.step[3] == 0
    # Refining only ever helps.
    plain = jrobust.run(FAB(Linf(1.0), steps=6, refine=0), key, net, IMAGES, y)
    np.testing.assert_array_equal(plain.forwards, np.where(y == LABELS, 2 * 6 + 1, 2))
    assert np.all(away.distance <= plain.distance)
    assert np.median(away.distance / np.maximum(plain.distance, 1e-6)) < 0.9999


def test_an_aim_is_headed_for_and_any_class_counts(key):
    """One batch may hold both kinds; each lane is charged for its own."""
    attack = FAB(L2(WHOLE[L2]), steps=6)

    @jax.jit
    def run(aims):
        state = attack.init(keys.examples(key, jnp.arange(16)), IMAGES, jnp.asarray(LABELS))
        state = state._replace(record=state.record._replace(aim=aims))
        return attack.result(drive.run(attack, net, state))

    class_after = jnp.asarray((LABELS + 1) % 3)
    aims = jnp.where(jnp.arange(16) % 2 == 0, class_after, -1)
    mixed, away, towards = run(aims), run(jnp.full_like(aims, -1)), run(class_after)
    np.testing.assert_array_equal(mixed.x[1::2], away.x[1::2])
    np.testing.assert_array_equal(mixed.x[::2], towards.x[::2])
    np.testing.assert_array_equal(mixed.backwards, np.where(aims < 0, 18, 9))
    np.testing.assert_array_equal(mixed.forwards, 19)
    np.testing.assert_array_equal(towards.success, net(towards.x).argmax(-1) != LABELS)
    longer = (towards.distance / away.distance)[np.asarray(towards.success)]
    assert len(longer) > 8
    assert np.all(longer > 0.95)
    assert np.mean(longer > 1.05) > 0.2


def test_towards_all_classes_the_closest_point_of_all_stays(key):
    """FAB-T for a curve over radii: nine runs, or here two, and none ends the example."""
    attack = FAB(L2(WHOLE[L2]), steps=6)
    found = jrobust.run(multi_targeted(attack, 2), key, net, IMAGES, LABELS)

    @jax.jit
    def run(aims):
        state = attack.init(keys.examples(key, jnp.arange(16)), IMAGES, jnp.asarray(LABELS))
        state = state._replace(record=state.record._replace(aim=aims))
        return attack.result(drive.run(attack, net, state))

    order = np.argsort(np.where(np.arange(3) == LABELS[:, None], np.inf, -net(IMAGES)), 1)
    runs = [run(jnp.asarray(order[:, turn], jnp.int32)) for turn in (0, 1)]
    each = np.array([np.where(r.success, r.distance, np.inf) for r in runs])
    np.testing.assert_allclose(found.distance, each.min(0), rtol=1e-5)
    assert 0 < np.mean(each[1] < 0.99 * each[0]) < 1, "a later class must be nearer somewhere"
    np.testing.assert_array_equal(found.forwards, 1 + sum(np.asarray(r.forwards) for r in runs))
    np.testing.assert_array_equal(found.backwards, sum(np.asarray(r.backwards) for r in runs))
    assert np.all(np.asarray(net(found.x)).argmax(1) != LABELS)


def test_eps_is_the_largest_distance_that_counts(key):
    """Refining apart, the search does not heed it, so that one run answers for all radii."""
    run = functools.partial(jrobust.run, key=key, logits_fn=net, x=IMAGES, y=LABELS)
    whole = run(FAB(Linf(1.0), steps=6, refine=0))
    assert np.all(whole.success)
    factor = np.where(np.arange(16) % 2 == 0, 1 + 1e-5, 1 - 1e-3)
    some = run(FAB(Linf(np.float32(whole.distance * factor)), steps=6, refine=0))
    np.testing.assert_array_equal(some.success, factor > 1)
    np.testing.assert_array_equal(some.x[::2], whole.x[::2])
    np.testing.assert_array_equal(some.x[1::2], IMAGES[1::2])
    # What AutoAttack asks for: the first point within eps ends the example.
    first = run(FAB(Linf(np.float32(1.2 * whole.distance)), steps=6, keep="success"))
    assert np.all(first.success)
    assert np.all(first.distance <= 1.2 * whole.distance)
    np.testing.assert_array_equal(first.forwards, 2 * (first.step + 1))
    assert np.mean(first.forwards) < 0.7 * np.mean(whole.forwards)


@pytest.mark.full
def test_restarts_are_random_lanes_that_know_nothing_of_each_other(key):
    plain, eps = FAB(L2(WHOLE[L2]), steps=6, refine=0), WHOLE[L2]
    start = FAB(L2(eps), steps=6, refine=0, random_start=True)
    once = jrobust.run(plain, key, net, IMAGES, LABELS)
    run = functools.partial(jrobust.run, restarts(start, 4), key, net)
    ids = np.arange(16)
    often = run(IMAGES, LABELS, ids=ids)
    # The first run begins at the input, as AutoAttack's does: nothing is lost.
    assert np.all(often.distance <= once.distance + 1e-6)
    assert np.any(often.distance < 0.999 * once.distance)
    np.testing.assert_array_equal(often.forwards, 4 * (2 * 6 + 1))
    with pytest.raises(ValueError, match="random"):
        restarts(plain, 2)
    # Bit-equal in another order, and beside other examples, at the same shape.
    order = np.random.default_rng(0).permutation(16)
    mixed = run(IMAGES[order], LABELS[order], ids=ids[order])
    beside = run(np.where(ids[:, None, None] < 8, IMAGES, 1 - IMAGES), LABELS, ids=ids)
    for name, leaf in often._asdict().items():
        np.testing.assert_array_equal(getattr(mixed, name), leaf[order], err_msg=name)
        np.testing.assert_array_equal(getattr(beside, name)[:8], leaf[:8], err_msg=name)

    # Within half of the distance of the closest point so far, of eps where there is none.
    fresh = start.init(keys.examples(key, jnp.arange(16)), jnp.asarray(IMAGES), LABELS).record
    found = ids % 2 == 0
    best = IMAGES + np.where(IMAGES > 0.5, -0.05, 0.05) * (np.arange(3) == 1)
    reopen = jax.jit(start.reopen)
    again = reopen(fresh._replace(best=best, success=found, seen=fresh.seen + 7)).x
    moved = np.linalg.norm((np.asarray(again) - IMAGES).reshape(16, -1), axis=1)
    half = np.where(found, 0.05 / np.sqrt(2), 0.5 * eps)
    assert np.all(moved <= half * (1 + 1e-5))
    assert np.median((moved / half)[found]) > 0.5
    np.testing.assert_array_equal(reopen(fresh).x, IMAGES)


def test_models_that_give_no_direction(key):
    """Zero gradients, and logits that are not finite: nothing false, nothing that is not finite."""
    breaks = np.arange(16) >= 8

    def model(x):
        """The first half quantised; the others NaN once their first feature has moved by 0.01."""
        moved = breaks & (jnp.abs(x[:, 0, 0] - IMAGES[:, 0, 0]) > 0.01)
        shown = jnp.where(breaks[:, None, None], x, jnp.round(x))
        return jnp.where(moved[:, None], jnp.nan, net(shown))

    y = np.asarray(model(IMAGES)).argmax(1)
    result = jrobust.run(FAB(Linf(0.4), steps=6, refine=0), key, model, IMAGES, y)
    np.testing.assert_array_equal(result.success, breaks)
    np.testing.assert_array_equal(result.x[:8], IMAGES[:8])
    assert np.all(np.isfinite(result.x))
    assert np.all(result.distance[8:] > 0)


@pytest.mark.full
def test_a_randomised_model_is_searched_over_draws(key):
    def noisy(keys, x):
        return net(x + 0.01 * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys))

    model = randomized(noisy, jax.random.key(3), samples=4, votes=6)
    y = np.asarray(model(IMAGES)).argmax(1)
    result = jrobust.run(FAB(L2(1.5), steps=6, refine=0), key, model, IMAGES, y)
    np.testing.assert_array_equal(result.success, np.asarray(model(result.x)).argmax(1) != y)
    assert np.mean(result.success) > 0.7
    np.testing.assert_array_equal(result.forwards, 6 * (4 + 6 + 4) + 4 + 6)
    np.testing.assert_array_equal(result.backwards, 6 * 4 * 2)


def test_quantised_points_are_judged_as_they_are_returned(key):
    x = np.round(IMAGES * 63) / np.float32(63)
    y = np.asarray(net(x)).argmax(1)
    result = jrobust.run(FAB(Linf(1.0), steps=6, refine=0, quantize=64), key, net, x, y)
    level = np.asarray(result.x) * 63
    np.testing.assert_allclose(level, np.round(level), atol=1e-4)
    assert np.mean(result.success) > 0.7
    np.testing.assert_array_equal(np.asarray(net(result.x)).argmax(1) != y, result.success)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_max": 1.5}, "alpha_max must lie in"),
        ({"eta": 0.9}, "eta must lie in"),
        ({"beta": -0.1}, "beta must lie in"),
        ({"refine": -1}, "refine must be an int"),
        ({"steps": 0}, "steps must be a positive int"),
        ({"keep": "loss"}, "keep must be one of"),
    ],
)
def test_settings_that_make_no_sense(settings, message, key):
    with pytest.raises(ValueError, match=message):
        jrobust.run(FAB(Linf(0.1), **settings), key, net, IMAGES, LABELS)


def test_a_black_box_has_no_gradient(key):
    with pytest.raises(TypeError, match="FAB needs gradients"):
        jrobust.run(FAB(Linf(0.1)), key, drive.Host(lambda x: np.asarray(net(x))), IMAGES, LABELS)
