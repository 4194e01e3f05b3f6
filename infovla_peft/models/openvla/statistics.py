"""Un-normalising actions as the original code does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .configuration_openvla import OpenVLAConfig


def unnormalize_actions(normalized: NDArray[Any], statistics: dict[str, Any], config: OpenVLAConfig) -> NDArray[Any]:
    """[-1, 1] -> [low, high] per dimension where the mask is True; other dimensions stay as they are.

    Args:
        normalized: (…, dim).
        statistics: "q01" and "q99" ("min" and "max" with `action_normalization="bounds"`), each (dim,), and
            optionally "mask" (dim,) bool.
        config: OpenVLA-OFT (parallel decoding) adds 1e-8 to the range, OpenVLA does not.
    """
    low_name, high_name = ("min", "max") if config.action_normalization == "bounds" else ("q01", "q99")
    low, high = np.array(statistics[low_name]), np.array(statistics[high_name])
    if normalized.shape[-1] != len(low):
        raise ValueError(
            f"The statistics are of {len(low)}-dimensional actions, the model predicts {normalized.shape[-1]}."
        )
    mask = np.array(statistics.get("mask", np.ones_like(low, dtype=bool)))
    span = high - low + (1e-8 if config.decoding == "parallel" else 0.0)
    actions: NDArray[Any] = np.where(mask, 0.5 * (normalized + 1) * span + low, normalized)
    return actions
