"""Rollouts in worker processes: order, independence of scheduling, and clear errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest

from infovla_peft.simulation import (
    AssetSet,
    EnvironmentPool,
    Episode,
    EpisodeResult,
    LiberoEnvironment,
    Observation,
    Task,
    WorkerError,
    find_assets,
    find_task,
    jobs,
    workers,
)

pytestmark = pytest.mark.libero
STEPS = 20


@pytest.fixture(scope="module")
def assets() -> AssetSet:
    return find_assets("primitive")


def policy(observations: list[Observation], tasks: list[Task]) -> list[np.ndarray]:
    """A function of what is seen, so that any mix-up of environments shows in the result."""
    chunks = []
    for observation, task in zip(observations, tasks, strict=True):
        shift = np.tanh(observation.state[:6] + observation.images["agentview"].mean() / 255 + task.index)
        chunks.append(np.repeat(np.append(0.5 * shift, 1.0)[None], 8, axis=0))
    return chunks


def slow_when(odd: bool) -> Callable[[list[Observation], list[Task]], list[np.ndarray]]:
    calls = iter(range(1000))

    def act(observations: list[Observation], tasks: list[Task]) -> list[np.ndarray]:
        time.sleep(0.2 if next(calls) % 2 == odd else 0.0)
        return policy(observations, tasks)

    return act


def summary(results: list[EpisodeResult]) -> list[tuple[Episode, bool, int, list[int]]]:
    return [
        (result.episode, result.success, result.steps, [int(frame.sum(dtype=np.int64)) for frame in result.frames])
        for result in results
        if result.frames is not None
    ]


def test_results_do_not_depend_on_workers_or_time(assets: AssetSet) -> None:
    tasks = [find_task("libero_goal", index) for index in (7, 7, 7, 1, 1)]
    episodes = [Episode(task, index, seed=index, record_video=True) for index, task in enumerate(tasks)]
    with EnvironmentPool(1, assets=assets, image_size=32) as pool:
        alone = summary(pool.run(episodes, policy, max_steps=STEPS))
    with EnvironmentPool(2, assets=assets, image_size=32) as pool:
        together = [summary(pool.run(episodes, slow_when(odd), max_steps=STEPS)) for odd in (False, True)]
    assert [episode for episode, *_ in alone] == episodes
    assert [steps for _, _, steps, _ in alone] == [STEPS] * 5
    assert all(len(frames) == 4 for *_, frames in alone)  # looks before steps 0, 8 and 16, and the end
    assert together == [alone, alone]

    # The same in this process, by hand.
    with LiberoEnvironment(tasks[0], assets=assets, image_size=32) as environment:
        environment.reset(initial_state=0, seed=0)
        frames = []
        for look in range(0, STEPS, 8):
            observation = environment.observe()
            frames.append(observation.images["agentview"])
            for action in policy([observation], [tasks[0]])[0][: STEPS - look]:
                environment.step(action)
        frames.append(environment.observe().images["agentview"])
    assert [int(frame.sum(dtype=np.int64)) for frame in frames] == alone[0][3]


def test_what_the_policy_saw_stays_when_the_next_pictures_come(assets: AssetSet) -> None:
    seen: list[Observation] = []
    copies: list[dict[str, np.ndarray]] = []

    def act(observations: list[Observation], tasks: list[Task]) -> list[np.ndarray]:
        seen.extend(observations)
        copies.extend({camera: image.copy() for camera, image in each.images.items()} for each in observations)
        return policy(observations, tasks)

    episode = Episode(find_task("libero_goal", 7), 2, seed=5, record_video=True)
    cameras = ("agentview", "robot0_eye_in_hand")
    with EnvironmentPool(1, assets=assets, image_size=24, cameras=cameras) as pool:
        (result,) = pool.run([episode], act, max_steps=STEPS)
    assert result.frames is not None
    for observation, copy, frame in zip(seen, copies, result.frames, strict=False):
        for camera in cameras:
            np.testing.assert_array_equal(observation.images[camera], copy[camera])
        np.testing.assert_array_equal(observation.images["agentview"], frame)
    assert len(result.frames) == len(seen) + 1 == 4
    assert len({observation.images["robot0_eye_in_hand"].tobytes() for observation in seen}) == 3


def test_an_episode_ends_with_success(assets: AssetSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # "Turn on the stove" with the knob far over the threshold: the goal holds after the first step.
    task = find_task("libero_goal", 7)
    with LiberoEnvironment(task, assets=assets, image_size=16) as environment:
        environment.reset(initial_state=0, seed=0)
        state = environment.start.simulation.copy()
        (knob,) = environment.env.get_object("flat_stove_1").joints
        state[1 + environment.env.sim.model.get_joint_qpos_addr(knob)] = 1.0
        environment.reset(initial_state=state, seed=0)
        assert environment.step(np.zeros(7))


def test_a_dead_worker_is_named(assets: AssetSet) -> None:
    episodes = [Episode(find_task("libero_goal", 7), index, seed=40 + index) for index in range(2)]
    with EnvironmentPool(2, assets=assets, image_size=16) as pool:

        def act(observations: list[Observation], tasks: list[Task]) -> list[np.ndarray]:
            os.kill(pool._workers[1].process.pid, signal.SIGKILL)
            return policy(observations, tasks)

        message = r"start state 1, seed 41 died by SIGKILL \(exit code -9\), as 2 others before it.*fewer workers"
        with pytest.raises(WorkerError, match=message):
            pool.run(episodes, act, max_steps=STEPS)
        assert pool._workers == []
        assert len(pool.run(episodes[:1], policy, max_steps=2)) == 1  # new workers are started


def test_a_lost_worker_is_replaced_and_its_episode_counts_once(
    assets: AssetSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies, crashes within the simulator, or hangs, in the middle of an episode."""
    task = find_task("libero_goal", 7)
    episodes = [Episode(task, index, seed=index, record_video=True) for index in range(3)]
    with EnvironmentPool(2, assets=assets, image_size=32) as pool:
        whole = summary(pool.run(episodes, policy, max_steps=STEPS))
        for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP):
            batches: list[int] = []
            worker = pool._workers[1]
            process = worker.process

            def act(observations: list[Observation], tasks: list[Task]) -> list[np.ndarray]:
                batches.append(len(observations))  # noqa: B023
                if len(batches) == 2:  # noqa: B023
                    os.kill(process.pid, number)  # noqa: B023
                    if number == signal.SIGSTOP:  # noqa: B023
                        be_impatient(worker, monkeypatch)  # noqa: B023
                return policy(observations, tasks)

            assert summary(pool.run(episodes, act, max_steps=STEPS)) == whole
            assert batches == [2, 2, 2, 1, 1, 1]  # the policy was not asked again
            assert worker.process is not process
            assert process.returncode == (-signal.SIGKILL if number == signal.SIGSTOP else -number)


@pytest.mark.parametrize("problem", [None, "gave no answer"])
def test_a_worker_that_does_not_end_is_killed(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_FAREWELL", 0.2)
    worker = workers._Worker.__new__(workers._Worker)
    worker.connection, theirs = Pipe()
    theirs.close()  # as a worker whose simulator closed what it should not, and hangs
    worker.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert worker._bury(problem) == (problem or "died by SIGKILL (exit code -9)")
    assert worker.process.poll() == -signal.SIGKILL


def be_impatient(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had been silent for as long as it may; the next one gets its time."""
    timeout, launch = worker._timeout, worker._launch

    def relaunch() -> None:
        worker._timeout = timeout
        launch()

    worker._timeout = 0.0
    monkeypatch.setattr(worker, "_launch", relaunch)


def test_a_failure_in_a_worker_is_named(assets: AssetSet) -> None:
    episode = Episode(find_task("libero_goal", 7), 0, seed=3)
    with EnvironmentPool(1, assets=assets, image_size=16) as pool:
        with pytest.raises(WorkerError, match=r"(?s)start state 0, seed 3 failed.*seven finite numbers"):
            pool.run([episode], lambda seen, _: [np.full((8, 7), np.nan)] * len(seen))
        with pytest.raises(ValueError, match=r"must return 1 chunks of actions \(T, 7\), not \[\(7,\)\]"):
            pool.run([episode], lambda seen, _: [np.zeros(7)] * len(seen))
    with pytest.raises(ValueError, match="at least one worker"):
        EnvironmentPool(0, assets=assets)
    with pytest.raises(ValueError, match="at least one camera"):
        EnvironmentPool(1, assets=assets, cameras=())
