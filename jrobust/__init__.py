"""Adversarial robustness for JAX: attacks, training, certification, zeroth-order gradients.

Small pure functions over JAX arrays that compose under ``jit``, ``vmap`` and ``shard_map``.
"""

from jrobust import attacks, drive, keys, losses, threat
from jrobust._run import run, sweep

__version__ = "0.1.0"

__all__ = ["attacks", "drive", "keys", "losses", "run", "sweep", "threat"]
