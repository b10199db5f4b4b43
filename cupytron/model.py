"""The transformer: one configuration gives the GPT-2 family and the Llama family."""

import math
from typing import Any

from cupytron.config import ModelConfig
from cupytron.layer import Chain, Layer, Parameter, normal
from cupytron.nn import (
    MLP,
    Attention,
    Block,
    Dropout,
    Embedding,
    Head,
    LayerNorm,
    LearnedPositions,
    Recompute,
    RMSNorm,
    SinusoidalPositions,
    SwiGLU,
)


class Transformer(Chain):
    """Token ids to logits: a chain of embedding, positions, dropout, blocks, norm and head.

    Weights start as in GPT-2: normal with init_std, the projections into the residual stream smaller by
    sqrt(2 num_layers) (Radford et al. 2019, section 2.3); biases at zero.

    Shapes: ids (T,), logits (T, V), with T = B * S tokens of the stash's batch.

    Args:
        config: a resolved one (config.resolve_model): no None left.
    """

    per_token = True

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        c: Any = config
        embedding = Embedding(c.vocab_size, c.d_model, c.init_std)
        self.embedding: Layer = embedding
        self.positions: Layer | None = None
        if c.position == "learned":
            self.positions = LearnedPositions(c.context_length, c.d_model, c.init_std)
        elif c.position == "sinusoidal":
            self.positions = SinusoidalPositions()
        self.dropout = Dropout(c.dropout)
        self.blocks: dict[int, Layer] = {i: make_block(config) for i in range(c.num_layers)}
        self.norm = make_norm(config)
        table = embedding.weight
        if not c.tied:
            table = Parameter((c.vocab_size, c.d_model), normal(c.init_std))
        self.head: Layer = Head(table)
        self.name_parts()

    def loss(self, logits: Any, targets: Any, scale: float) -> float:
        """As the head's: a sharded head has shards of logits."""
        head: Any = self.head  # wrapped or replaced, it has one
        return head.loss(logits, targets, scale)


def make_norm(config: ModelConfig) -> Layer:
    """The family's norm over the residual stream."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, bool(config.bias))


def make_block(config: ModelConfig) -> Layer:
    """One transformer block; what it recomputes in backward is the configuration's choice."""
    c: Any = config
    out_std = c.init_std / math.sqrt(2 * c.num_layers)
    attention = Attention(
        c.d_model,
        c.num_heads,
        c.num_kv_heads,
        bias=c.bias,
        rope_theta=c.rope_theta if c.position == "rotary" else None,
        dropout=c.dropout,
        std=c.init_std,
        out_std=out_std,
    )
    mlp: MLP | SwiGLU
    if c.activation == "swiglu":
        mlp = SwiGLU(c.d_model, c.d_ff, c.bias, c.init_std, out_std)
    else:
        mlp = MLP(c.d_model, c.d_ff, c.activation, c.bias, c.init_std, out_std)
    attention.recompute = mlp.recompute = c.recompute == "selective"
    block = Block(make_norm(config), attention, make_norm(config), mlp, c.dropout)
    return Recompute(block) if c.recompute == "block" else block
