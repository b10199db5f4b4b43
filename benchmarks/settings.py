"""The measured settings, in cupytron's keys: nothing is imported, so either side can read them."""

from types import SimpleNamespace
from typing import Any

# no biases, as nanoGPT trains; everything that is not given is cupytron's default for the family
SETTINGS: dict[str, dict[str, Any]] = {
    "A": {
        "model.num_layers": 4,
        "model.num_heads": 4,
        "model.d_model": 128,
        "model.vocab_size": 65,
        "model.bias": False,
        "train.sequence_length": 64,
        "train.micro_batch": 12,
    },
    "B": {
        "model.num_layers": 6,
        "model.num_heads": 6,
        "model.d_model": 384,
        "model.vocab_size": 65,
        "model.bias": False,
        "train.sequence_length": 256,
        "train.micro_batch": 8,
    },
    "C": {
        "model.num_layers": 4,
        "model.num_heads": 8,
        "model.d_model": 512,
        "model.vocab_size": 8192,
        "model.bias": False,
        "train.sequence_length": 256,
        "train.micro_batch": 4,
    },
}

# timed steps in one child: a few seconds each on two cores
STEPS = {"A": 100, "B": 10, "C": 12}


def overrides(name: str, threads: int, mesh: dict[str, int] | None = None) -> list[str]:
    """The setting as `--set` values of the command line; the global batch is the same on any mesh."""
    values = {**SETTINGS[name], "parallel.threads": threads}
    if mesh:
        batch = values["train.micro_batch"]
        values |= {f"parallel.{key}": value for key, value in mesh.items()}
        values |= {"train.global_batch": batch, "train.micro_batch": batch // mesh["dp"]}
    return [f"{key}={str(value).lower()}" for key, value in values.items()]


def tokens_per_step(name: str) -> int:
    setting = SETTINGS[name]
    return setting["train.micro_batch"] * setting["train.sequence_length"]


def torch_config(name: str) -> SimpleNamespace:
    """The setting with the GPT-2 family's defaults filled in, for `torch_gpt.make_model`."""
    setting = SETTINGS[name]
    model = {key.split(".")[1]: value for key, value in setting.items() if key.startswith("model.")}
    model.setdefault("num_kv_heads", model["num_heads"])
    model.setdefault("d_ff", 4 * model["d_model"])
    model.setdefault("context_length", setting["train.sequence_length"])
    defaults = {
        "position": "learned",
        "norm": "layer",
        "activation": "gelu",
        "tied": True,
        "dropout": 0.0,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
    }
    return SimpleNamespace(**{**defaults, **model})
