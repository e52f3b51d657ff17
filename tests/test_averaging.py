"""Averages of the weights (EMA, SWA) and the batch-norm statistics that fit them."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jrobust import algorithm, models, training
from jrobust.models import Network
from jrobust.training import EMA, SWA, Averaging, Standard

B, D, C = 8, 4, 3
KEY = jax.random.key(3)
TRACES = []


def counted_init(key, x):
    params = {"w": jax.random.normal(key, (D, C)), "b": jnp.zeros(C)}
    return params, {"mean": jnp.full(D, 0.3), "passes": jnp.zeros((), jnp.int32)}


def counted_logits(params, extra, x):
    return (x - extra["mean"][None]) @ params["w"] + params["b"][None]


def counted_train(params, extra, key, x):
    TRACES.append(x.shape)
    mean = x.mean(0)
    moved = {"mean": 0.9 * extra["mean"] + 0.1 * mean, "passes": extra["passes"] + 1}
    return (x - mean[None]) @ params["w"] + params["b"][None], moved


# Batch-norm in small, with a counter.
COUNTED = Network(counted_init, counted_logits, counted_train, lambda params, extra, x: {})


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return training.batch(np.float32(rng.uniform(size=(B, D))), rng.integers(0, C, B))


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=atol), a, b)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def sequence(n, dtype=jnp.float32):
    """Weights and statistics after 0, 1, ..., n updates."""
    rng = np.random.default_rng(1)
    return [
        (
            {"w": jnp.asarray(rng.normal(size=(2, 3)), dtype)},
            {"mean": jnp.asarray(rng.normal(size=3), dtype), "passes": jnp.int32(i)},
        )
        for i in range(n + 1)
    ]


def trail(averaging, points):
    """The averaged weights before the first update and after each."""
    average = averaging.init(*points[0])
    found = [averaging.weights(average)]
    for t, point in enumerate(points[1:], 1):
        average = averaging.update(average, *point, jnp.int32(t))
        found.append(averaging.weights(average))
    return found


def floats(points):
    """(n, 9) float64: the float leaves of each point."""
    return np.stack(
        [
            np.concatenate([np.asarray(p["w"], np.float64).ravel(), np.asarray(e["mean"])])
            for p, e in points
        ]
    )


# The averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_ema_is_its_recursion(decay):
    points = sequence(12)
    exact = floats(points)
    for t in range(1, len(exact)):
        d = min(decay, (1 + t) / (10 + t))
        exact[t] = d * exact[t - 1] + (1 - d) * exact[t]
    found = trail(EMA(decay), points)
    np.testing.assert_allclose(floats(found), exact, rtol=1e-5, atol=1e-6)
    assert [int(extra["passes"]) for _, extra in found] == list(range(13))  # counted, not averaged


def test_ema_forgets_the_initialisation_soon_and_constants_are_kept():
    ema, ones = EMA(0.999), {"w": jnp.ones(2)}
    average = ema.init({"w": jnp.full(2, 1e3)}, {})
    for t in range(1, 11):
        average = ema.update(average, ones, {}, jnp.int32(t))
    share = (np.asarray(ema.weights(average)[0]["w"]) - 1) / 999
    np.testing.assert_allclose(
        share, np.prod([(1 + t) / (10 + t) for t in range(1, 11)]), rtol=1e-2
    )
    assert np.all(share < 1e-4)


@pytest.mark.parametrize(("start", "every"), [(4, 1), (3, 4), (0, 5), (1, 1)])
def test_swa_is_the_mean_of_its_points(start, every):
    points = sequence(12)
    exact, found = floats(points), floats(trail(SWA(start, every), points))
    for t in range(13):
        chosen = [t] if t < start else range(start, t + 1, every)
        np.testing.assert_allclose(found[t], exact[list(chosen)].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averaging", [EMA(0.99), SWA(1)], ids=["EMA", "SWA"])
def test_half_precision_is_averaged_in_float32_and_cast_on_use(averaging):
    points = sequence(200, jnp.bfloat16)
    average = averaging.init(*points[0])
    for t, point in enumerate(points[1:], 1):
        average = averaging.update(average, *point, jnp.int32(t))
    kept = average.weights
    assert kept[0]["w"].dtype == kept[1]["mean"].dtype == jnp.float32
    exact = floats(points)
    if isinstance(averaging, SWA):
        exact = exact[1:].mean(0)
    else:
        state = exact[0]
        for t in range(1, 201):
            d = min(0.99, (1 + t) / (10 + t))
            state = d * state + (1 - d) * exact[t]
        exact = state
    np.testing.assert_allclose(floats([kept])[0], exact, atol=1e-5)
    used = averaging.weights(average)
    assert used[0]["w"].dtype == used[1]["mean"].dtype == jnp.bfloat16
    assert used[1]["passes"].dtype == jnp.int32
    equal(used[0]["w"], kept[0]["w"].astype(jnp.bfloat16))


@algorithm
class Latest(Averaging):
    """The current weights: what a new averaging has to say."""

    def check(self):
        """Nothing can be wrong."""

    def rate(self, step):
        return jnp.float32(1)


@pytest.mark.parametrize(
    "averaging", [EMA(0.9), SWA(2, 2), Latest()], ids=lambda averaging: type(averaging).__name__
)
def test_the_step_keeps_the_average(averaging):
    init, update = training.step(Standard(), optax.adam(0.1), average=averaging)
    plain_init, plain = training.step(Standard(), optax.adam(0.1))
    update, plain = jax.jit(update, donate_argnums=0), jax.jit(plain)
    # Compiled or not, no buffer may belong to weights and average both: it could not be donated.
    state = jax.jit(init)(KEY, COUNTED, batch().x)
    equal(jax.tree.map(jnp.copy, init(KEY, COUNTED, batch().x).weights), state.weights)
    reference = plain_init(KEY, COUNTED, batch().x)
    average = averaging.init(reference.params, reference.extra)
    equal(reference.weights, (reference.params, reference.extra))
    TRACES.clear()
    for t in range(1, 7):
        old = state
        state, _ = update(state, batch(t))
        assert all(
            leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.average.weights[0]))
        )
        reference, _ = plain(reference, batch(t))
        average = averaging.update(average, *reference.weights, t)
        close((state.params, state.extra), (reference.params, reference.extra))
        close(state.weights, averaging.weights(average))
    assert len(TRACES) == 2, "each of the two updates is traced once"
    apart = jnp.abs(state.weights[0]["w"] - state.params["w"]).max()
    assert (apart > 1e-3) != isinstance(averaging, Latest)


@pytest.mark.parametrize("averaging", [EMA(0.9), SWA(0)], ids=["EMA", "SWA"])
def test_an_update_outside_of_jit_shares_no_buffers_either(averaging):
    init, update = training.step(Standard(), optax.sgd(0.1), average=averaging)
    state = init(KEY, COUNTED, batch().x)
    for _ in range(2):
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf is not state.key]
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
        state, _ = update(state, batch())


def test_new_numbers_do_not_trace_anew():
    @jax.jit
    def update(averaging, state, batch):
        return training.step(Standard(), optax.sgd(0.1), average=averaging)[1](state, batch)[0]

    for one, two in ((EMA(0.1), EMA(0.01)), (SWA(0, 1), SWA(9, 2))):
        state = training.step(Standard(), optax.sgd(0.1), average=one)[0](KEY, COUNTED, batch().x)
        first = update(one, state, batch())
        TRACES.clear()
        second = update(two, state, batch())
        assert TRACES == []
        assert np.any(first.weights[0]["w"] != second.weights[0]["w"])


def test_averages_and_accumulation_lower_for_every_platform():
    init, update = training.step(Standard(), optax.sgd(0.1), average=EMA(), accumulate=2)
    state = init(KEY, COUNTED, batch().x)

    def guarded(leaves, alive, batch):
        state_ = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return jax.tree.leaves(training.guarded(update)(state_, alive, batch))

    exported = jax.export.export(jax.jit(guarded), platforms=("cpu", "cuda", "tpu"))(
        jax.tree.leaves(state), jnp.array(True), batch()
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("average", "error", "words"),
    [
        (EMA(1.0), ValueError, "EMA.decay must be a number in [0, 1), got 1.0"),
        (EMA(-0.1), ValueError, "EMA.decay"),
        (EMA(float("nan")), ValueError, "EMA.decay"),
        (EMA(np.ones(2)), ValueError, "EMA.decay"),
        (SWA(-1), ValueError, "SWA.start must be a whole number >= 0, got -1"),
        (SWA(0.75), ValueError, "SWA.start"),
        (SWA(0, 0), ValueError, "SWA.every must be a whole number >= 1, got 0"),
        (SWA(np.arange(2)), ValueError, "SWA.start"),
        (EMA, TypeError, "EMA(0.999)"),
        (0.999, TypeError, "EMA(0.999)"),
    ],
)
def test_mistakes_get_clear_errors(average, error, words):
    with pytest.raises(error) as raised:
        training.step(Standard(), optax.sgd(0.1), average=average)
    assert words in str(raised.value)


# Statistics of batch-norm


class Normed(nn.Module):
    """Two batch-norm layers of different memory, the second behind a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=0.9, name="first")(x)
        x = nn.Dense(5, name="dense")(x)
        x = nn.BatchNorm(not train, momentum=0.99, name="second")(nn.relu(x))
        return nn.Dense(C, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


def exact_statistics(params, batches):
    """Means over batches of each layer's batch mean and variance, in float64."""
    rows = []
    for x in np.asarray(batches, np.float64):
        mean, var = x.mean(0), x.var(0)
        first, dense = params["first"], params["dense"]
        h = (x - mean) / np.sqrt(var + 1e-5) * first["scale"] + first["bias"]
        h = np.maximum(h @ np.asarray(dense["kernel"], np.float64) + dense["bias"], 0)
        rows.append((mean, var, h.mean(0), h.var(0)))
    mean, var, mean2, var2 = (np.mean(column, 0) for column in zip(*rows))
    return {
        "batch_stats": {
            "first": {"mean": mean, "var": var},
            "second": {"mean": mean2, "var": var2},
        }
    }


@pytest.mark.parametrize("start", [1.0, 1e6, np.nan])
def test_statistics_are_plain_means_whatever_they_were(start):
    network = models.network(Normed())
    rng = np.random.default_rng(7)
    # Batches that differ, so that weights that are not equal would show.
    batches = [np.float32(rng.normal(3 * i, 1 + i, size=(16, D))) for i in range(5)]
    params, extra = network.init(KEY, batches[0])
    old = jax.tree.map(lambda leaf: leaf * start, extra)
    found = training.update_statistics(network, params, old, KEY, iter(batches))
    close(found, exact_statistics(jax.device_get(params), batches), rtol=1e-4, atol=1e-5)
    before = jax.tree.map(lambda leaf: leaf.dtype, extra)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == before
    again = training.update_statistics(network, params, found, KEY, batches)
    equal(again, found)


def test_statistics_in_half_precision_are_estimated_in_full():
    network = models.network(Normed())
    batches = [np.float32(np.random.default_rng(i).normal(i, 1, (16, D))) for i in range(3)]
    params, extra = network.init(KEY, batches[0])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), extra)
    found = training.update_statistics(network, params, half, KEY, batches)
    full = training.update_statistics(network, params, extra, KEY, batches)
    equal(found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full))


def odd_init(key, x):
    params = {"w": jax.random.normal(key, (D, C))}
    extra = {
        "mean": jnp.full(D, 0.3),
        "passes": jnp.zeros((), jnp.int32),
        "frozen": jnp.arange(3.0),
        "lag": jnp.float32(0),
        "sigma": jnp.float32(0.5),
        "u": jnp.ones(D) / 2,
        "last": jnp.zeros(()),
    }
    return params, extra


def odd_train(params, extra, key, x):
    TRACES.append(x.shape)
    u = params["w"] @ (params["w"].T @ extra["u"])
    sigma = jnp.sqrt(jnp.sum(u * u))
    moved = {
        "mean": 0.9 * extra["mean"] + 0.1 * x.mean(0),
        "passes": extra["passes"] + 1,
        "frozen": extra["frozen"],
        "lag": 0.5 * extra["u"][0],
        "sigma": sigma,
        "u": u / sigma,
        "last": x.mean(),
    }
    return x @ params["w"], moved


ODD = Network(odd_init, counted_logits, odd_train, lambda params, extra, x: {})


def test_what_is_no_running_average_goes_from_pass_to_pass():
    batches = [batch(i).x for i in range(3)]
    params, extra = ODD.init(KEY, batches[0])
    TRACES.clear()
    found = training.update_statistics(ODD, params, extra, KEY, batches)
    assert len(TRACES) == 1, "one program for all batches"
    w, u = np.asarray(params["w"], np.float64), np.asarray(extra["u"], np.float64)
    for _ in batches:  # power iteration, as spectral normalisation has it
        lag = u[0] / 2
        u = w @ (w.T @ u)
        sigma, u = np.linalg.norm(u), u / np.linalg.norm(u)
    means = np.mean([x.mean(0, dtype=np.float64) for x in map(np.asarray, batches)], 0)
    exact = {
        "mean": means, "passes": 3, "frozen": np.arange(3.0), "sigma": sigma, "u": u,
        "last": means.mean(), "lag": lag,
    }  # fmt: skip
    close(found, exact)


def test_statistics_of_nothing():
    network = models.network(models.MLP(features=(), classes=C))
    params, extra = network.init(KEY, batch().x)

    def never():
        raise AssertionError("no pass is needed")
        yield

    assert training.update_statistics(network, params, extra, KEY, never()) is extra
    params, extra = COUNTED.init(KEY, batch().x)
    with pytest.raises(ValueError, match="at least one batch"):
        training.update_statistics(COUNTED, params, extra, KEY, [])
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        training.update_statistics(COUNTED, params, extra, 0, [batch().x])


def test_averaged_weights_with_their_statistics_make_a_model():
    """The whole recipe: train, average, re-estimate, evaluate."""
    init, update = training.step(Standard(), optax.adam(0.05), average=SWA(20, 5))
    update, data = jax.jit(update), batch(1)
    data = data._replace(x=data.x.at[jnp.arange(B), data.y].add(2.0))
    network = models.network(Normed())
    state = init(KEY, network, data.x)
    for _ in range(60):
        state, _ = update(state, data)
    params, extra = state.weights
    found = training.update_statistics(network, params, extra, KEY, [data.x])
    close(found, exact_statistics(jax.device_get(params), [data.x]), rtol=1e-3, atol=1e-5)
    state = dataclasses.replace(state, params=params, extra=found)
    accuracy = np.mean(network.logits(params, found, data.x).argmax(-1) == data.y)
    assert accuracy == 1
