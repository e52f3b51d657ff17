"""Minimal-norm attacks of foolbox and adv-lib, driven by JSON lines; see _libraries.py.

adv-lib's attacks need torch only, but its package imports more: perceptual distances, plots. Those
are stood in for, so that it fits into the environment of the others.
"""

import sys
import unittest.mock

import _libraries
import _peer_networks
import numpy as np
import torch

ABSENT = (
    "adv_lib.distances.color_difference",
    "adv_lib.distances.lpips",
    "adv_lib.distances.structural_similarity",
    "adv_lib.utils.visdom_logger",
    "torchvision",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "tqdm",
    "visdom",
)
sys.modules.update((name, unittest.mock.MagicMock()) for name in ABSENT if name not in sys.modules)

from adv_lib import attacks  # noqa: E402


class Session(_libraries.Session):
    def open(self, **arguments):
        """See the parent; counts the network's forward passes of the batch."""
        answer = super().open(**arguments)
        self.passes = 0
        self.model.register_forward_hook(self._count)
        return answer

    def _count(self, *_):
        self.passes += 1

    def count(self):
        """Forward passes since the last time."""
        passes, self.passes = self.passes, 0
        return {"passes": passes}

    def adversarial_library(self, name, points, out, arguments):
        """Run an attack of adv-lib; its number for a norm without bound is "inf"."""
        given = self._load(points)
        x = self._image(given["x"]).contiguous()
        y = torch.from_numpy(given["y"].astype(np.int64))
        if arguments.get("norm") == "inf":
            arguments["norm"] = float("inf")
        torch.manual_seed(0)
        found = getattr(attacks, name)(self.model, x, y, **arguments)
        with torch.no_grad():
            logits = self.model(found)
        x = found.permute(0, 2, 3, 1).contiguous().numpy()
        return self._save(out, x=x, logits=logits.numpy())


if __name__ == "__main__":
    _peer_networks.serve(Session())
