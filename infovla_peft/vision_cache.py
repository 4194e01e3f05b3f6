"""What a frozen vision tower makes of the replayed frames, computed once per stage and kept on the disk.

Worth it where no adapter sits in the tower, and nothing else changes what it sees. Off by default: on the tiny model
the tower is a tenth of a step, and a frame of a fused 7B model takes 1.1 MB in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import base_model
from .config import InfoVLAConfig
from .data.chunks import FrameTable
from .data.collator import VLACollator
from .data.sampling import Augmentation, Views
from .methods import METHODS
from .teacher import teacher_mode


def check_cacheable(model: nn.Module, config: InfoVLAConfig, *, replayed_anew: bool) -> None:
    """Raise a ValueError unless replayed frames have the same vision features throughout a stage.

    Args:
        replayed_anew: replay samples have no fixed views, so that `image_shift` moves them differently every time.
    """
    option, inner = "cache_vision_features", base_model(model)
    if inner.config.use_film:
        raise ValueError(f"{option}: with FiLM the vision tower reads the instruction; leave the option out")
    parameters = list(inner.vision_backbone.named_parameters())
    if any(parameter.requires_grad or ".lora_" in name for name, parameter in parameters):
        raise ValueError(
            f"{option} needs a vision tower without adapters; set lora_targets to layers of the language model "
            "(q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj), or leave the option out"
        )
    if METHODS[config.method].retrieves:
        raise ValueError(f"{option} knows nothing of the candidates of method={config.method!r}; leave it out")
    if replayed_anew and config.image_shift:
        raise ValueError(
            f"{option}: method={config.method!r} shifts replayed images anew every time; set image_shift to 0, or "
            "leave the option out"
        )


class VisionCache:
    """Features of all rows of some tables, numbered one after another, in all their views.

    Args:
        model: with a frozen vision tower, see `check_cacheable`.
        tables: the replayed frames.
        collator: makes the pixels that the model sees.
        views: of all rows; None = the frames themselves.
        folder: on a disk with room for them; nothing stays there.
        batch_size: of the forward passes.
        autocast: the context in which the student will run.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Sequence[FrameTable],
        collator: VLACollator,
        views: Views | None,
        folder: str | Path,
        *,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        inner = base_model(model)
        device = next(inner.parameters()).device
        found: list[Tensor] = []
        first = 0
        for table in tables:
            mine = Views.draw(table, 1, Augmentation(), 0)
            if views is not None:
                mine = views.rows(np.arange(first, first + len(table)))
            first += len(table)
            order = np.stack(np.meshgrid(np.arange(mine.count), np.arange(len(table)), indexing="ij"), -1)
            batches = np.array_split(order.reshape(-1, 2), -(-order[..., 0].size // batch_size))
            parts = []
            with teacher_mode(model), tqdm(total=order[..., 0].size, desc="vision", unit="frame", delay=2) as bar:
                for part in batches:
                    view, row = part.T
                    samples = replace(table.__getitems__(row), shifts=mine.shifts[view, row])
                    pixels = collator.observations(samples)["pixel_values"].to(device)
                    with autocast():
                        parts.append(inner.vision_backbone(pixels).cpu())
                    bar.update(len(row))
            whole = torch.cat(parts)
            found.append(whole.view(mine.count, len(table), *whole.shape[1:]))
        self._features = _on_disk(torch.cat(found, dim=1), Path(folder))  # (V, N, patches, width)

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        """(R, patches, width) of frames given as (view, row) (R, 2), on the CPU."""
        view, row = torch.from_numpy(rows).unbind(1)
        return self._features[view, row]


def _on_disk(features: Tensor, folder: Path) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vision.", dir=folder) as scratch:
        path = Path(scratch) / "features.safetensors"
        save_file({"features": features.contiguous()}, path)
        with safe_open(path, framework="pt") as file:
            mapped: Any = file.get_tensor("features")
    return mapped  # type: ignore[no-any-return]
