"""What makes two runs the same run: digests of arrays and of programs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_ADDRESS = re.compile(r" ?(at )?0x[0-9a-f]+")


def arrays(*trees: Any) -> str:
    """SHA-256 of the leaves of pytrees: their paths, types, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        digest.update(jax.tree_util.keystr(path).encode())
        _array(digest, leaf)
    return digest.hexdigest()


def program(fn: Callable[..., Any], *args: Any) -> str:
    """SHA-256 of what ``fn`` computes from arguments like ``args``: its jaxpr and its constants.

    A changed line of a model, an attack or an optimiser changes it; new values of ``args`` do not.
    """

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        array = jnp.asarray(leaf)  # where it lies does not matter
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    return _closed(jax.make_jaxpr(fn)(*jax.tree.map(abstract, args)), {})


def _array(digest: Any, leaf: Any) -> None:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(array.data if array.dtype.isbuiltin == 1 else array.tobytes())


def _closed(closed: ClosedJaxpr, seen: dict[int, str]) -> str:
    return _jaxpr(closed.jaxpr, seen) + arrays(closed.consts)


def _jaxpr(jaxpr: Jaxpr, seen: dict[int, str]) -> str:
    if id(jaxpr) in seen:
        return seen[id(jaxpr)]
    digest = hashlib.sha256()
    names: dict[Any, int] = {}

    def name(variable: Any) -> None:
        if isinstance(variable, Literal):
            _array(digest, variable.val)
        else:
            digest.update(f"{names.setdefault(variable, len(names))}:{variable.aval};".encode())

    for given in (*jaxpr.constvars, *jaxpr.invars):
        name(given)
    for eqn in jaxpr.eqns:
        digest.update(eqn.primitive.name.encode())
        for key in sorted(eqn.params):
            digest.update(f"{key}={_value(eqn.params[key], seen)};".encode())
        for variable in (*eqn.invars, *eqn.outvars):
            name(variable)
    for variable in jaxpr.outvars:
        name(variable)
    seen[id(jaxpr)] = digest.hexdigest()
    return seen[id(jaxpr)]


def _value(value: Any, seen: dict[int, str]) -> str:
    if isinstance(value, ClosedJaxpr):
        return _closed(value, seen)
    if isinstance(value, Jaxpr):
        return _jaxpr(value, seen)
    if isinstance(value, (np.ndarray, jax.Array)):
        return arrays(value)
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_value(v, seen) for v in value) + ")"
    if isinstance(value, dict):
        return str(sorted((str(k), _value(v, seen)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return str(sorted(_value(v, seen) for v in value))
    # Functions and objects print where they lie in memory.
    return _ADDRESS.sub("", repr(value))
