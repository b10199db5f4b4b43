"""Small tokenizers of the library, one of each kind in common use, trained on a few sentences."""

import functools
import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split

TEXT = (
    "The cat sat on the mat, the dog's hat; hello world, 1234 numbers.\n"
    "Na\u00efve caf\u00e9s thecat unbelievable lowering lowest  two spaces\n\n"
) * 20
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def added(i, content, special=True, **flags):
    all_flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False) | flags
    return {"id": i, "content": content, **all_flags, "special": special}


def byte_level(*pre_tokenizer_steps, normalizer=None, size=330, special=("<|endoftext|>",)):
    tokenizer = Tokenizer(models.BPE())
    steps = pre_tokenizer_steps or (ByteLevel(add_prefix_space=False),)
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def gpt4(**options):
    split = Split(Regex(GPT4), "isolated")
    return byte_level(split, ByteLevel(add_prefix_space=False, use_regex=False), **options)


def llama2():
    """SentencePiece BPE as the library has it: a space in front, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = Split(
        "\u2581", "merged_with_next"
    )  # for short tokens of few sentences
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, show_progress=False)
    content = _trained(tokenizer, trainer)
    # as in Llama 2: no pre-tokenizer, and the byte tokens are not special
    content["added_tokens"] = content["added_tokens"][:3]
    return content | {"pre_tokenizer": None}


def metaspace(prepend_scheme, model="bpe"):
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=90,
            special_tokens=["<unk>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return _trained(tokenizer, trainer)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=110, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    return _trained(tokenizer, trainer)


def with_added(content, *tokens):
    """A tokenizer with ordinary added tokens, whose ids follow all others."""
    first = 1 + max(content["model"]["vocab"].values())
    new = [added(first + i, name, special=False, **flags) for i, (name, flags) in enumerate(tokens)]
    return content | {"added_tokens": content["added_tokens"] + new}


MAKERS = {
    "gpt2": byte_level,
    "gpt4": gpt4,
    "nfc": lambda: gpt4(normalizer=normalizers.NFC()),
    "prefix space": lambda: byte_level(ByteLevel(add_prefix_space=True)),
    "llama2": llama2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "unigram": lambda: metaspace("always", "unigram"),
    "wordpiece": wordpiece,
    "gpt2 added": lambda: with_added(
        byte_level(), ("hello world", {}), ("<mark>", {"lstrip": True, "rstrip": True})
    ),
    "llama2 added": lambda: with_added(llama2(), ("hello world", {}), ("<mark>", {})),
}


@functools.cache
def _content(name):
    return json.dumps(MAKERS[name]())


def content(name):
    """The JSON object of a tokenizer of that kind."""
    return json.loads(_content(name))


def whole(content, text):
    """The library's own ids of a whole document, in which special tokens are ordinary text."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def _trained(tokenizer, trainer):
    tokenizer.train_from_iterator([TEXT], trainer)
    return json.loads(tokenizer.to_str())
