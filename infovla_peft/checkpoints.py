"""Trainer checkpoints: written aside, flushed, sealed with checksums, then given their name; the last whole one found.

checkpoint-120/checkpoint.json    a checksum of itself and of every other file of the checkpoint
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from .files import fsync, fsync_tree, remove_folder
from .integrity import DamagedFileError, check_files, checksums, files_below, read_sealed, write_sealed

MANIFEST = "checkpoint.json"
STAGING = ".writing"
"""Folder beside the checkpoints in which one is written; what is in it after a kill is worth nothing."""
FORMAT_VERSION = 2
_STATE = ("optimizer.pt", "scheduler.pt")
_log = logging.getLogger(__name__)


def publish_checkpoint(staged: Path, target: Path) -> None:
    """Seal a checkpoint that was written aside, and move it to its place."""
    content = {"format_version": FORMAT_VERSION, "checkpoint": target.name, "training": target.parent.name}
    write_sealed(staged / MANIFEST, content, checksums(files_below(staged), staged))
    fsync_tree(staged)
    if target.exists():  # of the same step, by a training that was continued from an earlier one
        remove_folder(target)
    staged.rename(target)
    fsync(target.parent)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a training's output folder, by their steps, whole or not."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return [path for _, path in sorted(found)]


def check_checkpoint(folder: Path) -> None:
    """Raise a DamagedFileError that names a file of a checkpoint which is not what was written, or not of here."""
    content = _manifest(folder)
    if content.get("checkpoint") != folder.name:
        raise DamagedFileError(f"{folder} holds another checkpoint ({content.get('checkpoint')})")
    stages = [str(content.get("training")), folder.resolve().parent.name]
    if all(name.startswith("stage_") for name in stages) and stages[0] != stages[1]:  # others may be renamed
        raise DamagedFileError(f"{folder} holds a checkpoint of another training ({stages[0]})")
    check_files(folder, content["sha256"])


def check_whole(checkpoint: str | os.PathLike[str]) -> None:
    """Raise a DamagedFileError if a file is not what was written; the checkpoint may have been moved and renamed."""
    folder = Path(checkpoint)
    try:
        check_files(folder, _manifest(folder)["sha256"])
    except DamagedFileError as error:
        cure = "go on from another checkpoint, or from the last whole one by resume_from_checkpoint=True"
        raise DamagedFileError(error.with_cure(cure)) from error


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_sealed(folder / MANIFEST, newest=FORMAT_VERSION)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{folder / MANIFEST} is missing") from error


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a training's output folder; one that is damaged is named and not used."""
    for path in reversed(checkpoints(folder)):
        try:
            check_checkpoint(path)
        except (DamagedFileError, OSError) as error:
            _log.warning("%s; this checkpoint is not used", error)
        else:
            return str(path)
    return None


def check_continuable(checkpoint: str | os.PathLike[str], *, sharded: bool) -> None:
    """Raise a ValueError if no training can go on from there.

    Args:
        sharded: FSDP trains now. A checkpoint saved under FSDP is known by its optimiser's file, one of DeepSpeed's,
            which has optimiser and schedule in files of its own, by the folder that is named by the step.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        there = ", ".join(path.name for path in checkpoints(folder.parent)) or "none"
        raise FileNotFoundError(f"there is no checkpoint at {folder}; there are in {folder.parent}: {there}")
    if sharded or (not (folder / "optimizer.pt").exists() and any(folder.glob("optimizer*"))):
        raise ValueError(
            f"{folder}: a stage under FSDP2 cannot be continued from a checkpoint; delete {folder.parent}/checkpoint-*"
            " to repeat the stage, and use DDP (recipes/accelerate/ddp.yaml) where stages must be continuable"
        )
    # Without any of these, Trainer would go on all the same, with new ones.
    needed = ["rng_state*.pth"] if any(folder.glob("global_step*")) else [*_STATE, "rng_state*.pth"]
    if missing := [name for name in needed if not any(folder.glob(name))]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, so that a training would go on as another one; delete this "
            f"checkpoint to go on from the one before, or {folder.parent}/checkpoint-* to repeat the stage"
        )


def keep_newest(folder: Path, limit: int | None) -> None:
    """Remove all but the `limit` checkpoints of the highest steps; None or 0 keeps all. No clock decides."""
    for path in checkpoints(folder)[: -limit or None] if limit else []:
        remove_folder(path)
