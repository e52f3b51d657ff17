"""Smoothed unrolling (SMUG) against MoDL on a small synthetic magnetic-resonance problem.

    python examples/smug.py

Random ellipses of 32x32 complex pixels, four receivers, a third of the frequencies. Three networks
of one size, from the same start, on the same batches: MoDL, trained on its result; the same with
what SMUG asks of every block, but no noise; SMUG. PGD moves the aliased image (Linf) or the
measurements (L2) to raise the error of the reconstruction, and knows the noise. Printed for each
seed, and as the mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jrobust import drive, keys, models, report
from jrobust.threat import L2, Linf

SIZE, RECEIVERS = 32, 4
FAR = 100.0  # no box: reconstruction inputs have no bounds


class Denoiser(nn.Module):
    """What is left of an image less what 3x3 convolutions take for artefacts."""

    width: int = 8
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        h = x
        for _ in range(self.depth - 1):
            h = nn.relu(nn.Conv(self.width, (3, 3))(h))
        return x - nn.Conv(2, (3, 3), kernel_init=nn.initializers.normal(0.01))(h)


def phantoms(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, SIZE, SIZE, 2): ellipses of random brightness in one ellipse, under smooth phase."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, SIZE),) * 2, indexing="ij"), -1)

    def ellipse(centre, radii, angle):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return (((grid - centre) @ turn / radii) ** 2).sum(-1) < 1

    images = []
    for _ in range(count):
        body = ellipse(rng.uniform(-0.1, 0.1, 2), rng.uniform(0.65, 0.9, 2), rng.uniform(0, np.pi))
        image = 0.5 * body
        for _ in range(rng.integers(4, 9)):
            inside = ellipse(
                rng.uniform(-0.5, 0.5, 2), rng.uniform(0.05, 0.35, 2), rng.uniform(0, np.pi)
            )
            image = np.where(inside & body, rng.uniform(0.1, 0.95), image)
        phase = (grid @ rng.normal(0, 0.5, 2)) + rng.normal(0, 0.5)
        images.append(image * np.exp(1j * phase))
    z = np.stack(images)
    return np.stack([z.real, z.imag], -1).astype(np.float32)


def scanner(rng: np.random.Generator, fraction: float) -> models.Fourier:
    """Receivers around the image; rows of frequencies, the lowest always, the rest at random."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, SIZE),) * 2, indexing="ij"), -1)
    maps = []
    for turn in 2 * np.pi * np.arange(RECEIVERS) / RECEIVERS:
        place = 1.2 * np.array([np.cos(turn), np.sin(turn)])
        maps.append(np.exp(-((grid - place) ** 2).sum(-1) / 2 + 1j * (turn + grid @ place)))
    maps = np.stack(maps)
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    frequency = np.abs(np.fft.fftfreq(SIZE))
    low = frequency < 3 / SIZE
    chance = np.where(low, 0, np.exp(-frequency / 0.2))
    rows = rng.choice(
        SIZE, round(fraction * SIZE) - low.sum(), replace=False, p=chance / chance.sum()
    )
    mask = low.astype(np.float32)
    mask[rows] = 1
    mask = np.tile(mask[:, None], (1, SIZE))
    return models.Fourier(
        jnp.asarray(mask), jnp.asarray(np.stack([maps.real, maps.imag], -1), jnp.float32)
    )


def error(x: jax.Array, truth: jax.Array) -> jax.Array:
    """(B,): the relative error in L2."""
    axes = (1, 2, 3)
    return jnp.sqrt(((x - truth) ** 2).sum(axes) / (truth**2).sum(axes))


def pgd(threat, steps: int, key: jax.Array, harm, x0: jax.Array) -> jax.Array:
    """The largest ``harm`` (B,) that projected gradient ascent met, from a random start."""
    row_keys = keys.examples(key, jnp.arange(len(x0)))

    def step(i, state):
        x, worst = state

        def total(x):
            each = harm(x)
            return each.sum(), each

        gradient, each = jax.grad(total, has_aux=True)(x)
        x = threat.ascend(x, x0, gradient, threat.step_size(x0, steps))
        return x, jnp.maximum(worst, each)

    start = threat.sample(row_keys, x0)
    x, worst = drive.loop(steps, step, (start, jnp.zeros_like(x0, shape=len(x0))))
    return jnp.maximum(worst, harm(x))


class Programs:
    """Training step and evaluation of one network, compiled once for all seeds."""

    def __init__(self, args: argparse.Namespace, samples: int, every_block: bool):
        module = Denoiser(args.width)
        schedule = optax.cosine_decay_schedule(args.rate, args.steps)
        tx = optax.adam(schedule)

        def reconstruct(params, operator, aliased, noise):
            def denoise(x):
                return module.apply(params, x)

            return models.unroll(denoise, operator, aliased, noise, blocks=args.blocks)

        def copies(key, x, count):
            if not samples:
                return None
            row_keys = keys.examples(key, jnp.arange(len(x)))
            return models.smoothing_noise(row_keys, x.shape[1:], count, args.sigma)

        def objective(params, operator, truth, noise):
            aliased = operator.adjoint(operator.forward(truth))
            x, denoised = reconstruct(params, operator, aliased, noise)
            loss = ((x - truth) ** 2).mean()
            return loss + every_block * ((denoised - truth[None, None]) ** 2).mean()

        def update(carry, operator, truth, key):
            params, state = carry
            noise = copies(key, truth, args.samples)
            gradient = jax.grad(objective)(params, operator, truth, noise)
            move, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, move), state

        def evaluate(params, operator, truth, key):
            """(clean error, its rise under both attacks), each (B,)."""
            noise_key, attack_key = jax.random.split(key)
            noise = copies(noise_key, truth, args.votes)

            def harm(aliased):
                return error(reconstruct(params, operator, aliased, noise)[0], truth)

            measured = operator.forward(truth)
            aliased = operator.adjoint(measured)
            length = jnp.sqrt((measured**2).sum((1, 2, 3, 4)))
            image, data = Linf(args.linf, -FAR, FAR), L2(args.l2 * length, -FAR, FAR)
            moved = pgd(image, args.attack_steps, attack_key, harm, aliased)
            remeasured = pgd(
                data, args.attack_steps, attack_key, lambda y: harm(operator.adjoint(y)), measured
            )
            clean = harm(aliased)
            return clean, moved - clean, remeasured - clean

        def start(key):
            params = module.init(key, jnp.zeros((1, SIZE, SIZE, 2)))
            return params, tx.init(params)

        self.start = start
        self.update = jax.jit(drive.rewrite(update))
        self.evaluate = jax.jit(drive.rewrite(evaluate))


def run(seed: int, networks: dict[str, Programs], args: argparse.Namespace):
    """For each network: its clean error, and the rise of the error under each attack."""
    rng = np.random.default_rng(seed)
    operator = scanner(rng, args.fraction)
    train, test = (phantoms(rng, n) for n in (args.train, args.test))
    batches = rng.integers(0, args.train, (args.steps, args.batch))
    results = {}
    for name, programs in networks.items():
        begin = time.perf_counter()
        carry = programs.start(jax.random.key(seed))
        for i, rows in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed + 1000), i)
            carry = programs.update(carry, operator, train[rows], key)
        found = programs.evaluate(carry[0], operator, test, jax.random.key(seed + 2000))
        results[name] = [float(v.mean()) for v in found]
        print(
            f"seed {seed}  {name:18s} clean {results[name][0]:.4f}  rise "
            + "  ".join(f"{rise:.4f}" for rise in results[name][1:])
            + f"  ({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="of training, for each network")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--test", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--sigma", type=float, default=0.01, help="of the noise")
    parser.add_argument("--samples", type=int, default=4, help="noisy copies in training")
    parser.add_argument("--votes", type=int, default=10, help="noisy copies in the test")
    parser.add_argument("--fraction", type=float, default=1 / 3, help="of frequencies measured")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--linf", type=float, default=1 / 255)
    parser.add_argument("--l2", type=float, default=0.02, help="of the measurements' length")
    args = parser.parse_args()

    networks = {
        "MoDL": Programs(args, 0, False),
        "MoDL, every block": Programs(args, 0, True),
        "SMUG": Programs(args, args.samples, True),
    }
    runs = [run(seed, networks, args) for seed in range(args.seeds)]
    rows = []
    for name in runs[0]:
        values = np.array([r[name] for r in runs])
        rows.append(
            [name]
            + [
                f"{m:.4f} ± {s:.4f}"
                for m, s in zip(values.mean(0), values.std(0, ddof=args.seeds > 1))
            ]
        )
    print()
    print(
        report.table_text(
            ["network", "clean error", f"rise, Linf {args.linf:.4f}", f"rise, L2 {args.l2:g}"], rows
        )
    )
    for i, what in ((1, "Linf on the aliased image"), (2, "L2 on the measurements")):
        for other in ("MoDL", "MoDL, every block"):
            ratio = [r["SMUG"][i] / r[other][i] for r in runs]
            print(f"{what}: SMUG's rise over that of {other}: {np.round(ratio, 3)} by seed")


if __name__ == "__main__":
    main()
