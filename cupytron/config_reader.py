"""Lays presets, files and `section.key=value` over each other, and gathers every error."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cupytron.config_checks import Problem
from cupytron.config_io import nearest, preset_path, read_toml, read_value, show_text, show_value
from cupytron.errors import ConfigError

MOST_LINES = 20  # of errors; nobody reads more, and each hint takes a moment to look for
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
Config = TypeVar("Config", bound=BaseModel)

# pydantic's kinds of errors in our words
EXPLANATIONS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text, in quotes",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "has characters that cannot stand here",
    "model_type": "must be a section of keys",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}


class Conflict(ValueError):
    """What a settings class raises when its values do not go together."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__("\n".join(problem.message for problem in problems))
        self.problems = problems


class Reader(Generic[Config]):
    """Settings in the making.

    Args:
        cls: the settings; each of its fields is a section, a pydantic class with a field a key.
    """

    def __init__(self, cls: type[Config]):
        self.cls = cls
        self.keys = keys_of(cls)
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self.bad: set[str] = set()  # keys and sections that an error has been told about
        self.complete = True  # every file could be read

    def add_preset(self, name: str) -> None:
        """Lay a preset over what is there."""
        self._add_toml(lambda: read_toml(preset_path(name)))

    def add_file(self, path: str | Path) -> None:
        """Lay a TOML file over what is there."""
        self._add_toml(lambda: read_toml(path))

    def add_values(self, sections: Mapping[str, Any]) -> None:
        """Lay sections of plain values over what is there."""
        self._add(sections)

    def add_override(self, text: str) -> None:
        """Lay `section.key=value` over what is there.

        The value is read as TOML, and what is not TOML is a bare string. `none` unsets the key.
        """
        path, equals, raw = (part.strip() for part in text.partition("="))
        parts = path.split(".")
        if not (equals and raw and len(parts) == 2 and all(map(BARE_KEY.fullmatch, parts))):
            self._tell_unknown(path, f"{show_text(text)}: must be section.key=value", self.keys)
        elif not _is_utf8(raw):
            self._tell(f"{path}={show_value(raw)}: is not UTF-8; use another name", path)
        else:
            self._add({parts[0]: {parts[1]: self._read_value(path, raw)}})

    def finish(self, *checks: Callable[[Config], Iterable[Problem]]) -> Config:
        """The settings, or a ConfigError with a line for everything that was wrong.

        Args:
            checks: further checks of settings that are valid.
        """
        values = {s: dict(v) if isinstance(v, dict) else v for s, v in self.values.items()}
        config = None
        while config is None:
            try:
                config = self.cls.model_validate(values)
            except ValidationError as error:
                # what is wrong gives way to its default, so that the rest can be checked too
                removed = [_remove(values, key) for e in error.errors() for key in self._take(e)]
                assert any(removed), f"the defaults are wrong: {error}"
        self._tell_conflicts([p for check in checks for p in check(config)])
        if len(self.lines) > MOST_LINES:
            more = len(self.lines) - MOST_LINES
            self.lines[MOST_LINES:] = [f"and {more:,} more errors; mend these first"]
        if self.lines:
            raise ConfigError("\n".join(self.lines))
        return config

    def _add_toml(self, read: Callable[[], dict[str, Any]]) -> None:
        try:
            self._add(read())
        except ConfigError as error:
            self.lines.append(str(error))
            self.complete = False

    def _add(self, layer: Mapping[str, Any]) -> None:
        for section, values in layer.items():
            below = self.values.get(section, {})
            if not isinstance(below, dict):
                continue  # `model = 3` stays, to be told about
            self.values[section] = below | values if isinstance(values, dict) else values

    def _read_value(self, path: str, raw: str) -> Any:
        allowed = allowed_values(self.keys[path]) if path in self.keys else ()
        if raw == "none" and "none" not in allowed:
            return None
        value = read_value(raw)
        # a folder may be called 2024
        return raw if str in allowed and not isinstance(value, str | bool) else value

    def _take(self, error: Any) -> list[tuple[str, ...]]:
        """Tell one of pydantic's errors in our words; where the values stand that it is about."""
        kind, value, context = error["type"], error["input"], error.get("ctx", {})
        if isinstance(conflict := context.get("error"), Conflict):
            self._tell_conflicts(conflict.problems)
            return [tuple(key.split(".")) for p in conflict.problems for key in p.keys]
        loc = error["loc"][:2]
        key, shown = ".".join(loc), ".".join(map(show_text, loc))
        if kind != "extra_forbidden":
            self._tell(f"{shown}={show_value(value)}: {_explain(kind, context)}", key)
        elif len(loc) > 1:
            self._tell_unknown(key, f"{shown}: unknown key", self.keys)
        elif isinstance(value, dict):
            self._tell_unknown(key, f"{shown}: unknown section", self.cls.model_fields)
        else:
            self._tell_unknown(key, f"{shown}: stands in no section", self.keys)
        return [loc]

    def _tell(self, line: str, *keys: str) -> None:
        self.lines.append(line)
        self.bad.update(keys)

    def _tell_unknown(self, key: str, line: str, known: Iterable[str]) -> None:
        hint = nearest(key, known) if len(self.lines) < MOST_LINES else None
        if hint:
            self._tell(f"{line}; did you mean {hint}?", key, hint)
        else:
            self._tell(f"{line}; `cupytron config show --keys` lists what there is", key)

    def _tell_conflicts(self, problems: Iterable[Problem]) -> None:
        """Tell those that do not follow from what has been told, or could not be read."""
        bad = self.bad.copy()
        for keys, line in problems:
            sections = [key.partition(".")[0] for key in keys]
            if bad.isdisjoint([*keys, *sections]) and (self.complete or len(keys) == 1):
                self.lines.append(line)
            self.bad.update(keys)


def _explain(kind: str, context: dict[str, Any]) -> str:
    words = EXPLANATIONS.get(kind, kind.replace("_", " "))
    return words.format(**{k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()})


def _remove(values: dict[str, Any], path: tuple[str, ...]) -> bool:
    holder = values if len(path) == 1 else values.get(path[0], {})
    return holder.pop(path[-1], holder) is not holder


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        return False
    return True


def keys_of(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every key, as `section.key`, and its field."""
    return {
        f"{name}.{key}": field
        for name, section in cls.model_fields.items()
        if section.annotation is not None
        for key, field in section.annotation.model_fields.items()
    }


def allowed_values(field: FieldInfo) -> list[Any]:
    """The literals that a key may be, or its types."""
    found, pending = [], [field.annotation]
    while pending:
        part = pending.pop()
        if parts := get_args(part):
            pending.extend(parts)
        else:
            found.append(part)
    return found
