"""The command line's entry: finds a command, runs it, and turns errors into one line.

Commands are imported when they are called, so that `cupytron --help` stays fast and imports neither
NumPy nor MPI.
"""

import atexit
import contextlib
import importlib
import io
import itertools
import sys
import traceback

import click

from cupytron.blas_kernels import drop_unfit_here
from cupytron.cli.help import Group, usage_message
from cupytron.cli.say import say_page
from cupytron.launcher import end_mpi, launched_rank, launched_tasks
from cupytron.printable import printable

# name: (module in cupytron.cli, the line that --help shows)
COMMANDS = {
    "train": ("train", "Train a model, or resume a run."),
    "eval": ("eval", "Loss of a run over the whole validation split."),
    "sample": ("sample", "Write text with a trained model."),
    "report": ("report", "Write one HTML page about a run."),
    "compare": ("compare", "Compare the curves and the settings of several runs."),
    "data": ("data", "Prepare and inspect token data sets."),
    "config": ("config", "Show or check settings."),
    "checkpoint": ("checkpoint", "List, verify and fingerprint checkpoints."),
    "verify": ("verify", "Compare a mesh with one process: the same numbers?"),
    "schedule": ("schedule", "Draw a pipeline schedule, and say what it costs."),
    "bench": ("bench", "Measure a configuration on random tokens."),
    "autotune": ("autotune", "Choose the fastest functions for a configuration."),
}
ON_A_MESH = {"train", "eval", "sample", "verify", "bench", "autotune"}


class LazyGroup(Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in ON_A_MESH and launched_tasks() > 1:
            # several copies would write the same files
            raise click.UsageError(
                f"cupytron {cmd_name} works in one process, and a launcher started {launched_tasks()}; "
                "start it without mpirun or srun"
            )
        module = importlib.import_module(f"cupytron.cli.{COMMANDS[cmd_name][0]}")
        return _with_debug(module.command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # the stock version imports every command for its help line
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _note_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(set).add("debug")


def _debug_option(hidden: bool) -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,  # before an option is found wrong
        expose_value=False,
        hidden=hidden,
        callback=_note_debug,
        help="Show the traceback of an error.",
    )


def _with_debug(command: click.Command) -> click.Command:
    """Let a command and those below it take --debug, too."""
    if not any("--debug" in option.opts for option in command.params):
        command.params.append(_debug_option(hidden=True))
    for below in getattr(command, "commands", {}).values():
        _with_debug(below)
    return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="cupytron", message="cupytron %(version)s")
def cli() -> None:
    """Train small language models with hand-written layers, and the same numbers on any mesh."""


cli.params.append(_debug_option(hidden=False))


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted.

    Where a launcher started several processes, whatever ends the command in one of them early ends all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if launched_tasks() > 1:
        sys.exit(_run_rank(arguments))
    sys.exit(_run(arguments))


def _call(arguments: list[str], noted: set[str]) -> int:
    """Run a command; `noted` then says whether --debug was given."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show a character must not end a training run
            stream.reconfigure(errors="replace")
    # before a command imports NumPy
    if (line := drop_unfit_here()) and launched_rank() == 0:
        say_page(f"warning: {line}", err=True)
    result = cli.main(arguments, prog_name="cupytron", standalone_mode=False, obj=noted)
    return result if isinstance(result, int) else 0


def _run(arguments: list[str]) -> int:
    noted: set[str] = set()
    try:
        return _call(arguments, noted)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except BrokenPipeError:
        # the reader of our output left (`cupytron sample ... | head`): nothing to say, nobody to say it to
        sys.stderr.close()
        return 1
    except (click.ClickException, click.Abort, KeyboardInterrupt, Exception) as error:
        if not _is_for_users(error):
            raise
        if "debug" in noted:
            say_page(traceback.format_exc().rstrip("\n"), err=True)
        say_page(f"error: {_message(error)}", err=True)
        return _exit_code(error)


def _run_rank(arguments: list[str]) -> int:
    from cupytron import progress, watchdog

    dog = watchdog.start(_early_timeout(arguments), launched_rank(), launched_tasks())
    # functions run in the reverse order: end_mpi, then dog.stop
    atexit.register(dog.stop)
    atexit.register(end_mpi, dog.part)
    noted: set[str] = set()
    try:
        code = _call(arguments, noted)
        progress.phase("at the end")
        return code
    except BaseException as error:
        from cupytron.failing import end_job

        dog.quiet = True
        show = "debug" in noted or not _is_for_users(error)
        end_job(error, _message(error), _exit_code(error), show)


def _early_timeout(arguments: list[str]) -> float:
    """The timeout in the arguments, before a command has read them; the command sets the final one."""
    from cupytron.watchdog import DEFAULT_TIMEOUT

    found = DEFAULT_TIMEOUT
    words = [part for word in arguments for part in word.split("=")]
    for name, value in itertools.pairwise(words):
        if name in ("--timeout", "parallel.timeout"):
            with contextlib.suppress(ValueError):
                found = max(0.0, float(value))
    return found


def _is_for_users(error: BaseException) -> bool:
    from cupytron.data.errors import DataError
    from cupytron.errors import CupytronError

    return isinstance(
        error,
        CupytronError
        | DataError
        | OSError
        | MemoryError
        | SystemExit
        | KeyboardInterrupt
        | click.ClickException
        | click.Abort
        | click.exceptions.Exit,
    )


def _exit_code(error: BaseException) -> int:
    from cupytron.errors import ConfigError

    if isinstance(error, click.ClickException | click.exceptions.Exit):
        return error.exit_code or 1
    if isinstance(error, SystemExit):
        # the other ranks go on: this is no success, whatever the code says
        return error.code if isinstance(error.code, int) and error.code else 1
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130
    return 2 if isinstance(error, ConfigError) else 1


def _message(error: BaseException) -> str:
    """What a user is told of an error, on one line; of wrong settings, a line for each."""
    from cupytron.errors import ConfigError

    return printable(_words(error), keep="\n" if isinstance(error, ConfigError) else "")


def _words(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return usage_message(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        # click makes an Abort of a KeyboardInterrupt
        return "interrupted"
    if isinstance(error, SystemExit | click.exceptions.Exit):
        code = error.code if isinstance(error, SystemExit) else error.exit_code
        return f"left the command early, by exit({code!r})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory: {error or 'no details'}; try a smaller train.micro_batch"
    return str(error) if _is_for_users(error) else f"{type(error).__name__}: {error}"
