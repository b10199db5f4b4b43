"""cupytron schedule."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cupytron.cli.help import Command, NewFile, option
from cupytron.cli.say import say, say_page
from cupytron.parallel.schedules import NAMES  # imports no NumPy

if TYPE_CHECKING:
    from cupytron.parallel.checker import Timeline
    from cupytron.parallel.schedules import Schedule

Times = tuple[float, float, float]
MOST_WORK = 2**15  # a few seconds
LEAST, MOST = 1e-9, 1e9  # of a time: none, and what sums of floats cannot hold, is no schedule


def _parse_times(ctx: click.Context, param: click.Parameter, value: str) -> Times:
    try:
        f, b, w = map(float, value.split(","))
    except ValueError:
        f = b = w = math.nan
    if not all(LEAST <= time <= MOST for time in (f, b, w)):
        raise click.BadParameter(
            f"{value!r} is not three numbers from {LEAST:g} to {MOST:g}; write them as in 1,1.2,0.8"
        )
    return f, b, w


@click.command(
    cls=Command,
    examples=[
        "cupytron schedule --pp 4 --micro-batches 8",
        "cupytron schedule --schedule zb-v --times 1,1.2,0.8 --svg chart.svg",
    ],
)
@option(
    "--schedule",
    "name",
    type=click.Choice(NAMES),
    default="1f1b",
    show_default=True,
    help="Its name.",
)
@option(
    "--pipeline-parallel-size",
    "--pp",
    "stages",
    type=click.IntRange(1, 1024),
    default=4,
    show_default=True,
    metavar="N",
    help="Stages of the pipeline.",
)
@option(
    "--micro-batches",
    type=click.IntRange(1, 4096),
    default=8,
    show_default=True,
    metavar="N",
    help="Micro-batches of a step.",
)
@option(
    "--chunks",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Parts of the model on each stage, for interleaved  [default: 2]",
)
@option(
    "--times",
    callback=_parse_times,
    default="1,1,1",
    show_default=True,
    metavar="F,B,W",
    help="Of a stage for one micro-batch: forward, gradients of activations, of weights.",
)
@option(
    "--svg",
    "picture",
    type=NewFile(),
    metavar="FILE",
    help="Also draw it here.",
)
def command(
    name: str,
    stages: int,
    micro_batches: int,
    chunks: int | None,
    times: Times,
    picture: Path | None,
) -> None:
    """Draw a pipeline schedule, and say what it costs: nothing is trained.

    Before that it is proved that the schedule can be run. Messages take no time in the drawing.
    Schedules that do not split backward have B and W in one.
    """
    from cupytron.errors import ConfigError
    from cupytron.parallel import checker, gantt, schedules

    work = stages * max(stages, micro_batches) * (chunks or 1)
    if work > MOST_WORK:
        raise ConfigError(
            f"{stages} stages, {micro_batches} micro-batches, {chunks or 1} chunks: too many to draw; "
            f"stages times chunks times the larger of stages and micro-batches may be {MOST_WORK}"
        )
    schedule = schedules.make(name, stages, micro_batches, chunks)
    checker.check(schedule)
    timeline = checker.predict(schedule, *times)
    if picture is not None:
        title = f"{name}: {stages} stages, {micro_batches} micro-batches"
        picture.write_text(gantt.svg(timeline, title), encoding="ascii")
    say_page(gantt.text(timeline))
    say()
    _show_kept(schedule)
    _show_bubble(schedule, timeline, times)
    if picture is not None:
        say(f"written: {picture}")


def _show_kept(schedule: "Schedule") -> None:
    from cupytron.parallel import checker

    table = {
        "stage": [float(stage) for stage in range(schedule.placement.stages)],
        "micro-batches kept at once": checker.live(schedule),
    }
    if schedule.splits_backward:
        chunks = schedule.placement.chunks
        nothing, share = [0.0] * chunks, [1 / chunks] * chunks
        table["and awaiting W"] = [checker.peak(a, nothing, share) for a in schedule.actions]
    for word, values in table.items():
        say(f"{word:<27}" + "".join(f"{value:>6.4g}" for value in values))


def _show_bubble(schedule: "Schedule", timeline: "Timeline", times: Times) -> None:
    formula, papers, condition = _papers_bubble(schedule, *times)
    idle = timeline.total - schedule.micro_batches * sum(times)
    if schedule.name == "zb-v":
        least = (schedule.placement.stages - 1) * times[0] / 2
        says = f"the last stage begins after (p - 1) F / 2 = {least:.6g}"
    elif math.isclose(idle, papers, rel_tol=1e-9, abs_tol=1e-9 * timeline.total):
        idle, says = papers, f"as the paper's formula {formula} says"
    else:
        says = f"not {papers:.6g} as by the paper's formula {formula}, which needs {condition}"
    say(f"{'time':<27}{timeline.total:>6.6g}")
    say(f"{'of it idle on each stage':<27}{idle:>6.6g}  ({says})")
    say(f"{'bubble':<27}{idle / timeline.total:>6.1%}")


def _papers_bubble(schedule: "Schedule", f: float, b: float, w: float) -> tuple[str, float, str]:
    """Idle time of a stage: the formula, what it says, and what must be so that it holds."""
    others = schedule.placement.stages - 1
    if schedule.name == "interleaved":
        chunks = schedule.placement.chunks
        needs = "micro-batches in whole groups of p"
        return "(p - 1)(F + B + W) / v", others * (f + b + w) / chunks, needs
    if schedule.name == "zb-h1":
        needs = "p micro-batches or more, and a B not shorter than both F and W"
        if w <= f:
            return "(p - 1)(F + B - W)", others * (f + b - w), needs
        return "(p - 1) B", others * b, needs
    return "(p - 1)(F + B + W)", others * (f + b + w), "nothing"
