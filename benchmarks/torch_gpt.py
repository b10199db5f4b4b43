"""The same GPT in plain PyTorch: what cupytron is compared with, for numbers and for speed.

Written from scratch on `torch.nn`, and on purpose in PyTorch's own way rather than in cupytron's:
three-dimensional activations, (D_out, D_in) weights, queries, keys and values as three contiguous
parts of one product, the framework's attention, its AdamW and its clipping. So when losses and
gradients agree (`tests/test_against_torch.py`), that is not agreement with a copy. Only
`load_cupytron`, `named_arrays` and `named_gradients` know cupytron's names and layouts.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("gelu", "gelu_exact", "relu", "swiglu")


def make_norm(config: Any) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def rotary_tables(context_length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of Su et al. 2021 (arXiv:2104.09864), each (S, H) in float64."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)  # pairs are (i, i + H/2): Llama's "rotate half"
    return angles.cos(), angles.sin()


def sinusoidal_table(context_length: int, width: int) -> Tensor:
    """Vaswani et al. 2017 (arXiv:1706.03762): sines in even, cosines in odd features; (S, D)."""
    wavelengths = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(context_length, dtype=torch.float64)[:, None] / wavelengths
    # an odd width ends with a sine that has no cosine
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class CausalAttention(nn.Module):
    """Multi-head or grouped-query attention on the framework's fused kernel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_size = config.d_model // config.num_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        self.qkv = nn.Linear(config.d_model, width, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        b, s, d = x.shape
        kv = self.num_kv_heads * self.head_size
        q, k, v = self.qkv(x).split([d, kv, kv], dim=-1)
        q = q.view(b, s, self.num_heads, self.head_size).transpose(1, 2)
        k = k.view(b, s, self.num_kv_heads, self.head_size).transpose(1, 2)
        v = v.view(b, s, self.num_kv_heads, self.head_size).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        grouped = self.num_kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise ValueError(f"activation={config.activation!r}: choose from {ACTIVATIONS}")
        self.activation = config.activation
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * up)
        if self.activation == "relu":
            return self.down(F.relu(up))
        return self.down(F.gelu(up, approximate="tanh" if self.activation == "gelu" else "none"))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm1, self.attention = make_norm(config), CausalAttention(config)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class TorchGPT(nn.Module):
    """GPT-2 and Llama families, for a resolved `ModelConfig` or any object with its attributes.

    Dropout is left out: the two libraries draw different masks, so it can be neither compared nor
    fairly timed.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.dropout != 0.0:
            raise ValueError(f"dropout={config.dropout}: the PyTorch model has none; set 0")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        dtype = self.embedding.weight.dtype
        if config.position == "rotary":
            head_size = config.d_model // config.num_heads
            cos, sin = rotary_tables(config.context_length, head_size, config.rope_theta)
            self.register_buffer("cos", cos.to(dtype), persistent=False)
            self.register_buffer("sin", sin.to(dtype), persistent=False)
        elif config.position == "sinusoidal":
            table = sinusoidal_table(config.context_length, config.d_model)
            self.register_buffer("sinusoids", table.to(dtype), persistent=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that are not -1; ids and targets (B, S)."""
        s = ids.shape[1]
        x = self.embedding(ids)
        if self.config.position == "learned":
            x = x + self.positions(torch.arange(s, device=ids.device))
        elif self.config.position == "sinusoidal":
            x = x + self.sinusoids[:s]
        rotary = (self.cos[:s], self.sin[:s]) if self.config.position == "rotary" else None
        for block in self.blocks:
            x = block(x, rotary)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def make_model(config: Any, dtype: torch.dtype = torch.float32) -> TorchGPT:
    """A model whose weights and rotary tables are in `dtype` from the start.

    `TorchGPT(config).double()` would keep float32 tables' rounding errors.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return TorchGPT(config)
    finally:
        torch.set_default_dtype(previous)


def make_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and tables only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def _qkv_order(config: Any) -> np.ndarray:
    """Which of cupytron's qkv columns stands where here: (N_kv, q..q k v, H) to q | k | v."""
    n, kv = config.num_heads, config.num_kv_heads
    h = config.d_model // n
    columns = np.arange((n + 2 * kv) * h).reshape(kv, n // kv + 2, h)
    q, k, v = columns[:, :-2], columns[:, -2], columns[:, -1]
    return np.concatenate([q.ravel(), k.ravel(), v.ravel()])


def _to_torch(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    if ".qkv." in name:
        value = value[..., _qkv_order(config)]
    # tables and the head are (V, D) in both; every other matrix is a linear layer's
    if value.ndim == 2 and name.startswith("blocks."):
        value = value.T
    return np.ascontiguousarray(value)


def _to_cupytron(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    if value.ndim == 2 and name.startswith("blocks."):
        value = value.T
    if ".qkv." in name:
        value = value[..., np.argsort(_qkv_order(config))]
    return np.ascontiguousarray(value)


def load_cupytron(model: TorchGPT, named_arrays: dict[str, np.ndarray]) -> None:
    """Copy weights given under cupytron's names and layouts into the model.

    Raises:
        ValueError: The names or a shape are not the model's.
    """
    # a tied table is listed once, as `embedding.weight`, in both
    parameters = dict(model.named_parameters())
    if parameters.keys() != named_arrays.keys():
        names = sorted(parameters.keys() ^ named_arrays.keys())
        raise ValueError(f"parameters that only one of the two models has: {', '.join(names)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = _to_torch(name, np.asarray(named_arrays[name]), model.config)
            if value.shape != tuple(parameter.shape):
                raise ValueError(f"{name}: {value.shape} here, {tuple(parameter.shape)} in PyTorch")
            parameter.copy_(torch.from_numpy(value))


def named_arrays(model: TorchGPT) -> dict[str, np.ndarray]:
    """The weights under cupytron's names and in its layouts."""
    return {
        name: _to_cupytron(name, parameter.detach().numpy(), model.config)
        for name, parameter in model.named_parameters()
    }


def named_gradients(model: TorchGPT) -> dict[str, np.ndarray]:
    """The gradients under cupytron's names and in its layouts."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: call backward first"
        gradients[name] = _to_cupytron(name, parameter.grad.numpy(), model.config)
    return gradients
