"""cupytron: train small language models with hand-written layers, and the same numbers on any mesh."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupytron.comm import ParallelContext, open_world, run_ranks
    from cupytron.config import ModelConfig, RunConfig, load_config, resolve_model
    from cupytron.errors import CupytronError
    from cupytron.gradient_check import check_gradient
    from cupytron.layer import Chain, Layer, Parameter
    from cupytron.model import Transformer
    from cupytron.optim import SGD, AdamW
    from cupytron.parallel.pipeline import Pipeline, cut
    from cupytron.parallel.plan import parallelize
    from cupytron.parallel.zero import Zero
    from cupytron.start import train
    from cupytron.trained import TrainedModel, load
    from cupytron.trainer import Trainer

# imported when used: `cupytron --help` must not import NumPy
_WHERE = {
    "AdamW": "optim",
    "Chain": "layer",
    "CupytronError": "errors",
    "Layer": "layer",
    "ModelConfig": "config",
    "Parameter": "layer",
    "ParallelContext": "comm",
    "Pipeline": "parallel.pipeline",
    "RunConfig": "config",
    "SGD": "optim",
    "TrainedModel": "trained",
    "Trainer": "trainer",
    "Transformer": "model",
    "Zero": "parallel.zero",
    "check_gradient": "gradient_check",
    "cut": "parallel.pipeline",
    "load": "trained",
    "load_config": "config",
    "open_world": "comm",
    "parallelize": "parallel.plan",
    "resolve_model": "config",
    "run_ranks": "comm",
    "train": "start",
}

__all__ = [
    "SGD",
    "AdamW",
    "Chain",
    "CupytronError",
    "Layer",
    "ModelConfig",
    "ParallelContext",
    "Parameter",
    "Pipeline",
    "RunConfig",
    "TrainedModel",
    "Trainer",
    "Transformer",
    "Zero",
    "check_gradient",
    "cut",
    "load",
    "load_config",
    "open_world",
    "parallelize",
    "resolve_model",
    "run_ranks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"cupytron.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'cupytron' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
