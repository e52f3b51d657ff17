"""Objectives whose numbers change over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust._algorithm import algorithm, static
from jrobust.models import Network
from jrobust.training._step import Batch, Metrics, Objective, State, current

Array = jax.Array

# Steps whose values describe a schedule in a report.
_SHOWN = np.array([0, 1, 10, 100, 1_000, 10_000, 100_000])

# Steps among which its lowest and highest values are looked for: each of the first hundreds, then
# one in about 600 of those before it, up to ten million.
_TRIED = np.unique(np.geomspace(1, 1e7, 10_000).astype(np.int32)) - 1


class _Curve:
    """A schedule and the number that it is for, printed by its values: lambdas have no names."""

    def __init__(self, name: str, fn: Callable[[Array], Any]) -> None:
        if not callable(fn):
            raise TypeError(
                f"the schedule of {name} must be a function of the step, such as "
                f"optax.linear_schedule(0.0, 0.5, 1000), got {fn!r}"
            )
        self.name, self.fn = name, fn

    def __call__(self, step: Array) -> Array:
        value = jnp.asarray(self.fn(step), jnp.float32)
        if value.shape:
            raise ValueError(
                f"the schedule of {self.name} must return one number, got shape {value.shape}"
            )
        return value

    def values(self, steps: np.ndarray) -> np.ndarray:
        # Through a lambda, for JAX prints what it compiles.
        each = jax.jit(jax.vmap(lambda step: self(step)))
        return np.asarray(each(jnp.asarray(steps, jnp.int32)))

    def __repr__(self) -> str:
        try:
            pairs = zip(self.values(_SHOWN), _SHOWN)
        except jax.errors.TracerArrayConversionError:  # while something is traced
            return self.name
        return f"{self.name}: " + ", ".join(f"{value:g} at step {step}" for value, step in pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Curve) and (self.name, self.fn) == (other.name, other.fn)

    def __hash__(self) -> int:
        return hash((self.name, self.fn))


@algorithm
class Scheduled:
    """An objective some of whose numbers are functions of the step.

    Update ``t``, counted from 0, minimises ``objective`` with the values of the schedules at ``t``.
    They are traced: one compiled update serves all steps, and since they follow from the step
    alone, a run that is resumed goes on with them. Reports print every schedule by its values.

    Args:
        objective: what to minimise.
        schedules: from the names of its numbers, written as their attributes are, such as
            ``"beta"`` or ``"attack.threat.eps"``, to optax schedules: functions of the step, a ()
            int32 array, that return one number. Values are rounded to float32.

    Raises:
        TypeError: if ``schedules`` does not map names to functions.
        ValueError: in ``check`` and in an update, for a name that is none of the objective's
            numbers, and a schedule that returns more than one number.

    Examples:
        >>> import optax
        >>> from jrobust import attacks, threat, training
        >>> attack = attacks.PGD(threat.Linf(8 / 255), steps=7, keep="last")
        >>> warm = optax.linear_schedule(0.0, 8 / 255, 1000)
        >>> objective = training.Scheduled(
        ...     training.Adversarial(attack), {"attack.threat.eps": warm}
        ... )
    """

    objective: Objective
    schedules: Any = static()

    def __post_init__(self) -> None:
        given = self.schedules
        if isinstance(given, Mapping):
            # Not a dict, for what is static is hashed.
            curves = tuple(_Curve(name, fn) for name, fn in sorted(given.items()))
            object.__setattr__(self, "schedules", curves)
        elif not isinstance(given, tuple) or not all(isinstance(one, _Curve) for one in given):
            raise TypeError(
                "schedules must map names of numbers to functions of the step, such as "
                f'{{"beta": optax.linear_schedule(0.0, 6.0, 1000)}}, got {given!r}'
            )

    def _with(self, numbers: Mapping[str, Any]) -> Objective:
        """The objective with these in the places of its own, by their names."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(self.objective)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        own = [name for name, (_, leaf) in zip(names, leaves) if _is_number(leaf)]
        for name in numbers:
            if name not in own:
                raise ValueError(
                    f"{type(self.objective).__name__} has no number {name!r} to schedule; it has: "
                    f"{', '.join(own) or 'none'}"
                )
        values = [numbers.get(name, leaf) for name, (_, leaf) in zip(names, leaves)]
        return jax.tree.unflatten(treedef, values)

    def check(self, x: Array, y: Array, classes: int) -> None:
        """See :class:`Objective`; looks at the lowest and the highest values of the schedules.

        Over the first ten million steps, of which it tries ten thousand: all at first, then ever
        fewer. Raises ``ValueError`` for values that are not finite, too.
        """
        found = {curve.name: curve.values(_TRIED) for curve in self.schedules}
        for name, values in found.items():
            if not np.all(np.isfinite(values)):
                first = int(np.argmin(np.isfinite(values)))
                raise ValueError(
                    f"the schedule of {name} is {values[first]} at step {_TRIED[first]}"
                )
        for end in (np.min, np.max):
            objective = self._with({name: float(end(values)) for name, values in found.items()})
            if hasattr(objective, "check"):
                objective.check(x, y, classes)

    def at_step(self, state: State) -> Objective:
        """See :class:`Objective`."""
        values = {curve.name: curve(state.step) for curve in self.schedules}
        return current(self._with(values), state)

    def __call__(
        self, key: Array, network: Network, params: Any, extra: Any, batch: Batch
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """Raises ``TypeError``: what to minimise depends on the step, so see :meth:`at_step`."""
        raise TypeError(
            "Scheduled is no objective until a step is known: training.step finds it wherever it "
            "is in a pytree; elsewhere call its at_step(state)"
        )


def _is_number(leaf: Any) -> bool:
    kinds = (int, float, np.generic, np.ndarray, jax.Array)
    return isinstance(leaf, kinds) and np.ndim(leaf) == 0
