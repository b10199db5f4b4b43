"""cupytron bench."""

import click

from cupytron.cli.flags import UNUSED_WITHOUT_TRAINING
from cupytron.cli.help import Command, option
from cupytron.cli.options import (
    Settings,
    data_vocabulary,
    prepare_process,
    set_timeout,
    settings_options,
)
from cupytron.cli.say import say_json, say_page


@click.command(
    cls=Command,
    examples=[
        "cupytron bench --preset gpt2-124m --set model.vocab_size=50304 --steps 5",
        "mpirun -n 2 cupytron bench --preset demo --data DIR --zero 1 --threads 1",
    ],
)
@option(
    "--steps",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    heading="Measurement",
    help="Steps that are measured.",
)
@option("--json", "as_json", is_flag=True, heading="Measurement", help="Print an object.")
@option(
    "--peak-tflops",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    heading="Measurement",
    help="What one GPU can do, for MFU, where its data sheet is not known here.",
)
@settings_options(unused=UNUSED_WITHOUT_TRAINING)
def command(settings: Settings, steps: int, as_json: bool, peak_tflops: float | None) -> None:
    """Measure a configuration on random tokens: forward, backward, clipping and optimizer.

    Under mpirun all ranks form the mesh that the settings say. Of --data the vocabulary alone is used.
    """
    config = settings.load(mesh=True)
    set_timeout(config.parallel.timeout)
    environment = prepare_process(config)

    from cupytron import progress
    from cupytron.bench import measure
    from cupytron.comm import open_world
    from cupytron.mesh_run import check_alike, watched
    from cupytron.metrics import gflops_text, mfu_text
    from cupytron.terminal import shown

    vocab_size = data_vocabulary(config)
    world = open_world()
    check_alike(world, settings=config, steps=steps, peak=peak_tflops)
    with watched(world, config.parallel.timeout), shown(world.rank == 0):
        result = measure(config, steps, environment, vocab_size, world, progress.note, peak_tflops)
    if world.rank:
        return
    if as_json:
        say_json(result)
        return
    say_page(
        f"{result['ms_per_step']:.2f} ms a step  {result['tokens_per_second']:,.0f} tokens/s  "
        f"{result['peak_memory_bytes'] / 2**20:,.0f} MB  {result['parameters']:,} parameters\n"
        f"{gflops_text(result)}{mfu_text(result)}"
    )
