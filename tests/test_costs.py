"""What a mesh costs: bytes sent by axis and operation, memory between steps, activations kept."""

import numpy as np
import pytest
from meshes import config, on_mesh

from cupytron.comm import ParallelContext
from cupytron.config import resolve_model
from cupytron.parallel.plan import build
from cupytron.stash import MicroBatch, Stash

LAYERS, B, S, D, VOCAB, MICRO_BATCHES = 2, 2, 8, 16, 16, 2
WIDE = 8  # bytes of a float64
TOKENS = B * S


def case(*settings, **mesh):
    dp = mesh.get("dp", 1)
    return config(
        f"model.vocab_size={VOCAB}",
        f"train.global_batch={B * MICRO_BATCHES * dp}",
        *settings,
        **mesh,
    )


def step(settings):
    """Calls and bytes of every rank in one step, by axis; and the sizes of the buckets."""

    def body(trainer, context):
        rng = np.random.default_rng(0)
        shape = (len(trainer.local_sequences), S)
        for group in (context.tp, context.dp):
            group.calls.clear()
            group.bytes.clear()
        trainer.train_step(*rng.integers(0, VOCAB, (2, *shape)))
        sizes = {b.name: b.size for b in trainer.zero.buckets}
        return {g.axis: (dict(g.calls), dict(g.bytes)) for g in (context.tp, context.dp)}, sizes

    found = on_mesh(settings, body)
    assert all(rank == found[0] for rank in found)
    return found[0]


def loss_bytes(tp):
    """Of the tensor axis: (3, T) numbers for the loss of a micro-batch."""
    return MICRO_BATCHES * 3 * TOKENS * WIDE * (tp - 1)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tensor_parallelism_sends_four_all_reduces_a_block(tp, family):
    """Llama's gate and up share one entry; embedding and head have one all-reduce each."""
    axes, sizes = step(case(f"model.family={family}", tp=tp))
    calls, sent = axes["tp"]
    reduced = MICRO_BATCHES * (4 * LAYERS + 2)
    assert calls == {"all_reduce": reduced + 1, "all_gather": MICRO_BATCHES}
    norm = 2 * len(sizes) * WIDE * (tp - 1) // tp
    assert sent["all_reduce"] == reduced * 2 * TOKENS * D * WIDE * (tp - 1) // tp + norm
    assert sent["all_gather"] == loss_bytes(tp)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sequence_parallelism_sends_as_much_or_a_quarter_more(tp, family):
    whole = TOKENS * D * WIDE * (tp - 1) // tp  # an all-gather or a reduce-scatter of (T, D)
    all_reduces = MICRO_BATCHES * (4 * LAYERS + 2) * 2 * whole  # what tensor parallelism sends
    for keep, factor, again in (("true", 1, 0), ("false", 1.25, 1)):
        settings = case(f"model.family={family}", tp=tp, sp=True, sp_keep_gathered=keep)
        sent = step(settings)[0]["tp"][1]
        gathered = sent["all_gather"] - loss_bytes(tp)
        assert sent["reduce_scatter"] == all_reduces / 2
        # the head's input is gathered again, too; the embedding has none
        assert gathered == all_reduces / 2 + again * MICRO_BATCHES * (2 * LAYERS + 1) * whole
        in_blocks = all_reduces * 4 * LAYERS / (4 * LAYERS + 2)
        others = MICRO_BATCHES * (4 + again) * whole
        assert sent["reduce_scatter"] + gathered - others == factor * in_blocks


# gathers of a bucket's weights in one micro-batch under stage 3: forward and backward, but backward needs
# no table, and the last layer's backward comes right after its forward
GATHERS = {"embedding": 1, "positions": 1, "head": 1, "embedding and head": 2}


@pytest.mark.parametrize("dp", [2, 4])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_data_parallelism_and_zero_send_what_the_formulas_say(dp, tied):
    for zero in range(4):
        axes, sizes = step(case(f"model.tied={tied}", dp=dp, zero=zero))
        calls, sent = axes["dp"]
        u = sum(sizes.values()) * WIDE * (dp - 1) // dp
        counts = 2 * WIDE * (dp - 1) // dp  # the number of targets
        norm = 2 * len(sizes) * dp * WIDE * (dp - 1) // dp if zero else 0
        losses = (MICRO_BATCHES + 1) * WIDE * (dp - 1)  # and how many micro-batches each has
        weights = sent["all_gather"] - losses
        if zero == 0:
            assert sent["all_reduce"] == 2 * u + counts and weights == 0
            assert calls["all_reduce"] == len(sizes) + 1  # a bucket once a step
            continue
        assert sent["all_reduce"] == counts + norm
        assert sent["reduce_scatter"] == (u if zero == 1 else MICRO_BATCHES * u)
        if zero < 3:
            assert weights == u
        else:
            often = sum(size * GATHERS.get(name, 2) for name, size in sizes.items())
            assert weights == MICRO_BATCHES * often * WIDE * (dp - 1) // dp
            assert weights + sent["reduce_scatter"] <= 3 * MICRO_BATCHES * u


@pytest.mark.parametrize("zero", range(4))
def test_deterministic_training_sends_a_micro_batch_at_a_time(zero):
    """(M + 1) u, whatever is gathered at the end: the gradient or the weights; more under stage 3.

    And the tied table's once more for each micro-batch: what embedding and head give has sums of its own.
    """
    axes, sizes = step(case("train.deterministic=true", dp=4, zero=zero))
    sent = axes["dp"][1]
    u = sum(sizes.values()) * WIDE * 3 // 4
    table = sizes["embedding and head"] * WIDE * 3 // 4
    assert sent["all_to_all"] == MICRO_BATCHES * (u + table)
    if zero < 3:
        assert sent["all_gather"] == u + (MICRO_BATCHES + 1) * WIDE * 3


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("tp", [1, 2])
def test_memory_between_steps_follows_the_formulas(zero, tp):
    """Bytes of a rank in float32: 16P; 8P + 8P/dp; 4P + 12P/dp; 16P/dp, P its tensor rank's parameters."""
    dp = 4
    settings = case("model.d_model=64", "train.dtype=float32", dp=dp, tp=tp, zero=zero)

    def body(trainer, context):
        rng = np.random.default_rng(0)
        parameters = sum(p.size for _, p in trainer.model.named_parameters())
        for _ in range(2):
            shape = (len(trainer.local_sequences), S)
            trainer.train_step(*rng.integers(0, VOCAB, (2, *shape)))
        return parameters, trainer.zero.persistent_bytes

    for parameters, held in on_mesh(settings, body):
        factors = [16, 8 + 8 / dp, 4 + 12 / dp, 16 / dp]
        assert held == pytest.approx(factors[zero] * parameters, rel=0.01)


def test_stage_3_holds_few_layers_at_once():
    settings = case("model.num_layers=6", dp=2, zero=3)

    def body(trainer, context):
        zero, held = trainer.zero, []
        opened = zero.open_weights

        def watch(bucket):
            opened(bucket)
            held.append(sum(b.data is not None for b in zero.buckets))

        zero.open_weights = watch
        rng = np.random.default_rng(0)
        trainer.train_step(*rng.integers(0, VOCAB, (2, len(trainer.local_sequences), S)))
        assert all(b.data is None and b.grad is None for b in zero.buckets)
        return max(held)

    assert on_mesh(settings, body) == [1, 1]


def test_stage_3_gathers_ahead():
    """While a block runs, the weights of the next one are on their way: forward and backward."""
    settings = case("model.num_layers=4", dp=2, zero=3)

    def body(trainer, context):
        seen = []
        for number, block in trainer.model.blocks.items():
            for way, after in (("forward", 1), ("backward", -1)):
                run = getattr(block.inner, way)

                def watch(*arguments, run=run, way=way, wanted=f"blocks.{number + after}"):
                    seen.append((way, wanted, wanted in trainer.zero._gathers))
                    return run(*arguments)

                setattr(block.inner, way, watch)
        rng = np.random.default_rng(0)
        trainer.train_step(*rng.integers(0, VOCAB, (2, len(trainer.local_sequences), S)))
        return seen

    for way, wanted, ahead in on_mesh(settings, body)[0]:
        assert ahead == (wanted in ("blocks.0", "blocks.1", "blocks.2", "blocks.3")), (way, wanted)


def kept(settings):
    """Bytes that a block's layers keep for backward, by kind of layer, on rank 0."""

    def body(trainer, context):
        block = trainer.model.blocks[0]
        stash = Stash(MicroBatch(B, S, training=True))
        rows = TOKENS // (context.tp.size if settings.parallel.sp else 1)
        block.forward(np.ones((rows, D)), stash)
        found = {}
        for owner, arrays in stash._entries:
            size = sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))
            found[type(owner).__name__] = found.get(type(owner).__name__, 0) + size
        return found

    return on_mesh(settings, body)[0]


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism_divides_the_activations(tp):
    """Norms, dropout and the inputs of column layers: by tp; inputs only if they are not kept gathered."""
    whole = kept(case("model.tied=false"))
    cut = kept(case(tp=tp))
    shared = kept(case(tp=tp, sp=True))
    gathered = kept(case(tp=tp, sp=True, sp_keep_gathered="true"))
    for kind in ("LayerNorm", "Dropout"):
        assert cut[kind] == whole[kind] > 0
        assert shared[kind] == gathered[kind] == whole[kind] // tp
    assert cut["ColumnLinear"] == gathered["ColumnLinear"] == 2 * TOKENS * D * WIDE
    assert shared["ColumnLinear"] == cut["ColumnLinear"] // tp
    # inside the regions everything is cut with and without
    for kind in ("RowLinear", "Attention", "MLP"):
        assert cut[kind] == shared[kind]
    assert cut["MLP"] == whole["MLP"] // tp


def test_a_mesh_of_one_rank_changes_no_layer():
    """A tensor axis of one rank must cost nothing."""
    settings = case()
    model, _ = build(settings, resolve_model(settings.model, None, S), ParallelContext())
    assert {type(layer).__module__ for _, layer in model.named_layers()} <= {
        "cupytron.model",
        *(f"cupytron.nn.{n}" for n in ("attention", "block", "dropout", "embedding", "linear")),
        "cupytron.nn.mlp",
        "cupytron.nn.norm",
    }
