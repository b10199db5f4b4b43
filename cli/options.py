"""The options that choose a run's settings, for every command that needs some."""

import contextlib
import functools
import json
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cupytron.config import ParallelConfig, RunConfig
    from cupytron.progress import Note
    from cupytron.trained import TrainedModel

# (names, the key that they set, help); the names are those that users of other systems know.
# Values stay text here, so that `load_config` tells all errors at once and in one way.
FLAGS = [
    (("--data",), "data.path", "Folder made by `cupytron data prepare`."),
    (("--num-layers", "--n-layers"), "model.num_layers", "Blocks."),
    (("--num-heads", "--n-heads"), "model.num_heads", "Attention heads."),
    (("--d-model",), "model.d_model", "Width of the residual stream."),
    (("--sequence-length",), "train.sequence_length", "Tokens of a training sequence."),
    (("--micro-batch", "--batch-size"), "train.micro_batch", "Sequences of one forward."),
    (("--global-batch",), "train.global_batch", "Sequences of a step."),
    (("--max-steps",), "train.max_steps", "Steps of the whole run."),
    (("--lr", "--learning-rate"), "optim.lr", "Highest learning rate."),
    (("--eval-interval",), "train.eval_interval", "Steps between validation losses."),
    (("--check-replicas",), "train.check_replicas", "Steps between comparisons of replicas."),
    (("--seed",), "train.seed", "Of weights, sample order and dropout."),
    (("--dtype",), "train.dtype", "Of weights and optimizer state: float32 or float64."),
    (("--compute-dtype",), "train.compute_dtype", "float64, float32, bfloat16 or float16."),
    (("--device",), "parallel.device", "auto, cpu or cuda."),
    (("--comm",), "parallel.comm", "GPU: auto, nccl, mpi or mpi-staged."),
    (("--autotune",), "parallel.autotune", "on or off: choose kernels by measurement."),
    (("--tensor-parallel-size", "--tp"), "parallel.tp", "Tensor-parallel size."),
    (("--pipeline-parallel-size", "--pp"), "parallel.pp", "Pipeline-parallel size."),
    (("--data-parallel-size", "--dp"), "parallel.dp", "Data-parallel size."),
    (("--schedule",), "parallel.schedule", "Pipeline: gpipe, 1f1b, interleaved, zb-h1 or zb-v."),
    (("--chunks",), "parallel.chunks", "Interleaved: parts of the model on each stage."),
    (("--split",), "parallel.split", "Blocks of each part of the pipeline, such as 2,3,3,2."),
    (("--recompute",), "model.recompute", "none, selective or block: forward again in backward."),
    (("--zero",), "parallel.zero", "ZeRO stage, 0 to 3."),
    (("--threads",), "parallel.threads", "Threads of each process."),
    (("--timeout",), "parallel.timeout", "Seconds without progress that end several ranks' job."),
    (("--blas-kernel",), "parallel.blas_kernel", "OpenBLAS kernel: auto, off or a name."),
]
SWITCHES = [
    (
        ("--deterministic/--no-deterministic",),
        "train.deterministic",
        "The same bits on any number of replicas (one BLAS thread).",
    ),
    (
        ("--sequence-parallel/--no-sequence-parallel", "--sp/--no-sp"),
        "parallel.sp",
        "Sequence parallelism along the tensor axis.",
    ),
    (("--malloc/--no-malloc",), "parallel.malloc", "Keep freed pages (glibc)."),
    (("--tf32/--no-tf32",), "train.tf32", "GPU: float32 products on tensor cores."),
    (("--graphs/--no-graphs",), "parallel.graphs", "GPU: CUDA graphs."),
]


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

    def load(self, run: str | None = None, mesh: bool = False) -> "RunConfig":
        """The settings.

        Args:
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
        if not mesh:
            return load_config(self.preset, overrides=self.overrides, **start)
        from cupytron.launcher import launched_tasks

        ranks, moved = launched_tasks(), []
        if start != {"file": self.file}:
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
checkpoint_option = click.option(
    "--checkpoint",
    default="best",
    show_default=True,
    metavar="best|last|STEP",
    help="Which weights.",
)


def set_timeout(seconds: float) -> None:
    """Give this process's watchdog, if it has one, the timeout of the settings."""
    from cupytron import watchdog

    if (dog := watchdog.here()) is not None:
        dog.timeout = seconds


def prepare_process(config: "RunConfig") -> dict[str, Any]:
    """Prepare the process as the settings say, before NumPy is imported; returns the record of it."""
    from cupytron import progress
    from cupytron.process import prepare

    progress.phase("preparing the process")
    parallel = config.parallel
    record = prepare(
        parallel.threads, parallel.blas_kernel, parallel.malloc, config.train.deterministic
    )
    progress.phase("loading the library")
    return record


def data_vocabulary(config: "RunConfig") -> int | None:
    """The vocabulary of the settings' data set, if it is wanted: they may name none, or have their own."""
    if not config.data.path or config.model.vocab_size is not None:
        return None
    from cupytron.data import open_dataset

    return open_dataset(config.data.path).vocab_size


def prepare_for_run(run: str) -> None:
    """Prepare the process as a run's own settings say."""
    from cupytron.config import load_config
    from cupytron.sealed import require_run, sealed_settings

    require_run(Path(run))
    start = sealed_settings(Path(run))
    file = None if start else Path(run) / "config.toml"
    prepare_process(load_config(file=file, check=False, start=start))


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
    for option in (
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto: a GPU where one can be used.",
        ),
        click.option(
            "--timeout",
            type=Seconds(),
            default=600.0,
            show_default=True,
            help="Seconds without progress that end several ranks' job; 0: never.",
        ),
        click.option("--zero", type=click.IntRange(0, 3), default=0, help="3: spread the weights."),
        click.option(
            "--pipeline-parallel-size",
            "--pp",
            "pp",
            type=click.IntRange(1),
            default=1,
            metavar="N",
            help="Under mpirun: stages that the layers are dealt out to.",
        ),
        click.option(
            "--tensor-parallel-size",
            "--tp",
            "tp",
            type=click.IntRange(1),
            metavar="N",
            help="Under mpirun: how many ranks share each layer.",
        ),
    ):
        function = option(function)
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
    prepare_for_run(run)

    from cupytron import load, progress
    from cupytron.comm import open_world
    from cupytron.config import ParallelConfig, RunConfig
    from cupytron.mesh_run import check_alike, open_mesh, watched

    world = open_world()
    first = world.rank == 0
    check_alike(world, run=run, checkpoint=checkpoint, tp=tp, pp=pp, zero=zero, **choices)

    def warn(text: str) -> None:
        if first:
            click.echo(f"warning: {text}", err=True)

    with watched(world, timeout):
        mesh = ParallelConfig.model_validate({"tp": tp, "pp": pp, "device": device})
        context = open_mesh(RunConfig(parallel=mesh), world)
        yield load(run, checkpoint, warn, context, zero), progress.note, first


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a run's settings; it receives them as `settings`."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        return function(*args, settings=_taken(kwargs), **kwargs)

    for option in reversed(_options()):
        command = option(command)
    return command


def parse_settings(line: str, start: Settings) -> Settings:
    """Settings written as flags in one line, over those of `start`."""
    line_command = click.Command(line, params=[])
    for option in reversed(_options()):
        line_command = option(line_command)
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise click.UsageError(f"in the line {line!r}: {error}") from None
    parameters = line_command.make_context(f"in the line {line!r}", words).params
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
    return Settings(parameters.pop("preset"), parameters.pop("config"), overrides)


def _options() -> list[Callable[..., Any]]:
    options = [
        click.option("--preset", metavar="NAME", help="Settings to start from."),
        click.option("--config", metavar="FILE", help="TOML file; overrides the preset."),
        click.option(
            "--set",
            "set_",
            metavar="SECTION.KEY=VALUE",
            multiple=True,
            help="Override one setting; repeatable. The flags below override it.",
        ),
    ]
    for names, key, text in FLAGS:
        options.append(click.option(*names, _name(key), metavar="VALUE", help=f"{text}  [{key}]"))
    for names, key, text in SWITCHES:
        options.append(click.option(*names, _name(key), default=None, help=f"{text}  [{key}]"))
    return options


def _name(key: str) -> str:
    return key.replace(".", "_")


def _spell(key: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # quoted, so that a folder called 2024 or none is a folder
    return json.dumps(value, ensure_ascii=False) if key == "data.path" else value
