"""The report: one self-contained page from whole, broken and odd runs; curves for the terminal; PNG."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from runs import make_data, run_here

from cupytron import chart, report
from cupytron.cli.main import cli
from cupytron.errors import CupytronError
from cupytron.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_here(make_data(folder), folder / "run")
    return folder / "run"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_self_contained_and_tells_the_run(run, tmp_path):
    report.write_html(report.read_report(run), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.links == [] and "script" not in page.tags and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    words = " ".join(page.words)
    final = [r["val_loss"] for r in RunFolder(run).read_metrics() if "val_loss" in r][-1]
    assert f"{final:.3f}"[:4] in words and "d_model" in words
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) >= 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)  # well-formed


def test_what_a_run_wrote_is_escaped(run, tmp_path):
    (run / "sample.txt").write_text("<script>alert(1)</script> & more")
    try:
        report.write_html(report.read_report(run), tmp_path / "report.html")
    finally:
        (run / "sample.txt").unlink()
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text


def write_metrics(folder, *lines):
    folder.mkdir()
    (folder / "config.toml").write_text("")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def line(**record):
    return json.dumps(record) + "\n"


@pytest.mark.parametrize(
    "lines",
    [
        [line(step=1, loss=2.0)],
        [line(step=1, loss=2.0), '{"step": 2, "lo'],
        [line(step=1, loss=2.0), line(step=2, loss=math.nan), line(step=3, loss=1.0)],
        [line(step=1, loss=2.0, other={"a": 1}), line(step="x", loss=1.0), "[1]\n", "\n"],
        [line(step=0, val_loss=2.0)],
        [line(step=s, loss=1.0) for s in range(5)],
        [line(step=s, loss=2.0 + s % 3, lr=1e-3) for s in range(5000)],
    ],
)
def test_odd_metrics(tmp_path, lines):
    folder = write_metrics(tmp_path / "run", *lines)
    found = report.read_report(folder)
    report.write_html(found, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing.lower()
    assert len(text) < 500_000
    curve = report.loss_curve_text(RunFolder(folder).read_metrics())
    assert curve.isascii() and max(map(len, curve.splitlines())) <= 80


@pytest.mark.parametrize("lines", [[], [line(step=1, loss=math.nan)], ["garbage\n"]])
def test_no_loss_yet_is_said(tmp_path, lines):
    with pytest.raises(CupytronError, match="holds no loss yet"):
        report.read_report(write_metrics(tmp_path / "run", *lines))


def test_not_a_run(tmp_path):
    with pytest.raises(CupytronError, match="not a run's folder"):
        report.read_report(tmp_path)


def test_the_curve_falls_from_left_to_right():
    records = [{"step": s, "loss": 5.0 - s / 25} for s in range(101)]
    rows = [
        row.split("|", 1)[1].ljust(60)
        for row in report.loss_curve_text(records).splitlines()
        if "|" in row
    ]
    first, last = (
        next(i for i, row in enumerate(rows) if column in row[at])
        for at, column in ((slice(0, 5), "*"), (slice(-5, None), "*"))
    )
    assert first < last


def test_png(run, tmp_path):
    pytest.importorskip("matplotlib")
    report.write_png(report.read_report(run, sample=False), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("out", "png", "words"),
    [
        ("page.html", "{run}/saved", "is a file of the run itself"),
        ("page.html", "loss.foo", r"\.foo is no kind of picture"),
        ("page.html", "./page.html", r"\.html is no kind of picture"),
        ("one.svg", "./one.svg", "is the page's file, too"),
    ],
)
def test_files_that_would_be_lost_or_cannot_be_drawn_are_refused(
    run, tmp_path, monkeypatch, out, png, words
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    before = (run / "saved").read_bytes()
    arguments = ["report", str(run), "--no-sample", "--out", out, "--png", png.format(run=run)]
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, CupytronError) and re.search(words, str(done.exception))
    assert (run / "saved").read_bytes() == before and not list(tmp_path.iterdir())


def test_no_drawing_holds_control_characters():
    line = chart.Series("\x1b[31m\u202e", [(1.0, 2.0)], "train", marks=True, tag="\x9b")
    drawn = chart.svg([line], "\x00", "loss", x_label="\x07")
    assert (
        not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", drawn) and r"\x1b[31m\u202e" in drawn
    )


def written(folder, sample=True):
    """The report's page about a run."""
    out = folder.parent / "page.html"
    report.write_html(report.read_report(folder, sample), out)
    return out.read_text()


def test_a_browser_is_told_to_fetch_nothing(run):
    (run / "sample.txt").write_text("<img src='https://example.org/x.png'>")
    try:
        page = written(run)
    finally:
        (run / "sample.txt").unlink()
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    code = re.sub(r"&lt;.*?&gt;", "", page)
    assert not re.search(r"https?:|url\((?!#)|@import|<(script|link|img|iframe)", code)


def charts_of(page):
    """(ticks along the steps, ticks along the values) of each drawing, as texts."""
    for drawing in re.findall(r'<svg [^>]*role="img".*?</svg>', page, re.S):
        texts = ElementTree.fromstring(drawing).findall("text")
        floor = max(float(t.get("y")) for t in texts)  # the axis's name stands lowest
        steps = [t for t in texts if floor - 20 < float(t.get("y")) < floor]
        yield (
            [t.text for t in steps],
            [t.text for t in texts if float(t.get("y")) < floor and t not in steps],
        )


ODD = [
    [line(step=1, loss=2.0, lr=1e-4, grad_norm=1.0, tokens_per_second=5.0)],
    [line(step=0, val_loss=4.0), line(step=1, loss=2.0)],
    [line(step=s, loss=5 - s * 0.9, lr=1e-5 * s, tokens_per_second=12345678 + s) for s in range(4)],
    [line(step=s, loss=2 + 1e-9 * s, grad_norm=10.0**s) for s in range(60)],
    [line(step=10**20, loss=1e200), line(step=10**20 + 1, loss=-1e200, lr=5e-324)],
    [line(step=7, loss=0.0, val_loss=5e-324), line(step=8, loss=1e-320)],
    [line(step=s, loss=3 + (s * 7 % 11) / s, lr=1e-3 / s, val_loss=3.0) for s in range(1, 300)],
]


@pytest.mark.parametrize("lines", ODD)
def test_every_chart_has_two_different_ticks_or_more_on_each_axis(tmp_path, lines):
    drawn = list(charts_of(written(write_metrics(tmp_path / "run", *lines))))
    assert len(drawn) >= 2
    for steps, values in drawn:
        assert len(set(steps)) == len(steps) >= 2
        assert len(set(values)) == len(values) >= 2
        assert not any("." in step for step in steps if "e" not in step)  # no half steps


def test_the_small_charts_of_a_usual_run_have_two_ticks_or_more(run):
    drawn = list(charts_of(written(run)))
    assert len(drawn) == 5  # the loss for a desktop and for a phone, and three small ones
    assert all(len(ticks) >= 2 for axes in drawn for ticks in axes)


def test_ticks_are_at_least_two_and_round():
    for low, high in ((0.1, 0.9), (2.45, 2.55), (0, 1e-7), (-1e250, 1e250), (99.9, 100.2)):
        for count in (1, 2, 3, 7):
            assert len(chart.ticks(low, high, count)) >= 2
    assert chart.ticks(1, 2, 5, whole=True) == [1, 2]


def test_a_smoothed_line_does_not_end_at_its_last_point():
    points = [(float(x), 1.0) for x in range(99)] + [(99.0, 4.0)]
    smooth = chart.smooth(points)
    assert smooth[-1] == (99.0, 2.0)  # of the last three
    # a steep start stays where it is
    assert chart.smooth([(0.0, 4.0), *points[1:]])[0] == (0.0, 4.0)


def test_the_loss_fits_a_phone(run):
    page = written(run)
    assert "overflow-x" not in page.split("<body>")[0].split("pre {")[0]
    widths = [int(w) for w in re.findall(r'<svg viewBox="0 0 (\d+) \d+" role', page)]
    assert widths == [880, 360, 290, 290, 290]
    assert re.search(r"@media \(max-width: 40rem\) \{ .desk \{ display: none", page)


def test_the_legend_says_how_the_loss_is_smoothed(tmp_path):
    def legend(name, steps):
        lines = [line(step=s, loss=5 - s / 999 + s % 2) for s in range(steps)]
        page = written(write_metrics(tmp_path / name, *lines), sample=False)
        return re.findall(r"</svg>([^<]*)</span>", page)

    assert legend("long", 400) == ["training, each record", "training, mean of 21 records"]
    assert legend("short", 39) == []  # one line, not smoothed: its title says all


def test_the_sample_comes_with_its_prompt_and_temperature(run):
    page = written(run)
    assert re.search(
        r"prompt &quot;\\n&quot;, temperature 0\.8, up to 300 tokens, seed 1, weights of step \d+",
        page,
    )
    (run / "sample.txt").write_text("Once upon a time")
    try:
        page = written(run)
    finally:
        (run / "sample.txt").unlink()
    assert "from sample.txt; its prompt and its temperature are not recorded" in page
    assert "<h2>Sample" not in written(run, sample=False)


def test_what_is_missing_is_said(tmp_path):
    page = written(write_metrics(tmp_path / "run", line(step=1, loss=2.0)))
    assert "No validation loss is recorded." in page and "There is no sample: " in page


def test_losses_that_are_not_finite_are_counted_as_metrics_writes_them(tmp_path):
    folder = write_metrics(tmp_path / "run", line(step=1, loss=2.0), line(step=2, loss=None))
    assert "1 loss was not finite and left out." in written(folder)
    folder = write_metrics(tmp_path / "lost", line(step=1, loss=None))
    with pytest.raises(CupytronError, match=r"no loss yet that is a finite number.*optim\.lr"):
        report.read_report(folder)


def test_long_settings_and_odd_names(tmp_path):
    folder = write_metrics(tmp_path / "<b>&\x1b[31m", line(step=1, loss=2.0))
    (folder / "config.toml").write_text(f'[data]\npath = "{"x" * 8_000}"\n["<i>"]\n"<u>" = "&"')
    page = written(folder, sample=False)
    assert "\x1b" not in page
    assert not re.search("<[biu]>", page) and "&lt;b&gt;&amp;" in page and "&lt;u&gt;" in page


@pytest.mark.timeout(60)
def test_settings_that_no_run_writes_are_left_out(tmp_path):
    folder = write_metrics(tmp_path / "run", line(step=1, loss=2.0))
    (folder / "config.toml").write_text("a" + ".a" * 100_000 + " = 1\n")  # minutes for tomllib
    assert "config.toml could not be read." in written(folder, sample=False)


@pytest.mark.slow
def test_a_hundred_thousand_records(tmp_path):
    lines = [line(step=s, loss=2.0 + s % 7, val_loss=2.0, lr=1e-3) for s in range(100_000)]
    assert len(written(write_metrics(tmp_path / "run", *lines), sample=False)) < 500_000
