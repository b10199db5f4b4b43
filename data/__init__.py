"""Text to token data sets, and token data sets to batches. NumPy only; `tokenizers` for BPE.

The public names are imported when they are first used, so that `cupytron.data.errors` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import Dataset, Split, open_dataset
    from .errors import DataError
    from .loader import Loader, evaluation_batches
    from .prepare import Prepared, prepare_dataset
    from .summary import describe_dataset
    from .tokenizers import StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "DataError",
    "Dataset",
    "Loader",
    "Prepared",
    "Split",
    "StreamDecoder",
    "Tokenizer",
    "describe_dataset",
    "evaluation_batches",
    "load_tokenizer",
    "open_dataset",
    "prepare_dataset",
]

_MODULES = {
    "DataError": "errors",
    "Dataset": "dataset",
    "Loader": "loader",
    "Prepared": "prepare",
    "Split": "dataset",
    "StreamDecoder": "tokenizers",
    "Tokenizer": "tokenizers",
    "describe_dataset": "summary",
    "evaluation_batches": "loader",
    "load_tokenizer": "tokenizers",
    "open_dataset": "dataset",
    "prepare_dataset": "prepare",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
