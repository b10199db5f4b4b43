"""Where a training run can be made to stop, fail or be slow: the functions that begin each of its phases.

A profile hook sees every call without importing anything. So the job imports modules, and begins with MPI,
when it always does.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# phase: (end of the file's name, function, which call of it, whether rank 0 alone calls it)
PHASES = {
    "import": ("numpy/__init__.py", "<module>", 1, False),
    "options": ("cli/options.py", "Settings.load", 1, False),
    "process": ("cupytron/process.py", "prepare", 1, False),
    "mpi": ("cupytron/launcher.py", "begin_mpi", 1, False),
    "mesh": ("cupytron/mesh_run.py", "open_mesh", 1, False),
    "device": ("cupytron/gpu.py", "open_device", 1, False),
    "data": ("data/dataset.py", "open_dataset", 1, False),
    "trainer": ("cupytron/trainer.py", "Trainer.__init__", 1, False),
    "materialize": ("cupytron/parallel/zero.py", "Zero.materialize", 1, False),
    "restore": ("cupytron/run.py", "_Run._restore", 1, False),
    "folder": ("cupytron/run_folder.py", "RunFolder.create", 1, True),
    "forward": ("cupytron/nn/block.py", "Block.forward", 9, False),
    "backward": ("cupytron/nn/block.py", "Block.backward", 1, False),
    "reduce": ("cupytron/parallel/zero.py", "Zero._reduce", 2, False),
    "update": ("cupytron/optim.py", "apply", 1, False),
    "evaluate": ("cupytron/trainer.py", "evaluate", 1, False),
    "write": ("cupytron/checkpoint_format.py", "write_tensors", 1, False),
    "finish": ("cupytron/checkpoint.py", "_finish", 1, True),
    "prune": ("cupytron/run_checkpoints.py", "RunCheckpoints.prune", 1, True),
    "trace": ("cupytron/run.py", "_Run._write_trace", 1, False),
    "end": ("cupytron/terminal.py", "Display.close", 1, False),
    "exit": ("cupytron/launcher.py", "end_mpi", 1, False),
}

# kind of slow work: (end of the calling file's name, function); the job sleeps before each such call
SLOW = {
    "start": [(".py", "<module>")],  # of every module that is imported
    "step": [("cupytron/nn/block.py", "Block.backward")],
    "materialize": [("cupytron/layer.py", "Parameter.initial_values")],
    "evaluate": [("cupytron/nn/block.py", "Block.forward")],
    "data": [("data/dataset.py", "check_ids")],
    "save": [
        ("cupytron/checkpoint_format.py", "write"),
        ("cupytron/checkpoint_format.py", "update"),
        ("cupytron/durable.py", "fsync"),
        ("shutil.py", "unlink"),
        ("shutil.py", "rmdir"),
    ],
}


def break_phase(phase: str, file: Path, fail: Callable[[], None]) -> None:
    """Where the phase begins, write the time to `file`, and call fail()."""
    name, function, number, _ = PHASES[phase]
    calls = 0

    def hook(frame, event, _):
        nonlocal calls
        code = frame.f_code
        if event != "call" or code.co_qualname != function or not code.co_filename.endswith(name):
            return
        calls += 1
        if calls == number:
            sys.setprofile(None)
            file.write_text(str(time.time()))
            fail()

    sys.setprofile(hook)


def slow_down(kind: str, file: Path, seconds: float, long: float) -> None:
    """Sleep before each call of this kind.

    Args:
        kind: a key of SLOW.
        file: gets the seconds of all sleeps together.
        seconds: of one sleep.
        long: seconds of the sleep before the first fsync; 0: as the others.
    """
    slept = 0.0
    places = SLOW[kind]

    def nap(seconds: float) -> None:
        nonlocal slept
        time.sleep(seconds)
        slept += seconds
        file.write_text(str(slept))

    def hook(frame, event, called):
        nonlocal long
        if event == "call":
            name = frame.f_code.co_qualname
        elif event == "c_call":
            name = called.__name__
        else:
            return
        for where, function in places:
            if name == function and frame.f_code.co_filename.endswith(where):
                nap(long if called is os.fsync and long else seconds)
                long = 0.0 if called is os.fsync else long

    sys.setprofile(hook)
