"""Models: from Flax modules to the pure functions the library takes, networks and their weights.

Importing this needs no flax; the networks and the binding of a module do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jrobust.models._callbacks import HostModel, from_host, from_torch_module
from jrobust.models._flax import bind, network
from jrobust.models._mixed import (
    MIXEDNUTS,
    AdaptiveWeight,
    MixedClassifier,
    adaptive_weight,
    mixed,
    mixed_logits,
    sharpened_logits,
)
from jrobust.models._network import Bound, Network
from jrobust.models._randomized import Drawn, Randomized, randomized
from jrobust.models._summary import Layer, Summary, summary
from jrobust.models._surrogate import BPDA, StraightThrough, bpda, straight_through
from jrobust.models._tensors import read_tensors
from jrobust.models._unrolled import Fourier, data_step, smoothing_noise, unroll
from jrobust.models._weights import from_deepmind, from_safetensors, from_torch, to_safetensors

if TYPE_CHECKING:
    from jrobust.models._networks import MLP, LeNet, ResNet, SmallCNN
    from jrobust.models._resnets import (
        MoEResNet18,
        PreActResNet18,
        ResNet18,
        ResNet50,
        WideResNet,
    )
    from jrobust.models._restoration import Autoencoder, DnCNN
    from jrobust.models._robustbench import robustbench
    from jrobust.models._tensor_train import TensorTrainDense, tensor_train
    from jrobust.models._vit import ViT

__all__ = [
    "BPDA",
    "MIXEDNUTS",
    "MLP",
    "AdaptiveWeight",
    "Autoencoder",
    "Bound",
    "DnCNN",
    "Drawn",
    "Fourier",
    "HostModel",
    "Layer",
    "LeNet",
    "MixedClassifier",
    "MoEResNet18",
    "Network",
    "PreActResNet18",
    "Randomized",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "SmallCNN",
    "StraightThrough",
    "Summary",
    "TensorTrainDense",
    "ViT",
    "WideResNet",
    "adaptive_weight",
    "bind",
    "bpda",
    "data_step",
    "from_deepmind",
    "from_host",
    "from_safetensors",
    "from_torch",
    "from_torch_module",
    "mixed",
    "mixed_logits",
    "network",
    "randomized",
    "read_tensors",
    "robustbench",
    "sharpened_logits",
    "smoothing_noise",
    "straight_through",
    "summary",
    "tensor_train",
    "to_safetensors",
    "unroll",
]

# What is made of Flax modules, by the file that holds it.
_FLAX = {
    **dict.fromkeys(("MLP", "LeNet", "ResNet", "SmallCNN"), "_networks"),
    **dict.fromkeys(
        ("MoEResNet18", "PreActResNet18", "ResNet18", "ResNet50", "WideResNet"), "_resnets"
    ),
    **dict.fromkeys(("Autoencoder", "DnCNN"), "_restoration"),
    **dict.fromkeys(("TensorTrainDense", "tensor_train"), "_tensor_train"),
    "ViT": "_vit",
    "robustbench": "_robustbench",
}


def __getattr__(name: str) -> Any:
    if name not in _FLAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"jrobust.models.{_FLAX[name]}"), name)
    except ImportError as error:
        raise ImportError(f"jrobust.models.{name} needs flax: pip install flax") from error


def __dir__() -> list[str]:
    return __all__
