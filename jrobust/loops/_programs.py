"""Compiling the programs of a loop: together, ahead of time, within memory, and once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import numbers
import os
import pathlib
import platform
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from jrobust import drive, parallel
from jrobust.loops import _identity


class Clock:
    """Where the wall time of a loop goes: ``compile``, ``run`` and ``other`` seconds."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "run": 0.0}
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def total(self) -> dict[str, float]:
        """Seconds by name; ``other`` is what was spent outside of programs and compilers."""
        spent = sum(self.seconds.values())
        return {**self.seconds, "other": max(0.0, time.perf_counter() - self._begin - spent)}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile: ``fn`` for arguments like ``args``, split over a mesh.

    The remaining fields are those of :func:`jrobust.parallel.data_parallel`.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    in_axes: tuple[int | None, ...]
    out_axes: int | None = 0
    backend: parallel.Backend = "shard_map"
    donate_argnums: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled job.

    Attributes:
        call: takes arguments like the job's.
        seconds: spent on tracing, lowering and compiling it.
        bytes: memory that it needs on each device, arguments and results included.
    """

    call: Callable[..., Any]
    seconds: float
    bytes: int

    def __call__(self, *args: Any) -> Any:
        """Run on the whole batch; may return before the device has finished."""
        return self.call(*args)


# Kept, so that a second call of a loop finds the traces of the first.
@functools.lru_cache(maxsize=64)
def _program(
    fn: Callable[..., Any],
    mesh: Mesh,
    backend: parallel.Backend,
    in_axes: tuple[int | None, ...],
    out_axes: int | None,
    donate_argnums: tuple[int, ...],
) -> parallel.DataParallel:
    return parallel.data_parallel(
        drive.rewrite(fn),
        mesh,
        backend,
        in_axes=in_axes,
        out_axes=out_axes,
        donate_argnums=donate_argnums,
    )


class Programs:
    """The programs of a run, compiled together when the first of them is needed.

    Attributes:
        size: of the batches, once they are planned: see :meth:`plan`.
        planned: whether that is settled.

    Args:
        jobs: the programs for a size (a number of lanes, of noisy copies).
        size: of the batches; where planning begins if ``planned`` is False.
        planned: whether ``size`` is to be used as it is.
        step: sizes are multiples of it, and at least it.
        memory: bytes that a planned size may need on each device; what is free there when None.
        mesh: the devices.
        clock: where compile time is counted.
    """

    def __init__(
        self,
        jobs: Callable[[int], Mapping[str, Job]],
        size: int,
        mesh: Mesh,
        clock: Clock,
        *,
        planned: bool = True,
        step: int = 1,
        memory: int | None = None,
    ) -> None:
        if memory is not None and not (isinstance(memory, numbers.Real) and memory > 0):
            raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
        keep_compilations()
        self.size, self.planned = size, planned
        self._jobs, self._mesh, self._clock = jobs, mesh, clock
        self._step, self._memory = step, memory
        self._compiled: dict[str, Program] | None = None

    def __getitem__(self, name: str) -> Program:
        """A program, compiled with all others at the first call."""
        return self.compiled()[name]

    def seconds(self) -> dict[str, float]:
        """Compile all; how long each took."""
        return {name: program.seconds for name, program in self.compiled().items()}

    def compiled(self) -> dict[str, Program]:
        """All programs."""
        if self._compiled is None:
            self.plan()
        if self._compiled is None:
            self._compiled = self._compile()
        return self._compiled

    def plan(self) -> int:
        """Settle the size: at most the first, and such that the programs fit into the memory.

        What the compiler says that they need decides; one round of compilation where the first
        size fits, and no more than halvings, which may stop below the largest size that does.
        Raises ``ValueError`` where none does.
        """
        if self.planned:
            return self.size
        limit = parallel.free_memory(self._mesh) if self._memory is None else self._memory
        while not self.planned:
            compiled = self._compile()
            need = max(program.bytes for program in compiled.values())
            if need <= limit:
                self.planned, self._compiled = True, compiled
            elif self.size <= self._step:
                raise ValueError(
                    f"the smallest batch ({self.size}) needs {need:,} bytes on each device and "
                    f"{limit:,} are to be used; pass a larger memory=, use more devices, or a "
                    "smaller model"
                )
            else:
                # A little below proportional: the weights stay whatever the size.
                fewer = min(self.size // 2, int(0.9 * self.size * limit / need))
                self.size = max(self._step, fewer // self._step * self._step)
        return self.size

    def _compile(self) -> dict[str, Program]:
        jobs = self._jobs(self.size)
        threads = min(len(jobs), os.cpu_count() or 1)
        with self._clock.measure("compile"), ThreadPoolExecutor(threads) as pool:
            # Traced here, because what the user has set for this thread does not hold in others.
            waiting = [pool.submit(_finish, *_lower(job, self._mesh)) for job in jobs.values()]
            return {name: one.result() for name, one in zip(jobs, waiting)}

    def identity(
        self, data: Any, variables: Any, *, besides: Container[str] = ()
    ) -> dict[str, str]:
        """Digests of what a run is made of; see :mod:`jrobust.loops._identity`.

        The programs named in ``besides`` are no part of it.
        """
        jobs = self._jobs(self.size).items()
        traced = [_identity.program(job.fn, *job.args) for n, job in jobs if n not in besides]
        return {
            "data_sha256": _identity.arrays(data),
            "variables_sha256": _identity.arrays(variables),
            "programs_sha256": hashlib.sha256("".join(traced).encode()).hexdigest(),
        }


def _lower(job: Job, mesh: Mesh) -> tuple[float, Callable[[], parallel.Compiled]]:
    begin = time.perf_counter()
    backend = "jit" if mesh.size == 1 else job.backend
    split = _program(job.fn, mesh, backend, job.in_axes, job.out_axes, job.donate_argnums)
    lowered = split.lower(*job.args)
    return time.perf_counter() - begin, lowered


def _finish(seconds: float, lowered: Callable[[], parallel.Compiled]) -> Program:
    begin = time.perf_counter()
    compiled = lowered()
    return Program(compiled, seconds + time.perf_counter() - begin, compiled.bytes)


@functools.cache
def keep_compilations() -> None:
    """Turn on JAX's persistent compilation cache, unless the user has set one or turned it off.

    In ``$XDG_CACHE_HOME/jrobust`` (``~/.cache/jrobust``), a folder for each kind of machine.
    ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps it off, ``JAX_COMPILATION_CACHE_DIR`` places it. It
    stays off where there is no home, or none to write to, as in some containers.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        kept = pathlib.Path(home) / "jrobust" / _machine()
        kept.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    config.update("jax_compilation_cache_dir", str(kept))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX decides at its first compilation whether there is a cache.
    compilation_cache.reset_cache()


def _machine() -> str:
    """Programs compiled for one CPU may not run on another of the same instruction set."""
    about = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(about.encode()).hexdigest()[:12]
