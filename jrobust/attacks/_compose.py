"""Attacks made of attacks: restarts, sequences, unions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Attack, AttackResult, GradientAttack, LogitsFn, where
from jrobust.threat import Threat

Array = jax.Array


class _Again(NamedTuple):
    inner: Any
    key: Array  # (B,) keys before the restart is folded in
    turn: Array  # (B,) int32 restart in progress


@algorithm
class Restarts(Attack):
    """Runs an attack up to ``n`` times from fresh random starts; see :func:`restarts`."""

    attack: Attack
    n: int = static()

    @property
    def stops_at_success(self) -> bool:
        """As the attack itself."""
        return self.attack.stops_at_success

    @property
    def schedule(self) -> tuple[int, int] | None:
        """``n`` times the rounds of the attack."""
        once = self.attack.schedule
        return None if once is None else (self.n * once[0], once[1])

    def threats(self) -> tuple[Threat, ...]:
        """Those of the attack."""
        return self.attack.threats()

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`."""
        self.attack.check(x, y, classes, targets)

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> _Again:
        """See :meth:`Attack.init`."""
        inner = self.attack.init(keys, x, y, targets)
        return _Again(inner, keys, jnp.zeros_like(inner.record.y))

    def done(self, state: _Again) -> Array:
        """See :meth:`Attack.done`."""
        return self.attack.done(state.inner)

    def moving(self, state: _Again) -> Array:
        """See :meth:`Attack.moving`."""
        return self.attack.moving(state.inner)

    def step(self, logits_fn: LogitsFn, state: _Again, judge: LogitsFn | None = None) -> _Again:
        """See :meth:`Attack.step`; a lane that ended unbroken starts over."""
        return self._restart(state, self.attack.step(logits_fn, state.inner, judge))

    def close(self, logits_fn: LogitsFn, state: _Again, judge: LogitsFn | None = None) -> _Again:
        """See :meth:`Attack.close`; a lane that ended unbroken starts over."""
        return self._restart(state, self.attack.close(logits_fn, state.inner, judge))

    def _restart(self, state: _Again, inner: Any) -> _Again:
        record = inner.record
        over = record.done & ~self.done(state) & (state.turn + 1 < self.n)
        if self.stops_at_success:
            over &= ~record.success
        index = state.turn + over.astype(jnp.int32)
        keys = _keys.restart(state.key, index)
        # Draws for all lanes what few of them need: free beside a forward pass.
        fresh = dataclasses.replace(self.attack, threat=record.threat).init(  # type: ignore[type-var]
            keys, record.x0, record.y, record.target
        )
        fresh = fresh._replace(record=record._replace(key=keys, done=jnp.zeros_like(record.done)))
        return _Again(where(over, fresh, inner), state.key, index)

    def result(self, state: _Again) -> AttackResult:
        """See :meth:`Attack.result`; costs are summed over restarts."""
        return self.attack.result(state.inner)


def restarts(attack: GradientAttack, n: int) -> Restarts:
    """Run ``attack`` up to ``n`` times with fresh randomness; the first success ends the example.

    Restart 0 is what the attack alone would do under the same key, so more restarts never find
    less (Madry et al. 2018). Restarts advance inside a lane. With ``keep="loss"`` all
    run and the highest loss stays.

    Args:
        attack: a single attack with randomness, such as ``PGD(threat)``.
        n: how many times to run it at most.

    Raises:
        TypeError: if ``attack`` is itself a composition (restart its members instead).
        ValueError: if ``n`` is not a positive int, the attack draws nothing at random, or it keeps
            its last point.
    """
    if not isinstance(attack, GradientAttack):
        raise TypeError(
            f"restarts takes a single attack, got {type(attack).__name__}: "
            "put restarts around the members of a composition"
        )
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"restarts needs a positive int n, got {n!r}")
    if n > 1 and not getattr(attack, "random_start", True) and attack.estimator is None:
        raise ValueError(
            f"{type(attack).__name__} without a random start repeats itself: restarts of it find "
            "nothing new; set random_start=True"
        )
    if n > 1 and not attack.stops_at_success and getattr(attack, "keep", "loss") == "last":
        raise ValueError(
            "restarts of an attack with keep='last' would return the last restart, however weak: "
            "set keep='loss' or 'success'"
        )
    return Restarts(attack, n=n)


def _best(results: list[AttackResult]) -> AttackResult:
    """Per example: success first, then the higher loss, then the earlier member. Costs add up."""
    best = results[0]
    for other in results[1:]:
        better = other.success & ~best.success
        better |= (other.success == best.success) & ~best.success & (other.loss > best.loss)
        chosen = where(better, other, best)
        best = chosen._replace(
            forwards=best.forwards + other.forwards, backwards=best.backwards + other.backwards
        )
    return best


class _Stages(NamedTuple):
    states: tuple[Any, ...]
    stage: Array  # (B,) int32 member in progress; number of members when all have run
    done: Array  # (B,) bool


class _Composition(Attack):
    attacks: tuple[Attack, ...]

    @property
    def stops_at_success(self) -> bool:
        """True when all members stop at success."""
        return all(attack.stops_at_success for attack in self.attacks)

    def threats(self) -> tuple[Threat, ...]:
        """Those of all members."""
        return tuple(threat for attack in self.attacks for threat in attack.threats())

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`."""
        for attack in self.attacks:
            attack.check(x, y, classes, targets)

    def _init(self, keys: Array, x: Array, y: Array, targets: Array | None) -> tuple[Any, ...]:
        return tuple(
            attack.init(_keys.attack(keys, i), x, y, targets)
            for i, attack in enumerate(self.attacks)
        )


@algorithm
class Sequence(_Composition):
    """Runs attacks in order on what still stands; see :func:`sequence`."""

    attacks: tuple[Attack, ...]

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> _Stages:
        """See :meth:`Attack.init`."""
        zero = jnp.zeros_like(y, jnp.int32)
        return _Stages(self._init(keys, x, y, targets), zero, zero > 0)

    def done(self, state: _Stages) -> Array:
        """See :meth:`Attack.done`."""
        return state.done

    def _stage(self, state: _Stages) -> Array:
        """The earliest member that some lane still has to run; later lanes wait for it."""
        stage = jnp.where(state.done, len(self.attacks), state.stage)
        return jnp.minimum(jnp.min(stage), len(self.attacks) - 1)

    def _switch(self, branches: list[Callable[[_Stages], Any]], state: _Stages) -> Any:
        # A concrete stage means a host-stepped model, which must not be traced.
        stage = self._stage(state)
        if not isinstance(stage, jax.core.Tracer):
            return branches[int(stage)](state)
        return jax.lax.switch(stage, branches, state)

    def moving(self, state: _Stages) -> Array:
        """See :meth:`Attack.moving`."""

        def branch(i: int) -> Callable[[_Stages], Array]:
            return lambda s: ~s.done & (s.stage == i) & self.attacks[i].moving(s.states[i])

        return self._switch([branch(i) for i in range(len(self.attacks))], state)

    def _apply(self, method: str, logits_fn: LogitsFn, state: _Stages, judge: Any) -> _Stages:
        def branch(i: int) -> Callable[[_Stages], _Stages]:
            attack = self.attacks[i]

            def advance(s: _Stages) -> _Stages:
                here = ~s.done & (s.stage == i)
                new = where(
                    here, getattr(attack, method)(logits_fn, s.states[i], judge), s.states[i]
                )
                ended = here & attack.done(new)
                stage = s.stage + ended.astype(jnp.int32)
                broken = ended & attack.result(new).success
                states = (*s.states[:i], new, *s.states[i + 1 :])
                return _Stages(states, stage, s.done | broken | (stage == len(self.attacks)))

            return advance

        return self._switch([branch(i) for i in range(len(self.attacks))], state)

    def step(self, logits_fn: LogitsFn, state: _Stages, judge: LogitsFn | None = None) -> _Stages:
        """See :meth:`Attack.step`; moves the lanes of the earliest unfinished member."""
        return self._apply("step", logits_fn, state, judge)

    def close(self, logits_fn: LogitsFn, state: _Stages, judge: LogitsFn | None = None) -> _Stages:
        """See :meth:`Attack.close`."""
        return self._apply("close", logits_fn, state, judge)

    def result(self, state: _Stages) -> AttackResult:
        """See :meth:`Attack.result`; costs are summed over members."""
        return _best([a.result(s) for a, s in zip(self.attacks, state.states)])


@algorithm
class Union(_Composition):
    """Runs every attack on every example; see :func:`union`."""

    attacks: tuple[Attack, ...]

    def init(
        self, keys: Array, x: Array, y: Array, targets: Array | None = None
    ) -> tuple[Any, ...]:
        """See :meth:`Attack.init`."""
        return self._init(keys, x, y, targets)

    def done(self, state: tuple[Any, ...]) -> Array:
        """See :meth:`Attack.done`: when every member is."""
        ended = [attack.done(s) for attack, s in zip(self.attacks, state)]
        return jnp.all(jnp.stack(ended), axis=0)

    def moving(self, state: tuple[Any, ...]) -> Array:
        """See :meth:`Attack.moving`: when some member is."""
        moving = [attack.moving(s) for attack, s in zip(self.attacks, state)]
        return jnp.any(jnp.stack(moving), axis=0)

    def step(
        self, logits_fn: LogitsFn, state: tuple[Any, ...], judge: LogitsFn | None = None
    ) -> tuple[Any, ...]:
        """See :meth:`Attack.step`: one step of every member."""
        return tuple(a.step(logits_fn, s, judge) for a, s in zip(self.attacks, state))

    def close(
        self, logits_fn: LogitsFn, state: tuple[Any, ...], judge: LogitsFn | None = None
    ) -> tuple[Any, ...]:
        """See :meth:`Attack.close`."""
        return tuple(a.close(logits_fn, s, judge) for a, s in zip(self.attacks, state))

    def result(self, state: tuple[Any, ...]) -> AttackResult:
        """See :meth:`Attack.result`; costs are summed over members."""
        return _best([a.result(s) for a, s in zip(self.attacks, state)])


def _members(name: str, attacks: tuple[Attack, ...]) -> tuple[Attack, ...]:
    if not attacks or not all(isinstance(attack, Attack) for attack in attacks):
        raise TypeError(f"{name} takes one or more attacks, got {attacks!r}")
    return attacks


def sequence(*attacks: Attack) -> Sequence:
    """Attacks in order, each on the examples that still stand (Croce & Hein 2020).

    The first success ends an example. Member 0 draws what it would draw alone, so a sequence never
    finds less than its first member. Where none succeeds, the point of highest loss is returned.

    Args:
        *attacks: attacks or compositions that stop at success, the cheapest first.

    Raises:
        TypeError: unless given attacks. ValueError: if one does not stop at success.
    """
    for attack in _members("sequence", attacks):
        if not attack.stops_at_success:
            raise ValueError(
                f"{type(attack).__name__} in a sequence must stop at success: set keep='success', "
                "or use union to run every attack on every example"
            )
    return Sequence(attacks)


def union(*attacks: Attack) -> Union:
    """Every attack on every example, for instance one for each norm; the worst outcome counts.

    With one member for each norm this is the "max" of Tramer & Boneh (2019).

    Per example a success is preferred, then the highest loss (comparable where the members ascend
    the same loss), then the earlier member. ``distance`` is in the norm of the member chosen.

    Args:
        *attacks: attacks or compositions.

    Raises:
        TypeError: unless given attacks.
    """
    return Union(_members("union", attacks))


def with_eps(attack: Attack, eps: Any) -> Any:
    """The same attack with every threat model's radius set to ``eps`` (scalar, (B,) or tracer).

    ``jax.vmap`` over this draws a robust accuracy curve in one compiled program:
    ``jax.vmap(lambda e: with_eps(attack, e)(key, logits_fn, x, y).success)(radii)``. Step sizes
    given as numbers stay as they are; those left to the attack follow ``eps``.
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, Threat):
            return dataclasses.replace(value, eps=eps)  # type: ignore[type-var]
        if isinstance(value, tuple):
            return tuple(replaced(v) for v in value)
        if isinstance(value, Attack):
            fields = dataclasses.fields(value)  # type: ignore[arg-type]
            return type(value)(**{f.name: replaced(getattr(value, f.name)) for f in fields})
        return value

    return replaced(attack)
