"""RobustBench's own definitions of its models, with random weights.

Runs in the peers' environment: reads lines `DATASET THREAT IDENTIFIER PATH` and, for each, writes
`PATH.pt` with the weights and `PATH.npz` with inputs and logits, then a line with its class and
number of parameters, or `absent`. Weights and batch-norm statistics are random.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from unittest import mock

import numpy as np
import torch


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that the zoo imports and the networks tested here do not use."""

    NAMES = (
        "gdown", "geotorch", "pandas", "pkg_resources", "requests", "timm", "torchdiffeq",
        "torchvision", "tqdm", "yaml",
    )  # fmt: skip

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        """A mock has nothing to run."""


def zoo():
    sys.meta_path.insert(0, Absent())
    # Without running the package itself, which wants to download.
    package = types.ModuleType("robustbench")
    package.__path__ = importlib.util.find_spec("robustbench").submodule_search_locations
    sys.modules["robustbench"] = package
    from robustbench.model_zoo.models import model_dicts

    return {
        (data.value, threat.value, name): entry["model"]
        for data, threats in model_dicts.items()
        for threat, models in threats.items()
        for name, entry in models.items()
    }


def randomise(network):
    for name, value in network.state_dict().items():
        if not value.is_floating_point() or name.split(".")[-1] in ("mean", "std", "mu", "sigma"):
            continue
        if value.ndim > 1:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var") or name.endswith("weight"):
            value.uniform_(0.5, 1.5)
        else:
            value.normal_(std=0.2)


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # the zoo prints
    makers = zoo()
    for init in ("kaiming_normal_", "kaiming_uniform_", "normal_", "xavier_normal_"):
        setattr(torch.nn.init, init, lambda tensor, *_, **__: tensor)  # slow, and not needed
    for line in sys.stdin:
        dataset, threat, name, path = line.split()
        maker = makers.get((dataset, threat, name))
        if maker is None:
            print("absent", file=out, flush=True)
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            network = maker()
            randomise(network)
            network.eval()
            x = torch.rand(2, 3, 32, 32)
            logits = network(x)
        torch.save(network.state_dict(), f"{path}.pt")
        np.savez(f"{path}.npz", x=x.permute(0, 2, 3, 1).numpy(), logits=logits.numpy())
        count = sum(p.numel() for p in network.parameters())
        print(type(network).__name__, count, file=out, flush=True)


if __name__ == "__main__":
    main()
