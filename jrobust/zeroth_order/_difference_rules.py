"""How a finite difference passes through one operation without cancellation.

For ``y = f(x)`` a rule computes ``f(x + d) - f(x)`` from ``x``, ``y`` and ``d`` so that its
relative error is a few roundings however small ``d`` is. Linear operations act on ``d`` alone,
products follow the product rule, the others have a formula each. Differences of integers are
differences, those of booleans say where the value changed, and None is a difference that is zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

Array = jax.Array
Equation = Any  # a JaxprEqn: the types of its variables are private


class Slab(NamedTuple):
    """A difference that is zero but at one index of each of the axes in ``at``."""

    value: Array  # of length 1 along those axes
    # axis -> (index, length of the axis). The tuple is made once and handed on: that two slabs lie
    # at the same place is seen by its identity, for the index may be a tracer.
    at: dict[int, tuple[Array, int]]


def dense(d: Any, keep: Collection[int] = ()) -> Any:
    """The difference with its zeros written out, but for those along the axes to ``keep``."""
    if not isinstance(d, Slab):
        return d
    value, kept = d.value, {}
    for axis, place in d.at.items():
        if axis in keep:
            kept[axis] = place
            continue
        # A comparison, not a scatter: XLA fuses it with what follows.
        shape = [place[1] if a == axis else 1 for a in range(value.ndim)]
        here = lax.broadcasted_iota(jnp.int32, shape, axis) == place[0]
        value = jnp.where(here, value, jnp.zeros((), value.dtype))
    return Slab(value, kept) if kept else value


def cut(x: Any, at: dict[int, tuple[Array, int]]) -> Any:
    """The part of a value that lies where a slab does; broadcast axes stay."""
    for axis, (index, size) in at.items():
        if np.ndim(x) and x.shape[axis] == size:
            x = lax.dynamic_slice_in_dim(x, index, 1, axis)
    return x


def is_float(value: Any) -> bool:
    """Whether a variable or array holds floating-point (or complex) numbers."""
    return jnp.issubdtype(getattr(value, "aval", value).dtype, jnp.inexact)


def widen(dtype: Any, wide: Any) -> Any:
    """The dtype, or ``wide`` in place of narrower floating-point numbers."""
    floating = wide is not None and jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, wide) if floating else dtype


def cast(x: Any, dtype: Any) -> Any:
    """``x`` in this dtype."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def up(x: Any) -> Any:
    """Half precision as float32: differences and rules are computed in float32 at least."""
    return x if x is None else cast(x, widen(x.dtype, jnp.float32))


def plus(a: Any, b: Any) -> Any:
    """``a + b``, where None is zero."""
    return a if b is None else b if a is None else a + b


def _minus(a: Any, b: Any) -> Any:
    return plus(a, None if b is None else -b)


def _times(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a * b


def moved(x: Any, d: Any) -> Any:
    """The new value."""
    if d is None:
        return x
    return x ^ d if x.dtype == jnp.bool_ else x + d


def change(new: Array, old: Array) -> Array:
    """The difference of two values."""
    return new ^ old if new.dtype == jnp.bool_ else new - old


def together(*trees: Any) -> Array:
    """A zero that, inside shard_map, varies as any of these arrays does."""
    zeros = [jnp.zeros_like(x, jnp.float32, shape=()) for x in jax.tree.leaves(trees)]
    return sum(zeros, jnp.zeros((), jnp.float32))


def varying(x: Any, like: Any) -> Array:
    """``x``, inside shard_map varying as ``like`` does too: a choice between it and itself."""
    return lax.select(jnp.zeros_like(like, jnp.bool_, shape=()), x, x)


def alike(args: Sequence[Any]) -> Sequence[Any]:
    """Operands that all vary as any of them does.

    JAX's functions see to that, but not where an operation is bound alone.
    """
    if len({getattr(jax.typeof(x), "mat", None) for x in args}) < 2:
        return args
    zero = together(args)
    return [varying(x, zero) for x in args]


# ------------------------------------------------------------------------ one number at a time
#
# A rule takes (bind, xs, y, ds): the operation itself, and values and differences of equal shapes
# up to broadcasting. ``unary`` spares the rules of one argument the lists.

Rule = Callable[[Any, Sequence[Any], Any, Sequence[Any]], Any]


def _unary(fn: Callable[[Any, Any, Any], Any]) -> Rule:
    def rule(bind: Any, xs: Sequence[Any], y: Any, ds: Sequence[Any]) -> Any:
        d = fn(xs[0], y, ds[0])
        # What does not move stays, also where values are infinite, such as log(0).
        return jnp.where(ds[0] == 0, jnp.zeros((), d.dtype), d)

    return rule


def _twice(bind: Any, xs: Sequence[Any], y: Any, ds: Sequence[Any]) -> Any:
    """Exact where results are integers, booleans or steps, such as those of ``sign``."""
    return change(bind(*map(moved, xs, ds)), bind(*xs))


def _exp(x: Array, y: Array, d: Array) -> Array:
    # Beyond 1 there is no cancellation, but exp(x) may have vanished and expm1(d) overflow.
    new = jnp.exp(x + d)
    found = jnp.where(d > 1, new - y, y * jnp.expm1(d))
    return jnp.where((new == y) & jnp.isinf(y), jnp.zeros((), d.dtype), found)


def _logistic(x: Array, y: Any, d: Array) -> Array:
    """``s(x) s(-x-d) (e^d - 1)``, mirrored for d > 0, where the exponential could overflow."""
    s = jnp.where(d > 0, -1, 1).astype(d.dtype)
    return s * lax.logistic(s * x) * lax.logistic(-s * (x + d)) * jnp.expm1(-jnp.abs(d))


def _erf(x: Array, y: Array, d: Array) -> Array:
    """The integral of the density by Gauss's formula, or, over long ways, two complements."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    short = jnp.abs(d) * (1 + jnp.abs(x)) < 0.5
    small = jnp.where(short, d, 0)
    points = (x + small * ((1 + float(t)) / 2) for t in nodes)
    terms = (float(w) / math.sqrt(math.pi) * jnp.exp(-p * p) for w, p in zip(weights, points))
    s = jnp.where(x < 0, -1, 1).astype(d.dtype)
    far = s * (lax.erfc(s * x) - lax.erfc(s * (x + d)))
    return jnp.where(short, small * sum(terms), far)


def _log(x: Array, y: Array, d: Array) -> Array:
    """By ``log1p``, or, over long ways, of the quotient: near 0 only ``x + d`` is exact."""
    rate = d / x
    return jnp.where(jnp.abs(rate) < 0.5, jnp.log1p(rate), jnp.log((x + d) / x))


def _rsqrt(x: Array, y: Array, d: Array) -> Array:
    new = lax.rsqrt(x + d)
    return -d * (y * new) * (y * new) / (y + new)


def _sqrt(x: Array, y: Array, d: Array) -> Array:
    total = y + jnp.sqrt(x + d)
    return d / jnp.where(total == 0, 1, total)


def _integer_pow(n: int) -> Rule:
    def rule(x: Array, y: Array, d: Array) -> Array:
        if n == 0:
            return jnp.zeros_like(d)
        new, size = x + d, abs(n)
        step = 2 - size % 2  # of even powers x + new is a factor
        total = sum(
            lax.integer_pow(new, i) * lax.integer_pow(x, size - step - i)
            for i in range(0, size, step)
        )
        total = total * (x + x + d) if step == 2 else total
        return d * total if n > 0 else -d * total * y * lax.integer_pow(new, n)

    return _unary(rule)


def _pow(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
    """``y ((1 + d/x)^(p + dp) x^dp - 1)`` by logarithms, and both values over long ways."""
    x, p = xs[0], cast(xs[1], y.dtype)
    grow = None if ds[0] is None else _log(x, y, ds[0])
    log = plus(_times(moved(p, ds[1]), grow), _times(ds[1], jnp.log(x)))
    far = bind(moved(x, ds[0]), moved(xs[1], ds[1])) - bind(*xs)
    return jnp.where(jnp.abs(log) < 1, y * jnp.expm1(log), far)


def _mul(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
    return plus(_times(ds[0], xs[1]), _times(plus(xs[0], ds[0]), ds[1]))


def _div(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
    return _minus(ds[0], _times(y, ds[1])) / plus(xs[1], ds[1])


def _max(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
    """``max(a + da, b + db) - y``: ``a - y`` is exact where it matters, and 0 for the winner.

    ``y`` is computed here, from the operands that were kept: that of the base pass may come from
    operands that XLA computed twice and rounded otherwise.
    """
    y = jnp.maximum(*xs)
    return jnp.maximum(*(plus(_below(x, y), d) for x, d in zip(xs, ds)))


def _below(x: Array, largest: Array) -> Array:
    """``x - largest``, which is 0 for those that are as large, infinite ones too."""
    return jnp.where(x == largest, jnp.zeros((), largest.dtype), x - largest)


def _mirrored(rule: Rule) -> Rule:
    """A rule for the maximum, for the minimum."""

    def mirrored(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
        return -rule(bind, [-x for x in xs], y, [_minus(None, d) for d in ds])

    return mirrored


_min = _mirrored(_max)


def _abs(x: Array, y: Array, d: Array) -> Array:
    if not jnp.iscomplexobj(x):
        return _max(None, [x, -x], y, [d, -d])
    total = y + jnp.abs(x + d)
    return jnp.real(jnp.conj(d) * (x + x + d)) / jnp.where(total == 0, 1, total)


def _clamp(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
    low = jnp.maximum(xs[0], xs[1])
    d = None if ds[0] is ds[1] is None else _max(None, xs[:2], low, ds[:2])
    return _min(None, [low, xs[2]], y, [d, ds[2]])


def _select(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Any:
    which, *cases = xs
    new = moved(which, ds[0])
    some = next((d for d in ds[1:] if d is not None), None)
    d = None
    if some is not None:
        d = bind(new, *(jnp.zeros_like(some) if d is None else d for d in ds[1:]))
    if ds[0] is None:
        return d
    # Only where the choice moved: elsewhere infinities would subtract to NaN.
    jump = change(bind(new, *cases), bind(which, *cases))
    return moved(jnp.where(new == which, jnp.zeros((), jump.dtype), jump), d)


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _compare(bind: Any, xs: Sequence[Any], y: Any, ds: Sequence[Any]) -> Array:
    (gap,), d = xs, _minus(*ds)
    new, noise = gap + d, jnp.zeros((), d.dtype)
    zero = jnp.zeros_like(new)
    if not any(side is None for side in ds):
        # What moves together, such as a maximum and the number that it is, is together up to this.
        noise = 4 * float(jnp.finfo(new.dtype).eps) * (jnp.abs(ds[0]) + jnp.abs(ds[1]))
        new = jnp.where(jnp.abs(new) < noise, zero, new)
    # What did not move is as it was, also where the digits of a wide base pass are gone; and so are
    # infinities that are equal.
    return (bind(new, zero) ^ bind(gap, zero)) & (jnp.abs(d) > noise) & ~jnp.isnan(new)


_POINTWISE: dict[str, Rule] = {
    "add": lambda bind, xs, y, ds: plus(*ds),
    "add_any": lambda bind, xs, y, ds: plus(*ds),
    "sub": lambda bind, xs, y, ds: _minus(*ds),
    "neg": _unary(lambda x, y, d: -d),
    "mul": _mul,
    "div": _div,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "select_n": _select,
    "abs": _unary(_abs),
    "exp": _unary(_exp),
    "exp2": _unary(lambda x, y, d: _exp(x * math.log(2), y, d * math.log(2))),
    "expm1": _unary(lambda x, y, d: _exp(x, jnp.exp(x), d)),
    "log": _unary(_log),
    "log2": _unary(lambda x, y, d: _log(x, y, d) / math.log(2)),
    "log1p": _unary(lambda x, y, d: _log(1 + x, y, d)),
    "logistic": _unary(_logistic),
    "tanh": _unary(lambda x, y, d: 2 * _logistic(2 * x, None, 2 * d)),
    "erf": _unary(_erf),
    "erfc": _unary(lambda x, y, d: -_erf(x, y, d)),
    "sin": _unary(lambda x, y, d: 2 * jnp.sin(d / 2) * jnp.cos(x + d / 2)),
    "cos": _unary(lambda x, y, d: -2 * jnp.sin(d / 2) * jnp.sin(x + d / 2)),
    "rsqrt": _unary(_rsqrt),
    "sqrt": _unary(_sqrt),
    "square": _unary(lambda x, y, d: d * (x + x + d)),
    "one_minus_square": _unary(lambda x, y, d: -d * (x + x + d)),
    "pow": _pow,
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(("sign", "floor", "ceil", "round", "is_finite"), _twice),
    **dict.fromkeys(("and", "or", "not", "xor"), _twice),
}

# ----------------------------------------------------------------------- along axes and windows


def _reduce_max(axes: Sequence[int]) -> Rule:
    def rule(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
        return jnp.max(_below(xs[0], jnp.max(xs[0], axes, keepdims=True)) + ds[0], axes)

    return rule


def _argmax(largest: Callable[..., Array], axes: Sequence[int]) -> Rule:
    def rule(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
        return bind(_below(xs[0], largest(xs[0], axes, keepdims=True)) + ds[0]) - bind(xs[0])

    return rule


def _windows(x: Array, fill: float, size: Sequence[int], params: Sequence[Any]) -> Iterator[Array]:
    """For each place in the window the values that the windows see there."""
    strides, padding, dilation, within = params
    x = lax.pad(x, jnp.asarray(fill, x.dtype), [(*p, d - 1) for p, d in zip(padding, dilation)])
    reach = [(k - 1) * w + 1 for k, w in zip(size, within)]
    out = [(n - r) // s + 1 for n, r, s in zip(x.shape, reach, strides)]
    for place in np.ndindex(*size):
        start = [p * w for p, w in zip(place, within)]
        yield lax.slice(
            x, start, [b + (n - 1) * s + 1 for b, n, s in zip(start, out, strides)], strides
        )


def _window_max(params: dict[str, Any]) -> Rule:
    names = ("window_strides", "padding", "base_dilation", "window_dilation")
    size, how = params["window_dimensions"], [params[name] for name in names]

    def rule(bind: Any, xs: Sequence[Any], y: Array, ds: Sequence[Any]) -> Array:
        values = list(_windows(xs[0], -math.inf, size, how))
        moves = _windows(ds[0], 0, size, how)
        largest = functools.reduce(jnp.maximum, values)
        return functools.reduce(
            jnp.maximum, (_below(x, largest) + d for x, d in zip(values, moves))
        )

    return rule


_ALONG: dict[str, Callable[[dict[str, Any]], Rule]] = {
    "integer_pow": lambda params: _integer_pow(params["y"]),
    "reduce_max": lambda params: _reduce_max(params["axes"]),
    "reduce_min": lambda params: _mirrored(_reduce_max(params["axes"])),
    "argmax": lambda params: _argmax(jnp.max, params["axes"]),
    "argmin": lambda params: _argmax(jnp.min, params["axes"]),
    "reduce_window_max": _window_max,
    "reduce_window_min": lambda params: _mirrored(_window_max(params)),
}

# Rules that do not look at the results.
_FROM_OPERANDS = frozenset(("mul", "max", "min", "clamp", *_ALONG, *_COMPARISONS)) - {"integer_pow"}

# ------------------------------------------------------------------------------------- linear

# What rounds is taken for exact: the difference is that of the function without roundings.
_IDENTITY = frozenset(("copy", "name", "optimization_barrier", "reduce_precision", "stop_gradient"))
_LINEAR = frozenset(
    (
        *("broadcast_in_dim", "concatenate", "pad", "reshape", "rev", "slice"),
        *(
            "split",
            "squeeze",
            "stack",
            "unstack",
            "tile",
            "transpose",
            "cumsum",
            "reduce_sum",
            "reduce_window_sum",
        ),
        *("psum", "psum_invariant", "pvary", "sharding_constraint"),
        *("complex", "conj", "fft", "imag", "real"),
    )
)
# Linear in the operands at these positions, if the others, indices, stay.
_INDEXED: dict[str, tuple[int, ...]] = {
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter-sub": (0, 2),
}


def _indexed(eqn: Equation, zero: Callable[[int], Array]) -> Rule:
    data = _INDEXED[eqn.primitive.name]
    # What a gather finds outside of the array does not move.
    outside = {"fill_value": 0} if eqn.params.get("fill_value") is not None else {}

    def rule(bind: Any, xs: Sequence[Any], y: Any, ds: Sequence[Any]) -> Any:
        new = [x if i in data else moved(x, d) for i, (x, d) in enumerate(zip(xs, ds))]
        d = None
        if any(ds[i] is not None for i in data):
            filled = [zero(i) if d is None else d for i, d in enumerate(ds)]
            d = bind(*(filled[i] if i in data else x for i, x in enumerate(new)), **outside)
        if any(d is not None for i, d in enumerate(ds) if i not in data):
            d = plus(d, change(bind(*new), bind(*xs)))
        return d

    return rule


def _linear(zero: Callable[[int], Array]) -> Rule:
    return lambda bind, xs, y, ds: bind(*(zero(i) if d is None else d for i, d in enumerate(ds)))


# ----------------------------------------------------------------------------------- products


def _dot(eqn: Equation, lhs: Any, rhs: Any) -> Any:
    """A product of matrices of which one may be a slab: the other gives what the slab meets."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    sides = [(lhs, lc, lb), (rhs, rc, rb)]
    free = [
        [a for a in range(v.aval.ndim) if a not in (*c, *b)]
        for v, (_, c, b) in zip(eqn.invars, sides)
    ]
    values, out = [lhs, rhs], {}
    for i, (d, contracted, batch) in enumerate(sides):
        if not isinstance(d, Slab):
            continue
        values[i], other = d.value, sides[1 - i]
        for axis, place in d.at.items():
            if axis in free[i]:
                out[len(lb) + i * len(free[0]) + free[i].index(axis)] = place
                continue
            summed = axis in contracted
            k = (contracted if summed else batch).index(axis)
            values[1 - i] = cut(values[1 - i], {other[1 if summed else 2][k]: place})
            if not summed:
                out[k] = place
    d = _bind_product(eqn, *values)
    return Slab(d, out) if out else d


def _convolve(eqn: Equation, lhs: Any, rhs: Any) -> Any:
    """A convolution of which one side may be a slab of channels, or of examples."""
    params = eqn.params
    (lb, lf, *_), (ro, ri, *_), (ob, of, *_) = params["dimension_numbers"]
    grouped = params["feature_group_count"] * params["batch_group_count"] > 1
    lhs = dense(lhs, () if grouped else (lb, lf))
    rhs = dense(rhs, () if grouped else (ro, ri))
    left = lhs.at if isinstance(lhs, Slab) else {}
    right = rhs.at if isinstance(rhs, Slab) else {}
    channel = left.get(lf, right.get(ri))
    pair = [side.value if isinstance(side, Slab) else side for side in (lhs, rhs)]
    if channel is None:
        d = _bind_product(eqn, *pair)
    else:
        d = _one_channel(eqn, cut(pair[0], {lf: channel}), cut(pair[1], {ri: channel}))
    out = {o: at[a] for o, a, at in ((ob, lb, left), (of, ro, right)) if a in at}
    return Slab(d, out) if out else d


def _one_channel(eqn: Equation, lhs: Array, rhs: Array) -> Array:
    """The convolution of one input channel, as a product of matrices.

    With an index under ``vmap`` the channel's weights differ from perturbation to perturbation, and
    a convolution would become a grouped one; this becomes a product of stacked matrices.
    """
    params = eqn.params
    (_, lf, *_), (ro, ri, *space), out = params["dimension_numbers"]
    lhs, rhs = _factors(eqn, lhs, rhs)
    order = [a for a in params["dimension_numbers"].lhs_spec if a != lf]
    lhs = lax.transpose(lax.squeeze(lhs, (lf,)), [a - (a > lf) for a in order])  # N, space
    rhs = lax.transpose(lax.squeeze(rhs, (ri,)), [a - (a > ri) for a in (*space, ro)])
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    first = (1, (0, 0), 1, 1)
    how = [(one, *params[name]) for one, name in zip(first, names)]
    seen = jnp.stack(list(_windows(lhs, 0, (1, *rhs.shape[:-1]), how)), -1)
    d = lax.dot_general(
        seen,
        rhs.reshape(-1, rhs.shape[-1]),
        (((seen.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=widen(eqn.outvars[0].aval.dtype, jnp.float32),
    )  # N, space, features
    ob, of, *rest = out
    return lax.transpose(d, np.argsort((ob, *rest, of)))


def _factors(eqn: Equation, lhs: Array, rhs: Array) -> list[Array]:
    """In the dtypes of the operation, so that bfloat16 stays fast."""
    dtypes = [v.aval.dtype for v in eqn.invars]
    # Small differences vanish in types of a smaller range, such as float16.
    least = jnp.finfo(jnp.float32).minexp
    if any(is_float(v) and jnp.finfo(v.aval.dtype).minexp > least for v in eqn.invars):
        dtypes = [widen(dtype, jnp.float32) for dtype in dtypes]
    return [cast(x, dtype) for x, dtype in zip((lhs, rhs), dtypes)]


def _bind_product(eqn: Equation, lhs: Array, rhs: Array) -> Array:
    """Summed in float32 at least."""
    lhs, rhs = alike(_factors(eqn, lhs, rhs))
    wide = widen(eqn.outvars[0].aval.dtype, jnp.float32)
    return eqn.primitive.bind(lhs, rhs, **{**eqn.params, "preferred_element_type": wide})


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolve}


def _product(eqn: Equation, xs: Sequence[Any], ds: Sequence[Any]) -> Any:
    multiply = _PRODUCTS[eqn.primitive.name]
    (a, b), (da, db) = xs, ds
    if db is None:
        return multiply(eqn, da, b)
    if da is None:
        return multiply(eqn, a, db)
    da, db = dense(da), dense(db)
    return multiply(eqn, da, b) + multiply(eqn, up(a) + da, db)


# ---------------------------------------------------------------------------------- the table

# Operations of numbers of any precision that have no rule: they are evaluated twice.
_PLAIN = frozenset(
    (
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cosh", "sinh"),
        *("tan", "digamma", "erf_inv", "lgamma", "nextafter", "rem", "cumlogsumexp", "cummax"),
        *("cummin", "cumprod", "reduce_prod", "sort", "top_k", "scatter-mul", "triangular_solve"),
    )
)
# Not linear, and right for complex numbers as they stand.
_COMPLEX = frozenset((*_PRODUCTS, *_INDEXED, "abs", "div", "mul", "select_n", "square"))
# Operations that do nothing but call the program in this parameter.
CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "closed_call"), "call_jaxpr"),
    "custom_vmap_call": "call",
}
_DTYPES = ("new_dtype", "preferred_element_type", "out_dtype")


_SCATTERS = {
    "scatter-add": lax.scatter_add,
    "scatter-mul": lax.scatter_mul,
    "scatter-sub": lax.scatter_sub,
}


def _call(eqn: Equation, args: Sequence[Any], params: dict[str, Any]) -> Any:
    """The operation with these parameters, on values of any precision."""
    args = alike(args)
    if (scatter := _SCATTERS.get(eqn.primitive.name)) is None:
        return eqn.primitive.bind(*args, **params)
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    return scatter(*args, **{name: params[name] for name in names})  # its sum is of one type


def bind(eqn: Equation, args: Sequence[Any], wide: Any = None) -> list[Any]:
    """The results of one operation, in floating-point numbers at least as wide as ``wide``."""
    name = eqn.primitive.name
    params = dict(eqn.primitive.get_bind_params(eqn.params))
    # JAX lowers argmax of float64 numbers only where it is configured for them.
    plain = (_is_known(name) or name in _PLAIN) and name not in ("argmax", "argmin")
    if wide is not None and plain:
        if name == "reduce_precision":
            return list(args)
        for key in _DTYPES:
            if params.get(key) is not None:
                params[key] = widen(params[key], wide)
    elif wide is not None:  # it may not be defined for another precision
        args = [cast(x, v.aval.dtype) if is_float(v) else x for x, v in zip(args, eqn.invars)]
    outs = _call(eqn, args, params)
    outs = list(outs) if eqn.primitive.multiple_results else [outs]
    return outs if wide is None else [cast(y, widen(y.dtype, wide)) for y in outs]


def _is_known(name: str) -> bool:
    tables = (_POINTWISE, _ALONG, _IDENTITY, _LINEAR, _INDEXED, _PRODUCTS)
    return name == "convert_element_type" or any(name in table for table in tables)


def _is_linear(eqn: Equation) -> bool:
    """Whether the difference of the result needs no value of the operands."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        (old,), (new,) = eqn.invars, eqn.outvars
        if is_float(old):
            return is_float(new)
        # Differences of other integers wrap around, as they may where all is of one type.
        return old.aval.dtype in (jnp.int32, jnp.int64) and new.aval.dtype != jnp.bool_
    return name in _IDENTITY or name in _LINEAR or name in ("add", "add_any", "sub", "neg")


def has_rule(eqn: Equation) -> bool:
    """Whether :func:`move` works without subtracting values that may be nearly equal."""
    variables = (*eqn.invars, *eqn.outvars)
    if not any(map(is_float, variables)):
        return True
    if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in variables):
        return _is_linear(eqn) or eqn.primitive.name in _COMPLEX
    return _is_known(eqn.primitive.name)


def needs(eqn: Equation) -> tuple[bool, bool]:
    """Whether :func:`move` looks at the operands, and at the results."""
    if _is_linear(eqn):
        return False, False
    name = eqn.primitive.name
    values = (name in _POINTWISE or name in _ALONG) and name not in _FROM_OPERANDS
    return True, values and has_rule(eqn)


def operands(eqn: Equation, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """What :func:`move` looks at: variables of its types, and values.

    Of a comparison it is the distance, which rounding afterwards does not make zero.
    """
    comparison = eqn.primitive.name in _COMPARISONS and all(map(is_float, eqn.invars))
    if not (comparison and has_rule(eqn)):
        return eqn.invars, values
    some = next(v for v in eqn.invars if not isinstance(v, Literal))
    return [some], [values[0] - values[1]]


def move(eqn: Equation, xs: Sequence[Any], ys: Sequence[Any], ds: Sequence[Any]) -> list[Any]:
    """The differences of the results.

    Args:
        eqn: the operation.
        xs, ys: the values of operands and results, where :func:`needs` wants them.
        ds: the differences of the operands: arrays, slabs, or None; not all None.
    """
    name = eqn.primitive.name
    moving = [v for v, d in zip(eqn.invars, ds) if d is not None]
    if name in _PRODUCTS and has_rule(eqn) and all(map(is_float, moving)):
        return [_product(eqn, xs, ds)]
    if name in _IDENTITY:
        return list(ds)
    xs, ys = list(map(up, xs)), list(map(up, ys))
    given = [d for d in ds if d is not None]
    # The axes on which all are confined to one and the same place.
    at = dict(given[0].at) if isinstance(given[0], Slab) else {}
    at = {
        a: p for a, p in at.items() if all(isinstance(d, Slab) and d.at.get(a) is p for d in given)
    }
    to = {axis: _follow(eqn, axis) for axis in at}
    at = {axis: place for axis, place in at.items() if to[axis] is not None}
    out = {to[axis]: place for axis, place in at.items() if to[axis] != _SUMMED}
    ds = [dense(d, at) for d in ds]
    ds = [d.value if isinstance(d, Slab) else d for d in ds]
    xs, ys = [cut(x, at) for x in xs], [cut(y, out) for y in ys]

    some = next(d for d in ds if d is not None)

    def zero(i: int) -> Array:
        aval = eqn.invars[i].aval
        shape = [1 if a in at and n == at[a][1] else n for a, n in enumerate(aval.shape)]
        # Like a difference, so that inside shard_map it varies as that does.
        return jnp.zeros_like(some, widen(aval.dtype, jnp.float32), shape=shape)

    moves = _rule(eqn, zero)(_operation(eqn, out), xs, ys[0] if ys else None, ds)
    moves = moves if isinstance(moves, (list, tuple)) else [moves]
    if name in _POINTWISE:  # which broadcast
        shape = [1 if a in out else n for a, n in enumerate(eqn.outvars[0].aval.shape)]
        moves = [jnp.broadcast_to(d, shape) for d in moves]
    return [Slab(d, out) if out else d for d in moves]


def _rule(eqn: Equation, zero: Callable[[int], Array]) -> Rule:
    name = eqn.primitive.name
    if not has_rule(eqn):
        return _apart(eqn)
    if name in _LINEAR or (name == "convert_element_type" and _is_linear(eqn)):
        return _linear(zero)
    if name in _INDEXED:
        return _indexed(eqn, zero)
    if not any(map(is_float, eqn.invars)) and not _is_linear(eqn) and name != "select_n":
        return _apart(eqn)
    if name in _ALONG:
        return _ALONG[name](eqn.params)
    return _POINTWISE.get(name, _apart(eqn))


def _apart(eqn: Equation) -> Rule:
    """Two evaluations, in float32 at least."""

    def rule(_: Any, xs: Sequence[Any], y: Any, ds: Sequence[Any]) -> list[Any]:
        new, old = (bind(eqn, args, jnp.float32) for args in (list(map(moved, xs, ds)), xs))
        return list(map(change, new, old))

    return rule


_SUMMED = -1


def _follow(eqn: Equation, axis: int) -> Any:
    """Where an axis of the operands is in the result; None if its numbers meet on the way."""
    name, params = eqn.primitive.name, eqn.params
    if name in _POINTWISE or name in ("integer_pow", "convert_element_type"):
        return axis
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "squeeze":
        return axis - sum(a < axis for a in params["dimensions"])
    if name in ("reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin"):
        if axis in params["axes"]:
            return _SUMMED if name == "reduce_sum" else None
        return axis - sum(a < axis for a in params["axes"])
    if name == "cumsum":
        return axis if axis != params["axis"] else None
    if name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min"):
        how = (
            params[key][axis]
            for key in ("window_dimensions", "window_strides", "padding", "base_dilation")
        )
        return axis if tuple(how) == (1, 1, (0, 0), 1) else None
    if name == "reshape" and params.get("dimensions") is None:
        old, new = eqn.invars[0].aval.shape, params["new_sizes"]
        for a, n in enumerate(new):
            if n == old[axis] and math.prod(new[:a]) == math.prod(old[:axis]):
                return a
    return None


def _operation(eqn: Equation, out: dict[int, Any]) -> Callable[..., Any]:
    """The operation on values of length 1 along the axes of a slab."""
    params = dict(eqn.params)
    for key in ("shape", "new_sizes"):
        if key in params:
            params[key] = tuple(1 if a in out else n for a, n in enumerate(params[key]))
    for key in _DTYPES:
        if params.get(key) is not None:
            params[key] = widen(params[key], jnp.float32)
    return lambda *args, **more: _call(eqn, args, {**params, **more})


def read(variable: Any, value: Any) -> Any:
    """A value, or the constant that the variable is."""
    if not isinstance(variable, Literal):
        return value
    aval: Any = variable.aval
    return np.asarray(variable.val, aval.dtype)
