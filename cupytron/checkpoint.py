"""Checkpoints: logical tensors in pieces, with a manifest that can prove them whole.

A folder holds safetensors files and `manifest.json`. A piece is (tensor, box in the logical tensor, flat
range within that box), stored one-dimensional, so that any mesh can write its shards and any other can
read them. The manifest has the size and SHA-256 of every file, and of itself; it is written last, and the
folder gets its name last of all. Nothing here is a pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from cupytron.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST = 64 << 20  # bytes; a larger one is no manifest of ours
_MAX_HEADER = 16 << 20  # a hostile safetensors header costs 16 times its size in memory
_BLOCK = 1 << 20
_DTYPES = {"float32": "F32", "float64": "F64"}


class Piece(NamedTuple):
    """A one-dimensional part of a logical tensor.

    tensor: its name, such as "weight/blocks.0.mlp.up.weight"; shape: of the logical tensor;
    box: (start, stop) for each dim; start, stop: flat range within the box; values: (stop - start,).
    """

    tensor: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    start: int
    stop: int
    values: Any


def write(folder: Path, pieces: Iterable[Piece], about: dict[str, Any], rank: int = 0) -> None:
    """Write a checkpoint to `folder`, which appears complete or not at all.

    Args:
        folder: its final place; a folder that is there is replaced.
        pieces: all that this process holds.
        about: what else the manifest says (JSON values).

    Raises:
        CheckpointError: a value is not finite; nothing has been written under the final name.
        OSError: the disk is full, or may not be written.
    """
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        name = f"rank-{rank:05d}.safetensors"
        listed, file = _write_tensors(temporary / name, list(pieces))
        body = {
            **about,
            "format": FORMAT,
            "pieces": [{**entry, "file": name} for entry in listed],
            "files": {name: file},
        }
        _write_synced(temporary / MANIFEST, _seal(body))
        _sync_folder(temporary)
        replaced = _set_aside(folder)
        temporary.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Remove a checkpoint; killed half-way it leaves nothing that looks like one."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    trash = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        folder.rename(trash)
    return trash


def _write_tensors(path: Path, pieces: list[Piece]) -> tuple[list[dict], dict[str, Any]]:
    """A safetensors file, streamed: no second copy of the tensors in memory, hashed on the way.

    Format: https://huggingface.co/docs/safetensors, "Format".
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


def _seal(body: dict[str, Any]) -> bytes:
    return json.dumps({"body": body, "sha256": _body_hash(body)}, indent=1).encode()


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoint:
    """A checkpoint on disk whose manifest is whole; `verify` checks the files too.

    Raises:
        CheckpointError: it is missing or damaged, or a newer version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = self._read_manifest()
        try:
            self.step = int(self.about["step"])
            self.pieces = [_checked_piece(p) for p in self.about["pieces"]]
            self.files = {
                str(k): (int(f["bytes"]), str(f["sha256"])) for k, f in self.about["files"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._error(f"{MANIFEST} lacks or garbles {error}") from None
        self._verified = False

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {what}")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            if path.stat().st_size > _MAX_MANIFEST:
                raise self._error(f"{MANIFEST} is too large to be one")
            content = path.read_bytes()
            sealed = json.loads(content)
            body = sealed["body"]
            # byte for byte what we would have written: no change, however small, goes unseen
            whole = _seal(body) == content and sealed["sha256"] == _body_hash(body)
        except FileNotFoundError:
            raise self._error(f"{MANIFEST} is missing: not a complete checkpoint") from None
        except CheckpointError:
            raise
        except OSError as error:
            raise self._error(f"{MANIFEST} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._error(f"{MANIFEST} is damaged") from None
        if not whole:
            raise self._error(f"{MANIFEST} is damaged: it does not match its own SHA-256")
        if body.get("format") != FORMAT:
            raise self._error(
                f"format {body.get('format')} is not {FORMAT}, which this version reads; "
                "use the version of cupytron that wrote it"
            )
        return body

    def verify(self) -> None:
        """Compare every file with the manifest, byte for byte.

        Raises:
            CheckpointError: naming the first file that does not match.
        """
        for name, (size, expected) in self.files.items():
            path = self.folder / name
            try:
                if path.stat().st_size != size:
                    raise self._error(f"{name} has {path.stat().st_size} bytes in place of {size}")
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                raise self._error(f"{name} is missing") from None
            except OSError as error:
                raise self._error(f"{name} cannot be read ({error.strerror})") from None
            if found != expected:
                raise self._error(f"{name} is damaged: it does not match its SHA-256")
        for tensor, pieces in self._by_tensor().items():
            held = sum(stop - start for _, _, _, _, start, stop, *_ in pieces)
            if held != int(np.prod(pieces[0].shape)):
                raise self._error(f"{tensor} is not complete: {held} elements of {pieces[0].shape}")
        self._verified = True

    def _by_tensor(self) -> "dict[str, list[_Listed]]":
        tensors: dict[str, list[_Listed]] = {}
        for piece in self.pieces:
            tensors.setdefault(piece.tensor, []).append(piece)
        return tensors

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All logical tensors by name, in the order of the names, one in memory at a time."""
        if not self._verified:
            self.verify()
        for name, pieces in sorted(self._by_tensor().items()):
            yield name, self._assemble(pieces)

    def _assemble(self, pieces: "list[_Listed]") -> np.ndarray:
        whole = np.empty(pieces[0].shape, pieces[0].dtype)
        boxes: dict[tuple, np.ndarray] = {}
        for piece in pieces:
            shape = [b - a for a, b in piece.box]
            box = boxes.setdefault(piece.box, np.empty(int(np.prod(shape)), piece.dtype))
            box[piece.start : piece.stop] = self._read(piece)
        for place, box in boxes.items():
            region = whole[tuple(slice(a, b) for a, b in place)]
            region[...] = box.reshape(region.shape)
        return whole

    def _read(self, piece: "_Listed") -> np.ndarray:
        path = self.folder / piece.file
        try:
            with open(path, "rb") as file:
                if int.from_bytes(file.read(8), "little") > _MAX_HEADER:
                    raise ValueError("its header is too large")
            with safetensors.safe_open(path, framework="np") as file:
                return file.get_tensor(piece.key)
        except Exception as error:  # the library raises many kinds for a file that is not its own
            raise self._error(f"{piece.file} cannot be read ({error})") from None

    def digest(self) -> dict[str, str]:
        """SHA-256 of each logical tensor (name, dtype, shape, bytes), and of all of them as "all"."""
        digests = {}
        for name, array in self.tensors():
            head = f"{name} {array.dtype} {array.shape}".encode()
            digests[name] = hashlib.sha256(head + array.tobytes()).hexdigest()
        together = "".join(f"{n} {d}\n" for n, d in digests.items()).encode()
        digests["all"] = hashlib.sha256(together).hexdigest()
        return digests


class _Listed(NamedTuple):
    """A piece as the manifest lists it."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    box: tuple[tuple[int, int], ...]
    start: int
    stop: int
    file: str
    key: str


def _checked_piece(p: dict[str, Any]) -> _Listed:
    shape = tuple(int(n) for n in p["shape"])
    box = tuple((int(a), int(b)) for a, b in p["box"])
    start, stop = (int(n) for n in p["range"])
    inside = len(box) == len(shape) and all(
        0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True)
    )
    held = int(np.prod([b - a for a, b in box]))
    name = str(p["file"])
    if p["dtype"] not in _DTYPES or not inside or not 0 <= start <= stop <= held or "/" in name:
        raise ValueError(f"a piece of {p['tensor']}")
    return _Listed(str(p["tensor"]), shape, p["dtype"], box, start, stop, name, str(p["key"]))
