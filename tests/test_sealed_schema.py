"""Sealed manifests that no run has written: every command ends in one line, and none in a traceback."""

import shutil

import pytest
import runs

from cupytron.cli.main import _run
from cupytron.manifest import MANIFEST, read_manifest, seal

COMMANDS = [
    "checkpoint ls {run}",
    "checkpoint verify {run}",
    "checkpoint digest {run}",
    "eval {run}",
    "sample {run} --max-new-tokens 1",
    "report {run}",
    "train --out {run} --max-steps 3",
]
WRONG = [None, True, -1, 1.5, 10**30, "x", [], {}, [[]], {"x": {"x": []}}]
KEYS = ["step", "files", "position", "order", "tokens", "elapsed_seconds", "val_loss", "optimizer"]
KEYS += ["model", "settings", "data", "mesh", "environment", "metrics"]
INNER = [
    "files/rank-00000.safetensors/bytes",
    "files/rank-00000.safetensors/sha256",
    "data/val_sha256",
]
INNER += ["files/rank-00000.safetensors/header", "metrics/bytes", "settings/data", "settings/optim"]
INNER += [
    "model/d_model",
    "model/vocab_size",
    "model/context_length",
    "optimizer/updates",
    "mesh/tp",
    "settings/data/path",
    "data/tokenizer_hash",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    runs.run_here(runs.make_data(folder), folder / "run", "train.max_steps=2")
    return folder / "run"


def change(run, key, *value):
    """Seal a manifest anew with another value of a key, or without it."""
    (place,) = (run / "checkpoints").iterdir()
    body = read_manifest(place).body
    *above, name = key.split("/")
    table = body
    for each in above:
        table = table[each]
    table.pop(name, None)
    if value:
        table[name] = value[0]
    (place / MANIFEST).write_bytes(seal(body))


def check(run, capsys):
    for line in COMMANDS:
        code = _run(line.format(run=run).split())
        said = capsys.readouterr().err.splitlines()
        lines = [line for line in said if not line.startswith("warning: ")]
        assert code in (0, 1, 2) and len(lines) <= 1, (line, lines)


@pytest.mark.slow
@pytest.mark.parametrize("key", [*KEYS, *INNER])
@pytest.mark.parametrize("value", [(), *((wrong,) for wrong in WRONG)])
def test_every_command_ends_in_one_line(made, tmp_path, capsys, key, value):
    shutil.copytree(made, tmp_path / "run")
    change(tmp_path / "run", key, *value)
    check(tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("val_loss", ["x"], "val_loss: Input should be a valid number"),
        ("settings", [1], "settings: Input should be a valid dictionary"),
        ("settings/data", 3, "settings.data: Input should be a valid dictionary"),
        ("metrics/bytes", -1, "metrics.bytes: Input should be greater than or equal to 0"),
        ("data/val_sha256", 5, "data.val_sha256: Input should be a valid string"),
    ],
)
def test_the_wrong_key_is_named(made, tmp_path, capsys, key, value, words):
    shutil.copytree(made, tmp_path / "run")
    change(tmp_path / "run", key, value)
    assert _run(["checkpoint", "ls", str(tmp_path / "run")]) == 0
    assert words in capsys.readouterr().out
