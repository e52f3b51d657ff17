"""The jitted entries: values are checked, scalars normalised, programs compiled once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrobust import drive
from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static
from jrobust.attacks import Attack, AttackResult, with_eps
from jrobust.attacks._base import LogitsFn, check_batch, check_labels

Array = jax.Array


@algorithm
class PlainFunction:
    """A plain function as a pytree without leaves: one trace for each function object."""

    fn: Any = static()

    def __call__(self, x: Array) -> Array:
        """Call the function."""
        return self.fn(x)


def as_pytree(logits_fn: LogitsFn) -> Any:
    """``logits_fn`` as something ``jit`` takes as an argument."""
    if not callable(logits_fn):
        raise TypeError(
            f"logits_fn must be callable, got {type(logits_fn).__name__}: bind variables to a "
            "module with jrobust.models.bind(module, variables)"
        )
    return PlainFunction(logits_fn) if jax.tree_util.all_leaves([logits_fn]) else logits_fn


def strong(tree: Any) -> Any:
    """Numbers as strong float32 arrays, so that int, float and numpy scalars do not retrace."""

    def normalised(leaf: Any) -> Any:
        array = jnp.asarray(leaf)
        number = jnp.issubdtype(array.dtype, jnp.integer) or not isinstance(leaf, jax.Array)
        number |= array.dtype == jnp.float64
        return jnp.asarray(array, jnp.float32 if number else array.dtype)

    return jax.tree.map(normalised, tree)


def _call(logits_fn: Any, x: Array) -> Any:
    return logits_fn(x)


def count_classes(logits_fn: LogitsFn, x: Array) -> int:
    """Number of classes, from shapes alone.

    Raises:
        ValueError, TypeError: unless ``logits_fn`` maps (B, ...) to (B, C) floats.
    """
    # A function of this module, so that JAX finds its trace of the same model again.
    out = jax.eval_shape(_call, as_pytree(logits_fn), x)
    if not hasattr(out, "shape") or len(out.shape) != 2 or out.shape[0] != x.shape[0]:
        raise ValueError(
            f"logits_fn must map x of shape {x.shape} to logits of shape ({x.shape[0]}, classes), "
            f"got {jax.tree.map(lambda a: a.shape, out)}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"logits_fn must return floating point logits, got {out.dtype}")
    if out.shape[1] < 2:
        raise ValueError(
            f"logits_fn returns {out.shape[1]} logit for each example, attacks need at least 2: "
            "for one logit z of a binary model return jnp.stack([-z, z], -1) / 2"
        )
    return out.shape[1]


def check(
    attack: Attack,
    key: Array,
    logits_fn: LogitsFn,
    x: Any,
    y: Any,
    ids: Any = None,
    targets: Any = None,
) -> tuple[Array, Array, Array | None, Array]:
    """Raise a clear error for any input that cannot be right; return (x, y, targets, ids)."""
    if not isinstance(attack, Attack):
        raise TypeError(
            f"expected an attack such as PGD(Linf(8/255)), got {attack!r}"
            + (": construct it first" if isinstance(attack, type) else "")
        )
    _keys.check(key)
    x, y, targets, ids = check_batch(x, y, targets, ids)
    for threat in attack.threats():
        threat.check(x)
    if drive.is_host(logits_fn):
        classes = int(np.iinfo(np.int32).max)
    else:
        classes = count_classes(logits_fn, x)
    check_labels("y", y, classes)
    if targets is not None:
        check_labels("targets", targets, classes)
        if np.any(np.asarray(targets) == np.asarray(y)):
            raise ValueError(
                "targets must differ from y: an example cannot be attacked towards its own label"
            )
    attack.check(x, y, classes, targets)
    return x, y, targets, ids


def _attack(
    attack: Attack, key: Array, logits_fn: Any, x: Array, y: Array, ids: Array, targets: Any
) -> AttackResult:
    return attack(key, logits_fn, x, y, ids=ids, targets=targets)


def _sweep(
    attack: Attack,
    eps: Array,
    key: Array,
    logits_fn: Any,
    x: Array,
    y: Array,
    ids: Array,
    targets: Any,
) -> AttackResult:
    return jax.vmap(
        lambda radius: _attack(with_eps(attack, radius), key, logits_fn, x, y, ids, targets)
    )(eps)


_run = jax.jit(drive.rewrite(_attack))
_run_sweep = jax.jit(drive.rewrite(_sweep))


def run(
    attack: Attack,
    key: Array,
    logits_fn: LogitsFn,
    x: Any,
    y: Any,
    *,
    ids: Any = None,
    targets: Any = None,
) -> AttackResult:
    """Attack a batch: check everything, compile once, run.

    One compilation serves all radii, step sizes, keys, parameters of a bound model and batches of
    one shape. A :class:`jrobust.drive.Host` model is stepped from Python instead.

    Args:
        attack: an attack, for instance ``PGD(Linf(8 / 255))``.
        key: one typed key (``jax.random.key``).
        logits_fn: (B, ...) -> (B, C). A pytree such as ``jrobust.models.bind(module, variables)``
            is an argument of the compiled program; a plain function costs a trace for each object.
        x: (B, ...) float32 inputs inside the threat model's box.
        y: (B,) integer true labels.
        ids: (B,) integer example ids, which select each example's random stream.
        targets: (B,) integer classes to reach; untargeted when None.

    Returns:
        AttackResult of arrays with leading axis B.

    Raises:
        TypeError, ValueError: before any compute, saying what was given and what was expected.
    """
    x, y, targets, ids = check(attack, key, logits_fn, x, y, ids, targets)
    attack = strong(attack)
    if drive.is_host(logits_fn):
        return attack(key, logits_fn, x, y, ids=ids, targets=targets)
    return _run(attack, key, as_pytree(logits_fn), x, y, ids, targets)


def sweep(
    attack: Attack,
    key: Array,
    logits_fn: LogitsFn,
    x: Any,
    y: Any,
    eps: Any,
    *,
    ids: Any = None,
    targets: Any = None,
) -> AttackResult:
    """Attack a batch at every radius of ``eps`` (E,) in one compiled, vmapped program.

    Args:
        attack: any attack; its own radius is replaced, step sizes relative to it follow.
        eps: (E,) radii in the units of x.
        key, logits_fn, x, y, ids, targets: as in :func:`run`. All radii share the random streams.

    Returns:
        AttackResult of arrays with leading axes (E, B).
    """
    eps = np.asarray(eps, np.float32)
    if eps.ndim != 1 or eps.size == 0:
        raise ValueError(f"eps must be a one-dimensional list of radii, got shape {eps.shape}")
    if drive.is_host(logits_fn):
        raise TypeError("a Host model cannot be vmapped: call jrobust.run once for each radius")
    x, y, targets, ids = check(attack, key, logits_fn, x, y, ids, targets)
    for radius in eps:
        for threat in with_eps(attack, float(radius)).threats():
            threat.check(x)
    return _run_sweep(
        strong(attack), jnp.asarray(eps), key, as_pytree(logits_fn), x, y, ids, targets
    )
