"""What a benchmark works on, and how it reaches the peer and fresh processes: by files."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any, TypeVar

import _common
import jax
import jax.numpy as jnp
import numpy as np

from jrobust import models

C = TypeVar("C", bound="Case")


@dataclasses.dataclass
class Case:
    """Settings, examples, and a network with its variables; subclasses set ``module``.

    Attributes:
        settings: a dataclass of numbers, strings and tuples of them.
        variables: of the network, nested dicts.
        x, y: images (N, H, W, C) float32 and labels (N,).
    """

    settings: Any
    variables: dict[str, Any]
    x: Any
    y: Any

    def network(self) -> dict[str, Any]:
        """The network for the peer, see ``_peer_networks.NETWORKS``."""
        m = self.module  # type: ignore[attr-defined]
        if isinstance(m, models.SmallCNN):
            _, side, _, channels = self.x.shape
            sizes = {"channels": channels, "side": side, "widths": m.widths, "hidden": m.hidden}
            return {"kind": "SmallCNN", "classes": m.classes, **sizes}
        constants = {"mean": m.mean, "std": m.std}
        sizes = {"depth": m.depth, "classes": m.classes, "widths": m.widths}
        return {"kind": "ResNet", **sizes, **constants}

    def arrays(self) -> dict[str, Any]:
        """What the peer gets beside the network."""
        return {"x": self.x, "y": self.y}

    def save(self, folder: pathlib.Path) -> None:
        """Write what the peer and fresh processes need."""
        np.savez(folder / "case.npz", **self.arrays())
        np.savez(folder / "variables.npz", **_common.flatten(self.variables))
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(self.settings)))

    @classmethod
    def load(cls: type[C], folder: pathlib.Path, kind: type) -> C:
        """Read what :meth:`save` wrote; ``kind`` is that of its settings."""
        given = json.loads((folder / "settings.json").read_text())
        settings = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        with np.load(folder / "variables.npz") as arrays:
            variables = jax.tree.map(jnp.asarray, _common.unflatten(dict(arrays)))
        with np.load(folder / "case.npz") as arrays:
            return cls(settings, variables, arrays["x"], arrays["y"])

    def open(self, peer: _common.Peer, folder: pathlib.Path) -> dict[str, Any]:
        """Hand all this to the peer, by files in ``folder``; it says what it is."""
        self.save(folder)
        return peer.ask(
            "open",
            folder=str(folder),
            settings=dataclasses.asdict(self.settings),
            network=self.network(),
            threads=os.cpu_count(),
        )
