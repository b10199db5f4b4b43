"""Settings that a new run takes over from the run whose weights it starts from. Imports no NumPy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cupytron.errors import CheckpointError, ConfigError
from cupytron.sealed import require_run, sealed_settings


def inherited_settings(run: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The run's model and the length of its sequences, as sections of settings.

    Without a table of positions, the context grows to a longer train.sequence_length among the overrides.

    Args:
        run: a run's folder.
        overrides: `section.key=value` strings that will be laid over these settings.

    Raises:
        ConfigError: sequences that are longer than the model's table of positions.
        CupytronError: no such run, or no checkpoint of it that can be used.
    """
    require_run(run)
    settings = sealed_settings(run)
    if settings is None:
        raise CheckpointError(f"{run}: has no whole checkpoint to start from; train it first")
    model, train = dict(settings.get("model", {})), settings.get("train", {})
    context = model.get("context_length")
    wanted = _given(overrides).get("train.sequence_length", "")
    if wanted.isdecimal() and isinstance(context, int) and int(wanted) > context:
        if model.get("position") == "learned":
            raise ConfigError(
                f"train.sequence_length={wanted}: the model of {run} has learned positions, a table of "
                f"{context} rows; set train.sequence_length to {context} or less, or start from a model "
                "with rotary positions"
            )
        model["context_length"] = int(wanted)
    length = {key: train[key] for key in ("sequence_length",) if key in train}
    return {"model": model, "train": length}


def _given(overrides: Iterable[str]) -> dict[str, str]:
    parts = (text.partition("=") for text in overrides)
    return {key.strip(): value.strip() for key, _, value in parts}
