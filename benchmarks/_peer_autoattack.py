"""pyautoattack on the networks of `autoattack.py`, driven by JSON lines; see `_common.Peer`.

Runs in an environment of its own: torch, numpy and pyautoattack.
"""

import contextlib
import io
import pathlib
import time
from importlib import metadata

import _peer_networks
import numpy as np
import torch
from pyautoattack import AutoAttack


class _ChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


class Plain(torch.nn.Module):
    """A network that computes in channels last, between inputs and gradients that do not.

    pyautoattack takes views of gradients, which those in channels last do not allow.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(_ChannelsLast.apply(x))


class Session:
    """The state between requests; each public method is one."""

    def open(self, folder, settings, network, threads):
        """Load the network and the examples, say what this is."""
        self.model, arrays, self.device, answer = _peer_networks.read(folder, network, threads)
        self.folder, self.settings = pathlib.Path(folder), settings
        self.x = _peer_networks.image(arrays["x"], self.device)
        self.y = _peer_networks.labels(arrays["y"], self.device)
        answer["versions"]["pyautoattack"] = metadata.version("pyautoattack")
        return answer

    def logits(self, out):
        """Logits of the clean inputs."""
        with torch.no_grad():
            np.savez(self.folder / out, logits=self.model(self.x).cpu().numpy())
        return {}

    def attack(self, seed, batch, out=None):
        """The standard version; seconds of it all, and on request the outcome."""
        s = self.settings
        options = {"norm": s["norm"], "eps": s["eps"], "seed": seed, "version": "standard"}
        run = AutoAttack(Plain(self.model), device=str(self.device), **options)
        run.square.n_queries = s["queries"]
        for part in (run.apgd, run.apgd_targeted):
            part.n_iter = part.n_iter_orig = s["steps"]
            part.n_iter_2, part.n_iter_min, part.size_decr = (
                max(int(share * s["steps"]), 1) for share in (0.22, 0.06, 0.03)
            )
        run.fab.n_iter = s["steps"]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found, predictions = run.run_standard_evaluation(
                self.x.contiguous(), self.y, batch_size=batch
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if out is not None:
            success = (predictions != self.y).cpu().numpy()
            x = found.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            np.savez(self.folder / out, x=x, success=success)
        return {"seconds": seconds}


if __name__ == "__main__":
    _peer_networks.serve(Session())
