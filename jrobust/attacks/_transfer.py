"""PGD whose gradient is made to hold on other models too: the transfer family of MI-FGSM."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks._base import LogitsFn, Record, State, _passes
from jrobust.attacks._minimal import finite
from jrobust.attacks._pgd import PGD
from jrobust.threat import L0, Threat, expand

Array = jax.Array

# The draws of copies and neighbours fold the step in above this offset, where neither a step
# counter nor the draws of a randomised model reach.
_COPIES = 3 << 28


class Transform(abc.ABC):
    """What is done to inputs before the model sees them, in the search only.

    Subclasses are ``@algorithm`` dataclasses, for :class:`TransferPGD`.
    """

    random: ClassVar[bool] = True  # whether the copies depend on the keys

    @abc.abstractmethod
    def __call__(self, keys: Array, x: Array) -> Array:
        """Copies (m, B, ...) of ``x`` (B, ...), differentiable; row b draws from ``keys[b]``."""

    def check(self, x: Array) -> None:  # noqa: B027
        """Raise ``ValueError`` where a setting or the shape of ``x`` makes no sense."""


@algorithm
class ScaledCopies(Transform):
    """``x``, ``x / 2``, ``x / 4``, ...: the scale-invariant method (Lin et al. 2020).

    Towards zero in the units of x: black in images in [0, 1]. The released code has images in
    [-1, 1], and fades them to grey.

    Args:
        copies: how many, the first of which is ``x`` itself.
    """

    copies: int = static(default=5)
    random: ClassVar[bool] = False

    def __call__(self, keys: Array, x: Array) -> Array:
        """See :class:`Transform`."""
        return jnp.stack([x / 2**i for i in range(self.copies)])

    def check(self, x: Array) -> None:
        """Raises ``ValueError`` unless ``copies`` is a positive int."""
        if not isinstance(self.copies, int) or self.copies < 1:
            raise ValueError(f"ScaledCopies.copies must be a positive int, got {self.copies!r}")


@algorithm
class DiverseInput(Transform):
    """The image shrunk at random in a frame of zeros: input diversity (Xie et al. 2019).

    With ``probability`` the height becomes a number of pixels drawn from ``[rate * height,
    height)``, the width follows, by bilinear interpolation, and the image is put anywhere in a
    black frame of the size it had. The released code enlarges 299 pixels to up to 330 in a frame of
    330, a shape that networks of fixed shape do not take: the same picture, seen from further away.
    It draws once for the whole batch; here every example has its own draw.

    Args:
        probability: of being changed at all, in [0, 1].
        rate: the smallest side in multiples of the whole, in (0, 1).
    """

    probability: Any = 0.5
    rate: Any = 0.9

    def __call__(self, keys: Array, x: Array) -> Array:
        """See :class:`Transform`. Raises ``ValueError`` unless ``x`` are images."""
        _check_images("DiverseInput", x)
        return jax.vmap(self._framed)(keys, x)[None]

    def _framed(self, key: Array, image: Array) -> Array:
        height, width = image.shape[:2]
        side, down, right, coin = jax.random.uniform(key, (4,), image.dtype)
        # A hair more, so that 0.9 times 20 is 18 in float32 too.
        least = jnp.clip(jnp.floor(self.rate * height + 1e-3), 1, height - 1)
        size = least + jnp.floor(side * (height - least))
        scale = size / height
        top = jnp.floor(down * (height - size + 1))
        left = jnp.floor(right * (jnp.floor(width - scale * width + 1e-3) + 1))
        framed = _along(_shrink(height, scale, top), _shrink(width, scale, left), image)
        return jnp.where(coin < self.probability, framed, image)

    def check(self, x: Array) -> None:
        """Raises ``ValueError`` unless ``x`` are images, for what is no probability or rate."""
        _check_images("DiverseInput", x)
        probability, rate = np.asarray(self.probability), np.asarray(self.rate)
        if not np.all((probability >= 0) & (probability <= 1)):
            raise ValueError(f"DiverseInput.probability must be in [0, 1], got {self.probability}")
        if not np.all((rate > 0) & (rate < 1)):
            raise ValueError(f"DiverseInput.rate must be in (0, 1), got {self.rate}")


def _shrink(n: int, scale: Array, first: Array) -> Array:
    """(n, n): ``n`` pixels interpolated to ``scale * n`` from the ``first`` on, zeros around."""
    place = (jnp.arange(n) + 0.5 - first) / scale - 0.5
    inside = (place >= -0.5) & (place <= n - 0.5)
    apart = jnp.abs(jnp.clip(place, 0, n - 1)[:, None] - jnp.arange(n)[None])
    return jnp.where(inside[:, None], jnp.maximum(1 - apart, 0), 0.0)


def _along(rows: Array, columns: Array, image: Array) -> Array:
    """The image (H, W, ...) with ``rows`` (H, H) and ``columns`` (W, W) applied to its sides."""
    return jnp.einsum("hi,wj,ij...->hw...", rows, columns, image, precision="highest")


def _check_images(name: str, x: Array) -> None:
    if x.ndim not in (3, 4) or min(x.shape[1:3]) < 2:
        raise ValueError(
            f"{name} needs images (B, H, W, C) or (B, H, W) of at least 2 pixels a side, got "
            f"inputs of shape {x.shape}"
        )


def gaussian_kernel(size: int = 15, reach: float = 3.0) -> np.ndarray:
    """A Gaussian in ``size`` points that sum to one, for ``TransferPGD.kernel``: (size,) float32.

    Args:
        size: number of pixels, odd. For images of 299 pixels, 15 (Dong et al. 2019), or 7 in the
            released code of Lin et al. (2020) and Wang & He (2021), which combine it with theirs.
        reach: the outermost points in standard deviations; 3 in all of the released code.
    """
    values = np.exp(-0.5 * np.linspace(-reach, reach, size) ** 2)
    return (values / values.sum()).astype(np.float32)


@algorithm
class TransferPGD(PGD):
    """Iterated steps along a gradient that also holds nearby and on other models.

    As it stands MI-FGSM (Dong et al. 2018), whose last point is returned. Each option adds to it,
    in any combination; the step goes along ``m_{t+1}``:

    * ``g_t``, the mean gradient over the copies that ``transforms`` make of a point (SI, Lin et al.
      2020; DI, Xie et al. 2019), at ``x_t`` or with ``nesterov`` at the point ahead of it;
    * plus ``v_t`` with ``neighbours``, which is by how much the mean gradient around ``x_{t-1}``
      differed from ``g_{t-1}`` (variance tuning, Wang & He 2021, whose code it follows);
    * smoothed over the image by ``kernel`` (TI, Dong et al. 2019);
    * over its L1 norm, added to ``momentum * m_t``. The norm is that of each example by itself.

    What counts is measured at ``x_t`` alone: success, loss and the point that is returned never
    come from a copy, a neighbour or a point ahead, which may lie outside of the ball and the box.
    A step costs a forward pass of ``x_t`` and its gradient; with ``transforms`` or ``nesterov`` a
    forward pass of ``x_t`` and, elsewhere, one of each for each copy. Every neighbour costs one of
    each for each copy. See the functions named after the published attacks.

    Args:
        threat: the ball and box to stay in. Neighbours are not defined in L0.
        steps: moves, from the input unless ``random_start``.
        step_size, rel_step_size: length of a step as in :class:`PGD`, but ``eps / steps`` when
            neither is given.
        random_start, gaussian_start: as in :class:`PGD`.
        momentum: as in :class:`PGD`.
        loss: what to ascend, as in :class:`PGD`.
        keep: which point to return, as in :class:`PGD`. Points that go on after they fool the model
            at hand fool others more often.
        estimator: refused.
        optimizer: as in :class:`PGD`, with ``momentum=None``.
        nesterov: whether gradients are taken at ``x_t + momentum * step_size * m_t``. There ``m_t``
            is scaled so that one gradient is as long as a step: in Linf over the mean of its
            absolute values, as in the released code, where the L1 norm of the paper's formula would
            look ahead by almost nothing. In L2 over its L2 norm.
        neighbours: number of points around ``x_t`` that ``v_{t+1}`` is measured at; 0 without.
        beta: radius around ``x_t`` to draw them from, uniformly, in multiples of ``eps``.
        transforms: a tuple of :class:`Transform`, applied one after another; numbers of copies
            multiply.
        kernel: weights (k,), k odd, of the smoothing along either axis of the image, with zeros
            around it; :func:`gaussian_kernel` makes some.
    """

    steps: int = static(default=10)
    random_start: bool = static(default=False)
    momentum: Any = 1.0
    keep: str = static(default="last")
    nesterov: bool = static(default=False)
    neighbours: int = static(default=0)
    beta: Any = 1.5
    transforms: tuple[Transform, ...] = ()
    kernel: Any = None

    @property
    def random(self) -> bool:
        """Whether the start, a neighbour or a copy is drawn."""
        drawn = self.neighbours > 0 or any(transform.random for transform in self.transforms)
        return super().random or drawn

    @property
    def _relative(self) -> Any:
        return 1.0 / self.steps if self.rel_step_size is None else self.rel_step_size

    def threats(self) -> tuple[Threat, ...]:
        """See :meth:`GradientAttack.threats`; raises ``TypeError`` for neighbours in L0."""
        (threat,) = super().threats()
        if self.neighbours and isinstance(threat, L0):
            raise TypeError(f"neighbours are drawn by distance, which L0 has not: got {threat!r}")
        return (threat,)

    def check(self, x: Array, y: Array, classes: int, targets: Array | None = None) -> None:
        """See :meth:`PGD.check`; also refuses options that do not fit each other or the inputs."""
        super().check(x, y, classes, targets)
        if self.estimator is not None:
            raise ValueError("TransferPGD needs gradients: estimator= goes with PGD")
        if self.nesterov and self.momentum is None:
            raise ValueError("TransferPGD.nesterov looks ahead along the momentum, which is None")
        if not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(
                f"TransferPGD.neighbours must be a number of points, got {self.neighbours!r}"
            )
        if not bool(np.all(np.asarray(self.beta) >= 0)):
            raise ValueError(f"TransferPGD.beta must not be negative, got {self.beta}")
        if not isinstance(self.transforms, tuple):
            raise TypeError(f"TransferPGD.transforms must be a tuple, got {self.transforms!r}")
        for transform in self.transforms:
            if not isinstance(transform, Transform):
                raise TypeError(f"TransferPGD.transforms must hold Transforms, got {transform!r}")
            transform.check(x)
        if self.kernel is not None:
            _check_images("TransferPGD.kernel", x)
            if np.ndim(self.kernel) != 1 or len(self.kernel) % 2 == 0:
                raise ValueError(
                    "TransferPGD.kernel must be an odd number of weights, got shape "
                    f"{np.shape(self.kernel)}"
                )

    def start(self, record: Record) -> tuple[Array, Any]:
        """See :meth:`PGD.start`; carries ``v_t`` too."""
        x, carried = super().start(record)
        return x, (carried, jnp.zeros_like(x) if self.neighbours else None)

    def _look(
        self, logits_fn: LogitsFn, state: State, *, gradient: bool, sure: bool
    ) -> tuple[Array, Array, Array | None, int, int]:
        """Loss and logits at the point; the gradient to follow, from wherever it is taken.

        With neighbours (B, 2, ...): ``g_t``, and the mean of the gradients around the point.
        """
        record, t = state.record, state.t
        if not gradient:
            return self._evaluate(logits_fn, record, state.x, t, gradient=False, sure=sure)
        keys = _keys.fold(record.key, t + _COPIES)
        slope = functools.partial(self._slope, logits_fn, state)
        elsewhere = self.nesterov or bool(self.transforms)
        # Before the point itself, so that what has no gradient is refused before it is asked.
        there = slope(self._ahead(state), _keys.fold(keys, 0)) if elsewhere else None
        loss, logits, here, forwards, backwards = self._evaluate(
            logits_fn, record, state.x, t, gradient=not elsewhere, sure=sure
        )
        found: Any = there if elsewhere else here
        if self.neighbours:
            found = jnp.stack([found, self._around(slope, state, keys)], axis=1)
        copies = jax.eval_shape(self._copies, keys, state.x).shape[0]
        more = _passes(logits_fn)[0] * copies * (elsewhere + self.neighbours)
        return loss, logits, found, forwards + more, backwards + more

    def _around(self, slope: Callable[[Array, Array], Array], state: State, keys: Array) -> Array:
        """The mean of ``slope(point, keys)`` over the neighbours of ``state.x``."""
        threat = state.record.threat
        ball = dataclasses.replace(threat, eps=self.beta * threat.eps, lo=-jnp.inf, hi=jnp.inf)

        def add(i: Array, total: Array) -> Array:
            place, own = (_keys.fold(_keys.fold(keys, i + 1), j) for j in (0, 1))
            return total + slope(ball.sample(place, state.x), own)

        return drive.loop(self.neighbours, add, jnp.zeros_like(state.x)) / self.neighbours

    def _ahead(self, state: State) -> Array:
        """The point at which gradients are taken."""
        if not self.nesterov:
            return state.x
        (size, velocity), _ = state.inner
        unit = jnp.abs(state.record.threat.steepest(velocity))
        length = jnp.sum(unit, tuple(range(1, unit.ndim)), keepdims=True)
        return state.x + expand(self.momentum * size, velocity) * length * velocity

    def _copies(self, keys: Array, x: Array) -> Array:
        """(m, B, ...): all transforms, one after another, of ``x`` (B, ...)."""
        copies = x[None]
        for place, transform in enumerate(self.transforms):
            own = _keys.fold(keys, place)
            made = jax.vmap(lambda i, copy, own=own, to=transform: to(_keys.fold(own, i), copy))(
                jnp.arange(len(copies)), copies
            )
            copies = made.reshape(-1, *x.shape)
        return copies

    def _slope(self, logits_fn: LogitsFn, state: State, x: Array, keys: Array) -> Array:
        """The mean gradient over the copies of ``x`` (B, ...), one copy at a time."""
        copies, back = jax.vjp(functools.partial(self._copies, keys), x)

        def gradient(x: Array) -> Any:
            return self._evaluate(logits_fn, state.record, x, state.t, gradient=True, sure=False)[2]

        each = gradient(copies[0])[None] if len(copies) == 1 else jax.lax.map(gradient, copies)
        return back(each)[0] / len(copies)

    def _smooth(self, gradient: Array) -> Array:
        """The gradient (B, H, W, ...) convolved with the kernel along height and width."""
        weights = jnp.asarray(self.kernel, gradient.dtype)
        half = len(weights) // 2

        def banded(n: int) -> Array:
            tap = np.arange(n)[:, None] - np.arange(n) + half
            inside = (tap >= 0) & (tap < len(weights))
            return jnp.where(inside, weights[np.clip(tap, 0, len(weights) - 1)], 0.0)

        rows, columns = map(banded, gradient.shape[1:3])
        return jax.vmap(lambda image: _along(rows, columns, image))(gradient)

    def move(self, state: State, loss: Array, gradient: Array) -> tuple[Array, Any]:
        """See :meth:`PGD.move`; the gradient is tuned and smoothed first."""
        carried, variance = state.inner
        slope = finite(gradient)
        if variance is not None:
            here, around = slope[:, 0], slope[:, 1]
            slope, variance = here + variance, around - here
        if self.kernel is not None:
            slope = self._smooth(slope)
        x, carried = super().move(state._replace(inner=carried), loss, slope)
        return x, (carried, variance)


def NIFGSM(threat: Threat, **settings: Any) -> TransferPGD:
    """MI-FGSM with gradients from Nesterov's point ahead (Lin et al. 2020).

    Ten steps of ``eps / 10`` with decay 1. ``steps`` gradients and ``2 steps + 1`` forward passes.

    Args:
        threat: the ball and box to stay in.
        settings: other fields of :class:`TransferPGD`.
    """
    return TransferPGD(threat, nesterov=True, **settings)


def SINIFGSM(threat: Threat, *, copies: int = 5, **settings: Any) -> TransferPGD:
    """NI-FGSM with the mean gradient over scaled copies (Lin et al. 2020).

    ``copies * steps`` gradients and ``(copies + 1) steps + 1`` forward passes.

    Args:
        threat: the ball and box to stay in.
        copies: number of :class:`ScaledCopies`.
        settings: other fields of :class:`TransferPGD`, such as more ``transforms`` to follow.
    """
    transforms = (ScaledCopies(copies), *settings.pop("transforms", ()))
    return TransferPGD(threat, nesterov=True, transforms=transforms, **settings)


def DIFGSM(
    threat: Threat, *, probability: Any = 0.5, rate: Any = 0.9, **settings: Any
) -> TransferPGD:
    """MI-FGSM with gradients at a :class:`DiverseInput` (M-DI2-FGSM, Xie et al. 2019).

    ``steps`` gradients and ``2 steps + 1`` forward passes. ``momentum=None`` makes it DI2-FGSM.
    Ten steps of ``eps / 10`` as the later papers compare it; its own takes steps of one grey level,
    20 of them at 16 / 255.

    Args:
        threat: the ball and box to stay in.
        probability, rate: as in :class:`DiverseInput`.
        settings: other fields of :class:`TransferPGD`, such as more ``transforms`` to come before.
    """
    transforms = (*settings.pop("transforms", ()), DiverseInput(probability, rate))
    return TransferPGD(threat, transforms=transforms, **settings)


def TIFGSM(threat: Threat, *, kernel: Any = None, **settings: Any) -> TransferPGD:
    """MI-FGSM with gradients smoothed over the image (TI-MI-FGSM, Dong et al. 2019).

    ``steps`` gradients and ``steps + 1`` forward passes. What torchattacks calls so diversifies the
    inputs too, and has no momentum: ``transforms=(DiverseInput(),), momentum=None``.

    Args:
        threat: the ball and box to stay in.
        kernel: as in :class:`TransferPGD`; ``gaussian_kernel()``, of 15 pixels, when None.
        settings: other fields of :class:`TransferPGD`.
    """
    return TransferPGD(threat, kernel=gaussian_kernel() if kernel is None else kernel, **settings)


def VMIFGSM(
    threat: Threat, *, neighbours: int = 20, beta: Any = 1.5, **settings: Any
) -> TransferPGD:
    """MI-FGSM with variance tuning (Wang & He 2021).

    ``(neighbours + 1) steps`` gradients and one forward pass more.

    Args:
        threat: the ball and box to stay in.
        neighbours, beta: as in :class:`TransferPGD`.
        settings: its other fields.
    """
    return TransferPGD(threat, neighbours=neighbours, beta=beta, **settings)


def VNIFGSM(
    threat: Threat, *, neighbours: int = 20, beta: Any = 1.5, **settings: Any
) -> TransferPGD:
    """NI-FGSM with variance tuning (Wang & He 2021).

    ``(neighbours + 1) steps`` gradients and ``(neighbours + 2) steps + 1`` forward passes. The
    neighbours are those of the point, the gradient they are compared with that of the point ahead.

    Args:
        threat: the ball and box to stay in.
        neighbours, beta: as in :class:`TransferPGD`.
        settings: its other fields.
    """
    return TransferPGD(threat, nesterov=True, neighbours=neighbours, beta=beta, **settings)
