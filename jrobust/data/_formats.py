"""The official archives of image data sets, read without running anything in them."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import pathlib
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jrobust.models._tensors import _NUMPY, _Array, _Known, _plain, _Unpickler

Example = dict[str, Any]  # one image (H, W, channels) uint8, integers and texts


class Contents(NamedTuple):
    """What archives hold.

    Attributes:
        splits: by name, a function that iterates over the examples in their official order.
        names: of classes, by label; empty where the archives do not tell.
    """

    splits: dict[str, Callable[[], Iterator[Example]]]
    names: dict[str, list[str]]


Files = Mapping[str, pathlib.Path]  # those that were found, by official name


@dataclasses.dataclass(frozen=True)
class Format:
    """How a data set is distributed.

    Attributes:
        tfds: its name in TFDS.
        archives: official file names; each entry lists what has to be there together, any entry
            will do.
        read: the contents, of one configuration where there are several.
        optional: file names that may be missing.
    """

    tfds: str
    archives: tuple[tuple[str, ...], ...]
    read: Callable[[Files, str], Contents]
    optional: tuple[str, ...] = ()

    def wanted(self) -> str:
        """What to put where, in words."""
        text = ", or ".join(" and ".join(entry) for entry in self.archives)
        return text + (f" ({', '.join(self.optional)} too, if you want it)" * bool(self.optional))

    def find(self, folder: pathlib.Path) -> dict[str, pathlib.Path]:
        """The files in ``folder``; ``FileNotFoundError`` where they are not complete."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; put there {self.wanted()}")
        for entry in self.archives:
            if all((folder / name).exists() for name in entry):
                names = [*entry, *(n for n in self.optional if (folder / n).exists())]
                return {name: folder / name for name in names}
        here = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder} must hold {self.wanted()}; it holds {', '.join(here[:20]) or 'nothing'}"
        )


def guarded(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    """``read()``, whatever a damaged file leads to as ``ValueError`` with the file's name."""
    try:
        return read()
    except Exception as error:
        # Decompressors, unpicklers and parsers fail in a dozen ways.
        raise ValueError(
            f"{path} is damaged, truncated or not what its name says: "
            f"{type(error).__name__}: {error}"
        ) from error


def _split(images: np.ndarray, fields: Mapping[str, Any], prefix: str | None = None) -> Any:
    """Examples of images (N, H, W, channels) and of fields (N,), numbered where TFDS does."""

    def examples() -> Iterator[Example]:
        for i, image in enumerate(images):
            example = {"image": image, **{name: int(v[i]) for name, v in fields.items()}}
            yield example if prefix is None else {**example, "id": prefix.format(i)}

    for name, values in fields.items():
        if len(values) != len(images):
            raise ValueError(f"{len(images)} images, but {len(values)} of {name}")
    return examples


# IDX: MNIST, Fashion-MNIST


def read_idx(path: pathlib.Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes, as MNIST's authors describe it."""

    def read() -> np.ndarray:
        with gzip.open(path) as file:
            zeros, kind, rank = struct.unpack(">HBB", file.read(4))
            if zeros or kind != 8:
                raise ValueError("no IDX file of unsigned bytes")
            shape = struct.unpack(f">{rank}I", file.read(4 * rank))
            data = np.frombuffer(file.read(), np.uint8)
        if data.size != np.prod(shape, dtype=np.int64):
            raise ValueError(f"{data.size} bytes of data for the shape {shape}")
        return data.reshape(shape)

    return guarded(path, read)


_IDX = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)


def _mnist(files: Files, config: str) -> Contents:
    splits = {}
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = (
            read_idx(files[f"{part}-{kind}-ubyte.gz"]) for kind in ("images-idx3", "labels-idx1")
        )
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{files[f'{part}-images-idx3-ubyte.gz']} and its labels hold arrays of shapes "
                f"{images.shape} and {labels.shape}, not of images and their labels"
            )
        splits[split] = _split(images[..., None], {"label": labels})
    return Contents(splits, {})


# CIFAR


def _members(path: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    """Members of a tar archive, in memory: nothing is unpacked, so no path can lead elsewhere."""

    def read() -> dict[str, bytes]:
        found = {}
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in names and member.isreg():
                    file = archive.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"no {', '.join(missing)} in it")
        return found

    return guarded(path, read)


def _planes(data: np.ndarray) -> np.ndarray:
    """CIFAR's rows (N, 3072) of colour planes as images (N, 32, 32, 3)."""
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


class _OldArray(_Array):
    """An array that Python 2 pickled, whose bytes arrive as text."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *shape, data = state
        super().__setstate__((*shape, data.encode("latin1") if isinstance(data, str) else data))


_OLD = {**_NUMPY}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _OLD[_module, "_reconstruct"] = _Known(lambda *_: _OldArray())


class _OldUnpickler(_Unpickler):
    """Knows arrays and plain containers, of Python 2 too, and refuses everything else."""

    def __init__(self, data: bytes) -> None:
        pickle.Unpickler.__init__(self, io.BytesIO(data), encoding="latin1")
        self._known, self._storage = _OLD, None


@dataclasses.dataclass(frozen=True)
class _Cifar:
    """The layout of one of the two CIFARs, in both its versions."""

    folders: tuple[str, str]  # binary, python
    train: tuple[str, ...]
    test: str
    labels: tuple[tuple[str, str, str, str], ...]  # field, its names: file; key in meta; its values

    def __call__(self, files: Files, config: str) -> Contents:
        ((name, path),) = files.items()
        return self._binary(path) if "binary" in name else self._python(path)

    def _binary(self, path: pathlib.Path) -> Contents:
        folder = self.folders[0]
        texts = [f"{folder}/{file}" for _, file, _, _ in self.labels]
        train = [f"{folder}/{name}.bin" for name in self.train]
        test = f"{folder}/{self.test}.bin"
        found = _members(path, [*texts, *train, test])

        def split(prefix: str, names: Sequence[str]) -> Any:
            width = len(self.labels) + 3072
            data = np.frombuffer(b"".join(found[name] for name in names), np.uint8)
            if data.size % width:
                raise ValueError(f"{data.size} bytes are no records of {width}")
            records = data.reshape(-1, width)
            fields = {field: records[:, i] for i, (field, *_) in enumerate(self.labels)}
            return _split(_planes(records[:, len(self.labels) :]), fields, prefix)

        splits = guarded(
            path,
            lambda: {"train": split("train_{:05d}", train), "test": split("test_{:05d}", [test])},
        )
        names = {
            field: found[text].decode().split() for (field, *_), text in zip(self.labels, texts)
        }
        return Contents(splits, names)

    def _python(self, path: pathlib.Path) -> Contents:
        folder = self.folders[1]
        meta = "batches.meta" if len(self.labels) == 1 else "meta"
        names = [f"{folder}/{name}" for name in (*self.train, self.test, meta)]
        found = _members(path, names)

        def read(name: str) -> dict[str, Any]:
            return _plain(_OldUnpickler(found[f"{folder}/{name}"]).load())

        def split(prefix: str, names: Sequence[str]) -> Any:
            batches = [read(name) for name in names]
            images = np.concatenate([_planes(np.asarray(b["data"], np.uint8)) for b in batches])
            fields = {
                field: np.concatenate([np.asarray(b[values], np.uint8) for b in batches])
                for field, _, _, values in self.labels
            }
            return _split(images, fields, prefix)

        splits = guarded(
            path,
            lambda: {
                "train": split("train_{:05d}", self.train),
                "test": split("test_{:05d}", [self.test]),
            },
        )
        classes = guarded(path, lambda: read(meta))
        return Contents(splits, {f: list(classes[key]) for f, _, key, _ in self.labels})


_CIFAR10 = _Cifar(
    ("cifar-10-batches-bin", "cifar-10-batches-py"),
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    (("label", "batches.meta.txt", "label_names", "labels"),),
)
_CIFAR100 = _Cifar(
    ("cifar-100-binary", "cifar-100-python"),
    ("train",),
    "test",
    (
        ("coarse_label", "coarse_label_names.txt", "coarse_label_names", "coarse_labels"),
        ("label", "fine_label_names.txt", "fine_label_names", "fine_labels"),
    ),
)


# SVHN


def _svhn(files: Files, config: str) -> Contents:
    from scipy.io import loadmat

    def read(path: pathlib.Path, prefix: str) -> Any:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].ravel().astype(int)
        if images.dtype != np.uint8 or not np.isin(labels, np.arange(1, 11)).all():
            raise ValueError(f"X of type {images.dtype}, y in {labels.min()} .. {labels.max()}")
        return _split(images, {"label": labels % 10}, prefix)  # the digit 0 is stored as 10

    splits = {}
    for name, path in files.items():
        split = name.removesuffix("_32x32.mat")
        splits[split] = guarded(path, functools.partial(read, path, split + "_{:06d}"))
    return Contents(splits, {})


# CIFAR-10-C and MNIST-C: arrays in a tar or a zip

# What TFDS calls otherwise than the archive.
_RENAMED = {"frosted_glass_blur": "glass_blur", "elastic": "elastic_transform"}


def _arrays(path: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
    """NumPy arrays of a tar, a zip or a folder, whose own name begins those of its members."""

    def load(data: bytes) -> np.ndarray:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("no array of NumPy")
        return array

    def read() -> list[np.ndarray]:
        if path.is_dir():
            return [load((path.parent / name).read_bytes()) for name in names]
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return [load(archive.read(name)) for name in names]
        found = _members(path, names)
        return [load(found[name]) for name in names]

    return guarded(path, read)


def _cifar_c(files: Files, config: str) -> Contents:
    corruption, _, severity = config.rpartition("_")
    ((_, path),) = files.items()
    file = _RENAMED.get(corruption, corruption)
    images, labels = _arrays(path, [f"CIFAR-10-C/{file}.npy", "CIFAR-10-C/labels.npy"])
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(images) % 5:
        raise ValueError(
            f"{path}: {file}.npy and labels.npy have shapes {images.shape} and {labels.shape}, "
            "not of five severities of images and their labels"
        )
    n = len(images) // 5
    part = slice((int(severity) - 1) * n, int(severity) * n)
    return Contents({"test": _split(images[part], {"label": labels[part]})}, {})


def _mnist_c(files: Files, config: str) -> Contents:
    ((_, path),) = files.items()
    splits = {}
    for split in ("train", "test"):
        names = [f"mnist_c/{config}/{split}_{kind}.npy" for kind in ("images", "labels")]
        images, labels = _arrays(path, names)
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{path}: {names[0]} and its labels have shapes {images.shape} and {labels.shape}"
            )
        splits[split] = _split(images, {"label": labels})
    return Contents(splits, {})


FORMATS = {
    "mnist": Format("mnist", (_IDX,), _mnist),
    "fashion_mnist": Format("fashion_mnist", (_IDX,), _mnist),
    "cifar10": Format(
        "cifar10", (("cifar-10-binary.tar.gz",), ("cifar-10-python.tar.gz",)), _CIFAR10
    ),
    "cifar100": Format(
        "cifar100", (("cifar-100-binary.tar.gz",), ("cifar-100-python.tar.gz",)), _CIFAR100
    ),
    "svhn": Format(
        "svhn_cropped",
        (("train_32x32.mat", "test_32x32.mat"),),
        _svhn,
        optional=("extra_32x32.mat",),
    ),
    "cifar10_corrupted": Format(
        "cifar10_corrupted", (("CIFAR-10-C.tar",), ("CIFAR-10-C",)), _cifar_c
    ),
    "mnist_corrupted": Format("mnist_corrupted", (("mnist_c.zip",), ("mnist_c",)), _mnist_c),
}


def format_of(name: str) -> tuple[Format, str]:
    """The format and the configuration (or ``""``) of ``name``, ``"data set/configuration"``.

    Raises ``ValueError`` for a data set that is not known.
    """
    base, _, config = name.partition("/")
    base = "svhn" if base == "svhn_cropped" else base
    if base not in FORMATS:
        raise ValueError(
            f"unknown data set {name!r}; known are {', '.join(FORMATS)}, and folders of images by "
            "jrobust.data.image_folder"
        )
    return FORMATS[base], config
