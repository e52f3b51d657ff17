"""Spatial: its resampling by numpy and scipy, its searches by what a black box was asked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import jrobust
from jrobust import drive, keys, losses
from jrobust._algorithm import algorithm, describe
from jrobust.attacks import with_eps
from jrobust.attacks._spatial import RotationTranslation, Spatial, _grid
from jrobust.data import Dataset
from jrobust.threat import Linf

RNG = np.random.default_rng(0)
BATCH, HEIGHT, WIDTH, CHANNELS, CLASSES = 16, 8, 10, 2, 4
# Smooth images, so that a small turn is a small change.
NOISE = RNG.normal(size=(BATCH, HEIGHT, WIDTH, CHANNELS))
SMOOTH = ndimage.gaussian_filter(NOISE, (0, 1.2, 1.2, 0))
X = np.float32(0.5 + 0.45 * SMOOTH / np.abs(SMOOTH).max((1, 2, 3), keepdims=True))
IDS = np.arange(BATCH) + 7

# ------------------------------------------------------------------ images


def resampled(image, angle, right, down, fill, dtype=np.float64):
    """One image (H, W, C), by scipy: angle in degrees, shifts in pixels."""
    turn = np.deg2rad(angle)
    back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    middle = (np.array(image.shape[:2]) - 1) / 2
    offset = middle - back @ (middle + np.array([down, right]))
    return np.stack(
        [
            ndimage.affine_transform(
                channel.astype(dtype), back, offset, order=1, mode="grid-constant", cval=fill
            )
            for channel in np.moveaxis(image, -1, 0)
        ],
        -1,
    )


apply = jax.jit(RotationTranslation.apply)


def test_quarter_turns_and_whole_pixels():
    limits = RotationTranslation(90.0, 1.0)
    square = X[:, :, :HEIGHT]
    for turn, name in ((1.0, 1), (-1.0, -1)):
        got = apply(limits, square, jnp.tile(jnp.float32([[turn, 0, 0]]), (BATCH, 1)))
        np.testing.assert_allclose(got, np.rot90(square, name, (1, 2)), atol=1e-6)
    for right, down in ((3, 0), (0, -2), (-4, 5)):
        share = jnp.float32([[0, right / WIDTH, down / HEIGHT]])
        got = apply(limits, X, jnp.tile(share, (BATCH, 1)))
        want = np.roll(X, (down, right), (1, 2))
        rows, columns = np.arange(HEIGHT) - down, np.arange(WIDTH) - right
        want[:, (rows < 0) | (rows >= HEIGHT)] = 0
        want[:, :, (columns < 0) | (columns >= WIDTH)] = 0
        np.testing.assert_allclose(got, want, atol=1e-6)
    none = jnp.zeros((BATCH, 3))
    np.testing.assert_array_equal(apply(limits, X, none), X)


def test_resampling_is_that_of_scipy():
    limits = RotationTranslation(50.0, 0.3, fill=0.3)
    shares = RNG.uniform(-1, 1, (BATCH, 3))
    got = np.asarray(apply(limits, X, jnp.float32(shares)))
    for image, (turn, right, down), mine in zip(X, shares, got):
        want = resampled(image, 50 * turn, 0.3 * WIDTH * right, 0.3 * HEIGHT * down, 0.3)
        np.testing.assert_allclose(mine, want, atol=2e-5)
    plain = apply(limits, X[..., 0], jnp.float32(shares))
    np.testing.assert_allclose(plain, got[..., 0], atol=1e-6)


def test_the_slope_is_that_of_finite_differences():
    limits = RotationTranslation(50.0, 0.3)
    shares = RNG.uniform(-1, 1, (BATCH, 3))
    weight = RNG.normal(size=X.shape)
    slope = jax.jit(RotationTranslation.slope)(limits, X, jnp.float32(shares), jnp.float32(weight))

    def height(i, shares):
        turn, right, down = shares
        made = resampled(X[i], 50 * turn, 0.3 * WIDTH * right, 0.3 * HEIGHT * down, 0.0)
        return np.sum(weight[i] * made)

    apart = []
    for i in range(BATCH):
        for j in range(3):
            step = 1e-7 * np.eye(3)[j]
            want = (height(i, shares[i] + step) - height(i, shares[i] - step)) / 2e-7
            apart.append(abs(float(slope[i, j]) - want) / (1 + abs(want)))
    assert max(apart) < 2e-3


def test_what_has_no_limit_is_not_used(key):
    lanes = keys.examples(key, jnp.arange(BATCH))
    for limits, free in (
        (RotationTranslation(0.0, 0.1), [0, 1, 1]),
        (RotationTranslation(30.0, 0.0), [1, 0, 0]),
    ):
        drawn = limits.sample(lanes, jnp.zeros((BATCH, 3)))
        np.testing.assert_array_equal(np.any(drawn != 0, 0), np.array(free) > 0)


# ------------------------------------------------------------------ searches


@algorithm
class Net:
    """A small net; NaN where the first pixel's first channel lies below ``broken``."""

    inner: jax.Array
    outer: jax.Array
    broken: jax.Array
    traces = 0

    def __call__(self, x):
        Net.traces += 1
        flat = x.reshape(x.shape[0], -1)
        logits = jnp.tanh((flat - 0.5) @ self.inner) @ self.outer
        return jnp.where(flat[:, :1] < self.broken, jnp.nan, logits)


SIZE = HEIGHT * WIDTH * CHANNELS
NET = Net(
    np.float32(RNG.normal(size=(SIZE, 12)) / 3),
    np.float32(RNG.normal(size=(12, CLASSES))),
    np.float32(-1),
)
Y = np.asarray(NET(X)).argmax(1)
Y[0] = (Y[0] + 1) % CLASSES
SMALL = RotationTranslation(20.0, 0.1)
GRID = Spatial(SMALL, grid=(3, 3, 2))
DRAWN = Spatial(SMALL, method="random", draws=6)
CLIMB = Spatial(SMALL, method="gradient", steps=5)


class Box:
    """A black box that keeps what it was asked."""

    def __init__(self, model):
        self.model, self.asked = jax.jit(lambda x: model(x)), []

    def __call__(self, x):
        self.asked.append(np.array(x))
        return np.asarray(self.model(x))


def own(y):
    """A model that is never wrong about examples of these labels, in this order."""
    return lambda x: jax.nn.one_hot(y, CLASSES) + 0 * x[:, :1, 0, 0]


def test_the_published_grid():
    grid = _grid((31, 5, 5))
    assert len(grid) == 775
    assert not grid[0].any()
    assert len(np.unique(grid, axis=0)) == 775
    for column, number in zip(grid.T, (31, 5, 5)):
        np.testing.assert_allclose(np.unique(column), np.linspace(-1, 1, number), atol=1e-15)
    assert len(_grid((2, 1, 1))) == 3, "the image itself is not in the grid, and comes first"
    assert Spatial().moves + 1 == Spatial().queries == 775


def test_a_grid_is_asked_exhaustively(key):
    box = Box(own(Y))
    found = jrobust.run(GRID, key, drive.Host(box), X, Y, ids=IDS)
    total = 3 * 3 * 2 + 1
    assert not np.any(found.success)
    np.testing.assert_array_equal(found.forwards, total)
    np.testing.assert_array_equal(found.backwards, 0)
    asked = np.stack(box.asked)
    np.testing.assert_array_equal(asked[0], X)
    assert len(asked) == total
    turns, shifts, lifts = ([-1, 0, 1], [-1, 0, 1], [-1, 1])
    for turn in turns:
        for right in shifts:
            for down in lifts:
                share = jnp.tile(jnp.float32([[turn, right, down]]), (BATCH, 1))
                made = np.asarray(apply(SMALL, X, share))
                assert np.any(np.all(np.abs(asked - made[None]) < 1e-6, axis=(1, 2, 3, 4)))


@pytest.mark.parametrize(
    "attack", [pytest.param(GRID, marks=pytest.mark.full), DRAWN], ids=["grid", "random"]
)
def test_searches_need_no_gradient_and_find_the_worst(attack, key):
    traced = jrobust.run(attack, key, NET, X, Y, ids=IDS)
    box = Box(NET)
    found = jrobust.run(attack, key, drive.Host(box), X, Y, ids=IDS)
    np.testing.assert_array_equal(found.success, traced.success)
    np.testing.assert_array_equal(found.forwards, traced.forwards)
    np.testing.assert_allclose(found.x, traced.x, atol=1e-6)
    assert sum(map(len, box.asked)) == np.sum(found.forwards)
    # Measured; the misclassified input is returned as it is.
    np.testing.assert_array_equal(traced.success, np.asarray(NET(traced.x)).argmax(1) != Y)
    assert 1 / BATCH < traced.success.mean() < 1
    np.testing.assert_array_equal(traced.x[0], X[0])
    assert (traced.distance[0], traced.forwards[0]) == (0, 1)
    assert np.all(np.asarray(traced.distance) <= 1)
    np.testing.assert_array_equal(np.asarray(traced.step) + 1 == traced.forwards, traced.success)
    assert np.all(np.asarray(traced.forwards)[~np.asarray(traced.success)] == attack.queries)

    # The highest loss of all that a never-failing copy is asked about.
    whole = Spatial(SMALL, attack.method, attack.grid, attack.draws, keep="loss")
    most = jrobust.run(whole, key, NET, X, Y, ids=IDS)
    np.testing.assert_array_equal(most.forwards, attack.queries)
    every = Box(own(Y))
    jrobust.run(attack, key, drive.Host(every), X, Y, ids=IDS)
    heights = np.stack([losses.cross_entropy(NET(x), jnp.asarray(Y)) for x in every.asked])
    np.testing.assert_allclose(most.loss, heights.max(0), rtol=1e-4)
    want = np.stack(every.asked)[heights.argmax(0), np.arange(BATCH)]
    np.testing.assert_allclose(most.x, want, atol=1e-5)


def test_distances_are_those_of_the_transforms(key):
    found = jrobust.run(DRAWN, key, NET, X, Y, ids=IDS)
    rows = keys.examples(key, jnp.asarray(IDS))
    shares = [jnp.zeros((BATCH, 3))]
    for t in range(1, 7):
        draw = lambda k: jax.random.uniform(k, (3,), jnp.float32, -1.0, 1.0)  # noqa: E731
        shares.append(jax.vmap(draw)(keys.fold(rows, t)))
    made = np.stack([apply(SMALL, X, share) for share in shares])
    same = np.all(np.abs(made - np.asarray(found.x)) < 1e-6, axis=(2, 3, 4))
    at = same.argmax(0)
    assert same.any(0).all()
    assert len(set(at)) > 2
    want = np.abs(np.stack(shares)[at, np.arange(BATCH)]).max(1)
    np.testing.assert_allclose(found.distance, want, rtol=1e-5)


@pytest.mark.full
def test_the_gradient_from_random_transforms(key):
    found = jrobust.run(CLIMB, key, NET, X, Y, ids=IDS)
    np.testing.assert_array_equal(found.success, np.asarray(NET(found.x)).argmax(1) != Y)
    assert np.all(np.asarray(found.distance) <= 1)
    robust = ~np.asarray(found.success)
    assert np.all(np.asarray(found.forwards)[robust] == 6)
    assert np.all(np.asarray(found.backwards)[robust] == 5)
    other = jrobust.run(CLIMB, jax.random.key(1), NET, X, Y, ids=IDS)
    assert not np.array_equal(other.x, found.x)


def test_the_gradient_climbs(key):
    still = Spatial(SMALL, "gradient", steps=5, rel_step_size=0.1, random_start=False, keep="loss")
    climbed = jrobust.run(still, key, NET, X, Y)
    np.testing.assert_array_equal(climbed.success, np.asarray(NET(climbed.x)).argmax(1) != Y)
    np.testing.assert_array_equal(climbed.forwards, 6)
    np.testing.assert_array_equal(climbed.backwards, 5)
    before = np.asarray(losses.cross_entropy(NET(X), jnp.asarray(Y)))
    assert np.mean(np.asarray(climbed.loss) > before) > 0.8
    assert np.mean(np.asarray(climbed.distance) > 0.25) > 0.5, "steps add up"
    # A move is a tenth of each limit, by the sign of the slope.
    slope = jax.grad(lambda x: jnp.sum(losses.cross_entropy(NET(x), Y)))(jnp.asarray(X))

    @jax.jit
    def moved(x, y):
        state = still.init(keys.examples(key, jnp.arange(BATCH)), x, y)
        return still.move(state, jnp.zeros(BATCH), slope)[1].now

    downhill = jax.jit(RotationTranslation.slope)(SMALL, X, jnp.zeros((BATCH, 3)), slope)
    np.testing.assert_allclose(moved(X, jnp.asarray(Y)), 0.1 * np.sign(downhill), rtol=1e-6)


def test_order_radius_and_keys(key):
    """One program for all limits and keys; examples own their draws."""
    first = jrobust.run(DRAWN, key, NET, X, Y, ids=IDS)
    order, traces = RNG.permutation(BATCH), Net.traces
    shuffled = jrobust.run(DRAWN, key, NET, X[order], Y[order], ids=IDS[order])
    for name, left, right in zip(first._fields, shuffled, first):
        np.testing.assert_array_equal(left, np.asarray(right)[order], err_msg=name)
    other = jrobust.run(DRAWN, jax.random.key(5), NET, X, Y, ids=IDS)
    assert not np.array_equal(other.x, first.x)
    half = jrobust.run(with_eps(DRAWN, 0.5), key, NET, X, Y, ids=IDS)
    assert np.all(np.asarray(half.distance) <= 0.5)
    none = jrobust.run(with_eps(DRAWN, 0.0), key, NET, X, Y, ids=IDS)
    np.testing.assert_array_equal(none.x, X)
    assert none.success.sum() == 1
    assert Net.traces == traces


def test_nan_and_targets(key):
    broken = Net(NET.inner, NET.outer, np.float32(0.05))
    found = jrobust.run(DRAWN, key, broken, X, Y, ids=IDS)
    nan = np.asarray(found.x)[:, 0, 0, 0] < 0.05
    assert nan.sum() > (X[:, 0, 0, 0] < 0.05).sum()
    assert np.all(np.asarray(found.success)[nan])
    towards = (Y + 1) % CLASSES
    aimed = jrobust.run(DRAWN, key, broken, X, Y, ids=IDS, targets=towards)
    prediction = np.asarray(broken(aimed.x)).argmax(1)
    finite = np.asarray(aimed.x)[:, 0, 0, 0] >= 0.05
    np.testing.assert_array_equal(aimed.success, (prediction == towards) & finite)
    assert aimed.success.any()


@pytest.mark.parametrize("attack", [GRID, DRAWN, CLIMB], ids=lambda attack: attack.method)
def test_states_are_pytrees_of_rows_and_programs_lower(attack, key):
    leaves, structure = jax.tree.flatten(attack)
    assert jax.tree.unflatten(structure, leaves) == attack
    assert "eps" in str(describe(attack))
    state = jax.eval_shape(
        lambda key, x, y: attack.init(keys.examples(key, y), x, y), key, X, jnp.asarray(Y)
    )
    after = jax.eval_shape(lambda s: attack.step(NET, s), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        assert before.shape[:1] == (BATCH,)
        assert (before.shape, before.dtype) == (now.shape, now.dtype)
    exported = jax.export.export(
        jax.jit(lambda seed, x, y: attack(jax.random.key(seed), NET, x, y)),
        platforms=("cpu", "cuda", "tpu"),
    )(jnp.uint32(0), X, jnp.asarray(Y))
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.full
@pytest.mark.parametrize("attack", [GRID, DRAWN, CLIMB], ids=["grid", "random", "gradient"])
def test_devices_do_not_matter(attack, key):
    def call(x, y, ids):
        return attack(key, NET, x, y, ids=ids).success

    batch = jnp.asarray(X), jnp.asarray(Y), jnp.asarray(IDS)
    want = np.asarray(jrobust.run(attack, key, NET, *batch[:2], ids=batch[2]).success)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    put = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, rows))
    np.testing.assert_array_equal(jax.jit(call)(*map(put, batch)), want)
    mapped = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows))
    np.testing.assert_array_equal(mapped(*batch), want)


@pytest.mark.full
def test_an_evaluation_of_it(key):
    stages = {"grid": GRID, "gradient": CLIMB}
    with pytest.warns(jrobust.loops.ReliabilityWarning):  # of few steps, if of nothing else
        report = jrobust.loops.evaluate(
            key, NET, Dataset(X, Y.astype(np.int32)), stages, batch_size=8, progress=False
        )
    assert "unstable gradients" not in {doubt.kind for doubt in report.doubts}
    assert report.attacks == ("grid", "gradient")
    alone = jrobust.run(GRID, key, NET, X, Y, ids=np.arange(BATCH))
    assert report.robust_accuracy <= 1 - np.mean(alone.success) + 1e-6


def test_bad_settings(key):
    flat = X.reshape(BATCH, -1)
    for attack, x, kind, words in (
        (GRID, flat, ValueError, "images"),
        (Spatial(Linf(0.1)), X, TypeError, "RotationTranslation"),
        (Spatial(RotationTranslation(fill=-1.0)), X, ValueError, "fill"),
        (Spatial(RotationTranslation(rotation=200.0)), X, ValueError, "rotation"),
        (Spatial(RotationTranslation(translation=-0.1)), X, ValueError, "translation"),
        (Spatial(RotationTranslation(0.0, 0.0)), X, ValueError, "allows nothing"),
        (Spatial(method="best"), X, ValueError, "one of"),
        (Spatial(grid=(31, 5, 0)), X, ValueError, "positive ints"),
        (Spatial(keep="last"), X, ValueError, "keep"),
        (Spatial(rel_step_size=-1.0), X, ValueError, "positive"),
    ):
        with pytest.raises(kind, match=words):
            jrobust.run(attack, key, NET, x, Y)
    with pytest.raises(TypeError, match="Host"):
        jrobust.run(CLIMB, key, drive.Host(Box(NET)), X, Y)
    with pytest.raises(ValueError, match="images"):
        GRID(key, NET, flat, Y)
