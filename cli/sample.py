"""cupytron sample."""

from typing import Any

import click

from cupytron.cli.help import Command, Folder, option
from cupytron.cli.options import checkpoint_option, mesh_options, trained_model
from cupytron.cli.say import pass_on
from cupytron.launcher import launched_tasks


@click.command(
    cls=Command,
    examples=[
        "cupytron sample runs/demo --prompt 'The '",
        "cupytron sample runs/demo --prompt 'import ' --num-samples 3 --top-k 40 --seed 7",
        'cupytron sample runs/demo --prompt "$(cat FILE)" --temperature 0',
    ],
)
@click.argument("run", type=Folder(), metavar="RUN")
@option("--prompt", metavar="TEXT", help="What to continue.  [default: begin a document]")
@option(
    "--max-new-tokens",
    type=int,
    default=200,
    show_default=True,
    metavar="N",
    help="Longest text, without the prompt.",
)
@option(
    "--temperature",
    type=float,
    default=0.8,
    show_default=True,
    metavar="T",
    help="Spread of the choices; 0: always the likeliest token.",
)
@option("--top-k", type=int, metavar="K", help="Choose among the K likeliest tokens.")
@option("--top-p", type=float, metavar="P", help="Choose among the fewest that hold P.")
@option(
    "--num-samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="M",
    help="Texts.",
)
@option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    metavar="S",
    help="Of the choices; the same seed gives the same texts.",
)
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
                pass_on(text)

        for sample in range(num_samples):
            # with the first text, so that an error comes before it
            heading = f"--- sample {sample + 1} of {num_samples}\n" if num_samples > 1 else ""
            for text in model.stream(prompt, max_new_tokens, **how, sample=sample, echo=True):
                note(model.step, "writing")
                tell(heading + text)
                heading = ""
            tell("\n")
