"""Signs that an evaluation says more about its attacks than about the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import keys as _keys
from jrobust import losses
from jrobust._inspect import inspect
from jrobust.attacks import PGD, Attack
from jrobust.attacks._base import forward
from jrobust.loops._folder import Arrays
from jrobust.models import Randomized
from jrobust.statistics import clopper_pearson_lower, clopper_pearson_upper
from jrobust.threat import Threat

# When a warning is given, as shares of the examples looked at unless said.
ZERO_GRADIENT = 0.02  # with a loss that does not move with the input
UNSTABLE = 0.1  # whose loss does not rise as the gradient says
FORESEEN = 0.25  # share of the foreseen rise that has to be there
STILL_RISING = 0.1  # share of an attack's gain that its last fifth may bring
UNBREAKABLE = 0.02  # that stand even where any input is allowed
QUERIES_WIN = 0.002  # of all examples, broken only by an attack without gradients
FEW_STEPS = 20  # below which an attack proves little
ONE_SIDED = 0.01  # points that fool the searched model alone


class Doubt(NamedTuple):
    """A reason to doubt a robust accuracy.

    Attributes:
        kind: its name, such as ``"zero gradients"``.
        message: what was found, with numbers.
        remedy: what to do about it.
    """

    kind: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}. Remedy: {self.remedy}."


class ReliabilityWarning(UserWarning):
    """An evaluation may flatter the model; see :class:`Doubt`."""


class Signs(NamedTuple):
    """What a model shows at some inputs; rows are examples."""

    probabilities: jax.Array  # (B,) bool: logits that lie in [0, 1] and sum to 1
    flat: jax.Array  # (B,) bool: no loss has a gradient other than zero
    foreseen: jax.Array  # (B,) rise of the loss that the gradient foresees for a small step
    rise: jax.Array  # (B,) the rise there is


def signs(
    threat: Threat, key: jax.Array, model: Any, x: jax.Array, y: jax.Array, ids: jax.Array
) -> Signs:
    """Forward, gradients of two losses, and the loss a twentieth of the radius further."""
    if isinstance(model, Randomized):
        model = model.at(_keys.examples(key, ids))

    def loss(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = forward(model, x)
        value = losses.margin(logits, y)
        return jnp.sum(value), (value, logits)

    gradient, (value, logits) = jax.grad(loss, has_aux=True)(x)
    other = jax.grad(lambda x: jnp.sum(losses.cross_entropy(forward(model, x), y)))(x)
    axes = tuple(range(1, x.ndim))
    inside = jnp.all((logits >= 0) & (logits <= 1), -1)
    threat = threat.batched(x)
    moved = threat.ascend(x, x, gradient, threat.eps / 20)
    return Signs(
        probabilities=inside & (jnp.abs(jnp.sum(logits, -1) - 1) < 1e-5),
        flat=jnp.all((gradient == 0) & (other == 0), axes),
        foreseen=jnp.sum(gradient * (moved - x), axes),
        rise=losses.margin(forward(model, moved), y) - value,
    )


def members(attack: Any) -> list[Attack]:
    """The single attacks that an attack is made of."""
    inner = getattr(attack, "attacks", None) or getattr(attack, "attack", None)
    if inner is None:
        return [attack]
    several = inner if isinstance(inner, tuple) else (inner,)
    return [member for one in several for member in members(one)]


def paced(attack: Any, eps: float) -> Any:
    """``attack`` with what its steps are in the units of x scaled as its radius will be to ``eps``.

    Steps of 2 / 255 would not get far from the input, whatever the model.
    """

    def one(part: Any) -> Any:
        if not isinstance(part, PGD) or part.step_size is None:
            return part
        own = jnp.asarray(part.threat.eps)
        factor = jnp.where(own > 0, eps / jnp.where(own > 0, own, 1.0), 1.0)
        return dataclasses.replace(part, step_size=factor * part.step_size)

    return jax.tree.map(one, attack, is_leaf=lambda part: isinstance(part, PGD))


def needs_gradients(attack: Any) -> bool:
    """Whether an attack differentiates the model."""
    kinds = ("queries", "estimator")
    return any(all(getattr(one, kind, None) is None for kind in kinds) for one in members(attack))


def of_settings(attacks: Mapping[str, Attack]) -> list[Doubt]:
    """What can be said of the settings alone."""
    found = []
    steps = [
        (name, getattr(one, "steps", None)) for name in attacks for one in members(attacks[name])
    ]
    few = [f"{name} ({n})" for name, n in steps if isinstance(n, int) and n < FEW_STEPS]
    if few:
        found.append(
            Doubt(
                "few steps",
                f"attacks of less than {FEW_STEPS} steps: {', '.join(few)}",
                "take 100 steps for a number to publish, or attacks.AutoAttack(threat)",
            )
        )
    return found


def of_program(model: Any, x: np.ndarray) -> list[Doubt]:
    """What :func:`jrobust.inspect` warns of in a model's program; ``x`` (B, ...) are inputs."""
    doubts = []
    for finding in inspect(model, x).findings:
        if finding.severity != "info":
            place = f" [{finding.where}]" if finding.where is not None else ""
            doubts.append(
                Doubt(finding.kind, f"{finding.what}{place}: {finding.effect}", finding.remedy)
            )
    return doubts


def of_signs(found: Arrays) -> list[Doubt]:
    """What the model's outputs and gradients say: fields of :class:`Signs` at correct examples."""
    doubts = []
    total = len(found["flat"])
    if np.all(found["probabilities"]):
        doubts.append(
            Doubt(
                "probabilities",
                "the model returns probabilities, not logits: rows lie in [0, 1] and sum to 1",
                "return what goes into the softmax; losses saturate on what comes out of it",
            )
        )
    flat = found["flat"]
    if np.mean(flat) > ZERO_GRADIENT:
        doubts.append(
            Doubt(
                "zero gradients",
                f"{flat.sum()} of {total} examples have a gradient of zero in cross-entropy and "
                "margin: gradient attacks cannot move there",
                "look at jrobust.inspect(model, x); attack models.straight_through(model), or "
                "trust attacks without gradients (Square) only",
            )
        )
    moved = ~flat & (found["foreseen"] > 0)
    unstable = moved & (found["rise"] < FORESEEN * found["foreseen"])
    if moved.any() and unstable.sum() > UNSTABLE * moved.sum():
        doubts.append(
            Doubt(
                "unstable gradients",
                f"at {unstable.sum()} of {moved.sum()} examples the loss does not rise by even "
                f"{FORESEEN:.0%} of what its gradient foresees for a twentieth of the radius",
                "average gradients over draws (models.randomized), smooth the model for the "
                "search (models.bpda), or trust attacks without gradients only",
            )
        )
    return doubts


def of_attack(name: str, found: Arrays) -> list[Doubt]:
    """What one attack shows at examples that stand.

    ``start_loss``, ``most_loss``, ``end_loss`` (n,) are its best losses at the first point, after
    4/5 of its steps (where it ascends one from step to step) and at its end; ``free_success`` is
    its outcome where every input is allowed.
    """
    doubts = []
    losses = [
        found[f"{stage}_loss"] for stage in ("start", "most", "end") if f"{stage}_loss" in found
    ]
    start, *middle, end = (
        loss[~found["end_success"] & np.all(np.isfinite(losses), 0)] for loss in losses
    )
    gain, late = end - start, end - (middle[0] if middle else end)
    if gain.sum() > 0 and late.sum() > STILL_RISING * gain.sum():
        doubts.append(
            Doubt(
                "incomplete optimisation",
                f"{name}: the last fifth of the steps brings {late.sum() / gain.sum():.0%} of the "
                f"gain in loss at the {len(gain)} examples that stand",
                "take more steps, or APGD, which settles its step size itself",
            )
        )
    missed = ~found["free_success"]
    if np.mean(missed) > UNBREAKABLE:
        doubts.append(
            Doubt(
                "unbounded attack fails",
                f"{name}: {missed.sum()} of {len(missed)} examples stand even where every input of "
                "the box is allowed",
                "the attack does not work on this model, whose true robustness is lower: look at "
                "jrobust.inspect(model, x), take other losses, or attacks without gradients",
            )
        )
    return doubts


def of_course(
    attacks: Mapping[str, Attack], standing: list[int], total: int, near_ties: int, alone: int
) -> list[Doubt]:
    """What the course of the evaluation says; ``standing`` before the first and after each."""
    doubts = []
    white = False
    for name, attack, had, has in zip(attacks, attacks.values(), standing, standing[1:]):
        if white and not needs_gradients(attack) and had - has > QUERIES_WIN * total:
            doubts.append(
                Doubt(
                    "queries win",
                    f"{name}, which uses no gradients, breaks {had - has} examples that attacks "
                    "with gradients before it did not",
                    "the gradients mislead: look at jrobust.inspect(model, x), and give the "
                    "attack without gradients more queries and restarts",
                )
            )
        white = white or needs_gradients(attack)
    if near_ties > ONE_SIDED * total:
        doubts.append(
            Doubt(
                "near ties",
                f"{near_ties} points that an attack broke were classified correctly by another "
                "program of the same model",
                "the model depends on rounding, on the batch or on hidden state: check "
                "jrobust.inspect(model, x)",
            )
        )
    if alone > ONE_SIDED * total:
        doubts.append(
            Doubt(
                "search model differs",
                f"{alone} points fool search_fn alone: the search was led astray there",
                "search with the model itself, or in a precision nearer to it",
            )
        )
    return doubts


def redrawn(right: int, draws: int, alpha: float) -> tuple[float, float, float]:
    """(estimate, lower, upper) of the mean of ``draws`` chances, of which ``right`` came true."""
    lower = min(float(clopper_pearson_lower(right, draws, alpha / 2)), max(right - 1, 0) / draws)
    upper = max(
        float(clopper_pearson_upper(right, draws, alpha / 2)), min(right + 1, draws) / draws
    )
    return right / draws, lower, upper


def of_draws(robust: float, right: int, draws: int) -> list[Doubt]:
    """What fresh draws of a randomised model say; ``robust`` is its accuracy by its votes."""
    estimate, _, upper = redrawn(right, draws, 0.05)
    if robust <= upper:
        return []
    return [
        Doubt(
            "single draws differ",
            f"{robust:.2%} stand by vote, but {right} of {draws} fresh draws at the points that "
            f"attacks returned are right: {estimate:.2%}, with 95% confidence at most {upper:.2%}",
            "publish report.redrawn_accuracy() of a model that answers from one draw; of one that "
            "answers by vote, say of how many",
        )
    ]
