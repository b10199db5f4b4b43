"""The fast CUDA versions of ops: the same names and signatures, for arrays on a GPU."""

from typing import Any


def table() -> dict[str, Any]:
    """All kernels by their names in ops, each by itself: what the autotuner chooses from comes later."""
    from cupytron.kernels import (
        activation,
        attention,
        cross_entropy,
        dropout,
        embedding,
        norm,
        products,
        rotary,
        sums,
    )

    return {
        "matmul": products.matmul,
        "linear": products.linear,
        "add_product": products.add_product,
        "sum_rows": sums.sum_rows,
        "add_to": sums.add_to,
        "gelu": activation.gelu,
        "gelu_backward": activation.gelu_backward,
        "gelu_exact": activation.gelu_exact,
        "gelu_exact_backward": activation.gelu_exact_backward,
        "relu": activation.relu,
        "relu_backward": activation.relu_backward,
        "swiglu": activation.swiglu,
        "swiglu_backward": activation.swiglu_backward,
        "layer_norm": norm.layer_norm,
        "add_layer_norm": norm.add_layer_norm,
        "layer_norm_backward": norm.layer_norm_backward,
        "rms_norm": norm.rms_norm,
        "add_rms_norm": norm.add_rms_norm,
        "rms_norm_backward": norm.rms_norm_backward,
        "rotary": rotary.rotary,
        "attention": attention.attention,
        "attention_backward": attention.attention_backward,
        "cross_entropy": cross_entropy.cross_entropy,
        "shard_exponentials": cross_entropy.shard_exponentials,
        "shard_cross_entropy": cross_entropy.shard_cross_entropy,
        "embedding": embedding.embedding,
        "embedding_backward": embedding.embedding_backward,
        "dropout": dropout.dropout,
        "dropout_backward": dropout.dropout_backward,
    }
