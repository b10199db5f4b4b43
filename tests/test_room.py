"""A model that there is no memory for is refused before it is built, in a line that names its sizes."""

import math
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import runs
from launchers import launch
from meshes import config, on_mesh
from test_memory import MESHES, SEQUENCE, case
from test_own_model import EXAMPLE

from cupytron import room, verify
from cupytron.cli.main import _run
from cupytron.comm import ParallelContext
from cupytron.config import load_config, resolve_model
from cupytron.errors import CupytronError
from cupytron.memory import of_stage
from cupytron.own_model import OwnModel
from cupytron.room import Memory, check_room, least_bytes, of_host
from cupytron.trained import load
from cupytron.trainer import Trainer
from cupytron.versions import host

HUGE = [
    "model.num_layers=4",
    "model.d_model=1000000",
    "model.num_heads=1000",
    "train.sequence_length=16",
]


@pytest.fixture
def memory(monkeypatch):
    """A function that says how many bytes there are."""

    def there_are(count):
        monkeypatch.setattr(room, "of_host", lambda: Memory("here", "memory of here", count))

    return there_are


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    data = runs.make_data(folder)
    runs.run_here(data, folder / "run", "train.max_steps=2")
    return folder


# how much a model needs


@pytest.mark.parametrize("mesh", [*MESHES, {"dp": 2, "zero": 0}], ids=str)
@pytest.mark.parametrize(
    "more",
    [
        ["optim.name=sgd"],
        ["train.dtype=float64", "train.compute_dtype=float32"],
        ["train.deterministic=true"],
        ["train.compute_dtype=bfloat16", "train.reduce_dtype=float64"],
    ],
    ids=str,
)
def test_it_is_little_less_than_what_the_ranks_hold_by_estimate(mesh, more):
    settings = case(*more, **mesh)
    model, p = resolve_model(settings.model, None, SEQUENCE), settings.parallel
    sizes = {"tp": p.tp, "pp": p.pp, "dp": p.dp or 1}
    for training in (True, False):
        stages = [of_stage(settings, model, stage, training) for stage in range(p.pp)]
        held = p.tp * (p.dp or 1) * sum(stage.persistent for stage in stages)
        assert 0.9 * held < least_bytes(settings, model, sizes, training) <= held


def needed(settings, training=True, **sizes):
    model = resolve_model(settings.model, None, settings.train.sequence_length)
    return least_bytes(settings, model, {"tp": 1, "pp": 1, "dp": 1, **sizes}, training)


def test_weights_alone_need_less(memory):
    settings = config()
    model = resolve_model(settings.model, None, 8)
    memory(needed(settings, training=False))
    assert needed(settings, training=False) == 8 * model.num_parameters()
    check_room(settings, model, ParallelContext(), training=False)
    with pytest.raises(CupytronError, match="weights, gradients and the optimizer's state of"):
        check_room(settings, model, ParallelContext())


# ranks


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"dp": 2, "zero": 3}], ids=str)
def test_ranks_of_a_machine_share_its_memory(memory, mesh):
    settings = config(**mesh)
    sizes = {axis: size for axis, size in mesh.items() if axis != "zero"}
    enough = needed(settings, **sizes)
    memory(enough)
    assert on_mesh(settings, lambda trainer, context: trainer.step) == [0, 0]
    memory(enough - 1)
    with pytest.raises(CupytronError, match=r"need at least .* on 2 ranks, and there are") as error:
        on_mesh(settings, lambda trainer, context: trainer.step)
    assert "(memory of here); lower these sizes, or spread" in str(error.value)


def test_machines_add_up(monkeypatch):
    """However the stages are cut: one of them may have little memory, and need little."""
    settings = config(pp=2)
    half = needed(settings, pp=2) / 2
    held = [Memory("small", "a", half / 2), Memory("large", "b", half * 1.5)]
    monkeypatch.setattr(room, "memories", lambda device, rank: [held[rank]])
    assert on_mesh(settings, lambda trainer, context: trainer.step) == [0, 0]
    held[0] = Memory("small", "a", half / 2 - 1)
    with pytest.raises(CupytronError, match=r"there are .* \(a, b\); lower"):
        on_mesh(settings, lambda trainer, context: trainer.step)


def test_many_machines_are_not_all_named(monkeypatch):
    held = [Memory(str(n), f"machine {n}", 1.0) for n in range(9)]
    monkeypatch.setattr(room, "memories", lambda device, rank: held)
    settings = config()
    model = resolve_model(settings.model, None, 8)
    with pytest.raises(CupytronError, match="machine 3 and 5 more"):
        check_room(settings, model, ParallelContext())


def test_a_gpu_s_memory_counts_beside_the_machine_s(memory):
    """What the GPU alone has no room for is told by memory.explained, with what would fit."""
    memory(1000)
    gpu = SimpleNamespace(gpu=True, name="cuda:0 (H200)", memory=10_000)
    held = room.memories(gpu, 3)
    assert [(m.name, m.bytes) for m in held] == [
        ("cuda:0 (H200)", 10_000),
        ("memory of here", 1000),
    ]
    # two ranks may share it
    assert room.memories(gpu, 4)[0].key != held[0].key


# where it is asked


def refused(capsys, *words):
    assert _run([str(word) for word in words]) == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in errors[0]
    return errors[0]


@pytest.mark.timeout(60)  # each of them took minutes, or ended at another size
@pytest.mark.parametrize("command", ["bench", "verify --tp 2", "train"])
def test_a_huge_model_is_refused_at_once(made, tmp_path, capsys, command):
    words = command.split()
    if command == "train":
        words += ["--data", str(made / "data"), "--out", str(tmp_path / "run")]
    flags = [word for s in [*HUGE, "model.vocab_size=100"] for word in ("--set", s)]
    told = refused(capsys, *words, *flags)
    assert told.startswith(
        "error: model.num_layers=4, model.d_model=1000000, model.d_ff=4000000, model.vocab_size=100, "
        "model.context_length=16: the weights, gradients and the optimizer's state of 48,0"
    )
    assert f"memory and swap of {host()}" in told and "--zero 3" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)
def test_two_processes_refuse_it_in_one_line(made, tmp_path):
    words = runs.command(made / "data", tmp_path / "run", *HUGE)
    argv, environment = launch("mpich", 2, words)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("need at least") == 1
    assert " on 2 ranks, and there are " in done.stderr and not (tmp_path / "run").exists()


def test_runs_that_go_on_elsewhere_are_left_as_they_are(made, tmp_path, capsys, memory):
    run = shutil.copytree(made / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    memory(1000)
    data = ("--data", made / "data")
    for words in (
        ("train", "--out", run, "--max-steps", 3),
        ("train", "--init-from", run, *data, "--out", tmp_path / "new"),
        ("eval", run),
        ("sample", run, "--max-new-tokens", 1),
    ):
        told = refused(capsys, *words)
        alone = words[0] in ("eval", "sample")
        assert ("the weights of" in told) == alone and ("lower" in told) != alone
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_from_python(made, memory):
    memory(1000)
    with pytest.raises(CupytronError, match=r"spread the model over more machines"):
        load(made / "run", device="cpu")
    with pytest.raises(CupytronError, match=r"^model\.num_layers=2"):
        Trainer(config())


def test_a_model_of_one_s_own_has_other_sizes(memory):
    """Those of the settings say nothing of it."""
    memory(1000)
    own = OwnModel.load(f"{EXAMPLE}:OwnModel")
    assert verify.run(own.settings(config(dp=2)), steps=1, own=own).ok


# what a machine has

MEMINFO = "MemTotal:  1000 kB\nMemFree: 1 kB\nSwapTotal:    24 kB\n"
UNLIMITED = "9223372036854771712\n"


def machine(root, files):
    """The files of a system, as this one's would be."""
    files = {
        "proc/sys/kernel/random/boot_id": "f00d\n",
        "proc/meminfo": MEMINFO,
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return of_host(root)


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/memory.max": "4096\n"}, 4096),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/memory.max": "8192\n",
                f"{V2}/a/b/memory.max": "4096\n",
            },
            4096,
        ),
        # another one's
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/c/memory.max": "4096\n"}, None),
        # in a container that sees its own top under the host's path
        ({"proc/self/cgroup": "0::/docker/x\n", f"{V2}/memory.max": "4096\n"}, 4096),
        # more than there is
        ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "4096000\n"}, None),
        (
            {
                "proc/self/cgroup": "5:cpu:/b\n4:memory:/a\n0::/\n",
                f"{V1}/memory.limit_in_bytes": UNLIMITED,
                f"{V1}/a/memory.limit_in_bytes": "4096\n",
            },
            4096,
        ),
        (
            {
                "proc/self/cgroup": "4:memory,cpu:/a\n",
                f"{V1}/a/memory.limit_in_bytes": UNLIMITED,
            },
            None,
        ),
    ],
)
def test_memory_of_a_machine(tmp_path, files, limit):
    found = machine(tmp_path, files)
    if limit is None:
        assert found == ("f00d", f"memory and swap of {host()}", 1024 * 1024)
    else:
        assert found.bytes == limit + 24 * 1024 and found.key.startswith("f00d ")
        assert found.name == f"memory limit and swap of a cgroup on {host()}"


@pytest.mark.parametrize(
    "text", ["", "MemTotal: x kB\nSwapTotal: 1 kB\n", "MemTotal:\nSwapTotal:\n"]
)
def test_what_is_not_known_is_no_limit(tmp_path, text):
    assert machine(tmp_path, {"proc/meminfo": text}).bytes == math.inf
    assert of_host(tmp_path / "none").bytes == math.inf


def test_this_machine_is_known():
    assert 1 << 28 < of_host().bytes < math.inf
    settings = load_config("demo", overrides=["model.vocab_size=50000"])
    check_room(settings, resolve_model(settings.model, None, 64), ParallelContext())
