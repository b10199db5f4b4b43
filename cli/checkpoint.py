"""cupytron checkpoint ls|verify|digest."""

import json

import click


@click.group()
def command() -> None:
    """List, verify and fingerprint the checkpoints of a run."""


@command.command()
@click.argument("run", metavar="RUN")
def ls(run: str) -> None:
    """List the checkpoints: step, size, validation loss."""
    from cupytron.checkpoint import Checkpoint
    from cupytron.errors import CheckpointError
    from cupytron.run_folder import RunFolder

    folder = RunFolder(run).require()
    best = folder.best()
    if not folder.steps():
        click.echo("no checkpoint yet")
    for step in folder.steps():
        try:
            found = Checkpoint(folder.place(step))
        except CheckpointError as error:
            click.echo(f"{step:>8}  damaged: {error}")
            continue
        size = sum(size for size, _ in found.files.values()) / 1e6
        loss = found.about.get("val_loss")
        note = f"  validation loss {loss:.4f}" if loss is not None else ""
        click.echo(
            f"{step:>8}  {size:,.1f} MB{note}{'  best' if best and best.step == step else ''}"
        )


@command.command()
@click.argument("run", metavar="RUN")
def verify(run: str) -> int:
    """Check every file of every checkpoint; exit code 1 if one is damaged."""
    from cupytron.checkpoint import Checkpoint
    from cupytron.errors import CheckpointError
    from cupytron.run_folder import RunFolder

    folder = RunFolder(run).require()
    damaged = 0
    if not folder.steps():
        raise CheckpointError(f"{run}: no checkpoint yet")
    for step in folder.steps():
        try:
            Checkpoint(folder.place(step)).verify()
            click.echo(f"{step:>8}  whole")
        except CheckpointError as error:
            damaged += 1
            click.echo(f"{step:>8}  damaged: {error}")
    return 1 if damaged else 0


@command.command()
@click.argument("run", metavar="RUN")
@click.option("--checkpoint", default="last", show_default=True, metavar="best|last|STEP")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
def digest(run: str, checkpoint: str, as_json: bool) -> None:
    """SHA-256 of each logical tensor, and one for all of them."""
    from cupytron.run_folder import RunFolder

    warn = lambda text: click.echo(f"warning: {text}", err=True)  # noqa: E731
    digests = RunFolder(run).require().find(checkpoint, warn).digest()
    if as_json:
        click.echo(json.dumps(digests))
        return
    for name, value in digests.items():
        click.echo(f"{value}  {name}")
