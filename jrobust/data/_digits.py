"""The handwritten digits of scikit-learn."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from jrobust.data._dataset import Dataset


class Splits(NamedTuple):
    """Training, validation and test data, disjoint."""

    train: Dataset
    validation: Dataset
    test: Dataset


def digits() -> Splits:
    """1,797 real handwritten digits: 1,197 for training, 200 for validation, 400 for test.

    Each image is float32 (8, 8, 1) in [0, 1] (the counts 0 .. 16 of the source, over 16), each
    label int32 in 0 .. 9; ``id`` is the position in scikit-learn's ``load_digits``.

    The split is fixed and stratified. Examples are sorted by class, within a class by the SHA-256
    of their id in decimal digits; of each nine in a row, places 0 and 1 go to test, 2 to
    validation, the rest to training. Within a split they are sorted by that hash, so the
    first n are a random sample.

    Raises ``ImportError`` without scikit-learn (``pip install 'jrobust[data]'``).

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998: its test set, by 13 writers. Neighbouring examples are often by
    one writer, so a split at random measures known writers.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install 'jrobust[data]'") from error
    source = load_digits()
    x = (source.images[..., None] / 16).astype(np.float32)
    y = source.target.astype(np.int32)
    data = Dataset(x, y)
    order = sorted(data.id.tolist(), key=_hash)
    by_class = sorted(order, key=lambda i: int(y[i]))
    place = {i: p % 9 for p, i in enumerate(by_class)}
    return Splits(
        train=data[np.array([i for i in order if place[i] > 2])],
        validation=data[np.array([i for i in order if place[i] == 2])],
        test=data[np.array([i for i in order if place[i] < 2])],
    )


def _hash(example: int) -> bytes:
    return hashlib.sha256(str(example).encode()).digest()
