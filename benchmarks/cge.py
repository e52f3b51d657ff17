"""Coordinatewise gradient estimation of ResNet-20: coordinates per second.

The programs estimate the same coordinates of the training loss (batch statistics of the batch) at
the same weights on the same images, by forward differences:

* ``CGE``: `jrobust.zeroth_order.CGE`, one compiled program for all layers;
* ``PyTorch, full passes``: each changed weight followed by a forward pass, channels last;
* ``PyTorch, from the block on``: passes from the input of the weight's residual block on, as
  DeepZero reuses features;
* ``JAX, vmap over weights``: tiles of changed kernels under `vmap` of the loss.

Coordinates are drawn at random, of each layer in proportion to its weights. CGE computes them all;
the others are timed on some of each layer, and the layers weighted. See the README beside this.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import tempfile
import time
from typing import Any

import _case
import _command
import _common
import jax
import jax.numpy as jnp
import numpy as np
import pgd

from jrobust import losses
from jrobust.zeroth_order import CGE

HERE = pathlib.Path(__file__).resolve().parent
OURS, FULL, REUSE, VMAPPED = (
    "CGE",
    "PyTorch, full passes",
    "PyTorch, from the block on",
    "JAX, vmap over weights",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 20
    batch: int = 32
    coordinates: int = 1024  # of the whole network
    layer: int = 4  # of each layer, for the programs that are timed layer by layer
    chunk: int | None = None  # points side by side in CGE; None: its own choice
    lanes: int = 4  # and in vmap over weights; 0: leave it out
    mu: float = 5e-3
    precision: str = "highest"
    rounds: int = 5


SMALL = Settings(depth=8, batch=16, coordinates=256, layer=2, rounds=2)


class Case(_case.Case):
    """The loss of a network, and coordinates of its kernels."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        case = pgd.make_case(pgd.Settings(depth=s.depth, batch=s.batch))
        super().__init__(settings, case.variables, case.x, case.y)
        self.module, self.params = case.module, case.variables["params"]
        rest = {name: part for name, part in self.variables.items() if name != "params"}

        def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            """In training mode, as zeroth-order training wants it."""
            how = {"train": True, "mutable": ["batch_stats"]}
            logits, _ = self.module.apply({"params": params, **rest}, x, **how)
            return losses.cross_entropy(logits, y).mean()

        self.loss = loss
        rng = np.random.default_rng(1)
        kernels = {name: v for name, v in _common.flatten(self.params).items() if v.ndim > 1}
        self.sizes = {name: v.size for name, v in kernels.items()}
        total = sum(self.sizes.values())
        self.chosen = {
            name: np.sort(rng.choice(n, max(1, round(s.coordinates * n / total)), replace=False))
            for name, n in self.sizes.items()
        }
        self.count = sum(map(len, self.chosen.values()))
        self.weights = {name: n / total for name, n in self.sizes.items()}
        self.mask = jax.tree_util.tree_map_with_path(
            lambda path, _: jnp.asarray(
                self.chosen.get("/".join(part.key for part in path), []), jnp.int32
            ),
            self.params,
        )
        estimator = CGE(s.mu, central=False, chunk=s.chunk, strict=True)

        @jax.jit
        def estimate(params: Any, x: jax.Array, y: jax.Array, mask: Any) -> tuple[jax.Array, Any]:
            return estimator(None, lambda p: loss(p, x, y), params, mask=mask)

        self.program = estimate

    def estimate(self) -> tuple[jax.Array, Any]:
        """The loss and the gradient, by CGE."""
        return self.program(self.params, self.x, self.y, self.mask)

    def quotients(self) -> np.ndarray:
        """The estimates of the chosen coordinates, kernel after kernel."""
        grads = _common.flatten(self.estimate()[1])
        return np.concatenate([grads[name].ravel()[i] for name, i in self.chosen.items()])

    def vmapped(self, name: str) -> Any:
        """(flat indices) -> losses with each of these weights of one kernel changed."""
        *path, last = name.split("/")

        @jax.jit
        def run(params: Any, x: jax.Array, y: jax.Array, i: jax.Array) -> jax.Array:
            def one(i: jax.Array) -> jax.Array:
                changed = jax.tree.map(lambda leaf: leaf, params)
                node = changed
                for part in path:
                    node = node[part]
                kernel = node[last]
                node[last] = kernel.ravel().at[i].add(self.settings.mu).reshape(kernel.shape)
                return self.loss(changed, x, y)

            return jax.vmap(one)(i)

        return lambda i: run(self.params, self.x, self.y, jnp.asarray(i))

    def arrays(self) -> dict[str, Any]:
        """What the peer gets beside the network: its kernels' coordinates too."""
        kernels, places = _common.flatten(self.params), {}
        for name, i in self.chosen.items():
            place = np.stack(np.unravel_index(i, kernels[name].shape), -1)
            order = [3, 2, 0, 1] if place.shape[1] == 4 else [1, 0]
            kernel = name.rsplit("/", 1)[0].replace("/", ".")
            places[f"at/{kernel}"] = place[:, order]
        return {**super().arrays(), **places}


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def vmap_turn(case: Case, base: jax.Array, ours: np.ndarray) -> tuple[Any, float]:
    """A turn of ``vmap`` over weights: seconds per coordinate; and its distance from ``ours``."""
    s = case.settings
    programs, found, wanted, first = {}, [], [], 0
    for name, i in case.chosen.items():
        tile = np.resize(i, s.lanes)
        programs[name] = (case.vmapped(name), tile)
        values = programs[name][0](tile)[: len(i)]
        found.append((values - base) / s.mu)
        wanted.append(ours[first : first + len(found[-1])])
        first += len(i)

    def turn() -> float:
        seconds = 0.0
        for name, (run, tile) in programs.items():
            begin = time.perf_counter()
            run(tile).block_until_ready()
            seconds += case.weights[name] * (time.perf_counter() - begin) / s.lanes
        return seconds

    return turn, _relative(np.concatenate(found), np.concatenate(wanted))


def peer_turn(case: Case, peer: _common.Peer, reuse: bool) -> Any:
    """A turn of the peer: seconds per coordinate, its layers weighted by their sizes."""

    def turn() -> float:
        answer = peer.ask("time", reuse=reuse, coordinates=case.settings.layer)
        seconds = answer["seconds"]
        return sum(
            share * seconds[name.rsplit("/", 1)[0].replace("/", ".")]
            for name, share in case.weights.items()
        )

    turn()
    return turn


def measure(case: Case, peer_python: pathlib.Path, *, force: bool = False) -> dict[str, Any]:
    """Check and time everything; the report."""
    s = case.settings
    _common.check_python(peer_python)
    load = _common.check_quiet(force=force)
    calls = []
    for _ in range(2):
        begin = time.perf_counter()
        base = jax.block_until_ready(case.estimate())[0]
        calls.append(time.perf_counter() - begin)
    ours = case.quotients()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with _common.Peer(peer_python, HERE / "_peer_cge.py") as peer:
            opened = case.open(peer, folder)
            theirs = {}
            for reuse in (False, True):
                peer.ask("estimate", reuse=reuse, out="theirs.npz")
                with np.load(folder / "theirs.npz") as arrays:
                    theirs[reuse] = np.concatenate(
                        [arrays[n.rsplit("/", 1)[0].replace("/", ".")] for n in case.chosen]
                    )
            near = 1e-3 if s.precision == "highest" else 2e-2
            checks = [
                _common.check(
                    f"{OURS}, from float64 PyTorch", _relative(ours, theirs[False]), near
                ),
                _common.check(
                    f"{REUSE}, same in float64", _relative(theirs[True], theirs[False]), 1e-6
                ),
            ]
            turns = {
                OURS: _common.turn(case.estimate, case.count),
                FULL: peer_turn(case, peer, False),
                REUSE: peer_turn(case, peer, True),
            }
            if s.lanes:
                turns[VMAPPED], apart = vmap_turn(case, base, ours)
                # In float32, subtracting leaves two digits.
                checks.append(_common.check(f"{VMAPPED}, by subtracting", apart, 0.1))
            _common.require(checks)
            limits = _common.measure_limits(load, force=force)
            times = _common.take_turns(turns, s.rounds, load, force=force)
    work = _common.operations(lambda p: case.loss(p, case.x, case.y), case.params)
    rows = []
    for name, seconds in times.items():
        median = float(np.median(seconds))
        row = _common.row(name, s.batch, seconds_per_example=seconds, examples_per_s=1 / median)
        rows.append(row | ({"compile_cold_s": calls[0] - calls[1]} if name == OURS else {}))
    flops = sum(operation.flops for operation in work)
    # A tenth of the kernels' weights and all others, at each of the steps of 50,000 examples.
    others = sum(v.size for v in jax.tree.leaves(case.params)) - sum(case.sizes.values())
    step = round(0.1 * sum(case.sizes.values())) + others
    epoch = math.ceil(50_000 / s.batch) * step * float(np.median(times[OURS]))
    return _common.report(
        "cge",
        load,
        limits,
        settings=dataclasses.asdict(s)
        | {
            "example": "one coordinate",
            "coordinates": case.count,
            "mflop_per_full_pass": flops / 1e6,
            "seconds_per_epoch_of_50000_at_90_percent": epoch,
        },
        machine=_common.machine(opened),
        checks=checks,
        rows=rows,
        ratios=[
            _common.ratio(f"speed, {OURS} to {other}", times[other], times[OURS])
            for other in times
            if other != OURS
        ],
    )


def main() -> None:
    """Run from the command line."""
    parser = _command.parser(
        "cge", __doc__, Settings, small="ResNet-8, batch 16", peer="torch and numpy"
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "tensorfloat32"),
        help="of products and convolutions, on both sides",
    )
    args = parser.parse_args()
    settings = dataclasses.replace(
        SMALL if args.small else Settings(), **_command.chosen(args, Settings)
    )
    jax.config.update("jax_default_matmul_precision", settings.precision)
    report = _command.finish(
        lambda: measure(Case(settings), args.peer_python, force=args.force), args.out
    )
    epoch = report["settings"]["seconds_per_epoch_of_50000_at_90_percent"]
    print(f"an epoch of 50,000 examples at 90% sparsity, at this batch: {epoch:.0f} s")


if __name__ == "__main__":
    main()
