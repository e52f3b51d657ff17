"""Gradients from function values alone: estimators that stand where ``jax.value_and_grad`` stands.

An estimator is called ``estimator(key, fn, x) -> (value, grad)``. :class:`CGE` goes coordinate by
coordinate, :class:`RGE` along random directions, :func:`value_and_grad` gives either the calling
convention of ``jax.value_and_grad``, and :func:`surrogate` lets ``jax.grad`` pass through a
function that has no useful derivative. :func:`differencer` computes f(x + dx) - f(x) itself,
without cancellation.
"""

from jrobust.zeroth_order._coordinate import CGE
from jrobust.zeroth_order._difference import (
    DifferenceWarning,
    OneHot,
    difference,
    differencer,
)
from jrobust.zeroth_order._estimator import Estimator
from jrobust.zeroth_order._random import RGE
from jrobust.zeroth_order._transforms import surrogate, value_and_grad

__all__ = [
    "CGE",
    "RGE",
    "DifferenceWarning",
    "Estimator",
    "OneHot",
    "difference",
    "differencer",
    "surrogate",
    "value_and_grad",
]
