#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks=4
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Open MPI under Slurm:
#   sbatch slurm-openmpi.sh cupytron train --preset demo --data /shared/data --out /shared/run
# Two minutes before the time limit every rank gets USR1. The run saves and ends with exit code 75. Then the
# job is put into the queue again, and the same command goes on from there, until the run is finished.
# srun gets no --kill-on-bad-exit, since that takes the first exit code 75 for a failure, and may kill the
# other ranks before they end.
srun --mpi=pmix "$@"
code=$?
if [ "$code" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
