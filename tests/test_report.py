"""The report is one file that needs nothing else, says what it was given, and draws honestly."""

import base64
import doctest
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from jrobust import report

CURVES = {
    "standard": ([0.0, 0.1, 0.2], [0.99, 0.4, 0.02]),
    "robust": ([0.0, 0.1, 0.2], [0.98, 0.9, 0.7], [0.96, 0.88, 0.65], [0.99, 0.92, 0.75]),
}
VOID = {"meta", "img", "link", "br"}


def images(channels=1, n=3, seed=0):
    rng = np.random.default_rng(seed)
    clean = rng.uniform(0.2, 0.8, (n, 8, 8, channels))
    return clean, clean + rng.uniform(-0.1, 0.1, clean.shape), np.arange(n)


class Page(HTMLParser):
    """Tags with attributes, table cells, and a check that tags close in order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.cells, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def pngs(self):
        for tag, attributes in self.tags:
            if tag == "img":
                head, data = attributes["src"].split(",")
                assert head == "data:image/png;base64"
                yield base64.b64decode(data, validate=True)


def full():
    r = report.Report("Digits & <co>")
    r.section("Results")
    r.text("First.\n\n<script>alert('x')</script>")
    r.table("Accuracy <i>", ["model", "clean", "ok"], [["a<b", 0.98765, True], ["c", 1, None]])
    r.curve('Robust "accuracy"', CURVES, "eps", "accuracy", percent=True)
    clean, adversarial, y = images()
    r.images("Pictures", clean, adversarial, y, y, (y + 1) % 3)
    r.configuration({"eps": np.float32(0.2), "loss": images, "steps": [1, 2]})
    return r


@pytest.fixture(scope="module")
def source():
    return full().html()


def test_nothing_outside_is_referred_to(source):
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    style = re.search("<style>(.*?)</style>", source, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "http" not in re.sub(r"base64,[^\"]*", "", source)


def test_user_text_is_escaped_and_complete(source):
    page = Page(source)
    assert "<script>alert('x')</script>" in page.text
    assert page.text.count("Digits & <co>") == 2
    assert "Accuracy <i>" in page.text
    assert 'Robust "accuracy"' in [a["alt"] for t, a in page.tags if t == "img"]
    assert [t for t, _ in page.tags].count("p") == 2


def test_table_cells(source):
    assert Page(source).cells == ["model", "clean", "ok", "a<b", "0.9877", "yes", "c", "1", "-"]


def test_numbers_stand_right():
    r = report.Report("t")
    r.table("c", ["name", "share"], [["a", "99.1%"], ["b", "3.0%"]])
    cells = [a.get("class") for t, a in Page(r.html()).tags if t == "td"]
    assert cells == [None, "number"] * 2


def test_configuration_is_printed_short(source):
    text = Page(source).text
    assert '"eps": 0.2' in text
    assert '"loss": "images"' in text


def test_figures_are_images_of_sane_size(source):
    from matplotlib import image

    pngs = list(Page(source).pngs())
    assert len(pngs) == 2
    for png in pngs:
        pixels = image.imread(io.BytesIO(png), format="png")
        height, width = pixels.shape[:2]
        assert 500 < width < 4000
        assert 300 < height < 2000
        assert pixels[..., :3].std() > 0.05  # something is drawn
        assert len(png) < 500_000


def test_the_same_input_gives_the_same_bytes(source):
    assert full().html() == source


def test_save_creates_the_folder(tmp_path, source):
    path = full().save(tmp_path / "runs" / "a" / "report.html")
    assert path.read_text(encoding="utf-8") == source


def test_global_matplotlib_state_is_untouched():
    code = """
import sys
import jrobust.report as report
assert "matplotlib" not in sys.modules
report.plot_curves({"a": ([0, 1], [0, 1])}, "x", "y")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_percent_axes_start_at_zero_and_say_percent():
    axes = report.plot_curves(CURVES, "eps", "accuracy", percent=True).axes[0]
    assert axes.get_ylim() == (0, 1)
    assert axes.yaxis.get_major_formatter()(0.4) == "40%"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("eps", "accuracy")
    assert [t.get_text() for t in axes.get_legend().get_texts()] == list(CURVES)
    for line, (x, y, *_) in zip(axes.lines, CURVES.values()):
        np.testing.assert_array_equal(line.get_xdata(), x)
        np.testing.assert_array_equal(line.get_ydata(), y)
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.65
    assert band[:, 1].max() == 0.99


def test_the_legend_covers_no_data():
    figure = report.plot_curves(
        {f"run {i}": (np.arange(50), np.full(50, 1.0 * i)) for i in range(9)}, "step", "loss"
    )
    figure.draw_without_rendering()
    axes = figure.axes[0]
    legend = axes.get_legend().get_window_extent()
    assert legend.y0 >= axes.get_window_extent().y1 - 1
    assert legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure.bbox.y1
    drawn = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(drawn) == 9


@pytest.mark.parametrize("channels", [1, 3])
def test_differences_share_a_symmetric_scale(channels):
    clean, adversarial, y = images(channels)
    figure = report.plot_images(clean, adversarial, y, y, (y + 1) % 3)
    difference = adversarial - clean
    scale = np.abs(difference).max()
    shown = [ax.images[0] for ax in figure.axes if ax.images]
    signed = [im for im in shown if im.get_cmap().name == "RdBu_r"]
    assert len(shown) == 9
    assert len(signed) == 3
    for j, im in enumerate(signed):
        assert im.get_clim() == pytest.approx((-scale, scale))
        np.testing.assert_allclose(np.abs(im.get_array()), np.abs(difference[j]).max(-1))
        below = im.axes.get_xlabel()
        assert below == f"max |δ| {np.abs(difference[j]).max():.3g}"
    bar = figure.axes[-1]
    assert bar.get_yticklabels()[-1].get_text() == f"+{scale:.3g}"
    assert bar.get_ylabel() == "pixel units"


def test_images_keep_their_grey():
    clean, adversarial, y = images()
    figure = report.plot_images(clean * 2 - 1, adversarial * 2 - 1, y, y, y, lo=-1, hi=1)
    im = figure.axes[0].images[0]
    assert im.get_cmap().name == "gray"
    assert im.get_clim() == (0, 1)
    np.testing.assert_allclose(im.get_array(), clean[0, ..., 0])


def test_wrong_predictions_stand_out():
    clean, adversarial, y = images()
    figure = report.plot_images(clean, adversarial, y, y, np.array([0, 2, 2]))
    weight = {
        j: [figure.axes[3 * j + i].xaxis.label.get_fontweight() for i in range(2)] for j in range(3)
    }
    assert weight == {0: ["normal"] * 2, 1: ["normal", "bold"], 2: ["normal"] * 2}
    assert figure.axes[4].get_xlabel() == "predicted 2"


def test_equal_images_draw():
    clean, _, y = images()
    figure = report.plot_images(clean, clean, y, y, y)
    assert figure.axes[2].images[0].get_clim() == (-1, 1)


def test_table_text():
    text = report.table_text(
        ["model", "clean", "n"], [["standard", np.float32(0.5), 10], ["x", float("nan"), 2000]]
    )
    assert text.splitlines() == [
        "model     clean     n",
        "--------  -----  ----",
        "standard    0.5    10",
        "x           nan  2000",
    ]
    assert report.table_text(["a", "b"], []).splitlines() == ["a  b", "-  -"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: report.table_text(["a", "b"], [[1, 2], [1]]), "row 1 has 1 cells"),
        (lambda: report.plot_curves({}, "x", "y"), "series is empty"),
        (lambda: report.plot_curves({"s": ([1], [2], [3])}, "x", "y"), "'s' must be"),
        (lambda: report.plot_curves({"s": ([1, 2], [2])}, "x", "y"), "of one length"),
        (
            lambda: report.plot_curves({"s": ([1, 2], [50, 98])}, "x", "y", percent=True),
            "takes fractions",
        ),
        (lambda: report.plot_images(np.zeros((1, 8, 8)), 0, 0, 0, 0), "clean must have shape"),
        (
            lambda: report.plot_images(np.zeros((1, 8, 8, 1)), np.zeros((2, 8, 8, 1)), 0, 0, 0),
            "adversarial has shape",
        ),
        (
            lambda: report.plot_images(*2 * [np.full((1, 8, 8, 1), 9.0)], [0], [0], [0]),
            "clean has pixels in",
        ),
        (
            lambda: report.plot_images(*2 * [np.zeros((1, 8, 8, 1))], [0], [0, 1], [0]),
            "clean_prediction must have shape",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_docstring_examples():
    assert doctest.testmod(report).failed == 0


def test_without_matplotlib():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "flax"):
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
from jrobust import report
r = report.Report("t")
r.table("c", ["a"], [[1]])
assert "<td" in r.html()
try:
    r.curve("c", {"a": ([0, 1], [0, 1])}, "x", "y")
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'jrobust[report]'" in out.stdout
