"""Ranks that share the GPU: meshes of threads and of processes against one process (cupytron verify)."""

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpu_children import PYTHON, Failed, Json, Skipped, hold, said_with_mpi
from gpu_report import Gpu
from gpu_run_checks import command

# flags of cupytron verify, by ranks; the model is tiny, and the numbers are float64's
MESHES = {
    2: [
        "--tp 2",
        "--tp 2 --sp --set model.family=llama --set model.num_kv_heads=2",
        *(f"--dp 2 --zero {stage}" for stage in range(4)),
        "--pp 2",
        "--pp 2 --schedule zb-h1",
        "--tp 2 --dtype float32",
    ],
    4: [
        "--tp 2 --dp 2 --zero 1 --sp",
        "--dp 4 --zero 3",
        "--pp 2 --tp 2",
        "--pp 2 --dp 2 --zero 2 --set model.family=llama",
    ],
}
TINY_MESHES = ["--tp 2 --num-layers 1"]
CUPYTRON = [*PYTHON, "from cupytron.cli.main import run; run()"]


def _verify_words(cases: list[str], folder: Path) -> list[str]:
    file = folder / "cases.txt"
    file.write_text("\n".join(cases) + "\n")
    flags = ["--device", "cuda", "--autotune", "off", "--blas-kernel", "off"]
    return ["verify", "--json", "--sweep", str(file), *flags]


def _judged(cases: list[str], output: str) -> Json:
    """The largest error of each case that `cupytron verify --json` has printed."""
    reports = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = {report["case"]: report["largest"] for report in reports}
    wrong = [report["case"] for report in reports if not report["ok"]]
    hold(not wrong, f"other numbers: {'; '.join(wrong)}", found)
    hold(len(reports) == len(cases), f"{len(reports)} of {len(cases)} cases", found)
    return found


def ranks_as_threads(gpu: Gpu) -> Json:
    """Meshes of ranks that are threads and share the GPU, against one process."""
    cases = gpu.size(MESHES[2] + MESHES[4], TINY_MESHES)
    with tempfile.TemporaryDirectory() as folder:
        code, output, error = command(_verify_words(cases, Path(folder)))
    found = _judged(cases, output) if output else {}
    hold(code == 0, f"exit code {code}: {error[-500:]}", found)
    return found


def mpirun() -> str | None:
    """The launcher of the MPI library that is installed beside this Python, or on the path."""
    # PREFIX/lib/python3/site-packages, or a folder that pip was told to install into
    trees = [Path(entry).parents[2] for entry in sys.path if len(Path(entry).parts) > 3]
    trees += [Path(entry) for entry in sys.path if entry]
    beside = [Path(sys.executable).parent, *(tree / "bin" for tree in trees)]
    here = next((str(b / "mpirun") for b in beside if (b / "mpirun").exists()), None)
    return here or shutil.which("mpirun")


def ranks_under_mpi(gpu: Gpu, ranks: int, comm: str) -> Json:
    """Meshes of processes that share the GPU, against one process."""
    if gpu.simulated:
        raise Skipped("processes do not share a simulated GPU")
    if (launcher := mpirun()) is None:
        raise Skipped("no mpirun: pip install mpich")
    said_with_mpi("import mpi4py.MPI")
    cases = MESHES[ranks]
    with tempfile.TemporaryDirectory() as folder:
        words = [*_verify_words(cases, Path(folder)), "--comm", comm]
        try:
            done = subprocess.run(
                [launcher, "-n", str(ranks), *CUPYTRON, *words],
                capture_output=True,
                text=True,
                timeout=170,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"")[-500:]
            raise Failed(f"no end within 170 s; {said!r}") from None
    found = _judged(cases, done.stdout) if done.stdout else {}
    hold(done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-700:]}", found)
    return found


def thread_checks(gpu: Gpu) -> dict[str, Callable[[], Json]]:
    """Checks of ranks in one process, by name."""
    return {"threads": functools.partial(ranks_as_threads, gpu)}


def process_checks(gpu: Gpu) -> dict[str, Callable[[], Json]]:
    """Checks of ranks under mpirun, by name."""
    return {
        "2 processes, staged": functools.partial(ranks_under_mpi, gpu, 2, "mpi-staged"),
        "4 processes, staged": functools.partial(ranks_under_mpi, gpu, 4, "mpi-staged"),
        "2 processes, nccl": functools.partial(ranks_under_mpi, gpu, 2, "nccl"),
    }
