"""What is paid for what is not used: one process on a CPU now, and at an earlier commit.

    python benchmarks/overhead.py [--rounds 12] [--setting A] [--since COMMIT] [--save]

The earlier commits by name: `mesh`, the last one that knew one process only, and `gpu`, the last one that
knew only CPUs. Both versions train a setting of `bench.py` with one thread, in turn; the median over rounds
of the ratio of the two fastest steps of a round. Fastest, since other work only ever adds. In setting A a
layer has least to do. With --save it is the fastest save of a run that saves after every step; the run's
sequences are short, since the size of a checkpoint does not depend on them.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from settings import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
BEFORE = {"mesh": "a47f729", "gpu": "4c00f5f"}
STEPS = {"A": 80, "B": 12, "C": 12}

CHILD = """
import sys, time
from cupytron.process import prepare
prepare(1)
import numpy as np
import cupytron
from cupytron.config import load_config
from cupytron.trainer import Trainer
trainer = Trainer(load_config(overrides=sys.argv[5:]))
trainer.materialize()
rng = np.random.default_rng(0)
vocabulary, batch, length = map(int, sys.argv[2:5])
inputs, targets = rng.integers(0, vocabulary, (2, batch, length))
times = []
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    trainer.train_step(inputs, targets)
    times.append(time.perf_counter() - began)
print(cupytron.__file__, sorted(times)[len(times) // 20])
"""

# a run whose saves are timed; the name _Run._save is the same in all versions that are compared
SAVES = 12
SAVING = """
import sys, time
from cupytron.process import prepare
environment = prepare(1)
import cupytron
from cupytron import run
from cupytron.config import load_config
times, save = [], run._Run._save
def timed(self, *arguments, **more):
    began = time.perf_counter()
    save(self, *arguments, **more)
    times.append(time.perf_counter() - began)
run._Run._save = timed
run.train(load_config(overrides=sys.argv[3:]), sys.argv[2], environment, quiet=True)
assert len(times) >= int(sys.argv[1])
print(cupytron.__file__, min(times))
"""


def seconds(place: Path, setting: str) -> float:
    """The time of a fast step (the twentieth part is faster) of the version that stands in a folder."""
    chosen = SETTINGS[setting]
    sizes = ("model.vocab_size", "train.micro_batch", "train.sequence_length")
    numbers = [str(STEPS[setting]), *(str(chosen[size]) for size in sizes)]
    return measured(place, [CHILD, *numbers, *overrides(chosen)])


def save_seconds(place: Path, setting: str, data: Path) -> float:
    """The time of the fastest save of the version that stands in a folder."""
    short = {"train.sequence_length": 16, "train.micro_batch": 1, "train.max_steps": SAVES}
    # the vocabulary is that of the data
    chosen = {key: value for key, value in SETTINGS[setting].items() if key != "model.vocab_size"}
    chosen |= short | {"checkpoint.interval": 1, "checkpoint.keep": 2, "data.path": data}
    with tempfile.TemporaryDirectory() as out:
        return measured(place, [SAVING, str(SAVES), f"{out}/run", *overrides(chosen)])


def overrides(chosen: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, default=str)}" for key, value in chosen.items()]


def measured(place: Path, command: list[str]) -> float:
    done = subprocess.run(
        [sys.executable, "-P", "-c", *command],
        env={**os.environ, "PYTHONPATH": str(place)},  # it comes first in the child's path
        cwd=place,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{place}: {done.stderr}")
    loaded, found = done.stdout.split()[-2:]
    assert Path(loaded).is_relative_to(place), f"{loaded} is not in {place}"
    return float(found)


def prepared(folder: Path) -> Path:
    """A data set of bytes, which any version reads."""
    text, data = folder / "text", folder / "data"
    text.write_text("All of this text stands for any other. " * 1000)
    cupytron = Path(sys.executable).with_name("cupytron")
    subprocess.run(
        [cupytron, "data", "prepare", text, "--out", data], check=True, capture_output=True
    )
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--setting", choices=STEPS, default="A")
    parser.add_argument("--since", default="gpu", metavar="mesh|gpu|COMMIT")
    parser.add_argument("--save", action="store_true", help="time saves in place of steps")
    arguments = parser.parse_args()
    since = BEFORE.get(arguments.since, arguments.since)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", since, "cupytron"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        earlier = Path(folder).resolve()
        measure = seconds
        if arguments.save:
            measure = functools.partial(save_seconds, data=prepared(earlier))
        ratios = []
        for number in range(arguments.rounds):
            # each goes first in every other round
            places = [earlier, ROOT][:: 1 if number % 2 else -1]
            found = {place: measure(place, arguments.setting) for place in places}
            before, now = found[earlier], found[ROOT]
            ratios.append(now / before)
            print(f"round {number + 1}: before {before * 1e3:.2f} ms, now {now * 1e3:.2f} ms")
    change = (statistics.median(ratios) - 1) * 100
    what = "save" if arguments.save else "step"
    print(f"since {since} a {what} of one process takes {change:+.1f}%")


if __name__ == "__main__":
    main()
