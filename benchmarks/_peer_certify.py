"""The published certification as a plain PyTorch loop on the networks of `certify.py`.

Cohen et al. (2019), CERTIFY: one image at a time, batches of noisy copies, a count of the answers,
a Clopper-Pearson bound. Driven by JSON lines; see `_common.Peer`. Runs in an environment of its
own: torch, numpy and scipy.
"""

import copy
import pathlib
import time

import _peer_networks
import numpy as np
import torch
from scipy import stats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Session:
    """The state between requests; each public method is one."""

    def open(self, folder, settings, network, threads):
        """Load the network and the images, say what this is."""
        model, arrays, self.device, answer = _peer_networks.read(folder, network, threads)
        self.folder, self.settings = pathlib.Path(folder), settings
        self.x = _peer_networks.image(arrays["x"], self.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.models = {
            name: copy.deepcopy(model).to(dtype) if name != "float32" else model
            for name, dtype in DTYPES.items()
        }
        return answer

    def _counts(self, x, n, batch, dtype):
        """Answers to `n` noisy copies of the image `x` (C, H, W): (classes,)."""
        channels, *size = x.shape
        sigma, model = self.settings["sigma"], self.models[dtype]
        counts = torch.zeros(self.models["float32"].head.out_features, device=self.device)
        for start in range(0, n, batch):
            shape = (min(batch, n - start), *size, channels)
            noisy = torch.randn(shape, device=self.device).permute(0, 3, 1, 2)  # channels last
            answers = model(noisy.mul_(sigma).add_(x).to(DTYPES[dtype])).argmax(1)
            # Unlike bincount, without a wait for the device.
            counts.scatter_add_(0, answers, torch.ones_like(answers, dtype=counts.dtype))
        return counts

    @torch.inference_mode()
    def votes(self, n, batch, dtype, seed, out):
        """Counts (N, classes) of `n` noisy copies of each image."""
        torch.manual_seed(seed)
        counts = torch.stack([self._counts(x, n, batch, dtype) for x in self.x])
        np.savez(self.folder / out, counts=counts.cpu().numpy().astype(np.int64))
        return {}

    @torch.inference_mode()
    def logits_at(self, points, dtype, out):
        """Logits of points (B, H, W, C) that the other side wrote."""
        with np.load(self.folder / points) as given:
            x = torch.from_numpy(given["x"]).to(self.device).permute(0, 3, 1, 2)
        logits = torch.cat([self.models[dtype](p.to(DTYPES[dtype])) for p in x.split(512)])
        np.savez(self.folder / out, logits=logits.float().cpu().numpy())
        return {}

    def certify(self, counts, alpha, out):
        """Classes (-1 for abstention), bounds and radii from counts of both stages."""
        with np.load(self.folder / counts) as given:
            select, estimate = given["select"], given["estimate"]
        top = select.argmax(1)
        hits, n = estimate[np.arange(len(top)), top], estimate.sum(1)
        # One-sided at alpha, as `proportion_confint(..., alpha=2 * alpha, method="beta")` has it.
        lower = np.where(hits > 0, stats.beta.ppf(alpha, hits, n - hits + 1), 0.0)
        sure = lower > 0.5
        np.savez(
            self.folder / out,
            prediction=np.where(sure, top, -1),
            p_lower=lower,
            radius=np.where(sure, self.settings["sigma"] * stats.norm.ppf(lower), 0.0),
        )
        return {}

    @torch.inference_mode()
    def time(self, images, n, batch, dtype):
        """Seconds for each vote: `n` for each of so many images."""
        begin = time.perf_counter()
        for i in range(images):
            self._counts(self.x[i % len(self.x)], n, batch, dtype)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": (time.perf_counter() - begin) / (images * n)}


if __name__ == "__main__":
    _peer_networks.serve(Session())
