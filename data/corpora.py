"""Corpora with a name, for `prepare`: python-docs, python-stdlib and shakespeare.

A name is taken for the corpus even where a file of that name exists: write `./shakespeare` for the file.
"""

import hashlib
import http.client
import importlib
import os
import queue
import sysconfig
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cupytron.durable import naming

from .errors import DataError
from .paths import walk
from .sources import Part, Source, TextFile, is_text

CORPORA = ("python-docs", "python-stdlib", "shakespeare")

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_URL_VARIABLE = "CUPYTRON_SHAKESPEARE_URL"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_SHAKESPEARE_BYTES = 1_115_394
_CONNECT_SECONDS = 10
_DOWNLOAD_SECONDS = 60


def open_corpus(name: str, work: Path) -> list[Source]:
    """The sources of a named corpus; what is downloaded is kept in the folder `work`."""
    if name == "python-docs":
        return [PythonDocs()]
    if name == "python-stdlib":
        return _standard_library()
    return [TextFile(_download_shakespeare(work))]


class PythonDocs:
    """The topics of Python's `help()`, each a document, in the order of their names."""

    name = "python-docs"

    def __init__(self) -> None:
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:
            raise DataError(
                "python-docs: this Python has no pydoc_data.topics; use python-stdlib or a file"
            ) from error
        self._topics: dict[str, str] = topics
        self.num_bytes = sum(map(len, topics.values()))

    def parts(self) -> Iterator[Part]:
        for name in sorted(self._topics):
            if text := self._topics[name]:
                yield Part(True, text)


def _standard_library() -> list[Source]:
    """The standard library's modules in Python, without its tests and what else is installed."""
    folder = Path(sysconfig.get_path("stdlib"))
    others = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
    paths = walk(folder, (), others) if folder.is_dir() else iter(())
    sources: list[Source] = [TextFile(p) for p in paths if p.suffix == ".py" and is_text(p)]
    if not sources:
        raise DataError(
            f"python-stdlib: no Python source in {folder}; use python-docs or a folder of your own"
        )
    return sources


def _download_shakespeare(work: Path) -> Path:
    url = os.environ.get(SHAKESPEARE_URL_VARIABLE) or SHAKESPEARE_URL
    by_hand = (
        f"download {SHAKESPEARE_URL} where there is a network and give the file instead of "
        f"'shakespeare' (or set {SHAKESPEARE_URL_VARIABLE})"
    )
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{SHAKESPEARE_URL_VARIABLE}={url}: not an http or https address")
    try:
        data = _fetch(url, _SHAKESPEARE_BYTES)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # URLError wraps the reason; ValueError: an address that cannot be parsed
        reason = getattr(error, "reason", None) or error
        raise DataError(f"shakespeare: cannot download {url} ({reason}); {by_hand}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(
            f"shakespeare: what {url} sent has SHA-256 {found[:16]}..., not "
            f"{SHAKESPEARE_SHA256[:16]}...; {by_hand}"
        )
    path = work / "shakespeare.txt"
    with naming(path):
        path.write_bytes(data)
    return path


def _fetch(url: str, num_bytes: int) -> bytes:
    """At most one byte more than expected, all within _DOWNLOAD_SECONDS, the connection and headers too.

    A socket's timeout begins again with each byte, so a server that drips its headers would never meet it.
    A thread waits for the server, and is left behind if the time is over; it ends with the process.

    Raises:
        OSError, http.client.HTTPException, ValueError: the download failed; TimeoutError: it took too long.
    """
    over = threading.Event()
    result: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            result.put(_received(url, num_bytes, over))
        except BaseException as error:
            result.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        found = result.get(timeout=_DOWNLOAD_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"not done after {_DOWNLOAD_SECONDS} seconds") from None
    finally:
        over.set()
    if isinstance(found, BaseException):
        raise found
    return found


def _received(url: str, num_bytes: int, over: threading.Event) -> bytes:
    data = b""
    with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as response:
        while len(data) <= num_bytes and not over.is_set() and (block := response.read1(1 << 16)):
            data += block
    return data[: num_bytes + 1]
