"""What every attack keeps of an example, and the step that gradient attacks share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from jrobust import drive, losses, parallel
from jrobust import keys as _keys
from jrobust.drive import where
from jrobust.models import Randomized
from jrobust.threat import Threat

Array = jax.Array
LogitsFn = Callable[[Array], Array]

# The draws of a randomised model fold the step in above this offset, where no step counter reaches.
_DRAWS = 1 << 29


class AttackResult(NamedTuple):
    """The outcome of an attack on (B, ...) inputs: a pytree of arrays.

    Attributes:
        x: (B, ...) best point found, inside the threat model.
        success: (B,) bool, measured by a forward pass of exactly this ``x``. Non-finite logits of
            an untargeted attack count as a success: such a point is not robust.
        step: (B,) int32, number of points evaluated before the first success, -1 if none.
        loss: (B,) float32, what the attack ascends, at ``x``; not finite where the logits are not.
        distance: (B,) float32, norm of ``x - input`` in the attack's own norm.
        forwards: (B,) int32, forward passes spent on this example.
        backwards: (B,) int32, backward passes.
    """

    x: Array
    success: Array
    step: Array
    loss: Array
    distance: Array
    forwards: Array
    backwards: Array


class Record(NamedTuple):
    """The running account of every lane. Leaves start with the example axis."""

    x0: Array  # (B, ...) the input
    y: Array  # (B,) int32 true label
    target: Array  # (B,) int32 class to reach, -1 when untargeted
    aim: Array  # (B,) int32 class that the search heads for, -1: away from y; success ignores it
    key: Array  # (B,) typed keys of this restart
    threat: Any  # the threat model, with an example axis on its leaves
    best: Array  # (B, ...) point to return
    success: Array  # (B,) whether `best` succeeds
    loss: Array  # (B,) loss at `best`
    first: Array  # (B,) evaluation of the first success, -1
    seen: Array  # (B,) points evaluated so far
    forwards: Array  # (B,)
    backwards: Array  # (B,)
    done: Array  # (B,) bool


class State(NamedTuple):
    """State of a gradient attack. Any subset of its rows is a valid state."""

    record: Record
    x: Array  # (B, ...) the point to evaluate next
    t: Array  # (B,) int32 moves made in this restart
    inner: Any  # what the algorithm itself carries


def succeeds(logits: Array, y: Array, target: Array) -> Array:
    """(B,) bool: the verdict on logits (B, C). Non-finite logits are never counted as robust."""
    prediction = jnp.argmax(logits, axis=-1)
    fooled = jnp.where(target >= 0, prediction == target, prediction != y)
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), fooled, target < 0)


def forward(logits_fn: LogitsFn, x: Array) -> Array:
    """Logits in float32, computed at the highest matmul precision: what verdicts rest on."""
    with jax.default_matmul_precision("highest"):
        return logits_fn(x).astype(jnp.float32)


def open_record(threat: Threat, keys: Array, x: Array, y: Array, targets: Array | None) -> Record:
    """The account of fresh lanes: nothing evaluated, the input as the best point so far."""
    y = y.astype(jnp.int32)
    zero = jnp.zeros_like(y)
    target = zero - 1 if targets is None else targets.astype(jnp.int32)
    low = jnp.full_like(y, -jnp.inf, dtype=jnp.float32)
    return Record(
        x0=x,
        y=y,
        target=target,
        aim=target,
        key=keys,
        threat=threat.batched(x),
        best=x,
        success=zero > 0,
        loss=low,
        first=zero - 1,
        seen=zero,
        forwards=zero,
        backwards=zero,
        done=zero > 0,
    )


def observe(
    record: Record,
    x: Array,
    loss: Array,
    success: Array,
    *,
    keep: str,
    forwards: Array | int,
    backwards: Array | int,
) -> Record:
    """Enter the evaluation of ``x`` into the account of the lanes that are not done.

    A NaN ``loss`` marks logits that are not finite: the worst point there is if it is a success.
    """
    if keep == "success":
        better = success & ~record.success | (loss > record.loss) & (success == record.success)
    elif keep == "loss":
        worst = jnp.where(success, jnp.inf, -jnp.inf)
        rank = jnp.where(jnp.isnan(loss), worst, loss)
        better = rank > jnp.where(jnp.isnan(record.loss), jnp.inf, record.loss)
    else:
        better = jnp.ones_like(success)
    better &= ~record.done
    live = (~record.done).astype(jnp.int32)
    return record._replace(
        best=where(better, x, record.best),
        success=jnp.where(better, success, record.success),
        loss=jnp.where(better, loss, record.loss),
        first=jnp.where(success & (record.first < 0) & ~record.done, record.seen, record.first),
        seen=record.seen + live,
        forwards=record.forwards + forwards * live,
        backwards=record.backwards + backwards * live,
    )


class Attack(abc.ABC):
    """The protocol of all attacks, and how they are called.

    ``attack(key, logits_fn, x, y, *, ids=None, targets=None)`` is pure and traceable; an attack can
    be stepped by hand too: ``init`` (no model call), ``step`` until ``done``, ``result``. Every
    array of the state starts with the example axis, so rows can be taken out, stored, resumed or
    replaced.
    """

    @property
    @abc.abstractmethod
    def stops_at_success(self) -> bool:
        """Whether an example's first success ends its attack."""

    @property
    def random(self) -> bool:
        """Whether the outcome depends on the key, so that a restart may find what it missed."""
        return True

    @property
    def schedule(self) -> tuple[int, int] | None:
        """(rounds, steps) if every example takes the same steps, None if examples end early."""
        return None

    @abc.abstractmethod
    def threats(self) -> tuple[Threat, ...]:
        """The threat models whose balls this attack stays in."""

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """Raise ``ValueError`` or ``TypeError`` where a setting or an input makes no sense.

        Reads values, so it runs outside ``jit``: ``jrobust.run`` and the loops call it.
        """
        for threat in self.threats():
            threat.check(x)

    @abc.abstractmethod
    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> Any:
        """State of fresh lanes.

        Args:
            keys: (B,) typed keys, one for each example.
            x: (B, ...) float32 inputs inside the box.
            y: (B,) integer true labels.
            targets: (B,) integer classes to reach, or None.
        """

    def reopen(self, record: Record) -> Any:
        """State of lanes that start over with the key and the aim of ``record``, on its account.

        For attacks with a field ``threat`` whose state has a field ``record``. What a composition
        runs again, towards another class or from another start, comes from here.
        """
        fresh = dataclasses.replace(self, threat=record.threat).init(  # type: ignore[type-var]
            record.key, record.x0, record.y, record.target
        )
        return fresh._replace(record=record._replace(done=jnp.zeros_like(record.done)))

    @abc.abstractmethod
    def step(self, logits_fn: LogitsFn, state: Any, judge: LogitsFn | None = None) -> Any:
        """Evaluate the current point of every lane, record it, propose the next.

        Args:
            logits_fn: the model that is searched.
            state: from ``init`` or ``step``.
            judge: the model whose float32 verdict counts, if it is not ``logits_fn``. It is asked
                only where the searched model says success; a lane stops only if both agree.
        """

    def close(self, logits_fn: LogitsFn, state: Any, judge: LogitsFn | None = None) -> Any:
        """Like ``step`` without gradient, for lanes that are not ``moving``."""
        return state

    @abc.abstractmethod
    def done(self, state: Any) -> Array:
        """(B,) bool: lanes that have ended."""

    def moving(self, state: Any) -> Array:
        """(B,) bool: lanes whose next evaluation is followed by a move."""
        return ~self.done(state)

    @abc.abstractmethod
    def result(self, state: Any) -> AttackResult:
        """The outcome so far."""

    def __call__(
        self,
        key: Array,
        logits_fn: LogitsFn,
        x: Array,
        y: Array,
        *,
        ids: Array | None = None,
        targets: Array | None = None,
    ) -> AttackResult:
        """Attack a batch; pure and traceable. ``jrobust.run`` is the checked, compiled entry.

        Args:
            key: one typed key.
            logits_fn: (B, ...) -> (B, C), rows independent.
            x: (B, ...) float32 inputs inside the box.
            y: (B,) integer true labels.
            ids: (B,) integer example ids, which select each example's random stream; the position
                in the batch when None. Give them when several batches share one key.
            targets: (B,) integer classes to reach; untargeted when None.

        Raises:
            TypeError, ValueError: for keys, shapes and dtypes that cannot be right.
        """
        _keys.check(key)
        x, y, targets, ids = check_batch(x, y, targets, ids)
        for threat in self.threats():
            threat.check_shapes(x)
        if not drive.is_host(logits_fn):
            return parallel.by_rows(_whole, logits_fn, x, y, ids, targets, key, self)
        args = x, y, ids, targets, key, self
        with parallel.apart(parallel.home(args)) as back:
            return back(_whole(logits_fn, *parallel.plain(args)))


def _whole(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    ids: Array,
    targets: Array | None,
    key: Array,
    attack: Attack,
) -> AttackResult:
    state = attack.init(_keys.examples(key, ids), x, y, targets)
    return attack.result(drive.run(attack, logits_fn, state))


def check_batch(
    x: Any, y: Any, targets: Any = None, ids: Any = None
) -> tuple[Array, Array, Array | None, Array]:
    """Raise unless shapes and dtypes are those of an attack's inputs; fill in ``ids``."""
    dtype = getattr(x, "dtype", jnp.float32)  # before JAX narrows float64 in silence
    if dtype != jnp.float32:
        scale = " and divide by 255" if dtype == jnp.uint8 else ""
        raise TypeError(f"x must be float32, got {dtype}: convert with x.astype('float32'){scale}")
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)
    if x.ndim < 2:
        raise ValueError(
            f"x must have shape (B, ...) with at least one feature axis, got {x.shape}; "
            "for one example use x[None]"
        )
    if x.shape[0] == 0:
        raise ValueError(f"x is an empty batch of shape {x.shape}: there is nothing to attack")
    batch = (x.shape[0],)
    _keys.check_range(ids)
    if jnp.issubdtype(y.dtype, jnp.floating) or y.ndim == 2:
        raise TypeError(
            f"attacks take integer labels of shape {batch}, got {y.dtype} of shape {y.shape}: "
            "one-hot and soft labels are for training objectives; use y.argmax(-1)"
        )
    for name, value in (("y", y), ("targets", targets), ("ids", ids)):
        if value is None:
            continue
        value = jnp.asarray(value)
        if value.shape != batch or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers of shape {batch} to go with x of shape {x.shape}, "
                f"got {value.dtype} of shape {value.shape}"
            )
    return (
        x,
        y,
        None if targets is None else jnp.asarray(targets),
        jnp.arange(x.shape[0]) if ids is None else jnp.asarray(ids),
    )


def check_labels(name: str, labels: Any, classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` lie in ``0 .. classes - 1``."""
    values = np.asarray(labels)
    if values.size and (values.min() < 0 or values.max() >= classes):
        raise ValueError(
            f"{name} must lie in 0 .. {classes - 1} (the model has {classes} classes), "
            f"got {values.min()} .. {values.max()}"
        )


class GradientAttack(Attack):
    """An attack that moves along a gradient. Subclasses write ``start`` and ``move``.

    They are ``@algorithm`` dataclasses with the fields ``threat``, ``steps`` and ``loss``, and may
    have ``keep`` (``"success"``: the first success ends the example; ``"loss"``: the point of
    highest loss; ``"last"``: the last point), ``random_start`` and ``estimator`` (a gradient
    estimator of ``jrobust.zeroth_order`` in place of autodiff).
    """

    threat: Threat
    steps: int
    loss: losses.Loss
    keep: str = "success"
    random_start: bool = True
    estimator: Any = None

    KEEPS: ClassVar[tuple[str, ...]] = ("success", "loss", "last")

    @abc.abstractmethod
    def start(self, record: Record) -> tuple[Array, Any]:
        """The first point (B, ...) and what the algorithm carries (leaves with example axis)."""

    @abc.abstractmethod
    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """The next point and carry, from the gradient (B, ...) at ``state.x``."""

    @property
    def moves(self) -> int:
        """From the first point to the last: one evaluation more than this."""
        return self.steps

    def admits(self, state: State) -> Array | bool:
        """Whether the point to evaluate may be returned: (B,), or one answer for all lanes."""
        return True

    @property
    def random(self) -> bool:
        """Whether the start or an estimator draws."""
        return self.random_start or self.estimator is not None

    @property
    def stops_at_success(self) -> bool:
        """True unless ``keep`` asks for the highest loss or the last point."""
        return self.keep == "success"

    @property
    def schedule(self) -> tuple[int, int] | None:
        """One round of all moves, unless examples stop at their first success."""
        return None if self.stops_at_success else (1, self.moves)

    def threats(self) -> tuple[Threat, ...]:
        """The one threat model; raises ``TypeError`` if it is none."""
        if not isinstance(self.threat, Threat):
            raise TypeError(
                f"{type(self).__name__}.threat must be a threat model such as Linf(8 / 255), "
                f"got {self.threat!r}"
            )
        return (self.threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`."""
        name = type(self).__name__
        super().check(x, y, classes, targets)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"{name}.steps must be a positive int, got {self.steps!r}")
        if self.keep not in self.KEEPS:
            raise ValueError(f"{name}.keep must be one of {self.KEEPS}, got {self.keep!r}")
        if losses.is_targeted(self.loss) and targets is None:
            raise ValueError(f"{self.loss.__name__} is a targeted loss: pass targets=")
        if self.estimator is not None:
            self.estimator.check(x, batched=True)

    def init(self, keys: Array, x: Array, y: Array, targets: Array | None = None) -> State:
        """See :meth:`Attack.init`."""
        record = open_record(self.threat, keys, x, y, targets)
        x, inner = self.start(record)
        return State(record, x, jnp.zeros_like(record.y), inner)

    def done(self, state: State) -> Array:
        """See :meth:`Attack.done`."""
        return state.record.done

    def moving(self, state: State) -> Array:
        """Lanes that have moves left."""
        return ~state.record.done & (state.t < self.moves)

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Array | None, int, int]:
        """Loss (B,), logits (B, C), gradient at x; forwards and backwards spent."""

        samples, votes = _passes(logits_fn)

        def ascent(logits: Array) -> Array:
            return losses.ascent(self.loss, logits, record.y, record.aim)

        def evaluate(x: Array) -> tuple[Array, Array]:
            if isinstance(logits_fn, Randomized):
                draws = logits_fn.draws(_keys.fold(record.key, t + _DRAWS), x).astype(jnp.float32)
                return jnp.mean(jax.vmap(ascent)(draws), 0), forward(logits_fn, stop_gradient(x))
            logits = forward(logits_fn, x) if sure else logits_fn(x).astype(jnp.float32)
            return ascent(logits), logits

        if not gradient:
            return *evaluate(x), None, samples + votes, 0
        if self.estimator is not None:
            keys = _keys.fold(record.key, t + 1)
            loss, logits = evaluate(x)
            _, estimate = self.estimator.per_example(
                keys, lambda p: evaluate(p)[0], x, values=loss, host=drive.is_host(logits_fn)
            )
            return loss, logits, estimate, self.estimator.queries(x[0]) * samples + votes, 0
        if drive.is_host(logits_fn):
            raise TypeError(
                f"{type(self).__name__} needs gradients, which a Host model does not give: set "
                "estimator= to one of jrobust.zeroth_order, or use a query attack"
            )

        def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
            loss, logits = evaluate(x)
            return jnp.sum(loss), (loss, logits)

        grad, (loss, logits) = jax.grad(total, has_aux=True)(x)
        return loss, logits, grad, samples + votes, samples

    def _look(
        self, logits_fn: LogitsFn, state: State, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Array | None, Array | int, int]:
        """Loss and gradient for the move, between them the point's logits; passes spent."""
        return self._evaluate(
            logits_fn, state.record, state.x, state.t, gradient=gradient, sure=sure
        )

    def _advance(
        self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None, *, gradient: bool
    ) -> State:
        record = state.record
        # The last point is judged when it is reached; the way there rests on no verdict, and may
        # use the hardware's fast precision.
        sure = judge is None and not (gradient and self.keep == "last")
        loss, logits, grad, forwards, backwards = self._look(
            logits_fn, state, gradient=gradient, sure=sure
        )
        loss = jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), loss, jnp.nan)
        admitted = self.admits(state)
        success = admitted & succeeds(logits, record.y, record.target)
        if judge is not None:
            success, judged = _ask(judge, record, state.x, success)
            record = record._replace(forwards=record.forwards + judged)
        # A lane without moves left is charged the same whether or not the lanes beside it move.
        ended = state.t >= self.moves
        record = observe(
            record,
            state.x,
            jnp.where(admitted, loss, -jnp.inf),
            success,
            keep=self.keep,
            forwards=jnp.where(ended, sum(_passes(logits_fn)), forwards),
            backwards=jnp.where(ended, 0, backwards),
        )
        if self.stops_at_success:
            ended |= record.success
        live = ~state.record.done & ~ended
        record = record._replace(done=record.done | ended)
        if grad is None:
            return state._replace(record=record)
        x, inner = self.move(state, loss, grad)
        return State(
            record,
            where(live, x, state.x),
            state.t + live.astype(jnp.int32),
            where(live, inner, state.inner),
        )

    def step(self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None = None) -> State:
        """See :meth:`Attack.step`."""
        return self._advance(logits_fn, state, judge, gradient=True)

    def close(self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None = None) -> State:
        """Forward-only evaluation of the lanes that have no moves left."""
        waiting = ~state.record.done & ~self.moving(state)
        closed = self._advance(logits_fn, state, judge, gradient=False)
        return where(waiting, closed, state)

    def result(self, state: State) -> AttackResult:
        """See :meth:`Attack.result`."""
        record = state.record
        return AttackResult(
            x=record.best,
            success=record.success,
            step=record.first,
            loss=record.loss,
            distance=record.threat.distance(record.best, record.x0),
            forwards=record.forwards,
            backwards=record.backwards,
        )


def _ask(judge: LogitsFn, record: Record, x: Array, claimed: Array) -> tuple[Array, Array]:
    """The judge's verdict where success is claimed; (verdict, forwards spent on each lane)."""
    claimed &= ~record.done

    def verdict() -> Array:
        asked = drive.asking(judge, claimed)
        return claimed & succeeds(forward(asked, x), record.y, record.target)

    if drive.is_host(judge):
        agreed = verdict() if np.any(claimed) else claimed
    else:
        agreed = jax.lax.cond(jnp.any(claimed), verdict, lambda: claimed)
    return agreed, claimed * jnp.int32(_passes(judge)[1] or 1)


def _passes(logits_fn: LogitsFn) -> tuple[int, int]:
    """Forward passes behind a loss, and those behind a verdict beside it."""
    if isinstance(logits_fn, Randomized):
        return logits_fn.samples, logits_fn.votes
    return 1, 0


__all__ = [
    "Attack",
    "AttackResult",
    "GradientAttack",
    "Record",
    "State",
    "check_batch",
    "check_labels",
    "forward",
    "observe",
    "open_record",
    "succeeds",
    "where",
]
