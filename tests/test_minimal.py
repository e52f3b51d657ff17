"""Minimal-norm attacks: closed forms on linear models in a box, and what they have in common."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import debug, drive, keys, losses
from jrobust._algorithm import algorithm
from jrobust.attacks import _minimal, restarts, sequence
from jrobust.attacks._alma import ALMA
from jrobust.attacks._base import open_record
from jrobust.attacks._cw import CW, CWLinf
from jrobust.attacks._ddn import DDN
from jrobust.attacks._deepfool import DeepFool
from jrobust.attacks._ead import EAD
from jrobust.attacks._fmn import FMN
from jrobust.attacks._pdgd import PDGD
from jrobust.models import randomized
from jrobust.threat import L0, L1, L2, Linf
from jrobust.zeroth_order import CGE

# ------------------------------------------------------------------ linear models: closed forms


@algorithm
class Linear:
    """A linear model that is NaN where the first feature exceeds ``broken``."""

    weights: jax.Array  # (d, C)
    bias: jax.Array  # (1, C)
    broken: jax.Array  # ()

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return jnp.where(x[:, :1] > self.broken, jnp.nan, x @ self.weights + self.bias)


@dataclasses.dataclass
class Case:
    """A linear model and inputs it gets right, but for the first."""

    shape: tuple
    classes: int
    lo: float
    hi: float
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        d, width = int(np.prod(self.shape)), self.hi - self.lo
        # Heavy tails, so that norms disagree about the best features; logits wide apart, so that a
        # cross-entropy follows the margin.
        weights = rng.normal(size=(d, self.classes)) * np.exp(0.7 * rng.normal(size=(d, 1)))
        weights -= weights.mean(0)
        kinds = (
            rng.uniform(0.4, 0.6, (400, d)),  # in the middle of the box
            rng.uniform(0.0, 1.0, (400, d)),  # anywhere
            rng.integers(0, 2, (400, d)),  # in its corners
        )
        center = 0.5 * weights.sum(0)
        weights, bias = 20 * weights / width, -20 * (center + self.lo / width * weights.sum(0))
        # All logits are negative.
        self.model = Linear(np.float32(weights), np.float32(bias[None] - 500), np.float32(np.inf))
        x, y = [], []
        for kind in kinds:
            points = np.float32(self.lo + width * kind)
            label = self.logits(points).argmax(1)
            fair = (i for i in range(400) if self.straight(points[[i]], label[[i]]))
            chosen = list(itertools.islice(fair, 5))
            x.append(points[chosen])
            y.append(label[chosen])
        assert len(np.concatenate(y)) == 15
        x, y = np.concatenate(x), np.concatenate(y)
        assert self.logits(x).max() < 0
        self.flat = np.concatenate([x[:1], x])
        self.x = self.flat.reshape(-1, *self.shape)
        self.y = np.concatenate([(y[:1] + 1) % self.classes, y])

    def logits(self, x):
        return np.float64(x) @ np.float64(self.model.weights) + np.float64(self.model.bias)

    def straight(self, x, y):
        """Whether an input is a fair test: not too near, not too far.

        And the class of the highest other logit is the nearest in every norm: to find out that
        another one is nearer is not what a gradient attack promises.
        """
        if not 0.1 < self.distances("L2", x, y)[0] / (self.hi - self.lo) < 0.6:
            return False
        second = np.argsort(self.logits(x), 1)[:, -2]
        return all(
            self.distances(norm, x, y, second) == self.distances(norm, x, y) for norm in RULES
        )

    def distances(self, norm, x, y, targets=None):
        """Distance to the boundary with the nearest other class, or with ``targets`` (B,)."""
        logits, weights = self.logits(x), np.float64(self.model.weights)
        channels = self.shape[-1] if len(self.shape) == 3 else 1
        found = np.full(len(x), np.inf)
        for i, own in enumerate(y):
            for k in range(self.classes):
                if k != own and (targets is None or targets[i] == k):
                    w = weights[:, k] - weights[:, own]
                    room = np.where(w > 0, self.hi - x[i], x[i] - self.lo)
                    gap = logits[i, own] - logits[i, k]
                    found[i] = min(found[i], nearest(norm, np.abs(w), gap, room, channels))
        return found


RULES = ("Linf", "L2", "L1", "L0")


def nearest(norm, w, gap, room, channels):
    """The least norm of moves in ``[0, room]`` that gain ``gap`` at the rates ``w >= 0``."""
    room = np.float64(room)
    if w @ room < gap:
        return np.inf
    if norm == "L0":
        gains = np.sort((w * room).reshape(-1, channels).sum(1))[::-1]
        return float(np.searchsorted(np.cumsum(gains), gap) + 1)
    if norm == "L1":
        order = np.argsort(-w)
        before = np.concatenate([[0], np.cumsum((w * room)[order])[:-1]])
        return (np.clip(gap - before, 0, (w * room)[order]) / w[order]).sum()

    def moves(t):
        return np.minimum(t if norm == "Linf" else t * w, room)

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if w @ moves(middle) < gap else (low, middle)
    return np.linalg.norm(moves(high), np.inf if norm == "Linf" else 2)


@functools.cache
def case(name):
    return {
        "three": lambda: Case((4, 3, 2), 3, 0.0, 1.0),
        "two": lambda: Case((24,), 2, -1.0, 3.0),
    }[name]()


def whole(kind, c):
    """The threat model that counts any distance."""
    width = c.hi - c.lo
    extra = {"pixels": len(c.shape) == 3} if kind is L0 else {}
    return kind(kind(1.0, **extra).widest(width, c.shape), lo=c.lo, hi=c.hi, **extra)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An attack, the norms it is for, and how close to the optimum it has to come.

    ``logits`` scales the model's logits, for attacks whose steps depend on them.
    """

    name: str
    make: object
    kinds: tuple
    bound: float
    logits: float = 1.0


TABLE = [
    Entry("DDN", DDN, (L2,), 1.05),
    Entry("FMN", FMN, (Linf, L2, L1, L0), 1.001),
    Entry("CW", lambda t: CW(t, steps=150, step_size=0.03), (L2,), 1.05),
    Entry(
        "CWLinf",
        lambda t: CWLinf(t, steps=200, step_size=0.01, decrease_factor=0.98),
        (Linf,),
        1.05,
    ),
    Entry("DeepFool", lambda t: DeepFool(t, overshoot=5e-4), (L2, Linf), 1.001),
    Entry("EAD", lambda t: EAD(t, steps=200, beta=0.05, rule="L1"), (L1,), 1.05),
    Entry("ALMA", lambda t: ALMA(t, steps=200, alpha=0.5), (L2,), 1.05),
    Entry("PDGD", lambda t: PDGD(t, steps=300), (L2,), 1.12, logits=0.05),
]
PAIRS = [pytest.param(e, k, id=f"{e.name}-{k.norm}") for e in TABLE for k in e.kinds]
# What the base promises is tried with all of them in the full tier.
BASE = ("DDN", "FMN", "DeepFool")
FIRST = [
    pytest.param(e, e.kinds[0], id=e.name, marks=() if e.name in BASE else pytest.mark.full)
    for e in TABLE
]
BY_NAME = {e.name: e for e in TABLE}


def model_of(entry, c, **fields):
    model = dataclasses.replace(c.model, **fields)
    scale = np.float32(entry.logits)
    return dataclasses.replace(model, weights=scale * model.weights, bias=scale * model.bias)


def run(attack, model, c, *, x=None, y=None, targets=None):
    x, y = c.x if x is None else x, c.y if y is None else y
    return jrobust.run(attack, jax.random.key(3), model, x, y, targets=targets)


def assert_same(a, b, rows=slice(None)):
    for name, left, right in zip(a._fields, a, b):
        np.testing.assert_array_equal(left[rows], right[rows], err_msg=name)


@pytest.mark.parametrize("name", ["three", pytest.param("two", marks=pytest.mark.full)])
@pytest.mark.parametrize(("entry", "kind"), PAIRS)
def test_closed_form(entry, kind, name):
    """At the nearest boundary, wherever in the box the input lies: also in its corners."""
    c = case(name)
    model = model_of(entry, c)
    result = run(entry.make(whole(kind, c)), model, c)
    got = np.asarray(result.distance)
    assert np.all(result.success)
    assert np.all((result.x >= c.lo) & (result.x <= c.hi))
    # The first input is misclassified as it is.
    assert got[0] == 0
    assert result.step[0] == 0
    assert result.forwards[0] <= 2
    np.testing.assert_array_equal(result.x[0], c.x[0])
    # What is returned is measured.
    logits = model(result.x)
    assert np.all(np.asarray(logits).argmax(1) != c.y)
    shown = losses.ascent(
        entry.make(L2(1.0)).loss, logits, jnp.asarray(c.y), jnp.full(len(c.y), -1)
    )
    np.testing.assert_allclose(result.loss, shown, rtol=1e-3, atol=1e-3)
    assert np.all(result.step[1:] > 0)
    assert np.all(result.step < result.forwards)
    ratio = got[1:] / c.distances(kind.norm, c.flat[1:], c.y[1:])
    assert ratio.min() >= 1 - 1e-5
    assert ratio.max() <= entry.bound, ratio


@pytest.mark.parametrize(("entry", "kind"), FIRST)
def test_no_example_sees_its_companions(entry, kind):
    """To the bit, and in every field, although examples stop by their own measure."""
    c = case("three")
    attack, model = entry.make(whole(kind, c)), model_of(entry, c)
    whole_batch = run(attack, model, c)
    order = np.concatenate([np.arange(8), np.arange(len(c.x))[:7:-1]])
    other = run(attack, model, c, x=c.x[order], y=c.y[order])
    assert_same(whole_batch, other, slice(8))
    # Among copies of itself, where what a batch decides, one example decides.
    for row in (2, 14):
        copies = np.full(len(c.x), row)
        alone = run(attack, model, c, x=c.x[copies], y=c.y[copies])
        assert_same(jax.tree.map(lambda a, c=copies: a[c], whole_batch), alone)


@pytest.mark.parametrize(("entry", "kind"), FIRST)
def test_targets(entry, kind):
    c = case("three")
    model, attack = model_of(entry, c), entry.make(whole(kind, c))
    targets = (c.y + 1) % 3
    result = run(attack, model, c, targets=targets)
    reached = np.asarray(model(result.x)).argmax(1) == targets
    np.testing.assert_array_equal(result.success, reached)
    assert reached.mean() > 0.9
    # The half-space of the target is no nearer, and where nothing lies between, it is reached.
    least = c.distances(kind.norm, c.flat, c.y, targets)
    ratio = np.asarray(result.distance)[1:] / least[1:]
    found = reached[1:] & np.isfinite(least[1:])
    assert np.all(ratio[found] >= 1 - 1e-5)
    nearest_class = np.argsort(c.logits(c.flat), 1)[:, -2] == targets
    assert nearest_class[1:].sum() > 3
    assert np.all(ratio[nearest_class[1:]] <= entry.bound)
    # Of a model whose logits are not numbers, no point is the target.
    broken = run(attack, model_of(entry, c, broken=np.float32(-np.inf)), c, targets=targets)
    assert not np.any(broken.success)
    np.testing.assert_array_equal(broken.x, c.x)


@pytest.mark.parametrize(("entry", "kind"), FIRST)
def test_models_without_numbers_or_slopes(entry, kind):
    c = case("three")
    attack = entry.make(whole(kind, c))
    broken = run(attack, model_of(entry, c, broken=np.float32(-np.inf)), c)
    assert np.all(broken.success)
    assert np.all(broken.distance == 0)
    assert np.all(broken.step == 0)
    assert np.all(np.isnan(broken.loss))
    # NaN beyond a wall near the inputs: a point there is not robust.
    wall = np.float32(np.median(c.flat[:, 0]) + 0.02)
    result = run(attack, model_of(entry, c, broken=wall), c)
    assert np.all(np.isfinite(result.x))
    assert np.all(result.success)
    assert np.all((result.x >= c.lo) & (result.x <= c.hi))
    inside = c.flat[:, 0] > wall
    assert np.all(np.asarray(result.distance)[inside] == 0)
    assert 0 < inside.sum() < len(inside)
    beyond = np.asarray(result.x).reshape(len(c.x), -1)[:, 0] > wall
    np.testing.assert_array_equal(np.isnan(result.loss), beyond)
    # No slope anywhere: nothing is found, the input comes back.
    flat = dataclasses.replace(c.model, weights=0 * c.model.weights)
    result = run(attack, flat, c)
    wrong = flat.bias[0].argmax() != c.y
    np.testing.assert_array_equal(result.success, wrong)
    np.testing.assert_array_equal(result.x, c.x)
    np.testing.assert_array_equal(result.step, np.where(wrong, 0, -1))


# ------------------------------------------------------------------ what the attacks share


def test_eps_is_the_largest_distance_that_counts():
    c = case("three")
    least = c.distances("L2", c.flat, c.y)
    share = np.where(np.arange(len(c.x)) % 2, 0.9, 1.1)
    eps = np.float32(share * least)
    result = run(FMN(L2(eps)), c.model, c)
    counts = share > 1
    counts[0] = True
    np.testing.assert_array_equal(result.success, counts)
    np.testing.assert_array_equal(result.distance <= eps, True)
    np.testing.assert_array_equal(np.asarray(result.x)[~counts], c.x[~counts])
    np.testing.assert_array_equal(np.asarray(result.step)[~counts], -1)
    # The search does not heed eps.
    far = run(FMN(whole(L2, c)), c.model, c)
    np.testing.assert_array_equal(np.asarray(result.x)[counts], np.asarray(far.x)[counts])
    assert np.all(np.asarray(result.loss)[~counts] < 0), "the loss at the input"


def test_the_closest_point_is_kept():
    x0 = jnp.zeros((3, 2))
    y = jnp.arange(3)
    record = open_record(L2(0.5), keys.examples(jax.random.key(0), y), x0, y, None)
    record = record._replace(done=jnp.array([False, False, True]))
    # Distances, and whether they are hits: too far, within, closer but no hit, closest, further.
    points = [(0.0, False), (0.7, True), (0.4, True), (0.1, False), (0.2, True), (0.3, True)]
    for i, (distance, hit) in enumerate(points):
        x = x0.at[:, 1].set(distance)
        hits = jnp.array([hit, hit and distance != 0.2, hit])
        record = _minimal.track(record, x, jnp.full(3, i), hits, forwards=2, backwards=1)
    np.testing.assert_allclose(record.best[:, 1], [0.2, 0.3, 0.0])
    np.testing.assert_array_equal(record.loss, [4, 5, -np.inf])
    np.testing.assert_array_equal(record.first, [2, 2, -1])
    np.testing.assert_array_equal(record.success, [True, True, False])
    np.testing.assert_array_equal(record.forwards, [12, 12, 0])
    np.testing.assert_array_equal(record.backwards, [6, 6, 0])


def test_the_ball_is_exact():
    """A distance equal to eps counts, one above by less than float32 can tell does not."""
    rng = np.random.default_rng(0)
    x0, eps = np.float32(rng.uniform(0, 0.5, (500, 1))), np.float32(rng.uniform(0.01, 0.4, 500))
    x = x0 + eps[:, None]
    threat = Linf(eps).batched(jnp.asarray(x0))
    exact = (np.float64(x) - np.float64(x0))[:, 0] <= np.float64(eps)
    np.testing.assert_array_equal(_minimal.within(threat, x, x0), exact)
    assert np.any((threat.distance(x, x0) <= eps) & ~exact), "a hard case"

    x0 = jnp.float32([[0.1, 0.3], [0.1, 0.3]])
    moved = jnp.float32([[0.9, 0.3], [0.9, 0.9]])
    one = L0(1.0, pixels=False).batched(x0)
    np.testing.assert_array_equal(_minimal.within(one, moved, x0), [True, False])


@pytest.mark.parametrize("kind", [L2, Linf], ids=lambda k: k.norm)
def test_deepfool_goes_to_the_nearest_class_not_the_likeliest(kind):
    weights = np.float32([[0.0, 0.1, 1.0], [0.0, 0.1, -2.0]])
    bias = np.float32([[0.0, -0.2, 0.25]])  # at x: 0, -0.1, -0.25
    x = np.full((1, 2), 0.5, np.float32)
    model = Linear(weights, bias, np.float32(np.inf))
    result = jrobust.run(
        DeepFool(kind(kind(1.0).widest(1.0, (2,))), overshoot=5e-4),
        jax.random.key(0), model, x, np.array([0]),
    )  # fmt: skip
    want = 0.25 / (3.0 if kind is Linf else np.sqrt(5))
    np.testing.assert_allclose(result.distance, want, rtol=1e-3)
    assert int(result.step[0]) == 1
    assert int(result.backwards[0]) == 4, "one for each other class, at two points"


def test_keep_success_ends_at_the_first():
    c = case("three")
    wide = whole(L2, c)
    first = run(FMN(wide, keep="success"), c.model, c)
    assert np.all(first.success)
    np.testing.assert_array_equal(first.forwards, first.step + 1)
    closest = run(FMN(wide), c.model, c)
    assert np.all(closest.distance <= first.distance)
    np.testing.assert_array_equal(closest.step, first.step)
    np.testing.assert_array_equal(closest.forwards[1:], 101)
    np.testing.assert_array_equal(closest.backwards[1:], 100)
    both = sequence(FMN(wide, steps=1, keep="success"), DDN(wide, keep="success"))
    assert np.all(run(both, c.model, c).success)
    with pytest.raises(ValueError, match="keep='success'"):
        sequence(FMN(wide))
    with pytest.raises(ValueError, match="random"):
        restarts(FMN(wide), 2)


def test_aim_directs_the_search_and_not_the_verdict():
    c = case("three")
    aim = jnp.asarray(np.argsort(c.logits(c.flat), 1)[:, 0], jnp.int32)

    def towards(attack):
        state = attack.init(keys.examples(jax.random.key(0), jnp.arange(len(c.x))), c.x, c.y)
        state = state._replace(record=state.record._replace(aim=aim))
        return attack.result(drive.run(attack, c.model, state))

    for attack in (FMN(whole(L2, c)), DeepFool(whole(L2, c))):
        result = jax.jit(towards)(attack)
        prediction = np.asarray(c.model(result.x)).argmax(1)
        np.testing.assert_array_equal(result.success, prediction != c.y)
        assert np.mean(prediction[1:] == aim[1:]) > 0.5


@pytest.mark.parametrize("make", [DDN, FMN], ids=lambda m: m.__name__)
def test_quantised_points_survive_saving(make):
    c = case("three")
    x = np.float32(np.round(c.x * 255)) / np.float32(255)
    result = run(make(whole(L2, c), quantize=256), c.model, c, x=x)
    saved = np.uint8(np.round(np.asarray(result.x) * 255))
    loaded = np.float32(saved) / np.float32(255)
    np.testing.assert_array_equal(result.x, loaded)
    assert np.all(result.success)
    assert np.all(np.asarray(c.model(loaded)).argmax(1) != c.y)
    least = c.distances("L2", x.reshape(len(x), -1), c.y)
    assert np.all(np.asarray(result.distance)[1:] <= 1.1 * least[1:])
    np.testing.assert_array_equal(result.forwards[1:], 202)
    # Without it, points next to the boundary fall back when saved.
    plain = np.asarray(run(make(whole(L2, c)), c.model, c, x=x).x)
    loaded = np.float32(np.round(plain * 255)) / np.float32(255)
    assert np.mean(np.asarray(c.model(loaded)).argmax(1) == c.y) > 0.1
    with pytest.raises(ValueError, match="grid"):
        run(make(whole(L2, c), quantize=256), c.model, c)
    with pytest.raises(ValueError, match="quantize"):
        run(make(whole(L2, c), quantize=1), c.model, c)


def test_the_judge_has_the_last_word():
    """A model that is searched breaks early; the judge holds longer."""
    c = case("two")
    own = np.arange(2)[None, :] == 0
    judge = dataclasses.replace(c.model, bias=c.model.bias + np.float32(4.0 * own))
    attack = FMN(whole(L2, c))

    @jax.jit
    def judged(attack, searched, judge):
        state = attack.init(keys.examples(jax.random.key(0), jnp.arange(len(c.x))), c.x, c.y)
        return attack.result(drive.run(attack, searched, state, judge))

    result = judged(attack, c.model, judge)
    verdict = np.asarray(judge(result.x)).argmax(1) != c.y
    np.testing.assert_array_equal(result.success, verdict)
    shifted = dataclasses.replace(c, seed=c.seed)
    shifted.model = judge
    least = shifted.distances("L2", c.flat, c.y)
    held = (c.y == 0) & (np.arange(len(c.y)) > 0)
    ratio = np.asarray(result.distance)[held] / least[held]
    assert held.sum() > 2
    assert np.all(ratio >= 1 - 1e-5)
    assert np.all(ratio < 1.2)
    assert np.all(result.forwards[held] > 101), "the judge's passes count"


@pytest.mark.full
def test_black_boxes_by_estimated_gradients():
    c = case("two")
    asked = []

    def answer(x):
        asked.append(len(x))
        return c.logits(x)

    with pytest.raises(TypeError, match="estimator"):
        run(DDN(whole(L2, c)), drive.Host(answer), c)
    with pytest.raises(TypeError, match="gradient"):
        run(DeepFool(whole(L2, c)), drive.Host(answer), c)
    asked.clear()
    result = run(
        DDN(whole(L2, c), steps=10, init_norm=0.3, estimator=CGE(1e-2)), drive.Host(answer), c
    )
    assert 0.4 < np.mean(result.success) < 1
    assert sum(asked) == np.sum(result.forwards)
    assert np.max(result.backwards) == 0
    wrong = c.logits(np.asarray(result.x).reshape(len(c.x), -1)).argmax(1) != c.y
    np.testing.assert_array_equal(result.success, wrong)


@pytest.mark.parametrize(
    "make", [pytest.param(FMN, marks=pytest.mark.full), DeepFool], ids=lambda m: m.__name__
)
def test_randomised_models(make):
    c = case("two")

    def noisy(k, x):
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(k)
        return c.model(x + 0.05 * noise)

    model = randomized(noisy, jax.random.key(5), samples=4, votes=8)
    result = run(make(whole(L2, c), steps=30), model, c)
    np.testing.assert_array_equal(result.success, np.asarray(model(result.x)).argmax(1) != c.y)
    assert np.mean(result.success) > 0.9
    assert np.all(result.forwards % 4 == 0)


def test_the_projection_of_fmn_leaves_points_inside_alone():
    """The released L2 projections rescale every point to the radius, or none."""
    c = case("two")
    attack = FMN(whole(L2, c), step_size=1e-3, final_step_size=1e-3)
    state = attack.init(keys.examples(jax.random.key(0), jnp.arange(len(c.x))), c.x, c.y)
    after = jax.jit(lambda s: attack.step(c.model, s))(state)
    moved = np.linalg.norm(np.asarray(after.x).reshape(len(c.x), -1) - c.flat, axis=1)[1:]
    assert np.all(after.inner.own[0][1:] > 0.1), "the radius"
    assert np.all((moved > 0) & (moved <= 1.01 * 4e-3)), "the step, in boxes of width 4"


def test_both_decision_rules_of_ead():
    c = case("three")
    found = {rule: run(EAD(whole(L1, c), steps=60, rule=rule), c.model, c) for rule in ("EN", "L1")}

    def elastic(result):
        move = np.float64(result.x).reshape(len(c.x), -1) - c.flat
        return (move**2).sum(1) + 1e-3 * np.abs(move).sum(1)

    np.testing.assert_array_equal(found["EN"].step, found["L1"].step)
    assert np.all(found["L1"].distance <= found["EN"].distance)
    assert np.any(found["L1"].distance < 0.99 * np.asarray(found["EN"].distance))
    assert np.all(elastic(found["EN"]) <= elastic(found["L1"]) + 1e-6)
    # Features that shrink to nothing are those of the input to the bit.
    assert np.mean(np.asarray(found["L1"].x)[1:] == c.x[1:]) > 0.3


def test_it_can_be_looked_into():
    c = case("two")
    result, seen = debug.trace(DDN(whole(L2, c), steps=5), jax.random.key(3), c.model, c.x, c.y)
    assert seen.loss.shape == (6, len(c.x))
    np.testing.assert_allclose(seen.distance[0], 0)
    assert np.all(result.step >= -1)


BAD = {
    "norm": (lambda c: DDN(whole(Linf, c)), TypeError, "L2"),
    "threat": (lambda c: FMN(0.5), TypeError, "threat model"),
    "steps": (lambda c: FMN(whole(L2, c), steps=0), ValueError, "steps"),
    "keep": (lambda c: FMN(whole(L2, c), keep="loss"), ValueError, "closest"),
    "gamma": (lambda c: DDN(whole(L2, c), gamma=0.0), ValueError, "gamma"),
    "rounds": (lambda c: CW(whole(L2, c), rounds=0), ValueError, "rounds"),
    "rule": (lambda c: EAD(whole(L1, c), rule="L2"), ValueError, "rule"),
    "bound": (lambda c: CWLinf(whole(Linf, c), decrease_factor=1.0), ValueError, "below 1"),
    "classes": (lambda c: DeepFool(whole(L2, c), classes=1), ValueError, "classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    make, error, match = BAD[name]
    c = case("two")
    with pytest.raises(error, match=match):
        run(make(c), c.model, c)
