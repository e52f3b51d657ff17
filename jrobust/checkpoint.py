"""Training states on disk, by orbax: written whole or not at all, restored onto any devices."""

from __future__ import annotations

import pathlib
from typing import Any

import jax


class Checkpoints:
    """Numbered checkpoints of a pytree in a directory. A context manager.

    Every process of a distributed run must make the same calls.

    Args:
        directory: created at the first save.
        keep: how many of the newest to keep.
    """

    def __init__(self, directory: Any, keep: int = 1) -> None:
        try:
            from orbax.checkpoint import v1 as ocp
        except ImportError as error:
            raise ImportError("checkpoints need orbax: pip install orbax-checkpoint") from error
        self._made = ocp.training.Checkpointer(
            pathlib.Path(directory).absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    @property
    def latest(self) -> int | None:
        """Number of the newest checkpoint, None where there is none."""
        return None if self._made.latest is None else self._made.latest.step

    def save(self, step: int, state: Any, about: Any = None) -> None:
        """Write a pytree of arrays, and ``about``, anything that JSON can hold.

        Raises an error of orbax if there is a checkpoint of this number already.
        """
        self._made.save_checkpointables(
            step, {"state": state, "about": {"about": about}}, force=True
        )

    def load(self, like: Any, step: int | None = None) -> tuple[Any, Any]:
        """Read ``(state, about)`` of a checkpoint, the newest when ``step`` is None.

        Args:
            like: a pytree of arrays, or of ``jax.ShapeDtypeStruct``, whose structure, dtypes and
                shardings the result gets.
            step: its number.

        Raises:
            FileNotFoundError: if there is none.
        """
        step = self.latest if step is None else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._made.directory}")

        def abstract(leaf: Any) -> Any:
            sharding = getattr(leaf, "sharding", None)
            if sharding is None:
                sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        found = self._made.load_checkpointables(
            step, {"state": jax.tree.map(abstract, like), "about": None}
        )
        return found["state"], found["about"]["about"]
