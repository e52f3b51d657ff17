"""Attacks against foolbox and torchattacks on the same weights and inputs.

Without randomness, the same algorithm goes through the same points, up to rounding: a gradient
coordinate near zero whose sign rounds the other way, an activation on the other side of its kink.
Those are counted, the rest is held tightly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import attacks, losses
from jrobust.threat import L2, Linf

pytestmark = pytest.mark.peers

EPS, STEPS = 6 / 255, 10


def verdicts_agree(ours, theirs, success, y):
    """Flags are those of their logits, except where the two largest are within rounding."""
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(ours).max())
    two = np.sort(theirs, -1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > 1e-4 * np.abs(theirs).max()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal((theirs.argmax(-1) != y)[clear], np.asarray(success)[clear])


def attacked(peers, case, library, name, eps, *, x=None, targets=None, bounds=(0, 1), **arguments):
    """The points of a peer's attack and its logits there."""
    arrays = {"x": case.x if x is None else x, "y": case.y}
    if targets is not None:
        arrays["targets"] = targets
    points = peers.give("attack.npz", **arrays)
    given = {"targets": "attack.npz"} if targets is not None else {}
    return peers.get(
        "attack",
        library=library,
        name=name,
        points=points,
        eps=float(eps),
        bounds=bounds,
        arguments=arguments,
        **given,
    )


def same_points(ours, theirs, eps, step, *, signs):
    """Moves agree: coordinate by coordinate after sign steps, else example by example."""
    apart = np.abs(np.asarray(ours) - theirs)
    if signs:
        # A flipped sign is two steps, and later steps follow it.
        assert (apart > 1e-2 * step).mean() < 5e-3
        assert np.median(apart.reshape(len(apart), -1).max(1)) < 1e-5
    else:
        length = np.linalg.norm(apart.reshape(len(apart), -1), axis=1)
        assert np.median(length) < 1e-4 * eps
        assert (length > 1e-2 * eps).mean() < 0.1


def test_the_environment_is_the_one_that_was_written_down(peers):
    versions = peers.ask("versions")
    assert versions["foolbox"] == "3.3.4"
    assert versions["torchattacks"] == "3.5.1"
    assert versions["torch"].startswith("2.13.0")


def test_logits_and_gradients(peers, case):
    """What all the rest stands on."""
    peers.give("points.npz", x=case.x)
    peers.ask("evaluate", points="points.npz", out="values.npz")
    with np.load(peers.folder / "values.npz") as values:
        logits, gradient = values["logits"], values["gradient"]
    scale = np.abs(np.asarray(case.model(case.x))).max()
    np.testing.assert_allclose(case.model(case.x), logits, atol=1e-5 * scale)
    ours = jax.grad(lambda x: jnp.sum(losses.cross_entropy(case.model(x), case.y)))(case.x)
    apart = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(np.asarray(ours), gradient)]
    assert np.median(apart) < 1e-4
    assert np.mean(np.array(apart) > 1e-3) < 0.1


SIGN_ATTACKS = {
    "FGSM foolbox": (
        attacks.FGSM(Linf(EPS), keep="last"),
        ("foolbox", "LinfFastGradientAttack", {}),
    ),
    "FGSM torchattacks": (attacks.FGSM(Linf(EPS), keep="last"), ("torchattacks", "FGSM", {})),
    "PGD foolbox": (
        attacks.PGD(Linf(EPS), steps=STEPS, step_size=EPS / 4, random_start=False, keep="last"),
        ("foolbox", "LinfPGD", {"abs_stepsize": EPS / 4, "steps": STEPS, "random_start": False}),
    ),
    "PGD torchattacks": (
        attacks.PGD(Linf(EPS), steps=STEPS, step_size=EPS / 4, random_start=False, keep="last"),
        ("torchattacks", "PGD", {"alpha": EPS / 4, "steps": STEPS, "random_start": False}),
    ),
    # torchattacks divides the gradient by its mean size and the paper by its L1 norm: the same
    # direction. foolbox 3.3.4 is left out: it sums signs in place of normalised gradients.
    "MIFGSM torchattacks": (
        attacks.MIFGSM(Linf(EPS), steps=STEPS, keep="last"),
        ("torchattacks", "MIFGSM", {"alpha": EPS / STEPS, "steps": STEPS, "decay": 1.0}),
    ),
}


@pytest.mark.parametrize("name", SIGN_ATTACKS)
def test_linf_attacks_end_at_the_same_points(peers, case, name):
    attack, (library, peer, arguments) = SIGN_ATTACKS[name]
    ours = jrobust.run(attack, case.key, case.model, case.x, case.y)
    theirs = attacked(peers, case, library, peer, EPS, **arguments)
    same_points(ours.x, theirs["x"], EPS, EPS / STEPS, signs=True)
    verdicts_agree(np.asarray(case.model(ours.x)), peers.logits(ours.x), ours.success, case.y)
    flags = theirs["logits"].argmax(-1) != case.y
    assert np.mean(flags != np.asarray(ours.success)) <= 1 / 32
    if "PGD" in name:
        assert 0.2 < flags.mean() < 0.95, "some hold and some break, or flags say nothing"


def test_targeted_pgd_ends_at_the_same_points(peers, case):
    targets = (np.asarray(case.y) + 1) % 10
    attack = attacks.PGD(Linf(EPS), steps=STEPS, step_size=EPS / 4, random_start=False, keep="last")
    ours = jrobust.run(attack, case.key, case.model, case.x, case.y, targets=targets)
    for library, name, step in (
        ("foolbox", "LinfPGD", "abs_stepsize"),
        ("torchattacks", "PGD", "alpha"),
    ):
        theirs = attacked(
            peers, case, library, name, EPS,
            targets=targets, steps=STEPS, random_start=False, **{step: EPS / 4},
        )  # fmt: skip
        same_points(ours.x, theirs["x"], EPS, EPS / STEPS, signs=True)
        reached = theirs["logits"].argmax(-1) == targets
        assert np.mean(reached != np.asarray(ours.success)) <= 1 / 32


@pytest.mark.parametrize("name", ["FGM foolbox", "PGD foolbox", "PGD torchattacks"])
def test_l2_attacks_end_at_the_same_points_where_the_box_is_far(peers, case, name):
    """Inputs in the middle of the box.

    Where the box binds, both peers shrink to the ball and clip to the box, which stops short of
    the nearest point of the two: see test_peer_geometry.py.
    """
    eps, x = 0.2, 0.25 + 0.5 * np.asarray(case.x)
    step = eps if "FGM" in name else eps / 4
    common = {"steps": STEPS, "random_start": False}
    attack, theirs = {
        "FGM foolbox": (
            attacks.FGSM(L2(eps), keep="last"),
            lambda: attacked(peers, case, "foolbox", "L2FastGradientAttack", eps, x=x),
        ),
        "PGD foolbox": (
            attacks.PGD(L2(eps), step_size=step, keep="last", **common),
            lambda: attacked(
                peers, case, "foolbox", "L2PGD", eps, x=x, abs_stepsize=step, **common
            ),
        ),
        "PGD torchattacks": (
            attacks.PGD(L2(eps), step_size=step, keep="last", **common),
            lambda: attacked(peers, case, "torchattacks", "PGDL2", eps, x=x, alpha=step, **common),
        ),
    }[name]
    ours = jrobust.run(attack, case.key, case.model, x, case.y)
    theirs = theirs()
    assert np.asarray(ours.distance).min() > 0.9 * step
    same_points(ours.x, theirs["x"], eps, step, signs=False)
    flags = theirs["logits"].argmax(-1) != case.y
    assert np.mean(flags != np.asarray(ours.success)) <= 1 / 32


@pytest.mark.parametrize(
    ("threat", "peer"), [(Linf(EPS), "LinfPGD"), (L2(0.4), "L2PGD")], ids=["Linf", "L2"]
)
def test_verdicts_hold_on_both_sides(peers, case, threat, peer):
    """Our points by their forward passes, their points by ours, and neither attack is weaker."""
    attack = attacks.PGD(threat, steps=20, rel_step_size=0.1)
    ours = jrobust.run(attack, case.key, case.model, case.x, case.y)
    verdicts_agree(np.asarray(case.model(ours.x)), peers.logits(ours.x), ours.success, case.y)
    theirs = attacked(peers, case, "foolbox", peer, threat.eps, rel_stepsize=0.1, steps=20)
    success = theirs["logits"].argmax(-1) != case.y
    verdicts_agree(np.asarray(case.model(theirs["x"])), theirs["logits"], success, case.y)
    assert np.all(threat.distance(theirs["x"], case.x) <= threat.eps + 1e-6)
    assert np.all(threat.distance(ours.x, case.x) <= threat.eps + 1e-6)
    broken = np.asarray(ours.success)
    assert 0.2 < broken.mean() < 0.95
    # foolbox judges its last point only, so that a success on the way there is lost.
    assert -1 <= broken.sum() - success.sum() <= 6


def test_dlr_losses_are_those_of_autoattack(peers):
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(200, 6)))
    y = rng.integers(0, 6, 200)
    targets = (y + rng.integers(1, 6, 200)) % 6
    theirs = peers.get("losses", points=peers.give("z.npz", logits=logits, y=y, targets=targets))
    np.testing.assert_allclose(losses.dlr(logits, y), theirs["dlr"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses.dlr_targeted(logits, y, targets), theirs["dlr_targeted"], rtol=1e-5, atol=1e-6
    )
