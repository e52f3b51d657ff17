"""Dense layers whose weight matrix is a tensor train: few parameters, and never the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Array = jax.Array
Shape = tuple[int, int, int, int]


class TensorTrainDense(nn.Module):
    """Dense layer on tensor-train cores: (..., m) -> (..., n), with m and n products of factors.

    The weight matrix (m, n) of factors ``m = m_1 .. m_k`` and ``n = n_1 .. n_k`` is

    ``W[(i_1 .. i_k), (j_1 .. j_k)] = G_1[:, i_1, j_1, :] .. G_k[:, i_k, j_k, :]``

    a product of k small matrices, rows and columns counted with the last factor fastest. Core l has
    the shape ``(r_{l-1}, m_l, n_l, r_l)`` with ``r_0 = r_k = 1``, so that there are
    ``sum r_{l-1} m_l n_l r_l`` parameters in place of ``m n``: Oseledets 2011, "Tensor-train
    decomposition"; Novikov et al. 2015, "Tensorizing neural networks". The matrix itself is never
    formed: inputs meet one core after the other, from the end where that takes fewer
    multiplications.

    Cores are drawn with variance ``gain^(1/k) / (r_{l-1} m_l)``. Then ``E W_ij^2 = gain / m``: for
    inputs of mean square 1 outputs have mean square ``gain``, and so have all sums on the way in
    proportion. ``gain=2`` is that of He et al. for ReLU.

    Parameters: ``core1`` .. ``corek``, and ``bias`` (n,). :func:`tensor_train` makes the cores of a
    given matrix.

    Attributes:
      features: n_1 .. n_k; their product is the number of outputs.
      inputs: m_1 .. m_k, as many; their product is the number of inputs.
      ranks: r_1 .. r_{k-1}, or one number for all; made smaller where no matrix of these factors
        needs as many.
      use_bias: whether to add a bias, at first zero.
      gain: the mean square of the outputs at first, see above.

    Raises ``ValueError`` where factors or ranks are not positive, not as many as they should be, or
    the inputs are not of their product.
    """

    features: tuple[int, ...]
    inputs: tuple[int, ...]
    ranks: int | tuple[int, ...] = 2
    use_bias: bool = True
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shapes = _shapes(self.inputs, self.features, self.ranks)
        rows, columns = math.prod(self.inputs), math.prod(self.features)
        if x.shape[-1:] != (rows,):
            raise ValueError(
                f"inputs must have {rows} = {' x '.join(map(str, self.inputs))} numbers in their "
                f"last axis, got shape {x.shape}"
            )
        draw = nn.initializers.variance_scaling(
            self.gain ** (1 / len(shapes)), "fan_in", "normal", in_axis=(0, 1), out_axis=(2, 3)
        )
        cores = [self.param(f"core{i}", draw, shape) for i, shape in enumerate(shapes, 1)]
        y = _product(x.reshape(-1, rows), cores)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (columns,))[None]
        return y.reshape(*x.shape[:-1], columns)


def tensor_train(
    matrix: Any,
    inputs: Sequence[int],
    features: Sequence[int],
    ranks: int | Sequence[int],
) -> dict[str, np.ndarray]:
    """The cores of a matrix (m, n), as parameters of a :class:`TensorTrainDense` without bias.

    Truncated singular value decompositions, one core after the other, in float64 on the host
    (TT-SVD, Oseledets 2011). Exact where the ranks suffice. Otherwise, in the Frobenius norm, the
    error is at most the root of the summed squares of the singular values left out, of the k - 1
    matrices ``(i_1 j_1 .. i_l j_l) x (the others)``. All cores are scaled to entries of the same
    mean square, so that one step of a zeroth-order estimate suits them all.

    Args:
        matrix: (m, n) floats, such as the kernel of a ``Dense`` layer.
        inputs, features, ranks: as in :class:`TensorTrainDense`.

    Returns:
        ``{"core1": (1, m_1, n_1, r_1), ...}``, float32.

    Raises:
        ValueError: the shape of ``matrix`` is not that of the factors, or it is not finite; as
            :class:`TensorTrainDense` does.
    """
    shapes = _shapes(inputs, features, ranks)
    matrix, k = np.asarray(matrix, np.float64), len(shapes)
    expected = math.prod(inputs), math.prod(features)
    if matrix.shape != expected:
        raise ValueError(
            f"matrix must have the shape of its factors, {expected}, got {matrix.shape}"
        )
    if not np.all(np.isfinite(matrix)):
        raise ValueError("matrix must be finite, got NaN or infinity in it")
    interleaved = [axis for i in range(k) for axis in (i, k + i)]
    rest, cores = matrix.reshape(*inputs, *features).transpose(interleaved), []
    for before, m, n, after in shapes[:-1]:
        u, s, v = np.linalg.svd(rest.reshape(before * m * n, -1), full_matrices=False)
        cores.append(u[:, :after].reshape(before, m, n, after))
        rest = s[:after, None] * v[:after]
    cores.append(rest.reshape(shapes[-1]))
    sizes = [math.sqrt(np.mean(core**2)) for core in cores]
    if all(sizes):  # not of the zero matrix
        mean = math.exp(np.mean(np.log(sizes)))
        cores = [core * (mean / size) for core, size in zip(cores, sizes)]
    return {f"core{i}": core.astype(np.float32) for i, core in enumerate(cores, 1)}


def _shapes(
    inputs: Sequence[int], features: Sequence[int], ranks: int | Sequence[int]
) -> list[Shape]:
    """The shapes of the cores; checked."""
    k = len(inputs)
    between = (ranks,) * (k - 1) if isinstance(ranks, int) else tuple(ranks)
    if k == 0 or len(features) != k or len(between) != k - 1:
        raise ValueError(
            f"as many inputs as features are needed, and one rank fewer; got inputs={inputs}, "
            f"features={features}, ranks={ranks}"
        )
    if any(v < 1 for v in (*inputs, *features, *between)):
        raise ValueError(
            f"factors and ranks must be at least 1, got inputs={inputs}, features={features}, "
            f"ranks={ranks}"
        )
    # No more than rows or columns of the matrix that a rank is of.
    r = [1, *between, 1]
    sizes = [m * n for m, n in zip(inputs, features)]
    for i in range(1, k):
        r[i] = min(r[i], r[i - 1] * sizes[i - 1])
    for i in range(k - 1, 0, -1):
        r[i] = min(r[i], r[i + 1] * sizes[i])
    return list(zip(r[:-1], inputs, features, r[1:]))


def _multiplications(shapes: Sequence[Shape]) -> int:
    """Of one example with the cores in this order."""
    size, total = math.prod(m for _, m, _, _ in shapes), 0
    for before, m, n, after in shapes:
        size //= m
        total += size * before * m * n * after
        size *= n
    return total


def _product(x: Array, cores: Sequence[Array]) -> Array:
    """(B, m) times the matrix of the cores: (B, n)."""
    k, shapes = len(cores), [cast(Shape, core.shape) for core in cores]
    ahead = _multiplications(shapes) <= _multiplications(shapes[::-1])
    # Axes by number: 0 of examples, then those of m_l, of n_l, of r_l. Cores keep their four axes,
    # so that an exact difference of one entry stays in its place along them.
    rank = 1 + 2 * k
    axes = [0, *range(1, k + 1), rank if ahead else rank + k]
    h = x.reshape(-1, *(m for _, m, _, _ in shapes), 1)
    for i in range(k) if ahead else reversed(range(k)):
        core = [rank + i, 1 + i, 1 + k + i, rank + i + 1]
        out = [a for a in axes if a not in core] + [a for a in core if a not in axes]
        h, axes = jnp.einsum(h, axes, cores[i], core, out), out
    return jnp.transpose(h, np.argsort(axes).tolist()).reshape(x.shape[0], -1)
