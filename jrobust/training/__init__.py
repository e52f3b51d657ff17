"""Training objectives, the step that minimises them, and averages of its weights."""

from jrobust.training._averaging import EMA, SWA, Averaging, update_statistics
from jrobust.training._objectives import (
    TRADES,
    Adversarial,
    GaussianAugmentation,
    Standard,
    adversarial_examples,
)
from jrobust.training._step import Batch, Objective, State, batch, guarded, step

__all__ = [
    "EMA",
    "SWA",
    "TRADES",
    "Adversarial",
    "Averaging",
    "Batch",
    "GaussianAugmentation",
    "Objective",
    "Standard",
    "State",
    "adversarial_examples",
    "batch",
    "guarded",
    "step",
    "update_statistics",
]
