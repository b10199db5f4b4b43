"""What is paid for what is not used: one process on a CPU now, and at an earlier commit.

    python benchmarks/overhead.py [--rounds 12] [--setting A] [--since COMMIT]

The earlier commits by name: `mesh`, the last one that knew one process only, and `gpu`, the last one that
knew only CPUs. Both versions train a setting of `bench.py` with one thread, in turn; the median over rounds
of the ratio of the two fastest steps of a round. Fastest, since other work only ever adds. In setting A a
layer has least to do.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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


def seconds(place: Path, setting: str) -> float:
    """The time of a fast step (the twentieth part is faster) of the version that stands in a folder."""
    from settings import SETTINGS

    chosen = SETTINGS[setting]
    overrides = [f"{key}={str(value).lower()}" for key, value in chosen.items()]
    sizes = ("model.vocab_size", "train.micro_batch", "train.sequence_length")
    numbers = [str(STEPS[setting]), *(str(chosen[size]) for size in sizes)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, *numbers, *overrides],
        env={**os.environ, "PYTHONPATH": str(place)},  # it comes first in the child's path
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, found = done.stdout.split()[-2:]
    assert Path(loaded).is_relative_to(place), f"{loaded} is not in {place}"
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--setting", choices=STEPS, default="A")
    parser.add_argument("--since", default="gpu", metavar="mesh|gpu|COMMIT")
    arguments = parser.parse_args()
    since = BEFORE.get(arguments.since, arguments.since)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", since, "cupytron"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        ratios = []
        for number in range(arguments.rounds):
            # each goes first in every other round
            places = [Path(folder).resolve(), ROOT][:: 1 if number % 2 else -1]
            found = {place: seconds(place, arguments.setting) for place in places}
            before, now = found[Path(folder).resolve()], found[ROOT]
            ratios.append(now / before)
            print(f"round {number + 1}: before {before * 1e3:.2f} ms, now {now * 1e3:.2f} ms")
    change = (statistics.median(ratios) - 1) * 100
    print(f"since {since} a step of one process takes {change:+.1f}%")


if __name__ == "__main__":
    main()
