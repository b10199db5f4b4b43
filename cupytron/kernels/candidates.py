"""What the autotuner chooses from, on a CPU and on a GPU, and when it may."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from cupytron import backend, ops
from cupytron.kernels.autotune import RuntimeAutoTuner
from cupytron.kernels.operation import Function, Functions
from cupytron.ops.half import in_float32

# parameters that operations write into
_WRITES = {
    "matmul": ("out",),
    "add_product": ("total",),
    "add_to": ("total",),
    "rotary": ("x",),
    "attention_backward": ("out",),
    "cross_entropy": ("logits",),
    "shard_exponentials": ("logits",),
    "shard_cross_entropy": ("exponentials",),
    "embedding_backward": ("dtable",),
}
_ACTIVATIONS = ("gelu", "gelu_exact", "relu")
_NORMS = ("layer_norm", "rms_norm")
_ONE_HOT_AT_MOST = 1 << 22  # elements of a one-hot matrix that is worth trying
_LABELS = {"products": "cublaslt"}
# where there are more kernels than the one in the table: candidate -> module
_KERNELS = {
    "attention": {"cudnn": "cudnn_attention", "cuda": "attention"},
    "attention_backward": {"cudnn": "cudnn_attention", "cuda": "attention"},
}


def allowed(config: Any) -> bool:
    """Whether a run may use choices at all: not where the same bits have to come out everywhere.

    Args:
        config: the run's settings.
    """
    return config.parallel.autotune == "on" and not config.train.deterministic


def start(config: Any, world: Any = None, device: Any = backend.CPU) -> RuntimeAutoTuner | None:
    """The choices for a run, in the places of the functions in ops; None: it has the defaults.

    Collective over `world`, between opening the device and the first step. Rank 0 reads the table that
    earlier runs have left. On a GPU the run's first step belongs inside the tuner's `tuning`. On a CPU
    nothing is tried in a run: `cupytron autotune` has to be asked for what may change a run's last bits.

    Args:
        config: the run's settings. world: all ranks; None: this process alone.
        device: where the rank computes.
    """
    if not allowed(config):
        if device.gpu and (products := _optional("products")):
            products.set_timing(False)
        return None
    tuner = make(config, device)
    if world is None or world.rank == 0:
        tuner.load()
    tuner.synchronise(world)
    if not device.gpu and not tuner.choices():
        return None
    install(tuner)
    return tuner


def make(config: Any = None, device: Any = backend.CPU) -> RuntimeAutoTuner:
    """A tuner that knows the device's candidates, and nothing of their times.

    On a GPU its kernels have taken their places in ops before.
    """
    graphs = device.gpu and (config is None or config.parallel.graphs)
    tf32 = device.gpu and config is not None and config.train.tf32
    tuner = RuntimeAutoTuner(graphs=graphs, tf32=tf32, device=device)
    if device.gpu:
        register_gpu(tuner)
    else:
        register_cpu(tuner)
    return tuner


def install(tuner: RuntimeAutoTuner) -> None:
    """Put the tuner's functions in their places in ops; those of others stay."""
    ops.use({**_installed(), **tuner.functions})


def _installed() -> dict[str, Function]:
    """The functions in ops, without the choice that an earlier tuner has put before them."""
    functions = {name: getattr(ops, name) for name in ops.REFERENCE}
    return {name: getattr(f, "untuned", f) for name, f in functions.items()}


def register_cpu(tuner: RuntimeAutoTuner) -> None:
    """Other ways to compute the reference: sizes of blocks, sums by BLAS or not."""
    reference = ops.REFERENCE
    by_sum = in_float32(_sum_over_rows, wide=(0,))
    tuner.wrap("sum_rows", {"product": reference["sum_rows"], "sum": by_sum}, "product")

    always, never = (variant("ops.embedding", _ONE_HOT_UP_TO=n) for n in (math.inf, -1))
    functions = {
        "by size": reference["embedding_backward"],
        "one-hot": in_float32(_limited(always.embedding_backward)),
        "sorted": in_float32(never.embedding_backward),
    }
    tuner.wrap("embedding_backward", functions, "by size", writes=("dtable",))

    size = variant("ops.attention").QUERY_BLOCK
    usual = f"queries {size}"
    blocks = {n: variant("ops.attention", QUERY_BLOCK=n) for n in (size // 2, size * 2)}
    for name, written, wide in (("attention", "", (1,)), ("attention_backward", "out", ())):
        functions = {usual: reference[name]}
        for n, module in blocks.items():
            functions[f"queries {n}"] = in_float32(getattr(module, name), written, wide)
        tuner.wrap(name, functions, usual, writes=_WRITES.get(name, ()))

    size = backend.BLOCK
    usual = f"slices {size}"
    slices = {n: variant("backend", BLOCK=n) for n in (size // 2, size * 2, size * 4)}
    for name, file, written in (
        ("gelu", "activation", ""),
        ("gelu_exact", "activation", ""),
        ("cross_entropy", "cross_entropy", "logits"),
    ):
        functions = {usual: reference[name]}
        for n, other in slices.items():
            function = getattr(variant(f"ops.{file}", backend=other), name)
            functions[f"slices {n}"] = in_float32(function, written)
        tuner.wrap(name, functions, usual, writes=_WRITES.get(name, ()))


def _sum_over_rows(dy: Any) -> Any:
    return dy.sum(axis=0)


def _limited(function: Function) -> Function:
    """embedding_backward, where the one-hot matrix has a reasonable size."""

    @functools.wraps(function)
    def limited(dy: Any, ids: Any, dtable: Any, first: int | None = None) -> None:
        if len(ids) * len(dtable) > _ONE_HOT_AT_MOST:
            raise ValueError(
                f"a one-hot matrix of {len(ids)}x{len(dtable)} is too large to be worth it"
            )
        function(dy, ids, dtable, first)

    return limited


@functools.cache
def variant(name: str, **constants: Any) -> ModuleType:
    """A second copy of a module of cupytron in which some names have other values.

    So the same code is a candidate with another block size, and what ranks in other threads are running
    stays as it is.
    """
    found = importlib.util.find_spec(f"cupytron.{name}")
    assert found is not None and found.loader is not None, name
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for constant, value in constants.items():
        assert hasattr(module, constant), f"cupytron.{name} has no {constant}"
        setattr(module, constant, value)
    return module


def register_gpu(tuner: RuntimeAutoTuner) -> None:
    """The kernels in ops, what there is besides these, and the reference on CuPy."""
    installed = _installed()
    together = {f"{name}_backward" for name in _ACTIVATIONS + _NORMS}
    together |= {f"add_{name}" for name in _NORMS}
    for name in _ACTIVATIONS:
        members = {name: _all, f"{name}_backward": None}
        _wrap_pair(tuner, name, members, installed, _activation)
    for name in _NORMS:
        members = {name: _all, f"add_{name}": _without_delta, f"{name}_backward": None}
        _wrap_pair(tuner, name, members, installed, _norm)
    for name, reference in ops.REFERENCE.items():
        if name in together or name in _ACTIVATIONS + _NORMS or installed[name] is reference:
            continue
        candidates = {label: _loaded(file, name) for label, file in _KERNELS.get(name, {}).items()}
        default = next((n for n, f in candidates.items() if f is installed[name]), None)
        if default is None:
            default = "usual" if candidates else _label(installed[name])
            candidates = {default: installed[name], **candidates}
        candidates["reference"] = reference
        tuner.wrap(name, candidates, default, reference, _WRITES.get(name, ()))
    for name in tuner.functions.keys() & {"attention", "attention_backward"}:
        tuner.functions[name] = _chosen_without_dropout(tuner.functions[name], installed[name])
    products = _optional("products")
    if products is not None:
        tuner.attach("products", products.choices, products.set_choices, products.set_timing)


def _chosen_without_dropout(tuned: Function, usual: Function) -> Function:
    """Attention that leaves dropout to the usual kernel: a library's mask cannot be compared with ours."""

    @functools.wraps(usual)
    def function(*arguments: Any, dropout: Any = None) -> Any:
        *others, last = arguments
        if isinstance(last, ops.AttentionDropout):
            arguments, dropout = tuple(others), last
        return tuned(*arguments) if dropout is None else usual(*arguments, dropout)

    function.default = usual  # type: ignore[attr-defined]
    return function


def _wrap_pair(
    tuner: RuntimeAutoTuner,
    name: str,
    members: dict[str, Callable[..., tuple[Any, ...]] | None],
    installed: dict[str, Function],
    attempt: Callable[..., Any],
) -> None:
    """Forward and backward of a kernel, or of the reference: the one reads what the other has saved."""
    kernels = tuple(installed[member] for member in members)
    reference = tuple(ops.REFERENCE[member] for member in members)
    if any(kernel is other for kernel, other in zip(kernels, reference, strict=True)):
        return
    label = _label(kernels[0])
    candidates = {label: kernels, "reference": reference}
    tuner.wrap_together(name, members, candidates, label, attempt, reference)


def _all(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def _without_delta(x: Any, delta: Any, *others: Any) -> tuple[Any, ...]:
    return x, *others


def _activation(functions: Functions, x: Any) -> Any:
    forward, backward = functions
    dy = x.copy()
    y, saved = forward(x)
    return y, backward(dy, saved)


def _norm(functions: Functions, x: Any, weight: Any, *others: Any) -> Any:
    forward, add_forward, backward = functions
    delta = x.copy()
    _, y, saved = add_forward(x, delta, weight, *others)
    again, _ = forward(x, weight, *others)
    return y, again, backward(y.copy(), saved, weight, x)


def _label(function: Function) -> str:
    module = getattr(function, "__module__", "").rpartition(".")[2]
    return _LABELS.get(module, "cuda")


def _loaded(module: str, name: str) -> Function:
    """A kernel, or a function that says why it cannot be had."""
    try:
        return getattr(importlib.import_module(f"cupytron.kernels.{module}"), name)
    except Exception as error:
        why = f"it cannot be loaded: {error}"

        @functools.wraps(ops.REFERENCE[name])
        def missing(*arguments: Any, **named: Any) -> Any:
            raise RuntimeError(why)

        return missing


def _optional(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"cupytron.kernels.{module}")
    except ImportError:
        return None
