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
from jrobust.data._load import load
from jrobust.data._source import Source, image_folder
from jrobust.data._stream import Batches, batches
from jrobust.data._synthetic import synthetic

__all__ = [
    "Augmentation",
    "Augmented",
    "Batches",
    "CutMix",
    "Cutout",
    "Dataset",
    "Flip",
    "Mixup",
    "PadCrop",
    "Source",
    "Splits",
    "batches",
    "chain",
    "corruptions",
    "digits",
    "image_folder",
    "load",
    "synthetic",
]
