"""Convolutions in the one layout that XLA runs fast inside a loop on the CPU.

On the CPU, XLA has a fast kernel for convolutions whose input and output are ``N...C`` (batch,
spatial, feature) and whose kernel is ``...IO``; it brings other layouts into this form in the entry
computation only. Inside the body of a ``while``, ``scan`` or ``cond`` the gradient of a convolution
with respect to its input (kernel ``...OI``) or its kernel (batch and feature exchanged) therefore
runs as a naive loop, as does the forward pass of an ``NC...`` model. :func:`rewrite` moves the
transposes that XLA would have made into the jaxpr, and avoids two forms that XLA compiles badly
everywhere: batch groups, and kernels larger than the image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

P = ParamSpec("P")
T = TypeVar("T")

# Primitives that are known to mean what the jaxprs in their parameters say. Anything else that
# holds a jaxpr (a Pallas kernel, a custom partitioning, what a later JAX brings) stays as it is.
_CALLS = (
    *("jit", "scan", "while", "cond", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"),
)


def rewrite(fn: Callable[P, T]) -> Callable[P, T]:
    """The same function with every convolution in the layout that is fast inside loops on the CPU.

    Apply it after the last differentiation and outermost, ``jit(rewrite(attack))``: it reaches
    into the bodies of loops, branches and calls. Each floating-point convolution with another
    layout is transposed to ``N...C`` / ``...IO``, computed and transposed back when the program is
    lowered for the CPU; for other platforms it is lowered as it was. All else is kept as it is,
    canonical convolutions, effects and ``custom_jvp``/``custom_vjp`` rules included.

    The result may still be differentiated, any number of times in any mode: its derivatives are
    those of ``fn``. The convolutions that this creates are ordinary ones, slow in loops until
    rewritten in their turn.

    Args:
        fn: takes and returns pytrees of arrays (typed PRNG keys and Python numbers included). It is
            traced at each call of the result, which is meant to happen under ``jax.jit``.

    Raises:
        TypeError: an argument or result has a leaf that is not an array (from ``jax.make_jaxpr``).
    """

    @functools.wraps(fn)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # to be stepped through
            return fn(*args, **kwargs)
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        flat = jaxpr_as_fun(_closed(closed, {}))(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return rewritten


def _closed(closed: ClosedJaxpr, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> ClosedJaxpr:
    jaxpr = _jaxpr(closed.jaxpr, done)
    return closed if jaxpr is closed.jaxpr else closed.replace(jaxpr=jaxpr)


def _jaxpr(jaxpr: Jaxpr, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> Jaxpr:
    """`jaxpr` itself where nothing is to do. `done` keeps shared bodies shared: they lower once."""
    if id(jaxpr) not in done:
        eqns = [_equation(eqn, done) for eqn in jaxpr.eqns]
        same = all(new is old for new, old in zip(eqns, jaxpr.eqns))
        done[id(jaxpr)] = jaxpr, (jaxpr if same else jaxpr.replace(eqns=eqns))
    return done[id(jaxpr)][1]


def _equation(eqn: JaxprEqn, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> JaxprEqn:
    if eqn.primitive.name == "conv_general_dilated":
        return eqn if _is_fast(eqn) else _convolution(eqn)
    if eqn.primitive.name == "shard_map":
        return _shard_map(eqn, done)
    if eqn.primitive.name not in _CALLS:
        return eqn

    def visit(value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return _closed(value, done)
        return _jaxpr(value, done) if isinstance(value, Jaxpr) else value

    changed = {k: new for k, v in eqn.params.items() if (new := visit(v)) is not v}
    if branches := eqn.params.get("branches"):
        # Of `platform_dependent` only what runs on the CPU, so that rewriting twice is once.
        platforms = eqn.params.get("branches_platforms") or [("cpu",)] * len(branches)
        default = not any("cpu" in (names or ()) for names in platforms)
        new = tuple(
            visit(branch) if (default if names is None else "cpu" in names) else branch
            for names, branch in zip(platforms, branches)
        )
        if any(a is not b for a, b in zip(new, branches)):
            changed["branches"] = new
    return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def _shard_map(eqn: JaxprEqn, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> JaxprEqn:
    """Works inside a ``shard_map`` of the same kind, where types say along which axes they vary."""
    params = dict(eqn.params)

    def inside() -> None:
        params["jaxpr"] = _jaxpr(eqn.params["jaxpr"], done)

    kind = {"axis_names": params["newly_manual_axes"], "check_vma": params["check_vma"]}
    with eqn.ctx.manager:
        jax.eval_shape(
            jax.shard_map(inside, mesh=params["mesh"], in_specs=(), out_specs=None, **kind)
        )
    return eqn if params["jaxpr"] is eqn.params["jaxpr"] else eqn.replace(params=params)


def _canonical(rank: int) -> lax.ConvDimensionNumbers:
    """``N...C, ...IO, N...C``, as the positions of (N, C, ...) and of (O, I, ...)."""
    spatial = range(rank - 2)
    image = (0, rank - 1, *(s + 1 for s in spatial))
    return lax.ConvDimensionNumbers(image, (rank - 1, rank - 2, *spatial), image)


def _swaps(image: Sequence[int], kernel: Sequence[int], params: dict[str, Any]) -> bool:
    """Whether XLA would exchange image and kernel, given their lengths in space.

    It does so for a kernel larger than the image. The layout is then lost, and the convolution up
    to 14 times slower, in the entry computation too.
    """
    return params["feature_group_count"] == 1 and math.prod(kernel) > math.prod(image)


def _is_fast(eqn: JaxprEqn) -> bool:
    avals: list[Any] = [v.aval for v in eqn.invars]
    lhs, rhs = avals
    if not jax.numpy.issubdtype(lhs.dtype, jax.numpy.floating):
        return True
    return (
        eqn.params["dimension_numbers"] == _canonical(lhs.ndim)
        and eqn.params["batch_group_count"] == 1
        and not _swaps(lhs.shape[1:-1], rhs.shape[:-2], eqn.params)
    )


def _permute(x: jax.Array, source: Sequence[int], target: Sequence[int]) -> jax.Array:
    where = dict(zip(target, source))
    order = [where[d] for d in range(x.ndim)]
    return x if order == sorted(order) else lax.transpose(x, order)


def _struct(variable: Any) -> jax.ShapeDtypeStruct:
    """The whole type of a variable, with what ``shard_map`` and explicit sharding add to it."""
    kinds = ("weak_type", "sharding", "manual_axis_type")
    aval = variable.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **{k: getattr(aval, k) for k in kinds})


def _convolution(eqn: JaxprEqn) -> JaxprEqn:
    old = eqn.params["dimension_numbers"]
    new = _canonical(len(old.lhs_spec))
    plain = functools.partial(eqn.primitive.bind, **eqn.params)

    def fast(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        params = {**eqn.params, "dimension_numbers": new}
        lhs = _permute(lhs, old.lhs_spec, new.lhs_spec)
        rhs = _permute(rhs, old.rhs_spec, new.rhs_spec)
        if (groups := params["batch_group_count"]) > 1:  # XLA lowers feature groups better
            n, *size, c = lhs.shape
            lhs = lax.reshape(lhs, (groups, n // groups, *size, c))
            lhs = lax.transpose(lhs, (*range(1, lhs.ndim - 1), 0, lhs.ndim - 1))
            lhs = lax.reshape(lhs, (n // groups, *size, groups * c))
            params |= {"batch_group_count": 1, "feature_group_count": groups}
        if _swaps(lhs.shape[1:-1], rhs.shape[:-2], params):
            pad = [
                (low, high, d - 1)
                for (low, high), d in zip(params["padding"], params["lhs_dilation"])
            ]
            lhs = lax.pad(lhs, numpy.zeros((), lhs.dtype), [(0, 0, 0), *pad, (0, 0, 0)])
            lhs = lax.optimization_barrier(lhs)  # or XLA would merge the padding again
            params |= {"padding": ((0, 0),) * len(pad), "lhs_dilation": (1,) * len(pad)}
        out = eqn.primitive.bind(lhs, rhs, **params)
        return _permute(out, new.out_spec, old.out_spec)

    # With a rule of its own, a later derivative does not carry the residuals of both branches.
    @jax.custom_jvp
    def convolution(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.platform_dependent(lhs, rhs, cpu=fast, default=plain)

    def jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
        (lhs, rhs), (dlhs, drhs) = primals, tangents
        terms = [
            plain(*pair)
            for pair in ((dlhs, rhs), (lhs, drhs))
            if not any(isinstance(value, SymbolicZero) for value in pair)
        ]
        return convolution(lhs, rhs), functools.reduce(lax.add, terms)

    convolution.defjvp(jvp, symbolic_zeros=True)
    with eqn.ctx.manager:
        (call,) = jax.make_jaxpr(convolution)(*map(_struct, eqn.invars)).eqns
    return call.replace(invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info)
