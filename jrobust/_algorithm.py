"""Algorithms are frozen dataclasses that are pytrees: numbers are leaves, structure is static."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

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
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


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
        return value.tolist()
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", repr(value))
