"""Checks in child processes: one that fails, crashes or hangs hides no other.

A child runs some checks of a group one after the other and says on its standard output when it begins and
ends each of them. If it dies in the middle of one, that one has failed, and another child runs the rest.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
MARK = "@check "  # before what is meant for the parent
TAIL = 2000  # characters of a dead child's output that are kept
# -P: not the folder named cupytron that may lie here, without cupytron.cli, but what is installed
PYTHON = [sys.executable, "-P", "-c"]


class Failed(Exception):
    """A figure that is not what it has to be; `found` has all of them."""

    def __init__(self, text: str, found: Json | None = None) -> None:
        super().__init__(text)
        self.found = found or {}


class Skipped(Exception):
    """A check that cannot be made here, and why."""


def hold(true: bool, text: str, found: Json | None = None) -> None:
    """Fail with a text unless something is true."""
    if not true:
        raise Failed(text, found)


@dataclass
class Group:
    """Checks that one process runs.

    Attributes:
        name: before the checks' own names.
        command: starts a child; the checks' names follow.
        names: of the checks, in their order.
        limit: seconds for each check, and for a child's start. environment: variables to add.
    """

    name: str
    command: list[str]
    names: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


def run_one(check: Callable[[], Json | None]) -> Json:
    """Run a check in this process: its status (ok, FAILED or skipped), figures, and seconds."""
    began = time.perf_counter()
    try:
        outcome: Json = {"status": "ok", "found": check() or {}}
    except Skipped as why:
        outcome = {"status": "skipped", "why": str(why), "found": {}}
    except Failed as failed:
        outcome = {"status": "FAILED", "why": str(failed), "found": failed.found}
    except Exception as error:
        outcome = {
            "status": "FAILED",
            "why": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc()[-TAIL:],
            "found": {},
        }
    return {**outcome, "seconds": round(time.perf_counter() - began, 2)}


def said_with_mpi(code: str) -> str:
    """What a Python of its own prints that needs an MPI library.

    Raises:
        Skipped: it finds none; pip install --target leaves out those of a wheel.
    """
    done = subprocess.run([*PYTHON, code], capture_output=True, text=True, timeout=60)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Skipped(f"mpi4py has no library: {why[:200]}")
    return done.stdout


def say(message: Json) -> None:
    """Tell the parent, in one piece: a library may write to the same pipe at any time."""
    sys.stdout.write(f"\n{MARK}{json.dumps(message, default=str)}\n")
    sys.stdout.flush()


def heard(line: str) -> Json | None:
    """What a child has said in a line, whatever stands before or behind it; None: nothing, it is noise."""
    _, mark, said = line.partition(MARK)
    if not mark:
        return None
    try:
        message, _ = json.JSONDecoder().raw_decode(said)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def run_groups(groups: list[Group], jobs: int, tell: Callable[[str, Json], None]) -> Json:
    """Run groups in children, `jobs` at a time; outcomes by name.

    Args:
        tell: hears of each check that has ended, by its whole name; one at a time.
    """
    outcomes: Json = {}
    lock = threading.Lock()

    def note(name: str, outcome: Json) -> None:
        with lock:
            outcomes[name] = outcome
            tell(name, outcome)

    def run(group: Group) -> None:
        left = list(group.names)
        while left:
            done = set()
            for name, outcome in _child(group, left):
                done.add(name)
                note(f"{group.name}/{name}", outcome)
            if not done & set(left):
                why = "its process ended before this check began"
                for name in left:
                    outcome = {"status": "FAILED", "why": why, "found": {}, "seconds": 0.0}
                    note(f"{group.name}/{name}", outcome)
                return
            left = [name for name in left if name not in done]

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, group) for group in groups]:
            future.result()
    return outcomes


def _child(group: Group, names: list[str]) -> Iterator[tuple[str, Json]]:
    """Outcomes of the checks that one child gets through, the one that it dies of included."""
    child = subprocess.Popen(
        [*group.command, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **group.environment},
        process_group=0,  # so that what it starts can be ended with it
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    deadline = time.monotonic() + group.limit
    began, current, tail, timed_out = deadline, None, "", False
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            timed_out = True
            break
        if line is None:
            break
        message = heard(line)
        if message is None:
            tail = (tail + line)[-TAIL:]
            continue
        deadline = time.monotonic() + group.limit
        if "begin" in message:
            current, began, tail = message["begin"], time.monotonic(), ""
        else:
            yield message.pop("end"), message
            current = None
    code = _end(child, timed_out)
    if current is None and not code:
        return
    why = f"took longer than {group.limit:g} s" if timed_out else f"died of {_cause(code)}"
    yield (
        current or "process",
        {
            "status": "FAILED",
            "why": f"its process {why}",
            "output": tail,
            "found": {},
            "seconds": round(max(0.0, time.monotonic() - began), 2),
        },
    )


def _read(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _cause(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _end(child: subprocess.Popen, at_once: bool) -> int:
    """The exit code of a child, which is ended if it is not done; what it has started ends with it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(0 if at_once else 10)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def main_of_child(
    checks: dict[str, Callable[[], Json | None]],
    names: list[str],
    healthy: Callable[[], bool] = lambda: True,
) -> int:
    """A child's work; checks that do not exist are the parent's mistake.

    Args:
        healthy: whether this process can go on after a check that has failed; if not, another one does.
    """
    unknown = [name for name in names if name not in checks]
    if unknown:
        print(f"unknown checks: {', '.join(unknown)}", file=sys.stderr)
        return 2
    for name in names:
        say({"begin": name})
        outcome = run_one(checks[name])
        say({"end": name, **outcome})
        if outcome["status"] == "FAILED" and not healthy():
            os._exit(0)  # what ends a process in order may crash now
    return 0
