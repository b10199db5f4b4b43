"""Whole models on the simulated GPU: the CPU's numbers, graphs, no waiting, skipped steps, runs."""

import gc
import inspect
import json
import re
import warnings

import numpy as np
import pytest
from runs import ENVIRONMENT, TINY, make_data
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import kernels, mesh_run, ops, verify
from cupytron.config import load_config
from cupytron.errors import ConfigError
from cupytron.graph import WARMUP
from cupytron.kernels.optimizer import Control
from cupytron.run import train
from cupytron.run_folder import RunFolder
from cupytron.trained import load
from cupytron.trainer import NotFinite, Trainer

SMALL = [
    "model.vocab_size=50",
    "model.num_layers=2",
    "model.d_model=32",
    "model.dropout=0.1",
    "train.sequence_length=16",
    "train.micro_batch=2",
    "train.global_batch=8",
    "optim.warmup_steps=0",
    "parallel.autotune=off",
]


@pytest.fixture
def cupy():
    with simulated_libraries(), simulated_gpu() as module:
        yield module
    ops.use(None)


def settings(*more, device="cuda", check=True):
    return load_config(overrides=[*SMALL, f"parallel.device={device}", *more], check=check)


def trainer_of(config):
    trainer = Trainer(config, None, mesh_run.open_mesh(config))
    trainer.materialize()
    return trainer


def batch(step=0):
    tokens = np.random.default_rng(step).integers(0, 50, (8, 17))
    return tokens[:, :-1], tokens[:, 1:]


def steps(trainer, count, first=0):
    return np.array([trainer.train_step(*batch(i % 3))[:2] for i in range(first, first + count)])


def weights(trainer):
    return {n: p.data.get() for n, p in trainer.model.named_parameters()}


def test_the_kernels_have_the_signatures_of_the_reference(cupy):
    table = kernels.table()
    # two small tables that are made once for each shape
    assert set(ops.REFERENCE) - set(table) == {"rotary_table", "sinusoidal_positions"}
    for name, function in table.items():
        wanted = inspect.signature(ops.REFERENCE[name]).parameters
        assert list(inspect.signature(function).parameters) == list(wanted), name
        for parameter, found in inspect.signature(function).parameters.items():
            assert found.default == wanted[parameter].default, f"{name}({parameter})"


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        # the CPU's reference rounds where the kernels do not, and the other way round
        ("gpt2", "float64", 1e-13),
        ("llama", "float64", 1e-13),
        ("gpt2", "float32", 1e-5),
        ("llama", "bfloat16", 2e-3),
        ("gpt2", "bfloat16", 2e-3),
        ("gpt2", "float16", 1e-3),
    ],
)
def test_losses_and_norms_are_the_cpus(cupy, family, dtype, tolerance):
    kind = "dtype" if dtype == "float64" else "compute_dtype"
    more = [f"model.family={family}", f"train.{kind}={dtype}"]
    if dtype.endswith("float16"):
        more.append("model.dropout=0")  # cuDNN has masks of its own
    got = steps(trainer_of(settings(*more)), 4)
    want = steps(trainer_of(settings(*more, device="cpu")), 4)
    np.testing.assert_allclose(got, want, rtol=tolerance)


@pytest.mark.parametrize(
    "more",
    [
        ["model.activation=relu", "model.position=sinusoidal", "model.tied=false"],
        ["model.activation=gelu_exact", "model.norm=rms", "model.position=none"],
        ["model.family=llama", "model.num_kv_heads=2", "model.dropout=0"],
        ["model.recompute=block"],
        ["model.recompute=selective", "model.activation=swiglu"],
        ["optim.name=sgd", "train.deterministic=true"],
        ["parallel.zero=3"],
    ],
    ids=lambda more: " ".join(more),
)
def test_other_models(cupy, more):
    got = steps(trainer_of(settings("train.dtype=float64", *more)), 3)
    want = steps(trainer_of(settings("train.dtype=float64", *more, device="cpu")), 3)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("graphs", ["true", "false"])
def test_a_step_waits_for_nothing(cupy, graphs):
    trainer = trainer_of(settings("train.compute_dtype=bfloat16", f"parallel.graphs={graphs}"))
    trainer.train_step(*batch(0))  # makes tables and plans
    heard = trainer.start_step(*batch(1))
    for step in range(2, 8):
        before = cupy.sim.synchronisations
        started = trainer.start_step(*batch(step))
        assert cupy.sim.synchronisations == before
        assert np.isfinite(heard().loss)  # of the step before: a run is one step ahead
        heard = started


def test_a_replay_gives_the_bits_of_eager_steps(cupy):
    runs = []
    for graphs in ("true", "false"):
        more = ["train.compute_dtype=bfloat16", f"parallel.graphs={graphs}"]
        trainer = trainer_of(settings(*more))
        cupy.sim.clear()
        runs.append((steps(trainer, 5).tolist(), weights(trainer)))
        launched = [kind for kind, _, _ in cupy.sim.log].count("graph")
        # micro-steps of 5 steps, and their updates
        assert launched == (4 * 5 - WARMUP + 5 - WARMUP if graphs == "true" else 0)
    assert runs[0][0] == runs[1][0]
    for name, values in runs[0][1].items():
        assert np.array_equal(values.view(np.uint16), runs[1][1][name].view(np.uint16)), name


def test_what_cannot_be_recorded_runs_eagerly_after_one_warning(cupy, monkeypatch):
    want = steps(trainer_of(settings()), 4)
    original = ops.add_to

    def waiting(total, x):
        float(x.ravel()[0])
        return original(total, x)

    trainer = trainer_of(settings())
    monkeypatch.setattr(ops, "add_to", waiting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = steps(trainer, 4)
    assert [str(w.message)[:19] for w in caught] == ["CUDA graphs are off"]
    np.testing.assert_array_equal(got, want)


def test_other_shapes_are_recorded_anew(cupy):
    trainer = trainer_of(settings("train.dtype=float64"))
    other = trainer_of(settings("train.dtype=float64", "parallel.graphs=false"))
    for sequence in (16, 16, 16, 9, 9, 16):
        inputs, targets = (x[:, :sequence] for x in batch(sequence))
        assert trainer.train_step(inputs, targets) == other.train_step(inputs, targets)


def test_pools_of_graphs_that_are_gone_are_used_again(cupy):
    """CuPy's pools give nothing back when they are dropped."""

    def pools():
        trainer = trainer_of(settings())
        steps(trainer, 4)
        trainer._gpu.forget_graphs()
        steps(trainer, 4)
        return {id(graph.pool) for graph in trainer.context.device.graphs}

    first = pools()
    gc.collect()
    assert len(first) == 2 and pools() == first


# steps that are not finite


def test_an_overflow_is_skipped_on_the_device(cupy):
    trainer = trainer_of(settings("train.compute_dtype=float16", "train.loss_scale=1024"))
    steps(trainer, 3)
    before = [b.weights.get() for b in trainer.zero.buckets]
    trainer.zero.buckets[0].grad[3] = np.inf
    found = trainer.train_step(*batch(0))
    assert not np.isfinite(found.grad_norm)
    for bucket, values in zip(trainer.zero.buckets, before, strict=True):
        np.testing.assert_array_equal(bucket.weights.get(), values)
    assert trainer.counters() == {"updates": 3, "loss_scale": 512.0, "good_steps": 0}
    assert np.isfinite(trainer.train_step(*batch(1)).grad_norm)
    assert trainer.counters() == {"updates": 4, "loss_scale": 512.0, "good_steps": 1}


def test_overflow_without_a_scale_ends_the_run(cupy):
    for scale in (1, 2):
        more = ["train.compute_dtype=float16", f"train.loss_scale={scale}"]
        trainer = trainer_of(settings(*more))
        before = weights(trainer)
        trainer.zero.buckets[0].grad[3] = np.inf
        first, second = trainer.start_step(*batch(0)), trainer.start_step(*batch(1))
        if scale == 1:
            with pytest.raises(NotFinite, match="step 1"):
                first()
            assert all((weights(trainer)[name] == values).all() for name, values in before.items())
        else:
            assert first().skipped and not second().skipped


def test_a_loss_that_is_not_finite_is_no_overflow(cupy):
    trainer = trainer_of(settings("train.compute_dtype=float16"))
    for bucket in trainer.zero.buckets:
        bucket.weights[:] = np.nan
        bucket.refresh()
    with pytest.raises(NotFinite, match="step 1"):
        trainer.train_step(*batch(0))
    assert trainer.counters()["loss_scale"] == 65536


def test_a_recording_that_is_refused_at_its_end(cupy, monkeypatch):
    want = steps(trainer_of(settings()), 4)
    trainer = trainer_of(settings())

    def refused(self):
        original(self)
        raise RuntimeError("cudaErrorStreamCaptureUnjoined")

    original = cupy.cuda.Stream.end_capture
    monkeypatch.setattr(cupy.cuda.Stream, "end_capture", refused)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off: .*Unjoined"):
        got = steps(trainer, 4)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["train.dtype=float64", "train.compute_dtype=bfloat16"], "train.dtype=float64"),
        (["train.reduce_dtype=float64"], "train.reduce_dtype=float64"),
        (["train.dtype=float64", "train.reduce_dtype=float32"], "have to be float64"),
        (["model.d_model=260", "model.num_heads=1"], "a head of 260 features"),
    ],
)
def test_what_no_kernel_can_do_is_refused_before_anything_is_made(cupy, more, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        mesh_run.open_mesh(settings(*more))


def test_models_on_both_devices_in_one_process(cupy):
    """In turn, and neither gets the other's functions."""
    want = steps(trainer_of(settings(device="cpu")), 3)
    on_gpu, on_cpu = trainer_of(settings()), trainer_of(settings(device="cpu"))
    cupy.sim.clear()
    for i in range(3):
        here, there = on_cpu.train_step(*batch(i)), on_gpu.train_step(*batch(i))
        np.testing.assert_array_equal(here[:2], want[i])
        np.testing.assert_allclose(there[:2], want[i], rtol=1e-5)
    assert ("launch", "add_layer_norm") in {(kind, name) for kind, name, _ in cupy.sim.log}


def test_nothing_is_updated_after_a_step_that_is_not_finite(cupy):
    """The host may have started more steps before it hears of it."""
    trainer = trainer_of(settings())
    steps(trainer, 3)
    before = [b.weights.get() for b in trainer.zero.buckets]
    trainer.zero.buckets[0].grad[3] = np.nan
    bad, later = trainer.start_step(*batch(0)), trainer.start_step(*batch(1))
    for bucket, values in zip(trainer.zero.buckets, before, strict=True):
        np.testing.assert_array_equal(bucket.weights.get(), values)
    with pytest.raises(NotFinite, match="step 4"):
        bad()
    with pytest.raises(NotFinite):
        later()
    assert int(trainer._gpu.control[Control.STEP]) == 3


# meshes, by ranks that are threads and share the GPU


@pytest.mark.parametrize(
    "mesh",
    [
        {"tp": 2, "sp": "true"},
        {"dp": 2, "zero": 1},
        {"dp": 2, "zero": 3, "tp": 2},
        {"pp": 2, "schedule": "zb-h1", "dp": 2, "zero": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_mesh_has_the_numbers_of_one_process(cupy, mesh, family):
    sizes = [f"parallel.{key}={value}" for key, value in mesh.items()]
    more = ["train.dtype=float64", "model.vocab_size=51", f"model.family={family}"]
    report = verify.run(settings(*more, *sizes, check=False), steps=3)
    assert report.ok, report.differences[:3]
    assert report.largest < 1e-10


@pytest.mark.parametrize("mesh", [{"dp": 2, "zero": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_mesh_in_bfloat16(cupy, mesh):
    from cupytron.comm import run_ranks

    sizes = [f"parallel.{key}={value}" for key, value in mesh.items()]
    # cuDNN's dropout does not know how heads are spread over ranks
    half = ["train.compute_dtype=bfloat16", "model.dropout=0"]
    config = settings(*half, *sizes, check=False)

    def body(world):
        trainer = Trainer(config, None, mesh_run.open_mesh(config, world))
        trainer.materialize()
        losses = []
        for i in range(3):
            mine = trainer.local_sequences
            losses.append(trainer.train_step(*(x[mine] for x in batch(i)))[:2])
        return losses

    got = run_ranks(2, body)
    want = steps(trainer_of(settings(*half, device="cpu")), 3)
    np.testing.assert_allclose(got[0], want, rtol=5e-3)
    assert got[0] == got[1]


# runs


def test_a_run_moves_between_cpu_and_gpu(cupy, tmp_path):
    data = make_data(tmp_path)

    def run(name, device, end):
        overrides = [*TINY, f'data.path="{data}"', "train.dtype=float64", "optim.decay_steps=12"]
        overrides += [f"parallel.device={device}", "parallel.autotune=off"]
        config = load_config(overrides=[*overrides, f"train.max_steps={end}"])
        return train(config, tmp_path / name, dict(ENVIRONMENT), quiet=True)

    want = run("cpu", "cpu", 12)
    for end, device in ((5, "cuda"), (8, "cpu"), (12, "cuda")):
        got = run("both", device, end)
    assert got.val_loss == pytest.approx(want.val_loss, rel=1e-12)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("cpu", "both")
    ]
    for one, other in zip(*(filter(lambda x: "loss" in x, part) for part in lines), strict=True):
        assert one["step"] == other["step"]
        assert one["tokens"] == other["tokens"]
        np.testing.assert_allclose(
            [other["loss"], other["grad_norm"]], [one["loss"], one["grad_norm"]], rtol=1e-11
        )
    about = RunFolder(tmp_path / "both").find("last", print).about
    assert about["environment"]["gpu"] == "Simulated GPU"
    # what it has learnt, on either device, with and without a cache of keys and values
    texts, losses = [], []
    for device in ("cpu", "cuda"):
        config = settings(f"parallel.device={device}")
        model = load(tmp_path / "both", context=mesh_run.open_mesh(config))
        texts.append(model.generate("the ", 12, temperature=0.7))
        losses.append(model.evaluate()["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert texts[0] == texts[1]
