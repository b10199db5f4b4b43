"""The estimate of a rank's memory is what a rank holds, and what is advised by it would fit."""

import numpy as np
import pytest
from meshes import config, on_mesh
from pipeline_memory import Watch

from cupytron.config import load_config, resolve_model
from cupytron.config_checks import check_mesh
from cupytron.memory import advice, estimate, of_stage, size

VOCAB, SEQUENCE = 20, 16

MESHES = [
    {},
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"tp": 2, "sp": True, "sp_keep_gathered": "true"},
    {"dp": 2, "zero": 1},
    {"dp": 2, "zero": 2},
    {"dp": 2, "zero": 3, "pp": 2},
    {"pp": 2, "schedule": "gpipe"},
    {"pp": 2, "schedule": "interleaved"},
    {"pp": 4, "schedule": "1f1b"},
    {"pp": 2, "schedule": "zb-h1"},
    {"pp": 2, "schedule": "zb-h1", "tp": 2},
    {"pp": 2, "schedule": "zb-v"},
]


def case(*settings, **mesh):
    return config(
        f"model.vocab_size={VOCAB}",
        "model.num_layers=4",
        "model.d_model=32",
        "model.dropout=0",
        f"train.sequence_length={SEQUENCE}",
        "train.global_batch=8",
        "train.dtype=float32",
        *settings,
        **mesh,
    )


def held(settings):
    """What each rank's stage is, what it holds between steps, and the most that its stashes have held."""

    def body(trainer, context):
        watch = trainer.zero.pipeline.trace = Watch(trainer.zero.pipeline)
        shape = (2, len(trainer.local_sequences), SEQUENCE)
        # small numbers: a stash counts all of the array that a micro-batch's tokens are a view of
        trainer.train_step(*np.random.default_rng(0).integers(0, VOCAB, shape, np.int16))
        return context.coordinates["pp"], trainer.zero.persistent_bytes, watch.most

    return on_mesh(settings, body)


def check(settings):
    """The estimate of every stage beside what its ranks hold."""
    model = resolve_model(settings.model, None, SEQUENCE)
    for stage, persistent, most in held(settings):
        found = of_stage(settings, model, stage)
        assert found.persistent == persistent
        # the reference keeps a number less of each row of a norm
        assert found.activations + found.logits == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_estimate_of_a_mesh_is_what_its_ranks_hold(mesh):
    check(case(**mesh))


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_estimate_of_a_model_is_what_it_keeps(family, recompute):
    check(
        case(
            f"model.family={family}",
            f"model.recompute={recompute}",
            "model.num_kv_heads=2",
            "model.dropout=0.1",
            "optim.name=sgd",
        )
    )


@pytest.mark.parametrize("zero", range(4))
def test_weights_of_another_dtype_have_a_master_copy(zero):
    settings = case("train.compute_dtype=bfloat16", dp=2, zero=zero)
    model = resolve_model(settings.model, None, SEQUENCE)
    for stage, persistent, _ in held(settings):
        found = of_stage(settings, model, stage)
        assert found.persistent == persistent and found.weights > 0
        assert found.master == found.weights * 2 // (2 if zero in (1, 2) else 1)
        assert found.optimizer == 2 * found.master


def test_deterministic_training_holds_shares_of_its_gradients():
    check(case("train.deterministic=true", dp=2, zero=1))


def gpt2(*settings):
    found = load_config(
        overrides=[
            "model.num_layers=12",
            "model.num_heads=12",
            "model.d_model=768",
            "model.vocab_size=50304",
            "train.sequence_length=1024",
            "train.micro_batch=64",
            "train.global_batch=256",
            "train.compute_dtype=bfloat16",
            *settings,
        ]
    )
    return found, resolve_model(found.model, None, found.train.sequence_length)


def test_a_known_model_s_numbers():
    """GPT-2 small, 124 million parameters, 65,536 tokens: by hand."""
    found = estimate(*gpt2())
    parameters, tokens, width = 50304 * 768 + 1024 * 768 + 12 * 7_087_872 + 1536, 65536, 768
    assert found.weights == 2 * parameters
    assert found.master == found.gradients == found.optimizer // 2 == 4 * parameters
    assert found.logits == 2 * tokens * 50304
    # x of two norms, inputs of qkv and up, q, k and v, the attention's output; two of 4 D; statistics
    block = tokens * (2 * width * (2 + 2 + 3 + 1 + 2 * 4) + 4 * (2 * 2 + 12))
    ends = tokens * (2 * width * 2 + 4 * 2 + 8)  # the last norm and the head's input; token ids
    assert found.activations == 12 * block + ends
    assert found.total == sum(found) > found.persistent + found.activations + found.logits


def fits(advised, settings, model, available):
    """Whether settings with what was advised, given as on a command line, hold no more than that."""
    words = advised.partition(" would fit")[0].partition(" on ")[0].split()
    sections = {s: keys.copy() for s, keys in settings.model_dump().items()}
    for word in words:
        name, _, value = word.partition("=")
        section, key = name.split(".")
        sections[section][key] = int(value) if value.isdigit() else value
    other = type(settings)(**sections)
    assert not list(check_mesh(other)) and other.global_batch == settings.global_batch
    changed = model.model_copy(update={"recompute": other.model.recompute})
    return estimate(other, changed).total <= available


@pytest.mark.parametrize(
    ("gigabytes", "wanted"),
    [
        (1000, "train.micro_batch=32 "),
        (20, "train.micro_batch=32 "),
        (8, "train.micro_batch=8 "),
        (2, "model.recompute=block parallel.tp=2 train.micro_batch=8 "),
    ],
)
def test_smaller_micro_batches_are_advised_first(gigabytes, wanted):
    settings, model = gpt2()
    advised = advice(settings, model, gigabytes * 2**30)
    assert advised.startswith(wanted)
    assert fits(advised, settings, model, gigabytes * 2**30)


def test_then_recomputation_then_zero_then_more_ranks():
    found = []
    settings, model = gpt2("train.micro_batch=1", "parallel.dp=4", "train.sequence_length=8192")
    for available in (6.5e9, 5e9, 4e9, 3e9, 2.4e9):
        advised = advice(settings, model, available)
        assert fits(advised, settings, model, available), advised
        found.append(advised.partition(" would")[0])
    assert found[0] == "model.recompute=selective"
    assert found[1] == "model.recompute=block"
    assert found[2] == "model.recompute=block parallel.zero=1"
    assert found[3] == "model.recompute=block parallel.zero=2"
    assert found[4] == "model.recompute=block parallel.tp=2 on 8 ranks"


def test_where_nothing_helps_that_is_said():
    assert advice(*gpt2(), 1e6).startswith("nothing tried here would fit: take a smaller model")
    # one forward: its micro-batch is the run's
    advised = advice(*gpt2(), 6e9, training=False)
    assert advised.startswith("--tp 2 on 2 ranks would fit")


def test_sizes_are_readable():
    assert size(3 * 2**30) == "3.0 GiB" and size(5 * 2**20) == "5.0 MiB"
