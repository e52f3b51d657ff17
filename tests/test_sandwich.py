"""The sandwich on half-spaces: the true distance is known, and so is what may lie inside it."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jrobust import parallel, smoothing
from jrobust.attacks import FMN, PGD, SimBA
from jrobust.data import Dataset
from jrobust.drive import Host
from jrobust.loops import _sandwich
from jrobust.loops._sandwich import Claims, Contradicted, sandwich
from jrobust.models import Bound
from jrobust.smoothing import Converted
from jrobust.threat import L0, L2, Linf

KEY = jax.random.key(3)
ONE = parallel.mesh(jax.devices()[:1])
SIGMA, D, N = 0.25, 3, 12
NORMAL = np.array([[2.0, -1.0, 0.5]], np.float32).T


def linear(params, extra, x):
    score = x @ params
    return jnp.concatenate([-score, score], 1) * 4


MODEL = Bound(jnp.asarray(NORMAL), {}, linear)
NOISE = smoothing.Gaussian(SIGMA)
WIDE = 4.0


def half_space(n=N):
    """Distances 0.1 to 0.6 on both sides; the boundary of the smoothed classifier is the same."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (n, D))
    unit = NORMAL[:, 0] / np.linalg.norm(NORMAL)
    wanted = np.linspace(0.1, 0.6, n) * np.where(np.arange(n) % 2, 1, -1)
    x = (x + (wanted - x @ unit)[:, None] * unit).astype(np.float32)
    return Dataset(x, (wanted > 0).astype(np.int64), 30 + np.arange(n)[::-1])


def distances(data):
    score = data.x.astype(np.float64) @ NORMAL[:, 0].astype(np.float64)
    return np.abs(score) / np.linalg.norm(NORMAL.astype(np.float64))


DATA = half_space()
TRUE = distances(DATA)
ATTACKS = {"FMN": FMN(L2(WIDE, -WIDE, WIDE), steps=20)}


def run(data=DATA, logits_fn=MODEL, noise=NOISE, attacks=None, **settings):
    settings = {"draws": 32, "votes": 1000, "rounds": 6, "batch_size": 12, **settings}
    if settings.get("certificate") is None and noise is not None:
        settings = {"n0": 30, "n": 2000, "alpha": 0.01, "box": None, **settings}
    settings = {"mesh": ONE, "progress": False, **settings}
    return sandwich(KEY, logits_fn, data, attacks or ATTACKS, noise, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandwich")
    return folder, run(directory=folder)


def test_the_true_distance_lies_between_radius_and_attack(finished):
    _, report = finished
    rows = report.examples
    assert np.all(rows["radius"] <= TRUE)
    assert np.all(rows["distance"] >= TRUE)
    certified = rows["prediction"] >= 0
    assert certified.sum() >= N - 1
    assert np.array_equal(rows["prediction"][certified], DATA.y[certified])
    # The verdict needs votes beyond the boundary, a known number of standard errors.
    level = 1e-6 / 6
    excess = SIGMA * stats.norm.ppf(0.5 + 1.3 * stats.norm.isf(level / 2) / 2 / np.sqrt(1000))
    assert np.all(rows["distance"][certified] <= 1.1 * (TRUE[certified] + excess))
    assert np.all(np.isin(rows["status"][certified], ["attacked"]))
    assert not report.failed
    assert report.contradictions == 0
    middle = report.summary()["ratio_quartiles"][1]
    assert 0.5 < middle < 1
    ratio = rows["radius"] / rows["distance"]
    assert middle in ratio
    assert np.mean(ratio[certified] <= middle) >= 0.4
    assert np.mean(ratio[certified] >= middle) >= 0.4


def test_points_are_those_whose_distance_is_told(finished):
    _, report = finished
    rows = report.examples
    hit = np.isfinite(rows["distance"])
    moved = np.linalg.norm(report.x.astype(np.float64) - DATA.x, axis=1)
    np.testing.assert_allclose(moved[hit], rows["distance"][hit], rtol=1e-9)
    assert np.all(moved[hit] <= rows["distance"][hit])
    assert np.all(report.x[~hit] == DATA.x[~hit])
    other = np.asarray(MODEL(jnp.asarray(report.x))).argmax(1)
    assert np.all(other[hit] != rows["prediction"][hit])


def test_what_is_on_disk_and_a_second_call(finished):
    folder, report = finished
    with open(folder / "examples.csv") as file:
        table = list(csv.DictReader(file))
    for name in ("id", "y", "prediction", "radius", "distance"):
        np.testing.assert_array_equal([float(row[name]) for row in table], report.examples[name])
    assert [row["status"] for row in table] == report.examples["status"].tolist()
    summary = json.loads((folder / "report.json").read_text())
    assert summary["attacked"] == np.sum(report.examples["status"] == "attacked")
    assert not summary["failed"]
    assert (folder / "sandwich.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "batches" / "1-000000.npz") as batch:
        assert np.all(batch["counts"].sum(-1) == 1000)
    assert json.loads((folder / "certify" / "report.json").read_text())["votes"] == N * 2030

    def counts(*args):
        raise AssertionError("counted again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sandwich._Judge, "counts", counts)
        again = run(directory=folder)
    for name, column in report.examples.items():
        np.testing.assert_array_equal(again.examples[name], column)
    np.testing.assert_array_equal(again.x, report.x)
    with pytest.raises(ValueError, match=r"another run: .* votes \(there 1000, here 500\)"):
        run(directory=folder, votes=500)


def test_a_certificate_that_is_too_long_fails_after_everything_was_saved(finished, tmp_path):
    """On a half-space the radius is tight, so 1.3 of it reaches across."""
    _, right = finished
    radius = 1.3 * np.maximum(right.certificate.radius, 0.97 * TRUE)
    broken = dataclasses.replace(right.certificate, radius=radius)
    with pytest.raises(Contradicted, match=r"of 12 certificates have an adversarial point") as info:
        run(certificate=broken, directory=tmp_path)
    report = info.value.report
    assert report.failed
    assert report.contradictions > report.allowed
    inside = report.examples["distance"] <= radius
    np.testing.assert_array_equal(report.examples["status"] == "contradicted", inside)
    assert 3 <= inside.sum() == report.contradictions
    assert f"{inside.sum()} of 12" in str(info.value)
    assert str(report.examples["id"][np.flatnonzero(inside)[0]]) in str(info.value)
    assert json.loads((tmp_path / "report.json").read_text())["failed"]
    assert len((tmp_path / "examples.csv").read_text().splitlines()) == N + 1
    assert report.summary()["ratio_largest"] > 1


def test_the_tightest_right_certificate_passes():
    """The surrogate's own boundary lies on either side of the true one: votes decide."""
    data = half_space(48)
    true = distances(data)
    # Wide slack in floating point, none in statistics.
    claims = Claims(data.y, true * (1 - 1e-6), "L2")
    report = run(data, certificate=claims, votes=200)
    assert report.contradictions == report.allowed == 0
    inside = report.claimed[0] < claims.radius
    assert inside.sum() > 8, "the surrogate alone would contradict"
    assert np.all(report.distances[0] >= true)
    assert np.sum(report.examples["status"] == "attacked") > 24


def test_votes_are_fresh_in_every_test_and_the_closest_point_counts(finished):
    folder, report = finished
    with np.load(folder / "batches" / "1-000000.npz") as batch:
        places, counts = batch["places"], batch["counts"]
    again = smoothing.count_votes
    fresh = jax.random.fold_in(KEY, _sandwich._VERDICTS)
    with np.load(folder / "attack-1" / "adversarial.npz") as found:
        towards, ids = found["x"], found["id"]
    x0 = DATA.x[[int(np.flatnonzero(DATA.id == i)[0]) for i in ids]]
    for test in (0, 3):
        points = x0 + places[test][:, None] * (towards.astype(np.float64) - x0)
        mine = again(
            fresh,
            MODEL,
            jnp.asarray(points, jnp.float32),
            NOISE,
            1000,
            start=1000 * test,
            ids=jnp.asarray(ids),
        )
        np.testing.assert_array_equal(counts[test], mine)
    # Two answers: the other one is said where its votes pass the two-sided test.
    rows = report.examples
    certified = np.flatnonzero(rows["prediction"] >= 0)
    other = np.take_along_axis(counts, (1 - rows["prediction"][certified])[None, :, None], 2)[
        ..., 0
    ]
    p = 2 * stats.binom.sf(other - 1, 1000, 0.5)
    said = np.where((other > 500) & (p <= 1e-6 / 6), places, np.inf).min(0)
    moved = np.linalg.norm(said[:, None] * (towards.astype(np.float64) - x0), axis=1)
    np.testing.assert_allclose(rows["distance"][certified], moved, rtol=1e-6)


# A black box


def test_a_black_box_is_certified_and_attacked_by_its_answers(tmp_path):
    asked = []

    def fn(x):
        asked.append(len(x))
        score = x @ NORMAL
        return 4 * np.concatenate([-score, score], 1)

    data, true = DATA[2:6], TRUE[2:6]
    settings = {"n": 400, "draws": 8, "votes": 200, "rounds": 4, "batch_size": 4}
    attack = {"SimBA": SimBA(L2(0.3, -WIDE, WIDE), queries=40)}
    report = run(data, Host(fn), attacks=attack, directory=tmp_path, **settings)
    rows, cost = report.examples, sum(asked)
    assert np.all(rows["radius"] <= true)
    assert np.all(rows["distance"] >= true)
    assert set(rows["status"]) == {"attacked", "standing"}
    # Votes, draws for each query of the attack and each look at its points, verdicts.
    claimed = report.claimed[0]
    hit = np.isfinite(claimed).sum()
    assert 0 < hit < 4, "rows of a batch are fillers"
    with open(tmp_path / "attack-1" / "examples.csv") as file:
        queries = sum(int(row["forwards"]) for row in csv.DictReader(file))
    looks = 4 + np.sum(np.isfinite(claimed) & (claimed > 0))
    assert cost == 4 * 430 + 8 * (queries + looks) + hit * 4 * 200
    again = run(data, Host(fn), attacks=attack, directory=tmp_path, **settings)
    assert sum(asked) == cost, "a finished run asks nothing"
    for name, column in rows.items():
        np.testing.assert_array_equal(again.examples[name], column)


# Deterministic certificates of the model itself


def test_deterministic_claims_allow_no_contradiction():
    attacks = [ATTACKS["FMN"], FMN(Linf(WIDE, -WIDE, WIDE), steps=20)]
    claims = Claims(DATA.y, 0.99 * TRUE, "L2")
    report = run(noise=None, certificate=claims, attacks=attacks)
    assert not report.failed
    assert report.verdict_alpha == 0
    np.testing.assert_array_equal(report.distances, report.claimed)
    # Measured in the certificate's norm, also those of an attack for another.
    assert np.all(report.distances[1] > report.distances[0])
    np.testing.assert_allclose(report.examples["distance"], TRUE, rtol=0.02)
    assert set(report.examples["attack"]) == {0}
    assert report.attacks == ("1 FMN", "2 FMN")
    radius = claims.radius.copy()
    radius[4] = 1.05 * TRUE[4]
    with pytest.raises(Contradicted, match="1 of 12") as info:
        run(noise=None, certificate=claims._replace(radius=radius), attacks=attacks[:1])
    assert np.flatnonzero(info.value.report.examples["status"] == "contradicted").tolist() == [4]
    # One that may be wrong with this probability.
    soft = claims._replace(radius=radius, alpha=0.05)
    assert run(noise=None, certificate=soft, attacks=attacks[:1]).contradictions == 1


def test_abstained_wrong_and_unreachable_examples():
    y = DATA.y.copy()
    y[1] = 1 - y[1]
    prediction = DATA.y.copy()
    prediction[2] = -1  # abstains
    prediction[3] = 1 - prediction[3]  # claims what the model does not even say at the input
    data = Dataset(DATA.x, y, DATA.id)
    near = FMN(L2(0.3, -WIDE, WIDE), steps=20)
    with pytest.raises(Contradicted) as info:
        run(data, noise=None, certificate=Claims(prediction, 0.5 * TRUE, "L2"), attacks=near)
    rows = info.value.report.examples
    assert (rows["status"][2], rows["distance"][2], rows["attack"][2]) == ("abstained", np.inf, -1)
    assert (rows["status"][3], rows["distance"][3]) == ("contradicted", 0.0)
    assert (rows["status"][1], rows["correct"][1]) == ("attacked", False)
    others = np.delete(np.arange(N), [2, 3])
    assert np.all(rows["status"][others] == np.where(TRUE < 0.3, "attacked", "standing")[others])
    assert np.all(np.isinf(rows["distance"][others][TRUE[others] > 0.3]))


def test_nothing_certified_attacks_nothing(tmp_path):
    claims = Claims(np.full(N, -1), np.zeros(N), "L2")
    report = run(certificate=claims, directory=tmp_path)
    assert set(report.examples["status"]) == {"abstained"}
    assert report.summary()["ratio_quartiles"] == [None] * 3
    assert not (tmp_path / "attack-1").exists()


def test_how_many_contradictions_are_allowed():
    """The binomial quantile, and one more fails."""
    for alpha, confidence in ((0.3, 0.9), (0.3, 0.99), (0.02, 0.99)):
        claims = Claims(DATA.y, 2 * TRUE, "L2", alpha)
        settings = {"noise": None, "certificate": claims, "confidence": confidence}
        with pytest.raises(Contradicted) as info:
            run(**settings)
        allowed = info.value.report.allowed
        assert allowed == stats.binom.ppf(confidence, N, alpha)
        radius = np.where(np.arange(N) < allowed, 2 * TRUE, 0.5 * TRUE)
        settings["certificate"] = claims._replace(radius=radius)
        assert run(**settings).contradictions == allowed


def test_distances_are_rounded_up():
    x0 = np.zeros((1, 2, 2), np.float32)
    x = np.array([[[0.1, 0.2], [0.0, -0.4]]], np.float32)
    exact = np.abs(x.astype(np.longdouble))
    for norm, true in (
        ("L1", exact.sum()),
        ("L2", np.sqrt((exact**2).sum())),
        ("Linf", exact.max()),
        ("L0", 2),
    ):
        found = _sandwich._length(norm, x, x0, pixels=True)[0]
        assert true <= found <= true * (1 + 1e-11)
    assert _sandwich._length("L0", x, x0, pixels=False)[0] == 3


def test_locations_are_counted_in_l0():
    def brightest(params, extra, x):
        total = x.sum((1, 2)) - 1.5
        return jnp.stack([-total, total], 1)

    x = np.zeros((2, 3, 1), np.float32)
    x[0], x[1, 0] = 1, 1
    noise = smoothing.Masking(keep=2, size=3)
    data = Dataset(x, np.array([1, 0]))
    attack = FMN(L0(3.0), steps=30)
    claims = Claims(np.array([1, 0]), np.array([0.0, 0.0]), "L0")
    report = run(data, Bound({}, {}, brightest), noise, attack, certificate=claims, batch_size=2)
    # Of three lit pixels two are seen always; of one, one or none: two more are needed to be sure.
    assert report.examples["distance"][0] in (1, 2)
    assert report.examples["distance"][1] in (1, 2)


def test_l0_counts_pixels_or_values_as_the_noise_or_the_attack_does():
    values = FMN(L0(3.0, pixels=False))
    assert not _sandwich._pixels(values, None)
    assert _sandwich._pixels(FMN(L0(3.0)), None)
    assert _sandwich._pixels(values, smoothing.Masking(keep=2, size=3))
    assert not _sandwich._pixels(FMN(L0(3.0)), smoothing.Masking(keep=2, size=3, pixels=False))


def test_a_plot_takes_axes(finished):
    from matplotlib.figure import Figure

    _, report = finished
    axes = Figure().add_subplot()
    assert report.plot(axes) is axes.get_figure()
    drawn = {c.get_label().split()[0]: c.get_offsets() for c in axes.collections}
    pairs = np.stack([report.examples["distance"], report.examples["radius"]], 1)
    chosen = report.examples["status"] == "attacked"
    np.testing.assert_allclose(drawn["attacked"], pairs[chosen])
    assert len(drawn["contradicted"]) == 0


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"noise": None}, ValueError, "nothing to put to the test"),
        ({"noise": smoothing.Gaussian(-1.0)}, ValueError, "sigma"),
        ({"noise": smoothing.DiscreteGaussian(0.25, D)}, ValueError, "grid"),
        ({"noise": Converted(smoothing.DiscreteGaussian(0.25, D), "Linf", D)}, ValueError, "grid"),
        ({"noise": smoothing.Mixed(NOISE, 0.8)}, TypeError, "about the mix"),
        ({"logits_fn": Host(lambda x: x)}, TypeError, "FMN needs gradients and a Host model has"),
        ({"noise": (NOISE, NOISE)}, TypeError, "not two halves"),
        ({"votes": 5}, ValueError, r"votes = 5 always abstain.*at least 24"),
        ({"rounds": 0}, ValueError, "rounds must be a positive int"),
        ({"verdict_alpha": 0.0}, ValueError, "verdict_alpha"),
        ({"confidence": 1.0}, ValueError, "confidence"),
        ({"attacks": {"a": 3}}, TypeError, "attacks must be"),
        ({"top": 2}, ValueError, "top = 1"),
        ({"certificate": Claims(DATA.y, TRUE, "L2"), "n": 9}, TypeError, "n: options of certify"),
        ({"attacks": PGD(L2(1e6, -WIDE, WIDE))}, ValueError, "eps"),
        ({"certificate": Claims(DATA.y[:3], TRUE, "L2")}, ValueError, r"prediction must be"),
        ({"certificate": Claims(DATA.y + 1, TRUE, "L2")}, ValueError, r"-1 \.\. 1, got"),
        ({"certificate": Claims(DATA.y, -TRUE, "L2")}, ValueError, "radius must be"),
        ({"certificate": Claims(DATA.y, TRUE, "Linf")}, ValueError, "norm must be L2"),
        ({"certificate": Claims(DATA.y, TRUE, "L2", 1.0)}, ValueError, r"alpha must lie"),
    ],
)
def test_mistakes_are_told_before_any_compute(settings, error, match, monkeypatch):
    monkeypatch.setattr(_sandwich, "certify", None)
    monkeypatch.setattr(_sandwich, "evaluate", None)
    with pytest.raises(error, match=match):
        run(**settings)


def test_certificates_of_another_kind_are_refused(finished):
    _, report = finished
    with pytest.raises(ValueError, match="about a smoothed classifier"):
        run(noise=None, certificate=report.certificate)
    with pytest.raises(ValueError, match="top = 1"):
        run(certificate=dataclasses.replace(report.certificate, top=2))
