"""Moving the robot through LIBERO's own action space: 7 numbers in [-1, 1], twenty times a second.

An action is what a person's demonstration would hold: the hand's displacement (0.05 m per unit) and rotation (0.5
rad per unit) for the OSC_POSE controller, and the gripper (-1 opens, +1 closes). The simulation is never touched
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .geometry import DOWNWARD, Array, Reach, Scene, rotation_vector

METRES_PER_UNIT, RADIANS_PER_UNIT = 0.05, 0.5
OPEN, CLOSED = -1.0, 1.0

Act = Callable[[Array], None]
"""Executes one clean action (7,); raises `EpisodeOver` when the episode has ended."""


class SkillFailed(Exception):
    """A skill saw that it cannot reach its aim in this layout."""


class EpisodeOver(Exception):
    """The goal holds and the steps after it are done, or the step limit is reached."""


class Arm:
    """Proportional control of the hand towards target poses.

    Args:
        scene: the scene that the arm moves in.
        act: executes one action.

    Attributes:
        rotation: the hand's target rotation, (3, 3), held by every motion.
        gripper: the gripper's command, `OPEN` or `CLOSED`.
    """

    def __init__(self, scene: Scene, act: Act) -> None:
        self.scene, self.reach = scene, Reach(scene)
        self.rotation, self.gripper = DOWNWARD, OPEN
        self._act = act
        robot: Any = scene.domain.robots[0]
        self._grip_site = robot.eef_site_id
        self._hand_body = scene.model.body(robot.robot_model.eef_name).id
        self._finger_joints = robot._ref_gripper_joint_pos_indexes

    @property
    def position(self) -> Array:
        """The grip point between the fingertips, (3,)."""
        return np.array(self.scene.data.site_xpos[self._grip_site])

    @property
    def remaining_rotation(self) -> Array:
        """Rotation vector from the hand's rotation to its target, (3,)."""
        return rotation_vector(self.rotation @ self.scene.data.xmat[self._hand_body].reshape(3, 3).T)

    def step(self, shift: ArrayLike, turn: ArrayLike) -> None:
        """One action: `shift` and `turn` in the controller's units, clipped to [-1, 1]."""
        self._act(np.clip(np.concatenate([shift, turn, [self.gripper]]), -1.0, 1.0))

    def steer(self, target: ArrayLike, *, speed: float = 1.0, turn_speed: float = 0.8) -> None:
        """One step straight towards `target` (3,), no component faster than `speed` units."""
        shift = 1.6 * (np.asarray(target) - self.position) / METRES_PER_UNIT
        fastest = np.abs(shift).max()
        if fastest > speed:
            shift *= speed / fastest
        self.step(shift, np.clip(1.2 * self.remaining_rotation / RADIANS_PER_UNIT, -turn_speed, turn_speed))

    def slide(self, shift: ArrayLike, *, turn_speed: float = 0.4) -> None:
        """One step by `shift` units that keeps the hand's rotation."""
        self.step(shift, np.clip(self.remaining_rotation / RADIANS_PER_UNIT, -turn_speed, turn_speed))

    def follow(self, start: Array, direction: Array, *, speed: float) -> None:
        """One step along the line through `start` (3,) in `direction` (3,), back onto it if the hand has strayed."""
        travelled = float((self.position - start) @ direction)
        self.steer(start + (travelled + 0.04) * direction, speed=speed, turn_speed=0.5)

    def move_to(
        self,
        target: ArrayLike,
        *,
        tolerance: float = 0.008,
        turn_tolerance: float = 0.1,
        speed: float = 1.0,
        max_steps: int = 90,
        until: Callable[[], bool] | None = None,
        stall: float | None = None,
    ) -> None:
        """Steer to `target` until it is reached, `until()` holds, nothing moves any more, or `max_steps` are over.

        Noise keeps a hand from ever being quite there, and hovering is what a policy should not learn: three steps in
        a row within twice the tolerances are as good.

        Args:
            target: (3,) grip point.
            tolerance: accepted distance (m).
            turn_tolerance: accepted rotation from `self.rotation` (rad).
            speed: fastest component in the controller's units.
            until: checked before every step.
            stall: stop when the hand has moved less than this (m) in four steps.
        """
        target = np.asarray(target, dtype=float)
        path: list[Array] = []
        near = 0
        for _ in range(max_steps):
            off = max(
                np.linalg.norm(target - self.position) / tolerance,
                np.linalg.norm(self.remaining_rotation) / turn_tolerance,
            )
            near = near + 1 if off < 2 else 0
            if off < 1 or near > 3 or (until is not None and until()):
                return
            self.steer(target, speed=speed)
            path.append(self.position)
            if stall is not None and len(path) > 5 and np.linalg.norm(path[-1] - path[-5]) < stall:
                return

    def move_by(self, offset: ArrayLike, *, tolerance: float = 0.02, max_steps: int = 25, speed: float = 1.0) -> None:
        """Move by `offset` (3,) without waiting for the hand's rotation."""
        target = self.position + np.asarray(offset)
        self.move_to(target, tolerance=tolerance, turn_tolerance=np.inf, max_steps=max_steps, speed=speed)

    def hold(self, steps: int = 1) -> None:
        """Stay where the hand is."""
        place = self.position
        for _ in range(steps):
            self.steer(place, speed=0.3, turn_speed=0.3)

    def close_gripper(self, max_steps: int = 14) -> None:
        """Close until the fingers have stood still for three steps."""
        self.gripper = CLOSED
        self._move_fingers(max_steps, at_least=8, still=3, slower_than=3e-4)

    def open_gripper(self, max_steps: int = 12) -> None:
        """Open until the fingers stand still; around a wide object it takes them some steps to begin."""
        self.gripper = OPEN
        self._move_fingers(max_steps, at_least=4, still=1, slower_than=4e-4, travel=0.002)

    def _move_fingers(
        self, max_steps: int, at_least: int, still: int, slower_than: float, travel: float = 0.0
    ) -> None:
        place, fingers = self.position, self._finger_joints
        start, standing = self.scene.data.qpos[fingers].copy(), 0
        for step in range(max_steps):
            before = self.scene.data.qpos[fingers].copy()
            self.steer(place, speed=0.3, turn_speed=0.3)
            moved = np.abs(self.scene.data.qpos[fingers] - before).max()
            standing = standing + 1 if moved < slower_than else 0
            begun = np.abs(self.scene.data.qpos[fingers] - start).max() >= travel
            if step + 1 >= at_least and standing >= still and begun:
                return

    def travel(
        self, target: ArrayLike, *, ignore: Iterable[str] = (), below: float = 0.02, tolerance: float = 0.02
    ) -> None:
        """Lift to a height that clears everything on the way, go across, and come down to `target`.

        Args:
            target: (3,) grip point at the end.
            ignore: objects that are no obstacles.
            below: how far the hand, or what it holds, hangs below the grip point (m).
            tolerance: accepted distance at the end (m).
        """
        target = np.asarray(target, dtype=float)
        reach, here = self.reach, self.position
        obstacles = self.scene.obstacles(ignore)
        start = reach.within(here, here[2] + 0.03, reach.WAYPOINT)
        end = reach.within(target, target[2], reach.WAYPOINT)
        top = max(self._highest_between(start, end, obstacles), self._highest_between(end, target, obstacles))
        height = min(max(target[2], top + below + 0.02), self.scene.table_height + 0.42)
        if here[2] < height - 0.02:
            self.move_to(reach.within(here, height), tolerance=0.03, turn_tolerance=np.inf, max_steps=40)
        above = reach.within(target, height)
        if np.linalg.norm(above[:2] - target[:2]) > 0.01 or height > target[2] + 0.03:
            self.move_to(above, tolerance=0.035, turn_tolerance=0.3, max_steps=70)
        self.move_to(target, tolerance=tolerance, max_steps=60)

    def _highest_between(self, start: Array, end: Array, obstacles: Array, half_width: float = 0.11) -> float:
        """Height of the highest obstacle in a corridor between two points, as wide as the hand."""
        along = (end - start)[:2]
        length = float(np.linalg.norm(along))
        direction = along / length if length > 1e-6 else np.array([1.0, 0.0])
        offsets = obstacles[:, :2] - start[:2]
        ahead, aside = offsets @ direction, np.abs(offsets @ np.array([-direction[1], direction[0]]))
        inside = (ahead > -half_width) & (ahead < length + half_width) & (aside < half_width)
        return float(obstacles[inside, 2].max()) if inside.any() else self.scene.table_height
