"""Bandits: gradients that are remembered from one move to the next."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record
from jrobust.attacks._minimal import width
from jrobust.attacks._query import DifferenceAttack
from jrobust.threat import L2, Threat, expand

Array = jax.Array

# What is published for Linf, and for L2.
_DEFAULTS = {
    "rel_step_size": (0.2, 0.1),
    "prior_step_size": (100.0, 0.1),
    "exploration": (1.0, 0.01),
    "difference": (0.1, 0.01),
}


@algorithm
class Bandits(DifferenceAttack):
    """The attack with time- and data-dependent priors of Ilyas et al. (2019), "Bandits-TD".

    A prior ``v`` of the gradient, constant on tiles of pixels, is carried from move to move. Two
    queries, ``difference`` away along ``v + exploration u`` and ``v - exploration u`` with ``u`` of
    independent entries N(0, 1/d), say how to change it: by exponentiated gradients in Linf, where
    it stays in [-1, 1], by plain ones in L2. Then the point moves along it, by its signs or its
    direction.

    The first query is of the input, and a move costs three: the published counts leave out that for
    the verdict. Queries beside a point are not kept in the box.

    Inputs are images (B, H, W, C), or (B, H, W); of any rank with ``tile=1``. Published values,
    which are those of ``None``, are for ImageNet.

    Args:
        threat: the ball and box to stay in; Linf or L2.
        queries: forward passes of an example at most, those for the verdicts included.
        tile: about the side of a tile in pixels: ``ceil(H / tile)`` by ``ceil(W / tile)`` tiles
            cover the image. 1 for a prior of every feature, "Bandits-T".
        rel_step_size: length of a move in multiples of ``eps``; 0.2 in Linf, 0.1 in L2.
        prior_step_size: that of the prior; 100 in Linf, 0.1 in L2.
        exploration: length of the random part of a query's direction; 1 in Linf, 0.01 in L2.
        difference: L2 distance of the two queries from the point, in widths of the box; 0.1 in
            Linf, 0.01 in L2.
        loss: what to ascend, as in :class:`PGD`.
    """

    threat: Threat
    queries: int = static(default=10000)
    tile: int = static(default=6)
    rel_step_size: Any = None
    prior_step_size: Any = None
    exploration: Any = None
    difference: Any = None
    loss: losses.Loss = static(default=losses.cross_entropy)

    POSITIVE: ClassVar[tuple[str, ...]] = tuple(_DEFAULTS)

    @property
    def samples(self) -> int:  # type: ignore[override]
        """One pair for each move."""
        return 1

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses what is no image, unless ``tile`` is 1."""
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"Bandits.tile must be a positive int, got {self.tile!r}")
        super().check(x, y, classes, targets)
        self.shape(x)

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        return _DEFAULTS[name][isinstance(self.threat, L2)] if value is None else value

    def shape(self, x0: Array) -> tuple[int, ...]:
        """That of the prior."""
        if self.tile == 1:
            return x0.shape
        if x0.ndim not in (3, 4):
            raise ValueError(
                "Bandits with tiles needs images (B, H, W, C) or (B, H, W), got inputs of shape "
                f"{x0.shape}: reshape them, or use tile=1"
            )
        batch, height, width, *channels = x0.shape
        return batch, -(-height // self.tile), -(-width // self.tile), *channels

    def _tiled(self, prior: Array, like: Array) -> Array:
        """The prior at each feature (B, ...), that of the nearest tile."""
        if self.tile == 1:
            return prior
        for axis in (1, 2):
            size, tiles = like.shape[axis], prior.shape[axis]
            prior = jnp.take(prior, np.arange(size) * tiles // size, axis=axis)
        return prior

    def draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Of a length about 1."""
        return super().draw(key, shape) / np.float32(np.sqrt(np.prod(shape)))

    def open(self, record: Record) -> Array:
        """The prior; in Linf its inverse hyperbolic tangent."""
        return jnp.zeros_like(record.x0, shape=self.shape(record.x0))

    def _prior(self, own: Array) -> Array:
        # Exponentiated gradients on (1 + v) / 2 add to arctanh(v): there they neither overflow nor
        # end where v rounds to 1 or -1.
        return own if isinstance(self.threat, L2) else jnp.tanh(own)

    def probe(self, record: Record, own: Array, noise: Array, sign: Array) -> Array:
        """Along the prior and what is explored, normalised."""
        change = expand(sign * self._value("exploration"), noise) * noise
        way = L2(1.0).steepest(self._tiled(self._prior(own) + change, record.x0))
        return expand(self._value("difference") * width(record), way) * way

    def climb(self, record: Record, at: Array, total: Array, pairs: Array, own: Array) -> Any:
        """A step of the prior, and one of the point along it."""
        own = own + self._value("prior_step_size") / self._value("difference") * total
        gradient = self._tiled(self._prior(own), at)
        size = record.threat.eps * self._value("rel_step_size")
        return record.threat.ascend(at, record.x0, gradient, size), own


__all__ = ["Bandits"]
