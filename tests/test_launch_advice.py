"""A launcher that does not fit the MPI library, and a plain start where Slurm has given several tasks."""

import pickle
import subprocess
from pathlib import Path

import pytest
from launchers import OPENMPI, launch
from runs import ENVIRONMENT, TINY, cupytron, make_data

from cupytron import launch_advice, launcher, mesh_run
from cupytron.comm import ParallelContext, SelfCommunicator, run_ranks
from cupytron.config import load_config

MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ofi\n"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (
        "PMI_RANK",
        "PMI_FD",
        "PMI_PORT",
        "PMIX_RANK",
        "SLURM_STEP_ID",
        "SLURM_JOB_ID",
        "SLURM_NTASKS",
        "SLURM_STEP_NUM_TASKS",
    ):
        monkeypatch.delenv(name, raising=False)


def test_the_remedy_is_the_one_of_the_launcher_that_is_there(monkeypatch):
    assert "own mpirun" in launch_advice.remedy(True) and "srun" not in launch_advice.remedy(True)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert "srun --mpi=pmix" in launch_advice.remedy(True)
    assert "srun --mpi=pmi2" in launch_advice.remedy(False)


@pytest.mark.parametrize(
    ("library", "variables", "refused"),
    [
        (MPICH, ["PMIX_RANK"], True),
        (MPICH.replace("ofi", "ofi --with-pmix=/usr"), ["PMIX_RANK"], False),
        (MPICH, ["PMIX_RANK", "PMI_RANK"], False),
        (MPICH, ["PMI_RANK"], False),
        ("Open MPI v5.0.11, package: x", ["PMIX_RANK"], False),
    ],
)
def test_mpich_under_pmix_alone_is_known_before_it_aborts(monkeypatch, library, variables, refused):
    for name in variables:
        monkeypatch.setenv(name, "0")
    assert launch_advice.is_pmix_without_support(library) == refused


@pytest.mark.parametrize(
    ("library", "variables", "refused"),
    [
        ("Open MPI v4.1.4, package: Debian", {"OMPI_VERSION": "5.0.11", "OPAL_PREFIX": "/x"}, True),
        ("Open MPI v4.1.4, package: Debian", {"OMPI_VERSION": "5.0.11"}, False),
        ("Open MPI v4.1.4, package: Debian", {"OPAL_PREFIX": "/x"}, False),
        ("Open MPI v5.0.11, package: x", {"OMPI_VERSION": "5.0.11", "OPAL_PREFIX": "/x"}, False),
        (MPICH, {"OMPI_VERSION": "5.0.11", "OPAL_PREFIX": "/x"}, False),
    ],
)
def test_an_old_open_mpi_under_a_new_launcher_is_known_before_it_aborts(
    monkeypatch, library, variables, refused
):
    for name in ("OMPI_VERSION", "OPAL_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch_advice.takes_plugins_of_open_mpi_5(library) == refused


OLD_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libmpi.so.40")


@pytest.mark.parametrize(
    ("name", "library", "words"),
    [
        ("openmpi", None, "by PMIx, which MPICH"),
        ("mpich", OPENMPI / "lib" / "libmpi.so.40", "MPI knows 1: mpi4py has loaded Open MPI"),
        ("openmpi", OLD_LIBRARY, "launcher of Open MPI 5"),
    ],
)
def test_a_launcher_of_another_library_is_told_once(name, library, words):
    if library and not library.exists():
        pytest.skip(f"{library} is not installed")
    if library == OLD_LIBRARY and "libmpi.so.40.3" not in str(library.resolve()):
        pytest.skip(f"{library} is not of Open MPI 4")
    arguments, env = launch(name, 2, [cupytron(), "bench", "--tp", "2", "--steps", "1"])
    env.pop("MPI4PY_LIBMPI", None)
    if library:
        env["MPI4PY_LIBMPI"] = str(library)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and said.count("error:") == 1 and words in said, said
    assert "own mpirun, or name the launcher's library in MPI4PY_LIBMPI" in said


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "4", "PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, False),
    ],
)
def test_one_process_in_an_allocation_of_several_tasks_is_told(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lines = list(mesh_run.describe(load_config(overrides=TINY), ParallelContext()))
    assert any("srun --mpi=pmi2" in line and "4 tasks" in line for line in lines) == said


@pytest.mark.parametrize(("local", "name"), [("4", "rank 3"), ("2", "rank 3 on here")])
def test_a_rank_is_named_with_its_machine_where_there_are_several(monkeypatch, local, name):
    monkeypatch.setattr(launcher, "host", lambda: "here")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("MPI_LOCALNRANKS", local)
    assert launcher.named(3) == name


def test_what_ranks_gather_of_their_settings_does_not_grow_with_the_square_of_their_number():
    """Each rank gets a hash of each other's, not all of it."""
    config = load_config(overrides=TINY)
    one = len(pickle.dumps(config.model_dump(mode="json")))

    def body(world):
        received = []
        inner = world._gather_objects

        def counting(value):
            received.append(values := inner(value))
            return values

        world._gather_objects = counting
        mesh_run.check_alike(world, settings=config)
        return len(pickle.dumps(received))

    assert max(run_ranks(8, body)) < one


def test_what_ranks_wrote_goes_to_rank_0_alone(tmp_path):
    from cupytron.run import train

    data = make_data(tmp_path)
    config = load_config(
        overrides=[*TINY, f'data.path="{data}"', "train.max_steps=2", "parallel.dp=2"]
    )

    def body(world):
        largest = 0
        for kind in ("gather_objects", "collect_objects"):
            inner = getattr(world, kind)

            def counting(value, inner=inner):
                nonlocal largest
                values = inner(value)
                largest = max(largest, str(values).count(".safetensors"))
                return values

            setattr(world, kind, counting)
        train(config, tmp_path / "run", dict(ENVIRONMENT), quiet=True, world=world)
        return largest

    first, second = run_ranks(2, body)
    assert first >= 2 and second == 0


def test_alone_there_is_nobody_to_collect_from():
    assert SelfCommunicator().collect_objects(3) == [3]
