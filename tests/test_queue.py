"""Continuous batching: lanes that are refilled, stored, and searched with another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrobust import attacks, data, drive, loops, parallel
from jrobust.attacks import AttackResult
from jrobust.loops import _evaluate, _queue
from jrobust.loops._folder import Folder
from jrobust.models import Bound
from jrobust.threat import Linf

KEY = jax.random.key(5)
ONE = parallel.mesh(jax.devices()[:1])


class Clockwork:
    """Stands for a compiled attack: the example at position i ends after ``needs[i]`` steps."""

    def __init__(self, needs, lanes, devices):
        self.needs, self.devices = np.asarray(needs), devices
        self.state = np.zeros(lanes, int)
        self.worked = 0  # steps of lanes, live or not

    def __call__(self, steps, spare, state, held, fresh, position):
        state = np.where(fresh, self.needs[position], state)
        for device in np.split(np.arange(len(state)), self.devices):
            for _ in range(steps):
                if np.sum(held[device] & (state[device] > 0)) <= spare:
                    break
                state[device] = np.maximum(state[device] - 1, 0)
                self.worked += len(device)
        rows = position.astype(np.float32)
        none = np.zeros(len(state), np.int32)
        return state, state == 0, AttackResult(rows, none > 0, none, rows, rows, none, none)


def passed(needs, lanes, devices, index=None):
    """Every (position, result) that comes out, and the share of lane steps that were of use."""
    run = Clockwork(needs, lanes, devices)
    index = np.arange(len(needs)) if index is None else index
    start = _queue.Lanes(np.full(lanes, -1), run.state)
    out = [*_queue.through(start, index, lambda i: (i,), run, devices, lambda _: None)]
    return out, run.needs[index].sum() / run.worked


@pytest.mark.parametrize(("lanes", "devices"), [(16, 1), (16, 4), (1, 1), (600, 2)])
def test_every_example_passes_once_and_its_result_is_its_own(lanes, devices):
    needs = np.random.default_rng(0).integers(1, 60, 400)
    index = np.random.default_rng(1).permutation(400)[:333]
    out, _ = passed(needs, lanes, devices, index)
    positions = np.concatenate([piece for piece, _ in out])
    np.testing.assert_array_equal(np.sort(positions), np.sort(index))
    for piece, found in out:
        np.testing.assert_array_equal(found.x, piece)
        assert np.all(np.diff(piece) > 0)


def test_lanes_are_seldom_idle():
    rng = np.random.default_rng(2)
    needs = np.where(rng.random(2000) < 0.6, rng.geometric(0.2, 2000).clip(1, 100), 100)
    out, occupancy = passed(needs, 64, 1)
    assert len(out) > 50
    assert occupancy > 0.9
    # Batches that wait for their slowest example, for comparison.
    batches = [needs[i : i + 64].max() for i in range(0, 2000, 64)]
    assert needs.sum() / (64 * sum(batches)) < 0.5


def test_few_examples_are_spread_over_all_devices():
    held = []

    class Watched(Clockwork):
        def __call__(self, steps, spare, state, held_now, *rest):
            held.append(held_now.reshape(4, -1).sum(1))
            return super().__call__(steps, spare, state, held_now, *rest)

    run = Watched([3] * 6, 16, 4)
    start = _queue.Lanes(np.full(16, -1), run.state)
    list(_queue.through(start, np.arange(6), lambda i: (i,), run, 4, lambda _: None))
    assert sorted(held[0]) == [1, 1, 2, 2]


# A linear model of two classes, so that small steps break examples one after the other.
SLOPE = np.array([1.0, -0.9, 0.8, -0.7], np.float32)


def linear(params, extra, x):
    margin = x @ params["w"] + params["b"]
    return jnp.stack([margin, -margin], -1)


def model(offset=0.0, scale=1.0):
    return Bound({"w": jnp.asarray(scale * SLOPE), "b": jnp.float32(offset)}, {}, linear)


def problem(n=40):
    x = np.random.default_rng(0).uniform(0.25, 0.75, (n, 4)).astype(np.float32)
    return data.Dataset(x, (x @ SLOPE < 0).astype(np.int32), 100 + np.arange(n))


DATA = problem()
MARGIN = np.abs(DATA.x.astype(np.float64) @ SLOPE)
DISTANCE = MARGIN / np.abs(SLOPE).sum()
WALK = attacks.PGD(Linf(0.1), steps=30, step_size=0.005, random_start=False)


def evaluate(attack=WALK, fn=None, **options):
    options = {"batch_size": 4, "mesh": ONE, "progress": False, "checks": False, **options}
    return loops.evaluate(KEY, model() if fn is None else fn, DATA, attack, **options)


def test_lanes_at_different_steps_find_the_closed_form():
    found = evaluate()
    steps = np.ceil(DISTANCE / 0.005).astype(int)
    broken = DISTANCE < 0.1
    assert 5 < broken.sum() < 35
    assert len(set(steps[broken])) > 5
    np.testing.assert_array_equal(found.examples["robust"], ~broken)
    np.testing.assert_array_equal(found.examples["step"][broken], steps[broken])
    np.testing.assert_array_equal(found.examples["backwards"], np.where(broken, steps + 1, 30))


SAVE = Folder.save


class Killed(BaseException):
    pass


def interrupt(monkeypatch, when):
    """Lanes are stored after every step; the write number ``when`` never returns."""
    writes = []

    def saved(self, name, **arrays):
        SAVE(self, name, **arrays)
        writes.append(name)
        if writes.count("lanes.npz") == when:
            raise Killed

    monkeypatch.setattr(_queue, "_PATIENCE", -1.0)  # one step a call
    monkeypatch.setattr(_evaluate, "_SAVE", -1.0)
    monkeypatch.setattr(Folder, "save", saved)
    return writes


@pytest.mark.parametrize("attack", [WALK, attacks.restarts(attacks.PGD(Linf(0.1), steps=5), 3)])
def test_an_interrupted_run_goes_on_with_its_lanes_as_they_were(attack, tmp_path, monkeypatch):
    writes = interrupt(monkeypatch, None)
    whole = evaluate(attack, directory=tmp_path / "whole")
    total = writes.count("lanes.npz")
    assert not (tmp_path / "whole" / "lanes.npz").exists()
    writes = interrupt(monkeypatch, total // 2)
    with pytest.raises(Killed):
        evaluate(attack, directory=tmp_path / "broken")
    writes = interrupt(monkeypatch, None)
    again = evaluate(attack, directory=tmp_path / "broken")
    for name, column in whole.examples.items():
        np.testing.assert_array_equal(again.examples[name], column, err_msg=name)
    np.testing.assert_array_equal(again.x, whole.x)
    np.testing.assert_array_equal(again.standing, whole.standing)
    # What had been done was not done again.
    assert writes.count("lanes.npz") <= total - total // 2 + 2


def test_the_search_ends_only_where_the_model_agrees():
    # The searched model sees the boundary too early: 0.01 nearer for those in front of it.
    shift = 0.01 * np.abs(SLOPE).sum()
    found = evaluate(search_fn=model(-shift))
    alone = evaluate()
    front = (DATA.y == 0) & (DISTANCE > 0.01)
    np.testing.assert_array_equal(found.examples["robust"][front], alone.examples["robust"][front])
    broken = front & ~alone.examples["robust"]
    assert broken.sum() > 5
    np.testing.assert_array_equal(
        found.examples["step"][broken], alone.examples["step"][broken]
    )  # not at the first point that fools the searched model
    fooled_alone = front & (DISTANCE > 0.1) & (DISTANCE < 0.11)
    assert found.only_search == fooled_alone.sum()
    assert alone.only_search == alone.only_model == 0
    # Every judged point cost a forward pass of the model.
    more = found.examples["forwards"][broken] - alone.examples["forwards"][broken]
    np.testing.assert_array_equal(more, 2 + 1)


def test_a_point_that_fools_the_model_alone_counts():
    # The searched model sees the boundary too late: it never claims the last 0.01.
    shift = 0.01 * np.abs(SLOPE).sum()
    found = evaluate(search_fn=model(shift))
    missed = (DATA.y == 0) & (DISTANCE > 0.09) & (DISTANCE < 0.1)
    assert missed.sum() > 0
    assert found.only_model == missed.sum()
    assert not np.any(found.examples["robust"][missed])


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(TypeError, match="Host"):
        evaluate(search_fn=drive.Host(lambda x: np.zeros((len(x), 2))))
    with pytest.raises(ValueError, match="3 classes and logits_fn 2"):
        evaluate(search_fn=lambda x: x[:, :3])


def test_a_host_model_is_not_asked_about_lanes_that_have_ended():
    asked = []

    def black_box(x):
        asked.append(len(x))
        margin = x @ SLOPE
        return np.stack([margin, -margin], -1)

    from jrobust.zeroth_order import CGE

    attack = attacks.PGD(
        Linf(0.1), steps=5, step_size=0.02, random_start=False, estimator=CGE(1e-2)
    )
    found = evaluate(attack, drive.Host(black_box))
    assert len(set(found.examples["forwards"])) > 4
    np.testing.assert_array_equal(found.examples["robust"], DISTANCE > 0.1)
    broken = (~found.examples["robust"]).sum()
    # The clean pass, what the attack counts, and one verdict for each claim.
    assert sum(asked) == len(DATA) + found.examples["forwards"].sum() + broken
