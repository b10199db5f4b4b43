"""Whether a checkpoint fits the run that is to go on from it."""

from collections.abc import Iterator
from typing import Any

from cupytron import process
from cupytron.checkpoint import Checkpoint
from cupytron.config import ModelConfig, RunConfig
from cupytron.data import Dataset
from cupytron.errors import ConfigError


def check_model(found: Checkpoint, model: ModelConfig, dataset: Dataset) -> None:
    """Refuse weights that would mean something else here, whatever their shapes.

    Raises:
        ConfigError: saying what differs.
    """
    before, now = found.about["model"], model.model_dump()
    # dropout and recompute change no tensor
    free = {"dropout", "recompute", "init_std", "family"}
    pairs = [(f"model.{k}", before.get(k), now[k]) for k in now if k not in free]
    lines = "; ".join(f"{k}: {a} there, {b} asked for" for k, a, b in pairs if a != b)
    if lines:
        raise ConfigError(f"{found.folder} does not fit: {lines}; choose another --out")
    if found.about["data"]["tokenizer_hash"] != dataset.tokenizer_hash:
        raise ConfigError(
            f"{found.folder} was trained with another tokenizer than that of "
            f"{dataset.path}; prepare the data with --tokenizer RUN/tokenizer.json"
        )


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
    before, now = found.about["settings"]["optim"]["name"], config.optim.name
    if before != now:
        raise ConfigError(
            f"{found.folder} does not fit: optim.name: {before} there, {now} asked for; "
            "choose another --out"
        )
    lines = []
    if found.about["data"]["train_sha256"] != dataset.train.sha256:
        lines.append("the data set has changed: samples will not be those of an unbroken run")
    for line in _settings_changed(found.about["settings"], config.model_dump(mode="json")):
        lines.append(f"setting changed: {line}")
    for line in process.changes(found.about["environment"], environment):
        lines.append(f"environment changed, so the last bits may differ: {line}")
    return lines


def _settings_changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    quiet = {"data", "checkpoint", "parallel"}  # these change no number
    for section in now:
        if section in quiet:
            continue
        for key, value in now[section].items():
            old = before.get(section, {}).get(key)
            if old != value and key not in ("log_interval", "eval_interval", "check_replicas"):
                yield f"{section}.{key}: {old} before, {value} now"
