"""Pictures of schedules show what the timeline says, to scale, and `cupytron schedule` prints them."""

import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import click
import pytest
from click.testing import CliRunner

from cupytron.cli.main import cli
from cupytron.errors import CupytronError
from cupytron.parallel import checker, gantt, schedules
from cupytron.parallel.checker import Span
from cupytron.parallel.schedules import Action, make

CASES = [
    ("1f1b", 4, 8, 1),
    ("gpipe", 3, 5, 1),
    ("zb-h1", 4, 12, 1),
    ("interleaved", 4, 8, 2),
    ("interleaved", 2, 11, 3),
    ("1f1b", 1, 2, 1),
    ("1f1b", 12, 3, 1),
]
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(chart):
    """Stage -> its row, without the label."""
    found = re.findall(r"^stage (\d+) +\|(.*)$", chart, re.M)
    assert [int(stage) for stage, _ in found] == list(range(len(found)))
    return [row for _, row in found]


def boxes_of(row, chunks):
    """The (action, first column, end) that a row shows."""
    found = []
    label = {1: "([FBW])(\\d+)()", 2: "([FBWfbw])(\\d+)()", 3: "([FBW])(\\d+)([abc])"}[chunks]
    for match in re.finditer(label + r"(?: *\|)?", row):
        kind, number, suffix = match.groups()
        chunk = "abc".index(suffix) if suffix else int(kind.islower())
        found.append((Action(kind.upper(), int(number), chunk), match.start(), match.end()))
    # what is no box is idle
    assert sum(end - start for _, start, end in found) + row.count(".") == len(row)
    return found


@pytest.mark.parametrize(("name", "stages", "micro_batches", "chunks"), CASES)
def test_rows_show_the_actions_in_order_and_to_scale(name, stages, micro_batches, chunks):
    schedule = make(name, stages, micro_batches, chunks)
    timeline = checker.predict(schedule)
    chart = gantt.text(timeline)
    assert chart.isascii()
    rows = rows_of(chart)
    assert len(rows) == stages and len({len(row) for row in rows}) == 1
    scale = len(rows[0]) / timeline.total
    for stage, row in enumerate(rows):
        boxes = boxes_of(row, chunks)
        assert [action for action, _, _ in boxes] == list(schedule.actions[stage])
        shown = {action: (start, end) for action, start, end in boxes}
        for span in timeline.spans:
            if span.stage == stage:
                wanted = (span.start * scale, span.end * scale)
                assert shown[span.action] == pytest.approx(wanted, abs=1e-6)
        assert row.count(".") / len(row) == pytest.approx(timeline.bubble, abs=1e-9)


def test_a_chart_as_a_user_sees_it():
    assert gantt.text(checker.predict(make("1f1b", 2, 3)), width=40).splitlines() == [
        "stage 0 |F0|F1|......B0   |F2|B1   |...B2   |",
        "stage 1 |...F0|B0   |F1|B1   |F2|B2   |......",
        "F forward; B backward; number: micro-batch; dots: idle; 1 column: 0.3333",
    ]
    assert gantt.text(checker.predict(make("interleaved", 2, 2)), width=8).splitlines()[:2] == [
        "stage 0 |F0F1f0f1....b0 |..b1 |B0 |B1 |",
        "stage 1 |..F0F1f0b0 |f1b1 |B0 |B1 |....",
    ]


@pytest.mark.parametrize("name", schedules.NAMES)
def test_four_stages_and_eight_micro_batches_fit_a_terminal(name):
    chart = gantt.text(checker.predict(make(name, 4, 8)))
    assert 80 < max(map(len, chart.splitlines())) <= 140


def test_the_width_is_used_and_exceeded_only_for_labels():
    timeline = checker.predict(make("1f1b", 2, 4))  # 15 units of time
    assert len(rows_of(gantt.text(timeline, 100))[0]) == 15 * 6
    assert len(rows_of(gantt.text(timeline, 31))[0]) == 15 * 2
    assert len(rows_of(gantt.text(timeline, 10))[0]) == 15 * 2
    # 2 columns a unit for F0, 2.5 for F1234: 3, so that all edges are on whole columns
    spans = [Span(0, Action("F", 0), 0, 1), Span(0, Action("F", 1234), 1, 3)]
    assert rows_of(gantt.text(checker.timeline(spans), 1)) == ["F0|F1234|"]
    many = checker.predict(make("1f1b", 2, 101))  # F100 needs 4 columns
    assert len(rows_of(gantt.text(many, 10))[0]) == many.total * 4


def measured(seed=0, stages=4, micro_batches=32):
    """Uneven times, on a clock that does not start at 0, in any order."""
    rng = random.Random(seed)
    times = {"F": 0.012, "B": 0.025}
    schedule = make("interleaved", stages, micro_batches)
    found = checker.simulate(
        schedule, lambda _, action: times[action.kind] * rng.lognormvariate(0, 0.2)
    )
    spans = [s._replace(start=s.start + 5e4, end=s.end + 5e4) for s in found.spans]
    rng.shuffle(spans)
    return schedule, checker.timeline(spans)


def test_measured_times_are_drawn_too():
    schedule, timeline = measured()
    rows = rows_of(gantt.text(timeline))
    for stage, row in enumerate(rows):
        boxes = boxes_of(row, chunks=2)
        assert [action for action, _, _ in boxes] == list(schedule.actions[stage])
        shown = {action: (start, end) for action, start, end in boxes}
        scale = len(row) / timeline.total
        for span in timeline.spans:
            if span.stage == stage:
                wanted = ((span.start - 5e4) * scale, (span.end - 5e4) * scale)
                assert shown[span.action] == pytest.approx(wanted, abs=1.01)


def test_an_action_too_short_for_its_number_does_not_show_a_wrong_one():
    lengths = {0: 10.0, 12: 0.7, 34: 10.0, 56: 1e-9}
    spans, time = [], -3.0
    for micro_batch, length in lengths.items():
        spans.append(Span(0, Action("F", micro_batch), time, time + length))
        time += length
    row, legend = gantt.text(checker.timeline(spans), width=60).splitlines()
    assert re.fullmatch(r"stage 0 \|F0 +\|F\|F34 +\|", row) and len(row) < 75
    assert legend.endswith("too short for a number: 2")


def test_a_timeline_without_duration_is_drawn():
    timeline = checker.timeline([Span(0, Action("F", 0), 2.0, 2.0)])
    assert gantt.text(timeline).startswith("stage 0 |\n")
    ET.fromstring(gantt.svg(timeline))


def elements(tree, name):
    return [e for e in tree.iter() if e.get("class") == name]


def numbers(element, *names):
    return [float(element.get(name)) for name in names]


@pytest.mark.parametrize(
    "timeline",
    [*(checker.predict(make(*case)) for case in CASES), measured()[1], measured(1, 8, 256)[1]],
)
def test_svg_has_a_box_for_each_action_at_its_place(timeline):
    tree = ET.fromstring(gantt.svg(timeline, "a < b & c"))
    assert tree.tag == SVG + "svg" and "a < b & c" in [e.text for e in tree.iter(SVG + "text")]
    lanes = elements(tree, "idle")
    stages = sorted({span.stage for span in timeline.spans})
    assert len(lanes) == len(stages)
    left, width = numbers(lanes[0], "x", "width")
    zero = min(span.start for span in timeline.spans)
    ordered = sorted(timeline.spans, key=lambda span: (span.stage, span.start))
    boxes = elements(tree, "action")
    assert len(boxes) == len(ordered)
    chunks = max(span.action.chunk for span in timeline.spans) + 1
    colours = {}
    for span, box in zip(ordered, boxes, strict=True):
        x, y, size = numbers(box, "x", "y", "width")
        assert x == pytest.approx(left + width * (span.start - zero) / timeline.total, abs=0.02)
        assert size == pytest.approx(width * (span.end - span.start) / timeline.total, abs=0.02)
        assert y == float(lanes[stages.index(span.stage)].get("y"))
        words = box.find(SVG + "title").text
        assert words.startswith(f"stage {span.stage}: ")
        assert re.search(rf"micro-batch {span.action.micro_batch}\b", words)
        assert chunks == 1 or f"chunk {span.action.chunk};" in words
        colours.setdefault((span.action.kind, span.action.chunk), set()).add(box.get("fill"))
    # one colour for each kind and chunk, and the legend's
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(colours)
    for kind in "FBW":  # later chunks are lighter
        fills = [colours[k, c] for k, c in sorted(colours) if k == kind]
        assert fills == sorted(fills, key=lambda f: bytes.fromhex(min(f)[1:]))
    legend = {key.get("fill") for key in elements(tree, "key")}
    assert legend == set.union(*colours.values()) | {lanes[0].get("fill")}
    page_width, page_height = map(float, (tree.get("width"), tree.get("height")))
    assert page_width >= left + width and page_height > float(lanes[-1].get("y")) + 26


def test_svg_writes_numbers_into_boxes_and_times_under_them():
    timeline = checker.predict(make("1f1b", 4, 8))
    tree = ET.fromstring(gantt.svg(timeline))
    centred = [e for e in tree.iter(SVG + "text") if e.get("text-anchor") == "middle"]
    inside = {(e.get("x"), e.get("y")): e.text for e in centred if e.get("pointer-events")}
    boxes = elements(tree, "action")
    assert len(inside) == len(boxes) == len(timeline.spans)
    for box in boxes:
        x, y, width = numbers(box, "x", "y", "width")
        number = re.search(r"micro-batch (\d+)", box.find(SVG + "title").text)[1]
        near = [
            t
            for (tx, ty), t in inside.items()
            if x < float(tx) < x + width and y < float(ty) < y + 26
        ]
        assert near == [number]
    left, width = numbers(elements(tree, "idle")[0], "x", "width")
    ticks = {float(e.text): float(e.get("x")) for e in centred if not e.get("pointer-events")}
    assert list(ticks) == [0, 5, 10, 15, 20, 25, 30]
    for time, x in ticks.items():
        assert x == pytest.approx(left + width * time / 33, abs=0.02)


def test_svg_leaves_out_numbers_that_do_not_fit():
    spans = [Span(0, Action("F", 7), 0, 1), Span(0, Action("F", 8), 1, 1.001)]
    texts = [e.text for e in ET.fromstring(gantt.svg(checker.timeline(spans))).iter(SVG + "text")]
    assert "7" in texts and "8" not in texts


def call(*arguments):
    return CliRunner().invoke(cli, ["schedule", *arguments])


def values(output, word):
    line = next(line for line in output.splitlines() if line.startswith(word + " "))
    return line[len(word) :].partition("(")[0].split()


@pytest.mark.parametrize(
    ("arguments", "kept", "waiting", "time", "idle", "bubble", "words"),
    [
        (["--schedule", "gpipe"], "8 8 8 8", None, "33", "9", "27.3%", "(p - 1)(F + B + W) says"),
        ([], "4 3 2 1", None, "33", "9", "27.3%", "(p - 1)(F + B + W) says"),
        (
            ["--schedule", "interleaved", "--chunks", "3", "--pipeline-parallel-size", "3",
             "--micro-batches", "6", "--times", "1,2,1.5"],
            "3.667 3 2.333", None, "30", "3", "10.0%", "(p - 1)(F + B + W) / v says",
        ),
        (
            ["--schedule", "interleaved", "--micro-batches", "6"],
            "5 4.5 3.5 2.5", None, "24.5", "6.5", "26.5%", "not 4.5 as by",
        ),
        (
            ["--schedule", "zb-h1", "--times", "1,1.2,0.8"],
            "4 3 2 1", "1 2 3 4", "28.2", "4.2", "14.9%", "(p - 1)(F + B - W) says",
        ),
        (
            ["--schedule", "zb-h1", "--times", "1,1,2"],
            "4 3 2 1", "1 2 3 4", "35", "3", "8.6%", "(p - 1) B says",
        ),
        (
            ["--schedule", "zb-h1", "--times", "2,0.5,1"],
            "4 3 2 1", "1 2 3 4", "34", "6", "17.6%", "not 4.5 as by",
        ),
        (["--pp", "1", "--times", ".1,.1,.1"], "1", None, "2.4", "0", "0.0%", "says"),
    ],
)  # fmt: skip
def test_the_command_says_what_a_schedule_costs(
    arguments, kept, waiting, time, idle, bubble, words
):
    done = call(*arguments)
    assert done.exit_code == 0 and done.output.isascii()
    assert len(rows_of(done.output)) == len(kept.split())
    assert values(done.output, "micro-batches kept at once") == kept.split()
    if waiting:
        assert values(done.output, "and awaiting W") == waiting.split()
    else:
        assert "awaiting" not in done.output
    assert values(done.output, "time") == [time]
    assert values(done.output, "of it idle on each stage") == [idle]
    assert values(done.output, "bubble") == [bubble]
    assert words in done.output


def test_the_command_writes_an_svg(tmp_path):
    file = tmp_path / "chart.svg"
    done = call("--schedule", "zb-h1", "--pp", "2", "--micro-batches", "3", "--svg", str(file))
    assert done.output.splitlines()[-1] == f"written: {file}"
    tree = ET.fromstring(file.read_text())
    assert len(elements(tree, "action")) == 2 * 3 * 3
    assert "zb-h1: 2 stages, 3 micro-batches" in [e.text for e in tree.iter(SVG + "text")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *((["--times", t], f"'{t}' is not three numbers from") for t in
          ["1,nan,1", "1,2", "0,1,1", "1,-1,1", "1,inf,1", "1,x,1", "1,1,1,1", "", "1,1,1e308"]),
        (["--schedule", "zigzag"], "'zigzag' is not one of"),
        (["--pp", "0"], "--pp"),
        (["--micro-batches", "0"], "--micro-batches"),
        (["--chunks", "0"], "--chunks"),
        (["--svg", os.curdir], "is a directory"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(arguments, words):
    done = call(*arguments)
    assert done.exit_code == 2 and words in done.output


def test_chunks_are_for_interleaved_only():
    with pytest.raises(CupytronError, match=r"chunks=2: 1f1b has 1 a stage"):
        cli.main(["schedule", "--chunks", "2"], standalone_mode=False)


def run(*arguments, **environment):
    code = "import sys\nfrom cupytron.cli.main import _run\nprint(_run(sys.argv[1:]))\n"
    code += "print('numpy' in sys.modules, 'pydantic' in sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code, "schedule", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_file_that_cannot_be_written_gives_one_line(tmp_path):
    done = run("--svg", str(tmp_path / "none" / "chart.svg"))
    assert done.stdout.split()[0] == "1"  # and no chart
    assert done.stderr == f"error: {tmp_path / 'none' / 'chart.svg'}: No such file or directory\n"


def test_help_lists_the_schedules_without_numpy():
    done = run("--help")
    assert "[" + "|".join(schedules.NAMES) + "]" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["0", "False False"]


def test_the_command_works_in_one_process(monkeypatch):
    monkeypatch.setattr("cupytron.cli.main.launched_tasks", lambda: 3)
    with pytest.raises(click.UsageError, match="schedule works in one process"):
        cli.main(["schedule"], standalone_mode=False)
