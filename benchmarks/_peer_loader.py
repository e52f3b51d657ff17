"""PyTorch's DataLoader on the files of `loader.py`, driven by JSON lines; see `_common.Peer`.

Runs in an environment of its own: torch, numpy and Pillow only.
"""

import pathlib
import time

import numpy as np
import torch
from _peer_networks import serve
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Folder(Dataset):
    """Images of a folder <class>/<image>.png as float32 in [0, 1], channels first."""

    def __init__(self, root):
        self.files = sorted(pathlib.Path(root).glob("*/*.png"))
        names = sorted({file.parent.name for file in self.files})
        self.labels = [names.index(file.parent.name) for file in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index]) as image:
            pixels = np.array(image.convert("RGB"))
        x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
        return x, self.labels[index], index


class Memory(Dataset):
    """The same from an array of bytes (N, H, W, 3), a batch at a time."""

    def __init__(self, path):
        with np.load(path) as arrays:
            self.x = torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).contiguous()
            self.y = torch.from_numpy(arrays["y"])

    def __len__(self):
        return len(self.x)

    def __getitems__(self, index):
        index = torch.tensor(index)
        return self.x[index].float().div_(255), self.y[index], index


class Session:
    """The state between requests; each public method is one."""

    def open(self, folder, batch, threads):
        """Prepare to read the files in `folder`; say what this is."""
        torch.set_num_threads(threads)
        root = pathlib.Path(folder)
        self.data = {"folder": Folder(root / "images"), "memory": Memory(root / "images.npz")}
        self.batch, self.root, self.loaders = batch, root, {}
        return {"versions": {"torch": torch.__version__}, "device": f"cpu, {threads} threads"}

    def _loader(self, kind, workers):
        if (kind, workers) not in self.loaders:
            self.loaders[kind, workers] = DataLoader(
                self.data[kind],
                batch_size=self.batch,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
                collate_fn=None if kind == "folder" else lambda batch: batch,
            )
        return self.loaders[kind, workers]

    def close(self, kind, workers):
        """End the workers of a loader that is not asked again."""
        self.loaders.pop((kind, workers), None)
        return {}

    def epoch(self, kind, workers, out):
        """Sums of the pixels, labels and positions of an epoch, in its order."""
        parts = [(x.sum((1, 2, 3)), y, index) for x, y, index in self._loader(kind, workers)]
        sums, labels, index = (torch.cat(part).numpy() for part in zip(*parts))
        np.savez(self.root / out, sums=sums, labels=labels, index=index)
        return {}

    def time(self, kind, workers, repeats):
        """Seconds per example over whole epochs."""
        loader = self._loader(kind, workers)
        begin = time.perf_counter()
        count = 0
        for _ in range(repeats):
            for x, _, _ in loader:
                count += len(x)
        return {"seconds": (time.perf_counter() - begin) / count}


if __name__ == "__main__":
    serve(Session())
