"""Where the time of a step goes: each operation's time on the device, bytes, and share of its ceiling."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from gpu_costs import Cost, of_call
from gpu_report import Gpu, Json, markdown
from gpu_timing import Ceilings, busy

UPDATES = ("squares", "adamw", "sgd")  # of kernels.optimizer


class Call(NamedTuple):
    """One call of an operation: events before and behind it."""

    name: str
    cost: Cost
    start: Any
    stop: Any


@contextlib.contextmanager
def watched(gpu: Gpu) -> Iterator[list[Call]]:
    """Every call of a function in ops, and of the optimizer's kernels, meanwhile."""
    from cupytron import ops
    from cupytron.kernels import optimizer

    calls: list[Call] = []

    def watching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            event = gpu.cupy.cuda.Event
            start, stop = event(), event()
            start.record()
            result = function(*arguments, **named)
            stop.record()
            cost = of_call(name, function, arguments, named, result)
            calls.append(Call(name, cost, start, stop))
            return result

        return call

    table = {name: getattr(ops, name) for name in ops.REFERENCE}
    updates = {name: getattr(optimizer, name) for name in UPDATES}
    ops.use({name: watching(name, function) for name, function in table.items()})
    for name, function in updates.items():
        setattr(optimizer, name, watching(name, function))
    try:
        yield calls
    finally:
        ops.use(table)
        for name, function in updates.items():
            setattr(optimizer, name, function)


def profile(gpu: Gpu, trainer: Any, batches: Callable[[], tuple[Any, Any]], steps: int) -> Json:
    """Operations of a step that runs kernel by kernel, the longest first; medians of the steps.

    The device is kept busy until Python has enqueued the whole step, so that no gap counts.

    Args:
        trainer: on the GPU, without graphs. batches: makes inputs and targets of a step.
    """
    device = trainer.context.device
    for _ in range(3):
        began = time.perf_counter()
        trainer.start_step(*batches())
        host = time.perf_counter() - began
        device.stream.synchronize()
    runs: list[Json] = []
    whole: list[float] = []
    for _ in range(steps):
        event = gpu.cupy.cuda.Event
        start, stop = event(), event()
        with watched(gpu) as calls:
            busy(gpu, 3 * host + 0.05)
            start.record(device.stream)
            trainer.start_step(*batches())
            stop.record(device.stream)
            device.stream.synchronize()
        elapsed = gpu.cupy.cuda.get_elapsed_time
        whole.append(float(elapsed(start, stop)) / 1e3)
        runs.append(_summed(calls, elapsed))
    medians = {
        name: {**figures, "seconds": float(np.median([run[name]["seconds"] for run in runs]))}
        for name, figures in runs[-1].items()
    }
    total = float(np.median(whole))
    rest = total - sum(figures["seconds"] for figures in medians.values())
    medians["everything else"] = {"calls": 0, "bytes": 0.0, "flops": 0.0, "seconds": rest}
    return {
        "step_seconds": total,
        "operations": dict(sorted(medians.items(), key=lambda item: -item[1]["seconds"])),
    }


def _summed(calls: list[Call], elapsed: Callable[[Any, Any], float]) -> Json:
    found: Json = {}
    for call in calls:
        row = found.setdefault(call.name, {"calls": 0, "bytes": 0.0, "flops": 0.0, "seconds": 0.0})
        row["calls"] += 1
        row["bytes"] += call.cost.nbytes
        row["flops"] += call.cost.flops
        row["seconds"] += float(elapsed(call.start, call.stop)) / 1e3
    return found


def table(found: Json, ceilings: Ceilings) -> str:
    """The operations of `profile` beside what the shapes ask for."""
    rows = []
    for name, row in found["operations"].items():
        seconds = max(row["seconds"], 1e-12)
        floor = ceilings.floor(row["bytes"], row["flops"])
        rows.append(
            (
                name,
                row["calls"] or "",
                f"{seconds * 1e3:.3f}",
                f"{seconds / found['step_seconds']:.1%}",
                f"{row['bytes'] / seconds / 1e12:.2f}" if row["bytes"] else "",
                f"{row['flops'] / seconds / 1e12:.0f}" if row["flops"] else "",
                f"{floor / seconds:.0%}" if floor else "",
            )
        )
    rows.append(("the step", "", f"{found['step_seconds'] * 1e3:.3f}", "100%", "", "", ""))
    return markdown(("operation", "calls", "ms", "share", "TB/s", "TFLOP/s", "of ceiling"), rows)


def table_of_torch(found: Json) -> str:
    """The longest kernels of a step of PyTorch."""
    rows = [
        (kernel["name"][:70], f"{kernel['calls']:g}", f"{kernel['seconds'] * 1e3:.3f}")
        for kernel in found["kernels"]
    ]
    rows.append(("all kernels", "", f"{found['seconds_of_kernels'] * 1e3:.3f}"))
    return markdown(("PyTorch's kernel", "calls", "ms"), rows)
