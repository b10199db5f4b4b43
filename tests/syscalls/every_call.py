"""Kills a command at each of its system calls in turn, and lets each of them fail in turn.

    LD_PRELOAD=shim.so python tests/syscalls/every_call.py PLACE DEPTH PART PARTS

PLACE is a folder to work in. DEPTH: "few", "most" or "all" (`faults`). PARTS processes share the work; this
one has PART, from 0. Prints one JSON object: how many points and starts, and a line for everything wrong.
CUPYTRON_PLANTED=yes: all of it once more with a planted fault, which has to be seen ("planted").
"""

import errno
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from syscalls import shim
from syscalls.bench import Bench
from syscalls.scenario import Scenario
from syscalls.scenario_run import Train, spare
from syscalls.scenarios import SCENARIOS, note_saves, old_checkpoints_removed_first, planted
from syscalls.shim import Call

NAMES = ("mkdir", "rename", "unlink", "rmdir")
FEW = ("write", "rename", "exchange", "unlink")
OTHER_ERRORS = (errno.EDQUOT, errno.ESTALE, errno.EROFS)


class Fault(NamedTuple):
    """What goes wrong, and where.

    Attributes:
        point: the number of the call.
        action: one of the shim's actions.
        error: the error's number, if the call fails.
    """

    point: int
    action: int
    error: int = 0

    def describe(self, call: Call, root: Path) -> str:
        did = {
            shim.KILL: "killed before",
            shim.KILL_HALF_WAY: "killed in the middle of",
            shim.FAIL: f"{errno.errorcode.get(self.error)} at",
            shim.FAIL_FROM_HERE: f"{errno.errorcode.get(self.error)} from",
        }[self.action]
        other = f" to {os.path.relpath(call.other, root)}" if call.other.startswith("/") else ""
        return f"{did} call {self.point}, {call.kind} {os.path.relpath(call.path, root)}{other}"


def faults(scenario: Scenario, depth: str) -> Iterator[Fault]:
    """The faults to be tried at the calls of a scenario's command.

    Args:
        scenario: has been run once without a fault.
        depth: "few": a kill at one call of some kinds. "most": kills, ENOSPC and EIO at every call, other
            errors at one call of each kind. "all": every error at every call.
    """
    points = scenario.unbroken.points
    one_each = one_of_each_kind(points)
    for point, call in enumerate(points):
        if depth == "most" and not scenario.exchange and call.kind not in NAMES:
            continue  # the scenario that exchanges names has the same calls
        if depth == "few":
            if point in one_each and call.kind in FEW:
                yield Fault(point, shim.KILL)
            continue
        if call.kind != "close":  # it changes nothing on the disk
            yield Fault(point, shim.KILL)
        if call.kind == "write":
            yield Fault(point, shim.KILL_HALF_WAY)
        yield Fault(point, shim.FAIL_FROM_HERE, errno.ENOSPC)
        yield Fault(point, shim.FAIL, errno.EIO)
        for error in OTHER_ERRORS:
            if depth == "all" or point in one_each:
                yield Fault(point, shim.FAIL, error)
        if depth == "all":
            yield Fault(point, shim.FAIL, errno.ENOSPC)
            yield Fault(point, shim.FAIL_FROM_HERE, errno.EIO)


def one_of_each_kind(points: list[Call]) -> set[int]:
    """The number of one call of each kind: the one in the middle."""
    places: dict[str, list[int]] = {}
    for point, call in enumerate(points):
        places.setdefault(call.kind, []).append(point)
    return {found[len(found) // 2] for found in places.values()}


def try_fault(scenario: Scenario, fault: Fault, **more: Any) -> Iterator[str]:
    """Run the command with the fault, and once more; a line for everything wrong."""
    scenario.bench.lay_out(scenario.name)
    ended = scenario.start(point=fault.point, action=fault.action, error=fault.error, **more)
    killed = fault.action in (shim.KILL, shim.KILL_HALF_WAY)
    if killed and ended.code in (0, 1):
        yield f"it did not come to this call, but ended with {ended.code}: {ended.output}"
        return
    yield from scenario.wrong_at_once(ended)
    if not killed:
        yield from scenario.wrong_failure(ended)
    before = names_in(scenario)
    again = scenario.start()
    yield from scenario.wrong_in_the_end(scenario.promise(ended.calls, ended.code == 0), again)
    if isinstance(scenario, Train):
        yield from scenario.wrong_number(before, again, spare(ended.calls))


def names_in(scenario: Scenario) -> set[str]:
    """The names in checkpoints/."""
    place = scenario.bench.root / "run" / "checkpoints"
    return set(os.listdir(place)) if place.is_dir() else set()


def try_faults(scenario: Scenario, chosen: Iterable[Fault]) -> list[str]:
    """A line for everything wrong after each of the faults; they are shown as they are found, too."""
    wrong = []
    for fault in chosen:
        said = fault.describe(scenario.unbroken.points[fault.point], scenario.bench.root)
        for line in try_fault(scenario, fault):
            wrong.append(f"{scenario.name}: {said}: {line}")
            print(wrong[-1], file=sys.stderr, flush=True)
    return wrong


def main(place: str, depth: str, part: str, parts: str, *only: str) -> None:
    began = time.monotonic()
    note_saves()
    bench = Bench(Path(place).resolve())
    found: dict[str, Any] = {"faults": 0, "points": {}, "wrong": [], "planted": []}
    for kind in SCENARIOS:
        if only and kind.name not in only:
            continue
        scenario = kind(bench)
        bench.lay_out(scenario.name)
        bench.import_what_it_imports(scenario.command())
        if kind.name == "train":
            assert any(call.kind == "mark" for call in scenario.unbroken.calls), "no save was seen"
        found["points"][kind.name] = Counter(call.kind for call in scenario.unbroken.points)
        chosen = list(faults(scenario, depth))[int(part) :: int(parts)]
        found["faults"] += len(chosen)
        found["wrong"] += try_faults(scenario, chosen)
        if planted():
            with old_checkpoints_removed_first():
                found["planted"] += try_faults(scenario, chosen)
    found["starts"], found["seconds"] = bench.starts, round(time.monotonic() - began, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
