"""How many bytes layers keep of a micro-batch for backward, read off the shapes of their weights.

Counted is what the layers of a Transformer push onto their stash with a GPU's kernels; the reference keeps
one number less of each row of a norm.
"""

from typing import Any

from cupytron import backend
from cupytron.config import ModelConfig, RunConfig
from cupytron.layer import Layer, Wrapper
from cupytron.nn import (
    MLP,
    Attention,
    Dropout,
    Embedding,
    Head,
    LayerNorm,
    Recompute,
    RMSNorm,
    SwiGLU,
)
from cupytron.parallel.tensor import VocabularyEmbedding, VocabularyHead


class Kept:
    """Bytes that layers of a model, which need not be materialised, keep of one micro-batch.

    Args:
        config: the run's settings, with the sizes of the mesh. model: resolved.

    Attributes:
        each: bytes of a number.
    """

    def __init__(self, config: RunConfig, model: ModelConfig) -> None:
        parallel, dtype = config.parallel, backend.named_dtype(config.compute_dtype)
        self.each, self.wide = dtype.itemsize, backend.at_least_float32(dtype).itemsize
        self.width = model.d_model
        self.tokens = config.train.micro_batch * config.train.sequence_length
        # rows outside of tensor-parallel regions, and of what enters one
        self.outside = self.tokens // (parallel.tp if parallel.sp else 1)
        self.entering = self.tokens if parallel.sp_keep_gathered else self.outside

    def until_backward(self, layer: Layer) -> int:
        """From F to B."""
        while isinstance(layer, Wrapper):
            if isinstance(layer, Recompute):
                return self.each * self.outside * self.width
            layer = layer.inner
        return sum(self._until_backward(part) for _, part in layer.named_layers())

    def _until_backward(self, layer: Any) -> int:
        tokens, each = self.tokens, self.each
        entering = each * self.entering * self.width
        if isinstance(layer, LayerNorm | RMSNorm):
            return self.outside * (each * self.width + 2 * self.wide)
        if isinstance(layer, Dropout):
            return self.outside * self.width if layer.p else 0
        if isinstance(layer, Embedding | VocabularyEmbedding):
            return 8 * tokens
        if isinstance(layer, Attention):
            qkv, inner = layer.qkv.weight.local_shape[1], layer.out.weight.local_shape[0]
            output = each * inner + self.wide * inner // layer.head_size
            return entering + tokens * (each * qkv + (0 if layer.recompute else output))
        if isinstance(layer, MLP | SwiGLU):
            return entering + each * tokens * (_wide(layer) - layer.recompute) * _inner(layer)
        if isinstance(layer, Head | VocabularyHead):
            return entering
        return 0

    def until_weights(self, layer: Layer) -> int:
        """From B to W, where gradients of weights are put off: products' inputs, gradients of outputs."""
        return self.each * sum(self._until_weights(part) for _, part in layer.named_layers())

    def _until_weights(self, layer: Any) -> int:
        tokens, across = self.tokens, self.tokens * self.width
        if isinstance(layer, Embedding | VocabularyEmbedding):
            return across
        if isinstance(layer, Attention):
            widths = layer.qkv.weight.local_shape[1] + layer.out.weight.local_shape[0]
            return 2 * across + tokens * widths
        if isinstance(layer, MLP | SwiGLU):
            return 2 * across + tokens * _wide(layer) * _inner(layer)
        if isinstance(layer, Head | VocabularyHead):
            return across + self.logits(layer) // self.each
        return 0

    def logits(self, head: Any) -> int:
        """What the head makes."""
        rows = head.weight.box[0]
        return self.each * self.tokens * (rows.stop - rows.start)

    def for_a_moment(self, model: Any) -> int:
        """In the dearest block while it runs, roughly: arrays inside of it, and of the residual stream."""
        layers = [layer for block in model.blocks.values() for _, layer in block.named_layers()]
        inside = [2 * x.qkv.weight.local_shape[1] for x in layers if isinstance(x, Attention)]
        inside += [3 * _inner(x) for x in layers if isinstance(x, MLP | SwiGLU)]
        return self.each * (3 * self.outside * self.width + self.tokens * max(inside, default=0))

    def again(self, model: Any) -> int:
        """In the backward of a block that is run again: what it keeps then."""
        if model.config.recompute != "block" or not model.blocks:
            return 0
        first = next(iter(model.blocks.values()))
        return sum(self._until_backward(layer) for _, layer in first.named_layers())


def _inner(mlp: Any) -> int:
    """F, or a tensor rank's share of it."""
    return int(mlp.down.weight.local_shape[0])


def _wide(mlp: MLP | SwiGLU) -> int:
    """Arrays (T, F) that it keeps."""
    return 3 if isinstance(mlp, SwiGLU) else 2
