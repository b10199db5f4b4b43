"""Whole runs: what is recorded, resuming bit for bit, stopping on a signal, refusing what cannot work."""

import json
import signal

import numpy as np
import pytest
from runs import TINY, command, kill_when, make_data, run_here, start

import cupytron
from cupytron.config import load_config
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.run_folder import RunFolder
from cupytron.trainer import NotFinite, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def digest(out):
    return RunFolder(out).find("last", warn=print).digest()


def test_a_run_records_what_it_did(data, tmp_path):
    outcome = run_here(data, tmp_path / "run", "optim.lr=1e-2")
    folder = RunFolder(tmp_path / "run")
    assert (outcome.exit_code, outcome.step) == (0, 12)
    records = folder.read_metrics()
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed_seconds"}
    assert all(keys <= set(r) for r in steps)
    assert [r["tokens"] for r in steps] == [8 * 16 * (i + 1) for i in range(12)]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 5, 10, 12]
    first, last = steps[0]["loss"], steps[-1]["loss"]
    assert last < first - 0.1
    assert load_config(file=folder.config).data.path == str(data.resolve())
    assert json.loads(folder.environment.read_text())["threads"] == 1
    assert (folder.tokenizer).is_file()
    assert {8, 12} <= set(folder.steps())


def test_training_is_the_same_again_and_differs_by_seed(data, tmp_path):
    for name in ("a", "b"):
        run_here(data, tmp_path / name)
    run_here(data, tmp_path / "c", "train.seed=2")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a")["all"] != digest(tmp_path / "c")["all"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_ends_with_the_same_bits(data, tmp_path, optimizer):
    settings = [f"optim.name={optimizer}", "model.dropout=0.2"]
    run_here(data, tmp_path / "whole", *settings)
    for stop in (3, 7, 8):
        # the settings of the whole run, cut short: a stop at this step without a signal
        schedule = ["optim.decay_steps=12", *settings]
        out = tmp_path / f"stopped-{stop}"
        run_here(data, out, *schedule, f"train.max_steps={stop}")
        run_here(data, out, *schedule)
        assert digest(out) == digest(tmp_path / "whole")
        losses = [
            [
                (r["step"], r["loss"], r["grad_norm"])
                for r in RunFolder(o).read_metrics()
                if "loss" in r
            ]
            for o in (out, tmp_path / "whole")
        ]
        assert losses[0] == losses[1]


def test_resuming_passes_over_a_damaged_checkpoint(data, tmp_path):
    run_here(data, tmp_path / "whole")
    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=9", "optim.decay_steps=12")
    folder = RunFolder(out)
    newest = folder.place(folder.steps()[-1]) / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run_here(data, out, "optim.decay_steps=12")
    assert digest(out) == digest(tmp_path / "whole")


def test_if_no_checkpoint_is_whole_nothing_is_overwritten(data, tmp_path):
    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=4")
    folder = RunFolder(out)
    for step in folder.steps():
        (folder.place(step) / "manifest.json").unlink()
    metrics = folder.metrics.read_text()
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        run_here(data, out)
    assert folder.metrics.read_text() == metrics


def test_a_finished_run_is_left_as_it_is(data, tmp_path):
    run_here(data, tmp_path / "run")
    before = digest(tmp_path / "run")
    outcome = run_here(data, tmp_path / "run")
    assert (outcome.exit_code, outcome.step) == (0, 12)
    assert digest(tmp_path / "run") == before


def test_the_best_checkpoint_stays(data, tmp_path):
    """A learning rate that ruins the model: the best is early, and later saves do not push it out."""
    settings = [
        "train.max_steps=40",
        "train.eval_interval=2",
        "checkpoint.keep=1",
        "checkpoint.interval=1",
    ]
    with np.errstate(all="ignore"):
        run_here(
            data, tmp_path / "run", *settings, "optim.lr=0.5", "optim.clip=0", "optim.name=sgd"
        )
    folder = RunFolder(tmp_path / "run")
    losses = {r["step"]: r["val_loss"] for r in folder.read_metrics() if r.get("val_loss")}
    best = min((s for s in losses if s > 0), key=losses.__getitem__)
    assert folder.find("best", print).step == best
    assert len(folder.steps()) <= 2


def test_init_from_takes_the_weights_alone(data, tmp_path):
    run_here(data, tmp_path / "first")
    run_here(
        data,
        tmp_path / "second",
        "train.max_steps=1",
        "optim.lr=1e-12",
        init_from=tmp_path / "first",
    )
    first = dict(RunFolder(tmp_path / "first").find("best", print).tensors())
    second = dict(RunFolder(tmp_path / "second").find("last", print).tensors())
    for name, array in first.items():
        if name.startswith("weight/"):
            np.testing.assert_allclose(second[name], array, atol=1e-9)
    steps = [r["step"] for r in RunFolder(tmp_path / "second").read_metrics() if "loss" in r]
    assert steps == [1]


def test_what_cannot_be_resumed_is_refused(data, tmp_path):
    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=4")
    kept = digest(out)
    with pytest.raises(ConfigError, match=r"model\.d_model: 16 in the run, 8 asked for"):
        run_here(data, out, "model.d_model=8")
    with pytest.raises(CupytronError, match="holds a run at step 4; choose another --out"):
        run_here(data, out, resume="never")
    (tmp_path / "other").mkdir()
    other = make_data(tmp_path / "other", tokenizer="byte")
    with pytest.raises(ConfigError, match=r"vocab_size|another tokenizer"):
        run_here(other, out)
    assert digest(out) == kept
    with pytest.raises(ConfigError, match="cannot be resumed"):
        run_here(data, out, "optim.name=sgd")


def test_changed_settings_and_environment_are_said(data, tmp_path, capsys):
    from runs import ENVIRONMENT

    from cupytron.run import train

    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=4")
    config = load_config(
        overrides=[*TINY, f'data.path="{data}"', "train.max_steps=5", "optim.lr=1e-2"]
    )
    train(config, out, {**ENVIRONMENT, "threads": 3})
    said = capsys.readouterr().out
    assert "optim.lr: 0.001 before, 0.01 now" in said
    assert "environment changed" in said and "threads: 1 before, 3 now" in said
    assert "resuming from" in said and "at step 4" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    data, tmp_path, monkeypatch
):
    original = Trainer.train_step

    def poisoned(self, inputs, targets):
        if self.step == 6:
            self.model.norm.weight.data[0] = np.nan
        return original(self, inputs, targets)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with np.errstate(all="ignore"), pytest.raises(NotFinite, match=r"step 7.*step-0000000[45]"):
        run_here(data, tmp_path / "run")
    assert max(RunFolder(tmp_path / "run").steps()) <= 6


def test_no_data_set_and_a_file_for_a_folder(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CupytronError, match="is a file"):
        run_here(data, tmp_path / "file")
    from cupytron.run import train

    with pytest.raises(ConfigError, match="--data DIR"):
        train(load_config(), tmp_path / "run", {})


# --- other processes


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_finishes_the_step_and_saves(data, tmp_path, number, code):
    out = tmp_path / "run"
    long = ["train.max_steps=100000", "checkpoint.interval=0", "train.eval_interval=0"]
    process = start(command(data, out, *long))
    metrics = RunFolder(out).metrics
    assert kill_when(process, lambda: metrics.exists() and metrics.stat().st_size > 0, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"stopped by {signal.Signals(number).name}" in output and "Traceback" not in output
    folder = RunFolder(out)
    (step,) = folder.steps()
    assert folder.find("last", print).step == step == folder.read_metrics()[-1]["step"]


def test_eval_and_sample_read_a_run(data, tmp_path):
    run_here(data, tmp_path / "run", "train.max_steps=60", "optim.lr=3e-3")
    model = cupytron.load(tmp_path / "run")
    result = model.evaluate()
    losses = {
        r["step"]: r["val_loss"]
        for r in RunFolder(tmp_path / "run").read_metrics()
        if "val_loss" in r
    }
    assert result["val_loss"] == pytest.approx(losses[result["step"]], rel=1e-6)
    assert result["perplexity"] == pytest.approx(np.exp(result["val_loss"]))
    # one character is one byte here; the first token of the split is no target
    tokens = result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(
        result["val_loss"] / np.log(2) * tokens / (tokens + 1)
    )
    text = model.generate("the ", max_new_tokens=40, temperature=0)
    assert len(text) == 40 and set(text) <= set("the 0123456789quickbrownfoxesjumpoverlazydogs.\n")
    assert text == "".join(model.stream("the ", 40, temperature=0))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        model.generate("\u6f22")
    with pytest.raises(CupytronError, match="prompt is empty"):
        model.generate("")
