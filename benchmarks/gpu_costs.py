"""Bytes and operations of a training step: by hand from its shapes, and of the calls that it makes.

    python benchmarks/gpu_costs.py gpt2-124m --micro-batch 32

Bytes are the fewest that a kernel can move: each input read once, each output written once. Operations are
those of products, of which attention needs the half below the diagonal.
"""

import argparse
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpu_report import markdown

from cupytron.config import ModelConfig, load_config, resolve_model

# an H200: large copies, and large bfloat16 products of random numbers
BANDWIDTH, RATE = 4.3e12, 790e12
# what is expected of good kernels, as a part of these
EXPECTED = {"product": 0.75, "attention": 0.5, "memory": 0.8}
GRADIENT = 4  # bytes of a gradient, of the weights that are updated, and of AdamW's moments
PRODUCTS = ("linear", "matmul", "add_product")
ATTENTION = ("attention", "attention_backward")
# by operation, which arguments are written, and which of these are not read before
WRITTEN: dict[str, tuple[tuple[str, ...], bool]] = {
    "matmul": (("out",), False),
    "add_product": (("total",), True),
    "add_to": (("total",), True),
    "rotary": (("x",), True),
    "attention_backward": (("out",), False),
    "cross_entropy": (("logits",), True),
    "shard_exponentials": (("logits",), True),
    "shard_cross_entropy": (("exponentials",), True),
}


class Cost(NamedTuple):
    """Of one call."""

    nbytes: float
    flops: float = 0.0

    def seconds(self, bandwidth: float = BANDWIDTH, rate: float = RATE) -> float:
        """The floor: no kernel is much faster."""
        return max(self.nbytes / bandwidth, self.flops / rate)


class Row(NamedTuple):
    """Equal calls of one operation in a step."""

    operation: str
    what: str
    calls: int
    cost: Cost

    @property
    def kind(self) -> str:
        """Which of EXPECTED's it is."""
        if self.operation in PRODUCTS:
            return "product"
        return "attention" if self.operation in ATTENTION else "memory"

    def expected(self, bandwidth: float, rate: float) -> float:
        """Seconds of all calls with good kernels."""
        share = EXPECTED[self.kind]
        return self.calls * self.cost.seconds(bandwidth * EXPECTED["memory"], rate * share)


def step(model: ModelConfig, batch: int, length: int, half: int = 2) -> list[Row]:
    """A step of one micro-batch, forward, backward and AdamW, without dropout and recomputation.

    Args:
        model: resolved. batch, length: B and S.
        half: bytes of an activation, and of a weight as layers see it.
    """
    vocab = model.sizes()[0]
    t, d = batch * length, model.d_model
    rows = list(_blocks(model, batch, length, half))
    table = t * d * half
    head = t * vocab * half, vocab * d
    rows += [
        Row("embedding", "tokens", 1, Cost(2 * table + 8 * t)),
        Row("matmul", "head", 1, Cost(table + head[1] * half + head[0], 2.0 * t * d * vocab)),
        Row("cross_entropy", "loss and its gradient", 1, Cost(2 * head[0] + 8 * t + 16)),
        Row(
            "add_product",
            "head",
            1,
            Cost(table + head[0] + 2 * GRADIENT * head[1], 2.0 * t * d * vocab),
        ),
        Row(
            "matmul",
            "head, backward",
            1,
            Cost(table + head[1] * half + head[0], 2.0 * t * d * vocab),
        ),
        Row(
            "embedding_backward",
            "tokens",
            1,
            Cost(table + 8 * t + 2 * GRADIENT * min(t, vocab) * d),
        ),
    ]
    if model.position == "learned":
        each = length * d
        rows += [
            Row("embedding", "positions", 1, Cost(2 * each * half + 8 * length)),
            Row("array", "adding positions", 1, Cost(2 * table + each * half)),
            Row("sum_rows", "positions", 1, Cost(table + GRADIENT * each)),
            Row("add_to", "gradient of positions", 1, Cost(3 * GRADIENT * each)),
        ]
    count = model.num_parameters()
    copy = half if half < GRADIENT else 0
    rows += [
        Row("squares", "norm of the gradient", 1, Cost(GRADIENT * count)),
        Row("adamw", "update", 1, Cost((8 * GRADIENT + copy) * count)),
    ]
    return rows


def _blocks(model: ModelConfig, batch: int, length: int, half: int) -> Iterator[Row]:
    _, kv_heads, d_ff, _ = model.sizes()
    t, d, layers = batch * length, model.d_model, model.num_layers
    heads, size = model.num_heads, model.head_size
    x, wide, statistics = t * d * half, t * d_ff * half, 2 * GRADIENT * t
    norm = "layer_norm" if model.norm == "layer" else "rms_norm"
    scale = d * half * (2 if model.norm == "layer" and model.bias else 1)
    yield Row(
        norm, "before attention, and at the end", layers + 1, Cost(2 * x + statistics + scale)
    )
    yield Row(f"add_{norm}", "with the residual", layers, Cost(4 * x + statistics + scale))
    gradients = (2 if model.norm == "layer" else 1) * GRADIENT * d
    backward = 3 * x + statistics + d * half + gradients
    yield Row(f"{norm}_backward", "at the end", 1, Cost(backward))
    yield Row(f"{norm}_backward", "with the residual", 2 * layers, Cost(backward + x))
    vectors = (2 * layers + 1) * [d] * (2 if model.norm == "layer" and model.bias else 1)
    names = ["qkv", "out", "up", *(["gate"] if model.activation == "swiglu" else []), "down"]
    for name, (d_in, d_out) in zip(names, model.linears(), strict=True):
        ends, weight = t * (d_in + d_out) * half, d_in * d_out
        flops = 2.0 * t * weight
        bias = d_out * half if model.bias else 0
        yield Row("linear", name, layers, Cost(ends + weight * half + bias, flops))
        yield Row("matmul", f"{name}, backward", layers, Cost(ends + weight * half, flops))
        yield Row("add_product", name, layers, Cost(ends + 2 * GRADIENT * weight, flops))
        if model.bias:
            vectors += layers * [d_out]
            yield Row(
                "sum_rows", f"{name}, bias", layers, Cost(t * d_out * half + GRADIENT * d_out)
            )
    average = Cost(3 * GRADIENT * sum(vectors) / len(vectors))
    yield Row("add_to", "gradients of vectors", len(vectors), average)
    yield Row("add_to", "residual", layers, Cost(3 * x))
    packed, o, lse = (
        t * (heads + 2 * kv_heads) * size * half,
        t * heads * size * half,
        GRADIENT * t * heads,
    )
    # multiplications and additions of one product, up to the diagonal
    products = batch * heads * length * (length + 1) * size
    yield Row("attention", "forward", layers, Cost(packed + o + lse, 2.0 * products))
    yield Row("attention_backward", "", layers, Cost(2 * packed + 2 * o + lse, 5.0 * products))
    if model.position == "rotary":
        turned = t * (heads + kv_heads) * size * half
        tables = length * size * GRADIENT
        yield Row("rotary", "queries and keys, and back", 2 * layers, Cost(2 * turned + tables))
    if model.activation == "swiglu":
        yield Row("swiglu", "", layers, Cost(3 * wide))
        yield Row("swiglu_backward", "", layers, Cost(5 * wide))
        yield Row("add_to", "gradients of gate and up", layers, Cost(3 * x))
    else:
        yield Row(str(model.activation), "", layers, Cost(2 * wide))
        yield Row(f"{model.activation}_backward", "", layers, Cost(3 * wide))


def of_call(
    name: str, function: Any, arguments: tuple[Any, ...], named: dict[str, Any], result: Any
) -> Cost:
    """The cost of a call that has been made, from its arrays."""
    bound = inspect.signature(function).bind(*arguments, **named).arguments
    written, read_too = WRITTEN.get(name, ((), False))
    read: dict[Any, int] = {}
    for key, value in bound.items():
        for array in _arrays(value):
            if key not in written or read_too:
                read[_place(array)] = array.nbytes
    made = {_place(a): a.nbytes for key in written for a in _arrays(bound.get(key))}
    made |= {_place(a): a.nbytes for a in _arrays(result) if _place(a) not in read}
    nbytes = sum(read.values()) + sum(made.values())
    return Cost(*_adjusted(name, bound, result, nbytes))


def _adjusted(name: str, bound: dict[str, Any], result: Any, nbytes: float) -> tuple[float, float]:
    """Bytes and operations, where arrays alone do not tell."""
    first = next(iter(bound.values()))
    if name == "adamw":  # gradients become zero
        arrays = [bound[key] for key in ("weights", "gradient", "exp_avg", "exp_avg_sq")]
        return sum(2.0 * x.nbytes for x in arrays) + sum(
            x.nbytes for x in _arrays(bound["copy"])
        ), 0.0
    if name in ("linear", "matmul"):
        a, b = list(bound.values())[:2]
        return nbytes, 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    if name == "add_product":
        return nbytes, 2.0 * bound["x"].shape[0] * math.prod(bound["total"].shape)
    if name == "attention":
        batch, queries, kv_heads, group, size = first.shape
        length = bound["k"].shape[1]
        # each query sees the keys up to its own position
        pairs = batch * kv_heads * group * queries * (length - (queries - 1) / 2)
        return nbytes, 4.0 * pairs * size
    if name == "attention_backward":
        batch, length, kv_heads, group, size = bound["q"].shape
        return nbytes, 5.0 * batch * kv_heads * group * length * (length + 1) * size
    if name == "embedding":
        return 2.0 * result.nbytes + bound["ids"].nbytes, 0.0
    if name == "embedding_backward":
        rows = min(len(bound["ids"]), len(bound["dtable"]))
        row = bound["dtable"].nbytes / len(bound["dtable"])
        return first.nbytes + bound["ids"].nbytes + 2 * rows * row, 0.0
    if name.endswith("_backward") and name[: -len("_backward")] in ("gelu", "gelu_exact", "relu"):
        return 3.0 * first.nbytes, 0.0  # dx may be written over dy
    if name.startswith("add_") and name.endswith("_norm"):
        return nbytes + first.nbytes, 0.0  # the sum is written over delta
    return nbytes, 0.0


def _arrays(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _arrays(part)
    elif hasattr(value, "nbytes") and hasattr(value, "data"):
        yield value


def _place(array: Any) -> Any:
    """Where an array lies: a view of part of it is another one."""
    data = array.data
    return getattr(data, "ptr", id(data)), array.nbytes


def together(rows: list[Row]) -> list[Row]:
    """Equal operations as one row; what they are for is left out. Costs are those of an average call."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.operation, []).append(row)
    return [
        Row(
            name,
            "",
            calls,
            Cost(*(sum(r.calls * r.cost[i] for r in same) / calls for i in range(2))),
        )
        for name, same in found.items()
        for calls in [sum(r.calls for r in same)]
    ]


def table(rows: list[Row], bandwidth: float = BANDWIDTH, rate: float = RATE) -> str:
    """A step's operations, the longest first, and their sums."""
    seconds = {
        name: [
            sum(
                row.calls * row.cost.seconds(bandwidth, rate)
                for row in rows
                if row.operation == name
            ),
            sum(row.expected(bandwidth, rate) for row in rows if row.operation == name),
        ]
        for name in dict.fromkeys(row.operation for row in rows)
    }
    total = [sum(column) for column in zip(*seconds.values(), strict=True)]
    lines = [
        _cells(row.operation, row.calls, row.calls * row.cost.nbytes, row.calls * row.cost.flops,
               *seconds[row.operation], total[1])
        for row in sorted(together(rows), key=lambda row: -seconds[row.operation][1])
    ]  # fmt: skip
    sums = [sum(row.calls * row.cost[i] for row in rows) for i in range(2)]
    header = ("operation", "calls", "GB", "TFLOP", "floor, ms", "expected, ms", "share")
    return markdown(header, [*lines, _cells("all", "", *sums, *total, total[1])])


def _cells(
    name: str,
    calls: int | str,
    nbytes: float,
    flops: float,
    floor: float,
    expected: float,
    all_: float,
) -> tuple[str, ...]:
    return (
        f"`{name}`" if calls else name,
        str(calls),
        f"{nbytes / 1e9:.2f}",
        f"{flops / 1e12:.2f}" if flops else "",
        f"{floor * 1e3:.2f}",
        f"{expected * 1e3:.2f}",
        f"{expected / all_:.1%}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="such as gpt2-124m")
    parser.add_argument("--micro-batch", type=int, required=True, help="sequences")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes per second")
    parser.add_argument("--rate", type=float, default=RATE, help="operations per second")
    arguments = parser.parse_args()
    config = load_config(preset=arguments.preset)
    length = config.train.sequence_length
    model = resolve_model(config.model, None, length)
    rows = step(model, arguments.micro_batch, length)
    print(table(rows, arguments.bandwidth, arguments.rate))


if __name__ == "__main__":
    main()
