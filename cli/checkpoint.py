"""cupytron checkpoint ls|verify|digest."""

import click

from cupytron.cli.help import Folder, Group, option
from cupytron.cli.say import say, say_json


@click.group(cls=Group)
def command() -> None:
    """List, verify and fingerprint the checkpoints of a run."""


@command.command(examples=["cupytron checkpoint ls runs/demo"])
@click.argument("run", type=Folder(), metavar="RUN")
def ls(run: str) -> None:
    """List the checkpoints: step, size, validation loss."""
    from cupytron.errors import CheckpointError
    from cupytron.run_checkpoints import by_loss, eval_tokens
    from cupytron.run_folder import RunFolder

    seen = dict(RunFolder(run).require().survey(lambda found: found))
    if not seen:
        say("no checkpoint yet")
    best = by_loss(found for found in seen.values() if not isinstance(found, CheckpointError))[:1]
    for step, found in seen.items():
        if isinstance(found, CheckpointError):
            say(f"{step:>8}  {_state(found)}")
            continue
        size = sum(size for size, _ in found.files.values()) / 1e6
        loss = found.about.get("val_loss")
        limit = eval_tokens(found)
        over = "" if limit is None else f" (train.eval_tokens={limit})"
        note = f"  validation loss {loss:.4f}{over}" if loss is not None else ""
        say(f"{step:>8}  {size:,.1f} MB{note}{'  best' if found in best else ''}")


@command.command(examples=["cupytron checkpoint verify runs/demo"])
@click.argument("run", type=Folder(), metavar="RUN")
def verify(run: str) -> int:
    """Check every file of every checkpoint; exit code 1 if one is damaged or cannot be read."""
    from cupytron import progress
    from cupytron.checkpoint import Checkpoint
    from cupytron.errors import CheckpointError
    from cupytron.run_folder import RunFolder
    from cupytron.terminal import shown

    def check(found: Checkpoint) -> None:
        progress.note(found.step, "verifying")
        with shown(True):
            found.verify()

    failed = seen = 0
    for step, result in RunFolder(run).require().survey(check):
        seen += 1
        failed += result is not None
        say(f"{step:>8}  {'whole' if result is None else _state(result)}")
    if not seen:
        raise CheckpointError(f"{run}: no checkpoint yet")
    return 1 if failed else 0


def _state(error: Exception) -> str:
    """What is wrong with a checkpoint: "damaged" if its files prove it, else "unreadable"."""
    from cupytron.errors import UnreadableCheckpoint

    return f"{'unreadable' if isinstance(error, UnreadableCheckpoint) else 'damaged'}: {error}"


@command.command(
    examples=[
        "cupytron checkpoint digest runs/demo",
        "cupytron checkpoint digest runs/demo --checkpoint 250 --json",
    ]
)
@click.argument("run", type=Folder(), metavar="RUN")
@option(
    "--checkpoint",
    default="last",
    show_default=True,
    metavar="best|last|STEP",
    help="Which checkpoint.",
)
@option("--json", "as_json", is_flag=True, help="Print an object.")
def digest(run: str, checkpoint: str, as_json: bool) -> None:
    """SHA-256 of each logical tensor, and one for all of them."""
    from cupytron.run_folder import RunFolder

    warn = lambda text: say(f"warning: {text}", err=True)  # noqa: E731
    folder = RunFolder(run).require()
    digests = folder.reading(checkpoint, warn, lambda found: found.digest())
    if as_json:
        say_json(digests)
        return
    for name, value in digests.items():
        say(f"{value}  {name}")
