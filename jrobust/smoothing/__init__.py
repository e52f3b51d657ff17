"""Randomized smoothing: noises, votes on the device, certificates on the host."""

from jrobust.smoothing._certify import (
    ABSTAIN,
    Certificate,
    ceiling,
    certify,
    certify_staged,
    predict,
    samples_for,
)
from jrobust.smoothing._discrete import DiscreteGaussian
from jrobust.smoothing._masking import Masking
from jrobust.smoothing._noise import (
    Converted,
    Exponential,
    Gaussian,
    Laplace,
    Noise,
    Pareto,
    Uniform,
)
from jrobust.smoothing._plan import Plan, plan
from jrobust.smoothing._votes import Stages, count_disagreements, count_votes, stages

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Converted",
    "DiscreteGaussian",
    "Exponential",
    "Gaussian",
    "Laplace",
    "Masking",
    "Noise",
    "Pareto",
    "Plan",
    "Stages",
    "Uniform",
    "ceiling",
    "certify",
    "certify_staged",
    "count_disagreements",
    "count_votes",
    "plan",
    "predict",
    "samples_for",
    "stages",
]
