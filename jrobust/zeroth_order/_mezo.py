"""Descent along random directions in the memory of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrobust import drive
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.zeroth_order import _directions
from jrobust.zeroth_order._estimator import (
    Array,
    Kept,
    PyTree,
    _arrays,
    check_value,
    counts,
    kept_numbers,
)
from jrobust.zeroth_order._random import RGE


class MeZOStep(NamedTuple):
    """What a step of :class:`MeZO` saw.

    Attributes:
        value: mean of ``fn`` over the points evaluated, ``fn`` at the parameters up to ``O(mu^2)``.
        quotients: (samples,) difference quotients; with the key, all there is to know of the step.
    """

    value: Array
    quotients: Array


@algorithm
class MeZO:
    """Zeroth-order SGD in the memory of inference (Malladi et al. 2023): no gradient, no direction.

    ``params - learning_rate (1/q sum_i D0(u_i) u_i + weight_decay params)`` with D0 the central
    quotient: SGD with the estimate of ``RGE(mu, samples, direction=..., antithetic=True)`` for
    this key. The directions are made from the key four times, array by array: to move the
    parameters ahead, behind and back, and for the update. With ``params`` donated, a step holds
    them once, and of anything of their size one array at a time.

    The parameters are moved in place, as in the published code, and rounding leaves them about a
    unit in the last place from where they were: keep them in float32.

    A run is its keys and quotients, four bytes each a step: :meth:`apply` makes a step from them
    again, without evaluating anything.

    Args:
        learning_rate: > 0.
        mu: the step of the differences, > 0; 1e-3 as published.
        weight_decay: decoupled, >= 0.
        samples: directions of a step, 1 as published; two queries each.
        direction: ``"gaussian"`` as published, ``"rademacher"`` or ``"spheres"``; see :class:`RGE`.
    """

    learning_rate: Any
    mu: Any = 1e-3
    weight_decay: Any = 0.0
    samples: int = static(default=1, kw_only=True)
    direction: str = static(default="gaussian", kw_only=True)

    def check(self, params: PyTree | None = None) -> None:
        """Raise for settings that make no sense, as :meth:`RGE.check`."""
        _directions.check_direction(self.direction, _directions.SEPARABLE)
        RGE(self.mu, self.samples, direction=self.direction, antithetic=True).check(params)

    def __call__(
        self,
        key: Array,
        fn: Callable[[PyTree], Array],
        params: PyTree,
        *,
        mask: PyTree | None = None,
    ) -> tuple[PyTree, MeZOStep]:
        """One step; pure, to be compiled with ``params`` donated.

        Args:
            key: one typed PRNG key, a new one for each step.
            fn: pytree like ``params`` -> scalar of float32 (or float64).
            params: pytree of float arrays.
            mask: as in :meth:`Estimator.__call__`; what it leaves out does not move, nor decay.

        Raises:
            TypeError, ValueError: as :class:`RGE` does.
        """
        _keys.check(key)
        params = _arrays(params)
        self.check(params)
        kept = kept_numbers(params, mask)

        def evaluate(params: PyTree, i: Any) -> tuple[PyTree, tuple[Array, Array]]:
            own = jax.random.fold_in(key, i)
            params = self._moved(own, params, self.mu, kept)
            ahead = fn(params)
            check_value(ahead, ())
            own = _after(own, ahead)
            params = self._moved(own, params, -2 * self.mu, kept)
            behind = fn(params)
            own = _after(own, behind)
            params = self._moved(own, params, self.mu, kept)
            return params, ((ahead + behind) / 2, (ahead - behind) / (2 * self.mu))

        if self.samples == 1:
            params, seen = evaluate(params, 0)
            values, quotients = jax.tree.map(jnp.atleast_1d, seen)
        else:
            order = jnp.arange(self.samples)
            params, (values, quotients) = jax.lax.scan(drive.rewrite(evaluate), params, order)
        key = _after(key, quotients[-1] + jnp.ravel(jax.tree.leaves(params)[-1])[:1].sum())
        new = self.apply(key, params, quotients, mask=mask)
        return new, MeZOStep(jnp.mean(values), quotients)

    def apply(
        self, key: Array, params: PyTree, quotients: Array, *, mask: PyTree | None = None
    ) -> PyTree:
        """The parameters after the step that had these ``quotients`` (samples,) with this key."""
        kept = kept_numbers(params, mask)
        shrunk = self._decayed(params, kept)

        def move(i: Any, params: PyTree) -> PyTree:
            size = -self.learning_rate * quotients[i] / self.samples
            return self._moved(jax.random.fold_in(key, i), params, size, kept, scaled=True)

        return move(0, shrunk) if self.samples == 1 else drive.loop(self.samples, move, shrunk)

    def _moved(
        self, key: Array, params: PyTree, size: Any, kept: Kept, scaled: bool = False
    ) -> PyTree:
        """``params + size u``, or ``params + size c u``, array by array."""
        leaves, tree = jax.tree.flatten(params)
        sizes, new = counts(leaves, kept), []
        for i, (leaf, k) in enumerate(zip(leaves, kept)):

            def move(leaf: Array, key: Array, i: int = i, k: Any = k) -> Array:
                dtype = jnp.result_type(jnp.float32, leaf)
                u = _directions.part(self.direction, key, i, sizes[i], dtype)
                if scaled and self.direction == "spheres":
                    u = sizes[i] * u
                return _add(leaf, (size * u).astype(dtype), k)

            if leaf.size:
                leaf, key = _in_turn(move, leaf, key)
            new.append(leaf)
        return jax.tree.unflatten(tree, new)

    def _decayed(self, params: PyTree, kept: Kept) -> PyTree:
        leaves, tree = jax.tree.flatten(params)
        rate = -self.learning_rate * self.weight_decay

        def decayed(leaf: Array, k: Any) -> Array:
            own = jnp.ravel(leaf) if k is None else jnp.ravel(leaf)[k]
            return _add(leaf, rate * own.astype(jnp.result_type(jnp.float32, leaf)), k)

        return jax.tree.unflatten(tree, list(map(decayed, leaves, kept)))


def _add(leaf: Array, change: Array, kept: Any) -> Array:
    """``leaf`` with ``change``, of all its numbers or of those kept, added in its dtype."""
    if kept is None:
        return (leaf + change.reshape(leaf.shape)).astype(leaf.dtype)
    flat = jnp.ravel(leaf)
    return flat.at[kept].set((flat[kept] + change).astype(leaf.dtype)).reshape(leaf.shape)


def _in_turn(move: Callable[[Array, Array], Array], leaf: Array, key: Array) -> tuple[Array, Array]:
    """``move(leaf, key)``, and the key, which is not known before.

    In a loop whose length, 1, the compiler cannot know: otherwise it would make all parts of a
    direction at once, and those of one key once and for all, and hold them. (It drops optimisation
    barriers before it plans memory on the CPU.) A NaN is left where it is.
    """
    impl = jax.random.key_impl(key)

    def body(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        leaf, key = carry[0], jax.random.wrap_key_data(carry[1], impl=impl)
        leaf = move(leaf, key)
        return leaf, jax.random.key_data(_after(key, jnp.ravel(leaf)[0]))

    first = jnp.ravel(leaf)[:1].sum()
    once = (first == first).astype(jnp.int32)
    leaf, data = jax.lax.fori_loop(0, once, body, (leaf, jax.random.key_data(key)))
    return leaf, jax.random.wrap_key_data(data, impl=impl)


def _after(key: Array, value: Array) -> Array:
    """``key``, which is not known before the number ``value`` is; another one if that is NaN."""
    data = jax.random.key_data(key)
    data = jnp.where(value == value, data, ~data)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
