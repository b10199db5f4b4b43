"""Programs that are measured in turn: each in a process of its own that stays, and does what it is told.

The two never hold memory for activations at the same time: whoever is not measured is parked.
"""

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gpu_children import TAIL, Failed, Json, heard, say
from gpu_report import HERE, Gpu, save

WARMUP = 5  # steps before any is timed: kernels compiled and chosen, graphs recorded
LIMIT = 530.0  # seconds that a case has
BATCHES = 4  # of random tokens, which steps take in turn


# flags of gpu_torch.py by contender
RIVALS = {
    "torch": [],
    "torch_cudnn": ["--attention", "cudnn"],
    "torch_graphs": ["--mode", "reduce-overhead"],
}


class Contender(Protocol):
    """What can be told to `ask`; all arguments and answers are JSON's."""

    def ask(self, do: str, limit: float = 300.0, **arguments: Any) -> Json: ...
    def close(self) -> None: ...


class Here:
    """A contender in this process, for dry runs."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def ask(self, do: str, limit: float = 300.0, **arguments: Any) -> Json:
        return json.loads(json.dumps(answer(self.program, {"do": do, **arguments})))

    def close(self) -> None:
        pass


class Child:
    """A contender in a process of its own."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._tail = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, do: str, limit: float = 300.0, **arguments: Any) -> Json:
        """Tell it to do something; its answer, in which "error" says why it could not.

        Raises:
            Failed: it has died, or takes too long, and is ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Failed(f"{do}: its process has ended; {self._tail}") from None
        deadline = time.monotonic() + limit
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.close()
                raise Failed(f"{do}: no answer within {limit:g} s; {self._tail}") from None
            if line is None:
                self._lines.put(None)  # for whoever asks again
                raise Failed(f"{do}: its process has ended; {self._tail}")
            message = heard(line)
            if message is not None:
                return message
            self._tail = (self._tail + line)[-TAIL:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def answer(program: Any, message: Json) -> Json:
    """What a program says to a message; an error of its is an answer, too."""
    do = message.pop("do")
    try:
        return getattr(program, do)(**message) or {}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def serve(program: Any) -> None:
    """Answer what comes on standard input until it ends."""
    for line in sys.stdin:
        say(answer(program, json.loads(line)))


def random_batches(vocab: int, batch: int, length: int) -> list[Any]:
    """Pairs of inputs and targets (B, S)."""
    drawn = np.random.default_rng(1).integers(0, vocab, (BATCHES, 2, batch, length))
    return [(pair[0], pair[1]) for pair in drawn]


def configuration(preset: str, settings: list[str], micro_batch: int, device: str) -> Any:
    """A preset with other settings, and steps of one micro-batch."""
    from cupytron.config import load_config

    sizes = [f"train.micro_batch={micro_batch}", f"train.global_batch={micro_batch}"]
    return load_config(
        preset=preset,
        overrides=[*settings, *sizes, f"parallel.device={device}", "model.recompute=none"],
    )


class Bench:
    """The contenders, and the record of a case.

    Args:
        gpu: None, or the simulated one, on which everything runs in this process.
        torch_python: an interpreter with PyTorch, or None.
        path: of the record.
    """

    def __init__(self, record: Json, path: Path, gpu: Gpu | None, torch_python: str | None) -> None:
        self.record, self.path, self.gpu, self.torch_python = record, path, gpu, torch_python
        self.stack = contextlib.ExitStack()
        self.deadline = time.monotonic() + LIMIT

    def open(self, name: str) -> Contender:
        """Start a contender; it ends with the case."""
        contender: Contender
        if self.gpu is not None:
            contender = Here(self._program(name))
        elif name == "cupytron":
            contender = Child([sys.executable, str(HERE / "gpu_cupytron.py")])
        else:
            script = str(HERE / "gpu_torch.py")
            contender = Child([str(self.torch_python), script, *RIVALS[name]])
        self.stack.callback(contender.close)
        return contender

    def _program(self, name: str) -> Any:
        if name == "cupytron":
            from gpu_cupytron import Cupytron

            return Cupytron(self.gpu)
        from gpu_torch import Torch

        return Torch("cpu")

    def names(self, rivals: tuple[str, ...] = ("torch",)) -> list[str]:
        """The contenders that can be had here."""
        return ["cupytron", *(rivals if self.torch_python else ())]

    def left(self) -> float:
        """Seconds until the case should be over."""
        return self.deadline - time.monotonic()

    def told(self, answer: Json, what: str) -> Json:
        """An answer; Failed if it is an error."""
        if "error" in answer:
            raise Failed(f"{what}: {answer['error']}")
        return answer

    @property
    def dry(self) -> bool:
        """Whether this is a dry run, in which everything is as small as can be."""
        return self.gpu is not None

    def note(self, **values: Any) -> None:
        """Add to the record, and write it."""
        self.record.update(values)
        save(self.record, self.path)

    def say(self, text: str) -> None:
        print(text, flush=True)
