"""Train, attack and certify a network on CIFAR-10 or any data set of its kind: one code path.

    python examples/train_cifar.py --data cifar10 --model prn18 --objective trades
    python examples/train_cifar.py --data synthetic --model resnet8 --objective pgd --train 2000 \\
        --test 100 --epochs 4 --steps 3 --attack-steps 10 --certify 20 --n 1000

The second needs no files and some two minutes on two CPU cores. Data sets but ``synthetic`` are
prepared first from their archives: ``python -m jrobust.data.prepare cifar10 --from DIR``. Kill it
and run it again: it goes on where it was; with --fresh it starts over.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib

import jax
import numpy as np
import optax

from jrobust import attacks, data, loops, models, report, smoothing, training
from jrobust.threat import Linf

DATA = ("synthetic", "cifar10", "cifar100", "svhn", "mnist", "fashion_mnist")
PHOTOGRAPHS = ("cifar10", "cifar100")  # a mirrored digit, or shoe, is another thing

MODELS = {
    "resnet8": functools.partial(models.ResNet, 8),
    "resnet20": functools.partial(models.ResNet, 20),
    "resnet18": models.ResNet18,
    "prn18": models.PreActResNet18,
    "wrn28_10": functools.partial(models.WideResNet, 28, 10),
    "wrn34_10": functools.partial(models.WideResNet, 34, 10),
}


def splits(args: argparse.Namespace) -> data.Splits:
    """Training data as bytes in memory or in storage; validation and test data in memory."""
    if args.data == "synthetic":
        held = (args.train or 50_000) // 10
        return data.synthetic((args.train or 50_000), args.test or 10_000, validation=held)
    train, test = (data.load(args.data, split, args.data_dir) for split in ("train", "test"))
    train, test = train[: args.train], test[: args.test]
    edge = len(train) - len(train) // 10
    part = train[:edge]
    return data.Splits(part if args.stream else part.cache(), train[edge:].read(), test.read())


def network(args: argparse.Namespace, examples: data.Dataset, classes: int) -> models.Network:
    """Normalised by the statistics of ``examples``."""
    pixels = examples.x.reshape(-1, examples.x.shape[-1]).astype(np.float64)
    mean, std = (tuple(np.round(v, 4).tolist()) for v in (pixels.mean(0), pixels.std(0)))
    return models.network(MODELS[args.model](classes=classes, mean=mean, std=std))


def objective(args: argparse.Namespace):
    """The objective, and the metric that chooses the best epoch."""
    eps = args.eps / 255
    inner = attacks.PGD(Linf(eps), steps=args.steps, step_size=eps / 4, keep="last")
    robust = loops.RobustAccuracy(attacks.PGD(Linf(eps), steps=args.steps, step_size=eps / 4))
    found, metric = {
        "standard": (training.Standard(), loops.CleanAccuracy()),
        "pgd": (training.Adversarial(inner), robust),
        "trades": (training.TRADES(inner), robust),
        "gaussian": (
            training.NoiseAugmentation(smoothing.Gaussian(args.sigma)),
            loops.NoisyAccuracy(args.sigma),
        ),
    }[args.objective]
    flip = [data.Flip()] if args.data in PHOTOGRAPHS else []
    return data.Augmented(found, data.chain(data.PadCrop(), *flip)), metric


def optimiser(args: argparse.Namespace, examples: int) -> optax.GradientTransformation:
    steps = args.epochs * -(-examples // args.batch_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.lr, steps // 10, steps)
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True)
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Clean, robust and certified accuracy on the test data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", choices=DATA, default="synthetic")
    add("--data-dir", help="prepared data sets; default $TFDS_DATA_DIR or ~/tensorflow_datasets")
    add("--stream", action="store_true", help="read training images as they are needed")
    add("--train", type=int, help="use the first so many examples, a tenth of them to validate")
    add("--test", type=int, help="use the first so many test examples")
    add("--model", choices=MODELS, default="resnet20")
    add("--objective", choices=("standard", "pgd", "trades", "gaussian"), default="pgd")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.1)
    add("--eps", type=float, default=8.0, help="radius in Linf, in grey levels of 255")
    add("--steps", type=int, default=10, help="of the attack in training")
    add("--attack", choices=("pgd", "autoattack"), default="pgd", help="on the test data")
    add("--attack-steps", type=int, default=50, help="of PGD on the test data")
    add("--sigma", type=float, default=0.25, help="noise of training and certification")
    add("--certify", type=int, default=500, help="test examples to certify; 0 for none")
    add("--n", type=int, default=10_000, help="noisy copies of each of them")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/train_cifar"))
    add("--fresh", action="store_true", help="start over in a used folder")
    args = parser.parse_args(arguments)
    resume, keys = not args.fresh, jax.random.split(jax.random.key(args.seed), 3)

    train, validation, test = splits(args)
    print(f"{args.data}: {len(train)} examples to train, {len(validation)} to validate")
    classes = getattr(train, "classes", 10)
    loss, metric = objective(args)
    fitted = loops.fit(
        keys[0],
        network(args, validation, classes),
        loss,
        optimiser(args, len(train)),
        train,
        epochs=args.epochs,
        batch_size=args.batch_size,
        validation=validation,
        validate=metric,
        directory=args.out / "fit",
        resume=resume,
    )

    threat = Linf(args.eps / 255)
    if args.attack == "autoattack":
        stages = attacks.AutoAttack(threat).stages
    else:
        stages = {f"PGD-{args.attack_steps}": attacks.PGD(threat, steps=args.attack_steps)}
    evaluated = loops.evaluate(
        keys[1],
        fitted.model,
        test,
        stages,
        directory=args.out / "attack",
        resume=resume,
    )
    found = {"clean": evaluated.clean_accuracy, "robust": evaluated.robust_accuracy}
    print(report.table_text(*evaluated.table()))

    if args.certify:
        certified = loops.certify(
            keys[2],
            fitted.model,
            test[: args.certify],
            smoothing.Gaussian(args.sigma),
            n=args.n,
            directory=args.out / "certificates",
            resume=resume,
        )
        rows = [[radius, float(certified.accuracy(radius))] for radius in (0.0, 0.25, 0.5)]
        found["certified"] = rows[0][1]
        print(report.table_text(["radius (L2)", "certified accuracy"], rows))
        print(certified.certificate.statement())
    return found


if __name__ == "__main__":
    # On a CPU, several devices of one thread are faster than one device of several threads.
    cores = os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", 4 if cores >= 4 else min(cores, 2))
    main()
