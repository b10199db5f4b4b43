#!/bin/sh
# Install what the tests under Slurm need, where root and apt are there; otherwise the tests say what is missing.
if command -v slurmctld > /dev/null && command -v munged > /dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then exit 0; fi
# Debian's Slurm looks for PMIx under the name that only libpmix-dev brings
timeout 300 sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge libpmix-dev' > /dev/null ||
    echo "warning: Slurm could not be installed: its tests will be skipped"
