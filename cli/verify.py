"""cupytron verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cupytron.cli.help import Command, PathText, option
from cupytron.cli.options import (
    Settings,
    parse_settings,
    prepare_process,
    set_timeout,
    settings_options,
)
from cupytron.cli.say import say, say_json, say_page

if TYPE_CHECKING:
    from cupytron.config import RunConfig

# a model in which every kind of layer has work, small enough for a second
SMALL = [
    "model.num_heads=4",
    "model.d_model=16",
    "model.vocab_size=65",
    "model.dropout=0.1",
    "train.sequence_length=8",
    "train.micro_batch=2",
    "optim.warmup_steps=0",
]
# what tells these lines from training
UNUSED = {
    "data.path": "it takes random tokens; --set model.vocab_size=N says how many there are",
    "train.max_steps": "give --steps",
    "train.eval_interval": "it evaluates nothing",
    "train.check_replicas": "replicas are compared after each step",
}
SHOWN = 8  # lines of the table


@click.command(
    cls=Command,
    examples=[
        "cupytron verify --tp 2 --dp 2 --zero 3 --sp       # ranks are threads",
        "mpirun -n 4 cupytron verify --tp 2 --zero 1       # ranks are processes",
        "cupytron verify --preset demo --pp 2 --schedule zb-h1 --steps 1",
    ],
)
@option(
    "--steps",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    heading="Comparison",
    help="Steps that both train, and that are compared.",
)
@option(
    "--model",
    "own",
    type=PathText(),
    metavar="FILE:CLASS",
    heading="Comparison",
    help="Your own model. FILE is executed: name only a Python file that you trust.",
)
@option(
    "--sweep",
    type=PathText(),
    metavar="FILE",
    heading="Comparison",
    help="Many cases: the flags of one a line, # comments.",
)
@option(
    "--json",
    "as_json",
    is_flag=True,
    heading="Comparison",
    help="Print an object for each case.",
)
@settings_options(unused=UNUSED, defaults=False)
def command(
    settings: Settings, steps: int, own: str | None, sweep: str | None, as_json: bool
) -> int:
    """Train on one process and on a mesh, and compare loss, gradients and weights after each step.

    The mesh's ranks are threads, or processes under mpirun. Without --preset and --config a tiny model is
    taken, in float64; without --tp, --pp and --dp a mesh of tp=2 x dp=2. The exit code is 1 if a number
    differs.

    With --model FILE:CLASS it is CLASS() of your Python file, whose gradients are checked first. The class
    needs a `loss`, and for --tp above 1 a `tensor_plan` (docs/own-layers.md).
    """
    cases = [(" ".join(settings.overrides), settings)]
    if sweep:
        cases = [(line, parse_settings(line, settings, UNUSED)) for line in _lines(Path(sweep))]
    configs = [(name, _config(case, name if sweep else None, own)) for name, case in cases]
    set_timeout(configs[0][1].parallel.timeout)
    prepare_process(configs[0][1])

    from cupytron import progress, verify
    from cupytron.comm import open_world
    from cupytron.mesh_run import check_alike, watched
    from cupytron.terminal import shown

    model = _own(own, configs) if own else None
    world = open_world()
    check_alike(world, steps=steps, cases=[str(config) for _, config in configs])
    if model is not None:
        gradients = model.check(configs[0][1])
        gradients.raise_if_wrong()
        if world.rank == 0 and not as_json:
            say_page(str(gradients))
    failed = 0
    found: dict[Any, Any] = {}  # one-process runs that several cases share
    for number, (name, config) in enumerate(configs, start=1):
        with watched(world, config.parallel.timeout), shown(world.rank == 0):
            report = verify.run(config, steps, world, found, progress.note, model)
        failed += not report.ok
        if world.rank == 0:
            if as_json:
                say_json({"case": name, **_object(report)})
            elif sweep:
                worst = report.differences[0]
                say(
                    f"{number}/{len(configs)} {'ok' if report.ok else 'FAILED'} {worst.error:.1e} "
                    f"({worst.what} {worst.tensor})  {name}"
                )
            else:
                _show(config, report)
    if world.rank == 0 and sweep and not as_json:
        say(f"{len(configs) - failed} of {len(configs)} cases hold")
    return 1 if failed else 0


def _own(name: str, configs: list[tuple[str, "RunConfig"]]) -> Any:
    """The user's model; its vocabulary goes into the settings of all cases."""
    from cupytron.own_model import OwnModel

    model = OwnModel.load(name)
    configs[:] = [(line, model.settings(config)) for line, config in configs]
    return model


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(f"{path}: is not a text file") from None
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    if not any(lines):
        raise click.UsageError(f"{path}: holds no case; write the flags of one on each line")
    return [line for line in lines if line]


def _config(settings: Settings, line: str | None, own: str | None = None) -> "RunConfig":
    """The case's settings: what is not given comes from the small model, or suits the mesh.

    Args:
        line: of the sweep's file, which may need fewer ranks than there are; None: the command's own.
        own: a user's model, which may be without a plan for tp.
    """
    from cupytron.config import load_config
    from cupytron.errors import ConfigError
    from cupytron.launcher import launched_tasks

    # before what was given, so that it wins
    start = ["train.dtype=float64", "train.compute_dtype=none", "train.reduce_dtype=none"]
    if not settings.preset and not settings.file:
        start += SMALL
    given = {text.partition("=")[0].strip() for text in settings.overrides}
    tasks = launched_tasks()
    if tasks == 1 and not given & {"parallel.tp", "parallel.pp", "parallel.dp"}:
        start += ["parallel.dp=2"] if own else ["parallel.tp=2", "parallel.dp=2"]

    def load(*more: str, check: bool = True) -> "RunConfig":
        overrides = [*start, *more, *settings.overrides]
        ranks = tasks if line is None and tasks > 1 else None
        try:
            return load_config(settings.preset, settings.file, overrides, ranks, check)
        except ConfigError as error:
            raise ConfigError(f"in the line {line!r}: {error}" if line else str(error)) from None

    config = load(check=False)
    parallel = config.parallel
    dp = parallel.dp or max(1, tasks // (parallel.tp * parallel.pp))
    # twice as many micro-batches as stages
    batch = 2 * parallel.pp * config.train.micro_batch * dp
    suits = [f"parallel.dp={dp}", f"train.global_batch={batch}"]
    if not settings.preset and not settings.file:
        suits.append(f"model.num_layers={max(2, parallel.parts - 2)}")
    return load(*suits, f"model.vocab_size={config.model.vocab_size or 256}")


def _object(report: Any) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "largest": report.largest,
        "tolerance": report.tolerance,
        "gradient_error": report.gradient_error,
        "replicas_equal": report.replicas_equal,
        "groups_right": report.groups_right,
        "differences": [difference._asdict() for difference in report.differences],
    }


def _show(config: "RunConfig", report: Any) -> None:
    from cupytron.gpu import uses_gpu

    parallel = config.parallel
    say(
        f"one process and tp={parallel.tp} x pp={parallel.pp} x dp={parallel.dp}"
        f"{f' ({parallel.schedule})' if parallel.parts > 1 else ''}, ZeRO {parallel.zero}"
        f"{', sequence parallel' if parallel.sp else ''}, {config.train.dtype}: largest errors, "
        "max|a - b| / max|b| of a tensor"
    )
    if uses_gpu(parallel.device):
        say(
            "  on a GPU, with cupytron's own attention: cuDNN's has 16 bits only, and other dropout masks"
        )
    for difference in report.differences[:SHOWN]:
        what = "" if difference.what == "loss" else f"{difference.what} of "
        say(f"  {difference.error:8.1e}  step {difference.step}  {what}{difference.tensor}")
    if len(report.differences) > SHOWN:
        say(f"  and {len(report.differences) - SHOWN} smaller ones")
    if report.gradient_error is not None:
        say(f"one process's gradient against finite differences: {report.gradient_error:.1e}")
    if not report.replicas_equal:
        say("replicas differ in weights or optimizer state")
    if not report.groups_right:
        say("the groups of the mesh hold other ranks than they should")
    limit = f"{report.tolerance:.0e}" if report.tolerance else "0: bit for bit"
    say(f"{'the same numbers' if report.ok else 'NOT the same numbers'} (tolerance {limit})")
