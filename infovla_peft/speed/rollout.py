"""Rollouts of a tiny policy in worker processes, beside the physics alone and beside a plain loop.

A rollout renders two cameras and asks the policy before every eighth step. *physics* is the same worker processes
executing the same actions without looking. *plain_loop* is LIBERO's own environment, one, in this process, which
renders both cameras as LIBERO does (reflections, multisampling) on every step. Times begin when an episode has begun:
nobody's resets count. The states of the plain loop are compared with ours after every step, to the last bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..command_options import positive
from ..data.normalisation import Normaliser
from ..evaluation import episode_seed, policy_actions
from ..inference import Policy
from ..models.openvla import build_tiny_openvla
from ..simulation import (
    EnvironmentPool,
    Episode,
    LiberoEnvironment,
    Observation,
    Task,
    find_assets,
    find_task,
)
from ..simulation.workers import Act
from .harness import Report, interleave
from .plain_loop import PlainLoop

CHUNK = 8
CAMERAS = ("agentview", "robot0_eye_in_hand")
PROCESSES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `infovla bench rollout`."""
    parser.add_argument("--suite", default="libero_goal", help="LIBERO suite")
    parser.add_argument("--task", default="1", help="number or name of the task")
    parser.add_argument("--assets", default="auto", choices=("auto", "official", "primitive"), help="asset set")
    parser.add_argument("--assets_folder", help="folder of the official assets")
    parser.add_argument("--renderer", default="fast", choices=("fast", "exact"), help="of our rollouts")
    parser.add_argument("--image_size", type=positive, default=128, help="side of the rendered images in pixels")
    parser.add_argument("--chunks", type=positive, default=6, help="looks of the policy per rollout, 8 steps each")
    parser.add_argument("--repetitions", type=positive, default=4, help="rounds that count; fewer than --chunks")


def run(options: argparse.Namespace) -> Report:
    """Measure.

    Raises:
        ValueError: the plain loop would run longer than the rollout.
        RuntimeError: the plain loop's states are not ours, or an episode ended early.
    """
    if options.repetitions >= options.chunks:
        raise ValueError("a round of the plain loop takes one chunk, the warm-up too: give more --chunks")
    task = find_task(options.suite, options.task)
    assets = find_assets(options.assets, options.assets_folder)
    watch, steps = Stopwatch(), options.chunks * CHUNK
    policy = random_policy([task.instruction], options.image_size)
    look = policy_actions(policy)
    episodes = [Episode(task, state, episode_seed(0, task.index, state)) for state in range(PROCESSES)]
    with EnvironmentPool(
        PROCESSES, assets=assets, image_size=options.image_size, cameras=CAMERAS, renderer=options.renderer
    ) as pool:
        actions, looks = record(pool, episodes, look, steps)
        replica = LiberoEnvironment(task, assets=assets)
        replica.reset(initial_state=episodes[0].initial_state_index, seed=episodes[0].seed)
        plain = PlainLoop(task, assets, options.image_size, replica.start)

        def rollout(processes: int) -> Callable[[], None]:
            return lambda: watch.time_looks(pool, episodes[:processes], look, steps)

        def physics() -> None:
            def act(observations: list[Observation], tasks: list[Task]) -> list[NDArray[Any]]:
                watch.start()
                return list(actions)

            pool.run(episodes, act, open_loop_steps=steps, max_steps=steps)
            watch.stop()

        def plain_loop() -> None:
            with watch.running():
                done = len(plain.states)
                look([Observation(plain.images(), looks[done // CHUNK][0].state)], [task])
                for action in actions[0][done : done + CHUNK]:
                    plain.step(action)

        contestants = {
            "rollout_2_processes": rollout(PROCESSES),
            "physics_2_processes": physics,
            "rollout_1_process": rollout(1),
            "plain_loop": plain_loop,
        }
        seconds = interleave(contestants, repetitions=options.repetitions, clock=watch)
    looked = (options.chunks - 1) * CHUNK
    executed = dict(zip(contestants, (PROCESSES * looked, PROCESSES * steps, looked, CHUNK), strict=True))
    rates = {name: [executed[name] / each for each in seconds[name]] for name in contestants}
    report = Report(f"rollouts: {task}, {assets.name} assets, two cameras at {options.image_size} px, {steps} steps")
    for name, samples in rates.items():
        report.add_figure(f"steps_per_second_{name}", samples, "1/s")
    ours = rates["rollout_2_processes"]
    report.add_ratio("steps_per_second_ratio_physics", ours, rates["physics_2_processes"], at_least=0.6)
    report.add_ratio("steps_per_second_ratio_plain_loop", ours, rates["plain_loop"], at_least=5)
    report.add_ratio("scaling_2_processes", ours, rates["rollout_1_process"], at_least=1.7)
    report.add_figure("policy_seconds_batch_2", time_policy(look, looks[0], task), "s")
    report.note("renderer", {"rollout": options.renderer, "plain_loop": "exact"})
    report.note("assets", assets.name)
    report.note("states_equal_steps", compare(plain, replica, actions[0], [seen[0] for seen in looks]))
    plain.close()
    replica.close()
    return report


class Stopwatch:
    """A clock that runs only between `start` and `stop`; calling it gives seconds."""

    def __init__(self) -> None:
        self._total, self._since = 0.0, 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._total += time.perf_counter() - self._since

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def __call__(self) -> float:
        return self._total

    def time_looks(self, pool: EnvironmentPool, episodes: Sequence[Episode], look: Act, steps: int) -> None:
        """Run episodes, timed from the first time the policy looks to the last: whole rounds of look and chunk."""
        calls = 0

        def act(observations: list[Observation], tasks: list[Task]) -> Sequence[NDArray[Any]]:
            nonlocal calls
            calls += 1
            if calls == 1:
                self.start()
            elif calls * CHUNK == steps:
                self.stop()
            return look(observations, tasks)

        pool.run(episodes, act, open_loop_steps=CHUNK, max_steps=steps)


def random_policy(instructions: Sequence[str], image_size: int) -> Policy:
    """A tiny OpenVLA-OFT with random weights that sees two cameras."""
    model, processor = build_tiny_openvla(
        instructions=instructions, image_size=image_size, num_images=len(CAMERAS), seed=0
    )
    normaliser = Normaliser(model.norm_stats, "tiny", bounds=model.config.action_normalization)
    return Policy(model, processor, normaliser, cameras=CAMERAS)


def record(
    pool: EnvironmentPool, episodes: Sequence[Episode], look: Act, steps: int
) -> tuple[list[NDArray[np.float64]], list[list[Observation]]]:
    """Roll out once: each episode's actions (steps, 7), and what was seen at each look.

    Raises:
        RuntimeError: an episode ended early.
    """
    chunks: list[NDArray[np.float64]] = []
    looks: list[list[Observation]] = []

    def act(observations: list[Observation], tasks: list[Task]) -> Sequence[NDArray[Any]]:
        looks.append(observations)
        chunks.append(np.asarray(look(observations, tasks), np.float64))
        return list(chunks[-1])

    for result in pool.run(episodes, act, open_loop_steps=CHUNK, max_steps=steps):
        if result.steps != steps:
            raise RuntimeError(f"{result.episode} reached its goal after {result.steps} steps: choose another --task")
    return list(np.concatenate(chunks, axis=1)), looks


def compare(
    plain: PlainLoop, replica: LiberoEnvironment, actions: NDArray[np.float64], seen: Sequence[Observation]
) -> int:
    """Execute in our environment what the plain loop executed; returns the number of steps.

    Args:
        plain: after its steps.
        replica: where the episode begins.
        actions: (steps, 7) of the episode.
        seen: what its worker process showed before each chunk.

    Raises:
        RuntimeError: a state of the simulation differs in any bit, or the hand is not where the worker had it.
    """
    for step, expected in enumerate(plain.states):
        at_look = step % CHUNK == 0
        if at_look and not np.array_equal(replica.proprioception(), seen[step // CHUNK].state):
            raise RuntimeError(f"before step {step} the worker's hand is not where it is in this process")
        replica.step(actions[step])
        if not np.array_equal(replica.state().simulation, expected):
            raise RuntimeError(f"after step {step} the state is not that of the plain loop")
    return len(plain.states)


def time_policy(look: Act, seen: list[Observation], task: Task) -> list[float]:
    """Seconds of ten batched forwards."""
    return interleave({"look": lambda: look(seen, [task] * len(seen))}, repetitions=10)["look"]
