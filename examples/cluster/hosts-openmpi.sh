#!/bin/sh
# Several hosts by Open MPI's own launcher, without a batch system:
#   hosts-openmpi.sh node1,node2 2 cupytron train --preset demo --data /shared/data --out /shared/run
# starts two ranks on each of node1 and node2. The hosts need each other's names, ssh without a password,
# and the same program, data and run in the same folders.
set -eu
hosts=$1 each=$2
shift 2
count=$(echo "$hosts" | tr , '\n' | wc -l)
# Open MPI hands on no environment by itself; these two say which library and how many threads
exec mpirun ${MPI4PY_LIBMPI:+-x MPI4PY_LIBMPI} ${OMP_NUM_THREADS:+-x OMP_NUM_THREADS} \
    --host "$(echo "$hosts" | sed "s/,/:$each,/g"):$each" -n "$((count * each))" "$@"
