"""The scripted demonstrator: reads a task's goal and the true state of the scene, and solves the task.

It acts through LIBERO's own action space, under LIBERO's own success test and step cap. What it knows of the true
state never enters the record, which holds what a person's demonstration would hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .environment import EnvironmentState, LiberoEnvironment
from .fixtures import (
    close_door,
    close_drawer,
    insert_through_door,
    is_drawer_open,
    open_drawer,
    place_in_drawer,
    turn_on,
)
from .geometry import Array, Scene
from .motion import Arm, EpisodeOver, SkillFailed
from .skills import choose_grasp, find_spot, pick, place, push_along
from .suites import Task

ACTION_NOISE = 0.1
"""Standard deviation of the noise on the six motion components, in the action's units; our trial runs learned from
demonstrations made with it."""
STEPS_AFTER_SUCCESS = 8
"""LIBERO's goals hold at first contact; that many steps later the gripper is open and the hand retreats."""
FINAL_HOLD_STEPS = 10
SPREAD = 0.055
"""Metres. Both chosen by trial on LIBERO's tasks."""

Term = tuple[str, ...]


@dataclass(frozen=True)
class Demonstration:
    """One scripted episode of T steps. Frame t is what was observed before action t.

    Attributes:
        task: the task.
        start: where the episode started, before the settling steps.
        images: camera name -> T pictures, uint8 RGB (H, W, 3), upright; empty if nothing was rendered.
        states: proprioception, float32 (T, 8).
        actions: what the script wanted, float32 (T, 7): six OSC_POSE deltas in [-1, 1], gripper -1 open, +1 close.
        executed_actions: the same with noise, float32 (T, 7): what the simulator did.
        succeeded: bool (T,): whether the goal has held after action t or before.
        failure: why the goal was not reached, "" if it was.
    """

    task: Task
    start: EnvironmentState
    images: dict[str, list[NDArray[np.uint8]]]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    executed_actions: NDArray[np.float32]
    succeeded: NDArray[np.bool_]
    failure: str

    @property
    def success(self) -> bool:
        """Whether the goal held within the task's step cap."""
        return not self.failure

    def __len__(self) -> int:
        return len(self.actions)


class Demonstrator:
    """Solves the task of an environment.

    Args:
        environment: reset by the caller before each `run`.
        noise: standard deviation of Gaussian noise on the six motion components; executed, not recorded as label.
        steps_after_success: how long the script goes on after the goal holds.

    Example:
        >>> environment.reset(seed=0)  # doctest: +SKIP
        >>> Demonstrator(environment).run(np.random.default_rng(0)).success  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        environment: LiberoEnvironment,
        *,
        noise: float = ACTION_NOISE,
        steps_after_success: int = STEPS_AFTER_SUCCESS,
    ) -> None:
        self.environment, self.noise, self.steps_after_success = environment, noise, steps_after_success

    def run(self, rng: np.random.Generator, *, render: bool = True) -> Demonstration:
        """One episode from where the environment is now; a function of that state and of `rng`.

        Args:
            rng: source of the action noise.
            render: record images; False is for measuring how often the script succeeds.
        """
        recorder = _Recorder(self, rng, render)
        failure = ""
        try:
            arm = Arm(Scene(self.environment.env), recorder.act)
            solve(arm, push=self.environment.instruction.startswith("push"))
            arm.hold(FINAL_HOLD_STEPS + self.steps_after_success)
            failure = "the goal does not hold at the end of the script"
        except EpisodeOver:
            if not recorder.success:
                failure = f"not done after {self.environment.max_steps} steps"
        except SkillFailed as reason:
            failure = str(reason)
        return recorder.demonstration("" if recorder.success else failure)


class _Recorder:
    """Executes actions and keeps what belongs into a demonstration."""

    def __init__(self, demonstrator: Demonstrator, rng: np.random.Generator, render: bool) -> None:
        self._environment, self._noise = demonstrator.environment, demonstrator.noise
        self._after, self._rng, self._render = demonstrator.steps_after_success, rng, render
        self._images: dict[str, list[NDArray[np.uint8]]] = {}
        self._states: list[NDArray[np.float32]] = []
        self._actions: list[NDArray[np.float32]] = []
        self._executed: list[NDArray[np.float32]] = []
        self._succeeded: list[bool] = []

    @property
    def success(self) -> bool:
        return bool(self._succeeded) and self._succeeded[-1]

    def act(self, action: Array) -> None:
        if self._render:
            observation = self._environment.observe()
            for camera, picture in observation.images.items():
                self._images.setdefault(camera, []).append(picture)
            self._states.append(observation.state)
        else:
            self._states.append(self._environment.proprioception())
        executed = action.copy()
        executed[:6] = np.clip(action[:6] + self._noise * self._rng.standard_normal(6), -1.0, 1.0)
        self._actions.append(action.astype(np.float32))
        self._executed.append(executed.astype(np.float32))  # what is stored is what is executed, to the last bit
        self._succeeded.append(self._environment.step(self._executed[-1]) or self.success)
        if self._succeeded.count(True) > self._after:
            raise EpisodeOver
        if not self.success and len(self._actions) >= self._environment.max_steps:
            raise EpisodeOver

    def demonstration(self, failure: str) -> Demonstration:
        return Demonstration(
            task=self._environment.task,
            start=self._environment.start,
            images=self._images,
            states=np.array(self._states, np.float32).reshape(-1, 8),
            actions=np.array(self._actions, np.float32).reshape(-1, 7),
            executed_actions=np.array(self._executed, np.float32).reshape(-1, 7),
            succeeded=np.array(self._succeeded, bool),
            failure=failure,
        )


def solve(arm: Arm, *, push: bool = False) -> None:
    """Make every term of the goal true, closing things last.

    Args:
        arm: the arm; its scene knows the goal.
        push: objects are to be pushed over the table instead of carried.

    Raises:
        SkillFailed: a term cannot be reached.
        EpisodeOver: from the arm's `act`.
    """
    scene = arm.scene
    goal: list[Term] = [tuple(term) for term in scene.domain.parsed_problem["goal_state"]]
    for term in _ordered(scene, goal):
        if scene.holds(term):
            continue
        predicate, name = term[0], term[1]
        if predicate in ("on", "in"):
            _put(arm, predicate, name, term[2], _offset(term, goal, scene), push=push)
        elif predicate == "open":
            open_drawer(arm, name)
        elif predicate == "close":
            (close_drawer if scene.region_joint(name) else close_door)(arm, name)
        elif predicate == "turnon":
            turn_on(arm, name)
        else:
            raise SkillFailed(f"no skill for {' '.join(term)!r}")


def _sharing(term: Term, goal: Sequence[Term]) -> list[Term]:
    """Terms that put an object on the same region as `term` does, itself included."""
    return [other for other in goal if other[0] == term[0] == "on" and other[2] == term[2]]


def _distance(term: Term, scene: Scene) -> float:
    return float(np.linalg.norm((scene.position(term[1]) - scene.region_center(term[2]))[:2]))


def _ordered(scene: Scene, goal: Sequence[Term]) -> list[Term]:
    """The goal with closing last and, where objects share a region, the one with the longest way first."""
    ordered = sorted(goal, key=lambda term: term[0] == "close")
    for term in goal:
        sharing = _sharing(term, goal)
        if len(sharing) > 1:
            places = [index for index, other in enumerate(ordered) if other in sharing]
            farthest_first = sorted(sharing, key=lambda other: -_distance(other, scene))
            for index, other in zip(places, farthest_first, strict=True):
                ordered[index] = other
    return ordered


def _offset(term: Term, goal: Sequence[Term], scene: Scene) -> Array:
    """Where in its region an object goes, (2,): side by side, the far place first, if it shares the region."""
    sharing = _sharing(term, goal)
    if len(sharing) < 2:
        return np.zeros(2)
    first = not any(scene.holds(other) for other in sharing)
    return np.array([SPREAD if first else -SPREAD, 0.0])


def _put(arm: Arm, predicate: str, name: str, target: str, offset: Array, *, push: bool) -> None:
    scene = arm.scene
    if push:
        push_along(arm, name, scene.region_center(target))
        return
    if scene.is_region(target):
        if scene.region_owner(target).startswith("microwave") and predicate == "in":
            insert_through_door(arm, name, target)
            return
        if scene.region_joint(target) is not None:
            if not is_drawer_open(scene, target):
                open_drawer(arm, target)
            place_in_drawer(arm, name, target)
            return
    pick(arm, name, choose_grasp(arm, name))
    spot = find_spot(scene, predicate, target)
    place(arm, name, spot.shifted(offset))
