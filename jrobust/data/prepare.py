"""Prepare a data set from the official archives, in the layout of TensorFlow Datasets.

    python -m jrobust.data.prepare NAME --from DIR [--data-dir DIR]

NAME is ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``svhn``, ``cifar10_corrupted`` or
``mnist_corrupted``; the last two hold many configurations, of which ``NAME/CONFIGURATION`` prepares
one. The archives are checked against the SHA-256 that TFDS publishes, and nothing in them is run.
TensorFlow is not needed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jrobust.data._formats import Contents, Example, format_of
from jrobust.data._load import data_root, file_format, prepared, tfds

_HEX = re.compile(r"[0-9a-f]{64}")


def _png(image: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _verify(
    files: Mapping[str, pathlib.Path], published: Mapping[str, str], log: Callable[[str], None]
) -> None:
    """Raise ``ValueError`` where a file's SHA-256 is not the published one."""
    for name, path in files.items():
        if name not in published:
            log(f"{name}: not verified, TFDS publishes no checksum of it")
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != published[name]:
            raise ValueError(
                f"{path} is not the official file: its SHA-256 is {found}, expected "
                f"{published[name]}; get it again, or pass verify=False (--no-verify) if you mean "
                "this file"
            )
        log(f"{name}: SHA-256 verified")


def build(
    name: str,
    source: Any,
    data_dir: Any = None,
    *,
    verify: bool = True,
    sha256: Mapping[str, str] | None = None,
    log: Callable[[str], None] = print,
) -> list[pathlib.Path]:
    """Prepare a data set from the archives in a folder; what ``python -m`` calls.

    A data set appears complete or not at all; one that is prepared already is left as it is.

    Args:
        name: of the data set, or ``"name/configuration"``.
        source: folder of the official archives, under their official names.
        data_dir: where prepared data sets are; see ``jrobust.data.load``.
        verify: check every archive against the SHA-256 that TFDS publishes. It publishes none for
            the CIFARs' python versions and for folders of unpacked arrays, which ``log`` says.
        sha256: checksums by file name, which replace the published ones.
        log: told about each step.

    Returns:
        The folders of the data sets.

    Raises:
        FileNotFoundError: where an archive is missing.
        ValueError: for an unknown data set or configuration, a wrong checksum, an archive that is
            damaged or holds something else.
        ImportError: without tensorflow-datasets or Pillow (``pip install 'jrobust[data]'``).
    """
    form, config = format_of(name)
    stock = tfds().builder_cls(form.tfds)
    known = [one.name for one in stock.BUILDER_CONFIGS]
    if config and config not in known:
        raise ValueError(
            f"{form.tfds} has no configuration {config!r}, but {', '.join(known) or 'none at all'}"
        )
    root = data_root(data_dir)
    wanted = [config] if config or not known else known
    at = {one: prepared(root, f"{form.tfds}/{one}".rstrip("/")) for one in wanted}
    for folder in at.values():
        if folder is not None and (kind := file_format(folder)) != "array_record":
            raise ValueError(f"{folder} is in the file format {kind}: choose another data_dir")
    missing = [one for one, folder in at.items() if folder is None]
    if missing:
        files = form.find(pathlib.Path(source).expanduser())
        if stray := (sha256 or {}).keys() - files.keys():
            raise ValueError(
                f"checksums of {', '.join(stray)}, but the archives are {', '.join(files)}"
            )
        if verify:
            published = {info.filename: info.checksum for info in (stock.url_infos or {}).values()}
            _verify(files, {**published, **(sha256 or {})}, log)
    for one in missing:
        builder = stock(
            data_dir=root, file_format="array_record", **({"config": one} if one else {})
        )
        _write(builder, form.read(files, one))
        at[one] = pathlib.Path(builder.data_dir)
    folders = [folder for folder in at.values() if folder is not None]
    for folder in folders:
        log(f"prepared: {folder}")
    return folders


def _write(builder: Any, contents: Contents) -> None:
    """TFDS's own builder, but for where its examples come from."""
    shape = builder.info.features["image"].shape

    def examples(split: Callable[[], Iterator[Example]]) -> Iterator[tuple[int, Example]]:
        # Numbered as TFDS numbers them: the order in the shards follows from it.
        for number, example in enumerate(split()):
            image = example["image"]
            if image.shape != shape or image.dtype != "uint8":
                raise ValueError(f"expected uint8 images {shape}, got {image.dtype} {image.shape}")
            yield number, {**example, "image": _png(image)}

    for field, names in contents.names.items():
        feature = builder.info.features[field]
        if len(names) != feature.num_classes:
            raise ValueError(
                f"{builder.name} has {feature.num_classes} classes of {field}, the archive "
                f"{len(names)}: {', '.join(names)}"
            )
        feature.names = names
    builder._split_generators = lambda manager: {
        name: examples(split) for name, split in contents.splits.items()
    }
    # TFDS says that it is downloading, and makes a folder for that.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as nowhere:
        builder.download_and_prepare(download_dir=nowhere)


def _checksum(text: str) -> tuple[str, str]:
    name, _, value = text.rpartition("=")
    if not name or not _HEX.fullmatch(value):
        raise argparse.ArgumentTypeError("expected FILE=HEX, the SHA-256 in 64 lower-case digits")
    return name, value


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jrobust.data.prepare",
        description="Prepare a data set from its official archives, in TFDS's layout.",
    )
    parser.add_argument("name", help="data set, or data set/configuration")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="folder of the archives"
    )
    parser.add_argument("--data-dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument(
        "--no-verify", action="store_true", help="take archives whose checksum is not the published"
    )
    parser.add_argument(
        "--sha256",
        type=_checksum,
        action="append",
        default=[],
        metavar="FILE=HEX",
        help="checksum of an archive, in place of the published one",
    )
    args = parser.parse_args(arguments)
    try:
        build(
            args.name,
            args.source,
            args.data_dir,
            verify=not args.no_verify,
            sha256=dict(args.sha256),
        )
    except (FileNotFoundError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
