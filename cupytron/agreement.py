"""Ranks compare their views of a run's checkpoints, before they use one of them together.

A network file system may show old lists of names for seconds. So ranks that see different things look again
for a while. If they still differ, all of them refuse with one error, which names the rank.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cupytron.comm import Communicator
from cupytron.errors import (
    CheckpointError,
    DamagedCheckpoint,
    GoneCheckpoint,
    UnreadableCheckpoint,
)
from cupytron.together import together
from cupytron.versions import host

# seconds between two looks while the ranks see different things; a network file system shows a change late
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)
_SHARE = "put the run's folder on a file system that all ranks share"


class View(NamedTuple):
    """The view of one rank.

    Attributes:
        host: the name of its machine.
        what: the value that its `look` returned.
    """

    host: str
    what: Any


def agree(
    world: Communicator,
    look: Callable[[], Any],
    differ: Callable[[Sequence[View]], CheckpointError | None],
) -> list[View]:
    """Let every rank look until the ranks' views agree. Collective.

    Args:
        world: the ranks.
        look: returns what this rank sees; it is called again while the views differ.
        differ: returns the error that says how the views differ; None if they agree.

    Returns: each rank's view, in the order of the ranks.

    Raises:
        CheckpointError: they do not agree after some seconds; the same on every rank.
        OSError: a rank cannot look; the same on every rank.
    """
    for pause in (*PAUSES, None):
        seen = together(world, look)
        views = [View(*view) for view in world.gather_objects((host(), seen))]
        error = differ(views)
        if error is None:
            return views
        if pause is None:
            raise error
        time.sleep(pause)
    raise AssertionError


def check_shared(folder: Path, world: Communicator) -> None:
    """Refuse a folder in which rank 0 cannot write, or whose files another rank does not see. Collective.

    Without this check, the first save would fail, and all steps before it would be lost.

    Raises:
        CheckpointError: a rank does not see a file that rank 0 has just written there; the same on every
            rank.
        OSError: rank 0 cannot write there; the same on every rank.
    """
    name = f".tmp-seen-by-all-{secrets.token_hex(4)}"
    probe = folder / world.gather_objects(name)[0]

    def differ(views: Sequence[View]) -> CheckpointError | None:
        sees = [there for _, there in views]
        if all(sees):
            return None
        rank = sees.index(False)
        return CheckpointError(
            f"rank {rank} ({views[rank].host}) does not see what rank 0 ({views[0].host}) writes to "
            f"{folder}; {_SHARE}"
        )

    try:
        together(world, lambda: probe.touch(exist_ok=False) if world.rank == 0 else None)
        agree(world, probe.exists, differ)
    finally:
        if world.rank == 0:
            with contextlib.suppress(OSError):
                probe.unlink()


def lists_differ(run: Path, views: Sequence[View]) -> CheckpointError | None:
    """How the ranks' lists of steps differ; None if all see the same newest one, or all see none.

    Older steps are not compared: a rank may still see one that has just been removed.
    """
    newest = max((steps[-1] for _, steps in views if steps), default=None)
    sees = [newest in steps for _, steps in views]
    if newest is None or all(sees):
        return None
    rank, seer = sees.index(False), sees.index(True)
    machine, steps = views[rank]
    what = f"its newest there is step {steps[-1]}" if steps else "it sees no checkpoint there"
    return CheckpointError(
        f"rank {rank} ({machine}) does not see step-{newest:08d} of {run}, which rank {seer} sees: {what}; "
        f"{_SHARE}"
    )


def manifests_differ(place: Path, views: Sequence[View]) -> CheckpointError | None:
    """How the ranks' views of one checkpoint differ; None if all see the same one, or none can use it.

    Each view is (None, the manifest's SHA-256), or (a kind of CheckpointError, its text).
    """
    kinds = [kind for _, (kind, _) in views]
    if UnreadableCheckpoint in kinds:
        return None  # reading it has been tried again already
    if GoneCheckpoint in kinds and set(kinds) != {GoneCheckpoint}:
        rank = kinds.index(GoneCheckpoint)
        seer = next(i for i, kind in enumerate(kinds) if kind is not GoneCheckpoint)
        return CheckpointError(
            f"rank {rank} ({views[rank].host}) does not see {place}, which rank {seer} sees; {_SHARE}"
        )
    if DamagedCheckpoint in kinds and None in kinds:
        rank = kinds.index(DamagedCheckpoint)
        return DamagedCheckpoint(f"rank {rank} ({views[rank].host}): {views[rank].what[1]}")
    _, first = views[0].what
    for rank, (machine, (kind, sha256)) in enumerate(views):
        if kind is None and sha256 != first:
            return CheckpointError(
                f"rank {rank} ({machine}) sees another checkpoint in {place} than rank 0 (manifest "
                f"{sha256[:12]} there, {first[:12]} on rank 0); {_SHARE}"
            )
    return None
