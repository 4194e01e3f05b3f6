"""Recording scripted demonstrations: fresh layouts, worker processes, one Parquet file per episode, resumable."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..bars import progress_bar
from ..files import atomic_file, clean_up, locked
from ..integrity import sha256
from ..simulation.assets import AssetSet
from ..simulation.demonstrator import ACTION_NOISE, Demonstration, Demonstrator
from ..simulation.environment import LiberoEnvironment
from ..simulation.headless import choose_gl, libero_folder
from ..simulation.jobs import LostJobError, work_off
from ..simulation.suites import Task
from .mapped import CACHE, prepare_recorded
from .recorded import (
    FOOTER_KEY,
    DemonstrationManifest,
    EpisodeRecord,
    RecordingSettings,
    TaskRecord,
    check_episode,
    demonstration_features,
    read_start,
)
from .rows import CAMERA_COLUMNS, DemonstrationError, png

MAX_ATTEMPTS = 20
"""Layouts tried for one episode. The script solves nearly all, so that more failures in a row mean a broken scene."""


LAYOUT_TIMEOUT = 600.0
"""Seconds. A layout takes about 4 on one core, building its environment 3; the rest is patience."""


class RecordingError(RuntimeError):
    """The script cannot solve a task, or costs process after process; what was recorded before is kept."""


def record_demonstrations(
    tasks: Sequence[Task],
    folder: str | Path,
    *,
    episodes: int,
    assets: AssetSet,
    image_size: int = 128,
    cameras: Sequence[str] = ("agentview",),
    renderer: str = "fast",
    noise: float = ACTION_NOISE,
    seed: int = 0,
    num_workers: int = 1,
    progress: bool = True,
) -> DemonstrationManifest:
    """Record scripted demonstrations of some tasks, on layouts drawn from the regions of their BDDL files.

    What is already in the folder stays; a stopped recording goes on where it was. Of several processes that record
    into one folder at the same time, one does and the others wait, then make what is still missing. Episodes are the
    same bit for bit for every number of workers and whatever was recorded before: episode k of a task follows from
    `seed`, the task and k alone. The benchmark's start states are never used.

    Args:
        tasks: what to record.
        folder: where; see `infovla_peft.data.recorded` for its layout.
        episodes: successful episodes wanted per task.
        assets: from `find_assets`.
        image_size, cameras, renderer: as for `LiberoEnvironment`.
        noise: standard deviation of the noise on the executed actions; labels stay clean.
        seed: of the whole set.
        num_workers: processes. One per core is right.
        progress: show a bar.

    Returns:
        The manifest, which holds for each task how often the script succeeded.

    Raises:
        ValueError: unknown camera, two tasks of one name, or nothing to do.
        DemonstrationError: the folder holds a set that was recorded with other settings.
        RecordingError: the script failed on many layouts in a row, or an episode has cost three worker processes,
            which died or hung.
        SimulatorNotFoundError: LIBERO or an OpenGL library is missing.
        OSError: the folder cannot be written, or the disk is full; complete episodes stay.
    """
    check_recording(episodes, num_workers)
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("two of the tasks have the same name: record them into different folders")
    demonstration_features(cameras)  # fails now
    libero_folder()
    choose_gl()
    settings = RecordingSettings(
        assets=assets.name,
        mujoco=version("mujoco"),
        image_size=image_size,
        cameras=tuple(cameras),
        renderer=renderer,
        noise=noise,
        seed=seed,
    )
    with locked(Path(folder), "recording into"):
        clean_up(folder, but=Path(folder) / CACHE)
        manifest = _record_missing(Path(folder), settings, tasks, episodes, assets, num_workers, progress)
        prepare_recorded(folder, {task.name for task in tasks})
    return manifest


def check_recording(episodes: int, num_workers: int) -> None:
    """Raise a ValueError if there is nothing to record, or nobody to do it."""
    if episodes < 1 or num_workers < 1:
        raise ValueError(f"episodes and num_workers must be at least 1, not {episodes} and {num_workers}")


def _record_missing(
    folder: Path,
    settings: RecordingSettings,
    tasks: Sequence[Task],
    episodes: int,
    assets: AssetSet,
    num_workers: int,
    progress: bool,
) -> DemonstrationManifest:
    schema = demonstration_features(settings.cameras).arrow_schema
    manifest = _open_manifest(folder, settings, tasks)
    jobs = [
        _Job(task, index, settings, assets)
        for task in tasks
        for index in range(episodes)
        if not _is_recorded(folder, manifest.tasks[task.name], index)
    ]
    manifest.save(folder)
    if not jobs:
        return manifest
    with (
        progress_bar(
            total=episodes * len(tasks),
            initial=episodes * len(tasks) - len(jobs),
            unit="episode",
            desc="recording",
            disable=not progress or None,
        ) as bar,
        closing(work_off(_record, jobs, workers=num_workers, patience=LAYOUT_TIMEOUT)) as recorded,
    ):
        try:
            for episode in recorded:
                _write_episode(episode, folder, schema)
                record = replace(episode.record, sha256=sha256(folder / episode.record.file))
                manifest.tasks[episode.task.name].episodes[record.index] = record
                manifest.save(folder)
                bar.update()
        except LostJobError as error:
            raise RecordingError(
                f"recording failed: {error}; if the machine ran out of memory, use fewer workers; run the same "
                "command again to go on"
            ) from error
    return manifest


def replay(path: str | Path, environment: LiberoEnvironment) -> bool:
    """Execute a recorded episode open loop: from its stored start, its executed actions, nothing else.

    Args:
        path: the episode's Parquet file.
        environment: of the same task and asset set.

    Returns:
        Whether the goal held at some time, as it did when the episode was recorded.

    Raises:
        DemonstrationError: the file is broken.
        ValueError: it belongs to another task.
    """
    check_episode(path)
    environment.reset(initial_state=read_start(path), seed=0)
    actions = np.array(pq.read_table(path, columns=["executed_action"])["executed_action"].to_pylist(), np.float32)
    held = [environment.step(action) for action in actions]
    return any(held)


@dataclass(frozen=True)
class _Job:
    """One episode to record."""

    task: Task
    index: int
    settings: RecordingSettings
    assets: AssetSet

    def __str__(self) -> str:
        return f"demonstration {self.index} of {self.task}"


@dataclass(frozen=True)
class _Episode:
    """A recorded episode on its way from the worker to its file."""

    task: Task
    record: EpisodeRecord
    columns: dict[str, Any]
    footer: str


def _open_manifest(folder: Path, settings: RecordingSettings, tasks: Sequence[Task]) -> DemonstrationManifest:
    try:
        manifest = DemonstrationManifest.load(folder)
    except FileNotFoundError:
        manifest = DemonstrationManifest(settings)
    before, now = asdict(manifest.settings), asdict(settings)
    if changed := [f"{key}: {before[key]} there, {now[key]} wanted" for key in now if before[key] != now[key]]:
        raise DemonstrationError(
            f"{folder} holds demonstrations that were recorded with other settings ({'; '.join(changed)}): choose "
            "another folder, or delete this one"
        )
    for task in tasks:
        record = manifest.tasks.setdefault(task.name, TaskRecord(task.suite, task.index, task.name, task.instruction))
        if record.suite != task.suite:
            raise DemonstrationError(f"{folder} holds {task.name} of {record.suite}: choose another folder")
    return manifest


def _is_recorded(folder: Path, task: TaskRecord, index: int) -> bool:
    return index in task.episodes and (folder / task.episodes[index].file).is_file()


def _write_episode(episode: _Episode, folder: Path, schema: pa.Schema) -> None:
    schema = schema.with_metadata({**(schema.metadata or {}), FOOTER_KEY: episode.footer.encode()})
    table = pa.table(episode.columns, schema=schema)
    with atomic_file(folder / episode.record.file) as temporary:
        pq.write_table(table, temporary)


# --- in the worker processes ----------------------------------------------------------------------------------------

_environments: dict[_Job, LiberoEnvironment] = {}


def _record(job: _Job, alive: Callable[[], None]) -> _Episode:
    key = replace(job, index=0)
    if key not in _environments:
        for environment in _environments.values():
            environment.close()
        _environments.clear()
        _environments[key] = LiberoEnvironment(
            job.task,
            assets=job.assets,
            image_size=job.settings.image_size,
            cameras=job.settings.cameras,
            renderer=job.settings.renderer,
        )
    return record_episode(_environments[key], job.index, job.settings, alive)


def record_episode(
    environment: LiberoEnvironment, index: int, settings: RecordingSettings, alive: Callable[[], None] = lambda: None
) -> _Episode:
    """Try layouts until the script succeeds on one; a function of the task, `index` and `settings`.

    Args:
        alive: called before each layout.

    Raises:
        RecordingError: it failed on `MAX_ATTEMPTS` layouts.
    """
    task = environment.task
    demonstrator = Demonstrator(environment, noise=settings.noise)
    for attempt in range(MAX_ATTEMPTS):
        alive()
        origin = np.random.SeedSequence([settings.seed, zlib.crc32(str(task).encode()), index, attempt])
        layout, noise = (int(word) for word in origin.generate_state(2))
        environment.reset(seed=layout)
        demonstration = demonstrator.run(np.random.default_rng(noise))
        if demonstration.success:
            file = f"{task.name}/episode_{index:06d}.parquet"
            record = EpisodeRecord(index, file, len(demonstration), attempt + 1, layout)
            start = {key: value.tolist() for key, value in asdict(demonstration.start).items()}
            return _Episode(task, record, _columns(demonstration, index), json.dumps({"seed": layout, "start": start}))
    raise RecordingError(
        f"the script failed on {MAX_ATTEMPTS} layouts of {task} in a row, last because: {demonstration.failure}. "
        "Leave this task out, or choose another asset set"
    )


def _columns(demonstration: Demonstration, index: int) -> dict[str, Any]:
    frames, task = len(demonstration), demonstration.task
    images = {
        CAMERA_COLUMNS[camera]: [{"bytes": png(picture), "path": None} for picture in pictures]
        for camera, pictures in demonstration.images.items()
    }
    return images | {
        "state": demonstration.states.tolist(),
        "action": demonstration.actions.tolist(),
        "executed_action": demonstration.executed_actions.tolist(),
        "instruction": [task.instruction] * frames,
        "task": [task.name] * frames,
        "suite": [task.suite] * frames,
        "episode_index": [index] * frames,
        "frame_index": list(range(frames)),
        "done": [frame == frames - 1 for frame in range(frames)],
        "success": demonstration.succeeded.tolist(),
    }
