"""The options that choose a run's settings, for every command that needs some."""

import contextlib
import functools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cupytron.cli.flags import FLAGS, HEADINGS, SHOWN, SWITCHES
from cupytron.cli.help import Folder, PathText, PresetOption, SettingOption, option, usage_message
from cupytron.cli.say import say

if TYPE_CHECKING:
    from cupytron.config import ParallelConfig, RunConfig
    from cupytron.progress import Note
    from cupytron.trained import TrainedModel


@dataclass(frozen=True)
class Settings:
    """What the command line says about a run's settings.

    Attributes:
        preset: name of a preset.
        file: path of a TOML file.
        overrides: `section.key=value` strings: those of `--set` in their order, then the named
            flags, which therefore win.
    """

    preset: str | None = None
    file: str | None = None
    overrides: list[str] = field(default_factory=list)

    def load(
        self, run: str | None = None, mesh: bool = False, init_from: str | None = None
    ) -> "RunConfig":
        """The settings.

        Args:
            init_from: a run whose weights a new run starts from, and with them its model.
            mesh: whether the processes that a launcher started are to form their mesh.
            run: a run's folder; if it holds a checkpoint, and no preset and no file is given, the
                settings that its newest checkpoint seals are the start.

        Raises:
            ConfigError: a line for everything that is wrong with them.
            UnreadableCheckpoint: that checkpoint cannot be read now.
        """
        from cupytron.config import load_config
        from cupytron.errors import ConfigError

        start: dict[str, Any] = {"file": self.file}
        if run and not self.preset and not self.file:
            start = _own_settings(Path(run))
        if init_from and start == {"file": None}:
            start = {"init_from": init_from}
        if not mesh:
            return load_config(self.preset, overrides=self.overrides, **start)
        from cupytron.launcher import launched_tasks

        ranks, moved = launched_tasks(), []
        if start not in ({"file": self.file}, {"init_from": init_from}):
            # a run goes on on any mesh: its old one gives way where it does not fit, unless asked for
            moved = _giving_way(load_config(check=False, **start).parallel, self.overrides, ranks)
        overrides = [*moved, *self.overrides]
        try:
            return load_config(self.preset, overrides=overrides, ranks=ranks, **start)
        except ConfigError as error:
            named = any(text.partition("=")[0].strip() == "data.path" for text in self.overrides)
            if run and ranks > 1 and start == {"file": None} and not self.preset and not named:
                # no new run begins without data. Perhaps this rank alone does not see the run; the others
                # cannot be asked before MPI begins.
                raise ConfigError(
                    f"{error}\n{run}: this rank sees no checkpoint there that would give it settings; if "
                    "other ranks see one, put the run's folder on a file system that all ranks share"
                ) from None
            raise


def _own_settings(run: Path) -> dict[str, Any]:
    """A run's own settings, as arguments of load_config; {"file": None} if it has none yet."""
    from cupytron.sealed import list_steps, sealed_settings

    if (settings := sealed_settings(run)) is not None:
        return {"start": settings}
    # a checkpoint that a killed save set aside is restored when the run starts, so its config.toml counts;
    # that of a failed run that saved nothing does not
    file = run / "config.toml"
    has_saved = bool(list_steps(run)) or (run / "saved").exists()
    return {"file": str(file) if has_saved and file.is_file() else None}


def _giving_way(old: "ParallelConfig", overrides: list[str], ranks: int) -> list[str]:
    """Overrides that take away as much of a run's old mesh as keeps the ranks from fitting."""
    given = {key.strip(): value.strip() for key, _, value in (o.partition("=") for o in overrides)}

    def fits(gone: tuple[str, ...]) -> bool:
        left = {axis: None if axis in gone else getattr(old, axis) for axis in ("tp", "pp", "dp")}
        sizes = {axis: given.get(f"parallel.{axis}", size) for axis, size in left.items()}
        if not all(str(size or 1).isdecimal() for size in sizes.values()):
            return True  # load_config will say what is wrong
        tp, pp, dp = (int(size) if size else None for size in sizes.values())
        each = (tp or 1) * (pp or 1)
        return ranks % each == 0 if dp is None else each * dp == ranks

    choices: list[tuple[str, ...]] = [(), ("dp",), ("dp", "pp"), ("dp", "tp")]
    gone = next(filter(fits, choices), ("dp", "pp", "tp"))
    moved = [f"parallel.{axis}={'none' if axis == 'dp' else 1}" for axis in gone]

    def new(key: str) -> str | None:
        """What was given for a key, if it is not what the run had."""
        value = given.get(f"parallel.{key}")
        return None if value == str(getattr(old, key)) else value

    # without stages no schedule but 1f1b saves memory, and the chunks of one schedule are not another's
    if ("pp" in gone or new("pp") == "1") and "parallel.schedule" not in given:
        moved += ["parallel.schedule=1f1b", "parallel.chunks=none"]
    elif new("schedule"):
        moved.append("parallel.chunks=none")
    if "pp" in gone or any(map(new, ("pp", "chunks", "schedule"))):
        moved.append("parallel.split=none")
    return moved


# which of a run's checkpoints a command reads
checkpoint_option = option(
    "--checkpoint",
    default="best",
    show_default=True,
    metavar="best|last|STEP",
    help="Which weights: of the lowest validation loss, the newest, or of a step.",
)


def set_timeout(seconds: float) -> None:
    """Give this process's watchdog, if it has one, the timeout of the settings."""
    from cupytron import watchdog

    if (dog := watchdog.here()) is not None:
        dog.timeout = seconds


def prepare_process(config: "RunConfig") -> dict[str, Any]:
    """Prepare the process as the settings say, before NumPy is imported; returns the record of it."""
    from cupytron import progress, start

    progress.phase("preparing the process")
    record = start.prepare_process(config)
    progress.phase("loading the library")
    return record


def data_vocabulary(config: "RunConfig") -> int | None:
    """The vocabulary of the settings' data set, if they name one."""
    if not config.data.path:
        return None
    from cupytron.data import open_dataset

    return open_dataset(config.data.path).vocab_size


def prepare_for_run(run: str) -> "RunConfig":
    """Prepare the process as a run's own settings say; returns them."""
    from cupytron.config import load_config
    from cupytron.sealed import require_run, sealed_settings

    require_run(Path(run))
    start = sealed_settings(Path(run))
    file = None if start else Path(run) / "config.toml"
    config = load_config(file=file, check=False, start=start)
    prepare_process(_with_fitting_kernel(config))
    return config


def _with_fitting_kernel(config: "RunConfig") -> "RunConfig":
    """A run's settings with a kernel that this processor has: the run may come from another machine."""
    from cupytron import blas_kernels
    from cupytron.launcher import launched_rank

    kernel = config.parallel.blas_kernel
    lacks = blas_kernels.missing(kernel, blas_kernels.flags())
    if not lacks:
        return config
    if launched_rank() == 0:
        say(
            f"warning: the run's parallel.blas_kernel={kernel} is not used: this processor lacks "
            f"{', '.join(lacks)}; auto is used in its place",
            err=True,
        )
    parallel = config.parallel.model_copy(update={"blas_kernel": "auto"})
    return config.model_copy(update={"parallel": parallel})


def check_model_mesh(config: "RunConfig", tp: int, pp: int) -> None:
    """Refuse a mesh that a trained model does not fit, before MPI begins, with those that it fits.

    Raises:
        ConfigError: saying what fits.
    """
    from cupytron.config import load_config
    from cupytron.launcher import launched_tasks

    ranks = launched_tasks()
    # any number of replicas can share a batch of `ranks` sequences
    batch = ["train.sequence_length=1", "train.micro_batch=1", f"train.global_batch={ranks}"]
    mesh = [f"parallel.tp={tp}", f"parallel.pp={pp}"]
    load_config(start={"model": config.model.model_dump()}, overrides=[*batch, *mesh], ranks=ranks)


class Seconds(click.FloatRange):
    """Seconds, from 0 on: a finite number, since nothing is later than NaN or infinity."""

    def __init__(self) -> None:
        super().__init__(0)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds; give 0 for no limit", param, ctx)
        return seconds


def mesh_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mesh for a command that works with a trained model: `tp`, `pp`, `zero`, `device` and `timeout`."""
    for add in (
        option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            heading="Mesh and device",
            help="auto: a GPU where one can be used.",
        ),
        option(
            "--timeout",
            type=Seconds(),
            default=600.0,
            show_default=True,
            heading="Mesh and device",
            help="Seconds without progress that end several ranks' job; 0: never.",
        ),
        option(
            "--zero",
            type=click.IntRange(0, 3),
            default=0,
            show_default=True,
            heading="Mesh and device",
            help="ZeRO stage; 3 spreads the weights over the ranks.",
        ),
        option(
            "--pipeline-parallel-size",
            "--pp",
            "pp",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            heading="Mesh and device",
            help="Under mpirun: stages that the layers are dealt out to.",
        ),
        option(
            "--tensor-parallel-size",
            "--tp",
            "tp",
            type=click.IntRange(1),
            heading="Mesh and device",
            help="Under mpirun: how many ranks share each layer.",
        ),
    ):
        function = add(function)
    return function


@contextlib.contextmanager
def trained_model(
    run: str,
    checkpoint: str,
    tp: int,
    pp: int,
    zero: int,
    device: str,
    timeout: float,
    **choices: Any,
) -> Iterator[tuple["TrainedModel", "Note", bool]]:
    """A run's model on the mesh of all processes, watched while this lasts.

    Args:
        run, checkpoint, tp, pp, zero, device, timeout: the command's options.
        choices: its others, in which the ranks must agree, too.

    Yields: the model, progress.note, and whether this rank is the one that speaks.
    """
    set_timeout(timeout)
    check_model_mesh(prepare_for_run(run), tp, pp)

    from cupytron import load, progress
    from cupytron.comm import open_world
    from cupytron.config import ParallelConfig, RunConfig
    from cupytron.mesh_run import check_alike, open_mesh, watched
    from cupytron.terminal import shown

    world = open_world()
    first = world.rank == 0
    check_alike(world, run=run, checkpoint=checkpoint, tp=tp, pp=pp, zero=zero, **choices)

    def warn(text: str) -> None:
        if first:
            say(f"warning: {text}", err=True)

    with watched(world, timeout):
        mesh = ParallelConfig.model_validate({"tp": tp, "pp": pp, "device": device})
        context = open_mesh(RunConfig(parallel=mesh), world)
        with shown(first):
            model = load(run, checkpoint, warn, context, zero)
        yield model, progress.note, first


def settings_options(
    function: Callable[..., Any] | None = None,
    *,
    unused: Mapping[str, str] | None = None,
    defaults: bool = True,
) -> Callable[..., Any]:
    """Give a command the options of a run's settings; it receives them as `settings`.

    Args:
        unused: keys that this command has no use for, and why. Their options are refused.
        defaults: whether what is not given is as the settings' schema says.
    """
    if function is None:
        return functools.partial(settings_options, unused=unused, defaults=defaults)
    call: Callable[..., Any] = function

    @functools.wraps(call)
    def command(*args: Any, **kwargs: Any) -> Any:
        return call(*args, settings=_taken(kwargs), **kwargs)

    for add in reversed(_options(unused or {}, defaults)):
        command = add(command)
    return command


def parse_settings(line: str, start: Settings, unused: Mapping[str, str] | None = None) -> Settings:
    """Settings written as flags in one line, over those of `start`; `unused` as in settings_options."""
    line_command = click.Command(line, params=[])
    for add in reversed(_options(unused or {})):
        line_command = add(line_command)
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise click.UsageError(f"in the line {line!r}: {error}") from None
    try:
        parameters = line_command.make_context(line, words).params
    except click.UsageError as error:
        error.ctx = None  # that line is no command whose help could be asked for
        raise click.UsageError(f"in the line {line!r}: {usage_message(error)}") from None
    found = _taken(parameters)
    return Settings(
        found.preset or start.preset,
        found.file or start.file,
        [*start.overrides, *found.overrides],
    )


def _taken(parameters: dict[str, Any]) -> Settings:
    """The settings among a command's parameters, which are removed from them."""
    overrides = list(parameters.pop("set_"))
    for key in [key for _, key, _ in FLAGS + SWITCHES]:
        value = parameters.pop(_name(key))
        if value is not None:
            overrides.append(f"{key}={_spell(key, value)}")
    file = parameters.pop("config")
    if file is not None:
        from cupytron.config_io import take_pipe
        from cupytron.launcher import launched_tasks

        take_pipe(file, launched_tasks())
    return Settings(parameters.pop("preset"), file, overrides)


def _options(unused: Mapping[str, str], defaults: bool = True) -> list[Callable[..., Any]]:
    def refuse_option(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None:
            why = unused[getattr(param, "key", "")]
            raise click.UsageError(f"{param.opts[0]}: is not used by this command; {why}", ctx)

    start: dict[str, Any] = {"heading": "Settings to start from"}
    options = [
        click.option("--preset", cls=PresetOption, **start),
        option(
            "--config",
            type=PathText(),
            metavar="FILE",
            help="TOML file; overrides the preset.",
            **start,
        ),
        option(
            "--set",
            "set_",
            metavar="SECTION.KEY=VALUE",
            multiple=True,
            help="Override any setting; repeatable. The options below override it. "
            "`cupytron config show --keys` lists all keys.",
            **start,
        ),
    ]
    for names, key, heading in sorted(FLAGS + SWITCHES, key=lambda row: HEADINGS.index(row[2])):
        how: dict[str, Any] = {"hidden": True, "callback": refuse_option} if key in unused else {}
        shown = SHOWN.get(key)
        options.append(
            click.option(
                *names,
                _name(key),
                cls=SettingOption,
                key=key,
                heading=heading,
                shown=shown,
                defaults=defaults,
                default=None,
                type=Folder() if shown == "DIR" else None,
                **how,
            )
        )
    return options


def _name(key: str) -> str:
    return key.replace(".", "_")


def _spell(key: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if key != "data.path":
        return value
    from cupytron.config_io import toml_value

    # quoted, so that a folder called 2024 or none is a folder
    return toml_value(value)
