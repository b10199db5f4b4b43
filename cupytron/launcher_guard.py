"""A program that ends Open MPI's launcher if it hangs after its ranks have ended.

If a rank ends while another is inside MPI_Init, the launcher of Open MPI 5.0.11 may never end: a thread of
its PMIx server waits for a lock, and PMIx_server_finalize waits for that thread. A rank that ends the job
there leaves this program behind. It runs as a file of its own, and imports the standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

IDLE = (
    5.0  # seconds without a process of its own after which a launcher hangs: it needs less than one
)
GIVE_UP = 120.0  # seconds after which the program ends in any case
_TICK = 0.2


def leave(pid: int) -> None:
    """Start the program for the launcher `pid`; it outlives this process."""
    status = _status(pid)
    if status is None:
        return
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(pid), status[2], str(IDLE), str(GIVE_UP)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # launchers end the process groups of their ranks
    )


def guard(pid: int, started: str, idle: float, give_up: float) -> bool:
    """Wait until the launcher ends, or hangs; returns whether it hung and was ended.

    Args:
        pid, started: the process, and the time of its start as /proc says it: a pid may be given again.
        idle: seconds without a process of its own after which it hangs.
        give_up: seconds after which nothing more is done.
    """
    now = time.monotonic()
    until, busy = now + give_up, now
    while now < until and (status := _status(pid)) is not None and status[2] == started:
        if _has_children(pid):
            busy = now
        if now - busy >= idle:
            _tell(
                pid,
                f"error: the launcher (process {pid}) hung after its ranks had ended; it was killed\n",
            )
            os.kill(pid, signal.SIGKILL)
            return True
        time.sleep(_TICK)
        now = time.monotonic()
    return False


def _status(pid: int | str) -> tuple[str, str, str] | None:
    """A process's state, its parent and the time of its start; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (fields[0], fields[1], fields[19]) if fields[0] not in "ZX" else None


def _has_children(pid: int) -> bool:
    statuses: Iterator[tuple[str, str, str] | None] = (
        _status(name) for name in os.listdir("/proc") if name.isdecimal()
    )
    return any(status is not None and status[1] == str(pid) for status in statuses)


def _tell(pid: int, text: str) -> None:
    """Write to the launcher's own stderr: nobody reads that of its ranks any more."""
    with contextlib.suppress(OSError):
        # O_NONBLOCK: a pipe may be full
        file = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


if __name__ == "__main__":
    guard(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
