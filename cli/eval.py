"""cupytron eval."""

import click

from cupytron.cli.help import Command, Folder, option
from cupytron.cli.options import checkpoint_option, mesh_options, trained_model
from cupytron.cli.say import say, say_json
from cupytron.terminal import shown


@click.command(
    cls=Command,
    examples=[
        "cupytron eval runs/demo",
        "cupytron eval runs/demo --checkpoint last --data runs/other-data",
        "mpirun -n 2 cupytron eval runs/demo",
    ],
)
@click.argument("run", type=Folder(), metavar="RUN")
@option("--data", type=Folder(), metavar="DIR", help="Another data set of the same tokenizer.")
@option(
    "--tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Over the first N tokens of the validation split.  [default: all of it]",
)
@checkpoint_option
@mesh_options
@option("--json", "as_json", is_flag=True, help="Print an object.")
def command(
    run: str,
    data: str | None,
    tokens: int | None,
    checkpoint: str,
    tp: int | None,
    pp: int,
    zero: int,
    device: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Loss of a run over the whole validation split; under mpirun shared by all ranks.

    --tokens N takes the first N tokens of the split, as the run's own setting train.eval_tokens does.
    """
    opened = trained_model(
        run, checkpoint, tp or 1, pp, zero, device, timeout, data=data, tokens=tokens
    )
    with opened as (model, note, first), shown(first):
        result = model.evaluate(data, note, tokens)
    if not first:
        return
    if as_json:
        say_json(result)
        return
    bits = result["bits_per_byte"]
    say(
        f"step {result['step']}  validation loss {result['val_loss']:.4f}  "
        f"perplexity {result['perplexity']:.3f}  "
        f"bits per byte {'unknown' if bits is None else f'{bits:.4f}'}  "
        f"over {result['tokens']:,} tokens"
    )
