"""Time PyTorch's training step for one setting in this process, and print it as one JSON object.

    python benchmarks/torch_step.py A --steps 100 --threads 2 [--compile]

`benchmarks/bench.py` starts it as a child; it needs PyTorch and NumPy only, not cupytron.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from settings import SETTINGS, tokens_per_step, torch_config
from torch_gpt import make_model, make_optimizer

WARMUP = 5  # compilation happens in the first two


def peak_memory_bytes() -> int:
    """Largest resident size of this process; compile workers are others and do not count."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage's figure starts from the parent's size at the time of exec; this one does not
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, steps: int, threads: int, compiled: bool) -> dict[str, object]:
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    config = torch_config(name)
    model = make_model(config)
    optimizer = make_optimizer(model, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    run = torch.compile(model) if compiled else model

    shape = (SETTINGS[name]["train.micro_batch"], SETTINGS[name]["train.sequence_length"])
    milliseconds = []
    for step in range(WARMUP + steps):
        ids = torch.randint(config.vocab_size, shape)
        targets = torch.randint(config.vocab_size, shape)
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = run(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= WARMUP:
            milliseconds.append((time.perf_counter() - started) * 1e3)

    median = statistics.median(milliseconds)
    return {
        "ms_per_step": median,
        "tokens_per_second": tokens_per_step(name) / median * 1e3,
        "peak_memory_bytes": peak_memory_bytes(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss.item(),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.setting, arguments.steps, arguments.threads, arguments.compile)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
