"""The report: one self-contained page from whole, broken and odd runs; curves for the terminal; PNG."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from runs import make_data, run_here

from cupytron import report
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
