"""Transfer: points crafted on some models, measured on others."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrobust import _run, drive
from jrobust.attacks import Attack
from jrobust.attacks._base import check_batch, forward, succeeds
from jrobust.ensembles._ensemble import Ensemble, ensemble

Array = jax.Array


class Transfer(NamedTuple):
    """What points crafted on S source models do to V victims: a pytree of arrays.

    Attributes:
        x: (S, B, ...) the point that the attack returned on each source, whether it fooled the
            source or not.
        success: (S, V, B) bool, whether it fools the victim, by the rules of
            ``AttackResult.success``.
        before: (V, B) bool, whether the clean input already did.
    """

    x: Array
    success: Array
    before: Array

    def rates(self) -> Array:
        """(S, V): of the inputs that fooled the victim not before, the share that does after.

        NaN where there is no such input.
        """
        fair = ~self.before[None]
        return jnp.sum(self.success & fair, axis=-1) / jnp.sum(fair, axis=-1)


def _transfer(
    attack: Attack,
    key: Array,
    sources: Ensemble,
    victims: Ensemble,
    x: Array,
    y: Array,
    ids: Array,
    targets: Array | None,
) -> Transfer:
    found = sources.each(lambda model: attack(key, model, x, y, ids=ids, targets=targets).x)
    points = jnp.concatenate([x[None], found])
    aim = jnp.full_like(y, -1) if targets is None else targets

    def verdicts(model: Any) -> Array:
        return jax.lax.map(lambda point: succeeds(forward(model, point), y, aim), points)

    flags = victims.each(verdicts)  # (V, S + 1, B)
    return Transfer(found, jnp.swapaxes(flags[:, 1:], 0, 1), flags[:, 0])


_compiled = jax.jit(drive.rewrite(_transfer))


def transfer(
    attack: Attack,
    key: Array,
    sources: Any,
    victims: Any,
    x: Any,
    y: Any,
    *,
    ids: Any = None,
    targets: Any = None,
) -> Transfer:
    """Craft a point for every input on every source, and try each on every victim.

    The whole is one compiled program, and may be part of a larger one; inside of ``jit`` the values
    of the inputs are not checked. All sources share the random streams. Verdicts are those of a
    float32 forward pass at highest matmul precision. A black box as a victim is asked about
    ``result.x`` afterwards.

    Args:
        attack: any attack. One that stops at success returns points that just fool the source;
            ``keep="loss"`` or ``"last"`` goes on and transfers better.
        key: one typed key.
        sources: a list of models, or an :class:`Ensemble`, whose members are the sources. To attack
            an ensemble as one model, put it in a list.
        victims: the same for the models to be fooled.
        x, y, ids, targets: as in :func:`jrobust.run`; ``targets`` are classes.

    Raises:
        TypeError, ValueError: before any compute, as :func:`jrobust.run`, and where sources and
            victims tell different numbers of classes apart.
    """
    sources, victims = (m if isinstance(m, Ensemble) else ensemble(m) for m in (sources, victims))
    x, y, targets, ids = check_batch(x, y, targets, ids)
    given = attack, key, sources, victims, x, y, ids, targets
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        for model in _kinds(sources):
            _run.check(attack, key, model, x, y, ids, targets)
    classes = {_run.count_classes(model, x) for model in (*_kinds(sources), *_kinds(victims))}
    if len(classes) > 1:
        raise ValueError(f"the models must have the same classes, got {sorted(classes)} of them")
    return _compiled(_run.strong(attack), key, sources, victims, x, y, ids, targets)


def _kinds(models: Ensemble) -> tuple[Any, ...]:
    """One model of each architecture."""
    return models.models if type(models.models) is tuple else (models[0],)
