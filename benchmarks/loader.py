"""Images a second into batches: `jrobust.data.batches` against a PyTorch DataLoader, same files.

Two kinds of storage: a folder of PNG images, decoded as they are needed, and an array of bytes in
memory. Both sides give shuffled batches of float32 images in [0, 1]. And what matters in the end:
the time of a ResNet-18 training step that is fed from the folder, against one that is given the
same batch again and again. See the README beside this.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
import time
from typing import Any

import _command
import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from jrobust import data, models, training

HERE = pathlib.Path(__file__).resolve().parent
KINDS = {"folder": "PNG folder", "memory": "memory"}
AGAIN, FED = "ResNet-18 step, one batch again", "ResNet-18 step, fed from the folder"


@dataclasses.dataclass(frozen=True)
class Settings:
    examples: int = 20_000
    side: int = 32
    batch: int = 128
    steps: int = 20  # training steps in a turn
    width: int = 64  # channels of the network's first stage
    rounds: int = 7


SMALL = Settings(examples=2_000, batch=32, steps=2, rounds=3)


def make_files(settings: Settings, folder: pathlib.Path) -> None:
    """Images that compress like photographs of their size: smooth, with a little noise."""
    rng = np.random.default_rng(0)
    s, coarse = settings, max(1, settings.side // 8)
    low = rng.integers(0, 256, (s.examples, coarse, coarse, 3))
    repeat = -(-s.side // coarse)
    smooth = low.repeat(repeat, 1).repeat(repeat, 2)[:, : s.side, : s.side]
    noise = rng.integers(-6, 7, (s.examples, s.side, s.side, 3))
    x = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    # Sorted as the files are: by class, then by number.
    y = np.sort(np.arange(s.examples) % 10)
    for i, (image, label) in enumerate(zip(x, y)):
        path = folder / "images" / str(label) / f"{i:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(folder / "images.npz", x=x, y=y)


def sources(folder: pathlib.Path) -> dict[str, data.Source]:
    """What is read, by kind of storage."""
    stored = data.image_folder(folder / "images")
    return {"folder": stored, "memory": stored.cache()}


def turn(source: data.Source, settings: Settings, seconds: float = 0.5) -> _common.Turn:
    """A turn of whole epochs; the first batch of each is waited for, as in training."""

    def epochs(count: int) -> float:
        begin = time.perf_counter()
        stream = data.batches(source, jax.random.key(0), settings.batch, epochs=count)
        examples = sum(int(batch.mask.sum()) for batch in stream)
        return (time.perf_counter() - begin) / examples

    repeats = max(1, math.ceil(seconds / (epochs(1) * settings.examples)))
    return lambda: epochs(repeats)


def same_answer(
    source: data.Source, peer: _common.Peer, kind: str, settings: Settings, folder: pathlib.Path
) -> list[dict[str, Any]]:
    """Checks that an epoch of both sides has each example once, with the same pixels."""
    found = list(data.batches(source, jax.random.key(0), settings.batch, epochs=1))
    ids, sums, labels = (
        np.concatenate([part(b)[b.mask] for b in found])
        for part in (lambda b: b.id, lambda b: b.x.sum((1, 2, 3)), lambda b: b.y)
    )
    peer.ask("epoch", kind=kind, workers=0, out="theirs.npz")
    with np.load(folder / "theirs.npz") as arrays:
        theirs = dict(arrays)
    every = np.arange(settings.examples)
    order, other = np.argsort(ids), np.argsort(theirs["index"])
    missing = (ids[order] != every).sum() + (theirs["index"][other] != every).sum()
    apart = np.abs(sums[order] - theirs["sums"][other]) / np.abs(sums[order]).max()
    wrong = (labels[order] != theirs["labels"][other]).sum()
    name = KINDS[kind]
    return [
        _common.check(f"{name}: examples lost or doubled", missing, 0),
        _common.check(f"{name}: labels that differ", wrong, 0),
        _common.check(f"{name}: sums of pixels, relative", apart.max(), 1e-5),
    ]


def peer_turn(peer: _common.Peer, kind: str, settings: Settings) -> tuple[_common.Turn, int]:
    """The peer with as many worker processes as make it fastest; (turn, that number)."""
    trial = {}
    for workers in range((os.cpu_count() or 1) + 1):
        asked = {"kind": kind, "workers": workers, "repeats": 1}
        peer.ask("time", **asked)  # workers start once
        trial[workers] = min(peer.ask("time", **asked)["seconds"] for _ in range(2))
    best = min(trial, key=trial.__getitem__)
    for workers in trial.keys() - {best}:
        peer.ask("close", kind=kind, workers=workers)
    repeats = max(1, math.ceil(0.5 / (trial[best] * settings.examples)))
    return lambda: peer.ask("time", kind=kind, workers=best, repeats=repeats)["seconds"], best


def step_turns(source: data.Source, settings: Settings) -> dict[str, _common.Turn]:
    """Turns of training steps that are fed, and of ones that are not."""
    network = models.network(models.ResNet18(width=settings.width))
    init, update = training.step(training.Standard(), optax.sgd(0.01))
    update = jax.jit(update, donate_argnums=0)
    stream = data.batches(source, jax.random.key(1), settings.batch)
    first = jax.tree.map(jnp.asarray, next(stream))
    state = [init(jax.random.key(0), network, first.x)]

    def steps(batches: Any) -> float:
        begin = time.perf_counter()
        for _ in range(settings.steps):
            state[0], metrics = update(state[0], jax.tree.map(jnp.asarray, next(batches)))
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / (settings.steps * settings.batch)

    def again() -> Any:
        while True:
            yield first

    made = {AGAIN: lambda: steps(again()), FED: lambda: steps(stream)}
    for warm in made.values():
        warm()
    return made


def measure(
    settings: Settings, peer_python: pathlib.Path, *, force: bool = False
) -> dict[str, Any]:
    """Check and time everything; the report."""
    s = settings
    _common.check_python(peer_python)
    load = _common.check_quiet(force=force)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_files(s, folder)
        held = sources(folder)
        with _common.Peer(peer_python, HERE / "_peer_loader.py") as peer:
            opened = peer.ask("open", folder=name, batch=s.batch, threads=os.cpu_count())
            checks = [c for k in KINDS for c in same_answer(held[k], peer, k, s, folder)]
            _common.require(checks)
            limits = _common.measure_limits(load, force=force)
            turns: dict[str, _common.Turn] = {}
            workers = {}
            for kind, title in KINDS.items():
                turns[f"{title}, jrobust"] = turn(held[kind], s)
                turns[f"{title}, PyTorch"], workers[kind] = peer_turn(peer, kind, s)
            turns |= step_turns(held["folder"], s)
            times = _common.take_turns(turns, s.rounds, load, force=force)
    rows = [
        _common.row(
            title,
            s.batch,
            seconds_per_example=spent,
            examples_per_s=1 / float(np.median(spent)),
        )
        for title, spent in times.items()
    ]
    ratios = [
        _common.ratio(
            f"speed, {title}: jrobust to PyTorch",
            times[f"{title}, PyTorch"],
            times[f"{title}, jrobust"],
        )
        for title in KINDS.values()
    ]
    ratios.append(_common.ratio("speed, ResNet-18 step: fed to not", times[AGAIN], times[FED]))
    return _common.report(
        "loader",
        load,
        limits,
        settings={**dataclasses.asdict(s), "peer_workers": workers},
        machine=_common.machine(opened),
        checks=checks,
        rows=rows,
        ratios=ratios,
    )


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = [_common.headline(report)]
    lines += [
        f"  {c['name']}: {c['value']:.3g} (at most {c['tolerance']:g})" for c in report["checks"]
    ]
    lines += ["", f"{'':40}{'batch':>6}{'images/s':>12}"]
    lines += [f"{r['name']:40}{r['batch']:6}{r['examples_per_s']:12.4g}" for r in report["rows"]]
    lines += ["", f"{'':50}{'median':>8}{'low':>8}{'high':>8}"]
    lines += [
        f"{r['name']:50}{r['median']:8.3f}{r['low']:8.3f}{r['high']:8.3f}" for r in report["ratios"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    args = _command.parser(
        "loader",
        __doc__,
        Settings,
        small="2,000 images, batch 32: minutes",
        peer="torch, numpy and Pillow",
    ).parse_args()
    settings = dataclasses.replace(
        SMALL if args.small else Settings(), **_command.chosen(args, Settings)
    )
    _command.finish(lambda: measure(settings, args.peer_python, force=args.force), args.out, table)


if __name__ == "__main__":
    main()
