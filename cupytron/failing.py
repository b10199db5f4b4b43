"""Ending all ranks of a job when one of them cannot go on: one message, and then every process ends.

A rank that merely raised an exception would leave the others waiting for it for ever: launchers end a job
when a process dies, not when it is stuck in the end of MPI behind the others.
"""

import contextlib
import faulthandler
import os
import sys
import time
import traceback
from typing import NoReturn

from cupytron.launcher import launched_rank

PATIENCE = 5.0  # seconds that MPI has to end the job, before this process at least ends
_FIRST = 0.7  # seconds that rank 0 has to be the one that speaks, if all ranks fail alike


def abort(code: int) -> NoReturn:
    """End the whole job now, with this exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
            # another thread may be inside MPI with a lock that Abort wants: not for ever
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=nowhere)
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def end_job(error: BaseException, message: str, code: int, show_traceback: bool) -> NoReturn:
    """Say on behalf of this rank why the job ends, and end it.

    Args:
        error: what has happened; its notes say where.
        message, code: what is said, and the job's exit code.
        show_traceback: print the error's traceback, too.
    """
    with contextlib.suppress(KeyboardInterrupt):
        if rank := launched_rank():
            # all ranks may have met the same error: the first ends the job, and is the only one that speaks
            time.sleep(_FIRST + min(1.0, 0.1 * rank))
    notes = "; ".join(getattr(error, "__notes__", []))
    text = f"error: rank {launched_rank()}: {message}" + (f" ({notes})" if notes else "") + "\n"
    if show_traceback:
        text = "".join(traceback.format_exception(error)) + text
    with contextlib.suppress(Exception):
        # one write: launchers mix the lines of ranks
        sys.stderr.write(text)
    abort(code)
