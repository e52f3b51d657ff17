"""Tiny archives in the genuine formats of image data sets, with what they hold.

Each function writes into a folder and returns ``{split: (images, labels)}`` in the official order.
"""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from scipy.io import savemat

TRAIN, TEST = 12, 6


def draw(n, shape, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, (np.arange(n) * 7 % classes).astype(np.uint8)


def idx(path, array):
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">HBB", 0, 8, array.ndim))
        file.write(struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def mnist(folder):
    splits = {}
    for seed, (split, part, n) in enumerate((("train", "train", TRAIN), ("test", "t10k", TEST))):
        images, labels = splits[split] = draw(n, (28, 28, 1), seed=seed)
        idx(folder / f"{part}-images-idx3-ubyte.gz", images[..., 0])
        idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return splits


def tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def planes(images):
    """(N, 32, 32, 3) as CIFAR's rows of colour planes."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


class Python2Pickler(pickle._Pickler):
    """Writes strings with the opcodes of Python 2, which knew no others."""

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        if len(data) < 256:
            self.write(b"U" + bytes([len(data)]) + data)
        else:
            self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def python2(value):
    """What cPickle of Python 2 makes of ``value``, arrays included."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


CIFAR10_NAMES = [f"thing{i}" for i in range(10)]


def _cifar10():
    return {"train": draw(10, (32, 32, 3)), "test": draw(TEST, (32, 32, 3), seed=1)}


def _parts():
    splits = _cifar10()
    images, labels = splits["train"]
    parts = {f"data_batch_{i + 1}": (images[2 * i :][:2], labels[2 * i :][:2]) for i in range(5)}
    return splits, {**parts, "test_batch": splits["test"]}


def cifar10(folder):
    splits, parts = _parts()
    members = {
        f"cifar-10-batches-bin/{name}.bin": np.hstack([y[:, None], planes(x)]).tobytes()
        for name, (x, y) in parts.items()
    }
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*CIFAR10_NAMES, ""]).encode()
    tar(folder / "cifar-10-binary.tar.gz", members)
    return splits


def cifar10_python(folder):
    splits, parts = _parts()
    members = {
        f"cifar-10-batches-py/{name}": python2(
            {"batch_label": name, "data": planes(x), "labels": y.tolist(), "filenames": ["a.png"]}
        )
        for name, (x, y) in parts.items()
    }
    meta = {"num_cases_per_batch": 2, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    members["cifar-10-batches-py/batches.meta"] = python2(meta)
    tar(folder / "cifar-10-python.tar.gz", members)
    return splits


def _cifar100():
    return {"train": draw(9, (32, 32, 3), 100), "test": draw(TEST, (32, 32, 3), 100, seed=1)}


FINE, COARSE = [f"fine{i}" for i in range(100)], [f"coarse{i}" for i in range(20)]


def cifar100(folder):
    splits = _cifar100()
    members = {
        f"cifar-100-binary/{split}.bin": np.hstack([y[:, None] // 5, y[:, None], planes(x)])
        .astype(np.uint8)
        .tobytes()
        for split, (x, y) in splits.items()
    }
    members["cifar-100-binary/fine_label_names.txt"] = "\n".join(FINE).encode()
    members["cifar-100-binary/coarse_label_names.txt"] = "\n".join(COARSE).encode()
    tar(folder / "cifar-100-binary.tar.gz", members)
    return splits


def cifar100_python(folder):
    splits = _cifar100()
    members = {
        f"cifar-100-python/{split}": python2(
            {"data": planes(x), "fine_labels": y.tolist(), "coarse_labels": (y // 5).tolist()}
        )
        for split, (x, y) in splits.items()
    }
    meta = {"fine_label_names": FINE, "coarse_label_names": COARSE}
    members["cifar-100-python/meta"] = python2(meta)
    tar(folder / "cifar-100-python.tar.gz", members)
    return splits


def svhn(folder, splits=("train", "test", "extra")):
    made = {}
    for seed, split in enumerate(splits):
        images, labels = made[split] = draw(TRAIN - seed, (32, 32, 3), seed=seed)
        # In MATLAB's order, and the digit 0 is 10.
        stored = np.where(labels == 0, 10, labels)[:, None]
        matrix = {"X": images.transpose(1, 2, 3, 0), "y": stored}
        savemat(folder / f"{split}_32x32.mat", matrix, do_compression=True)
    return made


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def cifar10_corrupted(folder, files=("fog", "glass_blur")):
    """Labels and, for each corruption, images of severities 1 to 5."""
    labels = draw(5, (1,))[1]
    members = {"CIFAR-10-C/labels.npy": npy(np.tile(labels, 5))}
    made = {}
    for seed, name in enumerate(files):
        images = draw(25, (32, 32, 3), seed=seed)[0]
        members[f"CIFAR-10-C/{name}.npy"] = npy(images)
        made |= {f"{name}_{s + 1}": (images[5 * s :][:5], labels) for s in range(5)}
    tar(folder / "CIFAR-10-C.tar", members, "w")
    return made


def mnist_corrupted(folder, configs=("fog", "shear")):
    made = {}
    with zipfile.ZipFile(folder / "mnist_c.zip", "w") as archive:
        for seed, config in enumerate(configs):
            for split, n in (("train", TRAIN), ("test", TEST)):
                images, labels = made[config, split] = draw(n, (28, 28, 1), seed=seed)
                archive.writestr(f"mnist_c/{config}/{split}_images.npy", npy(images))
                archive.writestr(f"mnist_c/{config}/{split}_labels.npy", npy(labels))
    return made
