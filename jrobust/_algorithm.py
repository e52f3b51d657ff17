"""Algorithms are frozen dataclasses that are pytrees: numbers are leaves, structure is static."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

# Reports show the numbers of an array up to this many, of a larger one a digest.
_SHOWN = 64

T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A field that is part of the compiled program (a count, a function) and not a leaf."""
    if default is not dataclasses.MISSING:
        kwargs["default"] = default
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def algorithm(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass registered as a pytree.

    Fields are leaves (or subtrees) unless declared with :func:`static`. Constructors must not
    look at values, since unflattening calls them with tracers: value checks live in ``check()``.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made) if field.init]  # type: ignore[arg-type]
    statics = {f.name for f in dataclasses.fields(made) if f.metadata.get("static")}  # type: ignore[arg-type]
    leaves = [name for name in names if name not in statics]
    kept = [name for name in names if name in statics]

    def aux(value: Any) -> Any:
        # With the class: treedefs of two dataclasses of equal fields compare equal in JAX's own
        # registration (measured), and a compiled program of one could be taken for the other's.
        return (made, *(getattr(value, name) for name in kept))

    def flatten_with_keys(value: Any) -> Any:
        key = jax.tree_util.GetAttrKey
        return [(key(name), getattr(value, name)) for name in leaves], aux(value)

    def unflatten(aux: Any, children: Any) -> Any:
        return made(**dict(zip(kept, aux[1:])), **dict(zip(leaves, children)))

    jax.tree_util.register_pytree_with_keys(
        made, flatten_with_keys, unflatten, lambda v: ([getattr(v, n) for n in leaves], aux(v))
    )
    return made


def describe(value: Any) -> Any:
    """The effective configuration of an algorithm as plain nested Python values, for reports."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "tolist"):
        array = np.asarray(value)
        if array.size <= _SHOWN:
            return array.tolist()
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", repr(value))
