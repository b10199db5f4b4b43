"""The Python side of shim.c: builds it, arms it in this process, and reads the log that it writes."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("shim.c")
KILL, KILL_HALF_WAY, FAIL, FAIL_FROM_HERE = 1, 2, 3, 4  # what a call may be made to do
NOWHERE = -1  # the number of no call


class Call(NamedTuple):
    """A system call, or a mark of the test's own (kind "mark", its text as the path).

    Attributes:
        kind: open, write, fsync, ftruncate, close, rename, exchange, unlink, rmdir, mkdir, ...
        result: what it returned; below 0: minus the error's number.
        path, other: absolute; `other` is the new name of a rename.
        offset: of a write; the flags of an open; the new size of a file that is cut.
        data: the bytes that were written, if they were to be logged.
    """

    kind: str
    result: int
    path: str
    other: str
    offset: int
    data: bytes


def build(folder: Path) -> Path | None:
    """Compile the shim; None: there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "g++"))), None)
    if compiler is None:
        return None
    library = folder / "shim.so"
    command = [
        compiler,
        "-x",
        "c",
        "-std=gnu11",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-shared",
        "-fPIC",
    ]
    subprocess.run([*command, "-o", library, SOURCE, "-ldl"], check=True, timeout=120)
    return library


def arm(
    folder: Path,
    log: int,
    with_data: bool = False,
    point: int = NOWHERE,
    action: int = 0,
    error: int = 0,
    exchange: bool = True,
) -> None:
    """Watch a folder from now on; this process was started with the shim loaded.

    Args:
        folder: the folder.
        log: the descriptor of a file in which every call is noted.
        with_data: note the bytes written, too.
        point: the number of the call at which something goes wrong, from 0.
        action: KILL, KILL_HALF_WAY, FAIL or FAIL_FROM_HERE.
        error: the error's number, if the call fails.
        exchange: whether renameat2 can exchange two names; on some file systems it cannot.
    """
    ctypes.CDLL(None).shim_arm(
        os.fsencode(folder), log, with_data, ctypes.c_long(point), action, error, not exchange
    )


def disarm() -> None:
    """Stop watching."""
    ctypes.CDLL(None).shim_arm(b"", -1, 0, ctypes.c_long(NOWHERE), 0, 0, 0)


def mark(text: str) -> None:
    """Write a line of the test's own to the log, between the calls."""
    ctypes.CDLL(None).shim_mark(text.encode())


def read_log(path: Path) -> list[Call]:
    """The calls in a log, in order; a log may end in the middle of a call that killed its process."""
    calls = []
    with open(path, "rb") as file:
        while (line := file.readline()).endswith(b"\n"):
            kind, result, one, other, offset, size = os.fsdecode(line[:-1]).split("\t")
            calls.append(Call(kind, int(result), one, other, int(offset), file.read(int(size))))
    return calls
