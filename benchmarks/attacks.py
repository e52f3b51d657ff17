"""Single attacks: `jrobust.run` against the same attack of foolbox or torchattacks.

Each pair has the same published algorithm with the same settings on the same weights and examples:
the networks and examples of `autoattack.py`. Before anything is timed, ours must be as strong:
attacks within a radius by the share of examples that stand, minimal-norm attacks by the median
distance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import _command
import _common
import autoattack
import jax
import jax.numpy as jnp
import numpy as np

import jrobust
from jrobust import attacks
from jrobust.threat import L1, L2, Linf

HERE = pathlib.Path(__file__).resolve().parent
JROBUST = "jrobust"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One attack on both sides.

    Args:
        ours: from the radius and a length, the attack.
        library: of the peer.
        name: of the attack there.
        theirs: from the radius and a length, its arguments.
        length: steps or queries at full size.
        minimal: whether it looks for the closest point. Its length is never shortened, because
            half a search finds little on either side.
    """

    ours: Callable[[float, int], attacks.Attack]
    library: str
    name: str
    theirs: Callable[[float, int], dict[str, Any]]
    length: int
    minimal: bool = False


WHOLE = 1e3  # no radius: wider than any box here
PAIRS = {
    "FGSM": Pair(
        lambda eps, n: attacks.FGSM(Linf(eps), keep="last"),
        "torchattacks", "FGSM", lambda eps, n: {"eps": eps}, 1,
    ),
    "PGD": Pair(
        lambda eps, n: attacks.PGD(Linf(eps), steps=n, step_size=eps / 10, keep="last"),
        "torchattacks", "PGD", lambda eps, n: {"eps": eps, "alpha": eps / 10, "steps": n}, 40,
    ),
    "PGD, L2": Pair(
        lambda eps, n: attacks.PGD(L2(5 * eps), steps=n, step_size=eps / 2, keep="last"),
        "foolbox", "L2PGD", lambda eps, n: {"abs_stepsize": eps / 2, "steps": n}, 40,
    ),
    "MI-FGSM": Pair(
        lambda eps, n: attacks.MIFGSM(Linf(eps), steps=n, keep="last"),
        "torchattacks", "MIFGSM", lambda eps, n: {"eps": eps, "alpha": eps / n, "steps": n}, 10,
    ),
    "APGD": Pair(
        lambda eps, n: attacks.APGD(Linf(eps), steps=n),
        "torchattacks", "APGD", lambda eps, n: {"eps": eps, "steps": n}, 100,
    ),
    "Square": Pair(
        lambda eps, n: attacks.Square(Linf(eps), queries=n),
        "torchattacks", "Square", lambda eps, n: {"eps": eps, "n_queries": n}, 1000,
    ),
    "CW": Pair(
        lambda eps, n: attacks.CW(L2(WHOLE), steps=n, rounds=9, step_size=0.01, constant=1e-3),
        "foolbox", "L2CarliniWagnerAttack",
        lambda eps, n: {"binary_search_steps": 9, "steps": n, "stepsize": 0.01}, 200, True,
    ),
    "DeepFool": Pair(
        lambda eps, n: attacks.DeepFool(L2(WHOLE), steps=n),
        "foolbox", "L2DeepFoolAttack", lambda eps, n: {"steps": n, "candidates": None}, 50, True,
    ),
    "DDN": Pair(
        lambda eps, n: attacks.DDN(L2(WHOLE), steps=n),
        "foolbox", "DDNAttack", lambda eps, n: {"steps": n}, 100, True,
    ),
    "FMN": Pair(
        lambda eps, n: attacks.FMN(Linf(WHOLE), steps=n),
        "foolbox", "LInfFMNAttack", lambda eps, n: {"steps": n}, 100, True,
    ),
    "EAD": Pair(
        lambda eps, n: attacks.EAD(L1(WHOLE), steps=n, rounds=9, beta=0.01, rule="L1"),
        "foolbox", "EADAttack",
        lambda eps, n: {"binary_search_steps": 9, "steps": n, "decision_rule": "L1"}, 100, True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings(autoattack.Settings):
    share: float = 1.0  # of the lengths


SMALL = {"examples": 32, "share": 0.1, "rounds": 2}


@dataclasses.dataclass
class Run:
    """One pair on one case."""

    case: autoattack.Case
    pair: Pair
    share: float

    def __post_init__(self) -> None:
        share = 1.0 if self.pair.minimal else self.share
        eps, self.length = self.case.settings.eps, max(1, round(share * self.pair.length))
        attack = self.pair.ours(eps, self.length)
        (threat,) = attack.threats()
        if self.pair.minimal:  # no larger than the box
            widest = float(threat.widest(1.0, self.case.x.shape[1:]))
            attack = attacks.with_eps(attack, widest)
        self.attack, (self.threat,) = attack, attack.threats()
        # foolbox takes the radius at the call, and None for the closest point.
        self.eps = None if self.pair.minimal else float(self.threat.eps)
        self.arguments = self.pair.theirs(eps, self.length)

    def ours(self) -> attacks.AttackResult:
        """Our attack."""
        case = self.case
        return jrobust.run(self.attack, jax.random.key(0), case.model, case.x, case.y)

    def theirs(self, peer: _common.Peer, batch: int, **more: Any) -> float:
        """Seconds of the peer's."""
        pair = self.pair
        request = {"library": pair.library, "name": pair.name, "arguments": self.arguments}
        return peer.ask("run", **request, eps=self.eps, batch=batch, **more)["seconds"]

    def same(
        self, name: str, peer: _common.Peer, folder: pathlib.Path
    ) -> tuple[list[dict[str, Any]], attacks.AttackResult]:
        """Checks that ours is as strong; and our result."""
        ours = self.ours()
        self.theirs(peer, len(self.case.x), out="theirs.npz")
        with np.load(folder / "theirs.npz") as arrays:
            theirs = dict(arrays)
        stands = 1 - np.asarray(ours.success).mean(), 1 - theirs["success"].mean()
        checks = [
            _common.check(f"{name}: what stands, ours less theirs", stands[0] - stands[1], 0.02)
        ]
        if self.pair.minimal:
            found = np.asarray(self.threat.distance(theirs["x"], self.case.x))
            medians = [
                np.median(np.where(success, distance, np.inf))
                for success, distance in (
                    (np.asarray(ours.success), np.asarray(ours.distance)),
                    (theirs["success"], found),
                )
            ]
            # Where the peer finds nothing for half of the examples, there is nothing to match.
            over = medians[0] / medians[1] if np.isfinite(medians[1]) else 0.0
            checks.append(_common.check(f"{name}: median distance over theirs", over, 1.02))
        return checks, ours


def measure(
    case: autoattack.Case, names: list[str], peer_python: pathlib.Path, *, force: bool = False
) -> dict[str, Any]:
    """Check, compile and time everything; the report."""
    s: Settings = case.settings  # type: ignore[assignment]
    _common.check_python(peer_python)
    load = _common.check_quiet(force=force)
    total = len(case.x)
    runs = {name: Run(case, PAIRS[name], s.share) for name in names}
    checks, rows, ratios = [], [], []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = pathlib.Path(folder_name)
        with _common.Peer(peer_python, HERE / "_peer_attacks.py") as peer:
            opened = case.open(peer, folder)
            limits = _common.measure_limits(load, force=force)
            forward = _common.operations(case.model, jnp.asarray(case.x[:1]))
            flops = sum(operation.flops for operation in forward)
            seconds, memory = _common.roofline(forward, limits)
            for name, run in runs.items():
                found, result = run.same(name, peer, folder)
                checks += found
                passes = float(np.mean(result.forwards + result.backwards))
                first = ("--devices", str(jax.device_count()), "--first-call", name, folder_name)
                cold, warm = _common.cold_and_warm(HERE / "attacks.py", *first)
                sizes = {total, -(-total // 2), -(-total // 4)}
                best = min(sizes, key=lambda size, run=run: run.theirs(peer, size))
                turns = {
                    JROBUST: _common.turn(run.ours, total),
                    run.pair.library: lambda run=run, best=best: run.theirs(peer, best) / total,
                }
                times = _common.take_turns(turns, s.rounds, load, force=force)
                limit = _common.Roofline(seconds * passes, memory)
                rows += [
                    _common.row(
                        f"{name}: {JROBUST}",
                        total,
                        **_common.speed(times[JROBUST], flops * passes, limit),
                        compile_cold_s=cold["compile_s"],
                        compile_warm_s=warm["compile_s"],
                    ),
                    _common.row(
                        f"{name}: {run.pair.library}",
                        best,
                        seconds_per_example=times[run.pair.library],
                        examples_per_s=1 / float(np.median(times[run.pair.library])),
                    ),
                ]
                ratios.append(
                    _common.ratio(
                        f"{name}: speed, {JROBUST} to {run.pair.library}",
                        times[run.pair.library],
                        times[JROBUST],
                    )
                )
    _common.require(checks)
    return _common.report(
        "attacks",
        load,
        limits,
        settings=dataclasses.asdict(s) | {"lengths": {n: run.length for n, run in runs.items()}},
        machine=_common.machine(opened),
        checks=checks,
        rows=rows,
        ratios=ratios,
    )


def main() -> None:
    """Run from the command line."""
    parser = _command.parser(
        "attacks",
        __doc__,
        Settings,
        small="few examples, a tenth of the steps",
        peer="torch, foolbox, torchattacks and pyautoattack",
    )
    parser.add_argument("--network", choices=tuple(autoattack.NETWORKS), default="digits")
    parser.add_argument("--only", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument(
        "--first-call", nargs=3, metavar=("PAIR", "CASE", "CACHE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    # jrobust.run uses one device; `loops.evaluate` splits batches over several.
    jax.config.update("jax_num_cpu_devices", args.devices or 1)
    if args.first_call:
        name, folder, cache = args.first_call
        case = autoattack.Case.load(pathlib.Path(folder), Settings)
        run = Run(case, PAIRS[name], case.settings.share)  # type: ignore[attr-defined]
        print(json.dumps(_common.time_first_call(run.ours, cache)))
        return
    base = dataclasses.asdict(autoattack.NETWORKS[args.network])
    small = SMALL if args.small else {}
    settings = Settings(**{**base, **small, **_command.chosen(args, Settings)})
    _command.finish(
        lambda: measure(
            autoattack.make_case(settings), args.only, args.peer_python, force=args.force
        ),
        args.out,
    )


if __name__ == "__main__":
    main()
