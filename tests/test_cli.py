"""The command line as a user meets it: one line an error, right exit codes, nothing silent."""

import json
import os
import re
import subprocess
import sys

import pytest
from launchers import NAMES, launch
from runs import TINY, command, cupytron, kill_when, make_data, run_here, start

from cupytron import launcher, process
from cupytron.cli import main
from cupytron.run_folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    run_here(data, out)
    return out


def call(*arguments, **options):
    options.setdefault("env", {**os.environ})
    return subprocess.run(
        [cupytron(), *map(str, arguments)], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.parametrize(
    "name", ["train", "eval", "sample", "report", "data", "config", "checkpoint", "bench"]
)
def test_every_command_has_help(name):
    # that `cupytron --help` is fast is held by what it imports (test_imports) and by the acceptance run
    assert name in call("--help").stdout
    done = call(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: cupytron")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing"], 2, "nothing"),
        (["train"], 2, "--out"),
        (["train", "--out", "OUT"], 2, "--data DIR, or from Python the override data.path=DIR"),
        (["train", "--out", "OUT", "--data", "missing"], 1, "missing"),
        (["train", "--out", "OUT", "--set", "optim.lrr=1"], 2, "did you mean optim.lr"),
        (["train", "--out", "OUT", "--resume", "perhaps"], 2, "perhaps"),
        (
            ["train", "--out", "OUT", "--data", "missing", "--init-from", ""],
            2,
            "--init-from is empty",
        ),
        (["eval", "missing"], 1, "not a run's folder"),
        (["eval", "RUN", "--timeout", "nan"], 2, "nan is no number of seconds"),
        (["report", "RUN", "--out", "RUN/metrics.jsonl"], 1, "is a file of the run itself"),
        (["eval", "RUN", "--checkpoint", "99"], 1, "choose best, last or one of"),
        (["sample", "RUN", "--num-samples", "2", "--prompt", ""], 1, "prompt is empty"),
        (["sample", "RUN", "--prompt", "\u6f22"], 1, "not in the vocabulary"),
        (["sample", "RUN", "--prompt", "the", "--temperature", "-1"], 1, "temperature=-1"),
        (["sample", "RUN", "--num-samples", "0"], 2, "num-samples"),
        (["checkpoint", "digest", "missing"], 1, "not a run's folder"),
        (["sample", "RUNN"], 1, "not a run's folder (there is no such folder); did you mean /"),
        (["bench", "--steps", "0"], 2, "steps"),
        (["bench", "--steps", "1"], 2, "model.vocab_size"),
    ],
)
def test_errors_are_one_line_with_a_way_out(tmp_path, run, arguments, code, words):
    places = {"OUT": str(tmp_path / "out"), "RUN": str(run)}
    given = [re.sub("^(OUT|RUN)", lambda name: places[name[1]], word) for word in arguments]
    done = call(*given, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["data", "inspect", "TEXT"],
            "is a file; make a data set of it with cupytron data prepare",
        ),
        (["data", "inspect", "DATA/train.bin"], "is a file of a data set; give its folder, "),
        (["data", "inspect", "RUN"], "is a run's folder, and no prepared data set"),
        (
            ["data", "inspect", "missing"],
            "make it with cupytron data prepare SOURCE... --out missing",
        ),
        (
            ["checkpoint", "ls", "DATA"],
            "it is a data set); a run is made from it with `cupytron train",
        ),
        (["checkpoint", "ls", "TEXT"], "not a run's folder (it is a file); give"),
        (["checkpoint", "ls", "missing"], "not a run's folder (there is no such folder); give"),
        (["checkpoint", "ls", "."], "not a run's folder (it has no config.toml); give"),
        (["checkpoint", "ls", "RUN/metrics.jsonl"], "(it lies in one); give RUN"),
        (["checkpoint", "ls", "RUN/checkpoints"], "(it lies in one); give RUN"),
        (["eval", "DATA"], "it is a data set"),
        (["sample", "TEXT"], "it is a file"),
        (["report", "DATA"], "it is a data set"),
        (
            ["train", "--data", "TEXT", "--out", "out"],
            "with cupytron data prepare TEXT --out DIR\n",
        ),
        (["eval", "RUN", "--data", "RUN"], "is a run's folder, and no prepared data set"),
        (
            ["config", "show", "--preset", "my.toml"],
            "my.toml: is not known; give a file with --config",
        ),
    ],
)
def test_a_path_of_another_kind_is_told_apart(
    tmp_path, capsys, monkeypatch, data, run, arguments, words
):
    """A file as a data set, a run as one, a data set as a run: each is named for what it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be\n")
    places = {"TEXT": tmp_path / "text.txt", "DATA": data, "RUN": run}

    def placed(text):
        return re.sub("TEXT|DATA|RUN", lambda name: str(places[name[0]]), text)

    assert main._run([placed(word) for word in arguments]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and placed(words) in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_without_matplotlib_fails_before_the_work(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "report.html"
    assert main._run(["report", str(run), "--out", str(out), "--png", str(tmp_path / "a.png")]) == 1
    assert "pip install 'cupytron[plot]'" in capsys.readouterr().err
    assert not out.exists()


def test_debug_shows_the_traceback(tmp_path):
    done = call("eval", "missing", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_launcher_whose_processes_do_not_find_each_other_is_refused(tmp_path, data):
    """Four silent copies that write the same files would be worse than an error."""
    environment = {**os.environ, "PMI_SIZE": "4"}
    batch = ("--global-batch", "48")
    done = call("train", "--data", data, "--out", tmp_path / "run", *batch, env=environment)
    assert done.returncode == 1 and "started 4 processes, and MPI knows 1" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_command_for_one_process_is_refused_once_under_a_launcher(tmp_path, name):
    argv, environment = launch(name, 3, [cupytron(), "data", "prepare", "x", "--out", "y"])
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("works in one process, and a launcher started 3") == 1


def test_eval_as_json_and_in_words(run):
    result = json.loads(call("eval", run, "--json").stdout)
    assert set(result) == {"val_loss", "perplexity", "bits_per_byte", "tokens", "step"}
    assert f"{result['val_loss']:.4f}" in call("eval", run).stdout


def test_sample_writes_the_prompt_and_what_follows(run):
    arguments = (
        "sample",
        run,
        "--prompt",
        "the ",
        "--max-new-tokens",
        "12",
        "--checkpoint",
        "last",
    )
    one = call(*arguments)
    assert one.returncode == 0 and one.stdout.startswith("the ")
    assert len(one.stdout) == 4 + 12 + 1
    assert call(*arguments).stdout == one.stdout
    many = call(*arguments, "--num-samples", "3").stdout
    assert many.count("--- sample") == 3 and one.stdout in many


def test_checkpoint_commands(run):
    listed = call("checkpoint", "ls", run).stdout
    assert "best" in listed and "12" in listed
    assert call("checkpoint", "verify", run).returncode == 0
    digest = json.loads(call("checkpoint", "digest", run, "--json").stdout)
    assert digest == RunFolder(run).find("last", print).digest()
    assert call("checkpoint", "digest", run).stdout.splitlines()[-1] == f"{digest['all']}  all"


def test_verify_says_which_checkpoint_is_damaged(data, tmp_path):
    run_here(data, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    step = folder.steps()[0]
    (folder.place(step) / "rank-00000.safetensors").write_bytes(b"x")
    done = call("checkpoint", "verify", tmp_path / "run")
    assert done.returncode == 1 and "damaged" in done.stdout and "whole" in done.stdout


def test_bench_measures(tmp_path):
    sets = [word for s in (*TINY, "model.vocab_size=20") for word in ("--set", s)]
    result = json.loads(call("bench", "--steps", "3", "--json", "--threads", "1", *sets).stdout)
    keys = {"ms_per_step", "tokens_per_second", "peak_memory_bytes", "gflops_per_second"}
    assert keys < set(result) and all(result[key] > 0 for key in keys)
    assert result["tokens_per_second"] == pytest.approx(8 * 16 / result["ms_per_step"] * 1e3)
    lines = call("bench", "--steps", "1", "--threads", "1", *sets).stdout.splitlines()
    assert "ms a step" in lines[0] and "GFLOP/s" in lines[1] and len(lines) == 2


def test_a_run_without_settings_keeps_its_own(data, tmp_path):
    run_here(data, tmp_path / "run", "train.max_steps=4")
    done = call("train", "--out", tmp_path / "run", "--max-steps", "6")
    assert done.returncode == 0, done.stderr
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["step"] == 6


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    out = tmp_path / "run"
    first = start(command(data, out, "train.max_steps=100000"))
    metrics = RunFolder(out).metrics
    refused = []

    def second_was_refused():
        if metrics.exists() and not refused:
            refused.append(
                subprocess.run(command(data, out), capture_output=True, text=True, timeout=60)
            )
        return bool(refused)

    assert kill_when(first, second_was_refused)
    first.communicate(timeout=60)
    assert refused[0].returncode == 1
    assert f"another process (pid {first.pid}) is training in it" in refused[0].stderr
    # the lock went with its owner
    again = subprocess.run(
        command(data, out, "train.max_steps=1"), capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr


def test_a_full_disk_loses_nothing(data, tmp_path):
    """A file-size limit stands in for the full disk: the save fails, the older checkpoint stays."""
    out = tmp_path / "run"
    run_here(data, out, "train.max_steps=4")
    before = RunFolder(out).find("last", print).digest()
    script = "ulimit -f 4; exec " + " ".join(f"'{a}'" for a in command(data, out))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    folder = RunFolder(out)
    assert folder.find("last", print).digest() == before
    assert not list(folder.checkpoints.glob(".tmp-*"))


class TestProcess:
    def prepared(self, *arguments, **environment):
        code = (
            "import json, sys, os\n"
            "from cupytron import process\n"
            f"record = process.prepare({', '.join(arguments)})\n"
            "import numpy\n"
            "from threadpoolctl import threadpool_info\n"
            "info = [p for p in threadpool_info() if p['user_api'] == 'blas'][0]\n"
            "print(json.dumps([record, info['num_threads'], info.get('architecture')]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, **environment},
        )
        return json.loads(done.stdout)

    def test_threads_reach_blas(self):
        record, threads, _ = self.prepared("threads=1", "blas_kernel='off'")
        assert record["threads"] == threads == 1
        record, threads, _ = self.prepared("threads=2", "blas_kernel='off'", "deterministic=True")
        assert record["threads"] == threads == 1

    def test_the_environment_s_number_of_threads_is_respected(self):
        record, threads, _ = self.prepared("blas_kernel='off'", OMP_NUM_THREADS="1")
        assert record["threads"] == threads == 1

    def test_a_named_kernel_is_used_and_said(self):
        record, _, architecture = self.prepared(
            "blas_kernel='Haswell'", OPENBLAS_CORETYPE="Prescott"
        )
        assert architecture == "Haswell"
        assert "the environment said Prescott" in process.describe(record)

    def test_off_leaves_what_the_environment_says(self):
        record, _, architecture = self.prepared("blas_kernel='off'", OPENBLAS_CORETYPE="Haswell")
        assert architecture == record["blas_kernel"] == "Haswell"

    def test_the_measurement_is_kept_and_survives_a_bad_cache(self, tmp_path):
        first, _, _ = self.prepared("blas_kernel='auto'", XDG_CACHE_HOME=str(tmp_path))
        file = tmp_path / "cupytron" / "blas-kernel.json"
        kept = file.read_text() if file.exists() else None
        second, _, _ = self.prepared("blas_kernel='auto'", XDG_CACHE_HOME=str(tmp_path))
        assert first["blas_kernel"] == second["blas_kernel"]
        if kept is not None:
            assert file.read_text() == kept
            file.write_text('{"x": ')
            third, _, _ = self.prepared("blas_kernel='auto'", XDG_CACHE_HOME=str(tmp_path))
            assert third["blas_kernel"]
        (tmp_path / "file").write_text("")  # a cache folder that cannot be made
        assert self.prepared("blas_kernel='auto'", XDG_CACHE_HOME=str(tmp_path / "file"))

    def test_changes_are_named(self):
        before = {"threads": 1, "numpy": "2.1"}
        assert process.changes(before, {"threads": 1, "numpy": "2.2"}) == [
            "numpy: 2.1 before, 2.2 now"
        ]
        assert process.changes(before, dict(before)) == []

    @pytest.mark.parametrize(
        "name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"]
    )
    def test_launchers_are_seen(self, monkeypatch, name):
        monkeypatch.setenv(name, "3")
        assert launcher.launched_tasks() == 3
        monkeypatch.setenv(name, "x")
        assert launcher.launched_tasks() == 1

    @pytest.mark.parametrize(
        ("environment", "tasks", "rank", "local"),
        [
            ({}, 1, 0, 1),
            # mpirun's own helpers were started by srun, one on each of 8 nodes
            (
                {
                    "OMPI_COMM_WORLD_SIZE": "4",
                    "OMPI_COMM_WORLD_RANK": "3",
                    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                    "SLURM_STEP_NUM_TASKS": "8",
                    "SLURM_PROCID": "1",
                },
                4,
                3,
                2,
            ),
            ({"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALNRANKS": "4"}, 4, 2, 4),
            # a batch script
            ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1, 0, 1),
            ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, 0, 1),
            ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, 8, 5, 8),
            (
                {
                    "SLURM_STEP_NUM_TASKS": "11",
                    "SLURM_PROCID": "9",
                    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
                    "SLURM_NODEID": "2",
                },
                11,
                9,
                3,
            ),
        ],
    )
    def test_launchers_say_who_we_are(self, monkeypatch, environment, tasks, rank, local):
        for name in list(os.environ):
            if name.startswith(("OMPI_", "PMI", "MPI_", "SLURM_")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert launcher.launched_tasks() == tasks
        assert launcher.launched_rank() == rank
        assert process.local_ranks() == local

    @pytest.mark.parametrize(
        ("own", "launcher", "ranks", "threads"),
        [
            (8, 8, 1, 8),
            (8, 8, 2, 4),
            (8, 8, 16, 1),
            (2, 8, 4, 2),  # bound, each to its own
            (4, 8, 2, 4),
            (4, 8, 4, 1),  # bound, two of them to the same cores
            (1, 1, 2, 1),
        ],
    )
    def test_ranks_share_the_cores_of_a_node(self, monkeypatch, own, launcher, ranks, threads):
        masks = {0: range(own), os.getppid(): range(launcher)}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(masks[pid]), raising=False)
        monkeypatch.setattr(process, "local_ranks", lambda: ranks)
        assert process._share_of_cores() == threads

    def test_ranks_are_told_in_the_line_at_start(self):
        record, threads, _ = self.prepared(
            "blas_kernel='off'", PMI_SIZE="64", PMI_RANK="1", MPI_LOCALNRANKS="64"
        )
        assert record["threads"] == threads == 1
        assert record["ranks_on_node"] == 64
        assert "64 ranks on this node, 1 thread each;" in process.describe(record)
        assert "2 threads each" in process.describe({**record, "threads": 2})
