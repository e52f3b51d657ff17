"""JSMA of torchattacks, rotations and translations of foolbox, driven by JSON lines."""

import _libraries
import _peer_networks
import eagerpy
import foolbox
import numpy as np
import torch
import torchattacks
from foolbox.attacks.spatial_attack_transformations import rotate_and_shift


class Session(_libraries.Session):
    def _found(self, out, found):
        with torch.no_grad():
            logits = self.model(found)
        x = found.permute(0, 2, 3, 1).contiguous().numpy()
        return self._save(out, x=x, logits=logits.numpy())

    def jsma(self, points, out, gamma):
        """Towards the classes `targets`, raising pairs all the way."""
        given = self._load(points)
        run = torchattacks.JSMA(self.model, theta=1.0, gamma=gamma)
        run.set_mode_targeted_by_label(quiet=True)
        x = self._image(given["x"]).contiguous()
        return self._found(out, run(x, torch.from_numpy(given["targets"].astype(np.int64))))

    def rotations(self, points, out, limit, number):
        """The first of evenly spaced rotations that is misclassified."""
        given = self._load(points)
        run = foolbox.attacks.SpatialAttack(0, limit, 1, number, grid_search=True)
        model = foolbox.PyTorchModel(self.model, bounds=(0, 1))
        y = torch.from_numpy(given["y"].astype(np.int64))
        found = run(model, self._image(given["x"]).contiguous(), foolbox.Misclassification(y))
        return self._found(out, found[1])

    def moved(self, points, out, transforms):
        """Every image under one transform: angle in degrees, shifts as foolbox has them."""
        x = eagerpy.astensor(self._image(self._load(points)["x"]).contiguous())
        made = [rotate_and_shift(x, (right, down), angle).raw for angle, right, down in transforms]
        return self._save(out, x=torch.stack(made).permute(0, 1, 3, 4, 2).contiguous().numpy())


if __name__ == "__main__":
    _peer_networks.serve(Session())
