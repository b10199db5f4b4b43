"""Everything that can be checked on a GPU, with one command.

    python benchmarks/gpu_check.py [GROUP ...] [--out FOLDER] [--jobs N]
    python benchmarks/gpu_check.py --simulated            a dry run without a GPU, with tiny sizes

Each group of checks has a process of its own, so that one that crashes or hangs hides no other. A line
tells of each check as it ends; the record is FOLDER/gpu-check-DATE.json, and the exit code is 1 if one has
failed.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable

import gpu_facts
import gpu_kernel_checks
import gpu_model_checks
import gpu_rank_checks
import gpu_run_checks
from gpu_children import Group, Json, main_of_child, run_groups
from gpu_report import (
    Gpu,
    add_options,
    begin,
    find_tests,
    has_gpu,
    healthy,
    open_gpu,
    path_for,
    save,
    shown,
)

from cupytron.process import available_cores

Checks = dict[str, Callable[[], Json | None]]

LIMIT = 180.0  # seconds for one check
ALONE = ("memory",)  # takes all of the device's
# threads of each process's BLAS: several run at once, and compare with the CPU
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}


def facts(gpu: Gpu) -> Checks:
    return {name: functools.partial(fact, gpu) for name, fact in gpu_facts.FACTS.items()}


# by the name of a group: its checks
GROUPS: dict[str, Callable[[Gpu], Checks]] = {
    "facts": facts,
    **{
        f"{dtype}-{number}": functools.partial(gpu_kernel_checks.checks, dtype=dtype, module=module)
        for dtype in gpu_kernel_checks.LIMITS
        for number, module in enumerate(gpu_kernel_checks.MODULES, start=1)
    },
    "models": gpu_model_checks.checks,
    "runs": gpu_run_checks.checks,
    "memory": gpu_run_checks.memory_checks,
    "threads": gpu_rank_checks.thread_checks,
    "processes": gpu_rank_checks.process_checks,
}


def groups_of(names: list[str], simulated: bool) -> list[Group]:
    """The longest ones come first, so that none is left alone at the end."""
    order = [*(n for n in ("processes", "threads", "models", "runs") if n in names), *names]
    command = [sys.executable, __file__, *(["--simulated"] if simulated else []), "--child"]
    # what the checks are called can be told without a GPU
    nothing = Gpu(None, simulated=simulated, tiny=simulated)
    find_tests()
    return [
        Group(name, [*command, name], list(GROUPS[name](nothing)), LIMIT, ENVIRONMENT)
        for name in dict.fromkeys(order)
    ]


def tell(name: str, outcome: Json) -> None:
    text = outcome.get("why") or shown(outcome["found"])
    print(f"{outcome['status']:7} {name}  {text[:300]}  [{outcome['seconds']:.1f} s]", flush=True)


def summary(record: Json) -> str:
    """What failed, once more, and how many there were."""
    checks = record["checks"]
    lines = [
        f"{outcome['status']} {name}: {outcome.get('why', '')[:400]}"
        for status in ("skipped", "FAILED")
        for name, outcome in checks.items()
        if outcome["status"] == status
    ]
    counts = {
        status: sum(outcome["status"] == status for outcome in checks.values())
        for status in ("ok", "FAILED", "skipped")
    }
    lines.append(
        f"{counts['ok']} checks hold, {counts['FAILED']} failed, {counts['skipped']} skipped, "
        f"{record['seconds']:.0f} s"
    )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=" ".join(GROUPS))
    jobs = max(1, min(6, available_cores() // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help="processes at a time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args(words)
    if arguments.child:
        group, *names = arguments.groups
        with open_gpu(arguments.simulated) as gpu:
            return main_of_child(GROUPS[group](gpu), names, lambda: healthy(gpu))
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; choose from {' '.join(GROUPS)}")
    if not has_gpu(arguments.simulated):
        return 1
    record = begin(arguments.simulated)
    began = time.monotonic()
    groups = groups_of(arguments.groups or list(GROUPS), arguments.simulated)
    path = path_for(record, arguments.out, "gpu-check")
    record["checks"] = {}

    def note(name: str, outcome: Json) -> None:
        tell(name, outcome)
        record["checks"][name] = outcome
        record["seconds"] = round(time.monotonic() - began, 1)
        save(record, path)

    together = [group for group in groups if group.name not in ALONE]
    run_groups(together, arguments.jobs, note)
    run_groups([group for group in groups if group.name in ALONE], 1, note)
    save(record, path, last=True)
    print(f"\n{summary(record)}\nwritten: {path}")
    return int(any(outcome["status"] == "FAILED" for outcome in record["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
