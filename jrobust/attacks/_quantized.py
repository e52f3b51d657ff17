"""Points that exist as images of a given number of levels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import drive
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Attack, AttackResult, LogitsFn, Record
from jrobust.attacks._compose import _Composition, _members, _Wrapper
from jrobust.attacks._minimal import check_grid, grid, levels_of, within
from jrobust.models import Randomized
from jrobust.threat import Threat

Array = jax.Array

# Halvings of the interval in which the threshold of rounding is sought: it is found to 1/128.
_HALVINGS = 6


@algorithm
class Quantized(_Wrapper):
    """Runs an attack whose points are judged and returned rounded; see :func:`quantized`."""

    attack: Attack
    levels: int = static(default=256)

    def threats(self) -> tuple[Threat, ...]:
        """See :meth:`Attack.threats`; raises ``TypeError`` unless it is one norm ball."""
        threats = super().threats()
        if len(threats) != 1 or threats[0].norm not in ("Linf", "L2", "L1", "L0"):
            raise TypeError(
                f"quantized rounds points inside one norm ball, not inside {threats}: of several "
                "norms, make a union of attacks"
            )
        return threats

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses a grid that the inputs are not on."""
        super().check(x, y, classes, targets)
        check_grid("quantized", self.threats()[0], x, self.levels)

    def inner(self, state: Any) -> Any:
        """The state itself."""
        return state

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> Any:
        """See :meth:`Attack.init`."""
        return self.attack.init(keys, x, y, targets)

    def reopen(self, record: Record) -> Any:
        """See :meth:`Attack.reopen`."""
        return self.attack.reopen(record)

    def _judge(self, state: Any, model: LogitsFn) -> LogitsFn:
        record = state.record

        def change(x: Array) -> Array:
            return rounded_inside(record, x, self.levels)

        if drive.is_host(model):
            return drive.changed(drive.asking(model, ~self.done(state)), change)
        if isinstance(model, Randomized):
            return dataclasses.replace(model, fn=lambda keys, x: model.fn(keys, change(x)))
        return lambda x: model(change(x))

    def step(self, logits_fn: LogitsFn, state: Any, judge: LogitsFn | None = None) -> Any:
        """See :meth:`Attack.step`; who judges is shown the rounded point."""
        return self.attack.step(logits_fn, state, self._judge(state, judge or logits_fn))

    def close(self, logits_fn: LogitsFn, state: Any, judge: LogitsFn | None = None) -> Any:
        """See :meth:`Attack.close`."""
        return self.attack.close(logits_fn, state, self._judge(state, judge or logits_fn))

    def result(self, state: Any) -> AttackResult:
        """See :meth:`Attack.result`; the loss is that of the point before it was rounded."""
        found, record = super().result(state), state.record
        x = rounded_inside(record, found.x, self.levels)
        return found._replace(x=x, distance=record.threat.distance(x, record.x0))


def rounded_inside(record: Record, x: Array, levels: int) -> Array:
    """``x`` (B, ...) on the grid of ``levels``, and in the ball wherever ``x`` is.

    A change of ``k + r`` levels becomes one of ``k + 1`` where the remainder ``r`` is at least a
    threshold, else one of ``k``. The threshold is 1/2 where the ball allows it, and otherwise, for
    each example, the least that does; with 1 nothing grows.
    """
    threat, x0 = record.threat, record.x0
    before = jnp.round(levels_of(threat, x0, levels))
    change = levels_of(threat, jnp.where(jnp.isfinite(x), x, x0), levels) - before
    wide = (-1,) + (1,) * (x.ndim - 1)

    def at(share: Array) -> Array:
        moved = jnp.sign(change) * jnp.floor(jnp.abs(change) + share.reshape(wide))
        return grid(record, before + moved, levels)

    half = jnp.full_like(record.loss, 0.5)
    fits = within(threat, at(half), x0, on_grid=True)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        inside = within(threat, at(middle), x0, on_grid=True)
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    low = jax.lax.fori_loop(0, _HALVINGS, halve, (0.0 * half, half))[0]
    return at(jnp.where(fits, half, low))


def quantized(attack: Attack, levels: int = 256) -> Any:
    """The same attack for models that see images of ``levels`` grey levels, 256 for 8 bits.

    A success is one of the rounded point, and that is what is returned: a file of 8-bit images
    holds it to the bit. The search goes on as it is and ends an example only where the rounded
    point fools the model too, which costs one more forward pass wherever the point itself does.
    Points are rounded to the nearest level; where that would leave the ball, as it may but in Linf
    with a radius of whole levels, with a higher threshold, found for each example. A composition
    becomes one of quantized members.

    Args:
        attack: an attack or a composition of some.
        levels: levels from ``lo`` to ``hi`` of the threat model; the inputs must be on them.

    Raises:
        TypeError: unless given an attack. ValueError: unless ``levels`` is an int from 2.
    """
    _members("quantized", (attack,))
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"quantized needs a number of levels from 2, got {levels!r}")
    if isinstance(attack, _Composition):
        members = tuple(quantized(member, levels) for member in attack.attacks)
        return dataclasses.replace(attack, attacks=members)  # type: ignore[type-var]
    return Quantized(attack, levels=levels)
