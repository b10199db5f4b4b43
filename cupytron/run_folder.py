"""A run's folder: settings, environment, metrics and the checkpoints that are kept."""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from cupytron import checkpoint
from cupytron.checkpoint import Checkpoint
from cupytron.comm import Communicator
from cupytron.errors import CheckpointError, CupytronError

_STEP = re.compile(r"step-(\d{8,12})")


class RunFolder:
    """RUN/ with config.toml, environment.json, tokenizer.json, metrics.jsonl and checkpoints/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.environment = self.path / "environment.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def require(self) -> "RunFolder":
        """Itself, if it is a run's folder.

        Raises:
            CupytronError: it is not.
        """
        if not self.config.is_file():
            raise CupytronError(
                f"{self.path}: not a run's folder (it has no config.toml); "
                "give the folder that `cupytron train --out` made"
            )
        return self

    def check_new(self) -> None:
        """Refuse a folder with files of somebody's own under our names.

        Raises:
            CupytronError: saying which file is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CupytronError(f"{self.path}: is a file; choose another --out")
        ours = (self.config, self.environment, self.tokenizer, self.metrics)
        found = [path for path in ours if path.exists()]
        if found and not self.checkpoints.is_dir():
            raise CupytronError(
                f"{found[0]}: is not a run's (there is no checkpoints/ beside it) and would be "
                "overwritten; choose another --out"
            )

    def create(self) -> None:
        """Make the folders, and clear away what a killed save left."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for left in [*self.checkpoints.glob(".tmp-*"), *self.checkpoints.glob(".old-*")]:
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder; a killed process's lock ends with it.

        Raises:
            CupytronError: another process is training here.
        """
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise CupytronError(
                    f"{self.path}: another process (pid {owner}) is training in it; "
                    "wait for it, stop it, or choose another --out"
                ) from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def write(self, path: Path, content: str) -> None:
        """Write one of the folder's files; a reader sees the old content or the new."""
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    # checkpoints

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.checkpoints / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, whole or not, in order."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(p.name) for p in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def newest(
        self, warn: Callable[[str], None], world: Communicator | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint that verifies; `warn` hears of each newer one that does not.

        Collective over `world`, if it is given: the ranks share the work.
        """
        for step in reversed(self.steps()):
            try:
                return self._open(step, world)
            except CheckpointError as error:
                warn(f"{error}; falling back to an older one")
        return None

    def best(self, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
        """The checkpoint with the lowest validation loss.

        Only losses over the newest checkpoint's validation set are compared: others mean something else.

        Args:
            warn: verify the files too, and tell of those passed over; None: trust whole manifests.
        """
        readable = list(self._readable())
        known = [
            c
            for c in readable
            if c.about.get("val_loss") is not None
            and _validation_set(c) == _validation_set(readable[-1])
        ]
        for found in sorted(known, key=lambda c: (c.about["val_loss"], c.step)):
            if warn is None:
                return found
            try:
                found.verify()
                return found
            except CheckpointError as error:
                warn(f"{error}; passing over this best one")
        return None

    def _readable(self) -> Iterator[Checkpoint]:
        for step in self.steps():
            try:
                yield Checkpoint(self.place(step))
            except CheckpointError:
                continue

    def find(
        self, which: str, warn: Callable[[str], None], world: Communicator | None = None
    ) -> Checkpoint:
        """The checkpoint called "last", "best" or by its step, verified; collective over `world`.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        if not self.steps():
            raise CheckpointError(f"{self.path}: no checkpoint yet; train it first")
        if which == "last":
            found = self.newest(warn, world)
            if found is None:
                raise CheckpointError(f"{self.path}: none of its checkpoints is whole")
            return found
        if which == "best":
            found = self.best(warn)
            if found is None:
                raise CheckpointError(
                    f"{self.path}: no whole checkpoint has a validation loss; use --checkpoint last"
                )
            return found
        if which.isdecimal() and int(which) in self.steps():
            return self._open(int(which), world)
        have = ", ".join(str(s) for s in self.steps())
        raise CheckpointError(
            f"{self.path}: no checkpoint {which!r}; choose best, last or one of {have}"
        )

    def _open(self, step: int, world: Communicator | None = None) -> Checkpoint:
        found = Checkpoint(self.place(step))
        if found.step != step:
            raise CheckpointError(f"{found.folder}: it holds step {found.step}; rename it back")
        found.verify(world)
        return found

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to damaged-*: a resumed run will write these steps again,
        and they must not count as the newest."""
        for later in self.steps():
            if later > step:
                place = self.place(later)
                aside = place.with_name(f"damaged-{place.name}")
                shutil.rmtree(aside, ignore_errors=True)
                place.rename(aside)

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep` and the best."""
        best = self.best()
        stay = {*self.steps()[-keep:], *([best.step] if best else [])}
        for step in self.steps():
            if step not in stay:
                checkpoint.discard(self.place(step))

    # metrics

    def open_metrics(self, last_step: int) -> TextIO:
        """metrics.jsonl for appending, without what was recorded after `last_step`."""
        if self.metrics.exists():
            kept = [
                line
                for record, line in self._metric_lines()
                if isinstance(record.get("step"), int) and record["step"] <= last_step
            ]
            self.write(self.metrics, "".join(kept))
        return open(self.metrics, "a", encoding="utf-8")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl."""
        return [record for record, _ in self._metric_lines()]

    def _metric_lines(self) -> Iterator[tuple[dict[str, Any], str]]:
        try:
            text = self.metrics.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for line in text.splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a killed run may leave half a line
            if isinstance(record, dict) and line.endswith("\n"):
                yield record, line


def _validation_set(found: Checkpoint) -> Any:
    data = found.about.get("data")
    return data.get("val_sha256") if isinstance(data, dict) else None
