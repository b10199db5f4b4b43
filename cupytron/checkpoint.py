"""Checkpoints: logical tensors in pieces, with a manifest that can prove them whole.

A folder holds safetensors files, one a rank, and `manifest.json`. A piece is (tensor, box in the logical
tensor, flat range within that box), stored one-dimensional, so that any mesh can write its shards and any
other can read them; no rank ever holds the whole model. Each file lists its own pieces in its header. The
manifest has each file's size, its SHA-256 and the SHA-256 of its header, and a SHA-256 of its own body. It
is the last file to be written, and then the folder gets its name. Nothing here is a pickle.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupytron.checkpoint_files import CheckpointFiles
from cupytron.checkpoint_folders import discard, put_in_place, recover
from cupytron.checkpoint_format import (
    FORMAT,
    Box,
    Piece,
    enclosing,
    fits,
    intersection,
    rectangles,
    region,
    sizes,
    volume,
    whole_box,
    write_tensors,
)
from cupytron.comm import Communicator, SelfCommunicator
from cupytron.durable import sync_folder, sync_parents, write_synced
from cupytron.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from cupytron.launcher import named
from cupytron.manifest import MANIFEST, MAX_BYTES, read_manifest, seal
from cupytron.piece_table import Pieces, PieceTable, by_tensor, merged, untiled
from cupytron.together import alike, together

__all__ = ["Checkpoint", "Piece", "discard", "recover", "write"]

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
        pieces: those that this rank writes, perhaps none; each element comes from one rank only.
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
        parts = world.collect_objects(
            together(world, lambda: _write_part(temporary, list(pieces), world.rank))
        )
        together(world, lambda: _finish(temporary, folder, about, parts) if first else None)
    except BaseException as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):
            # every rank comes here; none may end the job before rank 0 has removed the folder
            world.barrier()
        raise


def _make_afresh(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_part(temporary: Path, pieces: list[Piece], rank: int) -> dict[str, dict[str, Any]]:
    """Write a rank's file, if it has pieces; returns {its name: the manifest's entry for it}."""
    if not temporary.is_dir():
        raise _not_shared(temporary.parent)
    if not pieces:
        return {}
    path = temporary / f"rank-{rank:05d}.safetensors"
    return {path.name: write_tensors(path, pieces)}


def _finish(
    temporary: Path, folder: Path, about: dict[str, Any], parts: list[dict[str, dict[str, Any]]]
) -> None:
    files = {name: file for part in parts for name, file in part.items()}
    for name, file in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise _not_shared(temporary.parent)
    content = seal({**about, "format": FORMAT, "files": files})
    if len(content) > MAX_BYTES:
        raise CheckpointError(
            f"{folder}: {MANIFEST} would have {len(content)} bytes for {len(files)} files; a reader "
            f"takes at most {MAX_BYTES}; save from fewer ranks"
        )
    write_synced(temporary / MANIFEST, content)
    try:
        Checkpoint(temporary)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: was not saved, since nobody could read it: {error}"
        ) from None
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

    Its lists of pieces are read when they are first needed: many checkpoints are opened for `about` alone.

    Attributes:
        folder: where it stands.
        about: the manifest's body.
        sha256: of the manifest's body, in hexadecimal digits.
        identity: of the manifest's file, as in Manifest.
        step: the step that it was saved after.
        files: (bytes, SHA-256) of each file by its name.

    Raises:
        DamagedCheckpoint: its own files prove it damaged or incomplete.
        UnreadableCheckpoint: it cannot be read now, or a newer version wrote it.
        GoneCheckpoint: it is not there, or it was removed or replaced while it was read.
        Each method may raise these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        self.about, self.sha256 = manifest.body, manifest.sha256
        version = self.about.get("format")
        if type(version) is int and version > FORMAT:
            raise UnreadableCheckpoint(
                f"{folder}: format {version} is newer than {FORMAT}, the newest that this version of "
                "cupytron reads; use the version that wrote it"
            )
        if type(version) is not int or version < 1:
            raise DamagedCheckpoint(f"{folder}: {MANIFEST} has a missing or wrong entry: 'format'")
        self._files = CheckpointFiles(folder, manifest)
        self.files = {
            name: (int(f["bytes"]), str(f["sha256"])) for name, f in self.about["files"].items()
        }
        try:
            self.step = int(self.about["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._files.damaged(f"{MANIFEST} has a missing or wrong entry: {error}") from None
        self._tensors: dict[str, Pieces] | None = None  # None: no list has been read yet
        self._tiled: set[str] = set()  # tensors whose pieces have been compared
        self._verified = False

    @property
    def identity(self) -> tuple[int, int, int]:
        """The manifest's file: ranks with the same identity look at the same file, not at two copies."""
        return self._files.identity

    def hold(self) -> None:
        """Open all files now, if they are few: then it can be read though it is removed or replaced."""
        self._files.hold()

    def verify(self, world: Communicator | None = None) -> None:
        """Compare every file with the manifest, byte for byte. Collective over `world`.

        Ranks that see the same files share the work; a copy that only some ranks see is hashed by those.
        Afterwards every rank knows where all pieces are, and `read` needs no more headers.

        Args:
            world: ranks that share the work, a file each in turn; None: this process alone.

        Raises:
            CheckpointError: a file, which is named, does not match, or a rank sees another checkpoint; the
                same on every rank.
        """
        world = world or SelfCommunicator()
        self._check_same(world)
        sharing = alike(world, self.identity)
        numbers = range(sharing.index(world.rank), len(self._files), len(sharing))
        table = together(world, lambda: self._files.verify(numbers))
        # the lists of one copy are enough: the manifest's hashes have proved all copies alike
        tables = world.gather_objects(table if sharing[0] == 0 else None)
        together(world, lambda: self._take([t for t in tables if t is not None]))
        names = list(self._by_tensor())[world.rank :: world.size]
        together(world, lambda: self._check_all_tiled(names))
        self._tiled.update(self._by_tensor())
        self._verified = True

    def _check_same(self, world: Communicator) -> None:
        seen = world.gather_objects((named(world.rank), self.sha256))
        other = next((name for name, sha256 in seen if sha256 != seen[0][1]), None)
        if other is not None:
            raise CheckpointError(
                f"{other} sees another checkpoint of step {self.step} than rank 0 in "
                f"{self.folder}; put the run's folder on a file system that all ranks share"
            )

    def _take(self, tables: list[PieceTable]) -> None:
        try:
            self._tensors = by_tensor(merged(tables))
        except ValueError as error:
            raise self._files.damaged(f"{error}") from None

    def _by_tensor(self) -> dict[str, Pieces]:
        if self._tensors is None:
            self._take([self._files.table(range(len(self._files)))])
        assert self._tensors is not None
        return self._tensors

    def _check_all_tiled(self, tensors: Iterable[str]) -> None:
        for tensor in tensors:
            self._check_tiled(tensor)

    def _check_tiled(self, tensor: str) -> None:
        if tensor in self._tiled:
            return
        if wrong := untiled(tensor, self._by_tensor()[tensor]):
            raise self._files.damaged(wrong)
        self._tiled.add(tensor)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each logical tensor, in the order of the names."""
        return {name: (p.shape, np.dtype(p.dtype)) for name, p in self._by_tensor().items()}

    def read(self, tensor: str, box: Box, start: int, stop: int) -> np.ndarray:
        """Elements start ... stop - 1 of a box of a logical tensor, however it was cut into pieces.

        Only pieces with such elements are read, one at a time. Files are not compared with their hashes;
        `verify` does that.

        Args:
            tensor: its name.
            box: (start, stop) for each dim.
            start, stop: flat range within the box.

        Returns: (stop - start,), in the tensor's dtype.

        Raises:
            CheckpointError: there is no such tensor or part, or a file cannot be read.
        """
        pieces = self._by_tensor().get(tensor)
        if pieces is None:
            raise CheckpointError(f"{self.folder}: it has no tensor {tensor}")
        if not fits(box, pieces.shape) or not 0 <= start <= stop <= volume(box):
            raise CheckpointError(
                f"{self.folder}: {tensor} of shape {pieces.shape} has no elements {start}:{stop} of {box}"
            )
        self._check_tiled(tensor)
        out = np.empty(stop - start, pieces.dtype)
        wanted = list(rectangles(box, start, stop))
        for number in pieces.near(box, start, stop):
            self._copy(pieces, int(number), wanted, out)
        self._files.check_still_there()
        return out

    def _copy(
        self, pieces: Pieces, number: int, wanted: list[tuple[int, Box]], out: np.ndarray
    ) -> None:
        """Copy the elements that a piece and the wanted rectangles have in common to `out`.

        Args:
            pieces: the tensor's pieces.
            number: the index of one of them.
            wanted: (where in `out` it begins, box) of each rectangle.
            out: one-dimensional, all wanted elements.
        """
        box = tuple((int(a), int(b)) for a, b in pieces.boxes[number])
        begin, end = map(int, pieces.ranges[number])
        for held_at, held in rectangles(box, begin, end):
            for at, part in wanted:
                common = intersection(held, part)
                if common is None:
                    continue
                first, near = enclosing(held, common)
                values = np.empty(volume(near), out.dtype)
                offset = int(pieces.offsets[number]) + (held_at + first) * out.itemsize
                self._files.read(int(pieces.files[number]), offset, values)
                target = out[at : at + volume(part)].reshape(sizes(part))
                target[region(part, common)] = values.reshape(sizes(near))[region(near, common)]

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
