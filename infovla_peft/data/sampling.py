"""Stratified batches of current-task and replay samples; batch number k is a pure function of (seed, k).

All randomness of the data lies here, augmentation included: a resumed run draws what the uninterrupted one would have
drawn, and two processes with batches of B draw together what one process draws with 2B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from .chunks import ChunkDataset, ReplayRows, Samples, concatenate

_PERMUTATION, _BATCH = 0, 1  # streams of random numbers under one seed


@dataclass(frozen=True)
class Augmentation:
    """Random changes of samples that have no anchors in use.

    Attributes:
        shift: images move by up to this many pixels of the model's input.
        proprio_noise: standard deviation of Gaussian noise on the normalised proprioception.
    """

    shift: int = 0
    proprio_noise: float = 0.0


@dataclass(frozen=True)
class Draw:
    """One process's part of one batch, current samples first.

    Attributes:
        current: (C,) rows of the current task's data.
        replay: (view, row) of the memory, this process's and the others'.
        shifts: (B, 2) pixels to move each sample's images by.
        proprio_noise: (B, P) noise on the normalised proprioception; None for none.
    """

    current: NDArray[np.int64]
    replay: ReplayRows
    shifts: NDArray[np.int64]
    proprio_noise: NDArray[np.float32] | None


class StratifiedBatchSampler(torch.utils.data.Sampler[Draw]):
    """Draws batches with a fixed share of replay, spread evenly over the past tasks.

    Of a batch (over all processes), round(replay_fraction · size) samples are replay, at least one, and at least two
    from two tasks where the memory has two. Tasks take turns in random order; within a task, frames are drawn
    uniformly. The current task's samples come from one random order after another, so each is used equally often.

    Args:
        current: data of the task being learned.
        memory: frames of past tasks; None for none.
        batch_size: samples per process and batch.
        replay_fraction: in [0, 1).
        batches: how many; the length of the sampler.
        seed: of everything that is drawn.
        processes, rank: this process draws every `processes`-th sample of a batch, beginning with `rank`.
        augmentation: of current samples, and of replay samples without `view_shifts`.
        view_shifts: (views, rows, 2), the shifts of the replay samples' views for which anchors are kept.

    Raises:
        ValueError: a batch too small to hold both kinds.
    """

    def __init__(
        self,
        current: ChunkDataset,
        memory: ChunkDataset | None,
        *,
        batch_size: int,
        replay_fraction: float,
        batches: int,
        seed: int,
        processes: int = 1,
        rank: int = 0,
        augmentation: Augmentation = Augmentation(),
        view_shifts: NDArray[np.int64] | None = None,
    ) -> None:
        self._batches, self._seed, self._rank, self._processes = batches, seed, rank, processes
        self._augmentation, self._view_shifts = augmentation, view_shifts
        self._current, self._width = len(current), current.states.shape[1]
        self._size = batch_size * processes
        self._by_task = [] if memory is None else [np.flatnonzero(memory.task == k) for k in range(len(memory.tasks))]
        self._frames = np.array([len(rows) for rows in self._by_task])
        self._replay = 0
        if self._by_task and replay_fraction > 0:
            fewest = min(2, len(self._by_task))
            self._replay = max(round(replay_fraction * self._size), fewest)
        if self._replay >= self._size:
            raise ValueError(
                f"a batch of {self._size} cannot hold {self._replay} replay samples and one of the current task; "
                "use larger batches or a smaller replay_fraction"
            )
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return self._batches

    @property
    def replay_size(self) -> int:
        """Replay samples per batch, over all processes."""
        return self._replay

    def __iter__(self) -> Iterator[Draw]:
        return (self.draw(number) for number in range(self._batches))

    def draw(self, number: int) -> Draw:
        """This process's part of batch `number`."""
        random = np.random.default_rng((self._seed, _BATCH, number))
        current = self._draw_current(number)
        replay, replay_shifts = self._draw_replay(random)
        size, augmentation = self._size, self._augmentation
        shifts = random.integers(-augmentation.shift, augmentation.shift + 1, (size, 2))
        noise = random.normal(0, 1, (size, self._width)).astype(np.float32) * augmentation.proprio_noise
        if replay_shifts is not None:
            shifts[len(current) :], noise[len(current) :] = replay_shifts, 0
        mine = np.arange(size) % self._processes == self._rank
        own = mine[len(current) :]
        return Draw(
            current=current[mine[: len(current)]],
            replay=ReplayRows(own=replay[own], peers=replay[~own]),
            shifts=shifts[mine],
            proprio_noise=noise[mine] if augmentation.proprio_noise else None,
        )

    def _draw_current(self, number: int) -> NDArray[np.int64]:
        wanted = self._size - self._replay
        position = np.arange(number * wanted, (number + 1) * wanted)
        rounds, places = np.divmod(position, self._current)
        rows = np.empty(wanted, dtype=np.int64)
        for turn in np.unique(rounds):
            rows[rounds == turn] = self._order(int(turn))[places[rounds == turn]]
        return rows

    def _draw_order(self, turn: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, _PERMUTATION, turn)).permutation(self._current)

    def _draw_replay(self, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        if not self._replay:
            return np.empty((0, 2), dtype=np.int64), None
        turns = random.permutation(len(self._by_task))
        tasks = turns[np.arange(self._replay) % len(turns)]
        picks = random.integers(0, self._frames[tasks])
        rows = np.array([self._by_task[task][pick] for task, pick in zip(tasks, picks, strict=True)])
        if self._view_shifts is None:
            return np.stack((np.zeros_like(rows), rows), axis=1), None
        views = random.integers(0, len(self._view_shifts), len(rows))
        return np.stack((views, rows), axis=1), self._view_shifts[views, rows]


class ReplayMixture(torch.utils.data.Dataset[Samples]):
    """The current task's data and the memory's, addressed by a sampler's `Draw`; replay samples come last."""

    def __init__(self, current: ChunkDataset, memory: ChunkDataset | None) -> None:
        self.current, self.memory = current, memory

    def __len__(self) -> int:
        return len(self.current) + (len(self.memory) if self.memory else 0)

    def __getitems__(self, draw: Draw) -> Samples:
        samples = self.current.__getitems__(draw.current)
        if self.memory is not None and len(draw.replay.own):
            samples = concatenate(samples, self.memory.__getitems__(draw.replay.own[:, 1]))
        return replace(
            samples,
            shifts=draw.shifts if draw.shifts.any() else None,
            proprio_noise=draw.proprio_noise,
            replay=draw.replay if len(draw.replay.own) + len(draw.replay.peers) else None,
        )
