"""Rows of a table by token id, and sinusoidal positions."""

from typing import Any

from cupytron import backend

# Up to this vocabulary a product with the one-hot matrix beats sorting the ids.
_ONE_HOT_UP_TO = 512


def embedding(ids: Any, table: Any, first: int | None = None) -> Any:
    """y[t] = table[ids[t]].

    Shapes: ids (T,) integers, table (V, D); y (T, D), new.

    Args:
        first: the table is a shard, its rows are those of the ids from this one on; the others' y is zero.
            None: it is whole.
    """
    if first is None:
        return table[ids]
    mine, local = _shard(ids, table, first)
    y = table[local]
    y[~mine] = 0
    return y


def embedding_backward(dy: Any, ids: Any, dtable: Any, first: int | None = None) -> None:
    """dtable[v] += sum of dy[t] over the tokens with ids[t] = v.

    Shapes: dy (T, D), ids (T,), dtable (V, D).

    Args:
        first: as embedding's.
    """
    xp = backend.array_module(dy)
    if first is not None:
        mine, local = _shard(ids, dtable, first)
        if not mine.any():
            return
        dy, ids = dy[mine], local[mine]
    if len(dtable) <= _ONE_HOT_UP_TO:
        one_hot = xp.zeros((len(ids), len(dtable)), dtype=dy.dtype)
        one_hot[xp.arange(len(ids)), ids] = 1
        dtable += one_hot.T @ dy
        return
    # equal ids side by side, in the order of the tokens: sums have one order, and no row is written twice
    order = xp.argsort(ids, kind="stable")
    ordered = ids[order]
    first = xp.flatnonzero(
        xp.concatenate([ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1]])
    )
    dtable[ordered[first]] += xp.add.reduceat(dy[order], first, axis=0)


def _shard(ids: Any, table: Any, first: int) -> tuple[Any, Any]:
    """Which ids stand in a shard, and in which row (0 for the others)."""
    mine = (ids >= first) & (ids < first + len(table))
    return mine, backend.array_module(ids).where(mine, ids - first, 0)


def sinusoidal_positions(positions: Any, width: int, dtype: Any) -> Any:
    """sin and cos of positions / 10000^(2i/D), sines in the even features, cosines in the odd ones.

    Shapes: positions (S,) integers; returns (S, D).
    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    xp = backend.array_module(positions)
    frequency = 10000.0 ** (-2 * (xp.arange(width) // 2) / width)
    angle = positions[:, None] * frequency
    table = xp.where(xp.arange(width) % 2 == 0, xp.sin(angle), xp.cos(angle))
    return table.astype(dtype)
