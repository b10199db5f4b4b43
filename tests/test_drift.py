"""Replicas that drift apart: if a tensor has a second copy, ranks and tensor are named; else nothing is."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from launchers import launch
from meshes import config, on_mesh
from runs import ENVIRONMENT, TINY, command, make_data
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import checkpoint, mesh_run, ops, verify
from cupytron.comm import run_ranks
from cupytron.config import load_config
from cupytron.parallel import drift
from cupytron.parallel.drift import ReplicasDiffer, fingerprint
from cupytron.run import train
from cupytron.run_folder import RunFolder
from cupytron.trainer import Trainer

STATE = ("exp_avg", "exp_avg_sq")
BFLOAT16 = ("train.dtype=float32", "train.compute_dtype=bfloat16")
MESHES = {
    "dp2": {"dp": 2},
    "dp4": {"dp": 4},
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "tp2 dp2": {"tp": 2, "dp": 2},
    "pp2": {"pp": 2},
    "pp2 tp2": {"pp": 2, "tp": 2},
    "pp3 dp2": {"pp": 3, "dp": 2, "split": "1,1,0"},
}
SOME = [("dp2", 0), ("dp2", 1), ("tp2", 0), ("pp2", 0)]
STAGES = [
    *SOME,
    *(
        pytest.param(mesh, stage, marks=pytest.mark.slow)
        for mesh, stages in {
            "dp2": (2, 3),
            "dp4": (0, 1),
            "tp2 dp2": range(4),
            "tp2": (3,),
            "tp2 sp": (2,),
            "pp2": (2,),
            "pp2 tp2": (0,),
            "pp3 dp2": (0, 1, 3),
        }.items()
        for stage in stages
    ),
]


def settings(mesh, stage, *more):
    # 4 micro-batches of 2 sequences
    return config(*more, zero=stage, **MESHES[mesh])


def step(trainer, context, compare=False):
    """One step, with tokens of this replica."""
    rng = np.random.default_rng([trainer.step, context.dp.rank])
    shape = (2, len(trainer.local_sequences), trainer.config.train.sequence_length)
    trainer.start_step(*rng.integers(0, 13, shape), compare)()


def places(trainer):
    """Each array of each parameter on this rank: the bucket's number, kind, parameter, its last element."""
    found = []
    for number, bucket in enumerate(trainer.zero.buckets):
        arrays = {"weight": bucket.weights, **bucket.state}
        if bucket.shard is not bucket.weights:
            arrays["shard"] = bucket.shard
        parts = [
            (kind, p.name, bucket.local(at).stop - 1)
            for kind in arrays
            for p, _, at in bucket.parts(bucket.owned)
        ]
        if trainer.zero.stage < 3:
            parts += [
                ("data", p.name, at.stop - 1) for p, _, at in bucket.parts(slice(0, bucket.size))
            ]
        found += [(number, *part) for part in parts]
    return found


def array(trainer, number, kind):
    bucket = trainer.zero.buckets[number]
    return (
        bucket.state[kind]
        if kind in STATE
        else getattr(bucket, {"weight": "weights"}.get(kind, kind))
    )


def copies(trainer, number, kind, name):
    """The number of ranks that hold this tensor, by the table of docs/parallelism.md."""
    zero, sizes, bucket = trainer.zero, trainer.context.sizes, trainer.zero.buckets[number]
    (parameter,) = (s.parameter for s in bucket.segments if s.parameter.name == name)
    rounded = bucket.shard is not bucket.weights
    # the share that this rank owns is a part of the array that the layers see
    seen_by_layers = kind in ("data", "shard") or (kind == "weight" and not rounded)
    count = sizes["dp"] if zero.stage == 0 or (seen_by_layers and zero.stage < 3) else 1
    count *= sizes["tp"] if parameter.whole else 1
    return count * (2 if sizes["pp"] > 1 and name == "embedding.weight" else 1)


def plant_everywhere(trainer, context):
    """Change one element of each tensor, on one rank after the other, and check the differences found.

    Returns: how many tensors have a second copy (True), and how many have none (False).
    """
    step(trainer, context)
    assert drift.differences(trainer.zero) == []
    mine = [
        (number, kind, name, at, copies(trainer, number, kind, name))
        for number, kind, name, at in places(trainer)
    ]
    counts = Counter()
    for rank, everything in enumerate(context.world.gather_objects(mine)):
        for number, kind, name, at, count in everything:
            here = context.world.rank == rank
            if here:
                values = array(trainer, number, kind)
                before = values[at].copy()
                values[at] = np.inf if kind == "exp_avg_sq" else before + 1
            found = [difference.line for difference in drift.differences(trainer.zero)]
            if here:
                values[at] = before
            about = f"{kind}/{name} on rank {rank}: {found}"
            assert len(found) == (count > 1), about
            counts[count > 1] += 1
            if count > 1:
                label = kind if kind in STATE else "weight"
                assert f" another {label}/{name} than " in found[0].replace("bfloat16 ", ""), about
                named = re.search(r"^ranks? ([\d, ]+) hold", found[0]).group(1)
                # of two copies nobody knows which is the right one
                assert (
                    named == str(rank)
                    if count > 2
                    else str(rank) in re.findall(r"ranks? (\d)", found[0])
                ), about
    return counts


@pytest.mark.parametrize(("mesh", "stage"), STAGES)
def test_each_second_copy_is_named_and_nothing_else(mesh, stage):
    counts = on_mesh(settings(mesh, stage), plant_everywhere)[0]
    # a mesh of replicas alone has no second copies at stage 3, and only second copies at stage 0
    assert bool(counts[True]) == (set(MESHES[mesh]) != {"dp"} or stage < 3)
    assert bool(counts[False]) == ("dp" not in MESHES[mesh] or stage > 0)


@pytest.mark.parametrize(
    ("mesh", "stage"),
    [
        ("dp2", 0),
        ("dp2", 1),
        pytest.param("tp2 dp2", 3, marks=pytest.mark.slow),
        pytest.param("pp3 dp2", 2, marks=pytest.mark.slow),
    ],
)
def test_copies_that_are_rounded_for_the_layers(mesh, stage):
    assert on_mesh(settings(mesh, stage, *BFLOAT16), plant_everywhere)[0][True]


@pytest.mark.parametrize(("mesh", "stage"), STAGES)
def test_clean_runs_raise_no_alarm(mesh, stage):
    def body(trainer, context):
        for _ in range(20):
            step(trainer, context, compare=True)
            trainer.compare_replicas()

    on_mesh(settings(mesh, stage), body)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize(("mesh", "stage"), [("tp2 dp2", 0), ("dp2", 2), ("tp2 sp", 3)])
def test_clean_runs_in_half_precision(mesh, stage, kind):
    def body(trainer, context):
        for _ in range(20):
            step(trainer, context, compare=True)
            trainer.compare_replicas()

    on_mesh(settings(mesh, stage, BFLOAT16[0], f"train.compute_dtype={kind}"), body)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("stage", "more"), [(1, ()), (2, ()), (0, BFLOAT16)])
def test_weights_that_the_update_overwrites_are_compared_before_it(rank, stage, more):
    def body(trainer, context):
        step(trainer, context)
        if context.dp.rank == rank:
            data = trainer.zero.buckets[1].data  # the other's share, too
            data[[0, -1]] += 1
        weights = [bucket.weights.copy() for bucket in trainer.zero.buckets]
        with pytest.raises(
            ReplicasDiffer, match=r"^step 2: rank 1 holds another .*weight/.* than rank 0"
        ):
            step(trainer, context, compare=True)
        for before, bucket in zip(weights, trainer.zero.buckets, strict=True):
            np.testing.assert_array_equal(before, bucket.weights)
        # without the comparison, the update overwrites the drift
        trainer.zero.clear_gradients()
        step(trainer, context)
        trainer.compare_replicas()

    on_mesh(settings("dp2", stage, *more), body)


def test_the_majority_is_right():
    def body(trainer, context):
        if context.dp.rank in (0, 2):
            trainer.zero.buckets[0].weights[0] += context.dp.rank + 1
        with pytest.raises(ReplicasDiffer) as error:
            trainer.compare_replicas()
        return str(error.value)

    (text,) = set(on_mesh(settings("dp4", 0), body))
    assert "ranks 0, 2 hold another weight/embedding.weight than ranks 1, 3 (replicas" in text


def test_many_differences_are_counted():
    def body(trainer, context):
        for bucket in trainer.zero.buckets:
            bucket.weights += context.dp.rank
        with pytest.raises(ReplicasDiffer) as error:
            trainer.compare_replicas()
        return str(error.value)

    text = on_mesh(settings("dp2", 0), body)[0]
    assert text.count("rank 1 holds another") == 3
    assert re.search(r"; and \d+ more differences \(replicas must be the same\)$", text)


def test_ranks_of_tp_hear_that_rounding_may_be_why():
    def body(trainer, context):
        trainer.zero.buckets[-1].state["exp_avg"][-1] += context.tp.rank
        with pytest.raises(
            ReplicasDiffer, match=r"rank 1 holds another exp_avg/norm.bias than rank 0 .*--sp$"
        ):
            trainer.compare_replicas()

    on_mesh(settings("tp2", 1), body)


@pytest.mark.parametrize("name", ["step", "position", "updates", "loss_scale", "good_steps"])
def test_numbers_are_compared(name):
    def body(trainer, context):
        step(trainer, context)
        owner = trainer.loss_scale if name in ("loss_scale", "good_steps") else trainer
        attribute = "value" if name == "loss_scale" else name
        trainer.compare_replicas()
        setattr(owner, attribute, getattr(owner, attribute) + 3 * (context.world.rank == 1))
        with pytest.raises(
            ReplicasDiffer, match=rf"rank 1 holds another {name} than ranks? 0.* in place of "
        ):
            trainer.compare_replicas()

    more = ("train.dtype=float32", "train.compute_dtype=float16")
    on_mesh(settings("tp2 dp2", 2, *more), body)


def test_a_gradient_that_drifts_shows_in_the_weights():
    def body(trainer, context):
        inputs = np.random.default_rng(context.dp.rank).integers(0, 13, (4, 8))
        loss = trainer.compute_gradients(inputs, inputs)
        if context.dp.rank == 1:
            trainer.zero.buckets[1].gradient[0] += 0.01
        trainer.apply_gradients(loss)
        with pytest.raises(ReplicasDiffer, match="rank 1 holds another weight/"):
            trainer.compare_replicas()

    on_mesh(settings("dp2", 0), body)


def test_a_replica_that_spoils_the_loss_is_named_in_place_of_the_learning_rate():
    def body(trainer, context):
        if context.dp.rank == 1:
            trainer.zero.buckets[1].weights[0] = np.nan
        with pytest.raises(ReplicasDiffer, match=r"rank 1 holds another weight/positions\.weight"):
            step(trainer, context)

    on_mesh(settings("dp2", 0), body)


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.setattr(drift, "fingerprint", None)

    def body(trainer, context):
        step(trainer, context, compare=True)
        trainer.compare_replicas()

    on_mesh(config(), body)


def test_verify_sees_drift_in_optimizer_state(monkeypatch):
    update = Trainer.apply_gradients

    def planted(self, loss=0.0):
        result = update(self, loss)
        if self.context.world.rank == 1:
            self.zero.buckets[1].state["exp_avg_sq"][0] = np.inf
        return result

    monkeypatch.setattr(Trainer, "apply_gradients", planted)
    report = verify.run(settings("dp2", 0), steps=1)
    assert report.largest <= report.tolerance and not report.replicas_equal and not report.ok


# the fingerprint


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_bit_counts(dtype):
    from cupytron.backend import named_dtype

    rng = np.random.default_rng(0)
    for length in (1, 3, 130, 1000):
        values = rng.normal(size=length).astype(named_dtype(dtype))
        right = fingerprint(values)
        assert fingerprint(np.concatenate([values, values])[:length]) == right
        bits = values.view(np.uint8)
        for _ in range(200):
            at, bit = rng.integers(len(bits)), np.uint8(1 << rng.integers(8))
            bits[at] ^= bit
            assert fingerprint(values) != right
            bits[at] ^= bit
        assert fingerprint(values) == right


def test_signs_nan_and_order_count():
    for dtype in (np.float32, np.float64):
        for length in (16, 63, 64, 1024, 6300):
            values = np.random.default_rng(1).normal(size=length).astype(dtype)
            right = fingerprint(values)
            assert fingerprint(-values) != right
            assert fingerprint(values[::-1].copy()) != right
            assert fingerprint(np.full(length, np.nan, dtype)) == fingerprint(
                np.full(length, np.nan, dtype)
            )
            assert fingerprint(np.zeros(length, dtype)) != fingerprint(-np.zeros(length, dtype))
            assert fingerprint(np.zeros(length, dtype)) != fingerprint(
                np.full(length, np.inf, dtype)
            )


def test_it_is_the_same_wherever_the_array_lies():
    values = np.random.default_rng(2).normal(size=5001).astype(np.float32)
    for offset in range(1, 4):
        assert fingerprint(
            np.concatenate([np.zeros(offset, np.float32), values])[offset:]
        ) == fingerprint(values)


def test_blocks_do_not_change_it(monkeypatch):
    values = np.random.default_rng(3).normal(size=3000).astype(np.float32)
    right = fingerprint(values)
    monkeypatch.setattr(drift, "_BLOCK", 2 * 8 * drift.ROW)
    assert fingerprint(values) == right


# whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run_two(data, out, *more):
    """A run of two replicas, in threads."""
    settings = load_config(overrides=[*TINY, f'data.path="{data}"', "parallel.dp=2", *more])
    return run_ranks(
        2, lambda world: train(settings, out, dict(ENVIRONMENT), quiet=True, world=world)
    )


def digest(out):
    return checkpoint.Checkpoint(RunFolder(out).place(12)).digest()["all"]


@pytest.mark.parametrize(
    ("kind", "zero", "more", "step", "saved"),
    [
        ("weights", 0, (), 8, 5),
        ("data", 1, ("train.check_replicas=7",), 7, 5),
        pytest.param("exp_avg_sq", 0, (), 8, 5, marks=pytest.mark.slow),
        pytest.param("weights", 0, ("train.check_replicas=7",), 7, 5, marks=pytest.mark.slow),
        pytest.param("data", 2, ("checkpoint.interval=7",), 7, 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_stops_and_goes_on_from_the_last_save(
    tmp_path, data, monkeypatch, kind, zero, more, step, saved
):
    start = Trainer.start_step

    def planted(self, *args):
        if self.step == 6 and self.context.world.rank == 1:
            bucket = self.zero.buckets[1]
            flat = bucket.state[kind] if kind in STATE else getattr(bucket, kind)
            flat[0] = np.inf if kind in STATE else flat[0] + 0.5
        return start(self, *args)

    more = (f"parallel.zero={zero}", *more)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "start_step", planted)
        with pytest.raises(ReplicasDiffer) as error:
            run_two(data, tmp_path / "run", *more)
    text = str(error.value)
    assert text.startswith(f"step {step}: rank 1 holds another ")
    assert (
        f"nothing was saved; start the same command again: it goes on from step {saved}; " in text
    )
    assert RunFolder(tmp_path / "run").steps()[-1] == saved
    run_two(data, tmp_path / "run", *more)
    run_two(data, tmp_path / "unbroken", *more)
    assert digest(tmp_path / "run") == digest(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["mpich", pytest.param("openmpi", marks=pytest.mark.slow)])
def test_real_ranks_end_with_one_message(tmp_path, data, name):
    out = tmp_path / "run"
    arguments = command(data, out, "train.max_steps=12")
    job = [
        sys.executable,
        str(Path(__file__).with_name("drifting_job.py")),
        "1",
        "6",
        *arguments[1:],
    ]
    started, env = launch(name, 2, job)
    done = subprocess.run(started, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    (message,) = re.findall(r"error: .*", done.stderr)
    assert re.search(
        r"step 8: rank 1 holds another weight/blocks\.0\.norm1\.weight than rank 0", message
    )
    assert "it goes on from step 5" in message
    assert RunFolder(out).steps()[-1] == 5
    started, env = launch(name, 2, arguments)
    done = subprocess.run(started, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    run_two(data, tmp_path / "unbroken")
    assert digest(out) == digest(tmp_path / "unbroken")


# a GPU


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_replicas_on_gpus(stage):
    overrides = [
        "model.vocab_size=13",
        "model.num_layers=1",
        "model.d_model=32",
        "train.sequence_length=8",
        "train.micro_batch=2",
        "train.global_batch=8",
        "train.compute_dtype=bfloat16",
        "parallel.device=cuda",
        "parallel.autotune=off",
        "parallel.dp=2",
        f"parallel.zero={stage}",
    ]
    settings = load_config(overrides=overrides)

    def body(world):
        context = mesh_run.open_mesh(settings, world)
        trainer = Trainer(settings, None, context)
        trainer.materialize()
        for _ in range(3):
            step(trainer, context, compare=True)
            trainer.compare_replicas()
        if world.rank == 1:
            trainer.zero.buckets[1].data[:1] = 7
        with pytest.raises(
            ReplicasDiffer, match=r"step 4: rank 1 holds another bfloat16 weight/positions\.weight"
        ):
            step(trainer, context, compare=True)

    with simulated_libraries(), simulated_gpu():
        try:
            run_ranks(2, body)
        finally:
            ops.use(None)
