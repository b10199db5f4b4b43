"""A training run in which one rank fails, or hangs: started by a launcher, see test_failing.py.

python tests/failing_job.py KIND PHASE RANK FILE train --data ...

The rank writes the time to FILE, and then fails in the way of KIND: before the first step, in the third
one, or while it writes a checkpoint. PHASE may also be one of phases.py, such as "at:materialize". With
"slow:NAP:LONG" as KIND, and a key of phases.SLOW as PHASE, the rank is slow there, but does not fail.
"""

import os
import signal
import sys
import time
from pathlib import Path

import click
import phases

from cupytron.cli.main import run
from cupytron.launcher import launched_rank


def fail(kind: str) -> None:
    if kind == "RuntimeError":
        raise RuntimeError("made to fail")
    if kind == "exit":
        sys.exit(3)
    if kind == "exit0":
        sys.exit(0)
    if kind == "UsageError":
        raise click.UsageError("made to fail")
    if kind == "MemoryError":
        raise MemoryError("made to fail")
    if kind == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "asleep":
        time.sleep(1000)


def break_phase(kind: str, phase: str, file: Path) -> None:
    """Make this process fail in that phase."""
    from cupytron import checkpoint
    from cupytron.trainer import Trainer

    owner, name = {
        "start": (Trainer, "materialize"),
        "step": (Trainer, "start_step"),
        "save": (checkpoint, "write"),
    }[phase]
    whole, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == (3 if phase == "step" else 1):
            file.write_text(str(time.time()))
            fail(kind)
        return whole(*args, **kwargs)

    setattr(owner, name, broken)


def main() -> None:
    kind, phase, rank, file, *arguments = sys.argv[1:]
    if phase == "options":
        # before the settings are read, and before MPI is there
        if launched_rank() == int(rank):
            arguments.append("--no-such-option")
            Path(file).write_text(str(time.time()))
    elif launched_rank() == int(rank) and kind.startswith("slow:"):
        nap, long = map(float, kind.split(":")[1:])
        phases.slow_down(phase, Path(file), nap, long)
    elif launched_rank() == int(rank) and phase.startswith("at:"):
        phases.break_phase(phase.removeprefix("at:"), Path(file), lambda: fail(kind))
    elif launched_rank() == int(rank):
        break_phase(kind, phase, Path(file))
    run(arguments)


if __name__ == "__main__":
    main()
