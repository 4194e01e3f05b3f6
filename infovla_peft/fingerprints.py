"""Digests by which one base is told from another, whatever precision it is held in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import whole
from .models.openvla.quantization import logical_shape

_SAMPLE = 64  # values per tensor that enter a fingerprint
_VOLATILE = {
    "transformers_version", "dtype", "torch_dtype", "use_cache", "norm_stats", "acting", "architectures", "auto_map",
    "quantization_config",
}  # fmt: skip


def digest_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of named tensors that enters a fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if (packed := logical_shape(tensor)) is not None:
            digest.update(f"{name} {packed}\n".encode())
            continue
        gathered = whole(tensor).detach()
        flat = gathered.flatten()
        values = flat[:: max(1, -(-len(flat) // _SAMPLE))].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(gathered.shape)}\n".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def digest_config(config: Any) -> str:
    """The digest of a model's configuration that enters a fingerprint."""
    return hashlib.sha256(json.dumps(_stable(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what loading, saving and training change."""
    return {
        key: _stable(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _VOLATILE and not str(key).startswith("_")
    }
