"""PGD-10 on a ResNet-20: `jrobust.run` against a plain PyTorch loop and other JAX programs.

The programs attack the same examples from the same start points with the same weights:

* ``jrobust.run``: the library as users call it, its loop compiled as one ``lax`` loop;
* ``JAX, unrolled``: the same steps written out one after the other in one ``jit``;
* ``JAX, plain fori_loop``: the same steps in a loop that nobody rewrote for the CPU;
* ``PyTorch``: a plain loop at the batch size that suits it best.

Each does 10 forward and backward passes and one closing forward pass. See the README beside this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import tempfile
from typing import Any

import _case
import _command
import _common
import jax
import jax.numpy as jnp
import numpy as np

import jrobust
from jrobust import attacks, keys
from jrobust.models import ResNet, bind
from jrobust.threat import Linf

HERE = pathlib.Path(__file__).resolve().parent
JROBUST, UNROLLED, PLAIN, PEER = (
    "jrobust.run",
    "JAX, unrolled",
    "JAX, plain fori_loop",
    "PyTorch",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 20
    widths: tuple[int, int, int] = (16, 32, 64)
    side: int = 32
    batch: int = 128
    steps: int = 10
    eps: float = 8 / 255
    step_size: float = 2 / 255
    precision: str = "highest"
    rounds: int = 7


SMALL = Settings(depth=8, batch=32, rounds=5)


@dataclasses.dataclass
class Case(_case.Case):
    """The examples, the network with its variables, the attack."""

    settings: Settings

    def __post_init__(self) -> None:
        s = self.settings
        self.x, self.y = jnp.asarray(self.x), jnp.asarray(self.y)
        self.module = ResNet(s.depth, widths=s.widths)
        self.model = bind(self.module, self.variables)
        self.attack = attacks.PGD(Linf(s.eps), steps=s.steps, step_size=s.step_size, keep="last")
        self.key = jax.random.key(1)
        self.programs = {
            JROBUST: lambda: jrobust.run(self.attack, self.key, self.model, self.x, self.y),
            UNROLLED: lambda: _unrolled(self.attack, self.key, self.model, self.x, self.y),
            PLAIN: lambda: _plain_loop(self.attack, self.key, self.model, self.x, self.y),
        }

    def start(self) -> jax.Array:
        """The points at which the attack starts."""
        return _init(self.attack, self.key, self.x, self.y).x

    def work(self) -> list[_common.Operation]:
        """The operations of one attack on all examples; the gradient costs a forward pass."""
        forward = _common.operations(self.model, self.x)
        return forward * (2 * self.settings.steps + 1)

    def arrays(self) -> dict[str, Any]:
        """What the peer gets beside the network."""
        return {**super().arrays(), "start": self.start()}


def make_case(settings: Settings) -> Case:
    """Random images, and random weights with which part of the examples is robust.

    A network with random weights gives all images one class, or breaks at all of them; flags that
    are all equal would check nothing. So images differ in colour, the logits are centred, and each
    residual block adds little (scales of the second norms near 0.1). The true label is the
    network's own prediction.
    """
    rng = np.random.default_rng(0)
    s = settings
    colour = rng.uniform(size=(s.batch, 1, 1, 3))
    patches = rng.uniform(size=(s.batch, s.side // 4, s.side // 4, 3)).repeat(4, 1).repeat(4, 2)
    fine = rng.normal(scale=0.02, size=(s.batch, s.side, s.side, 3))
    x = jnp.asarray(np.clip(0.8 * colour + 0.2 * patches + fine, 0, 1), jnp.float32)
    module = ResNet(s.depth, widths=s.widths)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x[:1])

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        module_name, name = (part.key for part in path[-2:])
        if name == "kernel":
            value = rng.normal(scale=(2 / math.prod(leaf.shape[:-1])) ** 0.5, size=leaf.shape)
        elif name in ("scale", "var"):
            factor = 0.1 if (module_name, name) == ("norm2", "scale") else 1.0
            value = factor * rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(scale=0.1, size=leaf.shape)
        return jnp.asarray(value, jnp.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    logits = jax.jit(module.apply)(variables, x)
    variables["params"]["head"]["bias"] -= logits.mean(0)
    return Case(s, variables, x, jnp.argmax(logits - logits.mean(0, keepdims=True), -1))


@jax.jit
def _init(attack: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
    return attack.init(keys.examples(key, jnp.arange(x.shape[0])), x, y)


@jax.jit
def _unrolled(attack: Any, key: jax.Array, model: Any, x: jax.Array, y: jax.Array) -> Any:
    state = _init(attack, key, x, y)
    for _ in range(attack.steps):
        state = attack.step(model, state)
    return attack.result(attack.close(model, state))


@jax.jit
def _plain_loop(attack: Any, key: jax.Array, model: Any, x: jax.Array, y: jax.Array) -> Any:
    state = _init(attack, key, x, y)
    state = jax.lax.fori_loop(0, attack.steps, lambda _, s: attack.step(model, s), state)
    return attack.result(attack.close(model, state))


@jax.jit
def _evaluate(model: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        return -chosen.sum(), logits

    with jax.default_matmul_precision("highest"):
        gradient, logits = jax.grad(total, has_aux=True)(x)
    return logits, gradient


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def _apart(a: Any, b: Any, step_size: float) -> float:
    """The share of coordinates that differ by more than rounding, a tenth of a step."""
    return float((np.abs(np.asarray(a) - np.asarray(b)) > 0.1 * step_size).mean())


def same_programs(case: Case) -> list[dict[str, Any]]:
    """Checks that the JAX programs agree."""
    results = {name: program() for name, program in case.programs.items()}
    reference = results.pop(JROBUST)
    return [
        _common.check(
            f"points moved elsewhere, {name}",
            _apart(result.x, reference.x, case.settings.step_size),
            0.02,
        )
        for name, result in results.items()
    ]


def same_peer(
    case: Case, peer: _common.Peer, folder: pathlib.Path
) -> tuple[list[dict[str, Any]], float]:
    """Checks that the peer gives the same answer; and our robust accuracy.

    The sign of a gradient coordinate near zero is a tie that rounding breaks, and every step after
    it goes another way: ties are counted. What cannot hide behind them is held tightly: logits and
    gradients at the same points, start and end, and the verdict on jrobust's points.
    """
    s = case.settings
    ours = case.programs[JROBUST]()
    peer.ask("attack", out="theirs.npz")
    with np.load(folder / "theirs.npz") as arrays:
        theirs = dict(arrays)
    checks = []
    for name, points in (("start", case.start()), ("end", ours.x)):
        np.savez(folder / "points.npz", x=points)
        peer.ask("evaluate", points="points.npz", out="values.npz")
        logits, gradient = map(np.asarray, _evaluate(case.model, points, case.y))
        with np.load(folder / "values.npz") as values:
            other, slope = values["logits"], values["gradient"]
        apart = np.array([_relative(a, b) for a, b in zip(slope, gradient)])
        tie = np.abs(gradient) < 1e-3 * np.abs(gradient).max((1, 2, 3), keepdims=True)
        flipped = np.sign(gradient) != np.sign(slope)
        checks += [
            _common.check(f"logits at the {name}, relative", _relative(other, logits), 1e-4),
            # An activation within rounding of a ReLU's kink may fall on either side of it, which
            # changes that example's gradient and no other: so example by example.
            _common.check(f"gradient at the {name}, median", np.median(apart), 1e-4),
            _common.check(f"gradients at the {name} past a kink", (apart > 1e-3).mean(), 0.1),
            _common.check(f"signs flipped at the {name}, near-ties", (flipped & tie).mean(), 0.01),
            _common.check(f"signs flipped at the {name}, others", (flipped & ~tie).mean(), 1e-4),
        ]
        two = np.sort(logits, -1)[:, -2:]
        clear = two[:, 1] - two[:, 0] > 1e-4 * np.abs(logits).max()
    y = np.asarray(case.y)
    wrong = ((other.argmax(-1) != y) != np.asarray(ours.success)) & clear
    success = np.asarray(ours.success)
    low = np.maximum(np.asarray(case.x) - s.eps, 0) - 1e-6
    high = np.minimum(np.asarray(case.x) + s.eps, 1) + 1e-6
    outside = ((theirs["x"] < low) | (theirs["x"] > high)).any((1, 2, 3))
    checks = [
        *checks,
        _common.check("verdicts on our points that differ", wrong.sum(), 0),
        _common.check("their points outside of the ball", outside.sum(), 0),
        _common.check(
            "points moved elsewhere, PyTorch", _apart(theirs["x"], ours.x, s.step_size), 0.02
        ),
        _common.check("success flags that differ", (theirs["success"] != success).mean(), 0.02),
        _common.check(
            "robust accuracy, difference", abs(theirs["success"].mean() - success.mean()), 0.01
        ),
    ]
    return checks, float(1 - success.mean())


def peer_turn(peer: _common.Peer, settings: Settings) -> tuple[_common.Turn, int]:
    """The peer at the batch size at which it is fastest; (turn, that batch size)."""
    sizes = [settings.batch * 2**i // 4 for i in range(5)]
    trial = {}
    for batch in sizes:
        peer.ask("time", batch=batch, repeats=1)
        trial[batch] = min(peer.ask("time", batch=batch, repeats=1)["seconds"] for _ in range(2))
    best = min(sizes, key=trial.__getitem__)
    work = max(best, settings.batch)
    repeats = max(1, math.ceil(0.5 / (trial[best] * work)))
    return lambda: peer.ask("time", batch=best, repeats=repeats)["seconds"], best


def measure(case: Case, peer_python: pathlib.Path, *, force: bool = False) -> dict[str, Any]:
    """Check, compile and time everything; the report."""
    s = case.settings
    _common.check_python(peer_python)
    load = _common.check_quiet(force=force)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with _common.Peer(peer_python, HERE / "_peer_pgd.py") as peer:
            opened = case.open(peer, folder)
            checks, robust = same_peer(case, peer, folder)
            checks += same_programs(case)
            _common.require(checks)
            compiled = {
                program: _common.cold_and_warm(
                    HERE / "pgd.py", "--precision", s.precision, "--first-call", program, name
                )
                for program in case.programs
            }
            limits = _common.measure_limits(load, force=force)
            turns = {
                name: _common.turn(program, s.batch) for name, program in case.programs.items()
            }
            turns[PEER], best = peer_turn(peer, s)
            times = _common.take_turns(turns, s.rounds, load, force=force)
    work = case.work()
    flops = sum(operation.flops for operation in work) / s.batch
    seconds, memory = _common.roofline(work, limits)
    limit = _common.Roofline(seconds / s.batch, memory)
    rows = []
    for name, times_of_it in times.items():
        cold, warm = compiled.get(name, [{"compile_s": None}] * 2)
        rows.append(
            _common.row(
                name,
                best if name == PEER else s.batch,
                **_common.speed(times_of_it, flops, limit),
                compile_cold_s=cold["compile_s"],
                compile_warm_s=warm["compile_s"],
            )
        )
    ratios = [
        _common.ratio(f"speed, {JROBUST} to {other}", times[other], times[JROBUST])
        for other in (PEER, UNROLLED, PLAIN)
    ]
    colds = [[compiled[n][0]["compile_s"]] for n in (JROBUST, UNROLLED)]
    ratios.append(_common.ratio(f"compile time, {JROBUST} to {UNROLLED}", *colds))
    return _common.report(
        "pgd",
        load,
        limits,
        settings={**dataclasses.asdict(s), "widths": list(s.widths), "peer_batch": best}
        | {"mflop_per_example": flops / 1e6, "robust_accuracy": robust},
        machine=_common.machine(opened),
        checks=checks,
        rows=rows,
        ratios=ratios,
    )


def main() -> None:
    """Run from the command line."""
    parser = _command.parser(
        "pgd", __doc__, Settings, small="ResNet-8, batch 32: minutes", peer="torch and numpy"
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "tensorfloat32"),
        help="of products and convolutions on the way, on both sides; verdicts are in the highest",
    )
    parser.add_argument(
        "--first-call", nargs=3, metavar=("PROGRAM", "CASE", "CACHE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    settings = dataclasses.replace(
        SMALL if args.small else Settings(), **_command.chosen(args, Settings)
    )
    jax.config.update("jax_default_matmul_precision", settings.precision)
    if args.first_call:
        program, folder, cache = args.first_call
        case = Case.load(pathlib.Path(folder), Settings)
        print(json.dumps(_common.time_first_call(case.programs[program], cache)))
        return
    _command.finish(
        lambda: measure(make_case(settings), args.peer_python, force=args.force), args.out
    )


if __name__ == "__main__":
    main()
