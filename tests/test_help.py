"""The help of every command: headings, texts, examples that run, completion, and suggestions for slips."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from runs import cupytron

from cupytron.cli.flags import FLAGS, SWITCHES
from cupytron.cli.main import _run, cli
from cupytron.config import load_config
from cupytron.config_io import preset_names


def commands(group=cli, path=("cupytron",)):
    """All commands that do something, with the words that call them."""
    context = click.Context(group, info_name=path[-1])
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def page(*words):
    done = CliRunner().invoke(cli, [*words, "--help"], prog_name="cupytron")
    assert done.exit_code == 0, done.output
    return done.output


def sections(text):
    """The lines of a help page under each heading."""
    found, lines = {}, []
    for line in text.splitlines():
        if re.fullmatch(r"\S.*:", line):
            lines = found.setdefault(line[:-1], [])
        elif line.strip():
            lines.append(line)
    return found


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_has_a_text_and_every_command_examples(path):
    command = COMMANDS[path]
    context = click.Context(command, info_name=path[-1])
    for param in command.get_params(context):
        if isinstance(param, click.Option) and not param.hidden:
            _, text = param.get_help_record(context)
            assert re.sub(r"\[[^\]]*\]$", "", text).strip(), param.opts
    assert command.examples


@pytest.mark.parametrize("path", COMMANDS)
def test_examples_are_command_lines_of_the_command(path):
    shown = sections(page(*path[1:]))["Examples"]
    assert len(shown) == len(COMMANDS[path].examples)
    for line in shown:
        assert len(line) < 100, line
        words = shlex.split(line.partition(" #")[0].partition(" > ")[0])
        if words[0] == "mpirun":
            words = words[3:]
        assert tuple(words[: len(path)]) == path
        context = COMMANDS[path].make_context(path[-1], words[len(path) :])
        if context.params.get("preset"):
            load_config(context.params["preset"])


def test_options_of_train_stand_under_headings():
    found = sections(page("train"))
    headings = [heading for heading in found if heading not in ("Options", "Examples")]
    assert headings[0] == "Run" and {"Model", "Batch and steps", "Optimizer", "Mesh"} <= set(found)
    assert set(headings) >= {heading for _, _, heading in FLAGS + SWITCHES}
    assert len(found["Options"]) == 1 and "--help" in found["Options"][0]
    assert max(sum(line.startswith("  -") for line in found[h]) for h in headings) < 10


def test_values_are_named_as_the_schema_has_them():
    text = " ".join(page("train").split())
    assert "--schedule [gpipe|1f1b|interleaved|zb-h1|zb-v]" in text
    assert "--compute-dtype [float64|float32|bfloat16|float16]" in text
    assert "[parallel.zero; default: 0; 0<=x<=3]" in text
    assert "[optim.lr; default: 0.001; x>0]" in text
    assert "--lr, --learning-rate FLOAT" in text and "--max-steps INTEGER" in text
    assert all(name in text.replace("- ", "-") for name in preset_names())


def test_verify_shows_no_defaults_of_a_larger_model():
    text = " ".join(page("verify").split())
    assert "model.num_layers; x>=1" in text and "[default: 3; x>=1]" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["nonsense"], "nonsense: no such command; choose train, eval"),
        (["data", "prepar"], "prepar: no such command; did you mean prepare? (cupytron data"),
        (["checkpoint", "lst"], "did you mean ls?"),
        (["train", "--larning-rate", "3"], "did you mean --learning-rate? (cupytron train --help)"),
        (
            ["verify", "--max-steps", "3"],
            "--max-steps: is not used by this command; give --steps (cupytron verify --help)",
        ),
        (["train", "--dropout", "0.1"], "no such option; give --set model.dropout=VALUE (cupytron"),
        (["train", "--warmup=9"], "give --set optim.warmup_steps=VALUE"),
        (["bench", "--n-kv-heads", "2"], "give --set model.num_kv_heads=VALUE"),
        (["sample", "--dropout", "1"], "no such option; did you mean --prompt?"),
        (["train", "--out", "x", "optim.lr=3"], "(optim.lr=3); did you mean --set optim.lr=3?"),
        (["train", "--out", "x", "demo"], "did you mean --preset demo?"),
        (["train", "--out", "x", "a.toml"], "did you mean --config a.toml?"),
        (["train", "--out", "x", "data"], "did you mean --data data?"),
        (["train", "--out", "x", "run"], "did you mean --out run?"),
        (["eval", "run", "data"], "did you mean --data data?"),
        (["report", "run", "data"], "extra argument (data) (cupytron report --help)"),
        (["generate", "run"], "generate: no such command; did you mean sample?"),
        (["tokenize", "a.txt"], "did you mean data prepare?"),
        *(
            (
                [*words, ""],
                f"error: {words[-1] if words[-1][0] == '-' else 'RUN'} is empty; give a path (",
            )
            for words in (
                ["train", "--out", "x", "--config"],
                ["train", "--out"],
                ["train", "--out", "x", "--data"],
                ["train", "--out", "x", "--init-from"],
                ["eval", "run", "--data"],
                ["sample"],
                ["compare", "run"],
                ["checkpoint", "ls"],
                ["report", "run", "--png"],
                ["verify", "--sweep"],
                ["verify", "--model"],
                ["data", "prepare", "x", "--out", "y", "--tokenizer"],
            )
        ),
        (["data", "prepare", "--out", "x", ""], "error: SOURCE is empty; give a path ("),
        (["verify", "--data", "x"], "--data: is not used by this command; it takes random tokens"),
        (["bench", "--eval-interval", "3"], "--eval-interval: is not used by this command"),
        (["autotune", "--max-steps", "3"], "it runs one step"),
        (["train"], "Missing option '--out'. (cupytron train --help)"),
        (["schedule", "--schedule", "x"], "'zb-v'. (cupytron schedule --help)"),
        (["sample"], "Missing argument 'RUN'. (cupytron sample --help)"),
        (["data", "prepare", "x", "--out", "y", "--bin-dtype", "uint7"], "not one of 'uint16'"),
        (["config", "show", "--keys", "--json"], "--json, --presets and --keys: give one of them"),
        (["config", "show", "--preset", "demoo"], "choose from demo, "),
        (["config", "show", "--set", "optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_every_usage_error_is_one_line_in_one_style(
    capsys, monkeypatch, tmp_path, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("run", "checkpoints").mkdir(parents=True)
    Path("data").mkdir()
    Path("data", "train.json").touch()
    assert _run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err
    assert err.count("\n") == 1 and "Usage" not in err


def test_an_unused_option_is_refused_in_a_sweep_too(capsys, tmp_path):
    (tmp_path / "cases").write_text("--tp 2 --max-steps 3\n")
    assert _run(["verify", "--sweep", str(tmp_path / "cases")]) == 2
    said = "error: in the line '--tp 2 --max-steps 3': --max-steps: is not used by this command"
    assert capsys.readouterr().err.startswith(said)


def test_a_group_without_a_command_shows_its_help(capsys):
    for words in ([], ["data"]):
        assert _run(words) == 2
        assert capsys.readouterr().err.startswith("Usage: cupytron")


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["train"], "--preset", ["--preset"]),
        (["train", "--preset"], "gpt2", ["gpt2-124m", "gpt2-350m"]),
        (["train", "--schedule"], "zb", ["zb-h1", "zb-v"]),
        (["train", "--device"], "", ["auto", "cpu", "cuda"]),
        ([], "tr", ["train"]),
        (["data"], "", ["inspect", "prepare"]),
        (["verify"], "--max-s", []),
    ],
)
def test_completion(words, incomplete, expected):
    complete = ShellComplete(cli, {}, "cupytron", "_CUPYTRON_COMPLETE")
    found = [item.value for item in complete.get_completions(words, incomplete)]
    assert sorted(found) == expected


@pytest.mark.parametrize("words", [["train", "--data"], ["train", "--out"], ["eval"], ["report"]])
def test_folders_are_completed_as_folders(words):
    complete = ShellComplete(cli, {}, "cupytron", "_CUPYTRON_COMPLETE")
    assert [item.type for item in complete.get_completions(words, "ru")] == ["dir"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell):
    environment = {**os.environ, "_CUPYTRON_COMPLETE": f"{shell}_source"}
    done = subprocess.run([cupytron()], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"_CUPYTRON_COMPLETE={shell}_complete" in done.stdout


def test_bash_completes_with_the_script(tmp_path):
    """What a user gets by pressing Tab after `cupytron train --preset sh`."""
    folder = os.path.dirname(cupytron())
    script = (
        'eval "$(_CUPYTRON_COMPLETE=bash_source cupytron)"; '
        "COMP_WORDS=(cupytron train --preset sh); COMP_CWORD=3; "
        '_cupytron_completion cupytron; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["shakespeare-char", "shakespeare-char-cpu"], done.stderr


def test_the_demo_shows_commands_as_they_can_be_typed(tmp_path):
    demo = (Path(__file__).parents[1] / "benchmarks" / "demo.sh").read_text()
    for name in ("cupytron", "mpirun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", demo],
        env={**os.environ, "BIN": str(tmp_path), "RUNS": str(tmp_path / "my runs")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    shown = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert len(shown) == 4
    words = [shlex.split(line) for line in shown]
    assert words[2][-4:] == ["--prompt", "The ", "--max-new-tokens", "300"]
    assert all(str(tmp_path / "my runs") in " ".join(w) and len(w) < 18 for w in words)


PATHS = [
    pytest.param(param, id=f"{' '.join(path[1:])} {param.opts[0]}")
    for path, command in COMMANDS.items()
    for param in command.params
    if re.search(r"\b(RUN|DIR|FILE|SOURCE)\b", getattr(param, "shown", "") or param.metavar or "")
]


@pytest.mark.parametrize("param", PATHS)
def test_a_tilde_is_a_home_folder(param, monkeypatch, tmp_path):
    # shells leave it alone in --out=~/x
    monkeypatch.setenv("HOME", str(tmp_path))
    convert = lambda text: str(param.type.convert(text, param, None))  # noqa: E731
    assert convert("~/new") == str(tmp_path / "new")
    assert convert("~root/new") == f"{Path('~root').expanduser()}/new" != "~root/new"
    assert convert("~no-such-user/new") == "~no-such-user/new"
    assert convert("a~/new") == "a~/new"


def test_the_paths_are_found():
    assert len(PATHS) > 20


def test_a_tilde_in_settings_is_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.toml").write_text('[data]\npath = "~/data"\n')
    for how in ({"file": tmp_path / "settings.toml"}, {"overrides": ["data.path=~/data"]}):
        assert load_config(**how).data.path == str(tmp_path / "data")


def test_no_example_stretches_a_schedule():
    """Longer runs keep the decay that was meant, or say another one."""
    for path, command in COMMANDS.items():
        longer = [
            line for line in command.examples if "--max-steps" in line and "--preset" not in line
        ]
        assert all("optim.decay_steps=" in line for line in longer), path
