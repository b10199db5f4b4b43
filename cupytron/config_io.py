"""Settings as text: TOML files and `section.key=value` strings in, TOML and error lines out.

Knows the settings only as pydantic classes, a section each; what they mean stands in `config.py`.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cupytron.config_checks import Problem
from cupytron.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"

MAX_BYTES = 1 << 20  # a settings file is a page; more than this is the wrong file
SHOWN_CHARACTERS = 60
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


Config = TypeVar("Config", bound=BaseModel)


class Conflict(ValueError):
    """What a settings class raises when its values do not go together."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__("\n".join(problem.message for problem in problems))
        self.problems = problems


class Reader(Generic[Config]):
    """Lays settings over each other and gathers everything that is wrong with them.

    Args:
        cls: the settings; each of its fields is a section, a pydantic class with a field a key.
    """

    def __init__(self, cls: type[Config]):
        self.cls = cls
        self.keys = keys_of(cls)
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []

    def add_preset(self, name: str) -> None:
        """Lay a file of the presets' folder over what is there."""
        names = preset_names()
        if name in names:
            self.add_file(PRESETS / f"{name}.toml")
            return
        # the likeliest first
        likely = difflib.get_close_matches(name, names, n=len(names), cutoff=0.4)
        names = likely + [n for n in names if n not in likely]
        self.lines.append(f"preset {show_key(name)}: is not known; choose from {', '.join(names)}")

    def add_file(self, path: str | Path) -> None:
        """Lay a TOML file over what is there."""
        try:
            self._add(read_toml(path))
        except ConfigError as error:
            self.lines.append(str(error))

    def add_override(self, text: str) -> None:
        """Lay `section.key=value` over what is there.

        The value is read as TOML, and what is not TOML is a bare string. `none` unsets the key.
        """
        path, equals, raw = (part.strip() for part in text.partition("="))
        parts = path.split(".")
        if not (equals and raw and len(parts) == 2 and all(map(BARE_KEY.fullmatch, parts))):
            hint = nearest(path, self.keys)
            self.lines.append(f"{show_key(text)}: must be section.key=value{hint}")
            return
        if not _is_utf8(raw):
            self.lines.append(f"{path}={show_value(raw)}: is not UTF-8; use another name")
            return
        self._add({parts[0]: {parts[1]: self._parse(path, raw)}})

    def _parse(self, path: str, raw: str) -> Any:
        choices = choices_of(self.keys[path]) if path in self.keys else ()
        if raw == "none" and "none" not in choices:
            return None
        try:
            table = tomllib.loads(f"value = {raw}")
        except (ValueError, RecursionError):
            return raw
        if len(table) > 1:  # the text held a line break and another assignment
            return raw
        # a folder may be called 2024
        is_number_for_text = str in choices and not isinstance(table["value"], str)
        return raw if is_number_for_text else table["value"]

    def _add(self, layer: Mapping[str, Any]) -> None:
        for section, values in layer.items():
            below = self.values.get(section)
            if isinstance(values, dict) and isinstance(below, dict):
                self.values[section] = below | values
            else:
                self.values[section] = values

    def finish(self, *checks: Callable[[Config], Iterable[Problem]]) -> Config:
        """The settings, or a ConfigError with a line for everything that was wrong.

        Args:
            checks: further checks of settings that are valid.
        """
        values = {s: dict(v) if isinstance(v, dict) else v for s, v in self.values.items()}
        bad: set[str] = set()
        config = None
        while config is None:
            try:
                config = self.cls.model_validate(values)
            except ValidationError as error:
                # what is wrong gives way to its default, so that the rest can be checked too
                errors = error.errors()
                removed = [_remove(values, path) for e in errors for path in _paths(e)]
                assert any(removed), f"the defaults are wrong: {error}"
                self._report([p for e in errors for p in self._problems(e)], bad)
        self._report([p for check in checks for p in check(config)], bad)
        if self.lines:
            raise ConfigError("\n".join(self.lines))
        return config

    def _report(self, problems: Iterable[Problem], bad: set[str]) -> None:
        new = [p for p in problems if bad.isdisjoint(p.keys)]
        self.lines += [p.message for p in new]
        bad.update(key for p in problems for key in p.keys)

    def _problems(self, error: Any) -> list[Problem]:
        """Our words for one of pydantic's errors."""
        if isinstance(conflict := error.get("ctx", {}).get("error"), Conflict):
            return list(conflict.problems)
        key = ".".join(map(str, error["loc"]))
        shown, value = ".".join(show_key(str(part)) for part in error["loc"]), error["input"]
        if error["type"] != "extra_forbidden":
            return [Problem((key,), f"{shown}={show_value(value)}: {_explain(error)}")]
        if len(error["loc"]) > 1:
            return [Problem((key,), f"{shown}: unknown key{nearest(key, self.keys)}")]
        if isinstance(value, dict):
            hint = nearest(key, self.cls.model_fields)
            return [Problem((key,), f"{shown}: unknown section{hint}")]
        hint = nearest(key, self.keys)
        return [Problem((key,), f"{shown}: stands in no section{hint}")]


def _paths(error: Any) -> list[tuple[str, ...]]:
    """Where the values stand that one of pydantic's errors is about."""
    if isinstance(conflict := error.get("ctx", {}).get("error"), Conflict):
        return [tuple(key.split(".")) for problem in conflict.problems for key in problem.keys]
    return [error["loc"][:2]]


def _remove(values: dict[str, Any], path: tuple[str, ...]) -> bool:
    holder = values if len(path) == 1 else values.get(path[0], {})
    return holder.pop(path[-1], holder) is not holder


def _explain(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    plain = {
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be text, in quotes",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "has characters that cannot stand here",
        "model_type": "must be a section of keys",
    }
    limits = {
        "greater_than": ("must be greater than", "gt"),
        "greater_than_equal": ("must be at least", "ge"),
        "less_than": ("must be less than", "lt"),
        "less_than_equal": ("must be at most", "le"),
    }
    if kind in limits:
        words, limit = limits[kind]
        return (
            f"{words} {context[limit]:.15g}"
            if isinstance(context[limit], float)
            else (f"{words} {context[limit]}")
        )
    if kind == "literal_error":
        return f"choose from {context['expected'].replace(' or ', ', ')}"
    return plain.get(kind) or str(error["msg"])


def keys_of(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every key, as `section.key`, and its field."""
    return {
        f"{section}.{key}": field
        for section, of_section in cls.model_fields.items()
        for key, field in of_section.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def choices_of(field: FieldInfo) -> tuple[Any, ...]:
    """The literals that a key may be, or the types."""
    found: list[Any] = []
    pending = [field.annotation]
    while pending:
        part = pending.pop()
        pending.extend(args := get_args(part))
        if not args:
            found.append(part)
    return tuple(found)


def preset_names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: one line, beginning with the path, if the file cannot be read or parsed.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a TOML file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{show_key(str(path))}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB; settings are a short TOML file")
    try:
        text = data.decode("utf-8-sig")  # -sig: some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: is not valid TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or int() refusing thousands of digits
        end = f"at line {len(text.splitlines())}, the end"
        reason = str(error).replace("at end of document", end)
        raise ConfigError(f"{path}: is not valid TOML: {reason}") from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        return False
    return True


def write_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of plain values as TOML; None is left out, floats keep every bit."""
    blocks = []
    for section, values in sections.items():
        lines = [f"{key} = {toml_value(v)}" for key, v in values.items() if v is not None]
        blocks.append("\n".join([f"[{section}]", *lines]) + "\n")
    return "\n".join(blocks)


def toml_value(value: Any) -> str:
    """One value in TOML's spelling."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, except for DEL, which TOML wants escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return str(value)


def show_value(value: Any) -> str:
    """A value for an error line: TOML's spelling, on one line, cut to a readable length."""
    try:
        text = toml_value(value)
    except ValueError:  # an integer of thousands of digits
        text = "a very long number"
    return _one_line(text)


def show_key(key: str) -> str:
    """A key for an error line; what is not plain is quoted, so that it stays one line."""
    return _one_line(key if key.isprintable() else json.dumps(key))


def _one_line(text: str) -> str:
    text = text.encode("unicode_escape" if not text.isprintable() else "utf-8").decode()
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def nearest(key: str, keys: Iterable[str]) -> str:
    """`; did you mean section.key?` for the key that looks most like this one, or nothing."""
    keys = list(keys)
    name = key.rpartition(".")[2]
    same_name = [k for k in keys if k.rpartition(".")[2] == name]
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        # the right name in the wrong section, misspelt
        names = {k.rpartition(".")[2]: k for k in keys}
        close = [names[n] for n in difflib.get_close_matches(name, names, n=1, cutoff=0.7)]
    return f"; did you mean {close[0]}?" if close else ""
