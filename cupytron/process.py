"""Prepare this process for NumPy, before NumPy is imported: BLAS kernel, threads, malloc.

Imports the standard library only. See docs/decisions/0003-process.md for what each choice brings.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cupytron import blas_kernels, progress
from cupytron.durable import replacing
from cupytron.errors import ConfigError
from cupytron.launcher import local_ranks

# Measured in a child process: the time of a few float32 products, the best of several.
_MEASURE = """
import time, numpy as np
a = np.ones((384, 384), np.float32)
best = 1e9
for _ in range(12):
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    best = min(best, time.perf_counter() - start)
print(best)
"""
# -P: modules that lie in the working directory, which may be a stranger's, are not imported
CHILD = [sys.executable, "-P", "-c"]
OWN_CHOICE = "OpenBLAS's own choice"
_prepared_for: list[str] = []  # the wish for a kernel that was followed, once NumPy may be imported
_WIN = 0.9  # another kernel must beat OpenBLAS's own choice by this much


def prepare(
    threads: int | None = None,
    blas_kernel: str = "auto",
    malloc: bool = True,
    deterministic: bool = False,
) -> dict[str, Any]:
    """Set up the process and say what was done; call it before NumPy is imported.

    If NumPy is imported already, its OpenBLAS has chosen a kernel, and the record says so.

    Args:
        threads: of this process; None: what OPENBLAS_NUM_THREADS or OMP_NUM_THREADS says, else the
            cores of its affinity mask, shared with the other ranks on this node.
        blas_kernel: "auto", "off" or an OpenBLAS kernel's name.
        malloc: keep freed pages (glibc only).
        deterministic: one thread.

    Returns: a record of the environment, kept with the run.

    Raises:
        ConfigError: this processor cannot run the kernel of that name.
    """
    early = "numpy" not in sys.modules
    there = blas_kernels.flags()
    if early and (lacks := blas_kernels.missing(blas_kernel, there)):
        raise ConfigError(
            f"parallel.blas_kernel={blas_kernel}: this processor lacks {', '.join(lacks)}, and would end "
            f"the process by SIGILL; give auto, or one of {', '.join(blas_kernels.fitting(there))}"
        )
    cores = available_cores()
    count = 1 if deterministic else threads or _threads_asked_for() or _share_of_cores()
    found = os.environ.get("OPENBLAS_CORETYPE")
    kernel = _choose_kernel(blas_kernel) if early else None
    if kernel:
        os.environ["OPENBLAS_CORETYPE"] = kernel
    if early:
        _prepared_for[:] = [blas_kernel]
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = str(count)
    else:
        count = _limit_blas(count)
    kept = malloc and keep_freed_pages()
    return {
        "threads": count,
        "cores": cores,
        "ranks_on_node": local_ranks(),
        "blas_kernel": kernel or found or OWN_CHOICE,
        "blas_kernel_found": found,
        "blas_kernel_too_late": None if early else _too_late(blas_kernel, found),
        "malloc": "keeps freed pages" if kept else "as found",
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "cupytron": metadata.version("cupytron"),
        "platform": platform.platform(),
    }


def describe(record: dict[str, Any]) -> str:
    """The line that is printed at start."""
    kernel, found = record["blas_kernel"], record["blas_kernel_found"]
    loaded = record.get("blas_loaded", kernel)
    note = ""
    if found and found != kernel:
        # never silently against what somebody may have set on purpose
        note = f" (the environment said {found}; --blas-kernel off keeps that)"
    elif late := record.get("blas_kernel_too_late"):
        note = f" (NumPy was imported first, so parallel.blas_kernel={late} could not be applied)"
    elif loaded.lower() != kernel.lower() and kernel != OWN_CHOICE:
        note = f" ({kernel} was asked for, and is not in this OpenBLAS)"
    threads, ranks = record["threads"], record.get("ranks_on_node", 1)
    used = f"{threads} of {record['cores']} cores"
    if ranks > 1:
        used = f"{ranks} ranks on this node, {threads} thread{'s' * (threads > 1)} each"
    return (
        f"{record['processor']}, {used}; "
        f"OpenBLAS kernel {loaded}{note}; malloc {record['malloc']}; numpy {record['numpy']}"
    )


def _too_late(wish: str, found: str | None) -> str | None:
    """The wish for a kernel, if NumPy was imported before it could be followed."""
    followed = wish == "off" or wish in _prepared_for or (wish != "auto" and wish == found)
    # where `auto` would not look for another kernel, nothing is missed
    return None if followed or (wish == "auto" and not _has_avx512()) else wish


def note_loaded_blas(record: dict[str, Any]) -> None:
    """Add to the record which kernel is at work, once NumPy is there."""
    import numpy  # noqa: F401  threadpoolctl sees loaded libraries only
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "blas":
            record["blas_loaded"] = library.get("architecture", library["internal_api"])


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records and may change the last bits of results."""
    keys = (
        "threads",
        "blas_kernel",
        "processor",
        "numpy",
        "cupytron",
        "gpu",
        "cupy",
        "cuda_driver",
        "cuda_runtime",
        "kernels",
        "cudnn_refused",
    )
    return [
        f"{k}: {before.get(k)} before, {now.get(k)} now"
        for k in keys
        if before.get(k) != now.get(k)
    ]


def _threads_asked_for() -> int | None:
    """What OPENBLAS_NUM_THREADS or OMP_NUM_THREADS says: somebody may share this machine."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return None


def share_cores() -> None:
    """Give BLAS this rank's part of the node's cores, if nobody has said anything about its threads."""
    if _threads_asked_for() is None:
        _limit_blas(_share_of_cores())


def _share_of_cores() -> int:
    """This rank's part of the node's cores: what the launcher bound it to, else an equal part."""
    own, ranks = available_cores(), local_ranks()
    if ranks > 1 and hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            launcher = len(os.sched_getaffinity(os.getppid()))
            if own < launcher and own * ranks <= launcher:
                return own
    return max(1, own // ranks)


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _limit_blas(count: int) -> int:
    """Set the threads of a BLAS that is loaded already; returns how many it took."""
    from threadpoolctl import threadpool_info, threadpool_limits

    threadpool_limits(count, user_api="blas")
    return max(
        (p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"), default=count
    )


def _has_avx512() -> bool:
    there = blas_kernels.flags()
    return bool(there) and not blas_kernels.missing("SkylakeX", there)


def _choose_kernel(wish: str) -> str | None:
    """The OpenBLAS kernel to ask for; None leaves the choice to OpenBLAS."""
    if wish == "off":
        return None
    if wish != "auto":
        return wish
    # OpenBLAS knows many AVX-512 processors as something older and gives away half of their speed
    if not _has_avx512():
        return None
    cache = _cache_file()
    measured = (processor(), metadata.version("numpy"), os.environ.get("OPENBLAS_CORETYPE"))
    key = hashlib.sha256(repr(measured).encode()).hexdigest()[:16]
    if key not in _read(cache):
        # ranks that start together: one measures, with the cores for itself, and all choose alike
        with _locked(cache.with_suffix(".lock")):
            known = _read(cache)
            if key not in known:
                own, wide = _seconds(None), _seconds("SkylakeX")
                if own is None or wide is None:
                    return None
                known[key] = "SkylakeX" if wide < own * _WIN else ""
                _write(cache, known)
            return known[key] or None
    return _read(cache).get(key) or None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system can do that."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            with progress.waiting(f"the lock of {path}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _seconds(kernel: str | None) -> float | None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    if kernel:
        environment["OPENBLAS_CORETYPE"] = kernel
    try:
        with progress.patiently("measuring a BLAS kernel"):
            done = subprocess.run(
                [*CHILD, _MEASURE],
                env=environment,
                capture_output=True,
                timeout=20,
                check=True,
            )
        return float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "cupytron" / "blas-kernel.json"


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    valid = isinstance(known, dict) and all(v in ("", "SkylakeX") for v in known.values())
    return known if valid else {}


def _write(path: Path, known: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # several ranks may write at once
        with replacing(path) as file:
            file.write(json.dumps(known).encode())
    except OSError:
        pass  # the measurement will be made again


def keep_freed_pages() -> bool:
    """Tell glibc's malloc to keep freed memory: a step frees and takes the same arrays again."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    done = mallopt(mmap_max, 0)
    done &= mallopt(trim_threshold, 2**31 - 1)
    done &= mallopt(top_pad, 64 << 20)
    return bool(done)
