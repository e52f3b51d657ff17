"""What the loops share: one compiled lane shape, compile time apart, progress, files."""

from __future__ import annotations

import contextlib
import csv
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jrobust import drive


class Clock:
    """Where the wall time of a loop goes: ``compile``, ``run`` and ``other`` seconds."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "run": 0.0}
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def total(self) -> dict[str, float]:
        """Seconds by name; ``other`` is what was spent outside of programs and compilers."""
        spent = sum(self.seconds.values())
        return {**self.seconds, "other": max(0.0, time.perf_counter() - self._begin - spent)}

    def compiled(self, fn: Callable[..., Any], *args: Any, **jit: Any) -> Callable[..., Any]:
        """``fn`` compiled ahead of time for arguments like ``args``; calls count as ``run``."""
        with self.measure("compile"):
            program = jax.jit(drive.rewrite(fn), **jit).lower(*args).compile()

        def call(*args: Any) -> Any:
            with self.measure("run"):
                return jax.block_until_ready(program(*args))

        return call


def rows(index: np.ndarray, lanes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut ``index`` into pieces of exactly ``lanes`` rows: (rows (lanes,), mask (lanes,)).

    The last piece is filled with rows from the front of ``index``, masked out, so that one compiled
    program serves all and fillers are ordinary examples.
    """
    for begin in range(0, len(index), lanes):
        piece = index[begin : begin + lanes]
        filler = np.resize(index, lanes - len(piece))
        yield np.concatenate([piece, filler]), np.arange(lanes) < len(piece)


class Files:
    """A run's directory: ``metrics.jsonl`` and a table of examples, written as they finish.

    Args:
        directory: created if missing; nothing is written when None.
        columns: header of the table ``examples.csv``; no table when empty.
    """

    def __init__(self, directory: Any, columns: Sequence[str] = ()) -> None:
        self.directory = None if directory is None else pathlib.Path(directory)
        self._columns = list(columns)
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "metrics.jsonl").write_text("")
            if self._columns:
                with open(self.directory / "examples.csv", "w", newline="") as file:
                    csv.writer(file).writerow(self._columns)

    def metrics(self, **values: Any) -> None:
        """Append one line of JSON to ``metrics.jsonl``."""
        if self.directory is not None:
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values, default=float) + "\n")

    def examples(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows to ``examples.csv``: one array (n,) for each of its columns."""
        if self.directory is not None:
            with open(self.directory / "examples.csv", "a", newline="") as file:
                lists = [columns[name].tolist() for name in self._columns]
                csv.writer(file).writerows(zip(*lists))

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Write a compressed ``.npz``."""
        if self.directory is not None:
            np.savez_compressed(self.directory / name, **arrays)  # type: ignore[arg-type]

    def json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        if self.directory is not None:
            text = json.dumps(value, indent=2, default=float)
            (self.directory / name).write_text(text + "\n")


class Bar:
    """A progress bar, or nothing."""

    def __init__(self, show: bool, total: int, what: str, unit: str) -> None:
        self._bar: Any = None
        if show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, leave=True)

    def update(self, n: int, **values: Any) -> None:
        """Advance by ``n`` and show ``values``."""
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()}, refresh=False)
            self._bar.update(n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def lane_count(batch_size: int, total: int) -> int:
    """``batch_size``, at most the number of examples; raises ``ValueError`` where not positive."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
    if total == 0:
        raise ValueError("the data set is empty")
    return min(batch_size, total)
