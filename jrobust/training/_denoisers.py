"""Objectives that train the denoiser of denoised smoothing.

The network maps inputs to inputs: its ``logits`` are images.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.models import Network
from jrobust.smoothing import Noise
from jrobust.training._objectives import _keys_of, _mean
from jrobust.training._smoothed import check_count, check_noise, hits, noisy
from jrobust.training._step import Batch, Metrics

Array = jax.Array


def _restored(
    key: Array,
    noise: Noise,
    samples: int,
    network: Network,
    params: Any,
    extra: Any,
    batch: Batch,
) -> tuple[Array, Any]:
    """The denoised copies of the inputs (B, samples, ...), and the new ``extra``."""
    dropout, drawing = _keys_of(key, batch)
    points = noisy(drawing, noise, batch, samples)
    flat = points.reshape(-1, *batch.x.shape[1:])
    images, extra = network.train_logits(params, extra, dropout, flat)
    if images.shape != flat.shape:
        raise ValueError(
            f"a denoiser maps inputs {flat.shape} to as many of the same shape, but the network "
            f"gives {images.shape}: use one such as models.DnCNN"
        )
    return images.reshape(points.shape), extra


@algorithm
class Denoising:
    """The mean squared error of denoised inputs, "MSE" of Salman et al. (2020).

    Args:
        noise: any noise of ``jrobust.smoothing``.
        samples: noisy copies of each input.
    """

    noise: Noise
    samples: int = static(default=1)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self)
        check_count(self, "samples", 1)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`; labels play no part. No metrics."""
        images, extra = _restored(key, self.noise, self.samples, network, params, extra, batch)
        errors = (images.astype(jnp.float32) - batch.x[:, None]) ** 2
        return _mean(jnp.mean(errors, tuple(range(1, errors.ndim))), batch.mask), (extra, {})


@algorithm
class DenoisedStability:
    """The classifier behind the denoiser shall say what it says of clean inputs.

    "Stability" of Salman et al. (2020): ``CE(classifier(denoiser(x + noise)), argmax
    classifier(x))``. The classifier is frozen, and needs no labels.

    With a white-box classifier the gradient goes through it; for a black box give a surrogate
    classifier in its place, as published, or an ``estimator``, which asks the classifier about
    points around each denoised image (ZO-DS in Zhang et al. 2022).

    Args:
        noise: any noise of ``jrobust.smoothing``.
        classifier: logits function of clean inputs, (B, ...) -> (B, C); a pytree such as
            ``network.bind(params, extra)``.
        estimator: gradient estimator of ``jrobust.zeroth_order`` in place of autodiff through the
            classifier; None for autodiff.
        samples: noisy copies of each input.
    """

    noise: Noise
    classifier: Any
    estimator: Any = None
    samples: int = static(default=1)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense; see :class:`Objective`."""
        check_noise(self)
        check_count(self, "samples", 1)
        if not callable(self.classifier):
            raise TypeError(
                "DenoisedStability.classifier must be a logits function, got "
                f"{type(self.classifier).__name__}"
            )
        if self.estimator is not None:
            self.estimator.check(x, batched=True)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`; labels play no part in the loss.

        Metrics: ``accuracy`` under noise; ``agreement`` with the prediction on the clean input.
        """
        images, extra = _restored(key, self.noise, self.samples, network, params, extra, batch)
        answers = jnp.argmax(jax.lax.stop_gradient(self.classifier(batch.x)), -1)
        rows = images.reshape(-1, *batch.x.shape[1:])
        wanted = jnp.repeat(answers, self.samples)
        logits = self.classifier(rows if self.estimator is None else jax.lax.stop_gradient(rows))
        values = losses.cross_entropy(logits, wanted)
        if self.estimator is not None:
            values = self._estimated(key, rows, wanted, values, batch)
        value = _mean(jnp.mean(values.reshape(-1, self.samples), 1), batch.mask)
        logits = logits.reshape(*images.shape[:2], -1)
        metrics = {
            "accuracy": hits(logits, batch),
            "agreement": hits(logits, batch._replace(y=answers)),
        }
        return value, (extra, metrics)

    def _estimated(
        self, key: Array, rows: Array, wanted: Array, values: Array, batch: Batch
    ) -> Array:
        """``values`` (N,), whose derivative by ``rows`` (N, ...) is an estimate."""
        held = jax.lax.stop_gradient(rows)
        keys = _keys.examples(jax.random.fold_in(key, 2), batch.id)
        each = jax.vmap(lambda k: jax.random.split(k, self.samples))(keys).reshape(-1)
        _, slopes = self.estimator.per_example(
            each,
            lambda points: losses.cross_entropy(self.classifier(points), wanted),
            held,
            values=jax.lax.stop_gradient(values),
        )
        change = jax.lax.stop_gradient(slopes) * (rows - held)
        return jax.lax.stop_gradient(values) + jnp.sum(change, tuple(range(1, change.ndim)))
