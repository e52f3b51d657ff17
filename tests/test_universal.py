"""Universal perturbations: linear models whose best one is known, counts, the box."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrobust import drive, losses
from jrobust._algorithm import algorithm
from jrobust.attacks._universal import SGDUAP, UAP
from jrobust.models import randomized
from jrobust.threat import L0, L1, L2, Linf

RNG = np.random.default_rng(0)
COUNT, SHAPE, SIZE = 13, (3, 4), 12
X = np.float32(RNG.uniform(0.3, 0.7, (COUNT, *SHAPE)))
NORMAL = np.float32(RNG.normal(size=SIZE))
NORMAL[3] = 4.0  # the best single feature


@algorithm
class Linear:
    """Logits ``-m, m`` for the margin ``m = 5 (normal . x - offset)``; NaN below ``broken``."""

    normal: jax.Array
    offset: jax.Array
    broken: jax.Array

    def __call__(self, x):
        flat = x.reshape(x.shape[0], -1)
        margin = 5 * (flat @ self.normal[:, None] - self.offset)
        logits = jnp.concatenate([-margin, margin], 1)
        return logits * jnp.where(flat[:, :1] < self.broken, jnp.nan, 1.0)


SCORES = X.reshape(COUNT, -1) @ NORMAL
# All of class 0, some of them close to the boundary.
MODEL = Linear(NORMAL, np.float32(SCORES.max() + 0.5), np.float32(-1))
ZEROS = np.zeros(COUNT, int)


@jax.jit
def run(attack, key, model, x, y, targets=None):
    return attack(key, model, x, y, targets=targets)


BEST = {
    Linf: (0.1, 0.1 * np.sign(NORMAL)),
    L2: (0.3, 0.3 * NORMAL / np.linalg.norm(NORMAL)),
    L1: (0.2, 0.2 * (np.arange(SIZE) == 3)),
}


def ascent(threat, **settings):
    """One program for all tests that differ in numbers."""
    return SGDUAP(threat, epochs=6, batch_size=5, **settings)


@pytest.mark.parametrize(
    "kind",
    [Linf, *(pytest.param(kind, marks=pytest.mark.full) for kind in (L2, L1))],
    ids=lambda kind: kind.norm,
)
def test_the_best_for_a_linear_model(kind, key):
    eps, want = BEST[kind]
    attack = ascent(kind(eps), beta=1e6)
    found = run(attack, key, MODEL, X, ZEROS)
    np.testing.assert_allclose(found.delta.ravel(), want, atol=2e-3 * eps)
    np.testing.assert_allclose(found.distance, eps, rtol=1e-5)
    fooled = SCORES + want @ NORMAL > MODEL.offset
    np.testing.assert_array_equal(found.success, fooled)
    assert 0 < fooled.mean() < 1
    moved = attack.apply(X, found.delta)
    np.testing.assert_array_equal(moved, np.clip(X + np.asarray(found.delta), 0, 1))
    np.testing.assert_allclose(found.loss, losses.cross_entropy(MODEL(moved), ZEROS), rtol=1e-4)
    # Three batches of five rows for 13 examples: two rows are asked twice in every pass.
    assert found.passes == 6
    assert found.backwards.sum() == 6 * 15
    assert set(np.asarray(found.backwards)) <= set(range(6, 13))
    assert found.forwards.sum() == 6 * 15 + 15


def test_a_loss_counts_up_to_its_bound(key):
    """An example that is lost already does not decide the direction, unless it may."""
    x = np.full((4, 2), 0.5, np.float32)
    x[0, 0] = 0.0

    def model(x):
        # The first example, of loss 60, pulls down; the others pull up.
        up = x[:, 1:] - 0.5
        margin = jnp.where(x[:, :1] < 0.25, 60 - 90 * up, 10 * up)
        return jnp.concatenate([-margin, margin], 1) / 2

    find = jax.jit(
        lambda beta: SGDUAP(Linf(0.1), epochs=4, batch_size=4, beta=beta)(
            key, model, x, jnp.zeros(4, int)
        )
    )
    assert find(9.0).delta[1] > 0
    assert find(1e6).delta[1] < 0


def test_features_at_the_bound_have_a_gradient_and_those_beyond_none(key):
    x = np.zeros((COUNT, *SHAPE), np.float32)
    x[7:] = 1  # beyond the bound after the first step, and pulling harder than the others
    up = Linear(np.abs(NORMAL) / 9, np.abs(NORMAL).sum() / 18, np.float32(-1))
    found = run(ascent(Linf(0.2), beta=1e6), key, up, x, ZEROS)
    np.testing.assert_allclose(found.delta, 0.2, rtol=1e-5)
    white = run(ascent(Linf(0.2), beta=1e6), key, up, np.ones_like(x), ZEROS)
    # The first step leads out of the box, where no feature has any gradient.
    first = 0.2 * 2.5 / 18
    np.testing.assert_allclose(white.delta, first, rtol=1e-5)


def test_nan_is_a_success_and_pulls_nowhere(key):
    broken = Linear(NORMAL, MODEL.offset, np.median(X[:, 0, 0]))
    found = run(ascent(Linf(0.01), beta=1e6), key, broken, X, ZEROS)
    # What it has of a gradient does not stop the others.
    np.testing.assert_allclose(found.delta.ravel(), 0.01 * np.sign(NORMAL), rtol=1e-3)
    nan = X[:, 0, 0] + found.delta[0, 0] < broken.broken
    assert nan.any()
    assert np.all(np.asarray(found.success)[nan])
    np.testing.assert_array_equal(np.isnan(found.loss), nan)


def test_targets_and_keys(key):
    model = Linear(NORMAL, np.median(SCORES), np.float32(-1))
    y = (model(X)[:, 1] > 0).astype(int)
    attack = ascent(Linf(0.05))
    towards = run(attack, key, model, X, y, np.ones(COUNT, int))
    np.testing.assert_array_equal(towards.success, model(attack.apply(X, towards.delta)).argmax(1))
    assert towards.success.mean() > 0.8
    again = run(attack, key, model, X, y, np.ones(COUNT, int))
    np.testing.assert_array_equal(again.delta, towards.delta)
    plain, other = (run(attack, k, model, X, y) for k in (key, jax.random.key(3)))
    assert not np.array_equal(plain.backwards, other.backwards)


@pytest.mark.full
def test_a_model_that_draws(key):
    """The expected loss over draws that cancel out has the same ascent."""

    def noisy(keys, x):
        shift = jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)
        return MODEL(x) + shift * jnp.asarray([[-1.0, 1.0]])

    model = randomized(noisy, key, samples=4, votes=3)
    found = run(ascent(Linf(0.1), beta=1e6), key, model, X, ZEROS)
    np.testing.assert_allclose(found.delta.ravel(), BEST[Linf][1], atol=2e-4)
    assert found.backwards.sum() == 6 * 15 * 4
    assert found.forwards.sum() == 6 * 15 * 4 + 15 * 3


@pytest.mark.full
def test_sharded_examples(key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = jax.sharding.NamedSharding(mesh, jax.P("data"))
    x, y = np.tile(X, (8, 1, 1))[:64], np.zeros(64, int)
    attack = SGDUAP(Linf(0.05), epochs=1, batch_size=16)
    alone = run(attack, key, MODEL, x, y)
    spread = run(attack, key, MODEL, *jax.device_put((x, y), put))
    np.testing.assert_allclose(spread.delta, alone.delta, atol=1e-6)
    np.testing.assert_array_equal(spread.success, alone.success)


# ------------------------------------------------------------------ one example after the other


def test_the_original_takes_the_shortest_way_of_each(key):
    """In L2, over the boundary of a linear model, by two hundredths more than the distance."""

    def original(eps, x, rate=1.0):
        return run(UAP(L2(eps), epochs=3, rate=rate), key, MODEL, x, ZEROS)

    unit = NORMAL / np.linalg.norm(NORMAL)
    missing = (MODEL.offset - SCORES) / np.linalg.norm(NORMAL)
    same = original(3.0, np.repeat(X[:1], COUNT, 0))
    np.testing.assert_allclose(same.delta.ravel(), 1.02 * missing[0] * unit, rtol=1e-3, atol=1e-5)
    assert np.all(same.success)
    assert same.passes == 1
    # Whoever comes first takes a second look, from where it went; all are counted twice.
    assert same.forwards.sum() == COUNT + 1 + 2 * COUNT
    assert same.backwards.sum() == COUNT + 1

    # Whoever is not fooled yet adds what is missing: in the end the farthest decides.
    found = original(3.0, X)
    assert np.all(found.success)
    assert found.passes == 1
    assert missing.max() < np.asarray(found.delta).ravel() @ unit < 1.1 * missing.max()

    # On a small ball it stays there, and passes go on as long as too few are fooled.
    small = original(0.3, X)
    np.testing.assert_allclose(small.delta.ravel(), 0.3 * unit, rtol=1e-3, atol=1e-5)
    assert small.passes == 3
    np.testing.assert_array_equal(small.success, missing < 0.3)
    assert 0 < small.success.mean() < 1
    assert original(0.3, X, 0.5 * float(small.success.mean())).passes == 1


def test_bad_settings(key):
    for attack, kind, words in (
        (SGDUAP(0.1), TypeError, "one of Linf, L2 and L1"),
        (SGDUAP(L0(2.0)), TypeError, "one of Linf, L2 and L1"),
        (SGDUAP(Linf(np.full(COUNT, 0.1))), ValueError, "one eps"),
        (SGDUAP(Linf(2.0)), ValueError, "larger than the whole box"),
        (SGDUAP(Linf(0.1), epochs=0), ValueError, "epochs"),
        (SGDUAP(Linf(0.1), batch_size=0), ValueError, "batch_size"),
        (SGDUAP(Linf(0.1), beta=0.0), ValueError, "beta"),
        (SGDUAP(Linf(0.1), step_size=0.1, rel_step_size=0.1), ValueError, "not both"),
        (SGDUAP(Linf(0.1), rate=2.0), ValueError, "rate"),
        (SGDUAP(Linf(0.1), loss=losses.dlr_targeted), ValueError, "targets="),
        (UAP(Linf(0.1), overshoot=0.0), ValueError, "overshoot"),
    ):
        with pytest.raises(kind, match=words):
            attack(key, MODEL, X, ZEROS)
    with pytest.raises(ValueError, match="must lie in 0"):
        UAP(Linf(0.1))(key, MODEL, X, ZEROS + 2)
    with pytest.raises(TypeError, match="Host"):
        UAP(Linf(0.1))(key, drive.Host(lambda x: np.zeros((len(x), 2))), X, ZEROS)


@pytest.mark.parametrize("attack", [SGDUAP(Linf(0.1), batch_size=5), UAP(Linf(0.1))])
def test_lowers_for_every_platform(attack):
    exported = jax.export.export(
        jax.jit(lambda seed, x, y: attack(jax.random.key(seed), MODEL, x, y)),
        platforms=("cpu", "cuda", "tpu"),
    )(jnp.uint32(0), X, jnp.asarray(ZEROS))
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_the_page_runs_as_it_stands():
    page = pathlib.Path(__file__).resolve().parents[1] / "docs" / "beyond-norms.md"
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
    assert names["curve"].success.mean(axis=1)[2] > 0.9
