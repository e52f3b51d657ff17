"""The example that trains, attacks and certifies on any data set, run as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import archives
import jax
import pytest

from jrobust.data import prepare

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = [
    *("--model", "resnet8", "--objective", "pgd", "--steps", 1, "--epochs", 2, "--batch-size", 4),
    *("--attack-steps", 2, "--certify", 2, "--n", 100),
]


def example(*arguments):
    cache = jax.config.jax_compilation_cache_dir
    return subprocess.run(
        [sys.executable, "examples/train_cifar.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
    ).stdout


@pytest.mark.full
def test_from_archives_to_certificates_and_again(tmp_path):
    archives.mnist(tmp_path)
    prepare.build("mnist", tmp_path, tmp_path / "data", verify=False, log=lambda line: None)
    out = tmp_path / "run"
    arguments = ("--data", "mnist", "--data-dir", tmp_path / "data", "--stream", "--out", out)
    first = example(*arguments, *TINY)
    assert first.startswith("mnist: 11 examples to train, 1 to validate")
    assert "PGD-2" in first
    assert "Of 2 certificates at alpha = 0.001" in first
    lines = (out / "fit" / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [line["epoch"] for line in history] == [1, 2]
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert any("certificates" in str(path) for path in done)
    assert example(*arguments, *TINY) == first
    assert {p: p.stat().st_mtime_ns for p in out.rglob("batches/*.npz")}.items() <= done.items()


@pytest.mark.full
@pytest.mark.parametrize("objective", ["standard", "trades", "gaussian"])
def test_every_objective_on_the_synthetic_task(objective, tmp_path):
    small = ["--train", 40, "--test", 8, "--objective", objective, "--out", tmp_path]
    assert "synthetic: 36 examples to train, 4 to validate" in example(*TINY, *small)
