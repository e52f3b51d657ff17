"""Mixed classifiers: the probabilities of an accurate and of a robust model, added up.

What can be certified of them is in :mod:`jrobust.smoothing`: ``Mixed``, ``lipschitz_radius``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust._algorithm import algorithm
from jrobust.models._surrogate import _pytree

Array = jax.Array


def mixed_logits(accurate: Array, robust: Array, weight: Array | float) -> Array:
    """``log((1 - a) softmax(accurate) + a softmax(robust))`` (Bai et al. 2024).

    Computed from the log-softmax of both, so that no small probability is lost on the way.

    Args:
        accurate: (B, C) logits of any float dtype. Of votes take the logarithm of their shares.
        robust: (B, C) logits, likewise.
        weight: a in [0, 1], scalar or (B,).

    Returns:
        (B, C) float32, normalised: the exponentials of a row add up to 1.
    """
    a = jnp.asarray(weight, jnp.float32)
    a = jnp.broadcast_to(a[:, None] if a.ndim else a, accurate.shape)
    members = jnp.stack([accurate, robust]).astype(jnp.float32)
    return jax.nn.logsumexp(jax.nn.log_softmax(members), axis=0, b=jnp.stack([1 - a, a]))


# Scale, power and bias of the transform, and the weight that goes with them, as released for the
# robust models Peng2023Robust, Wang2023Better_WRN-70-16 and Liu2023Comprehensive_Swin-L.
MIXEDNUTS = {
    "cifar10": {"scale": 5.0, "power": 4.0, "bias": -1.1, "weight": 0.99875006},
    "cifar100": {"scale": 0.61157538, "power": 3.5714286, "bias": -2.1428571, "weight": 0.98603005},
    "imagenet": {"scale": 0.02353547, "power": 2.7142857, "bias": -0.28571429, "weight": 0.9971266},
}


def sharpened_logits(
    logits: Array, *, scale: float = 5.0, power: float = 4.0, bias: float = -1.1, top: int = 250
) -> Array:
    """The transform of MixedNUTS for the robust model's logits (Bai et al. 2024).

    The logits less the mean and over the standard deviation (of n - 1) of their ``top`` largest,
    plus ``bias``, through the exact GELU, to ``power`` with their sign kept, times ``scale``. It
    widens large margins more than small ones: robust models are surer when they are right. The
    prediction is kept wherever the largest normalised logit is at least ``-bias``.

    MixedNUTS mixes this with the accurate model's prediction as a one-hot vector, its logits at
    zero temperature; mixed with its plain softmax is how gradients are had. The defaults are those
    of CIFAR-10; see ``MIXEDNUTS``, whose entry ``weight`` is the a of the mix.

    Args:
        logits: (B, C) of any float dtype.
        scale: s, > 0.
        power: p, > 0.
        bias: c, in standard deviations.
        top: how many logits are normalised by, at least 2; all of them where there are fewer.

    Returns:
        (B, C) float32.
    """
    logits = logits.astype(jnp.float32)
    largest = jax.lax.top_k(logits, min(top, logits.shape[-1]))[0]
    centred = logits - largest.mean(axis=-1, keepdims=True)
    variance = jnp.var(largest, axis=-1, ddof=1, keepdims=True)
    bent = jax.nn.gelu(centred * jax.lax.rsqrt(variance + 1e-8) + bias, approximate=False)
    return scale * jnp.sign(bent) * jnp.abs(bent) ** power


@algorithm
class AdaptiveWeight:
    """A weight that depends on the input; see :func:`adaptive_weight`."""

    score: Any
    least: Array | float
    most: Array | float

    def __call__(self, x: Array) -> Array:
        """(B, ...) -> (B,) float32, never outside ``[least, most]``."""
        least, most = (jnp.asarray(end, jnp.float32) for end in (self.least, self.most))
        score = self.score(x).astype(jnp.float32)
        if score.shape != x.shape[:1]:
            raise ValueError(f"score must map {x.shape} to {x.shape[:1]}, got {score.shape}")
        return jnp.clip(least + (most - least) * jax.nn.sigmoid(score), least, most)


@algorithm
class MixedClassifier:
    """Two models and a weight as a logits function; see :func:`mixed`."""

    accurate: Any
    robust: Any
    weight: Any

    def __call__(self, x: Array) -> Array:
        """:func:`mixed_logits` of ``x`` (B, ...): (B, C) float32."""
        weight = self.weight(x) if callable(self.weight) else self.weight
        return mixed_logits(self.accurate(x), self.robust(x), weight)


def adaptive_weight(
    score: Callable[[Array], Array], least: float, most: float = 1.0
) -> AdaptiveWeight:
    """``a(x) = least + (most - least) sigmoid(score(x))``, the weight of adaptive smoothing.

    Bai et al., "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing",
    2024: ``score`` is a small network on features of both models, trained to tell attacked inputs
    from clean ones, its output normalised over the data. It is a part of the model, and attacks
    must see it. The certificate of the mix is that of the constant weight ``least``, wherever
    ``least`` is above 1/2: ``smoothing.Mixed(noise, weight=least)``.

    Args:
        score: (B, ...) -> (B,), any callable; rows independent.
        least: the smallest weight of the robust model, in [0, 1].
        most: the largest, in [least, 1].

    Raises:
        ValueError: bounds out of order or outside [0, 1].
    """
    if not 0 <= np.asarray(least) <= np.asarray(most) <= 1:
        raise ValueError(f"need 0 <= least <= most <= 1, got least={least}, most={most}")
    return AdaptiveWeight(_pytree(score), least, most)


def mixed(
    accurate: Callable[[Array], Array],
    robust: Callable[[Array], Array],
    weight: float | Callable[[Array], Array],
) -> MixedClassifier:
    """The mixed classifier ``log((1 - a) softmax(accurate(x)) + a softmax(robust(x)))``.

    A pytree, as all that :func:`bind` makes: parameters are arguments of compiled code. Scales of
    the logits and :func:`sharpened_logits` belong into the models.

    Args:
        accurate: (B, ...) -> (B, C) logits.
        robust: likewise.
        weight: a in [0, 1], a number or a function (B, ...) -> (B,) such as
            :func:`adaptive_weight`.

    Raises:
        ValueError: a number outside [0, 1].
    """
    if callable(weight):
        weight = _pytree(weight)
    elif not 0 <= np.asarray(weight) <= 1:
        raise ValueError(f"weight must be a number in [0, 1] or a function, got {weight}")
    return MixedClassifier(_pytree(accurate), _pytree(robust), weight)
