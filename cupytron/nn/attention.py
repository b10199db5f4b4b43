"""Causal self-attention with grouped queries and rotary positions."""

from typing import Any

from cupytron import backend, ops
from cupytron.layer import Layer
from cupytron.nn.linear import Linear
from cupytron.ops import philox
from cupytron.stash import Stash


class Attention(Layer):
    """y = out(softmax(q k^T / sqrt(H)) v), with q, k, v = qkv(x).

    The columns of `qkv` are ordered by KV head, (N_kv, q..q k v, H), so that a contiguous share of them
    holds whole groups. How many heads there are is read off the array: a shard needs no telling.

    Of the probabilities nothing is kept, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135); with
    `recompute` their product with v is made again in backward, too.

    Shapes: x, y (T, D).
    """

    recompute = False

    def __init__(
        self,
        d: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool = True,
        rope_theta: float | None = None,
        dropout: float = 0.0,
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads  # of all shards together
        self.head_size = d // num_heads
        self.group = num_heads // num_kv_heads
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.first_head = 0  # global index of this shard's first head
        self.qkv = Linear(d, (num_heads + 2 * num_kv_heads) * self.head_size, bias, std)
        self.out = Linear(num_heads * self.head_size, d, bias, out_std)

    def forward(self, x: Any, stash: Stash) -> Any:
        qkv = self.qkv.forward(x, stash)
        q, k, v = self._split(qkv, stash)
        self._rotate(qkv, stash, back=False)
        if stash.batch.kv_cache is not None:
            o = ops.cached_attention(q, *stash.batch.kv_cache.extend(self, k, v))
            return self.out.forward(o.reshape(len(qkv), -1), stash)
        o, lse = ops.attention(q, k, v, self._dropout(stash))
        with stash.remaking(
            self.recompute, (o, lse), lambda saved: self._attend(saved, stash), qkv
        ):
            stash.push(self, qkv, o, lse)
            return self.out.forward(o.reshape(len(qkv), -1), stash)

    def backward(self, dy: Any, stash: Stash) -> Any:
        do = self.out.backward(dy, stash)
        qkv, o, lse = stash.pop(self)
        dqkv = backend.array_module(qkv).empty_like(qkv)
        q, k, v = self._split(qkv, stash)
        dq, dk, dv = self._split(dqkv, stash)
        ops.attention_backward(
            do.reshape(o.shape), q, k, v, o, lse, (dq, dk, dv), self._dropout(stash)
        )
        self._rotate(dqkv, stash, back=True)
        return self.qkv.backward(dqkv, stash)

    def _attend(self, qkv: Any, stash: Stash) -> tuple[Any, Any]:
        return ops.attention(*self._split(qkv, stash), self._dropout(stash))

    def _heads(self, qkv: Any, stash: Stash) -> Any:
        """A view (B, S, N_kv, G + 2, H)."""
        batch = stash.batch.batch_size
        return qkv.reshape(batch, len(qkv) // batch, -1, self.group + 2, self.head_size)

    def _split(self, qkv: Any, stash: Stash) -> tuple[Any, Any, Any]:
        """Views q (B, S, N_kv, G, H), k and v (B, S, N_kv, H)."""
        heads = self._heads(qkv, stash)
        return heads[..., : self.group, :], heads[..., self.group, :], heads[..., self.group + 1, :]

    def _rotate(self, qkv: Any, stash: Stash, back: bool) -> None:
        """Turn queries and keys, or their gradients back, in place."""
        if self.rope_theta is None:
            return
        batch, theta = stash.batch, self.rope_theta
        cos, sin, minus_sin = batch.once(
            ("rotary", self.head_size, theta),
            lambda: self._rotary_table(qkv, batch.positions, theta),
        )
        # a group's queries and its key lie side by side
        queries_and_keys = self._heads(qkv, stash)[..., : self.group + 1, :]
        ops.rotary(queries_and_keys, cos, minus_sin if back else sin)

    def _rotary_table(self, like: Any, positions: Any, theta: float) -> tuple[Any, Any, Any]:
        positions = backend.array_module(like).asarray(positions)
        dtype = backend.at_least_float32(like.dtype)
        cos, sin = ops.rotary_table(positions, self.head_size, theta, dtype)
        return cos, sin, -sin

    def _dropout(self, stash: Stash) -> ops.AttentionDropout | None:
        batch = stash.batch
        if not self.dropout or not batch.training:
            return None
        key = philox.key_of(batch.seed, "dropout", self.name)
        return ops.AttentionDropout(
            self.dropout, key, batch.step, batch.first_token, self.first_head
        )
