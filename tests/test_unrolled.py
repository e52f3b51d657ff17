"""Unrolled reconstruction: the operator, its data step, and the noise that all blocks share."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrobust import keys
from jrobust.models import _unrolled
from jrobust.models._unrolled import Fourier, smoothing_noise

SIZE = 6
SHAPE = (SIZE, SIZE, 2)

data_step = jax.jit(_unrolled.data_step, static_argnames="tol")
unroll = jax.jit(_unrolled.unroll, static_argnums=0, static_argnames=("blocks", "tol", "limits"))


def problem(seed=0, receivers=3):
    """Random maps, less than orthonormal, and half of the frequencies."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(receivers, *SHAPE)).astype(np.float32)
    maps /= np.sqrt((maps**2).sum((0, 3), keepdims=True))
    mask = (rng.random((SIZE, SIZE)) < 0.5).astype(np.float32)
    return Fourier(jnp.asarray(mask), jnp.asarray(maps))


def images(seed, batch=2, scale=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=(batch, *SHAPE)), jnp.float32)


def matrix(operator):
    """A in complex float64, column by column, by numpy's transform: (measurements, pixels)."""
    maps = np.asarray(operator.maps, np.float64)
    maps = maps[..., 0] + 1j * maps[..., 1]
    mask = np.asarray(operator.mask, np.float64)
    pixels = np.eye(SIZE * SIZE).reshape(-1, 1, SIZE, SIZE)
    columns = mask * np.fft.fft2(maps * pixels, norm="ortho")
    return columns.reshape(SIZE * SIZE, -1).T


def flat(x):
    x = np.asarray(x, np.float64)
    return (x[..., 0] + 1j * x[..., 1]).reshape(len(x), -1)


def test_the_operator_is_its_matrix():
    operator = problem()
    x = images(1)
    np.testing.assert_allclose(flat(operator.forward(x)), flat(x) @ matrix(operator).T, atol=1e-5)
    y = operator.forward(images(2)) + 1.0
    np.testing.assert_allclose(
        flat(operator.adjoint(y)), flat(y) @ matrix(operator).conj(), atol=1e-5
    )
    assert np.linalg.norm(matrix(operator), 2) <= 1 + 1e-6


def test_the_adjoint_passes_the_dot_product_test():
    operator = problem(3, receivers=2)
    x = images(4)
    y = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2, *SHAPE)), jnp.float32)
    left = jnp.vdot(operator.forward(x), y)
    right = jnp.vdot(x, operator.adjoint(y))
    assert abs(left) > 1
    np.testing.assert_allclose(left, right, rtol=1e-5)
    # And so is the derivative of the forward operator.
    np.testing.assert_allclose(
        jax.vjp(operator.forward, x)[1](y)[0], operator.adjoint(y), atol=1e-5
    )


@pytest.mark.parametrize("weight", [1.0, 0.05])
def test_the_data_step_is_the_solution_of_its_system(weight):
    operator = problem()
    z, aliased = images(1), operator.adjoint(operator.forward(images(2)))
    a = matrix(operator)
    system = a.conj().T @ a + weight * np.eye(SIZE * SIZE)
    exact = np.linalg.solve(system, (flat(aliased) + weight * flat(z)).T).T
    got = data_step(operator, z, aliased, weight=weight)
    np.testing.assert_allclose(flat(got), exact, atol=2e-5 / weight)
    # It stops by its tolerance: a coarse one leaves a residual, below what was asked for.
    coarse = flat(data_step(operator, z, aliased, weight=weight, tol=0.1))
    start = np.linalg.norm(flat(aliased) - flat(z) @ (a.conj().T @ a).T, axis=1)
    left = np.linalg.norm(flat(aliased) + weight * flat(z) - coarse @ system.T, axis=1)
    assert np.all(left <= 0.1 * start * (1 + 1e-4))
    assert np.any(left > 1e-4 * start)


def test_one_receiver_has_a_closed_form():
    """Measured frequencies are averaged with the denoised image's, the others kept."""
    mask = problem().mask
    maps = jnp.zeros((1, *SHAPE)).at[..., 0].set(1.0)
    operator = Fourier(mask, maps)
    z, truth = images(1), images(2)
    weight = 0.3
    got = data_step(operator, z, operator.adjoint(operator.forward(truth)), weight=weight)
    there, known = (np.fft.fft2(flat(v).reshape(-1, SIZE, SIZE)) for v in (z, truth))
    exact = np.fft.ifft2((np.asarray(mask) * known + weight * there) / (np.asarray(mask) + weight))
    np.testing.assert_allclose(flat(got), exact.reshape(len(z), -1), atol=1e-5)


def test_derivatives_of_the_data_step_are_those_of_the_solution():
    operator, weight = problem(), 0.5
    z, aliased, probe = images(1), images(2), images(3)

    @jax.jit
    def pull(z, b, probe):
        step = functools.partial(_unrolled.data_step, operator, weight=weight)
        return jax.vjp(step, z, b)[1](probe)

    by_z, by_b = pull(z, aliased, probe)
    a = matrix(operator)
    inverse = np.linalg.inv(a.conj().T @ a + weight * np.eye(SIZE * SIZE))  # its own adjoint
    np.testing.assert_allclose(flat(by_b), flat(probe) @ inverse.T, atol=1e-4)
    np.testing.assert_allclose(flat(by_z), weight * flat(probe) @ inverse.T, atol=1e-4)


def test_examples_do_not_see_each_other():
    """A hard example keeps iterating, an easy one is done: alone or together, the same numbers."""
    operator = problem()
    z = images(1, 3, scale=jnp.array([1e-3, 1.0, 0.0])[:, None, None, None])
    aliased = operator.adjoint(operator.forward(images(2, 3)))
    aliased = aliased.at[2].set(0.0)
    together = data_step(operator, z, aliased, weight=1.0)
    for i in range(3):
        alone = data_step(operator, z[i : i + 1], aliased[i : i + 1], weight=1.0)
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-6)
    assert jnp.all(together[2] == 0), "nothing to solve, nothing divided by zero"


def shrink(x):
    return 0.7 * jnp.tanh(x) + 0.1 * x**2


def test_modl_is_its_two_steps_in_turn():
    operator = problem()
    aliased = operator.adjoint(operator.forward(images(2, scale=0.3)))
    got, denoised = unroll(shrink, operator, aliased, blocks=2, weight=0.8)
    x = aliased
    for block in range(2):
        np.testing.assert_allclose(denoised[block, 0], shrink(x), atol=1e-5)
        x = data_step(operator, shrink(x), aliased, weight=0.8)
    np.testing.assert_allclose(got, x, atol=1e-5)
    assert denoised.shape == (2, 1, 2, *SHAPE)


def test_all_blocks_see_the_same_noise_and_average_their_outputs(key):
    operator = problem()
    aliased = operator.adjoint(operator.forward(images(2, scale=0.1)))
    noise = smoothing_noise(keys.examples(key, jnp.arange(2)), SHAPE, samples=4, sigma=0.05)
    results = []
    for scale in (1.0, 0.0):  # without noise SMUG is MoDL
        got, denoised = unroll(shrink, operator, aliased, scale * noise, blocks=2)
        assert denoised.shape == (2, 4, 2, *SHAPE)
        x = aliased
        for outputs in denoised:
            np.testing.assert_allclose(outputs, shrink(x[None] + scale * noise), atol=1e-5)
            x = data_step(operator, outputs.mean(0), aliased, weight=1.0)
        np.testing.assert_allclose(got, x, atol=1e-5)
        results.append(got)
    assert jnp.abs(results[0] - results[1]).max() > 1e-3


def test_noisy_copies_are_clipped_and_plain_ones_are_not():
    operator, aliased = problem(), images(2, scale=3.0)
    one = jnp.ones((1, *aliased.shape))

    @functools.partial(jax.jit, static_argnums=1)
    def seen(noise, limits):
        found = _unrolled.unroll(lambda x: x, operator, aliased, noise, blocks=1, limits=limits)
        return found[1][0, 0]

    for noise, limits, expected in [
        (one, (-1.0, 1.0), jnp.clip(aliased + 1, -1, 1)),
        (one, (-2.0, 2.0), jnp.clip(aliased + 1, -2, 2)),
        (None, (-1.0, 1.0), aliased),
    ]:
        np.testing.assert_allclose(seen(noise, limits), expected, rtol=1e-6)


def test_noise_belongs_to_its_example(key):
    ids = jnp.array([5, 2, 9])
    noise = smoothing_noise(keys.examples(key, ids), SHAPE, samples=3, sigma=0.2)
    alone = smoothing_noise(keys.examples(key, ids[1:2]), SHAPE, samples=2, sigma=0.2)
    assert jnp.array_equal(noise[:2, 1:2], alone)
    assert noise.shape == (3, 3, *SHAPE)
    flat_noise = np.asarray(noise).reshape(9, -1)
    assert np.abs(np.corrcoef(flat_noise) - np.eye(9)).max() < 0.5
    assert flat_noise.std() == pytest.approx(0.2, rel=0.1)


def test_bad_input():
    operator = problem()
    x = images(1)
    for arguments, options, match in [
        ((x[..., :1],), {}, "aliased must be"),
        ((x[0],), {}, "aliased must be"),
        ((x, jnp.zeros((3, 1, *SHAPE))), {}, "noise must be"),
        ((x,), {"blocks": 0}, "blocks"),
        ((x,), {"weight": 0.0}, "weight must be positive"),
    ]:
        with pytest.raises(ValueError, match=match):
            _unrolled.unroll(shrink, operator, *arguments, **options)


def test_lowers_for_every_platform():
    operator, x = problem(), images(1)
    exported = jax.export.export(unroll, platforms=("cpu", "cuda", "tpu"))(
        shrink, operator, x, x[None], blocks=2
    )
    assert exported.out_avals[0].shape == x.shape


@pytest.mark.full
def test_the_example_runs():
    root = pathlib.Path(__file__).resolve().parent.parent
    tiny = ("--seeds", 2, "--steps", 3, "--batch", 2, "--train", 4, "--test", 2, "--blocks", 2)
    command = [sys.executable, "examples/smug.py", *map(str, tiny), "--votes", "2"]
    done = subprocess.run(
        [*command, "--attack-steps", "2"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.count("seed 0 ") == done.stdout.count("seed 1 ") == 3
    assert done.stdout.count("SMUG's rise over that of MoDL") == 4
