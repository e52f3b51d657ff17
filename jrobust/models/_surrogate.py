"""Gradients where a model has none: backward-pass differentiable approximation (BPDA).

Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", 2018: keep the
forward pass, and where an operation has no useful derivative take that of a function near it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jrobust import drive
from jrobust._algorithm import algorithm
from jrobust._convolution import _struct
from jrobust.models._randomized import Randomized

Array = jax.Array

# Primitives that mean what the jaxprs in their parameters say. The rules of custom derivatives are
# their authors', and stay.
_CALLS = ("jit", "scan", "while", "cond", "remat2", "checkpoint", "custom_vmap_call")
# What becomes the identity in the backward pass.
_STEPS = ("round", "floor", "ceil", "sign")
_COMPARISONS = ("gt", "ge", "lt", "le")
# Operations of one array that move its values and change none.
MOVES = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev", "copy")


# ---------------------------------------------------------------- what an author's stop means


def _numbers(jaxpr: Jaxpr) -> Callable[[Any], Any]:
    """A function that gives variables of one value one number: what is written twice is one."""
    number: dict[Any, Any] = {}
    seen: dict[Any, Any] = {}

    def of(v: Any) -> Any:
        return ("literal", str(v.val)) if isinstance(v, Literal) else number.get(v, v)

    for eqn in jaxpr.eqns:
        inputs = tuple(map(of, eqn.invars))
        same = (eqn.primitive.name, str(eqn.params), inputs)
        for i, v in enumerate(eqn.outvars):
            number[v] = seen.setdefault((*same, i), v)
    return of


def deliberate(jaxpr: Jaxpr) -> dict[int, str]:
    """Equations of ``stop_gradient`` that take no gradient away, by position, and what they are.

    ``"shift"``: a maximum is subtracted before an exponential, and the softmax around it does not
    depend on it. ``"straight-through"``: ``a + stop(b - a)`` or ``b + a - stop(a)``, whose value is
    ``b`` and whose gradient, by its author's will, that of ``a``; the position of the addition or
    subtraction at its end maps to ``"end"``.
    """
    found: dict[int, str] = {}
    if not any(eqn.primitive.name == "stop_gradient" for eqn in jaxpr.eqns):
        return found
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    powers = {v for eqn in jaxpr.eqns if eqn.primitive.name == "exp" for v in eqn.invars[:1]}
    moves = (*MOVES, "convert_element_type")
    number = _numbers(jaxpr)
    at = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}

    def maker(v: Any, name: str, through: Sequence[str] = moves) -> JaxprEqn | None:
        """The equation ``name`` whose result ``v`` is, back through rearrangements."""
        while not isinstance(v, Literal) and (eqn := made.get(v)) is not None:
            arrays = [a for a in eqn.invars if not isinstance(a, Literal)]
            if eqn.primitive.name == name:
                return eqn
            if eqn.primitive.name not in through or not arrays:
                return None
            v = arrays[-1]
        return None

    def base(v: Any) -> Any:
        """The number of what ``v`` is a rearrangement of."""
        while (eqn := made.get(v) if not isinstance(v, Literal) else None) is not None:
            if eqn.primitive.name not in moves:
                break
            v = eqn.invars[0]
        return number(v)

    def parts(v: Any, name: str) -> list[Any]:
        eqn = maker(v, name)
        return [base(a) for a in eqn.invars] if eqn else []

    for i, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        if name not in ("add", "sub"):
            continue
        a, b = eqn.invars
        if name == "sub" and (stop := maker(b, "stop_gradient")):
            inner = stop.invars[0]
            # A maximum takes a part in one with -inf, and is replaced by 0 where it is infinite.
            top = maker(inner, "reduce_max", (*moves, "max", "select_n"))
            if top and base(top.invars[0]) == base(a) and not powers.isdisjoint(eqn.outvars):
                found[at[id(stop)]] = "shift"
            if base(inner) in (base(a), *parts(a, "add")):
                found |= {at[id(stop)]: "straight-through", i: "end"}
        for known, other in ((a, b), (b, a)) if name == "add" else ():
            stop = maker(other, "stop_gradient")
            if stop and base(known) in parts(stop.invars[0], "sub")[1:]:
                found |= {at[id(stop)]: "straight-through", i: "end"}
    return found


# ------------------------------------------------------------------------- the derived surrogate


@algorithm
class StraightThrough:
    """A model with another gradient; see :func:`straight_through`."""

    model: Any  # a pytree

    def __call__(self, *args: Array) -> Array:
        """What the model returns."""
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            with jax.disable_jit(False):  # it works on the traced program
                return self(*args)
        closed, shape = jax.make_jaxpr(_call, return_shape=True)(self.model, *args)
        flat = jaxpr_as_fun(_closed(closed, {}))(*jax.tree.leaves((self.model, *args)))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)


def _call(model: Any, *args: Array) -> Any:
    return model(*args)


def straight_through(logits_fn: Callable[[Array], Array]) -> Any:
    """The same logits, with a gradient that passes through what has none: BPDA, derived.

    In the backward pass these count as the identity, wherever they are in the model, also inside
    loops, branches and ``jit``:

    * ``round``, ``floor``, ``ceil`` and ``sign``;
    * a cast to an integer or boolean and back, with moves such as reshapes between; of a comparison
      ``a > b`` cast to float, the difference ``a - b``;
    * ``stop_gradient``, unless it is an author's own: the shift of a softmax, or a straight-through
      estimator such as ``x + stop_gradient(jnp.round(x) - x)``.

    Everything else keeps its derivative, custom rules included. What then still has no gradient
    (an argmax, integer arithmetic) is what :func:`jrobust.inspect` finds in the result, and a case
    for :func:`bpda`. The surrogate is for search, and not always the better one: where a model uses
    a remainder such as ``x - jnp.floor(x)``, it loses a gradient that the model has. Attack with
    both, as in ``attacks.transfer`` or with the model as ``judge``; the verdict is the same, since
    the logits are.

    Args:
        logits_fn: a bound model, ensemble, :func:`randomized` model or plain function. As a pytree
            the result has the leaves of the model: new parameters compile nothing new.

    Raises:
        TypeError: for a :class:`jrobust.drive.Host`, or what is not callable.
    """
    if drive.is_host(logits_fn):
        raise TypeError(
            "a Host model is not a JAX program, so there is nothing to differentiate: estimate its "
            "gradient with estimator= from jrobust.zeroth_order"
        )
    if not callable(logits_fn):
        raise TypeError(f"logits_fn must be callable, got {type(logits_fn).__name__}")
    if isinstance(logits_fn, Randomized):
        return dataclasses.replace(logits_fn, fn=StraightThrough(logits_fn.fn))
    return StraightThrough(_pytree(logits_fn))


def _pytree(fn: Any) -> Any:
    return jax.tree_util.Partial(fn) if jax.tree_util.all_leaves([fn]) else fn


def _closed(closed: ClosedJaxpr, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> ClosedJaxpr:
    return closed.replace(jaxpr=_jaxpr(closed.jaxpr, done))


def _jaxpr(jaxpr: Jaxpr, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> Jaxpr:
    """`done` keeps shared bodies shared: they lower once."""
    if id(jaxpr) not in done:
        done[id(jaxpr)] = jaxpr, jaxpr.replace(eqns=list(_equations(jaxpr, done)))
    return done[id(jaxpr)][1]


def _equations(jaxpr: Jaxpr, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> Iterator[JaxprEqn]:
    kept = deliberate(jaxpr)
    shadow: dict[Any, Any] = {}  # of an integer variable: the float that it was made of
    for i, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        first, out = ([*vs, None][0] for vs in (eqn.invars, eqn.outvars))
        if name in _CALLS:
            yield eqn.replace(params={k: _visit(v, done) for k, v in eqn.params.items()})
        elif name in _STEPS or (name == "stop_gradient" and i not in kept):
            yield _identity(eqn, first) if _inexact(first) else eqn
        elif name == "convert_element_type" and not _inexact(out):
            if _inexact(first):
                shadow[out] = first
            elif source := _shadow(shadow, first):
                shadow[out] = source
            yield eqn
        elif name == "convert_element_type" and (source := _shadow(shadow, first)):
            yield _identity(eqn, source)
        elif name in MOVES and (source := _shadow(shadow, first)):
            moved = _made(eqn.primitive.bind, eqn, [source], eqn.params)
            shadow[out] = moved.outvars[0]
            yield from (eqn, moved)
        elif name in _COMPARISONS and _inexact(first):
            sides = eqn.invars if name in ("gt", "ge") else eqn.invars[::-1]
            gap = _made(lax.sub_p.bind, eqn, sides, {})
            shadow[out] = gap.outvars[0]
            yield from (eqn, gap)
        else:
            yield eqn


def _visit(value: Any, done: dict[int, tuple[Jaxpr, Jaxpr]]) -> Any:
    if isinstance(value, ClosedJaxpr):
        return _closed(value, done)
    if isinstance(value, Jaxpr):
        return _jaxpr(value, done)
    return tuple(_visit(v, done) for v in value) if isinstance(value, tuple) else value


def _shadow(shadow: dict[Any, Any], v: Any) -> Any:
    return None if isinstance(v, Literal) else shadow.get(v)


def _inexact(v: Any) -> bool:
    return v is not None and jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _made(fn: Callable[..., Any], eqn: JaxprEqn, inputs: Sequence[Any], params: Any) -> JaxprEqn:
    """The one equation that ``fn`` of variables ``inputs`` is, in the place of ``eqn``."""
    with eqn.ctx.manager:
        (made,) = jax.make_jaxpr(lambda *args: fn(*args, **params))(*map(_struct, inputs)).eqns
    return made.replace(invars=list(inputs), source_info=eqn.source_info)


def _identity(eqn: JaxprEqn, source: Any) -> JaxprEqn:
    """``eqn``, with the derivative of the identity of ``source``, which has its shape."""

    @jax.custom_jvp
    def step(x: Array, source: Array) -> Array:
        return eqn.primitive.bind(x, **eqn.params)

    @step.defjvp
    def jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        out = step(*primals)
        return out, jnp.broadcast_to(tangents[1], out.shape).astype(out.dtype)

    made = _made(step, eqn, [eqn.invars[0], source], {})
    return made.replace(outvars=eqn.outvars)


# -------------------------------------------------------------------------- the explicit one


@algorithm
class BPDA:
    """A function with the gradient of another; see :func:`bpda`."""

    forward: Any  # pytrees
    backward: Any

    def __call__(self, x: Array) -> Array:
        """``forward(x)``."""
        want, got = (jax.eval_shape(fn, x) for fn in (self.forward, self.backward))
        if jax.tree.map(jnp.shape, want) != jax.tree.map(jnp.shape, got):
            raise ValueError(
                f"forward and backward must return arrays of one shape, got "
                f"{jax.tree.map(jnp.shape, want)} and {jax.tree.map(jnp.shape, got)} for x of "
                f"shape {x.shape}"
            )
        return _bpda(self.forward, self.backward, x)


@jax.custom_jvp
def _bpda(forward: Any, backward: Any, x: Array) -> Array:
    return forward(x)


@_bpda.defjvp
def _bpda_jvp(primals: tuple[Any, Any, Array], tangents: tuple[Any, Any, Array]) -> Any:
    forward, backward, x = primals
    out = _bpda(forward, backward, x)
    _, slope = jax.jvp(backward, (x,), (tangents[2],))
    return out, jax.tree.map(lambda t, y: t.astype(y.dtype), slope, out)


def _same(x: Array) -> Array:
    return x


def bpda(forward: Callable[[Array], Array], backward: Callable[[Array], Array] = _same) -> BPDA:
    """``forward``, with the gradient of ``backward`` (Athalye et al. 2018).

    For preprocessing that has no useful gradient, such as JPEG compression or a purifier:
    ``purify = models.bpda(purify)``, then ``lambda x: model(purify(x))``. The gradient is that of
    ``backward`` at the same x. The parameters of ``forward`` receive none.

    Args:
        forward: x to an array; may hold loops and callbacks, which are never differentiated.
        backward: x to an array of the same shape, near that of ``forward``; default the identity.

    Raises:
        TypeError: either is not callable. ValueError, when called: their shapes differ.
    """
    for name, fn in (("forward", forward), ("backward", backward)):
        if not callable(fn):
            raise TypeError(f"{name} must be a function of x, got {type(fn).__name__}")
    return BPDA(_pytree(forward), _pytree(backward))
