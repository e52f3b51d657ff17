"""Seven objectives for randomized smoothing on handwritten digits: average certified radius.

    python examples/smoothing_objectives.py

Real data (scikit-learn's digits, the 400 test images), two noises, three seeds. Every objective
gets the same network, epochs, batches, optimiser and tuning: three values of one number of its own,
chosen by the average certified radius (ACR) of the validation images, mean over the seeds. The
table is of the test images. Intervals are of the difference to plain Gaussian noise, by a paired
bootstrap over images and seeds. Seven minutes of CPU time; needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jrobust import attacks, data, models, parallel, smoothing, training
from jrobust.threat import L2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import _common

Array = jax.Array
BATCH = 133  # nine of them are the 1,197 training images
ALPHA = 0.001
STEPS = 4  # of every attack in training


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done."""

    sigmas: tuple[float, ...] = (0.25, 0.5)
    seeds: int = 3
    epochs: int = 60
    width: int = 128
    rate: float = 6e-3
    validate_n: int = 1_000
    n: int = 5_000
    images: int = 400
    bootstrap: int = 10_000


SMALL = Settings(
    sigmas=(0.25, 0.5), seeds=2, epochs=2, width=16, validate_n=100, n=200, images=40, bootstrap=200
)


class Run(NamedTuple):
    """One training run, as arrays."""

    key: Array
    sigma: Array
    value: Array  # of the number that is tuned
    table: Array  # (1797, 10) votes of the Gaussian model, for CAT-RS


class Recipe(NamedTuple):
    """An objective with the values of its number; ``make(run, grown)``, grown in (0, 1]."""

    number: str
    values: tuple[float, ...]
    make: Callable[[Run, Array], Any]
    passes: str  # forward and backward passes of a step, over the batch


def gaussian(run: Run) -> smoothing.Gaussian:
    return smoothing.Gaussian(run.sigma)


def smooth_adv(run: Run, grown: Array) -> training.SmoothAdv:
    ball = L2(run.value * run.sigma * grown)
    attack = attacks.PGD(
        ball, steps=STEPS, rel_step_size=2 / STEPS, random_start=False, keep="last"
    )
    return training.SmoothAdv(gaussian(run), attack, samples=2)


def smooth_mix(run: Run, grown: Array) -> training.SmoothMix:
    return training.SmoothMix(gaussian(run), alpha=2 * run.sigma, eta=run.value * grown, samples=2)


def cat_rs(run: Run, grown: Array) -> training.CATRS:
    return training.CATRS(gaussian(run), run.table, eps=run.value * run.sigma, samples=4)


RECIPES = {
    "Gaussian": Recipe(
        "learning rate, times",
        (1.0, 2.0, 4.0),
        lambda run, _: training.NoiseAugmentation(gaussian(run)),
        "1",
    ),
    "Stability": Recipe(
        "lbd",
        (1.0, 2.0, 4.0),
        lambda run, _: training.Stability(gaussian(run), run.value),
        "2",
    ),
    "SmoothAdv": Recipe("eps / sigma", (1.0, 2.0, 4.0), smooth_adv, f"{2 * (STEPS + 1)}"),
    "MACER": Recipe(
        "lbd",
        (1.0, 4.0, 16.0),
        lambda run, _: training.MACER(gaussian(run), run.value, samples=16),
        "16",
    ),
    "Consistency": Recipe(
        "lbd",
        (1.0, 3.0, 9.0),
        lambda run, _: training.Consistency(gaussian(run), run.value),
        "2",
    ),
    "SmoothMix": Recipe("eta", (1.0, 5.0, 25.0), smooth_mix, f"{2 * (STEPS + 2)}"),
    "CAT-RS": Recipe("eps / sigma", (1.0, 2.0, 4.0), cat_rs, f"{4 * (STEPS + 2)}"),
}


def over_devices(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` of every run, one after the other on each device."""
    return jax.jit(
        jax.shard_map(
            lambda runs: jax.lax.map(fn, runs),
            mesh=parallel.mesh(),
            in_specs=P(parallel.AXIS),
            out_specs=P(parallel.AXIS),
            check_vma=False,
        )
    )


class Study:
    """The data, the network and the programs."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.splits = settings, data.digits()
        width = settings.width
        self.network = models.network(models.MLP((width, width)))
        self.keys = jax.random.split(jax.random.key(0), settings.seeds)

    def fit(self, name: str, run: Run) -> Any:
        """The parameters after one run: traced."""
        s, recipe, train = self.settings, RECIPES[name], self.splits.train
        steps = len(train) // BATCH
        total = s.epochs * steps
        rate = s.rate * (run.value if name == "Gaussian" else 1.0)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, total // 10, total)
        tx = optax.adamw(lambda step: rate * schedule(step), weight_decay=1e-3)

        def update(step: Array, carry: Any) -> Any:
            state, order = carry
            grown = jnp.minimum(1.0, (step + 1) / (total / 6))  # as 10 of 60 epochs
            rows = jax.lax.dynamic_slice_in_dim(order, step % steps * BATCH, BATCH)
            batch = training.batch(x[rows], y[rows], ids[rows])
            return training.step(recipe.make(run, grown), tx)[1](state, batch)[0], order

        def epoch(e: Array, state: Any) -> Any:
            order = jax.random.permutation(jax.random.fold_in(run.key, e), len(train))
            return jax.lax.fori_loop(e * steps, (e + 1) * steps, update, (state, order))[0]

        x, y, ids = map(jnp.asarray, (train.x, train.y, train.id))
        init = training.step(recipe.make(run, jnp.float32(1)), tx)[0]
        state = init(jax.random.fold_in(run.key, 1 << 20), self.network, x[:1])
        return jax.lax.fori_loop(0, s.epochs, epoch, state).params

    def count(self, examples: data.Dataset, n: int, params: Any, sigma: Array) -> Any:
        """Votes of one model, (2, N, C + 1): 100 to select, n to estimate."""
        model, noise = self.network.bind(params, {}), smoothing.Gaussian(sigma)
        return tuple(
            smoothing.count_votes(
                key, model, jnp.asarray(examples.x), noise, votes, ids=jnp.asarray(examples.id)
            )
            for key, votes in zip(smoothing.stages(jax.random.key(1)), (100, n))
        )

    def votes(self, examples: data.Dataset, n: int) -> Callable[[Any, Array], Any]:
        """The compiled votes of stacked models."""
        program = over_devices(lambda args: self.count(examples, n, *args))
        return lambda params, sigmas: program((params, sigmas))


def radii(examples: data.Dataset, counts: Any, sigmas: np.ndarray) -> np.ndarray:
    """(R, N) certified radii of right answers, zero elsewhere."""
    found = []
    for select, estimate, sigma in zip(*map(np.asarray, counts), sigmas):
        one = smoothing.certify(select, estimate, smoothing.Gaussian(sigma), ALPHA)
        found.append(np.where(one.prediction == examples.y, one.radius, 0.0))
    return np.array(found)


def interval(difference: np.ndarray, replicates: int) -> tuple[float, float]:
    """95% bootstrap interval of the mean of (seeds, images), both drawn anew."""
    rng = np.random.default_rng(0)
    seeds, images = difference.shape
    a = rng.multinomial(seeds, np.full(seeds, 1 / seeds), replicates)
    b = rng.multinomial(images, np.full(images, 1 / images), replicates)
    means = np.einsum("rs,sr->r", a, difference @ b.T) / difference.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def padded(runs: Any, total: int) -> Any:
    """As many runs as the devices share equally; the first repeated."""
    count = -(-total // jax.device_count()) * jax.device_count()
    index = np.arange(count) % total
    return jax.tree.map(lambda leaf: leaf[index], runs)


def measure(settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Train, choose, certify: a row of results for each objective and sigma, and the times."""
    s, study = settings, Study(settings)
    test = study.splits.test[: s.images]
    validation = study.splits.validation
    on_train = study.votes(study.splits.train, s.validate_n)
    on_validation = study.votes(validation, s.validate_n)
    on_test = study.votes(test, s.n)
    none = np.zeros((1797, 10), np.float32)
    tables = {(sigma, seed): none for sigma in s.sigmas for seed in range(s.seeds)}
    results: list[dict[str, Any]] = []
    baseline: dict[float, np.ndarray] = {}
    times = {}
    for name, recipe in RECIPES.items():
        plan = [
            (sigma, value, seed)
            for sigma in s.sigmas
            for value in recipe.values
            for seed in range(s.seeds)
        ]
        sigmas, values, seeds = map(np.array, zip(*plan))
        runs = Run(
            study.keys[seeds],
            jnp.float32(sigmas),
            jnp.float32(values),
            jnp.asarray(np.stack([tables[sigma, seed] for sigma, _, seed in plan])),
        )
        runs = padded(runs, len(plan))
        program = over_devices(functools.partial(study.fit, name))
        begin = time.perf_counter()
        compiled = program.lower(runs).compile()
        middle = time.perf_counter()
        params = jax.block_until_ready(compiled(runs))
        end = time.perf_counter()
        times[name] = (middle - begin, (end - middle) / (len(runs.sigma) * s.epochs))
        log(f"{name}: compiled in {middle - begin:.0f} s, {len(plan)} runs in {end - middle:.0f} s")

        held = radii(validation, on_validation(params, runs.sigma), runs.sigma)[: len(plan)]
        scores = {
            sigma: [held[(sigmas == sigma) & (values == v)].mean() for v in recipe.values]
            for sigma in s.sigmas
        }
        best = {sigma: recipe.values[int(np.argmax(scores[sigma]))] for sigma in s.sigmas}
        rows = np.flatnonzero([value == best[sigma] for sigma, value, _ in plan])
        chosen = padded(jax.tree.map(lambda leaf, r=rows: leaf[r], (params, runs.sigma)), len(rows))
        found = radii(test, on_test(*chosen), chosen[1])[: len(rows)]
        if name == "Gaussian":
            baseline = {sigma: found[sigmas[rows] == sigma] for sigma in s.sigmas}
            votes = on_train(*chosen)[1]
            for row, at in enumerate(rows):
                share = np.full((1797, 10), 0.1, np.float32)
                share[study.splits.train.id] = np.float32(votes[row][:, :-1]) / s.validate_n
                tables[float(sigmas[at]), int(seeds[at])] = share
        for sigma in s.sigmas:
            mine = found[sigmas[rows] == sigma]
            results.append(
                {
                    "sigma": sigma,
                    "objective": name,
                    "number": recipe.number,
                    "value": best[sigma],
                    "validation": dict(zip(map(str, recipe.values), map(float, scores[sigma]))),
                    "passes": recipe.passes,
                    "acr": float(mine.mean()),
                    "acr_of_seeds": mine.mean(1).tolist(),
                    "accuracy": float(np.mean(mine > 0)),
                    "certified": {
                        f"{multiple:g} sigma": float(np.mean(mine >= multiple * sigma))
                        for multiple in (1, 2)
                    },
                    "difference": float((mine - baseline[sigma]).mean()),
                    "interval": interval(mine - baseline[sigma], s.bootstrap),
                }
            )
    results.sort(key=lambda row: row["sigma"])
    ceilings = {
        sigma: smoothing.ceiling(smoothing.Gaussian(sigma), s.n, ALPHA) for sigma in s.sigmas
    }
    return {"results": results, "ceilings": ceilings, "times": times}


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| sigma | objective | chosen of three | passes | ACR | minus Gaussian, 95% interval "
        "| correct | at 1 sigma | at 2 sigma |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        low, high = r["interval"]
        difference = (
            ""
            if r["objective"] == "Gaussian"
            else f"{r['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )
        cells = [
            f"{r['sigma']:g}",
            r["objective"],
            f"{r['number']} {r['value']:g}",
            r["passes"],
            f"{r['acr']:.4f}",
            difference,
            *(f"{share:.1%}" for share in (r["accuracy"], *r["certified"].values())),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(settings: Settings, found: dict[str, Any], load: _common.Load, seconds: float) -> Any:
    """The JSON of a benchmark: results among the settings, rows with the times of training."""
    limits = _common.measure_limits(load, force=True, rounds=1)
    highest = {
        sigma: max(max(r["acr_of_seeds"]) for r in found["results"] if r["sigma"] == sigma)
        for sigma in settings.sigmas
    }
    return _common.report(
        "smoothing-objectives",
        load,
        limits,
        settings=dataclasses.asdict(settings)
        | {
            "example": "one training image in one update",
            "test_images": f"digits().test[:{settings.images}]",
            "alpha": ALPHA,
            "batch": BATCH,
            "seconds": seconds,
            "results": found["results"],
        },
        machine=_common.machine(),
        checks=[
            _common.check(
                f"sigma {sigma:g}: highest ACR, below the ceiling", highest[sigma], ceiling
            )
            for sigma, ceiling in found["ceilings"].items()
        ],
        rows=[
            _common.row(
                name,
                BATCH,
                seconds_per_example=[epoch / 1197],
                examples_per_s=1197 / epoch,
                compile_cold_s=compile_s,
            )
            for name, (compile_s, epoch) in found["times"].items()
        ],
        ratios=[],
    )


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds, for a test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/objectives.json"))
    args = parser.parse_args(arguments)
    settings = SMALL if args.small else Settings()
    # Runs are spread over devices of one thread each.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    begin, watch = time.perf_counter(), _common.Watch()
    found = measure(settings, lambda line: print(line, flush=True))
    load = _common.Load(rounds=[watch.others()], load_average=list(os.getloadavg()))
    seconds = time.perf_counter() - begin
    made = report(settings, found, load, seconds)
    _common.write(made, args.out)
    print(f"\n{table(found['results'])}\n\n{seconds:.0f} seconds; written to {args.out}")
    return found["results"]


if __name__ == "__main__":
    main()
