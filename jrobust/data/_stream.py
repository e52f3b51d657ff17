"""The order of training, and batches of it that are read ahead."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jrobust import keys as _keys
from jrobust.data._dataset import Dataset
from jrobust.data._source import Source
from jrobust.training import Batch

T = TypeVar("T")

# More threads wait for one another: between two images Python is the bottleneck.
_THREADS = min(os.cpu_count() or 1, 8)
_AHEAD = _THREADS + 2  # batches, those that are being read included


def order(key: jax.Array, epoch: int, total: int) -> np.ndarray:
    """The order of an epoch, counted from 1: a function of the key and the epoch alone."""
    return _permutation(tuple(int(w) for w in jax.random.key_data(key).ravel()), epoch, total)


@functools.lru_cache(maxsize=4)
def _permutation(seed: tuple[int, ...], epoch: int, total: int) -> np.ndarray:
    found = np.random.default_rng([*seed, epoch]).permutation(total)
    found.flags.writeable = False  # shared by all who ask
    return found


def piece(index: np.ndarray, start: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """``index[start : start + lanes]`` as exactly ``lanes`` rows, and the mask (lanes,) of them.

    What is missing is filled with rows from the front of ``index``, masked out, so that one
    compiled program serves all batches and fillers are ordinary examples.
    """
    rows = index[start : start + lanes]
    filler = np.resize(index, lanes - len(rows))
    return np.concatenate([rows, filler]), np.arange(lanes) < len(rows)


def ahead(read: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """``read(start)``, ``read(start + 1)``, ... ``read(stop - 1)``, read by threads beforehand.

    Raises ``ImportError`` without grain (``pip install 'jrobust[data]'``).
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "reading ahead from a Source needs grain: pip install 'jrobust[data]'; a source that "
            "fits into memory can be read at once: source.read()"
        ) from error
    stream = grain.MapDataset.range(start, stop).map(read)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    batches = iter(stream.to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()


def reads(
    data: Dataset | Source, pieces: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``data.rows`` of each of ``pieces``, ahead of time where they have to be read."""
    if isinstance(data, Source):
        return ahead(lambda i: data.rows(pieces[i]), 0, len(pieces))
    return map(data.rows, pieces)


class Batches:
    """An iterator of :class:`jrobust.training.Batch`; see :func:`batches`."""

    def __init__(
        self,
        data: Dataset | Source,
        key: jax.Array,
        batch_size: int,
        *,
        epochs: int | None,
        process: tuple[int, int],
    ) -> None:
        self._data, self._key, self._size, self._process = data, key, batch_size, process
        self.steps = -(-len(data) // batch_size)
        self._stop = sys.maxsize if epochs is None else epochs * self.steps
        self._given = 0
        about = (len(data), batch_size, jax.random.key_data(key).tolist())
        digest = hashlib.sha256(repr(about).encode() + data.id.tobytes())
        self._stream = digest.hexdigest()
        self._reader: Iterator[Batch] | None = None

    def _read(self, number: int) -> Batch:
        epoch, step = divmod(number, self.steps)
        everything = order(self._key, epoch + 1, len(self._data))
        index, mask = piece(everything, step * self._size, self._size)
        rank, processes = self._process
        share = self._size // processes
        ours = slice(rank * share, (rank + 1) * share)
        x, y, ids = self._data.rows(index[ours])
        return Batch(x, y, ids, mask[ours])  # type: ignore[arg-type]

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = ahead(self._read, self._given, self._stop)
        batch = next(self._reader)
        self._given += 1
        return batch

    @property
    def epoch(self) -> int:
        """Epochs of which all batches were given."""
        return self._given // self.steps

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as JSON can hold it: behind the last batch that was given."""
        return {"batches": self._given, "stream": self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on behind the batch at which ``state`` was got, in this process or another.

        Raises ``ValueError`` where it comes from other data, another key or batch size.
        """
        if set(state) != {"batches", "stream"} or state["stream"] != self._stream:
            raise ValueError(
                f"this is not the state of these batches, whose stream is {self._stream}: {state}; "
                "it belongs to other examples, another key or another batch_size"
            )
        self.close()
        self._given = int(state["batches"])

    def close(self) -> None:
        """Stop reading ahead. The next batch starts it again."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()  # type: ignore[attr-defined]


def batches(
    data: Dataset | Source,
    key: jax.Array,
    batch_size: int,
    *,
    epochs: int | None = None,
    process: tuple[int, int] | None = None,
) -> Batches:
    """Shuffled batches for a training loop of one's own, read ahead by threads.

    Every epoch has each example once, in the order of ``loops.fit`` with the same key: a function
    of the key and the epoch. Each batch is a ``training.Batch`` of NumPy arrays with x float32
    (batch_size, ...); the last of an epoch is filled with examples from the front of the epoch,
    masked out. ``get_state()`` and ``set_state(state)`` resume behind any batch.

    Args:
        data: a :class:`Dataset` or a :class:`Source`.
        key: one typed key.
        batch_size: examples in a batch, over all processes.
        epochs: passes over ``data``; without end when None.
        process: ``(index, count)``: every process is given its own equal part of each batch, which
            ``jax.make_array_from_process_local_data`` puts together. ``(jax.process_index(),
            jax.process_count())`` when None. The order is that of one process, so a state may be
            set under another count.

    Returns:
        An iterator with ``get_state``, ``set_state``, ``close``; ``steps`` batches make an epoch.

    Raises:
        TypeError: for a key that is not typed, data that are none.
        ValueError: for a size that is not positive or no multiple of the processes, no examples.
        ImportError: at the first batch, without grain (``pip install 'jrobust[data]'``).
    """
    _keys.check(key)
    if not isinstance(data, Dataset | Source):
        raise TypeError(f"data must be a Dataset or a Source, got {type(data).__name__}")
    if not len(data):
        raise ValueError("data holds no examples")
    process = (jax.process_index(), jax.process_count()) if process is None else process
    if not 0 <= process[0] < process[1]:
        raise ValueError(f"process must be (index, count) with 0 <= index < count, got {process}")
    for name, value in (("batch_size", batch_size), ("epochs", 1 if epochs is None else epochs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if batch_size % process[1]:
        raise ValueError(
            f"batch_size={batch_size} cannot be split over {process[1]} processes: choose a "
            "multiple of them"
        )
    return Batches(data, key, batch_size, epochs=epochs, process=process)
