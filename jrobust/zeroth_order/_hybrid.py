"""Two estimators for one point: coordinates where they are few, directions for the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust._algorithm import algorithm, static
from jrobust.zeroth_order._estimator import (
    Array,
    Estimator,
    Kept,
    Plan,
    PyTree,
    counts,
    kept_numbers,
)

_ONE_EXAMPLE = "Hybrid divides the leaves of one x among two estimators: per_example has no use"


@algorithm
class Hybrid(Estimator):
    """One estimator for the small leaves of ``x``, and another for the rest.

    ``Hybrid(CGE(1e-2), RGE(1e-2, 32), 64)`` goes coordinate by coordinate through leaves of up to
    64 numbers (biases, the small cores of a tensor train), where that is cheap and has no variance,
    and along random directions through all others together, whose variance is then that of their
    own numbers alone. Each part is what its estimator gives with a mask that keeps its leaves:
    the other leaves stay where they are. Tensor-train training of Zhao et al. 2023
    ("Tensor-compressed back-propagation-free training for (physics-informed) neural networks")
    combines the two.

    Args:
        small: estimator of the leaves of at most ``limit`` numbers.
        large: estimator of the others. Both take the same key; two :class:`RGE` draw their
            directions apart, as they do for different leaves.
        limit: numbers in a leaf, at least 0; how many of them a mask keeps plays no part.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jrobust.zeroth_order import CGE, RGE, Hybrid
        >>> fn = lambda p: jnp.sum(p["w"] ** 2) + 3 * p["b"]
        >>> hybrid = Hybrid(CGE(2.0**-5), RGE(1e-3, 8), limit=1)
        >>> value, grad = hybrid(jax.random.key(0), fn, {"w": jnp.ones(100), "b": jnp.array(1.0)})
        >>> print(value, grad["b"], grad["w"].shape)
        103.0 3.0 (100,)

    See :class:`Estimator` for the call; there is no ``per_example``.
    """

    small: Estimator
    large: Estimator
    limit: int = static()

    def check(self, x: PyTree | None = None, *, batched: bool = False) -> None:
        """See :meth:`Estimator.check`, of both parts; also for ``limit`` and ``batched``."""
        for part in (self.small, self.large):
            if not isinstance(part, Estimator):
                raise TypeError(f"Hybrid needs instances such as CGE(5e-3), got {part!r}")
            part.check()
        if not isinstance(self.limit, int) or self.limit < 0:
            raise ValueError(f"limit must be an int >= 0, got {self.limit!r}")
        if batched:
            raise ValueError(_ONE_EXAMPLE)
        if x is not None:
            for part, leaves in zip(self._parts, self._divided(jax.tree.leaves(x))):
                if leaves:
                    part.check(leaves)

    @property
    def _parts(self) -> tuple[Estimator, Estimator]:
        return self.small, self.large

    def _owner(self, leaf: Any) -> int:
        return int(math.prod(jnp.shape(leaf)) > self.limit)

    def _divided(self, leaves: Sequence[Any]) -> list[list[Any]]:
        return [[leaf for leaf in leaves if self._owner(leaf) == i] for i in (0, 1)]

    def _check_point(self, leaves: Sequence[Any], d: int, batched: bool) -> None:
        for part, own in zip(self._parts, self._divided(leaves)):
            if own:
                part._check_point(own, min(d, sum(counts(own))), batched)

    def queries(self, x: PyTree, mask: PyTree | None = None) -> int:
        """See :meth:`Estimator.queries`: the sum of both, each of which evaluates ``fn(x)``."""
        leaves, treedef = jax.tree.flatten(x)
        sizes = counts(leaves, kept_numbers(x, mask))
        total = 0
        for i, part in enumerate(self._parts):
            own = [n if self._owner(leaf) == i else 0 for leaf, n in zip(leaves, sizes)]
            if any(own):
                like = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in own]
                total += part.queries(x, jax.tree.unflatten(treedef, like))
        return total

    def _estimate(
        self, key: Any, fn: Callable[[PyTree], tuple[Array, PyTree]], x: PyTree, kept: Kept
    ) -> tuple[Array, PyTree, Array]:
        leaves = jax.tree.leaves(x)
        nothing = np.zeros(0, np.int32)
        found: list[Any] = [None] * len(leaves)
        for i, part in enumerate(self._parts):
            own = [k if self._owner(leaf) == i else nothing for leaf, k in zip(leaves, kept)]
            sizes = counts(leaves, own)
            if not any(sizes):
                continue
            value, aux, flat = part._estimate(key[i], fn, x, own)
            for j, piece in enumerate(jnp.split(flat, np.cumsum(sizes)[:-1])):
                found[j] = piece if self._owner(leaves[j]) == i else found[j]
        return value, aux, jnp.concatenate([piece for piece in found if piece is not None])

    def _key(self, key: Any, shape: tuple[int, ...]) -> Any:
        return [part._key(key, shape) for part in self._parts]

    def _plan(self, d: int) -> Plan:
        raise TypeError(_ONE_EXAMPLE)

    def _direction(self, key: Any, i: Array, d: int, dtype: Any) -> Array:
        raise TypeError(_ONE_EXAMPLE)
