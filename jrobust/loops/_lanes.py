"""What the loops share: one lane shape, checks of data, progress."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jrobust import parallel
from jrobust.data import Dataset, Source
from jrobust.data._stream import piece

P = ParamSpec("P")
Q = ParamSpec("Q")
Event = TypeVar("Event")
Report = TypeVar("Report")
E_co = TypeVar("E_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)


class Prepared(Protocol[E_co]):
    """A run whose arguments have been checked."""

    def warm_up(self) -> dict[str, float]:
        """Compile everything."""

    def events(self) -> Iterator[E_co]:
        """Run, an event at a time."""


class Loop(Protocol[P, R_co, Q, E_co]):
    """A pipeline: a function that returns a report, and two other ways to use it."""

    @property
    def iter(self) -> Callable[Q, Iterator[E_co]]:
        """The same as an iterator of events; takes no ``progress``."""

    @property
    def warm_up(self) -> Callable[Q, dict[str, float]]:
        """Compile what a run with these arguments needs, ahead of time: seconds by program.

        The programs stay in JAX's persistent cache, so that the run, in this process or another,
        starts at once. Takes the arguments of ``iter``; runs nothing, writes nothing.
        """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run to the end."""


def loop(
    prepare: Callable[Q, Prepared[Event]],
) -> Callable[[Callable[P, Report]], Loop[P, Report, Q, Event]]:
    """Decorator: the pipeline whose events and programs are those of ``prepare``.

    It runs on a mesh of its own, whatever ``jax.set_mesh`` says and wherever its arguments are.
    """

    def started(args: Any, kwargs: Any) -> Prepared[Event]:
        return prepare(*map(parallel.plain, args), **_each(parallel.plain, kwargs))

    def events(*args: Q.args, **kwargs: Q.kwargs) -> Iterator[Event]:
        home = parallel.home((args, kwargs))
        with parallel.apart(home):
            found: Any = started(args, kwargs).events()
        return each(home, found)

    def each(home: Mesh | None, found: Any) -> Iterator[Event]:
        def advance() -> Event | None:
            with parallel.apart(home) as back:
                event = next(found, None)
                return event and type(event)(*(_given(back, part) for part in event))

        try:
            yield from iter(advance, None)
        finally:
            with parallel.apart(home):
                found.close()

    def warm_up(*args: Q.args, **kwargs: Q.kwargs) -> dict[str, float]:
        with parallel.apart(parallel.home((args, kwargs))):
            return started(args, kwargs).warm_up()

    def decorate(run: Callable[P, Report]) -> Loop[P, Report, Q, Event]:
        @functools.wraps(run)
        def made(*args: Any, **kwargs: Any) -> Report:
            with parallel.apart(parallel.home((args, kwargs))) as back:
                report = run(*map(parallel.plain, args), **_each(parallel.plain, kwargs))
                return _given(back, report)

        whole: Any = made
        whole.iter, whole.warm_up = events, warm_up
        return whole

    return decorate


def _each(fn: Callable[[Any], Any], values: dict[str, Any]) -> dict[str, Any]:
    return {name: fn(value) for name, value in values.items()}


def _given(back: Callable[[Any], Any], part: Any) -> Any:
    """A report, or part of an event, with its arrays where :func:`parallel.apart` says."""
    if dataclasses.is_dataclass(part) and jax.tree_util.all_leaves([part]):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **_each(back, fields))  # type: ignore[type-var]
    return back(part)


def surroundings(key: jax.Array, mesh: Mesh) -> dict[str, Any]:
    """What besides the settings a result may depend on, for the configuration in a report."""
    return {
        "seed": jax.random.key_data(key).tolist(),
        "devices": mesh.size,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
    }


def rows(
    index: np.ndarray, lanes: int, *, fill: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut ``index`` into pieces of exactly ``lanes`` rows: (rows (lanes,), mask (lanes,)).

    The last piece is filled with rows from the front of ``index``, masked out, so that one compiled
    program serves all and fillers are ordinary examples; or left short, without ``fill``.
    """
    for begin in range(0, len(index), lanes):
        yield piece(index, begin, lanes if fill else min(lanes, len(index) - begin))


class Bar:
    """A progress bar for each stage of a loop, or nothing. A context manager."""

    def __init__(self, show: bool, unit: str) -> None:
        self._show, self._unit = show and parallel.is_main(), unit
        self._stage: str | None = None
        self._bar: Any = None
        self._since = time.time()

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
            # Events come after the work, so the stage began when the last event came.
            self._bar.start_t = self._bar.last_print_t = self._since
        self._since = time.time()
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()}, refresh=False)
        self._bar.update(finished - self._bar.n)


def check_data(data: Any, name: str = "data") -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``data`` is what every loop can work on."""
    if isinstance(data, Source):
        raise TypeError(
            f"{name} must be in memory, got a Source: pass {name}.read(), or of a part of it, "
            f"{name}[:1000].read()"
        )
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
        names = {getattr(key, "name", "") for key in path}
        # A table that is read by the examples' ids, and what is the same for all of them.
        if names & {"predictions", "starts", "kernel"}:
            continue
        bound = bool(names & {"lo", "hi"})
        if np.ndim(leaf) >= (data.x.ndim if bound else 1) and np.shape(leaf)[0] == len(data):
            raise ValueError(
                f"{type(algorithm).__name__}{jax.tree_util.keystr(path)} has a value for each of "
                f"the {len(data)} examples, but a loop regroups them: give one value for all, or "
                "call jrobust.run on batches of your own"
            )


def check_names(name: str, description: Any) -> None:
    """Raise ``ValueError`` where ``describe`` found functions that it cannot tell from others.

    Lambdas are all called the same, and an object without a name is told by where it lies in memory
    today: a report would not say what ran, and a later run could not know it again.
    """
    if isinstance(description, dict):
        for field, value in description.items():
            check_names(f"{name}.{field}", value)
    elif isinstance(description, list):
        for value in description:
            check_names(name, value)
    elif isinstance(description, str) and re.search(r"<lambda>| at 0x[0-9a-f]+", description):
        raise ValueError(
            f"{name} is {description}, which a report cannot tell from another function: give it a "
            "name, def my_optimizer(size): return optax.sgd(size, 0.9)"
        )


def check_count(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


# Rows in a forward pass of one device, where nothing else is asked for.
_LANES = {"cpu": 128}
_LANES_OF_AN_ACCELERATOR = 512


def lane_count(batch_size: int | None, total: int, mesh: Mesh) -> int:
    """Lanes over all devices: ``batch_size``, at most ``total``, up to a multiple of the devices.

    When None, what suits the kind of device, with the examples spread evenly over the batches.

    Raises ``ValueError`` where ``batch_size`` is not positive.
    """
    if batch_size is None:
        most = _LANES.get(jax.default_backend(), _LANES_OF_AN_ACCELERATOR) * mesh.size
        batch_size = -(-total // -(-total // most))
    check_count("batch_size", batch_size)
    return -(-min(batch_size, total) // mesh.size) * mesh.size
