"""PGD in plain PyTorch on the network of `pgd.py`, driven by JSON lines; see `_common.Peer`.

Runs in an environment of its own: torch and numpy only.
"""

import json
import pathlib
import sys
import time

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


class Session:
    """The state between requests; each public method is one."""

    def open(self, folder, settings, variables, threads):
        """Load the network and the examples, say what this is."""
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        self.fast = settings["precision"] == "tensorfloat32"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder, self.settings = pathlib.Path(folder), settings
        with np.load(self.folder / "case.npz") as case:
            arrays = dict(case)
        network = settings["network"]
        model = ResNet(**network)
        state = translate({name: arrays[name] for name in variables})
        state |= {"mean": model.mean, "std": model.std}
        # PyTorch counts batches, which no network in evaluation mode reads.
        missing = model.load_state_dict(state, strict=False).missing_keys
        if any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"no values for {missing}")
        model = model.eval().requires_grad_(False)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.x, self.start = self._image(arrays["x"]), self._image(arrays["start"])
        self.y = torch.from_numpy(arrays["y"].astype(np.int64)).to(self.device)
        cuda = self.device.type == "cuda"
        return {
            "versions": {"torch": torch.__version__},
            "device": torch.cuda.get_device_name() if cuda else f"cpu, {threads} threads",
        }

    def _image(self, x):
        """(B, H, W, C) numpy -> (B, C, H, W) with channels last in memory: no copy."""
        return torch.from_numpy(x).to(self.device).permute(0, 3, 1, 2)

    def _precision(self, fast):
        torch.backends.cuda.matmul.allow_tf32 = fast
        torch.backends.cudnn.allow_tf32 = fast

    def _gradient(self, x, y):
        x = x.detach().requires_grad_(True)
        loss = functional.cross_entropy(self.model(x), y, reduction="sum")
        return torch.autograd.grad(loss, x)[0]

    def _attack(self, x0, x, y, steps):
        s = self.settings
        low = (x0 - s["eps"]).clamp_(0.0, 1.0)
        high = (x0 + s["eps"]).clamp_(0.0, 1.0)
        self._precision(self.fast)
        for _ in range(steps):
            move = self._gradient(x, y).sign_()
            x = torch.clamp(x.add(move, alpha=s["step_size"]), low, high)
        self._precision(False)
        with torch.no_grad():
            logits = self.model(x)
        return x, logits, logits.argmax(1) != y

    def evaluate(self, points, out):
        """Logits and gradients at points that the other side wrote."""
        self._precision(False)
        with np.load(self.folder / points) as given:
            x = self._image(given["x"])
        with torch.no_grad():
            logits = self.model(x)
        np.savez(
            self.folder / out,
            logits=logits.cpu().numpy(),
            gradient=self._gradient(x, self.y).permute(0, 2, 3, 1).cpu().numpy(),
        )
        return {}

    def attack(self, out):
        """The attack from the given start points."""
        x, logits, success = self._attack(self.x, self.start, self.y, self.settings["steps"])
        np.savez(
            self.folder / out,
            x=x.permute(0, 2, 3, 1).cpu().numpy(),
            logits=logits.cpu().numpy(),
            success=success.cpu().numpy(),
        )
        return {}

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, batch, repeats):
        """Seconds per example in batches of `batch`, over all examples or one larger batch."""
        copies = -(-batch // len(self.y))
        x, start = (t.repeat(copies, 1, 1, 1) for t in (self.x, self.start))
        x, start = (t.contiguous(memory_format=torch.channels_last) for t in (x, start))
        chunks = list(zip(x.split(batch), start.split(batch), self.y.repeat(copies).split(batch)))
        self._wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            for chunk in chunks:
                self._attack(*chunk, self.settings["steps"])
            self._wait()
        return {"seconds": (time.perf_counter() - begin) / (repeats * len(x))}


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


if __name__ == "__main__":
    serve(Session())
