"""RayS, HopSkipJump and Boundary: closed forms, the published way question by question, budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import jrobust
from jrobust import debug, drive, keys
from jrobust._algorithm import algorithm
from jrobust.attacks import _boundary, _decision, restarts, sequence
from jrobust.attacks._boundary import Boundary
from jrobust.attacks._hopskipjump import HopSkipJump
from jrobust.attacks._rays import RayS
from jrobust.models import randomized
from jrobust.threat import L2, Linf

LO, HI, SHAPE, SIZE = -1.0, 3.0, (3, 2, 2), 12
WIDTH = HI - LO
WIDE = {Linf: Linf(WIDTH, LO, HI), L2: L2(WIDTH * SIZE**0.5, LO, HI)}
RNG = np.random.default_rng(1)
# Weights of all sizes: norms disagree about the best features.
WEIGHTS = np.float32(RNG.normal(size=(SIZE, 3)) * np.exp(0.5 * RNG.normal(size=(SIZE, 1))))
BIAS = np.float32([[0.3, 0.1, -0.2]]) - np.float32(WEIGHTS.sum(0) * (LO + HI) / 2)
X = np.float32(RNG.uniform(LO + 0.5, HI - 0.5, (100, *SHAPE)))


@algorithm
class Linear:
    """A linear model whose logits are shown in one of several ways, all with the same highest."""

    shown: jax.Array  # ()

    def __call__(self, x):
        z = x.reshape(x.shape[0], -1) @ WEIGHTS + BIAS
        top = jax.nn.one_hot(z.argmax(-1), 3)
        return jnp.stack([z, top, jnp.where(top > 0, jnp.abs(z), -jnp.abs(z) - 1)])[self.shown]


MODEL = Linear(jnp.int32(0))


def logits(x):
    return np.float64(x).reshape(len(x), -1) @ np.float64(WEIGHTS) + np.float64(BIAS)


def gain(x, y):
    """By how much the highest other logit is above that of ``y``."""
    z, own = logits(x), np.eye(3)[y] > 0
    return np.where(own, -np.inf, z).max(1) - z[own]


def least(order, x, y, targets=None):
    """The distance to the nearest boundary within the box, by bisection, in float64."""
    found = np.full(len(x), np.inf)
    for i, own in enumerate(y):
        flat = np.float64(x[i]).ravel()
        for k in range(3):
            if k == own or (targets is not None and k != targets[i]):
                continue
            w = np.float64(WEIGHTS[:, k]) - np.float64(WEIGHTS[:, own])
            gap = logits(x[i : i + 1])[0, own] - logits(x[i : i + 1])[0, k]
            room = np.where(w > 0, HI - flat, flat - LO)
            speed = np.ones(SIZE) if order == np.inf else np.abs(w)
            low, high = 0.0, 1e3
            for _ in range(40):
                t = (low + high) / 2
                moves = np.minimum(t * speed, room)
                low, high = (t, high) if np.abs(w) @ moves < gap else (low, t)
            if np.abs(w) @ room > gap:
                found[i] = min(found[i], np.linalg.norm(np.minimum(high * speed, room), order))
    return found


LABELS = logits(X).argmax(1)
OTHERS = (LABELS[:, None] + [1, 2]) % 3
APART = {n: np.stack([least(n, X, LABELS, k) for k in OTHERS.T], 1) for n in (2, np.inf)}
# Which class is the nearest is the same in both norms, and plain.
CHOSEN = np.flatnonzero(
    (APART[2].min(1) > 0.2)
    & np.all([d.max(1) > 1.5 * d.min(1) for d in APART.values()], 0)
    & (APART[2].argmin(1) == APART[np.inf].argmin(1))
)[:8]
X, LABELS, NEAREST = X[CHOSEN], LABELS[CHOSEN], OTHERS[CHOSEN, APART[2][CHOSEN].argmin(1)]
Y = LABELS.copy()
Y[0] = (Y[0] + 1) % 3  # misclassified as it is

ALL = [
    pytest.param(RayS, Linf, {"tolerance": 1e-4}, id="RayS"),
    pytest.param(HopSkipJump, L2, {}, id="HopSkipJump-L2"),
    pytest.param(HopSkipJump, Linf, {}, id="HopSkipJump-Linf", marks=pytest.mark.full),
    pytest.param(Boundary, L2, {}, id="Boundary"),
]


def run(attack, model=MODEL, y=Y, **more):
    return jrobust.run(attack, jax.random.key(2), model, X, y, **more)


@pytest.mark.parametrize(("make", "kind", "more"), ALL)
def test_nearest_boundary_of_a_linear_model(make, kind, more):
    queries = 1000 if make is RayS else 4000
    attack = make(WIDE[kind], queries=queries, **more)
    result = run(attack)
    assert np.all(result.success)
    np.testing.assert_array_equal(result.forwards, [1] + [queries] * 7)
    np.testing.assert_array_equal(result.backwards, 0)
    np.testing.assert_array_equal(result.x[0], X[0])
    np.testing.assert_array_equal(result.loss, 1.0)
    assert np.all(gain(result.x, Y) > -1e-5)
    assert np.all((result.x >= LO) & (result.x <= HI))
    order = np.inf if kind is Linf else 2
    move = np.float64(result.x - X).reshape(8, -1)
    np.testing.assert_allclose(np.linalg.norm(move, order, 1), result.distance, rtol=1e-5)
    distance = np.asarray(result.distance)
    ratio = distance[1:] / least(order, X, Y)[1:]
    assert ratio.min() >= 1 - 1e-5
    assert np.mean(ratio <= 1.05) > 0.8, ratio
    # Who began in the region of the further class may stay in it: it is the nearest point there.
    own = np.eye(3)[Y] > 0
    reached = np.where(own, -np.inf, logits(result.x)).argmax(1)
    assert np.all(distance[1:] <= 1.05 * least(order, X, Y, reached)[1:])
    # How the highest logit is shown changes nothing, in no field, to the bit.
    for shown in (1, 2):
        for name, a, b in zip(result._fields, result, run(attack, Linear(jnp.int32(shown)))):
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {shown}")


# ------------------------------------------------------- the published way, question by question


class Box:
    """A black box that shows classes only, and remembers what it was asked."""

    def __init__(self, answer=lambda x: logits(x).argmax(1)):
        self.answer, self.asked = answer, []

    def __call__(self, x):
        self.asked.append(np.array(x))
        return np.eye(3)[self.answer(x)]


def watch(attack, box, x=X, y=Y, targets=None, aim=None, judge=None):
    """The states of an attack on a black box, step by step."""
    state = attack.init(
        keys.examples(jax.random.key(2), jnp.arange(len(x))),
        jnp.asarray(x),
        jnp.asarray(y),
        None if targets is None else jnp.asarray(targets),
    )
    if aim is not None:
        state = state._replace(record=state.record._replace(aim=jnp.asarray(aim, jnp.int32)))
    model = drive.Host(box)
    return [
        state,
        *drive.stepped(attack, model, state, None if judge is None else drive.Host(judge)),
    ]


def in_box(x):
    return np.clip(x, LO, HI)


def rays(x0, noise, norm):
    """Algorithm of the paper: yields the points, is sent whether they are adversarial."""
    yield x0
    sign, best, size, begin = np.ones(SIZE), np.inf, SIZE, 0
    while True:
        trial = sign.copy()
        trial[begin : begin + size] *= -1
        reach = min(best, WIDTH)
        if (yield in_box(x0 + reach * trial)):
            low, high = 0.0, reach
            while (high - low) * SIZE**0.5 > 1e-3 * WIDTH:
                middle = (low + high) / 2
                if (yield in_box(x0 + middle * trial)):
                    high = middle
                else:
                    low = middle
            if high < best:
                best, sign = high, trial
        begin += size
        if begin >= SIZE:
            begin, size = 0, -(-size // 2)


def start(x0, noise):
    """Noise, and every other time a blend of it, until one is adversarial."""
    k = 0
    while True:
        share = 1.0 if k % 2 == 0 else k * (5**0.5 - 1) / 2 % 1.0
        k += 1
        x = x0 + share * (LO + WIDTH * (noise(k) + 1) / 2 - x0)
        if (yield x):
            return x, k


def bisect(x0, far, norm, tolerance):
    """To the boundary; also how many points it took."""
    reach = np.linalg.norm(far - x0, norm)
    low, high, near, asked = 0.0, reach, far, 0
    while high - low > tolerance * reach or not asked:
        middle, asked = (low + high) / 2, asked + 1
        move = np.clip(far - x0, -middle, middle) if norm == np.inf else middle / reach * (far - x0)
        if (yield x0 + move):
            high, near = middle, x0 + move
        else:
            low = middle
    return near, asked


def normals(noise):
    return np.sqrt(2) * special.erfinv(noise)


def hopskipjump(x0, noise, norm):
    """Algorithm 2 of the paper."""
    yield x0
    far, t = yield from start(x0, noise)
    theta = SIZE**-1.5 if norm == 2 else SIZE**-2.0
    turn = 0
    while True:
        turn += 1
        reach = np.linalg.norm(far - x0, norm)
        near, asked = yield from bisect(x0, far, norm, theta)
        t += asked
        delta = 0.1 * WIDTH if turn == 1 else reach / SIZE
        answers, directions = [], []
        for _ in range(int(100 * turn**0.5)):
            t += 1
            u = noise(t) if norm == np.inf else normals(noise(t))
            x = in_box(near + delta * u / np.linalg.norm(u))
            answers.append(1.0 if (yield x) else -1.0)
            directions.append((x - near) / delta)
        answers = np.array(answers)
        if abs(answers.mean()) < 1:
            answers -= answers.mean()
        gradient = answers @ np.array(directions)
        v = np.sign(gradient) if norm == np.inf else gradient / np.linalg.norm(gradient)
        step = np.linalg.norm(near - x0, norm) / turn**0.5
        while True:
            t += 1
            far = in_box(near + step * v)
            if (yield far):
                break
            step /= 2


def boundary(x0, noise, norm):
    """The walk of the paper; how often lengths are decided is ours."""
    yield x0
    far, t = yield from start(x0, noise)
    near, asked = yield from bisect(x0, far, 2, 1e-3)
    t += asked
    around = inward = 0.01
    looks, ends, steps = [], [], 0

    def points(z):
        home = x0 - near
        radius = np.linalg.norm(home)
        side = z - z @ home / radius**2 * home
        side *= around * radius / np.linalg.norm(side)
        sphere = in_box(x0 + (side - home) / np.sqrt(1 + around**2))
        left = np.linalg.norm(x0 - sphere)
        return sphere, sphere + max(inward * radius + left - radius, 0) / left * (x0 - sphere)

    def factor(answers, few, many):
        share = np.mean(answers)
        return 1.5 if share > many else 1 / 1.5 if share < few else 1.0

    while True:
        t += 1
        z = normals(noise(t))
        if steps % 10 == 0:
            t += 1
            looks.append((yield points(z)[0]))
            if len(looks) == 10:
                change = factor(looks, 0.2, 0.5)
                around, inward, looks = min(around * change, 1), min(inward * change, 1), []
        end = points(z)[1]
        ends.append((yield end))
        steps += 1
        if ends[-1] and np.linalg.norm(end - x0) < np.linalg.norm(near - x0):
            near = end
        if len(ends) == 30:
            inward, ends = min(inward * factor(ends, 0.1, 0.25), 1), []


# One program each, for all tests on four examples.
RAYS = RayS(WIDE[Linf], queries=250)
HOPS = HopSkipJump(WIDE[L2], queries=300)
HOPS_LINF = HopSkipJump(WIDE[Linf], queries=300)
WALK = Boundary(WIDE[L2], queries=300)
WAYS = [
    pytest.param(RAYS, rays, id="RayS"),
    pytest.param(HOPS, hopskipjump, id="HopSkipJump-L2"),
    pytest.param(HOPS_LINF, hopskipjump, id="HopSkipJump-Linf"),
    pytest.param(WALK, boundary, id="Boundary"),
]


@pytest.mark.parametrize(("attack", "way"), WAYS)
def test_every_question_is_the_published_one(attack, way):
    """Against the algorithms in float64, written down one question after the other.

    And on the way: one question for each example that has not ended, never more than allowed; what
    is kept is adversarial, and never gets further away.
    """
    box, queries = Box(), attack.queries
    norm = np.inf if isinstance(attack.threat, Linf) else 2
    states = watch(attack, box, X[:4], Y[:4])
    assert len(box.asked) == len(states) - 1 == queries
    assert [len(x) for x in box.asked] == [4] + [3] * (queries - 1), "the first has ended"
    asked = np.stack([x[-3:] for x in box.asked]).reshape(queries, 3, SIZE)
    adversarial = np.stack([box.answer(x) for x in asked]) != Y[1:4]
    lanes = keys.examples(jax.random.key(2), jnp.arange(4))[1:]
    at = jnp.arange(queries + 1)
    draws = jax.vmap(lambda t: _decision.uniform(lanes, t, jnp.zeros((3, *SHAPE))))(at)
    draws = np.float64(draws).reshape(-1, 3, SIZE)
    for i in range(3):
        published = way(np.float64(X[1 + i]).ravel(), lambda k, i=i: draws[k, i], norm)
        point = next(published)
        for k in range(queries):
            np.testing.assert_allclose(asked[k, i], point, atol=2e-4, err_msg=str(k))
            point = published.send(bool(adversarial[k, i]))

    distance = np.linalg.norm(asked - np.float64(X[1:4]).reshape(3, SIZE), norm, axis=2)
    nearest = np.minimum.accumulate(np.where(adversarial, distance, np.inf))
    for k in [*range(0, queries, 20), queries - 1]:
        record = states[k + 1].record
        np.testing.assert_array_equal(record.forwards, [1, *[k + 1] * 3])
        np.testing.assert_array_equal(record.success[1:], np.isfinite(nearest[k]))
        best = np.where(record.success[1:], record.threat.distance(record.best, X[:4])[1:], np.inf)
        np.testing.assert_allclose(best, nearest[k], rtol=1e-5)
    first = np.where(adversarial.any(0), adversarial.argmax(0), -1)
    np.testing.assert_array_equal(states[-1].record.first, [0, *first])
    assert np.all(states[-1].record.done)
    assert nearest[-1].max() < 0.9 * nearest[first.max()].min(), "it came closer"


# ---------------------------------------------------------------------------------- the rest


def test_rays_finds_the_best_of_all_corners():
    """The ray of a linear model is against all its weights, after one pass over the features."""
    w = np.float64(WEIGHTS[:, 0] - WEIGHTS[:, 1])
    box = Box(lambda x: np.where(np.float64(x - 1).reshape(len(x), -1) @ w + 0.8 > 0, 0, 1))
    x = np.full((4, *SHAPE), 1.0, np.float32)
    state = watch(RAYS, box, x, np.zeros(4, int))[-1]
    best = -np.sign(w).reshape(SHAPE)
    np.testing.assert_array_equal(state.inner.own.sign, np.broadcast_to(best, x.shape))
    want = 0.8 / np.abs(w).sum()
    distance = np.abs(np.float64(state.record.best) - 1).max((1, 2, 3))
    np.testing.assert_allclose(distance, want, atol=1.1e-3 * WIDTH / SIZE**0.5)


def test_a_ray_is_kept_only_where_it_is_shorter():
    """Where all rays are alike, the radius falls by what bisection left, and else nothing moves."""
    box = Box(lambda x: (np.abs(x - X[1]).max((1, 2, 3)) >= 0.37) * 1)
    watch(RAYS, box, np.repeat(X[1:2], 4, 0), np.zeros(4, int))
    published = rays(np.float64(X[1]).ravel(), None, np.inf)
    point = next(published)
    for x in box.asked:
        np.testing.assert_allclose(x[0].ravel(), point, atol=1e-5)
        point = published.send(bool(box.answer(x)[0]))


@pytest.mark.parametrize("attack", [RAYS, HOPS], ids=["RayS", "HopSkipJump"])
def test_nothing_found(attack):
    """The input comes back, after all queries, at different points of the box."""
    box = Box(lambda x: np.zeros(len(x), int))
    result = attack.result(watch(attack, box, X[:4], np.zeros(4, int))[-1])
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.x, X[:4])
    np.testing.assert_array_equal(result.forwards, attack.queries)
    np.testing.assert_array_equal(result.step, -1)
    np.testing.assert_array_equal(result.loss, -1)
    asked = np.stack(box.asked)
    assert asked.shape == (attack.queries, 4, *SHAPE)
    assert np.all((asked >= LO) & (asked <= HI))
    assert len(np.unique(asked[:17, 0].reshape(17, -1).round(4), axis=0)) == 17


def test_starts_and_targets():
    """Those of the right class first, the nearest of them before; targets are reached."""
    rng = np.random.default_rng(3)
    pool = np.float32(rng.uniform(LO, HI, (30, *SHAPE)))
    classes = logits(pool).argmax(1)
    x, y, near = X[1:5], LABELS[1:5], NEAREST[1:5]
    far = np.abs(pool[None] - x[:, None]).reshape(4, 30, -1).max(2)
    attack = HopSkipJump(WIDE[Linf], queries=300, starts=(pool, classes))
    for targets in (None, near):
        box = Box()
        result = attack.result(watch(attack, box, x, y, targets=targets)[-1])
        right = classes != y[:, None] if targets is None else classes == targets[:, None]
        first = np.where(right, far, np.inf).argmin(1)
        np.testing.assert_array_equal(box.asked[1], pool[first])
        assert np.all(result.success)
        reached = box.answer(result.x)
        assert np.all(reached != y if targets is None else reached == targets)
        assert np.all(result.distance < 0.5 * far[np.arange(4), first])
    # Nothing lies between the inputs and the nearest class, the last target.
    ratio = np.asarray(result.distance) / least(np.inf, x, y, near)
    assert ratio.min() >= 1 - 1e-5
    assert ratio.max() < 1.5
    # Starts that lie about their class are tried one after the other, then noise.
    box = Box(lambda x: np.zeros(len(x), int))
    watch(attack, box, x, np.zeros(4, int))
    for i in range(4):
        order = np.lexsort((far[i], classes == 0))
        np.testing.assert_array_equal([a[i] for a in box.asked[1:31]], pool[order])
    assert not np.any([np.all(a[0] == pool, axis=(1, 2, 3)) for a in box.asked[31:]])


def test_the_search_heads_for_the_aim_and_any_class_counts():
    aim = (LABELS[1:5] + 1) % 3
    attack, box = RAYS, Box()
    states = watch(attack, box, X[1:5], Y[1:5], aim=aim)
    result = attack.result(states[-1])
    answers = np.stack([box.answer(x) for x in box.asked])
    hits = np.stack([state.inner.hit for state in states[1:-1]])
    np.testing.assert_array_equal(hits, (answers == aim)[:-1])
    assert np.any((answers != aim) & (answers != Y[1:5])), "another class on the way"
    np.testing.assert_array_equal(result.success, (answers != Y[1:5]).any(0))
    first = (answers != Y[1:5]).argmax(0)
    np.testing.assert_array_equal(result.step, first)
    # It ends next to the aim's boundary, which it can only have followed on purpose.
    assert np.mean(logits(result.x).argmax(1) == aim) > 0.5


def test_quantised_points_are_what_is_asked():
    levels = np.float32(np.linspace(LO, HI, 256))
    x = levels[np.abs(X[1:4, ..., None] - levels).argmin(-1)]
    # With this gamma, all probes of the second turn would be rounded to their centre.
    attack, box = HopSkipJump(WIDE[L2], queries=300, gamma=1e-4, quantize=256), Box()
    result = attack.result(watch(attack, box, x, Y[1:4])[-1])
    asked = np.stack(box.asked)
    assert np.abs(asked[..., None] - levels).min(-1).max() < 1e-6
    assert len(asked) == 300
    np.testing.assert_array_equal(result.forwards, 300)
    assert np.all(result.success)
    assert np.all(result.distance <= 1.2 * least(2, x, Y[1:4]))
    probes = asked[200:280, 0].reshape(80, -1)
    assert len(np.unique(probes, axis=0)) > 75
    with pytest.raises(ValueError, match="grid"):
        run(attack)


def test_the_judge_has_the_last_word():
    """Its passes count beside the queries, and only points that both call adversarial are hits."""
    attack, box = RAYS, Box()
    shift = 1.5 * np.eye(3)
    asked = []

    def judge(x):
        asked.append(len(x))
        return logits(x) + shift[Y[1]]

    x, y = np.repeat(X[1:2], 4, 0), np.repeat(Y[1:2], 4)
    result = attack.result(watch(attack, box, x, y, judge=judge)[-1])
    assert len(box.asked) == 250
    np.testing.assert_array_equal(result.forwards, 250 + sum(asked) // 4)
    assert np.all(result.success)
    assert np.all((logits(result.x) + shift[Y[1]]).argmax(1) != y)
    assert np.all(result.distance > 1.05 * least(np.inf, x, y))


def test_success_ends_the_example():
    eps = np.float32(1.5 * least(np.inf, X[1:4], Y[1:4]))
    attack, box = RayS(Linf(eps, LO, HI), queries=300, keep="success"), Box()
    result = attack.result(watch(attack, box, X[1:4], Y[1:4])[-1])
    assert np.all(result.success)
    assert np.all(result.distance <= eps)
    np.testing.assert_array_equal(result.forwards, result.step + 1)
    assert sum(map(len, box.asked)) == result.forwards.sum()
    assert np.all((result.forwards > 2) & (result.forwards < 300))
    with pytest.raises(ValueError, match="keep='success'"):
        sequence(RayS(WIDE[Linf]))
    with pytest.raises(ValueError, match="random"):
        restarts(attack, 2)


def test_logits_that_are_not_finite():
    def broken(x):
        """NaN beyond a wall: a point there is not robust."""
        wall = np.isnan(np.where(np.float64(x)[:, 0, 0, 0] > 2.9, np.nan, 0.0))
        return np.where(wall[:, None], np.nan, np.eye(3)[np.zeros(len(x), int)])

    class Wall(Box):
        def __call__(self, x):
            return broken(x)

    x, y, attack = X[1:5], np.zeros(4, int), RAYS
    result = attack.result(watch(attack, Wall(), x, y)[-1])
    assert np.all(result.success)
    assert np.all(np.isnan(result.loss))
    assert np.all(np.asarray(result.x)[:, 0, 0, 0] > 2.9)
    np.testing.assert_allclose(result.distance, 2.9 - x[:, 0, 0, 0], atol=2e-3)


def test_randomised_models_are_asked_for_verdicts():
    def noisy(k, x):
        return MODEL(x + 0.05 * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(k))

    model = randomized(noisy, jax.random.key(5), samples=4, votes=3)
    lanes = keys.examples(jax.random.key(2), jnp.arange(4))
    state = RAYS.init(lanes, jnp.asarray(X[:4]), jnp.asarray(Y[:4]))
    for k in range(1, 5):
        hits = np.asarray(model(state.x)).argmax(1) != Y[:4]
        state = RAYS.step(model, state)
        np.testing.assert_array_equal(state.record.forwards, [3, *[3 * k] * 3])
        np.testing.assert_array_equal(state.inner.hit[1:], hits[1:])


def test_the_walk_takes_no_step_away():
    state = watch(WALK, Box(), X[1:5], Y[1:5])[60]
    record, own = state.record, state.inner.own
    walking = own._replace(phase=jnp.full_like(own.phase, _boundary._WALK))
    inner = state.inner._replace(hit=jnp.ones_like(state.inner.hit), own=walking)
    for share, taken in ((1.1, False), (0.9, True)):
        x = record.x0 + share * (own.way.near - record.x0)
        near = WALK.propose(state._replace(x=x, inner=inner))[1].way.near
        np.testing.assert_array_equal(near, x if taken else own.way.near)


def test_a_single_feature():
    """There is no sphere to walk on."""
    x, y = np.float32([[0.3], [0.9]]), np.array([0, 1])

    def sides(x):
        return np.where(x[:, 0] > 0.7, 1, 0)

    attack = Boundary(L2(1.0), queries=60)
    result = attack.result(watch(attack, Box(sides), x, y)[-1])
    assert np.all(result.success)
    np.testing.assert_allclose(result.distance, [0.4, 0.2], atol=5e-3)


def test_it_can_be_looked_into():
    attack = RayS(WIDE[Linf], queries=12)
    result, seen = debug.trace(attack, jax.random.key(2), MODEL, X, Y)
    assert seen.loss.shape == (12, 8)
    np.testing.assert_allclose(seen.distance[0], 0)
    corner = np.abs(X[1:] - LO).max((1, 2, 3))
    np.testing.assert_allclose(seen.distance[1, 1:], corner, rtol=1e-6)
    assert np.all(result.step >= -1)


BAD = {
    "norm": (lambda: RayS(WIDE[L2]), TypeError, "Linf"),
    "norm of a walk": (lambda: Boundary(WIDE[Linf]), TypeError, "L2"),
    "queries": (lambda: RayS(WIDE[Linf], queries=1), ValueError, "queries"),
    "fraction": (lambda: HopSkipJump(WIDE[L2], queries=1e4), ValueError, "queries"),
    "tolerance": (lambda: RayS(WIDE[Linf], tolerance=0.0), ValueError, "tolerance"),
    "probes": (lambda: HopSkipJump(WIDE[L2], initial_probes=0), ValueError, "initial_probes"),
    "steps": (lambda: Boundary(WIDE[L2], source_step=-1.0), ValueError, "source_step"),
    "keep": (lambda: Boundary(WIDE[L2], keep="loss"), ValueError, "closest"),
    "starts of another shape": (
        lambda: Boundary(WIDE[L2], starts=(X[:, 0], Y)), ValueError, "starts",
    ),
    "starts without labels": (
        lambda: Boundary(WIDE[L2], starts=(X, Y[:3])), ValueError, "labels",
    ),
    "starts out of the box": (
        lambda: Boundary(WIDE[L2], starts=(255 * X, Y)), ValueError, "box",
    ),
    "labels that are none": (
        lambda: Boundary(WIDE[L2], starts=(X, Y + 3)), ValueError, "starts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    make, error, match = BAD[name]
    with pytest.raises(error, match=match):
        run(make())
