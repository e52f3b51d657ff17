"""The synthetic task: its bits, its splits, and that it takes more than a linear model."""

import hashlib
import inspect

import jax
import numpy as np
import optax
import pytest

from jrobust import loops, models, training
from jrobust.data import Dataset, Splits, _synthetic, digits, synthetic


@pytest.fixture(scope="module")
def small():
    return synthetic(3000, 1000, validation=500)


def digest(data):
    pixels = np.rint(data.x * 255).astype("u1")
    return hashlib.sha256(pixels.tobytes() + data.y.astype("<i4").tobytes()).hexdigest()[:16]


def test_sizes_and_types(small):
    assert [len(d) for d in small] == [2500, 500, 1000]
    for d in small:
        assert d.x.shape[1:] == (32, 32, 3)
        assert d.x.dtype == np.float32
        assert d.y.dtype == d.id.dtype == np.int32
        assert d.x.min() >= 0
        assert d.x.max() <= 1
        np.testing.assert_array_equal(d.x * 255, np.rint(d.x * 255))
    np.testing.assert_array_equal(small.train.id, np.arange(2500))
    np.testing.assert_array_equal(small.validation.id, np.arange(2500, 3000))
    np.testing.assert_array_equal(small.test.id, 1_000_000 + np.arange(1000))


def test_the_default_is_of_the_shape_of_cifar():
    defaults = {
        name: value.default for name, value in inspect.signature(synthetic).parameters.items()
    }
    assert defaults == {"train": 50_000, "test": 10_000, "validation": 5_000, "seed": 0}


def test_the_bits_are_pinned(small):
    """Every published figure refers to these images."""
    assert digest(small.train[:1000]) == "6403ff3399b526ce"
    assert digest(small.validation) == "492291046e575a18"
    assert digest(small.test) == "c1fd92e0543d520f"


def test_fewer_examples_are_the_first_of_more(small):
    fewer = synthetic(1200, 30, validation=0)
    np.testing.assert_array_equal(fewer.train.x, small.train.x[:1200])
    np.testing.assert_array_equal(fewer.test.x, small.test.x[:30])
    np.testing.assert_array_equal(fewer.test.y, small.test.y[:30])
    assert len(fewer.validation) == 0


def test_another_seed_gives_other_images(small):
    other = synthetic(100, 0, validation=0, seed=1).train
    assert np.abs(other.x - small.train.x[:100]).mean() > 0.1
    assert np.mean(other.y == small.train.y[:100]) < 0.3


def test_classes_are_balanced(small):
    for part in (small.train.y[:1000], small.train.y[1000:2000], small.test.y):
        np.testing.assert_array_equal(np.bincount(part), 100)
    assert np.corrcoef(small.test.y[:-1], small.test.y[1:])[0, 1] < 0.1, "in no order"


@pytest.mark.parametrize("split", Splits._fields)
def test_each_split_shows_its_own_digits_alone(split, small, monkeypatch):
    real = digits()
    blank = {
        name: d if name == split else Dataset(np.zeros_like(d.x), d.y, d.id)
        for name, d in real._asdict().items()
    }
    monkeypatch.setattr(_synthetic, "digits", lambda: Splits(**blank))
    again = synthetic(3000, 1000, validation=500)
    for name in Splits._fields:
        same = np.array_equal(getattr(again, name).x, getattr(small, name).x)
        assert same == (name == split), name


def test_the_label_is_that_of_the_digit_shown(monkeypatch):
    plain = {
        "_CLUTTER": 0, "_GRAIN": 1, "_SWING": 0, "_CONTRAST": (60, 61), "_TURN": 0.0,
        "_REACH": 0.0, "_SIZE": (24.0, 24.001),
    }  # fmt: skip
    for name, value in plain.items():
        monkeypatch.setattr(_synthetic, name, value)
    data = synthetic(1000, 0, validation=0).train
    ink = np.abs(data.x - data.x[:, :1, :1]).max(-1)[:, 4:28, 4:28]
    small = ink.reshape(-1, 8, 3, 8, 3).mean((2, 4)).reshape(1000, 64)
    shown = digits().train
    known = shown.x.reshape(-1, 64)
    small, known = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (small, known))
    nearest = shown.y[np.argmax(small @ known.T, axis=1)]
    assert np.mean(nearest == data.y) > 0.85  # they are still sheared and stretched


def test_a_linear_model_does_not_do(small):
    """Ridge regression on pixels, the best of several strengths on the test images themselves."""
    x = small.train.x.reshape(len(small.train), -1).astype(float)
    mean = x.mean(0)
    test = small.test.x.reshape(len(small.test), -1) - mean
    kernel = (x - mean) @ (x - mean).T
    target = np.eye(10)[small.train.y] - 0.1
    best = 0.0
    for strength in (1.0, 10.0, 100.0, 1000.0):
        weights = (x - mean).T @ np.linalg.solve(kernel + strength * np.eye(len(x)), target)
        best = max(best, np.mean((test @ weights).argmax(1) == small.test.y))
    assert best < 0.35


@pytest.mark.full
def test_a_residual_network_does():
    s = synthetic(20_500, 2000, validation=500)
    report = loops.fit(
        jax.random.key(0),
        models.network(models.ResNet(mean=(0.5,) * 3, std=(0.19,) * 3)),
        training.Standard(),
        optax.adamw(optax.cosine_onecycle_schedule(1252, 3e-3, 0.2), weight_decay=0.02),
        s.train,
        epochs=4,
        batch_size=64,
        progress=False,
    )
    right = [
        np.asarray(report.model(s.test.x[i : i + 250])).argmax(1) == s.test.y[i : i + 250]
        for i in range(0, 2000, 250)
    ]
    assert 0.75 < np.mean(right) < 0.92


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"train": 10.5}, TypeError, "train must be an integer, got 10.5"),
        ({"test": -1}, ValueError, "test must not be negative, got -1"),
        ({"train": 100}, ValueError, "validation=5000, train=100"),
        ({"train": 2_000_000}, ValueError, "at most 1,000,000"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        synthetic(**arguments)
