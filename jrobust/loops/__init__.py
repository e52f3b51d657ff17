"""The pipelines: ``fit``, ``evaluate`` and ``certify``, each with ``.iter`` and ``.warm_up``."""

from jrobust.loops._certify import CertificationEvent, CertificationReport, certify
from jrobust.loops._evaluate import EvaluationEvent, EvaluationReport, evaluate
from jrobust.loops._fit import (
    CleanAccuracy,
    Diverged,
    FitEvent,
    FitReport,
    NoisyAccuracy,
    RobustAccuracy,
    fit,
)
from jrobust.loops._publish import robustbench_entry, run_standard_evaluation
from jrobust.loops._reliability import Doubt, ReliabilityWarning

__all__ = [
    "CertificationEvent",
    "CertificationReport",
    "CleanAccuracy",
    "Diverged",
    "Doubt",
    "EvaluationEvent",
    "EvaluationReport",
    "FitEvent",
    "FitReport",
    "NoisyAccuracy",
    "ReliabilityWarning",
    "RobustAccuracy",
    "certify",
    "evaluate",
    "fit",
    "robustbench_entry",
    "run_standard_evaluation",
]
