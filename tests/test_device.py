"""Which device a command takes, and what it says where there is no GPU; CuPy only where it is asked for."""

import subprocess
import sys

import pytest
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import gpu, mesh_run, ops
from cupytron.backend import CPU
from cupytron.comm import run_ranks
from cupytron.config import load_config
from cupytron.errors import CupytronError

TINY = ["--set", "model.vocab_size=65", "--set", "model.num_layers=1", "--steps", "1"]


def command(*words, before=""):
    code = f"import sys\n{before}\nfrom cupytron.cli.main import run\nrun({list(words)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(gpu.present(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ("sys.modules['cupy'] = None", "CuPy cannot be imported"),
        ("", ("CuPy cannot be imported", "CUDA cannot be used", "the driver shows no GPU")),
    ],
    ids=["no CuPy", "as it is here"],
)
def test_a_gpu_that_is_not_there_is_one_line(before, wanted):
    done = command("bench", "--device", "cuda", *TINY, before=before)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --device cuda: ")
    assert any(text in line for text in ((wanted,) if isinstance(wanted, str) else wanted))
    assert "--device cpu" in line
    assert not done.stdout


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.skipif(gpu.present(), reason="there is a GPU")
def test_the_cpu_never_imports_cupy(device):
    check = "import atexit; atexit.register(lambda: print('cupy' in sys.modules))"
    done = command("bench", "--device", device, *TINY, before=check)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def config(*more):
    return load_config(overrides=["model.vocab_size=65", "parallel.device=cuda", *more])


@pytest.fixture
def cupy():
    with simulated_libraries(), simulated_gpu() as module:
        yield module
    ops.use(None)


@pytest.mark.parametrize(("rank", "number"), [(0, 0), (1, 1), (2, 0)])
def test_ranks_take_the_gpus_of_their_node_in_turn(cupy, monkeypatch, rank, number):
    cupy.sim.device_count = 2
    monkeypatch.setattr(gpu, "local_rank", lambda: rank)
    assert gpu.open_device("cuda").number == number


def test_the_start_names_devices_and_precision(cupy):
    def body(world):
        settings = config("train.compute_dtype=bfloat16", "parallel.dp=2", "train.global_batch=24")
        context = mesh_run.open_mesh(settings, world)
        return list(mesh_run.describe(settings, context))

    lines, _ = run_ranks(2, body)
    assert lines[0] == ("cuda:0 (Simulated GPU), computing in bfloat16, weights in float32")
    assert lines[1].startswith("GPUs by local rank: rank 0 cuda:0, rank 1 cuda:0; ")
    assert "through the host's memory" in lines[1]


def test_an_old_cupy_is_refused(cupy, monkeypatch):
    monkeypatch.setattr(cupy, "__version__", "13.6.0", raising=False)
    with pytest.raises(CupytronError, match=r"CuPy 13\.6\.0 is too old"):
        gpu.open_device("cuda")


def test_no_gpu_in_the_driver_is_named(cupy):
    cupy.sim.device_count = 0
    with pytest.raises(CupytronError, match="the driver shows no GPU; use --device cpu"):
        gpu.open_device("cuda")


def test_ranks_with_and_without_a_gpu_are_refused(cupy, monkeypatch):
    original = mesh_run.open_device
    # one thread's patch is the other's as well, so the ranks come one after the other
    ranks = iter([original, lambda *a: CPU])
    monkeypatch.setattr(mesh_run, "open_device", lambda *a: next(ranks)(*a))
    with pytest.raises(CupytronError, match=r"has a GPU and rank [01] none"):
        run_ranks(
            2,
            lambda world: mesh_run.open_mesh(
                config("parallel.dp=2", "train.global_batch=24"), world
            ),
        )


def test_verify_says_whose_attention_it_has_compared(cupy, capsys):
    from cupytron.cli.main import _run

    flags = ["--tp", "2", "--dp", "1", "--device", "cuda", "--set", "model.num_layers=1"]
    assert not _run(["verify", *flags, "--set", "model.dropout=0.1"])
    out = capsys.readouterr().out
    assert "on a GPU, with cupytron's own attention: cuDNN's has 16 bits only" in out
    assert "the same numbers" in out
