"""Ranks that see different checkpoints of a run: all use the same one, or all refuse and name the rank."""

import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
from launchers import launch
from runs import ENVIRONMENT, TINY, cupytron, make_data, run_here

from cupytron import agreement, checkpoint, run
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.cli.options import Settings
from cupytron.comm import CommunicationError, ParallelContext, SelfCommunicator, run_ranks
from cupytron.config import load_config
from cupytron.errors import CheckpointError, ConfigError, UnreadableCheckpoint
from cupytron.run import train
from cupytron.run_folder import RunFolder
from cupytron.trained import load

SHARE = "put the run's folder on a file system that all ranks share"


@pytest.fixture
def impatient(monkeypatch):
    """Let ranks that differ look again at once, without pauses."""
    monkeypatch.setattr(agreement, "PAUSES", (0.001, 0.001))


def write(folder, step, loss=None, value=1.0):
    """A checkpoint of one small tensor."""
    pieces = [Piece("weight/a", (3,), ((0, 3),), 0, 3, np.full(3, value))]
    checkpoint.write(folder.place(step), pieces, {"step": step, "val_loss": loss})


@pytest.fixture
def nodes(tmp_path):
    """The folders of one run on two nodes' own disks, with the same checkpoints."""
    first = RunFolder(tmp_path / "n0" / "run")
    for step, loss in ((10, 1.0), (20, 2.0), (30, 1.5)):
        write(first, step, loss)
    shutil.copytree(first.path, tmp_path / "n1" / "run")
    return first, RunFolder(tmp_path / "n1" / "run")


def choose(nodes, which):
    """The checkpoint that each rank finds, or its error; and the warnings of each rank."""
    warnings = [[], []]

    def body(world):
        try:
            return nodes[world.rank].find(which, warnings[world.rank].append, world).step
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"

    return run_ranks(2, body), warnings


def lose(folder, *steps):
    for step in steps:
        shutil.rmtree(folder.place(step))


def test_ranks_that_see_the_same_take_the_same(nodes):
    assert [choose(nodes, which)[0] for which in ("last", "best", "best or last", "20")] == [
        [30, 30],
        [10, 10],
        [10, 10],
        [20, 20],
    ]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("which", ["last", "best or last", "20"])
@pytest.mark.parametrize(
    ("blind", "steps", "sees"),
    [
        (1, (30,), "its newest there is step 20"),
        (0, (30,), "its newest there is step 20"),
        (1, (10, 20, 30), "it sees no checkpoint there"),
        (0, (10, 20, 30), "it sees no checkpoint there"),
    ],
)
def test_a_rank_that_does_not_see_the_newest_is_named_by_all(nodes, which, blind, steps, sees):
    lose(nodes[blind], *steps)
    (first, second), _ = choose(nodes, which)
    # the path is each rank's own here
    assert first.startswith(f"CheckpointError: rank {blind} (") and sees in first and SHARE in first
    assert f"does not see step-00000030 of {nodes[0].path}, which rank {1 - blind} sees" in first
    assert second.startswith(f"CheckpointError: rank {blind} (") and sees in second


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("which", ["best", "10"])
def test_a_rank_that_does_not_see_the_chosen_step_is_named_by_all(nodes, which):
    lose(nodes[1], 10)
    found, _ = choose(nodes, which)
    for text in found:
        assert "rank 1 (" in text and "step-00000010, which rank 0 sees" in text and SHARE in text


@pytest.mark.usefixtures("impatient")
def test_a_rank_without_the_run_s_folder_is_named_by_all(nodes):
    shutil.rmtree(nodes[1].path)
    found, _ = choose(nodes, "last")
    assert all("rank 1 (" in text and "it sees no checkpoint there" in text for text in found)


@pytest.mark.usefixtures("impatient")
def test_another_checkpoint_of_the_same_step_is_refused(nodes):
    lose(nodes[1], 30)
    write(nodes[1], 30, value=2.0)
    found, _ = choose(nodes, "last")
    assert all(
        "rank 1 (" in text and "another checkpoint" in text and SHARE in text for text in found
    )


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_fall_back_together_and_the_warning_names_the_rank(nodes, rank):
    manifest = nodes[rank].place(30) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"30", b"31"))
    found, warnings = choose(nodes, "last")
    assert found == [20, 20]
    for heard in warnings:
        assert len(heard) == 1 and heard[0].startswith(f"rank {rank} (")
        assert "manifest.json is damaged" in heard[0] and "falling back" in heard[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_read_it_now_stops_all(nodes, monkeypatch, rank):
    def see(self, step):
        error = UnreadableCheckpoint(f"{self.place(step)}: Stale file handle")
        return error if self.path == nodes[rank].path else Checkpoint(self.place(step))

    monkeypatch.setattr(RunFolder, "see", see)
    found, warnings = choose(nodes, "last")
    assert warnings == [[], []]
    for text in found:
        assert text.startswith(f"UnreadableCheckpoint: rank {rank}: ") and "Stale file" in text


def test_a_step_that_a_rank_sees_late_is_waited_for(nodes, monkeypatch):
    late = nodes[1].place(30).rename(nodes[1].path / "late")
    looks, pause = [], time.sleep

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 4:  # both ranks have looked twice
            late.rename(nodes[1].place(30))
        pause(0.001)

    monkeypatch.setattr(agreement.time, "sleep", sleep)
    assert choose(nodes, "last") == ([30, 30], [[], []])


# whole commands


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("trained") / "run"
    run_here(data, out, "train.max_steps=8", "checkpoint.keep=9", "train.eval_interval=0")
    return out


@pytest.fixture
def two_disks(tmp_path, trained_run):
    """Two working folders with the run; rank 1 does not see its newest checkpoint."""
    for node in ("n0", "n1"):
        shutil.copytree(trained_run, tmp_path / node / "run")
    lose(RunFolder(tmp_path / "n1" / "run"), 8)
    return tmp_path


def errors_of(body):
    """The error of each of two ranks that run body(world)."""

    def guarded(world):
        try:
            body(world)
        except CommunicationError:
            raise
        except CheckpointError as error:
            return str(error)
        return "no error"

    return run_ranks(2, guarded)


@pytest.mark.usefixtures("impatient")
def test_ranks_load_one_model_or_none(two_disks):
    def body(world):
        load(two_disks / f"n{world.rank}" / "run", context=ParallelContext(tp=2, world=world))

    assert all("rank 1 (" in text and "step-00000008" in text for text in errors_of(body))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["resumed", "init from", "new on rank 0"])
def test_ranks_train_one_run_or_none(two_disks, data, monkeypatch, how):
    """Threads share one working folder, so each rank's relative paths are put below a folder of its own."""
    here = threading.local()

    def on_own_disk(path):
        return RunFolder(two_disks / ("" if path == "new" else here.node) / path)

    monkeypatch.setattr(run, "RunFolder", on_own_disk)
    if how == "new on rank 0":
        shutil.rmtree(two_disks / "n0" / "run")
    config = load_config(overrides=[*TINY, f'data.path="{data}"', "parallel.dp=2"])
    out, source = ("run", None) if how != "init from" else ("new", "run")

    def body(world):
        here.node = f"n{world.rank}"
        train(config, out, dict(ENVIRONMENT), init_from=source, quiet=True, world=world)

    texts = errors_of(body)
    blind = 0 if how == "new on rank 0" else 1
    assert all(f"rank {blind} (" in text and "does not see step-" in text for text in texts)
    assert not list(two_disks.glob("new/checkpoints/*"))


@pytest.mark.usefixtures("impatient")
def test_a_folder_that_ranks_do_not_share_is_refused_before_the_first_step(tmp_path):
    folders = [tmp_path / "n0", tmp_path / "n1"]
    for folder in folders:
        folder.mkdir()
    texts = errors_of(lambda world: agreement.check_shared(folders[world.rank], world))
    assert all("rank 1 (" in text and "does not see what rank 0 (" in text for text in texts)
    assert errors_of(lambda world: agreement.check_shared(folders[0], world)) == ["no error"] * 2
    assert not list(tmp_path.glob("*/.*"))


def test_a_folder_in_which_nothing_can_be_written_is_refused_before_the_first_step(tmp_path):
    """A file in the place of the folder stands for it: root may write everywhere."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OSError, match="Not a directory"):
        agreement.check_shared(tmp_path / "checkpoints", SelfCommunicator())


def test_a_new_run_without_data_says_where_settings_may_be_and_one_with_data_does_not(
    monkeypatch, tmp_path
):
    """Under a launcher, a rank that does not see the run has no settings for that reason alone."""
    monkeypatch.setenv("PMI_SIZE", "2")
    wrong = ["optim.lr=x", f'data.path="{tmp_path}"']
    for overrides, said in ((wrong[:1], True), (wrong, False)):
        with pytest.raises(ConfigError) as caught:
            Settings(overrides=overrides).load(run=str(tmp_path / "run"), mesh=True)
        assert ("sees no checkpoint" in str(caught.value)) == said


def test_ranks_with_other_commands_are_told_in_one_line(tmp_path, data, trained_run):
    """Whatever a command does first on all ranks, comparing what they were told comes before it."""
    train = [cupytron(), "train", "--data", str(data), "--out", str(tmp_path / "run")]
    command, env = launch("mpich", 1, train)
    for name in ("global_batch=24", "micro_batch=12"):
        command += ["--set", f"train.{name}"]
    words = [*command, ":", "-n", "1", cupytron(), "eval", str(trained_run)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "rank 1 was started with other settings than rank 0" in done.stderr


def on_two_disks(folder, *arguments):
    """A job of two processes, each in a working folder of its own; MPICH and Open MPI take -wdir alike."""
    command, env = launch("mpich", 1, [cupytron(), *arguments])
    second = [":", "-n", "1", "-wdir", str(folder / "n1"), cupytron(), *arguments]
    words = [*command[:3], "-wdir", str(folder / "n0"), *command[3:], *second]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    "words",
    [["eval", "run", "--tp", "2"], pytest.param(["train", "--out", "run"], marks=pytest.mark.slow)],
    ids=lambda words: words[0],
)
def test_two_processes_with_disks_of_their_own(two_disks, words):
    done = on_two_disks(two_disks, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 (" in done.stderr and "does not see step-00000008 of run" in done.stderr
    assert "validation loss" not in done.stdout and "resuming" not in done.stdout
