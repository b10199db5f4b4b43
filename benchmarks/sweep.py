"""Every split of 8 ranks, as lines for `cupytron verify --sweep`.

python benchmarks/sweep.py tensor > cases.txt      tp x dp x ZeRO x SP x vocabulary x KV heads
python benchmarks/sweep.py pipeline > cases.txt    pp x tp x dp x schedule x ZeRO x recompute x tied tables
mpirun -n 8 cupytron verify --sweep cases.txt
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator

# 32 heads, so that three numbers of KV heads are divisible by tp=8; one sequence of 8 tokens a micro-batch
MODEL = "--num-layers 2 --num-heads 32 --d-model 64 --sequence-length 8 --micro-batch 1 --global-batch 16"
FAMILIES = ("gpt2", "llama")
SIZES = (1, 2, 4, 8)


def tensor() -> Iterator[str]:
    """Cases of tensor and data parallelism."""
    for family, vocab, kv_heads in itertools.product(FAMILIES, (65, 64), (32, 16, 8)):
        for tp, zero, sp in itertools.product(SIZES, range(4), ("--sp", "--no-sp")):
            yield (
                f"{MODEL} --set model.family={family} --set model.vocab_size={vocab} "
                f"--set model.num_kv_heads={kv_heads} --tp {tp} --dp {8 // tp} --zero {zero} {sp}"
            )


def pipeline() -> Iterator[str]:
    """Cases of pipelines: 5 layers, which neither 2 nor 4 stages divide, or as many as the parts need."""
    model = "--num-heads 8 --d-model 16 --sequence-length 8 --micro-batch 1 --global-batch 8"
    meshes = [(pp, tp) for pp, tp in itertools.product(SIZES, SIZES) if pp * tp <= 8]
    schedules = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2))
    grid = itertools.product(
        FAMILIES, ("true", "false"), meshes, schedules, range(4), (False, True)
    )
    for number, (family, tied, (pp, tp), (schedule, chunks), zero, again) in enumerate(grid):
        recompute = ("block", "selective")[number // 2 % 2] if again else "none"
        sp = "--sp" if tp > 1 and number // 4 % 2 else "--no-sp"
        layers = max(5, pp * chunks - 2)
        yield (
            f"{model} --num-layers {layers} --set model.family={family} --set model.tied={tied} "
            f"--pp {pp} --tp {tp} --dp {8 // pp // tp} --schedule {schedule} --zero {zero} "
            f"--recompute {recompute} {sp}"
        )


if __name__ == "__main__":
    kinds = {"tensor": tensor, "pipeline": pipeline}
    if len(sys.argv) != 2 or sys.argv[1] not in kinds:
        sys.exit(f"usage: sweep.py {'|'.join(kinds)}")
    with contextlib.suppress(BrokenPipeError):  # ... | head
        print("\n".join(kinds[sys.argv[1]]()), flush=True)
