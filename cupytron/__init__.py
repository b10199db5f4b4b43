"""cupytron: train small language models with hand-written layers, and the same numbers on any mesh."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupytron.comm import ParallelContext, open_world, run_ranks
    from cupytron.optim import SGD, AdamW
    from cupytron.parallel.pipeline import Pipeline, cut
    from cupytron.parallel.plan import parallelize
    from cupytron.parallel.zero import Zero
    from cupytron.trained import load

# imported when used: `cupytron --help` must not import NumPy
_WHERE = {
    "AdamW": "optim",
    "ParallelContext": "comm",
    "Pipeline": "parallel.pipeline",
    "SGD": "optim",
    "Zero": "parallel.zero",
    "cut": "parallel.pipeline",
    "load": "trained",
    "open_world": "comm",
    "parallelize": "parallel.plan",
    "run_ranks": "comm",
}

__all__ = [
    "SGD",
    "AdamW",
    "ParallelContext",
    "Pipeline",
    "Zero",
    "cut",
    "load",
    "open_world",
    "parallelize",
    "run_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"cupytron.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'cupytron' has no attribute {name!r}")
