"""The loops over attack steps, and what makes them fast. Nothing else loops over steps.

* :func:`until_done` ends when every example has; :func:`fixed` runs a known number of steps and can
  be differentiated in reverse; :func:`advance` stops so that lanes can be refilled. All are ``lax``
  loops, so one program serves GPU, TPU and CPU.
* On CPU, XLA leaves the convolutions of a loop body in the form that differentiation gave them and
  runs them 5 to 9 times slower than outside of a loop: :func:`rewrite` brings them into the fast
  form. The loops apply it to their bodies, so callers need not.
* :class:`Host` marks a model that lives outside JAX: its attacks are stepped from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jrobust._convolution import rewrite

__all__ = [
    "Host",
    "Stepper",
    "advance",
    "asked",
    "asking",
    "changed",
    "fixed",
    "is_host",
    "loop",
    "on_host",
    "rewrite",
    "run",
    "stepped",
    "until_done",
    "where",
]

Array = jax.Array
Carry = TypeVar("Carry")
Tree = TypeVar("Tree")

_HOST_TRACED = (
    "a Host model cannot be traced by jit, vmap or grad: attack it with an attack that needs no "
    "gradient, or with estimator= from jrobust.zeroth_order, outside of jit"
)


def where(mask: Array, new: Tree, old: Tree) -> Tree:
    """Rows of ``new`` where ``mask`` (B,), rows of ``old`` elsewhere; keys allowed."""
    return jax.tree.map(
        lambda a, b: (
            a if a is b else jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)
        ),
        new,
        old,
    )


class Host:
    """A black-box ``logits_fn`` that is called from Python and never traced.

    Args:
        fn: takes a numpy array (B, ...) and returns logits (B, C). It is called exactly once for
            every forward pass that an attack counts; nothing is repeated, dropped or reordered,
            which a callback inside a compiled program could not promise.
    """

    def __init__(self, fn: Callable[[np.ndarray], Any]) -> None:
        self.fn = fn

    def __call__(self, x: Array) -> Array:
        """Query the black box: (B, ...) -> (B, C) float32."""
        if isinstance(x, jax.core.Tracer):
            raise TypeError(_HOST_TRACED)
        logits = np.asarray(self.fn(np.asarray(x)), np.float32)
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise ValueError(
                f"the Host model must return logits of shape ({x.shape[0]}, classes), "
                f"got shape {logits.shape}"
            )
        return jnp.asarray(logits)


def is_host(fn: Any) -> TypeGuard[Host]:
    """Whether ``fn`` has to be called from Python."""
    return isinstance(fn, Host)


class _Live(Host):
    """A black box that is asked about some rows only, because the others cost and change nothing.

    The logits of the others are zero. All rows pass through ``change`` before.
    """

    def __init__(
        self, host: Host, live: Any, change: Callable[[Array], Array] | None = None
    ) -> None:
        self._host, self._live, self._change = host, np.asarray(live), change

    def __call__(self, x: Array) -> Array:
        if isinstance(x, jax.core.Tracer):
            raise TypeError(_HOST_TRACED)
        if not np.any(self._live):
            raise ValueError("no lane is left to ask the Host model about")
        if self._change is not None:
            x = self._change(x)
        asked = np.asarray(self._host(jnp.asarray(np.asarray(x)[self._live])))
        logits = np.zeros((len(x), asked.shape[1]), np.float32)
        logits[self._live] = asked
        return jnp.asarray(logits)


def asking(fn: Any, rows: Array) -> Any:
    """The model, asked about these rows (B,) alone if it is a :class:`Host`."""
    if isinstance(fn, _Live):
        return _Live(fn._host, np.asarray(fn._live & rows), fn._change)
    return _Live(fn, rows) if is_host(fn) else fn


def asked(fn: Any, rows: Array) -> Array:
    """(B,) bool: those of ``rows`` that the model of :func:`asking` is asked about."""
    return fn._live & np.asarray(rows) if isinstance(fn, _Live) else rows


def changed(fn: _Live, change: Callable[[Array], Array]) -> _Live:
    """What :func:`asking` gave, shown ``change(x)``, of the same rows, in place of ``x``."""
    return _Live(fn._host, fn._live, change)


class Stepper(Protocol):
    """What the loops need of an attack; see :class:`jrobust.attacks.Attack`."""

    @property
    def schedule(self) -> tuple[int, int] | None:
        """(rounds, steps in a round), or None when examples end by themselves."""

    def step(self, logits_fn: Any, state: Any, judge: Any = None) -> Any:
        """Evaluate the current point of every lane, record, propose the next."""

    def close(self, logits_fn: Any, state: Any, judge: Any = None) -> Any:
        """Evaluate, forward only, the lanes that will not move again in this round."""

    def moving(self, state: Any) -> Array:
        """(B,) bool: lanes whose next evaluation is followed by a move."""

    def done(self, state: Any) -> Array:
        """(B,) bool: lanes that have ended."""


def loop(
    n: int, body: Callable[[Array, Carry], Carry], init: Carry, *, host: bool = False
) -> Carry:
    """Apply ``carry = body(i, carry)`` for ``i`` in ``0 .. n - 1``.

    Traced as one ``lax`` loop (reverse-differentiable), or, with ``host=True``, run in Python, as
    a black box needs it whose queries must happen exactly once, and under ``jax.disable_jit``.
    """
    if host or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        for i in range(n):
            init = body(i, init)  # type: ignore[arg-type]
        return init
    if n == 0:
        return init
    fast = rewrite(body)
    return jax.lax.fori_loop(0, n, fast, init)


def _while(active: Callable[[Carry], Array], body: Callable[[Carry], Carry], init: Carry) -> Carry:
    return jax.lax.while_loop(lambda s: jnp.any(active(s)), rewrite(body), init)


def until_done(attack: Stepper, logits_fn: Any, state: Carry, judge: Any = None) -> Carry:
    """Step until every example is done: ends early, cannot be differentiated in reverse.

    The inner loop runs while some lane still needs a gradient; then one forward-only evaluation
    closes the round, so that ``n`` moves cost ``n`` gradients and ``n + 1`` forward passes.
    """

    def step(state: Carry) -> Carry:
        return attack.step(logits_fn, state, judge)

    def a_round(state: Carry) -> Carry:
        state = _while(attack.moving, step, state)
        return attack.close(logits_fn, state, judge)

    return _while(lambda s: ~attack.done(s), a_round, state)


def fixed(attack: Stepper, logits_fn: Any, state: Carry, judge: Any = None) -> Carry:
    """Run the whole schedule, whatever happens: reverse-differentiable."""
    if attack.schedule is None:
        raise ValueError(f"{attack} ends example by example: drive it with until_done")
    rounds, steps = attack.schedule

    def a_round(_: Any, state: Carry) -> Carry:
        state = loop(steps, lambda _, s: attack.step(logits_fn, s, judge), state)
        return attack.close(logits_fn, state, judge)

    # A single round stays outside of any loop: when only `x` of the result is used, the closing
    # forward pass is then dead code, and training does not pay for it.
    return a_round(0, state) if rounds == 1 else loop(rounds, a_round, state)


def stepped(attack: Stepper, logits_fn: Any, state: Carry, judge: Any = None) -> Iterator[Carry]:
    """Step from Python until every example is done, as :func:`until_done`; yields each state.

    A :class:`Host` is asked about the lanes alone that are not done.
    """
    return _stepped(attack, logits_fn, state, judge, True)


def _stepped(
    attack: Stepper, logits_fn: Any, state: Carry, judge: Any, held: Array | bool
) -> Iterator[Carry]:
    host = is_host(logits_fn) or is_host(judge)
    while np.any(live := held & ~attack.done(state)):
        if host:
            state = on_host(attack, logits_fn, state, judge, live)
        else:
            apply = attack.step if np.any(live & attack.moving(state)) else attack.close
            state = apply(logits_fn, state, judge)
        yield state


def on_host(attack: Stepper, logits_fn: Any, state: Carry, judge: Any, live: Array) -> Carry:
    """One step, from Python, of the lanes ``live`` (B,), and of no other.

    Of those alone that have no move left, while there are some: a black box is not asked about the
    surroundings of a point that is the last.
    """
    ends = live & ~attack.moving(state)
    rows, apply = (ends, attack.close) if np.any(ends) else (live, attack.step)
    return where(rows, apply(asking(logits_fn, rows), state, asking(judge, rows)), state)


def advance(
    attack: Stepper,
    logits_fn: Any,
    state: Carry,
    judge: Any = None,
    *,
    held: Array,
    steps: Array | int,
    spare: Array | int,
) -> Carry:
    """Step until at most ``spare`` of the lanes ``held`` (B,) are live, ``steps`` times at most.

    Lanes may be anywhere in their attack: those that ended can then be given other examples. A
    forward-only evaluation takes the place of a step when no live lane has a move left.
    """
    if is_host(logits_fn) or is_host(judge):
        for _ in range(int(steps)):
            if np.sum(held & ~attack.done(state)) <= spare:
                break
            state = next(_stepped(attack, logits_fn, state, judge, held))
        return state

    def live(state: Carry) -> Array:
        return held & ~attack.done(state)

    def more(carry: tuple[Array, Carry]) -> Array:
        i, state = carry
        return (i < steps) & (jnp.sum(live(state)) > spare)

    def body(carry: tuple[Array, Carry]) -> tuple[Array, Carry]:
        i, state = carry
        state = jax.lax.cond(
            jnp.any(live(state) & attack.moving(state)),
            lambda s: attack.step(logits_fn, s, judge),
            lambda s: attack.close(logits_fn, s, judge),
            state,
        )
        return i + 1, state

    # Counted in what varies over devices as the lanes do.
    zero = jnp.sum(jnp.zeros_like(held, jnp.int32))
    return jax.lax.while_loop(more, rewrite(body), (zero, state))[1]


def run(attack: Stepper, logits_fn: Any, state: Carry, judge: Any = None) -> Carry:
    """Step ``state`` to its end in the loop that fits the attack and the model."""
    if is_host(logits_fn) or is_host(judge):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
            raise TypeError(_HOST_TRACED)
        ended = state
        for ended in stepped(attack, logits_fn, state, judge):  # noqa: B007
            pass
        return ended
    driver = until_done if attack.schedule is None else fixed
    return driver(attack, logits_fn, state, judge)
