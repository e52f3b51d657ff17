"""Augmentation: what each transform does to one example, its distribution, and independence."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jrobust import data, keys, losses, training
from jrobust.attacks import PGD
from jrobust.data import Augmented, CutMix, Cutout, Flip, Mixup, PadCrop, chain
from jrobust.models import Network
from jrobust.threat import Linf

H, W, N, CLASSES = 6, 8, 3000, 4
ALONE = {
    "PadCrop": PadCrop(2),
    "Flip": Flip(),
    "Cutout": Cutout(4),
}
MIXING = {"Mixup": Mixup(CLASSES, alpha=0.7), "CutMix": CutMix(CLASSES)}
CHAIN = chain(PadCrop(2), Flip(), Cutout(4), CutMix(CLASSES), Mixup(CLASSES))


def keys_of(ids, step=0, seed=0):
    return keys.fold(keys.examples(jax.random.key(seed), jnp.asarray(ids)), step)


@jax.jit
def apply(augmentation, ids, x, y, mask=None, step=0):
    return augmentation(keys_of(ids, step), x, y, mask)


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(n, H, W, 3)).astype(np.float32)
    return x, rng.integers(0, CLASSES, n).astype(np.int32)


def many(augmentation):
    """What becomes of one image under many keys: every pixel is told apart by its value."""
    image = np.arange(1, H * W * 3 + 1, dtype=np.float32).reshape(1, H, W, 3)
    x, y = apply(augmentation, np.arange(N), jnp.repeat(image, N, 0), jnp.zeros(N, jnp.int32))
    np.testing.assert_array_equal(y, 0)
    return image[0], np.asarray(x)


def uniform(counts):
    return scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_a_crop_is_a_uniform_window_of_the_padded_image(mode):
    image, crops = many(PadCrop(2, mode))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
    windows = [padded[i : i + H, j : j + W] for i, j in itertools.product(range(5), repeat=2)]
    found = (crops[:, None] == np.stack(windows)[None]).all((2, 3, 4))
    np.testing.assert_array_equal(found.sum(1), 1)
    assert uniform(found.sum(0))


def test_no_padding_is_no_crop():
    x, y = images(5)
    np.testing.assert_array_equal(apply(PadCrop(0), np.arange(5), x, y)[0], x)


def test_a_flip_exchanges_left_and_right():
    image, flipped = many(Flip(0.3))
    turned = (flipped == image[None, :, ::-1]).all((1, 2, 3))
    assert (turned | (flipped == image[None]).all((1, 2, 3))).all()
    assert scipy.stats.binomtest(int(turned.sum()), N, 0.3).pvalue > 1e-4
    np.testing.assert_array_equal(many(Flip(0.0))[1], np.repeat(image[None], N, 0))
    np.testing.assert_array_equal(many(Flip(1.0))[1], np.repeat(image[None, :, ::-1], N, 0))


@pytest.mark.parametrize("size", [3, 4])
def test_cutout_paints_a_square_about_a_uniform_pixel(size):
    image, cut = many(Cutout(size, (-1.0, -2.0, -3.0)))
    expected = np.repeat(image[None], H * W, 0)
    for i, j in itertools.product(range(H), range(W)):
        top, left = max(i - size // 2, 0), max(j - size // 2, 0)
        rows, columns = slice(top, i - size // 2 + size), slice(left, j - size // 2 + size)
        expected[i * W + j, rows, columns] = (-1, -2, -3)
    found = (cut[:, None] == expected[None]).all((2, 3, 4))
    np.testing.assert_array_equal(found.sum(1), 1)
    assert uniform(found.sum(0))


def test_partners_are_one_cycle_of_the_rows_that_count():
    mask = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
    partners = np.asarray(data._augment._partners(keys_of(np.arange(8)), mask))
    seen, row = [], 0
    for _ in range(6):
        row = partners[row]
        seen.append(row)
    assert sorted(seen) == [0, 1, 3, 4, 5, 7]
    np.testing.assert_array_equal(partners[~mask], [2, 6])
    alone = data._augment._partners(keys_of(np.arange(3)), np.array([False, True, False]))
    np.testing.assert_array_equal(alone, [0, 1, 2])


def test_every_other_row_is_as_likely_a_partner():
    draw = jax.jit(
        jax.vmap(lambda step: data._augment._partners(keys_of(np.arange(6), step), None))
    )
    counts = np.bincount(np.asarray(draw(jnp.arange(N)))[:, 2], minlength=6)
    assert counts[2] == 0
    assert uniform(counts[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_draws_each_share_from_beta(alpha):
    x = np.eye(N, dtype=np.float32)[:, :, None]  # no images: any shape will do
    y = np.arange(N, dtype=np.int32) % CLASSES
    mixed, labels = map(np.asarray, apply(Mixup(CLASSES, alpha), np.arange(N), x, y))
    own = np.diagonal(mixed[..., 0])
    assert scipy.stats.kstest(own, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    partner = np.where(np.eye(N, dtype=bool), 0, mixed[..., 0]).argmax(1)
    other = mixed[np.arange(N), partner, 0]
    both = np.abs(own - 0.5) < 0.49
    np.testing.assert_allclose((own + other)[both], 1, rtol=1e-6)
    hot = np.eye(CLASSES)
    expected = own[:, None] * hot[y] + (1 - own[:, None]) * hot[y[partner]]
    np.testing.assert_allclose(labels[both], expected[both], atol=1e-6)
    assert (np.bincount(partner[both], minlength=N) <= 1).all()


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels():
    n = 2000
    x = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 20, 10, 2))
    y = np.arange(n, dtype=np.int32) % CLASSES
    mixed, labels = map(np.asarray, apply(CutMix(CLASSES), np.arange(n), x, y))
    assert (mixed[..., 0] == mixed[..., 1]).all()
    mixed, hot, shares = mixed[..., 0], np.eye(CLASSES), []
    for i in range(n):
        pasted = mixed[i] != i
        area = pasted.mean()
        partner = int(mixed[i][pasted][0]) if pasted.any() else i
        assert (mixed[i][pasted] == partner).all()
        expected = (1 - area) * hot[y[i]] + area * hot[y[partner]]
        np.testing.assert_allclose(labels[i], expected, atol=1e-6)
        rows, columns = pasted.any(1), pasted.any(0)
        assert pasted.sum() == rows.sum() * columns.sum(), "a rectangle"
        if not (rows[0] or rows[-1] or columns[0] or columns[-1]) and pasted.any():
            assert columns.sum() == rows.sum() // 2, "the proportions of the image"
        shares.append(area)
    # Uniform middle and area: E[overlap of one side] by numpy, on the same grid.
    share = (np.arange(4000) + 0.5) / 4000
    expected = np.zeros_like(share)
    sides = []
    for length in (20, 10):
        cut = (length * np.sqrt(1 - share)).astype(int)
        middle = np.arange(length)[:, None]
        low, high = middle - cut // 2, middle - cut // 2 + cut
        sides.append((np.minimum(high, length) - np.maximum(low, 0)).mean(0) / length)
    expected = (sides[0] * sides[1]).mean()
    error = np.std(shares) / np.sqrt(n)
    assert abs(np.mean(shares) - expected) < 4 * error


@pytest.mark.parametrize("name", MIXING)
def test_mixing_takes_soft_labels_and_a_probability(name):
    x, y = images(N)
    mixing = MIXING[name]
    hard = apply(mixing, np.arange(N), x, y)
    soft = apply(mixing, np.arange(N), x, np.eye(CLASSES, dtype=np.float32)[y])
    np.testing.assert_allclose(hard[1], soft[1], atol=1e-6)
    np.testing.assert_array_equal(hard[0], soft[0])
    np.testing.assert_allclose(np.sum(hard[1], 1), 1, atol=1e-6)
    rarely = type(mixing)(CLASSES, 1.0, 0.25)
    moved = (np.asarray(apply(rarely, np.arange(N), x, y)[0]) != x).any((1, 2, 3))
    # Some rectangles are empty: CutMix may leave a little more alone.
    assert 0.25 - 0.06 < moved.mean() < 0.25 + 4 * np.sqrt(0.25 * 0.75 / N)


def test_order_and_filling_do_not_matter():
    x, y = images(8)
    ids, mask = np.arange(8) + 40, np.ones(8, bool)
    x1, y1 = apply(CHAIN, ids, x, y, mask)
    order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
    x2, y2 = apply(CHAIN, ids[order], x[order], y[order], mask)
    np.testing.assert_array_equal(x1[order], x2)
    np.testing.assert_array_equal(y1[order], y2)
    filled = np.r_[np.arange(8), [0, 1, 2, 3]]  # as loops pad the last batch: with real examples
    padding = np.where(np.arange(12)[:, None, None, None] < 8, x[filled], 9.0)
    x3, y3 = apply(CHAIN, np.r_[ids, [1, 2, 3, 4]], padding, y[filled], np.arange(12) < 8)
    np.testing.assert_array_equal(x1, x3[:8])
    np.testing.assert_array_equal(y1, y3[:8])
    again, _ = apply(CHAIN, ids, x, y, mask, step=1)
    assert not np.array_equal(x1, again), "another step, another draw"
    assert x1.dtype == np.float32
    assert x1.shape == x.shape


@pytest.mark.parametrize("name", ALONE)
def test_an_example_is_augmented_alone(name):
    x, y = images(8)
    whole, _ = apply(ALONE[name], np.arange(8), x, y)
    part, _ = apply(ALONE[name], np.array([6, 3]), x[[6, 3]], y[[6, 3]])
    np.testing.assert_array_equal(whole[np.array([6, 3])], part)


def test_members_of_a_chain_draw_apart():
    x = np.zeros((200, 20, 20, 1), np.float32)
    cut, _ = apply(chain(Cutout(4, 1.0), Cutout(4, 1.0)), np.arange(200), x, np.zeros(200, int))
    one, _ = apply(Cutout(4, 1.0), np.arange(200), x, np.zeros(200, int))
    assert np.mean(np.sum(cut, (1, 2, 3)) > np.sum(one, (1, 2, 3))) > 0.5


# The objective

NET = Network(
    lambda key, x: ({"w": jax.random.normal(key, (x[0].size, CLASSES)) / 10}, {}),
    lambda params, extra, x: x.reshape(x.shape[0], -1) @ params["w"],
    lambda params, extra, key, x: (x.reshape(x.shape[0], -1) @ params["w"], extra),
    lambda params, extra, x: {},
)
INNER = PGD(Linf(0.05), steps=2, keep="last")


def batch_of(n=8):
    x, y = images(n)
    return training.batch(x, y, np.arange(n) + 3, np.arange(n) < n - 2)


@pytest.mark.parametrize("objective", [training.Standard(), training.TRADES(INNER)])
def test_an_augmented_objective_is_the_objective_of_the_augmented_batch(objective, key):
    batch, augmentation = batch_of(), chain(Flip(), Mixup(CLASSES))
    params, extra = NET.init(key, batch.x)
    seen = []

    def spy(keys, x, y, mask=None):
        seen.append(augmentation(keys, x, y, mask))
        return seen[-1]

    value, (_, metrics) = Augmented(objective, spy)(key, NET, params, extra, batch)
    ((x, y),) = seen
    expected = objective(key, NET, params, extra, batch._replace(x=x, y=y))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert metrics.keys() == expected[1][1].keys()
    assert not np.allclose(value, objective(key, NET, params, extra, batch)[0])
    # Filler rows are neither mixed in nor count.
    other = batch._replace(x=batch.x.at[-1].set(7.0))
    again, _ = Augmented(objective, augmentation)(key, NET, params, extra, other)
    np.testing.assert_allclose(value, again, rtol=1e-5)


def test_every_step_augments_anew_and_compiles_once(key):
    traces = []

    def loss(logits, y):
        traces.append(1)
        return losses.cross_entropy(logits, y)

    batch = batch_of()
    objective = Augmented(training.Standard(loss), chain(PadCrop(2), Flip(), CutMix(CLASSES)))
    init, update = training.step(objective, optax.sgd(0.0))
    update = jax.jit(update)
    state = init(key, NET, batch.x)
    state, first = update(state, batch)
    state, second = update(state, batch)
    assert len(traces) == 1
    assert first["loss"] != second["loss"], "the parameters stand still, the data does not"
    order = np.array([3, 1, 0, 2, 5, 4, 7, 6])
    state = init(key, NET, batch.x)
    _, shuffled = update(state, jax.tree.map(lambda leaf: leaf[order], batch))
    np.testing.assert_allclose(first["loss"], shuffled["loss"], rtol=1e-5)


def test_numbers_do_not_recompile_and_all_lower():
    x, y = images(4)
    traces = []

    @jax.jit
    def run(augmentation, ids, x, y):
        traces.append(1)
        return augmentation(keys_of(ids), x, y)

    def make(number):
        numbers = jnp.float32(number)
        return chain(
            PadCrop(1), Flip(numbers), Cutout(2, numbers), Mixup(CLASSES, numbers), CutMix(CLASSES)
        )

    one, _ = run(make(0.2), jnp.arange(4), x, y)
    two, _ = run(make(0.9), jnp.arange(4), x, y)
    assert len(traces) == 1
    assert not np.array_equal(one, two)
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(
        make(0.5), jnp.arange(4), x, y
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("augmentation", "text"),
    [
        (PadCrop(-1), "padding >= 0"),
        (PadCrop(2, "wrap"), "constant, reflect and edge"),
        (Flip(1.5), "Flip.probability must be a number from 0 to 1, got 1.5"),
        (Cutout(0), "Cutout.size must be >= 1"),
        (Cutout(4, (0.1, 0.2)), "one for each of 3 channels"),
        (Mixup(7), r"Mixup\(classes=4\)"),
        (CutMix(CLASSES, alpha=0.0), "CutMix.alpha must be a positive number"),
        (chain(Flip(), Mixup(CLASSES, probability=-1.0)), "Mixup.probability"),
    ],
)
def test_bad_settings(augmentation, text):
    x, y = images(2)
    with pytest.raises(ValueError, match=text):
        Augmented(training.Standard(), augmentation).check(x, y, CLASSES)


def test_bad_input():
    x, y = images(2)
    with pytest.raises(ValueError, match=r"takes images \(B, H, W, channels\)"):
        Flip()(keys_of([0, 1]), x[0], y)
    with pytest.raises(ValueError, match="for 4 classes, got soft labels of shape"):
        Mixup(CLASSES)(keys_of([0, 1]), x, np.ones((2, 3), np.float32))
    bytes_ = (255 * x).astype(jnp.uint8)  # to which shares and colours would be rounded
    for augmentation in (Mixup(CLASSES), Cutout(2)):
        with pytest.raises(TypeError, match="floating-point inputs, got uint8"):
            augmentation(keys_of([0, 1]), bytes_, y)
    with pytest.raises(TypeError, match="such as Flip"):
        chain(Flip)
    with pytest.raises(TypeError, match="instances such as Flip"):
        Augmented(training.Standard(), Flip).check(x, y, CLASSES)
