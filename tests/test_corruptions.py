"""Corruptions against scipy, Pillow, colorsys and numpy; severities, keys, ranges and scores."""

import colorsys
import io
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

from jrobust.data import corruptions, synthetic
from jrobust.data.corruptions import (
    EXTRA,
    MNIST,
    NAMES,
    SEQUENCES,
    _common,
    _kernels,
    _mnist,
    _sequences,
    corrupt,
    sequence,
)

KEY = jax.random.key(7)
ONE = ("stripe", "dotted_line", "zigzag", "canny_edges")
# Whose constants change the kind of distortion with severity, not only its size.
TURNING = {
    "cifar10-c": {"glass_blur", "elastic_transform", "frost", "spatter", "saturate"},
    "imagenet-c": {"glass_blur", "elastic_transform", "frost", "snow", "spatter", "saturate"},
}


@pytest.fixture(scope="module")
def photos():
    return synthetic(24, 0, validation=0).train.x


@pytest.fixture(scope="module")
def strokes():
    """MNIST's shape: white digits on black."""
    x = synthetic(8, 0, validation=0).train.x[:, 2:30, 2:30, :1]
    return np.where(np.abs(x - x.mean((1, 2), keepdims=True)) > 0.15, x, 0).astype(np.float32)


def image(height=9, width=12, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(height, width, channels)).astype(np.float32)


def distortion(x, z):
    """Root mean square of an image's change, averaged over images."""
    return float(np.mean(np.sqrt(np.mean((np.asarray(z) - x) ** 2, (1, 2, 3)))))


def checked(name, severity, x, **options):
    z = np.asarray(corrupt(name, severity, KEY, x, **options))
    assert z.shape == x.shape
    assert z.dtype == x.dtype
    assert np.isfinite(z).all()
    assert z.min() >= 0
    assert z.max() <= 1
    return z


def test_the_names_are_those_of_the_papers():
    assert len(NAMES) == 15
    assert len(EXTRA) == 4
    assert len(MNIST) == 15
    assert len(set(NAMES) | set(EXTRA)) == 19
    assert set(corruptions._TABLE["imagenet-c"]) == set(NAMES) | set(EXTRA)


@pytest.mark.parametrize("name", NAMES + EXTRA)
def test_severities(name, photos):
    sizes = [distortion(photos, checked(name, s, photos)) for s in (0, 1, 3, 5)]
    assert sizes[0] == 0, "severity 0 is the identity"
    assert min(sizes[1:]) > 1e-3
    if name not in TURNING["cifar10-c"]:
        assert np.all(np.diff(sizes) > 0), sizes


@pytest.mark.full
@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", NAMES + EXTRA)
def test_all_severities(name, side, photos):
    x = np.asarray(jax.image.resize(photos[:6], (6, side, side, 3), "linear"))
    sizes = [distortion(x, checked(name, s, x)) for s in range(1, 6)]
    assert min(sizes) > 1e-3
    if name not in TURNING["cifar10-c" if side == 32 else "imagenet-c"]:
        # Motion blur of 32 pixels at severities 3 and 4 differs in the far end of its kernel alone.
        assert np.all(np.diff(sizes) > (-1e-4 if name == "motion_blur" else 0)), sizes


@pytest.mark.parametrize("name", MNIST)
def test_mnist(name, strokes):
    published = checked(name, None, strokes, benchmark="mnist-c")
    assert distortion(strokes, published) > 0.02
    np.testing.assert_array_equal(checked(name, 0, strokes, benchmark="mnist-c"), strokes)
    with pytest.raises(ValueError, match="severity of"):
        corrupt(name, 2 if name in ONE else 6, KEY, strokes, benchmark="mnist-c")


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in MNIST if n not in (*ONE, "spatter", "glass_blur")])
def test_severities_of_mnist(name, strokes):
    sizes = [distortion(strokes, checked(name, s, strokes, benchmark="mnist-c")) for s in (1, 5)]
    assert sizes[0] < sizes[1]


def test_frost_and_spatter_hide_more_of_the_image(photos):
    """What grows with the severity of frost is the share of the image that is not the image."""
    unexplained = []
    for severity in range(1, 6):
        z = checked("frost", severity, photos)
        pairs = zip(photos.reshape(len(photos), -1), z.reshape(len(z), -1))
        unexplained.append(np.mean([1 - np.corrcoef(a, b)[0, 1] ** 2 for a, b in pairs]))
    assert np.all(np.diff(unexplained) > 0)
    water = [distortion(photos, checked("spatter", s, photos)) for s in (1, 2, 3)]
    mud = [distortion(photos, checked("spatter", s, photos)) for s in (4, 5)]
    assert np.all(np.diff(water) > 0)
    assert np.all(np.diff(mud) > 0)


def test_an_example_draws_by_its_id(photos):
    x = photos[:6, :16, :16]
    order = np.array([4, 1, 5, 0, 3, 2])
    for name in ("gaussian_noise", "elastic_transform", "jpeg_compression"):
        one = corrupt(name, 3, KEY, x, ids=np.arange(6) + 9)
        two = corrupt(name, 3, KEY, x[order], ids=order + 9)
        np.testing.assert_array_equal(np.asarray(one)[order], two)
        if name != "jpeg_compression":
            assert np.any(one != corrupt(name, 3, KEY, x)), "other ids, other draws"
    noise = [np.asarray(corrupt(n, 1, KEY, x) - x)[0] for n in ("gaussian_noise", "speckle_noise")]
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.2


def test_everything_on_the_device_lowers_for_every_platform():
    def everything(key, x):
        small, large, strokes = x[:, :16, :16], x, x[:, :28, :28, :1]
        out = []
        for name in (*NAMES, *EXTRA):
            if name != "jpeg_compression":
                out += [corrupt(name, 3, key, small), corrupt(name, 3, key, large)]
        out += [corrupt(name, None, key, strokes, benchmark="mnist-c") for name in MNIST]
        return out + [sequence(name, key, small) for name in SEQUENCES]

    x = jnp.full((2, 65, 65, 3), 0.5)
    exported = jax.export.export(jax.jit(everything), platforms=("cpu", "cuda", "tpu"))(KEY, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")


# Against other implementations


def test_noise_has_its_distribution():
    x = np.full((40, 32, 32, 3), 0.5, np.float32)
    n = x.size
    gaussian = np.asarray(corrupt("gaussian_noise", 5, KEY, x) - x).ravel()
    assert scipy.stats.kstest(gaussian, scipy.stats.norm(0, 0.1).cdf).pvalue > 1e-4
    speckle = np.asarray(corrupt("speckle_noise", 3, KEY, x) - x).ravel()
    assert scipy.stats.kstest(speckle, scipy.stats.norm(0, 0.06).cdf).pvalue > 1e-4
    shot = np.rint(np.asarray(corrupt("shot_noise", 4, KEY, x)).ravel() * 75).astype(int)
    values = np.arange(20, 56)
    expected = scipy.stats.poisson(37.5).pmf(values)
    counts = np.array([np.sum(shot == v) for v in values])
    assert abs(counts.sum() / n - expected.sum()) < 1e-3
    assert scipy.stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-4
    impulse = np.asarray(corrupt("impulse_noise", 5, KEY, x))
    for value in (0, 1):
        assert scipy.stats.binomtest(int(np.sum(impulse == value)), n, 0.035).pvalue > 1e-4
    assert np.sum(impulse == 0.5) + np.sum(impulse == 0) + np.sum(impulse == 1) == n


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("mode", ["nearest", "reflect", "constant"])
def test_gaussian_blur_is_that_of_scipy(sigma, mode):
    x = image()
    expected = scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode=mode, truncate=3.0)
    found = _kernels.gaussian_blur(x, sigma, mode=mode, truncate=3.0)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("constants", [(1, 0.2), (1.5, 0.1), (6, 0.5), (10, 0.5)])
def test_defocus_is_a_correlation_with_a_soft_disk(constants):
    x, kernel = image(24, 25), _kernels.disk(*constants)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel, kernel.T)
    np.testing.assert_allclose(kernel, kernel[::-1])
    radius = constants[0]
    line = np.arange(-(len(kernel) // 2), len(kernel) // 2 + 1)
    lit = line[:, None] ** 2 + line[None] ** 2 <= radius**2
    inner = scipy.ndimage.binary_erosion(lit, np.ones((5, 5)), border_value=0)
    np.testing.assert_allclose(kernel[inner], 1 / lit.sum())
    expected = np.stack(
        [scipy.ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], -1
    )
    np.testing.assert_allclose(_kernels.convolve(x, kernel), expected, atol=2e-6)


@pytest.mark.parametrize(("angle", "step"), [(0, (0, 1)), (90, (1, 0)), (-135, (-1, -1))])
def test_motion_blur_runs_along_its_angle(angle, step):
    x = image()
    weights = np.exp(-0.5 * (np.arange(7) / 1.5) ** 2)
    weights /= weights.sum()
    expected = np.zeros_like(x)
    for i, w in enumerate(weights):
        # On a diagonal a step of i goes round(i / sqrt 2) pixels on both axes.
        along = int(np.ceil(i / np.sqrt(step[0] ** 2 + step[1] ** 2) - 0.5))
        back = int(np.ceil(-i / np.sqrt(step[0] ** 2 + step[1] ** 2) - 0.5))
        dy, dx = (along if s > 0 else back if s < 0 else 0 for s in step)
        rows = np.clip(np.arange(x.shape[0]) + dy, 0, x.shape[0] - 1)
        columns = np.clip(np.arange(x.shape[1]) + dx, 0, x.shape[1] - 1)
        expected += w * x[rows][:, columns]
    found = _kernels.motion_blur(x, 3, 1.5, jnp.float32(angle + 1e-3))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("side", "factor"), [(32, 1.0), (32, 1.13), (32, 2.25), (28, 4.5)])
def test_zoom_is_that_of_scipy(side, factor):
    x = image(side, side)
    crop = int(np.ceil(side / factor))
    top = (side - crop) // 2
    middle = x[top : top + crop, top : top + crop]
    grown = scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)
    trim = (len(grown) - side) // 2
    expected = grown[trim : trim + side, trim : trim + side]
    np.testing.assert_allclose(_kernels.zoom(x, factor), expected, atol=1e-5)


def test_zoom_blur_is_the_mean_of_zooms(photos):
    x = photos[0]
    factors = np.arange(1, 1.16, 0.01)
    expected = (x + sum(np.asarray(_kernels.zoom(x, f)) for f in factors)) / (len(factors) + 1)
    np.testing.assert_allclose(corrupt("zoom_blur", 3, KEY, x[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("share", [0.95, 0.85, 0.65, 0.25])
def test_pixelate_is_that_of_pillow(share):
    x = np.rint(image(32, 32) * 255).astype("u1")
    small = Image.fromarray(x).resize((int(32 * share),) * 2, Image.Resampling.BOX)
    expected = np.asarray(small.resize((32, 32), Image.Resampling.BOX), np.float32)
    found = np.asarray(_kernels.pixelate(jnp.float32(x / 255), share)) * 255
    assert np.abs(found - expected).max() <= 1.01  # Pillow rounds twice on the way


def test_jpeg_is_that_of_pillow(photos):
    file = io.BytesIO()
    Image.fromarray(np.rint(photos[1] * 255).astype("u1")).save(file, "JPEG", quality=58)
    expected = np.asarray(Image.open(file), np.float32) / 255
    np.testing.assert_array_equal(corrupt("jpeg_compression", 3, KEY, photos)[1], expected)
    grey = photos[:1, ..., :1]
    assert checked("jpeg_compression", 5, grey).shape == grey.shape


@pytest.mark.parametrize(
    ("name", "severity", "change"),
    [
        ("brightness", 3, lambda h, s, v: (h, s, min(v + 0.15, 1))),
        ("saturate", 2, lambda h, s, v: (h, 0.1 * s, v)),
        ("saturate", 5, lambda h, s, v: (h, min(2.5 * s + 0.2, 1), v)),
    ],
)
def test_colour_is_that_of_colorsys(name, severity, change):
    x = image(8, 8)
    x[0] = x[0, :, :1]  # greys
    x[1, 0] = 0
    expected = np.apply_along_axis(
        lambda rgb: colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*map(float, rgb)))), 2, x
    )
    np.testing.assert_allclose(corrupt(name, severity, KEY, x[None])[0], expected, atol=1e-6)


def test_contrast_keeps_the_mean(photos):
    z = checked("contrast", 4, photos)
    mean = photos.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(z - mean, 0.3 * (photos - mean), atol=1e-5)


def test_glass_exchanges_pixels():
    """Without its blur it only moves pixels, each at most as far as the swaps carry it."""
    x = np.arange(32 * 32, dtype=np.float32).reshape(1, 32, 32, 1) / 1024
    z = np.asarray(corrupt("glass_blur", 1, KEY, x))
    np.testing.assert_allclose(np.sort(z.ravel()), x.ravel(), atol=1e-6)
    moved = np.abs(z - x) > 1e-6
    assert moved[0, 1:31, 1:31].mean() > 0.5
    # Offsets are -1 and 0: row and column 31 take part, nothing goes below or right of them.
    half = np.asarray(corrupt("glass_blur", 1, KEY, x[:, :28, :28], benchmark="mnist-c"))
    assert half.shape == (1, 28, 28, 1)


def test_fog_is_diamond_and_square():
    key, decay, size = jax.random.key(3), 2.5, 16
    heights, wobble, step, level = np.zeros((size, size)), 100.0, size, 0
    while step >= 2:
        half, n = step // 2, size // step
        noise = (
            np.asarray(
                jax.random.uniform(jax.random.fold_in(key, level), (3, n, n), minval=-1, maxval=1)
            ).astype(float)
            * wobble**2
        )
        for i, j in itertools.product(range(n), repeat=2):
            r, c = i * step, j * step
            ring = [heights[(r + a) % size, (c + b) % size] for a in (0, step) for b in (0, step)]
            heights[r + half, c + half] = np.mean(ring) + noise[0, i, j]
        for i, j in itertools.product(range(n), repeat=2):
            for k, (r, c) in enumerate(((i * step, j * step + half), (i * step + half, j * step))):
                ring = [
                    heights[(r + a) % size, (c + b) % size]
                    for a, b in ((half, 0), (-half, 0), (0, half), (0, -half))
                ]
                heights[r, c] = np.mean(ring) + noise[k + 1, i, j]
        step, wobble, level = half, wobble / decay, level + 1
    heights -= heights.min()
    np.testing.assert_allclose(
        _kernels.plasma(key, size, decay), heights / heights.max(), atol=1e-5
    )
    x = jnp.float32(image(16, 16))
    brightest = x.max()
    expected = (x + 0.75 * _kernels.plasma(key, 16, 2.5)[..., None]) * brightest
    np.testing.assert_allclose(
        _common.fog(key, x, 0.75, 2.5), expected / (brightest + 0.75), atol=1e-5
    )


@pytest.mark.parametrize("outside", ["constant", "mirror", "reflect", "nearest"])
def test_sampling_is_that_of_scipy(outside):
    rng = np.random.default_rng(1)
    x, where = image(), rng.uniform(-6, 16, (2, 7, 11)).astype(np.float32)
    mode = "grid-constant" if outside == "constant" else outside
    expected = np.stack(
        [scipy.ndimage.map_coordinates(x[..., c], where, order=1, mode=mode) for c in range(3)],
        -1,
    )
    np.testing.assert_allclose(_kernels.sample(x, *where, outside), expected, atol=1e-5)


def test_elastic_of_severity_one_is_affine():
    """A linear ramp stays one, away from the border, and its middle moves little."""
    ramp = np.linspace(0, 1, 32, dtype=np.float32)
    x = np.stack(np.meshgrid(ramp, ramp, indexing="ij"), -1)
    z = np.asarray(_common.elastic_transform(KEY, np.pad(x, ((0, 0), (0, 0), (0, 1))), 0, 0, 0.08))
    inner = z[12:20, 12:20, :2]
    for axis in (0, 1):
        np.testing.assert_allclose(np.diff(inner, 2, axis), 0, atol=1e-5)
    points = np.array([[26, 26], [26, 6], [6, 6]])  # (column, row)
    draws = jax.random.uniform(jax.random.split(KEY, 3)[0], (3, 2), minval=-1, maxval=1)
    moved = np.asarray(points + 0.08 * 32 * draws)
    inside = (moved < 29).all(1)
    assert inside.any()
    for (column, row), place in zip(points[inside], moved[inside]):
        found = (
            scipy.ndimage.map_coordinates(z[..., 0], place[::-1, None], order=1),
            (scipy.ndimage.map_coordinates(z[..., 1], place[::-1, None], order=1)),
        )
        np.testing.assert_allclose(np.ravel(found) * 31, [row, column], atol=0.05)
    twisted = _common.elastic_transform(KEY, np.pad(x, ((0, 0), (0, 0), (0, 1))), 0.1, 0.04, 0.0)
    bent = np.asarray(twisted)[8:24, 8:24, :2] - x[8:24, 8:24]
    assert 0.1 < np.abs(bent).max() * 31 < 3.3


def test_snow_falls_and_whitens(photos):
    z = checked("snow", 4, photos)
    assert np.mean(z - photos) > 0.05
    white = np.maximum(photos, (photos @ np.float32(_kernels.LUMA))[..., None] * 1.5 + 0.5)
    base = 0.85 * photos + 0.15 * white
    layer = z - np.clip(base, 0, 1)
    assert layer.min() > -1e-5, "snow only adds light"
    open_sky = (z < 1).all(-1)
    np.testing.assert_allclose(layer.max(-1)[open_sky], layer.min(-1)[open_sky], atol=1e-5)


def test_frost_from_photographs(photos):
    textures = np.stack([np.full((40, 50, 3), v, np.float32) for v in (0.2, 0.8)])
    z = checked("frost", 3, photos, textures=textures)
    found = np.stack([np.clip(0.9 * photos + 0.4 * v, 0, 1) for v in (0.2, 0.8)])
    match = np.isclose(found, z[None], atol=1e-6).all((2, 3, 4))
    np.testing.assert_array_equal(match.sum(0), 1)
    assert 0 < match[0].sum() < len(photos)


def test_spatter_measures_distances_from_edges():
    edges = np.zeros((30, 26), bool)
    edges[4, 7] = edges[20:24, 3] = True
    exact = scipy.ndimage.distance_transform_edt(~edges)
    found = np.asarray(_common._distance(jnp.asarray(edges)))
    near = exact <= 20
    np.testing.assert_allclose(found[near], exact[near], rtol=1e-6)
    assert found[~near].min() > 20
    square = np.zeros((20, 20), np.float32)
    square[6:14, 5:15] = 255
    edge = np.asarray(_common._edges(jnp.asarray(square)))
    rim = scipy.ndimage.binary_dilation(square > 0) & ~scipy.ndimage.binary_erosion(square > 0)
    assert edge.any()
    assert not edge[~scipy.ndimage.binary_dilation(rim)].any()
    assert 20 < edge.sum() < 2 * 2 * (8 + 10)


def test_the_light_on_drops_by_numpy(photos):
    layer = np.floor(255 * scipy.ndimage.gaussian_filter(photos[0, ..., 0], 1.5))
    layer[layer < np.median(layer)] = 0
    distance = scipy.ndimage.distance_transform_edt(~np.asarray(_common._edges(jnp.asarray(layer))))
    mean = scipy.ndimage.uniform_filter(np.minimum(distance, 20), 3, mode="mirror")
    level = np.floor(mean + 1e-4).astype(int)
    share = np.cumsum(np.bincount(level.ravel(), minlength=21))
    lowest = share[level.min()]
    level = np.rint(255 * (share[level] - lowest) / (level.size - lowest))
    lit = [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]
    level = np.clip(scipy.ndimage.correlate(level, lit, mode="mirror"), 0, 255)
    expected = scipy.ndimage.uniform_filter(level, 3, mode="mirror")
    assert expected.std() > 20
    np.testing.assert_allclose(_common._relief(jnp.asarray(layer)), expected, atol=0.5)


def test_hysteresis_keeps_what_hangs_on_a_strong_pixel():
    rng = np.random.default_rng(0)
    weak = rng.uniform(size=(40, 40)) < 0.4
    strong = weak & (rng.uniform(size=(40, 40)) < 0.03)
    labels, count = scipy.ndimage.label(weak, np.ones((3, 3)))
    expected = np.isin(labels, np.setdiff1d(np.unique(labels[strong]), [0]))
    assert 1 < len(np.unique(labels[expected])) < count
    np.testing.assert_array_equal(_kernels.hysteresis(strong, weak), expected)
    assert not _kernels.hysteresis(np.zeros_like(weak), weak).any()


def test_canny_finds_a_step_where_it_is():
    x = np.zeros((28, 28), np.float32)
    x[:, 14:] = 1
    edges = np.asarray(_kernels.canny(jnp.asarray(x)))
    columns = np.flatnonzero(edges.any(0))
    assert set(columns) <= {13, 14}
    assert edges[1:-1].any(1).all()
    assert not np.asarray(_kernels.canny(jnp.asarray(0.05 * x))).any(), "below the threshold"
    disk = (np.hypot(*(np.indices((28, 28)) - 13.5)) < 8).astype(np.float32)
    rim = np.asarray(_kernels.canny(jnp.asarray(disk)))
    radius = np.hypot(*(np.argwhere(rim) - 13.5).T)
    assert 6.5 < radius.min() < radius.max() < 9.5
    assert scipy.ndimage.label(rim, np.ones((3, 3)))[1] == 1, "closed"


def test_mnist_geometry():
    x = jnp.float32(image(28, 28, 1))
    turned = _mnist.rotate(KEY, x, jnp.pi / 2)
    expected = [np.rot90(x, k) for k in (1, -1)]
    assert any(np.allclose(turned, e, atol=1e-4) for e in expected)
    moved = np.asarray(_mnist.translate(KEY, x, 3.0))
    assert any(
        np.allclose(np.roll(moved, s, (0, 1))[3:-3, 3:-3], x[3:-3, 3:-3], atol=1e-5)
        for s in itertools.product((3, -3), repeat=2)
    )
    assert (moved == 0).sum() >= 28 * 28 - 25 * 25
    smaller = np.asarray(_mnist.scale(KEY, jnp.ones((28, 28, 1)), 0.5))
    assert abs(smaller.sum() - 14 * 14) < 30
    assert smaller[:6].max() == 0
    sheared = np.asarray(_mnist.shear(KEY, x, 0.0))
    np.testing.assert_allclose(sheared, x, atol=1e-5)
    striped = np.asarray(_mnist.stripe(KEY, x))
    np.testing.assert_array_equal(striped[:, 7:21], x[:, 7:21])
    np.testing.assert_array_equal(striped[:, :7], 1 - x[:, :7])
    np.testing.assert_array_equal(striped[:, 21:], 1 - x[:, 21:])


def test_mnist_lines(strokes):
    black = np.zeros((64, 28, 28, 1), np.float32)
    dots = np.asarray(corrupt("dotted_line", None, KEY, black, benchmark="mnist-c"))[..., 0]
    empty = np.arange(28) // 2 % 2 == 0
    assert dots[:, :, empty].max() == 0
    assert (dots[:, :, ~empty][:, :, :-1].max(1) > 0.5).all(), "a line from side to side"
    zigzag = np.asarray(corrupt("zigzag", None, KEY, black, benchmark="mnist-c"))[..., 0]
    middle = [i for i in range(64) if zigzag[i, 5:-5].sum() > 0.9 * zigzag[i].sum()]
    assert middle
    for i in middle:
        ridge = zigzag[i].argmax(0)[4:24].astype(float)
        line = np.polyval(np.polyfit(np.arange(20), ridge, 1), np.arange(20))
        turns = np.sum(np.diff(np.sign(ridge - line)[np.abs(ridge - line) > 0.5]) != 0)
        assert turns >= 3
    assert (zigzag[:, :, :1] == 0).all()


# Sequences


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_grow_slowly(name, photos):
    x = photos[:3]
    frames = np.asarray(sequence(name, KEY, x))
    length = {"motion_blur": 21, "translate": 16}.get(name, 31)
    assert frames.shape == (3, length, *x.shape[1:])
    assert np.isfinite(frames).all()
    assert frames.min() >= 0
    assert frames.max() <= 1
    still = {"brightness": 15, "translate": 7, "rotate": 15, "tilt": 15, "scale": 15, "shear": 15}
    if name not in ("motion_blur", "gaussian_blur"):
        np.testing.assert_allclose(frames[:, still.get(name, 0)], x, atol=1e-4)
    steps = np.abs(np.diff(frames, axis=1)).mean((0, 2, 3, 4))
    assert (steps > 0).all()
    if "noise" not in name:
        whole = np.abs(frames[:, -1] - frames[:, 0]).mean()
        assert np.median(steps) < whole


def test_a_sequence_moves_as_it_says():
    x = np.zeros((1, 33, 33, 1), np.float32)
    x[0, 16, 20] = 1
    frames = np.asarray(sequence("translate", KEY, x))[0, ..., 0]
    found = [np.unravel_index(f.argmax(), f.shape) for f in frames]
    assert found == [(16, 20 + i - 7) for i in range(16)]
    frames = np.asarray(sequence("scale", KEY, x))[0, ..., 0]
    place = [(f * np.arange(33)).sum() / f.sum() for f in frames]
    np.testing.assert_allclose(np.array(place) - 16, 4 * (np.arange(31) * 2 + 70) / 100, atol=0.3)


def test_tilt_is_a_perspective():
    """The composition of rotations in space, inverted and sampled by numpy and scipy."""
    x, turn = image(15, 18, 1), np.deg2rad(7.5)
    height, width = x.shape[:2]
    far, cos, sin = np.hypot(height, width), np.cos(turn), np.sin(turn)
    up = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    about_y = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    plane = about_x @ about_y @ np.diag([1, 1, 0]) + np.diag([0, 0, far])
    lens = np.array([[far, 0, width / 2], [0, far, height / 2], [0, 0, 1]])
    back = np.linalg.inv(lens @ plane @ up)
    row, column = np.indices((height, width))
    u, v, w = np.einsum("ij,jhw->ihw", back, np.stack([column, row, np.ones_like(row)]))
    expected = scipy.ndimage.map_coordinates(
        x[..., 0], np.stack([v / w, u / w]), order=1, mode="grid-constant"
    )
    found = _sequences._tilt(jnp.asarray(x), jnp.float32(7.5))[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


# Scores


def test_mce_by_hand():
    errors = np.array([[0.1, 0.2], [0.3, 0.5]])
    reference = np.array([[0.2, 0.4], [0.4, 0.6]])
    assert corruptions.mce(errors, reference) == pytest.approx((0.5 + 0.8) / 2)
    assert corruptions.mce(reference, reference) == 1
    relative = corruptions.relative_mce(errors, 0.05, reference, 0.1)
    assert relative == pytest.approx((0.2 / 0.4 + 0.7 / 0.8) / 2)


def test_flips_by_hand():
    predictions = np.array([[1, 1, 2, 2, 1], [3, 3, 3, 3, 3]])
    assert corruptions.flip_probability(predictions) == pytest.approx(2 / 8)
    noisy = np.array([[1, 2, 2, 2, 3], [0, 0, 0, 0, 0]])
    assert corruptions.flip_probability(noisy, noise=True) == pytest.approx(4 / 8)
    assert corruptions.flip_rate([0.1, 0.3], [0.2, 0.2]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: corruptions.mce([[50.0]], [[0.5]]), "not percent"),
        (lambda: corruptions.mce([[0.5]], [[0.5, 0.2]]), "shapes must agree"),
        (lambda: corruptions.mce([[0.5]], [[0.0]]), "no errors"),
        (lambda: corruptions.relative_mce([[0.5]], 0.1, [[0.2]], 0.3), "no errors"),
        (lambda: corruptions.flip_probability([[1]]), "T >= 2"),
        (lambda: corruptions.flip_rate([0.1], [[0.1]]), "rates in"),
    ],
)
def test_bad_scores(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("fogg", 1), {}, ValueError, "cifar10-c has no corruption 'fogg'; it has gaussian"),
        (("fog", 6), {}, ValueError, r"severity of fog must be in 0 \.\. 5, got 6"),
        (("fog", None), {}, ValueError, "severity of fog"),
        (("fog", 1), {"benchmark": "c"}, ValueError, "benchmark must be one of cifar10-c"),
        (("stripe", 2), {"benchmark": "mnist-c"}, ValueError, r"0 \.\. 1"),
        (("fog", 1), {"textures": np.zeros((1, 9, 9, 3))}, ValueError, "fog takes none"),
        (("frost", 1), {"textures": np.zeros((1, 9, 9, 3))}, ValueError, "textures must be"),
        (("fog", 1), {"ids": np.arange(2)}, ValueError, r"ids must have shape \(3,\)"),
    ],
)
def test_bad_arguments(arguments, options, error, text):
    x = np.zeros((3, 16, 16, 3), np.float32)
    with pytest.raises(error, match=text):
        corrupt(*arguments, KEY, x, **options)


def test_bad_images():
    x = np.zeros((2, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match="must be images"):
        corrupt("fog", 1, KEY, x[0])
    with pytest.raises(TypeError, match="divide by 255"):
        corrupt("fog", 1, KEY, x.astype(np.uint8))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        corrupt("fog", 1, KEY, x + 2)
    with pytest.raises(ValueError, match="saturate needs images of 3 channels"):
        corrupt("saturate", 1, KEY, x[..., :1])
    with pytest.raises(TypeError, match="typed PRNG key"):
        corrupt("fog", 1, 0, x)
    with pytest.raises(ValueError, match="no sequence 'fog'"):
        sequence("fog", KEY, x)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda x: corrupt("jpeg_compression", 1, KEY, x))(x)
