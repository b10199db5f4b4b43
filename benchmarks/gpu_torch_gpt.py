"""The models of torch_gpt.py with dropout, which no comparison of numbers can have."""

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch_gpt import Block, CausalAttention, TorchGPT, rotate


class DropoutAttention(CausalAttention):
    """CausalAttention that drops probabilities."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.p = config.dropout

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        b, s, d = x.shape
        kv = self.num_kv_heads * self.head_size
        parts = self.qkv(x).split([d, kv, kv], dim=-1)
        q, k, v = (p.view(b, s, -1, self.head_size).transpose(1, 2) for p in parts)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.p if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class DropoutBlock(Block):
    """Block with dropout on both branches, and on its input if it is the first one."""

    def __init__(self, config: Any, first: bool) -> None:
        super().__init__(config)
        self.attention = DropoutAttention(config)
        self.drop = nn.Dropout(config.dropout)
        self.first = first

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = self.drop(x) if self.first else x
        x = x + self.drop(self.attention(self.norm1(x), rotary))
        return x + self.drop(self.mlp(self.norm2(x)))


def make_model(config: Any) -> TorchGPT:
    """The model of a resolved configuration, in float32."""
    values = SimpleNamespace(**config.model_dump())
    dropout, values.dropout = values.dropout, 0.0
    model = TorchGPT(values)
    if dropout:
        values.dropout = dropout
        blocks = (DropoutBlock(values, i == 0) for i in range(values.num_layers))
        model.blocks = nn.ModuleList(blocks)
        model.apply(model._initialise)
    return model
