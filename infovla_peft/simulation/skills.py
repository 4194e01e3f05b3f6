"""Picking objects up and putting them down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from .geometry import Array, Scene
from .grasping import SIDE_PREFERENCE, YAWS, Grasp, plan_grasps
from .motion import CLOSED, Arm, SkillFailed

# Metres and radians, chosen by trial on LIBERO's tasks.
GOOD_SCORE = -0.072
LEANS = tuple(np.deg2rad([0, -20, 20, -35, 35]))
RELEASE_BELOW_RIM = 0.035
# Sliding a plate by friction: press (units of action), speed (units), how far the fingers may run ahead (m), and how
# often they may be set down anew. Slower or harder pressed, the plate sticks to the table.
PRESS, SLIDING_SPEED = 0.25, 0.9
LEAD = 0.04
PRESSES = 6


@dataclass(frozen=True)
class Spot:
    """Where an object is to be put.

    Attributes:
        point: (x, y) of the object's origin.
        height: height of what it will stand on, or of its lowest point when it is let go.
        drop: let it go at `height` instead of lowering it until it stands.
        clearance: height above `height` at which it arrives.
    """

    point: Array
    height: float
    drop: bool = False
    clearance: float = 0.04

    def shifted(self, offset: Array) -> Spot:
        """The spot moved by `offset` (2,)."""
        return replace(self, point=self.point + offset)


def find_spot(scene: Scene, predicate: str, target: str) -> Spot:
    """The spot that makes `predicate` ("on" or "in") true for an object put there; `target`: region or object."""
    if not scene.is_region(target):
        points, origin = scene.points(target), scene.position(target)
        middle = points[np.hypot(*(points[:, :2] - origin[:2]).T) < 0.03]
        height = middle[:, 2].max() if len(middle) else points[:, 2].min()
        return Spot(origin[:2], float(height))
    center = scene.region_center(target)
    if predicate == "on":
        return Spot(center[:2], float(center[2]))
    owner = scene.region_owner(target)
    if owner.startswith("basket"):
        rim = float(scene.points(owner)[:, 2].max())
        return Spot(center[:2], rim - RELEASE_BELOW_RIM, drop=True, clearance=0.055)
    return Spot(center[:2], float(center[2]) - scene.region_half_height(target), clearance=0.06)


def choose_grasp(
    arm: Arm,
    name: str,
    *,
    yaws: Sequence[float] = YAWS,
    accept: Callable[[Grasp], bool] | None = None,
    lean: bool = True,
    stretch: bool = False,
) -> Grasp:
    """The best grasp of an object: straight down if a good one exists, else leaning.

    Args:
        arm: the arm; the object is where it is now.
        name: the object.
        yaws: yaw angles to try (rad).
        accept: grasps to prefer, if there are any among the best.
        lean: whether the hand may lean.
        stretch: whether grasps that stretch the arm are as good as others.

    Raises:
        SkillFailed: there is none.
    """
    scene = arm.scene
    surface, center = scene.surface(name), scene.middle(name)
    obstacles = scene.obstacles((name,), near=center)
    reach = None if stretch else arm.reach
    floor = scene.table_height
    side = SIDE_PREFERENCE if accept is None else 0.0  # who asks for a side gets it
    grasps = plan_grasps(surface, obstacles, floor, center=center, yaws=yaws, reach=reach, side=side, count=24)
    if lean and (not grasps or grasps[0].score < GOOD_SCORE):
        depths = (0.020, 0.028, 0.036)
        leaning = plan_grasps(
            surface, obstacles, floor, center=center, yaws=yaws, depths=depths, leans=LEANS, reach=reach
        )
        grasps = leaning or grasps
    if not grasps:
        raise SkillFailed(f"no grasp of {name}")
    return next((grasp for grasp in grasps if accept is not None and accept(grasp)), grasps[0])


def pick(arm: Arm, name: str, grasp: Grasp, *, lift: float = 0.06) -> None:
    """Grasp an object and lift it.

    Raises:
        SkillFailed: the object does not follow the hand.
    """
    scene = arm.scene
    arm.rotation = grasp.rotation
    start_height = scene.position(name)[2]
    z = grasp.position[2]
    above = max(0.035, min(0.06, arm.reach.highest(grasp.position) - z)) + (0.03 if grasp.lean else 0.0)
    ready = grasp.position - above * grasp.approach
    arm.travel(ready, ignore=(name,), below=0.05, tolerance=0.012)
    arm.move_to(ready + 0.01 * grasp.approach, tolerance=0.008, turn_tolerance=0.08, max_steps=10)
    arm.move_to(grasp.position, tolerance=0.005, speed=0.6, max_steps=40, stall=0.001)
    arm.close_gripper()
    closed_height = arm.position[2]
    if grasp.lean:
        arm.move_by(-lift * grasp.approach)
    else:
        raised = arm.reach.within(arm.position, closed_height + lift, 0.64)
        arm.move_to(raised, tolerance=0.02, turn_tolerance=np.inf, max_steps=25)
    follows = scene.position(name)[2] - start_height >= 0.35 * (arm.position[2] - closed_height)
    if not follows or not scene.grasped(name):
        raise SkillFailed(f"{name} was not grasped")


FALLING_STEPS = 14


def place(arm: Arm, name: str, spot: Spot, *, retreat: float = 0.08) -> None:
    """Bring the held object over a spot, lower it, let it go and retreat.

    Raises:
        SkillFailed: the object was lost on the way.
    """
    scene = arm.scene
    held_at = scene.position(name) - arm.position
    hangs = arm.position[2] - scene.lowest(name)

    def over_spot(height: float) -> Array:
        offset = (scene.position(name) - arm.position)[:2]
        return np.append(spot.point - offset, height)

    arrival = spot.height + hangs + spot.clearance
    arm.travel(over_spot(arrival), ignore=(name,), below=hangs + 0.015, tolerance=0.012)
    arm.move_to(over_spot(arrival), tolerance=0.008, max_steps=10)
    if np.linalg.norm(scene.position(name) - arm.position - held_at) > 0.04:
        raise SkillFailed(f"{name} was dropped")
    if spot.drop:
        arm.move_to(over_spot(spot.height + hangs), speed=0.7, max_steps=40, stall=0.001)
    else:
        arm.move_to(
            over_spot(spot.height + hangs - 0.01),
            tolerance=0.004,
            speed=0.4,
            max_steps=60,
            until=lambda: scene.touching(name) and scene.lowest(name) < spot.height + 0.025,
            stall=0.001,
        )
    arm.open_gripper()
    height = scene.lowest(name)
    for step in range(FALLING_STEPS if spot.drop else 0):
        if scene.lowest(name) < height - 0.02:
            break
        # A carton's gable may hang on one finger: shake it off, along the line on which the hand opens.
        arm.slide((0.5 if step % 6 < 3 else -0.5) * arm.rotation[:, 1] * (step > 1))
    arm.move_by((0.0, 0.0, retreat), max_steps=20)
    arm.hold(4)


def push_along(arm: Arm, name: str, goal: ArrayLike) -> None:
    """Press closed fingers on a flat object and slide it over the table until its origin is at `goal` (2,).

    Fingers that run ahead of the object are lifted and pressed on its middle again.

    Raises:
        SkillFailed: they ran ahead too often.
    """
    scene, goal = arm.scene, np.asarray(goal, dtype=float)[:2]
    surface = scene.table_height + 0.018
    arm.gripper = CLOSED
    arm.travel([*scene.position(name)[:2], surface + 0.05], ignore=(name,), below=0.03, tolerance=0.012)
    for _ in range(PRESSES):
        middle = scene.position(name)[:2]
        arm.move_to([*middle, surface + 0.02], tolerance=0.012, max_steps=20)
        arm.move_to([*middle, surface - 0.006], tolerance=0.003, speed=0.4, max_steps=20, stall=0.0006)
        while np.linalg.norm(scene.position(name)[:2] - arm.position[:2]) < LEAD:
            left = goal - scene.position(name)[:2]
            distance = float(np.linalg.norm(left))
            if distance < 0.015:
                arm.move_by((0.0, 0.0, 0.08), max_steps=20)
                return
            arm.slide([*(SLIDING_SPEED * left / distance), -PRESS], turn_speed=0.3)
        arm.move_by((0.0, 0.0, 0.03), max_steps=6)
    raise SkillFailed(f"the fingers slipped over {name}")
