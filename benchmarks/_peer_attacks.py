"""foolbox and torchattacks on the networks of `attacks.py`, driven by JSON lines.

See `_common.Peer`. Runs in an environment of its own: torch, numpy, pyautoattack, foolbox and
torchattacks.
"""

import time
from importlib import metadata

import _peer_autoattack
import _peer_networks
import foolbox
import numpy as np
import torch
import torchattacks


class Session(_peer_autoattack.Session):
    """The state between requests; each public method is one."""

    def open(self, **arguments):
        """See the parent."""
        answer = super().open(**arguments)
        # torchattacks takes views of gradients, which those in channels last do not allow.
        answer["versions"] |= {name: metadata.version(name) for name in ("foolbox", "torchattacks")}
        return answer

    def _run(self, library, name, arguments, eps, x, y):
        if library == "foolbox":
            self.model.to(memory_format=torch.channels_last)
            model = foolbox.PyTorchModel(self.model, bounds=(0, 1))
            attack = getattr(foolbox.attacks, name)(**arguments)
            criterion = foolbox.criteria.Misclassification(y)
            return attack(model, x, criterion, epsilons=eps)[1]
        self.model.to(memory_format=torch.contiguous_format)
        attack = getattr(torchattacks, name)(self.model, **arguments)
        return attack(x.contiguous(), y)

    def run(self, library, name, arguments, eps, batch, out=None):
        """An attack on all examples in batches; seconds, and on request the points."""
        torch.manual_seed(0)
        begin = time.perf_counter()
        found = [
            self._run(library, name, arguments, eps, x, y)
            for x, y in zip(self.x.split(batch), self.y.split(batch))
        ]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if out is not None:
            x = torch.cat(found).detach()
            with torch.no_grad():
                # What foolbox's attacks return where they find nothing is a black image.
                success = (self.model(x).argmax(1) != self.y) & (x.flatten(1).amax(1) > 0)
            x = x.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            np.savez(self.folder / out, x=x, success=success.cpu().numpy())
        return {"seconds": seconds}


if __name__ == "__main__":
    _peer_networks.serve(Session())
