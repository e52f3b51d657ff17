"""A run's directory: what it is, its batches as they finish, its logs. Exact resume."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pathlib
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from jrobust import parallel

Arrays = dict[str, np.ndarray]

# In what a run may differ and still be the same run, which goes on.
_FREE = {"checks", "devices", "epochs"}

# What a run that starts over takes away.
_FOLDERS = ("batches", "checkpoints")
_FILES = (
    "lanes.npz", "report.json", "metrics.jsonl", "examples.csv", "adversarial.npz", "counts.npz",
    "sandwich.npz", "sandwich.png",
)  # fmt: skip


class Folder:
    """Where a run writes, and from where it goes on after an interruption.

    Every finished batch is one file, written whole or not at all, so that a run killed at any
    moment goes on behind its last finished batch. Of several processes the first writes and all
    read. Logs are begun anew with the first line of a process, and hold until then what they held.

    Attributes:
        configuration: the run's, with the digests.
        resumed: batches that came from disk.

    Args:
        directory: created if missing; nothing is written when None.
        configuration: settings of the run.
        identity: computes digests of data, variables and programs; called if there is a directory.
        resume: go on with the run in the directory, if there is one, or start over.
        columns: header of the table ``examples.csv``; no table when empty.

    Raises:
        ValueError: if another run is in the directory and ``resume`` is set; if another process is
            running there.
    """

    def __init__(
        self,
        directory: Any,
        configuration: dict[str, Any],
        identity: Callable[[], dict[str, str]],
        *,
        resume: bool,
        columns: Sequence[str] = (),
    ) -> None:
        self.directory = located(directory)
        self.configuration = configuration
        self.resumed, self._computed = 0, 0
        self._columns, self._stored, self._begun = list(columns), set[str](), set[str]()
        self._writes = self.directory is not None and parallel.is_main()
        if self.directory is None:
            return
        self.configuration = wanted = {**configuration, **identity()}
        free = True
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = self._claim(self.directory)
        if not parallel.agree(free):
            raise ValueError(
                f"another process is running in {self.directory}: wait until it ends, or choose "
                "another directory"
            )
        if resume:
            _compare(self.directory, stored_configuration(self.directory), wanted)
            batches = self.directory / "batches"
            self._stored = {path.stem for path in batches.glob("*.npz")}
        parallel.barrier("read")
        if self._writes:
            if not resume:
                for name in _FOLDERS:
                    if (self.directory / name).exists():
                        shutil.rmtree(self.directory / name)
                for name in _FILES:
                    (self.directory / name).unlink(missing_ok=True)
            self.json("configuration.json", wanted)
        parallel.barrier("written")

    def _claim(self, directory: pathlib.Path) -> bool:
        """Keep other processes out until this one ends, however it ends; False if one is there."""
        opened = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, opened)
        try:
            import fcntl

            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except (ImportError, OSError) as error:  # Windows, and file systems that cannot lock
            warnings.warn(
                f"{directory} cannot be locked ({error}): see to it that no other process runs "
                "there at the same time",
                RuntimeWarning,
                stacklevel=2,
            )
        return True

    def once(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of the batch ``name``: from its file, or computed now and stored."""
        if name in self._stored:
            self.resumed += 1
            batch = self.load(f"batches/{name}.npz")
            assert batch is not None
            return batch
        self._computed += 1
        batch = compute()
        self.save(f"batches/{name}.npz", **batch)
        return batch

    def stored(self, prefix: str) -> list[str]:
        """Names of the batches that were there when the run began, in order."""
        return sorted(name for name in self._stored if name.startswith(prefix))

    def load(self, name: str) -> Arrays | None:
        """The arrays of an ``.npz``, None where there is none."""
        if self.directory is None or not (self.directory / name).exists():
            return None
        try:
            with open(self.directory / name, "rb") as opened, np.load(opened) as file:
                return dict(file)
        except Exception as error:  # what zipfile raises of a changed byte is no closed list
            raise ValueError(
                f"{self.directory / name} is damaged ({type(error).__name__}: {error}): put back a "
                "copy of it, or delete it, and what it held is computed again"
            ) from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``report.json``; of a run that has only been read again, with its own times."""
        if self.directory is None:
            return
        if self._writes:
            (self.directory / "lanes.npz").unlink(missing_ok=True)
        path = self.directory / "report.json"
        if not self._computed and path.exists():
            with contextlib.suppress(ValueError):  # damaged since
                stored = json.loads(path.read_text())
                times = {k: stored[k] for k in ("seconds", "resumed") if k in stored}
                summary = {**summary, **times}
        self.json("report.json", summary)

    def metrics(self, **values: Any) -> None:
        """Append one line of JSON to ``metrics.jsonl``."""
        with self._log("metrics.jsonl") as file:
            if file is not None:
                file.write(json.dumps(values, default=float) + "\n")

    def examples(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows to ``examples.csv``: one array (n,) for each of its columns."""
        with self._log("examples.csv") as file:
            if file is not None:
                header = [] if file.tell() else [self._columns]
                lists = [columns[name].tolist() for name in self._columns]
                csv.writer(file).writerows([*header, *zip(*lists)])

    @contextlib.contextmanager
    def _log(self, name: str) -> Iterator[IO[str] | None]:
        if not self._writes or self.directory is None:
            yield None
            return
        with open(self.directory / name, "a" if name in self._begun else "w", newline="") as file:
            self._begun.add(name)
            yield file

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Write an ``.npz``, whole or not at all."""
        with self._whole(name) as file:
            if file is not None:
                np.savez(file, **arrays)  # type: ignore[arg-type]

    def json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        with self._whole(name) as file:
            if file is not None:
                file.write((json.dumps(value, indent=2, default=float) + "\n").encode())

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[IO[bytes] | None]:
        if not self._writes or self.directory is None:
            yield None
            return
        path = self.directory / name
        part = path.with_name(path.name + ".part")
        part.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def located(directory: Any) -> Any:
    """The directory of a run as an absolute path, with ``~`` for the home; None of None."""
    return None if directory is None else pathlib.Path(directory).expanduser().absolute()


def stored_configuration(directory: pathlib.Path) -> dict[str, Any]:
    """``configuration.json`` of a run's directory, empty where there is none.

    Raises:
        ValueError: if it cannot be read, or is missing beside results.
    """
    path = directory / "configuration.json"
    try:
        stored = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(stored, dict):
            raise ValueError(f"holds {stored!r}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): nothing was changed; put back a copy of it, or choose "
            "another directory"
        ) from error
    if not stored and any(any(directory.glob(f"{name}/*")) for name in _FOLDERS):
        raise ValueError(
            f"{directory} holds results but no configuration.json that says of which run: nothing "
            "was changed; put back a copy of it, or choose another directory"
        )
    return stored


def _compare(directory: pathlib.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    if not stored:
        return

    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True, default=float)

    missing = object()
    names = sorted((stored.keys() | wanted.keys()) - _FREE)
    differ = [
        f"{name} (there {_short(stored.get(name))}, here {_short(wanted.get(name))})"
        for name in names
        if stored.get(name, missing) is missing
        or wanted.get(name, missing) is missing
        or text(stored[name]) != text(wanted[name])
    ]
    if differ:
        raise ValueError(
            f"{directory} holds another run: it differs in {', '.join(differ)}; choose another "
            "directory, or start over in this one with resume=False"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, default=float)
    return text if len(text) <= 60 else text[:57] + "..."
