"""The types of the values that a run seals in a manifest.

A seal proves that a manifest was not changed, not that it is right, since anybody can seal one. Manifests
are read before NumPy is imported, so this module imports no NumPy.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from cupytron.config_io import show_text
from cupytron.errors import DamagedCheckpoint
from cupytron.manifest import MANIFEST

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Table = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Strict):
    bytes: Count
    sha256: Digest


class _Data(_Strict):
    tokenizer_hash: Digest | None = None
    train_sha256: Digest | None = None
    val_sha256: Digest | None = None


class _Model(BaseModel):
    """The values that are compared before the model's settings are validated."""

    model_config = ConfigDict(strict=True, extra="allow")

    vocab_size: Count | None = None
    context_length: Count | None = None


class _Counters(BaseModel):
    """The trainer's counters; each is there if it is used."""

    model_config = ConfigDict(strict=True, extra="allow")

    updates: Count = 0
    good_steps: Count = 0
    loss_scale: Annotated[FiniteFloat, Field(gt=0)] = 1.0


class _Metrics(_Strict):
    bytes: Count
    sha256: Digest


class _Sealed(_Strict):
    """Each key that a run seals; earlier versions seal fewer, later ones may seal more."""

    step: Count
    files: dict[str, _File]
    position: Count = 0
    order: Count = 1
    tokens: Count = 0
    elapsed_seconds: FiniteFloat = 0.0
    val_loss: FiniteFloat | None = None
    optimizer: _Counters | None = None
    model: _Model = _Model()
    settings: dict[str, Table] = {}
    data: _Data = _Data()
    mesh: dict[str, int] = {}
    environment: Table = {}
    metrics: _Metrics | None = None


_SEALED = TypeAdapter(_Sealed)
OF_MODEL = ("model", "settings", "data")
OF_RUN = (*OF_MODEL, "position", "tokens", "elapsed_seconds", "val_loss", "mesh", "environment")


def check_types(folder: Path, body: Mapping[str, Any]) -> None:
    """Refuse values that no run seals.

    Raises:
        DamagedCheckpoint: naming the first key whose value is wrong.
    """
    try:
        _SEALED.validate_python(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = show_text(".".join(map(str, first["loc"])))
        raise DamagedCheckpoint(f"{folder}: {MANIFEST}: {key}: {first['msg']}") from None


def check_keys(folder: Path, body: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse a manifest that lacks a key.

    Args:
        keys: such as OF_MODEL, to use the model, or OF_RUN, to go on with the run.

    Raises:
        DamagedCheckpoint: naming the first one.
    """
    for key in keys:
        if key not in body:
            raise DamagedCheckpoint(f"{folder}: {MANIFEST} lacks {key!r}")
