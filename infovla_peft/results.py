"""results.json: the one source of numbers for the report, the card and the README.

Strict JSON (UTF-8, no NaN), these keys and no others::

    format_version  1
    method          "infovla", "er", "sequential" …
    stream          "B3-2N1": base of 3 tasks, then 2 steps of 1 new task each
    suite           "libero_goal" …
    seed            of the run
    base_model      "tiny", or a Hub id or folder
    teacher         "base", "auto", "previous"; null where the method has no teacher
    assets          "official" or "primitive": what the robot saw; never mixed in one run
    renderer        "fast" or "exact"
    step_cap        actions after which a rollout has failed
    open_loop_steps actions executed of each predicted chunk
    tasks           [{"name", "instruction", "learned_at"}] in the order they are learned; learned_at is a stage,
                    0 = base, and none is left out (only the base may be empty)
    successes       [task][stage] rollouts that reached the goal; null where the task was not evaluated
    episodes        [task][stage] rollouts; null in the same places
    metrics         the seven of `metrics.py`, in [0, 1] (transfer: [-1, 1]), null where undefined; checked on load
    timings         [stage] {"train": seconds, "evaluate": seconds, …}
    videos          [{"path", "task", "stage", "success"}], path relative to the folder of results.json
    versions        {"python", "infovla_peft", "torch", "mujoco", …}
    commit          git commit of infovla_peft's sources, null for an installed package
    config          the resolved recipe

`Results.load` refuses a file that breaks any of this and says where.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .files import write_json, write_text
from .metrics import all_metrics, wilson_interval
from .reading import Checker, read_json

FORMAT_VERSION = 1
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "numpy",
    "mujoco", "hf-libero", "robosuite", "bddl",
)  # fmt: skip


class ResultsError(ValueError):
    """A results.json that cannot be trusted; the message names the file and the place."""


@dataclass(frozen=True)
class TaskEntry:
    """A task of the stream.

    Attributes:
        name: LIBERO's name of it; unique in a run.
        instruction: what the policy is told.
        learned_at: stage at which it is learned, 0 = base.
    """

    name: str
    instruction: str
    learned_at: int


@dataclass(frozen=True)
class Video:
    """One recorded rollout; `path` is relative to the folder of results.json."""

    path: str
    task: str
    stage: int
    success: bool


@dataclass
class Results:
    """What a run has measured so far. The attributes are the keys of results.json (see the module).

    Example:
        >>> results = Results(
        ...     method="er", stream="B1-1N1", suite="libero_goal", seed=0, base_model="tiny", teacher=None,
        ...     assets="primitive", renderer="fast", step_cap=300, open_loop_steps=8,
        ...     tasks=[TaskEntry("open_it", "open it", 0), TaskEntry("close_it", "close it", 1)])
        >>> results.add_stage(0, {"open_it": (18, 20)})
        >>> results.add_stage(1, {"open_it": (12, 20), "close_it": (15, 20)})
        >>> results.success.tolist()
        [[0.9, 0.6], [nan, 0.75]]
        >>> round(results.metrics()["negative_backward_transfer"], 2)
        0.3
    """

    method: str
    stream: str
    suite: str
    seed: int
    base_model: str
    teacher: str | None
    assets: str
    renderer: str
    step_cap: int
    open_loop_steps: int
    tasks: list[TaskEntry]
    successes: list[list[int | None]] = field(default_factory=list)
    episodes: list[list[int | None]] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.successes = self.successes or [[] for _ in self.tasks]
        self.episodes = self.episodes or [[] for _ in self.tasks]

    @property
    def stages(self) -> int:
        """Stages evaluated so far, the base included."""
        return len(self.successes[0]) if self.successes else 0

    @property
    def planned_stages(self) -> int:
        """Stages of the whole stream, the base included."""
        return max((task.learned_at for task in self.tasks), default=-1) + 1

    @property
    def learned_at(self) -> NDArray[np.int64]:
        """(tasks,) stage of each task."""
        return np.array([task.learned_at for task in self.tasks], dtype=np.int64)

    @property
    def success(self) -> NDArray[np.float64]:
        """(tasks, stages) success rates in [0, 1], NaN where not evaluated."""
        successes, episodes = self._counts()
        rates: NDArray[np.float64] = successes / np.where(episodes > 0, episodes, np.nan)
        return rates

    def intervals(self, *, confidence: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Wilson bounds of every cell, two arrays (tasks, stages), NaN where not evaluated."""
        return wilson_interval(*self._counts(), confidence=confidence)

    def metrics(self) -> dict[str, float]:
        """The seven metrics, over all tasks learned so far; NaN where undefined."""
        if not self.stages:
            return dict.fromkeys(all_metrics([[0.0]]), math.nan)
        return all_metrics(self.success, self.learned_at)

    def _counts(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        successes, episodes = (
            np.array([[value or 0 for value in row] for row in table], dtype=np.float64).reshape(
                len(self.tasks), self.stages
            )
            for table in (self.successes, self.episodes)
        )
        return successes, episodes

    def add_stage(
        self,
        stage: int,
        cells: Mapping[str, tuple[int, int]],
        *,
        timings: Mapping[str, float] | None = None,
        videos: Sequence[Video] = (),
    ) -> None:
        """Enter the rollouts after one stage; a stage that is already there is replaced.

        Args:
            stage: at most the number of stages so far: stages are entered in order.
            cells: task name -> (successes, episodes) of the tasks evaluated; the others count as not evaluated.
            timings: seconds by what they were spent on.
            videos: of this stage.

        Raises:
            ValueError: a stage out of order, an unknown task, or counts that are not 0 <= successes <= episodes.
        """
        if not 0 <= stage <= self.stages:
            raise ValueError(f"stage {stage} cannot be entered: the next one is {self.stages}")
        unknown = set(cells) - {task.name for task in self.tasks}
        if unknown:
            raise ValueError(f"not tasks of this stream: {', '.join(sorted(unknown))}")
        for name, (successes, episodes) in cells.items():
            if not (0 <= successes <= episodes and episodes > 0):
                raise ValueError(f"task {name!r}: {successes} successes of {episodes} episodes")
        for task, successes_row, episodes_row in zip(self.tasks, self.successes, self.episodes, strict=True):
            cell = cells.get(task.name)
            successes_row[stage:] = [cell[0] if cell else None, *successes_row[stage + 1 :]]
            episodes_row[stage:] = [cell[1] if cell else None, *episodes_row[stage + 1 :]]
        self.timings[stage:] = [dict(timings or {}), *self.timings[stage + 1 :]]
        self.videos = [video for video in self.videos if video.stage != stage] + list(videos)

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        content["metrics"] = {name: None if math.isnan(value) else value for name, value in self.metrics().items()}
        return content

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write results.json, and success.csv beside it, each atomically.

        Raises:
            ResultsError: the content would not load again; nothing is written then.
        """
        content = self.to_dict()
        self.from_dict(json.loads(json.dumps(content)), source=str(path))
        write_json(path, content)
        write_text(Path(path).parent / "success.csv", self.to_csv())

    def to_csv(self) -> str:
        """One line per evaluated cell, with its counts, rate and 95 % Wilson interval."""
        low, high = self.intervals()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["task", "learned_at", "stage", "successes", "episodes", "success", "low", "high"])
        for i, task in enumerate(self.tasks):
            for j, (successes, episodes) in enumerate(zip(self.successes[i], self.episodes[i], strict=True)):
                if successes is not None and episodes is not None:
                    rates = (f"{value:.4f}" for value in (successes / episodes, low[i, j], high[i, j]))
                    writer.writerow([task.name, task.learned_at, j, successes, episodes, *rates])
        return text.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read and validate results.json.

        Raises:
            FileNotFoundError: there is none.
            ResultsError: it is damaged, edited, or of another format version.
        """
        try:
            content = read_json(Path(path), error=ResultsError, cure=_CURE)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist: give the folder of a run that was evaluated") from error
        return cls.from_dict(content, source=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, source: str = "results") -> Results:
        """Validate the content of a results.json; `source` names it in errors."""
        return _Reader(source, ResultsError, _CURE).results(content)


def collect_versions() -> dict[str, str]:
    """Versions of Python and of every package here that a number can depend on, as far as installed."""
    versions = {"python": platform.python_version(), "infovla_peft": __version__}
    for package in PACKAGES:
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def source_commit() -> str | None:
    """Git commit of the sources this package runs from ("-dirty" if changed), None if it is not a checkout.

    Asked for once per process, which goes on with what it has loaded when the checkout moves on beneath it.
    """
    repository = Path(__file__).resolve().parent.parent
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


_CURE = "restore it, or delete it and give the run's command again, which makes it from its rollouts"


class _Reader(Checker[ResultsError]):
    def results(self, content: Any) -> Results:
        self.version(content, FORMAT_VERSION)
        content = self.record(content, ["format_version", *_FIELDS, "metrics"], "the content")
        tasks = self.tasks(content["tasks"])
        successes, episodes = self.table(content, "successes", len(tasks)), self.table(content, "episodes", len(tasks))
        stages = len(successes[0])
        if any(len(row) != stages for row in (*successes, *episodes)):
            self.fail("successes and episodes", "tables of one width", [len(row) for row in (*successes, *episodes)])
        for i, task in enumerate(tasks):
            for j, (reached, tried) in enumerate(zip(successes[i], episodes[i], strict=True)):
                if (reached is None) != (tried is None) or (
                    reached is not None and tried is not None and not 0 <= reached <= tried
                ):
                    self.fail(f"task {task.name!r}, stage {j}", "successes of episodes", (reached, tried))
        texts: dict[str, Any] = {name: self.typed(content[name], str, name) for name in _TEXTS}
        results = Results(
            **texts,
            teacher=self.typed(content["teacher"], str, "teacher", optional=True),
            commit=self.typed(content["commit"], str, "commit", optional=True),
            seed=self.typed(content["seed"], int, "seed"),
            step_cap=self.count(content["step_cap"], "step_cap", minimum=1),
            open_loop_steps=self.count(content["open_loop_steps"], "open_loop_steps", minimum=1),
            tasks=tasks,
            successes=successes,
            episodes=episodes,
            timings=self.timings(content["timings"], stages),
            videos=self.videos(content["videos"], {task.name for task in tasks}, stages),
            versions=self.strings(content["versions"], "versions"),
            config=self.typed(content["config"], dict, "config"),
        )
        self.metrics(content["metrics"], results.metrics())
        return results

    def tasks(self, value: Any) -> list[TaskEntry]:
        tasks = []
        for where, item in self.items(value, "tasks"):
            record = self.record(item, ["name", "instruction", "learned_at"], where)
            name, instruction = (self.typed(record[key], str, f"{where}.{key}") for key in ("name", "instruction"))
            tasks.append(TaskEntry(name, instruction, self.count(record["learned_at"], f"{where}.learned_at")))
        if not tasks or len({task.name for task in tasks}) != len(tasks):
            self.fail("tasks", "at least one, each with its own name", [task.name for task in tasks])
        stages = [0, *(task.learned_at for task in tasks)]
        if any(later - earlier not in (0, 1) for earlier, later in pairwise(stages)):
            self.fail("tasks", "in the order they are learned, with no stage left out", stages[1:])
        return tasks

    def table(self, content: Mapping[str, Any], name: str, tasks: int) -> list[list[int | None]]:
        rows = self.items(content[name], name, tasks, each="rows, one per task")
        return [
            [None if cell is None else self.count(cell, place, minimum=int(name == "episodes"))
             for place, cell in self.items(row, where)]
            for where, row in rows
        ]  # fmt: skip

    def timings(self, value: Any, stages: int) -> list[dict[str, float]]:
        entries = self.items(value, "timings", stages, each="objects, one per stage")
        for where, entry in entries:
            for key, seconds in self.typed(entry, dict, where).items():
                self.number(seconds, f"{where}.{key}", 0)
        return [entry for _, entry in entries]

    def videos(self, value: Any, tasks: set[str], stages: int) -> list[Video]:
        videos = []
        for where, item in self.items(value, "videos"):
            record = self.record(item, ["path", "task", "stage", "success"], where)
            path, stage = (
                self.path_inside(record["path"], f"{where}.path"),
                self.count(record["stage"], f"{where}.stage"),
            )
            if self.typed(record["task"], str, f"{where}.task") not in tasks or stage >= stages:
                self.fail(where, "of a task and stage of this run", (record["task"], stage))
            videos.append(Video(path, record["task"], stage, self.typed(record["success"], bool, f"{where}.success")))
        return videos

    def metrics(self, value: Any, expected: Mapping[str, float]) -> None:
        stored = self.record(value, list(expected), "metrics")
        for name, number in expected.items():
            found = stored[name]
            if found is None and math.isnan(number):
                continue
            if type(found) not in (int, float) or not abs(found - number) < 1e-9:
                self.fail(f"metrics.{name}", f"{number}, which follows from successes and episodes", found)


_FIELDS = [item.name for item in fields(Results)]
_TEXTS = ("method", "stream", "suite", "base_model", "assets", "renderer")
