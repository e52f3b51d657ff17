"""Black boxes: paid once, counted exactly, never over budget, whatever fails or is killed."""

import collections
import contextlib
import http.server
import io
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrobust
from jrobust import attacks, data, drive, keys, loops, losses
from jrobust.threat import L2
from jrobust.zeroth_order import CGE, HTTP, RGE, BlackBox, BudgetExceeded, Ledger, Subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
W = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
X = np.random.default_rng(1).uniform(0.3, 0.7, (50, 6)).astype(np.float32)


def truth(x):
    """A linear model without BLAS, which rounds a row as its batch makes it."""
    return (x[:, :, None] * W).sum(1)


Y = truth(X).argmax(1)


class Counted:
    """A function that keeps the rows it was asked about."""

    def __init__(self, fn=truth):
        self.fn, self.batches = fn, []

    def __call__(self, x):
        self.batches.append(x.copy())
        return self.fn(x)

    @property
    def rows(self):
        return sum(map(len, self.batches))


# ---------------------------------------------------------------------------- an HTTP server


class Server(http.server.ThreadingHTTPServer):
    """Computes a request once, whatever goes wrong on the way; ``fault(n)`` says what does."""

    def __init__(self, fault, compute=truth):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/classify?model=1"
        self.fault, self.compute = fault, compute
        self.requests = self.rows = 0
        self.computed, self.faults = {}, collections.Counter()
        self.lock, self.over = threading.Lock(), threading.Event()

    def handle_error(self, request, address):
        """A client that has gone."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_):
        """Requests are counted, not printed."""

    def reply(self, status, body=b"", length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        server, request = self.server, self.headers["Idempotency-Key"]
        assert self.headers["Content-Type"] == "application/x-npy"
        assert self.path == "/classify?model=1"
        assert re.fullmatch(r"[0-9a-zA-Z-]{1,80}", request)
        x = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
        with server.lock:
            fault = server.fault(server.requests)
            server.requests += 1
            server.rows += len(x)
            server.faults[fault] += 1
            pid = int(self.headers.get("X-Pid", 0))
            if fault in (500, 503, 409, 429, 400):
                return self.reply(fault, b"busy")
            if fault == "dropped":
                self.close_connection = True
                return None
            if fault == "killed before":
                return os.kill(pid, signal.SIGKILL)
            if request not in server.computed:
                server.computed[request] = server.compute(x)
        answers = server.computed[request]
        if fault == "killed after":
            return os.kill(pid, signal.SIGKILL)
        if fault == "late":
            server.over.wait(60)
        body = io.BytesIO()
        np.save(body, answers)
        if fault in ("lost", "late"):
            self.close_connection = True
        elif fault == "torn":
            self.reply(200, body.getvalue()[:-5], len(body.getvalue()))
            self.close_connection = True
        elif fault == "not an array":
            self.reply(200, b"<html>")
        else:
            self.reply(200, body.getvalue())
            if fault == "killed behind":
                os.kill(pid, signal.SIGKILL)
        return None


FAULTS = (500, 503, 409, 429, "dropped", "lost", "lost", "torn", "not an array")


def test_ten_thousand_queries_through_a_server_that_fails(key, tmp_path):
    attack = attacks.SimBA(L2(1e-4), queries=200, step_size=1e-5)  # nothing falls
    plain = jrobust.run(attack, key, drive.Host(truth), X, Y)
    assert plain.forwards.sum() == 10_000
    draw = np.random.default_rng(2)

    def fault(number):
        if number in (100, 1000):
            return "late"
        return FAULTS[draw.integers(len(FAULTS))] if draw.uniform() < 0.1 else None

    server = Server(fault)
    with (
        server,
        BlackBox(
            HTTP(server.url, timeout=1.0),
            budget=10_000,
            batch_size=5,
            backoff=0.0,
            log=tmp_path / "log",
        ) as box,
    ):
        found = jrobust.run(attack, key, box, X, Y)
        before = server.requests
        with pytest.raises(BudgetExceeded, match="10000 of 10000 rows are paid for") as error:
            box.query(X[:1])
        assert server.requests == before
        assert error.value.ledger == box.ledger
    for one, two in zip(found, plain):
        np.testing.assert_array_equal(one, two)
    failed = server.requests - server.faults[None]
    assert 0.08 < failed / server.requests < 0.12
    assert set(server.faults) == {None, "late", *FAULTS}
    assert len(server.computed) == 200 * 10  # 50 rows in requests of 5
    assert sum(map(len, server.computed.values())) == 10_000
    assert box.ledger == Ledger(
        queries=10_000, replayed=0, paid=10_000, attempts=server.requests, sent=server.rows
    )
    # Again from the log, with no server left.
    with BlackBox(HTTP(server.url), budget=10_000, log=tmp_path / "log", retries=0) as box:
        again = jrobust.run(attack, key, box, X, Y)
        with pytest.raises(BudgetExceeded):
            box.query(X[:1])
    for one, two in zip(again, plain):
        np.testing.assert_array_equal(one, two)
    assert box.ledger == Ledger(10_000, 10_000, 10_000, server.requests, server.rows)


LIVES = """
import json, os, sys
import numpy as np
from jrobust.zeroth_order import HTTP, BlackBox

url, log, out = sys.argv[1:]


def live():
    http = HTTP(url, headers={"X-Pid": str(os.getpid())})
    x, seen = np.zeros((8, 6), np.float32), []
    with BlackBox(http, budget=480, batch_size=3, log=log, backoff=0.0) as box:
        for step in range(60):
            seen.append(box.query(x))
            x = np.sin(x + seen[-1].sum(1, keepdims=True) + np.arange(6, dtype=np.float32))
            x[0] = x[1] = 0.5
    np.savez(out, seen=np.stack(seen), ledger=box.ledger)


while True:
    child = os.fork()
    if child == 0:
        live()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
    if status == 0 or os.waitstatus_to_exitcode(status) > 0:
        break
"""


class Random:
    """A box whose answer to a row is another each time it is computed."""

    def __init__(self):
        self.asked = collections.Counter()

    def __call__(self, x):
        answers = truth(x)
        for row, answer in zip(x, answers):
            answer += 0.01 * self.asked[row.tobytes()]
            self.asked[row.tobytes()] += 1
        return answers


def walk(box):
    """What the lives above see if nothing happens to them."""
    x, seen = np.zeros((8, 6), np.float32), []
    for _ in range(60):
        seen.append(box.query(x))
        x = np.sin(x + seen[-1].sum(1, keepdims=True) + np.arange(6, dtype=np.float32))
        x[0] = x[1] = 0.5
    return np.stack(seen)


def test_a_killed_run_pays_nothing_twice(tmp_path):
    kinds = "killed before", "killed after", "killed behind"
    kills = {n: kinds[i % 3] for i, n in enumerate((0, 1, 2, 30, 61, 99, 100, 110, 150, 170))}
    alone = BlackBox(Random(), batch_size=3)
    expected = walk(alone)
    assert alone.ledger == Ledger(480, 0, 480, 180, 480)
    assert not np.array_equal(expected[5, 0], expected[6, 0]), "random: the rows were equal"
    out = tmp_path / "out.npz"
    with Server(kills.get, Random()) as server:
        done = subprocess.run(
            [sys.executable, "-c", LIVES, server.url, str(tmp_path / "log"), str(out)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    assert done.stdout.split() == ["-9"] * len(kills) + ["0"]
    found = np.load(out)
    np.testing.assert_array_equal(found["seen"], expected)
    # No request but those of the undisturbed run, and beside it one for each kill at most.
    assert len(server.computed) == 180
    assert sum(map(len, server.computed.values())) == 480
    assert 180 < server.requests <= 180 + len(kills)
    queries, replayed, paid, attempts, sent = found["ledger"]
    assert (queries, paid, attempts, sent) == (480, 480, server.requests, server.rows)
    assert 0 < replayed < 480


def test_http_refusals_and_outages(tmp_path):
    server = Server({0: 400, 1: 500, 2: "lost", 3: 429}.get)
    with server, BlackBox(HTTP(server.url), retries=1, backoff=0.0) as box:
        with pytest.raises(RuntimeError, match=r"refused: http.* HTTP 400 .*busy"):
            box.query(X[:2])
        assert box.ledger == Ledger(attempts=1, sent=2)
        with pytest.raises(ConnectionError, match="no answer to a request of 2 rows in 2 att"):
            box.query(X[:2])
        np.testing.assert_array_equal(box.query(X[:2]), truth(X[:2]))
        assert box.ledger == Ledger(2, 0, 2, 5, 10)
    with pytest.raises(ConnectionError, match="Connection refused"):
        BlackBox(HTTP(server.url), retries=0).query(X)


# ------------------------------------------------------------------------------- subprocesses

CHILD = """
import io, os, sys
import numpy as np

W, attempts = np.load(sys.argv[1]), sys.argv[2]
source, sink = sys.stdin.buffer, sys.stdout.buffer
for line in source:
    word, request, size = line.split()
    assert word == b"ask"
    x = np.load(io.BytesIO(source.read(int(size))))
    with open(attempts, "a") as file:
        file.write(f"{request.decode()} {len(x)}\\n")
    number = sum(1 for _ in open(attempts)) - 1
    if np.isnan(x).any():
        text = b"NaN is no input"
        sink.write(b"error %s %d\\n" % (request, len(text)) + text)
    else:
        body = io.BytesIO()
        np.save(body, (x[:, :, None] * W).sum(1))
        body = body.getvalue()
        if number == 4:
            sys.exit(3)
        if number == 7:
            sink.write(b"ready\\n")
        elif number == 11:
            sink.write(b"answer %s %d\\n" % (request, len(body)) + body[:20])
            sink.flush()
            sys.exit()
        else:
            sink.write(b"answer %s %d\\n" % (request, len(body)) + body)
    sink.flush()
"""


def test_a_subprocess_that_dies_and_talks_nonsense(tmp_path):
    np.save(tmp_path / "w.npy", W)
    attempts = tmp_path / "attempts"
    command = [sys.executable, "-c", CHILD, str(tmp_path / "w.npy"), str(attempts)]
    with BlackBox(Subprocess(command), budget=90, batch_size=3, backoff=0.0) as box:
        found = np.concatenate([box.query(X[:30] + step) for step in np.float32([0, 1, 2])])
        with pytest.raises(BudgetExceeded):
            box.query(X[:1])
        ledger = box.ledger
    np.testing.assert_array_equal(
        found, np.concatenate([truth(X[:30] + step) for step in np.float32([0, 1, 2])])
    )
    sent = [line.split() for line in attempts.read_text().splitlines()]
    assert len({request for request, _ in sent}) == 30, "sent again under its own id"
    assert ledger == Ledger(90, 0, 90, 33, 99) == Ledger(90, 0, 90, len(sent), 3 * len(sent))
    with BlackBox(Subprocess(command)) as box:
        with pytest.raises(RuntimeError, match="refused the request: NaN is no input"):
            box.query(np.full((2, 6), np.nan, np.float32))
        np.testing.assert_array_equal(box.query(X), truth(X))


def test_a_subprocess_that_hangs_is_killed_with_its_children():
    with BlackBox(Subprocess(["sh", "-c", "sleep 100; true"], timeout=0.2), retries=1) as box:
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"last failure: .*none in 0\.2 s"):
            box.query(X)
        assert time.monotonic() - start < 50
        assert box.ledger == Ledger(attempts=2, sent=100)
    with pytest.raises(FileNotFoundError):
        BlackBox(Subprocess(["/no/such/program"])).query(X)
    with (
        BlackBox(Subprocess(["cat"]), retries=0) as box,
        pytest.raises(ConnectionError, match=r"expected 'answer .* <bytes>', got b'ask"),
    ):
        box.query(X)


# ------------------------------------------------------------------------ functions, the ledger


def test_attempts_pauses_and_batches(monkeypatch):
    pauses, fails = [], [ConnectionError("a"), TimeoutError("b"), ConnectionError("c")]
    monkeypatch.setattr(time, "sleep", pauses.append)

    def flaky(x):
        if fails and len(x) == 2:
            x[:] = 0  # which is its own to change, and must not be sent again
            raise fails.pop()
        return truth(x)

    box = BlackBox(flaky, batch_size=3, backoff=0.5)
    np.testing.assert_array_equal(box.query(X[:8]), truth(X[:8]))
    assert pauses == [0.5, 1.0, 2.0]
    assert box.ledger == Ledger(8, 0, 8, 6, 3 + 3 + 4 * 2)

    def broken(x):
        raise ValueError("no such model")

    box = BlackBox(broken)
    with pytest.raises(ValueError, match="no such model"):
        box.query(X)
    assert box.ledger == Ledger(attempts=1, sent=50)
    assert len(pauses) == 3
    box = BlackBox(flaky, retries=9, backoff=16.0)
    fails[:] = [ConnectionError()] * 9
    box.query(X[:2])
    assert pauses[3:] == [16.0, 32.0] + [60.0] * 7


def test_a_service_may_use_its_buffers_again():
    buffer = np.empty((2, 3), np.float32)

    def fn(x):
        np.copyto(buffer, truth(x))
        x[:] = -1
        return buffer

    asked = X[:6].copy()
    np.testing.assert_array_equal(BlackBox(fn, batch_size=2).query(asked), truth(X[:6]))
    np.testing.assert_array_equal(asked, X[:6])


def test_equal_rows_are_queries_unless_the_box_is_deterministic(tmp_path):
    rows = X[[0, 1, 0, 0, 2]]
    fn = Counted(Random())
    random = BlackBox(fn, log=tmp_path / "random")
    first, second = random.query(rows), random.query(rows[::-1])
    assert fn.rows == 10
    assert random.ledger == Ledger(10, 0, 10, 2, 10)
    count = np.array([[0, 0, 1, 2, 0], [1, 3, 4, 1, 5]])
    expected = np.stack([truth(rows), truth(rows[::-1])]) + 0.01 * count[..., None]
    np.testing.assert_allclose(np.stack([first, second]), expected, rtol=1e-6)
    random.close()
    # In the same order whatever the batches, and then new ones.
    random = BlackBox(fn, log=tmp_path / "random", batch_size=2)
    assert random.ledger == Ledger(paid=10, attempts=2, sent=10)
    again = [random.query(rows[i : i + 1]) for i in range(5)]
    np.testing.assert_array_equal(np.concatenate(again), first)
    np.testing.assert_array_equal(random.query(rows[::-1]), second)
    assert fn.rows == 10
    np.testing.assert_allclose(random.query(rows[:1]), truth(rows[:1]) + 0.06, rtol=1e-6)
    assert random.ledger == Ledger(11, 10, 11, 3, 11)
    random.close()

    for log in (None, tmp_path / "fixed"):
        fn = Counted()
        with BlackBox(fn, log=log, deterministic=True) as fixed:
            np.testing.assert_array_equal(fixed.query(rows), truth(rows))
            np.testing.assert_array_equal(fixed.query(X[1:4]), truth(X[1:4]))
            assert fixed.ledger == Ledger(8, 4, 4, 2, 4)
            # Of another type, or of another shape, they are others.
            fixed.query(rows[:1].astype(np.float16))
            assert fixed.ledger.paid == fn.rows == 5
    with pytest.raises(ValueError, match="was written with deterministic=True"):
        BlackBox(fn, log=log)
    with BlackBox(fn, log=log, deterministic=True) as fixed:
        np.testing.assert_array_equal(fixed.query(X[:4]), truth(X[:4]))
    assert fn.rows == fixed.ledger.paid == 5


def test_threads_share_the_budget():
    box, stopped = BlackBox(lambda x: time.sleep(0.001) or truth(x), budget=40), []

    def ask(i):
        try:
            for j in range(10):
                rows = X[[i + j, 2 * i + j]]
                np.testing.assert_array_equal(box.query(rows), truth(rows))
        except BudgetExceeded:
            stopped.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stopped) >= 6  # two may have asked all they wanted
    assert box.ledger == Ledger(40, 0, 40, 20, 40)


@pytest.mark.parametrize("answer", [lambda x: truth(x)[1:], lambda x: [[1]] * 3 + [[1, 2]]])
def test_what_was_paid_for_no_use_is_known_to_the_next_run(tmp_path, answer):
    log = tmp_path / "log"
    with BlackBox(answer, log=log, budget=5) as box:
        with pytest.raises(ValueError, match="must answer 4 rows"):
            box.query(X[:4])
        assert box.ledger == Ledger(0, 0, 4, 1, 4)
    with BlackBox(truth, log=log, budget=5) as box:
        assert box.ledger == Ledger(0, 0, 4, 1, 4)
        with pytest.raises(BudgetExceeded):
            box.query(X[:4])
        box.query(X[:1])
    with (
        BlackBox(lambda x: truth(x)[:, :2], log=log) as box,
        pytest.raises(ValueError, match=r"answered with .*3.* a row, now with .*2"),
    ):
        box.query(X[:2])


def test_a_query_that_failed_halfway_costs_the_rest_alone(tmp_path):
    fn = Counted()

    def fail(x):
        if np.any(np.all(x == X[5], axis=1)):
            raise ConnectionError
        return fn(x)

    with BlackBox(fail, batch_size=2, retries=0, log=tmp_path / "log", budget=9) as box:
        with pytest.raises(ConnectionError, match="4 rows were answered before"):
            box.query(X[:8])
        box._service = type(box._service)(fn)
        np.testing.assert_array_equal(box.query(X[:8]), truth(X[:8]))
        assert fn.rows == 8
        assert box.ledger == Ledger(8, 4, 8, 5, 10)
        with pytest.raises(BudgetExceeded, match="a query of 2 new rows"):
            box.query(X[8:10])
        assert box.query(X[8:9]).shape == (1, 3)


def test_answers_that_are_none():
    def later(x):
        return truth(x)[:, : 3 if len(x) > 1 else 2]

    for fn, message in (
        (
            lambda x: truth(x)[1:],
            r"answer 4 rows with numbers of shape \(4, .*\), got float32 \(3",
        ),
        (lambda x: 1.0, r"got float64 \(\)"),
        (lambda x: ["a"] * len(x), "got <U1"),
        (lambda x: [None] * len(x), "got object"),
    ):
        box = BlackBox(fn)
        with pytest.raises(ValueError, match=message):
            box.query(X[:4])
        assert box.ledger == Ledger(0, 0, 4, 1, 4), "it has answered"
    box = BlackBox(later)
    box.query(X[:4])
    with pytest.raises(ValueError, match=r"answered with .*3.* a row, now with .*2"):
        box.query(X[:1])
    with pytest.raises(ValueError, match=r"Host model must return logits of shape \(4, classes\)"):
        BlackBox(lambda x: x.sum(1))(jnp.asarray(X[:4]))
    assert BlackBox(lambda x: x.sum(1)).query(X[:4]).shape == (4,)  # a simulator


# ------------------------------------------------------------------- attacks, loops, estimators


def test_ledger_and_attack_count_the_same(key):
    attack = attacks.NES(L2(0.1), queries=30, samples=2)
    box = BlackBox(truth, batch_size=7)
    found = jrobust.run(attack, key, box, X, Y)
    assert box.ledger.queries == box.ledger.paid == found.forwards.sum()
    assert 0 < found.success.mean() < 1, "of both kinds"

    asked = box.ledger.paid
    estimator, lanes = RGE(1e-2, 3, antithetic=True), keys.examples(key, jnp.arange(5))
    estimate = estimator.per_example(
        lanes, lambda x: losses.cross_entropy(box(x), Y[:5]), X[:5], host=True
    )
    assert box.ledger.paid - asked == 5 * estimator.queries(X[0])
    traced = estimator.per_example(
        lanes, lambda x: losses.cross_entropy(jnp.matmul(x, W, precision="highest"), Y[:5]), X[:5]
    )
    np.testing.assert_allclose(estimate[1], traced[1], atol=1e-3)


def test_ledger_and_evaluation_count_the_same(key, tmp_path):
    examples = data.Dataset(X[:20], np.where(np.arange(20) == 3, (Y[:20] + 1) % 3, Y[:20]))
    attack = attacks.NES(L2(0.1), queries=30, samples=2)

    def evaluate(box, directory=None):
        return loops.evaluate(
            key, box, examples, attack, batch_size=8, progress=False, directory=directory
        )

    fn = Counted()
    with BlackBox(fn, log=tmp_path / "log") as box:
        found = evaluate(box)
    broken = np.sum(found.examples["broken_by"] >= 0)  # verified by a query of their own
    expected = 20 + found.examples["forwards"].sum() + broken
    assert box.ledger.queries == box.ledger.paid == fn.rows == expected
    assert 0 < broken < 19

    # Out of budget, it leaves what was paid for behind, and the next run begins with it.
    directory = tmp_path / "run"
    fn = Counted()
    box = BlackBox(fn, log=tmp_path / "short", budget=int(expected) // 2)
    with box, pytest.raises(BudgetExceeded):
        evaluate(box, directory)
    assert expected // 2 - 8 < box.ledger.paid <= expected // 2
    with BlackBox(fn, log=tmp_path / "short", budget=int(expected)) as box:
        again = evaluate(box, directory)
    # Of an example that had not begun, the clean answer serves the attack: its first query.
    assert expected - 20 <= box.ledger.paid == fn.rows <= expected
    for name, column in found.examples.items():
        np.testing.assert_array_equal(column, again.examples[name])


def test_what_an_attack_had_when_the_budget_ran_out(key, tmp_path):
    attack = attacks.NES(L2(0.1), queries=30, samples=2)
    plain = jrobust.run(attack, key, drive.Host(truth), X, Y)
    state = attack.init(keys.examples(key, jnp.arange(50)), jnp.asarray(X), jnp.asarray(Y))
    with BlackBox(truth, budget=200, log=tmp_path / "log") as box:
        with contextlib.suppress(BudgetExceeded):
            for state in drive.stepped(attack, box, state):  # noqa: B007, B020
                pass
        result = attack.result(state)
        assert 150 < box.ledger.paid == result.forwards.sum() <= 200
        broken = truth(np.asarray(result.x)).argmax(1) != Y
        np.testing.assert_array_equal(result.success, broken)
    with BlackBox(truth, budget=10_000, log=tmp_path / "log") as box:
        found = jrobust.run(attack, key, box, X, Y)
    assert box.ledger.replayed == result.forwards.sum()
    assert box.ledger.paid == found.forwards.sum()
    for one, two in zip(found, plain):
        np.testing.assert_array_equal(one, two)


# ------------------------------------------------------------------------------------ the log


def written(path):
    """A log of five queries, 1 to 5 rows each, and its length after each."""
    ends = []
    with BlackBox(truth, log=path, batch_size=3) as box:
        ends.append(path.stat().st_size)
        for n in range(1, 6):
            box.query(X[n : 2 * n])
            ends.append(path.stat().st_size)
    return path.read_bytes(), ends


def test_a_log_torn_anywhere_keeps_what_was_whole(tmp_path):
    whole, ends = written(tmp_path / "whole")
    path = tmp_path / "torn"
    cuts = sorted({0, 1, 25, *range(3, len(whole), 41), *(e + d for e in ends for d in (-1, 0, 1))})
    for cut in (c for c in cuts if c <= len(whole)):
        path.write_bytes(whole[:cut])
        fn = Counted()
        with BlackBox(fn, log=path, batch_size=3) as box:
            kept = box.ledger.paid
            least = sum(n for n in range(1, 6) if ends[n] <= cut)
            assert least <= kept <= least + 3, "of the last query two requests"
            for n in range(1, 6):
                np.testing.assert_array_equal(box.query(X[n : 2 * n]), truth(X[n : 2 * n]))
            assert box.ledger.paid == 15
            assert fn.rows == 15 - kept
        with BlackBox(fn, log=path) as box:
            assert box.ledger.paid == 15, "what was written behind the cut can be read"


def test_a_log_damaged_in_the_middle_is_refused(tmp_path):
    whole, ends = written(tmp_path / "whole")
    path = tmp_path / "damaged"
    for place in range(ends[0], ends[1]):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged at byte \d+ of"):
            BlackBox(truth, log=path)
        assert path.read_bytes() == damaged
    for text in ("", "no log", "no log\n" * 9):
        path.write_text(text)
        if text:
            with pytest.raises(ValueError, match="is not the log of a black box"):
                BlackBox(truth, log=path)
            assert path.read_text() == text
        else:
            BlackBox(truth, log=path).close()


def test_a_log_that_cannot_be_written_is_not_left_half_written(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with BlackBox(truth, log=path) as box:
        box.query(X[:3])
        size, file = path.stat().st_size, box._log._file

        class Full:
            def write(self, data):
                if len(data) < 200:
                    return file.write(data)
                if len(data) > 250:
                    return file.write(data[:20])
                raise OSError("no space left")

            def __getattr__(self, name):
                return getattr(file, name)

        box._log._file = Full()
        with pytest.raises(OSError, match="no space left"):
            box.query(X[3:6])
        box._log._file = file
        assert box.ledger.paid == 6, "the service has answered"
        box.query(X[6:8])
    assert path.stat().st_size > size
    with BlackBox(truth, log=path) as box:
        assert box.ledger == Ledger(paid=5, attempts=3, sent=8)


def test_a_log_is_of_one_box_at_a_time(tmp_path):
    path = tmp_path / "new" / "log"
    with BlackBox(truth, log=path), pytest.raises(ValueError, match="in use by another black box"):
        BlackBox(truth, log=path)
    BlackBox(truth, log=path).close()


BAD = {
    "no function": (lambda: BlackBox("http://localhost"), "service must be a function"),
    "budget": (lambda: BlackBox(truth, budget=-1), "budget must be an int >= 0, got -1"),
    "a float": (lambda: BlackBox(truth, budget=1e4), "budget must be an int >= 0, got 10000.0"),
    "batch_size": (lambda: BlackBox(truth, batch_size=0), "batch_size must be an int >= 1"),
    "retries": (lambda: BlackBox(truth, retries=True), "retries must be an int >= 0, got True"),
    "backoff": (lambda: BlackBox(truth, backoff=float("nan")), "backoff must be seconds"),
    "no rows": (
        lambda: BlackBox(truth).query(X[:0]),
        r"of numbers, got float32 \(0",
    ),
    "a number": (lambda: BlackBox(truth).query(1.0), r"got float64 \(\)"),
    "texts": (lambda: BlackBox(truth).query(["a"]), "got <U1"),
    "ftp": (lambda: HTTP("ftp://host/"), "url must be http://host"),
    "no host": (lambda: HTTP("http:///path"), "url must be http://host"),
    "timeout": (lambda: HTTP("http://host", timeout=0), "timeout must be positive seconds"),
    "a shell line": (lambda: Subprocess("python box.py"), "must be a list"),
    "no timeout": (lambda: Subprocess(["cat"], timeout=float("inf")), "timeout must be positive"),
    "traced": (lambda: jax.jit(BlackBox(truth))(X), "cannot be traced"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_clear_error(name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ---------------------------------------------------------------------- the page, the examples


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "black-boxes.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        if block.startswith("# box.py"):
            pathlib.Path("box.py").write_text(block)
        else:
            exec(block, names)
    assert names["found"].forwards.sum() <= names["budget"]
    assert names["box"].ledger.paid == 16


def example(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.full
def test_the_front_end_descends_the_chain_rule(key):
    # Given the true gradient with respect to the code, a step is that of backpropagation.
    made = example("zo_ae_ds")
    system = made["system"]("digits")
    x = jnp.asarray(data.digits().test.x[:4])
    front = made["start"](system, key, x)
    decoder = system.autoencoder.init(key, x)["params"]
    classifier = jax.random.normal(key, (64, 10))

    def loss(code):
        logits = system.decode(decoder, code).reshape(len(code), -1) @ classifier
        return losses.cross_entropy(logits, jnp.arange(4))

    code, stats = system.code(front, x, train=True)
    gradient = jax.grad(lambda c: loss(c).sum())(code)
    tx = optax.sgd(1.0)
    new, _ = made["descend"](system, tx, front, tx.init(front[0]), x, gradient)
    direct = jax.grad(lambda p: loss(system.code((p, front[1]), x, train=True)[0]).mean())(front[0])
    moved = jax.tree.map(lambda a, b: a - b, front[0], new[0])
    for one, two in zip(jax.tree.leaves(moved), jax.tree.leaves(direct)):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1, float(jnp.abs(two).max())))
    assert sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(direct)) > 1e-6
    for one, two in zip(jax.tree.leaves(new[1]), jax.tree.leaves(stats)):
        np.testing.assert_array_equal(one, two)


def test_the_simulator_is_what_it_says(key):
    made = example("zo_sciml")
    smooth, coarse = made["Burgers"](), made["Burgers"](128)
    u = 0.5 + 0.4 * jnp.sin(2 * jnp.pi * (jnp.arange(32) + 0.5) / 32)
    still = jnp.zeros(32)
    # Mass is conserved, constants stay, and a source is integrated over time.
    np.testing.assert_allclose(smooth(u, still).mean(), u.mean(), atol=1e-6)
    np.testing.assert_allclose(smooth(u, still + 2).mean(), u.mean() + 0.5, atol=1e-5)
    for simulator in (smooth, coarse):
        np.testing.assert_allclose(simulator(still + 0.5, still), 0.5, atol=1e-6)
    found = np.asarray(128 * coarse(u, still))
    np.testing.assert_array_equal(found, np.round(found))
    np.testing.assert_allclose(found / 128, smooth(u, still), atol=0.03)
    # Without rounding, estimates are the gradient; with it, jax.grad is zero.
    c = jax.random.normal(key, (32,))
    estimate = CGE(1e-2, exact=False)(None, lambda s: jnp.vdot(c, smooth(u, s)), still)[1]
    gradient = jax.grad(lambda s: jnp.vdot(c, smooth(u, s)))(still)
    np.testing.assert_allclose(estimate, gradient, atol=2e-4)
    assert not np.any(jax.grad(lambda s: jnp.vdot(c, coarse(u, s)))(still))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("zo_ae_ds", ("--seeds", 1, "--epochs", 1, "--test", 20, "--n", 100)),
        ("zo_sciml", ("--steps", 20, "--train", 64)),
    ],
)
def test_the_examples_run(name, arguments):
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *map(str, arguments), "--json"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])
