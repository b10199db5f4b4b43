"""Fixtures that several test files share."""

import signal

import numpy as np
import pytest
import runs

from cupytron.config import ModelConfig, resolve_model
from cupytron.layer import Layer
from cupytron.model import Transformer

# a shell ignores Ctrl-C for what it starts in the background, and that is inherited by every process below
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A test that fails half-way must not leave a process that takes a core from the others."""
    yield
    while runs.STARTED:
        process = runs.STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def rng():
    return np.random.default_rng(1234)


def shake(layer: Layer, rng: np.random.Generator, size: float = 0.1) -> None:
    """Move every parameter off its initial value: biases of zero would hide mistakes."""
    for _, parameter in layer.named_parameters():
        parameter.data += rng.normal(size=parameter.data.shape) * size


def small_config(vocab: int = 37, context: int = 24, **settings) -> ModelConfig:
    """A resolved configuration of a tiny model."""
    sizes = {"num_layers": 2, "num_heads": 4, "d_model": 16, **settings}
    return resolve_model(ModelConfig(**sizes), vocab, context)


def small_model(rng: np.random.Generator, **settings) -> Transformer:
    """A tiny model in float64 with all parameters off their initial values."""
    model = Transformer(small_config(**settings))
    model.materialize(seed=3, dtype=np.float64)
    shake(model, rng)
    return model
