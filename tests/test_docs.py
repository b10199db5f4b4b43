"""What the README and docs/ say: files, settings, options and classes that they name exist.

docs/pipelines.md: every command runs, and charts and pictures are what the program draws.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from launchers import launch
from runs import TEXT

from cupytron.cli.main import cli
from cupytron.config import RunConfig
from cupytron.config_io import toml_value
from cupytron.config_reader import keys_of
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


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]
KEYS = keys_of(RunConfig)
# names that look like a setting's and are not: other projects', and functions and attributes of ours
NO_KEYS = {"model.require_backward_grad_sync", "optim.apply", "model.blocks"}
SECTION = "|".join(RunConfig.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page):
    text = re.sub(r"\b\w+\.(py|md|bin|json|toml)\b", "", page.read_text())
    named = re.findall(rf"(?<![\w./])(?:{SECTION})\.[a-z_]\w*(?![\w(./])", text)
    assert set(named) - set(KEYS) - NO_KEYS == set()


def test_the_table_of_settings_is_the_schema():
    expected = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in KEYS.items():
        default = "" if field.default is None else f"`{toml_value(field.default)}`"
        expected.append(f"| `{key}` | {default} | {field.description} |")
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    start = lines.index(expected[0])
    found = lines[start : lines.index("", start)]
    assert found == expected, "write this table:\n" + "\n".join(expected)


def rows_of_coming_from():
    """The rows of the tables that say what a thing is called here: (there, here, difference)."""
    text = (ROOT / "docs" / "coming-from.md").read_text()
    for line in text[text.index("## NuMPItron") :].splitlines():
        if line.startswith("| ") and "| here |" not in line and "---" not in line[:8]:
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def options():
    found, pending = set(), [cli]
    while pending:
        command = pending.pop()
        found |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        if isinstance(command, click.Group):
            context = click.Context(command)
            pending += [command.get_command(context, n) for n in command.list_commands(context)]
    return found


def test_every_option_of_ours_in_coming_from_exists():
    rows = list(rows_of_coming_from())
    assert len(rows) > 100 and {len(row) for row in rows} == {3}, [r for r in rows if len(r) != 3]
    named = {o for _, here, _ in rows for o in re.findall(r"--[a-z][\w-]*", here)}
    assert len(named) > 20 and named - options() == set()


def test_every_class_of_ours_in_coming_from_exists():
    source = "\n".join(path.read_text() for path in (ROOT / "cupytron").rglob("*.py"))
    named = {
        name
        for _, here, _ in rows_of_coming_from()
        for name in re.findall(r"`([A-Z][A-Za-z]+)[`(.]", here)
    }
    assert len(named) >= 20
    assert [name for name in named if not re.search(rf"^class {name}\b", source, re.M)] == []


def test_coming_from_denies_nothing_that_there_is():
    """A dash stands for a thing that cupytron lacks: no row with one may name what it has."""
    denied = [there for there, here, _ in rows_of_coming_from() if here == "-"]
    text = " ".join(denied).lower()
    for word in ("bf16", "fp16", "dtype", "device", "compile", "tuner", "recompute", "mfu"):
        assert word not in text, word
    page = (ROOT / "docs" / "coming-from.md").read_text()
    assert "comes with the GPU" not in page


def files_of_the_readme():
    """The paths in the README's list of files; a name with * stands for several."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## Files\n\n```\n(.*?)```", text, re.S)[1]
    folders = []
    for line in block.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = folders[: indent // 2]
        yield line, "/".join([*folders, name.rstrip("/")])
        if name.endswith("/"):
            folders.append(name.rstrip("/"))


def test_every_file_in_the_readme_exists_and_stands_on_a_line_of_its_own():
    listed = dict(files_of_the_readme())
    assert len(set(listed.values())) == len(listed) > 50
    for line, path in listed.items():
        assert list(ROOT.glob(path)), path
        if path.endswith(".py"):
            assert len(re.findall(r"\w+\.py", line)) == (0 if "*" in path else 1), line


def test_no_folder_is_missing_from_the_readme():
    listed = set(dict(files_of_the_readme()).values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    moved = project["package-dir"]
    assert {moved.get(name, name.replace(".", "/")) for name in project["packages"]} <= listed
    pages = {str(Path("docs") / path.name) for path in (ROOT / "docs").glob("*.md")}
    assert pages <= listed


def test_modules_that_the_readme_walks_through_exist():
    text = (ROOT / "README.md").read_text()
    step = text[text.index("## One training step") : text.index("## Files")]
    modules = re.findall(r"`((?:cli|cupytron)/[\w/]+\.py)`", step)
    assert len(modules) >= 7 and all((ROOT / module).is_file() for module in modules)
