"""Where a parallel gripper can grasp an object: an antipodal search on points of its true collision shape.

The search slides a horizontal line through the object for several yaw angles, depths and offsets; wherever the line
crosses a wall that fits between the fingers is a candidate. Candidates whose fingers or palm would touch anything are
dropped, the others are scored. A leaning hand is the same search in a rotated point cloud.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .geometry import DOWNWARD, Array, Reach, Surface, rotation_about, yaw_rotation

# The Panda's hand, open, measured from the grip point (m).
HALF_OPENING = 0.040
FINGER_THICKNESS = 0.020
FINGER_HALF_WIDTH = 0.012
FINGERTIP_BELOW = 0.014
PALM_ABOVE = 0.045
PALM_HALF_LENGTH, PALM_HALF_WIDTH = 0.105, 0.042
HAND_HEIGHT = 0.25

# The search (m).
WIDEST = 0.070
SLAB_HALF_HEIGHT, LINE_HALF_WIDTH, LINE_STEP = 0.013, 0.010, 0.006
GAP_BETWEEN_WALLS = 0.018
FLOOR_CLEARANCE = 0.001
SAME_POSITION, SAME_YAW, SAME_LEAN = 0.012, 0.3, 0.1
SIDE_PREFERENCE = 0.15
"""Of grasps that are nearly as good, the one further to the robot's left: one way of doing a thing is learned sooner
than two."""

YAWS: tuple[float, ...] = tuple(np.deg2rad(np.arange(-90, 90, 15)))
DEPTHS = (0.012, 0.020, 0.028, 0.040, 0.055)
UPRIGHT = (0.0,)


@dataclass(frozen=True)
class Grasp:
    """A pose of the hand around an object.

    Attributes:
        position: grip point, (3,).
        yaw: direction of the hand about the vertical; at 0 it closes along the world's y axis.
        lean: inclination about the closing axis; 0 points straight down.
        width: distance of the two walls that the fingers will touch.
        score: larger is better; above about -0.07 a grasp is good.
    """

    position: Array
    yaw: float
    lean: float
    width: float
    score: float

    @property
    def rotation(self) -> Array:
        """Rotation of the hand, (3, 3); its third column is the direction in which it points."""
        return hand_rotation(self.yaw, self.lean)

    @property
    def approach(self) -> Array:
        """Direction in which the hand moves towards the object, (3,)."""
        return self.rotation[:, 2]


def closing_axis(yaw: float) -> Array:
    """Direction in which the fingers move, (3,)."""
    return np.array([-np.sin(yaw), np.cos(yaw), 0.0])


def hand_rotation(yaw: float, lean: float = 0.0) -> Array:
    """Rotation of a downward hand, turned by `yaw`, then leaned by `lean` about its closing axis."""
    return rotation_about(closing_axis(yaw), lean) @ yaw_rotation(yaw) @ DOWNWARD


@dataclass(frozen=True)
class _Cloud:
    """Points seen along the hand: x along the closing axis, y across it, z up."""

    x: Array
    y: Array
    z: Array

    @staticmethod
    def of(points: Array, yaw: float) -> _Cloud:
        across = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        return _Cloud(points @ closing_axis(yaw), points @ across, points[:, 2])

    def where(self, mask: NDArray[np.bool_]) -> _Cloud:
        return _Cloud(self.x[mask], self.y[mask], self.z[mask])


def plan_grasps(
    surface: Surface,
    obstacles: Array,
    floor: float,
    *,
    center: Array | None = None,
    yaws: Sequence[float] = YAWS,
    depths: Sequence[float] = DEPTHS,
    leans: Sequence[float] = UPRIGHT,
    lean_penalty: float = 0.08,
    reach: Reach | None = None,
    side: float = SIDE_PREFERENCE,
    count: int = 12,
) -> list[Grasp]:
    """The best grasps of an object, best first, no two of them nearly the same.

    Args:
        surface: the object.
        obstacles: (N, 3) points that the hand must not touch.
        floor: height of what the object stands on.
        center: (3,) point near which to grasp; the mean of the surface if None.
        yaws, depths, leans: what to try (rad; m below the top; rad).
        lean_penalty: score lost per radian of lean.
        reach: if given, grasps near the end of the arm's reach score less.
        side: score gained per metre to the robot's left of the middle.
        count: how many to return at most.
    """
    center = surface.points.mean(axis=0) if center is None else center
    found = []
    for lean in leans:
        for yaw in yaws:
            turn = rotation_about(closing_axis(yaw), lean)  # columns: the leaned frame
            leaned = Surface((surface.points - center) @ turn + center, surface.normals @ turn)
            others = (obstacles - center) @ turn + center
            lowest = floor if lean == 0 else leaned.points[:, 2].min() - 0.03
            for grasp in _grasps_at_yaw(leaned, others, lowest, center, yaw, depths):
                position = turn @ (grasp.position - center) + center
                tip = FINGERTIP_BELOW + FINGER_HALF_WIDTH * abs(np.sin(lean))
                if position[2] < floor + tip + FLOOR_CLEARANCE - 1e-9:
                    continue
                stretch = 0.0 if reach is None else max(0.0, reach.distance(position) - reach.COMFORTABLE)
                score = grasp.score - lean_penalty * abs(lean) - 0.8 * stretch + side * (position - center)[1]
                found.append(Grasp(position, yaw, lean, grasp.width, score))
    return _distinct(sorted(found, key=lambda grasp: -grasp.score), count)


def _distinct(grasps: Sequence[Grasp], count: int) -> list[Grasp]:
    kept: list[Grasp] = []
    for grasp in grasps:
        same = (
            np.linalg.norm(grasp.position - other.position) <= SAME_POSITION
            and abs(grasp.yaw - other.yaw) <= SAME_YAW
            and abs(grasp.lean - other.lean) <= SAME_LEAN
            for other in kept
        )
        if not any(same):
            kept.append(grasp)
        if len(kept) == count:
            break
    return kept


def _grasps_at_yaw(
    surface: Surface, obstacles: Array, floor: float, center: Array, yaw: float, depths: Sequence[float]
) -> Iterator[Grasp]:
    """All collision-free grasps of an upright hand at one yaw."""
    cloud = _Cloud.of(surface.points, yaw)
    facing = np.abs(surface.normals @ closing_axis(yaw))
    everything = _Cloud.of(np.concatenate([surface.points, obstacles]), yaw)
    top = cloud.z.max()
    middle = _Cloud.of(center[None], yaw)
    for depth in depths:
        height = max(top - depth, floor + FINGERTIP_BELOW + FLOOR_CLEARANCE)
        in_slab = np.abs(cloud.z - height) < SLAB_HALF_HEIGHT
        if height > top + 0.004 or in_slab.sum() < 3:
            continue
        slab, slab_facing = cloud.where(in_slab), facing[in_slab]
        walls = list(_walls(slab))  # (near wall x, far wall x, line y)
        if not walls:
            continue
        near, far, line = np.array(walls).T
        free = ~_collides((near + far) / 2, line, height, everything)
        for a, b, y in zip(near[free], far[free], line[free], strict=True):
            on_line = np.abs(slab.y - y) < LINE_HALF_WIDTH
            between = on_line & (slab.x > a - 1e-6) & (slab.x < b + 1e-6)
            x = (a + b) / 2
            offset = float(np.hypot(x - middle.x[0], y - middle.y[0]))
            skew = sum(
                1.0 - float(np.median(slab_facing[on_line & (np.abs(slab.x - wall) < 0.004)])) for wall in (a, b)
            )
            contact_height = float(np.ptp(slab.z[between]))
            score = (
                -offset  # far from the middle: the object turns in the fingers
                - 0.08 * skew  # walls that do not face the fingers: it slips
                - 0.02 * abs(yaw) / (np.pi / 2)  # turning the wrist takes time
                + 0.5 * min(contact_height, 0.02)
                - 0.3 * max(0.0, b - a - 0.055)  # little room for errors beside the fingers,
                - 3.0 * max(0.0, b - a - 0.062)  # and very little
                - 0.15 * abs(depth - 0.024)
            )
            position = x * closing_axis(yaw) + y * np.array([np.cos(yaw), np.sin(yaw), 0.0])
            position[2] = height
            yield Grasp(position, yaw, 0.0, b - a, score)


def _walls(slab: _Cloud) -> Iterator[tuple[float, float, float]]:
    """Pairs of walls that fit between the fingers, as (near x, far x, line y): one wall, or several neighbours."""
    order = np.argsort(slab.x)
    xs, ys = slab.x[order], slab.y[order]
    for line in np.arange(slab.y.min() - 0.002, slab.y.max() + 0.0021, LINE_STEP):
        crossed = xs[np.abs(ys - line) < LINE_HALF_WIDTH]
        if len(crossed) < 2:
            continue
        gaps = np.flatnonzero(np.diff(crossed) > GAP_BETWEEN_WALLS)
        starts, ends = crossed[np.append(0, gaps + 1)], crossed[np.append(gaps, len(crossed) - 1)]
        for first, start in enumerate(starts):
            yield from ((start, end, line) for end in ends[first:] if end - start <= WIDEST)


def _collides(x: Array, y: Array, height: float, cloud: _Cloud) -> NDArray[np.bool_]:
    """Whether the open hand with its grip point at (x[i], y[i], height) touches the cloud, (candidates,)."""
    near = (
        (cloud.z > height - FINGERTIP_BELOW)
        & (cloud.z < height + HAND_HEIGHT)
        & (np.abs(cloud.x - (x.min() + x.max()) / 2) < np.ptp(x) / 2 + PALM_HALF_LENGTH)
        & (np.abs(cloud.y - (y.min() + y.max()) / 2) < np.ptp(y) / 2 + PALM_HALF_WIDTH)
    )
    points = cloud.where(near)
    aside = np.abs(points.x - x[:, None])  # (candidates, points)
    across = np.abs(points.y - y[:, None])
    finger = (aside > HALF_OPENING - 0.002) & (aside < HALF_OPENING + FINGER_THICKNESS) & (across < FINGER_HALF_WIDTH)
    palm = (aside < PALM_HALF_LENGTH) & (across < PALM_HALF_WIDTH) & (points.z > height + PALM_ABOVE)
    return np.asarray((finger | palm).any(axis=1), dtype=bool)
