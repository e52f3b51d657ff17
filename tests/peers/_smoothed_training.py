"""Losses of randomized smoothing in PyTorch, on given logits: file in, file out.

Written from the papers with PyTorch's own functions: cross_entropy, kl_div, softmax, Normal.icdf.
"""

import sys

import numpy as np
import torch
from torch.nn import functional as F


def consistency(z, y, lbd, eta):
    """Jeong & Shin 2020."""
    probabilities = F.softmax(z, -1)
    mean = probabilities.mean(1)
    rows = y[:, None].expand(z.shape[:2]).reshape(-1)
    natural = F.cross_entropy(z.flatten(0, 1), rows)
    kl = sum(
        F.kl_div(F.log_softmax(z[:, i], -1), mean, reduction="batchmean") for i in range(z.shape[1])
    )
    entropy = -(mean * mean.log()).sum(-1).mean()
    return natural + lbd * kl / z.shape[1] + eta * entropy


def macer(z, y, sigma, lbd, gamma, beta):
    """Zhai et al. 2020."""
    natural = F.nll_loss(F.softmax(z, -1).mean(1).log(), y)
    top = F.softmax(beta * z, -1).mean(1).topk(2)
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.icdf(top.values)
    gap = quantiles[:, 0] - quantiles[:, 1]
    counts = (top.indices[:, 0] == y) & (gap <= gamma)
    return natural + lbd * sigma / 2 * (gamma - gap)[counts].sum() / len(y)


def stability(z, y, lbd):
    """Li et al. 2019: copy 0 is the clean input."""
    clean = z[:, 0]
    apart = [F.cross_entropy(z[:, i], F.softmax(clean, -1)) for i in range(1, z.shape[1])]
    return F.cross_entropy(clean, y) + lbd * sum(apart) / len(apart)


def main(source, target):
    given = np.load(source)
    results = {}
    for name, loss, arguments in (
        ("consistency", consistency, (4.0, 0.5)),
        ("macer", macer, (0.25, 3.0, 2.5, 1.5)),
        ("stability", stability, (2.0,)),
    ):
        z = torch.from_numpy(np.float64(given["logits"])).requires_grad_()
        value = loss(z, torch.from_numpy(given["y"].astype(np.int64)), *arguments)
        value.backward()
        results[name], results[f"{name} slope"] = value.item(), z.grad.numpy()
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
