"""Train, attack and certify a classifier of handwritten digits; write one report.

    python examples/quickstart.py --out runs/quickstart

Real data (scikit-learn's 1,797 digits), three ways of training, PGD-50 with restarts, a robust
accuracy curve from one vmapped program, randomized smoothing, and a gradient without
backpropagation. About two minutes on two CPU cores. Kill it and run it again: it goes on where it
was; with --fresh it starts over.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jrobust
from jrobust import (
    attacks,
    data,
    loops,
    models,
    parallel,
    report,
    smoothing,
    training,
    zeroth_order,
)
from jrobust.threat import Linf

EPS, SIGMA = 0.2, 0.25
RADII = np.linspace(0.0, 1.0, 201)


def optimiser(examples: int, epochs: int, batch_size: int, decay: float):
    steps = epochs * -(-examples // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    return optax.adamw(schedule, weight_decay=decay)


def train(splits: data.Splits, out: pathlib.Path, resume: bool) -> dict[str, loops.FitReport]:
    """Three models of one network, trained on three objectives.

    The learning rate ends at zero, so the last weights are the ones to use.
    """
    network = models.network(models.SmallCNN(widths=(24, 48), hidden=128, classes=10))
    inner = attacks.PGD(Linf(EPS), steps=7, keep="last")
    recipes = {
        # name: objective, epochs, batch size, weight decay, validation metric
        "standard": (training.Standard(), 40, 32, 0.5, loops.CleanAccuracy()),
        "adversarial": (
            training.Adversarial(inner),
            70,
            64,
            1.0,
            loops.RobustAccuracy(attacks.PGD(Linf(EPS), steps=10)),
        ),
        "smoothed": (
            training.NoiseAugmentation(smoothing.Gaussian(SIGMA)),
            120,
            64,
            0.2,
            loops.NoisyAccuracy(SIGMA),
        ),
    }
    trained = {}
    for seed, (name, recipe) in enumerate(recipes.items()):
        objective, epochs, batch_size, decay, validate = recipe
        trained[name] = loops.fit(
            jax.random.key(seed),
            network,
            objective,
            optimiser(len(splits.train), epochs, batch_size, decay),
            splits.train,
            epochs=epochs,
            batch_size=batch_size,
            validation=splits.validation,
            validate=validate,
            directory=out / name,
            resume=resume,
        )
    return trained


def robustness_curves(trained: dict, test: data.Dataset, radii: np.ndarray):
    """Robust accuracy at each radius: one program, vmapped over the radius, for all models."""
    attack = attacks.restarts(attacks.PGD(Linf(EPS), steps=50), 2)
    key = jax.random.key(7)

    def broken(model, radii, x, y, ids):
        def at(eps):
            return attacks.with_eps(attack, eps)(key, model, x, y, ids=ids).success

        return jax.vmap(at, out_axes=1)(radii)  # (examples, radii)

    examples = (test.x, test.y, test.id)
    arguments = {
        name: (model.last_model, radii.astype(np.float32), *examples)
        for name, model in trained.items()
    }
    begin = time.perf_counter()
    program = parallel.data_parallel(
        broken, backend="shard_map", in_axes=(None, None, 0, 0, 0)
    ).compile(*next(iter(arguments.values())))
    compiled = time.perf_counter()
    # A point found in a smaller ball lies in every larger one.
    found = {
        name: np.logical_or.accumulate(np.asarray(program(*args)), axis=1)
        for name, args in arguments.items()
    }
    curves = {name: 1.0 - hits.mean(axis=0) for name, hits in found.items()}
    return curves, compiled - begin, time.perf_counter() - compiled


def gradient_error(model, x: np.ndarray, y: np.ndarray):
    """Relative error of a coordinatewise estimate against ``jax.grad``, its queries, its time.

    Of the margin: the cross entropy of a confident model is flat to float32.
    """

    def loss(x):
        return jrobust.losses.margin(model(x[None]), jnp.asarray(y)[None])[0]

    estimator = zeroth_order.CGE(mu=2e-3)
    key, begin = jax.random.key(0), time.perf_counter()
    program = jax.jit(zeroth_order.value_and_grad(loss, estimator)).lower(key, x).compile()
    compiled = time.perf_counter()
    estimate = np.asarray(program(key, x)[1])
    run = time.perf_counter() - compiled
    exact = jax.grad(loss)(x)
    error = jnp.linalg.norm(estimate - exact) / jnp.linalg.norm(exact)
    return float(error), estimator.queries(x), compiled - begin, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/quickstart"))
    parser.add_argument("--fresh", action="store_true", help="start over in a used folder")
    args = parser.parse_args()
    out, resume = args.out, not args.fresh
    # On a CPU, several devices of one thread are faster than one device of several threads. Has no
    # effect on GPU and TPU, and on results none beyond rounding: the loops use all devices.
    cores = os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", 4 if cores >= 4 else min(cores, 2))
    begin = time.perf_counter()
    splits = data.digits()
    test = splits.test

    print(f"Training three models on {len(splits.train)} digits")
    trained = train(splits, out, resume)

    print(f"\nAttacking {len(test)} test digits with PGD-50, 2 restarts, Linf {EPS}")
    attack = attacks.restarts(attacks.PGD(Linf(EPS), steps=50), 2)
    evaluated = {
        name: loops.evaluate(
            jax.random.key(7),
            trained[name].last_model,
            test,
            {"PGD-50 x 2": attack},
            batch_size=len(test),
            directory=out / name / "attack",
            resume=resume,
        )
        for name in ("standard", "adversarial")
    }
    radii = np.linspace(0.0, 0.3, 7)
    curves, *curve_seconds = robustness_curves({n: trained[n] for n in evaluated}, test, radii)

    print(f"\nCertifying {len(test)} test digits by 10,000 votes each, Gaussian noise {SIGMA}")
    certified = loops.certify(
        jax.random.key(8),
        trained["smoothed"].last_model,
        test,
        smoothing.Gaussian(SIGMA),
        n0=100,
        n=10_000,
        alpha=0.001,
        batch_size=50,
        directory=out / "smoothed" / "certificates",
        resume=resume,
    )
    error, queries, *gradient_seconds = gradient_error(
        trained["adversarial"].last_model, test.x[0], test.y[0]
    )

    columns = ["model", "clean", f"PGD-50, Linf {EPS}", "certified, L2 0", "certified, L2 0.5"]
    rows = [
        [name, e.clean_accuracy, e.robust_accuracy, None, None] for name, e in evaluated.items()
    ]
    rows.append(
        ["smoothed", None, None, float(certified.accuracy(0.0)), float(certified.accuracy(0.5))]
    )
    times = [
        [f"train {name}", fit.seconds["compile"], fit.seconds["run"] + fit.seconds["other"]]
        for name, fit in trained.items()
    ]
    times += [
        [f"attack {name}", e.seconds["compile"], e.seconds["run"] + e.seconds["other"]]
        for name, e in evaluated.items()
    ]
    times.append(["robustness curves, 7 radii, 2 models", *curve_seconds])
    times.append(["certify", certified.seconds["compile"], certified.seconds["run"]])
    times.append(["one CGE gradient", *gradient_seconds])
    times.append(["all", *(sum(row[i] for row in times) for i in (1, 2))])

    page = report.Report("jrobust quickstart: handwritten digits")
    page.text(
        f"{len(test)} test images of 8x8 grey levels in [0, 1], never seen in training. Robust "
        f"accuracy is what PGD-50 with 2 restarts leaves standing, an upper bound. Certified "
        f"accuracy holds for the smoothed classifier. {certified.certificate.statement()}"
    )
    page.table("Accuracy on the test split", columns, rows)
    page.curve(
        "Robust accuracy against the radius of the attack",
        {name: (radii, curve) for name, curve in curves.items()},
        "eps (Linf, grey levels in [0, 1])",
        "robust accuracy",
        percent=True,
    )
    page.curve(
        f"Certified accuracy, n = 10,000, alpha = 0.001; no radius can exceed "
        f"{np.floor(1e4 * certified.configuration['radius_ceiling']) / 1e4:.4f} at this n",
        {f"sigma = {SIGMA}": (RADII, certified.accuracy(RADII))},
        "radius (L2)",
        "certified accuracy",
        percent=True,
    )
    page.curve(
        "Validation metric in training: clean, robust and noisy accuracy respectively",
        {
            name: (np.arange(1, len(f.history) + 1), [h["validation"] for h in f.history])
            for name, f in trained.items()
        },
        "epoch",
        "validation accuracy",
        percent=True,
    )
    page.curve(
        "Training loss, each model's own objective",
        {
            name: (np.arange(1, len(f.history) + 1), [h["loss"] for h in f.history])
            for name, f in trained.items()
        },
        "epoch",
        "loss",
    )
    for name, e in evaluated.items():
        shown = np.flatnonzero(e.examples["broken_by"] >= 0)[:8]
        if len(shown):
            page.images(
                f"Adversarial examples of the {name} model: true class, clean and attacked answer",
                test.x[shown],
                e.x[shown],
                test.y[shown],
                e.examples["prediction"][shown],
                e.examples["adversarial_prediction"][shown],
            )
    page.text(
        f"One gradient by coordinatewise estimation (CGE, {queries} queries) differs from "
        f"backpropagation by {error:.2e} in relative norm."
    )
    page.table("Where the time went, in seconds", ["part", "compile", "run"], times)
    page.configuration(
        {
            **{name: fit.configuration for name, fit in trained.items()},
            "attack": evaluated["adversarial"].configuration,
            "certify": certified.configuration,
        }
    )
    path = page.save(out / "report.html")

    print()
    print(report.table_text(columns, rows))
    print(f"\nCGE against jax.grad: relative error {error:.2e} with {queries} queries\n")
    print(report.table_text(["seconds", "compile", "run"], times))
    print(f"\n{time.perf_counter() - begin:.0f} seconds in all. Report: {path}")


if __name__ == "__main__":
    main()
