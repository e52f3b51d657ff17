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
import sys
import tempfile
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pgd

from jrobust import attacks, data, loops, models, training
from jrobust.threat import L1, L2, Linf, Threat

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
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
class Case:
    """The examples, the network with its variables, the attacks."""

    settings: Settings
    variables: dict[str, Any]
    x: np.ndarray
    y: np.ndarray

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

    def network(self) -> dict[str, Any]:
        """The network for the peer."""
        m = self.module
        if isinstance(m, models.SmallCNN):
            _, side, _, channels = self.x.shape
            sizes = {"channels": channels, "side": side, "widths": m.widths, "hidden": m.hidden}
            return {"kind": "SmallCNN", "classes": m.classes, **sizes}
        constants = {"mean": m.mean, "std": m.std}
        return {"kind": "ResNet", "depth": m.depth, "classes": m.classes, "widths": m.widths} | (
            constants
        )

    def save(self, folder: pathlib.Path) -> None:
        """Write what the peer and fresh processes need."""
        np.savez(folder / "case.npz", x=self.x, y=self.y, **_common.flatten(self.variables))
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(self.settings)))

    @classmethod
    def load(cls, folder: pathlib.Path, kind: type[Settings] = Settings) -> Case:
        """Read what :meth:`save` wrote; ``kind`` is that of its settings."""
        settings = kind(**json.loads((folder / "settings.json").read_text()))
        with np.load(folder / "case.npz") as arrays:
            case = dict(arrays)
        x, y = case.pop("x"), case.pop("y")
        return cls(settings, jax.tree.map(jnp.asarray, _common.unflatten(case)), x, y)


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
        case.save(folder)
        with _common.Peer(peer_python, HERE / "_peer_autoattack.py") as peer:
            opened = peer.ask(
                "open",
                folder=name,
                settings=dataclasses.asdict(s),
                network=case.network(),
                variables=sorted(_common.flatten(case.variables)),
                threads=os.cpu_count(),
            )
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=tuple(NETWORKS), default="digits")
    parser.add_argument("--small", action="store_true", help="few examples, steps and queries")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "out" / "autoattack.json")
    parser.add_argument(
        "--peer-python",
        type=pathlib.Path,
        default=ROOT / ".venv-peer" / "bin" / "python",
        help="interpreter of an environment with torch, numpy and pyautoattack",
    )
    parser.add_argument("--norm", choices=tuple(NORMS))
    parser.add_argument("--eps", type=float)
    for name in ("examples", "steps", "queries", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--devices", type=int, help="of the CPU; default one for every core")
    parser.add_argument(
        "--force", action="store_true", help="report on a busy machine too, marked as loaded"
    )
    parser.add_argument("--first-call", nargs=2, metavar=("CASE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    # On a CPU, several devices of one thread are faster than one device of several threads.
    jax.config.update("jax_num_cpu_devices", args.devices or os.cpu_count() or 1)
    if args.first_call:
        folder, cache = args.first_call
        case = Case.load(pathlib.Path(folder))
        print(json.dumps(_common.time_first_call(lambda: case.run().x, cache)))
        return
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(
        NETWORKS[args.network], **{**(SMALL if args.small else {}), **chosen}
    )
    try:
        report = measure(make_case(settings), args.peer_python, force=args.force)
    except (_common.LoadedError, _common.DisagreementError, FileNotFoundError) as error:
        sys.exit(f"not reporting: {error}")
    print(_common.table(report))
    _common.write(report, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
