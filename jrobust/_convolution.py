"""Convolutions in the one layout that XLA runs fast inside a loop on the CPU.

On the CPU, XLA has a fast kernel for convolutions whose input and output are ``N...C`` (batch,
spatial, feature) and whose kernel is ``...IO``; it brings other layouts into this form in the entry
computation only. Inside the body of a ``while``, ``scan`` or ``cond`` the gradient of a convolution
with respect to its input (kernel ``...OI``) or its kernel (batch and feature exchanged) therefore
runs as a naive loop, as does the forward pass of an ``NC...`` model. :func:`rewrite` moves the
transposes that XLA would have made into the jaxpr.
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
_CALLS = frozenset(
    "jit pjit call core_call closed_call xla_pmap shard_map scan while cond checkpoint remat remat2"
    " custom_jvp_call custom_vjp_call custom_vmap_call".split()
)


def rewrite(fn: Callable[P, T]) -> Callable[P, T]:
    """The same function with every convolution in the layout that is fast inside loops on the CPU.

    Apply it after the last differentiation and outermost, ``jit(rewrite(attack))``: it reaches
    into the bodies of loops, branches and calls. Each convolution with another layout is
    transposed to ``N...C`` / ``...IO``, computed and transposed back when the program is lowered
    for the CPU; for other platforms it is lowered as it was. All else is kept as it is, canonical
    convolutions, effects and ``custom_jvp``/``custom_vjp`` rules included.

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
    if eqn.primitive.name not in _CALLS:
        return eqn

    def visit(value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return _closed(value, done)
        if isinstance(value, Jaxpr):
            return _jaxpr(value, done)
        return value

    params = {}
    for name, value in eqn.params.items():
        if name == "branches":
            cpu = _on_cpu(eqn.params.get("branches_platforms"), len(value))
            new = tuple(visit(v) if c else v for v, c in zip(value, cpu))
            params[name] = value if all(a is b for a, b in zip(new, value)) else new
        else:
            params[name] = visit(value)
    same = all(params[name] is value for name, value in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _on_cpu(platforms: tuple[tuple[str, ...] | None, ...] | None, n: int) -> list[bool]:
    """Which branches of a ``cond`` can run on the CPU; `platforms` if by ``platform_dependent``."""
    if platforms is None:
        return [True] * n
    named = any(p is not None and "cpu" in p for p in platforms)
    return [not named if p is None else "cpu" in p for p in platforms]


def _canonical(rank: int) -> lax.ConvDimensionNumbers:
    """``N...C, ...IO, N...C``, as the positions of (N, C, ...) and of (O, I, ...)."""
    spatial = range(rank - 2)
    image = (0, rank - 1, *(s + 1 for s in spatial))
    return lax.ConvDimensionNumbers(image, (rank - 1, rank - 2, *spatial), image)


def _swaps(size: Sequence[int], kernel: Sequence[int], params: dict[str, Any]) -> bool:
    """Whether XLA will exchange image and kernel, which undoes the layout (and is slow anywhere).

    It does so for a kernel larger than the image, not counting unpadded steps along length 1.
    """
    steps = zip(size, kernel, params["window_strides"], params["rhs_dilation"])
    return math.prod(kernel) > math.prod(k if n == s == d == 1 else n for n, k, s, d in steps)


def _is_fast(eqn: JaxprEqn) -> bool:
    lhs, rhs = (v.aval for v in eqn.invars)
    layout = lax.ConvDimensionNumbers(*map(tuple, eqn.params["dimension_numbers"]))
    if not jax.numpy.issubdtype(lhs.dtype, jax.numpy.floating):
        return True
    return layout == _canonical(lhs.ndim) and not _swaps(
        lhs.shape[1:-1], rhs.shape[:-2], eqn.params
    )


def _permute(x: jax.Array, source: Sequence[int], target: Sequence[int]) -> jax.Array:
    where = dict(zip(target, source))
    order = [where[d] for d in range(x.ndim)]
    return x if order == sorted(order) else lax.transpose(x, order)


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
        traced = jax.make_jaxpr(convolution)(*(v.aval for v in eqn.invars))
    (call,) = traced.eqns
    return call.replace(invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info)
