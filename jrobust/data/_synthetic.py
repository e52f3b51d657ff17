"""A procedural image task of CIFAR's shape: real digits in cluttered, textured colour scenes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jrobust.data._dataset import Dataset
from jrobust.data._digits import Splits, digits

# Everything that reaches a pixel is integer arithmetic, or float64 +, -, *, / and rounding, which
# IEEE 754 fixes; random numbers are raw 64-bit words of PCG64, whose stream NumPy guarantees.

_SIDE = 32
_CHUNK = 1000  # images drawn from one stream; each chunk has equally many of every class
_FIRST_TEST = 1_000_000  # id of the first test image
_MAGNIFIED = 8  # atlas pixels for one pixel of a digit
_ATLAS = 10 * _MAGNIFIED  # side of a digit in the atlas, with an empty margin of one pixel
_TILES, _TILE = 96, 128  # textures, and their side
_BITS = 8  # of the fraction of fixed-point coordinates

# What makes the task as hard as it is; colours in 0 .. 255, sizes in pixels.
_GROUND = (70, 186)  # mean colour of the ground, each channel by itself
_SWING = 60  # by how much the texture moves it either way, at most
_CONTRAST = (28, 100)  # of what is drawn against the ground: all channels lighter, or all darker
_SIZE = (13.0, 24.0)  # side of the digit
_REACH = 6.0  # of its middle from that of the image, on each axis
_TURN = 0.25  # tan of half the largest rotation: 28 degrees
_CLUTTER = 5  # quarters of other digits under it
_GRAIN = 128  # largest strength of the noise: a deviation of 104.5 / 1024 times that


class _Draws:
    """Random integers from the raw words of a PCG64 stream."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Uniform int64 in ``low .. high - 1``, of range at most 2^32."""
        words = self._bits.random_raw(int(np.prod(shape))).reshape(shape)
        return low + (((words >> np.uint64(32)) * np.uint64(high - low)) >> np.uint64(32)).astype(
            np.int64
        )

    def numbers(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Uniform float64 in [low, high)."""
        return low + (high - low) * (self.integers(0, 1 << 32, *shape) / 4294967296.0)

    def bytes(self, *shape: int) -> np.ndarray:
        """Uniform uint8."""
        words = self._bits.random_raw(-(-int(np.prod(shape)) // 8)).astype("<u8")
        return words.view(np.uint8)[: int(np.prod(shape))].reshape(shape)


def _magnify(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8) in 0 .. 16, bilinearly to (N, 80, 80) uint8 in 0 .. 255, with a margin."""
    padded = np.pad(images.astype(np.int64), ((0, 0), (2, 2), (2, 2)))
    place, weight = divmod(2 * np.arange(_ATLAS) + 1 + _MAGNIFIED, 2 * _MAGNIFIED)
    for axis in (1, 2):
        low, high = padded.take(place, axis), padded.take(place + 1, axis)
        w = weight[:, None] if axis == 1 else weight
        padded = low * (16 - w) + high * w
    return (padded * 255 // 4096).astype(np.uint8)


def _textures(draws: _Draws) -> np.ndarray:
    """Periodic grey textures (96, 128, 128) uint8 over the full range: noise, stripes, cells."""
    noise = np.zeros((_TILES, _TILE, _TILE))
    line = np.arange(_TILE)
    roughness = draws.numbers(0.3, 1.1, _TILES, 1, 1)
    height = np.ones_like(roughness)
    for cells in (4, 8, 16, 32):
        octave = draws.numbers(-1, 1, _TILES, cells, cells)
        place, rest = divmod(line * cells, _TILE)
        w = rest / _TILE
        w = w * w * (3 - 2 * w)
        for axis in (1, 2):
            low, high = octave.take(place, axis), octave.take((place + 1) % cells, axis)
            octave = low + (high - low) * (w[:, None] if axis == 1 else w)
        noise += height * octave
        height = height * roughness
    periods = draws.integers(1, 9, 2, _TILES, 1, 1)
    down, across = periods[0] * line[:, None] / _TILE, periods[1] * line / _TILE
    bend = draws.numbers(0, 0.8, _TILES, 1, 1) * noise

    def wave(phase: np.ndarray) -> np.ndarray:
        return np.abs(phase - np.floor(phase) - 0.5)

    tiles = noise.copy()
    third = _TILES // 3
    tiles[third:] = wave(down + across + bend)[third:]
    tiles[2 * third :] = (wave(down + bend) * wave(across + bend))[2 * third :]
    low, high = tiles.min((1, 2), keepdims=True), tiles.max((1, 2), keepdims=True)
    return np.rint((tiles - low) / (high - low) * 255).astype(np.uint8)


_X = np.arange(_SIDE, dtype=np.int32)


def _coordinates(
    draws: _Draws, n: int, scale: tuple[float, float], turn: float, at: np.ndarray, origin: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of n images falls in a source: int32 (n, 32, 32) column and row.

    The source turns by up to ``2 atan(turn)`` either way about ``at`` (n, 2), where its point
    ``(origin, origin)`` lies; ``scale`` bounds the source pixels for one of the image.
    """
    t = draws.numbers(-turn, turn, n)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    size = draws.numbers(*scale, n)
    aspect = draws.numbers(0.85, 1.18, n)
    shear = draws.numbers(-0.25, 0.25, n)
    rows = (
        (size * aspect * (cos + shear * sin), size * aspect * (sin - shear * cos)),
        (-size / aspect * sin, size / aspect * cos),
    )
    found = []
    for across, down in rows:
        start = origin - across * at[:, 0] - down * at[:, 1]
        a, b, c = (np.rint(v * (1 << _BITS)).astype(np.int32) for v in (across, down, start))
        line = b[:, None] * _X + c[:, None]
        found.append((line[:, :, None] + (a[:, None] * _X)[:, None, :]) >> _BITS)
    return found[0], found[1]


def _digit(
    draws: _Draws,
    atlas: np.ndarray,
    which: np.ndarray,
    size: tuple[float, float],
    turn: float,
    reach: float,
    quarter: bool,
) -> np.ndarray:
    """Opacity (n, 32, 32) in 0 .. 256 of the digits ``which`` of the atlas, placed at random.

    ``size`` bounds the side in pixels, ``reach`` the distance of the middle from the image's on
    each axis; only a random ``quarter`` may be left, so that it cannot be read.
    """
    n = len(which)
    at = draws.numbers(15.5 - reach, 15.5 + reach, n, 2)
    scale = (8 * _MAGNIFIED / size[1], 8 * _MAGNIFIED / size[0])
    u, v = _coordinates(draws, n, scale, turn, at, _ATLAS / 2)
    keep: np.ndarray | bool = True
    if quarter:
        corner = draws.integers(0, 2, 2, n, 1, 1).astype(np.int32) * (_ATLAS // 2)
        keep = (u >= corner[0]) & (u < corner[0] + _ATLAS // 2)
        keep &= (v >= corner[1]) & (v < corner[1] + _ATLAS // 2)
    for place in (u, v):
        np.clip(place, 0, _ATLAS - 1, out=place)  # the margin of the atlas is empty
    start = (which * _ATLAS * _ATLAS).astype(np.int32)[:, None, None]
    level = atlas.ravel().take(start + v * _ATLAS + u).astype(np.int32)
    return np.clip(2 * level - 96, 0, 256) * keep  # strokes are solid, with soft edges


def _paint(canvas: np.ndarray, opacity: np.ndarray, colour: np.ndarray) -> None:
    canvas += ((colour - canvas) * opacity[..., None]) >> 8


def _scenes(
    pool: Dataset, atlas: np.ndarray, tiles: np.ndarray, seed: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images (1000, 32, 32, 3) uint8 with ids from ``first``, and their labels."""
    n, draws = _CHUNK, _Draws(seed, first)
    y = (np.argsort(draws.integers(0, 1 << 32, n), kind="stable") % 10).astype(np.int32)
    by_class = [np.flatnonzero(pool.y == label) for label in range(10)]
    sizes = np.array([len(members) for members in by_class])
    pick = (np.cumsum(sizes) - sizes)[y] + (draws.integers(0, 1 << 32, n) * sizes[y] >> 32)
    which = np.concatenate(by_class)[pick]

    def texture() -> np.ndarray:
        """(n, 32, 32, 1) in -128 .. 127: a tile scaled, turned and shifted."""
        start = draws.integers(0, _TILES, n) * _TILE * _TILE
        at = draws.numbers(0, _TILE, n, 2)
        u, v = _coordinates(draws, n, (0.7, 2.5), 1.0, at, 0.0)
        place = start.astype(np.int32)[:, None, None] + v % _TILE * _TILE + u % _TILE
        return tiles.ravel().take(place).astype(np.int32)[..., None] - 128

    def swing() -> np.ndarray:
        return draws.integers(-_SWING, _SWING + 1, n, 1, 1, 3).astype(np.int32)

    def ink() -> np.ndarray:
        """Colours (n, 1, 1, 3) in which digit and clutter do not differ."""
        sign = draws.integers(0, 2, n, 1, 1, 1) * 2 - 1
        return (ground + sign * draws.integers(*_CONTRAST, n, 1, 1, 3)).astype(np.int32)

    ground = draws.integers(*_GROUND, n, 1, 1, 3)
    canvas = ground.astype(np.int32) + (texture() * swing() >> 7)
    for _ in range(_CLUTTER):
        other = draws.integers(0, len(pool), n)
        _paint(canvas, _digit(draws, atlas, other, (14.0, 24.0), 1.0, 15.5, True), ink())
    opacity = _digit(draws, atlas, which, _SIZE, _TURN, _REACH, False)
    _paint(canvas, opacity, ink() + (texture() * swing() >> 8))
    # The sum of two uniform bytes less its mean: a triangle of standard deviation 104.5.
    grain = draws.bytes(2, n, _SIDE, _SIDE, 3).astype(np.int32).sum(0) - 255
    canvas += grain * draws.integers(0, _GRAIN, n, 1, 1, 1).astype(np.int32) >> 10
    return np.clip(canvas, 0, 255).astype(np.uint8), y


def _split(pool: Dataset, tiles: np.ndarray, seed: int, first: int, count: int) -> Dataset:
    """The images with ids ``first .. first + count - 1``, of the digits of ``pool``."""
    atlas = _magnify(np.rint(pool.x[..., 0] * 16))
    x = np.empty((count, _SIDE, _SIDE, 3), np.float32)
    y = np.empty(count, np.int32)

    def fill(start: int) -> None:
        images, labels = _scenes(pool, atlas, tiles, seed, start)
        here = slice(max(start - first, 0), min(start + _CHUNK - first, count))
        there = slice(here.start + first - start, here.stop + first - start)
        np.divide(images[there], np.float32(255), out=x[here])
        y[here] = labels[there]

    chunks = range(first - first % _CHUNK, first + count, _CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # NumPy computes outside of the GIL
        list(workers.map(fill, chunks))
    return Dataset(x, y, first + np.arange(count))


def synthetic(
    train: int = 50_000, test: int = 10_000, *, validation: int = 5_000, seed: int = 0
) -> Splits:
    """Real digits in cluttered, textured colour scenes: CIFAR's shape, made in seconds.

    Images are float32 (32, 32, 3) in [0, 1], multiples of 1/255; labels int32 in 0 .. 9, equally
    many of each in every thousand ids. A digit of :func:`digits`, 13 to 24 pixels wide, turned by
    up to 28 degrees, sheared, stretched and shifted by up to 6 pixels, lies in a random colour,
    lighter or darker than the ground, on one of 96 textures; quarters of five other digits in
    colours of the same distribution lie under it, noise of deviation 0 to 0.05 over all.

    Training images show training digits only, those for validation and test (clutter too) the
    digits of those splits: 1,197, 200 and 400 hands' work. Textures are common to all.

    Difficulty, measured: ``models.ResNet(20)`` after 6 epochs of 45,000 training images has 91.6%
    of 2,000 test images right (90.5% of validation, 94.3% of augmented training images) and none
    under PGD-20 at Linf 8/255: ``examples/train_cifar.py --data synthetic --model resnet20
    --objective standard --epochs 6 --test 2000 --attack-steps 20 --certify 0``, some 16 minutes on
    two CPU cores. All 60,000 images take 16 s of CPU (an EPYC core) and 740 MB.

    Args:
        train: ids of training and validation together, 0 .. train - 1.
        test: test images; ids from 1,000,000.
        validation: how many of the first, the last ids, go to validation.
        seed: same seed, same bits: integer arithmetic on raw PCG64 words. An image is a function
            of the seed, its id and its split alone, so that fewer examples are the first of more.

    Raises:
        TypeError, ValueError: for counts that are not, a ``validation`` larger than ``train``.
        ImportError: without scikit-learn (``pip install 'jrobust[data]'``).
    """
    counts = {"train": train, "test": test, "validation": validation, "seed": seed}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if validation > train or train > _FIRST_TEST:
        raise ValueError(
            f"validation is taken from train, of at most {_FIRST_TEST:,} images, got "
            f"validation={validation}, train={train}"
        )
    pools = digits()
    tiles = _textures(_Draws(seed))
    return Splits(
        train=_split(pools.train, tiles, seed, 0, train - validation),
        validation=_split(pools.validation, tiles, seed, train - validation, validation),
        test=_split(pools.test, tiles, seed, _FIRST_TEST, test),
    )
