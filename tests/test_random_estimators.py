"""Random directions, and what is built on estimates: MeZO, HiZOO, SVRG, activations, GraSP."""

import dataclasses
import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jrobust import losses, models, weights
from jrobust.zeroth_order import (
    CGE,
    RGE,
    SVRG,
    ActivationCGE,
    HiZOO,
    MeZO,
    _svrg,
    grasp,
    grasp_ratios,
    one_point,
    redraw,
)

G = {"a": np.array([1, -2], np.float32), "b": np.array([[0.5, 3], [0, 0.25]], np.float32)}
SIZES = {"a": 2, "b": 4}
RUNS = 6000


def linear(x):
    return sum(jnp.vdot(G[name], x[name]) for name in G)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def zeros():
    return jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, G))


def over_keys(fn, runs=RUNS, seed=1):
    """``fn(key)`` for many keys, float64 (runs, ...)."""
    found = jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(seed), runs))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)


def assert_mean(samples, expected):
    """The mean of the rows is as expected, in standard errors."""
    se = samples.std(0) / math.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - expected) <= 4.5 * se + 1e-5)


# --- RGE ---------------------------------------------------------------------------------------


def squared_error(direction, blockwise):
    """Of one direction on a linear function, from the table of RGE."""
    squares = {name: np.sum(g**2) for name, g in G.items()}
    total, d = sum(squares.values()), sum(SIZES.values())
    if blockwise:
        sign = 1 if direction == "gaussian" else -1
        return sum((SIZES[name] + sign) * squares[name] for name in G)
    if direction == "spheres":
        slope = sum(squares[name] / SIZES[name] for name in G)
        return sum(n**2 for n in SIZES.values()) * slope - total
    return (d + 1 if direction == "gaussian" else d - 1) * total


@pytest.mark.parametrize(
    ("direction", "blockwise"),
    [
        ("rademacher", False),
        ("sphere", False),
        ("spheres", False),
        ("gaussian", True),
        ("sphere", True),
    ],
)
def test_mean_and_error_on_a_linear_function(direction, blockwise):
    q = 2
    estimator = RGE(0.5, q, direction=direction, blockwise=blockwise)
    estimates = over_keys(lambda key: estimator(key, linear, zeros())[1])
    errors = np.concatenate([estimates["a"], estimates["b"].reshape(-1, 4)], 1) - flat(G)
    assert_mean(errors, 0)
    assert_mean(np.sum(errors**2, 1), squared_error(direction, blockwise) / q)


def test_signs_are_signs_and_spheres_have_length_one_in_each_leaf(key):
    def step(direction):
        """The point of one direction, of which mu = 1 makes the direction itself."""
        points = []

        def fn(x):
            jax.debug.callback(lambda x: points.append(jax.tree.map(np.asarray, x)), x)
            return linear(x)

        RGE(1.0, 1, direction=direction)(key, fn, zeros())
        jax.effects_barrier()
        return next(p for p in points if np.any(flat(p)))

    assert set(np.abs(flat(step("rademacher")))) == {1.0}
    spheres = step("spheres")
    for leaf in spheres.values():
        np.testing.assert_allclose(np.sum(leaf**2), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sum(flat(step("sphere")) ** 2), 1, rtol=1e-6)


def test_blocks_move_one_leaf_at_a_time(key):
    estimator = RGE(0.5, 3, direction="sphere", blockwise=True)
    assert estimator.queries(zeros()) == 1 + 3 * 2
    mask = {"a": np.zeros(2, bool), "b": np.ones((2, 2), bool)}
    assert estimator.queries(zeros(), mask) == 1 + 3

    def product(x):  # both must move for it to change
        return jnp.sum(x["a"]) * jnp.sum(x["b"])

    _, grad = estimator(key, product, zeros())
    np.testing.assert_array_equal(flat(grad), 0)
    assert np.any(flat(RGE(0.5, 3)(key, product, zeros())[1]))


full = pytest.mark.full


@pytest.mark.parametrize(
    "direction", ["spheres", *(pytest.param(d, marks=full) for d in ("gaussian", "sphere"))]
)
def test_a_mask_is_the_smaller_problem(direction, key):
    where = {"a": np.array([1]), "b": np.array([0, 3])}
    mask = {"a": np.array([False, True]), "b": np.array([[True, False], [False, True]])}

    def quadratic(x):
        v = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(x)])
        return jnp.sum(v * jnp.arange(1, len(v) + 1)) + jnp.sum(v) ** 2

    def inner(small):
        x = jax.tree.map(lambda z, i, v: jnp.ravel(z).at[i].set(v), zeros(), where, small)
        return quadratic(jax.tree.map(lambda v, z: v.reshape(z.shape), x, zeros()))

    estimator = RGE(2.0**-4, 5, direction=direction)
    expected = estimator(key, inner, jax.tree.map(lambda i: jnp.zeros(len(i)), where))[1]
    traced = jax.jit(lambda mask: estimator(key, quadratic, zeros(), mask=mask)[1])
    for grad in (estimator(key, quadratic, zeros(), mask=mask)[1], traced(weights.indices(mask))):
        for name, g in grad.items():
            np.testing.assert_allclose(np.ravel(g)[where[name]], expected[name], rtol=1e-5)
            np.testing.assert_array_equal(np.delete(np.ravel(g), where[name]), 0)


def convolutions(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params["feature_group_count"]
        for sub in jaxprs_in_params(eqn.params):
            yield from convolutions(sub)


@pytest.mark.parametrize(("chunk", "grouped"), [(None, False), (4, True)])
def test_directions_of_weights_are_not_grouped_convolutions(chunk, grouped, key):
    x, kernel = jnp.ones((2, 8, 8, 32)), jnp.ones((3, 3, 32, 32))

    def fn(kernel):
        form = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form)
        return jnp.sum(
            jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=form)
        )

    estimator = RGE(1e-3, 4, antithetic=True, chunk=chunk)
    groups = list(convolutions(jax.make_jaxpr(lambda k: estimator(key, fn, k))(kernel).jaxpr))
    assert any(g > 1 for g in groups) == grouped
    assert groups


def test_one_key_is_one_set_of_directions_at_two_points(key):
    """Common random numbers: the difference of two estimates is along the same directions."""
    matrix = jnp.diag(jnp.arange(1.0, 5.0))

    def quadratic(x):
        return jnp.vdot(x, matrix @ x) / 2

    estimator = RGE(2.0**-5, 3)
    grad = jax.jit(lambda key, x: estimator(key, quadratic, x)[1])
    x, step = jnp.ones(4), jnp.array([0.25, 0.0, -0.5, 0.0])
    change = grad(key, x + step) - grad(key, x)
    # Forward differences of a quadratic: D(x + s) - D(x) = u . H s, without the term in mu.
    exact = RGE(1.0, 3)(key, lambda x: jnp.vdot(matrix @ step, x), x)[1]
    np.testing.assert_allclose(change, exact, atol=2e-4)
    other = grad(jax.random.key(7), x + step) - grad(key, x)
    assert np.linalg.norm(other - exact) > 1


def test_one_point_estimates(key):
    estimate = over_keys(
        lambda key: one_point(
            key, lambda x: linear(x) + 2, zeros(), 1.5, mu=0.5, direction="sphere"
        )
    )
    values, grads = estimate
    assert_mean(np.concatenate([grads["a"], grads["b"].reshape(-1, 4)], 1), flat(G))
    assert_mean(values, 2)
    calls = []

    def fn(x):
        calls.append(x)
        return 3 * x**2

    value, grad = one_point(key, fn, jnp.array(2.0), 12.0, mu=0.5, direction="sphere")
    assert len(calls) == 1
    (point,) = calls
    np.testing.assert_allclose(value, 3 * point**2)
    np.testing.assert_allclose(grad, (value - 12) / (point - 2), rtol=1e-6)  # d = 1: u = 1 / u


@pytest.mark.parametrize("tx", ["sgd", "sign_sgd", "momentum", "adam", "amsgrad"])
def test_optax_makes_the_zeroth_order_optimisers(tx, key):
    build = {
        "sgd": lambda: optax.sgd(0.05),
        "sign_sgd": lambda: optax.sign_sgd(0.02),
        "momentum": lambda: optax.sgd(0.02, momentum=0.9),
        "adam": lambda: optax.adam(0.05),
        "amsgrad": lambda: optax.amsgrad(0.05),
    }[tx]()
    target = jnp.array([0.5, -0.25, 1.0])

    def step(carry, key):
        x, state = carry
        value, grad = RGE(1e-2, 4)(key, lambda x: jnp.sum((x - target) ** 2), x)
        updates, state = build.update(grad, state, x)
        return (optax.apply_updates(x, updates), state), value

    x = jnp.zeros(3)
    _, values = jax.lax.scan(step, (x, build.init(x)), jax.random.split(key, 120))
    assert values[-1] < 0.02 * values[0]


# --- MeZO ----------------------------------------------------------------------------------------


def smooth(x):
    return jnp.sum(jnp.sin(x["a"])) + jnp.sum(x["b"] ** 2) * jnp.exp(0.2 * x["a"][0])


def point():
    return {"a": jnp.array([0.3, -0.5]), "b": jnp.array([[1.0, 0.25], [-0.5, 0.75]])}


@pytest.mark.parametrize(
    ("direction", "samples", "masked"),
    [
        pytest.param("gaussian", 1, False, marks=full),
        pytest.param("spheres", 3, False, marks=full),
        ("rademacher", 2, True),
    ],
)
def test_mezo_is_sgd_with_the_estimate_of_the_same_key(direction, samples, masked, key):
    mask = {"a": np.array([1]), "b": np.array([0, 3])} if masked else None
    mezo = MeZO(0.125, 1e-2, 0.5, samples=samples, direction=direction)
    new, info = jax.jit(lambda key, x: mezo(key, smooth, x, mask=mask))(key, point())
    estimator = RGE(1e-2, samples, direction=direction, antithetic=True)
    value, grad = estimator(key, smooth, point(), mask=mask)
    keep = jax.tree.map(lambda g: g != 0, grad)
    expected = jax.tree.map(lambda p, g, k: p - 0.125 * (g + 0.5 * p * k), point(), grad, keep)
    for name in new:
        np.testing.assert_allclose(new[name], expected[name], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(info.value, value, atol=2e-3)
    again = jax.jit(lambda key, x, q: mezo.apply(key, x, q, mask=mask))(
        key, point(), info.quotients
    )
    for name in new:
        np.testing.assert_allclose(new[name], again[name], rtol=1e-6)
    assert info.quotients.shape == (samples,)
    moved = flat(jax.tree.map(lambda a, b: np.asarray(a != b), new, point()))
    assert moved.sum() == (3 if masked else 6)


def test_mezo_holds_the_parameters_once(key):
    """With donation, a step of more arrays needs memory for them alone."""
    width, temporary = 96, []
    array = 4 * width**2

    def fn(params):
        h = jnp.ones((2, width))
        for layer in params:
            h = jnp.tanh(h @ layer)
        return jnp.sum(h)

    for layers in (3, 10):
        step = jax.jit(lambda key, params: MeZO(1e-3)(key, fn, params), donate_argnums=1)
        params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers
        sizes = step.lower(key, params).compile().memory_analysis()
        assert sizes.alias_size_in_bytes >= layers * array  # the new are where the old were
        temporary.append(sizes.temp_size_in_bytes)
    assert temporary[1] - temporary[0] < array


def test_mezo_trains_and_does_not_retrace(key):
    traces = []

    def fn(x):
        traces.append(0)
        return jnp.sum((x["a"] - 0.5) ** 2) + jnp.sum((x["b"] + 0.25) ** 2)

    step = jax.jit(lambda mezo, key, x: mezo(key, fn, x))
    x, values = point(), []
    for i in range(150):
        x, info = step(MeZO(0.03, 1e-2 + 1e-4 * i), jax.random.fold_in(key, i), x)
        values.append(float(info.value))
    assert values[-1] < 1e-2 * values[0]
    count = len(traces)
    step(MeZO(0.01), jax.random.key(9), x)
    assert len(traces) == count


# --- HiZOO ---------------------------------------------------------------------------------------

H = np.array([[2, 0.5, 0], [0.5, 8, 1], [0, 1, 0.5]], np.float32)


def bowl(x):
    return jnp.vdot(x, jnp.asarray(H) @ x) / 2 + 2 * x[0]


def test_hizoo_has_the_mean_that_it_states(key):
    x, bend, alpha = jnp.array([0.5, -0.25, 1.0]), jnp.array([1.0, 4.0, 0.5]), 0.25
    hizoo = HiZOO(0.5, alpha)
    estimates = over_keys(lambda key: hizoo(key, bowl, x, bend))
    _, grads, new = estimates
    gradient = H @ np.asarray(x) + np.array([2, 0, 0])
    assert_mean(grads, gradient / np.asarray(bend))
    diagonal = np.diag(H)
    target = diagonal + np.asarray(bend) * np.sum(diagonal / np.asarray(bend)) / 2
    assert_mean(new, (1 - alpha) * np.asarray(bend) + alpha * target)
    # and so the fixed point of the mean is (1 + d/2) diag H
    fixed = 2.5 * diagonal
    np.testing.assert_allclose(diagonal + fixed * np.sum(diagonal / fixed) / 2, fixed)


def test_hizoo_keeps_what_a_mask_leaves_out_and_takes_aux(key):
    hizoo = HiZOO(0.5, 0.5)
    x = jnp.array([0.5, -0.25, 1.0])
    (value, aux), grad, bend = hizoo(
        key, lambda x: (bowl(x), x + 1), x, hizoo.init(x), mask=np.array([0, 2]), has_aux=True
    )
    assert value == bowl(x)
    np.testing.assert_array_equal(aux, x + 1)
    assert grad[1] == 0
    assert bend[1] == 1
    assert np.all(np.delete(bend, 1) != 1)
    assert np.all(bend > 0)


# --- SVRG ----------------------------------------------------------------------------------------

DATA = np.array([[0, 2, 4], [1, -1, 0], [3, 3, 1], [0, 0, -1]], np.float32)


def risk(rows):
    def fn(x):
        data = jnp.asarray(DATA)[rows]
        return jnp.mean(jnp.sum((x[None] - data) ** 2 * (1 + jnp.abs(data)), 1)) / 2

    return fn


@pytest.mark.parametrize("estimator", [CGE(2.0**-5), RGE(2.0**-5, 2)], ids=["CGE", "RGE"])
def test_svrg_corrects_a_batch_by_the_anchor(estimator, key):
    svrg, x = SVRG(estimator), jnp.array([0.5, 1.0, -1.0])
    anchor = svrg.anchor(key, risk(np.arange(4)), x)
    other = jax.random.key(5)
    corrected = jax.jit(lambda row, x: svrg(other, risk(row[None]), x, anchor))
    value, grad = corrected(jnp.array(2), x)
    np.testing.assert_array_equal(grad, anchor.grad)
    np.testing.assert_allclose(value, risk(np.array([2]))(x), rtol=1e-6)
    near, far = x + jnp.array([0.01, 0, 0]), x + jnp.array([1.0, 0, 0])
    spread = [
        np.var([corrected(jnp.array(i), at)[1] for i in range(4)], 0).sum() for at in (near, far)
    ]
    assert spread[0] < 1e-3 * spread[1]  # the squared distance, a factor 1e-4
    if isinstance(estimator, CGE):
        grads = [corrected(jnp.array(i), far)[1] for i in range(4)]
        expected = estimator(None, risk(np.arange(4)), far)[1]
        np.testing.assert_allclose(np.mean(grads, 0), expected, atol=1e-3)


# --- activations -----------------------------------------------------------------------------


def test_activations_of_a_linear_model_in_closed_form():
    x = jnp.array([[1.0, 2, -1], [0.5, 0, 3], [2, -2, 1]])
    w, mu = jnp.array([[0.5], [1.0], [-0.25]]), 2.0**-3

    def fn(params):
        return jnp.sum((x @ params["w"]) ** 2, 1) / 2

    estimator = ActivationCGE(mu)
    value, grad = estimator(None, fn, {"w": w})
    z = x @ w
    np.testing.assert_allclose(grad["w"], x.T @ (z + mu / 2) / 3, rtol=1e-5)
    np.testing.assert_allclose(value, jnp.mean(fn({"w": w})), rtol=1e-6)
    assert estimator.queries(fn, {"w": w}) == 2  # one pre-activation in place of three weights


def test_activations_of_examples_that_meet_are_no_estimate():
    """Here the first axis of the product is not that of the examples, though of its length."""
    x, w = jnp.cos(jnp.arange(21.0)).reshape(3, 7), jnp.sin(jnp.arange(21.0)).reshape(3, 7)
    fn = lambda w: jnp.sum((w @ x.T).T ** 2, 1)  # noqa: E731
    assert jnp.all(jnp.isnan(jax.jit(lambda w: ActivationCGE(0.1)(None, fn, w)[1])(w)))


@full
def test_activations_of_a_network_are_the_gradient(key):
    module = models.SmallCNN(widths=(4, 6), hidden=5, classes=3, norm=True)
    x = jax.random.uniform(key, (3, 4, 4, 1))
    y = jnp.array([0, 1, 2])
    network = models.network(module)
    params, extra = network.init(key, x)

    def fn(params):
        return losses.cross_entropy(network.logits(params, extra, x), y)

    estimator = ActivationCGE(1e-7, chunk=7)  # before any ReLU changes sides
    value, grad = jax.jit(lambda p: estimator(None, fn, p))(params)
    exact = jax.jit(jax.grad(lambda p: jnp.mean(fn(p))))(params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grad), jax.tree.leaves(exact)):
        assert a.shape == b.shape
        error = np.linalg.norm(np.ravel(a - b)) / np.linalg.norm(np.ravel(b))
        assert error < 5e-3, (jax.tree_util.keystr(path), error)
    np.testing.assert_allclose(value, jnp.mean(fn(params)), rtol=1e-6)
    # conv2 (4x4x3x3 -> 2x2x6), dense (24 -> 5) and head (5 -> 3) through activations; conv1 has 64
    # of them for 36 weights.
    own = 36 + 2 * 4 + 2 * 6 + 5 + 3
    assert estimator.queries(fn, params) == 1 + 2 * 2 * 6 + 5 + 3 + own


# --- sparsity ----------------------------------------------------------------------------------


def test_grasp_of_a_quadratic_in_closed_form(key):
    theta = jnp.array([0.5, -1.0, 2.0])

    def fn(p):
        return jnp.vdot(p["w"], jnp.asarray(H) @ p["w"]) / 2

    scores = grasp(None, fn, {"w": theta}, CGE(2.0**-4), step=2.0**-4)
    gradient = H @ np.asarray(theta)
    np.testing.assert_allclose(scores["w"], -theta * (H @ gradient), rtol=1e-4)
    # What the sign is for: to first order, setting a weight to zero adds twice its score.
    pruned = np.asarray(theta) * (1 - 1e-3 * np.eye(3, dtype=np.float64))
    gain = np.sum((pruned @ H) ** 2, 1) - np.sum(gradient**2)
    np.testing.assert_allclose(gain, 2e-3 * np.asarray(scores["w"]), rtol=2e-2)
    # Common random numbers: no noise over the step, however small it is.
    estimator = RGE(2.0**-4, 2)
    near, far = (grasp(key, fn, {"w": theta}, estimator, step=s)["w"] for s in (2.0**-5, 1.0))
    np.testing.assert_allclose(near, far, rtol=2e-2)


def test_ratios_come_from_the_lowest_scores_and_masks_keep_them(key):
    scores = {
        "big": jnp.array([[9.0, 8.0], [-1.0, 7.0]]),
        "bias": jnp.array([5.0, -5.0, 6.0]),
        "low": jnp.array([[-3.0, -2.0], [-4.0, 3.0]]),
    }
    ratios = grasp_ratios(scores, 0.5)
    assert ratios == {"big": 0.25, "bias": 1.0, "low": 0.75}
    draw = jax.jit(lambda key: redraw(key, scores, ratios))
    masks = [draw(jax.random.key(i)) for i in range(8)]
    for mask in masks:
        assert {name: m.shape for name, m in mask.items()} == {
            "big": (1,),
            "bias": (3,),
            "low": (3,),
        }
        assert all(
            len(np.unique(m)) == len(m) and np.all((m >= 0) & (m < 4)) for m in mask.values()
        )
    assert len({int(mask["big"][0]) for mask in masks}) > 2
    again = redraw(jax.random.key(3), scores, ratios)
    for name in again:
        np.testing.assert_array_equal(again[name], masks[3][name])


# --- bad input -----------------------------------------------------------------------------------

K = jax.random.key
BAD = {
    "direction": (lambda: RGE(1e-2, 1, direction="cube").check(), ValueError, "'spheres'"),
    "spheres by example": (
        lambda: RGE(1e-2, 1, direction="spheres").check(jnp.ones((2, 3)), batched=True),
        ValueError,
        "a whole example at a time",
    ),
    "empty mask": (
        lambda: RGE(1e-2, 1)(K(0), jnp.sum, jnp.ones(3), mask=np.zeros(3, bool)),
        ValueError,
        "mask is empty",
    ),
    "one point without key": (
        lambda: one_point(None, jnp.sum, jnp.ones(2), 0.0, mu=0.1),
        TypeError,
        "typed PRNG key",
    ),
    "MeZO on one sphere": (
        lambda: MeZO(0.1, direction="sphere").check(),
        ValueError,
        "'gaussian', 'rademacher', 'spheres'",
    ),
    "MeZO lost": (lambda: MeZO(0.1, 1e-9)(K(0), jnp.sum, jnp.ones(2)), ValueError, "lost"),
    "MeZO of a vector": (lambda: MeZO(0.1)(K(0), lambda x: x, jnp.ones(2)), ValueError, "scalar"),
    "HiZOO alpha": (lambda: HiZOO(0.1, 1.0).check(), ValueError, r"alpha .* \[0, 1\)"),
    "HiZOO curvature": (
        lambda: HiZOO(0.1, 0.1)(K(0), jnp.sum, jnp.ones(2), jnp.ones(3)),
        ValueError,
        "init",
    ),
    "activations of a mean": (
        lambda: ActivationCGE(0.1)(None, jnp.sum, jnp.ones(2)),
        ValueError,
        "one loss for each example",
    ),
    "activations without a chunk": (
        lambda: ActivationCGE(0.1, chunk=0).check(),
        ValueError,
        "chunk must be",
    ),
    "grasp step": (
        lambda: grasp(None, jnp.sum, jnp.ones(2), CGE(0.1), step=0.0),
        ValueError,
        "step must be positive",
    ),
    "ratios of nothing": (lambda: grasp_ratios(jnp.ones(3), 0.5), ValueError, "no weights"),
    "ratio of zero": (lambda: grasp_ratios(jnp.ones((2, 2)), 0.0), ValueError, r"\(0, 1\]"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, error, message = BAD[mistake]
    with pytest.raises(error, match=message):
        call()


def test_numbers_are_leaves():
    for algorithm, leaves in ((MeZO(0.1), 3), (HiZOO(0.1, 0.1), 2), (SVRG(CGE(0.1)), 1)):
        assert len(jax.tree.leaves(algorithm)) == leaves
        assert dataclasses.is_dataclass(algorithm)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(_svrg).attempted > 0
    assert doctest.testmod(_svrg).failed == 0
