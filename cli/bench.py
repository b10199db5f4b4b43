"""cupytron bench."""

import json

import click

from cupytron.cli.options import (
    Settings,
    data_vocabulary,
    prepare_process,
    set_timeout,
    settings_options,
)


@click.command()
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
@click.option(
    "--peak-tflops",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="What one GPU can do, for MFU, where its data sheet is not known here.",
)
@settings_options
def command(settings: Settings, steps: int, as_json: bool, peak_tflops: float | None) -> None:
    """Measure a configuration on random tokens: forward, backward, clipping and optimizer.

    Under mpirun all ranks form the mesh that the settings say.
    """
    config = settings.load(mesh=True)
    set_timeout(config.parallel.timeout)
    environment = prepare_process(config)

    from cupytron import progress
    from cupytron.bench import measure
    from cupytron.comm import open_world
    from cupytron.mesh_run import check_alike, watched
    from cupytron.metrics import mfu_text

    vocab_size = data_vocabulary(config)
    world = open_world()
    check_alike(world, settings=config, steps=steps, peak=peak_tflops)
    with watched(world, config.parallel.timeout):
        result = measure(config, steps, environment, vocab_size, world, progress.note, peak_tflops)
    if world.rank:
        return
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{result['ms_per_step']:.2f} ms a step  {result['tokens_per_second']:,.0f} tokens/s  "
        f"{result['gflops_per_second']:,.0f} ({result['gflops_per_second_causal']:,.0f} causal) "
        f"GFLOP/s{mfu_text(result)}  {result['peak_memory_bytes'] / 2**20:,.0f} MB  "
        f"{result['parameters']:,} parameters"
    )
