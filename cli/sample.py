"""cupytron sample."""

import sys
from typing import Any

import click

from cupytron.cli.options import checkpoint_option, mesh_options, trained_model
from cupytron.launcher import launched_tasks


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
    pp: int,
    zero: int,
    device: str,
    timeout: float,
) -> None:
    """Write text with a trained model.

    The prompt comes first, as the tokenizer decodes it. A text ends after N tokens, or where the model
    ends the document. Under mpirun the ranks share the model, and write what one process would.
    """
    # ranks share the layers, unless told otherwise: replicas would all write the same
    tp = tp or (1 if zero else max(1, launched_tasks() // pp))
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    what = {"prompt": prompt, "max_new_tokens": max_new_tokens, "num_samples": num_samples}
    with trained_model(run, checkpoint, tp, pp, zero, device, timeout, **what, **how) as (
        model,
        note,
        first,
    ):

        def tell(text: str) -> None:
            if first:
                write(text)

        for sample in range(num_samples):
            if num_samples > 1:
                tell(f"--- sample {sample + 1} of {num_samples}\n")
            for text in model.stream(prompt, max_new_tokens, **how, sample=sample, echo=True):
                note(model.step, "writing")
                tell(text)
            tell("\n")


def write(text: str) -> None:
    """Show text as it comes; on a terminal without control codes, which a model may have learnt."""
    if sys.stdout is not None and sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)
    click.echo(text, nl=False)
