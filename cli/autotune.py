"""cupytron autotune."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cupytron.cli.flags import UNUSED_WITHOUT_TRAINING
from cupytron.cli.help import Command, NewFile, option
from cupytron.cli.options import (
    Settings,
    data_vocabulary,
    prepare_process,
    set_timeout,
    settings_options,
)
from cupytron.cli.say import say

if TYPE_CHECKING:
    from cupytron.kernels.autotune import RuntimeAutoTuner


@click.command(
    cls=Command,
    examples=[
        "cupytron autotune --preset gpt2-124m --set model.vocab_size=50304 --compute-dtype bfloat16",
        "mpirun -n 2 cupytron autotune --preset demo --data DIR --tp 2",
    ],
)
@option(
    "--out",
    type=NewFile(),
    metavar="FILE",
    heading="Measurement",
    help="Another copy of the table.",
)
@settings_options(unused={**UNUSED_WITHOUT_TRAINING, "train.max_steps": "it runs one step"})
def command(settings: Settings, out: Path | None) -> None:
    """Measure which functions are the fastest for a configuration, and keep the choices.

    One step is run on random tokens (of --data the vocabulary alone is used); each operation's candidates
    are compared with the reference, and timed, on what it is given. Later runs on this machine use the
    choices where they meet the same shapes, unless they have --autotune off or --deterministic. Choices may
    change the last bits of results.
    """
    config = settings.load(mesh=True)
    set_timeout(config.parallel.timeout)
    prepare_process(config)

    from cupytron import progress
    from cupytron.comm import open_world
    from cupytron.errors import ConfigError
    from cupytron.kernels.candidates import allowed
    from cupytron.mesh_run import check_alike, watched
    from cupytron.terminal import shown
    from cupytron.tune import tune

    if not allowed(config):
        raise ConfigError(
            "these settings use no choices: give neither --deterministic nor --autotune off"
        )
    vocab_size = data_vocabulary(config)
    world = open_world()
    check_alike(world, settings=config)
    with watched(world, config.parallel.timeout), shown(world.rank == 0):
        tuner = tune(config, vocab_size, world, progress.note)
    if world.rank:
        return
    for line in _page(tuner):
        say(line)
    say(f"kept in {tuner.save()}")
    if out:
        tuner.save(out)
        say(f"and in {out}")


def _page(tuner: "RuntimeAutoTuner") -> Iterator[str]:
    """A block for each problem: the choice, all times, and what was refused."""
    for (operation, problem), found in sorted(tuner.found().items()):
        yield f"{operation}: {problem}"
        for name, seconds in sorted(found.times.items(), key=lambda item: item[1]):
            mark = "->" if name == found.choice else "  "
            yield f"  {mark} {name:12s} {seconds * 1e6:12,.1f} us"
        if not found.times:
            yield f"  -> {found.choice}"
        for name, why in found.refused.items():
            yield f"     {name:12s} refused: {why}"
    for (operation, problem), why in sorted(tuner.undecided.items()):
        yield f"{operation}: {problem}"
        yield f"     not tried: {why}"
