"""The command line's entry: finds a command, runs it, and turns errors into one line.

Commands are imported when they are called, so that `cupytron --help` stays fast and imports neither
NumPy nor MPI.
"""

import importlib
import io
import sys
import traceback

import click

# name: (module in cupytron.cli, the line that --help shows)
COMMANDS = {
    "train": ("train", "Train a model, or resume a run."),
    "eval": ("eval", "Loss of a run over the whole validation split."),
    "sample": ("sample", "Write text with a trained model."),
    "report": ("report", "Write one HTML page about a run."),
    "data": ("data", "Prepare and inspect token data sets."),
    "config": ("config", "Show or check settings."),
    "checkpoint": ("checkpoint", "List, verify and fingerprint checkpoints."),
    "verify": ("verify", "Compare a mesh with one process: the same numbers?"),
    "bench": ("bench", "Measure a configuration on random tokens."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cupytron.cli.{COMMANDS[cmd_name][0]}")
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # the stock version imports every command for its help line
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cupytron", message="cupytron %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Train small language models with hand-written layers, and the same numbers on any mesh."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show a character must not end a training run
            stream.reconfigure(errors="replace")
    debug = "--debug" in arguments
    # --debug is accepted anywhere
    arguments = (["--debug"] if debug else []) + [a for a in arguments if a != "--debug"]
    try:
        result = cli.main(arguments, prog_name="cupytron", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.Abort:
        return _fail("stopped", 130, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # the reader of our output left (`cupytron sample ... | head`): nothing to say, nobody to say it to
        sys.stderr.close()
        return 1
    except (ValueError, OSError, MemoryError) as error:
        if not _is_for_users(error):
            raise
        return _fail(_message(error), _exit_code(error), debug)


def _is_for_users(error: BaseException) -> bool:
    from cupytron.data.errors import DataError
    from cupytron.errors import CupytronError

    return isinstance(error, CupytronError | DataError | OSError | MemoryError)


def _exit_code(error: BaseException) -> int:
    from cupytron.errors import ConfigError

    return 2 if isinstance(error, ConfigError) else 1


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory: {error or 'no details'}; try a smaller train.micro_batch"
    return str(error)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"error: {message}", err=True)
    return code
