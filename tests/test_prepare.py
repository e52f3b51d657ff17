"""Official archives become TFDS's layout, whole or not at all, and nothing in them is run."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy.io import savemat

from jrobust import data
from jrobust.data import prepare


def quiet(*args, **kwargs):
    return prepare.build(*args, **{"verify": False, "log": lambda line: None, **kwargs})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "archives").mkdir()
    return tmp_path / "archives"


def assert_holds(source, images, labels):
    """``source`` has exactly these examples, in an order of its own."""
    found = source.read()
    assert len(found) == len(images)
    scaled = images.astype(np.float32) / np.float32(255)
    place = {image.tobytes(): i for i, image in enumerate(scaled)}
    order = [place.pop(image.tobytes()) for image in found.x]
    np.testing.assert_array_equal(found.y, labels[order])


WHOLE = {
    "mnist": (archives.mnist, "mnist"),
    "fashion_mnist": (archives.mnist, "fashion_mnist"),
    "cifar10": (archives.cifar10, "cifar10"),
    "cifar10 of Python": (archives.cifar10_python, "cifar10"),
    "cifar100": (archives.cifar100, "cifar100"),
    "cifar100 of Python": (archives.cifar100_python, "cifar100"),
    "svhn": (archives.svhn, "svhn"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_from_archive_to_batches(case, folder, tmp_path):
    write, name = WHOLE[case]
    splits = write(folder)
    (made,) = quiet(name, folder, tmp_path / "data")
    official = "svhn_cropped" if name == "svhn" else name
    builder = tfds.builder_cls(official)
    assert made == tmp_path / "data" / official / str(builder.VERSION)
    assert not (tmp_path / "data" / "downloads").exists()
    for split, (images, labels) in splits.items():
        assert (made / f"{official}-{split}.array_record-00000-of-00001").is_file()
        ours = data.load(name, split, tmp_path / "data")
        assert_holds(ours, images, labels)
        # TFDS's own code for this data set reads it, in the same order.
        theirs = tfds.data_source(official, split=split, data_dir=tmp_path / "data", download=False)
        np.testing.assert_array_equal(
            ours.read().x, np.stack([e["image"] for e in theirs]).astype(np.float32) / 255
        )
        np.testing.assert_array_equal(ours.read().y, [e["label"] for e in theirs])
        for example in theirs:
            if "id" not in example:
                continue
            number = int(example["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(example["image"], images[number])
            if "coarse_label" in example:
                assert example["coarse_label"] == labels[number] // 5
    info = json.loads((made / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    assert info["version"] == str(builder.VERSION)
    assert (made / "features.json").is_file()


def test_class_names_come_from_the_archive(folder, tmp_path):
    for name, write in (("cifar10", archives.cifar10), ("cifar100", archives.cifar100_python)):
        write(folder)
        (made,) = quiet(name, folder, tmp_path)
        features = tfds.builder_from_directory(made).info.features
        if name == "cifar10":
            assert features["label"].names == archives.CIFAR10_NAMES
        else:
            assert features["label"].names == archives.FINE
            assert features["coarse_label"].names == archives.COARSE


def test_both_versions_of_cifar_are_one(folder, tmp_path):
    """Down to the bytes of the records: the same order, names, labels and ids."""
    records = []
    for name, write in (("binary", archives.cifar10), ("python", archives.cifar10_python)):
        (folder / name).mkdir()
        write(folder / name)
        (made,) = quiet("cifar10", folder / name, tmp_path / name)
        records.append({p.name: p.read_bytes() for p in made.iterdir() if "record" in p.name})
        names = (made / "label.labels.txt").read_text()
        assert names.split() == archives.CIFAR10_NAMES
    assert records[0] == records[1]


def test_svhn_without_the_extra_images(folder, tmp_path):
    both = archives.svhn(folder, ("train", "test"))
    quiet("svhn", folder, tmp_path)
    assert_holds(data.load("svhn", "train", tmp_path), *both["train"])
    with pytest.raises(ValueError, match=r"'extra' is no split .*which has train, test"):
        data.load("svhn", "extra", tmp_path)


@pytest.mark.parametrize("unpacked", [False, True])
def test_corrupted_cifar(folder, tmp_path, unpacked):
    made = archives.cifar10_corrupted(folder)
    if unpacked:
        with tarfile.open(folder / "CIFAR-10-C.tar") as archive:
            archive.extractall(folder, filter="data")
        (folder / "CIFAR-10-C.tar").unlink()
    # TFDS calls glass_blur by another name.
    for config, held in (("fog_2", "fog_2"), ("frosted_glass_blur_5", "glass_blur_5")):
        name = f"cifar10_corrupted/{config}"
        quiet(name, folder, tmp_path / "data")
        assert_holds(data.load(name, "test", tmp_path / "data"), *made[held])
        assert (
            len(tfds.data_source(name, split="test", data_dir=tmp_path / "data", download=False))
            == 5
        )
    with pytest.raises(FileNotFoundError, match=r"cifar10_corrupted/fog_1 is not prepared"):
        data.load("cifar10_corrupted/fog_1", "test", tmp_path / "data")
    with pytest.raises(ValueError, match=r"name one, as in cifar10_corrupted/fog_2"):
        data.load("cifar10_corrupted", "test", tmp_path / "data")
    with pytest.raises(ValueError, match="no configuration 'fog_6', but brightness_1, "):
        quiet("cifar10_corrupted/fog_6", folder, tmp_path)


def test_all_configurations_at_once(folder, tmp_path):
    known = [config.name for config in tfds.builder_cls("mnist_corrupted").BUILDER_CONFIGS]
    made = archives.mnist_corrupted(folder, known)
    assert len(quiet("mnist_corrupted", folder, tmp_path)) == len(known) == 16
    for config in known[::5]:
        for split in ("train", "test"):
            source = data.load(f"mnist_corrupted/{config}", split, tmp_path)
            assert_holds(source, *made[config, split])


# What is wrong with the archives


def test_a_checksum_that_is_not_the_published_one(folder, tmp_path):
    archives.mnist(folder)
    official = next(
        info.checksum
        for info in tfds.builder_cls("mnist").url_infos.values()
        if info.filename == "train-images-idx3-ubyte.gz"
    )
    with pytest.raises(
        ValueError, match=f"train-images.* is not the official file.*expected {official}"
    ):
        quiet("mnist", folder, tmp_path / "data", verify=True)
    assert not (tmp_path / "data").exists()
    right = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    lines = []
    quiet("mnist", folder, tmp_path / "data", verify=True, sha256=right, log=lines.append)
    assert lines[:4] == [f"{name}: SHA-256 verified" for name in sorted(right, key=_official)]
    assert lines[4] == f"prepared: {tmp_path / 'data' / 'mnist' / '3.0.1'}"
    # What is there is not made, and its archives not looked at, again.
    (folder / "train-images-idx3-ubyte.gz").unlink()
    quiet("mnist", folder, tmp_path / "data", verify=True)


def _official(name):
    return name.startswith("t10k"), "labels" in name


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_every_official_archive_has_a_published_checksum(name, folder, tmp_path):
    WHOLE[name][0](folder)
    with pytest.raises(ValueError, match=r"is not the official file: its SHA-256 is [0-9a-f]{64}"):
        quiet(name, folder, tmp_path / "data", verify=True)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cifar10_corrupted/fog_1", archives.cifar10_corrupted),
        ("mnist_corrupted/fog", archives.mnist_corrupted),
    ],
)
def test_corrupted_sets_are_verified_too(name, write, folder, tmp_path):
    write(folder)
    with pytest.raises(ValueError, match="is not the official file"):
        quiet(name, folder, tmp_path / "data", verify=True)


def test_an_archive_without_a_published_checksum_is_said_to_be_unverified(folder, tmp_path):
    archives.cifar10_python(folder)
    lines = []
    quiet("cifar10", folder, tmp_path / "one", verify=True, log=lines.append)
    assert lines[0].startswith("cifar-10-python.tar.gz: not verified, TFDS publishes no")
    wrong = {"cifar-10-python.tar.gz": 64 * "0"}
    with pytest.raises(ValueError, match=f"expected {64 * '0'}"):
        quiet("cifar10", folder, tmp_path / "two", verify=True, sha256=wrong)
    with pytest.raises(ValueError, match=r"checksums of x.tar, but the archives are cifar-10-py"):
        quiet("cifar10", folder, tmp_path / "two", sha256={"x.tar": 64 * "0"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mnist", "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz and t10k-"),
        ("cifar10", "cifar-10-binary.tar.gz, or cifar-10-python.tar.gz"),
        ("svhn", r"train_32x32.mat and test_32x32.mat \(extra_32x32.mat too"),
        ("cifar10_corrupted", "CIFAR-10-C.tar, or CIFAR-10-C"),
        ("mnist_corrupted", "mnist_c.zip, or mnist_c"),
    ],
)
def test_a_missing_archive_is_named(name, text, folder, tmp_path):
    (folder / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=f"must hold {text}.*; it holds notes.txt"):
        quiet(name, folder, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"is not a folder; put there {text}"):
        quiet(name, folder / "none", tmp_path)


def damage_gzip(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-400])


def not_an_idx(folder):
    archives.idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros((6, 1, 1, 1), np.uint8))


def one_label_less(folder):
    archives.idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))


def not_gzip(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>")


def label_too_large(folder):
    archives.idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(6, 10, np.uint8))


def wrong_size(folder):
    archives.idx(folder / "t10k-images-idx3-ubyte.gz", np.zeros((6, 28, 27), np.uint8))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (damage_gzip, "train-images-idx3-ubyte.gz is damaged"),
        (not_gzip, "t10k-images-idx3-ubyte.gz is damaged, truncated or not what its name says"),
        (one_label_less, r"train-images.*shapes \(12, 28, 28\) and \(11,\)"),
        (not_an_idx, r"t10k-images.*shapes \(6, 28, 28\) and \(6, 1, 1, 1\)"),
        (label_too_large, "Class label 10 greater than configured num_classes 10"),
        (wrong_size, r"expected uint8 images \(28, 28, 1\), got uint8 \(28, 27, 1\)"),
    ],
)
def test_damaged_mnist(damage, text, folder, tmp_path):
    archives.mnist(folder)
    damage(folder)
    with pytest.raises(ValueError, match=text):
        quiet("mnist", folder, tmp_path / "data")
    nothing_is_prepared("mnist", tmp_path / "data")


def nothing_is_prepared(name, root):
    assert not list(root.rglob("dataset_info.json"))
    with pytest.raises(FileNotFoundError, match="is not prepared in"):
        data.load(name, "train", root)


def members(**changes):
    """A binary CIFAR-10 with other members."""
    _, parts = archives._parts()
    made = {
        f"{name}.bin": np.hstack([y[:, None], archives.planes(x)]).tobytes()
        for name, (x, y) in parts.items()
    }
    made |= {"batches.meta.txt": "\n".join(archives.CIFAR10_NAMES).encode()}
    made = {name: data for name, data in {**made, **changes}.items() if data is not None}
    return {f"cifar-10-batches-bin/{name}": data for name, data in made.items()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data_batch_3.bin": None}, "no cifar-10-batches-bin/data_batch_3.bin in it"),
        ({"test_batch.bin": b"\0" * 3074}, "3074 bytes are no records of 3073"),
        ({"batches.meta.txt": b"cat\ndog"}, "10 classes of label, the archive 2: cat, dog"),
    ],
)
def test_damaged_cifar(change, text, folder, tmp_path):
    archives.tar(folder / "cifar-10-binary.tar.gz", members(**change))
    with pytest.raises(ValueError, match=text):
        quiet("cifar10", folder, tmp_path / "data")
    nothing_is_prepared("cifar10", tmp_path / "data")


def test_a_truncated_tar(folder, tmp_path):
    archives.cifar10(folder)
    path = folder / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is damaged, truncated"):
        quiet("cifar10", folder, tmp_path)


def test_members_that_lead_elsewhere_are_neither_read_nor_written(folder, tmp_path):
    """What is read has a fixed name and must be a plain file; nothing is unpacked."""
    path = folder / "cifar-10-binary.tar.gz"
    absolute = tmp_path / "absolute" / "outside.bin"
    hidden = {"../../outside.bin": b"x", str(absolute): b"x"}
    archives.tar(path, {**hidden, **members()})
    quiet("cifar10", folder, tmp_path / "data")
    assert not list(tmp_path.rglob("outside.bin"))

    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 3073)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name.endswith("data_batch_2.bin"):
                info.type, info.linkname, info.size = tarfile.SYMTYPE, str(secret), 0
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"no cifar-10-batches-bin/data_batch_2.bin in it"):
        quiet("cifar10", folder, tmp_path / "other")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_pickle(folder, content):
    archives.cifar10_python(folder)
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path) as archive:
        held = {m.name: archive.extractfile(m).read() for m in archive}
    archives.tar(path, {**held, "cifar-10-batches-py/data_batch_4": content})


def test_a_pickle_runs_nothing(folder, tmp_path):
    trap = tmp_path / "trap"
    evil = pickle.dumps({"data": Malicious(trap)}, 2)
    with_pickle(folder, evil)
    with pytest.raises(ValueError, match=r"python.tar.gz .*refers to .*mkdir, which may run code"):
        quiet("cifar10", folder, tmp_path / "data")
    assert not trap.exists()
    pickle.loads(evil)
    assert trap.exists(), "the trap works"


def test_a_pickle_of_other_things(folder, tmp_path):
    with_pickle(folder, archives.python2({"data": "no images", "labels": [1]}))
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is damaged"):
        quiet("cifar10", folder, tmp_path / "data")


def test_arrays_of_objects_are_not_read(folder, tmp_path):
    trap = tmp_path / "trap"
    archives.cifar10_corrupted(folder)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Malicious(trap)], object), allow_pickle=True)
    evil = {"CIFAR-10-C/fog.npy": buffer.getvalue()}
    labels = {"CIFAR-10-C/labels.npy": archives.npy(np.zeros(5, np.uint8))}
    archives.tar(folder / "CIFAR-10-C.tar", {**evil, **labels}, "w")
    with pytest.raises(ValueError, match=r"CIFAR-10-C.tar is damaged.*allow_pickle=False"):
        quiet("cifar10_corrupted/fog_1", folder, tmp_path / "data")
    assert not trap.exists()


def test_other_archives_that_are_damaged(folder, tmp_path):
    (folder / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"\0" * 200)
    savemat(folder / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"train_32x32.mat is damaged"):
        quiet("svhn", folder, tmp_path)
    archives.svhn(folder, ("train",))
    with pytest.raises(ValueError, match=r"test_32x32.mat is .*X of type float64, y in 1 .. 1"):
        quiet("svhn", folder, tmp_path)
    with zipfile.ZipFile(folder / "mnist_c.zip", "w") as archive:
        archive.writestr("mnist_c/fog/train_images.npy", archives.npy(np.zeros(3)))
    with pytest.raises(ValueError, match=r"mnist_c.zip is damaged.*train_labels.npy"):
        quiet("mnist_corrupted/fog", folder, tmp_path)
    archives.tar(
        folder / "CIFAR-10-C.tar",
        {f"CIFAR-10-C/{n}.npy": archives.npy(np.zeros(7, np.uint8)) for n in ("fog", "labels")},
        "w",
    )
    with pytest.raises(ValueError, match=r"shapes \(7,\) and \(7,\), not of five severities"):
        quiet("cifar10_corrupted/fog_1", folder, tmp_path)


# Interruption, and the command line


def test_a_killed_preparation_leaves_nothing_that_looks_finished(folder, tmp_path):
    splits = archives.mnist(folder)
    code = f"""
import os, signal
from jrobust.data import prepare
made, png = [], prepare._png
def slow(image):
    made.append(image)
    if len(made) == 15:  # in the second of two splits
        os.kill(os.getpid(), signal.SIGKILL)
    return png(image)
prepare._png = slow
prepare.build("mnist", {str(folder)!r}, {str(tmp_path / "data")!r}, verify=False)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "data" / "mnist").iterdir()), "it was on its way"
    with pytest.raises(FileNotFoundError, match="mnist is not prepared in"):
        data.load("mnist", "train", tmp_path / "data")
    quiet("mnist", folder, tmp_path / "data")
    for split in splits:
        assert_holds(data.load("mnist", split, tmp_path / "data"), *splits[split])


def command(*arguments, **extra):
    return subprocess.run(
        [sys.executable, "-m", "jrobust.data.prepare", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **extra},
    )


def test_the_command_line(folder, tmp_path):
    archives.mnist(folder)
    refused = command("mnist", "--from", folder, TFDS_DATA_DIR=str(tmp_path / "data"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "is not the official file" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = command("mnist", "--from", folder, "--no-verify", TFDS_DATA_DIR=str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"prepared: {tmp_path / 'data' / 'mnist' / '3.0.1'}\n"


@pytest.mark.parametrize("text", ["abc", "file=abc", f"={64 * 'a'}", f"file={64 * 'A'}"])
def test_checksums_on_the_command_line(text, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["mnist", "--from", ".", "--sha256", text])
    assert "expected FILE=HEX" in capsys.readouterr().err


def test_checksums_reach_the_check(folder, tmp_path, capsys):
    archives.cifar10_python(folder)
    name = "cifar-10-python.tar.gz"
    right = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    where = ["cifar10", "--from", str(folder), "--data-dir", str(tmp_path / "data"), "--sha256"]
    with pytest.raises(SystemExit, match="is not the official file"):
        prepare.main([*where, f"{name}={64 * 'a'}"])
    prepare.main([*where, f"{name}={right}"])
    assert "SHA-256 verified" in capsys.readouterr().out


def test_unknown_names(folder, tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'imagenet'; known are mnist, "):
        quiet("imagenet", folder, tmp_path)
    with pytest.raises(ValueError, match="mnist has no configuration 'fog', but none at all"):
        quiet("mnist/fog", folder, tmp_path)
