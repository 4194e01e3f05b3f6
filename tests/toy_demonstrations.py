"""Small demonstrations with the columns of recorded ones, for tests that need no simulator."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
from PIL import Image

TASKS = {
    "open_the_drawer": "open the drawer",
    "turn_on_the_stove": "turn on the stove",
    "put_the_bowl_on_the_plate": "put the bowl on the plate",
}


def toy_demonstrations(
    tasks: Sequence[str] = tuple(TASKS),
    *,
    episodes: int = 2,
    frames: int = 12,
    size: int = 32,
    cameras: Sequence[str] = ("image",),
    seed: int = 0,
) -> datasets.Dataset:
    """Random pictures, states and actions; an action depends on the state, so that something can be learned."""
    random = np.random.default_rng(seed)
    rows = []
    for task in tasks:
        direction = random.uniform(-0.8, 0.8, 6)
        for episode in range(episodes):
            for frame in range(frames):
                state = random.normal(0, 1, 8)
                pictures = {
                    name: Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for name in cameras
                }
                action = np.r_[direction * np.tanh(state[:6]), 1.0 if frame > frames // 2 else -1.0]
                rows.append(
                    {
                        **pictures,
                        "state": state.astype(np.float32),
                        "action": action.astype(np.float32),
                        "instruction": TASKS[task],
                        "task": task,
                        "suite": "libero_goal",
                        "episode_index": episode,
                        "frame_index": frame,
                    }
                )
    features = datasets.Features(
        {name: datasets.Image() for name in cameras}
        | {"state": datasets.List(datasets.Value("float32"), 8), "action": datasets.List(datasets.Value("float32"), 7)}
        | {name: datasets.Value("string") for name in ("instruction", "task", "suite")}
        | {name: datasets.Value("int64") for name in ("episode_index", "frame_index")}
    )
    return datasets.Dataset.from_list(rows, features=features)
