"""Threat models: what an attacker may do to an input. No loops over attack steps, no models.

A threat model is a ball of radius ``eps`` in a norm, intersected with the box ``[lo, hi]`` of valid
inputs. All methods work on batches: the first axis is the example axis, any number of feature axes
may follow.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jrobust._algorithm import algorithm

Array = jax.Array
ArrayLike = Any


def expand(value: ArrayLike, like: Array) -> Array:
    """Append axes to a per-example ``value`` (B,) so that it broadcasts against ``like`` (B, ...).

    Scalars and values that have the rank of ``like`` already are returned as they are.
    """
    value = jnp.asarray(value)
    if value.ndim in (0, like.ndim):
        return value
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def _features(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _root(square: Array) -> Array:
    """``sqrt`` whose derivative at zero is zero, so that training through an attack has no NaN."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _multiplier(move: Array, low: Array, high: Array, radius: Array, free: Array) -> Array:
    """The ``t`` in (B, 1, ...) at which ``clip(t move, low, high)`` has norm ``radius``.

    ``free`` (B, ...) are the features that do not reach their bound at this ``t``.
    """
    held = jnp.where(free, 0.0, jnp.where(move > 0, high, low))
    held = jnp.where(move == 0, 0.0, held)
    left = jnp.maximum(radius**2 - jnp.sum(held * held, _features(move), keepdims=True), 0.0)
    loose = jnp.where(free, move, 0.0)
    loose = jnp.sum(loose * loose, _features(move), keepdims=True)
    some = loose > 0
    return jnp.where(some, jnp.minimum(1.0, _root(left / jnp.where(some, loose, 1.0))), 1.0)


# Compiled on its own, because an eager caller would compile the loop anew at each call.
@jax.jit
def _free_features(move: Array, low: Array, high: Array, radius: Array) -> Array:
    """(B, ...) bool: which features of the L2 projection do not reach a bound of the box.

    Newton's method from the feasible side: a larger ``t`` leaves fewer features free, and fewer
    free features need a larger ``t``, so the set shrinks until it is the answer. Two or three
    rounds are the rule, as many as there are features the limit.
    """

    def free(t: Array) -> Array:
        return (t * move > low) & (t * move < high)

    length = _root(jnp.sum(move * move, _features(move), keepdims=True))
    first = free(jnp.minimum(1.0, radius / jnp.where(length > 0, length, 1.0)))

    def shrink(inside: Array) -> Array:
        return inside & free(_multiplier(move, low, high, radius, inside))

    return jax.lax.while_loop(
        lambda state: jnp.any(state[0] != state[1]),
        lambda state: (state[1], shrink(state[1])),
        (first, shrink(first)),
    )[1]


class Threat(abc.ABC):
    """What every threat model has. Subclasses are dataclasses with ``eps``, ``lo`` and ``hi``."""

    norm: ClassVar[str]
    eps: ArrayLike
    lo: ArrayLike
    hi: ArrayLike

    @abc.abstractmethod
    def project(self, x: Array, x0: Array) -> Array:
        """The point of (ball around ``x0``) ∩ box nearest to ``x``; both (B, ...)."""

    @abc.abstractmethod
    def sample(self, keys: Array, x0: Array) -> Array:
        """A random point of the ball around ``x0`` (B, ...), by ``keys`` (B,), put into the box."""

    @abc.abstractmethod
    def steepest(self, gradient: Array) -> Array:
        """The direction of unit norm along which ``gradient`` (B, ...) ascends fastest.

        Zero where the gradient is zero. NaN entries of the gradient count as zero (infinite ones
        too where the direction has no limit), so that a broken model cannot break the point.
        """

    @abc.abstractmethod
    def distance(self, x: Array, x0: Array) -> Array:
        """The norm of ``x - x0`` of each example: (B, ...) -> (B,) float32."""

    @abc.abstractmethod
    def widest(self, width: float, size: int) -> float:
        """The norm of the diagonal of a box of this ``width`` in ``size`` dimensions."""

    def _bounds(self, x: Array) -> tuple[Array, Array]:
        """``lo`` and ``hi``, right-aligned with the features of ``x``."""

        def aligned(bound: ArrayLike) -> Array:
            bound = jnp.asarray(bound, x.dtype)
            if bound.ndim in (0, x.ndim):
                return bound
            return bound.reshape((1,) * (x.ndim - bound.ndim) + bound.shape)

        return aligned(self.lo), aligned(self.hi)

    def batched(self, x: Array) -> Self:
        """The same threat model with an example axis on every leaf, to live in attack state.

        Args:
            x: (B, ...) inputs; ``eps`` becomes (B,), ``lo`` and ``hi`` become (B, ...) with
                features of size one where they do not vary.
        """
        batch = x.shape[0]

        def rows(bound: Array) -> Array:
            bound = bound.reshape((1,) * (x.ndim - bound.ndim) + bound.shape)
            return jnp.broadcast_to(bound, (batch, *bound.shape[1:]))

        # Built from x, so that under shard_map the leaves vary over devices like x does.
        zero = 0.0 * jax.lax.stop_gradient(x.reshape(batch, -1)[:, 0])
        zero = jnp.where(jnp.isfinite(zero), zero, 0.0)
        lo, hi = (rows(bound) + expand(zero, x) for bound in self._bounds(x))
        eps = jnp.asarray(self.eps, x.dtype) + zero
        return type(self)(eps, lo, hi)  # type: ignore[call-arg]

    def check_shapes(self, x: Array) -> None:
        """Raise ``ValueError`` if ``eps``, ``lo`` or ``hi`` cannot broadcast against ``x``."""
        name = type(self).__name__
        eps = np.shape(self.eps)
        if eps not in ((), (x.shape[0],)):
            raise ValueError(
                f"{name}.eps must be a scalar or have one value for each of the {x.shape[0]} "
                f"examples, got shape {eps}; to sweep over radii, jax.vmap over eps"
            )
        for field in ("lo", "hi"):
            shape = np.shape(getattr(self, field))
            # With an example axis of its own, or for one example.
            whole = x.shape if len(shape) == x.ndim else x.shape[1:]
            try:
                fits = np.broadcast_shapes(shape, whole) == whole
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(
                    f"{name}.{field} must broadcast against one example of shape {x.shape[1:]}, "
                    f"got shape {shape}"
                )

    def check(self, x: Array) -> None:
        """Raise ``ValueError`` where this threat model makes no sense for inputs ``x`` (B, ...).

        Reads values, so it cannot run inside ``jit``: ``jrobust.run`` and the loops call it.
        """
        self.check_shapes(x)
        name = type(self).__name__
        eps = np.asarray(self.eps, np.float64)
        lo, hi = (np.asarray(b, np.float64) for b in self._bounds(jnp.asarray(x)))
        if not np.all(np.isfinite(eps)) or np.any(eps < 0):
            raise ValueError(f"{name}.eps must be finite and not negative, got {self.eps}")
        if not (np.all(np.isfinite(lo)) and np.all(np.isfinite(hi)) and np.all(lo < hi)):
            raise ValueError(
                f"{name} needs finite bounds with lo < hi, got lo={self.lo} and hi={self.hi}"
            )
        values = np.asarray(x)
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"x holds {int((~np.isfinite(values)).sum())} values that are not finite"
            )
        if np.any(values < np.float32(lo)) or np.any(values > np.float32(hi)):
            raise ValueError(
                f"x must lie in the box [lo, hi] = [{lo.min():g}, {hi.max():g}], but its values "
                f"span [{values.min():g}, {values.max():g}]; attack inputs before normalisation "
                "(make it the model's first layer), or give the threat model the right lo and hi"
            )
        most = self.widest(float((hi - lo).max()), int(np.prod(x.shape[1:])))
        if np.any(eps > most * (1 + 1e-6)):
            raise ValueError(
                f"{name}.eps = {eps.max():g} is larger than the whole box, whose diameter in this "
                f"norm is {most:g}; eps is in the units of x (8/255 for 8 grey levels in [0, 1])"
            )


@algorithm
class Linf(Threat):
    """Every feature may move by at most ``eps``.

    Args:
        eps: radius in the units of the input; scalar or (B,).
        lo: lower end of the box; scalar or broadcastable to one example.
        hi: upper end of the box, likewise.
    """

    eps: ArrayLike
    lo: ArrayLike = 0.0
    hi: ArrayLike = 1.0
    norm: ClassVar[str] = "Linf"

    def project(self, x: Array, x0: Array) -> Array:
        """Clip to the ball, then to the box: exact, since both are products of intervals.

        The result obeys ``|x - x0| <= eps`` in exact arithmetic, eps being the float32 number:
        where rounding of ``x0 + eps`` took it out of the ball, it is stepped towards ``x0``.
        """
        eps = expand(self.eps, x0).astype(x0.dtype)
        lo, hi = self._bounds(x0)
        x = jnp.clip(x, jnp.maximum(x0 - eps, lo), jnp.minimum(x0 + eps, hi))
        # One of the differences is exact (Fast2Sum), so the tests see every overshoot and nothing
        # else. They look at the clipped point, because XLA would fold (x0 + eps) - x0 to eps.
        outside = (jnp.abs(x - x0) > eps) | (x - eps > x0) | (x + eps < x0)
        inward = jnp.nextafter(*jax.lax.stop_gradient((x, x0)))
        return jnp.where(outside, x + (inward - jax.lax.stop_gradient(x)), x)

    def sample(self, keys: Array, x0: Array) -> Array:
        """Uniform in the ball, then clipped to the box (Madry et al. 2018)."""
        noise = jax.vmap(
            lambda key: jax.random.uniform(key, x0.shape[1:], x0.dtype, minval=-1.0, maxval=1.0)
        )(keys)
        return self.project(x0 + expand(self.eps, x0) * noise, x0)

    def steepest(self, gradient: Array) -> Array:
        """The sign of the gradient (Goodfellow et al. 2015, eq. of FGSM)."""
        return jnp.where(jnp.isnan(gradient), 0.0, jnp.sign(gradient))

    def distance(self, x: Array, x0: Array) -> Array:
        """``max |x - x0|`` over features."""
        return jnp.max(jnp.abs(x - x0), axis=_features(x), initial=0.0)

    def widest(self, width: float, size: int) -> float:
        """The width itself."""
        return width


@algorithm
class L2(Threat):
    """The perturbation's Euclidean norm may be at most ``eps``.

    Args:
        eps: radius in the units of the input; scalar or (B,).
        lo: lower end of the box; scalar or broadcastable to one example.
        hi: upper end of the box, likewise.
    """

    eps: ArrayLike
    lo: ArrayLike = 0.0
    hi: ArrayLike = 1.0
    norm: ClassVar[str] = "L2"

    def project(self, x: Array, x0: Array) -> Array:
        """The exact projection onto ball ∩ box, ``x0`` being inside the box.

        By the optimality conditions the answer is ``x0 + clip(t (x - x0), lo - x0, hi - x0)`` for
        the largest ``t <= 1`` that obeys the radius. ``t = eps / norm`` is the released AutoAttack
        rule (shrink, then clip): feasible, but short wherever the box binds. ``t`` follows in
        closed form from which features reach the box; its derivative does too.
        """
        eps = expand(self.eps, x0).astype(x0.dtype)
        lo, hi = self._bounds(x0)
        low, high = jnp.minimum(lo - x0, 0.0), jnp.maximum(hi - x0, 0.0)
        move = x - x0
        # A hair inside, so that rounding of the sum does not leave the ball.
        radius = eps * (1 - 2.0**-22)
        free = _free_features(*jax.lax.stop_gradient((move, low, high, radius)))
        t = _multiplier(move, low, high, radius, free)
        return jnp.clip(x0 + jnp.clip(t * move, low, high), lo, hi)

    def sample(self, keys: Array, x0: Array) -> Array:
        """Uniform in the ball, then projected into the box."""
        size = int(np.prod(x0.shape[1:]))

        def draw(key: Array) -> Array:
            angle, depth = jax.random.split(key)
            normal = jax.random.normal(angle, x0.shape[1:], x0.dtype)
            radius = jax.random.uniform(depth, (), x0.dtype) ** (1.0 / size)
            return radius * normal / jnp.sqrt(jnp.sum(normal * normal))

        return self.project(x0 + expand(self.eps, x0) * jax.vmap(draw)(keys), x0)

    def steepest(self, gradient: Array) -> Array:
        """The gradient over its norm, scaled first so that no square under- or overflows."""
        g = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        # The direction does not depend on the scale, so neither does its derivative.
        largest = jax.lax.stop_gradient(
            jnp.max(jnp.abs(g), _features(g), keepdims=True, initial=0.0)
        )
        # The reciprocal of a number above 2^126 is subnormal, which XLA takes for zero.
        shrink = jnp.where(largest > 1.0, 0.125, 1.0)
        g = (shrink * g) / jnp.where(largest > 0, shrink * largest, 1.0)
        length = _root(jnp.sum(g * g, _features(g), keepdims=True))
        return g / jnp.where(length > 0, length, 1.0)

    def distance(self, x: Array, x0: Array) -> Array:
        """``sqrt(sum (x - x0)^2)`` over features."""
        return jnp.sqrt(jnp.sum((x - x0) ** 2, _features(x)))

    def widest(self, width: float, size: int) -> float:
        """``width * sqrt(size)``."""
        return width * float(np.sqrt(size))
