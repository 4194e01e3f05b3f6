"""What the benchmarks train on: a stream of tasks made of random frames, and an OpenVLA-OFT of a given shape.

Frames are random because their content costs nothing more or less than that of real ones; everything else (datasets,
samplers, collator, model, memory) is what a real stage uses. All instructions have equally many tokens, so that
batches have one shape whatever tasks they are drawn from.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ..data.chunks import ChunkDataset
from ..data.collator import VLACollator
from ..data.images import ImagePipeline
from ..data.normalisation import Normaliser, compute_statistics
from ..memory import ReplayMemory
from ..models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, build_prompt, build_tiny_openvla
from ..models.openvla.tiny import build_tiny_tokenizer

DECODINGS = ("autoregressive", "parallel")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "1b": {
        "image_size": 224, "patch_size": 14, "vision_width": 1024, "vision_depth": 24, "hidden_size": 2048,
        "layers": 16, "heads": 16, "fused": True,
    },
}  # fmt: skip
"""tiny: `build_tiny_openvla` as it is, 2.4 M parameters. 1b: OpenVLA's 256 patches of a fused backbone, 1.5 G."""

_WORDS = (
    ("take", "push", "lift", "turn", "pull"),
    ("red", "blue", "grey", "pink", "gold"),
    ("cup", "bowl", "plate", "mug", "box"),
    ("left", "right", "down", "up", "away"),
)


@dataclass
class Workload:
    """A model, and demonstrations of tasks for it.

    Args:
        past_tasks: how many tasks can be put into a memory.
        shape: of the model, a key of `SHAPES`.
        decoding: autoregressive (plain OpenVLA) or parallel (OpenVLA-OFT with its L1 head).
        frames_per_task: in one episode.
        seed: of weights and frames.
    """

    past_tasks: int
    shape: str = "tiny"
    decoding: str = "autoregressive"
    frames_per_task: int = 16
    seed: int = 0

    @cached_property
    def instructions(self) -> list[str]:
        """Of all tasks, the last being the one that is learned; equally many tokens each."""
        sentences = _sentences()
        tokenizer = build_tiny_tokenizer(sentences)
        lengths = np.array([len(tokenizer(build_prompt(each))["input_ids"]) for each in sentences])
        usual = np.bincount(lengths).argmax()
        alike = [sentence for sentence, length in zip(sentences, lengths, strict=True) if length == usual]
        if len(alike) <= self.past_tasks:
            raise ValueError(f"only {len(alike) - 1} past tasks have equally long instructions, not {self.past_tasks}")
        random = np.random.default_rng(self.seed)
        return [alike[place] for place in random.permutation(len(alike))[: self.past_tasks + 1]]

    def build(self) -> tuple[Any, Any]:
        """A new model with the same weights every time, and its processor."""
        model, processor = build_tiny_openvla(instructions=_sentences(), seed=self.seed, **SHAPES[self.shape])
        if self.decoding == "autoregressive":
            plain = {"decoding": "autoregressive", "action_head": "discrete", "proprio_dim": 0, "empty_token_id": 7}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model = OpenVLAForActionPrediction(OpenVLAConfig(**{**model.config.to_dict(), **plain}))
        model.config.norm_stats = self.statistics
        return model.train(), processor

    @cached_property
    def frames(self) -> datasets.Dataset:
        """One episode of every task, in the columns of recorded demonstrations."""
        random = np.random.default_rng(self.seed)
        side = SHAPES[self.shape].get("image_size", 128)
        pictures = [
            {"bytes": _png(random.integers(0, 256, (side, side, 3), dtype=np.uint8)), "path": None} for _ in range(16)
        ]
        count = len(self.instructions) * self.frames_per_task
        task = np.repeat(np.arange(len(self.instructions)), self.frames_per_task)
        columns = {
            "image": [pictures[row % len(pictures)] for row in range(count)],
            "state": random.normal(0, 1, (count, 8)).astype(np.float32),
            "action": random.uniform(-1, 1, (count, 7)).astype(np.float32),
            "instruction": [self.instructions[number] for number in task],
            "task": [f"task_{number:03d}" for number in task],
            "episode_index": np.zeros(count, dtype=np.int64),
            "frame_index": np.tile(np.arange(self.frames_per_task), len(self.instructions)),
        }
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "state": datasets.List(datasets.Value("float32"), 8),
                "action": datasets.List(datasets.Value("float32"), 7),
                **{name: datasets.Value("string") for name in ("instruction", "task")},
                **{name: datasets.Value("int64") for name in ("episode_index", "frame_index")},
            }
        )
        return datasets.Dataset.from_dict(columns, features=features)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Of all frames, under the key "bench"."""
        with_numbers = self.frames.select_columns(["state", "action"]).with_format("numpy")[:]
        return {"bench": compute_statistics(with_numbers["action"], with_numbers["state"], len(self.instructions))}

    def dataset(self, processor: Any) -> ChunkDataset:
        """The task that is learned."""
        first = self.past_tasks * self.frames_per_task
        rows = self.frames.select(range(first, first + self.frames_per_task))
        return ChunkDataset(rows, ImagePipeline(processor.image_processor))

    def collator(self, model: Any, processor: Any) -> VLACollator:
        """With the frozen normalisation."""
        return VLACollator(processor, Normaliser(self.statistics), model.config)

    def memory(self, tasks: int) -> ReplayMemory:
        """The first `tasks` tasks, one trajectory each."""
        return ReplayMemory().add(self.frames.select(range(tasks * self.frames_per_task)))


def _sentences() -> list[str]:
    return [f"{verb} the {colour} {thing} {where}" for verb, colour, thing, where in itertools.product(*_WORDS)]


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
