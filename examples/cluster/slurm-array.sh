#!/bin/bash
#SBATCH --array=1-4
#SBATCH --ntasks=2
#SBATCH --time=1:00:00
# A job array trains one run for each seed, with MPICH. This command trains the runs /shared/run-1 to
# /shared/run-4, with the seeds 1 to 4:
#   sbatch slurm-array.sh /shared/run cupytron train --preset demo --data /shared/data
run=$1
shift
exec srun --kill-on-bad-exit --mpi=pmi2 "$@" \
    --out "$run-$SLURM_ARRAY_TASK_ID" --seed "$SLURM_ARRAY_TASK_ID"
