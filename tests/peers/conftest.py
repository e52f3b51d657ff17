"""The peers' process, with the network and the examples it shares with the tests.

Nothing here is skipped: where a library is missing, every test fails and says which.
"""

import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402
import pgd  # noqa: E402

SETTINGS = pgd.Settings(depth=8, widths=(8, 16, 16), side=16, batch=64)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "peers: against other libraries in their own environment; run by `make peers`"
    )


def pytest_collection_modifyitems(config, items):
    """Run only when asked for by a marker expression, like the full tier."""
    if config.getoption("-m"):
        return
    apart = [item for item in items if item.get_closest_marker("peers")]
    config.hook.pytest_deselected(items=apart)
    items[:] = [item for item in items if not item.get_closest_marker("peers")]


class Peers(_common.Peer):
    """Exchanges arrays by file, so that a request reads like a call."""

    def __init__(self, folder):
        self.folder = folder
        super().__init__(
            ROOT / ".venv-peer" / "bin" / "python", pathlib.Path(__file__).parent / "_libraries.py"
        )

    def give(self, name, **arrays):
        np.savez(self.folder / name, **{k: np.asarray(v) for k, v in arrays.items()})
        return name

    def get(self, do, **arguments):
        self.ask(do, out="out.npz", **arguments)
        with np.load(self.folder / "out.npz") as arrays:
            return dict(arrays)

    def logits(self, x):
        return self.get("logits", points=self.give("points.npz", x=x))["logits"]


@pytest.fixture(scope="session")
def case():
    return pgd.make_case(SETTINGS)


@pytest.fixture(scope="session")
def peers(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    with Peers(folder) as process:
        case.open(process, folder)
        yield process
