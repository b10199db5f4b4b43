"""CUDA sources to loaded libraries: rewritten for g++, compiled once for a checkout."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from simulated.errors import CompileException

_INCLUDE = Path(__file__).parent / "include"
# No fused multiply-adds; a pointer that is not aligned for its type, and an index behind the end of an
# array, end in an illegal instruction, which launch.h reports.
_FLAGS = (
    "-O1 -g1 -fPIC -shared -w -x c++ -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off "
    "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error"
).split()

_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_DYNAMIC = re.compile(
    r"\bextern\s+__shared__\s+(?:__align__\([^)]*\)|alignas\([^)]*\))?\s*([\w:<>,\s]+?)\s*(\w+)\s*\[\s*\]\s*;"
)
_SHARED = re.compile(r"\b(?:static\s+)?__shared__\s+([^;=]+);")
_ALIGN = re.compile(r"(?:__align__|alignas)\s*\((?:[^()]|\([^()]*\))*\)")
_BOUNDS = r"(?:__launch_bounds__\s*\((?P<{}>(?:[^(),]|\([^()]*\))+)[^)]*\)\s*)?"
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+'
    + (_BOUNDS.format("a") + r"void\s+" + _BOUNDS.format("b"))
    + r"(?P<name>\w+)\s*\("
)


def rewrite(source: str) -> tuple[str, list[tuple[str, str]]]:
    """What g++ gets in the place of a CUDA source, and the kernels' names and launch bounds."""
    keep_lines = lambda m: m[0] if m[0][0] == '"' else " " + "\n" * m[0].count("\n")  # noqa: E731
    text = _COMMENT.sub(keep_lines, source)
    kernels = [(m["name"], (m["a"] or m["b"] or "1024").strip()) for m in _KERNEL.finditer(text)]
    if len(kernels) != len(re.findall(r"\b__global__\b", text)):
        raise NotImplementedError(
            'the simulated GPU finds kernels by their text: write each as extern "C" __global__ void NAME('
        )
    # names of their own: the C library knows functions that a GPU does not
    text = _KERNEL.sub(
        lambda m: f"{m[0][: m.start('name') - m.start()]}sim_kernel_{m['name']}(", text
    )
    text = _DYNAMIC.sub(r"\1* \2 = reinterpret_cast<\1*>(sim::shared_memory);", text)
    text = _SHARED.sub(lambda match: _shared(match[1]), text)
    rows = "".join(
        f'    {{"{name}", int({bound}), &sim::Entry<&sim_kernel_{name}>::run, '
        f"&sim::Entry<&sim_kernel_{name}>::parameters}},\n"
        for name, bound in kernels
    )
    export = 'extern "C" __attribute__((visibility("default")))'
    return (
        f'#include "cuda_on_cpu.h"\n#line 1 "kernel.cu"\n{text}\n#line 1 "launches"\n'
        f"static const sim::Kernel sim_kernels[] = {{\n{rows}}};\n"
        f"{export} const sim::Kernel* sim_table() {{ return sim_kernels; }}\n"
        f"{export} int sim_launch(int n, const unsigned* grid, const unsigned* block, unsigned shared, "
        "void** arguments, int reverse) {\n"
        "    return sim::launch(sim_kernels[n].run, grid, block, shared, arguments, reverse);\n}\n"
        f"{export} void* sim_make_stacks() {{ return sim::make_stacks(); }}\n"
        f"{export} void sim_use_stacks(void* m) {{ sim::stack_memory = static_cast<char*>(m); }}\n"
        f"{export} const char* sim_message() {{ return sim::message; }}\n"
        f"{export} void* sim_fault() {{ return sim::fault_address; }}\n"
        f"{export} unsigned long sim_shared_bytes() {{ return sim::shared_most; }}\n"
    ), kernels


def _shared(declaration: str) -> str:
    """`float a[32], b[4]` of shared memory as references into a block's arena."""
    declaration = _ALIGN.sub("", declaration).strip()
    parts, depth = [""], 0
    for char in declaration:
        depth += (char in "<[(") - (char in ">])")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    first = re.match(r"(.*?)\s*\b(\w+)\s*((?:\[[^]]*\]\s*)*)$", parts[0], re.DOTALL)
    if first is None:
        raise NotImplementedError(
            f"the simulated GPU does not read this: __shared__ {declaration};"
        )
    kind = first[1]
    text = ""
    for part in [parts[0][first.start(2) :], *parts[1:]]:
        name, dims = re.match(r"\s*(\w+)\s*(.*)$", part, re.DOTALL).groups()
        text += f"static sim::Slot sim_slot_{name}; auto& {name} = sim_slot_{name}.get<{kind}{dims}>(); "
    return text


@functools.cache
def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise FileNotFoundError("the simulated GPU needs a C++ compiler: install g++, or set CXX")


@functools.cache
def _environment() -> str:
    """What else decides about the result: the compiler and the headers."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
    headers = "".join(path.read_text() for path in sorted(_INCLUDE.iterdir()))
    return f"{version}{headers}{_FLAGS}"


def _folder() -> Path:
    folder = Path(__file__).parents[2] / "build" / "simulated-gpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # somebody else's checkout
        return _temporary()
    return folder if os.access(folder, os.W_OK) else _temporary()


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="simulated-gpu-"))


def build(source: str, options: tuple[str, ...], log: Any = None) -> Path:
    """The shared library of a source, compiled once for a checkout."""
    text, _ = rewrite(source)
    flags = [option for option in options if option.startswith(("-D", "-U", "-std", "--std"))]
    key = hashlib.sha256("\0".join([text, *flags, _environment()]).encode()).hexdigest()[:32]
    library = _folder() / f"{key}.so"
    if not library.exists():
        own = library.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}")
        command = [_compiler(), *_FLAGS, *flags, f"-I{_INCLUDE}", "-o", str(own), "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if log is not None:
            log.write(done.stderr)
        if done.returncode != 0:
            said = done.stderr or f"{command[0]} ended with {done.returncode}"
            own.unlink(missing_ok=True)
            raise CompileException(said, source, "kernel.cu", tuple(options))
        own.replace(library)  # several processes may do this at once
    return library


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("most_threads", ctypes.c_int),
        ("run", ctypes.c_void_p),
        ("parameters", ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t)),
    ]


class Library:
    """A loaded shared library and its table of kernels."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.dll = ctypes.CDLL(str(path))
        self.dll.sim_table.restype = ctypes.POINTER(_Kernel)
        self.dll.sim_message.restype = ctypes.c_char_p
        self.dll.sim_fault.restype = ctypes.c_void_p
        self.dll.sim_shared_bytes.restype = ctypes.c_ulong
        self.dll.sim_make_stacks.restype = ctypes.c_void_p
        self.dll.sim_use_stacks.argtypes = [ctypes.c_void_p]
        self.dll.sim_use_stacks(self._stacks())
        table = self.dll.sim_table()
        self.kernels: dict[str, tuple[int, int, list[str]]] = {}
        for number in range(count):
            row = table[number]
            room = ctypes.create_string_buffer(4096)
            row.parameters(ctypes.cast(room, ctypes.c_char_p), len(room))
            self.kernels[row.name.decode()] = (
                number,
                row.most_threads,
                room.value.decode().split(),
            )

    _made: ClassVar[list[int]] = []

    def _stacks(self) -> int:
        """Memory for the stacks of simulated threads, the same for all libraries."""
        if not self._made:
            made = self.dll.sim_make_stacks()
            if made is None:
                raise MemoryError("there is no memory for the stacks of the simulated threads")
            self._made.append(made)
        return self._made[0]

    def error(self) -> str:
        text = self.dll.sim_message().decode()
        fault = self.dll.sim_fault()
        return text + (self._line(fault) if fault else "")

    def _line(self, address: int) -> str:
        """Where in the source an instruction stands, if there is addr2line."""
        tool = shutil.which("addr2line")
        start = next(
            (
                int(row.split("-")[0], 16)
                for row in Path("/proc/self/maps").read_text().splitlines()
                if row.endswith(str(self.path))
            ),
            None,
        )
        if tool is None or start is None:
            return ""
        command = [tool, "-i", "-s", "-e", str(self.path), hex(address - start)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return f" at {' in '.join(lines)}" if lines else ""


@functools.cache
def load(source: str, options: tuple[str, ...]) -> Library:
    return Library(build(source, options), len(rewrite(source)[1]))
