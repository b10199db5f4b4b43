"""Tiny data sets and runs for the tests of whole runs, in this process and in others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cupytron.config import load_config
from cupytron.data import prepare_dataset
from cupytron.run import train

TEXT = "".join(f"the {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(400))

TINY = [
    "model.num_layers=2",
    "model.num_heads=2",
    "model.d_model=16",
    "model.dropout=0.1",
    "train.sequence_length=16",
    "train.micro_batch=4",
    "train.global_batch=8",
    "train.max_steps=12",
    "train.eval_interval=5",
    "train.log_interval=1",
    "optim.warmup_steps=3",
    "checkpoint.interval=4",
    "checkpoint.keep=3",
    "parallel.blas_kernel=off",
]
ENVIRONMENT = {
    "threads": 1,
    "cores": 1,
    "blas_kernel": "x",
    "blas_kernel_found": None,
    "malloc": "as found",
    "processor": "x",
    "numpy": "2",
    "cupytron": "0",
}


def make_data(folder: Path, tokenizer: str = "char", text: str = TEXT) -> Path:
    """A prepared data set of about 18,000 characters."""
    source = folder / "text.txt"
    source.write_text(text)
    prepare_dataset([str(source)], folder / "data", tokenizer=tokenizer, val_fraction=0.1)
    return folder / "data"


def run_here(data: Path, out: Path, *settings: str, **options):
    """Train in this process; returns the outcome."""
    config = load_config(overrides=[*TINY, f'data.path="{data}"', *settings])
    return train(config, out, dict(ENVIRONMENT), **{"quiet": True, **options})


def command(data: Path, out: Path, *settings: str) -> list[str]:
    """The same as a command line."""
    flags = [word for s in (*TINY, *settings) for word in ("--set", s)]
    return [cupytron(), "train", "--data", str(data), "--out", str(out), "--threads", "1", *flags]


def cupytron() -> str:
    """The installed command."""
    return str(Path(sys.executable).with_name("cupytron"))


STARTED: list[subprocess.Popen] = []  # conftest ends what a failed test leaves running


def start(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command with its output collected."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment or {**os.environ},
    )
    STARTED.append(process)
    return process


def kill_when(process: subprocess.Popen, ready, signal_number: int = signal.SIGKILL) -> bool:
    """Send a signal as soon as ready() is true; False if the process ended before that."""
    while process.poll() is None:
        if ready():
            process.send_signal(signal_number)
            return True
        time.sleep(0.0005)
    return False
