"""Directional derivatives in float64: every layer, every composite, the whole model of both families.

One random direction through the input and all parameters at once, biases included, against central
differences; relative error below 1e-6.
"""

import itertools

import numpy as np
import pytest
from conftest import shake, small_config, small_model

from cupytron import nn, ops
from cupytron.layer import Parameter, normal
from cupytron.model import make_block
from cupytron.stash import MicroBatch, Stash

B, S, D = 2, 9, 16
LIMIT = 1e-6


def directional_error(layer, loss, x, dx, step=1e-5):
    """Relative error of the gradient along a random direction; loss(x) runs forward alone."""
    rng = np.random.default_rng(5)
    directions = {n: rng.normal(size=p.data.shape) for n, p in layer.named_parameters()}
    got = sum((p.grad * directions[n]).sum() for n, p in layer.named_parameters())
    vx = None
    if dx is not None:
        vx = rng.normal(size=x.shape)
        got += (dx * vx).sum()

    def at(t):
        for n, p in layer.named_parameters():
            p.data += t * directions[n]
        value = loss(x if vx is None else x + t * vx)
        for n, p in layer.named_parameters():
            p.data -= t * directions[n]
        return value

    # Richardson's combination of two central differences: error O(step^4)
    fine, coarse = ((at(h) - at(-h)) / (2 * h) for h in (step, 2 * step))
    want = (4 * fine - coarse) / 3
    return abs(got - want) / abs(want)


def check(layer, x, batch):
    rng = np.random.default_rng(6)
    layer.materialize(seed=1, dtype=np.float64)
    shake(layer, rng)
    stash = Stash(batch)
    kept = x.copy()
    y = layer.forward(x, stash)
    dy = rng.normal(size=y.shape)
    given = dy.copy()
    dx = layer.backward(dy, stash)
    assert len(stash) == 0
    np.testing.assert_array_equal(x, kept, "forward changed its input")
    np.testing.assert_array_equal(dy, given, "backward changed dy")
    loss = lambda x: (layer.forward(x, Stash(batch).discarding()) * dy).sum()  # noqa: E731
    assert directional_error(layer, loss, x, dx) < LIMIT


def batch(training=True):
    return MicroBatch(B, S, step=2, first_token=77, training=training, seed=4)


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
def test_layer(name, rng):
    check(LAYERS[name](), rng.normal(size=(B * S, D)), batch())


def test_dropout_and_positions_pass_in_evaluation(rng):
    check(nn.Dropout(0.3), rng.normal(size=(B * S, D)), batch(training=False))
    check(attention(dropout=0.3), rng.normal(size=(B * S, D)), batch(training=False))


def test_embedding(rng):
    layer = nn.Embedding(12, D)
    layer.materialize(1, np.float64)
    ids, stash = rng.integers(0, 12, B * S), Stash(batch())
    y = layer.forward(ids, stash)
    dy = rng.normal(size=y.shape)
    layer.backward(dy, stash)
    loss = lambda ids: (layer.forward(ids, Stash(batch()).discarding()) * dy).sum()  # noqa: E731
    assert directional_error(layer, loss, ids, None) < LIMIT


MODELS = list(
    itertools.product(
        ("gpt2", "llama"), (True, False), (0.0, 0.2), ("none", "block"), (True, False)
    )
)


@pytest.mark.parametrize(("family", "tied", "dropout", "recompute", "bias"), MODELS)
def test_whole_model(rng, family, tied, dropout, recompute, bias):
    kv = 2 if family == "llama" else None
    model = small_model(
        rng,
        family=family,
        tied=tied,
        dropout=dropout,
        recompute=recompute,
        bias=bias,
        num_kv_heads=kv,
    )
    check_model(model, rng)


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
def test_other_models(rng, settings):
    # between the two sides of a small step hardly any input of a ReLU changes its sign
    step = 1e-7 if settings.get("activation") == "relu" else 3e-5
    check_model(small_model(rng, **settings), rng, step)


def check_model(model, rng, step=3e-5):
    seq = model.config.context_length
    micro = MicroBatch(B, seq, step=1, first_token=5, training=True, seed=9)
    ids, targets = rng.integers(0, model.config.vocab_size, (2, B * seq))
    targets[3:7] = ops.IGNORE
    stash = Stash(micro)
    logits = model.forward(ids, stash)
    ops.cross_entropy(logits, targets, 0.1)
    model.backward(logits, stash)
    assert len(stash) == 0

    def loss(ids):
        return ops.cross_entropy(model.forward(ids, Stash(micro).discarding()), targets, 0.1)

    assert directional_error(model, loss, ids, None, step) < LIMIT


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


def test_a_dropped_residual_is_caught(rng, monkeypatch):
    """The bug of one of the systems that this one replaces: the check must see it."""
    right = nn.LayerNorm.backward
    monkeypatch.setattr(
        nn.LayerNorm, "backward", lambda self, dy, stash, residual=None: right(self, dy, stash)
    )
    with pytest.raises(AssertionError):
        check(make_block(small_config()), rng.normal(size=(B * S, D)), batch())


def test_backward_in_the_wrong_order_is_named(rng):
    model = small_model(rng)
    stash = Stash(MicroBatch(B, 24))
    model.forward(rng.integers(0, 37, B * 24), stash)
    with pytest.raises(RuntimeError, match="found values saved by Head head"):
        model.blocks[0].mlp.backward(np.zeros((B * 24, 16)), stash)
