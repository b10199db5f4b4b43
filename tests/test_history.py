"""A run goes on with the settings, data and metrics that it has saved, and says which of them are lost."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from runs import ENVIRONMENT, TEXT, make_data, run_here

from cupytron.cli.options import Settings
from cupytron.comm import run_ranks
from cupytron.config import load_config
from cupytron.errors import CheckpointError, CupytronError, UnreadableCheckpoint
from cupytron.history import damage, ranges
from cupytron.run import train
from cupytron.run_folder import RunFolder
from cupytron.trained import load

SHORT = ["train.max_steps=8", "train.eval_interval=0", "optim.decay_steps=12"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), text=TEXT[:6000])


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Another text of the same length and alphabet."""
    text = TEXT[:6000].replace("quick", "kciuq")
    return make_data(tmp_path_factory.mktemp("other"), text=text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 8 steps, saved at 4 and 8, and the digest that it has at step 12."""
    place = tmp_path_factory.mktemp("finished")
    run_here(data, place / "run", *SHORT)
    shutil.copytree(place / "run", place / "whole")
    run_here(data, place / "whole", *SHORT, "train.max_steps=12")
    return place / "run", digest(place / "whole")


@pytest.fixture
def out(tmp_path, finished):
    """A copy of that run, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "run")
    return RunFolder(tmp_path / "run")


def digest(folder):
    return RunFolder(folder).find("last", print).digest()


def go_on(folder, capsys, *overrides, config=None):
    """Go on to step 12 with the run's own settings; returns the lines that were printed."""
    capsys.readouterr()
    settings = Settings(overrides=["train.max_steps=12", *overrides])
    train(config or settings.load(run=str(folder.path), mesh=True), folder.path, dict(ENVIRONMENT))
    return capsys.readouterr().out.splitlines()


def warnings(lines):
    return [line for line in lines if line.startswith("warning: ")]


QUIET = ["warning: setting changed: train.max_steps: 8 before, 12 now"]


def test_a_run_that_nobody_touched_goes_on_in_silence(out, finished, capsys):
    assert warnings(go_on(out, capsys)) == QUIET
    assert digest(out.path) == finished[1]


# settings


def test_settings_come_from_the_checkpoint_not_from_config_toml(out, finished, capsys):
    """With one flipped bit in config.toml, 1.0 to 9.0, a run used to go on with another clip."""
    before = out.config.read_text()
    assert "clip = 1.0" in before
    out.config.write_text(before.replace("clip = 1.0", "clip = 9.0"))
    assert Settings().load(run=str(out.path)).optim.clip == 1.0
    told = warnings(go_on(out, capsys))
    assert told[1:] == [
        f"warning: {out.config} says optim.clip=9.0, the checkpoint 1.0, which is used; to change it "
        "give --set optim.clip=9.0"
    ]
    assert digest(out.path) == finished[1]
    assert "clip = 1.0" in out.config.read_text()


def test_a_flag_still_changes_a_setting(out, capsys):
    out.config.write_text(out.config.read_text().replace("clip = 1.0", "clip = 9.0"))
    told = warnings(go_on(out, capsys, "optim.clip=9.0"))
    assert "warning: setting changed: optim.clip: 1.0 before, 9.0 now" in told
    assert not any("which is used" in line for line in told)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "there is no such file"), (b"[model\n", "not valid TOML")],
)
def test_a_run_goes_on_without_a_readable_config_toml(out, finished, capsys, content, reason):
    expected = out.config.read_bytes()
    out.config.unlink()
    if content is not None:
        out.config.write_bytes(content)
    told = warnings(go_on(out, capsys))
    assert len(told) == 2 and reason in told[1] and "step-00000008 seals are used" in told[1]
    assert digest(out.path) == finished[1]
    assert out.config.read_bytes() == expected.replace(b"max_steps = 8", b"max_steps = 12")


def test_data_that_the_run_was_told_have_moved_are_found(out, data, tmp_path, finished, capsys):
    shutil.copytree(data, tmp_path / "moved")
    moved = out.config.read_text().replace(str(data), str(tmp_path / "moved"))
    out.config.write_text(moved)
    assert Settings().load(run=str(out.path)).data.path == str(tmp_path / "moved")
    assert warnings(go_on(out, capsys)) == QUIET
    assert digest(out.path) == finished[1]


def test_a_damaged_newest_manifest_gives_way_to_an_older_one(out):
    (out.place(8) / "manifest.json").write_text("{}")
    out.config.unlink()
    assert Settings().load(run=str(out.path)).train.max_steps == 8
    (out.place(4) / "manifest.json").write_text("{}")
    assert Settings().load(run=str(out.path)) == load_config()


def test_settings_are_known_before_numpy_is_imported(out):
    code = (
        "import sys\nfrom cupytron.cli.options import Settings\n"
        f"assert Settings().load(run={str(out.path)!r}).train.max_steps == 8\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# data


def test_a_replaced_validation_split_is_told(out, data, other_data, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(data, mixed)
    for name in ("val.bin", "val.json"):
        shutil.copy(other_data / name, mixed / name)
    told = warnings(go_on(out, capsys, f'data.path="{mixed}"'))
    assert len(told) == 2 and "the validation split has changed" in told[0]
    assert "the best loss so far counts no more" in told[0]


def test_another_mesh_is_told_where_it_may_change_bits(out, capsys):
    own = load_config(file=out.config)
    parallel = own.parallel.model_copy(update={"dp": 2})
    train_settings = own.train.model_copy(update={"max_steps": 9})
    config = own.model_copy(update={"parallel": parallel, "train": train_settings})
    run_ranks(2, lambda world: train(config, out.path, dict(ENVIRONMENT), world=world))
    told = warnings(capsys.readouterr().out.splitlines())
    assert told[1:] == [
        "warning: the mesh has changed, so the last bits may differ: "
        "tp=1 pp=1 dp=1 zero=0 before, tp=1 pp=1 dp=2 zero=0 now"
    ]


def test_eval_says_that_the_data_set_is_another_one(out, other_data):
    said = []
    right = load(out.path, warn=said.append).evaluate()
    assert not said
    text = out.config.read_text()
    out.config.write_text(text.replace(load_config(file=out.config).data.path, str(other_data)))
    model = load(out.path, warn=said.append)
    assert model.evaluate() != right
    assert len(said) == 1 and str(other_data) in said[0] and "cannot be compared" in said[0]
    model.evaluate(other_data)  # that was asked for
    assert len(said) == 1


# checkpoints


def test_a_run_that_has_saved_and_lost_its_checkpoints_is_not_begun_again(
    out, data, finished, monkeypatch
):
    monkeypatch.setattr("cupytron.agreement.PAUSES", (0.001,))
    kept = {path.name: path.read_bytes() for path in out.path.iterdir() if path.is_file()}
    out.checkpoints.rename(out.path / "elsewhere")
    for make in (lambda: None, out.checkpoints.mkdir):
        make()
        with pytest.raises(
            CheckpointError, match=r"has saved checkpoints.*put the checkpoints back"
        ):
            run_here(data, out.path, *SHORT)
    now = {path.name: path.read_bytes() for path in out.path.iterdir() if path.is_file()}
    assert {**now, ".lock": b""} == {**kept, ".lock": b""}
    out.checkpoints.rmdir()
    (out.path / "elsewhere").rename(out.checkpoints)
    run_here(data, out.path, *SHORT, "train.max_steps=12")
    assert digest(out.path) == finished[1]


def test_a_run_that_was_killed_before_its_first_save_begins_again(out, data, capsys):
    shutil.rmtree(out.checkpoints)
    out.checkpoints.mkdir()
    out.saved.unlink()
    out.metrics.write_bytes(b"".join(out.metrics.read_bytes().splitlines(keepends=True)[:3]))
    run_here(data, out.path, *SHORT)
    assert out.steps() == [4, 8] and out.saved.read_text() == "4\n"
    assert [r["step"] for r in out.read_metrics() if "loss" in r] == list(range(1, 9))


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_run_of_an_earlier_version_that_has_lost_its_checkpoints_is_refused(out, data, folder):
    shutil.rmtree(out.checkpoints)
    if folder == "empty":
        out.checkpoints.mkdir()
    out.saved.unlink()  # an earlier version wrote no such file
    before = out.metrics.read_bytes()
    with pytest.raises(CupytronError, match=r"has saved checkpoints|would be overwritten"):
        run_here(data, out.path, *SHORT)
    assert out.metrics.read_bytes() == before


@pytest.fixture
def unsealed(out, monkeypatch):
    """The run as an earlier version saved it: no checkpoint seals its records."""
    opened = RunFolder.see

    def see(self, step):
        found = opened(self, step)
        found.about.pop("metrics", None)
        return found

    monkeypatch.setattr(RunFolder, "see", see)
    out.saved.unlink()
    return out


@pytest.mark.parametrize("half_a_line", [b"", b'{"step": 9, "lo'])
def test_records_without_a_seal_that_are_whole_are_resumed_in_silence(
    unsealed, capsys, half_a_line
):
    with open(unsealed.metrics, "ab") as file:
        file.write(half_a_line)
    assert warnings(go_on(unsealed, capsys)) == QUIET


def test_records_without_a_seal_that_are_missing_are_told(unsealed, capsys):
    unsealed.metrics.unlink()
    lines = warnings(go_on(unsealed, capsys))
    assert any("metrics.jsonl is missing: the records of steps 1 to 8 are lost" in x for x in lines)


def test_records_without_a_seal_that_cannot_be_read_are_told_and_kept(unsealed, capsys):
    lines = unsealed.metrics.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], b"\xff" + lines[3], *lines[5:]])
    unsealed.metrics.write_bytes(damaged)
    told = [line for line in warnings(go_on(unsealed, capsys)) if "is damaged" in line]
    assert (
        len(told) == 1
        and "missing or cannot be read" in told[0]
        and "metrics.damaged.jsonl" in told[0]
    )
    assert (unsealed.path / "metrics.damaged.jsonl").read_bytes() == damaged


def test_checkpoints_that_were_set_aside_stay(out, data):
    for _ in range(2):
        file = out.place(8) / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        run_here(data, out.path, *SHORT)
    names = sorted(path.name for path in out.checkpoints.iterdir())
    assert names == [
        "damaged-step-00000008",
        "damaged-step-00000008-2",
        "step-00000004",
        "step-00000008",
    ]


def test_a_checkpoint_that_cannot_be_read_now_is_neither_passed_over_nor_removed(
    out, data, monkeypatch
):
    see = RunFolder.see
    hidden = {8}

    def stale(self, step):
        if step in hidden:
            return UnreadableCheckpoint(f"{self.place(step)}: Stale file handle")
        return see(self, step)

    monkeypatch.setattr(RunFolder, "see", stale)
    for work in (
        lambda: out.newest(print),
        lambda: out.find("best or last", print),
        lambda: run_here(data, out.path, *SHORT),
    ):
        with pytest.raises(UnreadableCheckpoint, match="Stale file handle"):
            work()
    assert sorted(path.name for path in out.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000008",
    ]
    hidden = {4}
    out.prune(1)
    assert out.steps() == [4, 8]  # it may be the best one
    hidden = set()
    out.prune(1)
    assert 8 in out.steps()


# metrics


def test_a_checkpoint_seals_the_metrics(out):
    for step in out.steps():
        sealed = out.find(str(step), print).about["metrics"]
        content = out.metrics.read_bytes()[: sealed["bytes"]]
        assert hashlib.sha256(content).hexdigest() == sealed["sha256"]
        assert json.loads(content.splitlines()[-1])["step"] == step


def flipped(content, at, value):
    changed = bytearray(content)
    changed[at] = value
    return bytes(changed)


def line_of(content, step):
    """The byte where the record of a step begins."""
    return content.index(b'{"step": %d,' % step)


DAMAGE = {
    "missing": (lambda c: None, "is missing: the records of steps 1 to 8 are lost", False),
    "cut": (
        lambda c: c[: line_of(c, 6) + 9],
        "steps 6-8 are missing or cannot be read; it is",
        True,
    ),
    "cut between lines": (
        lambda c: c[: line_of(c, 6)],
        "steps 6-8 are missing or cannot be read",
        False,
    ),
    "a byte": (
        lambda c: flipped(c, line_of(c, 3), 0xFF),
        "the records of steps 3 are missing",
        True,
    ),
    "zeros": (
        lambda c: c[: line_of(c, 2)] + bytes(line_of(c, 5) - line_of(c, 2)) + c[line_of(c, 5) :],
        "the records of steps 2-5 are missing or cannot be read; it is",
        True,
    ),
    "a digit": (
        lambda c: flipped(c, c.index(b'"loss": ') + 8, ord("9")),
        "some records were changed, though all of them can be read",
        False,
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_metrics_that_are_not_those_that_were_sealed_are_told(out, kind):
    harm, words, copied = DAMAGE[kind]
    content = harm(out.metrics.read_bytes())
    if content is None:
        out.metrics.unlink()
    else:
        out.metrics.write_bytes(content)
    valid = out.read_metrics()
    told = damage(out, out.find("last", print))
    assert told is not None and str(out.metrics) in told and words in told
    out.keep_metrics(8)
    assert out.read_metrics() == valid
    copies = [path.read_bytes() for path in out.path.glob("*damaged*")]
    assert copies == ([content] if copied else [])
    assert not list(out.path.glob(".*.tmp"))


def test_a_run_goes_on_with_damaged_metrics_and_says_so(out, finished, capsys):
    content = out.metrics.read_bytes()
    out.metrics.write_bytes(content[: line_of(content, 6) + 9])
    told = warnings(go_on(out, capsys))
    assert len(told) == 2 and "the records of steps 6-8 are missing or cannot be read" in told[1]
    assert digest(out.path) == finished[1]
    steps = [r["step"] for r in out.read_metrics() if "loss" in r]
    assert steps == [1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert damage(out, out.find("last", print)) is None  # that save has sealed what there is now


def test_damaged_copies_do_not_replace_each_other(out):
    for step in (5, 7):
        content = out.metrics.read_bytes()
        out.metrics.write_bytes(flipped(content, line_of(content, step), 0xFF))
        damage(out, out.find("last", print))
    names = sorted(path.name for path in out.path.glob("metrics.damaged*"))
    assert names == ["metrics.damaged-2.jsonl", "metrics.damaged.jsonl"]


def test_half_a_line_of_a_killed_run_is_no_damage(out, finished, capsys):
    with out.metrics.open("a") as file:
        file.write('{"step": 9, "loss": 3.0}\n{"step": 10, "lo')
    assert warnings(go_on(out, capsys)) == QUIET
    assert [r["step"] for r in out.read_metrics() if "loss" in r] == list(range(1, 13))


def test_a_tokenizer_that_is_written_again_is_told(out, capsys):
    before = out.tokenizer.read_bytes()
    out.tokenizer.write_bytes(before + b" ")
    told = warnings(go_on(out, capsys))
    assert told[1:] == [f"warning: {out.tokenizer} is not the run's tokenizer; it is written again"]
    assert out.tokenizer.read_bytes() == before


def test_ranges_read_well():
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10" and ranges([]) == ""
