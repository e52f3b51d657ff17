"""Prepared data sets in TFDS's layout, without TensorFlow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from typing import Any

import numpy as np

from jrobust.data._formats import Format, format_of
from jrobust.data._source import Source, decode

_FIRST = {"train": 0, "test": 1}


def tfds() -> Any:
    """TensorFlow Datasets, which does not need TensorFlow for what is done here."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "prepared data sets need tensorflow-datasets, and no TensorFlow: "
            "pip install 'jrobust[data]'"
        ) from error
    return tensorflow_datasets


def data_root(data_dir: Any) -> pathlib.Path:
    """Where prepared data sets are: ``data_dir``, ``$TFDS_DATA_DIR`` or ~/tensorflow_datasets."""
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(given).expanduser()


def prepared(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder of the newest version of ``name`` that was prepared whole."""

    def version(folder: pathlib.Path) -> tuple[int, ...]:
        return tuple(int(part) for part in folder.name.split("."))

    # What TFDS is still writing has another name, and gets this one when it is complete.
    complete = [p.parent for p in (root / name).glob("*.*.*/dataset_info.json")]
    complete = [p for p in complete if p.name.replace(".", "").isdigit()]
    return max(complete, key=version, default=None)


def file_format(folder: pathlib.Path) -> str:
    """Of a prepared data set, by its TFDS name."""
    return json.loads((folder / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")


def _how(form: Format, name: str, where: str) -> str:
    return (
        f"put {form.wanted()} into a folder DIR and run "
        f"`python -m jrobust.data.prepare {name} --from DIR{where}`"
    )


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """A split of a prepared data set, in the layout of TensorFlow Datasets (ArrayRecord).

    ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``svhn``,
    ``cifar10_corrupted/<corruption>_<severity>`` and ``mnist_corrupted/<corruption>`` (TFDS's names
    of configurations). ``python -m jrobust.data.prepare NAME --from DIR`` makes the layout from the
    official archives; one that TFDS made itself with ``file_format="array_record"`` is read just
    as well. TensorFlow is not needed, and nothing is downloaded.

    Images are uint8 and come as float32 in [0, 1]. The ``id`` of an example is its place in the
    whole data set, train, test and other splits in a row, so that any two splits
    and slices have distinct ids.

    Args:
        name: of the data set.
        split: in TFDS's notation: ``"train"``, ``"train[:45000]"``, ``"test[:10%]"``,
            ``"train+test"``.
        data_dir: where prepared data sets are; ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``
            when None.

    Raises:
        FileNotFoundError: where it is not prepared; says which archives to put where, and what to
            run.
        ValueError: for an unknown name, configuration or split, an empty slice, data that TFDS
            prepared in another file format.
        ImportError: without tensorflow-datasets (``pip install 'jrobust[data]'``).
    """
    form, config = format_of(name)
    base = name.partition("/")[0]
    root = data_root(data_dir)
    folder = prepared(root, f"{form.tfds}/{config}".rstrip("/"))
    if folder is None:
        entries = sorted((root / form.tfds).glob("*")) if not config else []
        configs = [e.name for e in entries if prepared(root, f"{form.tfds}/{e.name}")]
        if configs:
            raise ValueError(
                f"{base} has configurations: name one, as in {base}/{configs[0]}; prepared are "
                f"{', '.join(configs)}"
            )
        how = _how(form, name, f" --data-dir {root}" if data_dir else "")
        raise FileNotFoundError(
            f"{name} is not prepared in {root}, and nothing is downloaded: {how}"
        )
    if (kind := file_format(folder)) != "array_record":
        raise ValueError(
            f"{folder} is in the file format {kind}, which has no random access: "
            + _how(form, name, " --data-dir OTHER")
        )
    return _source(folder, split)


def _source(folder: pathlib.Path, split: str) -> Source:
    data = tfds()
    from tensorflow_datasets.proto import tf_example_pb2

    builder = data.builder_from_directory(folder)
    infos = builder.info.splits
    # Not in the order of names: "extra" of SVHN may be there or not.
    names = sorted(infos, key=lambda name: (_FIRST.get(name, len(_FIRST)), name))
    sizes = [infos[name].num_examples for name in names]
    starts = dict(zip(names, np.cumsum([0, *sizes]).tolist()))
    try:
        parts = data.core.splits.AbstractSplit.from_spec(split).to_absolute(infos)
    except Exception as error:
        # TFDS raises many kinds, some of them with several lines of advice for other cases.
        raise ValueError(
            f"{split!r} is no split of {folder}, which has {', '.join(names)}; slices are written "
            "as in 'train[:45000]'"
        ) from error
    place = {name: starts[name] + np.arange(infos[name].num_examples) for name in names}
    position = np.concatenate([place[part.splitname][part.from_ : part.to] for part in parts])
    if not len(position):
        raise ValueError(f"the split {split!r} of {folder} holds no examples")
    feature = builder.info.features
    raw = data.decode.DeserializeMethod.RAW_BYTES
    stored = builder.as_data_source(deserialize_method=raw)
    mode = "L" if feature["image"].shape[-1] == 1 else "RGB"
    edges = np.array([starts[name] for name in names])

    def example(record: bytes) -> tuple[np.ndarray, int]:
        # As TFDS does it, in half the time: it looks at the tree of features for each example.
        fields = tf_example_pb2.Example.FromString(record).features.feature
        image = decode(io.BytesIO(fields["image"].bytes_list.value[0]), mode)
        return image, fields["label"].int64_list.value[0]

    def fetch(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images: list[Any] = [None] * len(index)
        labels = np.empty(len(index), np.int32)
        which = np.searchsorted(edges, index, "right") - 1
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            records = stored[names[number]].__getitems__((index[rows] - edges[number]).tolist())
            for row, record in zip(rows, records):
                images[row], labels[row] = example(record)
        return np.stack(images), labels

    digest = hashlib.sha256((folder / "dataset_info.json").read_bytes()).hexdigest()
    return Source(
        fetch, position, feature["label"].num_classes, f"{folder} [{split}]", position, digest
    )
