"""AutoAttack: a fixed sequence of attacks without settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Names

from jrobust import losses
from jrobust.attacks._apgd import APGD
from jrobust.attacks._base import Attack
from jrobust.attacks._compose import Sequence, eot, multi_targeted, restarts, sequence
from jrobust.attacks._fab import FAB
from jrobust.attacks._square import Square
from jrobust.threat import L1, Threat

_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


def AutoAttack(
    threat: Threat,
    version: str | Names[str] = "standard",
    *,
    steps: int = 100,
    queries: int = 5000,
    samples: int = 20,
) -> Sequence:
    """The standard evaluation of robustness, without settings (Croce & Hein 2020; L1: 2021).

    A :func:`sequence` whose members have names: ``jrobust.run`` and any loop take it as one attack;
    ``loops.evaluate(..., AutoAttack(threat).stages)`` runs its members as attacks of their own, on
    what stands after the clean pass and each of them, with the same results.

    * ``"standard"``: APGD on cross-entropy; APGD on targeted DLR towards the 9 runner-up classes;
      FAB towards 9; Square. In L1 5 starts of the first and 5 classes for the second.
    * ``"plus"``: 5 starts of APGD on cross-entropy and on DLR; FAB, 1 run from the input and 4
      from random points; Square; targeted APGD and FAB towards 9 classes. Not meant for L1.
    * ``"rand"``: for models that draw (:func:`jrobust.models.randomized`), APGD on cross-entropy
      and on DLR, each step on ``samples`` draws; see :func:`eot`.

    Models of fewer classes: heading for a class ends with the last of them; where DLR lacks the
    logits it divides by, its numerator is ascended (``losses.dlr_or_margin``, below three classes;
    ``losses.dlr_or_margin_targeted``, below four).

    Unlike the released code, results depend neither on the batch nor on its order, and random
    defences are judged by votes.

    Args:
        threat: ``Linf``, ``L2`` or ``L1``.
        version: as above, or the names of members in order, with their settings of "standard":
            "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square".
        steps: of APGD and FAB.
        queries: of Square.
        samples: draws at each step of "rand".

    Raises:
        ValueError: for a version or a member that does not exist, or a member named twice.
    """
    if isinstance(version, str) and version not in _VERSIONS:
        raise ValueError(
            f"AutoAttack comes as {', '.join(_VERSIONS)} or as a list of members, got {version!r}"
        )
    names = _VERSIONS[version] if isinstance(version, str) else tuple(version)
    sparse, plus = isinstance(threat, L1), version == "plus"
    starts = 5 if plus or (sparse and version != "rand") else 1

    def often(attack: Attack) -> Attack:
        return attack if starts == 1 else restarts(attack, starts)

    def fab(random_start: bool) -> Attack:
        return FAB(threat, steps=steps, random_start=random_start, keep="success")

    makers: dict[str, Callable[[], Attack]] = {
        "apgd-ce": lambda: often(APGD(threat, steps=steps)),
        "apgd-dlr": lambda: often(APGD(threat, steps=steps, loss=losses.dlr_or_margin)),
        "apgd-t": lambda: multi_targeted(
            APGD(threat, steps=steps, loss=losses.dlr_or_margin_targeted),
            5 if sparse and not plus else 9,
        ),
        "fab": lambda: restarts(fab(random_start=True), 5),
        "fab-t": lambda: multi_targeted(fab(random_start=False), 9),
        "square": lambda: Square(threat, queries=queries),
    }
    wrong = sorted(set(names) - set(makers))
    if wrong or len(set(names)) < len(names) or not names:
        raise ValueError(
            f"AutoAttack's members are {', '.join(makers)}, each at most once, got {list(names)}"
        )
    members = [makers[name]() for name in names]
    if version == "rand":
        members = [eot(attack, samples) for attack in members]
    return dataclasses.replace(sequence(*members), names=names)
