"""Directional derivatives in float64: every layer, every composite, the whole model of both families.

Random directions through the input and through each parameter, biases included, against central
differences; relative error below 1e-6 (cupytron.check_gradient).
"""

import itertools

import numpy as np
import pytest
from conftest import small_config, small_model

import cupytron
from cupytron import nn, ops
from cupytron.gradient_check import WrongGradient
from cupytron.layer import Parameter, normal
from cupytron.model import Transformer, make_block
from cupytron.stash import MicroBatch, Stash

B, S, D = 2, 9, 16
LIMIT = 1e-6


def check(layer, training=True):
    """Each gradient alone; forward must not change x, nor backward dy."""
    report = cupytron.check_gradient(layer, (B * S, D), batch_size=B, training=training, seed=4)
    report.raise_if_wrong()
    assert max(report.errors.values()) < LIMIT


def attention(**options):
    return nn.Attention(D, 4, options.pop("kv", 4), std=0.3, out_std=0.3, **options)


LAYERS = {
    "linear": lambda: nn.Linear(D, 11),
    "linear without bias": lambda: nn.Linear(D, 11, bias=False),
    "layer norm": lambda: nn.LayerNorm(D),
    "layer norm without bias": lambda: nn.LayerNorm(D, bias=False),
    "rms norm": lambda: nn.RMSNorm(D),
    "dropout": lambda: nn.Dropout(0.3),
    "head": lambda: nn.Head(Parameter((23, D), normal(1.0))),
    "learned positions": lambda: nn.LearnedPositions(S + 3, D),
    "sinusoidal positions": lambda: nn.SinusoidalPositions(),
    "attention": lambda: attention(),
    "attention, grouped, rotary": lambda: attention(kv=2, rope_theta=100.0),
    "attention, one KV head, no bias": lambda: attention(kv=1, bias=False, rope_theta=100.0),
    "attention, dropout": lambda: attention(kv=2, dropout=0.3),
    "mlp, gelu": lambda: nn.MLP(D, 40, "gelu", True, 0.3, 0.3),
    "mlp, exact gelu": lambda: nn.MLP(D, 40, "gelu_exact", True, 0.3, 0.3),
    "mlp, relu": lambda: nn.MLP(D, 40, "relu", True, 0.3, 0.3),
    "swiglu": lambda: nn.SwiGLU(D, 40, True, 0.3, 0.3),
    "block, gpt2": lambda: make_block(small_config(dropout=0.2)),
    "block, llama": lambda: make_block(small_config(family="llama", num_kv_heads=2, bias=True)),
    "recomputed block": lambda: make_block(small_config(dropout=0.2, recompute="block")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    check(LAYERS[name]())


def test_dropout_and_positions_pass_in_evaluation():
    check(nn.Dropout(0.3), training=False)
    check(attention(dropout=0.3), training=False)


def test_embedding():
    report = cupytron.check_gradient(nn.Embedding(12, D), (B * S,), vocab_size=12, batch_size=B)
    report.raise_if_wrong()
    assert list(report.errors) == ["weight"]


MODELS = list(
    itertools.product(
        ("gpt2", "llama"), (True, False), (0.0, 0.2), ("none", "block"), (True, False)
    )
)


@pytest.mark.parametrize(("family", "tied", "dropout", "recompute", "bias"), MODELS)
def test_whole_model(family, tied, dropout, recompute, bias):
    kv = 2 if family == "llama" else None
    config = small_config(
        family=family,
        tied=tied,
        dropout=dropout,
        recompute=recompute,
        bias=bias,
        num_kv_heads=kv,
    )
    check_model(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"position": "sinusoidal"},
        {"position": "none", "activation": "relu"},
        {"activation": "gelu_exact", "norm": "rms"},
        {"family": "llama", "position": "learned", "norm": "layer", "bias": True},
        {"vocab": 700},  # the embedding's gradient by sorting
        {"context": 70, "family": "llama"},  # more than one block of queries
        {"num_layers": 1, "num_heads": 1, "d_model": 6},
    ],
)
def test_other_models(settings):
    check_model(small_config(**settings))


def check_model(config):
    """Of the loss, by which some targets do not count, and of all that the logits depend on."""
    shape = (B * config.context_length,)
    report = cupytron.check_gradient(
        Transformer(config), shape, vocab_size=config.vocab_size, batch_size=B, seed=9
    )
    report.raise_if_wrong()
    assert max(report.errors.values()) < LIMIT and "logits, of loss" in report.errors


def test_recompute_gives_the_same_bits_and_keeps_less(rng):
    plain, again = (
        small_model(np.random.default_rng(2), dropout=0.2, recompute=r) for r in ("none", "block")
    )
    ids, targets = rng.integers(0, 37, (2, B * 24))
    kept = []
    for model in (plain, again):
        stash = Stash(MicroBatch(B, 24, training=True))
        logits = model.forward(ids, stash)
        kept.append(stash.nbytes)
        ops.cross_entropy(logits, targets, 0.1)
        model.backward(logits, stash)
    assert kept[1] < kept[0] / 3
    for (name, a), (other, b) in zip(
        plain.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(a.grad, b.grad, err_msg=name)


def test_deferred_weight_gradients_are_the_same(rng):
    plain, later = (small_model(np.random.default_rng(2)) for _ in range(2))
    ids, targets = rng.integers(0, 37, (2, B * 24))
    for model, defer in ((plain, False), (later, True)):
        stash = Stash(MicroBatch(B, 24, training=True), defer_weight_grads=defer)
        logits = model.forward(ids, stash)
        ops.cross_entropy(logits, targets, 0.1)
        model.backward(logits, stash)
        if defer:
            assert not model.blocks[0].mlp.up.weight.grad.any()
        stash.run_weight_grads()
    for (name, a), (_, b) in zip(plain.named_parameters(), later.named_parameters(), strict=True):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-12, atol=1e-14, err_msg=name)


def test_a_dropped_residual_is_caught(monkeypatch):
    """The bug of one of the systems that this one replaces: the check must see it."""
    right = nn.LayerNorm.backward
    monkeypatch.setattr(
        nn.LayerNorm, "backward", lambda self, dy, stash, residual=None: right(self, dy, stash)
    )
    with pytest.raises(WrongGradient, match="Block: "):
        check(make_block(small_config()))


def test_backward_in_the_wrong_order_is_named(rng):
    model = small_model(rng)
    stash = Stash(MicroBatch(B, 24))
    model.forward(rng.integers(0, 37, B * 24), stash)
    with pytest.raises(RuntimeError, match="found values saved by Head head"):
        model.blocks[0].mlp.backward(np.zeros((B * 24, 16)), stash)
