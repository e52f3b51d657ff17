"""A self-contained HTML report, and the plots in it.

Importing this needs neither matplotlib nor flax; drawing needs matplotlib
(``pip install 'jrobust[report]'``). Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jrobust._algorithm import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Report", "plot_certified", "plot_curves", "plot_images", "table_text"]

# Okabe and Ito's palette (2008), safe for colour-blind readers, without its yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "os^Dv<>"
_INK, _GRID, _WRONG = "#222222", "#dddddd", "#c62828"


class Report:
    """Text, tables, curves and images, in the order they were added, as one HTML file.

    >>> report = Report("Digits")
    >>> report.table("Accuracy", ["model", "clean"], [["standard", 0.99]])
    >>> report.html().count("<table>")
    1
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._tables = 0
        self._figures = 0

    def section(self, title: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{_escape(title)}</h2>")

    def text(self, text: str) -> None:
        """Add paragraphs of plain text, separated by empty lines."""
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            self._parts.append(f"<p>{_escape(paragraph)}</p>")

    def table(self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; cells and errors as in :func:`table_text`."""
        cells, right = _cells(columns, rows)
        self._tables += 1

        def line(tag: str, values: Sequence[str]) -> str:
            return "<tr>{}</tr>".format(
                "".join(
                    f"<{tag}{' class=number' if numeric else ''}>{_escape(value)}</{tag}>"
                    for value, numeric in zip(values, right)
                )
            )

        body = "\n".join(line("td", row) for row in cells)
        self._parts.append(
            f"<figure><figcaption><b>Table {self._tables}.</b> {_escape(caption)}</figcaption>\n"
            f'<div class="wide"><table>\n<thead>{line("th", list(columns))}</thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div></figure>"
        )

    def curve(
        self,
        caption: str,
        series: Mapping[str, Sequence[ArrayLike]],
        xlabel: str,
        ylabel: str,
        *,
        percent: bool = False,
    ) -> None:
        """Add a plot of curves; arguments and errors as in :func:`plot_curves`."""
        self._figure(caption, plot_curves(series, xlabel, ylabel, percent=percent))

    def images(
        self,
        caption: str,
        clean: ArrayLike,
        adversarial: ArrayLike,
        y: ArrayLike,
        clean_prediction: ArrayLike,
        adversarial_prediction: ArrayLike,
        *,
        lo: float = 0.0,
        hi: float = 1.0,
    ) -> None:
        """Add a grid of images; arguments and errors as in :func:`plot_images`."""
        predictions = clean_prediction, adversarial_prediction
        self._figure(caption, plot_images(clean, adversarial, y, *predictions, lo=lo, hi=hi))

    def evaluation(self, title: str, found: Any) -> None:
        """Add a section on an evaluation, from ``jrobust.loops.evaluate``.

        Accuracy after each attack, a curve over the distances at which examples broke, what the
        attacks cost, doubts with their remedies, and the configuration.
        """
        self.section(title)
        self.table("Accuracy on what no attack has broken.", *found.table())
        rows = found.examples
        broken = rows["correct"] & ~rows["robust"]
        distances = np.unique(rows["distance"][broken])
        if len(distances) and distances[-1] > 0 and len(found.norms) == 1:
            eps = np.concatenate([[0.0], distances])
            # A step at each distance: a line between two would lie below what was found.
            self.curve(
                "Accuracy where every adversarial input found counts from its own distance on: the "
                "true curve is nowhere higher.",
                {"found": (np.repeat(eps, 2)[1:], np.repeat(found.curve(eps), 2)[:-1])},
                f"distance ({found.norms[0]})",
                "accuracy",
                percent=True,
            )
        costs = [
            [name, int(rows[name].sum()), float(rows[name].mean())]
            for name in ("forwards", "backwards")
        ]
        self.table("Passes through the model.", ["", "in all", "per example"], costs)
        points = [
            ["examples with logits that are not finite: broken", found.non_finite],
            ["claims that a forward pass did not confirm: robust", found.near_ties],
        ]
        if found.configuration["search_fn"]:
            points.append(["points that fool the searched model alone: robust", found.only_search])
            points.append(["points that fool the model alone: broken", found.only_model])
        self.table("Where verdicts differ or there is none.", ["", "number"], points)
        if found.redraws is not None:
            estimate, low, high = found.redrawn_accuracy()
            self.text(
                f"The model draws: it stands by vote. Of its answers under fresh draws, at the "
                f"points that attacks returned, {estimate:.1%} are right, with 95% confidence "
                f"between {low:.1%} and {high:.1%}."
            )
        if found.doubts:
            self.table(
                "Reasons to doubt the robust accuracy.",
                ["sign", "what was found", "remedy"],
                [list(doubt) for doubt in found.doubts],
            )
        elif found.configuration["checks"]:
            self.text("No sign was found that the attacks flatter the model.")
        else:
            self.text("Signs that the attacks flatter the model were not looked for.")
        self.configuration(found.configuration)

    def certification(self, title: str, found: Any) -> None:
        """Add a section on a certification, from ``jrobust.loops.certify`` or ``recertify``.

        Which examples it is about, certified accuracy at some radii and as a curve, what became of
        the examples, votes and rejects, and the configuration.
        """
        self.section(title)
        self.text(str(found))
        certificate, norm = found.certificate, found.certificate.norm
        radii = [0.0, *_round_radii(float(certificate.radius.max()))]
        sure = certificate.accuracy(found.y, radii, confidence=0.99)
        self.table(
            "Certified accuracy: right, with at least this radius. With 99% confidence at least "
            "the last column of these very examples is right and robust.",
            [f"radius ({norm})", "certified accuracy", "at least"],
            [list(row) for row in zip(radii, found.accuracy(radii), sure)],
        )
        asked, ceiling = (found.configuration[name] for name in ("radius", "radius_ceiling"))
        if asked is not None:
            self.text(
                f"Votes were counted until a radius of {asked:g} was certified or hopeless: radii "
                "above it are those that were certified by then, and accuracy there and the "
                "average radius are lower than more votes would make them."
            )
        self.certified(
            f"Certified accuracy against the radius; no radius can exceed {ceiling:.4g} at this "
            "many votes.",
            {title: found},
        )
        right = certificate.prediction == found.y
        abstained = certificate.prediction < 0
        rows = [
            ["examples certified with the right class", int(right.sum())],
            ["with a wrong class", int(np.sum(~right & ~abstained))],
            ["abstained on", int(abstained.sum())],
            ["noisy copies that voted", found.votes],
            [
                "of these rejected as not finite",
                int(found.select_counts[..., -1].sum() + found.estimate_counts[..., -1].sum()),
            ],
        ]
        if found.disagreements is not None:
            rows.append(["votes shown to both models", int(found.disagreements.sum())])
            rows.append(["on which they differed", int(found.disagreements[:, :-1].sum())])
        self.table("What became of the examples.", ["", "number"], rows)
        self.configuration(found.configuration)

    def certified(self, caption: str, runs: Mapping[str, Any]) -> None:
        """Add a plot of certified accuracy of several runs or files, and their average radii.

        Arguments and errors as in :func:`plot_certified`. Average radii are comparable only between
        equal sets of examples, which stand beside them.
        """
        self._figure(caption, plot_certified(runs))
        self.table(
            "Average certified radius (wrong answers and abstentions count 0), and over which "
            "examples.",
            ["run", "average radius", "certified accuracy", "examples", "start", "stride"],
            [
                [name, run.average_radius, float(run.accuracy()), run.slice.n, *run.slice[:2]]
                for name, run in runs.items()
            ],
        )

    def configuration(self, configuration: Mapping[str, Any]) -> None:
        """Add the effective configuration: names to algorithms, numbers, nested as you like."""
        shown = json.dumps(_short(describe(dict(configuration))), indent=2, ensure_ascii=False)
        self._parts.append(
            f"<details open><summary>Configuration</summary><pre>{_escape(shown)}</pre></details>"
        )

    def html(self) -> str:
        """The page: one HTML document that refers to nothing outside itself."""
        title = _escape(self.title)
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the page to ``path``, creating its folder, and return the path."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def _figure(self, caption: str, figure: Figure) -> None:
        self._figures += 1
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=2 * _DPI, metadata={"Software": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        width = round(figure.get_figwidth() * _DPI)
        self._parts.append(
            f'<figure><div class="wide"><img width="{width}" alt="{_escape(caption)}" '
            f'src="data:image/png;base64,{data}"></div>'
            f"<figcaption><b>Figure {self._figures}.</b> {_escape(caption)}</figcaption></figure>"
        )


def table_text(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table for a terminal: aligned plain text, numbers to the right.

    Floats are shown to four significant digits, booleans as yes and no, ``None`` as a dash.
    Raises ``ValueError`` where a row has not one cell for each column.

    >>> print(table_text(["model", "clean"], [["standard", 0.98765], ["TRADES", None]]))
    model      clean
    --------  ------
    standard  0.9877
    TRADES         -
    """
    cells, right = _cells(columns, rows)
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, right)
        ).rstrip()
        for line in lines
    )


def plot_curves(
    series: Mapping[str, Sequence[ArrayLike]],
    xlabel: str,
    ylabel: str,
    *,
    percent: bool = False,
) -> Figure:
    """Curves over a common axis, as a matplotlib figure.

    Args:
      series: name -> ``(x, y)`` or ``(x, y, lo, hi)``, each a sequence of N numbers; ``lo`` and
        ``hi`` bound a band, whose meaning the caption should state.
      xlabel, ylabel: with units.
      percent: ``y``, ``lo`` and ``hi`` are fractions in [0, 1], drawn in percent on an axis from
        0 to 100. For every accuracy: an axis cut to the data would flatter differences.

    Raises ``ValueError`` without a series, where lengths differ, or where a fraction is outside
    [0, 1]; ``ImportError`` without matplotlib.
    """
    if not series:
        raise ValueError("nothing to draw: series is empty")
    curves = {name: _curve(name, values, percent) for name, values in series.items()}
    figure = _new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for i, (name, (x, y, *band)) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        if band:
            axes.fill_between(x, band[0], band[1], color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            x,
            y,
            label=name,
            color=colour,
            linewidth=1.8,
            linestyle=("-", "--", ":")[i // len(_COLOURS) % 3],
            marker=_MARKERS[i % len(_MARKERS)] if len(x) <= 25 else None,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            clip_on=False,
            zorder=3,
        )
    _style(axes, xlabel, ylabel)
    axes.margins(x=0.02)
    if percent:
        from matplotlib.ticker import PercentFormatter

        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    # Above the axes the legend covers no data.
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.01),
        ncols=min(3, len(curves)),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        borderaxespad=0,
        handlelength=2.2,
    )
    return figure


def plot_certified(runs: Mapping[str, Any]) -> Figure:
    """Certified accuracy against the radius, one curve for each run, as a matplotlib figure.

    Args:
      runs: name -> what has ``accuracy(radii)`` and ``radii``: reports of ``jrobust.loops.certify``
        and ``recertify``, tables of ``jrobust.loops.read_tsv``.

    Raises ``ValueError`` without a run, or for radii in different norms; ``ImportError`` without
    matplotlib.
    """
    if not runs:
        raise ValueError("nothing to draw: runs is empty")
    norms = {name: run.radii.norm for name, run in runs.items()}
    if len(set(norms.values())) > 1:
        raise ValueError(f"radii in different norms cannot share an axis: {norms}")
    most = max(float(run.radii.radius.max()) for run in runs.values()) or 1.0
    radii = np.linspace(0.0, 1.03 * most, 401)
    return plot_curves(
        {name: (radii, run.accuracy(radii)) for name, run in runs.items()},
        f"radius ({next(iter(norms.values()))})",
        "certified accuracy",
        percent=True,
    )


def plot_images(
    clean: ArrayLike,
    adversarial: ArrayLike,
    y: ArrayLike,
    clean_prediction: ArrayLike,
    adversarial_prediction: ArrayLike,
    *,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Figure:
    """Clean images, adversarial images and their differences, one column an example.

    Args:
      clean, adversarial: (B, H, W, 1) or (B, H, W, 3), in [lo, hi].
      y: (B,) labels.
      clean_prediction, adversarial_prediction: (B,) predicted classes; wrong ones are drawn red.
      lo, hi: pixel range; black and white (or no and full colour) whatever the images contain.

    Differences share one scale, symmetric about zero, beside them in units of the pixels; of three
    channels the one that changed most is shown. Below each stands its largest absolute value.

    Raises ``ValueError`` for other shapes or pixels outside [lo, hi]; ``ImportError`` without
    matplotlib.
    """
    clean, adversarial = np.asarray(clean, np.float64), np.asarray(adversarial, np.float64)
    if clean.ndim != 4 or clean.shape[-1] not in (1, 3) or not len(clean):
        raise ValueError(f"clean must have shape (B, H, W, 1 or 3), got {clean.shape}")
    if adversarial.shape != clean.shape:
        raise ValueError(f"adversarial has shape {adversarial.shape}, clean {clean.shape}")
    for name, pixels in (("clean", clean), ("adversarial", adversarial)):
        if not (pixels.min() >= lo - 1e-6 and pixels.max() <= hi + 1e-6):
            raise ValueError(
                f"{name} has pixels in [{pixels.min():.4g}, {pixels.max():.4g}], outside "
                f"[{lo:g}, {hi:g}]; set lo= and hi= to the range of the images"
            )
    labels = [np.asarray(a) for a in (y, clean_prediction, adversarial_prediction)]
    for name, label in zip(("y", "clean_prediction", "adversarial_prediction"), labels):
        if label.shape != clean.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(clean)},), got {label.shape}")

    difference = adversarial - clean
    most = np.abs(difference).argmax(-1)[..., None]
    signed = np.take_along_axis(difference, most, -1)[..., 0]
    largest = np.abs(signed).max((1, 2))
    scale = float(largest.max()) or (hi - lo)
    n = len(clean)
    figure = _new_figure(1.15 * n + 1.9, 4.3)
    grid = figure.add_gridspec(3, n + 1, width_ratios=[1.0] * n + [0.09])
    rows = ("clean", "adversarial", "difference" + (", largest channel" * (clean.shape[-1] == 3)))
    for j in range(n):
        axes = [figure.add_subplot(grid[i, j]) for i in range(3)]
        for ax, pixels in zip(axes, (clean[j], adversarial[j])):
            shown = np.clip((pixels - lo) / (hi - lo), 0, 1)
            ax.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        last = axes[2].imshow(signed[j], cmap="RdBu_r", vmin=-scale, vmax=scale)
        axes[0].set_title(f"label {labels[0][j]}", fontsize=9, color=_INK)
        for ax, prediction in zip(axes, (labels[1][j], labels[2][j])):
            wrong = prediction != labels[0][j]
            ax.set_xlabel(
                f"predicted {prediction}",
                fontsize=8.5,
                labelpad=3,
                color=_WRONG if wrong else _INK,
                fontweight="bold" if wrong else "normal",
            )
        axes[2].set_xlabel(f"max |δ| {largest[j]:.3g}", fontsize=8.5, labelpad=3, color=_INK)
        for ax, row in zip(axes, rows):
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set(color=_GRID, linewidth=0.8)
            if j == 0:
                ax.set_ylabel(row.replace(", ", ",\n"), fontsize=9.5, color=_INK)
    bar = figure.colorbar(last, cax=figure.add_subplot(grid[2, n]), ticks=[-scale, 0, scale])
    bar.ax.set_yticklabels([f"{-scale:.3g}", "0", f"+{scale:.3g}"], fontsize=8.5, color=_INK)
    bar.set_label("pixel units", fontsize=8.5, color=_INK)
    bar.outline.set(edgecolor=_GRID, linewidth=0.8)
    return figure


_DPI = 100


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'jrobust[report]'") from error
    return Figure((width, height), dpi=_DPI, facecolor="white", layout="constrained")


def _style(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=_INK, fontsize=10)
    axes.set_ylabel(ylabel, color=_INK, fontsize=10)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=_GRID, labelcolor=_INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _curve(name: str, values: Sequence[ArrayLike], percent: bool) -> list[np.ndarray]:
    if len(values) not in (2, 4):
        raise ValueError(
            f"series {name!r} must be (x, y) or (x, y, lo, hi), got {len(values)} parts"
        )
    arrays = [np.asarray(v, np.float64) for v in values]
    shapes = [a.shape for a in arrays]
    if arrays[0].ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(f"series {name!r} needs sequences of one length, got shapes {shapes}")
    if percent and any(((a < 0) | (a > 1)).any() for a in arrays[1:]):
        raise ValueError(f"series {name!r} has values outside [0, 1]; percent=True takes fractions")
    return arrays


def _round_radii(most: float) -> list[float]:
    """Up to eight radii, multiples of 1, 2, 2.5 or 5 times a power of ten, that reach ``most``."""
    if not 0 < most < math.inf:
        return []
    unit = 10.0 ** math.floor(math.log10(most / 8))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if most / (unit * m) <= 8)
    return [float(f"{step * i:.6g}") for i in range(1, math.floor(most / step) + 1)]


_NUMBER = re.compile(r"(-|[-+±]?(\d[\d,_.]*([eE][-+]?\d+)?|nan|inf)\s?(%|s|ms|x)?)")


def _cells(
    columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> tuple[list[list[str]], list[bool]]:
    """The cells as text, and for each column whether it holds numbers."""
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"row {i} has {len(row)} cells, the table {len(columns)} columns: {list(row)!r}"
            )
    cells = [[_cell(value) for value in row] for row in rows]
    right = [
        bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))
    ]
    return cells, right


def _cell(value: object) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> Any:
    """Numbers that came from float32 without the digits float32 does not have."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --panel: #161b22; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.3rem;
  border-bottom: 1px solid var(--line); }
p { max-width: 44rem; }
figure { margin: 1.75rem 0; }
figcaption { color: var(--soft); font-size: 0.9rem; margin: 0.5rem 0; max-width: 44rem; }
figcaption b { color: var(--ink); }
.wide { overflow-x: auto; }
img { height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
  padding: 0.5rem; box-sizing: border-box; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.95rem; }
th, td { padding: 0.4rem 1rem; text-align: left; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody tr:hover { background: var(--panel); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: 1.75rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.9rem 1.1rem; overflow-x: auto; font-size: 0.85rem; line-height: 1.45; }
"""
