"""Data sets, augmentation and corruptions. What needs an extra says so when it is called."""

from jrobust.data import corruptions
from jrobust.data._augment import (
    Augmentation,
    Augmented,
    CutMix,
    Cutout,
    Flip,
    Mixup,
    PadCrop,
    chain,
)
from jrobust.data._dataset import Dataset
from jrobust.data._digits import Splits, digits
from jrobust.data._synthetic import synthetic

__all__ = [
    "Augmentation",
    "Augmented",
    "CutMix",
    "Cutout",
    "Dataset",
    "Flip",
    "Mixup",
    "PadCrop",
    "Splits",
    "chain",
    "corruptions",
    "digits",
    "synthetic",
]
