"""Changed settings of a resumed run: what the learning rate does then is said, and how to keep it."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
from runs import ENVIRONMENT, TEXT, TINY, make_data, run_here

from cupytron.config import load_config
from cupytron.course import schedule_changed, short_of_rate
from cupytron.data import prepare_dataset
from cupytron.errors import ConfigError
from cupytron.optim import learning_rate
from cupytron.run import train
from cupytron.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def settings(*changes, preset="demo"):
    return load_config(preset, overrides=changes)


def told(before, now, step):
    return list(schedule_changed(settings(*before), settings(*now), step))


def advised(line):
    """The overrides that a line offers."""
    return re.findall(r"--set (\S+)", line)


def test_a_longer_run_says_that_its_cosine_is_stretched_and_what_keeps_it():
    (line,) = told([], ["train.max_steps=1600"], 800)
    assert line.startswith(
        "the learning rate changes from 0.0002 to 0.00119 at step 801; it now falls to"
    )
    assert "at step 1600; the checkpoint's stays at 0.0002" in line
    assert advised(line) == ["optim.decay_steps=800"]


CASES = [
    (["optim.schedule=linear"], ["optim.schedule=linear", "train.max_steps=1600"], 400),
    (["optim.schedule=linear"], ["optim.schedule=linear", "train.max_steps=1600"], 800),
    ([], ["optim.warmup_steps=500"], 400),
    ([], ["optim.warmup_steps=0"], 40),
    ([], ["optim.lr=1e-3"], 400),
    ([], ["optim.schedule=constant"], 400),
    ([], ["optim.schedule=wsd", "train.max_steps=1000"], 400),
    ([], ["optim.min_lr=0.0", "train.max_steps=900"], 799),
    (["optim.schedule=wsd"], ["optim.schedule=cosine"], 700),
    (["train.max_steps=50"], ["train.max_steps=200"], 50),
    (["optim.schedule=constant"], ["optim.schedule=cosine", "train.max_steps=900"], 300),
]


@pytest.mark.parametrize(("before", "now", "step"), CASES)
def test_what_is_offered_keeps_every_later_rate(before, now, step):
    (line,) = told(before, now, step)
    assert advised(line), line
    old, kept = settings(*before), settings(*now, *advised(line))
    for later in range(step, kept.train.max_steps):
        assert learning_rate(kept, later) == pytest.approx(learning_rate(old, later)), later


def test_a_finished_wsd_can_stay_at_its_last_rate():
    wsd = ["optim.schedule=wsd"]
    (line,) = told(wsd, [*wsd, "train.max_steps=1600"], 800)
    assert "changes from 0.0002 to 0.002" in line
    kept = settings(*wsd, "train.max_steps=1600", *advised(line))
    rates = {learning_rate(kept, step) for step in range(800, 1600)}
    assert len(rates) == 1 and rates.pop() == pytest.approx(2e-4)


def test_a_wsd_that_has_not_begun_to_fall_goes_on():
    wsd = ["optim.schedule=wsd"]
    (line,) = told(wsd, [*wsd, "train.max_steps=1600"], 400)
    assert line.startswith("the learning rate goes on at 0.002; it now falls from step 1280")
    assert "--set" not in line


@pytest.mark.parametrize(
    ("before", "now", "step"),
    [
        ([], [], 400),
        ([], ["train.max_steps=1600", "optim.decay_steps=800"], 800),
        ([], ["train.max_steps=600"], 800),  # no step is left
        (["optim.schedule=constant"], ["optim.schedule=constant", "train.max_steps=1600"], 800),
        (["train.max_steps=50"], ["train.max_steps=90"], 50),  # still in the warm-up
        ([], ["optim.weight_decay=0.0"], 400),
    ],
)
def test_nothing_is_said_of_a_schedule_that_goes_on_as_before(before, now, step):
    assert told(before, now, step) == []


@pytest.mark.parametrize("page", ["README.md", "benchmarks/demo.sh"])
def test_the_commands_that_we_advise_keep_the_schedule(page):
    """Those that make a run of the preset `demo` longer, one after the other."""
    lines = re.findall(r"cupytron train --out \S+ --max-steps .*", (ROOT / page).read_text())
    assert lines
    begun, given = settings(), []
    for line in lines:
        steps = re.findall(r"--max-steps (\d+)", line)
        given += [f"train.max_steps={steps[0]}", *advised(line)]
        longer = settings(*given)
        assert longer.train.max_steps > begun.train.max_steps
        assert list(schedule_changed(begun, longer, begun.train.max_steps)) == []
        begun = longer


def test_a_schedule_of_any_length_is_compared_at_once():
    long = ["train.max_steps=1000000000000"]
    assert told(long, long, 10**11) == []
    assert len(told(long, ["train.max_steps=900000000000"], 10**11)) == 1


def resumed(data, out, capsys, *changes):
    """What a run says when it goes on with these settings from step 12."""
    run_here(data, out)
    capsys.readouterr()
    config = load_config(overrides=[*TINY, f'data.path="{data}"', "train.max_steps=14", *changes])
    train(config, out, dict(ENVIRONMENT))
    return capsys.readouterr().out


def test_a_resumed_run_says_it_before_its_first_step_and_its_advice_works(data, tmp_path, capsys):
    said = resumed(data, tmp_path / "run", capsys)
    line = next(line for line in said.splitlines() if "learning rate" in line)
    assert said.index(line) < said.index("step 13/14")
    (advice,) = advised(line)
    assert advice == "optim.decay_steps=12"
    kept = resumed(data, tmp_path / "kept", capsys, advice)
    assert "learning rate" not in kept
    rates = [r["lr"] for r in RunFolder(tmp_path / "kept").read_metrics() if "lr" in r]
    assert all(a >= b for a, b in itertools.pairwise(rates[3:])), rates
    assert rates[-2:] == [pytest.approx(1e-4)] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.global_batch=12", "a step now takes 192 tokens, and took 128: train.max_steps"),
        ("train.seed=3", "another train.seed puts the samples in another order"),
        ("train.sequence_length=8", "another train.sequence_length cuts the text in another way"),
    ],
)
def test_what_other_portions_mean_is_said(data, tmp_path, capsys, change, words):
    changes = [change, "optim.decay_steps=12", "model.context_length=16"]
    assert words in resumed(data, tmp_path / "run", capsys, *changes)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (0, "its validation split has 0 tokens, so no"),
        (1, "its validation split has 1 token, so no"),
    ],
)
def test_a_split_without_a_loss_is_said_when_it_is_made_and_when_it_is_used(
    tmp_path, capsys, tokens, words
):
    (tmp_path / "text.txt").write_text(TEXT[:1000])
    made = prepare_dataset(
        [str(tmp_path / "text.txt")], tmp_path / "data", "char", val_fraction=tokens / 1000
    )
    assert made.val.tokens == tokens
    # none at all was asked for
    noted = any("a loss needs 2; give a larger --val-fraction" in note for note in made.notes)
    assert noted == bool(tokens)
    config = [*TINY, f'data.path="{tmp_path / "data"}"', "train.max_steps=1"]
    outcome = train(load_config(overrides=config), tmp_path / "run", dict(ENVIRONMENT))
    assert outcome.val_loss is None
    said = capsys.readouterr().out
    assert said.count(words) == 1 and "a larger --val-fraction" in said
    assert said.index(words) < said.index("step 1/1")


@pytest.mark.parametrize(("size", "times"), [(100, 2), (50, 8), (1000, 0)])
def test_data_that_are_too_small_for_a_batch_are_said(tmp_path, capsys, size, times):
    """A step of 8 sequences of 16 tokens."""
    (tmp_path / "text.txt").write_text(TEXT[:size])
    prepare_dataset([str(tmp_path / "text.txt")], tmp_path / "data", "char", val_fraction=0.05)
    config = [*TINY, f'data.path="{tmp_path / "data"}"', "train.max_steps=1"]
    train(load_config(overrides=config), tmp_path / "run", dict(ENVIRONMENT))
    said = capsys.readouterr().out
    assert ("train.global_batch=8: the data set has" in said) == bool(times)
    if times:
        assert f"a step sees the same text up to {times} times; lower train.global_batch" in said


@pytest.fixture(scope="module")
def other(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text(TEXT[::-1])
    prepare_dataset(
        [str(folder / "text.txt")],
        folder / "data",
        tokenizer=data / "tokenizer.json",
        val_fraction=0.1,
    )
    return folder / "data"


def begin(data, out, *overrides):
    return train(
        load_config(overrides=[*TINY, f'data.path="{data}"', *overrides]), out, dict(ENVIRONMENT)
    )


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_a_start_that_trains_nothing_on_other_data_changes_no_setting(
    data, other, tmp_path, capsys, steps
):
    run_here(data, tmp_path, "train.max_steps=6", "checkpoint.interval=0")
    before = (tmp_path / "config.toml").read_text(), (tmp_path / "metrics.jsonl").read_text()
    # step 5 would be evaluated
    assert begin(other, tmp_path, f"train.max_steps={steps}", "train.eval_interval=3").step == 6
    said = capsys.readouterr().out
    assert (
        f"this run has done 6 steps, and train.max_steps is {steps}, so nothing is trained on"
        in said
    )
    assert "setting changed" not in said
    assert before == (
        (tmp_path / "config.toml").read_text(),
        (tmp_path / "metrics.jsonl").read_text(),
    )
    begin(data, tmp_path, "train.max_steps=6")
    assert "warning" not in capsys.readouterr().out


def test_a_start_that_trains_nothing_says_how_to_go_on(data, tmp_path, capsys):
    run_here(data, tmp_path, "train.max_steps=2")
    begin(data, tmp_path, "train.max_steps=2")
    assert "; to go on give --max-steps with more steps" in capsys.readouterr().out
    begin(data, tmp_path, "train.max_steps=1")
    said = capsys.readouterr().out
    assert said.count("to go on with it give --max-steps with more steps") == 1
    assert said.count("to go on") == 1
    begin(data, tmp_path, "train.max_steps=3")
    assert "to go on" not in capsys.readouterr().out


def test_a_start_at_the_last_step_with_other_settings_changes_none(data, tmp_path, capsys):
    run_here(data, tmp_path, "train.max_steps=2")
    before = (tmp_path / "config.toml").read_text()
    begin(data, tmp_path, "train.max_steps=2", "optim.lr=3")
    said = capsys.readouterr().out
    assert "and the settings of this run stay as they are" in said and "changed" not in said
    assert (tmp_path / "config.toml").read_text() == before


def test_the_data_of_a_finished_run_may_move(data, tmp_path, capsys):
    run_here(data, tmp_path / "run", "train.max_steps=2")
    moved = shutil.copytree(data, tmp_path / "moved")
    begin(moved, tmp_path / "run", "train.max_steps=1")
    assert "which is not the data set" not in capsys.readouterr().out
    assert load_config(file=tmp_path / "run" / "config.toml").data.path == str(moved)


def test_a_run_does_not_start_from_itself(data, tmp_path):
    run_here(data, tmp_path / "run", "train.max_steps=1")
    (tmp_path / "link").symlink_to("run")
    for own in (tmp_path / "run", tmp_path / "link"):
        with pytest.raises(ConfigError, match="is the run of --out itself; to go on with it leave"):
            run_here(data, tmp_path / "run", init_from=own)


def test_a_warm_up_that_is_longer_than_the_run_is_told(data, tmp_path, capsys):
    begin(data, tmp_path, "train.max_steps=2", "optim.warmup_steps=8", "optim.lr=8e-3")
    said = capsys.readouterr().out
    assert "so the learning rate comes to 0.00178, not to optim.lr=0.008; give fewer" in said
    assert list(short_of_rate(settings("train.max_steps=100", "optim.warmup_steps=100"))) == []
    (line,) = short_of_rate(settings("train.max_steps=99", "optim.warmup_steps=100"))
    assert advised(line) == ["optim.warmup_steps=9"]
    assert list(short_of_rate(settings("train.max_steps=99", *advised(line)))) == []
