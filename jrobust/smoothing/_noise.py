"""Smoothing noises: what is drawn on the device, and the radius that a bound on the votes proves.

The radius rules share one form. For each noise there is a decreasing function z of a probability
such that ``z(P(f(x + noise) in S))`` changes by at most ``norm(x - x') / scale`` from x to x',
whatever f and S are, and ``z(1 - p) = -z(p)``. If every answer but A has probability at most q at
x, and every single one of them at most ``runner``, then A is the most probable answer as long as
``norm(x - x') < scale * (z(q) + z(runner)) / 2``. With ``runner = q`` that is ``scale * z(q)``.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jrobust._algorithm import algorithm, static
from jrobust.statistics._binomial import outward

Array = jax.Array

# What the special functions and the arithmetic around them may be wrong by, relative to 1 + |z|.
# ndtri was measured within 1e-15 of 60-digit values for q in [1e-18, 0.98].
_ROUNDING = 4e-15


class Noise(Protocol):
    """What ``count_votes`` and ``certify`` need of a noise."""

    @property
    def norm(self) -> str:
        """Norm of the radius: ``"L2"``, ``"L1"``, ``"Linf"`` or ``"L0"``."""

    def check(self) -> None:
        """Raise ``ValueError`` for parameters that prove nothing."""

    def perturb(self, key: Array, x: Array) -> Array:
        """One noisy copy of one input: float32, of the shape of ``x`` (which has no batch axis)."""

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """Radius proved by upper bounds on probabilities, float64, rounded down.

        It does not increase with either, and is negative where they prove nothing, not even at x
        itself: for ``q >= 1/2`` without ``runner``.

        Args:
            q: upper bound on the probability of every answer but the top one together. Not 1
                minus a lower bound: the complement cancels near 1.
            runner: upper bound on the probability of each single one of them; by default q.
        """


def check_dtype(dtype: Any) -> None:
    """Raise ``ValueError`` unless noise of ``dtype`` supports a certificate."""
    if jnp.dtype(dtype) != jnp.float32:
        raise ValueError(
            f"smoothing noise must be float32, got {jnp.dtype(dtype)}: half-precision normal draws "
            "take only 128 (bfloat16) or 1,024 (float16) distinct values and never exceed 3.5 "
            "sigma, which voids the certificate. Draw and add in float32; let the model cast."
        )


def check_scale(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one positive, finite float32 number."""
    number = np.asarray(value, np.float64)
    if number.shape != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {number.shape}; "
            f"certify images of different {name} in separate calls"
        )
    limits = np.finfo(np.float32)
    if not limits.tiny <= number <= limits.max:
        raise ValueError(f"{name} must be positive and finite in float32, got {value}")


def check_size(noise: Any, size: int, found: int, what: str = "values") -> None:
    """Raise ``ValueError`` unless an input has the number of values that the radius assumes."""
    if found != size:
        raise ValueError(
            f"{type(noise).__name__}(size={size}) is for inputs of {size} {what}, got {found}: its "
            f"radius depends on that number; pass size={found}"
        )


def probabilities(q: ArrayLike, runner: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """The two bounds as float64; ``ValueError`` unless they lie in [0, 1]."""
    q = np.asarray(q, np.float64)
    runner = q if runner is None else np.asarray(runner, np.float64)
    for name, value in (("q", q), ("runner", runner)):
        if not np.all((value >= 0) & (value <= 1)):
            raise ValueError(f"{name} must be a probability in [0, 1], got {value}")
    return q, runner


def round_down(scale: Any, *z: np.ndarray) -> np.ndarray:
    """``scale`` times the mean of the ``z``, each of which may be wrong by its rounding, or less.

    Of a sum it is the size of the parts that tells the rounding: they may cancel.
    """
    with np.errstate(invalid="ignore"):
        total = sum(z) / len(z)
        size = sum(map(np.abs, z)) / len(z)
        low = np.nextafter(np.float64(scale) * (total - _ROUNDING * (1 + size)), -np.inf)
    low = np.where(np.isinf(total), total, low)
    return np.where(np.isnan(total), -np.inf, low)[()]


class Additive(abc.ABC):
    """A noise that is added to the input; see this module's text for its radius."""

    @abc.abstractmethod
    def _scale(self) -> Any:
        """What ``_z`` is multiplied by, in the units of x."""

    @abc.abstractmethod
    def _z(self, q: np.ndarray) -> np.ndarray:
        """z in units of the scale: decreasing, odd around 1/2, accurate to ``_ROUNDING``."""

    @abc.abstractmethod
    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """One draw: float32 of ``shape``, the shape of one input."""

    def perturb(self, key: Array, x: Array) -> Array:
        """``x`` plus one draw; ``ValueError`` for a draw that is not float32."""
        draw = self.sample(key, x.shape)
        check_dtype(draw.dtype)
        return x + draw

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """``scale * (z(q) + z(runner)) / 2`` in float64, rounded down.

        Args:
            q: upper bound on the probability of all other answers together, in [0, 1], any shape.
            runner: on each single one of them; by default q.

        Returns:
            float64 of the broadcast shape, in the units of x; infinite for q = 0 and q = 1.
        """
        q, runner = probabilities(q, runner)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = self._z(q), self._z(runner)
        return round_down(np.float32(self._scale()), *z)  # of the scale that was drawn with


@algorithm
class Gaussian(Additive):
    """Isotropic Gaussian noise N(0, sigma^2 I), certifying in L2 (Cohen et al. 2019, Theorem 1).

    If the smoothed classifier answers anything but c with probability at most q < 1/2 at x, it
    answers c everywhere within ``-sigma * Phi^-1(q)`` of x. For Linf see :class:`Converted`.

    Args:
        sigma: standard deviation, in the units of x; a scalar, and the same for the whole ball: a
            sigma that depends on the input voids the theorem.
    """

    norm: ClassVar[str] = "L2"
    sigma: Array | float

    def check(self) -> None:
        """Raise ``ValueError`` unless sigma is one positive, finite float32 number."""
        check_scale("sigma", self.sigma)

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """One draw: float32 of ``shape``.

        ``jax.random.normal`` in float32 has 2^23 levels within about [-5.4, 5.2] sigma; the
        certificate takes them for a normal variable (:class:`DiscreteGaussian` need not).

        Raises:
            ValueError: any ``dtype`` but float32.
        """
        check_dtype(dtype)
        return jnp.asarray(self.sigma, dtype) * jax.random.normal(key, shape, dtype)

    def _scale(self) -> Any:
        return self.sigma

    def _z(self, q: np.ndarray) -> np.ndarray:
        return -special.ndtri(q)


class _Scaled(Additive):
    """A family whose only parameter beside its shape is a scale."""

    scale: Array | float

    def check(self) -> None:
        """Raise ``ValueError`` for parameters outside the family."""
        check_scale("scale", self.scale)

    def _scale(self) -> Any:
        return self.scale

    @abc.abstractmethod
    def _unit(self, key: Array, shape: tuple[int, ...]) -> Array:
        """One draw at scale 1."""

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """One draw: float32 of ``shape``; ``ValueError`` for any ``dtype`` but float32."""
        check_dtype(dtype)
        return jnp.asarray(self.scale, dtype) * self._unit(key, shape)


@algorithm
class Uniform(_Scaled):
    """Independent uniform noise on [-scale, scale), certifying in L1 (Yang et al. 2020).

    The radius ``2 scale (1/2 - q)`` is at most ``scale``, however many votes there are.

    Args:
        scale: half the width, in the units of x, scalar.
    """

    norm: ClassVar[str] = "L1"
    scale: Array | float

    def _unit(self, key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -1, 1)

    def _z(self, q: np.ndarray) -> np.ndarray:
        return 1 - 2 * q


def _log_odds(q: np.ndarray) -> np.ndarray:
    """The z of a density whose logarithm is Lipschitz: ``-log(2 q)``, odd around 1/2."""
    return np.where(q <= 0.5, -np.log(2 * q), np.log(2 * (1 - q)))


@algorithm
class Laplace(_Scaled):
    """Independent Laplace noise, certifying in L1 (Teng et al. 2019; Yang et al. 2020).

    The radius is ``-scale log(2 q)``.

    Args:
        scale: the b of the density exp(-|t| / b) / (2 b), in the units of x, scalar.
    """

    norm: ClassVar[str] = "L1"
    scale: Array | float

    def _unit(self, key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.laplace(key, shape, jnp.float32)

    def _z(self, q: np.ndarray) -> np.ndarray:
        return _log_odds(q)


@algorithm
class Pareto(_Scaled):
    """Independent two-sided Pareto noise, certifying in L1 (Yang et al. 2020).

    Its density is ``tail / (2 scale) (1 + |t| / scale)^-(tail + 1)``. With ``u = 1 - 2 q`` and
    ``b = 1 + 1 / tail`` the radius is ``scale / tail`` times the integral of ``1 / (1 - v^b)`` for
    v from 0 to u, which is ``u F(1, 1 / b; 1 + 1 / b; u^b)`` with Gauss' hypergeometric F.

    Args:
        scale: in the units of x, scalar.
        tail: exponent of the tail, > 0; the variance is finite above 2.
    """

    norm: ClassVar[str] = "L1"
    scale: Array | float
    tail: float = static(default=3.0)

    def check(self) -> None:
        """Raise ``ValueError`` unless ``scale`` and ``tail`` are positive and finite."""
        check_scale("scale", self.scale)
        if not 0 < self.tail < math.inf:
            raise ValueError(f"tail must be positive and finite, got {self.tail}")

    def _unit(self, key: Array, shape: tuple[int, ...]) -> Array:
        signs, sizes = jax.random.split(key)
        size = jnp.expm1(jax.random.exponential(sizes, shape, jnp.float32) / self.tail)
        return jax.random.rademacher(signs, shape, jnp.float32) * size

    def _z(self, q: np.ndarray) -> np.ndarray:
        p, b = np.minimum(q, 1 - q), 1 + 1 / self.tail
        u, rest = 1 - 2 * p, -np.expm1(b * np.log1p(-2 * p))  # rest is 1 - u^b
        z = np.where(
            rest < 0.5, _gauss_near_one(1 / b, rest), special.hyp2f1(1, 1 / b, 1 + 1 / b, u**b)
        )
        z = u * z / self.tail
        # Measured within 1e-13 of the integral.
        return np.where(q <= 0.5, z, -z) - np.where(np.isinf(z), 0, 1e-12 * z)


def _gauss_near_one(c: float, rest: np.ndarray) -> np.ndarray:
    """``F(1, c; 1 + c; 1 - rest)`` by its expansion around rest = 0, for rest < 1/2."""
    n = np.arange(60)
    factor = c * np.cumprod(np.concatenate([[1.0], (c + n[:-1]) / n[1:]]))  # c (c)_n / n!
    bracket = special.digamma(n + 1) - special.digamma(c + n) - np.log(rest)[..., None]
    terms = factor * bracket * np.minimum(rest, 0.5)[..., None] ** n
    return np.where(rest > 0, terms.sum(axis=-1), np.inf)


_INVERSE = {"L1": 1.0, "L2": 0.5, "Linf": 0.0}  # 1 / p of the norms
_RULES = (
    ("Linf", "L1", "any power and pole"),
    ("Linf", "Linf", "power 1, pole 0"),
    ("L1", "L1", "power 1, pole 0"),
    ("L2", "L2", "power 1 or 2, pole 0"),
)


@algorithm
class Exponential(_Scaled):
    """Noise of density proportional to ``|t|^-pole exp(-(|t| / scale)^power)`` (Yang et al. 2020).

    ``|t|`` is the norm ``shape`` of the whole draw. These have closed radii, by the differential
    method of the paper, d being ``size``:

    * Linf in L1: ``2 scale c (1/2 - q)`` with ``c = d / (d - 1) Gamma((d - pole) / power) /
      Gamma((d - pole - 1) / power)``; for power 1 and pole 0 that holds for q >= 1 / (2 d), and
      ``scale (d - 1 - log(2 d q))``, which is more, below.
    * Linf in Linf and L1 in L1, for power 1 and pole 0: ``-scale log(2 q)``.
    * L2 in L2, for power 1 and pole 0: ``scale (d - 1) artanh(c)``, where a coordinate of a random
      point on the unit sphere is above c with probability q. For power 2 and pole 0 it is the
      Gaussian of standard deviation ``scale / sqrt(2)``.

    Args:
        scale: in the units of x, scalar. A coordinate is of the order of ``scale * size`` for power
            1 in Linf, of ``scale * sqrt(size)`` in L2.
        size: values in one input, at least 2.
        shape: ``"L1"``, ``"L2"`` or ``"Linf"``.
        norm: norm of the radius.
        power: > 0.
        pole: in [0, size - 1).
    """

    scale: Array | float
    size: int = static()
    shape: str = static(default="Linf")
    norm: str = static(default="L1")
    power: float = static(default=1.0)
    pole: float = static(default=0.0)

    def check(self) -> None:
        """Raise ``ValueError`` unless the radius of this member is one of those above."""
        check_scale("scale", self.scale)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 2:
            raise ValueError(
                f"size must be the number of values of an input, an int >= 2, got {self.size!r}"
            )
        if not (0 < self.power < math.inf and 0 <= self.pole < self.size - 1):
            raise ValueError(
                f"need power > 0 and 0 <= pole < size - 1 = {self.size - 1}, got "
                f"power={self.power}, pole={self.pole}"
            )
        plain = self.power == 1 and self.pole == 0
        gaussian = self.shape == self.norm == "L2" and self.power == 2 and self.pole == 0
        known = (self.shape, self.norm) in {rule[:2] for rule in _RULES}
        if not (known and (plain or gaussian or self.norm == "L1" != self.shape)):
            raise ValueError(
                f"no closed radius is known for shape={self.shape!r}, norm={self.norm!r}, "
                f"power={self.power}, pole={self.pole}; there are "
                + "; ".join(f"{shape} in {norm} ({which})" for shape, norm, which in _RULES)
            )

    def _unit(self, key: Array, shape: tuple[int, ...]) -> Array:
        check_size(self, self.size, math.prod(shape))
        lengths, directions = jax.random.split(key)
        # Such a density has the direction of any density of the same norm, and a Gamma length.
        if self.shape == "Linf":
            draw = jax.random.uniform(directions, shape, jnp.float32, -1, 1)
            draw = draw / jnp.max(jnp.abs(draw))
        elif self.shape == "L1":
            draw = jax.random.laplace(directions, shape, jnp.float32)
            draw = draw / jnp.sum(jnp.abs(draw))
        else:
            draw = jax.random.normal(directions, shape, jnp.float32)
            draw = draw / jnp.sqrt(jnp.sum(draw * draw))
        length = jax.random.gamma(lengths, (self.size - self.pole) / self.power, (), jnp.float32)
        return draw * length ** (1 / self.power)

    def _z(self, q: np.ndarray) -> np.ndarray:
        d, p = self.size, np.minimum(q, 1 - q)  # exact where it matters, for q >= 1/2
        low = np.where(q <= 0.5, -1, 1)  # which way z at p is to err: beyond 1/2 it is taken off
        if self.norm != self.shape:
            if self.power == 1 and self.pole == 0:
                z = np.where(p >= 0.5 / d, d * (1 - 2 * p), d - 1 - np.log(2 * d * p))
            else:
                tops = special.gammaln(
                    [(d - self.pole) / self.power, (d - self.pole - 1) / self.power]
                )
                loss = 1e-15 * (4 + np.abs(tops).max())  # the difference cancels
                z = d / (d - 1) * math.exp(tops[0] - tops[1]) * (1 - 2 * p) * (1 + low * loss)
        elif self.norm != "L2":
            z = -np.log(2 * p)
        elif self.power == 2:
            z = -special.ndtri(p) / math.sqrt(2)
        else:
            a, b = 0.5, (d - 1) / 2
            square = outward(
                special.betainccinv(a, b, 2 * p),
                lambda c: low * special.betaincc(a, b, c),
                low * 2 * p,
                low,
            )
            z = (d - 1) * np.arctanh(np.sqrt(square))
        return np.where(q <= 0.5, z, -z)


@algorithm
class Converted:
    """A noise whose radius is stated in another norm, by the largest ball inside its own.

    A Gaussian's L2 radius R is ``R / sqrt(size)`` in Linf: of the order of the best that any noise
    can prove there (Yang et al. 2020).

    Args:
        noise: certifies in L1, L2 or Linf.
        norm: ``"L1"``, ``"L2"`` or ``"Linf"``.
        size: values in one input.
    """

    noise: Any
    norm: str = static()
    size: int = static()

    def check(self) -> None:
        """Raise ``ValueError`` for norms between which balls do not convert, and bad noises."""
        self.noise.check()
        for norm in (self.noise.norm, self.norm):
            if norm not in _INVERSE:
                raise ValueError(f"norms convert among {', '.join(_INVERSE)}, got {norm!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be the number of values of an input, got {self.size!r}")

    def perturb(self, key: Array, x: Array) -> Array:
        """One noisy copy of ``x``."""
        check_size(self, self.size, x.size)
        return self.noise.perturb(key, x)

    def radius(self, q: ArrayLike, runner: ArrayLike | None = None) -> np.ndarray:
        """The noise's own radius over ``size^max(0, 1/p - 1/p')``, rounded down."""
        power = max(0.0, _INVERSE[self.noise.norm] - _INVERSE[self.norm])
        return round_down(1.0, np.asarray(self.noise.radius(q, runner)) / self.size**power)
