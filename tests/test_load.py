"""Prepared data sets and image folders as sources: what is read, and what is refused."""

import os
import pathlib
import re

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jrobust import data
from jrobust.data import Source, prepare
from jrobust.data._source import unit

POSITIONS = np.arange(20)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """MNIST, prepared."""
    folder = tmp_path_factory.mktemp("archives")
    archives.mnist(folder)
    made = tmp_path_factory.mktemp("data")
    prepare.build("mnist", folder, made, verify=False, log=lambda line: None)
    return made


# Prepared data sets


@pytest.mark.parametrize(
    "split",
    ["train", "test", "train[:7]", "train[-3:]", "test[:50%]", "train[2:5]+test[1:]", "test+train"],
)
def test_splits_are_those_of_tfds(root, split):
    ours = data.load("mnist", split, root)
    theirs = [
        tfds.data_source("mnist", split=part, data_dir=root, download=False)
        for part in split.split("+")
    ]
    x = np.concatenate([[example["image"] for example in part] for part in theirs])
    y = np.concatenate([[example["label"] for example in part] for part in theirs])
    found = ours.read()
    assert found.x.dtype == np.float32
    np.testing.assert_array_equal(found.x, x.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(found.y, y)


def test_ids_are_places_in_the_whole_data_set(root):
    train, test = (data.load("mnist", split, root) for split in ("train", "test"))
    np.testing.assert_array_equal(train.id, np.arange(12))
    np.testing.assert_array_equal(test.id, 12 + np.arange(6))
    part = data.load("mnist", "train[4:6]+test[:2]", root)
    np.testing.assert_array_equal(part.id, [4, 5, 12, 13])
    np.testing.assert_array_equal(part.read().x[1], train.read().x[5])


def test_colour_images_and_classes(tmp_path):
    archives.svhn(tmp_path, ("train", "test"))
    prepare.build("svhn", tmp_path, tmp_path, verify=False, log=lambda line: None)
    assert data.load("svhn", "test", tmp_path).rows(np.array([1, 3]))[0].shape == (2, 32, 32, 3)
    assert data.load("svhn_cropped", "test", tmp_path).classes == 10


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ("validation", r"'validation' is no split of .*mnist.*3.0.1, which has train, test"),
        ("train[:", r"slices are written as in 'train\[:45000\]'"),
        ("train[:13]", "is no split of"),
        ("train[3:3]", r"the split 'train\[3:3\]' of .* holds no examples"),
        ("train+train[:2]", "ids must be unique"),
    ],
)
def test_splits_that_are_none(root, split, text):
    with pytest.raises(ValueError, match=text):
        data.load("mnist", split, root)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "cifar10",
            r"cifar10 is not prepared in .*, and nothing is downloaded: put cifar-10-binary.tar.gz"
            r", or cifar-10-python.tar.gz into a folder DIR and run `python -m "
            r"jrobust.data.prepare cifar10 --from DIR --data-dir .*`",
        ),
        ("cifar10_corrupted/fog_1", "put CIFAR-10-C.tar.*prepare cifar10_corrupted/fog_1 --from"),
        ("svhn", "put train_32x32.mat and test_32x32.mat .*prepare svhn --from"),
        ("mnist_corrupted", "mnist_c.zip.*prepare mnist_corrupted --from"),
    ],
)
def test_what_is_not_prepared(root, name, text):
    with pytest.raises(FileNotFoundError, match=text):
        data.load(name, "test", root)


def test_the_folder_is_that_of_tfds(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert len(data.load("mnist", "train")) == 12
    monkeypatch.setenv("TFDS_DATA_DIR", str(root / "other"))
    with pytest.raises(FileNotFoundError, match=r"prepare mnist --from DIR`$"):
        data.load("mnist", "train")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(root))
    with pytest.raises(FileNotFoundError, match=f"in {root}/tensorflow_datasets, and"):
        data.load("mnist", "train")


def test_the_newest_version_that_is_complete(root, tmp_path):
    os.symlink(root / "mnist" / "3.0.1", tmp_path / "3.0.1")
    (tmp_path / "mnist").mkdir()
    for version in ("3.0.1", "3.0.0", "2.11.0"):
        os.symlink(root / "mnist" / "3.0.1", tmp_path / "mnist" / version)
    for name in ("10.0.0", "incomplete.ABCDEF_11.0.0"):
        (tmp_path / "mnist" / name).mkdir()
    (tmp_path / "mnist" / "incomplete.ABCDEF_11.0.0" / "dataset_info.json").touch()
    assert data.load("mnist", "train", tmp_path).name.endswith("mnist/3.0.1 [train]")


def test_another_file_format_is_refused(root, tmp_path):
    made = tmp_path / "mnist" / "3.0.1"
    made.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        text = (root / "mnist" / "3.0.1" / name).read_text()
        (made / name).write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"format tfrecord, .*prepare mnist .* --data-dir OTHER"):
        data.load("mnist", "train", tmp_path)
    archives.mnist(tmp_path)
    with pytest.raises(ValueError, match=r"format tfrecord: choose another data_dir"):
        prepare.build("mnist", tmp_path, tmp_path, verify=False)


def test_a_damaged_record_is_an_error_that_names_the_data_set(root, tmp_path):
    made = tmp_path / "mnist" / "3.0.1"
    made.mkdir(parents=True)
    for path in (root / "mnist" / "3.0.1").iterdir():
        content = bytearray(path.read_bytes())
        if "train.array_record" in path.name:
            middle = len(content) // 2
            content[middle : middle + 64] = bytes(64)
        (made / path.name).write_bytes(content)
    with pytest.raises(ValueError, match=r"mnist.3.0.1 \[train\] could not be read"):
        data.load("mnist", "train", tmp_path).read()


def test_the_digest_tells_data_sets_apart(root, tmp_path):
    train, part = (data.load("mnist", split, root) for split in ("train", "train[:4]"))
    assert train.digest == part.digest, "the ids differ"
    folder = tmp_path / "archives"
    folder.mkdir()
    archives.mnist(folder)
    archives.idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(12, np.uint8))
    archives.idx(folder / "train-images-idx3-ubyte.gz", np.zeros((12, 28, 28), np.uint8))
    prepare.build("mnist", folder, tmp_path, verify=False, log=lambda line: None)
    assert data.load("mnist", "train", tmp_path).digest != train.digest


def test_without_tensorflow_datasets(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"no TensorFlow: pip install 'jrobust\[data\]'"):
        data.load("mnist", "train", root)


# Sources


def counted(n=20, classes=4):
    """A source of numbers, and what was asked of it."""
    asked = []

    def fetch(index):
        asked.append(index)
        return np.repeat(index[:, None], 3, 1).astype(np.uint8), index % classes

    return Source(fetch, POSITIONS[:n], classes, "numbers", 100 + POSITIONS[:n]), asked


def test_a_source_is_indexed_like_a_data_set():
    source, asked = counted()
    held = data.Dataset(np.repeat(POSITIONS[:, None], 3, 1), POSITIONS % 4, 100 + POSITIONS)
    for index in (slice(3, 9), np.array([5, 1, 7]), POSITIONS % 2 == 0, slice(None, None, -1)):
        part, same = source[index], held[index]
        assert len(part) == len(same)
        np.testing.assert_array_equal(part.id, same.id)
        assert not asked, "nothing is read yet"
        read = part.read()
        np.testing.assert_array_equal(read.x, unit(same.x.astype(np.uint8)))
        np.testing.assert_array_equal(read.y, same.y)
        np.testing.assert_array_equal(read.id, same.id)
        asked.clear()
    with pytest.raises(TypeError, match=r"data\[i:i \+ 1\]"):
        source[0]


def test_rows_read_what_is_asked_for():
    source, asked = counted()
    x, y, ids = source[10:].rows(np.array([3, 0, 3]))
    np.testing.assert_array_equal(asked[0], [13, 10, 13])
    np.testing.assert_array_equal(x, unit(np.uint8([[13] * 3, [10] * 3, [13] * 3])))
    np.testing.assert_array_equal(y, [1, 2, 1])
    np.testing.assert_array_equal(ids, [113, 110, 113])
    assert (x.dtype, y.dtype, ids.dtype) == (np.float32, np.int32, np.int32)


def test_a_cache_is_read_once_and_stays_bytes():
    source, asked = counted()
    held = source[5:].cache()
    read = [i for index in asked for i in index]
    assert sorted(set(read)) == list(range(5, 20))
    asked.clear()
    for index in (np.array([0, 14]), np.array([7])):
        for one, two in zip(held.rows(index), source[5:].rows(index)):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(held[3:].read().x, source[8:].read().x)
    assert held.fetch(np.array([0]))[0].dtype == np.uint8
    assert held.digest == source.digest


def test_many_examples_are_read_in_pieces():
    n = 1000
    fetch = lambda index: (np.float64(index)[:, None], index % 3)  # noqa: E731
    source = Source(fetch, np.arange(n)[::-1], 3, "many")
    read = source.read()
    np.testing.assert_array_equal(read.x[:, 0], np.arange(n)[::-1])
    assert read.x.dtype == np.float32
    np.testing.assert_array_equal(read.y, np.arange(n)[::-1] % 3)


def test_bytes_are_the_nearest_floats_to_their_255ths():
    exact = np.arange(256) / 255
    np.testing.assert_array_equal(unit(np.arange(256, dtype=np.uint8)), exact.astype(np.float32))


def fails(index):
    raise OSError("disk on fire")


BROKEN = {
    "disk": (fails, "numbers could not be read: OSError: disk on fire"),
    "labels": (lambda i: (np.zeros((len(i), 2), np.uint8), i + 3), "labels 3 .. .*but 4 classes"),
    "negative": (lambda i: (np.zeros((len(i), 2), np.uint8), i - 1), "labels -1 "),
    "count": (lambda i: (np.zeros((1, 2), np.uint8), i[:1]), "asked for 5 examples and gave"),
    "soft": (lambda i: (np.zeros((len(i), 2), np.uint8), i / 9), "must have integer labels"),
    "type": (lambda i: (np.zeros((len(i), 2), np.int64), i % 4), "uint8 or float inputs, got int"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_storage_that_breaks_its_promise(case):
    fetch, text = BROKEN[case]
    with pytest.raises(ValueError, match=text):
        Source(fetch, np.arange(5), 4, "numbers").rows(np.arange(5))


def test_nothing_selected():
    with pytest.raises(ValueError, match="numbers: nothing to read"):
        counted()[0][:0].read()


# Image folders


def folder_of(root, images):
    for name, image in images.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(root / name)


def test_image_folders(tmp_path):
    rng = np.random.default_rng(0)
    names = ("dog/b.png", "dog/a.png", "cat/1.png", "cat/2.PNG", "emu/x.png")
    images = {name: rng.integers(0, 256, (5, 7, 3), dtype=np.uint8) for name in names}
    folder_of(tmp_path, images)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    source = data.image_folder(tmp_path, first_id=50)
    assert (len(source), source.classes) == (5, 3)
    np.testing.assert_array_equal(source.id, 50 + np.arange(5))
    found = source.read()
    order = ("cat/1.png", "cat/2.PNG", "dog/a.png", "dog/b.png", "emu/x.png")
    np.testing.assert_array_equal(found.x, unit(np.stack([images[name] for name in order])))
    np.testing.assert_array_equal(found.y, [0, 0, 1, 1, 2])
    assert data.image_folder(tmp_path).digest == source.digest
    (tmp_path / "emu" / "x.png").unlink()
    assert data.image_folder(tmp_path).digest != source.digest


def test_grey_and_colour_images(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    folder_of(tmp_path, {"a/grey.png": grey})
    Image.fromarray(np.full((8, 8, 4), 200, np.uint8)).save(tmp_path / "a" / "alpha.png")
    three = data.image_folder(tmp_path).read().x
    assert three.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(three[1], unit(np.repeat(grey[..., None], 3, 2)))
    one = data.image_folder(tmp_path, grey=True).read().x
    assert one.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(one[1], unit(grey[..., None]))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20), (10, 11), (5, 9)])
def test_images_are_scaled_and_cut_to_size(tmp_path, shape):
    """Against the definition: the shorter side becomes 10, the middle square stays."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    slope = np.stack([255 * y / height, 255 * x / width, 0 * x], -1)
    folder_of(tmp_path, {"a/slope.png": slope.astype(np.uint8)})
    found = data.image_folder(tmp_path, size=10).read().x[0]
    assert found.shape == (10, 10, 3)
    short = min(shape)
    place = (np.arange(10) - 4.5) * short / 10
    for axis, length in ((0, height), (1, width)):
        line = found.mean(1 - axis)[:, axis]
        expected = ((length - 1) / 2 + place) / length
        assert np.abs(line - expected).max() < 0.6 * short / 10 / length + 2 / 255


def test_jpeg_images(tmp_path):
    colour = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    folder_of(tmp_path, {"a/1.jpg": colour, "a/2.JPEG": colour})
    assert np.abs(data.image_folder(tmp_path).read().x - unit(colour)).max() < 4 / 255


def test_image_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is not a folder of images"):
        data.image_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no images: expected .*<class>/<image>"):
        data.image_folder(tmp_path)
    for size in (0, True, 2.5):
        with pytest.raises(ValueError, match="size must be a positive int or None"):
            data.image_folder(tmp_path, size=size)
    small, large = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)
    folder_of(tmp_path, {"a/1.png": small, "a/2.png": large})
    with pytest.raises(ValueError, match=r"images of different sizes, .*: pass size="):
        data.image_folder(tmp_path).read()
    assert data.image_folder(tmp_path, size=4).read().x.shape == (2, 4, 4, 3)
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.2.png is no image that can be decoded"):
        data.image_folder(tmp_path, size=4).read()
    folder_of(tmp_path, {"a/2.png": np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)})
    whole = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.2.png is no image that can be decoded"):
        data.image_folder(tmp_path, size=4).read()


# The documentation


def test_the_page_on_data_runs_as_it_stands(root, monkeypatch):
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "data.md"
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
    assert names["x"].shape == (4, 28, 28, 1)
    assert len(names["fitted"].history) == 1
    assert names["stream"].get_state()["batches"] == 4
    assert len(list(names["again"])) == 3
