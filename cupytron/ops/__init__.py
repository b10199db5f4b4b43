"""The mathematics: pairs of functions, forward and backward, on NumPy or CuPy arrays.

This namespace is the table of functions that layers call (`ops.gelu`). Its modules hold the reference;
`use` puts a device's faster kernels, with the same names and signatures, in their places in the table.
"""

from typing import Any

from cupytron.ops import activation as _activation
from cupytron.ops import attention as _attention
from cupytron.ops import cross_entropy as _cross_entropy
from cupytron.ops import dropout as _dropout
from cupytron.ops import embedding as _embedding
from cupytron.ops import linear as _linear
from cupytron.ops import norm as _norm
from cupytron.ops import rotary as _rotary
from cupytron.ops.attention import AttentionDropout
from cupytron.ops.cross_entropy import IGNORE
from cupytron.ops.half import in_float32

matmul = in_float32(_linear.matmul, written="out")
linear = in_float32(_linear.linear)
add_product = in_float32(_linear.add_product, written="total")
sum_rows = in_float32(_linear.sum_rows, wide=(0,))
add_to = _linear.add_to
gelu = in_float32(_activation.gelu)
gelu_backward = in_float32(_activation.gelu_backward)
gelu_exact = in_float32(_activation.gelu_exact)
gelu_exact_backward = in_float32(_activation.gelu_exact_backward)
relu = in_float32(_activation.relu)
relu_backward = in_float32(_activation.relu_backward)
swiglu = in_float32(_activation.swiglu)
swiglu_backward = in_float32(_activation.swiglu_backward)
layer_norm = in_float32(_norm.layer_norm, wide=(1,))
add_layer_norm = in_float32(_norm.add_layer_norm, wide=(2,))
layer_norm_backward = in_float32(_norm.layer_norm_backward, wide=(1, 2))
rms_norm = in_float32(_norm.rms_norm, wide=(1,))
add_rms_norm = in_float32(_norm.add_rms_norm, wide=(2,))
rms_norm_backward = in_float32(_norm.rms_norm_backward, wide=(1,))
rotary_table = _rotary.rotary_table
rotary = in_float32(_rotary.rotary, written="x")
attention = in_float32(_attention.attention, wide=(1,))
cached_attention = in_float32(_attention.cached_attention)
attention_backward = in_float32(_attention.attention_backward, written="out")
cross_entropy = in_float32(_cross_entropy.cross_entropy, written="logits")
shard_exponentials = in_float32(_cross_entropy.shard_exponentials, written="logits")
shard_cross_entropy = in_float32(_cross_entropy.shard_cross_entropy, written="exponentials")
embedding = _embedding.embedding
embedding_backward = in_float32(_embedding.embedding_backward)
sinusoidal_positions = _embedding.sinusoidal_positions
dropout = in_float32(_dropout.dropout)
dropout_backward = in_float32(_dropout.dropout_backward)

__all__ = [
    "IGNORE",
    "REFERENCE",
    "AttentionDropout",
    "add_layer_norm",
    "add_product",
    "add_rms_norm",
    "add_to",
    "attention",
    "attention_backward",
    "cached_attention",
    "cross_entropy",
    "dropout",
    "dropout_backward",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_backward",
    "gelu_exact",
    "gelu_exact_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "matmul",
    "relu",
    "relu_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_table",
    "shard_cross_entropy",
    "shard_exponentials",
    "sinusoidal_positions",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
    "use",
]

_OTHERS = ("IGNORE", "REFERENCE", "AttentionDropout", "use")
REFERENCE = {name: globals()[name] for name in __all__ if name not in _OTHERS}


def use(table: dict[str, Any] | None = None) -> None:
    """Put functions in the places of the reference's, for the whole process.

    Args:
        table: by their names in the reference; what it lacks, and None, is the reference's.
    """
    globals().update({**REFERENCE, **(table or {})})
