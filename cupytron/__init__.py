"""cupytron: train small language models with hand-written layers, and the same numbers on any mesh."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupytron.trained import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # imported when used: `cupytron --help` must not import NumPy
    if name == "load":
        from cupytron.trained import load

        return load
    raise AttributeError(f"module 'cupytron' has no attribute {name!r}")
