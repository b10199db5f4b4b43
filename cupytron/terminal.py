"""Shows a command's progress: one line that renews itself on a terminal, plain lines elsewhere.

The work reports its phases to cupytron.progress, and a thread reads them there. So each phase that lasts
longer than LONG is shown, with how much of it is done, and the work itself prints nothing.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cupytron import progress
from cupytron.printable import printable
from cupytron.progress import Doing

LONG = 2.0  # seconds after which a phase is shown
# least seconds between plain lines about one phase; they double each time, up to MOST
EVERY = 10.0
MOST = 300.0
_TICK = 0.5  # seconds


class Field(NamedTuple):
    """A part of a line, and how soon it is left out of a narrow one: fields of the largest `rank` first."""

    text: str
    rank: int = 0


def fit(fields: Sequence[Field], width: int | None = None) -> str:
    """Fields as one line of at most `width` columns; None: of any length. The last one is cut."""
    fields = list(fields)
    while True:
        line = "  ".join(field.text for field in fields)
        if width is None or len(line) <= width:
            return line
        if len(fields) == 1:
            return line[:width]
        fields.remove(max(reversed(fields), key=lambda field: field.rank))


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def doing_fields(doing: Doing) -> Iterator[Field]:
    """A long phase: its name, how much of it is done, and the time that is left or has passed."""
    if doing.phase == "in the step":
        yield Field(f"in step {doing.step + 1}")
    else:
        yield Field(f"step {doing.step}, {doing.phase}" if doing.step else doing.phase)
    count, left = doing.counted, f"for {clock(doing.seconds)}"
    if count is not None:
        unit = 2**20 if count.unit == "bytes" else 1
        name = "MB" if count.unit == "bytes" else count.unit
        yield Field(f"{count.done // unit:,} of {count.total // unit:,} {name}", 1)
        if count.done and count.seconds > 1:
            left = f"left {clock(count.seconds / count.done * (count.total - count.done))}"
    yield Field(left, 2)
    if doing.waits_for:
        yield Field(f"waiting in {doing.waits_for}", 3)


class Display:
    """Lines about a command's work, and about each phase of it that lasts longer than LONG seconds.

    Args:
        quiet: show nothing.
        live: False: always plain lines, since a launcher may make a pipe look like a terminal.
        stderr: write there in place of stdout, which is for results.

    Attributes:
        quiet: whether nothing is shown, as the caller asked, or since nobody can read it.
    """

    def __init__(self, quiet: bool = False, live: bool = True, stderr: bool = False) -> None:
        self._stream = sys.stderr if stderr else sys.stdout
        self.quiet = quiet
        there = self._stream is not None and not quiet
        self._live = there and live and self._stream.isatty()
        self._fields: list[Field] = []
        self._console: Any = None
        self._status: Any = None
        self._lock = threading.RLock()
        self._told = time.monotonic()  # when the last plain line was written
        self._closed = threading.Event()
        if self._live:
            from rich.console import Console
            from rich.live import Live

            self._console = Console(highlight=False, file=self._stream)
            self._status = Live(
                _Line(self), console=self._console, refresh_per_second=4, transient=True
            )
            self._status.start()
        elif there:
            threading.Thread(target=self._tell, name="display", daemon=True).start()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, text: str) -> None:
        """Show a line that stays; control characters in it are shown as escapes."""
        if self.quiet:
            return
        text = printable(text)
        self._told = time.monotonic()
        try:
            if self._live:
                self._console.print(text, markup=False, soft_wrap=True)
            else:
                with self._lock:
                    print(text, file=self._stream, flush=True)
        except OSError:
            self._give_up()
        except ValueError:  # the stream was closed by its owner
            self.quiet = True
            self._closed.set()

    def text(self, width: int) -> str:
        """The line that renews itself, cut to so many columns."""
        doing = progress.doing()
        fields = list(doing_fields(doing)) if doing.seconds >= LONG else self._fields
        return printable(fit(fields, width)) if fields else ""

    def _tell(self) -> None:
        """Write plain lines about each long phase, at growing intervals."""
        phase, pause = (0, ""), EVERY
        while not self._closed.wait(_TICK):
            doing = progress.doing()
            if phase != (phase := (doing.step, doing.phase)):
                pause = EVERY
            if doing.seconds >= LONG and time.monotonic() - self._told >= pause:
                pause = min(2 * pause, MOST)
                self.line(fit(list(doing_fields(doing))))

    def _give_up(self) -> None:
        """Show no more, since the terminal or the pipe has gone. That must not end the run."""
        self.quiet, self._live = True, False
        self._closed.set()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # text that is still buffered goes there when the process ends
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def close(self) -> None:
        """Show no more."""
        self._closed.set()
        if self._live:
            self._live = False
            self._status.stop()


class _Line:
    """The line that renews itself: it is made anew for the terminal's width at each refresh."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        # a terminal wraps a line that fills its last column
        text = self._display.text(options.max_width - 1)
        yield Text(text, no_wrap=True, overflow="crop", end="")


class Progress(Display):
    """A training run's lines.

    Args:
        max_steps: of the run.
        quiet, live: as Display's.
    """

    def __init__(self, max_steps: int, quiet: bool = False, live: bool = True) -> None:
        super().__init__(quiet, live)
        self._max_steps = max_steps
        self._began = time.monotonic()
        self._first: int | None = None

    def step(self, record: dict[str, Any]) -> None:
        """Show the parts of a training record that a person waits for; metrics.jsonl has the rest."""
        if self._first is None:
            self._first, self._began = record["step"], time.monotonic()
        self._fields = [
            Field(f"step {record['step']:>{len(str(self._max_steps))}}/{self._max_steps}"),
            Field(f"loss {record['loss']:.4f}", 1),
            Field(f"lr {record['lr']:.2e}", 4),
            Field(f"{record['tokens_per_second']:,.0f} tokens/s", 3),
            Field(f"left {self._left(record['step'])}", 2),
        ]
        if not self._live or record["step"] == self._max_steps:
            self.line(fit(self._fields))

    def _left(self, step: int) -> str:
        done = step - (self._first or 0)
        if done < 1:
            return "?"
        return clock((time.monotonic() - self._began) / done * (self._max_steps - step))


@contextlib.contextmanager
def shown(speaks: bool) -> Iterator[None]:
    """A context in which long phases of a command are shown on stderr.

    Args:
        speaks: whether this process is the one that speaks.
    """
    with Display(quiet=not speaks, stderr=True):
        yield
