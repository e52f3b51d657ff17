"""Summaries of errors under corruptions and perturbations, in float64 on the host."""

from __future__ import annotations

from typing import Any

import numpy as np


def _table(name: str, values: Any, ndim: int) -> np.ndarray:
    table = np.asarray(values, np.float64)
    if table.ndim != ndim or table.size == 0 or not np.all((table >= 0) & (table <= 1)):
        shape = "(corruptions, severities)" if ndim == 2 else "(corruptions,)"
        raise ValueError(
            f"{name} must be rates in [0, 1] of shape {shape}, not percent; got shape {table.shape}"
        )
    return table


def _ratio(values: np.ndarray, reference: np.ndarray) -> float:
    if not np.all(reference > 0):
        raise ValueError(
            "the reference model has no errors (or none above its clean ones) under some "
            f"corruption, so nothing can be measured in them: {reference}"
        )
    return float(np.mean(values / reference))


def mce(errors: Any, reference_errors: Any) -> float:
    """Mean corruption error: errors summed over severities, relative to a reference model's.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations", 2019, section 4: ``mean_c (sum_s E[c, s] / sum_s E_reference[c, s])``. The
    paper's reference is AlexNet, and its figures are 100 times this.

    Args:
        errors: (corruptions, severities) top-1 error rates in [0, 1].
        reference_errors: the same of the reference model, in the same order.

    Raises ``ValueError`` for shapes that differ, rates outside [0, 1], a reference without errors.
    """
    ours = _table("errors", errors, 2)
    theirs = _table("reference_errors", reference_errors, 2)
    _same(ours, theirs)
    return _ratio(ours.sum(1), theirs.sum(1))


def relative_mce(
    errors: Any, clean_error: float, reference_errors: Any, reference_clean_error: float
) -> float:
    """Relative mean corruption error: :func:`mce` of what each error has above the clean one.

    Same source: ``mean_c (sum_s (E[c, s] - E[clean]) / sum_s (E_reference[c, s] -
    E_reference[clean]))``. Arguments and errors as in :func:`mce`.
    """
    ours = _table("errors", errors, 2)
    theirs = _table("reference_errors", reference_errors, 2)
    _same(ours, theirs)
    for name, clean in (
        ("clean_error", clean_error),
        ("reference_clean_error", reference_clean_error),
    ):
        _table(name, [clean], 1)
    return _ratio((ours - clean_error).sum(1), (theirs - reference_clean_error).sum(1))


def flip_probability(predictions: Any, *, noise: bool = False) -> float:
    """How often the prediction changes within a sequence of perturbed frames.

    Hendrycks and Dietterich 2019, section 4: frame against the frame before it; the frames of
    noise, which have no order, against the first, the clean one.

    Args:
        predictions: (N, T) classes of N sequences of T >= 2 frames.
        noise: whether the frames are independent draws of noise.

    Raises ``ValueError`` for another shape.
    """
    classes = np.asarray(predictions)
    if classes.ndim != 2 or classes.shape[1] < 2 or len(classes) == 0:
        raise ValueError(f"predictions must be (N, T) with T >= 2, got shape {classes.shape}")
    before = classes[:, :1] if noise else classes[:, :-1]
    return float(np.mean(classes[:, 1:] != before))


def flip_rate(probabilities: Any, reference_probabilities: Any) -> float:
    """Mean flip rate: the mean over perturbations of flip probability over the reference's.

    Hendrycks and Dietterich 2019, section 4 (mFR; their reference is AlexNet, their figures are
    100 times this).

    Args:
        probabilities: (perturbations,) from :func:`flip_probability`.
        reference_probabilities: the same of the reference model.

    Raises ``ValueError`` as :func:`mce` does.
    """
    ours = _table("probabilities", probabilities, 1)
    theirs = _table("reference_probabilities", reference_probabilities, 1)
    _same(ours, theirs)
    return _ratio(ours, theirs)


def _same(ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes must agree, got {ours.shape} and reference {theirs.shape}")
