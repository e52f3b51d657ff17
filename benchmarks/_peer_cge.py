"""Coordinatewise differences in plain PyTorch, for `cge.py`, by JSON lines; see `_common.Peer`.

Runs in an environment of its own: torch and numpy only. Two ways: each changed weight followed by a
full forward pass, and, as DeepZero does, by a pass that starts at the input of the weight's block.
"""

import pathlib
import time

import _peer_networks
import numpy as np
import torch
from torch.nn import functional


class Session:
    """One network, one batch, and some coordinates of each of its kernels."""

    def open(self, folder, settings, network, threads):
        """Load what the other side wrote; describe what runs here."""
        self.model, arrays, self.device, answer = _peer_networks.read(folder, network, threads)
        self.model.train()
        self.folder, self.mu = pathlib.Path(folder), settings["mu"]
        precision = settings["precision"] != "highest"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision
        self.x = _peer_networks.image(arrays["x"], self.device)
        self.y = _peer_networks.labels(arrays["y"], self.device)
        # Kernel -> where its coordinates are, and how many weights it has.
        self.places = {
            name[3:]: [tuple(map(int, place)) for place in arrays[name]]
            for name in arrays
            if name.startswith("at/")
        }
        return answer

    def _segments(self):
        """The network as functions one after the other, each ended by a block, and the loss."""
        m = self.model

        def stem(x):
            return functional.relu(m.norm(m.conv((x - m.mean) / m.std)), inplace=True)

        def end(h):
            return functional.cross_entropy(m.head(h.mean((2, 3))), self.y)

        return [stem, *(getattr(m, name) for name in m.names), end]

    def _first(self, kernel):
        """The segment in which a kernel is."""
        block = kernel.split(".")[0]
        if block in self.model.names:
            return 1 + self.model.names.index(block)
        return 0 if block == "conv" else 1 + len(self.model.names)

    def _losses(self, kernel, places, inputs, segments):
        """The losses with each of these weights changed, from the inputs of their segment on."""
        weight = self.model.get_parameter(f"{kernel}.weight")
        first = self._first(kernel) if len(inputs) > 1 else 0
        found = []
        for place in places:
            old = weight[place].clone()
            weight[place] += self.mu
            h = inputs[first]
            for segment in segments[first:]:
                h = segment(h)
            weight[place] = old
            found.append(h)
        return torch.stack(found)

    @torch.no_grad()
    def _inputs(self, reuse, segments):
        """The input of each segment, or of the first alone; and the loss."""
        h, inputs = self.x, []
        for segment in segments:
            inputs.append(h)
            h = segment(h)
        return (inputs if reuse else inputs[:1]), h

    @torch.no_grad()
    def estimate(self, reuse, out):
        """The quotients of all coordinates, in float64, so that nothing cancels."""
        x = self.x
        self.model.double()
        self.x = x.double()
        segments = self._segments()
        inputs, base = self._inputs(reuse, segments)
        found = {
            kernel: ((self._losses(kernel, places, inputs, segments) - base) / self.mu).cpu()
            for kernel, places in self.places.items()
        }
        self.model.float()
        self.x = x
        np.savez(self.folder / out, **found)
        return {}

    @torch.no_grad()
    def time(self, reuse, coordinates):
        """Seconds per coordinate of each kernel, by this many; the base pass is not counted."""
        segments = self._segments()
        inputs, _ = self._inputs(reuse, segments)
        seconds = {}
        for kernel, places in self.places.items():
            chosen = [places[i % len(places)] for i in range(coordinates)]
            self._wait()
            begin = time.perf_counter()
            self._losses(kernel, chosen, inputs, segments)
            self._wait()
            seconds[kernel] = (time.perf_counter() - begin) / coordinates
        return {"seconds": seconds}

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    _peer_networks.serve(Session())
