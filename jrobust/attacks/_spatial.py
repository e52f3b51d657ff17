"""Spatial: the worst rotation and translation of an image."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import AttackResult, GradientAttack, LogitsFn, Record, State, where
from jrobust.threat import Linf, Threat, expand

Array = jax.Array

_SAME = 1e-4  # of the box: images that are one and the same


@algorithm
class RotationTranslation(Threat):
    """Images may be rotated and translated a little (Engstrom et al. 2019).

    What this threat model projects, samples and measures are transforms, not images: (B, 3) arrays
    of angle, shift to the right and shift down, each as a share of its limit, in [-eps, eps].
    ``apply`` makes images of them; zeros are the image itself.

    Args:
        rotation: the largest angle in degrees, counterclockwise as positive.
        translation: the largest shift as a share of the image's width and height; the paper's
            "3 pixels" are a tenth.
        fill: value of the pixels that come from outside of the image.
        eps: factor of both limits, scalar or (B,), so that a sweep over ``eps`` scales them.
        lo, hi: the box that images lie in.
    """

    rotation: Any = 30.0
    translation: Any = 0.1
    fill: Any = 0.0
    eps: Any = 1.0
    lo: Any = 0.0
    hi: Any = 1.0
    norm: ClassVar[str] = "share of the limits"

    def apply(self, x0: Array, transform: Array) -> Array:
        """The images ``x0`` (B, H, W, C) or (B, H, W), rotated about their centre, then shifted.

        Every pixel takes the value, interpolated between four neighbours (bilinear), of the place
        it comes from; neighbours outside of the image have the value ``fill``.

        Args:
            x0: the images.
            transform: (B, 3) angle, shift to the right, shift down, as shares of the limits.
        """
        height, width, channels = _image(x0.shape)
        turn, right, down = (
            (transform[:, i] * limit)[:, None, None]
            for i, limit in enumerate((self.rotation, self.translation, self.translation))
        )
        turn = jnp.deg2rad(turn)
        middle = (height - 1) / 2, (width - 1) / 2
        rows = jnp.arange(height, dtype=x0.dtype)[None, :, None] - middle[0] - down * height
        columns = jnp.arange(width, dtype=x0.dtype)[None, None, :] - middle[1] - right * width
        # Where the pixel comes from: the rotation backwards, rows counting downwards.
        row = jnp.cos(turn) * rows + jnp.sin(turn) * columns + middle[0]
        column = jnp.cos(turn) * columns - jnp.sin(turn) * rows + middle[1]
        above, left = jnp.floor(row), jnp.floor(column)
        flat = x0.reshape(x0.shape[0], height * width, channels)
        fill = expand(jnp.asarray(self.fill, x0.dtype), flat)

        def neighbour(down: int, right: int) -> Array:
            r, c = above + down, left + right
            weight = (row - above if down else 1 - (row - above)) * (
                column - left if right else 1 - (column - left)
            )
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            at = jnp.clip(r, 0, height - 1) * width + jnp.clip(c, 0, width - 1)
            at, inside, weight = (v.reshape(v.shape[0], -1, 1) for v in (at, inside, weight))
            value = jnp.take_along_axis(flat, at.astype(jnp.int32), axis=1)
            return weight * jnp.where(inside, value, fill)

        image = neighbour(0, 0) + neighbour(0, 1) + neighbour(1, 0) + neighbour(1, 1)
        # A mean of values in the box, up to rounding.
        lo, hi = self._bounds(x0)
        return jnp.clip(image.reshape(x0.shape), lo, hi)

    def project(self, x: Array, x0: Array) -> Array:
        """The transforms ``x`` (B, 3) clipped to ``eps`` around ``x0``; zero where the limit is."""
        limits = jnp.stack(
            [
                jnp.broadcast_to(limit, x.shape[:1])
                for limit in (self.rotation, self.translation, self.translation)
            ],
            1,
        )
        reach = jnp.where(limits > 0, expand(self.eps, x), 0.0)
        return jnp.clip(x, x0 - reach, x0 + reach)

    def sample(self, keys: Array, x0: Array) -> Array:
        """Uniform transforms (B, 3) around ``x0``, by ``keys`` (B,)."""
        draws = jax.vmap(lambda key: jax.random.uniform(key, (3,), x0.dtype, -1.0, 1.0))(keys)
        return self.project(x0 + expand(self.eps, x0) * draws, x0)

    def steepest(self, gradient: Array) -> Array:
        """The sign of the gradient (B, 3) by the transforms."""
        return Linf(self.eps).steepest(gradient)

    def distance(self, x: Array, x0: Array) -> Array:
        """(B,): the largest share of a limit that the transforms ``x`` (B, 3) differ by."""
        return Linf(self.eps).distance(x, x0)

    def ascend(self, x: Array, x0: Array, gradient: Array, size: Any) -> Array:
        """The images ``x``, moved by ``size`` shares of the limits along their ``gradient``.

        Of images, unlike the rest, and from ``x = x0`` only: the small step by which
        ``loops.evaluate`` sees whether a model's gradients foresee its loss.
        """
        none = jnp.zeros((x.shape[0], 3), x.dtype)
        direction = self.steepest(self.slope(x, none, gradient))
        return self.apply(x, expand(size, none) * direction)

    def slope(self, x0: Array, transform: Array, gradient: Array) -> Array:
        """The gradient by the transform (B, 3), from that by the image it makes (B, ...)."""
        (slope,) = jax.vjp(lambda t: self.apply(x0, t), transform)[1](gradient)
        return slope

    def widest(self, width: float, shape: tuple[int, ...]) -> float:
        """The ``eps`` that allows every angle and any shift by the image's whole size."""
        limits = (180.0, np.max(self.rotation)), (1.0, np.max(self.translation))
        return float(max(most / limit for most, limit in limits if limit > 0))

    def batched(self, x: Array) -> Self:
        """See :meth:`Threat.batched`."""
        made = super().batched(x)
        limits = {
            name: jnp.asarray(getattr(self, name), x.dtype) + 0.0 * made.eps
            for name in ("rotation", "translation", "fill")
        }
        return dataclasses.replace(made, **limits)

    def check_shapes(self, x: Array) -> None:
        """See :meth:`Threat.check_shapes`; also refuses what is no image."""
        _image(x.shape)
        super().check_shapes(x)

    def check(self, x: Array) -> None:
        """See :meth:`Threat.check`; also refuses limits and a fill that make no sense."""
        self.check_shapes(x)
        name = type(self).__name__
        for field, most in (("rotation", 180.0), ("translation", 1.0)):
            limit = np.asarray(getattr(self, field), np.float64)
            if not np.all((limit >= 0) & (limit <= most)):
                raise ValueError(f"{name}.{field} must lie in [0, {most:g}], got {limit}")
        if not (np.any(np.asarray(self.rotation) > 0) or np.any(np.asarray(self.translation) > 0)):
            raise ValueError(f"{name} allows nothing: rotation and translation are both 0")
        if not (
            np.all(np.asarray(self.fill) >= self.lo) and np.all(np.asarray(self.fill) <= self.hi)
        ):
            raise ValueError(f"{name}.fill must lie in the box [lo, hi], got {self.fill}")
        super().check(x)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width, channels; raises ``ValueError`` unless this is the shape of images."""
    if len(shape) not in (3, 4):
        raise ValueError(
            "rotations and translations are of images (B, H, W, C) or (B, H, W), got inputs of "
            f"shape {shape}"
        )
    return shape[1], shape[2], shape[3] if len(shape) == 4 else 1


class _Place(NamedTuple):
    """What Spatial carries."""

    now: Array  # (B, 3) the transform of the point to evaluate next
    best: Array  # (B, 3) that of the point to return


METHODS = ("grid", "random", "gradient")


@algorithm
class Spatial(GradientAttack):
    """The worst rotation and translation of an image (Engstrom et al. 2019), in three ways.

    * ``"grid"``: every point of a grid over angles and shifts, without gradients;
    * ``"random"``: the worst of ``draws`` random transforms (worst-of-k), without gradients;
    * ``"gradient"``: projected ascent along the gradient by the three parameters. The paper finds
      it much weaker than the grid.

    The image itself is evaluated first (``"gradient"`` with ``random_start`` begins elsewhere), so
    that a misclassified input is returned untouched. ``result.distance`` is the largest share of a
    limit that a parameter uses: 0.5 is half of the allowed angle or shift, whichever is more.

    Grid and random search work on a :class:`jrobust.drive.Host` model.

    Args:
        threat: the limits, a :class:`RotationTranslation`.
        method: one of the three.
        grid: number of angles, of shifts sideways and of shifts up and down, evenly spaced between
            the limits: the paper's 775 points by default. Costs as many forward passes, one more
            where a number is even, so that the image itself is not among them.
        draws: transforms that ``"random"`` draws; costs one forward pass more.
        steps: moves of ``"gradient"``.
        rel_step_size: their length in shares of the limits, ``2.5 / steps`` when None; all three
            parameters move as far, by the sign of their gradient.
        random_start: whether ``"gradient"`` starts from a random transform.
        loss: what to ascend, as in :class:`PGD`.
        keep: ``"success"``: the first success ends the example; ``"loss"``: the highest loss.
    """

    threat: Threat = RotationTranslation()
    method: str = static(default="grid")
    grid: tuple[int, int, int] = static(default=(31, 5, 5))
    draws: int = static(default=10)
    steps: int = static(default=200)
    rel_step_size: Any = None
    random_start: bool = static(default=True)
    loss: losses.Loss = static(default=losses.cross_entropy)
    keep: str = static(default="success")

    KEEPS: ClassVar[tuple[str, ...]] = ("success", "loss")

    @property
    def queries(self) -> int | None:
        """Points to evaluate at most, where no gradient is needed."""
        return None if self.method == "gradient" else self.moves + 1

    @property
    def moves(self) -> int:
        """From the first point to the last."""
        if self.method == "grid":
            return len(_grid(self.grid)) - 1
        return self.draws if self.method == "random" else self.steps

    @property
    def random(self) -> bool:
        """Whether transforms are drawn."""
        return self.method == "random" or (self.method == "gradient" and self.random_start)

    def threats(self) -> tuple[Threat, ...]:
        """The limits; raises ``TypeError`` for anything else."""
        if not isinstance(self.threat, RotationTranslation):
            raise TypeError(
                "Spatial.threat must be a RotationTranslation such as RotationTranslation(30, 0.1),"
                f" got {self.threat!r}"
            )
        return (self.threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`Attack.check`; also refuses unknown methods and empty grids."""
        if self.method not in METHODS:
            raise ValueError(f"Spatial.method must be one of {METHODS}, got {self.method!r}")
        numbers = (*self.grid, self.draws)
        if len(self.grid) != 3 or not all(isinstance(n, int) and n >= 1 for n in numbers):
            raise ValueError(
                "Spatial.grid must be three positive ints and draws one, got "
                f"{self.grid!r} and {self.draws!r}"
            )
        super().check(x, y, classes, targets)
        if self.rel_step_size is not None and not np.all(np.asarray(self.rel_step_size) > 0):
            raise ValueError(
                f"Spatial.rel_step_size must be positive or None, got {self.rel_step_size}"
            )

    def start(self, record: Record) -> tuple[Array, Any]:
        """The image, or a random transform of it."""
        zero = jnp.broadcast_to(0.0 * record.threat.eps[:, None], (record.x0.shape[0], 3))
        if self.method != "gradient" or not self.random_start:
            return record.x0, _Place(zero, zero)
        first = record.threat.sample(_keys.fold(record.key, 0), zero)
        return _apply(record.threat, record.x0, first), _Place(first, zero)

    def _evaluate(
        self, logits_fn: LogitsFn, record: Record, x: Array, t: Array, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Any, Any, Any]:
        """As the parent's; without gradient where none is needed."""
        if self.method == "gradient":
            return super()._evaluate(logits_fn, record, x, t, gradient=gradient, sure=sure)
        loss, logits, _, forwards, _ = super()._evaluate(
            logits_fn, record, x, t, gradient=False, sure=sure
        )
        return loss, logits, () if gradient else None, forwards, 0

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """The next transform of the image."""
        record, place = state.record, state.inner
        threat, none = record.threat, jnp.zeros_like(place.now)
        if self.method == "grid":
            table = jnp.asarray(_grid(self.grid), none.dtype)
            share = table[jnp.minimum(state.t + 1, self.moves)]
            ahead = threat.project(expand(threat.eps, none) * share, none)
        elif self.method == "random":
            ahead = threat.sample(_keys.fold(record.key, state.t + 1), none)
        else:
            slope = threat.slope(record.x0, place.now, gradient)
            size = threat.step_size(record.x0, self.steps, self.rel_step_size)
            ahead = threat.project(place.now + expand(size, none) * threat.steepest(slope), none)
        return _apply(threat, record.x0, ahead), place._replace(now=ahead)

    def _advance(
        self, logits_fn: LogitsFn, state: State, judge: LogitsFn | None, *, gradient: bool
    ) -> State:
        """As the parent's; keeps the transform of the point that is kept."""
        new = super()._advance(logits_fn, state, judge, gradient=gradient)
        # Not to the bit: XLA may compute the image anew, and round differently, in another place.
        apart = jnp.abs(new.record.best - state.x) / (
            state.record.threat.hi - state.record.threat.lo
        )
        kept = jnp.all(apart < _SAME, tuple(range(1, state.x.ndim)))
        best = where(kept & ~state.record.done, state.inner.now, state.inner.best)
        return new._replace(inner=new.inner._replace(best=best))

    def result(self, state: State) -> AttackResult:
        """See :meth:`Attack.result`."""
        best = state.inner.best
        record = state.record._replace(best=best, x0=jnp.zeros_like(best))
        return super().result(state._replace(record=record))._replace(x=state.record.best)


# Compiled on its own, because a black box is stepped from Python.
@jax.jit
def _apply(threat: RotationTranslation, x0: Array, transform: Array) -> Array:
    return threat.apply(x0, transform)


def _grid(numbers: tuple[int, int, int]) -> np.ndarray:
    """(n, 3) points of the grid in [-1, 1], those of one number at 0; the origin first."""
    axes = [(2 * np.arange(n) - (n - 1)) / max(n - 1, 1) for n in numbers]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    others = points[np.any(points != 0, 1)]
    return np.concatenate([np.zeros((1, 3)), others])


__all__ = ["METHODS", "RotationTranslation", "Spatial"]
