"""Finds which of OpenBLAS's kernels this processor can run. Imports the standard library only.

OpenBLAS does not check the name in OPENBLAS_CORETYPE. If the processor cannot run that kernel, the
process ends by SIGILL, without a message.
"""

import functools
import os
import platform
import sys
from collections.abc import MutableMapping, Set
from pathlib import Path

_AVX2 = {"avx2", "fma"}
_AVX512 = {*_AVX2, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
# the flags of /proc/cpuinfo that each x86 kernel needs; a processor of the kernel's name has them
NEEDS: dict[str, set[str]] = {
    "prescott": {"pni"},
    "core2": {"ssse3"},
    "penryn": {"ssse3"},
    "dunnington": {"ssse3"},
    "atom": {"ssse3"},
    "nehalem": {"sse4_2"},
    "sandybridge": {"avx"},
    "bulldozer": {"avx", "fma4"},
    "piledriver": {"avx", "fma"},
    "steamroller": {"avx", "fma"},
    "excavator": _AVX2,
    "haswell": _AVX2,
    "zen": _AVX2,
    "skylakex": _AVX512,
    "cooperlake": {*_AVX512, "avx512_bf16"},
    "sapphirerapids": {*_AVX512, "avx512_bf16"},
}
_SHOWN = ("Prescott", "Nehalem", "Sandybridge", "Haswell", "Zen", "SkylakeX", "Cooperlake")


@functools.cache
def flags() -> frozenset[str]:
    """The processor's flags from /proc/cpuinfo; empty if it lists none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset()
    )


def missing(kernel: str, there: Set[str]) -> list[str]:
    """Flags that a kernel needs and a processor lacks; [] if the kernel or the processor is not known.

    Args:
        there: the processor's flags.
    """
    return sorted(NEEDS.get(kernel.lower(), set()) - there) if there else []


def fitting(there: Set[str]) -> list[str]:
    """Kernels of NumPy's OpenBLAS that a processor with these flags can run."""
    return [name for name in _SHOWN if not missing(name, there)]


def drop_unfit(environment: MutableMapping[str, str], there: Set[str]) -> str | None:
    """Remove OPENBLAS_CORETYPE if this processor cannot run that kernel; returns a line about it.

    Args:
        environment: os.environ, before NumPy is imported.
        there: the processor's flags.
    """
    asked = environment.get("OPENBLAS_CORETYPE")
    lacks = missing(asked, there) if asked else []
    if not lacks or "numpy" in sys.modules:
        return None
    del environment["OPENBLAS_CORETYPE"]
    return (
        f"OPENBLAS_CORETYPE={asked} is not used: this processor lacks {', '.join(lacks)}, and would end "
        f"the process by SIGILL; it can run {', '.join(fitting(there))}"
    )


def drop_unfit_here() -> str | None:
    """`drop_unfit` for this process and its processor."""
    return drop_unfit(os.environ, flags()) if "OPENBLAS_CORETYPE" in os.environ else None
