"""What a finished step of a run has left, and whether some of it is gone that can be made again.

A damaged file is never replaced unasked: an error names it, the user deletes it, and the same command makes it again,
where it follows from what is there. That is so of recorded demonstrations, the memory (which follows from them),
rollouts and results.json; not of weights, on which later stages were built.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .data.recorded import MANIFEST, DemonstrationManifest
from .integrity import sha256
from .memory import MANIFEST as MEMORY
from .memory import memory_stage
from .results import Results
from .run_folder import RunError, RunFolder


def demonstrations_are_gone(folder: Path) -> bool:
    """Whether recorded demonstrations, or the files of some of them, were deleted."""
    if not (folder / MANIFEST).exists():
        return not folder.exists()
    tasks = DemonstrationManifest.load(folder).tasks.values()
    return not all((folder / episode.file).exists() for task in tasks for episode in task.episodes.values())


def memory_is_behind(folder: Path, stage: int) -> bool:
    """Whether the memory was deleted since the end of a stage, and made again only up to an earlier one."""
    if not folder.exists():
        return True
    found = memory_stage(folder)
    return found is not None and found < stage


def check_memory(run: RunFolder, stage: int, *also: int) -> None:
    """Raise a RunError if the memory is not the one at the end of a stage, or not the one that this run kept then.

    Args:
        also: further stages whose memory will do.
    """
    found = memory_stage(run.memory)
    cure = "delete it and give the same command again, which makes it from the demonstrations"
    if found is not None and found not in (stage, *also):
        raise RunError(f"{run.memory} is the memory of stage {found}, not of stage {stage}; {cure}")
    kept = run.state().get(f"remember_{found or 0:02d}", {}).get("memory")
    if kept is not None and kept != sha256(run.memory / MEMORY):
        raise RunError(f"{run.memory} is the memory of another run; {cure}")


def column_is_gone(run: RunFolder, stage: int, tasks: Iterable[str]) -> bool:
    """Whether rollouts of a stage were deleted, or results.json, or its columns from this stage on."""
    if not all(run.cell(stage, task).exists() for task in tasks):
        return True
    try:
        return Results.load(run.results).stages <= stage
    except (OSError, ValueError):
        return True  # it follows from the rollouts
