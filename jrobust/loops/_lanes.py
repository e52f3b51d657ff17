"""What the loops share: one compiled lane shape, compile time apart, progress, files."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jrobust import drive, parallel
from jrobust.data import Dataset

P = ParamSpec("P")
Q = ParamSpec("Q")
Event = TypeVar("Event")
Report = TypeVar("Report")
E_co = TypeVar("E_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)


class Loop(Protocol[P, R_co, Q, E_co]):
    """A function that returns a report, with the generator behind it."""

    @property
    def iter(self) -> Callable[Q, Iterator[E_co]]:
        """The same as a generator of events; takes no ``progress``."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run to the end."""


def with_iter(
    iterate: Callable[Q, Iterator[Event]],
) -> Callable[[Callable[P, Report]], Loop[P, Report, Q, Event]]:
    """Decorator: ``run.iter`` is ``iterate``."""

    def decorate(run: Callable[P, Report]) -> Loop[P, Report, Q, Event]:
        run.iter = iterate  # type: ignore[attr-defined]
        return cast(Loop[P, Report, Q, Event], run)

    return decorate


# Kept, so that a second call of a loop finds the programs of the first.
@functools.lru_cache(maxsize=64)
def _program(
    fn: Callable[..., Any],
    mesh: Mesh,
    backend: parallel.Backend,
    in_axes: tuple[int | None, ...],
    **options: Any,
) -> parallel.DataParallel:
    return parallel.data_parallel(drive.rewrite(fn), mesh, backend, in_axes=in_axes, **options)


def surroundings(key: jax.Array, mesh: Mesh) -> dict[str, Any]:
    """What besides the settings a result may depend on, for the configuration in a report."""
    return {
        "seed": jax.random.key_data(key).tolist(),
        "devices": mesh.size,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
    }


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

    def compiled(
        self,
        fn: Callable[..., Any],
        *args: Any,
        mesh: Mesh,
        in_axes: Sequence[int | None],
        backend: parallel.Backend = "shard_map",
        **options: Any,
    ) -> Callable[..., Any]:
        """``fn`` compiled ahead of time for arguments like ``args``; calls count as ``run``.

        On one device the back end makes no difference; the options are those of
        :func:`jrobust.parallel.data_parallel`.
        """
        with self.measure("compile"):
            backend = "jit" if mesh.size == 1 else backend
            program = _program(fn, mesh, backend, tuple(in_axes), **options).compile(*args)

        def call(*args: Any) -> Any:
            with self.measure("run"):
                return jax.block_until_ready(program(*args))

        return call


def rows(
    index: np.ndarray, lanes: int, *, fill: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut ``index`` into pieces of exactly ``lanes`` rows: (rows (lanes,), mask (lanes,)).

    The last piece is filled with rows from the front of ``index``, masked out, so that one compiled
    program serves all and fillers are ordinary examples; or left short, without ``fill``.
    """
    for begin in range(0, len(index), lanes):
        piece = index[begin : begin + lanes]
        filler = np.resize(index, lanes - len(piece) if fill else 0)
        piece = np.concatenate([piece, filler])
        yield piece, np.arange(len(piece)) < len(index) - begin


class Files:
    """A run's directory: ``metrics.jsonl`` and a table of examples, written as they finish.

    Args:
        directory: created if missing, files of an earlier run in it overwritten; nothing is
            written when None.
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
    """A progress bar for each stage of a loop, or nothing. A context manager."""

    def __init__(self, show: bool, unit: str) -> None:
        self._show, self._unit = show, unit
        self._stage: str | None = None
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, stage: str, finished: int, total: int, **values: float) -> None:
        """Show that ``stage`` stands at ``finished`` of ``total``, and ``values``."""
        if not self._show:
            return
        if stage != self._stage:
            from tqdm.auto import tqdm

            self.__exit__()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, unit=self._unit)
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()}, refresh=False)
        self._bar.update(finished - self._bar.n)


def check_data(data: Any, name: str = "data") -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``data`` is what every loop can work on."""
    if not isinstance(data, Dataset):
        raise TypeError(
            f"{name} must be a jrobust.data.Dataset, got {type(data).__name__}: wrap arrays in "
            "Dataset(x, y)"
        )
    if data.x.dtype != np.float32:
        scale = " and divide by 255" if data.x.dtype == np.uint8 else ""
        raise TypeError(
            f"{name}.x must be float32, got {data.x.dtype}: convert with x.astype('float32'){scale}"
        )
    if len(data) == 0 or data.x.ndim < 2:
        raise ValueError(
            f"{name}.x must hold examples, (N, ...) with N >= 1 and at least one feature axis, got "
            f"shape {data.x.shape}"
        )
    if not np.all(np.isfinite(data.x)):
        raise ValueError(f"{name}.x holds values that are not finite")


def check_shared(algorithm: Any, data: Dataset) -> None:
    """Raise ``ValueError`` where a setting has a value for each example of ``data``.

    Loops regroup the examples, so that it would meet the wrong ones.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(algorithm):
        bound = getattr(path[-1], "name", "") in ("lo", "hi") if path else False
        if np.ndim(leaf) >= (data.x.ndim if bound else 1) and np.shape(leaf)[0] == len(data):
            raise ValueError(
                f"{type(algorithm).__name__}{jax.tree_util.keystr(path)} has a value for each of "
                f"the {len(data)} examples, but a loop regroups them: give one value for all, or "
                "call jrobust.run on batches of your own"
            )


def check_count(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def lane_count(batch_size: int, total: int, mesh: Mesh) -> int:
    """``batch_size``, at most the number of examples, up to a multiple of the mesh's devices.

    Raises ``ValueError`` where ``batch_size`` is not positive.
    """
    check_count("batch_size", batch_size)
    return -(-min(batch_size, total) // mesh.size) * mesh.size
