"""cupytron train."""

import click

from cupytron.cli.help import Command, Folder, option
from cupytron.cli.options import Settings, prepare_process, set_timeout, settings_options
from cupytron.errors import ConfigError
from cupytron.launcher import launched_tasks


@click.command(
    cls=Command,
    examples=[
        "cupytron train --preset demo --data DIR --out runs/new",
        "cupytron train --out runs/new                  # goes on where it stopped",
        # a longer run would stretch the schedule of the learning rate
        "cupytron train --out runs/new --max-steps 1600 --set optim.decay_steps=800",
        "cupytron train --data DIR --init-from runs/new --out runs/fine-tuned",
        "mpirun -n 4 cupytron train --preset demo --data DIR --out runs/mesh --tp 2 --zero 1",
        "cupytron train --config settings.toml --set optim.schedule=constant --out runs/new",
    ],
)
@option(
    "--out",
    required=True,
    type=Folder(),
    metavar="RUN",
    heading="Run",
    help="The run's folder; a run that stands there goes on.",
)
@option(
    "--resume",
    heading="Run",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto: go on from the newest whole checkpoint in RUN; never: refuse a RUN that has one.",
)
@option(
    "--init-from",
    type=Folder(),
    metavar="RUN",
    heading="Run",
    help="Start from another run's weights (fine-tuning); without --preset and --config with its model.",
)
@option(
    "--init-checkpoint",
    metavar="best|last|STEP",
    heading="Run",
    help="Which weights of --init-from.  [default: best, else last]",
)
@option(
    "--trace",
    heading="Run",
    metavar="FIRST:LAST",
    help="Steps FIRST to LAST - 1 as a Chrome trace, RUN/trace.json.",
)
@option("--quiet", is_flag=True, heading="Run", help="Print nothing.")
@settings_options
def command(
    settings: Settings,
    out: str,
    resume: str,
    init_from: str | None,
    init_checkpoint: str | None,
    trace: str | None,
    quiet: bool,
) -> int:
    """Train a model, or resume a run: in one process, or in many (mpirun -n 8 cupytron train ...).

    Ctrl-C, SIGTERM or SIGUSR1 once: finish the step, save, stop. The same command goes on from there.
    A second Ctrl-C or SIGTERM, 5 seconds or more after the first: stop at once, without a save.
    Without --preset and --config a run that is resumed keeps its own settings.
    """
    from cupytron.signals import listening

    if init_checkpoint is not None and init_from is None:
        raise click.UsageError(
            f"--init-checkpoint {init_checkpoint}: of which run? give --init-from RUN with it"
        )
    # before anything heavy is imported, so that a signal in the first seconds is not lost
    with listening(speaks=not quiet):
        from cupytron.trace import parse_range

        steps = parse_range(trace) if trace is not None else None
        which = "best" if init_checkpoint is None else init_checkpoint
        try:
            config = settings.load(run=out, mesh=True, init_from=init_from)
        except ConfigError:
            if launched_tasks() > 1:
                # the settings may be wrong for the reason alone that this rank does not see the run
                from cupytron.comm import open_world
                from cupytron.run import check_one_run

                check_one_run(open_world(), out, resume, init_from, which, steps)
            raise
        set_timeout(config.parallel.timeout)
        environment = prepare_process(config)

        from cupytron.comm import open_world
        from cupytron.run import train

        world = open_world()
        return train(
            config,
            out,
            environment,
            resume,
            init_from,
            quiet,
            world,
            steps,
            init_checkpoint=which,
        ).exit_code
