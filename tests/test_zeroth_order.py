"""Zeroth-order estimators: closed forms on polynomials, scaling statistics, then invariants."""

import dataclasses
import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from jrobust import keys as jkeys
from jrobust.zeroth_order import (
    CGE,
    RGE,
    Estimator,
    _coordinate,
    _transforms,
    surrogate,
    value_and_grad,
)

# Small dyadic numbers: every value and difference of the quadratic below is exact in float32.
A = np.array([[2, 1, 0, -3], [0, -4, 2, 1], [1, 1, 6, 0], [-2, 0, 1, 8]], np.float32)
B = np.array([1, -0.5, 0.25, 2], np.float32)
X = np.array([0.5, -1, 2, 0.25], np.float32)
MU = 2.0**-5
GRADIENT = (A + A.T) @ X / 2 + B
ESTIMATORS = [
    CGE(MU),
    CGE(MU, central=False),
    CGE(MU, exact=False),
    RGE(MU, 5),
    RGE(MU, 5, direction="sphere", antithetic=True),
]


def name(estimator):
    kind = [type(estimator).__name__]
    kind += [f for f in ("central", "antithetic") if getattr(estimator, f, False)]
    kind += ["evaluated"] if not getattr(estimator, "exact", True) else []
    return "-".join([*kind, getattr(estimator, "direction", "")]).rstrip("-")


every = pytest.mark.parametrize("estimator", ESTIMATORS, ids=name)


def jitted(estimator, fn=None):
    """The single form, compiled once for all points and keys."""
    return jax.jit(lambda key, x: estimator(key, fn or quadratic, x))


def quadratic(x):
    return jnp.vdot(x, A @ x) / 2 + jnp.vdot(B, x)


def rows(x):
    """The quadratic of each row of x (B, 4), by operations that treat rows alone."""
    return jnp.sum(x * jnp.sum(A[None] * x[:, None, :], -1), -1) / 2 + jnp.sum(B[None] * x, -1)


def smooth(tree):
    """Smooth, with all derivatives, over a pytree of two leaves."""
    return jnp.sum(jnp.sin(tree["a"])) * jnp.exp(0.3 * jnp.sum(tree["b"])) + jnp.sum(tree["b"] ** 3)


def tree_point():
    return {"a": jnp.array([[0.1, -0.4], [0.7, 0.2], [0.3, 1.0]]), "b": jnp.array([0.5, -0.2])}


def replace(estimator, **changes):
    return dataclasses.replace(estimator, **changes)


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2, 3, 7, 100])
def test_central_cge_of_a_quadratic_is_its_gradient_exactly(chunk):
    value, grad = CGE(MU, chunk=chunk)(None, quadratic, X)
    np.testing.assert_array_equal(grad, GRADIENT)
    assert value == X @ A @ X / 2 + B @ X


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_forward_cge_of_a_quadratic_errs_by_half_mu_times_the_diagonal(chunk):
    value, grad = CGE(MU, central=False, chunk=chunk)(None, quadratic, X)
    np.testing.assert_array_equal(grad, GRADIENT + MU / 2 * np.diag(A))
    assert value == X @ A @ X / 2 + B @ X


def test_cge_of_a_cubic_errs_by_mu_squared():
    x = np.array([0.5, -1, 2], np.float32)
    _, grad = CGE(0.25)(None, lambda x: jnp.sum(x**3), x)
    np.testing.assert_array_equal(grad, 3 * x**2 + 0.25**2)


def test_sphere_in_one_dimension_is_the_ball_smoothed_derivative(key):
    # u = +-1: always ((x + mu)^3 - (x - mu)^3) / 2mu, which is the derivative of E (x + mu v)^3.
    _, grad = RGE(0.25, 3, direction="sphere", antithetic=True)(key, lambda x: x**3, jnp.array(2.0))
    np.testing.assert_allclose(grad, 12 + 0.25**2, rtol=1e-6)


def test_antithetic_pairs_cancel_the_even_part_exactly(key):
    def even(x):
        return jnp.sum(x**4) - 3 * jnp.prod(x) ** 2

    _, pairs = RGE(0.5, 9, antithetic=True)(key, even, jnp.zeros(5))
    np.testing.assert_array_equal(pairs, np.zeros(5))
    _, forward = RGE(0.5, 9)(key, even, jnp.zeros(5))
    assert np.linalg.norm(forward) > 1e-3


@every
def test_a_pytree_is_one_vector(estimator, key):
    def fn(tree):
        return quadratic(jnp.concatenate([jnp.ravel(tree["a"]), tree["b"]["c"][None]]))

    x = {"a": jnp.array(X[:3]).reshape(3, 1), "b": {"c": jnp.array(X[3])}}
    value, grad = estimator(key, fn, x)
    assert jax.tree.structure(grad) == jax.tree.structure(x)
    assert grad["a"].shape == (3, 1)
    assert grad["b"]["c"].shape == ()
    assert value == quadratic(X)
    if isinstance(estimator, CGE):
        expected = GRADIENT + (0 if estimator.central else MU / 2 * np.diag(A))
        np.testing.assert_array_equal(np.append(grad["a"][:, 0], grad["b"]["c"]), expected)


def test_the_sphere_is_that_of_all_leaves_together(key):
    g = {"a": jnp.array([[1.0, -2.0, 0.5]]), "b": jnp.array([3.0, 0.25])}

    def linear(x):
        return sum(jnp.vdot(g[k], x[k]) for k in g)

    x = jax.tree.map(jnp.zeros_like, g)
    _, estimate = RGE(1.0, 1, direction="sphere")(key, linear, x)
    # estimate = d (g.u) u with ||u|| = 1, hence ||estimate||^2 = d g.estimate.
    square = sum(jnp.vdot(v, v) for v in jax.tree.leaves(estimate))
    np.testing.assert_allclose(square, 5 * linear(estimate), rtol=1e-5)
    assert all(jnp.all(v != 0) for v in jax.tree.leaves(estimate))


# --- scaling: mean and covariance on a linear function ---------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("direction", ["gaussian", "sphere"])
def test_mean_and_covariance_of_rge_on_a_linear_function(direction, antithetic):
    g = np.array([1, -2, 0.5, 3, 0, 0.25])
    d, q, runs = len(g), 3, 20_000
    estimator = RGE(1.0, q, direction=direction, antithetic=antithetic, chunk=2)
    weights = jnp.array(g, jnp.float32)

    def estimate(key):
        return estimator(key, lambda x: jnp.vdot(weights, x), jnp.zeros(d))[1]

    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), runs))
    errors = np.asarray(estimates, np.float64) - g
    se = errors.std(0) / math.sqrt(runs)
    assert np.all(np.abs(errors.mean(0)) < 4 * se)

    # E ||error||^2 = (d + 1)/q ||g||^2 or (d - 1)/q ||g||^2, and all of the covariance.
    outer, unit = np.outer(g, g), g @ g * np.eye(d)
    if direction == "gaussian":
        covariance = (unit + outer) / q
        assert np.isclose(np.trace(covariance), (d + 1) / q * g @ g)
    else:
        covariance = (d / (d + 2) * (unit + 2 * outer) - outer) / q
        assert np.isclose(np.trace(covariance), (d - 1) / q * g @ g)
    squares = np.sum(errors**2, 1)
    assert abs(squares.mean() - np.trace(covariance)) < 4 * squares.std() / math.sqrt(runs)
    products = errors[:, :, None] * errors[:, None, :]
    se = products.std(0) / math.sqrt(runs)
    assert np.all(np.abs(products.mean(0) - covariance) < 5 * se)


@pytest.mark.parametrize("antithetic", [False, True])
def test_gaussian_rge_is_unbiased_for_the_smoothed_gradient(antithetic):
    x, mu, runs = 0.5, 0.5, 40_000
    estimator = RGE(mu, 1, antithetic=antithetic)
    estimate = jax.vmap(lambda key: estimator(key, lambda x: x**3, jnp.array(x))[1])
    estimates = np.asarray(jax.jit(estimate)(jax.random.split(jax.random.key(2), runs)), np.float64)
    smoothed = 3 * x**2 + 3 * mu**2  # d/dx E (x + mu u)^3; without smoothing 3 x^2
    se = estimates.std() / math.sqrt(runs)
    assert abs(estimates.mean() - smoothed) < 4 * se < 3 * mu**2 / 4


# --- the calls -----------------------------------------------------------------------------------


@every
def test_chunks_change_only_memory(estimator, key):
    reference = replace(estimator, chunk=2)(key, smooth, tree_point())[1]
    for chunk in (None, 3):
        grad = replace(estimator, chunk=chunk)(key, smooth, tree_point())[1]
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(grad)):
            # Values of size 3 carry rounding 2e-7 each; a quotient divides it by mu.
            np.testing.assert_allclose(a, b, atol=20 * 2e-7 / MU)


def largest(jaxpr):
    """The size of the largest intermediate in a jaxpr, those of its calls and loops included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in equation.outvars]
        sizes += [largest(sub) for sub in jaxprs_in_params(equation.params)]
    return max(sizes)


@every
@pytest.mark.parametrize("chunk", [2, 5, 40])
def test_no_intermediate_holds_more_than_chunk_points(estimator, chunk, key):
    d, samples = 41, 43
    if isinstance(estimator, RGE):
        estimator = replace(estimator, samples=samples)
    if isinstance(estimator, CGE):
        estimator = replace(estimator, exact=False)
    estimator = replace(estimator, chunk=chunk)
    x = jnp.linspace(0.1, 1.0, d)
    jaxpr = jax.make_jaxpr(lambda key, x: estimator(key, lambda x: jnp.sum(jnp.sin(x)), x))(key, x)
    assert largest(jaxpr.jaxpr) <= chunk * d
    # And the chunk is used, up to even chunks and the points of a pair that may be apart.
    assert largest(jaxpr.jaxpr) > chunk * d // 4 - d


@every
def test_queries_are_the_evaluations_made(estimator, key):
    calls = []

    def black_box(x):
        assert not isinstance(x, jax.core.Tracer)
        assert x.shape == (3, 4)
        calls.append(np.asarray(x))
        return np.asarray(rows(x))

    x = jnp.stack([X, X + 1, -X])
    values, _ = estimator.per_example(jax.random.split(key, 3), black_box, x, host=True)
    d = 4 if isinstance(estimator, CGE) else 5
    pairs = getattr(estimator, "central", False) or getattr(estimator, "antithetic", False)
    assert len(calls) == estimator.queries(x[0]) == 1 + d * (1 + pairs)
    assert estimator.queries(jax.ShapeDtypeStruct((4,), jnp.float32)) == len(calls)
    np.testing.assert_array_equal(calls[0], x)
    np.testing.assert_array_equal(values, rows(x))
    assert len({c.tobytes() for c in calls}) == len(calls)  # no point is paid for twice


@every
def test_host_and_traced_loops_agree(estimator, key):
    x = jnp.stack([X, X + 1, -X])
    keys = jax.random.split(key, 3)
    traced = jax.jit(lambda keys, x: estimator.per_example(keys, rows, x))(keys, x)
    host = estimator.per_example(keys, lambda x: np.asarray(rows(x)), x, host=True)
    for a, b in zip(traced, host):
        assert isinstance(b, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=50 * 2.0**-23 / MU)


def test_a_float64_black_box_keeps_its_digits():
    offset = 2.0**30  # float32 numbers near it are 128 apart: a float32 difference would be zero
    x = np.stack([X, X / 2])
    _, grad = CGE(MU).per_example(
        None, lambda x: offset + np.asarray(rows(x), np.float64), x, host=True
    )
    np.testing.assert_array_equal(grad[0], GRADIENT)


@every
def test_a_row_is_the_single_form_with_its_key(estimator, key):
    x = jnp.stack([X, X + 1, -X])
    keys = jax.random.split(key, 3)
    values, grads = estimator.per_example(keys, rows, x)
    single = jitted(estimator, lambda p: rows(p[None])[0])
    for row in range(3):
        value, grad = single(keys[row], x[row])
        np.testing.assert_allclose(values[row], value, rtol=1e-6)
        np.testing.assert_allclose(grads[row], grad, rtol=1e-5, atol=50 * 2.0**-23 / MU)
    if isinstance(estimator, CGE):
        error = 0 if estimator.central else MU / 2 * np.diag(A)
        np.testing.assert_array_equal(grads[0], GRADIENT + error)


@every
def test_rows_do_not_depend_on_their_batch(estimator, key):
    x = jax.random.normal(key, (6, 4))
    keys = jkeys.examples(key, jnp.arange(6))
    run = jax.jit(lambda keys, x: estimator.per_example(keys, rows, x))
    values, grads = run(keys, x)
    order = jnp.array([4, 1, 5, 0, 3, 2])
    again = run(keys[order], x[order])
    np.testing.assert_array_equal(again[0], values[order])
    np.testing.assert_array_equal(again[1], grads[order])
    others = run(keys, x.at[1:].set(7.0))  # other company, same shape
    np.testing.assert_array_equal(others[1][0], grads[0])
    if isinstance(estimator, RGE):  # equal rows with different keys draw different directions
        assert np.any(np.diff(run(keys, jnp.stack([x[0]] * 6))[1], axis=0) != 0, 1).all()


def test_per_example_takes_pytrees():
    x = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), tree_point())
    values, grads = CGE(1e-2).per_example(None, jax.vmap(smooth), x)
    exact = jax.vmap(jax.grad(smooth))(x)
    np.testing.assert_array_equal(values, jax.vmap(smooth)(x))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact)):
        np.testing.assert_allclose(a, b, atol=2e-3)


@every
def test_value_and_grad_takes_the_place_of_jax(estimator, key):
    def fn(x, scale, *, shift):
        return scale * quadratic(x) + shift

    x, scale = jnp.array(X), jnp.array(2.0)
    value, grad = jax.jit(value_and_grad(fn, estimator))(key, x, scale, shift=1.0)
    assert value == fn(x, 2.0, shift=1.0)
    expected = jitted(estimator, lambda x: 2 * quadratic(x))(key, x)[1]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    assert grad.shape == x.shape
    batch = jax.vmap(value_and_grad(quadratic, estimator), (0, None))
    values, grads = batch(jax.random.split(key, 3), x)
    assert grads.shape == (3, 4)
    assert np.all(values == quadratic(X))
    if isinstance(estimator, RGE):
        assert np.all(grads[0] != grads[1])


@every
def test_no_retrace_on_a_new_mu_key_or_point(estimator, key):
    traces = []

    def fn(x):
        traces.append(0)
        return quadratic(x)

    run = jax.jit(lambda estimator, key, x: estimator(key, fn, x))
    run(replace(estimator, mu=0.5), key, jnp.array(X))
    first = len(traces)
    run(replace(estimator, mu=0.25), jax.random.key(9), jnp.array(X) + 1)
    assert len(traces) == first > 0


def test_mu_is_a_leaf_that_vmaps():
    mus = jnp.array([0.5, 0.25, 0.125])
    grads = jax.vmap(lambda mu: CGE(mu, central=False)(None, quadratic, jnp.array(X))[1])(mus)
    np.testing.assert_array_equal(grads, GRADIENT[None] + mus[:, None] / 2 * np.diag(A)[None])


@every
def test_half_precision_leaves_are_summed_in_float32(estimator, key):
    x = jnp.array(X, jnp.bfloat16)
    estimator = replace(estimator, mu=0.5)

    def fn(x):
        return quadratic(x.astype(jnp.float32))

    value, grad = estimator(key, fn, x)
    assert grad.dtype == jnp.bfloat16
    assert value.dtype == jnp.float32
    if isinstance(estimator, CGE):
        error = 0 if estimator.central else 0.25 * np.diag(A)
        np.testing.assert_array_equal(grad, jnp.asarray(GRADIENT + error, jnp.bfloat16))


def test_a_non_finite_value_spoils_its_own_coordinate_only():
    _, grad = CGE(MU)(None, lambda x: quadratic(x) + jnp.where(x[1] > X[1], jnp.nan, 0.0), X)
    assert np.isnan(grad[1])
    np.testing.assert_array_equal(np.delete(grad, 1), np.delete(GRADIENT, 1))


@pytest.mark.parametrize("estimator", [ESTIMATORS[1], ESTIMATORS[4]], ids=name)
def test_shard_map_gives_each_device_its_estimate(estimator, key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shifts, x = jnp.arange(8.0), jnp.array(X)
    keys = jax.random.split(key, 8)

    def local(keys, x, shift):  # replicated x; a key and a loss that differ between devices
        value, grad = estimator(keys[0], lambda x: quadratic(x + shift), x)
        values, grads = estimator.per_example(keys, lambda x: rows(x + shift[None]), x[None])
        return value[None], grad[None], values, grads

    specs = (P("data"), P(), P("data"))
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data")))
    value, grad, values, grads = run(keys, x, shifts)
    single = jax.jit(lambda key, x, shift: estimator(key, lambda x: quadratic(x + shift), x))
    for n in range(8):
        expected = single(keys[n], x, shifts[n])
        for got in ((value[n], grad[n]), (values[n], grads[n])):
            np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
            np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=800 * 2.0**-23 / MU)


@every
def test_lowers_for_every_platform(estimator, key):
    platforms = ["cpu", "cuda", "tpu"]
    exported = jax.export.export(jitted(estimator), platforms=platforms)(key, jnp.array(X))
    assert exported.platforms == tuple(platforms)


# --- surrogate ---------------------------------------------------------------------------------


def quantised(x):
    """A smooth function of values rounded to 1/64: autodiff through it gives zero."""
    return jnp.sum(jnp.sin(jnp.floor(64 * x + 0.5) / 64))


def test_surrogate_is_autodiff_on_a_smooth_function():
    x, mu = tree_point(), 2e-2
    g = surrogate(smooth, CGE(mu))
    assert g(None, x) == smooth(x)
    value, pull = jax.vjp(lambda x: g(None, x), x)
    assert value == smooth(x)
    third = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(_third(x)))
    for cotangent in (1.0, -2.5):
        (got,) = pull(jnp.float32(cotangent))
        exact = jax.tree.map(lambda g, c=cotangent: c * g, jax.grad(smooth)(x))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
            # The error of a central difference is mu^2 f'''/6 and rounding over mu.
            bound = abs(cotangent) * (mu**2 * third / 6 * 1.1 + 4 * 2.0**-23 / mu)
            np.testing.assert_allclose(a, b, atol=bound)


def _third(x):
    """Third derivative along each coordinate."""
    flat, unravel = ravel_pytree(x)

    def along(i):
        f = lambda t: smooth(unravel(flat.at[i].add(t)))  # noqa: E731
        return jax.grad(jax.grad(jax.grad(f)))(0.0)

    return jax.vmap(along)(jnp.arange(flat.size))


@pytest.mark.parametrize("jit", [False, True])
def test_surrogate_trains_a_network_in_front_of_a_simulator(jit):
    net_x = jnp.array([0.3, -0.8, 0.5])
    params = {"w": jnp.array([[0.2, -0.1, 0.4], [0.7, 0.3, -0.6]]), "b": jnp.array([0.1, 0.2])}

    def net(p):
        return jnp.tanh(jnp.sum(p["w"] * net_x[None], -1) + p["b"])

    mu = (
        1 / 64 * 4
    )  # on the grid of the simulator, so that the difference is that of the smooth one
    through = jax.grad(lambda p, key: surrogate(quantised, CGE(mu))(key, net(p)))
    through = jax.jit(through) if jit else through
    exact = jax.grad(lambda p: jnp.sum(jnp.sin(net(p))))(params)
    assert all(
        jnp.all(v == 0) for v in jax.tree.leaves(jax.grad(lambda p: quantised(net(p)))(params))
    )
    for key in (None, jax.random.key(3)):
        got = through(params, key)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
            # Rounding moves the point by 1/128 at most, and |sin''| <= 1.
            np.testing.assert_allclose(a, b, atol=1 / 128 + mu**2 / 6)
            assert np.linalg.norm(b) > 5 * np.linalg.norm(a - b)


@every
def test_surrogate_with_keys_under_jit_and_vmap(estimator, key):
    g = surrogate(quadratic, estimator)
    x = jnp.array(X)
    keys = jax.random.split(key, 3)
    np.testing.assert_array_equal(jax.jit(g)(key, x), quadratic(x))
    grads = jax.jit(jax.vmap(jax.grad(g, argnums=1), (0, None)))(keys, x)
    expected = jax.vmap(jitted(estimator), (0, None))(keys, x)[1]
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-4)
    # and as an argument of the differentiated function, with its own symbolic zero
    value, pull = jax.vjp(g, keys[0], x)
    key_cotangent, cotangent = pull(jnp.ones_like(value))
    assert key_cotangent.dtype == jax.dtypes.float0
    np.testing.assert_allclose(cotangent, grads[0], rtol=1e-5, atol=1e-4)


def test_surrogate_with_mu_and_data_from_outside():
    def loss(x, mu, data):
        return surrogate(lambda x: quantised(x * data), CGE(mu))(None, x)

    x, data = jnp.array([0.5, 0.25]), jnp.array([1.0, 0.5])
    got = jax.jit(jax.grad(loss))(x, 0.125, data)
    expected = (np.sin(x * data + 0.125 * data) - np.sin(x * data - 0.125 * data)) / 0.25
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    rows = jax.vmap(jax.grad(loss), (None, None, 0))(x, 0.125, jnp.stack([data, data]))
    np.testing.assert_allclose(rows, jnp.stack([got, got]), rtol=1e-6)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(loss, argnums=2)(x, 0.125, data)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: loss(x, 0.125, data), (x,), (x,))


def test_surrogate_costs_one_query_until_differentiated():
    calls = []

    def fn(x):
        jax.debug.callback(calls.append, x)
        return quadratic(x)

    g = surrogate(fn, CGE(MU, exact=False))
    g(None, jnp.array(X))
    jax.effects_barrier()
    assert len(calls) == 1
    jax.grad(g, argnums=1)(None, jnp.array(X))
    jax.effects_barrier()
    assert len(calls) == 1 + CGE(MU).queries(X)


# --- bad input ---------------------------------------------------------------------------------


def total(x):
    return jnp.sum(x)


K = jax.random.key
BAD = {
    "mu zero": (lambda: CGE(0.0).check(), ValueError, "mu must be positive and finite, got 0.0"),
    "mu negative": (lambda: RGE(-1e-3, 2).check(), ValueError, "mu must be positive"),
    "mu nan": (lambda: CGE(math.nan).check(), ValueError, "mu must be positive and finite"),
    "mu an array": (lambda: CGE(jnp.ones(2)).check(), ValueError, "single number"),
    "mu lost": (lambda: CGE(1e-8, exact=False).check(jnp.ones(3)), ValueError, "lost to rounding"),
    "mu lost at a large x": (
        lambda: CGE(1e-3, exact=False)(None, total, jnp.array([1e5])),
        ValueError,
        "lost to rounding",
    ),
    "mu lost in bfloat16": (
        lambda: CGE(5e-3, exact=False).check(jnp.ones(3, jnp.bfloat16)),
        ValueError,
        "bfloat16 numbers near",
    ),
    "mu lost over many dimensions": (
        lambda: RGE(1e-6, 2, direction="sphere").check(jnp.ones(10_000)),
        ValueError,
        "lost to rounding",
    ),
    "x not finite": (lambda: CGE(1e-2).check(jnp.array([jnp.inf])), ValueError, "must be finite"),
    "integer x": (lambda: CGE(1e-2)(None, total, jnp.arange(3)), TypeError, "int32"),
    "integer leaf": (
        lambda: value_and_grad(lambda x: x[0], CGE(1e-2))(None, (jnp.array(1.0), jnp.array(2))),
        TypeError,
        "float arrays only",
    ),
    "empty pytree": (lambda: CGE(1e-2)(None, total, {}), ValueError, "x is empty"),
    "empty array": (lambda: CGE(1e-2)(None, total, jnp.zeros((0, 3))), ValueError, "x is empty"),
    "vector fn": (lambda: CGE(1e-2)(None, lambda x: x, jnp.ones(3)), ValueError, "a scalar"),
    "integer fn": (
        lambda: CGE(1e-2)(None, lambda x: jnp.argmax(x), jnp.ones(3)),
        TypeError,
        "float32 values, got int32",
    ),
    "half-precision fn": (
        lambda: CGE(1e-2)(None, lambda x: total(x).astype(jnp.bfloat16), jnp.ones(3)),
        TypeError,
        "half-precision",
    ),
    "fn with aux": (lambda: CGE(1e-2)(None, lambda x: (0, x), jnp.ones(3)), TypeError, "tuple"),
    "surrogate of a vector": (
        lambda: surrogate(lambda x: x, CGE(1e-2))(None, jnp.ones(3)),
        ValueError,
        "a scalar",
    ),
    "surrogate with bad mu": (
        lambda: surrogate(total, CGE(-1.0))(None, jnp.ones(3)),
        ValueError,
        "mu must be positive",
    ),
    "no samples": (lambda: RGE(1e-2, 0).check(), ValueError, "samples must be an int >= 1, got 0"),
    "fractional samples": (lambda: RGE(1e-2, 1.5).check(), ValueError, "samples must be an int"),
    "direction": (lambda: RGE(1e-2, 1, direction="cube").check(), ValueError, "'cube'"),
    "chunk": (lambda: CGE(1e-2, central=False, chunk=0).check(), ValueError, "chunk must be"),
    "chunk splits pairs": (
        lambda: RGE(1e-2, 3, antithetic=True, chunk=1)(K(0), total, jnp.ones(3)),
        ValueError,
        "pair of points",
    ),
    "no key": (lambda: RGE(1e-2, 3)(None, total, jnp.ones(3)), TypeError, "typed PRNG keys"),
    "raw key": (
        lambda: RGE(1e-2, 3)(jnp.zeros(2, jnp.uint32), total, jnp.ones(3)),
        TypeError,
        "typed PRNG keys",
    ),
    "keys for one": (
        lambda: RGE(1e-2, 3)(jax.random.split(K(0), 2), total, jnp.ones(3)),
        ValueError,
        "a single key",
    ),
    "one key for rows": (
        lambda: RGE(1e-2, 3).per_example(K(0), rows, jnp.ones((2, 4))),
        ValueError,
        "one for each example",
    ),
    "fn sums the rows": (
        lambda: CGE(1e-2).per_example(None, total, jnp.ones((2, 4))),
        ValueError,
        r"one value for each row, shape \(2,\)",
    ),
    "ragged batch": (
        lambda: CGE(1e-2).per_example(None, rows, (jnp.ones((2, 4)), jnp.ones((3, 4)))),
        ValueError,
        "example axis",
    ),
    "host under jit": (
        lambda: jax.jit(lambda x: CGE(1e-2).per_example(None, rows, x, host=True))(
            jnp.ones((2, 4))
        ),
        TypeError,
        "needs concrete arrays",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, error, message = BAD[mistake]
    with pytest.raises(error, match=message):
        call()


def test_errors_come_before_any_evaluation():
    def fn(x):
        raise AssertionError("evaluated")

    for estimator in (
        CGE(0.0),
        CGE(1e-25),
        CGE(1e-9, exact=False),
        RGE(1e-2, 0),
        CGE(1e-2, chunk=1),
    ):
        with pytest.raises(ValueError, match=r"mu|samples|chunk"):
            estimator(jax.random.key(0), fn, jnp.ones(3))


def test_a_good_mu_passes_whatever_the_batch():
    estimator = RGE(1e-5, 2, direction="sphere")
    estimator.check(jnp.ones((500, 100)), batched=True)
    with pytest.raises(ValueError, match="lost"):
        estimator.check(jnp.ones((500, 100)))
    CGE(2.0**-20).check({"a": jnp.zeros(3), "b": np.ones(2, np.float32), "c": 0.5})


def test_values_unknown_under_jit_are_not_looked_at():
    grad = jax.jit(lambda mu, x: CGE(mu)(None, total, x)[1])(jnp.array(0.5), jnp.ones(2))
    np.testing.assert_array_equal(grad, np.ones(2))
    with pytest.raises(ValueError, match="mu must be positive"):  # but a constant is known
        jax.jit(lambda x: CGE(-1.0)(None, total, x)[1])(jnp.ones(2))
    known = jnp.ones(2)
    np.testing.assert_array_equal(jax.jit(lambda: CGE(0.5)(None, total, known)[1])(), known)
    with pytest.raises(ValueError, match="lost"):
        jax.jit(lambda: CGE(1e-9, exact=False)(None, total, known))()


def test_estimators_are_of_one_kind():
    assert all(isinstance(estimator, Estimator) for estimator in ESTIMATORS)
    assert len(jax.tree.leaves(ESTIMATORS)) == len(ESTIMATORS)  # mu alone is a leaf


@pytest.mark.parametrize("module", [_coordinate, _transforms])
def test_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
