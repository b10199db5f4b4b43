"""After a loss of power, in which files and names that were not synced are lost, the same command goes on.

CUPYTRON_CALLS=all tries all states of the disk (the acceptance run asks for that).
"""

import os
import random

import pytest
from syscalls.disk import Disk, State
from syscalls.parts import ALL, lines, run_parts, shown
from syscalls.shim import Call

SAMPLE = 60  # states of the disk that are tried of each command


def states(*calls: tuple) -> list[State]:
    """States of a disk after some calls in an empty folder /r."""
    disk = Disk("/r")
    for kind, path, *more in calls:
        other, offset, data = "", 0, b""
        if kind in ("rename", "exchange"):
            other = f"/r/{more[0]}"
        elif kind == "write":
            offset, data = more
        elif kind == "open":
            offset = os.O_CREAT
        disk.apply(Call(kind, len(data), f"/r/{path}".rstrip("/"), other, offset, data))
    return [state for _, state in disk.states(random.Random(1), subsets=300)]


def test_what_was_never_synced_may_be_missing_or_empty():
    found = states(("open", "a"), ("write", "a", 0, b"text"))
    assert {} in found and {"a": b""} in found
    contents = {state.get("a", b"") for state in found}
    assert contents & {b"t", b"te", b"tex"}  # in part
    assert contents & {b"\0\0\0\0", b"t\0\0\0", b"te\0\0", b"tex\0"}  # with zeros


def test_a_synced_file_needs_its_name_synced_too():
    written = [("open", "a"), ("write", "a", 0, b"text"), ("fsync", "a")]
    assert {} in states(*written)
    assert all(state == {"a": b"text"} for state in states(*written, ("fsync", "")))


def test_a_file_that_grew_keeps_its_synced_beginning():
    written = [("open", "a"), ("write", "a", 0, b"one "), ("fsync", "a"), ("fsync", "")]
    found = states(*written, ("write", "a", 4, b"two"))
    assert {"a": b"one "} in found and all(s["a"][:4] == b"one " for s in found)


def test_a_rename_is_whole_and_may_come_late():
    written = [("mkdir", "b"), ("open", "b/x"), ("fsync", "b"), ("fsync", "")]
    found = states(*written, ("rename", "b", "c"))
    assert {tuple(sorted(s)) for s in found} == {("b", "b/x"), ("c", "c/x")}


def test_a_name_that_was_removed_before_the_rename_may_be_back_after_it():
    # the removal of a folder can reach the disk before the renaming that set this folder aside
    written = [("mkdir", "b"), ("open", "b/x"), ("fsync", "b"), ("fsync", "")]
    found = states(*written, ("rename", "b", "c"), ("unlink", "c/x"))
    assert {"b": None} in found and {"c": None, "c/x": b""} in found


def test_names_are_exchanged_at_once():
    written = [("mkdir", "a"), ("open", "a/1"), ("mkdir", "b"), ("open", "b/2")]
    synced = [("fsync", "a"), ("fsync", "b"), ("fsync", "")]
    found = states(*written, *synced, ("exchange", "a", "b"))
    before, after = ("a", "a/1", "b", "b/2"), ("a", "a/2", "b", "b/1")
    assert {tuple(sorted(s)) for s in found} == {before, after}


@pytest.mark.timeout(300)
def test_a_run_survives_some_losses_of_power_and_a_missing_fsync_is_seen(tmp_path):
    found = run_parts("power_loss", tmp_path, "8", "resume", workers=1, limit=280, planted=True)
    assert not lines(found), shown(lines(found))
    lost = "was saved, but the same command went on from step"
    assert any(lost in line for line in lines(found, "planted"))


@pytest.mark.slow
@pytest.mark.timeout(3600 if ALL else 600)
def test_losses_of_power_lose_nothing_that_was_saved(tmp_path):
    found = run_parts("power_loss", tmp_path, str(0 if ALL else SAMPLE), limit=3500 if ALL else 550)
    assert not lines(found), shown(lines(found))
