"""Threat models against float64: projections, sampling laws, dual norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jrobust import keys, threat
from jrobust.threat import L2, Linf

CHANNELS = np.float32([-2.1, -2.0, -1.8]), np.float32([2.2, 2.4, 2.6])
BOXES = {
    "unit": (0.0, 1.0),
    "signed": (-1.0, 1.0),
    "bytes": (0.0, 255.0),
    "channels": CHANNELS,
}
SHAPES = {"unit": (5,), "signed": (4, 3), "bytes": (2, 3, 4), "channels": (2, 2, 3)}


def inputs(box, batch=64, seed=0):
    """Points inside a box, a fifth of them at its bounds; and float64 bounds."""
    rng = np.random.default_rng(seed)
    lo, hi = (np.float64(np.broadcast_to(b, SHAPES[box])) for b in BOXES[box])
    u = rng.random((batch, *SHAPES[box]))
    u = np.where(rng.random(u.shape) < 0.1, 0.0, np.where(rng.random(u.shape) > 0.9, 1.0, u))
    return np.clip(np.float32(lo + u * (hi - lo)), np.float32(lo), np.float32(hi)), lo, hi


def flat(x):
    return np.float64(x).reshape(len(x), -1)


DUAL = {
    Linf: (lambda v: np.abs(v).max(1), lambda v: np.abs(v).sum(1)),
    L2: (lambda v: np.linalg.norm(v, axis=1), lambda v: np.linalg.norm(v, axis=1)),
}


def exact_l2(x, x0, eps, lo, hi):
    """Projection onto ball ∩ box by bisection on the multiplier, in float64."""
    x, x0 = np.float64(x), np.float64(x0)
    low, high, out = lo - x0, hi - x0, []
    for m, a, b, start, radius in zip(
        x - x0, low, high, x0, np.broadcast_to(np.float64(eps), len(x))
    ):
        below, above = 0.0, 1.0
        if np.linalg.norm(np.clip(m, a, b)) <= radius:
            below = 1.0
        else:
            for _ in range(120):
                t = (below + above) / 2
                if np.linalg.norm(np.clip(t * m, a, b)) <= radius:
                    below = t
                else:
                    above = t
        out.append(start + np.clip(below * m, a, b))
    return np.array(out)


@pytest.mark.parametrize("box", BOXES)
def test_linf_projection_is_exact_and_never_leaves_the_ball(box):
    x0, lo, hi = inputs(box, 2000)
    rng = np.random.default_rng(1)
    x = np.float32(x0 + rng.normal(size=x0.shape) * (hi - lo).max())
    project = jax.jit(lambda eps, x, x0: Linf(eps, *BOXES[box]).project(x, x0))
    for eps in np.float32([0.0, 1e-8, 1e-3, 8 / 255, 0.1, 1 / 3, 0.7]) * np.float32(hi.max()):
        got = np.asarray(project(eps, x, x0))
        # Exact arithmetic: float64 holds every difference of two float32 of this range.
        assert np.all(np.abs(np.float64(got) - np.float64(x0)) <= np.float64(eps))
        assert np.all((got >= np.float32(lo)) & (got <= np.float32(hi)))
        radius = np.float64(eps)
        want = np.clip(np.clip(np.float64(x), x0 - radius, x0 + radius), lo, hi)
        # No further inside than the next float32.
        np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-23 * np.abs(hi).max())
        np.testing.assert_array_equal(project(eps, got, x0), got)


@pytest.mark.parametrize("constant", ["nothing", "eps", "x0", "eps and x0"])
def test_linf_ball_holds_whatever_the_compiler_may_fold(constant):
    """(x0 - eps) + eps is x0 to XLA when eps is a constant, and (x0 + eps) - x0 is eps."""
    rng = np.random.default_rng(0)
    x0, eps = rng.random((2000, 16), np.float32), np.float32(1e-3)
    assert np.mean(np.abs(np.float64(x0 - eps) - x0) > np.float64(eps)) > 0.1
    project = jax.jit(
        lambda e, x, c: Linf(eps if "eps" in constant else e).project(
            x, x0 if "x0" in constant else c
        )
    )
    for x in (x0 - 1, x0 + 1):
        got = np.float64(project(eps, x, x0))
        assert np.all(np.abs(got - x0) <= np.float64(eps))


def test_linf_projection_has_the_derivative_of_a_clip():
    x0 = np.float32([[0.5, 0.05, 0.5, 0.5]])
    x = np.float32([[0.9, -1.0, 0.52, 0.1]])
    by_x, by_x0, by_eps = jax.jit(
        jax.grad(lambda x, x0, eps: jnp.sum(Linf(eps).project(x, x0)), (0, 1, 2))
    )(x, x0, np.float32(0.1))
    np.testing.assert_array_equal(by_x, [[0, 0, 1, 0]])
    np.testing.assert_array_equal(by_x0, [[1, 0, 0, 1]])
    assert by_eps == 0


def test_linf_guard_survives_compilation_under_vmap():
    """Rounding of x0 + eps does leave the ball, so a guard simplified away would show."""
    rng = np.random.default_rng(0)
    x0 = rng.random((500, 40), np.float32)
    radii = np.float32([8 / 255, 0.3, 4 / 255, 1e-3])
    naive = x0 + radii[:, None, None]
    outside = np.float64(naive) - np.float64(x0) > np.float64(radii)[:, None, None]
    assert outside.mean() > 0.05
    sweep = jax.jit(jax.vmap(lambda eps, x: Linf(eps).project(x, x0), (0, None)))
    for x in (np.ones_like(x0) * 2, -np.ones_like(x0)):
        got = np.float64(sweep(radii, x))
        assert np.all(np.abs(got - x0) <= np.float64(radii)[:, None, None])


def test_linf_projection_leaves_points_inside_alone():
    x0, _, _ = inputs("unit")
    x = np.float32(np.clip(x0 + 0.05, 0, 1))
    np.testing.assert_array_equal(Linf(0.1).project(x, x0), x)


@pytest.mark.parametrize("box", BOXES)
def test_l2_projection_is_the_exact_one(box):
    x0, lo, hi = inputs(box, 96)
    rng = np.random.default_rng(2)
    width = (hi - lo).max()
    far = rng.choice([0.3, 3.0, 300.0], (96, *[1] * lo.ndim))
    x = np.float32(x0 + rng.normal(size=x0.shape) * far * width)
    project = jax.jit(lambda eps, x: L2(eps, *BOXES[box]).project(x, x0))
    shrunk = 0
    for fraction in (0.01, 0.2, 0.5):
        eps = np.float32(fraction * width * np.sqrt(lo.size))
        got = np.asarray(project(eps, x))
        want = exact_l2(x, x0, eps, lo, hi)
        np.testing.assert_allclose(got / width, want / width, rtol=0, atol=1e-5)
        assert np.all((got >= np.float32(lo)) & (got <= np.float32(hi)))
        lengths = np.linalg.norm(flat(got) - flat(x0), axis=1)
        # Each coordinate's rounding may add half a unit in the last place of the box.
        assert np.all(lengths <= eps + 2.0**-24 * np.abs(hi).max() * np.sqrt(lo.size))
        again = np.asarray(project(eps, got))
        np.testing.assert_allclose(again / width, got / width, rtol=0, atol=1e-6)
        first = x0 + (x - x0) * (eps / np.linalg.norm(flat(x) - flat(x0), axis=1)).reshape(
            -1, *[1] * (x.ndim - 1)
        )
        shrunk += np.sum(np.abs(np.clip(first, lo, hi) - want) > 1e-3 * width)
    assert shrunk > 50, "the cases do not tell the exact projection from shrink-and-clip"


def hard(name):
    rng = np.random.default_rng(3)
    if name == "nearly all at the box":
        x0 = rng.random((32, 16))
        return x0 + rng.standard_cauchy((32, 16)) * 100, x0, 1.5
    if name == "eps close to the diameter":
        x0 = rng.integers(0, 2, (32, 9)).astype(float)
        x = 1 - x0 + (1 - 2 * x0) * rng.random((32, 9)) - rng.random((32, 9)) * (1 - 2 * x0) * 0.1
        return x, x0, 3 * 0.97
    if name == "corner":
        x0 = rng.integers(0, 2, (32, 16)).astype(float)
        return x0 + rng.normal(size=(32, 16)), x0, 1.0
    if name == "one feature after the other reaches the box":
        # A move that grows fivefold from feature to feature: fixed numbers of rounds fall short.
        return 0.5 + 0.01 * 5.0 ** np.arange(14.0)[None], np.full((1, 14), 0.5), np.sqrt(2.575)
    if name == "zero move":
        x0 = rng.random((4, 6))
        return x0, x0, 0.5
    if name == "zero eps":
        x0 = rng.random((4, 6))
        return x0 + 1, x0, 0.0
    if name == "one feature":
        x0 = rng.random((32, 1))
        return x0 + rng.normal(size=(32, 1)), x0, 0.3
    raise KeyError(name)


@pytest.mark.parametrize(
    "name",
    [
        "nearly all at the box",
        "eps close to the diameter",
        "corner",
        "one feature after the other reaches the box",
        "zero move",
        "zero eps",
        "one feature",
    ],
)
def test_l2_projection_in_hard_cases(name):
    x, x0, eps = (np.float32(v) for v in hard(name))
    got = np.asarray(jax.jit(L2(eps).project)(x, x0))
    np.testing.assert_allclose(got, exact_l2(x, x0, eps, 0.0, 1.0), rtol=0, atol=1e-5)
    assert np.all((got >= 0) & (got <= 1))
    assert np.all(np.linalg.norm(np.float64(got) - x0, axis=1) <= eps + 1e-6)


def test_l2_projection_differentiates_like_finite_differences():
    x0 = np.float32([[0.2, 0.9, 0.5, 0.4], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    x = np.float32([[0.9, 2.0, 0.1, 0.9], [0.6, 0.6, 0.5, 0.4], [-1.0, 2.0, 0.7, 0.4]])
    weights = np.float32(np.random.default_rng(0).normal(size=x.shape))

    def total(x, eps):
        return jnp.sum(weights * L2(eps).project(x, x0))

    gradient, by_eps = jax.jit(jax.grad(total, (0, 1)))(x, jnp.float32(0.6))

    def reference(x, eps):
        return np.sum(weights * exact_l2(x, x0, eps, 0.0, 1.0))

    h = 1e-6
    eps = np.float64(np.float32(0.6))
    want = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = h
        want[index] = (reference(x + step, eps) - reference(x - step, eps)) / (2 * h)
    np.testing.assert_allclose(gradient, want, atol=1e-5)
    np.testing.assert_allclose(
        by_eps, (reference(x, eps + h) - reference(x, eps - h)) / (2 * h), rtol=1e-4
    )


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_l2_has_finite_derivatives_where_norms_vanish(eps):
    x0 = np.float32([[0.2, 0.3], [0.0, 1.0]])
    model = L2(jnp.float32(eps))
    for fn in (
        lambda x: model.project(x, x0),
        lambda x: model.steepest(x - x0),
        lambda x: model.project(x + model.steepest(x - x0), x0),
    ):
        gradient = jax.jit(jax.grad(lambda x, fn=fn: jnp.sum(fn(x))))(x0)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind", [Linf, L2])
@pytest.mark.parametrize("box", ["bytes", "channels"])
def test_per_example_eps_equals_each_alone_and_vmap(kind, box):
    x0, lo, hi = inputs(box, 4)
    x = np.float32(x0 + np.random.default_rng(4).normal(size=x0.shape) * (hi - lo).max())
    eps = np.float32(np.array([0.0, 0.03, 0.2, 0.5]) * (hi - lo).max())
    project = jax.jit(lambda e, x, x0: kind(e, *BOXES[box]).project(x, x0))
    together = np.asarray(project(eps, x, x0))
    close = {"rtol": 1e-6, "atol": 1e-6 * hi.max()}
    for i in range(4):
        alone = project(eps[i : i + 1], x[i : i + 1], x0[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], **close)
    sweep = jax.jit(jax.vmap(project, (0, None, None)))(eps, x, x0)
    for e, got in zip(eps, sweep):
        np.testing.assert_allclose(got, project(e, x, x0), **close)


@pytest.mark.parametrize("kind", [Linf, L2])
def test_batched_threat_means_the_same(kind):
    x0, _, _ = inputs("channels", 5)
    model = kind(0.3, *CHANNELS)
    rows = model.batched(jnp.asarray(x0))
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(rows))
    assert rows.eps.shape == (5,)
    x = np.float32(x0 + np.random.default_rng(0).normal(size=x0.shape))
    np.testing.assert_array_equal(rows.project(x, x0), model.project(x, x0))
    twice = rows.batched(jnp.asarray(x0))
    np.testing.assert_array_equal(twice.project(x, x0), model.project(x, x0))
    broken = jnp.asarray(x0).at[0].set(jnp.nan)
    assert np.all(np.isfinite(model.batched(broken).eps))


@pytest.mark.parametrize("box", ["unit", "channels"])
@pytest.mark.parametrize("kind", [Linf, L2])
def test_samples_are_inside_and_belong_to_their_key(kind, box, key):
    x0, lo, hi = inputs(box, 12)
    width = (hi - lo).max()
    model = kind(np.float32(0.4 * width), *BOXES[box])
    sample = jax.jit(model.sample)
    each = keys.examples(key, jnp.arange(12))
    got = np.asarray(sample(each, x0))
    assert np.all((got >= np.float32(lo)) & (got <= np.float32(hi)))
    lengths = DUAL[kind][0](flat(got) - flat(x0))
    assert np.all(lengths <= np.float32(0.4 * width) * (1 + 1e-6))
    assert np.abs(got - x0).max() > 0.1 * width
    assert not np.any(np.all(flat(got - x0)[:-1] == flat(got - x0)[1:], axis=1))
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(sample(each[order], x0[order]), got[order])
    np.testing.assert_allclose(sample(each[3:5], x0[3:5]), got[3:5], rtol=1e-6, atol=1e-6)


def test_linf_sample_is_uniform(key):
    n = 4000
    x0 = np.full((n, 3), 0.5, np.float32)
    noise = flat(jax.jit(Linf(0.25).sample)(keys.examples(key, jnp.arange(n)), x0)) - 0.5
    for column in noise.T:
        assert scipy.stats.kstest(column, "uniform", (-0.25, 0.5)).pvalue > 1e-4
    correlation = np.corrcoef(noise.T)[np.triu_indices(3, 1)]
    assert np.all(np.abs(correlation) < 5 / np.sqrt(n))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_l2_sample_is_uniform_in_the_ball(d, key):
    """The radius has the law r^d, the direction is isotropic, and the two are independent."""
    n = 4000
    x0 = np.full((n, d), 0.5, np.float32)
    noise = flat(jax.jit(L2(0.25).sample)(keys.examples(key, jnp.arange(n)), x0)) - 0.5
    radius = np.linalg.norm(noise, axis=1)
    assert scipy.stats.kstest((radius / 0.25) ** d, "uniform").pvalue > 1e-4
    direction = noise / radius[:, None]
    assert np.all(np.abs(direction.mean(0)) < 5 / np.sqrt(n * d))
    second = direction.T @ direction / n
    assert np.all(np.abs(second - np.eye(d) / d) < 5 / np.sqrt(n))
    if d == 2:
        angle = np.arctan2(noise[:, 1], noise[:, 0])
        assert scipy.stats.kstest(angle, "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-4
    assert np.abs(np.corrcoef(radius, direction[:, 0])[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("kind", [Linf, L2])
def test_steepest_attains_the_dual_norm(kind, shape):
    norm, dual = DUAL[kind]
    # Up to the largest float32, down to the smallest that is not subnormal.
    scale = np.array([1.0, 1e-3, 1e19, 1e-19, 2e-38, 8e37, 1e38, 3.3e38]).reshape(
        -1, *[1] * len(shape)
    )
    g = np.random.default_rng(5).uniform(0.6, 1.0, (8, *shape)) * np.sign(
        np.random.default_rng(6).normal(size=(8, *shape))
    )
    d = np.asarray(jax.jit(kind(1.0).steepest)(np.float32(g * scale)))
    np.testing.assert_allclose(norm(flat(d)), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sum(flat(d) * flat(g), 1), dual(flat(g)), rtol=1e-5)


@pytest.mark.parametrize("kind", [Linf, L2])
def test_steepest_of_zero_and_broken_gradients(kind):
    steepest = jax.jit(kind(1.0).steepest)
    np.testing.assert_array_equal(steepest(jnp.zeros((2, 3))), np.zeros((2, 3)))
    g = np.float32([[np.nan, 3.0, -4.0], [np.nan] * 3, [np.inf, 1.0, 1.0]])
    d = np.asarray(steepest(g))
    assert np.all(np.isfinite(d))
    want = [0, 1, -1] if kind is Linf else [0, 0.6, -0.8]
    np.testing.assert_allclose(d[0], want, rtol=1e-6)
    np.testing.assert_array_equal(d[1], np.zeros(3))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("kind", [Linf, L2])
def test_distance_is_the_norm(kind, shape):
    rng = np.random.default_rng(7)
    a, b = rng.random((2, 6, *shape), np.float32)
    got = kind(1.0).distance(a, b)
    assert got.shape == (6,)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, DUAL[kind][0](flat(a) - flat(b)), rtol=1e-6)
    np.testing.assert_array_equal(kind(1.0).distance(a, a), np.zeros(6))


def test_widest_is_the_diagonal():
    assert Linf(1.0).widest(2.0, 9) == 2.0
    assert L2(1.0).widest(2.0, 9) == 6.0


def test_expand():
    like = jnp.zeros((3, 2, 2))
    assert threat.expand(1.0, like).shape == ()
    assert threat.expand(jnp.ones(3), like).shape == (3, 1, 1)
    assert threat.expand(like, like).shape == like.shape


def test_threats_are_pytrees_whose_numbers_are_leaves():
    model = L2(0.5, -1.0, 2.0)
    assert jax.tree.leaves(model) == [0.5, -1.0, 2.0]
    doubled = jax.tree.map(lambda v: 2 * v, model)
    assert isinstance(doubled, L2)
    assert doubled == L2(1.0, -2.0, 4.0)
