"""What a run tells: metrics.jsonl, progress on the terminal, arithmetic per second."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from cupytron.config import ModelConfig, flops_per_token


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    try:
        # getrusage's figure begins with that of the process that started this one; this does not
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Speed:
    """Tokens and floating-point operations per second, since the last call of `read`."""

    def __init__(self, model: ModelConfig, sequence_length: int) -> None:
        # two conventions: attention counted whole (nanoGPT), and its causal half (llm.c)
        self._flops = tuple(
            flops_per_token(model, sequence_length, causal) for causal in (False, True)
        )
        self._tokens = 0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """tokens_per_second, gflops_per_second and gflops_per_second_causal; counting starts again."""
        rate = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        return {"tokens_per_second": rate, **gflops(rate, self._flops)}


def gflops(tokens_per_second: float, flops: tuple[float, ...]) -> dict[str, float]:
    """Both conventions of arithmetic per second, in units of 1e9."""
    whole, causal = flops
    return {
        "gflops_per_second": tokens_per_second * whole / 1e9,
        "gflops_per_second_causal": tokens_per_second * causal / 1e9,
    }


class MetricsWriter:
    """metrics.jsonl, an object a line; written out about once a second and before every save."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._flushed = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


class Progress:
    """Lines about a run: one that renews itself on a terminal, plain ones otherwise.

    Args:
        live: False: plain lines always. A launcher may show a terminal where there is none.
    """

    def __init__(self, max_steps: int, quiet: bool = False, live: bool = True) -> None:
        self._max_steps = max_steps
        self._quiet = quiet
        self._live = live and not quiet and sys.stdout is not None and sys.stdout.isatty()
        self._began = time.monotonic()
        self._first: int | None = None
        self._console: Any = None
        self._status: Any = None
        if self._live:
            from rich.console import Console

            self._console = Console(highlight=False)
            self._status = self._console.status("", refresh_per_second=4)
            self._status.start()

    def step(self, record: dict[str, Any]) -> None:
        """Show a training record."""
        if self._first is None:
            self._first, self._began = record["step"], time.monotonic()
        text = (
            f"step {record['step']:>{len(str(self._max_steps))}}/{self._max_steps}"
            f"  loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}"
            f"  {record['tokens_per_second']:,.0f} tokens/s"
            f"  {record['gflops_per_second']:,.0f}/{record['gflops_per_second_causal']:,.0f}"
            f" GFLOP/s  {record['peak_memory_bytes'] / 2**20:,.0f} MB  left {self._left(record['step'])}"
        )
        if not self._live or record["step"] == self._max_steps:
            self.line(text)
        if self._live:
            self._status.update(text)

    def _left(self, step: int) -> str:
        done = step - (self._first or 0)
        if done < 1:
            return "?"
        seconds = (time.monotonic() - self._began) / done * (self._max_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(int(minutes), 60)
        return f"{hours}:{minutes:02d}:{int(seconds):02d}"

    def line(self, text: str) -> None:
        """Show a line that stays."""
        if self._quiet:
            return
        try:
            if self._live:
                self._console.print(text, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """The terminal or the pipe has gone: that must not end the run."""
        self._quiet, self._live = True, False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # what is still buffered goes there when the process ends
        os.close(nowhere)

    def close(self) -> None:
        if self._live:
            self._live = False
            self._status.stop()
