"""What stages keep for backward, on twelve meshes, and by how much their processes grow.

    MALLOC_MMAP_THRESHOLD_=65536 mpirun -n 4 python tests/pipeline_memory.py

Prints a line for each stage; exit code 1 if a process grew by something else than what its stashes held, to
10 %. (With that threshold the C library gives freed memory back at once.) With --small nothing is held
against anything. tests/test_pipeline.py holds the stashes' own count against the schedules' formulas.
"""

import sys
from typing import NamedTuple

import numpy as np

from cupytron.comm import ParallelContext, open_world
from cupytron.config import load_config
from cupytron.nn import Block
from cupytron.parallel import checker
from cupytron.stash import MicroBatch, Stash
from cupytron.trainer import Trainer

MESHES = [
    {"pp": 1, "schedule": "1f1b"},
    {"pp": 1, "schedule": "gpipe"},
    {"pp": 2, "schedule": "gpipe"},
    {"pp": 2, "schedule": "1f1b"},
    {"pp": 2, "schedule": "interleaved"},
    {"pp": 2, "schedule": "zb-h1"},
    {"pp": 4, "schedule": "gpipe"},
    {"pp": 4, "schedule": "1f1b"},
    {"pp": 4, "schedule": "zb-h1"},
    {"pp": 2, "schedule": "1f1b", "tp": 2, "sp": "true"},
    {"pp": 2, "schedule": "1f1b", "dp": 2, "zero": 1, "recompute": "selective"},
    {"pp": 2, "schedule": "gpipe", "recompute": "block"},
]
MICRO_BATCHES = 4
VOCABULARY = 16  # small, as what lives for a moment should be beside what is kept


class Sizes(NamedTuple):
    """Of the models: blocks of a stage, width, and sequences of a micro-batch and their length."""

    blocks: int
    width: int
    sequences: int
    length: int


class Watch:
    """In a trace's place: what the stashes hold after each action."""

    def __init__(self, pipeline):
        self.stashes, chunks = pipeline.stashes, pipeline.placement.chunks
        self.most = 0
        self.kept, self.awaiting = [0] * chunks, [0] * chunks  # of one micro-batch, by chunk

    def action(self, stage, action):
        self.current = action
        return self

    def __enter__(self):
        pass

    def __exit__(self, *error):
        kind, micro_batch, chunk = self.current
        if not self.stashes:
            return  # forward only
        mine = self.stashes[micro_batch, chunk].nbytes
        if kind == "F":
            self.kept[chunk] = mine
        elif kind == "B":
            self.awaiting[chunk] = mine
        else:
            assert mine == 0
        self.most = max(self.most, sum(stash.nbytes for stash in self.stashes.values()))


def make_trainer(mesh, sizes, world):
    """A trainer with as many blocks in each part of the pipeline, its context, and a batch."""
    mesh = {"recompute": "none", "dp": 1, **mesh}
    recompute = mesh.pop("recompute")
    chunks = 2 if mesh["schedule"] == "interleaved" else 1
    # more of the blocks that keep less: what one of them makes again for a moment should be little
    blocks = sizes.blocks * {"none": 1, "selective": 2, "block": 4}[recompute]
    config = load_config(
        overrides=[
            "model.num_heads=4",
            f"model.d_model={sizes.width}",
            f"model.vocab_size={VOCABULARY}",
            f"model.num_layers={blocks * mesh['pp']}",
            f"model.recompute={recompute}",
            f"train.sequence_length={sizes.length}",
            f"train.micro_batch={sizes.sequences}",
            f"train.global_batch={sizes.sequences * MICRO_BATCHES * mesh['dp']}",
            f"parallel.split={','.join([str(blocks // chunks)] * (chunks * mesh['pp']))}",
            *(f"parallel.{key}={value}" for key, value in mesh.items()),
        ]
    )
    axes = {axis: mesh.get(axis, 1) for axis in ("tp", "pp", "dp")}
    context = ParallelContext(axes, world=world)
    trainer = Trainer(config, None, context)
    trainer.materialize()
    shape = (2, len(trainer.local_sequences), sizes.length)
    return trainer, context, np.random.default_rng(0).integers(0, VOCABULARY, shape)


def formula(trainer, watch):
    """What the schedule says that this stage keeps, given what one micro-batch needs."""
    pipeline = trainer.zero.pipeline
    actions = pipeline.schedule(MICRO_BATCHES).actions[pipeline.pp.rank]
    return checker.peak(actions, watch.kept, watch.awaiting)


def one_block(trainer, sizes):
    """Bytes that a block keeps which is run again."""
    block = next(layer for _, layer in trainer.model.named_layers() if isinstance(layer, Block))
    stash = Stash(MicroBatch(sizes.sequences, sizes.length))
    block.forward(np.zeros((sizes.sequences * sizes.length, sizes.width), np.float32), stash)
    return stash.nbytes


def memory(field):
    """Bytes; VmHWM: the most that was resident, VmRSS: what is."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(world, mesh, sizes):
    """Stage, bytes that its stashes held at most, and by how many its process grew."""
    trainer, context, batch = make_trainer(mesh, sizes, world)
    trainer.train_step(*batch)  # agrees on messages, and touches every page that stays
    watch = trainer.zero.pipeline.trace = Watch(trainer.zero.pipeline)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins again
    before = memory("VmRSS")
    trainer.compute_gradients(*batch)
    grew = memory("VmHWM") - before
    wanted = watch.most
    if mesh.get("recompute") == "block":
        wanted += one_block(trainer, sizes)
    found = world.gather_objects((context.coordinates["pp"], wanted, grew))
    context.close()
    return sorted(set(found))


def main():
    worst, small = 0.0, "--small" in sys.argv
    sizes = Sizes(2, 16, 2, 8) if small else Sizes(8, 64, 32, 64)
    with open_world() as world:
        for mesh in MESHES:
            size = mesh["pp"] * mesh.get("tp", 1) * mesh.get("dp", 1)
            group = world.split(int(world.rank >= size), world.rank, "world")
            found = [] if world.rank >= size else measure(group, mesh, sizes)
            group.close()
            for stage, wanted, grew in found:
                worst = max(worst, abs(grew / wanted - 1))
                if world.rank == 0:
                    said = f"stashes {wanted / 1e6:6.1f} MB, process {grew / 1e6:6.1f} MB"
                    print(f"{mesh} stage {stage}: {said}, {grew / wanted:.3f}", flush=True)
        if world.rank == 0:
            print(f"the largest difference is {worst:.1%}")
    return int(worst > 0.1 and not small)


if __name__ == "__main__":
    sys.exit(main())
