"""Rollouts of a policy in LIBERO: success counts per task on held-out initial states, and videos."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .adapters import base_model
from .config import BENCHMARK_STATES
from .distributed import deal, gather_pieces, is_main
from .inference import Policy
from .policy import chunk_length
from .video import check_video, write_video

if TYPE_CHECKING:
    from .simulation.environment import Observation
    from .simulation.suites import Task
    from .simulation.workers import EnvironmentPool, EpisodeResult

CONTROL_FREQUENCY = 20.0
"""LIBERO's actions per second."""


@dataclass(frozen=True)
class TaskResult:
    """Rollouts of one policy on one task.

    Attributes:
        suite, task: LIBERO's names of both.
        successes: whether each episode reached the goal within the step cap, in the order of the initial states.
        steps: actions executed per episode.
        seconds: wall-clock time of all episodes.
        videos: names of the MP4s in the folder given for them, failures first; they play in real time and show what
            the policy saw, one frame per look.
    """

    suite: str
    task: str
    successes: list[bool]
    steps: list[int]
    seconds: float
    videos: list[str]

    @property
    def episodes(self) -> int:
        return len(self.successes)

    @property
    def rate(self) -> float:
        """Success rate in [0, 1]."""
        return sum(self.successes) / len(self.successes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TaskResult:
        return cls(**content)


def episode_seed(seed: int, task_index: int, episode: int) -> int:
    """The seed of one episode: fixture jitter is drawn from it, the same for every policy and stage."""
    return int(np.random.SeedSequence([seed, task_index, episode]).generate_state(1)[0])


def policy_actions(policy: Policy) -> Callable[[Sequence[Observation], Sequence[Task]], list[NDArray[np.float32]]]:
    """`policy` as the pool of environments wants it: observations and tasks in, LIBERO's action chunks (T, 7) out."""

    def act(observations: Sequence[Observation], tasks: Sequence[Task]) -> list[NDArray[np.float32]]:
        chunks = policy.act_batch(
            [observation.images for observation in observations],
            [task.instruction for task in tasks],
            [observation.state for observation in observations],
        )
        return list(policy.normaliser.to_env_action(chunks))

    return act


def executed_steps(policy: Policy, open_loop_steps: int) -> int:
    """Actions executed between two looks: what was asked for, as far as the policy predicts so many at a time."""
    return min(open_loop_steps, chunk_length(base_model(policy.model).config))


def check_initial_states(episodes: int, first_state: int = 0) -> None:
    """See that there are that many initial states.

    Raises:
        ValueError: there are not.
    """
    if not (episodes >= 1 and 0 <= first_state <= BENCHMARK_STATES - episodes):
        raise ValueError(
            f"LIBERO has {BENCHMARK_STATES} initial states per task; episodes must be 1 to 50, got {episodes}"
            + f" from state {first_state} on" * bool(first_state)
        )


def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    pool: EnvironmentPool,
    *,
    episodes: int = 20,
    first_state: int = 0,
    seed: int = 0,
    open_loop_steps: int = 8,
    max_steps: int | None = None,
    videos: int = 0,
    video_folder: Path | None = None,
    progress: bool = True,
) -> Iterator[TaskResult]:
    """Roll a policy out, task after task, and yield each task's result as soon as it is there.

    Episodes start from `episodes` of LIBERO's 50 fixed initial states of the task: the test set, from which no
    demonstration is ever recorded. All environments of the pool are served by one batched forward; a chunk of
    actions is executed open loop, and a frame is rendered only when the policy looks.

    Several processes share the episodes of each task, each with a pool and a policy of its own; all must call, all get
    the whole result, and the first one writes the videos.

    Args:
        episodes: rollouts per task, 1 to 50.
        first_state: the initial state of the first one; those that follow take the next ones.
        seed: of the simulation; the default is used throughout the package, whatever the seed of the training.
        open_loop_steps: actions executed of each predicted chunk, at most all of it (`executed_steps`).
        max_steps: step cap; LIBERO's own per suite by default (220, 280, 300, 520, 400).
        videos: MP4s per task in `video_folder`, failures first.

    Raises:
        ValueError: there are not that many initial states, the step cap is below 1, or `videos` below 0.
        ImportError: PyAV, which writes videos, is not installed.
    """
    check_initial_states(episodes, first_state)
    if videos < 0:
        raise ValueError(f"videos must be at least 0, got {videos}")
    if videos and video_folder is not None:
        check_video()
    open_loop_steps = executed_steps(policy, open_loop_steps)
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, or None for the suite's own step cap, got {max_steps}")
    from .simulation.workers import Episode

    act = policy_actions(policy)
    for task in tasks:
        start = time.monotonic()
        planned = [
            Episode(task, state, episode_seed(seed, task.index, state), record_video=videos > 0)
            for state in range(first_state, first_state + episodes)
        ]
        mine = deal(planned)
        options: dict[str, Any] = {"open_loop_steps": open_loop_steps, "max_steps": max_steps, "progress": progress}
        results = gather_pieces(_worth_sending(pool.run(mine, act, **options), videos) if mine else [], len(planned))
        seconds = time.monotonic() - start
        yield TaskResult(
            suite=task.suite,
            task=task.name,
            successes=[result.success for result in results],
            steps=[result.steps for result in results],
            seconds=round(seconds, 2),
            videos=_write_videos(results, videos, video_folder, open_loop_steps) if video_folder and is_main() else [],
        )


def _worth_sending(results: Sequence[EpisodeResult], videos: int) -> list[EpisodeResult]:
    """Pictures only of the episodes that may be among the first `videos` of all processes."""
    shown = _failures_first(results)[:videos]
    kept = {id(result) for result in shown}
    return [result if id(result) in kept else replace(result, frames=None) for result in results]


def _failures_first(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    return sorted(results, key=lambda result: result.success)


def _write_videos(results: Sequence[EpisodeResult], count: int, folder: Path, open_loop_steps: int) -> list[str]:
    names = []
    for result in _failures_first(results)[:count]:
        outcome = "success" if result.success else "failure"
        name = f"{result.episode.task.name}_{result.episode.initial_state_index:02d}_{outcome}.mp4"
        write_video(folder / name, result.frames or [], frames_per_second=CONTROL_FREQUENCY / open_loop_steps)
        names.append(name)
    return names
