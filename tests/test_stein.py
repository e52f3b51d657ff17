"""Sparse grids against the moments, Stein's derivatives against closed forms, and the example."""

import doctest
import importlib.util
import itertools
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jrobust import training
from jrobust.models import Network
from jrobust.zeroth_order import CGE, _stein, sparse_grid, stein

RNG = np.random.default_rng(0)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_examples_of_the_page_hold():
    assert doctest.testmod(_stein).failed == 0


# --- sparse grids ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2, 3, 5, 8])
def test_in_one_dimension_it_is_the_rule_of_gauss_and_hermite(level):
    nodes, weights = sparse_grid(1, level)
    wanted, heights = np.polynomial.hermite_e.hermegauss(level)
    order = np.argsort(nodes[:, 0])
    np.testing.assert_allclose(nodes[order, 0], wanted, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(weights[order], heights / math.sqrt(2 * math.pi), rtol=1e-10)


def moment(powers):
    """E prod z_i^p_i."""
    return math.prod(0 if p % 2 else math.prod(range(1, p, 2)) for p in powers)


@pytest.mark.parametrize(("dimension", "level"), [(1, 4), (2, 3), (2, 5), (3, 4), (6, 3), (5, 2)])
def test_it_is_exact_up_to_its_degree_and_not_beyond(dimension, level):
    nodes, weights = sparse_grid(dimension, level)
    for powers in itertools.product(range(2 * level), repeat=dimension):
        if sum(powers) < 2 * level:
            found = np.prod(nodes**powers, 1) @ weights
            assert abs(found - moment(powers)) < 1e-9 * max(1, moment(powers))
    # The rule of n nodes is n! below the moment of order 2 n.
    power = nodes[:, 0] ** (2 * level) @ weights
    np.testing.assert_allclose(moment((2 * level,)) - power, math.factorial(level), rtol=1e-9)


@pytest.mark.parametrize(
    ("dimension", "level", "count"), [(20, 3, 841), (21, 3, 925), (30, 2, 61), (7, 1, 1)]
)
def test_nodes_are_few_different_and_in_pairs(dimension, level, count):
    nodes, weights = sparse_grid(dimension, level)
    assert nodes.shape == (count, dimension)
    assert nodes.dtype == weights.dtype == np.float64
    known = {tuple(node): weight for node, weight in zip(nodes, weights)}
    assert len(known) == count
    assert all(known[tuple(-np.array(node))] == weight for node, weight in known.items())
    nodes[:] = weights[:] = 0  # what was returned is the caller's own
    assert sparse_grid(dimension, level)[1].any()


# --- derivatives -------------------------------------------------------------------------------


def polynomial(powers):
    """A product of powers, and its smoothed value, gradient and second derivatives, float64."""

    def smooth(p, x, sigma):
        """E (x + sigma z)^p."""
        return sum(
            math.comb(p, j) * x ** (p - j) * sigma**j * moment((j,)) for j in range(0, p + 1, 2)
        )

    def wanted(x, sigma):
        parts = np.stack([smooth(p, x[:, i], sigma) for i, p in enumerate(powers)])
        slopes = [p * smooth(p - 1, x[:, i], sigma) if p else 0 for i, p in enumerate(powers)]
        bends = [
            p * (p - 1) * smooth(p - 2, x[:, i], sigma) if p > 1 else 0
            for i, p in enumerate(powers)
        ]
        others = [np.prod(np.delete(parts, i, 0), 0) for i in range(len(powers))]
        one = np.ones(len(x))
        return (
            np.prod(parts, 0),
            np.stack([one * s * o for s, o in zip(slopes, others)], 1),
            np.stack([one * b * o for b, o in zip(bends, others)], 1),
        )

    return lambda x: jnp.prod(x ** np.array([powers]), 1), wanted


@pytest.mark.parametrize("level", [3, 4])
def test_polynomials_have_the_derivatives_of_their_smoothing(level):
    x, sigma, degree = RNG.normal(size=(3, 3)), 0.3, 2 * level - 1
    reached = [False] * 3
    with jax.enable_x64(True):
        for powers in [(1, 1, 1), (0, 3, 0), (2, 1, 0), (2, 2, 0), (4, 0, 1), (2, 2, 2), (8, 0, 0)]:
            f, wanted = polynomial(powers)
            found = stein(f, x, sigma, level)
            value, grad, second = wanted(x, sigma)
            right = [
                np.allclose(a, b, rtol=1e-9, atol=1e-9)
                for a, b in zip(found, (value, grad, second))
            ]
            np.testing.assert_allclose(found.laplacian, np.sum(found.second, 1))
            total = sum(powers)
            for i, less in enumerate((0, 1, 2)):
                assert right[i] or total > degree - less, (powers, i)
                reached[i] |= not right[i]
    assert all(reached), "no polynomial is beyond the level"


def test_the_error_of_an_exponential_falls_with_the_level():
    a, sigma = np.array([0.6, -0.4, 0.2]), 0.5
    x = RNG.normal(size=(4, 3))
    with jax.enable_x64(True):
        wanted = np.exp(x @ a + sigma**2 * (a @ a) / 2)
        errors = []
        for level in (3, 4, 5):
            found = stein(lambda x: jnp.exp(x @ a), x, sigma, level)
            errors.append(
                [
                    np.max(np.abs(found.value / wanted - 1)),
                    np.max(np.abs(np.asarray(found.grad) / wanted[:, None] - a)),
                    np.max(np.abs(np.asarray(found.second) / wanted[:, None] - a**2)),
                ]
            )
    errors = np.array(errors)
    assert np.all(errors[1:] < 0.1 * errors[:-1])
    assert np.all(errors[-1] < 1e-5)


def test_constants_cancel_before_they_meet_the_weights():
    x = RNG.normal(size=(5, 21)).astype(np.float32)
    found = jax.jit(lambda x: stein(lambda x: jnp.full(len(x), 1e4 / 3), x, 0.1))(x)
    assert not np.any(found.grad)
    assert not np.any(found.second)
    np.testing.assert_array_equal(found.value, np.float32(1e4 / 3))


def waves(x):
    return jnp.sum(jnp.sin(x) * jnp.cos(jnp.roll(x, 1, 1)), 1)


def test_in_twenty_dimensions_float32_keeps_its_digits():
    x = RNG.uniform(size=(6, 20)).astype(np.float32)
    found = jax.jit(lambda x, sigma: stein(waves, x, sigma))(x, 0.1)
    with jax.enable_x64(True):
        wanted = stein(waves, x.astype(np.float64), 0.1)
        # sin and cos of different coordinates: each factor is damped by exp(-sigma^2 / 2).
        z = x.astype(np.float64)
        damped = np.exp(-(0.1**2))
        np.testing.assert_allclose(wanted.value, damped * np.asarray(waves(z)), rtol=1e-5)
        np.testing.assert_allclose(wanted.laplacian, -2 * damped * np.asarray(waves(z)), rtol=1e-2)
        # Not so by the weights of the grid themselves: the errors of all dimensions enter in each.
        nodes, weights = sparse_grid(20, 3)
        values = np.asarray(waves((z[:, None] + 0.1 * nodes[None]).reshape(-1, 20))).reshape(6, -1)
        plain = values @ (weights * (np.sum(nodes**2, 1) - 20)) / 0.1**2
        assert np.all(np.abs(plain / (-2 * damped * np.asarray(waves(z))) - 1) > 0.03)
    np.testing.assert_allclose(found.value, wanted.value, rtol=1e-4)
    np.testing.assert_allclose(found.grad, wanted.grad, atol=1e-3)
    np.testing.assert_allclose(found.second, wanted.second, atol=1e-3)
    assert found.value.dtype == found.second.dtype == jnp.float32


def sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from sizes(inner)


def test_chunks_bound_the_memory_and_change_nothing():
    x, rows = RNG.normal(size=(2, 6)).astype(np.float32), []

    def f(x):
        rows.append(len(x))
        return waves(x)

    whole = jax.jit(lambda x: stein(f, x, 0.2))(x)
    assert sum(rows) == 2 * len(sparse_grid(6, 3)[1])
    rows.clear()
    parts = jax.jit(lambda x: stein(f, x, 0.2, chunk=5))(x)
    assert max(rows) == 2 * 2 * 5
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(one, other, atol=1e-4)
    program = jax.make_jaxpr(lambda x: stein(waves, x, 0.2, chunk=5))(x)
    assert max(sizes(program.jaxpr)) < max(
        sizes(jax.make_jaxpr(lambda x: stein(waves, x, 0.2))(x).jaxpr)
    )


def test_exact_differences_pass_through_the_loop():
    """A physics-informed loss of the parameters, with no operation that has no rule."""
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    params = {"w": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32), "v": jnp.ones(5) / 3}

    def loss(params):
        def f(x):
            return jnp.tanh(x @ params["w"]) @ params["v"]

        found = stein(f, x, 0.3, chunk=3)
        return jnp.mean((found.laplacian + jnp.sum(found.grad**2, 1) - found.value) ** 2)

    _, grad = jax.jit(lambda p: CGE(1e-5, strict=True)(None, loss, p))(params)
    wanted = jax.jit(jax.grad(loss))(params)
    for name in params:
        np.testing.assert_allclose(grad[name], wanted[name], rtol=2e-3, atol=2e-3)


ONE = np.ones((2, 3), np.float32)
BAD = {
    "x": (lambda: stein(waves, ONE[0], 0.1), ValueError, "shape"),
    "half": (lambda: stein(waves, ONE.astype(jnp.bfloat16), 0.1), TypeError, "float32"),
    "sigma": (lambda: stein(waves, ONE, 0.0), ValueError, "sigma"),
    "many sigmas": (lambda: stein(waves, ONE, np.ones(3)), ValueError, "one positive"),
    "level": (lambda: stein(waves, ONE, 0.1, 2), ValueError, "level"),
    "chunk": (lambda: stein(waves, ONE, 0.1, chunk=0), ValueError, "chunk"),
    "columns": (lambda: stein(lambda x: x[:, :1], ONE, 0.1), ValueError, "one value for each row"),
    "dimension": (lambda: sparse_grid(0, 3), ValueError, "dimension"),
    "level of the grid": (lambda: sparse_grid(2, 0), ValueError, "level"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, error, message = BAD[mistake]
    with pytest.raises(error, match=message):
        call()


# --- the example -------------------------------------------------------------------------------


def example():
    spec = importlib.util.spec_from_file_location("tt_zo_hjb", ROOT / "examples" / "tt_zo_hjb.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_residual_of_the_example_is_that_of_its_equation():
    """Against derivatives of u by jax, for an N whose smoothing is known, and for the solution."""
    hjb = example()
    sigma = 0.2
    c = np.linspace(-0.3, 0.5, 21).astype(np.float32)

    def n(z):
        return z @ c + 0.1 * jnp.sum(z * z, -1)

    shift = 0.1 * 21 * sigma**2  # of the smoothed N

    def network(values):
        logits = lambda params, extra, z: values(z)[:, None]  # noqa: E731
        return Network(None, logits, None, None)

    def u(z):
        return jnp.sum(z[:20]) + (1 - z[20]) * (n(z) + shift)

    z = RNG.uniform(0.1, 0.9, (5, 21)).astype(np.float32)

    @jax.jit
    def wanted(z):
        slope, bend = jax.vmap(jax.grad(u))(z), jax.vmap(jax.hessian(u))(z)
        laplacian = jnp.trace(bend[:, :20, :20], axis1=1, axis2=2)
        residual = slope[:, 20] + laplacian - 0.05 * jnp.sum(slope[:, :20] ** 2, 1) + 2
        return jnp.mean(residual**2), jax.vmap(u)(z)

    def found(values):
        objective, net = hjb.Residual(sigma), network(values)

        @jax.jit
        def both(z):
            batch = training.batch(z, np.zeros(5, np.int32))
            return objective(None, net, {}, {}, batch)[0], objective.solution(net, {}, {}, z)

        return both(z)

    for one, other in zip(found(n), wanted(z)):
        np.testing.assert_allclose(one, other, rtol=2e-3)
    loss, solution = found(lambda z: jnp.ones(len(z)))
    assert loss < 1e-9
    np.testing.assert_allclose(solution, hjb.exact(z), rtol=1e-6)


def test_the_example_trains_what_cannot_be_differentiated(monkeypatch):
    hjb = example()

    @jax.custom_jvp
    def tanh(h):
        return jnp.tanh(h)

    @tanh.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    monkeypatch.setattr(hjb, "activation", tanh)
    with pytest.raises(AssertionError, match="differentiated"):
        jax.grad(lambda x: hjb.activation(x))(1.0)
    tiny = ["--steps", "3", "--points", "1", "--samples", "2", "--test", "50", "--limit", "1"]
    found = hjb.main([*tiny, "--ways", "TT, hybrid"])["TT, hybrid"]
    assert found["forwards"] == 3 * (2 + 3) * 925
    assert found["queries"] == 3 * (2 + 3)
    assert 0 < found["error"] < 1


@pytest.mark.full
def test_the_example_finds_the_solution():
    done = subprocess.run(
        [sys.executable, "examples/tt_zo_hjb.py", "--small", "--json", "--ways", "TT, hybrid"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])["TT, hybrid"]
    assert found["error"] < 0.03, "half of that of N = 0"
