"""Flax nnx modules as pure functions. Imported only when a Flax module comes in."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval

from jrobust.models._network import Tree, named, switches

Array = jax.Array
Path = tuple[Any, ...]

_KEY, _COUNT = "rng keys", "rng counts"  # the state of random streams, which is no variable


class _Leaf(NamedTuple):
    """One array of a module: where it is in the module, and of which collection."""

    path: Path
    collection: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return "/".join(map(str, (self.collection, *self.path)))


@dataclasses.dataclass(frozen=True)
class _Mode:
    """A module without its arrays, in training or evaluation mode."""

    graph: Any
    leaves: tuple[_Leaf, ...]
    arguments: tuple[tuple[str, Any], ...]  # keywords of the call
    takes_rngs: bool  # whether the call has an argument for random streams

    def module(self, params: Tree, extra: Tree, key: Array) -> Any:
        """A module of these variables whose random streams draw from ``key``."""
        tree: dict[str, Any] = {"params": params, **extra}
        flat = []
        for i, leaf in enumerate(self.leaves):
            value: Any
            if leaf.collection == _KEY:  # each stream its own, or equal layers would drop alike
                value = jax.random.fold_in(key, i)
                value = jax.random.split(value, leaf.shape) if leaf.shape else value
            elif leaf.collection == _COUNT:
                value = jnp.zeros(leaf.shape, jnp.uint32)
            else:
                value = tree.get(leaf.collection)
                for name in leaf.path:  # ToLinen keeps the indices of lists as they are
                    node = value if isinstance(value, Mapping) else {}
                    value = node.get(str(name), node.get(name))
                if value is None or jnp.shape(value) != leaf.shape:
                    found = "none" if value is None else f"one of shape {jnp.shape(value)}"
                    raise ValueError(
                        f"the module needs the variable {leaf} of shape {leaf.shape}, got {found}"
                    )
            flat.append((leaf.path, value))
        # Copied: the Variables of an nnx.State given as params must not be written to.
        return nnx.merge(self.graph, nnx.from_flat_state(flat), copy=True)

    def call(self, module: Any, key: Array | None, x: Array) -> Any:
        """The output of ``module``."""
        arguments = dict(self.arguments)
        if self.takes_rngs:
            arguments["rngs"] = None if key is None else nnx.Rngs(key)
        with warnings.catch_warnings():
            # What is sown is stored in the module, which is thrown away: no harm.
            warnings.filterwarnings("ignore", r"\s*Using 'Module\.", DeprecationWarning)
            return module(x, **arguments)


@dataclasses.dataclass(frozen=True)
class Graph:
    """The functions of a :class:`Network` for an nnx module, but for ``init``."""

    name: str
    evaluation: _Mode
    training: _Mode

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # walks the whole graph, and jit asks at every call
        return hash((self.name, self.evaluation, self.training))

    def _evaluate(self, params: Tree, extra: Tree, x: Array, key: Array) -> tuple[Any, bool]:
        """The output, and whether a random stream was drawn from."""
        module = self.evaluation.module(params, extra, key)
        counts = [count.get_value() for count in _counts(module)]
        out = self.evaluation.call(module, None, x)
        return out, any(a is not b.get_value() for a, b in zip(counts, _counts(module)))

    def logits(self, params: Tree, extra: Tree, x: Array) -> Array:
        """See :class:`Network`."""
        key = jax.random.key(0)
        out, drawn = self._evaluate(params, extra, x, key)
        # A stream may be advanced in vain; only what reaches the logits is random.
        if drawn and _depends(lambda key: self._evaluate(params, extra, x, key)[0], key):
            raise ValueError(
                f"{self.name} draws random numbers in evaluation mode: give it a switch named "
                f"{', '.join(switches(False))}, or pass a function of (keys, x) that draws from "
                "its own keys to jrobust.models.randomized"
            )
        return out

    def train_logits(self, params: Tree, extra: Tree, key: Array, x: Array) -> tuple[Array, Tree]:
        """See :class:`Network`."""
        mode = self.training
        module = mode.module(params, extra, key)
        streams = jax.random.fold_in(key, len(mode.leaves)) if mode.takes_rngs else None
        logits = mode.call(module, streams, x)
        _, new = _variables(_flat(module))
        before: Any = jax.tree.structure(extra)
        if before != jax.tree.structure(new):
            raise ValueError(
                f"a training pass of {self.name} made or dropped variables that are not "
                f"parameters, which would compile anew at every step: extra was "
                f"{_paths(extra)}, now {_paths(new)}; make all of them in the constructor"
            )
        return logits, new

    def features(self, params: Tree, extra: Tree, x: Array) -> dict[str, Array]:
        """See :class:`Network`."""
        record = _Record(self.evaluation.module(params, extra, jax.random.key(0)))
        token = _RECORD.set(record)
        try:
            self.evaluation.call(record.module, None, x)
        finally:
            _RECORD.reset(token)
        return named({**record.outputs, **record.sown})

    def __repr__(self) -> str:
        return f"nnx({self.name})"  # of the graph, pages


class Values:
    """``init`` of an nnx module: the values it has. Equal where the arrays are the same objects."""

    def __init__(self, values: tuple[Tree, Tree]) -> None:
        self._values = values
        leaves, tree = jax.tree.flatten(values)
        self._identity = (tree, *map(id, leaves))  # sound: JAX arrays do not change

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def init(self, key: Array, x: Array) -> tuple[Tree, Tree]:
        """See :class:`Network`. Copies, so that what becomes of them may be donated."""
        return jax.tree.map(jnp.copy, self._values)


@dataclasses.dataclass(frozen=True)
class Factory:
    """``init`` of a callable that makes an nnx module."""

    make: Any
    args: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, make: Any) -> Factory:
        """From any callable of ``rngs``. Partials compare unequal, these compare equal."""
        factory = cls(make)
        if isinstance(make, functools.partial):
            factory = cls(make.func, make.args, tuple(sorted(make.keywords.items())))
        try:
            hash(factory)
        except TypeError as error:
            raise TypeError(
                f"the arguments of {make} cannot be hashed, so no two calls could share a "
                "compilation; pass tuples, numbers and functions, not arrays, lists or dicts"
            ) from error
        return factory

    def _made(self, key: Array) -> Any:
        module = self.make(*self.args, **dict(self.keywords), rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"{self.make} must return an nnx module, got {type(module).__name__}; a plain "
                "function of x needs no binding"
            )
        if isinstance(module, nnx.bridge.ToNNX):
            raise TypeError(
                "a callable may not return nnx.bridge.ToNNX itself: pass the Linen module "
                f"{type(module.to_nnx__module).__name__} inside of it, which draws fresh variables"
            )
        return module

    def adapter(self) -> Graph:
        """The module's functions; runs the callable once, without computing anything."""
        adapters = []

        def trace(key: Array) -> None:
            adapters.append(read(self._made(key))[0])

        jax.eval_shape(trace, jax.random.key(0))
        return adapters[0]

    def init(self, key: Array, x: Array) -> tuple[Tree, Tree]:
        """See :class:`Network`."""
        return _variables(_flat(self._made(key)))


def read(module: Any) -> tuple[Graph, tuple[Tree, Tree]]:
    """The functions of an nnx module and its ``(params, extra)``; ``module`` stays as it is.

    Raises ``TypeError`` where it is not callable, holds what is not an array, or cannot be hashed.
    """
    name = type(module).__name__
    if not callable(module):
        raise TypeError(f"{name} has no __call__, so it maps no x to logits")
    adapter = Graph(name, _mode(module, train=False), _mode(module, train=True))
    try:
        hash(adapter)
    except TypeError as error:
        raise TypeError(
            f"{name} cannot be hashed, so no two calls could share a compilation; its attributes "
            "that are not modules or arrays must be hashable (tuples, numbers and functions, not "
            f"dicts): {error}"
        ) from error
    return adapter, _variables(_flat(module))


def _mode(module: Any, train: bool) -> _Mode:
    flags = switches(train)
    arguments = inspect.signature(type(module).__call__).parameters
    # A copy of the modules, whose attributes are free to change, that shares the Variables.
    module = nnx.view(
        module,
        raise_if_not_found=False,
        deterministic=flags["deterministic"],
        use_running_average=flags["use_running_average"],
    )
    for _, part in nnx.iter_modules(module):
        for name in flags:
            # Of the instance or, as a default, of its class; not a method or property.
            if isinstance(inspect.getattr_static(part, name, ...), (bool, type(None))):
                setattr(part, name, flags[name])
    nnx.pop(module, nnx.Intermediate)  # left by an earlier pass
    graph, state = nnx.split(module)
    for attribute, value in graph.attributes:
        if isinstance(getattr(value, "value", None), jax.core.Tracer):
            raise TypeError(
                f"the attribute {attribute!r} of {type(module).__name__} is an array made in a "
                "constructor that is being traced, where nnx takes it for a constant: write "
                f"self.{attribute} = nnx.Variable(...)"
            )
    leaves = []
    for path, value in nnx.to_flat_state(state):
        leaves.append(_Leaf(path, _collection(value), jnp.shape(_value(path, value))))
    if len({(leaf.collection, *map(str, leaf.path)) for leaf in leaves}) < len(leaves):
        raise TypeError(f"paths of {type(module).__name__} differ only in int against str keys")
    return _Mode(
        graph,
        tuple(leaves),
        tuple((name, flags[name]) for name in flags if name in arguments),
        "rngs" in arguments,
    )


def _flat(module: Any) -> list[tuple[Path, Any]]:
    """What a module holds, apart from leftovers of earlier passes and random streams."""
    kinds = nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate))
    return list(nnx.to_flat_state(nnx.state(module, kinds)))


def _variables(flat: list[tuple[Path, Any]]) -> tuple[Tree, Tree]:
    """``(params, extra)`` as nested dicts with str keys."""
    tree: dict[str, Any] = {"params": {}}
    for path, value in flat:
        node = tree.setdefault(_collection(value), {})
        *above, last = map(str, path)
        for name in above:
            node = node.setdefault(name, {})
        node[last] = _value(path, value)
    return tree.pop("params"), tree


def _collection(value: Any) -> str:
    if isinstance(value, nnx.Param):
        return "params"
    if isinstance(value, nnx.RngKey):
        return _KEY
    if isinstance(value, nnx.RngCount):
        return _COUNT
    if isinstance(value, nnx.Variable):
        try:
            return nnx.variable_name_from_type(type(value))
        except ValueError:  # a type of the user's own; the registry refuses a second of its name
            return type(value).__name__
    return "arrays"


def _value(path: Path, value: Any) -> Any:
    # Raw: a type's own `get_value`, such as a softplus, comes when the module reads it.
    array = value.get_raw_value() if isinstance(value, nnx.Variable) else value
    if isinstance(array, (np.ndarray, np.generic, int, float)):
        return jnp.array(array)  # copied: what is bound must not change with the module
    if not isinstance(array, jax.Array):
        raise TypeError(
            f"{'/'.join(map(str, path))} holds {type(array).__name__}, but every variable of a "
            "model must hold one array"
        )
    return array


def _paths(tree: Tree) -> list[str]:
    return [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _counts(module: Any) -> list[Any]:
    return [count for _, count in nnx.to_flat_state(nnx.state(module, nnx.RngCount))]


def _depends(fn: Any, key: Array) -> bool:
    """Whether the output of ``fn`` depends on ``key``, whatever else is computed on the way."""
    jaxpr = jax.make_jaxpr(fn)(key).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used)


class _Record:
    """What the parts of ``module`` return and sow in one pass, by path."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.outputs: dict[tuple[str, ...], list[Any]] = {}
        self.sown: dict[tuple[str, ...], Any] = {}
        self._trace = nnx.tracers.TraceState()
        self._paths: dict[int, tuple[str, ...]] = {}
        for path, part in list(nnx.iter_modules(module)):
            self._paths[id(part)] = tuple(map(str, path))
            # The module is nobody else's: its parts may change their class.
            object.__setattr__(part, "__class__", _noting(type(part)))

    def path(self, part: Any) -> tuple[str, ...] | None:
        """Where ``part`` is; None inside of a transformation, which no value can leave."""
        return self._paths.get(id(part)) if self._trace.is_valid() else None


_RECORD: contextvars.ContextVar[_Record] = contextvars.ContextVar("record")


@functools.cache
def _noting(cls: Any) -> Any:
    """``cls``, telling the record what its instances return and sow."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = cls.__call__(self, *args, **kwargs)
        record = _RECORD.get()
        path = record.path(self)
        if path:  # not the whole, which returns the logits
            record.outputs.setdefault(path, []).append(out)
        return out

    def sow(
        self: Any,
        variable_type: Any,
        name: str,
        value: Any,
        reduce_fn: Any = lambda old, new: (*old, new),
        init_fn: Any = tuple,
    ) -> bool:
        record = _RECORD.get()
        path = record.path(self)
        if path is None or variable_type not in (nnx.Intermediate, "intermediates"):
            return False
        here = (*path, name)
        record.sown[here] = reduce_fn(
            record.sown[here] if here in record.sown else init_fn(), value
        )
        return True

    body = {"sow": sow, "__module__": cls.__module__}
    if "__call__" in dir(cls):
        body["__call__"] = call
    return type(cls.__name__, (cls,), body)
