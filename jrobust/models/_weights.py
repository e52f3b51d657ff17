"""Weights trained elsewhere for the reference networks, and weights out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrobust.models._flax import network
from jrobust.models._tensors import Path, _read_safetensors, read_numpy_pickle, read_tensors
from jrobust.models._tensors import _guarded as guarded
from jrobust.models._tensors import write_safetensors as _write_safetensors

Array = jax.Array
Tree = Any


class _Names(NamedTuple):
    """How a family of checkpoints names the layers of a network.

    Attributes:
      top: our layer -> theirs, outside of blocks.
      block: what theirs in a block begin with; formatted with the numbers from 1 of the stage ``i``
        and the block ``j``, and from 0, ``i0`` and ``j0``.
      inner: our layer in a block -> theirs.
      unused: beginnings of names that such checkpoints hold and their networks do not use.
    """

    top: Mapping[str, str]
    block: str = ""
    inner: Mapping[str, str] = {}
    unused: tuple[str, ...] = ()

    def __call__(self, path: str) -> str | None:
        """Their name of our layer ``path``; None where there is none."""
        match = re.fullmatch(r"(?:stage(\d+)_)?block(\d+)/(\w+)", path)
        if not match:
            return self.top.get(path)
        if match[3] not in self.inner:
            return None
        i, j = int(match[1] or 1), int(match[2])
        return self.block.format(i=i, j=j, i0=i - 1, j0=j - 1) + self.inner[match[3]]


_POST = {"conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2"}
_BOTTLENECK = {**_POST, "conv3": "conv3", "norm3": "bn3"}
_RESNET = {"conv": "conv1", "norm": "bn1", "head": "linear"}
_DEEPMIND_TOP = {"norm": "batchnorm", "head": "logits"}

# By class name of the network, the families whose names are known.
_FAMILIES: dict[str, dict[str, _Names]] = {
    "ResNet": {"CIFAR": _Names(_RESNET, "layer{i}.{j0}.", _POST)},
    "ResNet18": {
        "CIFAR": _Names(
            _RESNET,
            "layer{i}.{j0}.",
            {**_BOTTLENECK, "shortcut": "shortcut.0", "shortcut_norm": "shortcut.1"},
        ),
        "torchvision": _Names(
            {**_RESNET, "head": "fc"},
            "layer{i}.{j0}.",
            {**_BOTTLENECK, "shortcut": "downsample.0", "shortcut_norm": "downsample.1"},
        ),
    },
    "PreActResNet18": {
        "CIFAR": _Names(
            {**_RESNET, "norm": "bn"},
            "layer{i}.{j0}.",
            {**_POST, "shortcut": "shortcut.0"},
            ("model_preact_hl1.",),
        ),
        "DeepMind": _Names(
            {**_DEEPMIND_TOP, "conv": "conv_2d"},
            "layer_{i0}.{j0}.",
            {
                "norm1": "batchnorm_0",
                "conv1": "conv_2d_1",
                "norm2": "batchnorm_1",
                "conv2": "conv_2d_2",
                "shortcut": "shortcut",
            },
        ),
    },
    "WideResNet": {
        # Those of TRADES hold a second first stage that no pass goes through.
        "TRADES": _Names(
            {"conv": "conv1", "norm": "bn1", "head": "fc"},
            "block{i}.layer.{j0}.",
            {**_POST, "shortcut": "convShortcut"},
            ("sub_block1.",),
        ),
        "DeepMind": _Names(
            {**_DEEPMIND_TOP, "conv": "init_conv"},
            "layer.{i0}.block.{j0}.",
            {
                "norm1": "batchnorm_0",
                "conv1": "conv_0",
                "norm2": "batchnorm_1",
                "conv2": "conv_1",
                "shortcut": "shortcut",
            },
        ),
    },
    "ViT": {
        "timm": _Names(
            {
                "patches": "patch_embed.proj",
                "token": "cls_token",
                "positions": "pos_embed",
                "norm": "norm",
                "head": "head",
            },
            "blocks.{j0}.",
            {
                "norm1": "norm1",
                "qkv": "attn.qkv",
                "proj": "attn.proj",
                "norm2": "norm2",
                "dense1": "mlp.fc1",
                "dense2": "mlp.fc2",
            },
        )
    },
}
_FAMILIES["ResNet50"] = _FAMILIES["ResNet18"]


def _denoiser(path: str) -> str | None:
    """Names of DnCNN in denoised smoothing: (convolution, batch-norm, ReLU) in one sequence."""
    match = re.fullmatch(r"(conv|norm)(\d+)", path)
    if not match:
        return None
    first = max(0, 3 * int(match[2]) - 4)
    return f"dncnn.{first + (match[1] == 'norm')}"


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Where checkpoints keep the state dict, and the mean and deviation of the input.
_NESTS = ("state_dict", "model_state_dict", "model", "net")
_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
_CONSTANTS = {
    name: field
    for field, names in (("mean", ("mu", "mean")), ("std", ("sigma", "std")))
    for stem in names
    for name in (stem, f"normalize.{stem}", f"normalizer.{stem}")
}


def _state_dict(value: Any, entry: str | None, where: str) -> dict[str, np.ndarray]:
    if entry is not None:
        if not isinstance(value, Mapping) or entry not in value:
            keys = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"{where} has no entry {entry!r}, only {keys}")
        value = value[entry]
    while isinstance(value, Mapping):
        nests = [name for name in _NESTS if isinstance(value.get(name), Mapping)]
        if not nests:
            break
        value = value[nests[0]]
    if not isinstance(value, Mapping) or not any(hasattr(v, "shape") for v in value.values()):
        held = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{where} holds no state dict under {', '.join(_NESTS)}, only {held}; say which "
            "with entry="
        )
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in value.items():
        name = _PREFIX.sub("", str(key))
        if name in tensors:
            raise ValueError(f"{where} holds {name!r} twice, with different prefixes")
        if not hasattr(tensor, "shape"):
            continue
        if hasattr(tensor, "detach"):  # a live torch tensor
            tensor = tensor.detach().cpu().float().numpy()
        tensors[name] = np.asarray(tensor)
    return tensors


def _ours(value: np.ndarray, leaf: str) -> np.ndarray:
    """Torch's layout to ours: OIHW to HWIO, (out, in) to (in, out)."""
    return (
        np.transpose(value, (2, 3, 1, 0) if value.ndim == 4 else None)
        if leaf == "kernel"
        else value
    )


def _theirs(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
    if leaf != "kernel":
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _example(module: Any) -> jax.ShapeDtypeStruct:
    side = getattr(module, "image", 32)
    channels = len(getattr(module, "mean", (0, 0, 0)))
    return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)


def _names(module: Any, names: Callable[[str], str | None] | None, tensors: Any) -> Any:
    """The function from our layers to theirs that fits most of ``tensors``."""
    if names is not None:
        return names
    kind = type(module).__name__
    if kind == "DnCNN":
        return _denoiser
    if kind not in _FAMILIES or not type(module).__module__.startswith("jrobust.models"):
        raise ValueError(
            f"how checkpoints name the layers of {kind} is not known, only of "
            f"{', '.join(sorted((*_FAMILIES, 'DnCNN')))}; pass names=, a function from the path of "
            "a layer here ('stage1_block1/conv1') to its name there ('layer1.0.conv1')"
        )
    modules = {name.rpartition(".")[0] for name in tensors} | set(tensors)
    layers = ("conv", "head", "norm", "patches", "stage1_block1/conv1", "stage2_block1/shortcut")
    return max(
        _FAMILIES[kind].values(),
        key=lambda family: sum(family(layer) in modules for layer in layers),
    )


def from_torch(
    module: Any,
    source: Path | Mapping[str, Any],
    *,
    entry: str | None = None,
    names: Callable[[str], str | None] | None = None,
    x: Any = None,
) -> tuple[Tree, Tree]:
    """Parameters and batch-norm statistics of a PyTorch checkpoint, ``(params, extra)``.

    ``models.network(module).bind(*models.from_torch(module, path))`` is the model. Files are read
    without running code in them, and torch is not needed; see :func:`read_tensors`. Convolutions
    become height, width, in, out, dense layers in, out; everything float32. The prefixes
    ``module.`` and ``model.`` are dropped, ``num_batches_tracked`` is ignored; where the checkpoint
    holds the mean and deviation of the input, they must be those of the module.

    Args:
      module: a Linen module: :class:`ResNet`, :class:`ResNet18`, :class:`ResNet50`,
        :class:`PreActResNet18`, :class:`WideResNet` (as RobustBench, torchvision, TRADES and
        DeepMind name the layers), :class:`ViT` (timm), :class:`DnCNN` (denoised smoothing); any
        other with ``names``. :func:`robustbench` has the arguments of published ones.
      source: a file, or a state dict of arrays or torch tensors.
      entry: which part of the checkpoint to take, such as ``"last"``, where it holds several.
      names: the path of a layer (``"stage1_block1/conv1"``) to its name in the checkpoint
        (``"layer1.0.conv1"``), for other names than the known ones.
      x: a batch of inputs, of which only shape and dtype matter. By default 32x32 images with the
        channels of ``module.mean``, for ViT images of its size.

    Raises ``ValueError`` where the file cannot be read, or a tensor is missing, left over or of
    another shape; each is named.
    """
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    content = source if isinstance(source, Mapping) else read_tensors(source)
    tensors = _state_dict(content, entry, where)
    init = network(module).init
    shapes = jax.eval_shape(init, jax.random.key(0), _example(module) if x is None else x)
    name_of = _names(module, names, tensors)
    problems, used = [], set()

    def take(path: Any, leaf: Any) -> Array:
        layer, _, kind = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        # A parameter of the module itself, such as the class token, is its own layer.
        theirs = name_of(layer if kind in _LEAVES else f"{layer}/{kind}".lstrip("/"))
        name = f"{theirs}.{_LEAVES[kind]}" if kind in _LEAVES else theirs
        if theirs is None or name not in tensors:
            problems.append(f"missing {name or layer}: {layer}/{kind} {_theirs(leaf.shape, kind)}")
            return leaf
        used.add(name)
        value = tensors[name]
        if value.shape != _theirs(leaf.shape, kind):
            problems.append(f"{name} is {value.shape}, expected {_theirs(leaf.shape, kind)}")
            return leaf
        return jnp.asarray(np.ascontiguousarray(_ours(value, kind)).astype(np.float32))

    params, extra = shapes
    params = jax.tree_util.tree_map_with_path(take, params)
    extra = {
        collection: jax.tree_util.tree_map_with_path(take, tree)
        for collection, tree in extra.items()
    }
    unused = getattr(name_of, "unused", ())
    for name, value in tensors.items():
        field = _CONSTANTS.get(name)
        if field and name not in used:
            expected = np.asarray(getattr(module, field, ()), np.float32)
            if value.size != expected.size or not np.allclose(value.ravel(), expected, atol=1e-6):
                problems.append(
                    f"{name} is {value.ravel().tolist()}, but the module has {field}="
                    f"{expected.tolist()}"
                )
        elif not (name in used or name.endswith("num_batches_tracked") or name.startswith(unused)):
            problems.append(f"left over {name} {value.shape}")
    if problems:
        shown = "\n  ".join(problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"{where} does not fit {type(module).__name__}({_arguments(module)}):\n  {shown}{more}"
        )
    return params, extra


def _arguments(module: Any) -> str:
    """What a checkpoint's shapes depend on."""
    fields = ("depth", "classes", "width", "widths", "stages", "stem", "image", "patch")
    return ", ".join(f"{f}={getattr(module, f)!r}" for f in fields if hasattr(module, f))


def from_deepmind(module: Any, path: Path) -> tuple[Tree, Tree]:
    """Parameters and batch-norm statistics of DeepMind's JAX weights, ``(params, extra)``.

    For the ``.npy`` files of Gowal et al. (2020) and Rebuffi et al. (2021): a pickled pair of the
    parameters and the state of the Haiku network in their repository, whose names are kept to.
    The pickle is read without running code.

    Args:
      module: ``WideResNet(depth, width, activation=nn.silu, padding="same")``.
      path: the file.

    Raises ``ValueError`` as :func:`from_torch` does, and where the file holds anything but dicts
    and NumPy arrays.
    """
    content = read_numpy_pickle(path)
    if not (
        isinstance(content, list)
        and len(content) == 2
        and all(isinstance(tree, Mapping) for tree in content)
    ):
        raise ValueError(f"{os.fspath(path)} holds no pair of parameters and state")
    tensors: dict[str, np.ndarray] = {}
    for tree in content:
        for scope, leaves in tree.items():
            # Haiku marks what was made in a constructor: a/~/b.
            parts = [part for part in str(scope).split("/") if part != "~"][1:]
            for leaf, value in leaves.items():
                _haiku(tensors, parts, leaf, np.asarray(value))
    return from_torch(module, tensors)


def _haiku(tensors: dict[str, np.ndarray], parts: list[str], leaf: str, value: np.ndarray) -> None:
    """Add one array of Haiku's under the name and in the layout of DeepMind's torch weights."""
    moment = {"mean_ema": "running_mean", "var_ema": "running_var"}.get(parts[-1] if parts else "")
    if moment:
        if leaf != "average":  # the average without bias; "hidden" and "counter" only lead to it
            return
        parts, leaf, value = parts[:-1], moment, value.ravel()
    elif leaf in ("scale", "offset"):
        leaf, value = {"scale": "weight", "offset": "bias"}[leaf], value.ravel()
    elif leaf == "w":
        leaf, value = "weight", np.transpose(value, (3, 2, 0, 1) if value.ndim == 4 else None)
    elif leaf == "b":
        leaf = "bias"
    name = re.sub(r"resnet_lay_(\d+)_block_(\d+)", r"layer.\1.block.\2", ".".join((*parts, leaf)))
    tensors[name] = value


def to_safetensors(path: Path, params: Tree, extra: Tree = None) -> None:
    """Write parameters and other variables as a safetensors file.

    Tensors are named by collection and path, ``"params/stage1_block1/conv1/kernel"``, in the layout
    they have here (height, width, in, out). The file appears complete or not at all. Any reader of
    safetensors can open it; :func:`from_safetensors` gives the trees back.

    Raises ``ValueError`` where the trees are not nested dicts of arrays.
    """
    tensors = {}
    for kind, tree in (("params", params), ("extra", {} if extra is None else extra)):
        for path_, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys: list[Any] = [getattr(entry, "key", None) for entry in path_]
            if not all(isinstance(key, str) and key and "/" not in key for key in keys):
                raise ValueError(
                    f"{kind} must be nested dicts with names without '/', got "
                    f"{jax.tree_util.keystr(path_)}"
                )
            tensors["/".join((kind, *keys))] = np.asarray(leaf)
    _write_safetensors(path, tensors, {"format": "jrobust"})


def from_safetensors(path: Path) -> tuple[Tree, Tree]:
    """``(params, extra)`` as :func:`to_safetensors` wrote them.

    Raises ``ValueError`` where the file is damaged or another program's.
    """

    def read() -> tuple[dict[str, np.ndarray], dict[str, str]]:
        with open(path, "rb") as file:
            return _read_safetensors(file, os.path.getsize(path))

    tensors, metadata = guarded(path, read)
    if metadata.get("format") != "jrobust":
        raise ValueError(
            f"{os.fspath(path)} is not a file that to_safetensors wrote; from_torch takes the "
            "weights of PyTorch modules, read_tensors any"
        )
    trees: dict[str, Any] = {"params": {}, "extra": {}}
    for name, value in tensors.items():
        tree = trees
        *keys, last = name.split("/")
        for key in keys:
            tree = tree.setdefault(key, {})
        tree[last] = jnp.asarray(value)
    return trees["params"], trees["extra"]
