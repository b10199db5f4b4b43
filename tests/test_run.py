"""Whole runs: what is recorded, resuming bit for bit, stopping on a signal, refusing what cannot work."""

import functools
import json
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import ENVIRONMENT, TEXT, TINY, command, kill_when, make_data, run_here, start

import cupytron
from cupytron import checkpoint, report
from cupytron.config import load_config
from cupytron.data import DataError, Loader
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.metrics import Speed
from cupytron.nn import Attention
from cupytron.run import _Run, train
from cupytron.run_folder import RunFolder
from cupytron.trainer import NotFinite, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def rotated_data(folder):
    """One character replaced by another: a tokenizer of the same size, and other ids."""
    (folder / "rotated").mkdir(exist_ok=True)
    if not (folder / "rotated" / "data").exists():
        make_data(folder / "rotated", text=TEXT.replace("q", "Q"))
    return folder / "rotated" / "data"


def digest(out):
    return RunFolder(out).find("last", warn=print).digest()


def test_a_new_run_in_a_folder_with_other_files_says_so_once(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", ".hidden", "report.html"):
        (tmp_path / "run" / name).write_text("mine")
    for steps in (1, 2):
        run_here(data, tmp_path / "run", f"train.max_steps={steps}", quiet=False)
        said = "run: holds other files (a.txt, b.txt, c.txt, ...); they stay"
        assert (said in capsys.readouterr().out) == (steps == 1)
    assert (tmp_path / "run" / "a.txt").read_text() == "mine"
    run_here(data, tmp_path / "new", "train.max_steps=1", quiet=False)
    assert "other files" not in capsys.readouterr().out


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
    with pytest.raises(ConfigError, match=r"model\.d_model: 16 there, 8 asked for"):
        run_here(data, out, "model.d_model=8")
    with pytest.raises(CupytronError, match="holds a run at step 4; choose another --out"):
        run_here(data, out, resume="never")
    (tmp_path / "other").mkdir()
    other = make_data(tmp_path / "other", tokenizer="byte")
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        run_here(other, out)
    with pytest.raises(ConfigError, match="another tokenizer"):
        run_here(rotated_data(tmp_path), out)
    assert digest(out) == kept
    with pytest.raises(ConfigError, match=r"optim\.name: adamw there"):
        run_here(data, out, "optim.name=sgd")


def test_changed_settings_and_environment_are_said(data, tmp_path, capsys):

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
    original = Trainer.start_step

    def poisoned(self, *batch):
        if self.step == 6:
            self.model.norm.weight.data[0] = np.nan
        return original(self, *batch)

    monkeypatch.setattr(Trainer, "start_step", poisoned)
    with np.errstate(all="ignore"), pytest.raises(NotFinite, match=r"step 7.*step-0000000[45]"):
        run_here(data, tmp_path / "run")
    assert max(RunFolder(tmp_path / "run").steps()) <= 6


def test_no_data_set_and_a_file_for_a_folder(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CupytronError, match="is a file"):
        run_here(data, tmp_path / "file")
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
    # one character is one byte here; the first token of the split is no target, its byte not counted
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / np.log(2))
    text = model.generate("the ", max_new_tokens=40, temperature=0)
    assert len(text) == 40 and set(text) <= set("the 0123456789quickbrownfoxesjumpoverlazydogs.\n")
    assert text == "".join(model.stream("the ", 40, temperature=0))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        model.generate("\u6f22")
    with pytest.raises(CupytronError, match="prompt is empty"):
        model.generate("")


# --- what a reviewer found


def test_residual_dropout_draws_a_new_mask_at_every_step():
    """Steps on the same tokens with the same weights: only the step's number differs."""
    trainer = Trainer(load_config(overrides=[*TINY, "model.vocab_size=11", "optim.lr=1e-30"]))
    trainer.materialize()
    for _, layer in trainer.model.named_layers():
        if isinstance(layer, Attention):
            layer.dropout = 0.0  # of the probabilities: leave the residual one alone
    inputs, targets = np.random.default_rng(1).integers(0, 11, (2, 8, 16))
    losses = [trainer.train_step(inputs, targets).loss for _ in range(3)]
    assert len(set(losses)) == 3
    trainer.step = 0
    assert trainer.train_step(inputs, targets).loss == losses[0]


def test_evaluation_does_not_drop():
    losses = []
    for dropout in (0.0, 0.5):
        settings = [*TINY, "model.vocab_size=11", f"model.dropout={dropout}"]
        trainer = Trainer(load_config(overrides=settings))
        trainer.materialize()
        inputs, targets = np.random.default_rng(1).integers(0, 11, (2, 8, 16))
        losses.append(trainer.evaluate([(inputs, targets)]))
    assert losses[0] == losses[1]


def test_tokens_and_time_go_on_when_resumed(data, tmp_path):
    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=5")
    before = RunFolder(out).read_metrics()[-2]
    run_here(data, out, "train.max_steps=7")
    records = [r for r in RunFolder(out).read_metrics() if "loss" in r]
    assert [r["tokens"] for r in records] == [128 * (i + 1) for i in range(7)]
    times = [r["elapsed_seconds"] for r in records]
    assert times == sorted(times) and times[-1] > before["elapsed_seconds"]


def test_speed_counts_from_the_last_reading():
    speed = Speed(Trainer(load_config(overrides=["model.vocab_size=11"])).model.config, 64)
    speed.add(100, 1.0)
    assert speed.read()["tokens_per_second"] == pytest.approx(100)
    speed.add(100, 4.0)
    assert speed.read()["tokens_per_second"] == pytest.approx(25)


def test_weights_of_another_kind_of_model_are_not_taken(data, tmp_path):
    """The shapes would fit: 2 heads or 4, GELU or ReLU."""
    run_here(data, tmp_path / "first", "train.max_steps=2")
    for setting in ("model.num_heads=4", "model.activation=relu"):
        with pytest.raises(ConfigError, match="does not fit: model"):
            run_here(data, tmp_path / "second", setting, init_from=tmp_path / "first")
    with pytest.raises(ConfigError, match="another tokenizer"):
        run_here(rotated_data(tmp_path), tmp_path / "second", init_from=tmp_path / "first")


def test_a_changed_data_set_is_noticed(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    own = make_data(tmp_path / "own")
    out = tmp_path / "run"
    run_here(own, out, "train.max_steps=2")
    content = bytearray((own / "train.bin").read_bytes())
    content[100] ^= 1
    (own / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.bin"):
        run_here(own, out)
    # another text of the same length and alphabet, properly prepared
    (tmp_path / "other").mkdir()
    swapped = make_data(tmp_path / "other", text=TEXT.replace("quick", "kciuq"))
    config = load_config(overrides=[*TINY, f'data.path="{swapped}"', "train.max_steps=3"])
    train(config, out, dict(ENVIRONMENT))
    assert "the data set has changed" in capsys.readouterr().out


def test_an_edited_config_or_a_swapped_tokenizer_does_not_change_a_trained_model(data, tmp_path):
    out = tmp_path / "run"
    run_here(data, out)
    loss = cupytron.load(out).evaluate()
    (out / "config.toml").write_text("")
    assert cupytron.load(out).evaluate() == loss
    other = rotated_data(tmp_path) / "tokenizer.json"
    (out / "tokenizer.json").write_bytes(other.read_bytes())
    with pytest.raises(CupytronError, match="is not the tokenizer"):
        cupytron.load(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(CupytronError, match=r"is missing; copy tokenizer\.json there"):
        cupytron.load(out)


def test_somebody_s_own_config_is_not_overwritten(data, tmp_path):
    out = tmp_path / "project"
    out.mkdir()
    (out / "config.toml").write_text("# my notes\n")
    with pytest.raises(CupytronError, match="would be overwritten"):
        run_here(data, out)
    assert (out / "config.toml").read_text() == "# my notes\n"
    with pytest.raises(ConfigError, match="--out is empty"):
        run_here(data, "")


def test_config_toml_is_resolved(data, tmp_path):
    run_here(data, tmp_path / "run", "train.max_steps=1")
    config = load_config(file=tmp_path / "run" / "config.toml")
    vocab = RunFolder(tmp_path / "run").find("last", print).about["model"]["vocab_size"]
    assert config.model.vocab_size == vocab > 20
    assert (config.model.d_ff, config.model.position) == (64, "learned")
    # the decay follows max_steps, also when the run is made longer
    assert (config.optim.min_lr, config.optim.decay_steps) == (1e-4, None)


def test_a_signal_does_not_wait_for_a_long_evaluation(data, tmp_path):
    out = tmp_path / "run"
    settings = ["train.micro_batch=1", "train.global_batch=1", "train.sequence_length=1"]
    process = start(command(data, out, "train.max_steps=100000", *settings))
    # the evaluation at the start takes some 1,800 batches of one token
    assert kill_when(process, RunFolder(out).metrics.exists, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert RunFolder(out).steps() == [0] and "validation" not in output


def test_a_run_outlives_its_terminal_and_its_pipe(data, tmp_path):
    long = ["train.max_steps=100000", "checkpoint.interval=0", "train.eval_interval=0"]
    process = start(command(data, tmp_path / "hup", *long))
    metrics = RunFolder(tmp_path / "hup").metrics
    assert kill_when(process, lambda: metrics.exists() and metrics.stat().st_size, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 75 and RunFolder(tmp_path / "hup").steps()
    # the reader leaves after the first line; there is no stdout at all
    for name, script in (("pipe", '"$@" | head -1; exit ${PIPESTATUS[0]}'), ("closed", '"$@" >&-')):
        words = command(data, tmp_path / name, "train.max_steps=30")
        done = subprocess.run(
            ["bash", "-c", script, "-", *words], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert RunFolder(tmp_path / name).steps()[-1] == 30


def test_a_vocabulary_of_one_is_refused_in_words(tmp_path):
    data = make_data(tmp_path, text="a" * 500)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1: .*another tokenizer"):
        run_here(data, tmp_path / "run")


def test_gradients_do_not_keep_what_was_not_finite():
    trainer = Trainer(load_config(overrides=[*TINY, "model.vocab_size=11"]))
    trainer.materialize()
    inputs, targets = np.random.default_rng(1).integers(0, 11, (2, 8, 16))
    weight = trainer.model.norm.weight.data
    weight[0] = np.inf
    with np.errstate(all="ignore"), pytest.raises(NotFinite):
        trainer.train_step(inputs, targets)
    weight[0] = 1.0
    assert np.isfinite(trainer.train_step(inputs, targets).grad_norm)


def test_report_and_sample_of_an_alphabet_without_a_new_line(tmp_path):
    data = make_data(tmp_path, text="abcd" * 400)
    run_here(data, tmp_path / "run", "train.max_steps=2")
    assert cupytron.load(tmp_path / "run").generate(max_new_tokens=5)
    assert report.read_report(tmp_path / "run").sample


# --- what a second reviewer found


def script_losses(monkeypatch, losses):
    """Validation losses by step, in place of the model's."""
    original = _Run._evaluate

    def scripted(self):
        original(self)
        if self.val_loss is not None:
            self.val_loss = losses[self.trainer.step]

    monkeypatch.setattr(_Run, "_evaluate", scripted)


RARE = ["checkpoint.interval=0", "train.eval_interval=3", "checkpoint.keep=1"]
LOSSES = {0: 5.0, 3: 4.0, 6: 2.0, 8: 7.0, 9: 3.0, 12: 6.0}


def best_of(out):
    best = RunFolder(out).best(print)
    return best.step, best.about["val_loss"]


def test_the_best_is_saved_when_it_is_found_and_stays_when_resumed(data, tmp_path, monkeypatch):
    script_losses(monkeypatch, LOSSES)
    run_here(data, tmp_path / "whole", *RARE)
    assert best_of(tmp_path / "whole") == (6, 2.0)
    assert RunFolder(tmp_path / "whole").steps() == [6, 12]
    # a step without an evaluation has no loss of its own
    run_here(
        data,
        tmp_path / "other",
        *RARE,
        "checkpoint.interval=7",
        "checkpoint.keep=5",
        "train.max_steps=8",
    )
    assert RunFolder(tmp_path / "other").find("7", print).about["val_loss"] is None
    for stop in (6, 9):
        out = tmp_path / f"stopped-{stop}"
        run_here(data, out, *RARE, f"train.max_steps={stop}")
        run_here(data, out, *RARE)
        assert best_of(out) == (6, 2.0)


def test_a_damaged_best_is_found_again(data, tmp_path, monkeypatch):
    """The set-aside checkpoint's loss must not be the bar for the step that is trained again."""
    script_losses(monkeypatch, LOSSES)
    out = tmp_path / "run"
    run_here(data, out, *RARE, "checkpoint.keep=5", "train.max_steps=6")
    file = RunFolder(out).place(6) / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run_here(data, out, *RARE)
    assert best_of(out) == (6, 2.0)


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(data, tmp_path, monkeypatch):
    run_here(data, tmp_path / "whole", *RARE)
    original = _Run._evaluate

    def interrupted(self):
        if self.trainer.step == 12:
            self.stop.signal = signal.SIGTERM
        original(self)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_evaluate", interrupted)
        assert run_here(data, out, *RARE).exit_code == 75
    assert RunFolder(out).find("12", print).about["val_loss"] is None
    run_here(data, out, *RARE)
    known = [
        {r["step"]: r["val_loss"] for r in RunFolder(o).read_metrics() if "val_loss" in r}
        for o in (out, tmp_path / "whole")
    ]
    assert known[0] == known[1]
    assert RunFolder(out).find("12", print).about["val_loss"] == known[0][12]


def test_losses_over_another_validation_set_are_not_compared(data, tmp_path, monkeypatch):
    script_losses(monkeypatch, LOSSES)
    out = tmp_path / "run"
    run_here(data, out, *RARE, "train.max_steps=6")
    (tmp_path / "other").mkdir()
    other = make_data(tmp_path / "other", text=TEXT.replace("quick", "kciuq"))
    run_here(other, out, *RARE, "train.max_steps=9")
    assert best_of(out) == (9, 3.0)


def test_the_position_in_the_data_goes_on_when_the_batch_changes(data, tmp_path):
    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=4")
    run_here(data, out, "train.max_steps=6", "train.global_batch=4")
    assert RunFolder(out).find("last", print).about["position"] == 4 * 8 + 2 * 4


def test_files_of_somebody_s_own_are_not_replaced(data, tmp_path):
    for name in ("metrics.jsonl", "environment.json", "tokenizer.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(CupytronError, match="would be overwritten"):
            run_here(data, out)
        assert (out / name).read_text() == "mine"


def test_nohup_is_respected(data, tmp_path):
    long = ["train.max_steps=100000", "checkpoint.interval=0", "train.eval_interval=0"]
    words = command(data, tmp_path / "run", *long)
    process = start(["nohup", *words])
    metrics = RunFolder(tmp_path / "run").metrics
    assert kill_when(process, lambda: metrics.exists() and metrics.stat().st_size, signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_eval_finds_data_that_has_moved(tmp_path):
    data = make_data(tmp_path)
    run_here(data, tmp_path / "run", "train.max_steps=2")
    data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="give --data DIR"):
        cupytron.load(tmp_path / "run").evaluate()
    run_here(tmp_path / "moved", tmp_path / "run", "train.max_steps=2")
    assert cupytron.load(tmp_path / "run").evaluate()["tokens"]


def test_a_run_keeps_the_order_of_samples_that_it_began_with(data, tmp_path, monkeypatch):
    """A checkpoint that names no order was made with order 1."""
    with monkeypatch.context() as before:
        write = checkpoint.write

        def write_without_order(folder, pieces, about, *rest):
            write(folder, pieces, {k: v for k, v in about.items() if k != "order"}, *rest)

        before.setattr(checkpoint, "write", write_without_order)
        before.setattr("cupytron.run.Loader", functools.partial(Loader, order=1))
        run_here(data, tmp_path / "old")
        run_here(data, tmp_path / "resumed", "train.max_steps=6", "optim.decay_steps=12")
    whole = run_here(data, tmp_path / "new"), digest(tmp_path / "new")["all"]
    assert run_here(data, tmp_path / "resumed", "optim.decay_steps=12").step == 12
    assert digest(tmp_path / "resumed")["all"] != whole[1]
    assert digest(tmp_path / "resumed") == digest(tmp_path / "old")
    about = RunFolder(tmp_path / "resumed").find("last", warn=print).about
    assert about["order"] == 1
    assert RunFolder(tmp_path / "new").find("last", warn=print).about["order"] == 2
    run_here(data, tmp_path / "from", "train.max_steps=1", init_from=tmp_path / "old")
    assert RunFolder(tmp_path / "from").find("last", warn=print).about["order"] == 2
