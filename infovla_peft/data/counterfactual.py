"""Frames of the current task under the instructions of earlier ones: what would the robot do if it were told that?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from .chunks import ChunkDataset, Samples


class CounterfactualDataset(torch.utils.data.Dataset[Samples]):
    """Frames of the current task, each told to do one of the past tasks; the actions are the frozen teacher's.

    Needs no memory of past tasks but their instructions. It keeps the policy listening: the frames are those on which
    the new task is learned, so only the words can tell what to do. All views of a frame have the label of the first,
    which is shifted as the others are: as augmentation has it of demonstrations.

    Args:
        source: the current task's data.
        instructions: of the past tasks, by their names, in the order of learning.
        frames: how many rows; tasks get equal numbers of them. Where `source` has fewer frames, they are used again.
        seed: of the choice.

    Raises:
        ValueError: fewer rows than tasks.
    """

    def __init__(self, source: ChunkDataset, instructions: Mapping[str, str], *, frames: int, seed: int) -> None:
        if frames < len(instructions):
            raise ValueError(f"counterfactual_frames must be at least {len(instructions)}, one per past task")
        self.source, self.tasks = source, list(instructions)
        self._instructions = list(instructions.values())
        random = np.random.default_rng((seed, len(instructions)))
        rounds = -(-frames // len(source))
        rows = np.concatenate([random.permutation(len(source)) for _ in range(rounds)])[:frames]
        self.task: NDArray[np.int64] = np.sort(np.arange(frames) % len(self.tasks))
        self.rows: NDArray[np.int64] = rows
        self.states: NDArray[np.float32] = source.states[rows]
        self.frame: NDArray[np.int64] = source.frame[rows]
        # One frame under two instructions is two moments: each is a negative of the other.
        self.trajectory: NDArray[np.int64] = self.task * source.num_episodes + source.episode[rows]
        self._answers: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pipeline(self) -> object:
        return self.source.pipeline

    def answer(self, actions: NDArray[np.float32]) -> None:
        """Set the teacher's answers: (N, T, A), the model's convention, not normalised.

        Of a model that predicts one action at a time T is 1, however long the source's chunks are.
        """
        length = self.source.chunk
        self._answers = actions if actions.shape[1] == length else actions.repeat(length, axis=1)

    def __getitems__(self, rows: Sequence[int] | NDArray[np.int64]) -> Samples:
        index = np.asarray(rows, dtype=np.int64)
        samples = self.source.__getitems__(self.rows[index])
        return replace(
            samples,
            instructions=[self._instructions[number] for number in self.task[index]],
            actions=samples.actions if self._answers is None else self._answers[index],
        )
