"""Hybrid: the two estimators with masks of their own, added."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrobust.zeroth_order import CGE, RGE, Hybrid, _hybrid

KEY = jax.random.key(5)
X = {
    "a": jnp.array([0.3, -1.0]),
    "b": jnp.linspace(-1, 1, 12).reshape(3, 4),
    "c": jnp.array(0.5),
    "d": jnp.linspace(0, 2, 7),
}
SMALL = {name: leaf.size <= 2 for name, leaf in X.items()}
CGE_, RGE_ = CGE(2.0**-6, central=False), RGE(2.0**-6, 3, direction="spheres", antithetic=True)
HYBRID = Hybrid(CGE_, RGE_, 2)


def fn(x):
    coupled = jnp.sin(jnp.sum(x["b"]) * x["c"] + jnp.sum(x["d"] ** 2))
    return coupled + jnp.vdot(x["a"], x["a"]) * x["c"]


def test_the_examples_of_the_page_hold():
    assert doctest.testmod(_hybrid).failed == 0


def test_it_is_the_sum_of_its_masked_parts():
    def both(key, x):
        return jax.tree.map(
            jnp.add,
            CGE_(None, fn, x, mask={n: np.full(X[n].shape, SMALL[n]) for n in X})[1],
            RGE_(key, fn, x, mask={n: np.full(X[n].shape, not SMALL[n]) for n in X})[1],
        )

    value, grad = jax.jit(lambda key, x: HYBRID(key, fn, x))(KEY, X)
    wanted = jax.jit(both)(KEY, X)
    np.testing.assert_allclose(value, fn(X), rtol=1e-6)
    for name in X:
        assert np.any(wanted[name])
        np.testing.assert_allclose(grad[name], wanted[name], rtol=1e-5, atol=1e-6)
        assert grad[name].shape == X[name].shape


@pytest.mark.parametrize(("limit", "part"), [(0, RGE_), (12, CGE_)])
def test_at_its_limits_it_is_one_of_them(limit, part):
    hybrid = Hybrid(CGE_, RGE_, limit)
    value, grad = jax.jit(lambda x: hybrid(KEY, fn, x))(X)
    wanted, expected = jax.jit(lambda x: part(KEY, fn, x))(X)
    assert value == wanted
    for name in X:
        np.testing.assert_allclose(grad[name], expected[name], rtol=1e-5, atol=1e-6)
    assert hybrid.queries(X) == part.queries(X)


def test_queries_and_masks_go_to_their_parts():
    assert HYBRID.queries(X) == (1 + 3) + (1 + 2 * 3)
    mask = {
        "a": jnp.array([1]),
        "b": jnp.array([0, 11, 5]),
        "c": jnp.zeros(0, int),
        "d": jnp.zeros(0, int),
    }
    assert HYBRID.queries(X, mask) == (1 + 1) + (1 + 2 * 3)
    run = jax.jit(lambda mask: HYBRID(KEY, lambda x: (fn(x), x["a"]), X, mask=mask, has_aux=True))
    (value, aux), grad = run(mask)
    np.testing.assert_allclose(value, fn(X), rtol=1e-6)
    np.testing.assert_array_equal(aux, X["a"])
    assert {name: np.flatnonzero(leaf).tolist() for name, leaf in grad.items()} == {
        "a": [1], "b": [0, 5, 11], "c": [], "d": []
    }  # fmt: skip
    alone = {**mask, "a": jnp.zeros(0, int)}
    assert HYBRID.queries(X, alone) == 1 + 2 * 3
    _, grad = jax.jit(lambda x: HYBRID(KEY, fn, x, mask=alone))(X)
    assert not np.any(grad["a"])
    assert np.any(grad["b"])


def test_large_gradients_of_small_leaves_do_not_disturb_the_others():
    def steep(estimator):
        def estimate(size):
            return estimator(KEY, lambda x: jnp.sum(x["b"]) + size * x["c"], X)[1]

        run = jax.jit(estimate)
        return run(0.0), run(2.0**12)

    flat, high = steep(HYBRID)
    np.testing.assert_allclose(high["b"], flat["b"], rtol=0.02)
    np.testing.assert_allclose(high["c"], 2.0**12, rtol=1e-6)
    flat, high = steep(RGE_)
    assert np.max(np.abs(high["b"] - flat["b"])) > 100, "random directions alone are disturbed"


BAD = {
    "class": (lambda: Hybrid(CGE, RGE_, 2).check(), TypeError, "instances"),
    "limit": (lambda: Hybrid(CGE_, RGE_, -1).check(), ValueError, "limit"),
    "mu": (lambda: Hybrid(CGE(-1.0), RGE_, 2).check(), ValueError, "mu must be"),
    "mu of the other": (
        lambda: Hybrid(CGE_, RGE(1e-12, 2), 2)(KEY, fn, X),
        ValueError,
        "lost to rounding",
    ),
    "mu at a point": (
        lambda: Hybrid(CGE_, RGE(1e-12, 2), 2).check(X),
        ValueError,
        "lost to rounding",
    ),
    "key": (lambda: HYBRID(None, fn, X), TypeError, "typed PRNG"),
    "rows": (lambda: HYBRID.per_example(None, fn, X), ValueError, "per_example"),
    "integers": (lambda: HYBRID(KEY, fn, {**X, "a": jnp.arange(2)}), TypeError, "float arrays"),
    "empty mask": (
        lambda: HYBRID(KEY, fn, X, mask={n: jnp.zeros(0, int) for n in X}),
        ValueError,
        "mask is empty",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, error, message = BAD[mistake]
    with pytest.raises(error, match=message):
        call()
