"""Train networks without backpropagation, as DeepZero does (Chen et al. 2024).

    python examples/deepzero.py
    python examples/deepzero.py --network resnet20 --steps 2 --batch-size 8 --keep 0.01

The first trains a CNN of 12,657 parameters on real digits four ways, in the same batches and with
the same optimiser: by backpropagation; coordinate by coordinate (CGE); a tenth of the coordinates
at a time, in masks redrawn every five epochs with the layers' shares from ZO-GraSP (DeepZero); and
along random directions (RGE), as many queries as CGE. The second makes DeepZero steps of ResNet-20
on images of CIFAR's shape. Feature reuse and parallel forward passes are CGE's own: differences
begin at the weight that moves, many at a time, through one copy of the network.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrobust import data, models, report, training, zeroth_order

MU = 5e-3
EPOCHS_OF_A_MASK = 5


def network(args: argparse.Namespace) -> tuple[models.Network, data.Dataset, data.Dataset]:
    """The network, training data and test data."""
    if args.network == "resnet20":
        splits = data.synthetic(args.train or 512, 256, validation=1)
        return models.network(models.ResNet(20)), splits.train, splits.test
    splits = data.digits()
    module = models.SmallCNN(widths=(12, 24), hidden=25, classes=10, norm=True)
    return models.network(module), splits.train[: args.train], splits.test


def optimiser(args: argparse.Namespace) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, args.lr, max(1, args.steps // 15), args.steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))


def batches(key: jax.Array, train: data.Dataset, size: int, steps: int):
    """The batches of a run: whole ones, in an order of their own in each epoch."""
    each = len(train) // size
    for step in range(steps):
        if step % each == 0:
            order = jax.random.permutation(jax.random.fold_in(key, step // each), len(train))
        rows = np.asarray(order[step % each * size :][:size])
        yield training.batch(train.x[rows], train.y[rows], train.id[rows])


def accuracy(network: models.Network, state: training.State, test: data.Dataset) -> float:
    score = jax.jit(lambda model, x, y: jnp.mean(jnp.argmax(model(x), -1) == y))
    return float(score(network.bind(*state.weights), test.x, test.y))


def ratios(args: argparse.Namespace, network: models.Network, train: data.Dataset) -> Any:
    """Each layer's share of the weights that GraSP would keep at initialisation."""
    chosen = [np.flatnonzero(train.y == c)[: args.grasp_examples] for c in np.unique(train.y)]
    rows = np.concatenate(chosen)
    params, extra = network.init(jax.random.key(args.seed), jnp.asarray(train.x[:1]))
    batch = training.batch(train.x[rows], train.y[rows], train.id[rows])
    key = jax.random.key(args.seed + 1)

    def loss(params: Any) -> jax.Array:
        return training.Standard()(key, network, params, extra, batch)[0]

    estimator = zeroth_order.RGE(MU, args.grasp_directions)
    score = jax.jit(lambda key, params: zeroth_order.grasp(key, loss, params, estimator))
    return zeroth_order.grasp_ratios(score(key, params), args.keep)


def queries(objective: training.Objective, state: training.State) -> int:
    """Forward passes of a step from which an estimate is made."""
    if not isinstance(objective, training.ZerothOrder):
        return 0
    mask = objective.mask and objective.mask.at_step(state)
    return objective.estimator.queries(state.params, mask)


@dataclasses.dataclass
class Run:
    """What a way to train has come to."""

    queries: int  # forward passes of a batch in a step
    seconds: float
    accuracy: dict[int, float]  # after so many steps
    loss: list[float]


def train(
    args: argparse.Namespace,
    network: models.Network,
    sets: tuple[data.Dataset, data.Dataset],
    objective: training.Objective,
    steps: int,
) -> Run:
    init, update = training.step(objective, optimiser(args))
    update = jax.jit(update, donate_argnums=0)
    state = init(jax.random.key(args.seed), network, jnp.asarray(sets[0].x[:1]))
    run = Run(queries(objective, state), 0.0, {}, [])
    for step, batch in enumerate(batches(jax.random.key(7), sets[0], args.batch_size, steps), 1):
        if step == 2:  # the first compiles
            begin = time.perf_counter()
        state, metrics = update(state, batch)
        run.loss.append(float(metrics["loss"]))
        if step > 1:
            run.seconds = (time.perf_counter() - begin) / (step - 1)
        if step in (args.rge_steps, steps):
            run.accuracy[step] = accuracy(network, state, sets[1])
    return run


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    """The runs, by the name of the way to train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", choices=("digits", "resnet20"), default="digits")
    add("--steps", type=int, default=190)
    add("--rge-steps", type=int, default=20, help="steps of RGE; CGE is compared after as many")
    add("--batch-size", type=int, default=63)
    add("--train", type=int, help="use the first so many examples")
    add("--lr", type=float, default=0.1)
    add("--keep", type=float, default=0.1, help="share of the weights in a mask")
    add("--grasp-directions", type=int, default=192)
    add("--grasp-examples", type=int, default=25, help="of each class")
    ways = ("backpropagation", "CGE", "DeepZero", "RGE")
    add("--ways", nargs="+", choices=ways, help="default all of them; DeepZero for resnet20")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    model, *sets = network(args)
    shape = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(sets[0].x[:1]))[0]
    size = sum(leaf.size for leaf in jax.tree.leaves(shape))
    default = ("DeepZero",) if args.network == "resnet20" else ways
    print(f"{args.network}: {size:,} parameters, {len(sets[0])} examples")

    standard = training.Standard()
    cge = zeroth_order.CGE(MU, central=False)
    rge = zeroth_order.RGE(MU, size)
    runs, each = {}, len(sets[0]) // args.batch_size
    for way in args.ways or default:
        steps = args.rge_steps if way == "RGE" else args.steps
        objective: training.Objective = standard
        if way == "CGE":
            objective = training.ZerothOrder(standard, cge)
        elif way == "RGE":
            objective = training.ZerothOrder(standard, rge)
        elif way == "DeepZero":
            shares = ratios(args, model, sets[0])
            mask = training.RedrawnMask(shares, EPOCHS_OF_A_MASK * each)
            objective = training.ZerothOrder(standard, cge, mask)
        runs[way] = train(args, model, tuple(sets), objective, steps)
        print(f"{way}: loss {runs[way].loss[-1]:.4g}", flush=True)
    rows = [
        [
            way,
            run.queries,
            run.seconds,
            *(run.accuracy.get(n) for n in (args.rge_steps, args.steps)),
        ]
        for way, run in runs.items()
    ]
    columns = ["trained by", "queries a step", "seconds a step"]
    columns += [f"accuracy, {n} steps" for n in (args.rge_steps, args.steps)]
    print(report.table_text(columns, rows))
    return runs


if __name__ == "__main__":
    main()
