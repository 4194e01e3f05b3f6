"""A tiny OpenVLA-OFT with toy demonstrations and everything between them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from toy_demonstrations import TASKS, toy_demonstrations

from infovla_peft.data.chunks import ChunkDataset
from infovla_peft.data.collator import VLACollator
from infovla_peft.data.images import ImagePipeline
from infovla_peft.data.normalisation import Normaliser, compute_statistics
from infovla_peft.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, build_tiny_openvla

CHUNK = 4


@dataclass
class TinyPolicy:
    model: Any
    processor: Any
    frames: datasets.Dataset
    dataset: ChunkDataset
    collator: VLACollator

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        return self.collator(self.dataset.__getitems__(rows))

    def task(self, name: str) -> datasets.Dataset:
        """The frames of one task."""
        rows = [row for row, task in enumerate(self.frames["task"]) if task == name]
        return self.frames.select(rows)


def tiny_policy(
    *, seed: int = 0, episodes: int = 2, frames: int = 12, autoregressive: bool = False, **options: Any
) -> TinyPolicy:
    demonstrations = toy_demonstrations(episodes=episodes, frames=frames)
    shape = {"image_size": 32, "patch_size": 16, "vision_width": 16, "vision_depth": 2, "hidden_size": 32, "layers": 2}
    model, processor = build_tiny_openvla(
        instructions=list(TASKS.values()), heads=2, chunk=CHUNK, seed=seed, **{**shape, **options}
    )
    if autoregressive:  # plain OpenVLA: action tokens one after another, no proprioception
        plain = {"decoding": "autoregressive", "action_head": "discrete", "proprio_dim": 0, "empty_token_id": 7}
        model = OpenVLAForActionPrediction(OpenVLAConfig(**{**model.config.to_dict(), **plain}))
    dataset = ChunkDataset(demonstrations, ImagePipeline(processor.image_processor), chunk=CHUNK)
    statistics = compute_statistics(dataset.env_actions, dataset.states, dataset.num_episodes)
    model.config.norm_stats = {"libero_goal": statistics}
    collator = VLACollator(processor, Normaliser(model.config.norm_stats), model.config)
    return TinyPolicy(model, processor, demonstrations, dataset, collator)
