"""The CUDA sources: NVRTC, which needs no GPU, compiles all of them; wrappers ask for what they have."""

import ast
import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cupytron.kernels import loader

FOLDER = Path(loader.__file__).parent
WIDE = {"float32": 4, "float64": 2, "bfloat16": 8, "float16": 8}
# every type with both accesses for one architecture, with the wide one for those before and after
BUILDS = [("sm_90", dtype, vec) for dtype in WIDE for vec in (1, WIDE[dtype])]
BUILDS += [(arch, dtype, WIDE[dtype]) for arch in ("sm_80", "sm_100") for dtype in WIDE]
# files whose kernels differ with names that the wrapper defines, beside the defaults in the file
DEFINES = {
    "norm": [
        {"TEAM": 32, "PACKS": 3},
        {"TEAM": 128, "PACKS": 2},
        {"TEAM": 1024, "PACKS": 4},
        {"TEAM": 1024, "PACKS": 0},
    ],
    "attention": [{"CHUNKS": 2}, {"CHUNKS": 4}],
}


def kernels(file):
    """Names of a file's kernels."""
    text = re.sub(r"//.*", "", (FOLDER / f"{file}.cu").read_text())
    return re.findall(
        r'extern "C"\s+__global__\s+void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(', text
    )


def build(file, arch, dtype, vec, defines):
    """The machine code of one build."""
    from cuda import pathfinder
    from cupy.cuda import compiler

    program = compiler._NVRTCProgram(
        loader.source(file), f"{file}.cu", (), (), name_expressions=None, method="cubin"
    )
    headers = f"-I{pathfinder.find_nvidia_header_directory('cudart')}"
    own = ("-ftz=true", "--device-as-default-execution-space")  # CuPy's, for all that it compiles
    options = (*loader.options(dtype, vec, **defines), f"-arch={arch}", headers, *own)
    return program.compile(options, None)[0]


@pytest.mark.parametrize("file", loader.files())
def test_every_build_compiles(file):
    pytest.importorskip("cupy", reason="needs cupytron[cuda13] (or cuda12); no GPU")
    builds = [(*build, {}) for build in BUILDS]
    builds += [("sm_90", "bfloat16", 8, defines) for defines in DEFINES.get(file, [])]
    names = kernels(file)
    assert names
    with ThreadPoolExecutor(2) as pool:
        for code in pool.map(lambda one: build(file, *one), builds):
            missing = [name for name in names if name.encode() not in code]
            assert not missing


def asked_for():
    """(module, file, name or None, defined names) of each loader.function(...) in the wrappers."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "loader.function"):
                continue
            file, name = node.args[:2]
            constant = name.value if isinstance(name, ast.Constant) else None
            yield path, file.value, constant, [word.arg for word in node.keywords]


def test_wrappers_ask_for_kernels_that_exist():
    calls = list(asked_for())
    assert {file for _, file, _, _ in calls} == set(loader.files())
    for path, file, name, defined in calls:
        assert name is None or name in kernels(file), f"{path.name}: {file}.cu has no {name}"
        text = (FOLDER / f"{file}.cu").read_text()
        for word in defined:
            assert word in ("vec", "dtype") or re.search(rf"\b{word}\b", text), (
                f"{path.name}: {word}"
            )


def test_every_kernel_is_asked_for():
    for file in loader.files():
        strings = {
            node.value
            for path in {path for path, other, _, _ in asked_for() if other == file}
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
        }
        assert set(kernels(file)) <= strings


def test_wrappers_have_the_constants_of_the_sources():
    """What is written in both languages: WARPS in x.cu is _WARPS in x.py."""
    compared = []
    for file in loader.files():
        module = importlib.import_module(f"cupytron.kernels.{file}")
        text = (FOLDER / f"{file}.cu").read_text()
        for name, value in re.findall(r"^constexpr int (\w+) = (\d+);", text, re.MULTILINE):
            if hasattr(module, f"_{name}"):
                compared.append((file, name))
                assert getattr(module, f"_{name}") == int(value), f"{file}: {name}"
    assert ("sums", "WARPS") in compared
