"""`cupytron config`: show and check settings."""

from typing import TYPE_CHECKING

import click

from cupytron.cli.help import Group, PathText, PresetOption, option
from cupytron.cli.options import Settings, settings_options
from cupytron.cli.say import say, say_json, say_page

if TYPE_CHECKING:
    from cupytron.config import RunConfig


@click.group(cls=Group)
def command() -> None:
    """Show or check settings."""


@command.command(
    examples=[
        "cupytron config show --preset demo > settings.toml",
        "cupytron config show --presets",
        "cupytron config show --keys",
        "cupytron config show --preset demo --set optim.lr=1e-4 --json",
    ]
)
@option("--json", "as_json", is_flag=True, heading="Output", help="Print JSON instead of TOML.")
@option("--presets", is_flag=True, heading="Output", help="List the presets.")
@option(
    "--keys",
    is_flag=True,
    heading="Output",
    help="List every key with its default and meaning.",
)
@settings_options
def show(settings: Settings, as_json: bool, presets: bool, keys: bool) -> None:
    """Print the settings that a run would have, as a TOML file.

    Defaults come first, then --preset, --config, --set and the named flags; the later one wins.
    """
    if as_json + presets + keys > 1:
        raise click.UsageError("--json, --presets and --keys: give one of them")
    if presets:
        say_page(_list_presets())
    elif keys:
        say_page(_list_keys())
    else:
        config = resolve(settings.load())
        if as_json:
            say_json(config.model_dump(), indent=2)
        else:
            say_page(_page(config).removesuffix("\n"))


@command.command(
    examples=[
        "cupytron config validate settings.toml",
        "cupytron config validate --preset demo a.toml b.toml",
    ]
)
@click.argument("files", type=PathText(), nargs=-1, required=True, metavar="FILE...")
@click.option("--preset", cls=PresetOption)
@click.pass_context
def validate(ctx: click.Context, files: tuple[str, ...], preset: str | None) -> None:
    """Check TOML files, and name everything that is wrong with each."""
    from cupytron.config import load_config
    from cupytron.config_io import take_pipe
    from cupytron.errors import ConfigError

    failed = False
    for file in files:
        try:
            take_pipe(file)
            load_config(preset, file)
        except ConfigError as error:
            failed = True
            for line in str(error).splitlines():
                # an error in reading names the file itself
                say(line if line.startswith(f"{file}: ") else f"{file}: {line}", err=True)
        else:
            say(f"{file}: ok")
    ctx.exit(2 if failed else 0)


def resolve(config: "RunConfig") -> "RunConfig":
    """The settings with everything filled in that does not depend on the data or the machine."""
    from cupytron.config import resolve_model

    vocab_size = config.model.vocab_size
    model = resolve_model(config.model, vocab_size or 2, config.train.sequence_length)
    return config.model_copy(
        update={
            "model": model.model_copy(update={"vocab_size": vocab_size}),
            "train": config.train.model_copy(update={"global_batch": config.global_batch}),
            "optim": config.optim.model_copy(
                update={"min_lr": config.min_lr, "decay_steps": config.decay_steps}
            ),
        }
    )


def _page(config: "RunConfig") -> str:
    unset = [
        f"{section}.{key}"
        for section, values in config.model_dump().items()
        for key, value in values.items()
        if value is None
    ]
    header = [
        "# Settings of a run; read again with --config FILE.",
        f"# {_parameters(config)}; {config.tokens_per_step:,} tokens a step.",
    ]
    if unset:
        header.append(f"# Not set, and follows from the data or the machine: {', '.join(unset)}.")
    return "\n".join([*header, "", config.to_toml()])


def _parameters(config: "RunConfig") -> str:
    """How many parameters, as far as that is known without the data."""
    from cupytron.config import resolve_model

    vocab = config.model.vocab_size
    model = resolve_model(config.model, vocab or 2, config.train.sequence_length)
    count = model.num_parameters()
    if vocab:
        return f"{count:,} parameters"
    per_token = model.d_model * (1 if model.tied else 2)
    return f"{count - 2 * per_token:,} parameters and {per_token} for each token of the vocabulary"


def _list_presets() -> str:
    from cupytron.config import load_config
    from cupytron.config_io import preset_names, preset_path

    lines = []
    for name in preset_names():
        first = preset_path(name).read_text(encoding="utf-8").partition("\n")[0]
        lines += [f"{name}: {first.lstrip('# ')}", f"    {_parameters(load_config(name))}"]
    return "\n".join(lines)


def _list_keys() -> str:
    from cupytron.config import RunConfig
    from cupytron.config_io import toml_value
    from cupytron.config_reader import keys_of

    lines = []
    for key, field in keys_of(RunConfig).items():
        default = "unset" if field.default is None else toml_value(field.default)
        lines.append(f"{key} = {default:12s}".ljust(36) + str(field.description))
    return "\n".join(lines)
