"""Flax Linen modules as pure functions. Flax itself is imported only when a module comes in."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from jrobust.models._network import Bound, Network, Tree

Array = jax.Array

# How Linen modules name the switch between training and evaluation, and its value in evaluation.
_EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


@dataclasses.dataclass(frozen=True)
class _Of:
    """``function`` with ``module`` as its first argument.

    Bound methods, closures and partials of equal modules compare unequal; these compare equal.
    """

    function: Callable[..., Any]
    module: Any

    def __call__(self, *args: Any) -> Any:
        return self.function(self.module, *args)


def network(module: Any) -> Network:
    """The :class:`Network` of a Flax Linen module; equal modules give equal networks.

    The module maps a batch (B, ...) to logits (B, C). Its switch between training and evaluation
    may be an argument of ``__call__`` or a field of the module, under any of the names ``train``,
    ``training``, ``is_training``, ``deterministic`` and ``use_running_average``; each one
    present is set. A module with no such switch computes the same function in both modes.

    ``params`` is the collection of that name, ``extra`` a dict of all others. ``train_logits``
    draws from the stream ``dropout`` and updates every collection of ``extra``. ``features``
    holds the output of each submodule under its path (``"conv1"``, ``"stage1_block2/conv1"``) and
    each value sown into ``intermediates`` under its name; what is produced several times in one
    pass ends in ``/0``, ``/1``, ...

    Raises ``TypeError`` where ``module`` is not a Linen module or cannot be hashed, ``ImportError``
    without flax.
    """
    module = _checked(module)
    return Network(
        init=_Of(_init, module),
        logits=_Of(_logits, module),
        train_logits=_Of(_train_logits, module),
        features=_Of(_features, module),
    )


def bind(module: Any, variables: Any = None, *, dtype: DTypeLike | None = None) -> Bound:
    """The logits function of a module in evaluation mode, as a pytree.

    Args:
      module: a Flax Linen module, read as :func:`network` reads it: batch-norm uses its running
        averages, dropout is off.
      variables: its variables, a mapping with ``"params"`` and the other collections, as returned
        by ``module.init``. They become the leaves of the result, so that it goes to jitted code as
        an argument: other variables of an equal module compile nothing new.
      dtype: compute in this floating-point type (``jnp.bfloat16``): floating variables and inputs
        are cast to it, logits come back as float32. For the search twin of a model only: whether
        an attack succeeded, and every vote of a certificate, is judged without it. Submodules
        that name a ``dtype`` of their own keep it.

    Raises ``TypeError`` where ``module`` is not a Linen module, ``variables`` is missing or not a
    mapping, or ``dtype`` is not floating; ``ValueError`` where ``variables`` lacks ``"params"``.
    """
    model = network(module)
    name = type(module).__name__
    if variables is None:
        raise TypeError(
            f"bind needs the variables of {name}, since a Linen module does not hold them; pass "
            "what module.init returned, or {'params': params, 'batch_stats': ...}"
        )
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be a mapping such as {'params': params, 'batch_stats': ...}, got "
            f"{type(variables).__name__}"
        )
    if "params" not in variables:
        raise ValueError(
            f"variables of {name} have no collection 'params', only {sorted(variables)}; if these "
            "are the parameters themselves pass {'params': params}"
        )
    extra = {k: v for k, v in variables.items() if k != "params"}
    return model.bind(variables["params"], extra, dtype=dtype)


def _checked(module: Any) -> Any:
    """``module`` in a form that can be hashed."""
    try:
        from flax import linen
    except ImportError as error:
        raise ImportError("binding a Flax module needs flax: pip install flax") from error
    if isinstance(module, type) and issubclass(module, linen.Module):
        raise TypeError(
            f"module must be an instance, got the class {module.__name__}; "
            f"write {module.__name__}(...)"
        )
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"module must be a Flax Linen module, got {type(module).__module__}."
            f"{type(module).__qualname__}; a plain function of x needs no binding"
        )
    module = _without_lists(module, {})
    try:
        hash(module)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} cannot be hashed, so no two calls could share a "
            "compilation; make its fields hashable (tuples, numbers and functions, not arrays or "
            "dicts)"
        ) from error
    return module


def _without_lists(value: Any, seen: dict[int, Any]) -> Any:
    """``value`` with the lists in it, such as the layers of ``nn.Sequential``, made tuples."""
    if type(value) in (list, tuple):
        return tuple(_without_lists(v, seen) for v in value)
    from flax import linen

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


def _mode(module: Any, train: bool) -> tuple[Any, dict[str, bool]]:
    """The module and the keywords of its call that put it in training or evaluation mode."""
    flags = {name: value != train for name, value in _EVALUATION.items()}
    arguments = inspect.signature(type(module).__call__).parameters
    fields = {field.name for field in dataclasses.fields(module)} - set(arguments)
    module = module.clone(**{name: flags[name] for name in flags if name in fields})
    return module, {name: flags[name] for name in flags if name in arguments}


def _init(module: Any, key: Array, x: Array) -> tuple[Tree, Tree]:
    module, flags = _mode(module, train=False)
    extra = dict(module.init(key, x, **flags))
    return extra.pop("params", {}), extra


def _logits(module: Any, params: Tree, extra: Tree, x: Array) -> Array:
    module, flags = _mode(module, train=False)
    return module.apply({"params": params, **extra}, x, **flags)


def _train_logits(
    module: Any, params: Tree, extra: Tree, key: Array, x: Array
) -> tuple[Array, Tree]:
    module, flags = _mode(module, train=True)
    logits, changed = module.apply(
        {"params": params, **extra}, x, **flags, mutable=list(extra), rngs={"dropout": key}
    )
    changed = dict(changed)
    before: Any = jax.tree.structure(dict(extra))
    if before != jax.tree.structure(changed):
        raise ValueError(
            f"a training pass of {type(module).__name__} changed the structure of its collections "
            f"{sorted(extra)}, which would compile anew at every step; sow only into "
            "'intermediates', or drop the sown collection from extra"
        )
    return logits, changed


def _features(module: Any, params: Tree, extra: Tree, x: Array) -> dict[str, Array]:
    module, flags = _mode(module, train=False)
    _, captured = module.apply(
        {"params": params, **extra},
        x,
        **flags,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    inner = {k: v for k, v in captured["intermediates"].items() if k != "__call__"}  # no logits
    return dict(_named(inner, ()))


def _named(captured: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    for name, value in captured.items():
        here = path if name == "__call__" else (*path, name)
        if isinstance(value, Mapping):
            yield from _named(value, here)
            continue
        leaves = jax.tree.leaves(value)  # one for each time and part that was produced
        for i, leaf in enumerate(leaves):
            yield "/".join(here if len(leaves) == 1 else (*here, str(i))), leaf
