"""Opening, closing and switching what does not move as a whole: drawers, doors, stoves, and placing inside them.

LIBERO's drawers and doors are closed at joint position 0 and open towards negative positions.
"""

from __future__ import annotations

import numpy as np

from .geometry import DOWNWARD, Array, Joint, Scene, Surface, half_turn, rotation_about
from .grasping import Grasp, closing_axis, hand_rotation, plan_grasps
from .motion import CLOSED, OPEN, Arm, SkillFailed
from .skills import Spot, choose_grasp, find_spot, pick, place

UP: Array = np.array([0.0, 0.0, 1.0])

# Metres, radians and radians of a knob, chosen by trial on LIBERO's tasks.
DRAWER_PULLED = -0.155
DRAWER_OPEN = -0.14
HANDLE_LEAN = np.deg2rad(75)
PUSH_LEAN = np.deg2rad(40)
INSERTION_LEAN = np.deg2rad(60)
KNOB_ON = 0.5
KNOB_TURNED = 0.75


def _drawer(scene: Scene, region: str) -> Joint:
    joint = scene.region_joint(region)
    if joint is None:
        raise SkillFailed(f"{region} is no drawer")
    return joint


def _handle(scene: Scene, drawer: Joint) -> tuple[Array, Array]:
    """Middle of the bar that sticks out furthest, (3,), and the direction in which the drawer opens, (3,)."""
    opening = -drawer.axis
    bars = [scene.points(drawer.owner, [geom]) for geom in drawer.geoms]
    bar = max(bars, key=lambda points: float((points @ opening).mean()))
    return (bar.min(axis=0) + bar.max(axis=0)) / 2, opening


def is_drawer_open(scene: Scene, region: str) -> bool:
    """Whether a region is a drawer that is open wide enough to reach into."""
    joint = scene.region_joint(region)
    return joint is not None and joint.value < DRAWER_OPEN


def open_drawer(arm: Arm, region: str) -> None:
    """Grasp the handle from the front with a leaning hand, pull, let go, and back off.

    Raises:
        SkillFailed: the handle slipped, or the drawer did not open.
    """
    drawer = _drawer(arm.scene, region)
    handle, opening = _handle(arm.scene, drawer)
    along_bar = np.cross(UP, opening)
    upright = hand_rotation(half_turn(np.arctan2(along_bar[1], along_bar[0])))
    leaned = [rotation_about(along_bar, lean) @ upright for lean in (HANDLE_LEAN, -HANDLE_LEAN)]
    rotation = min(leaned, key=lambda turn: float(turn[:, 2] @ opening))
    approach = rotation[:, 2]
    ready = handle - 0.10 * approach
    arm.gripper = OPEN
    arm.travel([*(ready + 0.05 * opening)[:2], ready[2] + 0.05], ignore=(drawer.owner,), tolerance=0.03)
    arm.rotation = rotation
    arm.move_to(ready, tolerance=0.012, turn_tolerance=0.12, max_steps=60)
    arm.move_to(handle + 0.004 * approach, tolerance=0.006, turn_tolerance=0.12, speed=0.5, max_steps=40, stall=0.001)
    arm.close_gripper(10)
    closed, start = drawer.value, arm.position
    for step in range(50):
        if drawer.value < DRAWER_PULLED:
            break
        if step > 12 and drawer.value - closed > -0.01:
            raise SkillFailed(f"the handle of {region} slipped")
        arm.follow(start, opening, speed=0.7)
    if drawer.value > DRAWER_OPEN:
        raise SkillFailed(f"{region} did not open")
    arm.open_gripper(6)
    arm.move_by(-0.08 * approach, max_steps=20)
    arm.rotation = DOWNWARD


def close_drawer(arm: Arm, region: str) -> None:
    """Push the handle with the closed, leaning hand until the drawer is shut."""
    scene = arm.scene
    drawer = _drawer(scene, region)
    handle, opening = _handle(scene, drawer)
    yaw = half_turn(np.arctan2(opening[1], opening[0]))  # the hand's wide side faces the drawer
    leaned = [hand_rotation(yaw, lean) for lean in (PUSH_LEAN, -PUSH_LEAN)]
    arm.rotation = min(leaned, key=lambda turn: float(turn[:, 2] @ opening))
    start = handle + 0.07 * opening
    start[2] = max(handle[2], scene.table_height + 0.02)
    arm.gripper = CLOSED
    arm.travel(start - 0.08 * arm.rotation[:, 2], below=0.03)
    arm.move_to(start, tolerance=0.012, turn_tolerance=0.1, max_steps=40)
    for _ in range(90):
        if drawer.value > 0.001:
            break
        arm.follow(start, -opening, speed=0.8)
    arm.hold(5)


def close_door(arm: Arm, name: str) -> None:
    """Push a hinged door with the closed hand, near its free edge, until it is shut."""
    scene = arm.scene
    door = scene.fixture_joint(name)
    arm.gripper, arm.rotation = CLOSED, DOWNWARD

    def push_point(ahead: float) -> Array:
        """Grip point `ahead` (m) of the door's leaf in the closing direction, at four fifths of its length."""
        points, hinge = door.points(), door.anchor
        distance = np.hypot(*(points - hinge)[:, :2].T)
        edge = points[distance > distance.max() - 0.02].mean(axis=0) - hinge
        closing = np.array([-edge[1], edge[0]]) / np.hypot(*edge[:2])
        return np.append(hinge[:2] + 0.8 * edge[:2] + ahead * closing, points[:, 2].max() - 0.05)

    start = push_point(-0.09)
    arm.travel(start + 0.13 * UP, below=0.03)
    arm.move_to(start, tolerance=0.015, max_steps=50)
    for _ in range(140):
        if door.value > -0.003:
            break
        arm.steer(push_point(0.035), speed=0.8)
    arm.hold(5)


def turn_on(arm: Arm, name: str) -> None:
    """Grasp a stove's knob and twist it.

    Raises:
        SkillFailed: the knob cannot be grasped, or did not turn far enough.
    """
    scene = arm.scene
    knob = scene.fixture_joint(name)
    axle = knob.anchor
    surface = scene.surface(name, knob.geoms)
    top = float(surface.points[:, 2].max())
    upper = surface.points[:, 2] > top - 0.03
    surface = Surface(surface.points[upper], surface.normals[upper])
    center = np.append(axle[:2], surface.points[:, 2].mean())
    obstacles = scene.obstacles((name,), near=center)
    grasps = plan_grasps(surface, obstacles, top - 0.045, center=center, depths=(0.012, 0.018, 0.008))
    if not grasps:
        raise SkillFailed(f"no grasp of the knob of {name}")
    grasp = grasps[0]
    arm.gripper, arm.rotation = OPEN, grasp.rotation
    arm.travel(grasp.position + 0.07 * UP, ignore=(name,), tolerance=0.012)
    arm.move_to(grasp.position + 0.04 * UP, tolerance=0.006, max_steps=30)
    arm.move_to(grasp.position, tolerance=0.005, speed=0.5, max_steps=40, stall=0.001)
    arm.close_gripper(10)
    arm_length = grasp.position - axle
    for step in range(40):
        if knob.value > KNOB_TURNED:
            break
        angle = min(0.05 * (step + 1) + 0.25, 1.1)
        arm.rotation = hand_rotation(grasp.yaw + angle)
        turned = rotation_about(UP, angle) @ arm_length
        arm.steer(np.append((axle + turned)[:2], grasp.position[2]), speed=0.5)
    if knob.value < KNOB_ON:
        raise SkillFailed(f"the knob of {name} turned by {knob.value:.2f} rad only")
    arm.open_gripper(6)
    arm.rotation = DOWNWARD
    arm.move_by(0.12 * UP)


def place_in_drawer(arm: Arm, name: str, region: str) -> None:
    """Put an object into an open drawer: the top one from above, a lower one down its front part."""
    (_place_in_top_drawer if region.endswith("top_region") else _place_in_low_drawer)(arm, name, region)


def _place_in_top_drawer(arm: Arm, name: str, region: str) -> None:
    handle, opening = _handle(arm.scene, _drawer(arm.scene, region))
    pick(arm, name, choose_grasp(arm, name))
    # The open drawer may hang over the object, so that it has to come out from below first.
    aside = np.cross(UP, opening)
    side = np.sign((arm.scene.position(name) - handle) @ aside)
    arm.move_by(0.065 * side * aside + 0.035 * opening, tolerance=0.015)
    place(arm, name, find_spot(arm.scene, "in", region))


def _place_in_low_drawer(arm: Arm, name: str, region: str) -> None:
    # The hand closes along the drawer's width and holds the object at one side, so that both fit between the walls.
    scene = arm.scene
    drawer = _drawer(scene, region)
    _, opening = _handle(scene, drawer)
    along_width = half_turn(np.arctan2(opening[1], opening[0]))
    width = closing_axis(along_width)
    middle = scene.middle(name)
    yaws = tuple(half_turn(along_width + turn) for turn in np.deg2rad([0, 15, -15]))

    def at_side(grasp: Grasp) -> bool:
        return float((grasp.position - middle) @ width) < -0.02

    pick(arm, name, choose_grasp(arm, name, yaws=yaws, accept=at_side, lean=False, stretch=True))
    spot = find_spot(scene, "in", region)
    front = float((drawer.points() @ opening).max()) - 0.045  # inner side of the front panel, behind the handle
    point = spot.point + 0.050 * width[:2]
    point = point + (front - 0.054 - point @ opening[:2]) * opening[:2]
    place(arm, name, Spot(point, spot.height, clearance=0.13))


def insert_through_door(arm: Arm, name: str, region: str) -> None:
    """Carry an object on a strongly leaning hand through the open front of an oven and set it down inside.

    Raises:
        SkillFailed: it cannot be grasped so, or did not end up inside.
    """
    scene = arm.scene
    inward = _inward(scene, region)
    yaws = (half_turn(np.arctan2(inward[1], inward[0])),)
    surface, center = scene.surface(name), scene.middle(name)
    obstacles = scene.obstacles((name,), near=center)
    grasps = plan_grasps(
        surface,
        obstacles,
        scene.table_height,
        center=center,
        yaws=yaws,
        depths=(0.012, 0.020, 0.028),
        leans=(INSERTION_LEAN, -INSERTION_LEAN),
        lean_penalty=0.0,
        side=0.0,
        count=24,
    )
    grasps = [grasp for grasp in grasps if grasp.approach @ inward > 0.3]
    if not grasps:
        raise SkillFailed(f"no grasp of {name} from the front")
    pick(arm, name, grasps[0])
    spot = find_spot(scene, "in", region)
    aside = np.cross(UP, inward)
    inside = np.append(spot.point + 0.02 * aside[:2], spot.height)
    offset = scene.position(name) - arm.position
    height = arm.position[2] + spot.height + 0.026 - scene.lowest(name)

    def at(depth: float) -> Array:
        point: Array = inside + depth * inward - offset
        point[2] = height
        return point

    arm.move_to(at(-0.23), tolerance=0.015, max_steps=70)
    arm.move_to(at(-0.19), tolerance=0.010, max_steps=30)
    arm.move_to(at(-0.05), speed=0.6, max_steps=60, stall=0.0008)
    arm.move_to(
        arm.position - 0.03 * UP,
        tolerance=0.005,
        speed=0.4,
        max_steps=30,
        until=lambda: scene.touching(name),
        stall=0.0008,
    )
    arm.open_gripper()
    arm.move_by(-0.045 * arm.rotation[:, 2], tolerance=0.012, speed=0.5, max_steps=20)
    arm.move_by(-0.14 * inward, max_steps=30)
    arm.rotation = DOWNWARD
    arm.move_to(arm.position - 0.02 * inward + 0.12 * UP, tolerance=0.03, turn_tolerance=0.3, max_steps=40)
    if not scene.holds(("in", name, region)):
        raise SkillFailed(f"{name} is not inside")


def _inward(scene: Scene, region: str) -> Array:
    """Horizontal direction, along the nearest world axis, from the open door of an oven to its inside, (3,)."""
    door = scene.fixture_joint(scene.region_owner(region))
    outward = door.points().mean(axis=0) - scene.region_center(region)
    axis = int(np.argmax(np.abs(outward[:2])))
    inward = np.zeros(3)
    inward[axis] = -np.sign(outward[axis])
    return inward
