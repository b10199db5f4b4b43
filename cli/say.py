"""Prints everything that commands print, so that text of strangers' files cannot control a terminal."""

import json
import sys
from typing import Any

import click

from cupytron.printable import printable


def say(line: str = "", err: bool = False) -> None:
    """Print one line; line breaks in it are shown as escapes, too."""
    click.echo(printable(line), err=err)


def say_page(text: str, err: bool = False) -> None:
    """Print text that may have several lines."""
    click.echo(printable(text, keep="\n\t"), err=err)


def say_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON, in ASCII."""
    # JSON lets DEL stand as it is, and a terminal does not show it
    click.echo(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))


def pass_on(text: str) -> None:
    """Print a model's text as it comes: on a terminal with escapes, elsewhere byte for byte."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    # without color=True, click removes escape codes from text that goes into a pipe
    click.echo(printable(text, keep="\n\t") if on_terminal else text, nl=False, color=True)
