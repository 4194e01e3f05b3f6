"""Demonstrations on their way into a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["export_lerobot", "load_demonstrations"]

if TYPE_CHECKING:
    from .demonstrations import load_demonstrations
    from .lerobot_export import export_lerobot


def __getattr__(name: str) -> Any:  # on first use: what reads a file needs more than what normalises an action
    if name in __all__:
        import infovla_peft

        return getattr(infovla_peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
