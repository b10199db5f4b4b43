"""Ending all ranks of a job when one of them cannot go on: one message, and then every process ends.

A rank that merely raised an exception would leave the others waiting for it for ever: launchers end a job
when a process dies, not when it is stuck in the end of MPI behind the others.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from cupytron import launcher_guard, progress
from cupytron.errors import WrongLauncher
from cupytron.launcher import (
    begin_mpi,
    launched_rank,
    launched_tasks,
    launcher_pid,
    local_rank,
    local_ranks,
    named,
    under_open_mpi,
)
from cupytron.printable import printable

# seconds that MPI has to end the job, and more on a busy machine; then this process ends by a signal
PATIENCE = 5
_MOST = 120  # more seconds at most
START = 30  # the same, where other ranks may still be loading modules, and have not begun with MPI
_HEARD = 0.3  # seconds for the launcher to pass on what was said: it drops what comes with the end
_FIRST = 0.7  # seconds that rank 0 has to be the one that speaks, if all ranks fail alike


def abort(code: int, patience: int = PATIENCE) -> NoReturn:
    """End the whole job now, with this exit code.

    Args:
        patience: seconds that this process waits for MPI to do so.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if launched_tasks() > 1:
        time.sleep(_HEARD)
        # while MPI begins or ends it takes no calls, and a process that ends there ends the job; MPICH's
        # launcher may end at once, too, so it first gets more time to pass on the output
        if progress.waits_for() in progress.MPI_ITSELF:
            if under_open_mpi() and (launcher := launcher_pid()):
                with contextlib.suppress(OSError):
                    launcher_guard.leave(launcher)
            time.sleep(2 * _HEARD)
        else:
            with contextlib.suppress(BaseException):
                _join_mpi(patience).COMM_WORLD.Abort(code)
    os._exit(code)


def end_job(error: BaseException, message: str, code: int, show_traceback: bool) -> NoReturn:
    """Say on behalf of this rank why the job ends, and end it.

    Args:
        error: what has happened; its notes say where.
        message, code: what is said, and the job's exit code.
        show_traceback: print the error's traceback, too.
    """
    if isinstance(error, WrongLauncher) and local_rank() > 0:
        # the first rank of each machine says it, since MPI connects none of them
        abort(code, START)
    if rank := launched_rank():
        # all ranks may have met the same error: the first ends the job, and is the only one that speaks;
        # it can do so only once all have begun with MPI
        with contextlib.suppress(BaseException):
            _join_mpi(START)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_FIRST + min(3.0, 0.4 * rank))
    notes = "; ".join(dict.fromkeys(_notes(error)))
    text = f"error: {named(rank)}: {message}" + (f" ({notes})" if notes else "") + "\n"
    if show_traceback:
        text = "".join(traceback.format_exception(error)) + text
    with contextlib.suppress(Exception):
        # one write: launchers mix the lines of ranks
        sys.stderr.write(printable(text, keep="\n\t"))
    abort(code, START)


def _join_mpi(patience: int) -> Any:
    """Begin with MPI, if this rank has not yet.

    If a rank exits before it has begun with MPI, a launcher does not end the other ranks: they would wait
    for it in MPI_Init for ever.
    """
    with contextlib.suppress(AttributeError):
        # the other ranks may never begin with MPI, or another thread may be inside it and hold a lock that
        # Abort needs; every launcher notices a process that a signal has ended
        signal.alarm(scaled(patience, local_ranks(), os.getloadavg()[0], os.cpu_count() or 1))
    return begin_mpi()


def scaled(patience: int, ranks: int, load: float, cores: int) -> int:
    """Seconds to wait for MPI to begin on a machine where many ranks, or other programs, share the cores.

    A rank needs about a second of a core until it has begun with MPI.

    Args:
        patience: seconds on an idle machine.
        ranks: of this job on this machine.
        load: processes that want to run, on average.
        cores: of the machine.
    """
    return patience + int(min(_MOST, max(ranks, load) / cores))


def _notes(error: BaseException | None) -> Iterator[str]:
    """What was noted on an error and on those that it came from."""
    while error is not None:
        yield from getattr(error, "__notes__", [])
        error = error.__cause__ or error.__context__
