"""From demonstrations to batches, and the trainer that takes them, both as small as they get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..adapters import add_adapter
from ..config import InfoVLAConfig
from ..data.chunks import ChunkDataset
from ..data.collator import VLACollator
from ..data.normalisation import Normaliser
from ..models.openvla import build_tiny_openvla

ReadBatch = Callable[[NDArray[np.int64]], dict[str, Any]]


def tiny_model(input_size: int) -> tuple[Any, VLACollator]:
    """A tiny OpenVLA-OFT with random weights, and the collator that makes its batches."""
    model, processor = build_tiny_openvla(instructions=["do what task 0 wants"], image_size=input_size)
    normaliser = Normaliser(model.norm_stats, bounds=model.config.action_normalization)
    return model, VLACollator(processor, normaliser, model.config)


def reader(frames: Any, collator: VLACollator) -> tuple[ReadBatch, int]:
    """A function from rows to the batch of tensors that a model gets, and the number of rows; keeps no image."""
    samples = ChunkDataset(frames, collator.pipeline, cache_images=False)
    return lambda rows: collator(samples.__getitems__(rows)), len(samples)


def training_step(input_size: int) -> Callable[[dict[str, Any]], None]:
    """A step of plain LoRA fine-tuning, the trainer that takes its batches fastest."""
    model, _ = tiny_model(input_size)
    adapted = add_adapter(model, "speed", InfoVLAConfig(output_dir="none", report_to=["none"]))
    optimizer = torch.optim.AdamW([weights for weights in adapted.parameters() if weights.requires_grad])

    def step(batch: dict[str, Any]) -> None:
        adapted(**batch, return_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
