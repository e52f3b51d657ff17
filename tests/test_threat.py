"""Threat models against float64: projections, sampling laws, dual norms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jrobust import keys, threat
from jrobust.threat import L0, L1, L2, Linf

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
    L1: (lambda v: np.abs(v).sum(1), lambda v: np.abs(v).max(1)),
}
KINDS = [Linf, L2, L1, L0]


def pixels_changed(x, x0):
    return np.any(x != x0, axis=-1).reshape(len(x), -1).sum(1)


def radius(kind, fraction, box):
    """A part of the way from no change to the largest one."""
    width = float((np.float32(BOXES[box][1]) - np.float32(BOXES[box][0])).max())
    widest = kind(1.0).widest(width, SHAPES[box])
    return np.float32(np.floor(fraction * widest) if kind is L0 else fraction * widest)


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


def exact_l1(x, x0, eps, lo, hi):
    """Projection onto ball ∩ box by bisection on the shift, in float64."""
    x, x0 = np.float64(x), np.float64(x0)
    out = []
    for m, start, radius in zip(x - x0, x0, np.broadcast_to(np.float64(eps), len(x))):
        room = np.where(m > 0, hi - start, start - lo)
        below, above = 0.0, np.abs(m).max()
        if np.minimum(np.abs(m), room).sum() <= radius:
            above = 0.0
        else:
            for _ in range(120):
                t = (below + above) / 2
                if np.clip(np.abs(m) - t, 0, room).sum() <= radius:
                    above = t
                else:
                    below = t
        out.append(start + np.sign(m) * np.clip(np.abs(m) - above, 0, room))
    return np.array(out)


EXACT = {L2: exact_l2, L1: exact_l1}


def shrunk_and_clipped(kind, x, x0, eps, lo, hi):
    """What is feasible but not the projection: onto the ball first, into the box after."""
    ball = EXACT[kind](x, x0, eps, -np.inf, np.inf)
    return np.clip(ball, lo, hi)


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
@pytest.mark.parametrize("kind", EXACT)
def test_projection_is_the_exact_one(kind, box):
    x0, lo, hi = inputs(box, 96)
    rng = np.random.default_rng(2)
    width = (hi - lo).max()
    far = rng.choice([0.3, 3.0, 300.0], (96, *[1] * lo.ndim))
    x = np.float32(x0 + rng.normal(size=x0.shape) * far * width)
    project = jax.jit(lambda eps, x: kind(eps, *BOXES[box]).project(x, x0))
    shrunk = 0
    for fraction in (0.01, 0.2, 0.5) if kind is L2 else (0.01, 0.1, 0.3):
        eps = radius(kind, fraction, box)
        got = np.asarray(project(eps, x))
        want = EXACT[kind](x, x0, eps, lo, hi)
        np.testing.assert_allclose(got / width, want / width, rtol=0, atol=1e-5)
        assert np.all((got >= np.float32(lo)) & (got <= np.float32(hi)))
        lengths = DUAL[kind][0](flat(got) - flat(x0))
        # In L2, each coordinate's rounding may add half a unit in the last place of the box.
        slack = 2.0**-24 * np.abs(hi).max() * np.sqrt(lo.size) if kind is L2 else 3e-7 * eps
        assert np.all(lengths <= eps + slack)
        again = np.asarray(project(eps, got))
        np.testing.assert_allclose(again / width, got / width, rtol=0, atol=1e-6)
        clipped = shrunk_and_clipped(kind, x, x0, eps, lo, hi)
        shrunk += np.sum(np.abs(clipped - want) > 1e-3 * width)
    assert shrunk > 50, "the cases do not tell the exact projection from shrink-and-clip"


@pytest.mark.parametrize("width", [1.0, 255.0])
def test_l2_ball_holds_however_small(width):
    """Where a feature moves by units in the last place, whose rounding adds up."""
    rng = np.random.default_rng(0)
    eps = np.float32(1e-5 * width * 3072**0.5)
    x0 = np.float32(width * rng.random((4, 3072)))
    x = np.float32(x0 + 3e-5 * width * rng.normal(size=x0.shape))
    got = np.float64(jax.jit(L2(eps, hi=width).project)(x, x0))
    lengths = np.linalg.norm(got - x0, axis=1)
    assert np.all(lengths <= eps)
    assert np.all(lengths >= eps * (1 - 3e-3))


@pytest.mark.parametrize("eps", [12.0, 1000.0])
def test_l1_ball_holds_in_many_dimensions(eps):
    """Where every feature's rounding goes the same way, and in sums of 150,528 numbers."""
    d = 224 * 224 * 3
    rng = np.random.default_rng(0)
    x0 = np.stack([rng.random(d), np.full(d, 0.3), np.round(rng.random(d))]).astype(np.float32)
    x = x0 + np.stack([rng.normal(size=d), np.full(d, 0.37), rng.normal(size=d)])
    x = np.float32(x)
    got = np.asarray(jax.jit(L1(eps).project)(x, x0))
    lengths = np.abs(np.float64(got) - x0).sum(1)
    assert np.all(lengths <= eps * (1 + 3e-7))
    # Rounding towards the input takes half a unit in the last place off each feature that moves.
    assert np.all(lengths >= eps * (1 - 1e-6) - 2.0**-24 * np.sum(got != x0, axis=1))
    np.testing.assert_allclose(got, exact_l1(x, x0, eps, 0.0, 1.0), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(L1(eps).project(got, x0), got)


@pytest.mark.parametrize("box", ["signed", "bytes", "channels"])
@pytest.mark.parametrize("pixels", [True, False])
def test_l0_projection_is_the_best_of_all_subsets(pixels, box):
    x0, lo, hi = inputs(box, 24)
    rng = np.random.default_rng(2)
    far = rng.choice([0.2, 1.0, 30.0], (24, *[1] * lo.ndim))
    x = np.float32(x0 + rng.normal(size=x0.shape) * far * (hi - lo).max())
    locations = (*lo.shape[:-1], 1) if pixels else lo.shape
    size = int(np.prod(locations))
    project = jax.jit(lambda eps, x: L0(eps, *BOXES[box], pixels=pixels).project(x, x0))
    inside = np.clip(x, np.float32(lo), np.float32(hi))
    for eps in {0, 1, 2, size // 2, size}:
        got = np.asarray(project(np.float32(eps), x))
        np.testing.assert_array_equal(got[got != x0], inside[got != x0])
        changed = (got != x0).reshape(24, *locations[:-1], -1 if pixels else locations[-1])
        changed = changed.any(-1) if pixels else changed
        assert np.all(changed.reshape(24, -1).sum(1) <= eps)
        if size > 12:
            continue
        best = np.full(24, np.inf)
        for chosen in itertools.combinations(range(size), eps):
            mask = np.zeros(size, bool)
            mask[list(chosen)] = True
            point = np.where(mask.reshape(locations), inside, x0)
            best = np.minimum(best, np.sum((flat(x) - flat(point)) ** 2, axis=1))
        np.testing.assert_allclose(np.sum((flat(x) - flat(got)) ** 2, axis=1), best, rtol=1e-6)
        np.testing.assert_array_equal(project(np.float32(eps), got), got)


@pytest.mark.parametrize("pixels", [True, False])
def test_an_l0_step_finds_the_best_locations_of_a_linear_model(pixels):
    rng = np.random.default_rng(2)
    x0, g = np.float32(rng.random((60, 4, 5, 3))), np.float32(rng.normal(size=(60, 4, 5, 3)))
    model = L0(4, pixels=pixels)
    got = jax.jit(model.ascend)(x0, x0, g, model.step_size(x0, 1))
    gain = np.maximum(np.float64(g) * (1 - x0), -np.float64(g) * x0)
    gain = flat(gain.sum(-1) if pixels else gain)
    reached = np.sum(flat(g) * (flat(got) - flat(x0)), 1) / np.sort(gain, 1)[:, -4:].sum(1)
    assert np.all(reached > 0.997)


def test_l0_ties_go_to_the_first_locations():
    x0 = np.full((2, 5, 1), 0.5, np.float32)
    x = x0 + np.float32([[0.2, 0.3, 0.2, 0.2, 0.2], [0.1] * 5])[..., None]
    got = np.asarray(jax.jit(L0(np.float32([3, 2])).project)(x, x0))
    np.testing.assert_array_equal(
        got != x0, np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])[..., None]
    )
    # Fractions, which only a traced caller can bring, are rounded down.
    np.testing.assert_array_equal(jax.jit(L0(np.float32([3.9, 2.9])).project)(x, x0), got)


def test_l0_projection_differentiates_like_the_clip_of_what_it_keeps():
    x0 = np.full((1, 4), 0.5, np.float32)
    x = np.float32([[0.9, 2.0, 0.6, 0.5]])
    by_x, by_x0 = jax.jit(
        jax.grad(lambda x, x0: jnp.sum(L0(2.0, pixels=False).project(x, x0)), (0, 1))
    )(x, x0)
    np.testing.assert_array_equal(by_x, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(by_x0, [[0, 0, 1, 1]])


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
    if name == "far outside":
        return 1e4 + rng.random((32, 16)), rng.random((32, 16)), 1.5
    if name == "zero move":
        x0 = rng.random((4, 6))
        return x0, x0, 0.5
    if name == "zero eps":
        # The second half black and white: no feature has room on both sides.
        x0 = rng.random((8, 6))
        x0[4:] = np.round(x0[4:])
        return x0 + rng.normal(size=x0.shape), x0, 0.0
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
        "far outside",
        "zero move",
        "zero eps",
        "one feature",
    ],
)
@pytest.mark.parametrize("kind", EXACT)
def test_projection_in_hard_cases(kind, name):
    x, x0, eps = (np.float32(v) for v in hard(name))
    got = np.asarray(jax.jit(kind(eps).project)(x, x0))
    np.testing.assert_allclose(got, EXACT[kind](x, x0, eps, 0.0, 1.0), rtol=0, atol=1e-5)
    assert np.all((got >= 0) & (got <= 1))
    assert np.all(DUAL[kind][0](np.float64(got) - x0) <= eps + 1e-6)
    if name == "zero move":
        np.testing.assert_array_equal(got, x0)


def test_l2_projection_of_points_whose_squares_are_infinite():
    x0 = np.full((3, 3), 0.5, np.float32)
    x = np.float32(x0 + 1e20 * np.array([[3.0, 4.0, 0.0], [0.0, -1e9, 0.0], [1e-3, 0.0, np.inf]]))
    want = x0 + np.array([[0.24, 0.32, 0.0], [0.0, -0.4, 0.0], [0.0, 0.0, 0.4]])
    np.testing.assert_allclose(jax.jit(L2(0.4).project)(x, x0), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", EXACT)
def test_projection_differentiates_like_finite_differences(kind):
    size = 0.6 if kind is L2 else 0.8
    x0 = np.float32([[0.2, 0.9, 0.5, 0.4], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    x = np.float32([[0.9, 2.0, 0.1, 0.9], [0.6, 0.6, 0.5, 0.4], [-1.0, 2.0, 0.7, 0.4]])
    weights = np.float32(np.random.default_rng(0).normal(size=x.shape))

    def total(x, eps):
        return jnp.sum(weights * kind(eps).project(x, x0))

    gradient, by_eps = jax.jit(jax.grad(total, (0, 1)))(x, jnp.float32(size))

    def reference(x, eps):
        return np.sum(weights * EXACT[kind](x, x0, eps, 0.0, 1.0))

    h = 1e-6
    eps = np.float64(np.float32(size))
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
@pytest.mark.parametrize("kind", EXACT)
def test_derivatives_are_finite_where_norms_vanish(kind, eps):
    x0 = np.float32([[0.2, 0.3], [0.0, 1.0]])
    model = kind(jnp.float32(eps))
    for fn in (
        lambda x: model.project(x, x0),
        lambda x: model.steepest(x - x0),
        lambda x: model.project(x + model.steepest(x - x0), x0),
        lambda x: model.ascend(x, x0, x - x0, 0.5),
    ):
        gradient = jax.jit(jax.grad(lambda x, fn=fn: jnp.sum(fn(x))))(x0)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", ["bytes", "channels"])
def test_per_example_eps_equals_each_alone_and_vmap(kind, box):
    x0, lo, hi = inputs(box, 4)
    rng = np.random.default_rng(4)
    x = np.float32(x0 + rng.normal(size=x0.shape) * (hi - lo).max())
    g = np.float32(rng.normal(size=x0.shape))
    eps = np.array([radius(kind, f, box) for f in (0.0, 0.25, 0.3, 0.6)])

    @jax.jit
    def project(e, x, x0, g):
        model = kind(e, *BOXES[box])
        p = model.project(x, x0)
        return p, model.ascend(p, x0, g, model.step_size(x0, 1, 0.3))

    together = np.asarray(project(eps, x, x0, g))
    assert np.all(together[:, 0] == x0[0])
    assert np.all(np.abs(together[:, 1:] - x0[1:]).reshape(2, 3, -1).max(2) > 0)
    close = {"rtol": 1e-6, "atol": 1e-6 * hi.max()}
    for i in range(4):
        one = slice(i, i + 1)
        alone = np.asarray(project(eps[one], x[one], x0[one], g[one]))
        np.testing.assert_allclose(together[:, i], alone[:, 0], **close)
    sweep = jax.jit(jax.vmap(project, (0, None, None, None)))(eps, x, x0, g)
    for i, e in enumerate(eps):
        for swept, got in zip(sweep, project(e, x, x0, g)):
            np.testing.assert_allclose(swept[i], got, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_bit_equal_to_one_device_at_the_same_shape(kind):
    x0, _, _ = inputs("unit", 16)
    x0 = x0.reshape(16, 5, 1)
    rng = np.random.default_rng(4)
    x, g = np.float32(x0 + rng.normal(size=(2, *x0.shape)))
    model = kind(np.float32(2.0 if kind is L0 else 0.5))

    def step(x, x0, g):
        return model.ascend(model.project(x, x0), x0, g, model.step_size(x0, 3))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows))(x, x0, g)
    one = jax.jit(step)
    pairs = [slice(i, i + 2) for i in range(0, 16, 2)]
    want = np.concatenate([one(x[p], x0[p], g[p]) for p in pairs])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_threat_means_the_same(kind):
    x0, _, _ = inputs("channels", 5)
    model = kind(2.0 if kind is L0 else 0.3, *CHANNELS)
    rows = model.batched(jnp.asarray(x0))
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(rows))
    assert rows.eps.shape == (5,)
    x = np.float32(x0 + np.random.default_rng(0).normal(size=x0.shape))
    np.testing.assert_array_equal(rows.project(x, x0), model.project(x, x0))
    sizes = rows.step_size(x0, 5)
    np.testing.assert_allclose(sizes, np.broadcast_to(model.step_size(x0, 5), 5), rtol=1e-6)
    assert sizes[0] == pytest.approx(20 * 3 * 4 * 13.1 / 3 if kind is L0 else 0.15)
    twice = rows.batched(jnp.asarray(x0))
    np.testing.assert_array_equal(twice.project(x, x0), model.project(x, x0))
    broken = jnp.asarray(x0).at[0].set(jnp.nan)
    assert np.all(np.isfinite(model.batched(broken).eps))


@pytest.mark.parametrize("box", ["signed", "channels"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_inside_and_belong_to_their_key(kind, box, key):
    x0, lo, hi = inputs(box, 12)
    width = (hi - lo).max()
    eps = radius(kind, 0.3, box)
    sample = jax.jit(kind(eps, *BOXES[box]).sample)
    each = keys.examples(key, jnp.arange(12))
    got = np.asarray(sample(each, x0))
    assert np.all((got >= np.float32(lo)) & (got <= np.float32(hi)))
    if kind is L0:
        np.testing.assert_array_equal(pixels_changed(got, x0), np.full(12, eps))
    else:
        assert np.all(DUAL[kind][0](flat(got) - flat(x0)) <= eps * (1 + 1e-6))
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


@pytest.mark.parametrize("d", [1, 2, 5])
def test_l1_sample_is_uniform_in_the_ball(d, key):
    """The radius has the law r^d, the shares of it are a flat Dirichlet, the signs are fair."""
    n = 4000
    x0 = np.full((n, d), 0.5, np.float32)
    noise = flat(jax.jit(L1(0.25).sample)(keys.examples(key, jnp.arange(n)), x0)) - 0.5
    radius = np.abs(noise).sum(1)
    assert scipy.stats.kstest((radius / 0.25) ** d, "uniform").pvalue > 1e-4
    share = np.abs(noise) / radius[:, None]
    for column in share.T if d > 1 else ():
        assert scipy.stats.kstest(column, "beta", (1, d - 1)).pvalue > 1e-4
    second = (noise.T @ noise) / n / 0.25**2
    # The moments of a flat Dirichlet of d + 1 shares.
    np.testing.assert_allclose(second, np.eye(d) * 2 / ((d + 1) * (d + 2)), atol=4 / np.sqrt(n) / d)
    assert np.all(np.abs(np.sign(noise).mean(0)) < 5 / np.sqrt(n))
    if d > 1:
        assert np.abs(np.corrcoef(radius, share[:, 0])[0, 1]) < 5 / np.sqrt(n)


def test_l0_sample_is_uniform(key):
    """Every set of locations is as likely, and values do not know of the input."""
    n, d, eps = 4000, 5, 2
    x0 = np.full((n, d), 0.5, np.float32)
    sample = jax.jit(L0(np.float32(eps), -1.0, 2.0, pixels=False).sample)
    got = np.asarray(sample(keys.examples(key, jnp.arange(n)), x0))
    changed = got != x0
    np.testing.assert_array_equal(changed.sum(1), np.full(n, eps))
    _, counts = np.unique(changed @ 2 ** np.arange(d), return_counts=True)
    assert len(counts) == 10
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert scipy.stats.kstest(got[changed], "uniform", (-1, 3)).pvalue > 1e-4
    first, second = got[changed].reshape(n, eps).T
    assert np.abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("kind", DUAL)
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


@pytest.mark.parametrize("kind", KINDS)
def test_steepest_of_zero_and_broken_gradients(kind):
    steepest = jax.jit(kind(1.0).steepest)
    np.testing.assert_array_equal(steepest(jnp.zeros((2, 3))), np.zeros((2, 3)))
    g = np.float32([[np.nan, 3.0, -4.0], [np.nan] * 3, [np.inf, 1.0, 1.0]])
    d = np.asarray(steepest(g))
    assert np.all(np.isfinite(d))
    want = {Linf: [0, 1, -1], L2: [0, 0.6, -0.8], L1: [0, 0, -1], L0: [0, 3 / 7, -4 / 7]}[kind]
    np.testing.assert_allclose(d[0], want, rtol=1e-6)
    np.testing.assert_array_equal(d[1], np.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_gradient_stays_where_it_is(kind):
    x0, _, _ = inputs("signed", 3)
    model = kind(np.float32(2), *BOXES["signed"])
    x = model.project(np.clip(x0 + np.float32(0.3), -1, 1), x0)
    for g in (np.zeros_like(x0), np.full_like(x0, np.nan)):
        np.testing.assert_array_equal(jax.jit(model.ascend)(x, x0, g, 0.7), x)


@pytest.mark.parametrize("shape", [(12,), (2, 2, 3)])
def test_sparse_steepest_l1_is_the_sign_of_the_top_entries(shape):
    rng = np.random.default_rng(5)
    g = np.float32(
        rng.normal(size=(4, *shape))
        * np.float32([1, 1e-30, 1e30, 1])[:, None].reshape(-1, *[1] * len(shape))
    )
    g[3].flat[:10] = 0.0  # fewer entries than asked for
    density = np.float32([0.01, 0.25, 0.5, 1.0])
    got = flat(jax.jit(L1(1.0).steepest)(g, density))
    for row, direction, count in zip(flat(g), got, (1, 3, 6, 2)):
        top = np.argsort(-np.abs(row))[:count]
        want = np.zeros(12)
        want[top] = np.sign(row[top]) / count
        np.testing.assert_allclose(direction, want, rtol=1e-6)
    equal = L1(1.0).steepest(jnp.float32([[2.0, -2.0, 1.0]]))
    np.testing.assert_array_equal(equal, [[0.5, -0.5, 0.0]])


@pytest.mark.parametrize("box", BOXES)
def test_an_l1_step_is_the_linear_programme(box):
    """max g.p over |p - x| <= size in the box, by scipy; in the ball too where x is the input."""
    x0, lo, hi = inputs(box, 8)
    g = np.random.default_rng(5).normal(size=x0.shape)
    g[0].flat[:2] = 0.0
    model = L1(np.float32((hi - lo).max() * 50), *BOXES[box])
    ascend = jax.jit(model.ascend)
    for fraction in (0.02, 0.3, 2.0):
        size = radius(L1, fraction, box)
        got = np.asarray(ascend(x0, x0, np.float32(g), size))
        moved = np.abs(flat(got) - flat(x0)).sum(1)
        assert np.all(moved <= size * (1 + 1e-6))
        for p, x, row in zip(flat(got), flat(x0), flat(g)):
            # Ups and downs are variables of their own.
            bounds = [*zip([0.0] * x.size, lo.ravel() * 0 + hi.ravel() - x)]
            bounds += [*zip([0.0] * x.size, x - lo.ravel())]
            best = scipy.optimize.linprog(
                -np.r_[row, -row], A_ub=np.ones((1, 2 * x.size)), b_ub=[size], bounds=bounds
            )
            np.testing.assert_allclose(row @ (p - x), -best.fun, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("kind", DUAL)
def test_distance_is_the_norm(kind, shape):
    rng = np.random.default_rng(7)
    a, b = rng.random((2, 6, *shape), np.float32)
    got = kind(1.0).distance(a, b)
    assert got.shape == (6,)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, DUAL[kind][0](flat(a) - flat(b)), rtol=1e-6)
    np.testing.assert_array_equal(kind(1.0).distance(a, a), np.zeros(6))
    for scale in np.float32([1e-30, 1e-20, 1e20, 1e30]):
        want = DUAL[kind][0](flat(scale * a))
        np.testing.assert_allclose(kind(1.0).distance(scale * a, 0 * b), want, rtol=1e-6)


def test_l0_distance_counts_locations():
    a = np.zeros((3, 2, 2, 3), np.float32)
    b = a.copy()
    b[1, 0, 0, :2] = 1e-30
    b[2, :, 1] = 0.5
    for pixels, want in ((True, [0, 1, 2]), (False, [0, 2, 6])):
        got = L0(1.0, pixels=pixels).distance(a, b)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


def test_widest_is_the_diagonal():
    assert Linf(1.0).widest(2.0, (3, 3)) == 2.0
    assert L2(1.0).widest(2.0, (3, 3)) == 6.0
    assert L1(1.0).widest(2.0, (3, 3)) == 18.0
    assert L0(1.0).widest(2.0, (4, 5, 3)) == 20.0
    assert L0(1.0, pixels=False).widest(2.0, (4, 5, 3)) == 60.0


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (L1(6.1), (2, 3), r"L1.eps = 6.1 is larger than the whole box.*norm is 6;"),
        (L1(-1.0), (2, 3), "L1.eps must be finite and not negative"),
        (L1(np.ones(3)), (2, 3), r"one value for each of the 4 examples, got shape \(3,\)"),
        (L0(3), (2, 3), "L0.eps = 3 is larger than the whole box.*norm is 2;"),
        (L0(7, pixels=False), (2, 3), "L0.eps = 7 is larger than the whole box.*norm is 6;"),
        (L0(0.5), (2, 3), "L0.eps counts locations, so it must be whole, got 0.5"),
        (L0(np.nan), (2, 3), "must be whole, got nan"),
        (L0(np.inf), (2, 3), "L0.eps must be finite"),
        (L0(np.array([1, 1, -1, 1])), (2, 3), "not negative"),
        (L0(1), (6,), r"only one feature axis; count features with L0\(eps, pixels=False\)"),
        (L0(1, lo=np.zeros(2)), (2, 3), r"L0\.lo must broadcast against one example"),
    ],
)
def test_what_makes_no_sense_is_refused(model, shape, message):
    x = np.full((4, *shape), 0.5, np.float32)
    with pytest.raises(ValueError, match=message):
        model.check(x)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_numbers_do_not_widen_inputs_in_64_bit_mode(kind, key):
    with jax.enable_x64(True):
        x0 = jnp.full((2, 2, 3), 0.5, jnp.float32)
        model, g = kind(np.full(2, 1.0)), x0 - 0.25
        each = keys.examples(key, jnp.arange(2))
        for fn in (
            lambda: model.project(x0 + 1, x0),
            lambda: model.sample(each, x0),
            lambda: model.ascend(x0, x0, g, np.float64(0.1)),
        ):
            assert jax.eval_shape(fn).dtype == jnp.float32


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
