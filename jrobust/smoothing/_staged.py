"""How certificates follow from counts, whatever the noise, and votes only where they are needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from jrobust import statistics
from jrobust.smoothing._certify import (
    ABSTAIN,
    Certificate,
    ceiling,
    certify,
    check_enough,
    check_top,
    larger,
    proves,
    unanimous,
)
from jrobust.smoothing._dual import (
    Half,
    certify_dual,
    check_enough_of_halves,
    check_halves,
    signed_radius,
)
from jrobust.smoothing._noise import Noise
from jrobust.statistics._binomial import check_probability


@dataclasses.dataclass(frozen=True)
class Rule:
    """Certificates from votes under one noise; the fields are arguments of :func:`certify`.

    ``pairs`` are the samples shown to both models where a fast one votes, else 0. Every method's
    ``alpha`` is all that one certificate may spend.
    """

    noise: Any
    top: int = 1
    two_bounds: bool = False
    anytime: bool = False
    pairs: int = 0

    @property
    def noises(self) -> tuple[Any, ...]:
        """Those under which each sample votes."""
        return (self.noise,)

    @property
    def norm(self) -> str:
        """Norm of the radii."""
        return self.noises[0].norm

    def check(self) -> None:
        """Raise ``ValueError`` for noise and settings that prove nothing."""
        self.noise.check()
        check_top(self.top)
        if self.pairs and self.two_bounds:
            raise ValueError(
                "two_bounds=True and voter= exclude each other: a certificate from another "
                "model's votes has one bound"
            )

    def certify(
        self, select: ArrayLike, counts: ArrayLike, alpha: float, disagreements: Any = None
    ) -> Certificate:
        """See :func:`certify`."""
        return certify(
            select,
            counts,
            self.noise,
            alpha,
            top=self.top,
            two_bounds=self.two_bounds,
            anytime=self.anytime,
            disagreements=disagreements,
        )

    def ceiling(self, n: int, alpha: float) -> float:
        """No certificate from n samples has a larger radius."""
        level = alpha / 2 if self.two_bounds or self.pairs else alpha
        if not self.pairs:
            return ceiling(self.noise, n, level, top=self.top, anytime=self.anytime)
        q = sum(unanimous(m, level, self.anytime) for m in (n, self.pairs))
        q = min(math.nextafter(q, 0.0), 1.0)
        return float(self.noise.radius(q, q / self.top))

    def check_enough(self, n: int, alpha: float) -> None:
        """Raise ``ValueError`` where even n equal votes prove nothing."""
        level = alpha / 2 if self.two_bounds or self.pairs else alpha
        check_enough("n", self.noise, n, level, self.anytime, self.top)
        if self.pairs:
            check_enough("pairs", self.noise, self.pairs, level, self.anytime, self.top)
            if not proves(self.noise, self.ceiling(n, alpha)):
                raise ValueError(
                    f"n = {n} votes and {self.pairs} pairs can never certify anything at alpha = "
                    f"{alpha:g}: even unanimous votes prove nothing; raise both"
                )

    def optimum(self, now: Certificate, counts: np.ndarray, alpha: float) -> np.ndarray:
        """(B,) radii that no number of further votes will pass, at confidence 1 - alpha."""
        q = statistics.clopper_pearson_lower(now.n - now.count, now.n, alpha)
        runner = q / self.top
        if self.two_bounds:
            rivals = counts.copy()
            np.put_along_axis(rivals, now.selected[:, None], 0, axis=1)
            strongest = np.sort(rivals, axis=1)[:, -self.top]
            runner = np.minimum(runner, statistics.clopper_pearson_lower(strongest, now.n, alpha))
        return self.noise.radius(q, runner)

    def least(self, n: int, alpha: float, classes: int) -> int:
        """The fewest of n votes that certify, the others spread evenly over all other answers."""
        agree = np.array([[0] * classes + [self.pairs]]) if self.pairs else None

        def certifies(count: int) -> bool:
            found = self.certify(np.zeros(1, int), self._spread(count, n, classes), alpha, agree)
            return bool(found.prediction[0] == 0)

        low, high = 0, n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if certifies(middle) else (middle, high)
        return high

    def _spread(self, count: int, n: int, classes: int) -> np.ndarray:
        """Counts of one input: ``count`` votes for class 0, the others for all other answers."""
        others, more = divmod(n - count, classes)
        return np.array([[count, *(others + (i < more) for i in range(classes))]])


class DualRule(Rule):
    """Certificates from votes under two halves, whose counts are (B, 2, C + 1)."""

    @property
    def noises(self) -> tuple[Any, ...]:
        return self.noise

    def check(self) -> None:
        check_halves(self.noise)
        if self.top != 1 or self.two_bounds or self.pairs:
            raise ValueError(
                "the rule for two halves is about the most probable answer and has one bound for "
                "each half: top=, two_bounds=True and voter= are not for it"
            )

    def certify(
        self, select: ArrayLike, counts: ArrayLike, alpha: float, disagreements: Any = None
    ) -> Certificate:
        select, (left, right) = np.asarray(select), np.moveaxis(np.asarray(counts), 1, 0)
        chosen = select if select.ndim == 1 else (select[:, 0], select[:, 1])
        return certify_dual(chosen, (left, right), self.noise, alpha, anytime=self.anytime)

    def ceiling(self, n: int, alpha: float) -> float:
        q = unanimous(n, alpha / 2, self.anytime)
        return float(signed_radius(self.noise, (q, q)))

    def check_enough(self, n: int, alpha: float) -> None:
        check_enough_of_halves((n, n), alpha, self.anytime)

    def optimum(self, now: Certificate, counts: np.ndarray, alpha: float) -> np.ndarray:
        n = counts.sum(axis=2)
        count = np.take_along_axis(counts, now.selected[:, None, None], axis=2)[..., 0]
        q = statistics.clopper_pearson_lower(n - count, n, alpha / 2)
        return signed_radius(self.noise, (q[:, 0], q[:, 1]))

    def _spread(self, count: int, n: int, classes: int) -> np.ndarray:
        return np.stack([super()._spread(count, n, classes)] * 2, axis=1)


def is_dual(noise: Any) -> TypeGuard[tuple[Any, ...]]:
    """Whether ``noise`` is a pair of halves, or is meant to be one."""
    return isinstance(noise, (tuple, list))


def rule(noise: Any, **settings: Any) -> Rule:
    """The checked rule for a noise, or for two halves; see :class:`Rule` for the settings."""
    made = DualRule(tuple(noise), **settings) if is_dual(noise) else Rule(noise, **settings)
    made.check()
    return made


def shared(made: Rule, stages: Sequence[int], radius: float | None, alpha: float) -> float:
    """The share of alpha that each stage gets.

    Raises:
        ValueError: for an alpha or stages that are none, a first stage that proves nothing, a
            radius that the last cannot reach.
    """
    alpha = float(check_probability("alpha", alpha))
    whole = all(isinstance(n, (int, np.integer)) for n in stages)
    if not whole or len(stages) < 1 or min(np.diff(stages, prepend=0)) < 1:
        raise ValueError(f"stages must be total votes, increasing and positive, got {stages}")
    share = alpha if made.anytime else alpha / len(stages)
    made.check_enough(int(stages[0]), share)
    reach = made.ceiling(int(stages[-1]), share)
    if radius is not None and not radius <= reach:
        raise ValueError(
            f"{stages[-1]} votes at alpha = {share:g} certify a radius of at most {reach}, "
            f"never {radius}: ask for less or add a stage"
        )
    return share


STAGES = (100, 1_000, 10_000, 100_000)


def certify_staged(
    select_counts: ArrayLike,
    vote: Callable[[np.ndarray, int, int], ArrayLike],
    noise: Noise | tuple[Half, Half],
    alpha: float,
    *,
    stages: Sequence[int] = STAGES,
    radius: float | None = None,
    top: int = 1,
    two_bounds: bool = False,
    anytime: bool = False,
) -> Certificate:
    """CERTIFY with votes only for inputs that still need them.

    After each of the s ``stages`` every input that is open gets a certificate from all of its votes
    so far, and its largest one counts. An input is closed when ``radius`` is certified, or when its
    votes say, at confidence 1 - alpha, that it will not be: giving up needs no proof.

    Proof: think of all votes as drawn in advance. The bound from the first ``stages[i]`` of them is
    at alpha / s, and ``stages`` is fixed, so that with probability at least 1 - alpha all s bounds
    are right (Boole's inequality), whichever of them the procedure gets to see and to report. With
    ``anytime`` one confidence sequence at alpha covers all stages, however many there are. Of two
    halves each stage's share is split once more, by :func:`certify_dual`.

    Args:
        select_counts: as in :func:`certify`; of two halves (B, 2, C + 1), or classes.
        vote: ``vote(rows, start, n)`` counts samples start .. start + n - 1 of the inputs ``rows``,
            an increasing (R,) int array: (R, C + 1), by :func:`count_votes` under the estimation
            key, padded to a fixed number of inputs if it is compiled. Of two halves (R, 2, C + 1),
            n samples of each.
        noise: the noise that was drawn, or the two halves of :func:`certify_dual`.
        alpha: probability that one certificate is false, in (0, 1).
        stages: total votes after each stage, increasing.
        radius: what is asked for. By default as much as the last stage gives: only inputs that will
            never be certified stop early.
        top: as in :func:`certify`, like ``two_bounds`` and ``anytime``.

    Returns:
        The :class:`Certificate`, whose ``count`` and ``n`` are the votes behind it.

    Raises:
        TypeError, ValueError: as :func:`certify`; stages that do not increase, a first stage that
            is too small to certify, a radius that the last stage cannot reach; other numbers of
            votes than were asked for.
    """
    made = rule(noise, top=top, two_bounds=two_bounds, anytime=anytime)
    return staged(made, select_counts, vote, stages, radius, alpha)


def staged(
    made: Rule,
    select_counts: ArrayLike,
    vote: Callable[[np.ndarray, int, int], ArrayLike],
    stages: Sequence[int],
    radius: float | None,
    alpha: float,
) -> Certificate:
    """What :func:`certify_staged` does, by any rule."""
    share = shared(made, stages, radius, alpha)
    best: Certificate | None = None
    counts = np.zeros(0, np.int64)
    rows = np.arange(len(np.asarray(select_counts)))
    before = 0
    for n in stages:
        fresh = np.asarray(vote(rows, before, n - before))
        if fresh.dtype.kind not in "iu" or np.any(fresh < 0) or np.any(fresh.sum(-1) != n - before):
            raise ValueError(
                f"vote must count exactly the {n - before} samples that it is asked for, in "
                f"integers, got {fresh.dtype} of shape {fresh.shape}"
            )
        if best is None:
            counts = np.zeros((len(rows), *fresh.shape[1:]), np.int64)
        counts[rows] += fresh
        # Rows that are closed are certified again from the same votes: to the same certificate.
        now = made.certify(select_counts, counts, share)
        best = now if best is None else larger(best, now)
        before = n
        hopeful = made.optimum(now, counts, alpha) >= (radius or 0.0)
        done = best.radius >= (math.inf if radius is None else radius)
        rows = rows[(hopeful & ~(done & (best.prediction != ABSTAIN)))[rows]]
        if not len(rows):
            break
    assert best is not None
    return dataclasses.replace(best, alpha=alpha)
