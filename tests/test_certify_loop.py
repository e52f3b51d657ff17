"""The certification loop: its modes, its log, what is recomputed from it, what it refuses."""

import decimal
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import loops, parallel, report, smoothing
from jrobust._algorithm import describe
from jrobust.data import Dataset
from jrobust.loops import _votes_log
from jrobust.models import Bound

KEY = jax.random.key(4)
ONE = parallel.mesh(jax.devices()[:1])
NOISE = smoothing.Gaussian(0.25)
N = 18


def bands(params, extra, x):
    """Three classes by the first feature, exact in any batch shape: comparisons alone decide."""
    x = x.reshape(len(x), -1)[:, 0] + params
    return jnp.stack([0.35 - x, jnp.minimum(x - 0.35, 0.65 - x), x - 0.65], 1)


MODEL, TWIN = Bound(jnp.zeros(()), {}, bands), Bound(jnp.float32(0.01), {}, bands)


def problem(n=N):
    x = np.random.default_rng(0).uniform(size=(n, 3)).astype(np.float32)
    y = np.digitize(x[:, 0], [0.35, 0.65])
    return Dataset(x, y, 40 + 3 * np.arange(n))


DATA = problem()
COMMON = {"n0": 20, "n": 400, "alpha": 0.05, "block": 50, "batch_size": 8, "mesh": ONE}
STAGED = {"n": None, "stages": (50, 100, 400), "radius": 0.2}
PAIRED = {"voter": TWIN, "pairs": 200}
MODES = {"plain": {}, "staged": STAGED, "voter": PAIRED}


def certify(directory=None, *, key=KEY, model=MODEL, data=DATA, noise=NOISE, **settings):
    settings = {**COMMON, "progress": False, **settings}
    return loops.certify(key, model, data, noise, directory=directory, **settings)


def assert_same(one, two, counts=True):
    """The same certificates, counts and examples, to the bit."""
    for name, value in vars(one.certificate).items():
        np.testing.assert_array_equal(value, getattr(two.certificate, name), err_msg=name)
    for name in ("select_counts", "estimate_counts", "disagreements", "y", "id"):
        if counts and getattr(one, name) is not None:
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=MODES)
def run(request, tmp_path_factory):
    """(settings, directory, report) of a finished run of each mode."""
    directory = tmp_path_factory.mktemp(request.param)
    return MODES[request.param], directory, certify(directory, **MODES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    return directory, certify(directory)


count_votes = jax.jit(smoothing.count_votes, static_argnums=4)
count_disagreements = jax.jit(smoothing.count_disagreements, static_argnums=5)


def by_hand(count, key, *models, n, start=0):
    """Counts of all examples, in samples of fifties."""
    x, ids = jnp.asarray(DATA.x), jnp.asarray(DATA.id)
    step = min(n, 50)
    blocks = [
        count(key, *models, x, NOISE, step, start=jnp.uint32(sample), ids=ids)
        for sample in range(start, start + n, step)
    ]
    return np.sum(blocks, axis=0)


# The modes


def test_stages_count_only_what_is_asked_for(tmp_path):
    found = certify(tmp_path, **STAGED)
    keys = smoothing.stages(KEY)
    asked = []

    def vote(rows, start, n):
        asked.append((rows, start, n))
        return by_hand(count_votes, keys.estimate, MODEL, n=n, start=start)[rows]

    select = by_hand(count_votes, keys.select, MODEL, n=20)
    expected = smoothing.certify_staged(
        select, vote, NOISE, 0.05, stages=STAGED["stages"], radius=0.2
    )
    assert [len(rows) for rows, *_ in asked] == sorted({len(r) for r, *_ in asked}, reverse=True)
    assert 0 < len(asked[-1][0]) < N / 2
    for name in ("prediction", "radius", "p_lower", "selected", "count", "rejects", "n"):
        np.testing.assert_array_equal(getattr(found.certificate, name), getattr(expected, name))
    cast = sum(np.isin(np.arange(N), rows) * n for rows, _, n in asked)
    np.testing.assert_array_equal(found.estimate_counts.sum(1), cast)
    assert found.votes == 20 * N + cast.sum() < N * 420
    # Later stages pack what is open into full batches.
    for stage, (rows, start, n) in enumerate(asked):
        batches = [np.load(p) for p in sorted(tmp_path.glob(f"batches/{stage:02d}-*"))]
        assert len(batches) == -(-len(rows) // 8)
        np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), rows)
        assert all(b["start"] == start and b["estimate"].shape[1:] == (n // 50, 4) for b in batches)
    written = (tmp_path / "examples.csv").read_text().splitlines()[1:]
    assert sorted(int(line.split(",")[0]) for line in written) == DATA.id.tolist()


def test_a_voter_votes_and_the_model_is_certified():
    found = certify(**PAIRED)
    keys = smoothing.stages(KEY)
    select = by_hand(count_votes, keys.select, TWIN, n=20)
    votes = by_hand(count_votes, keys.estimate, TWIN, n=400)
    pairs = by_hand(count_disagreements, keys.estimate, MODEL, TWIN, n=200)
    np.testing.assert_array_equal(found.select_counts, select)
    np.testing.assert_array_equal(found.estimate_counts, votes)
    np.testing.assert_array_equal(found.disagreements, pairs)
    assert pairs[:, :-1].sum() > 20, "the twins differ"
    assert np.any(votes != by_hand(count_votes, keys.estimate, MODEL, n=400))
    expected = smoothing.certify(select, votes, NOISE, 0.05, disagreements=pairs)
    np.testing.assert_array_equal(found.certificate.radius, expected.radius)
    assert np.all(found.certificate.radius <= found.configuration["radius_ceiling"])
    # The exact model's own votes prove more, its twin's without the pairs would prove the twin's.
    assert found.average_radius < certify().average_radius


@pytest.mark.parametrize("settings", [STAGED, PAIRED], ids=["staged", "voter"])
def test_counts_do_not_depend_on_devices(settings):
    assert_same(certify(**settings), certify(**settings, mesh=None))


# The log


RULES = {
    "fewer votes": {"n": 200},
    "another alpha": {"alpha": 0.003},
    "two bounds": {"two_bounds": True},
    "top": {"top": 2},
    "anytime": {"anytime": True},
    "all at once": {"n": 150, "alpha": 0.02, "top": 2, "two_bounds": True},
    "stages": {"n": None, "stages": (100, 400)},
    "stages and a radius": STAGED,
}


@pytest.mark.parametrize("change", RULES.values(), ids=RULES)
def test_the_log_gives_what_a_run_would(plain, change):
    directory, base = plain
    before = files(directory)
    again = loops.recertify(directory, **change)
    assert_same(certify(**change), again)
    assert files(directory) == before
    assert np.any(again.certificate.radius != base.certificate.radius)
    assert again.seconds["run"] == 0
    for name, value in change.items():
        if name != "n" or value is not None:
            assert again.configuration[name] == (list(value) if name == "stages" else value)


def test_the_log_gives_the_run_itself(run):
    settings, directory, base = run
    assert_same(base, loops.recertify(directory))
    other = loops.recertify(directory, alpha=0.2)
    assert_same(other, certify(**settings, alpha=0.2))


def test_pairs_are_a_prefix_too(run):
    settings, directory, _ = run
    if "pairs" not in settings:
        with pytest.raises(ValueError, match="pairs must be at most the log's 0, got 50"):
            loops.recertify(directory, pairs=50)
        return
    fewer = loops.recertify(directory, pairs=100, n=350)
    assert_same(certify(**{**settings, "pairs": 100, "n": 350}), fewer)


def test_what_the_log_cannot_give_is_refused(run, tmp_path):
    settings, directory, base = run
    last = [400] if settings is not STAGED else [100, 400]
    for change, text in (
        ({"n": 450}, "fewer than the 450 votes"),
        ({"n": 130}, "block = 50 does not divide 130"),
        ({"alpha": 1.0}, "alpha"),
        ({"n": 50, "alpha": 1e-20}, "n = 50 .*can never certify"),
        ({"noise": smoothing.Gaussian(0.5)}, "is of the noise .*0.25.*, not of .*0.5"),
        (
            {"radius": 9.0, "stages": last} if settings is not PAIRED else {"n": 0},
            "of at most|n mu",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            loops.recertify(directory, **change)
    if settings is STAGED:  # examples that were done with lack votes
        short = int(np.sum(base.estimate_counts.sum(1) < 400))
        with pytest.raises(ValueError, match=f"asks for of {short} of 18 examples"):
            loops.recertify(directory, n=400)
    with pytest.raises(ValueError, match="holds no certification run"):
        loops.recertify(tmp_path)


def test_the_log_says_what_it_is(run):
    _, directory, base = run
    stored = json.loads((directory / "configuration.json").read_text())
    assert stored["block"] == 50
    assert stored["noise"] == {"name": "Gaussian", "sigma": 0.25}
    assert stored["seed"] == jax.random.key_data(KEY).tolist()
    assert (stored["key_impl"], stored["dtype"]) == (str(jax.random.key_impl(KEY)), "float32")
    assert stored["jax"] == jax.__version__
    total = np.zeros_like(base.estimate_counts)
    for path in directory.glob("batches/*.npz"):
        batch = np.load(path)
        assert batch["estimate"].dtype == np.uint8
        np.testing.assert_array_equal(batch["estimate"].sum(2), 50)
        np.testing.assert_array_equal(batch["id"], DATA.id[batch["index"]])
        np.testing.assert_array_equal(batch["y"], DATA.y[batch["index"]])
        total[batch["index"]] += batch["estimate"].sum(1, dtype=np.int32)
    np.testing.assert_array_equal(total, base.estimate_counts)


def custom():
    @jrobust.algorithm
    class Gaussian(smoothing.Gaussian):
        """Of the same name, with another radius."""

        def radius(self, q, runner=None):
            return 0.5 * super().radius(q, runner)

    return Gaussian(0.25)


def test_a_noise_of_ones_own_is_passed_again(tmp_path):
    noise = custom()
    base = certify(tmp_path, noise=noise)
    with pytest.raises(ValueError, match=r"is from .*test_certify_loop: pass it with noise="):
        loops.recertify(tmp_path)
    assert_same(base, loops.recertify(tmp_path, noise=noise))
    with pytest.raises(ValueError, match="the log is of the noise"):
        loops.recertify(tmp_path, noise=NOISE)


def test_radii_in_another_norm_come_from_the_same_log(plain):
    directory, base = plain
    noise = smoothing.Converted(NOISE, norm="Linf", size=3)
    again = loops.recertify(directory, noise=noise)
    assert_same(certify(noise=noise), again)
    assert again.certificate.norm == "Linf"
    assert again.configuration["noise"]["norm"] == "Linf"
    assert 0 < again.average_radius < base.average_radius
    with pytest.raises(ValueError, match="pass size=3"):
        loops.recertify(directory, noise=smoothing.Converted(NOISE, norm="Linf", size=2))


@pytest.mark.parametrize(
    "noise",
    [
        smoothing.Gaussian(0.1),
        smoothing.Gaussian(jnp.float32(0.1)),
        smoothing.Converted(smoothing.Uniform(0.3), norm="Linf", size=3),
        smoothing.DiscreteGaussian(0.12, 3),
        smoothing.Pareto(0.1, 2.5),
        smoothing.Exponential(0.1, 3),
        smoothing.Masking(1, 3, fill=-1.0),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_noises_come_back_from_their_description(noise):
    written = json.loads(json.dumps(describe(noise), default=float))
    stored = {"noise": written, "noise_from": _votes_log.source_of(noise), "shape": [3]}
    again = _votes_log.noise_of(stored, None)
    q = np.array([1e-6, 0.01, 0.2])
    np.testing.assert_array_equal(again.radius(q), noise.radius(q))
    assert type(again) is type(noise)


def test_blocks():
    def block(*stages, pairs=0, block=None):
        return _votes_log.block_size(
            _votes_log.Rule(_votes_log.Bounds(NOISE, pairs=pairs), 0.05, stages), block
        )

    assert block(100_000) == 1000
    assert block(10_000, pairs=2500) == 1250
    assert block(200) == 200
    assert block(7919) == 7919
    assert block(2 * 1499) == 1499
    assert block(100, 1000, 10_000) == 100
    assert block(10_000, block=500) == 500
    with pytest.raises(ValueError, match="take a divisor of 400"):
        block(400, block=300)
    with pytest.raises(ValueError, match="would have 10007 blocks of 1 samples"):
        block(1000, 10_007)


# Interruption and damage


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_left_goes_on_to_the_same_counts(mode, tmp_path):
    settings = {**COMMON, **MODES[mode]}
    base = certify(tmp_path / "base", **MODES[mode])
    events = loops.certify.iter(KEY, MODEL, DATA, NOISE, directory=tmp_path / "left", **settings)
    next(events), next(events)
    events.close()
    again = certify(tmp_path / "left", **MODES[mode])
    assert again.resumed == 2
    assert_same(base, again)
    left, whole = ((tmp_path / name / "examples.csv").read_text() for name in ("left", "base"))
    assert left == whole
    finished = certify(tmp_path / "left", **MODES[mode])
    assert finished.resumed == len(list((tmp_path / "left").glob("batches/*")))
    assert_same(base, finished)


KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
sys.path.insert(0, os.path.dirname({file!r}))
import test_certify_loop as t

written, replace = [], os.replace
def count(old, new):
    written.extend([new] if "batches" in str(new) else [])
    if len(written) == 5:  # between a batch and its name
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = count
t.certify(sys.argv[1], **t.STAGED)
"""


def test_a_staged_run_killed_while_it_writes(tmp_path):
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    child = subprocess.run([sys.executable, "-c", KILLED.format(file=__file__), tmp_path], env=env)
    assert child.returncode == -signal.SIGKILL
    done = {path.name for path in tmp_path.glob("batches/*")}
    assert any(name.endswith(".part") for name in done)
    found = certify(tmp_path, **STAGED)
    assert found.resumed == len([name for name in done if name.endswith(".npz")]) > 2
    assert_same(found, certify(**STAGED))


PROCESS = """
import os, sys
import jax
jax.config.update("jax_platforms", "cpu")
process, processes, port = map(int, sys.argv[2:])
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{{port}}", processes, process)
sys.path.insert(0, os.path.dirname({file!r}))
import test_certify_loop as t

for mode, settings in t.MODES.items():
    settings = {{**settings, "mesh": None}}
    directory = os.path.join(sys.argv[1], mode)
    events = t.loops.certify.iter(
        t.KEY, t.MODEL, t.DATA, t.NOISE, directory=directory, **{{**t.COMMON, **settings}}
    )
    next(events), next(events)
    events.close()
    found = t.certify(directory, **settings)
    assert found.resumed == 2
    t.np.savez(os.path.join(sys.argv[1], f"{{mode}}-{{process}}"), counts=found.estimate_counts)
"""


@pytest.mark.full
def test_two_processes_are_one_in_every_mode(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for folder, processes in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        children = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS.format(file=__file__), tmp_path / folder]
                + [str(number) for number in (process, processes, port)]
            )
            for process in range(processes)
        ]
        assert [child.wait(timeout=500) for child in children] == [0] * processes
    for mode, settings in MODES.items():
        here = certify(**settings)
        for name in (f"one/{mode}-0.npz", f"two/{mode}-0.npz", f"two/{mode}-1.npz"):
            counts = np.load(tmp_path / name)["counts"]
            np.testing.assert_array_equal(counts, here.estimate_counts)
        one, two = ((tmp_path / name / mode / "examples.csv") for name in ("one", "two"))
        assert one.read_text() == two.read_text()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-60])


def flipped(path):
    data = bytearray(path.read_bytes())
    where = data.index(b"estimate.npy") + 200
    data[where] ^= 1
    path.write_bytes(data)


def miscounted(path):
    batch = dict(np.load(path))
    batch["estimate"][0, 0] = [1, 2, 3, 4]
    np.savez(path, **batch)


def encrypted(path):
    """As the flags of the file say, which zipfile believes."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def packed_otherwise(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 10] ^= 64
    path.write_bytes(data)


def elsewhere(path):
    """Of images that the data set does not have."""
    batch = dict(np.load(path))
    batch["index"] = batch["index"] + 1000
    np.savez(path, **batch)


def negative(path):
    batch = dict(np.load(path))
    batch["estimate"] = batch["estimate"].astype(np.int64)
    batch["estimate"][0, 0] = [90, -40, 0, 0]
    np.savez(path, **batch)


def emptied(path):
    path.write_bytes(b"")


def stripped(path):
    batch = dict(np.load(path))
    del batch["select"]
    np.savez(path, **batch)


HARMS = [truncated, flipped, miscounted, emptied, stripped]
HARMS += [encrypted, packed_otherwise, elsewhere, negative]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_refused_and_nothing_is_lost(harm, plain, tmp_path):
    directory, base = tmp_path / "log", plain[1]
    shutil.copytree(plain[0], directory)
    path = directory / "batches" / "00-000001.npz"
    harm(path)
    before = files(directory)
    for call in (certify, loops.recertify):
        with pytest.raises(ValueError, match=r"00-000001.npz is damaged .*nothing was changed"):
            call(directory)
    assert files(directory) == before
    path.unlink()
    again = certify(directory)
    assert again.resumed == 2
    assert_same(base, again)
    np.testing.assert_array_equal(
        np.load(path)["estimate"], np.load(plain[0] / "batches" / path.name)["estimate"]
    )


def test_any_changed_byte_is_refused_or_changes_nothing(plain, tmp_path):
    """One bit, or all from there on, at places all over a file and the configuration."""
    shutil.copytree(plain[0], directory := tmp_path / "log")
    refused = 0
    for name in ("batches/00-000001.npz", "configuration.json"):
        path = directory / name
        data = path.read_bytes()
        for i in range(0, len(data) - 2, len(data) // 40):
            for harmed in (data[:i], data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]):
                path.write_bytes(harmed)
                try:
                    assert_same(plain[1], loops.recertify(directory))
                except ValueError:
                    refused += 1
        path.write_bytes(data)
    assert refused > 120


def test_files_of_other_runs_are_refused(plain, tmp_path):
    directory = tmp_path / "log"
    shutil.copytree(plain[0], directory)
    certify(tmp_path / "other", key=jax.random.key(9))
    name = "batches/00-000002.npz"
    shutil.copy(tmp_path / "other" / name, directory / name)
    for call in (certify, loops.recertify):
        with pytest.raises(
            ValueError, match=r"00-000002.npz is .*not of this run \(written by run"
        ):
            call(directory)
    shutil.copy(plain[0] / name, directory / name)
    first, second = (directory / "batches" / f"00-00000{i}.npz" for i in (0, 1))
    swapped = first.read_bytes(), second.read_bytes()
    second.write_bytes(swapped[0]), first.write_bytes(swapped[1])
    with pytest.raises(ValueError, match="holds the votes of other images as 00-000000"):
        certify(directory)
    assert_same(loops.recertify(directory), plain[1])
    settings = directory / "configuration.json"
    for text, message in (
        (settings.read_text()[:50], "configuration.json is damaged"),
        ("[1]", "configuration.json is damaged"),
        (None, "holds results but no configuration.json"),
    ):
        settings.unlink() if text is None else settings.write_text(text)
        before = files(directory)
        for call in (certify, loops.recertify):
            with pytest.raises(ValueError, match=message):
                call(directory)
        assert files(directory) == before


def test_votes_with_a_gap_are_not_a_log(run, tmp_path):
    settings, finished, _ = run
    directory = tmp_path / "log"
    shutil.copytree(finished, directory)
    (directory / "batches" / "00-000000.npz").unlink()
    text = "begin at sample 50" if settings is STAGED else "of 8 of 18 examples"
    with pytest.raises(ValueError, match=text):
        loops.recertify(directory)


def test_another_run_in_the_directory_is_refused(plain):
    directory = plain[0]
    before = files(directory)
    edited = Bound(MODEL.params, {}, lambda p, e, x: bands(p, e, 1.0 * x + 0.0))
    for change, named in (
        ({"key": jax.random.key(5)}, "seed"),
        ({"noise": smoothing.Gaussian(0.26)}, "noise"),
        ({"noise": custom()}, "noise_from"),
        ({"model": TWIN}, "variables_sha256"),
        ({"model": edited}, "programs_sha256"),
        ({"block": 100}, "block"),
        ({"n": 300}, "n "),
        ({"alpha": 0.06}, "alpha"),
        ({"two_bounds": True}, "two_bounds"),
        (STAGED, "stages"),
        (PAIRED, "pairs"),
        ({"data": DATA[:17]}, "examples"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: .*{named}"):
            certify(directory, **change)
    assert files(directory) == before


# What is refused before any compute


def depends(x):
    """Batch-norm in training mode."""
    return bands(0.0, {}, x - x.mean(0, keepdims=True) + 0.5)


def frozen(x):
    return bands(0.0, {}, x + 0.1 * jax.random.normal(jax.random.key(0), x.shape))


def plain_noise():
    class Own(smoothing.Gaussian):
        """Not registered."""

    return Own(0.25)


def changed(**fields):
    return Dataset(**{"x": DATA.x, "y": DATA.y, "id": DATA.id, **fields})


NORMALISED = changed(x=(DATA.x - 0.5) / 0.25)
GRID = smoothing.DiscreteGaussian(0.25, 3)
MISTAKES = {
    "batch statistics": ({"model": depends}, "cannot be certified: .*replacing the other rows"),
    "a voter's batch statistics": ({"voter": depends, "pairs": 50}, "voter cannot be certified"),
    "frozen noise": ({"model": frozen}, "cannot be certified"),
    "normalised data": ({"data": NORMALISED}, r"outside of the box \[0, 1\].*inside the model"),
    "a wrong box": ({"box": (0.2, 1.0)}, r"outside of the box \[0.2, 1\]"),
    "an empty box": ({"box": (1.0, 0.0)}, "lo < hi"),
    "off the grid": (
        {"noise": GRID},
        "18 of 18 inputs are not on the grid of multiples of 1 / 255",
    ),
    "off the grid, mixed": ({"noise": smoothing.Mixed(GRID, 0.9)}, "not on the grid"),
    "off the grid, converted": (
        {"noise": smoothing.Converted(GRID, norm="Linf", size=3)},
        "not on the grid",
    ),
    "noise of another size": ({"noise": smoothing.DiscreteGaussian(0.25, 4)}, "pass size=3"),
    "sigma zero": ({"noise": smoothing.Gaussian(0.0)}, "sigma must be positive"),
    "negative sigma": ({"noise": smoothing.Gaussian(-0.5)}, "sigma must be positive"),
    "too few votes": ({"n": 50, "alpha": 1e-20}, "n = 50 .*can never certify"),
    "too few votes for a mix": (
        {"n": 50, "noise": smoothing.Mixed(NOISE, 0.51)},
        "n = 50 samples can never certify at alpha = 0.05; at least n = 152 are needed",
    ),
    "a noise that is no pytree": ({"noise": plain_noise()}, "decorate the class with jrobust.al"),
    "one number for a box": ({"box": 1.0}, "box must be"),
    "too small a stage": ({"n": None, "stages": (50, 400), "alpha": 1e-20}, "n = 50 .*never"),
    "too few votes for two bounds": (
        {"n": 50, "alpha": 1.5 * 2.0**-50, "two_bounds": True},
        "n = 50 .*never",
    ),
    "too few pairs": (
        {**PAIRED, "pairs": 50, "alpha": 1e-14},
        "400 votes and 50 pairs can never certify",
    ),
    "a radius alone": ({"radius": 0.2}, "give stages= too"),
    "a radius out of reach": ({**STAGED, "radius": 2.0}, "a radius of at most .*never 2.0"),
    "a negative radius": ({**STAGED, "radius": -1.0}, "radius must be positive"),
    "n beside stages": ({**STAGED, "n": 300}, "the last is n"),
    "stages that fall": ({**STAGED, "stages": (400, 100)}, "increasing"),
    "stages of floats": ({**STAGED, "stages": (50.0, 400.0)}, "each of stages must be a positive"),
    "one number for stages": ({**STAGED, "stages": 400}, "stages must be a list"),
    "a voter without pairs": ({"voter": TWIN}, "give both or neither"),
    "pairs without a voter": ({"pairs": 50}, "give both or neither"),
    "a voter in stages": ({**PAIRED, **STAGED}, "has one stage"),
    "a voter and two bounds": ({**PAIRED, "two_bounds": True}, "exclude each other"),
    "no pairs": ({**PAIRED, "pairs": 0}, "pairs must be a positive int"),
    "a voter of other classes": (
        {"voter": lambda x: bands(0.0, {}, x)[:, :2], "pairs": 50},
        "3 classes but voter 2",
    ),
    "a block that does not divide": ({"block": 150}, "block = 150 does not divide 400"),
    "pairs that are no blocks": ({**PAIRED, "pairs": 130}, "block = 50 does not divide 400, 130"),
    "top of all": ({"top": 3}, r"top must be in 1 \.\. 2"),
    "too many votes": ({"n": 2**31}, "below 2\\^31"),
    "labels beyond the classes": ({"data": changed(y=DATA.y + 1)}, "3 classes"),
}


@pytest.mark.parametrize(("settings", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused_before_any_vote(settings, text, tmp_path, monkeypatch):
    monkeypatch.setattr(jrobust.loops._programs.Programs, "compiled", None)
    with pytest.raises((ValueError, TypeError), match=f"(?s){text}"):
        certify(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_what_is_allowed():
    def prepare(model=MODEL, data=DATA, **settings):
        loops.certify.iter(KEY, model, data, NOISE, **{**COMMON, **settings})

    prepare(depends, inspect=False)
    prepare(data=NORMALISED, box=None)
    prepare(data=NORMALISED, box=(-2.0, 2.0))
    randomised = jrobust.models.randomized(
        lambda keys, x: bands(0.0, {}, x) + 0.01 * jax.vmap(jax.random.normal)(keys)[:, None],
        jax.random.key(0),
        votes=2,
    )
    prepare(randomised)  # its fixed draws are the same for every row


# The plan


def test_the_plan_is_told_before_and_after_the_first_batch(capsys, tmp_path):
    found = certify(tmp_path, progress=True)
    lines = capsys.readouterr().err.splitlines()
    (before,) = (line for line in lines if line.startswith("At most: "))
    (after,) = (line for line in lines if line.startswith("To expect: "))
    assert "radius at most" in before
    assert "time unknown" in before
    assert "time unknown" not in after
    assert f"about {found.votes} votes in all" in before
    certify(tmp_path, progress=True)  # a finished run has nothing to expect
    assert "To expect" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", [*MODES, "two bounds"])
def test_the_plan_of_an_event(mode):
    settings = {**COMMON, **MODES.get(mode, {"two_bounds": True})}
    first, *others, last = loops.certify.iter(KEY, MODEL, DATA, NOISE, **settings)
    assert first.plan.seconds > 0
    assert all(event.plan is None for event in (*others, last))
    made, plan = last.report, first.plan
    assert (plan.images, plan.n, plan.alpha) == (N, 400, 0.05)
    assert plan.ceiling >= made.certificate.radius.max()
    if mode == "staged":
        assert 0.5 < plan.votes / made.votes < 2
    else:
        assert plan.votes == made.votes
    if mode == "two bounds":
        # The plan's least votes, spread as it says, are just enough.
        for least, proved in ((plan.least, True), (plan.least - 1, False)):
            rest = [(400 - least) // 3 + (i < (400 - least) % 3) for i in range(3)]
            one = smoothing.certify([0], [[least, *rest]], NOISE, 0.05, two_bounds=True)
            assert (one.prediction[0] == 0) == proved
        assert plan.least < 200, "two bounds need no majority"


# Cohen's format, and figures


COHEN = """idx\tlabel\tpredict\tradius\tcorrect\ttime
0\t3\t3\t0.456\t1\t0:00:15.128451
20\t8\t1\t0.2\t0\t12.0
40\t8\t-1\t0.0\t0\t1 day, 0:00:01.5
60\t0\t0\t9.28e-05\t1\t0:01:12.500000
"""


def test_a_log_of_cohen_s(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text(COHEN)
    found = loops.read_tsv(path)
    np.testing.assert_array_equal(found.id, [0, 20, 40, 60])
    np.testing.assert_array_equal(found.prediction, [3, 1, -1, 0])
    np.testing.assert_array_equal(found.seconds, [15.128451, 12, 86401.5, 72.5])
    np.testing.assert_array_equal(found.accuracy([0.0, 0.3, 0.456, 0.5]), [0.5, 0.25, 0.25, 0.0])
    assert found.accuracy() == 0.5
    assert found.average_radius == pytest.approx((0.456 + 9.28e-5) / 4, rel=1e-12)
    assert found.slice == loops.Slice(start=0, stride=20, n=4)
    assert "4 examples: start 0, stride 20" in str(found)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("idx\t", "id\t", "must begin with the columns idx, label"),
        ("9.28e-05\t1\t0:01:12.500000", "9.28e-05", "line 5 is cut off"),
        ("0:01:12.500000", "0:01", "line 5 is cut off or no certificate .*is no time"),
        ("0.2\t0", "0.2\t1", "line 3: correct = 1 contradicts"),
        ("0.456", "-0.456", "line 2: label, prediction or radius out of range"),
        ("0.456", "nan", "out of range"),
        ("-1\t0.0", "-1\t0.1", "line 4: label, prediction or radius out of range"),
        ("0.2\t0", "0.2\t2", "line 3 is cut off or no certificate"),
        ("\t12.0", "\tnan", "index or time out of range"),
        ("20\t8", f"{2**64}\t8", "index or time out of range"),
        ("20\t8\t1", "0\t8\t1", "holds an index twice"),
        (COHEN[COHEN.index("\n") + 1 :], "", "holds no certificates"),
        (COHEN, "", "an empty file"),
    ],
)
def test_what_is_no_log_of_cohen_s(old, new, text, tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text(COHEN.replace(old, new))
    with pytest.raises(ValueError, match=text):
        loops.read_tsv(path)


def test_radii_are_rounded_down_on_the_way_out(plain, tmp_path):
    found = plain[1]
    path = found.radii.save_tsv(tmp_path / "new" / "log.tsv")
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    assert any(line[2] == "-1" for line in lines), "some abstain"
    for line, radius in zip(lines, found.certificate.radius):
        true = decimal.Decimal(float(radius))
        assert 0 <= true - decimal.Decimal(line[3]) < decimal.Decimal("1e-6")
    again = loops.read_tsv(path)
    np.testing.assert_array_equal(again.id, found.id)
    np.testing.assert_array_equal(again.prediction, found.certificate.prediction)
    assert np.all(again.radius <= found.certificate.radius)
    assert again.accuracy() == found.accuracy()
    assert found.average_radius - 1e-6 < again.average_radius <= found.average_radius
    assert again.seconds.sum() == pytest.approx(found.seconds["run"], abs=1e-3)
    assert again.slice == found.slice == (40, 3, N)


def test_the_slice_is_stated():
    assert loops.Slice.of(np.array([7])) == (7, 1, 1)
    assert loops.Slice.of(np.array([5, 3, 1])) == (5, -2, 3)
    ends = np.array([-(2**31), 2**31 - 1], np.int32)
    assert loops.Slice.of(ends).stride == 2**32 - 1
    odd = loops.Slice.of(np.array([0, 1, 3]))
    assert odd == (0, None, 3)
    assert "irregular" in str(odd)


def test_the_summary_on_disk_states_the_slice(plain):
    directory, found = plain
    summary = json.loads((directory / "report.json").read_text())
    assert summary["slice"] == {"start": 40, "stride": 3, "n": N}
    assert summary["average_radius"] == found.average_radius
    assert f"radius {found.average_radius:.4f}" in str(found)
    assert "18 examples: start 40, stride 3" in str(found)


def test_certified_accuracy_of_several_runs_on_one_axis(plain, tmp_path):
    found = plain[1]
    table = loops.read_tsv(found.radii.save_tsv(tmp_path / "log.tsv"))
    figure = report.plot_certified({"run": found, "file": table})
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2
    for line, run in zip(lines, (found, table)):
        x, y = line.get_data()
        assert x[0] == 0
        assert x[-1] > found.certificate.radius.max()
        np.testing.assert_array_equal(y, run.accuracy(x))
        assert y[-1] == 0
    assert figure.axes[0].get_xlabel() == "radius (L2)"
    other = loops.read_tsv(tmp_path / "log.tsv", norm="L1")
    with pytest.raises(ValueError, match="different norms"):
        report.plot_certified({"run": found, "file": other})
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot_certified({})


def test_the_page_of_a_certification(run):
    found = run[2]
    page = report.Report("t")
    page.certification("Bands", found)
    text = page.html()
    for part in (
        str(found).replace("'", "&#x27;"),
        "18 examples: start 40, stride 3",
        f"<td class=number>{found.average_radius:.4g}</td>",
        f"<td class=number>{found.votes}</td>",
        "&quot;sigma&quot;: 0.25",
    ):
        assert part in text
    assert text.count("<img") == 1
    assert ("on which they differed" in text) == (found.disagreements is not None)
    assert ("until a radius of 0.2 was" in text) == (found.configuration["radius"] is not None)


@pytest.mark.parametrize("most", [0.0, 1e-9, 0.07, 0.9529, 3.81, 784.0, np.inf])
def test_radii_of_a_table_are_round(most):
    radii = report._round_radii(most)
    assert len(radii) <= 8
    assert all(0 < radius <= most for radius in radii)
    if 0 < most < np.inf:
        assert len(radii) >= 3
        assert all(len(f"{radius:.3g}") <= 6 for radius in radii)
