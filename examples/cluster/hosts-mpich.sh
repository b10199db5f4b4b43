#!/bin/sh
# MPICH's own launcher starts a job on several hosts, without a batch system. This command starts two
# ranks on each of node1 and node2:
#   hosts-mpich.sh node1,node2 2 cupytron train --preset demo --data /shared/data --out /shared/run
# The hosts need each other's names, ssh without a password, and the same program, data and run in the same
# folders.
set -eu
hosts=$1 each=$2
shift 2
count=$(echo "$hosts" | tr , '\n' | wc -l)
exec mpirun -hosts "$hosts" -ppn "$each" -n "$((count * each))" "$@"
