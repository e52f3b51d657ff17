"""Counts of votes by image and block of samples: on disk, and the certificates they give.

The log is ``batches/STAGE-NUMBER.npz``, one file for each batch of images and stage, written whole,
or, where a black box votes, one ``batches/STAGE-NUMBER-BLOCK.npz`` for each block of them, so that
an interruption costs no more:

* ``index``, ``id``, ``y`` (R,): positions in the data set, ids and labels of the images,
* ``start``: the first sample; ``estimate`` (R, blocks, C + 1): counts of each block of samples,
* in the first stage ``select`` (R, C + 1), and of a fast voter ``disagree`` (R, blocks, C + 1),
* ``run``: a digest of ``configuration.json``, so that no file is taken for another run's.

Of two halves (:func:`jrobust.smoothing.halves`) all counts have an axis of 2 before the last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jrobust import smoothing
from jrobust._algorithm import describe
from jrobust.loops._folder import Arrays, stored_configuration
from jrobust.loops._lanes import check_count
from jrobust.smoothing._noise import check_size
from jrobust.smoothing._staged import Rule as Bounds
from jrobust.smoothing._staged import rule as bounds_of
from jrobust.smoothing._staged import shared, staged
from jrobust.statistics._binomial import check_probability

# A block holds at least this many samples where the stages allow it; no log has more blocks.
_BLOCK = 1000
_BLOCKS = 10_000


class Missing(LookupError):
    """Certificates need votes that have not been counted.

    Attributes:
        rows: positions of the images.
        n: the votes that each of them needs.
    """

    def __init__(self, rows: np.ndarray, n: int) -> None:
        super().__init__(f"{len(rows)} images have fewer than {n} votes")
        self.rows, self.n = rows, n


@dataclasses.dataclass(frozen=True)
class Rule:
    """How certificates follow from counts.

    Attributes:
        bounds: from the counts of one stage.
        alpha: of all stages together.
        stages: total votes after each stage; one stage where all images get the same votes.
        radius: what the stages stop at.
    """

    bounds: Bounds
    alpha: float
    stages: tuple[int, ...]
    radius: float | None = None

    @property
    def pairs(self) -> int:
        """Samples shown to both models where a fast one votes, else 0."""
        return self.bounds.pairs

    def certificate(
        self,
        select: np.ndarray,
        vote: Callable[[np.ndarray, int, int], np.ndarray],
        disagreements: np.ndarray,
    ) -> smoothing.Certificate:
        """Certificates from the votes that ``vote`` has; see :func:`smoothing.certify_staged`."""
        if self.pairs:
            votes = vote(np.arange(len(select)), 0, self.stages[-1])
            return self.bounds.certify(select, votes, self.alpha, disagreements)
        return staged(self.bounds, select, vote, self.stages, self.radius, self.alpha)

    def plan(self, images: int, n0: int, classes: int | None, **known: Any) -> smoothing.Plan:
        """What a run by this rule can prove and costs; see :func:`smoothing.plan`."""
        bounds = self.bounds
        return smoothing.plan(
            bounds.noise,
            self.stages,
            self.alpha,
            n0=n0,
            images=images,
            radius=self.radius,
            top=bounds.top,
            two_bounds=bounds.two_bounds,
            pairs=bounds.pairs,
            anytime=bounds.anytime,
            classes=classes,
            **known,
        )

    def settings(self) -> dict[str, Any]:
        """The rule in a run's configuration."""
        bounds = self.bounds
        share = shared(bounds, self.stages, self.radius, self.alpha)
        return {
            "n": self.stages[-1],
            "alpha": self.alpha,
            "stages": list(self.stages) if len(self.stages) > 1 else None,
            "radius": self.radius,
            "top": bounds.top,
            "two_bounds": bounds.two_bounds,
            "anytime": bounds.anytime,
            "pairs": self.pairs or None,
            "radius_ceiling": bounds.ceiling(self.stages[-1], share),
        }


def rule(
    noise: Any,
    *,
    alpha: float,
    n: int | None,
    stages: Any,
    radius: float | None,
    top: int,
    two_bounds: bool,
    anytime: bool,
    pairs: int | None,
) -> Rule:
    """The rule with these settings; ``ValueError`` for combinations that make no sense."""
    alpha = float(check_probability("alpha", alpha))
    if stages is None:
        if radius is not None:
            raise ValueError(
                f"radius={radius} is what stages stop at: give stages= too, such as (100, 1000, "
                "10000); without stages all images get n votes and every radius is certified"
            )
        stages = (10_000 if n is None else n,)
    else:
        if not isinstance(stages, Sequence):
            raise TypeError(f"stages must be a list of total votes, got {stages!r}")
        stages = tuple(stages)
        if not stages or (n is not None and n != stages[-1]):
            raise ValueError(
                f"n={n} and stages={stages}: stages are total votes, the last is n; leave n out"
            )
        if pairs is not None and len(stages) > 1:
            raise ValueError(
                "a certificate from a fast voter has one stage: give n= in place of stages="
            )
    for count in stages:
        check_count("n" if len(stages) == 1 else "each of stages", count)
    if stages[-1] >= 2**31:
        raise ValueError(f"n must be below 2^31, got {stages[-1]}")
    if pairs is not None:
        check_count("pairs", pairs)
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    bounds = bounds_of(noise, top=top, two_bounds=two_bounds, anytime=anytime, pairs=pairs or 0)
    shared(bounds, stages, radius, alpha)
    return Rule(bounds, alpha, stages, radius)


def block_size(made: Rule, block: int | None) -> int:
    """Samples in a block: they divide the votes of every stage, and the pairs.

    Raises:
        ValueError: for a block that does not; where the log would be absurdly fine.
    """
    totals = [*made.stages, *([made.pairs] if made.pairs else [])]
    most = math.gcd(*totals)
    if block is None:
        small = (d for d in range(1, math.isqrt(most) + 1) if most % d == 0)
        divisors = sorted({d for one in small for d in (one, most // one)})
        block = next(d for d in divisors if d >= min(_BLOCK, most))
    check_count("block", block)
    if most % block:
        raise ValueError(
            f"block = {block} does not divide {', '.join(map(str, totals))}: the log keeps whole "
            f"blocks, so that all stages and pairs are multiples of one; take a divisor of {most}"
        )
    if made.stages[-1] // block > _BLOCKS:
        raise ValueError(
            f"the log would have {made.stages[-1] // block} blocks of {block} samples for each "
            f"image: take larger blocks; stages and pairs must be multiples of one ({totals} are "
            f"multiples of {most})"
        )
    return block


class Votes:
    """Counts of a data set's images, added up to the stages of a rule.

    Attributes:
        select: (N, C + 1) int32 votes that select.
        disagreements: (N, C + 1) int32, zeros without a fast voter.
    """

    def __init__(self, total: int, made: Rule, block: int) -> None:
        self._rule, self._block = made, block
        self._held = np.zeros(total, np.int64)
        self._allocate(())

    def _allocate(self, shape: tuple[int, ...]) -> None:
        total = len(self._held)
        self.select, self.disagreements = np.zeros((2, total, *shape), np.int32)
        self._fresh = np.zeros((len(self._rule.stages), total, *shape), np.int32)

    def enter(self, batch: Arrays) -> None:
        """Take the counts of one file; ``ValueError`` where those before are missing."""
        rows, start, blocks = batch["index"], int(batch["start"]), batch["estimate"]
        if self.select.ndim == 1:  # the first file says of how many classes
            self._allocate(blocks.shape[2:])
        gaps = np.sum(self._held[rows] != start)
        if gaps:
            raise ValueError(
                f"votes of {gaps} images begin at sample {start}, but those before are not there, "
                "or twice: files of this log have been deleted, copied or renamed; the call that "
                "made it counts again what is missing"
            )
        if start == 0:
            self.select[rows] = batch["select"]
            if self._rule.pairs:
                pairs = batch["disagree"][:, : self._rule.pairs // self._block]
                self.disagreements[rows] = pairs.sum(1, dtype=np.int32)
        for stage, ends in enumerate(itertools.pairwise((0, *self._rule.stages))):
            first, last = (max(0, end - start) // self._block for end in ends)
            self._fresh[stage, rows] += blocks[:, first:last].sum(1, dtype=np.int32)
        self._held[rows] = start + blocks.shape[1] * self._block

    def certify(self, rows: np.ndarray) -> tuple[smoothing.Certificate, np.ndarray]:
        """Certificates of the images ``rows``, and the votes (R, C + 1) that the rule asked for.

        Raises:
            Missing: where the rule asks for votes that are not there.
        """
        used = np.zeros_like(self._fresh[0, rows])

        def vote(asked: np.ndarray, start: int, n: int) -> np.ndarray:
            images = rows[asked]
            late = images[self._held[images] < start + n]
            if len(late):
                raise Missing(late, start + n)
            counts = self._fresh[self._rule.stages.index(start + n), images]
            used[asked] += counts
            return counts

        found = self._rule.certificate(self.select[rows], vote, self.disagreements[rows])
        return found, used

    def settle(
        self, rows: np.ndarray
    ) -> tuple[np.ndarray, smoothing.Certificate | None, np.ndarray]:
        """Which of ``rows`` the rule has done with, their certificates, and the others."""
        try:
            return rows, self.certify(rows)[0], rows[:0]
        except Missing as missing:
            done = np.setdiff1d(rows, missing.rows)
            return done, self.certify(done)[0] if len(done) else None, missing.rows


def compact(counts: np.ndarray, most: int) -> np.ndarray:
    """Counts that are at most ``most``, in the smallest unsigned integers that hold it."""
    return counts.astype(np.min_scalar_type(most))


def digest(configuration: dict[str, Any]) -> str:
    """What tells a run's files from others'."""
    kept = {name: value for name, value in configuration.items() if name != "devices"}
    text = json.dumps(kept, sort_keys=True, default=float)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(directory: pathlib.Path, stored: dict[str, Any]) -> Iterator[Arrays]:
    """The files of a log in order, each checked; ``stored`` is the run's configuration.

    Raises:
        ValueError: for a file that is truncated, damaged or another run's. Nothing is changed.
    """
    run = digest(stored)
    for path in sorted(directory.glob("batches/*.npz")):
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                batch = dict(file)
            wrong = _wrong(batch, stored, run)
        except Exception as error:  # what zipfile raises of a changed byte is no closed list
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise ValueError(
                f"{path} is damaged or not of this run ({wrong}): nothing was changed. Put back a "
                "copy of it, or delete this one file: the call that made the log then counts its "
                "votes again, and no others"
            )
        yield batch


def _wrong(batch: Arrays, stored: dict[str, Any], run: str) -> str | None:
    """What is wrong with a file, None if nothing; ``KeyError`` for an array that is not there."""
    if str(batch["run"]) != run:
        return f"written by run {batch['run']}, not by {run}"
    index, block = batch["index"], stored["block"]
    if not len(batch["id"]) == len(batch["y"]) == len(batch["estimate"]) == len(index):
        return "arrays of different lengths"
    places = np.unique(index)
    if len(places) != len(index) or places[0] < 0 or places[-1] >= stored["examples"]:
        return f"index is not of {stored['examples']} examples"
    sums = {"estimate": block}
    if batch["start"] == 0:
        sums["select"] = stored["n0"]
        if stored["pairs"]:
            sums["disagree"] = block
    answers = batch["estimate"].shape[2:]
    for name, samples in sums.items():
        counts = batch[name]
        shape = (len(index), *(() if name == "select" else counts.shape[1:2]), *answers)
        whole = counts.dtype.kind in "iu" and np.all(counts.sum(-1, dtype=np.int64) == samples)
        if counts.shape != shape or not whole or np.any(counts < 0):
            return f"{name} are not counts of {samples} samples each"
    return None


def verify(directory: pathlib.Path, wanted: dict[str, Any]) -> None:
    """Read all of a log, if it is that of the run ``wanted``, before anything is written there."""
    stored = stored_configuration(directory)
    if stored and digest(stored) == digest(wanted):
        for _ in read(directory, stored):
            pass


def source_of(noise: Any) -> str:
    """Where the classes of a noise, and of all in it, come from."""
    if isinstance(noise, (tuple, list)):
        return next((name for name in map(source_of, noise) if name != "jrobust"), "jrobust")
    inner = getattr(noise, "noise", None)
    if not type(noise).__module__.startswith("jrobust."):
        return type(noise).__module__
    return "jrobust" if inner is None else source_of(inner)


def noise_of(stored: dict[str, Any], given: Any) -> Any:
    """The noise of a run: made from its configuration, or ``given`` if that draws the same.

    Raises:
        ValueError: where it does not; where one is not given that is not jrobust's, or that the
            configuration names by a digest.
    """

    def drawn(said: Any) -> Any:
        """Of a radius that is only stated in another norm, the noise itself."""
        converted = isinstance(said, dict) and said["name"] == smoothing.Converted.__name__
        return drawn(said["noise"]) if converted else said

    def made(value: Any) -> Any:
        if isinstance(value, dict):
            if "sha256" in value:
                raise ValueError("the log names an array of its noise by a digest: pass noise=")
            fields = {name: made(part) for name, part in value.items() if name != "name"}
            return getattr(smoothing, value["name"])(**fields)
        if isinstance(value, list) and any(isinstance(part, dict) for part in value):
            return tuple(map(made, value))
        return np.asarray(value) if isinstance(value, list) else value

    if given is None and stored["noise_from"] != "jrobust":
        raise ValueError(
            f"the log's noise {stored['noise']} is from {stored['noise_from']}: pass it with noise="
        )
    noise = made(stored["noise"]) if given is None else given
    said = json.loads(json.dumps(describe(noise), default=float))
    if drawn(said) != drawn(stored["noise"]) or source_of(noise) != stored["noise_from"]:
        raise ValueError(f"the log is of the noise {stored['noise']}, not of {said}")
    if isinstance(noise, smoothing.Converted):
        check_size(noise, noise.size, math.prod(stored["shape"]))
    return noise
