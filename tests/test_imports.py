"""Imports go one way, `--help` imports nothing heavy, and every xp.NAME exists in CuPy."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "cupytron"

# Each may import what stands before it, and its own layer.
LAYERS = [
    {"errors", "chart", "progress", "durable", "reading", "printable", "terminal", "blas_kernels"},
    {
        "launcher",
        "launcher_guard",
        "launch_advice",
        "failing",
        "process",
        "config",
        "config_io",
        "config_checks",
        "config_reader",
        "manifest",
        "versions",
        "sealed",
        "signals",
        "inherited",
        "sealed_schema",
        "signs",
        "watchdog",
    },
    {"backend"},
    {"comm"},
    {"together", "agreement"},
    {"ops"},
    {"kernels"},
    {"layer", "layer_checks", "stash"},
    {"nn", "gradient_check", "gradient_kinds"},
    {"model"},
    {"checkpoint", "checkpoint_files", "checkpoint_folders", "checkpoint_format", "piece_table"},
    {"parallel", "optim"},
    {"sampling"},
    {"gpu", "graph", "gpu_step"},
    {"memory", "room", "trainer", "generate", "run_checkpoints", "run_folder"},
    {
        "stop",
        "metrics",
        "trace",
        "bench",
        "tune",
        "run",
        "resume",
        "course",
        "start",
        "source",
        "history",
        "mesh_run",
        "own_model",
        "verify",
        "trained",
        "report",
        "report_page",
        "compare",
    },
    {"cli"},
]


def layer_of(name):
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def imports(path):
    """Names of the library's modules that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cupytron":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("cupytron."):
                    yield alias.name.split(".")[1]


def test_imports_go_one_way():
    for path in sorted(LIBRARY.rglob("*.py")):
        own = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if own in ("__init__", "presets"):
            continue
        assert layer_of(own) is not None, f"{own} has no place in LAYERS"
        for name in imports(path):
            if name == "data":
                assert layer_of(own) >= layer_of("run"), f"{path} imports cupytron.data"
                continue
            assert layer_of(name) is not None, f"{path} imports cupytron.{name}"
            # process.prepare sets the number of threads once NumPy may be imported
            if (own, name) == ("process", "backend"):
                continue
            assert layer_of(name) <= layer_of(own), f"{path} imports cupytron.{name}"
            # the model reads as on one device
            assert name != "comm" or own not in ("ops", "layer", "nn", "model"), path


def test_data_needs_nothing_of_the_library():
    """The exceptions are durable.py (files that survive a crash) and progress.py: they need no others."""
    assert set(imports(LIBRARY / "durable.py")) == {"progress"}
    assert not list(imports(LIBRARY / "progress.py"))
    for path in (ROOT / "data").glob("*.py"):
        assert set(imports(path)) <= {"data", "durable", "progress"}, path


def test_nothing_imports_cli_or_data_by_their_folder():
    for path in [*ROOT.glob("*/*.py"), *ROOT.glob("cupytron/*/*.py")]:
        assert not re.search(r"^\s*(from|import) (cli|data)\b", path.read_text(), re.M), path


def loaded_by(code):
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    code = "from cupytron.cli.main import _run\n_run(['--help'])"
    heavy = {
        "numpy",
        "pydantic",
        "rich",
        "mpi4py",
        "cupy",
        "safetensors",
        "tokenizers",
        "matplotlib",
    }
    assert not heavy & loaded_by(code)


def test_settings_are_read_before_numpy():
    assert "numpy" not in loaded_by(
        "import cupytron.config, cupytron.process, cupytron.cli.options"
    )


def test_a_single_process_never_imports_mpi():
    code = (
        "import cupytron.run, cupytron.trained, cupytron.bench, cupytron.comm\n"
        "cupytron.comm.open_world().barrier()"
    )
    assert not {"mpi4py", "cupy", "rich", "tokenizers"} & loaded_by(code)


def names_of_xp():
    for path in [*LIBRARY.glob("ops/*.py"), *LIBRARY.glob("nn/*.py"), LIBRARY / "optim.py"]:
        for name in re.findall(r"\bxp\.([A-Za-z_]\w*(?:\.\w+)?)", path.read_text()):
            yield path.name, name


def test_every_xp_name_exists_in_numpy():
    found = list(names_of_xp())
    assert len(found) > 50
    for file, name in found:
        value = np
        for part in name.split("."):
            assert hasattr(value, part), f"{file}: xp.{name}"
            value = getattr(value, part)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_every_xp_name_exists_in_cupy():
    import cupy

    for file, name in names_of_xp():
        value = cupy
        for part in name.split("."):
            assert hasattr(value, part), f"{file}: xp.{name} is not in CuPy"
            value = getattr(value, part)
