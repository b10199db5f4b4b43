"""Writing text: the cache changes nothing, the window rule holds at any length, choices are exact."""

import numpy as np
import pytest
from conftest import small_model

from cupytron.errors import CupytronError
from cupytron.generate import Decoder, choose, generate, window_start
from cupytron.ops import philox

FAMILIES = [
    {"family": "gpt2"},
    {"family": "llama", "num_kv_heads": 2},
    {"family": "gpt2", "position": "sinusoidal", "dropout": 0.5, "recompute": "block"},
]


@pytest.mark.parametrize("settings", FAMILIES)
@pytest.mark.parametrize("context", [1, 2, 7, 12])
def test_cached_and_uncached_logits_agree_at_every_length(rng, settings, context):
    model = small_model(rng, context=context, **settings)
    ids = rng.integers(0, 37, 40).tolist()
    cached, uncached = Decoder(model), Decoder(model, use_cache=False)
    for count in range(1, len(ids) + 1):
        a, b = cached.logits(ids[:count]), uncached.logits(ids[:count])
        assert abs(a - b).max() <= 1e-12 * abs(b).max(), f"at {count} tokens"


def test_a_long_prompt_sees_what_generation_would(rng):
    """The window depends on the number of tokens alone, however they came in."""
    model = small_model(rng, context=8)
    ids = rng.integers(0, 37, 30).tolist()
    stepwise = Decoder(model)
    for count in range(1, 31):
        logits = stepwise.logits(ids[:count])
    np.testing.assert_allclose(Decoder(model).logits(ids), logits, rtol=1e-12)


@pytest.mark.parametrize("context", [1, 2, 3, 8, 9])
def test_the_window_keeps_the_last_half_when_it_is_full(context):
    start = 0
    for count in range(1, 100):
        if count - start > context:  # full: the token that no longer fits starts a new window
            start = count - max(1, context // 2)
        assert window_start(count, context) == start
        assert 1 <= count - start <= context


def test_generation_with_and_without_cache_writes_the_same(rng):
    model = small_model(rng, context=10, family="llama")
    for options in (
        {"temperature": 0},
        {"seed": 3},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 2.0},
    ):
        texts = [list(generate(model, [1, 2], 35, use_cache=c, **options)) for c in (True, False)]
        assert texts[0] == texts[1] and len(texts[0]) == 35


def test_samples_differ_by_number_and_seed_and_repeat(rng):
    model = small_model(rng)
    first, again = (list(generate(model, [1], 20, seed=1)) for _ in range(2))
    assert first == again
    assert first != list(generate(model, [1], 20, seed=2))
    assert first != list(generate(model, [1], 20, seed=1, sample=1))


def test_it_stops_at_the_separator_and_never_chooses_padding(rng):
    model = small_model(rng)
    tokens = list(generate(model, [1], 200, seed=1, vocab_size=9))
    assert len(tokens) == 200 and max(tokens) == 8
    stop = tokens[50]
    cut = list(generate(model, [1], 200, seed=1, vocab_size=9, stop=stop))
    assert cut == tokens[: tokens.index(stop)]


def draws(logits, count=20_000, **options):
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    key = philox.key_of(1, "sample", "0")
    found = [choose(np.asarray(logits), key=key, position=i, **options) for i in range(count)]
    return np.bincount(found, minlength=len(logits)) / count


def test_tokens_come_with_their_probabilities():
    p = np.array([0.5, 0.25, 0.15, 0.1])
    assert abs(draws(np.log(p)) - p).max() < 0.015
    hot = p**0.5 / (p**0.5).sum()
    assert abs(draws(np.log(p), temperature=2.0) - hot).max() < 0.015


def test_top_k_and_top_p_cut_exactly():
    p = np.array([0.1, 0.5, 0.15, 0.25])
    logits = np.log(p)
    assert (draws(logits, 2000, top_k=2) > 0).tolist() == [False, True, False, True]
    assert (draws(logits, 2000, top_k=99) > 0).all()
    assert (draws(logits, 2000, top_p=0.5) > 0).tolist() == [False, True, False, False]
    assert (draws(logits, 2000, top_p=0.51) > 0).tolist() == [False, True, False, True]
    assert (draws(logits, 4000, top_p=1.0) > 0).all()
    # top_k first, then top_p of what is left: 0.5 and 0.25 are renormalised
    assert (draws(logits, 2000, top_k=2, top_p=0.6) > 0).tolist() == [False, True, False, False]
    # ties go to the smaller id
    assert (draws(np.zeros(4), 2000, top_k=2) > 0).tolist() == [True, True, False, False]
    assert draws(np.array([1.0, 3.0, 3.0]), 10, temperature=0)[1] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [37]}, "outside 0 ... 36"),
        ({"prompt": [-1]}, "outside 0 ... 36"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_arguments_are_named(rng, options, words):
    arguments = {"prompt": [1], "max_new_tokens": 3, **options}
    with pytest.raises(CupytronError, match=words):
        list(generate(small_model(rng), **arguments))
