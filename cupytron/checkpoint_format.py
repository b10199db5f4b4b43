"""A checkpoint's format: pieces of logical tensors, and the safetensors files that hold and list them.

A flat range of a box is a union of a few rectangles. Intersections of these tell which elements of a piece
a rank has to read.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupytron import progress
from cupytron.durable import sync
from cupytron.errors import CheckpointError

FORMAT = 2
MAX_HEADER = 16 << 20  # bytes; reading one takes about 16 times its size in memory
_BLOCK = 1 << 20
_MAX_DIMS = 8
_MAX_ELEMENTS = 1 << 59  # so that no number of bytes exceeds 64 bits
_DTYPES = {"float32": "F32", "float64": "F64"}
_NAMES = {np.dtype(name): name for name in _DTYPES}
_SIZES = {name: np.dtype(name).itemsize for name in _DTYPES}

Box = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A one-dimensional part of a logical tensor.

    Attributes:
        tensor: the logical tensor's name, such as "weight/blocks.0.mlp.up.weight".
        shape: of the logical tensor.
        box: (start, stop) for each dim.
        start, stop: flat range within the box.
        values: (stop - start,).
    """

    tensor: str
    shape: tuple[int, ...]
    box: Box
    start: int
    stop: int
    values: Any


class Listed(NamedTuple):
    """A piece as a file's header lists it: as Piece, with the values' dtype in place of the values."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    box: Box
    start: int
    stop: int


def listed(tensor: Any, shape: Any, dtype: Any, box: Any, span: Any) -> Listed:
    """Check an entry of a list of pieces.

    Args:
        tensor, shape, dtype, box: as in Listed; any JSON values.
        span: (start, stop).

    Raises:
        ValueError, TypeError: there can be no such piece.
    """
    start, stop = span
    shape, box = tuple(shape), tuple(map(tuple, box))
    numbers = {type(n) for n in (*shape, *itertools.chain(*box), start, stop)}
    possible = (
        type(tensor) is str
        and dtype in _DTYPES
        and numbers == {int}
        and len(shape) <= _MAX_DIMS
        and math.prod(shape) <= _MAX_ELEMENTS
        and max(shape, default=0) <= _MAX_ELEMENTS  # beside a dim of 0
        and fits(box, shape)
        and 0 <= start <= stop <= volume(box)
    )
    if not possible:
        raise ValueError(f"a piece of {tensor}")
    return Listed(tensor, shape, dtype, box, start, stop)


# geometry


def fits(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether the box lies within a tensor of this shape."""
    return len(box) == len(shape) and all(
        0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True)
    )


def sizes(box: Box) -> tuple[int, ...]:
    """Shape of an array that holds a box."""
    return tuple(b - a for a, b in box)


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(sizes(box))


def whole_box(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return tuple((0, n) for n in shape)


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None: nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(a < b for a, b in common) else None


def rectangles(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Cut a flat range of a box into boxes that are each contiguous in it.

    Yields: where in the range each begins, and the box, in the coordinates of the tensor. A range in
        two dims is at most the end of a row, whole rows, and the beginning of a row.
    """
    for at, part in _rectangles(box, start, stop):
        yield at - start, part


def _rectangles(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    if start >= stop:
        return
    if not box:  # a scalar
        yield start, ()
        return
    (first, _), rest = box[0], box[1:]
    row = volume(rest)
    low, high = -(-start // row), stop // row  # whole rows

    def within(i: int, a: int, b: int) -> Iterator[tuple[int, Box]]:
        for at, part in _rectangles(rest, a - i * row, b - i * row):
            yield at + i * row, ((first + i, first + i + 1), *part)

    if low > high:  # inside one row
        yield from within(high, start, stop)
        return
    if start < low * row:
        yield from within(low - 1, start, low * row)
    if low < high:
        yield low * row, ((first + low, first + high), *rest)
    if high * row < stop:
        yield from within(high, high * row, stop)


def enclosing(box: Box, part: Box) -> tuple[int, Box]:
    """Where in `box` the smallest contiguous box around `part` begins, and this box."""
    start, around, narrow = 0, [], True
    for (a, b), (c, d) in zip(box, part, strict=True):
        around.append((c, d) if narrow else (a, b))
        start = start * (b - a) + around[-1][0] - a
        narrow = narrow and d - c == 1
    return start, tuple(around)


def region(box: Box, part: Box) -> tuple[slice, ...]:
    """The slices that take `part` out of an array that holds `box`."""
    return tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(box, part, strict=True))


# files


def header_of(pieces: list[Listed], with_list: bool = True) -> tuple[bytes, list[int]]:
    """The beginning of a file that holds these pieces, in this order, and nothing else.

    Args:
        pieces: of the file.
        with_list: whether the header lists them; in format 1 the manifest does.

    Returns: the header after eight bytes with its length; the byte of the file where each piece begins.
    """
    header: dict[str, Any] = {}
    if with_list:
        entries = [(p.tensor, p.shape, p.dtype, p.box, (p.start, p.stop)) for p in pieces]
        header["__metadata__"] = {"pieces": json.dumps(entries, separators=(",", ":"))}
    offsets, at = [], 0
    for number, piece in enumerate(pieces):
        offsets.append(at)
        at += (piece.stop - piece.start) * _SIZES[piece.dtype]
        header[f"{number:06d}/{piece.tensor}"] = {
            "dtype": _DTYPES[piece.dtype],
            "shape": [piece.stop - piece.start],
            "data_offsets": [offsets[-1], at],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + offset for offset in offsets]


def end_of(piece: Listed, offset: int) -> int:
    """The byte of a file behind a piece that begins at byte `offset`."""
    return offset + (piece.stop - piece.start) * _SIZES[piece.dtype]


def parse_header(head: bytes) -> tuple[list[Listed], list[int]]:
    """The pieces that the beginning of a file lists, and where in the file each one begins.

    Raises:
        ValueError: it is not, byte for byte, what `header_of` makes of the list.
    """
    try:
        entries = json.loads(json.loads(head[8:])["__metadata__"]["pieces"])
        pieces = [listed(*entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its list of pieces is lacking or garbled") from None
    # if they are equal, keys, dtypes, sizes and offsets are those of the list
    expected, offsets = header_of(pieces)
    if expected != head:
        raise ValueError("its header does not fit its list of pieces")
    return pieces, offsets


def write_tensors(path: Path, pieces: list[Piece]) -> dict[str, Any]:
    """Write a safetensors file as a stream, hashed on the way, without a second copy of the tensors.

    Format: https://huggingface.co/docs/safetensors, "Format".

    Returns: the manifest's entry for the file.

    Raises:
        CheckpointError: a value is not finite, or the header is larger than a reader would take.
    """
    entries = [
        # the checks that a reader makes
        listed(p.tensor, p.shape, _NAMES[p.values.dtype], p.box, (p.start, p.stop))
        for p in pieces
    ]
    head, _ = header_of(entries)
    if len(head) > MAX_HEADER:
        raise CheckpointError(
            f"{path.name} would hold {len(pieces)} pieces in a header of {len(head)} bytes; a reader "
            f"takes at most {MAX_HEADER}; spread the model over more ranks"
        )
    digest, total = hashlib.sha256(), len(head) + sum(p.values.nbytes for p in pieces)
    with open(path, "xb") as file:
        for block in itertools.chain([head], _blocks(pieces)):
            digest.update(block)
            file.write(block)
            progress.count(file.tell(), total, "bytes")
        sync(file)
        size = file.tell()
    return {
        "bytes": size,
        "header": hashlib.sha256(head).hexdigest(),
        "sha256": digest.hexdigest(),
    }


def _blocks(pieces: list[Piece]) -> Iterator[Any]:
    for piece in pieces:
        for at in range(0, len(piece.values), _BLOCK):
            block = np.ascontiguousarray(piece.values[at : at + _BLOCK])
            if not np.isfinite(block).all():
                raise CheckpointError(
                    f"{piece.tensor} holds values that are not finite, so it was not saved; "
                    "go on from the last checkpoint with a lower optim.lr"
                )
            yield block.view(np.uint8)
