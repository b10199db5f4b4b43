"""Going on from a checkpoint: whether it fits the run, and what has changed in the run's folder."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cupytron import process
from cupytron.checkpoint import Checkpoint
from cupytron.comm import Communicator
from cupytron.config import ModelConfig, RunConfig
from cupytron.config_io import read_toml, show_value
from cupytron.course import portions_changed, schedule_changed
from cupytron.data import Dataset
from cupytron.durable import NotAFile, open_file
from cupytron.errors import ConfigError
from cupytron.history import damage
from cupytron.metrics import MetricsWriter
from cupytron.run_checkpoints import eval_tokens
from cupytron.run_folder import RunFolder
from cupytron.sealed_schema import OF_MODEL, OF_RUN, check_keys
from cupytron.together import together

_MESH = ("tp", "pp", "dp", "zero")


def check_model(found: Checkpoint, model: ModelConfig, dataset: Dataset) -> None:
    """Refuse to go on with weights that would mean something else here, whatever their shapes.

    Raises:
        ConfigError: saying what differs.
    """
    check_tokenizer(found, dataset)
    lines = "; ".join(
        f"model.{key}: {there} there, {here} asked for"
        for key, (there, here) in model_differences(found, model).items()
    )
    if lines:
        raise ConfigError(
            f"{found.folder} does not fit: {lines}; leave that out to go on with this run, or "
            "choose another --out"
        )


def model_differences(found: Checkpoint, model: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The settings of the model that change what weights mean: the checkpoint's value and this one's."""
    check_keys(found.folder, found.about, OF_MODEL)
    before, now = found.about["model"], model.model_dump()
    # dropout and recompute change no tensor
    free = {"dropout", "recompute", "init_std", "family"}
    pairs = {key: (before.get(key), value) for key, value in now.items() if key not in free}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def check_tokenizer(found: Checkpoint, dataset: Dataset) -> None:
    """Refuse data whose token ids are not those that the weights know.

    Raises:
        ConfigError: the data were made with another tokenizer, or with more ids than the model has.
    """
    check_keys(found.folder, found.about, OF_MODEL)
    run = found.folder.parents[1]
    known, ids = found.about["data"].get("tokenizer_hash"), found.about["model"].get("vocab_size")
    if known == dataset.tokenizer_hash and (ids is None or dataset.vocab_size <= ids):
        return
    sizes = f"model.vocab_size is {ids} there, and the data set has {dataset.vocab_size} token ids"
    if known is None:
        way_out = f"prepare token ids with --vocab-size {ids}, since that run has no tokenizer"
    else:
        way_out = f"prepare the data with --tokenizer {run / 'tokenizer.json'}"
    raise ConfigError(
        f"{found.folder} was trained with another tokenizer than that of {dataset.path} ({sizes}); "
        f"{way_out}"
    )


def check_tokens(
    folder: RunFolder, source: RunFolder | None, dataset: Dataset, world: Communicator
) -> None:
    """As check_tokenizer, before a model is made for the data: its size would be wrong, too. Collective.

    Args:
        folder: of the run, which may have checkpoints.
        source: of the run whose weights a new run starts from; None: of none.

    Raises:
        ConfigError: the same on every rank.
    """

    def check() -> None:
        begun = bool(folder.steps()) or folder.has_saved()
        run = folder if begun or source is None else source.require()
        seen = (run.see(step) for step in reversed(run.steps()))
        found = next((each for each in seen if isinstance(each, Checkpoint)), None)
        if found is not None:
            check_tokenizer(found, dataset)

    together(world, check)


def check_fits(
    found: Checkpoint,
    config: RunConfig,
    model: ModelConfig,
    dataset: Dataset,
    environment: dict[str, Any],
) -> list[str]:
    """Refuse what cannot be resumed; returns warnings of what changes the result.

    Raises:
        ConfigError: saying what differs.
    """
    check_model(found, model, dataset)
    check_keys(found.folder, found.about, OF_RUN)
    before, now = found.about["settings"].get("optim", {}).get("name"), config.optim.name
    if before != now:
        raise ConfigError(
            f"{found.folder} does not fit: optim.name: {before} there, {now} asked for; "
            "choose another --out"
        )
    lines = list(_data_changed(found, dataset))
    if eval_tokens(found) != config.train.eval_tokens:
        lines.append(
            "train.eval_tokens has changed: validation losses before and from now on cannot be "
            "compared, so the best loss so far counts no more"
        )
    for line in _settings_changed(found.about["settings"], config.model_dump(mode="json")):
        lines.append(f"setting changed: {line}")
    lines += _course_changed(found, config)
    for line in process.changes(found.about["environment"], environment):
        lines.append(f"environment changed, so the last bits may differ: {line}")
    return lines


def mesh_changed(found: Checkpoint, config: RunConfig, mesh: dict[str, int]) -> list[str]:
    """A line for the user if the mesh has changed since the checkpoint, and with it the order of sums.

    Args:
        found: the checkpoint.
        config: the settings in use.
        mesh: sizes of the axes, and `zero`, as checkpoints keep them.
    """
    before = found.about["mesh"]
    # with train.deterministic the tensor axis alone changes the order of sums
    counts = ("tp",) if config.train.deterministic else _MESH
    if all(before.get(key) == mesh[key] for key in counts):
        return []
    then, now = (" ".join(f"{k}={m.get(k)}" for k in _MESH) for m in (before, mesh))
    return [f"the mesh has changed, so the last bits may differ: {then} before, {now} now"]


def nothing_to_train(found: Checkpoint, config: RunConfig, dataset: Dataset) -> str | None:
    """A line if no step is left, and so nothing in the run's folder may change; else None.

    If the run is at its last step, and has its own data and the settings that it was trained with, an
    evaluation may be left.
    """
    end, (train, val) = config.train.max_steps, _other_data(found, dataset)
    wished = config.model_dump(mode="json")
    changed = any(_settings_changed(found.about["settings"], wished, ("max_steps", "eval_tokens")))
    if found.step < end or (found.step == end and not (train or val or changed)):
        return None
    data = f" on {dataset.path}, which is not the data set of this run" if train or val else ""
    return (
        f"this run has done {found.step:,} steps, and train.max_steps is {end:,}, so nothing is trained"
        f"{data}, and the settings of this run stay as they are; to go on with it give --max-steps "
        "with more steps; for a new run choose another --out"
    )


def settings_to_keep(found: Checkpoint, config: RunConfig, dataset: Dataset) -> RunConfig:
    """The checkpoint's settings, and where its data are now; `config` if they are of another version."""
    try:
        sealed = RunConfig.model_validate(found.about["settings"])
    except ValidationError:
        return config
    return (
        sealed
        if any(_other_data(found, dataset))
        else sealed.model_copy(update={"data": config.data})
    )


def _other_data(found: Checkpoint, dataset: Dataset) -> tuple[bool, bool]:
    """Whether the training and the validation split are others than the checkpoint's."""
    before = found.about["data"]
    return (
        before.get("train_sha256") != dataset.train.sha256,
        before.get("val_sha256") != dataset.val.sha256,
    )


def _data_changed(found: Checkpoint, dataset: Dataset) -> Iterator[str]:
    train, val = _other_data(found, dataset)
    if train:
        yield "the data set has changed: samples will not be those of an unbroken run"
    if val:
        yield (
            "the validation split has changed: validation losses before and from now on cannot be "
            "compared, so the best loss so far counts no more"
        )


def _course_changed(found: Checkpoint, config: RunConfig) -> Iterator[str]:
    """What changed settings do to the learning rate and the order of samples."""
    try:
        before = RunConfig.model_validate(found.about["settings"])
    except ValidationError:
        return  # of another version: each setting that differs is named in any case
    yield from schedule_changed(before, config, found.step)
    yield from portions_changed(before, config)


def _settings_changed(
    before: dict[str, Any], now: dict[str, Any], others: tuple[str, ...] = ()
) -> Iterator[str]:
    """A line for each setting that differs and changes numbers.

    Args:
        others: keys that may differ, too.
    """
    quiet = {"data", "checkpoint", "parallel"}  # these change no number
    for section in now:
        if section in quiet:
            continue
        for key, value in now[section].items():
            old = before.get(section, {}).get(key)
            if old != value and key not in (
                "log_interval",
                "eval_interval",
                "check_replicas",
                *others,
            ):
                yield f"{section}.{key}: {old} before, {value} now"


def file_differs(path: Path, found: Checkpoint, config: RunConfig) -> Iterator[str]:
    """Lines about settings in RUN/config.toml that differ from the checkpoint's, which are used.

    Nothing proves that file: it may be damaged, or somebody may have edited it to change the run.

    Args:
        path: of config.toml.
        found: the checkpoint.
        config: the settings in use.
    """
    try:
        told = read_toml(path)
    except ConfigError as error:
        yield f"{error}; the settings that {found.folder} seals are used, and it is written again"
        return
    now = config.model_dump(mode="json")
    for section, settings in found.about["settings"].items():
        table = told.get(section)
        for key, sealed in settings.items():
            says = table.get(key) if isinstance(table, dict) else None
            used = now.get(section, {}).get(key)
            if says == sealed or used != sealed or (section, key) == ("data", "path"):
                continue  # the data may have moved; their hashes are compared elsewhere
            yield (
                f"{path} says {section}.{key}={show_value(says)}, the checkpoint {show_value(sealed)}, "
                f"which is used; to change it give --set {section}.{key}={show_value(says)}"
            )


def prepare_folder(
    folder: RunFolder,
    found: Checkpoint | None,
    config: RunConfig,
    environment: dict[str, Any],
    dataset: Dataset,
    warn: Callable[[str], None],
) -> tuple[MetricsWriter, float]:
    """Bring a run's folder in line with the state that it goes on from. For rank 0 alone.

    Args:
        folder: of the run.
        found: the checkpoint that was resumed; None: the run begins.
        config: the settings in use.
        environment: the content of environment.json.
        dataset: the run's data.
        warn: hears what is lost or replaced, a line each.

    Returns: metrics.jsonl for writing, and the best validation loss so far (infinity: none).
    """
    step, best, wrong = -1, None, None
    if found:
        step = found.step
        folder.note_saved(step)
        folder.set_aside_after(step)
        _, other = _other_data(found, dataset)
        if not other and eval_tokens(found) == config.train.eval_tokens:
            best = folder.best(warn)
        for line in file_differs(folder.config, found, config):
            warn(line)
        if wrong := damage(folder, found):
            warn(wrong)
    seal = found.about.get("metrics") if found and not wrong else None
    # before config.toml: records are compared with the interval that they were written under
    folder.keep_metrics(step, seal["bytes"] if seal else None)
    folder.write(folder.config, config.to_toml())
    folder.write(folder.environment, json.dumps(environment, indent=1) + "\n")
    if dataset.tokenizer_hash:
        content = (dataset.path / "tokenizer.json").read_text(encoding="utf-8")
        if found and not _holds(folder.tokenizer, content):
            warn(f"{folder.tokenizer} is not the run's tokenizer; it is written again")
        folder.write(folder.tokenizer, content)
    if found:
        # the save that was resumed may have been cut short before it removed older ones
        folder.prune(config.checkpoint.keep)
    return MetricsWriter(folder.metrics), best.about["val_loss"] if best else math.inf


def _holds(path: Path, content: str) -> bool:
    wanted = content.encode()
    try:
        with open_file(path) as file:
            return file.read(len(wanted) + 1) == wanted
    except (FileNotFoundError, NotAFile):
        return False
