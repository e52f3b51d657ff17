"""Augmentation on the device: pure, keyed per example, and the objective that trains on it."""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static

Array = jax.Array

# Objectives branch the key of a step by small indices; see jrobust.keys.
_AUGMENT = 1 << 29


class Augmentation(Protocol):
    """What changes the examples of a batch at random. An ``@algorithm`` dataclass with this call.

    It may have ``check(x, y, classes)`` too, which reads values and raises where a setting or an
    input makes no sense: ``loops.fit`` calls it through :class:`Augmented` before any compute.
    """

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """The augmented ``(x, y)``; pure and traceable.

        Args:
            keys: (B,) typed keys, one for each example, for instance
                ``jrobust.keys.fold(jrobust.keys.examples(key, ids), step)``. What an example draws
                depends on its key alone.
            x: (B, ...) inputs.
            y: (B,) integer labels, or (B, C) class probabilities.
            mask: (B,) bool, False for rows that only fill the batch: no other row is mixed with
                one of them. All rows count when None.
        """


def _images(name: str, x: Array) -> tuple[int, int]:
    """Height and width."""
    if x.ndim != 4:
        raise ValueError(f"{name} takes images (B, H, W, channels), got x of shape {x.shape}")
    return x.shape[1], x.shape[2]


def _floats(name: str, x: Array) -> None:
    """Raise ``TypeError`` for integers, to which shares and colours would be rounded."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating-point inputs, got {x.dtype}: convert them first")


def _coin(keys: Array, probability: Any) -> Array:
    return jax.vmap(lambda k: jax.random.bernoulli(k, probability))(keys)


def _rows(values: Array, like: Array) -> Array:
    """(B,) reshaped to broadcast against ``like`` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _in_units(name: str, value: Any, low: float, high: float) -> None:
    if jnp.ndim(value) != 0 or not low <= float(value) <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value}")


@algorithm
class PadCrop:
    """A crop of the image's own size at a uniform place of the padded image.

    The augmentation of CIFAR in He, Zhang, Ren and Sun, "Deep Residual Learning for Image
    Recognition", 2016, section 4.2.

    Args:
        padding: pixels added on each side, >= 0.
        mode: what they hold: ``"constant"`` (zeros), ``"reflect"`` or ``"edge"``, as in
            ``numpy.pad``.
    """

    padding: int = static(default=4)
    mode: str = static(default="constant")

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise ``ValueError`` where the padding is negative or unknown, or ``x`` no images."""
        _images("PadCrop", x)
        if self.padding < 0 or self.mode not in ("constant", "reflect", "edge"):
            raise ValueError(
                "PadCrop needs padding >= 0 and a mode out of constant, reflect and edge, got "
                f"padding={self.padding}, mode={self.mode!r}"
            )

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Augmentation`."""
        _images("PadCrop", x)
        p = self.padding
        padded = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)), mode=self.mode)

        def crop(key: Array, image: Array) -> Array:
            row, column = jax.random.randint(key, (2,), 0, 2 * p + 1)
            return jax.lax.dynamic_slice(image, (row, column, 0), x.shape[1:])

        return jax.vmap(crop)(keys, padded), y


@algorithm
class Flip:
    """A mirror image, left and right exchanged, with ``probability``.

    Args:
        probability: in [0, 1]; 0.5 in He et al. 2016, section 4.2.
    """

    probability: Any = 0.5

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise ``ValueError`` unless ``x`` are images and ``probability`` is one."""
        _images("Flip", x)
        _in_units("Flip.probability", self.probability, 0, 1)

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Augmentation`."""
        _images("Flip", x)
        return jnp.where(_rows(_coin(keys, self.probability), x), x[:, :, ::-1], x), y


def _box(centre: Array, size: Array, length: int) -> Array:
    """(B, length) bool: ``size`` (B,) places about ``centre`` (B,), as far as they exist."""
    start = centre - size // 2
    place = jnp.arange(length)[None]
    return (place >= start[:, None]) & (place < (start + size)[:, None])


def _centres(keys: Array, height: int, width: int) -> tuple[Array, Array]:
    """Uniform pixels, (B,) rows and columns."""
    bounds = jnp.array([height, width])
    both = jax.vmap(lambda k: jax.random.randint(k, (2,), jnp.zeros_like(bounds), bounds))(keys)
    return both[:, 0], both[:, 1]


@algorithm
class Cutout:
    """Cutout: a square about a uniform pixel, less what leaves the image, is painted over.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    2017. There the square is zero after normalisation, so it has the mean colour of the data.

    Args:
        size: side of the square in pixels, > 0; the paper's 16 for CIFAR-10 and 8 for CIFAR-100.
        fill: the colour in the units of the input, one number or one for each channel, for
            instance ``(0.4914, 0.4822, 0.4465)``, the mean of CIFAR-10.
    """

    size: int = static(default=16)
    fill: Any = 0.5

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise ``ValueError`` unless ``x`` are images and the settings suit them."""
        _images("Cutout", x)
        if self.size < 1:
            raise ValueError(f"Cutout.size must be >= 1, got {self.size}")
        if jnp.shape(jnp.asarray(self.fill)) not in ((), (x.shape[-1],)):
            raise ValueError(
                f"Cutout.fill must be one number or one for each of {x.shape[-1]} channels, got "
                f"{self.fill}"
            )

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Augmentation`."""
        height, width = _images("Cutout", x)
        _floats("Cutout", x)
        row, column = _centres(keys, height, width)
        size = jnp.full_like(row, self.size)
        inside = _box(row, size, height)[:, :, None] & _box(column, size, width)[:, None, :]
        fill = jnp.broadcast_to(jnp.asarray(self.fill, x.dtype), x.shape[-1:])
        return jnp.where(inside[..., None], fill.reshape(1, 1, 1, -1), x), y


def _partners(keys: Array, mask: Array | None) -> Array:
    """(B,) positions: the rows that count in one random cycle; each other row its own partner.

    The cycle runs in the order of a number that each row draws from its key, so that it depends
    on the rows and not on their places. Its own partner is a row only where no other counts.
    """
    count = jnp.ones(keys.shape, bool) if mask is None else mask
    order = jnp.lexsort((jax.vmap(jax.random.bits)(keys), ~count))
    rank = jnp.arange(keys.shape[0])
    total = jnp.sum(count)
    following = jnp.where(rank + 1 < total, rank + 1, jnp.where(rank < total, 0, rank))
    return order[following][jnp.argsort(order)]


def _soft(name: str, y: Array, classes: int, dtype: Any) -> Array:
    """(B, classes) probabilities."""
    if y.ndim == 1:
        return jax.nn.one_hot(y, classes, dtype=dtype)
    if y.shape[1] != classes:
        raise ValueError(f"{name} is for {classes} classes, got soft labels of shape {y.shape}")
    return y


def _check_mixing(self: Any, classes: int) -> None:
    name = type(self).__name__
    if self.classes != classes:
        raise ValueError(
            f"{name} makes labels of {self.classes} classes, the model has {classes}: set "
            f"{name}(classes={classes})"
        )
    if jnp.ndim(self.alpha) != 0 or not 0 < float(self.alpha) < math.inf:
        raise ValueError(f"{name}.alpha must be a positive number, got {self.alpha}")
    _in_units(f"{name}.probability", self.probability, 0, 1)


@algorithm
class _Mixing:
    """The settings and draws that mixup and CutMix share."""

    classes: int = static()
    alpha: Any = 1.0
    probability: Any = 1.0

    def _draw(self, keys: Array, mask: Array | None) -> tuple[Array, Array]:
        """Partners (B,) and the own share (B,) in [0, 1], 1 where the coin says so."""
        alpha = jnp.asarray(self.alpha, jnp.float32)
        # Beta as a ratio of two gammas: one sampler to compile, where jax.random.beta has two.
        gammas = jax.vmap(lambda k: jax.random.loggamma(k, alpha, (2,)))(_keys.fold(keys, 1))
        share = jax.nn.sigmoid(gammas[:, 0] - gammas[:, 1])
        share = jnp.where(_coin(_keys.fold(keys, 2), self.probability), share, 1.0)
        return _partners(_keys.fold(keys, 0), mask), share

    def _labels(self, y: Array, partner: Array, share: Array) -> Array:
        y = _soft(type(self).__name__, y, self.classes, share.dtype)
        return share[:, None] * y + (1 - share[:, None]) * y[partner]


@algorithm
class Mixup(_Mixing):
    """Mixup: ``share x + (1 - share) x'``, and the labels alike, share ~ Beta(alpha, alpha).

    Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018. Each
    pair draws its own share. The partner x' is the next of the batch in a random cycle: every
    row is mixed once with one other, whatever the order of the batch. (Where each device sees
    its part of a batch only, or a batch is cut into parts, partners are of the same part.)

    Args:
        classes: of the soft labels (B, classes) that come out.
        alpha: > 0; 1 for CIFAR-10 and 0.2 for ImageNet in the paper.
        probability: with which a row is mixed at all.
    """

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise ``ValueError`` where a setting is out of range or for other classes."""
        _check_mixing(self, classes)

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Augmentation`."""
        _floats("Mixup", x)
        partner, share = self._draw(keys, mask)
        own = _rows(share.astype(x.dtype), x)
        return own * x + (1 - own) * x[partner], self._labels(y, partner, share)


@algorithm
class CutMix(_Mixing):
    """CutMix: a rectangle of another image is pasted in; labels are mixed by area.

    Yun, Han, Oh, Chun, Choe and Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers
    with Localizable Features", 2019. The rectangle has the image's proportions, an area of
    1 - share of it, share ~ Beta(alpha, alpha), and a uniform pixel as its middle; what leaves
    the image is cut off, and the labels follow the pixels that are left. Partners as in
    :class:`Mixup`.

    Args:
        classes: of the soft labels (B, classes) that come out.
        alpha: > 0; 1 in the paper.
        probability: with which a row is mixed at all; 0.5 for CIFAR in the paper.
    """

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise ``ValueError`` where a setting is out of range or ``x`` are no images."""
        _images("CutMix", x)
        _check_mixing(self, classes)

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Augmentation`."""
        height, width = _images("CutMix", x)
        partner, share = self._draw(keys, mask)
        side = jnp.sqrt(1 - share)
        row, column = _centres(_keys.fold(keys, 3), height, width)
        rows = _box(row, (height * side).astype(row.dtype), height)
        columns = _box(column, (width * side).astype(row.dtype), width)
        inside = rows[:, :, None] & columns[:, None, :]
        pasted = jnp.sum(rows, 1) * jnp.sum(columns, 1)
        mixed = jnp.where(inside[..., None], x[partner], x)
        return mixed, self._labels(y, partner, 1 - pasted / (height * width))


@algorithm
class _Chain:
    """See :func:`chain`."""

    members: tuple[Augmentation, ...]

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise what a member's ``check`` raises."""
        for member in self.members:
            if hasattr(member, "check"):
                member.check(x, y, classes)

    def __call__(
        self, keys: Array, x: Array, y: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Augmentation`."""
        for i, member in enumerate(self.members):
            x, y = member(_keys.fold(keys, i), x, y, mask)
        return x, y


def chain(*augmentations: Augmentation) -> Augmentation:
    """The augmentations one after the other, each with keys of its own.

    Raises ``TypeError`` where one of them is not an instance of an augmentation.
    """
    for member in augmentations:
        if isinstance(member, type) or not callable(member):
            raise TypeError(f"expected augmentations such as Flip(), got {member!r}")
    return _Chain(augmentations)


@algorithm
class Augmented:
    """A training objective on augmented examples, augmented anew in every step, on the device.

    ``training.step(Augmented(Adversarial(attack), chain(PadCrop(), Flip())), tx)``; in
    ``loops.fit`` alike. An example's augmentation depends on the key of the step and its id.

    Args:
        objective: a ``training.Objective``; it sees the augmented batch, with soft labels after
            :class:`Mixup` and :class:`CutMix`.
        augmentation: what to apply.
    """

    objective: Any
    augmentation: Any

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting of either part makes no sense for ``x``."""
        for part in (self.augmentation, self.objective):
            if isinstance(part, type) or not callable(part):
                raise TypeError(f"Augmented takes instances such as Flip(), got {part!r}")
            if hasattr(part, "check"):
                part.check(x, y, classes)

    def __call__(
        self, key: Array, network: Any, params: Any, extra: Any, batch: Any
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        """See ``training.Objective``; the metrics are those of ``objective``."""
        keys = _keys.examples(jax.random.fold_in(key, _AUGMENT), batch.id)
        x, y = self.augmentation(keys, batch.x, batch.y, batch.mask)
        return self.objective(key, network, params, extra, batch._replace(x=x, y=y))
