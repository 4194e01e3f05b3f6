"""Our own recorded demonstrations on disk: the manifest, and one Parquet file per episode.

    <folder>/manifest.json                               what was recorded, how, and how often the script succeeded
    <folder>/<task name>/episode_000012.parquet          one row per frame

A row is what was observed before an action, and the action. Its columns are those of `rows.py`, and

    executed_action      float32 (7,): the label with noise, which is what the simulator did
    success              whether the goal has held after this action or before

The footer of an episode's file holds its seed, the start state and the poses of the fixtures (`read_start`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..integrity import DamagedFileError, FileState, read_sealed, sha256_of_state, write_sealed
from ..simulation.environment import EnvironmentState
from .rows import ACTION_DIM, CAMERA_COLUMNS, STATE_DIM, DemonstrationError, Episode, RowOptions, frame_features
from .sources import EpisodeEntry, Location

if TYPE_CHECKING:
    import datasets

MANIFEST = "manifest.json"
FORMAT_VERSION = 2  # 1 had no checksums
FOOTER_KEY = b"infovla_peft"
RECORD_AGAIN = "delete it and record again, which makes only what is missing"


@dataclass(frozen=True)
class EpisodeRecord:
    """One recorded episode.

    Attributes:
        index: its number within the task, from 0.
        file: relative to the folder of the set.
        frames: rows of the file.
        attempts: layouts tried until the script succeeded, this one included.
        seed: of `LiberoEnvironment.reset` for the layout that was recorded.
        sha256: of the file; empty in a set of the first format.
    """

    index: int
    file: str
    frames: int
    attempts: int
    seed: int
    sha256: str = ""


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
        write_sealed(folder / MANIFEST, content, {})

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
            content = read_sealed(path, newest=FORMAT_VERSION)
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
        except DamagedFileError as error:
            raise DemonstrationError(error.with_cure("delete the folder and record the set again")) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise DemonstrationError(
                f"{path} is damaged ({type(error).__name__}: {error!s:.300}): delete the folder and record the set "
                "again"
            ) from error
        return DemonstrationManifest(settings, tasks)


def count_recorded(folder: str | Path) -> dict[str, int]:
    """Task name -> how many episodes of it a folder's manifest names; empty where nothing is recorded yet.

    Raises:
        DemonstrationError: the manifest is broken or of another version.
    """
    try:
        recorded = DemonstrationManifest.load(folder).tasks
    except FileNotFoundError:
        return {}
    return {name: len(task.episodes) for name, task in recorded.items()}


def demonstration_features(cameras: Sequence[str]) -> datasets.Features:
    """Column types of an episode's file.

    Raises:
        ValueError: a camera has no column.
    """
    import datasets

    unknown = [camera for camera in cameras if camera not in CAMERA_COLUMNS]
    if unknown or not cameras:
        raise ValueError(f"cameras to record must be some of {list(CAMERA_COLUMNS)}, not {list(cameras)}")
    features = frame_features([CAMERA_COLUMNS[camera] for camera in cameras])
    done = features.pop("done")
    features["executed_action"] = datasets.List(datasets.Value("float32"), ACTION_DIM)
    order = [*features]
    order.insert(order.index("action") + 1, order.pop())
    return datasets.Features({name: features[name] for name in order} | {"done": done, "success": done})


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DemonstrationError(f"{path} is missing: record again, which makes only what is missing")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DemonstrationError(f"{path} is truncated or no Parquet file ({error}): {RECORD_AGAIN}") from error


def read_table(path: Path) -> pa.Table:
    """All columns of an episode's file.

    Raises:
        DemonstrationError: it is missing, truncated or damaged.
    """
    with _open(path) as file:
        try:
            return file.read()
        except (pa.ArrowInvalid, OSError) as error:
            raise DemonstrationError(f"{path} is damaged ({error}): {RECORD_AGAIN}") from error


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


def check_recorded(path: Path, record: EpisodeRecord) -> tuple[FileState, str]:
    """Check one episode of a set: `check_episode`, and its checksum, where the set has any.

    Returns:
        The state of the file, and its SHA-256.

    Raises:
        DemonstrationError: the first thing that is wrong, and the cure.
    """
    check_episode(path, record.frames)
    state, digest = sha256_of_state(path)
    if record.sha256 and digest != record.sha256:
        raise DemonstrationError(f"{path} is damaged (its content does not match its checksum): {RECORD_AGAIN}")
    return state, digest


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


class RecordedSource:
    """Recorded demonstrations of a folder, or of a data set repository that holds one.

    Raises:
        FileNotFoundError: there is no manifest.
        DemonstrationError: it is damaged.
    """

    upside_down = False

    def __init__(self, location: Location) -> None:
        self.location = location
        try:
            folder = location.file(MANIFEST).parent
        except FileNotFoundError:
            folder = location.folder or Path(location.repo_id)
        self._manifest = DemonstrationManifest.load(folder)

    @property
    def images(self) -> list[str]:
        return [CAMERA_COLUMNS[camera] for camera in self._manifest.settings.cameras]

    @property
    def features(self) -> datasets.Features:
        """Column types, with the two that only recorded demonstrations have."""
        return demonstration_features(self._manifest.settings.cameras)

    def entries(self) -> list[EpisodeEntry]:
        return [
            EpisodeEntry(
                name, task.instruction, task.suite, index, record.file, name, self.location.stamp(record.file)
            )
            for name, task in self._manifest.tasks.items()
            for index, record in sorted(task.episodes.items())
        ]

    def check(self, _entry: EpisodeEntry, options: RowOptions) -> None:
        """See that the dimensions that are wanted are those that are recorded, and the gripper is taken as it is.

        Raises:
            DemonstrationError: they are not.
        """
        if options.gripper is not None:
            raise DemonstrationError(
                f"{self.location} was recorded by `infovla demos`, with LIBERO's gripper: leave `gripper` out"
            )
        for name, found, wanted in (
            ("action", ACTION_DIM, options.action_dim),
            ("state", STATE_DIM, options.state_dim),
        ):
            if wanted != found:
                raise DemonstrationError(
                    f"{self.location}: {name} has {found} dimensions, as in every set that `infovla demos` recorded, "
                    f"not {wanted}: leave {name}_dim out, or read another set"
                )

    def record(self, entry: EpisodeEntry) -> EpisodeRecord:
        """What the manifest says of an episode."""
        return self._manifest.tasks[entry.place].episodes[entry.index]

    def file(self, entry: EpisodeEntry) -> Path:
        """The file of an episode, fetched if need be; not read.

        Raises:
            DemonstrationError: there is none.
        """
        try:
            return self.location.file(entry.file)
        except FileNotFoundError as error:
            raise DemonstrationError(f"{error}: {RECORD_AGAIN}") from error

    def read(self, entry: EpisodeEntry) -> Episode:
        path = self.file(entry)
        check_recorded(path, self.record(entry))
        table = read_table(path)
        columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("frame_index", "done")}
        images = {name: columns.pop(name) for name in self.images}
        numbers = {name: np.asarray(columns.pop(name), np.float32) for name in ("state", "action", "executed_action")}
        del columns["task"]
        return Episode(str(path), images, {**columns, **numbers}, {"task": entry.task})
