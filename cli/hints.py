"""What a wrong option, argument or command was probably meant to be."""

from collections.abc import Iterable
from pathlib import Path

import click

# words for a command's work that are no command here, and the command that does it
_BY_WORK = {
    "fit": "train",
    "finetune": "train",
    "fine-tune": "train",
    "resume": "train",
    "continue": "train",
    "pretrain": "train",
    "evaluate": "eval",
    "test": "eval",
    "generate": "sample",
    "gen": "sample",
    "chat": "sample",
    "infer": "sample",
    "inference": "sample",
    "plot": "report",
    "curves": "report",
    "diff": "compare",
    "prepare": "data prepare",
    "tokenize": "data prepare",
    "inspect": "data inspect",
    "presets": "config show --presets",
    "keys": "config show --keys",
    "benchmark": "bench",
    "digest": "checkpoint digest",
    "ls": "checkpoint ls",
    "check": "verify",
    "tune": "autotune",
}


def for_command(name: str, names: Iterable[str], path: str) -> str:
    """The end of a message about an unknown command.

    Args:
        name: what was given.
        names: the commands that there are.
        path: of the group, such as "cupytron data".
    """
    import difflib  # most command lines need no hint

    names = list(names)
    if path == "cupytron" and (other := _BY_WORK.get(name.lower())):
        return f"; did you mean {other}?"
    return _did_you_mean(difflib.get_close_matches(name, names)) or f"; choose {_or(names)}"


def for_option(error: click.NoSuchOption) -> str:
    """The end of a message about an unknown option: the setting of its name, or similar options."""
    command = error.ctx.command if error.ctx else None
    takes_settings = command and any("--set" in option.opts for option in command.params)
    if takes_settings and (keys := _keys_named(error.option_name)):
        return f"; give {_or([f'--set {key}=VALUE' for key in keys])}"
    return _did_you_mean(sorted(error.possibilities or []))


def for_argument(error: click.UsageError) -> str:
    """The end of a message about an argument that the command does not take: the option that does."""
    from cupytron.config_io import preset_names

    words = error.format_message().removesuffix(")").partition("(")[2].split()
    if error.ctx is None or not words:
        return ""
    word, options = words[0], {name for option in error.ctx.command.params for name in option.opts}
    path = Path(word)
    if "=" in word:
        meant = f"--set {word}"
    elif (path / "train.json").is_file():
        meant = f"--data {word}"
    elif path.suffix == ".toml":
        meant = f"--config {word}"
    elif (path / "checkpoints").is_dir():
        meant = f"--out {word}"
    elif word in preset_names():
        meant = f"--preset {word}"
    else:
        return ""
    return f"; did you mean {meant}?" if meant.split()[0] in options else ""


def _keys_named(option: str) -> list[str]:
    """The settings that an option's name means, such as --dropout, --warmup or --n-kv-heads."""
    from cupytron.config import RunConfig

    name = option.lstrip("-").replace("-", "_")
    if name.startswith("n_"):
        name = name.replace("n_", "num_", 1)
    keys = [
        (f"{section}.{key}", key)
        for section, field in RunConfig.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
    same = [full for full, key in keys if name in (key, full)]
    return same or [full for full, key in keys if key.startswith(f"{name}_")]


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {_or(names)}?" if names else ""


def _or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
