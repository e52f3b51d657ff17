"""pyautoattack on small networks given as arrays, driven by JSON lines.

Runs in the peers' environment: pyautoattack, torch, numpy. Images are (B, H, W, C) in the files.
"""

import pathlib
import sys

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import _peer_networks

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class Net:
    """3x3 convolutions of stride 2, then dense layers; `activation` between all of them."""

    def __init__(self, arrays, activation):
        self.arrays = {name: torch.from_numpy(a) for name, a in arrays.items()}
        self.activation = ACTIVATIONS[activation]

    def eval(self):
        return self

    def __call__(self, x):
        """(B, C, H, W) -> (B, classes)."""
        convolutions = sorted(n for n in self.arrays if n.startswith("conv") and "kernel" in n)
        for name in convolutions:
            kernel = self.arrays[name].permute(3, 2, 0, 1)
            bias = self.arrays[name.replace("kernel", "bias")]
            x = self.activation(functional.conv2d(x, kernel, bias, stride=2, padding=1))
        x = x.permute(0, 2, 3, 1).flatten(1)
        dense = sorted(n for n in self.arrays if n.startswith("dense") and "kernel" in n)
        for i, name in enumerate(dense):
            x = x @ self.arrays[name] + self.arrays[name.replace("kernel", "bias")]
            x = self.activation(x) if i + 1 < len(dense) else x
        return x


class Session:
    def open(self, folder, threads):
        """Where files are."""
        torch.set_num_threads(threads)
        self.folder = pathlib.Path(folder)
        return {}

    def attack(self, net, activation, points, out, attacks, norm, eps, seed, steps, queries):
        """Success of each example, after a clean pass, and the points; in the standard settings."""
        with np.load(self.folder / net) as arrays:
            model = Net(dict(arrays), activation)
        with np.load(self.folder / points) as given:
            x = torch.from_numpy(given["x"]).permute(0, 3, 1, 2).contiguous()
            y = torch.from_numpy(given["y"].astype(np.int64))
        run = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard")
        run.attacks_to_run = attacks
        run.square.n_queries = queries
        for part in (run.apgd, run.apgd_targeted):
            part.n_iter = part.n_iter_orig = steps
            part.n_iter_2, part.n_iter_min, part.size_decr = (
                max(int(share * steps), 1) for share in (0.22, 0.06, 0.03)
            )
        run.fab.n_iter = steps
        found, predictions = run.run_standard_evaluation(x, y, batch_size=len(x))
        np.savez(
            self.folder / out,
            x=found.permute(0, 2, 3, 1).contiguous().numpy(),
            success=(predictions != y).numpy(),
            clean=model(x).detach().numpy(),
        )
        return {}


if __name__ == "__main__":
    _peer_networks.serve(Session())
