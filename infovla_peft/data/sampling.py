"""Stratified batches of current-task and replay samples; batch number k is a pure function of (seed, k).

All randomness of the data lies here, augmentation included: a resumed run draws what the uninterrupted one would have
drawn, and two processes with batches of B draw together what one process draws with 2B.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .chunks import FrameTable, ReplayRows, Samples, concatenate

_PERMUTATION, _BATCH, _VIEWS = 0, 1, 2  # streams of random numbers under one seed

Turns = list[list[NDArray[np.int64]]]
"""What takes turns in a batch: of each turn its tasks, of each task its rows."""


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
class Views:
    """V fixed augmentations of each of N frames: a replayed sample shows what its anchor was computed from.

    Attributes:
        shifts: (V, N, 2) pixels.
        proprio_noise: (V, N, P) float32, on the normalised proprioception.
    """

    shifts: NDArray[np.int64]
    proprio_noise: NDArray[np.float32]

    @property
    def count(self) -> int:
        return len(self.shifts)

    @classmethod
    def draw(cls, data: FrameTable, count: int, augmentation: Augmentation, seed: int, *, plain: bool = True) -> Views:
        """`count` views of each row; those of a task depend on the seed and its name alone.

        Args:
            plain: the first view is the frame itself.
        """
        shifts = np.zeros((count, len(data), 2), dtype=np.int64)
        noise = np.zeros((count, *data.states.shape), dtype=np.float32)
        for number, name in enumerate(data.tasks):
            rows = np.flatnonzero(data.task == number)
            random = np.random.default_rng((seed, _VIEWS, zlib.crc32(name.encode())))
            shifts[:, rows] = random.integers(-augmentation.shift, augmentation.shift + 1, (count, len(rows), 2))
            noise[:, rows] = random.normal(0, 1, (count, len(rows), noise.shape[2])) * augmentation.proprio_noise
        if plain:
            shifts[0], noise[0] = 0, 0
        return cls(shifts, noise)

    def samples(self, table: FrameTable, rows: NDArray[np.int64], view: Any, place: Any) -> Samples:
        """`rows` of a table as these views show them; `place` is where the rows stand here, an index as `view`."""
        shown = table.__getitems__(rows)
        return replace(shown, shifts=self.shifts[view, place], proprio_noise=self.proprio_noise[view, place])

    def rows(self, rows: NDArray[np.int64]) -> Views:
        return Views(self.shifts[:, rows], self.proprio_noise[:, rows])

    @classmethod
    def join(cls, parts: Sequence[Views]) -> Views:
        return cls(
            np.concatenate([part.shifts for part in parts], 1),
            np.concatenate([part.proprio_noise for part in parts], 1),
        )


@dataclass(frozen=True)
class Draw:
    """One process's part of one batch, current samples first.

    Attributes:
        current: (C,) rows of the current task's data.
        replay: (view, row) of the replayed frames, this process's and the others'; beyond the memory's rows,
            counterfactual ones.
        shifts: (B, 2) pixels to move each sample's images by.
        proprio_noise: (B, P) noise on the normalised proprioception; None for none.
    """

    current: NDArray[np.int64]
    replay: ReplayRows
    shifts: NDArray[np.int64]
    proprio_noise: NDArray[np.float32] | None


def replay_places(batch: int, fraction: float, tasks: int) -> int:
    """Number of replay samples in a batch of all processes, with room for at least one current sample.

    Raises:
        ValueError: it is too small for that.

    >>> replay_places(8, 0.5, tasks=3), replay_places(3, 0.1, tasks=3), replay_places(8, 0.5, tasks=0)
    (4, 2, 0)
    """
    places = max(round(fraction * batch), min(2, tasks)) if tasks and fraction > 0 else 0
    if places >= batch:
        raise ValueError(
            f"a batch of {batch} cannot hold {places} replay samples and one of the current task; "
            "use larger batches or a smaller replay_fraction"
        )
    return places


class StratifiedBatchSampler(torch.utils.data.Sampler[Draw]):
    """Draws batches with a fixed share of replay, spread evenly over the past tasks.

    Of a batch (over all processes), round(replay_fraction · size) samples are replay, at least one, and at least two
    where there are two tasks. Tasks take turns in random order, or stages and within each its tasks
    (`stages`); within a task, frames are drawn uniformly. Of the replay samples, round(counterfactual_share · replay)
    are counterfactual, all where there is no memory. The current task's samples come from one random order after
    another, so each is used equally often.

    Args:
        current: data of the task being learned.
        memory: frames of past tasks; None for none.
        batch_size: samples per process and batch.
        replay_fraction: in [0, 1).
        batches: how many; the length of the sampler.
        seed: of everything that is drawn.
        processes, rank: this process draws every `processes`-th sample of a batch, beginning with `rank`.
        augmentation: of current samples, and of replay samples without `views`.
        counterfactual: frames of the current task under past instructions; their rows follow those of the memory.
        counterfactual_share: of the replay samples, in [0, 1].
        views: of all rows, memory and counterfactual, for which anchors are kept.
        candidates: that many times as many replay samples are drawn as the batch has places for; the trainer chooses.
        stages: past task → what learned it; those of one stage, and those that are not named, share one turn. None:
            each task has its own.

    Raises:
        ValueError: a batch too small to hold both kinds.
    """

    def __init__(
        self,
        current: FrameTable,
        memory: FrameTable | None,
        *,
        batch_size: int,
        replay_fraction: float,
        batches: int,
        seed: int,
        processes: int = 1,
        rank: int = 0,
        augmentation: Augmentation = Augmentation(),
        counterfactual: FrameTable | None = None,
        counterfactual_share: float = 0.0,
        views: Views | None = None,
        candidates: int = 1,
        stages: Mapping[str, str | None] | None = None,
    ) -> None:
        self._batches, self._seed, self._rank, self._processes = batches, seed, rank, processes
        self._augmentation, self._views = augmentation, views
        self._current, self._width = len(current), current.states.shape[1]
        self._size = batch_size * processes
        remembered = _rows_by_turn(memory, 0, stages)
        swapped = _rows_by_turn(counterfactual, len(memory or ()), stages)
        replay = replay_places(self._size, replay_fraction, sum(map(len, remembered or swapped)))
        places = (round(counterfactual_share * replay) if remembered else replay) if swapped else 0
        self._parts = [(remembered, candidates * (replay - places)), (swapped, candidates * places)]
        self._replay, self._candidates = replay, candidates
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return self._batches

    @property
    def replay_size(self) -> int:
        """Replay samples per batch, over all processes, candidates that are not chosen left out."""
        return self._replay

    def __iter__(self) -> Iterator[Draw]:
        return (self.draw(number) for number in range(self._batches))

    def draw(self, number: int) -> Draw:
        """This process's part of batch `number`."""
        random = np.random.default_rng((self._seed, _BATCH, number))
        current = self._draw_current(number)
        replay = np.concatenate([self._draw_replay(random, rows, count) for rows, count in self._parts])
        size, augmentation = len(current) + len(replay), self._augmentation
        shifts = random.integers(-augmentation.shift, augmentation.shift + 1, (size, 2))
        noise = random.normal(0, 1, (size, self._width)).astype(np.float32) * augmentation.proprio_noise
        if self._views is not None:
            chosen = tuple(replay.T)
            shifts[len(current) :] = self._views.shifts[chosen]
            noise[len(current) :] = self._views.proprio_noise[chosen]
        places = np.arange(len(current) + self._replay) % self._processes == self._rank
        own = np.repeat(places[len(current) :], self._candidates)  # a place's candidates stay together
        mine = np.concatenate((places[: len(current)], own))
        return Draw(
            current=current[places[: len(current)]],
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

    def _draw_replay(self, random: np.random.Generator, by_turn: Turns, count: int) -> NDArray[np.int64]:
        """(count, 2), (view, row)."""
        if not count:
            return np.empty((0, 2), dtype=np.int64)
        turns = random.permutation(len(by_turn))
        orders = [random.permutation(len(tasks)) for tasks in by_turn]
        chosen = []
        for number in range(count):
            turn, nth = turns[number % len(turns)], number // len(turns)
            chosen.append(by_turn[turn][orders[turn][nth % len(orders[turn])]])
        picks = random.integers(0, np.array([len(rows) for rows in chosen]))
        rows = np.array([rows[pick] for rows, pick in zip(chosen, picks, strict=True)])
        views = np.zeros_like(rows) if self._views is None else random.integers(0, self._views.count, len(rows))
        return np.stack((views, rows), axis=1)


def _rows_by_turn(data: FrameTable | None, offset: int, stages: Mapping[str, str | None] | None) -> Turns:
    if data is None:
        return []
    turns: dict[object, list[NDArray[np.int64]]] = {}
    for number, task in enumerate(data.tasks):
        rows = offset + np.flatnonzero(data.task == number)
        turns.setdefault(number if stages is None else stages.get(task), []).append(rows)
    return list(turns.values())


class ReplayMixture(torch.utils.data.Dataset[Samples]):
    """The current task's data and the replayed, addressed by a sampler's `Draw`; replay samples come last.

    Args:
        replayed: tables whose rows are numbered one after another, as the sampler does.
    """

    def __init__(self, current: FrameTable, replayed: Sequence[FrameTable]) -> None:
        self.current, self.replayed = current, list(replayed)

    def __len__(self) -> int:
        return len(self.current) + sum(map(len, self.replayed))

    def __getitems__(self, draw: Draw) -> Samples:
        samples, rows, first = self.current.__getitems__(draw.current), draw.replay.own[:, 1], 0
        for table in self.replayed:  # a draw's rows are in the order of the tables
            inside = rows[(rows >= first) & (rows < first + len(table))] - first
            if len(inside):
                samples = concatenate(samples, table.__getitems__(inside))
            first += len(table)
        return replace(
            samples,
            shifts=draw.shifts if draw.shifts.any() else None,
            proprio_noise=draw.proprio_noise,
            replay=draw.replay if len(draw.replay.own) + len(draw.replay.peers) else None,
        )
