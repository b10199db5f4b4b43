"""Measured pipeline bubbles beside the predicted ones.

    mpirun -n 4 python benchmarks/pipelines.py          layers that take set times, in every schedule
    python benchmarks/pipelines.py --threads            the same, with ranks that are threads
    mpirun -n 2 python benchmarks/pipelines.py --real   a small Transformer on two stages
    python benchmarks/pipelines.py --real               and in one process

The exit code is 1 if a bubble of set times is more than 10 % away from the predicted one. --out adds to
what other runs have written to the file; --pictures draws the first set of times.
"""
# ruff: noqa: E402  the process is prepared before NumPy is imported

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cupytron.process import prepare

prepare(threads=1, blas_kernel="auto" if "--real" in sys.argv else "off")

import numpy as np
from bench import machine, versions

from cupytron import ParallelContext, Zero, cut, open_world, run_ranks
from cupytron.comm import Communicator
from cupytron.config import load_config
from cupytron.layer import Chain, Parameter, normal
from cupytron.nn import Embedding, Head, Linear
from cupytron.parallel import checker, gantt, schedules
from cupytron.parallel.checker import Span, Timeline
from cupytron.parallel.pipeline import Pipeline
from cupytron.stash import Stash
from cupytron.trace import Record, Trace, bubble
from cupytron.trainer import Trainer

THREADS, MICRO_BATCHES = 4, 8
SET_TIMES = ((1.0, 1.0, 1.0), (1.0, 1.5, 0.5))  # F, B and W
MOST = 0.1  # that a measured bubble may be away from the predicted one
VOCAB, SEQUENCE = 256, 128
TRANSFORMER = (
    "model.num_layers=8",
    "model.num_heads=4",
    "model.d_model=256",
    f"model.vocab_size={VOCAB}",
    f"train.sequence_length={SEQUENCE}",
    "train.micro_batch=4",
    f"train.global_batch={4 * MICRO_BATCHES}",
)
WARMUP = 2  # steps of the Transformer that are not counted: first allocations, page faults


class Slow(Linear):
    """A tiny linear layer; times: what its F, B and W take, in seconds."""

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__(8, 8)
        self.f, self.b, self.w = times

    def forward(self, x: Any, stash: Stash) -> Any:
        time.sleep(self.f)
        return super().forward(x, stash)

    def backward(self, dy: Any, stash: Stash) -> Any:
        time.sleep(self.b)
        stash.then(lambda: time.sleep(self.w))  # later, where the schedule puts W off
        return super().backward(dy, stash)


class SlowModel(Chain):
    """ids (T,) -> embedding -> slow layers -> head -> logits (T, 8)."""

    def __init__(self, count: int, times: Sequence[float]) -> None:
        self.embedding = Embedding(8, 8)
        self.layers = {i: Slow(times) for i in range(count)}
        self.head = Head(Parameter((8, 8), normal(0.1)))

    def loss(self, logits: Any, targets: Any, scale: float) -> float:
        return self.head.loss(logits, targets, scale)


def run_slow(
    context: ParallelContext, schedule: schedules.Schedule, times: Sequence[float], steps: int
) -> list[Timeline]:
    """Train a SlowModel; what all stages did in each step. Collective. All times are in milliseconds."""
    layers, parts = 2 * context.pp.size, schedule.placement.parts
    counts = [layers // parts] * parts
    counts[0] += 1  # the embedding; the last part has the head, too
    counts[-1] += 1
    model = SlowModel(layers, [t / 1e3 / 2 for t in times])
    pipeline = Pipeline(model, context.pp, context.ends, schedule.name, counts=counts)
    zero = Zero(model, context, pipeline=pipeline)
    zero.materialize(seed=1, dtype="float32")
    ids = np.arange(MICRO_BATCHES * 8).reshape(MICRO_BATCHES, 8) % 8
    work = cut(ids, ids, micro_batch=1)
    trace = pipeline.trace = Trace(1, 1 + steps)
    for number in range(1 + steps):
        with trace.step(number, context):
            # step 0 is for the shapes of messages, which one micro-batch tells
            zero.compute_gradients(work if number else work[:1], scale=1 / ids.size)
        zero.clear_gradients()
    records = gather(trace, context)
    found = [[span for record in records for span in record.spans[n]] for n in trace.steps]
    return [checker.timeline([Span(s, a, 1e3 * t, 1e3 * u) for s, a, t, u in x]) for x in found]


def gather(trace: Trace, context: ParallelContext) -> list[Record]:
    """What each rank has traced. Collective."""
    return context.world.gather_objects(trace.record(context))


def measure_slow(world: Communicator, arguments: argparse.Namespace) -> dict:
    """All schedules with all sets of times. Collective."""
    context = ParallelContext(pp=world.size, world=world)
    found: dict = {}
    for ratios in SET_TIMES:
        times = [arguments.unit * ratio for ratio in ratios]
        label = "F = {:g}, B = {:g}, W = {:g} ms".format(*times)
        found[label] = {}
        say(world, f"\n{label:<43}longer by")
        say(world, "schedule     predicted  measured  ratio    actions  starts   of each step")
        for name in schedules.NAMES:
            schedule = schedules.make(name, world.size, MICRO_BATCHES)
            steps = run_slow(context, schedule, times, arguments.steps)
            predicted = checker.predict(schedule, *times)
            median = sorted(steps, key=lambda step: step.bubble)[len(steps) // 2]
            figures = found[label][name] = compare(schedule, predicted, median)
            p, m, ratio, actions, starts = figures.values()
            row = f"{name:<13}{p:8.1%}{m:10.1%}{ratio:8.3f}{actions:10.1%}{starts:8.1%}  "
            say(world, " ".join([row, *(f"{step.bubble:.1%}" for step in steps)]))
            if arguments.pictures and world.rank == 0 and ratios == SET_TIMES[0]:
                about = f"{name}, {world.size} stages, {MICRO_BATCHES} micro-batches, {label}"
                for kind, timeline in (("predicted", predicted), ("measured", median)):
                    title = f"{about}: {kind} bubble {timeline.bubble:.1%}"
                    path = arguments.pictures / f"{name}-{kind}.svg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(gantt.svg(timeline, title) + "\n", encoding="ascii")
    return found


def compare(schedule: schedules.Schedule, predicted: Timeline, measured: Timeline) -> dict:
    """Both bubbles, and why the step took longer than predicted, in parts of that.

    Actions took longer: simulated with what each of them took. They started later than they could.
    """
    took = {(span.stage, span.action): span.end - span.start for span in measured.spans}
    prompt = checker.simulate(schedule, lambda stage, action: took[stage, action])
    return {
        "predicted": predicted.bubble,
        "measured": measured.bubble,
        "ratio": measured.bubble / predicted.bubble,
        "longer_by_actions": (prompt.total - predicted.total) / predicted.total,
        "longer_by_starts": (measured.total - prompt.total) / predicted.total,
    }


def measure_real(world: Communicator, arguments: argparse.Namespace) -> dict:
    """A Transformer on as many stages as there are ranks. Collective.

    The bubble is predicted from the mean times of the actions on each stage.
    """
    context = ParallelContext(pp=world.size, world=world)
    found: dict = {}
    say(world, "schedule     predicted  measured   ms a step  mean ms of actions")
    for name in ("1f1b", "zb-h1") if world.size > 1 else ("1f1b",):
        overrides = [*TRANSFORMER, f"parallel.pp={world.size}", f"parallel.schedule={name}"]
        trainer = Trainer(load_config(overrides=overrides, ranks=world.size), None, context)
        trainer.materialize()
        rng = np.random.default_rng(1)
        trace = trainer.zero.pipeline.trace = Trace(WARMUP, WARMUP + arguments.steps)
        each = []
        for number in range(trace.last):
            inputs, targets = rng.integers(0, VOCAB, (2, 4 * MICRO_BATCHES, SEQUENCE))
            world.barrier()
            began = time.perf_counter()
            with trace.step(number, context):
                trainer.train_step(inputs, targets)
            each.append(1e3 * (time.perf_counter() - began))
        records = gather(trace, context)
        measured, predicted = bubble(records, schedules.make(name, world.size, MICRO_BATCHES))
        took = defaultdict(list)
        for record in records:
            for stage, action, start, end in itertools.chain(*record.spans.values()):
                took[f"{action.kind} on stage {stage}"].append(1e3 * (end - start))
        ms, means = statistics.median(each[WARMUP:]), {k: statistics.fmean(took[k]) for k in took}
        found[name] = {
            "predicted": predicted,
            "measured": measured,
            "ms_per_step": ms,
            "ms_of_each_step": each[WARMUP:],
            "ms_of_actions": means,
        }
        row = f"{name:<13}{predicted:8.1%}{measured:10.1%}{ms:12.0f}  "
        say(world, row + ", ".join(f"{key} {value:.1f}" for key, value in means.items()))
    return found


def say(world: Communicator, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def write(path: Path, arguments: argparse.Namespace, size: int, facts: dict, found: dict) -> None:
    """Put a run's figures into a file, beside those of other runs."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record["versions"] = versions(None)
    ranks = f"{size} threads" if arguments.threads else f"{size} process{'es' * (size > 1)}"
    record.setdefault("real" if arguments.real else "set_times", {})[ranks] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "steps": arguments.steps,
        "schedules": found,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="a Transformer")
    parser.add_argument("--threads", action="store_true", help=f"{THREADS} ranks that are threads")
    parser.add_argument("--unit", type=float, default=120, metavar="MS", help="F of a stage")
    parser.add_argument("--steps", type=int, default=3, help="that are measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the figures to this JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write SVGs here")
    arguments = parser.parse_args()
    facts = machine()
    measure = measure_real if arguments.real else measure_slow
    if arguments.threads:
        rank, size = 0, THREADS
        found = run_ranks(size, lambda world: measure(world, arguments), timeout=600)[0]
    else:
        with open_world() as world:
            rank, size = world.rank, world.size
            found = measure(world, arguments)
    if rank == 0 and arguments.out:
        write(arguments.out, arguments, size, facts, found)
    bubbles = [] if arguments.real else [f for of_set in found.values() for f in of_set.values()]
    return int(any(abs(f["ratio"] - 1) > MOST for f in bubbles))


if __name__ == "__main__":
    sys.exit(main())
