"""cupytron train."""

import click

from cupytron.cli.options import Settings, prepare_process, settings_options


@click.command()
@click.option("--out", required=True, metavar="RUN", help="The run's folder.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto: go on from the newest whole checkpoint in RUN; never: refuse a RUN that has one.",
)
@click.option("--init-from", metavar="RUN", help="Start from another run's weights (fine-tuning).")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@settings_options
def command(settings: Settings, out: str, resume: str, init_from: str | None, quiet: bool) -> int:
    """Train a model, or resume a run.

    Ctrl-C, SIGTERM or SIGUSR1 once: finish the step, save, stop. The same command goes on from there.
    Without --preset and --config a run that is resumed keeps its own settings.
    """
    config = settings.load(run=out)
    environment = prepare_process(config)

    from cupytron.run import train

    return train(config, out, environment, resume, init_from, quiet).exit_code
