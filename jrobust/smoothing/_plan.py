"""What a certification can prove and what it costs, before it is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jrobust import statistics
from jrobust.smoothing._certify import (
    certify,
    certify_staged,
    check_enough,
    proves,
    unanimous,
    upper,
)
from jrobust.smoothing._noise import Noise
from jrobust.statistics._binomial import check_probability


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`plan` says of a run."""

    ceiling: float
    """No certificate can have a larger radius, whatever the model."""
    norm: str
    """Norm of the radius."""
    least: int
    """Votes of n that the top class needs at the last stage to be certified at all."""
    n: int
    """Votes for each input at most, beside those that select."""
    votes: float
    """Votes to expect in all, selection included: at most, without ``p``."""
    seconds: float | None
    """Time of the model to expect; None without ``votes_per_second``."""
    average_radius: float | None
    """Certified radius to expect for inputs like those of ``p``, abstentions counted 0."""
    false: int
    """Certificates that may be false with 99% confidence."""
    images: int
    alpha: float

    def __str__(self) -> str:
        time = "unknown" if self.seconds is None else f"{self.seconds:.3g} s"
        radius = (
            ""
            if self.average_radius is None
            else f"expected average radius {self.average_radius:.4g}; "
        )
        return (
            f"{self.images} images at alpha = {self.alpha:g}: {self.norm} radius at most "
            f"{self.ceiling:.4g}; {radius}{self.least} of {self.n} votes are needed to certify; "
            f"about {self.votes:.4g} votes in all, time {time}; at most {self.false} false "
            "certificates with 99% confidence"
        )


def plan(
    noise: Noise,
    n: int | Sequence[int],
    alpha: float,
    *,
    n0: int = 100,
    images: int = 1,
    radius: float | None = None,
    p: ArrayLike | None = None,
    pairs: int = 0,
    anytime: bool = False,
    votes_per_second: float | None = None,
    pairs_per_second: float | None = None,
) -> Plan:
    """Radius ceiling, votes and time of a certification with one bound.

    Args:
        noise: the noise.
        n: votes that estimate, or the total votes after each stage of :func:`certify_staged`.
        alpha: probability that one certificate is false.
        n0: votes that select.
        images: inputs to certify.
        radius: what the stages stop at.
        p: (M,) guesses of the top class' probability, such as the vote fractions of a pilot run of
            M inputs. With them votes and radius are those of a simulated run (one draw, seed 0).
        pairs: samples that are also shown to the exact model, where a fast one votes.
        anytime: as in :func:`certify`.
        votes_per_second: of the model that votes, as measured.
        pairs_per_second: of both models on the same samples; needed with ``pairs`` for the time.

    Raises:
        ValueError: alpha or p out of range; too few votes or pairs to certify anything; pairs with
            stages.
    """
    alpha = float(check_probability("alpha", alpha))
    noise.check()
    stages = (n,) if isinstance(n, int) else tuple(n)
    if pairs and len(stages) > 1:
        raise ValueError("a certificate from another model's votes has one stage")
    level = (alpha if anytime else alpha / len(stages)) / (2 if pairs else 1)
    last = stages[-1]
    check_enough("n", last, level, anytime)
    missed = 0.0
    if pairs:
        check_enough("pairs", pairs, level, anytime)
        missed = unanimous(pairs, level, anytime)

    def reach(wrong: int) -> np.ndarray:
        """Radius if that many votes go elsewhere, and no pair disagrees."""
        return noise.radius(min(1.0, float(upper(wrong, last, level, anytime)) + missed))

    none, some = -1, last  # wrong votes that certify and that do not
    while some - none > 1:
        middle = (none + some) // 2
        none, some = (middle, some) if proves(noise, reach(middle)) else (none, middle)
    if none < 0:
        raise ValueError(
            f"{last} votes and {pairs} pairs can never certify at alpha = {alpha:g}: raise both"
        )

    votes, average = float(images * (n0 + last)), None
    if p is not None:
        chance = np.asarray(p, np.float64)
        if chance.ndim != 1 or len(chance) < 1 or not np.all((chance >= 0) & (chance <= 1)):
            raise ValueError(f"p must be (M,) probabilities with M >= 1, got {p}")
        rng, cast = np.random.default_rng(0), []

        def vote(rows: np.ndarray, start: int, count: int) -> np.ndarray:
            cast.append(len(rows) * count)
            hits = rng.binomial(count, chance[rows])
            return np.stack([hits, count - hits, 0 * hits], axis=1)

        select = np.zeros(len(chance), np.int64)
        if pairs:
            estimate = vote(np.arange(len(chance)), 0, last)
            agree = np.tile([0, 0, pairs], (len(chance), 1))
            result = certify(select, estimate, noise, alpha, anytime=anytime, disagreements=agree)
        else:
            result = certify_staged(
                select, vote, noise, alpha, stages=stages, radius=radius, anytime=anytime
            )
        votes = images * (n0 + sum(cast) / len(chance))
        average = float(np.mean(result.radius))
    seconds = None if votes_per_second is None else votes / votes_per_second
    if pairs and seconds is not None:
        seconds = None if pairs_per_second is None else seconds + images * pairs / pairs_per_second
    least_q = math.nextafter(unanimous(last, level, anytime) + missed, 0.0)
    return Plan(
        ceiling=float(noise.radius(least_q)),
        norm=noise.norm,
        least=last - none,
        n=last,
        votes=votes,
        seconds=seconds,
        average_radius=average,
        false=int(statistics.false_certificates(images, alpha)),
        images=images,
        alpha=alpha,
    )
