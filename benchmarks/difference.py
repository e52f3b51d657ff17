"""What the exact difference of one changed weight costs, in forward passes of ResNet-20.

`zeroth_order.differencer` evaluates the loss once; then each turn computes its differences for a
tile of single weights under `vmap`. No peer: nothing else does this.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import _command
import _common
import jax
import jax.numpy as jnp
import numpy as np
import pgd

from jrobust import losses
from jrobust.zeroth_order import OneHot, differencer

HERE = pathlib.Path(__file__).resolve().parent
FORWARD = "forward pass"


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 20
    batch: int = 32
    tile: int = 4
    mu: float = 0.1  # large enough for float32 to tell by subtracting
    rounds: int = 5


SMALL = Settings(depth=8, batch=8, rounds=2)


@dataclasses.dataclass
class Case:
    """The loss of a network and what one weight of some of its kernels changes."""

    settings: Settings

    def __post_init__(self) -> None:
        s = self.settings
        case = pgd.make_case(pgd.Settings(depth=s.depth, batch=s.batch))
        self.params = case.variables["params"]
        self.x, y = case.x, case.y
        rest = {name: part for name, part in case.variables.items() if name != "params"}

        def loss(params: Any, x: jax.Array) -> jax.Array:
            """In training mode, as zeroth-order training wants it."""
            how = {"train": True, "mutable": ["batch_stats"]}
            logits, _ = case.module.apply({"params": params, **rest}, x, **how)
            return losses.cross_entropy(logits, y).mean()

        self.loss = jax.jit(loss)
        self.delta = jax.jit(lambda p, x: differencer(loss, p, x)[1])(self.params, self.x)
        last = (s.depth - 2) // 6
        self.kernels = [("stage1_block1", "conv1"), ("stage2_block1", "conv2")]
        self.kernels += [(f"stage3_block{last}", "conv1"), (f"stage3_block{last}", "conv2")]
        # An output channel that lives: where no unit fires, every difference is zero.
        slopes = jax.jit(jax.grad(loss))(self.params, self.x)
        self.channel = {
            (block, name): int(
                np.abs(slopes[block][name]["kernel"][1, 0, : s.tile]).min(axis=0).argmax()
            )
            for block, name in self.kernels
        }
        self.tiles = {" ".join(kernel): self.tile(kernel) for kernel in self.kernels}

    def tile(self, kernel: tuple[str, str]) -> Callable[[Any, jax.Array], jax.Array]:
        """(delta, input channels (T,)) -> differences (T,) of a kernel's weights."""
        block, name = kernel

        def one(delta: Any, i: jax.Array) -> jax.Array:
            change: dict[str, Any] = jax.tree.map(lambda _: None, self.params)
            change[block][name]["kernel"] = OneHot(
                (1, 0, i, self.channel[kernel]), self.settings.mu
            )
            return delta(change, None)

        return jax.jit(jax.vmap(one, (None, 0)))

    def subtracted(self, kernel: tuple[str, str], i: int) -> float:
        """The difference by two forward passes, in float32."""
        block, name = kernel
        changed = jax.tree.map(lambda leaf: leaf, self.params)
        weights = changed[block][name]["kernel"]
        changed[block][name]["kernel"] = weights.at[1, 0, i, self.channel[kernel]].add(
            self.settings.mu
        )
        return float(self.loss(changed, self.x) - self.loss(self.params, self.x))

    def checks(self) -> list[dict[str, Any]]:
        """That the differences are those of the loss, as far as float32 can tell by subtracting."""
        channels = np.arange(self.settings.tile)
        found = []
        for kernel, tile in zip(self.kernels, self.tiles.values()):
            ours = np.asarray(tile(self.delta, channels))
            theirs = np.array([self.subtracted(kernel, int(i)) for i in channels])
            apart = np.abs(ours - theirs).max() / np.abs(ours).max()
            found.append(_common.check(f"{' '.join(kernel)}: relative to subtracting", apart, 0.05))
        return found


def measure(case: Case, *, force: bool = False) -> dict[str, Any]:
    """Check and time everything; the report."""
    s = case.settings
    load = _common.check_quiet(force=force)
    checks = case.checks()
    _common.require(checks)
    limits = _common.measure_limits(load, force=force)
    channels = jnp.arange(s.tile)
    turns = {FORWARD: _common.turn(lambda: case.loss(case.params, case.x), 1)}
    for name, tile in case.tiles.items():
        turns[name] = _common.turn(lambda tile=tile: tile(case.delta, channels), s.tile)
    times = _common.take_turns(turns, s.rounds, load, force=force)
    rows = [
        _common.row(
            name,
            s.batch,
            seconds_per_example=seconds,
            examples_per_s=1 / float(np.median(seconds)),
        )
        for name, seconds in times.items()
    ]
    ratios = [
        _common.ratio(f"{name}: forward passes a difference costs", times[name], times[FORWARD])
        for name in case.tiles
    ]
    return _common.report(
        "difference",
        load,
        limits,
        settings=dataclasses.asdict(s) | {"example": "one forward pass, or one changed weight"},
        machine=_common.machine(),
        checks=checks,
        rows=rows,
        ratios=ratios,
    )


def main() -> None:
    """Run from the command line."""
    args = _command.parser("difference", __doc__, Settings, small="ResNet-8, batch 8").parse_args()
    settings = dataclasses.replace(
        SMALL if args.small else Settings(), **_command.chosen(args, Settings)
    )
    _command.finish(lambda: measure(Case(settings), force=args.force), args.out)


if __name__ == "__main__":
    main()
