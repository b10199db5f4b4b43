"""Runs commands in forked children of a process that has imported everything, with the shim loaded."""

import importlib
import io
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from syscalls import shim
from syscalls.shim import Call

from cupytron.cli import main

LIMIT = 100  # seconds that a command may take
CRASHED = 70  # the exit code of a child in which an unexpected exception was raised


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; if a signal killed it, minus the signal's number.
        output: stdout and stderr.
        calls: its system calls that were logged.
    """

    code: int
    output: str
    calls: list[Call]

    @property
    def points(self) -> list[Call]:
        """The calls that can be made to fail."""
        return [call for call in self.calls if call.kind != "mark"]


class Bench:
    """Forks commands that work in `root`; a state of that folder can be kept and laid out again.

    Attributes:
        root: the watched folder, the same for all commands, so that paths in files are the same.
        starts: commands so far.
    """

    def __init__(self, place: Path) -> None:
        self.root = place / "root"
        self._states = place / "states"
        self._log, self._output = place / "log", place / "output"
        self.starts = 0
        self._states.mkdir(parents=True, exist_ok=True)
        self.clear()

    def clear(self) -> None:
        """An empty root."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def keep(self, name: str) -> None:
        """Remember the root as it is."""
        shutil.copytree(self.root, self.kept(name))

    def kept(self, name: str) -> Path:
        """Where a state of the root was kept."""
        return self._states / name

    def lay_out(self, name: str) -> None:
        """Make the root what it was when it was kept under this name."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.kept(name), self.root)

    def run(
        self, command: list[str], prelude: Callable[[], Any] | None = None, **armed: Any
    ) -> Ended:
        """Run a cupytron command in a child.

        Args:
            command: without the program's name.
            prelude: called in the child before the command.
            armed: arguments of shim.arm.
        """
        self.starts += 1
        self._log.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._be_the_child(command, prelude, armed)
        _, status = os.waitpid(child, 0)
        output = self._output.read_text(encoding="utf-8", errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), output, shim.read_log(self._log))

    def _be_the_child(
        self, command: list[str], prelude: Callable[[], Any] | None, armed: dict[str, Any]
    ) -> None:
        code = CRASHED
        try:
            signal.alarm(LIMIT)  # its default action ends the process
            output = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), line_buffering=True)
            sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True)
            os.chdir(self.root)
            if prelude:
                prelude()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            shim.arm(self.root, log, **armed)
            code = main._run(command)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)

    def import_what_it_imports(self, command: list[str]) -> None:
        """Run a command once in a child, and import here what it has imported there."""
        names = self.root.with_name("modules")

        def note_at_the_end() -> None:
            run = main._run

            def run_and_note(arguments: list[str]) -> int:
                code = run(arguments)
                shim.disarm()
                names.write_text("\n".join(sys.modules))
                return code

            main._run = run_and_note

        self.run(command, note_at_the_end)
        for name in names.read_text().split("\n"):
            if not name.startswith("__"):
                importlib.import_module(name)
