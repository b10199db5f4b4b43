"""Writing text: KV cache, window, and one token after the other."""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.comm import Communicator, SelfCommunicator
from cupytron.errors import CupytronError
from cupytron.model import Transformer
from cupytron.ops import philox
from cupytron.parallel.pipeline import Pipeline, Work, run_schedule
from cupytron.sampling import choose
from cupytron.stash import MicroBatch

__all__ = ["Decoder", "KVCache", "choose", "generate", "window_start"]


class KVCache:
    """Keys and values of the tokens so far, for each attention layer.

    Shapes: (1, capacity, N_kv, H) each, allocated when a layer first asks.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._arrays: dict[str, tuple[Any, Any]] = {}

    def extend(self, layer: Any, k: Any, v: Any) -> tuple[Any, Any]:
        """Append k and v (1, S, N_kv, H) of `layer`; returns all of its keys and values so far."""
        if layer.name not in self._arrays:
            shape = (1, self.capacity, *k.shape[2:])
            xp = backend.array_module(k)
            self._arrays[layer.name] = (xp.empty(shape, k.dtype), xp.empty(shape, v.dtype))
        keys, values = self._arrays[layer.name]
        stop = self.length + k.shape[1]
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def advance(self, tokens: int) -> None:
        """Called once all layers have seen `tokens` more."""
        self.length += tokens


def _on_host(logits: Any) -> np.ndarray:
    return backend.to_host(logits.astype(backend.at_least_float32(logits.dtype)))


def window_start(count: int, context: int) -> int:
    """The first token that the model sees when it predicts token number `count`.

    The window grows to `context` tokens; when it is full, its last half is kept, and it grows again. It
    depends on `count` alone, so cached and uncached generation see the same.
    """
    if count <= context:
        return 0
    kept = max(1, context // 2)
    # after the first full window, one of every (context - kept + 1) tokens starts a new one
    period = context + 1 - kept
    return (1 + (count - context - 1) // period) * period


class Decoder:
    """Logits of the next token, for a growing sequence.

    Args:
        model: with its weights; in a pipeline, what this stage has of it.
        use_cache: keep keys and values; without it every token runs the whole window.
        pipeline: the stage; None: all of the model is here. All of the pipeline's ranks decode.
    """

    def __init__(
        self, model: Transformer, use_cache: bool = True, pipeline: Pipeline | None = None
    ) -> None:
        self.pipeline = pipeline or Pipeline(model)
        self.context = int(model.config.context_length or 0)
        self.use_cache = use_cache
        self._cache: KVCache | None = None
        self._start = 0

    def logits(self, ids: Sequence[int]) -> Any:
        """Logits (V_local,) of the token after `ids`, on the host; ids may only have grown since the last
        call.

        Under tensor parallelism they are those of this rank's share of the vocabulary; in a pipeline the
        last stage has them, and None is returned elsewhere.
        """
        start = window_start(len(ids), self.context)
        if self._cache is None or start != self._start or not self.use_cache:
            self._cache, self._start = KVCache(self.context), start
        done = self._cache.length
        new = np.asarray(ids[start + done :], dtype=np.int64)
        positions = np.arange(done, done + len(new))
        batch = MicroBatch(1, len(new), positions, kv_cache=self._cache)
        logits = run_schedule(
            self.pipeline,
            self.pipeline.schedule(1, training=False),
            [Work(batch, new, None)],
            lambda logits, _: _on_host(logits[-1]),
        )
        self._cache.advance(len(new))
        return logits[0] if logits else None


def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1,
    sample: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    tp: Communicator | None = None,
    pipeline: Pipeline | None = None,
) -> Iterator[int]:
    """New token ids, one at a time; the same on every rank of the mesh, which take part in each.

    Args:
        model: with its weights; in a pipeline, what this stage has of it.
        prompt: at least one token id.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k, top_p: choose among the k likeliest tokens, or the fewest that hold probability p.
        seed, sample: address the random numbers: sample number i is the same however many are drawn.
        stop: a token that ends the text (it is not yielded).
        vocab_size: ids from here on are padding and are never chosen.
        tp: ranks that share the vocabulary, ceil(V / size) ids each until none are left; None: no
            other rank.
        pipeline: the stage; None: all of the model is here.

    Raises:
        CupytronError: an argument is out of range.
    """
    ids = [int(token) for token in prompt]  # perhaps an array
    _check(model, ids, max_new_tokens, temperature, top_k, top_p)
    for name, value in (("seed", seed), ("sample", sample)):
        if not isinstance(value, Integral):
            raise CupytronError(f"{name}={_shown(value)} must be a whole number")
    key = philox.key_of(seed, "sample", str(sample))
    decoder = Decoder(model, use_cache, pipeline)
    pipeline = decoder.pipeline
    tp = tp or SelfCommunicator("tp")
    vocab = int(model.config.vocab_size or 0)
    first = min(tp.rank * -(-vocab // tp.size), vocab)
    real = max(0, (vocab if vocab_size is None else vocab_size) - first)
    for _ in range(max_new_tokens):
        logits, token = decoder.logits(ids), -1
        if logits is not None:
            token = choose(
                logits[:real], temperature, top_k, top_p, key, position=len(ids), tp=tp, first=first
            )
        token = int(pipeline.pp.broadcast(np.array([token]), pipeline.last_stage)[0])
        if token == stop:
            return
        ids.append(token)
        yield token


def _shown(value: Any) -> str:
    """A value for an error: a number of NumPy as its digits, text with its quotes."""
    return repr(value) if isinstance(value, str | bytes) else str(value)


def _check(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    vocab = int(model.config.vocab_size or 0)
    if not prompt:
        raise CupytronError("the prompt is empty; give at least one character")
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise CupytronError(f"the prompt holds token ids outside 0 ... {vocab - 1}")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise CupytronError(
            f"max_new_tokens={_shown(max_new_tokens)} must be a whole number from 0"
        )
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature >= 0):
        raise CupytronError(
            f"temperature={_shown(temperature)} must be 0 (the likeliest token) or more"
        )
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise CupytronError(
            f"top_k={_shown(top_k)} must be a whole number from 1; leave it out to choose among all"
        )
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise CupytronError(f"top_p={_shown(top_p)} must be above 0 and at most 1")
