"""Votes of randomized smoothing: `smoothing.count_votes` against a plain PyTorch loop.

Both certify the same images with networks of the same weights:

* ``--network digits``: a small convolutional network trained here, in seconds, on noisy digits;
* ``--network resnet``: ResNet-20 (``--depth``) with the random weights of `pgd.py`, CIFAR's shape.

A vote is the answer to one noisy copy of an image. The programs:

* ``jrobust, float32`` and ``PyTorch, float32``: the published procedure;
* ``jrobust, bfloat16 votes``: the bfloat16 twin votes, a share of the copies is also shown to the
  float32 network, which is the one that is certified; the cost of that is in each vote;
* ``PyTorch, bfloat16``: the twin alone, whose certificate is about the twin.

Then the share of all votes that staged certification at one radius takes, and what it loses.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _command
import _common
import autoattack
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pgd
from scipy import stats

from jrobust import data, drive, loops, models, parallel, smoothing, training

HERE = pathlib.Path(__file__).resolve().parent
FULL, LOW, PEER, PEER_LOW = (
    "jrobust, float32",
    "jrobust, bfloat16 votes",
    "PyTorch, float32",
    "PyTorch, bfloat16",
)
OURS = (FULL, LOW)
P_VALUE = 0.001  # below it the votes of both sides are taken to differ
STAGES = (100, 1_000, 10_000, 30_000, 100_000)


@dataclasses.dataclass(frozen=True)
class Settings:
    network: str = "digits"
    depth: int = 20
    images: int = 64  # certified together
    copies: int = 4096  # of each image in one turn
    pairs: float = 0.1  # copies of which that share is also shown to the float32 network
    check: int = 1000  # votes for each image that are compared
    pilot: int = 10_000  # votes for each image behind the staged procedure's probabilities
    sigma: float = 0.25
    alpha: float = 0.001
    radius: float = 0.5
    batches: tuple[int, ...] = (256, 512, 1024, 2048, 4096)  # that the peer may choose from
    rounds: int = 5
    whole: int = 0  # votes for each image in a timed run of `loops.certify`, if any


NETWORKS = {
    "digits": Settings(),
    "resnet": Settings("resnet", copies=64, check=100, pilot=0, batches=(32, 64, 128, 256, 512)),
}
SMALL: dict[str, dict[str, Any]] = {
    "digits": {"images": 32, "copies": 1024, "check": 500, "pilot": 2000, "rounds": 3},
    "resnet": {"depth": 8, "images": 16, "copies": 64, "batches": (64, 256), "rounds": 3},
}
GPU_BATCHES = (512, 1024, 2048, 4096, 8192)


@functools.partial(jax.jit, static_argnums=(3,))
def _noisy(key: jax.Array, x: jax.Array, noise: Any, n: int) -> jax.Array:
    """(B * n, ...) noisy copies."""
    keys = jax.random.split(key, (x.shape[0], n))
    copies = jax.vmap(jax.vmap(noise.perturb, (0, None)))(keys, x)
    return copies.reshape(-1, *x.shape[1:])


@dataclasses.dataclass
class Case(autoattack.Case):
    """The images, the network with its variables and its twin, the noise, the programs."""

    settings: Settings  # type: ignore[assignment]

    def __post_init__(self) -> None:
        s = self.settings
        self.module = models.SmallCNN() if s.network == "digits" else models.ResNet(s.depth)
        self.model = models.bind(self.module, self.variables)
        self.twin = models.bind(self.module, self.variables, dtype=jnp.bfloat16)
        self.noise = smoothing.Gaussian(s.sigma)
        self.key = jax.random.key(1)
        mesh = parallel.mesh()
        lanes = -(-len(self.x) // mesh.size) * mesh.size
        self.index = np.resize(np.arange(len(self.x)), lanes)
        self.lanes = jnp.asarray(self.x[self.index]), jnp.asarray(self.index)
        axes = (None, None, None, None, 0, 0)

        def program(fn: Callable[..., jax.Array], n: int) -> Any:
            counted = functools.partial(fn, n)
            split = parallel.data_parallel(drive.rewrite(counted), mesh, "shard_map", in_axes=axes)
            return lambda model, twin=None: split(self.key, model, twin, self.noise, *self.lanes)

        pairs = max(1, round(s.pairs * s.copies))
        count, compare = program(_count, s.copies), program(_compare, pairs)
        self.programs = {
            FULL: lambda: count(self.model),
            LOW: lambda: (count(self.twin), compare(self.model, self.twin)),
        }
        self.pairs = pairs

    def votes(self, n: int, model: Any = None) -> np.ndarray:
        """(images, classes) counts of n noisy copies."""
        report = loops.certify(
            self.key,
            self.model if model is None else model,
            data.Dataset(self.x, self.y),
            self.noise,
            n0=100,
            n=n,
            alpha=self.settings.alpha,
            progress=False,
        )
        return report.estimate_counts[:, :-1]


def _count(n: int, key: Any, model: Any, _: Any, noise: Any, x: Any, ids: Any) -> jax.Array:
    return smoothing.count_votes(key, model, x, noise, n, ids=ids)


def _compare(n: int, key: Any, model: Any, twin: Any, noise: Any, x: Any, ids: Any) -> jax.Array:
    return smoothing.count_disagreements(key, model, twin, x, noise, n, ids=ids)


def make_case(settings: Settings) -> Case:
    """The digits network, trained under noise; or that of `pgd.py`."""
    s = settings
    if s.network == "resnet":
        case = pgd.make_case(pgd.Settings(depth=s.depth, batch=s.images))
        return Case(s, case.variables, np.asarray(case.x), np.asarray(case.y))
    splits = data.digits()
    fitted = loops.fit(
        jax.random.key(0),
        models.network(models.SmallCNN()),
        training.NoiseAugmentation(smoothing.Gaussian(s.sigma)),
        optax.adam(optax.cosine_decay_schedule(3e-3, 30 * 19)),
        splits.train,
        epochs=30,
        batch_size=64,
        progress=False,
    )
    params, extra = fitted.last
    test = splits.test[: s.images]
    return Case(s, {"params": params, **extra}, test.x, test.y.astype(np.int32))


# --- the same answer


def p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the hypothesis that each image's counts (N, C) have one distribution on both sides.

    Pearson's statistic of each image's two rows, with classes put together that would come up
    fewer than five times on average; their sum over images against its chi-square distribution.
    """
    statistic, freedom = 0.0, 0
    for one, other in zip(ours.astype(np.float64), theirs.astype(np.float64)):
        table = np.stack([one, other])
        table = table[:, np.argsort(table.sum(0))]
        expected = table.sum(0) * table.sum(1, keepdims=True) / table.sum()
        least = expected.min(0)
        merged = max(int(np.sum(least < 5)), int(np.argmax(least.cumsum() >= 5)) + 1)
        table, expected = (
            np.column_stack([t[:, :merged].sum(1), t[:, merged:]]) for t in (table, expected)
        )
        statistic += float(((table - expected) ** 2 / expected).sum())
        freedom += table.shape[1] - 1
    return float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0


def same(case: Case, peer: _common.Peer, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Checks that the peer's network is ours, and so are its votes and its radii."""
    s = case.settings

    def theirs(do: str, **arguments: Any) -> dict[str, np.ndarray]:
        peer.ask(do, out="theirs.npz", **arguments)
        with np.load(folder / "theirs.npz") as arrays:
            return dict(arrays)

    points = _noisy(jax.random.key(2), jnp.asarray(case.x), case.noise, 8)
    np.savez(folder / "points.npz", x=points)
    with jax.default_matmul_precision("highest"):
        ours = [np.asarray(jax.jit(lambda m, x: m(x))(m, points)) for m in (case.model, case.twin)]
    found = [
        theirs("logits_at", points="points.npz", dtype=d)["logits"] for d in ("float32", "bfloat16")
    ]
    apart = np.abs(found[0] - ours[0]).max() / np.abs(ours[0]).max()
    flips = np.mean(found[1].argmax(-1) != ours[1].argmax(-1))

    mine = case.votes(s.check)
    other = theirs("votes", n=s.check, batch=s.batches[0], dtype="float32", seed=0)["counts"]
    p = p_value(mine, other)

    select, estimate = case.votes(100), mine
    np.savez(folder / "counts.npz", select=select, estimate=estimate)
    published = theirs("certify", counts="counts.npz", alpha=s.alpha)
    none = np.zeros((len(select), 1), np.int64)
    certificate = smoothing.certify(
        np.hstack([select, none]), np.hstack([estimate, none]), case.noise, s.alpha
    )
    return [
        _common.check("logits at noisy points, relative", apart, 1e-4),
        _common.check("bfloat16 answers that differ", flips, 0.05),
        _common.check("1 - p that the votes are alike", 1 - p, 1 - P_VALUE),
        _common.check(
            "answers from equal counts that differ",
            np.sum(published["prediction"] != certificate.prediction),
            0,
        ),
        _common.check(
            "radii from equal counts, difference",
            np.abs(published["radius"] - certificate.radius).max(),
            1e-9,
        ),
    ]


# --- staged certification


def staged(
    case: Case, counts: np.ndarray, repeats: int = 20
) -> tuple[list[float], list[float], float]:
    """(shares of the votes, points lost, certified accuracy) at ``radius``, by simulated votes.

    Each image's answers have the probabilities that ``counts`` (N, C) of real votes show. From
    them the same votes are drawn for both procedures, ``repeats`` times: the first of a stage for
    the staged one, all of the last for the other. So the difference is that of the procedures, to
    a fraction of a point, for any number of images.
    """
    s = case.settings
    chance = counts / counts.sum(1, keepdims=True)
    shares, lost, accuracy = [], [], []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        # By stage; no answer is a reject.
        blocks = {
            start: np.pad(rng.multinomial(end - start, chance), ((0, 0), (0, 1)))
            for start, end in itertools.pairwise((0, *STAGES))
        }
        select = np.pad(rng.multinomial(100, chance), ((0, 0), (0, 1)))
        cast = [int(select.sum())]

        def vote(
            rows: np.ndarray, start: int, n: int, blocks: Any = blocks, cast: list[int] = cast
        ) -> np.ndarray:
            cast.append(n * len(rows))
            return blocks[start][rows]

        quick = smoothing.certify_staged(
            select, vote, case.noise, s.alpha, stages=STAGES, radius=s.radius
        )
        everything = sum(blocks.values())
        full = smoothing.certify(select, everything, case.noise, s.alpha)
        shares.append(sum(cast) / int(select.sum() + everything.sum()))
        accuracies = [float(c.accuracy(case.y, s.radius)) for c in (full, quick)]
        lost.append(100 * (accuracies[0] - accuracies[1]))
        accuracy.append(accuracies[0])
    return shares, lost, statistics.mean(accuracy)


# --- times


def peer_turn(peer: _common.Peer, settings: Settings, dtype: str) -> tuple[_common.Turn, int]:
    """The peer at the batch size at which it is fastest; (turn, that batch size)."""

    def seconds(batch: int, images: int) -> float:
        copies = max(settings.copies, batch)
        return peer.ask("time", images=images, n=copies, batch=batch, dtype=dtype)["seconds"]

    def images(batch: int, each: float) -> int:
        """As many as last for half a second."""
        return max(1, math.ceil(0.5 / (each * max(settings.copies, batch))))

    trial = {}
    for batch in settings.batches:
        seconds(batch, 1)
        lasting = images(batch, seconds(batch, 1))
        trial[batch] = min(seconds(batch, lasting) for _ in range(2))
    best = min(trial, key=trial.__getitem__)
    number = images(best, trial[best])
    return lambda: seconds(best, number), best


def fastest_product(load: _common.Load, *, force: bool) -> float:
    """Operations a second of a large bfloat16 matrix product."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(jnp.dot)
    turn = _common.turn(lambda: product(a, a), 1, seconds=0.2)
    times = _common.take_turns({"product": turn}, 3, load, force=force)["product"]
    return 2 * side**3 / min(times)


def whole(case: Case) -> dict[str, functools.partial[Any]]:
    """Whole runs of `loops.certify` over all images; calling one checks it and makes events."""
    s = case.settings
    stages = [n for n in STAGES if n < s.whole] + [s.whole]
    ways: dict[str, dict[str, Any]] = {
        FULL: {"n": s.whole},
        LOW: {"n": s.whole, "voter": case.twin, "pairs": round(s.pairs * s.whole)},
        f"staged at {s.radius:g}": {"stages": stages, "radius": s.radius},
    }
    examples = data.Dataset(case.x, case.y)
    common = (case.key, case.model, examples, case.noise)
    return {
        name: functools.partial(loops.certify.iter, *common, alpha=s.alpha, **options)
        for name, options in ways.items()
    }


def seconds_of(run: functools.partial[Any]) -> float:
    """Of a whole run, compiled before."""
    loops.certify.warm_up(*run.args, **run.keywords)
    begin = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - begin


def measure(case: Case, peer_python: pathlib.Path, *, force: bool = False) -> dict[str, Any]:
    """Check, compile and time everything; the report."""
    s = case.settings
    _common.check_python(peer_python)
    runs = whole(case) if s.whole else {}
    for run in runs.values():
        run()  # raises where a setting is wrong, before anything is measured
    load = _common.check_quiet(force=force)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with _common.Peer(peer_python, HERE / "_peer_certify.py") as peer:
            opened = case.open(peer, folder)
            checks = same(case, peer, folder)
            _common.require(checks)
            first = ("--devices", str(jax.device_count()), "--first-call")
            compiled = {
                program: _common.cold_and_warm(HERE / "certify.py", *first, program, name)
                for program in OURS
            }
            limits = _common.measure_limits(load, force=force)
            low_flops = fastest_product(load, force=force)
            votes = s.copies * len(case.index)
            turns = {name: _common.turn(case.programs[name], votes) for name in OURS}
            best = {name: s.copies * len(case.index) for name in OURS}
            for name, dtype in ((PEER, "float32"), (PEER_LOW, "bfloat16")):
                turns[name], best[name] = peer_turn(peer, s, dtype)
            times = _common.take_turns(turns, s.rounds, load, force=force)

    low_limits = limits._replace(flops=low_flops)
    one = jnp.asarray(case.x[:1])
    full_work = _common.operations(case.model, one)
    twin_work = _common.operations(case.twin, one)
    full, twin = _common.roofline(full_work, limits), _common.roofline(twin_work, low_limits)
    share = case.pairs / s.copies
    seconds = full.seconds * share + twin.seconds * (1 + share)
    memory = full.seconds * full.memory * share + twin.seconds * twin.memory * (1 + share)
    flops = sum(operation.flops for operation in full_work)
    work = {
        FULL: (flops, full),
        LOW: (flops * (1 + 2 * share), _common.Roofline(seconds, memory / seconds)),
        PEER: (flops, full),
        PEER_LOW: (flops, twin),
    }
    rows, none = [], {"compile_s": None}
    for name, measured in times.items():
        cold, warm = compiled.get(name, (none, none))
        rows.append(
            _common.row(
                name,
                best[name],
                **_common.speed(measured, *work[name]),
                compile_cold_s=cold["compile_s"],
                compile_warm_s=warm["compile_s"],
            )
        )
    ratios = [
        _common.ratio(f"speed, {ours} to {theirs}", times[theirs], times[ours])
        for ours, theirs in ((FULL, PEER), (LOW, PEER), (LOW, PEER_LOW), (FULL, PEER_LOW))
    ]
    extra: dict[str, Any] = {}
    if s.pilot:
        shares, lost, accuracy = staged(case, case.votes(s.pilot))
        ones = [1.0] * len(shares)
        ratios += [
            _common.ratio(f"staged at {s.radius:g}: share of all votes", shares, ones),
            _common.ratio(f"staged at {s.radius:g}: points lost", lost, ones),
        ]
        extra = {"stages": STAGES, "certified_accuracy": accuracy}
    if runs:
        extra["whole_s"] = {name: seconds_of(run) for name, run in runs.items()}
    return _common.report(
        "certify",
        load,
        limits,
        settings=dataclasses.asdict(s)
        | extra
        | {
            "example": "one vote",
            "mflop_per_example": flops / 1e6,
            "bfloat16_gflops_per_s": low_flops / 1e9,
            "amx": "amx_bf16" in _flags(),
        },
        machine=_common.machine(opened),
        checks=checks,
        rows=rows,
        ratios=ratios,
    )


def _flags() -> list[str]:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def main() -> None:
    """Run from the command line."""
    parser = _command.parser(
        "certify",
        __doc__,
        Settings,
        small="few images, a ResNet-8: a minute",
        peer="torch, numpy and scipy",
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), default="digits")
    parser.add_argument("--devices", type=int, help="of the CPU; default one for every core")
    parser.add_argument(
        "--first-call", nargs=3, metavar=("PROGRAM", "CASE", "CACHE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    # On a CPU, several devices of one thread are faster than one device of several threads.
    jax.config.update("jax_num_cpu_devices", args.devices or os.cpu_count() or 1)
    if args.first_call:
        program, folder, cache = args.first_call
        _common.start(cache)  # before anything is compiled
        case = Case.load(pathlib.Path(folder), Settings)
        print(json.dumps(_common.time_first_call(case.programs[program], cache)))
        return
    small = SMALL[args.network] if args.small else {}
    settings = dataclasses.replace(
        NETWORKS[args.network], **{**small, **_command.chosen(args, Settings)}
    )
    if jax.default_backend() != "cpu":
        settings = dataclasses.replace(settings, batches=GPU_BATCHES, copies=args.copies or 4096)
    _command.finish(
        lambda: measure(make_case(settings), args.peer_python, force=args.force), args.out
    )


if __name__ == "__main__":
    main()
