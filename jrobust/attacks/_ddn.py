"""DDN: the direction of a perturbation and its norm, found apart."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State
from jrobust.attacks._minimal import MinimalNorm, distance, furthest, into_box, norm, width
from jrobust.threat import Threat, expand

Array = jax.Array


@algorithm
class DDN(MinimalNorm):
    """Decoupled direction and norm, a minimal L2 attack (Rony et al. 2019, algorithm 1).

    Every move is a step along the normalised gradient, put onto a sphere around the input. The
    sphere shrinks by ``gamma`` where the point was adversarial and grows by it where not; the step
    falls from 1 to 0.01 widths of the box along a cosine. Where the gradient is zero the step goes
    in a random direction.

    Args:
        threat: ``L2``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        steps: moves from the input; costs ``steps`` gradients and ``steps + 1`` forward passes.
        init_norm: radius of the first sphere in widths of the box; scalar or (B,).
        gamma: by how much the radius changes in a move, relative to it.
        loss: what to ascend, as in :class:`PGD`.
        keep, quantize, estimator: see :class:`MinimalNorm`. The released code quantizes by default.
    """

    threat: Threat
    steps: int = static(default=100)
    init_norm: Any = 1.0
    gamma: Any = 0.05
    loss: losses.Loss = static(default=losses.cross_entropy)
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)
    estimator: Any = None

    NORMS: ClassVar[tuple[str, ...]] = ("L2",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("init_norm", "gamma")

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the radius."""
        return record.x0, self.init_norm * width(record)

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """A step along the gradient, onto the next sphere."""
        record, (hit, radius) = state.record, state.inner
        size = 0.01 + 0.99 * (1 + jnp.cos(jnp.pi * state.t / self.steps)) / 2
        radius = radius * jnp.where(hit, 1 - self.gamma, 1 + self.gamma)
        radius = jnp.minimum(radius, distance(record, furthest(record)))
        step = expand(size * width(record), state.x) * _direction(record, state.t, gradient)
        change = (state.x - record.x0) + step
        length = norm(change, 2)
        scale = radius / jnp.where(length > 0, length, 1.0)
        return into_box(record, record.x0 + expand(scale, change) * change), radius


def _direction(record: Record, t: Array, gradient: Array) -> Array:
    """The gradient over its norm; a random direction where it is zero."""
    unit = record.threat.steepest(gradient)
    flat = norm(unit, 2) == 0

    def drawn() -> Array:
        keys = _keys.fold(record.key, t)
        noise = jax.vmap(lambda key: jax.random.normal(key, unit.shape[1:], unit.dtype))(keys)
        return jnp.where(expand(flat, unit), record.threat.steepest(noise), unit)

    # As good as never: not drawn for nothing.
    if not isinstance(flat, jax.core.Tracer):
        return drawn() if flat.any() else unit
    return jax.lax.cond(jnp.any(flat), drawn, lambda: unit)
