"""Training from Python: what `import cupytron` offers, on_step, stopping, and the page that tells of it."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import ENVIRONMENT, TINY, make_data, run_here

import cupytron
from cupytron import generate, process, trained
from cupytron.cli import sample
from cupytron.comm import run_ranks
from cupytron.data import DataError
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.run import train as train_here
from cupytron.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with `data`, and `run` trained on it."""
    folder = tmp_path_factory.mktemp("base")
    make_data(folder)
    run_here(folder / "data", folder / "run", "checkpoint.keep=9")
    return folder


def settings(base, *more):
    return cupytron.load_config(overrides=[*TINY, f'data.path="{base / "data"}"', *more])


def digest(run):
    return RunFolder(run).find("last", print).digest()


def in_a_process(code, folder, **environment):
    """The last line that a program prints, in a process in which nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_there_and_importing_them_brings_no_numpy():
    for name in cupytron.__all__:
        assert callable(getattr(cupytron, name)), name
    assert set(cupytron.__all__) <= set(dir(cupytron))
    wanted = {
        "train",
        "load_config",
        "load",
        "Trainer",
        "Transformer",
        "Layer",
        "Chain",
        "Parameter",
    }
    assert wanted <= set(cupytron.__all__)
    code = (
        "import sys, cupytron\n"
        "cupytron.train, cupytron.load_config('demo'), cupytron.RunConfig, cupytron.CupytronError\n"
        "print('numpy' in sys.modules)"
    )
    assert in_a_process(code, ROOT).strip() == "False"


def test_training_from_python_gives_the_bits_of_the_command(base, tmp_path):
    outcome = cupytron.train(settings(base), tmp_path / "run", quiet=True)
    assert (outcome.exit_code, outcome.step) == (0, 12) and outcome.val_loss is not None
    assert digest(tmp_path / "run") == digest(base / "run")


def test_on_step_hears_of_each_step_as_metrics_has_it(base, tmp_path):
    heard = []
    cupytron.train(settings(base), tmp_path / "run", heard.append, quiet=True)
    records = [r for r in RunFolder(tmp_path / "run").read_metrics() if "loss" in r]
    assert heard == records and len(heard) == 12
    table = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert table == set(heard[0])


def test_on_step_may_stop_the_run_and_the_same_call_goes_on(base, tmp_path):
    config, out = settings(base, "checkpoint.interval=0"), tmp_path / "run"
    outcome = cupytron.train(config, out, on_step=lambda record: record["step"] < 7, quiet=True)
    assert (outcome.exit_code, outcome.step) == (0, 7)
    assert RunFolder(out).steps()[-1] == 7
    assert cupytron.train(config, out, on_step=lambda record: None, quiet=True).step == 12
    assert digest(out) == digest(base / "run")


def test_the_line_says_who_stopped_it(base, tmp_path, capsys):
    cupytron.train(settings(base), tmp_path / "run", on_step=lambda record: False)
    assert "stopped by its caller at step 1, saved" in capsys.readouterr().out


def test_if_on_step_raises_the_run_ends_with_that(base, tmp_path):
    def on_step(record):
        if record["step"] == 6:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        cupytron.train(settings(base), tmp_path / "run", on_step=on_step, quiet=True)
    assert RunFolder(tmp_path / "run").steps()[-1] == 5
    assert cupytron.train(settings(base), tmp_path / "run", quiet=True).step == 12


@pytest.mark.parametrize("who", [0, 1])
def test_all_ranks_stop_if_one_of_them_is_told_to(base, tmp_path, who):
    config = settings(base, "parallel.dp=2")

    def body(world):
        def on_step(record):
            return not (world.rank == who and record["step"] == 3)

        return cupytron.train(config, tmp_path / "run", on_step, quiet=True, world=world)

    assert [(o.exit_code, o.step) for o in run_ranks(2, body)] == [(0, 3)] * 2


def test_ctrl_c_saves_and_returns(base, tmp_path):
    def on_step(record):
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    outcome = cupytron.train(settings(base), tmp_path / "run", on_step, quiet=True)
    assert (outcome.exit_code, outcome.step) == (130, 2)
    assert RunFolder(tmp_path / "run").steps() == [2]


@pytest.mark.parametrize("environment", [{}, None])
def test_a_run_makes_the_record_of_its_environment_where_none_is_given(base, tmp_path, environment):
    config = settings(base, "train.max_steps=1")
    train_here(config, tmp_path / "run", environment, quiet=True)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert set(ENVIRONMENT) <= set(record)


def test_settings_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"of type dict; give what cupytron\.load_config returns"):
        cupytron.train({"model": {}}, tmp_path / "run")


@pytest.mark.parametrize("overrides", ["optim.lr=1", {"optim.lr": 1.0}, [("optim.lr", 1.0)]])
def test_overrides_that_are_no_list_of_texts_are_refused(overrides):
    with pytest.raises(
        ConfigError, match=r"overrides: .*; give a list of texts section\.key=value"
    ):
        cupytron.load_config(overrides=overrides)


def first_line(base, folder, before, **environment):
    code = (
        f"{before}\nimport cupytron\n"
        f"config = cupytron.load_config(overrides={[*TINY, 'train.max_steps=1']} + "
        f"['data.path={base / 'data'}', 'parallel.blas_kernel=Haswell'])\n"
        "cupytron.train(config, 'run')"
    )
    return in_a_process(code, folder, **environment).splitlines()[0]


def test_a_kernel_is_applied_before_numpy_and_missed_after_it(base, tmp_path):
    (tmp_path / "late").mkdir()
    line = first_line(base, tmp_path, "")
    assert "OpenBLAS kernel Haswell;" in line
    late = first_line(base, tmp_path / "late", "import numpy", OPENBLAS_CORETYPE="Sandybridge")
    assert "the environment said" not in late
    assert "NumPy was imported first, so parallel.blas_kernel=Haswell could not be applied" in late
    record = json.loads((tmp_path / "late" / "run" / "environment.json").read_text())
    assert record["blas_kernel_too_late"] == "Haswell"


def test_a_second_run_of_a_process_misses_nothing():
    code = (
        "from cupytron import process\n"
        "process.prepare(1, 'Haswell')\n"
        "import numpy\n"
        "print(process.prepare(1, 'Haswell')['blas_kernel_too_late'], "
        "process.prepare(1, 'off')['blas_kernel_too_late'])"
    )
    assert in_a_process(code, ROOT).strip() == "None None"
    assert process._too_late("Haswell", None) == "Haswell"


# --- a trained model


def test_a_loaded_model_says_what_it_is(base):
    model = cupytron.load(base / "run")
    assert re.fullmatch(
        r"TrainedModel\(gpt2, 7,\d\d\d parameters, step \d+, vocabulary of \d+, context of 16 tokens\)",
        repr(model),
    )


@pytest.mark.parametrize("step", [8, np.int64(8), "8"])
def test_a_step_may_be_a_number(base, step):
    assert cupytron.load(base / "run", checkpoint=step).step == 8
    with pytest.raises(CheckpointError, match="no checkpoint '7'; choose best, last or one of"):
        cupytron.load(base / "run", checkpoint=np.int64(7))


def test_numbers_of_numpy_are_numbers(base):
    model = cupytron.load(base / "run")
    plain = model.generate("the ", 12, top_k=5, seed=3, temperature=0.5, top_p=0.5)
    numbers = {"top_k": np.int64(5), "seed": np.int32(3), "temperature": np.float32(0.5)}
    assert model.generate("the ", np.int64(12), **numbers, top_p=np.float32(0.5)) == plain
    ids = np.array(model.tokenizer.encode("the "))
    both = [list(generate.generate(model.model, prompt, 9)) for prompt in (ids, ids.tolist())]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 2.0}, "top_k=2.0 must be a whole number from 1"),
        ({"top_k": np.int64(0)}, "top_k=0 must be"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number from 0"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9' must be a whole number from 0"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"sample": 0.5}, "sample=0.5 must be a whole number"),
        ({"temperature": "1"}, "temperature='1' must be 0 .* or more"),
        ({"temperature": None}, "temperature=None must be"),
        ({"top_p": "0.5"}, "top_p='0.5' must be above 0"),
        ({"prompt": [1, 2]}, "prompt is of type list; give text, or None"),
        ({"prompt": b"the "}, "prompt is of type bytes"),
    ],
)
def test_what_is_of_another_type_is_refused(base, options, words):
    with pytest.raises(CupytronError, match=words):
        cupytron.load(base / "run").generate(**{"prompt": "the ", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device='gpu': must be auto, cpu or cuda"),
        ({"zero": 7}, "zero=7: must be from 0 to 3"),
        ({"checkpoint": 8.0}, "no checkpoint '8.0'"),
    ],
)
def test_a_model_is_loaded_as_the_options_say_or_not_at_all(base, options, words):
    with pytest.raises(CupytronError, match=words):
        cupytron.load(base / "run", **options)


@pytest.mark.parametrize("tokens", [0, 2.5, "3"])
def test_a_number_of_tokens_is_a_whole_number(base, tokens):
    with pytest.raises(DataError, match=f"tokens={tokens}: must be a whole number from 1"):
        cupytron.load(base / "run").evaluate(tokens=tokens)


def test_an_unknown_way_to_resume_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="resume='perhaps': must be auto or never"):
        cupytron.train(settings(base), tmp_path / "run", resume="perhaps")


def test_python_and_the_command_line_have_one_default_temperature():
    (option,) = [o for o in sample.command.params if o.name == "temperature"]
    functions = (generate.generate, trained.TrainedModel.stream)
    assert {inspect.signature(f).parameters["temperature"].default for f in functions} == {
        option.default
    }


# --- the page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_examples_of_the_page_run(base, tmp_path):
    """One after the other, with a data set and sizes that are small."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 4
    (tmp_path / "runs").mkdir()
    for name in ("shakespeare-data", "own-data"):
        (tmp_path / "runs" / name).symlink_to(base / "data")
    for block in blocks:
        for old, new in (
            ('"train.max_steps=500"', f'"train.max_steps=500", *{[*TINY, "train.max_steps=5"]}'),
            ("train.max_steps=510", "train.max_steps=7"),
            ("train.max_steps=20", "train.max_steps=2"),
            ("ROMEO:", "the "),
            (", top_k=40", ", top_k=4"),
        ):
            block = block.replace(old, new)
        in_a_process(block, tmp_path)
    assert RunFolder(tmp_path / "runs" / "mine").steps()[-1] == 7
    assert RunFolder(tmp_path / "runs" / "own").steps() == [2]
