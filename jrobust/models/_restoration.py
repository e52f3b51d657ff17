"""Networks from images to images: a denoiser and an autoencoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jrobust.models._networks import _conv, _he, _images

Array = jax.Array


class DnCNN(nn.Module):
    """Denoiser: (B, H, W, channels) -> (B, H, W, channels), float32.

    Zhang, Zuo, Chen, Meng and Zhang, "Beyond a Gaussian Denoiser", 2017: 3x3 convolutions whose
    result, the noise, is subtracted from the input; batch-norm and ReLU between them. The denoiser
    of denoised smoothing (Salman et al. 2020). At depth 17 and 64 channels 556,096 parameters for
    grey, 558,400 for colour images.

    Attributes:
      depth: number of convolutions, at least 2.
      width: their channels.
      axis_name: mapped axis over which batch-norm averages its statistics.
    """

    depth: int = 17
    width: int = 64
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2, got {self.depth}")
        h = nn.relu(_conv(self.width, use_bias=True, name="conv1")(_images(x)))
        for i in range(2, self.depth):
            h = _conv(self.width, name=f"conv{i}")(h)
            norm = nn.BatchNorm(
                not train,
                momentum=0.95,  # of the average; released code gives it to the batch by mistake
                epsilon=1e-4,
                axis_name=self.axis_name,
                name=f"norm{i}",
            )
            h = nn.relu(norm(h))
        return (x - _conv(x.shape[-1], name=f"conv{self.depth}")(h)).astype(jnp.float32)


class Autoencoder(nn.Module):
    """Convolutional autoencoder: 32x32 images in [0, 1] to a code of 192 numbers and back.

    That of ZO-AE-DS (Zhang et al., "How to Robustify Black-Box ML Models? A Zeroth-Order
    Optimization Perspective", 2022) for CIFAR: strided convolutions with ReLU to 1x1x192, and
    their transposes back to the image, with a sigmoid at the end. (B, 32, 32, channels) ->
    (B, 32, 32, channels), float32; the methods ``encode`` and ``decode`` are its halves:
    ``module.apply(variables, x, method="encode")``.

    Attributes:
      channels: of the images.
      widths: of the convolutions; the last is the size of the code.
    """

    channels: int = 3
    widths: tuple[int, int, int, int] = (32, 48, 96, 192)

    def setup(self) -> None:
        """Make the layers."""
        # Kernel, stride, padding: 32 -> 8 -> 4 -> 2 -> 1 pixels.
        shapes = ((4, 4, 0), (3, 3, 2), (4, 2, 1), (2, 2, 0))
        self.encoder = [
            nn.Conv(width, (k, k), strides=s, padding=p, kernel_init=_he)
            for width, (k, s, p) in zip(self.widths, shapes)
        ]
        # Padding of the transpose is that of the spread input: what the forward one left over.
        self.decoder = [
            nn.ConvTranspose(
                width, (k, k), strides=(s, s), padding=((k - 1 - p,) * 2,) * 2, kernel_init=_he
            )
            for width, (k, s, p) in zip((*self.widths[-2::-1], self.channels), shapes[::-1])
        ]

    def encode(self, x: Array) -> Array:
        """The code (B, 192) of images (B, 32, 32, channels)."""
        x = _images(x)
        if x.shape[1:] != (32, 32, self.channels):
            raise ValueError(f"images must have shape (B, 32, 32, {self.channels}), got {x.shape}")
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return x.reshape(x.shape[0], -1)

    def decode(self, code: Array) -> Array:
        """Images (B, 32, 32, channels) of codes (B, 192)."""
        x = code.reshape(-1, 1, 1, self.widths[-1])
        for layer in self.decoder[:-1]:
            x = nn.relu(layer(x))
        return nn.sigmoid(self.decoder[-1](x)).astype(jnp.float32)

    def __call__(self, x: Array) -> Array:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))
