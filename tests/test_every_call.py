"""A command that is killed at any of its system calls, or in which any of them fails, loses nothing.

CUPYTRON_CALLS=all tries every error at every call (the acceptance run asks for that).
"""

import errno

import pytest
from syscalls import shim
from syscalls.every_call import Fault, one_of_each_kind, try_fault
from syscalls.parts import ALL, library, lines, run_parts, shown
from syscalls.two_ranks import RankBench, TrainOnTwoRanks

LOST = "step 1 was saved, but the same command went on from step 0"


@pytest.mark.timeout(300)
def test_a_kill_at_some_calls_loses_nothing_and_a_planted_fault_is_seen(tmp_path):
    found = run_parts("every_call", tmp_path, "few", "resume", workers=1, limit=280, planted=True)
    assert not lines(found)
    assert found[0]["faults"] >= 4
    # the old checkpoint is removed before the new one has its name
    assert any(LOST in line for line in lines(found, "planted"))


@pytest.mark.slow
@pytest.mark.timeout(3600 if ALL else 1200)
def test_kills_and_errors_at_every_call_lose_nothing(tmp_path):
    found = run_parts("every_call", tmp_path, "all" if ALL else "most", limit=3500 if ALL else 1100)
    assert not lines(found), shown(lines(found))


@pytest.mark.slow
@pytest.mark.timeout(2400 if ALL else 900)
def test_two_ranks_lose_nothing(tmp_path):
    """A fault at one call of each kind, on rank 0 and on rank 1."""
    scenario = TrainOnTwoRanks(RankBench(tmp_path, library(tmp_path)))
    actions = [
        (shim.KILL, 0),
        (shim.FAIL_FROM_HERE, errno.ENOSPC),
        (shim.FAIL, errno.EIO),
    ]
    wrong = []
    for rank in (0, 1):
        scenario.bench.lay_out(scenario.name)
        points = scenario.start(rank=rank).points
        assert {"open", "write", "fsync"} <= {call.kind for call in points}
        for number, point in enumerate(sorted(one_of_each_kind(points))):
            for action, error in actions if ALL else [actions[number % len(actions)]]:
                if action == shim.KILL and points[point].kind == "close":
                    action, error = actions[1]
                fault = Fault(point, action, error)
                said = fault.describe(points[point], scenario.bench.root)
                wrong += [f"rank {rank} {said}: {w}" for w in try_fault(scenario, fault, rank=rank)]
    assert not wrong, shown(wrong)
