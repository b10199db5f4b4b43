"""Every mesh gives the numbers of one process: chosen cases, drawn ones, and bugs that must be seen."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launchers import NAMES, launch
from meshes import check, config, on_mesh

from cupytron import AdamW, Zero, backend, cut
from cupytron import trainer as trainer_module
from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import load_config
from cupytron.layer import Layer, Parameter, normal
from cupytron.nn import MLP, Attention, Embedding, Head, LayerNorm
from cupytron.parallel import plan
from cupytron.parallel.buffer import Bucket
from cupytron.parallel.pipeline import Pipeline, run_schedule
from cupytron.parallel.schedules import NAMES as NAMES_OF_SCHEDULES
from cupytron.parallel.schedules import Schedule
from cupytron.parallel.tensor import RowLinear
from cupytron.stash import MicroBatch, Stash

FOUND = {}  # one-process runs, shared by the cases below

CASES = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"tp": 4, "sp": True, "sp_keep_gathered": "true"},
    {"dp": 2},
    {"dp": 4, "zero": 1},
    {"dp": 2, "zero": 2},
    {"dp": 4, "zero": 3},
    {"tp": 2, "dp": 2, "zero": 1},
    {"tp": 2, "dp": 2, "zero": 2, "sp": True},
    {"tp": 2, "dp": 2, "zero": 3, "sp": True},
    {"tp": 4, "dp": 2, "zero": 3},
    {"pp": 2},
    {"pp": 4, "schedule": "gpipe", "zero": 1},
    {"pp": 2, "schedule": "interleaved", "dp": 2, "zero": 3},
    {"pp": 2, "schedule": "zb-h1", "dp": 2, "zero": 2},
    {"pp": 2, "schedule": "zb-h1", "tp": 2, "dp": 2, "zero": 3, "sp": True},
    {"pp": 4, "schedule": "1f1b", "tp": 2, "sp": True},
    {"pp": 3, "schedule": "interleaved", "chunks": 1, "split": "1,1,0"},
]


@pytest.mark.parametrize("vocab", [64, 65])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "mesh", CASES, ids=lambda mesh: " ".join(f"{k}={v}" for k, v in mesh.items())
)
def test_a_mesh_gives_the_numbers_of_one_process(mesh, family, vocab):
    report = check(
        config(f"model.family={family}", f"model.vocab_size={vocab}", **mesh), found=FOUND
    )
    assert report.ok and report.largest < 1e-10, report.differences[0]
    assert report.gradient_error < 1e-6


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("schedule", NAMES_OF_SCHEDULES)
def test_five_layers_on_four_stages(schedule, recompute):
    settings = ["model.num_layers=5", f"model.recompute={recompute}", "model.tied=false"]
    if schedule in ("interleaved", "zb-v"):
        settings[0] = "model.num_layers=6"  # eight parts, with embedding and head
    report = check(config(*settings, pp=4, schedule=schedule), found=FOUND)
    assert report.ok and report.largest < 1e-10, report.differences[0]


@pytest.mark.parametrize(
    "mesh",
    [
        {"pp": 2},
        {"pp": 4, "schedule": "gpipe", "zero": 1},
        {"pp": 2, "schedule": "interleaved", "chunks": 2},
        {"schedule": "interleaved", "dp": 2, "zero": 2},  # two chunks, one stage
        {"pp": 2, "schedule": "zb-h1", "dp": 2, "zero": 3},
        {"pp": 3, "schedule": "zb-h1", "dp": 2, "zero": 0},
        {"pp": 2, "schedule": "zb-v", "dp": 2, "zero": 2},  # both ends of the model on one stage
        {"pp": 2, "schedule": "1f1b", "dp": 4, "zero": 2},
    ],
    ids=str,
)
def test_deterministic_pipelines_give_the_bits_of_one_process(mesh):
    case = ["train.dtype=float32", "train.deterministic=true", "train.global_batch=24"]
    for recompute in ("none", "selective", "block"):
        settings = config(*case, f"model.recompute={recompute}", **mesh)
        report = check(settings, steps=3, found=FOUND)
        assert report.tolerance == 0 and report.ok and report.largest == 0, report.differences[0]


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("dp", [2, 4])
def test_deterministic_replicas_give_the_bits_of_one_process(dp, zero):
    """float32, tied table, dropout; a global batch that is no power of two."""
    case = ["train.dtype=float32", "train.deterministic=true", "train.global_batch=24"]
    report = check(config(*case, dp=dp, zero=zero), steps=3, found=FOUND)
    assert report.tolerance == 0 and report.ok and report.largest == 0, report.differences[0]


def test_without_the_tree_the_bits_differ():
    """Otherwise the test above would prove nothing."""
    case = ["train.dtype=float32", "train.global_batch=24"]
    assert check(config(*case, dp=2), steps=3, found=FOUND).largest > 0


def test_deterministic_training_refuses_three_replicas():
    with pytest.raises(ValueError, match="choose dp from 1, 2, 4, 8"):
        config("train.deterministic=true", "train.global_batch=12", dp=3)


@st.composite
def drawn(draw):
    """A model, a batch and a mesh; nothing in them is round."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    pp = draw(st.sampled_from([1, 1, 2, 3] if tp < 3 else [1]))
    dp = draw(st.sampled_from([1, 2, 3] if tp * pp < 3 else [1, 2] if tp * pp < 5 else [1]))
    schedule = draw(st.sampled_from(NAMES_OF_SCHEDULES))
    chunks = (
        draw(st.integers(1, 3)) if schedule == "interleaved" else 2 if schedule == "zb-v" else 1
    )
    layers = draw(st.integers(max(1, pp * chunks - 2), max(2, pp * chunks - 1)))
    kv_heads = tp * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    width = heads * 2 * draw(st.integers(1, 3))
    sequence = draw(st.integers(1, 7))
    micro_batch = draw(st.integers(1, 3))
    sp = draw(st.booleans()) and micro_batch * sequence % tp == 0
    boolean = st.sampled_from(["true", "false"])
    values = {
        "model.family": draw(st.sampled_from(["gpt2", "llama"])),
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.num_kv_heads": kv_heads,
        "model.d_model": width,
        "model.d_ff": tp * draw(st.integers(1, 9)),
        "model.vocab_size": draw(st.integers(2, 23)),
        "model.position": draw(st.sampled_from(["learned", "rotary", "sinusoidal", "none"])),
        "model.norm": draw(st.sampled_from(["layer", "rms"])),
        "model.activation": draw(st.sampled_from(["gelu", "gelu_exact", "relu", "swiglu"])),
        "model.bias": draw(boolean),
        "model.tied": draw(boolean),
        "model.dropout": draw(st.sampled_from([0.0, 0.2])),
        "model.recompute": draw(st.sampled_from(["none", "selective", "block"])),
        "train.sequence_length": sequence,
        "train.micro_batch": micro_batch,
        "train.global_batch": micro_batch * dp * draw(st.integers(1, 4)),
        "train.deterministic": draw(boolean) if dp < 3 else "false",
        "train.seed": draw(st.integers(0, 2**31)),
        "optim.name": draw(st.sampled_from(["adamw", "sgd"])),
        "parallel.schedule": schedule,
        "parallel.chunks": chunks,
        "parallel.zero": draw(st.integers(0, 3)),
        "parallel.sp_keep_gathered": draw(boolean),
    }
    return config(*(f"{key}={value}" for key, value in values.items()), tp=tp, pp=pp, dp=dp, sp=sp)


@pytest.mark.timeout(int(os.environ.get("CUPYTRON_EXAMPLES", "200")) * 3)  # on busy cores, too
@settings(
    max_examples=int(os.environ.get("CUPYTRON_EXAMPLES", "200")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(drawn())
def test_any_mesh_gives_the_numbers_of_one_process(case):
    report = check(case, steps=1)
    # a kink of relu within reach of the finite differences is no mistake of the gradient's
    assert report.largest <= report.tolerance, report.differences[0]
    assert report.replicas_equal and report.groups_right
    if case.model.activation != "relu":
        assert report.gradient_error < 1e-6, report.gradient_error


# the bugs that other projects have had: verify must see each of them


def test_the_residual_dropped_is_seen(monkeypatch):
    right = LayerNorm.backward
    monkeypatch.setattr(
        LayerNorm, "backward", lambda self, dy, stash, residual=None: right(self, dy, stash)
    )
    assert not check(config(tp=2)).ok


def test_a_row_bias_before_the_reduction_is_seen(monkeypatch):
    def forward(self, x, stash):
        stash.push(self, x)
        return self.region.leave(x @ self.weight.data + self.bias.data)

    monkeypatch.setattr(RowLinear, "forward", forward)
    assert not check(config(tp=2)).ok
    assert check(config("model.bias=false", dp=2)).ok


def test_a_contiguous_cut_of_qkv_is_seen(monkeypatch):
    """Columns ordered (q of all heads, k, v) are right in one process, and no share holds whole heads."""

    def split(self, qkv, stash):
        batch, size = stash.batch.batch_size, self.head_size
        heads = qkv.reshape(batch, len(qkv) // batch, -1, size)
        kv = heads.shape[2] // (self.group + 2)
        q = heads[:, :, : self.group * kv].reshape(*heads.shape[:2], kv, self.group, size)
        return q, heads[:, :, self.group * kv : -kv], heads[:, :, -kv:]

    monkeypatch.setattr(Attention, "_split", split)
    assert check(config(dp=2)).ok  # without a cut nothing is wrong
    assert not check(config(tp=2)).ok


def test_complemented_groups_are_seen(monkeypatch):
    right = ParallelContext._along

    def complement(self, axis):
        if axis == "pp":  # stages that wait for the wrong ones would wait for ever
            return right(self, axis)
        others = [other for other in ("pp", "dp", "tp") if other != axis]
        key = sum(self.coordinates[other] * 10**i for i, other in enumerate(others))
        return self.world.split(self.coordinates[axis], key, axis)

    monkeypatch.setattr(ParallelContext, "_along", complement)
    assert not check(config(tp=2, dp=2)).ok
    assert not check(config(dp=2)).ok


def test_a_norm_gradient_that_is_not_summed_is_seen(monkeypatch):
    monkeypatch.setattr(Bucket, "ranges", lambda self, chosen, within: [])
    monkeypatch.setattr(Bucket, "squares", lambda self, chosen: np.ones(self.pieces))
    assert check(config("optim.clip=0", tp=2)).ok  # the norm above matters to nothing here
    assert not check(config("optim.clip=0", tp=2, sp=True)).ok


def test_a_loss_scaled_by_each_rank_is_seen(monkeypatch):
    monkeypatch.setattr(
        trainer_module,
        "count_targets",
        lambda dp, targets: dp.size * int((targets != -1).sum()),
    )
    assert check(config(tp=2)).ok
    assert not check(config(dp=2)).ok


def test_a_tied_gradient_that_is_not_summed_is_seen(monkeypatch):
    monkeypatch.setattr(Zero, "copies", lambda self, bucket: None)
    assert check(config(dp=2)).ok
    assert check(config("model.tied=false", pp=2)).ok
    assert not check(config(pp=2)).ok


@pytest.mark.parametrize("kind", ["F", "B"])
def test_a_wrong_order_of_micro_batches_is_seen(monkeypatch, kind):
    right = Schedule.sent

    def swapped(self, sender, receiver):
        messages = list(right(self, sender, receiver))
        mine = [i for i, message in enumerate(messages) if message.kind == kind]
        if mine:
            first, second = mine[:2]
            messages[first], messages[second] = messages[second], messages[first]
        return messages

    monkeypatch.setattr(Schedule, "sent", swapped)
    assert not check(config(pp=2)).ok


def test_a_loss_counted_once_a_stage_is_seen(monkeypatch):
    right = Pipeline.total
    monkeypatch.setattr(
        Pipeline, "total", lambda self, dp, losses: self.pp.size * right(self, dp, losses)
    )
    assert check(config(dp=2)).ok
    (difference, *_) = check(config(pp=2)).differences
    assert difference.what == "loss" and difference.error == pytest.approx(1)


def test_targets_counted_once_a_stage_are_seen(monkeypatch):
    right = Zero.compute_gradients
    monkeypatch.setattr(
        Zero,
        "compute_gradients",
        lambda self, work, scale: right(self, work, scale / self.pipeline.pp.size),
    )
    assert check(config(dp=2)).ok
    assert not check(config(pp=2)).ok


# what does not fit is refused


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (
            {"column": ["*.gate"]},
            r"column pattern '\*.gate' matches no Linear layer; there are: blocks.0",
        ),
        ({"row": ["head"]}, "row pattern 'head' matches no Linear layer"),
        (
            {"vocabulary": ["*.up"]},
            "matches no Embedding or Head layer; there are: embedding, head",
        ),
        ({"column": ["*.up"]}, "blocks.0.mlp: up and down belong together"),
        ({"row": ["*.out"]}, "blocks.0.attention: qkv and out belong together"),
        ({"column": ["*.up"], "row": ["*.up"]}, "matched by column and by row"),
        ({"vocabulary": ["head"]}, "embedding and head share a table"),
        (
            {"sequence_parallel": True, "vocabulary": ["embedding", "head"]},
            "may need whole sequences",
        ),
        (
            {"sequence_parallel": True, "column": ["*.qkv"], "row": ["*.out"]},
            "embedding: sequence parallelism needs it cut",
        ),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, words):
    from conftest import small_config

    from cupytron.model import Transformer

    def body(world):
        plan.parallelize(
            Transformer(small_config()), ParallelContext(tp=2, world=world), **patterns
        )

    with pytest.raises(ValueError, match=words):
        run_ranks(2, body)
    with pytest.raises(ValueError, match=words):  # one rank hears of it too
        plan.parallelize(Transformer(small_config()), ParallelContext(), **patterns)


def test_heads_that_tp_does_not_divide_are_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"does not divide model\.num_kv_heads=2; choose tp from 1, 2"
    ):
        config("model.num_kv_heads=2", tp=4)
    with pytest.raises(ValueError, match=r"mlp.down: input width=10 .* choose tp from 1, 2, 5, 10"):
        on_mesh(config("model.d_ff=10", tp=4), lambda trainer, context: None)


@pytest.mark.parametrize(
    ("ranks", "mesh", "words"),
    [
        (
            8,
            ["parallel.tp=3"],
            r"does not fit 8 ranks; choose from tp=1 dp=8, tp=2 dp=4, tp=4 dp=2 \(dp=8 needs train.glo",
        ),
        (2, ["parallel.dp=4"], r"tp=1 x dp=4 does not fit 2 ranks.*mpirun -n 4"),
        (
            8,
            ["parallel.pp=2", "parallel.dp=3"],
            "tp=1 x pp=2 x dp=3 does not fit 8 ranks; choose from tp=1 pp=2 dp=4, tp=2 pp=2 dp=2",
        ),
        (1, ["parallel.tp=2"], r"does not fit 1 rank;.*mpirun -n 2"),
        (
            2,
            [],
            "train.global_batch=12: is not a multiple of train.micro_batch=12 times dp=2; choose 24",
        ),
        (3, ["train.deterministic=true", "train.global_batch=36"], "choose dp from 1, 2, 4"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_before_any_work(ranks, mesh, words):
    with pytest.raises(ValueError, match=words):
        load_config(overrides=mesh, ranks=ranks)


class OwnModel(Layer):
    """Not the library's Transformer: names are given by whoever puts it on a mesh."""

    def __init__(self):
        self.embedding = Embedding(7, 8)
        self.mlp = MLP(8, 12, "relu", True, 0.5, 0.5)
        self.head = Head(Parameter((7, 8), normal(0.5)))

    def forward(self, ids, stash):
        x = self.mlp.forward(self.embedding.forward(ids, stash), stash)
        return self.head.forward(x, stash)

    def backward(self, dlogits, stash):
        dx = self.mlp.backward(self.head.backward(dlogits, stash), stash)
        self.embedding.backward(dx, stash)

    def loss(self, logits, targets, scale):
        return self.head.loss(logits, targets, scale)


class OtherOrder(OwnModel):
    """The attributes in another order than forward's: what is gathered ahead is the wrong thing."""

    def __init__(self):
        super().__init__()
        embedding, mlp, head = self.embedding, self.mlp, self.head
        del self.embedding, self.mlp, self.head
        self.head, self.embedding, self.mlp = head, embedding, mlp


class Twice(OwnModel):
    """One layer called twice: its gradient is complete after the second backward."""

    def forward(self, ids, stash):
        x = self.mlp.forward(self.embedding.forward(ids, stash), stash)
        return self.head.forward(self.mlp.forward(x, stash), stash)

    def backward(self, dlogits, stash):
        dx = self.mlp.backward(self.head.backward(dlogits, stash), stash)
        self.embedding.backward(self.mlp.backward(dx, stash), stash)


class Skipping(OwnModel):
    """A layer that takes part in some micro-batches only."""

    def forward(self, ids, stash):
        x = self.embedding.forward(ids, stash)
        if stash.batch.first_token:
            x = self.mlp.forward(x, stash)
        return self.head.forward(x, stash)

    def backward(self, dlogits, stash):
        dx = self.head.backward(dlogits, stash)
        if stash.batch.first_token:
            dx = self.mlp.backward(dx, stash)
        self.embedding.backward(dx, stash)


PATTERNS = {"column": ["*.up"], "row": ["*.down"], "vocabulary": ["embedding", "head"]}


def own_losses(world, tp, stage, micro_batches=4, steps=4, kind=OwnModel, look=False, **options):
    context = ParallelContext(tp=tp, world=world)
    model, optimizer = kind(), AdamW()
    plan.parallelize(model, context, **PATTERNS)
    zero = Zero(model, context, stage, **options)
    zero.materialize(3, np.float64, optimizer.STATE)
    losses = []
    for step in range(steps):
        tokens = np.random.default_rng(step).integers(0, 7, (2, micro_batches, 5))
        work = cut(*tokens, 1, step=step)[context.dp.rank :: context.dp.size]
        losses.append(zero.compute_gradients(work, scale=1 / tokens[0].size))
        if look:  # at something, with a stash that no backward will empty
            model.forward(work[0].ids, Stash(work[0].batch))
        zero.update(optimizer, lr=0.1, step=step)
    return losses


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", [OwnModel, OtherOrder, Twice])
def test_layers_in_any_order_and_used_twice(kind, stage):
    want = own_losses(None, 1, 0, kind=kind)
    for ranks, options in ((1, {}), (2, {}), (2, {"deterministic": True})):
        found = run_ranks(ranks, lambda w, o=options: own_losses(w, 1, stage, kind=kind, **o))
        np.testing.assert_allclose(found[0], want, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_used_twice_on_real_ranks(tmp_path, name):
    """Threads copy an array where a reduction starts; MPI works on it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import cupytron\n"
        "from test_mesh import Twice, own_losses\n"
        "with cupytron.open_world() as world:\n"
        "    found = [own_losses(world, 1, stage, kind=Twice) for stage in range(4)]\n"
        "    world.rank or print(found)\n"
    )
    argv, environment = launch(name, 2, [sys.executable, str(script)])
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    found = ast.literal_eval(done.stdout)
    np.testing.assert_allclose(found, [own_losses(None, 1, 0, kind=Twice)] * 4, rtol=1e-12)


def test_looking_at_a_model_does_not_change_its_training():
    want = own_losses(None, 1, 3)
    for losses in run_ranks(2, lambda world: own_losses(world, 1, 3, look=True)):
        np.testing.assert_allclose(losses, want, rtol=1e-12)


@pytest.mark.parametrize("stage", range(4))
def test_a_layer_that_skips_micro_batches_is_refused(stage):
    with pytest.raises(ValueError, match=r"mlp: took part in 3 of 4 micro-batches"):
        own_losses(None, 1, stage, kind=Skipping)
    with pytest.raises(ValueError, match=r"mlp: took part in 1 of 2|ranks of dp disagree"):
        run_ranks(2, lambda world: own_losses(world, 1, stage, kind=Skipping))


def test_a_second_step_before_the_update_is_refused():
    zero = Zero(OwnModel(), ParallelContext())
    zero.materialize(3, np.float64, AdamW.STATE)
    work = cut(*np.zeros((2, 2, 5), int), 1)
    zero.compute_gradients(work, 0.1)
    with pytest.raises(ValueError, match="call update or clear_gradients before"):
        zero.compute_gradients(work, 0.1)
    zero.clear_gradients()
    zero.compute_gradients(work, 0.1)


def test_deterministic_training_has_one_blas_thread(monkeypatch):
    """Whatever the process was given: OpenBLAS gives other bits with other numbers of threads."""
    seen = []

    def watched(*arguments):
        seen.append([library.get_num_threads() for library in backend._blas()])
        return run_schedule(*arguments)

    monkeypatch.setattr("cupytron.parallel.pipeline.run_schedule", watched)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        own_losses(None, 1, 0, steps=1, deterministic=True)
    assert set(seen[0]) == {1}


def test_layers_that_do_not_match_are_named():
    def body(world):
        model = OwnModel()
        context = ParallelContext(tp=2, world=world)
        plan.parallelize(model.mlp.down, context)  # nothing asked, nothing done
        model.mlp.up.weight.shard(1, world.rank, 2)
        model.mlp.up.bias.shard(0, world.rank, 2)
        model.materialize(1)
        model.forward(np.zeros(5, int), Stash(MicroBatch(1, 5)))

    with pytest.raises(ValueError, match=r"Linear mlp.down: takes 12 features and was given 6"):
        run_ranks(2, body)


@pytest.mark.parametrize(("ranks", "tp", "stage"), [(1, 1, 3), (2, 2, 0), (4, 2, 2), (4, 1, 3)])
def test_a_model_of_one_s_own_gives_the_same_losses_on_any_mesh(ranks, tp, stage):
    want = own_losses(None, 1, 0)
    for losses in run_ranks(ranks, lambda world: own_losses(world, tp, stage)):
        np.testing.assert_allclose(losses, want, rtol=1e-12)
    assert len(set(want)) == len(want)  # it learns


def test_replicas_with_unequal_numbers_of_micro_batches_are_told():
    with pytest.raises(ValueError, match="the replicas have 2, 1 micro-batches; give each as many"):
        run_ranks(2, lambda world: own_losses(world, 1, 2, micro_batches=3))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_s_failing_rank_ends_the_others(tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(
        "import cupytron, numpy as np\n"
        "with cupytron.open_world() as world:\n"
        "    if world.rank == 1:\n"
        "        raise RuntimeError('broken')\n"
        "    world.all_reduce(np.ones(1))\n"
    )
    argv, environment = launch(name, 2, [sys.executable, str(script)])
    began = time.monotonic()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert "error: rank 1: RuntimeError: broken" in done.stderr
