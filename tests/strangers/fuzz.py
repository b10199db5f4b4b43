"""Inputs that a stranger may have made: valid ones, mutated, each read in a process with limits.

python tests/strangers/fuzz.py KIND SEED        # one input again, with its traceback
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import runs

SECONDS = 10
MEMORY = 1 << 30  # more than what the process has at its start
BATCH = 25  # inputs of one process

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    -(10**18),
    "",
    "x",
    "\x1b[2J\u202e",
    [],
    {},
    [[]],
]
VALUES += ["../../x", "/dev/zero", {"a": {"b": []}}, 1e308, "9" * 400, [0] * 1000]
PARTS = [
    b"\x00",
    b"\xff\xfe",
    b"\x1b]0;x\x07",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 2000,
    b"\n" * 500,
    b"-1",
]


class Kind(NamedTuple):
    """A kind of input: where it lies below a folder of valid ones, and what reads it."""

    file: str
    read: Callable[[Path], object]
    sealed: bool = False


# mutations


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few flips, cuts, repeats and strange parts."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice([1, 4, 30, 300]))
        what = rng.randrange(5)
        if what == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del content[at:end]
        elif what == 2:
            content[at:at] = content[at:end] * rng.choice([1, 3, 200])
        elif what == 3:
            content[at:at] = rng.choice(PARTS)
        else:
            content[at:end] = rng.randbytes(end - at)
    return bytes(content)


def changed(value: Any, rng: random.Random) -> Any:
    """JSON in which a few values, keys or lengths are others."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 2, 4])):
        holders, pending = [], [value]
        while pending:
            part = pending.pop()
            if isinstance(part, dict | list) and part:
                holders.append(part)
                pending.extend(part.values() if isinstance(part, dict) else part)
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        what = rng.randrange(4)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, list):
            holder.extend(holder[:50])
        else:
            holder[key] = rng.choice(VALUES)
    return value


def mutate(path: Path, kind: Kind, rng: random.Random) -> None:
    """Replace a valid file by a mutated one."""
    data = path.read_bytes()
    is_json = path.suffix == ".json"
    if kind.sealed and rng.random() < 0.8:
        from cupytron.manifest import seal

        path.write_bytes(seal(changed(json.loads(data)["body"], rng)))
    elif is_json and rng.random() < 0.7:
        path.write_text(json.dumps(changed(json.loads(data), rng)))
    else:
        path.write_bytes(damaged(data, rng))


# kinds


def command(line: str) -> Callable[[Path], object]:
    """What runs a command on the folder; its arguments name files in it by {}."""

    def read(folder: Path) -> object:
        from cupytron.cli.main import _call

        return _call([word.format(folder) for word in line.split()], set())

    return read


def tokenizer(folder: Path) -> object:
    from cupytron.data.tokenizers import load_tokenizer

    found = load_tokenizer(folder / "tokenizer.json")
    return found.decode(found.encode("the quick brown fox\n" * 3))


def every_tokenizer(folder: Path) -> object:
    (folder / "tokenizer.json").write_bytes((folder / "bpe.json").read_bytes())
    return tokenizer(folder)


CHECKPOINT = "run/checkpoints/step-00000002"
KINDS = {
    "settings": Kind("settings.toml", command("config show --config {}/settings.toml")),
    "run-settings": Kind("run/config.toml", command("train --out {}/run --max-steps 2 --quiet")),
    "manifest-verify": Kind(
        f"{CHECKPOINT}/manifest.json", command("checkpoint verify {}/run"), True
    ),
    "manifest-digest": Kind(
        f"{CHECKPOINT}/manifest.json", command("checkpoint digest {}/run"), True
    ),
    "manifest-eval": Kind(f"{CHECKPOINT}/manifest.json", command("eval {}/run"), True),
    "manifest-train": Kind(
        f"{CHECKPOINT}/manifest.json", command("train --out {}/run --max-steps 2 --quiet"), True
    ),
    "tensors": Kind(f"{CHECKPOINT}/rank-00000.safetensors", command("checkpoint verify {}/run")),
    "metrics-report": Kind("run/metrics.jsonl", command("report {}/run --no-sample --text")),
    "metrics-compare": Kind(
        "run/metrics.jsonl", command("compare {}/run {}/run2 --out {}/compare.html")
    ),
    "environment": Kind("run/environment.json", command("report {}/run --no-sample")),
    "sidecar": Kind("data/train.json", command("data inspect {}/data")),
    "ids": Kind("data/val.bin", command("data inspect {}/data")),
    "tokenizer": Kind("tokenizer.json", tokenizer),
    "bpe": Kind("bpe.json", every_tokenizer),
    "text": Kind("source.txt", command("data prepare {}/source.txt --out {}/new")),
    "lines": Kind("source.jsonl", command("data prepare {}/source.jsonl --out {}/new")),
    "array": Kind(
        "source.npy", command("data prepare {}/source.npy --vocab-size 300 --out {}/new")
    ),
    "bin": Kind("source.bin", command("data prepare {}/source.bin --vocab-size 300 --out {}/new")),
}


def make(folder: Path) -> None:
    """Valid inputs of every kind."""
    import numpy as np

    from cupytron.data import prepare_dataset

    data = runs.make_data(folder, text=runs.TEXT[:4000])
    runs.run_here(data, folder / "run", "train.max_steps=2")
    shutil.copytree(folder / "run", folder / "run2")
    shutil.copy(folder / "run" / "config.toml", folder / "settings.toml")
    shutil.copy(data / "tokenizer.json", folder / "tokenizer.json")
    (folder / "source.txt").write_text(runs.TEXT[:3000])
    rows = [json.dumps({"text": f"line {i} " * 5}) for i in range(60)]
    (folder / "source.jsonl").write_text("\n".join(rows) + "\n")
    np.save(folder / "source.npy", np.arange(3000, dtype=np.uint16) % 300)
    (np.arange(3000, dtype=np.uint16) % 300).tofile(folder / "source.bin")
    prepare_dataset([str(folder / "source.txt")], folder / "with-bpe", tokenizer="bpe:300")
    shutil.copy(folder / "with-bpe" / "tokenizer.json", folder / "bpe.json")


# running


def attempt(made: Path, name: str, seed: int) -> None:
    """Read one mutated input; errors that a user can mend are fine.

    Raises:
        Exception: any other.
    """
    import click

    from cupytron.cli.main import _message
    from cupytron.data import DataError
    from cupytron.errors import ConfigError, CupytronError

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "inputs"
        shutil.copytree(made, folder, symlinks=True)
        # a run names its data by their absolute path
        config = folder / "run" / "config.toml"
        config.write_text(config.read_text().replace(str(made), str(folder)))
        mutate(folder / KINDS[name].file, KINDS[name], random.Random(f"{name} {seed}"))
        try:
            KINDS[name].read(folder)
        except (CupytronError, DataError, click.ClickException, OSError) as error:
            lines = _message(error).splitlines()
            limit = 25 if isinstance(error, ConfigError) else 1
            assert 1 <= len(lines) <= limit, lines
        except click.exceptions.Exit:
            pass


def run(made: Path, jobs: list[tuple[str, int]]) -> list[str]:
    """Try inputs in processes of BATCH each; a line for each that ended badly."""
    wrong = []
    while jobs:
        batch, jobs = jobs[:BATCH], jobs[BATCH:]
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(made, batch, writing)
        os.close(writing)
        with open(reading, encoding="utf-8") as file:
            said = file.read().splitlines()
        _, status = os.waitpid(pid, 0)
        began = [line for line in said if line.startswith("begin ")]
        wrong += [line.removeprefix("wrong ") for line in said if line.startswith("wrong ")]
        if status and began:
            name, seed = began[-1].split()[1:]
            wrong.append(
                f"{name} {seed}: the process ended with status {status} (a hang, or memory)"
            )
            jobs = batch[len(began) :] + jobs
        elif status:
            raise RuntimeError(f"a process ended with status {status} before its first input")
    return wrong


def _child(made: Path, batch: list[tuple[str, int]], writing: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name, seed in batch:
        os.write(writing, f"begin {name} {seed}\n".encode())
        signal.alarm(SECONDS)
        try:
            attempt(made, name, seed)
        except BaseException:
            last = " | ".join(traceback.format_exc().splitlines()[-3:])
            os.write(writing, f"wrong {name} {seed}: {last[:400]}\n".encode(errors="replace"))
        signal.alarm(0)
    os._exit(0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as there:
        make(Path(there))
        attempt(Path(there), sys.argv[1], int(sys.argv[2]))
