"""The line that says how to stop a job, under every launcher, and how long a failed rank waits for MPI."""

import pytest

from cupytron.failing import scaled
from cupytron.launcher import Ancestor, how_to_stop

PROXY = Ancestor(
    20, "hydra_pmi_proxy", ["hydra_pmi_proxy", "--control-port", "hnctl:3393", "--rmk"]
)
SHELL, SSHD = Ancestor(30, "bash"), Ancestor(40, "sshd")
STEP = Ancestor(50, "slurmstepd")
SLURM = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}
PRRTE = {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_NAMESPACE": "prterun-login-2-815@1"}


@pytest.mark.parametrize(
    ("environment", "above", "said"),
    [
        ({"PMI_SIZE": "2"}, [PROXY, Ancestor(10, "mpiexec"), SHELL], "kill -USR1 10, on hn1"),
        ({"PMI_SIZE": "2"}, [PROXY, Ancestor(10, "mpiexec.hydra")], "kill -USR1 10, on hn1"),
        # hydra over ssh: its proxy ignores the signal
        ({"PMI_SIZE": "4"}, [PROXY, SSHD], "kill -USR1 PID-OF-MPIRUN, on hnctl"),
        # Open MPI 5: on mpirun's machine, and below a daemon on another one
        (PRRTE, [Ancestor(815, "prterun"), SHELL], "kill -USR1 815, on hn1"),
        (PRRTE, [Ancestor(9, "prted"), SSHD], "kill -USR1 815, on login-2"),
        # Open MPI 4
        ({"PMIX_NAMESPACE": "3407872001"}, [Ancestor(8, "mpirun")], "kill -USR1 8, on hn1"),
        (
            {"PMIX_NAMESPACE": "3407872001"},
            [Ancestor(9, "orted"), SSHD],
            "kill -USR1 PID-OF-MPIRUN, on the machine where it was started",
        ),
        # srun, also where a container hides the processes above
        (SLURM, [STEP], "scancel --signal=USR1 17"),
        (SLURM, [], "scancel --signal=USR1 17"),
        # mpirun inside a batch script, on its node and on another one
        (BATCH, [Ancestor(8, "mpirun"), SHELL, STEP], "kill -USR1 8, on hn1"),
        (SLURM, [PROXY, STEP], "kill -USR1 PID-OF-MPIRUN, on hnctl"),
        (SLURM | PRRTE, [Ancestor(9, "prted"), STEP], "kill -USR1 815, on login-2"),
    ],
)
def test_the_command_that_stops_a_job(environment, above, said):
    assert how_to_stop(environment, above, "hn1") == said


def test_patience_grows_with_ranks_and_load():
    assert scaled(5, 2, 0.5, 16) == 5
    assert scaled(5, 64, 1.0, 2) == 37  # 64 ranks on two cores take 30 seconds to begin
    assert scaled(5, 2, 20.0, 2) == 15
    assert scaled(5, 10_000, 0.0, 1) == 125
