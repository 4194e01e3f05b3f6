"""A set of demonstrations of any size for measurements: our own recordings' format, made without a simulator."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..data.mapped import prepare_recorded
from ..data.recorded import (
    DemonstrationManifest,
    EpisodeRecord,
    RecordingSettings,
    TaskRecord,
    demonstration_features,
)
from ..files import atomic_file
from ..integrity import sha256

_PICTURES = 64


def write_demonstration_set(folder: Path, *, tasks: int, episodes: int, frames: int, image_size: int) -> None:
    """Write a set as `record_demonstrations` leaves it: random arms before smooth pictures with a little noise.

    A rendered picture of 112 pixels takes 15 kB as PNG, one of these as much. Sixty-four of them recur, each time with
    a number behind the end of the PNG, so that no two are the same bytes to the file format.

    Args:
        folder: to write into.
        tasks, episodes, frames: how many; episodes of each task, frames of each episode.
        image_size: edge of the pictures in pixels.
    """
    random = np.random.default_rng(0)
    pictures = [_picture(random, image_size) for _ in range(_PICTURES)]
    settings = RecordingSettings("none", "none", image_size, ("agentview",), "none", noise=0.0, seed=0)
    manifest = DemonstrationManifest(settings)
    schema = demonstration_features(settings.cameras).arrow_schema
    written = 0
    for number in range(tasks):
        name, instruction = f"task_{number:03d}", f"do what task {number} wants"
        record = manifest.tasks[name] = TaskRecord("synthetic", number, name, instruction)
        for episode in range(episodes):
            images = []
            for _ in range(frames):
                images.append({"bytes": pictures[written % _PICTURES] + written.to_bytes(8, "big"), "path": None})
                written += 1
            arm = random.uniform(-1, 1, (frames, 22)).astype(np.float32)
            columns: dict[str, Any] = {
                "image": images,
                "state": list(arm[:, :8]),
                "action": list(arm[:, 8:15]),
                "executed_action": list(arm[:, 15:]),
                "instruction": [instruction] * frames,
                "task": [name] * frames,
                "suite": ["synthetic"] * frames,
                "episode_index": [episode] * frames,
                "frame_index": list(range(frames)),
                "done": [frame == frames - 1 for frame in range(frames)],
                "success": [frame == frames - 1 for frame in range(frames)],
            }
            file = f"{name}/episode_{episode:06d}.parquet"
            with atomic_file(folder / file) as temporary:
                pq.write_table(pa.table(columns, schema=schema), temporary)
            record.episodes[episode] = EpisodeRecord(
                episode, file, frames, attempts=1, seed=written, sha256=sha256(folder / file)
            )
    manifest.save(folder)
    prepare_recorded(folder)


def _picture(random: np.random.Generator, size: int) -> bytes:
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
    noisy = np.clip(np.asarray(coarse, np.int16) + random.integers(0, 2, (size, size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()
