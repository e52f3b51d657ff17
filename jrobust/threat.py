"""Threat models: what an attacker may do to an input. No loops over attack steps, no models.

A threat model is a ball of radius ``eps`` in a norm, intersected with the box ``[lo, hi]`` of valid
inputs. All methods work on batches: the first axis is the example axis, any number of feature axes
may follow. Inputs are float32, as attacks take them: what a projection promises of the ball holds
up to the rounding of that type.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jrobust._algorithm import algorithm, static

Array = jax.Array
ArrayLike = Any


def expand(value: ArrayLike, like: Array) -> Array:
    """Append axes to a per-example ``value`` (B,) so that it broadcasts against ``like`` (B, ...).

    Scalars and values that have the rank of ``like`` already keep their shape. A floating-point
    value takes the dtype of ``like``, so that float64 numbers do not widen it in 64-bit mode.
    """
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating) and jnp.issubdtype(like.dtype, jnp.floating):
        value = value.astype(like.dtype)
    if value.ndim in (0, like.ndim):
        return value
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def _features(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _total(values: Array) -> Array:
    """The sum over features: (B, ...) -> (B, 1, ...)."""
    return jnp.sum(values, _features(values), keepdims=True)


def _scaled(gradient: Array) -> Array:
    """The gradient over its largest entry, so that no power or sum of it under- or overflows.

    Entries that are not finite count as zero. The derivative is that of a constant scale: what is
    normalised afterwards does not depend on it.
    """
    g = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(g), _features(g), keepdims=True, initial=0.0))
    # The reciprocal of a number above 2^126 is subnormal, which XLA takes for zero.
    shrink = jnp.where(largest > 1.0, 0.125, 1.0)
    return (shrink * g) / jnp.where(largest > 0, shrink * largest, 1.0)


def _inward(x: Array, x0: Array, reach: Array) -> Array:
    """``x``, stepped one float32 towards ``x0`` where rounding took it further than ``reach``.

    Then ``|x - x0| <= reach`` in exact arithmetic. One of the differences is exact (Fast2Sum), so
    the tests see every overshoot and nothing else. ``x`` should come out of a clip, because XLA
    would fold ``(x0 + reach) - x0`` to ``reach``.
    """
    outside = (jnp.abs(x - x0) > reach) | (x - reach > x0) | (x + reach < x0)
    inward = jnp.nextafter(*jax.lax.stop_gradient((x, x0)))
    return jnp.where(outside, x + (inward - jax.lax.stop_gradient(x)), x)


def _largest(holds: Callable[[Array], Array], like: Array) -> Array:
    """The largest float32 ``t >= 0`` at which ``holds(t)``; zero if there is none.

    ``holds`` (B, 1, ...) must be true up to some ``t`` and false from there on. Non-negative floats
    are ordered like their bits, which are settled one by one from the highest: 31 evaluations in
    whatever number of dimensions, where sorting costs more and Newton's method has no bound.
    """

    def settle(i: Array, bits: Array) -> Array:
        candidate = bits | (jnp.uint32(1 << 30) >> i.astype(jnp.uint32))
        t = jax.lax.bitcast_convert_type(candidate, jnp.float32)
        return jnp.where(holds(t), candidate, bits)

    bits = jax.lax.fori_loop(0, 31, settle, jnp.zeros_like(like, dtype=jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# Compiled on their own, because an eager caller would compile the loop anew at each call.
@jax.jit
def _shift(size: Array, room: Array, radius: Array) -> Array:
    """(B, 1, ...): the last ``t`` at which ``sum clip(size - t, 0, room)`` exceeds ``radius``."""

    def moved(t: Array) -> Array:
        # In place of jnp.clip, with which XLA for the CPU leaves sums in single steps.
        left = size - t
        return _total(jnp.where(left > 0, jnp.where(left < room, left, room), 0.0))

    return _largest(lambda t: moved(t) > radius, _total(size))


@jax.jit
def _tiers(rank: Array, weight: Array, budget: Array) -> tuple[Array, Array]:
    """(B, ...) bool, twice: entries ``rank > t`` and ``rank == t``.

    ``t`` is the highest for which the entries ``rank >= t`` weigh ``budget``, found as
    :func:`_largest` finds it. The entries are those of its last comparisons: compared afterwards,
    ``rank`` may be computed anew with another rounding, where XLA likes, and none would equal t.
    """

    def settle(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bits, above, reached = carry
        candidate = bits | (jnp.uint32(1 << 30) >> i.astype(jnp.uint32))
        some = rank >= jax.lax.bitcast_convert_type(candidate, jnp.float32)
        holds = _total(jnp.where(some, weight, 0.0)) >= budget
        # What was refused last is the float after t.
        return (
            jnp.where(holds, candidate, bits),
            jnp.where(holds, above, some),
            jnp.where(holds, some, reached),
        )

    zero = jnp.zeros_like(_total(rank), dtype=jnp.uint32)
    _, above, reached = jax.lax.fori_loop(0, 31, settle, (zero, rank < 0, rank >= 0))
    return above, reached & ~above


def _best(rank: Array, count: Array) -> Array:
    """(B, ...) bool: the ``count`` entries of highest ``rank >= 0``; among equals the first."""
    rank = jax.lax.stop_gradient(rank)
    above, equal = _tiers(rank, jnp.ones_like(rank), count)
    place = jnp.cumsum(equal.reshape(equal.shape[0], -1), axis=1).reshape(equal.shape)
    return above | (equal & (place <= count - _total(above)))


def _root(square: Array) -> Array:
    """``sqrt`` whose derivative at zero is zero, so that training through an attack has no NaN."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _multiplier(size: Array, room: Array, radius: Array, most: Array, free: Array) -> Array:
    """The ``t <= most`` in (B, 1, ...) at which ``min(t size, room)`` has norm ``radius``.

    ``free`` (B, ...) are the features that do not reach their bound at this ``t``.
    """
    held = jnp.where(free, 0.0, room)
    left = jnp.maximum(radius**2 - _total(held * held), 0.0)
    loose = jnp.where(free, size, 0.0)
    loose = _total(loose * loose)
    some = loose > 0
    return jnp.where(some, jnp.minimum(most, _root(left / jnp.where(some, loose, 1.0))), most)


# Compiled on its own, because an eager caller would compile the loop anew at each call.
@jax.jit
def _free_features(size: Array, room: Array, radius: Array, most: Array) -> Array:
    """(B, ...) bool: which features of the L2 projection do not reach a bound of the box.

    Newton's method from the feasible side: a larger ``t`` leaves fewer features free, and fewer
    free features need a larger ``t``, so the set shrinks until it is the answer. Two or three
    rounds are the rule, as many as there are features the limit.
    """

    def free(t: Array) -> Array:
        return t * size < room

    length = _root(_total(size * size))
    first = free(jnp.minimum(most, radius / jnp.where(length > 0, length, 1.0)))

    def shrink(inside: Array) -> Array:
        return inside & free(_multiplier(size, room, radius, most, inside))

    return jax.lax.while_loop(
        lambda state: jnp.any(state[0] != state[1]),
        lambda state: (state[1], shrink(state[1])),
        (first, shrink(first)),
    )[1]


class _Way(NamedTuple):
    """The way from a point to a hyperplane, feature by feature; (B, ...) unless said."""

    sign: Array  # direction that leads there, 0 where the feature has no say
    weight: Array  # progress per unit of move, at most 1
    room: Array  # what the box leaves in that direction
    need: Array  # (B, 1, ...) progress to make, at most what the room allows


# Compiled on its own, because an eager caller would compile the loop anew at each call.
@jax.jit
def _fill(weight: Array, speed: Array, room: Array, need: Array) -> Array:
    """(B, ...): ``min(t speed, room)`` for the one ``t`` at which ``weight`` times it is ``need``.

    Newton's method from below: a larger ``t`` fills more features, and more full features need a
    larger ``t``, so it rises until it is the answer. A few rounds are the rule, as many as there
    are features the limit; sorting them, or bisection, takes 2 to 20 times as long.
    """

    def rise(t: Array) -> Array:
        free = t * speed < room
        left = need - _total(jnp.where(free, 0.0, weight * room))
        pace = _total(jnp.where(free, weight * speed, 0.0))
        # In place of jnp.maximum, with which XLA for the CPU leaves sums in single steps.
        level = jnp.where(left > 0, left, 0.0) / jnp.where(pace > 0, pace, 1.0)
        return jnp.where(level > t, level, t)

    zero = jnp.zeros_like(need)
    t = jax.lax.while_loop(
        lambda state: jnp.any(state[1] > state[0]),
        lambda state: (state[1], rise(state[1])),
        (zero, rise(zero)),
    )[1]
    return jnp.where(t * speed < room, t * speed, room)


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
    def widest(self, width: float, shape: tuple[int, ...]) -> float:
        """The norm of the diagonal of a box of this ``width``; ``shape`` is that of one example."""

    def ascend(self, x: Array, x0: Array, gradient: Array, size: ArrayLike) -> Array:
        """One projected step of steepest ascent from ``x`` (B, ...), which is inside.

        Args:
            x: (B, ...) where the step starts.
            x0: (B, ...) the centre of the ball.
            gradient: (B, ...) at ``x``; need not be finite.
            size: length of the step in this norm, in L0 in the L1 norm; scalar or (B,).
        """
        return self.project(x + expand(size, x) * self.steepest(gradient), x0)

    def to_hyperplane(self, x: Array, normal: Array, value: Array) -> Array:
        """The shortest move in this norm from ``x`` onto a hyperplane, within the box.

        That is ``z - x`` (B, ...) for the ``z`` of the box nearest to ``x`` at which
        ``value + normal . (z - x) = 0``; where the box does not reach the hyperplane, the way to
        the corner that comes closest (Croce & Hein 2020). Features without weight do not move. The
        radius plays no part.

        Args:
            x: (B, ...) inside the box.
            normal: (B, ...); entries that are not finite count as zero.
            value: (B,); NaN counts as zero.

        Raises:
            TypeError: in a norm that has no such projection.
        """
        raise TypeError(f"{type(self).__name__} has no projection onto a hyperplane")

    def _way(self, x: Array, normal: Array, value: Array) -> _Way:
        normal = jnp.where(jnp.isfinite(normal), normal, 0.0)
        value = expand(jnp.where(jnp.isnan(value), 0.0, value), x)
        lo, hi = self._bounds(x)
        # Over the largest entry, so that no product under- or overflows.
        largest = jnp.max(jnp.abs(normal), _features(x), keepdims=True, initial=0.0)
        weight = _scaled(normal)
        sign = -jnp.sign(value) * jnp.sign(weight)
        weight = jnp.abs(weight)
        room = jnp.where(sign > 0, hi - x, jnp.where(sign < 0, x - lo, 0.0))
        room = jnp.maximum(room, 0.0)
        need = jnp.abs(value) / jnp.where(largest > 0, largest, 1.0)
        return _Way(sign, weight, room, jnp.minimum(need, _total(weight * room)))

    def step_size(self, x0: Array, steps: int, relative: ArrayLike | None = None) -> ArrayLike:
        """Length of each of ``steps`` steps, as ``ascend`` takes it, scalar or (B,).

        ``relative`` multiples of ``eps``; ``2.5 / steps`` of them when None (Madry et al. 2018).
        """
        return self.eps * (2.5 / steps if relative is None else relative)

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
        return dataclasses.replace(self, eps=eps, lo=lo, hi=hi)  # type: ignore[type-var]

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
        most = self.widest(float((hi - lo).max()), x.shape[1:])
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
        return _inward(jnp.clip(x, jnp.maximum(x0 - eps, lo), jnp.minimum(x0 + eps, hi)), x0, eps)

    def sample(self, keys: Array, x0: Array) -> Array:
        """Uniform in the ball, then clipped to the box (Madry et al. 2018)."""
        noise = jax.vmap(
            lambda key: jax.random.uniform(key, x0.shape[1:], x0.dtype, minval=-1.0, maxval=1.0)
        )(keys)
        return self.project(x0 + expand(self.eps, x0) * noise, x0)

    def steepest(self, gradient: Array) -> Array:
        """The sign of the gradient (Goodfellow et al. 2015, eq. of FGSM)."""
        return jnp.where(jnp.isnan(gradient), 0.0, jnp.sign(gradient))

    def to_hyperplane(self, x: Array, normal: Array, value: Array) -> Array:
        """See :meth:`Threat.to_hyperplane`: all features move alike, up to their bounds."""
        way = self._way(x, normal, value)
        return way.sign * _fill(way.weight, jnp.ones_like(way.weight), way.room, way.need)

    def distance(self, x: Array, x0: Array) -> Array:
        """``max |x - x0|`` over features."""
        return jnp.max(jnp.abs(x - x0), axis=_features(x), initial=0.0)

    def widest(self, width: float, shape: tuple[int, ...]) -> float:
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
        closed form from which features reach the box; its derivative does too. Where rounding of
        the sum leaves the ball, as it may one of few units in the last place of ``x0``, each
        feature by itself is rounded towards ``x0``.
        """
        eps = expand(self.eps, x0).astype(x0.dtype)
        lo, hi = self._bounds(x0)
        low, high = jnp.minimum(lo - x0, 0.0), jnp.maximum(hi - x0, 0.0)
        move = jnp.clip(x - x0, -1e30, 1e30)
        # So that no square overflows; one, but for points a trillion away.
        far = jnp.max(jnp.abs(move), _features(x), keepdims=True, initial=0.0)
        far = jax.lax.stop_gradient(jnp.maximum(1.0, 1e-12 * far))
        move = move * (1.0 / far)
        size, room = jnp.abs(move), jnp.where(move > 0, high, -low)
        # A hair inside, so that what was projected is inside the next time.
        radius = eps * (1 - 2.0**-22)
        free = _free_features(*jax.lax.stop_gradient((size, room, radius, far)))
        t = _multiplier(size, room, radius, far, free)
        change = jnp.clip(t * move, low, high)
        x = jnp.clip(x0 + change, lo, hi)
        over = _total((x - x0) ** 2) > eps**2
        return jnp.where(over, _inward(x, x0, jnp.abs(change)), x)

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
        g = _scaled(gradient)
        length = _root(_total(g * g))
        return g / jnp.where(length > 0, length, 1.0)

    def to_hyperplane(self, x: Array, normal: Array, value: Array) -> Array:
        """See :meth:`Threat.to_hyperplane`: along the normal, as far as the box lets each."""
        way = self._way(x, normal, value)
        return way.sign * _fill(way.weight, way.weight, way.room, way.need)

    def distance(self, x: Array, x0: Array) -> Array:
        """``sqrt(sum (x - x0)^2)`` over features."""
        move = x - x0
        largest = jnp.max(jnp.abs(move), _features(x), keepdims=True, initial=0.0)
        # Powers of two change no digit; without them squares under- or overflow.
        scale = jnp.where(largest > 2.0**32, 2.0**-80, jnp.where(largest < 2.0**-32, 2.0**80, 1.0))
        length = jnp.sqrt(jnp.sum((scale * move) ** 2, _features(x)))
        return length / scale.reshape(length.shape)

    def widest(self, width: float, shape: tuple[int, ...]) -> float:
        """``width * sqrt(size)``."""
        return width * float(np.sqrt(np.prod(shape)))


@algorithm
class L1(Threat):
    """The absolute changes of all features may sum to at most ``eps``.

    Args:
        eps: radius in the units of the input; scalar or (B,).
        lo: lower end of the box; scalar or broadcastable to one example.
        hi: upper end of the box, likewise.
    """

    eps: ArrayLike
    lo: ArrayLike = 0.0
    hi: ArrayLike = 1.0
    norm: ClassVar[str] = "L1"

    def project(self, x: Array, x0: Array) -> Array:
        """The exact projection onto ball ∩ box (Croce & Hein 2021), ``x0`` being inside the box.

        The answer moves each feature by ``clip(|x - x0| - t, 0, room)``, where ``room`` is left in
        the box on that side, for the one ``t`` at which the moves sum to ``eps``. Projecting onto
        the ball and clipping afterwards is feasible, but falls short wherever the box binds. ``t``
        is found by bisection over the bits of a float32, 31 passes over the features; a Newton step
        from there makes it exact and gives it its derivative.

        The moves sum to at most ``eps`` in any number of dimensions, up to the rounding of the sum
        (2e-7 of it): each feature by itself is rounded towards ``x0``.
        """
        eps = expand(self.eps, x0).astype(x0.dtype)
        lo, hi = self._bounds(x0)
        move = x - x0
        sign = jnp.sign(move)
        room = jnp.maximum(jnp.where(move > 0, hi - x0, x0 - lo), 0.0)
        size = jnp.abs(move)
        inside = _total(jnp.minimum(size, room)) <= eps
        # A hair inside, so that what was projected is inside the next time.
        radius = eps * (1 - 2.0**-22)
        shift = _shift(*jax.lax.stop_gradient((size, room, radius)))
        moved = size > shift
        # Subtracted from x first, which is exact next to the shift: of a point far outside of the
        # box, x - x0 has lost the digits that count.
        left = jnp.where(moved, sign * ((x - sign * shift) - x0), 0.0)
        free = moved & (left <= room)
        excess = _total(jnp.clip(left, 0.0, room)) - radius
        left = jnp.clip(left - excess / jnp.maximum(_total(free), 1), 0.0, room)
        left = jnp.where(moved, left, 0.0)
        # One, but for rounding.
        total = _total(left)
        ratio = jnp.minimum(1.0, radius / jnp.where(total > 0, total, 1.0))
        left = left * jax.lax.stop_gradient(ratio)
        shrunk = _inward(jnp.clip(x0 + sign * left, lo, hi), x0, left)
        return jnp.where(inside, jnp.clip(x, lo, hi), shrunk)

    def sample(self, keys: Array, x0: Array) -> Array:
        """Uniform in the ball, then projected into the box.

        ``d`` exponential variables with random signs, over their sum and one more of them (Barthe
        et al. 2005).
        """

        def draw(key: Array) -> Array:
            direction, depth = jax.random.split(key)
            laplace = jax.random.laplace(direction, x0.shape[1:], x0.dtype)
            return laplace / (
                jnp.sum(jnp.abs(laplace)) + jax.random.exponential(depth, (), x0.dtype)
            )

        return self.project(x0 + expand(self.eps, x0) * jax.vmap(draw)(keys), x0)

    def steepest(self, gradient: Array, density: ArrayLike | None = None) -> Array:
        """The sign of the largest entries of the gradient, over their number.

        Args:
            gradient: (B, ...).
            density: share of the features to move, scalar or (B,) in (0, 1], at least one feature.
                None moves the single steepest one, along which the gradient ascends fastest; sparse
                L1 descent (Tramèr & Boneh 2019) moves a fixed share, L1-APGD (Croce & Hein 2021)
                one that falls from 0.2. Equal entries move together.
        """
        g = jnp.where(jnp.isnan(gradient), 0.0, gradient)
        size = np.prod(g.shape[1:], dtype=int)
        count = 1.0 if density is None else jnp.maximum(1.0, jnp.round(expand(density, g) * size))
        rank = jax.lax.stop_gradient(jnp.abs(g))
        above, equal = _tiers(rank, jnp.ones_like(rank), count)
        chosen = jnp.where(above | equal, jnp.sign(g), 0.0)
        return chosen / jnp.maximum(_total(jnp.abs(chosen)), 1.0)

    def ascend(self, x: Array, x0: Array, gradient: Array, size: ArrayLike) -> Array:
        """One projected step along the steepest direction that stays in the box.

        Fills features up to their bound, the steepest first, until the changes sum to ``size``: no
        other step of that length in the box gains as much to first order (the steepest step of
        Croce & Hein 2021). A single feature or a fixed share of them cannot do that: the first
        loses what goes beyond the bound, the second never leaves the features it shares the step
        between for the best ones.

        Each filled feature is pushed by ``size``, beyond its bound: the projection takes the same
        off all features, so what is held by the box stays full, and the worst case of a linear
        model, which one step of length ``eps`` from the input reaches, is where steps end.
        """
        g = jnp.where(jnp.isnan(gradient), 0.0, gradient)
        lo, hi = self._bounds(x)
        room = jnp.where(g > 0, hi - x, jnp.where(g < 0, x - lo, 0.0))
        size = expand(size, x)
        above, equal = _tiers(*jax.lax.stop_gradient((jnp.abs(g), room, size)))
        full, partly = (jnp.where(some, room, 0.0) for some in (above, equal))
        most = _total(partly)
        share = jnp.clip((size - _total(full)) / jnp.where(most > 0, most, 1.0), 0.0, 1.0)
        push = jnp.where(above, size, share * partly)
        return self.project(x + jnp.sign(g) * push, x0)

    def to_hyperplane(self, x: Array, normal: Array, value: Array) -> Array:
        """See :meth:`Threat.to_hyperplane`: features of most weight first, each up to its bound."""
        sign, weight, room, need = self._way(x, normal, value)
        progress = weight * room
        above, equal = _tiers(weight, progress, need)
        before = _total(jnp.where(above, progress, 0.0))
        last = _total(jnp.where(equal, progress, 0.0))
        share = jnp.clip((need - before) / jnp.where(last > 0, last, 1.0), 0.0, 1.0)
        part = jnp.where(equal, share, 0.0)
        return sign * room * jnp.where(above, 1.0, part)

    def distance(self, x: Array, x0: Array) -> Array:
        """``sum |x - x0|`` over features."""
        return jnp.sum(jnp.abs(x - x0), _features(x))

    def widest(self, width: float, shape: tuple[int, ...]) -> float:
        """``width * size``."""
        return width * float(np.prod(shape))


@algorithm
class L0(Threat):
    """At most ``eps`` locations may change, each to anything in the box.

    Args:
        eps: number of locations; scalar or (B,). ``check`` refuses fractions; inside ``jit``, where
            values cannot be checked, they are rounded down.
        lo: lower end of the box; scalar or broadcastable to one example.
        hi: upper end of the box, likewise.
        pixels: whether a location is a pixel, all entries of the last axis (channels last), or
            every single feature.
    """

    eps: ArrayLike
    lo: ArrayLike = 0.0
    hi: ArrayLike = 1.0
    pixels: bool = static(default=True)
    norm: ClassVar[str] = "L0"

    def _locations(self, values: Array) -> Array:
        """The sum over each location: (B, ..., C) -> (B, ..., 1) if that is a pixel."""
        return jnp.sum(values, -1, keepdims=True) if self.pixels else values

    def _count(self, x: Array) -> Array:
        return jnp.floor(expand(self.eps, x)).astype(x.dtype)

    def project(self, x: Array, x0: Array) -> Array:
        """The exact projection onto ball ∩ box (Croce & Hein 2019), ``x0`` being inside the box.

        Clips to the box, and keeps the locations whose change brings it closest to ``x``; of
        locations that are worth the same, the first. The others are those of ``x0`` to the bit.
        """
        lo, hi = self._bounds(x0)
        inside = jnp.clip(x, lo, hi)
        change = inside - x0
        # |x - x0|^2 - |x - inside|^2
        worth = self._locations(change * (2 * (x - x0) - change))
        return jnp.where(_best(worth, self._count(x0)), inside, x0)

    def sample(self, keys: Array, x0: Array) -> Array:
        """Uniform in ball ∩ box: ``eps`` locations, each set of them as likely, at any values.

        The released PGD_0 starts elsewhere, from the projection of uniform noise on all features.
        """
        lo, hi = self._bounds(x0)

        def draw(key: Array) -> tuple[Array, Array]:
            where, what = jax.random.split(key)
            shape = jax.eval_shape(self._locations, x0).shape[1:]
            return (
                jax.random.uniform(where, shape, x0.dtype),
                jax.random.uniform(what, x0.shape[1:], x0.dtype),
            )

        rank, values = jax.vmap(draw)(keys)
        values = jnp.clip(lo + values * (hi - lo), lo, hi)
        return jnp.where(_best(rank, self._count(x0)), values, x0)

    def steepest(self, gradient: Array) -> Array:
        """The gradient over the sum of its absolute values, as in PGD_0 (Croce & Hein 2019).

        How far a location moves costs nothing in this norm, so there is no direction of unit norm:
        a step is measured by the sum of its changes, and the projection decides which locations
        are worth keeping. The longer the step, the more that is decided by the gain to first order;
        the shorter, the more by the changes made before.
        """
        g = _scaled(gradient)
        total = _total(jnp.abs(g))
        return g / jnp.where(total > 0, total, 1.0)

    def step_size(self, x0: Array, steps: int, relative: ArrayLike | None = None) -> ArrayLike:
        """``relative`` multiples, one when None, of 20 sums of the widths of the box, (B,).

        The average feature is then moved by 20 widths, however many the steps: changes do not add
        up over steps as in the other norms, and at that length the projection keeps the locations
        of highest gain to first order, but for near-ties. PGD_0's released length for CIFAR-10,
        120000 / 255, is 0.15 sums of widths, where the changes made before count for more than the
        gradient.
        """
        lo, hi = self._bounds(x0)
        widths = jnp.sum(jnp.broadcast_to(hi - lo, x0.shape), _features(x0))
        return 20.0 * widths * (1.0 if relative is None else relative)

    def distance(self, x: Array, x0: Array) -> Array:
        """The number of locations at which ``x`` and ``x0`` differ."""
        return jnp.sum(self._locations((x != x0).astype(jnp.float32)) > 0, _features(x)).astype(
            jnp.float32
        )

    def widest(self, width: float, shape: tuple[int, ...]) -> float:
        """The number of locations."""
        return float(np.prod(shape[:-1] if self.pixels else shape))

    def check_shapes(self, x: Array) -> None:
        """See :meth:`Threat.check_shapes`; also refuses to count pixels without a channel axis."""
        super().check_shapes(x)
        if self.pixels and x.ndim < 3:
            raise ValueError(
                f"L0 counts pixels, whose channels are the last axis, but x of shape {x.shape} has "
                "only one feature axis; count features with L0(eps, pixels=False)"
            )

    def check(self, x: Array) -> None:
        """See :meth:`Threat.check`; also refuses fractions of a location."""
        eps = np.asarray(self.eps, np.float64)
        if np.any(eps != np.floor(eps)):
            raise ValueError(f"L0.eps counts locations, so it must be whole, got {self.eps}")
        super().check(x)
