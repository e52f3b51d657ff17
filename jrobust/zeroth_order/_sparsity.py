"""Which weights to estimate: ZO-GraSP scores, what they say of the layers, and masks redrawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jrobust import weights
from jrobust.zeroth_order._estimator import Array, Estimator, PyTree


def grasp(
    key: Any,
    fn: Callable[[PyTree], Array],
    params: PyTree,
    estimator: Estimator,
    *,
    step: Any = 5e-3,
) -> PyTree:
    """GraSP scores ``-theta * (H g)`` from values: ZO-GraSP (Chen et al. 2024, DeepZero).

    The score of a weight is half of what the squared norm of the gradient gains, to first order,
    when the weight is set to zero (Wang, Zhang and Grosse 2020): the lowest are to be kept, those
    without which the gradient would shrink. ``H g`` is ``(g(theta + step g) - g(theta)) / step``
    with both estimates along the same directions, those of ``key``. (In DeepZero's released code
    they are independent, so that the difference is mostly their noise, of variance
    ``2 Var(g) / step^2``; and the sign is lost, for the largest absolute scores are kept.)

    Args:
        key: one typed PRNG key; None will do for :class:`CGE`.
        fn: the loss, pytree like ``params`` -> scalar of float32; published on 25 examples of each
            class.
        params: pytree of float arrays.
        estimator: ``RGE(5e-3, 192)`` as published; exact on quadratics with ``CGE(mu)``.
        step: how far along g, > 0.

    Returns:
        Scores like ``params``; see :func:`grasp_ratios`.

    Raises:
        TypeError, ValueError: as the estimator does; ``step`` is not positive.
    """
    if not isinstance(step, jax.core.Tracer) and not float(step) > 0:
        raise ValueError(f"step must be positive, got {step}")
    grad = estimator(key, fn, params)[1]
    moved = jax.tree.map(lambda p, g: (p + step * g).astype(p.dtype), params, grad)
    ahead = estimator(key, fn, moved)[1]
    return jax.tree.map(lambda p, g, h: -p * ((h - g) / step), params, grad, ahead)


def grasp_ratios(scores: PyTree, keep: float) -> PyTree:
    """The share of each array in the mask of the lowest scores over all weights; reads values.

    Only these shares, not the mask, are used by DeepZero: see :func:`redraw`.

    Args:
        scores: of :func:`grasp`.
        keep: in (0, 1], the share of all weights to keep. Weights are the arrays of two axes and
            more; of others (biases, batch-norm) all are kept, and they do not count.

    Returns:
        A tree of Python floats in [0, 1].

    Raises:
        ValueError: ``keep`` is out of range, or there are no weights.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    leaves, tree = jax.tree.flatten(scores)
    where = [i for i, leaf in enumerate(leaves) if np.ndim(leaf) > 1]
    total = sum(np.size(leaves[i]) for i in where)
    if not total:
        raise ValueError("scores has no array of two axes or more, so there are no weights")
    mask = weights.top_k([-leaves[i] for i in where], max(1, round(keep * total)))
    shares = dict(zip(where, weights.layer_ratios(mask)))
    return jax.tree.unflatten(tree, [shares.get(i, 1.0) for i in range(len(leaves))])


def redraw(key: Array, params: PyTree, ratios: PyTree) -> PyTree:
    """A random mask with these shares of each array, as flat indices: new values, same shapes.

    Args:
        key: one typed PRNG key.
        params: pytree of arrays, of which the shapes matter.
        ratios: tree of Python floats in [0, 1], of :func:`grasp_ratios` or your own.

    Returns:
        A tree of int32 arrays, for ``mask=`` of an estimator.

    Raises:
        TypeError, ValueError: as :func:`jrobust.weights.random_by_layer` does.
    """
    mask = weights.random_by_layer(key, params, ratios)
    counts = jax.tree.map(lambda p, share: round(float(share) * np.size(p)), params, ratios)
    return weights.indices(mask, counts)
