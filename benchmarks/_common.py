"""What all benchmarks share: the quiet machine, the peer, turns, the machine's limits, the report.

A benchmark compares programs that do the same work. Each is a *turn*: a function that does the work
once and returns what it measured, such as seconds per example. :func:`take_turns` runs them
alternately and repeats a round in which other processes took more than their share of the CPUs.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import psutil

# Half of an accelerator's memory for each side; without effect on the CPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")

SCHEMA = "jrobust-benchmark/1"
BUSY_LIMIT = 0.05  # share of all CPUs that other processes may take

T = TypeVar("T")
Turn = Callable[[], float]


class LoadedError(RuntimeError):
    """The machine is too busy for a time to mean anything."""


class DisagreementError(RuntimeError):
    """The programs do not give the same answer, so they do not do the same work."""


# --- the quiet machine


class Watch:
    """The share of all CPUs that went to others since the watch was made: 0 to 1.

    Others are all processes but this one and its descendants, among which are the peer and the
    peer's own workers, and the hypervisor's other guests (steal).
    """

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.cores = psutil.cpu_count() or 1
        self.start = self._now()

    def _now(self) -> tuple[float, float, float]:
        all_of_it = psutil.cpu_times()
        busy = sum(all_of_it) - all_of_it.idle - getattr(all_of_it, "iowait", 0.0)
        # Guest time is in user time already.
        busy -= getattr(all_of_it, "guest", 0.0) + getattr(all_of_it, "guest_nice", 0.0)
        own = sum(map(_spent, [self.process, *self.process.children(recursive=True)]))
        return time.monotonic(), busy, own

    def others(self) -> float:
        """The share so far."""
        seconds, busy, own = (now - then for now, then in zip(self._now(), self.start))
        # Both clocks tick in hundredths: short spans are noise, and may come out negative.
        return max(0.0, busy - own) / (seconds * self.cores) if seconds else 0.0


def _spent(process: psutil.Process) -> float:
    """CPU seconds of a process and of those of its children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.NoSuchProcess:  # ended since it was listed: its parent tells the next time
        return 0.0


@dataclasses.dataclass
class Load:
    """How busy others kept the machine, before and during the measurement."""

    limit: float = BUSY_LIMIT
    before: float = 0.0
    rounds: list[float] = dataclasses.field(default_factory=list)  # of the rounds that count
    repeated: int = 0  # rounds thrown away because others disturbed them
    load_average: list[float] = dataclasses.field(default_factory=list)

    @property
    def loaded(self) -> bool:
        """Whether the times are not to be trusted."""
        return max([self.before, *self.rounds]) > self.limit


def check_quiet(*, force: bool = False, seconds: float = 2.0) -> Load:
    """Measure what others take of the CPUs.

    Raises:
        LoadedError: if it is more than ``BUSY_LIMIT``, unless ``force``.
    """
    watch = Watch()
    time.sleep(seconds)
    load = Load(before=watch.others(), load_average=list(psutil.getloadavg()))
    if load.loaded and not force:
        raise LoadedError(
            f"other processes use {load.before:.0%} of the CPUs, at most {load.limit:.0%} is "
            "quiet enough to report: wait, or pass --force, which marks the report as loaded"
        )
    return load


# --- turns


def take_turns(
    turns: Mapping[str, Callable[[], T]],
    rounds: int,
    load: Load,
    *,
    force: bool = False,
) -> dict[str, list[T]]:
    """What each turn measured in each of ``rounds`` undisturbed rounds.

    The order rotates from round to round, so that none always follows the same other. Disturbed
    rounds are repeated, at most twice as many as were asked for, or ten.

    Raises:
        LoadedError: if too many rounds were disturbed, unless ``force``, which keeps them all.
    """
    names = list(turns)
    results: dict[str, list[T]] = {name: [] for name in names}
    taken = done = 0
    while done < rounds:
        if taken - done > max(2 * rounds, 10):
            raise LoadedError(
                f"other processes disturbed {taken - done} rounds: wait, or pass --force, which "
                "marks the report as loaded"
            )
        shift = taken % len(names)
        taken += 1
        watch = Watch()
        measured = {name: turns[name]() for name in names[shift:] + names[:shift]}
        others = watch.others()
        if others > load.limit and not force:
            load.repeated += 1
            continue
        done += 1
        load.rounds.append(others)
        for name in names:
            results[name].append(measured[name])
    return results


def turn(run: Callable[[], Any], examples: int, *, seconds: float = 0.5) -> Turn:
    """A turn of a JAX program over ``examples`` examples, which is compiled and warmed up here.

    A turn repeats the program often enough to last for ``seconds``.
    """
    jax.block_until_ready(run())
    begin = time.perf_counter()
    jax.block_until_ready(run())
    repeats = max(1, math.ceil(seconds / (time.perf_counter() - begin)))

    def measured() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(run())
        return (time.perf_counter() - begin) / (repeats * examples)

    return measured


# --- the peer


def check_python(python: pathlib.Path) -> None:
    """Raise ``FileNotFoundError`` unless the peer's interpreter is there."""
    if not python.exists():
        raise FileNotFoundError(
            f"no Python of the peer at {python}: make it by `make .venv-peer/.installed`, or name "
            "one that has torch and numpy by --peer-python"
        )


class Peer:
    """A program of another library, in a Python of its own, that answers JSON lines.

    Its OpenMP threads sleep while it waits: spinning ones would take the CPUs from our turns, and
    ours would then take them from its turns.

    Args:
        python: interpreter of the peer's environment.
        script: its program; reads requests ``{"do": name, ...}`` from standard input, one a line,
            and answers each by one line, ``{"error": text}`` if it failed.

    Raises:
        FileNotFoundError: if there is no such interpreter.
    """

    def __init__(self, python: pathlib.Path, script: pathlib.Path) -> None:
        check_python(python)
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, at which it ends

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for the answer.

        Raises:
            RuntimeError: if the peer reports an error or has died.
        """
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(json.dumps({"do": do, **arguments}) + "\n")
            requests.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the peer died before it was asked to {do}") from None
        line = answers.readline()
        if not line:
            raise RuntimeError(f"the peer died when asked to {do}: see its output above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peer failed to {do}: {answer['error']}")
        return answer


# --- trees and files


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of nested dicts by path, ``{"params/conv/kernel": array}``: what .npz files hold."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(part.key) for part in path): np.asarray(v) for path, v in leaves}


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


# --- what is counted


class Operation(NamedTuple):
    """A convolution or a product."""

    flops: int  # a multiplication and an addition count two
    bytes: int  # of its operands and its result, each touched once


def operations(fn: Callable[..., Any], *args: Any) -> list[Operation]:
    """The convolutions and products of ``fn(*args)``.

    Padding is counted as if it were computed. What lies between them can be fused into them, and
    counts nothing. The gradient with respect to the input takes the same numbers again.

    Raises:
        NotImplementedError: for a loop, whose length the shapes do not tell.
    """
    return _operations(jax.make_jaxpr(fn)(*args).jaxpr)


def _operations(jaxpr: Any) -> list[Operation]:
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]
        inner = [v for v in inner if hasattr(v, "eqns")]
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            each = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        elif name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            each = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif name in ("while", "scan", "cond"):
            raise NotImplementedError(f"cannot count the operations of a {name}")
        else:
            found += [operation for body in inner for operation in _operations(body)]
            continue
        arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        touched = sum(a.size * a.dtype.itemsize for a in arrays)
        found.append(Operation(2 * eqn.outvars[0].aval.size * each, touched))
    return found


# --- the limits of the machine


class Limits(NamedTuple):
    """What the device was measured to do at best, a second."""

    flops: float  # float32 operations of a large matrix product
    bandwidth: float  # bytes read and written by the largest triad
    triads: dict[int, float]  # bytes of each array of a triad -> its bandwidth


def measure_limits(
    load: Load,
    *,
    force: bool = False,
    rounds: int = 5,
    side: int | None = None,
    sizes: Iterable[int] | None = None,
    seconds: float = 0.2,
) -> Limits:
    """The best of a large float32 matrix product, the median of triads ``a <- a + s b`` in place.

    A triad reads two arrays and writes one, and allocates nothing. Small arrays stay in caches, so
    the largest counts as the bandwidth of the memory.

    Args:
        load, force: of :func:`take_turns`.
        rounds: undisturbed rounds.
        side: of the square matrices; by default 2048 on CPU, 8192 elsewhere.
        sizes: bytes of each array; by default 16, 64 and 256 MiB on CPU, four times that elsewhere.
        seconds: that each turn lasts.
    """
    cpu = jax.default_backend() == "cpu"
    side = side or (2048 if cpu else 8192)
    sizes = sorted(sizes or [2**i if cpu else 2 ** (i + 2) for i in (24, 26, 28)])
    a = jax.random.normal(jax.random.key(0), (side, side))
    product = jax.jit(jnp.dot)
    turns = {"product": turn(lambda: product(a, a), 1, seconds=seconds)}
    turns |= {str(size): turn(_triad(size), 1, seconds=seconds) for size in sizes}
    times = take_turns(turns, rounds, load, force=force)
    triads = {size: 3 * size / statistics.median(times[str(size)]) for size in sizes}
    return Limits(2 * side**3 / min(times["product"]), triads[sizes[-1]], triads)


def _triad(size: int) -> Callable[[], jax.Array]:
    # In place: a new result each time would measure how the system hands out memory.
    step = jax.jit(lambda a, b: a + 0.5 * b, donate_argnums=0)
    b = jnp.ones(size // 4, jnp.float32)
    state = [jnp.zeros_like(b)]

    def run() -> jax.Array:
        state[0] = step(state[0], b)
        return state[0]

    return run


class Roofline(NamedTuple):
    """How fast the limits allow a program to be."""

    seconds: float
    memory: float  # share of these seconds in which the memory is the limit, 0 to 1


def roofline(work: Iterable[Operation], limits: Limits) -> Roofline:
    """Each operation takes the longer of computing and of moving what it touches."""
    times = [(o.flops / limits.flops, o.bytes / limits.bandwidth) for o in work]
    seconds = sum(max(pair) for pair in times)
    return Roofline(seconds, sum(moving for flops, moving in times if moving > flops) / seconds)


# --- compilation


def cold_and_warm(script: pathlib.Path, *arguments: str) -> list[dict[str, Any]]:
    """What a program measures of its compilation, anew and with the cache on disk.

    Runs ``script *arguments CACHE`` in two fresh processes that share a persistent compilation
    cache, empty at first; each prints JSON in its last line.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, str(script), *arguments, cache]
        runs = [
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(2)
        ]
    return [json.loads(run.stdout.splitlines()[-1]) for run in runs]


def start(cache: str) -> None:
    """Turn the persistent cache on for every program and start the back end."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.block_until_ready(jnp.zeros(()))  # the start of the back end is nobody's compile time


def time_first_call(run: Callable[[], Any], cache: str) -> dict[str, float]:
    """Tracing and compilation: the first call of ``run`` less the second."""
    start(cache)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return {"compile_s": max(0.0, times[0] - times[1])}


# --- the report


def ratio(name: str, numerator: list[float], denominator: list[float]) -> dict[str, Any]:
    """``numerator / denominator`` round by round: median, lowest, highest."""
    each = [a / b for a, b in zip(numerator, denominator)]
    return {
        "name": name,
        "median": statistics.median(each),
        "low": min(each),
        "high": max(each),
        "rounds": len(each),
    }


def row(name: str, batch: int, **measured: Any) -> dict[str, Any]:
    """One program of the table; what is not in ``measured`` is null."""
    nothing = {**dict.fromkeys(_FIELDS["rows"][0]), "seconds_per_example": []}
    return {**nothing, "name": name, "batch": batch, **measured}


def speed(times: list[float], flops: float, limit: Roofline) -> dict[str, Any]:
    """What :func:`row` says of a timed program.

    Args:
        times: seconds per example, one for each round.
        flops: operations per example.
        limit: for one example.
    """
    median = statistics.median(times)
    return {
        "seconds_per_example": times,
        "examples_per_s": 1 / median,
        "gflops_per_s": flops / median / 1e9,
        "fraction_of_limit": limit.seconds / median,
        "memory_bound": limit.memory,
    }


def check(name: str, value: float, tolerance: float) -> dict[str, Any]:
    """One comparison of the answers: passes when ``value <= tolerance`` (a NaN does not)."""
    return {
        "name": name,
        "value": float(value),
        "tolerance": tolerance,
        "passed": bool(value <= tolerance),
    }


def require(checks: Iterable[Mapping[str, Any]]) -> None:
    """Raise :class:`DisagreementError` unless all checks passed."""
    failed = [c for c in checks if not c["passed"]]
    if failed:
        raise DisagreementError(
            "the sides do not give the same answer: "
            + "; ".join(
                f"{c['name']}: {c['value']:.3g}, at most {c['tolerance']:g}" for c in failed
            )
        )


def machine(peer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the numbers were measured on, and when."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), None)
    versions = {name: metadata.version(name) for name in ("jrobust", "jax", "jaxlib", "flax")}
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions | (dict(peer["versions"]) if peer else {}),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "peer_device": peer["device"] if peer else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


_NUMBER = (int, float)
_MAYBE = (int, float, type(None))
_FIELDS: dict[str, Any] = {
    "schema": str,
    "benchmark": str,
    "settings": dict,
    "machine": {
        "cpu": str,
        "cores": int,
        "memory_gib": _NUMBER,
        "os": str,
        "python": str,
        "versions": dict,
        "platform": str,
        "device_kind": str,
        "devices": int,
        "peer_device": (str, type(None)),
        "date": str,
    },
    "load": {
        "limit": _NUMBER,
        "before": _NUMBER,
        "rounds": [_NUMBER],
        "repeated": int,
        "load_average": [_NUMBER],
        "loaded": bool,
    },
    "limit": {
        "gflops_per_s": _NUMBER,
        "gbytes_per_s": _MAYBE,
        "triads": [{"mib": _NUMBER, "gbytes_per_s": _NUMBER}],
    },
    "checks": [{"name": str, "value": _NUMBER, "tolerance": _NUMBER, "passed": bool}],
    "rows": [
        {
            "name": str,
            "batch": int,
            "seconds_per_example": [_NUMBER],
            "examples_per_s": _MAYBE,
            "gflops_per_s": _MAYBE,
            "fraction_of_limit": _MAYBE,
            "memory_bound": _MAYBE,
            "compile_cold_s": _MAYBE,
            "compile_warm_s": _MAYBE,
            "trace_s": _MAYBE,
            "program_bytes": (int, type(None)),
            "temp_bytes": (int, type(None)),
        }
    ],
    "ratios": [{"name": str, "median": _NUMBER, "low": _NUMBER, "high": _NUMBER, "rounds": int}],
}


def check_schema(report: Any, fields: Any = _FIELDS, where: str = "report") -> None:
    """Raise ``ValueError`` unless ``report`` has exactly the fields of the schema, well typed."""
    if isinstance(fields, dict):
        if not isinstance(report, dict) or set(report) != set(fields):
            raise ValueError(f"{where} must have the fields {sorted(fields)}, got {report!r}")
        for name, inner in fields.items():
            check_schema(report[name], inner, f"{where}.{name}")
    elif isinstance(fields, list):
        if not isinstance(report, list):
            raise ValueError(f"{where} must be a list, got {report!r}")
        for i, item in enumerate(report):
            check_schema(item, fields[0], f"{where}[{i}]")
    elif not isinstance(report, fields) or (isinstance(report, bool) and fields is not bool):
        raise ValueError(f"{where} must be of type {fields}, got {report!r}")
    if where == "report" and report["schema"] != SCHEMA:
        raise ValueError(f"report.schema must be {SCHEMA!r}, got {report['schema']!r}")


def report(benchmark: str, load: Load, limits: Limits, **parts: Any) -> dict[str, Any]:
    """The report as written to disk; ``parts``: settings, machine, checks, rows, ratios."""
    made = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "load": {**dataclasses.asdict(load), "loaded": load.loaded},
        "limit": {
            "gflops_per_s": limits.flops / 1e9,
            "gbytes_per_s": limits.bandwidth / 1e9,
            "triads": [
                {"mib": size / 2**20, "gbytes_per_s": speed / 1e9}
                for size, speed in limits.triads.items()
            ],
        },
        **parts,
    }
    check_schema(made)
    return made


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def headline(report: Mapping[str, Any]) -> str:
    """What was measured on what, and whether to believe it."""
    here, limit = report["machine"], report["limit"]
    line = (
        f"{report['benchmark']} on {here['device_kind']} ({here['cpu']}, {here['cores']} cores), "
        f"jax {here['versions']['jax']}, limits {limit['gflops_per_s']:.0f} GFLOP/s and "
        f"{_cell(limit['gbytes_per_s'], '.1f')} GB/s"
    )
    loaded = report["load"]["loaded"]
    return line + ("\nTHE MACHINE WAS LOADED: these times mean little" if loaded else "")


def table(report: Mapping[str, Any]) -> str:
    """The report for the eye."""
    lines = [headline(report)]
    for c in report["checks"]:
        lines.append(f"  {c['name']}: {c['value']:.3g} (at most {c['tolerance']:g})")
    lines += ["", f"{'':34}{'batch':>6}{'examples/s':>12}{'GFLOP/s':>9}{'of limit':>10}"]
    lines[-1] += f"{'memory':>8}{'compile':>10}{'cached':>9}"
    for r in report["rows"]:
        lines.append(
            f"{r['name']:34}{r['batch']:6}{_cell(r['examples_per_s'], '.4g'):>12}"
            f"{_cell(r['gflops_per_s'], '.4g'):>9}{_cell(r['fraction_of_limit'], '.1%'):>10}"
            f"{_cell(r['memory_bound'], '.0%'):>8}"
            f"{_cell(r['compile_cold_s'], '8.2f'):>9}s{_cell(r['compile_warm_s'], '7.2f'):>8}s"
        )
    lines += ["", f"{'':50}{'median':>8}{'low':>8}{'high':>8}"]
    lines += [
        f"{r['name']:50}{r['median']:8.3f}{r['low']:8.3f}{r['high']:8.3f}" for r in report["ratios"]
    ]
    return "\n".join(lines)


def write(report: Mapping[str, Any], out: pathlib.Path) -> None:
    """Write the JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
