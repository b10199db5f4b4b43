"""Lists a run's checkpoints, and chooses one of them. All ranks use the same one.

Each rank lists and opens files for itself, and may see other files than the other ranks. A network file
system may show old lists of names for seconds, and a path on a node's own disk is another folder on each
node. So the ranks compare which steps they see, and which manifest the chosen step has, before they use it.

A run that trains at the same time removes old checkpoints and replaces others. So `reading` chooses again
if the checkpoint is removed while it is read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cupytron import checkpoint, sealed
from cupytron.agreement import View, agree, lists_differ, manifests_differ
from cupytron.checkpoint import Checkpoint
from cupytron.comm import Communicator, SelfCommunicator
from cupytron.errors import (
    CheckpointError,
    DamagedCheckpoint,
    GoneCheckpoint,
    UnreadableCheckpoint,
)
from cupytron.reading import CHOICES, choosing_again
from cupytron.sealed_schema import check_types
from cupytron.together import together

T = TypeVar("T")
Warn = Callable[[str], None]


class RunCheckpoints:
    """RUN/checkpoints/, and RUN/saved, which says that there has been a checkpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.saved = self.path / "saved"

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return sealed.step_folder(self.path, step)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, whole or not, in order, as this process sees them."""
        return sealed.list_steps(self.path)

    def has_saved(self) -> bool:
        """Whether the run has saved a checkpoint that should still be there."""
        return self.saved.exists()

    # the view that all ranks share

    def agreed_steps(self, world: Communicator | None = None) -> list[int]:
        """Rank 0's steps, once all ranks see the same newest one. Collective.

        Raises:
            CheckpointError: a rank, which is named, does not see that step; or the run has saved, and its
                checkpoints are gone. The same on every rank.
        """
        world = world or SelfCommunicator()
        views = agree(world, lambda: (self.steps(), self.has_saved()), self._differ)
        steps, _ = views[0].what
        return list(steps)

    def compare_steps(self, world: Communicator) -> None:
        """Refuse ranks that see different newest checkpoints, before anything is done. Collective."""
        agree(world, self.steps, lambda views: lists_differ(self.path, views))

    def _differ(self, views: Sequence[View]) -> CheckpointError | None:
        lists = [View(host, steps) for host, (steps, _) in views]
        if not any(steps for _, steps in lists) and any(saved for _, (_, saved) in views):
            return self.lost()
        return lists_differ(self.path, lists)

    def lost(self) -> CheckpointError:
        """The error that says that the run has had checkpoints, and has none now."""
        return CheckpointError(
            f"{self.path}: this run has saved checkpoints, and {self.checkpoints} holds none of them "
            "now; starting again at step 1 would overwrite the run's history; put the checkpoints back, "
            "or choose another --out"
        )

    def _open(self, step: int, world: Communicator) -> Checkpoint:
        """Open and verify the checkpoint of a step, the same one on every rank. Collective.

        Raises:
            DamagedCheckpoint, UnreadableCheckpoint, GoneCheckpoint: as their names say, on some rank.
            CheckpointError: the ranks see different ones.
            Every rank raises the same.
        """
        found: list[Checkpoint | CheckpointError] = []

        def look() -> tuple[type[CheckpointError] | None, str]:
            found[:] = [seen := self.see(step)]
            return (None, seen.sha256) if isinstance(seen, Checkpoint) else (type(seen), str(seen))

        place = self.place(step)
        views = agree(world, look, lambda views: manifests_differ(place, views))
        failed = [(rank, *view.what) for rank, view in enumerate(views) if view.what[0] is not None]
        # an error that stops the command comes before one that passes over the checkpoint
        for rank, kind, text in sorted(
            failed, key=lambda each: each[1] is not UnreadableCheckpoint
        ):
            on = f" on {views[rank].host}" if len({view.host for view in views}) > 1 else ""
            raise kind(text if world.size == 1 else f"rank {rank}{on}: {text}")
        (seen,) = found
        assert isinstance(seen, Checkpoint)
        together(world, seen.hold)
        seen.verify(world)
        return seen

    def see(self, step: int) -> Checkpoint | CheckpointError:
        """The checkpoint of a step as this process sees it, not verified; an error if there is none."""
        place = self.place(step)
        try:
            found = _opened(place)
        except DamagedCheckpoint as error:
            return error if _still_there(place) else GoneCheckpoint(f"{place}: it was removed")
        except CheckpointError as error:
            return error
        if found.step != step:
            return DamagedCheckpoint(f"{place}: it holds step {found.step}; rename it back")
        return found

    # choosing one

    def reading(
        self,
        which: str,
        warn: Warn,
        work: Callable[[Checkpoint], T],
        world: Communicator | None = None,
    ) -> T:
        """Choose a checkpoint, verify it, and work with it. Collective over `world`.

        If a run that trains at the same time removes the checkpoint before the work is done, all ranks
        choose again.

        Args:
            which: "last", "best", "best or last" (the last if no loss is known), or a step.
            warn: called on every rank with a line for each damaged checkpoint that is passed over.
            work: called with the checkpoint. If it raises GoneCheckpoint, all ranks must.
            world: the ranks; None: this process alone.

        Returns: the result of `work`.

        Raises:
            CheckpointError: there is none, or it is damaged; the same on every rank.
        """
        told: set[str] = set()

        def warn_once(text: str) -> None:
            if text not in told:
                told.add(text)
                warn(text)

        try:
            return choosing_again(
                lambda: work(self._choose(which, warn_once, world or SelfCommunicator()))
            )
        except GoneCheckpoint as gone:
            raise CheckpointError(
                f"{gone}; {CHOICES} checkpoints in turn were removed before they could be read; try again "
                "when the run has ended, or let it keep more of them (checkpoint.keep)"
            ) from None

    def find(self, which: str, warn: Warn, world: Communicator | None = None) -> Checkpoint:
        """The checkpoint that `reading` would choose, for a run that nobody trains now. Collective."""
        return self.reading(which, warn, lambda found: found, world)

    def _choose(self, which: str, warn: Warn, world: Communicator) -> Checkpoint:
        steps = self.agreed_steps(world)
        if not steps:
            raise CheckpointError(f"{self.path}: no checkpoint yet; train it first")
        if which in ("best", "best or last"):
            found = self._best(warn, world)
            if found is not None:
                return found
        if which in ("last", "best or last"):
            found = self._newest(steps, warn, world)
            if found is None:
                raise CheckpointError(f"{self.path}: none of its checkpoints is whole")
            return found
        if which == "best":
            raise CheckpointError(
                f"{self.path}: no whole checkpoint has a validation loss; use --checkpoint last"
            )
        if which.isdecimal() and int(which) in steps:
            return self._open(int(which), world)
        have = ", ".join(str(s) for s in steps)
        raise CheckpointError(
            f"{self.path}: no checkpoint {which!r}; choose best, last or one of {have}"
        )

    def newest(self, warn: Warn, world: Communicator | None = None) -> Checkpoint | None:
        """The newest whole checkpoint; `warn` is called for each newer one that is damaged. Collective.

        Returns: None if none is whole, or there is none.

        Raises:
            CheckpointError: one cannot be read now, or the ranks see different ones; the same on every
                rank.
        """
        world = world or SelfCommunicator()
        return self._newest(self.agreed_steps(world), warn, world)

    def _newest(self, steps: list[int], warn: Warn, world: Communicator) -> Checkpoint | None:
        for step in reversed(steps):
            try:
                return self._open(step, world)
            except DamagedCheckpoint as error:
                warn(f"{error}; falling back to an older one")
        return None

    def best(self, warn: Warn) -> Checkpoint | None:
        """The whole checkpoint with the lowest validation loss, as this process sees them; None: none."""
        return self._best(warn, SelfCommunicator())

    def _best(self, warn: Warn, world: Communicator) -> Checkpoint | None:
        # rank 0 reads all manifests, and the others follow its order
        own = together(world, lambda: self._by_loss() if world.rank == 0 else [])
        for step in world.gather_objects(own)[0]:
            try:
                return self._open(step, world)
            except DamagedCheckpoint as error:
                warn(f"{error}; passing over this best one")
        return None

    def _by_loss(self) -> list[int]:
        """Steps with a validation loss, the lowest first.

        Raises:
            UnreadableCheckpoint, GoneCheckpoint: one that might be the best cannot be read.
        """
        seen = [self.see(step) for step in self.steps()]
        for each in seen:
            if isinstance(each, UnreadableCheckpoint | GoneCheckpoint):
                raise each
        return [found.step for found in by_loss(_whole(seen))]

    def survey(self, work: Callable[[Checkpoint], T]) -> Iterator[tuple[int, T | CheckpointError]]:
        """Yield each step with work(its checkpoint), or with the error that this raised.

        A checkpoint that a run removes at the same time is left out. If all that were listed are removed,
        the steps are listed again.
        """
        for _ in range(CHOICES):
            steps, shown = self.steps(), 0
            for step in steps:
                result: T | CheckpointError
                try:
                    seen = self.see(step)
                    result = work(seen) if isinstance(seen, Checkpoint) else seen
                except CheckpointError as error:
                    result = error
                if not isinstance(result, GoneCheckpoint):
                    shown += 1
                    yield step, result
            if shown or not steps:
                return

    # bringing the folder in line

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to damaged-*.

        A resumed run will write these steps again, and they must not count as the newest.
        """
        for later in self.steps():
            if later > step:
                place = self.place(later)
                place.rename(free_name(place.with_name(f"damaged-{place.name}")))

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep`, the best, and those that cannot be read now."""
        steps = self.steps()
        seen = [self.see(step) for step in steps]
        stay = {*steps[-keep:], *(found.step for found in by_loss(_whole(seen))[:1])}
        for step, each in zip(steps, seen, strict=True):
            # one that cannot be read now may be the best
            if step not in stay and not isinstance(each, UnreadableCheckpoint):
                checkpoint.discard(self.place(step))


def _opened(place: Path) -> Checkpoint:
    """The checkpoint of a run in a folder; its seal is whole, and the values have the right types."""
    found = Checkpoint(place)
    check_types(place, found.about)
    return found


def _still_there(place: Path) -> bool:
    """Whether a checkpoint that looked damaged is still there and damaged: neither removed nor replaced."""
    try:
        _opened(place)
    except CheckpointError:
        return place.exists()
    return False


def by_loss(found: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints with a validation loss, the lowest first.

    A loss over another validation set, or another part of it (train.eval_tokens), than the newest
    checkpoint's cannot be compared, and is left out.

    Args:
        found: checkpoints, in the order of their steps.
    """
    found = list(found)
    known = [
        c
        for c in found
        if c.about.get("val_loss") is not None and _validation_set(c) == _validation_set(found[-1])
    ]
    return sorted(known, key=lambda c: (c.about["val_loss"], c.step))


def _whole(seen: Iterable[Checkpoint | CheckpointError]) -> Iterator[Checkpoint]:
    return (each for each in seen if isinstance(each, Checkpoint))


def _validation_set(found: Checkpoint) -> Any:
    data = found.about.get("data")
    return data.get("val_sha256") if isinstance(data, dict) else None, eval_tokens(found)


def eval_tokens(found: Checkpoint) -> int | None:
    """train.eval_tokens of the run that found a checkpoint's validation loss; None: all tokens."""
    settings = found.about.get("settings")
    train = settings.get("train") if isinstance(settings, dict) else None
    return train.get("eval_tokens") if isinstance(train, dict) else None


def free_name(path: Path) -> Path:
    """`path`, or a name beside it that nothing has yet: NAME-2.SUFFIX, NAME-3.SUFFIX and so on."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
