"""Per-example losses on logits. Higher is worse for the model: attacks ascend, training descends.

Every loss takes logits (B, C) of any float dtype and gives (B,) float32. Labels ``y`` are (B,)
integers in ``0 .. C - 1``. A loss with a third parameter ``target`` is a targeted loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Loss = Callable[..., Array]


def _need(logits: Array, classes: int, name: str, instead: str) -> None:
    if logits.shape[-1] < classes:
        raise ValueError(
            f"losses.{name} needs at least {classes} classes, the model has {logits.shape[-1]}; "
            f"use losses.{instead}"
        )


def _pick(logits: Array, index: Array) -> Array:
    return jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]


def _others(logits: Array, y: Array) -> Array:
    """The largest logit of a class other than ``y``."""
    own = jnp.arange(logits.shape[-1])[None, :] == y[:, None]
    return jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)


def cross_entropy(logits: Array, y: Array) -> Array:
    """``-log softmax(logits)_y``; ``y`` may also be (B, C) class probabilities (soft labels)."""
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(y.dtype, jnp.floating):
        return optax.softmax_cross_entropy(logits, y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def margin(logits: Array, y: Array) -> Array:
    """``max_{i != y} z_i - z_y``: positive exactly where misclassified.

    The loss f6 of Carlini & Wagner (2017) without its cut-off. Any number of classes from two.
    """
    _need(logits, 2, "margin", "cross_entropy")
    logits = logits.astype(jnp.float32)
    return _others(logits, y) - _pick(logits, y)


def dlr(logits: Array, y: Array) -> Array:
    """Difference of logits ratio, ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))``.

    Croce & Hein (2020), eq. 6; invariant under shifts and positive scaling of the logits. Needs
    three classes; raises ``ValueError`` below.
    """
    _need(logits, 3, "dlr", "margin or losses.dlr_or_margin")
    logits = logits.astype(jnp.float32)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Array, y: Array, target: Array) -> Array:
    """Targeted DLR, ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``.

    Croce & Hein (2020), eq. 7. Needs four classes; raises ``ValueError`` below.
    """
    _need(logits, 4, "dlr_targeted", "dlr_or_margin_targeted")
    logits = logits.astype(jnp.float32)
    top = jax.lax.top_k(logits, 4)[0]
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12
    return (_pick(logits, target) - _pick(logits, y)) / scale


def dlr_or_margin(logits: Array, y: Array) -> Array:
    """:func:`dlr`, and :func:`margin` for models of two classes, which have no third logit."""
    return (dlr if logits.shape[-1] > 2 else margin)(logits, y)


def dlr_or_margin_targeted(logits: Array, y: Array, target: Array) -> Array:
    """:func:`dlr_targeted`; its numerator ``z_t - z_y`` for models of two or three classes."""
    if logits.shape[-1] > 3:
        return dlr_targeted(logits, y, target)
    logits = logits.astype(jnp.float32)
    return _pick(logits, target) - _pick(logits, y)


def kl(logits: Array, reference: Array) -> Array:
    """``KL(softmax(reference) || softmax(logits))``: how far the prediction left the reference.

    The regulariser and the inner objective of TRADES (Zhang et al. 2019, eq. 3).
    """
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def squared_probability_distance(logits: Array, reference: Array) -> Array:
    """``sum_i (softmax(logits)_i - softmax(reference)_i)^2`` (SCORE: Pang et al. 2022)."""
    p = jax.nn.softmax(logits.astype(jnp.float32))
    q = jax.nn.softmax(reference.astype(jnp.float32))
    return jnp.sum((p - q) ** 2, axis=-1)


def is_targeted(loss: Loss) -> bool:
    """Whether ``loss`` is a targeted loss: one with a parameter named ``target``."""
    return "target" in inspect.signature(loss).parameters


def ascent(loss: Loss, logits: Array, y: Array, aim: Array) -> Array:
    """What an attack ascends: towards ``aim`` (B,) where it is >= 0, else away from ``y``."""
    target = jnp.maximum(aim, 0)
    if is_targeted(loss):
        return loss(logits, y, target)
    return jnp.where(aim >= 0, -loss(logits, target), loss(logits, y))
