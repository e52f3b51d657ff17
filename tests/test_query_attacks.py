"""NES, SPSA, SimBA, Bandits, ZOO: query by query as their definitions in float64 on the same draws.

They are stepped from Python on a black box that counts what it is asked, so little is compiled.
"""

import functools
import itertools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import idctn

import jrobust
from jrobust import drive, keys, losses
from jrobust.attacks._bandits import Bandits
from jrobust.attacks._nes import NES, SPSA
from jrobust.attacks._simba import SimBA, log_odds
from jrobust.attacks._zoo import ZOO
from jrobust.threat import L1, L2, Linf

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH, SHAPE = 16, (3, 4)  # images that are not square, and any features
IDS = np.arange(BATCH)
RNG = np.random.default_rng(0)
WEIGHTS = np.float32(RNG.normal(size=(12, 3)))
LANES = keys.examples(jax.random.key(0), jnp.asarray(IDS))


def linear(x, weights=WEIGHTS):
    """Logits of a linear model, in float64 (B, C)."""
    return (np.float64(x).reshape(len(x), -1) - 0.5) @ np.float64(weights)


def device(x):
    """The same model in JAX."""
    return (x.reshape(x.shape[0], -1) - 0.5) @ WEIGHTS


def boundary(x):
    """The label of ``x``, the L2 distance to the nearest boundary, its point, its class."""
    z, rows = linear(x), np.arange(len(x))
    y = z.argmax(1)
    normal = (np.float64(WEIGHTS).T[None] - np.float64(WEIGHTS).T[y][:, None]).transpose(1, 0, 2)
    normal[y, rows] = np.inf
    size = np.linalg.norm(normal, axis=2)
    gap = np.where(np.isinf(size), np.inf, (z[rows, y] - z.T) / size)
    other = gap.argmin(0)
    nearest = gap.min(0)
    foot = x.reshape(len(x), -1) + normal[other, rows] * (nearest / size[other, rows])[:, None]
    return y, nearest, foot, other


X = np.float32(RNG.uniform(0.3, 0.7, (200, *SHAPE)))
X = X[(boundary(X)[1] > 0.08) & (boundary(X)[1] < 0.25)][:BATCH]
LABELS, NEAREST, FOOT, BEHIND = boundary(X)


class Box:
    """A black box that keeps how many rows it was asked about."""

    def __init__(self, fn=linear):
        self.fn, self.rows = fn, 0

    def __call__(self, x):
        self.rows += len(x)
        return self.fn(x)


def walk(attack, fn=linear, x=X, y=LABELS, targets=None, aim=None, lanes=LANES):
    """The result, and the points that each lane has asked about, in order."""
    box = Box(fn)
    state = attack.init(lanes, jnp.asarray(x), jnp.asarray(y), targets)
    if aim is not None:
        state = state._replace(record=state.record._replace(aim=jnp.asarray(aim)))
    asked = [[] for _ in y]
    for after in drive.stepped(attack, drive.Host(box), state):
        points = np.asarray(state.x)
        for lane in np.flatnonzero(np.asarray(after.record.seen > state.record.seen)):
            asked[lane].append(points[lane])
        state = after
    result = attack.result(state)
    np.testing.assert_array_equal(result.forwards, [len(points) for points in asked])
    np.testing.assert_array_equal(result.backwards, 0)
    assert box.rows == np.sum(result.forwards), "counted as asked"
    assert np.max(result.forwards) <= attack.queries, "a hard budget"
    return result, [np.stack(points) for points in asked]


# ------------------------------------------------------------------ the definitions in float64


def cross_entropy(z, y):
    return math.log(np.exp(z - z.max()).sum()) + z.max() - z[y]


def margin(z, y):
    return np.delete(z, y).max() - z[y]


def ball(x, x0, eps, norm):
    move = x - x0
    if norm == "Linf":
        return np.clip(x0 + np.clip(move, -eps, eps), 0, 1)
    x = x0 + move * min(1, eps / max(np.linalg.norm(move), 1e-300))
    assert np.all((x >= 0) & (x <= 1)), "no test of the box"
    return x


def pairs(attack, key, x0, y, loss, shape, draw, probe, move):
    """What an attack on differences asks, until it succeeds or has no queries left."""
    asked, at = [x0], x0
    while linear(at[None])[0].argmax() == y:
        count = min(attack.samples, (attack.queries - len(asked) - 1) // 2)
        if count < 1:
            break
        total = 0
        for _ in range(count):
            u = np.float64(draw(jax.random.fold_in(key, len(asked)), shape))
            plus, minus = at + probe(u, 1), at + probe(u, -1)
            asked += [plus, minus]
            z = linear(np.stack([plus, minus]))
            total = total + (loss(z[0], y) - loss(z[1], y)) * u
        at = move(at, total, count)
        asked.append(at)
    return asked


def nes(attack, key, x0, y):
    average = np.zeros(SHAPE)
    sigma, eps = attack.sigma, attack.threat.eps

    def move(at, total, count):
        nonlocal average
        average = 0.9 * average + 0.1 * total / (2 * sigma * count)
        return ball(at + 0.2 * eps * np.sign(average), x0, eps, "Linf")

    return pairs(
        attack,
        key,
        x0,
        y,
        cross_entropy,
        SHAPE,
        jax.random.normal,
        lambda u, s: s * sigma * u,
        move,
    )


def spsa(attack, key, x0, y):
    first, second, n = 0, 0, 0
    sigma, eps = attack.sigma, attack.threat.eps

    def move(at, total, count):
        nonlocal first, second, n
        gradient, n = total / (2 * sigma * count), n + 1
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**n) / (np.sqrt(second / (1 - 0.999**n)) + 1e-8)
        return ball(at + attack.step_size * step, x0, eps, "L2")

    return pairs(
        attack, key, x0, y, margin, SHAPE, jax.random.rademacher, lambda u, s: s * sigma * u, move
    )


def tiled(prior):
    """The nearest of 2 by 2 tiles at each of 3 by 4 pixels."""
    return prior[np.ix_([0, 0, 1], [0, 0, 1, 1])] if prior.shape == (2, 2) else prior


def bandits(attack, key, x0, y):
    """As the released code: exponentiated gradients on probabilities, differences over ``eta``."""
    sharp = isinstance(attack.threat, Linf)
    shape = (2, 2) if attack.tile == 2 else SHAPE
    v, eps = np.zeros(shape), attack.threat.eps
    rate, delta, eta, image = (2.0, 1.0, 0.1, 0.2) if sharp else (0.1, 0.01, 0.01, 0.1)

    def draw(key, shape):
        return jax.random.normal(key, shape) / math.sqrt(math.prod(shape))

    def probe(u, sign):
        q = tiled(v + sign * delta * u)
        return eta * q / np.linalg.norm(q)

    def move(at, total, count):
        nonlocal v
        gradient = total / (eta * delta) * delta
        if sharp:
            p = (v + 1) / 2
            up, down = p * np.exp(rate * gradient), (1 - p) * np.exp(-rate * gradient)
            v = 2 * up / (up + down) - 1
            return ball(at + image * eps * np.sign(tiled(v)), x0, eps, "Linf")
        v = v + rate * gradient
        return ball(at + image * eps * tiled(v) / np.linalg.norm(tiled(v)), x0, eps, "L2")

    return pairs(attack, key, x0, y, cross_entropy, shape, draw, probe, move)


def simba(attack, key, x0, y):
    u = np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (12,)))
    if attack.basis == "dct":
        # Eighths of 3 and 4 frequencies hold one, steps of 1/32 less than one: rings of squares.
        rank = np.maximum((np.arange(3) / 3)[:, None], (np.arange(4) / 4)[None]).reshape(-1)
        u = u + 100 * rank
    order = np.argsort(u)

    def probability(x):
        z = linear(x[None])[0]
        return np.exp(z - z.max())[y] / np.exp(z - z.max()).sum()

    asked, at = [x0], x0
    p, k, norm = probability(x0), 0, attack.threat.norm
    while linear(asked[-1][None])[0].argmax() == y and len(asked) < attack.queries:
        unit = np.zeros(12)
        unit[order[k % 12]] = 1
        unit = unit.reshape(SHAPE)
        if attack.basis == "dct":
            unit = idctn(unit, norm="ortho")
        for sign in (1, -1):
            x = ball(at + sign * attack.step_size * unit, x0, attack.threat.eps, norm)
            asked.append(x)
            if probability(x) < p:
                at, p = x, probability(x)
                break
            if linear(x[None])[0].argmax() != y or len(asked) == attack.queries:
                break
        k += 1
    return asked


def zoo(attack, key, x0, y):
    asked, c, lower, upper = [], attack.constant, 0, np.inf
    h, batch = attack.difference, min(attack.batch, 12)

    def ask(x):
        asked.append(x)
        if len(asked) == attack.queries:
            raise StopIteration
        return max(-margin(linear(x[None])[0], y), 0)

    def a_round():
        at, first, second, n = x0.copy(), np.zeros(12), np.zeros(12), np.zeros(12)
        found, least, before = False, np.inf, np.inf
        for i in range(attack.steps):
            hinge = ask(at)
            if not asked[1:] and hinge == 0:
                raise StopIteration
            found |= hinge == 0
            least = min(least, ((at - x0) ** 2).sum() + c * hinge)
            if i % max(math.ceil(attack.steps / 10), 25) == 0:
                if not least <= 0.9999 * before:
                    return found
                before = least
            if i == attack.steps - 1:
                return found
            u = np.asarray(jax.random.uniform(jax.random.fold_in(key, len(asked)), (12,)))
            chosen = np.argsort(-u)[:batch]
            slopes = []
            for index in chosen:
                step = np.zeros(12)
                step[index] = h
                ends = [np.clip(at + s * step.reshape(SHAPE), 0, 1) for s in (1, -1)]
                quotient = (ask(ends[0]) - ask(ends[1])) / np.abs(ends[0] - ends[1]).max()
                slopes.append(2 * (at - x0).reshape(-1)[index] + c * quotient)
            g = np.array(slopes)
            n[chosen] += 1
            first[chosen] = 0.9 * first[chosen] + 0.1 * g
            second[chosen] = 0.999 * second[chosen] + 0.001 * g**2
            size = np.sqrt(second[chosen] / (1 - 0.999 ** n[chosen])) + 1e-8
            flat = at.reshape(-1).copy()
            flat[chosen] -= attack.step_size * first[chosen] / (1 - 0.9 ** n[chosen]) / size
            at = np.clip(flat, 0, 1).reshape(SHAPE)

    try:
        for _ in range(attack.rounds):
            if a_round():
                upper = min(upper, c)
            else:
                lower = max(lower, c)
            c = (lower + upper) / 2 if np.isfinite(upper) else 10 * c
        ask(x0)
    except StopIteration:
        pass
    return asked


ATTACKS = {
    "NES": (NES(Linf(0.1), queries=34, samples=4), nes),  # the last move from two pairs
    "SPSA": (SPSA(L2(0.2), queries=34, samples=4, step_size=0.03), spsa),
    "Bandits-Linf": (Bandits(Linf(0.1), queries=32, tile=2, prior_step_size=2.0), bandits),
    "Bandits-L2": (Bandits(L2(0.25), queries=32, tile=1), bandits),
    "SimBA": (SimBA(L2(0.15), queries=32, step_size=0.1), simba),
    "SimBA-DCT": (SimBA(Linf(0.05), queries=32, basis="dct"), simba),
    "ZOO": (
        ZOO(
            L2(1.0),
            queries=150,
            batch=3,
            steps=6,
            rounds=3,
            difference=0.01,
            step_size=0.03,
            constant=1.0,
        ),
        zoo,
    ),
}
EACH = pytest.mark.parametrize("name", ATTACKS)
WALKED = functools.cache(lambda name: walk(ATTACKS[name][0]))


@EACH
def test_every_query_is_that_of_the_definition(name):
    attack, reference = ATTACKS[name]
    result, asked = WALKED(name)
    for lane in IDS:
        want = reference(attack, LANES[lane], np.float64(X[lane]), LABELS[lane])
        assert len(asked[lane]) == len(want), lane
        np.testing.assert_allclose(asked[lane], want, atol=2e-5, err_msg=str(lane))
    # Something fell and something did not, by a verdict on the very point that is returned.
    found = np.asarray(result.success)
    if name != "ZOO":
        assert 0 < found.sum() < BATCH
        np.testing.assert_array_equal(result.forwards[found], result.step[found] + 1)
        for lane in np.flatnonzero(found):
            np.testing.assert_array_equal(result.x[lane], asked[lane][-1])
    np.testing.assert_array_equal(found, linear(result.x).argmax(1) != LABELS)
    assert np.all(attack.threat.distance(result.x, X) <= attack.threat.eps * (1 + 1e-6))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "SimBA" else pytest.mark.full) for name in ATTACKS],
)
def test_compiled_it_is_the_same(name, key):
    attack, _ = ATTACKS[name]
    result, _ = WALKED(name)
    got = jrobust.run(attack, key, device, X, LABELS)
    np.testing.assert_array_equal(got.success, result.success)
    np.testing.assert_array_equal(got.forwards, result.forwards)
    np.testing.assert_allclose(got.x, result.x, atol=1e-4)


@EACH
def test_lanes_do_not_know_each_other(name):
    """In any order, and beside lanes that are elsewhere in their attack."""
    attack, _ = ATTACKS[name]
    result, _ = WALKED(name)
    order = np.random.default_rng(1).permutation(BATCH)
    mixed, _ = walk(attack, x=X[order], y=LABELS[order], lanes=LANES[order])
    state = attack.init(LANES, jnp.asarray(X), jnp.asarray(LABELS))
    host, steps = drive.Host(linear), drive.stepped(attack, drive.Host(linear), state)
    ahead = next(itertools.islice(steps, 6, None))
    late = jax.tree.map(lambda a, b: jnp.concatenate([a[:8], b[8:]]), state, ahead)
    late = attack.result(drive.run(attack, host, late))
    for field, leaf in result._asdict().items():
        np.testing.assert_array_equal(getattr(mixed, field), leaf[order], err_msg=field)
        np.testing.assert_array_equal(getattr(late, field), leaf, err_msg=field)


@EACH
def test_the_box_is_only_a_unit(name):
    """In the box [-1, 3], of a model that scales it back."""
    attack, _ = ATTACKS[name]
    result, asked = WALKED(name)
    threat = type(attack.threat)(4 * attack.threat.eps, -1.0, 3.0)
    wide = type(attack)(**{**vars(attack), "threat": threat})
    got, scaled = walk(wide, lambda x: linear((np.float64(x) + 1) / 4), 4 * X - 1)
    np.testing.assert_array_equal(got.success, result.success)
    np.testing.assert_allclose(got.distance, 4 * result.distance, atol=1e-4)
    for lane in IDS:
        np.testing.assert_allclose((scaled[lane] + 1) / 4, asked[lane], atol=2e-5)


@EACH
def test_targets_and_aims(name):
    attack, _ = ATTACKS[name]
    far = type(attack)(**{**vars(attack), "threat": type(attack.threat)(1.0)})
    targets = (LABELS + 1) % 3
    away, _ = walk(far)
    towards, _ = walk(far, targets=jnp.asarray(targets))
    np.testing.assert_array_equal(towards.success, linear(towards.x).argmax(1) == targets)
    aimed, _ = walk(far, aim=targets)
    np.testing.assert_array_equal(aimed.success, linear(aimed.x).argmax(1) != LABELS)
    # One heads for the target, the other does not, but any class is a success for it.
    hits = [np.mean(linear(r.x).argmax(1) == targets) for r in (towards, aimed, away)]
    assert hits[0] > 0.3
    assert hits[1] > hits[2]


@EACH
def test_logits_that_are_not_finite(name):
    attack, _ = ATTACKS[name]

    def broken(x):
        """At any point that is none of the inputs."""
        clean = np.any(np.all(x[:, None] == X[None], axis=(2, 3)), axis=1)
        return np.where(clean[:, None], linear(x), np.nan)

    away, asked = walk(attack, broken)
    if hasattr(attack, "samples"):  # whose pairs then tell nothing
        assert not np.any(away.success)
        assert all(np.array_equal(points[-1], X[i]) for i, points in enumerate(asked))
    else:
        assert np.all(away.success)
        np.testing.assert_array_equal(away.step, 1)
    towards, more = walk(attack, broken, targets=jnp.asarray((LABELS + 1) % 3))
    assert np.all(np.isfinite(np.concatenate(asked + more)))
    assert not np.any(towards.success)


@pytest.mark.parametrize(
    ("make", "budgets"),
    [
        (NES, (1, 2, 3, 7)),
        (Bandits, (1, 2, 3, 7)),
        (SimBA, (1, 2, 7)),
        (ZOO, (1, 3)),
        pytest.param(SPSA, (1, 2, 3, 7), marks=pytest.mark.full),
        pytest.param(ZOO, (2, 7), marks=pytest.mark.full),
    ],
)
def test_odd_budgets(make, budgets):
    """Of a model that never falls: what is spent is what the budget leaves room for."""

    def held(x):
        return linear(x) + 100 * np.eye(3)[0]

    kind = Linf if make is NES else L2
    for queries in budgets:
        some = {"tile": 1} if make is Bandits else {"samples": 2} if make in (NES, SPSA) else {}
        result, _ = walk(make(kind(0.1), queries=queries, **some), held, y=np.zeros(BATCH, int))
        room = {1: 1, 2: 1, 3: 1, 7: 7 if make is Bandits else 6}
        spent = queries if make in (SimBA, ZOO) else room[queries]
        np.testing.assert_array_equal(result.forwards, spent)
        assert not np.any(result.success)


def test_the_last_query_is_of_a_point():
    for samples, queries in itertools.product(range(1, 6), range(1, 80)):
        left, spent = queries - 1, 1
        while (count := min(samples, (left - 1) // 2)) > 0:
            left, spent = left - 2 * count - 1, spent + 2 * count + 1
        assert NES(Linf(0.1), queries=queries, samples=samples).moves == spent - 1
        assert left in (0, 1, 2)


def test_published_defaults():
    """Those of the released configurations; of Linf first, then of L2."""
    names = ("rel_step_size", "prior_step_size", "exploration", "difference")
    values = [[Bandits(kind(0.1))._value(name) for name in names] for kind in (Linf, L2)]
    np.testing.assert_allclose(values, [[0.01 / 0.05, 100, 1, 0.1], [0.5 / 5, 0.1, 0.01, 0.01]])
    assert Bandits(Linf(0.1)).shape(np.zeros((1, 299, 299, 3))) == (1, 50, 50, 3)
    wide = Bandits(Linf(0.1), tile=4)._tiled(np.arange(3.0)[None, None], np.zeros((1, 1, 10)))
    np.testing.assert_array_equal(wide[0, 0], [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])  # the nearest
    assert 2 * NES(Linf(0.1)).samples == 50
    # The lowest 28 frequencies of 224, then 7 more each time.
    blocks = SimBA(L2(0.1), basis="dct")._blocks((1, 224, 224, 3))
    _, counts = np.unique(blocks, return_counts=True)
    np.testing.assert_array_equal(np.cumsum(counts), 3 * np.arange(28, 225, 7) ** 2)
    np.testing.assert_array_equal(blocks.reshape(224, 224, 3)[:28, :28], blocks.min())


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(
    ("make", "extra"), [(NES, 1), pytest.param(SPSA, -1, marks=pytest.mark.full)]
)
def test_the_estimate_is_the_gradient_at_the_right_rate(make, extra):
    """Unbiased, with ``E |estimate - g|^2 = (d + 1)/n |g|^2`` for normal, ``d - 1`` for signs."""
    weights = np.float64(WEIGHTS[:, :2])
    slope = weights[:, 1] - weights[:, 0]

    def two(x):
        return linear(x, weights) + np.array([100.0, 0.0])

    attack = make(Linf(0.1), queries=100, samples=13, sigma=0.02, loss=losses.margin)
    state = attack.init(LANES, jnp.asarray(X), jnp.zeros(BATCH, jnp.int32))
    steps = drive.stepped(attack, drive.Host(two), state)
    errors = {}
    for spent in range(1, 26):
        state = next(steps)
        n = (spent - 1) // 2
        if spent % 2 and n in (3, 12):
            guess = attack.gradient(state.inner.total, jnp.full(BATCH, n))
            errors[n] = np.asarray(guess).reshape(BATCH, -1) - slope
    for n, error in errors.items():
        share = np.sum(error**2, 1) / np.sum(slope**2) * n / (12 + extra)
        assert abs(share.mean() - 1) < 4 * share.std() / np.sqrt(BATCH - 1), n
        score = error.mean(0) / (error.std(0) / np.sqrt(BATCH - 1))
        assert np.all(np.abs(score) < 4.5), n


def test_simba_walks_the_coordinates_that_gain():
    """Each is tried once: one query where its positive direction gains, else two."""
    slope = np.where(np.arange(12) == 5, 0.0, np.float64(WEIGHTS[:, 1] - WEIGHTS[:, 0]))

    def two(x):
        rise = (np.float64(x).reshape(len(x), -1) - 0.5) @ slope
        return np.stack([100 - rise / 2, rise / 2], 1)  # whose probability rounds to one

    order = np.argsort(jax.vmap(lambda k: jax.random.uniform(k, (12,)))(keys.fold(LANES, 0)), 1)
    spent = 1 + np.sum(np.where(slope > 0, 1, 2))
    attack = SimBA(L2(3.0), queries=int(spent), step_size=0.125)
    result, asked = walk(attack, two, y=np.zeros(BATCH, int))
    assert 1.3 < (spent - 1) / 12 < 1.7
    np.testing.assert_allclose(
        np.asarray(result.x) - X,
        np.broadcast_to(0.125 * np.sign(slope).reshape(SHAPE), X.shape),
        atol=1e-6,
    )
    changed = (np.stack(asked) != X[:, None]).reshape(BATCH, spent, -1)
    np.testing.assert_array_equal(np.argsort(changed.argmax(1), 1), order)
    assert len(np.unique(order, axis=0)) == BATCH, "each lane its own order"


def test_log_odds_order_as_probabilities_do():
    logits = np.float32(RNG.normal(size=(200, 4)) * 3)
    y = jnp.asarray(RNG.integers(0, 4, 200))
    p = np.exp(np.float64(logits))
    p = p[np.arange(200), y] / p.sum(1)
    np.testing.assert_allclose(
        jax.jit(log_odds)(logits, y), np.log1p(-p) - np.log(p), rtol=1e-4, atol=1e-5
    )
    # Where float32 probabilities are all one.
    sure = log_odds(jnp.asarray([[40.0, 0.0], [41.0, 0.0]]), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(sure, [-40, -41])


def test_zoo_comes_close_to_the_nearest_boundary(key):
    assert np.all((FOOT > 0) & (FOOT < 1)), "where the box does not bind"
    attack = ZOO(L2(2.0), queries=9000, batch=20, steps=60, constant=1.0)
    result = jrobust.run(attack, key, device, X, LABELS)
    assert np.all(result.success)
    assert np.all(np.asarray(result.forwards) <= 9000)
    ratio = np.asarray(result.distance) / NEAREST
    assert np.all(ratio >= 1 - 1e-5)
    # Where the class behind the boundary is the one it heads for.
    straight = np.argsort(linear(X), 1)[:, 1] == BEHIND
    assert straight.sum() > BATCH / 2
    assert ratio[straight].max() < 1.01
    assert ratio.max() < 1.1


def test_zoo_asks_in_the_box():
    """Of inputs on its bounds, where differences are one-sided."""
    attack, reference = ATTACKS["ZOO"]
    x = np.where(X < 0.4, 0, np.where(X > 0.6, 1, X)).astype(np.float32)
    y = linear(x).argmax(1)
    _, asked = walk(attack, x=x, y=y)
    for lane in IDS:
        assert np.all((asked[lane] >= 0) & (asked[lane] <= 1))
        want = reference(attack, LANES[lane], np.float64(x[lane]), y[lane])
        np.testing.assert_allclose(asked[lane], want, atol=2e-5, err_msg=str(lane))


@pytest.mark.full
def test_a_point_without_logits_does_not_end_a_round():
    attack = ZOO(L2(1.0), queries=200, batch=3, steps=30, rounds=2, constant=10.0)
    calls = itertools.count()

    def once(x):
        return linear(x) + (np.nan if next(calls) == 70 else 0)  # the point after ten moves

    state = attack.init(LANES, jnp.asarray(X), jnp.asarray(LABELS), jnp.asarray((LABELS + 1) % 3))
    for state in drive.stepped(attack, drive.Host(once), state):  # noqa: B007, B020
        pass
    assert not np.any(state.inner.own.search.turn), "it was still falling when it was asked"


@pytest.mark.full
def test_a_prior_learns_where_the_gradient_points():
    """On a linear model the prior turns to the gradient, and stays there."""
    weights = np.float64(WEIGHTS[:, :2])
    slope = weights[:, 1] - weights[:, 0]
    attack = Bandits(L2(0.1), queries=400, tile=1, exploration=0.1, loss=losses.margin)
    state = attack.init(LANES, jnp.asarray(X), jnp.zeros(BATCH, jnp.int32))
    host = drive.Host(lambda x: linear(x, weights) + np.array([100.0, 0.0]))
    angle = []
    for now in itertools.islice(drive.stepped(attack, host, state), 300):
        prior = np.asarray(now.inner.own).reshape(BATCH, -1)
        size = np.linalg.norm(prior, axis=1) * np.linalg.norm(slope)
        angle.append(np.mean(prior @ slope / np.where(size > 0, size, 1)))
    assert angle[10] < 0.8
    assert np.mean(angle[-30:]) > 0.95


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("attack", "shape", "error", "message"),
    [
        (NES(L1(0.1)), SHAPE, TypeError, "NES is defined in Linf, L2"),
        (NES(0.1), SHAPE, TypeError, "must be a threat model"),
        (NES(Linf(0.1), queries=0), SHAPE, ValueError, "queries must be a positive int"),
        (NES(Linf(0.1), samples=0), SHAPE, ValueError, "samples must be a positive int"),
        (NES(Linf(0.1), sigma=0.0), SHAPE, ValueError, "sigma must be positive"),
        (NES(Linf(0.1), momentum=1.0), SHAPE, ValueError, r"momentum must lie in \[0, 1\)"),
        (SPSA(Linf(0.1), step_size=-1.0), SHAPE, ValueError, "step_size must be positive"),
        (Bandits(Linf(0.1), tile=0), SHAPE, ValueError, "tile must be a positive int"),
        (Bandits(Linf(0.1)), (12,), ValueError, "Bandits with tiles needs images"),
        (Bandits(Linf(0.1), exploration=0.0), SHAPE, ValueError, "exploration must be positive"),
        (SimBA(L2(0.1), basis="haar"), SHAPE, ValueError, "basis must be 'pixel' or 'dct'"),
        (SimBA(L2(0.1), basis="dct"), (12,), ValueError, "'dct' needs images"),
        (ZOO(Linf(0.1)), SHAPE, TypeError, "ZOO"),
        (ZOO(L2(0.1), batch=0), SHAPE, ValueError, "batch must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(attack, shape, error, message, key):
    with pytest.raises(error, match=message):
        jrobust.run(attack, key, drive.Host(linear), X.reshape(BATCH, *shape), LABELS)


@pytest.mark.parametrize("make", [Bandits, functools.partial(SimBA, basis="dct")])
def test_flat_inputs_are_refused_under_jit_too(make, key):
    with pytest.raises(ValueError, match="needs images"):
        jax.eval_shape(
            lambda x: make(L2(0.1))(key, lambda x: x @ WEIGHTS, x, LABELS), X.reshape(BATCH, -1)
        )


def test_the_page_on_query_attacks_runs_as_it_stands():
    names = {"__name__": "queries"}
    text = (ROOT / "docs" / "query-attacks.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert names["asked"] == int(names["found"].forwards.sum())
