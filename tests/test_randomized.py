"""Randomised models: whose draws an attack sees, what it ascends and what counts as success."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jrobust
from jrobust import attacks, data, keys, loops, models, zeroth_order
from jrobust.threat import Linf

KEY = jax.random.key(0)
D, EPS = 12, 0.1
W = jax.random.normal(jax.random.key(1), (D,))
W = jnp.where(jnp.abs(W) < 0.1, 0.1, W)
Y = jnp.arange(8) % 2
# Every feature votes for the label, by three quarters of what the ball allows to take away.
X = 0.5 + 0.75 * EPS * (1.0 - 2.0 * Y)[:, None] * jnp.sign(W)[None]


def logits(x):
    z = 8.0 * (x - 0.5) @ W
    return jnp.stack([z, -z], -1)


def scaled(keys, x):
    """A linear model times s, uniform in [0.5, 1.5]."""
    return scale(keys)[:, None] * logits(x)


def scale(keys):
    return jax.vmap(lambda key: jax.random.uniform(key, (), minval=0.5, maxval=1.5))(keys)


def masked(keys, x):
    """A linear model that sees each feature with probability 1/2."""
    return logits(jnp.where(jax.vmap(lambda k: jax.random.bernoulli(k, shape=(D,)))(keys), x, 0.5))


@jrobust.algorithm
class Probe(attacks.GradientAttack):
    """Stays where it is and remembers the last gradient."""

    threat: Linf
    steps: int = jrobust.static(default=4)
    loss: object = jrobust.static(default=lambda logits, y: -logits[jnp.arange(y.shape[0]), y])
    keep: str = jrobust.static(default="loss")
    estimator: object = None

    def start(self, record):
        return record.x0, jnp.zeros_like(record.x0)

    def move(self, state, loss, gradient):
        return state.x, gradient


def gradients(model, x, y, key, steps):
    """What the steps of an attack see, (steps, B, D)."""
    probe = Probe(Linf(EPS))
    step = jax.jit(lambda model, state: probe.step(model, state))
    state = probe.init(keys.examples(key, jnp.arange(x.shape[0])), x, y)
    seen = []
    for _ in range(steps):
        state = step(model, state)
        seen.append(state.inner)
    return jnp.stack(seen)


def test_the_gradient_is_unbiased_and_fresh():
    """s W in closed form: the mean of s over the draws is 1 up to its standard error."""
    n, samples = 500, 4
    model = models.randomized(scaled, KEY, samples=samples, votes=1)
    x, y = jnp.resize(X, (n, D)), jnp.resize(Y, (n,))
    seen = gradients(model, x, y, KEY, 3)
    sign = (2.0 * y - 1.0)[:, None] * 8.0 * W[None]
    found = seen / sign[None]  # the mean of s, the same in every feature
    np.testing.assert_allclose(found, jnp.broadcast_to(found[..., :1], found.shape), rtol=1e-5)
    s = np.asarray(found[..., 0], np.float64)
    sigma = (1 / 12 / samples) ** 0.5
    assert abs(s.mean() - 1.0) < 4 * sigma / s.size**0.5
    np.testing.assert_allclose(s.std(), sigma, rtol=0.1)  # and the draws are independent,
    correlations = np.corrcoef(s) - np.eye(3)
    assert np.abs(correlations).max() < 4 / n**0.5  # from one step to the next too


def test_estimators_compare_values_of_the_same_draws():
    """Differences of a linear loss are exact then; fresh noise in each value would swamp them."""
    model = models.randomized(scaled, KEY, samples=3, votes=2)
    estimator = zeroth_order.CGE(0.1)
    autodiff = Probe(Linf(EPS))
    values = Probe(Linf(EPS), estimator=estimator)
    state = autodiff.init(keys.examples(KEY, jnp.arange(8)), X, Y)
    expected = jax.jit(autodiff.step)(model, state)
    found = jax.jit(values.step)(model, state)
    np.testing.assert_allclose(found.inner, expected.inner, rtol=1e-3, atol=1e-3)
    assert (found.record.forwards == 3 * estimator.queries(X[0]) + 2).all()


def test_draws_belong_to_the_example():
    """Neither order nor batch nor the state's rows change what an example sees."""
    model = models.randomized(scaled, KEY, samples=3, votes=2)
    probe = Probe(Linf(EPS))
    own = keys.examples(KEY, jnp.arange(8))
    step = jax.jit(lambda state: probe.step(model, state))
    whole = step(step(probe.init(own, X, Y)))
    order = jnp.array([5, 2, 7, 0, 1, 3, 6, 4])
    moved = step(step(probe.init(own[order], X[order], Y[order])))
    np.testing.assert_array_equal(moved.inner, whole.inner[order])
    few = step(step(probe.init(own[:3], X[:3], Y[:3])))
    np.testing.assert_allclose(few.inner, whole.inner[:3], rtol=1e-6)
    # In and out of a batch the logits of a fixed draw are the same.
    drawn = model.at(own)(X)
    np.testing.assert_allclose(model.at(own[2:3])(X[2:3]), drawn[2:3], rtol=1e-6)
    np.testing.assert_allclose(drawn, scale(own)[:, None] * logits(X), rtol=1e-6)
    assert len(np.unique(np.round(scale(own), 6))) == 8


def test_expectation_over_transformation_beats_a_fixed_draw():
    """Half of the features, moved as far as the ball allows, do not outweigh the rest; all do."""
    model = models.randomized(masked, jax.random.key(2), samples=8, votes=64)
    attack = attacks.PGD(Linf(EPS), steps=6, rel_step_size=1.0, random_start=False)
    found = jrobust.run(attack, KEY, model, X, Y)
    assert found.success.all()
    own = keys.examples(KEY, jnp.arange(8))
    fixed = jrobust.run(attack, KEY, model.at(own), X, Y)
    assert fixed.success.all(), "on the draw that it saw"
    verdict = model(fixed.x).argmax(-1) != Y
    assert verdict.mean() <= 0.25
    # And under draws that neither has seen.
    fresh = model.at(keys.examples(jax.random.key(9), jnp.arange(8)))
    assert (fresh(found.x).argmax(-1) != Y).mean() == 1.0
    assert (fresh(fixed.x).argmax(-1) != Y).mean() <= 0.5
    np.testing.assert_array_equal(fixed.x, jrobust.run(attack, KEY, model.at(own), X, Y).x)


def test_a_lucky_draw_is_no_success():
    """A coin that is wrong in three of ten throws is right by majority, however often asked."""

    def coin(keys, x):
        wrong = jax.vmap(lambda key: jax.random.bernoulli(key, 0.3))(keys)
        right = jnp.where(wrong, -1.0, 1.0)[:, None] * (1.0 + 0.0 * x.sum(-1, keepdims=True))
        return jnp.concatenate([right, -right], -1)

    model = models.randomized(coin, KEY, samples=1, votes=100)
    y = jnp.zeros(8, jnp.int32)
    found = jrobust.run(attacks.PGD(Linf(EPS), steps=20), KEY, model, X, y)
    assert not found.success.any()
    n = 2000
    fresh = model.at(keys.examples(jax.random.key(3), jnp.arange(n)))
    wrong = float((fresh(jnp.resize(X, (n, D))).argmax(-1) != 0).mean())
    assert abs(wrong - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


def test_the_verdict_is_the_mean_probability_over_fixed_draws():
    model = models.randomized(scaled, KEY, votes=3)
    p = 0.0
    for i in range(3):
        s = scale(jax.random.fold_in(KEY, i)[None])[0]
        p = p + np.asarray(jax.nn.softmax(s * logits(X)), np.float64) / 3
    np.testing.assert_allclose(model(X), np.log(p), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model(X), model(X))
    np.testing.assert_allclose(model(X[3:4]), model(X)[3:4], rtol=1e-5, atol=1e-6)


def test_reproducible_and_compiled_once():
    traces = []

    def affine(bias, keys, x):
        traces.append(1)
        return scaled(keys, x) + bias[None]

    attack = attacks.PGD(Linf(EPS), steps=3, rel_step_size=0.3, keep="loss")

    def run(bias, key, own=KEY):
        fn = jax.tree_util.Partial(affine, jnp.array(bias))
        model = models.randomized(fn, own, samples=2, votes=3)
        return jrobust.run(attack, key, model, X, Y)

    first = run([0.0, 0.0], KEY)
    traces.clear()
    jax.tree.map(np.testing.assert_array_equal, run([0.0, 0.0], KEY), first)
    other = run([0.0, 0.0], jax.random.key(5))
    assert (other.x != first.x).any()
    assert run([50.0, -50.0], KEY, jax.random.key(6)).success.any()
    assert traces == []
    # Passes through the model: each of 4 evaluations takes 2 draws and 3 votes.
    assert (first.forwards == 4 * 5).all()
    assert (first.backwards == 3 * 2).all()


def test_draws_that_are_not_finite_are_not_robust():
    def sometimes(keys, x):
        bad = jax.vmap(lambda key: jax.random.bernoulli(key, 0.2))(keys)
        # One infinite logit, which a softmax would hide.
        return logits(x).at[:, 0].set(jnp.where(bad, -jnp.inf, logits(x)[:, 0]))

    model = models.randomized(sometimes, KEY, votes=40)
    assert jnp.isnan(model(X)).all()
    assert jrobust.run(attacks.FGSM(Linf(0.001)), KEY, model, X, Y).success.all()


def test_in_a_loop():
    """Clean accuracy, attack and the separate verification rest on the same deterministic model."""
    model = models.randomized(masked, jax.random.key(2), samples=4, votes=16)
    examples = data.Dataset(np.asarray(X), np.asarray(Y))
    attack = attacks.PGD(Linf(EPS), steps=4, rel_step_size=1.0, random_start=False)
    report = loops.evaluate(
        KEY, model, examples, attack, batch_size=8, progress=False, checks=False
    )
    assert (report.clean_accuracy, report.robust_accuracy, report.near_ties) == (1.0, 0.0, 0)


def test_a_network_with_its_dropout_left_on():
    class Net(nnx.Module):
        def __init__(self, *, rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(D, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(x))

    network = models.network(Net)

    def dropping(variables, keys, x):
        def row(key, x):
            return network.train_logits(*variables, key, x[None])[0][0]

        return jax.vmap(row)(keys, x)

    variables = network.init(KEY, X)
    model = models.randomized(jax.tree_util.Partial(dropping, variables), KEY, votes=4)
    draws = model.draws(keys.examples(KEY, Y), jnp.ones_like(X))
    assert draws.shape == (10, 8, 2)
    same = keys.examples(KEY, jnp.zeros(8, jnp.int32))
    alone = model.at(same)(X[:1].repeat(8, 0))
    np.testing.assert_allclose(alone, alone[:1].repeat(8, 0), rtol=1e-6)
    assert jnp.std(draws, 0).min() > 0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: models.randomized(3, KEY), TypeError, "fn must be a function of .keys, x."),
        (lambda: models.randomized(masked, 3), TypeError, "typed PRNG key"),
        (lambda: models.randomized(masked, KEY, samples=0), ValueError, "samples must be a pos"),
        (lambda: models.randomized(masked, KEY, votes=1.5), ValueError, "votes must be a pos"),
        (
            lambda: models.randomized(masked, KEY).at(keys.examples(KEY, jnp.arange(3)))(X),
            ValueError,
            r"keys must be typed keys of shape \(8,\)",
        ),
        (
            lambda: models.randomized(masked, KEY).draws(jnp.arange(8), X),
            ValueError,
            "got int32 of shape",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
