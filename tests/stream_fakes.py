"""A stream without simulator: random demonstrations, and rollouts whose success is a matter of their seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

import infovla_peft.data.recording
import infovla_peft.simulation.workers
from infovla_peft.simulation import AssetSet, Observation, Task
from infovla_peft.simulation.workers import Episode, EpisodeResult

FRAMES = 12
STREAM: dict[str, Any] = {
    "stream": "B2-2N1",
    "demonstrations": 2,
    "base_steps": 3,
    "base_batch_size": 4,
    "stage_steps": 3,
    "eval_episodes": 2,
    "videos_per_task": 0,
    "tiny_image_size": 24,
    "tiny_patch_size": 12,
    "tiny_vision_width": 16,
    "tiny_vision_depth": 2,
    "tiny_hidden_size": 32,
    "tiny_layers": 1,
    "tiny_heads": 2,
}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "lora_r": 2,
    "logging_steps": 1,
    "save_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def fake_frames(tasks: Sequence[Task], episodes: int) -> datasets.Dataset:
    rows: dict[str, list[Any]] = {
        name: [] for name in ("image", "state", "action", "instruction", "task", "episode_index", "frame_index")
    }
    for task in tasks:
        random = np.random.default_rng(task.index)
        for episode in range(episodes):
            for frame in range(FRAMES):
                rows["image"].append(Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)))
                rows["state"].append(random.normal(size=8).astype(np.float32))
                rows["action"].append(np.append(random.uniform(-1, 1, 6), 1.0).astype(np.float32))
                rows["instruction"].append(task.instruction)
                rows["task"].append(task.name)
                rows["episode_index"].append(episode)
                rows["frame_index"].append(frame)
    return datasets.Dataset.from_dict(rows)


class FakePool:
    """No simulator: an episode succeeds if the hash of its seed says so; the policy is asked once."""

    calls: list[str] = []  # noqa: RUF012
    episodes = 0
    fail_at: str | None = None
    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, _workers: int, **options: Any) -> None:
        self._options = options

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *_exception: object) -> None: ...

    def run(self, episodes: Sequence[Episode], act: Any, **options: Any) -> list[EpisodeResult]:
        name = episodes[0].task.name
        if name == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(name)
        states = [episode.initial_state_index for episode in episodes]
        self.asked.append({**self._options, **options, "states": states})
        FakePool.episodes += len(episodes)
        image = np.zeros((24, 24, 3), dtype=np.uint8)
        seen = Observation({"agentview": image}, np.zeros(8, dtype=np.float32))
        chunks = act([seen] * len(episodes), [episode.task for episode in episodes])
        assert chunks[0].shape == (8, 7)
        return [EpisodeResult(episode, episode.seed % 2 == 0, 9, [image] * 2) for episode in episodes]


def install_fakes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Replace recording, demonstrations, assets and the pool of environments."""

    def record(tasks: Sequence[Task], folder: Path, *, episodes: int, **_options: Any) -> None:
        fake_frames(tasks, episodes).save_to_disk(str(folder))

    def load(folder: Path, tasks: Sequence[str], episodes: int | None = None) -> datasets.Dataset:
        frames = datasets.load_from_disk(str(folder))
        return frames.select([row for row, name in enumerate(frames["task"]) if name in tasks])

    monkeypatch.setattr(infovla_peft.data.recording, "record_demonstrations", record)
    monkeypatch.setattr("infovla_peft.stream.load_demonstrations", load)
    monkeypatch.setattr("infovla_peft.probe.load_demonstrations", load)
    monkeypatch.setattr(infovla_peft.simulation.workers, "EnvironmentPool", FakePool)
    monkeypatch.setattr("infovla_peft.simulation.find_assets", lambda *_: AssetSet("primitive", folder))
    monkeypatch.setattr(FakePool, "calls", [])
    monkeypatch.setattr(FakePool, "asked", [])
    monkeypatch.setattr(FakePool, "fail_at", None)
