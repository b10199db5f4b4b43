"""What is told of work on a GPU: traces with its times, NVTX ranges, its memory, and what would fit it."""

import contextlib
import gc
import itertools
import json

import numpy as np
import pytest
from runs import ENVIRONMENT, TEXT, TINY, make_data
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import bench, kernels, mesh_run, metrics, ops, terminal, trace
from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import load_config, resolve_model
from cupytron.data import open_dataset
from cupytron.errors import CupytronError
from cupytron.memory import estimate, explained, size
from cupytron.parallel import schedules
from cupytron.run import train
from cupytron.run_folder import RunFolder
from cupytron.trace import ACTIONS, COMMUNICATION, Trace
from cupytron.trained import load
from cupytron.trainer import Trainer

SMALL = [
    "model.vocab_size=40",
    "model.num_layers=2",
    "model.d_model=32",
    "train.sequence_length=16",
    "train.micro_batch=4",
    "train.global_batch=8",
    "train.compute_dtype=bfloat16",
    "parallel.autotune=off",
    "parallel.device=cuda",
]

LARGE = [
    "model.d_model=32",
    "train.sequence_length=32",
    "train.micro_batch=16",
    "train.global_batch=16",
]


@pytest.fixture
def cupy():
    with simulated_libraries(), simulated_gpu() as module:
        yield module
    ops.use(None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), text=TEXT[:4000])


def trainer_of(*settings, materialize=True):
    config = load_config(overrides=[*SMALL, *settings])
    trainer = Trainer(config, None, mesh_run.open_mesh(config))
    if materialize:
        trainer.materialize()
    return trainer


def step(trainer):
    shape = (2, len(trainer.local_sequences), trainer.config.train.sequence_length)
    return trainer.train_step(*np.random.default_rng(0).integers(0, 40, shape))


def run(data, out, *settings, world=None, check=True, **options):
    more = ["parallel.device=cuda", "parallel.autotune=off", "train.max_steps=3", *settings]
    config = load_config(overrides=[*TINY, f'data.path="{data}"', *more], check=check)
    return train(config, out, dict(ENVIRONMENT), world=world, **options)


# traces


class Stream:
    """Of a GPU that works on its own time: what is started is done one after the other."""

    def __init__(self, clock):
        self.clock, self.idle_at = clock, 0.0

    def work(self, seconds):
        self.idle_at = max(self.idle_at, self.clock.now) + seconds

    def synchronize(self):
        self.clock.now = max(self.clock.now, self.idle_at)


class Event:
    def record(self, stream):
        self.time, self.clock = max(stream.idle_at, stream.clock.now), stream.clock

    def synchronize(self):
        self.clock.now = max(self.clock.now, self.time)


class Card:
    """A GPU, as far as a trace asks; its own time began a thousand seconds ago."""

    gpu, name = True, "cuda:0 (a card)"

    def __init__(self, clock):
        self.xp, self.cuda, self.stream = self, self, Stream(clock)

    Event = Event

    def get_elapsed_time(self, start, end):
        return (end.time - start.time) * 1e3


class Clock:
    now = 50.0

    def perf_counter(self):
        return self.now


def test_actions_have_the_times_of_the_gpu(monkeypatch):
    """The host starts an action in a tenth of a second, and the GPU takes two for it."""
    clock = Clock()
    monkeypatch.setattr(trace, "time", clock)
    card, tracing = Card(clock), Trace(3, 5)
    context = ParallelContext(device=card)
    actions = schedules.make("1f1b", 1, 2).actions[0]
    card.stream.work(7.0)  # of the step before, which is no part of the trace
    for number in (3, 4):
        with tracing.step(number, context):
            began = clock.now
            for action in actions:
                with tracing.action(0, action):
                    card.stream.work(2.0)
                    clock.now += 0.1
            assert clock.now - began == pytest.approx(0.1 * len(actions))  # nothing was waited for
    record = tracing.record(context)
    assert record.gpu == card.name
    for number, first in ((3, 7.0), (4, 7.0 + 2.0 * len(actions))):
        spans = record.spans[number]
        assert [s.action for s in spans] == list(actions)
        starts = [first + 2.0 * i for i in range(len(actions))]
        assert [s.start for s in spans] == pytest.approx(starts)
        assert [s.end for s in spans] == pytest.approx([start + 2.0 for start in starts])


def test_a_step_that_fails_is_not_waited_for():
    clock = Clock()
    card, tracing = Card(clock), Trace(0, 1)
    action = schedules.Action("F", 0)
    with pytest.raises(KeyError), tracing.step(0, ParallelContext(device=card)):
        with tracing.action(0, action):
            card.stream.work(5.0)
        raise KeyError
    assert clock.now < card.stream.idle_at and tracing.record(ParallelContext()).spans == {0: []}


def events_of(folder):
    return json.loads((folder / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("pp", [1, 2])
def test_a_run_s_trace_says_whose_times_it_has(cupy, data, tmp_path, monkeypatch, pp):
    factor = 1000.0
    elapsed = cupy.cuda.get_elapsed_time
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda a, b: factor * elapsed(a, b))
    sizes = [f"parallel.pp={pp}"] if pp > 1 else []

    def body(world):
        run(data, tmp_path, *sizes, trace=(1, 3), world=world, check=False)

    run_ranks(pp, body)
    events = events_of(tmp_path)
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for rank in range(pp):
        assert tracks[rank, ACTIONS] == "actions on cuda:0 (Simulated GPU)"
        assert tracks[rank, COMMUNICATION] == "communication, the host's calls"
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        actions = [e for e in spans if e["tid"] == ACTIONS]
        calls = [e for e in spans if e["tid"] == COMMUNICATION]
        wanted = schedules.make("1f1b", pp, 2).actions[rank]
        got = [(e["args"]["step"], e["args"]["kind"], e["args"]["micro_batch"]) for e in actions]
        assert got == [(n, a.kind, a.micro_batch) for n in (1, 2) for a in wanted]
        for one, other in itertools.pairwise(actions):
            if one["args"]["step"] == other["args"]["step"]:
                assert round((one["ts"] + one["dur"]) * 1000) <= round(other["ts"] * 1000)
        # the GPU's clock was made to run a thousand times as fast, and the host's was not
        assert actions[0]["ts"] >= 0 and calls
        assert sum(e["dur"] for e in actions) > 20 * sum(e["dur"] for e in calls)


# ranges


def test_ranges_name_what_is_started(cupy):
    trainer = trainer_of("parallel.graphs=false")
    step(trainer)
    cupy.sim.clear()
    step(trainer)
    actions = [
        f"{a.kind} {a.micro_batch}, chunk 0" for a in schedules.make("1f1b", 1, 2).actions[0]
    ]
    reductions = [f"reduce {b.name}" for b in trainer.zero.buckets]
    found = cupy.sim.names
    assert found[0] == "step 1" and found[-1] == "update"
    assert [name for name in found if name in actions] == actions
    assert sorted(name for name in found if name.startswith("reduce ")) == sorted(reductions)
    assert len(found) == 2 + len(actions) + len(reductions)
    # each is closed, and lies in the step
    ends = [1 if kind == "range" else -1 for kind, _, _ in cupy.sim.log if kind in ("range", "pop")]
    depth = list(itertools.accumulate(ends))
    assert min(depth[:-1]) == 1 and depth[-1] == 0


def test_ranges_of_recorded_steps(cupy):
    trainer = trainer_of()
    for _ in range(3):
        cupy.sim.clear()
        step(trainer)
    names = [name for name in cupy.sim.names if not name.startswith("reduce ")]
    assert names == ["step 2", "micro-batch 0", "micro-batch 1", "update"]


def test_a_range_is_closed_by_an_error(cupy):
    device = trainer_of(materialize=False).context.device
    cupy.sim.clear()
    with pytest.raises(KeyError), device.range("bad"):
        raise KeyError
    assert [(kind, name) for kind, name, _ in cupy.sim.log] == [("range", "bad"), ("pop", "")]


# memory


class Held:
    """In a trace's place: bytes of the allocations that the stashes hold after each action."""

    def __init__(self, stashes):
        self.stashes, self.most = stashes, 0

    @contextlib.contextmanager
    def action(self, stage, action):
        yield
        held = {}
        for stash in self.stashes.values():
            for array in itertools.chain(*(arrays for _, arrays in stash._entries)):
                held[id(array.data.mem)] = max(held.get(id(array.data.mem), 0), array.nbytes)
        self.most = max(self.most, sum(held.values()))


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_estimate_is_what_kernels_keep(cupy, family, recompute):
    trainer = trainer_of(
        f"model.family={family}", f"model.recompute={recompute}", "model.dropout=0.1"
    )
    pipeline = trainer.zero.pipeline
    held = pipeline.trace = Held(pipeline.stashes)
    step(trainer)
    found = estimate(trainer.config, trainer.model.config)
    assert found.activations + found.logits == held.most
    assert found.persistent == trainer.zero.persistent_bytes


def test_memory_of_recorded_steps_counts(cupy):
    trainer = trainer_of()
    device = trainer.context.device
    for _ in range(4):
        step(trainer)
    pools = [graph.pool.total_bytes() for graph in device.graphs]
    assert len(pools) == 2 and max(pools) > 0
    assert device.used_bytes() == cupy.get_default_memory_pool().total_bytes() + sum(pools)
    assert metrics.peak_memory_bytes(device) == device.used_bytes() == cupy.sim.device_bytes
    del trainer
    assert device.free_bytes() > 0


def estimated(data, *settings):
    """Of a run on the data."""
    config = load_config(overrides=[*TINY, *settings])
    vocab_size, sequence = open_dataset(data).vocab_size, config.train.sequence_length
    return estimate(config, resolve_model(config.model, vocab_size, sequence))


@pytest.mark.parametrize(
    "more",
    [[], ["train.compute_dtype=bfloat16", "model.recompute=block"], ["parallel.graphs=false"]],
)
def test_the_estimate_of_a_run_is_near_what_it_takes(cupy, data, tmp_path, monkeypatch, more):
    """At least as much, since by it something else is advised."""
    told = []
    monkeypatch.setattr(terminal.Progress, "step", lambda self, record: told.append(record))
    run(data, tmp_path, *LARGE, *more)
    found = estimated(data, *LARGE, *more)
    assert 0.8 * found.total < max(r["peak_memory_bytes"] for r in told) < found.total


def test_what_does_not_fit_is_explained_and_what_is_advised_fits(cupy, data, tmp_path):
    """Too many sequences at once: the run ends with one line, and goes on with the settings in it."""
    found = estimated(data, *LARGE)
    cupy.sim.memory_limit = int(0.6 * found.total)
    with pytest.raises(CupytronError) as error:
        run(data, tmp_path, *LARGE)
    told = str(error.value)
    assert "\n" not in told and told.startswith("out of memory on cuda:0 (Simulated GPU): ")
    assert "MiB more were asked for; of its 141.0 GiB this process holds " in told
    assert f"By estimate a rank needs {size(found.total)} (weights " in told
    assert "step 1, " in error.value.__notes__[0]
    advised = told.partition("); ")[2].partition(" would fit")[0].split()
    assert advised == ["train.micro_batch=8", "train.global_batch=16"]
    del error
    # a process of its own; the simulation still counts pools that went while something was in them
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.sim.memory_limit += cupy.sim.device_bytes
    run(data, tmp_path, *LARGE, *advised)


def test_a_trained_model_that_does_not_fit_is_explained(cupy, data, tmp_path):
    run(data, tmp_path, "train.eval_interval=0")
    config = load_config(overrides=["parallel.device=cuda", "parallel.autotune=off"])
    context = mesh_run.open_mesh(config)
    model = load(tmp_path, context=context)
    for work in (
        model.evaluate,
        lambda: model.generate("the ", 4),
        lambda: load(tmp_path, context=context),
    ):
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        with cupy.sim.limited(0), pytest.raises(CupytronError) as error:
            work()
        told = str(error.value)
        assert told.startswith(
            "out of memory on cuda:0 (Simulated GPU): 0.0 MiB more were asked for"
        )
        assert "MiB (weights 0.0 MiB, logits 0.0 MiB, working 0." in told
        assert "nothing tried here would fit" in told or "--tp 2 on 2 ranks would fit" in told
        del error


def test_other_errors_stay_what_they_are(cupy):
    context = mesh_run.open_mesh(load_config(overrides=[*SMALL]))
    config = load_config(overrides=[*SMALL])
    model = resolve_model(config.model, None, 16)
    for wrong in (
        MemoryError("of the host"),
        cupy.cuda.runtime.CUDARuntimeError("cudaErrorIllegalAddress"),
    ):
        with pytest.raises(type(wrong)) as error, explained(config, model, context):
            raise wrong
        assert error.value is wrong
    for said in (
        "cudaErrorMemoryAllocation: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",  # a kernel is loaded
        "ALLOC_FAILED (3)",  # of cuBLASLt
    ):
        with pytest.raises(CupytronError, match="out of memory"), explained(config, model, context):
            raise cupy.cuda.runtime.CUDARuntimeError(said)
    with pytest.raises(MemoryError), explained(config, model, ParallelContext()):
        raise MemoryError


# MFU


def test_a_run_records_its_share_of_a_known_card_s_peak(cupy, data, tmp_path, monkeypatch):
    run(data, tmp_path / "unknown")
    monkeypatch.setattr(metrics, "card_peak", lambda name, config: 1e9)
    run(data, tmp_path / "known")
    for name, known in (("known", True), ("unknown", False)):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for line in lines:
            assert ("mfu" in line and "mfu_causal" in line) == (known and "loss" in line)
            if "mfu" in line:
                assert 0 < line["mfu_causal"] < line["mfu"]


# bench


def test_why_cudnn_was_not_used_is_in_the_records(cupy, data, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_refusals", {})
    heads = ["model.num_heads=2", "model.d_model=24"]  # of 12 features; cuDNN takes multiples of 8
    with pytest.warns(RuntimeWarning, match="attention runs on cupytron's own kernel"):
        found = bench.measure(load_config(overrides=[*SMALL, *heads]), 1, {})
    (reason,) = found["environment"]["cudnn_refused"]
    assert "this is 12" in reason
    overrides = [*TINY, *heads, f'data.path="{data}"', "train.max_steps=1", "parallel.device=cuda"]
    config = load_config(overrides=[*overrides, "train.compute_dtype=bfloat16"])
    train(config, tmp_path / "run", dict(ENVIRONMENT), quiet=True)
    about = RunFolder(tmp_path / "run").find("last", print).about
    assert about["environment"]["cudnn_refused"] == [reason]


def test_bench_measures_a_gpu(cupy):
    peak = []

    def note(step, phase):
        peak.append(cupy.sim.device_bytes)

    found = bench.measure(load_config(overrides=SMALL), 3, {}, note=note)
    assert found["device"] == "cuda:0 (Simulated GPU)" and found["mfu"] is None
    # steps are recorded by then, and pools give nothing back
    assert found["peak_memory_bytes"] == peak[-1] > 0
    assert found["environment"]["gpu"] == "Simulated GPU"
    assert found["ms_per_step"] > 0 and len(peak) == bench.GPU_WARMUP + 3
    found = bench.measure(load_config(overrides=SMALL), 1, {}, peak_tflops=1e-6)
    assert found["mfu"] == pytest.approx(found["gflops_per_second"] * 1e3)
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    with cupy.sim.limited(0), pytest.raises(CupytronError, match="out of memory on cuda:0"):
        bench.measure(load_config(overrides=SMALL), 1, {})
