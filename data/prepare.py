"""From sources to a prepared folder, in blocks: memory does not grow with the corpus."""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupytron.durable import way_out

from .bpe import BPE_SIZES, train
from .corpora import CORPORA, open_corpus
from .dataset import Sidecar, is_prepared
from .errors import DataError
from .paths import open_path
from .pieces import training_pieces
from .sources import Part, Source, documents
from .stopping import OrderlyStop
from .token_files import BIN_DTYPES, TokenFile
from .tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, collect_characters, load_tokenizer
from .work import WorkFolder, remove_dead
from .writer import no_text, write_dataset

_MAX_VOCAB_SIZE = 1 << 32
# BPE training keeps every distinct word, so it sees about this much text, spread over the corpus
_TRAINING_BYTES = 64 << 20


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        path: the folder.
        train, val: what train.json and val.json say.
        notes: what the user should know, a line each.
    """

    path: Path
    train: Sidecar
    val: Sidecar
    notes: list[str]


def prepare_dataset(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    val_fraction: float = 0.1,
    vocab_size: int | None = None,
    text_field: str = "text",
    overwrite: bool = False,
    separator: str | None = None,
    report: Callable[[str], None] = lambda message: None,
    bin_dtype: str | None = None,
) -> Prepared:
    """Turn text into a folder of token files that `open_dataset` opens.

    All tokens make one stream, with the tokenizer's separator (if it has one) between documents; its
    last part is the validation split. The folder appears under its name when it is complete.

    Args:
        sources: files, folders, or names of corpora (see `corpora`).
        tokenizer: "byte", "char", "bpe:SIZE" or a tokenizer file; None: bytes, or for token files with
            `vocab_size` none at all.
        val_fraction: part of the tokens, at least 0 and below 1.
        vocab_size: number of ids of token files whose tokenizer is not known.
        text_field: the field of JSON lines to read.
        overwrite: whether to replace a prepared data set.
        separator: the token between documents, for a tokenizer file; None: the best that it has.
        report: called with each step, for the user to see.
        bin_dtype: one of BIN_DTYPES, for .bin files that do not say their type; None: uint16, and files
            whose ids look wider are refused.

    Raises:
        DataError: a setting, source or tokenizer that cannot be used; nothing is left behind.
        Stopped: SIGTERM or SIGHUP has come; nothing is left behind.
    """
    check_settings(tokenizer, val_fraction, vocab_size, separator, bin_dtype)
    out = Path(os.path.realpath(out))
    notes = remove_dead(out, report)
    _check_output(out, overwrite)
    work = WorkFolder(out)
    try:
        with OrderlyStop() as stop, work:
            with stop.released():
                opened, found = _open_sources(sources, text_field, bin_dtype, work)
                choice = _tokenizer(tokenizer, vocab_size, opened, separator, report)
                names = [str(source) for source in sources]
                size = choice.vocab_size if choice else vocab_size
                assert size is not None
                written = write_dataset(work.new, opened, choice, size, val_fraction, names, report)
            _check_output(out, overwrite)
            work.publish()
    except OSError as error:
        place = out if error.filename is None else work.place_of(error.filename)
        if place is None:
            raise
        raise DataError(
            f"{place}: {error.strerror or error}, while the data set was written; {way_out(error)} there, "
            "and give the same command again"
        ) from error
    notes += [*found, *_notes(tokenizer, choice), *written.notes, *work.notes]
    return Prepared(out, written.train, written.val, notes)


def check_settings(
    tokenizer: str | Path | None,
    val_fraction: float,
    vocab_size: int | None,
    separator: str | None = None,
    bin_dtype: str | None = None,
) -> None:
    """Raise a DataError for a setting that is wrong whatever the sources."""
    if bin_dtype not in (None, *BIN_DTYPES):
        raise DataError(f"bin_dtype={bin_dtype} is none of {', '.join(BIN_DTYPES)}")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must be at least 0 and below 1, such as 0.1")
    if vocab_size is not None and not 1 <= vocab_size <= _MAX_VOCAB_SIZE:
        raise DataError(f"vocab_size={vocab_size} must be from 1 to {_MAX_VOCAB_SIZE}")
    if vocab_size is not None and tokenizer is not None:
        raise DataError(
            f"vocab_size={vocab_size} and tokenizer={tokenizer} exclude each other: the tokenizer "
            "says how many ids there are; leave one of them out"
        )
    if separator is not None and not _is_file(tokenizer):
        raise DataError(
            f"separator={separator} is for --tokenizer FILE: byte and bpe:SIZE have one of their own, "
            "char and --vocab-size have none; leave it out"
        )
    if tokenizer in (None, "byte", "char"):
        return
    name = str(tokenizer)
    if name.startswith("bpe:"):
        if (
            not re.fullmatch("bpe:[0-9]{1,9}", name)
            or not BPE_SIZES[0] <= int(name[4:]) <= BPE_SIZES[1]
        ):
            raise DataError(
                f"tokenizer={name}: SIZE must be a whole number from {BPE_SIZES[0]} (256 bytes and "
                f"the separator) to {BPE_SIZES[1]}, such as bpe:4096"
            )
    elif (inside := Path(name) / "tokenizer.json").is_file():
        raise DataError(f"tokenizer={name} is a folder; give the file in it, {inside}")
    elif not Path(name).is_file():
        raise DataError(f"tokenizer={name} is neither byte, char, bpe:SIZE nor a file")


def _is_file(tokenizer: str | Path | None) -> bool:
    return tokenizer not in (None, "byte", "char") and not str(tokenizer).startswith("bpe:")


def _check_output(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: a file; choose a folder for the output")
    if os.path.ismount(out):
        # the finished folder takes its name by renaming, which no mount point allows
        raise DataError(f"{out}: a mount point; choose a folder inside it, such as {out / 'data'}")
    if not any(out.iterdir()):
        return
    if not is_prepared(out):
        raise DataError(f"{out}: holds other files than a prepared data set; choose another folder")
    if not overwrite:
        raise DataError(
            f"{out}: holds a data set already; choose another folder or give --overwrite"
        )


def _open_sources(
    sources: Sequence[str | Path], text_field: str, bin_dtype: str | None, work: WorkFolder
) -> tuple[list[Source], list[str]]:
    if not sources:
        raise DataError(f"no sources given; name files, folders, or of {', '.join(CORPORA)}")
    opened: list[Source] = []
    notes: list[str] = []
    for source in sources:
        if not str(source):
            raise DataError("a source is empty; give a file or a folder (. for the current one)")
        if isinstance(source, str) and source in CORPORA:
            opened += open_corpus(source, work.path)
            if Path(source).exists():
                notes.append(f"{source} is the named corpus; write ./{source} for the file")
            continue
        if not Path(source).exists() and os.path.basename(source) == str(source):
            raise DataError(
                f"{source}: no such file or folder; the named corpora are {', '.join(CORPORA)}"
            )
        found, told = open_path(Path(source), text_field, (work.out, work.path), bin_dtype)
        opened += found
        notes += told
    return opened, notes


def _tokenizer(
    name: str | Path | None,
    vocab_size: int | None,
    sources: list[Source],
    separator: str | None,
    report: Callable[[str], None],
) -> Tokenizer | None:
    """The tokenizer of that name, made from the sources where it depends on them."""
    token_files = [source.name for source in sources if isinstance(source, TokenFile)]
    if vocab_size is not None:
        text = [source.name for source in sources if not isinstance(source, TokenFile)]
        if text:
            raise DataError(
                f"{text[0]}: text needs a tokenizer; vocab_size={vocab_size} is for token files alone"
            )
        return None
    if token_files and not _is_file(name):
        raise DataError(
            f"{token_files[0]}: a file of token ids does not say what they mean; give --vocab-size N, "
            "or the tokenizer they were made with as --tokenizer FILE"
        )
    if _is_file(name):
        return load_tokenizer(str(name)).with_separator(separator)
    if name == "char":
        report("collecting the characters")
        return CharTokenizer(
            collect_characters(part.text or "" for part in _parts(sources)) or no_text(sources)
        )
    if str(name).startswith("bpe:"):
        report("training the tokenizer")
        stride = 1 + sum(source.num_bytes for source in sources) // _TRAINING_BYTES
        pieces = itertools.chain.from_iterable(map(training_pieces, documents(_parts(sources))))
        return train(itertools.islice(pieces, 0, None, stride), int(str(name)[4:]))
    return ByteTokenizer()


def _parts(sources: list[Source]) -> Iterator[Part]:
    for source in sources:
        yield from source.parts()


def _notes(name: str | Path | None, tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return ["without a tokenizer, samples are token ids, and there are no bits per byte"]
    if str(name).startswith("bpe:") and tokenizer.vocab_size < int(str(name)[4:]):
        return [f"the text is enough for a vocabulary of {tokenizer.vocab_size}, not of {name}"]
    return []
