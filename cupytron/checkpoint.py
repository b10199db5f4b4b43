"""Checkpoints: logical tensors in pieces, with a manifest that can prove them whole.

A folder holds safetensors files, one a rank, and `manifest.json`. A piece is (tensor, box in the logical
tensor, flat range within that box), stored one-dimensional, so that any mesh can write its shards and any
other can read them; no rank ever holds the model. The manifest has the size and SHA-256 of every file, and
of itself; it is written last, and the folder gets its name last of all. Nothing here is a pickle.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from cupytron.checkpoint_folders import discard, put_in_place, recover
from cupytron.checkpoint_format import (
    FORMAT,
    Box,
    Listed,
    Piece,
    enclosing,
    fits,
    intersection,
    listed_piece,
    rectangles,
    region,
    sizes,
    untiled,
    volume,
    whole_box,
    write_tensors,
)
from cupytron.comm import Communicator, SelfCommunicator
from cupytron.durable import sync_folder, sync_parents, write_synced
from cupytron.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from cupytron.manifest import MANIFEST, read_manifest, seal
from cupytron.together import together

__all__ = ["Checkpoint", "Piece", "discard", "recover", "write"]

_MAX_HEADER = 16 << 20  # a hostile safetensors header costs 16 times its size in memory
_BLOCK = 1 << 22  # elements hashed at a time


def write(
    folder: Path,
    pieces: Iterable[Piece],
    about: dict[str, Any],
    world: Communicator | None = None,
) -> None:
    """Write a checkpoint to `folder`, which appears complete or not at all. Collective over `world`.

    Args:
        folder: its final place; a folder that is there is replaced. All ranks must see the same one.
        pieces: those that this rank answers for, perhaps none: each element comes from one rank only.
        about: what else the manifest says (JSON values); rank 0's is taken.
        world: all ranks; None: this process alone.

    Raises:
        CheckpointError: a value is not finite, or the ranks do not share the folder's file system.
        OSError: the disk is full, or may not be written.
        Every rank raises the same, and nothing has been written under the final name.
    """
    world = world or SelfCommunicator()
    # processes on several machines have to agree on a name
    pid = world.gather_objects(os.getpid())[0]
    temporary = folder.with_name(f".tmp-{folder.name}-{pid}")
    first = world.rank == 0
    try:
        together(world, lambda: _make_afresh(temporary) if first else None)
        parts = world.gather_objects(
            together(world, lambda: _write_part(temporary, list(pieces), world.rank))
        )
        together(world, lambda: _finish(temporary, folder, about, parts) if first else None)
    except BaseException as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):
            # all ranks are here, and none may end the others before the folder is gone
            world.barrier()
        raise


_Part = tuple[list[dict], dict[str, dict[str, Any]]]  # a manifest's pieces, and its files


def _make_afresh(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_part(temporary: Path, pieces: list[Piece], rank: int) -> _Part:
    if not temporary.is_dir():
        raise _not_shared(temporary.parent)
    if not pieces:
        return [], {}
    path = temporary / f"rank-{rank:05d}.safetensors"
    listed, file = write_tensors(path, pieces)
    return listed, {path.name: file}


def _finish(temporary: Path, folder: Path, about: dict[str, Any], parts: list[_Part]) -> None:
    files = {name: file for _, its in parts for name, file in its.items()}
    for name, file in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise _not_shared(temporary.parent)
    listed = [entry for entries, _ in parts for entry in entries]
    body = {**about, "format": FORMAT, "pieces": listed, "files": files}
    write_synced(temporary / MANIFEST, seal(body))
    sync_folder(temporary)
    if _is_first(folder.parent):
        # the folders of the run may be as new as this one
        sync_parents(folder.parent)
    put_in_place(temporary, folder)


def _is_first(checkpoints: Path) -> bool:
    """Whether no checkpoint has a name yet."""
    return all(path.name.startswith(".") for path in checkpoints.iterdir())


def _not_shared(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the ranks do not see each other's files there; the run's folder must stand on "
        "a file system that all ranks share"
    )


class Checkpoint:
    """A checkpoint on disk whose manifest is whole; `verify` checks the files too.

    Attributes:
        about: the manifest's body. sha256: of it. identity: of its file, as Manifest's.

    Raises:
        DamagedCheckpoint: it is missing or damaged.
        UnreadableCheckpoint: it cannot be read now, or a newer version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about, self.sha256, self.identity = read_manifest(folder)
        if self.about.get("format") != FORMAT:
            raise self._unreadable(
                f"format {self.about.get('format')} is not {FORMAT}, which this version reads; "
                "use the version of cupytron that wrote it"
            )
        self._by_tensor: dict[str, list[Listed]] = {}
        try:
            self.step = int(self.about["step"])
            self.pieces = [listed_piece(p) for p in self.about["pieces"]]
            self.files = {
                str(k): (int(f["bytes"]), str(f["sha256"])) for k, f in self.about["files"].items()
            }
            for piece in self.pieces:
                others = self._by_tensor.setdefault(piece.tensor, [])
                others.append(piece)
                alike = (piece.shape, piece.dtype) == (others[0].shape, others[0].dtype)
                if piece.file not in self.files or not alike:
                    raise ValueError(f"a piece of {piece.tensor}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"{MANIFEST} lacks or garbles {error}") from None
        self._tiled: set[str] = set()  # tensors whose pieces have been compared
        self._verified = False

    def _damaged(self, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self.folder}: {what}")

    def _unreadable(self, what: str) -> UnreadableCheckpoint:
        return UnreadableCheckpoint(f"{self.folder}: {what}")

    def verify(self, world: Communicator | None = None) -> None:
        """Compare every file with the manifest, byte for byte. Collective over `world`.

        Args:
            world: ranks that share the work, a file each in turn; None: this process alone.

        Raises:
            CheckpointError: naming a file that does not match; the same on every rank.
        """
        world = world or SelfCommunicator()
        together(world, lambda: self._verify_share(world.rank, world.size))
        self._verified = True

    def _verify_share(self, rank: int, size: int) -> None:
        for name in list(self.files)[rank::size]:
            self._verify_file(name)
        for tensor in self._by_tensor:
            self._check_tiled(tensor)

    def _verify_file(self, name: str) -> None:
        path = self.folder / name
        size, expected = self.files[name]
        try:
            if path.stat().st_size != size:
                raise self._damaged(f"{name} has {path.stat().st_size} bytes in place of {size}")
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise self._damaged(f"{name} is missing") from None
        except OSError as error:
            raise self._unreadable(f"{name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise self._damaged(f"{name} is damaged: it does not match its SHA-256")

    def _check_tiled(self, tensor: str) -> None:
        if tensor in self._tiled:
            return
        if wrong := untiled(self._by_tensor[tensor]):
            raise self._damaged(wrong)
        self._tiled.add(tensor)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each logical tensor, in the order of the names."""
        return {
            name: (pieces[0].shape, np.dtype(pieces[0].dtype))
            for name, pieces in sorted(self._by_tensor.items())
        }

    def read(self, tensor: str, box: Box, start: int, stop: int) -> np.ndarray:
        """Elements start ... stop of a box of a logical tensor, whatever the pieces.

        Only pieces with such elements are read, one at a time. Files are not compared with their hashes:
        that is for `verify`.

        Args:
            tensor: its name.
            box: (start, stop) for each dim.
            start, stop: flat range within the box.

        Returns: (stop - start,), in the tensor's dtype.

        Raises:
            CheckpointError: there is no such tensor or part, or a file cannot be read.
        """
        if tensor not in self._by_tensor:
            raise self._damaged(f"it has no tensor {tensor}")
        pieces = self._by_tensor[tensor]
        shape = pieces[0].shape
        if not fits(box, shape) or not 0 <= start <= stop <= volume(box):
            raise self._damaged(
                f"{tensor} of shape {shape} has no elements {start}:{stop} of {box}"
            )
        self._check_tiled(tensor)
        out = np.empty(stop - start, pieces[0].dtype)
        wanted = list(rectangles(box, start, stop))
        for piece in pieces:
            self._copy(piece, wanted, out)
        return out

    def _copy(self, piece: Listed, wanted: list[tuple[int, Box]], out: np.ndarray) -> None:
        """Copy from a piece what lies in the rectangles wanted, which stand in `out`."""
        found = [
            (at, part, held_at, held, common)
            for held_at, held in rectangles(piece.box, piece.start, piece.stop)
            for at, part in wanted
            if (common := intersection(held, part)) is not None
        ]
        if not found:
            return
        path = self.folder / piece.file
        try:
            with open(path, "rb") as file:
                if int.from_bytes(file.read(8), "little") > _MAX_HEADER:
                    raise ValueError("its header is too large")
            with safetensors.safe_open(path, framework="np") as stored:
                values = stored.get_slice(piece.key)
                for at, part, held_at, held, common in found:
                    first, near = enclosing(held, common)
                    first += held_at
                    read = values[first : first + volume(near)].reshape(sizes(near))
                    target = out[at : at + volume(part)].reshape(sizes(part))
                    target[region(part, common)] = read[region(near, common)]
        except Exception as error:  # the library raises many kinds for a file that is not its own
            raise self._damaged(f"{piece.file} cannot be read ({error})") from None

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All logical tensors by name, in the order of the names, one in memory at a time."""
        if not self._verified:
            self.verify()
        for name, (shape, _) in self.shapes().items():
            yield name, self.read(name, whole_box(shape), 0, math.prod(shape)).reshape(shape)

    def digest(self) -> dict[str, str]:
        """SHA-256 of each logical tensor (name, dtype, shape, bytes), and of all of them as "all"."""
        if not self._verified:
            self.verify()
        digests = {}
        for name, (shape, dtype) in self.shapes().items():
            digest = hashlib.sha256(f"{name} {dtype} {shape}".encode())
            size = math.prod(shape)
            for at in range(0, size, _BLOCK):
                part = self.read(name, whole_box(shape), at, min(at + _BLOCK, size))
                digest.update(part.data)
            digests[name] = digest.hexdigest()
        lines = "".join(f"{n} {d}\n" for n, d in digests.items()).encode()
        digests["all"] = hashlib.sha256(lines).hexdigest()
        return digests
