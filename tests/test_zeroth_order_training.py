"""Training without backpropagation: the step, its masks, batch-norm, devices, the loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrobust import data, loops, models, parallel, training
from jrobust.models import Network
from jrobust.training import Standard, ZerothOrder, zeroth_order_step
from jrobust.zeroth_order import CGE, RGE

B, D, C = 8, 5, 3
KEY = jax.random.key(3)
TRACES = []


def init(key, x):
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (D, 4)),
        "b1": jnp.zeros(4),
        "w2": jax.random.normal(two, (4, C)),
    }, {}


def logits(params, extra, x):
    TRACES.append(x.shape)
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]


def train_logits(params, extra, key, x):
    return logits(params, extra, x), extra


def features(params, extra, x):
    return {}


MLP = Network(init, logits, train_logits, features)


def batch(rows=B):
    x = jax.random.normal(jax.random.key(1), (rows, D))
    return training.batch(x, jnp.arange(rows) % C)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def run(init_update, network=MLP, steps=1, example=None):
    init, update = init_update
    example = batch() if example is None else example
    state, update = init(KEY, network, example.x[:1]), jax.jit(update)
    for _ in range(steps):
        state, metrics = update(state, example)
    return state, metrics


def test_central_differences_train_as_backpropagation_does():
    tx = optax.sgd(0.5, momentum=0.9)
    exact, seen = run(training.step(Standard(), tx), steps=3)
    state, metrics = run(zeroth_order_step(Standard(), tx, CGE(2.0**-6)), steps=3)
    start = flat(training.step(Standard(), tx)[0](KEY, MLP, batch().x[:1]).params)
    moved = np.linalg.norm(flat(exact.params) - start)
    assert moved > 0.1
    assert np.linalg.norm(flat(state.params) - flat(exact.params)) < 2e-3 * moved
    assert state.step == 3
    assert metrics.keys() == seen.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], seen[name], rtol=2e-3)
    assert jax.tree.structure(state) == jax.tree.structure(exact)


def test_batch_norm_statistics_are_those_of_the_base_pass():
    network = models.network(models.SmallCNN(widths=(2,), hidden=2, classes=3, norm=True))
    x = jax.random.uniform(jax.random.key(2), (6, 4, 4, 1))
    example = training.batch(x, jnp.arange(6) % 3)
    exact, seen = run(training.step(Standard(), optax.sgd(0.1)), network, 2, example)
    step = zeroth_order_step(Standard(), optax.sgd(0.1), CGE(1e-3, central=False))
    state, metrics = run(step, network, 2, example)
    np.testing.assert_allclose(flat(state.extra), flat(exact.extra), rtol=1e-3)
    np.testing.assert_allclose(metrics["gradient_norm"], seen["gradient_norm"], rtol=2e-2)
    fresh = step[0](KEY, network, x[:1])
    assert np.all(flat(state.extra) != flat(fresh.extra))


def test_masks_are_redrawn_on_a_schedule_without_compiling():
    ratios, counts = {"w1": 0.25, "b1": 1.0, "w2": 0.5}, {"w1": 5, "b1": 4, "w2": 6}
    init, update = zeroth_order_step(
        Standard(), optax.sgd(1.0), RGE(1e-2, 3), ratios=ratios, every=2
    )
    update, places = jax.jit(update), []
    state = init(KEY, MLP, batch().x[:1])
    for step in range(6):
        new, _ = update(state, batch())
        moved = jax.tree.map(
            lambda a, b: np.flatnonzero(np.asarray(a != b)), new.params, state.params
        )
        assert jax.tree.map(len, moved) == counts
        places.append(tuple(moved["w1"]))
        if step == 0:
            traces = len(TRACES)
        state = new
    assert len(TRACES) == traces
    assert [a == b for a, b in itertools.pairwise(places)] == [True, False, True, False, True]


def test_parts_of_a_batch_go_the_same_way():
    """Accumulated or on two devices, the estimate is along the directions of the whole."""
    estimator, tx = RGE(2.0**-6, 4, direction="sphere", antithetic=True), optax.sgd(1.0)
    whole, seen = run(zeroth_order_step(Standard(), tx, estimator))
    parts, metrics = run(zeroth_order_step(Standard(), tx, estimator, accumulate=4))
    np.testing.assert_allclose(flat(parts.params), flat(whole.params), atol=1e-4)
    np.testing.assert_allclose(metrics["loss"], seen["loss"], rtol=1e-5)
    init, update = zeroth_order_step(Standard(), tx, estimator)
    split = parallel.data_parallel(
        update, parallel.mesh(jax.devices()[:2]), "shard_map", in_axes=(None, 0), out_axes=None
    )
    example = batch()
    example = example._replace(mask=jnp.arange(B) != 2)
    expected, seen = run((init, update), example=example)
    state, metrics = split(init(KEY, MLP, example.x[:1]), example)
    np.testing.assert_allclose(flat(state.params), flat(expected.params), atol=1e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], seen["gradient_norm"], rtol=1e-3)


def test_the_objective_trains_in_the_loop():
    x = np.asarray(jax.random.normal(jax.random.key(4), (24, D)))
    train = data.Dataset(x, np.argmax(x[:, :C], 1).astype(np.int32))
    report = loops.fit(
        KEY,
        MLP,
        ZerothOrder(Standard(), CGE(1e-2, central=False)),
        optax.adam(0.1),
        train,
        epochs=6,
        batch_size=8,
    )
    assert report.history[-1]["loss"] < 0.5 * report.history[0]["loss"]
    assert report.configuration["objective"]["estimator"]["name"] == "CGE"


BAD = {
    "estimator class": (
        lambda: zeroth_order_step(Standard(), optax.sgd(1.0), CGE),
        TypeError,
        "CGE",
    ),
    "objective class": (
        lambda: zeroth_order_step(Standard, optax.sgd(1.0), CGE(1e-2)),
        TypeError,
        "objective must be an instance",
    ),
    "every": (
        lambda: zeroth_order_step(Standard(), optax.sgd(1.0), CGE(1e-2), every=0),
        ValueError,
        "every must be",
    ),
    "no optimiser": (lambda: zeroth_order_step(Standard(), 0.1, CGE(1e-2)), TypeError, "tx must"),
    "mu in the loop": (
        lambda: ZerothOrder(Standard(), CGE(-1.0)).check(batch().x, batch().y, C),
        ValueError,
        "mu must be positive",
    ),
    "ratios of another tree": (
        lambda: run(zeroth_order_step(Standard(), optax.sgd(1.0), CGE(1e-2), ratios={"w1": 1.0})),
        ValueError,
        "structure of params",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, error, message = BAD[mistake]
    with pytest.raises(error, match=message):
        call()
