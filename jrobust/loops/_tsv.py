"""Certified radii in the tab-separated format of Cohen et al. (2019)."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from jrobust.smoothing import ABSTAIN

_HEADER = ("idx", "label", "predict", "radius", "correct", "time")
_TIME = re.compile(r"(?:(\d+) days?, )?(\d+):(\d{2}):(\d{2}(?:\.\d+)?)")
_DIGITS = decimal.Decimal("1e-6")
# All digits of any float64, so that the only rounding is the last, and down.
_EXACT = decimal.Context(prec=330, rounding=decimal.ROUND_FLOOR)


class Slice(NamedTuple):
    """Examples of a data set by their ids: ``n`` of them, from ``start`` on, every ``stride``-th.

    An average radius means nothing without it. ``stride`` is None where the ids have no one step.
    """

    start: int
    stride: int | None
    n: int

    @classmethod
    def of(cls, ids: np.ndarray) -> Slice:
        """That of ids in the order given."""
        steps = set(np.diff(np.asarray(ids, np.int64)).tolist()) or {1}
        return cls(int(ids[0]), int(steps.pop()) if len(steps) == 1 else None, len(ids))

    def __str__(self) -> str:
        if self.stride is None:
            return f"{self.n} examples of irregular ids, the first {self.start}"
        return f"{self.n} examples: start {self.start}, stride {self.stride}"


@dataclasses.dataclass(frozen=True, eq=False)
class CertifiedRadii:
    """Answers and certified radii of examples, without the counts they follow from.

    Attributes:
        id: (N,) example ids.
        y: (N,) true labels.
        prediction: (N,) certified classes, -1 where the procedure abstained.
        radius: (N,) certified radii, 0 where it abstained.
        seconds: (N,) time each example took.
        norm: of the radii.
    """

    id: np.ndarray
    y: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    seconds: np.ndarray
    norm: str = "L2"

    def accuracy(self, radii: Any = 0.0) -> Any:
        """Certified accuracy at each of ``radii``: right, and with at least this radius."""
        right = self.prediction == self.y
        return np.mean(right & (self.radius >= np.asarray(radii, np.float64)[..., None]), axis=-1)

    @property
    def average_radius(self) -> float:
        """Average certified radius; wrong answers and abstentions count 0."""
        return float(np.mean(np.where(self.prediction == self.y, self.radius, 0.0)))

    @property
    def slice(self) -> Slice:
        """Which examples these are, by their ids."""
        return Slice.of(self.id)

    @property
    def radii(self) -> CertifiedRadii:
        """Itself: what a report of a certification has under this name."""
        return self

    def save_tsv(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the columns idx, label, predict, radius, correct and time; return the path.

        Radii are rounded down, to six decimals, so that the file claims nothing that is not proved.
        """
        lines = ["\t".join(_HEADER)]
        for i, y, prediction, radius, seconds in zip(
            self.id, self.y, self.prediction, self.radius, self.seconds
        ):
            down = decimal.Decimal(float(radius)).quantize(_DIGITS, context=_EXACT)
            time = datetime.timedelta(seconds=float(seconds))
            row = (i, y, prediction, f"{down:f}", int(prediction == y), time)
            lines.append("\t".join(map(str, row)))
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path

    def __str__(self) -> str:
        return (
            f"Average certified {self.norm} radius {self.average_radius:.4f}, certified accuracy "
            f"{self.accuracy():.4f} over {self.slice}"
        )


def read_tsv(path: str | os.PathLike[str], *, norm: str = "L2") -> CertifiedRadii:
    """Read a log of certificates as Cohen's released code and its successors write it.

    Such a log keeps no counts and states neither alpha nor noise. Its radii were commonly printed
    to three digits, rounded to nearest: up to half a unit of the third digit above what was proved.

    Args:
        path: of a file with the columns idx, label, predict, radius, correct and time.
        norm: of its radii.

    Raises:
        ValueError: for another header, a row that is cut off or not of these columns, ``correct``
            that contradicts label and prediction, an index that comes twice, a file without rows.
    """
    lines = pathlib.Path(path).read_text().splitlines()
    header = tuple(lines[0].split("\t")) if lines else ()
    if header != _HEADER:
        raise ValueError(
            f"{path} must begin with the columns {', '.join(_HEADER)}, separated by tabs, got "
            f"{lines[0] if lines else 'an empty file'!r}"
        )
    rows = [_row(line, f"{path}, line {i + 2}") for i, line in enumerate(lines[1:])]
    if not rows:
        raise ValueError(f"{path} holds no certificates")
    index, label, predict, radius, seconds = (np.array(column) for column in zip(*rows))
    if len(np.unique(index)) != len(index):
        raise ValueError(f"{path} holds an index twice: logs of two runs in one file?")
    return CertifiedRadii(index, label, predict, radius, seconds, norm)


def _row(line: str, where: str) -> tuple[int, int, int, float, float]:
    try:
        index, label, predict, radius, correct, time = line.split("\t")
        row = int(index), int(label), int(predict), float(radius), _seconds(time)
        right = bool(("0", "1").index(correct))
    except ValueError as error:
        raise ValueError(f"{where} is cut off or no certificate ({error}): {line!r}") from error
    claims = row[2] != ABSTAIN or row[3] == 0
    if not 0 <= row[3] < np.inf or row[1] < 0 or row[2] < ABSTAIN or not claims:
        raise ValueError(f"{where}: label, prediction or radius out of range: {line!r}")
    if not 0 <= row[4] < np.inf or abs(row[0]) >= 2**63:
        raise ValueError(f"{where}: index or time out of range: {line!r}")
    if right != (row[1] == row[2]):
        raise ValueError(f"{where}: correct = {correct} contradicts label and prediction: {line!r}")
    return row


def _seconds(time: str) -> float:
    """Seconds of what ``str(timedelta)`` prints, or of a number of them, as older logs have it."""
    if ":" not in time:
        return float(time)
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise ValueError(f"{time!r} is no time such as 0:00:15.128451")
    days, hours, minutes, seconds = match.groups()
    return 86_400 * int(days or 0) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)
