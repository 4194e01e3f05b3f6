"""Whether a run is whole: every file that can be checked is read and checked; what is damaged is named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .adapter_files import AdapterError, check_adapter
from .analysis_results import FILE as ANALYSIS
from .analysis_results import Analysis
from .checkpoints import check_checkpoint, checkpoints
from .consolidation import Consolidation
from .data.mapped import verify_mapped
from .data.recorded import MANIFEST, DemonstrationManifest, check_recorded
from .evaluation import TaskResult
from .files import was_moved_aside
from .integrity import DamagedFileError, damaged, read_sealed
from .measurement import CELL_VERSION, read_cell
from .memory import ReplayMemory
from .mending import check_memory
from .results import Results
from .run_folder import RESTORE, RunError, RunFolder, config_is_sealed

_SAYS = re.compile(r" (?:is|are|lacks|holds|has|counts|names) ")
"""What follows the file's name in a message about it."""


@dataclass
class Verification:
    """What `verify_run` found.

    Attributes:
        damage: file → what is wrong with it.
        checked: number of files that were read and found whole.
        unchecked: what cannot be checked, and why.
    """

    damage: dict[Path, str] = field(default_factory=dict)
    checked: set[Path] = field(default_factory=set)
    unchecked: dict[Path, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.damage

    def describe(self) -> str:
        """One line per finding, and a summary."""
        lines = [f"DAMAGED  {path}: {problem}" for path, problem in self.damage.items()]
        lines += [f"unknown  {path}: {reason}" for path, reason in self.unchecked.items()]
        return "\n".join([*lines, f"{len(self.checked)} files whole, {len(self.damage)} damaged"])

    def attempt(self, file: Path, check: Callable[[], Any]) -> Any:
        """The result of a check, None if it finds damage in `file`."""
        try:
            result = check()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            named = Path(_SAYS.split(str(error), maxsplit=1)[0])  # of a folder's files, the very one
            named = named if named.is_relative_to(file.parent) else file
            self.damage.setdefault(named, str(error).removeprefix(f"{named} "))
            return None
        self.checked.add(file)
        return result

    def files(self, folder: Path, sums: dict[str, str]) -> None:
        """Check files against their checksums."""
        lost = damaged(folder, sums)
        for name in sums:
            path = Path(os.path.normpath(folder / name))
            if folder / name in lost:
                self.damage[path] = "its content does not match its checksum" if path.exists() else "is missing"
            else:
                self.checked.add(path)


def verify_run(path: str | os.PathLike[str]) -> Verification:
    """Read everything that a run has kept and check it; nothing is changed.

    Finished steps must have left their products. What a killed process left half written does not count: the next
    start of the run removes or completes it.

    Raises:
        RunError: there is no run.
    """
    run = RunFolder(path)
    if not (run / "state.json").exists() and not (run / "config.yaml").exists():
        raise RunError(f"{path} holds no run (neither state.json nor config.yaml); give the folder of a run")
    found = Verification()
    config = _configuration(run, found)
    begun = any((run / name).exists() for name in ("adapters", "memory", "results.json", "base"))
    if not (run / "state.json").exists() and begun:
        found.damage[run / "state.json"] = f"is missing, although steps have been finished; {RESTORE}"
    steps = found.attempt(run / "state.json", run.state) if (run / "state.json").exists() else {}
    if steps is None:
        steps = {}
    else:
        _products(run, steps, found)
    for folder in [*_folders(run / "adapters"), *_folders(run / "merged")]:
        info = found.attempt(folder / "infovla.json", partial(_adapter, folder))
        if info is not None and info.sha256:
            found.checked.update(folder / name for name in info.sha256)
        elif info is not None:
            found.unchecked[folder] = "written by an earlier version, without checksums"
    remembered = sum(name.startswith("remember_") for name in steps)
    if not run.memory.exists() and was_moved_aside(run.memory):
        found.unchecked[run.memory] = "a killed process has moved it aside; the next start of the run puts it back"
    elif run.memory.exists() or remembered:
        found.attempt(run.memory / "memory.json", lambda: ReplayMemory.load(run.memory))
        # A kill may have come between writing the next one and entering it.
        found.attempt(run.memory / "memory.json", lambda: check_memory(run, max(remembered - 1, 0), remembered))
    elsewhere = config.get("demonstrations_folder")
    if elsewhere and not Path(elsewhere).exists():
        found.unchecked[Path(elsewhere)] = (
            "demonstrations outside of the run; there is nothing at this place from here"
        )
    elif not config.get("demonstrations_source"):  # else the data set is not this package's
        _demonstrations(Path(elsewhere or run / "demonstrations"), steps, found)
    cells = _stages(run, found)
    _results(run, steps, cells, found)
    if (run / ANALYSIS).exists() or "analyse" in steps:
        found.attempt(run / ANALYSIS, lambda: Analysis.load(run.path))
    if (run / "dataset_statistics.json").exists():
        file = run / "dataset_statistics.json"
        found.attempt(file, lambda: read_sealed(file, newest=2))
    return found


_OF_EVERY_RUN = frozenset({"suite", "stream", "method", "seed", "base_model"})


def _configuration(run: RunFolder, found: Verification) -> dict[str, Any]:
    file = run / "config.yaml"

    def read() -> dict[str, Any]:
        sealed = config_is_sealed(file)
        if sealed is False:
            raise DamagedFileError("its content does not match its checksum")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise DamagedFileError(f"{file} is no YAML") from error
        if not isinstance(content, dict) or not (sealed or set(content) >= _OF_EVERY_RUN):  # JSON is YAML too
            raise DamagedFileError("it holds no configuration of a run")
        if not sealed and run.seals():
            raise DamagedFileError("it has lost its last line, the checksum")
        return content

    return found.attempt(file, read) or {}


def _products(run: RunFolder, steps: Iterable[str], found: Verification) -> None:
    """Each finished step's product is there, and what is sealed is what was written."""
    finished_stages = sum(name.startswith("measure_") for name in steps)
    sums = run.checksums()
    if run.results.exists() and _stages_of(run.results) > finished_stages:
        # A kill came between writing the next column and entering it: the cells tell whether it is right.
        sums = {name: value for name, value in sums.items() if name not in ("results.json", "success.csv")}
    found.files(run.path, sums)
    for step in steps:
        what, _, stage = step.rpartition("_")
        if what == "learn" and not list((run / "adapters").glob(f"stage_{stage}_*")):
            found.damage[run / "adapters" / f"stage_{stage}_*"] = f"is missing, though step {step!r} is finished"
        if what == "merge" and not list((run / "merged").glob(f"stage_{stage}_*")):
            found.damage[run / "merged" / f"stage_{stage}_*"] = f"is missing, though step {step!r} is finished"
        if step == "base" and not run.base.is_dir():
            found.damage[run.base] = "is missing, though step 'base' is finished"


def _stages_of(results: Path) -> int:
    try:
        return Results.load(results).stages
    except (OSError, ValueError):
        return 0


def _adapter(folder: Path) -> Any:
    try:
        return check_adapter(folder)
    except AdapterError as error:  # which names the very file
        raise DamagedFileError(str(error)) from error


def _demonstrations(folder: Path, steps: Iterable[str], found: Verification) -> None:
    if not (folder / MANIFEST).exists() and "demonstrations" not in steps:
        return
    manifest = found.attempt(folder / MANIFEST, lambda: DemonstrationManifest.load(folder))
    for task in manifest.tasks.values() if manifest else ():
        for episode in task.episodes.values():
            found.attempt(folder / episode.file, partial(check_recorded, folder / episode.file, episode))
    whole, spoiled = verify_mapped(folder)
    found.checked.update(whole)
    found.damage |= dict.fromkeys(spoiled, "its content does not match its checksum; delete it, it is made again")


def _stages(run: RunFolder, found: Verification) -> dict[tuple[int, str], TaskResult]:
    """Checkpoints, Fisher information, logs and cells of every stage; gives the cells."""
    cells: dict[tuple[int, str], TaskResult] = {}
    for folder in _folders(run / "stages"):
        if (number := re.fullmatch(r"stage_(\d{2,6})", folder.name)) is None:
            continue  # somebody's own
        stage = int(number[1])
        for checkpoint in checkpoints(folder):
            found.attempt(checkpoint, partial(check_checkpoint, checkpoint))
        fisher = folder / "fisher.safetensors"
        if fisher.exists():
            found.attempt(fisher, partial(Consolidation.load, fisher, stage=stage))
        for file in sorted((folder / "rollouts").glob("*.json")):
            cell = found.attempt(file, partial(read_cell, file, stage))
            if cell is not None:
                cells[stage, cell.task] = cell
                found.files(file.parent, read_sealed(file, newest=CELL_VERSION).get("sha256", {}))
    return cells


def _results(
    run: RunFolder, steps: Iterable[str], cells: dict[tuple[int, str], TaskResult], found: Verification
) -> None:
    if not run.results.exists() and not any(name.startswith("measure_") for name in steps):
        return
    results = found.attempt(run.results, lambda: Results.load(run.results))
    if results is None:
        return
    for stage in range(results.stages):
        for task, reached, tried in zip(results.tasks, results.successes, results.episodes, strict=True):
            cell = cells.get((stage, task.name))
            file = run.cell(stage, task.name)
            if tried[stage] is not None and cell is None and file not in found.damage:
                found.damage[file] = "is missing, though results.json counts its rollouts"
            elif cell is not None and (reached[stage], tried[stage]) != (sum(cell.successes), cell.episodes):
                found.checked.discard(run.results)
                found.damage[run.results] = f"counts other rollouts than {file}; delete it and run again"


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir() and not path.name.startswith("."))
