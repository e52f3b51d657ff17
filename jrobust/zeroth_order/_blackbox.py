"""Functions outside of JAX that charge for answers: asked once, counted exactly, kept on disk."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import http.client
import io
import itertools
import os
import pathlib
import secrets
import signal
import subprocess
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np

from jrobust.drive import Host

_LONGEST_PAUSE = 60.0  # seconds
_AGAIN = {408, 409, 425, 429}  # HTTP: what a later attempt may cure, beside 500 to 599


class Ledger(NamedTuple):
    """What a :class:`BlackBox` was asked, in rows unless said otherwise.

    Attributes:
        queries: answered, from wherever, since this box was made: what attacks count as
            ``forwards``.
        replayed: those of them that cost nothing, since the log, or with ``deterministic`` an
            earlier query, knew their answers.
        paid: answered by the service, in all runs of the log. The budget is about these.
        attempts: requests sent in all runs of the log, sent again included.
        sent: rows in them: the most that a service can have computed and charged which does not
            know a request again by its id.
    """

    queries: int = 0
    replayed: int = 0
    paid: int = 0
    attempts: int = 0
    sent: int = 0


class BudgetExceeded(RuntimeError):
    """A query that would have cost more than is left: none of its rows has been asked.

    All earlier answers are in the log, so that the same run with a larger budget gets here again
    for nothing.

    Attributes:
        ledger: the :class:`Ledger` so far.
    """

    def __init__(self, message: str, ledger: Ledger) -> None:
        super().__init__(message)
        self.ledger = ledger


class Service(Protocol):
    """What answers the requests of a :class:`BlackBox`, one attempt at a time."""

    def answer(self, request: str, x: np.ndarray) -> Any:
        """Answers (n, ...) to the rows of ``x`` (n, ...).

        Args:
            request: printable id of at most 80 letters, digits and hyphens, the same on every
                attempt at the same request, also in a resumed run.
            x: the rows; the service may keep or change the array.

        Raises:
            ConnectionError, TimeoutError: there was no answer, and another attempt may get it.
                Anything else that is raised ends the query.
        """

    def close(self) -> None:
        """Give back what is held."""


class BlackBox(Host):
    """A black box whose queries are batched, counted, paid once, bounded, and kept on disk.

    It is a :class:`jrobust.drive.Host`: attacks that need no gradient, attacks with
    ``estimator=``, ``loops.evaluate``, and ``Estimator.per_example(..., host=True)`` take it.
    :meth:`query` is the same for arrays of numpy, and for answers that are no logits.

    * A request goes out up to ``retries + 1`` times under one id, so that a service that knows ids
      computes it once; the ledger counts its rows once, when the answer is there.
    * The budget is checked for all rows of a query before the first of them is asked.
    * With a ``log`` every answer is on disk (fsync) before it is used. The same run, started again
      after whatever ended it, is told the answers that it has had, and pays for new ones alone. A
      run killed between sending a request and storing its answer sends it again, with the same id.

    Rows that are equal, bit by bit, are separate queries, each paid and logged as the n-th of its
    kind, as a box with random answers needs it: a run that is repeated from its start meets the
    answers in the same order. One that goes on from its middle (``loops.evaluate`` with a
    directory) may be told an earlier answer to the same row, which only a random box can notice.
    With ``deterministic=True`` equal rows are paid once.

    The log knows rows by their bytes, and nothing of the service: one log for one service.

    Args:
        service: a function from rows (n, ...) to answers (n, ...), arrays of numpy; or a
            :class:`HTTP`, a :class:`Subprocess` or any other :class:`Service`.
        budget: rows that may be paid for, over all runs of the log; None for no bound.
        batch_size: rows of a request, at most; None for as many as a query has.
        retries: attempts after the first, where there is no answer.
        backoff: seconds before the second attempt, doubled before each further one, up to 60.
        log: file of the answers, created if missing, locked as long as the box is open; None keeps
            none.
        deterministic: the same row has always the same answer. Keeps all answers in memory.

    Raises:
        TypeError, ValueError: for settings that make no sense; a log that another box has open,
            that is none, that was written with another ``deterministic``, or that is damaged
            elsewhere than at its end.

    Examples:
        >>> import numpy as np
        >>> from jrobust.zeroth_order import BlackBox
        >>> box = BlackBox(lambda x: np.stack([x.sum(1), -x.sum(1)], 1), budget=5, batch_size=2)
        >>> box.query(np.ones((3, 4))).shape, box.ledger.paid, box.ledger.attempts
        ((3, 2), 3, 2)
    """

    def __init__(
        self,
        service: Service | Callable[[np.ndarray], Any],
        *,
        budget: int | None = None,
        batch_size: int | None = None,
        retries: int = 5,
        backoff: float = 0.1,
        log: str | os.PathLike[str] | None = None,
        deterministic: bool = False,
    ) -> None:
        if not hasattr(service, "answer"):
            if not callable(service):
                raise TypeError(
                    "service must be a function of arrays, or have a method answer(request, x), "
                    f"as HTTP(url) and Subprocess(command) do; got {service!r}"
                )
            service = _Function(service)
        for name, value, least in (
            ("budget", budget, 0),
            ("batch_size", batch_size, 1),
            ("retries", retries, 0),
        ):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
        if not 0 <= backoff < float("inf"):
            raise ValueError(f"backoff must be seconds >= 0, got {backoff!r}")
        super().__init__(self.query)
        self._service: Service = cast(Service, service)
        self._budget, self._batch_size = budget, batch_size
        self._retries, self._backoff, self._deterministic = retries, backoff, deterministic
        self._ledger = Ledger()
        # Answers not yet given, or with `deterministic` all; by content and number of its kind.
        self._known: dict[bytes, np.ndarray] = {}
        self._asked = collections.Counter[bytes]()  # by content
        self._numbers = itertools.count()
        self._like: tuple[Any, ...] | None = None
        self._turn = threading.RLock()
        self._log, self._run = None, secrets.token_hex(8)
        if log is not None:
            self._log = _Log(log, self._run, deterministic)
            self._run, self._known = self._log.run, self._log.answers
            self._ledger = self._log.ledger
            for answer in itertools.islice(self._known.values(), 1):
                self._like = answer.dtype, *answer.shape

    @property
    def ledger(self) -> Ledger:
        """The counts so far."""
        return self._ledger

    def close(self) -> None:
        """Close the service, and the log."""
        self._service.close()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> BlackBox:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def query(self, x: Any) -> np.ndarray:
        """Answers (n, ...) to the rows of ``x`` (n, ...), in the dtype of the service.

        Threads take turns, so that the counts and the budget hold for all of them together.

        Raises:
            BudgetExceeded: before any row is asked.
            ConnectionError: a request had no answer in ``retries + 1`` attempts. With a log,
                requests of the query that were answered are kept: asking again costs the others.
            ValueError: ``x`` has no rows or holds no numbers, or the service did not answer
                with one row of numbers for each, of one shape and dtype.
        """
        x = np.asarray(x, order="C")
        if x.ndim == 0 or len(x) == 0 or x.dtype.kind not in "biuf":
            raise ValueError(f"x must be rows (n, ...) of numbers, got {x.dtype} {x.shape}")
        with self._turn:
            return self._query(x)

    def _query(self, x: np.ndarray) -> np.ndarray:
        keys = self._keys(x)
        new: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self._known:
                new.setdefault(key, i)
        ledger = self._ledger
        if self._budget is not None and ledger.paid + len(new) > self._budget:
            raise BudgetExceeded(
                f"{ledger.paid} of {self._budget} rows are paid for: a query of {len(new)} new "
                "rows would exceed the budget, and none of them was asked; what was answered is "
                f"{'lost without log=' if self._log is None else 'in ' + str(self._log.path)}",
                ledger,
            )
        unpaid = list(new)
        size = self._batch_size or len(unpaid)
        for start in range(0, len(unpaid), size or 1):
            part = unpaid[start : start + size]
            self._known.update(zip(part, self._ask(part, x[[new[key] for key in part]])))
        found = np.stack([self._known[key] for key in keys])
        if not self._deterministic:
            for key in keys:
                del self._known[key]
                if self._log is not None:
                    self._asked[key[:_DIGEST]] += 1
        self._count(queries=len(keys), replayed=len(keys) - len(new))
        return found

    def _keys(self, x: np.ndarray) -> list[bytes]:
        """What tells each row from all others: its content, and how many like it came before."""
        if self._log is None and not self._deterministic:  # nobody will look for them again
            return [next(self._numbers).to_bytes(_KEY, "little") for _ in x]
        kind = f"{x.dtype.str}{x.shape[1:]}".encode()
        before, keys = collections.Counter[bytes](), []
        for row in x:
            digest = hashlib.blake2b(kind + row.tobytes(), digest_size=_DIGEST).digest()
            number = 0 if self._deterministic else self._asked[digest] + before[digest]
            before[digest] += 1
            keys.append(digest + number.to_bytes(_KEY - _DIGEST, "little"))
        return keys

    def _ask(self, keys: list[bytes], x: np.ndarray) -> np.ndarray:
        """Answers to one request, paid for, and stored if there is a log."""
        names, rows = b"".join(keys), len(keys)
        request = f"{self._run}-{hashlib.blake2b(names, digest_size=_DIGEST).hexdigest()}"
        failure: Exception | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(self._backoff * 2.0 ** (attempt - 1), _LONGEST_PAUSE))
            self._count(attempts=1, sent=rows)
            if self._log is not None:
                self._log.sent(request, rows)
            try:
                given = self._service.answer(request, x.copy())  # which the service may change
                break
            except (ConnectionError, TimeoutError) as error:
                failure = error
        else:
            raise ConnectionError(
                f"no answer to a request of {rows} rows in {self._retries + 1} attempts; "
                f"{self._ledger.paid} rows were answered before. The last failure: {failure}"
            ) from failure
        self._count(paid=rows)
        try:
            answers = np.array(given)  # a copy: the service may keep its buffer
        except ValueError:  # rows of several lengths
            answers = np.array(None)
        like, wrong = (answers.dtype, *answers.shape[1:]), None
        if answers.shape[:1] != (rows,) or answers.dtype.kind not in "biuf":
            wrong = (
                f"the black box must answer {rows} rows with numbers of shape ({rows}, ...), got "
                f"{answers.dtype} {answers.shape}"
            )
        elif self._like not in (None, like):
            wrong = f"the black box answered with {self._like} a row, now with {like}"
        if wrong is not None:
            if self._log is not None:
                self._log.useless(request, rows)
            raise ValueError(wrong)
        self._like = like
        if self._log is not None:
            self._log.answered(request, rows, names, answers)
        return answers

    def _count(self, **more: int) -> None:
        ledger = self._ledger
        self._ledger = ledger._replace(**{k: getattr(ledger, k) + n for k, n in more.items()})


class _Function:
    """A function of arrays as a :class:`Service`."""

    def __init__(self, fn: Callable[[np.ndarray], Any]) -> None:
        self._fn = fn

    def answer(self, request: str, x: np.ndarray) -> Any:
        return self._fn(x)

    def close(self) -> None:
        """Nothing is held."""


def _pack(x: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, x, allow_pickle=False)
    return buffer.getvalue()


def _unpack(body: bytes) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
    except ValueError as error:
        raise ConnectionError(f"the answer is no array in .npy format: {body[:80]!r}") from error


class HTTP:
    """A server that answers over HTTP; the :class:`Service` of a :class:`BlackBox`.

    Each request is a POST of the rows in NumPy's ``.npy`` format with the headers ``Content-Type:
    application/x-npy`` and ``Idempotency-Key: <id>``. Status 200 and an ``.npy`` array answer it. A
    broken or late reply, status 408, 409, 425, 429 and those from 500 on are no answer: the request
    comes again with the same key. Any other status is a refusal: ``RuntimeError`` ends the query.
    The connection is kept between requests.

    Args:
        url: ``http://`` or ``https://``.
        timeout: seconds without a byte after which there is no answer.
        headers: further headers, for instance ``{"Authorization": ...}``.

    Raises:
        ValueError: for another kind of url, a timeout that is not positive.
    """

    def __init__(
        self, url: str, *, timeout: float = 60.0, headers: Mapping[str, str] | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError(f"url must be http://host/... or https://host/..., got {url!r}")
        _check_timeout(timeout)
        self._url, self._headers = url, dict(headers or {})
        self._path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self._connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=timeout)

    def answer(self, request: str, x: np.ndarray) -> np.ndarray:
        """See :class:`Service`."""
        headers = {"Content-Type": "application/x-npy", "Idempotency-Key": request}
        try:
            self._connection.request("POST", self._path, _pack(x), {**headers, **self._headers})
            with self._connection.getresponse() as reply:
                body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ConnectionError(f"{self._url}: {error!r}") from error
        except BaseException:
            self._connection.close()  # a reply may still be on its way to the next request
            raise
        if reply.status == 200:
            return _unpack(body)
        message = f"{self._url}: HTTP {reply.status} {reply.reason}: {body[:200]!r}"
        if reply.status in _AGAIN or reply.status >= 500:
            raise ConnectionError(message)
        raise RuntimeError(f"the request was refused: {message}")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Subprocess:
    """A process that answers on its standard output; the :class:`Service` of a :class:`BlackBox`.

    A request is the line ``ask <id> <bytes>`` and then as many bytes, the rows in NumPy's ``.npy``
    format, on its standard input. It answers with the line ``answer <id> <bytes>`` and an ``.npy``
    array, or refuses with ``error <id> <bytes>`` and a text, which becomes a ``RuntimeError``.
    One request at a time; standard error is that of the caller. The process is started with the
    first request, and again after one that it did not answer in time or in form: it is killed
    then, with all processes of its group. It should end when its input does.

    Args:
        command: program and arguments.
        timeout: seconds for an answer, the start of the process included.

    Raises:
        ValueError: for a command that is none, a timeout that is not positive.
    """

    def __init__(self, command: Sequence[str], *, timeout: float = 60.0) -> None:
        if isinstance(command, str) or not command:
            raise ValueError(f"command must be a list [program, argument, ...], got {command!r}")
        _check_timeout(timeout)
        self._command, self._timeout = [os.fspath(part) for part in command], timeout
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, request: str, x: np.ndarray) -> np.ndarray:
        """See :class:`Service`."""
        process = self._process
        if process is None:
            pipe = subprocess.PIPE
            # In a group of its own, so that none of its children keeps the pipe open.
            process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, start_new_session=True
            )
            self._process = process
        watch = threading.Timer(self._timeout, _kill, (process,))
        started = time.monotonic()  # before the watch does, so that its end is not early
        watch.start()
        try:
            try:
                kind, reply = self._exchange(process, request, _pack(x))
            finally:
                watch.cancel()
        except (OSError, ValueError) as error:
            self._end()
            late = time.monotonic() - started >= self._timeout
            reason = f"none in {self._timeout} s" if late else error
            raise ConnectionError(f"{self._command}: {reason}") from error
        except BaseException:
            self._end()  # its answer must not be taken for one to the next request
            raise
        if kind == b"error":
            text = reply.decode(errors="replace")
            raise RuntimeError(f"{self._command} refused the request: {text}")
        return _unpack(reply)

    @staticmethod
    def _exchange(
        process: subprocess.Popen[bytes], request: str, body: bytes
    ) -> tuple[bytes, bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"ask {request} {len(body)}\n".encode() + body)
        process.stdin.flush()
        line = process.stdout.readline(_LINE)
        if not line:
            raise OSError("it ended without an answer")
        kind, name, size = (*line.split(), b"", b"", b"")[:3]
        if kind not in (b"answer", b"error") or name != request.encode() or not size.isdigit():
            raise ValueError(f"expected 'answer {request} <bytes>', got {line[:80]!r}")
        reply = process.stdout.read(int(size))
        if len(reply) < int(size):
            raise OSError("it ended in the middle of an answer")
        return kind, reply

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()

    def close(self) -> None:
        """End the process: it may finish for a second after the end of its input."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(1.0)
        self._end()


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Its number is its own until it has been waited for.
    if process.returncode is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


def _check_timeout(timeout: float) -> None:
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be positive seconds, got {timeout!r}")


# ------------------------------------------------------------------------------ the log
#
# One line that says what the file is, then records, each a line and so many bytes as it says:
#
#   sent <request> <rows> 0 <crc of nothing> <crc of the line so far>
#   useless <request> <rows> 0 <crc of nothing> <crc of the line so far>
#   answer <request> <rows> <bytes> <crc of the bytes> <crc of the line so far>
#
# The bytes of an answer are the keys of the rows (20 each) and the answers in .npy format;
# "useless" is one of another form than asked for, paid nevertheless. The last record may be torn by
# a crash. Anything else that does not fit is damage, and no reason to forget the paid answers
# behind it: that is left to the user.

_TITLE = b"jrobust black box 1 "
_LINE = 512  # longer than any line
_DIGEST, _KEY = 16, 20


class _Log:
    """Answers on disk; see :class:`BlackBox`.

    Attributes:
        path: the file.
        run: the part of request ids that is this log's own.
        answers: what it held, by key.
        ledger: what was paid and sent before.
    """

    def __init__(self, path: Any, run: str, deterministic: bool) -> None:
        import fcntl  # not on every system, and needed by logs alone

        self.path = pathlib.Path(path).absolute()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.run, self.ledger = run, Ledger()
        self.answers: dict[bytes, np.ndarray] = {}
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  closed by close()
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"the log {self.path} is in use by another black box: close it first"
                ) from error
            self._read(deterministic)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def sent(self, request: str, rows: int) -> None:
        # Not fsynced: it outlives the process, and an outage of the machine costs a count alone.
        self._append(_record("sent", request, rows, b""))

    def answered(self, request: str, rows: int, keys: bytes, answers: np.ndarray) -> None:
        self._append(_record("answer", request, rows, keys + _pack(answers)))
        os.fsync(self._file.fileno())

    def useless(self, request: str, rows: int) -> None:
        self._append(_record("useless", request, rows, b""))
        os.fsync(self._file.fileno())

    def _append(self, record: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(end)  # half a record must not be followed by others
            raise

    def _read(self, deterministic: bool) -> None:
        size = os.fstat(self._file.fileno()).st_size
        kind = "deterministic" if deterministic else "any"
        with open(self.path, "rb") as file:
            title = file.readline(_LINE)
            if not title.endswith(b"\n"):
                if not (len(title) == size and _TITLE.startswith(title[: len(_TITLE)])):
                    raise ValueError(f"{self.path} is not the log of a black box")
                self._file.truncate(0)  # new, or killed in its first line
                self._append(_TITLE + f"{self.run} {kind}\n".encode())
                os.fsync(self._file.fileno())
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
                return
            if not title.startswith(_TITLE):
                raise ValueError(f"{self.path} is not the log of a black box")
            self.run, there = title[len(_TITLE) :].decode().split()
            if there != kind:
                raise ValueError(
                    f"{self.path} was written with deterministic={there == 'deterministic'}, and "
                    f"cannot be read with deterministic={deterministic}"
                )
            good = file.tell()
            for what, rows, payload in _records(file, self.path, size):
                if what == b"sent":
                    done = Ledger(attempts=1, sent=rows)
                elif what == b"useless":
                    done = Ledger(paid=rows)
                else:
                    done = Ledger(paid=rows)
                    names = (payload[i * _KEY : (i + 1) * _KEY] for i in range(rows))
                    self.answers.update(zip(names, _unpack(payload[rows * _KEY :])))
                self.ledger = Ledger(*map(sum, zip(self.ledger, done)))
                good = file.tell()
        self._file.truncate(good)


def _crc(data: bytes) -> bytes:
    return b" %08x" % zlib.crc32(data)


def _record(what: str, request: str, rows: int, payload: bytes) -> bytes:
    line = f"{what} {request} {rows} {len(payload)}".encode() + _crc(payload)
    return line + _crc(line) + b"\n" + payload


def _records(file: IO[bytes], path: Any, size: int) -> Iterator[tuple[bytes, int, bytes]]:
    """(what, rows, payload) of each record that is whole, up to one that is torn at the end."""
    while line := file.readline(_LINE):
        start = file.tell() - len(line)
        text, check = line[:-10], line[-10:]
        whole = check == _crc(text) + b"\n"
        if whole:
            what, _, rows, length, crc = text.split()
            payload = file.read(int(length))
            if len(payload) == int(length) and b" " + crc == _crc(payload):
                yield what, int(rows), payload
                continue
        if file.tell() < size:
            raise ValueError(
                f"the log {path} is damaged at byte {start} of {size}, before its end: cut it "
                "there to lose the answers behind, or put back a copy"
            )
        return
