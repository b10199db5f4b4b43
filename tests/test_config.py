"""Settings that are fine: layers, round trips, presets, and what is derived from them."""

import subprocess
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupytron.config import ModelConfig, RunConfig, flops_per_token, load_config, resolve_model
from cupytron.config_io import preset_names, preset_path, toml_value
from cupytron.errors import ConfigError

PRESETS = [
    "demo",
    "gpt2-124m",
    "gpt2-350m",
    "llama-1b",
    "numpitron",
    "shakespeare-char",
    "shakespeare-char-cpu",
]


def test_defaults_are_the_documented_ones():
    config = load_config()
    assert config == RunConfig()
    assert (config.model.family, config.model.d_model, config.train.max_steps) == (
        "gpt2",
        128,
        2000,
    )
    assert (config.global_batch, config.micro_batches, config.tokens_per_step) == (12, 1, 768)
    assert (config.min_lr, config.decay_steps) == (1e-4, 2000)


def test_each_layer_overrides_the_one_below(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nseed = 7\nmicro_batch = 4\n[optim]\nlr = 1\n")
    overrides = ["train.micro_batch=2", "train.micro_batch=3"]
    config = load_config("shakespeare-char-cpu", file, overrides)
    assert config.model.bias is False, "the preset's, which nothing overrides"
    assert config.train.seed == 7, "the file's"
    assert config.train.micro_batch == 3, "the last override's"
    assert type(config.optim.lr) is float, "a whole number is taken for a number"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.family=llama", "llama"),
        ('model.family="llama"', "llama"),
        (" model.family = llama ", "llama"),
        ("optim.lr=3e-4", 3e-4),
        ("train.max_steps=1_000", 1000),
        ("model.bias=false", False),
        ("model.num_kv_heads=none", None),
        ("model.position=none", "none"),
        ("model.recompute=none", "none"),
        ("data.path=2024", "2024"),
        ("data.path=1979-05-27", "1979-05-27"),
        ("data.path=a=b", "a=b"),
        ("data.path=none", None),
        ('data.path="none"', "none"),
    ],
)
def test_values_of_overrides(text, value):
    section, key = text.partition("=")[0].strip().split(".")
    assert getattr(getattr(load_config(overrides=[text]), section), key) == value


def test_a_byte_order_mark_is_no_error(tmp_path):
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nseed = 5\r\n")
    assert load_config(file=file).train.seed == 5


# --- round trips


def floats(low, high, **kwargs):
    return st.floats(low, high, **kwargs)


def optional(strategy):
    return st.none() | strategy


def section(**keys):
    """Some of the keys; the others keep their defaults."""
    return st.fixed_dictionaries({}, optional=keys)


any_path = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1
)
runs = st.fixed_dictionaries(
    {},
    optional={
        "model": section(
            family=st.sampled_from(["gpt2", "llama"]),
            vocab_size=optional(st.integers(2, 2**31)),
            num_kv_heads=optional(st.sampled_from([1, 2, 4])),
            d_model=st.integers(1, 100).map(lambda n: 8 * n),
            context_length=optional(st.integers(2**20, 2**24)),
            position=optional(st.sampled_from(["learned", "rotary", "sinusoidal", "none"])),
            bias=optional(st.booleans()),
            tied=optional(st.booleans()),
            dropout=floats(0, 1, exclude_max=True),
            rope_theta=floats(0, 1e9, exclude_min=True),
        ),
        "data": section(path=optional(any_path)),
        "train": section(
            sequence_length=st.integers(1, 2**20),
            max_steps=st.integers(10**6, 10**12),
            seed=st.integers(0, 2**63 - 1),
            deterministic=st.booleans(),
            dtype=st.sampled_from(["float32", "float64"]),
        ),
        "optim": section(
            lr=floats(1, 1e9),
            min_lr=optional(floats(0, 1e-3)),
            schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
            warmup_steps=st.integers(0, 500),
            decay_steps=optional(st.integers(500, 1500)),
            eps=floats(0, 1, exclude_min=True),
        ),
        "parallel": section(dp=optional(st.just(1)), threads=optional(st.integers(1, 4096))),
    },
)


@settings(max_examples=200, deadline=None)
@given(values=runs)
def test_settings_written_and_read_again_are_equal(values, tmp_path_factory):
    config = RunConfig.model_validate(values)
    file = tmp_path_factory.getbasetemp() / "round.toml"
    file.write_text(config.to_toml(), encoding="utf-8", newline="")
    again = load_config(file=file)
    assert again == config
    assert repr(again) == repr(config), "every bit of every float, and the types"


@settings(max_examples=100, deadline=None)
@given(values=runs)
def test_overrides_say_the_same_as_a_file(values):
    overrides = [
        f"{section}.{key}={toml_value(value)}"
        for section, keys in values.items()
        for key, value in keys.items()
        # none is one of the positions; every other key is unset by it
        if not (key == "position" and value is None)
    ]
    assert load_config(overrides=overrides) == RunConfig.model_validate(values)


# --- presets


def test_the_presets_are_the_documented_ones():
    assert preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_resolve_and_say_what_they_are(name, tmp_path):
    config = load_config(name)
    vocab_size = config.model.vocab_size or 65
    model = resolve_model(config.model, vocab_size, config.train.sequence_length)
    assert None not in model.model_dump().values()
    assert resolve_model(model, vocab_size, config.train.sequence_length) == model
    assert preset_path(name).read_text().startswith("# ")
    file = tmp_path / "again.toml"
    file.write_text(config.to_toml())
    assert load_config(file=file) == config


def test_the_cpu_preset_is_nanogpts():
    config = load_config("shakespeare-char-cpu")
    model, train, optim = config.model, config.train, config.optim
    assert (model.num_layers, model.num_heads, model.d_model) == (4, 4, 128)
    assert (model.dropout, model.bias) == (0.0, False)
    assert (train.sequence_length, config.global_batch, train.max_steps) == (64, 12, 2000)
    assert (optim.lr, config.min_lr, optim.schedule) == (1e-3, 1e-4, "cosine")
    assert (optim.warmup_steps, config.decay_steps, optim.beta2) == (100, 2000, 0.99)
    assert (optim.weight_decay, optim.clip) == (0.1, 1.0)


# --- resolve_model


def test_the_family_fills_what_is_not_given():
    gpt2 = resolve_model(ModelConfig(d_model=100), 65, 64)
    assert (gpt2.vocab_size, gpt2.num_kv_heads, gpt2.d_ff, gpt2.context_length) == (65, 4, 400, 64)
    assert (gpt2.position, gpt2.norm, gpt2.activation) == ("learned", "layer", "gelu")
    assert (gpt2.bias, gpt2.tied) == (True, True)
    llama = resolve_model(ModelConfig(family="llama", d_model=128, tied=True), 65, 64)
    assert llama.d_ff == 352, "8/3 of 128 is 341.3, up to a multiple of 32"
    assert (llama.position, llama.norm, llama.activation) == ("rotary", "rms", "swiglu")
    assert (llama.bias, llama.tied) == (False, True)


def test_8_thirds_is_exact():
    model = resolve_model(ModelConfig(family="llama", d_model=96), 65, 64)
    assert model.d_ff == 256, "8/3 of 96, and not a multiple more"


def test_a_vocabulary_may_be_padded_but_not_cut():
    assert resolve_model(ModelConfig(vocab_size=128), 65, 64).vocab_size == 128
    with pytest.raises(ConfigError, match=r"^model\.vocab_size=64: is smaller .* of 65; set it to"):
        resolve_model(ModelConfig(vocab_size=64), 65, 64)
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: is not set"):
        resolve_model(ModelConfig(), None, 64)


def test_the_context_must_hold_a_training_sequence():
    assert resolve_model(ModelConfig(context_length=128), 65, 64).context_length == 128
    with pytest.raises(ConfigError, match=r"^model\.context_length=63: is shorter"):
        resolve_model(ModelConfig(context_length=63), 65, 64)


def test_an_unresolved_model_has_no_size():
    with pytest.raises(ConfigError, match="call resolve_model first"):
        ModelConfig().num_parameters()


# --- sizes


@pytest.mark.parametrize(
    ("preset", "overrides", "vocab_size", "count"),
    [
        ("gpt2-124m", [], 50257, 124_475_904),  # GPT-2's 124,439,808 and 47 rows of padding
        ("gpt2-124m", ["model.vocab_size=50257"], 50257, 124_439_808),
        ("gpt2-350m", ["model.vocab_size=50257"], 50257, 354_823_168),
        ("llama-1b", [], None, 1_235_814_400),
        ("shakespeare-char", [], 65, 10_745_088),  # nanoGPT says 10.65M: without positions
        ("shakespeare-char-cpu", [], 65, 804_096),  # nanoGPT says 0.80M
    ],
)
def test_parameter_counts_are_the_published_ones(preset, overrides, vocab_size, count):
    config = load_config(preset, overrides=overrides)
    model = resolve_model(config.model, vocab_size, config.train.sequence_length)
    assert model.num_parameters() == count


@settings(max_examples=60, deadline=None)
@given(values=runs.map(lambda v: v.get("model", {})), relu=st.booleans())
def test_the_count_is_the_models(values, relu):
    from cupytron.model import Transformer

    small = {"vocab_size": 33, "context_length": 16, "num_layers": 2}
    if relu:
        small["activation"] = "relu"
    model = resolve_model(ModelConfig(**(values | small)), None, 16)
    total = 0
    for _, parameter in Transformer(model).named_parameters():
        size = 1
        for length in parameter.shape:
            size *= length
        total += size
    assert model.num_parameters() == total


def test_flops_per_token_in_both_conventions():
    config = load_config("gpt2-124m")
    model = resolve_model(config.model, None, 1024)
    # nanoGPT's 6 N + 12 L D S, with N without positions, norms and biases
    weights = 12 * 12 * 768**2 + 50304 * 768
    attention = 12 * 12 * 768 * 1024
    assert flops_per_token(model, 1024, causal=False) == 6 * weights + attention
    assert flops_per_token(model, 1024, causal=True) == 6 * weights + attention / 2
    untied = model.model_copy(update={"tied": False})
    assert flops_per_token(untied, 1024, True) == flops_per_token(model, 1024, True)


def test_grouped_heads_and_gates_count():
    model = resolve_model(load_config("llama-1b").model, None, 2048)
    block = 2048 * (2048 + 2 * 8 * 64) + 2048 * 2048 + 3 * 2048 * 8192
    want = 6 * (16 * block + 128256 * 2048) + 12 * 16 * 2048 * 2048
    assert flops_per_token(model, 2048, causal=False) == want


# --- the process


def test_settings_are_read_without_numpy_or_click():
    code = (
        "import sys, cupytron.config; cupytron.config.load_config('demo');"
        "print([m for m in ('numpy', 'click', 'mpi4py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_do_not_change():
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 2
    assert hash(config) == hash(load_config())


def test_the_written_form_is_plain_toml():
    tables = tomllib.loads(load_config("demo").to_toml())
    assert list(tables) == ["model", "data", "train", "optim", "parallel", "checkpoint"]
    assert "vocab_size" not in tables["model"], "what is unset is left out"


def test_a_preset_can_be_tried_for_fewer_steps_than_its_warmup():
    config = load_config("gpt2-124m", overrides=["train.max_steps=3"])
    assert config.optim.warmup_steps > config.train.max_steps
