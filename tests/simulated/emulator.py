"""RawModule and RawKernel: CUDA C++ compiled by g++ and run on the CPU (see include/launch.h)."""

import ctypes
import functools
from typing import Any

from simulated import arguments, blocks, cuda_source, races, state, streams
from simulated.array import ndarray
from simulated.blocks import Block
from simulated.errors import CUDADriverError


class RawModule:
    """As cupy.RawModule, for sources of extern "C" kernels."""

    def __init__(
        self,
        *,
        code: str | None = None,
        path: str | None = None,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Any = None,
        jitify: bool = False,
    ) -> None:
        if (code is None) == (path is None):
            raise TypeError("Exactly one of `code` and `path` keyword arguments must be given.")
        if path is not None or name_expressions or enable_cooperative_groups:
            raise NotImplementedError(
                "the simulated GPU compiles `code` without name_expressions only"
            )
        if not isinstance(options, tuple):
            raise TypeError(f"options has to be a tuple of strings, not {options!r}")
        self.code, self.options, self.backend = code, options, backend
        self.file_path, self.name_expressions = None, None
        self.enable_cooperative_groups = False

    def compile(self, log_stream: Any = None) -> None:
        assert self.code is not None
        cuda_source.load(self.code, self.options)

    def get_function(self, name: str) -> "RawKernel":
        assert self.code is not None
        library = cuda_source.load(self.code, self.options)
        if name not in library.kernels:
            raise CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        return RawKernel(self.code, name, self.options)

    def get_global(self, name: str) -> Any:
        raise NotImplementedError("the simulated GPU has no get_global")


class RawKernel:
    """As cupy.RawKernel."""

    max_threads_per_block = property(lambda self: self._row()[1])
    shared_size_bytes = property(lambda self: self._library.dll.sim_shared_bytes())
    num_regs = local_size_bytes = const_size_bytes = 0

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        *,
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        jitify: bool = False,
    ) -> None:
        self.code, self.name, self.options, self.backend = code, name, options, backend
        self.max_dynamic_shared_size_bytes = 48 << 10
        self.preferred_shared_memory_carveout = -1

    @functools.cached_property
    def _library(self) -> cuda_source.Library:
        return cuda_source.load(self.code, self.options)

    def _row(self) -> tuple[int, int, list[str]]:
        if self.name not in self._library.kernels:
            raise CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        return self._library.kernels[self.name]

    def compile(self, log_stream: Any = None) -> None:
        self._row()

    def __call__(
        self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, stream: Any = None
    ) -> None:
        number, most, parameters = self._row()
        grid3, block3 = arguments.three(grid, "grid"), arguments.three(block, "block")
        self._check_sizes(grid3, block3, shared_mem, most)
        if len(args) != len(parameters):
            raise TypeError(
                f"{self.name} takes {len(parameters)} arguments ({' '.join(parameters)}), got {len(args)}"
            )
        reads, writes, values = [], [], []
        for place, (argument, parameter) in enumerate(zip(args, parameters, strict=True)):
            values.append(arguments.value(self.name, place, argument, parameter))
            used = reads if parameter[0] == "c" else writes
            if isinstance(argument, ndarray):
                used.append(argument)
            elif parameter[0] in "cp" and int(argument) != 0:
                used.append(blocks.find(int(argument), 1))
        checked = {id(block): block for block, *_ in races.spans([*reads, *writes], True)}
        sizes = (ctypes.c_uint * 3)(*grid3), (ctypes.c_uint * 3)(*block3), ctypes.c_uint(shared_mem)
        buffers = [ctypes.create_string_buffer(value, max(8, len(value))) for value in values]
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*(ctypes.addressof(b) for b in buffers))

        def action(keep_alive: Any = buffers) -> None:
            self._launch(number, sizes, pointers, list(checked.values()))

        streams.issue(self.name, action, reads, writes, stream, kind="launch")

    def _check_sizes(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared: int, most: int
    ) -> None:
        threads = block[0] * block[1] * block[2]
        invalid = "CUDA_ERROR_INVALID_VALUE: invalid argument"
        if min(grid) < 1 or min(block) < 1:
            raise CUDADriverError(f"{invalid}: {self.name} with grid {grid}, block {block}")
        if grid[0] > 2**31 - 1 or max(grid[1:]) > 65535:
            raise CUDADriverError(f"{invalid}: grid {grid} of {self.name}; y and z go up to 65535")
        if threads > 1024 or block[2] > 64:
            raise CUDADriverError(
                f"{invalid}: block {block} of {self.name}; 1024 threads, z up to 64"
            )
        if threads > most:
            raise CUDADriverError(
                f"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: {self.name} has __launch_bounds__({most}), "
                f"block {block}"
            )
        if self.max_dynamic_shared_size_bytes > 227 << 10:
            raise CUDADriverError(
                f"{invalid}: max_dynamic_shared_size_bytes {self.max_dynamic_shared_size_bytes} > 227 KiB"
            )
        if shared > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError(
                f"{invalid}: shared_mem={shared} of {self.name}; set max_dynamic_shared_size_bytes "
                "for more than 48 KiB"
            )

    def _launch(self, number: int, sizes: Any, pointers: Any, blocks: list[Block]) -> None:
        simulation, dll = state.sim(), self._library.dll
        with simulation.lock:
            failed = dll.sim_launch(
                number, sizes[0], sizes[1], sizes[2], pointers, simulation.reverse()
            )
            if failed:
                raise CUDADriverError(f"{self.name}: {self._library.error()}")
            shared = dll.sim_shared_bytes()
        if shared > 48 << 10:
            raise CUDADriverError(
                f"{self.name}: {shared} bytes of __shared__ arrays; 48 KiB at most"
            )
        for block in blocks:
            fault = block.broken()
            if fault:
                raise CUDADriverError(f"{self.name} wrote {fault}")
