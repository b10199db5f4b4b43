"""Whatever stands under our names in a run's or a data set's folder: no command waits for it, and nothing
that we write goes through a link to another place."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import runs

from cupytron import history, process
from cupytron.checkpoint import Checkpoint
from cupytron.cli.main import _run
from cupytron.durable import left_by_replacing, open_in_place, replacing
from cupytron.errors import CheckpointError, UnreadableCheckpoint
from cupytron.kernels import tables
from cupytron.run_folder import RunFolder

STEPS = "train.max_steps=4"
COMMANDS = [
    "checkpoint ls {run}",
    "checkpoint verify {run}",
    "checkpoint digest {run}",
    "eval {run}",
    "sample {run} --max-new-tokens 2",
    "report {run} --text",
    "train --out {run} --max-steps 5",
    "data inspect {data}",
    "config validate {run}/config.toml",
]
OF_RUN = ["config.toml", "environment.json", "metrics.jsonl", "tokenizer.json", "saved", ".lock"]
OF_CHECKPOINT = ["manifest.json", "rank-00000.safetensors"]
OF_DATA = ["train.bin", "val.bin", "train.json", "val.json", "tokenizer.json"]
WRITTEN = ["report.html", "sample.txt", "trace.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    data = runs.make_data(folder)
    runs.run_here(data, folder / "run", STEPS)
    return folder


@pytest.fixture
def here(tmp_path, made):
    """A run and its data, copies that a test may break."""
    shutil.copytree(made / "data", tmp_path / "data")
    shutil.copytree(made / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(made / "data"), str(tmp_path / "data")))
    return tmp_path


@pytest.fixture(autouse=True)
def limit():
    """A command that waits fails, wherever it waits."""

    def over(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def say(line, here, capsys):
    """Run a command in this process; returns its exit code and its error lines without warnings."""
    words = line.format(run=here / "run", data=here / "data").split()
    code = _run(words)
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if not line.startswith("warning: ")]


def places(here):
    checkpoint = here / "run" / "checkpoints" / "step-00000004"
    return [
        *(here / "run" / name for name in OF_RUN + WRITTEN),
        *(checkpoint / name for name in OF_CHECKPOINT),
        *(here / "data" / name for name in OF_DATA),
    ]


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path.name)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [fifo, device, folder, loop])
@pytest.mark.parametrize("number", range(len(OF_RUN + WRITTEN + OF_CHECKPOINT + OF_DATA)))
def test_no_command_waits_for_what_is_no_file(here, capsys, plant, number):
    check(places(here)[number], plant, here, capsys)


@pytest.mark.parametrize("name", ["run/config.toml", "run/metrics.jsonl", "data/train.bin"])
def test_no_command_waits_for_a_pipe(here, capsys, name):
    check(here / name, fifo, here, capsys)


def check(place, plant, here, capsys):
    place.unlink(missing_ok=True)
    plant(place)
    for line in COMMANDS:
        code, lines = say(line, here, capsys)
        # in one line, or it does not need the file
        assert (code == 0 and not lines) or (code in (1, 2) and len(lines) <= 1), (line, lines)


def test_a_run_a_checkpoint_and_data_may_be_links_to_other_disks(here, capsys):
    other = here / "other disk"
    other.mkdir()
    checkpoint = here / "run" / "checkpoints" / "step-00000004"
    for path in (checkpoint, here / "data" / "train.bin", here / "data", here / "run"):
        moved = shutil.move(path, other / f"{path.name} moved")
        path.symlink_to(moved)
    for line in COMMANDS:
        assert say(line, here, capsys) == (0, []), line


def test_a_checkpoints_files_are_not_links(here, capsys):
    """Its manifest could name any file of this machine, and say whether a digest is that file's."""
    place = here / "run" / "checkpoints" / "step-00000004"
    for name in OF_CHECKPOINT:
        shutil.move(place / name, here / name)
        (place / name).symlink_to(here / name)
        with pytest.raises(UnreadableCheckpoint, match=f"{name} cannot be read .is a link"):
            Checkpoint(place).verify()
        # nothing is lost: no command sets it aside
        assert say("train --out {run} --max-steps 5", here, capsys)[0] == 1
        shutil.move(here / name, place / name)
    Checkpoint(place).verify()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "rank-00000.safetensors/../x"])
def test_a_manifest_names_no_file_that_is_not_ours(here, name):
    from cupytron.manifest import MANIFEST, read_manifest, seal

    place = here / "run" / "checkpoints" / "step-00000004"
    body = read_manifest(place).body
    body["files"] = dict.fromkeys([name], *body["files"].values())
    (place / MANIFEST).write_bytes(seal(body))
    with pytest.raises(CheckpointError, match="has a missing or wrong entry"):
        Checkpoint(place)


# what is written


def links_to(secret, path):
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


def test_links_under_our_names_are_not_written_through(here, capsys):
    secret, absent = here / "secret", here / "absent"
    secret.write_text("keep")
    run = here / "run"
    names = ["config.toml", "environment.json", "tokenizer.json", "saved", "metrics.jsonl"]
    for name in [*names, *WRITTEN, "loss.png"]:
        # the names that earlier versions used for new content
        links_to(secret, run / f".{name}.tmp")
        links_to(secret, run / ".lock")
    (run / ".lock").unlink()
    for name in ("config.toml", "saved"):
        links_to(absent, run / name)
    for name in ("report.html", "loss.png", "trace.json"):
        links_to(secret, run / name)
    for line in (
        f"report {run} --png {run}/loss.png",
        f"train --out {run} --max-steps 5 --trace 4:5",
    ):
        assert say(line, here, capsys) == (0, []), line
    assert secret.read_text() == "keep" and not absent.exists()
    for name in ("config.toml", "report.html", "loss.png", "trace.json", "saved"):
        assert not (run / name).is_symlink(), name


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_link_that_would_be_appended_to_is_refused(here, capsys, name):
    """Where metrics.jsonl is a link to nothing, no file is made there."""
    links_to(here / "absent", here / "run" / name)
    code, lines = say("train --out {run} --max-steps 5", here, capsys)
    assert code == 1 and len(lines) == 1 and "is a link" in lines[0]
    assert not (here / "absent").exists()


def test_a_damaged_record_is_copied_through_no_link(here):
    run = RunFolder(here / "run")
    run.metrics.write_bytes(b"{\n" + run.metrics.read_bytes())
    links_to(here / "absent", here / "run" / ".metrics.damaged.jsonl.tmp")
    assert "kept as" in history.damage(run, run.find("last", print))
    assert not (here / "absent").exists()


def test_a_report_replaces_no_device(here, capsys):
    """For root, a rename over /dev/null would work."""
    (here / "null").symlink_to(os.devnull)
    code, lines = say(f"report {{run}} --out {here / 'null'}", here, capsys)
    assert (code, lines) == (1, [f"error: {here / 'null'}: is not a file"])


# files that are replaced


def test_replacing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        assert len(left_by_replacing(path)) == 1
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_in_place_means_at_the_end(tmp_path):
    for text in (b"one ", b"two"):
        with open_in_place(tmp_path / "a") as file:
            file.seek(0)
            before = file.read()
            file.write(text)
    assert before == b"one " and (tmp_path / "a").read_bytes() == b"one two"


@pytest.mark.parametrize("write", ["process", "tables"])
def test_caches_leave_nothing_behind_where_they_cannot_be_written(tmp_path, monkeypatch, write):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    if write == "process":
        process._write(tmp_path / "kernel.json", {"a": ""})
    else:
        with pytest.raises(OSError):
            tables.write(tmp_path / "table.json", {}, {}, {})
    assert not list(tmp_path.iterdir())


def test_the_ids_of_a_pipe_are_not_waited_for(here):
    from cupytron.data.errors import DataError
    from cupytron.data.tokens import FileTokens

    os.mkfifo(here / "pipe")
    with pytest.raises(DataError, match="is not a file"):
        FileTokens(here / "pipe", np.dtype("uint16"))
    assert json.loads((here / "data" / "train.json").read_text())["tokens"] > 0
