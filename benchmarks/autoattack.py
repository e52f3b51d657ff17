"""AutoAttack, standard version: `loops.evaluate` against pyautoattack on the same weights.

The whole evaluation is timed as a user waits for it: clean pass, four attacks on what stands,
verdicts. Both attack the same examples with networks of the same weights:

* ``--network digits``: a small convolutional network trained by PGD here, in seconds, on
  scikit-learn's digits; test digits, Linf 0.1, the official schedules;
* ``--network resnet20``: ResNet-20 with the random weights of `pgd.py`, at CIFAR's shape; all
  schedules shortened alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import _case
import _command
import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pgd

from jrobust import attacks, data, loops, models, training
from jrobust.threat import L1, L2, Linf, Threat

HERE = pathlib.Path(__file__).resolve().parent
JROBUST, PEER = "jrobust", "pyautoattack"
NORMS = {"Linf": Linf, "L2": L2, "L1": L1}


@dataclasses.dataclass(frozen=True)
class Settings:
    network: str = "digits"
    norm: str = "Linf"
    eps: float = 0.1
    examples: int = 256
    steps: int = 100
    queries: int = 5000
    rounds: int = 3
    devices: int = 0  # of the CPU, one thread each; 0: one for every core


NETWORKS = {
    "digits": Settings(),
    "resnet20": Settings("resnet20", eps=2 / 255, examples=64, steps=10, queries=100),
}
SMALL = {"examples": 32, "steps": 5, "queries": 50, "rounds": 2}


@dataclasses.dataclass
class Case(_case.Case):
    """The examples, the network with its variables, the attacks."""

    settings: Settings

    def __post_init__(self) -> None:
        s = self.settings
        self.module = models.SmallCNN() if s.network == "digits" else models.ResNet(20)
        self.model = models.bind(self.module, self.variables)
        self.threat: Threat = NORMS[s.norm](s.eps)
        self.attacks = attacks.AutoAttack(self.threat, steps=s.steps, queries=s.queries).stages
        self.data = data.Dataset(self.x, self.y)

    def run(self, seed: int = 0) -> loops.EvaluationReport:
        """The evaluation."""
        return loops.evaluate(
            jax.random.key(seed),
            self.model,
            self.data,
            self.attacks,
            batch_size=len(self.x),
            checks=False,  # the peer's own take two forward passes
            progress=False,
        )


def make_case(settings: Settings) -> Case:
    """The digits network, trained; or that of `pgd.py`."""
    if settings.network == "resnet20":
        case = pgd.make_case(pgd.Settings(batch=settings.examples))
        return Case(settings, case.variables, np.asarray(case.x), np.asarray(case.y))
    splits = data.digits()
    inner = attacks.PGD(Linf(settings.eps), steps=7, keep="last")
    network = models.network(models.SmallCNN())
    fitted = loops.fit(
        jax.random.key(0),
        network,
        training.Adversarial(inner),
        optax.adam(optax.cosine_decay_schedule(3e-3, 30 * 19)),
        splits.train,
        epochs=30,
        batch_size=64,
        progress=False,
    )
    params, extra = fitted.last
    test = splits.test[: settings.examples]
    return Case(settings, {"params": params, **extra}, test.x, test.y.astype(np.int32))


def same(case: Case, peer: _common.Peer, folder: pathlib.Path) -> tuple[list[dict[str, Any]], Any]:
    """Checks that the peer attacks the same network as strongly; and our report."""
    ours = case.run()
    peer.ask("logits", out="logits.npz")
    peer.ask("attack", seed=0, batch=len(case.x), out="theirs.npz")
    with np.load(folder / "logits.npz") as found, np.load(folder / "theirs.npz") as theirs:
        logits, success = found["logits"], theirs["success"]
    with jax.default_matmul_precision("highest"):
        mine = np.asarray(jax.jit(lambda m, x: m(x))(case.model, case.x))
    broken = ~ours.examples["robust"]
    distance = np.asarray(case.threat.distance(ours.x, case.x))
    return [
        _common.check("logits, relative", np.abs(logits - mine).max() / np.abs(mine).max(), 1e-4),
        _common.check("radius of our points over eps", distance.max() / case.settings.eps, 1.00001),
        _common.check("verdicts that differ", (broken != success).mean(), 0.02),
        _common.check("our robust accuracy less theirs", success.mean() - broken.mean(), 0.005),
    ], ours


def measure(case: Case, peer_python: pathlib.Path, *, force: bool = False) -> dict[str, Any]:
    """Check, compile and time everything; the report."""
    s = case.settings
    _common.check_python(peer_python)
    load = _common.check_quiet(force=force)
    total = len(case.x)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with _common.Peer(peer_python, HERE / "_peer_autoattack.py") as peer:
            opened = case.open(peer, folder)
            checks, report = same(case, peer, folder)
            _common.require(checks)
            first = ("--devices", str(jax.device_count()), "--first-call", name)
            cold, warm = _common.cold_and_warm(HERE / "autoattack.py", *first)
            limits = _common.measure_limits(load, force=force)

            def ours() -> float:
                seconds = case.run().seconds
                return sum(seconds.values()) / total

            def theirs(batch: int) -> float:
                return peer.ask("attack", seed=0, batch=batch)["seconds"] / total

            best = min({total, -(-total // 2), -(-total // 4)}, key=theirs)

            turns = {JROBUST: ours, PEER: lambda: theirs(best)}
            times = _common.take_turns(turns, s.rounds, load, force=force)
    forward = _common.operations(case.model, jnp.asarray(case.x[:1]))
    passes = int(report.examples["forwards"].sum() + report.examples["backwards"].sum())
    flops = sum(operation.flops for operation in forward) * passes / total
    seconds, memory = _common.roofline(forward, limits)
    limit = _common.Roofline(seconds * passes / total, memory)
    compiled = {"compile_cold_s": cold["compile_s"], "compile_warm_s": warm["compile_s"]}
    rows = [
        _common.row(JROBUST, total, **_common.speed(times[JROBUST], flops, limit), **compiled),
        _common.row(PEER, best, **_common.speed(times[PEER], flops, limit)),
    ]
    fresh = [t * total + warm["compile_s"] for t in times[JROBUST]]
    ratios = [
        _common.ratio(f"speed, {JROBUST} to {PEER}", times[PEER], times[JROBUST]),
        _common.ratio(
            f"speed, {JROBUST} in a fresh process to {PEER}",
            [t * total for t in times[PEER]],
            fresh,
        ),
    ]
    return _common.report(
        "autoattack",
        load,
        limits,
        settings=dataclasses.asdict(s)
        | {
            "mflop_per_example": flops / 1e6,
            "clean_accuracy": report.clean_accuracy,
            "standing": dict(zip(report.attacks, report.standing[1:].tolist())),
            "robust_accuracy": report.robust_accuracy,
        },
        machine=_common.machine(opened),
        checks=checks,
        rows=rows,
        ratios=ratios,
    )


def main() -> None:
    """Run from the command line."""
    parser = _command.parser(
        "autoattack",
        __doc__,
        Settings,
        small="few examples, steps and queries",
        peer="torch, numpy and pyautoattack",
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), default="digits")
    parser.add_argument("--norm", choices=tuple(NORMS))
    parser.add_argument("--first-call", nargs=2, metavar=("CASE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    # On a CPU, several devices of one thread are faster than one device of several threads.
    jax.config.update("jax_num_cpu_devices", args.devices or os.cpu_count() or 1)
    if args.first_call:
        folder, cache = args.first_call
        case = Case.load(pathlib.Path(folder), Settings)
        print(json.dumps(_common.time_first_call(lambda: case.run().x, cache)))
        return
    small = SMALL if args.small else {}
    settings = dataclasses.replace(
        NETWORKS[args.network], **{**small, **_command.chosen(args, Settings)}
    )
    _command.finish(
        lambda: measure(make_case(settings), args.peer_python, force=args.force), args.out
    )


if __name__ == "__main__":
    main()
