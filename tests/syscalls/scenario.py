"""A command that changes files, and what must hold after it was killed or failed.

After a fault the same command is given again. Then the root must be as after a command without a fault.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from syscalls.bench import Bench, Ended
from syscalls.shim import Call

LEFT = "left for good: "


class Scenario:
    """A command, the state that it begins from, and what is right afterwards.

    Attributes:
        name: for messages.
        exchange: whether the file system can exchange two names.
        right: what the root holds after a command without a fault (`holds`).
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
        """The names of all files and folders in the root; in the end there must be no others."""
        root = self.bench.root
        return {str(path.relative_to(root)) for path in root.rglob("*")}

    def promise(self, calls: list[Call], ended: bool) -> int:
        """The step, or other number, that must not be lost any more after these calls; 0: nothing yet.

        Args:
            calls: of the command, so far.
            ended: whether these are all its calls.
        """
        raise NotImplementedError

    # each yields a line for everything that is wrong

    def wrong_at_once(self, ended: Ended) -> Iterator[str]:
        """What is wrong right after the fault, before anything else is started."""
        yield from ()

    def wrong_after_power_loss(self, calls: list[Call], ended: bool) -> Iterator[str]:
        """What is wrong right after a loss of power, before anything is started.

        Args:
            calls: of the command before the loss.
            ended: whether these are all its calls.
        """
        yield from ()

    def wrong_in_the_end(self, promise: int, ended: Ended) -> Iterator[str]:
        """What is wrong after the same command was given again.

        Args:
            promise: what had been promised before (`promise`).
            ended: how the command ended that was given again.
        """
        if ended.code != 0:
            yield f"the same command then ends with {ended.code}: {_short(ended.output)}"
            return
        yield from self.wrong_content()
        if more := sorted(self.listed() - self.names):
            yield f"{LEFT}{', '.join(more)}"

    def wrong_content(self) -> Iterator[str]:
        """Where the root differs from that after a command without a fault."""
        found = self.holds()
        for key, value in self.right.items():
            if found.get(key) != value:
                yield f"{key}: {_difference(value, found.get(key))}"

    def wrong_failure(self, ended: Ended) -> Iterator[str]:
        """What is wrong with the end of a command in which a call failed.

        It has to end with one line that says what failed, or to have done all of its work.
        """
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


def _short(text: str) -> str:
    text = " | ".join(text.strip().splitlines()[-6:])
    return text if len(text) < 800 else f"... {text[-800:]}"
