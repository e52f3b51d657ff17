"""Residual networks of four and three stages: ResNet-18/50, PreActResNet-18, WideResNet, MoE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jrobust.models._networks import CIFAR10, IMAGENET, ResNet, _conv, _he, _norm, _normalised

Array = jax.Array


def _choice(name: str, value: str, among: tuple[str, ...]) -> None:
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, among))}, got {value!r}")


def _head(module: Any, x: Array, classes: int) -> Array:
    """Global average, kept as the activation ``pooled``, and the dense layer ``head``."""
    x = x.mean((1, 2))
    module.sow("intermediates", "pooled", x)
    return nn.Dense(classes, kernel_init=_he, name="head")(x).astype(jnp.float32)


class _Basic(nn.Module):
    """Convolutions with batch-norm, and around them the input or its projection."""

    width: int
    stride: int
    bottleneck: bool
    axis_name: str | None
    experts: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool, gate: Array | None = None) -> Array:
        def conv(width: int, kernel: int, stride: int, name: str) -> nn.Conv:
            size, padding = (kernel, kernel), kernel // 2
            return _conv(width, kernel_size=size, padding=padding, strides=stride, name=name)

        out, kernels = self.width, [3, 3]
        if self.bottleneck:
            out, kernels = 4 * self.width, [1, 3, 1]
        h = x
        for i, kernel in enumerate(kernels, 1):
            # In the bottleneck the 3x3 convolution strides, as in all released weights.
            stride = self.stride if i == (2 if self.bottleneck else 1) else 1
            width = out if i == len(kernels) else self.width
            h = conv(width * self.experts, kernel, stride, f"conv{i}")(h)
            if gate is not None:
                h = h.reshape(*h.shape[:-1], self.experts, width)
                h = jnp.einsum("bhwec,be->bhwc", h, gate)
            h = _norm(train, self.axis_name, name=f"norm{i}")(h)
            h = nn.relu(h) if i < len(kernels) else h
        if self.stride != 1 or x.shape[-1] != out:
            x = conv(out, 1, self.stride, "shortcut")(x)
            x = _norm(train, self.axis_name, name="shortcut_norm")(x)
        return nn.relu(h + x)


class ResNet18(nn.Module):
    """ResNet-18: (B, H, W, channels) -> (B, classes).

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016: four stages of
    blocks of two 3x3 convolutions with batch-norm, 64 to 512 channels, projections where the
    shape changes. With the stem for CIFAR (one 3x3 convolution of stride 1) 11,173,962 parameters
    at 10 classes, with that for ImageNet (7x7, stride 2, max pooling) 11,689,512 at 1,000.

    Attributes:
      classes: number of logits.
      stem: ``"cifar"`` or ``"imagenet"``.
      stages: blocks in each of the four stages; (3, 4, 6, 3) is ResNet-34.
      bottleneck: blocks of a 1x1, a 3x3 and a four times wider 1x1 convolution.
      width: channels of the first stage, doubled from stage to stage.
      mean, std: of the training pixels, one for each channel; default CIFAR-10. The normalisation
        is the first layer, so that a perturbation of the input is in pixel units.
      axis_name: mapped axis over which batch-norm averages its statistics.

    Raises ``ValueError`` for another stem, or inputs that are not images with the channels of
    ``mean``.
    """

    classes: int = 10
    stem: str = "cifar"
    stages: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 64
    mean: tuple[float, ...] = CIFAR10[0]
    std: tuple[float, ...] = CIFAR10[1]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        _choice("stem", self.stem, ("cifar", "imagenet"))
        x = _normalised(x, self.mean, self.std)
        if self.stem == "cifar":
            x = _conv(self.width, name="conv")(x)
        else:
            x = _conv(self.width, kernel_size=(7, 7), strides=2, padding=3, name="conv")(x)
        x = nn.relu(_norm(train, self.axis_name, name="norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i and not j else 1
                name = f"stage{i + 1}_block{j + 1}"
                width = self.width * 2**i
                block = _Basic(width, stride, self.bottleneck, self.axis_name, name=name)
                x = block(x, train)
        return _head(self, x, self.classes)


class ResNet50(ResNet18):
    """ResNet-50: (B, H, W, channels) -> (B, classes), by default for ImageNet.

    :class:`ResNet18` with 3, 4, 6 and 3 bottleneck blocks, the second convolution of each striding
    where it does ("v1.5"). 25,557,032 parameters at 1,000 classes; ``stages=(3, 4, 23, 3)`` is
    ResNet-101.
    """

    classes: int = 1000
    stem: str = "imagenet"
    stages: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]


class _PreAct(nn.Module):
    """Batch-norm, activation, convolution, twice; ``shortcut`` as in :class:`PreActResNet18`."""

    width: int
    stride: int
    activation: Callable[[Array], Array]
    padding: Any
    shortcut: str
    dropout: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        h = self.activation(_norm(train, self.axis_name, name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            size = (3, 3) if self.shortcut == "input3x3" else (1, 1)
            project = _conv(
                self.width,
                kernel_size=size,
                strides=self.stride,
                padding=self.padding if size == (3, 3) else 0,
                name="shortcut",
            )
            x = project(h if self.shortcut == "activated" else x)
        h = _conv(self.width, strides=self.stride, padding=self.padding, name="conv1")(h)
        h = self.activation(_norm(train, self.axis_name, name="norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return x + _conv(self.width, padding=self.padding, name="conv2")(h)


def _padding(layout: str) -> Any:
    _choice("padding", layout, ("symmetric", "same"))
    return 1 if layout == "symmetric" else "SAME"


class PreActResNet18(nn.Module):
    """PreActResNet-18 for CIFAR: (B, H, W, channels) -> (B, classes).

    He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual Networks", 2016: the blocks of
    :class:`ResNet18` with batch-norm and activation before each convolution. 11,171,146 parameters
    at 10 classes, 1,024 more with ``final_norm``.

    Released weights differ in the details:

    * Wong, Rice and Kolter (2020): ``shortcut="input"``;
    * Rice, Wong and Kolter (2020): ``final_norm=True``;
    * DeepMind (Rebuffi et al. 2021, Gowal et al. 2021): ``activation=nn.silu, padding="same",
      shortcut="input3x3", final_norm=True``.

    Attributes:
      classes: number of logits.
      stages: blocks in each of the four stages.
      width: channels of the first stage, doubled from stage to stage.
      activation: ``nn.relu`` or ``nn.silu``.
      shortcut: what is projected where the shape changes: the ``"activated"`` input by a 1x1
        convolution, the ``"input"`` itself by one, or by a 3x3 convolution, ``"input3x3"``.
      padding: of 3x3 convolutions with stride 2: ``"symmetric"``, 1 on each side, or ``"same"``, as
        TensorFlow pads: images of even size on the far side only.
      final_norm: batch-norm and activation before the pooling.
      mean, std: of the training pixels, one for each channel; default CIFAR-10.
      axis_name: mapped axis over which batch-norm averages its statistics.

    Raises ``ValueError`` for another shortcut or padding, or inputs that are not images with the
    channels of ``mean``.
    """

    classes: int = 10
    stages: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    activation: Callable[[Array], Array] = nn.relu
    shortcut: str = "activated"
    padding: str = "symmetric"
    final_norm: bool = False
    mean: tuple[float, ...] = CIFAR10[0]
    std: tuple[float, ...] = CIFAR10[1]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        _choice("shortcut", self.shortcut, ("activated", "input", "input3x3"))
        padding = _padding(self.padding)
        x = _conv(self.width, name="conv")(_normalised(x, self.mean, self.std))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                block = _PreAct(
                    self.width * 2**i,
                    2 if i and not j else 1,
                    self.activation,
                    padding,
                    self.shortcut,
                    0.0,
                    self.axis_name,
                    name=f"stage{i + 1}_block{j + 1}",
                )
                x = block(x, train)
        if self.final_norm:
            x = self.activation(_norm(train, self.axis_name, name="norm")(x))
        return _head(self, x, self.classes)


class WideResNet(nn.Module):
    """Wide residual network for CIFAR: (B, H, W, channels) -> (B, classes).

    Zagoruyko and Komodakis, "Wide Residual Networks", 2016: three stages of (depth - 4) / 6
    pre-activation blocks of 16, 32 and 64 times ``width`` channels. At 10 classes WRN-28-10 has
    36,479,194 parameters, WRN-34-10 46,160,474.

    DeepMind's (Gowal et al. 2020, Rebuffi et al. 2021) is ``activation=nn.silu, padding="same"``.

    Attributes:
      depth: 6 n + 4 for n >= 1: 16, 28, 34, 70.
      width: widening factor.
      classes: number of logits.
      activation: ``nn.relu`` or ``nn.silu``.
      padding: see :class:`PreActResNet18`.
      dropout: probability with which an input of the second convolution of a block is dropped.
      mean, std: of the training pixels, one for each channel; default CIFAR-10.
      axis_name: mapped axis over which batch-norm averages its statistics.

    Raises ``ValueError`` for another depth or padding, or inputs that are not images with the
    channels of ``mean``.
    """

    depth: int = 28
    width: int = 10
    classes: int = 10
    activation: Callable[[Array], Array] = nn.relu
    padding: str = "symmetric"
    dropout: float = 0.0
    mean: tuple[float, ...] = CIFAR10[0]
    std: tuple[float, ...] = CIFAR10[1]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        blocks, rest = divmod(self.depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6 n + 4 (16, 28, 34, 40, 70), got {self.depth}")
        padding = _padding(self.padding)
        x = _conv(16, name="conv")(_normalised(x, self.mean, self.std))
        for i in range(3):
            for j in range(blocks):
                block = _PreAct(
                    16 * 2**i * self.width,
                    2 if i and not j else 1,
                    self.activation,
                    padding,
                    "activated",
                    self.dropout,
                    self.axis_name,
                    name=f"stage{i + 1}_block{j + 1}",
                )
                x = block(x, train)
        x = self.activation(_norm(train, self.axis_name, name="norm")(x))
        return _head(self, x, self.classes)


class MoEResNet18(nn.Module):
    """ResNet-18 whose blocks choose among experts: (B, H, W, channels) -> (B, classes).

    Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", 2023: a
    router, here :class:`ResNet` of depth 20, gives each image one expert; every 3x3 convolution of
    the blocks holds one kernel for each expert and applies the chosen one. Stem, batch-norm,
    projections and head are shared. In the gradient the choice is the identity of the router's
    scores (straight through). All experts are computed and one is kept.

    The router's scores (B, experts) are the activation ``router``.

    Attributes:
      classes: number of logits.
      experts: number of experts.
      stages: blocks in each of the four stages.
      width: channels of the stem.
      ratio: channels of the blocks, relative to those of :class:`ResNet18`.
      router_depth: depth of the router, 6 n + 2.
      mean, std: of the training pixels, one for each channel; default CIFAR-10.
      axis_name: mapped axis over which batch-norm averages its statistics.
    """

    classes: int = 10
    experts: int = 2
    stages: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    ratio: float = 0.5
    router_depth: int = 20
    mean: tuple[float, ...] = CIFAR10[0]
    std: tuple[float, ...] = CIFAR10[1]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        router = ResNet(
            self.router_depth,
            self.experts,
            mean=self.mean,
            std=self.std,
            axis_name=self.axis_name,
            name="router",
        )
        scores = router(x, train)
        chosen = jax.nn.one_hot(scores.argmax(-1), self.experts, dtype=scores.dtype)
        gate = (chosen + scores - jax.lax.stop_gradient(scores)).astype(x.dtype)
        x = _conv(self.width, name="conv")(_normalised(x, self.mean, self.std))
        x = nn.relu(_norm(train, self.axis_name, name="norm")(x))
        for i, blocks in enumerate(self.stages):
            width = int(self.ratio * self.width * 2**i)
            for j in range(blocks):
                stride = 2 if i and not j else 1
                name = f"stage{i + 1}_block{j + 1}"
                block = _Basic(width, stride, False, self.axis_name, self.experts, name=name)
                x = block(x, train, gate)
        return _head(self, x, self.classes)
