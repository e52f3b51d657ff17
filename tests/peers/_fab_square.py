"""The parts of pyautoattack's FAB and Square, and FAB's distances, driven by JSON lines.

Runs in the peers' environment: pyautoattack, torch, numpy.
"""

import _autoattack
import _peer_networks
import numpy as np
import torch
from pyautoattack import fab_projections
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack


class Session(_autoattack.Session):
    def closest(self, net, activation, points, out, norm, eps, steps, target):
        """FAB's closest adversarial points; towards the class of rank `target` if there is one."""
        with np.load(self.folder / net) as arrays:
            model = _autoattack.Net(dict(arrays), activation)
        with np.load(self.folder / points) as given:
            x = torch.from_numpy(given["x"]).permute(0, 3, 1, 2).contiguous()
            y = torch.from_numpy(given["y"].astype(np.int64))
        run = FABAttack_PT(model, norm=norm, eps=eps, n_iter=steps)
        run.target_class = target
        found = run.attack_single_run(x, y, is_targeted=target is not None)
        np.savez(
            self.folder / out,
            x=found.permute(0, 2, 3, 1).contiguous().numpy(),
            success=(model(found).argmax(1) != y).numpy(),
        )
        return {}

    def project(self, points, out):
        """The moves from `x` (B, d) to the hyperplanes `value + normal . (z - x) = 0` in [0, 1]."""
        with np.load(self.folder / points) as given:
            x, w, value = (torch.from_numpy(given[n]) for n in ("x", "normal", "value"))
        b = (w * x).sum(1) - value
        np.savez(
            self.folder / out,
            Linf=fab_projections.projection_linf(x, w, b).numpy(),
            L2=fab_projections.projection_l2(x, w, b).numpy(),
            L1=fab_projections.projection_l1(x, w, b).numpy(),
        )
        return {}

    def pieces(self, out, lengths):
        """Square's bumps of these sides, whichever way they turn, and its share of pixels."""
        torch.manual_seed(0)
        arrays = {}
        for norm in ("L2", "L1"):
            run = SquareAttack(lambda x: x, norm=norm, eps=1.0, p_init=0.8, device="cpu")
            run.resc_schedule = run.rescale_schedule = False
            for length in lengths:
                arrays[f"{norm} {length}"] = run.eta(length).numpy()
        arrays["p"] = np.array([run.p_selection(i) for i in range(9000)])
        np.savez(self.folder / out, **arrays)
        return {}


if __name__ == "__main__":
    _peer_networks.serve(Session())
