"""Settings that are wrong: more than 200 of them, each found, with its key named and nothing else."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cupytron.cli.main import _run
from cupytron.config import RunConfig, load_config
from cupytron.config_io import MAX_BYTES
from cupytron.config_reader import allowed_values, keys_of
from cupytron.errors import ConfigError

KEYS = keys_of(RunConfig)


def lines_of(**kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(**kwargs)
    return str(caught.value).splitlines()


# --- the table: (override, the key that the error names, a part of the reason)

WRONG_TYPES = {
    int: [("1.5", "whole number"), ("abc", "whole number"), ("true", "whole number")],
    float: [("abc", "a number"), ("true", "a number"), ("nan", "finite"), ("-inf", "finite")],
    bool: [("1", "true or false"), ("yes", "true or false"), ("True", "true or false")],
    str: [("true", "text"), ('""', "")],
}
# values that are of the right type and still impossible
OUT_OF_RANGE = {
    "model.vocab_size": [-1, 0, 1, 2**40],
    "model.num_layers": [-1, 0, 10**9],
    "model.num_heads": [-4, 0, 10**9],
    "model.num_kv_heads": [-1, 0],
    "model.d_model": [-128, 0, 10**12],
    "model.d_ff": [-1, 0, 10**12],
    "model.context_length": [-1, 0, 10**12],
    "model.dropout": [-0.1, 1.0, 1.5],
    "model.rope_theta": [0.0, -1.0, 1e300],
    "model.norm_eps": [0.0, -1e-5, 2.0],
    "model.init_std": [0.0, -0.02, 100.0],
    "train.sequence_length": [-1, 0, 10**12],
    "train.micro_batch": [-1, 0, 10**12],
    "train.global_batch": [-12, 0, 10**12],
    "train.max_steps": [-1, 0, 10**20],
    "train.seed": [-1, 2**63, 2**200],
    "train.eval_interval": [-1],
    "train.eval_tokens": [0],
    "train.log_interval": [-1, 0],
    "train.check_replicas": [-1],
    "optim.lr": [-1, 0, 1e12],
    "optim.min_lr": [-1e-9],
    "optim.warmup_steps": [-1],
    "optim.decay_steps": [-1, 0],
    "optim.beta1": [-0.1, 1.0, 2],
    "optim.beta2": [-0.1, 1.0, 2],
    "optim.eps": [0.0, -1e-8],
    "optim.momentum": [-0.1, 1.0],
    "optim.weight_decay": [-0.1],
    "optim.clip": [-1.0],
    "parallel.tp": [-1, 0],
    "parallel.pp": [-1, 0],
    "parallel.dp": [-1, 0],
    "parallel.zero": [-1, 4],
    "parallel.threads": [-1, 0, 10**6],
    "parallel.blas_kernel": ["/bin/sh", "a b", "x-y"],
    "checkpoint.interval": [-1],
    "checkpoint.keep": [-1, 0],
}


def bad_values() -> list[tuple[str, str, str]]:
    """Per key: values of another type, and out of range."""
    table = []
    for key, field in KEYS.items():
        allowed = allowed_values(field)
        if literals := [value for value in allowed if isinstance(value, str)]:
            cases = [("3", literals[0]), ("true", literals[0]), (literals[0] + "x", literals[0])]
        else:
            (kind,) = [t for t in allowed if t in WRONG_TYPES]
            cases = WRONG_TYPES[kind]
        if field.default is not None and None not in allowed and "none" not in allowed:
            cases = [*cases, ("none", "must be")]
        cases = [*cases, ("[1]", ""), ("{a = 1}", "")] if key != "data.path" else cases
        cases += [(str(value), "") for value in OUT_OF_RANGE.get(key, [])]
        table += [(f"{key}={value}", key, reason) for value, reason in cases if key or reason]
    # any text is a kernel's name at the command line
    return [case for case in table if case[0] not in {"parallel.blas_kernel=none"}]


def misspelt_keys() -> list[tuple[str, str, str]]:
    """Per key: one letter too many, and the name of a field that other systems use."""
    return [
        *((f"{key}z=1", f"{key}z", f"did you mean {key}?") for key in KEYS),
        ("model.num_layer=4", "model.num_layer", "did you mean model.num_layers?"),
        ("model.lr=1", "model.lr", "did you mean optim.lr?"),
        ("train.lr=1", "train.lr", "did you mean optim.lr?"),
        ("train.tp=1", "train.tp", "did you mean parallel.tp?"),
        ("model.xyzzy=1", "model.xyzzy", "config show --keys"),
        ("modle.num_heads=1", "modle", "unknown section; did you mean model?"),
        ("optimizer.lr=1", "optimizer", "unknown section; did you mean optim?"),
        ("xyzzy.lr=1", "xyzzy", "unknown section"),
        ("num_heads=4", "num_heads=4", "did you mean model.num_heads?"),
        ("model.num_heads", "model.num_heads", "must be section.key=value"),
        ("model.num_heads=", "model.num_heads=", "must be section.key=value"),
        ("model.num_heads.x=4", "model.num_heads.x=4", "must be section.key=value"),
        ("=4", "=4", "must be section.key=value"),
        ("", "", "must be section.key=value"),
        ("model.a b=4", "model.a b=4", "must be section.key=value"),
        ("data.path=\udcff", "data.path", "is not UTF-8"),
    ]


BAD_OVERRIDES = bad_values() + misspelt_keys()

# --- values that are fine by themselves: (overrides, the key that the error names, the way out)

CONFLICTS = [
    ("model.d_model=100 model.num_heads=12", "model.num_heads", "1, 2, 4, 5, 10, 20, 25, 50, 100"),
    ("model.d_model=127", "model.num_heads", "choose num_heads from 1, 127"),
    ("model.num_heads=5", "model.num_heads", "choose num_heads from 1, 2, 4, 8, 16"),
    ("model.num_heads=4 model.num_kv_heads=3", "model.num_kv_heads", "from 1, 2, 4"),
    ("model.num_heads=4 model.num_kv_heads=8", "model.num_kv_heads", "from 1, 2, 4"),
    ("model.num_heads=128 model.family=llama", "model.num_heads", "1, 2, 4, 8, 16, 32, 64"),
    ("model.num_heads=128 model.position=rotary", "model.num_heads", "need pairs"),
    ("model.d_model=9 model.num_heads=3 model.family=llama", "model.num_heads", "even d_model"),
    ("train.global_batch=10", "train.global_batch", "choose 12"),
    ("train.global_batch=30", "train.global_batch", "choose 24 or 36"),
    ("train.micro_batch=8 train.global_batch=4", "train.global_batch", "choose 8"),
    ("train.sequence_length=65 model.context_length=64", "train.sequence_length", "shorten it"),
    ("optim.min_lr=0.1", "optim.min_lr", "more than optim.lr=0.001"),
    ("optim.decay_steps=99", "optim.decay_steps", "set decay_steps to 100 or more"),
    ("optim.decay_steps=99 optim.schedule=linear", "optim.decay_steps", "100 or more"),
    ("parallel.tp=3", "parallel.tp", "choose tp from 1, 2, 4"),
    ("parallel.pp=7", "parallel.pp", "7 parts (stages times chunks) are more than 4 blocks"),
    ("parallel.pp=4 parallel.schedule=interleaved", "parallel.pp", "8 parts"),
    ("parallel.chunks=2", "parallel.chunks", "set parallel.schedule to interleaved"),
    ("parallel.pp=2 parallel.split=2,1", "parallel.split", "the blocks of 2 parts, 4 together"),
    ("parallel.pp=3 parallel.split=2,0,2", "parallel.split", "may have 0"),
    ("parallel.split=2,x", "parallel.split", "characters that cannot stand here"),
    ("parallel.dp=2", "train.global_batch", "choose 24"),
]

# --- files: (contents, what the error names, a part of the reason)

BAD_FILES = [
    (b"[train]\nseed = \n", "FILE", "Invalid value (at line 2"),
    (b"[train]\nseed = 1\nseed = 2\n", "FILE", "line 3"),
    (b"[train]\n[train]\n", "FILE", "line 2"),
    (b"[train\nseed = 1\n", "FILE", "line 1"),
    (b"[train]\nseed 1\n", "FILE", "line 2"),
    (b"[train]\nseed = 1 2\n", "FILE", "line 2"),
    (b"[train]\nseed = 01\n", "FILE", "line 2"),
    (b"[train]\ndtype = float32\n", "FILE", "line 2"),
    (b"[train]\ndtype = 'float32\n", "FILE", "line 2"),
    (b'[train]\n\ndtype = "float32', "FILE", "line 3"),
    (b"[train]\nseed = [1, 2", "FILE", "line 2"),
    (b"[train]\ndeterministic = True\n", "FILE", "line 2"),
    (b'[data]\npath = "C:\\data"\n', "FILE", "line 2"),
    (b"\x00", "FILE", "line 1"),
    (b"\xff\xfe[\x00t\x00", "FILE", "line 1 is not UTF-8"),
    (b"[train]\n# caf\xe9\nseed = 1\n", "FILE", "line 2 is not UTF-8"),
    (b"[train]\nseed = 1" + b"0" * 5000, "FILE", "a number is too long"),
    (b"[train]\nseed = " + b"[" * 8_000, "FILE", "nested too deeply"),
    (b"#" * (MAX_BYTES + 1), "FILE", "larger than 64 KiB"),
    (b"PK\x03\x04" + bytes(range(256)), "FILE", "not UTF-8"),
    (b'{"train": {"seed": 1}}', "FILE", "line 1"),
    (b"train:\n  seed: 1\n", "FILE", "line 1"),
    (b"seed = 1\n", "seed", "stands in no section; did you mean train.seed?"),
    (b"xyzzy = 1\n", "xyzzy", "stands in no section"),
    (b"train = 1\n", "train=1", "must be a section"),
    (b"train = []\n", "train=[]", "must be a section"),
    (b"[[train]]\nseed = 1\n", "train=[", "must be a section"),
    (b"[trian]\nseed = 1\n", "trian", "did you mean train?"),
    (b"[train.seed]\nx = 1\n", "train.seed={", "whole number"),
    (b"[train.x.y]\nz = 1\n", "train.x", "unknown key"),
    (b'["train.seed"]\nx = 1\n', "train.seed", "unknown section"),
    (b'"train.seed" = 1\n', "train.seed", "stands in no section"),
    (b'[train]\n"a\\nb" = 1\n', "train.a\\nb", "unknown key"),
    (b'[train]\n"" = 1\n', "train.", "unknown key"),
    (b"[train]\nseed = 1979-05-27\n", "train.seed=1979-05-27", "whole number"),
    (b"[train]\nseed = 0x" + b"f" * 8000, "train.seed=a very long number", "at most"),
    (b"[optim]\nlr = 1e999\n", "optim.lr=inf", "finite"),
    (b'[data]\npath = "a\\u0000b"\n', 'data.path="a\\u0000b"', "cannot stand here"),
    (b"[data]\npath = 2024\n", "data.path=2024", "must be text"),
    (b'[model]\nnum_kv_heads = "none"\n', 'model.num_kv_heads="none"', "whole number"),
]


def test_there_are_more_than_200_and_no_two_are_the_same():
    cases = [*(c[0] for c in BAD_OVERRIDES), *(c[0] for c in CONFLICTS), *(c[0] for c in BAD_FILES)]
    assert len(cases) > 200
    assert len(set(cases)) == len(cases)
    assert {c[1] for c in BAD_OVERRIDES} >= set(KEYS), "every key is among them"


@pytest.mark.parametrize(("text", "key", "reason"), BAD_OVERRIDES)
def test_a_bad_override_is_named(text, key, reason):
    (line,) = lines_of(overrides=[text])
    assert line.startswith((f"{key}=", f"{key}:")), line
    assert reason in line


def bad_lines() -> list[tuple[str, str, str]]:
    """(section, line, key) of those overrides that a file can say too."""
    lines = []
    for text, key, _ in BAD_OVERRIDES:
        path, _, value = text.partition("=")
        section, _, name = path.partition(".")
        if name.isidentifier() and value and value.isascii():
            is_toml = value in ("true", "nan", "-inf") or value[0] in '"[{-0123456789'
            lines.append((section, f"{name} = {value if is_toml else repr(value)}", key))
    return lines


@pytest.mark.parametrize(("section", "text", "key"), bad_lines())
def test_a_bad_value_in_a_file_is_named_too(section, text, key, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f"[{section}]\n{text}\n")
    (line,) = lines_of(file=file)
    assert line.startswith((f"{key}=", f"{key}:")), line


@pytest.mark.parametrize(("texts", "key", "reason"), CONFLICTS)
def test_values_that_do_not_go_together_are_named(texts, key, reason):
    (line,) = lines_of(overrides=texts.split())
    assert line.startswith(f"{key}="), line
    assert reason in line


@pytest.mark.parametrize(("contents", "name", "reason"), BAD_FILES)
def test_a_damaged_file_is_named(contents, name, reason, tmp_path):
    file = tmp_path / "run.toml"
    file.write_bytes(contents)
    (line,) = lines_of(file=file)
    assert line.startswith(name.replace("FILE", f"{file}: ")), line
    assert reason in line
    assert line.isprintable()
    assert len(line) < 300


def test_files_that_cannot_be_read(tmp_path):
    assert lines_of(file=tmp_path / "nix") == [f"{tmp_path}/nix: there is no such file"]
    assert lines_of(file=tmp_path) == [f"{tmp_path}: is a folder; give a TOML file"]
    assert "embedded null byte" in lines_of(file="a\0b")[0]
    assert lines_of(file="/dev/zero") == ["/dev/zero: is a pipe or a device; give a TOML file"]
    (tmp_path / "large").write_bytes(b"#" * (1 << 21))
    assert "larger than 64 KiB" in lines_of(file=tmp_path / "large")[0]


def test_an_unknown_preset_lists_the_presets_nearest_first():
    (line,) = lines_of(preset="gpt2-125m")
    assert line.startswith("preset gpt2-125m: is not known; choose from gpt2-124m, ")
    assert line.count(", ") == 6
    assert "is not known" in lines_of(preset="../presets/demo")[0]
    assert "is not known" in lines_of(preset="")[0]


# --- all at once


def test_all_errors_are_told_at_once(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nmax_step = 5\nseed = -1\n[checkpiont]\nkeep = 1\n")
    lines = lines_of(
        preset="nix",
        file=file,
        overrides=["optim.lr=-1", "model.num_heads=x", "parallel.schedule=x", "keep=1"],
    )
    starts = [
        "preset nix: is not known",
        "keep=1: must be section.key=value; did you mean checkpoint.keep?",
        "model.num_heads=",
        "train.seed=-1: must be at least 0",
        "train.max_step: unknown key; did you mean train.max_steps?",
        "optim.lr=-1: must be greater than 0",
        "checkpiont: unknown section; did you mean checkpoint?",
        "parallel.schedule=\"x\": must be 'gpipe', '1f1b', 'interleaved', 'zb-h1' or 'zb-v'",
    ]
    assert len(lines) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in lines), start


def test_conflicts_of_all_sections_are_told_with_other_errors():
    lines = lines_of(
        overrides=[
            "model.num_heads=12",
            "model.num_kv_heads=5",
            "train.global_batch=13",
            "optim.min_lr=1",
            "train.seed=x",
        ]
    )
    keys = [line.partition("=")[0] for line in lines]
    assert sorted(keys) == [
        "model.num_heads",
        "model.num_kv_heads",
        "optim.min_lr",
        "train.global_batch",
        "train.seed",
    ]


def test_what_follows_from_another_error_is_not_told(tmp_path):
    # 12 heads divide no default width, but the width that was meant is not known
    assert len(lines_of(overrides=["model.d_model=x", "model.num_heads=12"])) == 1
    assert len(lines_of(overrides=["model.d_modell=96", "model.num_heads=12"])) == 1
    assert len(lines_of(overrides=["d_model=96", "model.num_heads=12"])) == 1
    assert len(lines_of(preset="nix", overrides=["model.num_heads=12"])) == 1
    file = tmp_path / "run.toml"
    file.write_text("train = 3\n")
    assert len(lines_of(file=file, overrides=["optim.warmup_steps=5000"])) == 1


def test_a_section_that_is_none_is_not_healed_by_an_override(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("train = 3\n")
    assert lines_of(file=file, overrides=["train.seed=1"]) == ["train=3: must be a section of keys"]


# --- nothing but ConfigError, whatever comes


@settings(max_examples=150, deadline=None)
@given(contents=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8")))
@example(contents=b'model.x.y."z" = 1')
def test_any_file_is_settings_or_one_kind_of_error(contents, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(contents)
    check_any(file=file)


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from([*KEYS, "model", "x.y", "model.x"]),
    value=st.text(max_size=20) | st.integers().map(str) | st.floats().map(str),
)
def test_any_override_is_settings_or_one_kind_of_error(key, value):
    check_any(overrides=[f"{key}={value}"])


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_preset_is_settings_or_one_kind_of_error(position, byte, cut, tmp_path_factory):
    contents = bytearray(load_config("llama-1b").to_toml().encode())
    position %= len(contents)
    contents[position] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.toml"
    file.write_bytes(contents[:position] if cut else contents)
    check_any(file=file)


def check_any(**kwargs):
    try:
        config = load_config(**kwargs)
    except ConfigError as error:
        assert all(line.isprintable() and line for line in str(error).split("\n"))
    else:
        assert isinstance(config, RunConfig)


# --- through the command line


@pytest.mark.parametrize(
    "text", [*(case[0] for case in BAD_OVERRIDES[::25]), "parallel.tp=3", "model.num_heads=12"]
)
def test_the_command_line_prints_one_line_and_exits_with_2(text, capsys):
    assert _run(["config", "show", "--set", text]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
