"""Several models as one: stacked parameters, ensembles, transfer of attacks between models."""

from jrobust.ensembles._combine import mean_log_probabilities, mean_logits, mean_probabilities, vote
from jrobust.ensembles._ensemble import Ensemble, ensemble
from jrobust.ensembles._stacked import draw, stack, unstack
from jrobust.ensembles._transfer import Transfer, transfer

__all__ = [
    "Ensemble",
    "Transfer",
    "draw",
    "ensemble",
    "mean_log_probabilities",
    "mean_logits",
    "mean_probabilities",
    "stack",
    "transfer",
    "unstack",
    "vote",
]
