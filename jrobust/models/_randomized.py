"""Models that draw random numbers: per-example keys in, expectations over draws out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrobust import keys as _keys
from jrobust._algorithm import algorithm, static

Array = jax.Array


@algorithm
class Randomized:
    """A randomised model as a logits function; see :func:`randomized`."""

    fn: Any  # a pytree
    key: Array
    samples: int = static(default=10)
    votes: int = static(default=30)

    def __call__(self, x: Array) -> Array:
        """Log of the mean probabilities over ``votes`` fixed draws, (B, ...) -> (B, C) float32.

        The draws come from ``key`` alone and are the same for every row: a deterministic model,
        whose prediction is the class that is most probable over the draws. Where the logits of
        some draw are not finite, the row is NaN.
        """

        def vote(i: Array) -> Array:
            keys = jnp.broadcast_to(jax.random.fold_in(self.key, i), x.shape[:1])
            logits = self.fn(keys, x).astype(jnp.float32)
            finite = jnp.all(jnp.isfinite(logits), axis=-1, keepdims=True)
            return jnp.where(finite, jax.nn.log_softmax(logits), jnp.nan)

        votes = jax.lax.map(vote, jnp.arange(self.votes))
        return jax.nn.logsumexp(votes, axis=0) - jnp.log(self.votes)

    def draws(self, keys: Array, x: Array) -> Array:
        """Logits of ``samples`` independent draws of each row, (samples, B, C).

        Draw j of a row uses ``fold_in`` of the row's key and j.

        Args:
            keys: (B,) typed keys, one for each row.
            x: (B, ...) inputs.
        """
        _check(keys, x)
        return jax.vmap(lambda j: self.fn(_keys.fold(keys, j), x))(jnp.arange(self.samples))

    def at(self, keys: Array) -> Drawn:
        """The logits function of one fixed draw for each row: row b draws from ``keys[b]``.

        Under keys that no attack has seen, ``jrobust.keys.examples(fresh, ids)``, its accuracy is
        an unbiased estimate of the expected accuracy of the randomised model.
        """
        return Drawn(self.fn, keys)


@algorithm
class Drawn:
    """A randomised model with the draws of its rows fixed; see :meth:`Randomized.at`."""

    fn: Any
    keys: Array

    def __call__(self, x: Array) -> Array:
        """Logits (B, C) of ``x`` (B, ...); raises ``ValueError`` unless there are B keys."""
        _check(self.keys, x)
        return self.fn(self.keys, x)


def _check(keys: Array, x: Array) -> None:
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != x.shape[:1]:
        raise ValueError(
            f"keys must be typed keys of shape {x.shape[:1]}, one for each row of x, got "
            f"{keys.dtype} of shape {keys.shape}; jrobust.keys.examples(key, ids) makes them"
        )


def randomized(
    fn: Callable[[Array, Array], Array], key: Array, *, samples: int = 10, votes: int = 30
) -> Randomized:
    """A model that draws random numbers, in the place of ``logits_fn``.

    Gradient attacks recognise it and use it in two ways.

    * The search ascends the expected loss (expectation over transformation, Athalye et al. 2018):
      at every step the mean loss over ``samples`` fresh draws, which come from the example's own
      key, restart and step, so that they depend neither on the batch nor on interruption.
    * The verdict, whether a point succeeds, is that of ``model(x)``: the class of highest mean
      probability over ``votes`` fixed draws. A verdict on the fresh draws would count any lucky
      draw on the way as a success and flatter the attack.

    Everything else takes it for the deterministic model ``model(x)``. Costs are counted in passes
    through ``fn``: a step takes ``samples + votes`` forward and ``samples`` backward passes.

    Args:
        fn: ``fn(keys, x)``: (B,) typed keys and (B, ...) inputs to logits (B, C); row b draws from
            ``keys[b]`` alone and depends on no other row. A pytree, such as
            ``jax.tree_util.Partial(f, bound)`` of ``f(bound, keys, x)``, is an argument of compiled
            code; a plain function costs a trace for each function object.
        key: one typed key, the source of the fixed draws.
        samples: fresh draws at each step of an attack.
        votes: fixed draws behind ``model(x)``.

    Raises:
        TypeError: ``fn`` is not callable or ``key`` not a typed key.
        ValueError: ``samples`` or ``votes`` is not a positive int.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of (keys, x), got {type(fn).__name__}")
    _keys.check(key)
    for name, value in (("samples", samples), ("votes", votes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if jax.tree_util.all_leaves([fn]):
        fn = jax.tree_util.Partial(fn)
    return Randomized(fn, key, samples=samples, votes=votes)
