"""CERTIFY and PREDICT of Cohen et al. (2019), from integer counts, in float64 on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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
    i, in ``norm``"; with ``top = k`` above 1, "has it among its k most probable answers". It is
    about the smoothed classifier with the noise that was drawn, of the model that certifies.
    """

    prediction: np.ndarray
    """(B,) int64: the certified class, or -1 where the procedure abstains."""
    radius: np.ndarray
    """(B,) float64, rounded down, in the units of the input: 0 where it abstains, else > 0. In L0
    it counts locations, and may be 0 for an answer that is proved at the input itself."""
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
    top: int = 1
    """What is proved of ``prediction`` is that it stays among the ``top`` most probable answers."""

    def _correct(self, y: ArrayLike) -> np.ndarray:
        y = np.asarray(y)
        if y.shape != self.prediction.shape or y.dtype.kind not in "iu" or np.any(y < 0):
            raise ValueError(
                f"y must be true labels >= 0 of shape {self.prediction.shape}, "
                f"got {y.dtype} of shape {y.shape}"
            )
        return self.prediction == y

    def accuracy(
        self, y: ArrayLike, radii: ArrayLike = 0.0, confidence: float | None = None
    ) -> Any:
        """Certified accuracy: the fraction certified as ``y`` with a radius of at least each of
        ``radii``; at 0, correct and not abstained.

        Args:
            y: (B,) true labels.
            radii: any shape, at least 0.
            confidence: if given, the certificates that may be false with this confidence (see
                :meth:`statement`) are taken off: at least this fraction of these very inputs is
                robustly correct, for noise that is independent between inputs.

        Returns:
            float64 of the shape of ``radii``.
        """
        radii = np.asarray(radii, np.float64)
        if not np.all(radii >= 0):
            raise ValueError(f"radii must be at least 0, got {radii}")
        accuracy = np.mean(self._correct(y) & (self.radius >= radii[..., None]), axis=-1)
        if confidence is None:
            return accuracy
        images = self.prediction.size
        false = statistics.false_certificates(images, self.alpha, confidence)
        return np.maximum(accuracy - false / images, 0.0)

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


def unanimous(n: int, alpha: float, anytime: bool) -> float:
    """Upper bound on the probability of what n votes never showed, in closed form."""
    return -math.expm1((math.log(alpha) - (math.log(n + 1) if anytime else 0.0)) / n)


def ceiling(
    noise: Noise,
    n: int,
    alpha: float,
    *,
    top: int = 1,
    two_bounds: bool = False,
    anytime: bool = False,
) -> float:
    """The largest radius that n samples can certify at alpha: that of n equal votes.

    Negative when n is too small to certify anything. From the closed form
    ``q = 1 - alpha^(1/n)``, at half of alpha with ``two_bounds``, and so a check on the general
    bound. Of a certificate that splits alpha otherwise (a voter, s stages) it is the ceiling at
    what the top class gets: alpha / 2, or alpha / s. Arguments are those of :func:`certify`.

    Raises:
        ValueError: n or top below 1, alpha outside (0, 1), bad noise parameters.
    """
    alpha = float(check_probability("alpha", alpha))
    noise.check()
    if n < 1 or top < 1:
        raise ValueError(f"n and top must be at least 1, got n = {n} and top = {top}")
    # Of what has no votes each other answer's own bound, at a part of alpha / 2, is no lower.
    q = unanimous(n, alpha / 2 if two_bounds else alpha, anytime)
    return float(noise.radius(q, q / top))


def smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest n >= 1 that is enough, as are all above it; None where 2^31 is not."""
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > 2**31:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def samples_for(
    noise: Noise,
    radius: float,
    alpha: float,
    *,
    top: int = 1,
    two_bounds: bool = False,
    anytime: bool = False,
) -> int:
    """The smallest n whose :func:`ceiling` reaches ``radius``.

    Raises:
        ValueError: if 2^31 samples do not reach it; a radius that is negative or not finite.
    """
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be at least 0 and finite, got {radius}")

    def enough(n: int) -> bool:
        reach = ceiling(noise, n, alpha, top=top, two_bounds=two_bounds, anytime=anytime)
        return reach >= radius

    found = smallest(enough)
    if found is None:
        raise ValueError(
            f"no number of samples below 2^31 certifies a radius of {radius} with {noise}"
        )
    return found


def check_top(top: Any, classes: int | None = None) -> None:
    """Raise ``ValueError`` unless to be among the ``top`` of the classes says anything."""
    whole = isinstance(top, (int, np.integer)) and not isinstance(top, bool)
    if not whole or top < 1 or (classes is not None and top >= classes):
        most = "a positive int" if classes is None else f"in 1 .. {classes - 1}"
        of = "" if classes is None else f" for {classes} classes"
        raise ValueError(f"top must be {most}{of}, got {top!r}")


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


def _select(select: Any, shape: tuple[int, ...]) -> np.ndarray:
    """(B,) int64: the classes to test, from counts or given."""
    if np.ndim(select) == 1:
        classes = np.asarray(select)
        if classes.shape != shape[:1] or classes.dtype.kind not in "iu":
            raise ValueError(
                f"classes to test must be integers of shape {shape[:1]}, got {classes.dtype} of "
                f"shape {classes.shape}"
            )
        if np.any((classes < 0) | (classes >= shape[1] - 1)):
            raise ValueError(f"classes to test must lie in 0 .. {shape[1] - 2}, got {classes}")
        return classes.astype(np.int64)
    counts = _check_counts("select_counts", select)
    if counts.shape != shape:
        raise ValueError(
            f"select_counts and estimate_counts must have one shape, got {counts.shape} and {shape}"
        )
    return counts[:, :-1].argmax(axis=1)


def lower(k: Any, n: Any, alpha: float, anytime: bool) -> Any:
    """Lower confidence bound on the probability of what came up k times of n."""
    if anytime:
        return statistics.confidence_sequence(k, n, alpha)[0]
    return statistics.clopper_pearson_lower(k, n, alpha)


def upper(k: Any, n: Any, alpha: float, anytime: bool) -> Any:
    """Upper confidence bound on the probability of what came up k times of n."""
    if anytime:
        return statistics.confidence_sequence(k, n, alpha)[1]
    return statistics.clopper_pearson_upper(k, n, alpha)


def certify(
    select_counts: ArrayLike,
    estimate_counts: ArrayLike,
    noise: Noise,
    alpha: float,
    *,
    top: int = 1,
    two_bounds: bool = False,
    anytime: bool = False,
    disagreements: ArrayLike | None = None,
) -> Certificate:
    """CERTIFY (Cohen et al. 2019, section 3.2.2): a class and a radius for each input, or abstain.

    The class is the most voted of ``select_counts`` (the lowest index on ties, never the
    rejects). Its probability is bounded below at one-sided ``alpha`` by Clopper and Pearson from
    ``estimate_counts``, where rejects are votes against it, and every other answer above by the
    complement. The procedure abstains unless the radius of that bound is positive (in L0: unless
    the class is proved at the input itself).

    ``two_bounds``: the top class is bounded at alpha / 2 and each of the C other answers (the other
    classes, and the rejects) at alpha / (2 C), all of them, because the runner-up is chosen by the
    same votes. The radius is that of both bounds, which can be positive where no answer has a
    majority. It has to be chosen before the counts are seen.

    ``top`` = k: the class is proved to stay among the k most probable answers (Jia et al. 2020).
    The k-th most probable other answer has at most 1 / k of the probability of all others, or,
    with ``two_bounds``, the k-th largest of their bounds if that is less.

    ``anytime``: the bounds hold for all sample sizes at once
    (:func:`jrobust.statistics.confidence_sequence`), so that n may have been chosen by looking at
    the counts. Else n must have been fixed before, or see :func:`certify_staged`.

    ``disagreements``: the votes were cast by a fast model h, and the certificate is about the exact
    model f. For the selected class c, which is fixed when these samples are drawn,

        P(f != c) <= P(h != c) + P(h = c, f != c),

    because f != c means h != c, or h = c and f != c. Both terms are probabilities under the noise
    at the input. The first is bounded at alpha / 2 from the votes of h, the second at alpha / 2
    from column c of ``disagreements``. With probability at least 1 - alpha both bounds hold
    (Boole's inequality, so that the pairs may be a part of the samples that voted), and then their
    sum bounds P(f != c). The radius is that of the sum, for f, with nothing assumed about h but
    that it is one function: the pairs need the votes of the very model that voted, rounded as it
    was, with batches and ``chunk`` of the same shape. The second bound is at least
    ``1 - (alpha / 2)^(1/m)`` for m pairs, which limits the radius.

    Args:
        select_counts: (B, C + 1) integer counts of :func:`count_votes`, under the selection key;
            or (B,) integer classes that were fixed without a look at the estimate, such as labels.
        estimate_counts: (B, C + 1) counts of *fresh* samples, under the estimation key.
        noise: the noise that was drawn.
        alpha: probability that one certificate is false, in (0, 1).
        top: k of a top-k certificate, in 1 .. C - 1.
        two_bounds: bound every answer.
        anytime: the number of samples was not fixed beforehand.
        disagreements: (B, C + 1) counts of :func:`count_disagreements`.

    Returns:
        A :class:`Certificate` of float64 and int64 numpy arrays.

    Raises:
        TypeError: counts that are not integer.
        ValueError: counts of different shapes, negative or empty; the same array for both; alpha
            outside (0, 1); bad noise parameters; n too small to certify anything at alpha; top out
            of range; ``disagreements`` together with ``two_bounds``, or fewer pairs than can
            certify.
    """
    alpha = float(check_probability("alpha", alpha))
    noise.check()
    if select_counts is estimate_counts:
        raise ValueError(
            "select_counts and estimate_counts are the same array: the bound needs samples that "
            "had no part in selecting the class; count them under stages(key).estimate"
        )
    estimate = _check_counts("estimate_counts", estimate_counts)
    selected = _select(select_counts, estimate.shape)
    others = estimate.shape[1] - 1  # answers other than the top class
    check_top(top, others)
    if two_bounds and disagreements is not None:
        raise ValueError("a certificate from another model's votes has one bound, not two")
    n = estimate.sum(axis=1)
    level = alpha / 2 if two_bounds or disagreements is not None else alpha
    check_enough("n", noise, int(n.min()), level, anytime, top)

    column = selected[:, None]
    count = np.take_along_axis(estimate, column, axis=1)[:, 0]
    q = upper(n - count, n, level, anytime)
    p_lower = lower(count, n, level, anytime)
    if disagreements is not None:
        pairs = _check_counts("disagreements", disagreements)
        if pairs.shape != estimate.shape:
            raise ValueError(
                f"disagreements and estimate_counts must have one shape, got {pairs.shape} and "
                f"{estimate.shape}"
            )
        m = pairs.sum(axis=1)
        check_enough("disagreements of", noise, int(m.min()), level, anytime, top)
        wrong = upper(np.take_along_axis(pairs, column, axis=1)[:, 0], m, level, anytime)
        # Outward: both operations round.
        q = np.minimum(np.nextafter(q + wrong, 2.0), 1.0)
        p_lower = np.maximum(np.nextafter(p_lower - wrong, -1.0), 0.0)
    runner = np.nextafter(q / top, 2.0) if top > 1 else q
    if two_bounds:
        bounds = upper(estimate, n[:, None], level / others, anytime)
        np.put_along_axis(bounds, column, 0.0, axis=1)
        runner = np.minimum(runner, np.sort(bounds, axis=1)[:, -top])

    radius = noise.radius(q, runner)
    certified = proves(noise, radius)
    if np.any(radius > ceiling(noise, int(n.max()), level, top=top, anytime=anytime)):
        raise AssertionError(
            f"radius {radius.max()} is above the ceiling of n = {n.max()} samples at "
            f"alpha = {level:g}: the noise's radius rule is wrong"
        )
    return Certificate(
        prediction=np.where(certified, selected, ABSTAIN),
        radius=np.where(certified, radius, 0.0),
        selected=selected,
        p_lower=p_lower,
        count=count,
        rejects=estimate[:, -1],
        n=n,
        alpha=alpha,
        norm=noise.norm,
        top=top,
    )


def proves(noise: Noise, radius: Any) -> Any:
    """Whether a radius is a certificate; that of no location, in L0, is one of the input itself."""
    return (radius >= 0) if noise.norm == "L0" else (radius > 0)


def check_enough(
    name: str, noise: Noise, n: int, alpha: float, anytime: bool, top: int = 1
) -> None:
    """Raise ``ValueError`` unless n equal votes prove something with this noise."""

    def enough(n: int) -> bool:
        return bool(proves(noise, ceiling(noise, n, alpha, top=top, anytime=anytime)))

    if enough(n):
        return
    needed = smallest(enough)
    raise ValueError(
        f"{name} = {n} samples can never certify at alpha = {alpha:g}; "
        f"at least n = {needed} are needed"
    )


def larger(first: Certificate, second: Certificate) -> Certificate:
    """Row by row the certificate of larger radius; the second where they are equal."""
    better = (first.prediction >= 0) & (
        (first.radius > second.radius) | (second.prediction == ABSTAIN)
    )
    fields = {
        name: np.where(better, value, getattr(second, name))
        for name, value in vars(first).items()
        if np.ndim(value)
    }
    return dataclasses.replace(second, **fields)


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
        ValueError: counts of a wrong shape, negative or empty; alpha outside (0, 1); so few votes
            that it would always abstain (below 11 at alpha = 0.001).
    """
    alpha = float(check_probability("alpha", alpha))
    counts = _check_counts("counts", counts)
    n = int(counts.sum(axis=1).min())
    needed = math.ceil(1 - math.log2(alpha))
    if n < needed:
        raise ValueError(
            f"n = {n} votes always abstain at alpha = {alpha:g}; at least n = {needed} are needed"
        )
    order = np.argsort(-counts, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(counts, order, axis=1).T
    sure = statistics.binomial_test(first, first + second) <= alpha
    rejects = counts.shape[1] - 1
    return np.where(sure & (order[:, 0] != rejects), order[:, 0], ABSTAIN)
