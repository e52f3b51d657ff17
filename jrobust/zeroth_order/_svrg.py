"""Variance reduction over the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jrobust._algorithm import algorithm
from jrobust.zeroth_order._estimator import Estimator, PyTree


class Anchor(NamedTuple):
    """A point and the estimated gradient there of the whole objective."""

    x: PyTree
    grad: PyTree


@algorithm
class SVRG:
    """Zeroth-order SVRG (Liu et al. 2018): estimates on a batch, corrected by one on all the data.

    ``grad = g_batch(x) - g_batch(anchor.x) + anchor.grad``, where the anchor is renewed every so
    many steps. Both estimates on the batch take the same key, so that with :class:`RGE` they are
    along the same directions: at the anchor the correction vanishes to the bit, and near it its
    variance is that of the data times the squared distance. (In the released code they are
    independent, and it stays.) The price is two estimates a step.

    Args:
        estimator: :class:`CGE` (the paper's ZO-SVRG-Coord) or :class:`RGE` (with many samples its
            ZO-SVRG-Ave).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jrobust.zeroth_order import CGE, SVRG
        >>> data = jnp.array([0.0, 2.0, 4.0])
        >>> loss = lambda rows: lambda x: jnp.mean((x - data[rows]) ** 2) / 2
        >>> svrg, x = SVRG(CGE(2.0**-5)), jnp.array(1.0)
        >>> anchor = svrg.anchor(None, loss(jnp.arange(3)), x)
        >>> value, grad = svrg(None, loss(jnp.array([2])), x + 0.5, anchor)
        >>> print(grad)  # of all the data: 1.5 - 2
        -0.5
    """

    estimator: Estimator

    def anchor(self, key: Any, fn: Callable[[PyTree], Any], x: PyTree, **options: Any) -> Anchor:
        """The anchor at ``x``; ``fn`` is the objective over all the data."""
        return Anchor(x, self.estimator(key, fn, x, **options)[1])

    def __call__(
        self, key: Any, fn: Callable[[PyTree], Any], x: PyTree, anchor: Anchor, **options: Any
    ) -> tuple[Any, PyTree]:
        """``fn(x)`` and the corrected estimate; ``fn`` is the objective over a batch.

        ``options`` are ``mask`` and ``has_aux`` of :meth:`Estimator.__call__`, the mask that of
        the anchor.
        """
        value, here = self.estimator(key, fn, x, **options)
        _, there = self.estimator(key, fn, anchor.x, **options)
        # In this order, so that at the anchor the first two cancel exactly.
        return value, jax.tree.map(lambda g, h, a: g - h + a, here, there, anchor.grad)
