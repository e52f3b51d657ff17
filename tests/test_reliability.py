"""Evaluations that flatter a model say so, and others do not."""

import dataclasses
import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrobust import data, loops, parallel, statistics
from jrobust._algorithm import algorithm, describe, static
from jrobust.attacks import FGSM, PGD, AutoAttack, restarts, sequence
from jrobust.drive import Host
from jrobust.loops import ReliabilityWarning, _reliability
from jrobust.loops._publish import _radius, leaderboard_row
from jrobust.models import Bound, randomized
from jrobust.report import Report
from jrobust.threat import L2, Linf
from jrobust.zeroth_order import CGE

KEY = jax.random.key(2)
ONE = parallel.mesh(jax.devices()[:1])
D = 8
SLOPE = np.random.default_rng(0).normal(size=(D, 3)).astype(np.float32)


def linear(params, extra, x):
    return (x - 0.5) @ params["w"]


def rounded(params, extra, x):
    return linear(params, extra, jnp.round(8 * x) / 8)


def probable(params, extra, x):
    return jax.nn.softmax(linear(params, extra, x))


def rough(params, extra, x):
    """Logits that hardly change, with gradients that are all noise."""
    return linear(params, extra, x) + 1e-4 * jnp.sin(3e5 * x[:, :3])


def model(fn=linear):
    return Bound({"w": jnp.asarray(SLOPE)}, {}, fn)


def problem(n=24):
    x = np.random.default_rng(1).uniform(0.1, 0.9, (n, D)).astype(np.float32)
    return data.Dataset(x, np.argmax((x - 0.5) @ SLOPE, 1).astype(np.int32))


DATA = problem()
GOOD = PGD(Linf(0.05), steps=20)


def evaluate(attack=GOOD, fn=linear, **options):
    """The report, and the kinds of the warnings given."""
    options = {"batch_size": 8, "mesh": ONE, "progress": False, **options}
    logits_fn = fn if isinstance(fn, Host) or not callable(fn) else model(fn)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        report = loops.evaluate(KEY, logits_fn, DATA, attack, **options)
    assert all(issubclass(one.category, ReliabilityWarning) for one in given)
    assert [str(one.message) for one in given] == [str(doubt) for doubt in report.doubts]
    return report, {doubt.kind for doubt in report.doubts}


@pytest.mark.parametrize(
    "attack",
    [
        GOOD,
        PGD(L2(0.1), steps=20, keep="loss"),
        sequence(GOOD, restarts(GOOD, 2)),
        {"one": GOOD, "two": PGD(Linf(0.06), steps=40)},
    ],
    ids=["Linf", "L2", "sequence", "two"],
)
def test_a_sound_evaluation_gives_no_warning(attack):
    report, kinds = evaluate(attack)
    assert 0 < report.robust_accuracy < 1
    assert kinds == set()


def test_probabilities_in_place_of_logits(tmp_path):
    report, kinds = evaluate(fn=probable, directory=tmp_path)
    assert kinds == {"probabilities"}
    (doubt,) = report.doubts
    assert "softmax" in doubt.remedy
    assert json.loads((tmp_path / "report.json").read_text())["doubts"] == [doubt._asdict()]
    again, kinds = evaluate(fn=probable, directory=tmp_path)
    assert again.doubts == report.doubts
    assert again.seconds["run"] == 0


def test_zero_gradients_and_queries_that_win():
    query = PGD(Linf(0.05), steps=20, estimator=CGE(0.1))
    report, kinds = evaluate({"pgd": GOOD, "cge": query}, rounded)
    assert report.standing[1] > report.standing[2]
    assert kinds == {"gradient cut", "zero gradients", "queries win", "unbounded attack fails"}
    program, zero = report.doubts[:2]
    assert "round" in program.message
    assert "straight_through" in program.remedy
    assert "8 of 8" in zero.message
    # Queries first: nothing that gradients missed.
    assert "queries win" not in evaluate({"cge": query, "pgd": GOOD}, rounded)[1]


def test_gradients_that_foresee_nothing():
    _, kinds = evaluate(fn=rough)
    assert "unstable gradients" in kinds
    assert "zero gradients" not in kinds


def test_an_attack_that_has_not_arrived():
    slow = PGD(Linf(0.05), steps=20, step_size=0.001, random_start=False)
    report, kinds = evaluate(slow)
    # Its steps would not leave the ball; without a bound they are as long, in radii.
    assert kinds == {"incomplete optimisation"}
    assert re.search("brings 2[01]%", report.doubts[0].message)
    assert kinds == evaluate({"slow": slow, "good": GOOD})[1]


def test_few_steps():
    report, kinds = evaluate(
        {"fast": FGSM(Linf(0.05)), "seq": sequence(GOOD, PGD(Linf(0.05), steps=5))}
    )
    assert "few steps" in kinds
    assert "fast (1), seq (5)" in report.doubts[0].message


@algorithm
class Claims(PGD):
    """Claims success beside the input."""

    steps: int = static(default=20)

    def result(self, state):
        found = super().result(state)
        return found._replace(x=state.record.x0, success=found.success | True)


def test_claims_that_do_not_verify():
    assert "near ties" in evaluate({"claims": Claims(Linf(0.05)), "good": GOOD})[1]


def test_a_search_model_that_leads_astray():
    def early(x):
        logits = linear({"w": jnp.asarray(SLOPE)}, {}, x)
        return logits.at[:, 0].add(-0.3)

    report, kinds = evaluate(search_fn=early)
    assert report.only_search > 0
    assert report.configuration["search_fn"]
    assert "search model differs" in kinds


def test_nothing_is_looked_at_when_nobody_asks():
    report, kinds = evaluate(FGSM(Linf(0.05)), probable, checks=False)
    assert report.doubts == ()
    # Nor can gradients be asked of a black box; its settings can.
    calls = []

    def black_box(x):
        calls.append(len(x))
        return (x - 0.5) @ SLOPE

    attack = PGD(Linf(0.05), steps=2, estimator=CGE(1e-2))
    report, kinds = evaluate(attack, Host(black_box))
    assert kinds == {"few steps"}
    broken = (~report.examples["robust"]).sum()
    assert sum(calls) == len(DATA) + report.examples["forwards"].sum() + broken


def test_models_that_draw_are_looked_at_too(monkeypatch):
    asked = []
    monkeypatch.setattr(_reliability, "of_draws", lambda *found: asked.append(found) or [])

    def noisy(keys, x):
        noise = jax.vmap(lambda key, row: jax.random.normal(key, row.shape))(keys, x)
        return linear({"w": jnp.asarray(SLOPE)}, {}, x + 0.01 * noise)

    drawing = randomized(noisy, jax.random.key(1), samples=2, votes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReliabilityWarning)
        report = loops.evaluate(KEY, drawing, DATA, GOOD, batch_size=8, mesh=ONE, progress=False)
    assert not {"zero gradients", "unstable gradients"} & {d.kind for d in report.doubts}
    assert asked == [(report.robust_accuracy, *report.redraws)]


def coin(share):
    """A linear model that answers at random in this share of its draws."""

    def fn(keys, x):
        flip = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys)
        other = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return 100 * jnp.where(flip[:, None], other, linear({"w": jnp.asarray(SLOPE)}, {}, x))

    return randomized(fn, jax.random.key(1), samples=2, votes=41)


def test_a_model_that_draws_is_asked_again_under_fresh_draws(tmp_path):
    attack = PGD(Linf(1e-5), steps=1)  # too small to matter: what remains is chance
    options = {"batch_size": 8, "mesh": ONE, "progress": False, "checks": False}
    report = loops.evaluate(KEY, coin(0.3), DATA, attack, directory=tmp_path, **options)
    assert report.robust_accuracy > 0.9  # by the votes
    assert report.redraws[1] == len(DATA) * 41
    estimate, low, high = report.redrawn_accuracy(1e-6)
    assert estimate == report.redraws[0] / report.redraws[1]
    assert low < 0.7 + 0.3 / 3 < high < low + 0.2
    assert report.redrawn_accuracy(0.5)[1] > low
    again = loops.evaluate(KEY, coin(0.3), DATA, attack, directory=tmp_path, **options)
    assert again.redraws == report.redraws
    # A vote flatters single draws, and is flattered by none.
    (flatters,) = _reliability.of_draws(report.robust_accuracy, *report.redraws)
    assert f"at most {100 * report.redrawn_accuracy()[2]:.2f}%" in flatters.message
    assert _reliability.of_draws(report.redrawn_accuracy()[2], *report.redraws) == []
    assert json.loads((tmp_path / "report.json").read_text())["redraws"] == [*report.redraws]
    # At the attacked points, of those that stand too: not at the inputs.
    strong = loops.evaluate(KEY, coin(0.0), DATA, PGD(Linf(0.3), steps=20), **options)
    assert strong.redraws[0] == 41 * strong.examples["robust"].sum()
    with pytest.raises(ValueError, match="draws no random numbers"):
        evaluate(checks=False)[0].redrawn_accuracy()


def test_everything_broken_or_everything_wrong():
    report, kinds = evaluate(PGD(Linf(0.5), steps=20))
    assert report.robust_accuracy == 0
    assert kinds == set()
    wrong = data.Dataset(DATA.x, (DATA.y + 1) % 3, DATA.id)
    report = loops.evaluate(KEY, model(), wrong, GOOD, batch_size=8, mesh=ONE, progress=False)
    assert report.clean_accuracy == 0
    assert report.doubts == ()


# What is published of an evaluation


def test_the_curve_is_what_the_inputs_found_prove():
    report, _ = evaluate(
        PGD(Linf(0.05), steps=40, step_size=0.002, random_start=False), checks=False
    )
    x, w = DATA.x.astype(np.float64) - 0.5, SLOPE.astype(np.float64)
    logits = x @ w
    gaps = logits[np.arange(24), DATA.y][:, None] - logits
    slopes = np.abs(w[:, DATA.y].T[:, :, None] - w[None]).sum(1)
    true = np.min(np.where(slopes > 0, gaps / np.where(slopes > 0, slopes, 1), np.inf), 1)
    radii = np.array([0.0, 0.01, 0.02, 0.05])
    exact = np.mean(true[None] > radii[:, None], 1)
    curve = report.curve(radii)
    assert curve[0] == 1
    assert curve[-1] == report.robust_accuracy
    assert np.all(np.diff(curve) <= 0)
    assert np.all(curve >= exact)
    np.testing.assert_allclose(curve, exact, atol=0.05)  # steps of 0.002
    # What moved a black pixel by 8 / 255, which in float32 is more than in float64, is within it.
    rim = np.where(report.examples["robust"], 0, np.float32(8 / 255))
    assert float(rim.max()) > 8 / 255
    moved = dataclasses.replace(report, examples={**report.examples, "distance": rim})
    assert moved.curve([8 / 255]) == report.robust_accuracy < 1


def test_a_sequence_stands_for_its_stages_and_two_norms_make_no_curve():
    report, _ = evaluate(sequence(PGD(L2(0.1), steps=20), GOOD), checks=False)
    assert report.attacks == ("1 PGD", "2 PGD")
    assert report.standing[0] > report.standing[1] > report.standing[2]
    assert report.norms == ("L2", "Linf")
    with pytest.raises(ValueError, match="in L2, Linf, whose distances share no axis"):
        report.curve([0.1])
    page = Report("Evaluation")
    page.evaluation("Two norms", report)
    assert "<img" not in page.html()


def test_the_curve_of_a_page_is_the_step_function():
    class Page(Report):
        def curve(self, caption, series, xlabel, ylabel, **options):
            assert xlabel == "distance (Linf)"
            (self.drawn,) = series.values()

    report, _ = evaluate(checks=False)
    page = Page("Evaluation")
    page.evaluation("One norm", report)
    x, y = page.drawn
    middle = (x[1:] + x[:-1])[np.diff(x) > 1e-5] / 2
    assert len(middle) > 1
    np.testing.assert_array_equal(np.interp(middle, x, y), report.curve(middle))


def test_checks_may_be_asked_for_later(tmp_path):
    evaluate(checks=False, directory=tmp_path / "gradients")
    report, kinds = evaluate(directory=tmp_path / "gradients")
    assert (report.resumed > 0, kinds) == (True, set())
    # Where they have nothing to compute, the files say what they found too.
    queries, folder = PGD(Linf(0.05), steps=2, estimator=CGE(0.1)), tmp_path / "queries"
    evaluate(queries, checks=False, directory=folder)
    before = json.loads((folder / "report.json").read_text())
    report, kinds = evaluate(queries, directory=folder)
    assert kinds == {"few steps"}
    doubts = [doubt._asdict() for doubt in report.doubts]
    assert json.loads((folder / "report.json").read_text()) == {**before, "doubts": doubts}


def test_functions_without_names_are_refused():
    """Of which no report could say, and no later run know, which they are."""
    for optimizer in (lambda size: optax.sgd(size, 0.9), functools.partial(optax.sgd, momentum=0)):
        with pytest.raises(ValueError, match=r"attacks\['PGD'\].optimizer is .* give it a name"):
            evaluate(PGD(Linf(0.05), optimizer=optimizer))


def test_a_page_of_the_report():
    page = Report("Evaluation")
    page.evaluation("Sound", evaluate()[0])
    page.evaluation("Unsound", evaluate(fn=probable)[0])
    page.evaluation("Unseen", evaluate(fn=probable, checks=False)[0])
    searched = evaluate(checks=False)[0]
    searched = dataclasses.replace(
        searched, configuration={**searched.configuration, "search_fn": 1}
    )
    page.evaluation("Searched by another", searched)
    text = page.html()
    assert text.count("fool the model alone") == 1
    for part in ("No sign was found", "were not looked for", "probabilities", "distance"):
        assert text.count(part) >= 1, part
    order = ("No sign was found", "probabilities", "not looked for")
    assert sorted(order, key=text.index) == list(order)


def test_a_call_as_in_the_released_code():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReliabilityWarning)
        report = loops.run_standard_evaluation(
            model(), DATA.x, DATA.y, norm="L2", eps=0.1, version=["apgd-ce"], bs=8, progress=False
        )
    assert report.attacks == ("apgd-ce",)
    assert report.configuration["attacks"]["apgd-ce"]["threat"]["name"] == "L2"
    assert 0 < report.robust_accuracy < 1
    with pytest.raises(ValueError, match="L2, L1, got 'l2'"):
        loops.run_standard_evaluation(model(), DATA.x, DATA.y, norm="l2", eps=0.1)


def test_an_entry_is_of_the_standard_evaluation_alone():
    threat = Linf(0.05)
    report, _ = evaluate()
    with pytest.raises(ValueError, match="autoattack_acc stands for"):
        loops.robustbench_entry(report, threat)
    # As if it had been run, which takes long.
    attacks = describe(AutoAttack(threat).stages)
    ran = dataclasses.replace(report, configuration={**report.configuration, "attacks": attacks})
    entry = loops.robustbench_entry(ran, threat, name="Linear", additional_data=False)
    assert entry["autoattack_acc"] == f"{100 * report.robust_accuracy:.2f}"
    assert entry["clean_acc"] == "100.00"
    assert (entry["name"], entry["eps"], entry["venue"]) == ("Linear", "0.05", None)
    assert entry["unreliable"] is False
    assert "footnote" not in entry
    share = entry["autoattack_acc"]
    assert leaderboard_row(entry) == f"| Linear | 100.00% | {share}% | no |  |  |"
    levels = {0.5: "0.5", 8 / 255: "8/255", np.float32(4 / 255): "4/255", 0.031: "0.031", 12: "12"}
    assert {eps: _radius(float(eps)) for eps in levels} == levels
    for wrong in ("titel", "clean_acc"):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            loops.robustbench_entry(ran, threat, **{wrong: "100.00"})
    with pytest.raises(ValueError, match="autoattack_acc stands for"):
        loops.robustbench_entry(ran, Linf(0.06))
    doubtful = dataclasses.replace(ran, doubts=evaluate(fn=probable)[0].doubts)
    with pytest.raises(ValueError, match=r"in doubt \(probabilities\)"):
        loops.robustbench_entry(doubtful, threat)
    entry = loops.robustbench_entry(
        doubtful, threat, name="a|b", link="https://x.y", footnote="probabilities", venue="ICML"
    )
    assert entry["unreliable"] is True
    assert leaderboard_row(entry) == (
        f"| [a\\|b](https://x.y)<br>probabilities | 100.00% | {share}% |  |  | ICML |"
    )


def test_bounds_over_draws_hold_where_examples_differ():
    base = evaluate(checks=False)[0]
    n, alpha = 30, 0.098
    bounds = [
        dataclasses.replace(base, redraws=(k, n)).redrawn_accuracy(alpha) for k in range(n + 1)
    ]
    low, high = (np.array([bound[i] for bound in bounds]) for i in (1, 2))
    narrow = statistics.clopper_pearson_lower(np.arange(n + 1), n, alpha / 2)
    worst = []
    for chances in (
        [0.05] + [0.0] * 29,
        [0.95] + [1.0] * 29,
        [0.5] * 30,
        [1.0, 0.5] * 15,
        [0.1] * 30,
    ):
        mass = np.ones(1)
        for p in chances:
            mass = np.convolve(mass, [1 - p, p])
        assert mass[low > np.mean(chances)].sum() <= alpha / 2
        assert mass[high < np.mean(chances)].sum() <= alpha / 2
        worst.append(mass[narrow > np.mean(chances)].sum())
    # The binomial bound alone, for which all chances are equal, does not hold.
    assert max(worst) > alpha / 2
