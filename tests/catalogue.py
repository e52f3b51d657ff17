"""THE table of every public algorithm: what the shared suite runs each of them through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jrobust.attacks import (
    FGSM,
    MIFGSM,
    PGD,
    RSFGSM,
    Attack,
    restarts,
    sequence,
    union,
)
from jrobust.threat import L2, Linf, Threat


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attack.

    Args:
        name: its public name in ``jrobust.attacks``.
        make: the attack for a threat model, few steps.
        also: further public names that the entry covers (the class behind a function).
        threats: the threat models it is defined for.
        random: whether its result depends on the key.
        targeted: whether it takes ``targets=``.
        gain: by how much it lowers accuracy at least on the suite's model, at the suite's radius.
        own: whether its program is its own, not one or several of other entries'. The slow checks
            of the others (every way to run it, targets) wait for the full tier.
    """

    name: str
    make: Callable[[Threat], Attack]
    also: tuple[str, ...] = ()
    threats: tuple[type, ...] = (Linf, L2)
    random: bool = True
    targeted: bool = True
    gain: float = 0.5
    own: bool = True


ATTACKS = [
    Entry("FGSM", FGSM, random=False, own=False),
    Entry("RSFGSM", RSFGSM, own=False),
    Entry("MIFGSM", lambda t: MIFGSM(t, steps=4), random=False, own=False),
    Entry("PGD", lambda t: PGD(t, steps=4)),
    Entry("restarts", lambda t: restarts(PGD(t, steps=2), 2), ("Restarts",)),
    Entry("sequence", lambda t: sequence(FGSM(t), PGD(t, steps=3)), ("Sequence",)),
    Entry(
        "union",
        lambda t: union(FGSM(t), MIFGSM(t, steps=3)),
        ("Union",),
        random=False,
        own=False,
    ),
]

# Public names of jrobust.attacks that are no attacks: the protocol and its parts.
PROTOCOL = {"Attack", "AttackResult", "GradientAttack", "Record", "State", "with_eps"}
