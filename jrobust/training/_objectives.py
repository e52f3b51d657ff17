"""Standard training, adversarial training and TRADES."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import losses
from jrobust._algorithm import algorithm, static
from jrobust.attacks import Attack, GradientAttack
from jrobust.models import Network
from jrobust.training._step import Batch, Metrics

Array = jax.Array


def _mean(values: Array, mask: Array) -> Array:
    """The mean over the rows that count."""
    total = jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1)


def _hard(y: Array) -> Array:
    """Integer labels; the most probable class of soft ones."""
    return jnp.argmax(y, -1) if y.ndim == 2 else y


def _accuracy(logits: Array, batch: Batch) -> Array:
    return _mean(jnp.argmax(logits, -1) == _hard(batch.y), batch.mask)


def _keys_of(key: Array, batch: Batch) -> tuple[Array, Array]:
    """Separate keys for the model's own randomness and for the examples' noise."""
    # Dropout draws by position: parts of one batch, on other devices or one after the other, must
    # not share its key.
    dropout = jax.random.fold_in(jax.random.fold_in(key, 0), batch.id[0].astype(jnp.uint32))
    return dropout, jax.random.fold_in(key, 1)


def _check_attack(attack: Attack) -> None:
    if not isinstance(attack, Attack):
        raise TypeError(f"expected an attack such as PGD(Linf(8/255)), got {attack!r}")
    if attack.stops_at_success:
        raise ValueError(
            f"{type(attack).__name__} stops at the first success, so training would see points "
            "weaker than the attack's radius and steps say: set keep='last' or keep='loss'"
        )


def adversarial_examples(
    key: Array, attack: Attack, network: Network, params: Any, extra: Any, batch: Batch
) -> Array:
    """Attack the model in evaluation mode; no gradient flows through the points (B, ...) found.

    Args:
        key: one typed key; an example's noise depends on it and on the example's id.
        attack: runs all its steps.
        network, params, extra: the model.
        batch: soft labels are attacked as their most probable class.

    Raises:
        TypeError: if ``attack`` is not an attack.
        ValueError: if the attack stops at the first success, which would train on weaker points
            than the attack's name promises.
    """
    _check_attack(attack)
    model = network.bind(jax.lax.stop_gradient(params), jax.lax.stop_gradient(extra))
    found = attack(key, model, batch.x, _hard(batch.y), ids=batch.id)
    return jax.lax.stop_gradient(found.x)


@algorithm
class Standard:
    """Empirical risk: the mean ``loss`` of clean inputs.

    Args:
        loss: ``loss(logits, y) -> (B,)``; the cross entropy takes soft labels too.
    """

    loss: losses.Loss = static(default=losses.cross_entropy)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``accuracy`` on the training forward pass."""
        dropout, _ = _keys_of(key, batch)
        logits, extra = network.train_logits(params, extra, dropout, batch.x)
        value = _mean(self.loss(logits, batch.y), batch.mask)
        return value, (extra, {"accuracy": _accuracy(logits, batch)})


@algorithm
class Adversarial:
    """Adversarial training (Madry et al. 2018, eq. 2.1): the loss at the attack's points.

    The attack sees the model in evaluation mode; batch-norm statistics are updated by the training
    forward pass on adversarial inputs alone.

    Args:
        attack: a threat model's attack that runs all its steps, for instance
            ``PGD(Linf(8 / 255), steps=10, step_size=2 / 255, keep="last")``.
        loss: ``loss(logits, y) -> (B,)`` that the parameters descend.
    """

    attack: Attack
    loss: losses.Loss = static(default=losses.cross_entropy)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where the attack's settings make no sense for ``x``; see :class:`Objective`."""
        _check_attack(self.attack)
        self.attack.check(x, y, classes)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``robust_accuracy`` on the training forward pass."""
        dropout, noise = _keys_of(key, batch)
        x = adversarial_examples(noise, self.attack, network, params, extra, batch)
        logits, extra = network.train_logits(params, extra, dropout, x)
        value = _mean(self.loss(logits, batch.y), batch.mask)
        return value, (extra, {"robust_accuracy": _accuracy(logits, batch)})


@algorithm
class TRADES:
    """TRADES (Zhang et al. 2019, eq. 5 and algorithm 1): clean loss plus ``beta`` times KL.

    ``CE(f(x), y) + beta KL(softmax f(x) || softmax f(x'))``, where ``x'`` maximises the same KL
    in evaluation mode, the clean prediction held fixed. Gradients flow through both predictions.
    Batch-norm statistics are updated by the clean pass, then by the adversarial one; both drop the
    same units, so that the KL measures the perturbation alone.

    Args:
        attack: a gradient attack that runs all its steps from a random start (the KL has no
            gradient at the clean input); its loss is replaced by the KL. Published for CIFAR-10:
            ``PGD(Linf(0.031), steps=10, step_size=0.007, gaussian_start=1e-3, keep="last")``.
        beta: weight of the KL, ``1 / lambda`` of the paper, >= 0; 6 as published.
    """

    attack: GradientAttack
    beta: Any = 6.0

    def _check_attack(self) -> None:
        _check_attack(self.attack)
        if not isinstance(self.attack, GradientAttack):
            raise TypeError(
                "TRADES replaces the loss of its attack, so it takes a single gradient attack such "
                f"as PGD, got {type(self.attack).__name__}"
            )
        if not self.attack.random_start:
            raise ValueError(
                "the KL of TRADES has no gradient at the clean input, so an attack that starts "
                "there stays there: set random_start=True"
            )

    def check(self, x: Array, y: Array, classes: int) -> None:
        """Raise where a setting makes no sense for ``x``; see :class:`Objective`."""
        self._check_attack()
        self.attack.check(x, y, classes)
        if not 0 <= float(self.beta) < math.inf:
            raise ValueError(f"TRADES.beta must be finite and not negative, got {self.beta}")

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """See :class:`Objective`. Metrics: ``accuracy``, ``robust_accuracy`` and ``kl``."""
        self._check_attack()
        dropout, noise = _keys_of(key, batch)
        held = jax.lax.stop_gradient((params, extra))
        clean = network.logits(*held, batch.x)
        attack: GradientAttack = dataclasses.replace(
            self.attack,  # type: ignore[type-var]
            loss=lambda logits, y: losses.kl(logits, clean),
        )
        x = adversarial_examples(noise, attack, network, params, extra, batch)
        logits, extra = network.train_logits(params, extra, dropout, batch.x)
        moved, extra = network.train_logits(params, extra, dropout, x)
        divergence = _mean(losses.kl(moved, logits), batch.mask)
        value = _mean(losses.cross_entropy(logits, batch.y), batch.mask)
        metrics = {
            "accuracy": _accuracy(logits, batch),
            "robust_accuracy": _accuracy(moved, batch),
            "kl": divergence,
        }
        return value + self.beta * divergence, (extra, metrics)
