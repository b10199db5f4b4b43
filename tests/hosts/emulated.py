"""Several hosts on one machine: namespaces, each with its own name, network, processes and mounts.

All of them lie inside the namespaces of one more host, from which jobs are started. When the first process
of that one ends, the kernel ends every process inside and takes away the bridge, the mounts and the names.
It ends with this process, too, so a test that is killed leaves nothing behind.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

_INIT = Path(__file__).with_name("init.py")
_NEW = ["unshare", "--uts", "--ipc", "--net", "--mount", "--pid", "--fork", "--kill-child"]
_WITH_US = ["setpriv", "--pdeathsig", "KILL"]  # ends where this process ends, however that is
NETWORK = "10.77.0"
BRIDGE = "br0"

# a stand-in for ssh: as there, the other side gets none of the caller's environment
_RSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
exec nsenter -a -t "$(cat {folder}/$host.pid)" env -i PATH=/usr/bin:/bin HOME="$HOME" TMPDIR=/run \\
    sh -c "cd '$PWD' && $*"
"""

# what every host does first, in its own namespaces
_BEGIN = """set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/{name}.boot /proc/sys/kernel/random/boot_id
hostname {name}
ip link set lo up
{more}
exec {python} {init} {folder}/{name}.ready
"""


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be emulated here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are emulated on Linux, by root"
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install util-linux iproute2"
    probe = (
        "mount --make-rprivate / && ip link add br0 type bridge && ip link add a0 type veth peer name a1"
        " && mount -t tmpfs tmpfs /dev/shm"
        " && mount --bind /etc/hostname /proc/sys/kernel/random/boot_id"
    )
    done = subprocess.run([*_NEW, "sh", "-c", probe], capture_output=True, text=True, timeout=30)
    if done.returncode:
        return f"no namespaces, bridge or mounts here: {done.stderr.strip().splitlines()[-1:]}"
    return None


class Host:
    """One host: commands can be run on it.

    Attributes:
        name: its host name.
        address: in the network of all hosts.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        self.pid = 0  # of its first process, as this process sees it
        self._starter: subprocess.Popen[bytes] | None = None

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """The command as it is started from outside."""
        return ["nsenter", "-a", "-t", str(self.pid), f"--wd={os.getcwd()}", *map(str, command)]

    def run(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(
            self.inside(command), env=env, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} on {self.name}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def shell(self, line: str) -> str:
        """Run a line of sh; its output."""
        return self.run(["sh", "-c", line]).stdout

    def start(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command; both of its outputs come from `stdout`."""
        return subprocess.Popen(
            self.inside(command),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _begin(self, prefix: Sequence[str], more: str) -> None:
        (self._folder / f"{self.name}.boot").write_text(f"{uuid.uuid4()}\n")
        script = _BEGIN.format(
            folder=self._folder, name=self.name, more=more, python=sys.executable, init=_INIT
        )
        log = (self._folder / f"{self.name}.log").open("wb")
        self._starter = subprocess.Popen(
            [*prefix, *_NEW, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        ready = self._folder / f"{self.name}.ready"
        until = time.monotonic() + 20
        while not ready.exists():
            if self._starter.poll() is not None or time.monotonic() > until:
                raise AssertionError(
                    f"{self.name}: {(self._folder / f'{self.name}.log').read_text()}"
                )
            time.sleep(0.01)
        self.pid = _last_child(self._starter.pid)

    def die(self) -> None:
        """End the host as a power cut would: every process on it is gone at once."""
        if self._starter is None:
            return
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        else:
            self._starter.kill()
        self._starter.wait(20)
        self._starter = None


class Hosts:
    """A control host and `count` hosts in one network; a context manager.

    Attributes:
        control: the host from which jobs are started.
        hosts: the others, on which they run.
        rsh: a stand-in for ssh, for use on the control host.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # names that no other test uses: some programs name files in /tmp by them
        own = f"t{os.getpid()}-{uuid.uuid4().hex[:4]}n"
        self.control = Host(f"{own}0", f"{NETWORK}.254", folder)
        self.hosts = [Host(f"{own}{i}", f"{NETWORK}.{i}", folder) for i in range(1, count + 1)]
        self.rsh = folder / "rsh.sh"

    def __enter__(self) -> "Hosts":
        lines = [f"{host.address} {host.name}\n" for host in [self.control, *self.hosts]]
        (self._folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        self.rsh.write_text(_RSH.format(folder=self._folder))
        self.rsh.chmod(0o755)
        try:
            self.control._begin(
                _WITH_US,
                f"ip link add {BRIDGE} type bridge\n"
                f"ip addr add {self.control.address}/24 dev {BRIDGE}\n"
                f"ip link set {BRIDGE} up",
            )
            for number, host in enumerate(self.hosts, start=1):
                self._add(number, host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, number: int, host: Host) -> None:
        host._begin(["nsenter", "-a", "-t", str(self.control.pid)], "")
        # the stand-in for ssh runs on the control host, which has other numbers for processes
        status = Path(f"/proc/{host.pid}/status").read_text()
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
        seen = numbers[-2]
        (self._folder / f"{host.name}.pid").write_text(seen)
        self.control.shell(
            f"ip link add v{number} type veth peer name eth0 netns {seen}\n"
            f"ip link set v{number} master {BRIDGE} up"
        )
        host.shell(f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up")

    def link(self, host: Host, state: str) -> None:
        """Set a host's link "up" or "down"."""
        number = self.hosts.index(host) + 1
        self.control.shell(f"ip link set v{number} {state}")

    def __exit__(self, *_: object) -> None:
        for host in [self.control, *self.hosts]:
            host.die()


def _last_child(pid: int) -> int:
    """The process at the end of a line of only children."""
    while below := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(below[0])
    return pid
