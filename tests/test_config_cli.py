"""`cupytron config`, and the options that set a run's settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cupytron import config_io
from cupytron.cli.config import resolve
from cupytron.cli.main import _run
from cupytron.cli.options import FLAGS, SWITCHES, Settings, settings_options
from cupytron.config import RunConfig, load_config, resolve_model
from cupytron.config_io import preset_names
from cupytron.config_reader import keys_of
from cupytron.errors import ConfigError


def parse(*arguments: str) -> Settings:
    """The settings that a command would receive."""
    received = []

    @click.command()
    @settings_options
    @click.option("--steps")
    def command(settings, steps):
        received.append(settings)

    command.main(list(arguments), standalone_mode=False)
    return received[0]


def test_every_flag_sets_its_key():
    assert {key for _, key, _ in FLAGS + SWITCHES} <= set(keys_of(RunConfig))
    for names, key, _ in FLAGS:
        for name in names:
            value = "x" if key != "data.path" else '"x"'
            assert parse(name, "x").overrides == [f"{key}={value}"]
    for switches, key, _ in SWITCHES:
        for switch in switches:
            on, off = switch.split("/")
            assert parse(on).overrides == [f"{key}=true"]
            assert parse(off).overrides == [f"{key}=false"]


def test_a_flag_wins_over_set_and_set_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 1e-5\n[train]\nseed = 3\n")
    settings = parse(
        "--lr", "1e-3", "--set", "optim.lr=1e-4", "--set", "train.seed=4", "--config", str(file)
    )
    assert settings.overrides == ["optim.lr=1e-4", "train.seed=4", "optim.lr=1e-3"]
    config = settings.load()
    assert (config.optim.lr, config.train.seed) == (1e-3, 4)
    assert parse("--preset", "llama-1b").load() == load_config("llama-1b")
    assert parse().load() == RunConfig()


@pytest.mark.parametrize("name", ["2024", "none", "true", 'quo"te', "back\\slash", "sp ace", "a=b"])
def test_any_folder_can_be_the_data(name):
    assert parse("--data", name).load().data.path == name


def test_options_import_nothing_heavy():
    code = (
        "import sys, cupytron.cli.options;"
        "print([m for m in ('numpy', 'pydantic', 'tomllib', 'mpi4py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_what_show_prints_means_the_same(preset, capsys, tmp_path):
    arguments = ["--preset", preset] if preset else []
    assert _run(["config", "show", *arguments]) == 0
    page = capsys.readouterr().out
    file = tmp_path / "shown.toml"
    file.write_text(page)
    config, shown = load_config(preset), load_config(file=file)
    assert shown == resolve(config) == resolve(shown)
    assert shown.model_dump(exclude={"model", "train", "optim"}) == config.model_dump(
        exclude={"model", "train", "optim"}
    )
    assert (shown.global_batch, shown.min_lr, shown.decay_steps) == (
        config.global_batch,
        config.min_lr,
        config.decay_steps,
    )
    vocab, length = config.model.vocab_size or 65, config.train.sequence_length
    assert resolve_model(shown.model, vocab, length) == resolve_model(config.model, vocab, length)


def test_show_tells_how_large_the_run_is(capsys):
    _run(["config", "show", "--preset", "gpt2-124m"])
    assert "# 124,475,904 parameters; 491,520 tokens a step." in capsys.readouterr().out
    _run(["config", "show", "--preset", "shakespeare-char-cpu"])
    page = capsys.readouterr().out
    assert (
        "# 795,776 parameters and 128 for each token of the vocabulary; 768 tokens a step" in page
    )
    assert "# Not set, and follows from the data or the machine: model.vocab_size" in page


def test_show_as_json(capsys):
    assert _run(["config", "show", "--json", "--lr", "0.5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 0.5
    assert printed["model"]["vocab_size"] is None
    assert RunConfig.model_validate(printed) == resolve(load_config(overrides=["optim.lr=0.5"]))


def test_show_lists_presets_and_keys(capsys):
    assert _run(["config", "show", "--presets"]) == 0
    page = capsys.readouterr().out
    assert all(f"{name}: " in page for name in preset_names())
    assert _run(["config", "show", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" = ")[0] for line in lines] == list(keys_of(RunConfig))
    assert all(field.description for field in keys_of(RunConfig).values())


def test_validate(tmp_path, capsys):
    good, bad, damaged = tmp_path / "good.toml", tmp_path / "bad.toml", tmp_path / "damaged.toml"
    good.write_text("[train]\nseed = 3\n")
    bad.write_text("[train]\nseed = -3\nsed = 4\n")
    damaged.write_text("[train\n")
    assert _run(["config", "validate", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    assert _run(["config", "validate", str(bad), str(good), str(damaged)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{good}: ok\n"
    assert err.splitlines() == [
        f"{bad}: train.seed=-3: must be at least 0",
        f"{bad}: train.sed: unknown key; did you mean train.seed?",
        f"{damaged}: is not valid TOML: Expected ']' at the end of a table declaration "
        "(at line 1, column 7)",
    ]


def test_validate_over_a_preset(tmp_path, capsys):
    file = tmp_path / "heads.toml"
    file.write_text("[model]\nnum_heads = 6\n")
    assert _run(["config", "validate", str(file)]) == 2
    assert _run(["config", "validate", "--preset", "shakespeare-char", str(file)]) == 0
    assert "ok" in capsys.readouterr().out


def test_several_errors_are_a_line_each(capsys):
    assert _run(["config", "show", "--lr", "-1", "--pp", "9", "--set", "model.num_headz=3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: model.num_headz: unknown key; did you mean model.num_heads?",
        "optim.lr=-1: must be greater than 0",
        "parallel.pp=9: 9 parts (stages times chunks) are more than 4 blocks, the embedding and the head; "
        "use fewer, a parallel.schedule without chunks, or more model.num_layers",
    ]


def test_usage_errors_exit_with_2(capsys):
    assert _run(["config", "validate"]) == 2
    assert _run(["config", "show", "--nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def pipes(monkeypatch):
    monkeypatch.setattr(config_io, "_pipes", {})


def shell(line):
    program = Path(sys.executable).with_name("cupytron")
    return subprocess.run(
        ["bash", "-c", line.replace("cupytron", str(program))],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_pipe_that_the_user_names_is_read(tmp_path):
    """Twice, where a command reads its settings twice."""
    content = "printf '[train]\\nmax_steps = 7\\n'"
    done = shell(f"cupytron config show --config <({content}; sleep 0.3)")
    assert done.returncode == 0 and "max_steps = 7" in done.stdout, done.stderr
    done = shell(f"cupytron config validate <({content}) <(echo oops)")
    assert done.returncode == 2
    assert ": ok" in done.stdout and "is not valid TOML" in done.stderr
    model = "printf '[model]\\nnum_heads = 3\\nd_model = 12\\n'"
    done = shell(f"{model} | cupytron verify --config /dev/stdin --tp 2")
    assert done.returncode == 2 and "num_heads=3" in done.stderr


def test_a_pipe_is_no_settings_of_several_ranks(pipes, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="only one of the 2 ranks could read"):
        config_io.take_pipe(str(tmp_path / "pipe"), 2)


@pytest.mark.parametrize("writer", ["none", "idle", "left", "endless"])
def test_a_pipe_that_does_not_end_is_told(pipes, tmp_path, monkeypatch, writer):
    monkeypatch.setattr(config_io, "PIPE_SECONDS", 0.3)
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    ends = []
    if writer != "none":
        ends.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    if writer == "idle":
        os.write(ends[0], b"[train]\n")
    if writer == "left":  # before the pipe is opened for reading again
        os.write(ends[0], b"[train]\nmax_steps = 7\n")
        ends.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        os.close(ends.pop(0))
        config_io.take_pipe(path)
        config_io.take_pipe(path)
        assert load_config(file=path).train.max_steps == 7
    elif writer == "endless":
        monkeypatch.setattr(config_io, "MAX_BYTES", 1000)
        os.write(ends[0], b"#" * 2000)
        config_io.take_pipe(path)
        with pytest.raises(ConfigError, match="is larger than 64 KiB"):
            load_config(file=path)
    else:
        with pytest.raises(ConfigError, match=r"is a pipe that did not end within 0\.3 seconds"):
            config_io.take_pipe(path)
    for end in ends:
        os.close(end)
