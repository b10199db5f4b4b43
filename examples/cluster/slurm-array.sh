#!/bin/bash
#SBATCH --array=1-4
#SBATCH --ntasks=2
#SBATCH --time=1:00:00
# A run for each seed by a job array, with MPICH:
#   sbatch slurm-array.sh /shared/run cupytron train --preset demo --data /shared/data
# trains the runs /shared/run-1 to /shared/run-4, with the seeds 1 to 4.
run=$1
shift
exec srun --kill-on-bad-exit --mpi=pmi2 "$@" \
    --out "$run-$SLURM_ARRAY_TASK_ID" --seed "$SLURM_ARRAY_TASK_ID"
