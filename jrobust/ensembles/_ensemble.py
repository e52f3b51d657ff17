"""An ensemble of models as one model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import _run
from jrobust._algorithm import algorithm, static
from jrobust.ensembles._combine import mean_logits
from jrobust.ensembles._stacked import Tree, count, signature, stack

Array = jax.Array


def _map(fn: Callable[[Any], Tree], models: Any, chunk: int) -> Tree:
    # batch_size=1 would vmap over an axis of length one, and group its convolutions too.
    return jax.lax.map(fn, models, batch_size=None if chunk == 1 else chunk)


def _logits(model: Any, x: Array) -> Array:
    return model(x).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="chunk")
def _stacked_logits(models: Any, x: Array, chunk: int) -> Array:
    """Compiled as a function of the models, so that calls outside of jit do not compile anew."""
    return _map(lambda model: _logits(model, x), models, chunk)


@algorithm
class Ensemble:
    """M models that answer as one: ``ensemble(x)`` maps (B, ...) to logits (B, C).

    A pytree, to be given wherever a ``logits_fn`` is: other parameters or weights compile nothing
    new. Made by :func:`ensemble`.

    Attributes:
        models: the pytree of one model whose leaves start with the model axis (M, ...), or a tuple
            of M models of any architecture.
        weights: (M,) float32, with a positive sum, which need not be one.
        combine: ``combine(members (M, B, C), weights (M,)) -> (B, C)``.
        chunk: how many stacked models are evaluated at a time.
    """

    models: Any
    weights: Array
    combine: Callable[[Array, Array], Array] = static(default=mean_logits)
    chunk: int = static(default=1)

    def __len__(self) -> int:
        """The number M of models."""
        return self.weights.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Model ``index``; of stacked models the index may be traced, such as a random one.

        Raises ``IndexError`` beyond the last model, which also ends a loop over them.
        """
        if isinstance(index, (int, np.integer)) and not -len(self) <= index < len(self):
            raise IndexError(f"an ensemble of {len(self)} models has no model {index}")
        if type(self.models) is tuple:
            return self.models[index]
        return jax.tree.map(lambda leaf: leaf[index], self.models)

    def each(self, fn: Callable[[Any], Tree]) -> Tree:
        """``fn(model)``, a tree of arrays, for every model: leaves (M, ...).

        What a method does to each of its models, ``chunk`` at a time: the gradients of all members
        are ``ensemble.each(lambda model: jax.grad(lambda x: loss(model(x)))(x))``.
        """
        if type(self.models) is tuple:
            return stack([fn(model) for model in self.models])
        return _map(fn, self.models, self.chunk)

    def members(self, x: Array) -> Array:
        """Logits (M, B, C) float32 of every model."""
        if type(self.models) is tuple:
            return stack([_logits(model, x) for model in self.models])
        return _stacked_logits(self.models, x, self.chunk)

    def __call__(self, x: Array) -> Array:
        """Logits (B, C) of the ensemble."""
        return self.combine(self.members(x), self.weights)


def ensemble(
    models: Any,
    weights: Any = None,
    *,
    combine: Callable[[Array, Array], Array] = mean_logits,
    chunk: int = 1,
) -> Ensemble:
    """An ensemble of M models as one model.

    Models of one architecture are stacked and run as one compiled loop over their parameters;
    others are kept apart and compiled one by one.

    Args:
        models: a list of models (B, ...) -> (B, C), bound ones or plain functions, or one stacked
            model, such as ``stack(models)`` or ``network.bind(*draw(network, keys, x))``.
        weights: (M,) numbers, not negative, with a positive sum; equal when None. Leaves.
        combine: :func:`mean_logits`, :func:`mean_probabilities`, :func:`mean_log_probabilities`,
            :func:`vote`, or any function of logits (M, B, C) and weights (M,).
        chunk: how many stacked models to evaluate at a time; M vmaps over all. For convolutional
            networks leave it at 1 on the CPU, where XLA runs the grouped convolutions that vmap
            makes slowly: ten gradients of four ResNet-8 (batch 64, 32x32, two cores) took 1.7 s
            one model after the other, 9.4 s vmapped, and 1.5 s unrolled, which compiles every
            model; one model takes 0.44 s. For dense networks chunks made no difference there.
            On an accelerator that one model does not fill, more may be faster.

    Raises:
        TypeError: for what is no model. ValueError: without models, for a model that is not
            stacked, for weights or a chunk that do not fit.
    """
    if type(models) in (list, tuple):
        models = _collected(models)
    m = len(models) if type(models) is tuple else count(_run.as_pytree(models))
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive int, got {chunk!r}")
    if weights is None:
        weights = np.ones(m)
    if np.shape(weights) != (m,):
        raise ValueError(f"weights must be {m} numbers, one a model, got {weights!r}")
    if not isinstance(weights, jax.core.Tracer):
        values = np.asarray(weights, np.float64)
        if not (np.all(np.isfinite(values)) and np.all(values >= 0) and values.sum() > 0):
            raise ValueError(
                f"weights must not be negative and have a positive sum, got {values.tolist()}"
            )
    return Ensemble(models, jnp.asarray(weights, jnp.float32), combine=combine, chunk=chunk)


def _collected(models: Sequence[Any]) -> Any:
    """Stacked if they are of one architecture, else a tuple of pytrees."""
    if not models:
        raise ValueError("an ensemble needs at least one model")
    trees = [_run.as_pytree(model) for model in models]
    if jax.tree.leaves(trees[0]) and len({signature(tree) for tree in trees}) == 1:
        return stack(trees)
    return tuple(trees)
