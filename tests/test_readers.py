"""Commands that read a run while it trains, prunes and replaces its checkpoints: none of them fails.

CUPYTRON_READERS says how many commands read beside a real run (the acceptance run asks for 1,000).
"""

import itertools
import json
import os
import shutil
import subprocess
import threading
import time

import pytest
from runs import TEXT, command, cupytron, make_data, run_here, start

from cupytron import checkpoint, sealed
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.cli.main import _run
from cupytron.comm import ParallelContext, run_ranks
from cupytron.errors import CheckpointError, GoneCheckpoint
from cupytron.run_folder import RunFolder
from cupytron.trained import load

READERS = int(os.environ.get("CUPYTRON_READERS", "200"))
SMALL = ["train.max_steps=4", "checkpoint.keep=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), text=TEXT[:6000])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("trained") / "run"
    run_here(data, out, *SMALL)
    return out


@pytest.fixture
def run(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    return RunFolder(tmp_path / "run")


class Writer(threading.Thread):
    """Saves a run's weights at one step after the other, some of them twice, and keeps one checkpoint.

    Attributes:
        saved: how many saves there have been. error: of the thread, if it failed.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(daemon=True)
        self.folder, self.saved, self.error = folder, 0, None
        self._over = threading.Event()

    def run(self) -> None:
        try:
            first = self.folder.find("last", print)
            about = {k: v for k, v in first.about.items() if k not in ("format", "pieces", "files")}
            pieces = [
                Piece(name, a.shape, tuple((0, n) for n in a.shape), 0, a.size, a.reshape(-1))
                for name, a in first.tensors()
            ]
            config = self.folder.config.read_text()
            for step in itertools.count(first.step):
                for _ in range(1 + step % 2):
                    self._save(step, pieces, {**about, "step": step, "val_loss": 9.0 - step / 1000})
                self.folder.write(self.folder.config, config)
                self.folder.keep_metrics(step)
                with self.folder.metrics.open("a") as file:
                    file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
                if self._over.is_set():
                    return
        except BaseException as error:
            self.error = error

    def _save(self, step, pieces, about) -> None:
        checkpoint.write(self.folder.place(step), pieces, about)
        self.folder.prune(1)
        self.saved += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join()
        assert self.error is None, self.error


def beside(run, times, call):
    """Call call() many times beside a writer, until the writer has saved as often."""
    with Writer(run) as writer:
        done = 0
        while done < times or writer.saved < times // 4:
            call()
            done += 1


def heard(text):
    raise AssertionError(f"a warning beside a run that only prunes: {text}")


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_is_read_beside_a_run_that_prunes(run, which):
    digest = run.find("last", heard).digest()
    found = lambda: run.reading(which, heard, lambda found: found.digest())  # noqa: E731
    beside(run, 8, lambda: [found() == digest or pytest.fail("other weights")])


def test_a_survey_leaves_out_what_has_gone(run):
    def call():
        seen = dict(run.survey(lambda found: found.verify()))
        assert seen and set(seen.values()) == {None}

    beside(run, 30, call)


def test_ranks_look_again_together(run):
    def body(world):
        mesh = ParallelContext(tp=2, world=world)
        return [load(run.path, "last", heard, mesh).step for _ in range(15)]

    with Writer(run):
        first, second = run_ranks(2, body)
    assert first == second == sorted(first)


@pytest.mark.parametrize(
    "words",
    [["eval"], ["sample", "--max-new-tokens", "2"], ["report", "--no-sample"]]
    + [["checkpoint", command] for command in ("ls", "verify", "digest")],
    ids=lambda words: words[-1] if words[0] == "checkpoint" else words[0],
)
def test_commands_beside_a_run_that_prunes(run, words, capsys):
    at = 2 if words[0] == "checkpoint" else 1
    arguments = [*words[:at], str(run.path), *words[at:]]

    def call():
        code = _run(arguments)
        out, err = capsys.readouterr()
        assert (code, err) == (0, "") and out and "damaged" not in out

    beside(run, 10, call)


def test_a_step_that_was_pruned_meanwhile_is_said_plainly(run):
    def work(found):
        read.append(found.step)
        run.place(4).rename(run.place(5))
        raise GoneCheckpoint(f"{found.folder}: it was removed")

    read = []
    with pytest.raises(CheckpointError, match="no checkpoint '4'; choose best, last or one of 5"):
        run.reading("4", heard, work)
    assert read == [4]


def test_a_checkpoint_that_is_removed_is_read_to_its_end(run):
    """A run that saves faster than its checkpoints are read would leave a reader none otherwise."""
    digest = run.find("last", heard).digest()

    def work(found):
        shutil.rmtree(found.folder)
        return found.digest()

    assert run.reading("last", heard, work) == digest


def test_a_reader_gives_up_in_words(run, monkeypatch):
    monkeypatch.setattr("cupytron.reading._BETWEEN", 0.0)

    def gone(found):
        raise GoneCheckpoint(f"{found.folder}: it was removed")

    with pytest.raises(CheckpointError, match="20 checkpoints in turn were removed") as caught:
        run.reading("last", heard, gone)
    assert not isinstance(caught.value, GoneCheckpoint)


def test_what_looked_damaged_while_it_was_replaced_is_no_damage(run, monkeypatch):
    """While a checkpoint is replaced, its manifest is missing for a moment, and then there again."""
    place, looks = run.place(4), []
    original = Checkpoint.__init__

    def init(self, folder):
        looks.append(folder)
        aside = folder.with_name("aside")
        if len(looks) == 1:
            folder.rename(aside)
        try:
            original(self, folder)
        finally:
            if len(looks) == 1:
                aside.rename(folder)

    monkeypatch.setattr(Checkpoint, "__init__", init)
    assert isinstance(run.see(4), GoneCheckpoint)
    assert run.find("last", heard).folder == place


def test_settings_are_read_where_the_newest_checkpoint_was_removed_after_it_was_listed(
    run, monkeypatch
):
    steps, listed = sealed.list_steps(run.path), []

    def list_steps(path):
        listed.append(path)
        return [*steps, 999] if len(listed) == 1 else steps

    monkeypatch.setattr(sealed, "list_steps", list_steps)
    assert sealed.sealed_settings(run.path)["train"]["max_steps"] == 4 and len(listed) == 2
    monkeypatch.setattr(sealed, "list_steps", lambda path: [999])
    monkeypatch.setattr("cupytron.reading._BETWEEN", 0.0)
    with pytest.raises(GoneCheckpoint, match="there is no such checkpoint"):
        sealed.sealed_settings(run.path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_readers_beside_a_real_run(data, tmp_path, capsys):
    """A real process trains, saves and evaluates at every step, and keeps one checkpoint."""
    out = tmp_path / "run"
    settings = ["train.max_steps=1000000", "checkpoint.keep=1", "checkpoint.interval=1"]
    writer = start(
        command(data, out, *settings, "train.eval_interval=3", "train.log_interval=1000000")
    )
    run = RunFolder(out)
    while len(run.steps()) < 1 or len(run.read_metrics()) < 2:
        assert writer.poll() is None, writer.communicate()[0]
        time.sleep(0.1)
    page = str(tmp_path / "page.html")
    commands = [
        ["eval", str(out)],
        ["eval", str(out), "--checkpoint", "last"],
        ["sample", str(out), "--max-new-tokens", "2", "--checkpoint", "last"],
        ["checkpoint", "verify", str(out)],
        [
            "report",
            str(out),
            "--out",
            page,
            "--no-sample",
        ],  # it would pass over an error in its sample
    ]
    before, failures = run.steps()[-1], []
    for number in range(READERS):
        words = commands[number % len(commands)]
        if number % 100 < len(commands):
            done = subprocess.run([cupytron(), *words], capture_output=True, text=True, timeout=100)
            code, err = done.returncode, done.stderr
        else:
            code, err = _run(words), capsys.readouterr().err
        if code or err:
            failures.append((number, words, code, err))
    after = run.steps()[-1]
    assert writer.poll() is None, writer.communicate()[0]
    writer.terminate()
    writer.communicate(timeout=100)
    assert not failures, failures[:5]
    assert writer.returncode == 75 and after - before > READERS / 10
