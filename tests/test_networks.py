"""Reference networks: published sizes and costs, compute types, axis names, refused inputs.

That they compute what PyTorch's do on the same weights is in tests/test_weight_import.py.
"""

import pathlib
import re
import runpy

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jrobust import attacks, models
from jrobust.threat import Linf

ROOT = pathlib.Path(__file__).resolve().parent.parent
SILU = {"activation": nn.silu, "padding": "same"}

# Parameters and GMACs of the networks in circulation: pytorch-cifar (kuangliu), the option-A
# networks of akamaster, torchvision's tables, the WideResNets of RobustBench; None where no figure
# is published with the network.
PUBLISHED = {
    "`ResNet(20)`": (269_722, 0.04055),
    "`ResNet(56)`": (853_018, 0.1255),
    "`ResNet(110)`": (1_727_962, 0.2529),
    "`ResNet18()`": (11_173_962, 0.555),
    '`ResNet18(1000, "imagenet")`': (11_689_512, 1.81),
    "`ResNet50()`": (25_557_032, 4.09),
    "`PreActResNet18()`": (11_171_146, 0.555),
    "`WideResNet(28, 10)`": (36_479_194, 5.24),
    "`WideResNet(34, 10)`": (46_160_474, 6.66),
    "ViT-B/16: `ViT()`": (86_567_656, 17.56),
    "`LeNet()`": (61_706, None),
}


@pytest.fixture(scope="module")
def table():
    return runpy.run_path(str(ROOT / "docs" / "make_models.py"))["table"]()


def test_sizes_and_costs_are_the_published(table):
    found = {}
    for line in table.splitlines()[2:]:
        name, _, parameters, macs = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = int(parameters.replace(",", "")), float(macs)
    for name, (parameters, macs) in PUBLISHED.items():
        assert found[name][0] == parameters, name
        if macs is not None:
            np.testing.assert_allclose(found[name][1], macs, rtol=3e-3, err_msg=name)
    # Every convolution of an expert is 1 / 2 as wide on both sides, and there are two of each.
    assert found["`MoEResNet18()`"][0] == 5_834_652
    deepmind = found["`PreActResNet18` of DeepMind"][0] - found["`PreActResNet18()`"][0]
    assert deepmind == 2 * 512 + 8 * (64 * 128 + 128 * 256 + 256 * 512)
    text = (ROOT / "docs" / "models.md").read_text()
    assert f"{table}\n<!-- end" in text, "run python docs/make_models.py"


def wide(depth, width, classes=10):
    """Parameters of a wide residual network, by its definition."""
    total, channels = 27 * 16, 16
    for i in range(3):
        out = 16 * width * 2**i
        for j in range((depth - 4) // 6):
            total += 9 * channels * out + 9 * out * out + 2 * (channels + out)
            total += channels * out if not j else 0
            channels = out
    return total + 2 * channels + channels * classes + classes


def transformer(tokens, width, depth, patch, classes):
    block = 4 * width + 4 * width * (width + 1) + 8 * width**2 + 5 * width
    ends = 3 * patch**2 * width + width + width + (tokens + 1) * width + 2 * width
    return depth * block + ends + classes * (width + 1)


@pytest.mark.parametrize(
    ("module", "shape", "parameters"),
    [
        (models.WideResNet(70, 16, **SILU), (32, 32, 3), wide(70, 16)),
        (models.WideResNet(34, 20, 100), (32, 32, 3), wide(34, 20, 100)),
        (
            models.ViT(10, 32, 4, width=384, heads=6),
            (32, 32, 3),
            transformer(64, 384, 12, 4, 10),
        ),
        (models.LeNet(padding=0), (32, 32, 3), 62_006),
        (models.DnCNN(), (48, 40, 1), 556_096),
        (models.Autoencoder(), (32, 32, 3), 326_179),
        (models.PreActResNet18(final_norm=True), (32, 32, 3), 11_172_170),
        (models.ResNet18(100), (32, 32, 3), 11_220_132),
    ],
)
def test_sizes_by_definition(module, shape, parameters):
    assert wide(28, 10) == 36_479_194
    assert transformer(196, 768, 12, 16, 1000) == 86_567_656
    network = models.network(module)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


SMALL = catalogue.NETWORKS


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(function, *arguments, **options):
    return list(equations(jax.make_jaxpr(function, **options)(*arguments).jaxpr))


@pytest.mark.parametrize("name", SMALL)
def test_compute_types(name):
    """Asked for bfloat16, all products are; what comes out is float32 either way."""
    module, shape = SMALL[name]
    network = models.network(module)
    x = jnp.zeros((2, *shape))
    params, extra = jax.eval_shape(network.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), (params, extra))
    for dtype in (None, jnp.bfloat16):
        model = network.bind(*jax.tree.map(jnp.asarray, zeros), dtype=dtype)
        program = traced(lambda x, model=model: model(x), x)
        products = {
            v.aval.dtype
            for eqn in program
            if eqn.primitive.name in ("conv_general_dilated", "dot_general")
            for v in eqn.invars
        }
        assert products == {jnp.dtype(dtype or jnp.float32)}
        assert program[-1].outvars[0].aval.dtype == jnp.float32
    out = jax.eval_shape(network.logits, params, extra, x)
    assert out.shape == ((2, *shape) if name in ("DnCNN", "Autoencoder") else (2, 3))


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50", "PreActResNet18", "WideResNet",
                                  "MoEResNet18", "DnCNN"])  # fmt: skip
def test_every_batch_norm_averages_over_the_axis(name):
    module, shape = SMALL[name]
    network = models.network(module.clone(axis_name="data"))
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    params, extra = jax.eval_shape(network.init, jax.random.key(0), x)
    norms = sum("mean" in str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(extra))
    many = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    train = lambda x, params, extra, key: network.train_logits(params, extra, key, x)  # noqa: E731
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        lambda x, *rest: train(x[0], *rest)[0][None],
        mesh=mesh,
        in_specs=(spec("data"), spec(), spec(), spec()),
        out_specs=spec("data"),
        check_vma=False,
    )
    program = traced(sharded, many, params, extra, jax.random.key(0))
    reductions = [eqn for eqn in program if eqn.primitive.name.startswith("psum")]
    assert len(reductions) == norms > 3


def drawn(network, x):
    """Random variables without compiling the initialisers."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        value = rng.normal(0, 0.4, leaf.shape).astype(np.float32)
        return jnp.asarray(np.abs(value) + 0.5 if "var" in str(path[-1]) else value)

    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_the_expert_is_the_one_the_router_chose(key):
    """The network is, row by row, that of the chosen kernels; the router has a gradient."""
    module, shape = SMALL["MoEResNet18"]
    network = models.network(module)
    one = models.network(module.clone(experts=1))
    x = jax.random.uniform(key, (6, *shape))
    params, extra = drawn(network, x)
    assert jax.eval_shape(network.features, params, extra, x)["router"].shape == (6, 3)

    @jax.jit
    def passes(params):
        def total(params):
            logits = network.logits(params, extra, x)
            return jnp.sum(logits**2), logits

        (_, logits), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return logits, gradient["router"]["head"]["bias"], gradient["stage1_block1"]["conv1"]

    router = models.network(models.ResNet(8, 3))
    statistics = {"batch_stats": extra["batch_stats"]["router"]}
    scores = jax.jit(router.logits)(params["router"], statistics, x)
    # Half of the images to each of two experts, none to the third.
    margin = jnp.median(scores[:, 0] - scores[:, 1])
    bias = params["router"]["head"]["bias"] + jnp.array([-margin, 0, -100])
    params["router"]["head"]["bias"] = bias
    chosen = jnp.where(scores[:, 0] - scores[:, 1] > margin, 0, 1)
    assert chosen.sum() == 3
    logits, gradient, kernel = passes(params)
    used = jnp.abs(kernel["kernel"]).reshape(-1, 3, 2).sum((0, 2))
    assert (used > 0).tolist() == [True, True, False]
    assert jnp.abs(gradient).min() > 0, "straight through, also to who was not chosen"

    dense = jax.jit(one.logits)
    others = jax.tree.map(jnp.zeros_like, drawn(one, x)[0]["router"])
    for expert in (0, 1):
        alone = {**params, "router": others}
        for block in ("stage1_block1", "stage2_block1"):
            for conv in ("conv1", "conv2"):
                kernel = params[block][conv]["kernel"]
                kernel = kernel.reshape(*kernel.shape[:3], 3, -1)[..., expert, :]
                alone[block] = {**alone[block], conv: {"kernel": kernel}}
        mine = chosen == expert
        statistics = drawn(one, x)[1]["batch_stats"]["router"]
        rest = {"batch_stats": {**extra["batch_stats"], "router": statistics}}
        expected = dense(alone, rest, x)
        np.testing.assert_allclose(logits[mine], expected[mine], rtol=1e-4, atol=1e-5)
        assert jnp.abs(logits - expected)[~mine].max() > 1e-3


def test_the_autoencoder(key):
    """The code of the published sizes has 192 numbers; images come back in [0, 1]."""
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(models.Autoencoder().init, key, x)
    encode = lambda v, x: models.Autoencoder().apply(v, x, method="encode")  # noqa: E731
    assert jax.eval_shape(encode, shapes, x).shape == (2, 192)
    kernels = [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim == 4]
    there = [(4, 4, 3, 32), (3, 3, 32, 48), (4, 4, 48, 96), (2, 2, 96, 192)]
    assert sorted(kernels) == sorted(there + [(h, w, o, i) for h, w, i, o in there])
    module = models.Autoencoder(widths=(2, 3, 4, 6))
    network = models.network(module)
    x = jax.random.uniform(key, (2, 32, 32, 3))
    params, extra = drawn(network, x)
    out = jax.jit(network.logits)(params, extra, x)
    assert jnp.all((out > 0) & (out < 1))
    halves = lambda v, x: module.apply(  # noqa: E731
        v, module.apply(v, x, method="encode"), method="decode"
    )
    np.testing.assert_allclose(jax.jit(halves)({"params": params}, x), out, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\(B, 32, 32, 3\), got \(2, 28, 28, 3\)"):
        jax.eval_shape(network.logits, params, extra, x[:, :28, :28])


@pytest.mark.parametrize(
    ("module", "shape", "text"),
    [
        (models.ResNet18(stem="tiny"), (32, 32, 3), "stem must be one of 'cifar', 'imagenet'"),
        (models.ResNet18(), (32, 32, 1), "have 1 channels, but mean has 3"),
        (models.PreActResNet18(shortcut="b"), (32, 32, 3), "shortcut must be one of 'activated'"),
        (models.PreActResNet18(padding="SAME"), (32, 32, 3), "padding must be one of 'symmetric'"),
        (models.WideResNet(30), (32, 32, 3), r"depth must be 6 n \+ 4"),
        (models.WideResNet(padding="valid"), (32, 32, 3), "padding must be one of"),
        (models.ViT(), (32, 32, 3), "images must be 224x224"),
        (models.ViT(10, 32, 5), (32, 32, 3), "patch 5 must divide image 32"),
        (models.ViT(10, 32, 4, heads=5), (32, 32, 3), "heads 5 must divide width 768"),
        (models.DnCNN(1), (32, 32, 3), "depth must be at least 2"),
        (models.LeNet(), (28, 28), r"must have shape \(B, H, W, channels\)"),
    ],
)
def test_networks_refuse_other_inputs(module, shape, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(models.network(module).init, jax.random.key(0), jnp.zeros((1, *shape)))


def test_bytes_are_no_inputs():
    x = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    with pytest.raises(TypeError, match="images must be floats in pixel units, got uint8"):
        jax.eval_shape(models.network(models.ResNet()).init, jax.random.key(0), x)


def test_export_as_documented(key):
    """The recipe of docs/models.md gives the attack's points at other batch sizes too."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.S)[-1]
    network = models.network(models.SmallCNN(widths=(4, 4), classes=3, hidden=8))
    images = jax.random.uniform(key, (6, 8, 8, 1))
    names = {
        "model": network.bind(*drawn(network, images)),
        "attack": attacks.PGD(Linf(0.1), steps=3),
        "images": images,
        "labels": jnp.arange(6) % 3,
    }
    exec(code, names)
    assert isinstance(names["blob"], bytearray | bytes)
    find = jax.jit(names["find"])
    for rows in (6, 4):
        given = key, images[:rows], names["labels"][:rows]
        np.testing.assert_allclose(names["again"](*given), find(*given), atol=1e-6)
