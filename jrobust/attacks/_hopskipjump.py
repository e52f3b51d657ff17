"""HopSkipJump: steps along gradients that are estimated at the boundary from decisions alone."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State, where
from jrobust.attacks._decision import (
    DecisionAttack,
    Way,
    along,
    candidate,
    no_way,
    normal,
    ranked,
    settled,
    shorten,
    uniform,
)
from jrobust.attacks._minimal import distance, into_box, width
from jrobust.threat import L2, Threat, expand

Array = jax.Array

_START, _BISECT, _PROBE, _JUMP = range(4)


class _Search(NamedTuple):
    phase: Array  # (B,) int32
    order: Any  # (B, N) int32 the starts, nearest first
    way: Way  # to the start, or to the end of the last step
    turn: Array  # (B,) int32 gradients begun
    made: Array  # (B,) int32 probes made for this one
    hits: Array  # (B,) int32 those that were adversarial
    size: Array  # (B,) distance of probes, then length of the step
    total: Array  # (B, ...) sum of the probes' directions
    signed: Array  # (B, ...) with the sign of their answers; then the direction of the step


@algorithm
class HopSkipJump(DecisionAttack):
    """HopSkipJumpAttack (Chen, Jordan & Wainwright 2020) in L2 and Linf, from decisions alone.

    In turns: bisection from an adversarial point towards the input up to the boundary; the
    direction of the gradient there, from the decisions at random points around; a step along it,
    which is halved until it ends at an adversarial point. The first such point is noise, or comes
    from ``starts``. All points that were asked about may be returned, which steps that lead away
    do not spoil.

    Two lengths have a floor, because points are float32: the interval of a bisection is at least
    2^-22 of the way, and probes change features by 2^-20 widths of the box at least, in the mean
    square; with ``quantize`` by half a level. (In Linf, with the 150,528 features of ImageNet, the
    published ones are 4e-11 and, at a distance of 0.03, 5e-10.)

    Args:
        threat: ``L2`` or ``Linf``; ``eps`` is the largest distance that counts, see
            :class:`MinimalNorm`.
        queries: points to ask about at most, the input included.
        initial_probes: points around the first boundary point; after ``t`` turns ``sqrt(t)`` times
            as many.
        max_probes: their number at most.
        gamma: factor of the interval at which a bisection ends, relative to its way, which is
            ``gamma / d^1.5`` (L2) or ``gamma / d^2`` (Linf) for ``d`` features, and of the distance
            of the probes, which is ``gamma / d`` of that way (in the first turn a tenth of the
            width of the box).
        starts: inputs (N, ...) to start from, and their labels (N,), as a pair. Those of the target
            class, or of any but the true one, are tried first, the nearest before others; each is a
            query. Where none is adversarial, or with None, noise is tried: uniform in the box,
            every other time blended with the input. It rarely is of a class that is asked for.
        keep: see :class:`MinimalNorm`.
        quantize: number of grey levels, 256 for 8-bit images; points are rounded to them before
            they are asked about.
    """

    threat: Threat
    queries: int = static(default=25_000)
    initial_probes: Any = 100.0
    max_probes: Any = 10_000.0
    gamma: Any = 1.0
    starts: Any = None
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)

    NORMS: ClassVar[tuple[str, ...]] = ("L2", "Linf")
    POSITIVE: ClassVar[tuple[str, ...]] = ("initial_probes", "max_probes", "gamma")

    @property
    def random(self) -> bool:
        """Probes are drawn."""
        return True

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the search for a start."""
        none, zero, flat = (jnp.zeros_like(v) for v in (record.y, record.loss, record.x0))
        return record.x0, _Search(
            none + _START,
            ranked(record, self.starts),
            no_way(record),
            none,
            none,
            none,
            zero,
            flat,
            flat,
        )

    def propose(self, state: State) -> tuple[Array, Any]:
        """A start, the middle of an interval, a probe or the end of a step."""
        record, (hit, s) = state.record, state.inner
        x0, wide = record.x0, width(record)
        count, linf = x0[0].size, record.threat.norm == "Linf"
        bisects, probes, jumps = (s.phase == phase for phase in (_BISECT, _PROBE, _JUMP))

        # Bisection of the way to a start, or to the end of a step.
        begins = hit & ~bisects & ~probes
        way = shorten(record, s.way, state.x, hit, begins, bisects)
        reach = distance(record, way.far)
        theta = jnp.maximum(self.gamma / count ** (2 if linf else 1.5), 2.0**-22)
        arrives = bisects & settled(way.low, way.high, theta * reach)
        turn = s.turn + arrives

        # Probes: the sum of their directions, and that with the signs of their answers.
        shift = (state.x - way.near) / expand(jnp.where(probes, s.size, 1.0), x0)
        shift = jnp.where(expand(probes, x0), shift, 0.0)
        signed = s.signed + expand(jnp.where(hit, 1.0, -1.0), x0) * shift
        total, made, hits = s.total + shift, s.made + probes, s.hits + (probes & hit)
        enough = jnp.minimum(self.initial_probes * jnp.sqrt(1.0 * turn), self.max_probes)
        complete = probes & (made >= jnp.floor(enough))
        # Answers that are all alike count as they are, others by how they differ from their mean.
        mixed = (hits > 0) & (hits < made)
        mean = jnp.where(mixed, 2.0 * hits / jnp.maximum(made, 1) - 1.0, 0.0)
        ascent = record.threat.steepest(signed - expand(mean, x0) * total)

        fine = 2.0**-20 if self.quantize is None else 0.5 / (self.quantize - 1)
        around = jnp.maximum(self.gamma * reach / count, fine * count**0.5 * wide)
        around = jnp.where(turn == 1, 0.1 * wide, around)
        step = distance(record, way.near) / jnp.sqrt(jnp.maximum(turn, 1))
        size = jnp.where(jumps, s.size / 2, s.size)
        size = jnp.where(arrives, around, jnp.where(complete, step, size))
        phase = jnp.where(begins, _BISECT, jnp.where(arrives, _PROBE, s.phase))
        phase = jnp.where(complete, _JUMP, phase)
        none, flat = jnp.zeros_like(made), jnp.zeros_like(x0)
        s = _Search(
            phase,
            s.order,
            way,
            turn,
            jnp.where(arrives, none, made),
            jnp.where(arrives, none, hits),
            size,
            where(arrives, flat, total),
            where(arrives, flat, where(complete, ascent, signed)),
        )

        noise = uniform(record.key, state.t + 1, x0)
        probe = L2(1.0).steepest(noise if linf else normal(noise))
        direction = where(phase == _JUMP, s.signed, probe)
        x = into_box(record, way.near + expand(size, x0) * direction)
        x = where(phase == _BISECT, along(record, way), x)
        start = candidate(record, state.t, noise, self.starts, s.order)
        return where(phase == _START, start, x), s


__all__ = ["HopSkipJump"]
