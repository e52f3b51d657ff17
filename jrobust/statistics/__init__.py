"""Exact statistics in float64 on the host."""

from jrobust.statistics._binomial import (
    binomial_test,
    clopper_pearson_lower,
    clopper_pearson_upper,
    false_certificates,
)
from jrobust.statistics._sequence import confidence_sequence

__all__ = [
    "binomial_test",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "confidence_sequence",
    "false_certificates",
]
