"""Evaluations in the forms in which the field publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jrobust._algorithm import describe
from jrobust.attacks import AutoAttack
from jrobust.data import Dataset
from jrobust.loops._evaluate import EvaluationReport, evaluate
from jrobust.threat import L1, L2, Linf, Threat

_NORMS: dict[str, Any] = {"Linf": Linf, "L2": L2, "L1": L1}


def run_standard_evaluation(
    logits_fn: Any,
    x: Any,
    y: Any,
    *,
    norm: str = "Linf",
    eps: float,
    version: str = "standard",
    bs: int | None = None,
    seed: int = 0,
    **options: Any,
) -> EvaluationReport:
    """AutoAttack on a batch, called as in its released code (Croce & Hein 2020).

    ``loops.evaluate(key, logits_fn, Dataset(x, y), AutoAttack(threat, version).stages)``; the
    adversarial inputs are ``report.x``. Another ``bs`` changes nothing but rounding.

    Args:
        logits_fn: (B, ...) -> (B, C).
        x: (N, ...) float32 in [0, 1], channels last where the model wants them so.
        y: (N,) integer labels.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: radius; there is no default.
        version: as in :func:`jrobust.attacks.AutoAttack`.
        bs: lanes, ``batch_size`` of :func:`evaluate`.
        seed: of the random key.
        **options: of :func:`evaluate`, such as ``directory`` and ``search_fn``.

    Raises:
        ValueError: for a norm that is none of these; as :func:`evaluate`.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    attacks = AutoAttack(_NORMS[norm](eps), version).stages
    data = Dataset(np.asarray(x), np.asarray(y))
    return evaluate(jax.random.key(seed), logits_fn, data, attacks, batch_size=bs, **options)


def robustbench_entry(report: EvaluationReport, threat: Threat, **about: Any) -> dict[str, Any]:
    """An evaluation as RobustBench keeps one for each model, to be written as JSON.

    Args:
        report: of ``AutoAttack(threat).stages`` in its standard version and full length: the field
            ``autoattack_acc`` means that and nothing else.
        threat: the threat model.
        **about: other fields of the entry: ``link``, ``name``, ``authors``, ``additional_data``,
            ``number_forward_passes``, ``dataset``, ``venue``, ``architecture``, ``reported``,
            ``footnote``.

    Returns:
        The fields by name, None for those to fill in; as there, accuracies are strings of
        percentages, ``eps`` is one such as ``"8/255"`` or ``"0.5"``, ``footnote`` is left out where
        there is none, and ``unreliable`` says whether there are doubts.

    Raises:
        ValueError: if something else was run, the evaluation has doubts that no ``footnote``
            tells of, or a field is unknown.
    """
    fields = (
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
        "architecture", "reported",
    )  # fmt: skip
    wrong = sorted(set(about) - {*fields, "footnote"})
    if wrong:
        raise ValueError(
            f"what an entry can be told is {', '.join(fields)} and footnote; got {', '.join(wrong)}"
        )
    ran, standard = report.configuration["attacks"], describe(AutoAttack(threat).stages)
    if ran != standard:
        raise ValueError(
            "autoattack_acc stands for AutoAttack(threat).stages of this threat, in its standard "
            f"version and at full length; the evaluation ran {ran}"
        )
    if report.doubts and not about.get("footnote"):
        kinds = ", ".join(doubt.kind for doubt in report.doubts)
        raise ValueError(f"the evaluation is in doubt ({kinds}): say so in footnote=")
    found = {
        "eps": _radius(float(threat.eps)),
        "clean_acc": f"{100 * report.clean_accuracy:.2f}",
        "autoattack_acc": f"{100 * report.robust_accuracy:.2f}",
        "unreliable": bool(report.doubts),
    }
    return {**dict.fromkeys(fields), **about, **found}


def _radius(eps: float) -> str:
    """``eps`` as a decimal, or, where that is long, as whole levels of 255."""
    text, levels = f"{eps:g}", round(255 * eps)
    return f"{levels}/255" if len(text) > 5 and abs(255 * eps - levels) < 1e-4 else text


def leaderboard_row(entry: Mapping[str, Any]) -> str:
    """An entry of :func:`robustbench_entry` as a row of the leaderboard's table, in Markdown.

    Columns: method, standard accuracy, robust accuracy, extra data, architecture, venue.
    """
    method = entry["name"] or ""
    if entry["link"]:
        method = f"[{method}]({entry['link']})"
    if entry.get("footnote"):
        method += f"<br>{entry['footnote']}"
    extra = {True: "yes", False: "no", None: ""}[entry["additional_data"]]
    accuracies = (f"{entry[field]}%" for field in ("clean_acc", "autoattack_acc"))
    cells = (method, *accuracies, extra, entry["architecture"] or "", entry["venue"] or "")
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
