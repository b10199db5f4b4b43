"""The states that a disk may be in after a loss of power, given the calls before it.

A program's calls change the kernel's picture of a folder at once, and the disk some time later. Only fsync
gives order: a file's bytes are on the disk once that file was synced, its name once its folder was. This
model replays a log of calls (shim.c) and yields states that the disk may be in after each of them.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from syscalls.shim import Call

ROOT = 0  # the number of the root folder's node

Key = tuple[int, str]  # the number of a folder's node, and a name in it
State = dict[str, bytes | None]  # a file's bytes by its path; None: a folder


@dataclass
class _File:
    """A file's bytes as the kernel sees them, and as they surely are on the disk (None: never synced)."""

    data: bytes = b""
    synced: bytes | None = None


class _Change(NamedTuple):
    """A change of names, which a disk makes as a whole or not at all: the new node of each name."""

    names: dict[Key, int | None]


Content = Callable[[_File], bytes]


@dataclass
class Disk:
    """The kernel's picture of a root folder, and what has surely reached the disk.

    Attributes:
        files: by the number of their node; folders have a number only.
        names: as the kernel sees them.
        on_disk: the names that are surely on the disk.
        pending: changes that may not have reached it, the oldest first.
    """

    root: str
    files: dict[int, _File] = field(default_factory=dict)
    names: dict[Key, int] = field(default_factory=dict)
    on_disk: dict[Key, int] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)
    _last: int = ROOT

    @classmethod
    def of(cls, root: Path) -> "Disk":
        """A disk that surely holds everything in a folder."""
        disk = cls(str(root))
        for path in sorted(root.rglob("*")):
            folder, name = disk._key(str(path))
            disk._last += 1
            disk.names[folder, name] = disk._last
            if not path.is_dir():
                content = path.read_bytes()
                disk.files[disk._last] = _File(content, content)
        disk.on_disk = dict(disk.names)
        return disk

    def apply(self, call: Call) -> None:
        """Apply a call that has succeeded to the kernel's picture and the disk."""
        kind = call.kind
        if kind == "mkdir":
            self._create(call.path)
        elif kind == "open":
            self._open(call)
        elif kind in ("unlink", "rmdir"):
            self._change({self._key(call.path): None})
        elif kind == "rename":
            one, other = self._key(call.path), self._key(call.other)
            self._change({other: self.names[one], one: None})
        elif kind == "exchange":
            one, other = self._key(call.path), self._key(call.other)
            self._change({other: self.names[one], one: self.names[other]})
        elif kind == "fsync":
            self._sync(self._node(call.path))
        elif kind == "write":
            self._write(self.files[self._node(call.path)], call)
        elif kind in ("ftruncate", "truncate"):
            file = self.files[self._node(call.path)]
            file.data = file.data[: call.offset].ljust(call.offset, b"\0")
        elif kind != "close":
            raise NotImplementedError(f"{kind}: the model knows no such call")

    def _open(self, call: Call) -> None:
        if self._key(call.path) not in self.names:
            self.files[self._create(call.path)] = _File()
        elif call.offset & os.O_TRUNC:
            self.files[self._node(call.path)].data = b""

    def _write(self, file: _File, call: Call) -> None:
        if len(call.data) != call.result:
            raise NotImplementedError(f"a write to {call.path} without its bytes")
        before = file.data.ljust(call.offset, b"\0")
        file.data = before[: call.offset] + call.data + before[call.offset + call.result :]

    def _create(self, path: str) -> int:
        self._last += 1
        self._change({self._key(path): self._last})
        return self._last

    def _change(self, names: dict[Key, int | None]) -> None:
        _apply(self.names, names)
        self.pending.append(_Change(names))

    def _sync(self, node: int) -> None:
        if node in self.files:
            self.files[node].synced = self.files[node].data
            return
        chosen = self._with_earlier(
            number
            for number, change in enumerate(self.pending)
            if any(folder == node for folder, _ in change.names)
        )
        for number in sorted(chosen):
            _apply(self.on_disk, self.pending[number].names)
        self.pending = [c for number, c in enumerate(self.pending) if number not in chosen]

    def _with_earlier(self, numbers: Iterable[int]) -> set[int]:
        """These pending changes, and all earlier ones of the same names, since those keep their order."""
        wanted, chosen, names = set(numbers), set[int](), set[Key]()
        for number in reversed(range(len(self.pending))):
            change = self.pending[number].names
            if number in wanted or not names.isdisjoint(change):
                chosen.add(number)
                names.update(change)
        return chosen

    def _node(self, path: str) -> int:
        node = ROOT
        for name in Path(os.path.relpath(path, self.root)).parts:
            node = self.names[node, name]
        return node

    def _key(self, path: str) -> Key:
        return self._node(os.path.dirname(path)), os.path.basename(path)

    # states

    def states(self, draw: random.Random, subsets: int) -> Iterator[tuple[str, State]]:
        """Yield states that the disk may be in now, each with words that say how.

        Args:
            draw: chooses lengths and changes at random.
            subsets: number of states with only some of the pending changes.
        """
        everything = set(range(len(self.pending)))
        cut, zeros = (lambda file: _cut(file, draw)), (lambda file: _zeros(file, draw))
        yield "only what was synced", self._state(set(), _synced)
        yield "only what was synced, files in part", self._state(set(), cut)
        yield "all names, files as synced", self._state(everything, _synced)
        yield "all names, files in part", self._state(everything, cut)
        yield "all names, files with zeros", self._state(everything, zeros)
        for _ in range(subsets if everything else 0):
            some = {number for number in everything if draw.random() < 0.5}
            kinds: list[Content] = [_synced, cut, zeros, _whole]

            def any_of(file: _File, kinds: list[Content] = kinds) -> bytes:
                return draw.choice(kinds)(file)

            yield "some names", self._state(self._with_earlier(some), any_of)

    def _state(self, chosen: set[int], content: Content) -> State:
        names = dict(self.on_disk)
        for number in sorted(chosen):
            _apply(names, self.pending[number].names)
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in names.items():
            inside.setdefault(folder, []).append((name, node))
        state: State = {}

        def visit(folder: int, place: str) -> None:
            for name, node in sorted(inside.get(folder, [])):
                path = f"{place}{name}"
                if node in self.files:
                    state[path] = content(self.files[node])
                else:
                    state[path] = None
                    visit(node, f"{path}/")

        visit(ROOT, "")
        return state


def _apply(names: dict[Key, int], change: dict[Key, int | None]) -> None:
    for key, node in change.items():
        if node is None:
            names.pop(key, None)
        else:
            names[key] = node


def _whole(file: _File) -> bytes:
    return file.data


def _synced(file: _File) -> bytes:
    return file.synced or b""


def _kept(file: _File) -> int:
    """The number of bytes that are surely there: a file that has only grown keeps its beginning."""
    synced = _synced(file)
    return len(synced) if file.data.startswith(synced) else 0


def _cut(file: _File, draw: random.Random) -> bytes:
    """The bytes up to some length."""
    return file.data[: draw.randint(_kept(file), len(file.data))]


def _zeros(file: _File, draw: random.Random) -> bytes:
    """All bytes, but zeros from somewhere on, for blocks that were never written."""
    return _cut(file, draw).ljust(len(file.data), b"\0")


def write_state(state: State, root: Path) -> None:
    """Make an empty folder hold a state."""
    for name, content in state.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def state_hash(state: State) -> str:
    """A hash that is the same for equal states."""
    digest = hashlib.sha256()
    for name, content in state.items():
        kind = "folder" if content is None else hashlib.sha256(content).hexdigest()
        digest.update(f"{name}\0{kind}\0".encode())
    return digest.hexdigest()
