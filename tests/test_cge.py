"""CGE by exact differences: float64 as its oracle, masks, auxiliary values, tiles, devices."""

import functools
import pathlib
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from jrobust import losses, parallel, weights
from jrobust.zeroth_order import (
    CGE,
    RGE,
    DifferenceWarning,
    _coordinate,
    differencer,
    value_and_grad,
)

RNG = np.random.default_rng(0)


def draw(*shape, scale=1.0):
    return np.float32(scale) * RNG.normal(size=shape).astype(np.float32)


X, Y = draw(6, 6, 6, 2), np.arange(6) % 3
PARAMS = {
    "conv": draw(3, 3, 2, 4, scale=0.3),
    "gain": 1 + draw(4, scale=0.1),
    "shift": draw(4, scale=0.1),
    "conv2": draw(3, 3, 4, 3, scale=0.2),
    "head": draw(3, 3),
}
D = sum(v.size for v in PARAMS.values())


def network(params, x=X, train=True):
    """(loss, batch statistics) of convolution, batch-norm, ReLU, convolution, pooling, dense."""
    h = lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, var = h.mean((0, 1, 2)), h.var((0, 1, 2))
    used = (mean, var) if train else (jnp.zeros_like(mean), jnp.ones_like(var))
    scale = lax.rsqrt(used[1] + 1e-5) * params["gain"]
    h = jax.nn.relu((h - used[0][None, None, None]) * scale[None, None, None])
    h = h + params["shift"][None, None, None]
    h = lax.conv_general_dilated(
        h, params["conv2"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    logits = jax.nn.relu(h).mean((1, 2)) @ params["head"]
    chosen = jax.nn.log_softmax(logits) * np.eye(3, dtype=np.float32)[Y]
    return -chosen.sum(1).mean(), {"mean": mean, "var": var}


def loss(params, train=True):
    return network(params, train=train)[0]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def in_float64(mu, train, central):
    """The quotients by evaluation, all in float64."""
    with jax.enable_x64(True):
        point, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), PARAMS)
        )
        x = X.astype(np.float64)
        value = jax.jit(lambda p: network(unravel(p), x, train)[0])
        steps = mu * np.eye(D)
        along = jax.jit(lambda steps: lax.map(lambda s: value(point + s), steps, batch_size=16))
        up = np.asarray(along(steps))
        down = np.asarray(along(-steps)) if central else np.asarray(value(point))
    assert up.dtype == np.float64
    return (up - down) / (mu * (1 + central))


def error(found, wanted):
    return np.linalg.norm(flat(found) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("train", "central", "primal_dtype", "bound"),
    [(True, False, jnp.float64, 1e-5), (False, True, None, 1e-4)],
)
def test_it_is_the_quotient_of_float64_at_every_step(train, central, primal_dtype, bound):
    fn = functools.partial(loss, train=train)
    how = {"central": central, "primal_dtype": primal_dtype, "strict": True}
    run = jax.jit(lambda mu, params: CGE(mu, **how)(None, fn, params)[1])
    for mu in (5e-3, 1e-5):
        wanted = in_float64(float(np.float32(mu)), train, central)
        assert error(run(mu, PARAMS), wanted) < bound
    if train:  # subtraction leaves no digit
        _, grad = jax.jit(lambda p: CGE(mu, central=central, exact=False)(None, fn, p))(PARAMS)
        assert error(grad, wanted) > 0.05


def test_a_quadratic_is_exact_at_a_step_that_no_float_of_it_can_make():
    a = np.float32([[2, 1, 0], [1, -4, 0.5], [0, 0.5, 6]])
    x = jnp.array([0.5, -1, 2])
    mu = 2.0**-40
    for estimator in (CGE(mu), CGE(mu, central=False)):
        _, grad = estimator(None, lambda x: jnp.vdot(x, a @ x) / 2, x)
        np.testing.assert_array_equal(grad, a @ x)


def test_a_float64_base_pass_is_right_across_kinks():
    """``c - w^2`` is -2^-24, and 0 in float32; the change of 2^-25 does not reach the kink."""
    w, c = jnp.array([-1 - 2.0**-12]), 1 + 2.0**-11

    def fn(w):
        return jax.nn.relu(c - w[0] * w[0])

    # Operation by operation: a fused multiplication and subtraction would round once.
    quotient = {
        dtype: CGE(2.0**-26, central=False, primal_dtype=dtype)(None, fn, w)[1][0]
        for dtype in (None, jnp.float64)
    }
    assert quotient[jnp.float64] == 0
    np.testing.assert_allclose(quotient[None], 2, rtol=1e-3)


SMALL = {"w": draw(72, 5, scale=0.2), "v": draw(5, 3)}


def small(params):
    """The loss of two dense layers."""
    return losses.cross_entropy(jnp.tanh(X.reshape(6, -1) @ params["w"]) @ params["v"], Y).mean()


def test_parameters_in_half_precision_move_by_less_than_their_spacing():
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), SMALL)

    def wide(tree):
        return jax.tree.map(lambda v: v.astype(jnp.float32), tree)

    _, grad = jax.jit(lambda p: CGE(1e-4)(None, lambda p: small(wide(p)), p))(params)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grad))
    assert error(wide(grad), flat(jax.grad(small)(wide(params)))) < 1e-2


# --- what it costs


def equations(jaxpr, name):
    """The outputs' shapes of all operations of this name, those of its calls and loops included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn.outvars[0].aval.shape
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, name)


def trace(estimator, mask=None):
    run = lambda p: estimator(None, loss, p, mask=mask)  # noqa: E731
    return jax.make_jaxpr(run)(PARAMS).jaxpr


def only(name, keep):
    return {n: keep if n == name else np.zeros(0, np.int32) for n in PARAMS}


def test_nothing_in_front_of_a_coordinate_is_computed_again():
    base = len(list(equations(jax.make_jaxpr(loss)(PARAMS).jaxpr, "conv_general_dilated")))
    assert base == 2
    index = np.arange(3, dtype=np.int32)
    count = {
        name: len(list(equations(trace(CGE(1e-3), only(name, index)), "conv_general_dilated")))
        for name in ("conv", "conv2", "head")
    }
    # Convolutions of the one channel that changed are products of matrices.
    assert count == dict.fromkeys(count, base)
    relus = {
        name: len(list(equations(trace(CGE(1e-3), only(name, index)), "max"))) for name in count
    }
    assert relus["conv"] > relus["conv2"] > relus["head"]


def test_tiles_hold_as_many_points_as_the_budget_or_the_chunk():
    """A change of ``conv`` reaches arrays of 6 x 6 x 6 x 4 numbers, one of ``head`` of 6 x 3."""
    _, delta = differencer(loss, PARAMS)
    names = list(PARAMS)
    order = sorted(names)
    widest = {name: delta.func.widest(order.index(name)) for name in names}
    assert widest == {"conv": 864, "gain": 864, "shift": 864, "conv2": 162, "head": 18}

    def calls(x):
        grown = jax.jit(lambda x: jnp.sum(x[:, None] * np.ones((1, 50), np.float32), 1))(x["a"])
        return jnp.sum(grown[:, None] * np.ones((1, 9), np.float32)) + jnp.sum(x["b"])

    _, delta = differencer(calls, {"a": jnp.ones(3), "b": jnp.ones(4)})
    assert [delta.func.widest(k) for k in (0, 1)] == [150, 1]
    _, delta = differencer(
        lambda x: jnp.sum(jax.nn.relu(x)[:, None] * jnp.ones((1, 9))), X[0, 0, 0]
    )
    assert delta.func.widest(0) == 18
    estimator = CGE(1e-3, central=False)
    assert jax.default_backend() == "cpu"
    most = _coordinate._TILE_BYTES[0]["cpu"]
    assert estimator._side_by_side(most // 4 // 3) == 3
    assert estimator._side_by_side(10**12) == 1
    assert estimator._side_by_side(18) == _coordinate._TILE_POINTS[0]["cpu"]
    assert CGE(1e-3)._side_by_side(most // 4 // 6) == 3  # pairs
    assert CGE(1e-3, chunk=10)._side_by_side(10**12) == 5
    # The loop over the 9 weights of head has 2 tiles of 5 coordinates, of pairs of logits (6, 3).
    jaxpr = trace(CGE(1e-3, chunk=10), only("head", np.arange(9)))
    (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("scan", "while"))
    body = max(jaxprs_in_params(loop.params), key=lambda j: len(j.eqns))
    assert (5, 2, 6, 3) in {v.aval.shape for eqn in body.eqns for v in eqn.outvars}


def test_a_mask_of_the_same_counts_compiles_nothing_new(key):
    traces = []

    def fn(params):
        traces.append(0)
        return small(params)

    estimator = CGE(1e-3, central=False)
    run = jax.jit(lambda params, mask: estimator(None, fn, params, mask=mask)[1])
    ratios = jax.tree.map(lambda v: 0.1, SMALL)
    masks = [weights.random_by_layer(k, SMALL, ratios) for k in jax.random.split(key, 3)]
    full = jax.jit(lambda p: estimator(None, small, p)[1])(SMALL)
    for mask in masks:
        grad = run(SMALL, weights.indices(mask))
        assert len(traces) == 1
        for g, m, f in zip(*map(jax.tree.leaves, (grad, mask, full))):
            assert np.all(g[~m] == 0)
            np.testing.assert_allclose(g[m], f[m], rtol=1e-3, atol=1e-6)
    assert run._cache_size() == 1
    # Drawn inside of jit: the counts are those of the ratios.
    counts = jax.tree.map(lambda m: int(m.sum()), masks[0])

    @jax.jit
    def redrawn(key, params):
        mask = weights.random_by_layer(key, params, ratios)
        return run(params, weights.indices(mask, counts)), mask

    grad, mask = redrawn(jax.random.split(key, 3)[1], SMALL)
    chex.assert_trees_all_equal(mask, masks[1])
    chex.assert_trees_all_close(grad, run(SMALL, weights.indices(masks[1])), rtol=1e-5, atol=1e-7)


# --- masks and auxiliary values of every estimator

LINEAR = {"a": np.float32([[1, -2, 0.5], [4, 0.25, -1]]), "b": np.float32([3, 0.25, 2])}
MASKS = {
    "bool": {"a": np.array([[True, False, True], [False, False, True]]), "b": np.arange(3) > 1},
    "indices": {"a": np.int32([5, 0, 2]), "b": jnp.array([2])},
    "mixed": {"a": jnp.array([0, 2, 5], jnp.int32), "b": jnp.arange(3) > 1},
}
KEPT = MASKS["bool"]
ESTIMATORS = [
    CGE(0.5),
    CGE(0.5, central=False, chunk=1),
    CGE(0.5, exact=False),
    CGE(0.5, exact=False, central=False, chunk=1),
    RGE(0.5, 3),
    RGE(0.5, 1, direction="sphere", antithetic=True),
]


def linear(x):
    return sum(jnp.sum(LINEAR[k] * x[k]) for k in LINEAR)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_mask_is_the_estimate_in_a_subspace(estimator, kind, key):
    x = jax.tree.map(jnp.ones_like, LINEAR)
    value, grad = estimator(key, linear, x, mask=MASKS[kind])
    assert value == linear(x)
    for name, kept in KEPT.items():
        assert np.all(grad[name][~kept] == 0)
        if isinstance(estimator, CGE):
            np.testing.assert_array_equal(grad[name][kept], LINEAR[name][kept])
    if isinstance(estimator, RGE):
        assert all(np.all(grad[name][kept] != 0) for name, kept in KEPT.items())
        if kind != "indices":  # of which the order is that of the direction's numbers
            chex.assert_trees_all_equal(grad, estimator(key, linear, x, mask=KEPT)[1])
        if estimator.direction == "sphere":
            # d (g.u) u with ||u|| = 1 and the d of the four that are kept.
            square = sum(np.vdot(v, v) for v in jax.tree.leaves(grad))
            np.testing.assert_allclose(square, 4 * linear(grad), rtol=1e-5)
    pairs = getattr(estimator, "central", False) or getattr(estimator, "antithetic", False)
    directions = 4 if isinstance(estimator, CGE) else estimator.samples
    assert estimator.queries(x, MASKS[kind]) == 1 + directions * (1 + pairs)
    shapes = {"a": jax.ShapeDtypeStruct((3,), jnp.int32), "b": jax.ShapeDtypeStruct((1,), int)}
    assert estimator.queries(x, shapes) == 1 + directions * (1 + pairs)


@pytest.mark.parametrize("estimator", [ESTIMATORS[1], ESTIMATORS[2], ESTIMATORS[4]], ids=str)
def test_auxiliary_values_are_those_of_the_point_itself(estimator, key):
    def fn(x, shift):
        return linear(x) + shift, {"sum": x["b"].sum(), "step": 7, "shift": shift}

    x = jax.tree.map(jnp.ones_like, LINEAR)
    (value, aux), grad = estimator(key, lambda x: fn(x, 0.5), x, has_aux=True)
    chex.assert_trees_all_equal(aux, {"sum": 3.0, "step": 7, "shift": 0.5})
    assert value == linear(x) + 0.5
    step = jax.jit(value_and_grad(fn, estimator, has_aux=True))
    (value, aux), again = step(key, x, jnp.float32(0.25))
    assert value == linear(x) + 0.25
    assert aux["shift"] == 0.25
    chex.assert_trees_all_close(again, grad, rtol=1e-6)
    _, masked = value_and_grad(fn, estimator, has_aux=True)(key, x, 0.5, mask=KEPT)
    assert masked["b"][0] == 0 != masked["b"][2]


def test_batch_statistics_are_those_of_the_base_pass():
    (value, aux), _ = CGE(0.1, central=False)(
        None, network, PARAMS, mask=only("head", np.int32([4])), has_aux=True
    )
    wanted, statistics = network(PARAMS)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    chex.assert_trees_all_close(aux, statistics, rtol=1e-5, atol=1e-6)


# --- devices


def test_devices_share_the_tiles_and_exchange_the_quotients():
    mask = {"w": np.arange(3, 360, 13, dtype=np.int32), "v": np.arange(15, dtype=np.int32)}
    d = 28 + 15
    alone = jax.jit(lambda p: CGE(1e-3, chunk=8)(None, small, p, mask=mask))(SMALL)
    estimator = CGE(1e-3, chunk=8, axis_name=parallel.AXIS)
    for n in (1, 2, 4, 8):
        run = jax.jit(
            jax.shard_map(
                lambda p: estimator(None, small, p, mask=mask),
                mesh=parallel.mesh(jax.devices()[:n]),
                in_specs=P(),
                out_specs=P(),
            )
        )
        # With a single tile of a leaf on a device its loop is none, and XLA may round otherwise.
        near = 0 if n <= 2 else 1e-5
        chex.assert_trees_all_close(run(SMALL), alone, rtol=near, atol=near * 1e-2)
    # The sum of d float32 numbers is all that leaves a device.
    program = run.lower(SMALL).compile().as_text()
    sent = re.findall(r"= (\S+?)(?:\{\S*)? (?:all-\w+|reduce-scatter|collective-\w+)\(", program)
    assert sent == [f"f32[{d}]"]


def test_devices_agree_on_a_network():
    estimator = CGE(1e-3, central=False, chunk=4)
    shared = CGE(1e-3, central=False, chunk=4, axis_name=parallel.AXIS)
    mask = only("conv", np.arange(0, 72, 5, dtype=np.int32))
    alone = jax.jit(lambda p: estimator(None, network, p, mask=mask, has_aux=True))(PARAMS)
    run = parallel.data_parallel(
        lambda p: shared(None, network, p, mask=mask, has_aux=True),
        parallel.mesh(jax.devices()[:2]),
        "shard_map",
        in_axes=(None,),
        out_axes=None,
    )
    chex.assert_trees_all_equal(run(PARAMS), alone)


def test_devices_share_loops_and_branches():
    """What they carry begins with constants, the same on all devices, and goes on by its own."""

    def fn(x):
        def turn(carry, row):
            h = jnp.tanh(carry[0] + x[0] * row)
            return (h, carry[1] + 1), h * carry[1]

        (h, _), rows = lax.scan(turn, (0.5, 0.0), np.float32([0.5, -1]))
        counted = lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * x[1] + 1), (0, 0.0)
        )[1]
        branch = lax.cond(h > -2, lambda: 0.0, lambda: h)  # evaluated twice, as the next loop
        chosen = lax.switch(Y[1], [lambda: 1.0, lambda: jnp.sum(x**3)])
        until = lax.while_loop(
            lambda s: s[0] < 9, lambda s: (s[0] + x[2], s[1] + x[1]), (0.0, 0.0)
        )[1]
        return h**2 + rows.sum() + counted + branch + chosen + until

    x, estimators = jnp.array([1.0, 0.25, 2.0]), [CGE(0.25, axis_name=parallel.AXIS)]
    estimators += [CGE(0.25), CGE(0.25, exact=False)]

    def estimates(x):
        return [estimator(None, fn, x)[1] for estimator in estimators]

    mesh = parallel.mesh(jax.devices()[:2])
    run = jax.shard_map(estimates, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.warns(DifferenceWarning, match="changes"):
        shared, alone, evaluated = jax.jit(run)(x)
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
    np.testing.assert_allclose(shared, evaluated, rtol=1e-4)


def test_devices_share_evaluations_too():
    estimator = CGE(0.5, exact=False, chunk=2, axis_name="data")
    run = jax.shard_map(
        lambda x: estimator(None, linear, x), mesh=parallel.mesh(), in_specs=P(), out_specs=P()
    )
    _, grad = jax.jit(run)(jax.tree.map(jnp.ones_like, LINEAR))
    chex.assert_trees_all_equal(grad, LINEAR)


# --- bad input


def sorts(x):
    return jnp.sum(jnp.sort(x)[:2])


def test_operations_without_a_rule():
    x = jnp.array([3.0, 1.0, 2.0])
    with pytest.warns(DifferenceWarning, match="sort"):
        _, grad = CGE(0.25)(None, sorts, x)
    np.testing.assert_array_equal(grad, [0, 1, 1])
    with pytest.raises(NotImplementedError, match="sort"):
        CGE(0.25, strict=True)(None, sorts, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, grad = CGE(0.25, exact=False)(None, sorts, x)
    np.testing.assert_array_equal(grad, [0, 1, 1])


ONES = jax.tree.map(np.ones_like, LINEAR)


def masked(mask):
    return lambda: CGE(0.5)(None, linear, ONES, mask=mask)


BAD = {
    "empty": (
        masked(jax.tree.map(lambda v: np.zeros(v.shape, bool), LINEAR)),
        ValueError,
        "keeps none of the 9 numbers",
    ),
    "no indices": (masked({"a": np.zeros(0, int), "b": np.zeros(0, int)}), ValueError, "empty"),
    "structure": (masked({"a": KEPT["a"]}), ValueError, "must have the structure of x"),
    "shape": (masked({"a": KEPT["a"].T, "b": KEPT["b"]}), ValueError, r"\(3, 2\) for \(2, 3\)"),
    "floats": (masked({"a": ONES["a"], "b": KEPT["b"]}), TypeError, "flat indices, got float32"),
    "matrix of indices": (masked({"a": np.int32([[1]]), "b": KEPT["b"]}), TypeError, r"\(1, 1\)"),
    "twice": (masked({"a": np.int32([1, 1]), "b": KEPT["b"]}), ValueError, "different and in 0"),
    "outside": (masked({"a": np.int32([6]), "b": KEPT["b"]}), ValueError, r"in 0 \.\. 5"),
    "negative": (masked({"a": np.int32([-1]), "b": KEPT["b"]}), ValueError, r"in 0 \.\. 5"),
    "traced bool": (
        lambda: jax.jit(lambda m: CGE(0.5)(None, linear, ONES, mask=m))(KEPT),
        TypeError,
        "pass weights.indices",
    ),
    "queries": (lambda: CGE(0.5).queries(ONES, {"a": KEPT["a"]}), ValueError, "structure"),
    "integer parameters": (
        lambda: CGE(0.5)(None, linear, {"a": np.ones(2, int), "b": ONES["b"]}, mask=KEPT),
        TypeError,
        "float arrays only",
    ),
    "vector": (lambda: CGE(0.5)(None, lambda x: x["b"], ONES), ValueError, "a scalar"),
    "no pair": (
        lambda: CGE(0.5)(None, linear, ONES, has_aux=True),
        TypeError,
        "must return \\(value, aux\\)",
    ),
    "no pair, evaluated": (
        lambda: CGE(0.5, exact=False)(None, linear, ONES, has_aux=True),
        TypeError,
        "must return \\(value, aux\\)",
    ),
    "mu underflows": (lambda: CGE(1e-25)(None, linear, ONES), ValueError, "lost to underflow"),
    "mu lost": (lambda: CGE(1e-9, exact=False)(None, linear, ONES), ValueError, "lost to rounding"),
    "strict evaluation": (lambda: CGE(0.5, exact=False, strict=True).check(), ValueError, "exact"),
    "wide evaluation": (
        lambda: CGE(0.5, exact=False, primal_dtype=jnp.float64).check(),
        ValueError,
        "leave exact=True",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, kind, message = BAD[mistake]
    with pytest.raises(kind, match=message):
        call()


def test_the_documentation_runs_as_it_stands():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "cge.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(block, names)
    slope = jax.jit(jax.grad(lambda p: names["loss"](p, names["x"], names["y"])[0]))(
        names["params"]
    )
    for g, m, s in zip(*map(jax.tree.leaves, (names["grad"], names["mask"], slope))):
        assert np.all(g[~m] == 0)
        assert np.linalg.norm(g[m] - s[m]) < 0.1 * np.linalg.norm(s[m]) + 1e-4
