"""Models as pure functions: evaluation mode, no retraces, float32 logits, exact architectures."""

import functools
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze

from jrobust import models
from jrobust.data import digits

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(7), (6, 8, 8, 1))


def scaled(tree, factor):
    return jax.tree.map(lambda a: a * factor, tree)


def differ(a, b):
    return bool(jnp.abs(a - b).max() > 1e-3)


def flag_module(flag):
    """A module with batch-norm and dropout whose switch has the given name."""
    evaluation = flag in ("deterministic", "use_running_average")

    def forward(self, x, on):
        x = x.reshape(x.shape[0], -1)
        x = nn.BatchNorm(on == evaluation if evaluation else not on)(nn.Dense(16)(x))
        x = nn.Dropout(0.5, deterministic=on == evaluation if evaluation else not on)(x)
        return nn.Dense(3)(x)

    scope = {"nn": nn, "forward": forward}
    exec(
        "class M(nn.Module):\n"
        "    @nn.compact\n"
        f"    def __call__(self, x, {flag}):\n"
        f"        return forward(self, x, {flag})\n",
        scope,
    )
    return scope["M"]()


class FieldSwitch(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(not self.train)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not self.train)(x))


class TwoSwitches(nn.Module):
    """Dropout and batch-norm switched apart."""

    @nn.compact
    def __call__(self, x, deterministic=False, use_running_average=False):
        x = nn.BatchNorm(use_running_average)(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(x))


SWITCHED = {
    **{
        flag: flag_module(flag)
        for flag in ("train", "training", "is_training", "deterministic", "use_running_average")
    },
    "field": FieldSwitch(),
    "two": TwoSwitches(),
    "SmallCNN": models.SmallCNN(widths=(4, 4), classes=3, hidden=8, norm=True, dropout=0.5),
}


@pytest.fixture(params=SWITCHED, scope="module")
def switched(request):
    network = models.network(SWITCHED[request.param])
    return network, *jax.jit(network.init)(KEY, X)


def test_evaluation_mode(switched):
    network, params, extra = switched
    logits = network.logits(params, extra, X)
    assert logits.shape == (6, 3)
    # Rows are independent (batch statistics would mix them), and nothing is dropped.
    alone = jnp.concatenate([network.logits(params, extra, X[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(alone, logits, rtol=1e-5, atol=1e-5)
    # Running averages are used: other averages, other logits.
    moved = jax.tree.map(lambda a: a + 1.0, extra)
    assert differ(network.logits(params, moved, X), logits)


def test_training_mode(switched):
    network, params, extra = switched
    logits, new = network.train_logits(params, extra, KEY, X)
    again, _ = network.train_logits(params, extra, KEY, X)
    other, other_new = network.train_logits(params, extra, jax.random.key(1), X)
    np.testing.assert_array_equal(logits, again)
    assert differ(logits, other)  # dropout is drawn from the key
    assert jax.tree.structure(new) == jax.tree.structure(extra)
    for name in ("mean", "var"):  # batch-norm stands before dropout in all of these
        before, after, otherwise = (
            [a for path, a in jax.tree_util.tree_leaves_with_path(t) if name in str(path)]
            for t in (extra, new, other_new)
        )
        assert before
        for a, b, c in zip(before, after, otherwise):
            assert differ(a, b)
            np.testing.assert_allclose(b, c, rtol=1e-5)
    # Batch statistics are used, so the running ones do not matter.
    moved = jax.tree.map(lambda a: a + 1.0, extra)
    unmoved, _ = network.train_logits(params, moved, KEY, X)
    np.testing.assert_allclose(unmoved, logits, rtol=1e-5, atol=1e-5)


def test_running_averages_are_those_of_the_batch():
    """One step of momentum 0.9 from (0, 1), in closed form."""
    network = models.network(models.SmallCNN(widths=(4,), classes=3, hidden=8, norm=True))
    params, extra = network.init(KEY, X)
    _, new = network.train_logits(params, extra, KEY, X)
    kernel = params["conv1"]["kernel"]
    before = jax.lax.conv_general_dilated(
        X, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = new["batch_stats"]["norm1"]
    mean, var = before.mean((0, 1, 2)), before.var((0, 1, 2))
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)


def test_frozen_variables():
    """As older checkpoints have them."""
    network = models.network(FieldSwitch())
    params, extra = network.init(KEY, X)
    frozen = freeze(params), freeze(extra)
    logits, new = network.train_logits(*frozen, KEY, X)
    assert jax.tree.structure(new) == jax.tree.structure(frozen[1])
    expected, plain = network.train_logits(params, extra, KEY, X)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, new.unfreeze(), plain)
    bound = models.bind(FieldSwitch(), freeze({"params": params, **extra}))
    np.testing.assert_array_equal(bound(X), network.logits(params, extra, X))


def test_module_without_a_switch_or_other_collections():
    network = models.network(models.MLP((5,), 3))
    params, extra = network.init(KEY, X)
    assert extra == {}
    logits, new = network.train_logits(params, extra, KEY, X)
    assert new == {}
    np.testing.assert_array_equal(logits, network.logits(params, extra, X))


def test_dropout_that_cannot_be_switched_off_is_not_hidden():
    class Always(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))

    x = X.reshape(6, -1)
    variables = Always().init({"params": KEY, "dropout": KEY}, x)
    with pytest.raises(Exception, match="dropout"):
        models.bind(Always(), variables)(x)


def test_streams_of_other_names_draw_from_the_key():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            noise = jax.random.normal(self.make_rng("noise"), x.shape) if train else 0.0
            return nn.Dropout(0.5, deterministic=not train)(x) + noise

    network = models.network(Noisy())
    x = jnp.zeros((6, 64))
    noise = [network.train_logits({}, {}, jax.random.key(i), x)[0] for i in (0, 0, 1)]
    np.testing.assert_array_equal(noise[0], noise[1])
    assert abs(jnp.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.2
    np.testing.assert_array_equal(network.logits({}, {}, x), x)


def test_growing_collections_are_refused():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "l2", (x**2).sum())
            return nn.Dense(3)(x)

    network = models.network(Sower())
    x = X.reshape(6, -1)
    params, extra = network.init(KEY, x)
    with pytest.raises(ValueError, match="drop the sown collection from extra"):
        network.train_logits(params, extra, KEY, x)
    network.train_logits(params, {}, KEY, x)


# bind


def counting_module():
    """A module class that counts how often its forward pass is traced."""
    traces = []

    class Counting(nn.Module):
        width: int = 4

        @nn.compact
        def __call__(self, x, train=False):
            traces.append(self.width)
            x = nn.BatchNorm(not train)(nn.Dense(self.width)(x.reshape(x.shape[0], -1)))
            return nn.Dense(3)(x)

    return Counting, traces


def test_a_bound_model_is_an_argument():
    module, traces = counting_module()
    variables = module().init(KEY, X)
    calls = jax.jit(lambda logits_fn, x: logits_fn(x))
    traces.clear()
    first = calls(models.bind(module(), variables), X)
    np.testing.assert_allclose(first, module().apply(variables, X), rtol=1e-6)
    # New variables, an equal module, the same from a Network, NumPy variables: one trace.
    traces.clear()
    second = calls(models.bind(module(), scaled(variables, 2.0)), X)
    np.testing.assert_allclose(second, module().apply(scaled(variables, 2.0), X), rtol=1e-6)
    traces.clear()
    network = models.network(module())
    extra = {"batch_stats": variables["batch_stats"]}
    calls(network.bind(variables["params"], extra), X)
    calls(models.bind(module(), jax.tree.map(np.asarray, variables)), X)
    assert traces == []
    # Another module is another program.
    calls(models.bind(module(5), module(5).init(KEY, X)), X)
    assert 5 in traces


def test_the_variables_are_the_leaves():
    module = models.SmallCNN(widths=(4, 4), classes=3, hidden=8, norm=True)
    variables = module.init(KEY, X)
    bound = models.bind(module, variables)
    leaves, tree = jax.tree.flatten(bound)
    assert len(leaves) == len(jax.tree.leaves(variables))
    assert {id(a) for a in leaves} == {id(a) for a in jax.tree.leaves(variables)}
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again(X), bound(X))
    hash(tree)
    # Gradients with respect to it, and a batch of models.
    grads = jax.jit(jax.grad(lambda bound: (bound(X) ** 2).sum()))(bound)
    assert differ(grads.params["head"]["kernel"], jnp.zeros_like(grads.params["head"]["kernel"]))
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), bound)
    both = jax.jit(jax.vmap(lambda bound: bound(X)))(stacked)
    np.testing.assert_allclose(both[0], bound(X), rtol=1e-4, atol=1e-5)
    assert differ(both[0], both[1])


def test_inner_attack_in_a_training_step_traces_once():
    """What an adversarial objective does: bind inside the step, differentiate by x and params."""
    module, traces = counting_module()
    network = models.network(module())
    params, extra = network.init(KEY, X)

    @functools.partial(jax.jit, static_argnums=0)
    def update(network, params, extra, key, x):
        bound = network.bind(params, extra)
        x = x + 0.1 * jnp.sign(jax.grad(lambda x: bound(x).sum())(x))

        def loss(params):
            logits, new = network.train_logits(params, extra, key, x)
            return (logits**2).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new

    traces.clear()
    for i in range(3):
        params, extra = update(models.network(module()), params, extra, jax.random.key(i), X)
    assert len(traces) == 2  # the attack's forward pass and the loss's, in the first step only


def test_networks_are_values():
    a, b = (models.network(models.SmallCNN(norm=True)) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != models.network(models.SmallCNN(norm=False))
    assert jax.tree.leaves(a) == []
    assert jax.tree.structure(a) == jax.tree.structure(b)
    params, extra = a.init(KEY, X)
    traced = []

    @jax.jit
    def forward(network, params, extra):
        traced.append(1)
        return network.logits(params, extra, X)

    forward(a, params, extra)
    forward(b, params, extra)
    assert len(traced) == 1


def test_a_network_of_plain_functions():
    network = models.Network(
        init=lambda key, x: (jax.random.normal(key, (x.shape[1], 3)), ()),
        logits=lambda params, extra, x: x @ params,
        train_logits=lambda params, extra, key, x: (x @ params, extra),
        features=lambda params, extra, x: {},
    )
    x = X.reshape(6, -1)
    params, extra = network.init(KEY, x)
    bound = network.bind(params, extra)
    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(bound, x), x @ params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16"])
def test_dtype(dtype):
    module = models.SmallCNN(widths=(4, 4), classes=3, hidden=8, norm=True)
    variables = module.init(KEY, X)
    exact = models.bind(module, variables)(X)
    low = models.bind(module, variables, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(dtype)}
    logits = low(X)
    assert logits.dtype == jnp.float32
    error = jnp.abs(logits - exact).max() / jnp.abs(exact).max()
    assert 0 < error < 0.05
    # The convolutions themselves run in that type.
    text = str(jax.make_jaxpr(low)(X))
    convolutions = [line for line in text.splitlines() if "= conv_general_dilated[" in line]
    assert convolutions
    name = "bf16" if dtype == jnp.bfloat16 else "f16"
    assert all(f":{name}[" in line for line in convolutions)


def test_dtype_leaves_integers_alone():
    network = models.Network(
        init=lambda key, x: ({}, {}),
        logits=lambda params, extra, x: params["w"][extra["i"]] * x,
        train_logits=lambda params, extra, key, x: (x, extra),
        features=lambda params, extra, x: {},
    )
    bound = network.bind({"w": jnp.ones(2)}, {"i": jnp.int32(1)}, dtype=jnp.bfloat16)
    assert bound.extra["i"].dtype == jnp.int32
    assert bound(jnp.ones(3)).dtype == jnp.float32


def test_lists_of_layers():
    """``nn.Sequential`` of a list cannot be hashed as it is; a layer used twice stays one."""

    def module():
        twice = nn.Dense(3)
        return nn.Sequential([nn.Dense(3), nn.Sequential([twice, nn.relu]), twice])

    x = X.reshape(6, -1)
    variables = module().init(KEY, x)
    assert len(variables["params"]) == 2
    bound = models.bind(module(), variables)
    np.testing.assert_array_equal(bound(x), module().apply(variables, x))
    assert models.network(module()) == models.network(module())
    mine = jax.tree.structure(models.network(module()).init(KEY, x)[0])
    assert mine == jax.tree.structure(variables["params"])


class Unhashable(nn.Module):
    widths: dict

    @nn.compact
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, v: models.bind(m), TypeError, "bind needs the variables of MLP"),
        (lambda m, v: models.bind(m, v["params"]), ValueError, "no collection 'params'"),
        (lambda m, v: models.bind(m, list(v)), TypeError, "must be a mapping .* got list"),
        (lambda m, v: models.bind(jnp.tanh, v), TypeError, "must be a Flax module, Linen or nnx"),
        (lambda m, v: models.bind(models.MLP, v), TypeError, r"write MLP\(\.\.\.\)"),
        (lambda m, v: models.bind(m, v, dtype=jnp.int8), TypeError, "floating-point type"),
        (lambda m, v: models.network(3), TypeError, "got builtins.int"),
        (lambda m, v: models.network(Unhashable({})), TypeError, "cannot be hashed"),
    ],
)
def test_bad_input(call, error, text):
    module = models.MLP((4,), 3)
    with pytest.raises(error, match=text):
        call(module, module.init(KEY, X))


# features


def test_features_by_name():
    module = models.SmallCNN(widths=(4, 6), classes=3, hidden=8)
    network = models.network(module)
    params, extra = network.init(KEY, X)
    features = jax.jit(network.features)(params, extra, X)
    shapes = {name: a.shape for name, a in features.items()}
    assert shapes == {
        "conv1": (6, 8, 8, 4),
        "conv2": (6, 4, 4, 6),
        "dense": (6, 8),
        "Dropout_0": (6, 8),
        "head": (6, 3),
    }
    logits = network.logits(params, extra, X)
    np.testing.assert_allclose(features["head"], logits, rtol=1e-5, atol=1e-5)
    by_hand = nn.relu(features["dense"]) @ params["head"]["kernel"]
    np.testing.assert_allclose(by_hand, logits, rtol=1e-4, atol=1e-5)  # biases start at zero


def test_sown_repeated_and_nested_features():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            twice = nn.Dense(4, name="twice")
            x = Inner(name="inner")(x)
            self.sow("intermediates", "after", x)
            return twice(twice(nn.BatchNorm(not train, name="norm")(x)))

    network = models.network(Outer())
    x = X.reshape(6, -1)
    params, extra = network.init(KEY, x)
    features = network.features(params, extra, x)
    assert set(features) == {"inner", "inner/dense", "after", "norm", "twice/0", "twice/1"}
    np.testing.assert_array_equal(features["after"], features["inner"])
    np.testing.assert_array_equal(features["twice/1"], network.logits(params, extra, x))
    np.testing.assert_allclose(features["norm"], features["after"], rtol=1e-4)


# summary


def test_summary_of_resnet20():
    network = models.network(models.ResNet(depth=20))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    summary = models.summary(network, x)
    assert (summary.parameters, summary.extra, summary.logits) == (269_722, 1_376, (2, 10))
    assert sum(layer.parameters for layer in summary.layers) == 269_722
    layers = {layer.name: layer for layer in summary.layers}
    assert layers["conv"] == ("conv", (2, 32, 32, 16), {"kernel": (3, 3, 3, 16)}, 432)
    assert layers["stage3_block3/conv2"].output == (2, 8, 8, 64)
    assert layers["head"].shapes == {"bias": (10,), "kernel": (64, 10)}
    names = list(layers)
    assert names.index("conv") < names.index("stage1_block1/conv1") < names.index("head")
    lines = str(summary).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[2].split()) == "conv (2, 32, 32, 16) kernel (3, 3, 3, 16) 432"
    assert " ".join(lines[-1].split()) == "total (2, 10) and 1,376 other values 269,722"


def test_summary_of_a_bound_model():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(64, name="layer")
            return nn.Dense(3, name="head")(layer(layer(x)))

    x = X.reshape(6, -1)
    bound = models.bind(Twice(), Twice().init(KEY, x))
    summary = models.summary(bound, x)
    assert [layer[0::3] for layer in summary.layers] == [
        ("layer/0", 64 * 65),
        ("layer/1", 0),
        ("head", 64 * 3 + 3),
    ]
    assert summary == models.summary(models.network(Twice()), x)
    # Of plain functions only parameters and logits are known.
    plain = models.Network(None, lambda p, e, x: x @ p["w"], None, None).bind({"w": x.T}, ())
    assert models.summary(plain, x) == models.Summary(
        (models.Layer("", None, {"w": (64, 6)}, 384),), (6, 6), 384, 0
    )
    with pytest.raises(TypeError, match=r"a Network or a bound model, got Twice"):
        models.summary(Twice(), x)
    pair = models.Network(None, lambda p, e, x: (x, x), None, None).bind({}, ())
    with pytest.raises(TypeError, match=r"one array of logits, got \(\(6, 64\), \(6, 64\)\)"):
        models.summary(pair, x)


# networks


def size(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def test_resnet20_has_the_published_size():
    network = models.network(models.ResNet(depth=20))
    params, extra = jax.eval_shape(network.init, KEY, jnp.zeros((1, 32, 32, 3)))
    assert size(params) == 269_722
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert sum(a.size for path, a in leaves if "norm" in str(path)) == 1_376
    assert sum(a.size for path, a in leaves if "kernel" in str(path)) == 268_336
    assert params["head"]["bias"].shape == (10,)
    assert size(extra["batch_stats"]) == 1_376


def test_resnet_normalises_inside():
    """Channels equal to the mean reach the first convolution as zero, mean + std as one."""
    module = models.ResNet(depth=8, widths=(2, 4, 6), classes=3)
    network = models.network(module)
    mean, std = jnp.array(module.mean), jnp.array(module.std)
    blank = jnp.broadcast_to(mean.reshape(1, 1, 1, 3), (1, 8, 8, 3))
    params, extra = jax.jit(network.init)(KEY, blank)
    features = jax.jit(network.features)
    np.testing.assert_allclose(features(params, extra, blank)["conv"], 0, atol=1e-6)
    ones = features(params, extra, blank + std.reshape(1, 1, 1, 3))
    kernel = params["conv"]["kernel"].sum((0, 1, 2))
    np.testing.assert_allclose(ones["conv"][0, 4, 4], kernel, rtol=1e-4, atol=1e-5)
    shapes = [ones[f"stage{i}_block1"].shape[1:] for i in (1, 2, 3)]
    assert shapes == [(8, 8, 2), (4, 4, 4), (2, 2, 6)]
    # Option A: with the branch of a block silenced, its output is the input, subsampled and padded.
    silent = jax.tree.map(jnp.zeros_like, params["stage2_block1"]["norm2"])
    params["stage2_block1"]["norm2"] = silent
    x = jax.random.uniform(KEY, (1, 8, 8, 3))
    named = features(params, extra, x)
    expected = jnp.pad(named["stage1_block1"][:, ::2, ::2], ((0, 0),) * 3 + ((1, 1),))
    np.testing.assert_allclose(named["stage2_block1"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "text"),
    [
        (models.ResNet(depth=18), (1, 32, 32, 3), "depth must be 6 n"),
        (models.ResNet(depth=8), (1, 8, 8, 1), "have 1 channels, but mean has 3"),
        (models.ResNet(depth=8), (8, 8, 3), r"must have shape \(B, H, W, channels\)"),
        (models.SmallCNN(), (8, 64), r"must have shape \(B, H, W, channels\)"),
    ],
)
def test_networks_refuse_other_inputs(module, shape, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(models.network(module).init, KEY, jnp.zeros(shape))


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (models.SmallCNN(), 38_282),
        (models.SmallCNN(norm=True), 38_330),
        (models.MLP(), 26_122),
        (models.MLP((), 10), 650),
    ],
)
def test_small_networks(module, parameters):
    network = models.network(module)
    params, extra = jax.eval_shape(network.init, KEY, X)
    assert size(params) == parameters
    low = jax.eval_shape(network.logits, params, extra, X.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert low.shape == (6, 10)


def test_batch_norm_over_a_mapped_axis():
    """Two halves under ``axis_name`` give the statistics and logits of the whole batch."""
    arguments = {"widths": (4,), "classes": 3, "hidden": 8, "norm": True}
    whole = models.network(models.SmallCNN(**arguments))
    params, extra = whole.init(KEY, X)
    logits, new = whole.train_logits(params, extra, KEY, X)
    halves = models.network(models.SmallCNN(**arguments, axis_name="data"))
    split, split_new = jax.vmap(
        lambda x: halves.train_logits(params, extra, KEY, x), axis_name="data"
    )(X.reshape(2, 3, 8, 8, 1))
    np.testing.assert_allclose(split.reshape(6, 3), logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(split_new)):
        np.testing.assert_allclose(b[0], a, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(b[0], b[1])


def test_small_cnn_learns_the_digits():
    train, _, test = digits()
    network = models.network(models.SmallCNN())
    params, extra = jax.jit(network.init)(KEY, train.x[:1])
    epochs, batch = 15, 57
    steps = epochs * (len(train) // batch)
    tx = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    @jax.jit
    def update(params, state, x, y):
        def loss(params):
            logits, _ = network.train_logits(params, extra, KEY, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for rows in rng.permutation(len(train)).reshape(-1, batch):
            params, state = update(params, state, train.x[rows], train.y[rows])
    prediction = network.logits(params, extra, test.x).argmax(-1)
    # 99% within three standard errors of 400 draws.
    assert (prediction == test.y).mean() > 0.99 - 3 * (0.99 * 0.01 / 400) ** 0.5


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("linen", "standard", "adversarial"), ("nnx", "pretrained", "hardened")],
)
def test_native_examples(name, before, after, capsys):
    accuracies = runpy.run_path(str(EXAMPLES / f"native_{name}.py"))["main"](steps=60)
    assert accuracies[before][0] > 0.8
    assert accuracies[after][1] > accuracies[before][1] + 0.2
    assert "bias (10,), kernel (512, 10)" in capsys.readouterr().out


# imports


def test_without_flax():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "sklearn", "matplotlib"):
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
import jrobust.data, jrobust.models, jrobust.report
network = jrobust.models.Network(None, lambda p, e, x: p * x, None, None)
print(network.bind(2.0, ())(3.0))
for attempt in (lambda: jrobust.models.MLP, lambda: jrobust.models.bind(3, {})):
    try:
        attempt()
    except ImportError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert lines[0] == "6.0"
    assert len(lines) == 3
    assert all("pip install flax" in line for line in lines[1:])


def test_public_names():
    assert set(dir(models)) == set(models.__all__)
    assert all(getattr(models, name).__doc__ for name in models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'VGG'"):
        models.VGG  # noqa: B018


def test_a_bound_model_is_no_static_argument():
    model = models.bind(
        models.MLP(features=()),
        {"params": {"head": {"kernel": jnp.ones((2, 10)), "bias": jnp.zeros(10)}}},
    )
    x = jnp.ones((3, 2))
    with pytest.raises(TypeError, match=r"jax.jit\(lambda model, x: model\(x\)\)"):
        jax.jit(model)(x)
    np.testing.assert_array_equal(jax.jit(lambda model, x: model(x))(model, x), model(x))
