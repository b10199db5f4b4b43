"""A data set is prepared, or replaced."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from syscalls.bench import Bench, Ended
from syscalls.scenario import Scenario
from syscalls.shim import Call

from cupytron.data import DataError, open_dataset

TEXT = "".join(f"{n} quick foxes jump over {n * n} lazy dogs.\n" for n in range(12))
OTHER_TEXT = TEXT.upper()


def prepare_command(root: Path) -> list[str]:
    """Makes data/ of text.txt."""
    return ["data", "prepare", f"{root}/text.txt", "--out", f"{root}/data", "--tokenizer=char"]


def make_data(bench: Bench) -> None:
    """Run that command."""
    made = bench.run(prepare_command(bench.root))
    assert made.code == 0, made.output


class Prepare(Scenario):
    """A data set is prepared for the first time."""

    name = "prepare"

    def prepare(self) -> None:
        (self.bench.root / "text.txt").write_text(TEXT)

    def command(self) -> list[str]:
        return prepare_command(self.bench.root)

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
        make_data(self.bench)
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
