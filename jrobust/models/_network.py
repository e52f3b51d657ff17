"""The two shapes in which the rest of the library takes a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jrobust._algorithm import algorithm, static

Array = jax.Array
Tree = Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Network:
    """What training needs of a model: four pure functions.

    Attributes:
      init: ``init(key, x) -> (params, extra)``. ``x`` is a batch (B, ...), of which only shape and
        dtype matter. ``params`` is what the optimiser moves, ``extra`` every other variable
        (batch-norm statistics), possibly an empty tree.
      logits: ``logits(params, extra, x) -> (B, C)``, evaluation mode: running averages, no
        dropout, rows independent of each other.
      train_logits: ``train_logits(params, extra, key, x) -> (logits, new_extra)``, training mode:
        batch statistics, dropout drawn from ``key``. The only function that changes ``extra``.
      features: ``features(params, extra, x) -> {name: array}``, inner activations by name,
        evaluation mode.

    A network is a pytree without leaves, so it may be an argument of a jitted function, and
    equal networks share one compilation. Networks compare by their functions; write these as
    module-level functions, or, for Flax, use :func:`network`, which gives equal networks for
    equal modules.
    """

    init: Callable[[Array, Array], tuple[Tree, Tree]]
    logits: Callable[[Tree, Tree, Array], Array]
    train_logits: Callable[[Tree, Tree, Array, Array], tuple[Array, Tree]]
    features: Callable[[Tree, Tree, Array], dict[str, Array]]

    def bind(self, params: Tree, extra: Tree, *, dtype: DTypeLike | None = None) -> Bound:
        """The function ``x -> logits(params, extra, x)`` as a pytree; see :func:`bind`.

        Raises ``TypeError`` where ``dtype`` is not a floating-point type.
        """
        if dtype is None:
            return Bound(params, extra, self.logits)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"dtype must be a floating-point type such as jnp.bfloat16, got {dtype!r}"
            )
        params, extra = jax.tree.map(lambda leaf: _cast(leaf, dtype), (params, extra))
        return Bound(params, extra, self.logits, dtype=jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Method:
    """The method ``name`` of ``adapter``.

    Bound methods, closures and partials of equal adapters compare unequal; these compare equal.
    """

    adapter: Any
    name: str

    def __call__(self, *args: Any) -> Any:
        """Call the method."""
        return getattr(self.adapter, self.name)(*args)


# How Flax modules name the switch between training and evaluation, and its value in evaluation.
_EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def switches(train: bool) -> dict[str, bool]:
    """The value of every switch in training or evaluation mode."""
    return {name: value != train for name, value in _EVALUATION.items()}


def named(captured: Mapping[tuple[str, ...], Any]) -> dict[str, Array]:
    """Activations by path joined with ``/``; those with several parts end in ``/0``, ``/1``."""
    features = {}
    for path, value in captured.items():
        leaves = jax.tree.leaves(value)  # one for each time and part that was produced
        for i, leaf in enumerate(leaves):
            features["/".join(path if len(leaves) == 1 else (*path, str(i)))] = leaf
    return features


@algorithm
class Bound:
    """A model with its variables: ``bound(x)`` maps (B, ...) to logits (B, C).

    A pytree: ``params`` and ``extra`` are leaves, the model is static. Given to jitted code as an
    argument, new variables of the same model compile nothing new. Made by :func:`bind` and
    :meth:`Network.bind`.
    """

    params: Tree
    extra: Tree
    logits: Callable[[Tree, Tree, Array], Array] = static()
    dtype: Any = static(default=None)

    def __hash__(self) -> int:
        """Refused, because ``jax.jit(bound)`` would make constants of the parameters."""
        raise TypeError(
            "a bound model is an argument of compiled code, not the compiled function: write "
            "jax.jit(lambda model, x: model(x))(model, x)"
        )

    def __call__(self, x: Array) -> Array:
        """Logits (B, C) of ``x`` (B, ...) in evaluation mode."""
        if self.dtype is None:
            return self.logits(self.params, self.extra, x)
        return self.logits(self.params, self.extra, _cast(x, self.dtype)).astype(jnp.float32)


def _cast(leaf: Array, dtype: DTypeLike) -> Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
