"""`cupytron compare`: several runs on one page."""

from collections.abc import Sequence
from pathlib import Path

import click

from cupytron.cli.help import Command, Folder, NewFile, option, picture_option
from cupytron.cli.say import say
from cupytron.printable import printable

_WIDEST = 40  # characters of a value in the terminal; the page has all of them


@click.command(
    cls=Command,
    examples=[
        "cupytron compare runs/one runs/two",
        "cupytron compare runs/one runs/two runs/three --out three.html --png three.png",
    ],
)
@click.argument("runs", type=Folder(), metavar="RUN RUN...", nargs=-1, required=True)
@option(
    "--out",
    type=NewFile(),
    default=Path("compare.html"),
    show_default=True,
    metavar="FILE",
    help="HTML file to write.",
)
@picture_option
def command(runs: tuple[str, ...], out: Path, png: Path | None) -> None:
    """Compare runs: curves over each other, figures, and the settings in which they differ."""
    from cupytron import compare, report

    report.check_outputs(runs, out, png)
    found = compare.read(runs)
    # before anything is said: the reader of our output may leave early
    compare.write_html(found, out)
    if png is not None:
        compare.write_png(found, png)
    tags = [run.tag for run in found.runs]
    for line in _table(["", *tags], found.table()):
        say(line)
    if found.settings:
        say()
        for line in _table(["settings that differ", *tags], found.settings):
            say(line)
    say()
    for each in found.runs:
        say(f"{each.tag}: {each.name}")
    for note in found.notes:
        say(f"note: {note}")
    for file in filter(None, (out, png)):
        say(f"written: {file}")


def _cut(value: str) -> str:
    """A value without its middle, if it is long: paths differ at their ends."""
    return value if len(value) <= _WIDEST else f"{value[:12]}...{value[15 - _WIDEST :]}"


def _table(head: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest value."""
    table = [list(head), *([name, *values] for name, values in rows.items())]
    table = [[_cut(printable(value)) for value in row] for row in table]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]
