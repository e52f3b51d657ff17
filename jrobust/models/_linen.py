"""Flax Linen modules as pure functions. Imported only when a Flax module comes in."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen
from flax.core import unfreeze

from jrobust.models._network import Tree, named, switches

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Linen:
    """The functions of a :class:`Network` for a Linen module. Equal modules, equal adapters.

    Raises ``TypeError`` where the module cannot be hashed.
    """

    module: Any

    def __post_init__(self) -> None:
        module = _without_lists(self.module, {})
        try:
            hash(module)
        except TypeError as error:
            raise TypeError(
                f"{type(module).__name__} cannot be hashed, so no two calls could share a "
                "compilation; make its fields hashable (tuples, numbers and functions, not arrays "
                "or dicts)"
            ) from error
        object.__setattr__(self, "module", module)

    def _mode(self, train: bool) -> tuple[Any, dict[str, bool]]:
        """The module and the keywords of its call that put it in training or evaluation mode."""
        flags = switches(train)
        arguments = inspect.signature(type(self.module).__call__).parameters
        fields = {field.name for field in dataclasses.fields(self.module)} - set(arguments)
        module = self.module.clone(**{name: flags[name] for name in flags if name in fields})
        return module, {name: flags[name] for name in flags if name in arguments}

    def init(self, key: Array, x: Array) -> tuple[Tree, Tree]:
        """See :class:`Network`."""
        module, flags = self._mode(train=False)
        extra = dict(linen.unbox(module.init(key, x, **flags)))
        return extra.pop("params", {}), extra

    def logits(self, params: Tree, extra: Tree, x: Array) -> Array:
        """See :class:`Network`."""
        module, flags = self._mode(train=False)
        return module.apply({"params": params, **extra}, x, **flags)

    def train_logits(self, params: Tree, extra: Tree, key: Array, x: Array) -> tuple[Array, Tree]:
        """See :class:`Network`."""
        module, flags = self._mode(train=True)
        # Streams of other names fall back to "params".
        rngs = {"dropout": key, "params": jax.random.fold_in(key, 0)}
        logits, changed = module.apply(
            {"params": params, **extra}, x, **flags, mutable=list(extra), rngs=rngs
        )
        before: Any = jax.tree.structure(unfreeze(extra))
        if before != jax.tree.structure(unfreeze(changed)):
            raise ValueError(
                f"a training pass of {type(module).__name__} changed the structure of its "
                f"collections {sorted(extra)}, which would compile anew at every step; sow only "
                "into 'intermediates', or drop the sown collection from extra"
            )
        # Frozen as it came, or a loop would not take it back.
        return logits, jax.tree.unflatten(jax.tree.structure(extra), jax.tree.leaves(changed))

    def features(self, params: Tree, extra: Tree, x: Array) -> dict[str, Array]:
        """See :class:`Network`."""
        module, flags = self._mode(train=False)
        _, captured = module.apply(
            {"params": params, **extra},
            x,
            **flags,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        inner = {k: v for k, v in captured["intermediates"].items() if k != "__call__"}
        return named(_flat(inner, ()))  # without the output of the whole, the logits


def _flat(captured: Mapping[str, Any], path: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in captured.items():
        here = path if name == "__call__" else (*path, name)
        flat.update(_flat(value, here) if isinstance(value, Mapping) else {here: value})
    return flat


def _without_lists(value: Any, seen: dict[int, Any]) -> Any:
    """``value`` with the lists in it, such as the layers of ``nn.Sequential``, made tuples."""
    if type(value) in (list, tuple):
        return tuple(_without_lists(v, seen) for v in value)
    if not isinstance(value, linen.Module):
        return value
    if id(value) not in seen:  # a module that occurs twice shares its parameters: keep it one
        names = {field.name for field in dataclasses.fields(value) if field.init}
        names -= {"parent", "name"}
        old = {name: getattr(value, name) for name in sorted(names)}
        new = {name: _without_lists(v, seen) for name, v in old.items()}
        changed = {name: v for name, v in new.items() if not _same(v, old[name])}
        seen[id(value)] = value.clone(**changed) if changed else value
    return seen[id(value)]


def _same(new: Any, old: Any) -> bool:
    if type(new) is tuple and type(old) is tuple:
        return all(_same(a, b) for a, b in zip(new, old))
    return new is old
