"""What is wrong with a model, as far as its program shows, before any attack.

The model is traced. An abstract interpretation of its jaxpr then follows, for every value, along
which axis the examples lie, whether a gradient connects it with the input, and what happened on the
way; what reaches the logits is a finding.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import (
    ClosedJaxpr,
    DropVar,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
)

from jrobust import _run, drive, keys
from jrobust._algorithm import algorithm
from jrobust._convolution import _struct
from jrobust.debug import Equation, _longer, _scope
from jrobust.models import Randomized
from jrobust.models._surrogate import MOVES, deliberate

Array = jax.Array


# --------------------------------------------------------------------------------- what is said


@dataclasses.dataclass(frozen=True)
class Finding:
    """One property of a model that an evaluation of its robustness must know of.

    Attributes:
        kind: one of the names below.
        severity: ``"error"``: attacks on this model as it is mean nothing; ``"warning"``: they may
            be weaker than they look; ``"info"``: good to know.
        where: the operation, its layer and its source line; of several, the first; None where it is
            a property of the whole model.
        what: what was found.
        effect: what it does to an attack.
        remedy: what to do.
        count: how many layers this source line cuts, draws or mixes in.

    Kinds: ``"rows"``, ``"batch statistics"``, ``"rows not followed"``; ``"gradient cut"``, ``"part
    of the gradient cut"``, ``"no derivative"``, ``"custom gradient"``, ``"straight-through"``,
    ``"clip"``, ``"steep"``; ``"randomness"``, ``"half precision"``, ``"optimisation"``;
    ``"probabilities"``, ``"one-hot"``, ``"saturation"``, ``"few classes"``.
    """

    kind: str
    severity: str
    where: Equation | None
    what: str
    effect: str
    remedy: str
    count: int = 1

    def __str__(self) -> str:
        """Three lines: what and where, the effect, the remedy."""
        place = ""
        if self.where is not None:
            place = ", ".join(filter(None, (self.where.layer, self.where.source)))
            place = f" [{self.where.primitive}{' in ' if place else ''}{place}]"
        more = f" (in {self.count} layers)" if self.count > 1 else ""
        return (
            f"{self.severity}: {self.kind}: {self.what}{more}{place}\n"
            f"    effect: {self.effect}\n    remedy: {self.remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        findings: the worst first.
        classes: number of logits.
        evaluated: what could not be decided from the program and was decided by evaluating the
            model at ``x``; empty where the program said it all.
    """

    findings: tuple[Finding, ...]
    classes: int
    evaluated: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """No errors and no warnings."""
        return all(finding.severity == "info" for finding in self.findings)

    def of(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def __str__(self) -> str:
        """A page of text."""
        count = collections.Counter(finding.severity for finding in self.findings)
        parts = [
            f"{n} {name}{'s' if n > 1 and name != 'info' else ''}"
            for name in _SEVERITIES
            if (n := count[name])
        ]
        head = f"{self.classes} classes; {', '.join(parts) or 'nothing found'}"
        if self.evaluated:
            head += f"; by evaluation: {', '.join(self.evaluated)}"
        return "\n".join([head, *map(str, self.findings)])


_SEVERITIES = ("error", "warning", "info")


def inspect(logits_fn: Callable[[Array], Array], x: Any) -> Inspection:
    """Look for what would make an attack on this model fail for the wrong reasons.

    The model is traced at the shape of ``x``, not run, and its program read: rows of the batch that
    depend on each other, operations that end the gradient or part of it, custom derivatives, random
    numbers, half precision, outputs that are not logits. What the program shows needs no compute.
    Three questions it cannot answer are put to the model itself, where they come up, and named in
    ``evaluated``:

    * ``"rows"``: where rows meet, or an operation could not be followed, two or three more forward
      passes tell whether replacing or rolling the other rows changes a row's logits;
    * ``"output"``: where the last operations may give probabilities, one-hot vectors or saturated
      values, one forward pass tells;
    * ``"custom gradients"``: custom derivatives, other than JAX's own, of at most 50 operations on
      at most 2^22 numbers are compared with the derivative of what they compute, at random
      numbers; larger ones are only checked to pass some gradient.

    A clean inspection is no proof: saturation inside, or weights that make gradients tiny, show up
    only when the model is attacked.

    Args:
        logits_fn: a bound model, an ensemble, a plain function, or a
            :func:`jrobust.models.randomized` model, of which the function of keys and inputs is
            inspected; what it draws from its keys is its right.
        x: (B, ...) float inputs as the model will see, best a few; a single one is joined by
            another, so that rows can be told apart.

    Raises:
        TypeError: for a :class:`jrobust.drive.Host`, whose program cannot be seen, and inputs that
            are not floating point. ValueError: for an empty batch. Both also where ``logits_fn``
            does not return (B, C) floats.
    """
    if drive.is_host(logits_fn):
        raise TypeError(
            "a Host model is no JAX program and cannot be inspected: inspect the function it calls "
            "if that is JAX, else attack it by queries alone, as with attacks.Square"
        )
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point inputs of the model, got {x.dtype}")
    if x.ndim < 1 or x.size == 0:
        raise ValueError(f"x must be a batch (B, ...) of at least one input, got shape {x.shape}")
    if len(x) == 1:
        x = np.concatenate([x, _other(x)])
    x = jnp.asarray(x)
    given: tuple[Array, ...] = (x,)
    if draws := isinstance(logits_fn, Randomized):
        model = logits_fn.fn
        given = keys.examples(logits_fn.key, jnp.arange(len(x))), x
    else:
        model = _run.as_pytree(logits_fn)
    classes = _run.count_classes(_Drawn(model, given[:-1]), x)
    closed = jax.make_jaxpr(_apply)(model, *given)
    reader = _Reader(len(x))
    start = [_Value()] * len(jax.tree.leaves(model))
    if draws:
        start.append(_Value(_Axis(0, 1), notes=frozenset([_DECLARED])))
    start.append(_Value(_Axis(0, 1), grad=True))
    (logits,) = reader.read(closed.jaxpr, start, _TOP)
    findings, evaluated = _judge(logits, reader, closed, model, given, classes, draws)
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    return Inspection(tuple(findings), classes, tuple(evaluated))


def _apply(model: Any, *given: Array) -> Array:
    return model(*given)


@algorithm
class _Drawn:
    """A function of keys, or of nothing, and inputs as one of inputs."""

    model: Any
    before: tuple[Array, ...]

    def __call__(self, x: Array) -> Array:
        return self.model(*self.before, x)


def _other(x: Any) -> Any:
    """Other inputs, within the range of these, whose extremes and means are others too."""
    low, high = x.min(), x.max()
    return (low + high) / 2 + 0.6 * ((low + high) / 2 - x) + 0.3 * (low == high)


# ---------------------------------------------------------------------------- what is followed


class _Axis(NamedTuple):
    """Where the examples lie: index ``(i // stride) % B`` of position ``i`` on axis ``dim``."""

    dim: int
    stride: int


_ONE = _Axis(-1, 1)  # values of a single example, in a loop over the examples


class _Cause(NamedTuple):
    """What happened to a value on its way."""

    kind: str
    where: Equation
    what: str = ""


_TOP = Equation("", "", "")
_DECLARED = _Cause("declared", _TOP)
_ROWS = ("rows", "batch statistics", "rows not followed")
_DIFFERENTIAL = ("no derivative", "custom gradient", "straight-through", "clip", "steep")


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of a variable.

    Attributes:
        axis: where the examples lie; None: the same for all, or not followed.
        grad: whether a differentiable path connects it with the input.
        cuts: where paths from the input ended for the gradient.
        notes: all else that happened on the way.
        nan: whether it is true only where some number is NaN.
    """

    axis: _Axis | None = None
    grad: bool = False
    cuts: frozenset[_Cause] = frozenset()
    notes: frozenset[_Cause] = frozenset()
    nan: bool = False

    @property
    def depends(self) -> bool:
        """Whether it depends on the input at all."""
        return self.grad or bool(self.cuts) or self.axis is not None


def _at(value: _Value, axis: _Axis | None) -> _Value:
    return dataclasses.replace(value, axis=axis)


def _locate(eqn: JaxprEqn, outer: Equation) -> Equation:
    """The place of an operation in a program that ``outer`` calls."""
    layer = "/".join(filter(None, (outer.layer, _scope(eqn.source_info.name_stack))))
    source = source_info_util.summarize(eqn.source_info) or outer.source
    return Equation(eqn.primitive.name, layer, source)


class _Lost(Exception):
    """The examples are no longer apart; the argument is the kind of finding."""


class _Underivable(Exception):
    """Differentiation raises an error."""


def _union(sets: Iterable[frozenset[_Cause]]) -> frozenset[_Cause]:
    return frozenset().union(*sets)


def _dtype(v: Any) -> Any:
    return v.aval.dtype


def _inexact(v: Any) -> bool:
    return jnp.issubdtype(_dtype(v), jnp.inexact)


def _width(v: Any) -> int:
    """Bits of a float; no other number is narrow."""
    return jnp.finfo(_dtype(v)).bits if _inexact(v) else 64


# ------------------------------------------------------------- along which axis the examples lie


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _names(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos
    cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
    igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min
    mul mulhi name ne neg nextafter not one_minus_square or polygamma polynomial
    population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sharding_constraint sign sin
    sinh sqrt square stop_gradient sub tan tanh xor zeta random_bits random_clone random_fold_in
    random_gamma random_seed random_split random_unwrap random_wrap threefry2x32"""
)
_REDUCTIONS = _names(
    """argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor"""
)
_MATRICES = _names(
    """cholesky eig eigh geqrf householder_product lu qr schur svd triangular_solve tridiagonal
    tridiagonal_solve"""
)

_Axes = Sequence[_Axis | None]


def _common(axes: _Axes) -> _Axis:
    """The one axis of all operands that have one."""
    known = {axis for axis in axes if axis is not None}
    if len(known) > 1:
        raise _Lost("rows")  # as in x[:, None] * x[None]
    return known.pop()


def _place(axis: _Axis, shape: Sequence[int], new: Sequence[int], examples: int) -> _Axis:
    """The axis after a reshape: distances in memory stay what they are."""
    distance = axis.stride * math.prod(shape[axis.dim + 1 :])
    for dim, size in enumerate(new):
        below = math.prod(new[dim + 1 :])
        stride, rest = divmod(distance, below)
        if not rest and stride and stride < size and size % (stride * examples) == 0:
            return _Axis(dim, stride)
    raise _Lost("rows not followed")


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def _window(eqn: JaxprEqn, dim: int) -> bool:
    """Whether a window operation leaves the axis alone."""
    params = eqn.params
    ones = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    padding = params.get("padding", ((0, 0),) * (dim + 1))
    return all(params[k][dim] == 1 for k in ones if params.get(k)) and padding[dim] == (0, 0)


def _dot(eqn: JaxprEqn, axes: _Axes) -> _Axis:
    (contracted, batch) = eqn.params["dimension_numbers"]
    places = []
    for side, axis in enumerate(axes):
        if axis is None:
            continue
        if axis.dim in contracted[side]:
            raise _Lost("rows")
        if axis.dim in batch[side]:
            dim = list(batch[side]).index(axis.dim)
        else:
            free = [
                [d for d in range(len(_shape(v))) if d not in (*contracted[i], *batch[i])]
                for i, v in enumerate(eqn.invars)
            ]
            dim = len(batch[0]) + (len(free[0]) if side else 0) + free[side].index(axis.dim)
        places.append(_Axis(dim, axis.stride))
    return _common(places)


def _conv(eqn: JaxprEqn, axes: _Axes) -> _Axis:
    spec, (lhs, rhs) = eqn.params["dimension_numbers"], axes
    if rhs is not None or lhs is None or eqn.params["batch_group_count"] != 1:
        raise _Lost("rows not followed")
    if lhs.dim != spec.lhs_spec[0]:
        raise _Lost("rows")
    return _Axis(spec.out_spec[0], lhs.stride)


def _gather(eqn: JaxprEqn, axes: _Axes) -> _Axis:
    d, (operand, indices) = eqn.params["dimension_numbers"], axes
    rank = len(_shape(eqn.outvars[0]))
    batch = [k for k in range(rank) if k not in d.offset_dims]  # out axes of the indices' axes
    places = []
    if operand is not None:
        at = operand.dim
        if at in d.operand_batching_dims:
            paired = d.start_indices_batching_dims[d.operand_batching_dims.index(at)]
            places.append(_Axis(batch[paired], operand.stride))
        elif eqn.params["slice_sizes"][at] == _shape(eqn.invars[0])[at]:  # taken whole
            gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
            kept = [k for k in range(len(_shape(eqn.invars[0]))) if k not in gone]
            places.append(_Axis(d.offset_dims[kept.index(at)], operand.stride))
        else:
            raise _Lost("rows not followed")
    if indices is not None:
        places.append(_Axis(batch[indices.dim], indices.stride))
    return _common(places)


def _scatter(eqn: JaxprEqn, axes: _Axes) -> _Axis:
    d, (operand, indices, updates) = eqn.params["dimension_numbers"], axes
    rank = len(_shape(eqn.invars[2]))
    batch = [k for k in range(rank) if k not in d.update_window_dims]
    gone = (*d.inserted_window_dims, *d.operand_batching_dims)
    kept = [k for k in range(len(_shape(eqn.invars[0]))) if k not in gone]

    def target(axis: _Axis) -> _Axis:
        """Where in the operand an axis of the updates goes."""
        if axis.dim in d.update_window_dims:
            dim = kept[d.update_window_dims.index(axis.dim)]
            whole = _shape(eqn.invars[2])[axis.dim] == _shape(eqn.invars[0])[dim]
            if whole:
                return _Axis(dim, axis.stride)
        elif (k := batch.index(axis.dim)) in d.scatter_indices_batching_dims:
            dim = d.operand_batching_dims[d.scatter_indices_batching_dims.index(k)]
            return _Axis(dim, axis.stride)
        raise _Lost("rows not followed")

    places = [] if operand is None else [operand]
    if updates is not None:
        places.append(target(updates))
    if indices is not None:
        places.append(target(_Axis(batch[indices.dim], indices.stride)))
    return _common(places)


def _rows(eqn: JaxprEqn, axes: _Axes, examples: int) -> list[_Axis | None]:
    """Along which axis of each result the examples lie.

    Raises:
        _Lost: rows meet, or the operation is not understood.
    """
    name, params, outs = eqn.primitive.name, eqn.params, len(eqn.outvars)
    known = [axis for axis in axes if axis is not None]
    if not known or all(axis is _ONE for axis in known):
        return [known[0] if known else None] * outs
    if any(axis is _ONE for axis in known):
        raise _Lost("rows")  # one example beside all
    if name in _ELEMENTWISE:
        return [_common(axes)] * outs
    if name in ("optimization_barrier", "device_put"):
        return list(axes)
    if name == "dot_general":
        return [_dot(eqn, axes)]
    if name == "conv_general_dilated":
        return [_conv(eqn, axes)]
    if name == "gather":
        return [_gather(eqn, axes)]
    if name.startswith("scatter"):
        return [_scatter(eqn, axes)]
    dim, stride = axis = _common(axes)
    source = next(v for v, a in zip(eqn.invars, axes) if a is not None)
    shape, new = _shape(source), _shape(eqn.outvars[0])
    if name in _REDUCTIONS:
        over = params["dimensions" if name == "reduce" else "axes"]
        if dim in over:
            means = name == "reduce_sum" and len(new) > 0
            raise _Lost("batch statistics" if means else "rows")
        return [_Axis(dim - sum(d < dim for d in over), stride)] * outs
    if name == "reshape":
        return [_place(axis, shape, new, examples)]
    if name == "broadcast_in_dim":
        return [_Axis(params["broadcast_dimensions"][dim], stride)]
    if name == "transpose":
        return [_Axis(tuple(params["permutation"]).index(dim), stride)]
    if name == "squeeze":
        return [_Axis(dim - sum(d < dim for d in params["dimensions"]), stride)]
    names = ("axis", "dimension", "dimensions", "reduction_dimension")
    along = next((params[k] for k in names if params.get(k) is not None), -1)
    if name.startswith("cum") or name in ("sort", "top_k", "approx_top_k"):
        if along % len(shape) == dim:
            raise _Lost("rows")
        return [axis] * outs
    if name == "tile":
        return [axis]
    if name == "stack":
        return [_Axis(dim + (params["axis"] <= dim), stride)]
    if name == "unstack" and params["axis"] != dim:
        return [_Axis(dim - (params["axis"] < dim), stride)] * outs
    if name == "fft" and dim < len(shape) - len(params["fft_lengths"]):
        return [axis]
    if name in _MATRICES and dim < len(shape) - 2:
        return [axis] * outs
    if name.startswith(("reduce_window", "select_and")):
        if not _window(eqn, dim):
            raise _Lost("rows")
        return [axis] * outs
    alone = (
        (name in ("concatenate", "rev") and dim not in np.ravel(along))
        or (name == "split" and along != dim)
        or (name == "pad" and params["padding_config"][dim] == (0, 0, 0))
        or (name in ("slice", "dynamic_slice") and shape[dim] == new[dim])
        or (
            name == "dynamic_update_slice"
            and axes[2:] == [None] * len(axes[2:])
            and _shape(eqn.invars[1])[dim] == shape[dim]
        )
    )
    if not alone:
        raise _Lost("rows not followed")
    return [axis] * outs


# ------------------------------------------------------------------------ where gradients pass


def _alone(eqn: JaxprEqn) -> tuple[Callable[..., Any], list[Any]]:
    """An equation as a function of its variables, and these."""
    inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    outs = [Var(v.aval) if isinstance(v, DropVar) else v for v in eqn.outvars]
    closed = jax.make_jaxpr(lambda: ())()
    jaxpr = closed.jaxpr.replace(
        invars=inputs, outvars=outs, eqns=[eqn.replace(outvars=outs)], effects=eqn.effects
    )
    return jaxpr_as_fun(closed.replace(jaxpr=jaxpr)), inputs


def _pullback(fn: Callable[..., Any], inputs: Sequence[Any], wrt: Sequence[int]) -> Any:
    """``(cotangents, *inputs) -> gradients`` of the inexact results by the inputs ``wrt``."""

    def pull(cotangents: Sequence[Array], *args: Array) -> tuple[Array, ...]:
        def inexact(*chosen: Array) -> list[Array]:
            full = list(args)
            for i, value in zip(wrt, chosen):
                full[i] = value
            return [out for out in fn(*full) if jnp.issubdtype(out.dtype, jnp.inexact)]

        return jax.vjp(inexact, *(args[i] for i in wrt))[1](list(cotangents))

    return pull


def _flows(eqn: JaxprEqn, wanted: Sequence[int]) -> list[frozenset[int]]:
    """For each result, the operands among ``wanted`` that its gradient reaches.

    Raises:
        _Underivable: with the message of the error that JAX raises.
    """
    fn, inputs = _alone(eqn)
    wrt = sorted({inputs.index(eqn.invars[i]) for i in wanted})
    outs = [v for v in eqn.outvars if _inexact(v)]
    if not outs or not wrt:
        return [frozenset()] * len(eqn.outvars)
    try:
        closed = jax.make_jaxpr(_pullback(fn, inputs, wrt))(
            [_struct(v) for v in outs], *map(_struct, inputs)
        )
    except Exception as error:
        raise _Underivable(str(error).split("\n")[0]) from error
    reach: dict[Any, frozenset[int]] = {
        v: frozenset([i]) for i, v in enumerate(closed.jaxpr.invars[: len(outs)])
    }

    def of(v: Any) -> frozenset[int]:
        return frozenset() if isinstance(v, Literal) else reach.get(v, frozenset())

    for step in closed.jaxpr.eqns:
        reached = frozenset().union(*map(of, step.invars))
        reach |= dict.fromkeys(step.outvars, reached)
    hit = {inputs[k]: of(v) for k, v in zip(wrt, closed.jaxpr.outvars)}
    numbered = iter(range(len(outs)))
    return [
        frozenset(i for i in wanted if j in hit[eqn.invars[i]])
        if _inexact(v) and (j := next(numbered)) is not None
        else frozenset()
        for v in eqn.outvars
    ]


def _bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))]
    closed = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values]
    return [v for v in closed if isinstance(v, Jaxpr)]


def _size(jaxpr: Jaxpr) -> int:
    """Operations in a program; those of a callback count as too many."""
    return sum(
        (1 << 20 if "callback" in eqn.primitive.name else 1) + sum(map(_size, _bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def _honest(eqn: JaxprEqn, body: ClosedJaxpr, wanted: Sequence[int]) -> str:
    """How a custom derivative compares at random numbers with that of what it computes.

    ``"equal"``, ``"zero"`` or ``"other"``; empty where they could not be compared.
    """
    mine = body.jaxpr.debug_info.func_src_info or ""
    if os.path.dirname(jax.__file__) in mine:  # JAX's own, such as relu
        return ""
    if _size(body.jaxpr) > 50 or sum(math.prod(_shape(v)) for v in eqn.invars) > 1 << 22:
        return ""
    rng = np.random.default_rng(0)

    def numbers(v: Any) -> Array:
        if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), v.aval.shape)
        values = rng.normal(size=v.aval.shape) if _inexact(v) else np.zeros(v.aval.shape)
        return jnp.asarray(values, v.aval.dtype)

    args = [v.val if isinstance(v, Literal) else numbers(v) for v in eqn.invars]
    cotangents = [numbers(v) for v in eqn.outvars if _inexact(v)]
    fn, inputs = _alone(eqn)
    wrt = sorted({inputs.index(eqn.invars[i]) for i in wanted})
    values = dict(zip(eqn.invars, args))
    try:
        got = _pullback(fn, inputs, wrt)(cotangents, *(values[v] for v in inputs))
        first = [eqn.invars.index(inputs[k]) for k in wrt]
        want = _pullback(jaxpr_as_fun(body), eqn.invars, first)(cotangents, *args)
    except Exception:  # what cannot be differentiated is another finding, or its body is hidden
        return ""
    a, b = (
        np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in side]) for side in (got, want)
    )
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return ""  # outside of its domain
    if not np.any(a):
        return "zero" if np.any(b) else "equal"
    return "other" if np.linalg.norm(a - b) > 0.05 * np.linalg.norm(b) else "equal"


# ----------------------------------------------------------------------------------- the reader

_ONE_BODY = ("jit", "remat2", "checkpoint", "custom_vmap_call", "closed_call", "core_call")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_SQUASHING = ("tanh", "logistic", "erf")
_DRAWS = ("random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32")


class _Reader:
    """The abstract interpreter."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.values: dict[Any, _Value] = {}
        self.order: dict[_Cause, int] = {}  # in which causes were met
        self.compared = False  # whether custom gradients were evaluated
        self._known: dict[Any, Any] = {}

    def read(self, jaxpr: Jaxpr, args: Sequence[_Value], outer: Equation) -> list[_Value]:
        """The values of the results of a program that ``outer`` calls."""
        self.values |= dict(zip(jaxpr.invars, args))
        self.values |= dict.fromkeys(jaxpr.constvars, _Value())
        kept = deliberate(jaxpr)
        made: dict[Any, JaxprEqn] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            made |= dict.fromkeys(eqn.outvars, eqn)
            outs = self._equation(eqn, list(map(self.of, eqn.invars)), outer, kept.get(i), made)
            self.values |= dict(zip(eqn.outvars, outs))
        return list(map(self.of, jaxpr.outvars))

    def of(self, v: Any) -> _Value:
        return _Value() if isinstance(v, Literal) else self.values[v]

    def _equation(
        self,
        eqn: JaxprEqn,
        ins: list[_Value],
        outer: Equation,
        kept: str | None,
        made: dict[Any, JaxprEqn],
    ) -> list[_Value]:
        name = eqn.primitive.name
        here = _locate(eqn, outer)

        def cause(kind: str, what: str = "") -> _Cause:
            made = _Cause(kind, here, what)
            self.order.setdefault(made, len(self.order))
            return made

        notes = _union(v.notes for v in ins)
        if any(v.depends for v in ins):
            new = self._notes(eqn, ins, cause, made)
            if kept == "straight-through":
                new.append(cause("straight-through", "by the model's author"))
            if "transpose(" in str(eqn.source_info.name_stack):
                new.append(cause("optimisation"))
            notes |= frozenset(new)
        if name in _DRAWS and _DECLARED not in notes:
            seed = any(v.depends for v in ins)
            notes |= {cause("randomness", "seeded by the input" if seed else "from a constant key")}
        if (outs := self._nested(eqn, ins, here, cause)) is not None:
            mine = notes - _union(v.notes for v in ins)
            return [dataclasses.replace(v, notes=v.notes | mine) for v in outs]
        try:
            axes = _rows(eqn, [v.axis for v in ins], self.examples)
        except _Lost as lost:
            axes = [None] * len(eqn.outvars)
            notes |= {cause(str(lost))}
        if name == "ne" and eqn.invars[0] is eqn.invars[1]:  # as jnp.isnan: a constant, of numbers
            return [_Value(axis, notes=notes, nan=True) for axis in axes]
        outs = [_Value(axis, notes=notes) for axis in axes]
        if kept in ("shift", "straight-through"):
            return outs  # no gradient, and none missing
        if self._rounds(eqn, made):
            cuts = _union(v.cuts for v in ins) | {cause("gradient cut", "x - x % q")}
            return [dataclasses.replace(v, cuts=cuts) for v in outs]
        outs = self._gradients(eqn, ins, outs, cause)
        if kept == "end":
            outs = [dataclasses.replace(v, cuts=frozenset()) if v.grad else v for v in outs]
        return outs

    def _rounds(self, eqn: JaxprEqn, made: dict[Any, JaxprEqn]) -> bool:
        """Whether this is ``x - x % q``, a rounding whose two gradients cancel."""
        if eqn.primitive.name != "sub" or isinstance(eqn.invars[1], Literal):
            return False
        rest = made.get(eqn.invars[1])
        if rest is None or len(rest.invars) != 2 or rest.invars[0] is not eqn.invars[0]:
            return False
        names = rest.primitive.name, rest.params.get("name")
        return not self.of(rest.invars[1]).depends and (
            names[0] == "rem" or names in (("jit", "remainder"), ("jit", "fmod"))
        )

    def _notes(
        self, eqn: JaxprEqn, ins: list[_Value], cause: Callable[..., _Cause], made: Any
    ) -> list[_Cause]:
        """What else there is to say about an operation on values that depend on the input."""
        name, new = eqn.primitive.name, []
        wide = all(_width(v) >= 32 for v, known in zip(eqn.invars, ins) if known.depends)
        narrow = [_dtype(v).name for v in eqn.outvars if _width(v) < 32]
        if narrow and wide:
            new.append(cause("half precision", narrow[0]))
        if name == "reduce_precision" and eqn.params["mantissa_bits"] < 23:
            bits = f"{eqn.params['mantissa_bits']} bits of mantissa"
            new.append(cause("half precision", bits))
        passes = any(known.grad for known in ins)
        if passes and (name == "clamp" or (name == "jit" and eqn.params["name"] == "clip")):
            new.append(cause("clip"))
        before = made.get(eqn.invars[0]) if name in _SQUASHING else None
        if passes and before is not None and before.primitive.name in ("mul", "div"):
            for v in before.invars:
                if isinstance(v, Literal) and np.ndim(v.val) == 0:
                    scale = abs(float(v.val))
                    scale = 1 / scale if before.primitive.name == "div" and scale else scale
                    if scale >= 10:
                        new.append(cause("steep", f"{scale:.4g}"))
        return new

    def _gradients(
        self,
        eqn: JaxprEqn,
        ins: list[_Value],
        outs: list[_Value],
        cause: Callable[..., _Cause],
    ) -> list[_Value]:
        """`outs` with what is known about gradients; operands and results are those of `eqn`.

        Operands that only steer, such as a predicate or an index, take no gradient away where
        another operand carries it: the model is then differentiable almost everywhere.
        """
        if eqn.primitive.name == "select_n" and ins[0].nan:
            ins = [*ins[:2], _Value()]  # what is taken where numbers are NaN carries no gradient
        every = _union(v.cuts for v in ins)
        if not any(v.grad for v in ins):
            return [dataclasses.replace(v, cuts=every) for v in outs]
        wanted = [
            i
            for i, (v, known) in enumerate(zip(eqn.invars, ins))
            if (known.grad or known.cuts) and _inexact(v)
        ]
        try:
            flows = self._cached(eqn, wanted)
        except _Underivable as error:
            lost = cause("no derivative", str(error))
            return [
                dataclasses.replace(v, cuts=every | {lost}, notes=v.notes | {lost}) for v in outs
            ]
        new = []
        for v, known, through in zip(eqn.outvars, outs, flows):
            if any(ins[i].grad for i in through):
                cuts = _union(ins[i].cuts for i in through)
                new.append(dataclasses.replace(known, grad=True, cuts=cuts))
            else:
                what = "" if _inexact(v) else f"to {_dtype(v)}"
                cuts = every | {cause("gradient cut", what)}
                new.append(dataclasses.replace(known, cuts=cuts))
        return new

    def _cached(self, eqn: JaxprEqn, wanted: list[int]) -> list[frozenset[int]]:
        if eqn.primitive.name in _CUSTOM or _bodies(eqn):
            return _flows(eqn, wanted)
        types = tuple(str(v.aval) + str(isinstance(v, Literal)) for v in eqn.invars)
        order = tuple(eqn.invars.index(v) for v in eqn.invars)  # which are the same
        key = (eqn.primitive.name, str(eqn.params), types, order, tuple(wanted))
        if key not in self._known:
            self._known[key] = _flows(eqn, wanted)
        return self._known[key]

    # ------------------------------------------------------------- programs within the program

    def _nested(
        self, eqn: JaxprEqn, ins: list[_Value], here: Equation, cause: Callable[..., _Cause]
    ) -> list[_Value] | None:
        """The values of a call, branch or loop; None for another operation."""
        name, params = eqn.primitive.name, eqn.params
        if name in _ONE_BODY:
            bodies = _bodies(eqn)
            if len(bodies) != 1 or len(bodies[0].invars) != len(ins):
                return None
            return self.read(bodies[0], ins, here)
        if name in _CUSTOM:
            return self._custom(eqn, ins, here, cause)
        if name == "cond":
            outs = [self.read(branch.jaxpr, ins[1:], here) for branch in params["branches"]]
            return [self._steered(ins[:1], values, cause) for values in zip(*outs)]
        if name == "scan":
            return self._scan(eqn, ins, here, cause)
        if name == "while":
            return self._while(eqn, ins, here, cause)
        return None

    def _joined(self, values: Sequence[_Value], cause: Callable[..., _Cause]) -> _Value:
        """What is known of a value that is one of several."""
        axes = {v.axis for v in values if v.axis is not None}
        notes = _union(v.notes for v in values)
        if len(axes) > 1:
            notes |= {cause("rows not followed")}
        cuts = _union(v.cuts for v in values)
        return _Value(
            axes.pop() if len(axes) == 1 else None, any(v.grad for v in values), cuts, notes
        )

    def _steered(
        self, by: Sequence[_Value], values: Sequence[_Value], cause: Callable[..., _Cause]
    ) -> _Value:
        """One of several values, chosen by a single number ``by`` for all examples."""
        out = self._joined(values, cause)
        notes = out.notes | _union(v.notes for v in by)
        if any(v.depends and v.axis is not _ONE for v in by):
            notes |= {cause("rows not followed", "one decision for the whole batch")}
        if out.axis is None and any(v.axis is _ONE for v in by):
            out = _at(out, _ONE)
        cuts = out.cuts if out.grad else out.cuts | _union(v.cuts for v in by)
        return dataclasses.replace(out, cuts=cuts, notes=notes)

    def _carried(
        self,
        carry: list[_Value],
        turn: Callable[[list[_Value]], list[_Value]],
        cause: Callable[..., _Cause],
    ) -> list[_Value]:
        """What the carry of a loop may be at any turn."""
        while True:
            pairs = zip(carry, turn(carry))
            new = [a if a == b else self._joined((a, b), cause) for a, b in pairs]
            # An axis that was lost once stays lost.
            new = [
                dataclasses.replace(b, axis=None) if a.axis is None and a.depends else b
                for a, b in zip(carry, new)
            ]
            if new == carry:
                return carry
            carry = new

    def _scan(
        self, eqn: JaxprEqn, ins: list[_Value], here: Equation, cause: Callable[..., _Cause]
    ) -> list[_Value]:
        body = eqn.params["jaxpr"].jaxpr
        carried = len(eqn.outvars) - _longer(eqn.outvars, body.outvars)
        ends = len(ins) - _longer(eqn.invars, body.invars)
        consts, start, xs = ins[: ends - carried], ins[ends - carried : ends], ins[ends:]

        def inside(v: _Value) -> _Value:
            if v.axis is None or v.axis is _ONE:
                return v
            if v.axis.dim:
                return _at(v, _Axis(v.axis.dim - 1, v.axis.stride))
            return _at(v, _ONE)

        def outside(v: _Value) -> _Value:
            if v.axis is None:
                return v
            if v.axis is _ONE:
                return _at(v, _Axis(0, 1) if over else _ONE)
            return _at(v, _Axis(v.axis.dim + 1, v.axis.stride))

        # Turn by turn over the examples: only if nothing else lies along that axis.
        over = any(v.axis is not None and v.axis.dim == 0 for v in xs)
        if over and eqn.params["length"] != self.examples:
            lost = frozenset([cause("rows not followed")])
            return [
                _Value(None, any(v.grad for v in ins), _union(v.cuts for v in ins), v_notes)
                for v_notes in [_union(v.notes for v in ins) | lost] * len(eqn.outvars)
            ]
        rows = [inside(v) for v in xs]

        def turn(carry: list[_Value]) -> list[_Value]:
            out = self.read(body, [*consts, *carry, *rows], here)[:carried]
            return [
                dataclasses.replace(v, axis=None, notes=v.notes | {cause("rows")})
                if over and v.axis is _ONE
                else v
                for v in out
            ]

        carry = self._carried(start, turn, cause)
        last = turn(carry) if eqn.params["length"] else carry
        ys = self.read(body, [*consts, *carry, *rows], here)[carried:]
        return [*last, *map(outside, ys)]

    def _while(
        self, eqn: JaxprEqn, ins: list[_Value], here: Equation, cause: Callable[..., _Cause]
    ) -> list[_Value]:
        params = eqn.params
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        asked, consts, start = ins[: split[0]], ins[split[0] : split[1]], ins[split[1] :]
        body, question = params["body_jaxpr"].jaxpr, params["cond_jaxpr"].jaxpr
        carry = self._carried(start, lambda carry: self.read(body, [*consts, *carry], here), cause)
        by = self.read(question, [*asked, *carry], here)
        outs = [self._steered(by, [v], cause) if v.depends else v for v in carry]
        lost = cause("no derivative", "a while loop has no reverse-mode derivative")
        return [
            dataclasses.replace(v, grad=False, cuts=v.cuts | {lost}, notes=v.notes | {lost})
            if v.grad
            else v
            for v in outs
        ]

    def _custom(
        self, eqn: JaxprEqn, ins: list[_Value], here: Equation, cause: Callable[..., _Cause]
    ) -> list[_Value] | None:
        """A call with a derivative of its own: rows are those of the body, gradients the rule's."""
        (body, *_) = [v for v in eqn.params.values() if isinstance(v, ClosedJaxpr)]
        inner = self.read(body.jaxpr, ins, here)
        # What the body does to gradients, the rule undoes.
        before = _union(v.notes for v in ins)
        undone = {c for v in inner for c in v.notes - before if c.kind in _DIFFERENTIAL}
        plain = [_Value(v.axis, notes=v.notes - undone) for v in inner]
        outs = self._gradients(eqn, ins, plain, cause)
        wanted = [i for i, v in enumerate(ins) if v.grad and _inexact(eqn.invars[i])]
        new = []
        for v, inside, out in zip(eqn.outvars, inner, outs):
            if not _inexact(v) or not wanted:
                new.append(out)
            elif not out.grad:
                plainly, rule = cause("gradient cut"), cause("gradient cut", "by its custom rule")
                cuts = out.cuts - {plainly} | {rule} if plainly in out.cuts else out.cuts
                new.append(dataclasses.replace(out, cuts=cuts))
            elif not inside.grad:
                note = cause("straight-through", "by a custom rule")
                new.append(dataclasses.replace(out, notes=out.notes | {note}))
            else:
                new.append(self._compared(eqn, body, wanted, out, cause))
        return new

    def _compared(
        self,
        eqn: JaxprEqn,
        body: ClosedJaxpr,
        wanted: list[int],
        out: _Value,
        cause: Callable[..., _Cause],
    ) -> _Value:
        where = source_info_util.summarize(eqn.source_info)
        key = (eqn.primitive.name, str(body), where, tuple(wanted))
        if key not in self._known:
            self._known[key] = _honest(eqn, body, wanted)
        verdict = self._known[key]
        self.compared |= bool(verdict)
        if verdict == "zero":
            cut = cause("gradient cut", "by its custom rule")
            return dataclasses.replace(out, grad=False, cuts=out.cuts | {cut})
        if verdict == "other":
            return dataclasses.replace(out, notes=out.notes | {cause("custom gradient")})
        return out

    # ------------------------------------------------------------------------ the last operations

    def ends(self, jaxpr: Jaxpr) -> list[Equation]:
        """The operations whose results are moved, scaled and added to the logits."""
        found: dict[Equation, None] = {}
        seen = set()

        def walk(jaxpr: Jaxpr, v: Any, up: Callable[[int], None], outer: Equation) -> None:
            if isinstance(v, Literal) or v in seen or not self.of(v).depends:
                return
            seen.add(v)
            eqn = next((eqn for eqn in jaxpr.eqns if v in eqn.outvars), None)
            if eqn is None:
                if v in jaxpr.invars:
                    up(jaxpr.invars.index(v))
                return
            name = eqn.primitive.name
            here = _locate(eqn, outer)
            live = [w for w in eqn.invars if self.of(w).depends]

            def on(variables: Sequence[Any]) -> None:
                for w in variables:
                    walk(jaxpr, w, up, outer)

            scaled = name == "div" and live == eqn.invars[:1]
            if name in _LINEAR or scaled or (name == "mul" and len(live) == 1):
                on(live)
            elif name in (*_ONE_BODY, *_CUSTOM, "scan", "cond"):
                skip = 1 if name == "cond" else 0
                for body in _bodies(eqn):
                    if len(body.outvars) == len(eqn.outvars):
                        inside = body.outvars[eqn.outvars.index(v)]
                        walk(body, inside, lambda i: on([eqn.invars[i + skip]]), here)
            else:
                found[here] = None

        for v in jaxpr.outvars:
            walk(jaxpr, v, lambda i: None, _TOP)
        return list(found)


_LINEAR = (
    *MOVES,
    *("convert_element_type", "reduce_precision", "concatenate", "pad", "reduce_sum", "neg"),
    *("add", "sub", "dynamic_slice", "gather", "optimization_barrier"),
)
_BOUNDED = _names(
    """ceil clamp div eq erf erfc exp exp2 floor ge gt integer_pow le logistic lt max min ne pow
    round scatter scatter-add select_n sign tanh"""
)


# ------------------------------------------------------------------------------------ the verdict


class _Met(NamedTuple):
    """How rows of a model depend on each other, measured."""

    others: bool  # a row's logits change when all other rows do
    position: bool  # ... when all rows move by one


def _meet(model: Any, given: tuple[Array, ...]) -> _Met:
    run = jax.jit(_apply)
    x, n = given[-1], len(given[-1])
    base = np.asarray(run(model, *given), np.float32)
    size = np.max(np.abs(base), initial=1, where=np.isfinite(base))

    def same(a: Any, b: Any) -> bool:
        return np.allclose(a, b, rtol=0, atol=1e-5 * size, equal_nan=True)

    def kept(i: int) -> bool:
        changed = _other(x).at[i].set(x[i])
        return same(run(model, *given[:-1], changed)[i], base[i])

    order = (np.arange(n) + 1) % n
    rolled = run(model, *(array[order] for array in given))
    return _Met(not (kept(0) and kept(n - 1)), not same(rolled, base[order]))


# severity, what (with {} for what the cause says), effect, remedy
_TEXT = {
    "no derivative": (
        "error",
        "no derivative exists: {}",
        "a gradient attack stops with an error",
        "replace it (lax.scan or lax.fori_loop with constant bounds, for a while loop), give it "
        "a gradient with models.bpda, or attack with estimator= from jrobust.zeroth_order",
    ),
    "custom gradient": (
        "warning",
        "a custom derivative differs from that of what it computes by more than 5%",
        "gradient attacks follow the rule, not the model",
        "make sure that the rule serves the attack; else take it away",
    ),
    "straight-through": (
        "info",
        "a gradient is written by hand, {}, where the program has none",
        "attacks follow what was written",
        "none needed; a gradient-free attack, as Square in AutoAttack, is a check of it",
    ),
    "clip": (
        "info",
        "values are clipped",
        "no gradient where they are outside of the bounds",
        "none, unless most values are; compare with an attack on the model without it",
    ),
    "steep": (
        "info",
        "a squashing function of {} times its input",
        "its gradient vanishes in float32 for all but small inputs",
        "attack the model without the factor and judge by this one",
    ),
    "half precision": (
        "warning",
        "computes in {}",
        "ties and rounding: gradients lose small components, and the verdict may differ from "
        "float32's",
        "search with it, judge with the float32 model: loops.evaluate(model32, search_fn=model), "
        "and bind without dtype=",
    ),
    "optimisation": (
        "warning",
        "differentiates something at inference, as purifiers and adaptive defences do",
        "gradients through it are costly and often vanish or explode; robustness is overestimated "
        "by attacks that stop early",
        "attack with gradients through all of it and many steps; compare with models.bpda around "
        "it and with transfer from the undefended model",
    ),
}
_CUT = (
    "operations on a parallel path leave the attack a gradient, which misses what flows through "
    "here",
    "search with models.straight_through(model) too, or give this part a gradient with models.bpda",
)
_MEETING = {
    "rows": "rows of the batch meet",
    "batch statistics": "sums over the batch, as of batch-norm in training mode",
    "rows not followed": "cannot tell whether rows of the batch meet{}",
}


def _judge(
    logits: _Value,
    reader: _Reader,
    closed: ClosedJaxpr,
    model: Any,
    given: tuple[Array, ...],
    classes: int,
    draws: bool,
) -> tuple[list[Finding], list[str]]:
    """What reached the logits, as findings, and what had to be evaluated for it."""
    evaluated = ["custom gradients"] if reader.compared else []
    groups: dict[Any, list[_Cause]] = {}
    for cause in sorted((logits.notes | logits.cuts) - {_DECLARED}, key=reader.order.__getitem__):
        once = cause.kind in ("half precision", "optimisation", "straight-through")
        place = () if once else (cause.where.primitive, cause.where.source)
        groups.setdefault((cause.kind, cause.what, place), []).append(cause)
    kinds = {kind for kind, *_ in groups}
    met = None
    if kinds & {*_ROWS, "randomness"}:
        met = _meet(model, given)
        evaluated.append("rows")
    findings = [_finding(causes, logits, met, kinds) for causes in groups.values()]
    if met is not None and met.position and not met.others:
        findings.append(
            Finding(
                "rows",
                "error",
                None,
                "logits depend on the position in the batch",
                "an attack optimises one position and is judged at another",
                "draw noise from keys of the examples: models.randomized(fn, key)",
            )
        )
    if not logits.grad and not logits.cuts:
        findings.append(
            Finding(
                "gradient cut",
                "error",
                None,
                "the logits do not depend on x",
                "no attack can change anything",
                "pass the function of the inputs",
            )
        )
    if draws:
        findings.append(_drawing(_DECLARED in logits.notes))
    ends = reader.ends(closed.jaxpr)
    if any(end.primitive in _BOUNDED for end in ends):
        evaluated.append("output")
        findings += _output(np.asarray(jax.jit(_apply)(model, *given), np.float32), ends, logits)
    if classes < 4:
        findings.append(_few(classes))
    return findings, evaluated


def _finding(causes: list[_Cause], logits: _Value, met: _Met | None, kinds: set[str]) -> Finding:
    (kind, where, what), count = causes[0], len(causes)
    if kind == "gradient cut":
        says = f"{where.primitive} has no gradient" + (f" ({what})" if what else "")
        if logits.grad:
            return Finding(f"part of the {kind}", "warning", where, says, *_CUT, count)
        effect = "the gradient is zero everywhere: gradient attacks return what they started from"
        remedy = (
            "search with models.straight_through(model) or give it a gradient with models.bpda, "
            "and add an attack without gradients (attacks.Square)"
        )
        return Finding(kind, "error", where, says, effect, remedy, count)
    if kind == "randomness":
        return Finding(
            kind,
            "warning",
            where,
            f"random numbers {what}",
            "the noise is a constant of the model: what survives may survive this one draw alone",
            "if the defence is random, let the keys in: models.randomized(fn, key)",
            count,
        )
    if kind in _ROWS:
        assert met is not None
        surely = kind != "rows not followed"
        alone = kinds.isdisjoint(_ROWS[:2])
        says = _MEETING[kind].format(f": {what}" if what else "")
        if met.others and (surely or alone):
            return Finding(
                kind,
                "error",
                where,
                f"{says}; replacing the other rows changed a row's logits",
                "an example's logits, gradient and success depend on what it is batched with",
                "evaluation mode (train=False, use_running_average=True), or a function of one "
                "example under jax.vmap",
                count,
            )
        return Finding(
            kind,
            "warning" if surely and not met.others else "info",
            where,
            f"{says}; replacing the other rows changed no row's logits",
            "none seen",
            "make sure that no other batch shows a dependence",
            count,
        )
    severity, says, effect, remedy = _TEXT[kind]
    return Finding(kind, severity, where, says.format(what), effect, remedy, count)


def _drawing(used: bool) -> Finding:
    if used:
        return Finding(
            "randomness",
            "info",
            None,
            "draws from its own keys; one draw was inspected",
            "gradient attacks ascend the mean loss over fresh draws, and the verdict is a vote",
            "none needed; AutoAttack(threat, 'rand') is the version for such models",
        )
    return Finding(
        "randomness",
        "warning",
        None,
        "declared random, but its logits do not depend on the keys",
        "every step and verdict costs many passes that are all the same",
        "pass the deterministic model itself",
    )


def _few(classes: int) -> Finding:
    lacks = "no third logit, so DLR" if classes < 3 else "no fourth logit, so targeted DLR"
    uses = "its APGD-DLR ascends the margin (losses.dlr_or_margin) and " if classes < 3 else ""
    return Finding(
        "few classes",
        "info",
        None,
        f"{classes} classes: {lacks} is not defined",
        f"in AutoAttack {uses}targeted APGD ascends z_t - z_y (losses.dlr_or_margin_targeted)",
        "none needed; losses.dlr and losses.dlr_targeted as such raise an error",
    )


def _output(values: np.ndarray, ends: list[Equation], logits: _Value) -> list[Finding]:
    """What the logits at ``x`` show of the operations they come from."""
    where = next(end for end in ends if end.primitive in _BOUNDED)
    # Rows of half precision sum to one as well as it can add.
    error = 1e-2 if any(c.kind == "half precision" for c in logits.notes) else 1e-5
    if np.all((values >= -error) & (values <= 1 + error) & np.isfinite(values)) and np.all(
        np.abs(values.sum(1) - 1) <= error
    ):
        if not logits.grad and np.all((values == 0) | (values == 1)):
            return [
                Finding(
                    "one-hot",
                    "error",
                    where,
                    "the outputs are one-hot: a decision, not logits",
                    "no gradient, and no score to search by",
                    "return the logits before the decision, or use attacks that need labels alone",
                )
            ]
        return [
            Finding(
                "probabilities",
                "warning",
                where,
                "the outputs are probabilities: in [0, 1], with rows that sum to 1",
                "attacks apply a softmax of their own, and float32 rounds confident outputs to 0 "
                "and 1, where the gradient vanishes",
                "return the logits before the softmax, or their logarithm (jax.nn.log_softmax)",
            )
        ]
    squashed = [end for end in ends if end.primitive in _SQUASHING]
    if not squashed:
        return []
    low, high = values.min(), values.max()
    edge = 1e-6 * (high - low)
    # Some number is the lowest and some the highest, whether they saturate or not.
    share = max(0, np.sum((values <= low + edge) | (values >= high - edge)) - 2) / values.size
    return [
        Finding(
            "saturation",
            "warning" if share >= 0.5 else "info",
            squashed[0],
            f"the logits are bounded, and {share:.0%} of those at x are at their bounds",
            "no gradient in float32 where they are",
            "attack what comes before, and judge by this model: attacks.transfer, or judge=",
        )
    ]
