"""Small real files of the formats that demonstrations come in, written with the formats' own libraries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SIDE, FRAMES = 32, 6
TASKS = ("turn_on_the_stove", "put_the_bowl_on_the_plate")


def picture(episode: int, frame: int, camera: int = 0) -> NDArray[np.uint8]:
    """Upright, smooth enough for a video: a corner and a brightness that tell episode, frame and camera."""
    image = np.full((SIDE, SIDE, 3), 40 + 30 * frame, dtype=np.uint8)
    image[: SIDE // 2, : SIDE // 2] = (200, 40 * (episode % 5), 120 * camera)
    return image


def numbers(episode: int, frames: int = FRAMES) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States (T, 8) and actions (T, 7) of an episode; the second action does nothing."""
    random = np.random.default_rng(episode)
    states = random.normal(size=(frames, 8)).astype(np.float32)
    actions = np.c_[random.uniform(-1, 1, (frames, 6)), np.where(np.arange(frames) < 3, -1, 1)].astype(np.float32)
    actions[1, :6] = 0
    return states, actions


def write_libero_hdf5(
    folder: Path, tasks: Sequence[str] = TASKS, episodes: int = 2, *, after: bool | None = None
) -> Path:
    """In LIBERO's format, pictures upside down. Episode e of task t is number 10 t + e.

    `after`: with the simulator's states, and observations after the action, as LIBERO's `create_dataset.py` writes
    them, or before it, as regenerated ones are; None: without states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, task in enumerate(tasks):
        with h5py.File(folder / f"{task}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/libero_goal/{task}.bddl"
            data.attrs["problem_info"] = json.dumps({"language_instruction": [task.replace("_", " ")]})
            for episode in range(episodes):
                number = 10 * place + episode
                states, actions = numbers(number)
                demo = data.create_group(f"demo_{episode}")
                demo["actions"] = actions.astype(np.float64)
                demo["obs/ee_pos"], demo["obs/ee_ori"] = states[:, :3], states[:, 3:6]
                demo["obs/ee_states"], demo["obs/gripper_states"] = states[:, :6], states[:, 6:]
                for camera, name in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                    upright = np.stack([picture(number, frame, camera) for frame in range(FRAMES)])
                    demo.create_dataset(f"obs/{name}", data=upright[:, ::-1, ::-1], compression="gzip")
                if after is not None:  # states: time, positions (the arm's seven joints first), velocities
                    simulated = np.cumsum(np.random.default_rng(number).normal(size=(FRAMES + 1, 79)), axis=0)
                    demo["states"] = simulated[:FRAMES]
                    demo["obs/joint_states"] = simulated[int(after) :][:FRAMES, 1:8] + 1e-4  # a replay's drift
    return folder


def write_lerobot(
    folder: Path,
    *,
    tasks: Sequence[str] = TASKS,
    episodes: int = 2,
    videos: bool = True,
    cameras: Sequence[str] = ("observation.images.image", "observation.images.image2"),
    version: str = "v3.0",
    fps: int = 10,
) -> Path:
    """A LeRobot data set v3, tasks alternating, as `HuggingFaceVLA/libero` (`videos=False`: pictures in Parquet)."""
    order = [(task, episode) for episode in range(episodes) for task in range(len(tasks))]
    rows: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    pictures: dict[str, list[NDArray[np.uint8]]] = {key: [] for key in cameras}
    for number, (task, episode) in enumerate(order):
        states, actions = numbers(10 * task + episode)
        start = len(rows)
        for frame in range(FRAMES):
            row: dict[str, Any] = {"observation.state": states[frame].tolist(), "action": actions[frame].tolist()}
            row |= {"timestamp": frame / fps, "frame_index": frame, "episode_index": number, "index": len(rows)}
            for camera, key in enumerate(cameras):
                image = picture(10 * task + episode, frame, camera)
                pictures[key].append(image)
                if not videos:
                    row[key] = {"bytes": png(image), "path": f"frame-{frame:06d}.png"}
            rows.append({**row, "task_index": task})
        entry: dict[str, Any] = {
            "episode_index": number, "tasks": [tasks[task].replace("_", " ")], "length": FRAMES,
            "data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": start, "dataset_to_index": len(rows),
        }  # fmt: skip
        for key in cameras if videos else ():
            place = {"chunk_index": 0, "file_index": 0, "from_timestamp": start / fps, "to_timestamp": len(rows) / fps}
            entry |= {f"videos/{key}/{name}": value for name, value in place.items()}
        entries.append(entry)
    vector = {"observation.state": 8, "action": 7}
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": [size], "names": None} for name, size in vector.items()
    }
    kind = "video" if videos else "image"
    features |= {key: {"dtype": kind, "shape": [SIDE, SIDE, 3], "names": None} for key in cameras}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": version, "robot_type": "panda", "fps": fps, "features": features, "chunks_size": 1000,
        "total_episodes": len(order), "total_frames": len(rows), "total_tasks": len(tasks),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "splits": {"train": f"0:{len(order)}"},
    }  # fmt: skip
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    texts = [task.replace("_", " ") for task in tasks]
    pandas.DataFrame({"task_index": range(len(tasks))}, index=texts).to_parquet(folder / "meta" / "tasks.parquet")
    pq.write_table(pa.Table.from_pylist(entries), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "chunk-000" / "file-000.parquet")
    for key in cameras if videos else ():
        write_frames(folder / "videos" / key / "chunk-000" / "file-000.mp4", pictures[key], fps)
    return folder


def write_frames(path: Path, pictures: Sequence[NDArray[np.uint8]], fps: int) -> None:
    """An MP4 with a key frame every other frame, as LeRobot's recorder makes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 2
        stream.options = {"crf": "1"}
        for number, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(image: NDArray[np.uint8]) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
