"""Certification of models that are asked from Python: what is asked, logged, lost and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jrobust
from jrobust import loops, parallel, smoothing
from jrobust.data import Dataset
from jrobust.drive import Host
from jrobust.models import Bound
from jrobust.zeroth_order import BlackBox

KEY = jax.random.key(4)
ONE = parallel.mesh(jax.devices()[:1])
NOISE = smoothing.Gaussian(0.25)
N = 6
X = np.random.default_rng(0).uniform(size=(N, 3)).astype(np.float32)
DATA = Dataset(X, np.digitize(X[:, 0], [0.35, 0.65]), 40 + 3 * np.arange(N))
# Four rows to a batch, so that the last is filled with two that must not be asked about.
COMMON = {"n0": 10, "n": 60, "alpha": 0.1, "block": 20, "batch_size": 4, "mesh": ONE}
STAGED = {"n": None, "stages": (20, 60), "radius": 0.1}
MODES = {"plain": {}, "staged": STAGED, "anytime": {"anytime": True}}


def bands(params, extra, x):
    """Three classes by the first feature: comparisons alone decide, so that numpy agrees."""
    x = x[:, 0] + params
    return jnp.stack([0.35 - x, jnp.minimum(x - 0.35, 0.65 - x), x - 0.65], 1)


MODEL, TWIN = Bound(jnp.zeros(()), {}, bands), Bound(jnp.float32(0.02), {}, bands)


class Service:
    """The same bands in numpy, and what they were asked."""

    def __init__(self, fail_at=None):
        self.rows, self.seen, self.fail_at = 0, [], fail_at

    def __call__(self, x):
        if self.fail_at is not None and self.rows + len(x) > self.fail_at:
            raise KeyboardInterrupt
        self.rows += len(x)
        self.seen.append(np.array(x))
        x = x[:, 0]
        low, high = np.float32(0.35), np.float32(0.65)
        return np.stack([low - x, np.minimum(x - low, high - x), x - high], 1)


def certify(directory=None, *, model, data=DATA, noise=NOISE, **settings):
    settings = {**COMMON, "progress": False, **settings}
    return loops.certify(KEY, model, data, noise, directory=directory, **settings)


def assert_same(one, two):
    for name, value in vars(one.certificate).items():
        np.testing.assert_array_equal(value, getattr(two.certificate, name), err_msg=name)
    for name in ("select_counts", "estimate_counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_a_black_box_is_certified_as_the_compiled_model_is(mode, tmp_path):
    service = Service()
    found = certify(tmp_path, model=Host(service), **MODES[mode])
    assert_same(found, certify(model=MODEL, **MODES[mode]))
    assert service.rows == found.votes, "each copy is asked once, fillers never"
    every = np.concatenate(service.seen)
    assert len(np.unique(every, axis=0)) == len(every)
    assert np.isfinite(every).all()
    again = loops.recertify(tmp_path)
    assert_same(found, again)
    shorter = loops.recertify(tmp_path, n=20, stages=None, alpha=0.2)
    np.testing.assert_array_equal(shorter.estimate_counts.sum(1), 20)
    finished = certify(tmp_path, model=Host(Service(fail_at=0)), **MODES[mode])
    assert_same(found, finished)


def test_a_run_that_dies_asks_again_only_what_was_under_way(tmp_path):
    whole = certify(model=Host(Service()))
    asked, services = 0, []
    for limit in (47, 130, 200, None):
        services.append(Service(limit))
        try:
            found = certify(tmp_path, model=Host(services[-1]))
        except KeyboardInterrupt:
            continue
    asked = sum(service.rows for service in services)
    assert_same(found, whole)
    # A block of a batch, and with the first the votes that select: 4 (10 + 20) rows at most.
    assert found.votes < asked <= found.votes + 3 * 4 * 30
    assert found.resumed > 0


def test_a_black_box_with_a_log_pays_for_each_copy_once(tmp_path):
    """Killed four times, or cut off by its budget: what was under way is told from the log."""
    log, calls = tmp_path / "answers", []
    for budget in (70, 71, 200, None):
        box = BlackBox(Service(), budget=budget, batch_size=8, log=log)
        with box:
            try:
                found = certify(tmp_path / "run", model=box)
            except RuntimeError as error:
                calls.append(str(error))
            ledger = box.ledger
    assert len(calls) == 3
    assert "exceed the budget" in calls[0]
    assert ledger.paid == ledger.sent == found.votes == N * 70
    assert_same(found, certify(model=Host(Service())))


def test_answers_that_are_not_finite_are_rejects_and_copies_that_are_not_cost_nothing():
    service = Service()

    def broken(x):
        return np.where(x[:, :1] > 0.5, np.nan, service(x))

    found = certify(model=Host(broken))
    assert found.certificate.rejects.sum() > 20
    assert service.rows == found.votes

    @jrobust.algorithm
    class Bursting(smoothing.Gaussian):
        def sample(self, key, shape, dtype=jnp.float32):
            return jnp.where(jax.random.bernoulli(key), jnp.inf, super().sample(key, shape, dtype))

    service = Service()
    found = certify(model=Host(service), noise=Bursting(0.25))
    rejects = found.select_counts[:, -1].sum() + found.certificate.rejects.sum()
    assert 0.3 < rejects / found.votes < 0.7
    assert service.rows == found.votes - rejects


def test_a_compiled_model_votes_and_a_black_box_is_certified(tmp_path):
    """The box is asked for the pairs alone, of rows that are not fillers."""
    service, settings = Service(), {"voter": TWIN, "pairs": 40}
    found = certify(tmp_path, model=Host(service), **settings)
    exact = certify(model=MODEL, **settings)
    assert_same(found, exact)
    np.testing.assert_array_equal(found.disagreements, exact.disagreements)
    assert found.disagreements[:, :-1].sum() > 0
    assert service.rows == 40 * N
    assert_same(found, loops.recertify(tmp_path))
    with pytest.raises(ValueError, match=r"holds another run: .*variables_sha256"):
        certify(tmp_path, model=Host(service), **{**settings, "voter": MODEL})
    # The other way round: the box votes, a compiled model is certified.
    service, directory = Service(), tmp_path / "other"
    other = certify(directory, model=TWIN, voter=Host(service), pairs=40)
    assert service.rows == N * (10 + 60 + 40)
    assert_same(other, certify(model=TWIN, voter=MODEL, pairs=40))
    edited = Bound(TWIN.params, {}, lambda p, e, x: bands(p, e, 1.0 * x + 0.0))
    for model, named in ((MODEL, "variables_sha256"), (edited, "programs_sha256")):
        with pytest.raises(ValueError, match=f"holds another run: .*{named}"):
            certify(directory, model=model, voter=Host(service), pairs=40)


def test_a_twin_beside_a_black_box_casts_the_votes_that_were_counted(key):
    """Both programs of a half-precision model must round it alike: another one is not bounded."""

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.relu(nn.Dense(32, dtype=jnp.bfloat16)(x))
            return nn.LayerNorm(dtype=jnp.bfloat16)(nn.Dense(10, dtype=jnp.bfloat16)(hidden))

    x = jnp.asarray(np.random.default_rng(1).random((4, 16)), jnp.float32)
    variables = jax.jit(Twin().init)(jax.random.key(1), x)
    noise = smoothing.Gaussian(0.5)

    def twin(points):
        return Twin().apply(variables, points)

    def never(points):
        return np.eye(10)[np.zeros(len(points), int)]

    votes = smoothing.count_votes(key, twin, x, noise, 512, chunk=64)
    pairs = smoothing.count_disagreements(key, Host(never), twin, x, noise, 512, chunk=64)
    np.testing.assert_array_equal(pairs[:, 1:10], votes[:, 1:10])
    assert np.all(pairs[:, 0] == 0)


def test_denoised_smoothing_of_a_black_box(key):
    """A compiled denoiser in front of a service is one black box."""
    service = Service()
    half = jax.tree_util.Partial(lambda scale, x: scale * (x - 0.5) + 0.5, jnp.float32(0.5))
    model = smoothing.denoised(half, Host(service))
    found = certify(model=model)
    assert service.rows == found.votes
    plain = certify(
        model=Host(lambda x: service(np.float32(0.5) * (x - np.float32(0.5)) + np.float32(0.5)))
    )
    assert_same(found, plain)
    assert np.any(found.estimate_counts != certify(model=Host(service)).estimate_counts)


def test_the_log_of_a_black_box_is_that_of_its_data_and_settings(tmp_path):
    box = Host(Service())
    certify(tmp_path, model=box)
    for change, named in (
        ({"model": MODEL}, "programs_sha256"),
        ({"noise": smoothing.Gaussian(0.3)}, "noise"),
        ({"data": DATA[:5]}, "examples"),
        ({"data": Dataset(1 - DATA.x, DATA.y, DATA.id)}, "data_sha256"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: .*{named}"):
            certify(tmp_path, **{"model": box, **change})
    names = sorted(path.name for path in tmp_path.glob("batches/*"))
    assert names == [f"00-{i:06d}-{j:05d}.npz" for i in range(2) for j in range(3)]
    (tmp_path / "batches" / names[1]).rename(tmp_path / "batches" / "spare")
    (tmp_path / "batches" / names[4]).rename(tmp_path / "batches" / names[1])
    (tmp_path / "batches" / "spare").rename(tmp_path / "batches" / names[4])
    with pytest.raises(ValueError, match="copied or renamed"):
        certify(tmp_path, model=box)


def test_what_a_black_box_says_of_its_classes(tmp_path):
    """Labels and top are checked by the first votes, before those that estimate are paid for."""
    service = Service()
    for change, text in (
        ({"data": Dataset(DATA.x, DATA.y + 1, DATA.id)}, "3 classes"),
        ({"top": 3}, r"top must be in 1 \.\. 2"),
    ):
        service.rows = 0
        with pytest.raises(ValueError, match=text):
            certify(tmp_path / text[:3], model=Host(service), **change)
        assert service.rows == 4 * 10
    assert not list(tmp_path.glob("*/batches/*"))
    turn = []

    def fickle(x):
        turn.append(1)
        return service(x)[:, : 2 if len(turn) > 4 else 3]

    few = Dataset(DATA.x, 0 * DATA.y)
    with pytest.raises(ValueError, match="3 classes but now 2"):
        certify(tmp_path / "fickle", model=Host(fickle), data=few)
    assert len(list(tmp_path.glob("fickle/batches/*"))) == 3, "those before are kept"
    with pytest.raises(ValueError, match=r"C >= 2, got \(40, 1\)"):
        certify(model=Host(lambda x: x[:, :1]))
    with pytest.raises(ValueError, match="3 classes but voter 2"):
        certify(model=Host(service), voter=lambda v: v[:, :2], pairs=40, data=few)


def test_a_black_box_is_not_asked_inside_of_compiled_code(key):
    box = Host(Service())
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda x: smoothing.count_votes(key, box, x, NOISE, 9))(jnp.asarray(X))
    with pytest.raises(ValueError, match="no noisy copy of any input is finite"):
        smoothing.count_votes(key, box, jnp.full((1, 3), jnp.nan), NOISE, 9)


def test_the_plan_of_a_black_box():
    first, *_ = loops.certify.iter(
        KEY, Host(Service()), DATA, NOISE, **{**COMMON, "two_bounds": True}
    )
    assert first.plan.votes == N * 70
    assert first.plan.seconds > 0
    assert loops.certify.warm_up(KEY, Host(Service()), DATA, NOISE, **COMMON) == {}
