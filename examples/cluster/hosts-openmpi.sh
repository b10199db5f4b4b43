#!/bin/sh
# Open MPI's own launcher starts a job on several hosts, without a batch system. This command starts two
# ranks on each of node1 and node2:
#   hosts-openmpi.sh node1,node2 2 cupytron train --preset demo --data /shared/data --out /shared/run
# The hosts need each other's names, ssh without a password, and the same program, data and run in the same
# folders.
set -eu
hosts=$1 each=$2
shift 2
count=$(echo "$hosts" | tr , '\n' | wc -l)
# Open MPI passes on no environment by itself. These two variables name the MPI library and the threads.
exec mpirun ${MPI4PY_LIBMPI:+-x MPI4PY_LIBMPI} ${OMP_NUM_THREADS:+-x OMP_NUM_THREADS} \
    --host "$(echo "$hosts" | sed "s/,/:$each,/g"):$each" -n "$((count * each))" "$@"
