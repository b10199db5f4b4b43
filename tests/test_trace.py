"""A trace holds every action, call and wait of the steps asked for, and of no others; and breaks no run."""

import itertools
import json
import signal
import subprocess
from collections import Counter

import numpy as np
import pytest
from launchers import launch
from runs import ENVIRONMENT, TINY, command, make_data, run_here

from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import load_config
from cupytron.errors import ConfigError
from cupytron.parallel import checker, schedules
from cupytron.run import train
from cupytron.trace import ACTIONS, COMMUNICATION, Record, Trace, bubble, parse_range
from cupytron.trainer import Trainer

FEW = ["train.max_steps=4", "train.eval_interval=0", "train.micro_batch=2"]
HALF = np.float16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run_mesh(data, out, *settings, trace, **mesh):
    """Train on threads; the events of the trace."""
    overrides = [*TINY, *FEW, f'data.path="{data}"', *settings]
    overrides += [f"parallel.{key}={value}" for key, value in mesh.items()]
    ranks = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    config = load_config(overrides=overrides, ranks=ranks)
    run_ranks(ranks, lambda world: train(config, out, dict(ENVIRONMENT), world=world, trace=trace))
    return json.loads((out / "trace.json").read_text())["traceEvents"]


@pytest.fixture
def counted(monkeypatch):
    """(rank, step, axis, operation) -> calls and bytes of each training step."""
    found = {}
    original = Trainer.start_step

    def counting(self, *batch):
        rank, step = self.context.world.rank, self.step
        groups = (self.context.world, *self.context.groups)
        before = [(g.calls.copy(), g.bytes.copy()) for g in groups]
        result = original(self, *batch)
        for group, (calls, sent) in zip(groups, before, strict=True):
            for name, n in (group.calls - calls).items():
                found[rank, step, group.axis, name] = n, group.bytes[name] - sent[name]
        return result

    monkeypatch.setattr(Trainer, "start_step", counting)
    return found


def spans(events, track=None, rank=None):
    return [
        e
        for e in events
        if e["ph"] == "X" and track in (None, e["tid"]) and rank in (None, e["pid"])
    ]


def check_tracks(events):
    """Spans of one track come one after the other, all after the moment that time is counted from."""
    for rank in {e["pid"] for e in events}:
        for track in (ACTIONS, COMMUNICATION):
            mine = sorted(spans(events, track, rank), key=lambda e: e["ts"])
            assert mine and mine[0]["ts"] >= 0
            for one, other in itertools.pairwise(mine):
                assert one["dur"] >= 0
                # whole nanoseconds, written in microseconds
                assert round((one["ts"] + one["dur"]) * 1000) <= round(other["ts"] * 1000)


def check_calls(events, counted, steps):
    """What was traced is what was counted in these steps."""
    calls, sent, waits = Counter(), Counter(), Counter()
    for event in spans(events, COMMUNICATION):
        args = event["args"]
        key = event["pid"], args["step"], args["axis"], event["name"].removeprefix("wait ")
        if event["name"].startswith("wait "):
            assert event["cat"] == "wait"
            waits[key] += 1
        else:
            calls[key] += 1
            sent[key] += args["bytes"]
    wanted = {key: value for key, value in counted.items() if key[1] in steps}
    assert {key: (calls[key], sent[key]) for key in calls} == wanted
    assert all(n <= calls[key] for key, n in waits.items())
    return waits


def check_actions(events, schedule, stage_of, steps):
    """Every rank ran its stage's actions, in their order."""
    for rank, stage in stage_of.items():
        found = spans(events, ACTIONS, rank)
        args = [
            (e["args"]["step"], e["args"]["kind"], e["args"]["micro_batch"], e["args"]["chunk"])
            for e in found
        ]
        assert args == [(step, *action) for step in steps for action in schedule.actions[stage]]
        assert all(e["name"] == f"{e['args']['kind']} {e['args']['micro_batch']}" for e in found)


# what is traced


def test_one_process(tmp_path, data, counted, capsys):
    events = run_mesh(data, tmp_path / "run", trace=(1, 3))
    check_tracks(events)
    check_calls(events, counted, (1, 2))
    check_actions(events, schedules.make("1f1b", 1, 4), {0: 0}, (1, 2))
    said = capsys.readouterr().out
    assert f"trace of steps 1 to 2 in {tmp_path / 'run' / 'trace.json'}: bubble " in said
    assert "% measured, 0.0 % predicted (1f1b, 1 stage, 4 micro-batches)" in said
    assert not list((tmp_path / "run").glob(".trace*"))


def test_a_mesh_with_stages_replicas_and_tensor_ranks(tmp_path, data, counted, capsys):
    mesh = {"tp": 2, "pp": 2, "dp": 2, "zero": 2}
    events = run_mesh(data, tmp_path / "run", trace=(1, 3), **mesh)
    check_tracks(events)
    waits = check_calls(events, counted, (1, 2))
    assert {(axis, name) for _, _, axis, name in waits} >= {
        ("pp", "recv"),
        ("pp", "send"),
        ("dp", "reduce_scatter"),
    }
    stage_of = {rank: rank // 4 for rank in range(8)}
    check_actions(events, schedules.make("1f1b", 2, 2), stage_of, (1, 2))
    assert "predicted (1f1b, 2 stages, 2 micro-batches)" in capsys.readouterr().out
    names = {e["pid"]: e["args"] for e in events if e["name"] == "process_name"}
    assert names[5] == {"name": "rank 5 (pp=1 dp=0 tp=1)"}
    tracks = {(e["tid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert tracks == {(ACTIONS, "actions"), (COMMUNICATION, "communication")}
    order = [e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"]
    assert order == list(range(8))


@pytest.mark.parametrize("schedule", ["interleaved", "zb-h1"])
def test_chunks_and_gradients_of_weights_are_actions(tmp_path, data, counted, schedule):
    settings = [f"parallel.schedule={schedule}", "model.num_layers=4"]
    events = run_mesh(data, tmp_path / "run", *settings, trace=(0, 1), pp=2)
    check_tracks(events)
    check_calls(events, counted, (0,))
    check_actions(events, schedules.make(schedule, 2, 4), {0: 0, 1: 1}, (0,))


def test_every_operation_is_recorded_with_its_bytes():
    def body(world):
        context, trace = ParallelContext(tp=world.size, world=world), Trace(1, 3)
        tp, right, left = context.tp, (world.rank + 1) % 3, (world.rank - 1) % 3
        x, half = np.ones(6), np.ones(7, HALF)

        def step():
            for kind in (np.float64, HALF):
                tp.all_reduce(np.ones(5, kind))
                tp.all_reduce(np.ones(5, kind), async_op=True).wait()
                tp.reduce_scatter(np.ones(6, kind))
                tp.all_gather(np.ones(5, kind), async_op=True).wait()
            tp.all_to_all(x)
            tp.broadcast(half, root=1)
            tp.barrier()
            tp.gather_objects("x")
            tp.send(x, right)
            tp.recv(np.empty(6), left, async_op=True).wait()
            tp.exchange([(x, right)], [(np.empty(6), left)])

        counts = []
        for number in range(4):
            before = tp.calls.copy(), tp.bytes.copy()
            with trace.step(number, context):
                step()
            counts.append((tp.calls - before[0], tp.bytes - before[1]))
            assert tp.trace is None
        assert all(count == counts[0] for count in counts)  # tracing is not counted
        return trace._operations, counts[0]

    for operations, (calls, sent) in run_ranks(3, body):
        assert list(operations) == [1, 2]
        for found in operations.values():
            called = [op for op in found if not op.waiting]
            assert Counter(op.name for op in called) == calls
            total = Counter()
            for op in called:
                total[op.name] += op.sent
            assert +total == +sent
            waits = {"all_reduce": 2, "all_gather": 2, "send": 1, "recv": 2}
            assert Counter(op.name for op in found if op.waiting) == waits
            assert {op.axis for op in found} == {"tp"}


def test_a_failed_action_or_step_leaves_nothing_on():
    context, trace = ParallelContext(), Trace(0, 2)
    with pytest.raises(KeyError), trace.step(0, context):
        assert context.tp.trace is trace
        with trace.action(0, schedules.Action("F", 0)):
            raise KeyError
    assert all(group.trace is None for group in (context.world, *context.groups))
    with trace.action(0, schedules.Action("F", 0)):
        context.tp.barrier()
    assert trace._spans == {0: []} and trace._operations == {0: []}


# bubble


def records(schedule, start=(), replicas=1):
    """A step in which F takes a second and B two, stage s is `start[s]` late, and messages take no time."""
    found = checker.simulate(schedule, lambda stage, a: {"F": 1.0, "B": 2.0, "W": 1.0}[a.kind])
    for stage in range(len(schedule.actions)):
        late = start[stage] if start else 0.0
        mine = [
            s._replace(start=s.start + late, end=s.end + late)
            for s in found.spans
            if s.stage == stage
        ]
        for dp in range(replicas):
            for tp in range(2):
                place = {"pp": stage, "dp": dp, "tp": tp}
                # the second tensor rank's times are not asked for
                yield Record(place, {7: mine if tp == 0 else mine[:1]}, {7: []})


@pytest.mark.parametrize("name", schedules.NAMES)
def test_the_bubble_of_a_schedule_that_was_kept_is_the_predicted_one(name):
    schedule = schedules.make(name, 4, 8)
    measured, predicted = bubble(records(schedule, replicas=2), schedule)
    assert measured == pytest.approx(predicted)
    if name == "1f1b":
        assert predicted == pytest.approx(3 / 11)


def test_the_bubble_of_stages_that_wait():
    """Two stages, one micro-batch: 6 of 12 seconds are idle; 8 of 14 if a message takes a second."""
    schedule = schedules.make("1f1b", 2, 1)
    assert bubble(records(schedule), schedule) == (0.5, 0.5)
    gap = [*records(schedule)]
    backward = gap[0].spans[7]
    backward[1] = backward[1]._replace(start=5.0, end=7.0)
    assert bubble(gap, schedule) == (pytest.approx(8 / 14), 0.5)


# the range


@pytest.mark.parametrize(
    "text", ["10", "5:3", "5:5", "-1:2", "a:b", "1:2:3", "", ":3", "1.0:2", "\u0661:2"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match=r"--trace .*: is not FIRST:LAST.* give 10:13") as error:
        parse_range(text)
    assert f"--trace {text}:" in str(error.value)


def test_a_range():
    assert parse_range("10:13") == (10, 13)
    with pytest.raises(ConfigError, match="--trace -1:2: is not"):
        Trace(-1, 2)


@pytest.mark.parametrize(
    ("trace", "steps", "says"),
    [
        ((4, 9), 4, "this run begins at step 2 and ends at step 4; choose steps between them"),
        ((0, 2), 4, "this run begins at step 2 and ends at step 4; choose steps between them"),
        ((0, 1), 1, "no step is left to train; give --max-steps with more steps"),
    ],
)
def test_a_range_outside_of_the_run_is_said(tmp_path, data, capsys, trace, steps, says):
    run_here(data, tmp_path, *FEW, "train.max_steps=2")
    overrides = [*TINY, *FEW, f'data.path="{data}"', f"train.max_steps={steps}"]
    train(load_config(overrides=overrides), tmp_path, dict(ENVIRONMENT), trace=trace)
    said = f"warning: --trace {trace[0]}:{trace[1]}: nothing will be traced: {says}"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "trace.json").exists()


def test_a_range_that_is_cut_short_by_the_end_of_the_run(tmp_path, data, counted, capsys):
    events = run_mesh(data, tmp_path, "train.max_steps=2", trace=(1, 9), dp=2)
    check_calls(events, counted, (1,))
    assert "trace of step 1 in" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_is_stopped(tmp_path, data, capsys, monkeypatch, steps):
    """Before its traced steps, and within them."""
    original = Trainer.start_step

    def stopping(self, *batch):
        result = original(self, *batch)
        if self.step == steps:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "start_step", stopping)
    config = load_config(overrides=[*TINY, *FEW, f'data.path="{data}"'])
    assert train(config, tmp_path, dict(ENVIRONMENT), trace=(2, 4)).step == steps
    said = capsys.readouterr().out
    assert ("nothing was traced: the run stopped before step 2" in said) == (steps == 1)
    assert ("trace of step 2 in" in said) == (steps == 3)
    assert (tmp_path / "trace.json").exists() == (steps == 3)


# nothing is broken by it


def test_a_trace_that_cannot_be_written_is_one_warning(tmp_path, data, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(IsADirectoryError):  # of run_mesh, which reads it
        run_mesh(data, tmp_path, trace=(1, 2), dp=2)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "done: 4 steps" in said
    assert f"warning: {tmp_path / 'trace.json'}: " in said
    assert not (tmp_path / ".trace.json.tmp").exists()


def test_ranks_with_other_ranges_are_told(tmp_path, data):
    config = load_config(overrides=[*TINY, *FEW, f'data.path="{data}"'])

    def body(world):
        trace = (1, 2) if world.rank else None
        train(config, tmp_path / "run", dict(ENVIRONMENT), world=world, trace=trace)

    with pytest.raises(ConfigError, match=r"trace: \(1, 2\) there, None on rank 0"):
        run_ranks(2, body)


# the command


def run_command(name, ranks, data, out, *options):
    arguments = [*command(data, out, *FEW), *options]
    arguments, environment = launch(name, ranks, arguments) if name else (arguments, None)
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("name", "ranks"), [(None, 1), ("mpich", 2)], ids=["alone", "mpich"])
def test_the_command(tmp_path, data, name, ranks):
    options = ["--trace", "1:3", "--pp", str(ranks)]
    done = run_command(name, ranks, data, tmp_path / "run", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trace of steps 1 to 2 in") == 1
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    check_tracks(events)
    check_actions(
        events, schedules.make("1f1b", ranks, 4), {rank: rank for rank in range(ranks)}, (1, 2)
    )
    # a message is sent before it is there, by the clock that the ranks share
    sends = [e for e in spans(events, COMMUNICATION, 0) if e["name"] == "send"]
    waits = [e for e in spans(events, COMMUNICATION, ranks - 1) if e["name"] == "wait recv"]
    assert len(sends) == len(waits) == (8 if ranks == 2 else 0)
    for send, wait in zip(sends, waits, strict=True):
        assert send["ts"] < wait["ts"] + wait["dur"]


def test_the_command_refuses_what_is_no_range(tmp_path, data):
    done = run_command(None, 1, data, tmp_path / "run", "--trace", "5:3")
    assert done.returncode == 2 and "error: --trace 5:3: is not FIRST:LAST" in done.stderr
    assert not (tmp_path / "run").exists()
