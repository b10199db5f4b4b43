"""cupytron bench."""

import json

import click

from cupytron.cli.options import Settings, prepare_process, settings_options


@click.command()
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
@settings_options
def command(settings: Settings, steps: int, as_json: bool) -> None:
    """Measure a configuration on random tokens: forward, backward, clipping and optimizer.

    Under mpirun all ranks form the mesh that the settings say.
    """
    config = settings.load(mesh=True)
    environment = prepare_process(config)

    from cupytron.bench import measure
    from cupytron.comm import open_world
    from cupytron.mesh_run import check_alike, watchdog

    vocab_size = None
    if config.data.path and config.model.vocab_size is None:
        from cupytron.data import open_dataset

        vocab_size = open_dataset(config.data.path).vocab_size
    world = open_world()
    check_alike(world, settings=config, steps=steps)
    with watchdog(world, config.parallel.timeout) as dog:
        result = measure(config, steps, environment, vocab_size, world, dog.note)
    if world.rank:
        return
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{result['ms_per_step']:.2f} ms a step  {result['tokens_per_second']:,.0f} tokens/s  "
        f"{result['gflops_per_second']:,.0f} ({result['gflops_per_second_causal']:,.0f} causal) "
        f"GFLOP/s  {result['peak_memory_bytes'] / 2**20:,.0f} MB  "
        f"{result['parameters']:,} parameters"
    )
