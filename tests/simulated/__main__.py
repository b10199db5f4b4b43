"""Run a module on a simulated GPU: python -m simulated MODULE ARGUMENTS..."""

import runpy
import sys

from simulated import simulated_gpu

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m simulated MODULE ARGUMENTS...")
    del sys.argv[0]
    with simulated_gpu():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
