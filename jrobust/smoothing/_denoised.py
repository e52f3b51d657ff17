"""Denoised smoothing: a denoiser in front of a classifier, certified as one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jrobust import drive
from jrobust._algorithm import algorithm, static
from jrobust.smoothing._noise import check_scale

Array = jax.Array


def _as_pytree(name: str, fn: Any) -> Any:
    if not callable(fn):
        raise TypeError(f"{name} must be a function of a batch, got {type(fn).__name__}")
    return jax.tree_util.Partial(fn) if jax.tree_util.all_leaves([fn]) else fn


@algorithm
class Denoised:
    """A classifier behind a denoiser; made by :func:`denoised`."""

    denoiser: Any
    classifier: Any

    def __call__(self, x: Array) -> Array:
        """Logits (B, C) of noisy inputs (B, ...)."""
        return self.classifier(self.denoiser(x))


@jax.jit
def _denoise(denoiser: Any, x: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return denoiser(x)


def denoised(
    denoiser_fn: Callable[[Array], Array], classifier_fn: Callable[[Array], Array]
) -> Denoised | drive.Host:
    """Denoised smoothing (Salman et al. 2020): ``x -> classifier_fn(denoiser_fn(x))``.

    A ``logits_fn`` like any other, for :func:`count_votes`, ``loops.certify`` and attacks. What is
    certified is the smoothed version of this composition; neither part needs to be robust, only to
    be a fixed function of one input. ``jrobust.training.Denoising`` and ``DenoisedStability`` train
    the denoiser.

    Args:
        denoiser_fn: noisy inputs (B, ...) to inputs of the classifier, such as
            ``network.bind(params, extra)`` of a ``models.DnCNN``, or :func:`diffusion_denoiser`.
        classifier_fn: clean inputs to logits (B, C).

    Returns:
        A pytree of both; a part that is a pytree itself is an argument of compiled code, a plain
        function costs a trace for each function object. Of a classifier that is a
        :class:`jrobust.drive.Host` another one: compiled denoiser, then one query for each row.

    Raises:
        TypeError: if one of them is not callable.
    """
    denoiser = _as_pytree("denoiser_fn", denoiser_fn)
    if drive.is_host(classifier_fn):
        return drive.Host(lambda x: classifier_fn(_denoise(denoiser, jnp.asarray(x))))
    return Denoised(denoiser, _as_pytree("classifier_fn", classifier_fn))


@algorithm
class DiffusionDenoiser:
    """One step of a diffusion model as a denoiser; made by :func:`diffusion_denoiser`.

    Attributes:
        model: what predicts.
        sigma: standard deviation of the noise that it is for, in the units of images in [0, 1].
        level: what the model is told: the standard deviation in the units of images in [-1, 1], or
            the timestep.
        gain: what images in [-1, 1] are multiplied by on their way to the model.
        signal: what the model takes this factor for.
        prediction: ``"x0"`` or ``"noise"``.
    """

    model: Any
    sigma: Any
    level: Any
    gain: Any
    signal: Any
    prediction: str = static()

    def __call__(self, x: Array) -> Array:
        """Noisy images (B, ...), in the units of [0, 1], to clean ones in [0, 1]."""
        level = jnp.asarray(self.level)
        # Made from x, so that under shard_map it varies over devices as x does.
        z = self.gain * (2 * x - 1)
        found = self.model(z, jnp.full_like(z, level, level.dtype, shape=x.shape[:1]))
        if self.prediction == "noise":
            found = (z - 2 * self.gain * self.sigma * found) / self.gain
        return (jnp.clip(found, -1.0, 1.0) + 1) / 2


def diffusion_denoiser(
    model: Callable[[Array, Array], Array],
    sigma: float,
    *,
    alphas_cumprod: ArrayLike | None = None,
    prediction: str = "x0",
) -> DiffusionDenoiser:
    """A diffusion model as the denoiser of denoised smoothing, in one step (Carlini et al. 2023).

    Diffusion models take images in [-1, 1], where noise of standard deviation sigma has 2 sigma.

    The noise is that of the certificate: :func:`count_votes` draws it, and it has exactly the
    ``sigma`` given here. A model with discrete timesteps knows only the noise levels
    ``sqrt((1 - a_t) / a_t)``. The released code draws noise of the level of the rounded timestep,
    so that its certificates are about another sigma than they say. Here ``t`` is the nearest level
    and the input is scaled such that its noise has the standard deviation ``sqrt(1 - a_t)`` which
    the model knows; what is off by the rounding is then the contrast of the image, by the factor
    ``gain / signal`` of the result.

    Args:
        model: a pytree or a plain function. Without ``alphas_cumprod`` ``model(z, level)`` gives
            the clean image of ``z`` (B, ...), an image in [-1, 1] plus noise of standard deviation
            ``level`` (B,) float32. With it ``model(z, t)`` is of the DDPM kind, with integer
            timesteps ``t`` (B,) from 0.
        sigma: standard deviation of the noise, in the units of images in [0, 1].
        alphas_cumprod: (T,) the products ``a_t`` of the noise schedule, decreasing inside (0, 1).
        prediction: whether the model predicts the clean image, ``"x0"``, or the ``"noise"`` in
            ``z``, of unit variance.

    Returns:
        A pytree that maps noisy images (B, ...) to clean ones in [0, 1].

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: a bad schedule or prediction; a sigma that is not positive or has no level in
            the schedule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jrobust.smoothing import diffusion_denoiser
        >>> cosine = jnp.cos(jnp.linspace(0.01, 1.56, 1000)) ** 2
        >>> found = diffusion_denoiser(lambda z, t: z, 0.25, alphas_cumprod=cosine)
        >>> int(found.level), round(float(found.gain / found.signal), 3)
        (292, 0.999)
    """
    model = _as_pytree("model", model)
    check_scale("sigma", sigma)
    if prediction not in ("x0", "noise"):
        raise ValueError(f'prediction must be "x0" or "noise", got {prediction!r}')
    sigma = float(np.float32(sigma))
    if alphas_cumprod is None:
        level = np.float32(2 * sigma)
        return DiffusionDenoiser(model, sigma, level, 1.0, 1.0, prediction=prediction)
    a = np.asarray(alphas_cumprod, np.float64)
    if a.ndim != 1 or a.size == 0 or not np.all((a > 0) & (a < 1)) or np.any(np.diff(a) >= 0):
        raise ValueError(
            "alphas_cumprod must be decreasing numbers inside (0, 1), one for each timestep, got "
            f"shape {a.shape}"
        )
    ratios = np.sqrt((1 - a) / a)
    if not ratios[0] <= 2 * sigma <= ratios[-1]:
        raise ValueError(
            f"the schedule has noise levels {ratios[0] / 2:.4g} to {ratios[-1] / 2:.4g} in the "
            f"units of images in [0, 1], and none for sigma = {sigma:g}"
        )
    t = int(np.argmin(np.abs(np.log(ratios / (2 * sigma)))))
    gain = float(np.sqrt(1 - a[t]) / (2 * sigma))
    return DiffusionDenoiser(
        model, sigma, np.int32(t), gain, float(np.sqrt(a[t])), prediction=prediction
    )
