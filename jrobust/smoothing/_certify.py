"""CERTIFY and PREDICT of Cohen et al. (2019), from integer counts, in float64 on the host."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jrobust import statistics
from jrobust.smoothing._noise import Noise
from jrobust.statistics._binomial import check_probability

ABSTAIN = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What n votes prove about each input, each statement wrong with probability at most alpha.

    "The smoothed classifier answers ``prediction[i]`` at every point within ``radius[i]`` of input
    i, in ``norm``." It is about the smoothed classifier with the noise that was drawn.
    """

    prediction: np.ndarray
    """(B,) int64: the certified class, or -1 where the procedure abstains."""
    radius: np.ndarray
    """(B,) float64, rounded down, in the units of the input: 0 where it abstains, else > 0."""
    selected: np.ndarray
    """(B,) int64: the class that was tested, whether certified or not."""
    p_lower: np.ndarray
    """(B,) float64: lower confidence bound on the probability of ``selected``."""
    count: np.ndarray
    """(B,) int64: votes for ``selected`` in the estimate."""
    rejects: np.ndarray
    """(B,) int64: non-finite samples in the estimate, counted against ``selected``."""
    n: np.ndarray
    """(B,) int64: samples in the estimate, rejects among them."""
    alpha: float
    """Probability of error of each statement."""
    norm: str
    """Norm of the radius."""

    def _correct(self, y: ArrayLike) -> np.ndarray:
        y = np.asarray(y)
        if y.shape != self.prediction.shape or y.dtype.kind not in "iu" or np.any(y < 0):
            raise ValueError(
                f"y must be true labels >= 0 of shape {self.prediction.shape}, "
                f"got {y.dtype} of shape {y.shape}"
            )
        return self.prediction == y

    def accuracy(self, y: ArrayLike, radii: ArrayLike = 0.0) -> Any:
        """Certified accuracy: the fraction certified as ``y`` with a radius of at least each of
        ``radii``; at 0, correct and not abstained.

        Args:
            y: (B,) true labels.
            radii: any shape, at least 0.

        Returns:
            float64 of the shape of ``radii``.
        """
        radii = np.asarray(radii, np.float64)
        if not np.all(radii >= 0):
            raise ValueError(f"radii must be at least 0, got {radii}")
        return np.mean(self._correct(y) & (self.radius >= radii[..., None]), axis=-1)

    def average_radius(self, y: ArrayLike) -> float:
        """Average certified radius (Zhai et al. 2020): wrong answers and abstentions count 0.

        Comparable only between equal sets of inputs: report the slice with it.
        """
        return float(np.mean(np.where(self._correct(y), self.radius, 0.0)))

    def statement(self, confidence: float = 0.99) -> str:
        """How many of these certificates may be false, in words, for independent noise."""
        images = self.prediction.size
        most = statistics.false_certificates(images, self.alpha, confidence)
        return (
            f"Of {images} certificates at alpha = {self.alpha:g}, at most "
            f"{images * self.alpha:g} are false in expectation, and at most {most} with "
            f"{100 * confidence:g}% confidence."
        )


def ceiling(noise: Noise, n: int, alpha: float) -> float:
    """The largest radius that n samples can certify at alpha: that of n equal votes.

    Not positive when n is too small to certify anything. From the closed form
    ``q = 1 - alpha^(1/n)``, and so a check on the general bound.
    """
    return float(noise.radius(-math.expm1(math.log(alpha) / n)))


def _check_counts(name: str, counts: ArrayLike) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer counts, got dtype {counts.dtype}")
    if counts.ndim != 2 or counts.shape[0] < 1 or counts.shape[1] < 3:
        raise ValueError(
            f"{name} must be (B, C + 1) with B >= 1 and C >= 2, the last column for rejects, "
            f"got shape {counts.shape}"
        )
    counts = counts.astype(np.int64)
    if np.any(counts < 0) or np.any(counts.sum(axis=1) < 1):
        raise ValueError(f"{name} must be non-negative with at least one sample in every row")
    return counts


def certify(
    select_counts: ArrayLike, estimate_counts: ArrayLike, noise: Noise, alpha: float
) -> Certificate:
    """CERTIFY (Cohen et al. 2019, section 3.2.2): a class and a radius for each input, or abstain.

    The class is the most voted of ``select_counts`` (the lowest index on ties, never the
    rejects). Its probability is bounded below at one-sided ``alpha`` by Clopper and Pearson from
    ``estimate_counts``, where rejects are votes against it, and every other answer above by the
    complement. The procedure abstains unless the radius of that bound is positive.

    Args:
        select_counts: (B, C + 1) integer counts of :func:`count_votes`, under the selection key.
        estimate_counts: (B, C + 1) counts of *fresh* samples, under the estimation key.
        noise: the noise that was drawn.
        alpha: probability that one certificate is false, in (0, 1).

    Returns:
        A :class:`Certificate` of float64 and int64 numpy arrays.

    Raises:
        TypeError: counts that are not integer.
        ValueError: counts of different shapes, negative or empty; the same array for both; alpha
            outside (0, 1); bad noise parameters; n too small to certify anything at alpha.
    """
    alpha = float(check_probability("alpha", alpha))
    noise.check()
    if select_counts is estimate_counts:
        raise ValueError(
            "select_counts and estimate_counts are the same array: the bound needs samples that "
            "had no part in selecting the class; count them under stages(key).estimate"
        )
    select = _check_counts("select_counts", select_counts)
    estimate = _check_counts("estimate_counts", estimate_counts)
    if select.shape != estimate.shape:
        raise ValueError(
            f"select_counts and estimate_counts must have one shape, got {select.shape} and "
            f"{estimate.shape}"
        )
    n = estimate.sum(axis=1)
    needed = math.floor(math.log2(1 / alpha)) + 1
    if n.min() < needed:
        raise ValueError(
            f"n = {n.min()} samples can never certify at alpha = {alpha:g}; "
            f"at least n = {needed} are needed"
        )

    selected = select[:, :-1].argmax(axis=1)
    count = np.take_along_axis(estimate, selected[:, None], axis=1)[:, 0]
    radius = noise.radius(statistics.clopper_pearson_upper(n - count, n, alpha))
    certified = radius > 0
    if np.any(radius > ceiling(noise, int(n.max()), alpha)):
        raise AssertionError(
            f"radius {radius.max()} is above the ceiling of n = {n.max()} samples at "
            f"alpha = {alpha:g}: the noise's radius rule is wrong"
        )
    return Certificate(
        prediction=np.where(certified, selected, ABSTAIN),
        radius=np.where(certified, radius, 0.0),
        selected=selected,
        p_lower=statistics.clopper_pearson_lower(count, n, alpha),
        count=count,
        rejects=estimate[:, -1],
        n=n,
        alpha=alpha,
        norm=noise.norm,
    )


def predict(counts: ArrayLike, alpha: float) -> np.ndarray:
    """PREDICT (Cohen et al. 2019, section 3.2.1): the smoothed classifier's answer, or -1.

    Abstains unless an exact two-sided test of the two most frequent answers against 1/2 has a
    p-value of at most alpha. Rejects are an answer like the others that is never returned, so
    that an answer other than the smoothed classifier's has probability at most alpha.

    Args:
        counts: (B, C + 1) integer counts of :func:`count_votes`.
        alpha: probability of a wrong answer, in (0, 1).

    Returns:
        (B,) int64 labels, -1 for abstention.

    Raises:
        TypeError: counts that are not integer.
        ValueError: counts of a wrong shape, negative or empty; alpha outside (0, 1).
    """
    alpha = float(check_probability("alpha", alpha))
    counts = _check_counts("counts", counts)
    order = np.argsort(-counts, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(counts, order, axis=1).T
    sure = statistics.binomial_test(first, first + second) <= alpha
    rejects = counts.shape[1] - 1
    return np.where(sure & (order[:, 0] != rejects), order[:, 0], ABSTAIN)
