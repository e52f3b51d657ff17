"""Objectives that change over training: what each step minimises, resume, reports, mistakes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrobust import data, loops, parallel, training, zeroth_order
from jrobust._algorithm import algorithm, describe
from jrobust.attacks import PGD
from jrobust.models import Network
from jrobust.smoothing import Gaussian
from jrobust.threat import L2
from jrobust.training import (
    CATRS,
    TRADES,
    Adversarial,
    Consistency,
    RedrawnMask,
    Scheduled,
    SmoothMix,
    Standard,
    ZerothOrder,
)
from jrobust.zeroth_order import CGE, RGE

B, D, C = 8, 5, 3
KEY = jax.random.key(3)
TX = optax.sgd(0.5)
TRACES = []


def init(key, x):
    return {"w": jax.random.normal(key, (D, C)), "b": jnp.zeros(C)}, {}


def logits(params, extra, x):
    return x @ params["w"] + params["b"][None]


def train_logits(params, extra, key, x):
    TRACES.append(x.shape)
    return logits(params, extra, x), extra


LINEAR = Network(init, logits, train_logits, lambda *_: {})
X = np.random.default_rng(0).uniform(size=(24, D)).astype(np.float32)
DATA = data.Dataset(X, np.argmax(X[:, :C], 1))
BATCH = training.batch(DATA.x[:B], DATA.y[:B])


@algorithm
class Scale:
    scale: float = 1.0


@algorithm
class Probe:
    """Reports the numbers that it meets."""

    parts: tuple
    shift: float = 0.0

    def __call__(self, key, network, params, extra, batch):
        value, (extra, metrics) = Standard()(key, network, params, extra, batch)
        seen = {"shift": self.shift, "scale": self.parts[1].scale}
        return self.parts[1].scale * value, (extra, metrics | jax.tree.map(jnp.asarray, seen))


@algorithm
class Inside:
    """An objective made of another one, that knows nothing of steps."""

    objective: object

    def __call__(self, key, network, params, extra, batch):
        return self.objective(key, network, params, extra, batch)


PROBE = Probe((Scale(), Scale(2.0)))
ATTACK = PGD(L2(0.3), 2, rel_step_size=1.0, random_start=False, keep="last")
GROWING = optax.linear_schedule(0.1, 0.5, 4)


def run(objective, steps=2, batch=BATCH, **settings):
    """The parameters and the metrics of each step, of one compiled update."""
    start, update = training.step(objective, TX, **settings)
    state, update, seen = start(KEY, LINEAR, batch.x[:1]), jax.jit(update), []
    for _ in range(steps):
        state, metrics = update(state, batch)
        seen.append(metrics)
    assert update._cache_size() == 1
    return state.params, seen


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_sees_the_values_of_its_number_and_compiles_once():
    def bumpy(step):
        return jnp.where(step == 3, 7, 0.25 * step)

    objective = Scheduled(PROBE, {"parts.1.scale": GROWING, "shift": bumpy})
    TRACES.clear()
    params, seen = run(objective, 6)
    assert len(TRACES) == 1
    assert [float(m["scale"]) for m in seen] == [float(GROWING(t)) for t in range(6)]
    assert [float(m["shift"]) for m in seen] == [0.0, 0.25, 0.5, 7.0, 1.0, 1.25]
    # Not seen only, but minimised.
    steps = [m["gradient_norm"] for m in run(PROBE, 1)[1]]
    np.testing.assert_allclose(seen[0]["gradient_norm"], steps[0] * 0.1 / 2.0, rtol=1e-6)
    nested = Scheduled(Scheduled(PROBE, {"shift": bumpy}), {"objective.parts.1.scale": GROWING})
    same(run(Inside(nested), 6), (params, seen))


CONSTANTS = {
    "Consistency": (Consistency(Gaussian(0.25)), {"lbd": 10.0, "noise.sigma": 0.25}),
    "Adversarial": (Adversarial(ATTACK), {"attack.threat.eps": 0.3}),
    "TRADES": (TRADES(PGD(L2(0.3), 1, keep="last")), {"beta": 6.0}),
    "SmoothMix": (SmoothMix(Gaussian(0.25), steps=1), {"eta": 5.0, "noise.sigma": 0.25}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n != "Consistency" else ()) for n in CONSTANTS],
)
def test_a_constant_schedule_is_the_constant_objective_to_the_bit(name):
    objective, numbers = CONSTANTS[name]

    def constant(value):
        return lambda step: value + 0.0 * jnp.sqrt(1.0 + step)  # unknown to the compiler

    schedules = {key: constant(value) for key, value in numbers.items()}
    same(run(Scheduled(objective, schedules)), run(objective))


def test_it_is_the_update_that_sets_the_number_by_hand():
    @jax.jit
    def by_hand(state, batch):
        attack = PGD(L2(GROWING(state.step)), 2, rel_step_size=1.0, random_start=False, keep="last")
        return training.step(Adversarial(attack), TX)[1](state, batch)

    state = training.step(Standard(), TX)[0](KEY, LINEAR, BATCH.x[:1])
    for _ in range(3):
        state, metrics = by_hand(state, BATCH)
    params, seen = run(Scheduled(Adversarial(ATTACK), {"attack.threat.eps": GROWING}), 3)
    same((params, seen[-1]), (state.params, metrics))


DIVIDED = {
    "attack": (Scheduled(Adversarial(ATTACK), {"attack.threat.eps": GROWING}), 2),
    "mask": (
        Scheduled(
            ZerothOrder(
                Scheduled(PROBE, {"parts.1.scale": GROWING}),
                RGE(1.0, 2),
                RedrawnMask({"w": 0.5, "b": 1.0}, every=2),
            ),
            {"estimator.mu": optax.linear_schedule(2.0**-4, 2.0**-6, 3)},
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", ["attack", pytest.param("mask", marks=pytest.mark.full)])
@pytest.mark.parametrize("backend", ["shard_map", pytest.param("pmap", marks=pytest.mark.full)])
def test_on_two_devices_it_is_the_same_step(name, backend):
    objective, pieces = DIVIDED[name]
    batch = BATCH._replace(mask=jnp.arange(B) != 2)
    expected, seen = run(objective, 3, batch)
    start, update = training.step(objective, TX, accumulate=pieces)
    mesh = parallel.mesh(jax.devices()[:2])
    split = parallel.data_parallel(update, mesh, backend, in_axes=(None, 0), out_axes=None)
    state = start(KEY, LINEAR, batch.x[:1])
    for _ in range(3):
        state, metrics = split(state, batch)
    for key, leaf in expected.items():
        np.testing.assert_allclose(state.params[key], leaf, atol=2e-4)
    for key, metric in seen[-1].items():
        np.testing.assert_allclose(metrics[key], metric, rtol=1e-3)


def test_masks_follow_from_the_key_and_the_step():
    ratios = {"w": 0.4, "b": 0.0}
    objective = ZerothOrder(Standard(), RGE(1e-2, 1), RedrawnMask(ratios, every=2))
    state, places = training.step(objective, TX)[0](KEY, LINEAR, BATCH.x[:1]), []
    update = jax.jit(training.step(objective, TX)[1])
    for step in range(5):
        branch = jax.random.fold_in(jax.random.fold_in(state.key, 1 << 28), step // 2)
        mask = zeroth_order.redraw(branch, state.params, ratios)
        new, _ = update(state, BATCH)
        moved = np.flatnonzero(np.asarray(new.params["w"] != state.params["w"]))
        np.testing.assert_array_equal(moved, mask["w"])
        assert moved.size == 6
        places.append(tuple(moved))
        state = new
    assert [a == b for a, b in itertools.pairwise(places)] == [True, False, True, False]
    assert update._cache_size() == 1


def fit(objective, epochs=2, **settings):
    settings = {"batch_size": B, "mesh": parallel.mesh(jax.devices()[:1]), **settings}
    return loops.fit(KEY, LINEAR, objective, TX, DATA, epochs=epochs, progress=False, **settings)


RESUMED = {
    "numbers": Scheduled(Adversarial(ATTACK), {"attack.threat.eps": GROWING}),
    "masks": ZerothOrder(Standard(), RGE(1e-2, 1), RedrawnMask({"w": 0.4, "b": 1.0}, every=2)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name, tmp_path):
    objective = RESUMED[name]
    whole = fit(objective)
    half = fit(objective, epochs=1, directory=tmp_path)
    rest = fit(objective, directory=tmp_path)
    assert rest.resumed == 3
    assert rest.history == whole.history
    assert rest.history[:1] == half.history
    same(rest.state.params, whole.state.params)


def test_the_report_prints_the_values_and_another_schedule_is_another_run(tmp_path):
    def fitted(schedule):
        objective = Scheduled(PROBE, {"shift": schedule})
        return fit(objective, epochs=1, directory=tmp_path).configuration["objective"]

    said = fitted(lambda step: 0.5 * step)
    assert said["name"] == "Scheduled"
    assert said["objective"]["name"] == "Probe"
    assert said["schedules"] == [
        "shift: 0 at step 0, 0.5 at step 1, 5 at step 10, 50 at step 100, 500 at step 1000, "
        "5000 at step 10000, 50000 at step 100000"
    ]
    assert fitted(lambda t: 0.5 * t) == said  # another function, the same program
    with pytest.raises(ValueError, match=r"differs in objective .* programs"):
        fitted(lambda step: 0.25 * step)
    with pytest.raises(ValueError, match="differs in programs"):  # between the steps that are shown
        fitted(lambda step: 0.5 * jnp.where(step == 7, 8, step))


def test_it_is_a_static_part_of_compiled_programs():
    one, two = (Scheduled(PROBE, {"shift": GROWING}) for _ in range(2))
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(two))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert jax.tree.structure(one) != jax.tree.structure(Scheduled(PROBE, {"shift": abs}))
    assert jax.tree.leaves(one) == [1.0, 2.0, 0.0]
    assert describe(jax.tree.map(lambda leaf: leaf, one)) == describe(two)


def check(objective):
    objective.check(DATA.x, DATA.y, C)


def test_schedules_that_stay_in_range_pass():
    check(Scheduled(Adversarial(ATTACK), {"attack.threat.eps": optax.linear_schedule(0, 1.0, 10)}))
    check(Scheduled(Standard(), {}))
    check(ZerothOrder(Scheduled(Standard(), {}), CGE(1e-3), RedrawnMask({"w": 1.0, "b": 1.0})))


def spike(step):
    return jnp.where(step == 60, 40.0, 0.1)


MISTAKES = {
    "too large for one step": (
        lambda: check(Scheduled(Adversarial(ATTACK), {"attack.threat.eps": spike})),
        ValueError,
        "L2.eps = 40 is larger than the whole box",
    ),
    "below zero in the end": (
        lambda: check(
            Scheduled(CATRS(Gaussian(0.1)), {"lbd": optax.linear_schedule(1.0, -1.0, 90_000)})
        ),
        ValueError,
        "CATRS.lbd must be a finite number >= 0, got -1",
    ),
    "not a number": (
        lambda: check(Scheduled(PROBE, {"shift": lambda step: jnp.log(step - 2.0)})),
        ValueError,
        "the schedule of shift is nan at step 0",
    ),
    "below a wrapped objective": (
        lambda: check(
            ZerothOrder(Scheduled(Adversarial(ATTACK), {"attack.threat.eps": spike}), CGE(1e-3))
        ),
        ValueError,
        "L2.eps = 40",
    ),
    "no such number": (
        lambda: check(Scheduled(Adversarial(ATTACK), {"eps": GROWING})),
        ValueError,
        "Adversarial has no number 'eps' to schedule; it has: attack.threat.eps, attack.threat.lo",
    ),
    "a table": (
        lambda: run(Scheduled(CATRS(Gaussian(0.1), np.ones((9, C)) / C), {"predictions": GROWING})),
        ValueError,
        "has no number 'predictions'",
    ),
    "no number at all": (
        lambda: run(Scheduled(Standard(), {"lr": GROWING})),
        ValueError,
        "it has: none",
    ),
    "several numbers": (
        lambda: run(Scheduled(PROBE, {"shift": lambda step: jnp.stack([step, step])})),
        ValueError,
        r"the schedule of shift must return one number, got shape \(2,\)",
    ),
    "a number for a schedule": (
        lambda: Scheduled(PROBE, {"shift": 0.5}),
        TypeError,
        "the schedule of shift must be a function of the step",
    ),
    "a schedule for nothing": (
        lambda: Scheduled(PROBE, GROWING),
        TypeError,
        "schedules must map names of numbers to functions",
    ),
    "called without a step": (
        lambda: Scheduled(PROBE, {"shift": GROWING})(KEY, LINEAR, {}, {}, BATCH),
        TypeError,
        "until a step is known",
    ),
    "a mask for no steps": (
        lambda: check(ZerothOrder(Standard(), CGE(1e-3), RedrawnMask({}, every=0))),
        ValueError,
        "every must be an int >= 1",
    ),
    "a mask of other parameters": (
        lambda: run(ZerothOrder(Standard(), CGE(1e-3), RedrawnMask({"w": 1.0}))),
        ValueError,
        "ratios must have the structure of params",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_clear_errors(name):
    call, error, words = MISTAKES[name]
    with pytest.raises(error, match=words):
        call()
