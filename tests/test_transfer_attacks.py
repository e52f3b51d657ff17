"""The transfer family and PGD with an optimiser, against float64 numpy and closed forms."""

import pathlib
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrobust
from jrobust import drive, losses
from jrobust.attacks import PGD
from jrobust.attacks._transfer import (
    DIFGSM,
    NIFGSM,
    SINIFGSM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    DiverseInput,
    ScaledCopies,
    TransferPGD,
    gaussian_kernel,
)
from jrobust.models import randomized
from jrobust.threat import L0, L2, Linf

RNG = np.random.default_rng(0)
BATCH, SHAPE = 6, (4, 5, 2)
INNER = RNG.normal(size=(40, 8)) / 3
OUTER = RNG.normal(size=(8, 4))
X = np.float32(RNG.uniform(0.2, 0.8, (BATCH, *SHAPE)))


def net(x):
    h = jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ np.float32(INNER))
    return h @ np.float32(OUTER)


Y = np.asarray(net(X)).argmax(1)
Y[0] = (Y[0] + 1) % 4
TARGETS = (Y + 1) % 4


def evaluate64(x, y, target=None):
    """What is ascended, (B,), and its gradient, of the net in float64."""
    h = np.tanh((x.reshape(len(x), -1) - 0.5) @ INNER)
    logits = h @ OUTER
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    label, sign = (y, 1) if target is None else (target, -1)
    slope = p - np.eye(4)[label]
    gradient = ((slope @ OUTER.T) * (1 - h**2)) @ INNER.T
    return -sign * np.log(p[np.arange(len(x)), label]), sign * gradient.reshape(x.shape)


def convolved(g, kernel):
    for axis in (1, 2):
        g = np.apply_along_axis(lambda v: np.convolve(v, kernel)[len(kernel) // 2 :][: len(v)],
                                axis, g)  # fmt: skip
    return g


def total(v, order=1):
    return np.linalg.norm(v.reshape(len(v), -1), order, axis=1).reshape(-1, 1, 1, 1)


def reference(
    kind, eps, *, steps, momentum=1.0, nesterov=False, copies=1, kernel=(1.0,), target=None
):
    """The last point of the published iteration, in float64. The box must be far."""
    x, m = np.float64(X), np.zeros(X.shape)
    for _ in range(steps):
        ahead = x
        if nesterov:
            # What one normalised gradient is multiplied by to be as long as a step.
            length = x[0].size if kind is Linf else total(m) / np.maximum(total(m, 2), 1e-300)
            ahead = x + momentum * eps / steps * length * m
        g = sum(evaluate64(ahead / 2**i, Y, target)[1] / 2**i for i in range(copies)) / copies
        g = convolved(g, np.asarray(kernel))
        m = momentum * m + g / total(g)
        x = x + eps / steps * (np.sign(m) if kind is Linf else m / total(m, 2))
        change = x - X
        if kind is Linf:
            x = X + np.clip(change, -eps, eps)
        else:
            x = X + change * np.minimum(1, eps / np.maximum(total(change, 2), 1e-300))
    return x


SKEWED = np.float32([0.1, 0.5, 0.4])
LOOPS = {
    "NI": (Linf, {"nesterov": True, "momentum": 0.8}, {"nesterov": True, "momentum": 0.8}),
    "SI-NI, targeted": (
        Linf,
        {"nesterov": True, "transforms": (ScaledCopies(3),)},
        {"nesterov": True, "copies": 3, "target": TARGETS},
    ),
    "TI-SI-NI in L2": (
        L2,
        {"nesterov": True, "transforms": (ScaledCopies(2),), "kernel": SKEWED},
        {"nesterov": True, "copies": 2, "kernel": SKEWED},
    ),
}


def test_options_that_do_nothing_leave_plain_steps(key):
    """Neither does looking ahead without decay."""
    attack = TransferPGD(
        Linf(0.12),
        steps=4,
        momentum=0.0,
        nesterov=True,
        neighbours=2,
        beta=0.0,
        transforms=(ScaledCopies(1), DiverseInput(probability=0.0)),
        kernel=np.ones(1, np.float32),
    )
    result = jax.jit(lambda x, y: attack(key, net, x, y))(X, Y)
    want = reference(Linf, 0.12, steps=4, momentum=0.0)
    assert np.mean(np.abs(result.x - want) > 1e-5) < 0.01


@pytest.mark.parametrize("name", LOOPS)
def test_is_the_numpy_loop(name, key):
    kind, options, same = LOOPS[name]
    eps = 0.12 if kind is Linf else 0.5
    attack = TransferPGD(kind(eps), steps=4, **options)
    targets = same.get("target")
    result = jrobust.run(attack, key, net, X, Y, targets=targets)
    want = reference(kind, eps, steps=4, **same)
    # A sign that rounds the other way is two steps.
    assert np.mean(np.abs(result.x - want) > 1e-5) < 0.01
    loss, _ = evaluate64(np.float64(result.x), Y, targets)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-4, atol=1e-6, err_msg="at the point")
    plain = reference(kind, eps, steps=4)
    assert np.max(np.abs(want - plain)) > 1e-3, "options that do something"


# ---------------------------------------------------------------------------- linear models


def test_linear_models_end_in_the_corner(key):
    """The gradient is the same everywhere, so that only smoothing changes its signs."""
    w = RNG.choice([-1.0, 1.0], 40) * RNG.uniform(0.5, 2, 40)

    def linear(x):
        score = x.reshape(x.shape[0], -1) @ np.float32(w)
        return jnp.stack([jnp.zeros_like(score), score - 100.0], -1)

    smooth = np.sign(convolved(w.reshape(1, *SHAPE), SKEWED))
    assert np.any(smooth != np.sign(w).reshape(SHAPE))
    attack = TransferPGD(
        Linf(0.1), steps=2, loss=losses.margin, nesterov=True, neighbours=2,
        transforms=(ScaledCopies(3),), kernel=SKEWED,
    )  # fmt: skip
    result = jrobust.run(attack, key, linear, X, np.zeros(BATCH, int))
    np.testing.assert_allclose(result.x, X + 0.1 * smooth, atol=1e-6)
    assert not np.any(result.success)


def interpolation(n, size, first):
    """(n, n): n pixels shrunk to `size`, half-pixel centres, from `first` on."""
    matrix = np.zeros((n, n))
    for i in range(n):
        at = (i + 0.5 - first) * n / size - 0.5
        if -0.5 <= at <= n - 0.5:
            at = min(max(at, 0.0), n - 1.0)
            low = int(at)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, n - 1)] += at - low
    return matrix


def test_diverse_inputs_are_every_shrunk_image_in_every_place(key):
    """One step in L2 on a linear model points along the picture's transpose of the weights."""
    w = RNG.normal(size=(4, 6))

    def linear(x):
        score = x.reshape(x.shape[0], -1) @ np.float32(w.ravel())
        return jnp.stack([jnp.zeros_like(score), score - 100.0], -1)

    batch = 120
    attack = DIFGSM(L2(0.1), probability=0.6, rate=0.5, steps=1, loss=losses.margin, momentum=None)
    result = jrobust.run(
        attack, key, linear, np.full((batch, 4, 6), 0.5, np.float32), np.zeros(batch, int)
    )
    # Half the height, or three of four rows, at every place it fits; or the image as it is.
    pictures = [(np.eye(4), np.eye(6))]
    for size in (2, 3):
        for top in range(4 - size + 1):
            for left in range(int(6 - 1.5 * size) + 1):
                rows = interpolation(4, size, top)
                pictures.append((rows, interpolation(6, 1.5 * size, left)))
    assert len(pictures) == 1 + 3 * 4 + 2 * 2
    ways = np.stack([rows.T @ w @ columns for rows, columns in pictures])
    ways /= np.linalg.norm(ways, axis=(1, 2), keepdims=True)
    found = (np.float64(result.x) - 0.5) / 0.1
    apart = np.abs(found[:, None] - ways[None]).max((2, 3))
    assert np.all(apart.min(1) < 1e-4), "each is one of them"
    counts = np.bincount(apart.argmin(1), minlength=len(ways))
    assert abs(counts[0] - 0.4 * batch) < 4 * np.sqrt(0.24 * batch)
    assert abs(counts[1:13].sum() - 0.3 * batch) < 4 * np.sqrt(0.21 * batch)
    assert np.all(counts[13:] > 0)
    assert np.mean(counts > 0) > 0.7


# ---------------------------------------------------------------------------- variance tuning


@pytest.mark.parametrize(
    ("kind", "moment"), [(Linf, 1 / 3), pytest.param(L2, 1 / 6, marks=pytest.mark.full)]
)
def test_the_gradient_is_tuned_by_the_mean_around_the_last_point(kind, moment, key):
    """On b x + x^3 / 3 around 0.5 the mean around differs by the second moment of the ball.

    That is R^2 / 3 in a cube and R^2 / (d + 2) in a Euclidean ball.
    """
    b = np.array([-0.005, -0.0085, -0.0115, -0.02])

    def cubic(x):
        u = x - 0.5
        score = u @ np.float32(b) + jnp.sum(u**3, -1) / 3
        return jnp.stack([jnp.zeros_like(score), score - 100.0], -1)

    eps, beta = (0.1, 1.5) if kind is Linf else (0.2, 1.0)
    attack = VMIFGSM(
        kind(eps), neighbours=256, beta=beta, steps=2, momentum=None, loss=losses.margin
    )
    x = np.full((BATCH, 4), 0.5, np.float32)
    result = jrobust.run(attack, key, cubic, x, np.zeros(BATCH, int))

    def unit(g):
        return np.sign(g) if kind is Linf else g / np.linalg.norm(g)

    first = eps / 2 * unit(b)
    tuned = b + first**2 + moment * (beta * eps) ** 2
    second = first + eps / 2 * unit(tuned)
    assert np.any(np.sign(tuned) != np.sign(b + first**2)), "or MI-FGSM would do the same"
    tolerance = 1e-6 if kind is Linf else 0.05 * eps
    np.testing.assert_allclose(result.x - x, np.tile(second, (BATCH, 1)), atol=tolerance)
    if kind is L2:
        assert np.max(np.abs(first + eps / 2 * unit(b + first**2) - second)) > 3 * tolerance
        assert len(np.unique(np.asarray(result.x)[:, 0])) == BATCH, "each has its own neighbours"


# ---------------------------------------------------------------------------- the contract

ALL = TransferPGD(
    Linf(0.1),
    steps=3,
    keep="loss",
    nesterov=True,
    neighbours=2,
    transforms=(ScaledCopies(2), DiverseInput(rate=0.5)),
    kernel=SKEWED,
)


def test_an_example_is_the_same_beside_others(key):
    ids = np.arange(BATCH) + 7
    whole = jrobust.run(ALL, key, net, X, Y, ids=ids)
    rows = np.array([4, 1, 1, 0, 4, 1])
    mixed = jrobust.run(ALL, key, net, X[rows], Y[rows], ids=ids[rows])
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(mixed, name), np.asarray(getattr(whole, name))[rows])
    other = jrobust.run(ALL, key, net, X, Y, ids=ids + 1)
    assert np.all(np.abs(other.x - whole.x).max((1, 2, 3)) > 1e-4), "its draws are its own"
    assert ALL.random
    assert not SINIFGSM(Linf(0.1)).random

    logits = np.asarray(net(whole.x))
    np.testing.assert_array_equal(whole.success, logits.argmax(1) != Y)
    np.testing.assert_allclose(whole.loss, losses.cross_entropy(logits, Y), rtol=1e-4)
    assert np.all(whole.distance <= 0.1)
    # Of the point itself, and of two copies ahead and of two neighbours, in three steps; the last.
    assert np.all(whole.forwards == 3 * (1 + 2 + 4) + 1)
    assert np.all(whole.backwards == 3 * (2 + 4))


def passes(jaxpr, times=1):
    """How often a program goes through :func:`marked`, forward and backward."""
    counts = np.zeros(2, int)
    for equation in jaxpr.eqns:
        name, repeats = equation.primitive.name, equation.params.get("length", 1)
        counts += times * np.array([name == "erf_inv", name == "lgamma"])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            counts += passes(inner, times * (repeats if name == "scan" else 1))
    return counts


@jax.custom_vjp
def marked(x):
    return jax.lax.erf_inv(net(x))


marked.defvjp(lambda x: (marked(x), x), lambda x, slope: (jax.lax.lgamma(x),))


@pytest.mark.parametrize(
    ("attack", "want"),
    [
        (NIFGSM(Linf(0.1)), (2, 1)),
        (SINIFGSM(Linf(0.1)), (6, 5)),
        (DIFGSM(Linf(0.1)), (2, 1)),
        (TIFGSM(Linf(0.1)), (1, 1)),
        (VMIFGSM(Linf(0.1)), (21, 21)),
        (VNIFGSM(Linf(0.1)), (22, 21)),
    ],
    ids=["NI", "SINI", "DI", "TI", "VMI", "VNI"],
)
def test_a_step_is_charged_what_it_spends(attack, want):
    """As traced, loops by their lengths."""
    said = []

    def look(state):
        *seen, forwards, backwards = attack._look(marked, state, gradient=True, sure=True)
        said.append((forwards, backwards))
        return seen

    program = jax.make_jaxpr(look)(jax.eval_shape(opened, attack))
    assert said == [want]
    assert tuple(passes(program.jaxpr)) == want


def opened(attack):
    return attack.init(jax.random.split(jax.random.key(0), BATCH), jnp.asarray(X), jnp.asarray(Y))


def test_published_defaults():
    assert (NIFGSM(Linf(1.0)).steps, NIFGSM(Linf(1.0)).momentum) == (10, 1.0)
    assert len(SINIFGSM(Linf(1.0)).transforms[0](None, X)) == 5
    assert (VNIFGSM(Linf(1.0)).neighbours, VMIFGSM(Linf(1.0)).beta) == (20, 1.5)
    assert (DIFGSM(Linf(1.0)).transforms[0].probability, len(TIFGSM(Linf(1.0)).kernel)) == (0.5, 15)
    density = np.exp(-0.5 * np.linspace(-3, 3, 15) ** 2)
    np.testing.assert_allclose(TIFGSM(Linf(1.0)).kernel, density / density.sum(), rtol=1e-6)
    # They add to what is given.
    both = SINIFGSM(Linf(1.0), transforms=(DiverseInput(),))
    assert [type(t) for t in both.transforms] == [ScaledCopies, DiverseInput]
    both = DIFGSM(Linf(1.0), transforms=(ScaledCopies(),))
    assert [type(t) for t in both.transforms] == [ScaledCopies, DiverseInput]


def test_a_black_box_is_refused_before_it_is_asked(key):
    asked = []
    box = drive.Host(lambda x: asked.append(x) or np.zeros((len(x), 4)))
    for attack in (NIFGSM(Linf(0.1)), VMIFGSM(Linf(0.1)), TransferPGD(Linf(0.1))):
        with pytest.raises(TypeError, match="TransferPGD needs gradients"):
            jrobust.run(attack, key, box, X, Y)
    assert not asked


@pytest.mark.full
def test_a_model_that_draws(key):
    """Copies are charged with its draws, the point itself with its votes too."""

    def noisy(keys, x):
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        return net(x + 0.01 * noise)

    model = randomized(noisy, jax.random.key(1), samples=2, votes=3)
    attack = SINIFGSM(Linf(0.1), copies=2, steps=2)
    result = jrobust.run(attack, key, model, X, Y)
    assert np.all(result.forwards == 2 * (2 * 2 + 2 + 3) + 2 + 3)
    assert np.all(result.backwards == 2 * 2 * 2)
    np.testing.assert_array_equal(result.success, model(result.x).argmax(-1) != Y)
    assert np.mean(result.success) > 0.5


REFUSED = {
    "neighbours in L0": (VMIFGSM(L0(2)), X, TypeError, "L0 has not"),
    "estimator": (
        TransferPGD(Linf(0.1), estimator=jrobust.zeroth_order.RGE(0.1, 2)),
        X, ValueError, "estimator= goes with PGD",
    ),
    "nothing to look along": (NIFGSM(Linf(0.1), momentum=None), X, ValueError, "momentum, which"),
    "half a neighbour": (VMIFGSM(Linf(0.1), neighbours=0.5), X, ValueError, "number of points"),
    "negative beta": (VMIFGSM(Linf(0.1), beta=-1.0), X, ValueError, "beta must not be negative"),
    "a list": (
        TransferPGD(Linf(0.1), transforms=[DiverseInput()]), X, TypeError, "must be a tuple",
    ),
    "a function": (
        TransferPGD(Linf(0.1), transforms=(net,)), X, TypeError, "must hold Transforms",
    ),
    "no image": (DIFGSM(Linf(0.1)), X.reshape(BATCH, -1), ValueError, r"needs images .*\(6, 40\)"),
    "no copies": (SINIFGSM(Linf(0.1), copies=0), X, ValueError, "copies must be a positive int"),
    "probability": (DIFGSM(Linf(0.1), probability=1.5), X, ValueError, r"in \[0, 1\], got 1.5"),
    "rate": (DIFGSM(Linf(0.1), rate=1.0), X, ValueError, r"in \(0, 1\), got 1.0"),
    "nothing to smooth": (
        TIFGSM(Linf(0.1)), X.reshape(BATCH, -1), ValueError, "kernel needs images",
    ),
    "even kernel": (TIFGSM(Linf(0.1), kernel=np.ones(4)), X, ValueError, "odd number of weights"),
    "square kernel": (TIFGSM(Linf(0.1), kernel=np.ones((3, 3))), X, ValueError, "odd number of"),
    "an optimiser that was made": (
        PGD(Linf(0.1), optimizer=optax.adam(0.01)), X, TypeError, "optimizer=optax.adam, step_size",
    ),
    "momentum twice": (
        PGD(Linf(0.1), optimizer=optax.adam, momentum=1.0), X, ValueError, "momentum or optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name, key):
    attack, x, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        jrobust.run(attack, key, net, x, Y)


# ---------------------------------------------------------------------------- optimisers


def adam64(x0, threat, rates, steps):
    x, first, second = np.float64(x0), 0.0, 0.0
    for t in range(1, steps + 1):
        g = -evaluate64(x, Y)[1]
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        step = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        x = np.clip(x - rates[t - 1] * step, X - threat, X + threat)
    return x


def decaying(size):
    return optax.adam(optax.cosine_decay_schedule(size, 6))


def test_adam_is_adam_in_float64_and_schedules_count_moves(key):
    rates = np.float32([0.01, 0.02, 0.03, 0.01, 0.02, 0.03])
    attack = PGD(
        Linf(0.05), steps=6, step_size=rates, optimizer=decaying, random_start=False, keep="last"
    )
    result = jrobust.run(attack, key, net, X, Y)
    rates, cosine = rates[:, None, None, None], 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6))
    want = adam64(X, 0.05, [rates * share for share in cosine], 6)
    np.testing.assert_allclose(result.x, want, atol=2e-5)
    assert np.max(np.abs(want - adam64(X, 0.05, [rates] * 6, 6))) > 0.01


def test_the_optimiser_of_a_lane_counts_its_own_moves():
    """Rows at different steps, as when lanes are refilled: a schedule that ends after one move."""
    attack = PGD(L2(0.5), steps=3, step_size=0.05, optimizer=once, keep="last", random_start=False)
    fresh = jax.jit(opened)(attack)
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(fresh))
    step = jax.jit(lambda state: attack.step(net, state))
    ahead = step(fresh)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:3], b[3:]]), ahead, fresh)
    moved = step(mixed)
    change = np.abs(moved.x - mixed.x).reshape(BATCH, -1).max(1)
    assert np.all(change[:3] == 0)
    np.testing.assert_array_equal(moved.x[3:], ahead.x[3:])
    assert np.all(change[3:] > 1e-3)


def once(size):
    return optax.sgd(lambda count: jnp.where(count == 0, size, 0.0))


def test_equal_attacks_share_a_program_and_numbers_are_leaves(key):
    traces = []

    def model(x):
        traces.append(x)
        return net(x)

    def attack(size):
        return TransferPGD(
            Linf(0.1), steps=2, momentum=None, step_size=size, optimizer=optax.sgd, nesterov=False,
            transforms=(DiverseInput(probability=size),), kernel=gaussian_kernel(3),
        )  # fmt: skip

    jrobust.run(attack(0.5), key, model, X, Y)
    first = len(traces)
    other = jrobust.run(attack(0.7), key, model, X, Y)
    assert len(traces) == first
    assert np.all(np.isfinite(other.x))


def unguarded(size):
    return optax.adam(size, eps=0.0)


def test_an_optimiser_that_divides_by_zero_leaves_the_point_where_it_was(key):
    attack = PGD(Linf(0.1), steps=2, optimizer=unguarded, keep="last", random_start=False)
    flat = jrobust.run(attack, key, lambda x: 0.0 * net(x) + np.eye(4, dtype=np.float32)[:1], X, Y)
    np.testing.assert_array_equal(flat.x, X)


def test_runs_under_shard_map(key):
    attack = TransferPGD(
        Linf(0.1), steps=2, momentum=None, optimizer=optax.adam, step_size=0.05, neighbours=2,
    )  # fmt: skip
    x, y = jnp.concatenate([X, X[:2]]), jnp.concatenate([Y, Y[:2]])

    def call(x, y, ids):
        return attack(key, net, x, y, ids=ids).x

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    sharded = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows))
    want = jrobust.run(attack, key, net, x, y)
    np.testing.assert_allclose(sharded(x, y, jnp.arange(8)), want.x, atol=1e-5)


def test_the_page_runs_as_it_stands():
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "transfer-attacks.md"
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
    assert names["found"].success.shape == (1, 1, 64)
