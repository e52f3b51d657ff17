"""The networks of the benchmarks in PyTorch, how they are read, and how requests are answered.

Runs in the peer's environment: torch and numpy only.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.new = stride, width - inputs

    def forward(self, x):
        h = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        h = self.norm2(self.conv2(h))
        if self.new or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return functional.relu(h.add_(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self, depth, classes, widths, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        self.conv = nn.Conv2d(len(mean), widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        self.names = []
        for i, width in enumerate(widths, 1):
            for j in range(1, (depth - 2) // 6 + 1):
                self.names.append(f"stage{i}_block{j}")
                self.add_module(self.names[-1], Block(inputs, width, 2 if i > 1 and j == 1 else 1))
                inputs = width
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv((x - self.mean) / self.std)), inplace=True)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


class SmallCNN(nn.Module):
    """Its features are flattened in the order of channels-last images, as the weights have it."""

    def __init__(self, channels, side, widths, hidden, classes):
        super().__init__()
        self.layers = []
        for i, width in enumerate(widths, 1):
            stride = 1 if i == 1 else 2
            self.layers.append(f"conv{i}")
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, stride, 1))
            channels, side = width, -(-side // stride)
        self.dense = nn.Linear(channels * side * side, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        for name in self.layers:
            layer = getattr(self, name)
            if layer.stride[0] == 2 and x.shape[-1] % 2 == 0:  # as "SAME" pads: behind
                h = functional.pad(x, (0, 1, 0, 1))
                x = functional.conv2d(h, layer.weight, layer.bias, 2)
            else:
                x = layer(x)
            x = functional.relu(x, inplace=True)
        x = x.permute(0, 2, 3, 1).flatten(1)
        return self.head(functional.relu(self.dense(x), inplace=True))


NETWORKS = {"ResNet": ResNet, "SmallCNN": SmallCNN}

# Flax's name of a variable -> PyTorch's, and how to turn its axes.
NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def translate(variables):
    """``{"params/conv/kernel": (H, W, I, O), ...}`` as a PyTorch state dict."""
    state = {}
    for path, value in variables.items():
        collection, *module, leaf = path.split("/")
        if leaf == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        name = ".".join([*module, NAMES[collection, leaf]])
        state[name] = torch.from_numpy(np.ascontiguousarray(value))
    return state


def read(folder, network, threads):
    """The network and the examples that `_case.Case.save` wrote, ready on the device.

    Args:
        folder: where.
        network: `kind`, one of NETWORKS, and its arguments.
        threads: that PyTorch may use.

    Returns:
        The network in evaluation mode, channels last; the arrays beside it; the device; and what
        to answer about all that.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    folder = pathlib.Path(folder)
    with np.load(folder / "case.npz") as case, np.load(folder / "variables.npz") as variables:
        arrays, state = dict(case), translate(dict(variables))
    arguments = dict(network)
    model = NETWORKS[arguments.pop("kind")](**arguments)
    # Constants that the other side has no variables for.
    state |= dict(model.named_buffers(recurse=False))
    # PyTorch counts batches, which no network in evaluation mode reads.
    missing = model.load_state_dict(state, strict=False).missing_keys
    if any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"no values for {missing}")
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    answer = {
        "versions": {"torch": torch.__version__},
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {threads} threads",
    }
    return model, arrays, device, answer


def image(x, device):
    """(B, H, W, C) numpy -> (B, C, H, W) with channels last in memory: no copy."""
    return torch.from_numpy(x).to(device).permute(0, 3, 1, 2)


def labels(y, device):
    """(B,) on the device."""
    return torch.from_numpy(y.astype(np.int64)).to(device)


def serve(session):
    """Answer requests until standard input ends."""
    # Libraries print to standard output: their lines are not answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
