"""Small runs of the three pipelines, for tests that kill them or spread them over processes.

python tests/runs.py RUN DIRECTORY [--devices N] [--process I --processes P --port PORT]
python tests/runs.py RUN DIRECTORY --kill N --seed S

The first form makes one run in this process, one of several perhaps, and writes what came of it to
``DIRECTORY/outcome-I.npz``. The second makes it in a child that is killed N times and restarted.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import random
import signal
import sys
import time

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrobust import attacks, data, loops, models, parallel, smoothing, training
from jrobust.threat import Linf

EXAMPLES = 96


def problem() -> data.Dataset:
    rng = np.random.default_rng(0)
    y = np.arange(EXAMPLES) % 3
    x = (
        0.5
        + 0.12 * np.cos(np.arange(6)[None] * (1.0 + y[:, None]))
        + 0.1 * rng.normal(size=(EXAMPLES, 6))
    )
    return data.Dataset(np.float32(np.clip(x, 0, 1)), y, np.arange(EXAMPLES) + 100)


def network() -> models.Network:
    return models.network(
        flax.linen.Sequential([flax.linen.Dense(16), flax.linen.tanh, flax.linen.Dense(3)])
    )


def model():
    made = network()
    params, extra = made.init(jax.random.key(3), jnp.zeros((1, 6)))
    return made.bind(jax.tree.map(lambda leaf: 3 * leaf, params), extra)


def fit(directory, mesh):
    examples = problem()
    inner = attacks.PGD(Linf(0.05), steps=3, keep="last")
    return loops.fit.iter(
        jax.random.key(0),
        network(),
        training.Adversarial(inner),
        optax.adam(3e-2),
        examples[:64],
        epochs=8,
        batch_size=8,
        average=training.EMA(0.9),
        validation=examples[64:],
        save_every=3,
        directory=directory,
        mesh=mesh,
    )


def evaluate(directory, mesh):
    return loops.evaluate.iter(
        jax.random.key(1),
        model(),
        problem(),
        {"one": attacks.FGSM(Linf(0.02)), "two": attacks.PGD(Linf(0.04), steps=3)},
        batch_size=4,
        directory=directory,
        mesh=mesh,
    )


def certify(directory, mesh):
    return loops.certify.iter(
        jax.random.key(2),
        model(),
        problem(),
        smoothing.Gaussian(0.1),
        n=400,
        batch_size=4,
        chunk=100,
        directory=directory,
        mesh=mesh,
    )


RUNS = {"fit": fit, "evaluate": evaluate, "certify": certify}
EVENTS = {"fit": 8, "evaluate": 30, "certify": 24}  # of each run, at least


def arrays(name: str, report) -> dict[str, np.ndarray]:
    """Everything in a report that must not depend on interruptions."""
    if name == "fit":
        leaves = jax.tree.leaves((report.state.params, report.state.opt_state, report.best))
        history = [[m[k] for k in sorted(m)] for m in report.history]
        numbers = {f"leaf{i:03d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        return {**numbers, "history": np.array(history), "best_epoch": report.best_epoch}
    if name == "evaluate":
        return {**report.examples, "x": report.x, "standing": report.standing}
    certificate = {k: np.asarray(v) for k, v in vars(report.certificate).items() if np.ndim(v)}
    return {**certificate, "select": report.select_counts, "estimate": report.estimate_counts}


def run(name: str, directory: pathlib.Path, process: int = 0, until: float = math.inf) -> None:
    """Run to the end, or for good until somebody kills it at the event number ``until``."""
    report = None
    for number, event in enumerate(RUNS[name](directory, parallel.mesh())):
        # A fit that goes on yields the epochs that are left, the others all of their events again.
        while getattr(event, "epoch", number) >= until:
            time.sleep(1)
        report = event.report
    np.savez(directory / f"outcome-{process}.npz", **arrays(name, report))


def progress(directory: pathlib.Path) -> tuple[str, ...]:
    """What a run has finished so far."""
    return tuple(sorted(p.name for p in directory.glob("[bc]*/*") if "." not in p.name[1:-4]))


def kill(name: str, directory: pathlib.Path, times: int, seed: int, configure) -> None:
    """Fork a run, kill it at a random moment, again and again, and let the last one finish."""
    rng, seen = random.Random(seed), []
    for life in range(times + 1):
        child = os.fork()
        if child == 0:
            configure()
            # However fast the machine, something is left to do for every life.
            share = (life + 1) / (times + 1)
            run(name, directory, until=share * EVENTS[name] if life < times else math.inf)
            os._exit(0)
        if life == times:
            _, status = os.waitpid(child, 0)
            print(len(set(seen)), "different states at the kills")
            sys.exit(os.waitstatus_to_exitcode(status))
        if rng.random() < 0.7:  # somewhere behind the next thing it finishes, if it does
            before, patience = progress(directory), time.monotonic() + 20.0
            while progress(directory) == before and time.monotonic() < patience:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.3))
        else:  # anywhere, the start and the compilation included
            time.sleep(rng.uniform(0.0, 2.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status != signal.SIGKILL:
            sys.exit(f"the run ended before kill {life + 1} of {times}, with status {status}")
        seen.append(progress(directory))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def configure() -> None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)

    if args.kill is not None:
        kill(args.run, args.directory, args.kill, args.seed, configure)
    configure()
    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.process)
    run(args.run, args.directory, args.process)


if __name__ == "__main__":
    main()
