"""Eight virtual CPU devices, a persistent compilation cache, and strict numerics for every test."""

import itertools
import os
import pathlib

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JROBUST_CACHE", str(ROOT / ".cache" / "jax"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config, items):
    """`full` tests run only when asked for by a marker expression."""
    if config.getoption("-m"):
        return
    chosen = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
    items[:] = chosen


_MAPS = pathlib.Path("/proc/self/maps")
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def room():
    """Forget compiled programs before the system runs out of memory maps for them.

    Each program takes some; Linux gives a process 65,530, and XLA dies without more.
    """
    yield
    if next(_tests) % 20 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def fresh_draws(request, monkeypatch):
    """A module's `RNG` starts anew in each test: its data depend on no other test."""
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(1))


@pytest.fixture
def key():
    return jax.random.key(0)
