"""Whole runs on meshes: same digests, any mesh goes on from any other's checkpoint, stopping, launchers.

CUPYTRON_MESHES=all runs every number of replicas with every ZeRO stage.
"""

import json
import math
import os
import shutil
import signal
import subprocess

import pytest
import runs
from launchers import NAMES, launch
from runs import ENVIRONMENT, TINY, command, cupytron, make_data, start

from cupytron.checkpoint import Checkpoint
from cupytron.cli.options import _giving_way
from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import ParallelConfig, load_config
from cupytron.run import train
from cupytron.run_folder import RunFolder
from cupytron.trained import load

ALL = os.environ.get("CUPYTRON_MESHES") == "all"
# a schedule that does not follow a shorter max_steps
SCHEDULE = "optim.decay_steps=12"
FLOAT64 = [
    SCHEDULE,
    "train.dtype=float64",
    "train.micro_batch=1",
    "model.num_heads=4",
    "model.d_model=16",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def mesh_config(*settings, tp=1, pp=1, dp=1, **mesh):
    mesh = {"tp": tp, "pp": pp, "dp": dp, **{k: str(v).lower() for k, v in mesh.items()}}
    overrides = [*TINY, *(f"parallel.{k}={v}" for k, v in mesh.items()), *settings]
    return load_config(overrides=overrides, ranks=tp * pp * dp)


def run_mesh(data, out, *settings, init_from=None, **mesh):
    """Train on threads; the outcome of every rank."""
    config = mesh_config(f'data.path="{data}"', *settings, **mesh)

    def body(world):
        return train(config, out, dict(ENVIRONMENT), "auto", init_from, quiet=True, world=world)

    return run_ranks(config.parallel.ranks, body)


def digest(out, step=None):
    folder = RunFolder(out)
    return Checkpoint(folder.place(step or folder.steps()[-1])).digest()


def meshes():
    both = [(dp, zero) for dp in (1, 2, 4, 8) for zero in range(4)]
    return both if ALL else [(2, 0), (8, 1), (4, 2), (8, 3)]


def test_deterministic_runs_have_one_digest(tmp_path, data):
    """20 steps, with evaluation, at several numbers of replicas and every ZeRO stage."""
    settings = ["train.deterministic=true", "train.micro_batch=1", "train.max_steps=20"]
    run_mesh(data, tmp_path / "one", *settings)
    want = digest(tmp_path / "one")
    losses = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    for dp, zero in meshes():
        out = tmp_path / f"{dp}-{zero}"
        run_mesh(data, out, *settings, dp=dp, zero=zero)
        assert digest(out) == want, f"dp={dp} zero={zero}"
        timeless = ("step", "loss", "grad_norm", "val_loss", "lr")
        for mine, one in zip((out / "metrics.jsonl").read_text().splitlines(), losses, strict=True):
            for key in timeless:
                assert json.loads(mine).get(key) == json.loads(one).get(key), (dp, zero, key)


def errors(a, b):
    """Largest error of each logical tensor of two checkpoints, relative as verify's."""
    b = dict(b.tensors())
    return {n: abs(x - b[n]).max() / max(abs(b[n]).max(), 1e-12) for n, x in a.tensors()}


ANY_MESH = [
    {},
    {"tp": 2, "dp": 4, "zero": 3},
    {"dp": 8},
    {"pp": 2, "tp": 2, "dp": 2, "zero": 1, "schedule": "zb-h1"},
    {"pp": 4, "dp": 2, "zero": 3},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """A run saved on tp=4 dp=2 zero=2 at step 4, and one that was never interrupted."""
    place = tmp_path_factory.mktemp("saved")
    run_mesh(data, place / "half", *FLOAT64, "train.max_steps=4", tp=4, dp=2, zero=2, sp=True)
    run_mesh(data, place / "whole", *FLOAT64, "train.max_steps=12", tp=4, dp=2, zero=2, sp=True)
    return place


@pytest.mark.parametrize("mesh", ANY_MESH, ids=str)
def test_a_run_goes_on_on_any_other_mesh(tmp_path, data, saved, mesh):
    out = tmp_path / "run"
    shutil.copytree(saved / "half", out)
    assert len(list(RunFolder(out).place(4).glob("rank-*"))) == 8  # each rank wrote its own
    before = digest(out)
    # what the other mesh reads and writes again are the same logical tensors
    config = [*FLOAT64, "checkpoint.keep=9"]
    resaved = tmp_path / "resaved"
    shutil.copytree(out, resaved)
    resave(resaved, *config, **mesh)
    assert digest(resaved, 4) == before
    run_mesh(data, out, *config, "train.max_steps=12", **mesh)
    found = errors(
        Checkpoint(RunFolder(out).place(12)), Checkpoint(RunFolder(saved / "whole").place(12))
    )
    assert max(found.values()) < 1e-10, max(found.items(), key=lambda item: item[1])


def resave(out, *settings, **mesh):
    """Read the newest checkpoint on a mesh and write it again, from there."""
    from cupytron import checkpoint
    from cupytron.trainer import Trainer

    config = mesh_config(*settings, **mesh)
    sizes = {axis: getattr(config.parallel, axis) for axis in ("tp", "pp", "dp")}
    place = RunFolder(out).place(4)
    about = dict(Checkpoint(place).about)
    for key in ("format", "files"):
        about.pop(key)

    def body(world):
        found = Checkpoint(place)
        vocab = found.about["model"]["vocab_size"]
        trainer = Trainer(config, vocab, ParallelContext(sizes, world=world))
        trainer.materialize(initial=False)
        trainer.load(found)
        world.barrier()
        checkpoint.write(place, trainer.pieces(), about, world)

    run_ranks(config.parallel.ranks, body)


def test_replicas_and_stage_may_change_and_not_a_bit_does(tmp_path, data):
    settings = [SCHEDULE, "train.deterministic=true", "train.micro_batch=1"]
    run_mesh(data, tmp_path / "one", *settings)
    out = tmp_path / "moved"
    run_mesh(data, out, *settings, "train.max_steps=4", dp=8, zero=3)
    run_mesh(data, out, *settings, "train.max_steps=8", dp=2, zero=1)
    run_mesh(data, out, *settings, dp=4, zero=0)
    assert digest(out, 12) == digest(tmp_path / "one", 12)


# a run that is moved from each of these to the next
TWELVE = [
    {"pp": 2},
    {"pp": 4, "schedule": "gpipe", "zero": 1},
    {"dp": 4, "zero": 3},
    {"pp": 2, "schedule": "interleaved", "dp": 2, "zero": 3},
    {"tp": 2, "pp": 2, "schedule": "zb-h1"},
    {"tp": 4, "sp": True},
    {"pp": 3, "split": "0,1,1"},
    {"tp": 2, "pp": 2, "dp": 2, "sp": True, "zero": 2, "schedule": "zb-h1"},
    {},
    {"pp": 2, "dp": 4, "zero": 2, "schedule": "gpipe"},
    {"tp": 2, "pp": 3, "schedule": "1f1b"},
    {"schedule": "interleaved", "chunks": 4, "dp": 2, "zero": 1},
]


def curve(out):
    """A run's losses and validation losses by step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kinds = ("loss", "val_loss")
    return {kind: {line["step"]: line[kind] for line in lines if kind in line} for kind in kinds}


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_moved_through_twelve_meshes_is_the_run_of_one_process(tmp_path, data, deterministic):
    """Saved and resumed at each; bit for bit where only dp, pp, the schedule and the ZeRO stage change."""
    settings = [*FLOAT64, "train.eval_interval=3", "checkpoint.interval=100"]
    meshes = TWELVE
    if deterministic:
        settings += ["train.dtype=float32", "train.deterministic=true"]
        meshes = [{k: v for k, v in mesh.items() if k not in ("tp", "sp")} for mesh in TWELVE]
    steps = 2 * len(meshes)
    run_mesh(data, tmp_path / "one", *settings, f"train.max_steps={steps}")
    out = tmp_path / "moved"
    for number, mesh in enumerate(meshes, start=1):
        run_mesh(data, out, *settings, f"train.max_steps={2 * number}", **mesh)
    mine, one = curve(out), curve(tmp_path / "one")
    near = 0 if deterministic else 1e-9
    for kind in ("loss", "val_loss"):  # every stop is a last step, and evaluated
        assert {step: mine[kind][step] for step in one[kind]} == pytest.approx(
            one[kind], rel=near, abs=0
        )
    assert mine["loss"].keys() == one["loss"].keys() == set(range(1, steps + 1))
    if deterministic:
        assert digest(out, steps) == digest(tmp_path / "one", steps)
    else:
        found = errors(*(Checkpoint(RunFolder(p).place(steps)) for p in (out, tmp_path / "one")))
        assert max(found.values()) < 1e-9


@pytest.mark.parametrize(
    "mesh",
    [
        {"tp": 2},
        {"tp": 4},
        {"dp": 2},
        {"tp": 2, "dp": 2},
        {"pp": 3},
        {"tp": 2, "pp": 2, "dp": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("zero", [0, 3])
def test_a_trained_model_runs_on_any_mesh(data, saved, mesh, zero):
    """The same text and the same loss; under stage 3 too."""
    one = load(saved / "whole", "last")
    options = {"max_new_tokens": 25, "top_k": 9, "top_p": 0.9, "temperature": 1.3}
    want = one.generate("the 1", **options)
    loss = one.evaluate()["val_loss"]

    def body(world):
        context = ParallelContext(**mesh, world=world)
        model = load(saved / "whole", "last", context=context, zero=zero)
        return model.generate("the 1", **options), model.evaluate()

    for text, result in run_ranks(math.prod(mesh.values()), body):
        assert text == want
        assert result["val_loss"] == pytest.approx(loss, rel=1e-12)
        assert result["tokens"] == one.evaluate()["tokens"]


def test_an_evaluation_shared_unevenly_is_exact(data, saved):
    """Three replicas of two stages, and a number of batches that three does not divide."""
    one = load(saved / "whole", "last").evaluate()

    def body(world):
        context = ParallelContext(dp=3, pp=2, world=world)
        return load(saved / "whole", "last", context=context).evaluate()

    for result in run_ranks(6, body):
        assert result["val_loss"] == one["val_loss"]  # bit for bit: the sum is rounded once


def test_a_deterministic_run_is_evaluated_on_any_number_of_replicas(tmp_path, data):
    run_mesh(data, tmp_path / "run", "train.max_steps=1", "train.deterministic=true")
    one = load(tmp_path / "run", "last").evaluate()

    def body(world):
        return load(tmp_path / "run", "last", context=ParallelContext(world=world)).evaluate()

    assert [result["val_loss"] for result in run_ranks(3, body)] == [one["val_loss"]] * 3


def test_a_second_job_in_the_same_folder_is_refused(tmp_path, data):
    out = tmp_path / "run"
    run_mesh(data, out, "train.max_steps=4", dp=2)
    with RunFolder(out).lock(), pytest.raises(ValueError, match="is training in it"):
        run_mesh(data, out, "train.max_steps=8", dp=2)


def test_all_ranks_know_the_best_loss_of_a_resumed_run(tmp_path, data):
    """A step is saved when its loss is the best: ranks that do not agree on that would wait for ever."""
    out = tmp_path / "run"
    each = ["train.eval_interval=1", "checkpoint.interval=0", SCHEDULE]
    run_mesh(data, out, *each, "train.max_steps=4", dp=2)
    outcomes = run_mesh(data, out, *each, "optim.lr=5", dp=2)  # from here on it gets worse
    assert [outcome.step for outcome in outcomes] == [12, 12]


def test_ranks_with_other_settings_are_told(tmp_path, data):
    def body(world):
        overrides = [*TINY, f'data.path="{data}"', f"optim.lr={0.1 * (world.rank + 1)}"]
        train(load_config(overrides=overrides), tmp_path / "run", dict(ENVIRONMENT), world=world)

    with pytest.raises(
        ValueError, match=r"rank 1 was started with other .* optim.lr: 0.2 there, 0.1"
    ):
        run_ranks(2, body)
    assert not (tmp_path / "run").exists()


# real launchers


def launched(name, ranks, arguments, **options):
    """A finished job of several processes."""
    argv, environment = launch(name, ranks, [str(a) for a in arguments])
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=100, **options
    )


each_launcher = pytest.mark.parametrize("name", NAMES)


@each_launcher
def test_a_run_under_a_launcher(tmp_path, data, name):
    """Two processes train; one goes on; the digest is that of one process alone."""
    settings = [SCHEDULE, "train.deterministic=true"]
    run_mesh(data, tmp_path / "one", *settings)
    out = tmp_path / "run"
    done = launched(name, 2, command(data, out, *settings, "train.max_steps=8", "parallel.zero=1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks: tp=1 x pp=1 x dp=2, ZeRO 1" in done.stdout
    assert done.stdout.count("done: 8 steps") == 1
    assert ("Open MPI Ctrl-C" in done.stdout) == (name == "openmpi")
    alone = runs.start(command(data, out, *settings, "parallel.zero=1"))
    assert alone.communicate(timeout=100)[0] and alone.returncode == 0
    assert digest(out) == digest(tmp_path / "one")


def test_a_run_goes_on_where_its_own_mesh_does_not_fit(tmp_path, data):
    """The settings in its folder say tp=2; one process goes on with them all the same."""
    out = tmp_path / "run"
    run_mesh(data, out, *FLOAT64, "train.max_steps=4", tp=2, dp=2)
    job = runs.start([cupytron(), "train", "--out", str(out), "--max-steps", "6"])
    assert "done: 6 steps" in job.communicate(timeout=100)[0]


@each_launcher
def test_verify_and_sample_under_a_launcher(tmp_path, data, saved, name):
    sweep = tmp_path / "cases"
    sweep.write_text("--tp 2 --sp\n--dp 2 --zero 3 --set model.family=llama  # comment\n\n--tp 2\n")
    done = launched(name, 2, [cupytron(), "verify", "--sweep", sweep])
    assert done.returncode == 0 and "3 of 3 cases hold" in done.stdout, done.stdout + done.stderr
    words = ["sample", saved / "whole", "--prompt", "the", "--max-new-tokens", "20"]
    alone = subprocess.run(
        [cupytron(), *map(str, words)], capture_output=True, text=True, timeout=60
    )
    assert launched(name, 2, [cupytron(), *words]).stdout == alone.stdout != ""


@each_launcher
def test_usr1_stops_all_ranks_at_one_step_with_one_checkpoint(tmp_path, data, name):
    """The signal goes to the process that the line at start names."""
    out = tmp_path / "run"
    long = ["train.max_steps=100000", "checkpoint.interval=0", "train.eval_interval=0"]
    argv, environment = launch(name, 2, command(data, out, *long))
    job = start(argv, environment)
    named = None
    for line in job.stdout:
        if "kill -USR1 " in line:
            named = int(line.split("kill -USR1 ")[1].split(",")[0])
        if line.startswith("step ") and " 3/" in line:
            break
    os.kill(named, signal.SIGUSR1)
    rest = job.communicate(timeout=60)[0]
    assert "stopped by SIGUSR1" in rest, rest
    assert job.returncode == 75, rest
    assert len(RunFolder(out).steps()) == 1
    Checkpoint(RunFolder(out).place(RunFolder(out).steps()[0])).verify()


def test_ctrl_c_stops_all_ranks_where_the_launcher_forwards_it(tmp_path, data):
    out = tmp_path / "run"
    argv, environment = launch("mpich", 2, command(data, out, "train.max_steps=100000"))
    job = start(argv, environment)
    for line in job.stdout:
        if line.startswith("step ") and " 3/" in line:
            break
    job.send_signal(signal.SIGINT)
    rest = job.communicate(timeout=60)[0]
    assert "stopped by SIGINT" in rest and job.returncode == 130, rest


@pytest.mark.parametrize(
    ("old", "ranks", "given", "moved"),
    [
        ({"tp": 2, "dp": 2}, 4, [], ""),
        ({"tp": 2, "dp": 2}, 2, [], "dp"),
        ({"tp": 2, "pp": 2}, 4, [], ""),
        ({"tp": 2, "pp": 2}, 2, [], "dp pp schedule chunks split"),
        ({"pp": 4}, 6, [], "dp pp schedule chunks split"),
        ({"pp": 2, "dp": 2}, 4, ["parallel.tp=4"], "dp pp schedule chunks split"),
        ({"tp": 4}, 2, ["parallel.pp=2"], "dp tp split"),
        ({"tp": 2}, 3, [], "dp tp"),
        ({"tp": 3, "pp": 2}, 5, [], "dp pp tp schedule chunks split"),
        ({"pp": 2}, 2, ["parallel.chunks=4"], "split"),
        ({"pp": 2}, 2, ["parallel.schedule=zb-h1"], "chunks split"),
        ({"pp": 2}, 2, ["parallel.schedule=1f1b"], ""),
        ({"pp": 2}, 2, ["parallel.pp=2"], ""),
        ({"pp": 2, "schedule": "gpipe"}, 1, ["parallel.pp=1"], "schedule chunks split"),
        ({"pp": 2}, 1, ["parallel.schedule=gpipe"], "dp pp chunks split"),
        ({"pp": 2}, 3, ["parallel.pp=two"], "split"),  # the settings' own checks say what is wrong
    ],
)
def test_an_old_mesh_gives_way_where_it_does_not_fit(old, ranks, given, moved):
    to = {"tp": "1", "pp": "1", "schedule": "1f1b"}
    overrides = [f"parallel.{key}={to.get(key, 'none')}" for key in moved.split()]
    assert _giving_way(ParallelConfig(**old), given, ranks) == overrides
