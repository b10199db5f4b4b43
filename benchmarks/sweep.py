"""Every split of 8 ranks, as lines for `cupytron verify --sweep`.

python benchmarks/sweep.py > cases.txt
mpirun -n 8 cupytron verify --sweep cases.txt
"""

import contextlib
import itertools
from collections.abc import Iterator

# 32 heads, so that three numbers of KV heads are divisible by tp=8; one sequence of 8 tokens a micro-batch
MODEL = "--num-layers 2 --num-heads 32 --d-model 64 --sequence-length 8 --micro-batch 1 --global-batch 16"


def cases() -> Iterator[str]:
    """The flags of one case after the other."""
    for family, vocab, kv_heads in itertools.product(("gpt2", "llama"), (65, 64), (32, 16, 8)):
        for tp, zero, sp in itertools.product((1, 2, 4, 8), range(4), ("--sp", "--no-sp")):
            yield (
                f"{MODEL} --set model.family={family} --set model.vocab_size={vocab} "
                f"--set model.num_kv_heads={kv_heads} --tp {tp} --dp {8 // tp} --zero {zero} {sp}"
            )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # ... | head
        print("\n".join(cases()), flush=True)
