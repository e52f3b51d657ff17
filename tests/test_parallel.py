"""One computation, whatever back end and however many devices run it."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrobust import attacks, data, drive, loops, models, parallel, run, smoothing, sweep, training
from jrobust import keys as _keys
from jrobust.threat import L2, Linf

BACKENDS = ("jit", "shard_map", "pmap")


def mesh(n):
    return parallel.mesh(jax.devices()[:n])


def linear(x):
    w = jnp.sin(jnp.arange(36.0)).reshape(12, 3)
    return x.reshape(x.shape[0], -1) @ w


def points(rows):
    x = 0.3 + 0.4 * jax.random.uniform(jax.random.key(5), (rows, 12))
    return x, jnp.argmax(linear(x), -1), jnp.arange(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "threat", [Linf(0.05), pytest.param(L2(0.15), marks=pytest.mark.full)], ids=["Linf", "L2"]
)
def test_attacks_are_bit_equal_at_one_lane_shape(key, backend, threat):
    attack = attacks.restarts(attacks.PGD(threat, steps=4), 2)

    def lanes(key, x, y, ids):
        found = attack.init(_keys.examples(key, ids), x, y)
        for _ in range(3):
            found = attack.step(linear, found)
        return attack.result(found), attack(key, linear, x, y, ids=ids)

    x, y, ids = points(32)
    # One device of four lanes, eight times, is the reference.
    single = parallel.data_parallel(lanes, mesh(1), backend, in_axes=(None, 0, 0, 0))
    pieces = [single(key, *(a[i : i + 4] for a in (x, y, ids))) for i in range(0, 32, 4)]
    expected = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
    assert 0 < np.mean(expected[1].success) < 1
    for devices in (2, 4, 8):
        split = parallel.data_parallel(lanes, mesh(devices), backend, in_axes=(None, 0, 0, 0))
        rows = 4 * devices
        found = [split(key, *(a[i : i + rows] for a in (x, y, ids))) for i in range(0, 32, rows)]
        found = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
            if backend == "jit" and a.dtype == np.float32:
                # One global program: XLA may round a wider batch otherwise.
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_radii_are_swept_on_each_device(key, backend):
    attack, radii = attacks.PGD(Linf(0.05), steps=3), jnp.asarray([0.02, 0.05])
    network = models.network(models.SmallCNN(widths=(2,), classes=3, hidden=4))
    images, (_, y, ids) = jax.random.uniform(key, (8, 8, 8, 1)), points(8)

    def broken(key, model, x, y, ids):
        def at(eps):
            return attacks.with_eps(attack, eps)(key, model, x, y, ids=ids).success

        return jax.vmap(at, out_axes=1)(radii)

    model = network.bind(*network.init(key, images[:1]))
    axes = (None, None, 0, 0, 0)
    found = parallel.data_parallel(broken, mesh(4), backend, in_axes=axes)
    np.testing.assert_array_equal(
        found(key, model, images, y, ids), broken(key, model, images, y, ids)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_vote_counts_do_not_depend_on_devices(key, backend):
    x, _, ids = points(8)

    def count(key, x, ids):
        return smoothing.count_votes(key, linear, x, smoothing.Gaussian(0.3), 50, ids=ids, chunk=16)

    counts = [
        np.asarray(
            parallel.data_parallel(count, mesh(n), backend, in_axes=(None, 0, 0))(key, x, ids)
        )
        for n in (1, 2, 4, 8)
    ]
    assert len(np.unique(np.asarray(counts[0]))) > 3
    for other in counts[1:]:
        np.testing.assert_array_equal(counts[0], other)


def train(backend, devices, norm, objective):
    network = models.network(models.SmallCNN(widths=(4, 4), hidden=8, classes=3, norm=norm))
    init, update = training.step(objective, optax.sgd(0.2, momentum=0.9))
    x = jax.random.uniform(jax.random.key(3), (16, 6, 6, 1))
    y = jnp.arange(16) % 3
    # Uneven shards: two devices of eight hold filler rows only.
    batch = training.batch(x, y, mask=np.arange(16) < 11)
    state = init(jax.random.key(0), network, x[:1])
    if norm and backend != "jit":
        synced = models.SmallCNN(
            widths=(4, 4), hidden=8, classes=3, norm=True, axis_name=parallel.AXIS
        )
        state = dataclasses.replace(state, network=models.network(synced))
    step = parallel.data_parallel(
        update, mesh(devices), backend, in_axes=(None, 0), out_axes=None, donate_argnums=0
    )
    for _ in range(3):
        state, metrics = step(state, batch)
    return jax.device_get((state.params, state.extra, metrics))


@pytest.mark.parametrize(
    ("norm", "devices"),
    [
        (True, 8),
        *(
            pytest.param(norm, devices, marks=pytest.mark.full)
            for norm, devices in ((False, 8), (True, 4), (True, 2))
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_is_that_of_the_global_batch(backend, norm, devices):
    objective = training.Adversarial(attacks.PGD(L2(0.2), steps=2, keep="last"))
    expected = train("jit", 1, norm, objective)
    found = train(backend, devices, norm, objective)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
def test_gradients_are_reduced_once(backend):
    """The mean of local gradients is neither N times too large nor left local."""

    def local(w, x, mask):
        def loss(w, x):
            mean = jnp.sum(jnp.where(mask, w * x, 0.0)) / jnp.maximum(mask.sum(), 1)
            return mean, mean

        (value, aux), grad = parallel.value_and_grad(loss)(w, x, weight=mask.sum())
        return value, aux, grad

    x, mask = jnp.arange(1.0, 9.0), jnp.arange(8) != 2
    split = parallel.data_parallel(local, mesh(4), backend, in_axes=(None, 0, 0), out_axes=None)
    value, aux, grad = split(jnp.float32(3.0), x, mask)
    mean = np.mean(np.asarray(x)[np.asarray(mask)])
    np.testing.assert_allclose(grad, mean, rtol=1e-6)
    np.testing.assert_allclose(value, 3 * mean, rtol=1e-6)
    np.testing.assert_allclose(aux, 3 * mean, rtol=1e-6)


def test_reuse_and_ahead_of_time_compilation(key):
    traces = []

    def double(x):
        traces.append(1)
        return 2 * x

    split = parallel.data_parallel(double, mesh(4))
    for value in (1.0, 2.0):
        np.testing.assert_array_equal(split(jnp.full(8, value)), np.full(8, 2 * value))
    assert len(traces) == 1
    for backend in BACKENDS:
        program = parallel.data_parallel(double, mesh(4), backend).compile(jnp.zeros(8))
        np.testing.assert_array_equal(program(np.arange(8.0, dtype=np.float32)), 2 * np.arange(8.0))


def test_memory_is_what_the_compiler_reports():
    def scaled(x):
        return jnp.sin(x)[:, ::-1] * 2.0

    for devices in (1, 4):
        split = parallel.data_parallel(scaled, mesh(devices))
        compiled = split.compile(np.zeros((64, 1024), np.float32))
        # At least the argument and the result, each device a part of them.
        part = 64 * 1024 * 4 // devices
        assert 2 * part <= compiled.bytes <= 4 * part
    assert 2**20 < parallel.free_memory(mesh(8)) < 2**40
    assert parallel.free_memory(mesh(8)) < parallel.free_memory(mesh(1)) / 4


def test_arrays_travel_whole():
    tree = {"a": np.arange(6.0, dtype=np.float32), "key": jax.random.key(3)}
    copies = parallel.replicate(tree, mesh(4))
    assert len(copies["a"].sharding.device_set) == 4
    assert copies["a"].sharding.is_fully_replicated
    np.testing.assert_array_equal(parallel.fetch(copies["a"]), tree["a"])
    rows = jax.device_put(np.arange(8), jax.sharding.NamedSharding(mesh(4), jax.P(parallel.AXIS)))
    np.testing.assert_array_equal(parallel.fetch({"rows": rows})["rows"], np.arange(8))
    back = parallel.local(copies)
    assert jax.random.key_data(back["key"]).tolist() == [0, 3]
    assert parallel.is_main()
    assert [parallel.agree(flag) for flag in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parallel.mesh([]), "at least one device"),
        (lambda: parallel.data_parallel(lambda x: x, mesh(2), "thread"), "backend must be"),
        (lambda: parallel.data_parallel(lambda x: x, mesh(2), in_axes=(1,)), "in_axes"),
        (lambda: parallel.data_parallel(lambda x: x, mesh(2))(jnp.zeros(3)), "multiple"),
        (lambda: parallel.data_parallel(lambda x: x, mesh(2))(jnp.float32(0)), "multiple"),
        (
            lambda: parallel.data_parallel(
                lambda x: x, jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
            ),
            "one axis",
        ),
    ],
)
def test_mistakes_get_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# JAX's own kind of mesh since 0.9: arrays carry in their types how they are split.
EXPLICIT = jax.make_mesh((8,), ("data",))


def split(tree):
    return jax.tree.map(
        lambda a: jax.device_put(a, jax.NamedSharding(EXPLICIT, jax.P("data"))), tree
    )


def copied(tree):
    return jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(EXPLICIT, jax.P())), tree)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def small(key, x):
    network = models.network(models.SmallCNN(widths=(2,), classes=3, hidden=4, norm=True))
    return network, network.bind(*network.init(key, x[:1]))


@pytest.mark.parametrize(
    "context",
    [pytest.param(False, marks=pytest.mark.full, id="arrays"), pytest.param(True, id="set_mesh")],
)
def test_explicit_meshes_split_attacks_and_votes(key, context):
    x, y, _ = points(16)
    model = jax.tree_util.Partial(
        lambda w, v: jnp.tanh(v) @ w, jnp.sin(jnp.arange(36.0)).reshape(12, 3)
    )
    attack, noise = attacks.PGD(Linf(0.05), steps=3), smoothing.Gaussian(0.4)

    def pairs(model, x):
        return smoothing.count_disagreements(key, model, lambda v: model(v - 0.1), x, noise, 40)

    def votes(model, x):
        start = jnp.uint32(2**31 + 5)
        return smoothing.count_votes(key, model, x, noise, 40, start=start, chunk=8)

    def found(model, x, y):
        result = run(attack, key, model, x, y)
        swept = sweep(attack, key, model, x, y, [0.02, 0.05])
        # A closure over arrays that carry how they are split.
        near = jax.jit(lambda model, x, y: attack(key, lambda v: model(v), x, y))(model, x, y)
        return result, near, swept.success, votes(model, x), jax.jit(pairs)(model, x)

    expected = found(model, x, y)
    assert 0 < np.mean(expected[0].success) < 1
    assert len(np.unique(np.asarray(expected[-2]))) > 3
    with jax.set_mesh(EXPLICIT) if context else contextlib.nullcontext():
        result, near, swept, *counts = found(copied(model), split(x), split(y))
        assert all(jax.typeof(leaf).sharding.spec[0] == "data" for leaf in (*result, *counts))
        assert jax.typeof(swept).sharding.spec == jax.P(None, "data")
        hosted = run(attacks.SimBA(L2(0.5), queries=3), key, drive.Host(model), split(x), y)
        assert np.all(np.isfinite(hosted.x + split(x)))
    for one in (result, near):
        np.testing.assert_allclose(one.x, expected[0].x, atol=1e-5)
        assert_equal(one.success, expected[0].success)
    assert_equal((swept, *counts), expected[2:])


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.full)])
def test_explicit_meshes_split_training(key, accumulate):
    """Weights too, which come back as they were split."""
    x, y, _ = points(16)
    network = models.network(models.MLP((8,), 3))
    objective = training.Adversarial(attacks.PGD(L2(0.2), steps=2, keep="last"))
    init, update = training.step(objective, optax.sgd(0.1, 0.9), accumulate=accumulate)
    state, batch = init(key, network, x), training.batch(x, y)

    def placed(leaf):
        axes = ["data" if n % 8 == 0 else None for n in leaf.shape]
        return jax.device_put(leaf, jax.NamedSharding(EXPLICIT, jax.P(*axes)))

    there = jax.tree.map(placed, state)
    assert any("data" in jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(there.params))
    expected, metrics = jax.jit(update)(state, batch)
    found, measured = jax.jit(update)(there, split(batch))
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(found)):
        assert jax.typeof(a) == jax.typeof(b)
    for a, b in zip(
        *(
            jax.tree.leaves((s.params, s.extra, m))
            for s, m in ((expected, metrics), (found, measured))
        )
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_meshes_in_data_parallel(key, backend):
    x = jax.random.uniform(key, (16, 12))
    split_fn = parallel.data_parallel(linear, EXPLICIT, backend)
    np.testing.assert_allclose(split_fn(split(x)), linear(x), rtol=1e-5)
    with jax.set_mesh(EXPLICIT):
        # Programs over other devices, and results that go on in the context.
        here = split_fn(x)
        np.testing.assert_allclose(here + split(linear(x)), 2 * linear(x), rtol=1e-5)
        two = parallel.data_parallel(linear, mesh(2), backend)
        np.testing.assert_array_equal(np.asarray(two.compile(x)(x)), two(x))


def test_loops_run_whatever_mesh_is_set(key):
    x, y = np.float32(jax.random.uniform(key, (20, 6, 6, 1))), np.arange(20) % 3
    train, test = data.Dataset(x, y), data.Dataset(x, y, np.arange(20) + 100)
    network, model = small(key, x)
    attack, noise = attacks.PGD(Linf(0.1), steps=2), smoothing.Gaussian(0.4)

    def whole(model, **options):
        fitted = loops.fit.iter(
            key, network, training.Standard(), optax.sgd(0.1), train, epochs=2, batch_size=8,
            validation=test, **options,
        )  # fmt: skip
        *_, event = fitted
        options |= {"batch_size": 8, "progress": False}
        evaluated = loops.evaluate(
            key, model, test, {"z": attack, "a": attack}, checks=False, **options
        )
        certified = loops.certify(key, model, test, noise, n0=10, n=50, **options)
        assert evaluated.attacks == ("z", "a")
        return event, evaluated.x, certified.estimate_counts, certified.certificate.radius

    expected = whole(model)
    with jax.set_mesh(EXPLICIT):
        event, *found = whole(copied(model), mesh=EXPLICIT)
        for weights in (event.state.params, event.report.best[0]):
            sums = jax.tree.map(lambda a: jnp.sum(a + 1), weights)
            assert all(map(np.isfinite, jax.tree.leaves(jax.device_get(sums))))
        assert jax.typeof(event.report.model(split(x[:16]))).sharding.spec[0] == "data"
        assert jax.sharding.get_mesh() == EXPLICIT
    assert_equal((event.state.params, *found), (expected[0].state.params, *expected[1:]))
