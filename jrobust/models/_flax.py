"""``network`` and ``bind``: Flax modules of either API, told apart. Imports flax when called."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from jrobust.models._network import Bound, Method, Network

_METHODS = [field.name for field in dataclasses.fields(Network)]


def network(module: Any) -> Network:
    """The :class:`Network` of a Flax module, Linen or nnx; equal modules give equal networks.

    The module maps a batch (B, ...) to logits (B, C). Its switch between training and evaluation
    may be an argument of ``__call__`` or a field of the module, under any of the names ``train``,
    ``training``, ``is_training``, ``deterministic`` and ``use_running_average``; each one
    present is set, in nnx on all submodules too. A module with no such switch computes the same
    function in both modes.

    ``params`` and ``extra`` are nested dicts of arrays. In Linen ``params`` is the collection of
    that name, in nnx all ``nnx.Param``, subclasses included, by path. ``extra`` holds all others
    by collection (``"batch_stats"``); arrays that are no ``nnx.Variable`` are under ``"arrays"``.
    An ``nnx.State`` of the same paths will do for ``params``.
    ``train_logits`` draws from the key it is given (in Linen as stream ``dropout``, and as
    ``params`` for all others; in nnx every stream has its own draws) and updates all of ``extra``;
    what else a pass changes is discarded, the module given is never touched. ``features`` holds
    the output of each submodule under its path (``"conv1"``, ``"stage1_block2/conv1"``,
    ``"layers/0"``) and each value sown into the intermediates under its name; what is produced
    several times in one pass ends in ``/0``, ``/1``, ... In nnx what runs inside of a
    transformation (``nnx.jit``, ``nnx.scan``) has no names.

    Args:
      module: one of

        * a Linen module: ``init`` draws its variables.
        * a callable of ``rngs`` that makes an nnx module, such as
          ``lambda rngs: Net(64, rngs=rngs)`` or ``functools.partial(Net, 64)``: ``init`` draws
          fresh variables by calling it with ``nnx.Rngs(key)``. Partials of equal arguments give
          equal networks, a lambda only the one it is.
        * an nnx module: ``init`` returns a copy of the values it has now, whatever the key, so that
          training goes on from them. Later changes of the module do not matter.
        * ``nnx.bridge.ToNNX`` of a Linen module, ``nnx.bridge.ToLinen`` of an nnx class: read
          as what is inside. Bridges inside of other modules must be switched by those.

    Raises ``TypeError`` where ``module`` is none of these or cannot be hashed, or an nnx module
    holds what is not an array; ``ImportError`` without flax. Calls in evaluation mode raise
    ``ValueError`` where the output of an nnx module depends on its random streams: see
    :func:`randomized` for models that stay random.
    """
    return _read(module)[0]


def bind(module: Any, variables: Any = None, *, dtype: DTypeLike | None = None) -> Bound:
    """The logits function of a module in evaluation mode, as a pytree.

    Args:
      module: a Flax module of either API, read as :func:`network` reads it: batch-norm uses its
        running averages, dropout is off.
      variables: its variables, a mapping with ``"params"`` and the other collections, as returned
        by ``module.init`` in Linen. For an nnx module its own values when None. They become the
        leaves of the result, so that it goes to jitted code as an argument: other variables of an
        equal module compile nothing new.
      dtype: compute in this floating-point type (``jnp.bfloat16``): floating variables and inputs
        are cast to it, logits come back as float32. For the search twin of a model only: whether
        an attack succeeded, and every vote of a certificate, is judged without it. Submodules
        that name a ``dtype`` of their own keep it.

    Raises ``TypeError`` where ``module`` is not a Flax module, ``variables`` is missing or not a
    mapping, or ``dtype`` is not floating; ``ValueError`` where ``variables`` lacks ``"params"``.
    """
    model, own = _read(module)
    from flax.core import meta

    name = type(module).__name__
    if variables is None and own is None:
        raise TypeError(
            f"bind needs the variables of {name}, since it does not hold them; pass what "
            "module.init returned, or {'params': params, 'batch_stats': ...}"
        )
    if variables is None:
        return model.bind(*own, dtype=dtype)
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be a mapping such as {'params': params, 'batch_stats': ...}, got "
            f"{type(variables).__name__}"
        )
    if "params" not in variables:
        raise ValueError(
            f"variables of {name} have no collection 'params', only {sorted(variables)}; if these "
            "are the parameters themselves pass {'params': params}"
        )
    extra = meta.unbox(dict(variables))  # of nn.Partitioned and its kin
    return model.bind(extra.pop("params"), extra, dtype=dtype)


def _network(adapter: Any, start: Any = None) -> Network:
    network = Network(*(Method(adapter, name) for name in _METHODS))
    return network if start is None else dataclasses.replace(network, init=Method(start, "init"))


def _read(module: Any) -> tuple[Network, Any]:
    """The network of ``module``, and ``(params, extra)`` where it holds them."""
    try:
        from flax import linen, nnx
    except ImportError as error:
        raise ImportError("binding a Flax module needs flax: pip install flax") from error
    from jrobust.models import _linen, _nnx

    if isinstance(module, type) and issubclass(module, linen.Module):
        raise TypeError(
            f"module must be an instance, got the class {module.__name__}; "
            f"write {module.__name__}(...)"
        )
    if isinstance(module, nnx.bridge.ToLinen):
        module = functools.partial(module.nnx_class, *module.args, **module.kwargs)
    if isinstance(module, linen.Module):
        return _network(_linen.Linen(module)), None
    if isinstance(module, nnx.Module):
        adapter: Any
        adapter, values = _nnx.read(module)
        if isinstance(module, nnx.bridge.ToNNX):
            adapter = _linen.Linen(module.to_nnx__module)
            if not values[0]:  # as Linen modules are: nothing drawn yet
                return _network(adapter), None
        return _network(adapter, _nnx.Values(values)), values
    if callable(module) and _takes_rngs(module):
        factory = _nnx.Factory.of(module)
        return _network(factory.adapter(), factory), None
    raise TypeError(
        "module must be a Flax module, Linen or nnx, or a callable of rngs that makes an nnx "
        f"module, got {type(module).__module__}.{type(module).__qualname__}; a plain function of "
        "x needs no binding"
    )


def _takes_rngs(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of some functions written in C
        return False
    return "rngs" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
