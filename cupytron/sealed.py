"""Reads the steps of a run's checkpoints, and the settings that they seal. Imports no NumPy.

These settings say how a process is prepared (threads, BLAS kernel), and that has to come before NumPy is
imported.
"""

import re
from pathlib import Path
from typing import Any

from cupytron.config_io import read_toml
from cupytron.errors import ConfigError, CupytronError, DamagedCheckpoint
from cupytron.manifest import read_manifest
from cupytron.reading import choosing_again
from cupytron.sealed_schema import check_types

_STEP = re.compile(r"step-(\d{8,12})")


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_steps(run: Path) -> list[int]:
    """Steps with a checkpoint, whole or not, in order; none if there is no folder for them."""
    try:
        names = [path.name for path in (run / "checkpoints").iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def require_run(run: Path) -> None:
    """Refuse a folder that is not a run's.

    Raises:
        CupytronError: it has neither settings nor checkpoints.
    """
    if not _is_run(run):
        raise CupytronError(f"{run}: not a run's folder ({_instead(run)}")


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() or bool(list_steps(folder))


def _instead(path: Path) -> str:
    """For a path that is not a run's folder: what it is, and which path to give instead."""
    inside = next((folder for folder in list(path.parents)[:2] if _is_run(folder)), None)
    if inside is not None and path.exists():
        return f"it lies in one); give {inside}"
    if (path / "train.json").is_file():
        return "it is a data set); a run is made from it with `cupytron train --data DIR --out RUN`"
    if path.is_dir():
        why = "it has no config.toml"
    elif path.exists():
        why = "it is a file"
    elif near := _near(path):
        return f"there is no such folder); did you mean {' or '.join(map(str, near))}?"
    else:
        why = "there is no such folder"
    return f"{why}); give the folder that `cupytron train --out` made"


def _near(path: Path) -> list[Path]:
    """Runs beside a path whose names are similar to its own."""
    import difflib

    try:
        names = [folder.name for folder in path.parent.iterdir() if _is_run(folder)]
    except OSError:
        return []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names)]


def sealed_settings(run: Path) -> dict[str, Any] | None:
    """The settings in the newest whole manifest of a run; None if it has none.

    config.toml has no seal, so only data.path is taken from it. The data may have moved since the
    checkpoint, and are compared with the sealed hashes in any case. If a run that trains at the same time
    removes the checkpoint before it is read, its checkpoints are listed again.

    Raises:
        UnreadableCheckpoint: the newest manifest cannot be read now.
        GoneCheckpoint: many in turn were removed before they could be read.
    """
    return choosing_again(lambda: _newest_settings(run))


def _newest_settings(run: Path) -> dict[str, Any] | None:
    for step in reversed(list_steps(run)):
        try:
            folder = step_folder(run, step)
            body = read_manifest(folder).body
            check_types(folder, body)
            settings = body.get("settings")
        except DamagedCheckpoint:
            continue  # the run says so later, when it passes over this checkpoint
        if isinstance(settings, dict):
            return {**settings, "data": {**settings.get("data", {}), **_data_path(run)}}
    return None


def _data_path(run: Path) -> dict[str, str]:
    """{"path": data.path of config.toml}; {} if that cannot be read."""
    try:
        path = read_toml(run / "config.toml").get("data", {}).get("path")
    except (ConfigError, AttributeError):  # AttributeError: `data` is no table
        return {}
    return {"path": path} if isinstance(path, str) else {}
