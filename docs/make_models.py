"""Fill in the table of docs/models.md: sizes and costs of the reference networks.

python docs/make_models.py

Counted from shapes and from the traced program; nothing is computed.
"""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from jrobust import models

DEEPMIND = {"activation": nn.silu, "padding": "same"}
VIT_S4 = models.ViT(10, 32, 4, width=384, heads=6)

# Name in the table, module, shape of an input.
NETWORKS = (
    ("`LeNet()`", models.LeNet(), (28, 28, 1)),
    ("`SmallCNN()`", models.SmallCNN(), (8, 8, 1)),
    ("`ResNet(20)`", models.ResNet(20), (32, 32, 3)),
    ("`ResNet(56)`", models.ResNet(56), (32, 32, 3)),
    ("`ResNet(110)`", models.ResNet(110), (32, 32, 3)),
    ("`ResNet18()`", models.ResNet18(), (32, 32, 3)),
    ('`ResNet18(1000, "imagenet")`', models.ResNet18(1000, "imagenet"), (224, 224, 3)),
    ("`ResNet50()`", models.ResNet50(), (224, 224, 3)),
    ("`PreActResNet18()`", models.PreActResNet18(), (32, 32, 3)),
    (
        "`PreActResNet18` of DeepMind",
        models.PreActResNet18(shortcut="input3x3", final_norm=True, **DEEPMIND),
        (32, 32, 3),
    ),
    ("`WideResNet(28, 10)`", models.WideResNet(28, 10), (32, 32, 3)),
    ("`WideResNet(34, 10)`", models.WideResNet(34, 10), (32, 32, 3)),
    ("`WideResNet(70, 16)`", models.WideResNet(70, 16), (32, 32, 3)),
    ("ViT-S/4: `ViT(10, 32, 4, width=384, heads=6)`", VIT_S4, (32, 32, 3)),
    ("ViT-B/16: `ViT()`", models.ViT(), (224, 224, 3)),
    ("`MoEResNet18()`", models.MoEResNet18(), (32, 32, 3)),
    ("`DnCNN()`", models.DnCNN(), (32, 32, 3)),
    ("`Autoencoder()`", models.Autoencoder(), (32, 32, 3)),
)


def _macs(jaxpr) -> int:
    """Multiplications in convolutions and products of a jaxpr and those in it."""
    total = 0
    for eqn in jaxpr.eqns:
        out = math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            if math.prod(eqn.params["lhs_dilation"]) == 1:
                total += out * math.prod(kernel) // kernel[spec[0]]
            else:  # a transpose: each input meets the whole kernel, the zeros between them nothing
                inputs = math.prod(eqn.invars[0].aval.shape)
                total += inputs * math.prod(kernel) // kernel[spec[1]]
        elif eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += _macs(inner) if hasattr(inner, "eqns") else 0
    return total


def measure(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and multiplications of one image's forward pass."""
    network, x = models.network(module), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params, extra = jax.eval_shape(network.init, jax.random.key(0), x)
    program = jax.make_jaxpr(network.logits)(params, extra, x)
    return sum(leaf.size for leaf in jax.tree.leaves(params)), _macs(program.jaxpr)


def table() -> str:
    """The table as Markdown."""
    lines = ["| network | input | parameters | GMACs |", "|---|---|---:|---:|"]
    for name, module, shape in NETWORKS:
        parameters, macs = measure(module, shape)
        size = "x".join(map(str, shape))
        lines.append(f"| {name} | {size} | {parameters:,} | {macs / 1e9:.4g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "models.md"
    before, mark, rest = path.read_text().partition("<!-- table: python docs/make_models.py -->\n")
    path.write_text(before + mark + table() + "\n" + rest[rest.index("<!-- end of table -->") :])
    print(path)
