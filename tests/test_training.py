"""Objectives and the step: gradients, masks, soft labels, attacks inside, keys, optimisers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrobust import losses, models, parallel, training
from jrobust.attacks import FGSM, PGD, restarts
from jrobust.models import Bound, Network
from jrobust.smoothing import Gaussian
from jrobust.threat import L2, Linf
from jrobust.training import TRADES, Adversarial, NoiseAugmentation, Standard

B, D, C = 6, 5, 3
KEY = jax.random.key(3)
TRACES = []


def mlp(params, x):
    TRACES.append(x.shape)
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def init_params(key, x):
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (x[0].size, 8)),
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(two, (8, C)),
        "b2": jnp.zeros(C),
    }


def plain_init(key, x):
    return init_params(key, x), {}


def plain_logits(params, extra, x):
    return mlp(params, x)


def plain_train(params, extra, key, x):
    return mlp(params, x), extra


def nothing(params, extra, x):
    return {}


def spy_init(key, x):
    return init_params(key, x), {"seen": jnp.zeros_like(x), "before": jnp.zeros_like(x)}


def spy_train(params, extra, key, x):
    return mlp(params, x), {"seen": x, "before": extra["seen"]}


def normed_init(key, x):
    return init_params(key, x), {"mean": jnp.full(D, 0.3), "passes": jnp.zeros((), jnp.int32)}


def normed_logits(params, extra, x):
    return mlp(params, x - extra["mean"][None])


def normed_train(params, extra, key, x):
    mean = x.mean(0)
    moved = {"mean": 0.9 * extra["mean"] + 0.1 * mean, "passes": extra["passes"] + 1}
    return mlp(params, x - mean[None]), moved


PLAIN = Network(plain_init, plain_logits, plain_train, nothing)
# Keeps the inputs of its last two training passes.
SPY = Network(spy_init, plain_logits, spy_train, nothing)
# Batch-norm in small: the mean of the batch in training, the running mean in evaluation.
NORMED = Network(normed_init, normed_logits, normed_train, nothing)

PGD_L2 = PGD(L2(0.3), steps=3, keep="last")
OBJECTIVES = {
    "Standard": Standard(),
    "Adversarial": Adversarial(PGD(Linf(0.1), steps=3, keep="last")),
    "TRADES": TRADES(PGD_L2, beta=2.0),
    "NoiseAugmentation": NoiseAugmentation(Gaussian(0.2)),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def data(n=B, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(n, D)).astype(np.float32)
    return x, rng.integers(0, C, n).astype(np.int32)


def full_batch(n=B, seed=0):
    return training.batch(*data(n, seed), id=10 + np.arange(n))


@jax.jit
def value_and_grad(objective, network, params, extra, batch, key=KEY):
    def loss(params):
        return objective(key, network, params, extra, batch)

    return jax.value_and_grad(loss, has_aux=True)(params)


@jax.jit
def call(objective, network, params, extra, batch, key=KEY):
    return objective(key, network, params, extra, batch)


@jax.jit
def attacked(attack, model, batch, key=None):
    """The points that an attack of a training step finds."""
    return attack(noise_key() if key is None else key, model, batch.x, batch.y, ids=batch.id).x


def start(network=PLAIN, batch=None, seed=1):
    return network.init(jax.random.key(seed), full_batch().x if batch is None else batch.x)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=atol), a, b)


def differ(a, b):
    apart = jax.tree.map(lambda u, v: jnp.abs(u - v).max(), a, b)
    return max(map(float, jax.tree.leaves(apart))) > 1e-3


def noise_key(key=KEY):
    return jax.random.fold_in(key, 1)


# Standard


def test_standard_is_the_mean_cross_entropy():
    params, extra = start()
    batch = full_batch()

    def reference(params):
        log_p = jax.nn.log_softmax(mlp(params, batch.x))
        return -jnp.mean(log_p[jnp.arange(B), batch.y])

    (value, (_, metrics)), grads = value_and_grad(Standard(), PLAIN, params, extra, batch)
    expected, expected_grads = jax.value_and_grad(reference)(params)
    close(value, expected)
    close(grads, expected_grads)
    hits = np.argmax(mlp(params, batch.x), -1) == batch.y
    close(metrics["accuracy"], hits.mean())


def test_soft_labels_are_the_cross_entropy_against_them():
    params, extra = start()
    batch = full_batch()
    soft = np.random.default_rng(5).dirichlet(np.ones(C), B).astype(np.float32)
    value, (_, metrics) = call(Standard(), PLAIN, params, extra, batch._replace(y=jnp.array(soft)))
    log_p = np.asarray(jax.nn.log_softmax(mlp(params, batch.x)), np.float64)
    close(value, -(soft * log_p).sum(1).mean())
    close(metrics["accuracy"], (log_p.argmax(1) == soft.argmax(1)).mean())


def test_another_loss_is_descended():
    params, extra = start()
    batch = full_batch()
    value, _ = call(Standard(losses.margin), PLAIN, params, extra, batch)
    close(value, losses.margin(mlp(params, batch.x), batch.y).mean())


# What holds for every objective


@every_objective
def test_one_hot_labels_are_hard_labels(name):
    params, extra = start()
    hard = full_batch()
    soft = hard._replace(y=jax.nn.one_hot(hard.y, C))
    close(
        value_and_grad(OBJECTIVES[name], PLAIN, params, extra, hard),
        value_and_grad(OBJECTIVES[name], PLAIN, params, extra, soft),
    )


@every_objective
def test_rows_that_fill_do_not_count(name):
    params, extra = start()
    real = full_batch(4)
    rng = np.random.default_rng(9)

    def filled(rows, x):
        """``real`` with three filler rows put in before its rows ``rows``."""
        x = np.insert(real.x, rows, x, axis=0)
        y, ids = np.insert(real.y, rows, 2), np.insert(real.id, rows, 77)
        mask = np.insert(np.ones(4, bool), rows, False)
        return training.batch(x, y, ids, mask)

    reference = value_and_grad(OBJECTIVES[name], PLAIN, params, extra, real)
    for rows in ([4, 4, 4], [0, 2, 4]):
        one = filled(rows, rng.uniform(size=(3, D)))
        two = filled(rows, np.full((3, D), 0.5))
        first = value_and_grad(OBJECTIVES[name], PLAIN, params, extra, one)
        second = value_and_grad(OBJECTIVES[name], PLAIN, params, extra, two)
        close(first, reference)
        jax.tree.map(np.testing.assert_array_equal, first, second)


@every_objective
def test_the_same_whatever_the_order_of_the_batch(name):
    params, extra = start(SPY)
    batch = full_batch()
    order = np.array([3, 0, 5, 1, 2, 4])
    moved = jax.tree.map(lambda leaf: leaf[order], batch)
    objective = OBJECTIVES[name]
    (value, (seen, _)), grads = value_and_grad(objective, SPY, params, extra, batch)
    (same, (other, _)), same_grads = value_and_grad(objective, SPY, params, extra, moved)
    np.testing.assert_array_equal(seen["seen"][order], other["seen"])  # bit for bit
    close((value, grads), (same, same_grads))


@every_objective
def test_the_key_decides_all_noise(name):
    params, extra = start(SPY)
    batch = full_batch()

    def seen(key):
        return call(OBJECTIVES[name], SPY, params, extra, batch, key)[1][0]["seen"]

    np.testing.assert_array_equal(seen(KEY), seen(KEY))
    moved = bool(jnp.any(seen(KEY) != seen(jax.random.key(4))))
    assert moved == (name != "Standard")


@every_objective
def test_settings_are_leaves_and_functions_are_structure(name):
    def scale(leaf):
        return 2.0 * leaf

    larger = jax.tree.map(scale, OBJECTIVES[name])
    assert jax.tree.structure(larger) == jax.tree.structure(OBJECTIVES[name])
    expected = {"Standard": 0, "Adversarial": 3, "TRADES": 4, "NoiseAugmentation": 1}
    assert len(jax.tree.leaves(larger)) == expected[name]  # eps, lo, hi; beta; sigma


# Adversarial


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=["Linf", "L2"])
@pytest.mark.parametrize("keep", ["last", "loss"])
def test_adversarial_trains_on_exactly_the_points_of_its_attack(threat, keep):
    params, extra = start(SPY)
    batch = full_batch()
    attack = PGD(threat, steps=3, keep=keep)
    value, (seen, metrics) = call(Adversarial(attack), SPY, params, extra, batch)
    x = seen["seen"]
    close(x, attacked(attack, SPY.bind(params, extra), batch))
    assert np.all(threat.distance(x, batch.x) <= threat.eps * (1 + 1e-6))
    assert np.all((x >= 0) & (x <= 1))
    logits = mlp(params, x)
    close(value, losses.cross_entropy(logits, batch.y).mean())
    close(metrics["robust_accuracy"], (np.argmax(logits, -1) == batch.y).mean())
    assert value > call(Standard(), SPY, params, extra, batch)[0]


def test_no_gradient_flows_through_the_attack():
    params, extra = start()
    batch = full_batch()
    attack = PGD(L2(0.3), steps=2, keep="last", random_start=False)
    _, grads = value_and_grad(Adversarial(attack), PLAIN, params, extra, batch)

    def at(params, victim):
        x = attacked(attack, PLAIN.bind(victim, extra), batch)
        return losses.cross_entropy(mlp(params, x), batch.y).mean()

    close(grads, jax.jit(jax.grad(at))(params, params))
    # It would be felt: the points do move with the parameters.
    assert differ(grads, jax.jit(jax.grad(lambda p: at(p, p)))(params))


def test_no_gradient_reaches_the_settings_of_the_attack():
    params, extra = start()

    def loss(eps):
        objective = Adversarial(PGD(L2(eps), steps=2, keep="last"))
        return objective(KEY, PLAIN, params, extra, full_batch())[0]

    value, slope = jax.jit(jax.value_and_grad(loss))(0.3)
    assert slope == 0
    assert value < jax.jit(loss)(0.5)  # though the points do move with it


def test_attack_sees_evaluation_mode_and_statistics_see_adversarial_inputs():
    params, extra = start(NORMED)
    batch = full_batch()
    found = attacked(PGD_L2, NORMED.bind(params, extra), batch)
    value, (moved, _) = call(Adversarial(PGD_L2), NORMED, params, extra, batch)
    logits, expected = NORMED.train_logits(params, extra, KEY, found)
    close(value, losses.cross_entropy(logits, batch.y).mean())
    close(moved, expected)
    assert moved["passes"] == 1

    wrong = Bound(params, extra, lambda p, e, x: normed_train(p, e, KEY, x)[0])
    other = attacked(PGD_L2, wrong, batch)
    assert differ(found, other)


def test_soft_labels_are_attacked_as_their_most_probable_class():
    params, extra = start(SPY)
    batch = full_batch()
    soft = 0.7 * jax.nn.one_hot(batch.y, C) + 0.1
    objective = OBJECTIVES["Adversarial"]
    _, (hard_seen, _) = call(objective, SPY, params, extra, batch)
    value, (soft_seen, _) = call(objective, SPY, params, extra, batch._replace(y=soft))
    np.testing.assert_array_equal(hard_seen["seen"], soft_seen["seen"])
    close(value, losses.cross_entropy(mlp(params, soft_seen["seen"]), soft).mean())


# TRADES


def trades_pieces(attack, network=SPY, beta=2.0, n=B):
    batch = full_batch(n)
    params, extra = start(network, batch)
    (value, (moved, metrics)), grads = value_and_grad(
        TRADES(attack, beta=beta), network, params, extra, batch
    )
    return batch, params, extra, value, moved, metrics, grads


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_kl(clean, moved):
    p, q = softmax(clean), softmax(moved)
    return (p * np.log(p / q)).sum(1)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=["Linf", "L2"])
def test_trades_is_its_formula(threat):
    attack = PGD(threat, steps=3, keep="last")
    batch, params, _, value, moved, metrics, grads = trades_pieces(attack)
    np.testing.assert_array_equal(moved["before"], batch.x)  # the clean pass came first
    x = moved["seen"]
    assert np.all(threat.distance(x, batch.x) <= threat.eps * (1 + 1e-6))
    clean, adversarial = mlp(params, batch.x), mlp(params, x)
    kl = numpy_kl(clean, adversarial)
    natural = -np.log(softmax(clean)[np.arange(B), batch.y])
    close(value, natural.mean() + 2.0 * kl.mean())
    close(metrics["kl"], kl.mean())
    close(metrics["accuracy"], (clean.argmax(1) == batch.y).mean())
    close(metrics["robust_accuracy"], (adversarial.argmax(1) == batch.y).mean())

    def formula(params, held):
        log_p, log_q = (jax.nn.log_softmax(mlp(p, z)) for p, z in ((held, batch.x), (params, x)))
        natural = -jax.nn.log_softmax(mlp(params, batch.x))[jnp.arange(B), batch.y]
        return jnp.mean(natural + 2.0 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    close(grads, jax.grad(lambda p: formula(p, p))(params), rtol=1e-4, atol=1e-5)
    # Both paths are needed.
    assert differ(grads, jax.grad(formula)(params, params))


def test_trades_attack_maximises_the_kl():
    attack = PGD(L2(0.3), steps=5, keep="last")
    batch, params, _, _, moved, _, _ = trades_pieces(attack, n=32)
    clean = mlp(params, batch.x)
    # The start and, to compare with, a point as far out as the one found.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_key(), batch.id)
    first = attack.threat.sample(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), batch.x)
    far = batch.x + 0.3 * attack.threat.steepest(first - batch.x)
    found = numpy_kl(clean, mlp(params, moved["seen"]))
    assert np.all(found > numpy_kl(clean, mlp(params, first)))
    assert np.mean(found > numpy_kl(clean, mlp(params, far))) > 0.9
    # Not what the cross entropy would have found.
    other = attacked(attack, PLAIN.bind(params, {}), batch)
    assert found.mean() > numpy_kl(clean, mlp(params, other)).mean()


def test_trades_without_weight_is_standard():
    batch, params, extra, value, _, _, grads = trades_pieces(PGD_L2, beta=0.0)
    (expected, _), expected_grads = value_and_grad(Standard(), SPY, params, extra, batch)
    np.testing.assert_array_equal(value, expected)
    close(grads, expected_grads)


def test_trades_starts_from_the_published_gaussian():
    n = 400
    attack = PGD(L2(1.0), steps=1, step_size=1e-7, gaussian_start=1e-3, keep="last")
    batch, *_, moved, _, _ = trades_pieces(attack, n=n)
    inside = (batch.x > 0.01) & (batch.x < 0.99)  # where the box does not clip
    noise = np.asarray(moved["seen"] - batch.x)[inside]
    assert abs(noise.std() - 1e-3) < 4 * 1e-3 / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 4 * 1e-3 / np.sqrt(noise.size)


def test_trades_statistics_see_the_clean_then_the_adversarial_pass():
    batch, params, extra, value, moved, _, _ = trades_pieces(PGD_L2, NORMED)
    running = NORMED.logits(params, extra, batch.x)
    attack = dataclasses.replace(PGD_L2, loss=lambda z, y: losses.kl(z, running))
    x = attacked(attack, NORMED.bind(params, extra), batch)
    clean, once = NORMED.train_logits(params, extra, KEY, batch.x)
    adversarial, twice = NORMED.train_logits(params, once, KEY, x)
    close(moved, twice)
    expected = losses.cross_entropy(clean, batch.y) + 2.0 * losses.kl(adversarial, clean)
    close(value, expected.mean())


# Gaussian augmentation


def test_gaussian_noise_is_unclipped_normal_of_the_example():
    n, sigma = 500, 0.5
    batch = full_batch(n)
    params, extra = start(SPY, batch)
    _, (seen, _) = call(NoiseAugmentation(Gaussian(sigma)), SPY, params, extra, batch)
    noise = np.asarray(seen["seen"] - batch.x)
    assert abs(noise.std() - sigma) < 4 * sigma / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 4 * sigma / np.sqrt(noise.size)
    assert seen["seen"].min() < 0
    assert seen["seen"].max() > 1
    # Rows that share an id share their noise, others do not.
    twice = batch._replace(id=jnp.concatenate([batch.id[: n // 2]] * 2))
    _, (seen, _) = call(NoiseAugmentation(Gaussian(sigma)), SPY, params, extra, twice)
    again = np.asarray(seen["seen"] - batch.x)
    np.testing.assert_allclose(again[: n // 2], noise[: n // 2], atol=1e-6)
    np.testing.assert_allclose(again[n // 2 :], noise[: n // 2], atol=1e-6)
    assert len(np.unique(noise, axis=0)) == n


# The step

OPTIMISERS = {
    "adam": optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_three_steps_are_a_hand_written_loop(name):
    tx, objective = OPTIMISERS[name], NoiseAugmentation(Gaussian(0.2))
    init, update = training.step(objective, tx)
    update = jax.jit(update, donate_argnums=0)
    state = jax.jit(init)(KEY, NORMED, full_batch().x)
    params, extra = jax.tree.map(jnp.copy, (state.params, state.extra))
    key, opt_state = jnp.copy(state.key), jax.jit(tx.init)(params)

    @jax.jit
    def by_hand(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for t in range(3):
        batch = full_batch(seed=t)
        old = state
        state, metrics = update(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))  # donated
        step_key = jax.random.fold_in(key, t)
        (value, (extra, _)), grads = value_and_grad(
            objective, NORMED, params, extra, batch, step_key
        )
        params, opt_state = by_hand(grads, opt_state, params)
        close(metrics["loss"], value)
        close(metrics["gradient_norm"], optax.tree.norm(grads))
        assert metrics["accuracy"].shape == ()
        close((state.params, state.extra), (params, extra), rtol=1e-4)
        assert int(state.step) == t + 1


def test_steps_draw_fresh_noise_and_repeat_exactly():
    init, update = training.step(NoiseAugmentation(Gaussian(0.3)), optax.sgd(0.1))
    update, batch = jax.jit(update), full_batch()
    state = init(KEY, SPY, batch.x)
    first, _ = update(state, batch)
    again, _ = update(state, batch)
    np.testing.assert_array_equal(first.extra["seen"], again.extra["seen"])
    second, _ = update(first, batch)
    assert np.all(second.extra["seen"] != first.extra["seen"])
    # The noise of (key, step, id) is the same in another batch, and new under another run's key.
    other = jax.tree.map(lambda leaf: leaf[np.array([5, 5, 0, 1, 2, 2])], batch)
    moved, _ = update(first, other)
    np.testing.assert_array_equal(moved.extra["seen"][0], second.extra["seen"][5])
    fresh, _ = update(dataclasses.replace(state, key=jax.random.key(8)), batch)
    assert np.all(fresh.extra["seen"] != first.extra["seen"])


def test_init_follows_from_its_key():
    init, _ = training.step(Standard(), optax.sgd(0.1))
    x = full_batch().x
    one, same, other = init(KEY, PLAIN, x), init(KEY, PLAIN, x), init(jax.random.key(9), PLAIN, x)
    jax.tree.map(np.testing.assert_array_equal, one.params, same.params)
    assert differ(one.params, other.params)
    words = {jax.random.key_data(k).tobytes() for k in (one.key, other.key, KEY)}
    assert len(words) == 3
    assert (int(one.step), one.step.dtype, one.step.weak_type) == (0, jnp.int32, False)


def test_state_is_a_pytree_with_the_network_as_structure():
    init, update = training.step(Standard(), optax.adam(1e-2))
    state = init(KEY, NORMED, full_batch().x)
    leaves, tree = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    back = jax.tree.unflatten(tree, [jnp.copy(leaf) for leaf in leaves])
    assert back.network is NORMED
    after, same = update(state, full_batch())[0], update(back, full_batch())[0]
    jax.tree.map(np.testing.assert_array_equal, after.params, same.params)
    assert jax.tree.structure(after) == tree


def test_update_is_traced_once():
    init, update = training.step(OBJECTIVES["TRADES"], optax.adam(1e-2))
    update = jax.jit(update, donate_argnums=0)
    state, _ = update(init(KEY, PLAIN, full_batch().x), full_batch())
    TRACES.clear()
    for seed in range(1, 4):
        state, _ = update(state, full_batch(seed=seed))
    assert TRACES == []


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (NoiseAugmentation(Gaussian(0.1)), NoiseAugmentation(Gaussian(0.2))),
        (TRADES(PGD_L2, beta=1.0), TRADES(PGD_L2, beta=6.0)),
        (Adversarial(PGD_L2), Adversarial(PGD(L2(0.1), steps=3, keep="last"))),
    ],
    ids=["sigma", "beta", "eps"],
)
def test_new_numbers_do_not_trace_anew(one, two):
    tx = optax.sgd(0.1)

    @jax.jit
    def update(objective, state, batch):
        return training.step(objective, tx)[1](state, batch)

    state = training.step(one, tx)[0](KEY, PLAIN, full_batch().x)
    first = update(one, state, full_batch())[1]["loss"]
    TRACES.clear()
    second = update(two, state, full_batch())[1]["loss"]
    assert TRACES == []
    assert first != second


def test_training_reduces_the_loss_of_every_objective():
    x, _ = data(64)
    batch = training.batch(x, (x[:, 0] > 0.5).astype(np.int32))
    for objective in OBJECTIVES.values():
        init, update = training.step(objective, optax.adam(3e-2))
        update = jax.jit(update)
        state = init(KEY, PLAIN, x)
        state, before = update(state, batch)
        for _ in range(60):
            state, after = update(state, batch)
        assert after["loss"] < 0.7 * before["loss"]


# Flax: dropout and batch-norm


def test_dropout_and_batch_norm_of_a_flax_model():
    module = models.SmallCNN(widths=(4,), classes=C, hidden=8, norm=True, dropout=0.5)
    network = models.network(module)
    x = jax.random.uniform(jax.random.key(2), (B, 4, 4, 1))
    batch = training.batch(x, data()[1])
    attack = PGD(Linf(0.2), steps=2, keep="last")
    init, update = training.step(Adversarial(attack), optax.sgd(0.1))
    state = jax.jit(init)(KEY, network, x)
    key = jax.random.fold_in(state.key, 0)
    found = attacked(attack, network.bind(state.params, state.extra), batch, noise_key(key))
    variables = {"params": state.params, **state.extra}

    @jax.jit
    def apply(key):
        return module.apply(
            variables, found, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    after, metrics = jax.jit(update)(state, batch)
    dropout = jax.random.fold_in(jax.random.fold_in(key, 0), batch.id[0])
    logits, changed = apply(dropout)
    close(metrics["loss"], losses.cross_entropy(logits, batch.y).mean(), rtol=1e-4)
    close(after.extra, changed, rtol=1e-4)
    assert differ(after.extra, state.extra)
    # Dropout was on, under a key that other steps do not share.
    assert differ(logits, apply(jax.random.fold_in(jax.random.fold_in(state.key, 1), 0))[0])
    assert differ(logits, network.logits(state.params, state.extra, found))


# Accumulation of gradients


def sums_train(params, extra, key, x):
    """Where it has been: the sum of all inputs seen, and of the last ones alone."""
    total = x.sum(0)
    return mlp(params, x), {"seen": extra["seen"] + total, "last": total}


def sums_init(key, x):
    return init_params(key, x), {"seen": jnp.zeros(D), "last": jnp.zeros(D)}


SUMS = Network(sums_init, plain_logits, sums_train, nothing)


def uneven(n=12, pieces=3):
    """A batch of which piece 0 counts as a whole, piece 1 nowhere, the others in part."""
    row = np.arange(n)
    return full_batch(n)._replace(mask=jnp.array((row % pieces == 0) | (row % pieces * row > 12)))


@every_objective
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    batch, results = uneven(), []
    for pieces in (1, 3):
        init, update = training.step(OBJECTIVES[name], optax.sgd(1.0), accumulate=pieces)
        state = init(KEY, SUMS, batch.x)
        after, metrics = jax.jit(update)(state, batch)
        assert int(after.step) == 1
        # The parameters moved by exactly the gradient.
        grads = jax.tree.map(jnp.subtract, state.params, after.params)
        results.append((grads, metrics, after.extra["seen"]))
    assert [int(batch.mask[j::3].sum()) for j in range(3)] == [4, 0, 2]
    close(*results, rtol=1e-4)
    assert results[0][1]["gradient_norm"] > 0.05


def test_statistics_go_through_the_pieces_in_order():
    batch = full_batch(12)
    init, update = training.step(Standard(), optax.sgd(0.1), accumulate=4)
    state = init(KEY, NORMED, batch.x)
    after, _ = jax.jit(update)(state, batch)
    extra = state.extra
    for j in range(4):
        extra = normed_train(state.params, extra, KEY, batch.x[j::4])[1]
    close(after.extra, extra)


def test_accumulated_sums_are_kept_in_float32():
    def init(key, x):
        return {"w": jnp.zeros((D, C), jnp.bfloat16)}, {}

    network = Network(
        init, plain_logits, lambda params, extra, key, x: (x @ params["w"], extra), nothing
    )
    batch = full_batch(64)
    init_, update = training.step(Standard(), optax.sgd(1.0), accumulate=32)
    after, _ = jax.jit(update)(init_(KEY, network, batch.x), batch)
    assert after.params["w"].dtype == jnp.bfloat16
    error = jax.nn.one_hot(batch.y, C) - 1 / C
    exact = np.asarray(batch.x, np.float64).T @ np.asarray(error, np.float64) / 64
    np.testing.assert_allclose(after.params["w"].astype(jnp.float32), exact, rtol=0.01, atol=2e-4)


def test_dropout_differs_between_pieces():
    def train(params, extra, key, x):
        drawn = jax.random.bits(key, (2,))
        return mlp(params, x), {"draws": jnp.roll(extra["draws"], 1, 0).at[0].set(drawn)}

    def draws_init(key, x):
        return init_params(key, x), {"draws": jnp.zeros((3, 2), jnp.uint32)}

    network = Network(draws_init, plain_logits, train, nothing)
    init, update = training.step(Standard(), optax.sgd(0.1), accumulate=3)
    state, _ = jax.jit(update)(init(KEY, network, full_batch().x), full_batch())
    assert len(np.unique(state.extra["draws"], axis=0)) == 3


def split_steps(backend, devices, pieces, norm):
    """Two steps on images, rows of fillers only on two devices of eight."""
    axis = parallel.AXIS if norm and devices > 1 and backend != "jit" else None
    module = models.SmallCNN(widths=(4,), classes=C, hidden=8, norm=norm)
    init, update = training.step(
        Standard(), optax.sgd(0.2), average=training.EMA(0.5), accumulate=pieces
    )
    x = jax.random.uniform(jax.random.key(3), (32, 4, 4, 1))
    batch = training.batch(x, jnp.arange(32) % C, mask=np.arange(32) % 13 < 9)
    batch = batch._replace(mask=batch.mask & (np.arange(32) < 23))
    state = init(KEY, models.network(module), x[:1])
    state = dataclasses.replace(state, network=models.network(module.clone(axis_name=axis)))
    run = parallel.data_parallel(
        update, parallel.mesh(jax.devices()[:devices]), backend, in_axes=(None, 0), out_axes=None
    )
    for _ in range(2):
        state, metrics = run(state, batch)
    return jax.device_get((state.params, state.extra, state.weights, metrics))


@pytest.mark.parametrize("backend", ["jit", "shard_map", "pmap"])
def test_accumulation_over_devices_is_the_whole_batch(backend):
    whole = split_steps("jit", 1, 1, norm=False)
    close(split_steps(backend, 8, 2, norm=False), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "backend", ["shard_map", *(pytest.param(b, marks=pytest.mark.full) for b in ("jit", "pmap"))]
)
def test_accumulation_over_devices_keeps_batch_norm_in_step(backend):
    """Pieces, normalised over all devices, are those that a single device makes."""
    single = split_steps("jit", 1, 2, norm=True)
    close(split_steps(backend, 8, 2, norm=True), single, rtol=1e-4, atol=1e-5)


def test_accumulation_takes_less_memory():
    network = models.network(models.SmallCNN())
    x = jnp.zeros((256, 8, 8, 1))
    batch = training.batch(x, jnp.zeros(256, int))

    def peak(pieces):
        init, update = training.step(Standard(), optax.sgd(0.1), accumulate=pieces)
        state = jax.eval_shape(init, KEY, network, x)
        return jax.jit(update).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert peak(4) < 0.5 * peak(1)


def test_accumulation_is_traced_once():
    init, update = training.step(OBJECTIVES["Adversarial"], optax.adam(1e-2), accumulate=3)
    update = jax.jit(update, donate_argnums=0)
    state, _ = update(init(KEY, NORMED, full_batch().x), full_batch())
    TRACES.clear()
    for seed in range(1, 4):
        state, _ = update(state, full_batch(seed=seed))
    assert TRACES == []
    assert int(state.extra["passes"]) == 12


# The guard


def poisoned(n=B):
    batch = full_batch(n)
    return batch._replace(x=batch.x.at[3, 1].set(jnp.nan))


def bits(state):
    data = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(data)]


@pytest.mark.parametrize("pieces", [1, 3])
def test_guard_stops_at_the_poisoned_update_with_the_state_before(pieces):
    init, update = training.step(
        Standard(), optax.adam(1e-2), average=training.EMA(0.5), accumulate=pieces
    )
    guard = jax.jit(training.guarded(update), donate_argnums=(0, 1))
    plain = jax.jit(update)
    batches = [full_batch(seed=1), full_batch(seed=2), poisoned(), full_batch(seed=3)]
    state, alive = init(KEY, NORMED, full_batch().x), jnp.array(True)
    expected = init(KEY, NORMED, full_batch().x)
    history = []
    for batch in batches:
        history.append(jax.tree.map(jnp.copy, state))
        if bool(alive) and jnp.all(jnp.isfinite(batch.x)):
            expected, _ = plain(expected, batch)
        (state, alive), metrics = guard(state, alive, batch)
        assert alive.shape == ()
        assert bool(jnp.isnan(metrics["loss"])) == (batch is batches[2])
        if len(history) == 1:
            TRACES.clear()
    assert TRACES == []
    assert not alive
    assert int(state.step) == 2
    before, after, end = map(bits, (*history[2:], state))
    assert before == after, "step 3 left no trace"
    assert after == end, "nor did step 4"
    close(
        (expected.params, expected.extra, expected.weights),
        (state.params, state.extra, state.weights),
    )


def with_loss(term):
    """The standard objective, and a term in the parameters."""

    def objective(key, network, params, extra, batch):
        value, aux = Standard()(key, network, params, extra, batch)
        return value + term(params["b2"]), aux

    return objective


def overflow_train(params, extra, key, x):
    return mlp(params, x), {"square": extra["square"] * 1e20}


OVERFLOW = Network(
    lambda key, x: (init_params(key, x), {"square": jnp.float32(1e20)}),
    plain_logits,
    overflow_train,
    nothing,
)
# What is not finite: the loss alone, the gradient, the parameters alone, the statistics alone.
LEAVING = {
    "loss": (with_loss(lambda b: jax.lax.stop_gradient(b[0]) + jnp.inf), None, PLAIN, 0),
    "gradient": (with_loss(lambda b: jnp.sqrt(0 * b.sum())), optax.zero_nans(), PLAIN, 0),
    "params": (
        Standard(),
        optax.scale_by_schedule(lambda t: jnp.where(t < 1, 1.0, jnp.inf)),
        PLAIN,
        1,
    ),
    "extra": (Standard(), None, OVERFLOW, 0),
}


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("what", LEAVING)
def test_guard_watches(what):
    objective, extra_tx, network, steps = LEAVING[what]
    tx = optax.chain(optax.sgd(0.1), extra_tx or optax.identity())
    init, update = training.step(objective, tx)
    state, alive = init(KEY, network, full_batch().x), jnp.array(True)
    update, guard = jax.jit(update), jax.jit(training.guarded(update))
    for t in range(3):
        new, metrics = update(state, full_batch())
        parts = {"loss": metrics["loss"], "gradient": metrics["gradient_norm"]}
        parts |= {"params": new.params, "extra": new.extra}
        left = [name for name, part in parts.items() if not finite(part)]
        assert left == ([what] if t >= steps else [])
        (state, alive), _ = guard(state, alive, full_batch())
        assert (bool(alive), int(state.step)) == (t < steps, min(t + 1, steps))


def test_the_norm_of_a_gradient_in_half_precision_does_not_overflow():
    def start_half(key, x):
        return {"w": jnp.zeros((D, C), jnp.float16)}, {}

    def train(params, extra, key, x):
        return x @ params["w"].astype(jnp.float32), extra

    batch = full_batch()
    batch = batch._replace(x=1e4 * batch.x)
    init, update = training.step(Standard(), optax.sgd(1.0))
    state = init(KEY, Network(start_half, plain_logits, train, nothing), batch.x)
    (after, alive), metrics = jax.jit(training.guarded(update))(state, jnp.array(True), batch)
    exact = np.linalg.norm(np.asarray(after.params["w"], np.float64))
    assert bool(alive)
    assert exact > 1e3
    np.testing.assert_allclose(metrics["gradient_norm"], exact, rtol=1e-2)


# Mistakes


def bad_update(**change):
    init, update = training.step(Standard(), optax.sgd(0.1))
    update(init(KEY, PLAIN, full_batch().x), full_batch()._replace(**change))


def bad_objective(objective):
    params, extra = start()
    objective(KEY, PLAIN, params, extra, full_batch())


def bad_setting(objective):
    x, y = data()
    objective.check(x, y, C)


MISTAKES = {
    "objective class": (lambda: training.step(Standard, optax.sgd(0.1)), TypeError, "Standard()"),
    "number for tx": (lambda: training.step(Standard(), 0.1), TypeError, "optax.adam"),
    "no parts": (
        lambda: training.step(Standard(), optax.sgd(0.1), accumulate=0),
        ValueError,
        "accumulate must be >= 1, got 0",
    ),
    "half parts": (
        lambda: training.step(Standard(), optax.sgd(0.1), accumulate=1.5),
        TypeError,
        "accumulate must be an integer, got 1.5",
    ),
    "parts that do not divide": (
        lambda: training.step(Standard(), optax.sgd(0.1), accumulate=4)[1](
            training.step(Standard(), optax.sgd(0.1))[0](KEY, PLAIN, full_batch().x), full_batch()
        ),
        ValueError,
        "a batch of 6 rows",
    ),
    "raw key": (
        lambda: training.step(Standard(), optax.sgd(0.1))[0](
            jax.random.key_data(KEY), PLAIN, full_batch().x
        ),
        TypeError,
        "jax.random.key",
    ),
    "labels in a column": (lambda: bad_update(y=jnp.zeros((B, 1), int)), ValueError, "batch.y"),
    "integer one-hot": (lambda: bad_update(y=jnp.eye(B, C, dtype=int)), ValueError, "batch.y"),
    "float labels": (lambda: bad_update(y=jnp.zeros(B)), ValueError, "batch.y"),
    "too few labels": (lambda: bad_update(y=jnp.zeros(B - 1, int)), ValueError, "batch.y"),
    "float mask": (lambda: bad_update(mask=jnp.ones(B)), ValueError, "batch.mask must be bool"),
    "short mask": (lambda: bad_update(mask=jnp.ones(1, bool)), ValueError, "batch.mask"),
    "float ids": (lambda: bad_update(id=jnp.arange(1.0 * B)), ValueError, "batch.id must be int"),
    "attack that stops": (
        lambda: bad_objective(Adversarial(PGD(Linf(0.1)))),
        ValueError,
        "keep='last'",
    ),
    "attack that stops, before compute": (
        lambda: bad_setting(Adversarial(FGSM(Linf(0.1)))),
        ValueError,
        "keep='last'",
    ),
    "attack class": (lambda: bad_objective(Adversarial(PGD)), TypeError, "PGD"),
    "threat for an attack": (lambda: bad_setting(Adversarial(Linf(0.1))), TypeError, "PGD"),
    "eps in grey levels": (
        lambda: bad_setting(Adversarial(PGD(Linf(8.0), keep="last"))),
        ValueError,
        "larger than the whole box",
    ),
    "composed TRADES": (
        lambda: bad_objective(TRADES(restarts(PGD(Linf(0.1), keep="loss"), 2))),
        TypeError,
        "single gradient attack",
    ),
    "TRADES from the clean input": (
        lambda: bad_objective(TRADES(PGD(Linf(0.1), keep="last", random_start=False))),
        ValueError,
        "random_start=True",
    ),
    "TRADES that stops": (lambda: bad_setting(TRADES(PGD(Linf(0.1)))), ValueError, "keep='last'"),
    "negative beta": (lambda: bad_setting(TRADES(PGD_L2, beta=-1.0)), ValueError, "beta"),
    "zero sigma": (lambda: bad_setting(NoiseAugmentation(Gaussian(0.0))), ValueError, "sigma"),
    "sigma for each pixel": (
        lambda: bad_setting(NoiseAugmentation(Gaussian(np.ones(D)))),
        ValueError,
        "sigma",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_clear_errors(name):
    call, error, words = MISTAKES[name]
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)
