"""cupytron eval."""

import json

import click

from cupytron.cli.options import checkpoint_option, mesh_options, prepare_for_run


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--data", metavar="DIR", help="Another data set of the same tokenizer.")
@checkpoint_option
@mesh_options
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
def command(
    run: str,
    data: str | None,
    checkpoint: str,
    tp: int | None,
    zero: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Loss of a run over the whole validation split; under mpirun shared by all ranks."""
    prepare_for_run(run)

    from cupytron import load
    from cupytron.comm import ParallelContext, open_world
    from cupytron.mesh_run import check_alike, watched

    world = open_world()
    check_alike(world, run=run, data=data, checkpoint=checkpoint, tp=tp, zero=zero)
    context = ParallelContext(tp=tp or 1, world=world)
    first = context.world.rank == 0

    def warn(text: str) -> None:
        if first:
            click.echo(f"warning: {text}", err=True)

    with watched(world, timeout) as note:
        result = load(run, checkpoint, warn, context, zero).evaluate(data, note)
    if not first:
        return
    if as_json:
        click.echo(json.dumps(result))
        return
    bits = result["bits_per_byte"]
    click.echo(
        f"step {result['step']}  validation loss {result['val_loss']:.4f}  "
        f"perplexity {result['perplexity']:.3f}  "
        f"bits per byte {'unknown' if bits is None else f'{bits:.4f}'}  "
        f"over {result['tokens']:,} tokens"
    )
