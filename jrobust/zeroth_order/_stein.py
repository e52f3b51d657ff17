"""Derivatives of a Gaussian-smoothed function from its values, at the nodes of a sparse grid."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust.zeroth_order._estimator import Array, _known, check_value

# The default chunk: as many nodes as make so many points of one call.
_POINTS = 1 << 16


class Stein(NamedTuple):
    """A smoothed function and its derivatives at each of B points.

    Attributes:
        value: (B,) ``f_s(x) = E f(x + sigma z)``, z standard normal.
        grad: (B, D) its gradient.
        second: (B, D) its second derivatives along the axes, the diagonal of the Hessian.
    """

    value: Array
    grad: Array
    second: Array

    @property
    def laplacian(self) -> Array:
        """(B,) the sum of ``second``."""
        return jnp.sum(self.second, -1)


def stein(
    f: Callable[[Array], Array],
    x: Array,
    sigma: Any,
    level: int = 3,
    *,
    chunk: int | None = None,
) -> Stein:
    """Value, gradient and second derivatives of ``f_s(x) = E f(x + sigma z)``, by values of f.

    Stein's identities, with z standard normal in D dimensions,

    * ``grad f_s(x) = E[z f(x + sigma z)] / sigma``
    * ``d^2 f_s / dx_i^2 (x) = E[(z_i^2 - 1) f(x + sigma z)] / sigma^2``

    (their sum is the Laplacian, ``E[f (|d|^2 - sigma^2 D)] / sigma^4`` for ``d = sigma z``), with
    the expectation taken over the nodes of :func:`sparse_grid`: exact for polynomials f of total
    degree up to ``2 level - 1`` for the value, one less for the gradient and two less for the
    second derivatives. These take ``z_i^2 - 1`` times f less its value at ``z_i = 0``, which has
    the same expectation: with f itself the grid's error in every other dimension enters, D times
    into a Laplacian. As the derivatives of physics-informed losses: He et al. 2023, "Learning
    physics-informed neural networks without stacked back-propagation" (by random z), and Zhao et
    al. 2023, "Tensor-compressed back-propagation-free training for (physics-informed) neural
    networks" (by sparse grids). f need not be differentiable, and the model may be taken to be
    ``f_s`` itself: then these are its derivatives, and not approximations of those of f.

    Nodes come in pairs ``z, -z`` of equal weight. What is summed are ``f(x + sigma z) -
    f(x - sigma z)`` and ``f(x + sigma z) + f(x - sigma z) - 2 f(x)``, in which constants (and in
    the second linear functions) cancel before they meet the weights: the derivatives of a constant
    are 0 to the bit. What is left in float32 is the rounding of f itself, times ``1 / sigma`` and
    ``1 / sigma^2``; second derivatives want ``sigma`` of 0.05 or more for values and inputs around
    1.

    Args:
        f: (N, D) -> (N,) float32 (or float64), rows independent.
        x: (B, D) floats.
        sigma: the standard deviation of the noise, > 0, in the units of x; may be traced.
        level: of the grid, at least 3: below, second derivatives are wrong.
        chunk: pairs of nodes evaluated at once for all of x, at least 1. None: as many as make
            65,536 points. Memory grows with it, results do not depend on it beyond rounding.

    Returns:
        A :class:`Stein`. ``f`` is evaluated at ``len(sparse_grid(D, level)[1])`` points for each
        row of x.

    Raises:
        TypeError: x or the values of f are not float32 or float64.
        ValueError: x is not (B, D), f does not return one value a row; ``sigma`` is not positive
            and finite, ``level`` or ``chunk`` out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> found = stein(lambda x: jnp.sum(x**2, 1), jnp.ones((1, 2)), 0.5)
        >>> print(found.value, found.grad, found.laplacian.round(4))  # 2 + 2 sigma^2, 2 x, 4
        [2.5] [[2. 2.]] [4.]
    """
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (B, D), got {x.shape}")
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"x must be float32, got {x.dtype}: half precision loses the differences")
    size = _known(sigma) if jnp.ndim(sigma) == 0 else math.nan
    if size is not None and not (math.isfinite(size) and size > 0):
        raise ValueError(f"sigma must be one positive and finite number, got {sigma}")
    if not isinstance(level, int) or level < 3:
        raise ValueError(f"level must be an int >= 3, got {level!r}: second derivatives need it")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be None or an int >= 1, got {chunk!r}")
    batch, dimension = x.shape
    nodes, weights, bends = _halves(dimension, level)

    base = f(x)
    check_value(base, (batch,))
    lanes = min(len(nodes), chunk or max(1, _POINTS // (2 * max(batch, 1))))
    rounds = -(-len(nodes) // lanes)
    lanes = -(-len(nodes) // rounds)
    # Of the centre, which is evaluated again and counts for nothing, where a chunk is not full.
    more = rounds * lanes - len(nodes)
    nodes, bends = (np.pad(part, ((0, more), (0, 0))) for part in (nodes, bends))
    weights = np.pad(weights, (0, more))

    def pairs(steps: Array) -> Array:
        """(B, 2, lanes) values at both ends of some steps (lanes, D)."""
        both = jnp.concatenate([steps, -steps])
        points = x[:, None, :] + both[None, :, :]
        return f(points.reshape(-1, dimension)).reshape(batch, 2, -1)

    steps = jnp.asarray(nodes, x.dtype) * jnp.asarray(sigma, x.dtype)
    if rounds == 1:
        values = pairs(steps)
    else:
        each = jax.lax.map(pairs, steps.reshape(rounds, lanes, dimension))
        values = jnp.moveaxis(each, 0, 2).reshape(batch, 2, -1)
    ahead, behind = values[:, 0], values[:, 1]
    even = (ahead - base[:, None]) + (behind - base[:, None])

    def summed(terms: Array, by: np.ndarray) -> Array:
        # At full precision, for weights of both signs nearly cancel.
        return jnp.matmul(terms, by.astype(terms.dtype), precision=jax.lax.Precision.HIGHEST)

    return Stein(
        value=base + summed(even, weights),
        grad=summed(ahead - behind, weights[:, None] * nodes) / sigma,
        second=summed(even, bends) / sigma**2,
    )


def sparse_grid(dimension: int, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Smolyak's sparse grid for the standard normal distribution.

    ``sum w_j p(z_j) = E p(z)`` for every polynomial p of total degree at most ``2 level - 1``.
    Combines Gauss-Hermite rules of 1, 2, .., ``level`` nodes in each dimension (Smolyak 1963): in
    one dimension it is the rule of ``level`` nodes; in D, level 2 has ``2 D + 1`` nodes and level 3
    ``1 + 4 D + 2 D (D - 1)``. Weights may be negative. The grid is symmetric to the bit: with z it
    holds -z, of the same weight.

    Args:
        dimension: D >= 1.
        level: >= 1.

    Returns:
        Nodes (J, D) and weights (J,), float64, of which no node occurs twice.

    Raises:
        ValueError: ``dimension`` or ``level`` is not a positive int.

    Examples:
        >>> nodes, weights = sparse_grid(20, 3)
        >>> print(len(weights), round((nodes**4).sum(1) @ weights, 6))  # E z^4 = 3, in each of 20
        841 60.0
    """
    for name, value in (("dimension", dimension), ("level", level)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    nodes, weights, _ = _smolyak(dimension, level)
    return nodes.copy(), weights.copy()


def _gauss_hermite(n: int) -> dict[float, float]:
    """Weight by node: eigenvalues of the recurrence of Hermite polynomials (Golub, Welsch 1969)."""
    off = np.sqrt(np.arange(1.0, n))
    nodes, vectors = np.linalg.eigh(np.diag(off, 1) + np.diag(off, -1))
    weights = vectors[0] ** 2
    nodes, weights = (nodes - nodes[::-1]) / 2, (weights + weights[::-1]) / 2
    return dict(zip(nodes.tolist(), weights.tolist()))


@functools.lru_cache(maxsize=8)
def _smolyak(dimension: int, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes (J, D), weights (J,), and the weights (J, D) of second derivatives for sigma = 1."""
    # The sum over all levels l of the products of V_l - V_{l-1}, where V_0 = 0: dimensions in which
    # l = 1 take the node 0 with weight 1 and need not be named. Second derivatives along an axis
    # take the rules z -> V_l (z^2 - 1) there, and V_1 none: see stein.
    steps, bends = [], []
    for n in range(2, level + 1):
        step: dict[float, float] = defaultdict(float)
        bend: dict[float, float] = defaultdict(float)
        for sign, size in ((1, n), (-1, n - 1)):
            for node, weight in _gauss_hermite(size).items():
                step[node] += sign * weight
                bend[node] += sign * weight * (node**2 - 1) * (size > 1)
        steps.append(step)
        bends.append(bend)
    # By node, which is named by its coordinates other than 0; axis None for the weight itself.
    terms: dict[Any, dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for size in range(min(dimension, level - 1) + 1):
        for extra in itertools.product(range(level - 1), repeat=size):
            if sum(extra) + size >= level:
                continue
            product = list(itertools.product(*(steps[e] for e in extra)))
            weights = [[steps[e][node] for e, node in zip(extra, one)] for one in product]
            second = [[bends[e][node] for e, node in zip(extra, one)] for one in product]
            for axes in itertools.combinations(range(dimension), size):
                for one, w, b in zip(product, weights, second):
                    at = terms[tuple((axis, node) for axis, node in zip(axes, one) if node)]
                    at[None].append(math.prod(w))
                    for i, axis in enumerate(axes):
                        at[axis].append(math.prod((*w[:i], b[i], *w[i + 1 :])))
    rows = []
    for where in sorted(terms):
        # Nodes of coarse rules may cancel, up to rounding.
        sums = {
            along: total
            for along, parts in terms[where].items()
            if abs(total := math.fsum(parts)) > 1e-13 * sum(map(abs, parts))
        }
        if sums:
            rows.append((where, sums))
    nodes, all_bends = np.zeros((2, len(rows), dimension))
    all_weights = np.zeros(len(rows))
    for j, (where, sums) in enumerate(rows):
        all_weights[j] = sums.pop(None, 0.0)
        for axis, node in where:
            nodes[j, axis] = node
        for along, total in sums.items():
            all_bends[j, along] = total
    return nodes, all_weights, all_bends


def _halves(dimension: int, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One node of each pair ``z, -z``, without the centre, and the weights of both kinds."""
    nodes, weights, bends = _smolyak(dimension, level)
    half = np.take_along_axis(nodes, np.argmax(nodes != 0, 1)[:, None], 1)[:, 0] > 0
    return nodes[half], weights[half], bends[half]
