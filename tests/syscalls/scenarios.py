"""Commands that change files, and what must hold after one of them was killed or failed.

Each scenario is one command from one state of the root folder. After a fault the same command is given
again, and the root must then be as after a command that nothing happened to.
"""

import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from syscalls import shim
from syscalls.bench import Bench, Ended
from syscalls.shim import Call

from cupytron import checkpoint, run
from cupytron.data import DataError, open_dataset
from cupytron.errors import CheckpointError
from cupytron.run_folder import RunFolder

KEEP = 1
TEXT = "".join(f"{n} quick foxes jump over {n * n} lazy dogs.\n" for n in range(12))
OTHER_TEXT = TEXT.upper()
STEPS = 3
TINY = [
    "model.family=llama",  # few tensors, so that manifests are short
    "model.num_layers=1",
    "model.num_heads=1",
    "model.d_model=8",
    "model.dropout=0.1",
    "train.sequence_length=8",
    "train.micro_batch=2",
    "train.global_batch=2",
    f"train.max_steps={STEPS}",
    "train.eval_interval=1",
    "train.seed=2",
    "optim.warmup_steps=1",
    "optim.name=sgd",
    # the best checkpoint is the first
    "optim.schedule=constant",
    "optim.lr=8",
    "checkpoint.interval=1",
    f"checkpoint.keep={KEEP}",
    "parallel.autotune=off",
    "parallel.blas_kernel=off",
]


LEFT = "left for good: "


class Scenario:
    """A command, the state that it begins from, and what is right afterwards.

    Attributes:
        exchange: False: the file system cannot exchange two names.
        right: what the root holds after an unbroken command (`holds`).
        unbroken: how that command ended.
    """

    name = ""
    exchange = True

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.clear()
        self.prepare()
        bench.keep(self.name)
        self.unbroken = self.start()
        assert self.unbroken.code == 0, self.unbroken.output
        self.right = self.holds()
        self.names = self.listed()

    def prepare(self) -> None:
        """Make the state that the command begins from."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """The command, without the program's name."""
        raise NotImplementedError

    def holds(self) -> dict[str, Any]:
        """What the root holds, as far as two unbroken commands agree on it."""
        raise NotImplementedError

    def start(self, **armed: Any) -> Ended:
        """Run the command in the root as it is."""
        return self.bench.run(self.command(), **{"exchange": self.exchange, **armed})

    def listed(self) -> set[str]:
        """The names of all files and folders that have to be there in the end, and of no others."""
        root = self.bench.root
        return {str(path.relative_to(root)) for path in root.rglob("*")}

    def promise(self, calls: list[Call], ended: bool) -> int:
        """What must not be lost any more after these calls; 0: nothing yet.

        Args:
            ended: these are all calls of the command.
        """
        raise NotImplementedError

    # what may be wrong: each yields a line for everything

    def wrong_at_once(self, ended: Ended) -> Iterator[str]:
        """After the fault, before anything else is started."""
        yield from ()

    def wrong_after_power_loss(self, calls: list[Call], ended: bool) -> Iterator[str]:
        """Before anything is started after a loss of power; what was called before it."""
        yield from ()

    def wrong_in_the_end(self, promise: int, ended: Ended) -> Iterator[str]:
        """After the same command was given again and did all of its work.

        Args:
            promise: what had been promised before (`promise`).
        """
        if ended.code != 0:
            yield f"the same command then ends with {ended.code}: {_short(ended.output)}"
            return
        yield from self.wrong_content()
        if more := sorted(self.listed() - self.names):
            yield f"{LEFT}{', '.join(more)}"

    def wrong_content(self) -> Iterator[str]:
        """What the root lacks, or holds in another form than after an unbroken command."""
        found = self.holds()
        for key, value in self.right.items():
            if found.get(key) != value:
                yield f"{key}: {_difference(value, found.get(key))}"

    def wrong_failure(self, ended: Ended) -> Iterator[str]:
        """A command with a failed call: one line that says what, or all of its work done."""
        if ended.code == 0:
            yield from (f"exit code 0, but {wrong}" for wrong in self.wrong_content())
            return
        lines = ended.output.strip().splitlines() or [""]
        errors = [line for line in lines if line.startswith("error: ")]
        if ended.code != 1 or errors != lines[-1:]:
            yield f"no error in one line, but exit code {ended.code} and {_short(ended.output)}"
        elif str(self.bench.root) not in errors[0]:
            yield f"the error names no file or folder: {errors[0]}"


def _difference(right: Any, found: Any) -> str:
    if isinstance(right, list) and isinstance(found, list):
        lacks, more = Counter(right), Counter(found)
        lacks, more = lacks - more, more - lacks
        lines = [f"lacks {line}" for line in lacks] + [f"has {line} too often" for line in more]
        if lines:
            return ", ".join(lines)
    return f"{_short(str(found))} in place of {_short(str(right))}"


def _record(record: dict[str, Any]) -> str:
    """What is the same in every run, of a line in metrics.jsonl."""
    names = ("step", "loss", "grad_norm", "val_loss")
    return " ".join(f"{name}={record[name]:.9g}" for name in names if name in record)


def _short(text: str) -> str:
    text = " | ".join(text.strip().splitlines()[-6:])
    return text if len(text) < 800 else f"... {text[-800:]}"


class Prepare(Scenario):
    """A data set is prepared for the first time."""

    name = "prepare"

    def prepare(self) -> None:
        (self.bench.root / "text.txt").write_text(TEXT)

    def command(self) -> list[str]:
        root = self.bench.root
        return ["data", "prepare", f"{root}/text.txt", "--out", f"{root}/data", "--tokenizer=char"]

    def holds(self) -> dict[str, Any]:
        return {"data": self.hashes()}

    def hashes(self) -> list[str] | str:
        """The hashes of a data set that is whole; otherwise what is wrong with it."""
        try:
            data = open_dataset(self.bench.root / "data", verify=True)
        except (DataError, OSError) as error:
            return str(error)
        assert data.tokenizer is not None
        return [str(data.train.sha256), str(data.val.sha256), str(data.tokenizer_hash)]

    def promise(self, calls: list[Call], ended: bool) -> int:
        return int(ended)

    def wrong_after_power_loss(self, calls: list[Call], ended: bool) -> Iterator[str]:
        if ended and self.hashes() != self.right["data"]:
            yield f"the command had ended, but the data is not there: {self.hashes()}"

    def wrong_in_the_end(self, promise: int, ended: Ended) -> Iterator[str]:
        if "holds a data set already" in ended.output:
            # it was there before the fault
            ended = ended._replace(code=0)
        yield from super().wrong_in_the_end(promise, ended)


class Overwrite(Prepare):
    """A data set is replaced: at every moment there is the old one or the new one."""

    name = "overwrite"

    def prepare(self) -> None:
        super().prepare()
        made = self.bench.run(Prepare.command(self))
        assert made.code == 0, made.output
        self.old = self.hashes()
        (self.bench.root / "text.txt").write_text(OTHER_TEXT)

    def command(self) -> list[str]:
        return [*super().command(), "--overwrite"]

    def promise(self, calls: list[Call], ended: bool) -> int:
        return 1  # the old data

    def wrong_after_power_loss(self, calls: list[Call], ended: bool) -> Iterator[str]:
        yield from super().wrong_after_power_loss(calls, ended)
        yield from self.wrong_data()

    def wrong_at_once(self, ended: Ended) -> Iterator[str]:
        yield from self.wrong_data()

    def wrong_data(self) -> Iterator[str]:
        """Neither the old data nor the new."""
        found = self.hashes()
        if self.exchange and found not in (self.old, self.right["data"]):
            yield f"neither the old data nor the new is there: {found}"


class OverwriteWithoutExchange(Overwrite):
    """The same where two names cannot be exchanged: the same command brings one of them back."""

    name = "overwrite, no exchange"
    exchange = False


class Train(Scenario):
    """A run from its first step: saves, prunes, keeps the best, writes a trace."""

    name = "train"

    def prepare(self) -> None:
        Prepare.prepare(self)  # type: ignore[arg-type]
        made = self.bench.run(Prepare.command(self))  # type: ignore[arg-type]
        assert made.code == 0, made.output
        os.unlink(self.bench.root / "text.txt")

    def command(self, *settings: str) -> list[str]:
        root = self.bench.root
        flags = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
        folders = ["--data", f"{root}/data", "--out", f"{root}/run"]
        return ["train", *folders, "--threads", "1", "--trace", "1:2", *flags]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.bench.root / "run")

    def holds(self) -> dict[str, Any]:
        folder = self.folder
        found: dict[str, Any] = {
            "checkpoints": folder.steps(),
            "metrics": [_record(record) for record in folder.read_metrics()],
        }
        for path in (folder.config, folder.tokenizer):
            found[path.name] = path.read_text() if path.exists() else None
        if folder.environment.exists():
            found["environment.json"] = sorted(json.loads(folder.environment.read_text()))
        for step in folder.steps():
            try:
                digest = checkpoint.Checkpoint(folder.place(step)).digest()["all"]
            except CheckpointError as error:
                digest = str(error)
            found[f"step {step}"] = digest
        return found

    def listed(self) -> set[str]:
        # a run that goes on after the steps to be traced writes no trace
        return super().listed() | {"run/trace.json"}

    def wrong_at_once(self, ended: Ended) -> Iterator[str]:
        yield from self.wrong_number(self.at_first(), ended, spare(ended.calls))

    def wrong_in_the_end(self, promise: int, ended: Ended) -> Iterator[str]:
        yield from super().wrong_in_the_end(promise, ended)
        found = re.search(r"resuming from .* at step (\d+)", ended.output)
        step = int(found[1]) if found else 0
        if step < promise:
            yield f"step {promise} was saved, but the same command went on from step {step}"

    def promise(self, calls: list[Call], ended: bool) -> int:
        """The newest step whose save had returned."""
        return max([0, *(int(c.path.split()[1]) for c in calls if c.kind == "mark")])

    def at_first(self) -> set[str]:
        """Names in checkpoints/ before the command."""
        return set()

    def wrong_number(self, names: set[str], ended: Ended, spare: int) -> Iterator[str]:
        """More than `keep` + 2 checkpoints at a time, whole or not, hidden or not.

        Args:
            names: in checkpoints/ before the command.
            spare: so many more may be there.
        """
        place, most = str(self.folder.checkpoints), set(names)
        for found in names_over_time(place, names, ended.calls):
            most = max(most, found, key=len)
        if len(most) > KEEP + 2 + spare:
            yield f"{len(most)} checkpoints at a time with keep={KEEP}: {', '.join(sorted(most))}"


def spare(calls: list[Call]) -> int:
    """What could not be removed stays until the next start: 1 if a call that removes has failed."""
    return int(any(c.result < 0 and c.kind in ("unlink", "rmdir", "rename") for c in calls))


def names_over_time(place: str, names: set[str], calls: list[Call]) -> Iterator[set[str]]:
    """The names in a folder after each call that changes them."""
    names = set(names)
    for call in calls:
        if call.result < 0:
            continue
        one, other = call.path, call.other
        if call.kind == "mkdir" and os.path.dirname(one) == place:
            names.add(os.path.basename(one))
        elif call.kind in ("rmdir", "rename") and os.path.dirname(one) == place:
            names.discard(os.path.basename(one))
        if call.kind == "rename" and os.path.dirname(other) == place:
            names.add(os.path.basename(other))
        yield set(names)


class Resume(Train):
    """A run goes on: a signal had cut short an evaluation, so the save of that step is replaced."""

    name = "resume"
    stopped = 1  # the step of that save

    def prepare(self) -> None:
        super().prepare()
        stopped = self.bench.run(self.command(), stop_in_the_evaluation(self.stopped))
        assert stopped.code == 75 and self.folder.steps()[-1] == self.stopped, stopped.output
        found = checkpoint.Checkpoint(self.folder.place(self.stopped))
        assert found.about["val_loss"] is None

    def promise(self, calls: list[Call], ended: bool) -> int:
        return max(self.stopped, super().promise(calls, ended))

    def at_first(self) -> set[str]:
        return set(os.listdir(self.bench.kept(self.name) / "run" / "checkpoints"))


def stop_in_the_evaluation(step: int) -> Any:
    """A prelude: SIGTERM comes in the middle of the evaluation after a step."""

    def prelude() -> None:
        until_stopped = run._Run._until_stopped

        def with_a_signal(self: Any, batches: Any) -> Any:
            if self.trainer.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return until_stopped(self, batches)

        run._Run._until_stopped = with_a_signal  # type: ignore[method-assign]

    return prelude


class ResumeWithoutExchange(Resume):
    """The same where two names cannot be exchanged: the next start brings one of them back."""

    name = "resume, no exchange"
    exchange = False


class Recover(Resume):
    """A run goes on after a kill in the middle of replacing a save: what was left is put in order.

    The kill came where names cannot be exchanged, so that the checkpoint has no name of its own.
    """

    name = "recover"

    def prepare(self) -> None:
        super().prepare()
        self.bench.keep("before the kill")
        whole = self.start(exchange=False)
        place = str(self.folder.place(self.stopped))
        point = next(
            n for n, c in enumerate(whole.points) if c.kind == "rename" and c.other == place
        )
        shutil.rmtree(self.bench.root)
        self.bench.lay_out("before the kill")
        killed = self.start(point=point, action=shim.KILL, exchange=False)
        assert killed.code == -signal.SIGKILL, killed.output
        assert not self.folder.place(self.stopped).exists()
        with open(self.folder.metrics, "a") as file:
            file.write('{"step": 3, "lo')


SCENARIOS: list[type[Scenario]] = [
    Prepare,
    Overwrite,
    OverwriteWithoutExchange,
    Train,
    Resume,
    ResumeWithoutExchange,
    Recover,
]


def note_saves(planted: bool = False) -> None:
    """Let the log say when a save has returned, which is a promise.

    Args:
        planted: remove an old checkpoint before the new one is written: a fault that has to be seen.
    """
    write = checkpoint.write

    def write_and_mark(folder: Path, pieces: Any, about: Any, *rest: Any, **more: Any) -> None:
        if planted:
            shutil.rmtree(folder, ignore_errors=True)
        write(folder, pieces, about, *rest, **more)
        shim.mark(f"saved {about['step']}")

    checkpoint.write = write_and_mark
