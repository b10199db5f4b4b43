"""cupytron eval."""

import json

import click

from cupytron.cli.options import checkpoint_option, prepare_for_run


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--data", metavar="DIR", help="Another data set of the same tokenizer.")
@checkpoint_option
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
def command(run: str, data: str | None, checkpoint: str, as_json: bool) -> None:
    """Loss of a run over the whole validation split."""
    prepare_for_run(run)

    from cupytron import load

    result = load(run, checkpoint, lambda text: click.echo(f"warning: {text}", err=True)).evaluate(
        data
    )
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
