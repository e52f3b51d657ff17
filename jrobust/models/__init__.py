"""Models: from Flax modules to the pure functions the library takes, and reference networks.

Importing this needs no flax; the networks and the binding of a module do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jrobust.models._linen import bind, network
from jrobust.models._network import Bound, Network

if TYPE_CHECKING:
    from jrobust.models._networks import MLP, ResNet, SmallCNN

__all__ = ["MLP", "Bound", "Network", "ResNet", "SmallCNN", "bind", "network"]


def __getattr__(name: str) -> Any:
    if name not in ("MLP", "ResNet", "SmallCNN"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("jrobust.models._networks"), name)
    except ImportError as error:
        raise ImportError(f"jrobust.models.{name} needs flax: pip install flax") from error


def __dir__() -> list[str]:
    return __all__
