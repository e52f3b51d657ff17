"""Randomized smoothing: noises, votes on the device, certificates on the host."""

from jrobust.smoothing._certify import ABSTAIN, Certificate, ceiling, certify, predict
from jrobust.smoothing._noise import Gaussian, Noise
from jrobust.smoothing._votes import Stages, count_votes, stages

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Gaussian",
    "Noise",
    "Stages",
    "ceiling",
    "certify",
    "count_votes",
    "predict",
    "stages",
]
