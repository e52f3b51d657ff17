"""The benchmark machinery at toy size, without the peer's library."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _command  # noqa: E402
import _common  # noqa: E402
import attacks as pairs  # noqa: E402
import autoattack  # noqa: E402
import catalogue  # noqa: E402
import cge  # noqa: E402
import compile as compile_times  # noqa: E402
import difference  # noqa: E402
import pgd  # noqa: E402

from jrobust import models  # noqa: E402

TOY = pgd.Settings(depth=8, widths=(4, 8, 8), side=8, batch=4, steps=3, rounds=2)


@pytest.fixture(scope="module")
def case():
    return pgd.make_case(TOY)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(_common.Watch, "others", lambda self: 0.0)


@pytest.fixture
def busy(monkeypatch):
    monkeypatch.setattr(_common.Watch, "others", lambda self: 0.3)


# --- counting


def test_flops_of_the_network_are_those_counted_by_hand(case):
    def conv(side, inputs, outputs):
        return 2 * side * side * 9 * inputs * outputs

    by_hand = (
        conv(8, 3, 4)
        + 2 * conv(8, 4, 4)
        + conv(4, 4, 8)
        + conv(4, 8, 8)
        + conv(2, 8, 8)
        + conv(2, 8, 8)
        + 2 * 8 * 10
    )
    forward = _common.operations(case.model, case.x)
    assert sum(operation.flops for operation in forward) == 4 * by_hand
    assert sum(operation.flops for operation in case.work()) == (3 + 3 + 1) * 4 * by_hand


def test_flops_of_grouped_convolutions_and_batched_products():
    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )

    # 3 outputs along the width, each of 6 channels sums 3 taps of 2 channels.
    (found,) = _common.operations(conv, jnp.ones((5, 7, 4)), jnp.ones((3, 2, 6)))
    assert found == (5 * 3 * 6 * 3 * 2 * 2, 4 * (5 * 7 * 4 + 3 * 2 * 6 + 5 * 3 * 6))
    (found,) = _common.operations(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    )
    assert found == (2 * 2 * 3 * 4 * 5, 4 * (2 * 3 * 4 + 2 * 4 * 5 + 2 * 3 * 5))


def test_flops_of_a_loop_are_refused():
    with pytest.raises(NotImplementedError, match="while"):
        _common.operations(lambda x: jax.lax.while_loop(lambda x: x < 3, jnp.sin, x), 1.0)


def test_the_roofline_takes_the_longer_of_computing_and_moving():
    limits = _common.Limits(flops=100.0, bandwidth=10.0, triads={})
    computing, moving = _common.Operation(600, 10), _common.Operation(100, 40)
    assert _common.roofline([computing], limits) == (6.0, 0.0)
    assert _common.roofline([moving], limits) == (4.0, 1.0)
    assert _common.roofline([computing, moving], limits) == (10.0, 0.4)


def test_limits_are_counted_operations_and_bytes_over_time(monkeypatch):
    asked = []

    def turn(run, examples, *, seconds):
        asked.append(run)
        return [lambda: 2.0, lambda: 4.0, lambda: 0.5][len(asked) - 1]

    monkeypatch.setattr(_common, "turn", turn)
    monkeypatch.setattr(_common.Watch, "others", lambda self: 0.0)
    load = _common.Load()
    limits = _common.measure_limits(load, rounds=2, side=8, sizes=[4096, 1024])
    assert limits == (2 * 8**3 / 2.0, 3 * 4096 / 0.5, {1024: 3 * 1024 / 4.0, 4096: 3 * 4096 / 0.5})
    assert load.rounds == [0.0, 0.0]
    product, small, _ = asked
    assert product().shape == (8, 8)
    first = small()
    assert first.nbytes == 1024
    np.testing.assert_array_equal(small(), 1.0)  # twice a half
    assert first.is_deleted(), "in place"


# --- the programs


def test_all_programs_do_the_same_attack(case):
    checks = pgd.same_programs(case)
    assert len(checks) == 2
    _common.require(checks)
    ours = case.programs[pgd.JROBUST]()
    moved = np.abs(np.asarray(ours.x - case.x))
    assert 0.9 * TOY.eps < moved.max() < 1.01 * TOY.eps
    assert np.array_equal(ours.forwards, np.full(4, TOY.steps + 1))
    assert np.array_equal(ours.backwards, np.full(4, TOY.steps))
    unrolled = case.programs[pgd.UNROLLED]()
    assert np.array_equal(ours.success, unrolled.success)
    np.testing.assert_allclose(ours.x, unrolled.x, atol=1e-6)


def test_the_start_is_that_of_the_attack(case):
    start = np.asarray(case.start())
    moved = np.abs(start - np.asarray(case.x))
    assert 0.8 * TOY.eps < moved.max() < 1.01 * TOY.eps
    still = dataclasses.replace(case.attack, step_size=1e-12)
    result = pgd.jrobust.run(still, case.key, case.model, case.x, case.y)
    np.testing.assert_allclose(start, result.x, atol=1e-6)


def test_a_case_survives_the_disk(case, tmp_path):
    case.save(tmp_path)
    again = pgd.Case.load(tmp_path, pgd.Settings)
    assert again.settings == case.settings
    assert jax.tree.structure(again.variables) == jax.tree.structure(case.variables)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.variables, case.variables))
    assert np.array_equal(again.x, case.x)


def test_labels_are_predictions_and_not_all_equal(case):
    assert np.array_equal(jnp.argmax(case.model(case.x), -1), case.y)
    assert len(set(np.asarray(case.y).tolist())) > 1


# --- the quiet machine


def test_a_busy_machine_is_refused(busy):
    with pytest.raises(_common.LoadedError, match=r"30%.*--force"):
        _common.check_quiet(seconds=0)
    assert _common.check_quiet(force=True, seconds=0).loaded


def test_a_quiet_machine_is_not(quiet):
    load = _common.check_quiet(seconds=0)
    assert not load.loaded
    times = _common.take_turns({"a": lambda: 1.0, "b": lambda: 2.0}, 3, load)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert load.rounds == [0.0] * 3
    assert load.repeated == 0


def test_our_own_work_is_not_the_load_of_others(monkeypatch):
    # 10 s on 2 cores: 12 CPU seconds were used, of them 10 by us.
    now = iter([(0.0, 100.0, 50.0), (10.0, 112.0, 60.0)])
    monkeypatch.setattr(_common.Watch, "_now", lambda self: next(now))
    watch = _common.Watch()
    watch.cores = 2
    assert watch.others() == pytest.approx(0.1)


def test_disturbed_rounds_are_repeated_in_rotated_order(monkeypatch):
    shares = iter([0.0, 0.5, 0.0])
    monkeypatch.setattr(_common.Watch, "others", lambda self: next(shares))
    order, load = [], _common.Load()
    turns = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    times = _common.take_turns(turns, 2, load)
    assert "".join(order) == "abbaab"
    assert times == {"a": [1, 5], "b": [2, 6]}
    assert (load.repeated, load.rounds, load.loaded) == (1, [0.0, 0.0], False)


def test_the_time_of_ended_children_is_our_own():
    watch = _common.Watch()
    before = watch._now()[2]
    code = "import time\nbegin = time.process_time()\nwhile time.process_time() < begin + 0.2: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert watch._now()[2] - before > 0.15


def test_the_time_of_a_living_workers_worker_is_our_own():
    worker = (
        "import time\nbegin = time.process_time()\nwhile time.process_time() < begin + 0.2: pass"
    )
    worker += "\nprint(flush=True)\ntime.sleep(600)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {worker!r}])"
    watch = _common.Watch()
    before = watch._now()[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert watch._now()[2] - before > 0.15
        for child in psutil.Process(process.pid).children():
            child.kill()


def test_steady_disturbance_ends_in_refusal_or_a_mark(busy):
    with pytest.raises(_common.LoadedError, match="disturbed"):
        _common.take_turns({"a": lambda: 1.0}, 2, _common.Load())
    load = _common.Load()
    assert _common.take_turns({"a": lambda: 1.0}, 2, load, force=True) == {"a": [1.0, 1.0]}
    assert load.loaded


# --- the report


def _report(load):
    limits = _common.Limits(1e9, 2e9, {2**20: 3e9, 2**21: 2e9})
    timed = _common.speed([0.01, 0.02, 0.04], 1e6, _common.Roofline(0.001, 0.25))
    return _common.report(
        "toy",
        load,
        limits,
        settings={},
        machine=_common.machine({"versions": {"torch": "0"}, "device": "toy"}),
        checks=[_common.check("equal", 0.0, 0.0)],
        rows=[_common.row("a", 4, **timed)],
        ratios=[_common.ratio("b to a", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0])],
    )


def test_the_report_has_the_schema_and_the_right_numbers(tmp_path):
    made = _report(_common.Load(rounds=[0.0]))
    (row,), (ratio,) = made["rows"], made["ratios"]
    assert row["examples_per_s"] == pytest.approx(50)
    assert row["gflops_per_s"] == pytest.approx(0.05)
    assert row["fraction_of_limit"] == pytest.approx(0.05)
    assert row["memory_bound"] == 0.25
    assert row["compile_cold_s"] is None
    assert made["limit"] == {
        "gflops_per_s": 1.0,
        "gbytes_per_s": 2.0,
        "triads": [{"mib": 1.0, "gbytes_per_s": 3.0}, {"mib": 2.0, "gbytes_per_s": 2.0}],
    }
    assert (ratio["median"], ratio["low"], ratio["high"]) == (2.0, 1.0, 3.0)
    out = tmp_path / "deep" / "toy.json"
    _common.write(made, out)
    _common.check_schema(json.loads(out.read_text()))
    assert "b to a" in _common.table(made)
    assert "1 GFLOP/s and 2.0 GB/s" in _common.table(made)
    assert "LOADED" not in _common.table(made)
    assert "LOADED" in _common.table(_report(_common.Load(rounds=[0.5])))


@pytest.mark.parametrize("result", sorted((BENCHMARKS / "results").glob("*.json")), ids=str)
def test_kept_results_have_the_schema(result):
    _common.check_schema(json.loads(result.read_text()))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda r: r.pop("limit"), "must have the fields"),
        (lambda r: r.update(schema="other/1"), "report.schema"),
        (lambda r: r["rows"][0].update(batch=4.0), r"report.rows\[0\].batch"),
        (lambda r: r["load"].update(loaded=0), "report.load.loaded"),
        (lambda r: r["ratios"][0].update(rounds=True), r"report.ratios\[0\].rounds"),
        (lambda r: r.update(checks={}), "report.checks must be a list"),
        (
            lambda r: r["rows"][0]["seconds_per_example"].append(None),
            r"report.rows\[0\].seconds_per_example\[3\]",
        ),
    ],
)
def test_a_spoiled_report_is_refused(spoil, complaint):
    made = _report(_common.Load())
    spoil(made)
    with pytest.raises(ValueError, match=complaint):
        _common.check_schema(made)


def test_sides_that_disagree_are_refused():
    _common.require([_common.check("fine", 0.1, 0.1)])
    for value in (0.2, float("nan")):
        with pytest.raises(_common.DisagreementError, match="logits"):
            _common.require([_common.check("logits", value, 0.1)])


# --- the command line


def test_numbers_of_the_settings_are_options(tmp_path):
    for settings in (pgd.Settings, pairs.Settings, difference.Settings):
        _command.parser("toy", "What.", settings, small="fewer")
    parser = _command.parser("toy", "What.\n\nMore.", cge.Settings, small="fewer", peer="torch")
    args = parser.parse_args(["--chunk", "3", "--mu", "1e-2", "--peer-python", "python"])
    assert _command.chosen(args, cge.Settings) == {"chunk": 3, "mu": 0.01}
    assert (args.small, args.force, args.out.name) == (False, False, "toy.json")
    assert args.peer_python == pathlib.Path("python")
    assert parser.description == "What."
    with pytest.raises(SystemExit):
        parser.parse_args(["--precision", "highest"])


def test_a_report_is_written_or_its_lack_explained(tmp_path, capsys):
    out = tmp_path / "toy.json"

    def busy():
        raise _common.LoadedError("too busy")

    with pytest.raises(SystemExit, match="not reporting: too busy"):
        _command.finish(busy, out)
    assert not out.exists()
    made = _command.finish(lambda: _report(_common.Load()), out)
    assert json.loads(out.read_text()) == made
    assert f"{_common.table(made)}\nwritten to {out}\n" == capsys.readouterr().out


# --- compile time


def test_every_algorithm_of_the_catalogue_is_compiled():
    names = compile_times.programs(small=False)
    tables = (catalogue.OBJECTIVES, catalogue.NOISES, catalogue.ESTIMATORS)
    parts = [part.name for table in tables for part in table]
    for model in ("MLP", "ResNet-20"):
        for algorithm in [entry.name for entry in catalogue.ATTACKS] + parts:
            assert any(name.startswith(f"{model}: {algorithm},") for name in names), algorithm
    pgd_norms = [name for name in names if name.startswith("MLP: PGD,")]
    (entry,) = [entry for entry in catalogue.ATTACKS if entry.name == "PGD"]
    assert pgd_norms == [f"MLP: PGD, {threat.norm}" for threat in entry.threats]


def test_every_program_can_be_traced():
    for name, make in compile_times.programs(small=True).items():
        program = make()
        assert jax.tree.leaves(jax.eval_shape(program.fn, *program.args)), name


def test_a_program_is_compiled_and_weighed():
    square = jax.jit(lambda x: jnp.sin(x) @ x)
    shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    measured = compile_times.compile_once(compile_times.Program(square, (shape,)))
    assert 0 < measured["trace_s"] < measured["compile_s"]
    assert measured["program_bytes"] > 100
    assert (
        measured["temp_bytes"] == square.lower(shape).compile().memory_analysis().temp_size_in_bytes
    )


COLD = {"trace_s": 1.0, "compile_s": 5.0, "hits": 0, "misses": 1}
COLD |= {"program_bytes": 2**20, "temp_bytes": 2**21}
WARM = {**COLD, "trace_s": 3.0, "compile_s": 4.0, "hits": 1, "misses": 0}


def test_rows_of_compile_times_are_medians_in_a_table():
    slow = {**COLD, "compile_s": 9.0}
    row = compile_times.row("a, b", 8, [(COLD, WARM), (slow, WARM), (slow, WARM)])
    assert (row["compile_cold_s"], row["compile_warm_s"], row["trace_s"]) == (9.0, 4.0, 2.0)
    made = {**_report(_common.Load()), "rows": [row]}
    _common.check_schema(made)
    line = "| a, b | 2.00 s | 9.00 s | 4.00 s | 1,024 KiB | 2.0 MiB |"
    assert compile_times.markdown(made).splitlines()[-1] == line


def test_a_cache_that_was_hit_or_missed_at_the_wrong_time_is_refused():
    _common.require(compile_times.checks([(COLD, WARM)]))
    for pair in ((WARM, WARM), (COLD, COLD)):
        with pytest.raises(_common.DisagreementError, match="cache"):
            _common.require(compile_times.checks([(COLD, WARM), pair]))


def test_cold_and_warm_share_a_cache_that_is_empty_at_first(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys
            flag, cache = sys.argv[1:]
            print("noise")
            print(json.dumps({"flag": flag, "found": os.listdir(cache)}))
            open(os.path.join(cache, "entry"), "w").close()
            """
        )
    )
    assert _common.cold_and_warm(script, "--x") == [
        {"flag": "--x", "found": []},
        {"flag": "--x", "found": ["entry"]},
    ]


@pytest.mark.full
def test_the_cache_makes_the_second_process_faster(quiet):
    made = compile_times.measure(["SmallCNN: PGD, Linf"], small=True)
    (row,) = made["rows"]
    assert row["trace_s"] < row["compile_warm_s"] < row["compile_cold_s"]
    assert row["program_bytes"] > 10_000
    assert row["temp_bytes"] > 10_000


# --- the peer


def test_a_peer_answers_reports_its_errors_and_its_death(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys
            for line in sys.stdin:
                request = json.loads(line)
                if request["do"] == "die":
                    sys.exit(0)
                answer = {"error": "no"} if request["do"] == "fail" else {
                    "twice": 2 * request["value"], "policy": os.environ["OMP_WAIT_POLICY"]}
                print(json.dumps(answer), flush=True)
            """
        )
    )
    with _common.Peer(pathlib.Path(sys.executable), script) as peer:
        assert peer.ask("double", value=3) == {"twice": 6, "policy": "PASSIVE"}
        with pytest.raises(RuntimeError, match="failed to fail: no"):
            peer.ask("fail")
        with pytest.raises(RuntimeError, match="died"):
            peer.ask("die")
    with pytest.raises(FileNotFoundError, match="--peer-python"):
        _common.Peer(tmp_path / "nothing", script)


def test_the_peer_is_timed_at_its_best_batch_size():
    class Fake:
        pid = 0

        def ask(self, do, batch, repeats):
            return {"seconds": {1: 4.0, 2: 3.0, 4: 2.0, 8: 1.0, 16: 5.0}[batch]}

    turn, best = pgd.peer_turn(Fake(), TOY)
    assert best == 8
    assert turn() == 1.0


# --- pairs of attacks


@pytest.fixture(scope="module")
def digits():
    settings = pairs.Settings(examples=4, share=0.1)
    x = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
    module = models.SmallCNN(widths=(4, 4), hidden=8)
    case = autoattack.Case(settings, module.init(jax.random.key(0), x), x, np.arange(4))
    case.module = module
    case.model = models.bind(module, case.variables)
    case.y = np.asarray(case.model(x)).argmax(1)
    return case


class Echo:
    """A peer that answers with the points it is given."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def ask(self, what, **request):
        self.asked.append(request)
        if "out" in request:
            np.savez(self.folder / request["out"], x=self.x, success=self.success)
        return {"seconds": 2.0}


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_both_sides_of_a_pair_have_the_same_settings(name, digits):
    pair = pairs.PAIRS[name]
    run = pairs.Run(digits, pair, digits.settings.share)
    run.attack.check(digits.x, digits.y, 10)
    assert run.length == (pair.length if pair.minimal else max(1, pair.length // 10))
    lengths = {k: v for k, v in run.arguments.items() if k in ("steps", "n_queries")}
    assert set(lengths.values()) <= {run.length}
    assert name == "FGSM" or lengths
    if pair.minimal:
        assert run.eps is None
        assert float(run.threat.eps) == pytest.approx(run.threat.widest(1.0, (8, 8, 1)))
    else:
        assert run.eps == pytest.approx(run.arguments.get("eps", 5 * digits.settings.eps))
    step = run.arguments.get("alpha", run.arguments.get("abs_stepsize"))
    if step is not None:
        size = run.attack.step_size
        assert step == pytest.approx(run.attack.rel_step_size * run.eps if size is None else size)


def test_a_peer_that_is_stronger_stops_the_report(digits, tmp_path):
    run = pairs.Run(digits, pairs.PAIRS["FMN"], 1.0)
    peer = Echo(tmp_path)
    peer.x, peer.success = np.abs(digits.x - 1e-5), np.ones(4, bool)
    checks, ours = run.same("FMN", peer, tmp_path)
    stands, distance = checks
    assert stands["value"] == pytest.approx(1 - np.mean(ours.success))
    assert distance["value"] > 100
    with pytest.raises(_common.DisagreementError, match="FMN: median distance over theirs"):
        _common.require(checks)
    peer.success = np.zeros(4, bool)
    assert run.same("FMN", peer, tmp_path)[0][1]["passed"]
    assert run.theirs(peer, 2) == 2.0
    assert peer.asked[-1]["batch"] == 2


@pytest.mark.full
def test_differences_are_those_of_the_loss():
    checks = difference.Case(difference.Settings(depth=8, batch=4, tile=2)).checks()
    assert len(checks) == 4
    _common.require(checks)


@pytest.mark.full
def test_cge_and_vmap_over_weights_estimate_the_same():
    case = cge.Case(cge.Settings(depth=8, batch=4, coordinates=32, lanes=2))
    _, apart = cge.vmap_turn(case, case.estimate()[0], case.quotients())
    assert apart < 0.1
