"""Dual randomized smoothing (Xia et al. 2024): two halves of an image, each with its own noise."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jrobust._algorithm import algorithm, static
from jrobust.smoothing._certify import (
    ABSTAIN,
    Certificate,
    _check_counts,
    _select,
    lower,
    smallest,
    unanimous,
    upper,
)
from jrobust.smoothing._discrete import DiscreteGaussian
from jrobust.smoothing._noise import Gaussian
from jrobust.statistics._binomial import check_probability

Array = jax.Array

_FILLS = ("max", "mean")


def checkerboard(height: int, width: int) -> np.ndarray:
    """(height, width) bool: the pixels whose row and column add up to an even number."""
    return np.indices((height, width)).sum(axis=0) % 2 == 0


@algorithm
class Half:
    """The pixels of ``mask`` under noise, the others filled in from these: a noise like any other.

    A missing pixel gets the largest (or the mean) noisy value of the pixels of ``mask`` in its
    block of 2x2, channel by channel, and 0 where the block has none. The fill is computed from the
    noisy pixels alone, so that it is a part of the model: with f' the model behind the fill, this
    is f' under ``noise``, and has its radius. Nothing of the missing pixels reaches the model.

    Released code of Xia et al. adds the pooled values to the pixels that were kept, and leaves the
    missing ones 0.

    Args:
        noise: what is drawn, for the whole image, such as :class:`Gaussian`.
        mask: (H, W) bool, the pixels that are kept.
        fill: ``"max"`` or ``"mean"``. Under noise the maximum is biased upwards.
    """

    noise: Any
    mask: Array
    fill: str = static(default="max")

    @property
    def norm(self) -> str:
        """That of the noise."""
        return self.noise.norm

    def check(self) -> None:
        """Raise ``ValueError`` for bad noise, a mask that keeps no pixel or all, unknown fills."""
        self.noise.check()
        mask = np.asarray(self.mask)
        if mask.ndim != 2 or mask.dtype != bool or mask.all() or not mask.any():
            raise ValueError(
                "mask must be (H, W) booleans that keep some of the pixels and not all, got "
                f"{mask.dtype} of shape {mask.shape} with {np.count_nonzero(mask)} kept"
            )
        if self.fill not in _FILLS:
            raise ValueError(f"fill must be one of {', '.join(_FILLS)}, got {self.fill!r}")

    def perturb(self, key: Array, x: Array) -> Array:
        """One noisy copy of one image (H, W, channels), filled: float32 of the same shape.

        Both halves of one noise may share a key: they keep disjoint pixels of the same draw.
        """
        if x.ndim != 3 or x.shape[:2] != self.mask.shape:
            raise ValueError(
                f"an image must be (H, W, channels) with the H, W of its mask, {self.mask.shape}, "
                f"got {x.shape}"
            )
        kept = jnp.broadcast_to(jnp.asarray(self.mask, bool)[..., None], x.shape)
        noisy = self.noise.perturb(key, x)
        return jnp.where(kept, noisy, _filled(noisy, kept, self.fill))

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """The noise's own: that of a classifier which sees this half alone."""
        return self.noise.radius(q, runner)


def _filled(noisy: Array, kept: Array, fill: str) -> Array:
    """What each pixel's block of 2x2 says, from the pixels ``kept``; both (H, W, channels)."""
    height, width, channels = noisy.shape
    even = ((0, height % 2), (0, width % 2), (0, 0))

    def blocks(values: Array) -> Array:
        padded = jnp.pad(values, even)
        return padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, channels)

    values, there = blocks(noisy), blocks(kept)
    count = there.sum(axis=(1, 3))
    if fill == "max":
        said = jnp.where(there, values, -jnp.inf).max(axis=(1, 3))
    else:
        said = jnp.where(there, values, 0.0).sum(axis=(1, 3)) / jnp.maximum(count, 1)
    said = jnp.where(count > 0, said, 0.0)
    return jnp.repeat(jnp.repeat(said, 2, axis=0), 2, axis=1)[:height, :width]


def halves(noise: Any, mask: ArrayLike, fill: str = "max") -> tuple[Half, Half]:
    """The pixels of ``mask`` and all others, both under ``noise``; see :class:`Half`.

    For different sigmas make them yourself: ``Half(Gaussian(s), mask), Half(Gaussian(t), ~mask)``.
    """
    mask = np.asarray(mask)
    return Half(noise, mask, fill), Half(noise, ~mask, fill)  # type: ignore[arg-type]


def _sigma(half: Half) -> float:
    """The standard deviation that was really drawn with."""
    sigma = half.noise.sigma
    return float(sigma if isinstance(half.noise, DiscreteGaussian) else np.float32(sigma))


def signed_radius(pair: tuple[Half, Half], q: tuple[Any, Any]) -> np.ndarray:
    """The signed rule, rounded down, from an upper bound for each half."""
    sigma = [_sigma(half) for half in pair]
    z = [np.asarray(half.radius(bound)) / s for half, bound, s in zip(pair, q, sigma)]
    # z was rounded down already: what is taken off covers the few operations on it here.
    with np.errstate(invalid="ignore"):  # of what one half never or always saw: infinite
        total = z[0] + z[1]
        low = total - 1e-14 * (1 + np.abs(z[0]) + np.abs(z[1]))
    low = np.where(np.isinf(total), total, np.where(np.isnan(total), -np.inf, low))
    return low * (sigma[0] * sigma[1] / math.hypot(*sigma))


def check_halves(pair: Any) -> tuple[Half, Half]:
    """The pair; raises unless it is one that the rule is proved for."""
    if len(pair) != 2 or not all(isinstance(half, Half) for half in pair):
        raise TypeError(f"halves must be two Half, as halves(noise, mask) makes them, got {pair!r}")
    for half in pair:
        if not isinstance(half.noise, (Gaussian, DiscreteGaussian)):
            raise ValueError(
                "the rule for two halves is proved for Gaussian and DiscreteGaussian noise, got "
                f"{type(half.noise).__name__}"
            )
        half.check()
    left, right = (np.asarray(half.mask) for half in pair)
    if left.shape != right.shape or np.any(left & right):
        raise ValueError(
            "the halves must not share a pixel: a change of it would count once and move both; "
            f"got masks of shapes {left.shape} and {right.shape}"
        )
    return pair


def check_enough_of_halves(n: tuple[int, int], alpha: float, anytime: bool) -> None:
    """Raise ``ValueError`` unless equal votes of so many samples prove that the class wins."""

    def enough(*samples: int) -> bool:
        return sum(unanimous(m, alpha / 2, anytime) for m in samples) < 1

    if not enough(*n):
        raise ValueError(
            f"n = {n[0]} and {n[1]} samples can never certify at alpha = {alpha:g}: each half gets "
            f"alpha / 2, and {smallest(lambda m: enough(m, m))} in each are needed"
        )


def certify_dual(
    select: tuple[ArrayLike, ArrayLike] | ArrayLike,
    estimate: tuple[ArrayLike, ArrayLike],
    halves: tuple[Half, Half],
    alpha: float,
    *,
    anytime: bool = False,
) -> Certificate:
    """A class and an L2 radius for the classifier that adds the votes of two halves, or abstain.

    Each half has a classifier of its own, f_l and f_r. The dual classifier answers
    ``argmax_c P(f_l = c) + P(f_r = c)``. The class A is selected by the sum of the ``select``
    votes; in each half the probability of anything else is then bounded at alpha / 2 by Clopper and
    Pearson, and with probability at least 1 - alpha both bounds hold (Boole's inequality, so that
    the halves need not be independent).

    **The signed rule.** Let ``q_l, q_r`` be these bounds and ``z = -Phi^-1(q)``, which is negative
    for a half that does not see a majority for A. Then A is the answer within

        R = (z_l + z_r) / sqrt(1 / sigma_l^2 + 1 / sigma_r^2)

    of x, that is ``sigma (z_l + z_r) / sqrt(2)`` for one sigma.

    Proof. Every rival's sum is at most ``2 - P(f_l = A) - P(f_r = A)``, so A wins where its own is
    above 1. A change that moves the pixels of the halves by ``a`` and ``b`` in L2 leaves
    ``P(f_l = A) >= Phi(z_l - a / sigma_l)`` and likewise right (Neyman and Pearson's lemma for
    Gaussians, in the pixels that the half sees). ``Phi(u) + Phi(v) > 1`` if and only if
    ``u + v > 0``, as ``1 - Phi(v) = Phi(-v)``. So A wins while ``a / sigma_l + b / sigma_r <
    z_l + z_r``, and by Cauchy and Schwarz the left side is at most ``sqrt(a^2 + b^2) sqrt(1 /
    sigma_l^2 + 1 / sigma_r^2)``. All steps are equalities for two classes and half-spaces: with
    these bounds alone no rule proves more.

    ``sqrt(R_l^2 + R_r^2)`` and ``(max(R_l, 0) + max(R_r, 0)) / sqrt(2)``, with ``R = sigma z`` of
    each half, which released code uses, are larger and false.

    Args:
        select: (B, C + 1) integer counts of each half, by :func:`count_votes` with that half as the
            noise, under the selection key; equally many samples on both sides. Or (B,) integer
            classes that were fixed without a look at the estimate.
        estimate: counts of fresh samples, likewise; the numbers of samples may differ.
        halves: what was drawn, in the same order; their masks share no pixel.
        alpha: probability that one certificate is false, in (0, 1).
        anytime: bounds that hold for all numbers of samples at once, as in :func:`certify`.

    Returns:
        A :class:`Certificate`. ``count``, ``n`` and ``rejects`` are sums over the halves, and
        ``p_lower`` is the mean of the two lower bounds: what A gets from a half chosen at random.

    Raises:
        TypeError: counts that are not integer, or halves that are not :class:`Half`.
        ValueError: counts of different shapes, negative or empty; counts that were used twice;
            alpha outside (0, 1); other noise than Gaussian; halves that share pixels; so few
            samples that it would always abstain.
    """
    alpha = float(check_probability("alpha", alpha))
    pair = check_halves(halves)
    left, right = (_check_counts("estimate", counts) for counts in estimate)
    if left.shape != right.shape:
        raise ValueError(f"both estimates must have one shape, got {left.shape} and {right.shape}")
    chosen: Any = select
    if np.ndim(chosen[0]) == 0:
        selected = _select(chosen, left.shape)
    else:
        if any(a is b for a in chosen for b in estimate):
            raise ValueError(
                "select and estimate share an array: the bounds need samples that had no part in "
                "selecting the class; count them under stages(key).estimate"
            )
        first, second = (_check_counts("select", counts) for counts in chosen)
        if first.shape != second.shape or np.any(first.sum(axis=1) != second.sum(axis=1)):
            raise ValueError("select must have as many samples of each input on both sides")
        selected = _select(first + second, left.shape)

    n = [counts.sum(axis=1) for counts in (left, right)]
    check_enough_of_halves((int(n[0].min()), int(n[1].min())), alpha, anytime)
    count = [np.take_along_axis(c, selected[:, None], axis=1)[:, 0] for c in (left, right)]
    bounds = [upper(m - k, m, alpha / 2, anytime) for k, m in zip(count, n)]
    below = [lower(k, m, alpha / 2, anytime) for k, m in zip(count, n)]
    radius = signed_radius(pair, (bounds[0], bounds[1]))
    most = [unanimous(int(samples.max()), alpha / 2, anytime) for samples in n]
    if np.any(radius > signed_radius(pair, (most[0], most[1]))):
        raise AssertionError(f"radius {radius.max()} is above the ceiling of all votes equal")
    certified = radius > 0
    return Certificate(
        prediction=np.where(certified, selected, ABSTAIN),
        radius=np.where(certified, radius, 0.0),
        selected=selected,
        p_lower=(below[0] + below[1]) / 2,
        count=count[0] + count[1],
        rejects=left[:, -1] + right[:, -1],
        n=n[0] + n[1],
        alpha=alpha,
        norm="L2",
    )
