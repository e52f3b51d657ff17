"""Objectives for randomized smoothing that look at noisy copies of the inputs, without an attack.

Copy ``j`` of the example with id ``i`` is drawn from ``fold_in(fold_in(key, i), j)``, as sample
``j`` of its certificate is, in float32 and before anything else. The copies of a batch go through
the network in one training pass, as rows.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.models import Network
from jrobust.smoothing import Gaussian, Noise
from jrobust.smoothing._noise import Additive
from jrobust.training._objectives import _accuracy, _hard, _keys_of, _mean
from jrobust.training._step import Batch, Metrics

Array = jax.Array

# Below it a probability counts as zero. Its quantile is -11.5: a radius of 11 sigma is out of reach
# of any number of samples, and the slope of the quantile there still is a float32.
_LEAST = 1e-30


def check_noise(objective: Any, kind: Any = object, why: str = "") -> None:
    """Raise unless ``objective.noise`` is a noise, of this ``kind``, with valid parameters."""
    name, noise = type(objective).__name__, objective.noise
    if isinstance(noise, type) or not callable(getattr(noise, "perturb", None)):
        raise TypeError(
            f"{name}.noise must be a noise such as smoothing.Gaussian(0.25), got {noise!r}"
        )
    if not isinstance(noise, kind):
        raise TypeError(f"{name} {why}, got {noise!r}")
    noise.check()


def check_count(objective: Any, field: str, least: int) -> None:
    """Raise ``ValueError`` unless the field is an int of at least ``least``."""
    value = getattr(objective, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{type(objective).__name__}.{field} must be an int >= {least}, got {value!r}"
        )


def check_weights(objective: Any, *fields: str) -> None:
    """Raise ``ValueError`` unless the fields are finite numbers >= 0."""
    for field in fields:
        value = getattr(objective, field)
        if jnp.ndim(value) != 0 or not 0 <= float(value) < math.inf:
            raise ValueError(
                f"{type(objective).__name__}.{field} must be a finite number >= 0, got {value}"
            )


def copies(key: Array, ids: Array, samples: int) -> Array:
    """Keys of the copies of examples ``ids`` (B,): (B, samples)."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(_keys.examples(key, ids), jnp.arange(samples))


def noisy(key: Array, noise: Noise, batch: Batch, samples: int) -> Array:
    """``samples`` noisy copies of each example, (B, samples, ...)."""
    perturb = jax.vmap(jax.vmap(noise.perturb, (0, None)))
    return perturb(copies(key, batch.id, samples), batch.x)


def draws(key: Array, noise: Additive, batch: Batch, samples: int) -> Array:
    """What ``noisy`` adds to each example, (B, samples, ...)."""
    draw = jax.vmap(jax.vmap(lambda k: noise.sample(k, batch.x.shape[1:])))
    return draw(copies(key, batch.id, samples))


def forward(
    network: Network, params: Any, extra: Any, key: Array, points: Array
) -> tuple[Array, Any]:
    """A training pass over points (B, m, ...): logits (B, m, C) and the new ``extra``."""
    flat = points.reshape(-1, *points.shape[2:])  # example by example, as devices split a batch
    logits, extra = network.train_logits(params, extra, key, flat)
    return logits.reshape(*points.shape[:2], *logits.shape[1:]), extra


def each(loss: losses.Loss, logits: Array, y: Array) -> Array:
    """The loss of each copy: logits (B, m, C) and labels or logits of the example -> (B, m)."""
    return jax.vmap(loss, (1, None), 1)(logits, y)


def log_mean(logits: Array) -> Array:
    """Log of the mean probabilities over copies, (B, m, C) -> (B, C) float32, finite."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jax.nn.logsumexp(logs, axis=1) - math.log(logits.shape[1])


def hits(logits: Array, batch: Batch) -> Array:
    """Accuracy over all copies, from logits (B, m, C)."""
    right = jnp.argmax(logits, -1) == _hard(batch.y)[:, None]
    return _mean(jnp.mean(right, 1), batch.mask)


@algorithm
class NoiseAugmentation:
    """Training on noisy inputs (Lecuyer et al. 2019; Cohen et al. 2019, section 3.3).

    The noise is not clipped, as in certification.

    Args:
        noise: for instance ``smoothing.Gaussian(0.25)``; any noise of ``jrobust.smoothing``.
        samples: copies of each input in a step; 1 as published.
        loss: ``loss(logits, y) -> (B,)``.
    """

    noise: Noise
    samples: int = static(default=1)
    loss: losses.Loss = static(default=losses.cross_entropy)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self)
        check_count(self, "samples", 1)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``accuracy`` under noise."""
        dropout, noise = _keys_of(key, batch)
        points = noisy(noise, self.noise, batch, self.samples)
        logits, extra = forward(network, params, extra, dropout, points)
        value = _mean(jnp.mean(each(self.loss, logits, batch.y), 1), batch.mask)
        return value, (extra, {"accuracy": hits(logits, batch)})


@algorithm
class Stability:
    """Stability training under noise (Li et al. 2019, after Zheng et al. 2016).

    ``CE(f(x), y) + lbd H(softmax f(x), softmax f(x + noise))`` with the cross entropy H of the
    noisy prediction to the clean one: their KL divergence plus the entropy of the clean prediction.
    Gradients flow through both. Batch-norm statistics are updated by the clean pass, then by the
    noisy one.

    Args:
        noise: any noise of ``jrobust.smoothing``.
        lbd: weight of the cross entropy, >= 0; 2 in the code released with Jeong & Shin (2020).
        samples: noisy copies of each input.
    """

    noise: Noise
    lbd: Any = 2.0
    samples: int = static(default=1)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self)
        check_count(self, "samples", 1)
        check_weights(self, "lbd")

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``accuracy`` under noise, ``stability``."""
        dropout, noise = _keys_of(key, batch)
        points = noisy(noise, self.noise, batch, self.samples)
        clean, extra = network.train_logits(params, extra, dropout, batch.x)
        logits, extra = forward(network, params, extra, dropout, points)
        towards = jax.nn.softmax(clean.astype(jnp.float32))
        apart = _mean(jnp.mean(each(losses.cross_entropy, logits, towards), 1), batch.mask)
        value = _mean(losses.cross_entropy(clean, batch.y), batch.mask)
        return value + self.lbd * apart, (
            extra,
            {"accuracy": hits(logits, batch), "stability": apart},
        )


@algorithm
class Consistency:
    """Consistency regularisation (Jeong & Shin 2020).

    ``mean_i CE(f_i, y) + lbd mean_i KL(p || p_i) + eta H(p)`` over the copies ``i`` of an input,
    with their mean prediction ``p``; gradients flow through ``p`` too.

    Args:
        noise: any noise of ``jrobust.smoothing``.
        lbd: weight of the divergence, >= 0; published 5 to 20, larger for smaller sigma.
        eta: weight of the entropy, >= 0.
        samples: copies of each input, >= 2.
    """

    noise: Noise
    lbd: Any = 10.0
    eta: Any = 0.5
    samples: int = static(default=2)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self)
        check_count(self, "samples", 2)
        check_weights(self, "lbd", "eta")

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``accuracy`` under noise, ``kl`` and ``entropy``."""
        dropout, noise = _keys_of(key, batch)
        points = noisy(noise, self.noise, batch, self.samples)
        logits, extra = forward(network, params, extra, dropout, points)
        mean = log_mean(logits)
        value = _mean(jnp.mean(each(losses.cross_entropy, logits, batch.y), 1), batch.mask)
        apart = _mean(jnp.mean(each(losses.kl, logits, mean), 1), batch.mask)
        entropy = _mean(-jnp.sum(jnp.exp(mean) * mean, -1), batch.mask)
        return value + self.lbd * apart + self.eta * entropy, (
            extra,
            {"accuracy": hits(logits, batch), "kl": apart, "entropy": entropy},
        )


@algorithm
class MACER:
    """Maximising the certified radius of a Gaussian smoothed classifier (Zhai et al. 2020).

    The cross entropy of the mean prediction over copies, plus ``lbd`` times the hinge
    ``sigma / 2 max(0, gamma - (Phi^-1(p1) - Phi^-1(p2)))`` of the two largest mean probabilities
    ``p1, p2`` of ``softmax(beta logits)``. The hinge counts where the first is the label's and its
    radius is not yet ``gamma sigma / 2``.

    The released code adds 1e-10 to the mean before its logarithm and drops examples whose quantile
    is infinite. Here the logarithm is exact, and ``Phi^-1(p1)`` comes from the sum of the other
    probabilities, which does not round to one: the loss and its gradient are finite everywhere.

    Args:
        noise: ``smoothing.Gaussian``.
        lbd: weight of the hinge, >= 0.
        gamma: the radius that is enough, in units of ``sigma / 2``; below 22, the largest that
            float32 can tell.
        beta: inverse temperature of the hinge's softmax, > 0.
        samples: copies of each input; 16 as published.
    """

    noise: Gaussian
    lbd: Any = 12.0
    gamma: Any = 8.0
    beta: Any = 16.0
    samples: int = static(default=16)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self, Gaussian, "maximises the radius of a smoothing.Gaussian")
        check_count(self, "samples", 1)
        check_weights(self, "lbd", "gamma", "beta")
        if not float(self.gamma) < 22:
            raise ValueError(f"MACER.gamma must be below 22, got {self.gamma}")
        if not float(self.beta) > 0:
            raise ValueError(f"MACER.beta must be positive, got {self.beta}")

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`.

        Metrics: ``accuracy`` of the mean prediction, and ``hinge``.
        """
        dropout, noise = _keys_of(key, batch)
        points = noisy(noise, self.noise, batch, self.samples)
        logits, extra = forward(network, params, extra, dropout, points)
        mean = log_mean(logits)
        value = _mean(losses.cross_entropy(mean, batch.y), batch.mask)

        sharp = jnp.mean(jax.nn.softmax(self.beta * logits.astype(jnp.float32)), 1)
        (_, second), (top, _) = (a.T for a in jax.lax.top_k(sharp, 2))
        others = jnp.arange(sharp.shape[1])[None, :] != top[:, None]
        rest = jnp.sum(jnp.where(others, sharp, 0.0), -1)
        counts = (top == _hard(batch.y)) & (_gap(rest, second) <= self.gamma)
        # Where it does not count, its slope is not even computed.
        gap = _gap(jnp.where(counts, rest, 0.5), jnp.where(counts, second, 0.5))
        hinge = _mean(jnp.where(counts, self.gamma - gap, 0.0), batch.mask)
        hinge = self.noise.sigma / 2 * hinge
        return value + self.lbd * hinge, (
            extra,
            {"accuracy": _accuracy(mean, batch), "hinge": hinge},
        )


def _gap(rest: Array, second: Array) -> Array:
    """``Phi^-1(p1) - Phi^-1(p2)`` of ``rest = 1 - p1`` and ``second = p2``."""
    quantile = jax.scipy.special.ndtri
    return -quantile(jnp.maximum(rest, _LEAST)) - quantile(jnp.maximum(second, _LEAST))
