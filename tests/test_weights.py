"""Masks, paths and balls of parameter trees, by hand and by their invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrobust import weights

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.array([9.0, -1.0, 2.5])}}


def count(mask):
    return sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))


def test_top_k_keeps_the_largest_of_the_whole_tree():
    mask = weights.top_k(TREE, 3)
    np.testing.assert_array_equal(mask["a"], [[False, False, False], [False, True, True]])
    np.testing.assert_array_equal(mask["b"]["c"], [True, False, False])
    jitted = jax.jit(lambda s: weights.top_k(s, 3))(TREE)
    assert all(map(np.array_equal, jax.tree.leaves(jitted), jax.tree.leaves(mask)))


@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_top_k_is_exact_with_ties_and_nan(k):
    scores = {"a": jnp.ones((2, 3)), "b": jnp.array([jnp.nan, 1.0, 2.0])}
    mask = weights.top_k(scores, k)
    assert count(mask) == k
    assert bool(mask["b"][2]) == (k >= 1), "the largest comes first"
    assert bool(mask["b"][0]) == (k == 9), "NaN comes last"
    with jax.enable_x64(True):
        close = weights.top_k({"a": jnp.array([1.0, 1.0 + 1e-12])}, 1)["a"]
    np.testing.assert_array_equal(close, [False, True])


def test_random_masks_have_the_counts_of_their_ratios_and_are_uniform(key):
    ratios = {"a": 0.5, "b": {"c": 1 / 3}}
    draw = jax.jit(jax.vmap(lambda k: weights.random_by_layer(k, TREE, ratios)))
    masks = draw(jax.random.split(key, 4000))
    np.testing.assert_array_equal(masks["a"].sum((1, 2)), 3)
    np.testing.assert_array_equal(masks["b"]["c"].sum(1), 1)
    share = np.asarray(masks["a"]).mean(0)
    assert np.all(np.abs(share - 0.5) < 4.5 * np.sqrt(0.25 / 4000))
    share = np.asarray(masks["b"]["c"]).mean(0)
    assert np.all(np.abs(share - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 4000))
    one = jax.tree.map(lambda leaf: leaf[0], masks)
    assert weights.layer_ratios(one) == {"a": 0.5, "b": {"c": pytest.approx(1 / 3)}}


def test_indices_are_the_places_of_a_mask(key):
    mask = {"a": np.array([[False, True, False], [True, False, True]]), "b": {"c": np.eye(3) > 1}}
    found = weights.indices(mask)
    np.testing.assert_array_equal(found["a"], [1, 3, 5])
    assert found["b"]["c"].shape == (0,)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(found))
    ratios = {"a": 0.5, "b": {"c": 1 / 3}}
    counts = {"a": 3, "b": {"c": 1}}

    @jax.jit
    def inside(key):
        drawn = weights.random_by_layer(key, TREE, ratios)
        return drawn, weights.indices(drawn, counts)

    for k in jax.random.split(key, 3):
        drawn, found = inside(k)
        jax.tree.map(np.testing.assert_array_equal, found, weights.indices(drawn, counts))
    flat = jax.jit(lambda m: weights.indices(m, {"a": 4, "b": {"c": 0}}))(mask)
    np.testing.assert_array_equal(flat["a"], [1, 3, 5, 6])  # the last is outside


def test_indices_of_what_is_no_mask():
    mask = {"a": np.array([True, False])}
    with pytest.raises(TypeError, match="bool arrays, got float32"):
        weights.indices(TREE)
    with pytest.raises(ValueError, match="structure of mask"):
        weights.indices(mask, {"b": 1})
    with pytest.raises(ValueError, match="2 of an array in which 1 are True"):
        weights.indices(mask, {"a": 2})
    with pytest.raises(TypeError, match="pass counts="):
        jax.jit(weights.indices)(mask)


def test_paths_meet_their_ends_and_have_their_slopes():
    end = jax.tree.map(lambda leaf: leaf**2 - 3, TREE)
    control = jax.tree.map(jnp.cos, TREE)
    for path in (
        lambda t: weights.linear(TREE, end, t),
        lambda t: weights.bezier(TREE, control, end, t),
    ):
        for t, expected in ((0.0, TREE), (1.0, end)):
            for a, b in zip(jax.tree.leaves(path(t)), jax.tree.leaves(expected)):
                np.testing.assert_allclose(a, b, rtol=1e-6)
    # A Bezier curve leaves its start towards the control point, at twice the distance.
    _, slope = jax.jvp(lambda t: weights.bezier(TREE, control, end, t), (0.0,), (1.0,))
    for s, c, a in zip(*map(jax.tree.leaves, (slope, control, TREE))):
        np.testing.assert_allclose(s, 2 * (c - a), rtol=1e-5, atol=1e-5)
    middle = weights.linear(TREE, end, 0.25)
    np.testing.assert_allclose(middle["b"]["c"], 0.75 * TREE["b"]["c"] + 0.25 * end["b"]["c"])


def test_leaves_keep_their_kinds(key):
    """Half precision stays so, computed in float32; counters and keys are the first tree's."""
    low = jnp.bfloat16
    trees = [
        {
            "w": jnp.full(4, 1 + i / 100, low),
            "n": jnp.int32(7 + i),
            "k": jax.random.key(i),
            "-": None,
        }
        for i in range(100)
    ]
    first, last, t = trees[0], trees[-1], jnp.float32(0.5)
    mean = weights.average(trees)
    exact = np.mean([np.float64(tree["w"]) for tree in trees], axis=0)
    np.testing.assert_array_equal(mean["w"], jnp.asarray(exact, low))
    for tree in (
        mean,
        weights.linear(first, last, t),
        weights.bezier(first, last, last, t),
        weights.scale_to_layers(first, last, t),
        weights.project_to_layers(first, last, t),
        weights.sample_sphere(key, first, t),
    ):
        assert tree["w"].dtype == low
        assert tree["n"] == 7
        assert tree["n"].dtype == jnp.int32
        assert tree["k"] == jax.random.key(0)
    moved = weights.sample_sphere(key, {**first, "w": jnp.zeros(4)}, 2.0)["w"]
    np.testing.assert_allclose(jnp.linalg.norm(moved), 2.0, rtol=1e-6)


def test_average_is_the_weighted_mean():
    other = jax.tree.map(lambda leaf: -leaf, TREE)
    for leaf, expected in zip(
        jax.tree.leaves(weights.average([TREE, other], [3, 1])), jax.tree.leaves(TREE)
    ):
        np.testing.assert_allclose(leaf, 0.5 * expected)
    assert all(not leaf.any() for leaf in jax.tree.leaves(weights.average([TREE, other])))


def test_layerwise_balls():
    direction = jax.tree.map(lambda leaf: jnp.sin(leaf) + 0.5, TREE)
    step = weights.scale_to_layers(direction, TREE, 0.01)
    for s, d, p in zip(*map(jax.tree.leaves, (step, direction, TREE))):
        np.testing.assert_allclose(jnp.linalg.norm(s), 0.01 * jnp.linalg.norm(p), rtol=1e-5)
        np.testing.assert_allclose(s / jnp.linalg.norm(s), d / jnp.linalg.norm(d), rtol=1e-5)
    for scale in (1e-25, 1e25):  # whose squares are zero and infinite
        again = weights.scale_to_layers(optax.tree.scale(scale, direction), TREE, 0.01)
        for a, s in zip(jax.tree.leaves(again), jax.tree.leaves(step)):
            np.testing.assert_allclose(a, s, rtol=1e-5)
    nothing = weights.scale_to_layers(jax.tree.map(jnp.zeros_like, TREE), TREE, 0.01)
    assert all(not leaf.any() for leaf in jax.tree.leaves(nothing))
    far = optax.tree.add(TREE, optax.tree.scale(50.0, step))
    near = weights.project_to_layers(far, TREE, 0.1)
    for n, s, p in zip(*map(jax.tree.leaves, (near, step, TREE))):
        np.testing.assert_allclose(n - p, 10 * s, rtol=1e-4, atol=1e-5)
    inside = optax.tree.add(TREE, step)
    for a, b in zip(
        jax.tree.leaves(weights.project_to_layers(inside, TREE, 0.1)), jax.tree.leaves(inside)
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_sphere_has_its_radius_and_no_preferred_direction(key):
    points = jax.jit(jax.vmap(lambda k: weights.sample_sphere(k, TREE, 2.0)))(
        jax.random.split(key, 2000)
    )
    moves = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), points, TREE)
    flat = np.concatenate([np.reshape(m, (2000, -1)) for m in jax.tree.leaves(moves)], axis=1)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 2.0, rtol=1e-5)
    assert np.all(np.abs(flat.mean(0)) < 4.5 * 2 / np.sqrt(9 * 2000))
    np.testing.assert_allclose((flat**2).mean(0), 4 / 9, rtol=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: weights.top_k(TREE, 10), "0 .. 9"),
        (lambda k: weights.top_k(TREE, 0.5), "must be an int"),
        (lambda k: weights.random_by_layer(k, TREE, {"a": 0.5}), "structure"),
        (lambda k: weights.random_by_layer(k, TREE, {"a": 1.5, "b": {"c": 0.0}}), r"\[0, 1\]"),
        (lambda k: weights.average([]), "at least one"),
        (lambda k: weights.average([TREE, TREE], [1.0]), "2 numbers"),
        (lambda k: weights.average([TREE, TREE], [1.0, -1.0]), "other than zero"),
    ],
)
def test_mistakes_get_a_clear_error(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)
