"""Examples that are read when they are asked for, and image folders."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jrobust.data._dataset import Dataset

# positions (n,) -> inputs (n, ...), uint8 or float32, and integer labels (n,)
Fetch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

_CHUNK = 256  # examples that one thread reads at a time
_EXTENSIONS = (".png", ".jpg", ".jpeg")


def unit(x: np.ndarray) -> np.ndarray:
    """Bytes 0 .. 255 as float32 in [0, 1]; anything else as float32."""
    if x.dtype == np.uint8:
        return np.divide(x, np.float32(255), dtype=np.float32)
    return np.asarray(x, np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Examples in storage with random access: what does not fit into memory, or need not be there.

    ``len(source)`` is N; a slice, an array of positions or a boolean mask gives another source,
    whose examples keep their ids. Nothing is read before :meth:`rows`, :meth:`read` or
    :meth:`cache`. ``loops.fit`` trains on a source and reads ahead of the device; ``evaluate`` and
    ``certify`` take data in memory: ``source[:1000].read()``.

    Attributes:
      fetch: ``fetch(positions (n,)) -> (x (n, ...), y (n,))``; x uint8, which stands for [0, 1] in
        steps of 1/255, or float32. Called from several threads.
      position: (N,) positions to hand to ``fetch``.
      classes: labels lie in 0 .. classes - 1.
      name: what this is, for errors.
      id: (N,) int32, see :class:`Dataset`; default 0 .. N - 1.
      digest: identifies the content where a run is resumed; default the name.

    Raises ``ValueError`` where the lengths differ or an id appears twice.
    """

    fetch: Fetch
    position: np.ndarray
    classes: int
    name: str
    id: np.ndarray = None  # type: ignore[assignment]
    digest: str = ""

    def __post_init__(self) -> None:
        position = np.asarray(self.position)
        # A data set checks what both have in common.
        checked = Dataset(position, np.zeros(len(position), np.int32), self.id)
        object.__setattr__(self, "position", position)
        object.__setattr__(self, "id", checked.id)
        object.__setattr__(self, "digest", self.digest or self.name)

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, index: slice | np.ndarray) -> Source:
        part = Dataset(self.position, self.position, self.id)[index]
        return dataclasses.replace(self, position=part.x, id=part.id)

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read x (n, ...) float32, y (n,) int32 and id (n,) of the examples at ``index`` (n,).

        Raises ``ValueError`` where an example cannot be read, or is not what was announced.
        """
        x, y = self._stored(index)
        return unit(x), y, self.id[index]

    def _stored(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            x, y = self.fetch(self.position[index])
        except Exception as error:
            # Whatever damaged storage leads to: readers and decoders fail in a dozen ways.
            raise ValueError(
                f"{self.name} could not be read: {type(error).__name__}: {error}"
            ) from error
        x, y = np.asarray(x), np.asarray(y)
        if len(x) != len(index) or y.shape != (len(index),):
            raise ValueError(
                f"{self.name} was asked for {len(index)} examples and gave inputs of shape "
                f"{x.shape} and labels of shape {y.shape}"
            )
        if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"{self.name} must hold uint8 or float inputs, got {x.dtype}")
        if not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{self.name} must have integer labels, got {y.dtype}")
        if len(y) and not 0 <= y.min() <= y.max() < self.classes:
            raise ValueError(
                f"{self.name} has labels {y.min()} .. {y.max()}, but {self.classes} classes"
            )
        return x, y.astype(np.int32)

    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        if not len(self):
            raise ValueError(f"{self.name}: nothing to read, no examples were selected")
        starts = range(0, len(self), _CHUNK)
        pieces = [np.arange(start, min(start + _CHUNK, len(self))) for start in starts]
        first = self._stored(pieces[0])
        x = np.empty((len(self), *first[0].shape[1:]), first[0].dtype)
        y = np.empty(len(self), np.int32)

        def fill(piece: np.ndarray) -> None:
            x[piece], y[piece] = self._stored(piece)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(fill, pieces))
        return x, y

    def read(self) -> Dataset:
        """All examples in memory, x float32."""
        x, y = self._all()
        return Dataset(unit(x), y, self.id)

    def cache(self) -> Source:
        """The same source, decoded once and kept in memory as stored: bytes stay bytes."""
        x, y = self._all()
        held = dataclasses.replace(self, position=np.arange(len(self)))
        return dataclasses.replace(held, fetch=lambda index: (x[index], y[index]))


def decode(file: Any, mode: str, size: int | None = None) -> np.ndarray:
    """A PNG or JPEG as (H, W, channels) uint8; its middle square scaled to ``size`` where given."""
    from PIL import Image

    with Image.open(file, formats=("PNG", "JPEG")) as image:
        picture: Any = image if image.mode == mode else image.convert(mode)
        if size is not None:
            short = min(picture.size)
            width, height = (max(size, round(side * size / short)) for side in picture.size)
            left, top = (width - size) // 2, (height - size) // 2
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            picture = picture.crop((left, top, left + size, top + size))
        array = np.asarray(picture, np.uint8)
    return array if array.ndim == 3 else array[..., None]


def image_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    grey: bool = False,
    first_id: int = 0,
) -> Source:
    """Images in folders, ``path/<class>/<image>.png`` or ``.jpg``: the layout of ImageNet.

    The names of the folders, sorted, are the classes 0, 1, ...; images are sorted by class and
    name. Decoded by Pillow when read, to uint8 (H, W, 3).

    Args:
        path: the folder of one split.
        size: scale the shorter side to this many pixels (bilinear, antialiased) and cut out the
            middle square. When None, all images must have one size.
        grey: one channel instead of three.
        first_id: id of the first image. Splits that are used together need distinct ids: give the
            second ``first_id=len(first)``.

    Raises:
        FileNotFoundError: where there is no such folder, or no image in it.
        ValueError: for a size that is none; when read, for a file that is no image, or images of
            different sizes.
        ImportError: without Pillow (``pip install 'jrobust[data]'``).
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("image_folder() needs Pillow: pip install 'jrobust[data]'") from error
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size must be a positive int or None, got {size!r}")
    root = pathlib.Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder of images, <class>/<image>.png or .jpg")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    files: list[pathlib.Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [p for p in (root / name).iterdir() if p.suffix.lower() in _EXTENSIONS]
        files += sorted(found)
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(
            f"{root} holds no images: expected {root}/<class>/<image> with one of the endings "
            f"{', '.join(_EXTENSIONS)}"
        )
    y, mode = np.array(labels, np.int32), "L" if grey else "RGB"
    digest = hashlib.sha256(f"{size}{mode}".encode())
    for file in files:
        digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())

    def picture(file: pathlib.Path) -> np.ndarray:
        try:
            return decode(file, mode, size)
        except OSError as error:
            raise ValueError(f"{file} is no image that can be decoded: {error}") from error

    def fetch(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [picture(files[i]) for i in index]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"images of different sizes, {sorted(shapes)}: pass size=")
        return np.stack(images), y[index]

    ids = first_id + np.arange(len(files))
    return Source(fetch, np.arange(len(files)), len(names), str(root), ids, digest.hexdigest())
