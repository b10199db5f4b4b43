"""Settings as text: TOML read and written, and values shown in error lines."""

import difflib
import json
import os
import select
import stat
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cupytron.durable import NotAFile, open_file
from cupytron.errors import ConfigError
from cupytron.printable import UNPRINTABLE

PRESETS = Path(__file__).parent / "presets"
MAX_BYTES = 1 << 16  # settings are a page; more than this is the wrong file
MAX_LINE = 1 << 13  # bytes; tomllib needs minutes for a key of a hundred thousand parts
MOST_NESTED = 100  # tables in each other; Python cannot show a thousand of them
PIPE_SECONDS = 10.0  # for a pipe to end
SHOWN_CHARACTERS = 60
_pipes: dict[str, bytes] = {}  # the text of each pipe that the command line has named


def preset_names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(name: str) -> Path:
    """A preset's file.

    Raises:
        ConfigError: there is none of that name.
    """
    names = preset_names()
    if name not in names:
        likely = difflib.get_close_matches(name, names, n=len(names) or 1, cutoff=0.4)
        names = likely + [n for n in names if n not in likely]
        if name.endswith(".toml"):
            raise ConfigError(f"preset {show_text(name)}: is not known; give a file with --config")
        raise ConfigError(f"preset {show_text(name)}: is not known; choose from {', '.join(names)}")
    return PRESETS / f"{name}.toml"


def take_pipe(path: str, ranks: int = 1) -> None:
    """Read a pipe that the user has named as a file of settings; `read_toml` then finds its text.

    A pipe can be read only once, and a file of a stranger's folder that is one may wait for ever. So
    `read_toml` itself opens none. Nothing is done for what is no pipe.

    Args:
        path: what the user has named.
        ranks: processes that were given the same path.

    Raises:
        ConfigError: it did not end within PIPE_SECONDS, cannot be read, or several ranks would share it.
    """
    shown = show_text(path, cut=False)
    try:
        if path in _pipes or not stat.S_ISFIFO(os.stat(path).st_mode):
            return
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return  # read_toml will say what is wrong
    if ranks > 1:
        raise ConfigError(
            f"{shown}: is a pipe, which only one of the {ranks} ranks could read; give a TOML file"
        )
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _pipes[path] = _read_pipe(descriptor)
        finally:
            os.close(descriptor)
    except TimeoutError:
        raise ConfigError(
            f"{shown}: is a pipe that did not end within {PIPE_SECONDS:g} seconds; give a TOML file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from None


def _read_pipe(descriptor: int) -> bytes:
    """All bytes of a pipe, but no more than show that they are too many.

    Raises:
        TimeoutError: it has not ended.
    """
    until, data, waits = time.monotonic() + PIPE_SECONDS, b"", True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(data) <= MAX_BYTES:
        # not after data: if the writer had left before the pipe was opened here, its end is no event
        if waits and not poll.poll(1000 * max(0.0, until - time.monotonic())):
            raise TimeoutError
        try:
            block = os.read(descriptor, MAX_BYTES + 1 - len(data))
        except BlockingIOError:
            waits = True
            continue
        if not block:
            break
        data, waits = data + block, False
    return data


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: one line, beginning with the path, if the file cannot be read or parsed.
    """
    shown = show_text(str(path), cut=False)
    try:
        data = _pipes.get(str(path))
        if data is None:
            with open_file(path) as file:
                data = file.read(MAX_BYTES + 1)
    except NotAFile:
        what = "a folder" if Path(path).is_dir() else "a pipe or a device"
        raise ConfigError(f"{shown}: is {what}; give a TOML file") from None
    except FileNotFoundError:
        raise ConfigError(f"{shown}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{shown}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{shown}: is larger than 64 KiB; settings are a short TOML file")
    for number, row in enumerate(data.split(b"\n"), start=1):
        if len(row) > MAX_LINE:
            raise ConfigError(
                f"{shown}: line {number} is longer than {MAX_LINE} bytes; settings are a short TOML file"
            )
    try:
        text = data.decode("utf-8-sig")  # -sig: some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}: line {line} is not UTF-8; save the file as UTF-8") from None
    try:
        return _parse(text)
    except tomllib.TOMLDecodeError as error:
        last = text.rstrip().count("\n") + 1
        reason = str(error).replace("at end of document", f"at line {last}, the last")
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:  # int() refuses thousands of digits
        reason = "a number is too long"
    raise ConfigError(f"{shown}: is not valid TOML: {show_text(reason, cut=False)}")


def _parse(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: it is not TOML.
        RecursionError: it is nested too deeply, if only by a key of very many parts.
    """
    found = tomllib.loads(text)
    level: list[Any] = [found]
    for _ in range(MOST_NESTED):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for each in inner for value in each if isinstance(value, dict | list)]
        if not level:
            return found
    raise RecursionError


def read_value(raw: str) -> Any:
    """A value in TOML's spelling; what is not TOML is a bare string."""
    if len(raw) > MAX_LINE:
        return raw
    try:
        table = _parse(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    # more keys: the text held a line break and another assignment
    return table["value"] if len(table) == 1 else raw


def write_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of plain values as TOML; None is left out, floats keep every bit."""
    blocks = []
    for section, values in sections.items():
        lines = [f"{key} = {toml_value(v)}" for key, v in values.items() if v is not None]
        blocks.append("\n".join([f"[{section}]", *lines]) + "\n")
    return "\n".join(blocks)


def toml_value(value: Any) -> str:
    """One value in TOML's spelling; None, which TOML lacks, as `--set` spells it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's too; the others are those that no terminal should get
        text = json.dumps(value, ensure_ascii=False)
        return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return repr(value) if isinstance(value, float) else str(value)


def show_value(value: Any) -> str:
    """A value for an error line: TOML's spelling, cut to a readable length."""
    try:
        return show_text(toml_value(value))
    except ValueError:  # an integer of thousands of digits
        return "a very long number"


def show_text(text: str, cut: bool = True) -> str:
    """Text for an error line: on one line, printable, and cut to a readable length."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text[: SHOWN_CHARACTERS - 3] + "..." if cut and len(text) > SHOWN_CHARACTERS else text


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The `section.key` that looks most like this one, if any does.

    The same name in another section comes first, then the section's own names, then the others'.
    """
    keys = list(keys)
    section, _, name = key.rpartition(".")
    names = {known.rpartition(".")[2]: known for known in keys}
    own = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    for found, among in (
        ([name] if name in names else [], names),
        (difflib.get_close_matches(name, own, n=1, cutoff=0.6), own),
        (difflib.get_close_matches(name, names, n=1, cutoff=0.8), names),
    ):
        if found:
            return among[found[0]]
    return None
