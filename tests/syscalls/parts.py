"""Starts the processes that share a check's work, with the shim loaded, and gathers what they found."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
from syscalls import shim

ALL = os.environ.get("CUPYTRON_CALLS") == "all"  # the acceptance run asks for everything


def library(folder: Path) -> Path:
    """The compiled shim; skips the test where there is none."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim knows Linux's system calls only")
    found = shim.build(folder)
    if found is None:
        pytest.skip("there is no C compiler: install gcc or g++")
    return found


def run_parts(
    script: str,
    folder: Path,
    depth: str,
    *only: str,
    limit: int,
    planted: bool = False,
    workers: int = 2,
) -> list[dict[str, Any]]:
    """Run a script in several processes; returns the JSON object that each of them prints.

    Args:
        script: every_call or power_loss.
        folder: to work in.
        depth: the script's second argument.
        only: names of scenarios; none: all.
        limit: seconds that all of it may take.
        workers: processes.
        planted: also try the script's planted fault.
    """
    path = Path(__file__).with_name(f"{script}.py")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library(folder)),
        "OPENBLAS_NUM_THREADS": "1",
        "CUPYTRON_PLANTED": "yes" if planted else "",
    }
    processes = [
        runs.start(
            [
                sys.executable,
                str(path),
                str(folder / f"part-{part}"),
                depth,
                str(part),
                str(workers),
                *only,
            ],
            environment,
        )
        for part in range(workers)
    ]
    outputs = [process.communicate(timeout=limit)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def lines(found: list[dict[str, Any]], key: str = "wrong") -> list[str]:
    """The lines about everything wrong: of the project, or with a planted fault ("planted")."""
    return [line for part in found for line in part[key]]


def shown(wrong: list[str]) -> str:
    """A message for a test that fails."""
    return "\n".join([f"{len(wrong)} faults", *wrong[:40]])
