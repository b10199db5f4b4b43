"""A run's folder: settings, environment, metrics and the checkpoints that are kept."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cupytron import checkpoint, sealed
from cupytron.config_io import read_toml
from cupytron.durable import (
    left_by_replacing,
    open_file,
    open_in_place,
    replacing,
    sync,
    sync_folder,
)
from cupytron.errors import ConfigError, CupytronError
from cupytron.run_checkpoints import RunCheckpoints

# files of the folder that are replaced as a whole; a kill may leave the new ones beside them
_REPLACED = (
    "config.toml",
    "environment.json",
    "tokenizer.json",
    "metrics*.jsonl",
    "saved",
    "trace.json",
    "report.html",
)


class RunFolder(RunCheckpoints):
    """RUN/ with config.toml, environment.json, tokenizer.json, metrics.jsonl and checkpoints/."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config = self.path / "config.toml"
        self.environment = self.path / "environment.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"

    def require(self) -> "RunFolder":
        """Itself, if it is a run's folder.

        Raises:
            CupytronError: it is not.
        """
        sealed.require_run(self.path)
        return self

    def check_new(self, resume: bool = True) -> None:
        """Refuse a folder with files of somebody's own under our names.

        Args:
            resume: whether it may hold a run with checkpoints.

        Raises:
            CupytronError: saying what is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CupytronError(f"{self.path}: is a file; choose another --out")
        if self.has_saved() and not self.checkpoints.is_dir():
            raise self.lost()
        ours = (self.config, self.environment, self.tokenizer, self.metrics)
        found = [path for path in ours if path.exists()]
        if found and not self.checkpoints.is_dir():
            raise CupytronError(
                f"{found[0]}: is not a run's (there is no checkpoints/ beside it) and would be "
                "overwritten; choose another --out"
            )
        if not resume and (steps := self.steps()):
            raise CupytronError(
                f"{self.path}: holds a run at step {steps[-1]}; choose another --out, "
                "or --resume auto to go on with it"
            )

    def others_files(self) -> list[str]:
        """Names of what lies in the folder of a new run and is none of its files; none if it has begun."""
        if self.checkpoints.is_dir() or not self.path.is_dir():
            return []
        return sorted(
            path.name
            for path in self.path.iterdir()
            if not path.name.startswith(".")
            and not any(path.match(pattern) for pattern in _REPLACED)
        )

    def check_foreign(self, out: Path) -> None:
        """Refuse to write somebody's output over a file that the run itself needs.

        Raises:
            CupytronError: `out` is one of the run's files.
        """
        # not Path.resolve, which fails where links go round in a circle
        place = os.path.realpath(out)
        ours = (self.config, self.environment, self.tokenizer, self.metrics, self.saved)
        if place in map(os.path.realpath, ours) or os.path.realpath(self.checkpoints) in map(
            str, Path(place).parents
        ):
            raise CupytronError(f"{out}: is a file of the run itself; choose another name")

    def create(self) -> list[str]:
        """Make the folders, restore a checkpoint that a killed save was replacing, and remove leftovers.

        Returns: a line for each checkpoint that was restored, or could not be read.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for name in _REPLACED:
            for left in left_by_replacing(self.path / name):
                left.unlink(missing_ok=True)
        return checkpoint.recover(self.checkpoints)

    def has_saved(self) -> bool:
        """Whether RUN/saved says so; or, where an earlier version has not written it, the records.

        A run saves every `checkpoint.interval` steps. So its records pass that step only after a save.
        """
        if super().has_saved():
            return True
        if self.steps() or not self.metrics.exists():
            return False
        try:
            interval = read_toml(self.config)["checkpoint"]["interval"]
        except (ConfigError, KeyError, TypeError):
            return False  # nothing says how often the run saved
        steps = [
            step for record in self.read_metrics() if isinstance(step := record.get("step"), int)
        ]
        return isinstance(interval, int) and 0 < interval < max(steps, default=0)

    def note_saved(self, step: int) -> None:
        """Write RUN/saved after the first save, so that checkpoints which vanish later are missed."""
        if not self.saved.exists():
            self.write(self.saved, f"{step}\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder; a killed process's lock ends with it.

        Raises:
            CupytronError: another process is training here.
        """
        with open_in_place(self.path / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                found = file.read(20).decode(errors="replace").strip()
                owner = found if found.isdecimal() else "unknown"
                raise CupytronError(
                    f"{self.path}: another process (pid {owner}) is training in it; "
                    "wait for it, stop it, or choose another --out"
                ) from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield

    def write(self, path: Path, content: str) -> None:
        """Write one of the folder's files; a reader sees the old content or the new."""
        with replacing(path) as file:
            file.write(content.encode())
            sync(file)
        sync_folder(path.parent)

    # metrics

    def keep_metrics(self, last_step: int, size: int | None = None) -> None:
        """Drop from metrics.jsonl the records after `last_step`, and lines that cannot be read.

        Args:
            last_step: of the checkpoint that the run goes on from.
            size: bytes of the file that this checkpoint has sealed; records behind them were written
                after the save. None: not known.
        """
        if self.metrics.exists():
            kept = [line for step, line in self._steps_of_lines(size) if step <= last_step]
            self.write(self.metrics, "".join(kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl."""
        try:
            content = self._metrics_content()
        except FileNotFoundError:
            return []
        return [record for record, _ in records(content) if record is not None]

    def _metrics_content(self) -> bytes:
        with open_file(self.metrics) as file:
            return file.read()

    def _steps_of_lines(self, size: int | None) -> Iterator[tuple[int, str]]:
        for record, line in records(self._metrics_content()[:size]):
            step = record.get("step") if record is not None else None
            if isinstance(step, int):
                yield step, line.decode()


def records(content: bytes) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Each line of a metrics file with its record; None for a line that cannot be read.

    A killed run may leave half a line at the end.
    """
    for line in content.splitlines(keepends=True):
        record = None
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line.decode())
        yield record if isinstance(record, dict) else None, line
