"""The digits: real, fixed, disjoint, stratified; and the data set type."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from jrobust.data import Dataset, digits

# The split that every published figure refers to.
IDS = {
    "train": "60f8e0053cc0932ab3c8910a18f8416467e99c2efa09a5f25a019c6e2bf4e448",
    "validation": "bf65bdaa20c6632f492eb52c70e16442466b023327d70d1a1bd6de1d7a84f088",
    "test": "4bb0f8e690eea2c61dd5e797914a87823896256af95f72d4d3d4cdf0a3273d25",
}
PIXELS = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"


@pytest.fixture(scope="module")
def splits():
    return digits()


def test_sizes_and_types(splits):
    assert [len(d) for d in splits] == [1197, 200, 400]
    for d in splits:
        assert d.x.dtype == np.float32
        assert d.x.shape == (len(d), 8, 8, 1)
        assert d.y.dtype == d.id.dtype == np.int32
        assert d.x.min() == 0
        assert d.x.max() == 1


def test_the_split_is_pinned(splits):
    for name, d in splits._asdict().items():
        assert hashlib.sha256(d.id.astype("<i4").tobytes()).hexdigest() == IDS[name], name


def test_disjoint_and_complete(splits):
    ids = np.concatenate([d.id for d in splits])
    assert sorted(ids) == list(range(1797))


def test_stratified(splits):
    total = np.bincount(np.concatenate([d.y for d in splits]))
    for d, share in zip(splits, (6 / 9, 1 / 9, 2 / 9)):
        assert np.abs(np.bincount(d.y, minlength=10) - total * share).max() <= 1.5


def test_a_prefix_is_a_mix_of_classes(splits):
    assert all(np.bincount(d.y[:100], minlength=10).min() >= 3 for d in splits)


def test_images_and_labels_are_those_of_the_source(splits):
    from sklearn.datasets import load_digits

    source = load_digits()
    assert hashlib.sha256(source.images.astype("u1").tobytes()).hexdigest() == PIXELS
    for d in splits:
        np.testing.assert_array_equal(d.x[..., 0] * 16, source.images[d.id])
        np.testing.assert_array_equal(d.y, source.target[d.id])


def test_slices_keep_ids(splits):
    d = splits.test
    part = d[10:20]
    assert isinstance(part, Dataset)
    assert len(part) == 10
    np.testing.assert_array_equal(part.id, d.id[10:20])
    again = d[np.array([3, 1])]
    np.testing.assert_array_equal(again.x, d.x[[3, 1]])
    zeros = d[d.y == 0]
    assert len(zeros) == (d.y == 0).sum()
    assert (zeros.y == 0).all()


def test_default_ids():
    d = Dataset(np.zeros((3, 2)), np.array([0, 1, 0]))
    np.testing.assert_array_equal(d.id, [0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((np.zeros((3, 2)), np.array([0, 1])), ValueError, r"y must have shape \(3,\)"),
        ((np.zeros((2, 2)), np.array([0.0, 1.0])), TypeError, "y must be integers, got float64"),
        ((np.zeros((2, 2)), np.array([0, 1]), np.array([5, 5])), ValueError, "unique"),
        ((np.zeros((2, 2)), np.array([0, 1]), np.array([5, 5 + 2**32])), ValueError, "32 bits"),
    ],
)
def test_bad_data_sets(arguments, error, text):
    with pytest.raises(error, match=text):
        Dataset(*arguments)


def test_one_position_is_refused(splits):
    with pytest.raises(TypeError, match=r"data\[i:i \+ 1\]"):
        splits.test[0]


def test_without_scikit_learn():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sklearn":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
import jrobust.data
try:
    jrobust.data.digits()
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'jrobust[data]'" in out.stdout
