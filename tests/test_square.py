"""Square: its schedule, windows and bumps by the definition, its queries by a black box's count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import drive, keys, losses
from jrobust.attacks import restarts
from jrobust.attacks._square import Square, _another, _bump, _inside, _start, _window, side
from jrobust.threat import L0, L1, L2, Linf

KINDS = [Linf, L2, L1]
ORDER = {Linf: np.inf, L2: 2, L1: 1}
NORMS = {
    Linf: lambda move: np.abs(move).max((1, 2, 3)),
    L2: lambda move: np.sqrt((move**2).sum((1, 2, 3))),
    L1: lambda move: np.abs(move).sum((1, 2, 3)),
}
RNG = np.random.default_rng(0)
BATCH, SHAPE = 16, (6, 9, 2)  # images that are not square
IMAGES = np.float32(RNG.uniform(0, 1, (BATCH, *SHAPE)))
WEIGHTS = np.float32(RNG.normal(size=(np.prod(SHAPE), 3)))
EPS = {Linf: 0.1, L2: 0.6, L1: 5.0}
IDS = np.arange(BATCH)


def model(x):
    return x.reshape(x.shape[0], -1) @ (WEIGHTS - WEIGHTS.mean(0))


LABELS = np.asarray(model(IMAGES)).argmax(1)


# ------------------------------------------------------------------ the pieces


def published_side(p, i, height, width, linf):
    """The side of the window at query ``i`` after the first, from the published list."""
    halvings = sum(i > last for last in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    length = round((p / 2**halvings * height * width) ** 0.5)
    if linf:
        return min(max(length, 1), height, width)
    length = max(length, 3)
    return min(length + (length % 2 == 0), height, width)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (6, 9), (224, 224), (1, 4)])
def test_the_schedule_is_the_published_one(size):
    queries = np.arange(9000)
    for p in (0.8, 0.3):
        for order in (np.inf, 2):
            got = side(np.float32(p), jnp.asarray(queries), size, order)
            want = [published_side(p, i, *size, order == np.inf) for i in queries]
            np.testing.assert_array_equal(got, want)
    # At CIFAR-10's size, as a list.
    if size == (32, 32):
        at = [0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
        got = side(np.float32(0.8), jnp.asarray(at), size, np.inf)
        assert got.tolist() == [29, 29, 20, 14, 10, 7, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("compat", [False, True])
def test_windows_reach_the_last_row_and_no_further(compat):
    u = jnp.linspace(0, 1, 1001)[:-1]
    for size, length in ((9, 4), (9, 9), (9, 8), (5, 1)):
        place = np.asarray(_window(u, jnp.full(1000, length), size, compat=compat))
        inside = (place >= 0) & (place < length)
        np.testing.assert_array_equal(inside.sum(1), length)
        starts, counts = np.unique(inside.argmax(1), return_counts=True)
        most = size - length - (1 if compat and size > length else 0)
        assert starts.tolist() == list(range(most + 1))
        assert counts.max() - counts.min() <= 1, "as often everywhere"


def rectangle(down, across, power):
    """Rings of growing squares around the centre, each adding ``1 / k^power``."""
    values = np.zeros((down, across))
    row, column = down // 2, across // 2
    for k in range(max(row, column) + 1):
        values[max(row - k, 0) : row + k + 1, max(column - k, 0) : column + k + 1] += (
            1 / (k + 1) ** power
        )
    return values


def bump(length, order):
    """The bump (length, length) in float64."""
    size = np.linalg.norm if order == 2 else lambda v: np.abs(v).sum()
    parts = []
    for down, sign in ((length // 2, 1), (length - length // 2, -1)):
        if down:
            half = rectangle(down, length, 2 if order == 2 else 4)
            parts.append(sign * half / size(half))
    whole = np.concatenate(parts)
    return whole / size(whole)


@pytest.mark.parametrize("order", [1, 2])
def test_bumps_are_the_published_ones(order):
    lengths = np.array([1, 2, 3, 5, 6, 9, 25] * 2)
    turned = np.arange(14) >= 7
    rows = jnp.asarray(np.arange(27)[None] - np.ones((14, 1), int))
    columns = jnp.asarray(np.arange(30)[None] - np.full((14, 1), 3))
    got = np.asarray(jax.jit(_bump, static_argnums=4)(rows, columns, lengths, turned, order))
    for i, length in enumerate(lengths):
        want = np.zeros((27, 30))
        one = bump(length, order)
        want[1 : 1 + length, 3 : 3 + length] = one.T if turned[i] else one
        np.testing.assert_allclose(got[i], want, atol=1e-6)


def drawn(key, count):
    """The uniform numbers (B, count) of the keys (B,)."""
    return np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (count,)))(key))


@pytest.mark.parametrize("order", [1, 2])
def test_a_proposal_moves_the_mass_of_two_windows(order, key):
    """One proposal of each lane in float64, from the draws of its key, before the projection."""
    kind, channels = {1: L1, 2: L2}[order], 2
    eps, t = 2.0, np.where(IDS % 2, 10, 60)  # two sizes of windows in one batch
    x0 = np.full((BATCH, *SHAPE), 50, np.float32)
    best = x0 + np.float32(RNG.normal(size=x0.shape) * 0.05)
    best = np.asarray(kind(0.9 * eps, 0.0, 100.0).project(best, x0))
    lanes = keys.examples(key, jnp.asarray(IDS))
    threat = kind(eps, 0.0, 100.0)  # a box that is far away
    got = _another(Square(threat), lanes, jnp.asarray(t), best, x0, threat.batched(x0))
    u = drawn(keys.fold(lanes, t + 1), channels + 5)
    size = np.linalg.norm if order == 2 else lambda v: np.abs(v).sum()
    for i in range(BATCH):
        length = published_side(0.8, t[i], *SHAPE[:2], linf=False)
        move = np.float64(best[i]) - x0[i]
        spots = [
            (int(u[i, 2 + j] * (6 - length + 1)), int(u[i, 3 + j] * (9 - length + 1)))
            for j in (0, 2)
        ]
        first, second = ((slice(r, r + length), slice(c, c + length)) for r, c in spots)
        union = np.zeros(SHAPE[:2], bool)
        union[first] = union[second] = True
        spare = max(eps**order - size(move) ** order, 0) / channels
        after = move.copy()
        after[second] = 0
        for c in range(channels):
            one = bump(length, order)
            one = (one.T if u[i, 6] < 0.5 else one) * (-1 if u[i, c] < 0.5 else 1)
            old = move[first][..., c]
            new = one + old / (1e-12 + size(old))
            mass = (spare + size(move[union][:, c]) ** order) ** (1 / order)
            after[(*first, c)] = new / size(new) * mass * (1 if order == 2 else channels)
        if order == 2:
            after *= eps / size(after)
        else:
            after = np.asarray(threat.project(np.float32(x0[i] + after)[None], x0[i][None]))[0]
            after = np.float64(after) - x0[i]
        np.testing.assert_allclose(got[i] - x0[i], after, atol=2e-5)
    # In Linf, one sign for each channel in the window, the rest as it was.
    eps = 0.3
    best = np.asarray(Linf(eps, 0.0, 100.0).project(best, x0))
    threat = Linf(eps, 0.0, 100.0)
    got = np.asarray(_another(Square(threat), lanes, jnp.asarray(t), best, x0, threat.batched(x0)))
    u = drawn(keys.fold(lanes, t + 1), channels + 2)
    for i in range(BATCH):
        length = published_side(0.8, t[i], *SHAPE[:2], linf=True)
        r, c = int(u[i, 2] * (6 - length + 1)), int(u[i, 3] * (9 - length + 1))
        want = best[i].copy()
        want[r : r + length, c : c + length] = x0[i, 0, 0] + eps * np.where(u[i, :2] < 0.5, -1, 1)
        np.testing.assert_allclose(got[i], want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_point_is_stripes_or_tiles(kind, key):
    x0 = np.full((4, 12, 17, 2), 50, np.float32)
    threat = kind(3.0, 0.0, 100.0)
    start = np.asarray(_start(keys.examples(key, jnp.arange(4)), x0, threat.batched(x0)))
    move = np.float64(start) - x0
    if kind is Linf:
        np.testing.assert_array_equal(np.abs(move), 3)
        np.testing.assert_array_equal(move, np.broadcast_to(move[:, :1], move.shape))
        assert 0.2 < np.mean(move > 0) < 0.8
    else:
        assert np.all(np.abs(NORMS[kind](move) - 3) < 2e-3)
        # Tiles of side 2 with half positive and half negative: 6 x 8 of them and a margin.
        assert not move[:, :, 16:].any()
        tiles = move[:, :, :16].reshape(4, 6, 2, 8, 2, 2)
        np.testing.assert_allclose(tiles.sum((2, 4)), 0, atol=1e-4)
        assert np.all(np.abs(tiles).sum((2, 4)) > 0.01)
        upright = np.abs(tiles.sum(4))[:, :, 0] > np.abs(tiles.sum(2))[:, :, :, 0]
        assert 0.2 < np.mean(upright) < 0.8
    assert len(np.unique(np.sign(move).reshape(4, -1), axis=0)) == 4, "each lane its own"


# ------------------------------------------------------------------ the attack


class Counter:
    """A black box that counts the rows it is asked about."""

    def __init__(self):
        self.rows = 0

    def __call__(self, x):
        self.rows += len(x)
        return np.asarray(model(x))


@pytest.mark.parametrize("compat", [False, True])
def test_queries_are_counted_and_never_exceeded(compat, key):
    attack = Square(Linf(0.05), queries=12, compat=compat)
    result = jrobust.run(attack, key, model, IMAGES, LABELS, ids=IDS)
    found = np.asarray(result.success)
    assert 0 < found.sum() < BATCH
    np.testing.assert_array_equal(result.forwards[~found], 12 + compat)
    np.testing.assert_array_equal(result.forwards[found], result.step[found] + 1)
    np.testing.assert_array_equal(result.backwards, 0)
    if compat:
        return
    box = Counter()
    asked = jrobust.run(attack, key, drive.Host(box), IMAGES, LABELS, ids=IDS)
    assert box.rows == np.sum(asked.forwards)
    np.testing.assert_array_equal(asked.success, result.success)
    np.testing.assert_array_equal(asked.forwards, result.forwards)
    np.testing.assert_array_equal(asked.x, result.x)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_models_fall_feasibly_within_few_queries(kind, key):
    """At 3 times (L2: 5) the distance of the nearest boundary, and in a box of its own."""
    lo, hi = -1.0, 3.0
    x = IMAGES * 4 - 1
    towards = (WEIGHTS[:, :, None] - WEIGHTS[:, None, :]).transpose(1, 2, 0)
    z = np.asarray(model(x))
    y = z.argmax(1)
    dual = {Linf: 1, L2: 2, L1: np.inf}[kind]
    size = np.linalg.norm(towards, dual, axis=-1)[:, y].T + 1e-9
    nearest = np.sort((z[np.arange(BATCH), y][:, None] - z) / size, 1)[:, 1]
    eps = np.float32(
        np.minimum(
            {Linf: 3, L2: 5, L1: 3}[kind] * nearest, 0.9 * kind(0.0, lo, hi).widest(4.0, SHAPE)
        )
    )
    attack = Square(kind(eps, lo, hi), queries=400)
    result = jrobust.run(attack, key, model, x, y, ids=IDS)
    assert np.mean(result.success) >= 0.9
    move = np.float64(result.x) - x
    assert np.all(NORMS[kind](move) <= eps * (1 + (0 if kind is Linf else 1e-6)))
    assert np.all((np.asarray(result.x) >= lo) & (np.asarray(result.x) <= hi))
    np.testing.assert_array_equal(result.success, np.asarray(model(result.x)).argmax(1) != y)
    # Below the distance nothing falls, however many queries.
    held = jrobust.run(
        Square(kind(np.float32(0.99 * nearest), lo, hi), queries=400), key, model, x, y
    )
    assert not np.any(held.success)
    # Bit-equal in another order, and beside other examples.
    order = np.random.default_rng(0).permutation(BATCH)
    mixed = Square(kind(eps[order], lo, hi), queries=400)
    mixed = jrobust.run(mixed, key, model, x[order], y[order], ids=IDS[order])
    half = np.where(IDS[:, None, None, None] < 8, x, x[::-1])
    beside = jrobust.run(attack, key, model, half, np.where(IDS < 8, y, y[::-1]), ids=IDS)
    for name, leaf in result._asdict().items():
        np.testing.assert_array_equal(getattr(mixed, name), leaf[order], err_msg=name)
        np.testing.assert_array_equal(getattr(beside, name)[:8], leaf[:8], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_never_worsens_and_windows_differ(kind, key):
    threat = kind(EPS[kind])
    attack = Square(threat, queries=30)
    step = jax.jit(functools.partial(attack.step, model))
    state = attack.init(keys.examples(key, jnp.asarray(IDS)), jnp.asarray(IMAGES), LABELS)
    seen, before = [], np.full(BATCH, -np.inf)
    for _ in range(25):
        point = np.asarray(state.x)
        assert np.all(NORMS[kind](np.float64(point) - IMAGES) <= EPS[kind] * (1 + 1e-6))
        loss = np.asarray(losses.margin(model(point), LABELS))
        live = ~np.asarray(state.record.done)
        state = step(state)
        now = np.asarray(state.record.loss)
        np.testing.assert_allclose(
            now, np.where(live, np.maximum(before, loss), before), rtol=1e-4, atol=1e-4
        )
        going = ~np.asarray(state.record.done)
        np.testing.assert_allclose(state.inner.loss[going], now[going])
        np.testing.assert_array_equal(state.inner.best[going], state.record.best[going])
        before = now
        changed = (np.asarray(state.x) != np.asarray(state.inner.best)).any(-1)
        seen.append(len(np.unique(changed[going].reshape(going.sum(), -1), axis=0)))
    assert max(seen) > 3, "each example has a window of its own"


def test_targets_and_two_classes(key):
    targets = (LABELS + 1) % 3
    attack = Square(Linf(0.5), queries=200, loss=losses.cross_entropy)
    result = jrobust.run(attack, key, model, IMAGES, LABELS, ids=IDS, targets=targets)
    reached = np.asarray(model(result.x)).argmax(1) == targets
    np.testing.assert_array_equal(result.success, reached)
    assert np.mean(reached) > 0.8
    # Images without channel axis, and two classes.
    flat = IMAGES[..., 0]

    def two(x):
        z = x.reshape(x.shape[0], -1) @ (WEIGHTS[::2, :1] - 0.1)
        return jnp.concatenate([z, -z], 1) / 2

    y = np.asarray(two(flat)).argmax(1)
    result = jrobust.run(Square(Linf(0.3), queries=100), key, two, flat, y)
    np.testing.assert_array_equal(result.success, np.asarray(two(result.x)).argmax(1) != y)
    assert np.mean(result.success) > 0.7
    assert result.x.shape == flat.shape


def test_an_aim_is_headed_for_and_any_class_counts(key):
    attack = Square(Linf(0.2), queries=40)
    aim = jnp.asarray((LABELS + 1) % 3)

    @jax.jit
    def run(aim):
        state = attack.init(keys.examples(key, jnp.asarray(IDS)), jnp.asarray(IMAGES), LABELS)
        state = state._replace(record=state.record._replace(aim=aim))
        return drive.run(attack, model, state).record

    record = run(aim)
    logits = np.asarray(model(record.best))
    np.testing.assert_array_equal(record.success, logits.argmax(1) != LABELS)
    want = -np.asarray(losses.margin(logits, aim))
    np.testing.assert_allclose(record.loss, want, rtol=1e-4, atol=1e-4)
    reached = np.mean(logits.argmax(1) == aim)
    assert reached > np.mean(np.asarray(model(run(-1 + 0 * aim).best)).argmax(1) == aim)


def test_restarts_begin_anew(key):
    small = Square(Linf(0.05), queries=12)
    once = jrobust.run(small, key, model, IMAGES, LABELS, ids=IDS)
    often = jrobust.run(restarts(small, 6), key, model, IMAGES, LABELS, ids=IDS)
    assert np.all(np.asarray(often.success) >= np.asarray(once.success))
    assert np.sum(often.success) > np.sum(once.success)
    np.testing.assert_array_equal(often.forwards[~often.success], 6 * 12)


def test_logits_that_are_not_finite(key):
    def breaks(x):
        return jnp.where(jnp.any(x != IMAGES, axis=(1, 2, 3))[:, None], jnp.nan, model(x))

    attack = Square(Linf(0.1), queries=12)
    away = jrobust.run(attack, key, breaks, IMAGES, LABELS)
    assert np.all(away.success)
    np.testing.assert_array_equal(away.forwards, 1)
    towards = jrobust.run(attack, key, breaks, IMAGES, LABELS, targets=(LABELS + 1) % 3)
    assert not np.any(towards.success)
    assert np.all(np.isfinite(towards.x))


@pytest.mark.parametrize(
    ("attack", "x", "error", "message"),
    [
        (Square(Linf(0.1), queries=0), IMAGES, ValueError, "queries must be a positive int"),
        (Square(Linf(0.1), p=1.5), IMAGES, ValueError, r"p must lie in \(0, 1\]"),
        (Square(L0(1.0)), IMAGES, TypeError, "Square is defined in Linf, L2, L1"),
        (Square(0.1), IMAGES, TypeError, "must be a threat model"),
    ],
)
def test_what_makes_no_sense_is_refused(attack, x, error, message, key):
    with pytest.raises(error, match=message):
        jrobust.run(attack, key, model, x, LABELS)


@pytest.mark.parametrize("kind", [Linf, L1])
def test_the_box_is_only_a_unit_and_more_axes_are_images_above_one_another(kind, key):
    """In L1 too, at a radius that leaves the first tiles as they are."""
    x = np.float32(np.random.default_rng(0).uniform(0.2, 0.8, (4, 6, 5, 2)))
    weights = np.float32(np.random.default_rng(1).normal(size=(60, 3)))
    y = np.zeros(4, np.int32)
    eps = np.float32({Linf: 0.3, L1: 50.0}[kind])

    def run(scale, shape):
        attack = Square(kind(scale * eps, hi=scale), queries=12)

        def scores(x):
            return (x.reshape(4, 60) / scale) @ weights + 100 * jnp.eye(3)[:1]

        return jrobust.run(attack, key, scores, (scale * x).reshape(4, *shape), y)

    unit, wide = run(np.float32(1), (6, 5, 2)), run(np.float32(4), (2, 3, 5, 2))
    assert np.any(unit.x != x)
    np.testing.assert_allclose(wide.x.reshape(x.shape) / 4, unit.x, atol=1e-6)


@pytest.mark.parametrize("order", [2, 1])
def test_the_bump_of_a_vector_is_the_middle_of_its_own(order):
    """Two halves side by side, each falling from its centre."""
    for length in (3, 4, 5, 9):
        place = jnp.arange(length)[None]
        middle, whole = jnp.asarray([[length // 2]]), jnp.asarray([length])
        got = np.asarray(_bump(middle, place, whole, jnp.asarray([True]), order))[0, 0]
        image = bump(length, order).T[length // 2]
        for half in (slice(length // 2), slice(length // 2, None)):
            a, b = abs(got[half]), abs(image[half])
            np.testing.assert_allclose(a / a.max(), b / b.max(), atol=1e-5)
        assert got[0] > 0 > got[-1]
        size = np.abs(got).sum() if order == 1 else np.linalg.norm(got)
        np.testing.assert_allclose(size, 1, rtol=1e-5)


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_vectors_are_searched_by_stretches(kind, key):
    """A linear model of 40 features falls at a small multiple of the minimal distance."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=40).astype(np.float32)
    x = rng.uniform(0.3, 0.7, (8, 40)).astype(np.float32)
    margins = x @ w - np.float32(0.5) * w.sum()
    dual = {Linf: np.abs(w).sum(), L2: np.linalg.norm(w), L1: np.abs(w).max()}[kind]

    def half(x):
        return jnp.stack([(x - 0.5) @ w, jnp.zeros(len(x))], -1)

    y = np.where(margins > 0, 0, 1)
    eps = np.float32(np.abs(margins) / dual) * {Linf: 1.5, L2: 2.5, L1: 6.0}[kind]
    found = jrobust.run(Square(kind(eps), queries=600), key, half, x, y)
    assert np.mean(found.success) > 0.7
    assert np.all(np.asarray(found.forwards) <= 600)
    move = np.abs(np.float64(found.x) - x)
    size = {Linf: move.max(1), L2: np.linalg.norm(move, axis=1), L1: move.sum(1)}[kind]
    assert np.all(size <= eps * (1 + 1e-6))
    # As many features as the share says move at a time, side by side.
    length = int(side(np.float32(0.8), jnp.asarray([0]), (40,), np.inf)[0])
    assert length == 32


def test_the_whole_image_is_a_window_too():
    rows = jnp.arange(4)[None]
    assert np.all(_inside(rows, rows, jnp.asarray([4])))
