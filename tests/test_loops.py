"""The pipelines on models whose right answers are known: every example once, nothing else."""

import csv
import gc
import json
import re
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jrobust
from jrobust import loops, losses, models, parallel, smoothing, training
from jrobust._algorithm import algorithm, static
from jrobust.attacks import FGSM, PGD, restarts, sequence, union
from jrobust.checkpoint import Checkpoints
from jrobust.data import Dataset
from jrobust.drive import Host
from jrobust.loops import _programs
from jrobust.models import Bound, Network
from jrobust.threat import L2, Linf
from jrobust.zeroth_order import CGE

KEY = jax.random.key(11)
ONE = parallel.mesh(jax.devices()[:1])
N, D = 21, 4
TRACES = []


def linear(params, extra, x):
    TRACES.append(x.shape)
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None]


WEIGHTS = {
    "w": np.array([[1.0, -0.5], [0.25, 0.5], [-1.0, 0.5], [0.5, 0.75]], np.float32),
    "b": np.array([0.1, -0.1], np.float32),
}


def model(scale=1.0):
    return Bound(jax.tree.map(lambda a: jnp.asarray(scale * a), WEIGHTS), {}, linear)


def problem(n=N, seed=0, wrong=3):
    """Examples of the linear model, the last ``wrong`` of them mislabelled, ids out of order."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, D)).astype(np.float32)
    y = np.argmax(x @ WEIGHTS["w"] + WEIGHTS["b"], 1)
    y[n - wrong :] = 1 - y[n - wrong :]
    return Dataset(x, y, rng.permutation(1000)[:n])


def distances(data, order=1):
    """Minimal perturbation in the dual norm of ``order``: 1 for Linf, 2 for L2; 0 if wrong."""
    x = data.x.astype(np.float64)
    logits = x @ WEIGHTS["w"].astype(np.float64) + WEIGHTS["b"]
    margin = np.take_along_axis(logits, data.y[:, None], 1)[:, 0]
    margin -= np.take_along_axis(logits, 1 - data.y[:, None], 1)[:, 0]
    slope = WEIGHTS["w"].astype(np.float64) @ [1, -1]
    return np.maximum(margin, 0) / np.linalg.norm(slope, order)


def between(values, place):
    """A radius in the widest gap near ``place`` of the sorted distances."""
    values = np.sort(values)
    i = max(
        range(max(place - 2, 0), min(place + 3, len(values) - 1)),
        key=lambda i: values[i + 1] - values[i],
    )
    return float(values[i : i + 2].mean())


def box(eps, norm=Linf):
    return norm(eps, -10.0, 10.0)


DATA = problem()
DISTANCE = distances(DATA)
EPS = between(DISTANCE, 10)
SMALL = between(DISTANCE, 6)
CORRECT = DISTANCE > 0


def evaluate(attacks, data=DATA, logits_fn=None, **settings):
    settings = {"mesh": ONE, "progress": False, "checks": False, "batch_size": 8, **settings}
    return loops.evaluate(
        KEY, model() if logits_fn is None else logits_fn, data, attacks, **settings
    )


def by_id(report):
    order = np.argsort(report.examples["id"])
    return {name: column[order] for name, column in report.examples.items()} | {
        "x": report.x[order]
    }


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# evaluate


@pytest.mark.parametrize("batch_size", [1, 7, 8, 100])
def test_robust_accuracy_is_the_closed_form(batch_size):
    found = evaluate(FGSM(box(EPS)), batch_size=batch_size)
    standing = DISTANCE > EPS
    assert 3 < standing.sum() < CORRECT.sum() - 3
    columns = found.examples
    np.testing.assert_array_equal(columns["id"], DATA.id)
    np.testing.assert_array_equal(columns["y"], DATA.y)
    np.testing.assert_array_equal(columns["correct"], CORRECT)
    np.testing.assert_array_equal(columns["prediction"], np.where(CORRECT, DATA.y, 1 - DATA.y))
    np.testing.assert_array_equal(columns["robust"], standing)
    np.testing.assert_array_equal(columns["broken_by"], np.where(CORRECT & ~standing, 0, -1))
    flipped = np.where(standing, DATA.y, 1 - DATA.y)
    np.testing.assert_array_equal(columns["adversarial_prediction"], flipped)
    np.testing.assert_array_equal(columns["step"], np.where(CORRECT & ~standing, 1, -1))
    # Nothing is spent on what was wrong from the start: a gradient, and one look at the last point.
    np.testing.assert_array_equal(columns["forwards"], np.where(CORRECT, 2, 0))
    np.testing.assert_array_equal(columns["backwards"], np.where(CORRECT, 1, 0))
    np.testing.assert_array_equal(np.isnan(columns["loss"]), ~CORRECT)
    np.testing.assert_array_equal(found.standing, [CORRECT.sum(), standing.sum()])
    assert found.clean_accuracy == CORRECT.mean()
    assert found.robust_accuracy == standing.mean()
    assert found.table()[1] == [
        ["clean", CORRECT.mean(), CORRECT.sum(), N],
        ["PGD", standing.mean(), standing.sum(), N],
    ]
    assert (found.non_finite, found.near_ties) == (0, 0)
    # What is kept is inside the ball and is misclassified; what stands is as it was.
    moved = np.abs(found.x.astype(np.float64) - DATA.x).max(1)
    assert np.all(moved <= np.float32(EPS))
    np.testing.assert_array_equal(moved > 0, CORRECT & ~standing)
    np.testing.assert_array_equal(np.argmax(model()(found.x), 1), flipped)


def test_an_attack_meets_only_what_stands():
    attacks = [FGSM(box(SMALL)), FGSM(box(EPS))]
    found = evaluate(attacks)
    by = np.where(DISTANCE > EPS, -1, np.where(DISTANCE > SMALL, 1, 0))
    by[~CORRECT] = -1
    np.testing.assert_array_equal(found.examples["broken_by"], by)
    expected = [CORRECT.sum(), (DISTANCE > SMALL).sum(), (DISTANCE > EPS).sum()]
    np.testing.assert_array_equal(found.standing, expected)
    cost = np.where(CORRECT, np.where(by == 0, 2, 4), 0)
    np.testing.assert_array_equal(found.examples["forwards"], cost)
    np.testing.assert_array_equal(found.examples["backwards"], cost // 2)
    assert found.attacks == ("1 PGD", "2 PGD")
    # The other way round the small ball finds nothing new.
    other = evaluate({"large": attacks[1], "small": attacks[0]})
    np.testing.assert_array_equal(other.standing, [expected[0], expected[2], expected[2]])
    assert set(other.examples["broken_by"]) == {-1, 0}
    assert other.attacks == ("large", "small")


@pytest.mark.parametrize("labels", ["all wrong", "all broken"])
def test_nothing_left_standing(labels, tmp_path):
    data = problem(6, wrong=6 if labels == "all wrong" else 0)
    attacks = [FGSM(box(5.0)), PGD(box(5.0), steps=2)]
    found = evaluate(attacks, data, directory=tmp_path)
    assert found.robust_accuracy == 0
    np.testing.assert_array_equal(found.standing, [0 if labels == "all wrong" else 6, 0, 0])
    assert [line["stage"] for line in lines(tmp_path / "metrics.jsonl")] == [
        "clean",
        "1 PGD",
        "2 PGD",
    ]
    assert sorted(int(row["id"]) for row in table(tmp_path / "examples.csv")) == sorted(data.id)
    assert set(found.examples["forwards"]) == {0 if labels == "all wrong" else 2}


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_examples_than_lanes(n):
    data = problem(n, wrong=0)
    eps = 0.5 * distances(data).min()
    for mesh in (ONE, None):
        assert evaluate(FGSM(box(eps)), data, mesh=mesh).robust_accuracy == 1
    assert evaluate(FGSM(box(5.0)), data).robust_accuracy == 0


RANDOM = PGD(box(EPS), steps=3, rel_step_size=0.4)


def test_results_do_not_depend_on_order_batch_or_devices():
    data = problem(37, seed=4)
    order = np.random.default_rng(1).permutation(37)
    one = by_id(evaluate(RANDOM, data))
    for name, column in by_id(evaluate(RANDOM, data[order])).items():
        np.testing.assert_array_equal(column, one[name])  # bit for bit, at the same lanes
    part = evaluate(RANDOM, data[order[:20]])
    position = np.searchsorted(one["id"], part.examples["id"])
    np.testing.assert_array_equal(part.x, one["x"][position])
    for settings in ({"batch_size": 3}, {"batch_size": 64}, {"mesh": None, "batch_size": 64}):
        other = by_id(evaluate(RANDOM, data, **settings))
        for name in ("robust", "correct", "broken_by", "step", "forwards", "backwards"):
            np.testing.assert_array_equal(other[name], one[name])
        np.testing.assert_allclose(other["x"], one["x"], atol=1e-5)


def test_one_attack_finds_what_run_finds():
    found = evaluate(RANDOM)
    direct = jrobust.run(RANDOM, KEY, model(), DATA.x, DATA.y, ids=DATA.id)
    np.testing.assert_array_equal(found.examples["robust"], CORRECT & ~np.asarray(direct.success))
    broken = found.examples["broken_by"] == 0
    np.testing.assert_allclose(found.x[broken], np.asarray(direct.x)[broken], atol=1e-6)
    np.testing.assert_allclose(
        found.examples["distance"][CORRECT], np.asarray(direct.distance)[CORRECT], atol=1e-6
    )
    other = loops.evaluate(
        jax.random.key(1), model(), DATA, RANDOM, mesh=ONE, progress=False, checks=False
    )
    assert np.any(other.x[broken] != found.x[broken])


def test_members_of_a_list_draw_different_starts():
    start = PGD(box(1e-3), steps=1, step_size=1e-9, keep="last")
    seen = []

    class Watch(Host):
        def __call__(self, x):
            seen.append(np.asarray(x))
            return super().__call__(x)

    black = Watch(lambda x: x @ WEIGHTS["w"] + WEIGHTS["b"])
    attack = PGD(start.threat, steps=1, step_size=1e-9, estimator=CGE(1e-3))
    evaluate([attack, attack], problem(4, wrong=0), black)
    starts = [x for x in seen if len(x) == 4]
    assert np.any(starts[1] != starts[len(starts) // 2 + 1])


@pytest.mark.parametrize(
    "attack",
    [
        restarts(PGD(box(EPS), steps=3, rel_step_size=0.7), 2),
        sequence(FGSM(box(SMALL)), PGD(box(EPS), steps=3, rel_step_size=0.7)),
        union(FGSM(box(EPS)), PGD(box(SMALL, L2), steps=2)),
        PGD(box(EPS), steps=3, rel_step_size=0.7, keep="loss"),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_compositions_in_a_loop(attack):
    found = evaluate(attack)
    robust = DISTANCE > EPS
    if isinstance(attack, jrobust.attacks.Union):
        robust &= distances(DATA, 2) > SMALL
    np.testing.assert_array_equal(found.examples["robust"], robust)


@algorithm
class Claims(PGD):
    """Claims success, or failure, of a point right beside the input."""

    claim: bool = static(default=True)

    def result(self, state):
        found = super().result(state)
        success = jnp.full_like(found.success, self.claim)
        return found._replace(x=state.record.x0 + 1e-5, success=success)


def test_a_claim_that_does_not_verify_is_a_near_tie_and_stands(tmp_path):
    found = evaluate([Claims(box(EPS)), FGSM(box(SMALL))], directory=tmp_path)
    assert found.near_ties == CORRECT.sum()
    np.testing.assert_array_equal(found.standing, [CORRECT.sum()] * 2 + [(DISTANCE > SMALL).sum()])
    assert set(found.examples["broken_by"]) == {-1, 1}
    standing = found.examples["robust"]
    np.testing.assert_array_equal(found.x[standing], DATA.x[standing])
    assert set(found.examples["step"][standing]) == {-1}
    assert sorted(int(row["id"]) for row in table(tmp_path / "examples.csv")) == sorted(DATA.id)


def broken_logits(params, extra, x):
    """Not finite at first features above 1 (NaN) and below -1 (infinite)."""
    logits = linear(params, extra, x)
    logits = jnp.where(x[:, :1] > 1, jnp.nan, logits)
    return jnp.where(x[:, :1] < -1, jnp.inf, logits)


def test_logits_that_are_not_finite_are_never_robust(tmp_path):
    data = problem(12, wrong=0)
    x = np.array(data.x)
    x[:3, 0], x[3:5, 0] = 1.5, -1.5  # broken already
    x[5:8, 0] = 0.999  # breakable
    x[8:, 0] *= 0.5
    data = Dataset(x, np.array(np.argmax(x @ WEIGHTS["w"] + WEIGHTS["b"], 1)), data.id)
    # An argmax over NaN is class 0: such an example must not pass for a correct one.
    data.y[:2] = 0
    weak = Bound(model().params, {}, broken_logits)
    eps = 0.01
    keeps = distances(data) > eps
    keeps[5:8] = WEIGHTS["w"][0] @ [1, -1] < 0  # never: FGSM raises the loss away from 1
    attack = PGD(Linf(0.01, -10.0, 10.0), steps=4)
    found = evaluate(attack, data, weak, directory=tmp_path)
    assert not np.any(found.examples["robust"][:5])
    assert not np.any(found.examples["correct"][:5])
    assert set(found.examples["prediction"][:5]) == {-1}
    reached = ~np.isfinite(np.asarray(weak(found.x))).all(1)
    np.testing.assert_array_equal(found.examples["adversarial_prediction"] < 0, reached)
    assert found.non_finite == reached.sum() >= 5
    assert np.any(reached[5:8])
    assert not np.any(found.examples["robust"] & reached)
    assert json.loads((tmp_path / "report.json").read_text())["non_finite"] == reached.sum()


def test_the_files_are_the_report(tmp_path):
    attacks = {"small": FGSM(box(SMALL)), "large": PGD(box(EPS), steps=2)}
    found = evaluate(attacks, directory=tmp_path / "new" / "folder")
    out = tmp_path / "new" / "folder"
    written = sorted(table(out / "examples.csv"), key=lambda row: int(row["id"]))
    expected = by_id(found)
    assert [int(row["id"]) for row in written] == list(expected["id"])
    for name in set(written[0]) - {"id"}:
        column = expected[name]
        values = [row[name] for row in written]
        if column.dtype == bool:
            assert values == [str(bool(v)) for v in column]
        else:
            np.testing.assert_array_equal(np.array(values, column.dtype), column)
    assert lines(out / "metrics.jsonl") == [
        {"stage": name, "accuracy": n / N}
        for name, n in zip(("clean", "small", "large"), found.standing)
    ]
    summary = json.loads((out / "report.json").read_text())
    assert summary["standing"] == dict(zip(("clean", "small", "large"), found.standing.tolist()))
    assert summary["robust_accuracy"] == found.robust_accuracy
    assert summary["clean_accuracy"] == found.clean_accuracy
    assert set(summary["seconds"]) == {"compile", "run", "other"}
    settings = json.loads((out / "configuration.json").read_text())
    assert settings == json.loads(json.dumps(found.configuration))
    assert settings["attacks"]["small"]["threat"] == {
        "name": "Linf",
        "eps": SMALL,
        "lo": -10.0,
        "hi": 10.0,
    }
    arrays = np.load(out / "adversarial.npz")
    np.testing.assert_array_equal(arrays["x"], found.x)
    np.testing.assert_array_equal(arrays["id"], DATA.id)


def test_rows_are_on_disk_before_the_end(tmp_path):
    events = loops.evaluate.iter(
        KEY, model(), DATA, FGSM(box(EPS)), batch_size=8, directory=tmp_path, mesh=ONE
    )
    for _ in range(4):  # three batches of clean predictions, one attacked
        event = next(events)
    assert event.attack == "PGD"
    written = table(tmp_path / "examples.csv")
    assert len(written) > 3
    assert all(row["robust"] == "False" for row in written)
    events.close()


def by_attack(event):
    return CORRECT if event.attack == "clean" else DISTANCE > EPS


def test_events_of_an_evaluation():
    events = list(
        loops.evaluate.iter(KEY, model(), DATA, [FGSM(box(EPS))] * 2, batch_size=8, mesh=ONE)
    )
    clean = CORRECT.sum()
    robust = (DISTANCE > EPS).sum()
    for e in events:
        # Of the first examples without a gap: broken before or by this attack, or not.
        assert e.prefix[0] == by_attack(e)[: e.prefix[1]].sum()
    assert all(e.prefix[1] == N for e in (events[2], events[5], events[-1]))
    assert 0 < events[3].prefix[1] < N
    low, high = events[-1].interval(0.01)
    assert low < robust / N < high
    stages = [(e.attack, e.finished, e.total) for e in events]
    assert stages == [
        *[("clean", n, N) for n in (8, 16, 21)],
        *[("1 PGD", n, clean) for n in (8, 16, 18)],
        *[("2 PGD", min(n, robust), robust) for n in range(8, robust + 8, 8)],
        ("done", N, N),
    ]
    assert [e.report is None for e in events] == [True] * (len(events) - 1) + [False]
    # At most: who has not been looked at may stand.
    assert [e.standing for e in events[:3]] == [N - (~CORRECT[:n]).sum() for n in (8, 16, 21)]
    assert events[5].standing == robust


def test_evaluation_compiles_once_for_all_parameters_radii_and_tails():
    evaluate([FGSM(box(EPS)), RANDOM])
    TRACES.clear()
    evaluate([FGSM(box(0.5 * EPS)), PGD(box(0.1), steps=3, rel_step_size=0.3)], DATA[:13])
    found = evaluate([FGSM(box(EPS)), RANDOM], logits_fn=model(-1.0))
    assert set(TRACES) <= {(13, 4)}  # the shapes of a new data set are checked, nothing compiled
    np.testing.assert_array_equal(found.examples["correct"], ~CORRECT)


def test_a_host_model_is_asked_about_examples_alone():
    data = problem(6, wrong=1)
    asked = []

    def black_box(x):
        asked.append(len(x))
        assert isinstance(x, np.ndarray)
        return x @ WEIGHTS["w"] + WEIGHTS["b"]

    eps = float(0.9 * distances(data)[:5].min())  # nothing breaks: every lane runs to the end
    estimator = CGE(1e-2)
    attack = PGD(box(eps), steps=2, estimator=estimator)
    found = evaluate(attack, data, Host(black_box), batch_size=4)
    assert found.robust_accuracy == 5 / 6
    per_example = 2 * estimator.queries(data.x[0]) + 1
    np.testing.assert_array_equal(found.examples["forwards"], [per_example] * 5 + [0])
    assert sum(asked) == 6 + 5 * per_example
    assert set(asked) <= {1, 2, 4}
    # The same as the traced model, and broken where that is.
    eps = between(distances(data), 3)
    attack = PGD(box(eps), steps=2, rel_step_size=1.0, estimator=estimator)
    host = evaluate(attack, data, Host(black_box), batch_size=4)
    np.testing.assert_array_equal(host.examples["robust"], distances(data) > eps)
    traced = evaluate(attack, data, batch_size=4)
    np.testing.assert_array_equal(host.examples["forwards"], traced.examples["forwards"])
    assert 0 < host.robust_accuracy < 5 / 6


def test_the_rate_shown_counts_the_time_of_the_first_batch(capsys):
    from jrobust.loops._lanes import Bar

    with Bar(True, "image") as bar:
        for stage in ("clean", "attack"):
            time.sleep(0.5)
            bar.update(stage, 10, 10)
    rates = re.findall(r"([0-9.]+)image/s", capsys.readouterr().err)
    assert len(rates) >= 2
    assert all(float(rate) <= 20 for rate in rates)


def test_progress_goes_to_the_error_stream(capsys):
    evaluate(FGSM(box(EPS)), DATA[:4])
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    evaluate({"mine": FGSM(box(EPS))}, DATA[:4], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "clean: 100%" in err
    assert "mine: 100%" in err
    assert "accuracy=" in err


# fit


def fixed_init(key, x):
    return jax.tree.map(jnp.asarray, WEIGHTS), {"passes": jnp.zeros((), jnp.int32)}


def fixed_train(params, extra, key, x):
    return linear(params, extra, x), {"passes": extra["passes"] + 1}


def nothing(params, extra, x):
    return {}


LINEAR = Network(fixed_init, linear, fixed_train, nothing)
TRAIN = problem(7, seed=1, wrong=0)
VALIDATION = Dataset(DATA.x, DATA.y, 1000 + np.arange(N))


def fit(objective=None, tx=None, train=TRAIN, network=LINEAR, key=KEY, **settings):
    settings = {"epochs": 2, "batch_size": 3, "mesh": ONE, "progress": False, **settings}
    objective = training.Standard() if objective is None else objective
    return loops.fit(key, network, objective, tx or optax.sgd(0.1), train, **settings)


@algorithm
class Counting:
    """Reports how often each id counts, and a metric that is its mean over examples."""

    ids: tuple = static()

    def __call__(self, key, network, params, extra, batch):
        logits, extra = network.train_logits(params, extra, key, batch.x)
        share = batch.mask / jnp.sum(batch.mask)
        counts = {f"id {i}": jnp.sum(share * (batch.id == i)) for i in self.ids}
        value = jnp.sum(share * losses.cross_entropy(logits, batch.y))
        return value, (extra, counts | {"first": jnp.sum(share * batch.x[:, 0])})


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_an_epoch_sees_every_example_once(batch_size):
    report = fit(Counting(tuple(TRAIN.id.tolist())), batch_size=batch_size, epochs=2)
    assert len(report.history) == 2
    for means in report.history:
        for i in TRAIN.id:
            np.testing.assert_allclose(means[f"id {i}"] * len(TRAIN), 1, rtol=1e-5)
        np.testing.assert_allclose(means["first"], TRAIN.x[:, 0].mean(), rtol=1e-4)
    assert int(report.state.step) == 2 * -(-7 // min(batch_size, 7))


def order_init(key, x):
    return fixed_init(key, x)[0], {"ids": jnp.zeros(8, jnp.int32), "mask": jnp.zeros(8, bool)}


def order_train(params, extra, key, x):
    return linear(params, extra, x), extra


@algorithm
class KeepsOrder:
    def __call__(self, key, network, params, extra, batch):
        value, _ = training.Standard()(key, network, params, extra, batch)
        return value, ({"ids": batch.id, "mask": batch.mask}, {})


def test_the_order_follows_from_key_and_epoch():
    network = Network(order_init, linear, order_train, nothing)

    def orders(key, mesh=None):
        events = loops.fit.iter(
            key, network, KeepsOrder(), optax.sgd(0.1), TRAIN, epochs=3, mesh=mesh
        )
        seen = []
        for event in events:
            ids, mask = (np.array(event.state.extra[name]) for name in ("ids", "mask"))
            assert mask.tolist() == [True] * 7 + [False]  # eight devices, seven examples
            assert ids[7] == ids[0]
            seen.append(ids[:7].tolist())
        return seen

    first = orders(KEY)
    assert all(sorted(order) == sorted(TRAIN.id) for order in first)
    assert len({tuple(order) for order in first}) == 3
    assert orders(KEY) == first
    assert orders(jax.random.key(5)) != first


def test_fit_is_the_step_by_hand():
    report = fit(tx=optax.adam(0.1), epochs=2, batch_size=7)
    init, update = training.step(training.Standard(), optax.adam(0.1))
    update = jax.jit(update)
    state = jax.jit(init)(KEY, LINEAR, TRAIN.x)
    for means in report.history:
        state, metrics = update(state, training.batch(TRAIN.x, TRAIN.y, TRAIN.id))
        np.testing.assert_allclose(means["loss"], metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(means["accuracy"], metrics["accuracy"], rtol=1e-5)
    for name, leaf in state.params.items():
        np.testing.assert_allclose(report.state.params[name], leaf, rtol=1e-4, atol=1e-6)


def test_fit_repeats_exactly_under_one_key():
    objective = training.NoiseAugmentation(smoothing.Gaussian(0.3))
    one, two = (fit(objective, validation=VALIDATION) for _ in range(2))
    assert one.history == two.history
    jax.tree.map(np.testing.assert_array_equal, one.state.params, two.state.params)
    assert fit(objective, key=jax.random.key(1)).history[0]["loss"] != one.history[0]["loss"]


@algorithm
class Scripted:
    """A validation metric given epoch by epoch, for one step an epoch."""

    scores: tuple = static()

    def __call__(self, key, logits_fn, x, y, ids):
        score = jnp.array(self.scores, jnp.float32)[logits_fn.extra["passes"] - 1]
        return score + 0.0 * y


def test_best_is_the_earliest_highest_epoch_and_survives_donation():
    scores = (0.125, 0.75, 0.5, 0.75, 0.25)
    events, kept = [], []
    for event in loops.fit.iter(
        *(KEY, LINEAR, training.Standard(), optax.sgd(0.1), TRAIN),
        epochs=5,
        validation=VALIDATION,
        validate=Scripted(scores),
        mesh=ONE,
    ):
        events.append(event)
        kept.append(jax.tree.map(np.array, event.state.params))
    report = events[-1].report
    assert [e.epoch for e in events] == [1, 2, 3, 4, 5]
    assert [e.report is None for e in events] == [True] * 4 + [False]
    assert [means["validation"] for means in report.history] == list(scores)
    assert report.best_epoch == 2
    jax.tree.map(np.testing.assert_array_equal, report.best[0], kept[1])
    assert int(report.best[1]["passes"]) == 2
    assert np.any(kept[1]["w"] != kept[4]["w"])
    jax.tree.map(np.testing.assert_array_equal, report.state.params, kept[4])
    x = VALIDATION.x
    np.testing.assert_array_equal(report.model(x), linear(report.best[0], {}, x))
    np.testing.assert_array_equal(report.last_model(x), linear(report.state.params, {}, x))


def test_without_validation_the_last_epoch_is_best():
    report = fit(epochs=3)
    assert report.best_epoch == 3
    assert "validation" not in report.history[0]
    jax.tree.map(np.testing.assert_array_equal, report.best[0], report.state.params)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_validation_is_the_mean_over_held_out_examples(batch_size):
    still = optax.sgd(0.0)

    def validated(validate):
        report = fit(
            tx=still, validation=VALIDATION, validate=validate, batch_size=batch_size, epochs=2
        )
        first, second = (means["validation"] for means in report.history)
        assert first == second  # nothing moved, and the noise of validation is the same
        return first

    assert validated(None) == CORRECT.mean()
    assert validated(loops.RobustAccuracy(FGSM(box(EPS)))) == (DISTANCE > EPS).mean()
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(held, i), (D,)))
    held = jax.random.fold_in(KEY, 2)
    logits = model()(VALIDATION.x + 0.5 * noise(VALIDATION.id.astype(np.uint32)))
    expected = np.mean(np.argmax(logits, 1) == VALIDATION.y)
    assert validated(loops.NoisyAccuracy(0.5)) == expected != CORRECT.mean()
    # A function of one's own, and a metric that is a number.
    loss = np.mean(losses.cross_entropy(model()(VALIDATION.x), VALIDATION.y))
    mine = validated(lambda key, fn, x, y, ids: -losses.cross_entropy(fn(x), y))
    np.testing.assert_allclose(mine, -loss, rtol=1e-5)


def test_validation_metrics_never_count_what_is_wrong_or_not_finite():
    y = jnp.asarray(VALIDATION.y)
    arguments = (jnp.asarray(VALIDATION.x), y, jnp.asarray(VALIDATION.id))

    def undefined(x):
        return jnp.full((x.shape[0], 2), jnp.nan)

    for validate in (
        loops.CleanAccuracy(),
        loops.NoisyAccuracy(0.1),
        loops.RobustAccuracy(FGSM(box(EPS))),
        loops.RobustAccuracy(Claims(box(EPS), claim=False)),
    ):
        assert np.any(y == 0)
        assert not np.any(validate(KEY, undefined, *arguments))
    # An attack that finds nothing does not make a wrong answer right.
    weak = loops.RobustAccuracy(Claims(box(EPS), claim=False))(KEY, model(), *arguments)
    np.testing.assert_array_equal(weak, CORRECT)


def test_the_log_is_the_history(tmp_path):
    report = fit(epochs=3, validation=VALIDATION, directory=tmp_path)
    expected = [{"epoch": i, **means} for i, means in enumerate(report.history, 1)]
    assert lines(tmp_path / "metrics.jsonl") == expected
    assert set(expected[0]) == {"epoch", "loss", "accuracy", "gradient_norm", "validation"}
    settings = json.loads((tmp_path / "configuration.json").read_text())
    assert settings == report.configuration
    assert settings["objective"] == {"name": "Standard", "loss": "cross_entropy"}
    assert settings["validate"] == {"name": "CleanAccuracy"}
    assert set(report.seconds) == {"compile", "run", "other"}


def test_divergence_is_an_error_and_what_was_logged_stays(tmp_path):
    rate = optax.piecewise_constant_schedule(0.1, {2: 1e38})
    with pytest.raises(FloatingPointError, match=r"epoch 4.*clip gradients"):
        fit(losses_of_margin(), optax.sgd(rate), batch_size=7, epochs=5, directory=tmp_path)
    assert lines(tmp_path / "metrics.jsonl")[0]["epoch"] == 1
    with pytest.raises(FloatingPointError, match=r"epoch 1.*'validation': nan"):
        fit(validation=VALIDATION, validate=Scripted((np.nan,) * 9))


def losses_of_margin():
    """A loss without bound, so that a step that is too long diverges."""
    return training.Standard(lambda logits, y: jnp.exp(losses.margin(logits, y)))


def test_fit_traces_before_its_first_epoch_only():
    events = loops.fit.iter(
        *(KEY, LINEAR, training.Standard(), optax.sgd(0.1), TRAIN),
        epochs=3,
        batch_size=3,
        validation=VALIDATION,
        mesh=ONE,
    )
    next(events)
    TRACES.clear()
    assert len(list(events)) == 2
    assert TRACES == []


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        optax.contrib.schedule_free(optax.sgd(0.1), 0.1),  # its state aliases the parameters
    ],
    ids=["clipped", "injected", "schedule_free"],
)
def test_optimiser_states_survive_donation(tx):
    report = fit(tx=tx, epochs=3)
    assert report.history[-1]["loss"] < report.history[0]["loss"]


@algorithm
class Meant:
    """A mean over the rows that count, which is no number where none does."""

    def __call__(self, key, network, params, extra, batch):
        logits, extra = network.train_logits(params, extra, key, batch.x)
        each = losses.cross_entropy(logits, batch.y)
        first = jnp.mean(batch.x[:, 0], where=batch.mask)
        return jnp.mean(each, where=batch.mask), (extra, {"first": first})


@pytest.mark.parametrize(("batch_size", "devices", "lanes"), [(6, 1, 6), (128, 1, 9), (99, 4, 12)])
def test_any_number_of_examples_can_be_accumulated(batch_size, devices, lanes):
    mesh = parallel.mesh(jax.devices()[:devices])
    found = fit(Meant(), batch_size=batch_size, accumulate=3, mesh=mesh)
    assert found.configuration["batch_size"] == lanes
    whole = fit(Meant(), batch_size=batch_size)
    for one, two in zip(found.history, whole.history):
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)


def spread_init(key, x):
    return fixed_init(key, x)[0], {"spread": jnp.zeros(D)}


def spread_train(params, extra, key, x):
    return linear(params, extra, x), {"spread": 0.9 * extra["spread"] + 0.1 * jnp.var(x, 0)}


def test_statistics_of_averaged_weights_are_those_of_shuffled_data():
    n = 64
    y = np.arange(n) * 2 // n  # sorted: most batches in this order hold one class
    x = np.tile(np.float32(y)[:, None], (1, D))
    network = Network(spread_init, linear, spread_train, nothing)
    settings = {"batch_size": 8, "epochs": 1, "average": training.SWA(start=1)}
    train = Dataset(x, y)

    def undefined(key, logits_fn, x, y, ids):
        return jnp.full(y.shape, jnp.nan)

    _, extra = fit(train=train, network=network, **settings).last
    np.testing.assert_allclose(extra["spread"], 0.25 * 7 / 8, rtol=0.1)
    held = Dataset(x, y, n + np.arange(n))
    with pytest.raises(loops.Diverged) as caught:
        fit(train=train, network=network, validation=held, validate=undefined, **settings)
    np.testing.assert_array_equal(caught.value.report.last[1]["spread"], extra["spread"])
    settings["epochs"] = 2
    seconds = loops.fit.warm_up(
        *(KEY, network, training.Standard(), optax.sgd(0.1), train), mesh=ONE, **settings
    )
    assert set(seconds) == {"update", "statistics"}


def test_a_mean_of_half_precision_values_is_exact():
    # Added up in their own precision, ones would stop at 256.
    n = 600
    held = Dataset(np.zeros((n, D), np.float32), np.zeros(n, int), 1000 + np.arange(n))

    def ones(key, logits_fn, x, y, ids):
        return jnp.ones(y.shape, jnp.bfloat16)

    report = fit(validation=held, validate=ones, batch_size=n, epochs=1)
    assert report.history[0]["validation"] == 1


def test_initialisation_is_compiled_into_the_cache(monkeypatch):
    seen = []
    monkeypatch.setattr(_programs, "keep_compilations", lambda: seen.append("kept"))

    def init(key, x):
        seen.append("traced")
        return fixed_init(key, x)

    fit(network=Network(init, linear, fixed_train, nothing), epochs=1)
    assert seen.index("kept") < len(seen) - 1 - seen[::-1].index("traced")


def test_what_stays_compiled_holds_no_data():
    train = problem(7, seed=1, wrong=0)
    held = weakref.ref(train)
    fit(train=train, validation=VALIDATION, epochs=1)
    del train
    gc.collect()
    assert held() is None


def test_slow_updates_are_saved_one_by_one(tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(loops._fit, "_PATIENCE", -1.0)
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *rest: (saved.append(step), save(self, step, *rest))
    )
    fit(epochs=1, directory=tmp_path)
    assert saved == [1, 2, 3]


def test_one_example_is_a_data_set():
    report = fit(train=TRAIN[:1], validation=VALIDATION[:1], epochs=1)
    assert report.best_epoch == 1
    assert report.configuration["examples"] == 1


@pytest.mark.parametrize("mesh", [ONE, None], ids=["one device", "eight"])
def test_a_flax_model_with_batch_norm_learns(mesh):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(40, 4, 4, 1)).astype(np.float32)
    y = (x[:, :2].mean((1, 2, 3)) > x[:, 2:].mean((1, 2, 3))).astype(np.int32)
    data = Dataset(x, y)
    network = models.network(models.SmallCNN(widths=(4,), classes=2, hidden=8, norm=True))
    report = fit(
        training.Adversarial(PGD(Linf(0.01), steps=2, keep="last")),
        optax.adam(1e-2),
        data[:32],
        network,
        epochs=12,
        batch_size=16,
        validation=data[32:],
        validate=loops.RobustAccuracy(PGD(Linf(0.01), steps=2)),
        mesh=mesh,
    )
    assert report.history[-1]["loss"] < 0.8 * report.history[0]["loss"]
    stats = report.state.extra["batch_stats"]["norm1"]
    assert np.any(np.abs(stats["mean"]) > 1e-3)
    best = max(means["validation"] for means in report.history)
    assert report.history[report.best_epoch - 1]["validation"] == best
    again = loops.evaluate(
        KEY,
        report.model,
        data[32:],
        PGD(Linf(0.01), steps=2),
        mesh=ONE,
        progress=False,
        checks=False,
    )
    assert abs(again.robust_accuracy - best) <= 1 / 8  # another start of the attack


def test_progress_of_fit_and_certify(capsys):
    fit(progress=True, epochs=2)
    err = capsys.readouterr().err
    assert "Standard: 100%" in err
    assert "2/2" in err
    assert "loss=" in err


# certify


def threshold(params, extra, x):
    """Exact in any batch shape: a comparison of the first feature with 0.5."""
    TRACES.append(x.shape)
    return jnp.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1)


HALF = Bound({}, {}, threshold)
SIGMA = 0.25


def half_space(n=24):
    x = np.random.default_rng(2).uniform(size=(n, 3)).astype(np.float32)
    return Dataset(x, (x[:, 0] > 0.5).astype(np.int64), 50 + np.arange(n)[::-1])


def certify(data=None, logits_fn=HALF, noise=smoothing.Gaussian(SIGMA), **settings):  # noqa: B008
    settings = {"n0": 20, "n": 200, "alpha": 0.01, "mesh": ONE, "progress": False, **settings}
    data = half_space() if data is None else data
    return loops.certify(KEY, logits_fn, data, noise, **settings)


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_certificates_are_those_made_by_hand(batch_size):
    data, noise = half_space(), smoothing.Gaussian(SIGMA)
    report = certify(batch_size=batch_size, chunk=64)
    stages = smoothing.stages(KEY)
    x, ids = jnp.asarray(data.x), jnp.asarray(data.id)
    select = smoothing.count_votes(stages.select, HALF, x, noise, 20, ids=ids)
    estimate = smoothing.count_votes(stages.estimate, HALF, x, noise, 200, ids=ids)
    np.testing.assert_array_equal(report.select_counts, select)
    np.testing.assert_array_equal(report.estimate_counts, estimate)
    expected = smoothing.certify(np.asarray(select), np.asarray(estimate), noise, 0.01)
    for name in ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n"):
        np.testing.assert_array_equal(getattr(report.certificate, name), getattr(expected, name))
    np.testing.assert_array_equal(report.id, data.id)
    assert report.accuracy() == np.mean(expected.prediction == data.y)
    np.testing.assert_array_equal(
        report.accuracy([0.0, 0.1, 9.0]), expected.accuracy(data.y, [0.0, 0.1, 9.0])
    )
    assert report.average_radius == expected.average_radius(data.y)
    assert report.votes == 24 * 220


def test_counts_do_not_depend_on_order_or_devices():
    data = half_space()
    order = np.random.default_rng(3).permutation(len(data))
    one = certify()
    for other in (certify(data[order]), certify(data[order], mesh=None)):
        np.testing.assert_array_equal(other.select_counts, one.select_counts[order])
        np.testing.assert_array_equal(other.estimate_counts, one.estimate_counts[order])
    # The stages draw samples of their own.
    same = certify(n0=200)
    assert np.any(same.select_counts != same.estimate_counts)


def test_radii_stay_below_the_true_distance():
    n, alpha = 60, 0.05
    data = half_space(n)
    report = certify(data, alpha=alpha, n=500)
    distance = np.abs(data.x[:, 0].astype(np.float64) - 0.5)
    right = report.certificate.prediction == data.y
    false = (report.certificate.radius > distance) | (~right & (report.certificate.prediction >= 0))
    assert false.sum() <= stats.binom.ppf(0.9999, n, alpha)
    assert right.mean() > 0.7
    # Not vacuous: the radius is most of the distance where there are votes enough.
    wide = right & (distance > 0.2) & (distance < 0.35)
    assert np.median(report.certificate.radius[wide] / distance[wide]) > 0.7


def test_no_radius_above_the_ceiling(tmp_path):
    data = half_space(4)
    x = np.array(data.x)
    x[:, 0] = 50.0
    far = Dataset(x, np.ones(4, int))
    report = certify(far, directory=tmp_path, box=None)
    reach = smoothing.ceiling(smoothing.Gaussian(SIGMA), 200, 0.01)
    assert np.all(report.certificate.count == 200)
    assert np.all(report.certificate.radius <= reach)
    np.testing.assert_allclose(report.certificate.radius, reach, rtol=1e-9)
    assert report.configuration["radius_ceiling"] == reach


def nan_threshold(params, extra, x):
    return jnp.where(x[:, 1:2] > 0.5, jnp.nan, threshold(params, extra, x))


def test_votes_that_are_not_finite_are_rejects():
    data = half_space(6)
    x = np.array(data.x)
    x[:3, 1], x[3:, 1] = 9.0, -9.0
    x[:, 0] = 0.9
    report = certify(Dataset(x, np.ones(6, int)), Bound({}, {}, nan_threshold), box=None)
    np.testing.assert_array_equal(report.certificate.rejects, [200] * 3 + [0] * 3)
    np.testing.assert_array_equal(report.certificate.prediction, [-1] * 3 + [1] * 3)
    assert np.all(report.certificate.radius[:3] == 0)
    assert report.accuracy() == 0.5


def test_the_files_of_a_certification(tmp_path):
    data = half_space()
    report = certify(directory=tmp_path, batch_size=7)
    written = table(tmp_path / "examples.csv")
    assert [int(row["id"]) for row in written] == data.id.tolist()
    for name in ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n"):
        column = getattr(report.certificate, name)
        np.testing.assert_array_equal([float(row[name]) for row in written], column)
    right = report.certificate.prediction == data.y
    assert [row["correct"] for row in written] == [str(bool(value)) for value in right]
    assert [int(row["y"]) for row in written] == data.y.tolist()
    counts = np.load(tmp_path / "counts.npz")
    np.testing.assert_array_equal(counts["select"], report.select_counts)
    np.testing.assert_array_equal(counts["estimate"], report.estimate_counts)
    np.testing.assert_array_equal(counts["id"], data.id)
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["certified_accuracy"] == report.accuracy() == right.mean()
    assert summary["average_radius"] == report.average_radius
    assert summary["votes"] == report.votes
    assert "alpha = 0.01" in summary["statement"]
    settings = json.loads((tmp_path / "configuration.json").read_text())
    assert settings["noise"] == {"name": "Gaussian", "sigma": SIGMA}
    assert (settings["n0"], settings["n"], settings["alpha"]) == (20, 200, 0.01)


def test_events_and_programs_of_a_certification(capsys):
    def events():
        return list(
            loops.certify.iter(
                *(KEY, HALF, half_space(), smoothing.Gaussian(SIGMA)),
                n0=20,
                n=200,
                alpha=0.01,
                batch_size=9,
                mesh=ONE,
            )
        )

    seen = events()
    assert [(e.finished, e.total) for e in seen] == [(9, 24), (18, 24), (24, 24), (24, 24)]
    report = seen[-1].report
    assert seen[-1].certified == np.sum(report.certificate.prediction == half_space().y)
    assert all(e.report is None for e in seen[:-1])
    TRACES.clear()
    events()
    certify(noise=smoothing.Gaussian(0.5), batch_size=9)
    assert TRACES == []
    capsys.readouterr()
    certify(batch_size=9, progress=True)
    assert "certify: 100%" in capsys.readouterr().err


# Mistakes


def changed(data=DATA, **fields):
    return Dataset(**{"x": data.x, "y": data.y, "id": data.id, **fields})


HOLED = np.where(np.arange(D) == 2, np.nan, DATA.x).astype(np.float32)
KEPT = PGD(box(0.1), steps=1, keep="last")
STILL = training.Standard()

MISTAKES = {
    # evaluate
    "a tuple for data": (lambda: evaluate(FGSM(box(0.1)), (DATA.x, DATA.y)), "Dataset(x, y)"),
    "uint8 images": (
        lambda: evaluate(FGSM(box(0.1)), changed(x=np.zeros((N, D), np.uint8))),
        "divide by 255",
    ),
    "float64 images": (
        lambda: evaluate(FGSM(box(0.1)), changed(x=DATA.x.astype(float))),
        "must be float32, got float64",
    ),
    "NaN pixels": (lambda: evaluate(FGSM(box(0.1)), changed(x=HOLED)), "not finite"),
    "no examples": (lambda: evaluate(FGSM(box(0.1)), DATA[:0]), "N >= 1"),
    "no features": (lambda: evaluate(FGSM(box(0.1)), changed(x=DATA.x[:, 0])), "feature axis"),
    "an attack class": (lambda: evaluate(PGD), "attacks must be"),
    "a list of classes": (lambda: evaluate([PGD]), "attacks must be"),
    "no attacks": (lambda: evaluate([]), "attacks must be"),
    **{
        f"an attack named {name}": (
            lambda name=name: evaluate({name: FGSM(box(0.1))}),
            "names other than clean, draws, search_fn, checks",
        )
        for name in ("clean", "checks")
    },
    "memory in words": (
        lambda: evaluate(FGSM(box(0.1)), memory="1GB"),
        "a positive number of bytes",
    ),
    "no memory": (lambda: certify(memory=0), "memory must be a positive number of bytes, got 0"),
    "outside of the box": (lambda: evaluate(FGSM(Linf(0.1))), "must lie in the box"),
    "eps larger than the box": (lambda: evaluate(FGSM(box(25.0))), "larger than the whole box"),
    "eps for each example": (
        lambda: evaluate(FGSM(box(np.full(N, 0.1, np.float32)))),
        "PGD.threat.eps has a value for each of the 21 examples",
    ),
    "step size for each example": (
        lambda: evaluate(PGD(box(0.1), step_size=np.full(N, 0.1, np.float32))),
        "PGD.step_size has a value for each",
    ),
    "labels beyond the classes": (
        lambda: evaluate(FGSM(box(0.1)), changed(y=DATA.y + 1)),
        "the model has 2 classes",
    ),
    "zero batch": (lambda: evaluate(FGSM(box(0.1)), batch_size=0), "batch_size must be a positive"),
    "float batch": (lambda: evaluate(FGSM(box(0.1)), batch_size=8.0), "batch_size must be a pos"),
    "a model that is not called": (
        lambda: evaluate(FGSM(box(0.1)), logits_fn=WEIGHTS),
        "logits_fn must be callable",
    ),
    "a raw key": (
        lambda: loops.evaluate(jax.random.key_data(KEY), model(), DATA, FGSM(box(0.1))),
        "jax.random.key",
    ),
    "gradients of a Host": (
        lambda: evaluate(FGSM(box(0.1)), logits_fn=Host(lambda x: x @ WEIGHTS["w"])),
        "estimator=",
    ),
    # fit
    "a module for a network": (lambda: fit(network=models.MLP()), "jrobust.models.network(module)"),
    "no epochs": (lambda: fit(epochs=0), "epochs must be a positive int"),
    "arrays to train on": (lambda: fit(train=TRAIN.x), "train must be a jrobust.data.Dataset"),
    "uint8 validation": (
        lambda: fit(validation=changed(VALIDATION, x=np.zeros((N, D), np.uint8))),
        "validation.x must be float32",
    ),
    "shared ids": (
        lambda: fit(validation=changed(VALIDATION, id=np.arange(N) + TRAIN.id[0])),
        "both train and validation",
    ),
    "validation of another shape": (
        lambda: fit(validation=changed(VALIDATION, x=VALIDATION.x[:, :3])),
        "validation examples have shape (3,)",
    ),
    "a metric without validation": (lambda: fit(validate=loops.CleanAccuracy()), "validation= too"),
    "a metric class": (
        lambda: fit(validation=VALIDATION, validate=loops.CleanAccuracy),
        "such as CleanAccuracy()",
    ),
    "a metric that averages": (
        lambda: fit(validation=VALIDATION, validate=lambda k, fn, x, y, i: jnp.mean(fn(x))),
        "one value for each",
    ),
    "training labels beyond the classes": (
        lambda: fit(train=changed(TRAIN, y=TRAIN.y + 1)),
        "the model has 2 classes",
    ),
    "sigma below zero": (
        lambda: fit(training.NoiseAugmentation(smoothing.Gaussian(-0.1))),
        "sigma must be",
    ),
    "training in grey levels": (
        lambda: fit(training.Adversarial(PGD(box(25.0), keep="last"))),
        "larger than the whole box",
    ),
    "training eps for each example": (
        lambda: fit(training.Adversarial(PGD(box(np.full(7, 0.1)), keep="last"))),
        "Adversarial.attack.threat.eps has a value for each",
    ),
    "training attack that stops": (
        lambda: fit(training.Adversarial(PGD(box(0.1)))),
        "keep='last'",
    ),
    "validation attack outside of the box": (
        lambda: fit(validation=VALIDATION, validate=loops.RobustAccuracy(FGSM(Linf(0.1)))),
        "must lie in the box",
    ),
    "an objective class": (lambda: fit(training.NoiseAugmentation), "must be an instance"),
    # certify
    "uint8 to certify": (
        lambda: certify(changed(x=np.zeros((N, D), np.uint8))),
        "divide by 255",
    ),
    "NaN to certify": (lambda: certify(changed(x=HOLED)), "not finite"),
    "a number for noise": (lambda: certify(noise=0.25), "smoothing.Gaussian"),
    "noise below zero": (lambda: certify(noise=smoothing.Gaussian(-1.0)), "sigma must be"),
    "too few votes": (lambda: certify(n=5), "n = 5"),
    "no votes": (lambda: certify(n=0), "n must be a positive int"),
    "no votes to select": (lambda: certify(n0=0), "n0 must be a positive int"),
    "float votes": (lambda: certify(n=1e4), "n must be a positive int"),
    "alpha one": (lambda: certify(alpha=1.0), "alpha"),
    "alpha zero": (lambda: certify(alpha=0.0), "alpha"),
    "zero chunk": (lambda: certify(chunk=0), "chunk must be a positive int"),
    "labels to certify": (lambda: certify(changed(half_space(), y=np.full(24, 7))), "2 classes"),
    "a key that depends on its batch": (
        lambda: loops.certify(
            jax.random.key(0, impl="rbg"), HALF, half_space(), smoothing.Gaussian(0.1), n=100
        ),
        "threefry",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_clear_errors(name):
    call, words = MISTAKES[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert words in str(raised.value)
