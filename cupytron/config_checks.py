"""Every check of settings that are fine by themselves and not together, with its way out."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cupytron.config import ModelConfig, RunConfig

MOST_CHOICES = 9
MOST_REPLICAS = 64  # of deterministic training: a power of two, the leaves of its tree of sums

# parts of the model on each stage, by schedule; interleaved takes any other number, too
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}


class Problem(NamedTuple):
    """What is wrong, and the keys it is about; the message begins with the first of them."""

    keys: tuple[str, ...]
    message: str


def check_model(model: "ModelConfig") -> Iterator[Problem]:
    """Heads that do not divide the width, and the like."""
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.d_model
    position = model.position or ("rotary" if model.family == "llama" else "learned")
    if width % heads:
        yield Problem(
            ("model.num_heads", "model.d_model"),
            f"model.num_heads={heads}: does not divide model.d_model={width}; "
            f"choose num_heads from {_heads(model, position == 'rotary' and width % 2 == 0)}",
        )
    elif position == "rotary" and model.head_size % 2:
        way_out = "choose an even d_model"
        if width % 2 == 0:
            way_out = f"choose num_heads from {_heads(model, pairs=True)}"
        yield Problem(
            ("model.num_heads", "model.d_model", "model.position", "model.family"),
            f"model.num_heads={heads}: gives heads of odd size {model.head_size}, "
            f"and rotary positions need pairs; {way_out}",
        )
    if kv_heads is not None and heads % kv_heads:
        yield Problem(
            ("model.num_kv_heads", "model.num_heads"),
            f"model.num_kv_heads={kv_heads}: does not divide model.num_heads={heads}; "
            f"choose num_kv_heads from {_divisors(heads, kv_heads)}",
        )


def _heads(model: "ModelConfig", pairs: bool) -> str:
    """The numbers of heads that the rest of the model can have, as a list for a reader.

    Args:
        pairs: whether heads need an even size.
    """
    width, kv_heads = model.d_model, model.num_kv_heads or 1
    fits = [n for n in divisors(width // 2 if pairs else width) if n % kv_heads == 0]
    if not fits:
        return f"the divisors of d_model={width}, and leave out num_kv_heads={kv_heads}"
    return _nearest(fits, model.num_heads)


def check_run(config: "RunConfig") -> Iterator[Problem]:
    """Checks between sections; those within `model` are `check_model`'s."""
    train, optim, context = config.train, config.optim, config.model.context_length
    if config.global_batch % train.micro_batch:
        size = train.micro_batch * (config.parallel.dp or 1)
        below = config.global_batch // size * size
        choices = [str(b) for b in (below, below + size) if b]
        yield Problem(
            ("train.global_batch", "train.micro_batch"),
            f"train.global_batch={config.global_batch}: is not a multiple of "
            f"train.micro_batch={train.micro_batch}; choose {' or '.join(choices)}",
        )
    if context is not None and train.sequence_length > context:
        yield Problem(
            ("train.sequence_length", "model.context_length"),
            f"train.sequence_length={train.sequence_length}: is longer than "
            f"model.context_length={context}; shorten it or raise context_length",
        )
    if optim.min_lr is not None and optim.min_lr > optim.lr:
        yield Problem(
            ("optim.min_lr", "optim.lr"),
            f"optim.min_lr={optim.min_lr}: is more than optim.lr={optim.lr}; "
            "lower min_lr or raise lr",
        )
    if train.compute_dtype == "float64" and train.dtype != "float64":
        yield Problem(
            ("train.compute_dtype", "train.dtype"),
            f"train.compute_dtype=float64: is wider than train.dtype={train.dtype}; set train.dtype to "
            "float64 as well",
        )
    yield from _check_schedule(config)


def _check_schedule(config: "RunConfig") -> Iterator[Problem]:
    # a run shorter than its warm-up is fine: trying a preset for 20 steps should just work
    optim = config.optim
    decay, warmup = optim.decay_steps, optim.warmup_steps
    if optim.schedule in ("cosine", "linear") and decay is not None and decay < warmup:
        yield Problem(
            ("optim.decay_steps", "optim.warmup_steps", "optim.schedule"),
            f"optim.decay_steps={decay}: is before the end of optim.warmup_steps={warmup}; "
            f"set decay_steps to {warmup} or more",
        )


def check_mesh(config: "RunConfig", ranks: int | None = None) -> Iterator[Problem]:
    """What the mesh cannot be.

    Args:
        ranks: processes that there are; None: not known yet.
    """
    p, train, model = config.parallel, config.train, config.model
    dp = p.dp
    if ranks is not None:
        each = p.tp * p.pp  # ranks of a replica
        if ranks % each or (dp is not None and each * dp != ranks):
            yield Problem(("parallel.tp", "parallel.pp", "parallel.dp"), _misfit(config, ranks))
            return
        dp = ranks // each
    yield from _check_pipeline(config)
    heads = model.num_kv_heads or model.num_heads
    if heads % p.tp:
        # a tensor rank holds whole groups of queries with their key and value
        kind = "model.num_kv_heads" if model.num_kv_heads else "model.num_heads"
        choices = f"tp from {', '.join(map(str, divisors(heads)))}"
        if ranks is not None:
            fitting = _choices(config, ranks)
            choices = f"from {fitting}" if fitting else f"{choices}, and as many ranks as fit"
        yield Problem(
            ("parallel.tp", kind),
            f"parallel.tp={p.tp}: does not divide {kind}={heads}; choose {choices}",
        )
    tokens = train.micro_batch * train.sequence_length
    if p.sp and tokens % p.tp:
        yield Problem(
            ("parallel.sp", "parallel.tp", "train.micro_batch", "train.sequence_length"),
            f"parallel.sp=true: a micro-batch of {tokens} tokens is not divisible by tp={p.tp}; change "
            "train.micro_batch or train.sequence_length, or leave out sp",
        )
    if dp and config.micro_batches % dp:
        size = train.micro_batch * dp
        low = config.global_batch // size * size
        choices = " or ".join(str(n) for n in (low, low + size) if n)
        yield Problem(
            ("train.global_batch", "train.micro_batch", "parallel.dp"),
            f"train.global_batch={config.global_batch}: is not a multiple of "
            f"train.micro_batch={train.micro_batch} times dp={dp}; choose {choices}, or a smaller "
            "micro_batch",
        )
    if dp and train.deterministic and MOST_REPLICAS % dp:
        yield Problem(
            ("train.deterministic", "parallel.dp"),
            f"train.deterministic=true: dp={dp} replicas cannot be the levels of a binary tree; choose "
            f"dp from {', '.join(map(str, divisors(MOST_REPLICAS)))}, and start tp x pp x dp ranks",
        )


def _misfit(config: "RunConfig", ranks: int) -> str:
    """That the mesh does not fit the ranks, and what does."""
    p = config.parallel
    ways = [f"choose from {found}"] if (found := _choices(config, ranks)) else []
    batch = _batch_for(config, p.tp, p.pp, p.dp or 1)
    if batch is not None:
        more = f" with train.global_batch={batch}" if batch != config.global_batch else ""
        ways.append(f"start {p.ranks} ranks (mpirun -n {p.ranks}){more}")
    if not ways:
        fewer = range(ranks - 1, max(0, ranks - MOST_REPLICAS), -1)
        found, start = next(((c, n) for n in fewer if (c := _choices(config, n))), ("", 0))
        ways = [
            f"start {start} rank{'s' * (start > 1)}, which can be {found}"
            if found
            else "no mesh fits this model; change parallel.split, parallel.chunks or parallel.schedule"
        ]
    asked = _spell(config, p.tp, p.pp, p.dp).replace(" ", " x ")
    return (
        f"parallel.tp={p.tp}: {asked} does not fit {ranks} {'rank' if ranks == 1 else 'ranks'}; "
        f"{', or '.join(ways)}"
    )


def _spell(config: "RunConfig", tp: int, pp: int, dp: int | None) -> str:
    sizes = {
        "tp": tp,
        **({"pp": pp} if max(pp, config.parallel.pp) > 1 else {}),
        **({"dp": dp} if dp else {}),
    }
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _choices(config: "RunConfig", ranks: int) -> str:
    """The meshes of so many ranks that the model can have, and the batches that they need; empty if none.

    The stages that were asked for stay if they can.
    """
    asked = config.parallel.pp
    for stages in ([asked] if ranks % asked == 0 else [], divisors(ranks)):
        sizes = [(tp, pp, ranks // pp // tp) for pp in stages for tp in divisors(ranks // pp)]
        batches = {mesh: batch for mesh in sizes if (batch := _batch_for(config, *mesh))}
        if batches:
            break
    shown = list(batches)[: 2 * MOST_CHOICES]
    other = {dp: batches[tp, pp, dp] for tp, pp, dp in shown}
    needs = [
        f"dp={dp} needs train.global_batch={batch}"
        for dp, batch in other.items()
        if batch != config.global_batch
    ]
    return ", ".join(_spell(config, *mesh) for mesh in shown) + (
        f" ({', '.join(needs)})" if needs else ""
    )


def _batch_for(config: "RunConfig", tp: int, pp: int, dp: int) -> int | None:
    """The global batch with which the model fits a mesh: its own, or else the next; None if none does."""
    size = config.train.micro_batch * dp
    batch = -(-config.global_batch // size) * size
    changed = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"tp": tp, "pp": pp, "dp": dp}),
            "train": config.train.model_copy(update={"global_batch": batch}),
        }
    )
    return None if any(check_mesh(changed)) else batch


def _check_pipeline(config: "RunConfig") -> Iterator[Problem]:
    p, layers = config.parallel, config.model.num_layers
    fixed = CHUNKS[p.schedule]
    if p.chunks not in (None, fixed) and p.schedule != "interleaved":
        yield Problem(
            ("parallel.chunks", "parallel.schedule"),
            f"parallel.chunks={p.chunks}: {p.schedule} has {fixed} a stage; set parallel.schedule to "
            "interleaved, or leave out chunks",
        )
        return
    keys = ("parallel.pp", "parallel.chunks", "parallel.schedule", "model.num_layers")
    if p.parts > layers + 2:
        # the embedding and the head can have a part of their own
        yield Problem(
            keys,
            f"parallel.pp={p.pp}: {p.parts} parts (stages times chunks) are more than {layers} blocks, "
            "the embedding and the head; use fewer, a parallel.schedule without chunks, or more "
            "model.num_layers",
        )
    if p.split and not split_fits(p.blocks_of_parts, p.parts, layers):
        yield Problem(
            ("parallel.split", *keys),
            f"parallel.split={p.split}: give the blocks of {p.parts} parts, {layers} together; only "
            "the first and the last part, with embedding and head, may have 0",
        )


def split_fits(split: Sequence[int], parts: int, blocks: int) -> bool:
    """Whether these numbers of blocks can be the parts'; embedding and head make up for none."""
    return len(split) == parts and sum(split) == blocks and 0 not in split[1:-1]


def divisors(number: int) -> list[int]:
    """All divisors of a number, in order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _divisors(number: int, near: int) -> str:
    """Divisors of a number as a list for a reader: all, or the nearest."""
    return _nearest(divisors(number), near)


def _nearest(choices: list[int], near: int) -> str:
    """The choices as a list for a reader: all, or the nearest."""
    chosen = sorted(choices, key=lambda d: abs(d - near))[:MOST_CHOICES]
    return ", ".join(map(str, sorted(chosen)))
