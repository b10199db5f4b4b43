"""Runs with tokenizers of the library: texts are decoded with their prompts, bytes are counted or not."""

import json

import pytest
import tokenizer_files
from runs import run_here

import cupytron
from cupytron.cli import main
from cupytron.data import prepare_dataset
from cupytron.generate import generate

SENTENCES = ["the cat sat on the mat", "hello world, the cat", "lowest cats lowering"] * 40
KINDS = ["gpt2", "llama2", "wordpiece"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """A model of a few steps; its run's folder is `model.run`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_files.content(request.param)))
    lines = (json.dumps({"text": text}) + "\n" for text in SENTENCES)
    (folder / "text.jsonl").write_text("".join(lines))
    prepare_dataset([folder / "text.jsonl"], folder / "data", folder / "tokenizer.json")
    run_here(folder / "data", folder / "run", "train.max_steps=4", "train.eval_interval=4")
    model = cupytron.load(folder / "run")
    model.run = folder / "run"
    return model


@pytest.mark.parametrize("prompt", ["hello world", "the cat ", None])
def test_prompt_and_text_are_all_ids_decoded(model, prompt, capsys):
    tokenizer = model.tokenizer
    prompt_ids = tokenizer.encode(prompt or "")
    start = prompt_ids or [tokenizer.separator]
    options = {"temperature": 2.0, "seed": 3}
    new = list(
        generate(
            model.model,
            start,
            12,
            stop=tokenizer.separator,
            vocab_size=tokenizer.vocab_size,
            **options,
        )
    )
    whole = tokenizer.decode(prompt_ids + new)
    text = model.generate(prompt, 12, **options)
    if whole.startswith(prompt or ""):
        assert (prompt or "") + text == whole
    assert model.generate(prompt, 12, **options, echo=True) == whole
    words = [] if prompt is None else ["--prompt", prompt]
    words += ["--max-new-tokens", "12", "--temperature", "2", "--seed", "3"]
    with pytest.raises(SystemExit) as info:
        main.run(["sample", str(model.run), *words])
    assert info.value.code == 0 and capsys.readouterr().out == whole + "\n"


def test_bits_per_byte_are_of_the_text_or_none(model):
    result = model.evaluate()
    assert (result["bits_per_byte"] is None) == (model.tokenizer.text_lengths() is None)


def test_a_lost_space_comes_back_once():
    from cupytron.trained import _after

    cases = [
        (" ", [" world", " x"], "world x"),
        (" ", ["s", " x"], "s x"),
        ("", [" a"], " a"),
        ("  ", [" ", " ", "a"], "a"),
        ("  ", [" ", "a", " "], " a "),
        ("  ", [" "], " "),
        (" ", [" "], ""),
        (" ", [], ""),
    ]
    for start, pieces, want in cases:
        assert "".join(_after(start, iter(pieces))) == want
