"""Attacks made of attacks: restarts, classes in turn, sequences, unions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import (
    Attack,
    AttackResult,
    LogitsFn,
    Record,
    _passes,
    forward,
    where,
)
from jrobust.models import Randomized
from jrobust.threat import Threat

Array = jax.Array


class _Wrapper(Attack):
    """What a composition of one attack takes over from it."""

    attack: Attack

    @property
    def stops_at_success(self) -> bool:
        """As the attack itself."""
        return self.attack.stops_at_success

    @property
    def random(self) -> bool:
        """As the attack itself."""
        return self.attack.random

    @property
    def schedule(self) -> tuple[int, int] | None:
        """As the attack itself."""
        return self.attack.schedule

    def threats(self) -> tuple[Threat, ...]:
        """Those of the attack."""
        return self.attack.threats()

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`."""
        self.attack.check(x, y, classes, targets)

    def inner(self, state: Any) -> Any:
        """The state of the attack within that of the composition."""
        return state.inner

    def done(self, state: Any) -> Array:
        """See :meth:`Attack.done`."""
        return self.attack.done(self.inner(state))

    def moving(self, state: Any) -> Array:
        """See :meth:`Attack.moving`."""
        return self.attack.moving(self.inner(state))

    def result(self, state: Any) -> AttackResult:
        """See :meth:`Attack.result`; costs are summed over runs."""
        return self.attack.result(self.inner(state))


class _Again(NamedTuple):
    inner: Any
    key: Array  # (B,) keys before the restart is folded in
    turn: Array  # (B,) int32 restart in progress

    @property
    def record(self) -> Record:
        return self.inner.record


@algorithm
class Restarts(_Wrapper):
    """Runs an attack up to ``n`` times from fresh random starts; see :func:`restarts`."""

    attack: Attack
    n: int = static()

    @property
    def schedule(self) -> tuple[int, int] | None:
        """``n`` times the rounds of the attack."""
        once = self.attack.schedule
        return None if once is None else (self.n * once[0], once[1])

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> _Again:
        """See :meth:`Attack.init`."""
        inner = self.attack.init(keys, x, y, targets)
        return _Again(inner, keys, jnp.zeros_like(inner.record.y))

    def reopen(self, record: Record) -> _Again:
        """See :meth:`Attack.reopen`."""
        return _Again(self.attack.reopen(record), record.key, jnp.zeros_like(record.y))

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
        # Draws for all lanes what few of them need: free beside a forward pass.
        fresh = self.attack.reopen(record._replace(key=_keys.restart(state.key, index)))
        return _Again(where(over, fresh, inner), state.key, index)


def restarts(attack: Attack, n: int) -> Restarts:
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
    _single("restarts", attack, n)
    if n > 1 and not attack.random:
        raise ValueError(
            f"{type(attack).__name__} without a random start repeats itself: restarts of it find "
            "nothing new; set random_start=True"
        )
    if n > 1 and _kept(attack) == "last":
        raise ValueError(
            "restarts of an attack with keep='last' would return the last restart, however weak: "
            "set keep='loss' or 'success'"
        )
    return Restarts(attack, n=n)


def _single(name: str, attack: Attack, n: int) -> None:
    if not isinstance(attack, Attack) or isinstance(attack, _Composition):
        raise TypeError(
            f"{name} takes a single attack, got {type(attack).__name__}: "
            f"put {name} around the members of a composition"
        )
    _positive(name, "n", n)


def _positive(name: str, field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} needs a positive int {field}, got {value!r}")


class _Aimed(NamedTuple):
    inner: Any
    key: Array  # (B,) keys before the class is folded in
    ranked: Array  # (B, n) int32 classes to head for in turn; -1: none left, -2: not known yet
    turn: Array  # (B,) int32 place of the class in progress

    @property
    def record(self) -> Record:
        return self.inner.record


@algorithm
class MultiTargeted(_Wrapper):
    """Runs an attack towards several classes in turn; see :func:`multi_targeted`."""

    attack: Attack
    n: int = static()

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; targeted losses have their target."""
        towards = (jnp.asarray(y) + 1) % classes if targets is None else targets
        self.attack.check(x, y, classes, towards)

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> _Aimed:
        """See :meth:`Attack.init`."""
        return self._open(self.attack.init(keys, x, y, targets))

    def reopen(self, record: Record) -> _Aimed:
        """See :meth:`Attack.reopen`; the classes are ranked anew."""
        return self._open(self.attack.reopen(record))

    def _open(self, inner: Any) -> _Aimed:
        target = inner.record.target
        first = jnp.where(target >= 0, target, -2)[:, None]
        ranked = jnp.where(jnp.arange(self.n)[None] == 0, first, -1)
        return _Aimed(inner, inner.record.key, ranked, jnp.zeros_like(target))

    def _rank(self, logits_fn: LogitsFn, state: _Aimed) -> _Aimed:
        """Rank the classes at the inputs of lanes that have none yet, by one forward pass."""
        unknown = drive.asked(logits_fn, ~self.done(state) & (state.ranked[:, 0] == -2))
        model = drive.asking(logits_fn, unknown)

        def ranked() -> _Aimed:
            record = state.record
            logits = jnp.nan_to_num(forward(model, record.x0))
            own = jnp.arange(logits.shape[-1])[None] == record.y[:, None]
            count = min(self.n, logits.shape[-1] - 1)
            order = jax.lax.top_k(jnp.where(own, -jnp.inf, logits), count)[1]
            order = jnp.pad(order, ((0, 0), (0, self.n - count)), constant_values=-1)
            cost = unknown * jnp.int32(_passes(logits_fn)[1] or 1)
            record = record._replace(aim=order[:, 0], forwards=record.forwards + cost)
            inner = where(unknown, self.attack.reopen(record), state.inner)
            return state._replace(inner=inner, ranked=where(unknown, order, state.ranked))

        if drive.is_host(logits_fn):
            return ranked() if np.any(unknown) else state
        return jax.lax.cond(jnp.any(unknown), ranked, lambda: state)

    def step(self, logits_fn: LogitsFn, state: _Aimed, judge: LogitsFn | None = None) -> _Aimed:
        """See :meth:`Attack.step`; a lane that ended unbroken heads for the next class."""
        state = self._rank(logits_fn, state)
        return self._turn(state, self.attack.step(logits_fn, state.inner, judge))

    def close(self, logits_fn: LogitsFn, state: _Aimed, judge: LogitsFn | None = None) -> _Aimed:
        """See :meth:`Attack.close`; a lane that ended unbroken heads for the next class."""
        return self._turn(state, self.attack.close(logits_fn, state.inner, judge))

    def _turn(self, state: _Aimed, inner: Any) -> _Aimed:
        record, later = inner.record, jnp.minimum(state.turn + 1, self.n - 1)
        aim = jnp.take_along_axis(state.ranked, later[:, None], axis=1)[:, 0]
        over = record.done & ~self.done(state) & (state.turn + 1 < self.n) & (aim >= 0)
        if self.stops_at_success:
            over &= ~record.success
        turn = state.turn + over.astype(jnp.int32)
        fresh = self.attack.reopen(record._replace(key=_keys.target(state.key, turn), aim=aim))
        return state._replace(inner=where(over, fresh, inner), turn=turn)


def multi_targeted(attack: Attack, n: int = 9) -> MultiTargeted:
    """Run ``attack`` towards each of the ``n`` runner-up classes in turn (Gowal et al. 2019).

    The classes are those of the highest logits of the input itself, the label apart, found by one
    forward pass; all of them where the model has fewer than ``n`` others. Success is that of an
    untargeted attack, any other class than the label, and ends the example; of an attack with
    ``keep="closest"`` all classes run and the closest point of all stays. With ``targets=`` the
    attack heads for the one class asked for, and success is that class. Classes advance inside a
    lane. Around ``restarts(attack, r)`` it makes ``r`` starts towards each class.

    Args:
        attack: a single attack that stops at success or keeps the closest point, with any loss:
            targeted ones (``losses.dlr_targeted``, AutoAttack's) head for the class, of others the
            loss with the class as label descends.
        n: how many classes to try at most.

    Raises:
        TypeError: if ``attack`` is itself a composition.
        ValueError: if ``n`` is not a positive int, or the attack keeps another point.
    """
    _single("multi_targeted", attack, n)
    if not attack.stops_at_success and _kept(attack) != "closest":
        raise ValueError(
            f"{type(attack).__name__} in multi_targeted must stop at success, or the last class "
            "would decide what is returned: set keep='success', or 'closest' where there is one"
        )
    return MultiTargeted(attack, n=n)


@algorithm
class EoT(_Wrapper):
    """Runs an attack on the expected loss of a randomised model; see :func:`eot`."""

    attack: Attack
    samples: int = static(default=20)

    def inner(self, state: Any) -> Any:
        """The state itself."""
        return state

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> Any:
        """See :meth:`Attack.init`."""
        return self.attack.init(keys, x, y, targets)

    def reopen(self, record: Record) -> Any:
        """See :meth:`Attack.reopen`."""
        return self.attack.reopen(record)

    def _drawn(self, logits_fn: LogitsFn) -> Randomized:
        if not isinstance(logits_fn, Randomized):
            raise TypeError(
                f"eot and AutoAttack's 'rand' need a model that draws, got {logits_fn!r}: make one "
                "with jrobust.models.randomized(fn, key), or attack a deterministic model as it is"
            )
        return dataclasses.replace(logits_fn, samples=self.samples)

    def step(self, logits_fn: LogitsFn, state: Any, judge: LogitsFn | None = None) -> Any:
        """See :meth:`Attack.step`."""
        return self.attack.step(self._drawn(logits_fn), state, judge)

    def close(self, logits_fn: LogitsFn, state: Any, judge: LogitsFn | None = None) -> Any:
        """See :meth:`Attack.close`."""
        return self.attack.close(self._drawn(logits_fn), state, judge)


def eot(attack: Attack, samples: int = 20) -> EoT:
    """Expectation over transformation, with the attack's own number of draws.

    For models of :func:`jrobust.models.randomized`, and refused for others. Every step ascends the
    mean loss over ``samples`` fresh draws (Athalye et al. 2018) in place of the model's own number.
    Loss and gradient come from the same draws; success is the vote of the model's fixed draws.

    Args:
        attack: a gradient attack or a composition of some.
        samples: draws at each step; AutoAttack's "rand" takes 20.

    Raises:
        TypeError: unless given an attack. ValueError: if ``samples`` is not a positive int.
    """
    _members("eot", (attack,))
    _positive("eot", "samples", samples)
    return EoT(attack, samples=samples)


def _kept(attack: Attack) -> Any:
    """Which point the attack inside of compositions of one attack returns."""
    while isinstance(attack, _Wrapper):
        attack = attack.attack
    return getattr(attack, "keep", None)


def _best(attacks: tuple[Attack, ...], results: list[AttackResult]) -> AttackResult:
    """Per example: success first, then the higher loss, then the earlier member. Costs add up.

    Of successes that are closest points in one norm the closer in place of the higher loss.
    """
    closest = {_kept(attack) for attack in attacks} == {"closest"}
    closest &= len({attack.threats()[0].norm for attack in attacks}) == 1
    best = results[0]
    for other in results[1:]:
        worse = other.loss > best.loss
        if closest:
            worse = jnp.where(best.success, other.distance < best.distance, worse)
        better = (other.success & ~best.success) | ((other.success == best.success) & worse)
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

    @property
    def random(self) -> bool:
        """Whether some member's outcome depends on the key."""
        return any(attack.random for attack in self.attacks)

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
    names: tuple[str, ...] = static(default=())

    @property
    def stages(self) -> dict[str, Attack]:
        """The members by name, in order: what ``loops.evaluate`` takes, one stage for each."""
        names = self.names or [f"{i + 1} {type(a).__name__}" for i, a in enumerate(self.attacks)]
        return dict(zip(names, self.attacks))

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> _Stages:
        """See :meth:`Attack.init`."""
        zero = jnp.zeros_like(y, jnp.int32)
        return _Stages(self._init(keys, x, y, targets), zero, zero > 0)

    def done(self, state: _Stages) -> Array:
        """See :meth:`Attack.done`."""
        return state.done

    def _stage(self, state: _Stages) -> Array:
        """The earliest member that some lane still has to run; in a program the others wait."""
        stage = jnp.where(state.done, len(self.attacks), state.stage)
        return jnp.minimum(jnp.min(stage), len(self.attacks) - 1)

    def moving(self, state: _Stages) -> Array:
        """See :meth:`Attack.moving`: of each lane in its own member."""
        here = [
            (state.stage == i) & attack.moving(s)
            for i, (attack, s) in enumerate(zip(self.attacks, state.states))
        ]
        return ~state.done & jnp.any(jnp.stack(here), axis=0)

    def _apply(self, method: str, logits_fn: LogitsFn, state: _Stages, judge: Any) -> _Stages:
        host = drive.is_host(logits_fn)

        def branch(i: int) -> Callable[[_Stages], _Stages]:
            attack = self.attacks[i]

            def advance(s: _Stages) -> _Stages:
                here = ~s.done & (s.stage == i)
                if host:
                    here = drive.asked(logits_fn, here)
                    if not np.any(here):
                        return s
                    new = drive.on_host(attack, logits_fn, s.states[i], judge, here)
                else:
                    apply = getattr(attack, method)
                    new = where(here, apply(logits_fn, s.states[i], judge), s.states[i])
                ended = here & attack.done(new)
                stage = s.stage + ended.astype(jnp.int32)
                broken = ended & attack.result(new).success
                states = (*s.states[:i], new, *s.states[i + 1 :])
                return _Stages(states, stage, s.done | broken | (stage == len(self.attacks)))

            return advance

        branches = [branch(i) for i in range(len(self.attacks))]
        if host:
            # The last first: none moves twice.
            for advance in reversed(branches):
                state = advance(state)
            return state
        stage = self._stage(state)
        if isinstance(stage, jax.core.Tracer):
            return jax.lax.switch(stage, branches, state)
        return branches[int(stage)](state)

    def step(self, logits_fn: LogitsFn, state: _Stages, judge: LogitsFn | None = None) -> _Stages:
        """See :meth:`Attack.step`; moves the lanes of the earliest unfinished member.

        With a :class:`jrobust.drive.Host` those of every member.
        """
        return self._apply("step", logits_fn, state, judge)

    def close(self, logits_fn: LogitsFn, state: _Stages, judge: LogitsFn | None = None) -> _Stages:
        """See :meth:`Attack.close`."""
        return self._apply("close", logits_fn, state, judge)

    def result(self, state: _Stages) -> AttackResult:
        """See :meth:`Attack.result`; costs are summed over members."""
        return _best(self.attacks, [a.result(s) for a, s in zip(self.attacks, state.states)])


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
        return self._apply("step", logits_fn, state, judge)

    def close(
        self, logits_fn: LogitsFn, state: tuple[Any, ...], judge: LogitsFn | None = None
    ) -> tuple[Any, ...]:
        """See :meth:`Attack.close`."""
        return self._apply("close", logits_fn, state, judge)

    def _apply(
        self, method: str, logits_fn: LogitsFn, state: tuple[Any, ...], judge: Any
    ) -> tuple[Any, ...]:
        def advance(attack: Attack, s: Any) -> Any:
            if not drive.is_host(logits_fn):
                return getattr(attack, method)(logits_fn, s, judge)
            # Not about the lanes that this member has done with.
            live = drive.asked(logits_fn, ~attack.done(s))
            return drive.on_host(attack, logits_fn, s, judge, live) if np.any(live) else s

        return tuple(advance(attack, s) for attack, s in zip(self.attacks, state))

    def result(self, state: tuple[Any, ...]) -> AttackResult:
        """See :meth:`Attack.result`; costs are summed over members."""
        return _best(self.attacks, [a.result(s) for a, s in zip(self.attacks, state)])


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
    the same loss), then the earlier member; of members that all look for the closest point in one
    norm, the closest. ``distance`` is in the norm of the member chosen.

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
