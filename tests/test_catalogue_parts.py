"""What holds for every objective, noise and estimator, driven by the table in catalogue.py."""

import re

import catalogue
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrobust
from jrobust import models, smoothing, training

ALL = catalogue.OBJECTIVES + catalogue.NOISES + catalogue.ESTIMATORS
NETWORK = models.network(models.MLP(features=(8,), classes=3))
X = np.float32(np.random.default_rng(0).uniform(0.2, 0.8, (8, 5)))
BATCH = training.batch(X, np.arange(8) % 3, np.arange(8) + 7)


def program(part):
    """What a user compiles around the algorithm: f(key, algorithm, x), and its x."""
    if part in catalogue.OBJECTIVES:
        params, extra = NETWORK.init(jax.random.key(0), X)

        def objective(key, algorithm, x):
            batch = BATCH._replace(x=x)
            grad = jax.grad(lambda p: algorithm(key, NETWORK, p, extra, batch), has_aux=True)(
                params
            )
            return grad

        return objective, X
    if part in catalogue.NOISES:
        return (
            lambda key, noise, x: smoothing.count_votes(key, lambda v: v[:, :3], x, noise, 40),
            X,
        )
    return (
        lambda key, estimator, x: estimator(key, lambda v: jnp.sum(jnp.sin(3 * v)), x),
        X[0],
    )


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.name)
def test_one_program_for_all_numbers_and_keys(part, key):
    run, x = program(part)
    traces = []

    @jax.jit
    def compiled(key, algorithm, x):
        traces.append(1)
        return run(key, algorithm, x)

    first, second = (
        compiled(key, jax.tree.map(jnp.float32, part.make(number)), x) for number in part.numbers
    )
    compiled(jax.random.key(9), jax.tree.map(jnp.float32, part.make(part.numbers[0])), x)
    assert len(traces) == 1
    finite = [np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((first, second))]
    assert all(finite)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second))]
    assert all(same) == (part.numbers[0] == part.numbers[1]), "the number has its effect"


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.name)
def test_lowers_for_every_platform(part):
    run, x = program(part)
    algorithm = jax.tree.map(jnp.float32, part.make(part.numbers[0]))
    exported = jax.export.export(
        jax.jit(lambda key, x: run(key, algorithm, x)), platforms=("cpu", "cuda", "tpu")
    )(jax.random.key(0), x)
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.name)
def test_is_a_documented_public_pytree(part):
    algorithm = part.make(part.numbers[0])
    leaves, treedef = jax.tree.flatten(algorithm)
    again = jax.tree.unflatten(treedef, leaves)
    assert type(again) is type(algorithm)
    assert jax.tree.leaves(again) == leaves
    room = getattr(jrobust, part.room)
    assert part.name in room.__all__
    assert getattr(room, part.name) is type(algorithm)
    text = type(algorithm).__doc__
    assert "Args:" in text
    source = re.search(r"(19|20)\d\d", text)
    assert source or part.name == "Standard", f"{part.name} does not name its source"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, id=f"{room}-{names[0]}")
        for room, kernels in catalogue.KERNELS.items()
        for names, program in kernels.items()
    ],
)
def test_every_other_kernel_lowers_for_every_platform(program, key):
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(program), platforms=platforms)(key, X)
    assert exported.platforms == platforms


def public(room):
    """The public names of a room, or of a module that is one."""
    made = [
        name
        for name, value in vars(room).items()
        if getattr(value, "__module__", "") == room.__name__ and callable(value)
    ]
    return set(getattr(room, "__all__", [name for name in made if not name.startswith("_")]))


@pytest.mark.parametrize("room", sorted(catalogue.OTHERS))
def test_the_table_is_complete(room):
    listed = [part.name for part in ALL if part.room == room] + sorted(catalogue.OTHERS[room])
    listed += [name for names in catalogue.KERNELS[room] for name in names]
    assert set(listed) == public(getattr(jrobust, room))
    assert len(set(listed)) == len(listed), "each once"


def test_an_update_step_takes_every_objective(key):
    """The step around an objective compiles once and moves the parameters."""
    for part in catalogue.OBJECTIVES:
        init, update = training.step(part.make(part.numbers[1]), optax.sgd(0.1))
        state = init(key, NETWORK, X)
        moved, metrics = jax.jit(update)(state, BATCH)
        assert int(moved.step) == 1
        assert np.isfinite(metrics["loss"])
        change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, moved.params)
        assert max(jax.tree.leaves(change)) > 1e-6
