"""Lets the power fail after each system call of a command: what was not synced may be gone.

    LD_PRELOAD=shim.so python tests/syscalls/power_loss.py PLACE MOST PART PARTS

PLACE is a folder to work in. MOST: how many states are tried of each command, chosen at random; 0: all.
PARTS processes share the work; this one has PART, from 0. Prints one JSON object: how many states there
are and how many were tried, and a line for everything wrong. CUPYTRON_PLANTED=yes: all of it once more with
a planted fault, which has to be seen ("planted").
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from syscalls.bench import Bench
from syscalls.disk import Disk, State, state_hash, write_state
from syscalls.scenario import LEFT, Scenario
from syscalls.scenarios import SCENARIOS, note_saves, nothing_synced, planted
from syscalls.shim import Call

SUBSETS = 2  # states with some of the changes of names, after each call


class Loss(NamedTuple):
    """A state of the disk after a loss of power.

    Attributes:
        how: which changes have reached the disk.
        call: the last call before the loss.
        calls: all calls up to that one.
        ended: whether these are all calls of the command.
        state: what the disk holds.
    """

    how: str
    call: Call
    calls: list[Call]
    ended: bool
    state: State


def losses(scenario: Scenario, draw: random.Random, subsets: int) -> Iterator[Loss]:
    """All different states that the disk may be in at some moment of the scenario's command."""
    scenario.bench.lay_out(scenario.name)
    disk = Disk.of(scenario.bench.root)
    whole = scenario.start(with_data=True)
    seen = set()
    for number, call in enumerate(whole.calls, start=1):
        if call.result < 0 or call.kind == "close":
            continue
        if call.kind != "mark":
            disk.apply(call)
        calls, ended = whole.calls[:number], number == len(whole.calls)
        for how, state in disk.states(draw, subsets):
            # the promise belongs to the key: the same state may be right now and wrong later
            key = (state_hash(state), scenario.promise(calls, ended))
            if key not in seen:
                seen.add(key)
                yield Loss(how, call, calls, ended, state)


def try_loss(scenario: Scenario, loss: Loss) -> Iterator[str]:
    """Run the command on a state of the disk; a line for everything wrong."""
    bench = scenario.bench
    bench.clear()
    write_state(loss.state, bench.root)
    yield from scenario.wrong_after_power_loss(loss.calls, loss.ended)
    promise = scenario.promise(loss.calls, loss.ended)
    again = scenario.start()
    if again.code == 1 and not promise and not list(scenario.wrong_failure(again)):
        return  # refused with a clear message, and nothing had been promised
    for line in scenario.wrong_in_the_end(promise, again):
        if not (line.startswith(LEFT) and "remove it if none is" in again.output):
            # without its lock, a dead data prepare looks like a living one: its folder stays, with a note
            yield line


def describe(loss: Loss, root: Path) -> str:
    """Where the power failed, in words."""
    call = loss.call
    path = os.path.relpath(call.path, root) if call.path.startswith("/") else call.path
    return f"{loss.how}, after call {len(loss.calls)}, {call.kind} {path}"


def try_losses(scenario: Scenario, chosen: Iterable[Loss]) -> list[str]:
    """A line for everything wrong in each of the states; they are shown as they are found, too."""
    wrong = []
    for loss in chosen:
        said = describe(loss, scenario.bench.root)
        for line in try_loss(scenario, loss):
            wrong.append(f"{scenario.name}: {said}: {line}")
            print(wrong[-1], file=sys.stderr, flush=True)
    return wrong


def choose(scenario: Scenario, most: int, part: int, parts: int) -> tuple[int, list[Loss]]:
    """How many states are this part's, and those that it tries."""
    draw = random.Random(scenario.name)
    # lengths differ a little between the processes, the numbers of calls do not
    states = [loss for loss in losses(scenario, draw, SUBSETS) if len(loss.calls) % parts == part]
    return len(states), draw.sample(states, min(most // parts or len(states), len(states)))


def main(place: str, most: str, part: str, parts: str, *only: str) -> None:
    began = time.monotonic()
    note_saves()
    bench = Bench(Path(place).resolve())
    found: dict[str, Any] = {"states": {}, "tried": 0, "wrong": [], "planted": []}
    for kind in SCENARIOS:
        if only and kind.name not in only:
            continue
        scenario = kind(bench)
        bench.lay_out(scenario.name)
        bench.import_what_it_imports(scenario.command())
        found["states"][kind.name], chosen = choose(scenario, int(most), int(part), int(parts))
        found["tried"] += len(chosen)
        found["wrong"] += try_losses(scenario, chosen)
        if planted():
            with nothing_synced():
                _, chosen = choose(scenario, int(most), int(part), int(parts))
                found["planted"] += try_losses(scenario, chosen)
    found["starts"], found["seconds"] = bench.starts, round(time.monotonic() - began, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
