"""Models that stay outside of JAX, with their gradients."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HostModel:
    """A logits function whose values and gradients come from the host; see :func:`from_host`.

    A pytree without leaves. Equal where ``forward`` and ``vjp`` are.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    vjp: Callable[[np.ndarray, np.ndarray], np.ndarray]
    classes: int

    def __call__(self, x: Array) -> Array:
        """Logits (B, classes) float32 of ``x`` (B, ...)."""
        return _logits(self, x)


def _on_host(fn: Callable[..., np.ndarray], result: Any, x: Array, *rest: Array) -> Array:
    rank = x.ndim

    def call(*arguments: Any) -> np.ndarray:
        # vmap puts its axes in front; rows are independent, so they become more rows.
        arrays = [np.asarray(a, np.float32) for a in arguments]
        extra = arrays[0].ndim - rank
        lead = arrays[0].shape[: extra + 1]
        flat = [np.ascontiguousarray(a.reshape(-1, *a.shape[extra + 1 :])) for a in arrays]
        out = np.asarray(fn(*flat), np.float32)
        if out.shape != (len(flat[0]), *result.shape[1:]):
            name = getattr(fn, "__name__", "the model")
            raise ValueError(
                f"{name} returned shape {out.shape} for {len(flat[0])} rows, expected "
                f"{(len(flat[0]), *result.shape[1:])}"
            )
        return out.reshape(*lead, *out.shape[1:])

    return jax.pure_callback(call, result, x, *rest, vmap_method="broadcast_all")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(model: HostModel, x: Array) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], model.classes), jnp.float32)
    return _on_host(model.forward, result, x)


def _forward(model: HostModel, x: Array) -> tuple[Array, Array]:
    return _logits(model, x), x


def _backward(model: HostModel, x: Array, cotangent: Array) -> tuple[Array]:
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return (_on_host(model.vjp, result, x, cotangent).astype(x.dtype),)


_logits.defvjp(_forward, _backward)


def from_host(
    forward: Callable[[np.ndarray], np.ndarray],
    vjp: Callable[[np.ndarray, np.ndarray], np.ndarray],
    classes: int,
) -> HostModel:
    """A model that runs outside of JAX as a logits function with gradients.

    Every attack, objective and certificate takes it, inside ``jit``, ``grad``, ``vmap`` and loops;
    the two functions are called on the host through ``jax.pure_callback``. They must be
    deterministic and treat rows independently: calls may be repeated, dropped or batched.
    A black box whose queries are counted belongs in :class:`jrobust.drive.Host` instead.

    Args:
      forward: inputs (N, ...) to logits (N, classes), float32 arrays of NumPy.
      vjp: inputs (N, ...) and cotangents (N, classes) to the gradient (N, ...) of the sum of their
        product with the logits.
      classes: number of logits.

    Raises ``TypeError`` where they are not callable, ``ValueError`` where ``classes`` is not
    positive.
    """
    for name, fn in (("forward", forward), ("vjp", vjp)):
        if not callable(fn):
            raise TypeError(f"{name} must be a function of arrays, got {type(fn).__name__}")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes must be a positive int, got {classes!r}")
    return HostModel(forward, vjp, classes)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ImportError("from_torch_module needs torch: pip install torch") from error


@dataclasses.dataclass(frozen=True, eq=False)
class _Torch:
    """A PyTorch module as functions of NumPy arrays."""

    module: Any
    channels_last: bool

    def _input(self, x: np.ndarray) -> Any:
        if any(part.training for part in self.module.modules()):
            raise ValueError(
                "the module is in training mode, where its logits depend on the batch or on "
                "chance; call module.eval()"
            )
        first = next(self.module.parameters(), None)
        inputs = _torch().from_numpy(np.array(x))  # writable, and torch's own
        if self.channels_last and x.ndim == 4:
            inputs = inputs.permute(0, 3, 1, 2).contiguous()
        return inputs if first is None else inputs.to(first.device, first.dtype)

    def forward(self, x: np.ndarray) -> np.ndarray:
        with _torch().no_grad():
            return self.module(self._input(x)).float().cpu().numpy()

    def vjp(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        torch = _torch()
        with torch.enable_grad():
            inputs = self._input(x).requires_grad_()
            logits = self.module(inputs)
            weight = torch.from_numpy(np.array(cotangent)).to(logits.device, logits.dtype)
            # With respect to the input alone: the module's own .grad stays as it is.
            (gradient,) = torch.autograd.grad(logits, inputs, weight)
        if self.channels_last and gradient.ndim == 4:
            gradient = gradient.permute(0, 2, 3, 1)
        return gradient.float().cpu().numpy()


def from_torch_module(module: Any, x: Any, *, channels_last: bool = True) -> HostModel:
    """A live PyTorch module as a logits function with gradients, so that it can stay in PyTorch.

    It is called as it is at the moment of the call, on the device of its parameters, and its
    ``.grad`` are not touched. A gradient costs two passes forward and one back, since PyTorch's
    graph cannot wait between the calls. See :func:`from_host`.

    Args:
      module: a ``torch.nn.Module`` in evaluation mode, inputs (B, ...) to logits (B, C).
      x: a batch of inputs, to learn the number of classes from the first of them.
      channels_last: inputs of rank 4 come as (B, H, W, channels) and reach the module as (B,
        channels, H, W).

    Raises ``ValueError`` where the module is in training mode or does not return (B, C);
    ``TypeError`` where it is no PyTorch module; ``ImportError`` without torch.
    """
    if not isinstance(module, _torch().nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    host = _Torch(module, channels_last)
    logits = host.forward(np.asarray(x[:1], np.float32))
    if logits.ndim != 2:
        raise ValueError(f"the module returned shape {logits.shape} for one input, expected (1, C)")
    return from_host(host.forward, host.vjp, logits.shape[1])
