"""The pipelines: ``fit``, ``evaluate`` and ``certify``, each with ``.iter`` and ``.warm_up``.

``recertify`` reads the log of a certification, ``sandwich`` sets certificates against attacks.
"""

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
from jrobust.loops._publish import leaderboard_row, robustbench_entry, run_standard_evaluation
from jrobust.loops._recertify import recertify
from jrobust.loops._reliability import Doubt, ReliabilityWarning
from jrobust.loops._sandwich import (
    Certified,
    Claims,
    Contradicted,
    SandwichReport,
    sandwich,
)
from jrobust.loops._tsv import CertifiedRadii, Slice, read_tsv

__all__ = [
    "CertificationEvent",
    "CertificationReport",
    "Certified",
    "CertifiedRadii",
    "Claims",
    "CleanAccuracy",
    "Contradicted",
    "Diverged",
    "Doubt",
    "EvaluationEvent",
    "EvaluationReport",
    "FitEvent",
    "FitReport",
    "NoisyAccuracy",
    "ReliabilityWarning",
    "RobustAccuracy",
    "SandwichReport",
    "Slice",
    "certify",
    "evaluate",
    "fit",
    "leaderboard_row",
    "read_tsv",
    "recertify",
    "robustbench_entry",
    "run_standard_evaluation",
    "sandwich",
]
