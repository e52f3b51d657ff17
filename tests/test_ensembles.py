"""Ensembles: closed forms on linear models, symmetries, and transfer against attacks one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import jrobust
from jrobust import algorithm, ensembles, loops, losses, models, parallel
from jrobust.attacks import FGSM, PGD
from jrobust.data import Dataset
from jrobust.threat import L2, Linf

RNG = np.random.default_rng(0)
M, B, D, C = 3, 16, 6, 4


@algorithm
class Linear:
    """Counts its traces."""

    weights: jax.Array  # (D, C)
    bias: jax.Array  # (1, C)

    def __call__(self, x):
        Linear.traces += 1
        return (x - 0.5) @ self.weights + self.bias


Linear.traces = 0


def linear(scale=1.0):
    w, b = RNG.normal(size=(D, C)), 0.1 * RNG.normal(size=(1, C))
    return Linear(jnp.asarray(scale * w, jnp.float32), jnp.asarray(b, jnp.float32))


MODELS = [linear() for _ in range(M)]
X = np.float32(RNG.uniform(0.1, 0.9, (B, D)))
SHARES = np.float32([1, 2, 5])
COMBINES = [
    ensembles.mean_logits,
    ensembles.mean_probabilities,
    ensembles.mean_log_probabilities,
    ensembles.vote,
]


def z(model, x=X):
    """Logits in float64."""
    return (np.float64(x) - 0.5) @ np.float64(model.weights) + np.float64(model.bias)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


# ----------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
def test_linear_models_and_their_mean_are_one_model(apart, key):
    together = ensembles.ensemble(MODELS, SHARES)
    if apart:
        together = ensembles.Ensemble(tuple(MODELS), jnp.asarray(SHARES))
    mean = jax.tree.map(
        lambda *leaves: sum(s * leaf for s, leaf in zip(SHARES, leaves)) / SHARES.sum(), *MODELS
    )
    close(together(X), mean(X))
    close(together.members(X), np.stack([z(model) for model in MODELS]))
    y = np.asarray(mean(X)).argmax(1)
    attack = FGSM(Linf(0.1), loss=losses.margin) if apart else PGD(L2(0.4), steps=5)
    ours, theirs = (jrobust.run(attack, key, m, X, y) for m in (together, mean))
    assert 0 < np.mean(ours.success) < 1
    np.testing.assert_array_equal(ours.success, theirs.success)
    close(ours.x, theirs.x, atol=1e-4)


def test_combinations_are_those_of_float64():
    members = np.stack([z(model) for model in MODELS])
    share = (SHARES / SHARES.sum())[:, None, None]
    p = special.softmax(members, axis=-1)
    want = [
        (share * members).sum(0),
        np.log((share * p).sum(0)),
        (share * np.log(p)).sum(0),
        (share * np.eye(C)[members.argmax(-1)]).sum(0),
    ]
    for combine, expected in zip(COMBINES, want):
        close(ensembles.ensemble(MODELS, SHARES, combine=combine)(X), expected)


@pytest.mark.parametrize("combine", COMBINES, ids=lambda c: c.__name__)
def test_symmetries(combine):
    make = functools.partial(ensembles.ensemble, combine=combine)
    alone = [make([model])(X) for model in MODELS]
    # One model is itself, up to a shift of all logits or its verdict.
    reference = MODELS[1](X)
    if combine is ensembles.vote:
        reference = jax.nn.one_hot(reference.argmax(-1), C)
    elif combine is not ensembles.mean_logits:
        reference = jax.nn.log_softmax(reference)
    close(alone[1], reference)
    # So are equal members, whatever the weights, and the one member that has a weight.
    close(make([MODELS[1]] * 4, [1, 2, 3, 4])(X), alone[1])
    for i in range(M):
        close(make(MODELS, np.eye(M)[i] * 7)(X), alone[i])
    order = [2, 0, 1]
    close(make([MODELS[i] for i in order], SHARES[order])(X), make(MODELS, SHARES)(X))
    close(make(MODELS, SHARES)(X), make(MODELS, 10 * SHARES)(X))
    assert np.abs(make(MODELS, SHARES)(X) - make(MODELS)(X)).max() > 0.1


def test_averaged_losses_are_one_loss(key):
    """`mean_log_probabilities` with the negative logit is the mean of the cross entropies."""
    y = jnp.arange(B) % C
    fused = ensembles.ensemble(MODELS, SHARES, combine=ensembles.mean_log_probabilities)

    def nll(logits, y):
        return -logits[jnp.arange(len(y)), y]

    def of(model):
        return jax.grad(lambda x: losses.cross_entropy(model(x), y).sum())(jnp.asarray(X))

    each = fused.each(of)
    assert each.shape == (M, B, D)
    for gradient, model in zip(each, MODELS):
        p = special.softmax(z(model), axis=-1) - np.eye(C)[np.asarray(y)]
        close(gradient, p @ np.float64(model.weights).T)
    mean = jnp.tensordot(jnp.asarray(SHARES / SHARES.sum()), each, 1)
    got = jax.grad(lambda x: nll(fused(x), y).sum())(jnp.asarray(X))
    close(got, mean)
    other = ensembles.ensemble(MODELS, SHARES)
    assert (
        np.abs(jax.grad(lambda x: losses.cross_entropy(other(x), y).sum())(X) - mean).max() > 0.01
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(value):
    bad = Linear(MODELS[0].weights, MODELS[0].bias.at[0, 1].set(value))
    for combine in COMBINES:
        out = ensembles.ensemble([MODELS[1], bad], combine=combine)(X)
        assert not np.isfinite(out).all(axis=1).any(), combine.__name__


def test_a_vote_has_no_gradient_and_says_so(key):
    voting = ensembles.ensemble(MODELS, combine=ensembles.vote)
    y = np.asarray(voting(X)).argmax(1)
    with pytest.raises(TypeError, match="judge"):
        jrobust.run(PGD(Linf(0.1)), key, voting, X, y)
    # As the judge of a search on the probabilities it decides.
    search = ensembles.ensemble(MODELS, combine=ensembles.mean_probabilities)
    attack = PGD(Linf(0.15), steps=5)
    state = attack.init(jrobust.keys.examples(key, jnp.arange(B)), jnp.asarray(X), jnp.asarray(y))
    found = attack.result(jrobust.drive.run(attack, search, state, voting))
    assert 0 < found.success.mean() < 1
    broken = np.asarray(voting(found.x)).argmax(1) != y
    np.testing.assert_array_equal(broken[found.success], True)


# ----------------------------------------------------------------------------- stacks


def test_stacks_come_apart_again(key):
    trees = [{"a": jnp.full((2, 3), float(i)), "k": jax.random.key(i)} for i in range(4)]
    whole = ensembles.stack(trees)
    assert whole["a"].shape == (4, 2, 3)
    for tree, back in zip(trees, ensembles.unstack(whole)):
        np.testing.assert_array_equal(tree["a"], back["a"])
        assert tree["k"] == back["k"]


def test_a_loop_over_an_ensemble_ends():
    assert [
        np.asarray(model.bias)[0, 0] for _, model in zip(range(M + 1), ensembles.ensemble(MODELS))
    ] == [model.bias[0, 0] for model in MODELS]
    with pytest.raises(IndexError, match=f"of {M} models has no model {M}"):
        ensembles.ensemble(MODELS)[M]


def test_networks_of_one_and_of_several_architectures(key):
    x = jax.random.uniform(key, (5, 6, 6, 1))
    network = models.network(models.SmallCNN(widths=(3, 4), hidden=5, classes=3, norm=True))
    keys = jax.random.split(key, M)
    params, extra = ensembles.draw(network, keys, x)
    init = jax.jit(network.init)
    alone = [network.bind(*init(k, x)) for k in keys]
    for drawn, bound in zip(ensembles.unstack((params, extra)), alone):
        for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves((bound.params, bound.extra))):
            close(a, b)
    call = jax.jit(lambda model: model(x))
    want = np.stack([call(model) for model in alone])
    assert np.abs(want[0] - want[1]).max() > 0.1
    for chunk in (2, 1):
        together = ensembles.ensemble(network.bind(params, extra), chunk=chunk)
        assert len(together) == M
        close(together.members(x), want)
    close(together(x), want.mean(0))
    close(jax.jit(lambda e, i: e[i](x))(together, 1), want[1])

    other = models.network(models.MLP(features=(), classes=3))
    other = other.bind(*other.init(key, x))
    mixed = ensembles.ensemble([together, other, lambda x: x.sum((1, 2)) * jnp.ones((1, 3))])
    assert len(mixed) == 3
    last = np.asarray(x).sum((1, 2)) * np.ones((1, 3))
    close(mixed(x), (want.mean(0) + other(x) + last) / 3)
    close(mixed[1](x), other(x))
    slopes = jax.jit(lambda x: mixed.each(lambda m: jax.grad(lambda x: m(x).sum())(x)))(x)
    assert slopes.shape == (3, *x.shape)
    close(slopes[2], np.full(x.shape, 3.0))


def test_runs_where_models_run(key):
    """One compilation for all parameters and weights; meshes, shard_map, export."""
    together = ensembles.ensemble(MODELS, SHARES)
    y = np.asarray(together(X)).argmax(1)
    attack = PGD(Linf(0.1), steps=3)
    want = jrobust.run(attack, key, together, X, y)
    assert 0 < want.success.mean() < 1
    traces = Linear.traces
    jrobust.run(attack, key, ensembles.ensemble([linear() for _ in range(M)]), X, y)
    ensembles.ensemble([linear() for _ in range(M)], [1, 0, 0])(X)
    assert Linear.traces == traces

    rows = jax.P("data")
    mesh = parallel.mesh()
    sharded = jax.jit(
        jax.shard_map(
            lambda x, y, ids: attack(key, together, x, y, ids=ids).success,
            mesh=mesh,
            in_specs=rows,
            out_specs=rows,
        )
    )(jnp.asarray(X), jnp.asarray(y), jnp.arange(B))
    np.testing.assert_array_equal(sharded, want.success)
    report = loops.evaluate(
        key,
        together,
        Dataset(X, y),
        attack,
        batch_size=B,
        mesh=mesh,
        progress=False,
        checks=False,
    )
    np.testing.assert_array_equal(report.examples["robust"], ~np.asarray(want.success))

    def call(seed, x, y):
        return ensembles.transfer(attack, jax.random.key(seed), MODELS, [together], x, y)

    exported = jax.export.export(jax.jit(lambda *a: tuple(call(*a))), platforms=("cpu", "cuda"))(
        jnp.uint32(0), X, jnp.asarray(y)
    )
    assert exported.out_avals[1].shape == (M, 1, B)


# ----------------------------------------------------------------------------- transfer


@pytest.mark.parametrize("targeted", [pytest.param(False, marks=pytest.mark.full), True])
def test_transfer_is_an_attack_here_and_a_forward_pass_there(targeted, key):
    attack = PGD(Linf(0.12), steps=4, keep="loss")
    y = np.asarray(ensembles.ensemble(MODELS)(X)).argmax(1)
    targets = (y + 1) % C if targeted else None
    ids = np.arange(B) + 5
    sources = [MODELS[0], ensembles.ensemble(MODELS[:2])]  # a model, and an ensemble as a model
    found = ensembles.transfer(attack, key, sources, MODELS, X, y, ids=ids, targets=targets)
    assert found.success.shape == (2, M, B)
    clean = np.stack([z(victim).argmax(1) for victim in MODELS])
    np.testing.assert_array_equal(found.before, clean == targets if targeted else clean != y)
    for source, x, row in zip(sources, found.x, found.success):
        one = jrobust.run(attack, key, source, X, y, ids=ids, targets=targets)
        close(x, one.x)
        for victim, flags in zip(MODELS, row):
            prediction = z(victim, x).argmax(1)
            np.testing.assert_array_equal(
                flags, prediction == targets if targeted else prediction != y
            )
    fair = ~np.asarray(found.before)
    with np.errstate(invalid="ignore"):
        rates = (np.asarray(found.success) & fair).sum(-1) / fair.sum(-1)
    close(found.rates(), rates)
    np.testing.assert_array_equal(  # inside of a program of the user's own
        jax.jit(lambda x: ensembles.transfer(
            attack, key, sources, MODELS, x, y, ids=ids, targets=targets
        ).success)(X),
        found.success,
    )  # fmt: skip


def test_transfer_between_parallel_and_opposite_linear_models(key):
    """A full step on a linear model fools a multiple of it alike, and helps its opposite."""
    w = RNG.normal(size=(D, 1)) * np.ones((1, 2)) * [1, -1]
    base = Linear(jnp.asarray(w, jnp.float32), jnp.zeros((1, 2)))
    twice, opposite = (jax.tree.map(lambda leaf, s=s: s * leaf, base) for s in (2.0, -1.0))
    x = np.clip(X, 0.3, 0.7)
    y, margin = z(base, x).argmax(1), np.abs(z(base, x) @ [1, -1])
    eps = np.float32(1.01 * margin / np.abs(w @ [1, -1]).sum())
    assert eps.max() < 0.3, "the box must not bind"
    found = ensembles.transfer(FGSM(Linf(eps)), key, [base], [base, twice, opposite], x, y)
    np.testing.assert_array_equal(found.success[0], [[True] * B, [True] * B, [False] * B])
    np.testing.assert_array_equal(found.before, [[False] * B, [False] * B, [True] * B])
    rates = np.asarray(found.rates())
    np.testing.assert_array_equal(rates[0, :2], 1)
    assert np.isnan(rates[0, 2])


# ----------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: ensembles.ensemble([]), "at least one"),
        (lambda k: ensembles.ensemble(MODELS[0]), "model axis"),
        (lambda k: ensembles.ensemble(MODELS, [1, 2]), "3 numbers"),
        (lambda k: ensembles.ensemble(MODELS, [1, -1, 3]), "positive sum"),
        (lambda k: ensembles.ensemble(MODELS, [0, 0, 0]), "positive sum"),
        (lambda k: ensembles.ensemble(MODELS, [1, np.nan, 0]), "positive sum"),
        (lambda k: ensembles.ensemble(MODELS, chunk=0), "positive int"),
        (lambda k: ensembles.stack([]), "at least one"),
        (lambda k: ensembles.stack([{"a": X}, {"a": X[:2]}]), "tree 1"),
        (lambda k: ensembles.stack([{"a": X}, {"b": X}]), "tree 1"),
        (lambda k: ensembles.unstack({"a": X, "b": X[:3]}), "model axis"),
        (lambda k: ensembles.draw(None, k, X), r"\(M,\)"),
        (
            lambda k: ensembles.transfer(
                FGSM(Linf(0.1)), k, MODELS, [lambda x: x[:, :3]], X, np.zeros(B, int)
            ),
            r"same classes, got \[3, 4\]",
        ),
        (
            lambda k: ensembles.transfer(
                FGSM(Linf(2.0)), k, MODELS, MODELS, X, np.zeros(B, int)
            ),
            "eps",
        ),
    ],
)  # fmt: skip
def test_mistakes_get_a_clear_error(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)


def test_models_must_be_callable():
    with pytest.raises(TypeError, match="bind"):
        ensembles.ensemble([MODELS[0], {"params": X}])
