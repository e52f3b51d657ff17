"""Reading a model before an attack: every planted defect is found, in clean models nothing is."""

import inspect as source
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jrobust
from jrobust import attacks, drive, ensembles, losses, models
from jrobust.models import bpda, straight_through
from jrobust.threat import Linf

KEY = jax.random.key(0)
B, D, C = 4, 12, 5
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(D, C)), jnp.float32)
X = jnp.asarray(RNG.uniform(size=(B, D)), jnp.float32)


def linear(x):
    return x @ W


def of(fn, x=X):
    """Everything found in ``linear`` of ``fn``, as (kind, severity)."""
    found = jrobust.inspect(lambda x: linear(fn(x)), x).findings
    return [(finding.kind, finding.severity) for finding in found]


def quantised(x):
    return jnp.round(x * 7) / 7


CUT, PART = ("gradient cut", "error"), ("part of the gradient cut", "warning")
STRAIGHT = ("straight-through", "info")

# ------------------------------------------------------------------------------- clean networks


def untrained(module, shape):
    """A bound network of zeros: reading needs no weights."""
    network = models.network(module)
    shapes = jax.eval_shape(network.init, KEY, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return network, network.bind(*zeros)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (models.SmallCNN(norm=True, dropout=0.5), (8, 8, 1)),
        (models.LeNet(), (28, 28, 1)),
        (models.ResNet(20), (32, 32, 3)),
        (models.PreActResNet18(), (32, 32, 3)),
        (models.ViT(10, 16, 4, width=8, depth=2, heads=2), (16, 16, 3)),
    ],
    ids=["SmallCNN", "LeNet", "ResNet", "PreActResNet18", "ViT"],
)
def test_nothing_is_found_in_a_clean_network(module, shape):
    _, model = untrained(module, shape)
    found = jrobust.inspect(model, np.zeros((3, *shape), np.float32))
    assert found.findings == ()
    assert found.evaluated == ()
    assert (found.ok, found.classes) == (True, 10)
    assert str(found) == "10 classes; nothing found"


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(D, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, C, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.norm(self.first(x))))


@pytest.mark.parametrize(
    "model",
    [
        linear,
        models.bind(Normed(nnx.Rngs(0))),
        lambda x: jax.vmap(lambda row: jax.nn.log_softmax(row @ W))(x),
        lambda x: lax.map(lambda row: row @ W, x),
        lambda x: lax.fori_loop(0, 3, lambda i, h: h + 0.1 * jnp.sin(h), x) @ W,
        lambda x: linear(jnp.tanh(x.reshape(-1, 3)).reshape(B, D)),
        lambda x: linear(jnp.stack([x[:, ::2], x[:, 1::2]], 0).swapaxes(0, 1).reshape(B, D)),
        lambda x: linear(jnp.take_along_axis(x, jnp.argsort(x, -1), -1)),
        lambda x: linear(x - jnp.median(x, 1, keepdims=True)) - jax.nn.logsumexp(x, -1)[:, None],
        lambda x: linear(jnp.where(x > 0.5, 2 * x, x) + lax.top_k(x, 1)[0]),
        lambda x: linear(jnp.abs(x - 0.5)),
        ensembles.ensemble([linear, lambda x: 2 * linear(x)]),
        ensembles.ensemble(
            [untrained(models.MLP((3,), C), (D,))[1]] * 2, combine=ensembles.mean_probabilities
        ),
    ],
)
def test_nothing_is_found_in_clean_functions(model):
    found = jrobust.inspect(model, X)
    assert found.findings == (), str(found)


# ----------------------------------------------------------------------------------------- rows


def test_batch_norm_in_training_mode_is_named():
    network = models.network(models.SmallCNN((2,), C, hidden=3, norm=True))
    params, extra = jax.jit(network.init)(KEY, X[:1].reshape(1, 3, 4, 1))
    x = X.reshape(B, 3, 4, 1)
    assert jrobust.inspect(network.bind(params, extra), x).ok
    found = jrobust.inspect(lambda x: network.train_logits(params, extra, KEY, x)[0], x)
    assert {(f.kind, f.severity) for f in found.findings} == {("batch statistics", "error")}
    assert all(f.where.layer.endswith("norm1") for f in found.findings)
    assert found.findings[0].where.primitive == "reduce_sum"
    assert found.evaluated == ("rows",)
    assert "use_running_average=True" in str(found)


@pytest.mark.parametrize(
    ("mix", "kind"),
    [
        (lambda x: jnp.cumsum(x, 0), "rows"),
        (lambda x: jnp.sort(x, 0), "rows"),
        (lambda x: jax.nn.softmax(x @ x.T, -1) @ x, "rows"),
        (lambda x: x - jnp.max(x, keepdims=True), "rows"),
        (lambda x: x / jnp.linalg.norm(x, axis=0, keepdims=True), "batch statistics"),
        (lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros(D), x)[1], "rows"),
        (
            lambda x: jnp.tanh(x.reshape(-1, 3) - x.reshape(-1, 3).mean(0, keepdims=True)).reshape(
                B, D
            ),
            None,
        ),
        (lambda x: x[:, None].reshape(1, B, D, 1)[0, :, :, 0] + jnp.roll(x, 1, 0), None),
        (
            lambda x: lax.conv_general_dilated(
                x[None, :, :],
                jnp.ones((3, D, D)),
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )[0],
            "rows",
        ),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"), "rows"),
    ],
)
def test_rows_that_meet_are_found(mix, kind):
    found = of(mix)
    assert all(severity == "error" for _, severity in found)
    assert found
    if kind:
        assert (kind, "error") in found


def test_what_is_only_feared_is_put_to_the_model():
    """Rows that an operation could not follow, and rows that meet without a consequence."""
    chunks = jrobust.inspect(lambda x: lax.map(linear_of_row, x, batch_size=2), X)
    assert [(f.kind, f.severity) for f in chunks.findings] == [("rows not followed", "info")]
    assert chunks.evaluated == ("rows",)
    assert chunks.ok
    harmless = of(lambda x: jnp.where(jnp.all(x > -9), x, 0))
    assert harmless == [("rows", "warning")]
    assert of(lambda x: x + 0.01 * x[::-1]) == [("rows not followed", "error")]


def linear_of_row(row):
    return row @ W


def test_one_input_is_enough():
    assert jrobust.inspect(linear, X[:1]).ok
    assert not jrobust.inspect(lambda x: linear(x - x.mean(0, keepdims=True)), X[:1]).ok


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    ("cut", "primitive"),
    [
        (quantised, "round"),
        (lambda x: jnp.floor(8 * x), "floor"),
        (lambda x: jnp.ceil(8 * x), "ceil"),
        (lambda x: jnp.sign(x - 0.5), "sign"),
        (lambda x: (x > 0.5).astype(jnp.float32), "gt"),
        (lambda x: jnp.where(x > 0.5, 1.0, 0.0), "gt"),
        (lambda x: jnp.where(jnp.isnan(x), x, jnp.floor(8 * x)), "floor"),
        (lambda x: x - x % 0.125, "sub"),
        (lambda x: x - lax.rem(x, jnp.full_like(x, 0.125)), "sub"),
        (lambda x: (255 * x).astype(jnp.uint8) / 255.0, "convert_element_type"),
        (lambda x: lax.stop_gradient(x), "stop_gradient"),
        (lambda x: jax.nn.one_hot(jnp.argmax(x, -1), D), "argmax"),
        (lambda x: W.T[jnp.argmin(x[:, :C], -1)], "argmin"),
        (lambda x: jax.jit(jax.checkpoint(jnp.round))(x), "round"),
        (lambda x: lax.scan(lambda c, _: (jnp.floor(9 * c), None), x, None, length=2)[0], "floor"),
    ],
)
def test_a_cut_gradient_is_found_where_it_is_cut(cut, primitive):
    for fn in (cut, lambda x: jax.nn.relu(cut(x))):
        found = jrobust.inspect(lambda x, fn=fn: linear(fn(x)), X)
        (finding,) = found.findings
        assert (finding.kind, finding.severity) == CUT
        assert finding.where.primitive == primitive
        assert f"{__file__}:" in finding.where.source
        assert not found.ok
        gradient = jax.grad(lambda x, fn=fn: jnp.sum(linear(fn(x)) ** 2))(X)
        assert not np.any(gradient), "what was said is true"
        # With another path around it, there is a gradient, but not of everything.
        assert of(lambda x, fn=fn: x + fn(x)) == [PART]


def test_the_line_and_the_layer_are_named():
    def defended(x):
        with jax.named_scope("defence"):
            x = jnp.round(x * 7) / 7
        return linear(x)

    (finding,) = jrobust.inspect(defended, X).findings
    lines, first = source.getsourcelines(defended)
    line = first + next(i for i, text in enumerate(lines) if "jnp.round" in text)
    assert finding.where.layer == "defence"
    assert f"{__file__}:{line}:" in finding.where.source
    assert "[round in defence, " in str(finding)
    assert "straight_through" in finding.remedy


def test_every_layer_of_a_line_is_counted():
    def twice(x):
        for i in range(3):
            with jax.named_scope(f"layer{i}"):
                x = x + quantised(x)
        return linear(x)

    (finding,) = jrobust.inspect(twice, X).findings
    assert (finding.count, finding.kind, finding.where.layer) == (3, PART[0], "layer0")
    assert "(in 3 layers)" in str(finding)


def rule(slope):
    """Twice x, whose derivative is said to be `slope`."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (slope(g),))
    return double


@pytest.mark.parametrize(
    ("double", "want"),
    [
        (rule(lambda g: 2 * g), []),
        (rule(jnp.zeros_like), [CUT]),
        (rule(lambda g: 0 * g), [CUT]),
        (rule(lambda g: -g), [("custom gradient", "warning")]),
        (bpda(quantised), [STRAIGHT]),
        (bpda(quantised, jnp.floor), [CUT]),
        (lambda x: x + lax.stop_gradient(quantised(x) - x), [STRAIGHT]),
        (lambda x: quantised(x) + x - lax.stop_gradient(x), [STRAIGHT]),
        (lambda x: x * lax.stop_gradient(x), [PART]),
        (lambda x: x - lax.stop_gradient(x.max(-1, keepdims=True)), [PART]),
    ],
)
def test_gradients_given_by_an_author(double, want):
    assert of(double) == want
    assert of(lambda x: jax.nn.relu(double(x))) == want, "what comes later hides nothing"


def test_a_mixture_of_experts_with_a_straight_through_gate_is_no_cut():
    def gated(x):
        scores = x @ W[:, :2]
        chosen = jax.nn.one_hot(scores.argmax(-1), 2)
        gate = chosen + scores - lax.stop_gradient(scores)
        return jnp.concatenate([x, x], 1) * jnp.repeat(gate, D, 1) @ jnp.concatenate([W, -W])

    found = jrobust.inspect(gated, X)
    assert [(f.kind, f.severity) for f in found.findings] == [STRAIGHT]


def test_what_cannot_be_differentiated_is_found():
    def search(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 1.1 * c[1]), (0, x))[1]

    def host(x):
        return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    assert of(search) == [("no derivative", "error")]
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(lambda x: jnp.sum(search(x)))(X)
    assert of(bpda(search)) == [STRAIGHT]
    assert ("no derivative", "error") in of(host)
    voting = ensembles.ensemble([linear, lambda x: 2 * linear(x)], combine=ensembles.vote)
    (finding,) = jrobust.inspect(voting, X).of("no derivative")
    assert "a vote has no useful gradient" in finding.what


# --------------------------------------------------------------------------- chance, precision


def test_frozen_noise_is_found_and_declared_noise_is_not():
    shared = of(lambda x: x + jax.random.normal(KEY, (1, D)))
    assert shared == [("randomness", "warning")]
    placed = of(lambda x: x + jax.random.normal(KEY, x.shape))
    assert placed == [("rows", "error"), ("randomness", "warning")], "noise depends on the position"

    def noisy(keys, x):
        return linear(x + jax.vmap(lambda k: jax.random.normal(k, (D,)))(keys))

    found = jrobust.inspect(models.randomized(noisy, KEY), X)
    assert [(f.kind, f.severity) for f in found.findings] == [("randomness", "info")]
    frozen = models.randomized(lambda keys, x: noisy(keys, x + jax.random.normal(KEY, (1, D))), KEY)
    assert not jrobust.inspect(frozen, X).ok
    none = jrobust.inspect(models.randomized(lambda keys, x: linear(x), KEY), X)
    assert [(f.kind, f.severity) for f in none.findings] == [("randomness", "warning")]
    cut = models.randomized(lambda keys, x: noisy(keys, quantised(x)), KEY)
    assert jrobust.inspect(cut, X).of("gradient cut")
    assert jrobust.inspect(straight_through(cut), X).ok


def test_dropout_left_on_is_frozen_noise():
    network = models.network(models.SmallCNN((2,), C, hidden=3, dropout=0.5))
    x = X.reshape(B, 3, 4, 1)
    params, extra = jax.eval_shape(network.init, KEY, x)
    params = jax.tree.map(lambda a: jnp.ones(a.shape), params)
    found = jrobust.inspect(lambda x: network.train_logits(params, extra, KEY, x)[0], x)
    assert "random numbers from a constant key" in [f.what for f in found.findings]


def test_half_precision_is_found():
    network, model = untrained(models.SmallCNN((2,), C, hidden=3), (3, 4, 1))
    half = network.bind(model.params, model.extra, dtype=jnp.bfloat16)
    (finding,) = jrobust.inspect(half, X.reshape(B, 3, 4, 1)).findings
    assert (finding.kind, finding.severity) == ("half precision", "warning")
    assert "bfloat16" in finding.what
    assert of(lambda x: lax.reduce_precision(x, 8, 7)) == [("half precision", "warning")]
    assert of(lambda x: x.astype(jnp.float16).astype(jnp.float32))[0][0] == "half precision"


def test_optimisation_at_inference_is_found():
    purified = of(lambda x: x - 0.1 * jax.grad(lambda z: jnp.sum(jnp.tanh(z) ** 2))(x))
    assert purified == [("optimisation", "warning")]


# --------------------------------------------------------------------------------- the outputs


def test_outputs_that_are_no_logits():
    def kinds(fn, x=X):
        return [(f.kind, f.severity) for f in jrobust.inspect(fn, x).findings]

    probabilities = [("probabilities", "warning")]
    assert kinds(lambda x: jax.nn.softmax(linear(x))) == probabilities
    assert (
        kinds(lambda x: jax.nn.softmax(jnp.stack([linear(x), x @ W]), -1).mean(0)) == probabilities
    )
    assert kinds(lambda x: jax.nn.log_softmax(linear(x))) == []
    assert kinds(lambda x: jax.nn.softmax(linear(x)) * 3) == []
    found = kinds(lambda x: jax.nn.one_hot(jnp.argmax(linear(x), -1), C))
    assert found == [CUT, ("one-hot", "error")]
    steep = ("steep", "info")
    assert kinds(lambda x: jax.nn.sigmoid(50 * linear(x))) == [("saturation", "warning"), steep]
    assert kinds(lambda x: 5 * jnp.tanh(0.1 * linear(x))) == [("saturation", "info")]
    # Of two logits and one input, some are the lowest and the highest.
    assert jrobust.inspect(lambda x: jnp.tanh(linear(x)[:, :2]), X[:1]).ok
    assert of(lambda x: jnp.tanh(x / 0.01)) == [steep]
    assert of(lambda x: jax.nn.relu(jnp.clip(x, 0, 1))) == [("clip", "info")]


def test_few_classes():
    for classes, uses in ((2, "dlr_or_margin)"), (3, "targeted APGD ascends z_t - z_y")):
        (finding,) = jrobust.inspect(lambda x, n=classes: x @ W[:, :n], X).findings
        assert (finding.kind, finding.severity) == ("few classes", "info")
        assert uses in finding.effect
    assert jrobust.inspect(lambda x: x @ W[:, :4], X).findings == ()


def test_logits_that_ignore_the_input():
    (finding,) = jrobust.inspect(lambda x: jnp.zeros((len(x), C)), X).findings
    assert (finding.kind, finding.severity, finding.where) == (*CUT, None)


def test_what_cannot_be_inspected():
    with pytest.raises(TypeError, match="Host model"):
        jrobust.inspect(drive.Host(np.asarray), X)
    with pytest.raises(TypeError, match="floating point inputs"):
        jrobust.inspect(linear, np.zeros((2, D), np.uint8))
    with pytest.raises(ValueError, match="at least one input"):
        jrobust.inspect(linear, X[:0])
    with pytest.raises(ValueError, match="logits of shape"):
        jrobust.inspect(lambda x: x[:, 0], X)
    with pytest.raises(TypeError, match="must be callable"):
        jrobust.inspect(3, X)


# ---------------------------------------------------------------------- straight-through, BPDA


def slope(fn, x=X):
    return jax.grad(lambda x: jnp.sum(fn(x) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)))(x)


ONE = np.cos(np.arange(B * D)).reshape(B, D)  # the slope of the identity


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (quantised, ONE),
        (lambda x: jnp.floor(4 * x), 4 * ONE),
        (lambda x: jnp.ceil(4 * x), 4 * ONE),
        (lambda x: jnp.sign(x - 0.5), ONE),
        (lambda x: (255 * x).astype(jnp.uint8).astype(jnp.float32) / 255, ONE),
        (lambda x: (255 * x).astype(jnp.int32).reshape(-1).reshape(x.shape) / 255.0, ONE),
        (lambda x: (x > 0.5).astype(jnp.float32), ONE),
        (lambda x: (x <= 0.5).astype(jnp.float32), -ONE),
        (lambda x: lax.stop_gradient(x), ONE),
        (lambda x: lax.scan(lambda c, _: (jnp.round(3 * c) / 3, None), x, None, length=2)[0], ONE),
        (lambda x: lax.cond(x.sum() > 0, jnp.floor, jnp.ceil, x), ONE),
        (lambda x: jax.jit(jax.checkpoint(jnp.round))(x), ONE),
        (jax.vmap(jnp.round), ONE),
        # Gradients that exist are left alone.
        (lambda x: 3 * x + lax.stop_gradient(jnp.round(x) - 3 * x), 3 * ONE),
        (lambda x: jnp.round(x) + (3 * x - lax.stop_gradient(3 * x)), ONE * 4),
        (lambda x: jnp.minimum(2 * x, 5.0), 2 * ONE),
        (bpda(quantised, lambda x: 7 * x), 7 * ONE),
    ],
)
def test_values_stay_and_gradients_pass(fn, want):
    surrogate = straight_through(fn)
    for wrap in (lambda f: f, jax.jit, lambda f: jax.vmap(lambda row: f(row[None])[0])):
        if wrap is jax.jit or fn(X[:1]).shape == (1, D):
            np.testing.assert_array_equal(wrap(surrogate)(X), wrap(fn)(X))
    with jax.disable_jit():
        np.testing.assert_array_equal(surrogate(X), fn(X))
    for g in (slope, jax.jit(slope, static_argnums=0)):
        np.testing.assert_allclose(g(surrogate), want, rtol=1e-5, atol=1e-6)
    forward = jax.jvp(surrogate, (X,), (jnp.ones_like(X),))[1]
    np.testing.assert_allclose(jnp.sum(forward * ONE), jnp.sum(slope(surrogate)), rtol=1e-4)


@pytest.mark.parametrize("fn", [jax.nn.softmax, jax.nn.log_softmax, jax.nn.gelu])
def test_the_gradient_of_a_differentiable_function_does_not_change(fn):
    np.testing.assert_allclose(slope(straight_through(fn)), slope(fn), rtol=1e-4, atol=1e-7)
    jaxpr = str(jax.make_jaxpr(straight_through(fn))(X))
    assert jaxpr.count("stop_gradient") == str(jax.make_jaxpr(fn)(X)).count("stop_gradient")


def test_the_surrogate_is_inspected_in_turn():
    assert of(straight_through(quantised)) == [STRAIGHT]
    assert of(straight_through(lambda x: jax.nn.one_hot(jnp.argmax(x, -1), D))) == [CUT]


class Quantised(nn.Module):
    """A linear model of inputs in 8 grey levels."""

    @nn.compact
    def __call__(self, x):
        TRACES.append(x.shape)
        return nn.Dense(3, use_bias=False)(jnp.round(x * 7) / 7)


TRACES = []


def test_a_quantised_input_stops_pgd_and_the_surrogate_breaks_it():
    """Against the worst case, which the corner of the ball attains: known in closed form."""
    n, eps = 24, 0.1
    w = np.float32(RNG.normal(size=(D, 3)))
    x = np.float32(RNG.uniform(0, 1, (n, D)))
    network = models.network(Quantised())
    model = network.bind({"Dense_0": {"kernel": jnp.asarray(w)}}, {})
    y = np.asarray(model(x)).argmax(1)

    def level(x):
        return np.round(np.clip(x, 0, 1) * np.float32(7)) / 7

    gap = w.T[:, None] - w.T[None]  # (3, 3, D): gap[j, y]
    low, high = level(x - np.float32(eps)), level(x + np.float32(eps))
    worst = np.maximum(
        low[:, None] * gap[:, y].swapaxes(0, 1), high[:, None] * gap[:, y].swapaxes(0, 1)
    )
    worst = worst.sum(-1)
    worst[np.arange(n), y] = -np.inf
    breakable = worst.max(1) > 1e-6
    assert 0.2 < breakable.mean() < 0.95

    attack = attacks.PGD(Linf(eps), steps=4, step_size=eps, random_start=False, loss=losses.margin)
    masked = jrobust.run(attack, KEY, model, x, y)
    assert not masked.success.any(), "reported as robust"
    assert jrobust.inspect(model, x).of("gradient cut"), "but not without a warning"

    search = straight_through(model)
    TRACES.clear()
    found = jrobust.run(attack, KEY, search, x, y)
    traces = len(TRACES)
    assert found.success.sum() >= 0.9 * breakable.sum()
    assert not np.any(np.asarray(found.success) & ~breakable)
    wrong = np.asarray(model(found.x)).argmax(1) != y
    np.testing.assert_array_equal(wrong, found.success)

    # Parameters are arguments: others compile nothing new.
    other = straight_through(network.bind({"Dense_0": {"kernel": -jnp.asarray(w)}}, {}))
    TRACES.clear()
    again = jrobust.run(attack, KEY, other, x, y)
    assert len(TRACES) < traces
    assert again.success.sum() >= found.success.sum(), "all are misclassified from the start"
    count = jax.tree.structure(search)
    assert count == jax.tree.structure(other)
    assert [leaf.shape for leaf in jax.tree.leaves(search)] == [(D, 3)]


def test_a_purifier_of_the_user():
    """A loop without reverse mode: its gradient is that of what stands in for it."""
    calls = []

    def purify(x):
        calls.append(x.shape)
        shrunk = lax.while_loop(lambda h: jnp.any(h > 0.5), lambda h: 0.9 * h, x)
        return jnp.round(shrunk * 7) / 7

    model = bpda(purify, lambda x: 0.5 * x)
    np.testing.assert_array_equal(model(X), purify(X))
    np.testing.assert_array_equal(jax.jit(model)(X), jax.jit(purify)(X))
    np.testing.assert_allclose(slope(model), 0.5 * ONE, rtol=1e-6)
    np.testing.assert_allclose(slope(bpda(purify)), ONE, rtol=1e-6)
    found = jrobust.run(
        attacks.FGSM(Linf(0.3)), KEY, lambda x: linear(model(x)), X, np.asarray(linear(X)).argmax(1)
    )
    assert np.all(found.distance > 0)


def test_what_can_have_no_surrogate():
    with pytest.raises(TypeError, match="Host model"):
        straight_through(drive.Host(np.asarray))
    with pytest.raises(TypeError, match="callable"):
        straight_through(W)
    with pytest.raises(TypeError, match="backward must be a function"):
        bpda(quantised, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        bpda(quantised, linear)(X)


def test_the_page_runs(capsys):
    page = pathlib.Path(__file__).parents[1] / "docs" / "inspect.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
    printed = capsys.readouterr().out
    for line in re.findall(r"```text\n(.*?)```", page.read_text(), re.S)[0].splitlines():
        assert line in printed
