"""The mathematics: pairs of functions, forward and backward, on NumPy or CuPy arrays.

This namespace is the table of functions that layers call (`ops.gelu`). Its modules hold the reference;
a device's faster kernels take places in the table under the same names and signatures.
"""

from cupytron.ops.activation import (
    activation_backward,
    gelu,
    gelu_exact,
    relu,
    swiglu,
    swiglu_backward,
)
from cupytron.ops.attention import AttentionDropout, attention, attention_backward
from cupytron.ops.cross_entropy import IGNORE, cross_entropy
from cupytron.ops.dropout import dropout, dropout_backward
from cupytron.ops.embedding import embedding, embedding_backward, sinusoidal_positions
from cupytron.ops.linear import add_product, linear, matmul, sum_rows
from cupytron.ops.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from cupytron.ops.rotary import rotary, rotary_table

__all__ = [
    "IGNORE",
    "AttentionDropout",
    "activation_backward",
    "add_product",
    "attention",
    "attention_backward",
    "cross_entropy",
    "dropout",
    "dropout_backward",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_exact",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "matmul",
    "relu",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_table",
    "sinusoidal_positions",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
]
