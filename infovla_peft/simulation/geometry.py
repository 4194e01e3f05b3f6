"""What the scripted demonstrator knows about a scene: rotations, surfaces of collision shapes, joints, contacts.

All positions are in metres in MuJoCo's world frame, all angles in radians, all rotations (3, 3) matrices whose columns
are the axes of the rotated frame. Needs MuJoCo's model and data only; nothing here moves the simulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DOWNWARD: Array = np.diag([1.0, -1.0, -1.0])
"""Rotation of a hand that points straight down and closes along the world's y axis."""

OBJECT_SPACING = 0.006
"""Distance of the sampled points on objects: finer than a finger pad is wide."""
OBSTACLE_SPACING = 0.010
"""Distance of the sampled points on what is only to be avoided: half a finger's thickness."""


def rotation_about(axis: ArrayLike, angle: float) -> Array:
    """Rotation by `angle` about `axis` (any length) through the origin (Rodrigues)."""
    x, y, z = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation: Array = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
    return rotation


def yaw_rotation(angle: float) -> Array:
    """Rotation about the world's vertical axis."""
    return rotation_about((0.0, 0.0, 1.0), angle)


def rotation_vector(rotation: Array) -> Array:
    """Axis times angle, (3,), of a rotation; its length is at most pi."""
    twist = rotation - rotation.T
    vector = np.array([twist[2, 1], twist[0, 2], twist[1, 0]]) / 2  # axis times the angle's sine
    sine, cosine = float(np.linalg.norm(vector)), (np.trace(rotation) - 1) / 2
    if sine > 1e-6:
        return np.asarray(vector * (np.arctan2(sine, cosine) / sine))
    if cosine > 0:
        return vector
    column = (rotation + np.eye(3))[:, int(np.argmax(np.diag(rotation)))]  # half a turn: 2 axis axis^T = R + 1
    return np.asarray(np.pi * column / np.linalg.norm(column))


def half_turn(angle: float) -> float:
    """`angle` modulo pi, in [-pi/2, pi/2): a parallel gripper is the same after half a turn."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


@dataclass(frozen=True)
class Surface:
    """Points on surfaces, with outward unit normals.

    Attributes:
        points: (N, 3).
        normals: (N, 3).
    """

    points: Array
    normals: Array

    @staticmethod
    def join(parts: Iterable[Surface]) -> Surface:
        parts = [part for part in parts if len(part.points)]
        if not parts:
            return Surface(np.zeros((0, 3)), np.zeros((0, 3)))
        return Surface(np.concatenate([p.points for p in parts]), np.concatenate([p.normals for p in parts]))

    def moved(self, position: Array, rotation: Array) -> Surface:
        """The surface after `rotation` about the origin, then a shift by `position`."""
        return Surface(self.points @ rotation.T + position, self.normals @ rotation.T)


def _grid(half: float, spacing: float) -> Array:
    return np.linspace(-half, half, int(np.clip(np.ceil(2 * half / spacing), 1, 60)) + 1)


def _box(half_sizes: Array, spacing: float) -> Surface:
    faces = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        first, second = np.meshgrid(*(_grid(half_sizes[other], spacing) for other in others))
        for sign in (-1.0, 1.0):
            points, normals = np.zeros((first.size, 3)), np.zeros((first.size, 3))
            points[:, others[0]], points[:, others[1]] = first.ravel(), second.ravel()
            points[:, axis], normals[:, axis] = sign * half_sizes[axis], sign
            faces.append(Surface(points, normals))
    return Surface.join(faces)


def _cylinder(radius: float, half_length: float, spacing: float, *, caps: bool = True) -> Surface:
    angles = np.linspace(0, 2 * np.pi, int(np.clip(2 * np.pi * radius / spacing, 8, 120)), endpoint=False)
    heights, turns = np.meshgrid(_grid(half_length, spacing), angles)
    outward = np.stack([np.cos(turns).ravel(), np.sin(turns).ravel(), np.zeros(turns.size)], axis=1)
    parts = [Surface(outward * radius + np.array([0, 0, 1.0]) * heights.reshape(-1, 1), outward)]
    if caps:
        x, y = (values.ravel() for values in np.meshgrid(_grid(radius, spacing), _grid(radius, spacing)))
        x, y = x[np.hypot(x, y) <= radius], y[np.hypot(x, y) <= radius]
        for sign in (-1.0, 1.0):
            cap = np.stack([x, y, np.full(x.size, sign * half_length)], axis=1)
            parts.append(Surface(cap, np.tile([0.0, 0.0, sign], (x.size, 1))))
    return Surface.join(parts)


def _ellipsoid(radii: Array, spacing: float) -> Surface:
    count = int(np.clip(4 * np.pi * radii.max() ** 2 / spacing**2, 32, 3000))
    index = np.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, np.pi * (1 + np.sqrt(5)) * index  # Fibonacci sphere
    ring = np.sqrt(1 - height**2)
    unit = np.stack([ring * np.cos(turn), ring * np.sin(turn), height], axis=1)
    normals = unit / radii
    return Surface(unit * radii, normals / np.linalg.norm(normals, axis=1, keepdims=True))


def _capsule(radius: float, half_length: float, spacing: float) -> Surface:
    ball = _ellipsoid(np.full(3, radius), spacing)
    ends = Surface(ball.points + np.sign(ball.points[:, 2:]) * np.array([0, 0, half_length]), ball.normals)
    return Surface.join([_cylinder(radius, half_length, spacing, caps=False), ends])


def _mesh(model: Any, mesh: int) -> Surface:
    first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
    vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]].astype(float)
    corners = vertices[model.mesh_face[first_face : first_face + model.mesh_facenum[mesh]]]  # (faces, 3 corners, 3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    shares = np.array([[1, 1, 1], [4, 1, 1], [1, 4, 1], [1, 1, 4]]) / np.array([[3], [6], [6], [6]])
    return Surface(np.concatenate([corners.transpose(0, 2, 1) @ share for share in shares]), np.tile(normals, (4, 1)))


def sample_surface(model: Any, geom: int, spacing: float) -> Surface:
    """Points about `spacing` apart on the surface of a geom, in the geom's own frame. Planes give none."""
    from mujoco import mjtGeom as shape  # the simulator is loaded only when used

    size, kind = model.geom_size[geom].copy(), model.geom_type[geom]
    if kind == shape.mjGEOM_BOX:
        return _box(size, spacing)
    if kind == shape.mjGEOM_CYLINDER:
        return _cylinder(size[0], size[1], spacing)
    if kind == shape.mjGEOM_CAPSULE:
        return _capsule(size[0], size[1], spacing)
    if kind == shape.mjGEOM_SPHERE:
        return _ellipsoid(np.full(3, size[0]), spacing)
    if kind == shape.mjGEOM_ELLIPSOID:
        return _ellipsoid(size, spacing)
    if kind == shape.mjGEOM_MESH:
        return _mesh(model, model.geom_dataid[geom])
    return Surface(np.zeros((0, 3)), np.zeros((0, 3)))


class Joint:
    """A hinge or slide of a fixture: a drawer, a knob, a door."""

    def __init__(self, scene: Scene, name: str, owner: str) -> None:
        self._scene, self._index, self.owner = scene, scene.model.joint(name).id, owner
        body = scene.model.jnt_bodyid[self._index]
        self.geoms = [geom for geom in scene.geoms[owner] if scene.model.geom_bodyid[geom] == body]

    @property
    def value(self) -> float:
        """Position of the joint (m or rad)."""
        return float(self._scene.data.qpos[self._scene.model.jnt_qposadr[self._index]])

    @property
    def axis(self) -> Array:
        """Its axis in the world frame, (3,)."""
        return np.array(self._scene.data.xaxis[self._index])

    @property
    def anchor(self) -> Array:
        """A point on its axis in the world frame, (3,)."""
        return np.array(self._scene.data.xanchor[self._index])

    def points(self) -> Array:
        """Points on the moving part, (N, 3)."""
        return self._scene.points(self.owner, self.geoms)


class Scene:
    """Ground truth of a LIBERO environment: where objects, fixtures and regions are, and what touches what.

    Args:
        domain: LIBERO's BDDL environment (`ControlEnv.env`); the scene is valid until its model is rebuilt.
    """

    def __init__(self, domain: Any) -> None:
        self.domain = domain
        self.model, self.data = domain.sim.model._model, domain.sim.data._data
        self.table_height = max(0.0, float(domain.workspace_offset[2]))
        bodies = {self.model.body(index).name: index for index in range(self.model.nbody)}
        self._movable = set(domain.objects_dict)
        named = {**domain.objects_dict, **domain.fixtures_dict}
        self._body = {name: bodies[thing.root_body] for name, thing in named.items() if thing.root_body in bodies}
        self.geoms: dict[str, list[int]] = {name: [] for name in self._body}
        owner = self._owners()
        for geom in range(self.model.ngeom):
            collides = self.model.geom_contype[geom] or self.model.geom_conaffinity[geom]
            name = owner[self.model.geom_bodyid[geom]]
            if collides and name is not None:
                self.geoms[name].append(geom)
        self._surfaces: dict[tuple[int, float], Surface] = {}

    def _owners(self) -> list[str | None]:
        """For each body the object or fixture that it is a part of; parents come before children in MuJoCo."""
        roots = {body: name for name, body in self._body.items()}
        owners: list[str | None] = []
        for body in range(self.model.nbody):
            parent = self.model.body_parentid[body]
            owners.append(roots.get(body, owners[parent] if body else None))
        return owners

    @cached_property
    def _robot_geoms(self) -> set[int]:
        bodies = self.model.geom_bodyid
        prefixes = ("robot0", "gripper0")
        return {g for g in range(self.model.ngeom) if self.model.body(bodies[g]).name.startswith(prefixes)}

    @cached_property
    def _fingers(self) -> tuple[set[int], set[int]]:
        parts = self.domain.robots[0].gripper.important_geoms
        left, right = ({self.model.geom(name).id for name in parts[side]} for side in ("left_finger", "right_finger"))
        return left, right

    def _local(self, geom: int, spacing: float) -> Surface:
        key = (geom, spacing)
        if key not in self._surfaces:
            self._surfaces[key] = sample_surface(self.model, geom, spacing)
        return self._surfaces[key]

    def surface(self, name: str, geoms: Sequence[int] | None = None, spacing: float = OBJECT_SPACING) -> Surface:
        """Surface of an object or fixture where it is now; `geoms` restricts it to some of its geoms."""
        return Surface.join(
            self._local(geom, spacing).moved(self.data.geom_xpos[geom], self.data.geom_xmat[geom].reshape(3, 3))
            for geom in (self.geoms[name] if geoms is None else geoms)
        )

    def points(self, name: str, geoms: Sequence[int] | None = None) -> Array:
        """Points (N, 3) on an object or fixture."""
        return self.surface(name, geoms).points

    def obstacles(self, exclude: Iterable[str] = (), near: Array | None = None, radius: float = 0.35) -> Array:
        """Points (N, 3) on everything but `exclude`, only those within `radius` (horizontally) of `near` if given."""
        names = [name for name in self.geoms if name not in set(exclude)]
        points = Surface.join(self.surface(name, spacing=OBSTACLE_SPACING) for name in names).points
        if near is None:
            return points
        kept: Array = points[np.hypot(*(points[:, :2] - near[:2]).T) < radius]
        return kept

    def position(self, name: str) -> Array:
        """Origin of an object or fixture, (3,)."""
        return np.array(self.data.xpos[self._body[name]])

    def lowest(self, name: str) -> float:
        """Height of the lowest point of an object."""
        return float(self.points(name)[:, 2].min())

    def middle(self, name: str) -> Array:
        """Origin of an object, moved horizontally to the middle of its bounding box, (3,)."""
        points, middle = self.points(name), self.position(name)
        middle[:2] = (points[:, :2].min(axis=0) + points[:, :2].max(axis=0)) / 2
        return middle

    def is_region(self, name: str) -> bool:
        """Whether `name` is a region of LIBERO (a site) and not an object."""
        return name in self.domain.object_sites_dict

    def region_owner(self, region: str) -> str:
        """Name of the object or fixture that a region belongs to; the arena's own regions give ""."""
        return self.domain.object_sites_dict[region].parent_name or ""

    def region_center(self, region: str) -> Array:
        """Centre of a region, (3,)."""
        return np.array(self.data.site(region).xpos)

    def region_half_height(self, region: str) -> float:
        """Half the vertical extent of a region, as LIBERO's containment test computes it."""
        rotation = self.data.site(region).xmat.reshape(3, 3)
        return float(np.abs(rotation @ self.domain.object_sites_dict[region].size)[2])

    def region_joint(self, region: str) -> Joint | None:
        """The joint that moves a region (that of a drawer), or None."""
        if not self.is_region(region) or not self.domain.object_sites_dict[region].joints:
            return None
        return Joint(self, self.domain.object_sites_dict[region].joints[0], self.region_owner(region))

    def fixture_joint(self, name: str) -> Joint:
        """The only hinge or slide of a fixture (a stove's knob, a microwave's door).

        Raises:
            ValueError: the fixture has none, or several.
        """
        names = [self.model.joint(index).name for index in range(self.model.njnt)]
        names = [joint for joint in names if joint.startswith(f"{name}_")]
        if len(names) != 1:
            raise ValueError(f"{name} should have one joint, but has {names or 'none'}")
        return Joint(self, names[0], name)

    def holds(self, predicate: Sequence[str]) -> bool:
        """Whether a BDDL predicate, for example ("on", "bowl_1", "plate_1"), holds now."""
        return bool(self.domain._eval_predicate(list(predicate)))

    def _contacts(self, geoms: set[int]) -> set[int]:
        pairs = [(contact.geom1, contact.geom2) for contact in self.data.contact[: self.data.ncon]]
        return {b for a, b in pairs if a in geoms} | {a for a, b in pairs if b in geoms}

    def touching(self, name: str) -> bool:
        """Whether an object touches anything but itself and the robot."""
        own = set(self.geoms[name])
        return bool(self._contacts(own) - own - self._robot_geoms)

    def grasped(self, name: str) -> bool:
        """Whether both fingers touch an object."""
        touched = self._contacts(set(self.geoms[name]))
        return all(touched & finger for finger in self._fingers)


class Reach:
    """How far the Panda gets with its hand pointing down.

    The wrist then stands 0.088 m behind and 0.204 m above the grip point, and the arm is stretched when the wrist is
    0.70 m from the shoulder. The limits below keep away from that singularity, near which the controller gets slow.
    """

    WRIST_BACK, WRIST_UP = 0.088, 0.204
    CARRY, WAYPOINT, COMFORTABLE = 0.655, 0.62, 0.62
    TOP = 0.665

    def __init__(self, scene: Scene) -> None:
        shoulder = scene.data.body("robot0_link1").xpos
        self.base = np.array(shoulder[:2])
        self._height = float(shoulder[2])

    def distance(self, point: ArrayLike) -> float:
        """Distance from shoulder to wrist with the grip point at `point`."""
        x, y, z = np.asarray(point, dtype=float)
        return float(
            np.hypot(np.hypot(x - self.base[0], y - self.base[1]) - self.WRIST_BACK, z + self.WRIST_UP - self._height)
        )

    def highest(self, point: ArrayLike) -> float:
        """Largest height of the grip point above (x, y)."""
        away = np.hypot(*(np.asarray(point)[:2] - self.base)) - self.WRIST_BACK
        return float(self._height - self.WRIST_UP + np.sqrt(max(0.0, self.TOP**2 - away**2)))

    def within(self, point: ArrayLike, height: float, limit: float = CARRY) -> Array:
        """(3,): (x, y) of `point` at `height`, pulled towards the base until it is within `limit`."""
        offset = np.asarray(point, dtype=float)[:2] - self.base
        up = height + self.WRIST_UP - self._height
        farthest = self.WRIST_BACK + np.sqrt(max(0.04, limit**2 - up**2))
        return np.append(self.base + offset * min(1.0, farthest / np.linalg.norm(offset)), height)
