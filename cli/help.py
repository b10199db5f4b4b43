"""Commands whose help has headings, the limits of values, and examples; suggestions for wrong names."""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cupytron.cli import hints
from cupytron.cli.say import say_page

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Option(click.Option):
    """An option that stands under a heading of its command's help."""

    def __init__(self, *args: Any, heading: str = "Options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heading = heading


option = functools.partial(click.option, cls=Option)


class SettingOption(Option):
    """An option that sets one key of a run's settings, whose schema gives its help.

    The schema is read only for the help and for completion, since it imports pydantic.

    Args:
        key: `section.key`.
        shown: the name of the value in the help; None: its type or its choices.
        defaults: whether the help shows the key's default.
    """

    def __init__(
        self, *args: Any, key: str, shown: str | None = None, defaults: bool = True, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.key, self.shown, self.defaults = key, shown, defaults

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        if self.hidden:
            return None
        kind = _schema(self.key)
        types = {"integer": "INTEGER", "number": "FLOAT"}
        choices = f"[{'|'.join(kind['enum'])}]" if "enum" in kind else None
        self.metavar = self.shown or choices or types.get(kind["type"], "TEXT")
        text = str(kind["description"])
        facts = [self.key]
        if self.defaults and kind["default"] is not None:
            default = kind["default"]
            facts.append(f"default: {str(default).lower() if self.is_flag else default}")
        if limits := _range(kind):
            facts.append(limits)
        self.help = f"{text[0].upper()}{text[1:]}.  [{'; '.join(facts)}]"
        return super().get_help_record(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        if choices := _schema(self.key).get("enum"):
            return click.Choice(choices).shell_complete(ctx, self, incomplete)
        return super().shell_complete(ctx, incomplete)


class PresetOption(Option):
    """An option that takes a preset's name."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.metavar, self.help = "NAME", f"One of {', '.join(_presets())}."
        return super().get_help_record(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        return click.Choice(_presets()).shell_complete(ctx, self, incomplete)


def _given(value: Any, param: Any, ctx: Any) -> str:
    """A path as it was given, with its home folder; never empty, as an unset variable of a shell is.

    `Path("")` is the current folder, and an option without a value would be none.
    """
    if not str(value):
        name = param.opts[0] if param.param_type_name == "option" else param.make_metavar(ctx)
        name = name.split()[0].rstrip(".")  # of "RUN RUN..."
        raise click.UsageError(f"{name} is empty; give a path", ctx)
    return os.path.expanduser(value)


class PathText(click.ParamType):
    """A path, or one of the words that may stand in its place; the library checks it.

    `~` and `~USER` at its beginning are home folders, since shells do not expand them after `--out=`. As in
    shells, an unknown USER stays as it is.
    """

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return _given(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        return click.Path().shell_complete(ctx, param, incomplete)


class NewFile(click.Path):
    """A file to write; home folders as in PathText."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return super().convert(_given(value, param, ctx), param, ctx)


def picture_option(function: Any) -> Any:
    """`--png` of a command that draws loss curves; its parameter is `png`."""
    text = "Also draw the loss curves here (needs the plot extra)."
    return option("--png", type=NewFile(), metavar="FILE", help=text)(function)


class Folder(PathText):
    """A folder's path, which is completed as one."""

    name = "folder"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        return click.Path(file_okay=False).shell_complete(ctx, param, incomplete)


class Command(click.Command):
    """A command whose help groups options by their headings, and ends with examples.

    Args:
        examples: command lines, as a reader would type them.
    """

    def __init__(self, *args: Any, examples: Iterable[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(click.Group):
    """A group of commands that suggests a name for a wrong one."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            # some versions of click raise this help as an error
            say_page(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-"):
            names = self.list_commands(ctx)
            if name not in names:
                hint = hints.for_command(name, names, ctx.command_path)
                raise click.UsageError(f"{name}: no such command{hint}", ctx)
        return super().resolve_command(ctx, args)


def usage_message(error: click.ClickException) -> str:
    """Click's message about a wrong command line, as one line in the style of all our errors."""
    text = error.format_message()
    if isinstance(error, click.NoSuchOption):
        text = f"{error.option_name}: no such option{hints.for_option(error)}"
    elif isinstance(error, click.UsageError) and "unexpected extra argument" in text:
        text += hints.for_argument(error)
    # click shows the choices of a missing option on lines of their own
    text = " ".join(text.split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text += f" ({error.ctx.command_path} --help)"
    return text


def _presets() -> list[str]:
    from cupytron.config_io import preset_names

    return preset_names()


@functools.cache
def _schema(key: str) -> Mapping[str, Any]:
    """A key's description, default, type, and limits or choices ("enum"), in the words of JSON Schema."""
    from cupytron.config import RunConfig

    section, name = key.split(".")
    settings = RunConfig.model_fields[section].annotation
    found = settings.model_json_schema()["properties"][name]  # type: ignore[union-attr]
    kinds = [kind for kind in found.get("anyOf", [found]) if kind.get("type") != "null"]
    return {**found, **kinds[0]}


def _range(kind: Mapping[str, Any]) -> str:
    """A number's limits as click writes them, without an upper one that only catches slips."""
    below = next((f"{kind[k]:g}{sign}" for k, sign in _LOWER.items() if k in kind), "")
    above = next((f"{sign}{kind[k]:g}" for k, sign in _UPPER.items() if kind.get(k, 1e4) < 1e4), "")
    if above:
        return f"{below}x{above}"
    return f"x{'>=' if '=' in below else '>'}{below.rstrip('<=')}" if below else ""


_LOWER = {"minimum": "<=", "exclusiveMinimum": "<"}
_UPPER = {"maximum": "<=", "exclusiveMaximum": "<"}
