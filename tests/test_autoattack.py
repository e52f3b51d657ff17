"""AutoAttack and what it is made of: classes in turn, draws, stages, official settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attacks import DUAL, same, separated

import jrobust
from jrobust import data, drive, keys, loops, losses, models
from jrobust.attacks import (
    APGD,
    FGSM,
    PGD,
    AutoAttack,
    MultiTargeted,
    Restarts,
    eot,
    multi_targeted,
    restarts,
    sequence,
)
from jrobust.threat import L0, L1, L2, Linf
from jrobust.zeroth_order import CGE

BATCH, CLASSES = 16, 5
RNG = np.random.default_rng(2)
INNER = np.float32(2 * RNG.normal(size=(6, 8)))
OUTER = np.float32(RNG.normal(size=(8, CLASSES)))
X = np.float32(RNG.uniform(0.1, 0.9, (BATCH, 2, 3)))
EACH = np.arange(BATCH)


def net(x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ INNER) @ OUTER


LOGITS = np.asarray(net(X))
Y = LOGITS.argmax(1)
RANKED = np.argsort(np.where(np.arange(CLASSES) == Y[:, None], np.inf, -LOGITS), 1)[:, :-1]


def firm(classes):
    """A model that is never wrong, but has gradients: every attack spends all it may."""
    weights = np.float32(RNG.normal(size=(6, classes)) * 0.01)

    def model(x):
        return x.reshape(x.shape[0], -1) @ weights + 50.0 * jnp.eye(classes)[0][None]

    return model


# ---------------------------------------------------------------------------- classes in turn

AIMED = APGD(Linf(0.06), steps=5, loss=losses.dlr_targeted)


@functools.cache
def program(attack):
    return jax.jit(lambda state: drive.run(attack, net, state))


def lone(turn, key):
    """The attack towards the class of this place alone, with the key of its place."""
    own = keys.fold(keys.examples(key, jnp.asarray(EACH)), jnp.uint32((3 << 30) + turn))
    state = AIMED.init(own, jnp.asarray(X), jnp.asarray(Y))
    record = state.record._replace(aim=jnp.asarray(RANKED[:, turn], jnp.int32))
    if turn == 0:
        record = record._replace(key=keys.examples(key, jnp.asarray(EACH)))
    return AIMED.result(program(AIMED)(AIMED.reopen(record)))


def test_each_class_is_headed_for_alone_and_the_first_success_wins(key):
    n = 3
    got = jrobust.run(multi_targeted(AIMED, n), key, net, X, Y)
    runs = [lone(turn, key) for turn in range(n)]
    success = np.array([r.success for r in runs])
    broken = success.any(0)
    winner = np.where(broken, success.argmax(0), n - 1)
    assert 2 < broken.sum() < BATCH - 2
    assert len(set(winner[broken])) > 1, "a later class must win somewhere"
    np.testing.assert_array_equal(got.success, broken)
    np.testing.assert_allclose(
        np.asarray(got.x)[broken], np.array([r.x for r in runs])[winner, EACH][broken], atol=1e-6
    )
    for field, clean in (("forwards", 1), ("backwards", 0)):
        spent = np.cumsum([getattr(r, field) for r in runs], 0)
        np.testing.assert_array_equal(getattr(got, field), clean + spent[winner, EACH])
    before = np.cumsum([r.forwards for r in runs], 0) - np.array([r.forwards for r in runs])
    want = before[winner, EACH] + np.array([r.step for r in runs])[winner, EACH]
    np.testing.assert_array_equal(got.step, np.where(broken, want, -1))
    # The verdict is untargeted: another class than the one headed for is a success too.
    reached = np.asarray(net(got.x)).argmax(1)
    assert np.all(reached[broken] != Y[broken])
    # One class draws what the attack alone would draw towards it.
    single = jrobust.run(multi_targeted(AIMED, 1), key, net, X, Y)
    np.testing.assert_array_equal(single.success, runs[0].success)
    np.testing.assert_allclose(single.x, runs[0].x, atol=1e-6)


def test_success_is_any_other_class(key):
    """Heading for the runner-up crosses a third class, which lies nearer than it looks."""
    x = np.full((8, 4), 0.5, np.float32)

    def model(x):
        s = x.mean(1) - 0.5
        return jnp.stack([0.1 + 0 * s, 0.05 + s, 400 * s * s - 1, 0 * s - 9], 1)

    attack = multi_targeted(APGD(Linf(0.055), steps=5, loss=losses.dlr_targeted), 1)
    result = jrobust.run(attack, key, model, x, np.zeros(8, int))
    assert np.all(result.success)
    assert set(np.asarray(model(result.x)).argmax(1)) == {2}


@pytest.mark.full
def test_lanes_can_be_stored_permuted_and_refilled(key):
    attack = multi_targeted(restarts(AIMED, 2), 2)
    step, finish = jax.jit(lambda s: attack.step(net, s)), program(attack)
    state = attack.init(keys.examples(key, jnp.asarray(EACH)), jnp.asarray(X), jnp.asarray(Y))
    midway = state
    for _ in range(9):
        midway = step(midway)
    assert len(set(np.asarray(midway.turn + midway.inner.turn))) > 1
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(midway))
    fresh, alone = (attack.result(finish(s)) for s in (state, midway))
    order = np.random.default_rng(0).permutation(BATCH)
    shuffled = jax.tree.map(lambda a: a[order], midway)
    same(attack.result(finish(shuffled)), jax.tree.map(lambda a: a[order], alone))

    def choose(new, old):
        return jnp.where((EACH % 2 == 0).reshape(-1, *[1] * (old.ndim - 1)), new, old)

    # Lanes that know no classes yet beside others that are midway.
    mixed = attack.result(finish(jax.tree.map(choose, state, midway)))
    same(mixed, jax.tree.map(choose, fresh, alone))
    done = finish(state)
    for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(step(done))):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
@pytest.mark.parametrize("outer", ["classes", "restarts"])
def test_starts_and_classes_multiply(outer, key):
    inner = APGD(Linf(0.05), steps=2)
    attack = {
        "classes": lambda: multi_targeted(restarts(inner, 2), 3),
        "restarts": lambda: restarts(multi_targeted(inner, 3), 2),
    }[outer]()
    result = jrobust.run(attack, key, firm(4), X, np.zeros(BATCH, int))
    assert not np.any(result.success)
    rankings = 1 if outer == "classes" else 2
    np.testing.assert_array_equal(result.forwards, np.full(BATCH, rankings + 6 * 3))
    np.testing.assert_array_equal(result.backwards, np.full(BATCH, 6 * 2))


@pytest.mark.parametrize("classes", [2, 3])
def test_there_are_no_more_classes_than_the_model_has(classes, key):
    attack = multi_targeted(APGD(L2(0.05), steps=2, loss=losses.dlr_or_margin_targeted), 9)
    result = jrobust.run(attack, key, firm(classes), X, np.zeros(BATCH, int))
    np.testing.assert_array_equal(result.forwards, np.full(BATCH, 1 + 3 * (classes - 1)))


def test_ranking_never_takes_the_label_whatever_the_logits(key):
    """Not even where all others are minus infinity or nothing is a number."""
    bad = np.float32([[3, -np.inf, -np.inf, 1], [np.nan] * 4, [np.inf] * 4, [0] * 4])

    def model(x):
        return jnp.asarray(bad) + 0 * x[:, :1, 0]

    attack = multi_targeted(APGD(Linf(0.1), steps=1), 3)
    y = jnp.asarray([0, 1, 2, 3])
    state = attack.init(keys.examples(key, y), jnp.asarray(X[:4]), y)
    ranked = np.asarray(jax.jit(lambda state: attack.step(model, state))(state).ranked)
    for row, label in zip(ranked, y):
        assert sorted(row) == sorted(set(range(4)) - {int(label)})
    np.testing.assert_array_equal(ranked[0], [3, 1, 2])


def test_with_targets_it_heads_for_the_one_that_is_asked_for(key):
    model, x, y, second, margin, towards = separated(4, (2, 2, 3), 8)
    minimal = margin / np.linalg.norm(towards, DUAL[Linf], axis=1)
    attack = AutoAttack(Linf(np.float32(1.001 * minimal)), ["apgd-ce", "apgd-t"], steps=10)
    result = jrobust.run(attack, key, model, x, y, targets=second)
    np.testing.assert_array_equal(np.asarray(model(result.x)).argmax(1), second)
    assert np.all(result.success)
    less = AutoAttack(Linf(np.float32(0.999 * minimal)), ["apgd-ce", "apgd-t"], steps=10)
    result = jrobust.run(less, key, model, x, y, targets=second)
    assert not np.any(result.success)
    # Nothing to rank, one class, and the same start twice.
    np.testing.assert_array_equal(result.forwards, np.full(8, 2 * 11))


def test_a_black_box_is_asked_exactly_what_is_counted(key):
    rows = np.zeros(BATCH, int)

    def black_box(x):
        for row in x:
            rows[np.abs(X - row).max((1, 2)).argmin()] += 1
        return np.asarray(net(jnp.asarray(x)))

    inner = PGD(Linf(0.05), steps=2, estimator=CGE(1e-3), random_start=False)
    result = jrobust.run(multi_targeted(inner, 2), key, drive.Host(black_box), X, Y)
    assert 0 < np.sum(result.success) < BATCH
    np.testing.assert_array_equal(result.forwards, rows)
    traced = jrobust.run(multi_targeted(inner, 2), key, net, X, Y)
    np.testing.assert_array_equal(result.success, traced.success)
    np.testing.assert_array_equal(result.forwards, traced.forwards)


# ---------------------------------------------------------------------------------- AutoAttack


def described(attack):
    """Name, loss, steps, starts and classes of a member."""
    starts = classes = 1
    while isinstance(attack, (Restarts, MultiTargeted)):
        if isinstance(attack, Restarts):
            starts = attack.n
        else:
            classes = attack.n
        attack = attack.attack
    kind = type(attack).__name__
    return kind, attack.loss.__name__, attack.steps, starts, classes


CE, DLR = ("APGD", "cross_entropy", 100), ("APGD", "dlr_or_margin", 100)
TARGETED = ("APGD", "dlr_or_margin_targeted", 100)
FABS, SQUARE = ("FAB", "margin", 100), ("Square", "margin", 5000, 1, 1)


OFFICIAL = {
    (Linf, "standard"): [(*CE, 1, 1), (*TARGETED, 1, 9), (*FABS, 1, 9), SQUARE],
    (L2, "standard"): [(*CE, 1, 1), (*TARGETED, 1, 9), (*FABS, 1, 9), SQUARE],
    (L1, "standard"): [(*CE, 5, 1), (*TARGETED, 1, 5), (*FABS, 1, 9), SQUARE],
    (L2, "plus"): [
        (*CE, 5, 1), (*DLR, 5, 1), (*FABS, 5, 1), SQUARE, (*TARGETED, 1, 9), (*FABS, 1, 9)
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "version"), OFFICIAL)
def test_the_official_settings(kind, version):
    """Not ten steps, nor another set of attacks."""
    attack = AutoAttack(kind(0.3), version)
    assert [described(member) for member in attack.attacks] == OFFICIAL[kind, version]
    for member in attack.stages.values():
        inner = member
        while hasattr(inner, "attack"):
            inner = inner.attack
        if type(inner) is APGD:
            assert inner.rho == 0.75
        elif type(inner).__name__ == "FAB":
            assert (inner.alpha_max, inner.eta, inner.beta) == (0.1, 1.05, 0.9)
            assert inner.random_start == (member.n == 5)
        else:
            assert inner.p == 0.8
    assert "apgd-t" in str(jrobust._algorithm.describe(attack))


def test_the_official_settings_for_random_defences():
    attack = AutoAttack(Linf(0.3), "rand")
    assert list(attack.stages) == ["apgd-ce", "apgd-dlr"]
    assert [member.samples for member in attack.attacks] == [20, 20]
    assert [described(m.attack) for m in attack.attacks] == [
        (*CE, 1, 1),
        (*DLR, 1, 1),
    ]


def test_what_a_point_costs_that_survives_everything(key):
    """1,010 gradients of APGD and 900 of FAB, in the published default."""
    result = jrobust.run(AutoAttack(Linf(0.05)), key, firm(10), X[:4], np.zeros(4, int))
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.backwards, np.full(4, 100 + 900 + 900))
    apgd, fab, square = 101 + (1 + 9 * 101), 1 + 9 * (100 * 2 + 1), 5000
    np.testing.assert_array_equal(result.forwards, np.full(4, apgd + fab + square))


@pytest.mark.full
def test_stages_are_the_members_of_the_sequence(key):
    """In a loop, one after the other on what stands, and in one program: the same examples fall."""
    attack = AutoAttack(Linf(np.float32(0.08)), ["apgd-ce", "apgd-t"], steps=1)
    y = Y.copy()
    y[0] = (y[0] + 1) % CLASSES
    examples = data.Dataset(X, y, EACH + 30)
    report = loops.evaluate(
        key, net, examples, attack.stages, batch_size=8, checks=False, progress=False
    )
    whole = jrobust.run(attack, key, net, X, y, ids=EACH + 30)
    assert report.attacks == ("apgd-ce", "apgd-t")
    np.testing.assert_array_equal(~report.examples["robust"], whole.success)
    assert len(set(report.standing)) == 3, "each member breaks what stood before it"
    unbroken = report.examples["robust"]
    for field in ("forwards", "backwards"):
        np.testing.assert_array_equal(
            report.examples[field][unbroken], np.asarray(getattr(whole, field))[unbroken]
        )
    assert list(sequence(FGSM(Linf(0.1)), AIMED).stages) == ["1 PGD", "2 APGD"]


@pytest.mark.parametrize(("classes", "kind"), [(2, Linf), (3, L2)])
def test_models_of_two_and_three_classes(classes, kind, key):
    model, x, y, _, margin, towards = separated(classes, (3, 3), 8)
    minimal = margin / np.linalg.norm(towards, DUAL[kind], axis=1)
    for factor, falls in ((0.999, False), (1.001, True)):
        attack = AutoAttack(
            kind(np.float32(factor * minimal)), ["apgd-ce", "apgd-dlr", "apgd-t"], steps=10
        )
        result = jrobust.run(attack, key, model, x, y)
        np.testing.assert_array_equal(result.success, np.full(8, falls))
        for name, member in attack.stages.items():
            if falls and name != "apgd-ce":
                alone = jrobust.run(member, key, model, x, y)
                assert np.all(alone.success), name


def test_a_minimal_norm_member_succeeds_within_the_radius_alone(key):
    """FAB finds the nearest point at any distance: below the minimal one that is no success."""
    model, x, y, _, margin, towards = separated(4, (2, 4), 8)
    minimal = margin / np.linalg.norm(towards, DUAL[L2], axis=1)
    for factor, falls in ((0.99, False), (1.02, True)):
        attack = AutoAttack(L2(np.float32(factor * minimal)), ["fab-t"], steps=10)
        result = jrobust.run(attack, key, model, x, y)
        np.testing.assert_array_equal(result.success, np.full(8, falls))
        assert np.all(result.distance <= factor * minimal + 1e-6)


# -------------------------------------------------------------------------------------- draws


def test_random_defences_are_judged_by_votes(key):
    """A coin that is wrong in three of ten throws stands, however many lucky draws there are."""

    def coin(keys, x):
        wrong = jax.vmap(lambda key: jax.random.bernoulli(key, 0.3))(keys)
        right = (
            jnp.where(wrong, -1.0, 1.0)[:, None]
            * (1.0 + 0.0 * x.sum((1, 2), keepdims=False))[:, None]
        )
        return jnp.concatenate([right, -right, 0 * right - 5], -1)

    model = models.randomized(coin, key, samples=1, votes=60)
    attack = AutoAttack(Linf(0.1), "rand", steps=6, samples=4)
    result = jrobust.run(attack, key, model, X, np.zeros(BATCH, int))
    assert not np.any(result.success)
    # Draws of the attack, not the model's own number; votes on top.
    np.testing.assert_array_equal(result.forwards, np.full(BATCH, 2 * 7 * (4 + 60)))
    np.testing.assert_array_equal(result.backwards, np.full(BATCH, 2 * 6 * 4))


def test_draws_need_a_model_that_draws(key):
    for attack in (eot(APGD(Linf(0.1)), 2), AutoAttack(Linf(0.1), "rand", steps=2)):
        with pytest.raises(TypeError, match=r"need a model that draws.*randomized"):
            jrobust.run(attack, key, net, X, Y)


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: AutoAttack(Linf(0.1), "best"), ValueError, "standard, plus.*got 'best'"),
        (lambda: AutoAttack(Linf(0.1), ["apgd"]), ValueError, "members are apgd-ce.*got .'apgd'"),
        (lambda: AutoAttack(Linf(0.1), ["fab", "fab"]), ValueError, "each at most once"),
        (lambda: AutoAttack(Linf(0.1), []), ValueError, "members are"),
        (lambda: multi_targeted(sequence(AIMED)), TypeError, "multi_targeted takes a single"),
        (lambda: multi_targeted(AIMED, 0), ValueError, "positive int n, got 0"),
        (lambda: multi_targeted(AIMED, True), ValueError, "positive int n, got True"),
        (
            lambda: multi_targeted(APGD(Linf(0.1), keep="loss")),
            ValueError,
            "APGD in multi_targeted must stop at success.*keep='success'",
        ),
        (lambda: eot(APGD), TypeError, "eot takes one or more attacks"),
        (lambda: eot(AIMED, 0), ValueError, "positive int samples, got 0"),
        (
            lambda: restarts(multi_targeted(PGD(Linf(0.1), random_start=False)), 2),
            ValueError,
            "MultiTargeted without a random start repeats itself",
        ),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_bad_members_are_found_before_any_compute(key):
    with pytest.raises(TypeError, match="APGD is defined for Linf, L2 and L1, got L0"):
        jrobust.run(AutoAttack(L0(1), ["apgd-ce"]), key, net, X, Y)
    with pytest.raises(ValueError, match="steps must be a positive int, got 0"):
        jrobust.run(AutoAttack(Linf(0.1), ["apgd-t"], steps=0), key, net, X, Y)
    # A targeted loss has its target here, and nowhere else.
    multi_targeted(AIMED, 2).check(X, Y, CLASSES)
    with pytest.raises(ValueError, match="dlr_targeted is a targeted loss: pass targets="):
        jrobust.run(AIMED, key, net, X, Y)
