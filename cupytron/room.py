"""Whether there can be room for a model, asked before it is built.

A huge model is built for minutes, and then the system may kill the process without a word. memory.py
estimates all that a rank holds. Here it is a lower bound, from the number of parameters alone. So nothing
is refused that would run.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cupytron import backend, optim
from cupytron.comm import ParallelContext
from cupytron.config import ModelConfig, RunConfig
from cupytron.errors import CupytronError
from cupytron.memory import size
from cupytron.versions import host

_MOST_NAMED = 4  # memories that a message names


class Memory(NamedTuple):
    """What processes can hold that share it.

    key: the same for those that share it. name: for messages. bytes: infinity if not known.
    """

    key: str
    name: str
    bytes: float


def check_room(
    config: RunConfig, model: ModelConfig, context: ParallelContext, training: bool = True
) -> None:
    """Refuse a model that cannot fit, whatever the batch. Collective over the world.

    All that the ranks need is held against all that they have. So it does not matter how much of the model
    each rank gets, or how many ranks a machine has.

    Args:
        config: the run's settings. model: resolved. context: the mesh.
        training: otherwise weights alone.

    Raises:
        CupytronError: it names the model's sizes; the same on every rank.
    """
    world, needed = context.world, least_bytes(config, model, context.sizes, training)
    ranks = world.gather_objects(memories(context.device, world.rank))
    found = {memory.key: memory for held in ranks for memory in held}
    room = sum(memory.bytes for memory in found.values())
    if needed <= room:
        return
    parts = "weights, gradients and the optimizer's state" if training else "weights"
    on = f" on {world.size} ranks" if world.size > 1 else ""
    names = [memory.name for memory in found.values()]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    lower = "lower these sizes, or " if training else ""
    raise CupytronError(
        f"{_sizes(model)}: the {parts} of {model.num_parameters():,} parameters need at least "
        f"{size(needed)}{on}, and there are {size(room)} ({', '.join(names[:_MOST_NAMED])}{more}); {lower}"
        "spread the model over more machines by --tp, --pp or --zero 3"
    )


def least_bytes(
    config: RunConfig, model: ModelConfig, sizes: Mapping[str, int], training: bool = True
) -> float:
    """Bytes that all ranks together hold between steps, at least.

    They are those of memory.estimate, without padding, and without the second copies of what several
    stages or tensor ranks have.

    Args:
        config, model, training: as check_room's.
        sizes: of the mesh, by axis.
    """
    master, compute, reduce = (
        backend.named_dtype(name).itemsize
        for name in (config.train.dtype, config.compute_dtype, config.reduce_dtype)
    )
    zero, dp = config.parallel.zero, sizes["dp"]

    def copies(spread_from: int) -> int:
        """How often the replicas hold what ZeRO spreads over them from this stage on."""
        return 1 if zero >= spread_from else dp

    each = compute * copies(3)
    if training:
        # deterministic training keeps shares of gradients from stage 1 on
        each += reduce * copies(1 if config.train.deterministic else 2)
        each += master * copies(1) * len(optim.OPTIMIZERS[config.optim.name].STATE)
        if config.compute_dtype != config.train.dtype:
            each += master * copies(1)
    return float(each * model.num_parameters())


def memories(device: Any, rank: int) -> list[Memory]:
    """What this rank may fill: its machine's memory, and its GPU's.

    The machine's memory counts beside a GPU, too, since managed memory goes beyond the GPU into it. If only
    the GPU is too small, memory.explained tells so later, with what would fit.
    """
    if not device.gpu:
        return [of_host()]
    # a GPU that two ranks share counts twice, which refuses less
    return [Memory(f"GPU of rank {rank}", device.name, float(device.memory)), of_host()]


def of_host(root: Path = Path("/")) -> Memory:
    """This process's part of its machine's memory and swap: of a control group that limits it, or all.

    Args:
        root: of the file system.
    """
    unknown = Memory("unknown", f"memory of {host()}", math.inf)
    try:
        # the same in all containers of a machine, whatever their names
        machine = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
        lines = (root / "proc/meminfo").read_text().splitlines()
        amounts = dict(line.split(":", 1) for line in lines)
        total, swap = (1024.0 * int(amounts[k].split()[0]) for k in ("MemTotal", "SwapTotal"))
    except (OSError, KeyError, ValueError, IndexError):
        return unknown  # not Linux
    whole = Memory(machine, f"memory and swap of {host()}", total + swap)
    limits = [
        Memory(f"{machine} {place}", f"memory limit and swap of a cgroup on {host()}", most + swap)
        for place, most in _limits(root)
    ]
    return min([whole, *limits], key=lambda memory: memory.bytes)


def _limits(root: Path) -> Iterator[tuple[str, int]]:
    """The control groups that this process is in, each by its file's identity, with their bytes."""
    try:
        # a name may have any bytes
        groups = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for group in groups:
        kinds, _, path = group.partition(":")[2].partition(":")
        if not kinds:
            top, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in kinds.split(","):
            top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # in a container the path may be the host's, of which only the container's own top is seen
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            limit = top.joinpath(*parts[:depth], file)
            try:
                text, about = limit.read_text(), limit.stat()
            except OSError:
                continue
            if text.strip().isdecimal():  # else it is "max"
                yield f"{about.st_dev} {about.st_ino}", int(text)


def _sizes(model: ModelConfig) -> str:
    names = ["num_layers", "d_model", "d_ff", "vocab_size"]
    if model.position == "learned":
        names.append("context_length")
    return ", ".join(f"model.{name}={getattr(model, name)}" for name in names)
