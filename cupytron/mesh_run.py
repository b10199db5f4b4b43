"""What a run of several ranks needs besides training: one data set for all, lines about the mesh."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cupytron.comm import Communicator, ParallelContext, SelfCommunicator
from cupytron.config import RunConfig
from cupytron.data import DataError, Dataset, open_dataset
from cupytron.errors import ConfigError
from cupytron.launcher import launched_tasks
from cupytron.watchdog import Watchdog

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


def check_alike(world: Communicator, **values: Any) -> None:
    """Refuse ranks that were told different things: they would train different models, or wait for ever.

    Args:
        values: what all ranks should have; a RunConfig is compared key by key.

    Raises:
        ConfigError: the same on every rank, naming the first rank that differs and what it has.
    """
    said = world.gather_objects(dict(_flat(values)))
    for rank, other in enumerate(said):
        lines = [f"{key}: {other.get(key)} there, {said[0].get(key)} on rank 0" for key in said[0]
                 if other.get(key) != said[0].get(key)]  # fmt: skip
        if lines:
            raise ConfigError(
                f"rank {rank} was started with other settings than rank 0: {'; '.join(lines)}; start all "
                "ranks with one command and the same files"
            )


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, RunConfig):
            for section, settings in value.model_dump(mode="json").items():
                yield from ((f"{section}.{k}", v) for k, v in settings.items())
        else:
            yield key, value


@contextlib.contextmanager
def watched(world: Communicator, timeout: float) -> Iterator[Callable[[int, str], None]]:
    """A watchdog while this lasts, for several processes; gives the function that notes progress."""
    several = world.size > 1 and launched_tasks() > 1
    with Watchdog(timeout if several else 0, world.rank, lambda: world.operation or "") as watchdog:
        yield watchdog.note


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
    if launched_tasks() == 1:
        return  # threads
    ctrl_c = ""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        # it kills its ranks half a second after Ctrl-C: too soon for most saves
        ctrl_c = "; under Open MPI Ctrl-C and SIGTERM may lose the steps since the last save"
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
