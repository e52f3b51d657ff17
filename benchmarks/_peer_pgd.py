"""PGD in plain PyTorch on the network of `pgd.py`, driven by JSON lines; see `_common.Peer`.

Runs in an environment of its own: torch and numpy only.
"""

import pathlib
import time

import _peer_networks
import numpy as np
import torch
from torch.nn import functional


class Session:
    """The state between requests; each public method is one."""

    def open(self, folder, settings, network, threads):
        """Load the network and the examples, say what this is."""
        self.model, arrays, self.device, answer = _peer_networks.read(folder, network, threads)
        self.fast = settings["precision"] == "tensorfloat32"
        self.folder, self.settings = pathlib.Path(folder), settings
        self.x, self.start = self._image(arrays["x"]), self._image(arrays["start"])
        self.y = _peer_networks.labels(arrays["y"], self.device)
        return answer

    def _image(self, x):
        return _peer_networks.image(x, self.device)

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


if __name__ == "__main__":
    _peer_networks.serve(Session())
