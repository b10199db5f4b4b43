"""`cupytron data prepare` and `cupytron data inspect`."""

from typing import Any

import click

from cupytron.cli.help import Folder, Group, PathText, option
from cupytron.cli.say import say, say_json, say_page


@click.group(cls=Group)
def command() -> None:
    """Prepare and inspect token data sets."""


@command.command(
    examples=[
        "cupytron data prepare shakespeare --out runs/shakespeare-data --tokenizer char",
        "cupytron data prepare book.txt notes/ --out runs/data --tokenizer bpe:8000",
        "cupytron data prepare corpus.jsonl --out runs/data --tokenizer tokenizer.json",
        "cupytron data prepare train.bin --out runs/data --vocab-size 50257",
    ]
)
@click.argument("sources", type=PathText(), metavar="SOURCE...", nargs=-1, required=True)
@option(
    "--out",
    required=True,
    type=Folder(),
    metavar="DIR",
    heading="Data set",
    help="Folder to write.",
)
@option(
    "--tokenizer",
    type=PathText(),
    heading="Tokens",
    metavar="byte|char|bpe:SIZE|FILE",
    help="How text becomes token ids. FILE: a tokenizer.json of ours or of Hugging Face.  [default: byte]",
)
@option(
    "--val-fraction",
    heading="Data set",
    type=float,
    default=0.1,
    show_default=True,
    help="Part of the tokens, at the end, that is kept for validation.",
)
@option(
    "--vocab-size",
    heading="Token files and JSON lines",
    type=int,
    help="Number of ids in .bin and .npy files without a tokenizer.",
)
@option(
    "--bin-dtype",
    heading="Token files and JSON lines",
    type=click.Choice(["uint16", "uint32", "int32", "int64"]),
    help="Type of the ids in .bin files that do not say it.  [default: uint16]",
)
@option(
    "--text-field",
    heading="Token files and JSON lines",
    default="text",
    show_default=True,
    help="The field of JSON lines to read.",
)
@option(
    "--separator",
    heading="Tokens",
    metavar="TOKEN",
    help="The token between documents, for --tokenizer FILE.  [default: one with a known name]",
)
@option(
    "--overwrite",
    is_flag=True,
    heading="Data set",
    help="Replace a prepared data set in --out.",
)
def prepare(
    sources: tuple[str, ...],
    out: str,
    tokenizer: str | None,
    val_fraction: float,
    vocab_size: int | None,
    bin_dtype: str | None,
    text_field: str,
    separator: str | None,
    overwrite: bool,
) -> None:
    """Turn text into a folder of token ids.

    A SOURCE is a UTF-8 text file, a folder of them, JSON lines (.jsonl, .ndjson, .jsonlines, or .json with
    one object a line), token ids (.bin of nanoGPT, llm.c or Megatron-LM, .npy), or a named corpus:
    python-docs, python-stdlib, shakespeare. Write ./NAME for a file with such a name.
    """
    from cupytron.data import DataError, prepare_dataset
    from cupytron.data.prepare import check_settings
    from cupytron.data.stopping import Stopped

    try:
        check_settings(tokenizer, val_fraction, vocab_size, separator)
    except DataError as error:
        raise click.UsageError(str(error)) from error
    try:
        result = prepare_dataset(
            sources,
            out,
            tokenizer,
            val_fraction,
            vocab_size=vocab_size,
            text_field=text_field,
            bin_dtype=bin_dtype,
            overwrite=overwrite,
            separator=separator,
            report=lambda step: say(f"{step} ...", err=True),
        )
    except Stopped as stopped:
        say(
            f"error: stopped by {stopped.name}; nothing half-made is left: {out} is as it was before, or "
            "the new data set",
            err=True,
        )
        raise click.exceptions.Exit(int(str(stopped.code))) from None
    for note in result.notes:
        say(f"note: {note}", err=True)
    train, val = result.train, result.val
    kind = train.tokenizer or "no tokenizer"
    say(
        f"{out}: {train.tokens:,} training and {val.tokens:,} validation tokens, "
        f"vocabulary of {train.vocab_size:,} ({kind})"
    )


@command.command(examples=["cupytron data inspect runs/data"])
@click.argument("folder", metavar="DIR", type=Folder())
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(folder: str, as_json: bool) -> None:
    """Check a data set and say what it holds."""
    from cupytron.data import describe_dataset

    facts = describe_dataset(folder)
    if as_json:
        say_json(facts, indent=2)
        return
    for name, value in _rows(facts).items():
        say(f"{name:<12}{value}")
    if facts["excerpt"] is not None:
        say("excerpt")
        say_page("\n".join(f"  {line}" for line in facts["excerpt"].split("\n")))


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    tokenizer = facts["tokenizer"]
    return {
        "path": facts["path"],
        "sources": ", ".join(facts["sources"]),
        "train": _format_split(facts["train"]),
        "val": _format_split(facts["val"]),
        "vocabulary": f"{facts['vocab_size']:,} ids, {facts['dtype']}",
        "separator": "none" if facts["separator"] is None else f"id {facts['separator']}",
        "tokenizer": f"{tokenizer} ({facts['tokenizer_hash'][:16]})" if tokenizer else "none",
        "SHA-256": facts["sha256"],
    }


def _format_split(split: dict[str, Any]) -> str:
    text = f"{split['tokens']:,} tokens"
    if split["bytes_per_token"] is None:
        return text
    return (
        f"{text}, {split['bytes']:,} bytes of text, {split['bytes_per_token']:.2f} bytes per token"
    )
