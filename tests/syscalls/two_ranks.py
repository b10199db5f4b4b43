"""The same on two ranks under MPICH: one of them is killed, or has a call that fails."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import runs
from launchers import launch
from syscalls import shim
from syscalls.bench import Bench, Ended
from syscalls.scenario_data import TEXT
from syscalls.scenario_run import Train
from syscalls.shim import Call

from cupytron.data import prepare_dataset

RANKS = 2
LIMIT = 100  # seconds for one command


class RankBench(Bench):
    """Runs commands on two ranks, each with the shim; `Ended.calls` are those of one rank."""

    def __init__(self, place: Path, library: Path) -> None:
        super().__init__(place)
        self._library = library

    def run(
        self,
        command: list[str],
        prelude: Callable[[], Any] | None = None,
        *,
        rank: int = 0,
        point: int = shim.NOWHERE,
        action: int = 0,
        error: int = 0,
        exchange: bool = True,
    ) -> Ended:
        assert prelude is None and exchange
        self.starts += 1
        for each in range(RANKS):
            Path(f"{self._log}.{each}").unlink(missing_ok=True)
        told = f"{self._log} {point} {action} {error} {rank} {self.root}"
        words = ["env", f"LD_PRELOAD={self._library}", f"SHIM={told}", runs.cupytron(), *command]
        process = runs.start(*launch("mpich", RANKS, words))
        output, _ = process.communicate(timeout=LIMIT)
        return Ended(process.returncode, output, shim.read_log(Path(f"{self._log}.{rank}")))


def _step(path: str) -> set[int]:
    """The step of a checkpoint's final name; empty for other paths."""
    found = re.search(r"/step-(\d+)$", path)
    return {int(found[1])} if found else set()


class TrainOnTwoRanks(Train):
    """A run of two replicas from its first step."""

    name = "train on two ranks"

    def prepare(self) -> None:
        source = self.bench.root / "text.txt"
        source.write_text(TEXT)
        prepare_dataset([source], self.bench.root / "data", tokenizer="char")
        source.unlink()

    def command(self, *settings: str) -> list[str]:
        return super().command("train.micro_batch=1", *settings)

    def promise(self, calls: list[Call], ended: bool) -> int:
        """The newest step whose checkpoint got its name; a save that fails takes the name back."""
        named = {0}
        for call in calls:
            if call.result >= 0:
                named |= _step(call.other)
                if "/.tmp-" in call.other:
                    named -= _step(call.path)
        return max(named)

    def wrong_failure(self, ended: Ended) -> Iterator[str]:
        if ended.code == 0:
            yield from super().wrong_failure(ended)
            return
        # the launcher may add lines of its own
        errors = [line for line in ended.output.splitlines() if line.startswith("error: rank ")]
        if len(errors) != 1 or "Traceback" in ended.output:
            yield f"no error in one line, but exit code {ended.code} and {ended.output}"
