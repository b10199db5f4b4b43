"""What a run of several ranks needs besides training: one data set for all, lines about the mesh."""

import os
from collections.abc import Iterator
from pathlib import Path

from cupytron.comm import Communicator, ParallelContext, SelfCommunicator
from cupytron.config import RunConfig
from cupytron.data import DataError, Dataset, open_dataset
from cupytron.errors import ConfigError

_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "prte", "srun", "hydra")


def open_data(path: str | Path, world: Communicator | None = None) -> Dataset:
    """Open a data set that the settings name; rank 0 compares it with its hashes. Collective."""
    world = world or SelfCommunicator()
    try:
        dataset = open_dataset(path, verify=world.rank == 0)
    except DataError as error:
        raise DataError(f"{error} (if it stands elsewhere now, give --data DIR)") from None
    hashes = (dataset.train.sha256, dataset.val.sha256, dataset.tokenizer_hash)
    for rank, other in enumerate(world.gather_objects(hashes)):
        if other != hashes:
            raise DataError(
                f"{path}: rank {rank} finds another data set there than rank {world.rank}; put it on "
                "a file system that all ranks share"
            )
    return dataset


def absolute(path: Path) -> str:
    """A path as settings keep it."""
    found = str(path.resolve())
    if not found.isprintable():
        raise ConfigError(f"data.path={found!r}: has characters that no settings file can hold")
    return found


def describe(config: RunConfig, context: ParallelContext) -> Iterator[str]:
    """Lines about a job of several ranks: its mesh, and how to stop it."""
    size, sizes, parallel = context.world.size, context.sizes, config.parallel
    if size == 1:
        return
    sp = ", sequence parallel" if parallel.sp and sizes["tp"] > 1 else ""
    yield f"{size} ranks: tp={sizes['tp']} x dp={sizes['dp']}, ZeRO {parallel.zero}{sp}"
    ctrl_c = ""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        # it kills its ranks half a second after Ctrl-C: too soon for a save
        ctrl_c = "; under Open MPI Ctrl-C loses the steps since the last save"
    yield f"to save and stop: kill -USR1 {launcher_pid() or 'PID of mpirun'}{ctrl_c}"


def launcher_pid() -> int | None:
    """The launcher's process, where it is an ancestor of this one."""
    pid, found = os.getppid(), None
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        name, rest = stat.rpartition(")")[0].partition("(")[2], stat.rpartition(")")[2].split()
        if name.startswith(_LAUNCHERS):
            found = pid  # the outermost: a node's helper process hears of no signal
        pid = int(rest[1])
    return found
