"""File formats that are not read here, and how to convert them."""

from pathlib import Path
from typing import NamedTuple

from .sources import JSON_LINES, open_file
from .token_files import is_megatron_index


class Format(NamedTuple):
    """A file format.

    Attributes:
        what: the name of such a file, for messages.
        suffixes: of the files' names.
        magic: the possible bytes at `offset`; empty if a text could have them there.
        way_out: how to convert the file; {path} and {load} stand for it and for the call that loads it.
        columns: whether such files always hold data sets, so that a folder with one of them is a data set.
        one_file: whether it is a single compressed file, whose program accepts no other suffix.
        offset: where `magic` stands.
    """

    what: str
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    way_out: str
    columns: bool = False
    one_file: bool = False
    offset: int = 0


def _packed(what: str, suffixes: tuple[str, ...], magic: tuple[bytes, ...], tool: str) -> Format:
    return Format(what, suffixes, magic, f"unpack it with {tool} {{path}}", one_file=True)


_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # the first block, and the end of an empty file
_BZIP2 = tuple(b"BZh%d" % level + block for level in range(1, 10) for block in _BZIP2_BLOCKS)
_PARQUET = "pandas.read_parquet('{path}').to_json('{path}.jsonl', orient='records', lines=True)"
_FORMATS = (
    _packed("gzip-compressed", (".gz", ".tgz"), (b"\x1f\x8b",), "gunzip -k"),
    _packed("compressed by compress", (".z",), (b"\x1f\x9d",), "gunzip -k"),
    _packed("Zstandard-compressed", (".zst",), (b"\x28\xb5\x2f\xfd",), "zstd -d"),
    _packed("bzip2-compressed", (".bz2", ".tbz2"), _BZIP2, "bunzip2 -k"),
    _packed("xz-compressed", (".xz", ".txz"), (b"\xfd7zXZ\0",), "unxz -k"),
    _packed("lz4-compressed", (".lz4",), (b"\x04\x22\x4d\x18",), "lz4 -d"),
    # such files have no first bytes of their own
    Format("Brotli-compressed", (".br",), (), "unpack it with brotli -d {path}"),
    Format(
        "a zip archive",
        (".zip", ".npz"),
        (b"PK\x03\x04", b"PK\x05\x06"),
        "unpack it with unzip {path}",
    ),
    Format("a 7-Zip archive", (".7z",), (b"7z\xbc\xaf\x27\x1c",), "unpack it with 7z x {path}"),
    Format("a RAR archive", (".rar",), (b"Rar!\x1a\x07",), "unpack it with unrar x {path}"),
    Format(
        "a tar archive",
        (".tar",),
        (b"ustar\0", b"ustar  \0"),
        "unpack it with tar -xf {path}",
        offset=257,
    ),
    Format("a Parquet file", (".parquet",), (), f"write it as lines in Python: {_PARQUET}", True),
    Format(
        "an Arrow file, as save_to_disk of the datasets library writes",
        (".arrow", ".feather"),
        (b"ARROW1\0\0", b"\xff\xff\xff\xff"),
        "write it as lines in Python: {load}.to_json('{path}.jsonl')",
        True,
    ),
)
_START = 265  # bytes in which all magic stands
_INDEX = Format("the index of Megatron-LM's tokens", (), (), "give the .bin file beside it")


def unread_format(path: Path) -> Format | None:
    """The format of a file that cannot be read here; None: it is none of these formats."""
    if is_megatron_index(path):
        return _INDEX
    suffix = path.suffix.lower()
    with open_file(path) as file:
        start = file.read(_START)
    for each in _FORMATS:
        if suffix in each.suffixes or start.startswith(each.magic, each.offset):
            return each
    return None


def way_out(path: Path, form: Format) -> str:
    """A line for an error: what the file is, and how to convert it."""
    saved = (path.parent / "state.json").exists()
    load = f"load_from_disk('{path.parent}')" if saved else f"Dataset.from_file('{path}')"
    given = str(path)
    if form.one_file and path.suffix.lower() not in form.suffixes:
        given = f"< {path} > {path.with_name(f'unpacked-{path.name}')}"
    return f"{path}: {form.what}; {form.way_out.format(path=given, load='datasets.' + load)}"


def holds_a_corpus(path: Path, form: Format) -> bool:
    """Whether a folder with such a file is a corpus, whose other files only describe it."""
    return form.columns or Path(path.stem).suffix.lower() in (*JSON_LINES, ".json")
