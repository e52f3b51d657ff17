"""Continuous batching: examples pass through the lanes of an attack, each at its own step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive, parallel
from jrobust import keys as _keys
from jrobust.attacks import Attack, AttackResult
from jrobust.attacks._base import where
from jrobust.loops._folder import Arrays
from jrobust.loops._programs import Job

# A call of the program is made to last this many seconds, so that progress can be shown and saved.
_PATIENCE = 0.5
# The share of a device's lanes that must have ended before they are given other examples.
_SHARE = 16


class Lanes(NamedTuple):
    """Which examples are in the lanes, and how far they are.

    Attributes:
        holds: (L,) position of the example in each lane, -1 for none.
        state: of the attack, rows as lanes; None before the first example.
    """

    holds: np.ndarray
    state: Any


@functools.lru_cache
def program(number: int) -> Callable[..., tuple[Any, jax.Array, AttackResult]]:
    """The program of the attack that is ``number`` among those of a run, which folds its keys."""

    def lanes(
        attack: Attack,
        key: jax.Array,
        model: Any,
        judge: Any,
        steps: jax.Array,
        spare: jax.Array,
        state: Any,
        held: jax.Array,
        fresh: jax.Array,
        x: jax.Array,
        y: jax.Array,
        ids: jax.Array,
    ) -> tuple[Any, jax.Array, AttackResult]:
        begun = attack.init(_keys.attack(_keys.examples(key, ids), number), x, y)
        state = where(fresh, begun, state)
        # Lanes that hold nothing repeat one that does, so that no member of a sequence waits for
        # them.
        place = jnp.where(held, jnp.arange(held.size), jnp.argmax(held))
        state = jax.tree.map(lambda leaf: leaf[place], state)
        state = drive.advance(attack, model, state, judge, held=held, steps=steps, spare=spare)
        return state, attack.done(state), attack.result(state)

    return lanes


_AXES = (None, None, None, None, None, None, 0, 0, 0, 0, 0, 0)
_STATE = 6


def job(
    number: int, attack: Attack, key: jax.Array, model: Any, judge: Any, example: tuple[Any, ...]
) -> Job:
    """What to compile for ``example``: (x, y, ids) for every lane."""
    held = jnp.ones(len(example[0]), bool)
    args = (attack, key, model, judge, 0, 0, blank(attack, key, *example), held, held, *example)
    return Job(program(number), args, _AXES, donate_argnums=(_STATE,))


def blank(attack: Attack, key: jax.Array, x: jax.Array, y: jax.Array, ids: jax.Array) -> Any:
    """A state of the right shape, for lanes that have not begun."""

    def init(key: jax.Array, x: jax.Array, y: jax.Array, ids: jax.Array) -> Any:
        return attack.init(_keys.examples(key, ids), x, y)

    def zeros(like: Any) -> jax.Array:
        if not _is_key(like):
            return jnp.zeros(like.shape, like.dtype)
        data = jax.eval_shape(jax.random.key_data, like)
        return jax.random.wrap_key_data(
            jnp.zeros(data.shape, data.dtype), impl=jax.random.key_impl(key)
        )

    return jax.tree.map(zeros, jax.eval_shape(init, key, x, y, ids))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def freeze(lanes: Lanes) -> Arrays:
    """Lanes as plain arrays, to be written to a file."""
    leaves = [
        jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for leaf in jax.tree.leaves(lanes.state)
    ]
    arrays = {f"state{i:03d}": leaf for i, leaf in enumerate(parallel.fetch(leaves))}
    return {"holds": lanes.holds, **arrays}


def thaw(arrays: Arrays, like: Any) -> Lanes:
    """The lanes of :func:`freeze`; ``like`` is a state of the same attack."""
    leaves, tree = jax.tree.flatten(like)
    found = []
    for i, leaf in enumerate(leaves):
        array = jnp.asarray(arrays[f"state{i:03d}"])
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        found.append(array)
    return Lanes(np.asarray(arrays["holds"]), jax.tree.unflatten(tree, found))


def through(
    lanes: Lanes,
    index: np.ndarray,
    rows: Callable[[np.ndarray], tuple[Any, ...]],
    run: Callable[..., tuple[Any, Any, AttackResult]],
    devices: int,
    keep: Callable[[Lanes], None],
) -> Iterator[tuple[np.ndarray, AttackResult]]:
    """Pass examples through lanes; yields (positions (n,), their results) as examples end.

    A lane takes the next example when the one it holds has ended. What comes of an example does
    not depend on the lane, on the time at which it entered, or on the examples beside it.

    Args:
        lanes: to begin with; those that hold an example go on with it.
        index: positions of the examples that wait, in the order in which they enter.
        rows: gives (x, y, ids) of the examples at some positions.
        run: the program of :func:`job` behind its first four arguments, compiled.
        devices: among which the lanes are divided evenly.
        keep: called after every call of the program with the lanes, to begin with another time.
    """
    holds, state = lanes.holds.copy(), lanes.state
    local = len(holds) // devices
    waiting, steps = list(index), 1
    # Over all devices in turn, so that few examples are shared by all.
    turn = np.argsort(np.arange(len(holds)) % local, kind="stable")
    example = None
    while True:
        fresh = np.zeros(len(holds), bool)
        free = turn[holds[turn] < 0][: len(waiting)]
        holds[free], waiting = waiting[: len(free)], waiting[len(free) :]
        fresh[free] = True
        held = holds >= 0
        if not held.any():
            return
        if example is None or fresh.any():
            example = rows(np.where(held, holds, holds[held][0]))
        # Once nobody waits, the lanes that are left run to their end.
        spare = local - max(1, local // _SHARE) if waiting else 0
        while True:
            begin = time.perf_counter()
            state, done, found = run(steps, spare, state, held, fresh, *example)
            ended = held & parallel.fetch(done)
            fresh = np.zeros_like(fresh)
            if np.all(np.sum((held & ~ended).reshape(devices, local), 1) <= spare):
                break
            if parallel.agree(time.perf_counter() - begin < _PATIENCE):
                steps *= 2
            keep(Lanes(holds, state))
        order = np.flatnonzero(ended)[np.argsort(holds[ended])]
        yield holds[order], AttackResult(*(leaf[order] for leaf in parallel.fetch(found)))
        holds[ended] = -1
        keep(Lanes(holds, state))
