"""cupytron sample."""

import sys

import click

from cupytron.cli.options import checkpoint_option, prepare_for_run


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
) -> None:
    """Write text with a trained model.

    A text ends after N tokens, or where the model ends the document.
    """
    prepare_for_run(run)

    from cupytron import load

    model = load(run, checkpoint, lambda text: click.echo(f"warning: {text}", err=True))
    if prompt is None:
        prompt = model.default_prompt()
    for sample in range(num_samples):
        if num_samples > 1:
            click.echo(f"--- sample {sample + 1} of {num_samples}")
        pieces = model.stream(
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            sample=sample,
        )
        first = next(pieces, "")  # errors come before the prompt is echoed
        write(prompt + first)
        for text in pieces:
            write(text)
        click.echo()


def write(text: str) -> None:
    """Show text as it comes; on a terminal without control codes, which a model may have learnt."""
    if sys.stdout is not None and sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)
    click.echo(text, nl=False)
