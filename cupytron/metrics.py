"""What a run tells: metrics.jsonl, arithmetic per second and beside the peak."""

import hashlib
import json
import math
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupytron.backend import CPU, Device
from cupytron.comm import ParallelContext
from cupytron.config import ModelConfig, RunConfig, flops_per_token
from cupytron.durable import open_in_place

# TFLOP/s of products without sparsity, from NVIDIA's data sheets: of 16-bit numbers with float32 sums, of
# TF32, of float32. The first line counts whose words are all in the card's name.
_CARDS = (
    ("GB200", 2500.0, 1250.0, 80.0),
    ("B200", 2250.0, 1100.0, 75.0),
    ("GH200", 989.4, 494.7, 66.9),
    ("H200 NVL", 835.5, 417.5, 60.0),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100 PCIe", 756.0, 378.0, 51.2),
    ("H100", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A30", 165.0, 82.0, 10.3),
    ("A10", 125.0, 62.5, 31.2),
    ("L40S", 362.0, 183.0, 91.6),
    ("L40", 181.0, 90.5, 90.5),
    ("L4", 121.0, 60.0, 30.3),
    ("RTX 5090", 209.5, 104.8, 104.8),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71.0, 35.6, 35.6),
)
_ANOTHER = {"MIG", "LAPTOP", "TI", "SUPER", "D"}  # a part of a card, or one that does less


def card_peak(name: str, config: RunConfig) -> float | None:
    """FLOP/s that a GPU can do at most in the dtype of a run's products; None: the card is not known.

    Args:
        name: as CUDA says it, such as "NVIDIA H100 80GB HBM3".
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    kinds = {"float32": 2 if config.train.tf32 else 3, "float16": 1, "bfloat16": 1}
    column = kinds.get(config.compute_dtype)
    if column is None or words & _ANOTHER:
        return None
    for card in _CARDS:
        if words.issuperset(card[0].upper().split()):
            return float(card[column]) * 1e12
    return None


def total_peak(
    context: ParallelContext, config: RunConfig, tflops: float | None = None
) -> float | None:
    """FLOP/s that the GPUs of all ranks can do at most; None where it is not known. Collective on GPUs.

    Args:
        tflops: of one GPU, or of a rank on a CPU, in place of what is known.
    """
    device: Any = context.device
    if not device.gpu:
        return tflops * 1e12 * context.world.size if tflops else None
    one = tflops * 1e12 if tflops else card_peak(device.model, config)
    # ranks may share a GPU, which then counts once
    cards = dict(context.world.gather_objects(((_node(), device.bus), one)))
    peaks = [p for p in cards.values() if p is not None]
    return sum(peaks) if len(peaks) == len(cards) else None


def _node() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def peak_memory_bytes(device: Device = CPU) -> int:
    """The most memory that this process has held: of its GPU where it has one, for arrays."""
    if device.gpu:
        gpu: Any = device
        return int(gpu.used_bytes())
    try:
        # getrusage's figure begins with that of the process that started this one; this does not
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Speed:
    """Tokens and floating-point operations per second, since the last call of `read`.

    Args:
        peak: FLOP/s of all ranks' GPUs; None where it is not known.
    """

    def __init__(self, model: ModelConfig, sequence_length: int, peak: float | None = None) -> None:
        self._flops = both_flops(model, sequence_length)
        self._peak = peak
        self._tokens = 0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """tokens_per_second, gflops_per_second(_causal) and, if known, mfu(_causal); counting restarts."""
        rate = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        return {"tokens_per_second": rate, **gflops(rate, self._flops), **self.mfu(rate)}

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """mfu and mfu_causal; nothing where the peak is not known."""
        shares = mfu(tokens_per_second, self._flops, self._peak)
        return {key: share for key, share in shares.items() if share is not None}


def both_flops(model: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """Arithmetic of a token in both conventions: attention whole (nanoGPT), and its causal half (llm.c)."""
    return (
        flops_per_token(model, sequence_length, causal=False),
        flops_per_token(model, sequence_length, causal=True),
    )


def gflops(tokens_per_second: float, flops: tuple[float, float]) -> dict[str, float]:
    """Both conventions of arithmetic per second, in units of 1e9."""
    whole, causal = flops
    return {
        "gflops_per_second": tokens_per_second * whole / 1e9,
        "gflops_per_second_causal": tokens_per_second * causal / 1e9,
    }


def mfu(
    tokens_per_second: float, flops: tuple[float, float], peak: float | None
) -> dict[str, float | None]:
    """Both conventions of arithmetic per second as a share of the peak; None where that is not known.

    Reference: Chowdhery et al. 2022, arXiv:2204.02311, appendix B ("model FLOPs utilization").
    """
    whole, causal = (tokens_per_second * each / peak if peak else None for each in flops)
    return {"mfu": whole, "mfu_causal": causal}


def gflops_text(record: Mapping[str, Any]) -> str:
    """Both conventions of arithmetic per second, for a line: three digits at least."""
    whole, causal = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (record["gflops_per_second"], record["gflops_per_second_causal"])
    )
    return f"{whole} GFLOP/s with attention counted whole, {causal} with its causal half"


def mfu_text(record: Mapping[str, Any]) -> str:
    """Both shares of the peak, for a line; empty where they are not known."""
    whole, causal = record.get("mfu"), record.get("mfu_causal")
    return f"  MFU {whole:.1%}/{causal:.1%}" if whole is not None else ""


class MetricsWriter:
    """metrics.jsonl, an object a line; written out about once a second and before every save.

    A hash of the whole file is kept up to date, for the seal in a checkpoint.

    Args:
        path: the file; records are appended to it.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_in_place(path)
        self._file.seek(0)
        content = self._file.read()
        self._bytes, self._hash = len(content), hashlib.sha256(content)
        self._flushed = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        # JSON has no infinity and no NaN
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = (json.dumps(finite) + "\n").encode()
        self._file.write(line)
        self._bytes += len(line)
        self._hash.update(line)
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def seal(self) -> dict[str, Any]:
        """Write the file through to the disk; returns its length ("bytes") and its SHA-256 ("sha256")."""
        self.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()
