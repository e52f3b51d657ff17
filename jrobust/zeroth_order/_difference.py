"""Finite differences of whole programs without cancellation, and without repeated work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jrobust._algorithm import algorithm
from jrobust.zeroth_order import _difference_rules as rules
from jrobust.zeroth_order._difference_rules import (
    Equation,
    Slab,
    cast,
    dense,
    together,
    up,
    varying,
    widen,
)

Array = jax.Array
PyTree = Any


class DifferenceWarning(UserWarning):
    """An operation without a rule is evaluated twice and subtracted, which cancels digits."""


@algorithm
class OneHot:
    """The change of one number of an array by ``mu``, as a leaf of what ``delta`` is called with.

    A change of one weight moves one output channel. As long as a difference lies in one place along
    an axis (through elementwise operations, statistics, pooling over other axes) only that slice
    is computed, and the next convolution or product multiplies by one slice of its weights.

    Args:
        index: an integer for each axis of the array, Python's or traced; ``0 <= index < length``.
        mu: the change, a number.
    """

    index: tuple[Any, ...]
    mu: Any


def differencer(
    f: Callable[..., PyTree],
    *x: PyTree,
    primal_dtype: Any = None,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """``f(x)``, and the function ``delta(*dx) = f(x + dx) - f(x)``, finite and exact.

    Like ``jax.linearize``, but not linear: differences of any size, and no derivative. ``f`` is
    traced and evaluated once. ``delta`` carries the difference itself through its operations by
    rules that do not subtract nearly equal numbers, so that its relative error stays at a few
    roundings however small ``dx`` is; subtracting two values of ``f`` in float32 would leave no
    digit of a small one. What does not depend on what was changed is not computed again.

    ``delta`` is pure and a pytree of the values it needs, for ``jit``, ``vmap`` (perturbations side
    by side share one copy of the weights) and ``scan``. Its operations run one by one unless
    it is called inside ``jit``.

    Args:
        f: a traceable function of pytrees of arrays, returning one. ``stop_gradient`` is the
            identity here, derivatives of ``custom_jvp`` and ``custom_vjp`` play no role, and
            rounding to half precision and ``reduce_precision`` are taken for exact. A value that
            becomes finite from infinite has no difference: NaN.
        *x: where the differences are taken from. Data belong here too, with None for their change:
            what ``f`` computes of constants alone, it computes as it is traced, in its own types.
        primal_dtype: None, or a floating-point type at least as wide as float32 in which ``f(x)``
            is evaluated where it would use a narrower one; ``delta`` takes the values rounded to
            their own types. With ``jnp.float64`` differences are exact across the kinks of ReLU
            too, where float32 values are off by more than a small ``dx``. It works whether or not
            JAX is configured for 64 bits, also inside ``jit``, on devices that have such numbers.
        strict: raise where an operation has no rule, instead of evaluating it twice.
        has_aux: ``f`` returns ``(y, aux)``; ``aux`` (batch statistics, say) is evaluated at ``x``
            only.

    Returns:
        ``(y, delta)``, or ``(y, delta, aux)``. ``delta(*dx)`` takes as many arguments as ``f``,
        each of the structure of its ``x``, with leaves (or whole subtrees) None for no change,
        arrays of the shape of their leaf, or :class:`OneHot`. It returns a pytree like ``y``: in
        the types of ``y``, float32 in place of half precision; True where a boolean changed.

    Raises:
        ValueError, TypeError: ``primal_dtype`` is no such type; from ``delta``, if ``dx`` does not
            fit ``x`` or changes integers.
        NotImplementedError: under ``strict``, naming the operations without a rule. Loops and
            branches have one as long as no change reaches the condition of a ``while`` or the index
            of a ``cond``, which shows when ``delta`` is called.

    Warns:
        DifferenceWarning: as ``NotImplementedError``, without ``strict``.

    Examples:
        >>> import jax.numpy as jnp
        >>> y, delta = differencer(lambda w: jnp.log(jnp.sum(jnp.exp(w))), jnp.zeros(4))
        >>> print(y, delta(jnp.array([1e-9, 0, 0, 0])), delta(OneHot((0,), 1e-9)))
        1.3862944 2.5e-10 2.5e-10
    """
    if primal_dtype is not None:
        primal_dtype = np.dtype(primal_dtype)
        if primal_dtype not in (np.float32, np.float64):
            raise ValueError(f"primal_dtype must be None, float32 or float64, got {primal_dtype}")
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*x)
    jaxpr = closed.jaxpr
    count = len(jaxpr.outvars)
    if has_aux:
        if not isinstance(shape, tuple) or len(shape) != 2:
            raise TypeError("with has_aux, f must return a pair (y, aux)")
        count = len(jax.tree.leaves(shape[0]))
        shape, aux = shape
    wanted = [i < count for i in range(len(jaxpr.outvars))]
    unknown: dict[str, None] = {}
    plan = _plan(jaxpr, list(map(rules.is_float, leaves)), wanted, unknown)
    if unknown:
        _lacking(", ".join(unknown), strict)
    tape = _Tape()
    with _wide(primal_dtype):
        outs, notes = _base(jaxpr, closed.consts, leaves, primal_dtype, plan, tape)
        outs = [cast(y, v.aval.dtype) for y, v in zip(map(jnp.asarray, outs), jaxpr.outvars)]
    out = jax.tree.structure(shape)
    program = _Program(jaxpr, notes, tree, out, strict)
    given = *jax.tree.leaves(x), *closed.consts
    delta = jax.tree_util.Partial(program, _stored(tape.values, given))
    y = jax.tree.unflatten(out, outs[:count])
    if has_aux:
        return y, delta, jax.tree.unflatten(jax.tree.structure(aux), outs[count:])
    return y, delta


def difference(
    f: Callable[[PyTree], PyTree], *, primal_dtype: Any = None, strict: bool = False
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """``(x, dx) -> (f(x), f(x + dx) - f(x))``: :func:`differencer` in one step.

    Examples:
        >>> import jax.numpy as jnp
        >>> y, dy = difference(jnp.log)(jnp.float32(2.0), jnp.float32(2e-9))
        >>> print(f"{dy:.4g}")
        1e-09
    """

    def both(x: PyTree, dx: PyTree) -> tuple[PyTree, PyTree]:
        y, delta = differencer(f, x, primal_dtype=primal_dtype, strict=strict)
        return y, delta(dx)

    return both


def _stored(values: list[Array], given: Sequence[Any]) -> list[Array]:
    """The same values, of which XLA computes none again.

    Rules subtract what they kept of x from what they kept of max(x). Where both phases are in one
    program, x may be computed again where it is used, and rounded otherwise. XLA drops its
    optimization barriers before it fuses; what comes out of a conditional stays, as long as it has
    two branches: the choice must not follow from constants, as some of the values may be, and is
    made by what is ``given``, x and what f closes over.
    """
    traced = [v for v in given if isinstance(v, jax.core.Tracer) and v.size]
    if not (floats := [v for v in traced if jnp.issubdtype(v.dtype, jnp.floating)]):
        return values
    some = min(floats, key=lambda v: v.size)
    bits = lax.bitcast_convert_type(jnp.max(some).astype(jnp.float32), jnp.uint32)
    always = lax.population_count(bits) <= 32  # which XLA does not know

    def other(values: list[Array]) -> list[Array]:
        return list(map(jnp.zeros_like, values))

    return lax.cond(always, lambda values: values, other, values)


def _lacking(names: str, strict: bool) -> None:
    if strict:
        raise NotImplementedError(
            f"no rule for the exact difference of: {names}; rewrite it with other operations, or "
            "pass strict=False to evaluate it twice and subtract"
        )
    warnings.warn(
        f"no rule for the exact difference of: {names}; evaluated twice and subtracted, so that "
        "small changes lose digits there",
        DifferenceWarning,
        stacklevel=3,
    )


def _wide(dtype: Any) -> Any:
    """Where numbers of this type are computed as such whatever the configuration says."""
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


# ------------------------------------------------------------------------------------ phase two


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """What is static in ``delta``; compared by identity, so that it never retraces alone."""

    jaxpr: Jaxpr
    notes: list[Any]
    tree: Any
    out: Any
    strict: bool

    def __call__(self, values: list[Array], *dx: PyTree) -> PyTree:
        ds = _leaves(self.tree, [v.aval for v in self.jaxpr.invars], dx)
        outs = _delta(self.jaxpr, self.notes, values, ds, self.strict)
        count = self.out.num_leaves  # the rest is auxiliary
        return jax.tree.unflatten(self.out, map(_filled, outs[:count], self.jaxpr.outvars))

    def widest(self, leaf: int) -> int:
        """How many numbers the largest array holds that a change of this leaf can move."""
        return _widest(self.jaxpr, [i == leaf for i in range(len(self.jaxpr.invars))])[0]


def _widest(jaxpr: Jaxpr, moving: Sequence[bool]) -> tuple[int, list[bool]]:
    """The size of the largest array downstream of some arguments, and which results are."""
    alive = {v for v, it in zip(jaxpr.invars, moving) if it}
    size = 0
    for eqn in jaxpr.eqns:
        came = [not isinstance(v, Literal) and v in alive for v in eqn.invars]
        if not any(came):
            continue
        went = [True] * len(eqn.outvars)
        if (body := _called(eqn)) is not None:
            inner, went = _widest(body.jaxpr, came)
            size = max(size, inner)
        for body in _bodies(eqn):
            size = max(size, _widest(body.jaxpr, [True] * len(body.jaxpr.invars))[0])
        alive.update(v for v, it in zip(eqn.outvars, went) if it)
        avals: list[Any] = [v.aval for v, it in zip(eqn.outvars, went) if it]
        size = max([size, *(aval.size for aval in avals)])
    return size, [not isinstance(v, Literal) and v in alive for v in jaxpr.outvars]


def _filled(d: Any, variable: Any) -> Array:
    aval = variable.aval
    return jnp.zeros(aval.shape, widen(aval.dtype, jnp.float32)) if d is None else dense(d)


def _leaves(tree: Any, avals: Sequence[Any], dx: tuple[PyTree, ...]) -> list[Any]:
    """A difference or None for each leaf of ``x``; checked."""

    def is_leaf(d: Any) -> bool:
        return d is None or isinstance(d, OneHot)

    x = jax.tree.unflatten(tree, avals)
    if len(dx) != len(x):
        raise TypeError(
            f"delta takes the {len(x)} arguments of f, None for no change; got {len(dx)}"
        )

    def expand(d: Any, part: Any) -> Any:
        if d is None:
            return [None] * len(jax.tree.leaves(part))
        if not hasattr(part, "dtype"):
            raise ValueError(f"a change of a whole subtree must be None, got {d} for {part}")
        return [_leaf(d, part)]

    nested = jax.tree.map(expand, dx, x, is_leaf=is_leaf)
    return jax.tree.leaves(nested, is_leaf=lambda d: d is None or isinstance(d, Slab))


def _leaf(d: Any, aval: Any) -> Any:
    dtype = widen(aval.dtype, jnp.float32)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"only floating-point numbers can change, and a leaf of x is {aval.dtype}")
    if not isinstance(d, OneHot):
        if jnp.shape(d) != aval.shape:
            raise ValueError(f"dx must have the shapes of x: got {jnp.shape(d)} for {aval.shape}")
        return cast(jnp.asarray(d), dtype)
    if len(d.index) != len(aval.shape):
        raise ValueError(
            f"OneHot needs an index for each axis: got {len(d.index)} for shape {aval.shape}"
        )
    for i, n in zip(d.index, aval.shape):
        if not isinstance(i, jax.core.Tracer) and not 0 <= int(i) < n:
            raise ValueError(f"OneHot index {d.index} lies outside of shape {aval.shape}")
    sizes = enumerate(zip(d.index, aval.shape))
    at = {axis: (jnp.asarray(i, jnp.int32), n) for axis, (i, n) in sizes if n > 1}
    value = jnp.full((1,) * len(aval.shape), d.mu, dtype)
    return Slab(value, at) if at else value


def _delta(
    jaxpr: Jaxpr, notes: list[Any], values: list[Array], ds: Sequence[Any], strict: bool
) -> list[Any]:
    """The differences of the results of a program, of those of its arguments."""
    env = dict(zip(jaxpr.invars, ds))

    def known(variables: Sequence[Any]) -> list[Any]:
        return [None if isinstance(v, Literal) else env.get(v) for v in variables]

    for eqn, note in zip(jaxpr.eqns, notes):
        ins = known(eqn.invars)
        if note is None or all(d is None for d in ins):
            continue
        if (body := _called(eqn)) is not None:
            outs = _delta(body.jaxpr, note, values, ins, strict)
        elif eqn.primitive.name == "scan":
            outs = _scan_delta(eqn, note, values, ins, strict)
        else:
            xs = _values(eqn.invars, note[0], values)
            ys = _values(eqn.outvars, note[1], values)
            step = _LOOPS.get(eqn.primitive.name)
            outs = step(eqn, xs, ins, strict) if step else rules.move(eqn, xs, ys, ins)
        for v, d in zip(eqn.outvars, outs):
            env[v] = _typed(d, v)
    return known(jaxpr.outvars)


def _typed(d: Any, variable: Any) -> Any:
    dtype = widen(variable.aval.dtype, jnp.float32)
    if isinstance(d, Slab):
        return Slab(cast(d.value, dtype), d.at)
    return d if d is None else cast(d, dtype)


def _values(
    variables: Sequence[Any], names: Sequence[int | None], values: list[Array]
) -> list[Any]:
    return [
        rules.read(v, None) if name is None else values[name] for v, name in zip(variables, names)
    ]


# ------------------------------------------------------------------------------------ phase one


def _called(eqn: Equation) -> Any:
    """The program of an operation that is nothing but a call of it."""
    key = rules.CALLS.get(eqn.primitive.name)
    if key is None:
        return None
    body = eqn.params[key]
    return body if hasattr(body, "consts") else ClosedJaxpr(body, ())


def _plan(
    jaxpr: Jaxpr, live: Sequence[bool], wanted: Sequence[bool], unknown: dict[str, None]
) -> list[Any]:
    """For each operation whether ``delta`` visits it: None, True, or the plan of its program."""
    alive = _alive(jaxpr, live)

    def lives(v: Any) -> bool:
        return not isinstance(v, Literal) and v in alive

    ends = {v for v, it in zip(jaxpr.outvars, wanted) if it and not isinstance(v, Literal)}
    plan: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        if not any(map(lives, eqn.invars)) or ends.isdisjoint(eqn.outvars):
            plan.append(None)
            continue
        ends.update(v for v in eqn.invars if not isinstance(v, Literal))
        if (body := _called(eqn)) is not None:
            come, go = map(lives, eqn.invars), (v in ends for v in eqn.outvars)
            plan.append(_plan(body.jaxpr, list(come), list(go), unknown))
        elif inner := _bodies(eqn):
            flows = _flows(eqn, list(map(lives, eqn.invars)))
            plans = [
                _plan(body.jaxpr, flow, [True] * len(body.jaxpr.outvars), unknown)
                for body, flow in zip(inner, flows)
            ]
            plan.append(plans[0] if eqn.primitive.name == "scan" else True)
        else:
            if not rules.has_rule(eqn):
                unknown[eqn.primitive.name] = None
            plan.append(True)
    return plan[::-1]


def _alive(jaxpr: Jaxpr, live: Sequence[bool]) -> set[Any]:
    """The variables of a program that may change, if these arguments may."""
    alive: set[Any] = {v for v, it in zip(jaxpr.invars, live) if it}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in alive for v in eqn.invars):
            alive.update(eqn.outvars)
    return alive


def _flows(eqn: Equation, live: Sequence[bool]) -> list[list[bool]]:
    """Which arguments of each program in a loop or branch may change in any turn."""
    bodies = [body.jaxpr for body in _bodies(eqn)]
    if eqn.primitive.name == "cond":
        return [list(live[1:])] * len(bodies)
    scan = eqn.primitive.name == "scan"
    first, second, third = (_split if scan else _parts)(eqn, live)
    consts, carry, rows = (first, second, third) if scan else (second, third, [])
    while True:
        flow = [*consts, *carry, *rows]
        alive = _alive(bodies[-1], flow)
        ends = [not isinstance(v, Literal) and v in alive for v in bodies[-1].outvars]
        new = [a or b for a, b in zip(carry, ends)]
        if new == carry:
            return [flow] if scan else [[*first, *carry], flow]
        carry = new


def _bodies(eqn: Equation) -> list[Any]:
    """The programs in a loop or branch."""
    params = eqn.params
    keys = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr")}
    if eqn.primitive.name == "cond":
        return list(params["branches"])
    return [params[key] for key in keys.get(eqn.primitive.name, ())]


class _Tape:
    """The values that ``delta`` needs, each once, in its own type."""

    def __init__(self) -> None:
        self.values: list[Array] = []
        # With the object, so that its id stays its own.
        self._places: dict[tuple[int, Any], tuple[int, Any]] = {}

    def keep(self, value: Any, dtype: Any) -> int:
        key = id(value), dtype
        if key not in self._places:
            self._places[key] = len(self.values), value
            self.values.append(cast(jnp.asarray(value), dtype))
        return self._places[key][0]


def _base(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], wide: Any, plan: Any, tape: _Tape
) -> tuple[list[Any], Any]:
    """The results of a program, and for each operation where on the tape its values are."""

    def widened(value: Any) -> Any:
        return value if wide is None else cast(value, widen(value.dtype, wide))

    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), map(widened, (*consts, *args))))

    def read(v: Any) -> Any:
        return widened(rules.read(v, None)) if isinstance(v, Literal) else env[v]

    def keep(variables: Sequence[Any], values: Sequence[Any], needed: bool) -> list[int | None]:
        return [
            tape.keep(value, v.aval.dtype) if needed and not isinstance(v, Literal) else None
            for v, value in zip(variables, values)
        ]

    notes = []
    for eqn, todo in zip(jaxpr.eqns, plan or [None] * len(jaxpr.eqns)):
        ins = list(map(read, eqn.invars))
        name = eqn.primitive.name
        note: Any
        if (body := _called(eqn)) is not None:
            outs, note = _base(body.jaxpr, body.consts, ins, wide, todo, tape)
        elif name == "scan":
            outs, note = _scan_base(eqn, ins, wide, todo, tape)
        else:
            outs = _EVALUATIONS.get(name, rules.bind)(eqn, ins, wide)
            first, last = (True, False) if name in _EVALUATIONS else rules.needs(eqn)
            if todo is not None:
                before = keep(*rules.operands(eqn, ins), first)
                note = before, keep(eqn.outvars, outs, last)
        env.update(zip(eqn.outvars, outs))
        notes.append(None if todo is None else note)
    return list(map(read, jaxpr.outvars)), notes


# ---------------------------------------------------------------------------- loops and branches


def _evaluate(closed: Any, args: Sequence[Any], wide: Any, zero: Any = None) -> list[Any]:
    outs = _base(closed.jaxpr, closed.consts, args, wide, None, _Tape())[0]
    return outs if zero is None else [varying(y, zero) for y in outs]


def _both(
    closed: Any, xs: Sequence[Any], ds: Sequence[Any], strict: bool
) -> tuple[list[Any], list[Any]]:
    """The results of a program and their differences, in one pass."""
    tape = _Tape()
    jaxpr = closed.jaxpr
    plan = _plan(jaxpr, [True] * len(jaxpr.invars), [True] * len(jaxpr.outvars), {})
    outs, notes = _base(jaxpr, closed.consts, xs, None, plan, tape)
    return outs, _delta(jaxpr, notes, tape.values, ds, strict)


def _split(eqn: Equation, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carry and rows among the operands of a scan.

    The parameters that say so differ between versions of JAX; the rows have an axis more.
    """
    body = eqn.params["jaxpr"].jaxpr

    def rows(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner))

    end = len(values) - rows(eqn.invars, body.invars)
    start = end - len(eqn.outvars) + rows(eqn.outvars, body.outvars)
    return list(values[:start]), list(values[start:end]), list(values[end:])


def _scan(eqn: Equation, turn: Any, carry: Any, rows: Any) -> Any:
    how = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    return lax.scan(turn, carry, rows, **how)


def _scan_base(
    eqn: Equation, ins: list[Any], wide: Any, plan: Any, tape: _Tape
) -> tuple[list[Any], Any]:
    closed = eqn.params["jaxpr"]
    consts, start, rows = _split(eqn, ins)
    inner, notes = _Tape(), None
    for x, v in zip(consts, closed.jaxpr.invars):
        inner.keep(x, v.aval.dtype)  # the same in each turn: not to be stacked
    outer = inner.values[:]

    def turn(carry: list[Any], row: list[Any]) -> Any:
        nonlocal notes
        mine = _Tape()
        mine.values, mine._places = outer[:], dict(inner._places)
        args = [*consts, *carry, *row]
        outs, notes = _base(closed.jaxpr, closed.consts, args, wide, plan, mine)
        return outs[: len(carry)], (outs[len(carry) :], mine.values[len(outer) :])

    carry, (ys, stacked) = _scan(eqn, turn, start, rows)
    if plan is None:
        return [*carry, *ys], None
    places = [[tape.keep(v, v.dtype) for v in part] for part in (outer, stacked)]
    return [*carry, *ys], (*places, notes)


def _scan_delta(
    eqn: Equation, note: Any, values: list[Array], ds: Sequence[Any], strict: bool
) -> list[Any]:
    body = eqn.params["jaxpr"].jaxpr
    ds = list(map(dense, ds))
    consts, start, rows = _split(eqn, ds)
    shared, stacked = ([values[i] for i in places] for places in note[:2])
    carried, zero = _split(eqn, body.invars)[1], together(shared, stacked, ds)

    def turn(carry: list[Any], row: Any) -> Any:
        kept, moves = row
        outs = _delta(body, note[2], [*shared, *kept], [*consts, *carry, *moves], strict)
        return outs[: len(carry)], outs[len(carry) :]

    def shapes(carry: list[Any]) -> list[Any]:
        first = jax.tree.map(
            lambda a: a[0] if len(a) else jnp.zeros_like(a, shape=a.shape[1:]), (stacked, rows)
        )
        return turn(carry, first)[0]

    start = _settled(functools.partial(jax.eval_shape, shapes), start, carried, zero)

    def filled(carry: list[Any], row: Any) -> Any:
        new, ys = turn(carry, row)
        return _like(start, new, carried, zero), ys

    carry, ys = _scan(eqn, filled, start, (stacked, rows))
    return [*carry, *ys]


def _like(
    pattern: Sequence[Any], ds: Sequence[Any], variables: Sequence[Any], zero: Array
) -> list[Any]:
    """Zeros written out where the pattern has no None."""
    return [
        None if p is None else varying(_filled(d, v), zero)
        for p, d, v in zip(pattern, ds, variables)
    ]


def _settled(
    turn: Callable[[list[Any]], list[Any]],
    start: list[Any],
    variables: Sequence[Any],
    zero: Array,
) -> list[Any]:
    """The differences at the start of a loop, zeros written out where a turn makes them move."""
    some = start
    while True:
        start = _like(some, start, variables, zero)
        some = [d if d is not None else n for d, n in zip(start, turn(start))]
        if [d is None for d in some] == [d is None for d in start]:
            return start


def _while(eqn: Equation, ins: list[Any], wide: Any, zero: Any = None) -> list[Any]:
    asked, consts, start = _parts(eqn, ins)
    question, body = _bodies(eqn)
    return _turns(
        lambda carry: _evaluate(question, [*asked, *carry], wide)[0],
        lambda carry: _evaluate(body, [*consts, *carry], wide, zero),
        start,
    )


def _turns(more: Callable[[Any], Array], turn: Callable[[Any], Any], start: Any) -> Any:
    """``lax.while_loop``; each lane of a condition that has some, by ``vmap``, ends on its own."""

    def step(state: Any) -> Any:
        going, new = more(state), turn(state)
        if not going.ndim:
            return new

        def chosen(new: Array, old: Array) -> Array:
            return jnp.where(jnp.expand_dims(going, range(going.ndim, new.ndim)), new, old)

        return jax.tree.map(chosen, new, state)

    return lax.while_loop(lambda state: jnp.any(more(state)), step, start)


def _parts(eqn: Equation, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    a = eqn.params["cond_nconsts"]
    b = a + eqn.params["body_nconsts"]
    return list(values[:a]), list(values[a:b]), list(values[b:])


def _while_delta(eqn: Equation, xs: list[Any], ds: list[Any], strict: bool) -> list[Any]:
    """Turns that are counted by what does not change; the values run along."""
    question, body = _bodies(eqn)
    asked, consts, start = _parts(eqn, xs)
    ds = list(map(dense, ds))
    dasked, dconsts, moves = _parts(eqn, ds)
    variables, zero = eqn.outvars, together(xs, ds)
    start = [varying(v, zero) for v in start]

    def turn(state: Any) -> Any:
        return _both(body, [*consts, *state[0]], [*dconsts, *state[1]], strict)

    moves = _settled(lambda ds: jax.eval_shape(turn, (start, ds))[1], moves, variables, zero)
    asks = lambda s: _both(question, [*asked, *s[0]], [*dasked, *s[1]], strict)  # noqa: E731
    if jax.eval_shape(asks, (start, moves))[1][0] is not None:
        return _apart(eqn, xs, ds, "while with a condition that changes", strict)

    def step(state: Any) -> Any:
        new, ds = turn(state)
        return list(map(varying, new, start)), _like(moves, ds, variables, zero)

    return _turns(lambda s: asks(s)[0][0], step, (start, moves))[1]


def _cond(eqn: Equation, ins: list[Any], wide: Any, zero: Any = None) -> list[Any]:
    branches = [lambda *args, b=b: _evaluate(b, args, wide, zero) for b in _bodies(eqn)]
    return lax.switch(ins[0], branches, *ins[1:])


def _cond_delta(eqn: Equation, xs: list[Any], ds: list[Any], strict: bool) -> list[Any]:
    ds = list(map(dense, ds))
    if ds[0] is not None:
        return _apart(eqn, xs, ds, "cond with an index that changes", strict)
    zero = together(xs, ds)
    branches = [lambda xs, ds, b=b: _both(b, xs, ds, strict)[1] for b in _bodies(eqn)]
    outs = [jax.eval_shape(branch, xs[1:], ds[1:]) for branch in branches]
    some = [next((d for d in each if d is not None), None) for each in zip(*outs)]
    filled = [lambda *args, b=b: _like(some, b(*args), eqn.outvars, zero) for b in branches]
    return lax.switch(xs[0], filled, xs[1:], ds[1:])


def _apart(eqn: Equation, xs: list[Any], ds: list[Any], what: str, strict: bool) -> list[Any]:
    """Two evaluations, in float32 at least."""
    _lacking(what, strict)
    evaluate, zero = _EVALUATIONS[eqn.primitive.name], together(xs, ds)
    xs = [varying(up(x), zero) for x in xs]
    old, new = (
        evaluate(eqn, args, np.float32, zero)
        for args in (xs, list(map(rules.moved, xs, map(dense, ds))))
    )
    return list(map(rules.change, new, old))


_EVALUATIONS: dict[str, Any] = {"while": _while, "cond": _cond}
_LOOPS = {"while": _while_delta, "cond": _cond_delta}
