"""What a checkpoint consists of: pieces, the files that hold them, and the sealed manifest.

A flat range of a box is a union of few rectangles; all that is asked of pieces (do they tile the tensor,
which of them hold what a rank wants) is asked of boxes, flat ranges and these rectangles.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupytron.errors import CheckpointError

FORMAT = 1
_BLOCK = 1 << 20
_DTYPES = {"float32": "F32", "float64": "F64"}

Box = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A one-dimensional part of a logical tensor.

    tensor: its name, such as "weight/blocks.0.mlp.up.weight"; shape: of the logical tensor;
    box: (start, stop) for each dim; start, stop: flat range within the box; values: (stop - start,).
    """

    tensor: str
    shape: tuple[int, ...]
    box: Box
    start: int
    stop: int
    values: Any


class Listed(NamedTuple):
    """A piece as the manifest lists it."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    box: Box
    start: int
    stop: int
    file: str
    key: str


def listed_piece(p: dict[str, Any]) -> Listed:
    """A manifest's entry, checked.

    Raises:
        ValueError, KeyError, TypeError: it is nonsense.
    """
    shape = tuple(int(n) for n in p["shape"])
    box = tuple((int(a), int(b)) for a, b in p["box"])
    start, stop = (int(n) for n in p["range"])
    name = str(p["file"])
    held = 0 <= start <= stop <= volume(box)
    if p["dtype"] not in _DTYPES or not fits(box, shape) or not held or "/" in name:
        raise ValueError(f"a piece of {p['tensor']}")
    return Listed(str(p["tensor"]), shape, p["dtype"], box, start, stop, name, str(p["key"]))


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
    """The smallest box around `part` that is contiguous in `box`, and where in it it begins."""
    start, around, narrow = 0, [], True
    for (a, b), (c, d) in zip(box, part, strict=True):
        around.append((c, d) if narrow else (a, b))
        start = start * (b - a) + around[-1][0] - a
        narrow = narrow and d - c == 1
    return start, tuple(around)


def region(box: Box, part: Box) -> tuple[slice, ...]:
    """Where a box lies in an array that holds `box`."""
    return tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(box, part, strict=True))


def untiled(pieces: list[Listed]) -> str | None:
    """What is wrong if the pieces of one tensor do not hold each of its elements exactly once.

    Boxes must not overlap, nor ranges of one box; then the number of elements tells of holes.
    """
    boxes: dict[Box, list[tuple[int, int]]] = {}
    for piece in pieces:
        if piece.start < piece.stop:
            boxes.setdefault(piece.box, []).append((piece.start, piece.stop))
    twice = any(intersection(a, b) for a, b in itertools.combinations(boxes, 2)) or any(
        before[1] > after[0]
        for ranges in boxes.values()
        for before, after in itertools.pairwise(sorted(ranges))
    )
    if twice:
        return f"{pieces[0].tensor} is held twice in part"
    held = sum(piece.stop - piece.start for piece in pieces)
    if held != math.prod(pieces[0].shape):
        return f"{pieces[0].tensor} is not complete: {held} elements of {pieces[0].shape}"
    return None


# files


def write_tensors(path: Path, pieces: list[Piece]) -> tuple[list[dict], dict[str, Any]]:
    """A safetensors file, streamed: no second copy of the tensors in memory, hashed on the way.

    Format: https://huggingface.co/docs/safetensors, "Format".

    Returns: the manifest's entries for the pieces, and for the file.
    """
    header: dict[str, Any] = {}
    listed = []
    offset = 0
    for number, piece in enumerate(pieces):
        key, size = f"{number:06d}/{piece.tensor}", piece.values.nbytes
        header[key] = {
            "dtype": _DTYPES[piece.values.dtype.name],
            "shape": [len(piece.values)],
            "data_offsets": [offset, offset + size],
        }
        offset += size
        listed.append(
            {
                "tensor": piece.tensor,
                "shape": list(piece.shape),
                "dtype": piece.values.dtype.name,
                "box": [list(b) for b in piece.box],
                "range": [piece.start, piece.stop],
                "key": key,
                "file": path.name,
            }
        )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in _blocks(text, pieces):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return listed, {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(header: bytes, pieces: list[Piece]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        for at in range(0, len(piece.values), _BLOCK):
            block = np.ascontiguousarray(piece.values[at : at + _BLOCK])
            if not np.isfinite(block).all():
                raise CheckpointError(
                    f"{piece.tensor} holds values that are not finite, so it was not saved; "
                    "go on from the last checkpoint with a lower optim.lr"
                )
            yield block.view(np.uint8)
