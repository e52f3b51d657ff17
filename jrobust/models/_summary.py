"""What a model consists of, by layer, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrobust.models._network import Bound, Method, Network

Array = jax.Array


class Layer(NamedTuple):
    """One layer of a :class:`Summary`.

    Attributes:
      name: its path.
      output: shape of what it returns, None where that is not known.
      shapes: shapes of its own parameters by name.
      parameters: their number.
    """

    name: str
    output: tuple[int, ...] | None
    shapes: dict[str, tuple[int, ...]]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Layers and sizes of a model; ``str`` and ``print`` show a table.

    Attributes:
      layers: in the order in which they finish, then those whose output is not known.
      logits: shape of the logits.
      parameters: number of parameters.
      extra: number of other values, such as batch-norm statistics.
    """

    layers: tuple[Layer, ...]
    logits: tuple[int, ...]
    parameters: int
    extra: int

    def __str__(self) -> str:
        rows = [("layer", "output", "parameters", "number")]
        for layer in self.layers:
            shapes = ", ".join(f"{name} {shape}" for name, shape in layer.shapes.items())
            output = "" if layer.output is None else str(layer.output)
            rows.append((layer.name, output, shapes, f"{layer.parameters:,}"))
        other = f"and {self.extra:,} other values" if self.extra else ""
        rows.append(("total", str(self.logits), other, f"{self.parameters:,}"))
        wide = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join((*(cell.ljust(n) for cell, n in zip(row[:3], wide)), row[3].rjust(wide[3])))
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join((lines[0], rule, *lines[1:-1], rule, lines[-1]))


def summary(model: Network | Bound, x: Any) -> Summary:
    """Output shapes and parameters of a model by layer; nothing is computed.

    Args:
      model: a :class:`Network`, or a :class:`Bound` model, such as :func:`bind` returns.
      x: a batch (B, ...), of which only shape and dtype matter; a ``jax.ShapeDtypeStruct`` will do.

    Raises ``TypeError`` for other models, and one that returns more than one array.
    """
    if isinstance(model, Network):
        params, extra = jax.eval_shape(model.init, jax.random.key(0), x)
        logits, features = model.logits, model.features
    elif isinstance(model, Bound):
        params, extra = model.params, model.extra
        logits = model.logits
        # A bound model of plain functions knows its logits only.
        features = lambda params, extra, x: {}  # noqa: E731
        if isinstance(logits, Method):
            features = dataclasses.replace(logits, name="features")
    else:
        raise TypeError(
            f"summary takes a Network or a bound model, got {type(model).__name__}: see "
            "jrobust.models.network and jrobust.models.bind"
        )
    outputs: dict[str, tuple[int, ...]] = {}

    def trace(params: Any, extra: Any, x: Array) -> Array:
        # Dicts lose their order on the way out of a trace.
        outputs.update({name: a.shape for name, a in features(params, extra, x).items()})
        return logits(params, extra, x)

    out = jax.eval_shape(trace, params, extra, x)
    if not hasattr(out, "shape"):
        raise TypeError(
            f"the model must return one array of logits, got {jax.tree.map(jnp.shape, out)}"
        )
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1:] == (jax.tree_util.GetAttrKey("value"),):  # the Variable in an nnx.State
            path = path[:-1]
        layer, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        shapes.setdefault(layer, {})[name] = leaf.shape
    for layer in list(shapes):  # of a layer that ran several times, the first holds the parameters
        if layer not in outputs and f"{layer}/0" in outputs.keys() - shapes.keys():
            shapes[f"{layer}/0"] = shapes.pop(layer)
    layers = []
    for name in dict.fromkeys((*outputs, *shapes)):
        own = shapes.get(name, {})
        layers.append(Layer(name, outputs.get(name), own, sum(map(math.prod, own.values()))))
    return Summary(
        tuple(layers),
        out.shape,
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        sum(leaf.size for leaf in jax.tree.leaves(extra)),
    )
