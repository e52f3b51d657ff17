"""nnx modules through the same four functions as Linen ones, and bridges between the two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jrobust
from jrobust import attacks, models, training
from jrobust.threat import Linf

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(7), (6, 8))
IMAGES = X.reshape(6, 2, 4, 1)


def differ(a, b):
    return bool(jnp.abs(a - b).max() > 1e-3)


class Net(nnx.Module):
    """Batch-norm before two dropouts; a list, a shared layer and a sown value."""

    def __init__(self, width=8, rate=0.5, *, rngs):
        self.layers = nnx.List(
            [nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.drop1 = nnx.Dropout(rate, rngs=rngs)
        self.drop2 = nnx.Dropout(rate, rngs=rngs)
        self.tied = self.layers[1]
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.layers[0](x))
        self.sow(nnx.Intermediate, "after", x)
        x = self.drop2(self.drop1(x))
        return self.head(self.tied(nnx.relu(self.layers[1](x))))


def made(**keywords):
    return Net(**keywords, rngs=nnx.Rngs(3))


def values(module):
    """What the module holds, random streams included, as NumPy arrays by path."""
    out = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = variable.get_value()
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        out[path] = np.array(value)
    return out


class Argument(nnx.Module):
    """Its modes are arguments of the call, and so are its random streams."""

    def __init__(self, *, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x, train, rngs):
        x = self.norm(self.dense(x), use_running_average=not train)
        return self.head(self.drop(x, deterministic=not train, rngs=rngs))


class Field(nnx.Module):
    """Its mode is an attribute of a submodule."""

    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.training = True
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.streams = rngs

        def __call__(self, x):
            x = self.norm(x)
            noise = jax.random.normal(self.streams.noise(), x.shape) if self.training else 0.0
            return x + noise

    def __init__(self, *, rngs):
        self.inner = Field.Inner(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.inner(x))


SWITCHED = {
    "view": models.network(made()),
    "argument": models.network(Argument),
    "attribute": models.network(Field),
    "bridge": models.network(nnx.bridge.ToLinen(Net, kwargs={"width": 16})),
}


@pytest.fixture(params=SWITCHED, scope="module")
def switched(request):
    network = SWITCHED[request.param]
    return network, *jax.jit(network.init)(KEY, X)


def test_evaluation_mode(switched):
    network, params, extra = switched
    logits = network.logits(params, extra, X)
    assert logits.shape == (6, 3)
    np.testing.assert_array_equal(network.logits(params, extra, X), logits)
    alone = jnp.concatenate([network.logits(params, extra, X[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(alone, logits, rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a: a + 1.0, extra)
    assert differ(network.logits(params, moved, X), logits)


def test_training_mode(switched):
    network, params, extra = switched
    train = jax.jit(network.train_logits)
    logits, new = train(params, extra, KEY, X)
    again, _ = train(params, extra, KEY, X)
    other, other_new = train(params, extra, jax.random.key(1), X)
    np.testing.assert_array_equal(logits, again)  # no state of a stream leaks into the next pass
    assert differ(logits, other)
    assert jax.tree.structure(new) == jax.tree.structure(extra)
    assert set(new) == {"batch_stats"}
    for a, b, c in zip(*map(jax.tree.leaves, (extra, new, other_new))):
        assert differ(a, b)
        np.testing.assert_allclose(b, c, rtol=1e-5)
    unmoved, _ = train(params, jax.tree.map(lambda a: a + 1.0, extra), KEY, X)
    np.testing.assert_allclose(unmoved, logits, rtol=1e-4, atol=1e-5)


def test_running_averages_are_those_of_the_batch():
    """One step of momentum 0.9 from (0, 1), in closed form; and parameters by path."""
    network = models.network(made())
    params, extra = network.init(KEY, X)
    before = X @ params["layers"]["0"]["kernel"]  # biases start at zero
    _, new = network.train_logits(params, extra, KEY, X)
    stats = new["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * before.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * before.var(0), rtol=1e-4)
    assert set(params) == {"layers", "norm", "head"}, "a shared layer is there once"


def test_each_dropout_has_its_own_mask():
    class Masks(nnx.Module):
        def __init__(self, *, rngs):
            self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return jnp.concatenate([drop(x) for drop in self.drops], -1)

    x = jnp.ones((32, 32))
    logits, _ = models.network(Masks).train_logits({}, {}, KEY, x)
    first, second = jnp.split(logits, 2, -1)
    assert jnp.mean(first == second) < 0.6  # 1024 fair coins agree
    assert abs(float(jnp.mean(first)) - 1.0) < 0.2


def test_the_module_is_never_touched_and_later_changes_do_not_matter():
    module = made()
    before = values(module)
    network, bound = models.network(module), models.bind(module)
    params, extra = network.init(KEY, X)
    logits = bound(X)
    network.train_logits(params, extra, KEY, X)
    network.features(params, extra, X)
    after = values(module)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert not module.drop1.deterministic
    assert type(module.head) is nnx.Linear
    view = nnx.view(module, deterministic=True, use_running_average=True)
    np.testing.assert_allclose(logits, nnx.capture(view, nnx.Intermediate)(X)[0], rtol=1e-6)
    module.head.kernel.set_value(module.head.kernel.get_value() * 2)
    module.drop1.deterministic = True
    np.testing.assert_array_equal(bound(X), logits)
    np.testing.assert_array_equal(network.bind(*network.init(KEY, X))(X), logits)
    assert differ(models.bind(module)(X), logits)


def test_in_place_changes_do_not_reach_a_bound_model():
    class Numpy(nnx.Module):
        def __init__(self):
            self.mean = np.zeros(8, np.float32)
            self.w = nnx.Param(np.ones((8, 3), np.float32))

        def __call__(self, x):
            return (x - self.mean[None]) @ self.w

    module = Numpy()
    bound = models.bind(module)
    module.mean += 1.0
    module.w.get_value()[:] = 5.0
    np.testing.assert_allclose(bound(X), X @ np.ones((8, 3)), rtol=1e-6)
    assert set(bound.extra) == {"arrays"}


def test_compiled_once():
    """New parameters, equal modules and factories: one trace. Another module: another."""
    traces = []

    class Counting(nnx.Module):
        def __init__(self, width=4, *, rngs):
            self.width = width
            self.dense = nnx.Linear(8, width, rngs=rngs)

        def __call__(self, x):
            traces.append(self.width)
            return self.dense(x)

    a, b = (Counting(rngs=nnx.Rngs(i)) for i in range(2))
    calls = jax.jit(lambda logits_fn, x: logits_fn(x))
    np.testing.assert_allclose(calls(models.bind(a), X), a(X), rtol=1e-6)
    traces.clear()
    second = calls(models.bind(b), X)
    factory = models.network(functools.partial(Counting, 4))
    calls(factory.bind(*factory.init(KEY, X)), X)
    calls(models.bind(b, {"params": models.bind(a).params}), X)
    assert traces == []
    np.testing.assert_allclose(second, b(X), rtol=1e-6)
    traces.clear()
    calls(models.bind(Counting(5, rngs=nnx.Rngs(0))), X)
    assert traces == [5]
    # Networks are values: of the same arrays, and of the same constructor.
    assert models.network(a) == models.network(a)
    assert models.network(a) != models.network(b)
    assert factory == models.network(functools.partial(Counting, 4))
    assert factory != models.network(functools.partial(Counting, 5))
    assert hash(factory.logits) == hash(models.network(a).logits)
    assert jax.tree.leaves(models.network(a)) == []
    assert len(repr(factory.logits)) < 200


def test_parameters_as_an_nnx_state():
    """Also where the module writes to its parameters in a call, which stays in that call."""

    class Normed(nnx.Module):
        def __init__(self, *, rngs):
            self.net = Net(rngs=rngs)
            self.head = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            kernel = self.head.kernel.get_value()
            self.head.kernel.set_value(kernel / jnp.linalg.norm(kernel))
            return self.head(self.net(x))

    module = Normed(rngs=nnx.Rngs(0))
    network = models.network(module)
    params, extra = network.init(KEY, X)

    def loss(params):
        logits, new = network.train_logits(params, extra, KEY, X)
        return jnp.sum(logits**2), new

    state = nnx.state(module, nnx.Param)
    grads, new = jax.grad(loss, has_aux=True)(state)
    expected, expected_new = jax.grad(loss, has_aux=True)(params)
    assert jax.tree.structure(grads) == jax.tree.structure(state)
    assert differ(grads["net"]["head"]["kernel"], 0.0)
    for a, b in zip(jax.tree.leaves((grads, new)), jax.tree.leaves((expected, expected_new))):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(network.logits(state, extra, X), network.logits(params, extra, X))
    np.testing.assert_array_equal(params["head"]["kernel"], state["head"]["kernel"])


def test_init():
    factory = models.network(functools.partial(Net, 8))
    a, b = factory.init(KEY, X), factory.init(jax.random.key(1), X)
    assert differ(a[0]["head"]["kernel"], b[0]["head"]["kernel"])
    expected = models.bind(Net(8, rngs=nnx.Rngs(KEY)))
    jax.tree.map(np.testing.assert_array_equal, a, (expected.params, expected.extra))
    # A module is where training starts; its arrays survive the donation of what init returned.
    module = made()
    network = models.network(module)
    start = jax.jit(network.init)(KEY, X)
    bound = models.bind(module)
    jax.tree.map(np.testing.assert_array_equal, start, (bound.params, bound.extra))
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(jnp.sin, t), donate_argnums=0)(start))
    bound(X)
    eager = network.init(KEY, X)
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(jnp.sin, t), donate_argnums=0)(eager))
    bound(X)


def test_training_and_attacking():
    """What the rest of the library does with a network, compiled once."""
    network = models.network(functools.partial(Net, 8, 0.1))
    attack = attacks.PGD(Linf(0.1), steps=2, keep="last")
    init, update = training.step(training.Adversarial(attack), optax.adam(1e-2))
    state = init(KEY, network, X)
    update = jax.jit(update, donate_argnums=0)
    y = (X[:, 0] > 0.5).astype(jnp.int32)
    before = np.array(state.extra["batch_stats"]["norm"]["mean"])
    losses = []
    for _ in range(30):
        state, metrics = update(state, training.batch(X, y))
        losses.append(float(metrics["loss"]))
    assert update._cache_size() == 1
    assert losses[-1] < 0.5 * losses[0]
    assert differ(state.extra["batch_stats"]["norm"]["mean"], before)
    model = network.bind(state.params, state.extra)
    found = jrobust.run(attacks.PGD(Linf(0.5), steps=3), KEY, model, X, y)
    assert found.success.any()


def test_batch_norm_over_a_mapped_axis():
    class Norm(nnx.Module):
        def __init__(self, axis_name=None, *, rngs):
            self.norm = nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    whole, halves = (models.network(functools.partial(Norm, a)) for a in (None, "data"))
    params, extra = whole.init(KEY, X)
    logits, new = whole.train_logits(params, extra, KEY, X)
    split, split_new = jax.vmap(
        lambda x: halves.train_logits(params, extra, KEY, x), axis_name="data"
    )(X.reshape(2, 3, 8))
    np.testing.assert_allclose(split.reshape(6, 8), logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(split_new)):
        np.testing.assert_allclose(b[0], a, rtol=1e-4, atol=1e-6)


def test_all_kinds_of_variables():
    class Count(nnx.Variable):
        pass

    class Kinds(nnx.Module):
        def __init__(self, *, rngs):
            self.lora = nnx.LoRA(8, 2, 3, rngs=rngs)
            self.count = Count(jnp.zeros((), jnp.int32))
            self.cache = nnx.Cache(jnp.ones((1, 3)))
            self.shift = jnp.ones((1, 3))
            self.seen = nnx.Intermediate((jnp.ones(3),))

        def __call__(self, x):
            self.count[...] += 1
            return self.lora(x) + self.cache + self.shift

    network = models.network(Kinds(rngs=nnx.Rngs(0)))
    params, extra = jax.tree.map(lambda a: a + 1, network.init(KEY, X))
    assert set(params["lora"]) == {"lora_a", "lora_b"}
    assert set(extra) == {"Count", "cache", "arrays"}
    _, new = jax.jit(network.train_logits)(params, extra, KEY, X)
    assert new["Count"]["count"] == 2
    logits = network.logits(params, new, X)
    expected = X @ params["lora"]["lora_a"] @ params["lora"]["lora_b"] + 4.0
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    low = network.bind(params, extra, dtype=jnp.bfloat16)
    assert low.extra["Count"]["count"].dtype == jnp.int32
    assert 0 < jnp.abs(low(X) - logits).max() < 0.1


def test_a_type_of_ones_own_is_read_once():
    """Its `get_value` belongs to the module's pass; its name may have been another's before."""

    def made():
        class Positive(nnx.Param):
            def get_value(self, **options):
                return jax.nn.softplus(super().get_value(**options))

        class Shift(nnx.Variable):
            pass

        class Own(nnx.Module):
            def __init__(self):
                self.w = Positive(jnp.ones((8, 3)))
                self.shift = Shift(jnp.ones((1, 3)))

            def __call__(self, x):
                return x @ self.w + self.shift

        return Own()

    for module in (made(), made()):  # as in a cell of a notebook that is run again
        bound = models.bind(module)
        np.testing.assert_allclose(bound(X), module(X), rtol=1e-6)
        np.testing.assert_array_equal(bound.params["w"], 1.0)
        assert set(bound.extra) == {"Shift"}


def test_a_switch_that_is_a_default_of_the_class():
    class Default(nnx.Module):
        training = True

        def __init__(self, *, rngs):
            self.norm = nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x):
            return self.norm(x, use_running_average=not self.training)

    network = models.network(Default)
    params, extra = network.init(KEY, X)
    np.testing.assert_allclose(
        network.logits(params, extra, X[:1]), network.logits(params, extra, X)[:1], rtol=1e-6
    )
    assert differ(network.train_logits(params, extra, KEY, X)[0], network.logits(params, extra, X))
    assert Default.training


def test_scanned_layers_with_random_streams():
    """Streams pass through a scan in evaluation too; only what reaches the logits counts."""

    class Block(nnx.Module):
        def __init__(self, *, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(jnp.tanh(self.dense(x)))

    class Deep(nnx.Module):
        def __init__(self, *, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def layers(rngs):
                return Block(rngs=rngs)

            self.layers = layers(rngs)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return layer(x)

            return self.head(run(self.layers, x))

    network = models.network(Deep)
    params, extra = network.init(KEY, X)
    h = X
    for i in range(3):
        dense = jax.tree.map(lambda a, i=i: a[i], params["layers"]["dense"])
        h = jnp.tanh(h @ dense["kernel"])
    expected = h @ params["head"]["kernel"]
    np.testing.assert_allclose(network.logits(params, extra, X), expected, rtol=1e-5, atol=1e-6)
    assert differ(
        network.train_logits(params, extra, KEY, X)[0],
        network.train_logits(params, extra, jax.random.key(1), X)[0],
    )
    assert set(network.features(params, extra, X)) == {"head"}


class Noisy(nnx.Module):
    def __init__(self, *, rngs):
        self.streams = rngs

    def __call__(self, x):
        return x[:, :3] + jax.random.normal(self.streams.noise(), (x.shape[0], 3))


class Grows(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        self.new = nnx.Variable(jnp.ones(()))
        return x * self.w


class Holds(nnx.Module):
    def __init__(self, what):
        self.what = what

    def __call__(self, x):
        return x


class Silent(nnx.Module):
    pass


class Raw(nnx.Module):
    def __init__(self, rngs):
        self.mean = jnp.ones(8)

    def __call__(self, x):
        return x - self.mean[None]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: models.bind(Noisy(rngs=nnx.Rngs(0)))(X), ValueError, "draws random numbers in ev"),
        (
            lambda: models.network(Grows()).train_logits({"w": jnp.ones(())}, {}, KEY, X),
            ValueError,
            "made or dropped variables",
        ),
        (lambda: models.network(Holds({"a": 1})), TypeError, "cannot be hashed"),
        (lambda: models.bind(Holds(nnx.Variable((X, X)))), TypeError, "what holds tuple"),
        (lambda: models.bind(Silent()), TypeError, "Silent has no __call__"),
        (lambda: models.network(Raw), TypeError, r"self\.mean = nnx\.Variable"),
        (lambda: models.network(lambda rngs: 3), TypeError, "must return an nnx module, got int"),
        (lambda: models.network(functools.partial(Net, [8])), TypeError, "cannot be hashed"),
        (lambda: models.bind(functools.partial(Net, 8)), TypeError, "bind needs the variables"),
        (
            lambda: models.bind(made(), {"params": {"head": {}}})(X),
            ValueError,
            r"needs the variable params/head/bias of shape \(3,\), got none",
        ),
        (
            lambda: models.bind(made(width=4), {"params": models.bind(made()).params})(X),
            ValueError,
            r"head/kernel of shape \(4, 3\), got one of shape \(8, 3\)",
        ),
        (
            lambda: models.network(lambda rngs: nnx.bridge.ToNNX(models.MLP(), rngs=rngs)),
            TypeError,
            "pass the Linen module MLP",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


# features


def test_features_by_name():
    network = models.network(made())
    params, extra = network.init(KEY, X)
    features = jax.jit(network.features)(params, extra, X)
    shapes = {name: a.shape for name, a in features.items()}
    assert shapes == {
        "layers/0": (6, 8),
        "norm": (6, 8),
        "after": (6, 8),
        "drop1": (6, 8),
        "drop2": (6, 8),
        "layers/1/0": (6, 8),
        "layers/1/1": (6, 8),
        "head": (6, 3),
    }
    np.testing.assert_allclose(features["head"], network.logits(params, extra, X), rtol=1e-5)
    np.testing.assert_array_equal(features["after"], features["norm"])
    np.testing.assert_array_equal(features["norm"], features["drop2"])  # evaluation mode
    first = X @ params["layers"]["0"]["kernel"]
    np.testing.assert_allclose(features["layers/0"], first, rtol=1e-5, atol=1e-6)
    # Differentiable in x: the Jacobian of the first layer is its kernel.
    jacobian = jax.jacobian(lambda x: network.features(params, extra, x[None])["layers/0"][0])(X[0])
    np.testing.assert_allclose(jacobian, params["layers"]["0"]["kernel"].T, rtol=1e-5)


def test_features_of_subclasses_and_transformations():
    """Calls inherited from a base class count; calls inside of a transformation cannot be seen."""

    class Mine(nnx.Linear):
        pass

    class Outer(nnx.Module):
        def __init__(self, *, rngs):
            self.mine = Mine(8, 8, rngs=rngs)
            self.inside = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            assert isinstance(self.mine, Mine)
            return jax.checkpoint(lambda x: self.inside(x))(self.mine(x))

    network = models.network(Outer)
    params, extra = network.init(KEY, X)
    assert set(jax.jit(network.features)(params, extra, X)) == {"mine"}


def test_summary():
    module = made()
    summary = models.summary(models.network(functools.partial(Net, 8)), X)
    assert summary == models.summary(models.bind(module), X)
    assert summary.parameters == (8 * 8 + 8) * 2 + 16 + (8 * 3 + 3)
    assert (summary.extra, summary.logits) == (16, (6, 3))
    bound = models.bind(module)
    state = {"params": nnx.state(module, nnx.Param), **bound.extra}
    assert summary == models.summary(models.bind(module, state), X)
    assert [layer.name for layer in summary.layers if layer.parameters] == [
        "layers/0",
        "norm",
        "layers/1/0",
        "head",
    ]


# bridges


def test_a_bridged_reference_network():
    """One definition: the Linen network, seen from nnx, computes and trains the same."""
    module = models.SmallCNN(widths=(4,), classes=3, hidden=8, norm=True, dropout=0.3)
    linen = models.network(module)
    bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(5)).lazy_init(IMAGES)
    network, bound = models.network(bridged), models.bind(bridged)
    np.testing.assert_allclose(bound(IMAGES), bridged(IMAGES), rtol=1e-5, atol=1e-6)
    params, extra = network.init(KEY, IMAGES)
    shapes = jax.tree.map(jnp.shape, linen.init(KEY, IMAGES))
    assert jax.tree.map(jnp.shape, (params, extra)) == shapes
    assert linen.logits == network.logits, "and they share their compilation"
    logits, new = network.train_logits(params, extra, KEY, IMAGES)
    expected, expected_new = linen.train_logits(params, extra, KEY, IMAGES)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, new, expected_new)
    assert set(network.features(params, extra, IMAGES)) > {"conv1", "norm1", "dense", "head"}
    # Without variables of its own it is a Linen module that draws some.
    fresh = nnx.bridge.ToNNX(module)
    assert models.network(fresh) == linen
    with pytest.raises(TypeError, match="bind needs the variables of ToNNX"):
        models.bind(fresh)


def test_a_reference_network_inside_of_an_nnx_module():
    class Outer(nnx.Module):
        def __init__(self, *, rngs):
            inner = nnx.bridge.ToNNX(models.MLP((5,), 4), rngs=rngs)
            self.inner = nnx.bridge.lazy_init(inner, jnp.ones((1, 8)))
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.inner(x))

    module = Outer(rngs=nnx.Rngs(0))
    bound = models.bind(module)
    np.testing.assert_allclose(bound(X), module(X), rtol=1e-6)
    linen = models.bind(models.MLP((5,), 4), {"params": bound.params["inner"]})
    head = bound.params["head"]["kernel"]
    np.testing.assert_allclose(bound(X), linen(X) @ head, rtol=1e-5, atol=1e-6)
    features = models.network(module).features(bound.params, bound.extra, X)
    assert set(features) == {"inner", "head"}


def test_a_linen_view_of_an_nnx_module():
    module = nnx.bridge.ToLinen(Field)
    variables = module.init({"params": KEY, "noise": KEY}, X)
    assert isinstance(module, nn.Module)
    bound = models.bind(module, variables)
    native = Field(rngs=nnx.Rngs(0))
    alone = models.bind(native, dict(variables))
    np.testing.assert_array_equal(bound(X), alone(X))
    assert bound.logits == models.bind(native).logits
    # In a call of the view itself batch-norm mixes the rows; what is bound does not.
    np.testing.assert_allclose(bound(X[:1]), bound(X)[:1], rtol=1e-5, atol=1e-6)


def test_boxes_around_variables_are_opened():
    """Those of a bridge around types of one's own, and of nn.with_partitioning."""

    class Seen(nnx.BatchStat):
        pass

    class Own(nnx.Module):
        def __init__(self, *, rngs):
            self.head = nnx.Linear(8, 3, rngs=rngs)
            self.seen = Seen(jnp.ones((1, 3)), note="kept")

        def __call__(self, x):
            return self.head(x) + self.seen

    module = nnx.bridge.ToLinen(Own)
    variables = module.init(KEY, X)
    assert jax.tree.structure(variables) != jax.tree.structure(nn.unbox(variables))
    bound = models.bind(module, variables)
    np.testing.assert_allclose(bound(X), module.apply(variables, X), rtol=1e-6)

    class Split(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(3, kernel_init=kernel_init, name="head")(x)

    variables = Split().init(KEY, X)
    network, bound = models.network(Split()), models.bind(Split(), variables)
    np.testing.assert_allclose(bound(X), Split().apply(variables, X), rtol=1e-6)
    assert jax.tree.map(jnp.shape, bound.params) == {"head": {"bias": (3,), "kernel": (8, 3)}}
    assert jax.tree.structure(network.init(KEY, X)[0]) == jax.tree.structure(bound.params)
    (layer,) = models.summary(network, X).layers
    assert layer == ("head", (6, 3), {"bias": (3,), "kernel": (8, 3)}, 27)


def test_a_linen_view_with_a_list_of_layers():
    class Layers(nnx.Module):
        def __init__(self, *, rngs):
            self.body = nnx.Sequential(nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs))

        def __call__(self, x):
            return self.body(x)

    module = nnx.bridge.ToLinen(Layers)
    variables = module.init(KEY, X)
    np.testing.assert_allclose(
        models.bind(module, variables)(X), module.apply(variables, X), rtol=1e-6
    )
