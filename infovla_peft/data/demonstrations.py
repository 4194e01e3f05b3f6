"""Recorded demonstrations on disk: the manifest, one Parquet file per episode, and both as a `datasets.Dataset`.

    <folder>/manifest.json                               what was recorded, how, and how often the script succeeded
    <folder>/<task name>/episode_000012.parquet          one row per frame

A row is what was observed before an action, and the action. Its columns:

    image, wrist_image   PNG, upright RGB; the cameras that were recorded
    state                float32 (8,): hand position (m), its rotation as axis times angle (rad), fingers (m)
    action               float32 (7,): the label, in LIBERO's convention (six deltas in [-1, 1], gripper -1 open)
    executed_action      float32 (7,): the label with noise, which is what the simulator did
    instruction, task, suite, episode_index, frame_index
    done                 the last row of its episode
    success              whether the goal has held after this action or before

The footer of an episode's file holds its seed, the start state and the poses of the fixtures (`read_start`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import write_json
from ..simulation.environment import EnvironmentState

if TYPE_CHECKING:
    import datasets

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
CAMERA_COLUMNS: Mapping[str, str] = {"agentview": "image", "robot0_eye_in_hand": "wrist_image"}
STATE_DIM, ACTION_DIM = 8, 7
FOOTER_KEY = b"infovla_peft"
RECORD_AGAIN = "delete it and record again, which makes only what is missing"


class DemonstrationError(ValueError):
    """A set of demonstrations cannot be used; the message names the file and the cure."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One recorded episode.

    Attributes:
        index: its number within the task, from 0.
        file: relative to the folder of the set.
        frames: rows of the file.
        attempts: layouts tried until the script succeeded, this one included.
        seed: of `LiberoEnvironment.reset` for the layout that was recorded.
    """

    index: int
    file: str
    frames: int
    attempts: int
    seed: int


@dataclass
class TaskRecord:
    """What was recorded of one task.

    Attributes:
        suite, index, name, instruction: the task.
        episodes: by number.
    """

    suite: str
    index: int
    name: str
    instruction: str
    episodes: dict[int, EpisodeRecord] = field(default_factory=dict)

    @property
    def attempts(self) -> int:
        """Layouts that the script tried. Each is new, so that every attempt is a first try."""
        return sum(episode.attempts for episode in self.episodes.values())

    @property
    def first_try_success(self) -> float:
        """Fraction of the layouts on which the script succeeded, 0 to 1; NaN without an episode."""
        return len(self.episodes) / self.attempts if self.episodes else float("nan")


@dataclass(frozen=True)
class RecordingSettings:
    """What all episodes of a set have in common.

    Attributes:
        assets: name of the asset set.
        mujoco: MuJoCo's version.
        image_size: edge of the pictures in pixels.
        cameras: LIBERO's names of the recorded cameras.
        renderer: "fast" or "exact".
        noise: standard deviation of the noise on executed actions.
        seed: from which every episode's seed follows.
    """

    assets: str
    mujoco: str
    image_size: int
    cameras: tuple[str, ...]
    renderer: str
    noise: float
    seed: int


@dataclass
class DemonstrationManifest:
    """`manifest.json`: how a set was recorded, and its episodes.

    Attributes:
        settings: common to all episodes.
        tasks: task name -> what was recorded of it.
    """

    settings: RecordingSettings
    tasks: dict[str, TaskRecord] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        tasks = {
            name: {
                "suite": task.suite,
                "index": task.index,
                "name": task.name,
                "instruction": task.instruction,
                "attempts": task.attempts,
                "first_try_successes": len(task.episodes),
                "episodes": [asdict(task.episodes[index]) for index in sorted(task.episodes)],
            }
            for name, task in self.tasks.items()
        }
        content = {"format_version": FORMAT_VERSION, "settings": asdict(self.settings), "tasks": tasks}
        write_json(folder / MANIFEST, content)

    @staticmethod
    def load(folder: str | Path) -> DemonstrationManifest:
        """Read the manifest of a set.

        Raises:
            FileNotFoundError: the folder holds no demonstrations.
            DemonstrationError: the manifest is broken or of another version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no demonstrations ({MANIFEST} is missing): run `infovla demos`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DemonstrationError(
                    f"{path} has format {version}, this version reads {FORMAT_VERSION}: record the set again, or use "
                    "the version of infovla_peft that wrote it"
                )
            settings = RecordingSettings(**{**content["settings"], "cameras": tuple(content["settings"]["cameras"])})
            tasks = {
                name: TaskRecord(
                    task["suite"],
                    task["index"],
                    task["name"],
                    task["instruction"],
                    {episode["index"]: EpisodeRecord(**episode) for episode in task["episodes"]},
                )
                for name, task in content["tasks"].items()
            }
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DemonstrationError(
                f"{path} is damaged ({type(error).__name__}: {error}): delete the folder and record the set again"
            ) from error
        return DemonstrationManifest(settings, tasks)


def demonstration_features(cameras: Sequence[str]) -> datasets.Features:
    """Column types of an episode's file.

    Raises:
        ValueError: a camera has no column.
    """
    import datasets

    unknown = [camera for camera in cameras if camera not in CAMERA_COLUMNS]
    if unknown or not cameras:
        raise ValueError(f"cameras to record must be some of {list(CAMERA_COLUMNS)}, not {list(cameras)}")
    return datasets.Features(
        {CAMERA_COLUMNS[camera]: datasets.Image() for camera in cameras}
        | {"state": datasets.List(datasets.Value("float32"), STATE_DIM)}
        | {name: datasets.List(datasets.Value("float32"), ACTION_DIM) for name in ("action", "executed_action")}
        | {name: datasets.Value("string") for name in ("instruction", "task", "suite")}
        | {name: datasets.Value("int64") for name in ("episode_index", "frame_index")}
        | {name: datasets.Value("bool") for name in ("done", "success")}
    )


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DemonstrationError(f"{path} is missing: record again, which makes only what is missing")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DemonstrationError(f"{path} is truncated or no Parquet file ({error}): {RECORD_AGAIN}") from error


def read_start(path: str | Path) -> EnvironmentState:
    """Where a recorded episode started, fixtures included; `LiberoEnvironment.reset` accepts it.

    Raises:
        DemonstrationError: the file is missing, truncated, or holds no start state.
    """
    with _open(Path(path)) as file:
        footer = (file.schema_arrow.metadata or {}).get(FOOTER_KEY)
    if footer is None:
        raise DemonstrationError(f"{path} holds no start state: it was not written by `infovla demos`")
    start = json.loads(footer)["start"]
    return EnvironmentState(np.array(start["simulation"], np.float64), np.array(start["fixtures"], np.float64))


def check_episode(path: str | Path, frames: int | None = None) -> None:
    """Check one episode's file: complete, the right columns and dimensions, finite numbers.

    Args:
        path: the file.
        frames: rows that it should have.

    Raises:
        DemonstrationError: the first thing that is wrong, and the cure.
    """
    path = Path(path)
    with _open(path) as file:
        schema = file.schema_arrow
        lengths = {"state": STATE_DIM, "action": ACTION_DIM, "executed_action": ACTION_DIM}
        missing = [name for name in ("instruction", "task", *lengths) if name not in schema.names]
        if missing or not set(schema.names) & set(CAMERA_COLUMNS.values()):
            raise DemonstrationError(
                f"{path} lacks the columns {missing or list(CAMERA_COLUMNS.values())}: it is no recorded demonstration"
            )
        try:
            table = file.read(columns=list(lengths))
        except (pa.ArrowInvalid, OSError) as error:
            raise DemonstrationError(f"{path} is damaged ({error}): {RECORD_AGAIN}") from error
    if not len(table) or (frames is not None and len(table) != frames):
        raise DemonstrationError(f"{path} holds {len(table)} frames instead of {frames or 'some'}: {RECORD_AGAIN}")
    for name, length in lengths.items():
        found = pc.unique(pc.list_value_length(table[name])).to_pylist()
        if found != [length]:
            raise DemonstrationError(
                f"{path}: {name} has {' or '.join(map(str, found))} dimensions, not {length}; policies here act by "
                "LIBERO's seven numbers (six OSC_POSE deltas and the gripper), so use another set"
            )
        values = pc.list_flatten(table[name]).to_numpy()
        if not np.isfinite(values.astype(np.float64)).all():
            raise DemonstrationError(f"{path}: {name} holds NaN or infinite values: {RECORD_AGAIN}")


def load_demonstrations(
    folder: str | Path, tasks: Sequence[str] | None = None, episodes: int | None = None
) -> datasets.Dataset:
    """Frames of recorded demonstrations, task after task, episode after episode; memory-mapped.

    Args:
        folder: written by `record_demonstrations`. The memory-mapped copy is kept in its subfolder `.cache`.
        tasks: names of the tasks, in the order in which they are wanted; all if None.
        episodes: how many of each task, the first ones; all if None.

    Returns:
        Columns as in the docstring of this module.

    Raises:
        FileNotFoundError: the folder holds no demonstrations.
        DemonstrationError: a task or episode is missing, or a file is not what it should be.
    """
    import datasets

    folder = Path(folder)
    manifest = DemonstrationManifest.load(folder)
    files: list[Path] = []
    for name in manifest.tasks if tasks is None else tasks:
        if name not in manifest.tasks:
            raise DemonstrationError(f"{folder} holds no demonstrations of {name!r}, only of {list(manifest.tasks)}")
        recorded = manifest.tasks[name].episodes
        wanted = sorted(recorded) if episodes is None else range(episodes)
        if absent := [index for index in wanted if index not in recorded]:
            raise DemonstrationError(
                f"{folder} holds {len(recorded)} demonstrations of {name!r}, not {episodes} (number {absent[0]} is "
                "missing): record again, which makes only what is missing"
            )
        for index in wanted:
            files.append(folder / recorded[index].file)
            check_episode(files[-1], recorded[index].frames)
    if not files:
        raise DemonstrationError(f"{folder} holds no recorded episode: run `infovla demos`")
    try:
        frames = datasets.Dataset.from_parquet(
            [str(file) for file in files],
            features=demonstration_features(manifest.settings.cameras),
            cache_dir=str(folder / ".cache"),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise DemonstrationError(f"{folder} holds a damaged file ({error.__cause__}): {RECORD_AGAIN}") from error
    assert isinstance(frames, datasets.Dataset)
    return frames
