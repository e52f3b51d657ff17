"""Gradients from function values alone: estimators that stand where ``jax.value_and_grad`` stands.

An estimator is called ``estimator(key, fn, x, mask=None, has_aux=False) -> (value, grad)``.
:class:`CGE` goes coordinate by coordinate, :class:`RGE` along random directions,
:func:`value_and_grad` gives either the calling convention of ``jax.value_and_grad``, and
:func:`surrogate` lets ``jax.grad`` pass through a function that has no useful derivative.
:func:`differencer` computes f(x + dx) - f(x) itself, without cancellation, and :func:`stein` the
derivatives of a smoothed function from its values at the nodes of a sparse grid. :class:`BlackBox`
asks a function, a process or a server, counting and keeping every answer.
"""

from jrobust.zeroth_order._activation import ActivationCGE
from jrobust.zeroth_order._blackbox import (
    HTTP,
    BlackBox,
    BudgetExceeded,
    Ledger,
    Service,
    Subprocess,
)
from jrobust.zeroth_order._coordinate import CGE
from jrobust.zeroth_order._curvature import HiZOO
from jrobust.zeroth_order._difference import (
    DifferenceWarning,
    OneHot,
    difference,
    differencer,
)
from jrobust.zeroth_order._estimator import Estimator
from jrobust.zeroth_order._hybrid import Hybrid
from jrobust.zeroth_order._mezo import MeZO, MeZOStep
from jrobust.zeroth_order._random import RGE, one_point
from jrobust.zeroth_order._sparsity import grasp, grasp_ratios, redraw
from jrobust.zeroth_order._stein import Stein, sparse_grid, stein
from jrobust.zeroth_order._svrg import SVRG, Anchor
from jrobust.zeroth_order._transforms import surrogate, value_and_grad

__all__ = [
    "CGE",
    "HTTP",
    "RGE",
    "SVRG",
    "ActivationCGE",
    "Anchor",
    "BlackBox",
    "BudgetExceeded",
    "DifferenceWarning",
    "Estimator",
    "HiZOO",
    "Hybrid",
    "Ledger",
    "MeZO",
    "MeZOStep",
    "OneHot",
    "Service",
    "Stein",
    "Subprocess",
    "difference",
    "differencer",
    "grasp",
    "grasp_ratios",
    "one_point",
    "redraw",
    "sparse_grid",
    "stein",
    "surrogate",
    "value_and_grad",
]
