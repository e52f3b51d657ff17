"""Models: from Flax modules to the pure functions the library takes, and reference networks.

Importing this needs no flax; the networks and the binding of a module do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jrobust.models._flax import bind, network
from jrobust.models._network import Bound, Network
from jrobust.models._randomized import Drawn, Randomized, randomized
from jrobust.models._summary import Layer, Summary, summary

if TYPE_CHECKING:
    from jrobust.models._networks import MLP, ResNet, SmallCNN

__all__ = [
    "MLP",
    "Bound",
    "Drawn",
    "Layer",
    "Network",
    "Randomized",
    "ResNet",
    "SmallCNN",
    "Summary",
    "bind",
    "network",
    "randomized",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in ("MLP", "ResNet", "SmallCNN"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("jrobust.models._networks"), name)
    except ImportError as error:
        raise ImportError(f"jrobust.models.{name} needs flax: pip install flax") from error


def __dir__() -> list[str]:
    return __all__
