"""Optimizers against their formulas, schedules at their corners, buckets, accumulation, clipping."""

import math

import numpy as np
import pytest
from conftest import small_config

from cupytron import optim
from cupytron.comm import ParallelContext
from cupytron.config import load_config
from cupytron.errors import CupytronError
from cupytron.layer import Layer, Parameter, constant
from cupytron.model import Transformer
from cupytron.nn import RMSNorm
from cupytron.parallel.zero import Zero
from cupytron.trainer import NotFinite, Trainer

TINY = [
    "model.num_layers=2",
    "model.num_heads=2",
    "model.d_model=8",
    "model.vocab_size=11",
    "train.sequence_length=6",
    "train.micro_batch=2",
    "train.dtype=float64",
]


def make_trainer(*settings):
    trainer = Trainer(load_config(overrides=[*TINY, *settings]))
    trainer.materialize()
    return trainer


def weights(trainer):
    return {n: p.data.copy() for n, p in trainer.model.named_parameters()}


def tokens(rng, trainer):
    shape = (trainer.config.global_batch, trainer.config.train.sequence_length)
    return rng.integers(0, 11, (2, *shape))


def gradients(trainer, inputs, targets):
    """Gradients of the next step, from a trainer whose optimizer does nothing."""
    seen = {}
    original = optim.apply

    def keep(optimizer, buckets, lr, step, scale):
        for name, p in trainer.model.named_parameters():
            seen[name] = p.grad * scale
        original(optimizer, buckets, lr, step, scale)

    optim.apply = keep
    try:
        result = trainer.train_step(inputs, targets)
    finally:
        optim.apply = original
    return seen, result


def test_adamw_follows_the_paper(rng):
    trainer = make_trainer("optim.clip=0.05", "optim.lr=0.01", "optim.weight_decay=0.3")
    c = trainer.config.optim
    w = weights(trainer)
    m = {n: np.zeros_like(a) for n, a in w.items()}
    v = {n: np.zeros_like(a) for n, a in w.items()}
    for t in range(1, 5):
        grads, result = gradients(trainer, *tokens(rng, trainer))
        assert result.grad_norm > 0.05  # so that clipping is at work
        total = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert total == pytest.approx(0.05)
        for n, g in grads.items():
            m[n] = c.beta1 * m[n] + (1 - c.beta1) * g
            v[n] = c.beta2 * v[n] + (1 - c.beta2) * g**2
            step = m[n] / (1 - c.beta1**t) / (np.sqrt(v[n] / (1 - c.beta2**t)) + c.eps)
            decay = 0.3 if w[n].ndim == 2 else 0.0
            w[n] = w[n] - result.lr * step - result.lr * decay * w[n]
        for n, a in weights(trainer).items():
            np.testing.assert_allclose(a, w[n], rtol=1e-12, atol=1e-15, err_msg=n)


def test_sgd_with_momentum(rng):
    trainer = make_trainer("optim.name=sgd", "optim.lr=0.1", "optim.clip=0", "optim.momentum=0.8")
    w = weights(trainer)
    u = {n: np.zeros_like(a) for n, a in w.items()}
    for _ in range(3):
        grads, result = gradients(trainer, *tokens(rng, trainer))
        for n, g in grads.items():
            u[n] = 0.8 * u[n] + g
            decay = 0.1 if w[n].ndim == 2 else 0.0
            w[n] = w[n] - result.lr * (u[n] + decay * w[n])
        for n, a in weights(trainer).items():
            np.testing.assert_allclose(a, w[n], rtol=1e-12, atol=1e-15, err_msg=n)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulation_is_one_large_batch(rng, micro_batch):
    settings = ["train.global_batch=6", "model.dropout=0.2", "optim.clip=0.1"]
    one = make_trainer(*settings, "train.micro_batch=6")
    many = make_trainer(*settings, f"train.micro_batch={micro_batch}")
    for _ in range(3):
        inputs, targets = tokens(rng, one)
        targets[0, :4] = -1  # micro-batches with unequal numbers of targets
        a, b = one.train_step(inputs, targets), many.train_step(inputs, targets)
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-11)
    for (n, a), b in zip(weights(one).items(), weights(many).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=n)


def test_nothing_is_updated_when_the_loss_is_not_finite(rng):
    trainer = make_trainer()
    dict(trainer.model.named_parameters())["norm.weight"].data[0] = np.inf
    before = weights(trainer)
    with np.errstate(all="ignore"), pytest.raises(NotFinite, match="step 1: loss"):
        trainer.train_step(*tokens(rng, trainer))
    assert trainer.step == 0
    for n, a in weights(trainer).items():
        np.testing.assert_array_equal(a, before[n])


def alone(model, **options):
    """The model's buckets in one process."""
    zero = Zero(model, ParallelContext(), **options)
    zero.materialize(5, np.float32)
    return zero


def test_every_parameter_lies_in_one_bucket_and_decays_if_it_is_a_matrix():
    model = Transformer(small_config())
    buckets = alone(model).buckets
    names = ["embedding and head", "positions", "blocks.0", "blocks.1", "norm"]
    assert [b.name for b in buckets] == names
    placed = [p for b in buckets for p, _, _ in b.segments]
    assert len(placed) == len({id(p) for p in placed}) == len(list(model.named_parameters()))
    for bucket in buckets:
        for parameter, start, stop in bucket.segments:
            assert np.shares_memory(parameter.data, bucket.data[start:stop])
            assert np.shares_memory(parameter.grad, bucket.grad[start:stop])
            assert (stop <= bucket.decayed) == (parameter.data.ndim == 2)


def test_parameters_outside_of_layers_are_refused():
    class Loose(Layer):
        def __init__(self):
            self.scale = Parameter((3,), constant(1.0))
            self.norm = RMSNorm(3)

    with pytest.raises(CupytronError, match="stands in no layer"):
        Zero(Loose(), ParallelContext())


def test_weights_do_not_depend_on_buckets_and_differ_by_seed():
    config = small_config()
    plain, bucketed, padded, other = (Transformer(config) for _ in range(4))
    plain.materialize(seed=5)
    other.materialize(seed=6)
    alone(bucketed)
    alone(padded, deterministic=True)
    for (n, a), (_, b), (_, c), (_, d) in zip(
        *(model.named_parameters() for model in (plain, bucketed, padded, other)), strict=True
    ):
        np.testing.assert_array_equal(a.data, b.data, err_msg=n)
        np.testing.assert_array_equal(a.data, c.data, err_msg=n)
        if a.data.ndim == 2:
            assert (a.data != d.data).all()


def test_initial_weights_are_gpt2_s():
    model = Transformer(small_config(d_model=64, num_layers=8))
    model.materialize(seed=1)
    for name, p in model.named_parameters():
        if p.data.ndim == 1:
            assert (p.data == (1.0 if name.endswith("weight") else 0.0)).all(), name
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        want = 0.02 / math.sqrt(16) if residual else 0.02
        assert p.data.std() == pytest.approx(want, rel=0.1), name


def test_the_global_norm_is_the_root_of_all_squares(rng):
    model = Transformer(small_config(d_model=128, num_layers=3))  # buckets of several chunks
    zero = alone(model)
    for bucket in zero.buckets:
        bucket.gradient[...] = rng.normal(size=bucket.size)
    want = math.sqrt(sum((p.grad.astype(float) ** 2).sum() for _, p in model.named_parameters()))
    assert zero.global_norm() == pytest.approx(want, rel=1e-6)


def lr(step, *settings):
    config = load_config(overrides=["optim.lr=1.0", "train.max_steps=100", *settings])
    return optim.learning_rate(config, step)


def test_warmup_rises_to_the_full_rate():
    assert lr(0, "optim.warmup_steps=9") == pytest.approx(0.1)
    assert lr(8, "optim.warmup_steps=9") == pytest.approx(0.9)
    assert lr(9, "optim.warmup_steps=9") == pytest.approx(1.0)
    assert lr(0, "optim.warmup_steps=0") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)]
)
def test_schedules(schedule, middle):
    settings = [f"optim.schedule={schedule}", "optim.warmup_steps=20"]
    assert lr(20, *settings) == pytest.approx(1.0)
    assert lr(60, *settings) == pytest.approx(middle)
    end = 1.0 if schedule == "constant" else 0.1
    assert lr(100, *settings) == lr(500, *settings) == pytest.approx(end)


def test_cosine_is_slow_at_both_ends():
    settings = ["optim.schedule=cosine", "optim.warmup_steps=0", "optim.min_lr=0.0"]
    assert lr(25, *settings) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_wsd_stays_and_then_falls():
    settings = [
        "optim.schedule=wsd",
        "optim.warmup_steps=10",
        "optim.min_lr=0.0",
        "optim.decay_steps=20",
    ]
    assert [lr(s, *settings) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert lr(90, *settings) == pytest.approx(0.5)
    assert lr(99, *settings) == pytest.approx(0.05)
    # a warm-up that reaches into the decay: the rate never jumps
    short = [
        "optim.schedule=wsd",
        "optim.warmup_steps=95",
        "optim.min_lr=0.0",
        "optim.decay_steps=20",
    ]
    assert lr(95, *short) == pytest.approx(1.0)
