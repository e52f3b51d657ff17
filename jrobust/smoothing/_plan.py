"""What a certification can prove and what it costs, before it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jrobust import statistics
from jrobust.smoothing._certify import Certificate, check_top
from jrobust.smoothing._dual import Half
from jrobust.smoothing._noise import Noise
from jrobust.smoothing._staged import Rule, rule, shared, staged


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
    """Votes for each input at most, beside those that select; of two halves, for each of them."""
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
    noise: Noise | tuple[Half, Half],
    n: int | Sequence[int],
    alpha: float,
    *,
    n0: int = 100,
    images: int = 1,
    radius: float | None = None,
    p: ArrayLike | None = None,
    top: int = 1,
    two_bounds: bool = False,
    pairs: int = 0,
    anytime: bool = False,
    classes: int | None = None,
    votes_per_second: float | None = None,
    pairs_per_second: float | None = None,
) -> Plan:
    """Radius ceiling, votes and time of a certification.

    Args:
        noise: the noise, or the two halves of :func:`certify_dual`, each of which gets n votes.
        n: votes that estimate, or the total votes after each stage of :func:`certify_staged`.
        alpha: probability that one certificate is false.
        n0: votes that select.
        images: inputs to certify.
        radius: what the stages stop at.
        p: guesses of the answers' probabilities, such as the vote fractions of a pilot run of M
            inputs: (M, C + 1), rejects last, in any order of the classes; of two halves
            (M, 2, C + 1). Or those of the top class alone, (M,) or (M, 2), all others then one
            rival's. With them votes and radius are those of a simulated run (one draw, seed 0).
        top: as in :func:`certify`, like ``two_bounds`` and ``anytime``.
        pairs: samples that are also shown to the exact model, where a fast one votes.
        classes: C, where the votes that are needed depend on it: with ``two_bounds``. By default
            what ``p`` shows, else the fewest that there can be, where most are needed.
        votes_per_second: of the model that votes, as measured.
        pairs_per_second: of both models on the same samples; needed with ``pairs`` for the time.

    Raises:
        ValueError: alpha, p or counts out of range; too few votes or pairs to certify anything;
            pairs with stages or two bounds.
    """
    stages = tuple(n) if isinstance(n, Sequence) else (n,)
    made = rule(noise, top=top, two_bounds=two_bounds, anytime=anytime, pairs=pairs)
    if pairs and len(stages) > 1:
        raise ValueError("a certificate from another model's votes has one stage")
    for name, value, least in (("images", images, 1), ("n0", n0, 0), ("pairs", pairs, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, rate in (("votes", votes_per_second), ("pairs", pairs_per_second)):
        if rate is not None and not rate > 0:
            raise ValueError(f"{name}_per_second must be positive, got {rate}")
    share = shared(made, stages, radius, alpha)
    last, halves = int(stages[-1]), len(made.noises)
    chance = None if p is None else _answers(np.asarray(p, np.float64), halves, top)
    if classes is None:
        classes = top + 1 if chance is None else chance.shape[-1] - 1
    check_top(top, classes)

    votes, average = float(images * halves * (n0 + last)), None
    if chance is not None:
        result, cast = _simulated(made, chance, stages, radius, alpha)
        votes = images * (halves * n0 + cast / len(chance))
        average = float(np.mean(result.radius))
    seconds = None if votes_per_second is None else votes / votes_per_second
    if pairs and seconds is not None:
        seconds = None if pairs_per_second is None else seconds + images * pairs / pairs_per_second
    return Plan(
        ceiling=made.ceiling(last, share),
        norm=made.norm,
        least=made.least(last, share, classes),
        n=last,
        votes=votes,
        seconds=seconds,
        average_radius=average,
        false=int(statistics.false_certificates(images, alpha)),
        images=images,
        alpha=float(alpha),
    )


def _answers(p: np.ndarray, halves: int, top: int) -> np.ndarray:
    """Probabilities of all answers, (M, C + 1) or (M, 2, C + 1); those of the top class first."""
    shape = p.shape[:1] if halves == 1 else (*p.shape[:1], halves)
    if p.ndim and p.shape == shape and np.all((p >= 0) & (p <= 1)):
        none = np.zeros_like(p)
        p = np.stack([p, 1 - p, *[none] * max(1, top)], axis=-1)
    whole = p.ndim == len(shape) + 1 and p.shape[:-1] == shape and p.shape[-1] >= 3
    if p.size < 1 or not whole or not np.all(p >= 0) or not np.allclose(p.sum(-1), 1, atol=1e-6):
        raise ValueError(
            f"p must be probabilities of the top class, of shape {shape} with M >= 1, or of all C "
            f"classes and rejects, {(*shape, 'C + 1')}, got shape {p.shape}"
        )
    return p / p.sum(-1, keepdims=True)


def _simulated(
    made: Rule,
    chance: np.ndarray,
    stages: Sequence[int],
    radius: float | None,
    alpha: float,
) -> tuple[Certificate, int]:
    """Certificates of a simulated run, and the votes it cast beside those that select."""
    rng, cast = np.random.default_rng(0), []

    def vote(rows: np.ndarray, start: int, count: int) -> np.ndarray:
        drawn = rng.multinomial(count, chance[rows])
        cast.append(int(drawn.sum()))
        return drawn

    answers = chance.shape[-1] - 1
    select = chance[..., :answers].reshape(len(chance), -1, answers).sum(axis=1).argmax(axis=1)
    if made.pairs:
        agree = np.zeros((len(chance), answers + 1), np.int64)
        agree[:, -1] = made.pairs
        votes = vote(np.arange(len(chance)), 0, int(stages[-1]))
        return made.certify(select, votes, alpha, agree), sum(cast)
    return staged(made, select, vote, stages, radius, alpha), sum(cast)
