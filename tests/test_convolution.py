"""The layout rewrite: same numbers, one layout wherever XLA's CPU compiler looks, nothing else."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec

from jrobust._convolution import rewrite

# image, kernel, layout, then what differs from: strides 1, padding 1, no dilation, no groups, f32
CONFIGS = {
    "rank 0": {"image": (4, 6), "kernel": (6, 8), "layout": ("NC", "IO", "NC"), "padding": ()},
    "rank 0, transposed": {
        "image": (6, 4),
        "kernel": (8, 6),
        "layout": ("CN", "OI", "CN"),
        "padding": (),
    },
    "rank 1": {"image": (2, 9, 4), "kernel": (3, 4, 8), "layout": ("NWC", "WIO", "NWC")},
    "rank 1, NCW": {"image": (2, 4, 9), "kernel": (8, 4, 3), "layout": ("NCW", "OIW", "NCW")},
    "rank 2": {},
    "NCHW": {"image": (2, 4, 6, 5), "kernel": (8, 4, 3, 3), "layout": ("NCHW", "OIHW", "NCHW")},
    "mixed": {"image": (6, 2, 5, 4), "kernel": (4, 3, 8, 3), "layout": ("HNWC", "IHOW", "CWNH")},
    "rank 3": {
        "image": (1, 4, 5, 4, 2),
        "kernel": (3, 2, 3, 2, 4),
        "layout": ("NDHWC", "DHWIO", "NDHWC"),
    },
    "strides": {"window_strides": (2, 3)},
    "transposed": {"lhs_dilation": (2, 3), "padding": ((2, 1), (0, 2))},
    "dilated": {"rhs_dilation": (2, 1), "padding": ((2, 2), (1, 0))},
    "all dilated": {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "window_strides": (2, 2)},
    "negative padding": {"padding": ((-1, 1), (2, -1))},
    "groups": {"kernel": (3, 3, 2, 8), "feature_group_count": 2},
    "depthwise, NCHW": {
        "image": (2, 4, 6, 5),
        "kernel": (8, 1, 3, 3),
        "layout": ("NCHW", "OIHW", "NCHW"),
        "feature_group_count": 4,
    },
    "batch groups": {"image": (4, 6, 5, 4), "batch_group_count": 2},
    "kernel larger": {"image": (2, 2, 2, 4)},
    "kernel larger, dilated": {
        "image": (2, 2, 2, 4),
        "lhs_dilation": (2, 2),
        "padding": ((-1, 2), (2, 1)),
    },
    "1x1": {"kernel": (1, 1, 4, 8)},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 to float32": {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
    "float32 precision": {"precision": lax.Precision.HIGHEST},
}


def convolution(name):
    """The convolution `name` of the table, and its arguments."""
    config = dict(CONFIGS[name])
    layout = config.pop("layout", ("NHWC", "HWIO", "NHWC"))
    shapes = config.pop("image", (2, 6, 5, 4)), config.pop("kernel", (3, 3, 4, 8))
    dtype, rank = config.pop("dtype", jnp.float32), len(shapes[0]) - 2
    lhs_key, rhs_key = jax.random.split(jax.random.key(1))
    arguments = (
        jax.random.normal(lhs_key, shapes[0], dtype),
        jax.random.normal(rhs_key, shapes[1], dtype),
    )
    if any(isinstance(d, str) and len(d) == 2 for d in layout):  # no strings without space
        n, c = layout[0].index("N"), layout[0].index("C")
        o, i = layout[1].index("O"), layout[1].index("I")
        layout = lax.ConvDimensionNumbers((n, c), (o, i), (n, c))
    config = {"window_strides": (1,) * rank, "padding": ((1, 1),) * rank} | config
    return functools.partial(
        lax.conv_general_dilated, dimension_numbers=layout, **config
    ), arguments


def value_and_gradients(f):
    """`f` and its two gradients, weighted so that no two elements count the same."""

    def run(lhs, rhs):
        out, pull = jax.vjp(f, lhs, rhs)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, *pull(weight.astype(out.dtype))

    return run


def equations(jaxpr):
    """Every equation that can run on the CPU, with what encloses it."""
    for eqn in jaxpr.eqns:
        yield eqn
        platforms = eqn.params.get("branches_platforms")
        for name, value in eqn.params.items():
            for i, item in enumerate(value if isinstance(value, (tuple, list)) else [value]):
                if name == "branches" and platforms and platforms[i] is None:
                    continue
                if isinstance(item, ClosedJaxpr):
                    yield from equations(item.jaxpr)
                elif isinstance(item, Jaxpr):
                    yield from equations(item)


def layouts(fn, *args):
    """The layout of every convolution in the jaxpr of `fn`, as far as the CPU sees it."""
    found = []
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if eqn.primitive.name == "conv_general_dilated":
            rank = eqn.invars[0].aval.ndim
            image = (0, rank - 1, *range(1, rank - 1))
            kernel = (rank - 1, rank - 2, *range(rank - 2))
            found.append(tuple(eqn.params["dimension_numbers"]) == (image, kernel, image))
    return found


def compiled_layouts(fn, *args):
    """The same of the program that XLA made of `fn`."""
    labels = re.findall(r"dim_labels=([^\s,]+)", jax.jit(fn).lower(*args).compile().as_text())
    return [
        label in ("bf_io->bf", "b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f")
        for label in labels
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_convolution_as_written(name):
    f, args = convolution(name)
    rounding = 2e-2 if args[0].dtype == jnp.bfloat16 else 1e-5
    # The gradients are those of `f`, rewritten, and those of the rewritten `f`.
    ways = (
        value_and_gradients(f),
        rewrite(value_and_gradients(f)),
        value_and_gradients(rewrite(f)),
    )
    plain, *others = jax.jit(lambda *args: [way(*args) for way in ways])(*args)
    for results in others:
        for got, want in zip(results, plain, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            scale = float(jnp.max(jnp.abs(want)))
            np.testing.assert_allclose(
                np.float32(got), np.float32(want), rtol=0, atol=rounding * scale
            )
    assert all(layouts(rewrite(value_and_gradients(f)), *args))


@pytest.mark.parametrize(
    "name", ["NCHW", "mixed", "strides", "transposed", "depthwise, NCHW", "kernel larger", "rank 3"]
)
def test_xla_keeps_the_layout_in_a_loop(name):
    f, args = convolution(name)
    gradients = value_and_gradients(f)

    def loop(lhs, rhs):
        def body(_, carry):
            return tuple(a + 0.1 * b for a, b in zip(carry, gradients(*carry)[1:], strict=True))

        return lax.fori_loop(0, 3, body, (lhs, rhs))

    assert not all(compiled_layouts(loop, *args))
    found = compiled_layouts(rewrite(loop), *args)
    assert found
    assert all(found)


def nchw(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME")


@jax.custom_vjp
def doubled(x, kernel):
    """A convolution that says its gradient is twice what it is."""
    return nchw(x, kernel)


doubled.defvjp(
    lambda x, k: jax.vjp(nchw, x, k), lambda pull, g: jax.tree.map(lambda d: 2 * d, pull(g))
)


@jax.custom_jvp
def tripled(x, kernel):
    return nchw(x, kernel)


@tripled.defjvp
def _(primals, tangents):
    out, tangent = jax.jvp(nchw, primals, tangents)
    return out, 3 * tangent


def scanned(f):
    return lambda x, k: lax.scan(lambda c, _: (jnp.sin(f(c, k)), c), x, None, length=3)[0]


def looped(f):
    return lambda x, k: lax.fori_loop(0, 3, lambda _, c: jnp.sin(f(c, k)), x)


def until(f):
    """Convolutions in the condition and in the body of a ``while`` loop."""
    return lambda x, k: lax.while_loop(
        lambda c: jnp.sum(f(c, k) ** 2) > 1, lambda c: 0.1 * jnp.sin(f(c, k)), x
    )


def branched(f):
    return lambda x, k: lax.cond(x[0, 0, 0, 0] > 0, f, lambda x, k: 2 * f(x, k), x, k)


def sharded(f):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = PartitionSpec("d")
    return jax.shard_map(f, mesh=mesh, in_specs=(batch, PartitionSpec()), out_specs=batch)


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "nested jit": lambda f: jax.jit(jax.jit(f)),
    "scan": scanned,
    "fori_loop": looped,
    "while_loop": until,
    "cond": branched,
    "checkpoint": jax.checkpoint,
    "checkpoint in scan": lambda f: scanned(jax.checkpoint(f)),
    "named_call": functools.partial(jax.named_call, name="block"),
    "shard_map": sharded,
    "shard_map in scan": lambda f: scanned(sharded(f)),
    "scan in shard_map": lambda f: sharded(scanned(f)),
    "pmap": lambda f: lambda x, k: jax.pmap(f, in_axes=(0, None))(jnp.stack([x] * 8), k),
}
X, K = (
    jax.random.normal(jax.random.key(2), (2, 3, 6, 6)),
    jnp.linspace(-0.4, 0.5, 81).reshape(3, 3, 3, 3),
)


@pytest.mark.parametrize(
    "rule", [nchw, doubled, tripled], ids=["plain", "custom_vjp", "custom_jvp"]
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_reaches_into_every_kind_of_call(name, rule):
    f = WRAPPERS[name](rule)
    assert not any(layouts(f, X, K))
    found = layouts(rewrite(f), X, K)
    assert found
    assert all(found)
    chex.assert_trees_all_close(jax.jit(rewrite(f))(X, K), jax.jit(f)(X, K), rtol=1e-5, atol=1e-5)


def test_xla_keeps_the_layout_of_a_network_in_a_loop():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.silu(nn.Conv(8, (3, 3), strides=2)(x))  # onto 2x2, where the kernel is larger
            return nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))

    x = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
    params = Network().init(jax.random.key(4), x)

    def attack(params, x):
        gradient = jax.grad(lambda x: jnp.sum(Network().apply(params, x) ** 2))
        return lax.fori_loop(0, 3, lambda _, x: x + 0.1 * gradient(x), x)

    assert not all(compiled_layouts(attack, params, x))
    assert all(compiled_layouts(rewrite(attack), params, x))
    chex.assert_trees_all_close(
        jax.jit(rewrite(attack))(params, x), jax.jit(attack)(params, x), rtol=1e-4, atol=1e-5
    )


def squares(f):
    return lambda x, k: jnp.sum(jnp.sin(f(x, k)) ** 2)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "scan in shard_map",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("scan", "cond", "checkpoint in scan")),
    ],
)
def test_derivatives_of_the_rewritten_function(name):
    f = squares(WRAPPERS[name](nchw))
    x = X[:, :, :3, :3]

    def derivatives(f, x, k):
        gradient = jax.grad(f, (0, 1))
        forward = jax.jvp(f, (x, k), (jnp.cos(x), jnp.sin(k)))
        second = jax.jvp(gradient, (x, k), (jnp.cos(x), jnp.sin(k)))
        twice = jax.grad(lambda x, k: sum(jnp.sum(d**2) for d in gradient(x, k)), (0, 1))(x, k)
        return gradient(x, k), forward, second, twice

    ways = (
        lambda x, k: derivatives(f, x, k),
        lambda x, k: derivatives(rewrite(f), x, k),
        rewrite(lambda x, k: derivatives(f, x, k)),
        rewrite(lambda x, k: derivatives(rewrite(f), x, k)),
    )
    assert all(layouts(ways[2], x, K))
    assert all(layouts(ways[3], x, K))
    plain, *others = jax.jit(lambda x, k: [way(x, k) for way in ways])(x, K)
    for other in others:
        chex.assert_trees_all_close(other, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rule", "factor"), [(nchw, 1), (doubled, 2), (tripled, 3)])
def test_custom_rules_are_kept(rule, factor):
    true = jax.grad(lambda x: jnp.sum(nchw(x, K)))(X)
    for f in (rewrite(rule), rewrite(jax.jit(rule)), lambda x, k: rewrite(rewrite(rule))(x, k)):
        got = jax.grad(lambda x, f=f: jnp.sum(f(x, K)))(X)
        chex.assert_trees_all_close(got, factor * true, rtol=1e-5, atol=1e-5)
    got = rewrite(jax.grad(lambda x: jnp.sum(rule(x, K))))(X)
    chex.assert_trees_all_close(got, factor * true, rtol=1e-5, atol=1e-5)


def test_only_the_wanted_derivative_is_computed():
    """No convolution for the kernel's derivative when only the image's is asked for."""

    def count(fn):
        jaxpr = jax.make_jaxpr(fn)(X, K).jaxpr
        return sum(eqn.primitive.name == "conv_general_dilated" for eqn in equations(jaxpr))

    assert count(jax.grad(squares(rewrite(nchw)))) == count(jax.grad(squares(nchw))) == 2


def test_vmap_over_and_under():
    kernels = jnp.stack([K, 2 * K])

    def each(f, x, k):
        return (
            jax.vmap(f, (0, None))(jnp.stack([x, -x]), k),
            jax.vmap(f, (None, 0))(x, kernels),
            jax.vmap(f)(jnp.stack([x, -x]), kernels),
            jax.vmap(jax.grad(squares(f)))(jnp.stack([x, -x]), kernels),
        )

    f = scanned(nchw)
    ways = [
        lambda x, k: each(f, x, k),
        lambda x, k: each(rewrite(f), x, k),
        rewrite(lambda x, k: each(f, x, k)),
    ]
    plain, over, under = jax.jit(lambda x, k: [way(x, k) for way in ways])(X, K)
    chex.assert_trees_all_close(over, plain, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(under, plain, rtol=1e-4, atol=1e-4)
    assert all(layouts(ways[2], X, K))


@pytest.mark.parametrize("size", [6, 2], ids=["6x6", "smaller than the kernel"])
def test_xla_keeps_the_layout_of_a_vmapped_loop(size):
    """As in a sweep over eps: the loop body was rewritten before the `vmap`."""

    def attack(x, k, eps, rewrite):
        body = rewrite(lambda x: x + eps * jnp.sign(jax.grad(squares(nchw))(x, k)))
        return lax.fori_loop(0, 2, lambda _, x: body(x), x)

    def sweep(rewrite):
        return jax.vmap(lambda e: attack(X[..., :size, :size], K, e, rewrite))

    eps = jnp.array([0.0, 0.1, 0.2])
    assert not any(compiled_layouts(sweep(lambda f: f), eps))
    found = compiled_layouts(sweep(rewrite), eps)
    assert found
    assert all(found)
    chex.assert_trees_all_close(
        jax.jit(sweep(rewrite))(eps), jax.jit(sweep(lambda f: f))(eps), rtol=1e-5, atol=1e-5
    )


def test_under_shard_map_and_pmap():
    """Called inside: with named axes in scope, varying and replicated arguments, a collective."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(5), (8, 1, 3, 2, 2))  # smaller than the kernel

    def gradient(x, k):
        def body(x, _):
            dx, dk = jax.grad(squares(nchw), (0, 1))(x, k)
            return x + dx * lax.pmean(jnp.sum(dk**2), "d") / 1e6, None

        return lax.scan(body, x, None, length=2)[0]

    def on_shards(f, x, k):
        specs = {"in_specs": (PartitionSpec("d"), PartitionSpec()), "out_specs": PartitionSpec("d")}
        return jax.shard_map(lambda x, k: f(x[0], k)[None], mesh=mesh, **specs)(x, k)

    def on_devices(f, x, k):
        return jax.pmap(f, "d", in_axes=(0, None))(x, k)

    for way in (on_shards, on_devices):
        plain = way(gradient, x, K)
        assert not np.allclose(plain, x)
        chex.assert_trees_all_close(way(rewrite(gradient), x, K), plain, rtol=1e-4, atol=1e-4)
        assert all(layouts(functools.partial(way, rewrite(gradient)), x, K))


def test_sharded_batch_stays_sharded():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, PartitionSpec("d"))
    x = jax.device_put(jax.random.normal(jax.random.key(6), (16, 3, 2, 2)), sharding)

    def attack(x, k):
        return lax.fori_loop(0, 2, lambda _, x: x + 0.1 * jax.grad(squares(nchw))(x, k), x)

    compiled = jax.jit(rewrite(attack)).lower(x, K).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    got = compiled(x, K)
    assert got.sharding.is_equivalent_to(sharding, got.ndim)
    chex.assert_trees_all_close(got, jax.jit(attack)(x, K), rtol=1e-4, atol=1e-4)


def test_export_changes_the_program_of_the_cpu_alone():
    def attack(x, k):
        return lax.fori_loop(0, 2, lambda _, x: x + 0.1 * jax.grad(squares(nchw))(x, k), x)

    def dimensions(fn, platform):
        text = jax.export.export(jax.jit(fn), platforms=[platform])(X[..., :2, :2], K).mlir_module()
        return re.findall(r"dim_numbers = (\S+)", text), re.findall(
            r"stablehlo\.(?:transpose|optimization_barrier)", text
        )

    for platform in ("cuda", "tpu"):
        assert dimensions(rewrite(attack), platform) == dimensions(attack, platform)
    plain, fast = dimensions(attack, "cpu"), dimensions(rewrite(attack), "cpu")
    assert len(plain[0]) == len(fast[0]) == 2
    assert set(fast[0]) == {"[b,"} or all("b, 0, 1, f" in d for d in fast[0])
    assert fast[1]
    assert not plain[1]


def test_without_work_the_program_is_the_same():
    """Nothing but fast convolutions, whatever surrounds them: equal jaxprs, equal bits."""

    @jax.jit
    def canonical(x, k):
        return lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fn(x, k, key):
        jax.debug.callback(lambda _: None, x)
        with jax.named_scope("scope"):
            x = scanned(lambda x, k: jax.nn.relu(canonical(x, k)))(x, k)
        x = jax.checkpoint(lambda x: jnp.sort(x) @ jnp.ones((3, 3)))(x)
        return lax.cond(x[0, 0, 0, 0] > 0, jnp.sin, jnp.cos, x), jax.random.uniform(key, (2,))

    args = jnp.moveaxis(X, 1, -1), K, jax.random.key(7)
    assert str(jax.make_jaxpr(rewrite(fn))(*args)) == str(jax.make_jaxpr(fn)(*args))
    chex.assert_trees_all_equal(jax.jit(rewrite(fn))(*args), jax.jit(fn)(*args))


def test_rewriting_twice_is_once():
    f = jax.jit(scanned(nchw))
    once, twice = (str(jax.make_jaxpr(fn)(X, K)) for fn in (rewrite(f), rewrite(rewrite(f))))
    assert once.count("conv_general_dilated") == twice.count("conv_general_dilated")


def test_unknown_primitives_and_integers_stay():
    unknown = jax.extend.core.Primitive("unknown")
    unknown.def_abstract_eval(lambda x, *, jaxpr: x)
    inner = jax.make_jaxpr(lambda x: nchw(x, K))(X)

    def fn(x):
        return unknown.bind(x, jaxpr=inner), nchw(x.astype(jnp.int32), K.astype(jnp.int32))

    eqns = jax.make_jaxpr(rewrite(fn))(X).jaxpr.eqns
    (kept,) = [eqn for eqn in eqns if eqn.primitive is unknown]
    assert kept.params["jaxpr"] is inner
    assert "custom_jvp_call" not in [eqn.primitive.name for eqn in eqns]


def test_pytrees_keys_scalars_closures_and_one_trace():
    traces = []

    def fn(batch, *, key, scale):
        traces.append(None)
        y = scale * nchw(batch["x"], kernel) + jax.random.normal(key, X.shape)
        return {"y": y, "key": jax.random.split(key)[0], "none": None, "same": batch["x"]}, (scale,)

    kernel, kwargs = K, {"key": jax.random.key(8), "scale": 2.0}
    want = fn({"x": X}, **kwargs)
    traces.clear()
    got = rewrite(fn)({"x": X}, **kwargs)
    assert len(traces) == 1
    chex.assert_trees_all_equal_structs(got, want)
    assert got[0]["key"] == want[0]["key"]
    chex.assert_trees_all_close(got[0]["y"], want[0]["y"], rtol=1e-5, atol=1e-5)
    # Tracers of an outer transformation reach the function through its closure.
    for transform in (jax.jit, jax.grad, lambda f: jax.vmap(f, in_axes=0, axis_size=1)):
        outer = [
            transform(lambda x, r=r: jnp.sum(r(lambda y: nchw(y * x, K))(X)) * x)
            for r in (rewrite, lambda f: f)
        ]
        args = jnp.ones(1) if transform not in (jax.jit, jax.grad) else jnp.ones(())
        chex.assert_trees_all_close(outer[0](args), outer[1](args), rtol=1e-4, atol=1e-4)


def test_the_place_in_the_source_is_kept():
    def fn(x, k):
        with jax.named_scope("where_it_was"):
            return nchw(x, k)

    text = jax.jit(rewrite(fn)).lower(X, K).compile().as_text()
    assert re.search(r'convolution.*op_name="[^"]*where_it_was', text)


def test_effects_happen_once():
    seen = []

    def fn(x, k):
        def body(i, x):
            jax.debug.callback(lambda i: seen.append(int(i)), i, ordered=True)
            return jnp.sin(nchw(x, k))

        return lax.fori_loop(0, 3, body, x)

    jax.block_until_ready(jax.jit(rewrite(fn))(X, K))
    jax.effects_barrier()
    assert seen == [0, 1, 2]
