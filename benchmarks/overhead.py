"""What the mesh costs where there is none: one process now, and at the last commit that knew only one.

    python benchmarks/overhead.py [--rounds 12]

Both versions train setting A (where a layer has least to do) with one thread, in turn; the median over
rounds of the ratio of the two fastest steps of a round. Fastest, since other work only ever adds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "a47f729"  # the foundation's last commit
STEPS = 80

CHILD = """
import sys, time
from cupytron.process import prepare
prepare(1)
import numpy as np
import cupytron
from cupytron.config import load_config
from cupytron.trainer import Trainer
trainer = Trainer(load_config(overrides=sys.argv[2:]))
trainer.materialize()
rng = np.random.default_rng(0)
inputs, targets = rng.integers(0, 65, (2, 12, 64))
times = []
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    trainer.train_step(inputs, targets)
    times.append(time.perf_counter() - began)
print(cupytron.__file__, sorted(times)[len(times) // 20])
"""


def seconds(place: Path) -> float:
    """The time of a fast step (the twentieth part is faster) of the version that stands in a folder."""
    from settings import SETTINGS

    overrides = [f"{key}={str(value).lower()}" for key, value in SETTINGS["A"].items()]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(STEPS), *overrides],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=place,  # it comes first in the child's path
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
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", BEFORE, "cupytron"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        ratios = []
        for number in range(rounds):
            # each goes first in every other round
            places = [Path(folder).resolve(), ROOT][:: 1 if number % 2 else -1]
            found = {place: seconds(place) for place in places}
            before, now = found[Path(folder).resolve()], found[ROOT]
            ratios.append(now / before)
            print(f"round {number + 1}: before {before * 1e3:.2f} ms, now {now * 1e3:.2f} ms")
    print(f"the mesh costs one process {(statistics.median(ratios) - 1) * 100:+.1f}%")


if __name__ == "__main__":
    main()
