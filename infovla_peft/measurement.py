"""The cells that a run has measured, one file per task and stage, gathered into results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .evaluation import TaskResult
from .methods import METHODS
from .plan import Stage, step_name
from .results import Results, TaskEntry, Video, collect_versions, source_commit
from .run_folder import RunError

if TYPE_CHECKING:
    from .stream import Stream


def read_cell(file: Path) -> TaskResult:
    """The rollouts of one task after one stage.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return TaskResult.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); delete it and measure again") from error


def gather_results(stream: Stream, stage: Stage) -> Results:
    """All that is measured up to and including a stage.

    Raises:
        RunError: a cell is missing or damaged.
    """
    from .simulation import STEP_CAPS

    config, training, folder = stream.config, stream.training, stream.run_folder
    results = Results(
        method=training.method,
        stream=config.stream,
        suite=config.suite,
        seed=training.seed,
        base_model=config.base_model,
        teacher=training.teacher if METHODS[training.method].has_teacher else None,
        assets=stream.assets.name,
        renderer=config.renderer,
        step_cap=config.rollout_max_steps or STEP_CAPS[config.suite],
        open_loop_steps=config.open_loop_steps,
        tasks=[TaskEntry(task.name, task.instruction, each.index) for each in stream.stages for task in each.tasks],
        versions=collect_versions(),
        commit=source_commit(),
        config=stream.resolved_config(),
    )
    state = folder.state()
    for each in stream.stages[: stage.index + 1]:
        cells = [read_cell(folder.cell(each.index, task.name)) for task in stream.seen(each)]
        timings = {"evaluate": round(sum(cell.seconds for cell in cells), 2)}
        spent = {"train": "base" if each.index == 0 else step_name("learn", each)}
        spent |= {"demonstrations": "demonstrations"} if each.index == 0 else {}
        timings |= {what: state[step]["seconds"] for what, step in spent.items() if step in state}
        results.add_row(
            each.index,
            {cell.task: (sum(cell.successes), cell.episodes) for cell in cells},
            timings=timings,
            videos=[
                Video(
                    str((folder.videos(each.index) / name).relative_to(folder.path)),
                    cell.task,
                    each.index,
                    name.endswith("_success.mp4"),
                )
                for cell in cells
                for name in cell.videos
            ],
        )
    return results
