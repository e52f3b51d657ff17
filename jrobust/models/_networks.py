"""Reference networks (Flax Linen). Channels last, inputs in pixel units, logits float32.

Here the small ones and what all share; :mod:`_resnets`, :mod:`_vit` and :mod:`_restoration` hold
the families.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


_he = nn.initializers.he_normal()

# Padding 1 on both sides also at stride 2, as in released weights: "SAME" would pad even sizes on
# one side only.
_conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=_he)


def _norm(train: bool, axis_name: str | None, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, axis_name=axis_name, name=name)


def _images(x: Array) -> Array:
    if x.ndim != 4:
        raise ValueError(f"images must have shape (B, H, W, channels), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):  # to which mean and deviation would be rounded
        raise TypeError(f"images must be floats in pixel units, got {x.dtype}: convert them first")
    return x


# Mean and standard deviation of the training pixels.
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _normalised(x: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """``(x - mean) / std`` by channel, the first layer of the networks for colour images."""
    x = _images(x)
    if not x.shape[-1] == len(mean) == len(std):
        raise ValueError(
            f"inputs {x.shape} have {x.shape[-1]} channels, but mean has {len(mean)} and "
            f"std {len(std)} entries; set mean= and std= for these images"
        )
    shape = (1, 1, 1, -1)
    return (x - jnp.asarray(mean, x.dtype).reshape(shape)) / jnp.asarray(std, x.dtype).reshape(
        shape
    )


class MLP(nn.Module):
    """Dense layers with ReLU on the flattened input: (B, ...) -> (B, classes).

    Attributes:
      features: widths of the hidden layers ``dense1``, ``dense2``, ...; empty for a linear model.
      classes: number of logits.
    """

    features: tuple[int, ...] = (128, 128)
    classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features, 1):
            x = nn.relu(nn.Dense(width, name=f"dense{i}")(x))
        return nn.Dense(self.classes, name="head")(x).astype(jnp.float32)


class SmallCNN(nn.Module):
    """A small convolutional network for small images: (B, H, W, channels) -> (B, classes).

    A 3x3 convolution with ReLU for each width, all but the first with stride 2, a hidden dense
    layer with ReLU, and the head. For 8x8x1 images 38,282 parameters.

    Attributes:
      widths: channels of ``conv1``, ``conv2``, ...
      classes: number of logits.
      hidden: width of the dense layer ``dense``.
      norm: batch-norm after each convolution.
      dropout: probability with which a hidden unit is dropped, before the head.
      axis_name: mapped axis over which batch-norm averages its statistics.
    """

    widths: tuple[int, ...] = (16, 32)
    classes: int = 10
    hidden: int = 64
    norm: bool = False
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = _images(x)
        for i, width in enumerate(self.widths, 1):
            conv = nn.Conv(
                width,
                (3, 3),
                strides=1 if i == 1 else 2,
                use_bias=not self.norm,
                kernel_init=_he,
                name=f"conv{i}",
            )
            x = conv(x)
            if self.norm:
                x = _norm(train, self.axis_name, name=f"norm{i}")(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=_he, name="dense")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="head")(x).astype(jnp.float32)


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling: (B, H, W, channels) -> (B, classes).

    LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    1998, in today's form: 5x5 convolutions to 6 and 16 channels, each with ReLU and 2x2 max
    pooling, dense layers of 120 and 84 with ReLU, the head. 61,706 parameters on 28x28x1 images,
    and 62,006 on 32x32x3 with ``padding=0``.

    Attributes:
      classes: number of logits.
      padding: of the first convolution on each side: 2 makes 28x28 what 32x32 would be.
    """

    classes: int = 10
    padding: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _images(x)
        for i, (width, padding) in enumerate(((6, self.padding), (16, 0)), 1):
            conv = nn.Conv(width, (5, 5), padding=padding, kernel_init=_he, name=f"conv{i}")
            x = nn.max_pool(nn.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84), 1):
            x = nn.relu(nn.Dense(width, kernel_init=_he, name=f"dense{i}")(x))
        return nn.Dense(self.classes, name="head")(x).astype(jnp.float32)


class _Block(nn.Module):
    """Two convolutions around which the input is added."""

    width: int
    stride: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        h = _conv(self.width, strides=self.stride, name="conv1")(x)
        h = nn.relu(_norm(train, self.axis_name, name="norm1")(h))
        h = _conv(self.width, name="conv2")(h)
        h = _norm(train, self.axis_name, name="norm2")(h)
        new = self.width - x.shape[-1]
        channels = (new // 2, new - new // 2)
        x = jnp.pad(x[:, :: self.stride, :: self.stride, :], ((0, 0), (0, 0), (0, 0), channels))
        return nn.relu(h + x)


class ResNet(nn.Module):
    """The residual network for CIFAR: (B, H, W, channels) -> (B, classes).

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016, section 4.2:
    a 3x3 convolution, three stages of (depth - 2) / 6 blocks of two 3x3 convolutions, batch-norm
    after each, subsampling by 2 at the start of stages 2 and 3, parameter-free shortcuts (option
    A: subsample, pad with zero channels), global average pooling, a dense layer. 269,722
    parameters at depth 20.

    The normalisation of the input is the first layer, so that a perturbation of the input is in
    pixel units.

    Attributes:
      depth: 6 n + 2 for n >= 1: 20, 32, 44, 56, 110.
      classes: number of logits.
      widths: channels of the three stages.
      mean, std: of the training pixels, one for each channel; default CIFAR-10.
      axis_name: mapped axis over which batch-norm averages its statistics.

    Raises ``ValueError`` for another depth, or inputs that are not images with the channels of
    ``mean``.
    """

    depth: int = 20
    classes: int = 10
    widths: tuple[int, int, int] = (16, 32, 64)
    mean: tuple[float, ...] = CIFAR10[0]
    std: tuple[float, ...] = CIFAR10[1]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        blocks, rest = divmod(self.depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6 n + 2 (20, 32, 44, 56, 110), got {self.depth}")
        x = _normalised(x, self.mean, self.std)
        x = _conv(self.widths[0], name="conv")(x)
        x = nn.relu(_norm(train, self.axis_name, name="norm")(x))
        for i, width in enumerate(self.widths, 1):
            for j in range(1, blocks + 1):
                stride = 2 if i > 1 and j == 1 else 1
                block = _Block(width, stride, self.axis_name, name=f"stage{i}_block{j}")
                x = block(x, train)
        x = x.mean((1, 2))
        self.sow("intermediates", "pooled", x)
        return nn.Dense(self.classes, kernel_init=_he, name="head")(x).astype(jnp.float32)
