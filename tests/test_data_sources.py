"""Sources: ids of every type, JSON lines by every name, and files that are refused or passed over."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile

import numpy as np
import pytest

from cupytron.cli import data as cli_data
from cupytron.cli import main
from cupytron.data import DataError, open_dataset, prepare_dataset
from cupytron.data.token_files import BIN_DTYPES, TokenFile

LLAMA = 128_256  # ids of Llama 3: upper halves are 0 and 1


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def prepare(*sources, **settings):
    """Prepare a data set; returns the stream of ids and the notes."""
    result = prepare_dataset(sources, "out", overwrite=True, val_fraction=0, **settings)
    return open_dataset("out", verify=True).train.tokens[:].tolist(), result.notes


def refused(*sources, **settings):
    """The error of a source that is refused; nothing is left behind."""
    before = sorted(os.listdir())
    with pytest.raises(DataError) as info:
        prepare_dataset(sources, "out", overwrite=True, **settings)
    assert sorted(os.listdir()) == before and "\n" not in str(info.value)
    return str(info.value)


def ids(count, below, dtype, seed=1):
    return np.random.default_rng(seed).integers(0, below, count).astype(np.dtype(dtype))


# dtype in the file, a bound of the ids, the dtype that the file looks like
WIDE = [
    ("<u4", 50_257, "uint32"),
    ("<u4", LLAMA, "uint32"),
    ("<u4", 1 << 20, "uint32"),
    ("<i4", 65, "uint32"),
    ("<u4", 4, "uint32"),
    ("<i8", 50_257, "int64"),
    ("<i8", LLAMA, "int64"),
    ("<i8", 3, "int64"),
]


@pytest.mark.parametrize(("dtype", "below", "name"), WIDE)
@pytest.mark.parametrize("count", [40, 5001, 300_000])
def test_ids_of_32_and_64_bits_are_told_from_uint16(here, dtype, below, name, count):
    """Such files were once read as uint16: every second token was garbage, and the exit code was 0."""
    wanted = ids(count, below, dtype)
    write(here / "a.bin", wanted.tobytes())
    if count == 5001 and name == "uint32":
        assert (here / "a.bin").stat().st_size % 8
    message = refused("a.bin", vocab_size=1 << 20)
    assert f"a.bin: its ids look like {name[-2:]} bits" in message
    assert f"give --bin-dtype {name}, or --bin-dtype uint16" in message
    assert prepare("a.bin", vocab_size=1 << 20, bin_dtype=name)[0] == wanted.tolist()


@pytest.mark.parametrize("below", [1, 2, 4, 15, 16, 17, 65, 257, 50_257, 65_536])
@pytest.mark.parametrize("count", [1, 2, 16, 40, 4000, 600_000])
def test_uint16_is_read_without_complaint_whatever_the_vocabulary(here, below, count):
    for seed in range(20 if count <= 4000 else 1):
        wanted = ids(count, below, "<u2", seed)
        write(here / "a.bin", wanted.tobytes())
        found = np.concatenate([part.ids for part in TokenFile(here / "a.bin").parts()])
        assert found.tolist() == wanted.tolist()


def test_uint16_of_text_is_read_without_complaint(here):
    """Characters as nanoGPT's prepare.py writes them; zeros alone; and a file that begins with zeros."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
    characters = sorted(set(text))
    samples = [[characters.index(c) for c in text], [0] * 1000, [0] * 500 + [7] * 500]
    for sample in samples:
        write(here / "a.bin", np.array(sample, "<u2").tobytes())
        assert prepare("a.bin", vocab_size=65)[0] == sample


def test_a_false_alarm_has_a_way_out(here):
    """One letter on a line: every second character is the end of a line, which is id 0."""
    sample = [value for letter in range(1, 27) for value in (letter, 0)]
    write(here / "a.bin", np.array(sample, "<u2").tobytes())
    assert "--bin-dtype uint16 if they are" in refused("a.bin", vocab_size=27)
    assert prepare("a.bin", vocab_size=27, bin_dtype="uint16")[0] == sample


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        ("int32", [1, 2, -1], r"a.bin: token 2 has id -1, outside the vocabulary of 9"),
        ("int64", [1, -(1 << 40)], r"token 1 has id -1099511627776"),
        ("int64", [1 << 40, 1], r"token 0 has id 1099511627776, outside"),
        ("uint32", [1, 2, 9], r"token 2 has id 9, outside the vocabulary of 9"),
        ("uint32", np.array([1, 2], "<u2"), r"token 0 has id 131073, outside"),
        ("int64", np.array([1, 2], "<u2"), "4 bytes are not a whole number of int64 tokens"),
        ("uint8", [1], "bin_dtype=uint8 is none of uint16, uint32, int32, int64"),
    ],
)
def test_ids_that_cannot_be_are_refused(here, dtype, values, message):
    values = values if isinstance(values, np.ndarray) else np.array(values, dtype)
    write(here / "a.bin", values.tobytes())
    assert message in refused("a.bin", vocab_size=9, bin_dtype=dtype)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", ">i4", "u1", "<u8"])
@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_numpy_arrays_say_themselves_what_they_hold(here, dtype, name):
    wanted = ids(3000, 200, dtype)
    with open(name, "wb") as file:
        np.save(file, wanted)
    assert prepare(name, vocab_size=200)[0] == wanted.tolist()
    assert prepare(name, vocab_size=200, bin_dtype="uint16")[0] == wanted.tolist()
    assert "outside the vocabulary of 9" in refused(name, vocab_size=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4), int), "shape (3, 4), not a list of whole numbers"),
        (np.zeros(3), "an array of float64"),
        (np.array([{}]), "cannot be read as an array"),
        (np.array(3), "shape ()"),
        (b"\x93NUMPY", "cannot be read as an array"),
        (b"abcd", "not written by numpy.save"),
        (b"", "not written by numpy.save"),
    ],
)
def test_other_arrays_are_refused(here, content, message):
    if isinstance(content, bytes):
        write(here / "a.npy", content)
    else:
        np.save("a.npy", content)
    assert message in refused("a.npy", vocab_size=9)


def test_arrays_that_are_cut_short_or_followed_by_more_are_refused(here):
    np.save("a.npy", np.arange(9))
    data = (here / "a.npy").read_bytes()
    write(here / "a.npy", data[:-8])
    assert "cannot be read as an array" in refused("a.npy", vocab_size=9)
    write(here / "a.npy", data * 2)
    assert "200 bytes follow the array" in refused("a.npy", vocab_size=9)


def llmc(magic, version, values):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(values)
    return header.tobytes() + values.tobytes()


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_llmc_shards(here, magic, version, dtype):
    """Their headers were once read as 512 tokens."""
    wanted = ids(3000, 50_000, dtype)
    data = llmc(magic, version, wanted)
    write(here / "a.bin", data)
    assert prepare("a.bin", "a.bin", vocab_size=50_000)[0] == wanted.tolist() * 2
    other = "int64"
    assert "llm.c's header says that its ids are uint" in refused(
        "a.bin", vocab_size=9, bin_dtype=other
    )
    write(here / "a.bin", data[:-2])
    assert "llm.c's header says 3000" in refused("a.bin", vocab_size=50_000)
    write(here / "a.bin", llmc(magic, 9, wanted))
    assert "version 9 of llm.c's" in refused("a.bin", vocab_size=50_000)


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatrons_index_says_what_its_ids_are(here, code, dtype):
    wanted = ids(3000, 30_000, dtype)
    write(here / "a.bin", wanted.tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 1, 2) + bytes(40)
    write(here / "a.idx", index)
    found, notes = prepare("a.bin", vocab_size=30_000)
    assert found == wanted.tolist()
    assert notes[0].startswith("a.bin: the documents' ends in a.idx are not used")
    assert "give the .bin file beside it" in refused("a.idx", vocab_size=9)
    assert "a.idx says that its ids are" in refused("a.bin", vocab_size=9, bin_dtype="uint32")
    write(here / "a.idx", index[:17] + b"\x06" + index[18:])
    assert "its type of ids, 6, is not known" in refused("a.bin", vocab_size=9)
    write(here / "a.idx", "an index of something else")
    prepare("a.bin", vocab_size=30_000, bin_dtype=np.dtype(dtype).name)


LINES = '{"text": "a", "body": "x"}\n\n{"body": "y", "text": "b"}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.json", "a.NDJSON"])
@pytest.mark.parametrize("folder", [False, True])
def test_json_lines_by_every_name(here, name, folder):
    """Such files were once read as raw text, and --text-field was ignored."""
    write(here / "in" / name, LINES)
    source = "in" if folder else f"in/{name}"
    assert prepare(source)[0] == [ord("a"), 256, ord("b")]
    assert prepare(source, text_field="body")[0] == [ord("x"), 256, ord("y")]
    write(here / "in" / name, "\ufeff" + LINES)
    assert prepare(source)[0] == [ord("a"), 256, ord("b")]
    write(here / "in" / name, LINES + "{\n")
    assert f"{name}, line 4: not JSON" in refused("in")


JSON = [
    ('[{"text": "a"}]', "an array, not one object a line; turn it into lines with jq -c '.[]'"),
    ('\n[\n{"text": "a"}\n]', "an array"),
    ('{\n "text": "a"\n}', "not one object a line; write it so with jq -c ."),
    ('"a"', "not one object a line"),
    ("abc", "not one object a line"),
    (b"\xff\xfe", "not one object a line"),
]


@pytest.mark.parametrize(("content", "message"), JSON)
def test_other_json_is_refused_and_in_a_folder_passed_over(here, content, message):
    write(here / "in" / "a.json", content)
    found = refused("in/a.json")
    assert f"in/a.json: {message}" in found and "name it .txt" in found
    assert "no UTF-8 text files in this folder; in: skipped 1 " in refused("in")
    write(here / "in" / "b.txt", "b")
    stream, notes = prepare("in")
    assert stream == [ord("b")] and notes[0].endswith(": a.json")


def test_json_in_a_folder_without_the_field_is_passed_over_and_told(here):
    """A folder of code holds such files. If one is given by name, that is an error."""
    write(here / "in" / "package.json", '{"name": "x"}')
    write(here / "in" / "b.py", "b")
    stream, notes = prepare("in")
    assert stream == [ord("b")]
    assert notes == [
        "in: skipped 1 JSON file that is not one object a line with the text field: package.json"
    ]
    assert "no field 'text'; its fields: 'name'" in refused("in/package.json")


def tar_of_text():
    """An archive whose bytes are UTF-8."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return packed.getvalue()


PACKED = {
    "a.jsonl.gz": (gzip.compress(LINES.encode()), "gzip-compressed; unpack it with gunzip -k"),
    "a.txt.gz": (b"", "gunzip -k"),
    "renamed.txt": (gzip.compress(b"text"), "gunzip -k"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\0", "Zstandard-compressed; unpack it with zstd -d"),
    "a.bz2": (b"BZh91AY&SY", "bunzip2 -k"),
    "a.xz": (b"\xfd7zXZ\0", "unxz -k"),
    "a.lz4": (b"\x04\x22\x4d\x18", "lz4 -d"),
    "a.zip": (b"PK\x03\x04", "unzip"),
    "a.npz": (b"PK\x03\x04", "unzip"),
    "a.tar": (b"a.txt\0\0", "tar -xf"),
    "a.txt.br": (b"\x0b\x02\x80text\x03", "brotli -d"),
    "a.txt.Z": (b"\x1f\x9d\x90", "gunzip -k in/a.txt.Z"),
    "renamed-bz2.txt": (
        bz2.compress(b"text"),
        "bunzip2 -k < in/renamed-bz2.txt > in/unpacked-renamed-bz2.txt",
    ),
    "renamed-empty-bz2.txt": (bz2.compress(b""), "bunzip2 -k < "),
    "renamed-xz.jsonl": (lzma.compress(b"text"), "unxz -k < "),
    "renamed-zst.txt": (b"\x28\xb5\x2f\xfd\0", "zstd -d < "),
    "renamed-compress.txt": (b"\x1f\x9d\x90", "gunzip -k < "),
    "renamed-7z.txt": (b"7z\xbc\xaf\x27\x1c\0\4", "7z x in/renamed-7z.txt"),
    "renamed-rar.txt": (b"Rar!\x1a\x07\x01\0", "unrar x"),
    "renamed-tar.txt": (tar_of_text(), "tar -xf"),
    "a.parquet": (b"PAR1\x15\x04", "a Parquet file; write it as lines in Python: pandas.read_par"),
    "a.arrow": (b"ARROW1\0\0", "datasets.Dataset.from_file('in/a.arrow').to_json("),
    "a.feather": (b"", "an Arrow file"),
}


@pytest.mark.parametrize("name", PACKED)
def test_formats_that_cannot_be_read_say_what_to_do(here, name):
    content, message = PACKED[name]
    write(here / "in" / name, content)
    found = refused(f"in/{name}")
    assert message in found and f"in/{name}" in found and "iconv" not in found


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.ndjson.zst", "a.json.xz", "a.parquet", "a.arrow"]
)
def test_a_folder_whose_corpus_cannot_be_read_is_not_trained_on_the_rest(here, name):
    write(here / "in" / "README.md", "about the corpus")
    write(here / "in" / "data" / name, "")
    assert f"in/data/{name}: " in refused("in")


def test_a_folder_of_save_to_disk_is_refused(here):
    """Such a folder was once taken for text, since its two JSON files are UTF-8."""
    write(here / "in" / "dataset_info.json", json.dumps({"citation": "", "features": {}}))
    write(here / "in" / "state.json", json.dumps({"_fingerprint": "1"}, indent=2))
    write(here / "in" / "data-00000-of-00001.arrow", b"\xff\xff\xff\xff\0\1")
    assert "datasets.load_from_disk('in').to_json(" in refused("in")
    write(here / "dict" / "dataset_dict.json", '{"splits": ["train"]}')
    os.rename("in", "dict/train")
    assert "datasets.load_from_disk('dict/train').to_json(" in refused("dict")


def test_what_a_folder_passes_over_is_told(here):
    write(here / "in" / "a.txt", "a")
    write(here / "other" / "b.txt", "b")
    for name in ("l1", "l2", "l3", "l4", "l5"):
        os.symlink(here / "other", here / "in" / name)
    os.symlink(here / "none", here / "in" / "broken")
    os.symlink(here / "other" / "b.txt", here / "in" / "c.txt")  # a link to a file is read
    os.mkfifo("in/pipe")
    write(here / "in" / "sub" / ".x" / "y.txt", "y")
    write(here / "in" / "fig.svg.gz", gzip.compress(b"x"))
    stream, notes = prepare("in")
    assert stream == [ord("a"), 256, ord("b")]
    assert notes == [
        "in: skipped 1 compressed file (unpack it first): fig.svg.gz",
        "in: skipped 1 hidden file or folder: sub/.x",
        "in: skipped 5 links to folders (give the folders by name): l1, l2, l3 and 2 more",
        "in: skipped 2 pipes, devices or broken links: broken, pipe",
    ]


def test_the_command_line_offers_the_types_and_tells_the_notes(here, capsys):
    (option,) = (p for p in cli_data.prepare.params if p.name == "bin_dtype")
    assert tuple(option.type.choices) == BIN_DTYPES
    write(here / "a.bin", ids(99, 9, "<u4").tobytes())
    arguments = ["data", "prepare", "a.bin", "--out", "out", "--vocab-size", "9"]
    for more, code in (([], 1), (["--bin-dtype", "int32"], 0), (["--bin-dtype", "int8"], 2)):
        with pytest.raises(SystemExit) as info:
            main.run([*arguments, *more])
        assert info.value.code == code
        assert ("--bin-dtype uint32" in capsys.readouterr().err) == (code == 1)
