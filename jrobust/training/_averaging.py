"""Averages of the weights along a training run, and the batch-norm statistics that fit them."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.models import Network

Array = jax.Array
Tree = Any


def _is_float(leaf: Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _wide(dtype: Any) -> Any:
    """What sums of ``dtype`` are kept in: float32, float64 where the dtype has more than that."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(leaf: Array) -> Array:
    """A float leaf in what sums of it are kept in."""
    return jnp.asarray(leaf, _wide(leaf.dtype)) if _is_float(leaf) else leaf


@algorithm
class Average:
    """What an :class:`Averaging` carries: arrays of its own, which nothing else refers to.

    Attributes:
        weights: ``(params, extra)``, float leaves averaged, in float32; others as they last were.
        dtypes: of the leaves that are averaged.
    """

    weights: tuple[Tree, Tree]
    dtypes: tuple[Any, ...] = static()


class Averaging(abc.ABC):
    """An average of the weights that trails the training: an ``@algorithm`` with a ``rate``.

    ``params`` and the floating-point leaves of ``extra`` (batch-norm statistics) are averaged
    alike; other leaves of ``extra`` are copied from the current weights. ``training.step`` keeps
    an average when given one; by hand it is ``average = init(params, extra)`` once,
    ``average = update(average, params, extra, step)`` after every update of the parameters, and
    ``weights(average)`` to use it.
    """

    @abc.abstractmethod
    def rate(self, step: Array) -> Array:
        """How far update number ``step`` (from 1) moves the average to the new weights: [0, 1]."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ``ValueError`` for a setting that makes no sense."""

    def init(self, params: Tree, extra: Tree) -> Average:
        """The average before the first update: the weights themselves, in buffers of its own."""
        leaves, tree = jax.tree.flatten((params, extra))
        # Copied: training donates the buffers of weights and average alike.
        own = [
            jnp.array(leaf, _wide(leaf.dtype), copy=True) if _is_float(leaf) else jnp.copy(leaf)
            for leaf in leaves
        ]
        return Average(jax.tree.unflatten(tree, own), tuple(leaf.dtype for leaf in leaves))

    def update(self, average: Average, params: Tree, extra: Tree, step: Array) -> Average:
        """The average after update number ``step`` (from 1) made these weights; pure."""
        rate = jnp.asarray(self.rate(step))

        def move(old: Array, new: Array) -> Array:
            if not _is_float(new):
                return jnp.copy(new)
            return optax.incremental_update(new.astype(old.dtype), old, rate.astype(old.dtype))

        moved = jax.tree.map(move, average.weights, (params, extra))
        return Average(moved, average.dtypes)

    @staticmethod
    def weights(average: Average) -> tuple[Tree, Tree]:
        """``(params, extra)`` of the average, in the dtypes of the weights that are averaged."""
        leaves, tree = jax.tree.flatten(average.weights)
        cast = [
            leaf if leaf.dtype == dtype else leaf.astype(dtype)
            for leaf, dtype in zip(leaves, average.dtypes)
        ]
        return jax.tree.unflatten(tree, cast)


@algorithm
class EMA(Averaging):
    """Exponential moving average: ``average = d average + (1 - d) weights`` after each update.

    At update ``t`` (from 1), ``d = min(decay, (1 + t) / (10 + t))``, so that the random
    initialisation is soon forgotten: its share is 6e-5 after ten updates. This is the warm-up of
    TensorFlow's ``ExponentialMovingAverage(num_updates=)``; the code released with Gowal et al.
    (2020) trains robust models with it, at a decay of 0.995.

    Args:
        decay: in [0, 1); the average reaches back about ``1 / (1 - decay)`` updates.
    """

    decay: Any = 0.999

    def check(self) -> None:
        """Raise ``ValueError`` unless ``decay`` is a number in [0, 1)."""
        if jnp.ndim(self.decay) != 0 or not 0 <= float(self.decay) < 1:
            raise ValueError(f"EMA.decay must be a number in [0, 1), got {self.decay}")

    def rate(self, step: Array) -> Array:
        """One minus the decay of this update; see :class:`Averaging`."""
        return 1.0 - jnp.minimum(self.decay, (1 + step) / (10 + step))


@algorithm
class SWA(Averaging):
    """Stochastic weight averaging (Izmailov et al. 2018): the equal average of a run's last part.

    Of the weights after the updates ``start``, ``start + every``, ``start + 2 every``, ...; up to
    ``start`` the current weights are the average. The running averages of batch-norm do not belong
    to averaged weights: re-estimate them with :func:`update_statistics`.

    Args:
        start: update, counted from 1, whose weights are the first to count; 0 for those that
            training begins with.
        every: updates from one to the next, >= 1; an epoch's number of them in the paper.
    """

    start: Any
    every: Any = 1

    def check(self) -> None:
        """Raise ``ValueError`` unless ``start`` and ``every`` are whole, >= 0 and >= 1."""
        for name, least in (("start", 0), ("every", 1)):
            value = np.asarray(getattr(self, name))
            if value.ndim or not np.issubdtype(value.dtype, np.integer) or value < least:
                raise ValueError(f"SWA.{name} must be a whole number >= {least}, got {value}")

    def rate(self, step: Array) -> Array:
        """One over the number of weights that count, this one included; see :class:`Averaging`."""
        before, rest = jnp.divmod(jnp.maximum(step - self.start, 0), self.every)
        return jnp.where(rest == 0, 1.0 / (before + 1), 0.0)


@jax.jit
def _pass(
    network: Network, params: Tree, extra: Tree, key: Array, x: Array
) -> tuple[list[Array], Array]:
    """The leaves of ``extra`` after a training pass, and the memory ``m`` of each.

    ``m`` in [0, 1) says that ``new = m old + (1 - m) value``, with a value that does not depend on
    ``extra``; it is -1 for leaves that are no such running average.
    """
    leaves, tree = jax.tree.flatten(extra)
    where = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]

    def forward(moving: list[Array]) -> tuple[list[Array], list[Array]]:
        full = list(leaves)
        for i, leaf in zip(where, moving):
            full[i] = leaf
        new = network.train_logits(params, jax.tree.unflatten(tree, full), key, x)[1]
        new = jax.tree.leaves(new)
        return [new[i] for i in where], new

    moving = [leaves[i] for i in where]
    _, slope, new = jax.linearize(forward, moving, has_aux=True)
    # A running average answers to its own old value alone, each element by the same factor. The
    # second direction, with another scale for each leaf, tells leaves that depend on others;
    # powers of two keep its products exact.
    scales = [2.0 ** (j % 64) for j in range(len(where))]
    ones = slope([jnp.ones_like(leaf) for leaf in moving])
    apart = slope([jnp.full_like(leaf, scale) for leaf, scale in zip(moving, scales)])
    memory = jnp.full(len(leaves), -1.0)
    for i, one, other, scale in zip(where, ones, apart, scales):
        m = one.ravel()[0]
        own = jnp.all(other == m * scale) & (m >= 0) & (m < 1)
        memory = memory.at[i].set(jnp.where(own, m, -1.0))
    return new, memory


def compile_statistics(network: Network, params: Tree, extra: Tree, key: Array, x: Array) -> None:
    """Compile what :func:`update_statistics` runs for batches like ``x`` into JAX's cache."""
    if jax.tree.leaves(extra):
        _pass.lower(network, params, jax.tree.map(widened, extra), key, x).compile()


def update_statistics(
    network: Network, params: Tree, extra: Tree, key: Array, batches: Iterable[Any]
) -> Tree:
    """``extra`` with the batch-norm statistics of ``params`` re-estimated on clean inputs.

    Averaged weights have seen no input, and the average of old statistics is not that of theirs
    (Izmailov et al. 2018). Here each running average becomes the plain mean of its value over all
    batches, whatever it was before, as in PyTorch's ``swa_utils.update_bn``. This is exact: a
    batch-norm layer moves its average by ``new = m old + (1 - m) value``, where neither ``m`` nor
    the value depends on ``extra``; ``m`` is the derivative, and the value follows from ``old = 0``.
    All other leaves (counters) go through the passes in turn.

    Args:
        network: the model; its training pass is compiled once for batches of one shape.
        params, extra: weights, for instance ``state.weights``.
        key: one typed key, for dropout.
        batches: input batches (B, ...), as in training: shuffled, for the variances are those
            inside of a batch, and of one size, for each counts alike.

    Returns:
        ``extra``, structure and dtypes as given; the very same, without a pass, if it is empty.

    Raises:
        ValueError: if there are no batches.
    """
    _keys.check(key)
    given, tree = jax.tree.flatten(extra)
    if not given:
        return extra
    leaves = list(map(widened, given))
    sums: list[Any] = [0.0] * len(leaves)
    memory: Any = None
    count = 0
    for count, batch in enumerate(batches, 1):
        one, x = jax.random.fold_in(key, count), jnp.asarray(batch)
        if memory is None:  # a pass that does not count, to know what to set to zero
            _, found = _pass(network, params, jax.tree.unflatten(tree, leaves), one, x)
            memory = np.asarray(found).tolist()
            leaves = [jnp.zeros_like(a) if m >= 0 else a for a, m in zip(leaves, memory)]
        new, _ = _pass(network, params, jax.tree.unflatten(tree, leaves), one, x)
        sums = [s + a if m >= 0 else s for s, a, m in zip(sums, new, memory)]
        leaves = [old if m >= 0 else a for old, a, m in zip(leaves, new, memory)]
    if memory is None:
        raise ValueError("batches is empty: statistics need at least one batch of inputs")
    means = [s / (count * (1 - m)) if m >= 0 else a for s, a, m in zip(sums, leaves, memory)]
    cast = [a.astype(g.dtype) if _is_float(g) else a for a, g in zip(means, given)]
    return jax.tree.unflatten(tree, cast)
