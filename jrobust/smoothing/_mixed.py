"""Certificates for mixed classifiers: an accurate model of which nothing is known, a robust one.

The mixed classifier answers ``argmax_c (1 - a) g_c(x) + a h_c(x)``, with probabilities g of the
accurate and h of the robust classifier and a weight a in (1/2, 1] (Bai et al. 2024). As
``g_y - g_c >= -1`` whatever g is, it answers y wherever

    h_y - h_c > mu(a) = (1 - a) / a    for all c other than y:                            (*)

a certificate needs a bound on the margin of h alone. mu decreases in a. So (*) at a number a_min
implies that y is the answer for every weight in [a_min, 1], even one that depends on the input and
was chosen by the attacker: an adaptive weight a(x) that never leaves [a_min, 1] has the certificate
of the constant a_min, and none if it has no such bound.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from jrobust._algorithm import algorithm
from jrobust.smoothing._certify import ABSTAIN, Certificate, certify, larger
from jrobust.smoothing._noise import Noise, probabilities

Array = jax.Array


def _ratio(weight: Any) -> np.float64:
    """``mu(a)`` rounded up, of the float32 number that the model mixes with; checks it."""
    a = np.float64(np.float32(weight))
    if np.ndim(weight) != 0 or not 0.5 < a <= 1:
        raise ValueError(
            "weight must be one number in (1/2, 1], the least weight of the robust classifier "
            f"anywhere in the ball, got {weight}: up to 1/2 the accurate one can overrule it"
        )
    return np.nextafter((1 - a) / a, 2.0) if a < 1 else np.float64(0)


def _constant(lipschitz: Any) -> np.float64:
    constant = np.float64(lipschitz)
    if not 0 < constant < np.inf:
        raise ValueError(f"lipschitz must be one positive, finite number, got {lipschitz}")
    return constant


def lipschitz_radius(margin: ArrayLike, lipschitz: Any, weight: Any = 1.0) -> np.ndarray:
    """Radius of a mixed classifier whose robust part has Lipschitz probabilities; rounded down.

    If every ``h_c`` changes by at most ``lipschitz`` times the norm of the change, the margin of h
    changes by at most twice that, and (*) of this module holds within

        (margin - (1 - a) / a) / (2 lipschitz),

    the form ``(a margin + a - 1) / (2 a L)`` of Bai et al. (2024). No radius from these numbers is
    larger: with two classes ``h_c = 1 - h_y`` can fall that fast, and g can be against y.

    Args:
        margin: any shape; lower bounds on ``h_y(x) - max_c h_c(x)`` in [-1, 1]. Of computed
            probabilities take off what they may be wrong by, in float32 some 1e-6.
        lipschitz: L of each probability in the norm of the radius. Of classifiers smoothed with
            Gaussian noise it is ``1 / (sigma sqrt(2 pi))``.
        weight: of the robust classifier, or the least that an adaptive weight may be; at 1 the
            radius is that of h alone.

    Returns:
        float64 of the shape of ``margin``; negative or 0 where nothing is proved.

    Raises:
        ValueError: margins outside [-1, 1], a constant that is not positive, weight outside
            (1/2, 1].
    """
    margin = np.asarray(margin, np.float64)
    if not np.all((margin >= -1) & (margin <= 1)):
        raise ValueError(f"margin is a difference of probabilities, in [-1, 1], got {margin}")
    spare = margin - _ratio(weight) - 2.0**-51
    return np.nextafter(spare / (2 * _constant(lipschitz)), -np.inf)


@algorithm
class Mixed:
    """Noise of the robust part of a mixed classifier: votes as ever, the radius that of the mix.

    Count the votes of the robust classifier's base model under this noise, and :func:`certify`,
    :func:`certify_staged`, :func:`plan` and ``loops.certify`` speak about the mixed classifier
    with the smoothed classifier's exact probabilities ``h_c(x) = P(f(x + noise) = c)`` as its
    robust part, whatever the accurate part is. Its probabilities are bounded from the votes, never
    estimated.

    **The radius.** Let q bound the probability of all answers but y at x, and ``runner`` that of
    each single one. At distance r of x no answer's probability p has moved further than to
    ``z(p) - r / scale``, with the z of the noise. (*) of this module is ``P(not y) + P(c) < 1 -
    mu``. So it holds at distance r if for some u

        z(q) - r / scale >= z(u)    and    z(runner) - r / scale >= z(1 - mu - u),

    and the radius is the largest such r over u, found by bisection. Any u proves its r, so that
    the accuracy of the search is no part of the proof. With one bound, ``runner = q``, it is
    ``scale (z(q) - z(1 - 1 / (2 a)))``; for a Gaussian ``sigma (Phi^-1(p) - Phi^-1(1 / (2 a)))``.
    Where half-spaces attain both bounds and g is against y the answer changes at the radius: from
    these bounds no rule proves more.

    The rule of Bai et al. (2024), ``sigma / 2 (Phi^-1(a p_y) - Phi^-1(a p_c + 1 - a))``, is true
    and smaller: it allows the scaled probabilities a h all of [0, 1] where they have [0, a]. With
    one bound and p to 1 it stops at ``sigma Phi^-1(a)``; this one has no limit. Released code puts
    estimated probabilities in, and twice the Lipschitz constant.

    Args:
        noise: any noise but those of L0.
        weight: a of the robust classifier in (1/2, 1], scalar; of an adaptive weight its least
            value.
        lipschitz: if given, the radius is :func:`lipschitz_radius` for this constant of the
            probabilities h, in the noise's norm, with the same bounds.
    """

    noise: Any
    weight: Array | float
    lipschitz: Array | float | None = None

    @property
    def norm(self) -> str:
        """That of the noise."""
        return self.noise.norm

    def check(self) -> None:
        """Raise ``ValueError`` for bad noise, L0, or a weight or constant that proves nothing."""
        self.noise.check()
        _ratio(self.weight)
        if self.lipschitz is not None:
            _constant(self.lipschitz)
        if self.norm == "L0":
            raise ValueError(
                f"{type(self.noise).__name__} counts locations: the rule for mixed classifiers "
                "is for noises of L1, L2 or Linf"
            )

    def perturb(self, key: Array, x: Array) -> Array:
        """One noisy copy of ``x``."""
        return self.noise.perturb(key, x)

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """See the class; float64, rounded down, and what :meth:`Noise.radius` asks for.

        Args:
            q: upper bound on the probability of all other answers together, in [0, 1], any shape.
            runner: on each single one of them; by default q.
        """
        q, runner = probabilities(q, runner)
        q, runner = np.broadcast_arrays(q, np.minimum(q, runner))
        mu = _ratio(self.weight)
        if self.lipschitz is not None:
            margin = np.nextafter(1 - q - runner, -2.0)
            return lipschitz_radius(np.maximum(margin, -1.0), self.lipschitz, self.weight)
        top, other = self.noise.radius(q), self.noise.radius(runner)

        def reach(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            # -z(u) is z(1 - u), rounded down as well if the complement is rounded up.
            spent = [np.minimum(np.nextafter(p, 2.0), 1.0) for p in (1 - u, mu + u)]
            return top + self.noise.radius(spent[0]), other + self.noise.radius(spent[1])

        low, high = np.full(q.shape, (1 - mu) / 2), np.full(q.shape, 1 - mu)
        with np.errstate(invalid="ignore"):  # of no answer but y ever: infinite, less infinite
            best = np.minimum(*reach(low))
            for _ in range(64 if np.any(runner < q) else 0):
                middle = (low + high) / 2
                first, second = reach(middle)
                best = np.fmax(best, np.minimum(first, second))
                low, high = np.where(first < second, (middle, high), (low, middle))
        return np.where(np.isinf(best), best, np.nextafter(best, -np.inf))[()]


def certify_mixed(
    select_counts: ArrayLike,
    estimate_counts: ArrayLike,
    noise: Noise,
    alpha: float,
    *,
    weight: float,
    lipschitz: float,
    two_bounds: bool = False,
) -> tuple[Certificate, np.ndarray]:
    """The better of both rules for a smoothed robust classifier with a known Lipschitz constant.

    Both are statements about the same bounds, which hold together with probability 1 - alpha: the
    larger costs no alpha. The constant ``1 / (sigma sqrt(2 pi))`` that every classifier under
    Gaussian noise has never wins; a smaller one, of a base model that is smooth itself or draws
    noise of its own, may.

    Args:
        select_counts: as in :func:`certify`, like ``estimate_counts``, ``alpha``, ``two_bounds``.
        noise: as drawn, not yet :class:`Mixed`.
        weight: a, or the least value of an adaptive weight.
        lipschitz: of each smoothed probability, in the noise's norm.

    Returns:
        The certificate, and for each input the rule that gave it: ``"smoothed"``, ``"lipschitz"``
        or ``"none"`` where it abstains.

    Raises:
        TypeError, ValueError: as :func:`certify` and :class:`Mixed`.
    """
    smoothed, bounded = (
        certify(
            select_counts,
            estimate_counts,
            Mixed(noise, weight, constant),
            alpha,
            two_bounds=two_bounds,
        )
        for constant in (None, lipschitz)
    )
    best = larger(smoothed, bounded)
    wins = np.where(bounded.radius > smoothed.radius, "lipschitz", "smoothed")
    return best, np.where(best.prediction == ABSTAIN, "none", wins)
