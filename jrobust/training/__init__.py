"""Training objectives, the step that minimises them, and averages of its weights."""

from jrobust.training._averaging import EMA, SWA, Averaging, update_statistics
from jrobust.training._denoisers import DenoisedStability, Denoising
from jrobust.training._objectives import (
    TRADES,
    Adversarial,
    Standard,
    adversarial_examples,
)
from jrobust.training._schedule import Scheduled
from jrobust.training._smoothed import MACER, Consistency, NoiseAugmentation, Stability
from jrobust.training._smoothed_attacks import CATRS, SmoothAdv, SmoothMix
from jrobust.training._step import Batch, Objective, State, batch, guarded, step
from jrobust.training._zeroth_order import RedrawnMask, ZerothOrder, zeroth_order_step

__all__ = [
    "CATRS",
    "EMA",
    "MACER",
    "SWA",
    "TRADES",
    "Adversarial",
    "Averaging",
    "Batch",
    "Consistency",
    "DenoisedStability",
    "Denoising",
    "NoiseAugmentation",
    "Objective",
    "RedrawnMask",
    "Scheduled",
    "SmoothAdv",
    "SmoothMix",
    "Stability",
    "Standard",
    "State",
    "ZerothOrder",
    "adversarial_examples",
    "batch",
    "guarded",
    "step",
    "update_statistics",
    "zeroth_order_step",
]
