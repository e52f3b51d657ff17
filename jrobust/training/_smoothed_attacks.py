"""Objectives that attack the smoothed classifier: SmoothAdv, SmoothMix and CAT-RS.

The attacks are those of ``jrobust.attacks`` on a smoothed classifier of a few fixed draws.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks import PGD, Attack, MinimalNorm, with_eps
from jrobust.models import Network
from jrobust.smoothing._noise import Additive
from jrobust.threat import L2, expand
from jrobust.training._objectives import _check_attack, _hard, _keys_of, _mean
from jrobust.training._smoothed import (
    check_count,
    check_noise,
    check_weights,
    draws,
    each,
    forward,
    hits,
    log_mean,
)
from jrobust.training._step import Batch, Metrics

Array = jax.Array

_ADDITIVE = "needs noise that is added to the input, such as smoothing.Gaussian"


@algorithm
class _Averaged:
    """The smoothed classifier of fixed draws: (B, ...) -> log of the mean probabilities (B, C).

    Its cross entropy is ``-log mean_i softmax(f(x + noise_i))_y``, what SmoothAdv attacks.
    """

    model: Any
    noise: Array  # (B, m, ...)

    def __call__(self, x: Array) -> Array:
        points = x[:, None] + self.noise
        logits = self.model(points.reshape(-1, *x.shape[1:]))
        return log_mean(logits.reshape(*points.shape[:2], -1))


def _held(network: Network, params: Any, extra: Any) -> Any:
    """The network in evaluation mode, through which no gradient flows to the parameters."""
    return network.bind(*jax.lax.stop_gradient((params, extra)))


def _keys_for(key: Array) -> tuple[Array, Array]:
    """Keys of the attack and of the other choices, apart from those of ``_keys_of``."""
    return jax.random.fold_in(key, 2), jax.random.fold_in(key, 3)


@algorithm
class SmoothAdv:
    """Adversarial training of the smoothed classifier (Salman et al. 2019).

    The attack maximises ``-log mean_i softmax(f(x' + noise_i))_y`` over ``x'``; the parameters
    descend ``mean_i CE(f(x' + noise_i), y)`` at the same noise. The attack sees the model in
    evaluation mode.

    A minimal-norm attack searches the whole box, as published; what it finds beyond ``eps`` is
    drawn in to the ball, and where it finds nothing the input stays.

    Published: ``eps`` (and the ``init_norm`` of DDN) grows linearly over ten epochs; with
    :class:`Scheduled`, see docs/smoothing-training.md.

    Args:
        noise: noise that is added to the input.
        attack: in L2 as published ``PGD(L2(eps), steps=T, rel_step_size=2 / T, random_start=False,
            keep="last")`` with T = 2 to 10 and eps = 0.25, 0.5, 1, 2; or ``DDN(L2(eps),
            steps=T, init_norm=eps)``.
        samples: copies of each input; 1 to 8 as published.
    """

    noise: Any
    attack: Attack
    samples: int = static(default=2)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense for ``x``; see :class:`Objective`."""
        check_noise(self, Additive, _ADDITIVE)
        check_count(self, "samples", 1)
        _check_attack(self.attack)
        self.attack.check(x, y, classes)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``robust_accuracy`` under noise."""
        _check_attack(self.attack)
        dropout, noise = _keys_of(key, batch)
        added = draws(noise, self.noise, batch, self.samples)
        model = _Averaged(_held(network, params, extra), added)
        attack, ball = self.attack, None
        if isinstance(attack, MinimalNorm):
            attack, ball = with_eps(attack, jnp.inf), attack.threat
        found = attack(_keys_for(key)[0], model, batch.x, _hard(batch.y), ids=batch.id).x
        if ball is not None:
            found = ball.project(found, batch.x)
        points = jax.lax.stop_gradient(found)[:, None] + added
        logits, extra = forward(network, params, extra, dropout, points)
        value = _mean(jnp.mean(each(losses.cross_entropy, logits, batch.y), 1), batch.mask)
        return value, (extra, {"robust_accuracy": hits(logits, batch)})


@algorithm
class SmoothMix:
    """Mixing an input with its over-confident adversary (Jeong et al. 2021).

    From ``x``, ``steps`` moves of length ``alpha`` along the gradient of the smoothed classifier's
    loss, inside the box but in no ball, lead to ``x'``. With ``l`` uniform in [0, 1/2],

        mean_i CE(f(x + noise_i), y) + eta mean_i KL(t || f((1 - l) x + l x' + noise_i)),
        t = (1 - l) p + l / C,

    where ``p`` is the mean prediction over the noisy copies of ``x``; the second term counts where
    ``p`` is right. Gradients flow through ``t`` too, as in the released code. The moves see the
    model in evaluation mode and the same noise. Published: ``eta`` and ``reach`` grow linearly over
    ten epochs; with :class:`Scheduled`, see docs/smoothing-training.md.

    Args:
        noise: noise that is added to the input.
        alpha: length of a move, > 0; as released 0.5 for sigma 0.25, 1 for 0.5 and 2 for 1.
        eta: weight of the mixed term, >= 0.
        steps: number of moves.
        samples: copies of each input.
        one_step: let the point after the first move take the place of ``x`` in the loss; released
            so for sigma 0.5 and 1.
        lo, hi: the box of valid inputs.
        reach: how far from ``x`` this point may be, in [0, 1] times ``alpha``; it is drawn in.
    """

    noise: Any
    alpha: Any = 0.5
    eta: Any = 5.0
    steps: int = static(default=4)
    samples: int = static(default=2)
    one_step: bool = static(default=False)
    lo: Any = 0.0
    hi: Any = 1.0
    reach: Any = 1.0

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense for ``x``; see :class:`Objective`."""
        check_noise(self, Additive, _ADDITIVE)
        check_count(self, "samples", 1)
        check_count(self, "steps", 2 if self.one_step else 1)
        check_weights(self, "alpha", "eta")
        if not float(self.alpha) > 0:
            raise ValueError(f"SmoothMix.alpha must be positive, got {self.alpha}")
        if not 0 <= float(self.reach) <= 1:
            raise ValueError(f"SmoothMix.reach must lie in [0, 1], got {self.reach}")
        L2(0.0, self.lo, self.hi).check(x)

    def _walk(self, model: Any, x: Array, y: Array, key: Array, steps: int) -> Array:
        # That many moves cannot leave this ball: it is no bound, but attacks have one.
        threat = L2(steps * self.alpha, self.lo, self.hi)
        walk = PGD(threat, steps, step_size=self.alpha, random_start=False, keep="last")
        return jax.lax.stop_gradient(walk(key, model, x, y).x)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``accuracy`` under noise, and ``mixed``, the KL."""
        dropout, noise = _keys_of(key, batch)
        walking, mixing = _keys_for(key)
        added = draws(noise, self.noise, batch, self.samples)
        model, y = _Averaged(_held(network, params, extra), added), _hard(batch.y)
        if self.one_step:
            first = self._walk(model, batch.x, y, walking, 1)
            x = L2(self.reach * self.alpha, self.lo, self.hi).project(first, batch.x)
            far = self._walk(model, first, y, walking, self.steps - 1)
        else:
            x, far = batch.x, self._walk(model, batch.x, y, walking, self.steps)

        logits, extra = forward(network, params, extra, dropout, x[:, None] + added)
        mean = log_mean(logits)
        value = _mean(jnp.mean(each(losses.cross_entropy, logits, batch.y), 1), batch.mask)

        keys = _keys.examples(mixing, batch.id)
        share = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32, maxval=0.5))(keys)
        mixed = x + expand(share, x) * (far - x)
        # In logarithms, so that no target is zero.
        uniform = jnp.log(share / mean.shape[1])[:, None]
        target = jnp.logaddexp(jnp.log1p(-share)[:, None] + mean, uniform)
        logits_mixed, extra = forward(network, params, extra, dropout, mixed[:, None] + added)
        apart = jnp.mean(each(losses.kl, logits_mixed, target), 1)
        apart = _mean(jnp.where(jnp.argmax(mean, -1) == y, apart, 0.0), batch.mask)
        metrics = {"accuracy": hits(logits, batch), "mixed": apart}
        return value + self.eta * apart, (extra, metrics)


@algorithm
class _Sphere(L2):
    """Noise of the mean and standard deviation, over features, of the noise that it came from."""

    def project(self, x: Array, x0: Array) -> Array:
        """Into the L2 ball around ``x0``; then the moments of ``x0``, which may lead out of it."""

        def moments(z: Array) -> tuple[Array, Array]:
            axes = tuple(range(1, z.ndim))
            return jnp.mean(z, axes, keepdims=True), jnp.std(z, axes, keepdims=True)

        x = L2.project(self, x, x0)
        (mean, std), (mean0, std0) = moments(x), moments(x0)
        return mean0 + (x - mean) * (std0 / jnp.where(std > 0, std, 1.0))


@algorithm
class CATRS:
    """Confidence-aware training, CAT-RS (Jeong et al. 2023).

    Of the cross entropies of the ``m`` noisy copies of an input the ``k`` smallest are kept, with
    ``k`` binomial of ``m`` and the fraction of copies that are right, at least 1: the sum of these
    over ``m``. Inputs with ``k = m`` count in full and add ``lbd max_i KL(q || f(x + e_i))``,
    where ``q`` is a soft prediction and ``e_i`` noise that is attacked to maximise this KL: steps
    of ``2 eps / steps`` in the L2 ball of radius ``eps`` around each draw, each followed by a shift
    and a scaling of the noise back to the mean and standard deviation of the draw. The attack sees
    the model in evaluation mode.

    The released code divides by the root mean square in place of the standard deviation, which
    gives neither moment exactly.

    Args:
        noise: noise that is added to the input; Gaussian as published.
        predictions: (N, C) soft predictions ``q``: row ``id`` holds the probabilities that a
            smoothed classifier trained with plain Gaussian noise gives to the example with this id,
            such as ``count_votes`` over their number. An id without a row makes the loss NaN.
            None for the model's own mean prediction over the copies, held fixed. As released,
            10,000 votes of a model for sigma 0.25, whatever ``noise``.
        lbd: weight of the worst-case term, >= 0; 0.5, 1 and 2 for sigma 0.25, 0.5 and 1 in the
            released commands.
        eps: radius of the attack on the noise, >= 0; 1 as published.
        steps: of the attack; 4 as published, 1 for ImageNet.
        samples: copies of each input; 4 as published, 2 for ImageNet.
        confidence_mask: draw ``k`` with the probability that ``predictions`` give to the label in
            place of the fraction of right copies, which is small at first whatever the input. An
            option of the released code, which sets it for ImageNet.
    """

    noise: Any
    predictions: Any = None
    lbd: Any = 1.0
    eps: Any = 1.0
    steps: int = static(default=4)
    samples: int = static(default=4)
    confidence_mask: bool = static(default=False)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self, Additive, _ADDITIVE)
        check_count(self, "samples", 1)
        check_count(self, "steps", 1)
        check_weights(self, "lbd", "eps")
        if self.predictions is None:
            if self.confidence_mask:
                raise ValueError("CATRS.confidence_mask is of predictions: pass predictions= too")
            return
        shape = jnp.shape(self.predictions)
        if len(shape) != 2 or shape[1] != classes:
            raise ValueError(f"CATRS.predictions must be of shape (N, {classes}), got {shape}")
        least, sums = jnp.min(self.predictions), jnp.sum(self.predictions, 1)
        if not (least >= 0 and jnp.max(jnp.abs(sums - 1)) < 1e-3):
            raise ValueError("CATRS.predictions must be probabilities: rows >= 0 that sum to 1")

    def _attacked(self, key: Array, model: Any, x: Array, added: Array, soft: Array) -> Array:
        """The noise (B, m, ...) after the attack."""
        rows, target = (jnp.repeat(a, self.samples, 0) for a in (x, soft))
        ball = _Sphere(self.eps, -math.inf, math.inf)
        search = PGD(
            ball,
            self.steps,
            rel_step_size=2.0 / self.steps,
            random_start=False,
            # Its gradient is that of the KL.
            loss=lambda logits, _: losses.cross_entropy(logits, target),
            keep="last",
        )
        flat = added.reshape(rows.shape)
        found = search(key, lambda e: model(rows + e), flat, jnp.argmax(target, -1))
        return jax.lax.stop_gradient(found.x).reshape(added.shape)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`.

        Metrics: ``accuracy`` under noise, ``confident``, the fraction of inputs with ``k = m``, and
        ``worst``, their KL.
        """
        dropout, noise = _keys_of(key, batch)
        searching, choosing = _keys_for(key)
        m = self.samples
        added = draws(noise, self.noise, batch, m)
        logits, extra = forward(network, params, extra, dropout, batch.x[:, None] + added)
        if self.predictions is None:
            soft = jax.lax.stop_gradient(jnp.exp(log_mean(logits)))
        else:
            table = jnp.asarray(self.predictions, jnp.float32)
            soft = jnp.take(table, batch.id, 0, mode="fill", fill_value=jnp.nan)

        label = _hard(batch.y)[:, None]
        right = jnp.mean(jnp.argmax(logits, -1) == label, 1, keepdims=True)
        confidence = jnp.take_along_axis(soft, label, 1) if self.confidence_mask else right
        keys = _keys.examples(choosing, batch.id)
        chances = jax.vmap(lambda k: jax.random.uniform(k, (m,), jnp.float32))(keys)
        kept = jnp.maximum(jnp.sum(chances < confidence, 1), 1)
        sure = kept == m
        ordered = jnp.sort(each(losses.cross_entropy, logits, batch.y), 1)
        low = jnp.mean(jnp.where(jnp.arange(m)[None] < kept[:, None], ordered, 0.0), 1)

        worst = self._attacked(searching, _held(network, params, extra), batch.x, added, soft)
        moved, extra = forward(network, params, extra, dropout, batch.x[:, None] + worst)
        entropy = jnp.sum(jax.scipy.special.entr(soft), -1)
        high = jnp.max(each(losses.cross_entropy, moved, soft), 1) - entropy
        # NaN, too, where there is no prediction.
        high = _mean(jnp.where(sure, high, 0.0 * entropy), batch.mask)
        metrics = {
            "accuracy": hits(logits, batch),
            "confident": _mean(sure, batch.mask),
            "worst": high,
        }
        return _mean(low, batch.mask) + self.lbd * high, (extra, metrics)
