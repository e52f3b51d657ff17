"""pyautoattack on the networks of `autoattack.py`, driven by JSON lines; see `_common.Peer`.

Runs in an environment of its own: torch, numpy and pyautoattack.
"""

import contextlib
import io
import pathlib
import sys
import time
from importlib import metadata

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import _peer_pgd
from pyautoattack import AutoAttack


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


class Session:
    """The state between requests; each public method is one."""

    def open(self, folder, settings, network, variables, threads):
        """Load the network and the examples, say what this is."""
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder, self.settings = pathlib.Path(folder), settings
        with np.load(self.folder / "case.npz") as case:
            arrays = dict(case)
        kind = network.pop("kind")
        model = {"SmallCNN": SmallCNN, "ResNet": _peer_pgd.ResNet}[kind](**network)
        state = _peer_pgd.translate({name: arrays[name] for name in variables})
        if kind == "ResNet":
            state |= {"mean": model.mean, "std": model.std}
        missing = model.load_state_dict(state, strict=False).missing_keys
        if any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"no values for {missing}")
        model = model.eval().requires_grad_(False)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.x = torch.from_numpy(arrays["x"]).to(self.device).permute(0, 3, 1, 2)
        self.y = torch.from_numpy(arrays["y"].astype(np.int64)).to(self.device)
        cuda = self.device.type == "cuda"
        return {
            "versions": {
                "torch": torch.__version__,
                "pyautoattack": metadata.version("pyautoattack"),
            },
            "device": torch.cuda.get_device_name() if cuda else f"cpu, {threads} threads",
        }

    def logits(self, out):
        """Logits of the clean inputs."""
        with torch.no_grad():
            np.savez(self.folder / out, logits=self.model(self.x).cpu().numpy())
        return {}

    def attack(self, seed, batch, out=None):
        """The standard version; seconds of it all, and on request the outcome."""
        s = self.settings
        options = {"norm": s["norm"], "eps": s["eps"], "seed": seed, "version": "standard"}
        run = AutoAttack(self.model, device=str(self.device), **options)
        run.square.n_queries = s["queries"]
        for part in (run.apgd, run.apgd_targeted):
            part.n_iter = part.n_iter_orig = s["steps"]
            part.n_iter_2, part.n_iter_min, part.size_decr = (
                max(int(share * s["steps"]), 1) for share in (0.22, 0.06, 0.03)
            )
        run.fab.n_iter = s["steps"]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found, predictions = run.run_standard_evaluation(self.x, self.y, batch_size=batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if out is not None:
            success = (predictions != self.y).cpu().numpy()
            x = found.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            np.savez(self.folder / out, x=x, success=success)
        return {"seconds": seconds}


if __name__ == "__main__":
    _peer_pgd.serve(Session())
