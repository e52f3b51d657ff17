"""foolbox's attacks that see decisions alone, one example at a time, driven by JSON lines.

In a batch its examples wait for each other, and HopSkipJump divides each gradient by the norm of
those of the whole batch. Runs in the peers' environment: foolbox, torch, numpy.
"""

import _autoattack
import _peer_networks
import numpy as np
import torch
from foolbox import PyTorchModel, attacks, criteria


class Counted(torch.nn.Module):
    """A network that counts the points it is asked about."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, 0

    def forward(self, x):
        """Logits."""
        self.asked += len(x)
        return self.net(x)


class Session(_autoattack.Session):
    def closest(self, net, activation, points, out, name, arguments, targeted):
        """The closest adversarial points, and how many points each of them cost."""
        with np.load(self.folder / net) as arrays:
            model = Counted(_autoattack.Net(dict(arrays), activation)).eval()
        with np.load(self.folder / points) as given:
            x, starts = (
                torch.from_numpy(given[n]).permute(0, 3, 1, 2).contiguous() for n in ("x", "starts")
            )
            y = torch.from_numpy(given["y"].astype(np.int64))
        kind = criteria.TargetedMisclassification if targeted else criteria.Misclassification
        torch.manual_seed(0)
        run, found, asked = getattr(attacks, name)(**arguments), [], []
        for i in range(len(x)):
            model.asked, rows = 0, slice(i, i + 1)
            more = {"starting_points": starts[rows]} if targeted else {}
            with torch.no_grad():
                found.append(
                    run.run(PyTorchModel(model, bounds=(0, 1)), x[rows], kind(y[rows]), **more)
                )
            asked.append(model.asked)
        np.savez(
            self.folder / out,
            x=torch.cat(found).permute(0, 2, 3, 1).contiguous().numpy(),
            asked=np.array(asked),
        )
        return {}


if __name__ == "__main__":
    _peer_networks.serve(Session())
