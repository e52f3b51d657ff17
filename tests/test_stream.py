"""Batches that are read ahead: nothing is lost or doubled, whoever reads and whatever dies.

python tests/test_stream.py batches DIRECTORY PROCESS PROCESSES PORT [BATCHES]
python tests/test_stream.py fit DIRECTORY [EPOCHS]

Run as a script, this is what the tests kill: a training loop of one's own that notes which examples
it has seen and where it was, or ``loops.fit`` on a source.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import optax
import pytest
import runs

from jrobust import attacks, loops, parallel, training
from jrobust.data import Source, batches
from jrobust.data._stream import piece, reads
from jrobust.threat import Linf

EXAMPLES, SIZE, EPOCHS = 37, 8, 3
STEPS = 5  # batches of an epoch


def numbers(total=EXAMPLES):
    def fetch(index):
        return np.float32(index)[:, None] + np.zeros((1, 3), np.float32), index % 3

    return Source(fetch, np.arange(total), 3, "numbers", 100 + np.arange(total))


def seen(given):
    """Ids of the examples that count."""
    return [int(i) for batch in given for i in batch.id[batch.mask]]


def assert_epochs(ids, epochs=EPOCHS, total=EXAMPLES):
    assert len(ids) == epochs * total
    orders = [ids[i * total : (i + 1) * total] for i in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(100, 100 + total))
    assert len({tuple(order) for order in orders}) == epochs, "every epoch has an order of its own"


@pytest.mark.parametrize("kind", ["source", "cache", "data set"])
def test_an_epoch_has_every_example_once(kind, key):
    held = numbers()
    held = {"source": held, "cache": held.cache(), "data set": held.read()}[kind]
    stream = batches(held, key, SIZE, epochs=EPOCHS)
    assert stream.steps == STEPS
    epochs, given = [], []
    for batch in stream:
        given.append(batch)
        epochs.append(stream.epoch)
    assert epochs == [i // STEPS for i in range(1, EPOCHS * STEPS + 1)]
    assert_epochs(seen(given))
    for batch in given:
        assert isinstance(batch, training.Batch)
        assert batch.x.shape == (SIZE, 3)
        assert batch.x.dtype == np.float32
        np.testing.assert_array_equal(batch.x[:, 0], batch.id - 100)
        np.testing.assert_array_equal(batch.y, (batch.id - 100) % 3)
    with pytest.raises(StopIteration):
        next(stream)


def test_the_order_is_that_of_fit(key):
    expected = [100 + loops._fit._order(key, epoch, EXAMPLES) for epoch in (1, 2, 3)]
    found = seen(batches(numbers(), key, SIZE, epochs=EPOCHS))
    np.testing.assert_array_equal(found, np.concatenate(expected))
    other = seen(batches(numbers(), jax.random.key(1), SIZE, epochs=EPOCHS))
    assert other != found
    assert_epochs(other)
    assert seen(batches(numbers(), key, 5, epochs=EPOCHS)) == found, "the same in other pieces"


def test_the_last_batch_is_filled_from_the_front(key):
    *_, last = batches(numbers(), key, SIZE, epochs=1)
    np.testing.assert_array_equal(last.mask, np.arange(SIZE) < EXAMPLES % SIZE)
    order = loops._fit._order(key, 1, EXAMPLES)
    np.testing.assert_array_equal(last.id[~last.mask], 100 + order[: SIZE - EXAMPLES % SIZE])


def test_more_rows_than_examples():
    index, mask = piece(np.array([4, 2, 9]), 0, 8)
    np.testing.assert_array_equal(index, [4, 2, 9, 4, 2, 9, 4, 2])
    assert mask.sum() == 3


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_every_batch(processes, key):
    whole = list(batches(numbers(), key, SIZE, epochs=2))
    parts = [
        batches(numbers(), key, SIZE, epochs=2, process=(i, processes)) for i in range(processes)
    ]
    for batch, *shares in zip(whole, *parts):
        for leaf, *pieces in zip(batch, *shares):
            np.testing.assert_array_equal(leaf, np.concatenate(pieces))


def test_a_state_resumes_behind_its_batch(key):
    whole = list(batches(numbers(), key, SIZE, epochs=EPOCHS))
    for stop in range(0, len(whole) + 1, 3):
        stream = batches(numbers(), key, SIZE, epochs=EPOCHS)
        for _ in range(stop):
            next(stream)
        state = json.loads(json.dumps(stream.get_state()))
        again = batches(numbers(), key, SIZE, epochs=EPOCHS)
        for given in (stream, again):  # in another object, and in one that has gone on
            list(given)
            given.set_state(state)
            rest = list(given)
            assert len(rest) == len(whole) - stop
            for one, two in zip(rest, whole[stop:]):
                for a, b in zip(one, two):
                    np.testing.assert_array_equal(a, b)


def test_a_state_goes_to_another_number_of_processes(key):
    first = batches(numbers(), key, SIZE, epochs=1, process=(0, 2))
    next(first)
    second = batches(numbers(), key, SIZE, epochs=1)
    second.set_state(first.get_state())
    whole = list(batches(numbers(), key, SIZE, epochs=1))
    assert seen(second) == seen(whole[1:])


@pytest.mark.parametrize(
    "other",
    [
        lambda key: batches(numbers(), jax.random.key(1), SIZE),
        lambda key: batches(numbers(), key, SIZE + 1),
        lambda key: batches(numbers(36), key, SIZE),
        lambda key: batches(numbers()[::-1], key, SIZE),
    ],
)
def test_the_state_of_another_stream_is_refused(other, key):
    stream = batches(numbers(), key, SIZE)
    with pytest.raises(
        ValueError, match=r"not the state of these batches.* another key or another"
    ):
        stream.set_state(other(key).get_state())
    with pytest.raises(ValueError, match="not the state of these batches"):
        stream.set_state({"batches": 3})


def test_reading_goes_on_while_nobody_waits(key):
    """Ahead of the batches that are asked for, and in several threads where there are cores."""
    read, threads = [], set()

    def fetch(index):
        read.append(index)
        threads.add(threading.get_ident())
        return np.zeros((len(index), 1), np.float32), index * 0

    stream = batches(Source(fetch, np.arange(1000), 1, "zeros"), key, 1)
    next(stream)
    patience = time.monotonic() + 20
    while len(read) < 3 and time.monotonic() < patience:
        time.sleep(0.01)
    assert len(read) >= 3
    assert threading.get_ident() not in threads
    stream.close()
    time.sleep(0.1)
    count = len(read)
    assert count < 100, "only so far ahead"
    time.sleep(0.2)
    assert len(read) == count, "closed streams stop"
    assert stream.get_state()["batches"] == 1


def test_an_error_of_a_reader_reaches_the_loop(key):
    def fetch(index):
        if 30 in index:
            raise OSError("disk on fire")
        return np.zeros((len(index), 1), np.float32), index * 0

    with pytest.raises(ValueError, match="zeros could not be read: OSError: disk on fire"):
        list(batches(Source(fetch, np.arange(64), 1, "zeros"), key, 8, epochs=1))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"key": 0}, TypeError, "typed PRNG key"),
        ({"data": np.zeros((3, 2))}, TypeError, "must be a Dataset or a Source, got ndarray"),
        ({"data": numbers()[:0]}, ValueError, "no examples"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int"),
        ({"epochs": 0}, ValueError, "epochs must be a positive int"),
        ({"process": (2, 2)}, ValueError, "0 <= index < count"),
        ({"process": (0, 3)}, ValueError, "batch_size=8 cannot be split over 3 processes"),
    ],
)
def test_bad_arguments(change, error, text, key):
    given = {"data": numbers(), "key": key, "batch_size": SIZE, **change}
    with pytest.raises(error, match=text):
        batches(**given)


def test_without_grain(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"needs grain: pip install 'jrobust\[data\]'"):
        next(batches(numbers(), key, SIZE))
    held = numbers().read()
    assert len(list(reads(held, [np.arange(3)]))) == 1, "memory needs none"


# Training on a source


def examples():
    """The data of ``runs`` as bytes in storage, and the same in memory."""
    held = runs.problem()
    stored = np.round(255 * held.x).astype(np.uint8)
    source = Source(lambda i: (stored[i], held.y[i]), np.arange(len(held)), 3, "stored", held.id)
    return source, source.read()


def fit(train, directory=None, epochs=4, **options):
    return loops.fit.iter(
        jax.random.key(0),
        runs.network(),
        training.Standard(),
        optax.adam(3e-2),
        train,
        epochs=epochs,
        batch_size=12,
        directory=directory,
        mesh=parallel.mesh(jax.devices()[:1]),
        **options,
    )


def assert_same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        np.testing.assert_array_equal(a, b)


def test_fit_on_a_source_is_fit_on_its_examples():
    source, held = examples()
    *_, streamed = fit(source[:64], average=training.SWA(4, 2), validation=held[64:])
    *_, whole = fit(held[:64], average=training.SWA(4, 2), validation=held[64:])
    assert streamed.report.history == whole.report.history
    assert_same(streamed.report.last, whole.report.last)
    assert_same(streamed.state.params, whole.state.params)


def test_statistics_of_batch_norm_come_from_the_source():
    import flax.linen as nn

    from jrobust import models

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    source, held = examples()
    reports = []
    for train in (source, held):
        *_, last = loops.fit.iter(
            jax.random.key(0),
            models.network(Net()),
            training.Standard(),
            optax.sgd(0.1),
            train,
            epochs=1,
            batch_size=32,
            average=training.SWA(0),
            mesh=parallel.mesh(jax.devices()[:1]),
        )
        reports.append(last.report)
    assert jax.tree.leaves(reports[0].last[1])
    assert_same(reports[0].last, reports[1].last)


def test_a_source_is_checked_before_any_compute():
    source, held = examples()
    many = Source(source.fetch, source.position, 4, "many classes")
    with pytest.raises(ValueError, match="many classes has 4 classes, the network 3"):
        fit(many)
    with pytest.raises(TypeError, match=r"validation must be in memory.*validation\.read\(\)"):
        fit(source[:64], validation=source[64:])
    with pytest.raises(ValueError, match="example ids are in both train and validation"):
        fit(source, validation=held[64:])
    with pytest.raises(TypeError, match=r"data must be in memory, got a Source: pass data.read"):
        loops.evaluate(jax.random.key(0), runs.model(), source, attacks.FGSM(Linf(0.1)))


def test_another_source_in_the_directory_is_refused(tmp_path):
    source, _ = examples()
    list(fit(source, tmp_path, epochs=1))
    other = Source(source.fetch, source.position, 3, "stored", source.id, "another digest")
    for change in (other, source[::-1]):
        with pytest.raises(ValueError, match="another run: it differs in data_sha256"):
            list(fit(change, tmp_path, epochs=1))
    *_, again = fit(source, tmp_path, epochs=1)
    assert again.report.resumed == 8


# Killed


def start(*args):
    cache = jax.config.jax_compilation_cache_dir
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, args)],
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(processes, when):
    """Kill them once ``when()`` holds."""
    patience = time.monotonic() + 300
    while not when() and time.monotonic() < patience:
        died = [p.communicate()[0] for p in processes if p.poll() is not None]
        assert not died, died
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def finish(*processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs


def log(directory, process):
    path = directory / f"log-{process}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_processes_that_are_killed_lose_and_double_nothing(tmp_path):
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    first = [start("batches", tmp_path, i, 2, ports[0], 7) for i in range(2)]
    kill(first, lambda: all(len(log(tmp_path, i)) >= 7 for i in range(2)))
    assert [len(log(tmp_path, i)) for i in range(2)] == [7, 7]
    finish(*(start("batches", tmp_path, i, 2, ports[1]) for i in range(2)))
    shares = [log(tmp_path, i) for i in range(2)]
    assert [len(share) for share in shares] == [EPOCHS * STEPS] * 2
    ids = [i for one, two in zip(*shares) for i in one["ids"] + two["ids"]]
    assert_epochs(ids)
    assert ids == seen(batches(numbers(), jax.random.key(5), SIZE, epochs=EPOCHS))


def test_fit_on_a_source_that_is_killed_ends_the_same(tmp_path):
    process = start("fit", tmp_path, "slow")
    kill([process], lambda: len(list(tmp_path.glob("checkpoints/[0-9]*"))) >= 2)
    finish(start("fit", tmp_path))
    source, _ = examples()
    *_, whole = fit(source, epochs=EPOCHS, save_every=None)
    leaves = jax.tree.leaves(whole.state.params)
    with np.load(tmp_path / "outcome.npz") as found:
        assert 0 < found["resumed"] < EPOCHS * 8
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(found[f"leaf{i}"], leaf)


def write_batches(directory, process, processes, port, limit=None):
    """A loop of one's own: note the ids of each batch and the state behind it, in one line."""
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    stream = batches(numbers(), jax.random.key(5), SIZE, epochs=EPOCHS)
    done = log(directory, process)
    if done:
        stream.set_state(done[-1]["state"])
    with open(directory / f"log-{process}.jsonl", "a") as file:
        for batch in stream:
            line = {"ids": seen([batch]), "state": stream.get_state()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if limit is not None and line["state"]["batches"] >= limit:
                time.sleep(300)  # to be killed here, with batches read ahead


def write_fit(directory, slow=False):
    source, _ = examples()
    if slow:
        quick = source.fetch

        def fetch(index):
            time.sleep(0.2)
            return quick(index)

        source = Source(fetch, source.position, 3, "stored", source.id)
    *_, last = fit(source, directory, epochs=EPOCHS, save_every=3)
    leaves = jax.tree.leaves(last.state.params)
    numbered = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    np.savez(directory / "outcome.npz", resumed=last.report.resumed, **numbered)


if __name__ == "__main__":
    kind, directory, *rest = sys.argv[1:]
    if kind == "batches":
        write_batches(pathlib.Path(directory), *map(int, rest))
    else:
        jax.config.update("jax_platforms", "cpu")
        write_fit(pathlib.Path(directory), bool(rest))
