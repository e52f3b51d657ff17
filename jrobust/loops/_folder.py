"""A run's directory: what it is, its batches as they finish, its logs. Exact resume."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from jrobust import parallel

Arrays = dict[str, np.ndarray]

# In what a run may differ and still be the same run, which goes on.
_FREE = {"checks", "devices", "epochs"}


class Folder:
    """Where a run writes, and from where it goes on after an interruption.

    Every finished batch is one file, written whole or not at all, so that a run killed at any
    moment goes on behind its last finished batch. Of several processes the first writes and all
    read.

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
        ValueError: if another run is in the directory and ``resume`` is set.
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
        self.directory = None if directory is None else pathlib.Path(directory).absolute()
        self.configuration = configuration
        self.resumed, self._computed = 0, 0
        self._columns, self._stored = list(columns), set[str]()
        self._writes = self.directory is not None and parallel.is_main()
        if self.directory is None:
            return
        self.configuration = wanted = {**configuration, **identity()}
        if resume:
            _compare(self.directory, stored_configuration(self.directory), wanted)
            batches = self.directory / "batches"
            self._stored = {path.stem for path in batches.glob("*.npz")}
        parallel.barrier("read")
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not resume:
                for name in ("batches", "checkpoints"):
                    shutil.rmtree(self.directory / name, ignore_errors=True)
                for name in ("lanes.npz", "report.json"):
                    (self.directory / name).unlink(missing_ok=True)
            self.json("configuration.json", wanted)
            (self.directory / "metrics.jsonl").write_text("")
            if self._columns:
                with open(self.directory / "examples.csv", "w", newline="") as file:
                    csv.writer(file).writerow(self._columns)
        parallel.barrier("written")

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
        with np.load(self.directory / name) as file:
            return dict(file)

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
        if self._writes and self.directory is not None:
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values, default=float) + "\n")

    def examples(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows to ``examples.csv``: one array (n,) for each of its columns."""
        if self._writes and self.directory is not None:
            with open(self.directory / "examples.csv", "a", newline="") as file:
                lists = [columns[name].tolist() for name in self._columns]
                csv.writer(file).writerows(zip(*lists))

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


def stored_configuration(directory: Any) -> dict[str, Any]:
    """``configuration.json`` of a run's directory, empty where there is none."""
    path = pathlib.Path(directory) / "configuration.json"
    return json.loads(path.read_text()) if path.exists() else {}


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
