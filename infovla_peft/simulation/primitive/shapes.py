"""Vocabulary of the primitive assets: parts, sites, joints, bodies; and the few composite shapes built of boxes.

Lengths in metres, angles in degrees, colours as RGB in [0, 1]. Round things collide as prisms of crossed boxes: MuJoCo
gives box pairs several contact points, where a cylinder standing on a box gets one and wobbles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
Colour = tuple[float, float, float]

IDENTITY: Quaternion = (1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Part:
    """A primitive geom. `size` holds MuJoCo's half sizes; `solid` parts collide, `shown` parts are drawn."""

    kind: str
    size: tuple[float, ...]
    colour: Colour
    position: Vector = (0.0, 0.0, 0.0)
    rotation: Quaternion = IDENTITY
    solid: bool = True
    shown: bool = True

    def volume(self) -> float:
        """Volume in m³ (boxes and cylinders; nothing else is solid here)."""
        if self.kind == "box":
            return 8.0 * math.prod(self.size)
        return 2.0 * math.pi * self.size[0] ** 2 * self.size[1]


@dataclass(frozen=True)
class Site:
    """A named box or cylinder that LIBERO's predicates look at; never drawn unless `colour` is given."""

    name: str
    position: Vector
    size: tuple[float, ...]
    rotation: Quaternion = IDENTITY
    kind: str = "box"
    colour: Colour | None = None


@dataclass(frozen=True)
class Joint:
    """One degree of freedom between a body and its parent; range in metres (slide) or radians (hinge)."""

    name: str
    kind: str
    axis: Vector
    range: tuple[float, float]
    damping: float
    position: Vector = (0.0, 0.0, 0.0)
    frictionloss: float = 0.0


@dataclass(frozen=True)
class Body:
    """A rigid body: its parts and sites, at most one joint, and the bodies that hang on it.

    `mass` gives the body a point inertia at its origin with unit moments, as LIBERO does for drawers, doors and knobs.
    """

    name: str
    parts: Sequence[Part] = ()
    sites: Sequence[Site] = ()
    joint: Joint | None = None
    bodies: Sequence[Body] = ()
    position: Vector = (0.0, 0.0, 0.0)
    rotation: Quaternion = IDENTITY
    mass: float | None = None


@dataclass(frozen=True)
class Thing:
    """An object or a fixture: one XML file.

    `bottom`, `top` and `radius` place LIBERO's three bounding sites, from which its samplers compute where a thing
    stands and how much room it needs. `mass` (kg) is spread over the solid parts by volume; without it they have
    `density` (kg/m³; for fixtures, where it matters to what moves on a joint).
    """

    file: str
    body: Body
    bottom: float
    top: float
    radius: float
    mass: float | None = None
    density: float = 100.0


def about(axis: str, degrees: float) -> Quaternion:
    """Quaternion (w, x, y, z) of a rotation about one coordinate axis."""
    half = math.radians(degrees) / 2
    vector = [0.0, 0.0, 0.0]
    vector["xyz".index(axis)] = math.sin(half)
    return (math.cos(half), vector[0], vector[1], vector[2])


def compose(a: Quaternion, b: Quaternion) -> Quaternion:
    """The rotation b followed by a."""
    aw, ax, ay, az = a
    bw, bx, by, bz = b
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


def rotate(rotation: Quaternion, vector: Vector) -> Vector:
    """The vector turned by the rotation."""
    w, x, y, z = rotation
    _, a, b, c = compose(compose(rotation, (0.0, *vector)), (w, -x, -y, -z))
    return (a, b, c)


def placed(parts: Iterable[Part], offset: Vector = (0.0, 0.0, 0.0), rotation: Quaternion = IDENTITY) -> list[Part]:
    """The parts turned about the origin, then moved."""
    result = []
    for part in parts:
        x, y, z = rotate(rotation, part.position)
        position = (x + offset[0], y + offset[1], z + offset[2])
        result.append(replace(part, position=position, rotation=compose(rotation, part.rotation)))
    return result


def hidden(parts: Iterable[Part]) -> list[Part]:
    """The parts for collision only."""
    return [replace(part, shown=False) for part in parts]


def painted(parts: Iterable[Part]) -> list[Part]:
    """The parts for the eye only."""
    return [replace(part, solid=False) for part in parts]


def box(low: Vector, high: Vector, colour: Colour) -> Part:
    """An axis-aligned box between two corners."""
    position = ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2, (low[2] + high[2]) / 2)
    size = ((high[0] - low[0]) / 2, (high[1] - low[1]) / 2, (high[2] - low[2]) / 2)
    return Part("box", size, colour, position)


def cylinder(radius: float, low: float, high: float, colour: Colour) -> Part:
    """An upright cylinder about the z axis, drawn only."""
    return Part("cylinder", (radius, (high - low) / 2), colour, (0.0, 0.0, (low + high) / 2), solid=False)


def prism(radius: float, low: float, high: float, colour: Colour, sides: int = 12) -> list[Part]:
    """A regular prism about the z axis that collides: sides / 2 crossed boxes. `radius` reaches its flat faces."""
    edge = radius * math.tan(math.pi / sides)
    slab = box((-radius, -edge, low), (radius, edge, high), colour)
    turns = (placed([slab], rotation=about("z", 360.0 * k / sides)) for k in range(sides // 2))
    return [part for turn in turns for part in hidden(turn)]


def drum(radius: float, low: float, high: float, colour: Colour, sides: int = 12) -> list[Part]:
    """A solid upright cylinder: drawn round, colliding as a prism."""
    return [*prism(radius, low, high, colour, sides), cylinder(radius, low, high, colour)]


def ring(
    lower: tuple[float, float], upper: tuple[float, float], thickness: float, colour: Colour, segments: int = 16
) -> list[Part]:
    """A wall of tilted boxes around the z axis from (radius, height) `lower` to (radius, height) `upper`."""
    (r0, z0), (r1, z1) = lower, upper
    length, radius = math.hypot(r1 - r0, z1 - z0), max(r0, r1)
    width = (radius + thickness / 2) * math.tan(math.pi / segments)
    slab = Part("box", (thickness / 2, width, length / 2), colour)
    lean = about("y", math.degrees(math.atan2(r1 - r0, z1 - z0)))
    wall = placed([slab], ((r0 + r1) / 2, 0.0, (z0 + z1) / 2), lean)
    return [part for k in range(segments) for part in placed(wall, rotation=about("z", 360.0 * k / segments))]
