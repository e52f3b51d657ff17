"""Defences that only hide the gradient are broken, or reported with a warning."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from jrobust import data, loops, parallel
from jrobust.attacks import PGD, AutoAttack
from jrobust.models import Bound, randomized
from jrobust.threat import Linf

KEY = jax.random.key(0)
THREAT = Linf(0.2)
MEMBERS = 3


def hidden(layer, x):
    return jnp.tanh(x.reshape(len(x), -1) @ layer["first"]) @ layer["second"]


@functools.cache
def trained():
    """Undefended networks, stacked, and the examples to attack."""
    digits = data.digits()
    x, y = jnp.asarray(digits.train.x), jnp.asarray(digits.train.y)

    def fit(key):
        one, two = jax.random.split(key)
        params = {
            "first": jax.random.normal(one, (64, 32)) / 8,
            "second": jax.random.normal(two, (32, 10)) / 6,
        }
        tx = optax.adam(1e-2)

        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(hidden(params, x), y).mean()

        def update(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 150, update, (params, tx.init(params)))[0]

    return jax.jit(jax.vmap(fit))(jax.random.split(KEY, MEMBERS)), digits.test[:48]


def plain(params, extra, x):
    return hidden(jax.tree.map(lambda leaf: leaf[0], params), x)


def quantised(params, extra, x):
    return plain(params, extra, jnp.round(4 * x) / 4)


def saturated(params, extra, x):
    """Scores in [0, 1] that are one or zero to the last bit nearly everywhere."""
    logits = plain(params, extra, x)
    second = jax.lax.top_k(logits, 2)[0]
    return jax.nn.sigmoid(500 * (logits - jnp.mean(second, -1, keepdims=True)))


def crossmax(params, extra, x):
    """CrossMax (Fort & Lakshminarayanan 2024): the median over members, after two maxima."""
    logits = jax.vmap(hidden, (0, None))(params, x)
    logits = logits - jnp.max(logits, -1, keepdims=True)
    logits = logits - jnp.max(logits, 0, keepdims=True)
    return jnp.median(logits, 0)


def frozen(params, extra, x):
    """Noise that looks random, from a key in the program."""
    return plain(params, extra, x + 0.2 * jax.random.normal(jax.random.key(7), x.shape[1:])[None])


def transformed(model, keys, x):
    """A random translation by up to half a pixel, a random contrast, and noise."""

    def one(key, x):
        place, contrast, noise = jax.random.split(key, 3)
        share = jax.random.uniform(place, (2,), minval=-0.5, maxval=0.5)
        for axis in (0, 1):
            by = share[axis]
            near = jnp.roll(x, jnp.sign(by).astype(int), axis)
            x = (1 - abs(by)) * x + abs(by) * near
        x = x * jax.random.uniform(contrast, minval=0.7, maxval=1.3)
        return x + 0.1 * jax.random.normal(noise, x.shape)

    return model(jax.vmap(one)(keys, x))


def evaluate(model, attacks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", loops.ReliabilityWarning)
        report = loops.evaluate(
            KEY, model, trained()[1], attacks, batch_size=48, progress=False,
            mesh=parallel.mesh(jax.devices()[:1]),
        )  # fmt: skip
    return report, {doubt.kind for doubt in report.doubts}


def bound(fn):
    return Bound(trained()[0], {}, fn)


GRADIENTS = {"pgd": PGD(THREAT, steps=20)}
WHOLE = AutoAttack(THREAT, ["apgd-ce", "square"], steps=20, queries=150).stages


def test_undefended_it_falls_without_a_warning():
    report, kinds = evaluate(bound(plain), GRADIENTS)
    assert report.clean_accuracy > 0.85
    assert report.robust_accuracy < 0.1
    assert kinds == set()


@pytest.mark.parametrize(
    ("fn", "signs"),
    [
        (quantised, {"gradient cut", "zero gradients", "unbounded attack fails"}),
        (saturated, {"zero gradients", "unbounded attack fails"}),
        (crossmax, {"unstable gradients"}),
        (frozen, {"randomness"}),
    ],
)
def test_what_only_hides_the_gradient_is_flagged_and_falls_to_queries(fn, signs):
    report, kinds = evaluate(bound(fn), GRADIENTS)
    assert report.clean_accuracy > 0.6
    assert signs <= kinds
    whole, more = evaluate(bound(fn), WHOLE)
    assert whole.robust_accuracy < 0.4
    # Noise that is the same at every call hides nothing from gradients.
    assert fn is frozen or (report.robust_accuracy > 0.8 and "queries win" in more)


def test_a_random_transform_is_broken():
    model = randomized(
        jax.tree_util.Partial(transformed, bound(plain)), jax.random.key(3), samples=8, votes=16
    )
    report, _ = evaluate(model, GRADIENTS)
    assert report.clean_accuracy > 0.6
    assert report.robust_accuracy < 0.2
    # The votes of the fixed draws are broken; fresh draws tell how often the model still is right.
    assert report.redrawn_accuracy()[2] < 0.5
