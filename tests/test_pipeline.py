"""The executor and the stages: what is cut where, what is said, and what is kept."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from launchers import NAMES, launch
from meshes import config, on_mesh
from pipeline_memory import MESHES, MICRO_BATCHES, Sizes, Watch, formula, make_trainer

from cupytron import AdamW, Zero, cut
from cupytron.backend import Device
from cupytron.comm import Handle, ParallelContext, SelfCommunicator, run_ranks
from cupytron.config import resolve_model
from cupytron.layer import Chain, Layer, Parameter, normal
from cupytron.model import Transformer
from cupytron.nn import Block, Embedding, Head, LayerNorm, Linear
from cupytron.parallel import schedules
from cupytron.parallel.mail import Mail
from cupytron.parallel.pipeline import Pipeline
from cupytron.parallel.schedules import POSTED, make
from cupytron.parallel.stages import _balanced, cost, divide
from cupytron.stash import MicroBatch, Stash

# which layers a part gets


def divided(parts, split=(), sequence_length=8, **settings):
    """Names of each part's layers."""
    model = Transformer(small_config(context=sequence_length, **settings))
    counts = divide(model, parts, sequence_length, split)
    names = iter(model.chain())
    return [[next(names) for _ in range(count)] for count in counts]


def test_layers_that_the_parts_do_not_divide():
    parts = divided(4, num_layers=5, d_model=64, vocab=64)
    assert parts[0][:3] == ["embedding", "positions", "dropout"]
    assert parts[3][-2:] == ["norm", "head"]
    blocks = [sum("blocks" in name for name in part) for part in parts]
    assert sorted(blocks) == [1, 1, 1, 2] and blocks[3] == 1  # the head is work, too


def test_a_head_as_dear_as_blocks_has_a_part_with_fewer_of_them():
    # a block has 12 D^2 weights, this head 48 D^2
    counts = [
        sum("blocks" in name for name in part) for part in divided(2, num_layers=8, vocab=48 * 16)
    ]
    assert counts == [6, 2]


def test_what_is_run_again_costs_a_third_more():
    plain = Transformer(small_config(recompute="none")).blocks[0]
    again = Transformer(small_config(recompute="block")).blocks[0]
    assert cost(again, 8) == pytest.approx(cost(plain, 8) * 4 / 3)
    assert cost(plain, 80) - cost(plain, 8) == 72 * 16  # attention's, by the width


def test_parts_of_equal_cost_are_the_best_there_are(rng):
    """Against all ways to cut."""
    for _ in range(50):
        costs, parts = list(rng.integers(1, 9, 7)), int(rng.integers(1, 6))

        def worst(starts, costs=costs):
            bounds = [*starts, len(costs)]
            sums = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
            return max(sums), sum(s * s for s in sums)

        ways = [(0, *others) for others in itertools.combinations(range(1, 7), parts - 1)]
        assert worst(_balanced(costs, parts)) == min(worst(way) for way in ways)


def test_the_user_says_which_blocks():
    parts = divided(4, split=(0, 3, 1, 1), num_layers=5)
    assert parts[0] == ["embedding", "positions", "dropout"]
    assert parts[1] == ["blocks.0", "blocks.1", "blocks.2"]
    assert parts[3] == ["blocks.4", "norm", "head"]
    assert divided(2, split=(2, 0))[1] == ["norm", "head"]


@pytest.mark.parametrize("split", [(1, 1), (5, 1, 1), (2, 0, 3), (5,)])
def test_a_split_that_does_not_fit_is_refused(split):
    with pytest.raises(ValueError, match=r"has 5 blocks and the pipeline 3 parts; give 3 numbers"):
        divided(3, split=split, num_layers=5)


def test_more_parts_than_layers_are_refused():
    assert [len(part) for part in divided(4)] == [3, 1, 2, 1]
    with pytest.raises(ValueError, match="has 4 layers to share out and the pipeline 5 parts"):
        divided(5)


def test_stages_have_their_layers_and_nothing_else():
    settings = config("model.num_layers=5", pp=2, schedule="interleaved")

    def body(trainer, context):
        held = sum(b.data.nbytes for b in trainer.zero.buckets)
        return [name for name, _ in trainer.model.named_parameters()], held

    (first, held), (last, _) = on_mesh(settings, body)
    model = resolve_model(settings.model, None, 8)
    whole = [name for name, _ in Transformer(model).named_parameters()]
    assert set(first) | set(last) == set(whole)
    assert set(first) & set(last) == {"embedding.weight"}  # the tied table
    assert held < 0.7 * model.num_parameters() * 8


# models of one's own


class OwnChain(Chain):
    def __init__(self, tied=False):
        self.embedding = Embedding(7, 8, 0.5)
        self.lift = Linear(8, 12, std=0.5)  # messages are not all of one width
        self.lower = Linear(12, 8, std=0.5)
        self.norm = LayerNorm(8)
        table = self.embedding.weight if tied else Parameter((7, 8), normal(0.5))
        self.head = Head(table)

    def loss(self, logits, targets, scale):
        return self.head.loss(logits, targets, scale)


def own_losses(
    world,
    pp,
    schedule,
    chunks=None,
    stage=0,
    make=OwnChain,
    steps=4,
    length=5,
    zero=None,
    **options,
):
    context, model, optimizer = ParallelContext(pp=pp, world=world), make(), AdamW()
    pipeline = Pipeline(model, context.pp, context.ends, schedule, chunks, **options)
    zero = Zero(model, context, stage, pipeline=pipeline, **(zero or {}))
    zero.materialize(3, np.float64, optimizer.STATE)
    losses = []
    for step in range(steps):
        # lengths change from step to step: shapes are agreed on again
        tokens = np.random.default_rng(step).integers(0, 7, (2, 4, length + step % 2))
        work = cut(*tokens, 1, step=step)[context.dp.rank :: context.dp.size]
        losses.append(zero.compute_gradients(work, scale=1 / tokens[0].size))
        zero.update(optimizer, lr=0.1, step=step)
    return losses


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    ("pp", "schedule", "chunks"),
    [(2, "gpipe", None), (3, "1f1b", None), (2, "interleaved", 2), (4, "zb-h1", None)],
)
def test_a_chain_of_one_s_own_gives_the_same_losses(pp, schedule, chunks, stage):
    for kind in (OwnChain, lambda: OwnChain(tied=True)):
        want = own_losses(None, 1, "1f1b", make=kind)
        found = run_ranks(
            2 * pp, lambda w, m=kind: own_losses(w, pp, schedule, chunks, stage, make=m)
        )
        for losses in found:
            np.testing.assert_allclose(losses, want, rtol=1e-12)
        assert len(set(want)) == 4


class NoChain(Layer):
    def __init__(self):
        self.embedding = Embedding(7, 8)


class Bent(OwnChain):
    """Not a chain, whatever it is called."""

    def forward(self, x, stash):
        return super().forward(x, stash) * 2


class Outside(OwnChain):
    def __init__(self):
        super().__init__()
        self.scale = Parameter((1, 1), normal(1.0))


class Shared(OwnChain):
    """Two layers in the middle of the model that have one matrix."""

    def __init__(self):
        super().__init__()
        self.lower = Linear(8, 8)
        self.lift = Linear(8, 8)
        self.lower.weight = self.lift.weight
        self.lower.bias = self.lift.bias = None


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (NoChain, {}, "NoChain: a pipeline cuts a chain of layers; make it a subclass of"),
        (Bent, {}, "Bent: a pipeline cuts a chain of layers.* no forward or backward of its own"),
        (Outside, {}, "scale: stands in no layer of the model; put each parameter into a layer"),
        (Shared, {"counts": [1, 1, 3]}, r"lift and lower share a parameter.* stages 1, 2; only"),
        (OwnChain, {"counts": [1, 1, 1]}, r"counts=\[1, 1, 1\]: the model has 5 layers"),
        (OwnChain, {"counts": [5]}, "the pipeline 3 parts"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(make, options, words):
    with pytest.raises(ValueError, match=words):
        run_ranks(3, lambda world: own_losses(world, 3, "1f1b", make=make, **options))


class Three(OwnChain):
    """A table that embedding, a layer in the middle and the head share."""

    def __init__(self):
        super().__init__(tied=True)
        self.lift = Linear(8, 7, bias=False)
        self.lower = Linear(7, 8, std=0.5)
        self.lift = Head(self.embedding.weight)


class Direct(LayerNorm):
    """Adds to its gradient itself."""

    def backward(self, dy, stash):
        stash.pop(self)
        self.weight.grad += dy.sum(axis=0)
        return dy


class WithDirect(OwnChain):
    def __init__(self):
        super().__init__()
        self.norm = Direct(8)


class Tuples(OwnChain):
    """A layer that passes on two arrays."""

    def __init__(self):
        super().__init__()

        class Two(Linear):
            def forward(self, x, stash):
                return super().forward(x, stash), x

        self.lift = Two(8, 12)


class InAList(OwnChain):
    def __init__(self):
        super().__init__()
        self.more = [Linear(8, 8)]


@pytest.mark.parametrize(
    ("make", "schedule", "stage", "options", "words"),
    [
        (
            Three,
            "1f1b",
            0,
            {"zero": {"deterministic": True}},
            r"embedding.weight is used by 3 layers",
        ),
        (
            WithDirect,
            "zb-h1",
            2,
            {},
            r"norm.weight: its gradient is not here now; .* through the stash",
        ),
        (
            Tuples,
            "1f1b",
            0,
            {"counts": [2, 3]},
            "Two lift: forward returned a tuple; return one array",
        ),
        (InAList, "1f1b", 0, {}, "InAList.more: layers and parameters in a list have no names"),
    ],
)
def test_what_would_go_wrong_is_said(make, schedule, stage, options, words):
    with pytest.raises(ValueError, match=words):
        run_ranks(2, lambda w: own_losses(w, 2, schedule, None, stage, make=make, **options))


def test_a_model_that_nobody_has_cut_is_refused():
    with pytest.raises(ValueError, match=r"the mesh has pp=2 stages, and the model is not cut"):
        run_ranks(2, lambda world: Zero(OwnChain(), ParallelContext(pp=2, world=world)))


def test_three_users_of_a_table_without_determinism():
    want = own_losses(None, 1, "1f1b", make=Three)
    for losses in run_ranks(2, lambda world: own_losses(world, 2, "1f1b", make=Three)):
        np.testing.assert_allclose(losses, want, rtol=1e-12)


def test_stages_with_unequal_numbers_of_micro_batches_are_told():
    def body(world):
        context, model = ParallelContext(pp=2, world=world), OwnChain()
        zero = Zero(model, context, pipeline=Pipeline(model, context.pp))
        zero.materialize(1, np.float64)
        zero.compute_gradients(cut(*np.zeros((2, 2 + world.rank, 5), int), 1), 1.0)

    with pytest.raises(ValueError, match="the stages have 2, 3 micro-batches; give each as many"):
        run_ranks(2, body)


# what is sent


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_a_stage_sends_each_activation_and_gradient_once(schedule):
    """(T, D) forward and backward for each micro-batch; after the first step nothing about shapes."""
    settings = config("train.global_batch=8", pp=3, schedule=schedule)

    def body(trainer, context):
        rng = np.random.default_rng(0)
        for _ in range(2):
            for group in context.groups:
                group.calls.clear()
                group.bytes.clear()
            trainer.train_step(*rng.integers(0, 13, (2, len(trainer.local_sequences), 8)))
        return dict(context.pp.calls), dict(context.pp.bytes), dict(context.ends.bytes)

    whole = 2 * 8 * 16 * 8  # (B S, D) of float64
    for stage, (calls, sent, ends) in enumerate(on_mesh(settings, body)):
        neighbours = 1 if stage in (0, 2) else 2
        assert calls["send"] == calls["recv"] == 4 * neighbours
        assert sent["send"] == 4 * neighbours * whole
        # the tied table's gradient, between first and last stage
        assert ends == ({"all_reduce": 13 * 16 * 8} if stage != 1 else {})


def test_a_short_last_micro_batch():
    """Five sequences in micro-batches of two: the last has one, and messages of its size."""

    def losses(world, pp):
        context, model = ParallelContext(pp=pp, world=world), OwnChain()
        zero = Zero(model, context, pipeline=Pipeline(model, context.pp))
        zero.materialize(3, np.float64)
        tokens = np.random.default_rng(1).integers(0, 7, (2, 5, 4))
        work = cut(*tokens, 2)
        assert [w.batch.batch_size for w in work] == [2, 2, 1]
        assert [w.batch.first_token for w in work] == [0, 8, 16]
        return zero.compute_gradients(work, 1 / 20), zero.global_norm()

    want = losses(None, 1)
    assert run_ranks(2, lambda world: losses(world, 2)) == [pytest.approx(want, rel=1e-12)] * 2


class Waiting(SelfCommunicator):
    """Stage 0 of two, and a log of what is asked of it; nothing is sent, and every receive brings zeros."""

    def __init__(self):
        super().__init__("pp")
        self.size, self.log, self.under_way = 2, [], 0

    def send(self, x, to, async_op=False):
        if not async_op:
            self.log.append("shape")
            return None
        self.under_way += 1
        self.log.append(f"send, {self.under_way} under way")

        def wait():
            self.under_way -= 1
            self.log.append("wait")

        return Handle(wait)

    def recv(self, out, source, async_op=False):
        out[...] = 0
        self.log.append("recv" if async_op else "shape came")
        return Handle(lambda: out) if async_op else out


def test_sends_wait_only_where_receives_are_posted():
    """In the first step nothing waits before the end; then two sends are under way at most."""
    schedule, batches, known = make("gpipe", 2, 5), [MicroBatch(1, 3)] * 5, {}
    messages = [schedule.gives(0, action) for action in schedule.actions[0][:5]]
    logs = []
    for _ in range(2):
        pp = Waiting()
        mail = Mail(pp, schedule, batches, known)
        for message in messages:
            mail.send(message, np.zeros((3, 4)))
        known.setdefault(("B", 0, 1, 3), ((3, 4), np.dtype(float)))
        mail.finish()
        assert pp.under_way == 0
        logs.append(pp.log)
    first, second = logs
    sends = [f"send, {n} under way" for n in range(1, 6)]
    assert first == ["shape", *sends, *["wait"] * 5]
    receives = ["recv"] * 2  # posted before anything is sent
    again = ["wait", "send, 2 under way"] * 3
    assert second == [*receives, *sends[:2], *again, "wait", "wait"]


BIG = """
import sys; sys.path.insert(0, {tests!r})
import numpy as np
import cupytron
from cupytron.parallel.schedules import NAMES
from test_pipeline import Wide, own_losses
with cupytron.open_world() as world:
    for name in NAMES:
        found = own_losses(world, world.size, name, make=Wide, steps=2, length=1000)
        world.rank or print(name, *found)
"""


class Wide(OwnChain):
    """Messages of 1,000 tokens and 128 numbers: 1 MB, more than any library sends ahead."""

    def __init__(self):
        self.embedding = Embedding(7, 128, 0.5)
        self.blocks = {i: Linear(128, 128, std=0.1) for i in range(7)}
        self.head = Head(Parameter((7, 128), normal(0.1)))


@pytest.mark.parametrize("launcher", NAMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_large_messages_between_real_ranks(tmp_path, launcher, ranks):
    """Every schedule, from the first step on, in which shapes are not known yet."""
    script = tmp_path / "script.py"
    script.write_text(BIG.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    argv, environment = launch(launcher, ranks, [sys.executable, str(script)], environment)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    want = own_losses(None, 1, "1f1b", make=Wide, steps=2, length=1000)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(schedules.NAMES)
    for _, *losses in lines:
        np.testing.assert_allclose([float(loss) for loss in losses], want, rtol=1e-10)


# what is kept


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: " ".join(map(str, mesh.values())))
def test_stashes_hold_what_the_schedule_says(mesh):
    """tests/test_schedules.py holds the checker's count of micro-batches against the docstrings."""
    ranks = math.prod(mesh.get(axis, 1) for axis in ("tp", "pp", "dp"))
    sizes = Sizes(blocks=2, width=16, sequences=2, length=8)

    def body(world):
        trainer, _, batch = make_trainer(mesh, sizes, world)
        watch = trainer.zero.pipeline.trace = Watch(trainer.zero.pipeline)
        trainer.train_step(*batch)
        trainer.evaluate([batch])
        assert not trainer.zero.pipeline.stashes
        assert all(watch.kept)
        return watch.most, formula(trainer, watch), watch.kept

    p, m = mesh["pp"], MICRO_BATCHES
    for rank, (most, wanted, kept) in enumerate(run_ranks(ranks, body)):
        assert most == wanted
        stage = rank * p // ranks
        if mesh["schedule"] in ("gpipe", "1f1b"):
            assert most == kept[0] * (m if mesh["schedule"] == "gpipe" else min(m, p - stage))


def kept_by_a_block(recompute, family="gpt2"):
    """Numbers of (T, D) that a block keeps, in a model whose MLP is four times as wide."""
    settings = {"recompute": recompute, "family": family, "d_ff": 64, "d_model": 16}
    model = Transformer(small_config(context=8, **settings))
    model.materialize(1, np.float64)
    stash = Stash(MicroBatch(2, 8, training=True))
    model.blocks[0].forward(np.ones((16, 16)), stash)
    return stash.nbytes / (16 * 16 * 8)


def test_recomputation_keeps_less():
    """In units of (T, D): norms 2, inputs of matrices 2, qkv 3, o 1, and the MLP's inside 8 or 12."""
    small = 2 / 16 + 4 / 16  # a number for each token and norm, and for each token and head
    assert kept_by_a_block("none") == 16 + small
    assert kept_by_a_block("selective") == 11 + 2 / 16  # o, and two (T, F) for one
    assert kept_by_a_block("none", "llama") == 20 + small
    assert kept_by_a_block("selective", "llama") == 15 + 2 / 16
    assert kept_by_a_block("block") == kept_by_a_block("block", "llama") == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_recomputation_changes_no_bit(family, rng):
    grads = {}
    x, dy = rng.normal(size=(2, 16, 16))
    for recompute in ("none", "selective", "block"):
        model = Transformer(small_config(family=family, recompute=recompute, dropout=0.2))
        model.materialize(1, np.float64)
        block = model.blocks[0]
        for defer in (False, True):
            stash = Stash(MicroBatch(2, 8, training=True), defer)
            for _, parameter in block.named_parameters():
                parameter.grad[...] = 0
            block.forward(x.copy(), stash)
            dx = block.backward(dy, stash)
            assert defer == any(not p.grad.any() for _, p in block.named_parameters())
            stash.run_weight_grads()
            assert len(stash) == 0 and stash.nbytes == 0
            grads[recompute, defer] = [dx, *(p.grad.copy() for _, p in block.named_parameters())]
    for found in grads.values():
        for a, b in zip(found, grads["none", False], strict=True):
            assert (a == b).all()


def test_a_block_is_a_block():
    """Selective recomputation is in the layers; block recomputation is around them."""
    assert isinstance(Transformer(small_config(recompute="selective")).blocks[0], Block)


class LikeGPU(Device):
    """Of a GPU it has the name only."""

    gpu = True


def test_a_gpu_posts_no_receive_ahead_before_all_has_been_run_once(monkeypatch):
    """A posted receive occupies it, and kernels that are loaded for the first time would wait for that."""
    ahead, original = {}, Mail.__init__

    def noted(self, *arguments):
        original(self, *arguments)
        ahead.setdefault(self.pp.rank, []).append((self.ahead, sum(map(len, self.posted.values()))))

    monkeypatch.setattr(Mail, "__init__", noted)

    def body(world):
        model = OwnChain()
        pipeline = Pipeline(model, world, schedule="1f1b", device=LikeGPU())
        model.materialize(1, np.float64)
        work = cut(*np.random.default_rng(0).integers(0, 7, (2, 8, 4)), 2)
        return [pipeline.losses(work, 1.0, training) for training in (False, True, True)]

    results = run_ranks(2, body)
    assert results[1][0] == results[1][1] == results[1][2]
    # evaluation makes the activations' messages known, the first step those of the gradients
    assert [a for a, _ in ahead[0]] == [a for a, _ in ahead[1]] == [0, 0, POSTED]
    assert [posted for _, posted in ahead[1]] == [0, 0, POSTED]
