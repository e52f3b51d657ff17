"""Attacks: ``attack(key, logits_fn, x, y, *, ids=None, targets=None) -> AttackResult``."""

from jrobust.attacks._base import Attack, AttackResult, GradientAttack, Record, State
from jrobust.attacks._compose import (
    Restarts,
    Sequence,
    Union,
    restarts,
    sequence,
    union,
    with_eps,
)
from jrobust.attacks._pgd import FGSM, MIFGSM, PGD, RSFGSM

__all__ = [
    "FGSM",
    "MIFGSM",
    "PGD",
    "RSFGSM",
    "Attack",
    "AttackResult",
    "GradientAttack",
    "Record",
    "Restarts",
    "Sequence",
    "State",
    "Union",
    "restarts",
    "sequence",
    "union",
    "with_eps",
]
