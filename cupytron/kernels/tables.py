"""What autotuning has found, on disk: one file for each kind of machine and set of versions."""

import contextlib
import functools
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from cupytron import backend, process
from cupytron.durable import replacing

FORMAT = 1
# what reading a file that is not there, or is no table, may end in
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_LIBRARY = Path(__file__).parents[1]


class Choice(NamedTuple):
    """What was found for one problem.

    Attributes:
        choice: the candidate to take. times: seconds by candidate. refused: why, by candidate.
    """

    choice: str
    times: dict[str, float]
    refused: dict[str, str]


# (operation, problem) -> what was found
Found = dict[tuple[str, str], Choice]
# name of another chooser, such as "products" -> what it has chosen, by its own keys
Others = dict[str, dict[str, int]]


def environment(device: Any = backend.CPU) -> dict[str, Any]:
    """All that the fastest candidate may depend on besides the problem.

    Args:
        device: a backend.Device.
    """
    found = {
        "cupytron": metadata.version("cupytron"),
        "numpy": metadata.version("numpy"),
        "sources": _sources(),
    }
    if not device.gpu:
        return {**found, "device": "cpu", "processor": process.processor(), "blas": _blas()}
    capability = str(device.xp.cuda.Device(device.number).compute_capability)
    return {**found, **device.versions(), **_libraries(), "device": device.model, "cc": capability}


@functools.cache
def _sources() -> str:
    """Hash of the candidates' sources: an edited kernel has to be tried again."""
    files = sorted(f for folder in ("ops", "kernels") for f in (_LIBRARY / folder).glob("*.[pc]*"))
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()[:16]


def _blas() -> list[str]:
    from threadpoolctl import threadpool_info

    libraries = [x for x in threadpool_info() if x["user_api"] == "blas"]
    return [
        f"{x.get('architecture')} {x['version']}, {x['num_threads']} threads" for x in libraries
    ]


def _libraries() -> dict[str, str]:
    """Versions of the libraries behind a GPU's kernels, of those that are there."""
    found = {}
    for name in ("cublasLt", "cudnn"):
        with contextlib.suppress(Exception):
            found[name] = str(_version(name))
    return found


def _version(name: str) -> Any:
    if name == "cudnn":
        from cupytron.kernels import cudnn_attention

        return cudnn_attention.library().backend_version()
    from cupytron.kernels import products

    return products.library_version()


def path(environment: dict[str, Any]) -> Path:
    """Where the table of an environment is kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / "cupytron" / f"autotune-{digest}.json"


def read(file: Path, environment: dict[str, Any]) -> tuple[Found, Others]:
    """A table; empty if there is none, or if it is damaged or another environment's."""
    with contextlib.suppress(*_DAMAGE):
        table = json.loads(file.read_text(encoding="utf-8"))
        if table["format"] == FORMAT and table["environment"] == environment:
            return _found(table["operations"]), _others(table)
    return {}, {}


def _found(operations: dict[str, dict[str, Any]]) -> Found:
    found: Found = {}
    for operation, problems in operations.items():
        for problem, entry in problems.items():
            times = {name: float(seconds) for name, seconds in entry["times"].items()}
            refused = {name: str(why) for name, why in entry["refused"].items()}
            found[operation, problem] = Choice(str(entry["choice"]), times, refused)
    return found


def _others(table: dict[str, Any]) -> Others:
    names = table.keys() - {"format", "environment", "operations"}
    return {name: {key: int(index) for key, index in table[name].items()} for name in names}


def write(file: Path, environment: dict[str, Any], found: Found, others: Others) -> None:
    """Write a table; what the file holds of other problems in this environment stays.

    Raises:
        OSError: it cannot be written.
    """
    old, old_others = read(file, environment)
    operations: dict[str, dict[str, Any]] = {}
    for (operation, problem), entry in sorted({**old, **found}.items()):
        operations.setdefault(operation, {})[problem] = entry._asdict()
    merged = {name: {**old_others.get(name, {}), **table} for name, table in others.items()}
    table = {
        "format": FORMAT,
        "environment": environment,
        "operations": operations,
        **old_others,
        **merged,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    # several jobs may tune at the same time
    with replacing(file) as new:
        new.write(json.dumps(table, indent=1).encode())
