"""Square: random search over squares, from queries alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import Record, State, where
from jrobust.attacks._query import QueryAttack
from jrobust.threat import Threat, expand

Array = jax.Array

# The share of pixels in the window is halved after each of these queries.
_HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_ORDER = {"Linf": np.inf, "L2": 2, "L1": 1}


class _Search(NamedTuple):
    best: Array  # (B, ...) the best point of this run
    loss: Array  # (B,) its loss


@algorithm
class Square(QueryAttack):
    """Square attack (Andriushchenko et al. 2020; in L1 Croce & Hein 2021): scores, no gradients.

    Random search for the highest loss: each query changes the best point in a square window and is
    kept if it is better. In Linf the window is moved to ``+eps`` or ``-eps`` of the input, one sign
    for each channel. In L2 and L1 it receives a bump of two halves of opposite sign, and the mass
    of a second window, which is emptied. The first query is of vertical stripes (Linf) or of a
    tiling by bumps. The first misclassified point ends the example.

    Every example has windows and signs of its own at every query, as in the paper; AutoAttack's
    version draws one window and, in Linf, one set of signs for the whole batch, so that what an
    example gets depends on its batch. Windows reach the last row and column, where both released
    versions stop one short.

    Inputs are images (B, H, W, C), or (B, H, W) with one channel; or, which is not published,
    vectors (B, D), of which a window is a stretch of the same share, and inputs of more axes, such
    as (B, T, H, W, C), taken for T images above one another. Works on a
    :class:`jrobust.drive.Host` model.

    Args:
        threat: the ball and box to stay in; Linf, L2 or L1.
        queries: points to evaluate at most, the first included.
        p: share of the pixels in the window at first. It is halved after 10, 50, 200, 500, 1000,
            2000, 4000, 6000 and 8000 queries, whatever ``queries`` is.
        loss: what to ascend, as in :class:`PGD`; towards a target, ``losses.cross_entropy`` is that
            of the paper.
        compat: as AutoAttack's version: windows that never reach the last row and column unless
            they fill the image, and one query beyond ``queries``, for the first point.
    """

    threat: Threat
    queries: int = static(default=5000)
    p: Any = 0.8
    loss: losses.Loss = static(default=losses.margin)
    compat: bool = static(default=False)

    NORMS = tuple(_ORDER)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """The queries."""
        return self.queries + self.compat

    @property
    def moves(self) -> int:
        """From the first query to the last."""
        return self.steps - 1

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`QueryAttack.check`; also refuses shares that are none."""
        super().check(x, y, classes, targets)
        if not bool(np.all((np.asarray(self.p) > 0) & (np.asarray(self.p) <= 1))):
            raise ValueError(f"Square.p must lie in (0, 1], got {self.p}")

    def start(self, record: Record) -> tuple[Array, Any]:
        """Stripes or tiles."""
        x = _start(record.key, record.x0, record.threat)
        return x, _Search(x, jnp.full_like(record.loss, -jnp.inf))

    def propose(self, state: State, loss: Array) -> tuple[Array, Any]:
        """Keep the point if it is better, and change a window of the best."""
        record, old = state.record, state.inner
        best, loss = where(loss > old.loss, _Search(state.x, loss), old)
        return _another(self, record.key, state.t, best, record.x0, record.threat), _Search(
            best, loss
        )


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, of a vector 1, width, channels; images of more axes are put above one another."""
    if len(shape) == 2:
        return 1, shape[1], 1
    if len(shape) == 3:
        return shape[1], shape[2], 1
    return int(np.prod(shape[1:-2])), shape[-2], shape[-1]


def _uniform(keys: Array, count: int) -> Array:
    """(B, count) in [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


def _signs(u: Array) -> Array:
    return jnp.where(u < 0.5, -1.0, 1.0)


def _norm(values: Array, order: float, axes: tuple[int, ...] = (1, 2)) -> Array:
    """The norm over ``axes``, which stay; order 1 or 2."""
    if order == 1:
        return jnp.sum(jnp.abs(values), axes, keepdims=True)
    return jnp.sqrt(jnp.sum(values * values, axes, keepdims=True))


def _unit(values: Array, order: float, axes: tuple[int, ...] = (1, 2)) -> Array:
    return values / (1e-12 + _norm(values, order, axes))


def side(p: Any, queries: Array, size: tuple[int, ...], order: float) -> Array:
    """(B,) int32: side of the window after ``queries`` (B,); ``size`` is (H, W), or (D,)."""
    halvings = jnp.sum(queries[:, None] > jnp.asarray(_HALVED)[None], 1)
    pixels = p * 0.5**halvings * np.prod(size)
    length = jnp.round(jnp.sqrt(pixels) if len(size) == 2 else pixels).astype(jnp.int32)
    if order == np.inf:
        length = jnp.maximum(length, 1)
    else:  # odd
        length = jnp.maximum(length, 3)
        length = length + (1 - length % 2)
    return jnp.minimum(length, min(size))


def _window(u: Array, length: Array, size: int, *, compat: bool) -> Array:
    """(B, size) int32: place in a window of ``length`` (B,), whose start ``u`` (B,) decides.

    Outside of the window negative, or ``length`` and more.
    """
    starts = jnp.maximum(size - length + (0 if compat else 1), 1)
    start = jnp.floor(u * starts).astype(jnp.int32)
    return jnp.arange(size)[None] - start[:, None]


def _inside(rows: Array, columns: Array, length: Array) -> Array:
    """(B, H, W) bool: the window."""
    down, across = ((at >= 0) & (at < length[:, None]) for at in (rows, columns))
    return down[:, :, None] & across[:, None, :]


def _bump(rows: Array, columns: Array, length: Array, turned: Array, order: float) -> Array:
    """(B, H, W): a bump of norm one in the window, zero outside.

    Two halves of opposite sign and equal norm, one above the other or, where ``turned`` (B,), side
    by side. Within a half values fall with the distance ``r`` from its centre, measured along the
    axes, as the sum of ``1 / k^2`` (L2) or ``1 / k^4`` (L1) over ``k = r + 1 .. length // 2 + 1``.
    """
    most = max(rows.shape[1], columns.shape[1])
    terms = 1.0 / np.arange(most + 2, 0, -1.0) ** (2 if order == 2 else 4)
    tail = jnp.asarray(np.append(np.cumsum(terms)[::-1], 0.0), jnp.float32)  # from k = r + 1 on
    first = length[:, None] // 2  # the first half is shorter by one where the length is odd

    def height(r: Array) -> Array:
        return jnp.maximum(tail[jnp.clip(r, 0, most)] - tail[first + 1], 0.0)

    def across_halves(at: Array) -> Array:
        second = length[:, None] - first
        return height(jnp.where(at < first, abs(at - first // 2), abs(at - first - second // 2)))

    def along_halves(at: Array) -> Array:
        return height(jnp.abs(at - first))

    turn = turned[:, None]
    down = jnp.where(turn, along_halves(rows), across_halves(rows))
    across = jnp.where(turn, across_halves(columns), along_halves(columns))
    # The distance is the larger of the two, and values fall with it.
    values = jnp.minimum(down[:, :, None], across[:, None, :])
    values = jnp.where(_inside(rows, columns, length), values, 0.0)
    upper = jnp.where(turn[:, None], (columns < first)[:, None, :], (rows < first)[:, :, None])
    halves = jnp.where(upper, values, 0.0), jnp.where(upper, 0.0, values)
    return _unit(_unit(halves[0], order) - _unit(halves[1], order), order)


@jax.jit
def _start(keys: Array, x0: Array, threat: Threat) -> Array:
    """The first point: random, (B, ...)."""
    batch, (height, width, channels) = x0.shape[0], _image(x0.shape)
    eps = expand(threat.eps, x0)
    keys = _keys.fold(keys, 0)
    if threat.norm == "Linf":
        signs = _signs(_uniform(keys, width * channels)).reshape(batch, 1, width, channels)
        signs = jnp.broadcast_to(signs, (batch, height, width, channels))
        return threat.project(x0 + eps * signs.reshape(x0.shape), x0)
    order = _ORDER[threat.norm]
    vector = x0.ndim == 2
    length = max((width if vector else min(height, width)) // 5, 1)
    tall = 1 if vector else length
    down, across = height // tall, width // length
    u = _uniform(keys, down * across * (channels + 1))
    u = u.reshape(batch, down, 1, across, 1, channels + 1)
    place, all_of_it = jnp.arange(length)[None], jnp.asarray([length])
    middle = jnp.asarray([[length // 2]])
    flat, turned = (
        _bump(middle if vector else place, place, all_of_it, jnp.asarray([turn]), order).reshape(
            1, 1, tall, 1, length, 1
        )
        for turn in (vector, True)
    )
    tiles = jnp.where(u[..., :1] < 0.5, flat, turned) * _signs(u[..., 1:])
    tiles = tiles.reshape(batch, down * tall, across * length, channels)
    before = [(height - down * tall) // 2, (width - across * length) // 2]
    after = [height - down * tall - before[0], width - across * length - before[1]]
    margins = [(0, 0), *zip(before, after), (0, 0)]
    move = jnp.pad(tiles, margins).reshape(x0.shape)
    if threat.norm == "L2":
        move = eps * _unit(move, order, tuple(range(1, x0.ndim)))
    else:  # each tile as heavy as the box is wide; the projection leaves what eps allows
        move = (threat.hi - threat.lo) * move
    return threat.project(x0 + move, x0)


def _another(
    attack: Square, keys: Array, t: Array, best: Array, x0: Array, threat: Threat
) -> Array:
    """The best point (B, ...) with another window, for the query after ``t + 1`` of them."""
    height, width, channels = _image(x0.shape)
    order = _ORDER[threat.norm]
    vector = x0.ndim == 2
    length = side(attack.p, t, (width,) if vector else (height, width), order)
    u = _uniform(_keys.fold(keys, t + 1), channels + (2 if order == np.inf else 5))
    signs = _signs(u[:, :channels])[:, None, None, :]

    def window(i: int) -> tuple[Array, Array]:
        # The one row of a vector is the middle of its windows.
        rows = (length // 2)[:, None]
        if not vector:
            rows = _window(u[:, channels + i], length, height, compat=attack.compat)
        return rows, _window(u[:, channels + i + 1], length, width, compat=attack.compat)

    def image(values: Array) -> Array:
        return values.reshape(-1, height, width, channels)

    first = _inside(*window(0), length)[..., None]
    if order == np.inf:
        # 2 eps from anywhere in the ball and back into it leads to its other side.
        far = image(x0) + signs * threat.eps[:, None, None, None]
        return threat.project(jnp.where(first, far, image(best)).reshape(x0.shape), x0)
    second = _inside(*window(2), length)[..., None]
    move, eps = image(best - x0), threat.eps[:, None, None, None]
    used = _norm(move, order, (1, 2, 3))
    old = _norm(jnp.where(first, move, 0.0), order)
    both = _norm(jnp.where(first | second, move, 0.0), order)
    turned = vector | (u[:, channels + 4] < 0.5)
    bump = _bump(*window(0), length, turned, order)[..., None]
    new = _unit(jnp.where(first, signs * bump + move / (1e-12 + old), 0.0), order)
    # The mass of both windows, and the channel's share of what is left of eps.
    if order == 2:
        mass = jnp.sqrt(jnp.maximum(eps**2 - used**2, 0.0) / channels + both**2)
    else:  # for all channels, of which the projection leaves the best
        mass = jnp.maximum(eps - used, 0.0) + channels * both
    move = jnp.where(first, mass * new, jnp.where(second, 0.0, move))
    if order == 2:
        move = eps * _unit(move, order, (1, 2, 3))
    return threat.project(x0 + move.reshape(x0.shape), x0)


__all__ = ["Square", "side"]
