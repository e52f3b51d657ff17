"""Adversarial robustness for JAX: attacks, training, certification, zeroth-order gradients.

Small pure functions over JAX arrays that compose under ``jit``, ``vmap`` and ``shard_map``.
"""

from jrobust import (
    attacks,
    checkpoint,
    data,
    debug,
    drive,
    ensembles,
    keys,
    loops,
    losses,
    models,
    parallel,
    report,
    smoothing,
    statistics,
    threat,
    training,
    weights,
    zeroth_order,
)
from jrobust._algorithm import algorithm, static
from jrobust._inspect import inspect
from jrobust._run import run, sweep

__version__ = "0.1.0"

__all__ = [
    "algorithm",
    "attacks",
    "checkpoint",
    "data",
    "debug",
    "drive",
    "ensembles",
    "inspect",
    "keys",
    "loops",
    "losses",
    "models",
    "parallel",
    "report",
    "run",
    "smoothing",
    "static",
    "statistics",
    "sweep",
    "threat",
    "training",
    "weights",
    "zeroth_order",
]
