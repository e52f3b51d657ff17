"""Boundary attack: a random walk along the boundary towards the input, from decisions alone."""

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
from jrobust.attacks._minimal import distance, into_box, norm
from jrobust.threat import Threat, expand

Array = jax.Array

_START, _BISECT, _LOOK, _WALK = range(4)

# The sphere is looked at before every tenth step; the answers to so many looks, and to so many
# steps, decide how long the next ones are.
_EVERY, _LOOKS, _STEPS = 10, 10, 30


class _Answers(NamedTuple):
    asked: Array  # (B,) int32 since the length of the step was last decided
    hits: Array  # (B,) int32


class _Walk(NamedTuple):
    phase: Array  # (B,) int32
    order: Any  # (B, N) int32 the starts, nearest first
    way: Way  # to the start; its near end is where the walk is
    spherical: Array  # (B,) length of the step on the sphere, relative to the sphere's radius
    source: Array  # (B,) length of the step towards the input, likewise
    steps: Array  # (B,) int32 steps tried
    looks: _Answers  # on the sphere
    ends: _Answers  # of steps


@algorithm
class Boundary(DecisionAttack):
    """The boundary attack (Brendel, Rauber & Bethge 2018), minimal in L2, from decisions alone.

    A random walk: each step goes in a random direction along the sphere around the input, then
    towards the input, and is taken if it ends at an adversarial point that is closer. Where more
    than half of the points on the sphere are adversarial, both steps grow, below a fifth they
    shrink; likewise the step towards the input above a quarter and below a tenth of the steps. The
    walk begins where a segment to noise, or to one of ``starts``, meets the boundary.

    Lengths are decided anew after 10 looks at the sphere, one in ten steps, and after 30 steps.
    The released versions wait for 100 looks and for 30 of the steps beside them: a thousand
    queries and three hundred, in which the walk goes nowhere while its steps are too long.

    Args:
        threat: ``L2``; ``eps`` is the largest distance that counts, see :class:`MinimalNorm`.
        queries: points to ask about at most, the input included.
        spherical_step: length of the first steps along the sphere, relative to its radius.
        source_step: length of the first steps towards the input, likewise.
        step_adaptation: factor by which steps grow or shrink; no step is longer than the radius.
        starts, keep, quantize: as in :class:`HopSkipJump`.
    """

    threat: Threat
    queries: int = static(default=25_000)
    spherical_step: Any = 0.01
    source_step: Any = 0.01
    step_adaptation: Any = 1.5
    starts: Any = None
    keep: str = static(default="closest")
    quantize: int | None = static(default=None)

    NORMS: ClassVar[tuple[str, ...]] = ("L2",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("spherical_step", "source_step", "step_adaptation")

    @property
    def random(self) -> bool:
        """Steps are drawn."""
        return True

    def start(self, record: Record) -> tuple[Array, Any]:
        """The input; carries the search for a start."""
        none, zero = jnp.zeros_like(record.y), jnp.zeros_like(record.loss)
        return record.x0, _Walk(
            none + _START,
            ranked(record, self.starts),
            no_way(record),
            zero + self.spherical_step,
            zero + self.source_step,
            none,
            _Answers(none, none),
            _Answers(none, none),
        )

    def propose(self, state: State) -> tuple[Array, Any]:
        """A start, the middle of an interval, a point on the sphere or the end of a step."""
        record, (hit, s) = state.record, state.inner
        starts, bisects, looks, walks = (s.phase == p for p in (_START, _BISECT, _LOOK, _WALK))
        begins = hit & starts
        way = shorten(record, s.way, state.x, hit, begins, bisects)
        arrives = bisects & settled(way.low, way.high, 1e-3 * distance(record, way.far))
        closer = walks & hit & (distance(record, state.x) < distance(record, way.near))
        way = way._replace(near=where(closer, state.x, way.near))

        steps = s.steps + walks
        seen, both = _decide(s.looks, looks, hit, _LOOKS, 0.2, 0.5, self.step_adaptation)
        ends, own = _decide(s.ends, walks, hit, _STEPS, 0.1, 0.25, self.step_adaptation)
        spherical = jnp.minimum(s.spherical * both, 1.0)
        source = jnp.minimum(s.source * both * own, 1.0)
        phase = jnp.where(begins, _BISECT, jnp.where(looks, _WALK, s.phase))
        phase = jnp.where(arrives | walks, jnp.where(steps % _EVERY == 0, _LOOK, _WALK), phase)

        # The step after a look at the sphere is by the same noise.
        noise = uniform(record.key, state.t + 1 - looks, record.x0)
        sphere, end = _step(record, way.near, normal(noise), spherical, source)
        x = where(phase == _LOOK, sphere, end)
        x = where(phase == _BISECT, along(record, way), x)
        start = candidate(record, state.t, noise, self.starts, s.order)
        x = where(phase == _START, start, x)
        return x, _Walk(phase, s.order, way, spherical, source, steps, seen, ends)


def _decide(
    answers: _Answers, asked: Array, hit: Array, enough: int, few: float, many: float, by: Any
) -> tuple[_Answers, Array]:
    """The count with the answers of the lanes ``asked`` (B,), and the factor for the steps (B,)."""
    answers = _Answers(answers.asked + asked, answers.hits + (asked & hit))
    full = answers.asked >= enough
    share = answers.hits / enough
    factor = jnp.where(share > many, by, jnp.where(share < few, 1 / by, 1.0))
    none = jnp.zeros_like(answers.asked)
    return where(full, _Answers(none, none), answers), jnp.where(full, factor, 1.0)


def _step(
    record: Record, near: Array, noise: Array, spherical: Array, source: Array
) -> tuple[Array, Array]:
    """From ``near`` along the sphere, and from there towards the input: both points."""
    x0 = record.x0
    home = x0 - near
    radius, unit = norm(home, 2), record.threat.steepest(home)
    features = tuple(range(1, x0.ndim))
    side = record.threat.steepest(noise - unit * jnp.sum(noise * unit, features, keepdims=True))
    turned = (expand(spherical * radius, x0) * side - home) / expand(jnp.sqrt(1 + spherical**2), x0)
    sphere = into_box(record, x0 + turned)
    # The box may have brought it closer already.
    left = norm(x0 - sphere, 2)
    length = jnp.maximum(left - (1 - source) * radius, 0.0) / jnp.where(left > 0, left, 1.0)
    return sphere, into_box(record, sphere + expand(length, x0) * (x0 - sphere))


__all__ = ["Boundary"]
