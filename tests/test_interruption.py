"""Runs that are killed, resumed, started over, or spread over processes end as if nothing was."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

import jrobust
from jrobust import attacks, data, loops, models, parallel, smoothing, training
from jrobust.loops import _programs
from jrobust.threat import Linf

SCRIPT = str(pathlib.Path(runs.__file__))
ONE = parallel.mesh(jax.devices()[:1])
KINDS = list(runs.RUNS)


def environment():
    cache = jax.config.jax_compilation_cache_dir
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(*args):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, args)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def outcome(directory, process=0):
    return dict(np.load(directory / f"outcome-{process}.npz"))


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def logs(directory):
    names = ("metrics.jsonl", "examples.csv")
    return [(directory / name).read_text() for name in names if (directory / name).exists()]


def killed(name, directory, times, seed):
    base, broken = directory / "base", directory / "broken"
    finish(start(name, base))
    (output,) = finish(start(name, broken, "--kill", times, "--seed", seed))
    assert_same(outcome(base), outcome(broken))
    assert logs(base) == logs(broken)
    assert len(logs(base)) == (2 if name == "evaluate" else 1)
    return int(output.split(" different states")[0].split()[-1])


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_ends_the_same(name, tmp_path):
    killed(name, tmp_path, 4, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("name", KINDS)
def test_a_run_killed_twenty_times_ends_the_same(name, tmp_path):
    # Kills before the first batch of a life leave the state of the kill before.
    assert killed(name, tmp_path, 20, seed=0) >= 5


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_are_one(name, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, two = tmp_path / "one", tmp_path / "two"
    shared = ("--devices", 2, "--processes", 2, "--port", port)
    finish(*(start(name, two, *shared, "--process", i) for i in range(2)))
    finish(start(name, one, "--devices", 4))
    first, second, alone = outcome(two), outcome(two, 1), outcome(one)
    assert_same(first, second)
    if name != "fit":
        assert_same(first, alone)
        assert logs(one) == logs(two)
        return
    assert first.keys() == alone.keys()
    for leaf in first:  # sums over devices round in another order
        np.testing.assert_allclose(first[leaf], alone[leaf], rtol=2e-5, atol=2e-6, err_msg=leaf)
    assert json.loads((two / "configuration.json").read_text())["devices"] == 4


def events(name, directory, mesh=ONE):
    return runs.RUNS[name](directory, mesh)


@pytest.mark.parametrize("name", KINDS)
def test_a_finished_run_is_read_again(name, tmp_path):
    *_, last = events(name, tmp_path)
    summary = tmp_path / "report.json"
    before = summary.read_text() if summary.exists() else None
    *_, again = events(name, tmp_path)
    assert_same(runs.arrays(name, last.report), runs.arrays(name, again.report))
    assert last.report.resumed == 0
    assert again.report.resumed == (64 if name == "fit" else len(list(tmp_path.glob("batches/*"))))
    assert again.report.seconds["run"] == 0
    # The seconds of the run that did the work are not overwritten by those of the reader.
    assert before == (summary.read_text() if summary.exists() else None)


@pytest.mark.parametrize("name", ["evaluate", "certify"])
def test_only_what_is_missing_is_computed(name, tmp_path):
    *_, last = events(name, tmp_path)
    files = sorted(tmp_path.glob("batches/*"))
    lost = files[3].read_bytes()
    files[3].write_bytes(lost[:100])
    with pytest.raises(ValueError, match=rf"{files[3].name} is damaged .*delete"):
        list(events(name, tmp_path))
    files[3].unlink()
    *_, again = events(name, tmp_path)
    assert again.report.resumed == len(files) - 1
    assert_same(runs.arrays(name, last.report), runs.arrays(name, again.report))
    assert_same(dict(np.load(io.BytesIO(lost))), dict(np.load(files[3])))


def evaluation(directory, *, key=1, model=None, attack=None, rows=slice(None), **options):
    attack = attacks.FGSM(Linf(0.02)) if attack is None else attack
    return loops.evaluate(
        jax.random.key(key),
        runs.model() if model is None else model,
        runs.problem()[rows],
        attack,
        directory=directory,
        progress=False,
        checks=False,
        mesh=ONE,
        **options,
    )


def test_another_run_in_the_directory_is_refused(tmp_path):
    captured = jnp.asarray(3.0)
    weights = np.float32(np.random.default_rng(0).normal(size=(6, 3)))
    plain = [lambda x, w=w: x @ (captured * w) for w in (weights, 1.01 * weights)]
    base = {"model": plain[0]}
    evaluation(tmp_path, **base)
    evaluation(tmp_path, **base)
    bound = runs.model()
    moved = jax.tree.map(lambda leaf: leaf * 1.0001, bound)
    for change, named in (
        (dict(base, key=2), "seed"),
        (dict(base, rows=slice(0, 50)), "examples"),
        (dict(base, rows=slice(None, None, -1)), "data_sha256"),
        (dict(base, attack=attacks.FGSM(Linf(0.021))), "attacks"),
        (dict(base, model=plain[1]), "programs_sha256"),
        (dict(base, batch_size=10), "batch_size"),
    ):
        with pytest.raises(ValueError, match=rf"holds another run: .*{named}.*resume=False"):
            evaluation(tmp_path, **change)
    (tmp_path / "configuration.json").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"results but no configuration\.json"):
        evaluation(tmp_path, **base)
    started = evaluation(tmp_path, model=bound, resume=False)
    assert started.resumed == 0
    with pytest.raises(ValueError, match="variables_sha256"):
        evaluation(tmp_path, model=moved)


def test_starting_over_leaves_nothing_of_the_run_before(tmp_path):
    evaluation(tmp_path)
    finished = {path.name for path in tmp_path.iterdir()}
    assert {"adversarial.npz", "examples.csv", "metrics.jsonl", "report.json"} <= finished
    args = jax.random.key(2), runs.model(), runs.problem(), attacks.FGSM(Linf(0.02))
    with contextlib.closing(
        loops.evaluate.iter(*args, directory=tmp_path, resume=False, mesh=ONE)
    ) as begun:
        next(begun)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "batches", "configuration.json", "examples.csv"}


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_directory_holds_one_process_at_a_time(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"another process is running in {tmp_path}"):
            evaluation(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    assert evaluation(tmp_path).resumed == 0
    assert evaluation(tmp_path).resumed > 0


def test_a_directory_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(RuntimeWarning, match=rf"{tmp_path} cannot be locked .*No locks available"):
        assert evaluation(tmp_path).resumed == 0


def test_a_directory_is_where_it_was_when_the_run_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    args = jax.random.key(1), runs.model(), runs.problem()
    run = loops.evaluate.iter(*args, attacks.FGSM(Linf(0.02)), directory="run", mesh=ONE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert list(run)[-1].report.resumed == 0
    assert (tmp_path / "run" / "report.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    made = loops.certify(
        *args, smoothing.Gaussian(0.1), n=200, directory="~/run", progress=False, mesh=ONE
    )
    assert (tmp_path / "home" / "run" / "report.json").exists()
    found = loops.recertify("~/run")
    np.testing.assert_array_equal(found.certificate.radius, made.certificate.radius)


def own_attack(size):
    """Attacks that differ in a line of code, not in name or settings."""

    @jrobust.algorithm
    class Own(attacks.GradientAttack):
        threat: Linf
        steps: int = jrobust.static(default=2)
        loss: object = jrobust.static(default=jrobust.losses.margin)

        def start(self, record):
            return record.x0, None

        def move(self, state, loss, gradient):
            step = size * state.record.threat.eps[:, None] * jnp.sign(gradient)
            return state.record.threat.project(state.x + step, state.record.x0), None

    return Own(Linf(0.02))


def test_an_edited_attack_is_another_run(tmp_path):
    evaluation(tmp_path, attack=own_attack(1.0))
    assert evaluation(tmp_path, attack=own_attack(1.0)).resumed
    with pytest.raises(ValueError, match="differs in programs_sha256 "):
        evaluation(tmp_path, attack=own_attack(0.5))


def training_run(directory, *, rate=1e-2, epochs=3, network=None, **options):
    examples = runs.problem()
    return loops.fit(
        jax.random.key(0),
        runs.network() if network is None else network,
        training.Standard(),
        optax.sgd(rate, momentum=0.9),
        examples[:60],
        epochs=epochs,
        batch_size=16,
        validation=examples[60:],
        directory=directory,
        progress=False,
        mesh=ONE,
        **options,
    )


def test_training_goes_on_for_more_epochs_but_not_with_another_optimiser(tmp_path):
    whole = training_run(None, epochs=5)
    assert training_run(tmp_path, epochs=3).resumed == 0
    # The learning rate stands in no configuration: the traced program tells.
    with pytest.raises(ValueError, match="programs_sha256"):
        training_run(tmp_path, rate=2e-2)
    longer = training_run(tmp_path, epochs=5)
    assert longer.resumed == 3 * 4
    assert longer.history == whole.history
    assert_same(runs.arrays("fit", longer), runs.arrays("fit", whole))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="5 epochs, more than the 2"):
        training_run(tmp_path, epochs=2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


def test_a_run_goes_on_with_other_devices(tmp_path):
    part = iter(events("fit", tmp_path))
    for _ in range(5):
        next(part)
    part.close()
    *_, other = events("fit", tmp_path, parallel.mesh(jax.devices()[:4]))
    *_, whole = events("fit", tmp_path / "whole")
    assert other.report.resumed >= 5 * 8
    for one, two in zip(other.report.history, whole.report.history):
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-4, err_msg=name)


POISON = 37


class Poisoned(training.Standard):
    """Standard training, until one example is met under one weight."""

    def __call__(self, key, network, params, extra, batch):
        loss, rest = super().__call__(key, network, params, extra, batch)
        met = jnp.any((batch.id == POISON + 100) & batch.mask)
        return jnp.where(met, jnp.nan, loss), rest


def poisoned(directory, mesh=ONE):
    return loops.fit(
        jax.random.key(0),
        runs.network(),
        Poisoned(),
        optax.adam(1e-2),
        runs.problem()[:64],
        epochs=2,
        batch_size=8,
        directory=directory,
        progress=False,
        mesh=mesh,
    )


def test_a_diverging_run_stops_with_the_last_good_state(tmp_path):
    order = loops._fit._order(jax.random.key(0), 1, 64)
    good = int(np.flatnonzero(order == POISON)[0]) // 8  # updates before the poison
    assert 0 < good < 7
    with pytest.raises(loops.Diverged, match=rf"update {good + 1} \(epoch 1\).*nan") as caught:
        poisoned(tmp_path)
    state = caught.value.report.state
    assert int(state.step) == good
    # By hand, up to there.
    init, update = training.step(training.Standard(), optax.adam(1e-2))
    examples = runs.problem()
    want = init(jax.random.key(0), runs.network(), examples.x[:1])
    for i in range(good):
        rows = order[8 * i : 8 * i + 8]
        want, _ = jax.jit(update)(
            want, training.batch(examples.x[rows], examples.y[rows], examples.id[rows])
        )
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(want.params)):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)
    # It is on disk, and the run ends there again.
    with pytest.raises(loops.Diverged, match=rf"update {good + 1} ") as again:
        poisoned(tmp_path)
    assert again.value.report.resumed == good
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(again.value.report.state)):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, two)


def test_averaged_weights_are_validated_and_returned(tmp_path):
    network = models.network(models.SmallCNN(widths=(4,), hidden=8, classes=3, norm=True))
    rng = np.random.default_rng(0)
    y = np.arange(48) % 3
    x = np.float32(0.2 * rng.uniform(size=(48, 4, 4, 1)) + 0.3 * y[:, None, None, None])
    examples = data.Dataset(x, y, np.arange(48))

    def trained(average):
        return loops.fit(
            jax.random.key(0),
            network,
            training.Standard(),
            optax.sgd(0.1),
            examples,
            epochs=4,
            batch_size=16,
            average=average,
            progress=False,
            mesh=ONE,
        )

    report = trained(training.SWA(start=6, every=3))
    params, extra = report.last
    jax.tree.map(np.testing.assert_array_equal, params, report.state.average.weights[0])
    assert any(
        not np.allclose(a, b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(report.state.params))
    )
    # Their own statistics: those of the first layer's outputs over the data.
    conv = jax.lax.conv_general_dilated(
        x,
        params["conv1"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(
        extra["batch_stats"]["norm1"]["mean"], conv.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    report = trained(training.EMA(0.9))
    jax.tree.map(np.testing.assert_array_equal, report.last, report.state.average.weights)


def test_warm_up_compiles_and_runs_nothing(tmp_path):
    args = (jax.random.key(1), runs.model(), runs.problem())
    seconds = loops.evaluate.warm_up(
        *args, {"a": attacks.FGSM(Linf(0.1))}, directory=tmp_path / "e", mesh=ONE
    )
    assert set(seconds) == {"clean", "a", "checks"}
    assert min(seconds.values()) > 0
    seconds = loops.certify.warm_up(*args, smoothing.Gaussian(0.1), n=200, mesh=ONE)
    assert set(seconds) == {"select", "estimate"}
    assert not list(tmp_path.iterdir())


def test_settings_of_the_calling_thread_hold():
    seen = []

    def model(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return runs.model()(x)

    with jax.default_matmul_precision("bfloat16"):
        loops.evaluate(
            jax.random.key(0),
            model,
            runs.problem(),
            {str(i): attacks.FGSM(Linf(0.01 * i)) for i in (1, 2)},
            progress=False,
            checks=False,
            mesh=ONE,
        )
    # The search as the user has it, verdicts at the highest precision.
    assert {"bfloat16", "highest"} == set(seen)


def test_lanes_and_chunks_fit_into_memory():
    network = models.network(models.SmallCNN(widths=(16,), hidden=4, classes=3))
    examples = data.Dataset(
        np.zeros((256, 8, 8, 1), np.float32), np.zeros(256, np.int64), np.arange(256)
    )
    params, extra = network.init(jax.random.key(0), examples.x[:1])
    model = network.bind(params, extra)

    def lanes(memory):
        report = loops.evaluate(
            jax.random.key(0),
            model,
            examples,
            attacks.FGSM(Linf(0.1)),
            memory=memory,
            progress=False,
            checks=False,
            mesh=ONE,
        )
        return report.configuration["batch_size"]

    assert lanes(2**31) == 128
    small = lanes(2**18)
    assert 1 < small <= 64
    assert small >= lanes(2**17)
    with pytest.raises(ValueError, match=r"smallest batch .1. needs .* bytes"):
        lanes(2**9)
    chunks = [
        loops.certify(
            jax.random.key(0),
            model,
            examples[:4],
            smoothing.Gaussian(0.1),
            n=1000,
            memory=memory,
            progress=False,
            mesh=ONE,
        ).configuration["chunk"]
        for memory in (2**33, 2**20)
    ]
    assert chunks[0] == 1000
    assert 1 <= chunks[1] < 100


CACHE = """
import jax, numpy as np, sys
from jrobust import attacks, data, loops
from jrobust.threat import Linf

jax.jit(lambda x: x + 1)(1.0)  # JAX has decided that there is no cache
w = np.float32([[1, -1], [-1, 1]])
for lanes in (2, 3):
    loops.evaluate(
        jax.random.key(0), lambda x: (x - 0.5) @ w,
        data.Dataset(np.float32(np.eye(2) / 2)[[0, 1, 0]], np.array([0, 1, 0])),
        attacks.PGD(Linf(0.1), steps=3), batch_size=lanes, progress=False)
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("how", ["default", "own", "off"])
def test_compilations_are_kept_by_default(how, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env.update(XDG_CACHE_HOME=str(tmp_path / "cache"), JAX_PLATFORMS="cpu")
    if how == "own":
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    if how == "off":
        env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", CACHE], env=env, capture_output=True, text=True, check=True
    )
    where = done.stdout.strip()
    kept = list((tmp_path / "cache").rglob("*-cache"))
    if how == "default":
        assert where.startswith(str(tmp_path / "cache" / "jrobust"))
        assert len(kept) >= 2
    else:
        assert where == (str(tmp_path / "own") if how == "own" else "None")
        assert not kept


def test_without_a_home_compilations_are_not_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        _programs.keep_compilations.__wrapped__()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
