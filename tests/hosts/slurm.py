"""Slurm on emulated hosts: munged and slurmctld on the control host, slurmd on each of the others.

All of it lives inside the hosts' namespaces, and ends with them.
"""

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import emulated
from emulated import Hosts

NEEDS = ("slurmctld", "slurmd", "munged", "srun")

_CONF = """ClusterName=emulated
SlurmctldHost={control}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=20
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@functools.cache
def why_not() -> str | None:
    """Why Slurm cannot be started here; None if it can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [tool for tool in NEEDS if shutil.which(tool, path=path) is None]
    if missing:
        return (
            f"Slurm is not installed ({', '.join(missing)}): apt-get install --no-install-recommends "
            "slurmctld slurmd slurm-client munge"
        )
    return emulated.why_not()


class Slurm(Hosts):
    """A cluster of `count` emulated hosts with `cores` each, under Slurm; a context manager.

    Attributes:
        env: the environment for Slurm's commands on the control host.
    """

    def __init__(self, folder: Path, count: int, cores: int = 2) -> None:
        super().__init__(folder, count)
        self._cores = cores
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("MPI4PY_", "SLURM_"))}
        self.env = {**keep, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        super().__enter__()
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configure(self) -> None:
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={self._cores} State=UNKNOWN"
            for host in self.hosts
        )
        text = _CONF.format(
            control=self.control.name,
            address=self.control.address,
            folder=self._folder,
            nodes=nodes,
        )
        (self._folder / "slurm.conf").write_text(text)
        # each host's own /run
        (self._folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/run\n")
        for name in ("state", "spool", *(f"spool/{host.name}" for host in self.hosts)):
            (self._folder / name).mkdir(parents=True)

    def _start(self) -> None:
        # one munged serves all hosts: they see its socket. --force: the folder is below a user's own
        munge = self._folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(os.urandom(64))
        (munge / "key").chmod(0o600)
        options = {f"{name}-file": munge / name for name in ("key", "pid", "seed", "log")}
        options["socket"] = munge / "socket"
        self.control.run(
            ["munged", "--force", *(f"--{name}={path}" for name, path in options.items())]
        )
        self.control.run(["slurmctld"], env=self.env)
        for host in self.hosts:
            host.run(["slurmd", "-N", host.name], env=self.env)
        end = time.monotonic() + 60
        while (states := self.call("sinfo", "-h", "-N", "-o", "%t").split()) != ["idle"] * len(
            self.hosts
        ):
            if time.monotonic() > end:
                raise AssertionError(f"nodes are {states}: see {self._folder}")
            time.sleep(0.2)

    def run_job(
        self, *words: str | Path, env: Mapping[str, str] | None = None, timeout: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's on the control host to its end, whatever its exit code."""
        return self.control.run(words, {**self.env, **(env or {})}, timeout, check=False)

    def call(self, *words: str | Path, **options: Any) -> str:
        """The output of a command of Slurm's that has to succeed."""
        done = self.run_job(*words, **options)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, script: Path, *words: str | Path, options: Sequence[str] = (), **more: Any
    ) -> str:
        """Hand a script to sbatch; the job's number."""
        return self.call("sbatch", "--parsable", *options, script, *words, **more).strip()

    def state(self, job: str) -> str:
        """A job's state, such as PENDING."""
        said = self.call("scontrol", "show", "job", job)
        return said.split("JobState=")[1].split()[0]

    def wait(self, job: str, states: Sequence[str], seconds: float = 90) -> str:
        """Wait until a job is in one of these states."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state}, not {states}"
            time.sleep(0.2)
        return state
