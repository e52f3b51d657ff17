"""A data set held in host memory."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples on the host.

    ``len(data)`` is N; a slice, an array of positions or a boolean mask gives another data set,
    whose examples keep their ids.

    Attributes:
      x: (N, ...) inputs.
      y: (N,) integer labels.
      id: (N,) int32, the number under which an example draws its random numbers and appears in
        records, whatever subset it is in; default 0 .. N - 1.

    Raises ``ValueError`` where the lengths differ, an id appears twice or does not fit into its 32
    bits, ``TypeError`` where labels are not integers or a data set is indexed by a single position.
    """

    x: np.ndarray
    y: np.ndarray
    id: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        x, y = np.asarray(self.x), np.asarray(self.y)
        ids = np.arange(len(x)) if self.id is None else np.asarray(self.id)
        for name, array in (("y", y), ("id", ids)):
            if array.shape != (len(x),):
                raise ValueError(
                    f"{name} must have shape ({len(x)},), one entry for each of the {len(x)} "
                    f"examples in x {x.shape}; got {array.shape}"
                )
            if not np.issubdtype(array.dtype, np.integer):
                raise TypeError(f"{name} must be integers, got {array.dtype}")
        if ids.size and not -(2**31) <= ids.min() <= ids.max() < 2**31:
            raise ValueError(f"ids must fit into 32 bits, got {ids.min()} to {ids.max()}")
        if len(np.unique(ids)) != len(ids):
            raise ValueError("ids must be unique: two examples would share their random numbers")
        for name, array in (("x", x), ("y", y), ("id", ids.astype(np.int32))):
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | np.ndarray) -> Dataset:
        if not isinstance(index, slice) and np.ndim(index) != 1:
            raise TypeError(
                f"a data set is indexed by a slice or an array of positions, got {index!r}; for "
                "one example write data[i:i + 1]"
            )
        return Dataset(self.x[index], self.y[index], self.id[index])

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs (n, ...), int32 labels (n,) and ids (n,) of the examples at ``index`` (n,)."""
        return self.x[index], self.y[index].astype(np.int32), self.id[index]
