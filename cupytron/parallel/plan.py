"""Which layers are cut over the tensor axis, by name; and the order in which a model is put together.

recompute -> tensor -> pipeline stage -> ZeRO: layers are replaced before anything is allocated.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from cupytron.comm import ParallelContext
from cupytron.config import ModelConfig, RunConfig, require_mesh
from cupytron.config_checks import divisors
from cupytron.errors import ConfigError, CupytronError
from cupytron.layer import Layer, Parameter
from cupytron.model import Transformer
from cupytron.nn import (
    MLP,
    Attention,
    Dropout,
    Embedding,
    Head,
    LearnedPositions,
    Linear,
    SinusoidalPositions,
    SwiGLU,
)
from cupytron.parallel.pipeline import Pipeline
from cupytron.parallel.schedules import placement_of
from cupytron.parallel.stages import divide
from cupytron.parallel.tensor import (
    MISPLACED,
    ColumnLinear,
    Entry,
    Region,
    RowLinear,
    SequenceRegion,
    VocabularyEmbedding,
    VocabularyHead,
)
from cupytron.parallel.zero import Zero


def parallelize(
    model: Layer,
    context: ParallelContext,
    *,
    column: Sequence[str] = (),
    row: Sequence[str] = (),
    vocabulary: Sequence[str] = (),
    sequence_parallel: bool = False,
    keep_gathered: bool = False,
) -> None:
    """Cut a model's layers over context.tp, in place, before it is materialised.

    With a tensor axis of one rank the arguments are checked, and nothing is changed.

    Args:
        model: made of the library's layers.
        context: the mesh.
        column: patterns of the names of Linear layers whose outputs are cut, such as "*.up".
        row: of those whose inputs are cut, such as "*.down".
        vocabulary: of Embedding and Head layers, whose rows are cut.
        sequence_parallel: cut the tokens between tensor-parallel regions, too.
        keep_gathered: under sequence parallelism keep the inputs of column layers gathered for backward:
            4/5 of the bytes sent, more memory.

    A row-parallel layer has to come behind a column-parallel one, with nothing between them that mixes
    features. Under sequence parallelism every layer outside of these has to be `per_token`.

    Raises:
        CupytronError: a pattern matches no such layer, a size that tp does not divide, half of an
            Attention, MLP or SwiGLU, or a layer that sequence parallelism would break.
    """
    column, row, vocabulary = (
        [patterns] if isinstance(patterns, str) else patterns
        for patterns in (column, row, vocabulary)
    )
    model.name_parts()
    layers = dict(model.named_layers())
    wanted = {
        "column": _match(layers, "column", column, (Linear,)),
        "row": _match(layers, "row", row, (Linear,)),
        "vocabulary": _match(layers, "vocabulary", vocabulary, (Embedding, Head)),
    }
    if both := wanted["column"] & wanted["row"]:
        raise CupytronError(f"{sorted(both)[0]} is matched by column and by row patterns")
    tp = context.tp
    _check_pairs(layers, wanted, sequence_parallel)
    _check_sizes(layers, wanted, tp.size)
    if tp.size == 1:
        return

    region = SequenceRegion(tp) if sequence_parallel else Region(tp)
    entries = _entries(wanted["column"], region, keep_gathered)

    def change(name: str, layer: Any) -> Layer:
        if name in wanted["column"]:
            layer.weight.shard(1, tp.rank, tp.size)
            if layer.bias:
                layer.bias.shard(0, tp.rank, tp.size)
            return ColumnLinear(layer.weight, layer.bias, entries[_parent(name)])
        if name in wanted["row"]:
            layer.weight.shard(0, tp.rank, tp.size)
            return RowLinear(layer.weight, layer.bias, region)
        if name in wanted["vocabulary"]:
            layer.weight.shard(0, tp.rank, tp.size)
            if isinstance(layer, Embedding):
                return VocabularyEmbedding(layer.weight, region)
            return VocabularyHead(layer.weight, Entry(region, 1, keep_gathered))
        if isinstance(layer, Linear):
            layer.of_a_mesh = MISPLACED
        return layer

    model.replace(change)
    for layer in layers.values():
        if isinstance(layer, Attention) and isinstance(layer.qkv, ColumnLinear):
            layer.first_head = tp.rank * layer.num_heads // tp.size
    if sequence_parallel:
        for layer in layers.values():
            if isinstance(layer, Dropout | LearnedPositions | SinusoidalPositions):
                layer.token_shard = tp.rank
        for _, parameter in model.named_parameters():
            # what is not cut works on a share of the tokens
            parameter.partial = parameter.whole
    model.name_parts()


def build(
    config: RunConfig, model: ModelConfig, context: ParallelContext, training: bool = True
) -> tuple[Transformer, Zero]:
    """A run's model on the mesh, not materialised.

    Args:
        config: the run's settings. model: resolved (config.resolve_model).
        training: with gradients.

    Raises:
        ConfigError: the model or the batch does not fit the mesh.
    """
    parallel = config.parallel
    if training:
        require_mesh(config, **context.sizes)
    else:  # forward only: as simple as can be
        parallel = parallel.model_copy(update={"schedule": "1f1b", "chunks": None, "split": None})
    transformer = Transformer(model)  # with Recompute inside, where the settings say so
    parallelize(
        transformer,
        context,
        **transformer_plan(transformer),
        sequence_parallel=parallel.sp and training,
        keep_gathered=parallel.sp_keep_gathered,
    )
    placement = placement_of(parallel.schedule, context.pp.size, parallel.chunks)
    counts = divide(
        transformer, placement.parts, config.train.sequence_length, parallel.blocks_of_parts
    )
    pipeline = Pipeline(
        transformer,
        context.pp,
        context.ends,
        parallel.schedule,
        parallel.chunks,
        counts,
        context.device,
    )
    deterministic = config.train.deterministic and training
    zero = Zero(transformer, context, parallel.zero, deterministic, training, pipeline)
    return transformer, zero


def transformer_plan(model: Transformer) -> dict[str, list[str]]:
    """The patterns for parallelize that fit a Transformer."""
    gate = ["*.mlp.gate"] if model.config.activation == "swiglu" else []
    return {
        "column": ["*.attention.qkv", "*.mlp.up", *gate],
        "row": ["*.attention.out", "*.mlp.down"],
        "vocabulary": ["embedding", "head"],
    }


def _match(
    layers: dict[str, Layer], role: str, patterns: Iterable[str], kinds: tuple[type, ...]
) -> set[str]:
    names = {name for name, layer in layers.items() if isinstance(layer, kinds)}
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            kind = " or ".join(k.__name__ for k in kinds)
            some = ", ".join(sorted(names)[:8])
            raise CupytronError(
                f"{role} pattern {pattern!r} matches no {kind} layer; there are: {some or 'none'}"
            )
        found |= matched
    return found


def _entries(column: set[str], region: Region, keep: bool) -> dict[str, Entry]:
    """One entry for the column layers of each parent."""
    parents = [_parent(name) for name in column]
    return {parent: Entry(region, parents.count(parent), keep) for parent in set(parents)}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _child(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


# in these layers of the library, the first ones feed the last one
_PAIRS: dict[type, tuple[tuple[str, ...], str]] = {
    Attention: (("qkv",), "out"),
    MLP: (("up",), "down"),
    SwiGLU: (("gate", "up"), "down"),
}


def _check_pairs(layers: dict[str, Layer], wanted: dict[str, set[str]], sp: bool) -> None:
    for name, layer in layers.items():
        if type(layer) in _PAIRS:
            ins, out = _PAIRS[type(layer)]
            cut = [_child(name, part) in wanted["column"] for part in ins]
            cut.append(_child(name, out) in wanted["row"])
            if any(cut) and not all(cut):
                raise CupytronError(
                    f"{name}: {', '.join(ins)} and {out} belong together; match the first with column "
                    "patterns and the last with row patterns, or none of them"
                )
            if any(cut) and isinstance(layer, Attention):
                continue  # it gets whole sequences
        if sp and not layer.per_token:
            raise CupytronError(
                f"{name or 'the model'}: {type(layer).__name__} may need whole sequences, and sequence "
                "parallelism cuts them; an Attention's qkv has to match a column pattern and its out a "
                "row pattern, and a layer of your own has to say per_token = True, if that is so"
            )
        if sp and isinstance(layer, Embedding | Head) and name not in wanted["vocabulary"]:
            raise CupytronError(
                f"{name}: sequence parallelism needs it cut; match it with a vocabulary pattern"
            )
    shared: dict[int, list[str]] = {}
    for name, layer in layers.items():
        for _, part in layer.parts():
            if isinstance(part, Parameter):
                shared.setdefault(id(part), []).append(name)
    for names in shared.values():
        if len({name in wanted["vocabulary"] for name in names}) > 1:
            raise CupytronError(
                f"{' and '.join(names)} share a table; match both with vocabulary patterns, or none"
            )


def _check_sizes(layers: dict[str, Layer], wanted: dict[str, set[str]], tp: int) -> None:
    for name, layer in layers.items():
        if isinstance(layer, Attention) and _child(name, "qkv") in wanted["column"]:
            # a shard holds whole groups of queries with their key and value
            _check_divides(f"{name}: num_kv_heads", layer.num_kv_heads, tp)
    for name in sorted(wanted["column"] | wanted["row"]):
        linear: Any = layers[name]
        d_in, d_out = linear.weight.shape
        if name in wanted["column"]:
            _check_divides(f"{name}: output width", d_out, tp)
        else:
            _check_divides(f"{name}: input width", d_in, tp)


def _check_divides(what: str, number: int, tp: int) -> None:
    if number % tp:
        fits = ", ".join(map(str, divisors(number)))
        raise ConfigError(f"{what}={number} is not divisible by tp={tp}; choose tp from {fits}")
