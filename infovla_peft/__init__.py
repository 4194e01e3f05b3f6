"""Teach a vision-language-action model new robot skills one after another, as LoRA adapters, without forgetting."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterInfo": "infovla_peft.adapter_files",
    "InfoVLAConfig": "infovla_peft.config",
    "InfoVLATrainer": "infovla_peft.trainer",
    "add_adapter": "infovla_peft.adapters",
    "load_adapter": "infovla_peft.adapters",
    "save_adapter": "infovla_peft.adapters",
    "load_openvla": "infovla_peft.models.openvla",
    "export_lerobot": "infovla_peft.data.lerobot_export",
    "load_demonstrations": "infovla_peft.data.demonstrations",
    "OpenVLAConfig": "infovla_peft.models.openvla",
    "OpenVLAForActionPrediction": "infovla_peft.models.openvla",
    "OpenVLAImageProcessor": "infovla_peft.models.openvla",
    "OpenVLAProcessor": "infovla_peft.models.openvla",
    "create_collection": "infovla_peft.hub",
    "list_adapters": "infovla_peft.hub",
    "load_policy": "infovla_peft.hub",
    "push_to_hub": "infovla_peft.hub",
}
__all__ = [
    "AdapterInfo",
    "InfoVLAConfig",
    "InfoVLATrainer",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAProcessor",
    "__version__",
    "add_adapter",
    "create_collection",
    "export_lerobot",
    "list_adapters",
    "load_adapter",
    "load_demonstrations",
    "load_openvla",
    "load_policy",
    "push_to_hub",
    "save_adapter",
]

if TYPE_CHECKING:
    from .adapter_files import AdapterInfo
    from .adapters import add_adapter, load_adapter, save_adapter
    from .config import InfoVLAConfig
    from .data.demonstrations import load_demonstrations
    from .data.lerobot_export import export_lerobot
    from .hub import create_collection, list_adapters, load_policy, push_to_hub
    from .models.openvla import (
        OpenVLAConfig,
        OpenVLAForActionPrediction,
        OpenVLAImageProcessor,
        OpenVLAProcessor,
        load_openvla,
    )
    from .trainer import InfoVLATrainer


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import infovla_peft` must stay free of torch, transformers and every side effect.
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
