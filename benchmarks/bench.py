"""One training step of cupytron and of PyTorch, in turn on this machine: time and peak memory.

cupytron runs in one process, and on meshes of ranks that have a thread each (memory: the largest rank's).

    python benchmarks/bench.py [A B C] [--rounds 3] [--threads 2] [--torch-python PATH] [--out FILE]

Each contender of each round is a fresh process, one at a time; the rounds are interleaved, so that
a machine that slows down for a while slows all of them. PyTorch runs eagerly and compiled, as
installed; on an AMD processor with AVX-512 it runs again with its MKL allowed to use AVX-512, which
MKL otherwise does on Intel's processors only: both are reported. Time and memory are each compared
with the better of eager and compiled.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

from settings import SETTINGS, STEPS, overrides, tokens_per_step
from table import print_tables

Json = dict[str, Any]

# 2 ranks have a core each; 4 and 8 share them, which shows what waiting costs
MESHES = {
    "cupytron_dp2": {"tp": 1, "dp": 2, "zero": 1},
    "cupytron_tp2": {"tp": 2, "dp": 1, "zero": 0},
    "cupytron_dp4": {"tp": 1, "dp": 4, "zero": 1},
    "cupytron_tp2_dp4": {"tp": 2, "dp": 4, "zero": 1},
}
HERE = Path(__file__).parent
# MKL asks this function of its own whether the processor is Intel's before it uses AVX-512 kernels
SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


@dataclass
class Contender:
    """One column of the table.

    Attributes:
        key: Its name in the JSON.
        command: What to start; `{setting}`, `{steps}` and `{threads}` are filled in.
        environment: Variables to add.
        mesh: cupytron's ranks: {"tp": ..., "dp": ..., "zero": ...}; each has one thread.
    """

    key: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    mesh: dict[str, int] | None = None

    def arguments(self, setting: str, steps: int, threads: int) -> list[str]:
        if self.key.startswith("cupytron"):
            values = overrides(setting, 1 if self.mesh else threads, self.mesh)
            sets = [word for value in values for word in ("--set", value)]
            return [*self.command, "bench", "--json", "--steps", str(steps), *sets]
        return [*self.command, setting, "--steps", str(steps), "--threads", str(threads)]

    def shown(self, setting: str, steps: int, threads: int) -> str:
        """The command for the record, without this machine's paths."""
        name = "cupytron" if self.key.startswith("cupytron") else "python benchmarks/torch_step.py"
        if self.mesh:
            name = f"mpirun -n {self.mesh['tp'] * self.mesh['dp']} {name}"
        words = self.arguments(setting, steps, threads)[len(self.command) :]
        flags = ["--compile"] if "--compile" in self.command else []
        preload = ["LD_PRELOAD=mkl_avx512.so"] if self.environment else []
        return " ".join([*preload, name, *words, *flags])


def machine() -> Json:
    """Processor, cores that may be used, memory and how busy the machine was."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: Json = {"cpu": platform.processor() or platform.machine(), "cores": cores}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        cpu = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        family, model = cpu.get("cpu family", "?"), cpu.get("model", "?")
        found["cpu"] = f"{cpu.get('model name', '?')} (family {family}, model {model})"
        found["vendor"] = cpu.get("vendor_id", "?")
        found["avx512"] = "avx512f" in cpu.get("flags", "").split()
    if hasattr(os, "getloadavg"):
        found["load_average_at_start"] = round(os.getloadavg()[0], 2)
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


def mkl_shim(folder: Path, facts: Json) -> Path | None:
    """A library to preload that lets MKL use AVX-512 on AMD; None where that has no meaning.

    `MKL_DEBUG_CPU_TYPE` did this until MKL 2020.1, and has no effect since.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if facts.get("vendor") != "AuthenticAMD" or not facts.get("avx512") or compiler is None:
        return None
    source, library = folder / "mkl_avx512.c", folder / "mkl_avx512.so"
    source.write_text(SHIM)
    built = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=False)
    return library if built.returncode == 0 else None


def contenders(torch_python: str | None, shim: Path | None) -> list[Contender]:
    found = []
    if torch_python is not None:
        eager = [torch_python, str(HERE / "torch_step.py")]
        compiled = [*eager, "--compile"]
        found += [Contender("torch_eager", eager), Contender("torch_compiled", compiled)]
        if shim is not None:
            preload = {"LD_PRELOAD": str(shim)}
            found.append(Contender("torch_eager_avx512", eager, preload))
            found.append(Contender("torch_compiled_avx512", compiled, preload))
    command = [sys.executable, "-P", "-c", "from cupytron.cli.main import run; run()"]
    found.append(Contender("cupytron", command))
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        print("no mpirun beside this Python: meshes are not measured (pip install mpich)")
        return found
    for key, mesh in MESHES.items():
        launcher = [str(mpirun), "-n", str(mesh["tp"] * mesh["dp"])]
        found.append(Contender(key, [*launcher, *command], mesh=mesh))
    return found


def run_child(contender: Contender, setting: str, steps: int, threads: int) -> Json:
    """The child's JSON object, or {"error": its last line}."""
    done = subprocess.run(
        contender.arguments(setting, steps, threads),
        env={**os.environ, **contender.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    start = done.stdout.find("{")
    if done.returncode == 0 and start >= 0:
        return json.loads(done.stdout[start:])
    errors = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    return {"error": errors[-1][:300]}


def summarise(setting: str, runs: list[Json]) -> Json:
    """Median over the rounds for each contender, and cupytron's ratios to PyTorch."""
    summary: dict[str, Json] = {}
    for key in dict.fromkeys(str(run["contender"]) for run in runs):
        mine = [run for run in runs if run["contender"] == key]
        good = [run for run in mine if "error" not in run]
        if not good:
            summary[key] = {"error": mine[0]["error"]}
            continue
        times = [run["ms_per_step"] for run in good]
        summary[key] = {
            "ms_per_step": statistics.median(times),
            "ms_lowest": min(times),
            "ms_highest": max(times),
            "tokens_per_second": tokens_per_step(setting) / statistics.median(times) * 1e3,
            "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in good),
            "parameters": good[0]["parameters"],
        }
    counts = {summary[key]["parameters"] for key in summary if "parameters" in summary[key]}
    if len(counts) > 1:
        raise SystemExit(f"setting {setting}: parameter counts differ: {sorted(map(str, counts))}")
    return {
        "tokens_per_step": tokens_per_step(setting),
        "contenders": summary,
        "ratios": ratios(summary),
    }


def ratios(summary: dict[str, Json]) -> Json:
    """Speed (above 1: cupytron is faster) and memory (below 1: it needs less).

    Each is taken against the better of PyTorch's two modes for that quantity.
    """
    found: Json = {}
    ours = summary.get("cupytron", {})
    for name, suffix in (("as_installed", ""), ("avx512", "_avx512")):
        modes = [summary.get(f"torch_{mode}{suffix}", {}) for mode in ("eager", "compiled")]
        modes = [mode for mode in modes if "ms_per_step" in mode]
        if not modes or "ms_per_step" not in ours:
            continue
        time = min(mode["ms_per_step"] for mode in modes)
        memory = min(mode["peak_memory_bytes"] for mode in modes)
        found[name] = {
            "speed": time / ours["ms_per_step"],
            "memory": ours["peak_memory_bytes"] / memory,
        }
        two = summary.get("cupytron_dp2", {})
        if "ms_per_step" in two:
            found[f"{name}_2_ranks"] = {
                "speed": time / two["ms_per_step"],
                "memory": two["peak_memory_bytes"] / memory,
            }
    for key in MESHES:
        if "ms_per_step" in summary.get(key, {}) and "ms_per_step" in ours:
            found[f"{key}_to_one_process"] = {
                "speed": ours["ms_per_step"] / summary[key]["ms_per_step"],
                "memory": summary[key]["peak_memory_bytes"] / ours["peak_memory_bytes"],
            }
    return found


def versions(torch_version: str | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("cupytron", "numpy"):
        found[name] = metadata.version(name)
    return {**found, **({"torch": torch_version} if torch_version else {})}


def torch_python(given: str | None) -> str | None:
    """The interpreter that has PyTorch: the one given, or this one if it does."""
    if given is not None:
        return given
    if util.find_spec("torch") is not None:
        return sys.executable
    print("PyTorch is not installed here: only cupytron is measured; use --torch-python PATH")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help=f"from {' '.join(SETTINGS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="children of each contender")
    parser.add_argument("--only", metavar="KEYS", help="contenders, such as cupytron,cupytron_dp2")
    parser.add_argument("--steps", type=int, help="timed steps a child; default: a few seconds")
    parser.add_argument("--threads", type=int, default=2, help="threads of both libraries")
    parser.add_argument("--torch-python", metavar="PATH", help="an interpreter with PyTorch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here")
    arguments = parser.parse_args()
    chosen = arguments.settings or list(SETTINGS)
    unknown = [name for name in chosen if name not in SETTINGS]
    if unknown:
        parser.error(f"unknown setting {unknown[0]!r}; choose from {' '.join(SETTINGS)}")

    facts = machine()
    python = torch_python(arguments.torch_python)
    results: Json = {}
    commands: dict[str, list[str]] = {}
    torch_version = None
    with tempfile.TemporaryDirectory() as folder:
        rivals = contenders(python, mkl_shim(Path(folder), facts))
        if arguments.only:
            rivals = [rival for rival in rivals if rival.key in arguments.only.split(",")]
        for setting in chosen:
            steps = arguments.steps or STEPS[setting]
            runs = []
            for number in range(arguments.rounds):
                for rival in rivals:
                    run = run_child(rival, setting, steps, arguments.threads)
                    runs.append({"contender": rival.key, "round": number, **run})
                    torch_version = str(run.get("torch", "")) or torch_version
                    outcome = run.get("error") or f"{run['ms_per_step']:.1f} ms"
                    print(f"{setting} round {number + 1} {rival.key}: {outcome}", file=sys.stderr)
            results[setting] = {"summary": summarise(setting, runs), "runs": runs}
            commands[setting] = [r.shown(setting, steps, arguments.threads) for r in rivals]
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "versions": versions(torch_version),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "commands": commands,
        "settings": results,
    }
    print_tables(record)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
