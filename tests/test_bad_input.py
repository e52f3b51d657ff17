"""Every mistake has its clear error, before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import drive, losses
from jrobust.attacks import FGSM, PGD, Attack, restarts, sequence, union
from jrobust.threat import L2, Linf
from jrobust.zeroth_order import CGE

KEY = jax.random.key(0)
X = np.full((4, 2, 3), 0.5, np.float32)
Y = np.array([0, 1, 2, 0])
ATTACK = PGD(Linf(0.1), steps=2)


def logits_fn(x):
    assert isinstance(x, jax.core.Tracer), "the model must not run"
    return x.reshape(x.shape[0], -1) @ jnp.ones((6, 3))


def two_classes(x):
    return logits_fn(x)[:, :2]


def call(attack=ATTACK, key=KEY, fn=logits_fn, x=X, y=Y, **extra):
    return jrobust.run(attack, key, fn, x, y, **extra)


def set_at(a, value):
    a = np.array(a)
    a.flat[1] = value
    return a


class Untraceable(drive.Host):
    def __init__(self):
        super().__init__(lambda x: np.zeros((len(x), 3)))


ESTIMATED = PGD(Linf(0.1), steps=2, estimator=CGE(1e-3))

MISTAKES = {
    "key is a seed": (lambda: call(key=0), TypeError, "key must be a typed PRNG key, got int"),
    "legacy key": (
        lambda: call(key=jax.random.PRNGKey(0)),
        TypeError,
        "typed PRNG key, got .*uint32; make one with jax.random.key",
    ),
    "batch of keys": (lambda: call(key=jax.random.split(KEY, 4)), ValueError, "single key"),
    "rbg key": (lambda: call(key=jax.random.key(0, impl="rbg")), TypeError, "draws depend on the"),
    "bytes": (
        lambda: call(x=np.zeros((4, 2, 3), np.uint8)),
        TypeError,
        "x must be float32, got uint8: .* divide by 255",
    ),
    "float64": (lambda: call(x=np.float64(X)), TypeError, "x must be float32, got float64"),
    "bfloat16": (
        lambda: call(x=jnp.asarray(X, jnp.bfloat16)),
        TypeError,
        "x must be float32, got bfloat16",
    ),
    "one example": (lambda: call(x=X[0, 0], y=Y[:3]), ValueError, r"for one example use x\[None\]"),
    "empty batch": (lambda: call(x=X[:0], y=Y[:0]), ValueError, "empty batch"),
    "one-hot labels": (lambda: call(y=np.eye(3)[Y]), TypeError, r"soft labels.*y\.argmax"),
    "integer one-hot labels": (lambda: call(y=np.eye(3, dtype=int)[Y]), TypeError, "one-hot"),
    "float labels": (lambda: call(y=np.float32(Y)), TypeError, "integer labels of shape"),
    "boolean labels": (lambda: call(y=Y > 0), ValueError, "y must be integers of shape"),
    "label too high": (lambda: call(y=Y + 1), ValueError, r"y must lie in 0 \.\. 2 .*got 1 \.\. 3"),
    "negative label": (lambda: call(y=Y - 1), ValueError, r"y must lie in 0 \.\. 2 .*got -1"),
    "too few labels": (
        lambda: call(y=Y[:3]),
        ValueError,
        r"y must be integers of shape \(4,\) .*shape \(3,\)",
    ),
    "targets of another shape": (
        lambda: call(targets=np.array([1])),
        ValueError,
        r"targets must be integers of shape \(4,\)",
    ),
    "float targets": (
        lambda: call(targets=np.float32(Y)),
        ValueError,
        "targets must be integers.*got float32",
    ),
    "target out of range": (
        lambda: call(targets=Y + 1),
        ValueError,
        r"targets must lie in 0 \.\. 2",
    ),
    "target is the label": (
        lambda: call(targets=np.array([1, 2, 2, 1])),
        ValueError,
        "targets must differ from y",
    ),
    "ids of another shape": (lambda: call(ids=np.arange(3)), ValueError, "ids must be integers"),
    "float ids": (lambda: call(ids=np.float32(Y)), ValueError, "ids must be integers"),
    "x above the box": (
        lambda: call(x=set_at(X, 1.5)),
        ValueError,
        r"box \[lo, hi\] = \[0, 1\].*span \[0\.5, 1\.5\].*before normalisation",
    ),
    "x below the box": (lambda: call(x=set_at(X, -0.01)), ValueError, "x must lie in the box"),
    "NaN in x": (lambda: call(x=set_at(X, np.nan)), ValueError, "1 values that are not finite"),
    "negative eps": (
        lambda: call(PGD(Linf(-0.1))),
        ValueError,
        "Linf.eps must be finite and not negative, got -0.1",
    ),
    "NaN eps": (lambda: call(PGD(L2(np.nan))), ValueError, "L2.eps must be finite"),
    "eps in grey levels": (
        lambda: call(PGD(Linf(8.0))),
        ValueError,
        "Linf.eps = 8 is larger than the whole box.*norm is 1; .*8/255",
    ),
    "L2 eps above the diagonal": (
        lambda: call(PGD(L2(2.46))),
        ValueError,
        r"L2.eps = 2.46 is larger than the whole box.*is 2\.449",
    ),
    "one of many eps is bad": (
        lambda: call(PGD(Linf(np.array([0.1, 0.1, -1, 0.1])))),
        ValueError,
        "not negative",
    ),
    "eps for another batch": (
        lambda: call(PGD(Linf(np.full(3, 0.1)))),
        ValueError,
        r"one value for each of the 4 examples, got shape \(3,\).*jax\.vmap over eps",
    ),
    "empty box": (lambda: call(PGD(Linf(0.1, 1.0, 0.0))), ValueError, "lo < hi, got lo=1.0"),
    "infinite box": (lambda: call(PGD(Linf(0.1, 0.0, np.inf))), ValueError, "finite bounds"),
    "lo for another shape": (
        lambda: call(PGD(Linf(0.1, lo=np.zeros(2)))),
        ValueError,
        r"Linf\.lo must broadcast against one example of shape \(2, 3\), got shape \(2,\)",
    ),
    "per-example hi for another shape": (
        lambda: call(PGD(Linf(0.1, hi=np.ones((4, 2, 2))))),
        ValueError,
        r"Linf\.hi must broadcast .*got shape \(4, 2, 2\)",
    ),
    "threat is a number": (
        lambda: call(PGD(0.1)),
        TypeError,
        "threat must be a threat model such as .*got 0.1",
    ),
    "no steps": (lambda: call(PGD(Linf(0.1), steps=0)), ValueError, "steps must be a positive int"),
    "float steps": (
        lambda: call(PGD(Linf(0.1), steps=10.0)),
        ValueError,
        "steps must be a positive int, got 10.0",
    ),
    "unknown keep": (
        lambda: call(PGD(Linf(0.1), keep="best")),
        ValueError,
        "keep must be one of .*got 'best'",
    ),
    "no step size": (
        lambda: call(PGD(Linf(0.1), step_size=0.0)),
        ValueError,
        "step_size must be positive or None, got 0.0",
    ),
    "NaN step size": (lambda: call(PGD(Linf(0.1), step_size=np.nan)), ValueError, "positive or"),
    "two step sizes": (
        lambda: call(PGD(Linf(0.1), step_size=0.1, rel_step_size=0.1)),
        ValueError,
        "step_size or rel_step_size, not both",
    ),
    "momentum of another shape": (
        lambda: call(PGD(Linf(0.1), momentum=np.ones(3))),
        ValueError,
        "PGD.momentum must be a number or have one for each of the",
    ),
    "ids beyond 32 bits": (
        lambda: call(ids=np.arange(4) << 31),
        ValueError,
        "ids must fit in 32 bits",
    ),
    "negative momentum": (lambda: call(PGD(Linf(0.1), momentum=-1)), ValueError, "PGD.momentum"),
    "Gaussian start of none": (
        lambda: call(PGD(Linf(0.1), gaussian_start=0.1, random_start=False)),
        ValueError,
        "goes with random_start=True",
    ),
    "model is a module's variables": (
        lambda: call(fn={"w": jnp.ones(3)}),
        TypeError,
        r"logits_fn must be callable, got dict: .*models\.bind",
    ),
    "logits are not (B, C)": (
        lambda: call(fn=lambda x: logits_fn(x)[:, :, None]),
        ValueError,
        r"logits of shape \(4, classes\), got \(4, 3, 1\)",
    ),
    "model returns a pair": (
        lambda: call(fn=lambda x: (logits_fn(x), x)),
        ValueError,
        "logits_fn must map x",
    ),
    "model mixes examples up": (
        lambda: call(fn=lambda x: logits_fn(x)[:2]),
        ValueError,
        "must map",
    ),
    "model returns classes": (
        lambda: call(fn=lambda x: logits_fn(x).astype(jnp.int32)),
        TypeError,
        "floating point logits, got int32",
    ),
    "single logit": (
        lambda: call(fn=lambda x: logits_fn(x)[:, :1], y=0 * Y),
        ValueError,
        r"returns 1 logit .*jnp\.stack\(\[-z, z\], -1\) / 2",
    ),
    "DLR of two classes": (
        lambda: call(PGD(Linf(0.1), loss=losses.dlr), fn=two_classes, y=Y % 2),
        ValueError,
        r"dlr needs at least 3 classes, the model has 2; use losses\.margin",
    ),
    "targeted DLR of three classes": (
        lambda: call(PGD(Linf(0.1), loss=losses.dlr_targeted), targets=(Y + 1) % 3),
        ValueError,
        "dlr_targeted needs at least 4 classes",
    ),
    "targeted loss without targets": (
        lambda: call(PGD(Linf(0.1), loss=losses.dlr_targeted)),
        ValueError,
        "dlr_targeted is a targeted loss: pass targets=",
    ),
    "class instead of attack": (lambda: call(PGD), TypeError, "PGD.*: construct it first"),
    "factory instead of attack": (lambda: call(FGSM), TypeError, "expected an attack such as PGD"),
    "mistake inside a composition": (
        lambda: call(sequence(FGSM(Linf(0.1)), restarts(PGD(Linf(0.1), steps=0), 2))),
        ValueError,
        "steps must be a positive int",
    ),
    "restarts of a composition": (
        lambda: restarts(sequence(ATTACK), 2),
        TypeError,
        "restarts takes a single attack, got Sequence: put restarts around the members",
    ),
    "no restarts": (lambda: restarts(ATTACK, 0), ValueError, "positive int n, got 0"),
    "float restarts": (lambda: restarts(ATTACK, 2.0), ValueError, "positive int n, got 2.0"),
    "restarts without randomness": (
        lambda: restarts(FGSM(Linf(0.1)), 2),
        ValueError,
        "without a random start repeats itself",
    ),
    "restarts of the last point": (
        lambda: restarts(PGD(Linf(0.1), keep="last"), 2),
        ValueError,
        "keep='last' would return the last restart",
    ),
    "sequence of nothing": (lambda: sequence(), TypeError, "sequence takes one or more attacks"),
    "union of a class": (lambda: union(ATTACK, PGD), TypeError, "union takes one or more attacks"),
    "sequence that cannot stop": (
        lambda: sequence(ATTACK, PGD(Linf(0.1), keep="loss")),
        ValueError,
        "must stop at success: set keep='success', or use union",
    ),
    "black box without estimator": (
        lambda: call(fn=Untraceable()),
        TypeError,
        "needs gradients, which a Host model does not give: set estimator=",
    ),
    "black box inside jit": (
        lambda: jax.jit(lambda x: ESTIMATED(KEY, Untraceable(), x, Y))(X),
        TypeError,
        "a Host model cannot be traced by jit, vmap or grad",
    ),
    "black box under vmap": (
        lambda: jax.vmap(lambda x: Untraceable()(x))(X[None]),
        TypeError,
        "a Host model cannot be traced",
    ),
    "black box in a sweep": (
        lambda: jrobust.sweep(ESTIMATED, KEY, Untraceable(), X, Y, [0.1]),
        TypeError,
        "a Host model cannot be vmapped: call jrobust.run once for each radius",
    ),
    "black box of the wrong shape": (
        lambda: call(ESTIMATED, fn=drive.Host(lambda x: np.zeros(len(x)))),
        ValueError,
        r"Host model must return logits of shape \(4, classes\), got shape \(4,\)",
    ),
    "sweep over one number": (
        lambda: jrobust.sweep(ATTACK, KEY, logits_fn, X, Y, 0.1),
        ValueError,
        r"one-dimensional list of radii, got shape \(\)",
    ),
    "sweep over nothing": (
        lambda: jrobust.sweep(ATTACK, KEY, logits_fn, X, Y, []),
        ValueError,
        r"got shape \(0,\)",
    ),
    "sweep with one bad radius": (
        lambda: jrobust.sweep(ATTACK, KEY, logits_fn, X, Y, [0.1, 1.5]),
        ValueError,
        "eps = 1.5 is larger than the whole box",
    ),
    "sweep of a class": (
        lambda: jrobust.sweep(PGD, KEY, logits_fn, X, Y, [0.1]),
        TypeError,
        "construct it first",
    ),
    "estimator without a step": (
        lambda: call(PGD(Linf(0.1), estimator=CGE(0.0))),
        ValueError,
        "mu must be positive",
    ),
    "estimator lost to rounding": (
        lambda: call(PGD(Linf(0.1), estimator=CGE(1e-12))),
        ValueError,
        "mu=1e-12 is lost to rounding",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_has_its_error(mistake):
    act, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        act()


def test_the_base_of_the_table_is_no_mistake():
    """Were the defaults wrong themselves, entries could fail for the wrong reason."""
    assert isinstance(ATTACK, Attack)
    result = call()
    assert result.x.shape == X.shape
    assert call(targets=np.array([1, 2, 1, 2])).success.shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.float64(X)}, "must be float32"),
        ({"y": Y[:3]}, "y must be integers of shape"),
        ({"key": 0}, "typed PRNG key"),
        ({"attack": PGD(Linf(np.ones(3)))}, "one value for each of the 4 examples"),
    ],
)
def test_shapes_and_dtypes_are_checked_without_the_entry_too(change, message):
    """An attack called inside a user's own jit cannot look at values, but at all else."""
    given = {"attack": ATTACK, "key": KEY, "x": X, "y": Y} | change
    with pytest.raises((TypeError, ValueError), match=message):
        given["attack"](given["key"], logits_fn, given["x"], given["y"])
