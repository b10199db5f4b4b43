"""The program that this process runs, which has to be the same on all ranks of a job."""

import hashlib
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_SOURCES = (".py", ".cu", ".cuh", ".toml")


class Program(NamedTuple):
    """A rank's program, as the other ranks compare it: its machine's name, and `running()`."""

    host: str
    versions: dict[str, str]


def running() -> dict[str, str]:
    """The versions that a rank's numbers depend on, as texts by the names "cupytron" and "numpy".

    The text for cupytron has the first digits of the SHA-256 of its sources, which may differ within a
    version.
    """
    return {
        "cupytron": f"{metadata.version('cupytron')} (sources {sources_hash()[:12]})",
        "numpy": metadata.version("numpy"),
    }


def host() -> str:
    """The name of this process's machine, for messages."""
    return platform.node() or "a host without a name"


def sources_hash() -> str:
    """SHA-256 over the names and contents of the package's source files."""
    digest = hashlib.sha256()
    # cupytron.cli and cupytron.data may lie in other folders than cupytron itself
    for package in ("cupytron", "cupytron.cli", "cupytron.data"):
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in _SOURCES:
                    name = f"{package}/{path.relative_to(folder)}"
                    digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
