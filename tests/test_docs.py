"""docs/pipelines.md: every command runs, and charts and pictures are what the program draws."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from launchers import launch
from runs import TEXT

from cupytron.cli.main import cli
from cupytron.parallel import checker, gantt, schedules

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pipelines.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S)
# what makes a measurement short enough for a test: nothing is held against its figures here
SHORT = {
    "benchmarks/pipelines.py": ["--unit", "2", "--steps", "1"],
    "tests/pipeline_memory.py": ["--small"],
}
COMMANDS = [b.splitlines() for b in BLOCKS if b.startswith(("cupytron", "mpirun"))]
CHARTS = [b for b in BLOCKS if b.startswith("stage 0 |")]


def test_charts_are_what_the_command_before_them_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [block[0] for block in COMMANDS if block[0].startswith("cupytron schedule")]
    assert len(commands) == len(CHARTS) == len(schedules.NAMES)
    for command, chart in zip(commands, CHARTS, strict=True):
        done = CliRunner().invoke(cli, shlex.split(command)[1:])
        assert done.exit_code == 0 and done.output.startswith(chart), command
    assert (tmp_path / "gpipe.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1"])
def test_pictures_are_drawn_from_the_schedule(name):
    """The predicted ones, but for what the title says; measured ones show times of their own."""
    timeline = checker.predict(schedules.make(name, 4, 8))
    drawn = [
        re.findall(r"<rect.*?(?=<rect|$)", text, re.S)
        for text in (
            (ROOT / "docs" / "pictures" / f"{name}-predicted.svg").read_text(),
            gantt.svg(timeline),
        )
    ]
    assert len(drawn[0]) == len(drawn[1]) > 64


@pytest.mark.timeout(300)
def test_every_other_command_runs(tmp_path):
    """In their order, in an empty folder with some text."""
    (tmp_path / "text.txt").write_text(TEXT)
    for folder in ("examples", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    outputs = {}
    for command in [c for block in COMMANDS for c in block if " schedule " not in c]:
        words = shlex.split(command)
        ranks = 1
        if words[0] == "mpirun":
            ranks, words = int(words[2]), words[3:]
        short = next((more for script, more in SHORT.items() if script in words), [])
        program = [str(Path(sys.executable).parent / words[0]), *words[1:], *short]
        argv, environ = program, {**os.environ, **environment}
        if ranks > 1:
            argv, environ = launch("mpich", ranks, program)
        done = subprocess.run(
            argv, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100
        )
        # 1: bubbles of actions as short as these are not the predicted ones
        assert done.returncode in ((0, 1) if short else (0,)), (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        outputs[command] = done.stdout
    assert len(outputs) == 11
    said = "".join(outputs.values())
    assert said.count("the same numbers") >= 2
    assert re.search(
        r"bubble [\d.]+ % measured, [\d.]+ % predicted \(zb-h1, 2 stages, 4 micro", said
    )
    assert "the largest difference is" in said and said.count("zb-v") >= 2
    assert "resuming from" in said and "validation loss" in said
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
