"""Objects that a robot can move. Sizes are those of LIBERO's things, rounded; shapes and colours are our own."""

from __future__ import annotations

from infovla_peft.simulation.primitive.shapes import (
    Body,
    Colour,
    Part,
    Thing,
    box,
    cylinder,
    drum,
    painted,
    ring,
)

_BLACK: Colour = (0.07, 0.07, 0.08)
_WHITE: Colour = (0.94, 0.94, 0.92)
_CREAM: Colour = (0.93, 0.88, 0.74)


def _object(
    name: str,
    parts: list[Part],
    mass: float,
    *,
    folder: str = "stable_hope_objects",
    bottom: float = -0.06,
    top: float = 0.04,
    radius: float = 0.025,
) -> Thing:
    return Thing(f"{folder}/{name}/{name}.xml", Body("object", parts), bottom, top, radius, mass)


def _bowl() -> list[Part]:
    rim = (0.30, 0.30, 0.32)
    return [
        *drum(0.024, 0.0016, 0.0068, _BLACK),
        *ring((0.023, 0.0045), (0.0425, 0.0160), 0.003, _BLACK),
        *ring((0.0425, 0.0155), (0.0515, 0.0515), 0.003, _BLACK),
        *painted(ring((0.0511, 0.0480), (0.0520, 0.0520), 0.0034, rim)),
    ]


def _plate() -> list[Part]:
    pink = (0.85, 0.42, 0.42)
    return [
        *drum(0.032, -0.0025, 0.0045, _WHITE),
        *ring((0.030, 0.0010), (0.0665, 0.0137), 0.0045, _WHITE, segments=12),
        *painted(ring((0.0575, 0.0108), (0.0668, 0.0140), 0.0050, pink, segments=12)),
    ]


def _wine_bottle() -> list[Part]:
    glass, label, foil = (0.05, 0.13, 0.07), _CREAM, (0.50, 0.06, 0.10)
    return [
        *drum(0.0205, 0.0011, 0.0690, glass),
        *drum(0.0150, 0.0690, 0.0810, glass, sides=8),
        *drum(0.0105, 0.0810, 0.0950, glass, sides=8),
        *drum(0.0073, 0.0950, 0.1580, foil, sides=8),
        *painted([cylinder(0.0209, 0.0170, 0.0520, label)]),
    ]


def _carton(size: tuple[float, float, float], colour: Colour, band: Colour) -> list[Part]:
    """A flat packet with a band of another colour across its middle."""
    x, y, z = size
    return [
        box((-x, -y, -z), (x, y, z), colour),
        *painted([box((-x * 0.45, -y - 0.0003, -z - 0.0003), (x * 0.45, y + 0.0003, z + 0.0003), band)]),
    ]


OBJECTS = (
    _object("akita_black_bowl", _bowl(), 0.0056, folder="stable_scanned_objects"),
    _object("plate", _plate(), 0.0115, folder="stable_scanned_objects"),
    _object("wine_bottle", _wine_bottle(), 0.0154, folder="turbosquid_objects"),
    _object(
        "cream_cheese",
        _carton((0.0406, 0.0213, 0.0089), (0.16, 0.33, 0.75), (0.88, 0.92, 0.97)),
        0.0062,
        bottom=-0.025,
        top=0.025,
        radius=0.03,
    ),
)
