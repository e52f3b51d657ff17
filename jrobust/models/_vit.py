"""Vision transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jrobust.models._networks import IMAGENET, _normalised

Array = jax.Array


class _Encoder(nn.Module):
    """Self-attention and a two-layer perceptron, each after layer-norm and around the input."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, tokens, width = x.shape
        h = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
        h = nn.Dense(3 * width, name="qkv")(h)
        # Entries in the order (query, key, value), head, channel.
        q, k, v = jnp.moveaxis(h.reshape(batch, tokens, 3, self.heads, -1), 2, 0)
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(width, name="proj")(h)
        h = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
        h = nn.gelu(nn.Dense(self.hidden, name="dense1")(h), approximate=False)
        return x + nn.Dense(width, name="dense2")(h)


class ViT(nn.Module):
    """Vision transformer: (B, image, image, channels) -> (B, classes). By default ViT-B/16.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021: patches through a linear map, a
    class token, learned positions, pre-norm encoder blocks, layer-norm, the head on the class
    token. At 224x224 and 1,000 classes ViT-B/16 has 86,567,656 parameters.
    ``ViT(10, 32, 4, width=384, heads=6)`` is ViT-S/4 for CIFAR.

    Attributes:
      classes: number of logits.
      image: height and width of the images, a multiple of ``patch``.
      patch: height and width of a patch.
      width: of the tokens, a multiple of ``heads``; the perceptrons are four times wider.
      depth: number of encoder blocks.
      heads: attention heads.
      mean, std: of the training pixels, one for each channel; default ImageNet. The normalisation
        is the first layer, so that a perturbation of the input is in pixel units.

    Raises ``ValueError`` for inputs of another size or with other channels than ``mean``, and for a
    ``patch`` or ``heads`` that does not divide.
    """

    classes: int = 1000
    image: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _normalised(x, self.mean, self.std)
        if self.image % self.patch or self.width % self.heads:
            raise ValueError(
                f"patch {self.patch} must divide image {self.image} and heads {self.heads} must "
                f"divide width {self.width}"
            )
        if x.shape[1:3] != (self.image, self.image):
            raise ValueError(
                f"images must be {self.image}x{self.image}, got {x.shape}; set image= or resize"
            )
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding=0, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros_init(), (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], 1)
        scale = nn.initializers.normal(0.02)
        x = x + self.param("positions", scale, (1, x.shape[1], self.width)).astype(x.dtype)
        for j in range(1, self.depth + 1):
            x = _Encoder(self.heads, 4 * self.width, name=f"block{j}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)[:, 0]
        return nn.Dense(self.classes, name="head")(x).astype(jnp.float32)
