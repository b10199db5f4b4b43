"""A run is trained from its first step, or resumed."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from typing import Any

from syscalls import shim
from syscalls.bench import Ended
from syscalls.scenario import Scenario
from syscalls.scenario_data import TEXT, make_data
from syscalls.shim import Call

from cupytron import checkpoint, run
from cupytron.errors import CheckpointError
from cupytron.run_folder import RunFolder

KEEP = 1
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


def _record(record: dict[str, Any]) -> str:
    """The part of a record of metrics.jsonl that is the same in every run."""
    names = ("step", "loss", "grad_norm", "val_loss")
    return " ".join(f"{name}={record[name]:.9g}" for name in names if name in record)


class Train(Scenario):
    """A run from its first step, which saves, prunes, keeps the best checkpoint and writes a trace."""

    name = "train"

    def prepare(self) -> None:
        source = self.bench.root / "text.txt"
        source.write_text(TEXT)
        make_data(self.bench)
        source.unlink()

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

    def wrong_failure(self, ended: Ended) -> Iterator[str]:
        yield from super().wrong_failure(ended)
        told = "goes on without the trace" in ended.output
        if ended.code == 0 and not (self.folder.path / "trace.json").exists() and not told:
            yield "exit code 0, but no trace, and no word about it"

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
        """Yield a line if there were more than keep + 2 checkpoints at a time, whole or not, hidden or not.

        Args:
            names: in checkpoints/ before the command.
            ended: the command.
            spare: checkpoints that may be there besides.
        """
        place, most = str(self.folder.checkpoints), set(names)
        for found in names_over_time(place, names, ended.calls):
            most = max(most, found, key=len)
        if len(most) > KEEP + 2 + spare:
            yield f"{len(most)} checkpoints at a time with keep={KEEP}: {', '.join(sorted(most))}"


def spare(calls: list[Call]) -> int:
    """Checkpoints that may be left until the next start: 1 if a call that removes has failed, else 0."""
    failed = [call.kind for call in calls if call.result < 0 and call.result != -errno.ENOENT]
    return int(not {"unlink", "rmdir", "rename"}.isdisjoint(failed))


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
    """A run goes on after a kill in the middle of replacing a save, and restores the old checkpoint.

    Names could not be exchanged there, so that no checkpoint has the name.
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
