"""Compile time of every algorithm: anew, from the persistent cache, and tracing apart.

Each program of the tables in ``tests/catalogue.py`` is compiled the way jrobust compiles it, in a
fresh process with a cache folder of its own, empty at first, and once more in another with what
the first left there. Counts of steps, samples and votes are lengths of loops: they change nothing
here. See the README beside this.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import _command
import _common
import jax
import jax.numpy as jnp
import optax

import jrobust
from jrobust import drive, keys, losses, smoothing, training, zeroth_order
from jrobust._run import _run, strong

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import catalogue  # noqa: E402


class Program(NamedTuple):
    fn: Any  # jitted
    args: tuple[Any, ...]


class Setting(NamedTuple):
    """A model and the shape of its input; arrays are shapes alone."""

    name: str
    module: Any
    x: jax.ShapeDtypeStruct

    @property
    def y(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.x.shape[:1], jnp.int32)

    @property
    def model(self) -> Any:
        variables = jax.eval_shape(self.module.init, jax.random.key(0), self.x)
        return jrobust.models.bind(self.module, variables)


def settings(small: bool) -> list[Setting]:
    """The models of the table."""
    models = jrobust.models
    modules: dict[str, Any] = {"MLP": models.MLP(), "ResNet-20": models.ResNet(20)}
    shape = (128, 32, 32, 3)
    if small:
        modules, shape = {"SmallCNN": models.SmallCNN()}, (32, 8, 8, 1)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return [Setting(name, module, x) for name, module in modules.items()]


def _attack(entry: Any, threat: type, case: Setting) -> Program:
    attack = strong(entry.make(threat(0.1)))
    return Program(_run, (attack, jax.random.key(0), case.model, case.x, case.y, case.y, None))


def _training(part: Any, case: Setting) -> Program:
    init, update = training.step(part.make(part.numbers[1]), optax.adamw(1e-3))
    network = jrobust.models.network(case.module)
    state = jax.eval_shape(lambda key, x: init(key, network, x), jax.random.key(0), case.x)
    batch = jax.eval_shape(training.batch, case.x, case.y)
    return Program(jax.jit(drive.rewrite(update), donate_argnums=0), (state, batch))


def _votes(part: Any, case: Setting) -> Program:
    def count(noise: Any, key: jax.Array, model: Any, x: jax.Array) -> jax.Array:
        return smoothing.count_votes(key, model, x, noise, 1000)

    noise = strong(part.make(part.numbers[1]))
    if hasattr(noise, "size"):  # the catalogue's is for the inputs of the shared suite
        noise = dataclasses.replace(noise, size=math.prod(case.x.shape[1:]))
    return Program(jax.jit(drive.rewrite(count)), (noise, jax.random.key(0), case.model, case.x))


def _gradient(part: Any, case: Setting) -> Program:
    def estimate(estimator: Any, key: jax.Array, model: Any, x: jax.Array, y: jax.Array) -> Any:
        streams = keys.examples(key, jnp.arange(len(y)))
        loss = functools.partial(_loss, model, y)
        if isinstance(estimator, zeroth_order.Hybrid):  # of one point, not of each example
            return estimator(key, lambda x: loss(x).mean(), x)
        return estimator.per_example(streams, loss, x)

    estimator = strong(part.make(part.numbers[1]))
    args = (estimator, jax.random.key(0), case.model, case.x, case.y)
    return Program(jax.jit(drive.rewrite(estimate)), args)


def _loss(model: Any, y: jax.Array, x: jax.Array) -> jax.Array:
    return losses.cross_entropy(model(x), y)


def programs(small: bool) -> dict[str, Callable[[], Program]]:
    """Every program by name: each attack in its first threat model, PGD in all of them."""

    def named(case: Setting) -> Iterator[tuple[str, Callable[[], Program]]]:
        for entry in catalogue.ATTACKS:
            for threat in entry.threats if entry.name == "PGD" else entry.threats[:1]:
                make = functools.partial(_attack, entry, threat, case)
                yield f"{entry.name}, {threat.norm}", make
        for maker, parts, what in (
            (_training, catalogue.OBJECTIVES, "training step"),
            (_votes, catalogue.NOISES, "votes"),
            (_gradient, catalogue.ESTIMATORS, "gradient"),
        ):
            for part in parts:
                yield f"{part.name}, {what}", functools.partial(maker, part, case)

    return {f"{case.name}: {name}": make for case in settings(small) for name, make in named(case)}


def compile_once(program: Program) -> dict[str, Any]:
    """Seconds to trace and lower, and to compile or fetch; what came from the cache; sizes."""
    found: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
    begin = time.perf_counter()
    lowered = program.fn.lower(*program.args)
    traced = time.perf_counter()
    found.clear()
    compiled = lowered.compile()
    done = time.perf_counter()
    return {
        "trace_s": traced - begin,
        "compile_s": done - begin,
        "hits": found.count("/jax/compilation_cache/cache_hits"),
        "misses": found.count("/jax/compilation_cache/cache_misses"),
        "program_bytes": len(compiled.runtime_executable().serialize()),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


Pair = Sequence[dict[str, Any]]  # what the cold and the warm process measured


def row(name: str, batch: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """A program's row, from one pair for each round: medians."""
    (cold, warm), runs = zip(*pairs), [run for pair in pairs for run in pair]
    return _common.row(
        name,
        batch,
        compile_cold_s=statistics.median(run["compile_s"] for run in cold),
        compile_warm_s=statistics.median(run["compile_s"] for run in warm),
        trace_s=statistics.median(run["trace_s"] for run in runs),
        program_bytes=cold[0]["program_bytes"],
        temp_bytes=cold[0]["temp_bytes"],
    )


def checks(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """That what is called cold was compiled, and what is called cached was not."""
    cold, warm = zip(*pairs)
    fetched = sum(run["hits"] > 0 or run["misses"] != 1 for run in cold)
    compiled = sum(run["misses"] > 0 or run["hits"] != 1 for run in warm)
    return [
        _common.check("programs of an empty cache that were not compiled", fetched, 0),
        _common.check("programs of a filled cache that were", compiled, 0),
    ]


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        _common.headline(report),
        "",
        "| program | trace | compile, cold | cached | program | working memory |",
        "|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['name']} | {r['trace_s']:.2f} s | {r['compile_cold_s']:.2f} s "
            f"| {r['compile_warm_s']:.2f} s | {r['program_bytes'] / 2**10:,.0f} KiB "
            f"| {r['temp_bytes'] / 2**20:,.1f} MiB |"
        )
    return "\n".join(lines) + "\n"


def measure(
    names: Sequence[str], *, small: bool, rounds: int = 1, force: bool = False
) -> dict[str, Any]:
    """Compile each program twice in every round; the report."""
    load = _common.check_quiet(force=force)
    limits = _common.measure_limits(load, force=force)
    flag = ["--small"] if small else []
    batch = settings(small)[0].x.shape[0]
    rows, all_pairs = [], []
    for name in names:
        run = functools.partial(_common.cold_and_warm, HERE / "compile.py", *flag, "--one", name)
        pairs = _common.take_turns({name: run}, rounds, load, force=force)[name]
        rows.append(row(name, batch, pairs))
        all_pairs += pairs
        print(f"{name}: {rows[-1]['compile_cold_s']:.1f} s", file=sys.stderr)
    made = checks(all_pairs)
    _common.require(made)
    return _common.report(
        "compile",
        load,
        limits,
        settings={"small": small, "rounds": rounds, "x": list(settings(small)[0].x.shape)},
        machine=_common.machine(),
        checks=made,
        rows=rows,
        ratios=[],
    )


def main() -> None:
    """Run from the command line."""
    parser = _command.parser("compile", __doc__, small="SmallCNN on 8x8 images, batch 32")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    parser.add_argument("--rounds", type=int, default=1, help="of which the median is reported")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    every = programs(args.small)
    if args.one:
        name, cache = args.one
        _common.start(cache)
        print(json.dumps(compile_once(every[name]())))
        return
    names = [name for name in every if args.only in name]
    if not names:
        parser.error(f"no program's name contains {args.only!r}: {', '.join(every)}")
    report = _command.finish(
        lambda: measure(names, small=args.small, rounds=args.rounds, force=args.force),
        args.out,
        markdown,
    )
    args.out.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
