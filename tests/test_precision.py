"""16-bit layers beside float32 weights: what is kept in which dtype, losses, loss scaling, checkpoints."""

import ml_dtypes
import numpy as np
import pytest
from runs import make_data, run_here

from cupytron import ops, verify
from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import load_config
from cupytron.errors import ConfigError
from cupytron.run_folder import RunFolder
from cupytron.trained import load
from cupytron.trainer import NotFinite, Trainer

BF16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [np.dtype(np.float16), BF16]
SMALL = [
    "model.vocab_size=50",
    "model.num_layers=2",
    "model.d_model=32",
    "model.dropout=0.1",
    "train.sequence_length=16",
    "train.micro_batch=2",
    "train.global_batch=8",
    "optim.warmup_steps=0",
]


def settings(*more):
    return load_config(overrides=[*SMALL, *more])


def batch(step=0):
    tokens = np.random.default_rng(step).integers(0, 50, (8, 17))
    return tokens[:, :-1], tokens[:, 1:]


def run(config, steps=12, **mesh):
    """Losses, and the weights of rank 0's first bucket, after some steps on threads."""

    def body(world):
        trainer = Trainer(config, None, ParallelContext(**mesh, world=world))
        trainer.materialize()
        losses = []
        for step in range(steps):
            inputs, targets = batch(step % 3)
            mine = trainer.local_sequences
            losses.append(trainer.train_step(inputs[mine], targets[mine]).loss)
        return losses, trainer

    ranks = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    return run_ranks(ranks, body)[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # a rounding is 2^-9 of a bfloat16, 2^-12 of a float16; the losses of 50 letters stay near 4
    [("bfloat16", 2e-3), ("float16", 5e-4)],
)
def test_the_losses_are_those_of_float32(family, dtype, tolerance):
    want, _ = run(settings(f"model.family={family}"))
    got, _ = run(settings(f"model.family={family}", f"train.compute_dtype={dtype}"))
    assert want[-1] < want[0] - 0.1
    np.testing.assert_allclose(got, want, rtol=tolerance)
    assert got != want


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_the_losses_on_a_mesh(zero, mesh):
    # partial sums are rounded to 16 bits in other places, so the mesh is as near as float32 is
    half = ["train.compute_dtype=bfloat16", f"parallel.zero={zero}"]
    want, _ = run(settings("train.compute_dtype=bfloat16"))
    sizes = [f"parallel.{axis}={n}" for axis, n in mesh.items()]
    got, trainer = run(settings(*half, *sizes), **mesh)
    np.testing.assert_allclose(got, want, rtol=2e-3)
    for bucket in trainer.zero.buckets:
        assert bucket.weights.dtype == bucket.gradient.dtype == np.float32
        assert bucket.shard.dtype == BF16
        np.testing.assert_array_equal(bucket.shard, bucket.weights.astype(BF16))
        assert {a.dtype for a in bucket.state.values()} == {np.dtype(np.float32)}
        if bucket.data is not None:
            assert bucket.data.dtype == BF16
            np.testing.assert_array_equal(bucket.data[bucket.owned], bucket.shard)


def test_small_updates_are_not_lost():
    """Of weights that were kept in 16 bits most of them would be."""
    config = settings("train.compute_dtype=bfloat16", "optim.lr=1e-6", "optim.min_lr=1e-6")
    _, trainer = run(config, steps=0)
    before = [bucket.weights.copy() for bucket in trainer.zero.buckets]
    trainer.train_step(*batch())
    changed = [b.weights != w for b, w in zip(trainer.zero.buckets, before, strict=True)]
    assert np.concatenate(changed).mean() > 0.9


def test_persistent_bytes():
    _, plain = run(settings(), steps=0)
    _, half = run(settings("train.compute_dtype=bfloat16"), steps=0)
    parameters = sum(bucket.size for bucket in plain.zero.buckets)
    assert plain.zero.persistent_bytes == 16 * parameters
    assert half.zero.persistent_bytes == 18 * parameters


def poisoned(monkeypatch, at):
    """Make a step's gradients overflow."""
    original = Trainer._cut

    def cut(self, inputs, targets):
        if self.step == at:
            self.zero.buckets[0].grad[3] = np.inf
        return original(self, inputs, targets)

    monkeypatch.setattr(Trainer, "_cut", cut)


def test_a_step_that_overflows_is_skipped(monkeypatch):
    poisoned(monkeypatch, at=2)
    trainer = Trainer(settings("train.compute_dtype=float16", "train.loss_scale=1024"))
    trainer.materialize()
    for step in range(2):
        trainer.train_step(*batch(step))
    before = [b.weights.copy() for b in trainer.zero.buckets]
    state = [b.state["exp_avg"].copy() for b in trainer.zero.buckets]
    found = trainer.train_step(*batch(2))
    assert not np.isfinite(found.grad_norm) and np.isfinite(found.loss)
    for bucket, weights, mean in zip(trainer.zero.buckets, before, state, strict=True):
        np.testing.assert_array_equal(bucket.weights, weights)
        np.testing.assert_array_equal(bucket.state["exp_avg"], mean)
        assert not bucket.gradient.any()
    assert (trainer.step, trainer.position) == (3, 24)
    assert trainer.counters() == {"updates": 2, "loss_scale": 512.0, "good_steps": 0}
    assert np.isfinite(trainer.train_step(*batch(3)).grad_norm)
    assert trainer.counters() == {"updates": 3, "loss_scale": 512.0, "good_steps": 1}


def test_all_ranks_skip_together(monkeypatch):
    original = Trainer._cut

    def cut(self, inputs, targets):
        if self.step == 1 and self.context.dp.rank == 1:
            self.zero.buckets[0].grad[3] = np.inf
        return original(self, inputs, targets)

    monkeypatch.setattr(Trainer, "_cut", cut)

    def body(world):
        config = settings("train.compute_dtype=float16", "parallel.dp=2", "parallel.zero=1")
        trainer = Trainer(config, None, ParallelContext(dp=2, world=world))
        trainer.materialize()
        for step in range(3):
            inputs, targets = batch(step)
            mine = trainer.local_sequences
            trainer.train_step(inputs[mine], targets[mine])
        return trainer.counters()

    assert run_ranks(2, body) == [{"updates": 2, "loss_scale": 32768.0, "good_steps": 1}] * 2


def test_bfloat16_has_no_loss_scale_and_stops(monkeypatch):
    poisoned(monkeypatch, at=0)
    trainer = Trainer(settings("train.compute_dtype=bfloat16"))
    trainer.materialize()
    with pytest.raises(NotFinite, match="step 1"):
        trainer.train_step(*batch())


def test_overflow_without_a_scale_ends_the_run(monkeypatch):
    poisoned(monkeypatch, at=0)
    trainer = Trainer(settings("train.compute_dtype=float16", "train.loss_scale=1"))
    trainer.materialize()
    with pytest.raises(NotFinite, match="step 1"):
        trainer.train_step(*batch())
    poisoned(monkeypatch, at=0)
    trainer = Trainer(settings("train.compute_dtype=float16", "train.loss_scale=2"))
    trainer.materialize()
    assert trainer.train_step(*batch()).skipped
    assert not trainer.train_step(*batch()).skipped


def test_a_loss_that_is_not_finite_is_no_overflow(monkeypatch):
    """No scale of the loss can mend it: the run has to end before it saves broken weights."""
    trainer = Trainer(settings("train.compute_dtype=float16"))
    trainer.materialize()
    for bucket in trainer.zero.buckets:
        bucket.weights[:] = np.nan
        bucket.refresh()
    with np.errstate(all="ignore"), pytest.raises(NotFinite, match="step 1"):
        trainer.train_step(*batch())
    assert trainer.loss_scale.value == 65536


def test_another_dtype_goes_on_with_its_own_loss_scale():
    trainer = Trainer(settings("train.compute_dtype=bfloat16"))
    assert trainer.counters() == {"updates": 0}
    other = Trainer(settings("train.compute_dtype=float16", "train.loss_scale=512"))
    other.restore(3, 24, {"updates": 3})
    assert other.counters() == {"updates": 3, "loss_scale": 512.0, "good_steps": 0}
    trainer.restore(3, 24, {"updates": 2, "loss_scale": 4.0, "good_steps": 7})
    assert trainer.counters() == {"updates": 2}


def test_the_loss_scale_grows():
    from cupytron.optim import LossScale

    scale = LossScale(2.0**23, interval=3)
    for finite in (True, True, False, True, True, True, True, True, True):
        scale.note(finite)
    assert scale.value == 2.0**24
    for _ in range(3):
        scale.note(True)
    assert scale.value == LossScale.LARGEST
    for _ in range(40):
        scale.note(False)
    assert scale.value == 1.0
    off = LossScale(1024, dynamic=False)
    off.note(False)
    assert off.value == 1.0


def test_float64_layers_need_float64_weights():
    with pytest.raises(ConfigError, match="compute_dtype=float64: is wider"):
        settings("train.compute_dtype=float64")


# the reference, in 16 bits: computed in float32, rounded once


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_operation_is_rounded_once(dtype):
    rng = np.random.default_rng(1)
    x, delta, dy = (rng.normal(size=(9, 24)).astype(dtype) for _ in range(3))
    weight, bias = (rng.normal(size=24).astype(dtype) for _ in range(2))

    def wide(*arrays):
        return tuple(a.astype(np.float32) for a in arrays)

    total, y, saved = ops.add_layer_norm(x, delta.copy(), weight, bias, 1e-5)
    want_total, want_y, want_saved = ops.add_layer_norm(*wide(x, delta, weight, bias), 1e-5)
    np.testing.assert_array_equal(total, want_total.astype(dtype))
    np.testing.assert_array_equal(y, want_y.astype(dtype))
    dx, dweight, dbias = ops.layer_norm_backward(dy, saved, weight, residual=x)
    wants = ops.layer_norm_backward(*wide(dy), want_saved, *wide(weight), residual=wide(x)[0])
    np.testing.assert_array_equal(dx, wants[0].astype(dtype))
    np.testing.assert_array_equal(dweight, wants[1])
    np.testing.assert_array_equal(dbias, wants[2])
    assert dweight.dtype == dbias.dtype == ops.sum_rows(dy).dtype == np.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_written_in_place(dtype):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 11)).astype(dtype)
    wide = logits.astype(np.float32)
    targets = np.array([0, 3, ops.IGNORE, 10, 7])
    assert ops.cross_entropy(logits, targets, 0.5) == ops.cross_entropy(wide, targets, 0.5)
    np.testing.assert_array_equal(logits, wide.astype(dtype))
    total = np.ones((3, 4), np.float32)
    a, b = (rng.normal(size=(6, n)).astype(dtype) for n in (3, 4))
    ops.add_product(total, a, b)
    want = 1 + a.astype(np.float32).T @ b.astype(np.float32)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    out = np.empty((3, 4), dtype)
    assert ops.matmul(a.T, b, out=out) is not None
    np.testing.assert_array_equal(out, ops.matmul(a.T, b))


# whole runs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_goes_on_to_the_same_bits(tmp_path, dtype):
    data = make_data(tmp_path)
    half = [f"train.compute_dtype={dtype}", "train.loss_scale=8", "optim.decay_steps=12"]
    run_here(data, tmp_path / "whole", *half)
    run_here(data, tmp_path / "parts", *half, "train.max_steps=5")
    run_here(data, tmp_path / "parts", *half, "parallel.zero=1")
    whole, parts = (RunFolder(tmp_path / n).find("last", print) for n in ("whole", "parts"))
    assert whole.digest() == parts.digest()
    assert whole.about["optimizer"] == parts.about["optimizer"]
    assert whole.about["optimizer"]["updates"] == 12
    assert {kind for _, kind in whole.shapes().values()} == {np.dtype(np.float32)}
    # its weights are read on a CPU in float32
    model = load(tmp_path / "whole")
    assert model.model.norm.weight.data.dtype == np.float32
    assert len(model.generate("the ", 20)) > 0


def test_verify_refuses_16_bits():
    config = settings("train.compute_dtype=bfloat16", "parallel.tp=2", "parallel.dp=1")
    with pytest.raises(ConfigError, match="it is rounded otherwise on each mesh"):
        verify.run(config)
