"""Tensor-train layers: against the matrix itself, their price, TT-SVD, exact differences."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from jrobust import models
from jrobust.models import TensorTrainDense, tensor_train
from jrobust.zeroth_order import CGE, OneHot, differencer

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def matrix_of(cores, inputs, features):
    """The matrix (m, n) of the cores, entry by entry."""
    cores = [np.asarray(cores[f"core{i}"], np.float64) for i in range(1, len(inputs) + 1)]
    matrix = np.zeros((math.prod(inputs), math.prod(features)))
    for row, i in enumerate(np.ndindex(*inputs)):
        for column, j in enumerate(np.ndindex(*features)):
            product = np.eye(1)
            for core, a, b in zip(cores, i, j):
                product = product @ core[:, a, b, :]
            matrix[row, column] = product[0, 0]
    return matrix


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def multiplications(jaxpr):
    """In all products of a program, and the size of its largest array."""
    total, largest = 0, 0
    for eqn in equations(jaxpr):
        largest = max([largest, *(v.aval.size for v in eqn.outvars)])
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * math.prod(shape[a] for a in contracted)
    return total, largest


# Cheaper from the first core, from the last, and either way; with a factor that is 1.
SHAPES = [((8, 2), (2, 8), 2), ((2, 8), (8, 2), 2), ((3, 2, 4), (2, 5, 1), (3, 2)), ((6,), (5,), 9)]


@pytest.mark.parametrize(("inputs", "features", "ranks"), SHAPES)
def test_it_is_the_matrix_of_its_cores(inputs, features, ranks):
    layer = TensorTrainDense(features, inputs, ranks)
    x = RNG.normal(size=(2, 3, math.prod(inputs))).astype(np.float32)
    params = dict(layer.init(KEY, x)["params"])
    params["bias"] = RNG.normal(size=math.prod(features)).astype(np.float32)
    wanted = x @ matrix_of(params, inputs, features) + params["bias"][None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, x), wanted, atol=1e-5)


@pytest.mark.parametrize(("inputs", "features"), [((4, 2, 16), (4, 2, 2)), ((2, 2, 4), (16, 2, 4))])
def test_it_never_forms_the_matrix_and_begins_at_the_cheaper_end(inputs, features):
    batch, m, n = 3, math.prod(inputs), math.prod(features)
    layer = TensorTrainDense(features, inputs, 2, use_bias=False)
    x = jnp.zeros((batch, m))
    params = layer.init(KEY, x)
    total, largest = multiplications(jax.make_jaxpr(layer.apply)(params, x).jaxpr)

    def price(cores, size=m):
        price = 0
        for before, a, b, after in cores:
            size = size // a * b
            price += size * before * a * after
        return batch * price

    shapes = [core.shape for core in params["params"].values()]
    swapped = [(after, a, b, before) for before, a, b, after in reversed(shapes)]
    both = price(shapes), price(swapped)
    assert total == min(both) < max(both)
    assert largest < m * n


def test_parameters_are_those_of_the_ranks_and_no_more():
    def sizes(*arguments, **options):
        layer = TensorTrainDense(*arguments, **options)
        params = jax.eval_shape(layer.init, KEY, jnp.zeros((1, math.prod(layer.inputs))))["params"]
        return {name: leaf.shape for name, leaf in params.items()}

    assert sizes((4, 4), (3, 7), 5) == {
        "core1": (1, 3, 4, 5), "core2": (5, 7, 4, 1), "bias": (16,)
    }  # fmt: skip
    # No matrix of these factors needs a rank above 2 and 3 there.
    assert sizes((1, 4, 3), (2, 2, 1), 100, use_bias=False) == {
        "core1": (1, 2, 1, 2), "core2": (2, 2, 4, 3), "core3": (3, 1, 3, 1)
    }  # fmt: skip


def test_outputs_have_the_variance_that_was_asked_for():
    inputs, features = (3, 2, 2), (2, 3, 2)
    layer = TensorTrainDense(features, inputs, (3, 2), gain=2.0)
    x = RNG.normal(size=(1, 12)).astype(np.float32)
    x *= np.float32(1 / np.sqrt(np.mean(x**2)))

    def draw(key):
        params = layer.init(key, x)
        return jnp.ravel(layer.apply(params, x))

    y = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 8000)), np.float64)
    # Outputs of one draw depend on each other: one number for each draw.
    for samples, wanted in ((np.mean(y**2, 1), 2.0), (y[:, 0] ** 2, 2.0), (y[:, 5], 0.0)):
        assert abs(samples.mean() - wanted) < 4 * samples.std() / math.sqrt(len(samples))
    assert np.mean(y**2, 1).std() / math.sqrt(len(y)) < 0.05


# --- TT-SVD ------------------------------------------------------------------------------------


def tails(matrix, inputs, features, ranks):
    """The singular values left out of each unfolding, each by a decomposition of its own."""
    k = len(inputs)
    interleaved = [axis for i in range(k) for axis in (i, k + i)]
    tensor = matrix.reshape(*inputs, *features).transpose(interleaved)
    found = []
    for at, rank in enumerate(ranks, 1):
        rows = math.prod(inputs[:at]) * math.prod(features[:at])
        s = np.linalg.svd(tensor.reshape(rows, -1), compute_uv=False)
        found.append(np.sum(s[rank:] ** 2))
    return found


def test_the_decomposition_is_as_good_as_its_ranks_allow():
    inputs, features = (2, 3, 2), (3, 2, 2)
    matrix = RNG.normal(size=(12, 12))
    for ranks in ((6, 4), (2, 3), (1, 1)):
        cores = tensor_train(matrix, inputs, features, ranks)
        error = np.linalg.norm(matrix_of(cores, inputs, features) - matrix)
        left = tails(matrix, inputs, features, ranks)
        assert math.sqrt(max(left)) - 1e-5 <= error <= math.sqrt(sum(left)) + 1e-5
        assert (error < 1e-5) == (ranks == (6, 4))
        sizes = [np.sqrt(np.mean(core**2)) for core in cores.values()]
        np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)
    # Of two cores it is the best of all, by Eckart and Young.
    cores = tensor_train(matrix, (3, 4), (6, 2), 2)
    error = np.linalg.norm(matrix_of(cores, (3, 4), (6, 2)) - matrix)
    np.testing.assert_allclose(error**2, tails(matrix, (3, 4), (6, 2), (2,))[0], rtol=1e-5)


def test_a_dense_layer_that_is_a_train_becomes_one():
    inputs, features = (3, 4), (2, 5)
    layer = TensorTrainDense(features, inputs, 2)
    x = RNG.normal(size=(4, 12)).astype(np.float32)
    known = layer.init(KEY, x)["params"]
    dense = nn.Dense(10)
    kernel = matrix_of(known, inputs, features).astype(np.float32)
    bias = RNG.normal(size=10).astype(np.float32)
    cores = tensor_train(kernel, inputs, features, 2)
    found = layer.apply({"params": {**cores, "bias": bias}}, x)
    wanted = dense.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    nothing = tensor_train(0 * kernel, inputs, features, 2)
    assert not np.any(matrix_of(nothing, inputs, features))


# --- differences -------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(TensorTrainDense((3, 4), (4, 4), name="layer1")(x))
        return TensorTrainDense((1, 2), (3, 4), name="layer2")(h)


X = np.random.default_rng(3).normal(size=(5, 16)).astype(np.float32)


def test_coordinatewise_estimates_are_those_of_float64():
    network = models.network(Net())
    params, extra = network.init(KEY, X)

    def loss(params, x=X):
        return jnp.mean(network.logits(params, extra, x) ** 2)

    mu = 2.0**-14
    _, grad = jax.jit(lambda p: CGE(mu, central=False, strict=True)(None, loss, p))(params)
    found, _ = jax.flatten_util.ravel_pytree(grad)
    with jax.enable_x64(True):
        point, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), params)
        )
        value = jax.jit(jax.vmap(lambda p: loss(unravel(p), X.astype(np.float64))))
        ends = np.asarray(value(point[None] + mu * np.eye(len(point))))
        wanted = (ends - np.asarray(value(point[None]))) / mu
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_the_difference_of_an_entry_stays_in_its_place():
    """One entry of a core moves one slice along each axis: cheaper than the layer."""
    layer = TensorTrainDense((4, 4, 4), (4, 4, 4), 3)
    x = jnp.ones((7, 64))
    params = layer.init(KEY, x)["params"]
    layer_of = jax.jit(lambda p: layer.apply({"params": p}, x))
    _, delta = jax.jit(lambda p: differencer(layer_of, p))(params)
    whole, _ = multiplications(jax.make_jaxpr(layer_of)(params).jaxpr)
    for name, core in params.items():
        if name == "bias":
            continue

        def move(index, name=name):
            change = dict.fromkeys(params)
            return delta({**change, name: OneHot(tuple(index), 0.5)})

        index = jnp.array([n - 1 for n in core.shape])
        one, _ = multiplications(jax.make_jaxpr(move)(index).jaxpr)
        assert 0 < one < whole / 4
        moved = {**params, name: core.at[tuple(index)].add(0.5)}
        wanted = layer_of(moved) - layer_of(params)
        np.testing.assert_allclose(jax.jit(move)(index), wanted, atol=1e-5)


@pytest.mark.full
def test_the_page_runs_as_it_stands(capsys):
    text = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "tensor-train.md").read_text()
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    d = sum(leaf.size for leaf in jax.tree.leaves(names["params"]))
    assert names["estimator"].queries(names["params"]) < d
    moved = [bool(np.any(leaf)) for leaf in jax.tree.leaves(names["grad"])]
    assert moved.count(False) == 1, "a Laplacian does not see the bias of the output alone"
    assert "3700 points" in capsys.readouterr().out


BAD = {
    "inputs": (lambda: TensorTrainDense((2, 2), (2, 3)).init(KEY, jnp.ones((1, 5))), "6 = 2 x 3"),
    "factors": (lambda: TensorTrainDense((2,), (2, 3)).init(KEY, jnp.ones((1, 6))), "as many"),
    "none": (lambda: TensorTrainDense((), ()).init(KEY, jnp.ones((1, 1))), "as many"),
    "ranks": (lambda: tensor_train(np.eye(6), (2, 3), (2, 3), (2, 2)), "one rank fewer"),
    "zero": (lambda: tensor_train(np.eye(6), (2, 3), (2, 3), 0), "at least 1"),
    "matrix": (lambda: tensor_train(np.eye(5), (2, 3), (2, 3), 1), r"\(6, 6\), got \(5, 5\)"),
    "infinite": (lambda: tensor_train(np.full((4, 4), np.inf), (2, 2), (2, 2), 1), "finite"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake):
    call, message = BAD[mistake]
    with pytest.raises(ValueError, match=message):
        call()
