"""Randomized smoothing: noises, votes on the device, certificates on the host."""

from jrobust.smoothing._certify import (
    ABSTAIN,
    Certificate,
    ceiling,
    certify,
    predict,
    samples_for,
)
from jrobust.smoothing._denoised import (
    Denoised,
    DiffusionDenoiser,
    denoised,
    diffusion_denoiser,
)
from jrobust.smoothing._discrete import DiscreteGaussian
from jrobust.smoothing._dual import Half, certify_dual, checkerboard, halves
from jrobust.smoothing._masking import Masking
from jrobust.smoothing._mixed import Mixed, certify_mixed, lipschitz_radius
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
from jrobust.smoothing._staged import certify_staged
from jrobust.smoothing._votes import Stages, count_disagreements, count_votes, stages

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Converted",
    "Denoised",
    "DiffusionDenoiser",
    "DiscreteGaussian",
    "Exponential",
    "Gaussian",
    "Half",
    "Laplace",
    "Masking",
    "Mixed",
    "Noise",
    "Pareto",
    "Plan",
    "Stages",
    "Uniform",
    "ceiling",
    "certify",
    "certify_dual",
    "certify_mixed",
    "certify_staged",
    "checkerboard",
    "count_disagreements",
    "count_votes",
    "denoised",
    "diffusion_denoiser",
    "halves",
    "lipschitz_radius",
    "plan",
    "predict",
    "samples_for",
    "stages",
]
