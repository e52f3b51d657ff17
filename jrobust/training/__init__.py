"""Training objectives and the step that minimises them."""

from jrobust.training._objectives import (
    TRADES,
    Adversarial,
    GaussianAugmentation,
    Standard,
    adversarial_examples,
)
from jrobust.training._step import Batch, Objective, State, batch, step

__all__ = [
    "TRADES",
    "Adversarial",
    "Batch",
    "GaussianAugmentation",
    "Objective",
    "Standard",
    "State",
    "adversarial_examples",
    "batch",
    "step",
]
