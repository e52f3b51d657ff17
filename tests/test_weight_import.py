"""Weights from PyTorch and DeepMind without either, in the genuine formats, and weights out.

The networks of :class:`Torch` are PyTorch's written out in float64 NumPy, with the names that
released checkpoints give to layers. A pass draws the weights it meets, so that the state dict and
the logits come from the same code, which shares nothing with the library's. The same against
PyTorch itself is in tests/peers.
"""

import io
import json
import os
import pickle
import re
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

import jrobust
from jrobust import attacks, models
from jrobust.models import _tensors
from jrobust.threat import Linf

MEAN, STD = models.ResNet18.mean, models.ResNet18.std
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(2, 8, 8, 3)).astype(np.float32)
X[1] **= 3


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


class Torch:
    """A pass through layers (B, C, H, W) that draws and keeps their weights by name."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.state = {}

    def draw(self, name, shape, low=-1.0, high=1.0):
        assert name not in self.state
        value = self.rng.uniform(low, high, shape).astype(np.float32)
        self.state[name] = value
        return value.astype(np.float64)

    def conv(self, x, name, out, kernel=3, stride=1, pad=None, bias=False):
        pad = (kernel // 2,) * 2 if pad is None else pad
        bound = np.sqrt(3 / (x.shape[1] * kernel**2))
        w = self.draw(f"{name}.weight", (out, x.shape[1], kernel, kernel), -bound, bound)
        x = np.pad(x, ((0, 0), (0, 0), pad, pad))
        windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))
        y = np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], w)
        return y + self.draw(f"{name}.bias", (out,))[:, None, None] if bias else y

    def norm(self, x, name, eps=1e-5):
        c = x.shape[1]
        weight, bias = self.draw(f"{name}.weight", (c,), 0.5), self.draw(f"{name}.bias", (c,))
        mean, var = (
            self.draw(f"{name}.running_mean", (c,)),
            self.draw(f"{name}.running_var", (c,), 0.5, 2),
        )
        self.state[f"{name}.num_batches_tracked"] = np.array(7)
        mean, var, weight, bias = (a[:, None, None] for a in (mean, var, weight, bias))
        return (x - mean) / np.sqrt(var + eps) * weight + bias

    def linear(self, x, name, out):
        bound = np.sqrt(3 / x.shape[-1])
        w = self.draw(f"{name}.weight", (out, x.shape[-1]), -bound, bound)
        return x @ w.T + self.draw(f"{name}.bias", (out,))

    def layer_norm(self, x, name):
        weight = self.draw(f"{name}.weight", x.shape[-1:], 0.5)
        bias = self.draw(f"{name}.bias", x.shape[-1:])
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def channels_first(x):
    x = x.astype(np.float64).transpose(0, 3, 1, 2)
    mean, std = (np.array(a)[:, None, None] for a in (MEAN, STD))
    return (x - mean) / std


def residual(t, x, stages, bottleneck, project):
    width = x.shape[1]
    for i, blocks in enumerate(stages, 1):
        for j in range(blocks):
            name, inner, stride = f"layer{i}.{j}", width * 2 ** (i - 1), 2 if i > 1 and not j else 1
            if bottleneck:
                h = relu(t.norm(t.conv(x, f"{name}.conv1", inner, 1), f"{name}.bn1"))
                h = relu(t.norm(t.conv(h, f"{name}.conv2", inner, 3, stride), f"{name}.bn2"))
                h = t.norm(t.conv(h, f"{name}.conv3", 4 * inner, 1), f"{name}.bn3")
            else:
                h = relu(t.norm(t.conv(x, f"{name}.conv1", inner, 3, stride), f"{name}.bn1"))
                h = t.norm(t.conv(h, f"{name}.conv2", inner), f"{name}.bn2")
            if h.shape != x.shape:
                x = t.conv(x, f"{name}.{project}.0", h.shape[1], 1, stride)
                x = t.norm(x, f"{name}.{project}.1")
            x = relu(h + x)
    return x


def resnet(t, x):
    x = relu(t.norm(t.conv(channels_first(x), "conv1", 4), "bn1"))
    return t.linear(residual(t, x, (1, 2), False, "shortcut").mean((2, 3)), "linear", 3)


def torchvision(t, x):
    x = relu(t.norm(t.conv(channels_first(x), "conv1", 2, 7, 2), "bn1"))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))
    return t.linear(residual(t, x, (2, 1), True, "downsample").mean((2, 3)), "fc", 3)


def cifar_resnet(t, x):
    x = relu(t.norm(t.conv(channels_first(x), "conv1", 2), "bn1"))
    for i, width in ((1, 2), (2, 4), (3, 6)):
        stride, name = 2 if i > 1 else 1, f"layer{i}.0"
        h = relu(t.norm(t.conv(x, f"{name}.conv1", width, 3, stride), f"{name}.bn1"))
        h = t.norm(t.conv(h, f"{name}.conv2", width), f"{name}.bn2")
        pad = (width - x.shape[1]) // 2
        x = relu(h + np.pad(x[:, :, ::stride, ::stride], ((0, 0), (pad, pad), (0, 0), (0, 0))))
    return t.linear(x.mean((2, 3)), "linear", 3)


def pre_activation(shortcut, final):
    def network(t, x):
        x = t.conv(channels_first(x), "conv1", 4)
        for i in (1, 2):
            name, stride = f"layer{i}.0", 2 if i > 1 else 1
            h = relu(t.norm(x, f"{name}.bn1"))
            if i > 1:
                x = t.conv(h if shortcut == "activated" else x, f"{name}.shortcut.0", 8, 1, 2)
            h = t.conv(h, f"{name}.conv1", 4 * i, 3, stride)
            x = x + t.conv(relu(t.norm(h, f"{name}.bn2")), f"{name}.conv2", 4 * i)
        x = relu(t.norm(x, "bn")) if final else x
        return t.linear(x.mean((2, 3)), "linear", 3)

    return network


def deepmind_pre_activation(t, x):
    x = t.conv(channels_first(x), "conv_2d", 4)
    for i in (0, 1):
        name, out, stride, pad = f"layer_{i}.0", 4 * 2**i, 1 + i, (1 - i, 1)
        h = silu(t.norm(x, f"{name}.batchnorm_0"))
        if i:
            x = t.conv(x, f"{name}.shortcut", out, 3, stride, pad)
        h = silu(t.norm(t.conv(h, f"{name}.conv_2d_1", out, 3, stride, pad), f"{name}.batchnorm_1"))
        x = x + t.conv(h, f"{name}.conv_2d_2", out)
    return t.linear(silu(t.norm(x, "batchnorm")).mean((2, 3)), "logits", 3)


def wide(deepmind):
    act = silu if deepmind else relu

    def network(t, x):
        if deepmind:
            t.state["mean"], t.state["std"] = (np.float32(a)[:, None, None] for a in (MEAN, STD))
            names = ("init_conv", "layer.{}.block.0", "batchnorm_{}", "conv_{}", "shortcut")
        else:
            t.conv(np.zeros((1, 16, 8, 8)), "sub_block1.layer.0.conv1", 16)
            names = ("conv1", "block{}.layer.0", "bn{}", "conv{}", "convShortcut")
        first, block, norm, conv, shortcut = names
        one = 0 if deepmind else 1  # numbers of DeepMind's count from zero
        x = t.conv(channels_first(x), first, 16)
        for i, stride in enumerate((1, 2, 2)):
            name, out = block.format(i + one), 16 * 2**i
            h = act(t.norm(x, f"{name}.{norm.format(one)}"))
            if i:
                x = t.conv(h, f"{name}.{shortcut}", out, 1, stride)
            pad = (0, 1) if deepmind and stride == 2 else (1, 1)
            h = t.conv(h, f"{name}.{conv.format(one)}", out, 3, stride, pad)
            h = act(t.norm(h, f"{name}.{norm.format(one + 1)}"))
            x = x + t.conv(h, f"{name}.{conv.format(one + 1)}", out)
        x = act(t.norm(x, "batchnorm" if deepmind else "bn1"))
        return t.linear(x.mean((2, 3)), "logits" if deepmind else "fc", 3)

    return network


def vit(t, x):
    x = t.conv(channels_first(x), "patch_embed.proj", 6, 4, 4, (0, 0), bias=True)
    x = x.reshape(len(x), 6, 4).transpose(0, 2, 1)
    token = np.repeat(t.draw("cls_token", (1, 1, 6)), len(x), 0)
    x = np.concatenate([token, x], 1) + t.draw("pos_embed", (1, 5, 6))
    for j in range(2):
        name = f"blocks.{j}"
        h = t.linear(t.layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv", 18)
        q, k, v = np.split(h, 3, -1)
        heads = []
        for one in (slice(0, 3), slice(3, 6)):
            score = np.exp(q[..., one] @ k[..., one].swapaxes(1, 2) / np.sqrt(3))
            heads.append(score / score.sum(-1, keepdims=True) @ v[..., one])
        x = x + t.linear(np.concatenate(heads, -1), f"{name}.attn.proj", 6)
        h = gelu(t.linear(t.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", 24))
        x = x + t.linear(h, f"{name}.mlp.fc2", 6)
    return t.linear(t.layer_norm(x, "norm")[:, 0], "head", 3)


def denoiser(t, x):
    x = x.astype(np.float64).transpose(0, 3, 1, 2)
    h = relu(t.conv(x, "dncnn.0", 4, bias=True))
    for i in (2, 5):
        h = relu(t.norm(t.conv(h, f"dncnn.{i}", 4), f"dncnn.{i + 1}", 1e-4))
    return (x - t.conv(h, "dncnn.8", 3)).transpose(0, 2, 3, 1)


SILU = {"activation": nn.silu, "padding": "same"}
PRE = {"classes": 3, "stages": (1, 1), "width": 4}
CASES = {
    "resnet": (models.ResNet18(3, stages=(1, 2), width=4), resnet),
    "torchvision": (
        models.ResNet50(3, stages=(2, 1), width=2, mean=MEAN, std=STD),
        torchvision,
    ),
    "cifar resnet": (models.ResNet(8, 3, (2, 4, 6)), cifar_resnet),
    "preact": (models.PreActResNet18(**PRE), pre_activation("activated", False)),
    "preact input": (
        models.PreActResNet18(**PRE, shortcut="input", final_norm=True),
        pre_activation("input", True),
    ),
    "preact deepmind": (
        models.PreActResNet18(**PRE, shortcut="input3x3", final_norm=True, **SILU),
        deepmind_pre_activation,
    ),
    "wide": (models.WideResNet(10, 1, 3), wide(False)),
    "wide deepmind": (models.WideResNet(10, 1, 3, **SILU), wide(True)),
    "vit": (models.ViT(3, 8, 4, 6, 2, 2, mean=MEAN, std=STD), vit),
    "denoiser": (models.DnCNN(4, 4), denoiser),
}


# Files in the genuine formats, byte by byte.

STORAGES = {
    np.dtype("f4"): "FloatStorage",
    np.dtype("f8"): "DoubleStorage",
    np.dtype("f2"): "HalfStorage",
    np.dtype("i8"): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


class Opcodes:
    """The pickle that torch.save writes of nested dicts, lists, numbers and arrays."""

    def __init__(self, legacy=False):
        self.storages, self.legacy = [], legacy

    def dump(self, value):
        return b"\x80\x02" + self.of(value) + b"."

    def named(self, module, name):
        return f"c{module}\n{name}\n".encode()

    def tuple(self, *parts):
        return b"(" + b"".join(parts) + b"t"

    def of(self, value):
        if value is None or value is False:
            return b"N" if value is None else b"\x89"
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, tuple):
            return self.tuple(*map(self.of, value))
        if isinstance(value, list):
            return b"](" + b"".join(map(self.of, value)) + b"e"
        if isinstance(value, dict):
            items = b"".join(self.of(k) + self.of(v) for k, v in value.items())
            return self.named("collections", "OrderedDict") + b")R(" + items + b"u"
        strides = tuple(s // value.itemsize for s in value.strides)
        return self.tensor(np.ravel(value, order="K"), 0, value.shape, strides)

    def tensor(self, storage, offset, size, stride):
        """Of a storage that is stored whole."""
        key = str(len(self.storages))
        self.storages.append(storage)
        pid = [self.of("storage"), self.named("torch", STORAGES[storage.dtype])]
        pid += [self.of(key), self.of("cpu"), self.of(len(storage))]
        pid += [b"N"] if self.legacy else []
        hooks = self.named("collections", "OrderedDict") + b")R"
        arguments = [self.tuple(*pid) + b"Q", self.of(offset), self.of(size), self.of(stride)]
        arguments += [self.of(False), hooks]
        return self.named("torch._utils", "_rebuild_tensor_v2") + self.tuple(*arguments) + b"R"


def zip_bytes(body, storages, compression=zipfile.ZIP_STORED, **more):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        for name, value in more.items():
            archive.writestr(name, value)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def zip_file(value):
    opcodes = Opcodes()
    body = opcodes.dump(value)
    return zip_bytes(body, opcodes.storages)


def legacy_file(value):
    opcodes = Opcodes(legacy=True)
    body = opcodes.dump(value)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    keys = [str(i) for i in range(len(opcodes.storages))]
    parts = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [body, pickle.dumps(keys, 2)]
    parts += [struct.pack("<q", len(s)) + s.tobytes() for s in opcodes.storages]
    return b"".join(parts)


def safetensors_file(tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {np.dtype("f4"): "F32", np.dtype("f8"): "F64", np.dtype("f2"): "F16"}
    names |= {np.dtype("i8"): "I64", np.dtype(ml_dtypes.bfloat16): "BF16"}
    for name, value in tensors.items():
        end = len(data) + value.nbytes
        header[name] = {"dtype": names[value.dtype], "shape": value.shape}
        header[name]["data_offsets"] = [len(data), end]
        data += value.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


FORMS = [
    lambda state: zip_file(state),
    lambda state: legacy_file({"state_dict": prefixed(state, "module."), "epoch": 3, "lr": 0.1}),
    lambda state: safetensors_file(prefixed(state, "model.")),
    lambda state: zip_file({"net": prefixed(state, "module.model."), "acc": np.array([0.5])}),
]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_published_architecture(name, tmp_path):
    module, written_out = CASES[name]
    t = Torch()
    expected = written_out(t, X)
    path = tmp_path / "checkpoint"
    path.write_bytes(FORMS[list(CASES).index(name) % len(FORMS)](t.state))
    params, extra = models.from_torch(module, path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, extra)))
    model = models.network(module).bind(params, extra)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda x: model(x))(X)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    assert np.ptp(expected, 0).max() > 0.05, "images matter"


STATE = {
    "a": RNG.normal(size=(3, 4)).astype(np.float32),
    "transposed": RNG.normal(size=(5, 2)).T,
    "half": RNG.normal(size=7).astype(np.float16),
    "brain": RNG.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(5),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("write", [zip_file, legacy_file, safetensors_file])
def test_files_hold_what_was_written(write, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(write(STATE))
    read = models.read_tensors(path)
    assert list(read) == list(STATE)
    for name, value in STATE.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize("write", [zip_file, legacy_file, safetensors_file])
def test_truncated_files_are_refused(write, tmp_path):
    path = tmp_path / "file"
    whole = write(STATE)
    for length in [0, 1, 7, 8, 9, *range(20, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            models.read_tensors(path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def poison():
    body = pickle.dumps({"state_dict": {"w": Malicious()}}, 2)
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    yield "zip", zip_bytes(body, []), models.read_tensors
    yield "legacy", legacy + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + body, models.read_tensors
    yield "legacy, at once", pickle.dumps(Malicious(), 2), models.read_tensors
    yield "NumPy", body, _tensors.read_numpy_pickle
    file = io.BytesIO()
    np.save(file, np.array([Malicious(), Malicious()], object), allow_pickle=True)
    yield "object array", file.getvalue(), _tensors.read_numpy_pickle


@pytest.mark.parametrize(
    ("kind", "content", "read"), list(poison()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_malicious_pickle_does_not_run(kind, content, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"refers to posix.system, which may run code"):
        read("file")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
    """BUILD on what find_class returns sets attributes of it."""
    path = tmp_path / "file"
    state = b"N}(X\x0c\x00\x00\x00__defaults__(Ntu\x86"
    for name in ("torch._utils\n_rebuild_tensor_v2", "numpy\ndtype", "torch\nFloatStorage"):
        path.write_bytes(zip_bytes(b"\x80\x02c" + name.encode() + b"\n" + state + b"b.", []))
        with pytest.raises(ValueError, match=str(path)):
            models.read_tensors(path)
    path.write_bytes(zip_file(STATE))
    np.testing.assert_array_equal(models.read_tensors(path)["a"], STATE["a"])


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (3,), (2,)), (5, (1,), (1,)), (-1, (2,), (1,)), (4, (2,), (-1,)), (0, (2, 2), (1,))],
)
def test_a_tensor_cannot_reach_beyond_its_storage(offset, size, stride, tmp_path):
    path = tmp_path / "file"
    opcodes = Opcodes()
    body = opcodes.tensor(np.arange(4.0), offset, size, stride)
    path.write_bytes(zip_bytes(b"\x80\x02" + body + b".", opcodes.storages))
    with pytest.raises(ValueError, match="damaged"):
        models.read_tensors(path)


def header(**entry):
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(8)


def miscounted():
    """A storage that is said to hold twice what its tensor needs, and does."""
    whole = legacy_file({"w": np.zeros(2, np.float32)})
    return whole[:-16] + struct.pack("<q", 4) + bytes(16)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (miscounted(), "storage 0 has 4 of 2 elements"),
        (header(data_offsets=[0, 12]), "tensor w of shape"),
        (header(data_offsets=[-8, 0]), "tensor w of shape"),
        (header(shape=[3]), "tensor w of shape"),
        (header(dtype="F8_E4M3"), "tensor w has dtype F8_E4M3"),
        (struct.pack("<Q", 10**15) + b"{}", "its header of 10{15} bytes does not fit"),
        (b"not a checkpoint", "neither a safetensors file nor one that torch.save wrote"),
        (pickle.dumps({"w": 1}), "a pickle, but not one that torch.save wrote"),
        (zip_bytes(b"N.", [], **{"archive/constants.pkl": "N."}), "is a TorchScript archive"),
        (zip_bytes(b"N.", [], zipfile.ZIP_DEFLATED), "is compressed"),
    ],
)
def test_other_files_are_refused(content, text, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text):
        models.read_tensors(path)


SMALL = models.WideResNet(10, 1, 3)


@pytest.fixture(scope="module")
def state():
    t = Torch()
    wide(False)(t, X)
    return t.state


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "module", "text"),
    [
        (lambda s: without(s, "block2.layer.0.bn1.running_var"), SMALL,
         r"missing block2.layer.0.bn1.running_var: stage2_block1/norm1/var \(16,\)"),
        (lambda s: {**s, "block4.w": np.zeros(3)}, SMALL, r"left over block4.w \(3,\)"),
        (lambda s: {**s, "fc.weight": s["fc.weight"].T}, SMALL,
         r"fc.weight is \(64, 3\), expected \(3, 64\)"),
        (lambda s: s, models.WideResNet(10, 1, 7), r"fc.bias is \(3,\), expected \(7,\)"),
        (lambda s: s, models.WideResNet(16, 1, 3), r"WideResNet\(depth=16, classes=3, width=1\)"),
        (lambda s: s, models.ResNet18(3), r"and \d+ more"),
        (lambda s: {**s, "mu": np.full((1, 3, 1, 1), 0.5)}, SMALL,
         r"mu is \[0.5, 0.5, 0.5\], but the module has mean="),
        (lambda s: {**s, "module.fc.bias": s["fc.bias"]}, SMALL, "'fc.bias' twice"),
        (lambda s: {"best": s, "last": s}, SMALL,
         r"only \['best', 'last'\]; say which with entry="),
        (lambda s: s, models.SmallCNN(), "how checkpoints name the layers of SmallCNN is not"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, module, text, state):
    with pytest.raises(ValueError, match=text):
        models.from_torch(module, change(state))


def test_entries_and_constants(state):
    expected = models.from_torch(SMALL, state)
    constants = {"mu": np.float32(MEAN)[None, :, None, None], "normalize.std": np.float32(STD)}
    given = models.from_torch(SMALL, {"best": 0, "last": {**state, **constants}}, entry="last")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, given))
    with pytest.raises(ValueError, match=r"has no entry 'best', only \['last'\]"):
        models.from_torch(SMALL, {"last": state}, entry="best")


def test_names_of_other_networks():
    module = models.MLP((5,), 3)
    tensors = {"net.0.weight": RNG.normal(size=(5, 192)), "net.0.bias": RNG.normal(size=5)}
    tensors |= {"net.2.weight": RNG.normal(size=(3, 5)), "net.2.bias": RNG.normal(size=3)}
    names = {"dense1": "net.0", "head": "net.2"}.get
    model = models.network(module).bind(*models.from_torch(module, tensors, names=names, x=X))
    x = X.reshape(2, -1)
    h = relu(x @ tensors["net.0.weight"].T + tensors["net.0.bias"])
    expected = h @ tensors["net.2.weight"].T + tensors["net.2.bias"]
    np.testing.assert_allclose(model(X), expected, rtol=1e-4, atol=1e-4)


# DeepMind


def haiku(state):
    """The pair of trees in which Haiku keeps the network that DeepMind's names are of."""
    params, averages = {}, {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        if leaf in ("num_batches_tracked", "mean", "std"):
            continue
        if path[0] == "layer":
            path = [f"resnet_lay_{path[1]}_block_{path[3]}", path[4]]
        scope = "/~/".join(["wide_res_net", *path])
        norm = "batchnorm" in path[-1]
        wide_value = value.reshape(1, 1, 1, -1) if norm else value
        if leaf.startswith("running"):
            kind = {"running_mean": "mean_ema", "running_var": "var_ema"}[leaf]
            entry = averages.setdefault(f"{scope}/~/{kind}", {})
            entry.update(average=wide_value, hidden=0.3 * wide_value, counter=np.array(4))
        elif norm:
            name = {"weight": "scale", "bias": "offset"}[leaf]
            params.setdefault(scope, {})[name] = wide_value
        elif leaf == "weight":
            axes = (2, 3, 1, 0) if value.ndim == 4 else (1, 0)
            params.setdefault(scope, {})["w"] = value.transpose(axes)  # in Fortran order too
        else:
            params.setdefault(scope, {})["b"] = value
    return params, averages


def test_deepmind_files_are_their_torch_twins(tmp_path):
    t = Torch()
    wide(True)(t, X)
    module = CASES["wide deepmind"][0]
    expected = models.from_torch(module, t.state)
    pair = haiku(t.state)
    path = tmp_path / "weights.npy"
    for protocol in (2, 4, 5, None):
        if protocol is None:
            both = np.empty(2, object)
            both[:] = pair
            np.save(path, both, allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(pair, protocol))
        given = models.from_deepmind(module, path)
        assert jax.tree.structure(given) == jax.tree.structure(expected)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, given))
    del pair[1]["wide_res_net/~/batchnorm/~/var_ema"]
    path.write_bytes(pickle.dumps(pair))
    with pytest.raises(ValueError, match=r"missing batchnorm.running_var"):
        models.from_deepmind(module, path)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match="is a NumPy array, not a pair"):
        models.from_deepmind(module, path)
    path.write_bytes(pickle.dumps([pair[0]]))
    with pytest.raises(ValueError, match="holds no pair of parameters and state"):
        models.from_deepmind(module, path)


# RobustBench


def test_robustbench_identifiers(state):
    module = models.robustbench("Wang2023Better_WRN-28-10")
    assert (module.depth, module.width, module.padding) == (28, 10, "same")
    assert module.activation is nn.silu
    assert models.robustbench("Rice2020Overfitting", "cifar100").classes == 100
    assert models.robustbench("Zhang2019Theoretically").mean == (0, 0, 0)
    assert models.robustbench("Wong2020Fast") == models.PreActResNet18(shortcut="input")
    with pytest.raises(ValueError, match=r"only .*Wang2023Better_WRN-70-16"):
        models.robustbench("Wang2023")
    with pytest.raises(ValueError, match="only of cifar10 Linf, cifar10 L2"):
        models.robustbench("Standard", "imagenet")


# out


def test_safetensors_there_and_back(tmp_path, state):
    path = tmp_path / "weights.safetensors"
    params, extra = models.from_torch(SMALL, state)
    params["head"]["bias"] = params["head"]["bias"].astype(jnp.bfloat16)
    models.to_safetensors(path, params, extra)
    again = models.from_safetensors(path)
    assert jax.tree.structure(again) == jax.tree.structure((params, extra))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves((params, extra))):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    entry = json.loads(path.read_bytes()[8 : 8 + length])["params/stage2_block1/conv1/kernel"]
    assert (length % 8, entry["dtype"], entry["shape"]) == (0, "F32", [3, 3, 16, 32])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    models.to_safetensors(path, {"w": np.ones(2)})
    assert models.from_safetensors(path)[1] == {}
    with pytest.raises(ValueError, match="nested dicts with names without '/'"):
        models.to_safetensors(path, {"a/b": np.ones(2)})
    with pytest.raises(ValueError, match="nested dicts"):
        models.to_safetensors(path, [np.ones(2)])
    with pytest.raises(ValueError, match="dtype complex64"):
        models.to_safetensors(path, {"w": np.ones(2, np.complex64)})
    np.testing.assert_array_equal(models.from_safetensors(path)[0]["w"], 1)
    path.write_bytes(safetensors_file(STATE))
    with pytest.raises(ValueError, match="not a file that to_safetensors wrote"):
        models.from_safetensors(path)


# models on the host

W = RNG.normal(size=(12, 4)).astype(np.float32)


class Host:
    """A network of NumPy: logits of tanh units, and how often each function ran."""

    def __init__(self):
        self.calls = {"forward": 0, "vjp": 0}

    def forward(self, x):
        self.calls["forward"] += 1
        assert isinstance(x, np.ndarray)
        return np.tanh(x.reshape(len(x), -1) @ W)

    def vjp(self, x, cotangent):
        self.calls["vjp"] += 1
        slope = 1 - np.tanh(x.reshape(len(x), -1) @ W) ** 2
        return ((cotangent * slope) @ W.T).reshape(x.shape)


def inside(x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ W)


def test_a_model_on_the_host_has_gradients():
    host = Host()
    model = models.from_host(host.forward, host.vjp, 4)
    assert jax.tree.leaves(model) == []
    assert model == models.from_host(host.forward, host.vjp, 4)
    x = jnp.asarray(RNG.uniform(size=(3, 2, 6)), jnp.float32)
    np.testing.assert_allclose(jax.jit(model)(x), inside(x), rtol=1e-5, atol=1e-6)
    check_grads(model, (x,), 1, ["rev"], atol=2e-2, rtol=2e-2)
    weight = jnp.arange(12.0).reshape(3, 4)
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(weight * f(x) ** 2))(x) for f in (model, inside)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert jax.grad(lambda x: model(x).sum())(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    before = dict(host.calls)
    many = jnp.stack([x, 2 * x, -x, x])
    mapped = jax.vmap(jax.vmap(jax.grad(lambda x: jnp.sum(model(x) ** 2))))(
        many.reshape(2, 2, 3, 2, 6)
    )
    expected = jax.vmap(jax.grad(lambda x: jnp.sum(inside(x) ** 2)))(many)
    np.testing.assert_allclose(mapped.reshape(many.shape), expected, rtol=1e-4, atol=1e-5)
    assert host.calls == {name: n + 1 for name, n in before.items()}, "one call for all rows"
    wrong = models.from_host(lambda x: np.zeros((len(x), 3)), host.vjp, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"returned shape \(3, 3\) for 3 rows"):
        jax.block_until_ready(wrong(x))
    with pytest.raises(TypeError, match="vjp must be a function"):
        models.from_host(host.forward, None, 4)
    with pytest.raises(ValueError, match="classes must be a positive int"):
        models.from_host(host.forward, host.vjp, 0)


def test_attacks_on_a_model_on_the_host(key):
    host = Host()
    model = models.from_host(host.forward, host.vjp, 4)
    x = jnp.asarray(RNG.uniform(size=(8, 12)), jnp.float32)
    y = inside(x).argmax(-1)
    attack = attacks.PGD(Linf(0.1), steps=5)
    ours, theirs = (jrobust.run(attack, key, f, x, y) for f in (model, inside))
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(ours.success, theirs.success)
    assert ours.success.sum() > 0
