"""Counts of votes by image and block of samples: on disk, and the certificates they give.

The log is ``batches/STAGE-NUMBER.npz``, one file for each batch of images and stage, written whole:

* ``index``, ``id``, ``y`` (R,): positions in the data set, ids and labels of the images,
* ``start``: the first sample; ``estimate`` (R, blocks, C + 1): counts of each block of samples,
* in the first stage ``select`` (R, C + 1), and of a fast voter ``disagree`` (R, blocks, C + 1),
* ``run``: a digest of ``configuration.json``, so that no file is taken for another run's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jrobust import smoothing, statistics
from jrobust._algorithm import describe
from jrobust.loops._folder import Arrays, stored_configuration
from jrobust.loops._lanes import check_count
from jrobust.smoothing._certify import unanimous
from jrobust.smoothing._noise import check_size
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
    """How certificates follow from counts; the fields are arguments of ``smoothing``'s functions.

    Attributes:
        stages: total votes after each stage; one stage where all images get the same votes.
        pairs: samples shown to both models where a fast one votes, else 0.
    """

    noise: smoothing.Noise
    alpha: float
    stages: tuple[int, ...]
    radius: float | None = None
    top: int = 1
    two_bounds: bool = False
    anytime: bool = False
    pairs: int = 0

    @property
    def share(self) -> float:
        """Alpha of one stage."""
        return self.alpha if self.anytime else self.alpha / len(self.stages)

    def certificate(
        self,
        select: np.ndarray,
        vote: Callable[[np.ndarray, int, int], np.ndarray],
        disagreements: np.ndarray,
    ) -> smoothing.Certificate:
        """Certificates from the votes that ``vote`` has; see :func:`smoothing.certify_staged`."""
        options: dict[str, Any] = {"top": self.top, "anytime": self.anytime}
        if self.pairs:
            votes = vote(np.arange(len(select)), 0, self.stages[-1])
            options["disagreements"] = disagreements
            return smoothing.certify(select, votes, self.noise, self.alpha, **options)
        options |= {"stages": self.stages, "radius": self.radius, "two_bounds": self.two_bounds}
        return smoothing.certify_staged(select, vote, self.noise, self.alpha, **options)

    def check(self, classes: int) -> None:
        """Raise ``ValueError`` where even unanimous votes certify nothing, or not ``radius``."""
        pairs = np.zeros((1, classes + 1), np.int64)
        pairs[0, -1] = self.pairs

        def vote(rows: np.ndarray, start: int, n: int) -> np.ndarray:
            return n * np.eye(1, classes + 1, dtype=np.int64)[rows]

        found = self.certificate(np.zeros(1, np.int64), vote, pairs)
        if found.prediction[0] == smoothing.ABSTAIN:
            also = f" and {self.pairs} pairs" if self.pairs else ""
            raise ValueError(
                f"n = {self.stages[-1]} votes{also} can never certify anything at alpha = "
                f"{self.alpha:g}: even unanimous votes prove nothing; raise "
                + ("both" if self.pairs else "n")
            )

    def plan(
        self,
        images: int,
        n0: int,
        classes: int,
        p: np.ndarray | None = None,
        votes_per_second: float | None = None,
        pairs_per_second: float | None = None,
    ) -> smoothing.Plan:
        """What a run by this rule can prove and costs; arguments as of :func:`smoothing.plan`."""
        if self.top == 1 and not self.two_bounds:
            return smoothing.plan(
                self.noise,
                self.stages,
                self.alpha,
                n0=n0,
                images=images,
                radius=self.radius,
                p=p,
                pairs=self.pairs,
                anytime=self.anytime,
                votes_per_second=votes_per_second,
                pairs_per_second=pairs_per_second,
            )
        # The most votes there can be: fewer where stages stop early.
        votes = float(images * (n0 + self.stages[-1]))
        seconds = None if votes_per_second is None else votes / votes_per_second
        if seconds is not None and self.pairs:
            assert pairs_per_second is not None
            seconds += images * self.pairs / pairs_per_second
        return smoothing.Plan(
            ceiling=self.ceiling(),
            norm=self.noise.norm,
            least=self._least(classes),
            n=self.stages[-1],
            votes=votes,
            seconds=seconds,
            average_radius=None,
            false=int(statistics.false_certificates(images, self.alpha)),
            images=images,
            alpha=self.alpha,
        )

    def ceiling(self) -> float:
        """No certificate by this rule has a larger radius."""
        level = self.share / 2 if self.two_bounds or self.pairs else self.share
        q = unanimous(self.stages[-1], level, self.anytime)
        if self.pairs:
            q = math.nextafter(q + unanimous(self.pairs, level, self.anytime), 0.0)
        return float(self.noise.radius(q, q / self.top))

    def _least(self, classes: int) -> int:
        """The fewest votes of the last stage that certify, the others spread over all answers."""
        n = self.stages[-1]

        def proves(count: int) -> bool:
            others, more = divmod(n - count, classes)
            votes = np.array([[count] + [others + (i < more) for i in range(classes)]])
            options: dict[str, Any] = {"top": self.top, "anytime": self.anytime}
            if self.pairs:
                options["disagreements"] = np.array([[0] * classes + [self.pairs]])
            found = smoothing.certify(
                np.zeros(1, np.int64),
                votes,
                self.noise,
                self.share,
                two_bounds=self.two_bounds,
                **options,
            )
            return bool(found.prediction[0] == 0)

        low, high = 0, n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if proves(middle) else (middle, high)
        return high

    def settings(self) -> dict[str, Any]:
        """The rule in a run's configuration."""
        return {
            "n": self.stages[-1],
            "alpha": self.alpha,
            "stages": list(self.stages) if len(self.stages) > 1 else None,
            "radius": self.radius,
            "top": self.top,
            "two_bounds": self.two_bounds,
            "anytime": self.anytime,
            "pairs": self.pairs or None,
            "radius_ceiling": self.ceiling(),
        }


def rule(
    noise: smoothing.Noise,
    *,
    alpha: float,
    n: int | None,
    stages: Any,
    radius: float | None,
    top: int,
    two_bounds: bool,
    anytime: bool,
    pairs: int | None,
    classes: int,
) -> Rule:
    """The rule with these settings; ``ValueError`` for combinations that make no sense."""
    alpha = float(check_probability("alpha", alpha))
    noise.check()
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
        if two_bounds:
            raise ValueError(
                "two_bounds=True and voter= exclude each other: a certificate from another "
                "model's votes has one bound"
            )
    check_count("top", top)
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    made = Rule(noise, alpha, stages, radius, top, two_bounds, anytime, pairs or 0)
    made.check(classes)
    return made


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

    def __init__(self, total: int, columns: int, made: Rule, block: int) -> None:
        self._rule, self._block = made, block
        self.select = np.zeros((total, columns), np.int32)
        self.disagreements = np.zeros((total, columns), np.int32)
        self._fresh = np.zeros((len(made.stages), total, columns), np.int32)
        self._held = np.zeros(total, np.int64)

    def enter(self, batch: Arrays) -> None:
        """Take the counts of one file; ``ValueError`` where those before are missing."""
        rows, start, blocks = batch["index"], int(batch["start"]), batch["estimate"]
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


def configuration(directory: Any) -> dict[str, Any]:
    """``configuration.json`` of a run, empty where there is none and nothing that needs it.

    Raises:
        ValueError: if it cannot be read, or is missing beside votes.
    """
    directory = pathlib.Path(directory)
    try:
        stored = stored_configuration(directory)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory / 'configuration.json'} is damaged ({error}): nothing was changed; put "
            "back a copy of it, or choose another directory"
        ) from error
    if not stored and any(directory.glob("batches/*.npz")):
        raise ValueError(
            f"{directory} holds votes but no configuration.json that says of which model and "
            "noise: nothing was changed; put back a copy of it, or choose another directory"
        )
    return stored


def read(directory: Any, stored: dict[str, Any]) -> Iterator[Arrays]:
    """The files of a log in order, each checked; ``stored`` is the run's configuration.

    Raises:
        ValueError: for a file that is truncated, damaged or another run's. Nothing is changed.
    """
    run = digest(stored)
    for path in sorted(pathlib.Path(directory).glob("batches/*.npz")):
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                batch = dict(file)
            wrong = _wrong(batch, stored, run)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
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
    images, block = len(batch["index"]), stored["block"]
    if not len(batch["id"]) == len(batch["y"]) == len(batch["estimate"]) == images:
        return "arrays of different lengths"
    sums = {"estimate": block}
    if batch["start"] == 0:
        sums["select"] = stored["n0"]
        if stored["pairs"]:
            sums["disagree"] = block
    for name, samples in sums.items():
        counts = batch[name]
        if len(counts) != images or np.any(counts.sum(-1, dtype=np.int64) != samples):
            return f"{name} are not counts of {samples} samples each"
    return None


def verify(directory: Any, wanted: dict[str, Any]) -> None:
    """Read all of a log, if it is that of the run ``wanted``, before anything is written there."""
    stored = configuration(directory)
    if stored and digest(stored) == digest(wanted):
        for _ in read(directory, stored):
            pass


def source_of(noise: Any) -> str:
    """Where the classes of a noise, and of one it wraps, come from."""
    inner = getattr(noise, "noise", None)
    modules = [type(one).__module__ for one in (noise, inner) if one is not None]
    return "jrobust" if all(name.startswith("jrobust.") for name in modules) else modules[0]


def noise_of(stored: dict[str, Any], given: Any) -> Any:
    """The noise of a run: made from its configuration, or ``given`` if that draws the same.

    Raises:
        ValueError: where it does not; where one that is not jrobust's is not given.
    """

    def drawn(said: dict[str, Any]) -> dict[str, Any]:
        """Of a radius that is only stated in another norm, the noise itself."""
        return drawn(said["noise"]) if said["name"] == smoothing.Converted.__name__ else said

    def made(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {name: made(part) for name, part in value.items() if name != "name"}
        return getattr(smoothing, value["name"])(**fields)

    if given is None and stored["noise_from"] != "jrobust":
        raise ValueError(
            f"the log's noise {stored['noise']['name']} is from {stored['noise_from']}: pass it "
            "with noise="
        )
    noise = made(stored["noise"]) if given is None else given
    said = json.loads(json.dumps(describe(noise), default=float))
    if drawn(said) != drawn(stored["noise"]) or source_of(noise) != stored["noise_from"]:
        raise ValueError(f"the log is of the noise {stored['noise']}, not of {said}")
    if isinstance(noise, smoothing.Converted):
        check_size(noise, noise.size, math.prod(stored["shape"]))
    return noise
