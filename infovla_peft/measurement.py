"""Rollouts of what a stage has learned, one file per task and stage, gathered into results.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .distributed import exchange
from .evaluation import TaskResult, evaluate
from .inference import Policy
from .integrity import SUMS, checksums, read_sealed, write_sealed
from .methods import METHODS
from .plan import Stage, step_name, worker_count
from .report import write_report_apart
from .results import Results, TaskEntry, Video, collect_versions, source_commit
from .run_folder import RunError

if TYPE_CHECKING:
    from .simulation import Task
    from .stream import Stream

CELL_VERSION = 3  # 1 had no checksums, 2 did not say of which stage it was
_NO_RESULT = ("format_version", "stage", SUMS)


def read_cell(file: Path, stage: int) -> TaskResult:
    """The rollouts of one task after one stage.

    Args:
        file: named for the task.
        stage: whose it should be.

    Raises:
        RunError: the file is missing or damaged, or of another task or stage.
    """
    cure = "delete it and give the run's command again, which measures it again"
    try:
        content = read_sealed(file, newest=CELL_VERSION)
        result = TaskResult.from_dict({key: value for key, value in content.items() if key not in _NO_RESULT})
        found = content.get("stage", stage if content.get("format_version", 1) < CELL_VERSION else None)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); {cure}") from error
    if (found, result.task) != (stage, file.name.removesuffix(".json")):
        raise RunError(f"{file} holds rollouts of {result.task!r:.200} after stage {found!r:.20}; {cure}")
    return result


def write_cell(file: Path, result: TaskResult, videos: Path, stage: int) -> None:
    """Store the rollouts of one task after one stage, with checksums of them and of their videos.

    Args:
        file: named for the task.
        videos: folder of the MP4s.
        stage: the stage.
    """
    sums = checksums([videos / name for name in result.videos], file.parent)
    write_sealed(file, {"format_version": CELL_VERSION, "stage": stage, **result.to_dict()}, sums)


def measure_stage(stream: Stream, stage: Stage) -> None:
    """Roll out every task seen so far that has no stored cell; then write results.json and the report.

    All processes of a launch share each task's episodes; the main one gathers their results and writes.
    """
    from .simulation.workers import EnvironmentPool

    config, folder, main = stream.config, stream.run_folder, stream.run_folder.main_process
    names = exchange(_unmeasured(stream, stage) if main else [])[0]
    missing = [task for task in stream.seen(stage) if task.name in names]
    if missing:
        if main:
            print(f"{f'stage {stage.index}' if stage.index else 'base'}: rollouts of {len(missing)} tasks", flush=True)
        with EnvironmentPool(
            worker_count(config.eval_workers, shared=True),
            assets=stream.assets,
            image_size=config.image_size,
            cameras=config.cameras,
            renderer=config.renderer,
        ) as pool:
            for policy, tasks in _policies(stream, stage, missing):
                for result in evaluate(
                    policy,
                    tasks,
                    pool,
                    episodes=config.episodes(stage.index),
                    first_state=config.eval_first_state,
                    open_loop_steps=config.open_loop_steps,
                    max_steps=config.rollout_max_steps,
                    videos=config.videos_per_task,
                    video_folder=folder.videos(stage.index),
                    progress=main,
                ):
                    if main:
                        file, videos = folder.cell(stage.index, result.task), folder.videos(stage.index)
                        write_cell(file, result, videos, stage.index)
                        print(f"  {result.task}: {sum(result.successes)} of {result.episodes}", flush=True)
    if main:
        gather_results(stream, stage).save(folder.results)
        if stream.seen(stage):
            write_report_apart(folder.path)


def _unmeasured(stream: Stream, stage: Stage) -> list[str]:
    missing = [task for task in stream.seen(stage) if not stream.run_folder.cell(stage.index, task.name).exists()]
    if METHODS[stream.training.method].policy == "own":
        missing = [task for task in missing if not _measured_before(stream, stage, task)]
    return [task.name for task in missing]


def _policies(stream: Stream, stage: Stage, tasks: Sequence[Task]) -> Iterator[tuple[Policy, list[Task]]]:
    """What is evaluated after a stage, on which of the tasks."""
    if METHODS[stream.training.method].policy == "own":
        for each in stream.stages[: stage.index + 1]:
            if mine := [task for task in tasks if task in each.tasks]:
                yield stream.policy(each), mine
    else:
        yield stream.policy(stage), list(tasks)


def _measured_before(stream: Stream, stage: Stage, task: Task) -> bool:
    """Take over the rollouts of the stage before: the same adapter, states and seeds give the same result."""
    if task in stage.tasks:
        return False
    cell = read_cell(stream.run_folder.cell(stage.index - 1, task.name), stage.index - 1)
    wanted = stream.config.episodes(stage.index)
    if cell.episodes < wanted:
        return False
    same = replace(cell, successes=cell.successes[:wanted], steps=cell.steps[:wanted], seconds=0.0, videos=[])
    folder = stream.run_folder
    write_cell(folder.cell(stage.index, task.name), same, folder.videos(stage.index), stage.index)
    return True


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
        open_loop_steps=stream.open_loop_steps,
        tasks=[TaskEntry(task.name, task.instruction, each.index) for each in stream.stages for task in each.tasks],
        versions=collect_versions(),
        commit=source_commit(),
        config=stream.resolved_config(),
    )
    state = folder.state()
    for each in stream.stages[: stage.index + 1]:
        cells = [read_cell(folder.cell(each.index, task.name), each.index) for task in stream.seen(each)]
        timings = {"evaluate": round(sum(cell.seconds for cell in cells), 2)}
        spent = {"train": "base" if each.index == 0 else step_name("learn", each)}
        spent |= {"demonstrations": "demonstrations"} if each.index == 0 else {}
        timings |= {what: state[step]["seconds"] for what, step in spent.items() if step in state}
        results.add_stage(
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
