"""Black boxes attacked by sequences and unions: asked exactly what is counted, to the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import attacks, data, drive, keys, loops, parallel
from jrobust.attacks import PGD, SimBA, multi_targeted, sequence, union
from jrobust.loops import _queue
from jrobust.threat import L2
from jrobust.zeroth_order import CGE

KEY = jax.random.key(3)
ONE = parallel.mesh(jax.devices()[:1])
W = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
# The third and the fifth fall: their lanes take others while the rest go on.
X = np.random.default_rng(1).uniform(0.3, 0.7, (7, 4)).astype(np.float32)[[0, 1, 4, 2, 6, 3, 5]]
Y = (X @ W).argmax(1)
NOTHING = L2(1e-4)  # falls within


class Box:
    """Counts the rows it is asked about, and refuses to go on for ever."""

    def __init__(self, most=2000):
        self.rows, self.most = np.zeros(len(X), int), most

    def __call__(self, x):
        for row in x:
            self.rows[np.abs(X - row).max(1).argmin()] += 1
        assert self.rows.sum() <= self.most, "asked and asked again"
        return x @ W

    @property
    def host(self):
        return drive.Host(self)


def members():
    """Of unequal lengths, the second with surroundings that its last point must not cost."""
    estimated = PGD(NOTHING, steps=2, estimator=CGE(1e-5), random_start=False)
    return SimBA(NOTHING, queries=5, step_size=1e-5), estimated


COSTS = 5, 2 * CGE(1e-5).queries(X[0]) + 1


@pytest.mark.parametrize("compose", [sequence, union])
def test_every_member_costs_what_it_costs_alone(compose):
    box = Box()
    found = jrobust.run(compose(*members()), KEY, box.host, X, Y)
    np.testing.assert_array_equal(found.forwards, np.full(len(X), sum(COSTS)))
    np.testing.assert_array_equal(box.rows, found.forwards)


@pytest.mark.parametrize("compose", [sequence, union])
def test_lanes_at_different_members(compose):
    """Three lanes for seven examples, refilled as they end, soon at different places."""
    box = Box()
    report = loops.evaluate(
        KEY,
        box.host,
        data.Dataset(X, Y),
        compose(SimBA(L2(0.05), queries=9, step_size=0.02), *members()),
        batch_size=3,
        mesh=ONE,
        checks=False,
        progress=False,
    )
    robust = report.examples["robust"]
    assert 0 < robust.sum() < len(X)
    # The clean pass, what the attack counts, and one verdict for each claim.
    np.testing.assert_array_equal(box.rows, 1 + report.examples["forwards"] + ~robust)


def test_lanes_that_hold_nothing_keep_nobody_waiting():
    """Of a model with three classes, which takes zeros for another than 0, they would try nine."""
    attack = sequence(multi_targeted(PGD(NOTHING, steps=2), 9), PGD(NOTHING, steps=2))

    def centred(x):
        return (x - 0.5) @ W

    assert centred(np.zeros(4)).argmax() != 0
    x, y, ids = jnp.asarray(X), jnp.asarray(centred(X).argmax(1)), jnp.arange(len(X))
    held = np.arange(len(X)) < 2
    state = _queue.blank(attack, KEY, x, y, ids)
    run, model = jax.jit(_queue.program(0)), jax.tree_util.Partial(centred)
    _, done, found = run(attack, KEY, model, None, 12, 0, state, held, held, x, y, ids)
    assert np.all(np.asarray(done)[held])
    alone = attack.result(
        drive.run(attack, centred, attack.init(keys.examples(KEY, ids[:2]), x[:2], y[:2]))
    )
    np.testing.assert_array_equal(np.asarray(found.forwards)[held], alone.forwards)


def test_starts_may_be_the_examples_themselves():
    """As many as there are examples, but the same for all of them."""
    attack = attacks.HopSkipJump(L2(1.0), queries=12, starts=(X, Y))
    report = loops.evaluate(
        KEY, Box().host, data.Dataset(X, Y), attack, checks=False, progress=False
    )
    assert np.all(report.examples["step"] == 1)
