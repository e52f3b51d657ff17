"""What holds for every algorithm, driven by the table in catalogue.py."""

import functools
import re

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrobust
from jrobust import attacks, keys
from jrobust._algorithm import describe
from jrobust._run import strong
from jrobust.attacks import with_eps
from jrobust.threat import L0, L2, Linf

BATCH = 16
# Two radii of each norm, and the norm of a perturbation (B, 2, 3) in float64.
RADII = {"Linf": (0.3, 0.1), "L2": (0.6, 0.2), "L1": (1.0, 0.3), "L0": (1.0, 0.0)}
NORMS = {
    "Linf": lambda move: np.abs(move).max((1, 2)),
    "L2": lambda move: np.sqrt((move**2).sum((1, 2))),
    "L1": lambda move: np.abs(move).sum((1, 2)),
    "L0": lambda move: (move != 0).any(2).sum(1),
}
RNG = np.random.default_rng(0)
INNER = np.float32(RNG.normal(size=(6, 8)))
OUTER = np.float32(RNG.normal(size=(8, 4)))


@jax.tree_util.register_pytree_node_class
class Net:
    """A small net that counts its traces."""

    traces = 0

    def __init__(self, inner=INNER, outer=OUTER):
        self.inner, self.outer = inner, outer

    def __call__(self, x):
        type(self).traces += 1
        return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ self.inner) @ self.outer

    def tree_flatten(self):
        return (self.inner, self.outer), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


NET = Net()
X = np.float32(RNG.uniform(0.1, 0.9, (BATCH, 2, 3)))
Y = np.asarray(NET(X)).argmax(1)
Y[0] = (Y[0] + 1) % 4
IDS = np.arange(BATCH) + 10


def standard(entry, place):
    """Whether the ``place``-th norm of an entry is tested in the standard tier."""
    return not entry.large and (place == 0 or (entry.own and not entry.also))


PAIRS = [
    pytest.param(
        entry,
        kind,
        id=f"{entry.name}-{kind.norm}",
        marks=() if standard(entry, place) else pytest.mark.full,
    )
    for entry in catalogue.ATTACKS
    for place, kind in enumerate(entry.threats)
]
OWN = [
    pytest.param(entry, id=entry.name, marks=() if entry.own else pytest.mark.full)
    for entry in catalogue.ATTACKS
]
# One with gradients, one without: how the loops run is not theirs to decide.
EVERY_WAY = [
    pytest.param(
        entry, id=entry.name, marks=() if entry.name in ("PGD", "Square") else pytest.mark.full
    )
    for entry in catalogue.ATTACKS
]


def threat(entry, factor):
    """The first threat model of an entry, at ``factor`` times the suite's radius."""
    kind = entry.threats[0]
    eps = factor * RADII[kind.norm][0]
    return kind(np.float32(np.ceil(eps) if kind is L0 else eps))


def assert_same(a, b):
    for name, left, right in zip(a._fields, a, b):
        np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize(("entry", "kind"), PAIRS)
def test_contract(entry, kind, key):
    eps, less = np.float32(RADII[kind.norm])
    attack = entry.make(kind(eps))
    result = jrobust.run(attack, key, NET, X, Y, ids=IDS)

    # Feasible, in float64.
    x = np.float64(result.x)
    norm = NORMS[kind.norm](x - X)
    assert np.all(norm <= eps + (0 if kind in (Linf, L0) else 1e-6))
    assert np.all((x >= 0) & (x <= 1))
    np.testing.assert_allclose(result.distance, norm, rtol=1e-5, atol=1e-7)

    # Measured, and a real attack.
    with jax.default_matmul_precision("highest"):
        fresh = np.asarray(NET(result.x)).argmax(1)
    np.testing.assert_array_equal(result.success, fresh != Y)
    clean = np.mean(np.asarray(NET(X)).argmax(1) == Y)
    assert clean == 1 - 1 / BATCH
    assert np.mean(~np.asarray(result.success)) <= clean - entry.gain
    np.testing.assert_array_equal(np.asarray(result.step) >= 0, result.success)
    assert np.all(np.asarray(result.forwards) >= 1)

    # One dtype for each field.
    for name, leaf in result._asdict().items():
        want = {"success": jnp.bool_, "step": jnp.int32}.get(
            name, jnp.int32 if name.endswith("wards") else jnp.float32
        )
        assert leaf.dtype == want, name
        assert leaf.shape[0] == BATCH, name

    # Order does not matter, the second call repeats, and neither traces again.
    traces = Net.traces
    order = np.random.default_rng(1).permutation(BATCH)
    shuffled = jrobust.run(attack, key, NET, X[order], Y[order], ids=IDS[order])
    assert_same(shuffled, jax.tree.map(lambda a: a[order], result))
    assert_same(jrobust.run(entry.make(kind(eps)), key, NET, X, Y, ids=IDS), result)
    smaller = jrobust.run(entry.make(kind(less)), key, NET, X, Y, ids=IDS)
    assert np.all(smaller.distance <= less + 1e-6)
    other = jrobust.run(attack, jax.random.key(7), NET, X, Y, ids=IDS)
    assert Net.traces == traces
    assert np.array_equal(other.x, result.x) != entry.random


@pytest.mark.parametrize("entry", OWN)
def test_targets_are_reached(entry, key):
    if not entry.targeted:
        with pytest.raises((TypeError, ValueError), match="target"):
            jrobust.run(entry.make(threat(entry, 1.0)), key, NET, X, Y, targets=(Y + 1) % 4)
        return
    targets = (Y + 1) % 4
    result = jrobust.run(
        entry.make(threat(entry, 1.4)),
        key,
        NET,
        X,
        Y,
        ids=IDS,
        targets=targets,
    )
    np.testing.assert_array_equal(result.success, np.asarray(NET(result.x)).argmax(1) == targets)
    assert np.mean(result.success) > 0.3


@pytest.mark.parametrize(("entry", "kind"), PAIRS)
def test_state_and_configuration_are_pytrees(entry, kind, key):
    attack = entry.make(kind(0.1))
    leaves, structure = jax.tree.flatten(attack)
    assert jax.tree.unflatten(structure, leaves) == attack
    assert jax.tree.structure(entry.make(kind(0.2))) == structure
    assert hash(structure) == hash(jax.tree.structure(entry.make(kind(0.1))))
    state = jax.eval_shape(
        lambda key, x, y: attack.init(keys.examples(key, y), x, y), key, X, jnp.asarray(Y)
    )
    assert all(leaf.shape[:1] == (BATCH,) for leaf in jax.tree.leaves(state))
    after = jax.eval_shape(lambda s: attack.step(NET, s), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        assert (before.shape, before.dtype) == (now.shape, now.dtype)
    assert "eps" in str(jrobust._algorithm.describe(attack))


@pytest.mark.parametrize("entry", EVERY_WAY)
def test_every_way_to_run_it_agrees(entry, key):
    """Eager, jit, vmap over eps, sharded jit, explicit mesh, shard_map, pmap, on eight devices."""
    model = threat(entry, 0.5)
    attack = entry.make(model)

    def call(x, y, ids):
        return attack(key, NET, x, y, ids=ids).success

    batch = jnp.asarray(X), jnp.asarray(Y), jnp.asarray(IDS)
    want = np.asarray(jrobust.run(attack, key, NET, *batch[:2], ids=batch[2]).success)
    assert want.sum() > 1
    got = {"eager": call(*batch), "jit": jax.jit(call)(*batch)}
    got["vmap"] = jax.jit(
        jax.vmap(lambda eps: with_eps(attack, eps)(key, NET, *batch[:2], ids=batch[2]).success)
    )(jnp.float32([0.01, model.eps]))[1]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    put = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, rows))
    got["sharded jit"] = jax.jit(call)(*map(put, batch))
    got["shard_map"] = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows))(
        *batch
    )
    explicit = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(explicit):
        got["explicit"] = jax.jit(call)(*(jax.device_put(a, rows) for a in batch))
    assert jax.typeof(got["explicit"]).sharding.spec == rows
    pairs = [a.reshape(8, 2, *a.shape[1:]) for a in batch]
    got["pmap"] = jax.pmap(call)(*pairs).reshape(-1)
    for name, flags in got.items():
        np.testing.assert_array_equal(flags, want, err_msg=name)


@pytest.mark.parametrize(("entry", "kind"), PAIRS)
def test_lowers_for_every_platform(entry, kind):
    attack = entry.make(kind(0.1))

    def call(seed, x, y):
        return attack(jax.random.key(seed), NET, x, y)

    exported = jax.export.export(jax.jit(call), platforms=("cpu", "cuda", "tpu"))(
        jnp.uint32(0), X, jnp.asarray(Y)
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, id=e.name, marks=pytest.mark.full if e.large else ())
        for e in catalogue.ATTACKS
    ],
)
def test_stays_in_float32_in_64_bit_mode(entry, key):
    """Where 64 bits are switched on, as for the model's sake, no loop changes its types."""
    with jax.enable_x64(True):
        for kind in entry.threats if entry.own else entry.threats[:1]:
            attack = entry.make(kind(0.1))
            got = jax.eval_shape(lambda x, y, a=attack: a(key, NET, x, y), X, Y)
            kinds = [leaf.dtype.name for leaf in got]
            assert kinds == ["float32", "bool", "int32", "float32", "float32", "int32", "int32"]


def test_numbers_become_float32_in_64_bit_mode():
    with jax.enable_x64(True):
        attack = strong(attacks.PGD(L2(jnp.asarray(0.1)), step_size=np.float64(0.1), momentum=1))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(attack)} == {"float32"}


@pytest.mark.parametrize("entry", catalogue.ATTACKS, ids=lambda e: e.name)
def test_is_public_and_documented(entry):
    for name in (entry.name, *entry.also):
        assert name in attacks.__all__
        assert getattr(attacks, name).__doc__
    text = getattr(attacks, entry.name).__doc__
    assert re.search(r"[A-Z][a-z]+ (et al\.|& [A-Z][a-z]+)[,]? \(?\d{4}", text), "a source"
    assert "Args:\n" in text


def test_the_table_is_complete():
    covered = {name for entry in catalogue.ATTACKS for name in (entry.name, *entry.also)}
    covered |= {name for names in catalogue.KERNELS["attacks"] for name in names}
    assert covered | catalogue.PROTOCOL == set(attacks.__all__)
    assert not covered & catalogue.PROTOCOL
    assert all(hasattr(attacks, name) for name in attacks.__all__)


def test_a_description_holds_no_large_arrays():
    """Those of an attack's starts would fill every report; a digest tells them apart."""
    starts = np.zeros((20, 2, 3), np.float32), np.arange(20) % 4
    found = describe(attacks.HopSkipJump(L2(1.0), starts=starts))["starts"]
    assert found[0]["shape"] == [20, 2, 3]
    assert found[1] == starts[1].tolist()
    other = describe(attacks.HopSkipJump(L2(1.0), starts=(starts[0] + 1, starts[1])))["starts"]
    assert found[0]["sha256"] != other[0]["sha256"]
