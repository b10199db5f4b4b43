"""What a run of several ranks needs besides training: one data set for all, lines about the mesh."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from cupytron import progress, watchdog
from cupytron.backend import CPU, Device
from cupytron.comm import Communicator, ParallelContext, SelfCommunicator
from cupytron.config import RunConfig
from cupytron.data import DataError, Dataset, open_dataset
from cupytron.errors import ConfigError, CupytronError
from cupytron.gpu import INSTALL, idle, open_device
from cupytron.kernels import candidates
from cupytron.launch_advice import lone_process_in_allocation
from cupytron.launcher import ancestors, how_to_stop, launched_tasks, named, under_open_mpi
from cupytron.manifest import identity_of
from cupytron.parallel import checker, schedules
from cupytron.together import alike
from cupytron.versions import host

LARGEST_HEAD = 256  # features, of kernels/attention.cu and of cuDNN
MOST_SHOWN = 16  # ranks whose GPU is named at the start


def open_data(path: str | Path, world: Communicator | None = None) -> Dataset:
    """Open a data set that the settings name. Collective.

    On each machine, one rank for each copy of it compares this copy with its hashes.

    Raises:
        DataError: it is missing or damaged, or the ranks see different ones; the same on every rank.
    """
    world = world or SelfCommunicator()
    progress.phase("opening the data set")
    hashes_it = alike(world, (host(), _copy(Path(path))))[0] == world.rank
    opened: Dataset | None = None
    try:
        opened, told = open_dataset(path, verify=hashes_it), None
    except DataError as error:
        moved = "" if Path(path).is_file() else " (if it stands elsewhere now, give --data DIR)"
        told = f"{error}{moved}"
    except OSError as error:
        told = (
            f"{error.filename or path}: {error.strerror or error} "
            "(if it stands elsewhere now, give --data DIR)"
        )
    for rank, problem in enumerate(world.gather_objects(told and (host(), told))):
        if problem is not None:
            where = f"rank {rank} on {problem[0]}: " if world.size > 1 else ""
            raise DataError(f"{where}{problem[1]}")
    assert opened is not None
    hashes = (opened.train.sha256, opened.val.sha256, opened.tokenizer_hash)
    said = world.gather_objects((host(), hashes))
    for rank, (machine, other) in enumerate(said):
        if other != said[0][1]:
            raise DataError(
                f"{path}: rank {rank} on {machine} finds another data set there than rank 0; put it on "
                "a file system that all ranks share"
            )
    return opened


def _copy(folder: Path) -> list[tuple[int, int, int] | None]:
    """Inode, time of change and size of the data set's files, which are the same on ranks with one copy."""
    found: list[tuple[int, int, int] | None] = []
    for name in ("train.bin", "val.bin"):
        try:
            found.append(identity_of((folder / name).stat()))
        except OSError:
            found.append(None)
    return found


def check_arithmetic(world: Communicator, environment: Mapping[str, Any], exact: bool) -> list[str]:
    """Compare the ranks' OpenBLAS kernels, which decide the last bits of products. Collective.

    Args:
        world: all ranks.
        environment: process.prepare's record, with the BLAS that was loaded.
        exact: whether the run promises the same bits on any mesh (train.deterministic).

    Returns: warnings.

    Raises:
        ConfigError: kernels differ, and the same bits are promised; the same on every rank.
    """
    kernel = environment.get("blas_loaded", environment["blas_kernel"])
    said = world.gather_objects((host(), kernel))
    for rank, (machine, other) in enumerate(said):
        if other != said[0][1]:
            text = (
                f"rank {rank} on {machine} has the OpenBLAS kernel {other}, rank 0 {said[0][1]}: "
                "products differ in their last bits"
            )
            if exact:
                raise ConfigError(
                    f"train.deterministic: {text}; give a kernel that every processor has, such as "
                    "--blas-kernel Haswell"
                )
            return [text]
    return []


def check_alike(world: Communicator, free: Collection[str] = (), **values: Any) -> None:
    """Refuse ranks that were told different things: they would train different models, or wait for ever.

    Args:
        free: settings, such as "parallel.threads", in which ranks may differ.
        values: what all ranks should have; a RunConfig is compared key by key.

    Raises:
        ConfigError: the same on every rank, naming the first rank that differs and what it has.
    """
    mine = {key: value for key, value in _flat(values) if key not in free}
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).digest()
    if len(set(world.gather_objects(digest))) == 1:
        return
    # a difference is rare: only then everything goes to every rank, which grows with their square
    (_, wanted), *others = world.gather_objects((named(world.rank), mine))
    for name, other in others:
        different = [key for key in wanted if other.get(key) != wanted[key]]
        lines = [f"{key}: {other.get(key)} there, {wanted[key]} on rank 0" for key in different]
        if lines:
            raise ConfigError(
                f"{name} was started with other settings than rank 0: {'; '.join(lines)}; start all "
                "ranks with one command and the same files"
            )


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, RunConfig):
            for section, settings in value.model_dump(mode="json").items():
                yield from ((f"{section}.{k}", v) for k, v in settings.items())
        else:
            yield key, value


def open_mesh(config: RunConfig, world: Communicator | None = None) -> ParallelContext:
    """The mesh that the settings say, each rank on its device. Collective over `world`.

    Raises:
        CupytronError: the mesh does not fit the ranks, or a device that was asked for cannot be used.
    """
    parallel, world = config.parallel, world or SelfCommunicator()
    progress.phase("opening the device and the mesh")
    device = open_device(parallel.device, config)
    if device.gpu:
        check_gpu(config)
    ranks = world.gather_objects((named(world.rank), device.name))
    places = [name for _, name in ranks]
    with_gpu = [place != CPU.name for place in places]
    if any(with_gpu) and not all(with_gpu):
        raise CupytronError(
            f"--device {parallel.device}: {ranks[with_gpu.index(True)][0]} has a GPU and "
            f"{ranks[with_gpu.index(False)][0]} none; give --device cpu, or "
            "start ranks where there are GPUs"
        )
    if device.gpu:
        device.places = places
        from cupytron.comm.choice import choose

        world, device.transport = choose(world, parallel.comm, device)
    context = ParallelContext(
        tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, world=world, device=device
    )
    progress.follow(context)
    if device.gpu:
        context.connect()
    context.tuner = candidates.start(config, context.world, device)
    return context


def check_gpu(config: RunConfig, training: bool = True) -> None:
    """Refuse what a CPU can do, and the kernels of a GPU cannot.

    Raises:
        ConfigError: a line for everything.
    """
    dtype, compute, reduce = config.train.dtype, config.compute_dtype, config.reduce_dtype
    wide = "float64" if compute == "float64" else "float32"
    lines = []
    if training and (dtype, reduce) != (wide, wide):
        lines.append(
            f"train.compute_dtype={compute}: on a GPU train.dtype={dtype} and train.reduce_dtype={reduce} "
            f"have to be {wide} with it; set them, or use --device cpu"
        )
    if config.model.head_size > LARGEST_HEAD:
        lines.append(
            f"model.num_heads={config.model.num_heads}: a head of {config.model.head_size} features is "
            f"larger than the {LARGEST_HEAD} that kernels take; use more heads, or --device cpu"
        )
    if lines:
        raise ConfigError("\n".join(lines))


def watched(world: Communicator, timeout: float) -> AbstractContextManager[None]:
    """A context in which a watchdog watches this rank, if it is one process of several. Collective.

    Args:
        world: all ranks.
        timeout: seconds without progress; 0: never.
    """
    if launched_tasks() == 1 or world.size == 1:
        return nullcontext()
    return watchdog.watching(timeout, world)


def absolute(path: Path) -> str:
    """A path as settings keep it."""
    found = str(path.resolve())
    if not found.isprintable():
        raise ConfigError(f"data.path={found!r}: has characters that no settings file can hold")
    return found


def _pipeline(config: RunConfig, dp: int) -> str:
    """The pipeline's schedule, and how much of it is idle if all stages take the same time."""
    parallel = config.parallel
    if parallel.pp == 1:
        return ""
    here = config.micro_batches // dp
    schedule = schedules.make(parallel.schedule, parallel.pp, here, parallel.chunks)
    bubble = checker.predict(schedule).bubble
    return f", {parallel.schedule} of {here} micro-batches (bubble {bubble:.0%})"


def describe(config: RunConfig, context: ParallelContext) -> Iterator[str]:
    """Lines about GPUs; about a job of several ranks: its mesh, and how to stop it."""
    size, sizes, parallel = context.world.size, context.sizes, config.parallel
    if context.device.gpu:
        yield from _describe_gpu(config, context.device, size)
    elif idle(parallel.device):
        yield f"warning: there is a GPU, but no CuPy, so a CPU is used; {INSTALL}"
    if launched_tasks() == 1 and (advice := lone_process_in_allocation()):
        yield f"warning: {advice}"
    if size == 1:
        return
    sp = ", sequence parallel" if parallel.sp and sizes["tp"] > 1 else ""
    mesh = f"tp={sizes['tp']} x pp={sizes['pp']} x dp={sizes['dp']}, ZeRO {parallel.zero}{sp}"
    yield f"{size} ranks: {mesh}{_pipeline(config, sizes['dp'])}"
    if launched_tasks() == 1:
        return  # threads
    ctrl_c = ""
    if under_open_mpi():
        # it kills its ranks half a second after Ctrl-C: too soon for most saves
        ctrl_c = "; under Open MPI Ctrl-C and SIGTERM may lose the steps since the last save"
    yield f"to save and stop: {how_to_stop(os.environ, list(ancestors()), host())}{ctrl_c}"


def _describe_gpu(config: RunConfig, device: Device, ranks: int) -> Iterator[str]:
    """Which rank has which GPU, what it computes in, and how arrays travel."""
    precision = config.compute_dtype
    if precision == "float32" and config.train.tf32:
        precision = "float32 with TF32 products"
    yield f"{device.name}, computing in {precision}, weights in {config.train.dtype}"
    if ranks > 1:
        shown = [f"rank {i} {name.split()[0]}" for i, name in enumerate(device.places[:MOST_SHOWN])]
        more = f", and {ranks - MOST_SHOWN} more" if ranks > MOST_SHOWN else ""
        yield f"GPUs by local rank: {', '.join(shown)}{more}; {device.transport}"
