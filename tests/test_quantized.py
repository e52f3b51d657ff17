"""Attacks whose points are judged and returned on the grid of 8-bit images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import drive
from jrobust.attacks import (
    APGD,
    FAB,
    FMN,
    MSD,
    PGD,
    AutoAttack,
    Spatial,
    Square,
    eot,
    multi_targeted,
    quantized,
    restarts,
    sequence,
    union,
)
from jrobust.attacks._base import open_record
from jrobust.attacks._quantized import rounded_inside
from jrobust.data import Dataset
from jrobust.loops import evaluate
from jrobust.models import randomized
from jrobust.threat import L0, L1, L2, Linf

GREY = np.arange(256, dtype=np.float32) / np.float32(255)


def images(rng, *shape):
    return jnp.asarray(GREY[rng.integers(0, 256, shape)])


def on_grid(x):
    return np.isin(np.asarray(x), GREY)


def record(threat, x):
    keys = jax.random.split(jax.random.key(0), len(x))
    return open_record(threat, keys, x, jnp.zeros(len(x), int), None)


@pytest.mark.parametrize(
    "threat",
    [
        Linf(8 / 255),
        Linf(7.65 / 255),
        Linf(0.4 / 255),
        L2(0.3),
        L2(0.05),
        L1(1.0),
        L0(9, pixels=False),
    ],
    ids=str,
)
def test_a_point_of_the_ball_is_rounded_to_one_of_the_ball(threat):
    rng = np.random.default_rng(0)
    x0 = images(rng, 64, 5, 7)
    keys = jax.random.split(jax.random.key(1), 64)
    x = threat.batched(x0).sample(keys, x0)
    found = np.asarray(rounded_inside(record(threat, x0), x, 256))
    assert on_grid(found).all()
    distance = np.asarray(threat.batched(x0).distance(found, x0))
    assert (distance <= threat.eps * (1 + 2e-5)).all()
    # In float64: no threshold from 1/2 on that is lower by more than what was promised fits.
    before = np.round(np.asarray(x0, np.float64) * 255)
    change = np.asarray(x, np.float64) * 255 - before
    order = {"Linf": np.inf, "L2": 2, "L1": 1, "L0": 0}[threat.norm]
    eps = threat.eps if threat.norm == "L0" else threat.eps * 255 * (1 + 1e-5)

    def at(threshold):
        moved = np.floor(np.abs(change) + 1 - threshold).reshape(64, -1)
        return np.linalg.norm(moved, order, 1) <= eps

    moved = np.round(np.abs(found * 255.0 - before)).reshape(64, -1)
    for row, (nearest, further) in enumerate(zip(at(0.5), np.abs(change).reshape(64, -1))):
        if nearest:
            np.testing.assert_array_equal(moved[row], np.floor(further + 0.5))
            continue
        thresholds = np.arange(64, 129) / 128
        best = min(t for t in thresholds if at(t)[row])
        np.testing.assert_array_equal(moved[row], np.floor(further + 1 - best))


def test_a_radius_of_whole_levels_is_used_to_the_rim():
    """8 / 255 as the distance of two levels is often more than float32(8 / 255), by rounding."""
    x0 = jnp.asarray(GREY[None, :248])
    x = x0 + jnp.float32(8 / 255)
    found = rounded_inside(record(Linf(8 / 255), x0), x, 256)
    np.testing.assert_array_equal(found[0], GREY[8:])
    weights = jnp.stack([jnp.zeros(248), jnp.ones(248)], 1)
    bias = jnp.asarray([[0.0, -float(jnp.sum(x0)) - 0.99 * 248 * 8 / 255]])
    for attack in (FMN(Linf(8 / 255), steps=30, quantize=256), quantized(PGD(Linf(8 / 255)))):
        result = jrobust.run(
            attack, jax.random.key(0), lambda x: x @ weights + bias, x0, jnp.zeros(1, int)
        )
        assert result.success[0]
        assert on_grid(result.x).all()


def band(x):
    """Class 1 between two levels, and from 14 levels on, in the mean of an image."""
    level = 255 * jnp.mean(x.reshape(len(x), -1), 1)
    fooled = (level > 10.2) & (level < 10.8) | (level > 13.9)
    # The gradient leads upwards in both classes.
    score = level / 100 + jnp.where(fooled, 10.0, -10.0)
    return jnp.stack([0 * score, score], 1)


def test_the_search_goes_on_where_only_the_point_itself_fools():
    """An attack that ended there, its point rounded afterwards, would call this model robust."""
    x0 = jnp.full((3, 4, 4), GREY[2])
    y = jnp.zeros(3, int)
    plain = PGD(Linf(20 / 255), steps=40, step_size=0.3 / 255, random_start=False)
    key = jax.random.key(0)
    before = jrobust.run(plain, key, band, x0, y)
    assert before.success.all()
    assert (jnp.argmax(band(jnp.round(before.x * 255) / 255), 1) == 0).all()
    found = jrobust.run(quantized(plain), key, band, x0, y)
    assert found.success.all()
    assert on_grid(found.x).all()
    np.testing.assert_array_equal(jnp.argmax(band(found.x), 1), 1)
    np.testing.assert_allclose(found.distance, 12 / 255, rtol=1e-5)
    # 8.2 levels up for the first point that fools, 11.9 for the first that does rounded as well.
    np.testing.assert_array_equal(before.step, 28)
    np.testing.assert_array_equal(found.step, 40)
    # One more pass wherever the point itself fools: twice in the band, and at the end.
    np.testing.assert_array_equal(found.forwards, 41 + 2 + 1)
    within_few = dataclasses.replace(plain, steps=35)
    assert not jrobust.run(quantized(within_few), key, band, x0, y).success.any()


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(3)
    first, second = (
        jnp.asarray(rng.normal(size=size), jnp.float32) / 4 for size in ((48, 16), (16, 4))
    )
    return lambda x: jnp.tanh(x.reshape(len(x), -1) @ first) @ second


@pytest.mark.parametrize(
    "attack",
    [
        multi_targeted(restarts(APGD(L2(0.2), steps=3), 2), 2),
        FAB(L2(0.4), steps=4, refine=1),
        Square(Linf(12 / 255), queries=30),
        union(PGD(Linf(4 / 255), steps=2), PGD(L1(0.5), steps=2)),
    ],
    ids=lambda attack: type(getattr(attack, "attack", attack)).__name__,
)
def test_success_is_that_of_the_rounded_point(attack, net):
    x = images(np.random.default_rng(5), 24, 4, 4, 3)
    y = jnp.argmax(net(x), 1)
    found = jrobust.run(quantized(attack), jax.random.key(0), net, x, y)
    assert on_grid(found.x).all()
    assert 3 < found.success.sum() < 24
    np.testing.assert_array_equal(found.success, jnp.argmax(net(found.x), 1) != y)
    plain = jrobust.run(attack, jax.random.key(0), net, x, y)
    assert (found.forwards >= plain.forwards).all()
    inside = [t.batched(x).distance(found.x, x) <= t.eps * (1 + 1e-4) for t in attack.threats()]
    assert jnp.any(jnp.stack(inside), 0).all()


def test_a_composition_becomes_one_of_quantized_members(net):
    whole = quantized(AutoAttack(Linf(8 / 255), steps=3, queries=5))
    assert all(type(member).__name__ == "Quantized" for member in whole.stages.values())
    assert list(whole.stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    x = images(np.random.default_rng(6), 20, 4, 4, 3)
    y = np.asarray(jnp.argmax(net(x), 1))
    members = sequence(PGD(Linf(10 / 255), steps=3), Square(Linf(10 / 255), queries=10))
    report = evaluate(
        jax.random.key(0), net, Dataset(np.asarray(x), y), quantized(members).stages,
        checks=False, progress=False, batch_size=8,
    )  # fmt: skip
    assert report.near_ties == 0
    assert on_grid(report.x).all()
    assert 0 < report.robust_accuracy < 1
    np.testing.assert_array_equal(
        np.asarray(jnp.argmax(net(report.x), 1)) == y, report.examples["robust"]
    )


def test_a_black_box_sees_rounded_points_where_it_judges(net):
    asked = []

    def box(x):
        asked.append(np.asarray(x))
        return np.asarray(net(jnp.asarray(x)))

    x = images(np.random.default_rng(7), 9, 4, 4, 3)
    y = jnp.argmax(net(x), 1)
    attack = quantized(Square(Linf(12 / 255), queries=12))
    found = jrobust.run(attack, jax.random.key(0), drive.Host(box), x, y)
    assert sum(map(len, asked)) == found.forwards.sum()
    same = jrobust.run(attack, jax.random.key(0), net, x, y)
    np.testing.assert_array_equal(found.success, same.success)
    np.testing.assert_array_equal(found.forwards, same.forwards)
    assert found.success.any()
    points = np.concatenate(asked)
    rows = {row.tobytes() for row in points}
    assert all(np.asarray(row).tobytes() in rows for row in found.x[found.success])


def test_a_model_that_draws(net):
    def fn(keys, x):
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        return net(x + 0.02 * noise)

    model = randomized(fn, jax.random.key(4), samples=2, votes=4)
    x = images(np.random.default_rng(8), 16, 4, 4, 3)
    y = jnp.argmax(model(x), 1)
    attack = PGD(Linf(12 / 255), steps=4)
    found = jrobust.run(quantized(eot(attack, 3)), jax.random.key(0), model, x, y)
    assert on_grid(found.x).all()
    assert 0 < found.success.sum() < 16
    np.testing.assert_array_equal(found.success, jnp.argmax(model(found.x), 1) != y)
    # An evaluation asks 3 draws and 4 votes, the last on the way 4 votes alone, and 4 votes more
    # where a point succeeds before it is rounded.
    moves = np.minimum(found.step, 4)
    more = (found.forwards - 7 * (moves + 1) + 3 * (found.step == 4))[found.success]
    assert (more >= 4).all()
    np.testing.assert_array_equal(more % 4, 0)


def test_bad_input(net):
    x = images(np.random.default_rng(9), 4, 4, 4, 3)
    y = jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"up to 0\.3 of a level off"):
        jrobust.run(quantized(PGD(Linf(0.1))), jax.random.key(0), net, x + 0.3 / 255 * (x < 0.5), y)
    for levels in (1, 2.0, True):
        with pytest.raises(ValueError, match="number of levels"):
            quantized(PGD(Linf(0.1)), levels)
    for attack in (MSD((Linf(0.1), L2(0.3))), Spatial()):
        with pytest.raises(TypeError, match="inside one norm ball"):
            jrobust.run(quantized(attack), jax.random.key(0), net, x, y)
    with pytest.raises(TypeError, match="takes one or more attacks"):
        quantized(Linf(0.1))
