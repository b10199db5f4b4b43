"""Single kernels: bytes per second beside a copy's, operations per second beside a large product's."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gpu_children import Json
from gpu_costs import ATTENTION, of_call
from gpu_report import Gpu, markdown
from gpu_timing import BFLOAT16, ceilings, random, sets_for, time_calls

TARGET = 0.8  # of a copy's bandwidth
# tokens, width, MLP width, vocabulary; sequences, length, KV heads, query heads of each, head size
GPT2 = {"t": 32768, "d": 768, "f": 3072, "v": 50304, "heads": (32, 1024, 12, 1, 64)}
LLAMA = {"t": 16384, "d": 2048, "f": 8192, "v": 128256, "heads": (8, 2048, 8, 4, 64)}
CHARACTERS = (64, 256, 6, 1, 64)  # heads of the preset shakespeare-char, with dropout
TINY: dict[str, Any] = {"t": 16, "d": 16, "f": 32, "v": 24, "heads": (1, 16, 1, 2, 8)}


class Case(NamedTuple):
    """A kernel and what it is called with.

    make: number of a set -> arguments, keyword arguments; sets have arrays of their own.
    nbytes: of a set, about: several of them have to exceed the cache.
    """

    operation: str
    function: Callable[..., Any]
    make: Callable[[int], tuple[tuple[Any, ...], Json]]
    nbytes: int


def measure(gpu: Gpu, case: Case) -> Json:
    """Seconds of a call, its bytes and operations, and whether it was timed in a graph."""
    inputs = [case.make(i) for i in range(gpu.size(sets_for(case.nbytes), 2))]
    arguments, named = inputs[0]
    result = case.function(*arguments, **named)
    cost = of_call(case.operation, case.function, arguments, named, result)
    del result
    refused = _refusal(case, arguments)
    calls = [functools.partial(case.function, *args, **more) for args, more in inputs]
    timed = time_calls(gpu, calls, rounds=gpu.size(7, 1))
    found = {"bytes": cost.nbytes, "flops": cost.flops, "sets": len(calls), **timed._asdict()}
    return {**found, "refused": refused} if refused else found


def _refusal(case: Case, arguments: tuple[Any, ...]) -> str | None:
    """Why cuDNN does not do an attention, so that our own kernel is measured; None if it does."""
    if case.operation not in ATTENTION:
        return None
    from cupytron.kernels import cudnn_attention

    forward = case.operation == "attention"
    q, k, v = arguments[:3] if forward else arguments[1:4]
    dropout = arguments[3:4] if forward else arguments[7:8]
    return cudnn_attention.supports(q, k, v, *dropout)


def cases(gpu: Gpu) -> dict[str, Case]:
    """All kernels of training, on the shapes of GPT-2 124M and of a Llama of 1B."""
    from cupytron.kernels import table

    gpt2, llama = gpu.size(GPT2, TINY), gpu.size(LLAMA, TINY)
    ops = {**table()} if gpu.cupy is not None else {}
    made = _Maker(gpu, ops)
    found = {
        **made.elementwise(gpt2, llama),
        **made.norms("layer_norm", gpt2),
        **made.norms("rms_norm", llama),
        **made.tables(gpt2),
        **made.updates(),
    }
    for model, shape in (("gpt2", gpt2), ("llama", llama)):
        found |= made.products(model, shape) | made.attention(model, shape["heads"])
    return found | made.attention("dropout,", gpu.size(CHARACTERS, TINY["heads"]), 0.2)


class _Maker:
    """Cases by name; functions are looked up in the table of kernels."""

    def __init__(self, gpu: Gpu, ops: dict[str, Any]) -> None:
        self.gpu, self.ops = gpu, ops

    def _random(self, *shape: int, dtype: Any = BFLOAT16, seed: int = 0) -> Any:
        return random(self.gpu, shape, dtype, seed=seed)

    def _number(self, value: float) -> Any:
        """As training has it: on the device, where a graph reads it anew."""
        return self.gpu.cupy.full((), value, np.int64 if isinstance(value, int) else np.float64)

    def _case(self, operation: str, make: Callable[[int], tuple[Any, ...]], nbytes: int) -> Case:
        return Case(operation, self.ops.get(operation), lambda i: (make(i), {}), nbytes)

    def elementwise(self, gpt2: Json, llama: Json) -> dict[str, Case]:
        t, d, f = gpt2["t"], gpt2["d"], gpt2["f"]
        x = functools.partial(self._random, t, f)
        wide = functools.partial(self._random, llama["t"], llama["f"])
        residual = functools.partial(self._random, t, d)
        size, large = 2 * t * f, 2 * llama["t"] * llama["f"]
        found = {}
        for name in ("gelu", "gelu_exact", "relu"):
            found[name] = self._case(name, lambda i: (x(),), 2 * size)
            found[f"{name}_backward"] = self._case(
                f"{name}_backward", lambda i: (x(), x(seed=1)), 2 * size
            )
        found["swiglu"] = self._case("swiglu", lambda i: (wide(), wide(seed=1)), 3 * large)
        found["swiglu_backward"] = self._case(
            "swiglu_backward", lambda i: (wide(), wide(seed=1), wide(seed=2)), 5 * large
        )
        found["add_to"] = self._case("add_to", lambda i: (residual(), residual(seed=1)), 4 * t * d)
        found["add_to, float32"] = self._case(
            "add_to", lambda i: (residual(dtype=np.float32), residual(seed=1)), 6 * t * d
        )
        found["sum_rows"] = self._case("sum_rows", lambda i: (x(),), size)
        found["dropout"] = self._case(
            "dropout",
            lambda i: (residual(), 0.2, (1, 2), self._number(3), self._number(4)),
            5 * t * d,
        )
        found["dropout_backward"] = self._case(
            "dropout_backward", lambda i: (residual(), self._mask(t, d), 0.2), 5 * t * d
        )
        batch, length, kv_heads, group, size_of_head = llama["heads"]
        packed = (batch, length, kv_heads, group + 2, size_of_head)
        found["rotary"] = self._case(
            "rotary",
            lambda i: (
                self._random(*packed)[..., : group + 1, :],
                self._random(length, size_of_head // 2, dtype=np.float32),
                self._random(length, size_of_head // 2, dtype=np.float32),
            ),
            2 * int(np.prod(packed)),
        )
        return found

    def _mask(self, *shape: int) -> Any:
        return self._random(*shape, dtype=np.float32) > 0

    def norms(self, name: str, shape: Json) -> dict[str, Case]:
        t, d = shape["t"], shape["d"]
        x = functools.partial(self._random, t, d)
        after = (self._random(d, seed=3), 1e-5) if self.gpu.cupy else ()
        if name == "layer_norm" and after:
            after = (after[0], self._random(d, seed=4), after[1])

        def backward(i: int) -> tuple[Any, ...]:
            _, saved = self.ops[name](x(), *after)
            return x(seed=1), saved, after[0], x(seed=2)

        return {
            name: self._case(name, lambda i: (x(), *after), 4 * t * d),
            f"add_{name}": self._case(f"add_{name}", lambda i: (x(), x(seed=1), *after), 8 * t * d),
            f"{name}_backward": self._case(f"{name}_backward", backward, 8 * t * d),
        }

    def tables(self, shape: Json) -> dict[str, Case]:
        t, d, v = shape["t"], shape["d"], shape["v"]
        rows = max(1, t // 4)

        def ids(i: int, count: int) -> Any:
            return self.gpu.cupy.asarray(np.random.default_rng(i).integers(0, v, count))

        return {
            "embedding": self._case(
                "embedding", lambda i: (ids(i, t), self._random(v, d)), 4 * t * d
            ),
            "embedding_backward": self._case(
                "embedding_backward",
                lambda i: (self._random(t, d), ids(i, t), self.gpu.cupy.zeros((v, d), np.float32)),
                2 * t * d + 8 * v * d,
            ),
            "cross_entropy": self._case(
                "cross_entropy",
                lambda i: (self._random(rows, v), ids(i, rows), self._number(1e-3)),
                2 * rows * v,
            ),
        }

    def updates(self) -> dict[str, Case]:
        from cupytron.kernels import optimizer

        count = self.gpu.size(124_475_904, 64)

        def flat(dtype: Any = np.float32, seed: int = 0) -> Any:
            return self._random(count, dtype=dtype, seed=seed)

        def state(i: int) -> tuple[tuple[Any, ...], Json]:
            control = optimizer.new_control(1.0, 1.0)
            arrays = flat(), flat(BFLOAT16), flat(seed=1), flat(seed=2), abs(flat(seed=3))
            return (*arrays, count // 2, control, 0.9, 0.95, 1e-8, 0.1), {}

        return {
            "adamw": Case("adamw", optimizer.adamw, state, 34 * count),
            "squares": Case("squares", optimizer.squares, lambda i: ((flat(), 1), {}), 4 * count),
        }

    def products(self, model: str, shape: Json) -> dict[str, Case]:
        found = {}
        for name, (t, d_in, d_out) in product_shapes(shape).items():
            x = functools.partial(self._random, t, d_in)
            dy = functools.partial(self._random, t, d_out, seed=1)
            weight = functools.partial(self._random, d_in, d_out, seed=2)
            nbytes = 2 * (t * (d_in + d_out) + d_in * d_out)
            found[f"{model} {name}"] = self._case("linear", _pair(x, weight), nbytes)
            found[f"{model} {name}, backward"] = self._case(
                "matmul", _transposed(dy, weight), nbytes
            )
            found[f"{model} {name}, weight"] = self._case(
                "add_product", _gradient(self.gpu, x, dy, d_in, d_out), nbytes
            )
        return found

    def attention(self, model: str, heads: Any, dropout: float = 0.0) -> dict[str, Case]:
        from cupytron.ops import AttentionDropout

        batch, length, kv_heads, group, size = heads
        packed = (batch, length, kv_heads, group + 2, size)
        out = (batch, length, kv_heads, group, size)
        nbytes = 2 * int(np.prod(packed))

        def drops() -> tuple[Any, ...]:
            numbers = (self._number(3), self._number(4)) if dropout else ()
            return (AttentionDropout(dropout, (1, 2), *numbers, 0),) if dropout else ()

        def views(i: int) -> tuple[Any, ...]:
            return *parts(self._random(*packed, seed=i)), *drops()

        def backward(i: int) -> tuple[Any, ...]:
            q, k, v = views(i)[:3]
            last = drops()
            o, lse = self.ops["attention"](q, k, v, *last)
            into = parts(self.gpu.cupy.empty(packed, BFLOAT16))
            return self._random(*out, seed=9), q, k, v, o, lse, into, *last

        return {
            f"{model} attention": self._case("attention", views, nbytes),
            f"{model} attention, backward": self._case("attention_backward", backward, 3 * nbytes),
        }


def parts(packed: Any) -> tuple[Any, Any, Any]:
    """q, k, v of (B, S, N_kv, G + 2, H)."""
    return packed[..., :-2, :], packed[..., -2, :], packed[..., -1, :]


def product_shapes(shape: Json) -> dict[str, tuple[int, int, int]]:
    """(tokens, features in, features out) of a model's linear layers and head."""
    t, d, f = shape["t"], shape["d"], shape["f"]
    _, _, kv_heads, group, size = shape["heads"]
    return {
        "qkv": (t, d, kv_heads * (group + 2) * size),
        "out": (t, kv_heads * group * size, d),
        "up": (t, d, f),
        "down": (t, f, d),
        "head": (max(1, t // 4), d, shape["v"]),
    }


def _pair(x: Callable[[], Any], weight: Callable[[], Any]) -> Callable[[int], tuple[Any, ...]]:
    return lambda i: (x(), weight())


def _transposed(
    dy: Callable[[], Any], weight: Callable[[], Any]
) -> Callable[[int], tuple[Any, ...]]:
    return lambda i: (dy(), weight().T)


def _gradient(
    gpu: Gpu, x: Callable[[], Any], dy: Callable[[], Any], d_in: int, d_out: int
) -> Callable[[int], tuple[Any, ...]]:
    return lambda i: (gpu.cupy.zeros((d_in, d_out), np.float32), x(), dy())


def checks(gpu: Gpu) -> dict[str, Callable[[], Json]]:
    """For gpu_children: the ceilings, then each kernel."""
    found: dict[str, Callable[[], Json]] = {"ceilings": lambda: ceilings(gpu)._asdict()}
    for name, case in cases(gpu).items():
        found[name] = functools.partial(measure, gpu, case)
    return found


def table(outcomes: Json) -> str:
    """Times, and shares of the ceilings; a kernel below the target, or not timed in a graph, is marked."""
    limits = outcomes["ceilings"]["found"]
    rows = []
    for name, outcome in outcomes.items():
        found = outcome["found"]
        if name == "ceilings":
            continue
        if outcome["status"] != "ok":
            rows.append((name, "failed", "", "", "", outcome.get("why", "")[:60]))
            continue
        seconds = found["seconds"]
        bandwidth, rate = found["bytes"] / seconds, found["flops"] / seconds
        share = max(bandwidth / limits["bandwidth"], rate / limits["rate"])
        found |= {"of_bandwidth": bandwidth / limits["bandwidth"], "of_rate": rate / limits["rate"]}
        marks = ["below target"] if not found["flops"] and share < TARGET else []
        marks += ["not in a graph"] if found["how"] != "graph" else []
        marks += [f"our own kernel: {found['refused'][:60]}"] if "refused" in found else []
        rows.append(
            (
                name,
                f"{seconds * 1e6:.1f}",
                f"{bandwidth / 1e12:.2f}",
                f"{rate / 1e12:.0f}" if rate else "",
                f"{share:.0%}",
                ", ".join(marks),
            )
        )
    return markdown(("kernel", "us", "TB/s", "TFLOP/s", "of ceiling", ""), rows)
