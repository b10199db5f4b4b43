"""Layers: forward and backward side by side."""

from cupytron.nn.attention import Attention
from cupytron.nn.block import Block, Recompute
from cupytron.nn.dropout import Dropout
from cupytron.nn.embedding import Embedding, Head, LearnedPositions, SinusoidalPositions
from cupytron.nn.linear import Linear
from cupytron.nn.mlp import MLP, SwiGLU
from cupytron.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Dropout",
    "Embedding",
    "Head",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "RMSNorm",
    "Recompute",
    "SinusoidalPositions",
    "SwiGLU",
]
