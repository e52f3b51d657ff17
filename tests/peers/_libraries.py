"""Other libraries on the network and the examples of the tests, driven by JSON lines.

Runs in an environment of its own (`make peers`): foolbox, torchattacks, pyautoattack, torch, scipy.
Arrays come and go as .npz files in the case's folder, images as (B, H, W, C).
"""

import pathlib
import sys

import eagerpy
import foolbox
import numpy as np
import scipy
import torch
import torchattacks
from foolbox import attacks as foolbox_attacks
from foolbox.attacks.gradient_descent_base import clip_lp_norms
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import _peer_networks
import _peer_pgd


class Session(_peer_pgd.Session):
    def open(self, **arguments):
        """See the parent."""
        answer = super().open(**arguments)
        # torchattacks takes views of gradients, which those in channels last do not allow.
        self.model.to(memory_format=torch.contiguous_format)
        return answer

    def versions(self):
        """Of everything that is compared with."""
        modules = (foolbox, torchattacks, torch, scipy, np)
        return {module.__name__: module.__version__ for module in modules}

    def _load(self, name):
        with np.load(self.folder / name) as arrays:
            return dict(arrays)

    def _save(self, name, **arrays):
        np.savez(self.folder / name, **arrays)
        return {}

    def attack(self, library, name, points, out, arguments, eps, bounds=(0, 1), targets=None):
        """Run an attack of a library; `targets` is a file too."""
        given = self._load(points)
        x = self._image(given["x"]).contiguous()
        y = torch.from_numpy(given["y"].astype(np.int64))
        towards = None if targets is None else torch.from_numpy(given["targets"].astype(np.int64))
        torch.manual_seed(0)
        if library == "foolbox":
            model = foolbox.PyTorchModel(self.model, bounds=tuple(bounds))
            criterion = foolbox.criteria.Misclassification(y)
            if towards is not None:
                criterion = foolbox.criteria.TargetedMisclassification(towards)
            run = getattr(foolbox_attacks, name)(**arguments)
            found = run(model, x, criterion, epsilons=eps)[1]
        else:
            run = getattr(torchattacks, name)(self.model, eps=eps, **arguments)
            if towards is not None:
                run.set_mode_targeted_by_label(quiet=True)
            found = run(x, y if towards is None else towards)
        with torch.no_grad():
            logits = self.model(found)
        x = found.permute(0, 2, 3, 1).contiguous().numpy()
        return self._save(out, x=x, logits=logits.numpy())

    def logits(self, points, out):
        """The network at points that the other side wrote."""
        x = self._image(self._load(points)["x"])
        with torch.no_grad():
            parts = [self.model(part) for part in x.split(512)]
        return self._save(out, logits=torch.cat(parts).numpy())

    def losses(self, points, out):
        """DLR and targeted DLR of given logits, as AutoAttack ascends them."""
        given = {name: torch.from_numpy(a) for name, a in self._load(points).items()}
        towards = APGDAttack_targeted(lambda x: x, n_restarts=1, norm="Linf", eps=0.1, device="cpu")
        towards.y_target = given["targets"]
        plain = APGDAttack(lambda x: x, norm="Linf", eps=0.1, device="cpu")
        return self._save(
            out,
            dlr=plain.dlr_loss(given["logits"], given["y"]).numpy(),
            dlr_targeted=towards.dlr_loss_targeted(given["logits"], given["y"]).numpy(),
        )

    def project(self, points, out, eps):
        """Points nearest to `x` in balls around `x0` and in the box [0, 1], by several means."""
        given = {name: torch.from_numpy(a) for name, a in self._load(points).items()}
        x, x0 = given["x"].flatten(1), given["x0"].flatten(1)
        shrunk = clip_lp_norms(eagerpy.astensor(x - x0), norm=eps, p=2).raw
        return self._save(
            out,
            l1_autoattack=(x + L1_projection(x0, x - x0, eps)).numpy(),
            l1_bisection=bisect(x.double(), x0.double(), eps, 1).numpy(),
            l2_bisection=bisect(x.double(), x0.double(), eps, 2).numpy(),
            l2_foolbox=(x0 + shrunk).clamp(0, 1).numpy(),
        )

    def certify(self, counts, out, sigma, alpha):
        """CERTIFY and PREDICT of Cohen et al. (2019) from counts, written down by hand."""
        given = self._load(counts)
        classes, radii, bounds, answers = [], [], [], []
        for select, estimate in zip(given["select"].tolist(), given["estimate"].tolist()):
            top = int(np.argmax(select))
            test = stats.binomtest(estimate[top], sum(estimate))
            # One-sided at alpha: the lower end of a two-sided interval at twice that.
            lower = test.proportion_ci(confidence_level=1 - 2 * alpha, method="exact").low
            classes.append(top if lower > 0.5 else -1)
            radii.append(sigma * stats.norm.ppf(lower) if lower > 0.5 else 0.0)
            bounds.append(lower)
            first, second = np.argsort(estimate, kind="stable")[::-1][:2]
            votes = estimate[first], estimate[second]
            sure = stats.binomtest(votes[0], sum(votes), p=0.5).pvalue <= alpha
            answers.append(int(first) if sure else -1)
        return self._save(
            out,
            prediction=np.array(classes),
            radius=np.array(radii),
            p_lower=np.array(bounds),
            predict=np.array(answers),
        )


def bisect(x, x0, eps, p):
    """The point of ball and box [0, 1] nearest to `x`: (B, d) float64.

    The Lagrangian separates over features. At a multiplier t its minimum is, before clipping to
    the box, `x0` plus the move thresholded by t (p = 1) or divided by 1 + t (p = 2).
    """

    def at(t):
        move = x - x0
        if p == 1:
            move = move.sign() * (move.abs() - t).clamp(min=0)
        else:
            move = move / (1 + t)
        return (x0 + move).clamp(0, 1)

    low = torch.zeros(len(x), 1, dtype=x.dtype)
    high = torch.full_like(low, 1e6)
    for _ in range(200):
        middle = (low + high) / 2
        outside = torch.linalg.vector_norm(at(middle) - x0, p, 1, keepdim=True) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    free = torch.linalg.vector_norm(at(torch.zeros_like(low)) - x0, p, 1, keepdim=True) <= eps
    return torch.where(free, at(torch.zeros_like(low)), at(high))


if __name__ == "__main__":
    _peer_networks.serve(Session())
