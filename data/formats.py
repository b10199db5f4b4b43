"""Files that hold text in a form that is not read here, and how to turn them into one that is."""

from pathlib import Path
from typing import NamedTuple

from .sources import JSON_LINES, open_file
from .token_files import is_megatron_index


class Format(NamedTuple):
    """A file format.

    Attributes:
        what: what such a file is, for messages.
        suffixes: of the files' names.
        magic: the possible first bytes; empty if a text could begin with them.
        way_out: how to convert the file; {path} and {load} stand for it and for the call that loads it.
        columns: whether such files hold data sets only, so that a folder with one of them is a data set.
    """

    what: str
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    way_out: str
    columns: bool = False


_PARQUET = "pandas.read_parquet('{path}').to_json('{path}.jsonl', orient='records', lines=True)"
_FORMATS = (
    Format("gzip-compressed", (".gz", ".tgz"), (b"\x1f\x8b",), "unpack it with gunzip -k {path}"),
    Format(
        "Zstandard-compressed", (".zst",), (b"\x28\xb5\x2f\xfd",), "unpack it with zstd -d {path}"
    ),
    Format("bzip2-compressed", (".bz2",), (), "unpack it with bunzip2 -k {path}"),
    Format("xz-compressed", (".xz",), (b"\xfd7zXZ\0",), "unpack it with unxz -k {path}"),
    Format("lz4-compressed", (".lz4",), (b"\x04\x22\x4d\x18",), "unpack it with lz4 -d {path}"),
    Format("a zip archive", (".zip", ".npz"), (b"PK\x03\x04",), "unpack it with unzip {path}"),
    Format("a tar archive", (".tar",), (), "unpack it with tar -xf {path}"),
    Format("a Parquet file", (".parquet",), (), f"write it as lines in Python: {_PARQUET}", True),
    Format(
        "an Arrow file, as save_to_disk of the datasets library writes",
        (".arrow", ".feather"),
        (b"ARROW1\0\0", b"\xff\xff\xff\xff"),
        "write it as lines in Python: {load}.to_json('{path}.jsonl')",
        True,
    ),
)
_INDEX = Format("the index of Megatron-LM's tokens", (), (), "give the .bin file beside it")


def unread_format(path: Path) -> Format | None:
    """The format of a file that cannot be read here; None: it is none of these formats."""
    if is_megatron_index(path):
        return _INDEX
    suffix = path.suffix.lower()
    with open_file(path) as file:
        start = file.read(8)
    for each in _FORMATS:
        if suffix in each.suffixes or start.startswith(each.magic):
            return each
    return None


def way_out(path: Path, form: Format) -> str:
    """A line for an error: what the file is, and how to convert it."""
    saved = (path.parent / "state.json").exists()
    load = f"load_from_disk('{path.parent}')" if saved else f"Dataset.from_file('{path}')"
    return f"{path}: {form.what}; {form.way_out.format(path=path, load='datasets.' + load)}"


def holds_a_corpus(path: Path, form: Format) -> bool:
    """Whether a folder with such a file is a corpus, whose other files only describe it."""
    return form.columns or Path(path.stem).suffix.lower() in (*JSON_LINES, ".json")
