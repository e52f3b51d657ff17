"""How the logits of several models become one: ``combine(members (M, B, C), weights (M,))``.

Each gives (B, C) float32 whose argmax is the ensemble's prediction, and works with weights of any
positive sum. Where a member of non-zero weight has logits that are not finite, so has the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def _sound(values: Array, members: Array) -> Array:
    """``values`` (M, B, C), NaN where the logits of the member are not all finite."""
    finite = jnp.all(jnp.isfinite(members), axis=-1, keepdims=True)
    return jnp.where(finite, values, jnp.nan)


def _mean(values: Array, weights: Array) -> Array:
    # Multiplied elementwise, for a dot would round to TF32 on some devices.
    return jnp.sum(values * weights[:, None, None], axis=0) / jnp.sum(weights)


def mean_logits(members: Array, weights: Array) -> Array:
    """The weighted mean of the logits (Dong et al. 2018)."""
    return _mean(members, weights)


def mean_probabilities(members: Array, weights: Array) -> Array:
    """Logarithm of the weighted mean of the members' softmax probabilities (Liu et al. 2017)."""
    log_p = _sound(jax.nn.log_softmax(members), members)
    total = jax.nn.logsumexp(log_p, axis=0, b=weights[:, None, None])
    return total - jnp.log(jnp.sum(weights))


def mean_log_probabilities(members: Array, weights: Array) -> Array:
    """The weighted mean of the members' log-softmax.

    Its prediction is that of :func:`mean_logits`. The negative of its entry ``y`` is the mean of
    the members' cross entropies: an attack with ``loss=lambda z, y: -z[jnp.arange(len(y)), y]``
    averages losses rather than logits (one of the schemes compared by Dong et al. 2018).
    """
    return _mean(jax.nn.log_softmax(members), weights)


@jax.custom_jvp
def vote(members: Array, weights: Array) -> Array:
    """The share of the vote of each class, each member voting for its prediction.

    Ties go to the lower class. Constant almost everywhere, so differentiating it raises
    ``TypeError`` rather than giving gradients of zero: search with another ``combine``, and pass
    the voting ensemble as ``judge``, or use an attack that needs no gradient.
    """
    votes = jax.nn.one_hot(jnp.argmax(members, -1), members.shape[-1])
    return _mean(_sound(votes, members), weights)


@vote.defjvp
def _no_gradient(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    raise TypeError(
        "a vote has no useful gradient: search with combine=mean_probabilities and judge by the "
        "vote, attack.step(search, state, judge=voting), or set estimator= from "
        "jrobust.zeroth_order"
    )
