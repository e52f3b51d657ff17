"""For when an attack or a training run does not do what it should.

* :func:`trace`: what an attack did at every point it evaluated, example by example.
* :func:`steps`: an attack one step at a time, also un-jitted for prints, breakpoints and ``pdb``.
* :func:`first_non_finite`, :func:`first_non_finite_update`: where the first NaN or infinity of an
  attack or of a training run comes from: the step, the example, and the operation.

All follow the attack's own ``init``, ``step`` and ``close`` from Python; a step costs a dispatch
and, where it is looked at, a gradient more than in :func:`jrobust.run`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jrobust import _run, drive
from jrobust import keys as _keys
from jrobust.attacks import FAB, Attack, AttackResult, GradientAttack, State
from jrobust.attacks._compose import Sequence as _Sequence
from jrobust.attacks._compose import Union, _Wrapper
from jrobust.models import Drawn, Randomized

__all__ = [
    "Equation",
    "Evaluation",
    "NonFinite",
    "NonFiniteUpdate",
    "Step",
    "Trace",
    "first_non_finite",
    "first_non_finite_update",
    "steps",
    "trace",
]

Array = jax.Array


# ------------------------------------------------------------------------------------ stepping


class Evaluation(NamedTuple):
    """What an attack learns at the point of a :class:`Step`.

    Attributes:
        logits: (B, C) float32, at highest matmul precision.
        loss: (B,) what the attack ascends.
        gradient: (B, ...) of the loss there, or the direction that the attack uses in its place:
            an estimate, for FAB the normal of the nearest boundary. None where no example moves
            on, and of attacks that take none.
    """

    logits: Array
    loss: Array
    gradient: Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One evaluation of a batch of points by one attack.

    Attributes:
        member: the attack's name; in a composition preceded by its position, as in ``"1 PGD"``.
        attack: the single attack that steps.
        before, after: its state; ``before.x`` (B, ...) is the point evaluated, ``after.x`` the
            next, ``after.record`` the account of every lane.
        active: (B,) bool, lanes to which the evaluation counts.
        moved: (B,) bool, lanes that went on to another point.
        state: the state of the whole attack after the step, for ``attack.result`` and
            ``attack.done``.
    """

    member: str
    attack: GradientAttack
    before: State
    after: State
    active: np.ndarray
    moved: np.ndarray
    state: Any
    _model: Any = dataclasses.field(repr=False)
    _eager: bool = dataclasses.field(repr=False)

    def evaluate(self) -> Evaluation:
        """Evaluate the point again, to look at it. A black box is not asked again."""
        moved = bool(self.moved.any())
        if drive.is_host(self._model):
            return _evaluate(self.attack, self._model, self.before, moved)
        with jax.disable_jit(self._eager):
            return _compiled(self.attack, self._model, self.before, moved)


def _evaluate(attack: GradientAttack, logits_fn: Any, state: State, gradient: bool) -> Evaluation:
    looked: Any = attack._look(logits_fn, state, gradient=gradient, sure=True)
    loss, logits, slope, _, _ = looked
    if isinstance(attack, FAB) and gradient:  # whose slope is the boundary seen from any point
        slope = slope(state.x)[1]
    return Evaluation(logits, loss, slope if isinstance(slope, jax.Array) else None)


def _move(attack: GradientAttack, logits_fn: Any, state: State, seen: Evaluation) -> Array:
    slope: Any = seen.gradient
    if isinstance(attack, FAB):
        slope = attack._look(logits_fn, state, gradient=True, sure=True)[2]
    return attack.move(state, seen.loss, slope)[0]


_compiled = jax.jit(_evaluate, static_argnums=3)


@jax.jit
def _init(attack: Attack, key: Array, x: Array, y: Array, ids: Array, targets: Any) -> Any:
    return attack.init(_keys.examples(key, ids), x, y, targets)


@functools.partial(jax.jit, static_argnums=0)
def _advance(kind: str, attack: Attack, logits_fn: Any, state: Any) -> Any:
    return drive.rewrite(lambda state: getattr(attack, kind)(logits_fn, state))(state)


@jax.jit
def _result(attack: Attack, state: Any) -> AttackResult:
    return attack.result(state)


class _Eager:
    """A model that sees arrays, not tracers, also where it is differentiated.

    Differentiation itself calls it a second time, with tracers that know their values.
    """

    def __init__(self, logits_fn: Any) -> None:
        self._call = jax.custom_vjp(logits_fn)
        self._call.defvjp(
            lambda x: (logits_fn(x), x), lambda x, slope: jax.vjp(logits_fn, x)[1](slope)
        )

    def __call__(self, x: Array) -> Array:
        return self._call(x)


def _recording(host: drive.Host, answers: dict[bytes, Any]) -> drive.Host:
    """The black box, its answers kept by row."""

    def ask(x: np.ndarray) -> Any:
        logits = host.fn(x)
        answers.update((row.tobytes(), answer) for row, answer in zip(x, np.asarray(logits)))
        return logits

    return drive.Host(ask)


def _recalling(host: drive.Host, answers: dict[bytes, Any]) -> drive.Host:
    """The black box, not asked what it has answered, nor about lanes beside that had ended."""

    def ask(x: np.ndarray) -> Any:
        known = [answers.get(row.tobytes()) for row in x]
        some = next((answer for answer in known if answer is not None), None)
        if some is None:
            return host.fn(x)
        return np.stack([np.zeros_like(some) if answer is None else answer for answer in known])

    return drive.Host(ask)


class _Stepper:
    """An attack whose steps are compiled, or run in Python."""

    def __init__(self, attack: Attack, eager: bool, host: bool) -> None:
        self.attack, self.eager, self.host = attack, eager, host
        self.done, self.moving, self.schedule = attack.done, attack.moving, attack.schedule

    def _do(self, kind: str, logits_fn: Any, state: Any) -> Any:
        if self.host:
            return getattr(self.attack, kind)(logits_fn, state)
        if self.eager:
            with jax.disable_jit():
                return getattr(self.attack, kind)(logits_fn, state)
        return _advance(kind, self.attack, logits_fn, state)

    def step(self, logits_fn: Any, state: Any, judge: Any = None) -> Any:
        return self._do("step", logits_fn, state)

    def close(self, logits_fn: Any, state: Any, judge: Any = None) -> Any:
        return self._do("close", logits_fn, state)


def _working(
    attack: Attack, before: Any, after: Any, active: Any = True, name: str = ""
) -> Iterator[tuple[str, GradientAttack, State, State, Any]]:
    """The single attacks that a step of ``attack`` advances: name, attack, states, lanes."""
    if isinstance(attack, _Wrapper):
        pair = attack.inner(before), attack.inner(after)
        yield from _working(attack.attack, *pair, active, name)
    elif isinstance(attack, _Sequence):
        # One member steps, with a black box as many as have lanes.
        for i, member in enumerate(attack.attacks):
            here = active & ~np.asarray(before.done) & (np.asarray(before.stage) == i)
            found = _working(member, before.states[i], after.states[i], here, f"{name}{i} ")
            yield from (one for one in found if np.any(one[-1]))
    elif isinstance(attack, Union):
        for i, member in enumerate(attack.attacks):
            yield from _working(member, before[i], after[i], active, f"{name}{i} ")
    elif isinstance(attack, GradientAttack):
        # A black box is not asked about all lanes that are not done.
        counted = np.asarray(after.record.seen > before.record.seen)
        yield name + type(attack).__name__, attack, before, after, active & counted
    else:
        raise TypeError(
            f"cannot look into {type(attack).__name__}, which is neither a GradientAttack nor made "
            "of some by restarts, multi_targeted, eot, sequence or union"
        )


def steps(
    attack: Attack,
    key: Array,
    logits_fn: Any,
    x: Any,
    y: Any,
    *,
    ids: Any = None,
    targets: Any = None,
    eager: bool = False,
) -> Iterator[Step]:
    """Run an attack one step at a time: ``for step in debug.steps(attack, key, model, x, y): ...``.

    Yields a :class:`Step` for each evaluation, in order; for a ``union`` one for each member.

    Args:
        attack, key, logits_fn, x, y, ids, targets: as in :func:`jrobust.run`. A
            :class:`jrobust.drive.Host` is asked exactly what :func:`jrobust.run` would ask.
        eager: run everything in Python, nothing compiled (``jax.disable_jit``), so that prints,
            breakpoints and ``pdb`` in the model or the attack see concrete arrays. The model is
            also called with tracers: once beforehand, for its shapes, and after each call whose
            gradient is taken, where they print their values as ``primal=``. Rounding differs from
            that of compiled steps.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run`.
    """
    x, y, targets, ids = _run.check(attack, key, logits_fn, x, y, ids, targets)
    attack, host = _run.strong(attack), drive.is_host(logits_fn)
    answers: dict[bytes, Any] = {}
    model: Any
    if host:
        model = _recording(logits_fn, answers)
    else:
        plain = eager and not isinstance(logits_fn, Randomized)  # whose draws are vmapped anyway
        model = _Eager(logits_fn) if plain else _run.as_pytree(logits_fn)
    with jax.disable_jit(eager or host):
        state = _init(attack, key, x, y, ids, targets)

    def iterate(before: Any) -> Iterator[Step]:
        for after in drive.stepped(_Stepper(attack, eager, host), model, before):
            looked = _recalling(logits_fn, dict(answers)) if host else model
            answers.clear()
            for name, member, old, new, active in _working(attack, before, after):
                moved = active & ~np.asarray(new.record.done) & np.asarray(new.t == old.t + 1)
                yield Step(name, member, old, new, active, moved, after, looked, eager)
            before = after

    return iterate(state)


# ------------------------------------------------------------------------------------ curves


class Trace(NamedTuple):
    """What an attack did: numpy arrays with a row for each of T evaluations, (T, B).

    Attributes:
        member: (T,) str, which attack evaluated, as :attr:`Step.member`.
        active: bool, lanes to which the evaluation counts. Elsewhere floats are NaN.
        loss: what the attack ascends, at the point evaluated.
        distance: of that point from the input, in the attack's norm.
        gradient: Euclidean norm of the gradient, or of the estimate of it, that the attack follows:
            zero where the model hides it. NaN where no example moves on, and of attacks that
            follow none.
        move: how far the attack then went, in its norm; 0 where it ended or started over.
        prediction: int, the class predicted at the point, -1 where a logit is not finite.
        success: bool, whether the attack has succeeded so far.
        done: bool, whether the example has ended.
    """

    member: np.ndarray
    active: np.ndarray
    loss: np.ndarray
    distance: np.ndarray
    gradient: np.ndarray
    move: np.ndarray
    prediction: np.ndarray
    success: np.ndarray
    done: np.ndarray

    def curves(self, examples: Iterable[int] | None = None) -> Mapping[str, tuple[Any, Any]]:
        """Loss curves ``{"example 3": (evaluations, losses)}``, as ``Report.curve`` draws them.

        Of the given positions in the batch, of all when None.
        """
        chosen = range(self.loss.shape[1]) if examples is None else examples
        evaluated = {i: np.flatnonzero(self.active[:, i]) for i in chosen}
        return {f"example {i}": (rows, self.loss[rows, i]) for i, rows in evaluated.items()}


def trace(
    attack: Attack,
    key: Array,
    logits_fn: Any,
    x: Any,
    y: Any,
    *,
    ids: Any = None,
    targets: Any = None,
    eager: bool = False,
) -> tuple[AttackResult, Trace]:
    """Run an attack and keep, for every example, what it did at every point it evaluated.

    The result is that of :func:`jrobust.run`, up to the rounding of steps that are compiled one by
    one (with ``eager``, not compiled at all); of a black box it is equal.

    Args:
        attack, key, logits_fn, x, y, ids, targets, eager: as in :func:`steps`.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run`.
    """
    rows, attack, op_by_op = [], _run.strong(attack), eager or drive.is_host(logits_fn)
    for step in steps(attack, key, logits_fn, x, y, ids=ids, targets=targets, eager=eager):
        old, new = step.before, step.after
        seen, threat = step.evaluate(), old.record.threat
        finite = jnp.all(jnp.isfinite(seen.logits), -1)
        prediction = np.where(finite & step.active, jnp.argmax(seen.logits, -1), -1)
        slope = jnp.full_like(seen.loss, jnp.nan)
        if seen.gradient is not None:
            slope = jnp.linalg.norm(seen.gradient.reshape(slope.shape[0], -1), axis=-1)
        move = np.where(step.moved, threat.distance(new.x, old.x), np.float32(0))
        numbers = seen.loss, threat.distance(old.x, old.record.x0), slope, move
        with jax.disable_jit(op_by_op):
            result = _result(attack, step.state)
        rows.append(
            (
                step.member,
                step.active,
                *(np.where(step.active, value, np.float32(np.nan)) for value in numbers),
                prediction,
                result.success,
                attack.done(step.state),
            )
        )
    return result, Trace(*map(np.stack, zip(*rows)))


# ------------------------------------------------------------------------------- non-finite values


class Equation(NamedTuple):
    """The operation that made the first non-finite value out of finite ones.

    Attributes:
        primitive: its name in JAX, such as ``"log"`` or ``"div"``; ``"argument"`` where the value
            came in, for instance as a parameter. Of infinities that the program spells out, as
            masks do, the operation that made them NaN.
        layer: the named scopes around it, for Flax the path of the module; of an argument its
            path. Of a derivative, the scope is that of the operation differentiated.
        source: file, line and function of the code that called it.
    """

    primitive: str
    layer: str
    source: str


class NonFinite(NamedTuple):
    """The first non-finite value of an attack.

    Attributes:
        step: points of this example that were evaluated before, as ``AttackResult.step``.
        example: its position in the batch.
        where: ``"start"`` (the attack's first point), ``"logits"``, ``"loss"``, ``"gradient"``, or
            ``"move"`` (the attack's next point), the first of them that is not finite.
        member: which attack, as :attr:`Step.member`.
        equation: the operation it came from; None for a black box, and where evaluating this step
            alone, one operation after another, rounds so that all is finite.
    """

    step: int
    example: int
    where: str
    member: str
    equation: Equation | None


def first_non_finite(
    attack: Attack,
    key: Array,
    logits_fn: Any,
    x: Any,
    y: Any,
    *,
    ids: Any = None,
    targets: Any = None,
) -> NonFinite | None:
    """The first non-finite value that an attack meets, or None.

    Args:
        attack, key, logits_fn, x, y, ids, targets: as in :func:`jrobust.run`.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run`.
    """
    for step in steps(attack, key, logits_fn, x, y, ids=ids, targets=targets):
        seen = step.evaluate()
        found = {
            "start": _bad_rows(step.before.x) & step.active,
            "logits": _bad_rows(seen.logits) & step.active,
            "loss": _bad_rows(seen.loss) & step.active,
            "gradient": _bad_rows(seen.gradient) & step.moved,
            "move": _bad_rows(step.after.x) & step.moved,
        }
        examples = np.flatnonzero(functools.reduce(np.logical_or, found.values()))
        if len(examples):
            i = int(examples[0])
            where = next(name for name, rows in found.items() if rows[i])
            at = int(step.before.record.seen[i])
            return NonFinite(at, i, where, step.member, _blame(step, seen, where, i))
    return None


def _bad_rows(value: Array | None) -> Any:
    """(B,) bool: rows with a non-finite number."""
    return False if value is None else ~np.isfinite(value).all(tuple(range(1, value.ndim)))


def _blame(step: Step, seen: Evaluation, where: str, i: int) -> Equation | None:
    """The operation at fault, for the example alone or, failing that, the whole batch."""
    if drive.is_host(step._model) and where not in ("start", "move"):
        return None

    def evaluated(attack: GradientAttack, model: Any, before: State, _: Evaluation) -> Any:
        return getattr(_evaluate(attack, model, before, where == "gradient"), where)

    programs: dict[str, Callable[..., Any]] = {
        "start": lambda attack, _, before, __: attack.start(before.record)[0],
        "move": _move,
    }
    # The draws of a `Drawn` model are those of the whole batch.
    alone = () if isinstance(step._model, Drawn) else (slice(i, i + 1),)
    for rows in (*alone, slice(None)):
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (step.before, seen))
        if equation := _origin(programs.get(where, evaluated), step.attack, step._model, *batch):
            return equation
    return None


class NonFiniteUpdate(NamedTuple):
    """The first update of a training run after which a number is not finite.

    Attributes:
        update: updates made before.
        where: names of what is not finite: metrics as ``"metrics['loss']"``, parts of the new
            state as ``"state.params['conv1']['kernel']"``.
        examples: positions in the batch of the examples that cause it, each on its own: an update
            on copies of nothing but this example is not finite either.
        equation: the operation it came from, as in :class:`NonFinite`.
    """

    update: int
    where: tuple[str, ...]
    examples: tuple[int, ...]
    equation: Equation | None


def first_non_finite_update(
    update: Callable[[Any, Any], tuple[Any, Any]], state: Any, batches: Iterable[Any]
) -> NonFiniteUpdate | None:
    """The first update whose metrics or new state are not finite, or None.

    Args:
        update: ``update(state, batch) -> (state, metrics)``, as of ``jrobust.training.step``.
        state: what to start from, for instance the last checkpoint before the trouble.
        batches: pytrees of arrays with the example axis first, as of ``jrobust.training.batch``.
    """

    @jax.jit
    def named(state: Any, batch: Any) -> dict[str, Any]:
        new, metrics = update(state, batch)
        return {"metrics": metrics, "state": new}

    for i, batch in enumerate(batches):
        new = named(state, batch)
        if where := _bad_leaves(new):
            rows = range(jax.tree.leaves(batch)[0].shape[0])
            examples = [j for j in rows if _bad_leaves(named(state, _copies(batch, j)))]
            return NonFiniteUpdate(i, where, tuple(examples), _origin(named, state, batch))
        state = new["state"]
    return None


def _copies(batch: Any, row: int) -> Any:
    """A batch of the same shape of nothing but this row."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[row : row + 1], leaf.shape[0], 0), batch)


def _bad_leaves(tree: Any) -> tuple[str, ...]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # "['metrics']['loss']" -> "metrics['loss']"
    names = [(path[0].key + jax.tree_util.keystr(path[1:]), leaf) for path, leaf in leaves]
    return tuple(name for name, leaf in names if _bad(leaf))


def _bad(value: Any) -> bool:
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    return jnp.issubdtype(dtype, jnp.inexact) and not np.all(np.isfinite(value))


def _nan(values: Iterable[Any]) -> bool:
    return any(_bad(value) and bool(np.any(np.isnan(value))) for value in values)


def _origin(fn: Callable[..., Any], *args: Any) -> Equation | None:
    """The operation that makes the first non-finite value on the way to one that ``fn`` returns."""
    closed = jax.make_jaxpr(fn)(*args)
    leaves, _ = jax.tree_util.tree_flatten_with_path(args)
    return _first(
        closed,
        [leaf for _, leaf in leaves],
        [jax.tree_util.keystr(path[1:]) for path, _ in leaves],
    )


def _first(closed: ClosedJaxpr, args: Sequence[Any], names: Sequence[str] = ()) -> Equation | None:
    """Walks back from non-finite results through non-finite values to what made the first of them.

    A non-finite value that reaches no result, such as the ``-inf`` of a mask, is not on the way.
    """
    jaxpr = closed.jaxpr
    made = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    every = jaxpr_as_fun(closed.replace(jaxpr=jaxpr.replace(outvars=made)))(*args)
    value = dict(zip((*jaxpr.constvars, *jaxpr.invars, *made), (*closed.consts, *args, *every)))

    def read(variables: Sequence[Any]) -> list[Any]:
        return [v.val if isinstance(v, Literal) else value[v] for v in variables]

    def bad(variables: Sequence[Any]) -> list[Any]:
        return [v for v, known in zip(variables, read(variables)) if _bad(known)]

    way = {v for v in bad(jaxpr.outvars) if not isinstance(v, Literal)}
    first = undefined = None
    for eqn in reversed(jaxpr.eqns):
        if way.isdisjoint(eqn.outvars):
            continue
        if culprits := bad(eqn.invars):
            way.update(v for v in culprits if not isinstance(v, Literal))
            if _nan(read(eqn.outvars)) and not _nan(read(culprits)):
                undefined = eqn
        else:
            first = eqn
    if first is None:
        for v, name in zip(jaxpr.invars, names):
            if v in way:
                return Equation("argument", name, "")
        if undefined is None:
            return None
        first = undefined  # infinities that nobody made, and the NaN made of them: inf - inf
    inner = _inside(first, read(first.invars)) or Equation(first.primitive.name, "", "")
    info = first.source_info
    return inner._replace(
        layer="/".join(filter(None, (_scope(info.name_stack), inner.layer))),
        source=inner.source or source_info_util.summarize(info),
    )


def _scope(stack: Any) -> str:
    """A name stack without the marks of transformations: ``transpose(jvp(Net))/conv1``."""
    names = re.sub(r"\w+\(|\)", "", str(stack)).split("/")
    return "/".join(filter(None, names))


def _longer(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many of the outer variables have more axes than the inner ones."""
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner))


def _inside(eqn: JaxprEqn, args: list[Any]) -> Equation | None:
    """The same within an operation that is a program of its own: a call, branch or loop."""
    params, kind = eqn.params, eqn.primitive.name
    if kind == "cond":
        return _first(params["branches"][int(args[0])], args[1:])
    if kind == "scan":
        # Its parameters differ between versions of JAX: what is scanned over has an axis more.
        body = params["jaxpr"]
        carried = len(eqn.outvars) - _longer(eqn.outvars, body.jaxpr.outvars)
        ends = len(args) - _longer(eqn.invars, body.jaxpr.invars)
        consts, carry, xs = args[: ends - carried], args[ends - carried : ends], args[ends:]
        turns = range(params["length"])
        for i in reversed(turns) if params["reverse"] else turns:
            given = [*consts, *carry, *(x[i] for x in xs)]
            out = jaxpr_as_fun(body)(*given)
            if any(map(_bad, out)):
                return _first(body, given)
            carry = out[:carried]
        return None
    if kind == "while":
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        asked, consts, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
        while jaxpr_as_fun(params["cond_jaxpr"])(*asked, *carry)[0]:
            out = jaxpr_as_fun(params["body_jaxpr"])(*consts, *carry)
            if any(map(_bad, out)):
                return _first(params["body_jaxpr"], [*consts, *carry])
            carry = out
        return None
    if kind in ("jit", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"):
        for body in params.values():
            if isinstance(body, ClosedJaxpr):
                return _first(body, args)
            if isinstance(body, Jaxpr):
                return _first(ClosedJaxpr(body, ()), args)
    return None
