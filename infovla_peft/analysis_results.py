"""analysis.json: what `analysis.py` measured of a run, and the comparison of several runs.

Strict JSON (UTF-8, no NaN), these keys and no others::

    format_version  1
    method, stream, suite, seed, base_model, assets    as in results.json of the same run
    frames          probe frames wanted per task
    demonstrations  over which they are spread, none of them in the replay memory
    tap_layer       layer whose hidden states were looked at
    temperature     of the affinity maps
    tasks           [{"name", "instruction", "learned_at", "frames", "episodes"}] in the order of learning; frames =
                    probe frames there were, episodes = numbers of the demonstrations they come from
    stages          stages looked at, the base included

    The tables [task][stage], null where the task was not learned yet or the number is not defined:

    diffusion       normalised entropy of the affinity map, mean over the frames, in [0, 1]; 1 = evenly spread
    cka             linear CKA (without bias) of the action features with those right after learning; 1 = as then
    similarity      cosine of each frame's action feature now with the same frame's right after learning, both less
                    the mean feature of then; mean over the frames, in [-1, 1]
    swap_change     mean absolute change of the normalised actions when the instruction is swapped, over the other
                    instructions known when the task was learned; null where there was none
    listening       swap_change, relative to right after learning; 1 = listens as much as then, 0 = deaf
    action_error    mean absolute difference of the normalised actions to the recorded ones

    affinity        [{"task", "image", "stages", "diffusion", "maps"}] of up to three old tasks: one frame (a PNG,
                    relative to the folder of analysis.json) and its maps right after learning and after the last
                    stage; maps [2][rows][columns], affinity of each patch, 1 = the even share
    matrices        [{"task", "stages", "similarity"}] of the same tasks: cosines [2][frames][frames] between the
                    frames right after learning (rows) and the frames then and after the last stage (columns)
    versions        {"python", "infovla_peft", "torch", …}
    commit          git commit of infovla_peft's sources, null for an installed package

`Analysis.load` refuses a file that breaks any of this and says where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import write_json
from .metrics import masked_mean
from .reading import Checker, read_json

FILE = "analysis.json"
FORMAT_VERSION = 1
Table = list[list[float | None]]

RANGES = {
    "diffusion": (0.0, 1.0),
    "cka": (-1.0, 1.0),
    "similarity": (-1.0, 1.0),
    "swap_change": (0.0, math.inf),
    "listening": (0.0, math.inf),
    "action_error": (0.0, math.inf),
}
"""The tables and what their values may be."""
_ROUNDING = 1e-6
_HEAD = {
    "method": str, "stream": str, "suite": str, "seed": int, "base_model": str, "assets": str, "frames": int,
    "demonstrations": int, "tap_layer": int, "temperature": float, "stages": int,
}  # fmt: skip
_KEYS = ("format_version", *_HEAD, "tasks", *RANGES, "affinity", "matrices", "versions", "commit")


class AnalysisError(ValueError):
    """An analysis.json that cannot be used; the message names the file and the place."""


@dataclass(frozen=True)
class ProbedTask:
    """A task and its probe frames.

    Attributes:
        name, instruction, learned_at: as in results.json.
        frames: number of probe frames.
        episodes: numbers of the demonstrations they come from.
    """

    name: str
    instruction: str
    learned_at: int
    frames: int
    episodes: list[int]


@dataclass(frozen=True)
class AffinityPair:
    """One frame's affinity map right after its task was learned and after the last stage.

    Attributes:
        image: PNG of what the policy saw, relative to the folder of analysis.json.
        stages: the two stages.
        diffusion: of the two maps.
        maps: (2, rows, columns); 1 = the share of a patch if all had the same.
    """

    task: str
    image: str
    stages: list[int]
    diffusion: list[float]
    maps: list[list[list[float]]]


@dataclass(frozen=True)
class SimilarityPair:
    """Cosines (2, frames, frames) of the frames right after learning with themselves, and with the last stage's."""

    task: str
    stages: list[int]
    similarity: list[list[list[float]]]


@dataclass
class Analysis:
    """What was found. The attributes are the keys of analysis.json (see the module)."""

    method: str
    stream: str
    suite: str
    seed: int
    base_model: str
    assets: str
    frames: int
    demonstrations: int
    tap_layer: int
    temperature: float
    stages: int
    tasks: list[ProbedTask]
    diffusion: Table = field(default_factory=list)
    cka: Table = field(default_factory=list)
    similarity: Table = field(default_factory=list)
    swap_change: Table = field(default_factory=list)
    listening: Table = field(default_factory=list)
    action_error: Table = field(default_factory=list)
    affinity: list[AffinityPair] = field(default_factory=list)
    matrices: list[SimilarityPair] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None

    def table(self, name: str) -> NDArray[np.float64]:
        """(tasks, stages) values of one table, NaN where there is none."""
        return np.array(getattr(self, name), dtype=np.float64).reshape(len(self.tasks), self.stages)

    def old_mean(self, name: str, *, change: bool = False) -> NDArray[np.float64]:
        """(stages,) mean over the old tasks of each stage, those learned before it; NaN where there is none.

        Args:
            change: average the difference to right after learning instead. The set of old tasks grows, so that a
                plain mean also moves with its members.
        """
        values = self.table(name)
        learned_at = np.array([task.learned_at for task in self.tasks])
        if change:
            values = values - values[np.arange(len(values)), learned_at][:, None]
        return masked_mean(values, learned_at[:, None] < np.arange(self.stages), axis=0)

    def to_dict(self) -> dict[str, Any]:
        """The content of analysis.json."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, run_folder: str | os.PathLike[str]) -> None:
        """Write `run_folder`/analysis.json atomically.

        Raises:
            AnalysisError: the content would not load again; nothing is written then.
        """
        path = Path(run_folder) / FILE
        self.from_dict(self.to_dict(), source=str(path))
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, run_folder: str | os.PathLike[str]) -> Analysis:
        """Read and validate `run_folder`/analysis.json.

        Raises:
            FileNotFoundError: there is none.
            AnalysisError: it is damaged, edited, or of another format version.
        """
        path = Path(run_folder) / FILE
        try:
            content = read_json(path, error=AnalysisError, cure=_AGAIN)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist: run `infovla analyse {run_folder}`") from error
        return cls.from_dict(content, source=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, source: str = FILE) -> Analysis:
        """Validate the content of an analysis.json; `source` names it in errors."""
        return _Reader(source, AnalysisError, _AGAIN).analysis(content)


_AGAIN = "delete it, and analyse the run again"


class _Reader(Checker[AnalysisError]):
    def grid(self, value: Any, where: str, low: float, high: float = math.inf) -> list[list[list[float]]]:
        grids = [
            [[self.number(cell, there, low, high, rounding=_ROUNDING) for there, cell in self.items(row, place)]
             for place, row in self.items(grid, spot)]
            for spot, grid in self.items(value, where, 2)
        ]  # fmt: skip
        shapes = {(len(grid), *{len(row) for row in grid}) for grid in grids}
        self.need(len(shapes) == 1 and len(next(iter(shapes))) == 2, where, "two grids of one shape", shapes)
        return grids

    def analysis(self, content: Any) -> Analysis:
        self.version(content, FORMAT_VERSION)
        content = self.record(content, _KEYS, "the content")
        head: dict[str, Any] = {name: self.typed(content[name], kind, name) for name, kind in _HEAD.items()}
        self.count(head["stages"], "stages", minimum=1, maximum=10**6)
        tasks = [self.task(item, where, head["stages"]) for where, item in self.items(content["tasks"], "tasks")]
        names = {task.name for task in tasks}
        self.need(0 < len(tasks) == len(names), "tasks", "at least one, each with its own name", content["tasks"])
        tables: dict[str, Any] = {name: self.table(content[name], name, tasks, head["stages"]) for name in RANGES}
        return Analysis(
            **head,
            tasks=tasks,
            **tables,
            affinity=[
                self.affinity(item, where, names) for where, item in self.items(content["affinity"], "affinity")
            ],
            matrices=[self.matrix(item, where, names) for where, item in self.items(content["matrices"], "matrices")],
            versions=self.strings(content["versions"], "versions"),
            commit=self.typed(content["commit"], str, "commit", optional=True),
        )

    def task(self, item: Any, where: str, stages: int) -> ProbedTask:
        keys = {"name": str, "instruction": str, "learned_at": int, "frames": int}
        record = self.record(item, [*keys, "episodes"], where)
        values: dict[str, Any] = {key: self.typed(record[key], kind, f"{where}.{key}") for key, kind in keys.items()}
        self.need(0 <= values["learned_at"] < stages, f"{where}.learned_at", "one of the stages", values["learned_at"])
        episodes = self.items(record["episodes"], f"{where}.episodes")
        return ProbedTask(**values, episodes=[self.typed(number, int, place) for place, number in episodes])

    def table(self, value: Any, name: str, tasks: Sequence[ProbedTask], stages: int) -> Table:
        rows = [self.items(row, where, stages) for where, row in self.items(value, name, len(tasks))]
        for task, row in zip(tasks, rows, strict=True):
            for stage, (where, cell) in enumerate(row):
                if cell is not None:
                    self.need(stage >= task.learned_at, where, "null: the task is learned later", cell)
                    self.number(cell, where, *RANGES[name], rounding=_ROUNDING)
        return [[cell for _, cell in row] for row in rows]

    def stage_pair(self, value: Any, where: str) -> list[int]:
        return [self.typed(stage, int, place) for place, stage in self.items(value, where, 2)]

    def name_of(self, value: Any, where: str, names: set[str]) -> str:
        self.need(self.typed(value, str, where) in names, where, "a task of the run", value)
        return str(value)

    def affinity(self, item: Any, where: str, names: set[str]) -> AffinityPair:
        record = self.record(item, ["task", "image", "stages", "diffusion", "maps"], where)
        image = self.path_inside(record["image"], f"{where}.image")
        diffusion = self.items(record["diffusion"], f"{where}.diffusion", 2)
        return AffinityPair(
            self.name_of(record["task"], f"{where}.task", names),
            image,
            self.stage_pair(record["stages"], f"{where}.stages"),
            [self.number(value, place, 0, 1, rounding=_ROUNDING) for place, value in diffusion],
            self.grid(record["maps"], f"{where}.maps", 0),
        )

    def matrix(self, item: Any, where: str, names: set[str]) -> SimilarityPair:
        record = self.record(item, ["task", "stages", "similarity"], where)
        return SimilarityPair(
            self.name_of(record["task"], f"{where}.task", names),
            self.stage_pair(record["stages"], f"{where}.stages"),
            self.grid(record["similarity"], f"{where}.similarity", -1, 1),
        )


COMPARED = {
    "diffusion": ("diffusion", False),
    "diffusion_change": ("diffusion", True),
    "cka": ("cka", False),
    "listening": ("listening", False),
    "action_error": ("action_error", False),
}
"""What is compared: column -> (table, whether its change since learning)."""


@dataclass(frozen=True)
class AnalysisComparison:
    """Analyses of several runs, by method.

    Attributes:
        runs: method -> number of runs (seeds).
        values: column of `COMPARED` -> method -> (runs, stages), mean over the old tasks of each stage; NaN where
            there is none.
        figures: what was drawn of it.
    """

    runs: dict[str, int]
    values: dict[str, dict[str, NDArray[np.float64]]]
    figures: tuple[Path, ...] = ()

    def label(self, method: str) -> str:
        """A method and how many runs it has."""
        count = self.runs[method]
        return f"{method} ({count} run{'s' if count > 1 else ''})"

    def table(self) -> str:
        """One line per method and stage: the mean over its runs of each column."""
        lines = [f"{'mean over the old tasks':<26}{'stage':>6}" + "".join(f"{name:>18}" for name in self.values)]
        for method in self.runs:
            columns = [mean_of_runs(by_method[method]) for by_method in self.values.values()]
            for stage, numbers in enumerate(zip(*columns, strict=True)):
                if not all(math.isnan(number) for number in numbers):
                    cells = "".join(f"{'–' if math.isnan(number) else f'{number:.3f}':>18}" for number in numbers)
                    lines.append(f"{self.label(method):<26}{stage:>6}{cells}")
        return "\n".join(lines)


def mean_of_runs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(runs, stages) → (stages,), over the runs that have a number; NaN where none has."""
    return masked_mean(values, axis=0)


def compare(analyses: Sequence[Analysis], names: Sequence[str | None] = ()) -> AnalysisComparison:
    """Gather analyses by method; runs of one method (its seeds) are kept apart, for their mean and spread.

    Args:
        names: what each counts as, None for its method; empty for that of all. Variants of one method need names.

    Raises:
        ValueError: no analyses, or of different suites, streams, assets or settings, or two of one method with the
            same seed and tasks.
    """
    if not analyses:
        raise ValueError("nothing to compare: give the folders of runs")
    for name in ("suite", "stream", "assets", "stages", "frames", "tap_layer", "temperature"):
        found = sorted({str(getattr(analysis, name)) for analysis in analyses})
        if len(found) > 1:
            raise ValueError(f"the runs cannot be compared: {name} is {' and '.join(found)}")
    once: set[tuple[Any, ...]] = set()
    groups: dict[str, list[Analysis]] = {}
    for index, analysis in enumerate(analyses):
        label = (names[index] if names else None) or analysis.method
        run = (label, analysis.seed, *(task.name for task in analysis.tasks))
        if run in once:
            raise ValueError(
                f"two runs of {label} have seed {analysis.seed} and the same tasks, so they are no repetitions; give "
                "each a name of its own (name=RUN), or compare them in calls of their own"
            )
        once.add(run)
        groups.setdefault(label, []).append(analysis)
    values = {
        column: {
            method: np.stack([analysis.old_mean(table, change=change) for analysis in group])
            for method, group in groups.items()
        }
        for column, (table, change) in COMPARED.items()
    }
    return AnalysisComparison({method: len(group) for method, group in groups.items()}, values)
