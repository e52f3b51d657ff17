"""Losses against hand values, float64, and their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jrobust import losses

CLASSES = [2, 3, 4, 10]


def logits_of(classes, n=64, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(n, classes)) * scale), rng.integers(0, classes, n)


def test_by_hand():
    z = np.float32([[1.0, 3.0, -2.0, 0.5]])
    zero, one, three = np.array([0]), np.array([1]), np.array([3])
    np.testing.assert_allclose(losses.margin(z, zero), [2.0])
    np.testing.assert_allclose(losses.margin(z, one), [-2.0])
    # sorted: 3, 1, 0.5, -2
    np.testing.assert_allclose(losses.dlr(z, zero), [2 / 2.5], rtol=1e-6)
    np.testing.assert_allclose(losses.dlr(z, one), [-2 / 2.5], rtol=1e-6)
    np.testing.assert_allclose(
        losses.dlr_targeted(z, one, three), [-(3 - 0.5) / (3 - (0.5 - 2) / 2)], rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.dlr_targeted(z, three, one), [2.5 / (3 - (0.5 - 2) / 2)], rtol=1e-6
    )
    binary = np.float32([[0.5, -1.5]])
    np.testing.assert_allclose(losses.margin(binary, zero), [-2.0])
    np.testing.assert_allclose(losses.margin(binary, one), [2.0])
    np.testing.assert_allclose(losses.cross_entropy(binary, one), [np.log1p(np.exp(2))], rtol=1e-6)


@pytest.mark.parametrize("classes", CLASSES)
def test_cross_entropy_and_margin_against_float64(classes):
    z, y = logits_of(classes)
    each = np.arange(len(y))
    want = -scipy.special.log_softmax(np.float64(z), axis=1)[each, y]
    np.testing.assert_allclose(losses.cross_entropy(z, y), want, rtol=1e-5, atol=1e-6)
    others = np.where(np.arange(classes) == y[:, None], -np.inf, z).max(1)
    np.testing.assert_allclose(losses.margin(z, y), others - z[each, y], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1000.0, 7.0])
@pytest.mark.parametrize("classes", CLASSES)
def test_margin_is_positive_exactly_where_misclassified(classes, shift):
    z, y = logits_of(classes, 200)
    z = z + np.float32(shift)
    np.testing.assert_array_equal(np.asarray(losses.margin(z, y)) > 0, z.argmax(1) != y)


def test_soft_labels_are_the_mean_of_hard_ones():
    z, _ = logits_of(4)
    weights = np.float32(np.random.default_rng(1).dirichlet(np.ones(4), len(z)))
    hard = [losses.cross_entropy(z, np.full(len(z), c)) for c in range(4)]
    np.testing.assert_allclose(
        losses.cross_entropy(z, jnp.asarray(weights)),
        np.sum(weights * np.stack(hard, 1), 1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_ignores_shift_and_scale(classes):
    z, y = logits_of(classes)
    target = (y + 1) % classes
    forms = [lambda z: losses.dlr(z, y)]
    if classes > 3:
        forms.append(lambda z: losses.dlr_targeted(z, y, target))
    for form in forms:
        base = np.asarray(form(z))
        for a, b in [(1.0, 20.0), (8.0, 0.0), (0.25, -64.0)]:
            np.testing.assert_allclose(form(np.float32(a) * z + np.float32(b)), base, rtol=2e-3)
    np.testing.assert_allclose(np.sign(losses.dlr(z, y)), np.sign(losses.margin(z, y)))
    right = z.argmax(1) == y
    assert np.all(np.asarray(losses.dlr(z, y))[right] >= -1)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin, losses.dlr])
def test_gradients_are_finite_at_ties_and_far_out(loss):
    z = np.float32([[0] * 4, [1, 1, 1, 0], [5, 5, -5, -5], [1e4, -1e4, 0, 0], [-1e30, 1e30, 0, 1]])
    for label in range(4):
        y = np.full(len(z), label)
        assert np.all(np.isfinite(loss(z, y)))
        assert np.all(np.isfinite(jax.grad(lambda z, y=y: jnp.sum(loss(z, y)))(z)))


def test_targeted_dlr_is_finite_at_ties():
    z, y, target = np.zeros((3, 4), np.float32), np.arange(3), np.arange(3) + 1
    total = jax.grad(lambda z: jnp.sum(losses.dlr_targeted(z, y, target)))
    assert np.all(np.isfinite(total(z)))


@pytest.mark.parametrize("classes", CLASSES)
def test_divergences_against_float64(classes):
    z, _ = logits_of(classes)
    r, _ = logits_of(classes, seed=1)
    p, q = (scipy.special.softmax(np.float64(v), axis=1) for v in (r, z))
    want = np.sum(scipy.special.rel_entr(p, q), 1)
    np.testing.assert_allclose(losses.kl(z, r), want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        losses.squared_probability_distance(z, r), np.sum((p - q) ** 2, 1), rtol=1e-4, atol=1e-7
    )
    for same in (losses.kl, losses.squared_probability_distance):
        np.testing.assert_allclose(same(z, z + 5), np.zeros(len(z)), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    z, y = logits_of(5)
    z = jnp.asarray(z, dtype)
    for got in (
        losses.cross_entropy(z, y),
        losses.margin(z, y),
        losses.dlr(z, y),
        losses.dlr_targeted(z, y, (y + 1) % 5),
        losses.kl(z, z),
        losses.squared_probability_distance(z, z),
    ):
        assert got.shape == y.shape
        assert got.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: losses.dlr(z[:, :2], y), "dlr needs at least 3 classes, the model has 2"),
        (
            lambda z, y: losses.dlr_targeted(z[:, :3], y, 1 - y),
            "dlr_targeted needs at least 4 classes, the model has 3",
        ),
        (lambda z, y: losses.margin(z[:, :1], y), "margin needs at least 2 classes"),
    ],
)
def test_too_few_classes(call, message):
    z, _ = logits_of(4)
    with pytest.raises(ValueError, match=message):
        call(z, np.zeros(len(z), int))


def test_ascent_goes_away_from_the_label_or_towards_the_target():
    z, y = logits_of(5)
    target = np.where(np.arange(len(y)) % 2, (y + 1) % 5, -1)
    each, aim = np.arange(len(y)), (y + 1) % 5
    for loss in (losses.cross_entropy, losses.margin, losses.dlr):
        got = losses.ascent(loss, jnp.asarray(z), jnp.asarray(y), jnp.asarray(target))
        want = np.where(each % 2, -np.asarray(loss(z, aim)), loss(z, y))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    got = losses.ascent(losses.dlr_targeted, jnp.asarray(z), jnp.asarray(y), jnp.asarray(aim))
    np.testing.assert_allclose(got, losses.dlr_targeted(z, y, aim), rtol=1e-6)
    assert losses.is_targeted(losses.dlr_targeted)
    assert not losses.is_targeted(losses.dlr)
