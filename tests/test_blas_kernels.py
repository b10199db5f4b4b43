"""A kernel of OpenBLAS that this processor cannot run is refused: it would end the process by SIGILL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from cupytron import blas_kernels
from cupytron.blas_kernels import drop_unfit, fitting, missing

ZEN3 = {"sse4_2", "ssse3", "pni", "avx", "avx2", "fma"}
WIDE = {*ZEN3, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
CUPYTRON = Path(sys.executable).with_name("cupytron")
# a processor without AVX-512, whichever this one is
FAKE = f"""
import sys
from cupytron import blas_kernels
blas_kernels.flags = lambda: {ZEN3!r}
from cupytron.cli.main import run
run(sys.argv[1:])
"""


def test_what_kernels_need():
    assert missing("SkylakeX", ZEN3) == [
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512f",
        "avx512vl",
    ]
    assert missing("skylakex", WIDE) == missing("Haswell", ZEN3) == missing("Zen", ZEN3) == []
    assert missing("Cooperlake", WIDE) == ["avx512_bf16"]
    # what is not known is OpenBLAS's business
    assert missing("SkylakeX", set()) == missing("ThunderX2", ZEN3) == missing("auto", ZEN3) == []
    assert fitting(ZEN3)[-1] == "Zen" and "SkylakeX" in fitting(WIDE)


def test_the_environments_kernel_is_dropped_with_a_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    environment = {"OPENBLAS_CORETYPE": "SkylakeX"}
    line = drop_unfit(environment, ZEN3)
    assert line is not None and "OPENBLAS_CORETYPE=SkylakeX is not used" in line
    assert "avx512f" in line and "Haswell" in line and environment == {}
    for kernel, there in (("Haswell", ZEN3), ("SkylakeX", WIDE), ("SkylakeX", set())):
        environment = {"OPENBLAS_CORETYPE": kernel}
        assert drop_unfit(environment, there) is None and environment
    assert drop_unfit({}, ZEN3) is None


@pytest.mark.parametrize("words", [["--version"], ["config", "show", "--presets"]])
def test_a_command_warns_once_and_works(words):
    done = subprocess.run(
        [sys.executable, "-P", "-c", FAKE, *words],
        env={**os.environ, "OPENBLAS_CORETYPE": "SkylakeX"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stderr.count("warning: OPENBLAS_CORETYPE=SkylakeX is not used") == 1


def test_the_option_is_refused_with_the_kernels_that_fit(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            FAKE,
            "bench",
            "--preset",
            "demo",
            "--blas-kernel",
            "SkylakeX",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: parallel.blas_kernel=SkylakeX: this processor lacks avx512"
    )
    assert "give auto, or one of" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_of_another_processor_is_evaluated(tmp_path):
    """eval has no option that names another kernel."""
    runs.run_here(
        runs.make_data(tmp_path),
        tmp_path / "run",
        "train.max_steps=1",
        "parallel.blas_kernel=SkylakeX",
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", FAKE, "eval", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "validation loss" in done.stdout, done.stderr
    assert "warning: the run's parallel.blas_kernel=SkylakeX is not used" in done.stderr


def test_this_processor_is_read():
    assert (
        blas_kernels.flags() or not Path("/proc/cpuinfo").exists() or os.uname().machine != "x86_64"
    )
