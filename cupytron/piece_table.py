"""Where the pieces of all tensors lie, as arrays of integers: a large job has a million pieces.

Ranks that each know some pieces exchange their tables and merge them.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cupytron.checkpoint_format import Box, Listed

_BOX = 5  # the column where a row's box begins, after tensor, start, stop, file and offset
_MOST_NUMBERS = 1 << 24  # ends of boxes that are compared at once; a tensor on a mesh has few


class PieceTable(NamedTuple):
    """Pieces of many tensors.

    Attributes:
        names: of the tensors.
        kinds: shape and dtype of each tensor.
        rows: (n, 5 + 2 * dims) int64, a row for each of n pieces. It begins with its tensor's number, start
            and stop of its flat range, its file's number, and the byte of the file where its values begin.
            Then comes (low, high) of its box for each dim, filled up with zeros.
    """

    names: list[str]
    kinds: list[tuple[tuple[int, ...], str]]
    rows: np.ndarray


class Pieces(NamedTuple):
    """The n pieces of one tensor; all arrays are int64.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        boxes: (n, dims, 2), (low, high) for each dim.
        ranges: (n, 2), start and stop, flat, each within its box.
        files: (n,), the numbers of their files.
        offsets: (n,), the byte of the file where the values begin.
    """

    shape: tuple[int, ...]
    dtype: str
    boxes: np.ndarray
    ranges: np.ndarray
    files: np.ndarray
    offsets: np.ndarray

    def near(self, box: Box, start: int, stop: int) -> np.ndarray:
        """Indices of all pieces with elements of start ... stop - 1 of a box, and of few others."""
        lows, highs = self.boxes[..., 0], self.boxes[..., 1]
        wanted = np.array(box, np.int64).reshape(-1, 2)
        near = self.ranges[:, 0] < self.ranges[:, 1]
        near &= (lows < wanted[:, 1]).all(axis=1) & (highs > wanted[:, 0]).all(axis=1)
        if box:
            # along the first dim, flat ranges cover known rows of their boxes
            first, last = _rows(self.boxes, self.ranges)
            (from_row,), (to_row,) = _rows(wanted[None], np.array([[start, stop]]))
            near &= (first < to_row) & (last > from_row)
        return np.flatnonzero(near)


def _rows(boxes: np.ndarray, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row, and the last row + 1, along the first dim, of each flat range of a box."""
    row = np.maximum((boxes[:, 1:, 1] - boxes[:, 1:, 0]).prod(axis=1), 1)
    lows = boxes[:, 0, 0]
    return lows + ranges[:, 0] // row, lows - (-ranges[:, 1] // row)


def table_of(file: int, pieces: list[Listed], offsets: list[int]) -> PieceTable:
    """The table of one file's pieces.

    Raises:
        ValueError: two of them disagree about their tensor.
    """
    names: dict[str, int] = {}
    kinds: list[tuple[tuple[int, ...], str]] = []
    dims = max((len(piece.shape) for piece in pieces), default=0)
    rows = np.zeros((len(pieces), _BOX + 2 * dims), np.int64)
    for row, piece, offset in zip(rows, pieces, offsets, strict=True):
        number = _number(names, kinds, piece.tensor, (piece.shape, piece.dtype))
        row[:_BOX] = number, piece.start, piece.stop, file, offset
        row[_BOX : _BOX + 2 * len(piece.box)] = list(itertools.chain(*piece.box))
    return PieceTable(list(names), kinds, rows)


def merged(tables: Iterable[PieceTable]) -> PieceTable:
    """One table of all pieces.

    Raises:
        ValueError: two tables disagree about a tensor.
    """
    names: dict[str, int] = {}
    kinds: list[tuple[tuple[int, ...], str]] = []
    tables = list(tables)
    width = max((table.rows.shape[1] for table in tables), default=_BOX)
    rows = np.zeros((sum(len(table.rows) for table in tables), width), np.int64)
    at = 0
    for table in tables:
        numbers = [
            _number(names, kinds, name, kind)
            for name, kind in zip(table.names, table.kinds, strict=True)
        ]
        part = rows[at : at + len(table.rows)]
        part[:, : table.rows.shape[1]] = table.rows
        part[:, 0] = np.array(numbers, np.int64)[table.rows[:, 0]]
        at += len(part)
    return PieceTable(list(names), kinds, rows)


def _number(names: dict[str, int], kinds: list, name: str, kind: tuple) -> int:
    """A tensor's number; a new tensor gets the next one."""
    number = names.setdefault(name, len(names))
    if number == len(kinds):
        kinds.append(kind)
    elif kinds[number] != kind:
        raise ValueError(f"pieces of {name} disagree about its shape or dtype")
    return number


def by_tensor(table: PieceTable) -> dict[str, Pieces]:
    """Each tensor's pieces, in the order of the names."""
    rows = table.rows[np.argsort(table.rows[:, 0], kind="stable")]
    bounds = np.searchsorted(rows[:, 0], np.arange(len(table.names) + 1))
    found = {}
    for number, (name, (shape, dtype)) in enumerate(zip(table.names, table.kinds, strict=True)):
        its = rows[bounds[number] : bounds[number + 1]]
        boxes = its[:, _BOX : _BOX + 2 * len(shape)].reshape(len(its), len(shape), 2)
        found[name] = Pieces(shape, dtype, boxes, its[:, 1:3], its[:, 3], its[:, 4])
    return dict(sorted(found.items()))


# whether pieces tile a tensor


def untiled(name: str, pieces: Pieces) -> str | None:
    """Why the pieces do not hold each element of a tensor exactly once; None if they do.

    The ranges of a box must follow each other from its first element to its last, and the boxes must
    tile the tensor.
    """
    counts = pieces.ranges[:, 1] - pieces.ranges[:, 0]
    held, count = int(counts.sum()), math.prod(pieces.shape)
    if held < count:
        return f"{name} is not complete: {held} elements of {pieces.shape}"
    if not count:
        return None
    boxes, ranges, shape = pieces.boxes[counts > 0], pieces.ranges[counts > 0], pieces.shape
    if not shape:  # a scalar is an array of one element
        boxes, shape = np.tile(np.array([0, 1]), (len(boxes), 1, 1)), (1,)
    filled = _filled_boxes(boxes, ranges)
    # at least as many elements as the tensor has, but not each of them once
    try:
        if held > count or filled is None or not _tile(filled, shape):
            return f"{name} is held twice in part"
    except ValueError as error:
        return f"{name} cannot be checked: {error}"
    return None


def _filled_boxes(boxes: np.ndarray, ranges: np.ndarray) -> np.ndarray | None:
    """The different boxes, (n, dims, 2), if the ranges fill each of them without overlap; else None."""
    flat = boxes.reshape(len(boxes), -1)
    order = np.lexsort((ranges[:, 0], *flat.T))
    flat, ranges = flat[order], ranges[order]
    differs = (flat[1:] != flat[:-1]).any(axis=1)
    first, last = np.append(True, differs), np.append(differs, True)
    volumes = (flat[:, 1::2] - flat[:, ::2]).prod(axis=1)
    begins = np.where(first, 0, np.roll(ranges[:, 1], 1))
    if (ranges[:, 0] != begins).any() or (ranges[last, 1] != volumes[last]).any():
        return None
    return flat[first].reshape(-1, *boxes.shape[1:])


def _tile(boxes: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether boxes hold each element of a tensor exactly once.

    Give each corner of a box a sign: + to the lowest corner, and along each edge the sign changes. The
    number of boxes that hold an element is the sum of the signs at its place and below it in every dim. So
    the signs determine these numbers. The boxes tile the tensor if and only if at each corner their signs
    add up to those of the whole tensor.

    The dims are taken in turn, and after each one equal rows are added up. So boxes that lie side by side
    become one, and a grid of boxes does not get 2 ** dims corners for each.

    Raises:
        ValueError: more corners stay than can be compared.
    """
    whole = np.array([[(0, n) for n in shape]], np.int64)
    # where all boxes reach from end to end, they cannot differ
    cut = [dim for dim in range(len(shape)) if (boxes[:, dim] != whole[:, dim]).any()]
    if not cut:
        return len(boxes) == 1
    rows = np.concatenate([boxes, whole])[:, cut].reshape(len(boxes) + 1, -1)
    signs = np.append(np.ones(len(boxes), np.int64), -1)
    for place in range(len(cut)):
        if 2 * rows.size > _MOST_NUMBERS:
            raise ValueError(f"its {len(boxes)} boxes in {len(shape)} dims are too many to compare")
        low, high = 2 * place, 2 * place + 1
        ends = rows.copy(), rows
        ends[0][:, high] = 0
        ends[1][:, low] = rows[:, high]
        ends[1][:, high] = 0
        rows, signs = _added_up(np.concatenate(ends), np.concatenate([signs, -signs]))
    return not signs.any()


def _added_up(rows: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows with the sums of their signs, without those whose sum is zero."""
    order = np.lexsort(rows.T)
    rows, signs = rows[order], signs[order]
    begins = np.flatnonzero(np.append(True, (rows[1:] != rows[:-1]).any(axis=1)))
    sums = np.add.reduceat(signs, begins)
    return rows[begins][sums != 0], sums[sums != 0]
