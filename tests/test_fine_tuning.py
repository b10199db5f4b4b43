"""A new run that starts from another run's weights: its model, which weights, and what does not fit."""

import re
import shutil

import numpy as np
import pytest
from runs import ENVIRONMENT, TEXT, make_data, run_here

from cupytron.cli.main import _run
from cupytron.comm import run_ranks
from cupytron.config import load_config
from cupytron.data import prepare_dataset
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.run import train
from cupytron.run_folder import RunFolder

# what a run of its own would not have by default
LLAMA = ["model.family=llama", "model.num_kv_heads=1", "model.d_ff=24", "optim.lr=1e-2"]
SHORT = ["train.micro_batch=4", "train.max_steps=1", "optim.lr=1e-12", "parallel.blas_kernel=off"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders of data and of runs: "llama" and "gpt" (learned positions), trained for some steps."""
    folder = tmp_path_factory.mktemp("base")
    data = make_data(folder)
    run_here(data, folder / "llama", *LLAMA, "checkpoint.keep=9")
    run_here(data, folder / "gpt", "train.max_steps=2")
    other = folder / "other.txt"
    other.write_text(TEXT[::-1])
    tokenizer = folder / "llama" / "tokenizer.json"
    prepare_dataset([str(other)], folder / "other", tokenizer=tokenizer, val_fraction=0.1)
    return folder


def fine_tune(base, out, *settings, run="llama", data="other", world=None, **options):
    """Train for a step from a run's weights, with its model."""
    overrides = [*SHORT, f'data.path="{base / data}"', *settings]
    config = load_config(overrides=overrides, init_from=base / run)
    options = {"quiet": True, "init_from": base / run, "world": world, **options}
    return train(config, out, dict(ENVIRONMENT), **options)


def weights(run, which="last"):
    found = RunFolder(run).find(which, print)
    return {name: array for name, array in found.tensors() if name.startswith("weight/")}


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-9, err_msg=name)


def test_the_model_is_that_of_the_source(base, tmp_path):
    fine_tune(base, tmp_path / "tuned")
    assert_same_weights(weights(tmp_path / "tuned"), weights(base / "llama", "best"))
    about = RunFolder(tmp_path / "tuned").find("last", print).about
    assert about["model"] == RunFolder(base / "llama").find("last", print).about["model"]
    assert about["settings"]["train"]["sequence_length"] == 16


def test_the_command_line_takes_the_model_and_one_of_its_checkpoints(base, tmp_path, capfd):
    out = tmp_path / "tuned"
    words = ["train", "--data", str(base / "other"), "--out", str(out)]
    words += [word for setting in SHORT for word in ("--set", setting)]
    assert _run([*words, "--init-from", str(base / "llama"), "--init-checkpoint", "4"]) == 0
    assert "step-00000004" in capfd.readouterr().out
    assert_same_weights(weights(out), weights(base / "llama", "4"))
    # the same command again resumes it
    assert _run([*words, "--init-from", str(base / "llama"), "--init-checkpoint", "4"]) == 0
    said = capfd.readouterr().out
    assert "--init-from is not used" in said and "setting changed" not in said


@pytest.mark.parametrize("which", ["best", "last", "4", 8])
def test_any_checkpoint_can_be_the_source(base, tmp_path, which):
    fine_tune(base, tmp_path / "tuned", init_checkpoint=which)
    assert_same_weights(weights(tmp_path / "tuned"), weights(base / "llama", str(which)))


def test_a_checkpoint_that_there_is_not_is_refused_with_those_that_there_are(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint '7'; choose best, last or one of 4,"):
        fine_tune(base, tmp_path / "tuned", init_checkpoint=7)


def damaged(base, tmp_path):
    shutil.copytree(base / "gpt", tmp_path / "damaged")
    for file in (tmp_path / "damaged").glob("checkpoints/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    return {"run": tmp_path / "damaged"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda *_: {"init_from": "no-such-run"}, "no-such-run: not a run's folder"),
        (lambda *_: {"init_checkpoint": 7}, "no checkpoint '7'"),
        (lambda *_: {"d_model": 64}, "does not fit"),
        (damaged, "none of its checkpoints is whole"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_cannot_be_taken_leave_no_folder(base, tmp_path, what, message, ranks):
    options = what(base, tmp_path)
    settings = ["train.micro_batch=2", f"train.global_batch={2 * ranks}"]
    settings += [f"model.d_model={width}"] if (width := options.pop("d_model", None)) else []
    out = tmp_path / "above" / "tuned"

    def body(world):
        fine_tune(base, out, *settings, world=world, **options)

    with pytest.raises(CupytronError, match=message):
        run_ranks(ranks, body)
    assert not out.parent.exists()


def test_init_checkpoint_needs_init_from(base, tmp_path, capfd):
    words = ["train", "--data", str(base / "other"), "--out", str(tmp_path / "x")]
    assert _run([*words, "--init-checkpoint", "best"]) == 2
    assert "give --init-from RUN with it" in capfd.readouterr().err


@pytest.mark.parametrize("length", [32, 8])
def test_the_context_grows_where_positions_are_no_table(base, tmp_path, length):
    """And stays where sequences are shorter."""
    fine_tune(base, tmp_path / "tuned", f"train.sequence_length={length}")
    about = RunFolder(tmp_path / "tuned").find("last", print).about
    assert about["model"]["context_length"] == max(16, length)
    assert_same_weights(weights(tmp_path / "tuned"), weights(base / "llama", "best"))


def test_a_table_of_positions_does_not_grow(base, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"learned positions, a table of 16 rows; set train\.sequence_length to 16",
    ):
        fine_tune(base, tmp_path / "tuned", "train.sequence_length=32", run="gpt")
    with pytest.raises(ConfigError, match=r"table of 16 rows, so leave model\.context_length out"):
        fine_tune(base, tmp_path / "tuned", "model.context_length=32", run="gpt", data="data")
    assert not (tmp_path / "tuned" / "checkpoints" / "step-00000001").exists()


def test_settings_that_do_not_fit_are_named_with_the_way_out(base, tmp_path):
    with pytest.raises(ConfigError) as caught:
        fine_tune(base, tmp_path / "tuned", "model.num_kv_heads=2", "model.norm_eps=0.1")
    text = str(caught.value)
    assert "model.num_kv_heads: 1 there, 2 asked for" in text and "--out" not in text
    assert "leave out model.num_kv_heads, model.norm_eps (as an option, in --set, --preset" in text


def test_a_preset_or_a_file_brings_a_model_of_its_own(base, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[model]\nnum_layers = 3\n")
    for own in ({"file": file}, {"preset": "demo"}):
        config = load_config(**own, init_from=base / "llama")
        assert config.model.num_kv_heads is None and config.model.d_model == 128


def test_data_of_another_tokenizer_are_refused_before_a_model_is_made(base, tmp_path):
    """Whether it has more ids, or as many that mean something else."""
    (tmp_path / "rotated").mkdir()
    rotated = make_data(tmp_path / "rotated", text=TEXT.replace("q", "Q"))
    (tmp_path / "bytes").mkdir()
    more = make_data(tmp_path / "bytes", tokenizer="byte")
    for data in (rotated, more):
        with pytest.raises(ConfigError) as caught:
            fine_tune(base, tmp_path / "tuned", data=data)
        text = str(caught.value)
        assert "was trained with another tokenizer" in text
        (advice,) = re.findall(r"--tokenizer (\S+)$", text)
        assert advice == str(base / "llama" / "tokenizer.json")
    source = tmp_path / "bytes" / "text.txt"
    prepare_dataset([str(source)], tmp_path / "again", tokenizer=advice, val_fraction=0.1)
    assert fine_tune(base, tmp_path / "tuned", data=tmp_path / "again").step == 1


def test_a_resumed_run_hears_the_same_of_other_data(base, tmp_path):
    (tmp_path / "bytes").mkdir()
    more = make_data(tmp_path / "bytes", tokenizer="byte")
    settings = RunFolder(base / "gpt").find("last", print).about["settings"]
    config = load_config(overrides=[f'data.path="{more}"'], start=settings)
    with pytest.raises(
        ConfigError, match=r"another tokenizer .*--tokenizer \S*gpt/tokenizer\.json"
    ):
        train(config, base / "gpt", dict(ENVIRONMENT), quiet=True)


def test_token_ids_without_a_tokenizer_are_told_the_number(base, tmp_path):
    np.array([3, 1, 4, 1, 5, 9, 2, 6] * 40, np.uint16).tofile(tmp_path / "ids.bin")
    for size in (10, 12):
        prepare_dataset([str(tmp_path / "ids.bin")], tmp_path / str(size), vocab_size=size)
    run_here(tmp_path / "10", tmp_path / "run", "train.max_steps=1")
    with pytest.raises(ConfigError, match="with --vocab-size 10, since that run has no tokenizer"):
        fine_tune(tmp_path, tmp_path / "tuned", run="run", data="12")
    with pytest.raises(ConfigError, match="another tokenizer"):
        fine_tune(tmp_path, tmp_path / "tuned", run="run", data=base / "other")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CupytronError, match="not a run's folder"):
        load_config(init_from=tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match="no whole checkpoint to start from"):
        load_config(init_from=tmp_path)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}, {"dp": 2, "zero": 3}])
def test_every_mesh_starts_from_the_same_weights_or_none_does(base, tmp_path, mesh):
    settings = [f"parallel.{key}={value}" for key, value in mesh.items()]
    if "tp" in mesh:
        settings.append("model.num_kv_heads=2")
        run = tmp_path / "two"
        run_here(base / "data", run, *LLAMA, "model.num_kv_heads=2", "train.max_steps=2")
    else:
        run = base / "llama"
    settings.append("train.global_batch=8")

    def body(world):
        fine_tune(base, tmp_path / "tuned", *settings, run=run, world=world)

    run_ranks(2, body)
    assert_same_weights(weights(tmp_path / "tuned"), weights(run, "best"))

    def refused(world):
        with pytest.raises(ConfigError, match="does not fit"):
            fine_tune(base, tmp_path / "x", *settings, "model.d_ff=40", run=run, world=world)
        return True

    assert run_ranks(2, refused) == [True, True]
