"""Debugging: curves against closed forms and the attack itself, and NaNs planted on purpose."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrobust
from jrobust import attacks, debug, drive, losses, models, report, training
from jrobust.attacks import PGD
from jrobust.threat import L2, Linf
from jrobust.zeroth_order import CGE, RGE

RNG = np.random.default_rng(0)
B, D = 6, 4
W = np.float32(RNG.normal(size=(D, 3)))
X = np.float32(RNG.uniform(0.2, 0.8, (B, D)))
KEY = jax.random.key(5)


@jax.jit
def net(x):
    return jnp.tanh((x - 0.5) @ W) @ W[:3] * 4


Y = np.asarray(net(X)).argmax(1)

# ----------------------------------------------------------------------------------- curves


def test_curves_of_a_linear_model_are_straight_lines():
    """The margin grows by step * |w|_1 a move, along a gradient that never changes."""
    x = np.float64(X - np.float32(0.5))
    w = np.float32([[1, -1], [-2, 2], [0.5, -0.5], [3, -3]])
    slope = 13.0  # the L1 norm of the difference of the columns
    y = (x @ w).argmax(1)
    attack = PGD(Linf(0.3), steps=4, step_size=0.01, random_start=False, loss=losses.margin)
    _, t = debug.trace(attack, KEY, lambda x: (x - 0.5) @ w, X, y)
    margin = -np.abs(x @ w @ [1, -1])
    moves = np.arange(5)[:, None] * np.ones((1, B))
    first = np.ceil(-margin / (0.01 * slope) + 1e-9)  # the first point on the other side
    active = moves <= first
    assert first.min() <= 4 < first.max(), "some fall on the way, some never"
    np.testing.assert_array_equal(t.active, active)
    np.testing.assert_array_equal(np.isnan(t.loss), ~active)
    for got, want in (
        (t.loss, margin + moves * 0.01 * slope),
        (t.distance, moves * 0.01),
        (t.gradient[:4], np.full((4, B), np.linalg.norm(w @ [1, -1]))),
        (t.move, np.where(moves < np.minimum(first, 4), 0.01, 0)),
    ):
        here = active[: len(got)]
        np.testing.assert_allclose(got[here], want[here], rtol=1e-4, atol=1e-5)
    assert np.all(np.isnan(t.gradient[4])), "no gradient at the last points"
    np.testing.assert_array_equal(t.success, moves >= first)
    np.testing.assert_array_equal(t.done, moves >= np.minimum(first, 4))
    other = np.where(moves >= first, 1 - y, y)
    np.testing.assert_array_equal(t.prediction[active], other[active])
    assert set(t.member) == {"PGD"}


WAYS = {
    "loss": PGD(L2(0.15), steps=3, keep="loss"),
    "restarts": attacks.restarts(PGD(Linf(0.06), steps=2), 3),
    "nested": attacks.union(
        PGD(L2(0.15), steps=2),
        attacks.sequence(attacks.FGSM(Linf(0.03)), attacks.restarts(PGD(Linf(0.08), steps=2), 2)),
    ),
}
MORE = {
    "success": PGD(Linf(0.1), steps=3),
    "last": PGD(Linf(0.1), steps=3, keep="last"),
    "sequence": WAYS["nested"].attacks[1],
    "union": attacks.union(attacks.FGSM(Linf(0.05)), PGD(L2(0.15), steps=2)),
    "estimated": PGD(Linf(0.1), steps=2, estimator=RGE(1e-3, 4)),
}


@pytest.mark.parametrize(
    "name", [*WAYS, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]
)
def test_looking_changes_nothing(name):
    attack, ids = (WAYS | MORE)[name], np.arange(B) + 3
    want = jrobust.run(attack, KEY, net, X, Y, ids=ids)
    result, t = debug.trace(attack, KEY, net, X, Y, ids=ids)
    for field, a, b in zip(want._fields, want, result):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=field)
    assert 0 < want.success.mean() < 1
    # The account adds up.
    moving = np.where(t.active, t.move > 0, False)
    if name != "estimated":
        np.testing.assert_array_equal(t.active.sum(0), want.forwards)
        np.testing.assert_array_equal(moving.sum(0) <= want.backwards, True)
    assert np.all(t.gradient[moving] > 0)
    np.testing.assert_array_equal(t.success[-1], want.success)
    np.testing.assert_array_equal(t.success, np.maximum.accumulate(t.success))
    assert np.all(t.done[-1])
    wrong = t.active & (t.prediction != Y)
    np.testing.assert_array_equal(wrong.any(0) & t.success[-1], want.success)
    fell = np.asarray(want.success)
    if name in ("success", "restarts", "last", "loss"):
        evaluated = np.cumsum(t.active, 0) - 1
        at = wrong.argmax(0)
        np.testing.assert_array_equal(evaluated[at, np.arange(B)][fell], want.step[fell])
    if name == "loss":
        np.testing.assert_allclose(np.nanmax(t.loss, 0), want.loss, rtol=1e-6)
    if name == "last":
        np.testing.assert_allclose(t.loss[-1], want.loss, rtol=1e-6)
        np.testing.assert_allclose(t.distance[-1], want.distance, rtol=1e-6)
    pair = ["0 PGD", "1 PGD"]
    nested = ["0 PGD", "1 0 PGD", "1 1 PGD"]
    members = {"sequence": pair, "union": pair, "nested": nested}
    assert sorted(set(t.member)) == members.get(name, ["PGD"])


@pytest.mark.full
def test_the_draws_of_a_randomised_model_are_those_of_the_attack():
    def noisy(keys, x):
        return net(x + 0.02 * jax.vmap(lambda k: jax.random.normal(k, (D,)))(keys))

    model = models.randomized(noisy, KEY, samples=2, votes=2)
    attack = PGD(Linf(0.05), steps=2, keep="loss")
    want = jrobust.run(attack, KEY, model, X, Y)
    result, t = debug.trace(attack, KEY, model, X, Y)
    np.testing.assert_allclose(result.x, want.x, atol=1e-6)
    # The mean over fresh draws, which differ from point to point, at the point that is kept.
    np.testing.assert_allclose(t.loss.max(0), want.loss, rtol=1e-5)


def test_curves_go_into_a_report():
    _, t = debug.trace(WAYS["loss"], KEY, net, X, Y)
    curves = t.curves()
    assert list(curves) == [f"example {i}" for i in range(B)]
    for i, (rows, values) in enumerate(curves.values()):
        np.testing.assert_array_equal(values, t.loss[: len(rows), i])
        assert len(rows) == t.active[:, i].sum()
    figure = report.plot_curves(t.curves([1, 4]), "evaluations", "loss")
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(drawn) == ["example 1", "example 4"]
    np.testing.assert_allclose(drawn["example 4"], curves["example 4"][1])


def test_a_black_box_is_asked_no_more_than_without_looking():
    asked = []

    def box(x):
        asked.append(x.copy())
        return np.tanh((x - 0.5) @ W) @ W[:3] * 4

    attack = attacks.restarts(PGD(Linf(0.1), steps=2, estimator=CGE(1e-3)), 2)
    want = jrobust.run(attack, KEY, drive.Host(box), X, Y)
    before = asked.copy()
    asked.clear()
    result, t = debug.trace(attack, KEY, drive.Host(box), X, Y)
    assert len(asked) == len(before) > 3
    for a, b in zip(asked, before):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(want, result):
        np.testing.assert_array_equal(a, b)
    assert t.loss.shape[0] > 3
    assert np.isfinite(t.loss[t.active]).all()


def test_lanes_of_a_black_box_that_part_are_each_counted():
    """One ends a round later, and the others are in the next member by then."""
    estimator, rng = CGE(1e-2), np.random.default_rng(0)
    w = rng.normal(size=(4, 3)).astype(np.float32)
    x = rng.uniform(0.2, 0.8, (2, 4)).astype(np.float32)
    tiny = Linf(0.001)
    first = attacks.CWLinf(
        tiny, steps=3, step_size=0.25, constant=20.0, largest_constant=90.0, smallest_tau=0.3,
        keep="success", estimator=estimator,
    )  # fmt: skip
    attack = attacks.sequence(first, PGD(tiny, steps=1, estimator=estimator))
    box = drive.Host(lambda x: np.tanh(x @ w))
    result, t = debug.trace(attack, KEY, box, x, np.argmax(x @ w, 1))
    one, two = (t.active[t.member == name].sum(0) for name in ("0 CWLinf", "1 PGD"))
    np.testing.assert_array_equal(two, [2, 2])
    queries = estimator.queries(x[0])
    np.testing.assert_array_equal(result.forwards, (one - 1 + two - 1) * queries + 2)
    assert one[0] > one[1]


def test_eager_steps_see_arrays():
    seen = []

    def model(x):
        if not isinstance(x, jax.core.Tracer):
            seen.append(np.asarray(x))
        return net(x)

    attack = attacks.restarts(PGD(Linf(0.06), steps=2), 2)
    want = jrobust.run(attack, KEY, net, X, Y)
    points = []
    for step in debug.steps(attack, KEY, model, X, Y, eager=True):
        assert len(seen) == len(points) + 1, "once for each evaluation"
        np.testing.assert_array_equal(seen[-1], step.before.x)
        points.append(step.before.x)
        assert not isinstance(step.after.x, jax.core.Tracer)
    np.testing.assert_array_equal(attack.result(step.state).success, want.success)
    np.testing.assert_allclose(attack.result(step.state).x, want.x, atol=1e-5)
    result, t = debug.trace(attack, KEY, model, X, Y, eager=True)
    np.testing.assert_array_equal(result.success, want.success)
    assert len(t.loss) == len(points)

    # Gradient estimators loop over their queries: in Python too.
    seen.clear()
    estimated = PGD(Linf(0.1), steps=1, estimator=CGE(1e-3, chunk=2))
    list(debug.steps(estimated, KEY, model, X, Y, eager=True))
    assert len(seen) == 2 + 2 * D


# ---------------------------------------------------------------------- the first non-finite value

# Attacks on these models move every feature by 0.03 a step, upwards.
START = np.full((4, 2), 0.5, np.float32)
START[2, 0], START[3, 0] = 0.7, 0.6
ONES = np.ones(4, int)
UP = PGD(Linf(0.3), steps=6, step_size=0.03, random_start=False, keep="loss")


def rising(x):
    """Logits whose cross entropy for class 1 rises with every feature."""
    total = 3 * x.sum(1)
    return jnp.stack([total, 4 - total], 1)


def line_of(fn, text):
    lines, first = inspect.getsourcelines(fn)
    return first + next(i for i, line in enumerate(lines) if text in line)


def gate(x):
    with jax.named_scope("gate"):
        return rising(x) + 0 * jnp.sqrt(0.75 - x[:, :1])


def assert_from(equation, primitive, fn, text):
    assert equation.primitive == primitive
    assert f"{__file__}:{line_of(fn, text)}:" in equation.source


def test_logits_that_turn_nan_on_the_way():
    """Example 2 passes 0.75 at its second move, example 3 at its sixth, the others never."""
    found = debug.first_non_finite(UP, KEY, gate, START, ONES)
    assert found[:4] == (2, 2, "logits", "PGD")
    assert_from(found.equation, "sqrt", gate, "jnp.sqrt")
    assert found.equation.layer == "gate"
    late, never = START.copy(), np.full_like(START, 0.5)
    late[2] = 0.5
    assert debug.first_non_finite(UP, KEY, gate, late, ONES)[:2] == (6, 3)
    assert debug.first_non_finite(UP, KEY, gate, never, ONES) is None


def confident(x):
    return gate(x) + jnp.float32([[0, 10]])


def test_a_later_member_of_a_composition():
    alone = PGD(Linf(0.3), steps=6, step_size=0.03, random_start=False)
    twice = attacks.sequence(attacks.FGSM(Linf(0.01)), alone)
    found = debug.first_non_finite(twice, KEY, confident, START, ONES)
    assert found[:4] == (2, 2, "logits", "1 PGD")


def test_an_example_that_has_ended_cannot_be_at_fault():
    """Example 2 is misclassified from the start, and its point stays where it is."""
    attack = PGD(Linf(0.3), steps=6, step_size=0.03, random_start=False)
    assert debug.first_non_finite(attack, KEY, confident, START[:3], ONES[:3]).example == 2
    y = np.array([1, 1, 0])
    assert debug.first_non_finite(attack, KEY, confident, START[:3], y) is None


def near(x):
    """The features of the boundary add up to 4 / 3: example 2 has to pass 0.75."""
    return gate(x) + jnp.float32([[0, 4]])


def test_attacks_without_a_gradient_of_the_loss():
    fab = attacks.FAB(L2(1.0), steps=3, refine=0)
    _, t = debug.trace(fab, KEY, near, START[:2], ONES[:2])
    moved = t.active & (t.move > 0)
    np.testing.assert_allclose(t.gradient[moved], 6 * np.sqrt(2), rtol=1e-4)  # of the boundary
    assert moved[0].all()
    found = debug.first_non_finite(fab, KEY, near, START, ONES)
    assert found[:4] == (1, 2, "logits", "FAB")
    assert_from(found.equation, "sqrt", gate, "jnp.sqrt")
    square = attacks.Square(Linf(0.1), queries=9)
    found = debug.first_non_finite(square, KEY, near, START, ONES)
    walk = [step.before.x[2, 0] for step in debug.steps(square, KEY, near, START, ONES)]
    assert found[:4] == (np.argmax(np.array(walk) > 0.75), 2, "logits", "Square")
    assert max(walk) > 0.75
    _, t = debug.trace(square, KEY, near, START[:2], ONES[:2])
    assert np.isnan(t.gradient).all()
    assert np.isfinite(t.loss[t.active]).all()


def test_the_draws_of_a_fixed_draw_stay_those_of_their_rows():
    def shaken(keys, x):
        return near(x + 0.01 * jax.vmap(lambda key: jax.random.bernoulli(key))(keys)[:, None])

    model = models.randomized(shaken, KEY).at(jrobust.keys.examples(KEY, jnp.arange(4)))
    found = debug.first_non_finite(UP, KEY, model, START, ONES)
    assert found[:3] in ((1, 2, "logits"), (2, 2, "logits"))
    assert_from(found.equation, "sqrt", gate, "jnp.sqrt")


def plunging(logits, y):
    return -jnp.log(1.27 - logits[:, 0] / 3)


def edge(x):
    return rising(x) * (1 + 1e-9 * jnp.sqrt(jnp.maximum(0.75 - x[:, :1], 0)))


@jrobust.algorithm
class Stumbling(PGD):
    def move(self, state, loss, gradient):
        x, inner = super().move(state, loss, gradient)
        return x / (2 - state.t)[:, None], inner


@jrobust.algorithm
class Starting(PGD):
    def start(self, record):
        x, inner = super().start(record)
        return jnp.log(x[:, ::-1] - 0.55), inner


@pytest.mark.parametrize(
    ("kind", "model", "want", "primitive", "source", "text"),
    [
        # The sum of the features of example 2 starts at 1.2 and rises by 0.06.
        (PGD, rising, (2, 2, "loss", "PGD"), "log", plunging, "jnp.log"),
        # Beyond 0.75 the derivative is infinity times zero.
        (PGD, edge, (2, 2, "gradient", "PGD"), "div", edge, "jnp.sqrt"),
        (Stumbling, rising, (2, 0, "move", "Stumbling"), "div", Stumbling, "state.t"),
        (Starting, rising, (0, 0, "start", "Starting"), "log", Starting, "jnp.log"),
    ],
    ids=["loss", "gradient", "move", "start"],
)
def test_where_it_comes_from(kind, model, want, primitive, source, text):
    loss = plunging if want[2] == "loss" else losses.cross_entropy
    attack = kind(Linf(0.3), steps=4, step_size=0.03, random_start=False, keep="last", loss=loss)
    found = debug.first_non_finite(attack, KEY, model, START, ONES)
    assert found[:4] == want
    assert_from(found.equation, primitive, source, text)


def test_parameters_and_layers_are_named():
    network = models.network(models.SmallCNN(widths=(2, 2), hidden=3, classes=3, norm=True))
    x = np.float32(RNG.uniform(size=(2, 4, 4, 1)))
    params, extra = jax.jit(network.init)(KEY, x)
    attack = attacks.FGSM(Linf(0.1))
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["conv2"]["kernel"] = broken["conv2"]["kernel"].at[0].set(jnp.nan)
    found = debug.first_non_finite(attack, KEY, network.bind(broken, extra), x, ONES[:2])
    assert found.equation == debug.Equation("argument", ".params['conv2']['kernel']", "")
    extra["batch_stats"]["norm2"]["var"] -= 2
    found = debug.first_non_finite(attack, KEY, network.bind(params, extra), x, ONES[:2])
    assert found[:3] == (0, 0, "logits")
    assert found.equation.primitive == "rsqrt"
    assert found.equation.layer.endswith("norm2")


# -------------------------------------------------------------------- training, and inner programs


def root(x):
    return jnp.sqrt(x)


@jax.custom_jvp
def ruled(x):
    return root(x)


ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0]))


def masked(x):
    """An infinity that a mask hides is not at fault."""
    scores = jnp.where(jnp.arange(3)[None] == 1, -jnp.inf, jnp.ones((1, 3)) * x[:, None])
    return jax.nn.softmax(scores)[:, 0] * jnp.log(jnp.abs(x) * 0)[:0].sum() + root(x)


def scanned(x):
    """From the right: 4 passes -1 to the second turn, 10 and 11 pass more than 0."""
    turns = jnp.float32([0, 0, 3])
    return jax.lax.scan(lambda c, i: (root(c) - i, i), x + 9, turns, reverse=True)[0]


def turning(x):
    """1 passes -0.5 to the second turn, 7 and 8 pass more than 0."""
    return jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, root(c[1]) - 1.5), (0, x + 6)
    )[1]


INNER = {
    "jit": jax.jit(root),
    "remat": jax.checkpoint(root),
    "custom_jvp": ruled,
    "cond": lambda x: jax.lax.cond(x.sum() < 100, root, lambda x: x, x),
    "scan": scanned,
    "map": lambda x: jax.lax.map(lambda row: root(row), x),
    "while": turning,
    "masked": masked,
    "first of two": lambda x: root(x) + jnp.log(x),
}


@pytest.mark.parametrize("name", INNER)
def test_the_operation_is_found_inside_programs(name):
    def update(state, batch):
        return state + 1, {"total": jnp.sum(INNER[name](batch["x"]))}

    batches = [{"x": jnp.ones(4)}, {"x": jnp.ones(4)}, {"x": jnp.array([1.0, 2.0, -5.0, 1.0])}]
    found = debug.first_non_finite_update(update, jnp.zeros(()), batches)
    assert (found.update, found.where, found.examples) == (2, ("metrics['total']",), (2,))
    assert_from(found.equation, "sqrt", root, "jnp.sqrt")


def test_a_mask_that_hides_everything():
    def update(state, batch):
        scores = jnp.where(batch[:, None] < jnp.arange(3.0)[None], 1.0, -jnp.inf)
        top = scores.max(1, keepdims=True)
        return state, {"total": jnp.exp(scores - top).sum()}

    found = debug.first_non_finite_update(update, 0.0, [jnp.ones(2), jnp.array([0.0, 2.0])])
    assert (found.update, found.examples) == (1, (1,))
    assert_from(found.equation, "sub", update, "scores - top")


def test_the_first_bad_update_of_a_training_run():
    x = jnp.asarray(RNG.uniform(size=(5, 3)), jnp.float32)
    network = models.network(models.MLP(features=(4,), classes=3))
    init, update = training.step(training.Standard(), optax.sgd(0.1))
    state = init(KEY, network, x)
    batches = [training.batch(x, jnp.arange(5) % 3) for _ in range(3)]
    assert debug.first_non_finite_update(update, state, batches) is None
    batches[1] = batches[1]._replace(x=x.at[jnp.array([3, 4]), 0].set(jnp.inf))
    found = debug.first_non_finite_update(update, state, batches)
    assert (found.update, found.examples) == (1, (3, 4))
    assert {"metrics['loss']", "state.params['dense1']['kernel']"} <= set(found.where)
    assert not any("step" in name for name in found.where)
    assert found.equation == debug.Equation("argument", ".x", "")


# ----------------------------------------------------------------------------------- mistakes


def test_mistakes_get_a_clear_error():
    with pytest.raises(ValueError, match="eps"):
        debug.steps(PGD(Linf(3.0)), KEY, net, X, Y)  # before the first step is asked for

    class Foreign(attacks.Attack):
        stops_at_success = True
        threats = PGD.threats
        threat = Linf(0.1)

        def init(self, keys, x, y, targets=None):
            return jnp.zeros_like(y)

        def done(self, state):
            return state > 0

        def step(self, logits_fn, state, judge=None):
            return state + 1

        def result(self, state):
            raise NotImplementedError

    foreign = jax.tree_util.register_static(Foreign)()
    with pytest.raises(TypeError, match="cannot look into Foreign"):
        debug.trace(foreign, KEY, net, X, Y)
