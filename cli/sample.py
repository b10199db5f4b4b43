"""cupytron sample."""

import sys

import click

from cupytron.cli.options import checkpoint_option, mesh_options, prepare_for_run


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--prompt", metavar="TEXT", help="What to continue.  [default: begin a document]")
@click.option("--max-new-tokens", type=int, default=200, show_default=True, metavar="N")
@click.option(
    "--temperature",
    type=float,
    default=0.8,
    show_default=True,
    metavar="T",
    help="0: the likeliest.",
)
@click.option("--top-k", type=int, metavar="K", help="Choose among the K likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Choose among the fewest that hold P.")
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True, metavar="M")
@click.option("--seed", type=int, default=1, show_default=True, metavar="S")
@checkpoint_option
@mesh_options
def command(
    run: str,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_samples: int,
    seed: int,
    checkpoint: str,
    tp: int | None,
    zero: int,
    timeout: float,
) -> None:
    """Write text with a trained model.

    A text ends after N tokens, or where the model ends the document. Under mpirun the ranks share the
    model, and write what one process would.
    """
    prepare_for_run(run)

    from cupytron import load
    from cupytron.comm import ParallelContext, open_world
    from cupytron.mesh_run import check_alike, watched

    world = open_world()
    check_alike(
        world,
        run=run,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_samples=num_samples,
        seed=seed,
        checkpoint=checkpoint,
        tp=tp,
        zero=zero,
    )
    # ranks share the layers, unless told otherwise: replicas would all write the same
    context = ParallelContext(tp=tp or (1 if zero else world.size), world=world)
    first = world.rank == 0

    def warn(text: str) -> None:
        if first:
            click.echo(f"warning: {text}", err=True)

    def tell(text: str) -> None:
        if first:
            write(text)

    with watched(world, timeout) as note:
        model = load(run, checkpoint, warn, context, zero)
        if prompt is None:
            prompt = model.default_prompt()
        for sample in range(num_samples):
            if num_samples > 1:
                tell(f"--- sample {sample + 1} of {num_samples}\n")
            pieces = model.stream(
                prompt,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                sample=sample,
            )
            first_piece = next(pieces, "")  # errors come before the prompt is echoed
            tell(prompt + first_piece)
            for text in pieces:
                note(model.step, "writing")
                tell(text)
            tell("\n")


def write(text: str) -> None:
    """Show text as it comes; on a terminal without control codes, which a model may have learnt."""
    if sys.stdout is not None and sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)
    click.echo(text, nl=False)
