"""Finding replicas that have drifted apart: everything with a second copy is compared bit for bit.

    what                                          its copies stand on         compared
    weights and optimizer state, ZeRO 0           all of dp                   before a save
    weights gathered for the layers, ZeRO 1, 2    all of dp                   before the update, and a save
    weights rounded for the layers, ZeRO 0 to 2   all of dp                   before the update, and a save
    norms, row biases, positions                  all of tp, the same share   as above, at every stage
    a table of two pipeline stages                the first and the last      as above, at every stage
    numbers: steps, updates, learning rate, ...   all ranks                   before a save

An update overwrites the layers' weights. A drift there spoils the gradients and then vanishes, so these
copies are compared before the update. Everything else has no second copy.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend
from cupytron.comm import ParallelContext
from cupytron.comm.mesh import place
from cupytron.errors import CupytronError
from cupytron.launcher import named
from cupytron.parallel.buffer import Bucket
from cupytron.parallel.zero import Zero

ROW = 63  # words of a checksum
_ROW_BYTES = 8 * ROW
_BLOCK = _ROW_BYTES << 16  # bytes copied from a GPU at a time: 33 MB
_ODD = np.random.Philox(key=1).random_raw(ROW) | np.uint64(1)  # the same numbers everywhere
_TOLD = 3  # differences that a message lists
_ROUNDING = (
    "; ranks of tp that round differently drift apart, too: give all of them one --blas-kernel and the "
    "same --threads, or use --sp"
)


class ReplicasDiffer(CupytronError):
    """Ranks that should hold the same values hold different ones; the message names them."""


class Item(NamedTuple):
    """An array or a number with a fingerprint, which should be the same on all ranks that hold the item.

    Attributes:
        name: "kind/parameter", or the name of a number of the trainer.
        box, start, stop: as in a checkpoint's Piece; a number has none.
    """

    name: str
    box: tuple[tuple[int, int], ...] = ()
    start: int = 0
    stop: int = 0


class Difference(NamedTuple):
    """An item that is not the same on all ranks that hold it.

    Attributes:
        line: a text that names the ranks and the item.
        along_tp: whether ranks differ that are replicas along tp.
    """

    line: str
    along_tp: bool


Group = tuple[Any, ...]  # an axis, and this rank's coordinates along the others


def compare(
    zero: Zero, step: int, numbers: Mapping[str, float], before_update: bool = False
) -> None:
    """Compare this rank's weights, state and numbers with their other copies. Collective over the world.

    Args:
        zero: the model, materialised.
        step: the step that is done, or whose update comes next; for the message.
        numbers: the trainer's numbers by name; they should be the same on every rank of the world.
        before_update: compare only the weights that the update will overwrite.

    Communication: one small object from each rank to all others.

    Raises:
        ReplicasDiffer: the same on every rank.
    """
    if found := differences(zero, numbers, before_update):
        lines = [difference.line for difference in found]
        if len(lines) > _TOLD:
            lines[_TOLD:] = [f"and {len(lines) - _TOLD} more differences"]
        text = f"step {step}: {'; '.join(lines)} (replicas must be the same)"
        if any(difference.along_tp for difference in found):
            text += _ROUNDING
        raise ReplicasDiffer(text)


def differences(
    zero: Zero, numbers: Mapping[str, float] | None = None, before_update: bool = False
) -> list[Difference]:
    """As compare, but returns the items that differ; the same on every rank."""
    context = zero.context
    if context.world.size == 1:
        return []
    fingerprints: dict[Item, Any] = {
        Item(name): repr(value) for name, value in (numbers or {}).items()
    }
    shared: dict[Group, list[Item]] = {("world",): list(fingerprints)}
    for item, values, axes in _second_copies(zero, before_update):
        fingerprints[item] = fingerprint(values)
        for axis in axes:
            shared.setdefault(_group(context, axis), []).append(item)
    digests = {group: _digest(items, fingerprints) for group, items in shared.items()}
    seen: dict[Group, set[str]] = {}
    for theirs in context.world.gather_objects(digests):
        for group, digest in theirs.items():
            seen.setdefault(group, set()).add(digest)
    if all(len(different) == 1 for different in seen.values()):
        return []
    # a difference is rare, so finding it may cost more: every fingerprint goes to every rank
    everyone = context.world.gather_objects((named(context.world.rank), fingerprints))
    return _told(everyone, context)


def fingerprint(values: Any) -> int:
    """A 32-bit hash of a flat array's bytes, made nearly at the speed at which memory is read.

    The 64-bit words w of a row give a checksum c @ w mod 2^64, with odd numbers c. The rows' checksums, and
    the bytes after the last whole row, give a CRC-32. A SHA-256 takes ten times as long.

    A row with one wrong word always has another checksum, since an odd number times the difference is never
    0 mod 2^64. In a row with several wrong words the differences cancel with a probability of about
    2^(v - 63). Here v is the number of the lowest wrong bit in any of the words. So an error is likely to
    stay hidden only if in every wrong row the highest bits alone are wrong, such as two signs of float64.
    If a whole tensor changes its sign, the odd number of words in a row keeps the differences from
    cancelling.
    """
    crc, size = 0, _BLOCK // values.dtype.itemsize
    for start in range(0, len(values), size):
        octets = backend.to_host(values[start : start + size]).view(np.uint8)
        whole = len(octets) // _ROW_BYTES * _ROW_BYTES
        rows = octets[:whole].view(np.uint64).reshape(-1, ROW)
        # faster than rows @ _ODD, since BLAS has no integers
        checksums = np.einsum("ij,j->i", rows, _ODD)
        crc = zlib.crc32(octets[whole:].tobytes(), zlib.crc32(checksums, crc))
    return crc


def _second_copies(zero: Zero, before_update: bool) -> Iterator[tuple[Item, Any, tuple[str, ...]]]:
    """Each item that other ranks hold too: the item, its values here, and the axes of those ranks."""
    sizes = zero.context.sizes
    for bucket in zero.buckets:
        for kind, flat, within in _arrays(zero, bucket, before_update):
            everything = within == slice(0, bucket.size)
            for parameter, inside, part in bucket.parts(within):
                shared = {
                    "dp": everything and sizes["dp"] > 1,
                    "tp": parameter.whole and sizes["tp"] > 1,
                    "pp": zero.copies(bucket) is not None,
                }
                if not any(shared.values()):
                    continue
                values = flat[part.start - within.start : part.stop - within.start]
                box = tuple((s.start, s.stop) for s in parameter.box)
                item = Item(f"{kind}/{parameter.name}", box, inside.start, inside.stop)
                yield item, values, tuple(axis for axis, is_so in shared.items() if is_so)


def _arrays(zero: Zero, bucket: Bucket, before_update: bool) -> Iterator[tuple[str, Any, slice]]:
    """A bucket's flat arrays to compare: kind, array, and the range of the bucket that it covers."""
    rounded, gathered = bucket.shard is not bucket.weights, zero.stage in (1, 2)
    if rounded or gathered:  # the layers' weights are not the array that the optimizer updates
        kind = f"{bucket.shard.dtype.name} weight" if rounded else "weight"
        if zero.stage < 3:
            yield kind, bucket.data, slice(0, bucket.size)
        else:
            yield kind, bucket.shard, bucket.owned
    if before_update:
        return
    if rounded or not gathered:  # else it is a view of the array just yielded
        yield "weight", bucket.weights, bucket.owned
    for kind, flat in bucket.state.items():
        yield kind, flat, bucket.owned


def _group(context: ParallelContext, axis: str) -> Group:
    others = (at for name, at in context.coordinates.items() if name != axis)
    return (axis, *others)


def _digest(items: list[Item], fingerprints: Mapping[Item, Any]) -> str:
    """SHA-256 of the fingerprints of a group's items, which all its ranks list in the same order."""
    text = "\n".join(f"{item} {fingerprints[item]}" for item in items)
    return hashlib.sha256(text.encode()).hexdigest()


def _told(
    everyone: list[tuple[str, dict[Item, Any]]], context: ParallelContext
) -> list[Difference]:
    """The items that are not the same on all ranks that hold them.

    Args:
        everyone: each rank's name and fingerprints.
    """
    names = [name.removeprefix("rank ") for name, _ in everyone]
    holders: dict[Item, dict[int, Any]] = {}
    for rank, (_, fingerprints) in enumerate(everyone):
        for item, value in fingerprints.items():
            holders.setdefault(item, {})[rank] = value
    return [
        _difference(item, by_rank, names, context)
        for item, by_rank in holders.items()
        if len(set(by_rank.values())) > 1
    ]


def _difference(
    item: Item, by_rank: dict[int, Any], names: list[str], context: ParallelContext
) -> Difference:
    # the value that most ranks have is taken for the right one; of two, that of the first rank
    right, _ = Counter(by_rank.values()).most_common(1)[0]
    good = [rank for rank, value in by_rank.items() if value == right]
    odd = [rank for rank, value in by_rank.items() if value != right]
    hold = "holds" if len(odd) == 1 else "hold"
    line = f"{_ranks(odd, names)} {hold} another {item.name} than {_ranks(good, names)}"
    if not item.box:
        theirs = ", ".join(dict.fromkeys(by_rank[rank] for rank in odd))
        line += f" ({theirs} in place of {right})"
    pipelines = [
        {(at["pp"], at["dp"]) for at in (place(rank, context.sizes) for rank in ranks)}
        for ranks in (odd, good)
    ]
    return Difference(line, bool(item.box) and bool(pipelines[0] & pipelines[1]))


def _ranks(ranks: list[int], names: list[str]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names[rank] for rank in ranks)}"
