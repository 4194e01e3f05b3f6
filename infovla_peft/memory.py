"""The replay memory: a few trajectories of each past task, and what the frozen teacher makes of their frames.

memory/
  frames/               Arrow: the kept rows of the demonstrations, images included
  anchors.safetensors   with a checksum, what the frozen teacher made of each frame; a task's are computed once
  memory.json           tasks, number of frames, and a checksum of itself and of each file below frames/
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .files import atomic_folder, check_replaceable, scratch_folder
from .integrity import DamagedFileError, check_files, checksums, files_below, read_sealed, write_sealed
from .losses import CrossModalSummary
from .tensor_files import empty_tensor, load_tensors, save_tensors

FORMAT_VERSION = 3  # 2 had no checksums of its manifest and its anchors: they are computed again

MANIFEST = "memory.json"


@dataclass(frozen=True)
class Anchors:
    """What the teacher makes of N frames, each in V views (see `data.sampling.Views`).

    Attributes:
        action: (V, N, D) float32, the anchors of RAC.
        affinity: (V, N, Nv, Nl) float32, vision-language affinities, 0 beyond the instruction.
        fused: (V, N, F) float32, vision-language latents.
        output: (V, N, K, O) float32, the teacher's output, see `features.policy_output`.
        words: (N,) number of language tokens.
        shifts: (V, N, 2) pixels.
        spec: for each task, in the order of its rows, what its anchors were computed with; other values mean other
            anchors. The key "rows" tells how many there are.
    """

    action: Tensor
    affinity: Tensor
    fused: Tensor
    output: Tensor
    words: Tensor
    shifts: Tensor
    spec: Mapping[str, Mapping[str, str]]

    def __len__(self) -> int:
        return self.action.shape[1]

    def summary(self, rows: Tensor, longest: int) -> CrossModalSummary:
        """What CMI compares with, of frames given as (view, row) (B, 2), their instructions padded to `longest`."""
        view, row = rows.unbind(1)
        mask = torch.arange(longest, device=rows.device) < self.words[row][:, None]  # (B, Nl)
        affinity = self.affinity[view, row, :, :longest]
        affinity = F.pad(affinity, (0, longest - affinity.shape[-1]))
        patches = torch.ones(affinity.shape[:2], dtype=torch.bool, device=rows.device)
        return CrossModalSummary(affinity, self.fused[view, row], patches, mask)

    def to(self, device: torch.device | str) -> Anchors:
        return Anchors(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, spec=self.spec)

    def tensors(self) -> dict[str, Tensor]:
        names = ("action", "affinity", "fused", "output", "words", "shifts")
        return {name: getattr(self, name) for name in names}

    def of_task(self, task: str) -> Anchors:
        """The rows of one task of `spec`."""
        counts = [int(each["rows"]) for each in self.spec.values()]
        place = list(self.spec).index(task)
        rows = slice(sum(counts[:place]), sum(counts[: place + 1]))
        tensors = {
            name: tensor[rows] if name == "words" else tensor[:, rows] for name, tensor in self.tensors().items()
        }
        return Anchors(**tensors, spec={task: self.spec[task]})

    @classmethod
    def join(cls, parts: Sequence[Anchors], folder: str | os.PathLike[str] | None = None) -> Anchors:
        """The rows of several tables with equal numbers of views, one after another.

        Args:
            folder: on a disk with room for them, where they are put as by `on_disk`, and never are in memory.
                None: in memory.
        """
        if len(parts) == 1:
            return parts[0]
        rows = sum(len(part) for part in parts)
        longest = max(part.affinity.shape[3] for part in parts)
        tensors = {}
        with nullcontext() if folder is None else scratch_folder(Path(folder), "anchors") as scratch:
            for name, like in parts[0].tensors().items():
                shape = [rows] if name == "words" else [like.shape[0], rows, *like.shape[2:]]
                shape[3:] = [longest] if name == "affinity" else shape[3:]
                tensors[name] = whole = empty_tensor(shape, like.dtype, None if scratch is None else scratch / name)
                first = 0
                for part in parts:
                    mine, place = part.tensors()[name], slice(first, first + len(part))
                    first += len(part)
                    if name == "affinity":
                        whole[:, place, :, mine.shape[3] :] = 0
                        whole[:, place, :, : mine.shape[3]] = mine
                    elif name == "words":
                        whole[place] = mine
                    else:
                        whole[:, place] = mine
        return cls(**tensors, spec={task: spec for part in parts for task, spec in part.spec.items()})

    def save(self, path: Path) -> None:
        spec = json.dumps({task: dict(spec) for task, spec in self.spec.items()})
        save_tensors(path, self.tensors(), {"spec": spec})

    def on_disk(self, folder: str | os.PathLike[str]) -> Anchors:
        """The same, mapped from a file without a name: rows are read when they are used, and take no memory.

        Args:
            folder: on a disk with room for them; the file is gone with the last of its tensors.
        """
        with scratch_folder(Path(folder), "anchors") as scratch:
            self.save(scratch / "anchors.safetensors")
            return Anchors.load(scratch / "anchors.safetensors")

    @classmethod
    def load(cls, path: Path) -> Anchors:
        """Read what `save` wrote.

        Raises:
            DamagedFileError: it is damaged, or holds something else.
        """
        tensors, notes = load_tensors(path)
        try:
            return cls(**tensors, spec=json.loads(notes["spec"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} holds no anchors ({error})") from error


class ReplayMemory:
    """Rows of the kept demonstrations, oldest task first, and their anchors.

    Args:
        frames: rows as `data.chunks.ChunkDataset` wants them; None for an empty memory.
        anchors: of the same rows, or of the first of them; None until a stage has computed them.
        folder: where it is kept; set by `save` and `load`.
        stage: at the end of which it was saved; None if it was not said.

    Example:
        >>> memory = ReplayMemory()
        >>> len(memory), memory.tasks
        (0, [])
    """

    def __init__(
        self,
        frames: datasets.Dataset | None = None,
        anchors: Anchors | None = None,
        folder: Path | None = None,
        stage: int | None = None,
    ) -> None:
        if anchors is not None and len(anchors) > (0 if frames is None else len(frames)):
            raise ValueError(f"{len(anchors)} anchors do not belong to {0 if frames is None else len(frames)} frames")
        self.frames, self.anchors, self.folder, self.stage = frames, anchors, folder, stage

    def __len__(self) -> int:
        """Number of frames."""
        return 0 if self.frames is None else len(self.frames)

    @property
    def tasks(self) -> list[str]:
        """The past tasks, oldest first."""
        return list(dict.fromkeys(self.frames["task"])) if self.frames is not None else []

    @property
    def instructions(self) -> dict[str, str]:
        """Name → instruction of the past tasks, oldest first."""
        return (
            dict(zip(self.frames["task"], self.frames["instruction"], strict=True)) if self.frames is not None else {}
        )

    def add(self, demonstrations: datasets.Dataset, *, trajectories: int = 1, seed: int = 0) -> ReplayMemory:
        """A memory that also holds some random trajectories of each task in `demonstrations`. Paper, §4.1: one.

        The choice depends on the seed and the task's name alone. The anchors of earlier tasks stay.

        Args:
            demonstrations: rows, as of `load_demonstrations`.
            trajectories: of each task, ≥ 0.

        Raises:
            TypeError: `demonstrations` is no table.
            ValueError: a task is in the memory already, or `trajectories` is below 0.
        """
        if not isinstance(demonstrations, datasets.Dataset):
            raise TypeError(
                f"a memory is made of the rows of a datasets.Dataset, as load_demonstrations gives them without "
                f"streaming=True, got {type(demonstrations).__name__}"
            )
        if trajectories < 0:
            raise ValueError(f"trajectories must be at least 0, got {trajectories}")
        task, episode = np.array(demonstrations["task"]), np.array(demonstrations["episode_index"])
        again = sorted(set(task) & set(self.tasks))
        if again:
            raise ValueError(f"the memory already holds {', '.join(again)}")
        rows: list[NDArray[np.int64]] = []
        for name in dict.fromkeys(task.tolist()):
            known = np.unique(episode[task == name])
            random = np.random.default_rng([seed, *name.encode()])
            kept = np.sort(random.permutation(known)[:trajectories])
            rows.append(np.flatnonzero((task == name) & np.isin(episode, kept)))
        chosen = demonstrations.select(np.concatenate(rows))
        if not len(chosen):
            return self
        frames = chosen if self.frames is None else datasets.concatenate_datasets([self.frames, chosen])
        return ReplayMemory(frames, self.anchors)

    def with_anchors(self, anchors: Anchors, *, save: bool = True) -> ReplayMemory:
        """The same memory with anchors; written into its folder, if it has one, unless `save` is False."""
        if save and self.folder is not None:
            anchors.save(self.folder / "anchors.safetensors")
        return ReplayMemory(self.frames, anchors, self.folder, self.stage)

    def save(self, folder: str | os.PathLike[str], *, stage: int | None = None) -> ReplayMemory:
        """Write the memory, replacing an older one atomically. Gives it as it is read from there.

        Args:
            stage: after which it is saved; stored with it, so that the memory of another stage is recognised.

        Raises:
            FileExistsError: the folder holds something else than a memory.
        """
        path = Path(folder)
        check_replaceable(path, ("frames", "anchors.safetensors", MANIFEST), "a memory")
        with atomic_folder(path) as temporary:
            if self.frames is not None:
                self.frames.save_to_disk(str(temporary / "frames"))
            if self.anchors is not None:
                self.anchors.save(temporary / "anchors.safetensors")
            content = {"format_version": FORMAT_VERSION, "stage": stage, "tasks": self.tasks, "frames": len(self)}
            write_sealed(temporary / MANIFEST, content, checksums(files_below(temporary / "frames"), temporary))
        return ReplayMemory.load(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ReplayMemory:
        """Read a memory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another format.
        """
        path = Path(folder)
        content = _read_manifest(path / MANIFEST)
        try:
            check_files(path, content["sha256"])
        except DamagedFileError as error:
            raise DamagedFileError(error.with_cure(_cure(path))) from error
        frames = datasets.load_from_disk(str(path / "frames")) if content["frames"] else None
        file = path / "anchors.safetensors"
        if not file.exists() or content["format_version"] < FORMAT_VERSION:
            return cls(frames, None, path, content.get("stage"))
        try:
            return cls(frames, Anchors.load(file), path, content.get("stage"))
        except ValueError as error:
            raise DamagedFileError(f"{file} is damaged; delete it, and the next run computes it again") from error


def memory_stage(folder: Path) -> int | None:
    """At the end of which stage the memory in a folder was saved; None if it does not say. Errors as of `load`."""
    stage: int | None = _read_manifest(folder / MANIFEST).get("stage")
    return stage


def _cure(folder: Path) -> str:
    return f"delete {folder}, and the run's own command makes it again from the demonstrations"


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no replay memory at {file.parent}; it is written at the end of the base stage")
    try:
        content = read_sealed(file, newest=FORMAT_VERSION, sealed_since=3)
        if content["format_version"] < 2:
            raise DamagedFileError(f"{file} has format {content['format_version']}, which is read no more")
        stage = content.get("stage")
        wrong = not isinstance(content["sha256"], dict) or not isinstance(content["frames"], int)
        if wrong or not (stage is None or type(stage) is int):
            raise DamagedFileError(f"{file} is damaged")
    except KeyError as error:
        raise DamagedFileError(f"{file} lacks {error}; {_cure(file.parent)}") from error
    except DamagedFileError as error:
        raise DamagedFileError(error.with_cure(_cure(file.parent))) from error
    return content
