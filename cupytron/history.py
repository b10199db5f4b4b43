"""Checks that metrics.jsonl still holds the records that it held when a checkpoint was saved.

A checkpoint seals the length and the SHA-256 of metrics.jsonl. Later lines belong to steps that a resumed
run trains again. A last line that a kill cut in half lies beyond the seal, so it is no damage.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from cupytron.checkpoint import Checkpoint
from cupytron.durable import open_file, replacing
from cupytron.run_checkpoints import free_name
from cupytron.run_folder import RunFolder, records


def damage(folder: RunFolder, found: Checkpoint) -> str | None:
    """How metrics.jsonl differs from the part of it that a checkpoint seals; None if it does not.

    If some of its lines cannot be read, a copy of it is kept, since a resumed run drops those lines.
    A checkpoint of an earlier version has no such seal. Then each step must have a line that can be read.
    """
    sealed = found.about.get("metrics")
    path = folder.metrics
    if not path.exists():
        return f"{path} is missing: the records of steps 1 to {found.step} are lost"
    with open_file(path) as file:
        content = file.read()
    # without a seal, a last line that a kill cut in half is no damage
    covered = content[: sealed["bytes"] if sealed else content.rfind(b"\n") + 1]
    if sealed and hashlib.sha256(covered).hexdigest() == sealed["sha256"]:
        return None
    lines = list(records(covered))
    unreadable = any(record is None for record, _ in lines)
    there = {
        record["step"]
        for record, _ in records(content)
        if record is not None and "loss" in record and isinstance(record.get("step"), int)
    }
    missing = [step for step in range(1, found.step + 1) if step not in there]
    if not (sealed or unreadable or missing):
        return None
    what = "some records were changed, though all of them can be read"
    if missing:
        what = f"the records of steps {ranges(missing)} are missing or cannot be read"
    elif unreadable:
        what = "some of its lines cannot be read"
    note = ""
    if unreadable:
        note = f"; it is kept as {_copy(path, content).name}"
    return f"{path} is damaged: {what}{note}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text, with those that follow each other drawn together: 1-3, 7, 9-12."""
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in _runs(numbers)
    )


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of all numbers that follow each other without a gap."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]


def _copy(path: Path, content: bytes) -> Path:
    copy = free_name(path.with_name(f"{path.stem}.damaged{path.suffix}"))
    with replacing(copy) as file:
        file.write(content)
    return copy
