"""Schedules, by the checker alone: they can be run, and cost what the papers say. No ranks needed."""

import pytest

from cupytron.parallel import checker, schedules
from cupytron.parallel.checker import ScheduleError
from cupytron.parallel.schedules import Action, Placement, Schedule, forward_only, make

STAGES, MICRO_BATCHES, CHUNKS = range(1, 9), range(1, 17), range(1, 5)
TIMES = [(1, 1, 1), (1, 2, 1.5), (2, 2, 1), (1, 1.5, 0.5), (1, 1, 2)]  # of F, B and W


def every(name):
    for stages in STAGES:
        for micro_batches in MICRO_BATCHES:
            for chunks in CHUNKS if name == "interleaved" else [1]:
                told = None if name == "zb-v" else chunks
                yield make(name, stages, micro_batches, told), stages, micro_batches, chunks


@pytest.mark.parametrize("name", schedules.NAMES)
def test_every_schedule_can_be_run(name):
    for schedule, stages, _, chunks in every(name):
        checker.check(schedule)
        assert len(schedule.actions) == stages
        assert schedule.placement.chunks == (2 if name == "zb-v" else chunks)


def test_forward_only_can_be_run_in_every_placement():
    for stages in STAGES:
        for chunks in CHUNKS:
            for micro_batches in MICRO_BATCHES:
                for folded in (False, True):
                    placement = Placement(stages, chunks, folded)
                    schedule = forward_only(placement, micro_batches)
                    checker.check(schedule)
                    assert not schedule.trains
                    places = [placement.place(part) for part in range(placement.parts)]
                    assert [placement.part(*place) for place in places] == [*range(len(places))]
                    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_the_bubble_is_the_papers(name):
    """GPipe and 1F1B always; interleaved where p divides M; ZB-H1 from M = p on, with W <= F."""
    checked = 0
    for schedule, p, m, v in every(name):
        for f, b, w in TIMES:
            found = checker.predict(schedule, f, b, w)
            bubble = {
                "gpipe": (p - 1) * (f + b + w),
                "1f1b": (p - 1) * (f + b + w),
                "interleaved": (p - 1) * (f + b + w) / v if m % p == 0 else None,
                "zb-h1": (p - 1) * (f + b - w if w <= f else b) if m >= p else None,
                "zb-v": None,
            }[name]
            if bubble is not None:
                checked += 1
                assert found.total - m * (f + b + w) == pytest.approx(bubble, abs=1e-9)
                assert found.bubble == pytest.approx(bubble / found.total, abs=1e-9)
            if name == "zb-v" and f == b == w and m >= p > 1:
                checked += 1
                assert (p - 1) * f / 2 <= found.total - m * (f + b + w) < (p - 1) * (f + b - w)
    assert checked > 80


def test_micro_batches_kept_are_what_the_docstrings_say():
    for schedule, p, m, _ in every("gpipe"):
        assert checker.live(schedule) == [m] * p
    for schedule, p, m, _ in every("1f1b"):
        assert checker.live(schedule) == [min(m, p - s) for s in range(p)]
    for schedule, p, m, v in every("interleaved"):
        if m % p == 0 and v > 1:
            most = [min(m * v, 2 * (p - s - 1) + (v - 1) * p + 1) / v for s in range(p)]
            assert checker.live(schedule) == pytest.approx(most)
    for schedule, p, m, _ in every("zb-h1"):
        assert checker.live(schedule) == [min(m, p - s) for s in range(p)]
        for stage, actions in enumerate(schedule.actions):
            assert checker.peak(actions, [0], [1]) == min(m, stage + 1)
    for schedule, p, m, _ in every("zb-v"):
        assert all(checker.peak(a, [0.5, 0.5], [0.5, 0.5]) <= min(m, p) for a in schedule.actions)


def test_no_pipeline_is_gradient_accumulation():
    assert make("1f1b", 1, 2).actions == (
        (Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1)),
    )


def with_actions(*stages):
    kinds = [tuple(Action(word[0], int(word[1:])) for word in stage.split()) for stage in stages]
    return Schedule("own", Placement(len(stages)), 2, tuple(kinds))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["F0 F1 B0", "F0 B0 F1 B1"], "stage 0: B of micro-batch 1, chunk 0 has to be there once"),
        (["F0 F1 F1 B0 B1", "F0 B0 F1 B1"], "F of micro-batch 1, chunk 0 has to be there once"),
        (["F0 F1 B1 B0", "F0 F1 B0 B1"], "B of chunk 0 is not in the order"),
        (["F0 B0 F1 B1", "B0 F0 F1 B1"], "stage 1: B of micro-batch 0, chunk 0 comes before its F"),
        (["F0 B0 F1 B1", "F0 F1 B0 B1"], "stage 0 waits for the input of B of micro-batch 0"),
        (["F0 F1 B0 B1 W0", "F0 B0 F1 B1"], "W of micro-batch 1, chunk 0 has to be there once"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_seen(stages, words):
    with pytest.raises(ScheduleError, match=words):
        checker.check(with_actions(*stages))
    if "waits" in words:  # a simulation says so, too, and does not hang
        with pytest.raises(ScheduleError, match=words):
            checker.predict(with_actions(*stages))


def test_sends_that_wait_for_each_other_are_seen(monkeypatch):
    """Two stages that send to each other at once: with one receive posted each, neither can go on."""
    monkeypatch.setattr(checker, "POSTED", 1)
    with pytest.raises(ScheduleError, match=r"stage 0 waits to send .*; stage 1 waits to send"):
        checker.check(make("interleaved", 2, 4, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pipedream", 2, 2), "unknown schedule 'pipedream'; choose from gpipe, 1f1b, interleaved"),
        (("1f1b", 2, 2, 2), "chunks=2: 1f1b has 1 a stage; interleaved takes any number"),
        (("zb-v", 2, 2, 3), "chunks=3: zb-v has 2 a stage"),
        (("interleaved", 2, 2, 0), "chunks=0: must be at least 1"),
        (("1f1b", 0, 2), "stages=0"),
        (("1f1b", 2, 0), "micro_batches=0: must be at least 1"),
    ],
)
def test_a_schedule_that_there_is_not_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make(*arguments)
